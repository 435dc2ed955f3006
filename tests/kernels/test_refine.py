"""The whole refinement step: the kernels in Triton's interpreter against the reference, under every mode and flag."""

import copy
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.candidates import TILE_V
from tests.kernels import truth
from tests.kernels.interpreter import interpreted
from tests.kernels.test_candidates import BROKEN, DTYPES, LAYOUTS, SOUND, lay_out, logits_of

NEAR = 2e-5  # two confidences, or one and its threshold, closer than this share may be ordered either way
ALL_FLAGS = 2**8 - 1
STATE = ("tokens", "step", "post_steps", "frozen", "commit_step", "commit_confidence")


def make(size, dtype, layout, filters, seed, broken=0.1):
    """Random logits, index, state, params, mask_id. Tokens and candidates come from a few ids, so that they meet."""
    rows, length, vocab, tile_v = size
    generator = torch.Generator().manual_seed(seed)

    def one_of(values, *shape, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    few = torch.randperm(vocab, generator=generator)[:6]
    mask_id, eos = int(few[0]), few[1:3].tolist()
    tokens = few[one_of([0, 0, 0, 1, 2, 3, 4, 5], rows, length, dtype=torch.int64)]
    kinds = one_of([refine.PROMPT, refine.VALID, refine.VALID, refine.VALID, refine.TAIL, refine.ABSENT], rows, length)
    state = refine.RefineState(
        tokens, kinds.to(torch.int8), one_of([0, 32, 2**31], rows, dtype=torch.int64),
        one_of([0, 0, 1, 7], rows, dtype=torch.int32), one_of([0, 1, 2], rows, dtype=torch.int32),
        one_of([0] * 8 + [1, 2, 4], rows, dtype=torch.int32), one_of(range(4), rows, dtype=torch.int32),
        one_of([-1, 3], rows, length, dtype=torch.int32), torch.rand(rows, length, generator=generator),
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
        flags=torch.randint(ALL_FLAGS + 1, (rows,), generator=generator, dtype=torch.int32),
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
        x = logits_of(kind, vocab, mask_id, generator)
        if not wrong and int(torch.randint(3, (), generator=generator)):  # one of the few gets a probability
            likely = torch.logit(0.05 + 0.9 * torch.rand((), generator=generator))
            x[few[int(torch.randint(6, (), generator=generator))]] = x.logsumexp(0) + likely
        if parts and int(torch.randint(8, (), generator=generator)) == 0:
            x = parts[int(torch.randint(len(parts), (), generator=generator))]  # the same confidence twice
        parts.append(x)
    logits = (torch.stack(parts) if parts else torch.zeros(0, vocab)).view(rows, length, vocab).to(dtype)
    if layout == "packed":
        needed = refine.needed_positions(state, params, mask_id)
        index = torch.where(needed, needed.flatten().cumsum(0).view(rows, length) - 1, -1)
        return logits[needed], index, state, params, mask_id
    return *lay_out(logits, layout), state, params, mask_id


def decided(before, params, output, logits, index, mask_id, tile_v, only_needed):
    """Whether nothing of this step hangs on a rounding: no draw, threshold or order of confidences is close."""

    def of(row, at):
        return logits[row, at] if index is None else logits[index[row, at]]

    needed = refine.needed_positions(before, params, mask_id)
    for row in range(needed.shape[0]):
        masked = needed[row] & (before.tokens[row] == mask_id)
        confidence = output.confidence[row]
        for mask, limit in ((masked, params.threshold[row]), (needed[row] & ~masked, params.edit_threshold[row])):
            if ((confidence[mask] - limit).abs() < NEAR * limit).any():
                return False
        ordered, order = confidence[masked].sort(stable=True)
        where = torch.where(masked)[0][order]
        for a, b, p, q in zip(where, where[1:], ordered, ordered[1:], strict=False):
            if q - p < NEAR * q and not torch.equal(of(row, a), of(row, b)):
                return False
        if params.temperature[row] == 0 or output.status[row, refine.FLAGS] & refine.ERROR:
            continue
        for at in range(needed.shape[1]):
            if (only_needed and not needed[row, at]) or (index is not None and index[row, at] < 0):
                continue
            known = truth.candidate(
                of(row, at), float(params.temperature[row]), int(params.top_k[row]), float(params.top_p[row]),
                int(params.seed[row]), int(before.start[row]) + at, int(before.step[row]), mask_id,
                bool(params.flags[row] & refine.BAN_MASK), tile_v,
            )  # fmt: skip
            if known is not None and known[4] < truth.NOT_SURE:
                return False
    return True


def compare(got, wanted, kernel_state, reference_state):
    for name, a, b in (
        *zip(got._fields, got, wanted, strict=True),
        *((name, getattr(kernel_state, name), getattr(reference_state, name)) for name in STATE),
    ):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(a, b), name


@st.composite
def sizes(draw, filters):
    """rows, length, vocab, tile_v that the interpreter can afford: 100 programs, 6 positions that may filter."""
    most = 6 if filters else 100
    length = draw(st.integers(1, most) if filters else st.sampled_from((1, 2, 3, 5, 8, 17, 32, 33, 64)))
    rows = draw(st.integers(1 if filters else 0, min(9, most // length)))
    tile_v = draw(st.sampled_from((64, 256, 1024)))
    tiles = draw(st.integers(1, max(1, 100 // max(1, rows * length))))
    return rows, length, min(tile_v * tiles, 8191) - draw(st.sampled_from((0, 1, 13, 57))), tile_v


def check(size, dtype, layout, only_needed, seed, filters):
    for again in range(20):  # until nothing hangs on a rounding
        logits, index, state, params, mask_id = make(size, dtype, layout, filters, seed * 20 + again)
        before, kernel_state = copy.deepcopy(state), copy.deepcopy(state)
        wanted = refine.refine_step_ref(logits, state, params, mask_id, index, only_needed, size[3])
        if decided(before, params, wanted, logits, index, mask_id, size[3], only_needed):
            break
    else:
        raise AssertionError(f"no decided example of size {size} in 20")
    with interpreted():
        got = refine.launch(logits, kernel_state, params, mask_id, index, filters, only_needed, size[3])
    compare(got, wanted, kernel_state, state)


@settings(max_examples=50, phases=[Phase.generate])  # an example is too slow to shrink
@given(sizes(False), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**32))
def test_parity(size, dtype, layout, only_needed, seed):
    check(size, dtype, layout, only_needed, seed, filters=False)


@settings(max_examples=25, phases=[Phase.generate])  # an example is too slow to shrink
@given(sizes(True), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.booleans(), st.integers(0, 2**32))
def test_parity_with_filters(size, dtype, layout, only_needed, seed):
    check(size, dtype, layout, only_needed, seed, filters=True)
