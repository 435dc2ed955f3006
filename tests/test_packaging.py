"""The root folders kernels/ and benchmarks/ import as parts of llada2_fast from a checkout, an editable install and a
wheel."""

import json
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
FOLDERS = ("kernels", "benchmarks")
WHERE = """
import importlib.util
from importlib import import_module
for folder, file in (("kernels", "refine"), ("benchmarks", "harness"), ("benchmarks", "kernels.bench_refine")):
    shim = import_module(f"llada2_fast.{folder}").__file__
    print(importlib.util.find_spec(f"llada2_fast.{folder}.{file}").origin, shim)
"""


def whereabouts(folders, package):
    """What WHERE prints if the two folders are in `folders` and the package itself is the folder `package`."""
    files = ("kernels/refine.py", "benchmarks/harness.py", "benchmarks/kernels/bench_refine.py")
    return "".join(f"{folders}/{file} {package}/{file.partition('/')[0]}.py\n" for file in files)


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
    for name in ("llada2_fast", *FOLDERS):
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
    sources |= {f"llada2_fast/{path.relative_to(ROOT)}" for path in (ROOT / "benchmarks").rglob("*.py")}
    for path in (ROOT / "llada2_fast").rglob("*"):
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js") or path.parent.name == "model":
            sources.add(str(path.relative_to(ROOT)))
    assert sources - names == set()
    assert [name for name in names if "benchmarks" in name and not name.endswith(".py")] == []  # results stay here
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.stat().st_size <= 8 * 2**20
    version = re.search(r'__version__ = "(.+)"', (ROOT / "llada2_fast/__init__.py").read_text("utf-8")).group(1)
    assert f"Version: {version}\n" in metadata
    assert "llada2-fast = llada2_fast.cli:main" in scripts


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_oldest_versions_are_the_lower_bounds(wheel, tmp_path):
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    made = ".venv-oldest/constraints.txt"
    subprocess.run(["make", "--silent", made], cwd=tmp_path, check=True)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    bounds = re.findall(r"^Requires-Dist: ([a-z]+>=[\d.]+)(?!.*extra ==)", metadata, re.M)
    assert (tmp_path / made).read_text("utf-8").splitlines() == [bound.replace(">=", "==") for bound in bounds]
    assert len(bounds) == 3


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The folder that the wheel is installed into."""
    site = tmp_path_factory.mktemp("installed") / "site"
    run(*PIP, "install", *OFFLINE, "--target", site, wheel, cwd=site.parent)
    return site


def test_wheel_imports_its_own_folders(site):
    assert not any((site / name).exists() for name in FOLDERS)
    assert run("-c", WHERE, cwd="/", path=[site]) == whereabouts(site / "llada2_fast", site / "llada2_fast")


def test_a_language_from_a_wheel(site):
    """A file of the package is run as a program of its own to compile one."""
    called = "print(len(compile_tokens('a|bc', [b'a', b'b', b'c'], (9, 9)).accepts))"
    probe = f"from llada2_fast.structured.compiler import compile_tokens; {called}"
    assert run("-c", probe, cwd="/", path=[site]) == "3\n"


def test_bench_from_a_wheel(site, tmp_path):
    """There it has no results folder of its own, and says no commit, whatever repository may be around it."""
    bench = ["bench", "latency", "--num-iters", "1", "--gen-length", "32", "--no-progress", "--save"]
    probe = f"from llada2_fast.cli import main; print(main({bench}), main([*{bench}, 'lines']))"
    assert run("-c", probe, cwd=tmp_path, path=[site]).splitlines()[-1] == "2 0"
    line = json.loads((tmp_path / "lines/latency.jsonl").read_text("utf-8"))
    assert line["total_output_tokens"] > 0 and line["commit"] is None


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_without_a_folder_says_where_it_looked(site, tmp_path, name):
    shutil.copytree(site / "llada2_fast", tmp_path / "llada2_fast", ignore=shutil.ignore_patterns(name, "model"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    probe = f"try: import llada2_fast.{name}\nexcept ImportError as e: print(e)"
    message = run("-c", probe, cwd="/", path=[tmp_path])
    assert f"{tmp_path}/llada2_fast/{name} or {tmp_path}/{name}" in message


def test_editable_install(checkout, tmp_path):
    """The lenient editable mode, in an environment that sees the packages of this one."""
    run("-m", "venv", "--without-pip", tmp_path, cwd=tmp_path)
    python = tmp_path / "bin/python"
    site = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd="/", python=python).strip()
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*PIP, "install", *OFFLINE, "--editable", checkout, cwd=tmp_path, python=python)
    for cwd in ("/", checkout):
        assert run("-c", WHERE, cwd=cwd, python=python) == whereabouts(checkout, checkout / "llada2_fast")


@pytest.mark.parametrize("name", FOLDERS)
def test_checkout_beside_a_package_of_the_same_name(tmp_path, name):
    """Neither hides the other, from the repository's root, where ours would come first if it had an __init__.py."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("MARKER = 'the other package'\n")
    printed = run("-c", f"import {name}; print({name}.MARKER)\n{WHERE}", cwd=ROOT, path=[tmp_path])
    assert printed == "the other package\n" + whereabouts(ROOT, ROOT / "llada2_fast")


def test_checkout_alone():
    assert run("-c", WHERE, cwd=ROOT) == whereabouts(ROOT, ROOT / "llada2_fast")
