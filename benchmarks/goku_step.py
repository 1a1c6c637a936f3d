# SPDX-License-Identifier: Apache-2.0
"""One training step of the published GOKU pendulum, 64 windows of 50 frames: the same networks with torchdiffeq.

The peer is written as its users write it: plain PyTorch, rk4 on the grid of the frames, and for the adjoint the
parameters as part of the state. It has the same weights, and from the same random numbers the same ELBO, which is
checked. The share of the solve is what a step loses when copies of z0 take its place, forward and backward.
"""

import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from pyro.infer import Trace_ELBO  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import mse_loss, softplus  # noqa: E402
from torchdiffeq import odeint, odeint_adjoint  # noqa: E402

from pyro_latentde.data.series import Series  # noqa: E402
from pyro_latentde.infer.svi_steps import Clip, Stepper, make_optimizer  # noqa: E402
from pyro_latentde.models import GOKU  # noqa: E402
from pyro_latentde.models.goku import Model  # noqa: E402
from pyro_latentde.models.systems import pendulum_pixels as pendulum  # noqa: E402

__all__ = ["run"]

BATCH, FRAMES, GAP, RATE = 64, 50, 0.05, 1e-3
RK4 = {"method": "rk4", "step_size": GAP}
SPREAD = torch.tensor([0.5, 1.5])
Step = Callable[[], float]


class _Still(Model):
    """The model with copies of z0 for a trajectory."""

    def _trajectory(self, z0: Tensor, grid: Tensor, params: object, times: Tensor | None) -> Tensor:
        return pyro.deterministic("z", z0[:, None].expand(-1, grid.shape[1], -1), event_dim=2)


def _pair(**settings: object) -> GOKU:
    torch.manual_seed(0)
    start = dist.Normal(torch.zeros(2), SPREAD).to_event(1)
    return GOKU(pendulum.vector_field, start, pendulum.priors()["theta"], values=784, **settings)


def _ours(videos: Series, still: bool = False, **settings: object) -> Step:
    """What `fit_svi` does for one step."""
    pair = _pair(**settings)
    if still:
        pair.model.__class__ = _Still
    adam = make_optimizer("adam", RATE)
    stepper = Stepper(Trace_ELBO(max_plate_nesting=1), pair.model, pair.guide, (videos,), {}, adam, Clip("auto"))
    state = {"params": {}, "constraints": {}}

    def step() -> float:
        with pyro.get_param_store().scope(state), pyro.validation_enabled(False):
            done = stepper.gradient()
            stepper.update(done.norm)
        return done.loss

    return step


