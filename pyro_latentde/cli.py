# SPDX-License-Identifier: Apache-2.0
"""The command line, ``pyro-latentde``: one function for each command."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from pyro_latentde.data.series import Series
from pyro_latentde.demo import run_demo
from pyro_latentde.errors import LatentDEError
from pyro_latentde.fitting import METHODS, fit_table, report_again
from pyro_latentde.models import systems as zoo
from pyro_latentde.models.systems.simulation import Simulation
from pyro_latentde.train import RECIPES
from pyro_latentde.train import train as run_training

__all__ = ["app", "demo", "fit", "main", "report", "simulate", "systems", "train"]

app = typer.Typer(
    name="pyro-latentde",
    help="Inference in latent differential-equation models, in Pyro.",
    no_args_is_help=True,
    add_completion=False,
)

_CHECKS = "Try out prior, chains and solver: some seconds, or up to about a third of the time of the fit."


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
        values = ", ".join(_describe(key, value) for key, value in system.PARAMETERS.items()) or "none"
        typer.echo(f"{name}: {title}\n    states      {', '.join(system.STATES)}\n    parameters  {values}")


def _describe(name: str, value: float | tuple[float, float]) -> str:
    """One number for all series, or the range from which each draws its own."""
    return f"{name} in [{value[0]:g}, {value[1]:g}]" if isinstance(value, tuple) else f"{name} = {value:g}"


@app.command()
def simulate(
    system: Annotated[str, typer.Argument(help="Name of a system; see `pyro-latentde systems`.")],
    out: Annotated[Path | None, typer.Option(help="A .npz file of arrays, or a CSV table; printed by default.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="alpha=0.6, or friction=0.7 for the pendulum; may be repeated.")
    ] = None,
    stop: Annotated[float | None, typer.Option(help="Last time; the first is 0.")] = None,
    num_times: Annotated[int | None, typer.Option(min=2, help="Number of times; to --stop, 21.")] = None,
    num_series: Annotated[int, typer.Option(min=1, help="Repeats of the experiment.")] = 1,
    missing: Annotated[float | None, typer.Option(help="Probability of a gap, below 1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Measurements of a system: a long table of series, time and a column for each value, or arrays of pictures."""
    simulator, values = _system(system).simulate, _values(parameter)
    if "parameters" in inspect.signature(simulator).parameters:
        times = None if stop is None else torch.linspace(0.0, stop, num_times or 21, dtype=torch.float64)
        options = {"times": times, "parameters": values, "num_series": num_series, "missing": missing or 0.0}
    else:
        given = {"stop": stop, "num_times": num_times, "missing": missing}
        options = {**values, **{name: value for name, value in given.items() if value is not None}}
        _refuse_unknown(system, simulator, options)
        options["n"] = num_series
    try:
        drawn = simulator(**options, seed=seed)
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None and out.suffix == ".npz":
        _write_arrays(drawn, out)
        typer.echo(f"{out}: {drawn.series}")
        return
    if drawn.series.names is None:
        raise typer.BadParameter(f"{system} has {drawn.series.num_values} values at each time; try --out {system}.npz")
    table = _table(drawn.series, getattr(_system(system), "COVARIATES", ()))
    text = table.to_csv(out, index=False)
    typer.echo(text.rstrip() if out is None else f"{out}: {len(table)} rows of {drawn.series}")


