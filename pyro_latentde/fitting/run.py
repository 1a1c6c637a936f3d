# SPDX-License-Identifier: Apache-2.0
"""From a table to a posterior: one folder with draws, numbers, figures and a report."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_latentde.data import Series
from pyro_latentde.errors import DataError, LatentDEError
from pyro_latentde.fitting.checks import check_model
from pyro_latentde.fitting.methods import find_method
from pyro_latentde.fitting.metrics import collect_metrics, in_one_line
from pyro_latentde.fitting.report import REPORT_FILES, data_text, write_report
from pyro_latentde.fitting.system import System, find_system
from pyro_latentde.fitting.table import Columns, choose_columns, read_series
from pyro_latentde.fitting.verdicts import judge
from pyro_latentde.infer import prior
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.arviz_export import series_labels

__all__ = ["fit_table", "report_again"]

_RUN = "run.json"
_FORMAT = "pyro_latentde fit"
_FILES = (_RUN, "data.csv", "system.py", "draws.nc", "posterior.nc", "metrics.json", "training.csv", *REPORT_FILES)
# Numbers of predictions and log-likelihoods in posterior.nc; more are left out, since draws.nc gives them again.
_MAX_NUMBERS = 20_000_000
_PRIOR_DRAWS = 1000


def fit_table(
    system: str,
    data: str | Path,
    out: str | Path,
    *,
    method: str = "nuts",
    time_column: str = "time",
    series_column: str | None = None,
    values: Sequence[str] | None = None,
    covariates: Sequence[str] | None = None,
    replicates: bool = False,
    options: Mapping[str, int] | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    checks: bool = True,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Fit a system to a long table: what ``pyro-latentde fit`` does.

    Written are ``posterior.nc`` (ArviZ), ``draws.nc`` (:meth:`.Posterior.load`), ``summary.csv``, ``metrics.json``,
    figures and ``report.html``; ``run.json``, ``data.csv`` and ``system.py`` are what the run was made of.

    Args:
        system: name of the zoo, or path of a Python file; see :func:`.find_system`.
        data: CSV file, a row for each series and time; an empty cell is a missing value.
        out: folder of the results.
        method: one of :data:`.METHODS`.
        time_column: column of the times.
        series_column: column that tells series apart; ``series`` where there is one.
        values: columns of the values; those of the system by default.
        covariates: columns that are constant within a series, in the order in which the model has them; likewise.
        replicates: equal times in a series are repeated measurements.
        options: sizes of the method that are not to be its defaults, such as ``{"num_samples": 500}``.
        seed: the one seed.
        resume: go on with the same run, if the folder holds it.
        overwrite: replace the run that the folder holds.
        checks: let :func:`.judge` tell whether the result can be believed.
        progress: show the bar.
        say: is given each line of text.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        LatentDEError: no such system or method, or a model that does not run on the data.
        DataError: a table that cannot be used, and where; or a folder that holds another run.
    """
    began, out, options = time.perf_counter(), Path(out), dict(options or {})
    way, found = find_method(method, options), find_system(system)
    known = found.covariates if covariates is None else covariates
    names = {"time": time_column, "values": values, "series": series_column, "covariates": known}
    columns = choose_columns(data, found.values, replicates=replicates, **names)
    series = read_series(data, columns)
    check_model(found, series, data, columns)
    facts = _facts(found, data, columns, method, options, seed)
    done = _claim(out, facts, resume, overwrite)
    if done is not None:
        say(f"{out} holds the results of this run: its report is made again")
        report_again(out, checks=checks, say=say)
        return done
    _keep_inputs(out, facts, found, data)
    say(f"{found.name}: {found.title}" if found.title else found.name)
    say(data_text(series, facts))
    if resume and not way.resumes:
        say(f"{method} has no checkpoints: it begins anew")
    started = time.perf_counter()
    posterior = way.fit(found.model, series, out, options, seed=seed, progress=progress)
    sampled = time.perf_counter() - started
    posterior.save(out / "draws.nc")
    before = prior(found.model, series, num_samples=_PRIOR_DRAWS, seed=seed)
    _export(posterior, before, series, seed).to_netcdf(str(out / "posterior.nc"))
    table = posterior.summary()
    metrics = collect_metrics(posterior, table)
    metrics |= {"method": method, "seed": seed, "sampling_seconds": sampled, "seconds": time.perf_counter() - began}
    _write_json(out / "metrics.json", metrics)
    verdicts = judge(posterior, series, metrics, out, seed=seed) if checks else []
    write_report(out, found, posterior, before, series, facts, metrics, verdicts)
    say("")
    say(table.to_string(float_format=lambda x: f"{x:.4g}"))
    say("")
    for line in (in_one_line(metrics), *verdicts):
        say(str(line))
    say(f"{out}/: report.html, posterior.nc, draws.nc, summary.csv, metrics.json and figures")
    return metrics


