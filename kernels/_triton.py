"""Triton or its absence, the one rule that chooses it, and the registration of ops with PyTorch.

Kernel files take `triton` and `tl` from here. Where Triton is not installed both are a stand-in under which the files
still import; the ops then run their PyTorch references.
"""

from contextlib import contextmanager

import torch

from ._ambient import isolated

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:

    class _Absent:
        """Every attribute is the stand-in again; as a decorator it changes nothing."""

        def __getattr__(self, name):
            return self

        def __call__(self, value=None, *args, **kwargs):
            return self if value is None else value

    triton = tl = _Absent()
    HAS_TRITON = False

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the model's kernels take; they compute in float32

_library = torch.library.Library("llada2_fast", "FRAGMENT")
_forced = None


def use_triton(x):
    """Whether an op on tensor x runs its Triton kernels: yes on a GPU. The only rule there is."""
    if _forced is not None:
        return _forced == "triton"
    return x.is_cuda and HAS_TRITON


@contextmanager
def force_ops(choice):
    """For tests: within it every op runs "torch" (its reference) or "triton" (its kernels), whatever the device."""
    global _forced
    if choice not in ("torch", "triton"):
        raise ValueError(f'choice: expected "torch" or "triton", got {choice!r}')
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def register_op(schema, run, fake):
    """Define torch.ops.llada2_fast.<op>, opaque to torch.compile and capturable in a CUDA graph; returns what calls it.

    Tensors without data under force_ops("triton") go past PyTorch, which would take them for traced ones: what the op
    launches can then be noted.

    schema: the op's signature, "name(Tensor x, ...) -> Tensor", writes marked as in Tensor(a!). run: runs it on any
    device. fake: makes outputs of the right shapes and types without data.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, isolated(run), "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # what it gives has no gradient
    torch.library.register_fake(f"llada2_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.llada2_fast, name).default

    def call(x, *arguments):
        return (run if _forced == "triton" and x.is_meta else op)(x, *arguments)

    return call
