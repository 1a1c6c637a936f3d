# SPDX-License-Identifier: Apache-2.0
"""Peers that live in environments of their own: which Python has them, and a script of ours run by it.

``make peers`` makes ``.venv-peers`` from ``benchmarks/requirements-peers.txt`` (JAX, diffrax, NumPyro). Another Python
is named by ``LATENTDE_DIFFRAX_PYTHON``, ``LATENTDE_NUMPYRO_PYTHON``, ``LATENTDE_STAN_PYTHON`` or
``LATENTDE_TORCHODE_PYTHON``.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["ask", "python_of"]

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = ("diffrax", "numpyro")  # in .venv-peers


def python_of(peer: str) -> str | None:
    """The Python that has the peer, None where there is none (said once for each question)."""
    named = os.environ.get(f"LATENTDE_{peer.upper()}_PYTHON")
    made = ROOT / ".venv-peers" / "bin" / "python"
    python = named or (str(made) if peer in TOGETHER and made.exists() else None)
    if python is None:
        print(f"{peer}: left out, LATENTDE_{peer.upper()}_PYTHON is not set (`make peers` installs {TOGETHER})")
    return python


def ask(python: str, script: str, task: dict[str, Any]) -> Any:
    """What a script beside this file prints last, as JSON, when it reads the task as JSON."""
    path = str(Path(__file__).with_name(script))
    done = subprocess.run([python, path], input=json.dumps(task), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} by {python}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
