"""Texts as other programs write them: byte order marks, UTF-16, CRLF, escapes; and texts that go on where one ended."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from click.testing import Result

import rwkv_cli
from rwkv_cli.engine.encodings import as_utf8, unescaped, utf8_blocks
from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.errors import TokenizerError

Run = Callable[..., Result]
TEXT = "Once upon a time, é 你好 🙂\n"
GREEDY = ("-n", 12, "--temperature", 0, "--ignore-eos")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_mark_tells_the_encoding(encoding: str, size: int) -> None:
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    data = (mark + TEXT).encode(encoding)
    assert as_utf8(data) == TEXT.encode()
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    assert b"".join(utf8_blocks(blocks)) == TEXT.encode()


@pytest.mark.parametrize("data", [b"", b"a", b"\xff", b"\x00\x01", b"\xe4\xbd", bytes(100), b"a\x00b\x00c" + bytes(9)])
def test_other_bytes_stay_as_they_are(data: bytes) -> None:
    assert as_utf8(data) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfea\x00b", "UTF-16 and is damaged"),
        (b"\xff\xfe\x00\xd8a\x00", "UTF-16 and is damaged"),
        ("plain text".encode("utf-16-le"), "without a byte order mark"),
        ("plain text".encode("utf-16-be"), "without a byte order mark"),
    ],
)
def test_utf16_is_never_taken_for_text(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=f"{message}; save it as UTF-8"):
        as_utf8(data)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_from_other_programs_are_the_same_text(
    rwkv: Run, byte_model: Path, tmp_path: Path, encoding: str
) -> None:
    want = rwkv("generate", TEXT[:-1], "-m", byte_model, *GREEDY).stdout
    assert rwkv("generate", "-m", byte_model, *GREEDY, input=TEXT.encode(encoding)).stdout == want
    line = json.dumps({"prompt": TEXT[:-1]}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_bytes((line + "\r\n").encode(encoding))
    answered = rwkv("generate", "--batch", tmp_path / "prompts.jsonl", "-m", byte_model, *GREEDY)
    assert json.loads(answered.stdout)["text"] == want
    for text in ("/help\n", "\n/help"):
        assert "/undo" in rwkv("chat", "-m", byte_model, input=text.encode(encoding)).output


def test_utf16_without_a_mark_is_named(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("plain text".encode("utf-16-le"))
    for result in (
        rwkv("generate", "-m", byte_model, input=(tmp_path / "a").read_bytes()),
        rwkv("generate", "-m", byte_model, "--batch", tmp_path / "a"),
        rwkv("ppl", "-m", byte_model, tmp_path / "a"),
    ):
        assert result.exit_code == 1
        assert "looks like UTF-16" in result.stderr
    chat = rwkv("chat", "-m", byte_model, input=(tmp_path / "a").read_bytes())
    assert (chat.stdout, "looks like UTF-16" in chat.stderr) == ("", True)


def ppl(rwkv: Run, model: Path, path: Path, data: bytes) -> tuple[float, str]:
    """Return the perplexity of a text in a file, and the notes on it."""
    path.write_bytes(data)
    result = rwkv("ppl", path, "-m", model, "--json")
    piped = rwkv("ppl", "-", "-m", model, "--json", input=data)
    assert (result.exit_code, piped.exit_code) == (0, 0), result.stderr + piped.stderr
    facts, same = json.loads(result.stdout), json.loads(piped.stdout)
    assert (facts["nll"], facts["bytes"], same["file"]) == (same["nll"], same["bytes"], "-")
    return facts["nll"], result.stderr


def test_ppl_reads_marks_and_names_what_is_odd(rwkv: Run, byte_model: Path, tmp_path: Path) -> None:
    text = TEXT * 50
    want, notes = ppl(rwkv, byte_model, tmp_path / "a", text.encode())
    assert "scored" not in notes
    for encoding in ("utf-8-sig", "utf-16"):
        assert ppl(rwkv, byte_model, tmp_path / "a", text.encode(encoding)) == (want, notes)
    crlf, notes = ppl(rwkv, byte_model, tmp_path / "a", text.replace("\n", "\r\n").encode())
    assert crlf != want
    assert "CRLF" in notes
    assert "NUL characters" in ppl(rwkv, byte_model, tmp_path / "a", (text + "\0").encode())[1]
    assert "twice" in rwkv("ppl", "-", "-", "-m", byte_model, input=b"text").stderr


def test_an_empty_standard_input_is_named(rwkv: Run, byte_model: Path) -> None:
    result = rwkv("ppl", "-", "-m", byte_model, input=b"")
    assert (result.exit_code, "standard input: is empty" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r"A\nB\tC\r\\n\'\"", "A\nB\tC\r\\n'\""),
        (r"\d and C:\dir\\new", "\\d and C:\\dir\\new"),
        (r"\x41\xe4\xbd\xa0\xff", "A你\udcff"),
        ("\\", "\\"),
    ],
)
def test_escapes(text: str, meant: str) -> None:
    assert unescaped(text) == meant


def test_escapes_are_an_option_and_a_stop_with_a_backslash_is_noted(rwkv: Run, byte_model: Path) -> None:
    options = ("-m", byte_model, "--json", *GREEDY)
    plain, meant = (json.loads(rwkv("generate", text, *options).stdout) for text in (r"A\nB", "A\nB"))
    escaped = json.loads(rwkv("generate", "-e", r"A\nB", *options).stdout)
    assert (escaped["prompt"], escaped["text"]) == ("A\nB", meant["text"])
    assert plain["prompt"] == r"A\nB"
    stop = meant["text"][5]
    code = "".join(f"\\x{byte:02x}" for byte in stop.encode())
    stopped = json.loads(rwkv("generate", "A\nB", "--escape", "--stop", code, *options).stdout)
    assert (stopped["stop"], stopped["text"]) == ("stop", meant["text"].partition(stop)[0])
    assert "--escape" in rwkv("generate", "A", "--stop", r"\n", *options).stderr
    assert "--escape" not in rwkv("generate", "A", "-e", "--stop", r"\n", *options).stderr


def word_level() -> tokenizers.Tokenizer:
    """The tokenizer of RWKV's MIDI models, in small: words between blanks."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{i}": i for i in range(30)} | {"<unk>": 30}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return made


