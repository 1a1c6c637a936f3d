# SPDX-License-Identifier: Apache-2.0
"""The command line, ``pyro-latentde``: one function for each command."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import torch
import typer

from pyro_latentde.demo import run_demo
from pyro_latentde.models import systems as zoo

__all__ = ["app", "demo", "main", "simulate", "systems"]

app = typer.Typer(
    name="pyro-latentde",
    help="Inference in latent differential-equation models, in Pyro.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    num_samples: Annotated[int, typer.Option(min=4, help="Draws of each chain.")] = 1000,
    num_warmup: Annotated[int, typer.Option(min=0, help="Iterations before them.")] = 1000,
    num_chains: Annotated[int, typer.Option(min=1, help="Number of chains.")] = 4,
) -> None:
    """Fit predator and prey to the lynx-hare data: a table, a netCDF file, numbers and figures."""
    run_demo(
        out,
        seed=seed,
        num_samples=num_samples,
        num_warmup=num_warmup,
        num_chains=num_chains,
        say=typer.echo,
    )


@app.command()
def systems() -> None:
    """List the systems of the zoo, with their states and the parameters that simulations use."""
    for name in zoo.__all__:
        system = _system(name)
        title = system.__doc__.splitlines()[0]
        values = ", ".join(f"{key} = {value:g}" for key, value in system.PARAMETERS.items())
        typer.echo(f"{name}: {title}\n    states      {', '.join(system.STATES)}\n    parameters  {values}")


@app.command()
def simulate(
    system: Annotated[str, typer.Argument(help="Name of a system; see `pyro-latentde systems`.")],
    out: Annotated[Path | None, typer.Option(help="CSV file; printed by default.")] = None,
    parameter: Annotated[list[str] | None, typer.Option(help="alpha=0.6; may be repeated.")] = None,
    stop: Annotated[float | None, typer.Option(help="Last time; the first is 0.")] = None,
    num_times: Annotated[int, typer.Option(min=2, help="Times from 0 to --stop.")] = 21,
    num_series: Annotated[int, typer.Option(min=1, help="Repeats of the experiment.")] = 1,
    missing: Annotated[float, typer.Option(help="Probability of a gap, below 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of noise and gaps.")] = 0,
) -> None:
    """Noisy measurements of a system as a long table: series, time and one column for each state."""
    times = None if stop is None else torch.linspace(0.0, stop, num_times, dtype=torch.float64)
    try:
        drawn = _system(system).simulate(
            times, parameters=_values(parameter), num_series=num_series, missing=missing, seed=seed
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    series = drawn.series
    noisy = series.values.masked_fill(~series.mask, float("nan"))
    table = pd.DataFrame(noisy.flatten(0, 1).numpy(), columns=list(series.names))
    table.insert(0, "time", series.times.flatten().numpy())
    table.insert(0, "series", torch.arange(len(series)).repeat_interleave(series.times.shape[1]).numpy())
    text = table.to_csv(out, index=False)
    typer.echo(text.rstrip() if out is None else f"{out}: {len(table)} rows of {series}")


def _system(name: str) -> ModuleType:
    if name not in zoo.__all__:
        raise typer.BadParameter(f"there is no system {name!r}; there are: {', '.join(zoo.__all__)}")
    return importlib.import_module(f"{zoo.__name__}.{name}")


def _values(parameters: list[str] | None) -> dict[str, float]:
    """["alpha=0.6"] -> {"alpha": 0.6}."""
    values = {}
    for text in parameters or ():
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--parameter expects NAME=NUMBER, such as alpha=0.6; got {text!r}") from None
    return values


def main() -> None:
    """Entry point of the command ``pyro-latentde``."""
    app()


if __name__ == "__main__":
    main()
