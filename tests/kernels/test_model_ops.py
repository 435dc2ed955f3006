"""The references of norm, rope, attention and MoE against the formulas written out, one element or token at a time."""

import math

import pytest
import torch

from llada2_fast.kernels import attention, moe, norm, rope, router


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 5, 16)])
def test_rms_norm(shape):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    got = norm.rms_norm_ref(x, weight, 1e-5)
    assert got.shape == x.shape and got.dtype == x.dtype
    for row, out in zip(x.reshape(-1, shape[-1]).tolist(), got.reshape(-1, shape[-1]).tolist(), strict=True):
        scale = 1 / math.sqrt(sum(v * v for v in row) / len(row) + 1e-5)
        assert out == pytest.approx([v * scale * w for v, w in zip(row, weight.tolist(), strict=True)], rel=1e-5)


def test_rms_norm_casts_before_the_weight():
    x, weight = (torch.randn(64, 32) * 3).bfloat16(), torch.randn(32).bfloat16()
    wide = x.double()
    unit = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).float()
    got = norm.rms_norm_ref(x, weight, 1e-6)
    assert torch.equal(got, unit.bfloat16() * weight)
    assert not torch.equal(got, (unit * weight).bfloat16())


def test_rms_norm_of_a_strided_view_and_of_huge_bfloat16():
    view, weight = torch.randn(6, 20)[::2, ::2], torch.ones(10)
    assert torch.equal(norm.rms_norm_ref(view, weight, 1e-6), norm.rms_norm_ref(view.clone(), weight, 1e-6))
    huge = torch.full((1, 10), 1e18).bfloat16()
    assert torch.equal(norm.rms_norm_ref(huge, weight.bfloat16(), 1e-6), weight[None].bfloat16())


