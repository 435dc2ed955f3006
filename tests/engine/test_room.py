"""How much room sequences take: what a cache must have for some of them, and the longest one that it can have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_fast.config import DecodeParams, longest, room_for
from llada2_fast.decoding.sequence import Sequence
from llada2_fast.kernels.refine import SpecialIds

HOW = [{}, {"edit_window": 1}, {"edit_window": 3}, {"checks": True}]


def pages_of(tokens, edit_window=0, checks=False):
    """Of a sequence without a prompt, in blocks of 4."""
    rules = {"policy": "self_speculative"} if checks else {}
    rules |= {"edit_window": edit_window, "editing_threshold": 0.5} if edit_window else {}
    return Sequence([], DecodeParams(tokens, **rules), 0, (), 4, SpecialIds(1)).num_pages


@pytest.mark.parametrize("how", HOW, ids=str)
@given(pages=st.integers(1, 30))
def test_the_longest_sequence_fits_and_none_that_is_a_block_longer(how, pages):
    most = longest(pages, 4, **how)
    assert most % 4 == 0 and (most == 0 or pages_of(most, **how) <= pages)
    assert pages_of(most + 4, **how) > pages


@pytest.mark.parametrize("how", HOW, ids=str)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_there_is_room_for_all_of_them(how, lengths):
    assert room_for(lengths, 4, len(lengths), **how) >= 4 * sum(pages_of(one, **how) for one in lengths)
