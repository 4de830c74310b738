"""A source that changes while it is converted gives a sentence, never a file of both."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from click.testing import Result

from rwkv_cli.engine.conversion import Conversion
from rwkv_cli.errors import FormatError
from rwkv_cli.quant import Checkpoint, safetensors

Run = Callable[..., Result]
ONE, OTHER = (tiny.weights("7", vocab=256, seed=seed) for seed in (0, 1))


def replaced(path: Path, other: Path) -> None:
    other.replace(path)


def truncated(path: Path, other: Path) -> None:  # noqa: ARG001 - one signature for all
    os.truncate(path, path.stat().st_size // 3)


def overwritten(path: Path, other: Path) -> None:
    os.utime(path, ns=(0, 0))  # not within one tick of the clock
    path.write_bytes(other.read_bytes())


def appended(path: Path, other: Path) -> None:
    with path.open("ab") as file:
        file.write(other.read_bytes())


def removed(path: Path, other: Path) -> None:  # noqa: ARG001
    path.unlink()


@pytest.mark.parametrize("change", [replaced, truncated, overwritten, appended, removed])
@pytest.mark.parametrize("write", [tiny.write_pth, tiny.write_safetensors])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_a_source_that_changes_is_not_converted(
    tmp_path: Path, change: Callable[[Path, Path], None], write: Callable[..., Path], there: bool
) -> None:
    source, other = write(tmp_path / "a", ONE), write(tmp_path / "b", OTHER)
    dst = tmp_path / "out"
    if there:
        dst.write_bytes(b"the old one")

    @contextlib.contextmanager
    def bar(_: str, __: int) -> Iterator[Callable[[int], object]]:
        done: list[int] = []

        def progress(count: int) -> None:
            done.append(count)
            if len(done) == 5:
                change(source, other)

        yield progress

    conversion = Conversion.of(source, "int8")
    with pytest.raises(FormatError, match=f"^{source}: was changed or replaced while it was read; try again"):
        conversion.write(dst, overwrite=there, bar=bar)
    assert (dst.read_bytes() == b"the old one") if there else not dst.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "b", "out"}


def test_a_file_that_is_replaced_between_its_header_and_its_weights_is_refused(
    tmp_path: Path, byte_model: Path, converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(byte_model.read_bytes())
    other.write_bytes(converted("6", vocab=256).read_bytes())
    real = safetensors.safe_open

    def late(*args: object) -> object:
        other.replace(path)
        return real(*args)

    monkeypatch.setattr(safetensors, "safe_open", late)
    with pytest.raises(FormatError, match="was changed or replaced while it was read"):
        Checkpoint(path)


def test_an_adapter_that_changes_is_not_merged(tmp_path: Path) -> None:
    base = tiny.write_pth(tmp_path / "a.pth", ONE)
    low_rank = {"blocks.0.att.key.lora_A": ONE["blocks.0.att.key.weight"][:2]}
    low_rank["blocks.0.att.key.lora_B"] = low_rank["blocks.0.att.key.lora_A"].T.copy()
    adapter = tiny.write_pth(tmp_path / "adapter.pth", low_rank)

    @contextlib.contextmanager
    def bar(_: str, __: int) -> Iterator[Callable[[int], object]]:
        os.utime(adapter, ns=(0, 0))
        yield lambda _: None

    conversion = Conversion.of(base, "int8", adapters=[adapter])
    with pytest.raises(FormatError, match=f"^{adapter}: was changed or replaced while it was read"):
        conversion.write(tmp_path / "out", overwrite=False, bar=bar)
    assert not (tmp_path / "out").exists()
