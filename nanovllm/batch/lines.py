"""The batch format: lines of the input as requests, answers as lines of the output. Pure.

Source: OpenAI's batch API (custom_id, method, url, body in; id, custom_id, response, error out).
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from nanovllm.client.api import Answer

PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class Item:
    """One request; line counts from 1."""

    line: int
    custom_id: str
    path: str
    body: dict[str, Any]


class BadLineError(Exception):
    """A line that is no request; the message says why. custom_id is None if it has none."""

    def __init__(self, line: int, message: str, custom_id: str | None = None) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line
        self.custom_id = custom_id


def parse(line: int, raw: bytes) -> Item:
    """Raises BadLineError."""
    try:
        record = json.loads(raw)
    except UnicodeDecodeError:
        raise BadLineError(line, "this is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(line, f"this is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLineError(line, "this is no JSON object")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLineError(line, f"custom_id must be a text, got {_short(custom_id)}")
    if record.get("method", "POST") != "POST":
        raise BadLineError(line, f"method must be POST, got {_short(record['method'])}", custom_id)
    path = record.get("url")
    if path not in PATHS:
        known = " or ".join(PATHS)
        raise BadLineError(line, f"url must be {known}, got {_short(path)}", custom_id)
    body = record.get("body")
    if not isinstance(body, dict):
        raise BadLineError(line, f"body must be an object, got {_short(body)}", custom_id)
    if body.get("stream"):
        raise BadLineError(line, "body.stream is not for batches: leave it out", custom_id)
    return Item(line, custom_id, path, body)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def answered(item: Item, answer: Answer) -> dict[str, Any]:
    """The output's line for an answer; error is null if and only if it is a success."""
    error = None
    if answer.status != 200:
        said = answer.body.get("error") if isinstance(answer.body, dict) else None
        told = said if isinstance(said, dict) else {}
        error = {
            "code": told.get("code") or f"http_{answer.status}",
            "message": told.get("message") or str(answer.body)[:500],
        }
    response = {
        "status_code": answer.status,
        "request_id": answer.request_id,
        "body": answer.body,
    }
    return _entry(item.custom_id, response, error)


def unanswered(item: Item, code: str, message: str) -> dict[str, Any]:
    return _entry(item.custom_id, None, {"code": code, "message": message})


def refused(bad: BadLineError) -> dict[str, Any]:
    """error.line is only here, where no request was made of the line."""
    error = {"code": "invalid_line", "message": str(bad), "line": bad.line}
    return _entry(bad.custom_id, None, error)


def _entry(
    custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
