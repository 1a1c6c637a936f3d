# SPDX-License-Identifier: Apache-2.0
"""Every tutorial runs, with few draws, and is stored as it came out of a full run."""

import json
import tempfile
import warnings
from pathlib import Path

import nbformat
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Jupyter's packages warn about each other while they are imported
    from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = (
    "01_first_posterior.ipynb",
    "02_pendulum_videos.ipynb",
    "03_irregular_series.ipynb",
    "04_known_unknowns.ipynb",
    "05_write_your_own.ipynb",
    "06_boarding_school.ipynb",
    "07_identifiability.ipynb",
    "08_trust.ipynb",
    "09_choosing_a_method.ipynb",
    "10_drugs.ipynb",
)
LARGEST = 1_500_000  # bytes
PRIVATE = (f"{Path.home()}/", f"{FOLDER.parent}/", f"{tempfile.gettempdir()}/", "site-packages", "Traceback")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def files():
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())


def test_no_notebook_is_left_out():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_in_smoke_mode(name, monkeypatch):
    """LATENTDE_SMOKE asks for few draws; the cells are otherwise the same. They run where the trained weights are."""
    before = files()
    monkeypatch.setenv("LATENTDE_SMOKE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert any("LATENTDE_SMOKE" in cell.source for cell in code_cells(notebook))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own, again; the cells run in another process
        client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
        )
        client.execute()  # raises when a cell does
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert files() == before, "a notebook must leave nothing behind"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_stored_executed_with_pictures(name):
    path = FOLDER / name
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    texts = json.dumps([{**o, "data": {"text/plain": o.get("data", {}).get("text/plain")}} for o in outputs])
    assert [word for word in PRIVATE if word in texts] == []
