"""The command `rwkv info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rwkv_cli.commands.options import ModelWord, is_given, named_model, plot_option
from rwkv_cli.terminal.output import columns
from rwkv_cli.terminal.plot import plot_errors


@click.command("info")
@click.argument("model", type=ModelWord(), envvar="RWKV_MODEL", required=False)
@click.option("--devices", is_flag=True, help="List what models can run on here instead: the CPU and each GPU.")
@click.option("--tensors", is_flag=True, help="List every tensor: name, layout, shape, bytes, error.")
@plot_option("the relative error that quantizing cost each tensor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(model: str | None, devices: bool, tensors: bool, plot: Path | None, as_json: bool) -> None:
    """Show what a converted file holds; default: $RWKV_MODEL, else the bundled storyteller. Nothing but its header is
    read.

    \b
    rwkv info RWKV-x070-World-0.1B.int8.safetensors --tensors
    rwkv info RWKV-x070-World-0.1B.int8.safetensors --plot error.svg
    rwkv info --devices
    """
    if devices:
        if is_given("model") or tensors or plot is not None:
            raise click.UsageError("--devices is about this machine: give it no model, --tensors or --plot")
        _devices(as_json)
        return
    from rwkv_cli.engine.facts import describe
    from rwkv_cli.quant import Checkpoint

    facts = describe(Checkpoint(named_model(model, convert=False)))
    if plot is not None:
        _plot(plot, facts)
    if as_json:
        if not tensors:
            del facts["tensors"]
        click.echo(json.dumps(facts))
    else:
        _show(facts, tensors)


def _devices(as_json: bool) -> None:
    """Print the CPU and the GPUs."""
    from rwkv_cli.errors import DeviceError
    from rwkv_cli.kernels.cpu.compile import instructions
    from rwkv_cli.kernels.cpu.cores import usable_cores
    from rwkv_cli.kernels.cuda.gpus import found

    cores, kernels = usable_cores(), instructions()
    gpus, reason = [], None
    try:
        gpus = found()
    except DeviceError as error:
        reason = str(error)
    if as_json:
        cpu = {"cores": cores.physical, "threads": cores.logical, "instructions": kernels}
        listed = [
            {"name": gpu.name, "memory": gpu.memory, "compute_capability": "{}.{}".format(*gpu.capability)}
            for gpu in gpus
        ]
        click.echo(json.dumps({"cpu": cpu, "cuda": listed, "no_cuda": reason}))
        return
    rows = [("cpu", f"{cores.physical} cores, {cores.logical} threads, {kernels} kernels")]
    for gpu in gpus:
        capability = "{}.{}".format(*gpu.capability)
        rows.append(("cuda", f"{gpu.name}, {gpu.memory / 1e9:.1f} GB, compute capability {capability}"))
    click.echo(columns(rows if gpus else [*rows, ("cuda", f"none: {reason}")]))


def _plot(plot: Path, facts: dict[str, Any]) -> None:
    """Draw the errors of all tensors, where the file tells them."""
    errors = {row["name"]: row["error"] for row in facts["tensors"] if row["error"] is not None}
    if facts["quantization"] == "none":
        raise click.ClickException(f"{facts['path']}: its weights are not quantized, so there is no error to draw")
    if not errors:
        raise click.ClickException(f"{facts['path']}: does not say what quantizing cost; convert the model again")
    name, version = Path(facts["path"]).name, facts["config"].get("version")
    plot_errors(plot, errors, [name, f"RWKV-{version}", f"{facts['bits_per_weight']:.2f} bits per weight"])


def _show(facts: dict[str, Any], tensors: bool) -> None:
    """Print the facts as tables."""
    config = facts["config"]
    ranks = config.get("ranks")
    ranks = ", ".join(f"{name} {rank}" for name, rank in ranks.items()) if isinstance(ranks, dict) else ""
    heads = ("heads", "head_size") if config.get("version") != "4" else ()
    dimensions = ("layers", "width", *heads, "ffn", "vocab")
    click.echo(columns([
        ("file", facts["path"]),
        ("architecture", f"RWKV-{config.get('version')}"),
        *((key.replace("_", " "), config.get(key)) for key in dimensions),
        *([("low ranks", ranks)] if ranks else []),
        ("parameters", f"{facts['parameters'] / 1e6:,.1f} M"),
        ("size", f"{facts['bytes'] / 1e6:,.1f} MB"),
        ("bits per weight", f"{facts['bits_per_weight']:.2f}"),
        *((key, facts[key]) for key in ("quantization", "tokenizer", "template")),
        *((key, ", ".join(facts[key])) for key in ("styles", "think") if facts[key]),
        ("source", facts["source"]),
        *(("adapter", adapter) for adapter in facts["adapters"]),
        *(("kept in more bits", name) for name in facts["kept"]),
        *_calibration(facts["calibration"]),
        ("digest", facts["digest"]),
    ]))  # fmt: skip
    formats = facts["formats"]
    if len({kind["format"] for kind in formats.values()}) > 1:
        kinds = [(kind, of["format"], f"{of['bits']:.2f}") for kind, of in formats.items()]
        click.echo("\n" + columns([("weights", "format", "bits"), *kinds], right=[2]))
    if tensors:
        rows = [
            (
                *(row[key] for key in ("name", "layout", "dtype")),
                " × ".join(map(str, row["shape"])),
                f"{row['bytes']:,}",
                "" if row["error"] is None else f"{row['error']:.3%}",
            )
            for row in facts["tensors"]
        ]
        header = "tensor", "layout", "dtype", "shape", "bytes", "error"
        click.echo("\n" + columns([header, *rows], right=[4, 5]))


def _calibration(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The rows about a calibration."""
    if found is None:
        return []
    cost = f"{found['kl']:.2e}, on the end of {found['tokens']} tokens: {found['text']}"
    return [("KL to the source", cost), ("same likeliest token", f"{found['top1']:.2%}")]