class _Field(nn.Module):
    """The pendulum for all rows at once; the adjoint follows its length in the state."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        theta, omega, length = y.unbind(-1)
        return torch.stack([omega, -pendulum.GRAVITY / length * theta.sin(), torch.zeros_like(length)], dim=-1)


def _backprop(z0: Tensor, length: Tensor, times: Tensor) -> Tensor:
    def field(t: Tensor, y: Tensor) -> Tensor:
        theta, omega = y.unbind(-1)
        return torch.stack([omega, -pendulum.GRAVITY / length * theta.sin()], dim=-1)

    return odeint(field, z0, times, method="rk4").transpose(0, 1)


def _adjoint(z0: Tensor, length: Tensor, times: Tensor) -> Tensor:
    start = torch.cat([z0, length[:, None]], dim=-1)
    return odeint_adjoint(_Field(), start, times, method="rk4").transpose(0, 1)[..., :2]


def _copies(z0: Tensor, length: Tensor, times: Tensor) -> Tensor:
    return z0[:, None].expand(-1, len(times), -1)


class _Peer(nn.Module):
    """GOKU in plain PyTorch, around the networks of one of our pairs; its negative ELBO."""

    def __init__(self, pair: GOKU, solve: Callable[[Tensor, Tensor, Tensor], Tensor], times: Tensor) -> None:
        super().__init__()
        guide, self.times, self.solve = pair.guide, times, solve
        self.frames, self.decoder, self.heads = guide.frames, pair.model.decoder, guide.heads
        self.reader = guide.encoders["z0"].directions["from_end"]
        self.lstm_back, self.lstm = (guide.encoders["theta"].directions[name] for name in ("from_end", "from_start"))
        self.likelihood = pair.model.likelihood
        gaps = torch.full((BATCH, len(times), 1), GAP)
        gaps[:, 0] = 0.0
        self.rest = torch.cat([torch.ones(BATCH, len(times), guide.frames.out_features), gaps], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.frames(x)
        forth, back = (torch.cat([f, self.rest], dim=-1) for f in (features, features.flip(1)))
        free, log_q = self._draw("z0", self.reader(back)[0][:, -1])
        z0 = SPREAD * free  # the guide works in the prior's units
        log_q = log_q - len(x) * SPREAD.log().sum()
        summary = torch.cat([self.lstm_back(back)[0][:, -1], self.lstm(forth)[0][:, -1], free], dim=-1)
        code, log_q_code = self._draw("theta", summary)
        unit = code[:, 0].sigmoid()
        log_jacobian = -softplus(-code[:, 0]) - softplus(code[:, 0])  # of the draw from (0, 1); the width is 1
        z = self.solve(z0, 1.0 + unit, self.times)
        log_sd = self.likelihood.log_sd
        squares = mse_loss(self.decoder(z), x, reduction="sum")
        log_lik = -0.5 * squares / log_sd.exp() ** 2 - x.numel() * (log_sd + 0.5 * math.log(2 * math.pi))
        log_prior = -0.5 * ((z0 / SPREAD) ** 2).sum() - len(x) * (SPREAD.log().sum() + math.log(2 * math.pi))
        return log_q + log_q_code - log_jacobian.sum() - log_prior - log_lik

    def _draw(self, name: str, context: Tensor) -> tuple[Tensor, Tensor]:
        """A draw of a normal with full covariance, and its log-density, all rows together."""
        head = self.heads[name]
        loc, sd = head.loc(context), softplus(head.scale(context)) + 1e-6
        noise = torch.randn_like(loc)
        x = sd * noise
        if head.below is not None:  # two numbers: one correlation
            x = torch.stack([x[:, 0], x[:, 1] + sd[:, 1] * head.below(context)[:, 0] * noise[:, 0]], dim=-1)
        log_q = -0.5 * (noise**2).sum() - sd.log().sum() - 0.5 * noise.numel() * math.log(2 * math.pi)
        return loc + x, log_q


def _theirs(videos: Series, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    peer = _Peer(_pair(), solve, videos.times[0])
    optimizer = torch.optim.Adam(peer.parameters(), lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = peer(videos.values)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


VARIANTS = {
    "ours": lambda videos: _ours(videos),
    "ours_rk4": lambda videos: _ours(videos, **RK4),
    "ours_no_ode": lambda videos: _ours(videos, still=True),
    "backprop": lambda videos: _theirs(videos, _backprop),
    "adjoint": lambda videos: _theirs(videos, _adjoint),
    "peer_no_ode": lambda videos: _theirs(videos, _copies),
}
SOLVING = ("ours", "ours_rk4", "backprop", "adjoint")


def _videos() -> Series:
    return pendulum.simulate(BATCH, num_times=FRAMES, step=GAP).series


def _check_equal(steps: dict[str, Step]) -> None:
    """The first three losses of all variants that solve, from the same weights and random numbers."""
    losses = {}
    for name in SOLVING:
        torch.manual_seed(1)
        losses[name] = torch.tensor([steps[name]() for _ in range(3)])
    for name, found in losses.items():
        if not torch.allclose(found, losses["ours"], rtol=1e-4):
            raise RuntimeError(f"{name} computes another ELBO: {found.tolist()}, ours {losses['ours'].tolist()}")


def _rounds(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of single steps, all of them taking turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def _peak(variant: str) -> float:
    """MiB by which ten steps of a fresh process exceed what it had resident before, compiled kernels included."""
    done = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(seconds: float = 60.0) -> dict[str, dict[str, float]]:
    """Milliseconds by variant, on all cores and on one; how many times faster; the solve's share; peak MiB.

    Medians over the rounds, of ratios too: steps of one round share what else the machine was doing, and the best
    single step of fifty is a matter of luck.
    """
    videos, results = _videos(), {}
    steps = {name: make(videos) for name, make in VARIANTS.items()}
    _check_equal(steps)
    threads = torch.get_num_threads()
    for count in sorted({1, threads}, reverse=True):
        torch.set_num_threads(count)
        ms = _rounds(steps, seconds)

        def ratio(one: str, other: str, ms: dict[str, list[float]] = ms) -> float:
            return median(a / b for a, b in zip(ms[one], ms[other], strict=True))

        row = {f"{name}_ms": median(values) for name, values in ms.items()}
        row |= {f"ratio_{peer}": ratio(peer, "ours") for peer in ("backprop", "adjoint")}
        row |= {f"ode_share_{name}": 1 - ratio("ours_no_ode", name) for name in ("ours", "ours_rk4")}
        row |= {f"ode_share_{name}": 1 - ratio("peer_no_ode", name) for name in ("backprop", "adjoint")}
        bars = {"bar_backprop": 1.25, "bar_adjoint": 1.6, "bar_ode_share": 0.05} if count == threads else {}
        results[f"GOKU step, {count} threads" if count > 1 else "GOKU step, 1 thread"] = row | bars
    torch.set_num_threads(threads)
    results["GOKU step, peak memory"] = {f"{name}_mib": _peak(name) for name in SOLVING}
    return results


def _measure_peak(variant: str) -> None:
    # drawing frames would take more memory than a step
    videos = Series.from_tensors(GAP * torch.arange(FRAMES), torch.rand(BATCH, FRAMES, 784))
    step = VARIANTS[variant](videos)
    importlib.import_module("torch._dynamo")  # 37 MiB, which making an optimizer imports: sooner here, later there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    for _ in range(10):
        step()
    print(json.dumps(_resident("VmHWM") - before))


def _resident(what: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    _measure_peak(sys.argv[1])
