"""The root folder kernels/ imports as llada2_fast.kernels from a checkout, an editable install and a wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]
KERNEL_FILE = (
    "from llada2_fast import kernels as k; from llada2_fast.kernels import refine as r; print(r.__file__, k.__file__)"
)


def run(*arguments, cwd, path=(), python=sys.executable):
    """Runs Python on its own, without this checkout on its path, and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the package is built from, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("llada2_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, checkout, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"llada2_fast"}
    sources = {f"llada2_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.*")}
    for path in (ROOT / "llada2_fast").rglob("*"):
        if path.suffix == ".py" or path.parent.name == "model":
            sources.add(str(path.relative_to(ROOT)))
    assert sources - names == set()
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size <= 8 * 2**20
    version = re.search(r'__version__ = "(.+)"', (ROOT / "llada2_fast/__init__.py").read_text("utf-8")).group(1)
    assert f"Version: {version}\n" in metadata
    assert "llada2-fast = llada2_fast.cli:main" in scripts


def test_wheel_imports_its_own_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    run(*PIP, "install", *OFFLINE, "--target", site, wheel, cwd=tmp_path)
    assert not (site / "kernels").exists()
    expected = f"{site}/llada2_fast/kernels/refine.py {site}/llada2_fast/kernels.py\n"
    assert run("-c", KERNEL_FILE, cwd="/", path=[site]) == expected


def test_wheel_without_kernels_says_where_it_looked(wheel, tmp_path):
    run(*PIP, "install", *OFFLINE, "--target", tmp_path, wheel, cwd=tmp_path)
    shutil.rmtree(tmp_path / "llada2_fast/kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    probe = "import importlib.util as u; s = u.spec_from_file_location('k', 'llada2_fast/kernels.py')\n"
    probe += "try: s.loader.exec_module(u.module_from_spec(s))\nexcept ImportError as e: print(e)"
    message = run("-c", probe, cwd=tmp_path)
    assert f"{tmp_path}/llada2_fast/kernels or {tmp_path}/kernels" in message


def test_editable_install(checkout, tmp_path):
    """The lenient editable mode, in an environment that sees the packages of this one."""
    run("-m", "venv", "--without-pip", tmp_path, cwd=tmp_path)
    python = tmp_path / "bin/python"
    site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/", python=python).strip()
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*PIP, "install", *OFFLINE, "--editable", checkout, cwd=tmp_path, python=python)
    expected = f"{checkout}/kernels/refine.py {checkout}/llada2_fast/kernels.py\n"
    for cwd in ("/", checkout):
        assert run("-c", KERNEL_FILE, cwd=cwd, python=python) == expected


def test_checkout_beside_a_package_named_kernels(tmp_path):
    """Neither hides the other, from the repository's root, where ours would come first if it had an __init__.py."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("MARKER = 'the other package'\n")
    printed = run("-c", f"import kernels; print(kernels.MARKER); {KERNEL_FILE}", cwd=ROOT, path=[tmp_path])
    assert printed.splitlines()[0] == "the other package"
    assert printed.splitlines()[1] == f"{ROOT}/kernels/refine.py {ROOT}/llada2_fast/kernels.py"


def test_checkout_alone():
    assert run("-c", KERNEL_FILE, cwd=ROOT) == f"{ROOT}/kernels/refine.py {ROOT}/llada2_fast/kernels.py\n"
