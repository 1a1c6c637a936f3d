# SPDX-License-Identifier: Apache-2.0
"""Export to ArviZ: ``InferenceData`` of ArviZ 0.x or ``DataTree`` of ArviZ 1.x, from dictionaries."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior.arviz_dims import Labels, argument_tensors, to_numpy
from pyro_latentde.posterior.prediction import log_likelihood, predict

if TYPE_CHECKING:
    from pyro_latentde.posterior.posterior import Posterior

__all__ = [
    "GROUPS",
    "Groups",
    "build_datatree",
    "build_inference_data",
    "element_names",
    "make_groups",
    "series_labels",
    "summary_table",
    "to_arviz",
]

GROUPS = (
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
)
_NEED_MODEL = ("log_likelihood", "posterior_predictive", "prior_predictive")


@dataclass
class Groups:
    """Plain dictionaries from which either ArviZ builds its container.

    Args:
        data: group -> variable -> array; groups of draws start with (chain, draw).
        dims: variable -> names of its dimensions after (chain, draw).
        coords: dimension -> its coordinate values.
        attrs: plain facts, for the attributes of the groups.
    """

    data: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


def to_arviz(
    posterior: Posterior,
    groups: Sequence[str] | None = None,
    *,
    prior: Posterior | None = None,
    trajectories: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    memory: str | int = "1GB",
) -> Any:
    """ArviZ's container of a posterior, of the version that is installed.

    Dimensions are named after plates, times and states: an ODE site ``z`` has ``(z_time, z_state)`` with real
    times and names. Missing observations are NaN in ``observed_data`` and 0 in ``log_likelihood``.

    Args:
        posterior: the draws.
        groups: names out of :data:`GROUPS`; by default all for which there is a model, data or a prior.
        prior: result of ``infer.prior``, for the groups ``prior`` and ``prior_predictive``.
        trajectories: put noise-free ODE trajectories beside the observations in the predictive groups.
        dims: names of a site's own dimensions, where the ones found are not wanted.
        coords: coordinate values of dimensions, likewise.
        seed: seed of the predictive draws.
        memory: memory budget of the model runs.

    Returns:
        ``arviz.InferenceData`` or ``xarray.DataTree``.

    Raises:
        LatentDEError: an unknown group, or one that needs a model which is not there.
    """
    made = make_groups(
        posterior,
        groups,
        prior=prior,
        trajectories=trajectories,
        dims=dims,
        coords=coords,
        seed=seed,
        memory=memory,
    )
    arviz = _import_arviz()
    return build_datatree(made) if int(arviz.__version__.split(".")[0]) >= 1 else build_inference_data(made)


def make_groups(
    posterior: Posterior,
    groups: Sequence[str] | None = None,
    *,
    prior: Posterior | None = None,
    trajectories: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    memory: str | int = "1GB",
) -> Groups:
    """The dictionaries behind :func:`to_arviz`, same arguments."""
    wanted = _wanted(posterior, prior, groups)
    sites = posterior.sites
    labels = Labels(sites or {}, posterior.samples, dims, coords)
    made = Groups(attrs=_attrs(posterior))
    options = {"seed": seed, "memory": memory}

    def put(group: str, name: str, value: Tensor, lead: int, kind: str = "value") -> None:
        array, names = labels.label(name, value, lead, kind)
        made.data.setdefault(group, {})[name] = array
        if names != made.dims.setdefault(name, names):
            # A summed log-likelihood has fewer dimensions than its site, but the same name.
            made.dims[f"{group}:{name}"] = names

    def put_predictive(group: str, source: Posterior) -> None:
        drawn = predict(source, **options)
        for name, value in drawn.observations.items():
            put(group, name, value, 2)
        for name, value in drawn.trajectories.items() if trajectories else ():
            put(group, name, value, 2)

    if "posterior" in wanted:
        for name, value in posterior.samples.items():
            put("posterior", name, value, 2)
    if "sample_stats" in wanted:
        made.data["sample_stats"] = {name: to_numpy(value) for name, value in posterior.stats.items()}
    if "log_likelihood" in wanted:
        for name, value in log_likelihood(posterior, memory=memory).items():
            put("log_likelihood", name, value, 2, "log_likelihood")
    if "posterior_predictive" in wanted:
        put_predictive("posterior_predictive", posterior)
    if "prior" in wanted:
        for name, value in prior.samples.items():
            put("prior", name, value, 2)
    if "prior_predictive" in wanted:
        put_predictive("prior_predictive", prior)
    if "observed_data" in wanted:
        for name in sites.observed:
            put("observed_data", name, sites[name].value, 0)
    if "constant_data" in wanted:
        for name, value in argument_tensors(posterior).items():
            put("constant_data", name, value, 0, "argument")
        made.attrs |= labels.settings()
    made.coords = labels.used_coords(made.dims.values())
    made.data = {name: made.data[name] for name in GROUPS if made.data.get(name)}
    return made


def _import_arviz() -> ModuleType:
    """ArviZ, slow to import, without what it says of its next version once a day on each machine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def build_inference_data(made: Groups) -> Any:
    """``InferenceData`` by ``arviz.from_dict`` of ArviZ 0.x, group by group."""
    arviz = _import_arviz()
    result = arviz.InferenceData()
    for group, variables in made.data.items():
        with warnings.catch_warnings():
            # many short chains are meant: here an array says which dimension is which
            warnings.filterwarnings("ignore", message="More chains .* than draws")
            dims = _dims_of(made, group)
            data = arviz.from_dict(**{group: variables}, dims=dims, coords=made.coords, save_warmup=False)
        data[group].attrs = {**data[group].attrs, **made.attrs}
        result.add_groups({group: data[group]})
    return result


