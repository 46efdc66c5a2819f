"""Answers one prompt: the text streams to stdout, everything else goes to stderr.

The prompt is the argument, or what is piped in, or else a question that the model inside the
package can answer.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from dataclasses import asdict
from typing import Any

from nanovllm import InvalidRequestError, RequestOutput, SamplingParams, StepError
from nanovllm.cli.flags import Parser, add_engine_flags, add_sampling_flags, refuse
from nanovllm.cli.session import Session, answer, open_session, speed
from nanovllm.cli.terminal import BOLD, say, write_answer
from nanovllm.trace.startup import line_of

DEFAULT_QUESTION = "What is a KV cache?"
INTERRUPT_STATUS = 130


def add_arguments(parser: Parser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help='the prompt; "-" reads stdin')
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="send the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when the answer is complete"
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    parser.add_argument(
        "--verbose", action="store_true", help="also say where the time of the start went"
    )
    add_sampling_flags(parser)
    add_engine_flags(parser)


def run(options: argparse.Namespace) -> int:
    if options.raw and options.system is not None:
        refuse("generate", "--raw sends the prompt alone: give --system or --raw, not both")
    if options.quiet and options.verbose:
        refuse("generate", "--quiet says nothing and --verbose more: give one of them")
    prompt, is_default = _prompt(options.prompt)
    session = open_session(options)
    params = SamplingParams.from_kwargs(**session.sampling)
    tokens = prompt if options.raw else _chat_prompt(session, prompt, options.system)
    if is_default and not options.quiet:
        say(f"> {prompt}", BOLD)
    streams = not options.json and params.n == 1
    output, interrupted = answer(session.llm, tokens, params, write_answer if streams else _ignore)
    if options.json:
        print(json.dumps(_as_json(session.name, prompt, output), ensure_ascii=False, indent=2))
    elif streams:
        print(flush=True)
    else:
        print("\n\n".join(completion.text for completion in output.outputs), flush=True)
    if not options.quiet:
        say(f"[{speed(output)}{_why_ended(output)}]")
    if options.verbose and output.metrics is not None:
        say(line_of(session.llm.info.startup, output.metrics.time_to_first_token))
    session.llm.close()
    if output.finish_reason == "error":
        raise StepError(f"the answer is not complete: {output.outputs[0].error}")
    return INTERRUPT_STATUS if interrupted else 0


def _prompt(argument: str | None) -> tuple[str, bool]:
    """(prompt, whether it is the default question)"""
    if argument == "-":
        argument = sys.stdin.read().rstrip("\n") if sys.stdin is not None else ""
        if not argument:
            refuse("generate", '"-" reads the prompt from stdin, and stdin is empty')
    elif argument is None and _is_piped():
        argument = sys.stdin.read().rstrip("\n") or None
    if argument is None:
        return DEFAULT_QUESTION, True
    return argument, False


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file: neither a terminal nor /dev/null nor closed."""
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


def _chat_prompt(session: Session, prompt: str, system: str | None) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return session.llm.render_chat(messages)
    except InvalidRequestError as error:
        if "chat template" not in str(error):  # a text that is none is none without it either
            raise
        raise InvalidRequestError(f"{error} (--raw sends the prompt as it is)") from None


def _ignore(text: str) -> None:
    pass


def _why_ended(output: RequestOutput) -> str:
    """A word where the answer did not end by itself."""
    return "" if output.finish_reason == "stop" else f" · ended by {output.finish_reason}"


def _as_json(model: str, prompt: str, output: RequestOutput) -> dict[str, Any]:
    completions = [
        {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "logprobs": _logprobs(completion.logprobs),
        }
        for completion in output.outputs
    ]
    return {
        "model": model,
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "completions": completions,
        "metrics": asdict(output.metrics) if output.metrics else None,
    }


def _logprobs(positions: Any) -> Any:
    if positions is None:
        return None
    return [{str(i): asdict(entry) for i, entry in found.items()} for found in positions]