def metaspace() -> tokenizers.Tokenizer:
    """A tokenizer as sentencepiece makes them: the decoder takes the first blank away."""
    vocab = {"▁": 0, "a": 1, "▁a": 2, "b": 3, "▁b": 4}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return made


@pytest.mark.parametrize("make", [word_level, metaspace])
def test_a_text_joins_its_prompt_as_the_decoder_joins_them(
    rwkv: Run, tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]
) -> None:
    tokenizer = make()
    tiny.write_pth(tmp_path / "a.pth", tiny.weights("7", layers=1, vocab=tokenizer.get_vocab_size()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model, state = tmp_path / "a.out", tmp_path / "state"
    assert rwkv("convert", tmp_path / "a.pth", model).exit_code == 0
    prompt = tokenizer.decode([2, 1, 4])
    options = ("-m", model, "--ignore-eos", "--seed", 1)
    whole = rwkv("generate", prompt, "-n", 12, *options).stdout
    first = rwkv("generate", prompt, "-n", 5, "--save-state", state, *options).stdout
    rest = rwkv("generate", "-n", 7, "--load-state", state, "-m", model, "--ignore-eos").stdout
    assert first + rest == whole
    lm = rwkv_cli.load(model)
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode(prompt + whole)
    assert lm.tokenizer.decode(ids) == prompt + whole
    assert len(whole.split()) > 3


def test_a_metaspace_stream_keeps_the_blank_behind_a_prompt() -> None:
    tokenizer = JsonTokenizer(metaspace().to_str().encode(), "m")
    for before, want in (((), "a b"), ([4], " a b")):
        stream = tokenizer.stream(before)
        assert "".join([stream.push(2), stream.push(4)]) + stream.flush() == want


def test_the_decay_of_rwkv3_may_be_a_column(rwkv: Run, tmp_path: Path) -> None:
    tensors = tiny.weights("4", layers=2)
    columns = {
        name: tensor[:, None] if name.endswith(("time_decay", "time_first")) else tensor
        for name, tensor in tensors.items()
    }
    found = []
    for name, each in (("flat", tensors), ("column", columns)):
        tiny.write_pth(tmp_path / f"{name}.pth", each)
        result = rwkv("convert", tmp_path / f"{name}.pth", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        found.append(rwkv_cli.load(tmp_path / name).digest)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("rwkv7-g1a-0.1b-20250728-ctx4096", "rwkv7-g1a-0.1b-20250728-ctx4096.int8.safetensors"),
        ("a.0.1b.pth", "a.0.1b.int8.safetensors"),
        ("A.PTH", "A.int8.safetensors"),
    ],
)
def test_a_name_without_an_ending_stays_whole(rwkv: Run, tmp_path: Path, name: str, want: str) -> None:
    tiny.write_pth(tmp_path / name, tiny.weights("7", layers=1, vocab=256))
    assert rwkv("convert", tmp_path / name).exit_code == 0
    assert (tmp_path / want).exists()


NO_HOME = """
import os, pwd, sys
def nobody(_):
    raise KeyError("no such user")
pwd.getpwuid = nobody
for name in [name for name in os.environ if name == "HOME" or name.startswith("XDG_")]:
    del os.environ[name]
from rwkv_cli.main import main
main()
"""


def test_a_user_without_a_home_folder(byte_model: Path, tmp_path: Path) -> None:
    """Compiled kernels go to the temporary folder, sessions cannot be kept, and no traceback is shown."""

    def run(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", NO_HOME, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, **kwargs)

    done = run("info", byte_model)
    assert (done.returncode, done.stderr) == (0, "")
    for arguments in (("sessions", "list"), ("chat", "--session", "a", "-m", byte_model)):
        done = run(*arguments, stdin=subprocess.DEVNULL)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("Error: this user has no home folder")
        assert "HOME" in done.stderr
    code = NO_HOME.replace(
        "from rwkv_cli.main import main\nmain()", "from rwkv_cli.kernels.cache import cache_folder"
    ) + ("import tempfile\ntempfile.tempdir = sys.argv[1]\nprint(cache_folder())")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path / "rwkv-"))
