"""PTX text as instructions in straight pieces of code."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.errors import UnknownInstructionError

Operand = str | tuple[str, ...]
"""A register, number or name as it is written, or several in braces."""


class Instruction(NamedTuple):
    """One instruction. It is done where the register `guard` is `wanted`, everywhere if there is none."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: str
    wanted: bool
    line: int

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        shown = (f"{{{', '.join(each)}}}" if isinstance(each, tuple) else each for each in self.operands)
        return f"`{self.opcode} {', '.join(shown)}` in line {self.line} of its PTX"


@dataclass
class Piece:
    """Instructions that are done one after the other by the same threads, and where these go then.

    A piece begins at a label, before the first instruction that a warp does together, and behind whatever threads wait
    at or part at.
    """

    instructions: list[Instruction] = field(default_factory=list)
    together: bool = False
    """True if whole warps must be here."""
    branch: Instruction | None = None
    """The jump or the end behind the others."""
    barrier: Instruction | None = None
    """The barrier of the block behind the others."""


@dataclass
class Code:
    """A kernel: its parameters in order, the bytes and places of its shared arrays, its registers' types."""

    parameters: list[str]
    shared: dict[str, tuple[int, int]]
    registers: dict[str, str]
    pieces: list[Piece]
    labels: dict[str, int]
    """The piece that each label stands before."""


_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+(\w+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_TOKEN = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|((?:[^;{}]|\{[^}]*\})+);)")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_GAP = 16
"""Bytes between shared arrays, which nobody may touch."""
OF_WARP = ("shfl", "redux", "mma", "ldmatrix", "vote", "match")
"""Instructions that a warp does together."""


def parse(text: str) -> Code:
    """The one kernel of a PTX text."""
    text = re.sub(r"//[^\n]*", "", text)
    shared, end = {}, _GAP
    for align, name, size in _SHARED.findall(text):
        start = -(-end // int(align or 1)) * int(align or 1)
        shared[name] = start, int(size)
        end = start + int(size) + _GAP
    head, entry = text.split(".entry", 1)
    listed, body = entry.split(")", 1)
    code = Code(re.findall(r"\.param\s+\.\w+\s+(\w+)", listed), shared, {}, [Piece()], {})
    start = body.index("{") + 1
    line = (head + listed + body[:start]).count("\n") + 1
    for token in _TOKEN.finditer(body, start):
        label, _, statement = token.groups()
        if label:
            if code.pieces[-1].instructions:
                code.pieces.append(Piece())
            code.labels[label] = len(code.pieces) - 1
        elif statement and not statement.startswith("."):
            _add(code, _instruction(statement, line + body.count("\n", start, token.start(3))))
        elif statement and (declared := _REGISTERS.match(statement)):
            code.registers |= dict.fromkeys(_names(declared[2]), declared[1])
    return code


def _names(declared: str) -> list[str]:
    """The registers of a declaration: %r<3> are %r0, %r1 and %r2."""
    if several := re.fullmatch(r"(\S+)<(\d+)>\s*", declared):
        return [f"{several[1]}{i}" for i in range(int(several[2]))]
    return [name.strip() for name in declared.split(",")]


def _instruction(statement: str, line: int) -> Instruction:
    found = _STATEMENT.fullmatch(statement.strip())
    if found is None:
        raise UnknownInstructionError(statement)
    turned, guard, opcode, rest = found.groups()
    operands = (
        tuple(part.strip() for part in each[1:-1].split(",")) if each.startswith("{") else each.strip()
        for each in _OPERAND.findall(rest)
    )
    return Instruction(opcode, tuple(operands), guard or "", not turned, line)


def _add(code: Code, instruction: Instruction) -> None:
    """Append an instruction to the last piece, or to a new one."""
    name, *more = instruction.parts
    of_warp = name in OF_WARP or instruction.opcode.startswith("bar.warp")
    last = code.pieces[-1]
    if of_warp and not last.together and last.instructions:
        code.pieces.append(last := Piece())
    last.together |= of_warp
    if name in ("bra", "ret", "exit"):
        last.branch = instruction
        code.pieces.append(Piece())
    elif name in ("bar", "barrier") and not of_warp:
        if "sync" not in more or instruction.operands != ("0",) or instruction.guard:
            raise UnknownInstructionError(str(instruction))
        last.barrier = instruction
        code.pieces.append(Piece())
    else:
        last.instructions.append(instruction)
