"""Rows under a language: candidates from allowed ids alone, in the kernels and in the reference, and steps that leave
what is written to the host."""

import copy
import re
from dataclasses import fields
from functools import partial

import pytest
import torch
import triton

from benchmarks import aot
from llada2_fast.kernels import candidates, commit, refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.refine import BAN_MASK, EDITING, EOS_STEP, ERROR, GUIDED, NUM_STATUS, OWN_SOFTMAX, Allowed
from tests.kernels.interpreter import interpreted
from tests.kernels.test_candidates import RULES, chi_square, drawable, params, random_cases, tables_of
from tests.kernels.test_candidates import check as check_candidates
from tests.kernels.test_refine import arguments, compare, decided, make, on_gpu
from tests.kernels.test_refine_rules import IDS, E, M, peaks
from tests.kernels.test_refine_rules import params as rules_of
from tests.kernels.test_refine_rules import state as state_of

test_candidates = random_cases(partial(check_candidates, guided=True), False, 8)
test_candidates_with_filters = random_cases(partial(check_candidates, guided=True), True, 5)
test_many_candidates = pytest.mark.slow(random_cases(partial(check_candidates, guided=True), False, 112))
test_many_candidates_with_filters = pytest.mark.slow(random_cases(partial(check_candidates, guided=True), True, 112))


# The step


def check(size, dtype, layout, only_needed, seed, filters):
    size = (*size[:2], max(size[2], 6), size[3])
    rows, length, vocab, tile_v = size
    for again in range(20):  # until nothing hangs on a rounding
        logits, index, state, params, ids = make(size, dtype, layout, filters, seed * 20 + again)
        generator = torch.Generator().manual_seed(seed)
        allowed, may = tables_of(rows, length, vocab, generator)
        guided = torch.rand(rows, generator=generator) < 0.7
        params.flags |= guided * GUIDED
        before, kernel_state = copy.deepcopy(state), copy.deepcopy(state)
        wanted = refine.refine_step_ref(logits, state, params, ids, index, only_needed, tile_v, allowed)
        if decided(before, params, wanted, logits, index, ids, tile_v, only_needed, may):
            break
    else:
        raise AssertionError(f"no decided example of size {size} in 20")
    with interpreted():
        got = refine.launch(logits, kernel_state, params, ids, index, filters, only_needed, tile_v, allowed)
    compare(got, wanted, kernel_state, state, ~guided)
    needed = refine.needed_positions(before, params, ids)
    for output, after in ((got, kernel_state), (wanted, state)):
        report_of_candidates(output, before, after, needed, guided, ids)


