# SPDX-License-Identifier: Apache-2.0
"""Machine code for this processor from LLVM source, and its way into the process; for one thread at a time."""

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache

import llvmlite.binding as llvm
import numpy as np

__all__ = ["assemble", "enter", "target"]


@lru_cache(maxsize=1)
def _start() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine() -> llvm.TargetMachine:
    _start()
    cpu, features = target()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


@lru_cache(maxsize=1)
def target() -> tuple[str, str]:
    """Name and features of this processor: machine code is good for these only."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def assemble(source: str, name: str) -> bytes:
    """An object file with one visible function, ``name``, which is ``entry`` of the source."""
    machine = _machine()
    module = llvm.parse_assembly(source)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.get_function("entry").name = name
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def enter(code: bytes, name: str, parameters: list[tuple[str, str]]) -> Callable[..., int]:
    """A Python function that runs the machine code without the GIL.

    Args:
        parameters: Names and kinds (``int``, ``float``, ``bool``, ``Floats``, ``FloatsAt``, ``Ints``): ``lower.py``.
    """
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(name)
    layout = "qq" + "".join("d" if kind == "float" else "q" for _, kind in parameters)
    values = ", ".join(f"id({x})" if kind in ("Floats", "Ints") else x for x, kind in parameters)
    # written out, since packing by a loop over the arguments would cost more than a small solve
    head = f"lambda {', '.join(x for x, _ in parameters)}: checked(call(pack(float64, int64, {values})))"
    return eval(
        head,
        {
            "engine": engine,  # whose end would be the end of the machine code
            "call": ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(address),
            "pack": struct.Struct(layout).pack,
            "float64": id(np.dtype(np.float64)),
            "int64": id(np.dtype(np.int64)),
            "checked": _checked,
        },
    )


def _checked(result: int) -> int:
    if result < 0:
        raise TypeError("a kernel takes contiguous arrays of its own dtypes (float64, int64), and got others")
    return result
