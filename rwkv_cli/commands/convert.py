"""rwkv convert"""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rwkv_cli.engine.tokenizer import Tokenizer
    from rwkv_cli.models import Config
    from rwkv_cli.quant.writer import Planned, Written


@click.command("convert")
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path), required=False)
@click.option(
    "--quant",
    type=click.Choice(["int8", "none"]),
    default="int8",
    show_default=True,
    help="int8: 8.5 bits a weight; none: the source's values.",
)
@click.option(
    "--tokenizer",
    default="auto",
    show_default=True,
    metavar="auto|world|PATH",
    help="What to put in: auto finds it by the vocabulary's size and beside SRC; a tokenizer.json or a "
    "World vocabulary file can be named.",
)
@click.option(
    "--template",
    type=click.Choice(["auto", "world", "g1", "raven", "qa", "plain"]),
    default="auto",
    show_default=True,
    help="How the model was taught to chat; auto tells it from the file name.",
)
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
@click.option("--dry-run", is_flag=True, help="Check SRC and show what would be written, but write nothing.")
def command(src: Path, dst: Path | None, quant: str, tokenizer: str, template: str, force: bool, dry_run: bool) -> None:
    """Convert a released checkpoint to one file that the other commands run.

    SRC is a torch .pth, a safetensors file with official tensor names, or a Hugging Face folder, of RWKV-4, 5, 6 or 7.
    DST defaults to SRC's name with .int8.safetensors (or .float.safetensors) in place of its ending.

    \b
    rwkv convert RWKV-x070-World-0.1B.pth
    rwkv convert rwkv-4-pile-169m/ pile.safetensors --tokenizer 20B_tokenizer.json
    """
    dst = dst or default_destination(src, quant)
    job = Conversion.of(src, quant, tokenizer, template)
    check_destination(dst, {p.source.path for p in job.plan}, force or dry_run)
    if job.metadata["tokenizer"] == "none":
        click.echo(f"Warning: no tokenizer fits the vocabulary of {job.config.vocab}; the model will run by token ids "
                   "from Python only. Give one with --tokenizer PATH.", err=True)  # fmt: skip
    done = [] if dry_run else job.write(dst, force)
    click.echo(report(job, done))
    if dry_run:
        click.echo(f"Dry run: {dst} was not written.", err=True)
    else:
        click.echo(f"Wrote {dst}", err=True)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was checked, and what is to become of it."""

    config: Config
    plan: list[Planned]
    metadata: dict[str, Any]
    arrays: dict[str, Any]
    """The tokenizer's."""

    @classmethod
    def of(cls, src: Path, quant: str, tokenizer: str = "auto", template: str = "auto") -> Conversion:
        """Read what `src` is, without its weights. The arguments are the command's; raises as it does."""
        from rwkv_cli.engine import templates
        from rwkv_cli.errors import UnsupportedModelError
        from rwkv_cli.models import naming, registry
        from rwkv_cli.quant import open_source

        read = open_source(src)
        source = naming.official(read)
        try:
            shapes = {name: tensor.shape for name, tensor in source.items()}
            config = registry.detect(shapes)
            if naming.from_fla(read):
                config = replace(config, group_norm_eps=config.head_size * 1e-5)
            if config.version != "7":
                config = replace(config, embedding_dtype=source["emb.weight"].dtype)
            plan = planned(registry.match(config, shapes), source, quant)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{src}: {error}") from None
        kind, arrays = stored_tokenizer(find_tokenizer(tokenizer, src, config.vocab))
        name = full_path(src).name
        chat = templates.guess(name, kind, config.vocab) if template == "auto" else template
        metadata = {
            "config": config.as_json(), "quantization": quant, "tokenizer": kind, "template": chat, "source": name,
        }  # fmt: skip
        return cls(config, plan, metadata, arrays)

    def write(self, dst: Path, overwrite: bool) -> list[Written]:
        """Write `dst`, with a progress bar; nothing is left behind by a failure, a signal or Ctrl-C."""
        import numpy as np
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        from rwkv_cli.commands.options import announce_compilation
        from rwkv_cli.kernels.cpu.quantize_weights import quantize_rows
        from rwkv_cli.quant.writer import write
        from rwkv_cli.terminal.output import progress_bar

        announce_compilation()
        quantize_rows(np.zeros((1, 32), np.float32), 0)  # compiled before there is a bar
        parts = "Converting", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with _ended_by_exception(), progress_bar(*parts) as progress:
            task = progress.add_task("", total=sum(p.source_bytes for p in self.plan))
            return write(
                dst,
                self.plan,
                self.metadata,
                self.arrays,
                overwrite,
                quantize_rows,
                lambda n: progress.advance(task, n),
            )


def default_destination(src: Path, quant: str) -> Path:
    """SRC's name with the new ending, beside SRC."""
    src = full_path(src)
    stem = src.name if src.is_dir() else src.stem
    return src.parent / f"{stem}.{'int8' if quant == 'int8' else 'float'}.safetensors"


def full_path(src: Path) -> Path:
    """SRC with a name and a parent. Links are not followed: what a download cache links to has a hash for a name."""
    return src.absolute() if src.name not in ("", "..") else src.resolve()


def check_destination(dst: Path, files: set[Path], replace: bool) -> None:
    """Refuse a DST that cannot be written, or that is one of the source's own `files`, before any work is done."""
    if dst.is_dir():
        raise click.ClickException(f"{dst} is a folder; give the name of a file as DST")
    if not dst.parent.is_dir():
        raise click.ClickException(f"{dst.parent} is not a folder; make it first, or give another DST")
    if dst.exists() and any(dst.samefile(file) for file in files):
        raise click.ClickException(f"{dst} is the source itself; give another DST")
    if dst.exists() and not replace:
        raise click.ClickException(f"{dst} exists; give --force to replace it, or another DST")


