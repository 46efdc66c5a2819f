"""The chat page: what is in the file, and what a real browser does with it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .live_server import Gate, Live, request

PAGE = Path(__file__).parents[2] / "nanovllm" / "server" / "page.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_one_small_file_that_fetches_nothing_from_elsewhere(live: Live) -> None:
    status, headers, body = request(live.port, "GET", "/")
    assert status == 200
    assert body == PAGE.read_bytes()
    assert len(body) < 225_000
    assert "default-src 'none'" in headers["content-security-policy"]
    text = body.decode()
    assert not re.findall(r'(?:src|href|action)="(?!data:)[^"]', text)
    assert "@import" not in text
    assert "innerHTML" not in text
    assert "eval(" not in text
    assert re.findall(r'fetch\("([^"]+)"', text) == ["v1/chat/completions", "v1/models", "load"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 750})
    context.set_default_timeout(20_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    context.close()
    assert not problems


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def idle(page: Any) -> None:
    page.wait_for_selector("#send:text-is('Send')")


def test_send_stream_edit_regenerate_and_reload(page: Any, live: Live) -> None:
    page.goto(live.url)
    page.wait_for_selector("#model:text-is('tiny')")
    page.click("summary")
    page.fill("#max_tokens", "12")
    page.fill("#temperature", "0")
    ask(page, "hello fox")
    idle(page)
    page.wait_for_selector(".turn.assistant .meta:has-text('12 tokens')")
    assert page.inner_text(".turn.user .body") == "hello fox"
    assert "/ 256" in page.inner_text("#context")
    answer = page.inner_text(".turn.assistant .body")
    page.reload()
    assert page.inner_text(".turn.assistant .body") == answer
    page.hover(".turn.assistant")
    page.click(".turn.assistant button:has-text('Regenerate')")
    idle(page)
    page.wait_for_selector(".turn.assistant .meta:has-text('12 tokens')")
    page.focus("#input")
    page.press("#input", "ArrowUp")
    page.fill(".turn.user textarea", "another fox")
    page.press(".turn.user textarea", "Enter")
    idle(page)
    assert page.inner_text(".turn.user .body") == "another fox"
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.locator("#list .row").count() == 2
    page.wait_for_selector("#p-running:text-is('0')")


def test_stop(page: Any, start: Callable[..., Live], gate: Gate) -> None:
    live = start()
    gate.close_after(20)
    page.goto(live.url)
    ask(page, "hello")
    page.wait_for_selector(".turn.assistant .body p")
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn.assistant .meta:has-text('stopped')")
    live.wait_until(lambda: live.service.client.num_sequences == 0)
    gate.open()
    live.wait_until_idle()
    assert request(live.port, "GET", "/load")[2]["generation_tokens"] < 50


def test_errors_are_shown(page: Any, live: Live) -> None:
    page.goto(live.url)
    ask(page, "word " * 500)
    page.wait_for_selector(".error:has-text('maximum context length is 256 tokens')")
    idle(page)


def test_keys_are_asked_for(page: Any, start: Callable[..., Live]) -> None:
    live = start({"api_keys": ("right",)})
    page.goto(live.url)
    for key, shown in (("wrong", "The API key is wrong."), ("right", "tiny")):
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector(f"#model:text-is('{shown}')")
    ask(page, "hi")
    idle(page)
    assert page.locator(".error").count() == 0


def test_markdown_is_drawn_and_nothing_runs(page: Any, live: Live) -> None:
    page.goto(live.url)
    text = (
        "# Title\n\n<img src=x onerror=window.hit=1> **bold** `code` [a](javascript:hit()) "
        "[b](https://example.org/)\n\n- one\n- two\n\n```python\nfor x in y:  # c\n  'str'\n```\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n<script>window.hit=1</script>"
    )
    page.evaluate("text => document.getElementById('log').replaceChildren(markdown(text))", text)
    assert page.evaluate("window.hit") is None
    log = page.locator("#log")
    counts = {"img": 0, "script": 0, "h2": 1, "strong": 1, "li": 2, "td": 2, "a": 1}
    for selector, count in (counts | {"pre .k": 2, "pre .s": 1, "pre .c": 1}).items():
        assert log.locator(selector).count() == count, selector
    assert "<script>" in log.inner_text()


def test_a_phone_has_everything(browser: Any, live: Live) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640})
    page = context.new_page()
    page.goto(live.url)
    assert not page.is_visible("#new")
    page.click("#menu")
    page.wait_for_selector("#new", state="visible")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    context.close()


def test_the_page_looks_as_the_system_does_until_somebody_chooses(page: Any, live: Live) -> None:
    page.goto(live.url)
    for scheme in ("dark", "light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_selector(f"html[data-theme={scheme}]")
    page.reload()
    page.wait_for_selector("html[data-theme=dark]")
    page.click("#theme")
    page.wait_for_selector("html[data-theme=light]")
    page.reload()
    page.wait_for_selector("html[data-theme=light]")
