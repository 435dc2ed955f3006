"""What is compiled ahead is what a launch looks up in Triton's cache, in whatever order a process comes to its kernels;
it can be carried to another cache of the same build of Triton."""

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from hashlib import sha256
from unittest import mock

import pytest
import torch
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import aot
from benchmarks.gpu import prewarm
from benchmarks.gpu.machine import TINY
from llada2_fast.kernels import _tuned, gemm, norm

TARGET = GPUTarget("cuda", 90, 32)
ONE = "add_rms_norm fp32 H=64"


class Driver:
    """An H100 that compiles and never launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return TARGET


def shifted():
    """A launch on a tensor that begins at no multiple of 16 bytes."""
    x = torch.empty(65, device="meta")[1:].view(1, 64)
    norm.add_rms_norm(x, x, torch.empty(64, device="meta"), 1e-6)


def steps(quantization):
    """A step with and without filters and a prefill of a network of two layers."""
    config = replace(TINY, quantization=quantization)
    prewarm.steps_of(config, torch.bfloat16, [(1, 1), (2, 1)], (3,), (64,))


CALLS = [*aot.SCENARIOS.values(), lambda: steps(None), lambda: steps("fp8"), lambda: steps("int4"), shifted]


def name_in_cache(source, target, options):
    """Of a kernel that triton.compile is asked for: what its folder in the cache is made of."""
    backend = compiler.make_backend(target)
    key = compiler.compiler.get_cache_key(source, backend, backend.parse_options(dict(options)), env_vars={})
    return sha256(key.encode()).hexdigest()


def looked_up(calls):
    """{name in the cache: kernel} of what the launches within some calls look up."""
    found, run = {}, JITFunction.run

    def compile(source, target, options):
        found[name_in_cache(source, target, options)] = source.fn.__name__

    def lookup(self, *args, grid, warmup, **meta):
        return run(self, *args, grid=grid, warmup=True, **meta)

    with (
        mock.patch.object(compiler, "compile", compile),
        mock.patch.object(JITFunction, "run", lookup),
        prewarm.without_gpu(),
    ):
        driver.set_active(Driver())
        for call in calls:
            call()
    return found


def python(script, **env):
    """What a process prints that has imported all of this file."""
    command = [sys.executable, "-c", f"from tests.test_prewarm import *; {script}"]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_launches_look_up_what_is_compiled_ahead():
    """They do so in another process, which comes to the kernels in another order."""
    found = json.loads(python("print(json.dumps(looked_up(CALLS[::-1])))"))
    with aot.recorded() as launches, prewarm.without_gpu():
        for call in CALLS:
            call()
    ahead = set()
    with mock.patch.object(aot.triton, "compile", lambda *args, **more: ahead.add(name_in_cache(*args, **more))):
        for launch in launches:
            aot.compiled(launch, "sm_90")
    assert len(found) > 100
    assert sorted(kernel for name, kernel in found.items() if name not in ahead) == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of Triton's that holds nothing yet: call it for its path."""

    def empty(name="cache"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / name))
        (tmp_path / name).mkdir()
        return tmp_path / name

    return empty


def compile_one_scenario():
    """prewarm.compile_all of the one kernel that a scenario launches: (compiled, there, failures, paths)."""
    with aot.recorded() as launches:
        aot.SCENARIOS[ONE]()
    return prewarm.compile_all(launches, "sm_90", jobs=1)


def test_what_is_compiled_for_a_gpu_has_its_tuned_tiles(monkeypatch):
    gpu = "NVIDIA H100 80GB HBM3"
    (tuned,) = [x["bf16"] for x in _tuned.table("moe") if (x["device"], x["tokens"]) == (gpu, 32)]
    monkeypatch.setattr(prewarm, "PARTS", {"one": lambda machine: aot.SCENARIOS["moe mini bf16 T=32"]()})

    def products(name):
        gemm.tiles.cache_clear()  # it knows "meta" from others
        launches, failures = prewarm.launches(["one"], name)
        gemm.tiles.cache_clear()
        assert failures == []
        return [launch.options["num_stages"] for launch in launches if launch.kernel.__name__ == "_gemm_kernel"]

    assert products(gpu) == [tuned[product]["num_stages"] for product in ("gate_up", "down")] == [4, 3]
    assert products("any") == [4, 4]


