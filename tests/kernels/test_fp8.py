"""Block-scaled fp8: quantisation, products and experts in Triton's interpreter, and on a GPU at the real sizes."""

import pytest
import torch
import torch.nn.functional as F

from llada2_fast.kernels import fp8, gemm, moe, router
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import summed
from tests.kernels.interpreter import interpreted, products_in_order
from tests.kernels.test_moe import DTYPES, of_experts

# Of the norm. Sums have another order; where a rounding between two products goes the other way, an e4m3 digit follows.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}
# Of experts on a GPU: its fp8 products keep about 14 bits within 128 of K, so far more roundings go the other way.
GPU_TOLERANCE = 2e-2

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < fp8.CAPABILITY,
    reason=f"needs compute capability {fp8.CAPABILITY}",
)


def run(op, *args, **kwargs):
    with force_ops("triton"), interpreted():
        return op(*args, **kwargs)


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8)


def close(got, expected, tolerance=None):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.double() - expected.double()).norm()
    assert error <= (tolerance or TOLERANCE[got.dtype]) * expected.double().norm() and got.isfinite().all()


@pytest.mark.parametrize("rows, columns, parts", [(1, 1, 1), (128, 256, 1), (130, 300, 1), (140, 129, 2)])
def test_a_weight_by_the_formula(rows, columns, parts):
    weight = random(rows, columns) * 3
    values, scale = fp8.quantize_weight(weight, parts)
    assert values.shape == weight.shape and values.dtype == torch.float8_e4m3fn
    assert scale.shape == gemm.scale_shape(weight.shape, parts) and scale.dtype == torch.float32
    height = rows // parts
    tops = [part * height + top for part in range(parts) for top in range(0, height, 128)]
    for i, top in enumerate(tops):
        bottom = min(top + 128, (top // height + 1) * height)
        for j in range(gemm.num_groups(columns)):
            block = weight[top:bottom, j * 128 : j * 128 + 128]
            assert scale[i, j] == block.abs().max() / 448
            q = values[top:bottom, j * 128 : j * 128 + 128]
            assert torch.equal(q.float(), (block / scale[i, j]).to(torch.float8_e4m3fn).float())


def test_stacked_weights_are_quantised_one_by_one():
    weight = random(3, 140, 40)
    values, scale = fp8.quantize_weight(weight, 2)
    for i in range(3):
        own = fp8.quantize_weight(weight[i], 2)
        assert torch.equal(bits(values[i]), bits(own.values)) and torch.equal(scale[i], own.scale)
    assert torch.equal(fp8.dequantize_weight(values, scale, 2)[1], fp8.dequantize_weight(values[1], scale[1], 2))


def test_a_weight_is_off_by_half_a_step_at_most():
    weight = random(256, 384)
    values, scale = fp8.quantize_weight(weight)
    restored = fp8.dequantize_weight(values, scale)
    step = torch.maximum(weight.abs() / 16, scale.max() * 2**-10)  # three digits, and the smallest subnormal
    assert ((restored - weight).abs() <= step).all()
    assert (restored - weight).norm() <= 0.03 * weight.norm()


def test_blocks_of_zeros_and_of_tiny_values():
    weight = torch.zeros(256, 128)
    weight[128:] = random(128, 128) * 1e-20
    values, scale = fp8.quantize_weight(weight)
    assert not values[:128].float().any() and (scale > 0).all()
    assert (fp8.dequantize_weight(values, scale) - weight).norm() <= 0.03 * weight.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (7, 128), (3, 300), (33, 1100)])
def test_activations(shape, dtype):
    """Kernel and reference give the same bits, and those of the formula."""
    x = random(*shape, dtype=dtype) * 7
    if shape[0] > 2:
        x[1] = 0
        x[2, 0] = float("nan")
    got, wanted = run(fp8.quantize, x), fp8.quantize_ref(x)
    assert got.values.shape == x.shape and got.values.dtype == torch.float8_e4m3fn
    sound = torch.arange(shape[0]) != 2
    assert torch.equal(bits(got.values[sound]), bits(wanted.values[sound]))
    assert torch.equal(got.scale[sound], wanted.scale[sound])
    for row, values, scale in zip(x[sound].float(), wanted.values[sound].float(), wanted.scale[sound], strict=True):
        for group, (part, own) in enumerate(zip(row.split(128), scale, strict=True)):
            assert own == part.abs().max().clamp_min(fp8.TINY) / 448
            assert torch.equal(values[group * 128 : group * 128 + 128], (part / own).to(torch.float8_e4m3fn).float())
    if shape[0] > 2:  # NaN stays NaN, so that a broken token is seen
        assert got.values[2, 0].isnan() and wanted.values[2, 0].isnan()


def test_activations_of_a_wider_tensor():
    wide = random(9, 400)
    for view in (wide[::2, 3:203], wide[:, ::2]):
        got, wanted = run(fp8.quantize, view), fp8.quantize_ref(view)
        assert torch.equal(bits(got.values), bits(wanted.values)) and torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, rows, columns", [(1, 128, 128), (7, 70, 300), (33, 200, 40), (70, 64, 256)])