def written_out_rope(vector, position, rot, theta, factor):
    """One head's vector, half-split pairing: dims j and j + rot/2 turn by position / factor * theta^(-2j/rot)."""
    out = list(vector)
    for j in range(rot // 2):
        angle = position / factor * theta ** (-2 * j / rot)
        a, b = vector[j], vector[j + rot // 2]
        out[j] = a * math.cos(angle) - b * math.sin(angle)
        out[j + rot // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("heads, kv_heads, dim, rot", [(4, 2, 8, 4), (2, 2, 6, 6), (3, 1, 10, 2)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_qk_norm_rope(heads, kv_heads, dim, rot, normed, factor):
    position = torch.tensor([0, 1, 7, 300])
    qkv = torch.randn(4, heads + 2 * kv_heads, dim)
    weights = (torch.randn(dim), torch.randn(dim)) if normed else (None, None)
    cos, sin = rope.rope_angles(position, rot, 1e4, factor, torch.float32)
    q, k, v = rope.qk_norm_rope_ref(qkv, *weights, rope.Angles(cos, sin), 1e-6, heads, kv_heads)
    assert torch.equal(v, qkv[:, heads + kv_heads :])
    for part, weight, first in ((q, weights[0], 0), (k, weights[1], heads)):
        for t in range(4):
            for h in range(part.shape[1]):
                vector = qkv[t, first + h].tolist()
                if normed:
                    scale = 1 / math.sqrt(sum(x * x for x in vector) / dim + 1e-6)
                    vector = [x * scale * w for x, w in zip(vector, weight.tolist(), strict=True)]
                expected = written_out_rope(vector, position[t].item(), rot, 1e4, factor)
                assert part[t, h].tolist() == pytest.approx(expected, abs=2e-5)


def test_rope_leaves_the_rest_of_a_head_alone_and_position_zero_whole():
    qkv = torch.randn(2, 3, 8)
    cos, sin = rope.rope_angles(torch.tensor([0, 5]), 4, 1e4, 1.0, torch.float32)
    q, k, _ = rope.qk_norm_rope_ref(qkv, None, None, rope.Angles(cos, sin), 1e-6, 1, 1)
    assert torch.equal(q[0, 0], qkv[0, 0]) and torch.equal(k[0, 0], qkv[0, 1])
    assert torch.equal(q[1, :, 4:], qkv[1, :1, 4:]) and not torch.equal(q[1, :, :4], qkv[1, :1, :4])


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 16)
    qkv = torch.stack((q, k, k))[None].expand(4, -1, -1)
    cos, sin = rope.rope_angles(torch.tensor([3, 10, 103, 110]), 16, 6e5, 1.0, torch.float32)
    turned_q, turned_k, _ = rope.qk_norm_rope_ref(qkv, None, None, rope.Angles(cos, sin), 1e-6, 1, 1)
    near = turned_q[0, 0] @ turned_k[1, 0]
    assert near.item() == pytest.approx((turned_q[2, 0] @ turned_k[3, 0]).item(), abs=1e-3)
    assert near.item() != pytest.approx((turned_q[0, 0] @ turned_k[3, 0]).item(), abs=1e-2)


def test_rope_angles_are_float32_whatever_the_dtype():
    """bfloat16 holds no odd position above 256 and no exact frequency: angles must not pass through it."""
    position = torch.tensor([257, 12345])
    cos, sin = rope.rope_angles(position, 8, 6e5, 1.0, torch.bfloat16)
    exact = rope.rope_angles(position, 8, 6e5, 1.0, torch.float32)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert torch.equal(cos, exact[0].bfloat16()) and torch.equal(sin, exact[1].bfloat16())


def written_out_attention(q, k, v, visible):
    """q [T, nq, D], k, v [S, nk, D], visible(t, s) -> [T, nq, D] in float64; KV head h serves g q heads from h*g on."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        seen = [s for s in range(k.shape[0]) if visible(t, s)]
        for head in range(q.shape[1]):
            score = torch.stack([q[t, head] @ k[s, head // group] for s in seen]) / math.sqrt(q.shape[2])
            weight = (score - score.max()).exp()
            out[t, head] = sum(w * v[s, head // group] for w, s in zip(weight / weight.sum(), seen, strict=True))
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (3, 1)])
def test_block_attention(heads, kv_heads):
    """Runs of one, two and many blocks, pages in any order, a tail nobody sees; a block sees its row up to its end."""
    length, dim, pages = 4, 6, 16
    runs = [
        attention.Span((2, 3, 4), 2, 1, 12),  # one block behind two of prefix, pages side by side
        attention.Span((9, 0), 0, 2, 6),  # two blocks, the last two positions of the second do not exist
        attention.Span((15, 1, 8, 7, 6), 1, 4, 20),  # four blocks behind one, scattered pages
        attention.Span((5,), 0, 1, 1),  # a block of one position
    ]
    k_rows = [torch.randn(len(run.pages) * length, kv_heads, dim) for run in runs]
    v_rows = [torch.randn(len(run.pages) * length, kv_heads, dim) for run in runs]
    caches = [torch.full((pages, length, kv_heads, dim), float("nan")) for _ in range(2)]
    for cache, rows in zip(caches, (k_rows, v_rows), strict=True):
        for run, row in zip(runs, rows, strict=True):
            for i, page in enumerate(run.pages):
                cache[page] = row[i * length : (i + 1) * length]
    q = torch.randn(sum(run.num_blocks for run in runs) * length, heads, dim)
    got = attention.block_attention_ref(q, *caches, runs)
    begin = 0
    for run, k, v in zip(runs, k_rows, v_rows, strict=True):
        size = run.num_blocks * length

        def visible(t, s, run=run):
            return s // length <= run.first_block + t // length and s < run.limit

        expected = written_out_attention(q[begin : begin + size], k, v, visible)
        torch.testing.assert_close(got[begin : begin + size].double(), expected, atol=1e-5, rtol=1e-5)
        begin += size


def test_a_run_does_not_depend_on_its_neighbours_or_on_its_pages():
    length = 4
    k, v, q = torch.randn(8, length, 2, 8), torch.randn(8, length, 2, 8), torch.randn(12, 4, 8)
    run, other = attention.Span((0, 1, 2), 1, 2, 12), attention.Span((5, 3), 1, 1, 8)
    together = attention.block_attention_ref(q, k, v, [run, other])
    order = torch.tensor([7, 4, 1, 3, 0, 5, 6, 2])
    moved_k, moved_v = torch.empty_like(k), torch.empty_like(v)
    moved_k[order], moved_v[order] = k, v
    moved = [r._replace(pages=tuple(order[list(r.pages)].tolist())) for r in (other, run)]
    swapped = attention.block_attention_ref(torch.cat((q[8:], q[:8])), moved_k, moved_v, moved)
    assert torch.equal(together, torch.cat((swapped[4:], swapped[:4])))


def test_a_block_does_not_depend_on_the_run_it_is_in():
    """However a prompt is cut into chunks, a block's attention has the same bits."""
    length, blocks = 4, 12
    k, v, q = (torch.randn(blocks, length, 2, 8) for _ in range(3))
    whole = attention.block_attention_ref(q.flatten(0, 1), k, v, [attention.Span(tuple(range(blocks)), 0, blocks, 48)])
    for cuts in ((0, 1, 12), (0, 5, 7, 12), tuple(range(13))):
        for first, end in zip(cuts, cuts[1:], strict=False):
            run = attention.Span(tuple(range(end)), first, end - first, 48)
            part = attention.block_attention_ref(q[first:end].flatten(0, 1), k, v, [run])
            assert torch.equal(part, whole[first * length : end * length])


def test_write_pages_and_run_slots():
    runs = [attention.Span((3, 1), 1, 1, 8), attention.Span((0, 2), 0, 2, 8)]
    slots = attention.span_slots(runs, 4)
    assert slots == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11]
    k, v = torch.randn(2, 12, 2, 3)
    caches = torch.zeros(2, 4, 4, 2, 3)
    attention.write_pages(k, v, caches[0], caches[1], torch.tensor(slots))
    for cache, new in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[1], new[:4]) and torch.equal(cache[0], new[4:8]) and torch.equal(cache[2], new[8:])
        assert not cache[3].any()


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (4, 1)])
def test_masked_attention(heads, kv_heads):
    q, k, v = torch.randn(2, 5, heads, 8), torch.randn(2, 5, kv_heads, 8), torch.randn(2, 5, kv_heads, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    got = attention.masked_attention(q, k, v, mask)
    additive = attention.masked_attention(q, k, v, torch.zeros(2, 1, 5, 5).masked_fill(~mask, float("-inf")))
    torch.testing.assert_close(got, additive, atol=1e-6, rtol=0)
    for b in range(2):
        expected = written_out_attention(q[b], k[b], v[b], lambda t, s, b=b: bool(mask[b, 0, t, s]))
        torch.testing.assert_close(got[b].double(), expected, atol=1e-5, rtol=1e-5)


def written_out_route(h, weight, bias, top_k, n_group, topk_group, scale, capacity=None, block=None):
    """ids and weights, lists of lists, in float64 and plain Python; sorted() is stable, so ties go to the lower id."""
    score = torch.sigmoid(h.double() @ weight.double().T)
    choice = (score + bias.double()).tolist()
    experts = range(weight.shape[0])
    all_ids, all_weights = [], []
    for t, c in enumerate(choice):
        if capacity is not None:
            mates = [u for u in range(len(choice)) if block[u] == block[t]]
            best = [max(choice[u][e] for u in mates) for e in experts]
            pool = sorted(experts, key=lambda e: -best[e])[:capacity]
        else:
            size = len(experts) // n_group
            groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
            strength = [sum(sorted((c[e] for e in group), reverse=True)[:2]) for group in groups]
            kept = sorted(range(n_group), key=lambda g: -strength[g])[:topk_group]
            pool = [e for g in kept for e in groups[g]]
        ids = sorted(sorted(pool), key=lambda e: -c[e])[:top_k]
        own = [score[t, e].item() for e in ids]
        total = sum(own) + 1e-20 if top_k > 1 else 1.0
        all_ids.append(ids)
        all_weights.append([w / total * scale for w in own])
    return all_ids, all_weights


ROUTES = {
    "grouped": dict(top_k=4, n_group=4, topk_group=2, scale=2.5),
    "groups of three": dict(top_k=2, n_group=4, topk_group=1, scale=1.0),
    "one group": dict(top_k=3, n_group=1, topk_group=1, scale=2.5),
    "all groups": dict(top_k=3, n_group=4, topk_group=4, scale=2.5),
    "one expert is not renormalised": dict(top_k=1, n_group=2, topk_group=1, scale=2.5),
    "block": dict(top_k=3, n_group=4, topk_group=1, scale=2.5, capacity=4),
    "block of the token's own size": dict(top_k=3, n_group=1, topk_group=1, scale=2.5, capacity=3),
}


@pytest.mark.parametrize("rule", ROUTES.values(), ids=ROUTES.keys())
def test_route(rule):
    h, weight, bias = torch.randn(14, 8), torch.randn(12, 8), torch.randn(12) * 0.3
    block = torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [4] * 2) if "capacity" in rule else None
    ids, weights = router.route_ref(h, weight, bias, **rule, block=block)
    expected_ids, expected_weights = written_out_route(h, weight, bias, **rule, block=block)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert ids.tolist() == expected_ids
    torch.testing.assert_close(weights.double(), torch.tensor(expected_weights).double(), atol=1e-6, rtol=1e-5)


