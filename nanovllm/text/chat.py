"""Chat messages to a prompt, with the model's own Jinja template in a sandbox.

The environment is the one that model authors test against (Hugging Face's documentation of chat
templates): immutable sandbox, trimmed blocks, `raise_exception`, `strftime_now`, `tojson` without
HTML escapes, loop controls, and `{% generation %}` marks that render as nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from nanovllm.errors import InvalidRequestError
from nanovllm.text.tokenizer import Tokenizer, read_json

Message = Mapping[str, Any]
PARAMETERS = ("messages", "tools", "add_generation_prompt")
EXAMPLE = '[{"role": "user", "content": "..."}]'
# Names that the template's call sets itself, or that users of transformers give to its call.
RESERVED = {
    *PARAMETERS,
    "chat_template",
    "conversation",
    "documents",
    "raise_exception",
    "return_dict",
    "return_tensors",
    "self",
    "strftime_now",
    "tokenize",
}


class _Generation(jinja2.ext.Extension):
    """Renders the body of {% generation %} blocks, which only matter in training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be a mapping with a role: {message!r}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{where} must have a role, which is a string: {message!r}")
    if content is None and not message.get("tool_calls"):
        raise InvalidRequestError(f"{where} (role {role!r}) has neither content nor tool_calls")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise InvalidRequestError(
            f"{where} (role {role!r}): content must be a string or a list of parts, got {content!r}"
        )


def part_text(part: Mapping[str, Any], where: str) -> str:
    """What a part of a content says; raises InvalidRequestError if it is not text."""
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return part["refusal"]
    if kind == "text":
        raise InvalidRequestError(f"{where} has no text")
    raise InvalidRequestError(
        f"{where} is of type {str(kind)[:50]!r}: this model reads text only, and no address in a "
        "request is ever fetched"
    )


def join_parts(texts: Iterable[str]) -> str:
    """The content that parts make together."""
    return "\n".join(texts)


def _with_text(message: Message, where: str) -> Message:
    """The same with a content that is a string, as all templates know it, if it was parts."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    texts = []
    for index, part in enumerate(content):
        place = f"{where}: content[{index}]"
        if not isinstance(part, Mapping):
            raise InvalidRequestError(f"{place} must be a mapping with a type, got {part!r:.100}")
        texts.append(part_text(part, place))
    return {**message, "content": join_parts(texts)}


def check_variables(variables: object, source: str) -> None:
    """Raises InvalidRequestError if variables, from this source, are none that a template may have.

    They are a template's own, as `enable_thinking`; not special tokens, nor what has a parameter.
    """
    if not isinstance(variables, Mapping):
        raise InvalidRequestError(f"{source} must be a mapping of names to values: {variables!r}")
    for name in variables:
        if not isinstance(name, str):
            raise InvalidRequestError(f"{source} must have names that are strings, got {name!r}")
        if name in RESERVED or name.endswith("_token") or not name.isidentifier():
            hint = ": it is a parameter of its own" if name in PARAMETERS else ""
            raise InvalidRequestError(f"{source} cannot set {name[:50]!r}{hint}")


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **options)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(source)


class ChatTemplate:
    """Renders messages; `source` is None for a model that has no template."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """chat_template.jinja, chat_template.json, or the field of tokenizer_config.json."""
        path = directory / "chat_template.jinja"
        source: Any = path.read_text(encoding="utf-8") if path.exists() else None
        if source is None:
            source = read_json(directory / "chat_template.json").get("chat_template")
        if source is None:
            source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several by name; "default" is the one for chat
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        return cls(source, tokenizer.special_tokens())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text, special tokens written out.

        Raises InvalidRequestError if there is no template, or the template refuses the messages.
        """
        if self.source is None:
            raise InvalidRequestError("this model has no chat template: use generate()")
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
            raise InvalidRequestError(
                f"messages must be a list of at least one message, as {EXAMPLE}, "
                f"got {messages!r:.100}"
            )
        check_variables(variables, "the template's variables")
        for index, message in enumerate(messages):
            _check(message, f"message {index}")
        plain = [_with_text(message, f"message {i}") for i, message in enumerate(messages)]
        try:
            return _compile(self.source).render(
                **self._special_tokens,
                **variables,
                messages=plain,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(f"the chat template refused: {reason}") from None
