# SPDX-License-Identifier: Apache-2.0
"""A fitted model and its guide, with what they are called with besides a series."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError

__all__ = ["Pair", "is_local"]


@dataclass(frozen=True)
class Pair:
    """A model and its guide.

    Args:
        model: called with a series and the further arguments; to be asked for observations at other times, also with
            ``times``, (T,) or (N, T).
        guide: called with a series and the further arguments.
        args: further arguments of both.
        kwargs: those that have a name.
        device: where the parameters are; None if there are none.
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | None = None

    def trace_model(
        self,
        series: Series,
        times: Tensor,
        given: Mapping[str, Tensor] | None = None,
        do: Mapping[str, Any] | None = None,
    ) -> poutine.Trace:
        """The model at other times, with given values of latent sites, and with those of an intervention.

        Raises:
            LatentDEError: the model takes no ``times``.
        """
        self._check_times()
        model = poutine.condition(poutine.uncondition(self.model), data=dict(given or {}))
        model = poutine.do(model, data=dict(do)) if do else model
        return self._trace(model, series, {**self.kwargs, "times": times})

    def trace_start(self, series: Series, given: Mapping[str, Tensor] | None = None) -> poutine.Trace:
        """The model at the first times alone, where the solve has nothing to do."""
        return self.trace_model(series, series.times[:, :1], given)

    def trace_guide(self, series: Series) -> poutine.Trace:
        """The guide at a series."""
        return self._trace(self.guide, series, self.kwargs)

    def _check_times(self) -> None:
        fn = inspect.unwrap(self.model)
        parameters = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters
        if "times" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise LatentDEError(
                f"the model takes ({', '.join(parameters)}), not the times at which to observe: write "
                "`def model(series, times=None)`, solve at `series.times if times is None else times`, and give "
                "lde.observe the series only if times is None, else None."
            )

    def _trace(self, fn: Callable, series: Series, kwargs: Mapping[str, Any]) -> poutine.Trace:
        with torch.no_grad(), pyro.validation_enabled(False):
            return poutine.trace(fn).get_trace(series, *self.args, **kwargs)


def is_local(node: dict[str, Any], plate: str) -> bool:
    """Whether a node of a trace is in the plate."""
    return any(frame.name == plate for frame in node["cond_indep_stack"])
