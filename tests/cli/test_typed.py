"""All that the pages tell to type, typed in a fresh folder beside what a clone has: commands, and README's Python."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
MESSAGES = '[{"role": "user", "content": "Hello"}]'
TOOLS = '[{"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": {}}}]'

SKIPPED = {
    "git clone": "needs a download",
    "pip install": "needs a download",
    "-m venv": "is what the tests run in",
    "-m build": "needs a download",
    "make ": "takes minutes; only the target is looked up",
    "python benchmarks/": "takes minutes; only the script and its options are looked up",
    "python tools/": "takes minutes; only the script and its options are looked up",
    "--device cuda": "needs a GPU",
    "rwkv pull": "needs a download",
    "rwkv chat --last": "needs an earlier chat at a terminal",
}
"""Parts of lines that are not typed, and why."""
if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("llguidance") is None:
    SKIPPED["rwkv serve"] = SKIPPED["curl"] = "needs starlette and llguidance, which are an extra"
if shutil.which("curl") is None:
    SKIPPED["curl"] = "needs curl"
if importlib.util.find_spec("matplotlib") is None:
    SKIPPED["--plot"] = "needs matplotlib, which is an extra"

BEFORE = {
    "rwkv sessions show diary": "echo Hello | rwkv chat --session diary -n 5",
}
"""Beginnings of lines that need an earlier chat, and that chat."""


def code(page: str) -> Iterator[list[str]]:
    """Yield commands: the lines of each fenced block, and the code of the text between that is more than a name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for part in re.split(r"^(```.*?^```\n)", text, flags=re.DOTALL | re.MULTILINE):
        language, _, block = part.partition("\n")
        if language == "```sh":
            yield [line.split(" #")[0].rstrip() for line in block.splitlines()[:-1]]
        elif language == "```console":
            yield [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
        elif language == "```":  # the help of a command: examples are indented, and may have a remark behind
            yield [re.split(r"\s{2,}", line)[1] for line in block.splitlines() if re.match("  (rwkv|cat|echo) ", line)]
        elif not language.startswith("```"):
            found = [" ".join(line.split()) for line in re.findall(r"`([^`]+)`", part)]
            yield [line for line in found if line.count(" ") > 1 or not line.startswith("rwkv")]


def is_typed(line: str) -> bool:
    """True if the line is a command with words of its own, not one with a NAME… for what a reader would write."""
    named = re.search(r"(?<!\S)(?!RWKV)[A-Z]+(?![\w-])|…", unquoted(line))
    return (
        bool(re.match(r"(rwkv|cat|echo|export|curl) ", line))
        and not named
        and not any(part in line for part in SKIPPED)
    )


def unquoted(line: str) -> str:
    """Leave out what is quoted, which may be anything."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def scripts() -> dict[str, list[str]]:
    """The lines to type one after the other: README's, those of another page's block, one example of a help."""
    found = {"README.md": [line for block in code("README.md") for line in block if is_typed(line)]}
    for page in PAGES[1:]:
        for block in code(page):
            lines = [line for line in block if is_typed(line)]
            for each in [[line] for line in lines] if page == "docs/cli.md" else [lines] if lines else []:
                found[f"{page}: {each[0]}"] = each
    return found


SCRIPTS = scripts()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the storyteller converted: to int8, to float, and by the name of a model with another template."""
    folder = tmp_path_factory.mktemp("typed")
    for name in ("storyteller", "rwkv7-g1k-2.9b"):
        for ending in ("pth", "tokenizer.json"):
            (folder / f"{name}.{ending}").symlink_to(ROOT / "rwkv_cli" / f"storyteller.{ending}")
    convert = [sys.executable, "-P", "-m", "rwkv_cli", "convert"]
    for line in (
        ["storyteller.pth", "storyteller.int8.safetensors"],
        ["storyteller.pth", "storyteller.float.safetensors", "--quant", "none"],
        ["rwkv7-g1k-2.9b.pth", "rwkv7-g1k-2.9b.int8.safetensors"],
    ):
        subprocess.run([*convert, *line], cwd=folder, check=True, capture_output=True)
    heads = np.zeros((4, 64, 64), np.float32)
    tiny.write_pth(folder / "tuned.pth", {f"blocks.{layer}.att.time_state": heads for layer in range(6)})
    return folder


@pytest.fixture
def shell(models: Path, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A function that types a line. The files that it names are there, as stand-ins if need be."""
    for name in ("docs", "rwkv_cli"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, command in (("rwkv", "-m rwkv_cli "), ("python", "")):
        (bin_ / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -P {command}"$@"\n')
        (bin_ / name).chmod(0o755)
    home = {f"XDG_{name}_HOME": str(tmp_path / name) for name in ("DATA", "STATE")}
    env = {**os.environ, **home, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    env["RWKV_MODELS"] = str(tmp_path / "models")
    env.pop("RWKV_MODEL", None)
    servers: list[subprocess.Popen[str]] = []
    port = ""

    def serve(line: str) -> None:
        """Begin to serve at a port that is free."""
        nonlocal port
        line = f"exec {line.partition(' --port')[0]} --port 0"
        servers.append(
            subprocess.Popen(["/bin/sh", "-c", line], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        )
        said = next((line for line in servers[-1].stderr or () if line.startswith("Serving ")), "")
        port = said.partition("/v1")[0].rpartition(":")[2]
        assert port, line

    def run(line: str) -> None:
        if line.startswith("export "):
            env.update([line.removeprefix("export ").split("=")])
            return
        for beginning, chat in BEFORE.items():
            if line.startswith(beginning):
                run(chat)
        for word in re.split(r"[\s=]+", line):
            if not (line.startswith("rwkv convert") and word.endswith(".safetensors")):
                stand_in(models, tmp_path / word)
        if line.startswith("rwkv serve"):
            serve(line)
            return
        if line.startswith("curl"):
            line = line.replace(":8000", f":{port}").replace("curl", "curl --fail --max-time 60", 1)
        done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"

    yield run
    for server in servers:
        server.terminate()
        server.communicate()
        assert server.returncode == 0


def stand_in(models: Path, path: Path) -> None:
    """Make the file that a page takes for granted, if the path has such a name and is not there."""
    texts = {
        "letter.txt": "Dear friend, I have a dog.",
        "wiki.test.raw": "A dog is an animal. " * 9,
        "lambada_test.jsonl": '{"text": "A dog is an animal"}\n',
        "prompts.jsonl": '{"prompt": "Once"}\n',
        "messages.json": MESSAGES,
        "tools.json": TOOLS,
    }
    if path.exists():
        return
    if path.name in texts:
        path.write_text(texts[path.name])
    elif path.name in ("tuned.pth", "rwkv7-g1k-2.9b.int8.safetensors"):
        path.symlink_to(models / path.name)
    elif path.suffix == ".safetensors":
        path.symlink_to(models / f"storyteller.{'float' if 'float.' in path.name else 'int8'}.safetensors")
    elif re.fullmatch(r"RWKV\S*\.pth", path.name):
        path.symlink_to(models / "storyteller.pth")
        path.with_suffix(".tokenizer.json").symlink_to(models / "storyteller.tokenizer.json")
    elif path.name == "rwkv-0.pth":  # an adapter: the tuned state that RWKV-PEFT saves under such a name
        path.symlink_to(models / "tuned.pth")
    elif path.name == "rwkv-4-pile-169m":
        path.mkdir()
        tiny.write_pth(path / "pytorch_model.bin", tiny.weights("4", vocab=1920))
    elif path.name == "20B_tokenizer.json":
        path.symlink_to(models / "storyteller.tokenizer.json")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_can_be_typed(name: str, shell: Callable[[str], None]) -> None:
    for line in SCRIPTS[name]:
        shell(line)


def test_the_pages_have_commands() -> None:
    """Nothing is lost on the way from a page to its script."""
    assert len(SCRIPTS["README.md"]) > 12
    assert "docs/cuda.md: rwkv info --devices" in SCRIPTS
    assert sum(len(lines) for lines in SCRIPTS.values()) > 35


def test_the_python_of_the_readme_can_be_typed(shell: Callable[[str], None], models: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 1
    (tmp_path / "storyteller.int8.safetensors").symlink_to(models / "storyteller.int8.safetensors")
    shell(f"python -c {shlex.quote(''.join(blocks))}")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_typed_is_there(page: str) -> None:
    """Every command, script and target that a page names exists, with its options, whether it can be typed or not."""
    cli, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/cli.md", "Makefile"))
    for line in (line for block in code(page) for line in block):
        if found := re.match(r"rwkv ([a-z]+(?: (?:list|show|rm|path)\b)?)(.*)", line):
            known = re.search(rf"^## rwkv {found[1]}\n(.*?)(\n## |\Z)", cli, re.DOTALL | re.MULTILINE)
        elif found := re.match(r"python ((?:benchmarks|tools)/\S+\.py)(.*)", line):
            assert (ROOT / found[1]).exists(), line
            known = re.search(r"(.*)", (ROOT / found[1]).read_text(encoding="utf-8"), re.DOTALL)
        elif found := re.match(r"(?:\S+=\S+ )?make ([a-z]+)()", line):
            known = re.search(rf"^({found[1]}):", makefile, re.MULTILINE)
        else:
            continue
        assert known, line
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", unquoted(found[2]).split("|")[0]):
            assert re.search(rf"(?<![\w-]){option}\b", known[1]), f"{line}: {option}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "benchmarks|tools|tests|docs|models|kernels|quant|rwkv_cli"
    for name in re.findall(rf"`[^`\n]*?\b((?:{folders})/[\w/.*-]*\w)", text):
        assert re.search(r"N[A-Z]*[./]", name) or list(ROOT.glob(name)), f"{page}: {name}"
