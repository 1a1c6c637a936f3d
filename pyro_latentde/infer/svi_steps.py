# SPDX-License-Identifier: Apache-2.0
"""Single steps of variational inference: gradients, clipping, skipped updates, and why one failed."""

from __future__ import annotations

import inspect
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.annealing import KLWeight, PartsOfELBO
from pyro_latentde.infer.devices import OneDevice
from pyro_latentde.infer.failed_draws import FAILURES, retry_failed
from pyro_latentde.posterior.model_sites import kind_of, seeded
from pyro_latentde.sites.ode_record import solve_record

__all__ = ["Clip", "Step", "Stepper", "make_optimizer"]

_TRIES_TO_FIND_CULPRIT = 10
_FUSED = ("cpu", "cuda")  # devices on which torch's optimisers have one kernel for all parameters


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


class KnownParameters(Messenger):
    """Keep parameters that were met before from the handlers of a training step, for which they are work and no news.

    The first of each run is let through: losses ask whether there is any.

    Args:
        known: the parameters met so far by name, filled by its owner.
    """

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.known, self.seen_one = known, False

    def __enter__(self) -> KnownParameters:
        self.seen_one = False
        return super().__enter__()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        msg["stop"] = self.seen_one and msg["name"] in self.known
        self.seen_one = True


