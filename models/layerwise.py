"""A text's way through a model one layer at a time, with what every matrix multiplies on that way."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rwkv_cli.kernels.program import Columns, Count, Factor, Input, InputMatrix, Lerp, Product, TakeRows, Value
from rwkv_cli.models.base import Floats32, Ids, Model, chunks
from rwkv_cli.models.passes import Pass

Take = Callable[[Sequence[str], Floats32], object]
"""A function of some matrices' names in the converted file, and rows [R, K] that each of these multiplies."""


class Layerwise:
    """The rows of a text between two layers of a model. Nothing of the other layers is in memory."""

    def __init__(self, model: Model, ids: Ids) -> None:
        self.model, self.ids = model, model.checked(ids)
        self._count = Count(model.backend.chunk)
        self.done = 0
        """The number of layers that the rows have gone through."""
        self._x = np.empty((len(self.ids), model.config.width), np.float32)
        self._carried: dict[str, Floats32] = {}
        """Values that earlier layers handed on, [T, columns]."""
        written = self._begin()
        out = written.ops.keep(written.embed())
        self._run(written, lambda part, read: self._set(part, read(out)))

    def advance(self, take: Take) -> None:
        """Bring the rows through the next layer, and give `take` what its matrices multiply, chunk by chunk."""
        model, i = self.model, self.done
        x_in, rows = InputMatrix(self._count, model.config.width, name="x"), Input("rows", (self._count,), "I64")
        carried = {name: InputMatrix(self._count, a.shape[1], name=name) for name, a in self._carried.items()}
        written = self._begin(x_in, rows, *carried.values())
        written.carry.update(carried)
        ops, weights = written.ops, model.layers[i]
        x = ops.add(TakeRows(x_in, rows))  # a copy, since no input is changed
        written.layer(x, weights, 0)
        names = {id(weight): f"blocks.{i}.{name}" for name, weight in weights.items()}
        reads = _reads(ops.products(), names)
        fresh = {name: value for name, value in written.carry.items() if name not in carried}
        for value in {*_values(factor for factor, _ in reads), *fresh.values(), x} - set(carried.values()):
            ops.keep(value)
        made = {name: np.empty((len(self.ids), value.columns), np.float32) for name, value in fresh.items()}

        def each(part: slice, read: Callable[[Value], Floats32]) -> None:
            for factor, matrices in reads:
                take(matrices, _rows_of(factor, read))
            for name, value in fresh.items():
                made[name][part] = read(value)
            self._set(part, read(x))

        self._run(written, each)
        self._carried |= made
        self.done += 1

    def outputs(self, take: Take) -> None:
        """Give `take` what the head multiplies, once the rows are through all layers."""
        x_in = InputMatrix(self._count, self.model.config.width, name="x")
        written = self._begin(x_in)
        out = written.ops.keep(written.norm_outputs(x_in))
        self._run(written, lambda _, read: take(["head.weight"], read(out)))

    def _begin(self, *more: Input | InputMatrix) -> Pass:
        return Pass.begin(self.model.config, self.model.top, self._count, (1, 1), more)

    def _set(self, part: slice, rows: Floats32) -> None:
        self._x[part] = rows

    def _run(self, written: Pass, each: Callable[[slice, Callable[[Value], Floats32]], object]) -> None:
        """Run a program over the text. `each` gets every chunk, and a function that reads the values of it."""
        model = self.model
        executable = model.backend.compile(written.ops, model.threads)
        i = min(self.done, model.config.layers - 1)
        state = {name: np.asarray(a)[i : i + 1, None].copy() for name, a in model.new_state().arrays().items()}
        for part in chunks(len(self.ids), model.backend.chunk):
            ids = self.ids[part]
            brought = {name: array[part] for name, array in self._carried.items()}
            fixed = {"ids": ids, "starts": np.array([0, len(ids)]), "x": self._x[part], "rows": np.arange(len(ids))}
            executable.run({**fixed, **state, **brought})

            def read(value: Value, brought: dict[str, Floats32] = brought) -> Floats32:
                return brought[value.name] if isinstance(value, InputMatrix) else executable.read(value)

            each(part, read)


def _reads(products: Iterator[Product], names: dict[int, str]) -> list[tuple[Factor, list[str]]]:
    """Each factor, and the names of the matrices that multiply it."""
    found: dict[int, tuple[Factor, list[str]]] = {}
    for product in products:
        found.setdefault(id(product.x), (product.x, []))[1].append(names[id(product.weight)])
    return list(found.values())


def _values(factors: Iterator[Factor]) -> Iterator[Value]:
    """Every value that these factors are made of."""
    for factor in factors:
        if isinstance(factor, Value):
            yield factor
        else:
            yield factor.x
        if isinstance(factor, Lerp):
            yield factor.delta
            if isinstance(factor.mix, Value):
                yield factor.mix


def _rows_of(factor: Factor, read: Callable[[Value], Floats32]) -> Floats32:
    """The rows that a product reads."""
    if isinstance(factor, Value):
        return read(factor)
    if isinstance(factor, Columns):
        return read(factor.x)[:, factor.first : factor.first + factor.columns]
    mix = read(factor.mix) if isinstance(factor.mix, Value) else np.asarray(factor.mix)
    return read(factor.x) + read(factor.delta) * mix
