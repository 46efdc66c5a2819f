#!/usr/bin/env python3
"""Asks a server in the same container how it is: exit status 0 if it answers 200, else 1.

    nanovllm-probe /health | /ready [--config FILE] [--port N]

/ready asks for the API key, which stands in the server's own configuration file. Needs nothing but
Python, and PyYAML if there is a file to read.
"""

from __future__ import annotations

import argparse
import http.client
import sys
from pathlib import Path
from typing import Any

SECONDS = 4.0


def settings(path: Path) -> dict[str, Any]:
    """What the server's configuration file says; names with dashes."""
    import yaml  # the server has read the file with it

    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {str(name).replace("_", "-"): value for name, value in values.items()}


def headers(values: dict[str, Any]) -> dict[str, str]:
    keys = values.get("api-key") or []
    keys = keys if isinstance(keys, list) else [keys]
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


def main(line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="asks the server in this container how it is")
    parser.add_argument("path", choices=["/health", "/ready"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args(line)
    values = settings(options.config) if options.config else {}
    port = options.port or values.get("port") or 8000
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", options.path, headers=headers(values))
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer on port {port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        print(f"{options.path} answers {answer.status}: {body}", file=sys.stderr)
    return int(answer.status != 200)


if __name__ == "__main__":
    sys.exit(main())
