# SPDX-License-Identifier: Apache-2.0
"""Checks of a model before inference: each fault is told once, with the name of the site."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_latentde.errors import DataError, LatentDEError, ShapeError

__all__ = ["check_observed", "check_plates"]


def check_plates(name: str, node: dict[str, Any]) -> None:
    """Refuse a site in a subsampled plate: its log-density would change at random from call to call."""
    for frame in node["cond_indep_stack"]:
        full = frame.full_size
        if full is not None and frame.size != full:
            raise LatentDEError(
                f"site {name!r} is in plate {frame.name!r}, which takes {frame.size} of {full} rows at "
                "random; NUTS needs the whole data.\n"
                "Try: pass subsample_size=None here, or infer.fit_svi for minibatches."
            )


def check_observed(trace: poutine.Trace) -> None:
    """Check shapes and support of the observed values of a trace; masked values are not judged.

    Raises:
        ShapeError: prediction and data do not fit, or would be compared all with all.
        DataError: a value outside the support of its distribution.
    """
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or node["infer"].get("_deterministic"):
            continue
        fn, value = node["fn"], node["value"]
        if not isinstance(value, Tensor) or not hasattr(fn, "event_dim"):
            continue
        data_batch = value.shape[: value.dim() - fn.event_dim]
        described = f"site {name!r}: the model predicts {_shape_text(fn)} but the data is {tuple(value.shape)}"
        try:
            log_prob = scale_and_mask(fn.log_prob(value), node["scale"], node["mask"])
        except (RuntimeError, ValueError) as error:
            raise ShapeError(f"{described}.{_transpose_hint(fn, value)}\n({error})") from error
        if log_prob.shape not in (data_batch, fn.batch_shape):
            raise ShapeError(
                f"{described}: together they would broadcast to {tuple(log_prob.shape)} comparisons."
                f"{_transpose_hint(fn, value)}"
            )
        _check_support(name, fn, value, node["mask"])


def _check_support(name: str, fn: Any, value: Tensor, mask: Tensor | bool | None) -> None:
    try:
        inside = fn.support.check(value)
    except NotImplementedError:
        return
    scored = torch.ones_like(inside)
    for part in (mask, getattr(fn, "_mask", None)):  # of the site, and of a distribution made by .mask()
        if part is not None:
            scored = scored & torch.as_tensor(part, dtype=torch.bool, device=inside.device)
    outside = int((~inside & scored).sum())
    if outside:
        first = value[~inside & scored].reshape(-1)[0].item()
        raise DataError(
            f"site {name!r}: {outside} of {inside.numel()} observed values lie outside the support of "
            f"{type(fn).__name__} ({fn.support}); the first is {first:.6g}.\n"
            "Try: check units and missing values (mask them), or another distribution."
        )


def _shape_text(fn: Any) -> str:
    batch, event = (", ".join(map(str, shape)) for shape in (fn.batch_shape, fn.event_shape))
    return f"(batch {batch} | event {event})" if event else f"(batch {batch})"


def _transpose_hint(fn: Any, value: Tensor) -> str:
    expected = tuple(fn.batch_shape + fn.event_shape)
    for i in range(value.dim()):
        for j in range(i):
            if tuple(value.transpose(i, j).shape) == expected:
                return f" Did you mean data.transpose({j}, {i})?"
    return ""
