"""The command `rwkv convert`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_cli.commands.options import TEMPLATE_NAMES, is_given, quant_option
from rwkv_cli.errors import pasted
from rwkv_cli.terminal.output import columns, note, one_line

if TYPE_CHECKING:
    from rwkv_cli.engine.conversion import Conversion, Converted
    from rwkv_cli.quant.writer import Written


@click.command("convert")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@quant_option
@click.option(
    "--bits",
    type=float,
    metavar="B",
    help="In place of --quant: at most B bits a weight on average. What rounding each kind of weights "
    "changes is measured, and those that matter most get more bits.",
)
@click.option(
    "--tokenizer",
    default="auto",
    show_default=True,
    metavar="auto|world|PATH",
    help="What to put in: auto finds it by the vocabulary's size and beside SRC; a tokenizer.json or a "
    "vocabulary as text or JSON can be named.",
)
@click.option(
    "--template",
    type=click.Choice(["auto", *TEMPLATE_NAMES]),
    default="auto",
    show_default=True,
    help="How the model was taught to chat; auto takes the one beside SRC, or tells it from the file name.",
)
@click.option("--eos", type=int, metavar="ID", help="The token that ends a text; default: 0, and config.json's.")
@click.option(
    "--adapter",
    "adapters",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Merge a fine-tune of RWKV-PEFT or PEFT: LoRA, PiSSA, DiSHA (bone) or a tuned state; may be given again.",
)
@click.option(
    "--adapter-scale",
    type=float,
    metavar="S",
    help="What a LoRA is multiplied by: alpha / rank. Default: as adapter_config.json or train_log.txt beside it say, "
    "else 32 / rank.",
)
@click.option(
    "--calibrate",
    metavar="self|none|FILE",
    help="Fit the rounding to what the model computes on a text, and measure what it costs: self has the model write "
    "one, FILE is one of yours. Default: self for q4, q5, q6 and --bits, else none.",
)
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
@click.option("--dry-run", is_flag=True, help="Check SRC and show what would be written, but write nothing.")
def command(
    src: Path,
    dst: Path | None,
    quant: str,
    tokenizer: str,
    template: str,
    *,
    bits: float | None,
    eos: int | None,
    adapters: tuple[Path, ...],
    adapter_scale: float | None,
    calibrate: str | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Convert a released checkpoint to one file that the other commands run.

    SRC is a torch .pth, a safetensors file, a GGUF or rwkv.cpp file, or a Hugging Face folder, of RWKV-4 to 8.
    DST defaults to SRC's name with .int8.safetensors (.q4.safetensors, .5.0bits.safetensors, .float.safetensors) in
    place of its ending.

    \b
    rwkv convert RWKV-x070-World-0.1B.pth
    rwkv convert RWKV-x070-World-0.1B.pth --bits 5.0
    rwkv convert RWKV-x070-World-0.1B.pth --adapter rwkv-0.pth
    rwkv convert rwkv-4-pile-169m/ pile.safetensors --tokenizer 20B_tokenizer.json
    """
    if bits is not None and is_given("quant"):
        if is_given("bits"):
            raise click.UsageError("--bits chooses the formats that --quant would name; leave one of them out")
        bits = None  # config.toml has it
    from rwkv_cli.engine.conversion import Conversion, check_destination, default_destination
    from rwkv_cli.engine.recipes import mixture_name
    from rwkv_cli.terminal.compiling import load_kernels
    from rwkv_cli.terminal.converting import converting_bar

    if bits is not None:
        quant = "int8"
    dst = dst or default_destination(src, quant if bits is None else mixture_name(bits), adapters)
    conversion = Conversion.of(src, quant, tokenizer, template, eos=eos, adapters=adapters, scale=adapter_scale)
    if bits is not None:
        conversion = conversion.within(bits)
    if calibrate is not None:
        conversion = conversion.calibrated(calibrate)
    check_destination(dst, conversion, overwrite=force or dry_run)
    if conversion.contents.metadata["tokenizer"] == "none":
        vocab = conversion.config.vocab
        click.echo(
            f"Warning: no tokenizer fits the vocabulary of {vocab}; the model will run by token ids from Python only. "
            "Give one with --tokenizer PATH.",
            err=True,
        )
    done: Converted | None = None
    if not dry_run:
        load_kernels(conversion.kernels)
        done = conversion.write(dst, overwrite=force, bar=converting_bar)
    click.echo(_report(conversion, done))
    if done is not None:
        _warn(done)
    metadata = conversion.contents.metadata
    if metadata["template_from"] == "guess" and metadata["tokenizer"] != "none":
        note(
            f"The file's name tells no chat template for certain: {metadata['template']} was taken. "
            "Choose another with --template, here or in rwkv chat."
        )
    for adapter in conversion.adapters:
        if adapter.guessed:
            note(
                f"Nothing tells the alpha of {one_line(adapter.path)}: RWKV-PEFT's default, {adapter.alpha:g}, was "
                "taken. If it was trained with another, give alpha / rank with --adapter-scale."
            )
    if dry_run:
        note(f"Dry run: {one_line(dst)} was not written.")
        return
    note(f"Wrote {one_line(dst)}")
    if metadata["tokenizer"] != "none":
        note(f"To chat with it: {one_line(pasted('rwkv', 'chat', '-m', dst))}")


