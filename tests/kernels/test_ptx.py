"""The interpreter of PTX: it computes what the PTX ISA says, and finds each mistake that is planted here."""

import contextlib
import re
from typing import Any

import numpy as np
import pytest
from ptx.errors import KernelError, UnknownInstructionError
from ptx.launch import Launch, Run
from ptx.machine import execute
from ptx.parse import parse
from ptx.spaces import WRITTEN, GlobalMemory
from ptx.translate import Translated
from ptx.warps import product

MEMORY = GlobalMemory()
INTEGERS = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)

HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .shared .align 16 .b8 memory[512];
.visible .shared .align 16 .b8 beyond[512];
.visible .entry tested(.param .u64 in, .param .u64 out)
{
    .reg .pred %p<4>;
    .reg .b16 %h<9>;
    .reg .f32 %f<24>;
    .reg .b32 %r<24>;
    .reg .b64 %rd<16>;
    ld.param.u64 %rd0, [in];
    ld.param.u64 %rd1, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    mul.wide.s32 %rd2, %r3, 4;
    add.s64 %rd3, %rd0, %rd2;            // this thread's place of the input
    add.s64 %rd4, %rd1, %rd2;            // and of the output
    shl.b32 %r4, %r0, 2;
    cvt.s64.s32 %rd5, %r4;               // and in shared memory
    xor.b32 %r5, %r4, 4;
    cvt.s64.s32 %rd6, %r5;               // a neighbour's there
    mov.u64 %rd7, memory;
    add.s64 %rd8, %rd7, %rd5;
    add.s64 %rd9, %rd7, %rd6;
    xor.b64 %rd10, %rd5, 128;
    add.s64 %rd10, %rd7, %rd10;          // and one's of another warp
    setp.lt.s32 %p1, %r0, 16;            // the first half of a warp
"""
"""What each kernel here begins with."""
LOAD, STORE, END = "ld.global.f32 %f1, [%rd3];", "st.global.f32 [%rd4], %f1;", "ret; }"


class Gpu:
    """Memory for 64 numbers of an input and 64 of an output, and kernels that are made of lines of PTX."""

    def __init__(self, values: Any = INTEGERS) -> None:
        self.source, self.target = (MEMORY.allocate(256) for _ in range(2))
        MEMORY.mark(self.source, 256, WRITTEN)
        self.bytes(self.source)[:] = values.view(np.uint8)

    @staticmethod
    def bytes(address: int) -> Any:
        at = address - MEMORY.base
        return MEMORY.data[at : at + 256]

    def launch(self, *lines: str, blocks: int = 1, threads: int = 64, run: Run | None = None) -> None:
        code = parse(HEAD + "\n".join([*lines, END]))
        shape = (blocks, 1, 1), (threads, 1, 1)
        execute(Launch("tested", code, MEMORY, *shape, (self.source, self.target), run), Translated(code))

    def result(self, dtype: Any = np.int32) -> Any:
        return self.bytes(self.target).view(dtype).copy()


def computed(*lines: str, values: Any = INTEGERS, threads: int = 64) -> Any:
    """%r6 as some instructions leave it, which begins as the thread's number of the input."""
    gpu = Gpu(values)
    gpu.launch("ld.global.u32 %r6, [%rd3];", *lines, "st.global.u32 [%rd4], %r6;", threads=threads)
    return gpu.result()[:threads]


BARRIER, SHUFFLE = "bar.sync 0;", "shfl.sync.bfly.b32 %r6, %r0, 1, 31, -1;"
PUT, GET, ONE = "st.shared.f32 [%rd8], %f1;", "ld.shared.f32 %f1, [%rd9];", "mov.f32 %f1, 0f3F800000;"
SHARE = f"{LOAD} {PUT} {BARRIER} {GET} {STORE}"
AFAR = SHARE.replace("%rd9", "%rd10")
TAKE_TURNS = f"{SHARE} {BARRIER} {PUT}"
GENERIC = f"{LOAD} {PUT} {BARRIER} cvta.shared.u64 %rd11, %rd9; @!%p1 mov.u64 %rd11, %rd3; ld.f32 %f1, [%rd11]; {STORE}"
BEGIN, COMMIT = "cvt.u32.u64 %r7, %rd8; cp.async.ca.shared.global [%r7], [%rd3], 4;", "cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"
COPY = f"{BEGIN} {COMMIT} {WAIT} {BARRIER} {GET} {STORE}"
HALF = "@%p1 bra $beyond;"
OVERWRITE = f"{ONE} st.global.f32 [%rd3], %f1;"
TWO_SHUFFLES = f"{HALF} {SHUFFLE} bra $end; $beyond: {SHUFFLE} $end:"
AGAIN = "xor.b64 %rd2, %rd2, 4; add.s64 %rd3, %rd0, %rd2; st.global.f32 [%rd3], %f1;"


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (SHARE, SHARE.replace(BARRIER, ""), "racecheck: tested: `ld.shared.f32 .* an access by thread 1 "),
        (SHARE.replace(BARRIER, "bar.warp.sync -1;"), SHARE.replace(BARRIER, "bar.warp.sync 1;"), "some of a warp's"),
        (AFAR, AFAR.replace(BARRIER, "bar.warp.sync -1;"), "racecheck"),
        (SHARE, SHARE.replace("[%rd8]", "[%rd7]"), "racecheck: tested: `st.shared.f32"),
        (GENERIC, GENERIC.replace(BARRIER, ""), "racecheck: tested: `ld.f32 "),
        (TAKE_TURNS, f"{SHARE} {PUT}", "racecheck: tested: `st.shared.f32 .* an access by thread"),
        (SHARE, SHARE.replace("[%rd9]", "[%rd9+256]"), "initcheck: tested: `ld.shared.f32 .* shared address 276"),
        (SHARE, SHARE.replace("[%rd9]", "[%rd9+512]"), "memcheck: tested: `ld.shared.f32 .* shared address 532"),
        (SHARE, SHARE.replace("[%rd9]", "[%rd9+2]"), "memcheck: .* not at a multiple of its size"),
        (LOAD + STORE, LOAD.replace("]", "+4]") + STORE, "memcheck: .* byte 256 of 256 allocated, by thread 63 "),
        (LOAD + STORE, LOAD + STORE.replace("]", "+-4]"), "memcheck: tested: `st.global.f32"),
        (LOAD + STORE, "ld.global.f32 %f1, [%rd4];", "initcheck: .* byte 0 of 256 allocated"),
        (LOAD + STORE, LOAD + "st.global.f32 [%rd1], %f1;", "racecheck: .* thread 0 of block 0 .* thread 1 of block 0"),
        (f"{LOAD} {BARRIER} {AGAIN}", f"{LOAD} {AGAIN}", "racecheck: .* meet at"),
        (SHUFFLE, f"{HALF} {SHUFFLE} $beyond:", "synccheck: tested: `shfl.sync.bfly.b32 .* by thread 16 of block 0"),
        (f"{SHUFFLE} {HALF} {ONE} $beyond: {SHUFFLE}", TWO_SHUFFLES, "others are"),
        (f"{BARRIER} {BARRIER}", f"{HALF} {BARRIER} $beyond: {BARRIER}", "synccheck: tested: `bar.sync 0"),
        (COPY, COPY.replace(WAIT, ""), "cp.async: tested: `ld.shared.f32 .* under way"),
        (COPY, COPY.replace(WAIT, "cp.async.wait_group 1;"), "cp.async: .* under way"),
        (COPY, COPY.replace(BARRIER, ""), "racecheck: tested: `ld.shared.f32"),
        (COPY, COPY.replace(COMMIT, COMMIT + OVERWRITE), "cp.async: .* its source was changed"),
        (COPY, f"{BEGIN} {COMMIT}", "cp.async: .* nobody waited"),
        (COPY, COPY.replace(WAIT, f"{PUT} {WAIT}"), "cp.async: tested: `st.shared.f32 .* under way"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(right: str, wrong: str, message: str) -> None:
    Gpu().launch(right)
    with pytest.raises((KernelError, UnknownInstructionError), match=message):
        Gpu().launch(wrong)


def test_blocks_that_meet_in_a_word_are_found() -> None:
    """Each block's threads have the same places: one writes them, or reads what the other has written."""
    for lines in ("st.global.f32 [%rd1], %f1;", "@%p2 st.global.f32 [%rd3], %f1; @!%p2 ld.global.f32 %f2, [%rd0];"):
        lines = f"setp.eq.s32 %p2, %r1, 0; {LOAD} {lines}"
        Gpu().launch(lines, threads=1)
        with pytest.raises(
            KernelError, match=r"racecheck: .* by thread 0 of block 0 and .* by thread 0 of block 1 meet at"
        ):
            Gpu().launch(lines, threads=1, blocks=2)


def test_a_launch_that_does_not_wait_for_the_one_before_is_found() -> None:
    """Before the wait, a launch may read what the host brought, and write nothing. Some thread of each waits."""
    wait, first, second = "griddepcontrol.wait;", Gpu(), Gpu()
    second.source = first.target
    for lines, message in (
        (f"{wait} {LOAD} {STORE}", None),
        (
            f"{LOAD} {wait} {STORE}",
            r"griddepcontrol: tested: `ld.global.f32 .* a read before the wait of what another launch",
        ),
        (f"{wait} {LOAD} @%p1 {STORE}", None),
        (f"{HALF} {wait} $beyond: {STORE}", r"griddepcontrol: tested: `st.global.f32 .* a write before the wait"),
        (LOAD, r"griddepcontrol: tested: no thread waits"),
    ):
        run = Run(MEMORY, [], [])
        first.launch(LOAD, wait, STORE, run=run)
        with pytest.raises(KernelError, match=message) if message else contextlib.nullcontext():
            second.launch(lines, run=run)
            run.end()


def test_what_is_freed_is_gone() -> None:
    gpu = Gpu()
    MEMORY.free(gpu.source)
    with pytest.raises(KernelError, match=r"memcheck: tested: `ld.global.f32"):
        gpu.launch(LOAD)


def test_an_instruction_that_is_not_known_is_named() -> None:
    for line in ("red.global.add.f32 [%rd3], %f1;", "add.rz.f32 %f1, %f1, %f1;", "ld.local.f32 %f1, [%rd3];"):
        with pytest.raises(UnknownInstructionError, match=re.escape(line.split()[0])):
            Gpu().launch(line)


def test_a_register_begins_with_all_bits_set() -> None:
    gpu = Gpu()
    gpu.launch("st.global.f32 [%rd4], %f9;")
    assert np.isnan(gpu.result(np.float32)).all()


def test_integers() -> None:
    x = INTEGERS.astype(np.int64)
    wrapped = {
        "shl.b32 %r6, %r6, 33;": np.zeros(64),
        "shr.s32 %r6, %r6, 40;": np.where(x < 0, -1, 0),
        "div.s32 %r6, %r6, -7;": np.trunc(x / -7),
        "rem.s32 %r6, %r6, 10;": np.fmod(x, 10),
        "bfi.b32 %r6, 5, %r6, 4, 3;": x & ~0x70 | 0x50,
        "cvt.s32.s8 %r6, %r6;": INTEGERS.view(np.int8)[::4],
        "mul.hi.s32 %r6, %r6, 1000;": (x * 1000) >> 32,
        "mad.lo.s32 %r6, %r6, 3, 5;": (x * 3 + 5).astype(np.int32),
        "prmt.b32 %r6, %r6, 0x03020100, 0x4B20;": [
            int.from_bytes(bytes([b[0], b[2], 255 * (b[3] >> 7), 0]), "little")
            for b in INTEGERS.view(np.uint8).reshape(64, 4)
        ],
        "dp4a.s32.s32 %r6, %r6, 0x01FF027F, 9;": INTEGERS.view(np.int8).reshape(64, 4).astype(int) @ [127, 2, -1, 1]
        + 9,
        "setp.lt.u32 %p2, %r6, 0x80000000; selp.b32 %r6, 1, 2, %p2;": np.where(x >= 0, 1, 2),
    }
    for line, want in wrapped.items():
        np.testing.assert_array_equal(computed(line), np.array(want).astype(np.int64).astype(np.int32), line)


def test_floats() -> None:
    """Each is rounded once; conversions to integers end at their range; max passes over NaN."""
    x = np.resize(np.float32([1.5, -2.5, 0.1, 3e38, np.nan, 1e-40, 65520, -7e9]), 64)
    double = x.astype(np.float64)
    with np.errstate(over="ignore"):
        through_half, power = x.astype(np.float16).astype(np.float32), np.exp2(x)
        square = (double * double - 1).astype(np.float32)
    wanted = {
        "cvt.rni.s32.f32 %r6, %f1;": np.resize(np.array([2, -2, 0, 2**31 - 1, 0, 0, 65520, -(2**31)]), 64),
        "fma.rn.f32 %f1, %f1, %f1, 0fBF800000; mov.b32 %r6, %f1;": square,
        "cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f1, %h1; mov.b32 %r6, %f1;": through_half,
        "cvt.sat.f32.f32 %f1, %f1; mov.b32 %r6, %f1;": np.resize(np.float32([1, 0, 0.1, 1, 0, 1e-40, 1, 0]), 64),
        "max.f32 %f1, %f1, 0f3F800000; mov.b32 %r6, %f1;": np.fmax(x, np.float32(1)),
        "ex2.approx.ftz.f32 %f1, %f1; mov.b32 %r6, %f1;": np.where(x == np.float32(1e-40), 1, power),
        "setp.neu.f32 %p2, %f1, %f1; selp.b32 %r6, 1, 0, %p2;": np.isnan(x),
        "setp.gt.f32 %p2, %f1, 0f00000000; selp.b32 %r6, 1, 0, %p2;": x > 0,
    }
    for line, want in wanted.items():
        want = want.view(np.int32) if want.dtype == np.float32 else want
        np.testing.assert_array_equal(computed("mov.b32 %f1, %r6;", line, values=x), want, line)


def test_fma_toward_minus_infinity() -> None:
    x = np.float32(np.random.default_rng(1).standard_normal(64))
    got = computed("mov.b32 %f1, %r6;", "fma.rm.f32 %f1, %f1, %f1, 0fC0400000; mov.b32 %r6, %f1;", values=x)
    exact = x.astype(np.float64) ** 2 - 3
    assert (got.view(np.float32) <= exact).all()
    assert (np.nextafter(got.view(np.float32), np.float32(9)) > exact).all()


def test_what_a_warp_does_together() -> None:
    lane = np.arange(32)
    first = INTEGERS[:32]
    wanted = {
        "shfl.sync.bfly.b32 %r6, %r6, 5, 31, -1;": first[lane ^ 5],
        "shfl.sync.down.b32 %r6, %r6, 4, 31, -1;": first[np.where(lane + 4 < 32, lane + 4, lane)],
        "shfl.sync.up.b32 %r6, %r6, 4, 0, -1;": first[np.maximum(lane - 4, np.where(lane < 4, lane, 0))],
        "shfl.sync.idx.b32 %r6, %r6, 3, 31, 0xffffffff;": np.full(32, first[3]),
        "redux.sync.max.s32 %r6, %r6, 0xffffffff;": np.full(32, first.max()),
        "redux.sync.min.u32 %r6, %r6, 0xffffffff;": np.full(32, first.view(np.uint32).min()).view(np.int32),
    }
    for line, want in wanted.items():
        np.testing.assert_array_equal(computed(line, threads=32), want, line)


@pytest.mark.parametrize(
    ("shape", "kinds", "dtype", "counts"),
    [
        ((16, 8, 32), "s32.s8.s8.s32", np.int8, (4, 2, 4)),
        ((8, 8, 16), "s32.s8.s8.s32", np.int8, (1, 1, 2)),
        ((16, 8, 16), "f32.f16.f16.f32", np.float16, (4, 2, 4)),
        ((16, 8, 8), "f32.f16.f16.f32", np.float16, (2, 1, 4)),
    ],
)
def test_tensor_cores(shape: Any, kinds: str, dtype: Any, counts: tuple[int, int, int]) -> None:
    """A warp's matrices lie in its registers as the PTX ISA draws them, element by element."""
    (M, N, K), (left, right, sums) = shape, counts
    each, rng = 4 // np.dtype(dtype).itemsize, np.random.default_rng(2)
    a, b = (rng.integers(-9, 9, size).astype(dtype) for size in ((M, K), (K, N)))
    got, want = np.zeros((M, N)), a.astype(float) @ b.astype(float) + 1
    lanes = [divmod(lane, 4) for lane in range(32)]
    a_words = [np.stack([a[g + i % 2 * 8, each * (t + i // 2 * 4) :][:each] for g, t in lanes]) for i in range(left)]
    b_words = [np.stack([b[each * (t + 4 * i) :, g][:each] for g, t in lanes]) for i in range(right)]
    if left == 1:
        a_words = [np.stack([a[g, each * t :][:each] for g, t in lanes])]
    words = [[np.ascontiguousarray(x).view(np.int32)[:, 0] for x in side] for side in (a_words, b_words)]
    begin = [np.ones(32, np.float32 if dtype == np.float16 else np.int32)] * sums
    made = product(f"mma.sync.aligned.m{M}n{N}k{K}.row.col.{kinds}")(*words, begin)
    for i, values in enumerate(made):
        for (g, t), value in zip(lanes, values, strict=True):
            got[g + i // 2 * 8, 2 * t + i % 2] = value
    np.testing.assert_array_equal(got, want)


def test_matrices_come_from_shared_memory_as_tensor_cores_want_them() -> None:
    """Lane 8j + i has the address of row i of matrix j. Lane 4g + t gets 4 bytes of row g of each."""
    gpu = Gpu(np.arange(64, dtype=np.int32))
    gpu.launch(
        "ld.global.u32 %r6, [%rd3]; st.shared.u32 [%rd8], %r6; add.s32 %r6, %r6, 64; st.shared.u32 [%rd8+256], %r6;",
        BARRIER, "shl.b32 %r7, %r0, 4; and.b32 %r7, %r7, 511; mov.u32 %r8, memory; add.s32 %r7, %r7, %r8;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r7];",
        "@!%p1 bra $end; shl.b64 %rd5, %rd5, 2; add.s64 %rd4, %rd1, %rd5;",
        "st.global.v4.u32 [%rd4], {%r9, %r10, %r11, %r12}; $end:",
    )  # fmt: skip
    np.testing.assert_array_equal(gpu.result().reshape(16, 4), np.arange(16)[:, None] + 32 * np.arange(4))
