"""rwkv prompt, the templates that conversion finds, and text between two others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from click.testing import Result

import rwkv_cli
from rwkv_cli.commands.options import TEMPLATE_NAMES
from rwkv_cli.engine.completion import Completion
from rwkv_cli.engine.stored import StoredTemplate
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
HELLO = '[{"role": "user", "content": "Hello"}]'
G1H_LIKE = (
    "{% for m in messages %}{{ m.role ~ '✿' ~ m.content ~ '✿' }}\n{% endfor %}"
    "{{ rwkv_prompt_template ~ ('<think' if rwkv_generation_prompt == 'open_think' else '') }}"
)


def test_every_template_can_be_named() -> None:
    assert list(TEMPLATES) == TEMPLATE_NAMES


def test_text_ids_and_stop(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    file, tools = tmp_path / "m.json", tmp_path / "t.json"
    file.write_text(HELLO)
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    shown = json.loads(rwkv("prompt", file, "-m", byte_model, "--template", "g1h", "--json").stdout)
    text = "User✿Hello✿\nBot✿<think"
    assert shown == {"text": text, "ids": [0, *text.encode()], "stop": "✿"}
    plain = rwkv("prompt", "-", "-m", byte_model, "--template", "g1h", input=HELLO)
    assert plain.stdout == text + "\n"
    assert f'ids: 0 {" ".join(map(str, text.encode()))}\nstop: "✿"\n' in plain.stderr
    other = ("--style", "assistant", "--think", "off", "--json")
    shown = json.loads(rwkv("prompt", file, "-m", byte_model, "--template", "g1h", *other).stdout)
    assert (shown["text"], shown["stop"]) == ("User: Hello\n\nAssistant: <think></think", "\nUser:")
    shown = json.loads(rwkv("prompt", file, "-m", byte_model, "--template", "g1h", "--tools", tools, "--json").stdout)
    assert shown["text"].startswith("### System\n### `f`\n**Parameters:**")
    assert shown["stop"] == "\n### User"
    shown = json.loads(rwkv("prompt", file, "-m", byte_model, "--template", "raven", "--json").stdout)
    assert shown == {"text": "Bob: Hello\n\nAlice:", "ids": [*b"Bob: Hello\n\nAlice:"], "stop": ["\n\n", "\nBob:"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--style", "bot"), "template plain has no style bot; --template g1h has"),
        (("--think", "on"), "template plain does not reason; --template g1 does"),
        (("--template", "g1h", "--think", "long"), "template g1h has no think mode long"),
        (("--tools", "-no-file"), "-no-file: No such file or directory"),
    ],
)
def test_what_does_not_go_is_said(rwkv: Run, byte_model: Path, options: tuple[str, ...], says: str) -> None:
    result = rwkv("prompt", "-", "-m", byte_model, *options, input=HELLO)
    assert result.exit_code == 1
    assert says in result.stderr.splitlines()[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint."""
    path = tmp_path / "rwkv7-g1d-tune"
    path.mkdir()
    tiny.write_pth(path / "model.pth", tiny.weights("7", vocab=256), "F32")
    return path


def converted(rwkv: Run, source: Path, *options: str) -> Path:
    """Convert a checkpoint. Returns the file."""
    target = source.parent / "out.safetensors"
    result = rwkv("convert", source, target, "--force", *options)
    assert result.exit_code == 0, result.output
    return target