def _refuse_unknown(system: str, simulator: Callable, options: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(simulator).parameters if name not in ("n", "seed")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise typer.BadParameter(f"{system} does not take {', '.join(unknown)}; it takes {', '.join(known)}")


def _table(series: Series, covariates: Sequence[str]) -> pd.DataFrame:
    noisy = series.values.masked_fill(~series.mask, float("nan"))
    table = pd.DataFrame(noisy.flatten(0, 1).numpy(), columns=list(series.names))
    table.insert(0, "time", series.times.flatten().numpy())
    table.insert(0, "series", torch.arange(len(series)).repeat_interleave(series.times.shape[1]).numpy())
    for i, name in enumerate(covariates):
        table[name] = series.covariates[:, i].repeat_interleave(series.times.shape[1]).numpy()
    return table


def _write_arrays(drawn: Simulation, out: Path) -> None:
    """times, values (pictures in their shape), mask, covariates, states z, and the truth by name."""
    series = drawn.series
    values = series.values.unflatten(-1, series.frame) if series.frame else series.values
    arrays = {"times": series.times, "values": values, "mask": series.mask, "z": drawn.z, **drawn.truth}
    arrays |= {} if series.covariates is None else {"covariates": series.covariates}
    np.savez_compressed(out, **{name: array.numpy() for name, array in arrays.items()})


def _system(name: str) -> ModuleType:
    if name not in zoo.__all__:
        raise typer.BadParameter(f"there is no system {name!r}; there are: {', '.join(zoo.__all__)}")
    return importlib.import_module(f"{zoo.__name__}.{name}")


def _values(parameters: list[str] | None) -> dict[str, float]:
    """["alpha=0.6", "keep=50"] -> {"alpha": 0.6, "keep": 50}."""
    values = {}
    for text in parameters or ():
        name, _, value = text.partition("=")
        try:
            values[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise typer.BadParameter(f"--parameter expects NAME=NUMBER, such as alpha=0.6; got {text!r}") from None
    return values


@app.command()
def fit(
    system: Annotated[str, typer.Argument(help="Name of a system, or the path of a Python file with a model.")],
    data: Annotated[Path, typer.Option(help="CSV table: a row for each series and time; empty cells are missing.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; fit_output/SYSTEM-METHOD-SEED by default.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "nuts",
    series: Annotated[
        str | None, typer.Option(help="Column that tells series apart; `series` if there is one.")
    ] = None,
    time: Annotated[str, typer.Option(help="Column of the times.")] = "time",
    values: Annotated[str | None, typer.Option(help="Columns of the values, a,b; those of the system.")] = None,
    covariates: Annotated[
        str | None, typer.Option(help="Columns that are constant within a series, dose,weight; those of the system.")
    ] = None,
    replicates: Annotated[bool, typer.Option(help="Equal times in a series are repeated measurements.")] = False,
    num_samples: Annotated[int | None, typer.Option(min=4, help="Draws of each chain.")] = None,
    num_warmup: Annotated[int | None, typer.Option(min=0, help="Iterations before them.")] = None,
    num_chains: Annotated[int | None, typer.Option(min=1, help="Number of chains.")] = None,
    num_steps: Annotated[int | None, typer.Option(min=1, help="Updates of svi.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the same run, if the folder holds it.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run that the folder holds.")] = False,
    checks: Annotated[bool, typer.Option(help=_CHECKS)] = True,
) -> None:
    """Fit a system to a table: draws, a summary, figures and a report in one folder."""
    sizes = {"num_samples": num_samples, "num_warmup": num_warmup, "num_chains": num_chains, "num_steps": num_steps}
    try:
        fit_table(
            system,
            data,
            Path("fit_output") / f"{Path(system).stem}-{method}-{seed}" if out is None else out,
            method=method,
            time_column=time,
            series_column=series,
            values=_names(values),
            covariates=_names(covariates),
            replicates=replicates,
            options={name: size for name, size in sizes.items() if size is not None},
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            checks=checks,
            say=typer.echo,
        )
    except LatentDEError as error:
        raise typer.BadParameter(str(error)) from error


def _names(text: str | None) -> list[str] | None:
    """The names in a text like a,b."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `pyro-latentde fit`.")],
    checks: Annotated[bool, typer.Option(help=_CHECKS)] = True,
) -> None:
    """Make the summary, the figures and the report of a run again, from its draws."""
    try:
        typer.echo(report_again(folder, checks=checks, say=typer.echo))
    except LatentDEError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def train(
    name: Annotated[str | None, typer.Argument(help="Name of a recipe; none lists them.")] = None,
    config: Annotated[str, typer.Option(help="quick (minutes on two cores) or full.")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; train_output/NAME-CONFIG-SEED by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data, the networks and the training.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Other number of updates; schedules follow.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Number of devices, each a process.")] = 1,
    precision: Annotated[str, typer.Option(help="32-true or bf16-mixed.")] = "32-true",
    show: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Train a pair of model and guide on a system: weights, metrics and figures in one folder.

    The same command goes on with a run that was interrupted.
    """
    if name is None or show:
        for known, recipe in RECIPES.items():
            typer.echo(f"{known:{max(map(len, RECIPES))}}  {recipe.title}")
        return
    overrides = {} if steps is None else {"steps": steps}
    where = {"accelerator": device, "devices": devices, "precision": precision}
    try:
        run_training(name, config, out, seed=seed, overrides=overrides, say=typer.echo, **where)
    except (LatentDEError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


def main() -> None:
    """Entry point of the command ``pyro-latentde``."""
    app()


if __name__ == "__main__":
    main()
