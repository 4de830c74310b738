"""Pictures of the figures of `rwkv ppl`, `rwkv eval` and `rwkv info`, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cli.terminal.output import harmless, note, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rwkv_cli.engine.evaluating import Part
    from rwkv_cli.engine.scoring import Score

SUFFIXES = (".png", ".svg", ".pdf")
"""Endings of the files that pictures can be drawn into."""
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""The colours of Okabe and Ito, which the colour-blind tell apart."""
_GREY = "#666666"
_STYLE = {
    "svg.fonttype": "none",  # text stays text, to be searched and copied
    "font.size": 9.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}


def plot_nll(path: Path, scores: Sequence[tuple[Path, Score]], models: Sequence[Path]) -> None:
    """Draw NLL by position into `path`: a line for each text of `scores` and each of its one or two `models`.

    A bin is drawn as it is, with a band of one standard error where it has two tokens or more. The title has the facts
    that all lines share.
    """
    import numpy as np

    texts, names = _names([text for text, _ in scores]), _names(models)
    facts, lines = [], []
    with _figure((7.5, 4.4), path) as figure:
        axes = figure.add_subplot()
        for i, (_, score) in enumerate(scores):
            other = score.comparison
            curves = [(score.by_position, score.ppl)]
            curves += [(other.other_by_position, other.other_ppl)] if other is not None else []
            for k, (bins, ppl) in enumerate(curves):
                x = [math.sqrt(b.first * b.last) for b in bins]
                y, error = np.array([b.nll for b in bins]), np.array([b.stderr for b in bins])
                colour = _COLOURS[(i if len(scores) > 1 else k) % len(_COLOURS)]
                axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
                lines += axes.plot(x, y, color=colour, linestyle=("-", "--")[k], marker=("o", "")[k], markersize=3.5)
                context = "whole text" if score.context is None else f"context {score.context:,}"
                facts.append((texts[i], names[k], f"{score.tokens:,} tokens", context, f"perplexity {ppl:.4g}"))
        _by_tokens(axes)
        axes.set_xlabel("token position since the context began")
        axes.set_ylabel("NLL in nats per token, ± standard error")
        shared = [len(set(column)) == 1 for column in zip(*facts, strict=True)]
        _title(axes, "NLL by position in the context", [f for f, same in zip(facts[0], shared, strict=True) if same])
        if len(lines) > 1:
            legend = figure.legend(lines, ["x"] * len(lines), loc="outside lower left", frameon=False)
            for text, row in zip(legend.get_texts(), facts, strict=True):
                text.set_parse_math(False)
                text.set_text(_joined([fact for fact, same in zip(row, shared, strict=True) if not same]))
            figure.set_figheight(4.4 + 0.2 * sum(1 + text.get_text().count("\n") for text in legend.get_texts()))


def plot_recall(path: Path, parts: Sequence[Part], models: Sequence[Path]) -> None:
    """Draw accuracy and NLL of recall by distance into `path`, a line for each of the one or two `models`.

    The last word of a part's name is "tokens" after a distance. A dashed line is what texts reach that lack the word.
    """
    import numpy as np

    from rwkv_cli.engine.significance import mean_of

    names, lines = _names(models), []
    with _figure((7.5, 5.6), path) as figure:
        both = list(figure.subplots(2, sharex=True))
        for axes, key, label in zip(both, ("accuracy", "nll"), ("accuracy in %", "NLL in nats"), strict=True):
            scale = 100 if key == "accuracy" else 1
            for m, name in enumerate(names):
                means = [(part, mean_of([answer.figures[m][key] for answer in part.answers])) for part in parts]
                told = [(int(part.name.split()[0]), mean) for part, mean in means if part.name.endswith(" tokens")]
                x, y = [at for at, _ in told], scale * np.array([mean.mean for _, mean in told])
                error = scale * np.array([mean.stderr for _, mean in told])
                axes.fill_between(x, y - error, y + error, color=_COLOURS[m], alpha=0.2, linewidth=0)
                lines += axes.plot(x, y, color=_COLOURS[m], marker="o", markersize=3.5, label=_plain(name))
                for mean in [mean for part, mean in means if not part.name.endswith(" tokens")]:
                    axes.axhline(scale * mean.mean, color=_COLOURS[m], linestyle="--", linewidth=0.9)
            axes.set_ylabel(f"{label}, ± standard error")
            _by_tokens(axes)
        both[0].set_ylim(-4, 104)
        both[-1].set_xlabel("tokens between the word and the question")
        if len(names) > 1:
            legend = figure.legend(handles=lines[:2], loc="outside lower left", frameon=False)
            for text in legend.get_texts():
                text.set_parse_math(False)
        facts = [f"{max((len(part.answers) for part in parts), default=0)} texts a distance", "dashed: never told"]
        _title(both[0], "Recall of a word by distance", [*names[: len(names) == 1], *facts])


