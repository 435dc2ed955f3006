"""The router and expert kernels against their references: in Triton's interpreter, and on a GPU at the real sizes."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import aot
from llada2_fast.kernels import gemm, moe, router
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.combine import summed
from tests.kernels.interpreter import interpreted, products_in_order
from tests.thinned import thinned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ROUTES = {
    "grouped": dict(experts=16, top_k=4, n_group=8, topk_group=4),
    "groups of three": dict(experts=12, top_k=2, n_group=4, topk_group=1),
    "three groups": dict(experts=15, top_k=4, n_group=3, topk_group=2),
    "one group of odd size": dict(experts=11, top_k=3, n_group=1, topk_group=1),
    "all groups kept": dict(experts=12, top_k=3, n_group=4, topk_group=4),
    "one expert, not renormalised": dict(experts=8, top_k=1, n_group=2, topk_group=1),
    "every expert": dict(experts=4, top_k=4, n_group=1, topk_group=1),
    "block": dict(experts=12, top_k=3, n_group=4, topk_group=1, capacity=4, length=8),
    "block longer than a program's tokens": dict(experts=12, top_k=2, n_group=1, topk_group=1, capacity=2, length=40),
}
# Who selects, see router.TOKENS, and who lists the tiles: the last of them, or programs of their own.
SIZES = [("few", 1), ("few", 4), ("few", 5), ("many", 7), ("many", 32), ("many", 33)]
BLOCKS = [("block", t) for t in (1, 7, 32, 33, 70)]
EXPERT_SIZES = [(1, 3), (7, 1), (33, 3), (70, 2)]  # tokens, top_k
EXPERT_CASES = thinned(3, DTYPES, EXPERT_SIZES, [False, True])
of_experts = pytest.mark.parametrize("dtype, size, with_shared", EXPERT_CASES, ids=str)


def route_inputs(rule, tokens, hidden=48, dtype=torch.float32, weight_dtype=None, seed=0, device="cpu"):
    """h, weight, bias; the rule's arguments; blocks or None."""
    rule = dict(rule)
    experts, length = rule.pop("experts"), rule.pop("length", None)
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    weight = (torch.randn(experts, hidden, generator=generator) / hidden**0.5).to(device, weight_dtype or dtype)
    bias = (torch.randn(experts, generator=generator) * 0.1).to(device)
    rule = {"scale": 2.5, "capacity": None} | rule
    return (h, weight, bias), rule, length and router.token_blocks(1, tokens, length, device)


def run(op, *args, **kwargs):
    with force_ops("triton"), interpreted():
        return op(*args, **kwargs)


def run_in_order(op, *args, **kwargs):
    with force_ops("triton"), interpreted(), products_in_order():
        return op(*args, **kwargs)


def listed(ids, experts, tile_m):
    """order and tiles of these ids [T, K], written out."""
    pairs = [[p for p, e in enumerate(ids.flatten().tolist()) if e == expert] for expert in range(experts)]
    tiles, begin = [], 0
    for expert, own in enumerate(pairs):
        tiles += [[expert, begin + i, begin + len(own)] for i in range(0, len(own), tile_m)]
        begin += len(own)
    return sum(pairs, []), tiles


def check_route(got, tensors, rule, blocks):
    ids, weights = router.route_ref(*tensors, **rule, block=blocks and blocks.ids, real=blocks and blocks.real)
    assert torch.equal(got.ids, ids) and got.ids.dtype == torch.int64
    torch.testing.assert_close(got.weights, weights, atol=1e-6, rtol=1e-5)
    order, tiles = listed(ids, len(tensors[1]), got.tile_m)
    assert got.order.tolist() == order
    assert got.tiles[: got.num_tiles.item()].tolist() == tiles


