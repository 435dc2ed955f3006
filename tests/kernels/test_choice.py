"""Which path an op takes, and what is left of the kernels where Triton is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llada2_fast.kernels._triton import HAS_TRITON, force_ops, use_triton

ROOT = Path(__file__).parent.parent.parent

WITHOUT_TRITON = """
import importlib, pathlib, sys
sys.modules["triton"] = None  # import triton now fails
import torch
for file in sorted(pathlib.Path("kernels").glob("*.py")):
    importlib.import_module(f"llada2_fast.kernels.{file.stem}")
from llada2_fast.kernels import candidates, _triton
assert not _triton.HAS_TRITON and not _triton.use_triton(torch.empty(0, device="meta"))
rules = candidates.SampleParams(torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1).long())
zero = torch.zeros(1, dtype=torch.int64)
ids = candidates.SpecialIds(5)
token, confidence = candidates.candidates(torch.eye(3)[None], zero, zero.int(), rules, ids, zero.int())
print(token.tolist(), round(float(confidence[0, 0]), 4))
"""


def test_the_device_decides():
    assert HAS_TRITON
    assert not use_triton(torch.zeros(1))
    with force_ops("triton"):
        assert use_triton(torch.zeros(1))
        with force_ops("torch"):
            assert not use_triton(torch.zeros(1))
        assert use_triton(torch.zeros(1))
    assert not use_triton(torch.zeros(1))


def test_force_ops_is_undone_after_an_error():
    with pytest.raises(KeyError), force_ops("triton"):
        raise KeyError
    assert not use_triton(torch.zeros(1))


def test_unknown_choice():
    with pytest.raises(ValueError, match="choice: expected .* got 'cuda'"), force_ops("cuda"):
        pass


@pytest.mark.gpu
def test_a_gpu_runs_the_kernels():
    assert use_triton(torch.zeros(1, device="cuda"))


def test_ops_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[[0, 1, 2]] 0.5761\n"
