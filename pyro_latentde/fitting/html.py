# SPDX-License-Identifier: Apache-2.0
"""The report of a run as one HTML file: no scripts, no links, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_latentde.fitting.figures import Picture
from pyro_latentde.fitting.verdicts import Verdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["render_report"]

_MAX_ROWS = 200

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: #fff; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; } p { margin: .25rem 0 .75rem; } .quiet { color: #666; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-color: #999; font-weight: 600; }
tbody th { font-weight: 400; }
img { max-width: 100%; height: auto; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem .75rem; margin: .5rem 0; }
.fine { border-left: 4px solid #0072b2; background: #eef5fa; padding: .5rem .75rem; margin: .5rem 0; }
.unknown { border-left: 4px solid #999; background: #f4f4f4; padding: .5rem .75rem; margin: .5rem 0; }
details { margin: 0 0 1rem; } summary { cursor: pointer; color: #666; font-size: .875rem; }
pre { white-space: pre-wrap; font-size: .8rem; line-height: 1.4; background: #f7f7f7; padding: .5rem .75rem; }
""".strip()


def render_report(
    *,
    title: str,
    subtitle: str,
    verdict: str,
    warnings: Sequence[str],
    verdicts: Sequence[Verdict] = (),
    summary: pd.DataFrame,
    numbers: Mapping[str, float | int | None],
    settings: Mapping[str, Any],
    data_text: str,
    data_table: pd.DataFrame,
    pictures: Sequence[Picture],
    folder: Path,
) -> str:
    """The page. Every text is escaped; every number is in a ``<data>`` element to all its digits.

    Args:
        title: of the page.
        subtitle: what the system is, in a line.
        verdict: the run in a line.
        warnings: in plain words; none where all is well.
        verdicts: of the checks; none where they were not wanted.
        summary: a row for each scalar.
        numbers: of the run, by name.
        settings: of the run, by name.
        data_text: what the data are.
        data_table: a row for each series.
        pictures: the figures.
        folder: where their files are.

    Returns:
        HTML.
    """
    if warnings:
        notes = "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)
    else:
        notes = '<p class="fine">No fault was found in the sampling. This does not say that the model is right.</p>'
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(subtitle)}</p>' if subtitle else "",
        f"<p>{escape(verdict)}</p>",
        "<h2>Can it be believed?</h2>",
        notes,
        *(_verdict(one, folder) for one in verdicts),
        "<h2>Unknowns</h2>",
        _table(summary.reset_index(), "summary"),
        "<h2>Figures</h2>",
        *(_figure(picture, folder) for picture in pictures),
        "<h2>Data</h2>",
        f"<p>{escape(data_text)}</p>",
        _table(data_table, "data"),
        "<h2>Numbers of the run</h2>",
        _pairs({name: value for name, value in numbers.items() if value is not None}, "numbers"),
        "<h2>Settings</h2>",
        _pairs(settings, "settings"),
    ]
    # Nothing is to be fetched from anywhere, and a browser is told so.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>",
            "</head>",
            "<body>",
            *filter(None, parts),
            "</body>",
            "</html>",
            "",
        ]
    )


_CLASSES = {True: "fine", False: "warning", None: "unknown"}


def _verdict(verdict: Verdict, folder: Path) -> str:
    """The sentence, and behind a click what it was made from."""
    about = verdict.about.capitalize()
    head = f'<p class="{_CLASSES[verdict.passed]}"><b>{escape(about)}:</b> {escape(verdict.sentence)}</p>'
    inside = [f"<pre>{escape(verdict.printed)}</pre>"] if verdict.printed else []
    if verdict.picture is not None:
        inside.append(_figure(verdict.picture, folder))
    if not inside:
        return head
    return "\n".join([head, "<details>", f"<summary>{escape(about)}: the whole check</summary>", *inside, "</details>"])


def _figure(picture: Picture, folder: Path) -> str:
    head = f'<h3>{escape(picture.title)}</h3>\n<p class="quiet">{escape(picture.text)}</p>'
    if picture.file is None:
        return head
    data = base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")
    return f'{head}\n<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'


def _table(table: pd.DataFrame, name: str) -> str:
    head = "".join(f'<th scope="col">{escape(_HEADS.get(str(column), str(column)))}</th>' for column in table)
    rows = []
    for first, *rest in table.head(_MAX_ROWS).itertuples(index=False):
        cells = "".join(f"<td>{_cell(value)}</td>" for value in rest)
        rows.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    more = f'\n<p class="quiet">The first {_MAX_ROWS} of {len(table)} rows.</p>' if len(table) > _MAX_ROWS else ""
    body = "\n".join(rows)
    grid = f'<table id="{name}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<div class="wide">{grid}</div>{more}'


_HEADS = {"r_hat": "R-hat", "ess_bulk": "ESS", "ess_tail": "ESS of tails", "name": ""}


def _pairs(values: Mapping[str, Any], name: str) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{_cell(value)}</td></tr>' for key, value in values.items()
    )
    return f'<div class="wide"><table id="{name}">\n<tbody>\n{rows}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    """Four digits to read, all of them in the page."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return escape(str(value))
    number = float(value)
    if number != number:
        return "–"
    if number.is_integer() and abs(number) < 1e15:
        return f'<data value="{number:.0f}">{number:.0f}</data>'
    return f'<data value="{number!r}">{number:.4g}</data>'
