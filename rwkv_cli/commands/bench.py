"""The command `rwkv bench`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_cli.commands.options import compare_option, model_options, open_model, whole_option
from rwkv_cli.terminal.output import columns, progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from rwkv_cli.engine.measuring import Report


@click.command("bench")
@model_options
@whole_option("-p", "--prompt", default=512, least=2, help="Tokens of the prompt to read.")
@whole_option("-n", "--generate", default=128, help="Tokens to write.")
@whole_option("-r", "--repetitions", default=5, metavar="R", help="Runs of each.")
@whole_option("-d", "--depth", default=0, least=0, help="Tokens that the model has read before.")
@compare_option("Measure another model, or the same one in another format, in turns, and show both side by side.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --compare one a model.")
def command(
    *,
    model: str | None,
    compare: str | None,
    threads: int | None,
    device: str,
    prompt: int,
    generate: int,
    repetitions: int,
    depth: int,
    as_json: bool,
) -> None:
    """Measure how fast a model reads a prompt and writes text, beside the most that this machine can do.

    Writing is limited by memory: each token reads the model once. Reading a prompt is limited by multiplications. Both
    limits are measured in the same run (multiplications on x86-64 or a GPU's tensor cores only), and the share is the
    part of them that was reached. The tokens are random. A model that fits into the CPU's cache may exceed 100 %
    of the memory's speed.

    \b
    rwkv bench -m RWKV-x070-World-0.1B.int8.safetensors
    rwkv bench -m model.int8.safetensors --compare model.q4.safetensors
    """
    from rwkv_cli.engine.measuring import measure
    from rwkv_cli.terminal.compiling import load_kernels

    with ExitStack() as stack:
        shown: list[Progress] = []

        def show(what: str) -> None:
            """Say what is measured. The bar comes with the first thing, since loading has bars of its own."""
            if not shown:
                shown.append(stack.enter_context(progress_bar("Measuring", "{task.description}")))
                shown[0].add_task("")
            shown[0].update(shown[0].task_ids[0], description=what)

        words = [model] if compare is None else [model, compare]
        reports = measure(
            [partial(open_model, word, device, threads) for word in words],
            load_kernels,
            prompt=prompt,
            generate=generate,
            repetitions=repetitions,
            depth=depth,
            progress=show,
        )
    if as_json:
        for report in reports:
            click.echo(json.dumps(asdict(report)))
    else:
        click.echo(table(reports[0]) if compare is None else both(*reports))


def both(a: Report, b: Report) -> str:
    """Write what two models have reached, side by side, and how many times the first the second is."""
    figures = [
        ("file, MB", a.file_bytes / 1e6, b.file_bytes / 1e6),
        ("a token reads, MB", a.bytes_per_token / 1e6, b.bytes_per_token / 1e6),
        (f"read a prompt of {a.prompt}, tokens/s", a.prefill_tokens_per_second, b.prefill_tokens_per_second),
        (f"write {a.generate} tokens, tokens/s", a.decode_tokens_per_second, b.decode_tokens_per_second),
    ]
    shares = [("share of the memory's speed", f"{a.decode_share:.0%}", f"{b.decode_share:.0%}", "")]
    rows = [(name, f"{x:,.1f}", f"{y:,.1f}", f"{y / x:.2f} ×") for name, x, y in figures] + shares
    names = columns(
        [("A", Path(a.model).name), ("B", Path(b.model).name), ("runs on", f"{a.device}, {a.threads} threads")]
    )
    return names + "\n\n" + columns([("", "A", "B", "B / A"), *rows], right=[1, 2, 3])


def table(r: Report) -> str:
    """Write the figures as a table, and the facts that they come from."""

    def share(part: float | None) -> str:
        """Write a part of the machine's limit, if that is known."""
        return "" if part is None else f"{part:.0%}"

    rates: list[tuple[Any, ...]] = [
        ("", "tokens/s", "that is", "share"),
        (
            f"read a prompt of {r.prompt}",
            f"{r.prefill_tokens_per_second:.1f} ± {r.prefill_deviation:.1f}",
            f"{r.prefill_macs / 1e9:.1f} billion multiplications/s",
            share(r.prefill_share),
        ),
        (
            f"write {r.generate} tokens",
            f"{r.decode_tokens_per_second:.1f} ± {r.decode_deviation:.1f}",
            f"{r.decode_bandwidth / 1e9:.1f} GB/s of memory",
            share(r.decode_share),
        ),
    ]
    peak = "" if r.product_peak is None else f", does {r.product_peak / 1e9:.1f} billion multiplications/s"
    skipped = "; the rest is skipped, as its input is zero" if r.bytes_per_token < r.dense_bytes_per_token else ""
    behind = f", after {r.depth} tokens" if r.depth else ""
    facts = [
        ("model", Path(r.model).name),
        ("size", f"RWKV-{r.version}, {r.parameters / 1e6:,.1f} M parameters, {r.file_bytes / 1e6:,.1f} MB"),
        ("runs on", f"{r.device}, threads: {r.threads}{behind}"),
        ("a token reads", f"{r.bytes_per_token / 1e6:.1f} MB of {r.dense_bytes_per_token / 1e6:.1f} MB{skipped}"),
        ("this machine", f"reads {r.read_bandwidth / 1e9:.1f} GB/s of memory{peak}"),
        ("seconds to", f"load {r.load_seconds:.3f}, get kernels {r.kernel_seconds:.3f}, "
                       f"make a first token {r.first_token_seconds:.3f}"),
        ("memory taken", f"{r.peak_rss / 1e6:,.1f} MB" if r.peak_rss else "not measured here"),
    ]  # fmt: skip
    return columns(facts) + "\n\n" + columns(rates, right=[1, 2, 3])