def test_a_packed_cache_is_hit_elsewhere(cache, tmp_path):
    first = cache()
    compiled, there, failures, paths = compile_one_scenario()
    assert (compiled, there, failures, len(paths)) == (1, 0, [], 2)
    prewarm.pack(tmp_path / "packed", paths, "sm_90")
    first.rename(tmp_path / "elsewhere")  # where the first paths pointed is nothing any more
    second = cache("other")
    assert prewarm.unpack(tmp_path / "packed", "sm_90") == 1
    assert compile_one_scenario()[:3] == (0, 1, [])
    assert len(list(second.iterdir())) == 1
    assert prewarm.unpack(tmp_path / "packed", "sm_90") == 0
    with aot.recorded() as launches:
        aot.SCENARIOS[ONE]()
    result = aot.compile_launch(launches[0], ONE, "sm_90")  # without PTX
    assert result.registers > 0 and result.fault is None


def packed(path, *names, **manifest):
    """A file like those of prewarm.pack that holds `names`."""
    with tarfile.open(path, "w:xz") as tar:
        for name in (prewarm.MANIFEST, *names):
            data = json.dumps(prewarm.build("sm_90") | manifest).encode()
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["../x", "/x", f"{'A' * 52}/../x.json", f"{'A' * 52}/x.so", f"{'A' * 52}", "x.cubin"])
def test_nothing_but_kernels_is_unpacked(cache, tmp_path, name):
    folder = cache()
    file = packed(tmp_path / "packed", f"{'A' * 52}/good.json", name)
    with pytest.raises(ValueError, match="expected files FOLDER/NAME"):
        prewarm.unpack(file, "sm_90")
    assert list(folder.iterdir()) == [] and {path.name for path in tmp_path.iterdir()} == {"cache", "packed"}


@pytest.mark.parametrize("other", [{"key": "0" * 16}, {"triton": "1.0"}, {"target": "sm_80"}, None], ids=str)
def test_what_does_not_fit_is_refused_in_a_line_and_compiled(cache, tmp_path, capsys, monkeypatch, other):
    folder, file = cache(), tmp_path / "packed"
    if other is None:
        file.write_bytes(b"no archive")
    else:
        packed(file, f"{'A' * 52}/good.json", **other)
    monkeypatch.setattr(prewarm, "PARTS", {"one": lambda machine: aot.SCENARIOS[ONE]()})
    assert prewarm.main(["--only", "one", "--unpack", str(file)]) == 0
    refused, counts = capsys.readouterr().out.splitlines()
    assert refused.startswith(f"nothing unpacked: {file}: ")
    for value in (other or {}).values():
        assert str(prewarm.build("sm_90")) in refused and value in refused
    assert counts.startswith("1 compiled, 0 already there, 0 failed, ")
    assert len(list(folder.iterdir())) == 1


def test_what_fails_is_named_and_the_others_are_compiled(cache, capsys, monkeypatch):
    cache()

    def calls(machine):
        aot.SCENARIOS[ONE]()
        x = torch.empty(2, 64, device="meta")
        no_eps = x, *[None] * 3, x, None, x, None, None, x, 2, 64, 0
        norm._rms_norm_kernel[(1,)](*no_eps, K=0, EARLY=False, **norm.norm_tile(64))
        raise ValueError("no more of these")

    monkeypatch.setattr(prewarm, "PARTS", {"two": calls})
    assert prewarm.main(["--only", "two", "--jobs", "1"]) == 1
    part, kernel, counts = capsys.readouterr().out.splitlines()
    assert part == "two: ValueError: no more of these" and kernel.startswith("_rms_norm_kernel: ")
    assert counts.startswith("1 compiled, 0 already there, 2 failed, ")