@pytest.mark.parametrize(
    "name, kind, tokens",
    [(name, *size) for name, rule in ROUTES.items() for size in (BLOCKS if "length" in rule else SIZES)],
)
def test_route(name, kind, tokens, monkeypatch):
    tensors, rule, blocks = route_inputs(ROUTES[name], tokens)
    if kind == "many":
        monkeypatch.setattr(router, "FEW", 0)
    for at_once in (router.AT_ONCE, 0):
        monkeypatch.setattr(router, "AT_ONCE", at_once)
        check_route(run(router.route, *tensors, **rule, block=blocks), tensors, rule, blocks)


@pytest.mark.parametrize(
    "name, tokens, share", thinned(3, ["grouped", "three groups", "block"], [1, 5, 32, 70, 129], [0.0, 0.4, 1.0])
)
def test_tokens_of_no_page_go_to_no_expert(name, tokens, share):
    """Wherever they stand and whatever they hold; the others are routed and placed as if all were."""
    tensors, rule, blocks = route_inputs(ROUTES[name], tokens)
    generator = torch.Generator().manual_seed(tokens)
    slot = torch.randint(9, (tokens,), generator=generator)
    gone = torch.rand(tokens, generator=generator) < share
    if blocks is not None:  # a block of nobody's is one as a whole
        gone = gone[blocks.starts][blocks.ids]
    slot[gone] = -1
    full = run(router.route, *tensors, **rule, block=blocks)
    tensors[0][gone] = float("nan")
    for at_once in (router.AT_ONCE, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(router, "AT_ONCE", at_once)
            got = run(router.route, *tensors, **rule, block=blocks, slot=slot)
        assert torch.equal(got.ids, full.ids.masked_fill(gone[:, None], -1))
        assert torch.equal(got.weights, full.weights.masked_fill(gone[:, None], 0.0))
        order, tiles = listed(got.ids, len(tensors[1]), got.tile_m)
        assert got.num_tiles.item() == len(tiles) and got.tiles[: len(tiles)].tolist() == tiles
        assert got.order[: len(order)].tolist() == order


@pytest.mark.parametrize("tokens", [64, 128, 129, 513])
def test_route_of_few_and_of_many_tokens(tokens):
    tensors, rule, _ = route_inputs(ROUTES["grouped"], tokens)
    check_route(run(router.route, *tensors, **rule), tensors, rule, None)


@pytest.mark.parametrize(
    "rule, tokens, programs",
    [("grouped", 4, [1]), ("grouped", 5, [2]), ("grouped", 128, [32]), ("grouped", 129, [33, 33]),
     ("grouped", 513, [33, 33]), ("block", 8, [1]), ("block", 9, [2]), ("block", 129, [17, 17])],
)  # fmt: skip
def test_programs_that_select(rule, tokens, programs):
    """Of the selection, and of the listing of tiles if there are too many pairs for one of them to sort."""
    grids = []
    tensors, rule, blocks = route_inputs(ROUTES[rule], tokens, device="meta")
    with force_ops("triton"), mock.patch.object(JITFunction, "run", lambda *a, grid, **kw: grids.append(grid[0])):
        router.route(*tensors, **rule, block=blocks)
    assert grids[1:] == programs


@pytest.mark.parametrize("dtype, weight_dtype", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("hidden", [1100, 512])
def test_route_of_every_type_and_of_several_chunks(dtype, weight_dtype, hidden):
    tensors, rule, _ = route_inputs(ROUTES["grouped"], 33, hidden, dtype, weight_dtype)
    check_route(run(router.route, *tensors, **rule), tensors, rule, None)


@pytest.mark.parametrize("name", [name for name in ROUTES if name != "one expert, not renormalised"])
@pytest.mark.parametrize("tokens", [6, 33])
def test_ties_go_to_the_lower_expert_and_group(name, tokens):
    """All scores are one half, biases have three values: ties everywhere, also between groups and at the capacity."""
    (h, weight, bias), rule, blocks = route_inputs(ROUTES[name], tokens)
    bias = torch.tensor([0.0, 1, 1, 0, 1, -1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1])[: len(bias)]
    tensors = (h * 0, weight, bias)
    check_route(run(router.route, *tensors, **rule, block=blocks), tensors, rule, blocks)


def exact_inputs(choices, bias, top_k, capacity, length):
    """h, weight, bias, the rule and blocks such that a token's c is exactly 0, 1/2 or 1 plus bias, rounded once.

    choices: [T, E] of -1, 0, 1.
    """
    h, weight = torch.eye(len(choices)), 200.0 * choices.T.contiguous()  # sigmoid(+-200) is 1 or 0 in float32
    rule = {"top_k": top_k, "n_group": 1, "topk_group": 1, "scale": 1.0, "capacity": capacity}
    return (h, weight, bias), rule, router.token_blocks(1, len(choices), length)


def chosen(c, top_k, capacity):
    """A block's experts by exact comparisons of its c [n, E], ties to the lower id: its pool, and each token's ids."""
    c = c.tolist()
    best = [max(of_expert) for of_expert in zip(*c, strict=True)]
    pool = sorted(range(len(best)), key=lambda e: -best[e])[:capacity]
    return pool, [sorted(sorted(pool), key=lambda e: -own[e])[:top_k] for own in c]


@st.composite
def near_ties(draw):
    """choices, bias, top_k, capacity and length; c are apart by some ulp, by 1e-7 or not at all."""
    experts, tokens, length = draw(st.integers(2, 19)), draw(st.integers(1, 12)), draw(st.sampled_from([1, 3, 8]))
    capacity = draw(st.integers(1, experts))
    steps = st.lists(st.integers(-2, 2), min_size=experts, max_size=experts)
    base = torch.tensor(draw(st.sampled_from([0.0, 0.3, -0.3, 1.0]))).expand(experts).contiguous()
    if draw(st.booleans()):
        bias = base + 1e-7 * torch.tensor(draw(steps))
    else:
        bias = (base.view(torch.int32) + torch.tensor(draw(steps), dtype=torch.int32).abs()).view(torch.float32)
    row = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=experts, max_size=experts)
    choices = torch.tensor(draw(st.lists(row, min_size=tokens, max_size=tokens)))
    return choices, bias, draw(st.integers(1, capacity)), capacity, length


@given(near_ties(), st.booleans())
@settings(max_examples=60)
def test_ties_and_near_ties_of_blocks_are_decided_exactly(case, at_once):
    """In both stages. torch.topk promises no order of equal values: which they are it must say alike."""
    choices, bias, top_k, capacity, length = case
    tensors, rule, blocks = exact_inputs(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "AT_ONCE", router.AT_ONCE if at_once else 0)
        got = run(router.route, *tensors, **rule, block=blocks)
    check_route(got, tensors, rule, blocks)
    for c, ids in zip(((choices + 1) / 2 + bias).split(length), got.ids.split(length), strict=True):
        pool, wanted = chosen(c, top_k, capacity)
        assert ids.tolist() == wanted
        best = c.amax(0)
        assert torch.equal(best.topk(capacity).values, best[pool])
        values = torch.full_like(c, float("-inf")).index_copy_(1, torch.tensor(pool), c[:, pool]).topk(top_k).values
        assert torch.equal(values, c.gather(1, ids))


def nudged(c, top_k, capacity):
    """Each token's ids as SGLang's block routing chose them at first (sgl-project/sglang#31768): by scores lowered by
    3e-7 times the expert's id, -10000 for who is not admitted. SGLang 0.5.23 compares the scores themselves, see
    tests/hosts/test_sglang_routing.py."""
    c = c - 3e-7 * torch.arange(c.shape[1])
    pool = c.amax(0).sort(descending=True, stable=True).indices[:capacity]
    admitted = torch.full_like(c, -10000.0).index_copy_(1, pool, c[:, pool])
    return admitted.sort(descending=True, stable=True).indices[:, :top_k].tolist()


@pytest.mark.parametrize(
    "bias, capacity, ours, nudge",
    [  # of experts 0 .. 7; one of top_k
        ([0, 1, 1, 1, 1, 1, 1, 1], 8, 1, 1),  # equal: both take the lower id
        ([0, 1, 0, 0, 0, 0, 1 + 1e-6, 0], 8, 6, 1),  # better, but by less than 5 * 3e-7: another expert of the token
        ([0, 1, 0, 0, 0, 0, 1 + 1e-6, 0], 1, 6, 1),  # and another one admitted
        ([0, 1, 0, 0, 0, 0, 1 + 3e-6, 0], 1, 6, 6),
    ],
)
def test_what_lowering_scores_by_expert_would_choose(bias, capacity, ours, nudge):
    case = torch.full((2, 8), -1.0), torch.tensor(bias, dtype=torch.float32), 1, capacity, 8
    tensors, rule, blocks = exact_inputs(*case)
    by_kernel = run(router.route, *tensors, **rule, block=blocks)
    by_reference = router.route(*tensors, **rule, block=blocks)
    assert by_kernel.ids.tolist() == by_reference.ids.tolist() == [[ours], [ours]]
    assert nudged(tensors[2].expand(2, 8), 1, capacity) == [[nudge], [nudge]]


def test_ragged_blocks_of_several_rows():
    """Three rows of 13 tokens in blocks of 8: blocks of 8 and 5 tokens, none across rows."""
    tensors, rule, _ = route_inputs(ROUTES["block"], 39)
    blocks = router.token_blocks(3, 13, 8)
    assert blocks.starts.tolist() == [0, 8, 13, 21, 26, 34]
    assert blocks.ids.tolist() == sum(([2 * r] * 8 + [2 * r + 1] * 5 for r in range(3)), [])
    check_route(run(router.route, *tensors, **rule, block=blocks), tensors, rule, blocks)


@pytest.mark.parametrize("at_once", [router.AT_ONCE, 0])
@pytest.mark.parametrize("name", [name for name, rule in ROUTES.items() if "length" in rule])
def test_padding_has_no_say_in_what_its_block_is_admitted_to(name, at_once, monkeypatch):
    """The others get what they get without it, wherever it stands; a block of padding alone gets no more experts."""
    monkeypatch.setattr(router, "AT_ONCE", at_once)
    tensors, rule, blocks = route_inputs(ROUTES[name], 100)
    length = ROUTES[name]["length"]
    real = torch.rand(100, generator=torch.Generator().manual_seed(2)) < 0.5
    real[length : 2 * length] = False
    tensors[0][~real] *= 50.0  # would win every race
    blocks = blocks._replace(real=real)
    got = run(router.route, *tensors, **rule, block=blocks)
    check_route(got, tensors, rule, blocks)
    alone = router.route_ref(tensors[0][real], *tensors[1:], **rule, block=blocks.ids[real])
    assert torch.equal(got.ids[real], alone[0])
    assert all(len(got.ids[blocks.ids == block].unique()) <= rule["capacity"] for block in blocks.ids.unique())


@pytest.mark.parametrize("name", [name for name, rule in ROUTES.items() if "length" in rule])
@pytest.mark.parametrize("tokens", [1, 8, 40, 41, 129])
def test_tiles_are_of_the_experts_that_blocks_are_admitted_to(name, tokens):
    """Of at most `capacity` experts for one block, of the union of what blocks chose for several."""
    tensors, rule, blocks = route_inputs(ROUTES[name], tokens)
    got = run(router.route, *tensors, **rule, block=blocks)
    each = [set(got.ids[blocks.ids == block].flatten().tolist()) for block in range(len(blocks.starts))]
    assert max(map(len, each)) <= rule["capacity"]
    assert set(got.tiles[: got.num_tiles, 0].tolist()) == set.union(*each)


def test_all_tokens_to_the_same_experts():
    (h, weight, bias), rule, _ = route_inputs(ROUTES["grouped"], 70)
    bias[torch.tensor([0, 1, 8, 9])] = 5.0
    got = run(router.route, h, weight, bias, **rule)
    check_route(got, (h, weight, bias), rule, None)
    assert got.ids.unique().tolist() == [0, 1, 8, 9]


def test_a_token_is_routed_alone_as_in_any_batch(monkeypatch):
    """Bit for bit, whether chunks of H are summed by one program or by several, and whoever selects for it."""
    (h, weight, bias), rule, _ = route_inputs(ROUTES["grouped"], 66, 1100)
    together = run_in_order(router.route, h, weight, bias, **rule)
    for rows in (slice(0, 1), slice(65, 66), slice(20, 53)):
        alone = run_in_order(router.route, h[rows], weight, bias, **rule)
        assert torch.equal(alone.ids, together.ids[rows]) and torch.equal(alone.weights, together.weights[rows])
    monkeypatch.setattr(router, "SPLIT_BELOW", 0)
    monkeypatch.setattr(router, "FEW", 0)
    whole = run_in_order(router.route, h, weight, bias, **rule)
    assert torch.equal(whole.ids, together.ids) and torch.equal(whole.weights, together.weights)


def test_a_token_of_nan_stays_in_bounds_and_disturbs_nobody():
    (h, weight, bias), rule, _ = route_inputs(ROUTES["grouped"], 33)
    clean = run(router.route, h, weight, bias, **rule)
    h[5] = float("nan")
    got = run(router.route, h, weight, bias, **rule)
    others = torch.arange(33) != 5
    assert torch.equal(got.ids[others], clean.ids[others]) and torch.equal(got.weights[others], clean.weights[others])
    assert len(got.ids[5].unique()) == 4 and got.ids[5].min() >= 0 and got.ids[5].max() < 16
    assert got.weights[5].isnan().all()
    assert got.order.sort().values.tolist() == list(range(33 * 4))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(weight=torch.randn(16, 47)), "weight"),
        (dict(bias=torch.randn(15)), "bias"),
        (dict(h=torch.randn(48, 9).T), "h"),
        (dict(top_k=9), "top_k"),
        (dict(top_k=0), "top_k"),
    ],
)
def test_route_refuses(change, name):
    (h, weight, bias), rule, _ = route_inputs(ROUTES["grouped"], 9)
    with pytest.raises(ValueError, match=rf"^{name}:"):
        run(router.route, **(dict(h=h, weight=weight, bias=bias) | rule | change))


