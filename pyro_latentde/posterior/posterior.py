# SPDX-License-Identifier: Apache-2.0
"""The posterior: draws of the latent sites, statistics of the sampler, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_latentde.errors import ShapeError
from pyro_latentde.posterior.model_sites import ModelSites, inspect_model

if TYPE_CHECKING:
    import pandas as pd

    from pyro_latentde.posterior.prediction import Prediction

__all__ = ["Posterior"]

# Draws of these are independent of each other: convergence diagnostics of chains mean nothing for them.
INDEPENDENT = ("svi", "prior")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Posterior:
    """Draws from a posterior (or from a prior, or from a guide), with everything needed to use them.

    Args:
        samples: latent site -> draws in the constrained space and the model's units,
            ``(chain, draw, *site shape)``.
        stats: statistic of the sampler under ArviZ's name (``lp``, ``diverging``, ...) -> ``(chain, draw)``.
        sites: what the model contains, from :func:`inspect_model`; None for draws without a model.
        model: the Pyro model, needed by :meth:`predict` and for log-likelihoods; never stored in files.
        args: arguments of the model, data included.
        kwargs: keyword arguments of the model.
        attrs: plain facts about the run, such as ``{"inference": "nuts", "seed": 0}``.

    Raises:
        ShapeError: tensors disagree about the number of chains or draws.

    Example:
        >>> import torch
        >>> p = Posterior(samples={"k": torch.ones(4, 100)}, attrs={"inference": "nuts"})
        >>> p
        Posterior(nuts, 4 chains x 100 draws: k)
        >>> p.draws()["k"].shape
        torch.Size([400])
    """

    samples: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    sites: ModelSites | None = None
    model: Callable | None = None
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ShapeError("a Posterior needs draws of at least one latent site; got none. Has the model any?")
        first = next(iter(self.samples))
        lead = tuple(self.samples[first].shape[:2])
        for name, value in [*self.samples.items(), *self.stats.items()]:
            if value.ndim < 2 or tuple(value.shape[:2]) != lead:
                raise ShapeError(
                    f"expected every tensor to start with (chain, draw) = {lead} as '{first}' does; "
                    f"got shape {tuple(value.shape)} for '{name}'"
                )

    def __repr__(self) -> str:
        text = f"{self.attrs.get('inference', 'draws')}, {self.num_chains} chains x {self.num_draws} draws"
        diverging = self.stats.get("diverging")
        if diverging is not None and diverging.any():
            text += f", {int(diverging.sum())} divergences"
        return f"Posterior({text}: {', '.join(self.samples)})"

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return next(iter(self.samples.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Number of draws of each chain."""
        return next(iter(self.samples.values())).shape[1]

    def __getitem__(self, name: str) -> Tensor:
        """Draws ``(chain, draw, *site shape)`` of one site."""
        return self.samples[name]

    def draws(self) -> dict[str, Tensor]:
        """All draws with chains joined, chain after chain: site -> ``(chain * draw, *site shape)``."""
        return {name: value.flatten(0, 1) for name, value in self.samples.items()}

    def select(
        self,
        names: Sequence[str] | None = None,
        chains: Sequence[int] | slice | None = None,
        draws: Sequence[int] | slice | None = None,
    ) -> Posterior:
        """The same posterior with some of its sites, chains or draws: ``draws=slice(None, None, 10)``.

        Args:
            names: latent sites to keep.
            chains: indices of chains, or a slice.
            draws: indices of draws, or a slice, the same for each chain.

        Returns:
            A new Posterior; the tensors are views where slices allow it.

        Raises:
            ShapeError: a name that is not among the samples.
        """
        missing = [name for name in names or () if name not in self.samples]
        if missing:
            raise ShapeError(f"no draws of {missing}; the sites are {list(self.samples)}")

        def cut(value: Tensor) -> Tensor:
            for dim, index in ((0, chains), (1, draws)):
                if index is not None:
                    index = index if isinstance(index, slice) else torch.as_tensor(index)
                    value = value[(slice(None),) * dim + (index,)]
            return value

        samples = {name: cut(self.samples[name]) for name in (self.samples if names is None else names)}
        return replace(self, samples=samples, stats={name: cut(value) for name, value in self.stats.items()})

    def thin(self, num_draws: int) -> Posterior:
        """At most ``num_draws`` draws in all, evenly spaced in each chain."""
        per_chain = max(1, -(-num_draws // self.num_chains))
        if per_chain >= self.num_draws:
            return self
        return self.select(draws=torch.linspace(0, self.num_draws - 1, per_chain).round().long().tolist())

    def summary(self, names: Sequence[str] | None = None, probs: Sequence[float] = (0.05, 0.5, 0.95)) -> pd.DataFrame:
        """A row for each scalar: mean, sd, quantiles, and R-hat and effective sample sizes by ArviZ.

        Args:
            names: latent sites, all by default.
            probs: probabilities of the quantiles.

        Returns:
            Table indexed by ``name[coordinate]``; draws of a guide or of the prior are independent and get
            no ``r_hat``, ``ess_bulk`` and ``ess_tail``.
        """
        from pyro_latentde.posterior.arviz_export import summary_table

        return summary_table(self if names is None else self.select(names), probs)

    def to_arviz(self, groups: Sequence[str] | None = None, **options: Any) -> Any:
        """``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x); options of :func:`.arviz_export.to_arviz`."""
        from pyro_latentde.posterior.arviz_export import to_arviz

        return to_arviz(self, groups, **options)

    def predict(self, times: Tensor | Sequence[float] | None = None, **options: Any) -> Prediction:
        """Trajectories and new observations for the draws; options as in :func:`.prediction.predict`."""
        from pyro_latentde.posterior.prediction import predict

        return predict(self, times, **options)

    def log_likelihood(self, memory: str | int = "1GB") -> dict[str, Tensor]:
        """Pointwise log-likelihood: observed site -> ``(chain, draw, *batch)``, event dimensions summed."""
        from pyro_latentde.posterior.prediction import log_likelihood

        return log_likelihood(self, memory=memory)

    def save(self, path: str | Path) -> Path:
        """Write one netCDF file; as in :func:`.storage.save`."""
        from pyro_latentde.posterior.storage import save

        return save(self, path)

    @staticmethod
    def load(
        path: str | Path,
        model: Callable | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Posterior:
        """Read a file made by :meth:`save`; as in :func:`.storage.load`."""
        from pyro_latentde.posterior.storage import load

        return load(path, model=model, args=args, kwargs=kwargs)

    @staticmethod
    def from_pyro(
        source: Any, model: Callable, *args: Any, num_samples: int = 1000, seed: int = 0, **kwargs: Any
    ) -> Posterior:
        """Posterior from Pyro's own results.

        Args:
            source: a ``pyro.infer.MCMC`` that has run, or a guide (an AutoGuide, a PyroModule or a function).
            model: the model it was made with.
            *args: arguments of the model (and of the guide).
            num_samples: draws taken from a guide; an MCMC gives all it has.
            seed: seed of those draws.
            **kwargs: keyword arguments of the model.

        Returns:
            The posterior, with ``diverging`` where Pyro knows it.
        """
        from pyro_latentde.posterior.pyro_import import from_guide, from_mcmc

        if hasattr(source, "get_samples"):
            return from_mcmc(source, model, args, kwargs)
        return from_guide(source, model, args, kwargs, num_samples=num_samples, seed=seed)

    def with_model(self, model: Callable, *args: Any, **kwargs: Any) -> Posterior:
        """The same draws with a model and its arguments, for a posterior that was loaded without them."""
        sites = inspect_model(model, *args, **kwargs).solved_with({} if self.sites is None else self.sites.settings)
        return replace(self, sites=sites, model=model, args=args, kwargs=kwargs)
