# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain types: training checkpoints that survive a kill, and what a run is known by."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import random
import re
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import CheckpointError
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["compare", "describe", "fingerprint", "read", "rng_state", "set_rng_state", "write"]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is either the old one or the new one, whatever happens on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, form: str) -> dict[str, Any]:
    """Read such a file. Nothing but tensors and plain types is unpickled.

    Args:
        path: the file.
        form: its expected entry ``"format"``.

    Returns:
        The content, on the CPU.

    Raises:
        CheckpointError: no such file, damaged, or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read as {form}; it is damaged, or another kind of file") from error
    if not isinstance(content, dict) or content.get("format") != form:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected {form}, found {found!r}")
    return content


def compare(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Refuse a file whose description of the run, name -> text, is another.

    Raises:
        CheckpointError: with all that differs.
    """
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        shown = "; ".join(f"{name} {saved.get(name, 'absent')} (now {now.get(name, 'absent')})" for name in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(f"{path}: was made with {shown}{more}. {advice}")


def describe(thing: Any) -> str:
    """Text by which a setting is recognised in another process: no addresses.

    A function is its name, code, defaults and the values that it closes over; an object whose text would be an address
    is its class and its public attributes. Give an object with other contents a ``__repr__`` that says what it is.
    """
    return _describe(thing, ())


def _describe(thing: Any, around: tuple[int, ...]) -> str:
    if isinstance(thing, Tensor | Series | np.ndarray):
        return fingerprint(thing)
    if id(thing) in around:  # such as a function that calls itself
        return "..."
    around = (*around, id(thing))
    if isinstance(thing, functools.partial):
        return f"partial({', '.join(_describe(x, around) for x in (thing.func, thing.args, thing.keywords))})"
    if isinstance(thing, types.MethodType):
        return f"{_describe(thing.__func__, around)} of {_describe(thing.__self__, around)}"
    if isinstance(thing, types.FunctionType):
        return f"{thing.__module__}.{thing.__qualname__} {_hash_of_function(thing, around)}"
    if isinstance(thing, type) or (callable(thing) and hasattr(thing, "__qualname__")):
        return f"{thing.__module__}.{thing.__qualname__}"
    # these first, since the text of a long tensor leaves most of its numbers out
    if isinstance(thing, Posterior):
        return fingerprint(thing.samples)
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{name!r}: {_describe(value, around)}' for name, value in thing.items())}}}"
    if isinstance(thing, list | tuple):
        return f"[{', '.join(_describe(value, around) for value in thing)}]"
    text = repr(thing)
    if not re.search(r" at 0x[0-9a-fA-F]+", text):
        return text
    public = {name: value for name, value in getattr(thing, "__dict__", {}).items() if not name.startswith("_")}
    inside = ", ".join(f"{name}={_describe(value, around)}" for name, value in public.items())
    return f"{type(thing).__module__}.{type(thing).__qualname__}({inside})"


def _hash_of_function(function: types.FunctionType, around: tuple[int, ...]) -> str:
    closed = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    values = (function.__defaults__, function.__kwdefaults__, closed)
    texts = [_text_of_code(function.__code__), *(_describe(value, around) for value in values)]
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=4).hexdigest()


def _text_of_code(code: types.CodeType) -> str:
    constants = [_text_of_code(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(value: Any) -> str:
    """Sets of texts are in another order in another process."""
    return f"frozenset({sorted(map(repr, value))})" if isinstance(value, frozenset) else repr(value)


def fingerprint(*things: Any) -> str:
    """Hash of all numbers in tensors, arrays and series, however nested; other things count by their text."""
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest.update, things)
    return digest.hexdigest()


def _feed(add: Callable[[bytes], None], thing: Any) -> None:
    if isinstance(thing, Tensor | np.ndarray):
        array = thing.detach().cpu().contiguous() if isinstance(thing, Tensor) else torch.from_numpy(thing.copy())
        add(f"{array.dtype}{tuple(array.shape)}".encode())
        add(memoryview(array.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(thing, Series):
        for name in ("times", "values", "mask", "inputs", "covariates", "index"):
            _feed(add, getattr(thing, name))
    elif isinstance(thing, Mapping):
        for name, value in thing.items():
            add(str(name).encode())
            _feed(add, value)
    elif isinstance(thing, list | tuple):
        add(f"{len(thing)}".encode())
        for value in thing:
            _feed(add, value)
    else:
        add(describe(thing).encode())


def rng_state() -> dict[str, Any]:
    """State of the random numbers of torch, NumPy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on from an `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
