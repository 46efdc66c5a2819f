"""The pages in docs/clients: each block of code runs against a live server and prints what it says.

A block of Python, JavaScript or shell is followed by a block of text, its output. Clients that are
not installed are skipped with a reason (`make test` installs them).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from nanovllm.model_files import ASSETS

from .live_server import Live

PAGES = Path(__file__).parents[2] / "docs" / "clients"
NODE = Path(__file__).with_name("node_clients")
ADDRESS = "http://127.0.0.1:8000"
RUNNABLE = ("python", "js", "sh")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: str
    number: int
    language: str
    code: str
    output: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def snippets() -> list[Snippet]:
    found = []
    for path in sorted(PAGES.glob("*.md")):
        blocks = _BLOCK.findall(path.read_text(encoding="utf-8"))
        for number, (language, code) in enumerate(blocks):
            if language in RUNNABLE:
                kind, output = blocks[number + 1]
                assert kind == "text", f"{path.name}: block {number} has no output below it"
                found.append(Snippet(path.stem, number, language, code, output))
    return found


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    if not (ASSETS / "demo" / "model.safetensors").exists():
        pytest.skip("the embedded model is not there")
    server = Live("demo", {"served_model_names": ("demo",)}, max_model_len=1024)
    yield server
    server.close()


def command(snippet: Snippet, code: str) -> tuple[list[str], Path]:
    """What runs the code, and where."""
    if snippet.language == "sh":
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        return ["sh", "-c", code], PAGES
    if snippet.language == "js":
        node = shutil.which("node")
        if node is None or not (NODE / "node_modules").is_dir():
            pytest.skip("the Node clients are not there: `make test` installs them where is npm")
        return [node, "--input-type=module", "-e", code], NODE
    if "import openai" in code or "from openai" in code:
        return [sys.executable, "-c", code], PAGES
    python = Path(sys.prefix) / "clients" / "bin" / "python"
    if not python.exists():
        pytest.skip("LangChain and LiteLLM are not there: `make test` installs them")
    return [str(python), "-c", code], PAGES


@pytest.mark.parametrize("snippet", snippets(), ids=str)
def test_it_prints_what_the_page_says(
    snippet: Snippet, demo: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ADDRESS in snippet.code
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet first
    arguments, directory = command(snippet, snippet.code.replace(ADDRESS, demo.url))
    done = subprocess.run(arguments, cwd=directory, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == snippet.output.strip(), done.stderr


def test_pages_and_their_list_agree() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (PAGES / "README.md").read_text("utf-8")))
    assert listed == {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    tested = {snippet.page for snippet in snippets()}
    clients = {"openai-python", "openai-node", "langchain", "litellm", "vercel-ai-sdk", "curl"}
    assert tested == clients


def test_configuration_on_the_pages_is_yaml() -> None:
    for path in PAGES.glob("*.md"):
        for language, text in _BLOCK.findall(path.read_text(encoding="utf-8")):
            if language == "yaml":
                assert yaml.safe_load(text), path.name
