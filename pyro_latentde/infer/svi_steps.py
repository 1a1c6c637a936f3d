# SPDX-License-Identifier: Apache-2.0
"""Single steps of variational inference: gradients, clipping, skipped updates, and why one failed."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_latentde.errors import LatentDEError, SolveError
from pyro_latentde.posterior.model_sites import kind_of

__all__ = ["Clip", "Stepper", "make_optimizer"]

_TRIES_TO_FIND_CULPRIT = 10


class Clip:
    """Bound on the norm of the gradient: a number, none, or ten times the median of the last hundred norms.

    References:
        Seetharaman et al., "AutoClip: adaptive gradient clipping for source separation networks", 2020.
    """

    def __init__(self, bound: float | str | None) -> None:
        if not (bound is None or bound == "auto" or (isinstance(bound, int | float) and bound > 0)):
            raise ValueError(f"clip: expected 'auto', a positive norm or None, got {bound!r}")
        self.bound = bound
        self.norms: deque[float] = deque(maxlen=100)

    def factor(self, norm: float) -> float:
        """What to multiply a gradient of this norm with."""
        if self.bound is None:
            return 1.0
        bound = self.bound
        if bound == "auto":
            bound = 10.0 * statistics.median(self.norms) if self.norms else norm
            self.norms.append(norm)
        return 1.0 if norm <= bound else bound / norm


@dataclass
class Stepper:
    """The model, the guide, the parameters met so far and their optimiser.

    Args:
        elbo: Pyro's loss.
        model: Pyro model.
        guide: Pyro guide.
        args: their arguments.
        kwargs: their keyword arguments.
        make: parameters -> torch optimiser.
        clip: bound on the gradient's norm.
    """

    elbo: ELBO
    model: Callable
    guide: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    clip: Clip

    def __post_init__(self) -> None:
        self.params: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.saved: dict[str, Tensor] = {}

    def loss_and_gradient(self) -> tuple[float, float]:
        """Loss of one draw of the guide and the norm of its gradient; either is NaN when it is not finite."""
        for param in self.params.values():
            param.grad = None
        try:
            with poutine.trace(param_only=True) as capture:
                loss = self.elbo.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
        except (torch.linalg.LinAlgError, SolveError):
            return float("nan"), float("nan")
        self._add(capture.trace)
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        if not grads:
            raise LatentDEError("neither the guide nor the model has a parameter that the loss depends on")
        norm = float(torch.stack([grad.detach().norm() for grad in grads]).norm())
        return float(loss), norm

    def update(self, norm: float, factor: float) -> None:
        """Move the parameters, with the learning rate multiplied by ``factor``."""
        self._save()
        shrink = self.clip.factor(norm)
        if shrink < 1.0:
            for param in self.params.values():
                if param.grad is not None:
                    param.grad.mul_(shrink)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.optimizer.step()

    def restore(self) -> None:
        """Put the parameters back to where the loss and the gradient were last finite."""
        with torch.no_grad():
            for name, value in self.saved.items():
                self.params[name].copy_(value)

    def culprit(self) -> str:
        """What is not finite at the present parameters: a site, or the gradient of a parameter."""
        for _ in range(_TRIES_TO_FIND_CULPRIT):
            loss, norm = self.loss_and_gradient()
            if loss == loss and abs(loss) != float("inf"):
                bad = [n for n, p in self.params.items() if p.grad is not None and not p.grad.isfinite().all()]
                if bad:
                    return f"non-finite gradient for '{bad[0]}' (loss finite)"
                continue
            guide_trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            model = poutine.replay(self.model, trace=guide_trace)
            model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
            for trace, where in ((model_trace, "model"), (guide_trace, "guide")):
                reason = _bad_site(trace, where)
                if reason:
                    return reason
        return "non-finite loss or gradient"

    def _add(self, trace: poutine.Trace) -> None:
        new = []
        for name, node in trace.nodes.items():
            value = node["value"]
            # Parameters of modules under `module_local_params` are the tensors themselves.
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if name not in self.params and leaf.requires_grad:
                self.params[name] = leaf
                new.append(leaf)
        if new and self.optimizer is None:
            self.optimizer = self.make(new)
        elif new:
            self.optimizer.add_param_group({"params": new})

    def _save(self) -> None:
        for name, param in self.params.items():
            if name in self.saved:
                self.saved[name].copy_(param.detach())
            else:
                self.saved[name] = param.detach().clone()


def make_optimizer(optimizer: Any, learning_rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Factory of a torch optimiser from a name, a class, a factory, or one of Pyro's wrappers.

    Args:
        optimizer: ``"adam"``, ``torch.optim.AdamW``, a function of parameters, ``pyro.optim.Adam({...})``.
        learning_rate: for names and classes.

    Returns:
        Function of a list of parameters.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(optimizer, str):
        classes = {name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)}
        if optimizer.lower() not in classes or optimizer.lower() == "optimizer":
            raise ValueError(f"optimizer: torch.optim has no {optimizer!r}; try 'adam', 'adamw' or 'sgd'")
        optimizer = classes[optimizer.lower()]
    if isinstance(optimizer, pyro.optim.PyroOptim):
        if callable(optimizer.pt_optim_args):
            raise ValueError("optimizer: Pyro's per-parameter options are not supported; give a torch optimiser")
        constructor, options = optimizer.pt_optim_constructor, dict(optimizer.pt_optim_args)
        return lambda params: constructor(params, **options)
    if isinstance(optimizer, type):
        return lambda params: optimizer(params, lr=learning_rate)
    if not callable(optimizer):
        raise ValueError(f"optimizer: expected a name, a class or a function of the parameters, got {optimizer!r}")
    return optimizer


def _bad_site(trace: poutine.Trace, where: str) -> str | None:
    for name, node in trace.nodes.items():
        if kind_of(node) == "ode" and not node["value"].isfinite().all():
            rows = ~node["value"].isfinite().flatten(-2).all(-1)
            return f"the solve of site '{name}' failed for {int(rows.sum())} of {rows.numel()} rows"
    for name, node in trace.nodes.items():
        if kind_of(node) is None:
            continue
        value = node["fn"].log_prob(node["value"]).detach()
        if not value.isfinite().all():
            worst = float(value[~value.isfinite()].flatten()[0])
            return f"log-density of site '{name}' of the {where} is {worst}"
    return None
