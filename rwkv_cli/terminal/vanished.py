"""A sentence in place of "Bus error" where a model's file is cut short while it runs.

The weights are a map of the file. The system ends a process that reads a page whose file is no longer there (SIGBUS),
and Python cannot act before it goes on. So the handler is compiled code that writes the sentence and exits, which is
all that a signal's handler may safely do.
"""

import ctypes
import signal
from pathlib import Path
from typing import Any

import llvmlite.binding

from rwkv_cli.terminal.output import one_line

_HANDLER = """
declare i64 @write(i32, ptr, i64)
declare void @_exit(i32)
define void @handler(i32 %signal) {{
  %written = call i64 @write(i32 2, ptr inttoptr (i64 {address} to ptr), i64 {size})
  call void @_exit(i32 1)
  unreachable
}}
"""

_KEPT: list[Any] = []
"""The sentences and the code of the handlers, which must stay in memory."""

_PATHS: list[Path] = []


def say_if_it_vanishes(path: Path) -> None:
    """Have the process end with a sentence if this file, or one named before, can no longer be read."""
    if not hasattr(signal, "SIGBUS"):  # Windows does not let a mapped file be cut
        return
    _PATHS.append(path)
    names = " or ".join(one_line(str(name)) for name in dict.fromkeys(_PATHS))
    sentence = f"\nError: {names}: was cut short or overwritten while it ran; convert it again, then run it again\n"
    text = ctypes.create_string_buffer(sentence.encode("utf-8", "replace"))
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    code = _HANDLER.format(address=ctypes.addressof(text), size=len(text.value))
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(code), machine)
    engine.finalize_object()
    _KEPT.append((text, engine))
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    install(signal.SIGBUS, engine.get_function_address("handler"))