def planned(matched: dict[str, Any], source: Any, quant: str) -> list[Planned]:
    """How each matched tensor is stored: the model says what kind it is, this says what becomes of a kind."""
    from rwkv_cli.quant.writer import Planned

    layouts = {"matrix": "tile", "sparse": "columns", "table": "rows"}
    return [
        Planned(
            name, source[origin],
            "vector" if entry.kind == "vector" else layouts[entry.kind] if quant == "int8" else "float",
            entry.shape, entry.derive or _reshape(entry.shape),
        )
        if entry.derive or entry.kind == "vector"
        else Planned(name, source[origin], layouts[entry.kind] if quant == "int8" else "float", entry.shape)
        for name, (entry, origin) in matched.items()
    ]  # fmt: skip


def _reshape(shape: tuple[int, ...]) -> Any:
    return lambda a: a.reshape(shape)


def find_tokenizer(choice: str, src: Path, vocab: int) -> Tokenizer | None:
    """The tokenizer asked for, or with `auto` the one that fits: by the vocabulary's size, or a file beside SRC.

    Raises TokenizerError if the one asked for does not fit.
    """
    from rwkv_cli.engine.tokenizer import ByteTokenizer, WorldTokenizer, official_vocabulary
    from rwkv_cli.errors import TokenizerError

    tokenizer: Tokenizer
    if choice == "auto":
        folder = src if src.is_dir() else full_path(src).parent
        for name in (f"{full_path(src).stem}.tokenizer.json", "tokenizer.json", "20B_tokenizer.json"):
            if (folder / name).is_file():
                tokenizer = read_tokenizer_file(folder / name)
                # vocabularies are padded by a few hundred rows at most: another one lies here by chance
                if tokenizer.size <= vocab < tokenizer.size + 512:
                    return tokenizer
        if vocab == 65536:
            return WorldTokenizer.from_vocabulary(official_vocabulary())
        return ByteTokenizer() if vocab == 256 else None
    path = official_vocabulary() if choice == "world" else Path(choice)
    tokenizer = read_tokenizer_file(path)
    if tokenizer.size > vocab:
        raise TokenizerError(f"{path}: has ids up to {tokenizer.size - 1}, but the model's vocabulary is {vocab}")
    return tokenizer


def read_tokenizer_file(path: Path) -> Tokenizer:
    """A tokenizer.json, or a World vocabulary as text."""
    from rwkv_cli.engine.tokenizer import JsonTokenizer, WorldTokenizer
    from rwkv_cli.errors import TokenizerError

    data = path.read_bytes()
    try:
        if data.lstrip()[:1] == b"{":
            return JsonTokenizer(data, str(path))
        return WorldTokenizer.from_vocabulary(path)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; give a sound one with --tokenizer") from None


def stored_tokenizer(tokenizer: Tokenizer | None) -> tuple[str, dict[str, Any]]:
    """Kind and arrays that a converted file holds of a tokenizer."""
    import numpy as np

    from rwkv_cli.engine.tokenizer import JsonTokenizer, WorldTokenizer

    if isinstance(tokenizer, WorldTokenizer):
        return tokenizer.kind, tokenizer.arrays()
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.kind, {"tokenizer.json": np.frombuffer(tokenizer.text, np.uint8)}
    return ("none" if tokenizer is None else tokenizer.kind), {}


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Make the signals that would end the process here and now an exception, so that no half file stays behind."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def report(job: Conversion, done: list[Written]) -> str:
    """What the model is and what became of it, as tables."""
    from rwkv_cli.quant.writer import file_size
    from rwkv_cli.terminal.output import columns

    config, plan = job.config, job.plan
    weights, before, after = sum(p.weights for p in plan), sum(p.source_bytes for p in plan), file_size(plan, {})
    total = after + sum(array.nbytes for array in job.arrays.values())
    tokenizer, template = job.metadata["tokenizer"], job.metadata["template"]
    heads = f", {config.heads} heads of {config.head_size}" if config.version != "4" else ""
    tables = [
        columns([
            ("architecture", f"RWKV-{config.version}"),
            ("layers", config.layers),
            ("width", f"{config.width}{heads}, channel mix {config.ffn}"),
            ("vocabulary", f"{config.vocab}, tokenizer {tokenizer}, chat template {template}"),
            ("parameters", f"{weights / 1e6:,.1f} M"),
            ("size", f"{before / 1e6:,.1f} MB → {total / 1e6:,.1f} MB"),
            ("bits per weight", f"{after * 8 / weights:.2f}"),
        ])
    ]  # fmt: skip
    kinds: dict[str, list[Written]] = defaultdict(list)
    for item in done:
        if item.layout not in ("vector", "float"):
            kinds[kind_name(item.name)].append(item)
    if kinds:
        rows = [("tensor", "MB", "bits", "mean error", "worst error")]
        for name, items in kinds.items():
            stored, count = sum(i.stored_bytes for i in items), sum(i.weights for i in items)
            errors = [i.error for i in items]
            mean = sum(errors) / len(errors)
            rows.append(
                (name, f"{stored / 1e6:,.2f}", f"{stored * 8 / count:.2f}", f"{mean:.3%}", f"{max(errors):.3%}")
            )
        tables.append(columns(rows, right=range(1, 5)))
    return "\n\n".join(tables)


def kind_name(name: str) -> str:
    """A tensor's name without its layer and ending: att.key, ffn.value, emb."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "blocks" else parts)
