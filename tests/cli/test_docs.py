"""Documents that say what the program says."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import make_docs  # noqa: E402

from rwkv_cli.main import COMMANDS  # noqa: E402
from rwkv_cli.models.registry import MODULES  # noqa: E402
from rwkv_cli.quant.header import FORMAT_VERSION  # noqa: E402


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_commands_page_is_the_help() -> None:
    assert read("docs/cli.md") == make_docs.page(), "run `make docs`"


def test_the_readme_shows_every_command_and_version() -> None:
    text = read("README.md")
    for name in COMMANDS:
        assert f"rwkv {name}" in text
    for version in MODULES:
        assert re.search(rf"\b{re.escape(version)}\b", text)


def test_the_readme_shows_texts_that_the_storyteller_writes(rwkv: Callable[..., Any]) -> None:
    shown = re.search(r'^\$ rwkv (generate "Once.*)\n.*storyteller\.\n((?:.*\n)+?)\$ ', read("README.md"), re.M)
    assert shown
    assert rwkv(*shlex.split(shown[1])).stdout == shown[2].removesuffix("\n")
    shown = re.search(r'"The cat" \| .* (--max-tokens .*)\n\{.*"text": (".*?"),', read("README.md"))
    assert shown
    result = rwkv("generate", "The cat", *shlex.split(shown[1]))
    assert json.loads(result.stdout)["text"] == json.loads(shown[2])


def test_the_format_page_is_of_this_version() -> None:
    assert f"Version {FORMAT_VERSION}" in read("docs/format.md")


def test_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
