"""Conversations and texts to token ids, away from the event loop if they are long.

What users and tools write is only ever text: a special token's name in it never becomes that
token. To that end such names are broken by a mark before the template is rendered, and the
rendered text is tokenized in pieces, from mark to mark.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from nanovllm.errors import InvalidRequestError
from nanovllm.server.errors import invalid
from nanovllm.server.schemas import ROLES, ChatMessage, ContentPart, ToolCall, ToolSpec
from nanovllm.server.tool_calls import sound
from nanovllm.text.chat import ChatTemplate, check_variables, join_parts, part_text
from nanovllm.text.tokenizer import LONG_TEXT, Tokenizer

MAX_NAMES = 1 << 15  # of special tokens in the texts of a conversation
UNTRUSTED_ROLES = ("user", "tool")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """reasoning says whether a <think> block may come next: "none" after one that the prompt has
    closed, "open" in one that it has opened, else "optional"."""

    token_ids: list[int]
    reasoning: str


class PromptEncoder:
    """Owns two threads for long texts; `close` ends them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nanovllm-text")
        added = tokenizer.added_tokens()
        self._any_token = _alternatives(added)
        self._special_token = _alternatives([name for name, special in added.items() if special])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        def work() -> list[int]:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

        if len(text) < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Of each text; an empty one has no tokens, not even special ones."""

        def work() -> list[list[int]]:
            encode = self._tokenizer.encode
            return [encode(t, add_special_tokens=add_special_tokens) if t else [] for t in texts]

        if sum(len(text) + 1 for text in texts) < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, with the names of special tokens."""

        def work() -> str:
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

        if len(token_ids) < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[ToolSpec] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        """Raises ApiError if the messages are not a conversation, or the template refuses them."""
        variables = dict(variables or {})
        try:
            check_variables(variables, "chat_template_kwargs")
        except InvalidRequestError as error:
            raise invalid(str(error), "chat_template_kwargs") from None
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        specs = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]

        def work() -> ChatPrompt:
            plain = [self._plain(one, f"messages[{i}]", mark) for i, one in enumerate(messages)]
            return self._render(plain, specs, variables, add_generation_prompt, mark)

        # All of it counts: templates write out tools, and what models thought and called.
        if len(msgspec.json.encode((messages, specs, variables))) < LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        variables: dict[str, Any],
        add_generation_prompt: bool,
        mark: str,
    ) -> ChatPrompt:
        try:
            text = self._template.render(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except InvalidRequestError as error:
            raise invalid(str(error), "messages") from None
        except (RecursionError, ArithmeticError, AttributeError, LookupError) as error:
            raise invalid(
                f"the chat template cannot render these messages ({type(error).__name__})",
                "messages",
            ) from None
        pieces = text.split(mark)
        if len(pieces) > MAX_NAMES:
            raise invalid(
                f"messages hold {len(pieces) - 1} names of special tokens; at most {MAX_NAMES} are "
                "taken apart",
                "messages",
            )
        token_ids: list[int] = []
        for piece in pieces:
            token_ids += self._tokenizer.encode(piece, add_special_tokens=False)
        end = text.rstrip()
        reasoning = "none" if end.endswith("</think>") else "optional"
        return ChatPrompt(token_ids, "open" if end.endswith("<think>") else reasoning)

    def _plain(self, message: ChatMessage, where: str, mark: str) -> dict[str, Any]:
        """The message as templates know it."""
        if message.role not in ROLES:
            raise invalid(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        names = self._any_token if message.role in UNTRUSTED_ROLES else self._special_token

        def broken(text: str) -> str:
            if names is None:
                return text
            return names.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": broken(_text(message, where))}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(message, name) is not None:
                plain[name] = broken(getattr(message, name))
        if message.tool_calls:
            plain["tool_calls"] = [_tool_call(call, broken) for call in message.tool_calls]
        return plain


def _alternatives(names: Sequence[str] | Mapping[str, Any]) -> re.Pattern[str] | None:
    words = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def num_characters(message: ChatMessage) -> int:
    """Of what a message says."""
    content = message.content or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part.text or "") for part in content)


def _text(message: ChatMessage, where: str) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":
            return ""
        raise invalid(f"{where}.content must be a string or a list of parts", f"{where}.content")
    if isinstance(content, str):
        return content
    return join_parts(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part(part: ContentPart, where: str) -> str:
    try:
        return part_text(msgspec.structs.asdict(part), where)
    except InvalidRequestError as error:
        raise invalid(str(error), where) from None


def _tool(tool: ToolSpec, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise invalid(f"{where} must be of type 'function', got {tool.type[:50]!r}", where)
    spec = {"name": tool.function.name, "description": tool.function.description}
    spec["parameters"] = tool.function.parameters  # type: ignore[assignment]
    return {
        "type": "function",
        "function": {name: value for name, value in spec.items() if value is not None},
    }


def _tool_call(call: ToolCall, broken: Callable[[str], str]) -> dict[str, Any]:
    """Templates expect the arguments as an object, clients send them as JSON.

    broken breaks the names of special tokens: models write what users have said into arguments.
    """
    given = call.function.arguments or "{}"
    try:
        value = json.loads(given) if isinstance(given, str) else given
        arguments = json.loads(broken(sound(json.dumps(value, ensure_ascii=False))))
    except (ValueError, RecursionError):
        # A model's broken call, quoted back as it was; or too deep, which the template will say.
        arguments = broken(given) if isinstance(given, str) else given
    return {
        "type": "function",
        "id": broken(call.id or ""),
        "function": {"name": broken(call.function.name), "arguments": arguments or {}},
    }
