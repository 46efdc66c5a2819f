"""Server-sent events, parsed as the HTML standard's event stream interpretation says.

Takes bytes however the network cut them: lines are decoded only when they are whole, so a
character that lies across two pieces stays one. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class EventParser:
    """`feed` returns the data of every event that became complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._at_start = True
        self._after_return = False  # the last line ended in \\r: a \\n belongs to it

    def feed(self, piece: bytes) -> list[str]:
        if self._after_return and piece:
            piece = piece.removeprefix(b"\n")
            self._after_return = False
        buffer = self._rest + piece
        if self._at_start:
            if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
                self._rest = buffer
                return []
            buffer = buffer.removeprefix(_BOM)
            self._at_start = False
        events: list[str] = []
        begin = 0
        for end in _LINE_END.finditer(buffer):
            self._line(buffer[begin : end.start()], events)
            begin = end.end()
            self._after_return = end[0] == b"\r" and begin == len(buffer)
        self._rest = buffer[begin:]
        return events

    def _line(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data = []
            return
        name, _, value = line.partition(b":")  # a comment has an empty name
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
