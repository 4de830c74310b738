"""Compile every CUDA kernel without a GPU, and print a JSON object by capability and kernel: compile_cuda.py 7.5 8.0

With `--code FOLDER`, machine code is written there, a file KERNEL.cubin for each kernel. With `--keys` nothing is
compiled, and what is printed is by which key each kernel is found among those that are kept.

numba-cuda compiles to PTX, then nvJitLink to machine code, and tells registers, shared memory and spills. This is a
process of its own, since numba decides at import whether it simulates. PTX takes most of the time. All GPUs of one call
get that of the first, except where it has instructions for tensor cores.
"""

import argparse
import json
import re
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Capability = tuple[int, int]


def make(capability: Capability) -> list[Any]:
    """The kernels, with those that are made where they are wanted."""
    from rwkv_cli.kernels.cuda import backend  # noqa: F401 - with every module that has kernels
    from rwkv_cli.kernels.cuda.device import halves as cuda_halves
    from rwkv_cli.kernels.cuda.device import heads, wkv6, wkv7
    from rwkv_cli.kernels.cuda.device import matmul as cuda_matmul
    from rwkv_cli.kernels.cuda.device import matmul_float as cuda_matmul_float
    from rwkv_cli.kernels.cuda.device import norms as cuda_norms
    from rwkv_cli.kernels.cuda.device.compile import KERNELS
    from rwkv_cli.numbers import FLOAT_DTYPES

    for bits in (4, 5, 6, 8):
        cuda_matmul.matvec(bits, 2)
        cuda_matmul.matvec(bits, 1)
    for shape in cuda_matmul.SHAPES:
        cuda_matmul.matmul(shape, 8, 2)
    for bits in (8, 4):
        cuda_matmul.matmul(cuda_matmul.SHAPES[-1], bits, 1)
    # For many tokens, codes of 5 bits stand for the others too: they need the most registers.
    cuda_matmul.matmul(cuda_matmul.SHAPES[-1], 5, 2)
    for bits in (4, 5, 6, 8):
        cuda_halves.matmul_half(bits)
    for kind in map(FLOAT_DTYPES.index, ("F32", "F16")):  # BF16's kernels differ from F16's by a shift
        cuda_matmul_float.matvec_float(kind)
        for tokens in cuda_matmul_float.TILE_TOKENS:
            cuda_matmul_float.matmul_float(kind, tokens)
    for width in (768, 4096):
        cuda_norms.layer_norm(width)
        cuda_norms.norm_shift(width, False, 0)
        for mixes in (1, 6):
            cuda_norms.norm_shift(width, True, mixes)
    for size in (64, 24):
        for form in heads.forms(capability):
            wkv6.wkv6(size, form)
            wkv7.wkv7(size, form)
    return KERNELS


def main(capabilities: list[Capability], folder: Path | None) -> None:
    from numba import cuda
    from numba.cuda import dispatcher

    gpu = SimpleNamespace(compute_capability=capabilities[0])
    dispatcher.get_current_device = lambda: gpu  # for which numba compiles device functions
    from rwkv_cli.kernels.cache import on_first_compilation
    from rwkv_cli.kernels.cuda.device import halves

    kernels = make(capabilities[0])
    found: dict[str, Any] = {}
    announced: list[None] = []
    with on_first_compilation(lambda: announced.append(None)):
        for kernel in kernels:
            ptx = ""
            for capability in capabilities:
                gpu.compute_capability = capability
                for copies in (halves._bring, halves._put):  # which differ by GPU, and numba compiles a function once
                    copies.overloads.clear()
                if not ptx or "mma" in ptx:
                    ptx, _ = cuda.compile_ptx(kernel.body, kernel.signature, cc=capability, launch_bounds=kernel.bounds)
                found.setdefault("{}.{}".format(*capability), {})[kernel.name] = facts(kernel, ptx, capability, folder)
    print(json.dumps(found | {"announced": len(announced)}))


def keys(capability: Capability) -> dict[str, str]:
    """Digests of the keys that numba makes of a kernel's code and of what is in its closure."""
    anywhere = SimpleNamespace(magic_tuple=tuple)
    return {
        kernel.name: sha256(repr(kernel.dispatcher._cache._index_key(kernel.signature, anywhere)).encode()).hexdigest()
        for kernel in make(capability)
    }


def facts(kernel: Any, ptx: str, capability: Capability, folder: Path | None) -> dict[str, Any]:
    """The compilers' facts on one kernel."""
    from cuda.bindings import nvjitlink

    data = ptx.encode()
    linker = nvjitlink.create(2, ["-arch=sm_{}{}".format(*capability), "-verbose"])
    nvjitlink.add_data(linker, nvjitlink.InputType.PTX, data, len(data), "kernel")
    nvjitlink.complete(linker)
    log = bytearray(nvjitlink.get_info_log_size(linker))
    nvjitlink.get_info_log(linker, log)
    if folder is not None:
        cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, cubin)
        (folder / f"{kernel.name}.cubin").write_bytes(cubin)
    nvjitlink.destroy(linker)
    text = log.decode(errors="replace")
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    ).groups()
    return {
        "threads": kernel.bounds[0], "depot": "__local_depot" in ptx, "stack": int(stack),
        "spills": int(stores) + int(loads), "registers": int(re.search(r"[Uu]sed (\d+) registers", text)[1]),
        "shared": int(re.search(r"(\d+) bytes smem", text)[1]),
        "instructions": {
            name: len(re.findall(name, ptx))
            for name in ("dp4a.s32.s32", "m16n8k32", "m8n8k16", "shfl.sync", "cp.async.cg")
        },
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", nargs="+", type=lambda text: tuple(map(int, text.split("."))))
    parser.add_argument("--code", type=Path)
    parser.add_argument("--keys", action="store_true")
    options = parser.parse_args()
    if options.keys:
        print(json.dumps(keys(options.capabilities[0])))
    else:
        main(options.capabilities, options.code)
