"""Group-wise int4: packing, products and experts in Triton's interpreter, and on a GPU at the real sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada2_fast.kernels import fp8, gemm, int4, moe, router
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import summed
from tests.kernels.interpreter import interpreted, products_in_order
from tests.kernels.test_moe import DTYPES, of_experts

# Of the norm: kernels multiply whole numbers and scale sums, references multiply weights rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def experts(*args):
    return summed(moe.experts(*args))


def run(op, *args, **kwargs):
    with force_ops("triton"), interpreted():
        return op(*args, **kwargs)


def run_in_order(op, *args, **kwargs):
    with force_ops("triton"), interpreted(), products_in_order():
        return op(*args, **kwargs)


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def close(got, expected, tolerance=None):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.double() - expected.double()).norm()
    assert error <= (tolerance or TOLERANCE[got.dtype]) * expected.double().norm() and got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 128), (70, 300), (5, 64)])
def test_a_weight_by_the_formula(rows, columns, dtype):
    """Each group on its own, digit by digit as the words hold them."""
    weight = random(rows, columns, dtype=dtype) * 3
    words, scale = int4.quantize_weight(weight)
    groups = -(-columns // 128)
    assert words.shape == (groups, rows, 32) and words.dtype == torch.int16
    assert scale.shape == (rows, groups) and scale.dtype == dtype
    for row in range(rows):
        for group in range(groups):
            own = weight[row, group * 128 : group * 128 + 128].float()
            largest = own.max() if own.max() >= -own.min() else own.min()
            assert scale[row, group] == (largest / -8).to(dtype)
            wanted = (own / scale[row, group].float()).round().clamp(-8, 7)
            for k, q in enumerate(wanted):
                assert (words[group, row, k % 32].item() >> 4 * (k // 32)) % 16 - 8 == q


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**31))
def test_packing_loses_nothing(rows, columns, seed):
    digits = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words, scale = int4.pack(digits), torch.ones(rows, int4.num_groups(columns))
    assert words.shape == int4.packed_shape((rows, columns)) and torch.equal(int4.unpack(words, columns), digits)
    assert torch.equal(int4.dequantize_weight(words, scale, columns), digits.float() - 8)


def test_stacked_weights_are_quantised_one_by_one():
    weight = random(3, 70, 140)
    words, scale = int4.quantize_weight(weight)
    for i in range(3):
        own = int4.quantize_weight(weight[i])
        assert torch.equal(words[i], own.values) and torch.equal(scale[i], own.scale)
    wide = int4.dequantize_weight(words, scale, 140)
    assert wide.shape == weight.shape and torch.equal(wide[1], int4.dequantize_weight(words[1], scale[1], 140))


def test_a_weight_is_off_by_half_a_step_and_its_largest_value_by_nothing():
    weight = random(256, 384)
    words, scale = int4.quantize_weight(weight)
    wide = int4.dequantize_weight(words, scale, 384)
    step = scale.abs().repeat_interleave(128, 1)
    error = (wide - weight).abs()
    at_the_end = (weight / scale.repeat_interleave(128, 1)) > 7.5  # there is no eighth step on the other side
    assert (error <= step * (0.5 + at_the_end * 0.5) * (1 + 1e-6)).all()
    assert at_the_end.float().mean() < 0.01
    largest = weight.view(256, 3, 128).abs().argmax(2, keepdim=True)
    torch.testing.assert_close(wide.view(256, 3, 128).gather(2, largest), weight.view(256, 3, 128).gather(2, largest))
    assert 0.09 < (wide - weight).norm() / weight.norm() < 0.11


def test_groups_of_zeros_and_of_tiny_values():
    weight = torch.zeros(2, 256)
    weight[1] = random(256) * 1e-20
    words, scale = int4.quantize_weight(weight)
    wide = int4.dequantize_weight(words, scale, 256)
    assert not wide[0].any() and (wide[1] - weight[1]).norm() <= 0.12 * weight[1].norm()
    words, scale = int4.quantize_weight(weight, torch.float16)  # which has nothing as small
    assert not scale.any() and not int4.dequantize_weight(words, scale, 256).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, rows, columns", [(1, 128, 128), (7, 70, 300), (33, 200, 40), (70, 64, 256)])
def test_linear(tokens, rows, columns, dtype):
    x, bias = random(tokens, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    weight = int4.quantize_weight(random(rows, columns, seed=2), dtype)
    close(run(fp8.linear, x, *weight), int4.linear_ref(x, *weight))
    close(run(fp8.linear, x, *weight, bias), fp8.linear(x, *weight, bias))
    assert torch.equal(fp8.linear(x, *weight, bias), int4.linear_ref(x, *weight) + bias)


def test_linear_of_any_leading_shape_and_of_nothing():
    weight = int4.quantize_weight(random(70, 130))
    x = random(2, 3, 130)
    assert torch.equal(run(fp8.linear, x, *weight), run(fp8.linear, x.flatten(0, 1), *weight).unflatten(0, (2, 3)))
    assert run(fp8.linear, x[:, :0], *weight).shape == fp8.linear(x[:, :0], *weight).shape == (2, 0, 70)


def test_digits_are_exact_in_every_type():
    """All sixteen in all four places of a word, times ones: sums of whole numbers, without a rounding."""
    digits = torch.arange(16, dtype=torch.uint8).repeat(128, 8)
    words = int4.pack(digits)
    for dtype in DTYPES:
        x = torch.eye(128, dtype=dtype)
        got = run(fp8.linear, x, words, torch.ones(128, 1, dtype=dtype))
        assert torch.equal(got.T.float(), digits.float() - 8)


def expert_inputs(tokens, top_k=3, experts=7, hidden=140, inner=150, dtype=torch.float32, device="cpu"):
    h = random(tokens, hidden, dtype=dtype, device=device)
    wide = [
        random(*shape, seed=seed, dtype=dtype, device=device) / shape[-1] ** 0.5
        for seed, shape in enumerate(
            ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * inner, hidden), (hidden, inner)), start=1
        )
    ]
    weights = tuple(map(int4.quantize_weight, wide))
    gate = random(experts, hidden, seed=5, dtype=dtype, device=device) / hidden**0.5
    return h, weights[:2], weights[2:], (gate, torch.zeros(experts, device=device), top_k, 1, 1, 2.5), wide


def wanted(h, routing, weights, shared):
    values, scales = zip(*weights, strict=True)
    y = moe.experts_ref(h, routing.ids, routing.weights, *values, *scales)
    return y if shared is None else y + moe.mlp(h, *shared)


@of_experts
def test_experts(dtype, size, with_shared):
    tokens, top_k = size
    h, weights, shared, rule, _ = expert_inputs(tokens, top_k, dtype=dtype)
    shared = shared if with_shared else None
    routing = run(router.route, h, *rule, quantization="int4")
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_the_reference_is_what_the_weights_stand_for():
    h, weights, shared, rule, wide = expert_inputs(33)
    routing = router.route(h, *rule)
    stand_for = [
        gemm.QuantTensor(int4.dequantize_weight(*weight, matrix.shape[-1]))
        for weight, matrix in zip((*weights, *shared), wide, strict=True)
    ]
    got = experts(h, routing, *weights, shared)
    close(got, experts(h, routing, *stand_for[:2], tuple(stand_for[2:])))
    exact = experts(h, routing, *map(gemm.QuantTensor, wide[:2]), tuple(map(gemm.QuantTensor, wide[2:])))
    assert 0.05 < (got - exact).norm() / exact.norm() < 0.3


def test_a_shared_expert_of_another_width():
    h, weights, _, rule, _ = expert_inputs(9)
    shared = int4.quantize_weight(random(600, 140) / 12), int4.quantize_weight(random(140, 300) / 17)
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_no_expert_but_the_chosen_is_read():
    h, weights, shared, rule, _ = expert_inputs(40, top_k=1)
    rule[1][4] = 100.0
    for _, scale in weights:
        scale[torch.arange(7) != 4] = float("nan")
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_a_token_gets_the_same_bits_alone_as_in_any_batch():
    h, weights, shared, rule, _ = expert_inputs(50, dtype=torch.bfloat16)

    def forward(x):
        return experts(x, router.route(x, *rule, quantization="int4"), *weights, shared)

    together = run_in_order(forward, h)
    for rows in (slice(0, 1), slice(49, 50), slice(7, 40)):
        assert torch.equal(run_in_order(forward, h[rows]), together[rows])


@pytest.mark.parametrize("gated", [False, True])
def test_no_bit_depends_on_the_tiles(gated):
    """Several tiles of tokens and of rows, the last of each with fewer."""
    weight = int4.quantize_weight(random(2 * 200 if gated else 200, 140), torch.bfloat16)
    like = random(150, 140, dtype=torch.bfloat16, seed=1)

    def product(x, tile_m, tile_n):
        args = gemm.QuantTensor(x), weight, None, None, gated, x, tile_m, tile_n
        return run_in_order(gemm.gemm, *args, num_warps=4, num_stages=2).values

    expected = product(like, 64, 64)
    for tile_m, tile_n in ((16, 64), (32, 128), (128, 64), (128, 128)):
        assert torch.equal(product(like, tile_m, tile_n), expected)
    assert torch.equal(product(like[9:10], 16, 64), expected[9:10])


def test_refused():
    h, (gate_up, down), _, rule, _ = expert_inputs(5)
    routing = run(router.route, h, *rule)
    for name, args in {
        "gate_up": (random(5, 129)[:, :128], routing, gate_up, down),
        "gate_up: contiguous": (h, routing, gate_up._replace(scale=gate_up.scale[:, :, :1]), down),
        "down": (h, routing, gate_up, gemm.QuantTensor(down.values[:, :1], down.scale)),
        "down: contiguous": (h, routing, gate_up, down._replace(scale=down.scale.mT.contiguous().mT)),
        "h": (random(140, 5).T, routing, gate_up, down),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            run(experts, *args)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("hidden, inner", [(2048, 512), (4096, 1024)])
@pytest.mark.parametrize("tokens", [1, 32, 33, 256, 2048])
def test_gpu_experts_at_real_sizes(hidden, inner, tokens):
    h, weights, shared, rule, wide = expert_inputs(tokens, 8, 64, hidden, inner, torch.bfloat16, "cuda")
    routing = router.route(h, *rule, quantization="int4")
    got = experts(h, routing, *weights, shared)
    close(got, wanted(h, routing, weights, shared))
    exact = experts(h, routing, *map(gemm.QuantTensor, wide[:2]), tuple(map(gemm.QuantTensor, wide[2:])))
    assert (got.float() - exact.float()).norm() <= 0.25 * exact.float().norm()


@pytest.mark.gpu
def test_gpu_a_token_gets_the_same_bits_in_any_batch():
    h, weights, shared, rule, _ = expert_inputs(2048, 8, 64, 2048, 512, torch.bfloat16, "cuda")
    together = experts(h, router.route(h, *rule, quantization="int4"), *weights, shared)
    for rows in (slice(0, 1), slice(40, 72), slice(100, 356), slice(600, 1800)):
        alone = experts(h[rows], router.route(h[rows], *rule, quantization="int4"), *weights, shared)
        assert torch.equal(alone, together[rows])
