"""Chat templates render as transformers renders them, and refuse in our words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import SPECIAL_TOKENS, byte_level_tokenizer
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from nanovllm.errors import InvalidRequestError, ModelLoadError
from nanovllm.text.chat import ChatTemplate
from nanovllm.text.tokenizer import LONG_TEXT, Tokenizer

CHATML = """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
    {{- message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""
TOOLS = """
{%- if tools %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function %}
            {{- '<call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments | tojson(indent=2) }}{{- '}</call>' }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {{- "<result>" ~ message.content ~ "</result>" }}
        {%- if loop.last %}{%- break %}{%- endif %}
    {%- else %}
        {{- "[" ~ message.role ~ "] " ~ message.content }}
    {%- endif %}
    {{- "\\n" }}
{%- endfor %}
"""
GENERATION = """{% for message in messages %}
  {% if message['role'] == 'assistant' %}
  A: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

  {% else %}
  U: {{ message['content'] }}
  {% endif %}
{% endfor %}{% if add_generation_prompt %}A: {% endif %}"""
STRICT = """{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- endfor %}"""
SET = """{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" and not message.content.startswith('<') %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{{- ns.last }}|{{ messages[-1].content.split('o')[-1] }}|
{{- messages | map(attribute='role') | list }}
{{- {"key": "<é>"} | tojson }}"""
TEMPLATES = {
    "chatml": CHATML,
    "dated": DATED,
    "tools": TOOLS,
    "generation": GENERATION,
    "strict": STRICT,
    "set": SET,
}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello"}],
    "several": [
        {"role": "user", "content": '  你好，<b>世界</b> & "friends"  '},
        {"role": "assistant", "content": "Ça va?\n\n"},
        {"role": "user", "content": "👋🏽 {{ messages }} {% raw %}"},
    ],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "get", "arguments": {"city": "Zürich"}}}
            ],
        },
        {"role": "tool", "content": '{"t": 21}'},
    ],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": 'The weather of <a city> & its "surroundings"',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer(300).save(str(path / "tokenizer.json"))
    write_config(path)
    return path


def write_config(path: Path, **fields: Any) -> None:
    special = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[3]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | special | fields
    (path / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def render_theirs(
    theirs: Any, messages: Any, source: str, options: dict[str, Any]
) -> str | Exception:
    try:
        text: str = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )
    except Exception as error:  # a template may raise anything
        return error
    return text


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_as_transformers(
    name: str, talk: str, prompted: bool, directory: Path, theirs: Any
) -> None:
    messages, source = TALKS[talk], TEMPLATES[name]
    ours = ChatTemplate(source, Tokenizer.from_directory(directory).special_tokens())
    for tools in (None, [TOOL]):
        for extra in ({}, {"enable_thinking": False}, {"date_string": "1 Jan"}):
            options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompted, **extra}
            expected = render_theirs(theirs, messages, source, options)
            if isinstance(expected, str):
                assert ours.render(messages, **options) == expected
            else:
                with pytest.raises(InvalidRequestError, match=re.escape(str(expected))):
                    ours.render(messages, **options)


WRONG_MESSAGES: list[tuple[Any, str]] = [
    ("text", "message 1 must be a mapping with a role: 'text'"),
    ({"content": "x"}, "message 1 must have a role"),
    ({"role": 3, "content": "x"}, "message 1 must have a role"),
    ({"role": "", "content": "x"}, "message 1 must have a role"),
    ({"role": "user"}, r"message 1 \(role 'user'\) has neither content nor tool_calls"),
    ({"role": "tool", "content": None}, r"message 1 \(role 'tool'\) has neither"),
    ({"role": "assistant", "tool_calls": []}, r"message 1 \(role 'assistant'\) has neither"),
    ({"role": "user", "content": 5}, r"\(role 'user'\): content must be a string.*got 5"),
    ({"role": "user", "content": b"x"}, "content must be a string or a list of parts"),
    ({"role": "user", "content": ["x"]}, r"message 1: content\[0\] must be a mapping.*got 'x'"),
    ({"role": "user", "content": [{"type": "text"}]}, r"message 1: content\[0\] has no text"),
    (
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]},
        r"message 1: content\[1\] is of type 'image_url': this model reads text only",
    ),
]


def test_parts_are_joined() -> None:
    template = ChatTemplate(CHATML, {})
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    conversation = [{"role": "user", "content": tuple(parts)}]
    assert template.render(conversation) == template.render(
        [{"role": "user", "content": "one\ntwo"}]
    )
    assert conversation == [{"role": "user", "content": tuple(parts)}]


def test_refusals() -> None:
    strict = ChatTemplate(STRICT, {})
    user = {"role": "user", "content": "x"}
    with pytest.raises(InvalidRequestError, match="Roles must alternate"):
        strict.render([user, user])
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate(None, {}).render([user])
    with pytest.raises(InvalidRequestError, match="at least one message"):
        strict.render([])
    with pytest.raises(InvalidRequestError, match=r"must be a list of .* got 'hello'"):
        strict.render("hello")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"list of .*as \[\{.*\], got \{'role'"):
        strict.render(user)  # type: ignore[arg-type]
    for bad, message in WRONG_MESSAGES:
        with pytest.raises(InvalidRequestError, match=message):
            strict.render([user, bad])
    with pytest.raises(InvalidRequestError, match="refused"):
        ChatTemplate("{% for %}", {}).render([user])


def test_a_call_of_tools_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    source = "{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}"
    assert ChatTemplate(source, {}).render([call]) == "f"
    del call["content"]
    assert ChatTemplate(source, {}).render([call]) == "f"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}{{ messages | length }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_templates_are_in_a_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refused"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_where_templates_are_found(directory: Path) -> None:
    def found() -> str | None:
        tokenizer = Tokenizer.from_directory(directory)
        return ChatTemplate.from_directory(directory, tokenizer).source

    assert found() is None
    write_config(directory, chat_template="config")
    assert found() == "config"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    write_config(directory, chat_template=named)
    assert found() == "named"
    (directory / "chat_template.json").write_text('{"chat_template": "json"}')
    assert found() == "json"
    (directory / "chat_template.jinja").write_text("jinja")
    assert found() == "jinja"
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object"):
        found()


def test_special_tokens_in_both_spellings(directory: Path) -> None:
    write_config(directory, eos_token={"content": "<|end|>", "special": True}, pad_token=None)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_tokens() == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert (tokenizer.token_id("<|end|>"), tokenizer.token_id("nothing")) == (3, None)
    assert tokenizer.token_text(3) == "<|end|>"
    assert tokenizer.decode([3]) == ""
    assert len(tokenizer) == 300


def test_long_texts_are_encoded_alike(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    text = "The 龘 fox " * 600
    assert tokenizer.encode(text) == tokenizer._fast.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_when_asked_for_at_any_length(directory: Path) -> None:
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing("<|end|> $0", None, [("<|end|>", 3)])
    tokenizer = Tokenizer(fast, {})
    for text in ("short", "long " * LONG_TEXT):
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert 3 not in plain
        assert tokenizer.encode(text) == [3, *plain]


def test_prompts_are_never_cut_or_padded(directory: Path) -> None:
    """Some tokenizer.json files still hold what their training used."""
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    expected = fast.encode("a text of several words").ids
    fast.enable_truncation(2)
    fast.enable_padding(length=50)
    cutting = FastTokenizer.from_str(fast.to_str())
    assert len(cutting.encode("a text of several words").ids) == 50
    assert Tokenizer(cutting, {}).encode("a text of several words") == expected
