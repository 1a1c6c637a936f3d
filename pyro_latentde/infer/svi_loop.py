# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, skipped ones, evaluations, checkpoints, and how to go on after an interruption."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer import checkpoint
from pyro_latentde.infer.batches import Batches
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.svi_heldout import HeldOut
from pyro_latentde.infer.svi_modules import evaluating, fixed_tensors
from pyro_latentde.infer.svi_options import Options
from pyro_latentde.infer.svi_steps import Step, Stepper
from pyro_latentde.infer.training_log import TrainingLog

__all__ = ["CHECKPOINT", "Training"]

CHECKPOINT = "checkpoint.pt"
_FORMAT = "pyro_latentde training checkpoint 1"
_ADVICE = "Give another folder, or delete the file to begin anew."


class Training:
    """One run of variational inference.

    Args:
        stepper: model, guide, parameters and optimiser.
        options: what was asked for.
        batches: minibatches, or None for all data at each step.
        heldout: held-out series, or None.
        modules: model and guide as the user gave them.
    """

    def __init__(
        self, stepper: Stepper, options: Options, batches: Batches | None, heldout: HeldOut | None, modules: tuple
    ) -> None:
        self.stepper, self.options, self.batches, self.heldout = stepper, options, batches, heldout
        self.modules, self.devices = modules, stepper.devices
        self.losses: list[float] = []
        self.attrs: dict[str, Any] = {}
        self._recent: deque[bool] = deque(maxlen=50)
        self._in_a_row = self._skipped = self._saved = 0
        self._seconds, self._started = 0.0, time.perf_counter()
        self._shown: dict[str, float] = {}
        self._file = None if options.checkpoint is None else Path(options.checkpoint) / CHECKPOINT
        self._identity: dict[str, str] = {}

    def run(self) -> LatentDEError | None:
        """All steps that are left; what went wrong, if it had to stop."""
        options, first = self.options, self.devices.rank == 0
        if self._file is not None or self.devices.world > 1:
            with evaluating(*self.modules):
                self.stepper.meet_parameters()
            self.devices.make_equal(list(fixed_tensors(*self.modules).values()))
        if self._file is not None:
            self._resume()
        last_save = time.monotonic()
        log_path = options.log if first else None
        with (
            StopSignal() as stop,
            Progress(options.num_steps, "SVI", options.progress and first) as bar,
            TrainingLog(log_path, len(self.losses)) as log,
        ):
            while len(self.losses) < options.num_steps and not (self.heldout and self.heldout.exhausted):
                due = self._file is not None and time.monotonic() - last_save > 60 * options.checkpoint_every
                step = self._step((float(stop.wanted), float(due)))
                if not step.good and self._in_a_row == options.max_skips:
                    return self._trouble()
                self._record(step, log, bar)
                interrupted, due = (flag > 0 for flag in step.flags)
                if due:
                    self._save()
                    last_save = time.monotonic()
                if interrupted or (stop.wanted and self.devices.world == 1):
                    self.attrs["interrupted"] = len(self.losses)
                    break
        self._finish()
        return None

    @property
    def seconds(self) -> float:
        """Time of this run, and of what was done before it was resumed."""
        return self._seconds + time.perf_counter() - self._started

    def _step(self, flags: tuple[float, ...]) -> Step:
        number, stepper = len(self.losses), self.stepper
        if self.batches is not None:
            stepper.args = (self.batches.take(number), *stepper.args[1:])
        stepper.kl_weight.weight = self.options.weight(number)
        step = stepper.gradient(flags)
        self.losses.append(step.loss if step.good else math.nan)
        self._recent.append(not step.good)
        if step.good:
            stepper.update(step.norm, **self.options.rate(number))
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            self._skipped += 1
        return step

    def _record(self, step: Step, log: TrainingLog, bar: Progress) -> None:
        """Evaluate, write and show the step that was just made."""
        options, number = self.options, len(self.losses) - 1
        done, facts = number + 1, {}
        if self.heldout is not None and (done % options.eval_every == 0 or done == options.num_steps):
            facts["heldout_elbo"] = self.heldout.evaluate(number)
        if options.log is not None:
            if step.good:
                facts |= {"elbo": -step.loss, "reconstruction": step.reconstruction, "kl": step.kl}
            facts |= {"learning_rate": self.stepper.learning_rate, "kl_weight": options.weight(number)}
            log.write(step=number, seconds=self.seconds, grad_norm=step.norm, skipped=self._skipped, **facts)
        if step.good:
            now = {"ELBO": -step.loss, "reconstruction": step.reconstruction, "KL": step.kl}
            now = {name: value for name, value in now.items() if math.isfinite(value)}  # not all losses have all parts
            self._shown = {name: 0.95 * self._shown.get(name, value) + 0.05 * value for name, value in now.items()}
        if bar.due() or (options.progress and done == options.num_steps):
            shown = {name: f"{value:.4g}" for name, value in self._shown.items()}
            if self.heldout is not None and self.heldout.elbos:
                shown["held-out"] = f"{self.heldout.elbos[-1]:.4g}"
            bar.update(done, {**shown, "skipped": self._skipped})

    def _finish(self) -> None:
        if self._file is not None and len(self.losses) > self._saved:
            self._save()
        if self.heldout is None:
            return
        self.attrs |= {"heldout_steps": self.heldout.steps, "heldout_elbo": self.heldout.elbos}
        self.heldout.warn_if_useless()
        if self.heldout.exhausted:
            self.attrs["stopped_early"] = len(self.losses)
        if self.options.keep == "best" and self.heldout.best:
            self.heldout.restore_best()
            self.attrs["best_step"] = self.heldout.best_step

    def _trouble(self) -> LatentDEError:
        stepper, most, step = self.stepper, self.options.max_skips, len(self.losses) - 1
        try:
            cause = stepper.culprit()  # before the parameters go back to where nothing is wrong
        finally:
            stepper.restore()
        if len(self.losses) == most:
            return InitError(
                f"none of the first {most} steps had a finite loss and gradient: {cause}. "
                "Try: an AutoGuide with init_loc_fn=init_to_median or init_to_value(...), a smaller init_scale, "
                "or priors that keep out the values for which the model fails."
            )
        last = max((i for i, loss in enumerate(self.losses) if not math.isnan(loss)), default=-1)
        return LatentDEError(
            f"step {step}: {cause}. Skipped ({sum(self._recent)} of last {len(self._recent)}). "
            f"Stopping: {most} skips in a row; restored step {last}. "
            "Try: a smaller learning_rate, clip=1.0, or more particles; missing data belong in a mask."
        )

    def identify(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the data by which a checkpoint of the same run is known."""
        if self._file is not None:
            data = {"data": checkpoint.fingerprint(args, kwargs), "devices": str(self.devices.world)}
            self._identity = data | self.options.described()

    def _save(self) -> None:
        self._saved = len(self.losses)
        rngs = self.devices.gather(checkpoint.rng_state())
        if self.devices.rank:
            return
        content = {
            "format": _FORMAT,
            "identity": self._identity | self._parameters(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "seconds": self.seconds,
            "recent": list(self._recent),
            "in_a_row": self._in_a_row,
            "stepper": self.stepper.state(),
            "fixed": {name: tensor.clone() for name, tensor in fixed_tensors(*self.modules).items()},
            "batches": None if self.batches is None else self.batches.state(),
            "heldout": None if self.heldout is None else self.heldout.state(),
            "rng": rngs,
        }
        checkpoint.write(self._file, content)

    def _resume(self) -> None:
        exists = self.devices.gather(self._file.exists())[0]
        if not exists:
            return
        content = checkpoint.read(self._file, _FORMAT)
        checkpoint.compare(self._file, content["identity"], self._identity | self._parameters(), _ADVICE)
        self.stepper.load(content["stepper"])
        with torch.no_grad():
            for name, tensor in fixed_tensors(*self.modules).items():
                tensor.copy_(content["fixed"][name])
        self.losses = content["losses"].tolist()
        self._seconds, self._in_a_row = content["seconds"], content["in_a_row"]
        self._skipped = sum(map(math.isnan, self.losses))
        self._recent.extend(content["recent"])
        if self.batches is not None:
            self.batches.load(content["batches"])
        if self.heldout is not None:
            self.heldout.load(content["heldout"])
        self.attrs["resumed_at"] = self._saved = len(self.losses)
        checkpoint.set_rng_state(content["rng"][self.devices.rank])

    def _parameters(self) -> dict[str, str]:
        return {f"parameter {n}": f"{tuple(p.shape)} {p.dtype}" for n, p in self.stepper.params.items()}
