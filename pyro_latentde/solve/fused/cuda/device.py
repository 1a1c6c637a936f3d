# SPDX-License-Identifier: Apache-2.0
"""CUDA devices through Numba: source becomes a kernel, a kernel runs over rows on torch's current stream.

In Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``, set before Numba is imported) the same source runs on CPU tensors,
with one Python thread for each thread of the device.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.solve.fused.cuda.source import CudaSource
from pyro_latentde.solve.fused.kernel_cache import cache_folder

__all__ = ["compile_kernel", "launch", "obstacle", "simulated"]

WARP = 32  # threads that the device runs in step
FEW = 4  # blocks for each multiprocessor, below which blocks are one warp, to spread the rows

_ONE_AT_A_TIME = threading.Lock()


@functools.lru_cache(maxsize=1)
def obstacle() -> str | None:
    """What is missing to compile for a CUDA device; None where nothing is."""
    for module, package in (("numba", "numba"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(module) is None:
            return f'{package} is not installed, which compiles kernels for it: pip install "pyro-latentde[cuda]"'
    from numba import cuda

    if simulated():
        return "Numba's CUDA simulator is switched on (NUMBA_ENABLE_CUDASIM), which knows no device"
    try:
        from numba.cuda.cudadrv.nvvm import NVVM

        NVVM()
        if not cuda.is_available():
            return "Numba finds no CUDA driver"
    except Exception as error:  # each part of the toolkit has an error of its own
        return (
            f"Numba cannot compile for it ({type(error).__name__}: {error}). Try numba-cuda[cu12] or numba-cuda[cu13]"
        )
    return None


@functools.lru_cache(maxsize=1)
def simulated() -> bool:
    """Whether kernels run in Numba's simulator."""
    if importlib.util.find_spec("numba") is None:
        return False
    from numba.core import config

    return bool(config.ENABLE_CUDASIM)


_HEAD = """# {versions}
import math
import numpy as np
from numba import cuda
from numba import int64 as index
from numba.cuda.libdevice import ceil{f} as ceil, floor{f} as floor, rint{f} as rint, trunc{f} as trunc
real = np.float{bits}
inf, nan = real(np.inf), real(np.nan)
device, kernel = cuda.jit(device=True), cuda.jit(cache={cache})
"""


@functools.lru_cache(maxsize=1024)
def compile_kernel(source: CudaSource) -> Callable:
    """The kernel ``rows`` of the source; Numba compiles it at its first launch, and keeps it in the kernel folder."""
    with _ONE_AT_A_TIME:
        if simulated():
            return _in_simulator(source)
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numba", "numba-cuda")]
        folder = cache_folder()
        settings = {"f": "f" if source.single else "", "bits": 32 if source.single else 64, "cache": folder is not None}
        text = _HEAD.format(versions=", ".join(versions), **settings) + source.text
        if folder is not None:
            with contextlib.suppress(OSError):
                return _from_file(folder, text)
        namespace: dict[str, Any] = {"__name__": "pyro_latentde_kernel"}
        exec(text.replace("cache=True", "cache=False", 1), namespace)
        return namespace["rows"]


def _from_file(folder: Path, text: str) -> Callable:
    """Numba keeps machine code beside the file that a function comes from, so that the source must be a module."""
    name = "cuda_" + hashlib.sha256(text.encode()).hexdigest()
    path = folder / f"{name}.py"
    if not path.is_file() or path.read_text() != text:
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(text)
        os.replace(partial, path)  # atomic: another process sees the whole file or none
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: stored machine code looks for it by name
    spec.loader.exec_module(module)
    return module.rows


class _Math:
    """Functions of ``math`` that give infinity and NaN where Python raises."""

    def __getattr__(self, name: str) -> Callable:
        return getattr(np, name, None) or getattr(np, _NUMPY_NAMES.get(name, name), None) or getattr(math, name)


_NUMPY_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "atan2": "arctan2"} | {
    "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
}  # fmt: skip


def _in_simulator(source: CudaSource) -> Callable:
    from numba import cuda

    real = np.float32 if source.single else np.float64
    namespace = {
        "cuda": cuda, "math": _Math(), "real": real, "index": np.int64, "inf": real(np.inf), "nan": real(np.nan),
        "device": np.errstate(all="ignore"), "kernel": cuda.jit,
        **{name: getattr(np, name) for name in ("floor", "ceil", "rint", "trunc")},
    }  # fmt: skip
    exec(source.text, namespace)
    return namespace["rows"]


def launch(kernel: Callable, count: int, like: Tensor, arguments: Sequence[Tensor | int | float | bool]) -> None:
    """Run a kernel with ``count`` threads or a few more, on the device of ``like`` and its current stream."""
    if count == 0:
        return
    if simulated():
        with _ONE_AT_A_TIME:
            values = [x.numpy() if isinstance(x, Tensor) else x for x in arguments]
            kernel[-(-count // WARP), min(count, WARP)](*values)
        return
    from numba import cuda

    threads = _threads(count, like.device)
    with cuda.gpus[like.device.index], _without_occupancy_warnings():
        stream = cuda.external_stream(torch.cuda.current_stream(like.device).cuda_stream)
        values = [cuda.as_cuda_array(x, sync=False) if isinstance(x, Tensor) else x for x in arguments]
        kernel[-(-count // threads), threads, stream](*values)


def _threads(count: int, device: torch.device) -> int:
    """Small blocks, since a kernel's many registers let few threads share a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return WARP if count < FEW * 2 * WARP * processors else 2 * WARP


@contextlib.contextmanager
def _without_occupancy_warnings() -> Iterator[None]:
    """Few rows are no mistake."""
    from numba.core.errors import NumbaPerformanceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        yield
