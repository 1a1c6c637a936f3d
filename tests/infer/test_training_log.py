# SPDX-License-Identifier: Apache-2.0
"""The CSV file of a run: what is written, what a resumed run removes, and TensorBoard where it is there."""

import sys
import types

from pyro_latentde.infer.training_log import COLUMNS, TrainingLog


def lines(path):
    return path.read_text().splitlines()


def test_rows_and_gaps(tmp_path):
    with TrainingLog(tmp_path / "sub" / "log.csv") as log:
        log.write(step=0, seconds=0.5, elbo=-1 / 3, skipped=0, grad_norm=float("nan"))
        log.write(step=1, heldout_elbo=float("-inf"), kl_weight=0.25, skipped=1)
    assert lines(tmp_path / "sub" / "log.csv") == [
        ",".join(COLUMNS),
        "0,0.5,-0.3333333333,,,,,,,0",
        "1,,,,,,,0.25,,1",
    ]


def test_a_resumed_run_goes_on_where_its_checkpoint_is(tmp_path):
    with TrainingLog(tmp_path) as log:
        for step in range(5):
            log.write(step=step, elbo=1.0 - step, skipped=0)
    path = tmp_path / "training.csv"
    path.write_text(path.read_text()[:-4])  # the kill came in the middle of a line
    with TrainingLog(tmp_path, first_step=3) as log:
        log.write(step=3, elbo=-30.0, skipped=0)
    assert [line.split(",")[::2][:2] for line in lines(path)[1:]] == [
        ["0", "1"],
        ["1", "0"],
        ["2", "-1"],
        ["3", "-30"],
    ]
    with TrainingLog(tmp_path) as log:
        pass
    assert lines(path) == [",".join(COLUMNS)], "a run from the start begins a new file"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TrainingLog(None) as log:
        log.write(step=0, elbo=1.0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    events = []

    class SummaryWriter:
        def __init__(self, folder):
            events.append(folder)

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with TrainingLog(tmp_path) as log:
        log.write(step=0, elbo=-2.0, grad_norm=float("nan"))
        log.write(step=1, elbo=-1.0)
        log.write(step=2, elbo=-0.5, heldout_elbo=-4.0)
    assert events == [
        str(tmp_path),
        ("elbo", -2.0, 0),
        ("elbo", -0.5, 2),
        ("heldout_elbo", -4.0, 2),
        "closed",
    ]