def report_again(folder: str | Path, *, checks: bool = True, say: Callable[[str], Any] = lambda _: None) -> Path:
    """Make summary, figures and ``report.html`` of a run again, from its draws: what ``pyro-latentde report`` does.

    Args:
        folder: of :func:`fit_table`. A user's system is run from the copy in the folder.
        checks: let :func:`.judge` tell whether the result can be believed.
        say: is given each of its verdicts.

    Returns:
        Path of the report.

    Raises:
        DataError: the folder holds no run that has ended.
        CheckpointError: its draws cannot be read.
    """
    folder = Path(folder)
    facts = _read_facts(folder)
    if facts is None:
        raise DataError(f"{folder} holds no run of `pyro-latentde fit`: there is no {_RUN} of one")
    for name in ("draws.nc", "metrics.json", "data.csv"):
        if not (folder / name).exists():
            raise DataError(f"{folder} has no {name}: the run has not ended. The command that began it, with --resume")
    beside = facts.get("system_folder")
    own = facts["system_hash"] is not None
    system = find_system(str(folder / "system.py") if own else facts["system"], beside and Path(beside))
    series = read_series(folder / "data.csv", Columns.of(facts["columns"]))
    posterior = Posterior.load(folder / "draws.nc", model=system.model, args=(series,))
    before = prior(system.model, series, num_samples=_PRIOR_DRAWS, seed=facts["seed"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    verdicts = judge(posterior, series, metrics, folder, seed=facts["seed"]) if checks else []
    for verdict in verdicts:
        say(str(verdict))
    return write_report(folder, system, posterior, before, series, facts, metrics, verdicts)


def _facts(
    system: System, data: str | Path, columns: Columns, method: str, options: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """By what two runs are told apart."""
    return {
        "format": _FORMAT,
        "system": system.name if system.path is None else system.path.name,
        "system_hash": None if system.path is None else _hash(system.path),
        "data": Path(data).name,
        "data_hash": _hash(data),
        "columns": columns.plain(),
        "method": method,
        "options": dict(options),
        "seed": seed,
    }


def _claim(out: Path, facts: Mapping[str, Any], resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Refuse a folder that holds something else; the metrics, if it holds this very run, ended."""
    there = sorted(name for name in _present(out))
    if overwrite and resume:
        raise DataError("--resume goes on with a run and --overwrite deletes it: give one of them")
    if not there:
        return None
    if overwrite:
        for name in there:
            _delete(out / name)
        return None
    found = _read_facts(out)
    if found is None:
        raise DataError(f"{out} holds files of something else ({', '.join(there[:4])}): give another folder by --out")
    other = [name for name in facts if found.get(name) != facts[name]]
    if other:
        shown = "; ".join(f"{name} {found.get(name)} (now {facts[name]})" for name in other[:4])
        raise DataError(
            f"{out} holds another run, made with {shown}. Give another folder by --out, or --overwrite to replace it"
        )
    if not resume:
        raise DataError(f"{out} holds this run already: --resume goes on with it, --overwrite begins anew")
    if not (out / "metrics.json").exists():
        return None
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return None if metrics["interrupted"] else metrics


def _present(out: Path) -> list[str]:
    """Files of ours, and those by the same names of others; nothing else in the folder is looked at."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder, or a name for one")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    return [n for n in names if n in _FILES or n.startswith(("trajectories-", "checkpoint"))]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _keep_inputs(out: Path, facts: Mapping[str, Any], system: System, data: str | Path) -> None:
    """Copies, so that the report can be made again whatever happens to the originals."""
    out.mkdir(parents=True, exist_ok=True)
    if Path(data).resolve() != (out / "data.csv").resolve():
        shutil.copyfile(data, out / "data.csv")
    beside = None
    if system.path is not None:
        beside = str(system.path.resolve().parent)
        if system.path.resolve() != (out / "system.py").resolve():
            shutil.copyfile(system.path, out / "system.py")
    _write_json(out / _RUN, {**facts, "system_folder": beside})


def _export(posterior: Posterior, before: Posterior, series: Series, seed: int) -> Any:
    """ArviZ's container; predictions only where the file stays small."""
    numbers = posterior.num_chains * posterior.num_draws * series.mask.numel()
    groups = None
    if numbers > _MAX_NUMBERS:
        groups = ["posterior", "sample_stats", "observed_data", "constant_data", "prior"]
        groups = groups if posterior.stats else [name for name in groups if name != "sample_stats"]
    return posterior.to_arviz(groups, prior=before, seed=seed, coords=series_labels(posterior))


def _read_facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("format") == _FORMAT else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _hash(path: str | Path) -> str:
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    except OSError as error:
        raise LatentDEError(f"{path} cannot be read: {error}") from error
