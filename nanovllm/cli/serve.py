"""Serves a model to OpenAI's clients over HTTP, on this machine alone unless --host says more.

Every flag may also stand in a YAML file (--config), under its name without the dashes; flags win.
Loads no torch: the engine runs in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanovllm import ConfigError, EngineConfig
from nanovllm.cli.flags import Parser, add_engine_flags

NEEDS = ("msgspec", "prometheus_client", "starlette", "uvicorn", "uvloop", "httptools", "yaml")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LISTS = ("api_key", "served_model_name")
SERVER_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "host": ("address to listen on; 0.0.0.0 is every one", {"metavar": "ADDRESS"}),
    "port": ("0 takes a free one", {"type": int, "metavar": "N"}),
    "api_key": ("ask clients for one of these keys", {"nargs": "+", "metavar": "KEY"}),
    "served_model_name": (
        "names that requests may use; the first stands in answers",
        {"nargs": "+", "metavar": "NAME"},
    ),
    "any_model": ("accept every model name", {"action": argparse.BooleanOptionalAction}),
    "chat_template": ("a Jinja file instead of the model's own template", {"metavar": "FILE"}),
    "max_waiting": (
        "completions that may wait beside those that run, before 429",
        {"type": int, "metavar": "N"},
    ),
    "drain_timeout": (
        "seconds that running requests have after SIGTERM",
        {"type": float, "metavar": "X"},
    ),
    "engine_timeout": (
        "seconds without progress after which the engine counts as hung",
        {"type": float, "metavar": "X"},
    ),
    "on_engine_death": (
        "what follows when the engine ends or hangs: exit, or restart it",
        {"metavar": "WHAT"},
    ),
    "metrics_prefix": (
        "before the names of metrics; vllm suits its dashboards",
        {"metavar": "NAME"},
    ),
    "in_process": (
        "run the engine inside of the server's process, for debugging",
        {"action": argparse.BooleanOptionalAction},
    ),
    "log_level": ("debug, info, warning or error", {"metavar": "LEVEL"}),
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model_name", nargs="?", metavar="MODEL", help="the same as --model", default=None
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file with flags", default=None)
    group = parser.add_argument_group("server")
    for name, (text, options) in SERVER_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **options)
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    need_extra("serve")
    # What the check above has found; no other command needs them.
    from nanovllm.server.launch import serve
    from nanovllm.server.messages import LOG_FORMAT
    from nanovllm.server.service import ServerConfig

    values = _values(options)
    level = str(values.pop("log_level", "info")).upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"log_level must be debug, info, warning or error, got {level.lower()}")
    logging.basicConfig(level=level, format=LOG_FORMAT)
    chat_template = values.pop("chat_template", None)
    in_process = values.pop("in_process", False)
    if not isinstance(in_process, bool):
        raise ConfigError(f"in_process must be true or false, got {in_process!r}")
    engine_names = {field.name for field in fields(EngineConfig)}
    engine = {name: value for name, value in values.items() if name in engine_names}
    server = {name: value for name, value in values.items() if name not in engine_names}
    config = ServerConfig(
        api_keys=tuple(server.pop("api_key", ())),
        served_model_names=tuple(server.pop("served_model_name", ())),
        **server,
    )
    if config.host not in LOOPBACK and not config.api_keys:
        logging.warning("%s: everybody who reaches it may use it; --api-key asks for a key",
                        config.host)  # fmt: skip
    return serve(
        config,
        EngineConfig.from_kwargs(**engine),
        chat_template=chat_template,
        in_process=in_process,
    )


def need_extra(command: str) -> None:
    """Raises ConfigError if packages of the extra are missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{command} needs {', '.join(missing)}: install nanovllm with its extra 'server'"
        )


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The file's values under those of the flags."""
    flags = dict(vars(options))
    path, model = flags.pop("config"), flags.pop("model_name")
    flags.pop("help", None)
    if model is not None:
        flags["model"] = model
    return (_read_file(path) if path is not None else {}) | flags


def _read_file(path: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # comes with the extra

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold names and values")
    known = [*SERVER_FLAGS, *(field.name for field in fields(EngineConfig))]
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: unknown name {name!r}{hint}")
    for name in LISTS:
        if name not in values:
            continue
        texts = values[name] if isinstance(values[name], list) else [values[name]]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{path}: {name} must be text: put numbers in quotes")
        values[name] = texts
    return values
