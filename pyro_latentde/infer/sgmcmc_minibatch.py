# SPDX-License-Identifier: Apache-2.0
"""The log-joint of many chains, estimated from another minibatch of series at each call."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.infer.batches import Batches
from pyro_latentde.infer.log_joint import LogJoint

__all__ = ["MinibatchLogJoint"]

_log = logging.getLogger("pyro_latentde")


class MinibatchLogJoint:
    r"""Unbiased estimates of log-joint and gradient at ``C`` rows, from B of N series at each call

    .. math:: \hat\ell(u) = \log p(\theta) + \frac NB \sum_{b=1}^B \log p(y_b \mid \theta)
        + \log \left| \det \partial \theta / \partial u \right|.

    The series are the first argument of the model, and ``lde.series_plate`` in it brings the scale. The tensors of the
    minibatch are inputs of the recorded operations, so that recording once is enough; a model that cannot be recorded
    runs by itself at each call, and one that cannot be vectorised, row after row.

    All rows get the same minibatch. Each row alone is then the chain that it would be by itself; only errors of the
    estimates are shared between rows, which their own noise soon forgets.

    Args:
        model: Pyro model; sites inside ``lde.series_plate`` are all observed.
        args: its arguments, a `Series` first.
        kwargs: its keyword arguments.
        batch_size: B.
        seed: seed of the minibatches.

    Attributes:
        joint: the log-joint of the minibatch at hand.
        engine, reason: ``"traced"``, ``"eager"`` or ``"loop"``, and why; after `prepare`.
        num_calls: calls so far.

    Raises:
        DataError: no series, or more in a batch than there are.
        LatentDEError: no plate that would bring the scale, or latent sites in it.

    Example:
        >>> import pyro.distributions as dist, pyro_latentde as lde
        >>> def model(series):
        ...     rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0).double(), 1.0))
        ...     with lde.series_plate(series):
        ...         lde.observe("obs", dist.Normal(rate * series.times[..., None], 1.0), series)
        >>> series = Series.from_tensors(torch.arange(4.0), torch.ones(6, 4, 1))
        >>> batched = MinibatchLogJoint(model, (series,), {}, batch_size=2, seed=0)
        >>> batched.prepare(np.zeros((3, 1)))
        >>> lp, grad, failed, steps = batched(np.zeros((3, 1)))
        >>> grad.tolist()
        [[36.0], [36.0], [36.0]]
    """

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], batch_size: int, seed: int) -> None:
        if not args or not isinstance(args[0], Series):
            got = type(args[0]).__name__ if args else "no argument"
            raise DataError(
                f"batch_size: minibatches are taken of a Series, the first argument of the model; got {got}.\n"
                "Try: lde.Series.from_tensors(times, values), or batch_size=None for all data at each step."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise DataError(f"batch_size: expected a whole number of series or None, got {batch_size!r}")
        self._batches = Batches(args[0], batch_size, seed=seed)
        self._series: Series = args[0]
        self._seed = seed

        def at_hand(*rest: Any, **options: Any) -> Any:
            return model(self._series, *rest, **options)

        self.joint = LogJoint(at_hand, tuple(args[1:]), kwargs)  # whole series: its checks refuse minibatches
        self._template = copy.copy(self._batches.example())
        # gaps of one batch must not be missed in the record of another
        object.__setattr__(self._template, "complete", args[0].complete)
        self._series = self._template
        if batch_size < len(args[0]):
            self._check_plates()
        self.engine, self.reason, self.num_calls = "", "", 0

    def prepare(self, probe: np.ndarray) -> None:
        """Choose the engine with rows ``(C, d)``; later calls must have this shape."""
        self.engine, self.reason, self._call = self._build(self._rows(probe))
        tell = _log.info if self.engine == "traced" else _log.warning
        tell("log-joint engine %r: %s", self.engine, self.reason)

    def __call__(self, u: np.ndarray) -> tuple[list[float], np.ndarray, list[bool], list[int]]:
        """Log-densities, gradients ``(C, d)`` in float64, failed flags and solver steps, by the next minibatch."""
        batch = self._batches.take(self.num_calls)
        self.num_calls += 1
        with torch.inference_mode(self.engine == "traced"):
            lp, grad, failed, steps = self._call(self._rows(u), *_tensors(batch).values())
        return lp.tolist(), grad.to("cpu", torch.float64).numpy(), failed.tolist(), steps.tolist()

    def state(self) -> dict[str, Any]:
        """Which minibatches are left, as tensors and plain types."""
        return {"num_calls": self.num_calls, "batches": self._batches.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.num_calls = state["num_calls"]
        self._batches.load(state["batches"])

    def gradient_variance(self, u: np.ndarray, num_batches: int = 16) -> np.ndarray:
        """Variance ``(d,)`` of the gradient over random minibatches, the mean over the rows ``(C, d)``.

        They come from a random stream of their own. Rows whose density is not finite are left out.
        """
        series, grads = self._batches.series, []
        generator = torch.Generator().manual_seed(self._seed + 1)
        for _ in range(num_batches):
            index = torch.randperm(len(series), generator=generator)[: len(self._template)]
            with torch.inference_mode(self.engine == "traced"):
                lp, grad, *_ = self._call(self._rows(u), *_tensors(series.batch(index)).values())
            grads.append(torch.where(torch.isfinite(lp)[:, None], grad, torch.nan))
        variance = torch.stack(grads).var(0)
        return variance.nanmean(0).nan_to_num(0.0).to("cpu", torch.float64).numpy()

    def _rows(self, u: np.ndarray) -> Tensor:
        return torch.from_numpy(u).to(self.joint.device, self.joint.dtype)

    def _on(self, method: Callable) -> Callable:
        """The log-joint as a function of rows and of the tensors of a minibatch."""

        def call(u: Tensor, *data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            # put together by hand: checks would look at the values of tensors that are being recorded
            self._series = copy.copy(self._template)
            for name, tensor in zip(_tensors(self._template), data, strict=True):
                object.__setattr__(self._series, name, tensor)
            lp, grad, (failed, steps) = method(u)
            return lp, grad, failed, steps

        return call

    def _build(self, u: Tensor) -> tuple[str, str, Callable]:
        eager, loop = self._on(self.joint.value_and_grad), self._on(self.joint.value_and_grad_in_a_loop)
        series, size = self._batches.series, len(self._template)
        first = tuple(_tensors(self._template).values())
        last = tuple(_tensors(series.batch(torch.arange(len(series) - size, len(series)))).values())
        try:
            expected = [eager(u, *first), eager(u + 0.1, *last)]
        except Exception as error:  # whatever the model does that vmap cannot
            loop(u, *first)  # a fault of the model itself is raised here, as it is
            return "loop", f"the model cannot be vectorised over chains ({_first_line(error)})", loop
        try:
            with pyro.validation_enabled(False):
                graph = make_fx(eager)(u, *first)
            traced = _replay(graph, (u, *first))
            with torch.inference_mode():
                got = [traced(u, *first), traced(u + 0.1, *last)]
        except Exception as error:
            return "eager", f"recording the model failed ({_first_line(error)})", eager
        for answer, right in zip(got, expected, strict=True):
            if not all(_close(a, b) for a, b in zip(answer[:2], right[:2], strict=True)):
                return "eager", "the record gives other numbers: does the model branch on values?", eager
        return "traced", "the model's operations are recorded with the minibatch as input", traced

    def _check_plates(self) -> None:
        trace = self.joint.sample_trace(seed=0)
        scaled = []
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or not any(_is_part(frame) for frame in node["cond_indep_stack"]):
                continue
            if not node["is_observed"]:
                raise LatentDEError(
                    f"batch_size: latent site {name!r} belongs to single series (it is inside lde.series_plate), and a "
                    "minibatch says nothing of the others.\n"
                    "Try: batch_size=None, infer.nuts, or infer.fit_svi with a guide that reads the series."
                )
            scaled.append(name)
        if not scaled:
            raise LatentDEError(
                "batch_size: no observed site of the model is inside lde.series_plate(series), so nothing would make "
                f"{len(self._template)} series count as {len(self._batches.series)}.\n"
                "Try: `with lde.series_plate(series): lde.observe(...)`, or batch_size=None."
            )


def _is_part(frame: Any) -> bool:
    return frame.full_size is not None and frame.size != frame.full_size


def _tensors(series: Series) -> dict[str, Tensor]:
    return {f.name: t for f in fields(series) if isinstance(t := getattr(series, f.name), Tensor)}


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if b.dtype == torch.float64 else 1e-3
    size = float(1 + b.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size)


def _replay(graph: torch.fx.GraphModule, example: tuple[Tensor, ...]) -> Callable:
    """The graph, run by TorchScript's interpreter where this torch still has it: a quarter of the time."""
    if not hasattr(torch.jit, "trace"):
        return graph
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            return torch.jit.trace(lambda *inputs: graph(*inputs), example, check_trace=False)
    except Exception:
        return graph


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
