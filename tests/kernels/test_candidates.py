"""Candidates: kernels in Triton's interpreter and reference against the rule in float64; the draws' distribution."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llada2_fast.kernels import candidates as ops
from llada2_fast.kernels import filters, roles
from llada2_fast.kernels._triton import force_ops, tl, triton
from tests.kernels import truth
from tests.kernels.interpreter import interpreted

NONE, NAN = -math.inf, math.nan
TEMPERATURES, TOP_K, TOP_P = (0.0, 0.3, 1.0, 2.5), (0, 1, 3, 40, 10**6), (1.0, 0.95, 0.5, 0.3, 1e-6, 2.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "sliced", "packed")


def logits_of(kind, vocab, mask_id, generator):
    """[V] logits of a kind that has gone wrong somewhere, or might."""
    x = torch.randn(vocab, generator=generator) * 3
    some = torch.randint(vocab, (5,), generator=generator)
    if kind == "flat":
        x = x * 0.01
    elif kind == "equal":
        x = torch.full((vocab,), -1.5)
    elif kind == "ties":
        x[some] = x.max()
    elif kind == "peak":
        x[some[0]] = 60.0
    elif kind == "zeros":  # +0 and -0 are equal
        x = x.clamp(max=0) * torch.randint(2, (vocab,), generator=generator)
    elif kind == "forbidden":
        x[torch.randint(vocab, (vocab - vocab // 8,), generator=generator)] = NONE
        x[some[0]] = 0.0
    elif kind == "mask":
        x[mask_id] = 25.0
    elif kind == "nothing":
        x = torch.full((vocab,), NONE)
    elif kind == "only the mask":
        x = torch.full((vocab,), NONE)
        x[mask_id] = 1.0
    elif kind == "nan":
        x[some[0]] = NAN
    elif kind == "infinite":
        x[mask_id if some[0] % 2 else some[0]] = math.inf
    return x


SOUND = ("normal", "flat", "equal", "ties", "peak", "zeros", "forbidden", "mask")
BROKEN = ("nothing", "only the mask", "nan", "infinite")


def lay_out(logits, layout):
    """The same logits [R, L, V] in other strides; for "packed" some of them in another order, and their index."""
    if layout == "transposed":
        return logits.transpose(1, 2).contiguous().transpose(1, 2), None
    if layout == "sliced":
        wide = torch.full((logits.shape[0], logits.shape[1] * 2, logits.shape[2] + 3), NAN, dtype=logits.dtype)
        wide[:, ::2, 1:-2] = logits
        return wide[:, ::2, 1:-2], None
    if layout == "packed":
        rows, length, vocab = logits.shape
        order = torch.randperm(rows * length, generator=torch.Generator().manual_seed(rows * length))
        order = order[: -(-2 * len(order) // 3)]
        index = torch.full((rows * length,), -1)
        index[order] = torch.arange(len(order))
        return logits.reshape(-1, vocab)[order], index.view(rows, length)
    return logits, None


@st.composite
def sizes(draw, filters):
    """rows, length, vocab, tile_v that the interpreter can afford: 100 programs, 6 positions that may filter."""
    most = 6 if filters else 100
    length = draw(st.integers(1, most) if filters else st.sampled_from((1, 2, 3, 5, 8, 17, 32, 33, 64)))
    rows = draw(st.integers(1 if filters else 0, min(9, most // length)))
    tile_v = draw(st.sampled_from((64, 128, 256, 1024)))
    tiles = draw(st.integers(1, max(1, 100 // max(1, rows * length))))
    vocab = min(tile_v * tiles, 8191) - draw(st.sampled_from((0, 1, 13, 63)))
    return rows, length, vocab, tile_v


def tables_of(rows, length, vocab, generator):
    """Allowed of random classes, and what it says: bool [R, L, V]."""
    numbers = (0, 1, 31, 32, 1000, roles.MAX_CLASSES - 1)
    which = torch.randint(len(numbers), (rows, vocab), generator=generator)
    chance = torch.rand(rows, length, 1, generator=generator)
    stands = torch.rand(rows, length, len(numbers), generator=generator) < 0.2 + chance
    bits = torch.zeros(rows, length, roles.WORDS, dtype=torch.int32)
    for stand, number in zip(stands.unbind(-1), numbers, strict=True):
        bits[..., number // 32] |= stand.int() << number % 32
    may = stands.gather(2, which[:, None].expand(rows, length, vocab))
    return roles.Allowed(torch.tensor(numbers, dtype=torch.int16)[which], bits), may


def check(size, dtype, layout, runner_up, seed, filters, guided=False):
    rows, length, vocab, tile_v = size
    generator = torch.Generator().manual_seed(seed)

    def one_of(values, *shape, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    mask_id = int(torch.randint(vocab, (), generator=generator)) if seed % 5 else vocab + 7
    kinds = SOUND * 4 + (BROKEN if mask_id < vocab else ())
    picked = one_of(range(len(kinds)), rows * length, dtype=torch.int64).tolist()
    mask = min(mask_id, vocab - 1)
    parts = [logits_of(kinds[kind], vocab, mask, generator) for kind in picked]
    logits = (torch.stack(parts) if parts else torch.zeros(0, vocab)).view(rows, length, vocab).to(dtype)
    params = ops.SampleParams(
        one_of(TEMPERATURES[1:] if filters else TEMPERATURES, rows),
        one_of(TOP_K if filters else (0,), rows, dtype=torch.int32),
        one_of(TOP_P if filters else (1.0,), rows),
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
    )
    start, step = one_of((0, 7, 2**31 + 5), rows, dtype=torch.int64), one_of((0, 1, 9), rows, dtype=torch.int32)
    flags = one_of((0, ops.BAN_MASK, ops.OWN_SOFTMAX, ops.BAN_MASK | ops.OWN_SOFTMAX), rows, dtype=torch.int32)
    allowed, may = tables_of(rows, length, vocab, generator) if guided else (None, None)
    if guided:
        flags |= one_of((0, roles.GUIDED, roles.GUIDED), rows, dtype=torch.int32)
    shown, index = lay_out(logits, layout)
    rule = (start, step, params, ops.SpecialIds(mask_id), flags, index)
    wanted = ops.block_candidates_ref(shown, *rule, tile_v=tile_v, runner_up=runner_up, allowed=allowed)
    with interpreted():
        got = ops.launch(shown, *rule, filters, runner_up, tile_v, allowed)
    assert len(got) == len(wanted) == (4 if runner_up else 2)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape == (rows, length) and a.dtype == b.dtype
    for row in range(rows):
        for at in range(length):
            kernel = [tensor[row, at].item() for tensor in got]
            reference = [tensor[row, at].item() for tensor in wanted]
            if index is not None and index[row, at] < 0:
                assert kernel == reference == [-1, NONE, -1, 0][: len(kernel)]
                continue
            known = truth.candidate(
                logits[row, at], *(tensor[row].item() for tensor in params), int(start[row]) + at, int(step[row]),
                mask_id, int(flags[row]), tile_v, may[row, at] if flags[row] & roles.GUIDED else None,
            )  # fmt: skip
            if known is None:
                assert kernel[0] == reference[0] == -1 and math.isnan(kernel[1]) and math.isnan(reference[1])
                assert kernel[2:] == reference[2:] == [-1, 0][: len(kernel) - 2]
            elif known[4] > truth.NOT_SURE:
                assert kernel == pytest.approx(list(known[: len(kernel)]), rel=1e-5, abs=1e-7), (row, at)
                assert reference == pytest.approx(list(known[: len(kernel)]), rel=1e-5, abs=1e-7), (row, at)


def random_cases(check, filters, count):
    """A test: `check` of as many random cases; one takes too long to shrink."""

    @settings(max_examples=count, phases=[Phase.generate])
    @given(sizes(filters), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**32))
    def test(size, dtype, layout, flag, seed):
        check(size, dtype, layout, flag, seed, filters)

    return test


test_greedy_and_temperature = random_cases(check, False, 12)
test_filters = random_cases(check, True, 12)
# The slow ones begin with the cases of the usual ones.
test_much_greedy_and_temperature = pytest.mark.slow(random_cases(check, False, 112))
test_many_filters = pytest.mark.slow(random_cases(check, True, 112))


@pytest.mark.parametrize("top_k", [0, 70, 150])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_the_cut_of_nearly_flat_rows(top_k, top_p):
    """Nearly everything reaches a bound from below here, and the mass above it is what decides."""
    vocab = 200
    logits = torch.randn(1, 3, vocab, generator=torch.Generator().manual_seed(8)) * 0.01
    where, ids = (torch.tensor([5]), torch.tensor([2], dtype=torch.int32)), ops.SpecialIds(vocab)
    rule = (*where, params(1, 1.0, top_k, top_p), ids)
    with interpreted():
        got = ops.launch(logits, *rule, torch.tensor([ops.BAN_MASK]), None, True, False, 128)
    for at in range(3):
        known = truth.candidate(logits[0, at], 1.0, top_k, top_p, 0, 5 + at, 2, vocab, ops.BAN_MASK, 128)
        assert known[4] > truth.NOT_SURE
        assert [tensor[0, at].item() for tensor in got] == pytest.approx(list(known[:2]), rel=1e-5)


@triton.jit
def _search_kernel(LOGITS, LIST, KEY, low, least, scale, BY_COUNT: tl.constexpr):
    top = tl.max(tl.load(LOGITS + tl.arange(0, 64)), 0)
    found, _mass = filters._search(
        LOGITS, 1, LIST, 1, 64, (-1,), None, top, scale, low, least, BY_COUNT, 0, 4, 1, 64, 1
    )
    tl.store(KEY, found)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("by_count", [True, False])
def test_the_search_for_a_cut_ends_on_a_mass_of_nan(by_count):
    logits, key = torch.arange(64.0), torch.zeros(1, dtype=torch.int64)
    with interpreted():
        _search_kernel[(1,)](logits, torch.zeros(1, dtype=torch.int32), key, 0, 3, NAN, by_count)
    assert key[0] == (logits[61].view(torch.int32) if by_count else 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_reference_confidences_at_the_real_vocabulary(temperature, spread):
    """Sums of 157184 terms keep their digits."""
    logits = torch.randn(1, 4, 157184, generator=torch.Generator().manual_seed(10)) * spread
    logits[..., 77] = logits.logsumexp(-1) + 1
    where = torch.tensor([0]), torch.tensor([0], dtype=torch.int32)
    rule = (*where, params(1, temperature), ops.SpecialIds(9), torch.tensor([ops.BAN_MASK]))
    token, confidence = ops.block_candidates_ref(logits, *rule)
    logits[..., 9] = NONE if temperature else logits[..., 9]
    shares = torch.softmax(logits.double(), -1).gather(2, token[..., None])[..., 0]
    torch.testing.assert_close(confidence.double(), shares, rtol=3e-6, atol=0)


@pytest.mark.parametrize("top_k, top_p", [(600, 1.0), (600, 0.99), (0, 0.99), (0, 0.2), (1500, 0.6), (3000, 1.0)])
def test_reference_cuts_far_down(top_k, top_p):
    """More than the few hundred largest logits that the reference looks at first, with many ties."""
    vocab, length = 3100, 6
    logits = torch.randn(1, length, vocab, generator=torch.Generator().manual_seed(9)).bfloat16()
    rule = (torch.tensor([5]), torch.tensor([2], dtype=torch.int32), params(1, 1.0, top_k, top_p), ops.SpecialIds(7))
    found = ops.block_candidates_ref(logits, *rule, torch.tensor([ops.BAN_MASK]))
    for at in range(length):
        known = truth.candidate(logits[0, at], 1.0, top_k, top_p, 0, 5 + at, 2, 7, ops.BAN_MASK, ops.TILE_V)
        if known[4] > truth.NOT_SURE:
            assert [tensor[0, at].item() for tensor in found] == pytest.approx(list(known[:2]), rel=1e-5)


def params(rows, temperature=0.0, top_k=0, top_p=1.0):
    """SampleParams: one value for all rows or a list; seeds 0, 1, ..."""
    values = ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32))
    tensors = (torch.tensor(value, dtype=dtype).expand(rows).contiguous() for value, dtype in values)
    return ops.SampleParams(*tensors, torch.arange(rows))


def test_a_row_gives_the_same_bits_alone_and_in_any_batch():
    rows, length, vocab, tile_v = 5, 3, 500, 128
    logits = torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(1)) * 3
    logits[2, 1, 7] = NAN
    rules = params(rows, [0.0, 1.0, 1.0, 0.7, 0.0], [0, 0, 3, 0, 0], [1.0, 1.0, 1.0, 0.8, 1.0])
    start, step = torch.arange(rows) * 10, torch.arange(rows, dtype=torch.int32)
    flags = torch.tensor([ops.BAN_MASK, 0, ops.BAN_MASK, ops.OWN_SOFTMAX, ops.OWN_SOFTMAX], dtype=torch.int32)

    def of(which, filters=True):
        which = torch.tensor(which)
        own = ops.SampleParams(*(tensor[which] for tensor in rules))
        with interpreted():
            return ops.launch(
                logits[which], start[which], step[which], own, ops.SpecialIds(9), flags[which], None, filters, True,
                tile_v,
            )  # fmt: skip

    whole = of(range(rows))
    for which in ([3, 0, 4, 2, 1], [1], [2], [3]):
        for got, wanted in zip(of(which), whole, strict=True):
            assert torch.equal(got.view(torch.int32), wanted[torch.tensor(which)].view(torch.int32))
    for got, wanted in zip(of([4, 0, 1], filters=False), whole, strict=True):  # told that no row filters
        assert torch.equal(got, wanted[[4, 0, 1]])


# Draws


def chi_square(counts, shares):
    """Whether counts [N] may come from shares [N]: statistic below the 99.99 % quantile (Wilson and Hilferty)."""
    expected = shares * counts.sum()
    degrees = len(shares) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()) < limit


RULES = [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.0, 0, 0.8), (1.5, 12, 0.9)]


def drawable(logits, temperature, top_k, top_p, mask_id):
    """float64 [V]: the distribution that draws must follow."""
    x = logits.double().clone()
    x[mask_id] = NONE
    weight = torch.softmax(x / temperature, 0)
    if top_k:
        weight[x < x.sort(descending=True).values[top_k - 1]] = 0
    order = weight.argsort(descending=True)
    before = weight[order].cumsum(0) - weight[order]
    weight[order[before > top_p * weight.sum()]] = 0
    return weight / weight.sum()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tile_v", [64, 4096])
def test_the_reference_draws_from_the_distribution(rule, tile_v):
    vocab, mask_id, draws = 150, 11, 40000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 2
    logits[5] = NONE
    token, confidence = ops.block_candidates_ref(
        logits.expand(1, draws, -1), torch.tensor([100]), torch.tensor([3]), params(1, *rule),
        ops.SpecialIds(mask_id), torch.tensor([ops.BAN_MASK]), tile_v=tile_v,
    )  # fmt: skip
    shares = drawable(logits, *rule, mask_id)
    counts = torch.bincount(token[0], minlength=vocab).double()
    assert (counts[shares == 0] == 0).all() and shares[mask_id] == 0
    assert chi_square(counts[shares > 0], shares[shares > 0])
    torch.testing.assert_close(confidence[0].double(), shares[token[0]], rtol=1e-5, atol=0)
    assert not chi_square(counts[shares > 0], shares[shares > 0].flip(0))  # the test can fail


@pytest.mark.parametrize("rule", RULES[::2], ids=str)
def test_the_kernel_draws_from_the_distribution(rule):
    vocab, mask_id, draws = 90, 11, 40 if rule[1] else 100
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    with interpreted():
        token, _ = ops.launch(
            logits.expand(1, draws, -1), torch.tensor([100]), torch.tensor([3], dtype=torch.int32), params(1, *rule),
            ops.SpecialIds(mask_id), torch.tensor([ops.BAN_MASK]), None, True, False, 64,
        )  # fmt: skip
    shares = drawable(logits, *rule, mask_id)
    counts = torch.bincount(token[0], minlength=vocab).double()
    assert (counts[shares == 0] == 0).all()
    likely = shares.argsort(descending=True)[:5]
    rest = 1 - shares[likely].sum()
    assert chi_square(
        torch.cat((counts[likely], counts.sum()[None] - counts[likely].sum())), torch.cat((shares[likely], rest[None]))
    )


# The op


def example(rows=2, length=3, vocab=40, packed=False, temperature=0.0):
    logits = torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(4))
    index = None
    if packed:
        logits, index = logits.flatten(0, 1), torch.arange(rows * length).view(rows, length)
    start, step = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    flags = torch.full((rows,), ops.BAN_MASK, dtype=torch.int32)
    return logits, start, step, params(rows, temperature), ops.SpecialIds(7), flags, index


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("runner_up", [False, True])
def test_op_is_well_formed(packed, runner_up):
    logits, start, step, sampling, ids, *rest = example(packed=packed, temperature=1.0)
    torch.library.opcheck(
        torch.ops.llada2_fast.candidates.default, (logits, start, step, *sampling, *rest, True, runner_up, *ids)
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_op_compiles_without_a_graph_break(backend):
    def call(logits, *rest):
        token, confidence = ops.candidates(logits * 2, *rest)
        return token + 1, confidence * 2

    arguments = example(temperature=1.0)
    for got, wanted in zip(
        torch.compile(call, backend=backend, fullgraph=True)(*arguments), call(*arguments), strict=True
    ):
        assert torch.equal(got, wanted)


def test_op_runs_the_kernels_where_forced():
    arguments = example(temperature=1.0)
    wanted = ops.candidates(*arguments)
    with force_ops("triton"), interpreted():
        got = ops.candidates(*arguments)
    assert torch.equal(got[0], wanted[0]) and not torch.equal(got[1], torch.zeros_like(got[1]))
    torch.testing.assert_close(got[1], wanted[1])


@pytest.mark.parametrize("rows, length", [(0, 3), (2, 0)])
@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_nothing_to_do(rows, length, choice):
    with force_ops(choice), interpreted():
        found = ops.candidates(*example(rows, length), runner_up=True)
    assert [tuple(tensor.shape) for tensor in found] == [(rows, length)] * 4


def test_what_is_refused():
    logits, *rest, index = example(packed=True)
    with pytest.raises(ValueError, match="logits"):
        ops.candidates(logits, *rest, None)
    with pytest.raises(ValueError, match="logits"):
        ops.candidates(logits[None], *rest, index)
    with force_ops("triton"), pytest.raises(ValueError, match="float64"):
        ops.candidates(logits.double(), *rest, index)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature, top_k, top_p", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 40, 1.0), (1.0, 200, 0.9)])
@pytest.mark.parametrize("flag", [0, ops.OWN_SOFTMAX])
def test_compiled_at_the_real_size(dtype, temperature, top_k, top_p, flag):
    rows, length, vocab, ids = 4, 8, 157184, ops.SpecialIds(156895)
    logits = (torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(5)) * 4).to(dtype)
    rules = params(rows, temperature, top_k, top_p)
    flags = torch.full((rows,), ops.BAN_MASK | flag, dtype=torch.int32)
    start, step = torch.arange(rows) * 32, torch.zeros(rows, dtype=torch.int32)
    on_gpu = [tensor.cuda() for tensor in (logits, start, step)]
    found = ops.candidates(*on_gpu, ops.SampleParams(*(t.cuda() for t in rules)), ids, flags.cuda(), runner_up=True)
    compared = 0
    for row in range(rows):
        for at in range(length):
            known = truth.candidate(
                logits[row, at], *(tensor[row].item() for tensor in rules), int(start[row]) + at, 0, ids.mask,
                ops.BAN_MASK | flag, ops.TILE_V,
            )  # fmt: skip
            if known[4] > truth.NOT_SURE:
                got = [tensor[row, at].item() for tensor in found]
                assert got == pytest.approx(list(known[:4]), rel=1e-4, abs=1e-7), (row, at)
                compared += 1
    assert compared > rows * length // 2


@pytest.mark.gpu
def test_compiled_rows_give_the_same_bits_in_any_batch():
    rows, length, vocab = 9, 5, 157184
    logits = (torch.randn(rows, length, vocab, generator=torch.Generator().manual_seed(6)) * 4).bfloat16().cuda()
    rules = params(rows, [0.0, 1.0, 0.7] * 3, [0, 0, 50] * 3)
    where = torch.arange(rows)
    flags = (ops.BAN_MASK | (where % 2) * ops.OWN_SOFTMAX).int()

    def of(which, filters=True):
        own = ops.SampleParams(*(tensor[which].cuda() for tensor in rules))
        start, step = where[which].cuda(), where[which].int().cuda()
        ids = ops.SpecialIds(9)
        return ops.candidates(logits[which.cuda()], start, step, own, ids, flags[which].cuda(), filters=filters)

    whole = of(where)
    for which in (where[:1], where[1:2], where[2:3], where.flip(0)):
        for got, wanted in zip(of(which), whole, strict=True):
            assert torch.equal(got, wanted[which.cuda()])
    plain = where[where % 3 != 2]
    for got, wanted in zip(of(plain, filters=False), whole, strict=True):
        assert torch.equal(got, wanted[plain.cuda()])