def test_linear(tokens, rows, columns, dtype):
    x, bias = random(tokens, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    weight = fp8.quantize_weight(random(rows, columns, seed=2))
    close(run(fp8.linear, x, *weight), fp8.linear_ref(x, *weight))
    close(run(fp8.linear, x, *weight, bias), fp8.linear(x, *weight, bias))
    assert torch.equal(fp8.linear(x, *weight, bias), fp8.linear_ref(x, *weight) + bias)


def test_linear_of_any_leading_shape_and_of_nothing():
    weight = fp8.quantize_weight(random(70, 130))
    x = random(2, 3, 130)
    assert torch.equal(run(fp8.linear, x, *weight), run(fp8.linear, x.flatten(0, 1), *weight).unflatten(0, (2, 3)))
    assert run(fp8.linear, x[:, :0], *weight).shape == (2, 0, 70)
    assert fp8.linear(x[:, :0], *weight).shape == (2, 0, 70)


def test_rows_that_come_in_fp8():
    """The same bits as of those that are quantised here; and some of the rows."""
    h, weights, shared, rule, _ = expert_inputs(9, dtype=torch.bfloat16)
    weight, bias = fp8.quantize_weight(random(70, 140)), random(70, seed=1, dtype=torch.bfloat16)
    rows, routing = run(fp8.quantized, h), run(router.route, h, *rule)
    assert run(fp8.quantized, rows) is rows and fp8.unquantised(rows) is h and fp8.unquantised(h) is h
    assert torch.equal(run(fp8.linear, rows, *weight, bias), run(fp8.linear, h, *weight, bias))
    assert torch.equal(run(moe.mlp, rows, *shared), run(moe.mlp, h, *shared))
    assert torch.equal(run(experts, rows, routing, *weights, shared), run(experts, h, routing, *weights, shared))
    for some in (slice(2), slice(3, 7), torch.tensor([8, 0])):
        assert torch.equal(run(fp8.linear, rows[some], *weight), run(fp8.linear, h[some], *weight))
    with pytest.raises(ValueError, match="^h: "):
        run(experts, rows, routing, *(gemm.QuantTensor(w.values[..., :128].contiguous(), w.scale) for w in weights))


def test_linear_without_scales_is_the_plain_one():
    x, weight, bias = random(3, 20), random(5, 20, seed=1), random(5, seed=2)
    assert torch.equal(fp8.linear(x, weight, None, bias), F.linear(x, weight, bias))


def test_linear_is_close_to_the_plain_one():
    """What quantising both sides costs a product of independent numbers: about 2.6 % each."""
    x, weight = random(64, 1024), random(512, 1024, seed=1)
    exact = x @ weight.T
    error = (fp8.linear(x, *fp8.quantize_weight(weight)) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.045


def test_linear_refuses():
    weight, scale = fp8.quantize_weight(random(70, 130))
    for args, name in (
        ((random(3, 129), weight, scale), "weight"),
        ((random(3, 130), weight, scale[:, :1]), "scale"),
        ((random(3, 130), weight, scale.T.contiguous().T[:, [1, 0]].T), "scale"),
    ):
        with pytest.raises(ValueError, match=f"^{name}:"):
            run(fp8.linear, *args)


def expert_inputs(tokens, top_k=3, experts=7, hidden=140, inner=150, dtype=torch.float32, device="cpu"):
    h = random(tokens, hidden, dtype=dtype, device=device)
    wide = [
        random(*shape, seed=seed, dtype=dtype, device=device) / shape[-1] ** 0.5
        for seed, shape in enumerate(
            ((experts, 2 * inner, hidden), (experts, hidden, inner), (2 * inner, hidden), (hidden, inner)), start=1
        )
    ]
    weights = tuple(fp8.quantize_weight(weight, parts) for weight, parts in zip(wide, (2, 1, 2, 1), strict=True))
    gate = random(experts, hidden, seed=5, dtype=dtype, device=device) / hidden**0.5
    return h, weights[:2], weights[2:], (gate, torch.zeros(experts, device=device), top_k, 1, 1, 2.5), wide


def experts(*args):
    return summed(moe.experts(*args))


def wanted(h, routing, weights, shared):
    values, scales = zip(*weights, strict=True)
    y = moe.experts_ref(h, routing.ids, routing.weights, *values, *scales)
    return y if shared is None else y + moe.mlp(h, *shared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, inner", [(1, 150), (7, 64), (33, 128)])
def test_mlp(tokens, inner, dtype):
    h, _, shared, _, _ = expert_inputs(tokens, inner=inner, dtype=dtype)
    close(run(moe.mlp, h, *shared), moe.mlp(h, *shared))


@of_experts
def test_experts(dtype, size, with_shared):
    tokens, top_k = size
    h, weights, shared, rule, _ = expert_inputs(tokens, top_k, dtype=dtype)
    shared = shared if with_shared else None
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_a_shared_expert_of_another_width():
    h, weights, _, rule, _ = expert_inputs(9)
    shared = fp8.quantize_weight(random(600, 140) / 12, 2), fp8.quantize_weight(random(140, 300) / 17)
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_gate_and_up_have_their_own_blocks():
    """An up half a thousand times smaller than the gate half must not drown in the gate's scale."""
    h, _, _, _, (_, _, gate_up, down) = expert_inputs(5)
    gate_up[:150] *= 1000
    shared = fp8.quantize_weight(gate_up, 2), fp8.quantize_weight(down)
    exact = moe.mlp(h, gemm.QuantTensor(gate_up), gemm.QuantTensor(down))
    got = run(moe.mlp, h, *shared)
    close(got, moe.mlp(h, *shared))
    assert (got - exact).norm() <= 0.1 * exact.norm()


def test_no_expert_but_the_chosen_is_read():
    h, weights, shared, rule, _ = expert_inputs(40, top_k=1)
    rule[1][4] = 100.0
    for _, scale in weights:
        scale[torch.arange(7) != 4] = float("nan")
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_a_token_gets_the_same_bits_alone_as_in_any_batch():
    h, weights, shared, rule, _ = expert_inputs(50, dtype=torch.bfloat16)

    head = fp8.quantize_weight(random(130, 140))

    def forward(x):
        return fp8.linear(experts(x, router.route(x, *rule, quantization="fp8"), *weights, shared), *head)

    with force_ops("triton"), interpreted(), products_in_order():
        together = forward(h)
        for rows in (slice(0, 1), slice(49, 50), slice(7, 40)):
            assert torch.equal(forward(h[rows]), together[rows])


@pytest.mark.parametrize("gated", [False, True])
def test_no_bit_depends_on_the_tiles(gated):
    """Several tiles of tokens and of rows, the last of each with fewer."""
    weight = fp8.quantize_weight(random(2 * 200 if gated else 200, 140), 2 if gated else 1)
    like = random(150, 140, dtype=torch.bfloat16, seed=1)

    def product(x, tile_m, tile_n):
        with force_ops("triton"), interpreted(), products_in_order():
            out = gemm.gemm(fp8.quantize(x), weight, None, None, gated, x, tile_m, tile_n, num_warps=4, num_stages=2)
            return [bits(part) for part in out if part is not None]

    expected = product(like, 64, 64)
    for tile_m, tile_n in ((16, 64), (32, 128), (128, 64), (128, 128)):
        assert all(map(torch.equal, product(like, tile_m, tile_n), expected))
    assert all(torch.equal(row, part[9:10]) for row, part in zip(product(like[9:10], 16, 64), expected, strict=True))


# On a GPU


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("rows, columns", [(3072, 2048), (5120, 4096), (157184, 2048)])
@pytest.mark.parametrize("tokens", [1, 32, 300])
def test_gpu_linear_at_real_sizes(rows, columns, tokens):
    x = random(tokens, columns, dtype=torch.bfloat16, device="cuda")
    weight = fp8.quantize_weight(random(rows, columns, seed=1, device="cuda"))
    got, ref = fp8.quantize(x), fp8.quantize_ref(x)
    assert torch.equal(bits(got.values), bits(ref.values)) and torch.equal(got.scale, ref.scale)
    close(fp8.linear(x, *weight), fp8.linear_ref(x, *weight))


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("hidden, inner", [(2048, 512), (4096, 1024)])
@pytest.mark.parametrize("tokens", [1, 32, 33, 256, 2048])
def test_gpu_experts_at_real_sizes(hidden, inner, tokens):
    h, weights, shared, rule, wide = expert_inputs(tokens, 8, 64, hidden, inner, torch.bfloat16, "cuda")
    routing = router.route(h, *rule, quantization="fp8")
    got = experts(h, routing, *weights, shared)
    close(got, wanted(h, routing, weights, shared), GPU_TOLERANCE)
    exact = experts(h, routing, *map(gemm.QuantTensor, wide[:2]), tuple(map(gemm.QuantTensor, wide[2:])))
    assert (got.float() - exact.float()).norm() <= 0.08 * exact.float().norm()


@pytest.mark.gpu
@needs_fp8
def test_gpu_a_token_gets_the_same_bits_in_any_batch():
    h, weights, shared, rule, _ = expert_inputs(2048, 8, 64, 2048, 512, torch.bfloat16, "cuda")
    together = experts(h, router.route(h, *rule, quantization="fp8"), *weights, shared)
    for rows in (slice(0, 1), slice(40, 72), slice(100, 356), slice(600, 1800)):
        routing = router.route(h[rows], *rule, quantization="fp8")
        assert torch.equal(experts(h[rows], routing, *weights, shared), together[rows])
