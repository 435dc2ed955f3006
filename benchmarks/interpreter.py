"""Runs Triton kernels on CPU tensors in Triton's interpreter, chosen per call; for dry runs, counts and tests.

    with interpreted():
        kernel[grid](x, ...)        every launch inside runs in the interpreter, on CPU tensors, one program at a time

Triton reads TRITON_INTERPRET when a kernel is decorated and cannot change its mind; here kernels stay what they are, so
one process can also compile them. What Triton 3.6 and 3.7 need for that:

1. A launch and a call of a device function (tl.sum is one) go to the interpreter.
2. The interpreter swaps the whole language for its own at every launch and every call of a device function, and puts
   back only the launch's share. Here it is swapped once on entry and put back on exit: faster, and nothing is left.
3. A loaded value as a bound of range() needs an __index__ that numpy 2.4 accepts.
4. float32 -> bfloat16 and fp8 round to nearest even as on a device, where the interpreter truncates, or loses the
   carry into the exponent; bfloat16 -> float32 keeps subnormals.
5. Products of bfloat16 matrices are made in float32, where the interpreter multiplies the bits as integers; those of
   fp8 too, where it takes NaN for a number.
6. Differences of bfloat16 are made in float32 and rounded, and a number may be one, which the interpreter has not.
7. A check for integer overflow after every sum and product, which wrapping products fail, is off.
8. numpy warns where kernels mean it: unsigned products wrap, exp2 underflows, a tile may hold nothing but NaN.
"""

import dataclasses
import functools
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import triton.experimental.gluon  # noqa: F401  a first launch would import it while the language is swapped
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_numpy_scalar = functools.cache(interpreter._get_np_dtype)
_cast = InterpreterBuilder.cast_impl
_fp_to_fp = InterpreterBuilder.create_fp_to_fp
_dot = InterpreterBuilder.create_dot
_fsub = InterpreterBuilder.create_fsub


@functools.cache
def _interpreted(function):
    return interpreter.InterpretedFunction(function)


def _numpy_type(of):
    return np.dtype(np.uint64) if of.scalar.is_ptr() else _numpy_scalar(of.scalar)


def _launch(self, *args, grid, warmup, **kwargs):
    return _interpreted(self.fn).run(*args, grid=grid, warmup=warmup, **kwargs)


def _call(self, *args, **kwargs):
    return _interpreted(self.fn)(*args, **kwargs)


def _cast_with_bfloat16(self, value, to_type):
    types = value.dtype.scalar, to_type.scalar
    if types == (tl.bfloat16, tl.float32):
        return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    if types == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(value.data).view(np.uint32).reshape(value.data.shape)
        rounded = (bits + (bits >> 16 & 1) + 0x7FFF) >> 16
        return TensorHandle(np.where(np.isnan(value.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
    return _cast(self, value, to_type)


def _rounding_fp8(self, value, to_type, rounding):
    if value.dtype.scalar != tl.float32 or to_type.scalar != tl.float8e4nv:
        return _fp_to_fp(self, value, to_type, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.float8_e4m3fn)
    return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)


def _float32(self, value):
    if value.dtype.scalar == tl.float8e4nv:
        bits = torch.from_numpy(np.ascontiguousarray(value.data))
        return TensorHandle(bits.view(torch.float8_e4m3fn).float().numpy(), tl.float32)
    return _cast(self, value, tl.float32) if value.dtype.scalar == tl.bfloat16 else value


def _dot_in_float32(self, a, b, *rest):
    return _dot(self, _float32(self, a), _float32(self, b), *rest)


def _difference(self, a, b):
    if a.dtype.scalar != tl.bfloat16:
        return _fsub(self, a, b)
    return _cast_with_bfloat16(self, _fsub(self, _float32(self, a), _float32(self, b)), tl.bfloat16)


def _bfloat16(self, value):
    return _cast_with_bfloat16(self, self.get_fp32(value), tl.bfloat16)


def _dot_in_order(self, a, b, acc, *rest):
    a, b = _float32(self, a).data, _float32(self, b).data
    total = acc.data.astype(np.float32)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return TensorHandle(total, tl.float32)


def products_in_order():
    """Within interpreted(): tl.dot adds up K in order at every place of a tile, as a GPU does. BLAS, which is used
    otherwise and is faster, treats the edges of a tile differently."""
    return mock.patch.object(InterpreterBuilder, "create_dot", _dot_in_order)


@contextmanager
def interpreted():
    """Within it Triton kernels run in the interpreter. Not for two threads at once, nor inside itself."""
    language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    language.set_attr(tl.tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
    swapped = SimpleNamespace(restore=lambda: None)
    builder = interpreter.interpreter_builder
    try:
        with (
            mock.patch.object(JITFunction, "run", _launch),
            mock.patch.object(JITFunction, "__call__", _call),
            mock.patch.object(interpreter, "_patch_lang", lambda function: swapped),
            mock.patch.object(interpreter, "_get_np_dtype", _numpy_type),
            mock.patch.object(InterpreterBuilder, "cast_impl", _cast_with_bfloat16),
            mock.patch.object(InterpreterBuilder, "create_fp_to_fp", _rounding_fp8),
            mock.patch.object(InterpreterBuilder, "create_dot", _dot_in_float32),
            mock.patch.object(InterpreterBuilder, "create_fsub", _difference),
            mock.patch.object(InterpreterBuilder, "get_bf16", _bfloat16, create=True),
            mock.patch.object(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        language.restore()
