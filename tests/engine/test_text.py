"""Text of tokens that arrive bit by bit: nothing is taken back, nothing is lost, stop strings never show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast.engine.detokenizer import IncrementalDetokenizer
from tests.engine.common import tokenizer

texts_of = st.text(alphabet="ab é漢🙂\n.{}four twenty", max_size=40)
cuts_of = st.lists(st.integers(1, 5), max_size=60)


def pieces(ids, cuts):
    while ids:
        size = cuts.pop() if cuts else 1
        yield ids[:size]
        ids = ids[size:]


@settings(max_examples=150)
@given(texts_of, cuts_of)
def test_pieces_add_up(text, cuts):
    """Characters of several tokens too: the tokenizer falls back to bytes."""
    ids = tokenizer().encode(text, add_special_tokens=False)
    stream, shown = IncrementalDetokenizer(tokenizer()), []
    for piece in pieces(ids, list(cuts)):
        stream.push(piece)
        shown.append(stream.take())
        assert "\N{REPLACEMENT CHARACTER}" not in shown[-1]
    assert "".join(shown) + stream.take(final=True) == tokenizer().decode(ids, skip_special_tokens=True) == text


@settings(max_examples=150)
@given(texts_of, cuts_of, st.lists(st.text(alphabet="ab é🙂ou ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_where_it_begins(text, cuts, stops):
    ids = tokenizer().encode(text, add_special_tokens=False)
    found = [text.find(stop) for stop in stops if stop in text]
    stream, shown, used = IncrementalDetokenizer(tokenizer(), tuple(stops)), [], []
    for piece in pieces(ids, list(cuts)):
        count = stream.tokens_to_stop(piece)
        assert count is None or 1 <= count <= len(piece)
        stream.push(piece[:count])
        used += piece[:count]
        shown.append(stream.take(final=count is not None))
        if count is not None:
            break
    told = "".join(shown) + stream.take(final=True)
    whole = tokenizer().decode(used, skip_special_tokens=True)
    if not found:
        assert told == text and used == ids
        return
    # of several stop strings the one that is complete first counts
    first = min(whole.find(stop) for stop in stops if stop in whole)
    assert told == text[:first] and not any(stop in told for stop in stops)
    shorter = tokenizer().decode(used[:-1], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert not any(stop in shorter for stop in stops)


def test_broken_characters_show_at_the_end_only():
    ids = tokenizer().encode("a🙂", add_special_tokens=False)
    assert len(ids) == 5
    stream = IncrementalDetokenizer(tokenizer())
    stream.push(ids[:3])
    assert stream.take() == "a"
    assert set(stream.take(final=True)) == {"\N{REPLACEMENT CHARACTER}"}
    assert stream.take(final=True) == ""


class Words:
    """A tokenizer that writes a space between two tokens, and none ahead of the first."""

    def decode(self, ids, skip_special_tokens):
        return " ".join("abcd"[i] for i in ids)


def test_a_token_is_read_behind_the_ones_before_it():
    stream = IncrementalDetokenizer(Words())
    shown = []
    for piece in ([0], [1, 2], [3]):
        stream.push(piece)
        shown.append(stream.take())
    assert shown == ["a", " b c", " d"] and stream.take(final=True) == ""


def test_nothing_comes_behind_a_stop():
    ids = tokenizer().encode("ab🙂", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer(), ("b",))
    stream.push(ids[:-1])  # ends in the middle of a character
    assert stream.take(final=True) == stream.text == "a"


def test_special_tokens_are_no_text():
    stream = IncrementalDetokenizer(tokenizer())
    stream.push([tokenizer().eos_token_id])
    assert stream.take(final=True) == ""


@pytest.mark.parametrize("stop", ["abc", "aab"])
def test_a_tail_that_may_become_a_stop_is_held_back(stop):
    stream, shown = IncrementalDetokenizer(tokenizer(), (stop,)), []
    for token in tokenizer().encode("aaab", add_special_tokens=False):
        stream.push([token])
        shown.append(stream.take())
    assert shown == {"abc": ["", "a", "a", ""], "aab": ["", "", "a", ""]}[stop]
    assert stream.take(final=True) == {"abc": "ab", "aab": ""}[stop]