def _report(conversion: Conversion, done: Converted | None) -> str:
    """The model and what became of it, as tables."""
    from rwkv_cli.engine.mixture import bounds

    config, contents = conversion.config, done.contents if done else conversion.contents
    tokenizer, template = contents.metadata["tokenizer"], contents.metadata["template"]
    heads = f", {config.heads} heads of {config.head_size}" if config.version != "4" else ""
    rows = [
        ("architecture", f"RWKV-{config.version}"),
        *(("adapter", one_line(adapter)) for adapter in conversion.adapters),
        ("layers", config.layers),
        ("width", f"{config.width}{heads}, channel mix {config.ffn}"),
        ("vocabulary", f"{config.vocab}, tokenizer {tokenizer}, chat template {template}"),
        ("parameters", f"{contents.weights / 1e6:,.1f} M"),
    ]
    if done is None and conversion.bits is not None:
        low, high = bounds(contents)
        rows += [("bits per weight", f"{conversion.bits:g} at most, of {low:.2f} to {high:.2f} that are possible")]
    else:
        rows += [
            ("size", f"{contents.source_bytes / 1e6:,.1f} MB → {contents.file_bytes / 1e6:,.1f} MB"),
            ("bits per weight", f"{contents.tensor_bytes * 8 / contents.weights:.2f}"),
        ]
    if done is not None and done.text is not None and done.loss is not None:
        text = "a text of the model's own" if done.text.origin == "self" else one_line(done.text.origin)
        rows += [
            ("calibrated on", f"{len(done.text.learned)} tokens of {text}"),
            ("KL to the source", f"{done.loss.kl:.2e} on {done.text.held_out} more tokens of it"),
            ("same likeliest token", f"{done.loss.top1:.2%}"),
        ]
    return "\n\n".join(filter(None, [columns(rows), _errors(done.written) if done else ""]))


def _warn(done: Converted) -> None:
    """Say what is not as it usually is."""
    from rwkv_cli.engine.calibration import USUAL_KL, alarming, coarsest
    from rwkv_cli.engine.keeping import USUAL_EFFECT, spoilt

    if done.spoilt is not None:
        note(
            f"The embedding was kept as it is: rounded, it would be off by {done.spoilt.itself:.1%}, but by "
            f"{done.spoilt.after_norm:.1%} after its norm (ln0)."
        )
    if done.kept:
        worst, rest = max(done.kept, key=lambda each: each.effect), len(done.kept) - 1
        now = worst.planned.format
        place = now.NAME if now.QUANTIZED else "the source's dtype"
        more = f" {rest} more were kept so; rwkv info names all." if rest else ""
        note(
            f"{worst.planned.name} was kept in {place}: in {worst.format}, what it computes would be off by "
            f"{worst.effect:.1%}, and {USUAL_EFFECT[worst.format]:.1%} at most is usual.{more}"
        )
    hurt = spoilt(done.written)
    if hurt:
        planned, rest = hurt[0].planned, len(hurt) - 1
        format = planned.format.NAME
        more = f" So it is with {rest} more." if rest else ""
        note(
            f"Warning: what {planned.name} computes is off by {hurt[0].effect:.1%}, and {format} usually costs it "
            f"{USUAL_EFFECT[format]:.1%} at most.{more} Convert with more bits or --quant none, and compare with "
            "rwkv ppl --compare."
        )
    coarse = coarsest(done.contents.plan)
    if done.loss is not None and coarse is not None and alarming(done.loss, coarse):
        note(
            f"Warning: a KL of {done.loss.kl:.1e} is far more than {coarse} usually costs, which is about "
            f"{USUAL_KL[coarse]:.0e}. Convert with --quant none, and compare with rwkv ppl --compare."
        )


def _errors(done: Sequence[Written]) -> str:
    """The size and the errors of the quantized tensors by kind, as a table; "" if there are none."""
    from rwkv_cli.models.naming import kind_of

    kinds: dict[str, dict[str, list[Written]]] = defaultdict(lambda: defaultdict(list))
    for item in done:
        if item.error is not None or item.planned.kept:
            kinds[kind_of(item.planned.name)][item.planned.format.NAME].append(item)
    if not kinds:
        return ""
    rows = [("tensor", "format", "MB", "bits", "mean error", "worst error", "of outputs")]
    for kind, format, items in ((kind, *pair) for kind, formats in kinds.items() for pair in formats.items()):
        stored = sum(item.planned.stored_bytes for item in items)
        bits = stored * 8 / sum(item.planned.weights for item in items)
        errors = [item.error or 0.0 for item in items]
        mean = sum(errors) / len(errors)
        effects = [item.effect for item in items if item.effect is not None]
        of_outputs = f"{sum(effects) / len(effects):.3%}" if effects else ""
        row = f"{stored / 1e6:,.2f}", f"{bits:.2f}", f"{mean:.3%}", f"{max(errors):.3%}", of_outputs
        rows.append((kind, format, *row))
    return columns(rows, right=range(2, 7))
