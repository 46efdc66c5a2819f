"""The event loop that clients run on."""

from __future__ import annotations

import asyncio


def runner() -> asyncio.Runner:
    """On uvloop where it is installed: clients should cost less than what they wait for."""
    try:
        import uvloop  # optional: comes with the extra 'server'
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
