"""Serving stacks that no CPU machine can install whole: their real wheels from PyPI, unpacked."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def unpacked(pytestconfig):
    """unpacked("sglang==0.5.23") -> the folder that holds that wheel's Python files and its metadata.

    The wheel alone is fetched, nothing it depends on, once per checkout, into pytest's cache. Skips where the index has
    no such wheel, and under `-p no:cacheprovider`.
    """

    def unpack(requirement):
        if not hasattr(pytestconfig, "cache"):
            pytest.skip(f"{requirement}: no cache to keep the wheel in")
        folder = pytestconfig.cache.mkdir("wheels") / requirement
        if not folder.is_dir():
            wheel = download(requirement, folder.with_suffix(".download"))
            partial = folder.with_suffix(".partial")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
                archive.extractall(partial, wanted)
            wheel.unlink()
            partial.rename(folder)
        return folder

    return unpack


def download(requirement, folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{requirement}: no wheel to be had: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with this package's metadata: on sys.path, its entry points are found as those of an installed one."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    return folder
