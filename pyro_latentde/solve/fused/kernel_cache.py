# SPDX-License-Identifier: Apache-2.0
"""Where compiled kernels live between processes: one private folder of generated modules.

The file name is a hash of the source and of every version that shapes the machine code. Numba keeps the machine code
beside the file. Where no folder can be written, kernels live in memory only.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import llvmlite
import numba
import numpy as np

__all__ = ["cache_folder", "load_module", "remove_files"]


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """The kernel folder, or None where none can be written. ``PYRO_LATENTDE_CACHE`` chooses another place."""
    base = os.environ.get("PYRO_LATENTDE_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "pyro_latentde" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def load_module(source: str) -> ModuleType:
    """Import generated source, from the folder when it is already there; compiling happens in the import."""
    versions = f"{numba.__version__} {llvmlite.__version__} {np.__version__} {sys.version_info[:2]}"
    name = "k_" + hashlib.sha256(f"{versions}\n{source}".encode()).hexdigest()
    folder = cache_folder()
    if folder is None:
        module = ModuleType(name)
        exec(compile(source.replace("cache=True", "cache=False"), f"<{name}>", "exec"), module.__dict__)
        return module
    path = folder / f"{name}.py"
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as handle:
            handle.write(source)
        os.replace(handle.name, path)  # atomic: another process sees the whole file or none
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: Numba's cached code refers to the module by name
    spec.loader.exec_module(module)
    return module


def remove_files() -> None:
    """Delete every stored kernel."""
    folder = cache_folder()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    cache_folder.cache_clear()
