"""rwkv bench: every figure is there and follows from the others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from rwkv_cli.commands.bench import table
from rwkv_cli.engine.measuring import Report
from rwkv_cli.kernels.cpu import limits, rounding

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BYTES", 1 << 20)


def test_the_figures(rwkv: Run, byte_model: Path) -> None:
    result = rwkv("bench", "-m", byte_model, "-p", 20, "-n", 5, "-r", 2, "-d", 3, "--json")
    assert result.exit_code == 0
    r = json.loads(result.stdout)
    assert (r["prompt"], r["generate"], r["depth"], r["repetitions"]) == (20, 5, 3, 2)
    assert r["version"] == "7"
    assert 0 < r["bytes_per_token"] <= r["dense_bytes_per_token"] < r["file_bytes"]
    assert r["decode_bandwidth"] == pytest.approx(r["bytes_per_token"] * r["decode_tokens_per_second"])
    assert r["decode_share"] == pytest.approx(r["decode_bandwidth"] / r["read_bandwidth"])
    assert (r["product_peak"] is None) == (r["prefill_share"] is None) == (limits.product_peak(1, 1) is None)
    # ffn.value's input has 8 bits, which is half of what a product takes where there is an instruction for bytes
    assert 0.5 < r["prefill_work"] / r["prefill_macs"] < 1 if rounding.VNNI else r["prefill_work"] == r["prefill_macs"]
    for name in ("prefill_tokens_per_second", "load_seconds", "first_token_seconds", "prefill_macs", "peak_rss"):
        assert r[name] > 0


def test_the_table(rwkv: Run, byte_model: Path) -> None:
    lines = rwkv("bench", "-m", byte_model, "-p", 4, "-n", 2, "-r", 1).stdout.splitlines()
    assert any(line.startswith("read a prompt of 4 ") for line in lines)
    assert any(line.startswith("write 2 tokens ") for line in lines)
    assert f"model          {byte_model.name}" in lines
    assert rwkv("bench", "-m", byte_model, "-p", 1).exit_code == 2


def test_two_models_side_by_side(rwkv: Run, byte_model: Path) -> None:
    options = ("-m", byte_model, "--compare", byte_model, "-p", 4, "-n", 2, "-r", 2)
    lines = rwkv("bench", *options).stdout.splitlines()
    assert lines[:2] == [f"A        {byte_model.name}", f"B        {byte_model.name}"]
    size = f"{byte_model.stat().st_size / 1e6:,.1f}"
    assert [size, size, "1.00", "×"] == next(line for line in lines if line.startswith("file, MB")).split()[-4:]
    assert max(map(len, lines)) < 80
    first, second = map(json.loads, rwkv("bench", *options, "--json").stdout.splitlines())
    assert first["bytes_per_token"] == second["bytes_per_token"]
    assert first["read_bandwidth"] == second["read_bandwidth"]
    missing = rwkv("bench", "-m", byte_model, "--compare", byte_model.with_name("none"))
    assert missing.exit_code == 1
    assert "none" in missing.stderr


def test_the_table_of_a_large_model_fits_a_terminal() -> None:
    report = Report(
        model=f"/{'a' * 60}/RWKV-x070-World-2.9B.int8.safetensors", device="the CPU", version="7", parameters=2 * 10**9,
        file_bytes=3 * 10**9, threads=16, prompt=4096, generate=1024, depth=0, repetitions=5,
        prefill_tokens_per_second=1234.56, prefill_deviation=123.45, prefill_macs=9.9e11, prefill_work=9e11,
        prefill_share=0.5,
        decode_tokens_per_second=123.4, decode_deviation=12.3, decode_bandwidth=9.9e10, decode_share=1.01,
        bytes_per_token=3e9, dense_bytes_per_token=3 * 10**9, read_bandwidth=9.9e10, product_peak=1e12,
        load_seconds=10.0, kernel_seconds=10.0, first_token_seconds=1.0, peak_rss=10**10,
    )  # fmt: skip
    assert max(map(len, table(report).splitlines())) < 80


def test_one_token_reads_only_what_is_used(rwkv: Run, byte_model: Path) -> None:
    """The matrices of this model: every one but the embedding, of which a token reads one row."""
    from rwkv_cli.quant import Checkpoint

    r = json.loads(rwkv("bench", "-m", byte_model, "-p", 2, "-n", 1, "-r", 1, "--json").stdout)
    checkpoint = Checkpoint(byte_model)
    matrices = [n for n in checkpoint.names() if checkpoint.layout(n)["layout"] in ("tile", "columns")]
    stored = [checkpoint.array(part) for name in matrices for part in (name, name + ".scale")]
    assert r["dense_bytes_per_token"] == sum(array.nbytes for array in stored)
