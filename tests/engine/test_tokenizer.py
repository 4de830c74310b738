"""Tokenizers against known ids, the reference package and themselves: whole, in blocks, and as a stream."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_cli.engine.json_tokenizer import JsonTokenizer
from rwkv_cli.engine.tokenizer import ByteTokenizer, Tokenizer, WorldTokenizer, official_vocabulary
from rwkv_cli.errors import TokenizerError
from rwkv_cli.kernels.cpu.longest_match import LongestMatch

SAMPLE = "The cat sat on the mat.  It said: 你好，世界！ It's 12 é́ 👩‍👩‍👧 the cat\n\nthe end 𝄞\t\u00a0x" + "   \n" * 9


def bpe(cut: bool = False) -> JsonTokenizer:
    """A byte-level BPE of 300 tokens, learnt from SAMPLE; 0 ends a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([SAMPLE] * 2, trainer)
    if cut:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=8)
    return JsonTokenizer(tokenizer.to_str().encode(), "small")


WORLD = WorldTokenizer.from_vocabulary(official_vocabulary())
KINDS: dict[str, Tokenizer] = {"world": WORLD, "bytes": ByteTokenizer(), "json": bpe()}
EVERY = pytest.mark.parametrize("kind", KINDS)
mixed = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from(["the cat", " ", "   \n", "\n\n", "你好", "👩‍👧", "é́", " " * 127])),
    max_size=12,
).map("".join)
modest = settings(max_examples=60, deadline=None)


def blocks(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """`data` cut into pieces of `sizes`, over and over."""
    at = turn = 0
    while at < len(data):
        yield data[at : at + sizes[turn % len(sizes)]]
        at += sizes[turn % len(sizes)]
        turn += 1


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [33155, 45, 40213, 34]),
        ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
        ("你好，世界", [10464, 11685, 19137, 10267, 14610]),
        ("a \n\nb", [98, 3336, 99]),
        ("\n\n\n\n\nUser:", [28349, 24281, 59]),
        (b"\xff\xfe\xe4\xbd", [256, 255, 3030]),
        ("\udcff\udcfe\udce4\udcbd", [256, 255, 3030]),
        ("", []),
    ],
)
def test_world_gives_known_ids(text: str | bytes, ids: list[int]) -> None:
    assert WORLD.encode(text) == ids


def test_world_gives_the_known_ids_of_other_implementations(shared: Path) -> None:
    for case in json.loads((shared / "vectors/world/world_tokenizer_vectors.json").read_text()):
        assert WORLD.encode(case["text"]) == case["ids"]


@pytest.fixture(scope="module")
def reference() -> Any:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(official_vocabulary()))


def test_world_encodes_as_the_reference(reference: Any) -> None:
    heads = [token for token in WORLD.table if len(token) > 20]

    @modest
    @given(st.one_of(mixed.map(str.encode), st.binary(max_size=60), st.lists(st.sampled_from(heads)).map(b"".join)))
    def check(data: bytes) -> None:
        assert WORLD.encode(data) == reference.encodeBytes(data)

    check()
    assert {i: token for i, token in enumerate(WORLD.table) if token} == reference.idx2token


def longest_slices(table: list[bytes], data: bytes) -> list[int]:
    """Greedy longest match, as plainly as it can be written."""
    ids = {token: i for i, token in enumerate(table) if token}
    longest, out, at = max(map(len, ids)), [], 0
    while at < len(data):
        token = next(data[at : at + n] for n in range(longest, 0, -1) if data[at : at + n] in ids)
        out.append(ids[token])
        at += len(token)
    return out


