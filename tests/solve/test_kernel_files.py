# SPDX-License-Identifier: Apache-2.0
"""Kernels on disk: a second process reads what the first compiled, whatever happened to the files."""

import os
import subprocess
import sys

import torch
from ode_fields import DOUBLE, tensor

import pyro_latentde as lde
from pyro_latentde.solve.fused import kernel_cache

SCRIPT = """
import logging, sys, torch
import pyro_latentde as lde
from pyro_latentde.solve.fused import kernel_cache
compiled, assemble = [], kernel_cache.assemble
kernel_cache.assemble = lambda *args: compiled.append(args) or assemble(*args)
y0, k = torch.ones(1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
times = torch.tensor([0.0, 1.0], dtype=torch.float64)
f = lambda t, y, p: -p * y
solution = lde.odesolve(f, y0, times, k, method="euler", step_size=0.5, engine="fused")
solution.ys[-1].sum().backward()
print(solution.ys[-1].item(), k.grad.item(), len(compiled), kernel_cache.cache_folder())
"""


def grown(rate):
    """End state of two Euler steps: y (1 + .5 k)^2 for y' = k y."""
    settings = {"method": "euler", "step_size": 0.5, "engine": "fused"}
    k = torch.tensor(rate, dtype=DOUBLE)
    return lde.odesolve(lambda t, y, p: p * y, tensor(1.0, 2.0), tensor(0.0, 1.0), k, **settings).ys[-1]


def in_a_process(cache):
    environment = {**os.environ, "PYRO_LATENTDE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    value, slope, compiled, folder = done.stdout.split()
    assert (float(value), float(slope)) == (0.5625, -0.75)
    return int(compiled), folder


def test_a_second_process_reuses_the_files_of_the_first(tmp_path):
    compiled, folder = in_a_process(tmp_path)
    assert compiled == 2 and folder.startswith(str(tmp_path))  # the solve and its gradient
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("k_*")}
    assert [p.suffix for p in files] == [".o", ".o"]
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert in_a_process(tmp_path)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("k_*")} == files


def test_without_a_writable_folder_kernels_live_in_memory(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert in_a_process(blocked) == (2, "None")


def test_a_damaged_file_is_written_anew(tmp_path):
    in_a_process(tmp_path)
    first, second = tmp_path.rglob("k_*")
    content = first.read_bytes()
    first.write_bytes(content[:-8])
    assert in_a_process(tmp_path)[0] == 1
    assert first.read_bytes() == content
    second.write_bytes(b"")
    assert in_a_process(tmp_path)[0] == 1


def test_clear_cache_forgets_memory_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_LATENTDE_CACHE", str(tmp_path))
    kernel_cache.cache_folder.cache_clear()
    try:
        for _ in range(2):
            grown(0.1)
        assert list(tmp_path.rglob("k_*.o"))
        lde.clear_cache()
        assert not list(tmp_path.rglob("k_*"))
        torch.testing.assert_close(grown(0.1), tensor(1.0, 2.0) * 1.05**2)
        assert len(list(tmp_path.rglob("k_*.o"))) == 1
    finally:
        kernel_cache.cache_folder.cache_clear()
