# SPDX-License-Identifier: Apache-2.0
"""Where compiled kernels live between processes: one private folder of machine code.

The file name is a hash of the source and of everything else that shapes the machine code. Where no folder can be
written, kernels live in memory only.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from inspect import getsource
from pathlib import Path

import llvmlite

from pyro_latentde.solve.fused import lower as lower_
from pyro_latentde.solve.fused import lower_values, machine_code
from pyro_latentde.solve.fused.lanes import lower as lower_lanes
from pyro_latentde.solve.fused.lower import lower, slots
from pyro_latentde.solve.fused.machine_code import assemble, enter, target

__all__ = ["cache_folder", "load_kernel", "remove_files"]

# LLVM's context is one for all threads, and so is a counter in Python's parser: two threads that parse at once may fail
_ONE_AT_A_TIME = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that another thread held
    os.register_at_fork(after_in_child=lambda: globals().update(_ONE_AT_A_TIME=threading.Lock()))
_SHAPING = (lower_, lower_values, lower_lanes, machine_code)
_DIGEST = hashlib.sha256().digest_size


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The kernel folder, or None where none can be written. ``PYRO_LATENTDE_CACHE`` chooses another place."""
    try:
        base = os.environ.get("PYRO_LATENTDE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "pyro_latentde" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # a user without a home is a RuntimeError
        return None


def load_kernel(source: str, name: str, small: int, lanes: int = 0) -> Callable[..., int]:
    """The function ``name`` of the source as machine code: from the folder when it is already there.

    Args:
        small: Functions of at most so many statements are copied to where they are called.
        lanes: Rows that are advanced side by side, of kernels that do so.
    """
    key = "k_" + hashlib.sha256("\n".join([*_versions(), f"{small} {lanes}", source]).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{key}.o" if folder else None
    with _ONE_AT_A_TIME:
        code = _read(path) if path else None
        if code is None:
            code = assemble(lower(source, name, small, lanes), key)
            if path:
                _write(path, code)
        return enter(code, key, slots(source, name))


@lru_cache(maxsize=1)
def _versions() -> tuple[str, ...]:
    """All that shapes machine code beside the source."""
    return (llvmlite.__version__, *target(), *(getsource(module) for module in _SHAPING))


def _read(path: Path) -> bytes | None:
    """The machine code, unless it is not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keep the machine code, if that is possible: a full disk is no reason not to solve."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        partial.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(partial, path)  # atomic: another process sees the whole file or none
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_files() -> None:
    """Delete every stored kernel."""
    folder = cache_folder()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    cache_folder.cache_clear()