@pytest.mark.parametrize("text", ["bytes", "tokens", "half tokens", "prose"])
def test_long_texts_are_split_as_short_ones(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts are split by compiled code, short ones in Python. A plain loop says what is right."""
    rng = np.random.default_rng(0)
    tokens = [WORLD.table[i] for i in rng.permutation(WORLD.size)[:20_000]]
    data = {
        "bytes": rng.bytes(50_000),
        "tokens": b"".join(tokens),
        "half tokens": b"".join(token[: 1 + len(token) // 2] for token in tokens),
        "prose": (SAMPLE * 300).encode(),
    }[text]
    want = longest_slices(WORLD.table, data)
    assert WORLD.encode(data) == want
    ends = np.cumsum([len(WORLD.table[i]) for i in want])
    pieces = list(WORLD.encode_blocks(blocks(data, [1 << 16, 40_000, 100])))
    assert [i for piece in pieces for i in piece.ids] == want
    assert np.array_equal(np.concatenate([np.diff(piece.ends, prepend=0) for piece in pieces]).cumsum(), ends)
    for border in (0, len(data) + 1):  # all compiled, and all in Python
        monkeypatch.setattr("rwkv_cli.engine.tokenizer._LONG", border)
        assert WORLD.encode(data) == want


def test_long_texts_are_split_as_by_the_reference(shared: Path, reference: Any) -> None:
    for path in sorted((shared / "text").iterdir()):
        data = path.read_bytes()[:100_000]
        assert WORLD.encode(data) == reference.encodeBytes(data), path


@modest
@given(
    table=st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=30), data=st.binary(max_size=40),
    heads=st.lists(st.integers(0, 29), max_size=20),
)  # fmt: skip
def test_any_vocabulary_splits_alike(table: list[bytes], data: bytes, heads: list[int]) -> None:
    """One of two equal tokens counts. What cannot be spelled is named at the same place."""
    tokenizer = WorldTokenizer([b"", *table])
    text = b"".join(table[i % len(table)] for i in heads) + data
    found = []
    for border in (0, len(text) + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rwkv_cli.engine.tokenizer._LONG", border)
            try:
                found.append(tokenizer.encode(text))
            except TokenizerError as error:
                found.append(str(error))
    assert found[0] == found[1]


def test_no_vocabulary_takes_long_to_load() -> None:
    """These edges of the trie all fall on neighbouring slots if a key is only multiplied by a known number."""
    size = 1 << (2 * 255 * 255).bit_length()
    tokens, node = [b""], 1
    for first in range(255):
        token = bytes([first])
        node += 1
        while len(token) < 255:
            keys = (node - 1 << 8) + np.arange(256)
            token += bytes([int(np.argmin(keys * 0x9E3779B1 >> 8 & size - 1))])
            node += 1
        tokens.append(token)
    LongestMatch([b"", b"a"])  # loads what is compiled
    rng = np.random.default_rng(0)
    seconds = []
    for table in ([b"", *(rng.bytes(255) for _ in range(255))], tokens):
        begun = time.perf_counter()
        LongestMatch(table)
        seconds.append(time.perf_counter() - begun)
    assert seconds[1] < 10 * seconds[0] + 0.1


@EVERY
def test_only_long_texts_in_world_need_a_kernel(kind: str) -> None:
    tokenizer = KINDS[kind]
    assert tokenizer.kernels(5000) == []
    assert [type(each.load()) for each in tokenizer.kernels(1 << 20)] == [type(None)] * (kind == "world")


def test_short_texts_need_no_compiled_code() -> None:
    code = (
        "import sys\nfrom rwkv_cli.engine.tokenizer import WorldTokenizer\n"
        "WorldTokenizer([b'', b'a']).encode('a' * 5000)\nprint('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["world", "bytes"])
@modest
@given(data=st.binary(max_size=200))
def test_any_bytes_round_trip(kind: str, data: bytes) -> None:
    tokenizer: Any = KINDS[kind]
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert tokenizer.encode(data.decode("utf-8", "surrogateescape")) == ids


@modest
@given(text=mixed)
def test_any_text_round_trips_in_json(text: str) -> None:
    assert KINDS["json"].decode(KINDS["json"].encode(text)) == text


@EVERY
@modest
@given(text=mixed, sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_blocks_give_the_same_as_the_whole(kind: str, text: str, sizes: list[int]) -> None:
    tokenizer, data = KINDS[kind], (text * 5).encode()
    pieces = list(tokenizer.encode_blocks(blocks(data, sizes)))
    assert [i for piece in pieces for i in piece.ids] == tokenizer.encode(data)
    widths = [np.diff(piece.ends, prepend=0) for piece in pieces]
    assert all(len(piece.ids) == len(piece.ends) for piece in pieces)
    assert all((width >= 0).all() for width in widths)
    assert sum(int(width.sum()) for width in widths) == len(data)
    if kind != "json":
        table: Any = KINDS[kind]
        assert [n for width in widths for n in width] == [len(table.table[i]) for i in tokenizer.encode(data)]


@EVERY
def test_blocks_are_not_hoarded(kind: str) -> None:
    """The part of a text that is held never grows beyond a few blocks."""
    taken = given_out = most = 0

    def feed() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(200):
            taken += 1000
            yield b"the cat sat on the mat, " * 41 + b"and said: so be"

    for piece in KINDS[kind].encode_blocks(feed()):
        given_out += int(piece.ends[-1])
        most = max(most, taken - given_out)
    assert given_out == 999 * 200
    assert most < 2000


def test_a_text_without_blanks_is_not_hoarded_either() -> None:
    sizes = [int(piece.ends[-1]) for piece in KINDS["json"].encode_blocks([b"x" * (1 << 16)] * 40)]
    assert sum(sizes) == 40 << 16
    assert len(sizes) > 1


def test_json_blocks_end_where_the_text_ends_though_offsets_leave_out_blanks() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "x": 1, "Ġ": 2, "xĠ": 3}, [("x", "Ġ")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    assert tokenizer.encode("ax ").offsets[-1] == (1, 2)
    (piece,) = JsonTokenizer(tokenizer.to_str().encode(), "trimmed").encode_blocks([b"ax "])
    assert (piece.ids, piece.ends.tolist()) == ([0, 3], [1, 3])


@modest
@given(
    before=mixed, after=st.binary(max_size=20), bad=st.sampled_from([b"\xff", b"\xe4A", b"\xf0\x9f "]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)  # fmt: skip
def test_json_names_the_first_byte_that_is_no_text(before: str, after: bytes, bad: bytes, sizes: list[int]) -> None:
    data = before.encode() + bad + after
    message = f"not UTF-8 at byte {len(before.encode())};"
    for take in (lambda: KINDS["json"].encode(data), lambda: list(KINDS["json"].encode_blocks(blocks(data, sizes)))):
        with pytest.raises(TokenizerError, match=message):
            take()


def test_json_names_a_character_that_the_end_cuts() -> None:
    with pytest.raises(TokenizerError, match="not UTF-8 at byte 5;"):
        list(KINDS["json"].encode_blocks([b"ab \xc3", b"\xa9\xe4", b"\xbd"]))


@EVERY
def test_a_lone_surrogate_is_refused(kind: str) -> None:
    with pytest.raises(TokenizerError, match="character 2"):
        KINDS[kind].encode("ab\ud800")


@EVERY
@modest
@given(data=st.data())
def test_a_stream_gives_what_decode_gives(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(
        st.one_of(mixed.map(tokenizer.encode), st.lists(st.integers(0, tokenizer.size + 3), max_size=40)), label="ids"
    )
    stream, pieces = tokenizer.stream(), []
    for i in ids:
        pieces.append(stream.push(i))
        if pieces[-1]:
            assert not stream.unfinished or kind != "json"
    if not stream.unfinished:
        assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)
    assert stream.flush() == ""


@EVERY
def test_a_stream_never_gives_half_a_character(kind: str) -> None:
    text = "日本語👩‍👩‍👧 é𝄞 и так"
    ids = KINDS[kind].encode(text)
    stream, so_far, waited = KINDS[kind].stream(), "", False
    for i in ids:
        piece = stream.push(i)
        waited = waited or not piece
        assert "�" not in piece
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text
    assert waited
    assert stream.flush() == ""


@EVERY
def test_an_unfinished_character_comes_at_the_end(kind: str) -> None:
    stream = KINDS[kind].stream()
    ids = KINDS[kind].encode("a𝄞")
    assert [stream.push(i) for i in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert stream.unfinished
    assert stream.flush() == "�"


def test_ids_without_a_token_are_no_text() -> None:
    assert WORLD.decode([0, 98, 65530, 70000, -1]) == "a"
    assert KINDS["bytes"].decode([97, 256, -1]) == "a"
    tokenizer = KINDS["json"]
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.size, -1]) == "a"
    assert [tokenizer.size, WORLD.size, KINDS["bytes"].size] == [300, 65530, 256]


def test_world_is_the_same_from_a_converted_file() -> None:
    arrays = WORLD.arrays()
    again = WorldTokenizer.from_arrays(arrays["tokenizer.bytes"], arrays["tokenizer.lengths"])
    assert again.table == WORLD.table


def test_json_ignores_what_a_file_says_of_training() -> None:
    assert bpe(cut=True).encode(SAMPLE) == KINDS["json"].encode(SAMPLE)
    assert bpe(cut=True).encode("a") == KINDS["json"].encode("a")


def test_json_encodes_as_known(shared: Path) -> None:
    folder = shared / "vectors/neox20b"
    tokenizer = JsonTokenizer((folder / "20B_tokenizer.json").read_bytes(), "20B")
    for name in ("hello-world", "test-string"):
        text = (folder / f"{name}.txt").read_bytes()
        ids = json.loads((folder / f"{name}.json").read_text())
        assert tokenizer.encode(text) == ids
        assert [i for piece in tokenizer.encode_blocks(blocks(text, [7])) for i in piece.ids] == ids


def byte_fallback() -> JsonTokenizer:
    """A tokenizer like Llama's: blanks are ▁, and what it lacks becomes bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "a": 258, "▁a": 259}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    parts = tokenizers.decoders
    made.decoder = parts.Sequence([parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)])
    return JsonTokenizer(made.to_str().encode(), "llama.json")


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (["▁a", "▁a", 0xC3, 0xA9, "a"], "a aéa"),
        (["a", 0xFF, "▁a"], "a� a"),
        ([0xC3, 0xA9, 0xFF, 0xFF, "▁a"], "é�� a"),
        ([0xC3, 0xA9, 0xE4, 0xB8, 0x96], "é世"),
        ([0xE4, 0xB8], "��"),
        ([0xFF] * 200 + ["a"], "�" * 200 + "a"),
    ],
)
def test_bytes_that_are_no_text_are_shown_as_such(written: list[Any], want: str) -> None:
    tokenizer = byte_fallback()
    stream = tokenizer.stream()
    ids = [part + 1 if isinstance(part, int) else {"a": 258, "▁a": 259}[part] for part in written]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == want
    assert not stream.unfinished


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 259), max_size=40))
def test_any_bytes_can_be_streamed(ids: list[int]) -> None:
    stream = byte_fallback().stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text.count("a") >= sum(token in (258, 259) for token in ids)  # among bad bytes, a byte "a" is one of them
