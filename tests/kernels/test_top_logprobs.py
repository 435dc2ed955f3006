"""The lists of the likeliest ids: kernels in Triton's interpreter and reference against the rule in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada2_fast.kernels import top_logprobs as ops
from llada2_fast.kernels.candidates import SampleParams, candidates
from llada2_fast.kernels.roles import BAN_MASK, SpecialIds
from tests.kernels.interpreter import interpreted
from tests.kernels.test_candidates import DTYPES, SOUND, logits_of


def truth(x, banned, k):
    """[(id, log-probability)] of one position's logits x [V]; banned: an id or None."""
    x = x.double()
    logprob = torch.log_softmax(x, 0).tolist()
    order = sorted((-value, v) for v, value in enumerate(x.tolist()) if v != banned and value > -math.inf)
    return [(v, logprob[v]) for _, v in order[:k]]


def agree(got, logits, index, flags, mask_id, k):
    ids, logprobs = (part.tolist() for part in got)
    for row, positions in enumerate(index.tolist()):
        for at, source in enumerate(positions):
            banned = mask_id if flags[row] & BAN_MASK else None
            wanted = truth(logits[source], banned, k) if source >= 0 else []
            nothing = [-1] * (k - len(wanted))
            assert ids[row][at] == [v for v, _ in wanted] + nothing
            assert logprobs[row][at] == [pytest.approx(p, rel=1e-6, abs=2e-6) for _, p in wanted] + [
                -math.inf for _ in nothing
            ]


@given(st.data())
def test_the_lists(data):
    """Ties, logits of -inf, fewer ids than asked for, positions without logits, of tiles of any number."""
    rows, length, vocab = data.draw(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 70)))
    k, tile_v = data.draw(st.tuples(st.integers(1, 20), st.sampled_from((16, 32, 128))))
    kinds = data.draw(st.lists(st.sampled_from(SOUND), min_size=rows * length, max_size=rows * length))
    dtype, seed = data.draw(st.tuples(st.sampled_from(DTYPES), st.integers(0, 99)))
    generator = torch.Generator().manual_seed(seed)
    mask_id = data.draw(st.integers(0, vocab - 1))
    logits = torch.empty(rows * length, vocab + 3, dtype=dtype)[:, 1:-2]
    for at, kind in enumerate(kinds):
        logits[at] = logits_of(kind, vocab, mask_id, generator)
    index = torch.randperm(rows * length, generator=generator).view(rows, length)
    index[torch.rand(index.shape, generator=generator) < 0.3] = -1
    flags = torch.randint(2, (rows,), dtype=torch.int32, generator=generator) * BAN_MASK
    agree(ops.top_logprobs(logits, index, flags, mask_id, k), logits, index, flags, mask_id, k)
    with interpreted():
        agree(ops.launch(logits, index, flags, mask_id, k, tile_v), logits, index, flags, mask_id, k)


def test_the_first_is_the_greedy_candidate_and_its_confidence():
    logits = torch.randn(64, 5003, generator=torch.Generator().manual_seed(0)) * 4
    index, zero = torch.arange(64).view(8, 8), torch.zeros(8, dtype=torch.int32)
    params, flags = SampleParams(zero.float(), zero, zero + 1.0, zero.long()), zero + BAN_MASK
    token, confidence = candidates(logits, zero.long(), zero, params, SpecialIds(7), flags, index)
    ids, logprobs = ops.top_logprobs(logits, index, flags, 7, 3)
    assert torch.equal(ids[..., 0].long(), token)
    torch.testing.assert_close(logprobs[..., 0], confidence.log(), rtol=1e-6, atol=1e-6)


def test_a_list_begins_as_a_longer_one_and_as_beside_others():
    logits = torch.randn(40, 301, generator=torch.Generator().manual_seed(1)).bfloat16()
    index, flags = torch.arange(40).view(5, 8), torch.zeros(5, dtype=torch.int32)
    ids, logprobs = ops.top_logprobs(logits, index, flags, 0, 20)
    for row in range(5):
        alone = ops.top_logprobs(logits, index[row : row + 1], flags[:1], 0, 4)
        assert torch.equal(alone[0][0], ids[row, :, :4]) and torch.equal(alone[1][0], logprobs[row, :, :4])


@pytest.mark.parametrize("shape, index", [((2, 3, 5), (2, 3)), ((6, 5), (6,)), ((6, 5), (3, 2))])
def test_shapes_that_do_not_fit(shape, index):
    with pytest.raises(ValueError, match="logits, index, flags: expected"):
        ops.top_logprobs(torch.zeros(shape), torch.zeros(index, dtype=torch.int64), torch.zeros(2), 0, 1)


def test_no_list_without_an_entry():
    with pytest.raises(ValueError, match="k=0: expected at least 1"):
        ops.top_logprobs(torch.zeros(6, 5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), 0, 0)