def test_the_bias_selects_but_does_not_weigh():
    h, weight = torch.zeros(1, 4), torch.randn(4, 4)  # every score is exactly one half
    ids, weights = router.route_ref(h, weight, torch.tensor([0.0, 5.0, 0.0, 9.0]), 2, 1, 1, 2.0)
    assert ids.tolist() == [[3, 1]] and weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("rule", [r for r in ROUTES.values() if r["top_k"] > 1], ids=str)
def test_route_ties_go_to_the_lower_expert_and_group(rule):
    """All scores equal, biases in a few steps: ties everywhere, between experts and between groups."""
    h, weight = torch.zeros(6, 8), torch.randn(12, 8)
    bias = torch.tensor([0.0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1])
    block = torch.zeros(6, dtype=torch.int64) if "capacity" in rule else None
    ids, _ = router.route_ref(h, weight, bias, **rule, block=block)
    expected, _ = written_out_route(h, weight, bias, **rule, block=block)
    assert ids.tolist() == expected


def test_block_routing_is_a_function_of_the_block_alone():
    rule = dict(top_k=2, n_group=1, topk_group=1, scale=1.0, capacity=3)
    h, weight, bias = torch.randn(12, 8), torch.randn(12, 8), torch.randn(12) * 0.1
    block = torch.arange(12) // 4
    ids, weights = router.route_ref(h, weight, bias, **rule, block=block)
    for b in range(3):
        own = slice(4 * b, 4 * b + 4)
        alone = router.route_ref(h[own], weight, bias, **rule, block=torch.zeros(4, dtype=torch.int64))
        assert torch.equal(ids[own], alone[0]) and len(ids[own].unique()) <= 3
        torch.testing.assert_close(weights[own], alone[1])


