"""The command `rwkv bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.commands.options import model_options, open_model
from rwkv_cli.terminal.output import columns, progress_bar

if TYPE_CHECKING:
    from rwkv_cli.engine.measuring import Report


@click.command("bench")
@model_options
@click.option(
    "-p", "--prompt", type=click.IntRange(min=2), default=512, show_default=True, metavar="N", help="Tokens to prefill."
)
@click.option(
    "-n",
    "--generate",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens to decode.",
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True, metavar="R", help="Runs of each."
)
@click.option(
    "-d",
    "--depth",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens that the state has read before.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(
    *,
    model: Path | None,
    threads: int | None,
    device: str,
    prompt: int,
    generate: int,
    repetitions: int,
    depth: int,
    as_json: bool,
) -> None:
    """Measure the speed of prefill and decode, beside what this machine can do at most.

    Bandwidth is that of reading memory (on a GPU that of a copy), the int8 peak that of multiply-adds (AVX-512 VNNI, or
    a GPU's tensor cores); both are measured in the same run. Tokens are random ones. A model that fits into the CPU's
    cache may exceed the bandwidth.

    \b
    rwkv bench -m RWKV-x070-World-0.1B.int8.safetensors
    """
    from rwkv_cli.engine.measuring import measure

    with progress_bar("Measuring", "{task.description}") as progress:
        task = progress.add_task("")
        report = measure(
            lambda: open_model(model, device, threads),
            prompt=prompt,
            generate=generate,
            repetitions=repetitions,
            depth=depth,
            progress=lambda what: progress.update(task, description=what),
        )
    click.echo(json.dumps(asdict(report)) if as_json else table(report))


def table(r: Report) -> str:
    """Write the figures as llama-bench prints them, and the facts that they come from."""

    def share(part: float | None) -> str:
        """Write a part of the machine's limit, if that is known."""
        return "" if part is None else f"{part:.0%}"

    rates: list[tuple[Any, ...]] = [
        ("test", "tokens per second", "", "of the machine's"),
        (
            f"prefill {r.prompt}",
            f"{r.prefill_tokens_per_second:.2f} ± {r.prefill_deviation:.2f}",
            f"{r.prefill_macs / 1e9:.1f} GMAC/s",
            share(r.prefill_share),
        ),
        (
            f"decode {r.generate}",
            f"{r.decode_tokens_per_second:.2f} ± {r.decode_deviation:.2f}",
            f"{r.decode_bandwidth / 1e9:.1f} GB/s",
            share(r.decode_share),
        ),
    ]
    peak = "not measured here" if r.int8_peak is None else f"{r.int8_peak / 1e9:.1f} GMAC/s"
    skipped = "; the rest is skipped as its input is zero" if r.bytes_per_token < r.dense_bytes_per_token else ""
    facts = [
        ("model", r.model),
        ("size", f"RWKV-{r.version}, {r.parameters / 1e6:,.1f} M parameters, {r.file_bytes / 1e6:,.1f} MB"),
        ("device, depth", f"{r.device} (threads: {r.threads}), {r.depth} tokens"),
        ("read per token", f"{r.bytes_per_token / 1e6:.1f} MB of {r.dense_bytes_per_token / 1e6:.1f} MB{skipped}"),
        ("memory bandwidth", f"{r.read_bandwidth / 1e9:.1f} GB/s"),
        ("int8 peak", f"{peak}; a weight takes two, as activations have 15 bits"),
        ("load", f"{r.load_seconds:.3f} s, first token {r.first_token_seconds:.3f} s"),
        ("peak memory", f"{r.peak_rss / 1e6:,.1f} MB" if r.peak_rss else "not measured here"),
    ]
    return columns(facts) + "\n\n" + columns(rates, right=[1, 2, 3])