def test_the_template_beside_a_checkpoint_is_taken(rwkv: Run, folder: Path) -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}Q"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    file = converted(rwkv, folder / "model.pth")
    assert json.loads(rwkv("prompt", "-", "-m", file, "--json", input=HELLO).stdout)["ids"] == [0, ord("Q")]
    (folder / "chat_template.jinja").write_text(G1H_LIKE, "utf-8")
    file = converted(rwkv, folder / "model.pth")
    facts = json.loads(rwkv("info", file, "--json").stdout)
    assert (facts["template"], facts["styles"]) == ("own", ["bot", "assistant", "function_calling"])
    assert facts["think"] == ["off", "on"]
    shown = json.loads(rwkv("prompt", "-", "-m", file, "--json", "--style", "assistant", input=HELLO).stdout)
    assert (shown["text"], shown["stop"]) == ("user✿Hello✿\nassistant<think", "✿")
    assert rwkv("chat", "-m", file, "-n", 3, input="Hi\nHo\n").exit_code == 0
    assert (
        json.loads(rwkv("info", converted(rwkv, folder / "model.pth", "--template", "g1"), "--json").stdout)["template"]
        == "g1"
    )


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("chat_template.jinja", b"{% if %}", "chat_template.jinja: the model's own chat template fails"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: is no UTF-8 text"),
        ("chat_template.jinja", b" " * (1 << 21), "chat_template.jinja: is too large for a template"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: is no JSON object"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": [1]}, {"name": "default", "template": "{{ 1 / 0 }}"}]}',
            "tokenizer_config.json: the model's own chat template fails",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_named(rwkv: Run, folder: Path, name: str, text: bytes, says: str) -> None:
    (folder / name).write_bytes(text)
    tiny.refused(rwkv("convert", folder / "model.pth"), says)
    assert rwkv("convert", folder / "model.pth", "--template", "plain").exit_code == 0


def test_a_template_that_fails_in_a_converted_file_is_named_with_it(rwkv: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    model = converted(rwkv, folder / "model.pth")
    data = model.read_bytes()
    model.write_bytes(data.replace(b"m.content", b"m.nothing", 1).replace(b"endfor %}", b"endfor %{", 1))
    tiny.refused(rwkv("chat", "-m", model, "hello"), model, "the model's own chat template fails")


@pytest.mark.parametrize(
    ("name", "template", "unsure"),
    [("rwkv7-g1k-0.1b.pth", "g1h", False), ("rwkv7-g1d-0.1b.pth", "g1", False), ("rwkv7-g3-0.1b.pth", "g1h", True)],
)
def test_the_name_tells_the_template(rwkv: Run, folder: Path, name: str, template: str, unsure: bool) -> None:
    source = (folder / "model.pth").rename(folder / name)
    result = rwkv("convert", source, folder / "out.safetensors")
    said = f"tells no chat template for certain: {template} was taken. Choose another with --template"
    assert (said in result.stderr) == unsure
    assert json.loads(rwkv("info", folder / "out.safetensors", "--json").stdout)["template"] == template


def test_files_converted_before_get_the_template_of_their_source(
    rwkv: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, G1k was taken for G1. What was chosen since is left as it is."""
    source = (folder / "model.pth").rename(folder / "rwkv7-g1k-2.9b-20260930-ctx25600.pth")
    stored = StoredTemplate.of(Checkpoint(converted(rwkv, source, "--template", "g1")))
    assert stored.name == "g1"
    has = Checkpoint.has
    monkeypatch.setattr(Checkpoint, "has", lambda self, key: key != "template_from" and has(self, key))
    assert StoredTemplate.of(Checkpoint(folder / "out.safetensors")).name == "g1h"
    assert rwkv_cli.load(folder / "out.safetensors").template.template("g1").name == "g1"


def test_info_shows_styles(rwkv: Run, folder: Path) -> None:
    table = rwkv("info", converted(rwkv, folder / "model.pth", "--template", "g1h")).stdout
    assert (
        "template         g1h\nstyles           bot, assistant, function_calling\nthink            on, off, fast\n"
        in table
    )


def test_text_between_two_others(rwkv: Run, byte_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Completion, "stream", lambda self, *_: asked.append(self.request) or iter(()))
    result = rwkv("generate", "def f(", "--suffix", "): é", "-m", byte_model, "--stop", "x")
    assert result.exit_code == 0
    assert bytes(asked[0].prompt) == b"\0" + "✿prefix✿✿suffix✿): é✿middle✿def f(".encode()
    assert asked[0].stops == ("x",)
    refused = rwkv("generate", "a", "--suffix", "b", "--load-state", "s", "-m", byte_model)
    assert "--suffix and --load-state exclude each other" in refused.stderr
    refused = rwkv("generate", "--batch", "f", "--suffix", "b", "-m", byte_model)
    assert "'--suffix' does not go with --batch" in refused.stderr
