"""Serves a model to OpenAI's clients over HTTP, on this machine alone unless --host says more.

Every flag may also stand in a YAML file (--config), under its name without the dashes; flags win.
Loads no torch: the engine runs in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm import ConfigError, EngineConfig
from nanovllm.cli.flags import Parser, add_engine_flags

if TYPE_CHECKING:
    from nanovllm.server.service import ServerConfig

NEEDS = ("msgspec", "prometheus_client", "starlette", "uvicorn", "uvloop", "httptools", "yaml")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOG_LEVELS = ("debug", "info", "warning", "error")
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

    flags = _flags(options)
    in_file = _read_file(options.config) if options.config is not None else {}
    used = {name: value for name, value in in_file.items() if name not in flags}
    try:
        _options(used)
    except ConfigError as error:
        raise ConfigError(f"{options.config}: {error}") from None
    chosen = _options(used | flags)
    logging.basicConfig(level=chosen.log_level.upper(), format=LOG_FORMAT)
    server = chosen.server
    if server.host not in LOOPBACK and not server.api_keys:
        logging.warning("%s: everybody who reaches it may use it; --api-key asks for a key",
                        server.host)  # fmt: skip
    return serve(
        server,
        chosen.engine,
        chat_template=chosen.chat_template,
        in_process=chosen.in_process,
    )


def need_extra(command: str) -> None:
    """Raises ConfigError if packages of the extra are missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{command} needs {', '.join(missing)}: install nanovllm with its extra 'server'"
        )


@dataclass(frozen=True, slots=True)
class _Options:
    server: ServerConfig
    engine: EngineConfig
    chat_template: str | None
    in_process: bool
    log_level: str


def _options(values: Mapping[str, Any]) -> _Options:
    """Raises ConfigError, which names the first of the values that is wrong."""
    # Loads what need_extra has found.
    from nanovllm.server.service import ServerConfig

    rest = dict(values)
    level = str(rest.pop("log_level", "info")).lower()
    if level not in LOG_LEVELS:
        raise ConfigError(f"log_level must be debug, info, warning or error, got {level}")
    chat_template = rest.pop("chat_template", None)
    if not isinstance(chat_template, str | None):
        raise ConfigError(f"chat_template must be the name of a file, got {chat_template!r}")
    in_process = rest.pop("in_process", False)
    if not isinstance(in_process, bool):
        raise ConfigError(f"in_process must be true or false, got {in_process!r}")
    engine_names = {field.name for field in fields(EngineConfig)}
    engine = {name: rest.pop(name) for name in values if name in engine_names}
    server = ServerConfig(
        api_keys=tuple(rest.pop("api_key", ())),
        served_model_names=tuple(rest.pop("served_model_name", ())),
        **rest,
    )
    return _Options(server, EngineConfig.from_kwargs(**engine), chat_template, in_process, level)


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line itself says."""
    flags = dict(vars(options))
    model = flags.pop("model_name")
    flags.pop("config")
    flags.pop("help", None)
    return flags if model is None else flags | {"model": model}


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