def expert_inputs(tokens, top_k=3, experts=7, hidden=40, inner=24, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)  # the real sizes are half a minute's work for a CPU

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).div_(shape[-1] ** 0.5).to(dtype)

    h = random(tokens, hidden) * hidden**0.5
    shared = gemm.QuantTensor(random(2 * inner, hidden)), gemm.QuantTensor(random(hidden, inner))
    weights = gemm.QuantTensor(random(experts, 2 * inner, hidden)), gemm.QuantTensor(random(experts, hidden, inner))
    return h, weights, shared, (random(experts, hidden), torch.zeros(experts, device=device), top_k, 1, 1, 2.5)


def experts(*args):
    return summed(moe.experts(*args))


def wanted(h, routing, weights, shared):
    y = moe.experts_ref(h, routing.ids, routing.weights, *(weight.values for weight in weights))
    return y if shared is None else y + moe.mlp(h, *shared)


def close(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = expected.float().abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype] * scale)


@of_experts
def test_experts(dtype, size, with_shared):
    tokens, top_k = size
    h, weights, shared, rule = expert_inputs(tokens, top_k, dtype=dtype)
    shared = shared if with_shared else None
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


@pytest.mark.parametrize("hidden, inner", [(64, 64), (130, 70), (16, 128)])
def test_experts_of_other_widths(hidden, inner):
    h, weights, shared, rule = expert_inputs(9, hidden=hidden, inner=inner)
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


