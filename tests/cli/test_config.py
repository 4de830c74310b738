"""config.toml: defaults for options, presets for models, and `rwkv config`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result

from rwkv_cli.quant import Checkpoint

Run = Callable[..., Result]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A function that writes the user's config.toml, beside an empty models folder and no sessions."""
    monkeypatch.delenv("RWKV_CONFIG")
    for name in ("CONFIG", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    monkeypatch.setenv("RWKV_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    path = tmp_path / "CONFIG" / "rwkv" / "config.toml"
    path.parent.mkdir(parents=True)

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


def in_force(rwkv: Run, *args: object) -> dict[str, Any]:
    """What `rwkv config` says of a command line."""
    result = rwkv("config", "--json", *args)
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_every_value_says_where_it_comes_from(rwkv: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write('threads = 1\ndevice = "auto"\ntop_p = 0.5\n[chat]\ndevice = "cpu"\nsystem = "Be brief."\n')
    monkeypatch.setenv("RWKV_MODEL", "storyteller")
    chat = in_force(rwkv, "chat", "--system", "Be long.", "A question")
    assert chat["threads"] == {"value": 1, "from": "file", "by": "threads"}
    assert chat["device"] == {"value": "cpu", "from": "file", "by": "chat.device"}
    assert chat["top-p"] == {"value": 0.5, "from": "file", "by": "top_p"}
    assert chat["system"] == {"value": "Be long.", "from": "command line", "by": None}
    assert chat["model"] == {"value": "storyteller", "from": "environment", "by": "$RWKV_MODEL"}
    assert chat["seed"] == {"value": None, "from": "default", "by": None}
    assert in_force(rwkv, "chat", "-m", "a")["model"] == {"value": "a", "from": "command line", "by": None}
    assert in_force(rwkv, "generate")["device"] == {"value": "auto", "from": "file", "by": "device"}
    line = next(line for line in rwkv("config", "chat").stdout.splitlines() if line.startswith("device"))
    assert line.split() == ["device", "cpu", "file", "(chat.device)"]


def test_without_a_command_it_shows_the_file(rwkv: Run, write: Write, tmp_path: Path) -> None:
    assert "There is no" in rwkv("config").stderr
    path = write('model = "storyteller"\n[generate]\nstop = ["a", "b"]\n[presets."x.y"]\nseed = 1\n')
    facts = in_force(rwkv)
    assert facts["config file"] == {"value": str(path), "from": "default", "by": None}
    assert facts["models folder"] == {"value": str(tmp_path / "models"), "from": "environment", "by": "$RWKV_MODELS"}
    assert facts["model"]["value"] == "storyteller"
    assert facts["generate.stop"]["value"] == ["a", "b"]
    assert facts["presets.x.y.seed"]["value"] == 1
    assert rwkv("config").stderr == ""


def test_a_group_and_its_commands_have_tables(rwkv: Run, write: Write) -> None:
    write("[sessions.list]\njson = true\n[models]\njson = true\n")
    assert in_force(rwkv, "sessions", "list")["json"] == {"value": True, "from": "file", "by": "sessions.list.json"}
    assert in_force(rwkv, "models")["json"]["by"] == "models.json"


def test_presets_follow_the_model(rwkv: Run, write: Write, tmp_path: Path) -> None:
    """All presets hold whose name the model's begins with, the longest first. A command line goes before them."""
    for name in ("seven-a.int8", "seven-b.int8"):
        (tmp_path / "models" / f"{name}.safetensors").touch()
    write(
        "temperature = 0.1\n[chat]\ntop-p = 0.1\n"
        '[presets.seven]\ntemperature = 0.2\ntop-p = 0.2\nsystem = "seven"\n'
        '[presets."Seven-A"]\ntop-p = 0.3\ntemplate = "world"\n'
    )
    a, b, other = (in_force(rwkv, "chat", "-m", name) for name in ("seven-a", "seven-b", "storyteller"))
    keys = ("temperature", "top-p", "system", "template")
    assert [a[key]["value"] for key in keys] == [0.2, 0.3, "seven", "world"]
    assert [b[key]["value"] for key in keys] == [0.2, 0.2, "seven", None]
    assert [other[key]["value"] for key in keys] == [0.1, 0.1, None, None]
    assert a["template"]["by"] == "presets.Seven-A.template"
    assert in_force(rwkv, "chat", "--temperature", 1, "-m", "seven-a")["temperature"]["value"] == 1
    assert in_force(rwkv, "chat", "-m", tmp_path / "seven-c.safetensors")["top-p"]["value"] == 0.2
    write('model = "seven-a"\n[presets."seven-a.int8"]\nsystem = "A"\n[presets.storyteller]\nsystem = "S"\n')
    assert in_force(rwkv, "chat")["system"]["value"] == "A"
    assert in_force(rwkv, "chat", "-m", "storyteller")["system"]["value"] == "S"


def test_defaults_reach_the_commands(rwkv: Run, write: Write, byte_model: Path, tmp_path: Path) -> None:
    plain = rwkv("generate", "a", "-m", byte_model, "-n", 5, "--seed", 1, "--temperature", 0.5).stdout
    (tmp_path / "models" / "tiny.int8.safetensors").symlink_to(byte_model)
    write('model = "tiny"\nseed = 1\n[generate]\nmax-tokens = 5\n[presets.tiny]\ntemperature = 0.5\n')
    assert rwkv("generate", "a").stdout == plain
    write('model = "tiny"\n')
    assert rwkv("info").stdout == rwkv("info", "tiny").stdout
    assert "cpu" in rwkv("info", "--devices").stdout


def test_a_checkpoint_is_converted_as_convert_does_by_default(rwkv: Run, write: Write, tmp_path: Path) -> None:
    source = tiny.write_pth(tmp_path / "new.pth", tiny.weights("7", layers=1, vocab=256))
    for text in ('quant = "none"\n', '[convert]\nquant = "none"\n'):
        write(text)
        assert rwkv("generate", "a", "-n", 1, "-m", source).exit_code == 0
    (model,) = (tmp_path / "models").glob("*.safetensors")
    assert Checkpoint(model).metadata("quantization", str) == "none"


def test_a_session_keeps_its_own_settings(rwkv: Run, write: Write, byte_model: Path) -> None:
    """Defaults of the file are for new chats. What a command line says changes one that goes on."""
    write("temperature = 0.5\nmax-tokens = 3\n")
    assert rwkv("chat", "-m", byte_model, "--session", "diary", "Hello").exit_code == 0
    write('model = "storyteller"\ntemperature = 0.7\ntop-p = 0.1\nseed = 3\ntemplate = "world"\nsystem = "x"\n')
    assert rwkv("chat", "--session", "diary", "--top-p", 0.2, "again").exit_code == 0
    kept = json.loads(rwkv("sessions", "show", "diary", "--json").stdout)
    assert (kept["sampling"]["temperature"], kept["sampling"]["top_p"]) == (0.5, 0.2)
    assert (kept["max_tokens"], kept["system"]) == (3, "")
    assert kept["seed"] != 3


def test_defaults_that_do_not_go_with_a_batch_are_left_out(rwkv: Run, write: Write, byte_model: Path) -> None:
    write('[generate]\njson = true\nsuffix = "b"\nbatch-size = 2\n')
    result = rwkv("generate", "--batch", "-", "-n", 2, "-m", byte_model, input='{"prompt": "a"}\n')
    assert result.exit_code == 0, result.output
    assert rwkv("generate", "a", "-n", 1, "-m", byte_model, "--suffix", "").exit_code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a =", "is no TOML: Invalid value"),
        ("a = 1\na = 2", "is no TOML: Cannot overwrite a value"),
        ("a = " + "[" * 5000, "is no TOML: .*"),
        ("thread = 1", "thread: is no option here; did you mean threads?"),
        ("[foo]\na = 1", "foo: is no command"),
        ("[generat]\nseed = 1", "generat: is no command; did you mean generate?"),
        ("chat = 1", "chat: is no option here"),
        ("threads = 'a'", "threads: has to be a whole number"),
        ("threads = 1.5", "threads: has to be a whole number"),
        ("threads = true", "threads: has to be a whole number"),
        ("threads = 0", "threads: 0 is not in the range x>=1"),
        ("temperature = '1'", "temperature: has to be a number"),
        ("temperature = nan", "temperature: nan is not a finite number"),
        ("device = 1", 'device: has to be text in quotes: "…"'),
        ("device = 'tpu'", "device: 'tpu' is not one of"),
        ("model = ['a']", "model: has to be text in quotes"),
        ("model = 'a\\u0000'".replace("'", '"'), "model: holds a NUL character"),
        ("model = 'gone'", r"gone: No such file .*; model in .*config\.toml names it"),
        ("[generate]\nescape = 1", "generate.escape: has to be true or false"),
        ("[generate]\nstop = [1]", "generate.stop: has to be text in quotes"),
        ("presets = 1", "presets: holds tables only"),
        ("[presets]\na = 1", "presets: holds tables only"),
        ("[presets.a-0.1b]\nseed = 1", "presets.a-0.1b: is a table; a name with a dot stands in quotes"),
        ("[presets.a]\nsed = 1", "presets.a.sed: is no option here; did you mean seed?"),
        ("[presets.story]\nseed = 'x'", "presets.story.seed: has to be a whole number"),
        ("[presets.story]\ntop-p = 2", "presets.story.top-p: 2.0 is not in the range"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_the_file_and_the_key(rwkv: Run, write: Write, text: str, says: str) -> None:
    path = write(text)
    result = rwkv("generate", "a", "-n", 1)
    tiny.refused(result, *([] if says.startswith("gone") else [re.escape(f"{path}: ")]), says.replace("?", "[?]"))


def test_config_checks_the_tables_of_all_commands(rwkv: Run, write: Write) -> None:
    """A command reads its own table only, so that the others need not be loaded."""
    for text, says in (
        ("[chat]\nthin = 'on'", "chat.thin: is no option here; did you mean think[?]"),
        ("[sessions.lst]\njson = true", "sessions.lst: is no option here"),
        ("[ppl]\nstart-token = 'x'", "ppl.start-token: 'x' is neither a token id nor none"),
        ("[presets.other]\ntop-p = 2", "presets.other.top-p: 2.0 is not in the range"),
        ("[convert]\nquant = 'int9'", "convert.quant: 'int9' is not one of"),
    ):
        write(text)
        assert rwkv("info").exit_code == 0
        tiny.refused(rwkv("config"), says)


def test_a_file_is_elsewhere_or_unreadable(rwkv: Run, write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    write("threads = 1\n")
    (tmp_path / "mine.toml").write_text("threads = 2\n")
    monkeypatch.setenv("RWKV_CONFIG", str(tmp_path / "mine.toml"))
    assert in_force(rwkv, "generate")["threads"]["value"] == 2
    (tmp_path / "mine.toml").write_bytes(b"\xff")
    tiny.refused(rwkv("generate", "a"), "mine.toml: is no TOML")
    monkeypatch.setenv("RWKV_CONFIG", str(tmp_path / "none.toml"))
    assert in_force(rwkv, "generate")["threads"]["from"] == "default"


def test_a_path_may_begin_with_the_home_folder(rwkv: Run, write: Write, byte_model: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(byte_model.parent))
    write(f'model = "~/{byte_model.name}"\n')
    assert rwkv("info").stdout == rwkv("info", byte_model).stdout
