"""A forward pass as data: a list of typed operations that every device can read and lower.

Nothing is computed while it is written. A device compiles it once (`Backend.compile`) and runs it any number of times.

- A `Value` is a float matrix that the program computes, a row a token. Matrix states are [key, value].
- An `Input` is an array that each run brings, such as token ids or a state; an `InputMatrix` is one that is a `Value`.
- How many rows there are is a `Count`, which is known only when the program runs. So one program serves every length.

The rows may be those of several sequences, one after the other. Only what looks back in time has to know: it is given
`starts` [B + 1], and sequence b has the rows starts[b] to starts[b + 1] − 1, which may be none. The states of all B
lie in one array and are advanced in place. On the CPU, a sequence gets the same bits whatever is beside it, and a token
the same bits as among many.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

Array = Any
"""An array where the device keeps it. Models never look inside."""

Activation = Literal["", "sigmoid", "silu", "tanh", "relu_squared", "decay", "soft_decay"]
"""The ends of a product. decay: exp(−exp(x)); soft_decay: RWKV-7's, exp(−e^{−1/2} σ(x))."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
"""Every activation. Kernels know each by its place."""

Dtype = Literal["F32", "F64", "I64", "BOOL"]


class Weight(Protocol):
    """A matrix where the device keeps it. Models never look inside."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]: outputs and inputs."""

    @property
    def nbytes(self) -> int: ...

    @property
    def skips_zeros(self) -> bool:
        """True if a product of one token reads nothing for an input that is zero."""


@dataclass(frozen=True, eq=False)
class Count:
    """A number of rows that a run decides, from 0 to `most`. With `most` = 1 a device may choose other kernels."""

    most: int


@dataclass(frozen=True, eq=False)
class Value:
    """A matrix [rows, columns] that a program computes."""

    rows: Count
    columns: int
    dtype: Dtype = "F32"


@dataclass(frozen=True, eq=False)
class InputMatrix(Value):
    """A matrix that every run brings. It is read like one that the program computes, but never changed."""

    name: str = field(kw_only=True)

    @property
    def shape(self) -> tuple[Count, int]:
        return self.rows, self.columns


@dataclass(frozen=True, eq=False)
class Input:
    """Another array that every run brings. A `Count` as first dimension takes the length of what is brought."""

    name: str
    shape: tuple[int | Count, ...]
    dtype: Dtype = "F32"


@dataclass(frozen=True, eq=False)
class LayerState:
    """The part of a state that belongs to one layer: `array[layer]`, where `array` is [L, B, …].

    kept[t, layer] gets the part after row t, but for the last row of a sequence; kept is [T, L, …], or None to keep
    nothing. Only devices that say so can keep (`contract.Backend.keeps_states`).
    """

    array: Input
    layer: int
    kept: Input | None = None


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns `first` to `first + columns − 1` of x."""

    x: Value
    first: int
    columns: int


@dataclass(frozen=True, eq=False)
class Lerp:
    """x + delta ∘ mix, computed where a product reads it. mix is a Value, or a vector [1, D] for all rows."""

    x: Value
    delta: Value
    mix: Value | Array


Factor = Value | Columns | Lerp
"""The forms of a matrix that a product reads."""


@dataclass(frozen=True, eq=False)
class Product:
    """activation(x · weightᵀ + bias): x [T, K], weight [N, K], bias [1, N] or None."""

    x: Factor
    weight: Weight
    activation: Activation = ""
    bias: Array | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """Weight and bias [D] of a layer norm, or of a norm by head; eps is added to the variance."""

    weight: Array
    bias: Array
    eps: float


Out = TypeVar("Out")


@dataclass(frozen=True, eq=False)
class Operation(Generic[Out]):
    """One entry of a program. `out` is what it computes; an operation without it changes one of its operands."""

    out: Out = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self._result())

    def _result(self) -> Out:
        """The value or values that this operation computes."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


@dataclass(frozen=True, eq=False)
class _InPlace(Operation[None]):
    """An operation that changes an operand and computes nothing new."""

    def _result(self) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Embed(Operation[Value]):
    """Rows `ids` of a table [V, D]."""

    ids: Input
    table: Weight

    def _result(self) -> Value:
        return Value(_rows(self.ids), self.table.shape[1])


@dataclass(frozen=True, eq=False)
class LayerNorm(Operation[Value]):
    """The layer norm of each row of x."""

    x: Value
    norm: Norm

    def _result(self) -> Value:
        return Value(self.x.rows, self.x.columns)


@dataclass(frozen=True, eq=False)
class RoundTo(_InPlace):
    """x becomes the nearest numbers of one of FLOAT_DTYPES, ties to even. F32 changes nothing."""

    x: Value
    dtype: str


@dataclass(frozen=True, eq=False)
class TakeRows(Operation[Value]):
    """The rows of x that `rows` [E] names."""

    x: Value
    rows: Input

    def _result(self) -> Value:
        return Value(_rows(self.rows), self.x.columns)


@dataclass(frozen=True, eq=False)
class TokenShift(Operation[Value]):
    """x[t − 1] − x[t]. Before a sequence's first row stands its row of `last` [B, D], which then gets its last row."""

    x: Value
    starts: Input
    last: LayerState

    def _result(self) -> Value:
        return Value(self.x.rows, self.x.columns)