def test_a_shared_expert_of_another_width():
    h, weights, _, rule = expert_inputs(9)
    shared = gemm.QuantTensor(torch.randn(96, 40) / 6), gemm.QuantTensor(torch.randn(40, 48) / 7)
    routing = run(router.route, h, *rule)
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


@pytest.mark.parametrize("tile_m, tile_n, tile_k", [(16, 64, 64), (32, 128, 128), (64, 64, 64)])
def test_every_tile_size(monkeypatch, tile_m, tile_n, tile_k):
    product = {"tile_n": tile_n, "tile_k": tile_k, "num_warps": 4, "num_stages": 3}
    monkeypatch.setattr(moe, "tiles", lambda *args: {"gate_up": product, "down": product})
    h, weights, shared, rule = expert_inputs(70, dtype=torch.bfloat16)
    routing = run(router.route, h, *rule, tile_m=tile_m)
    assert routing.tile_m == tile_m
    close(run(experts, h, routing, *weights, shared), wanted(h, routing, weights, shared))


@pytest.mark.parametrize("dtype, hidden", [(torch.bfloat16, 320), (torch.float16, 256)])
def test_steps_through_k_change_no_bit(dtype, hidden):
    """Of 16 bits. K that is no multiple of the longer step, and one that is."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(9, hidden, generator=generator).to(dtype)
    weight = gemm.QuantTensor((torch.randn(2 * 96, hidden, generator=generator) / hidden**0.5).to(dtype))
    size = {"tile_m": 16, "tile_n": 64, "num_warps": 4, "num_stages": 3}
    default, deep = (
        run_in_order(gemm.gemm, gemm.QuantTensor(h), weight, None, None, True, h, **size, **step).values
        for step in ({}, {"tile_k": 128})
    )
    assert torch.equal(default, deep)
    torch.testing.assert_close(
        deep, moe.gated(F.linear(h, weight.values)), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_all_tokens_to_one_expert_and_no_other_is_read():
    h, weights, shared, rule = expert_inputs(70, top_k=1)
    rule[1][4] = 100.0
    for weight in weights:
        weight.values[torch.arange(7) != 4] = float("nan")
    routing = run(router.route, h, *rule)
    assert routing.ids.unique().tolist() == [4]
    got = run(experts, h, routing, *weights, shared)
    assert got.isfinite().all()
    close(got, wanted(h, routing, weights, shared))


def test_a_token_gets_the_same_bits_alone_as_in_any_batch():
    h, weights, shared, rule = expert_inputs(66, dtype=torch.bfloat16)
    together = run_in_order(experts, h, run_in_order(router.route, h, *rule), *weights, shared)
    for rows in (slice(0, 1), slice(65, 66), slice(17, 50)):
        alone = run_in_order(experts, h[rows], run_in_order(router.route, h[rows], *rule), *weights, shared)
        assert torch.equal(alone, together[rows])


def test_rows_of_a_wider_tensor():
    h, weights, shared, rule = expert_inputs(9)
    wide = torch.randn(9, 50)
    wide[:, 3:43] = h
    routing = run(router.route, wide[:, 3:43], *rule)
    assert torch.equal(run(experts, wide[:, 3:43], routing, *weights, shared),
                       run(experts, h, routing, *weights, shared))  # fmt: skip


def test_no_tokens_are_no_work():
    h, weights, shared, rule = expert_inputs(0)
    routing = run(router.route, h, *rule)
    assert routing.ids.shape == routing.weights.shape == (0, 3)
    assert run(experts, h, routing, *weights, shared).shape == (0, 40)


def test_experts_refuse():
    h, (gate_up, down), _, rule = expert_inputs(5)
    routing = run(router.route, h, *rule)
    for name, args in {
        "h": (h[:, :39], routing, gate_up, down),
        "down: torch.float32": (h, routing, gate_up, gemm.QuantTensor(down.values[:, :, :23])),
        "down: contiguous": (h, routing, gate_up, gemm.QuantTensor(down.values.mT.contiguous().mT)),
        "routing": (h, routing._replace(order=None), gate_up, down),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            run(experts, *args)


@pytest.mark.parametrize("scenario", ["moe mini bf16 fp32 gate", "moe mini fp32 nothing shared"])
def test_float32_products_are_not_made_in_tf32(scenario):
    """On Blackwell, Triton takes TF32 for a float32 tl.dot of 64 rows or more, whatever input_precision says."""
    with aot.recorded() as launches:
        aot.SCENARIOS[scenario]()
    for launch in launches:
        if launch.kernel in (router._scores_kernel, gemm._gemm_kernel):
            source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
            ptx = triton.compile(source, target=aot.TARGETS["sm_100"], options=launch.options).asm["ptx"]
            assert "tf32" not in ptx


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("hidden, inner", [(2048, 512), (4096, 1024)])
@pytest.mark.parametrize("tokens", [1, 32, 33, 100, 256, 4096])
def test_gpu_parity_at_real_sizes(hidden, inner, tokens):
    h, weights, shared, rule = expert_inputs(tokens, 8, 256, hidden, inner, torch.bfloat16, device="cuda")
    rule = (rule[0], rule[1], 8, 8, 4, 2.5)
    routing = router.route(h, *rule)
    ids, by_weight = router.route_ref(h, *rule)
    same = (routing.ids.sort(-1).values == ids.sort(-1).values).all(-1)
    assert same.float().mean() >= 0.999  # near-ties may go the other way: sums of products have another order
    torch.testing.assert_close(routing.weights[same], by_weight[same], atol=1e-4, rtol=1e-4)
    order, tiles = listed(routing.ids, 256, routing.tile_m)
    assert routing.order.tolist() == order and routing.tiles[: routing.num_tiles.item()].tolist() == tiles
    got = experts(h, routing, *weights, shared)
    close(got, wanted(h, routing, weights, shared))


@pytest.mark.gpu
def test_gpu_a_token_gets_the_same_bits_in_any_batch():
    h, weights, shared, rule = expert_inputs(4096, 8, 256, 2048, 512, torch.bfloat16, device="cuda")
    rule = (rule[0], rule[1], 8, 8, 4, 2.5)

    def forward(x):
        routing = router.route(x, *rule)
        return routing.ids, routing.weights, experts(x, routing, *weights, shared)

    together = forward(h)
    for rows in (slice(0, 1), slice(40, 72), slice(100, 356), slice(3000, 4000)):
        for alone, part in zip(forward(h[rows]), together, strict=True):
            assert torch.equal(alone, part[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 64, 128])
def test_gpu_whoever_is_last_sorts_the_pairs_of_all(tokens):
    """In a graph too, whose replays find the counter as the last one left it."""
    rule = {"experts": 256, "top_k": 8, "n_group": 8, "topk_group": 4}
    (h, weight, bias), rule, _ = route_inputs(rule, tokens, 2048, torch.bfloat16, device="cuda")
    router.route(h, weight, bias, **rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = router.route(h, weight, bias, **rule)
    for _ in range(200):
        h.normal_()
        graph.replay()
        flat = got.ids.flatten()
        assert torch.equal(got.order.long(), flat.argsort(stable=True))
        count = flat.bincount(minlength=256)
        assert got.num_tiles == (-(-count // got.tile_m)).sum()
        expert, begin, end = got.tiles[: got.num_tiles].long().unbind(1)
        assert torch.equal(expert.bincount(minlength=256), -(-count // got.tile_m))
        assert torch.equal(end, count.cumsum(0)[expert]) and torch.equal(flat[got.order[begin].long()], expert)


@pytest.mark.gpu
def test_gpu_graph():
    """Captured once, replayed on other tokens: no sizes, tiles or addresses that depend on the data."""
    h, weights, shared, rule = expert_inputs(64, 8, 256, 2048, 512, torch.bfloat16, device="cuda")
    held = h.clone()

    def forward():
        return experts(held, router.route(held, *rule), *weights, shared)

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for x in (h.flip(0), h * 0.5):
        held.copy_(x)
        graph.replay()
        assert torch.equal(out, forward())