def test_router_works_in_float32_on_bfloat16_input():
    h, weight, bias = torch.randn(32, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.randn(8)
    got = router.route_ref(h, weight, bias, 2, 1, 1, 2.5)
    wide = router.route_ref(h.float(), weight.float(), bias, 2, 1, 1, 2.5)
    assert torch.equal(got[0], wide[0]) and torch.equal(got[1], wide[1])


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts(tokens, top_k):
    hidden, inner, count = 8, 6, 7
    h = torch.randn(tokens, hidden)
    gate_up, down = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k)
    got = moe.experts_ref(h, ids, weights, gate_up, down)
    for t in range(tokens):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for e, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            both = gate_up[e].double() @ h[t].double()
            gate, up = both[:inner], both[inner:]
            expected += w * (down[e].double() @ (gate / (1 + (-gate).exp()) * up))
        torch.testing.assert_close(got[t].double(), expected, atol=1e-4, rtol=1e-4)


def test_experts_that_no_token_chose_are_never_read():
    gate_up, down = torch.full((4, 6, 5), float("nan")), torch.full((4, 5, 3), float("nan"))
    gate_up[2], down[2] = torch.randn(6, 5), torch.randn(5, 3)
    ids = torch.full((3, 1), 2)
    assert moe.experts_ref(torch.randn(3, 5), ids, torch.ones(3, 1), gate_up, down).isfinite().all()


def test_experts_sum_in_float32_before_one_cast():
    """Experts that scale by 1, 2^-9, 2^-9: in bfloat16 sums the two small ones would be lost one by one."""
    gate_up, down = torch.zeros(3, 2, 1), torch.zeros(3, 1, 1)
    gate_up[:, 0], gate_up[:, 1], down[:] = 30.0, 1 / 30.0, 1.0
    h = torch.ones(1, 1).bfloat16()
    one = moe.experts_ref(h, torch.tensor([[0]]), torch.ones(1, 1), gate_up.bfloat16(), down.bfloat16())
    weights = torch.tensor([[1.0, 2**-9, 2**-9]])
    got = moe.experts_ref(h, torch.tensor([[0, 1, 2]]), weights, gate_up.bfloat16(), down.bfloat16())
    assert got.dtype == torch.bfloat16
    assert got.item() == torch.tensor(one.float().item() * (1 + 2**-8)).bfloat16().item()


def test_no_tokens_are_no_work():
    empty = torch.empty(0, 8)
    ids, weights = router.route_ref(empty, torch.randn(4, 8), torch.zeros(4), 2, 2, 1, 1.0)
    assert ids.shape == weights.shape == (0, 2)
    assert moe.experts_ref(empty, ids, weights, torch.randn(4, 6, 8), torch.randn(4, 8, 3)).shape == (0, 8)
    block = torch.empty(0, dtype=torch.int64)
    assert router.route_ref(empty, torch.randn(4, 8), torch.zeros(4), 2, 2, 1, 1.0, 3, block)[0].shape == (0, 2)
