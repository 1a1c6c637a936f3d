# SPDX-License-Identifier: Apache-2.0
"""Stochastic variational inference: fit a guide to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO

from pyro_latentde.data.series import Series
from pyro_latentde.infer.batches import Batches
from pyro_latentde.infer.devices import OneDevice, make_devices
from pyro_latentde.infer.fit import Fit
from pyro_latentde.infer.svi_heldout import HeldOut
from pyro_latentde.infer.svi_loop import Training
from pyro_latentde.infer.svi_modules import check_names, forget_gradients, quiet
from pyro_latentde.infer.svi_options import Options
from pyro_latentde.infer.svi_start import check_shapes, place_guide
from pyro_latentde.infer.svi_steps import Clip, Stepper, make_optimizer
from pyro_latentde.posterior import inspect_model
from pyro_latentde.posterior.model_sites import seeded

__all__ = ["Fit", "fit_svi"]

_SEED_OF_RANK = 1_000_003


def fit_svi(
    model: Callable,
    guide: Any,
    *args: Any,
    num_steps: int = 2000,
    seed: int = 0,
    optimizer: Any = "adam",
    learning_rate: float | Callable[[int], float] = 0.03,
    decay: float = 0.01,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | str | None = "auto",
    num_particles: int = 1,
    vectorize_particles: bool = False,
    elbo: ELBO | None = None,
    kl_weight: float | Callable[[int], float] = 1.0,
    max_skips: int = 20,
    start_at: Any = "auto",
    batch_size: int | None = None,
    window: int | Callable[[int], int] | None = None,
    heldout: Series | None = None,
    eval_every: int = 100,
    keep: str = "best",
    patience: int | None = None,
    precision: str = "32-true",
    accelerator: str | None = None,
    devices: Any = 1,
    strategy: str = "auto",
    num_nodes: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 10.0,
    log: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    r"""Fit a guide by maximising the evidence lower bound

    .. math:: \mathrm{ELBO}(\phi) = E_{q_\phi(\theta)}[\log p(y, \theta) - \log q_\phi(\theta)].

    Shapes are checked once. Then a step whose loss or gradient is not finite, as after a failed solve,
    leaves the parameters and the optimiser as they are and is counted.

    With `batch_size` and `window`, model and guide get a part of the :class:`.Series` that is their first argument,
    and ``lde.series_plate`` gives it the weight of the whole: B of N series in windows of W of T times count
    N / B * T / W each. The gradient is that of the mean over all batches and windows. Windows begin anywhere with the
    same chance, so times in the middle are in more windows than those at the ends.

    Args:
        model: Pyro model.
        guide: an AutoGuide, a PyroModule or a function, or a class of AutoGuide, which is made for the model.
        *args: arguments of the model and the guide, data included.
        num_steps: number of updates.
        seed: seed of everything random.
        optimizer: name, class or factory of a torch optimiser, or one of ``pyro.optim``.
        learning_rate: its rate at the start, for names and classes; or a schedule, step -> rate, for all.
        decay: in the second half the rate falls exponentially to this fraction of itself. Without effect beside a
            schedule or a scheduler.
        scheduler: factory of a torch scheduler, called with the optimiser; stepped after each update.
        clip: bound on the gradient's norm; "auto" is ten times the median of the last hundred; None is none.
        num_particles: draws of the guide for each step.
        vectorize_particles: all particles in one run of the model, by a batch dimension on the left, which
            the model must allow. Eight particles then cost little more than one where solves are batched, and
            guides with correlations need them.
        elbo: Pyro's loss, instead of ``Trace_ELBO``; brings its own particles.
        kl_weight: weight of the KL in what is maximised, or a schedule, see :class:`.KLWeight`. Reported ELBOs have it
            at full weight.
        max_skips: so many skipped updates one after another end the run.
        start_at: where an AutoGuide that was given no start of its own begins: ``"auto"`` is the best of some
            climbs from prior draws, since posteriors of differential equations have worthless modes beside
            the good one; a dictionary of site values; or None, for what Pyro does.
        batch_size: series in a minibatch, over all devices; None is all.
        window: times in a random window of each series; a schedule, step -> times, such as
            ``schedules.progressive``; None is all.
        heldout: series whose ELBO is computed as training goes on, with the same random numbers each time. What
            is in ``lde.series_plate`` is weighted by the ratio of observed values, so that it compares with the ELBO of
            the training series, and differs by what was not learned, not by what was not counted.
        eval_every: steps between two such evaluations.
        keep: "best" or "last" parameters, by the held-out ELBO.
        patience: evaluations without a better ELBO that end the run; None never does.
        precision: ``"32-true"``: model and data keep their dtypes; ``"bf16-mixed"``: networks may compute in
            bfloat16, distributions do not.
        accelerator: of Lightning Fabric, such as ``"cpu"`` or ``"cuda"``; None is where the data are.
        devices: number or list of devices. Each is a process, which runs the same script.
        strategy: of Lightning Fabric; ``"ddp"`` for several processes, ``torchrun`` is understood.
        num_nodes: number of machines.
        checkpoint: folder of the run's checkpoint. If there is one, the run goes on from it, to the same end.
        checkpoint_every: minutes between checkpoints; one is made at the end and at an interrupt in any case.
        log: folder or ``.csv`` file for one line per step, see :class:`.TrainingLog`.
        progress: show a bar.
        **kwargs: keyword arguments of the model and the guide.

    Returns:
        The fit; ``losses`` are negative ELBOs of the whole data set in nats. Ctrl-C returns the fit so far, with
        ``attrs["interrupted"]``.

    Raises:
        InitError: no step at all was finite.
        LatentDEError: ``max_skips`` in a row; the parameters are put back to where they were last finite,
            and the fit so far is the error's attribute ``fit``.
        CheckpointError: the folder's checkpoint is of another run; the difference is named.
        DataError: a batch or window larger than the data, or minibatches of something that is no `Series`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit = fit_svi(model, AutoNormal, torch.ones(9), num_steps=500, progress=False)
        >>> round(fit.posterior(1000)["mu"].mean().item(), 1)  # exactly 9 / (9 + 1)
        0.9
    """
    options = Options.pick(locals(), args)
    check_names(model, guide)
    forget_gradients(model, guide)
    where = make_devices(accelerator, devices, strategy, num_nodes, precision, args[0] if args else None)
    model, guide, args, kwargs = (where.place(thing) for thing in (model, guide, args, kwargs))
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    with seeded(seed), pyro.get_param_store().scope(state), quiet():
        run, guide = _prepare(model, guide, args, kwargs, options, where)
        with pyro.validation_enabled(False):
            trouble = run.run()
    losses = torch.tensor(run.losses, dtype=torch.float64)
    skipped, elapsed = int(losses.isnan().sum()), run.seconds
    attrs = {"inference": "svi", "seed": seed, "num_steps": num_steps, **run.attrs}
    attrs |= {"n_skipped": skipped, "sampling_time": elapsed}
    fit = Fit(losses, skipped, guide, model, args, kwargs, elapsed, attrs, state, run.stepper.params)
    if trouble is not None:
        trouble.fit = fit
        raise trouble
    return fit


def _prepare(
    model: Callable, guide: Any, args: tuple, kwargs: Mapping[str, Any], options: Options, where: OneDevice
) -> tuple[Training, Callable]:
    """Check model and guide on a small batch, and put the pieces of a run together."""
    batches, some = None, args
    in_parts = options.batch_size is not None or options.window is not None
    if in_parts or (where.world > 1 and args and isinstance(args[0], Series)):
        part = (options.seed, where.rank, where.world, options.num_steps)
        batches = Batches(args[0], options.batch_size, options.window, *part)
        some = (batches.example(), *args[1:])
    sites = inspect_model(model, *some, **kwargs)
    elbo = options.elbo
    if elbo is None:
        nesting = max((-plate.dim for site in sites.values() for plate in site.plates), default=0)
        # The particles are a plate of their own, to the left of all others.
        vectorize = options.vectorize_particles and options.num_particles > 1
        elbo = Trace_ELBO(options.num_particles, nesting + vectorize, vectorize_particles=vectorize)
    guide = place_guide(guide, model, args, kwargs, options.seed, options.start_at)
    with pyro.validation_enabled(False):
        check_shapes(elbo, model, guide, some, kwargs)
    if where.rank:
        torch.manual_seed(options.seed + _SEED_OF_RANK * where.rank)
    rate = options.learning_rate
    make = make_optimizer(options.optimizer, rate(0) if callable(rate) else rate)
    stepper = Stepper(elbo, model, guide, some, kwargs, make, Clip(options.clip), where, options.scheduler)
    heldout = None
    if options.heldout is not None:
        series, size = where.place(options.heldout), options.batch_size
        heldout = HeldOut(series, stepper, (model, guide), options.seed, size, options.patience, args[0])
    run = Training(stepper, options, batches, heldout, (model, guide))
    run.attrs["solver"] = sites.settings
    run.identify(args, dict(kwargs))
    return run, guide
