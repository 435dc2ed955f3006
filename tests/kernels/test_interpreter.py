"""The interpreter that kernels are tested in: what works in it, and that it leaves nothing behind."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels.interpreter import interpreted


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _feature_kernel(X, OUT, N: tl.constexpr, WHAT: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    if WHAT == "sum":
        x = x + tl.sum(x, 0)
    elif WHAT == "max ignores NaN":
        x = x + tl.max(tl.where(n == 0, float("nan"), x), 0)
    elif WHAT == "first maximum":
        x = x * 0 + tl.min(tl.where(x == tl.max(x), n, N))
    elif WHAT == "cumsum":
        x = tl.cumsum(x, 0)
    elif WHAT == "nested function":
        x = _double(_double(x))
    elif WHAT == "masked load":
        x = tl.load(X + n, mask=n < N - 1, other=7.0)
    elif WHAT == "early return":
        if tl.program_id(0) == 0:
            return
    elif WHAT == "while on data":
        i = 0
        while tl.sum(x, 0) < 1000:
            x = x * 2
            i += 1
        x = x * 0 + i
    elif WHAT == "range of a loaded value":
        for _ in range(0, tl.load(X + 3).to(tl.int32)):
            x += 1
    elif WHAT == "reductions of 2 axes":
        square = x[:, None] + x[None, :]
        x = tl.sum(tl.max(square, 1), 0) + x * 0
    elif WHAT == "bits":
        x = (x.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    elif WHAT == "uint32 products wrap":
        high = tl.umulhi(n.to(tl.uint32) + 0xFFFFFFF0, tl.full([], 0xD2511F53, tl.uint32))
        x = (high >> 16).to(tl.int32).to(tl.float32)
    elif WHAT == "exp2 of -inf":
        x = tl.exp2(float("-inf") + x)
    elif WHAT == "barrier":
        tl.debug_barrier()
    tl.store(OUT + n, x)


X = torch.tensor([1.0, 5.0, 5.0, 2.0])
FEATURES = {
    "sum": [14, 18, 18, 15],
    "max ignores NaN": [6, 10, 10, 7],
    "first maximum": [1, 1, 1, 1],
    "cumsum": [1, 6, 11, 13],
    "nested function": [4, 20, 20, 8],
    "masked load": [1, 5, 5, 7],
    "early return": [0, 0, 0, 0],
    "while on data": [7, 7, 7, 7],
    "range of a loaded value": [3, 7, 7, 4],
    "reductions of 2 axes": [33, 33, 33, 33],
    "bits": [np.nextafter(np.float32(value), np.float32(9)) for value in X.tolist()],
    "uint32 products wrap": [((0xFFFFFFF0 + n) * 0xD2511F53 >> 48) for n in range(4)],
    "exp2 of -inf": [0, 0, 0, 0],
    "barrier": [1, 5, 5, 2],
}


@pytest.mark.parametrize("what", FEATURES)
def test_feature(what):
    out = torch.zeros(4)
    with interpreted():
        _feature_kernel[(1,)](X, out, 4, what)
    assert out.tolist() == [float(value) for value in FEATURES[what]]


@triton.jit
def _cast_kernel(X, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(OUT + n, tl.load(X + n).to(tl.float32).to(OUT.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_a_device(dtype):
    values = torch.randint(2**31, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = torch.cat((values.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), 1e-40])))
    x = torch.cat((x, torch.tensor([float("nan")] * (8192 - len(x)))))
    out = torch.empty(8192, dtype=dtype)
    with interpreted():
        _cast_kernel[(1,)](x, out, 8192)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x.to(dtype)[~x.isnan()])
    back = torch.empty(8192)
    with interpreted():
        _cast_kernel[(1,)](out, back, 8192)
    assert torch.equal(back[~x.isnan()], out.float()[~x.isnan()])


def compiled():
    """The double of a number, compiled for a GPU that need not be there."""
    source = ASTSource(
        _feature_kernel, {"X": "*fp32", "OUT": "*fp32", "N": "constexpr", "WHAT": "constexpr"},
        {(2,): 16, (3,): "nested function"},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_compiling_and_interpreting_in_turn():
    """Nothing of the interpreter's language is left when it is done, even if the kernel fails."""
    before = {name: getattr(tl, name) for name in dir(tl)}, {name: getattr(tl.core, name) for name in dir(tl.core)}
    methods = JITFunction.run, JITFunction.__call__, dict(vars(tl.tensor))
    ptx = compiled()
    test_feature("nested function")
    with pytest.raises(triton.runtime.errors.InterpreterError), interpreted():
        _feature_kernel[(1,)](X, X, 3, "sum")  # 3 is no power of two
    assert before == ({name: getattr(tl, name) for name in before[0]}, {n: getattr(tl.core, n) for n in before[1]})
    assert methods == (JITFunction.run, JITFunction.__call__, dict(vars(tl.tensor)))
    assert compiled() == ptx


def test_outside_of_it_a_launch_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="0 active drivers"):
        _feature_kernel[(1,)](X, X, 4, "sum")