@dataclass(frozen=True, eq=False)
class Linear(Operation[tuple[Value, ...]]):
    """Several products of the same rows, in any order. A factor that several of them read is the same object."""

    products: tuple[Product, ...]

    def _result(self) -> tuple[Value, ...]:
        return tuple(Value(rows_of(product.x), product.weight.shape[0]) for product in self.products)


@dataclass(frozen=True, eq=False)
class AddLinear(_InPlace):
    """x += y · weightᵀ."""

    x: Value
    y: Value
    weight: Weight


@dataclass(frozen=True, eq=False)
class AddGated(_InPlace):
    """x += y ∘ gate."""

    x: Value
    y: Value
    gate: Value


@dataclass(frozen=True, eq=False)
class Gate(_InPlace):
    """x ∘= gate."""

    x: Value
    gate: Value


@dataclass(frozen=True, eq=False)
class RowProducts(Operation[Value]):
    """x[t] · M[t]: x [T, K], and row t of `matrices` [T, K · N] is M[t] [K, N]."""

    x: Value
    matrices: Value

    def _result(self) -> Value:
        return Value(self.x.rows, self.matrices.columns // self.x.columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Recurrence(Operation[Value]):
    """The values that advance the state of a recurrence row by row. All values are [T, D]."""

    receptance: Value
    key: Value
    value: Value
    starts: Input
    state: LayerState

    def _result(self) -> Value:
        return Value(self.receptance.rows, self.receptance.columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class Wkv4(_Recurrence):
    """r ∘ RWKV-4's weighted average (arXiv 2305.13048). decay, bonus [D]; state [B, 3, D]."""

    decay: Array
    bonus: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Wkv6(_Recurrence):
    """The recurrence of RWKV-5 and 6 (arXiv 2404.05892), normed by head, ∘ gate if there is one.

    decay is a Value, or a vector [1, D] for all rows; bonus [H, N]; state [B, H, N, N].
    """

    decay: Value | Array
    bonus: Array
    norm: Norm
    gate: Value | None


@dataclass(frozen=True, eq=False, kw_only=True)
class ValueResidual:
    """RWKV-7 mixes the first layer's value into a later one: v + (first − v) ∘ gate."""

    first: Value
    gate: Value


@dataclass(frozen=True, eq=False, kw_only=True)
class Wkv7(_Recurrence):
    """RWKV-7's time mixing between its matrices (arXiv 2503.14456, section 4).

    All values are [T, D]; decay is w and rate is a. key_scale (k_k), key_rate (k_a) [D]; bonus (r_k) [H, N];
    state S [B, H, N, N]. By head, with v after its residual:

        κ = k∘k_k / ‖k∘k_k‖ · k ← k∘(1 + (a − 1)∘k_a) · S ← diag(w)·S − (κ∘a)ᵀ·(κ·S) + kᵀv
        out = (norm(r·S) + (Σ r∘k∘r_k) · v) ∘ gate
    """

    decay: Value
    rate: Value
    gate: Value
    residual: ValueResidual | None
    key_scale: Array
    key_rate: Array
    bonus: Array
    norm: Norm


@dataclass(frozen=True, eq=False)
class CrossEntropy(Operation[Value]):
    """−log p(target) of each row, in nats: float64 [T, 1] of logits [T, V] and targets int64 [T]."""

    logits: Value
    targets: Input

    def _result(self) -> Value:
        return Value(_rows(self.targets), 1, "F64")


@dataclass(frozen=True, eq=False)
class Divergence(Operation[tuple[Value, Value]]):
    """KL(p ‖ q) of each row of logits [T, V], in nats, float64 [T, 1]; and whether their maxima agree, bool [T, 1]."""

    p: Value
    q: Value

    def _result(self) -> tuple[Value, Value]:
        return Value(self.p.rows, 1, "F64"), Value(self.p.rows, 1, "BOOL")


class Program:
    """Operations in order. Each sees what those before it have computed and changed."""

    def __init__(self, *inputs: Input | InputMatrix) -> None:
        self.inputs = inputs
        self.operations: list[Operation[Any]] = []
        self.outputs: list[Value] = []
        """The values that can be read after a run."""

    def add(self, operation: Operation[Out]) -> Out:
        """Append an operation; what it computes."""
        self.operations.append(operation)
        return operation.out

    def linear(self, *products: Product) -> tuple[Value, ...]:
        """Append several products of the same rows; what each computes."""
        return self.add(Linear(products))

    def keep(self, value: Value) -> Value:
        """Have `value` stay readable after a run. Raises TypeError for an input, which the caller has."""
        if isinstance(value, InputMatrix):
            raise TypeError(f"{value.name} is an input, and cannot be an output too")
        self.outputs.append(value)
        return value

    def products(self) -> Iterator[Product]:
        """Every matrix product, for whoever counts what a pass costs."""
        for operation in self.operations:
            if isinstance(operation, Linear):
                yield from operation.products
            elif isinstance(operation, AddLinear):
                yield Product(operation.y, operation.weight)


def rows_of(x: Factor) -> Count:
    """How many rows a factor has."""
    return x.rows if isinstance(x, Value) else x.x.rows


def columns_of(x: Factor) -> int:
    """How many columns a factor has."""
    return x.x.columns if isinstance(x, Lerp) else x.columns


def _rows(given: Input) -> Count:
    count = given.shape[0]
    if not isinstance(count, Count):
        raise TypeError(f"input {given.name} must have a Count of rows")
    return count
