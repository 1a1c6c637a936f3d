# SPDX-License-Identifier: Apache-2.0
"""The system of a run: one of the zoo by its name, or a user's Python file by its path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pyro_latentde.data._tables import nearest
from pyro_latentde.errors import LatentDEError
from pyro_latentde.models import systems as zoo

__all__ = ["System", "find_system"]

_PREFIX = "_latentde_system_"  # no file of a user hides a module of the same name


@dataclass(frozen=True)
class System:
    """What a fit needs of a system.

    Args:
        name: of the zoo, or of the file.
        model: ``model(series)``.
        values: names of the observed values, which are columns of a table; None where the file does not say.
        title: first line of its documentation.
        path: of a user's file; None for the zoo.
        covariates: names of what the model wants to know of each series, such as its dose.
    """

    name: str
    model: Callable
    values: tuple[str, ...] | None
    title: str
    path: Path | None = None
    covariates: tuple[str, ...] = ()


def find_system(name: str, beside: Path | None = None) -> System:
    """The system of that name, or in the file at that path.

    A file is a module like those of the zoo: a function ``model(series)`` whose first argument is a :class:`.Series`,
    and ``STATES``, the names of the states, which are the columns to read too unless ``OBSERVED`` names others.
    ``COVARIATES``, where there are any, names columns that are constant within a series. With a second argument
    ``times=`` the model also draws observations between and after the data. The file is run: give none that you would
    not run yourself.

    Args:
        name: of the zoo, or a path.
        beside: a folder, from which the file may import too; its own is in any case.

    Returns:
        System.

    Raises:
        LatentDEError: there is no such system or file, it cannot be imported, or it has no model.

    Example:
        >>> find_system("lotka_volterra").values
        ('hare', 'lynx')
    """
    path = Path(name)
    if name in zoo.__all__:
        module, path, shown = importlib.import_module(f"{zoo.__name__}.{name}"), None, name
    elif path.suffix == ".py" or path.is_file() or len(path.parts) > 1:
        module, shown = _run_file(path, beside), path.name
    else:
        raise LatentDEError(
            f"there is no system {name!r}{nearest(name, zoo.__all__)}. There are: {', '.join(zoo.__all__)}; your own "
            "is a Python file, given by its path"
        )
    title = ((module.__doc__ or "").strip().splitlines() or [""])[0]
    title = re.sub(r"\s*:$", ".", title)
    values = _columns(module, shown, "OBSERVED") or _columns(module, shown, "STATES")
    covariates = _columns(module, shown, "COVARIATES") or ()
    return System(Path(shown).stem if path else name, _model(module, shown), values, title, path, covariates)


def _run_file(path: Path, beside: Path | None) -> ModuleType:
    if not path.is_file():
        raise LatentDEError(f"there is no file {path}; expected a name of the zoo, or a Python file with a model")
    name = _PREFIX + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise LatentDEError(f"{path} is no Python file; expected one whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    folders = [str(folder.resolve()) for folder in (path.parent, beside) if folder is not None and folder.is_dir()]
    sys.modules[name] = module  # dataclasses look their module up
    sys.path[:0] = folders
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise LatentDEError(
            f"{path} cannot be imported: {type(error).__name__}: {error} ({_where(error, path)}). Try: python {path}"
        ) from error
    finally:
        for folder in folders:
            sys.path.remove(folder)
    return module


def _where(error: BaseException, path: Path) -> str:
    """``"line 7"``, of the file itself where it is on the way to the error."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    here = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()] or frames
    return f"line {here[-1].lineno}"


def _model(module: ModuleType, shown: str) -> Callable:
    model = getattr(module, "model", None)
    if not callable(model):
        if module.__name__.startswith(zoo.__name__):
            able = [name for name in zoo.__all__ if hasattr(getattr(zoo, name), "model")]
            raise LatentDEError(
                f"{shown} has a simulator, but no Pyro model to fit; those with one are {', '.join(able)}. Networks "
                "for the others are trained by `pyro-latentde train`"
            )
        made = [name for name, thing in vars(module).items() if callable(thing) and not name.startswith("_")]
        own = [name for name in made if getattr(vars(module)[name], "__module__", None) == module.__name__]
        raise LatentDEError(
            f"{shown} has no function `model(series)`; it defines {', '.join(own) or 'no function'}. Call the Pyro "
            "model `model`; pyro_latentde/models/systems/lotka_volterra.py is a file to copy"
        )
    try:
        inspect.signature(model).bind(None)
    except TypeError as error:
        raise LatentDEError(
            f"{shown}: expected `model(series)`, a function that can be called with the data alone; got "
            f"model{inspect.signature(model)} ({error}). Give the other arguments default values"
        ) from None
    return model


def _columns(module: ModuleType, shown: str, label: str) -> tuple[str, ...] | None:
    found = getattr(module, label, None)
    if found is None:
        return None
    if isinstance(found, str) or not all(isinstance(name, str) for name in found) or not len(found):
        raise LatentDEError(f'{shown}: expected {label} = ("u", "v"), names of columns; got {found!r}')
    return tuple(found)
