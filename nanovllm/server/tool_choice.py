"""What `tool_choice` means for the form of the text: no call, any, some, or one certain call."""

from __future__ import annotations

import json
from collections.abc import Sequence

from nanovllm.errors import InvalidRequestError
from nanovllm.server.errors import invalid
from nanovllm.server.schemas import TOOL_CHOICES, ChatRequest, FunctionSpec, ToolChoice, ToolSpec
from nanovllm.server.structure import refused
from nanovllm.server.tool_grammar import TokenId, calls_grammar
from nanovllm.structured_output import StructuredOutput

Asked = tuple[str, StructuredOutput]  # the field that asks for it, and the form


def check_tool_choice(request: ChatRequest) -> None:
    """Raises ApiError unless the choice is one that the request's tools allow."""
    choice = request.tool_choice
    if isinstance(choice, str) and choice not in TOOL_CHOICES:
        raise invalid(
            f"tool_choice must be one of {', '.join(TOOL_CHOICES)} or name a function, "
            f"got {choice[:50]!r}",
            "tool_choice",
        )
    if choice in (None, "auto", "none"):
        return
    if not request.tools:
        raise invalid("tool_choice asks for a call, and there are no tools", "tool_choice")
    if isinstance(choice, ToolChoice):
        if choice.type != "function":
            raise invalid("tool_choice.type must be 'function'", "tool_choice.type")
        if all(tool.function.name != choice.function.name for tool in request.tools):
            raise invalid(
                f"tool_choice names {choice.function.name[:50]!r}, which is none of the tools",
                "tool_choice",
            )


def with_tools(
    asked: Asked | None,
    request: ChatRequest,
    tools: Sequence[ToolSpec] | None,
    style: str | None,
    token_id: TokenId,
) -> Asked | None:
    """The form of the text where the model is told of tools; asked is the form of its answer.

    Without one, and with a free choice, the text is free. Raises ApiError.
    """
    choice = request.tool_choice
    forced = choice == "required" or isinstance(choice, ToolChoice)
    if not tools or (asked is None and not forced):
        return asked
    assert style is not None, "tools were admitted"
    functions = [tool.function for tool in tools]
    if isinstance(choice, ToolChoice):
        functions = [_named(functions, choice.function.name)]
    many = not isinstance(choice, ToolChoice) and request.parallel_tool_calls is not False
    field = "tool_choice" if forced or asked is None else asked[0]
    answer = None if forced or asked is None else _schema(asked)
    try:
        grammar = calls_grammar(style, functions, token_id, many=many, answer=answer)
        return field, StructuredOutput(grammar=grammar)
    except InvalidRequestError as error:
        raise refused("tools", error) from None
    except RecursionError:
        raise invalid("the parameters of tools are nested too deeply", "tools") from None


def _named(functions: Sequence[FunctionSpec], name: str) -> FunctionSpec:
    return next(function for function in functions if function.name == name)


def _schema(asked: Asked) -> dict[str, object]:
    """The JSON schema of an answer that may come instead of a call."""
    field, structure = asked
    if structure.json_object:
        return {"type": "object"}
    if structure.json is None:
        raise invalid(
            f"{field} asks for a form other than JSON, which cannot be combined with tools: "
            "leave one of them out, or set tool_choice to 'none'",
            field,
        )
    assert isinstance(structure.json, str), "it was made text"
    schema = json.loads(structure.json)
    return schema if isinstance(schema, dict) else {}