def report_of_candidates(output, before, after, needed, guided, ids):
    """Guided rows are as they were, but for errors, and their report tells what could be written."""
    for name in {field.name for field in fields(before)} - {"frozen"}:
        assert torch.equal(getattr(after, name)[guided], getattr(before, name)[guided]), name
    length = needed.shape[1]
    status, block, tokens, steps, confidence = output.report[guided].split([NUM_STATUS, 1, *[length] * 3], 1)
    shown, kept = needed[guided], before.rows(guided.nonzero()[:, 0])
    wrong = (output.confidence[guided].isnan() & shown).any(-1)
    left = (shown & (kept.tokens == ids.mask)).sum(-1)
    frozen = kept.frozen | wrong * ERROR
    assert torch.equal(status[:, refine.FLAGS], frozen) and torch.equal(after.frozen[guided], frozen)
    assert torch.equal(status[:, refine.MASKS_BEFORE], left)
    live = kept.frozen == 0
    assert torch.equal(status[live, refine.MASKS_LEFT], left[live].int())
    assert not status[:, [refine.COMMITS, refine.EDITS]].any() and (status[:, refine.EOS_AT] == -1).all()
    assert torch.equal(status[:, refine.STEP], kept.step) and torch.equal(status[:, refine.POST_STEPS], kept.post_steps)
    assert torch.equal(block[:, 0], (kept.block_start // length).int())
    assert torch.equal(tokens, torch.where(shown, output.token[guided], kept.tokens))
    assert torch.equal(steps, kept.commit_step)
    told = torch.where(shown, output.confidence[guided], kept.commit_confidence)
    assert torch.equal(confidence, told.view(torch.int32))
    assert not output.commit[guided].any() and not output.edit[guided].any()


test_steps = random_cases(check, False, 8)
test_steps_with_filters = random_cases(check, True, 4)
test_many_steps = pytest.mark.slow(random_cases(check, False, 112))
test_many_steps_with_filters = pytest.mark.slow(random_cases(check, True, 56))


def all_of(rows, length, vocab, *forbidden):
    """Allowed of one class for all ids but those forbidden."""
    classes = torch.full((rows, vocab), 33, dtype=torch.int16)
    classes[:, list(forbidden)] = 5
    bits = torch.zeros(rows, length, refine.WORDS, dtype=torch.int32)
    bits[..., 1] = 2
    return Allowed(classes, bits)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_confidence_is_a_share_of_what_is_allowed(choice):
    logits = torch.zeros(1, 2, 10)
    logits[..., 3], logits[0, 1, 3] = 300.0, torch.nan
    with force_ops(choice), interpreted():
        output = refine.refine_step(
            logits, state_of([M, M]), rules_of(flags=BAN_MASK | GUIDED), IDS, allowed=all_of(1, 2, 10, 3)
        )
    assert output.token[0].tolist() == [0, 0]
    assert output.confidence[0].tolist() == pytest.approx([1 / 9, 1 / 9], rel=1e-5)
    assert output.status[0, refine.FLAGS] == 0


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("flag", [EOS_STEP, refine.EOS_END, refine.EOS_HOLDS])
def test_neither_an_eos_nor_the_last_step_ends_anything(choice, flag):
    made = state_of([E, 1, 2])
    rules = rules_of(flags=BAN_MASK | GUIDED | EDITING | flag, max_steps=1, max_post_steps=1, edit_threshold=0.5)
    logits = peaks((1, 0.9), (3, 0.9), (2, 0.9))
    with force_ops(choice), interpreted():
        output = refine.refine_step(logits, made, rules, IDS, allowed=all_of(1, 3, 10))
    assert output.status[0].tolist() == [0, 0, 0, 0, -1, 0, 0, 0] and made.frozen.item() == 0
    assert made.tokens.tolist() == [[E, 1, 2]] and output.report[0, NUM_STATUS + 1 :][:3].tolist() == [1, 3, 2]


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", ["nan among the allowed", "inf among the allowed", "nothing allowed", "-inf"])
def test_errors(choice, temperature, wrong):
    logits, allowed = torch.zeros(1, 1, 10), all_of(1, 1, 10, 3)
    if wrong == "nothing allowed":
        allowed.bits.zero_()
    elif wrong == "-inf":
        logits[:] = -torch.inf
        logits[..., 3] = 1.0
    else:
        logits[..., 4] = float(wrong[:3])
    made = state_of([M])
    with force_ops(choice), interpreted():
        output = refine.refine_step(
            logits, made, rules_of(flags=BAN_MASK | GUIDED, temperature=temperature), IDS, allowed=allowed
        )
    assert output.token.item() == -1 and output.confidence.isnan().all()
    assert output.status[0, refine.FLAGS] == ERROR == made.frozen.item()


@pytest.mark.parametrize("filters", [False, True])
def test_free_rows_keep_their_bits_and_guided_rows_theirs_in_any_batch(filters):
    logits, _, state, params, ids = make((6, 5, 300, 128), torch.float32, "contiguous", filters, 11)
    allowed, _ = tables_of(6, 5, 300, torch.Generator().manual_seed(3))
    guided = torch.tensor([True, False, True, False, False, True])
    params.flags |= guided * GUIDED

    def of(which, tables):
        which = torch.tensor(which)
        own = state.rows(which)
        with interpreted():
            output = refine.launch(
                logits[which], own, params.rows(which), ids, None, filters, False, 128,
                Allowed(*(table[which] for table in tables)) if tables else None,
            )  # fmt: skip
        return *output, *vars(own).values()

    whole = of(range(6), allowed)
    for which, tables in (([1, 3, 4], None), ([0], allowed), ([2], allowed), ([5, 1, 0], allowed)):
        for got, wanted in zip(of(which, tables), whole, strict=True):
            assert torch.equal(got.view(torch.uint8), wanted[which].view(torch.uint8))


@pytest.mark.parametrize("rule", RULES[::2], ids=str)
def test_draws_are_from_the_allowed_ids_and_top_k_counts_no_others(rule):
    vocab, mask_id, draws = 150, 11, 20000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 2
    forbidden = logits.topk(10).indices.tolist() + [40, 41]

    def drawn(run, count, *rest):
        flags = torch.tensor([BAN_MASK | GUIDED])
        allowed = all_of(1, count, vocab, *forbidden)
        where = torch.tensor([100]), torch.tensor([3], dtype=torch.int32)
        shown = logits.expand(1, count, -1)
        found = run(shown, *where, params(1, *rule), candidates.SpecialIds(mask_id), flags, *rest, allowed=allowed)
        return [tensor[0] for tensor in found]

    token, confidence = drawn(candidates.block_candidates_ref, draws)
    left = logits.clone()
    left[forbidden] = -torch.inf
    shares = drawable(left, *rule, mask_id)
    counts = torch.bincount(token, minlength=vocab).double()
    assert (counts[shares == 0] == 0).all()
    assert chi_square(counts[shares > 0], shares[shares > 0])
    torch.testing.assert_close(confidence.double(), shares[token], rtol=1e-5, atol=0)
    with interpreted():
        few = drawn(partial(candidates.launch, filters=True, runner_up=False, tile_v=64), 8, None)
    wanted = drawn(partial(candidates.block_candidates_ref, tile_v=64), 8)
    assert torch.equal(few[0], wanted[0])
    torch.testing.assert_close(few[1], wanted[1])


def test_the_host_has_the_last_word():
    """A row as the host has it: without the flag, on candidates of the report; what `check` returns is written."""
    logits = peaks((1, 0.9), (2, 0.8), (3, 0.7), (5, 0.9))
    made = state_of([M, M, M, 4])
    rules = rules_of(flags=BAN_MASK | EDITING | EOS_STEP, threshold=0.75, edit_threshold=0.5)
    token, confidence = logits.max(-1).indices, torch.softmax(logits, -1).amax(-1)
    asked = []

    def check(selected, edited):
        asked.append([tensor[0].tolist() for tensor in (selected, edited)])
        return torch.tensor([[True, False, True, False]]), torch.zeros_like(edited)

    output = commit.commit_ref(token, confidence, made, rules, IDS, check=check)
    yes, no = True, False
    assert asked == [[[yes, yes, no, no], [no, no, no, yes]]]
    assert made.tokens.tolist() == [[1, M, 3, 4]] and made.commit_step.tolist() == [[0, -1, 0, -1]]
    assert output.commit.tolist() == [[yes, no, yes, no]] and not output.edit.any()
    assert output.status[0].tolist() == [refine.CHANGED, 1, 2, 0, -1, 1, 0, 3]


# The op


def test_tables_that_do_not_fit_are_refused():
    logits, state, params, ids, index = arguments()
    good, _ = tables_of(3, 4, 60, torch.Generator())
    for name, bad in (("classes", good.classes[:, :-1]), ("classes", good.classes.int()), ("bits", good.bits[:, :3])):
        with pytest.raises(ValueError, match=f"^allowed.{name}: expected torch.int.* got torch.int"):
            refine.refine_step(logits, state, params, ids, index, allowed=good._replace(**{name: bad}))


def test_op_is_well_formed():
    logits, state, params, ids, index = arguments()
    params.flags |= GUIDED
    allowed, _ = tables_of(3, 4, 60, torch.Generator())
    tensors = (logits, *vars(state).values(), *vars(params).values(), index, *allowed, None, None, None)
    torch.library.opcheck(torch.ops.llada2_fast.refine_step.default, (*tensors, True, False, *ids))


def test_no_launch_more(monkeypatch):
    launched = []
    logits, state, params, ids, index = arguments()
    params.flags |= GUIDED
    with force_ops("triton"), interpreted():
        run = triton.runtime.jit.JITFunction.run
        monkeypatch.setattr(
            triton.runtime.jit.JITFunction, "run",
            lambda kernel, *a, **k: launched.append(kernel.__name__) or run(kernel, *a, **k),
        )  # fmt: skip
        refine.refine_step(logits, state, params, ids, index, allowed=tables_of(3, 4, 60, torch.Generator())[0])
        monkeypatch.undo()
    assert launched == ["_vocab_kernel", "_filter_kernel", "_commit_kernel"]


def layouts(dtype, guided, filters, vocab):
    """How the kernels that read logits spread what they reduce over threads, which is the order of their sums."""
    with aot.recorded() as launches:
        aot._refine(dtype, vocab=vocab, packed=True, only_needed=True, filters=filters, guided=guided)
    code = {launch.kernel.__name__: aot.compiled(launch, "sm_90").asm["ttgir"] for launch in launches[:-1]}
    return {name: _reduced(text) for name, text in code.items()}


def _reduced(text):
    """The shapes and layouts of what a kernel's code reduces."""
    spread = dict(re.findall(r"(#\w+) = (#ttg\.\w+<.*?>)\n", text))
    of = re.findall(r"\"tt\.reduce\".*?\}\) : \((tensor<[^#]*f32), (#[^>]*>?)>\)", text, re.DOTALL)
    return sorted((shape, re.sub(r"#\w+", lambda one: spread.get(one[0], one[0]), how)) for shape, how in of)


@pytest.mark.skipif(triton.__version__ < "3.7", reason="Triton 3.6 spreads by the tables: a sum may differ in a bit")
@pytest.mark.parametrize("vocab", [aot.VOCAB, 5003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_tables_do_not_change_the_order_of_sums(dtype, vocab):
    """So that a free row has the same bits beside guided ones; the interpreter adds up in an order of its own."""
    for filters in (False, True):
        plain, guided = (layouts(dtype, which, filters, vocab) for which in (False, True))
        assert plain == guided and all(plain.values())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_rows_keep_their_bits(dtype):
    """The tables change nothing for free rows, nor a batch anything for guided ones."""
    rows, length, vocab = 6, 8, 157184
    logits, _, state, params, ids = make((rows, length, vocab, candidates.TILE_V), dtype, "contiguous", True, 5)
    params.flags |= (torch.arange(rows) % 2) * GUIDED | OWN_SOFTMAX
    allowed, may = tables_of(rows, length, vocab, torch.Generator().manual_seed(4))

    def of(which, tables):
        which = torch.tensor(which)
        own, rules = on_gpu(state.rows(which)), on_gpu(params.rows(which))
        tables = Allowed(*(table[which].cuda() for table in tables)) if tables else None
        return refine.refine_step(logits[which].cuda(), own, rules, ids, allowed=tables)

    whole = of(range(rows), allowed)
    for row in range(1, rows, 2):
        token = whole.token[row].cpu()
        assert may[row].gather(1, token.clamp(min=0)[:, None])[:, 0][token >= 0].all()
    for which, tables in (([0, 2, 4], None), ([1], allowed), ([5, 0, 3], allowed)):
        for got, wanted in zip(of(which, tables), whole, strict=True):
            assert torch.equal(got.view(torch.uint8), wanted[which].view(torch.uint8))
