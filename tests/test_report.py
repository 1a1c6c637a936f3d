# SPDX-License-Identifier: Apache-2.0
"""The report of a fit: one page that needs nothing else, whose numbers are those of the files."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib.image
import pandas as pd
import pytest
import torch

from pyro_latentde.analysis import chain_report, plot_trajectories, solver_check
from pyro_latentde.data import Series
from pyro_latentde.fitting import figures, fit_table, report_again
from pyro_latentde.fitting.figures import MAX_SERIES, Picture, draw_figures, main_names
from pyro_latentde.fitting.html import render_report
from pyro_latentde.fitting.metrics import in_one_line, warnings_of
from pyro_latentde.fitting.system import find_system
from pyro_latentde.fitting.table import Columns, read_series
from pyro_latentde.fitting.verdicts import Verdict
from pyro_latentde.infer import prior
from pyro_latentde.models.systems import linear
from pyro_latentde.posterior import Posterior
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode

VOID = {"meta", "img"}
MODEL = '''"""Growth of <i>cells</i> & more."""
import pyro
import pyro.distributions as dist
import torch
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode

STATES = ("n<0>",)

def model(series):
    rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    with pyro.plate("dishes", len(series), dim=-1):
        start = pyro.sample("start", dist.Normal(torch.zeros(len(series), dtype=torch.float64), 3.0))
        z = ode("z", lambda t, y, p: p * y, start.unsqueeze(-1), series.times, rate, t0=0.0, states=STATES)
        observe("obs", lambda z: dist.Normal(z, 0.2), series, z)
'''


class Page(HTMLParser):
    """Tags in balance, attributes, texts, and numbers by table and row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], {}
        self.table = None
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = attrs["id"]
        if tag == "data":
            self.rows[self.table][-1][1].append(float(attrs["value"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-2:] == ["tr", "th"] and "tbody" in self.open:
            self.rows.setdefault(self.table, []).append((data, []))


def page_of(folder, **parts):
    """A page of almost nothing, and some parts."""
    return render_report(
        title="t",
        subtitle="",
        verdict="",
        warnings=[],
        summary=pd.DataFrame({"mean": [float("nan")]}, index=pd.Index(["k"], name="name")),
        numbers={"seconds": 2.5, "chains": None},
        settings={"dense_mass": True},
        data_text="",
        data_table=pd.DataFrame({"series": ["a"]}),
        pictures=[Picture(None, "Pairs", "Not drawn")],
        folder=folder,
        **parts,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two dishes with gaps, whose names would be tags if they were not escaped."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "growth.py").write_text(MODEL)
    rows = [("<script>alert(1)</script>", t, 1.0 * 2.0 ** (t / 4)) for t in range(5)]
    rows += [('B"&', t, 2.0 * 2.0 ** (t / 4)) for t in (0.0, 2.5)] + [('B"&', 3.0, None)]
    pd.DataFrame(rows, columns=["dish", "hour", "n<0>"]).to_csv(folder / "dishes & co.csv", index=False)
    out, said = folder / "out", []
    metrics = fit_table(
        str(folder / "growth.py"),
        folder / "dishes & co.csv",
        out,
        series_column="dish",
        time_column="hour",
        options={"num_samples": 25, "num_warmup": 40, "num_chains": 2},
        progress=False,
        say=said.append,
    )
    return out, metrics, (out / "report.html").read_text(encoding="utf-8"), said


def test_the_page_parses_and_refers_to_nothing_outside(run):
    page = Page(run[2])
    assert {tag for tag, _ in page.tags} & {"script", "link", "a", "iframe", "object", "form", "base"} == set()
    for tag, attrs in page.tags:
        assert not {name for name in attrs if name.startswith("on") or name in ("href", "srcset", "background")}, tag
        assert attrs.get("src", "data:").startswith("data:")
    lowered = run[2].lower()
    assert not [word for word in ("http:", "https:", "url(", "@import", "javascript:", "file:") if word in lowered]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_the_page_holds_every_figure(run):
    pictures = [attrs["src"] for tag, attrs in Page(run[2]).tags if tag == "img"]
    inside = sorted(base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in pictures)
    files = sorted(run[0].glob("*.png"))
    assert inside == sorted(path.read_bytes() for path in files)
    assert [path.stem for path in files] == ["pair", "prior_posterior", "trace", "trajectories-1", "trajectories-2"]
    for path in files:
        picture = matplotlib.image.imread(path)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.02  # not a blank page


def test_numbers_of_the_page_are_those_of_the_files(run):
    out, metrics, text, _ = run
    rows = Page(text).rows
    saved = json.loads((out / "metrics.json").read_text())
    assert saved == metrics
    numbers = {name: values[0] for name, values in rows["numbers"]}
    assert numbers["R-hat, greatest"] == saved["rhat_max"] and numbers["divergences"] == saved["divergences"]
    assert numbers["effective draws, least"] == saved["ess_min"] and numbers["draws of each"] == 25
    table = pd.read_csv(out / "summary.csv", index_col="name")
    assert [name for name, _ in rows["summary"]] == list(table.index)
    for name, values in rows["summary"]:
        assert values == pytest.approx(table.loc[name].to_list(), rel=1e-12)
        assert values[0] == saved["mean"][name] and values[5] == saved["rhat"][name]
    # the last row of the second dish is empty: two times, two values
    assert [values for _, values in rows["data"]] == [[0, 4, 5, 5, 0], [0, 2.5, 2, 2, 0]]


def test_the_verdicts_are_on_the_page_and_on_the_console(run):
    """Sentences to read, the printed reports behind a click, in text alone."""
    out, _, text, said = run
    page = Page(text)
    for about in ("prior", "chains", "solver"):
        (line,) = (line for line in said if line.startswith(f"{about}: "))
        assert line.removeprefix(about) in "".join(page.texts) and "\n" not in line
    assert [tag for tag, _ in page.tags].count("details") == [tag for tag, _ in page.tags].count("pre") == 3
    printed = [part for part in page.texts if "\n" in part and part.strip()]
    assert any(part.startswith("Stress test: ") for part in printed)
    series = read_series(out / "data.csv", Columns.of(json.loads((out / "run.json").read_text())["columns"]))
    posterior = Posterior.load(out / "draws.nc", model=find_system(str(out / "system.py")).model, args=(series,))
    assert str(chain_report(posterior)) in page.texts
    number = int(re.search(r"finely, (\d+) draws", "".join(said))[1])
    assert number == 50 and str(solver_check(posterior, num_draws=number)) in page.texts


def test_without_checks_there_is_no_verdict(run, tmp_path, monkeypatch):
    out, _, text, _ = run
    shutil.copytree(out, tmp_path / "copy")
    monkeypatch.setattr("pyro_latentde.fitting.run.judge", None)
    bare = report_again(tmp_path / "copy", checks=False).read_text(encoding="utf-8")
    assert "<details>" not in bare and "Can it be believed?" in bare
    assert Page(bare).rows == Page(text).rows


def test_each_verdict_has_a_colour_and_its_figure(tmp_path):
    (tmp_path / "stress_test.png").write_bytes(b"PNG")
    verdicts = [
        Verdict("prior", "3 < 4 fail.", False, "a <b>\n  c", Picture("stress_test.png", "Draws", "Where")),
        Verdict("chains", "not checked. None.", None),
        Verdict("solver", "fine.", True, "x"),
    ]
    page = Page(page_of(tmp_path, verdicts=verdicts))
    classes = [attrs["class"] for tag, attrs in page.tags if tag == "p" and attrs.get("class") not in (None, "quiet")]
    assert classes == ["fine", "warning", "unknown", "fine"]  # the first is about the sampling
    assert "a <b>\n  c" in page.texts and " 3 < 4 fail." in page.texts
    inside = [tag for tag, _ in page.tags]
    first, last = inside.index("details"), len(inside) - 1 - inside[::-1].index("details")
    assert inside.count("details") == 2 and first < inside.index("img") < last


def test_names_are_escaped(run):
    page, text = Page(run[2]), run[2]
    assert "<script" not in text and "<i>" not in text
    joined = "".join(page.texts)
    assert "<script>alert(1)</script>" in joined and 'B"&' in joined
    assert "Growth of <i>cells</i> & more." in joined and "dishes & co.csv" in joined


def test_the_report_again_is_the_same(run):
    """All but the pictures' bytes is text; the figures come from the same draws and seeds."""
    out, _, text, _ = run
    (out / "report.html").unlink()
    (out / "pair.png").unlink()
    assert report_again(out) == out / "report.html"
    again = (out / "report.html").read_text(encoding="utf-8")
    settle = [(tag, {k: v for k, v in attrs.items() if k != "src"}) for tag, attrs in Page(again).tags]
    assert settle == [(tag, {k: v for k, v in attrs.items() if k != "src"}) for tag, attrs in Page(text).tags]
    assert Page(again).texts == Page(text).texts


def fine(**changes):
    return {
        "rhat_max": 1.001,
        "ess_min": 900.0,
        "ess_tail_min": 800.0,
        "divergences": 0,
        "ode_failed": 0,
        "max_tree_depth_reached": 0,
        "num_chains": 4,
        "num_samples": 500,
        "num_steps": None,
        "skipped_steps": None,
        "interrupted": False,
        "seconds": 9.0,
        "sampling_seconds": 5.0,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rhat_max": 1.2}, ("do not agree", "1.200", "Draw longer")),
        ({"rhat_max": 1.03}, ("nearly agree", "1.030")),
        ({"rhat_max": None}, ("R-hat is not defined",)),
        ({"ess_tail_min": 50.4}, ("worth 50", "--num-samples")),
        ({"divergences": 20}, ("20 of 2000", "1.0%", "target_accept")),
        ({"ode_failed": 3}, ("3 solves failed",)),
        ({"max_tree_depth_reached": 7}, ("7 trajectories",)),
        ({"num_chains": 1, "rhat_max": None}, ("one chain only",)),
        ({"interrupted": True}, ("interrupted", "--resume")),
    ],
)
def test_each_fault_has_one_warning_with_advice(changes, words):
    assert warnings_of(fine(), "nuts") == []
    (text,) = warnings_of(fine(**changes), "nuts")
    assert all(word in text for word in words), text


def test_draws_of_a_guide_are_never_called_fine():
    independent = fine(rhat_max=None, ess_min=None, ess_tail_min=None, num_chains=1, divergences=None, ode_failed=None)
    (text,) = warnings_of(independent, "svi")
    assert "approximation" in text and "--method nuts" in text
    assert len(warnings_of(independent | {"skipped_steps": 4, "num_steps": 100}, "svi")) == 2
    line = in_one_line(independent | {"num_steps": 100, "final_loss": 3.0})
    assert line == "100 steps, loss 3.00 at the end; 9 s in all, 5 s of them sampling"


def test_sites_that_fit_into_a_figure():
    sizes = {"local": 9, "a": 1, "many": 40, "b": 5}
    posterior = Posterior(samples={name: torch.zeros(2, 5, size) for name, size in sizes.items()})
    assert main_names(posterior) == (["local", "a"], ["many", "b"])


def test_a_figure_that_cannot_be_drawn_says_why(tmp_path):
    """Forty unknowns in one site fit into no figure, the others do; of twenty series twelve are drawn."""
    import pyro
    import pyro.distributions as dist

    def model(series):
        pyro.sample("many", dist.Normal(torch.zeros(40), 1.0).to_event(1))
        linear.model(series)

    one = linear.simulate(torch.linspace(0, 1, 3), num_series=20).series
    before = prior(model, one, num_samples=20)
    pictures = draw_figures(before, before, one, tmp_path, seed=0, time="s")
    texts = {picture.title: picture.text for picture in pictures}
    assert "Not shown: many." in texts["Pairs"] and texts["Model and data"] == "The first 12 of 20 series are drawn."
    assert len(list(tmp_path.glob("trajectories-*.png"))) == MAX_SERIES == 12
    few = before.select(["many"])
    assert (tmp_path / "pair.png").exists()
    pair = next(p for p in draw_figures(few, few, one[:1], tmp_path, seed=0, time="s") if p.title == "Pairs")
    assert pair.file is None and "Not drawn" in pair.text and not (tmp_path / "pair.png").exists()


def test_bands_are_those_of_what_was_measured(tmp_path, monkeypatch):
    """Of two states the second is measured: its data are not drawn over the first."""
    import pyro
    import pyro.distributions as dist

    def model(series):
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 0.1))
        field = lambda t, y, p: torch.stack([-p * y[0], p * y[0]])  # noqa: E731
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        z = ode("z", field, start, series.times[0], rate, states=("left", "done"))
        observe("obs", lambda z: dist.Normal(z, 0.01), series, z[..., 1:])

    seen = []

    def watch(prediction, data, **options):
        seen.append((options["site"], prediction.quantile("obs"), data))
        assert prediction.observations["obs"].shape[:2] == (1, 4000)  # 200 draws, each with noise twenty times
        return plot_trajectories(prediction, data, **options)

    monkeypatch.setattr(figures, "plot_trajectories", watch)
    times = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    series = Series.from_tensors(times, 1 - (-times).exp(), names=("done",))
    draws = prior(model, series, num_samples=200)
    draw_figures(draws, draws, series, tmp_path, seed=0, time="s")
    ((site, quantiles, data),) = seen
    assert site == "obs" and data is series
    # the median of 200 draws of rate, sd .1, and of a noise of .01: five standard errors are below .03
    assert quantiles[2].flatten()[-1].item() == pytest.approx(1 - torch.tensor(-3.0).exp().item(), abs=0.03)


def test_a_page_without_faults_says_what_that_does_not_mean(tmp_path):
    page = Page(page_of(tmp_path))
    assert any("does not say that the model is right" in part for part in page.texts)
    assert [name for name, _ in page.rows["numbers"]] == ["seconds"] and "–" in page.texts
