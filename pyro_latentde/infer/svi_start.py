# SPDX-License-Identifier: Apache-2.0
"""Where a guide begins: at the best of some climbs from prior draws, not at the prior's median."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible, init_to_median, init_to_value
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer.failed_draws import retry_failed
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.starts import find_starts
from pyro_latentde.posterior.model_sites import check_shape, kind_of

__all__ = ["check_shapes", "place_guide"]

_log = logging.getLogger("pyro_latentde")


def place_guide(
    guide: Any, model: Callable, args: tuple, kwargs: Mapping[str, Any], seed: int, start: Any = "auto"
) -> Callable:
    """Make a guide of a class of AutoGuide, and give an AutoGuide that has none a good start.

    Args:
        guide: class of AutoGuide, or a guide. One that was run before, or was made with an ``init_loc_fn``
            other than Pyro's defaults, and one that is no AutoGuide, stays as it is.
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        seed: seed of the search.
        start: ``"auto"``, a dictionary of site values, or None for Pyro's own start.

    Returns:
        The guide.
    """
    if isinstance(guide, type):
        guide = guide(model)
    messenger = _unused_start(guide) if start is not None else None
    if messenger is not None:
        values = dict(start) if isinstance(start, Mapping) else _search(model, args, kwargs, seed)
        if values:
            messenger.init_fn = init_to_value(values=values, fallback=init_to_median)
    return guide


class _FixedParameters(Messenger):
    """Parameters of the model at their present values: the search is over latent sites alone."""

    def _pyro_post_param(self, msg: dict[str, Any]) -> None:
        msg["value"] = msg["value"].detach()


def _unused_start(guide: Any) -> InitMessenger | None:
    """The handler by which an AutoGuide will choose its start, if that is to come and Pyro's default."""
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None:
        return None
    wrapped = getattr(guide.model, "func", None)  # Pyro keeps the handler in a partial around the model
    messenger = next(iter(getattr(wrapped, "args", ())), None)
    known = (init_to_median, init_to_feasible)
    return messenger if isinstance(messenger, InitMessenger) and messenger.init_fn in known else None


def _search(model: Callable, args: tuple, kwargs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Site values of the best start found; none where the log-joint is not one of fixed, continuous sites."""
    try:
        joint = LogJoint(_FixedParameters()(model), args, kwargs)
        return joint.constrain(torch.as_tensor(find_starts(joint, 1, seed)[0], dtype=joint.dtype))
    except InitError:
        raise
    except Exception as reason:  # such as discrete sites: the guide can do without the search
        _log.info("no search for a start of the guide: %s", reason)
        return {}


def check_shapes(elbo: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Pyro's own checks of sites, plates and shapes, at draws for which model and guide run through."""
    retry_failed(lambda _: _check_once(elbo, model, guide, args, kwargs))


def _check_once(elbo: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    with (
        pyro.settings.context(validate_infer=True),
        torch.no_grad(),
        warnings.catch_warnings(record=True) as found,
    ):
        warnings.simplefilter("always")
        elbo.loss(model, guide, *args, **kwargs)
    for warning in found:
        text = str(warning.message)
        if "vars in guide but not model" in text:
            raise LatentDEError(f"model and guide do not match: {text}. Is a site's name misspelt?")
        if not text.startswith("Encountered"):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if not (elbo.vectorize_particles and elbo.num_particles > 1):
        return
    # Pyro does not look left of the particles' dimension, where a wrong shape counts the data many times.
    with (
        torch.no_grad(),
        pyro.plate("num_particles_vectorized", elbo.num_particles, dim=-elbo.max_plate_nesting),
    ):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    for node in (*guide_trace.nodes.values(), *model_trace.nodes.values()):
        if kind_of(node) is not None:
            check_shape(node)
