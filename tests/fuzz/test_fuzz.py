"""Damaged and hostile inputs of every kind are read, or refused in one sentence. Nothing else may happen.

A short run, always the same, is part of the tests. `make fuzz` makes a long one (CONTRIBUTING.md).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from foreign import write_bin, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rwkv_cli
from rwkv_cli.engine import sessions
from rwkv_cli.engine.conversation import Conversation
from rwkv_cli.engine.conversion import Conversion, read_tokenizer_file
from rwkv_cli.engine.jobs import JobSettings, read_jobs
from rwkv_cli.engine.messages import read_chat
from rwkv_cli.engine.model import LanguageModel
from rwkv_cli.engine.sampling import Sampling
from rwkv_cli.engine.saved import load_start
from rwkv_cli.engine.stored import judged
from rwkv_cli.engine.storyteller import TOKENIZER
from rwkv_cli.engine.templates import TEMPLATES
from rwkv_cli.errors import RwkvError

EXAMPLES = int(os.environ.get("RWKV_FUZZ", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RWKV_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
OTHER_SIZES = {"layers": 1, "width": 32, "vocab": 256, "head": 16, "ffn": 32}
SMALL = tiny.weights("7", layers=1, width=16, vocab=256, head=8, ffn=32)
RUNS: Counter[str] = Counter()

Change = tuple[str, float, float, bytes]
BIG = b"18446744073709551615"
NASTY = [b"", b"\0", b"\xff" * 8, b"-1", b"1e999", b"NaN", b"[" * 50, b"{", b'"', b"\n", b"\x1b[2J", BIG]
changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "cut", "repeat", "zero"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.one_of(st.binary(max_size=8), st.sampled_from(NASTY)),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, steps: list[Change]) -> bytes:
    """The content after these changes. Positions are shares of what may be changed."""
    for kind, where, much, data in steps:
        at = int(where * len(content))
        end = min(len(content), at + 1 + int(much**4 * len(content)))
        match kind:
            case "put":
                content = content[:at] + data + content[at + len(data) :]
            case "insert":
                content = content[:at] + data + content[at:]
            case "cut":
                content = content[:at] + content[end:]
            case "repeat":
                content = content[:end] + content[at:end] + content[end:]
            case "zero":
                content = content[:at] + bytes(end - at) + content[end:]
    return content


def read_or_refused(kind: str, read: Callable[[], object]) -> None:
    """Read an input. Any error but a sentence of our own is a fault."""
    RUNS[kind] += 1
    says = kind
    try:
        with np.errstate(all="ignore"):
            read()
    except RwkvError as error:
        says = str(error)
    assert says.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    yield
    print(f"\n{sum(RUNS.values())} inputs: {dict(sorted(RUNS.items()))}")  # noqa: T201


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    tiny.write_pth(folder / "model.pth", SMALL)
    Conversion.of(folder / "model.pth", "int8").write(folder / "model.safetensors", overwrite=True)
    return rwkv_cli.load(folder / "model.safetensors")


def head_changed(content: bytes, steps: list[Change], inside: bool) -> bytes:
    """A safetensors file with a changed header of the right length, or changed anywhere."""
    if not inside:
        return changed(content, steps)
    size = int.from_bytes(content[:8], "little")
    head = changed(content[8 : 8 + size].rstrip(), steps)
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


@fuzz
@given(steps=changes, inside=st.booleans())
def test_pth(folder: Path, steps: list[Change], inside: bool) -> None:
    path, tree, storages = folder / "a.pth", {}, {}
    for i, (name, array) in enumerate(SMALL.items()):
        tree[name] = tiny.tensor(str(i), "F32", array.size, 0, array.shape, tiny.contiguous(array.shape))
        storages[str(i)] = tiny.raw(array, "F32")
    pickled = tiny.pickled(tree)
    tiny.write_zip(path, changed(pickled, steps) if inside else pickled, storages)
    if not inside:
        path.write_bytes(changed(path.read_bytes(), steps))
    read_or_refused(".pth", lambda: convert(path))


def convert(path: Path) -> None:
    """Convert a file to the end."""
    Conversion.of(path, "int8").write(path.with_name("out"), overwrite=True)


@fuzz
@given(steps=changes, inside=st.booleans())
def test_safetensors(folder: Path, steps: list[Change], inside: bool) -> None:
    path = tiny.write_safetensors(folder / "a.safetensors", SMALL)
    path.write_bytes(head_changed(path.read_bytes(), steps, inside))
    read_or_refused("safetensors", lambda: convert(path))


@fuzz
@given(steps=changes, inside=st.booleans())
@pytest.mark.usefixtures("model")
def test_converted(folder: Path, steps: list[Change], inside: bool) -> None:
    path = folder / "changed.safetensors"
    path.write_bytes(head_changed((folder / "model.safetensors").read_bytes(), steps, inside))

    def run() -> None:
        lm = rwkv_cli.load(path)
        lm.advance([0], lm.new_state())

    read_or_refused("converted", run)


@fuzz
@given(steps=changes, inside=st.booleans())
def test_states(model: LanguageModel, folder: Path, steps: list[Change], inside: bool) -> None:
    path = folder / "state"
    model.new_state().save(path, {"going_on": '{"ids": [1], "counts": {"1": 1.0}, "seed": 1, "random": {}}'})
    path.write_bytes(head_changed(path.read_bytes(), steps, inside))
    read_or_refused("state", lambda: load_start(path, model))


@fuzz
@given(steps=changes, of_state=st.booleans())
def test_sessions(model: LanguageModel, folder: Path, steps: list[Change], of_state: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "folder", lambda: folder / "sessions")
        talk = Conversation(model, TEMPLATES["plain"], Sampling(), 1, 2)
        list(talk.reply("hello").stream())
        sessions.Session("kept").save(talk)
        kept = folder / "sessions" / "kept"
        path = next(kept.glob("state-*")) if of_state else kept / "transcript.json"
        path.write_bytes(changed(path.read_bytes(), steps))
        read_or_refused("session", lambda: sessions.Session.resume("kept", model))
        sessions.remove("kept")


@fuzz
@given(steps=changes, json_file=st.booleans())
def test_tokenizers(folder: Path, steps: list[Change], json_file: bool) -> None:
    path = folder / "tokenizer.json"
    table = "".join(f"{i} {bytes([i % 256]) * (1 + i // 256)!r} {1 + i // 256}\n" for i in range(1, 400))
    path.write_bytes(changed(TOKENIZER.read_bytes() if json_file else table.encode(), steps))

    def read() -> None:
        tokenizer = read_tokenizer_file(path)
        tokenizer.decode(tokenizer.encode("Once upon a time, ünïcode"))

    read_or_refused("tokenizer", read)


@fuzz
@given(steps=changes)
def test_batches(steps: list[Change]) -> None:
    lines = [{"id": i, "prompt": f"text {i}", "max_tokens": 3, "seed": i, "stop": ["\n"]} for i in range(4)]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    read_or_refused(
        "batch", lambda: read_jobs("jobs", changed(content, steps), JobSettings(max_tokens=3, seed=None, stops=()))
    )


@fuzz
@given(steps=changes, version=st.sampled_from(["6", "7"]), inside=st.booleans())
def test_gguf(folder: Path, steps: list[Change], version: str, inside: bool) -> None:
    path = folder / f"{version}.gguf"
    if not path.is_file():
        write_gguf(path, version, tiny.weights(version, **OTHER_SIZES), "Q8_0")
    content, head = path.read_bytes(), 8192 if inside else None
    (folder / "a.gguf").write_bytes(changed(content[:head], steps) + (content[head:] if head else b""))
    read_or_refused("GGUF", lambda: convert(folder / "a.gguf"))


@fuzz
@given(steps=changes, version=st.sampled_from(["4", "5.2", "6", "7"]))
def test_rwkv_cpp(folder: Path, steps: list[Change], version: str) -> None:
    path = folder / f"{version}.bin"
    if not path.is_file():
        write_bin(path, version, tiny.weights(version, **OTHER_SIZES), "Q8_0")
    (folder / "a.bin").write_bytes(changed(path.read_bytes(), steps))
    read_or_refused("rwkv.cpp", lambda: convert(folder / "a.bin"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5) | st.just("rwkv7"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *("layer_norm_epsilon", "norm_eps", "group_norm_epsilon", "head_size_divisor", "hidden_act", "norm_bias", "attn"),
    *("embedding_layer_norm_fused", "tie_word_embeddings", "attention_hidden_size", "value_dim", "norm_first"),
    *("quantization_config", "quantization", "eos_token_id", "chat_template", "bos_token", "eos_token", "weight_map"),
    *("lora_alpha", "use_rslora", "init_lora_weights", "general.architecture", "tokenizer.ggml.tokens"),
]
BESIDE = ["config.json", "tokenizer_config.json", "adapter_config.json", "model.safetensors.index.json", "vocab.json"]


@fuzz
@given(name=st.sampled_from(BESIDE), fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_files_beside_a_checkpoint(folder: Path, name: str, fields: dict[str, Any]) -> None:
    """Each field has a value of any kind."""
    for place in (folder / "model", folder / "adapter"):
        place.mkdir(exist_ok=True)
    tiny.write_safetensors(folder / "model" / "model.safetensors", SMALL)
    matrix = SMALL["blocks.0.att.key.weight"]
    pair = {"blocks.0.att.key.lora_A": matrix[:2], "blocks.0.att.key.lora_B": matrix[:, :2]}
    tiny.write_safetensors(folder / "adapter" / "adapter_model.safetensors", pair)
    path = folder / ("adapter" if name.startswith("adapter") else "model") / name
    path.write_text(json.dumps(fields))
    adapters = [folder / "adapter"] if path.parent.name == "adapter" else []
    read_or_refused("JSON", lambda: Conversion.of(folder / "model", "none", adapters=adapters))
    path.unlink()


WORDS = [
    *("{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "if ", "endif", "break", "set x = ", "macro f(x)"),
    *("endmacro", "m.content", "messages", "[0]", ".__class__", "range(", ")", "9" * 30, " ** ", " * ", " ~ ", "'a'"),
    *("|list", "|tojson", "|wordwrap(0)", "loop(", "f(", "raise_exception(", "strftime_now(", "bos_token", "1e999"),
]


@fuzz
@given(words=st.lists(st.sampled_from(WORDS), max_size=12), said=VALUES)
def test_templates_and_messages(words: list[str], said: Any) -> None:
    read_or_refused("template", lambda: judged(Path("a.jinja"), "".join(words), {}, "folder"))
    for messages in (said, [{"role": "user", "content": said}], [{"role": "tool", "content": "a", "tool_calls": said}]):

        def write(messages: Any = messages) -> None:
            chat = read_chat(json.dumps(messages).encode(), "messages")
            for template in TEMPLATES.values():
                form = template.for_chat(chat)
                form.whole(chat, form.default_think)

        read_or_refused("messages", write)
