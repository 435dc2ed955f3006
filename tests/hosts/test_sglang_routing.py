"""Our choice of experts by block against the kernels in SGLang's own model file, both in Triton's interpreter."""

import ast
import importlib.util

import pytest
import torch
import triton

from llada2_fast.kernels import router
from llada2_fast.kernels._triton import force_ops
from tests.hosts.test_sglang import VERSION
from tests.kernels.interpreter import interpreted

KERNELS = ("_block_aggregation_kernel", "_token_topk_kernel")
HEADER = "import triton\nimport triton.language as tl\nfrom triton.language import math as libdevice\n"


@pytest.fixture(scope="module")
def kernels(unpacked, tmp_path_factory):
    """A module of SGLang's two kernels without the rest of their file, which needs a GPU."""
    source = (unpacked(VERSION) / "sglang/srt/models/llada2.py").read_text("utf-8")
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    path = tmp_path_factory.mktemp("sglang") / "routing.py"
    own = [f"@triton.jit\n{ast.get_source_segment(source, found[name])}\n" for name in KERNELS]
    path.write_text(HEADER + "".join(own))
    spec = importlib.util.spec_from_file_location("sglang_routing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(kernels, logits, bias, length, capacity, top_k):
    """ids and weights [T, K] as block_topk_triton of the same file launches its kernels."""
    tokens, experts = logits.shape
    blocks = triton.cdiv(tokens, length)
    admitted = torch.empty(blocks, capacity, dtype=torch.int32)
    ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
    first, second = (getattr(kernels, name) for name in KERNELS)
    strides = (*logits.stride(), *bias.stride())
    first[(blocks,)](
        logits, bias, admitted, tokens, experts, length, capacity, *strides,
        BLOCK_SIZE_E=triton.next_power_of_2(experts), BLOCK_SIZE_T=length,
    )  # fmt: skip
    second[(tokens,)](
        logits, bias, admitted, ids, weights, tokens, experts, capacity, length, top_k, *strides,
        BLOCK_SIZE_C=triton.next_power_of_2(capacity), TOPK_POW2=triton.next_power_of_2(top_k),
    )  # fmt: skip
    return ids.long(), weights


def near_ties(shape, generator):
    """float32 of few values, apart by up to 3 ulp."""
    values = torch.randint(-3, 4, shape, generator=generator) * 0.25
    ulps = torch.randint(4, shape, generator=generator, dtype=torch.int32)
    return (values.view(torch.int32) + ulps).view(torch.float32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens", [7, 37])
@pytest.mark.parametrize("experts, capacity, top_k", [(32, 10, 4), (12, 5, 3), (19, 19, 2), (16, 1, 1), (256, 48, 8)])
def test_the_same_experts_and_weights(kernels, experts, capacity, top_k, tokens, ties):
    generator, length = torch.Generator().manual_seed(tokens), 8
    if ties:
        logits, bias = (near_ties(shape, generator) for shape in ((tokens, experts), (experts,)))
    else:
        logits, bias = (torch.randn(shape, generator=generator) for shape in ((tokens, experts), (experts,)))
    rule = {"top_k": top_k, "n_group": 1, "topk_group": 1, "scale": 1.0, "capacity": capacity}
    with interpreted():
        ids, weights = theirs(kernels, logits, bias, length, capacity, top_k)
        with force_ops("triton"):  # the product of a unit matrix changes no logit
            blocks = router.token_blocks(1, tokens, length)
            ours = router.route(torch.eye(tokens), logits.T.contiguous(), bias, **rule, block=blocks)
    assert torch.equal(ours.ids, ids)
    torch.testing.assert_close(ours.weights, weights, atol=0, rtol=1e-6)
