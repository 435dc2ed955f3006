"""The whole refinement step: the kernels in Triton's interpreter against the reference, under every mode and flag."""

import copy
import inspect
from functools import partial

import pytest
import torch
import triton

from llada2_fast.kernels import commit, refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.candidates import TILE_V
from llada2_fast.kernels.state import report_ref
from tests.kernels import truth
from tests.kernels.interpreter import interpreted
from tests.kernels.test_candidates import BROKEN, DTYPES, LAYOUTS, SOUND, lay_out, logits_of, random_cases

NEAR = 2e-5  # two confidences, or one and its threshold, closer than this share may be ordered either way
ALL_FLAGS = 2**9 - 1
POLICIES = 0, 0, refine.ENTROPY, refine.SPECULATES, refine.ENTROPY | refine.SPECULATES
STATE = ("tokens", "step", "post_steps", "frozen", "commit_step", "commit_confidence", "changed")


def make(size, dtype, layout, filters, seed, broken=0.1):
    """Random logits, index, state, params, ids. Tokens and candidates come from a few ids, so that they meet."""
    rows, length, vocab, tile_v = size
    generator = torch.Generator().manual_seed(seed)

    def one_of(values, *shape, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    few = torch.randperm(vocab, generator=generator)[:6]
    ids, eos = refine.SpecialIds(int(few[0])), few[1:3].tolist()
    which = one_of([0, 0, 0, 1, 2, 3, 4, 5], rows, length, dtype=torch.int64)
    full = one_of([False, False, True], rows, 1, dtype=torch.bool)  # rows without a mask, or with one at most
    tokens = few[which.where(~full | (torch.rand(rows, length, generator=generator) < 0.5 / length), which % 5 + 1)]
    kinds = one_of(
        [refine.PROMPT, refine.GENERATED, refine.GENERATED, refine.GENERATED, refine.TAIL, refine.PADDING], rows, length
    )
    state = refine.BlockState(
        tokens, kinds.to(torch.int8), one_of([0, 32, 2**31], rows, dtype=torch.int64),
        one_of([0, 0, 1, 7], rows, dtype=torch.int32), one_of([0, 1, 2], rows, dtype=torch.int32),
        one_of([0] * 8 + [1, 2, 4], rows, dtype=torch.int32), one_of(range(4), rows, dtype=torch.int32),
        one_of([-1, 3], rows, length, dtype=torch.int32), torch.rand(rows, length, generator=generator),
        torch.arange(rows, dtype=torch.int32) % 2,
    )  # fmt: skip
    params = refine.RefineParams(
        temperature=one_of([0.0, 0.0, 1.0, 0.4], rows),
        top_k=one_of([0, 0, 2, 30], rows, dtype=torch.int32) * filters,
        top_p=one_of([1.0, 0.9, 0.4], rows) if filters else torch.ones(rows),
        seed=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        threshold=one_of([0.0, 0.3, 0.9, 2.0], rows),
        edit_threshold=one_of([0.0, 0.5, 0.9], rows),
        steps=one_of([0, 1, 3, 8, 100], rows, dtype=torch.int32),
        min_transfer=one_of([0, 1, 1, 4, 1000], rows, dtype=torch.int32),
        max_steps=one_of([1, 2, 9, 2**30], rows, dtype=torch.int32),
        max_post_steps=one_of([0, 1, 2, 16], rows, dtype=torch.int32),
        entropy_bound=one_of([0.0, 0.5, 2.0, 50.0], rows),
        entropy_decay=one_of([1.0, 1.0, 0.5], rows),
        flags=_flags(rows, generator),
        eos_ids=torch.tensor([[eos[0], -1], [eos[1], eos[0]], [-1, -1]])[
            torch.randint(3, (rows,), generator=generator)
        ],
    )
    parts = []
    for _ in range(rows * length):
        wrong = float(torch.rand((), generator=generator)) < broken / max(1, length)
        kind = (BROKEN if wrong else SOUND)[
            int(torch.randint(len(BROKEN if wrong else SOUND), (), generator=generator))
        ]
        x = logits_of(kind, vocab, ids.mask, generator)
        if not wrong and int(torch.randint(3, (), generator=generator)):  # one of the few gets a probability
            likely = torch.logit(0.05 + 0.9 * torch.rand((), generator=generator))
            x[few[int(torch.randint(6, (), generator=generator))]] = x.logsumexp(0) + likely
        if parts and int(torch.randint(3, (), generator=generator)) == 0:
            x = parts[int(torch.randint(len(parts), (), generator=generator))]  # the same confidence twice
        parts.append(x)
    logits = (torch.stack(parts) if parts else torch.zeros(0, vocab)).view(rows, length, vocab).to(dtype)
    if layout == "packed":
        needed = refine.needed_positions(state, params, ids)
        index = torch.where(needed, needed.flatten().cumsum(0).view(rows, length) - 1, -1)
        return logits[needed], index, state, params, ids
    return *lay_out(logits, layout), state, params, ids


def decided(before, params, output, logits, index, ids, tile_v, only_needed, may=None):
    """Whether nothing of this step hangs on a rounding: no draw, threshold or order of confidences is close."""

    def of(row, at):
        return logits[row, at] if index is None else logits[index[row, at]]

    needed = refine.needed_positions(before, params, ids)
    for row in range(needed.shape[0]):
        masked = needed[row] & (before.tokens[row] == ids.mask)
        confidence = output.confidence[row]
        for mask, limit in ((masked, params.threshold[row]), (needed[row] & ~masked, params.edit_threshold[row])):
            if ((confidence[mask] - limit).abs() < NEAR * limit).any():
                return False
        rank, near = confidence, NEAR
        if params.flags[row] & refine.ENTROPY and not output.status[row, refine.FLAGS] & refine.ERROR:
            rank, near = entropies(of, row, torch.where(masked)[0], len(masked)), 10 * NEAR
            if near_bound(rank[masked], torch.where(masked)[0], params, row):
                return False
        ordered, order = rank[masked].sort(stable=True)
        where = torch.where(masked)[0][order]
        for a, b, p, q in zip(where, where[1:], ordered, ordered[1:], strict=False):
            if q - p < near * q and not torch.equal(of(row, a), of(row, b)):
                return False
        if params.temperature[row] == 0 or output.status[row, refine.FLAGS] & refine.ERROR:
            continue
        for at in range(needed.shape[1]):
            if (only_needed and not needed[row, at]) or (index is not None and index[row, at] < 0):
                continue
            known = truth.candidate(
                of(row, at), float(params.temperature[row]), int(params.top_k[row]), float(params.top_p[row]),
                int(params.seed[row]), int(before.block_start[row]) + at, int(before.step[row]), ids.mask,
                int(params.flags[row]), tile_v, may[row, at] if params.flags[row] & refine.GUIDED else None,
            )  # fmt: skip
            if known is not None and known[4] < truth.NOT_SURE:
                return False
    return True


def entropies(of, row, at, length):
    """float64 [L]: the entropies of the logits at some positions of a row, 0 elsewhere."""
    found = torch.zeros(length, dtype=torch.float64)
    for position in at.tolist():
        found[position] = torch.special.entr(torch.softmax(of(row, position).double(), -1)).sum()
    return found


def near_bound(entropy, where, params, row):
    """Whether a position's sum of the entropies ahead of it is close to the row's bound."""
    order = entropy.argsort(stable=True)
    bound, decay = float(params.entropy_bound[row]), float(params.entropy_decay[row])
    for i in range(len(order)):
        ahead, own = order[:i], where[order[i]]
        load = (entropy[ahead] * decay ** ((where[ahead] - own).abs() - 1)).sum()
        if i and abs(load - bound) < 1e-4 * max(bound, 1):
            return True
    return False


def _flags(rows, generator):
    policies = torch.tensor(POLICIES, dtype=torch.int32)[torch.randint(len(POLICIES), (rows,), generator=generator)]
    flags = torch.randint(ALL_FLAGS + 1, (rows,), generator=generator, dtype=torch.int32) | policies
    return flags | refine.OWN_SOFTMAX * ((policies & refine.ENTROPY) != 0)


def parts(output):
    """By name; of the report what is whole, as the confidences in it are those of the state."""
    return output._asdict() | {"report": output.report[:, : -output.token.shape[1]]}


def compare(got, wanted, kernel_state, reference_state, free=slice(None)):
    """free: the rows whose report tells of their state."""
    for output, state in ((got, kernel_state), (wanted, reference_state)):
        assert torch.equal(output.report[free], report_ref(output.status.unbind(1), state)[free])
    for name, a, b in (
        *zip(got._fields, parts(got).values(), parts(wanted).values(), strict=True),
        *((name, getattr(kernel_state, name), getattr(reference_state, name)) for name in STATE),
    ):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(a, b), name


def check(size, dtype, layout, only_needed, seed, filters):
    size = (*size[:2], max(size[2], 6), size[3])  # `make` takes six ids
    for again in range(20):  # until nothing hangs on a rounding
        logits, index, state, params, ids = make(size, dtype, layout, filters, seed * 20 + again)
        before, kernel_state = copy.deepcopy(state), copy.deepcopy(state)
        wanted = refine.refine_step_ref(logits, state, params, ids, index, only_needed, size[3])
        if decided(before, params, wanted, logits, index, ids, size[3], only_needed):
            break
    else:
        raise AssertionError(f"no decided example of size {size} in 20")
    with interpreted():
        got = refine.launch(logits, kernel_state, params, ids, index, filters, only_needed, size[3])
    compare(got, wanted, kernel_state, state)


test_parity = random_cases(check, False, 20)
test_parity_with_filters = random_cases(check, True, 10)
# The slow ones begin with the cases of the usual ones.
test_much_parity = pytest.mark.slow(random_cases(check, False, 220))
test_much_parity_with_filters = pytest.mark.slow(random_cases(check, True, 110))


@pytest.mark.parametrize("dtype, filters", [(torch.bfloat16, False), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_parity_at_the_real_vocabulary(dtype, filters, seed):
    check((1, 2, 157184, TILE_V), dtype, "contiguous", False, seed, filters)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_parity_of_many_short_rows(seed):
    """Ends of blocks and of rows in all their combinations, which longer rows seldom meet."""
    check((48, 3, 61, 64), torch.float32, "contiguous", False, 1000 + seed, filters=False)


@pytest.mark.parametrize(
    "flags", [refine.BAN_MASK | refine.EOS_STEP, refine.BAN_MASK | refine.EDITING | refine.EOS_END]
)
def test_blocks_from_first_to_last_step(flags):
    """Steps on the state that the steps before left, until every row is done; then one more changes nothing."""
    size = (4, 8, 250, 256)
    _, _, state, params, ids = make(size, torch.float32, "contiguous", False, 3)
    state = refine.BlockState.fresh(
        torch.full_like(state.tokens, ids.mask), torch.zeros_like(state.kind), state.block_start
    )
    state.kind[1, :3] = refine.PROMPT
    rules = {"flags": flags, "threshold": 0.9, "steps": 4, "min_transfer": 1, "max_steps": 2**30, "max_post_steps": 2}
    for name, value in rules.items():
        getattr(params, name).fill_(value)
    kernel_state = copy.deepcopy(state)
    for step in range(12):
        logits, *_ = make(size, torch.float32, "contiguous", False, 100 + step, broken=0.0)
        wanted = refine.refine_step_ref(logits, state, params, ids, tile_v=256)
        with interpreted():
            got = refine.launch(logits, kernel_state, params, ids, None, False, step % 2 == 0, 256)
        compare(got._replace(token=wanted.token, confidence=wanted.confidence), wanted, kernel_state, state)
        if (state.frozen != 0).all():
            break
    assert (state.frozen != 0).all() and step > 1
    before = copy.deepcopy(kernel_state)
    with interpreted():
        last = refine.launch(logits.flip(0), kernel_state, params, ids, None, False, True, 256)
    for name in STATE:
        assert torch.equal(getattr(before, name), getattr(kernel_state, name)), name
    assert not last.commit.any() and not last.edit.any() and (last.token == -1).all()


@pytest.mark.parametrize("threshold, commits, edits", [(1 / 64, 1, 0), (1 / 65, 3, 1)])
def test_thresholds_are_strict(threshold, commits, edits):
    """All logits of 64 ids equal: every confidence is 1/64, exactly."""
    _, _, state, params, ids = make((1, 4, 64, 64), torch.float32, "contiguous", False, 0)
    tokens = torch.full_like(state.tokens, ids.mask)
    tokens[0, 3] = (ids.mask + 2) % 64
    rules = {"flags": refine.EDITING, "threshold": threshold, "edit_threshold": threshold, "temperature": 0}
    for name, value in (rules | {"steps": 1000, "min_transfer": 1}).items():
        getattr(params, name).fill_(value)
    for step in (refine.refine_step_ref, partial(refine.launch, filters=False, only_needed=False)):
        fresh = refine.BlockState.fresh(tokens.clone(), torch.zeros_like(state.kind), state.block_start)
        with interpreted():
            output = step(torch.zeros(1, 4, 64), fresh, params, ids, index=None)
        assert (int(output.commit.sum()), int(output.edit.sum())) == (commits, edits)


@pytest.mark.parametrize("rule", ["_select", "_edit", "_block_end", "_eos"])
def test_a_rule_takes_the_same_in_the_reference_and_in_the_kernel(rule):
    shared = [name for name in inspect.signature(getattr(commit, f"{rule}_ref")).parameters if name != "asked"]
    assert [name.lower() for name in getattr(commit, rule).arg_names][: len(shared)] == shared


def rows_of(which, logits, state, params):
    which = torch.tensor(which)
    return logits[which], state.rows(which), params.rows(which)


def test_a_row_gives_the_same_bits_alone_and_in_any_batch():
    logits, _, state, params, ids = make((6, 5, 300, 128), torch.float32, "contiguous", True, 11)
    whole = copy.deepcopy(state)
    with interpreted():
        wanted = refine.launch(logits, whole, params, ids, None, True, False, 128)
        for which in ([5, 2, 0, 1, 4, 3], [0], [3], [5]):
            x, own, rules = rows_of(which, logits, state, params)
            got = refine.launch(x, own, rules, ids, None, True, False, 128)
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a.view(torch.uint8), b[which].view(torch.uint8))
            for name in STATE:
                assert torch.equal(getattr(own, name), getattr(whole, name)[which]), name


# The op


def arguments(seed=1, size=(3, 4, 60, TILE_V), layout="contiguous"):
    logits, index, state, params, ids = make(size, torch.float32, layout, True, seed)
    return logits, state, params, ids, index


@pytest.mark.parametrize("layout", ["contiguous", "packed"])
@pytest.mark.parametrize("moving", [False, True])
def test_op_is_well_formed(layout, moving):
    logits, state, params, ids, index = arguments(layout=layout)
    tensors = (logits, *vars(state).values(), *vars(params).values(), index, None, None)
    moves = refine.Moves.fresh(*state.tokens.shape) if moving else (None, None, None)
    torch.library.opcheck(torch.ops.llada2_fast.refine_step.default, (*tensors, *moves, True, False, *ids))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_op_compiles_without_a_graph_break(backend):
    logits, state, params, ids, index = arguments()
    other = copy.deepcopy(state)

    def call(logits, state):
        output = refine.refine_step(logits * 1.5, state, params, ids, index)
        return output.status + 0, state.tokens + 1

    wanted = call(logits, state)
    for a, b in zip(torch.compile(call, backend=backend, fullgraph=True)(logits, other), wanted, strict=True):
        assert torch.equal(a, b)
    for name in STATE:
        assert torch.equal(getattr(other, name), getattr(state, name)), name


def test_launches_per_step(monkeypatch):
    """Two, whatever the number of rows; three where a row may filter."""
    launched = []
    run = triton.runtime.jit.JITFunction.run
    logits, state, params, ids, index = arguments()
    with force_ops("triton"), interpreted():
        interpreted_run = triton.runtime.jit.JITFunction.run
        assert interpreted_run is not run
        monkeypatch.setattr(
            triton.runtime.jit.JITFunction, "run",
            lambda kernel, *a, **k: launched.append(kernel.__name__) or interpreted_run(kernel, *a, **k),
        )  # fmt: skip
        refine.refine_step(logits, copy.deepcopy(state), params, ids, index, filters=False)
        refine.refine_step(logits, state, params, ids, index)
        monkeypatch.undo()
    assert launched == ["_vocab_kernel", "_commit_kernel", "_vocab_kernel", "_filter_kernel", "_commit_kernel"]


def test_op_runs_the_kernels_where_forced():
    logits, state, params, ids, index = arguments(seed=2)
    other = copy.deepcopy(state)
    wanted = refine.refine_step(logits, state, params, ids, index)
    with force_ops("triton"), interpreted():
        got = refine.refine_step(logits, other, params, ids, index)
    compare(got, wanted, other, state)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_no_rows(choice):
    logits, state, params, ids, index = arguments(size=(0, 4, 60, TILE_V))
    with force_ops(choice), interpreted():
        output = refine.refine_step(logits, state, params, ids, index)
    assert [tuple(tensor.shape) for tensor in output] == [(0, 21), (0, 4), (0, 4), (0, 4), (0, 4)]


def test_kernels_refuse_strided_state():
    logits, state, params, ids, index = arguments()
    state.tokens = state.tokens.T.contiguous().T
    with force_ops("triton"), interpreted(), pytest.raises(ValueError, match="tokens: expected a contiguous tensor"):
        refine.refine_step(logits, state, params, ids, index)


# On a GPU


def on_gpu(made):
    return type(made)(**{name: tensor.cuda() for name, tensor in vars(made).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, length", [(1, 32), (5, 16), (3, 64), (2, 7)])
def test_compiled_at_the_real_vocabulary(dtype, layout, rows, length):
    size = (rows, length, 157184, TILE_V)
    for seed in range(20):
        logits, index, state, params, ids = make(size, dtype, layout, False, seed)
        params.temperature.zero_()  # draws at this size: test_candidates.py
        before, kernel_state = copy.deepcopy(state), on_gpu(state)
        wanted = refine.refine_step_ref(logits, state, params, ids, index)
        if decided(before, params, wanted, logits, index, ids, TILE_V, False):
            break
    else:
        raise AssertionError("no decided example in 20")
    at = None if index is None else index.cuda()
    strided = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device="cuda").copy_(logits)
    got = refine.refine_step(strided, kernel_state, on_gpu(params), ids, at)
    kernel_state = type(state)(**{name: tensor.cpu() for name, tensor in vars(kernel_state).items()})
    compare(refine.RefineOutput(*(tensor.cpu() for tensor in got)), wanted, kernel_state, state)


@pytest.mark.gpu
def test_compiled_rows_give_the_same_bits_in_any_batch():
    logits, _, state, params, ids = make((9, 8, 157184, TILE_V), torch.bfloat16, "contiguous", True, 5)
    params.top_k[::2], params.top_p[::2] = 0, 1.0
    logits, whole, rules = logits.cuda(), on_gpu(state), on_gpu(params)
    wanted = refine.refine_step(logits, whole, rules, ids)
    for which, filters in (([0], True), ([1], True), ([0, 2, 4], False), (list(range(9))[::-1], True)):
        x, own, some = (
            made.cuda() if torch.is_tensor(made) else on_gpu(made)
            for made in rows_of(which, logits.cpu(), state, params)
        )
        got = refine.refine_step(x.cuda(), own, some, ids, filters=filters)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.view(torch.uint8), b[which].view(torch.uint8))


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph_and_never_waits():
    logits, _, state, params, ids = make((4, 32, 157184, TILE_V), torch.bfloat16, "contiguous", True, 6)
    logits, rules = logits.cuda(), on_gpu(params)
    eager, replayed = on_gpu(state), on_gpu(state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        wanted = refine.refine_step(logits, eager, rules, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = refine.refine_step(logits, replayed, rules, ids)
    graph.replay()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    for name in STATE:
        assert torch.equal(getattr(eager, name), getattr(replayed, name)), name