def _by_tokens(axes: Axes) -> None:
    """Give the picture an axis of token counts in powers of two, and a grid."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    axes.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", linewidth=0.7)


def plot_errors(path: Path, errors: Mapping[str, float], facts: Sequence[str]) -> None:
    """Draw relative errors of tensors into `path` as a heat map of kinds by layers. Tensors of no layer stand below.

    `errors` has at least one tensor. The title has the `facts`.
    """
    import numpy as np

    from rwkv_cli.models.naming import kind_of

    rows: dict[str, dict[int, float]] = {}
    # Layer 0 may lack kinds, so the last layer gives their order.
    for name in sorted(errors, key=_layer, reverse=True):
        rows.setdefault(kind_of(name), {})[_layer(name)] = 100 * errors[name]
    inside = {kind: row for kind, row in rows.items() if -1 not in row}
    apart = {kind: row for kind, row in rows.items() if -1 in row}
    layers = sorted({layer for row in inside.values() for layer in row})
    tables = [(part, columns) for part, columns in ((inside, layers), (apart, [-1])) if part]
    low, high = 100 * min(errors.values()), 100 * max(errors.values())
    size = min(max(7.0, 2.6 + 0.42 * len(layers)), 16.0), 1.5 + 0.27 * len(rows)
    with _figure(size, path) as figure:
        heights = [len(part) for part, _ in tables]
        parts = list(figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0])
        for axes, (part, columns) in zip(parts, tables, strict=True):
            table = np.array([[row.get(layer, math.nan) for layer in columns] for row in part.values()])
            mesh = axes.pcolormesh(table, cmap="YlGnBu", vmin=low, vmax=high, edgecolor="white")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_yticks(np.arange(len(part)) + 0.5, map(_plain, part), parse_math=False)
            axes.invert_yaxis()
            every = -(-len(columns) // 32)
            axes.set_xticks(np.arange(0, len(columns), every) + 0.5, columns[::every])
            axes.set_xlabel("layer")
            if part is apart:
                axes.xaxis.set_visible(False)
            if len(layers) <= 16:
                for (row, column), value in np.ndenumerate(table):
                    text = "–" if math.isnan(value) else f"{value:.2f}"
                    colour = "white" if value > 0.4 * low + 0.6 * high else "black"
                    axes.text(column + 0.5, row + 0.5, text, fontsize=7.5, ha="center", va="center", color=colour)
        bar = figure.colorbar(mesh, ax=parts, label="relative root-mean-square error in %", aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        _title(parts[0], "Quantization error by layer and tensor", facts)


def _layer(name: str) -> int:
    """Return a tensor's layer, -1 outside of any."""
    found = re.match(r"blocks\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1


@contextmanager
def _figure(size: tuple[float, float], path: Path) -> Iterator[Figure]:
    """Make a figure of `size` inches for the block to draw. It is written to `path` as a whole or not at all."""
    import matplotlib.figure
    import matplotlib.style

    from rwkv_cli.quant import replacing

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the font may lack a name's script
        figure = matplotlib.figure.Figure(size, layout="constrained")
        yield figure
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=200)
    with replacing(path) as file:
        file.write(drawn.getbuffer())
    note(f"Wrote {one_line(path)}")


def _title(axes: Axes, title: str, facts: Sequence[str]) -> None:
    """Set the title, with the facts below it."""
    text = _joined(facts)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=11 + 12 * len(text.splitlines()))
    axes.annotate(
        text, (0, 1), (0, 8), "axes fraction", "offset points", color=_GREY, parse_math=False, in_layout=False
    )


def _joined(facts: Sequence[str]) -> str:
    """Join facts to lines that fit the picture."""
    return textwrap.fill(" · ".join(map(_plain, facts)), 90, break_on_hyphens=False)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the paths' last parts, or whole paths where the last parts do not tell them apart."""
    short = len({path.name for path in paths}) == len(set(paths))
    return [path.name if short else str(path) for path in paths]


def _plain(text: str) -> str:
    """Make a text fit the picture and any XML. A path may be long, no Unicode, and hold control characters."""
    text = harmless(os.fsencode(text).decode(errors="replace"))
    return text if len(text) <= 48 else f"{text[:23]}…{text[-24:]}"