@dataclass
class Step:
    """What one gradient said.

    Args:
        loss: negative ELBO in nats, with the KL at full weight; NaN if the step cannot be used.
        norm: norm of the gradient; likewise.
        reconstruction: expected log-likelihood of what was observed.
        kl: the rest of the ELBO, with its sign changed.
        flags: of all ranks; above zero where any of them raised one.
    """

    loss: float = math.nan
    norm: float = math.nan
    reconstruction: float = math.nan
    kl: float = math.nan
    flags: tuple[float, ...] = ()

    @property
    def good(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Stepper:
    """The model, the guide, the parameters met so far and their optimiser.

    Args:
        elbo: Pyro's loss.
        model: Pyro model.
        guide: Pyro guide.
        args: their arguments; a minibatch takes the place of the first.
        kwargs: their keyword arguments.
        make: parameters -> torch optimiser.
        clip: bound on the gradient's norm.
        devices: where it runs, and with whom gradients are averaged.
        scheduler: optimiser -> one of torch's schedulers of the learning rate.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        clip: Clip,
        devices: OneDevice | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        self.devices = OneDevice() if devices is None else devices
        self.parts, self.kl_weight = PartsOfELBO(elbo), KLWeight()
        self.params: dict[str, Tensor] = {}
        self.model, self.guide = (
            self.kl_weight(KnownParameters(self.params)(self.devices.wrap(program))) for program in (model, guide)
        )
        self.args, self.kwargs, self.make, self.clip = args, kwargs, make, clip
        self.make_scheduler, self.scheduler = scheduler, None
        self.groups: list[list[str]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.saved: dict[str, Tensor] = {}

    def gradient(self, flags: tuple[float, ...] = ()) -> Step:
        """Gradient of one draw of the guide, averaged over the ranks, and what goes with it."""
        step = self._own_gradient()
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        if self.devices.world > 1:
            step, grads = self._average(step, flags)
        else:
            step.flags = flags
        if not grads and math.isfinite(step.loss):
            raise LatentDEError("neither the guide nor the model has a parameter that the loss depends on")
        if grads:
            step.norm = float(torch.nn.utils.get_total_norm(grads))
        return step

    def meet_parameters(self) -> None:
        """Find the parameters by one run without gradients, for those who need them before the first step."""

        def run(seed: int) -> None:
            with torch.no_grad(), seeded(seed), poutine.trace(param_only=True) as capture, self.devices.autocast():
                self.parts.elbo.loss(self.model, self.guide, *self.args, **self.kwargs)
            self._add(capture.trace)

        retry_failed(run)

    def update(self, norm: float, factor: float | None = None, rate: float | None = None) -> None:
        """Move the parameters, with the learning rate multiplied by ``factor``, or set to ``rate``."""
        self._save()
        shrink = self.clip.factor(norm)
        if shrink < 1.0:
            for param in self.params.values():
                if param.grad is not None:
                    param.grad.mul_(shrink)
        for group in self.optimizer.param_groups:
            if rate is not None:
                group["lr"] = rate
            elif factor is not None:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    @property
    def learning_rate(self) -> float:
        """The rate of the last update, of the first group of parameters."""
        return math.nan if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def state(self) -> dict[str, Any]:
        """Parameters, optimiser and the rest, as tensors and plain types."""
        return {
            "params": {name: param.detach().clone() for name, param in self.params.items()},
            "groups": self.groups,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "saved": dict(self.saved),
            "norms": list(self.clip.norms),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, whose parameters must have been met."""
        known, self.groups, self.optimizer = dict(self.params), [], None
        for names in state["groups"]:
            self._give({name: known[name] for name in names})
        with torch.no_grad():
            for name, value in state["params"].items():
                self.params[name].copy_(value)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.saved = {name: value.to(self.params[name].device) for name, value in state["saved"].items()}
        self.clip.norms.extend(state["norms"])

    def restore(self) -> None:
        """Put the parameters back to where the loss and the gradient were last finite."""
        with torch.no_grad():
            for name, value in self.saved.items():
                self.params[name].copy_(value)

    def culprit(self) -> str:
        """What is not finite at the present parameters: a site, or the gradient of a parameter."""
        for _ in range(_TRIES_TO_FIND_CULPRIT):
            if math.isfinite(self._own_gradient().loss):
                bad = [n for n, p in self.params.items() if p.grad is not None and not p.grad.isfinite().all()]
                if bad:
                    return f"non-finite gradient for '{bad[0]}' (loss finite)"
                continue
            try:
                guide_trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
                model = poutine.replay(self.model, trace=guide_trace)
                model_trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
                reason = _bad_site(model_trace, "model") or _bad_site(guide_trace, "guide")
            except FAILURES as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                return reason
        return "non-finite loss or gradient"

    def _own_gradient(self) -> Step:
        for param in self.params.values():
            param.grad = None
        try:
            with poutine.trace(param_only=True) as capture, self.devices.autocast():
                loss = self.parts.elbo.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
        except FAILURES:
            return Step()
        self._add(capture.trace)
        weight = self.kl_weight.weight
        reconstruction, kl = self.parts.split(float(loss), weight)
        # Only annealing makes the loss another number than the ELBO.
        loss = float(loss) if weight == 1.0 else float(loss) + (1.0 - weight) * kl
        return Step(loss=loss, reconstruction=reconstruction, kl=kl)

    def _average(self, step: Step, flags: tuple[float, ...]) -> tuple[Step, list[Tensor]]:
        """One tensor of all gradients and numbers, so that a NaN on one rank is a NaN on all."""
        params = list(self.params.values())
        numbers = [step.loss, step.reconstruction, step.kl, *flags]
        if not math.isfinite(step.loss):
            numbers[:3] = [math.nan] * 3
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        dtype = torch.float64 if params[0].device.type != "mps" else torch.float32
        tail = torch.tensor(numbers, dtype=dtype, device=params[0].device)
        flat = self.devices.average(torch.cat([*(grad.flatten().to(dtype) for grad in grads), tail]))
        found, at = flat[-len(numbers) :].tolist(), 0
        for param in params:
            param.grad = flat[at : at + param.numel()].view_as(param).to(param.dtype)
            at += param.numel()
        step = Step(loss=found[0], reconstruction=found[1], kl=found[2], flags=tuple(found[3:]))
        return step, [param.grad for param in params]

    def _add(self, trace: poutine.Trace) -> None:
        new = {}
        for name, node in trace.nodes.items():
            value = node["value"]
            # Parameters of modules under `module_local_params` are the tensors themselves.
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if name not in self.params and leaf.requires_grad:
                new[name] = leaf
        if new:
            self.devices.make_equal(list(new.values()))
            self._give(new)

    def _give(self, new: dict[str, Tensor]) -> None:
        """Parameters to the optimiser, as one more group."""
        self.params.update(new)
        self.groups.append(list(new))
        if self.optimizer is None:
            self.optimizer = self.make(list(new.values()))
            self.scheduler = None if self.make_scheduler is None else self.make_scheduler(self.optimizer)
        else:
            self.optimizer.add_param_group({"params": list(new.values())})

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
        return lambda params: optimizer(params, lr=learning_rate, **_one_kernel(optimizer, params))
    if not callable(optimizer):
        raise ValueError(f"optimizer: expected a name, a class or a function of the parameters, got {optimizer!r}")
    return optimizer


def _one_kernel(optimizer: type, params: list[Tensor]) -> dict[str, bool]:
    """Ask torch to update all parameters in one kernel, where it has one: their loop takes longer than a small ODE."""
    known = "fused" in inspect.signature(optimizer).parameters
    return {"fused": True} if known and all(p.is_floating_point() and p.device.type in _FUSED for p in params) else {}


def _bad_site(trace: poutine.Trace, where: str) -> str | None:
    for name, node in trace.nodes.items():
        if solve_record(node) is not None and not node["value"].isfinite().all():
            rows = ~node["value"].isfinite().flatten(-node["fn"].event_dim).all(-1)
            return f"the solve of site '{name}' failed for {int(rows.sum())} of {rows.numel()} rows"
    for name, node in trace.nodes.items():
        if kind_of(node) is None:
            continue
        value = node["fn"].log_prob(node["value"]).detach()
        if not value.isfinite().all():
            worst = float(value[~value.isfinite()].flatten()[0])
            return f"log-density of site '{name}' of the {where} is {worst}"
    return None
