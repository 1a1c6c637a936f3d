# SPDX-License-Identifier: Apache-2.0
"""Kernels for CUDA: the functions that the CPU runs over blocks of rows, each called for one row by one thread.

Work arrays are the thread's own local memory, which the device interleaves between threads, so that equal accesses
of neighbouring threads lie side by side; records and gradients of the parameters are columns of one array for the
same reason.
"""

import ast
from dataclasses import dataclass

from pyro_latentde.solve.fused.lower import slots
from pyro_latentde.solve.fused.typed import typed_functions

__all__ = ["CudaSource", "cuda_source"]

NEAR = 256  # entries of a row's gradient that are summed in the thread's own memory

_LOCAL = {"w": "WORK", "o": "LEAVES", "q": "LEAVES", "od": "LEAVES"}
_HERE = {"lo": "r", "hi": "r + 1", "chunk": "0"}  # what a thread knows without being told

_HELPERS = """
def lesser(a, b):
    return b if b < a else a

def larger(a, b):
    return b if b > a else a

def square(x):
    return x * x

def whole(x):
    return 0 if x != x else int(lesser(larger(x, real(-9e18)), real(9e18)))
"""


@dataclass(frozen=True)
class CudaSource:
    """Python source, the names of the kernel's arguments, and whether it computes in float32."""

    text: str
    arguments: tuple[str, ...]
    single: bool


def cuda_source(source: str, name: str, work: int, leaves: int, gradient: int = 0, single: bool = False) -> CudaSource:
    """Source of a CUDA kernel ``rows`` around the function ``name`` of kernel source.

    A thread takes row ``members[i]``, if that lies from ``first`` to before ``beyond``, and column i of ``records``;
    what the function returns, less the row, goes to ``ends[i]``.

    Args:
        work: Entries of the work array.
        leaves: Number of parameters.
        gradient: Entries of the gradient of one row; 0 where there is none.
        single: Compute in float32.
    """
    parameters = slots(source, name)
    given = [x for x, _ in parameters if x not in (*_LOCAL, *_HERE, "buf", "g")]
    arguments = ("count", "members", "first", "beyond", *given, "records", "grads", "ends")
    near = gradient <= NEAR
    body = [f"{x} = cuda.local.array({_LOCAL[x]}, {'real' if x == 'w' else 'index'})"
            for x, _ in parameters if x in _LOCAL]  # fmt: skip
    values = {x: f"real({x})" if kind == "float" else _HERE.get(x, x) for x, kind in parameters}
    if "buf" in values:
        body.append("buf = records[:, i]")
    if "g" in values:
        body.append(f"g = cuda.local.array({max(gradient, 1)}, real)" if near else "g = grads[:, r - first]")
        body.append(f"for k in range({gradient}):\n    g[k] = real(0.0)")
    body.append(f"ends[i] = {name}({', '.join(values[x] for x, _ in parameters)}) - r")
    if "g" in values and near:
        body.append(f"for k in range({gradient}):\n    grads[k, r - first] = g[k]")
    return CudaSource(_assembled(source, single, arguments, body, work, leaves), arguments, single)


def _assembled(source: str, single: bool, arguments: tuple, body: list[str], work: int, leaves: int) -> str:
    functions = [*ast.parse(_HELPERS).body, *typed_functions(source, single)]
    for function in functions:
        function.decorator_list = [ast.Name("device", ast.Load())]
    lines = "\n".join(body).replace("\n", "\n            ")
    kernel = f"""
@kernel
def rows({", ".join(arguments)}):
    i = cuda.grid(1)
    if i < count:
        r = members[i]
        if first <= r and r < beyond:
            {lines}
"""
    constants = f"WORK = {max(work, 1)}\nLEAVES = {max(leaves, 1)}\n"
    return constants + "\n\n".join(ast.unparse(ast.fix_missing_locations(f)) for f in functions) + "\n" + kernel
