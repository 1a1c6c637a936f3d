# SPDX-License-Identifier: Apache-2.0
"""A posterior in one netCDF file, exact to the bit, which ArviZ can open too. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import torch
from torch import Tensor

from pyro_latentde.errors import CheckpointError
from pyro_latentde.posterior.arviz_dims import Labels
from pyro_latentde.posterior.model_sites import ModelSites, Plate, Site, inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["load", "save"]

_FORMAT = "pyro_latentde posterior"
_VERSION = 1
_ATTRIBUTE = "pyro_latentde"
_TABLES = ("posterior", "sample_stats", "observed_data", "constant_data")


def save(posterior: Posterior, path: str | Path) -> Path:
    """Write draws, statistics and the description of the model's sites; not the model itself.

    The file is netCDF-4 with ArviZ's groups ``posterior``, ``sample_stats``, ``observed_data`` and
    ``constant_data``. It is written under a temporary name and then renamed.

    Args:
        posterior: what to save.
        path: the file, usually ``*.nc``.

    Returns:
        The path.
    """
    path = Path(path)
    sites = posterior.sites or {}
    tables: dict[str, dict[str, Tensor]] = {
        "posterior": dict(posterior.samples),
        "sample_stats": dict(posterior.stats),
        "observed_data": {name: site.value for name, site in sites.items() if site.value is not None},
        "constant_data": {f"{name}_times": site.times for name, site in sites.items() if site.times is not None},
    }
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "attrs": _plain(posterior.attrs),
        "sites": None if posterior.sites is None else [_site_record(site) for site in sites.values()],
        "tensors": {
            table: [[name, _key(name), _dtype_name(value), list(value.shape)] for name, value in tensors.items()]
            for table, tensors in tables.items()
        },
    }
    labels = Labels(sites, posterior.samples)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with h5netcdf.File(partial, "w") as file:
            file.attrs[_ATTRIBUTE] = json.dumps(header)
            for table, tensors in tables.items():
                if tensors:
                    _write_group(file.create_group(table), tensors, 2 if "data" not in table else 0, labels)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(
    path: str | Path,
    model: Callable | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Posterior:
    """Read a posterior written by :func:`save`.

    Args:
        path: the file.
        model: the model, so that predictions and log-likelihoods work again.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Returns:
        The posterior, with tensors on the CPU that equal the saved ones bit for bit.

    Raises:
        CheckpointError: no such file, not a file of this kind, or a model whose latent sites are others.
    """
    path = Path(path)
    try:
        with h5netcdf.File(path, "r") as file:
            header = _header(file, path)
            tables = {
                table: {
                    name: _tensor(file[table].variables[key][...], dtype, shape)
                    for name, key, dtype, shape in header["tensors"].get(table, [])
                }
                for table in _TABLES
            }
        sites = None if header["sites"] is None else _sites(header["sites"], tables)
        posterior = Posterior(
            samples=tables["posterior"], stats=tables["sample_stats"], sites=sites, attrs=header["attrs"]
        )
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a complete file of Posterior.save ({type(error).__name__}: {error}). "
            "Was it cut off, or written by another program? az.from_netcdf reads ArviZ's own files."
        ) from error
    if model is None:
        return posterior
    found = inspect_model(model, *args, **(kwargs or {}))
    _check_same(posterior, found, path)
    found = found.solved_with({} if sites is None else sites.settings)
    return replace(posterior, sites=found, model=model, args=args, kwargs=dict(kwargs or {}))


def _write_group(group: h5netcdf.Group, tensors: Mapping[str, Tensor], lead: int, labels: Labels) -> None:
    for name, value in tensors.items():
        array = _array(value)
        dims = ["chain", "draw"][:lead]
        site = labels.sites.get(name)
        if site is not None and tuple(value.shape[lead:]) == site.shape:
            dims += [_key(dim) for dim in labels.names_of(site)]
        else:
            dims += [f"{_key(name)}_dim_{i}" for i in range(value.ndim - lead)]
        for i, (dim, size) in enumerate(zip(dims, array.shape, strict=True)):
            if dim in group.dimensions and group.dimensions[dim].size != size:
                dims[i] = dim = f"{_key(name)}_dim_{i}"
            if dim not in group.dimensions:
                group.dimensions[dim] = size
                _write_coordinate(group, dim, size, labels)
        group.create_variable(_key(name), tuple(dims), data=array)


def _write_coordinate(group: h5netcdf.Group, dim: str, size: int, labels: Labels) -> None:
    values = np.arange(size) if dim in ("chain", "draw") else labels.coords.get(dim)
    if values is not None and len(values) == size:
        values = np.asarray(values)
        if values.dtype.kind == "U":
            group.create_variable(dim, (dim,), dtype=h5py.string_dtype())[...] = values.astype(object)
        else:
            group.create_variable(dim, (dim,), data=values)


def _header(file: h5netcdf.File, path: Path) -> dict[str, Any]:
    if _ATTRIBUTE not in file.attrs:
        raise ValueError("it has no description of a posterior of this package")
    header = json.loads(str(file.attrs[_ATTRIBUTE]))
    if header["format"] != _FORMAT or header["version"] > _VERSION:
        raise ValueError(f"format '{header['format']}' version {header['version']}; this version reads {_VERSION}")
    return header


def _site_record(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "shape": list(site.shape),
        "event_dim": site.event_dim,
        "plates": [[plate.name, plate.dim, plate.size] for plate in site.plates],
        "states": None if site.states is None else list(site.states),
        "settings": _plain(site.settings),
        "pointwise": site.pointwise,
    }


def _sites(records: list[dict[str, Any]], tables: Mapping[str, Mapping[str, Tensor]]) -> ModelSites:
    sites = ModelSites()
    for record in records:
        name = record["name"]
        sites[name] = Site(
            name=name,
            kind=record["kind"],
            shape=tuple(record["shape"]),
            event_dim=record["event_dim"],
            plates=tuple(Plate(*plate) for plate in record["plates"]),
            states=None if record["states"] is None else tuple(record["states"]),
            times=tables["constant_data"].get(f"{name}_times"),
            value=tables["observed_data"].get(name),
            settings=record["settings"],
            pointwise=record["pointwise"],
        )
    return sites


def _check_same(posterior: Posterior, found: ModelSites, path: Path) -> None:
    for name, value in posterior.samples.items():
        shape = tuple(value.shape[2:])
        if name not in found or found[name].kind != "latent":
            raise CheckpointError(
                f"{path} has draws of '{name}', which is not a latent site of this model; it has {list(found.latent)}"
            )
        if found[name].shape != shape:
            raise CheckpointError(
                f"{path} has draws of shape {shape} for '{name}', this model has {found[name].shape}. "
                "Were the same args given as for the fit?"
            )


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu().contiguous()
    # netCDF has neither booleans nor half-precision numbers: their bits are kept in integers.
    if value.dtype == torch.bool:
        value = value.to(torch.int8)
    elif value.dtype in (torch.float16, torch.bfloat16):
        value = value.view(torch.int16)
    return value.numpy()


def _tensor(array: np.ndarray, dtype: str, shape: list[int]) -> Tensor:
    value = torch.from_numpy(np.array(array))
    wanted = getattr(torch, dtype)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}")
    if wanted in (torch.float16, torch.bfloat16):
        value = value.view(wanted)
    return value.to(wanted).reshape(shape)


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _key(name: str) -> str:
    """Name of a variable in the file: a slash would make a group."""
    return name.replace("/", "|")


def _plain(value: Any) -> Any:
    """Value as JSON knows it; what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