def build_datatree(made: Groups) -> Any:
    """``DataTree`` by ``from_dict`` of arviz-base, the foundation of ArviZ 1.x, group by group."""
    from arviz_base import from_dict

    result = None
    for group, variables in made.data.items():
        attrs = {group: dict(made.attrs)}
        tree = from_dict({group: variables}, dims=_dims_of(made, group), coords=made.coords, attrs=attrs)
        if result is None:
            result = tree
        else:
            result[group] = tree[group]
    return result


def summary_table(posterior: Posterior, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> pd.DataFrame:
    """Mean, sd, quantiles, R-hat and effective sample sizes of every scalar: :meth:`.Posterior.summary`."""
    from pyro_latentde.posterior.posterior import INDEPENDENT

    groups = make_groups(posterior, ["posterior"], coords=series_labels(posterior))
    names, columns = [], {"mean": [], "sd": [], **{f"q{100 * p:g}%": [] for p in probs}}
    for name, array in groups.data["posterior"].items():
        flat = array.reshape(-1, int(np.prod(array.shape[2:]))).astype(float)
        names += element_names(name, array.shape[2:], groups)
        columns["mean"].append(flat.mean(0))
        columns["sd"].append(flat.std(0, ddof=1) if len(flat) > 1 else np.full(flat.shape[1], np.nan))
        for p, quantile in zip(probs, np.quantile(flat, probs, axis=0), strict=True):
            columns[f"q{100 * p:g}%"].append(quantile)
    table = pd.DataFrame({key: np.concatenate(parts) for key, parts in columns.items()}, index=names)
    table.index.name = "name"
    if posterior.attrs.get("inference") not in INDEPENDENT and posterior.num_draws >= 4:
        for key, values in _diagnostics(groups).items():
            table[key] = values
    return table


def _diagnostics(groups: Groups) -> dict[str, np.ndarray]:
    arviz = _import_arviz()
    made = Groups(data={"posterior": groups.data["posterior"]}, dims=groups.dims, coords=groups.coords)
    major = int(arviz.__version__.split(".")[0])
    tree = build_datatree(made) if major >= 1 else build_inference_data(made)
    data = tree["posterior"].dataset if major >= 1 else tree["posterior"]
    several = data.sizes["chain"] > 1
    results = {
        # One chain cannot be compared with itself.
        "r_hat": arviz.rhat(data) if several else data.isel(chain=0, draw=0) * np.nan,
        "ess_bulk": arviz.ess(data, method="bulk"),
        "ess_tail": arviz.ess(data, method="tail"),
    }
    order = groups.data["posterior"]
    return {key: np.concatenate([np.ravel(result[name].values) for name in order]) for key, result in results.items()}


def element_names(name: str, shape: tuple[int, ...], groups: Groups) -> list[str]:
    """Names of the scalars of a variable, such as ``z0[hare]``, or ``CL[Ann]`` with :func:`series_labels`."""
    if not shape:
        return [name]
    labels = [groups.coords.get(dim, range(size)) for dim, size in zip(groups.dims[name], shape, strict=True)]
    return [f"{name}[{', '.join(str(lab[i]) for lab, i in zip(labels, at, strict=True))}]" for at in np.ndindex(shape)]


def series_labels(posterior: Posterior) -> dict[str, list[str]]:
    """Coordinates for the plate of the series: their ids, where the model was given one `Series` that has them.

    Args:
        posterior: draws with the arguments of their model.

    Returns:
        Plate "series", or the plate at dim -1 of an observed site, of as many rows -> labels; empty where ids are
        repeated.
    """
    given = [x.ids for x in (*posterior.args, *posterior.kwargs.values()) if isinstance(x, Series) and x.ids]
    if len(given) != 1 or posterior.sites is None:
        return {}
    labels = [str(label) for label in given[0]]
    pairs = [(site, plate) for site in posterior.sites.values() for plate in site.plates if plate.size == len(labels)]
    names = {p.name for site, p in pairs if p.name == "series" or (site.kind == "observed" and p.dim == -1)}
    return dict.fromkeys(names, labels) if len(set(labels)) == len(labels) else {}


def _wanted(posterior: Posterior, prior: Posterior | None, groups: Sequence[str] | None) -> set[str]:
    unknown = set(groups or ()) - set(GROUPS)
    if unknown:
        raise LatentDEError(f"unknown ArviZ groups {sorted(unknown)}; the groups are {GROUPS}")
    there = {"posterior"} | ({"sample_stats"} if posterior.stats else set())
    if posterior.sites is not None:
        there |= {"observed_data", "constant_data"}
    if posterior.model is not None and posterior.sites is not None:
        there |= {"posterior_predictive"}
        # A prior has a log-likelihood too, but ArviZ has no group for it.
        there |= {"log_likelihood"} if set(posterior.sites.latent) <= set(posterior.samples) else set()
    if prior is not None:
        there |= {"prior"} | ({"prior_predictive"} if prior.model is not None else set())
    if groups is None:
        return there
    for name in groups:
        if name.startswith("prior") and prior is None:
            raise LatentDEError(f"group '{name}' needs prior=, a result of infer.prior(model, ...)")
        if name in _NEED_MODEL and (prior if name.startswith("prior") else posterior).model is None:
            raise LatentDEError(f"group '{name}' needs the model. Try: Posterior.load(path, model=..., args=...)")
    return set(groups)


def _attrs(posterior: Posterior) -> dict[str, Any]:
    from pyro_latentde import __version__

    plain = {}
    for name, value in posterior.attrs.items():
        # netCDF knows numbers, text and lists of one kind.
        plain[name] = value if isinstance(value, str | int | float) and not isinstance(value, bool) else str(value)
    return {
        **plain,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "pyro_latentde",
        "inference_library_version": __version__,
    }


def _dims_of(made: Groups, group: str) -> dict[str, list[str]]:
    return {name: made.dims.get(f"{group}:{name}", made.dims.get(name, [])) for name in made.data[group]}
