"""Makes Python of each piece of a kernel: a line or two an instruction, over registers that hold a number a thread.

A piece becomes two functions. One is for when all threads that are left execute it, and one for some of them.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ptx import effects, warps
from ptx.arithmetic import DTYPES, meaning
from ptx.effects import fit
from ptx.errors import UnknownInstructionError
from ptx.launch import Reference, reference
from ptx.parse import Code, Instruction, Operand

Step = Callable[..., None]
"""A piece as a function of a frame, its registers, its constants and the active threads."""


class Steps(NamedTuple):
    """A piece for all threads that are left, and for some of them."""

    whole: Step
    part: Step


class Translated:
    """A kernel as Python."""

    def __init__(self, code: Code) -> None:
        self._code = code
        self.index = {name: i for i, name in enumerate(code.registers)}
        self._dtypes = [np.dtype(DTYPES[kind]) for kind in code.registers.values()]
        self._constants: dict[tuple[Any, str], int] = {}
        self._known: dict[Any, str] = {}
        self._references: list[Reference] = []
        lines = [line for i, piece in enumerate(code.pieces) for line in self._functions(i, piece.instructions)]
        names = {name: thing for thing, name in self._known.items()} | {"where": np.where, "fit": fit}
        exec("\n".join(lines), names)
        self.pieces = [Steps(names[f"whole{i}"], names[f"part{i}"]) for i in range(len(code.pieces))]

    def registers(self, n: int) -> list[Any]:
        """The registers of n threads. All their bits are set until something is written."""
        unset = {kind: np.full(n * kind.itemsize, 0xFF, np.uint8).view(kind) for kind in set(self._dtypes)}
        return [unset[kind] for kind in self._dtypes]

    def constants(self, n: int) -> list[Any]:
        return [np.full(n, value, DTYPES[kind]) for value, kind in self._constants]

    def grain(self, space: str) -> int:
        """The bytes of the smallest access to a space that cannot be told apart."""
        return min([8, *(ref.grain for ref in self._references if ref.touches(space))])

    def _functions(self, number: int, instructions: list[Instruction]) -> Iterator[str]:
        for name, partly in (("whole", False), ("part", True)):
            yield f"def {name}{number}(X, R, C, A):"
            yield "    m = A.mask"
            for instruction in instructions:
                yield from (f"    {line}" for line in self._lines(instruction, partly))

    def _lines(self, instruction: Instruction, partly: bool) -> list[str]:
        """The statements of one instruction."""
        try:
            targets, expression = self._expression(instruction)
        except (KeyError, ValueError, IndexError) as error:
            raise UnknownInstructionError(str(instruction)) from error
        if not instruction.guard:
            return self._assigned(targets, expression, "m" if partly else "")
        guard = f"{'' if instruction.wanted else '~'}R[{self.index[instruction.guard]}]"
        lines = self._assigned(targets, expression.replace("A, ", "B, ", 1), "B.mask")
        return [f"B = A.only({guard})", "if B.lanes.size:", *(f"    {line}" for line in lines)]

    def _assigned(self, targets: list[str], expression: str, mask: str) -> list[str]:
        """Statements that put the values of an expression into registers where a mask says so."""
        if not targets:
            return [expression]
        lines = [f"{', '.join(f'v{i}' for i in range(len(targets)))} = {expression}"]
        for i, target in enumerate(targets):
            if target == "_":
                continue
            slot = self.index[target]
            value = f"fit(v{i}, {self._name(self._dtypes[slot].type)})"
            lines.append(f"R[{slot}] = " + (f"where({mask}, {value}, R[{slot}])" if mask else value))
        return lines

    def _name(self, thing: Any) -> str:
        """A name for something that the made code uses."""
        return self._known.setdefault(thing, f"f{len(self._known)}")

    def _call(self, function: Callable[..., Any], *arguments: str) -> str:
        return f"{self._name(function)}({', '.join(arguments)})"

    def _effect(self, function: Callable[..., Any], *arguments: str) -> str:
        """A call of a function of `effects` that gets the frame and the active threads."""
        return self._call(function, "X", "A", *arguments)

    def _expression(self, instruction: Instruction) -> tuple[list[str], str]:
        """The registers that an instruction writes, and an expression of what: a value, or a list for several.

        An instruction that writes none is an expression that is done.
        """
        name, *more = instruction.parts
        first, *rest = instruction.operands or ("",)
        targets = list(first) if isinstance(first, tuple) else first.split("|")
        match name, more:
            case "mov", [kind]:
                return self._move(first, rest[0], kind)
            case "ld", ["param", _]:
                return targets, f"X.parameters[{str(rest[0])[1:-1]!r}]"
            case "ld", _:
                made = self._effect(effects.load, self._reference(instruction), self._address(rest[0]))
                return targets, made + "[0]" * (len(targets) == 1)
            case "st", _:
                stored = rest[0] if isinstance(rest[0], tuple) else rest
                listed = ", ".join(self._value(each, more[-1]) for each in stored)
                where = self._reference(instruction), self._address(first)
                return [], self._effect(effects.store, *where, f"[{listed}]")
            case "cp", ["async", "ca" | "cg", *_] if len(rest) == 2:
                where = self._address(first), self._address(rest[0])
                return [], self._effect(effects.copy, self._reference(instruction), *where)
            case "cp", ["async", "commit_group" | "wait_group" | "wait_all" as what]:
                return [], self._effect(getattr(effects, what), str(first) or "None")
            case ("griddepcontrol", ["wait" | "launch_dependents" as what]) | ("bar", ["warp" as what, "sync"]):
                return [], self._effect(getattr(effects, what), self._value(first, "b32") if first else "None")
            case "cvta", [*direction, "u64" | "s64"]:
                return targets, self._call(
                    getattr(effects, "_".join(["cvta", *direction])), self._value(rest[0], "b64")
                )
            case "shfl", ["sync", mode, "b32"]:
                made = self._effect(effects.shuffle, repr(mode), *(self._value(each, "b32") for each in rest))
                return targets, made + "[0]" * (len(targets) == 1)
            case "redux", _:
                operands = (self._value(each, "b32") for each in rest)
                return targets, self._effect(effects.redux, repr(instruction.opcode), *operands)
            case "mma", _:
                kinds = ["b32", "b32", "f32" if ".f32." in instruction.opcode else "b32"]
                matrices = ([self._value(x, kind) for x in each] for each, kind in zip(rest, kinds, strict=True))
                listed = (f"[{', '.join(each)}]" for each in matrices)
                return targets, self._call(warps.product(instruction.opcode), *listed)
            case "ldmatrix", _:
                where = self._reference(instruction), self._address(rest[0])
                return targets, self._effect(effects.matrices, *where, str(len(targets)))
            case (("prefetch" | "membar" | "fence"), _):
                return [], "pass"
        found = meaning(instruction.opcode)
        operands = [self._value(each, kind) for each, kind in zip(rest, found.takes, strict=True)]
        return targets, self._call(found.function, *operands)

    def _move(self, target: Operand, source: Operand, kind: str) -> tuple[list[str], str]:
        """A mov: one value, or several that lie side by side in one register."""
        if isinstance(target, tuple):
            return list(target), self._call(effects.apart, self._value(source, kind), str(len(target)))
        if isinstance(source, tuple):
            part = f"b{int(kind[1:]) // len(source)}"
            return [target], self._call(effects.joined, *(self._value(each, part) for each in source))
        return [target], self._value(source, kind)

    def _value(self, operand: Operand, kind: str) -> str:
        """An operand as an expression: an array of the type that is wanted."""
        assert isinstance(operand, str)
        if operand in self.index:
            slot = self.index[operand]
            same = self._dtypes[slot] == np.dtype(DTYPES[kind])
            return f"R[{slot}]" if same else f"fit(R[{slot}], {self._name(DTYPES[kind])})"
        if operand.startswith("%"):
            return f"X.special[{operand!r}]"
        value = self._code.shared[operand][0] if operand in self._code.shared else number(operand, kind)
        return f"C[{self._constants.setdefault((value, kind), len(self._constants))}]"

    def _address(self, operand: Operand) -> str:
        """An address in brackets as two arguments: an array and what is added to it."""
        base, _, more = str(operand)[1:-1].partition("+")
        kind = "b32" if self._code.registers.get(base) == "b32" else "b64"
        return f"{self._value(base, kind)}, {int(more or 0)}"

    def _reference(self, instruction: Instruction) -> str:
        made = reference(instruction)
        if made not in self._known:
            self._references.append(made)
        return self._name(made)


def number(text: str, kind: str) -> Any:
    """A number in PTX, as its type has it."""
    if text[:2] in ("0f", "0F"):
        return struct.unpack("<f", struct.pack("<I", int(text[2:], 16)))[0]
    if text[:2] in ("0d", "0D"):
        return struct.unpack("<d", struct.pack("<Q", int(text[2:], 16)))[0]
    value, dtype = int(text.rstrip("U"), 0), np.dtype(DTYPES[kind])
    if dtype.kind == "b":
        return value != 0
    if dtype.kind == "f":
        raise ValueError(text)
    wrapped = value & (1 << 8 * dtype.itemsize) - 1
    return int(np.array(wrapped, f"u{dtype.itemsize}").view(dtype)[()])
