# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source distribution hold everything, and work away from the repository."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("pyro_latentde", "models", "tests", "setup.cfg", "pyproject.toml", "MANIFEST.in", "Makefile")
OPTIONAL = ("constraints.txt", "LICENSE", "README.md")

CHECK = """
import sys
site, root = sys.argv[1:]
sys.path.insert(0, site)
# The editable install of the repository must not answer instead of the unpacked one.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "").lower()]
sys.path[:] = [p for p in sys.path if not p.startswith(root) or "site-packages" in p]
from importlib import metadata
import pyro_latentde.models.systems
import pyro_latentde.models.systems.lotka_volterra as lotka_volterra
from pyro_latentde.data import load_lynx_hare
for module in (pyro_latentde, pyro_latentde.models, lotka_volterra):
    assert module.__file__.startswith(site), module.__file__
series = load_lynx_hare()
assert series.values.shape == (1, 21, 2), series
assert callable(lotka_volterra.model)
print(metadata.version("pyro-latentde"), pyro_latentde.__version__)
"""


def run(*command, cwd):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} said:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel of the tree, sdist, wheel of the sdist), built from a copy so that the tree stays clean."""
    work = tmp_path_factory.mktemp("build")
    source = work / "source"
    source.mkdir()
    for name in (*SHIPPED, *(n for n in OPTIONAL if (ROOT / n).exists())):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", work / "wheel", ".", cwd=source)
    run(*build, "--sdist", "--outdir", work / "sdist", ".", cwd=source)
    (sdist,) = (work / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    run(*build, "--wheel", "--outdir", work / "again", ".", cwd=unpacked)
    (wheel,), (again,) = (work / "wheel").glob("*.whl"), (work / "again").glob("*.whl")
    return wheel, sdist, again


def test_wheel_holds_every_source_file(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    for source, prefix in (("pyro_latentde", "pyro_latentde"), ("models", "pyro_latentde/models")):
        folder = ROOT / source
        for path in folder.rglob("*"):
            if path.suffix in {".py", ".csv"}:
                assert f"{prefix}/{path.relative_to(folder).as_posix()}" in names
    assert not [n for n in names if n.startswith(("models/", "tests/"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_sdist_gives_the_same_wheel(built):
    wheel, _, again = built
    assert zipfile.ZipFile(wheel).namelist() == zipfile.ZipFile(again).namelist()


@pytest.mark.parametrize("which", [0, 2], ids=["wheel", "wheel of the sdist"])
def test_installed_copy_works_elsewhere(built, tmp_path, which):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, "--target", site, built[which], cwd=tmp_path)
    out = run(sys.executable, "-I", "-W", "error", "-c", CHECK, site, ROOT, cwd=tmp_path)
    installed, imported = out.split()
    assert installed == imported
    assert (site / "pyro_latentde" / "data" / "hudson_lynx_hare.csv").exists()
    entry_points = next(site.glob("pyro_latentde-*.dist-info")) / "entry_points.txt"
    assert "pyro-latentde = pyro_latentde.cli:main" in entry_points.read_text()
