"""Text of tokens that arrive bit by bit: nothing is taken back, nothing is lost, stop strings never show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llada2_fast.engine.detokenizer import IncrementalDetokenizer
from tests.engine.common import tokenizer
from tests.engine.vocabularies import PIECES, SPECIAL, byte_fallback, byte_level, python_bytes, word_piece

BROKEN = "\N{REPLACEMENT CHARACTER}"
texts_of = st.text(alphabet="ab é漢🙂\n.{}four twenty", max_size=40)
cuts_of = st.lists(st.integers(1, 5), max_size=60)


def pieces(ids, cuts):
    while ids:
        size = cuts.pop() if cuts else 1
        yield ids[:size]
        ids = ids[size:]


def shown_of(stream, ids, cuts=()):
    """What is shown after each piece, and at the end."""
    shown = []
    for piece in pieces(ids, list(cuts)):
        stream.push(piece)
        shown.append(stream.take())
    return [*shown, stream.take(final=True)]


@settings(max_examples=100)
@given(texts_of, cuts_of)
def test_pieces_add_up(text, cuts):
    """Characters of several tokens too: the tokenizer falls back to bytes."""
    ids = tokenizer().encode(text, add_special_tokens=False)
    shown = shown_of(IncrementalDetokenizer(tokenizer()), ids, cuts)
    assert BROKEN not in "".join(shown)
    assert "".join(shown) == tokenizer().decode(ids, skip_special_tokens=True) == text


KINDS = {
    "byte-level": (byte_level, range(285)),  # ids that it does not know, too
    "WordPiece": (word_piece, range(26)),
    "WordPiece, spaces stay": (lambda: word_piece(clean_up=False), range(26)),
    "Python": (python_bytes, [*range(3), *(3 + byte for byte in (*b"a ", *"é漢🙂".encode(), 255)), 259, 260]),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(st.data(), cuts_of, st.booleans())
def test_any_tokens_add_up(kind, data, cuts, skip):
    make, known = KINDS[kind]
    some = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=6)) + make().all_special_ids[:1]
    ids = data.draw(st.lists(st.sampled_from(some) | st.sampled_from(known), max_size=24))
    stream = IncrementalDetokenizer(make(), skip_special_tokens=skip)
    shown = shown_of(stream, ids, cuts)
    assert "".join(shown) == stream.text == make().decode(ids, skip_special_tokens=skip)


characters = st.sampled_from([*"aé漢🙂", BROKEN]).map(lambda character: [1 + byte for byte in character.encode()])
fallback_pieces = st.integers(257, 257 + len(PIECES) + len(SPECIAL) - 1).map(lambda token: [token])
fallback_ids = st.lists(characters | fallback_pieces, max_size=30).map(lambda tokens: sum(tokens, []))


@pytest.mark.parametrize("metaspace", [False, True])
@settings(max_examples=200)
@given(fallback_ids, cuts_of, st.booleans())
def test_characters_in_bytes_add_up(metaspace, ids, cuts, skip):
    stream = IncrementalDetokenizer(byte_fallback(metaspace), skip_special_tokens=skip)
    shown = shown_of(stream, ids, cuts)
    assert "".join(shown) == stream.text == byte_fallback(metaspace).decode(ids, skip_special_tokens=skip)


def in_order(some, all_of_them):
    rest = iter(all_of_them)
    return all(character in rest for character in some if character != BROKEN)


@settings(max_examples=200)
@given(st.lists(characters | st.integers(1, 256).map(lambda token: [token]) | st.just([261]), max_size=30), cuts_of)
def test_a_broken_byte_takes_back_no_character(tokens, cuts):
    """What is shown lies between what decode keeps and what the bytes are."""
    ids = sum(tokens, [])
    told = "".join(shown_of(IncrementalDetokenizer(byte_fallback()), ids, cuts))
    assert in_order(byte_fallback().decode(ids), told)
    assert in_order(told, bytes(98 if token == 261 else token - 1 for token in ids).decode(errors="replace"))


@pytest.mark.parametrize(("make", "first"), [(byte_fallback, 1), (python_bytes, 3)])
def test_a_character_shows_with_its_last_byte(make, first):
    """Also between other characters in bytes, which byte fallback decodes all together."""
    for character in ("é", "漢", "🙂", "é漢🙂"):
        ids = [first + byte for byte in character.encode()]
        stream = IncrementalDetokenizer(make())
        assert [part for part in shown_of(stream, ids * 2) if part] == [*character] * 2


def test_characters_stay_ahead_of_a_broken_byte():
    ids = [1 + byte for byte in "漢".encode()] + [256, 260]  # decode makes the character U+FFFD, three times
    shown = shown_of(IncrementalDetokenizer(byte_fallback()), ids)
    assert "".join(shown) == f"漢{BROKEN}a" and shown[-1] == "" and shown[-2] == f"{BROKEN}a"
    assert byte_fallback().decode(ids) == BROKEN * 4 + "a"
    assert "".join(shown_of(IncrementalDetokenizer(byte_fallback()), ids[:4])) == f"漢{BROKEN}"


def test_characters_after_a_broken_byte_show_once():
    text = "漢é🙂" * 20
    told = "".join(shown_of(IncrementalDetokenizer(byte_fallback()), [256, *(1 + byte for byte in text.encode())]))
    assert told.startswith(BROKEN) and text.endswith(told.strip(BROKEN)) and len(told.strip(BROKEN)) == 60


@settings(max_examples=50)
@given(st.lists(st.sampled_from([*"漢🙂".encode()[:-1], 0x80, 0xFF]), min_size=30, max_size=120), cuts_of)
def test_broken_bytes_in_a_row_add_up(broken, cuts):
    """More of them than the window keeps, and a character at the end."""
    alphabet = byte_level().convert_tokens_to_ids
    byte_ids = [alphabet(bytes_to_unicode()[byte]) for byte in [*broken, *"漢".encode()]]
    shown = shown_of(IncrementalDetokenizer(byte_level()), byte_ids, cuts)
    assert "".join(shown) == byte_level().decode(byte_ids)


@pytest.mark.parametrize(("make", "first", "text"), [(byte_fallback, 1, f"a{BROKEN}🙂"), (python_bytes, 3, "a漢")])
def test_special_tokens_between_bytes(make, first, text):
    """However many."""
    ids = [first + byte for byte in text.encode()]
    ids[4:4] = [make().eos_token_id] * 40
    assert "".join(shown_of(IncrementalDetokenizer(make()), ids)) == text


def test_broken_characters_show_at_the_end_only():
    ids = tokenizer().encode("a🙂", add_special_tokens=False)
    assert len(ids) == 5
    stream = IncrementalDetokenizer(tokenizer())
    stream.push(ids[:3])
    assert stream.take() == "a"
    assert set(stream.take(final=True)) == {BROKEN}
    assert stream.take(final=True) == ""


@pytest.mark.parametrize(("make", "first"), [(byte_fallback, 1), (byte_fallback, None), (word_piece, None)])
def test_a_real_replacement_character_is_not_held_for_ever(make, first):
    """Neither in bytes nor as a token."""
    own = make().convert_tokens_to_ids(BROKEN)
    ids = [own] * 20 if first is None else [first + byte for byte in BROKEN.encode()] * 20
    shown = shown_of(IncrementalDetokenizer(make()), ids)
    assert "".join(shown[:-1]).count(BROKEN) >= 17 and "".join(shown) == make().decode(ids)


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0
        self.all_special_ids, self.all_special_tokens = tokenizer.all_special_ids, tokenizer.all_special_tokens

    def decode(self, ids, skip_special_tokens):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("make", "token"),
    [
        (byte_level, byte_level().convert_tokens_to_ids("¢")), (byte_level, byte_level().eos_token_id),
        (byte_level, 10**6), (byte_fallback, 1 + 0x80), (byte_fallback, PIECES.index("▁") + 257),
        (python_bytes, 3 + 0x80), (word_piece, 22),
    ],
)  # fmt: skip
def test_cost_is_linear(make, token):
    """Of bytes that form no character, of tokens without text, of spaces and of U+FFFD."""
    count, counting = 4000, Counting(make())
    stream = IncrementalDetokenizer(counting, stop=("zz",))
    shown = shown_of(stream, [token] * count)
    assert counting.decoded < 200 * count
    assert "".join(shown) == make().decode([token] * count, skip_special_tokens=True)
    counting.decoded = 0
    assert stream.find_stop([token] * count) is None and counting.decoded < 20 * count


def test_spaces_behind_special_tokens_stay():
    end = byte_fallback().eos_token_id
    ids = [259, end, 259, end, end, 262]  # ▁a, ▁a, ▁b: the first token of a text has no space
    for cuts in ([], [2, 2], [6]):
        assert "".join(shown_of(IncrementalDetokenizer(byte_fallback()), ids, cuts)) == "a a b"
    shown = shown_of(IncrementalDetokenizer(byte_fallback(), skip_special_tokens=False), ids)
    assert shown == ["a", "<|end|>", " a", "<|end|>", "<|end|>", " b", ""]


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


class Stripping:
    """A tokenizer that leaves out the spaces at both ends."""

    def decode(self, ids, skip_special_tokens):
        return "".join("ab "[i] for i in ids).strip()


def test_spaces_that_do_not_show_yet_are_kept():
    ids = [2, 0, *[2] * 50, 1, 2]
    assert shown_of(IncrementalDetokenizer(Stripping()), ids, [1] * 54)[-3:] == [" " * 50 + "b", "", ""]


def test_special_tokens_are_no_text():
    stream = IncrementalDetokenizer(tokenizer())
    stream.push([tokenizer().eos_token_id])
    assert stream.take(final=True) == ""


stops_of = st.lists(
    st.lists(st.sampled_from([*"ab é🙂ou", *SPECIAL]), min_size=1, max_size=3).map("".join), min_size=1, max_size=3
)
special_ids = byte_level().all_special_ids


def first_stop(ids, stops):
    """The place in the text without special tokens of the first stop string in it or in the one with them, and it."""
    shown, full = (byte_level().decode(ids, skip_special_tokens=skip) for skip in (True, False))
    found = [(shown.find(stop), len(stop), stop) for stop in stops if stop in shown]
    for stop in stops:
        if stop in full and any(content in stop for content in SPECIAL):
            before = full[: full.find(stop)]
            for content in SPECIAL:
                before = before.replace(content, "")
            found.append((len(before), len(stop), stop))
    return min(found, default=None)


@settings(max_examples=300)
@given(st.lists(texts_of | st.sampled_from(SPECIAL), max_size=6), cuts_of, stops_of, st.booleans())
def test_a_stop_string_ends_the_text(parts, cuts, stops, include):
    """With special tokens in both; the stop string is that of a search in the whole text."""
    ids = byte_level().encode("".join(parts), add_special_tokens=False)
    stream, shown, used = IncrementalDetokenizer(byte_level(), tuple(stops), include), [], []
    for piece in pieces(ids, list(cuts)):
        found = stream.find_stop(piece)
        assert stream.stopped is None
        count, stop = found or (len(piece), None)
        assert 1 <= count <= len(piece)
        stream.push(piece[:count])
        assert stream.stopped == stop
        used += piece[:count]
        shown.append(stream.take())
        if stop:
            break
    told = "".join(shown) + stream.take(final=True)
    assert told == stream.text and stream.take(final=True) == stream.tail() == ""
    if stream.stopped is None:
        assert used == ids and told == byte_level().decode(ids, skip_special_tokens=True)
        assert first_stop(ids, stops) is None
        return
    at, _, stop = first_stop(used, stops)
    assert stop == stream.stopped
    assert told == byte_level().decode(used, skip_special_tokens=True)[:at] + (stop if include else "")
    assert first_stop(used[:-1], stops) is None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["<|role_end|>", "er<|role_end|>", "er<|role_end|><|endoftext|>"])
def test_a_special_token_stops(stop, include):
    """Though it is not in the text; only where it is one, alone or with the text around it."""
    ids = tokenizer().encode("Answ<role>er<|role_end|>!er<|role_end|><|endoftext|>?", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer(), (stop,), include)
    count, found = stream.find_stop(ids)
    upto = (
        "Answ<role>er<|role_end|>" if "<|endof" not in stop else "Answ<role>er<|role_end|>!er<|role_end|><|endoftext|>"
    )
    assert (found, tokenizer().decode(ids[:count])) == (stop, upto)
    told = "".join(shown_of(stream, ids))
    before = upto.removesuffix(stop).replace("<role>", "").replace("<|role_end|>", "")
    assert told == before + (stop if include else "") and stream.stopped == stop


def test_what_a_special_token_may_complete_is_held_back():
    """Also behind it, where the text alone looks like no stop string; the space ahead of it is no text."""
    end = byte_fallback().eos_token_id
    stream = IncrementalDetokenizer(byte_fallback(), ("b<|end|>ab",))
    assert shown_of(stream, [260, 261, end, 260, 261], [1] * 5) == ["a", "", "", "", "", ""]
    stream = IncrementalDetokenizer(byte_fallback(), ("b<|end|>ab",))
    assert shown_of(stream, [260, 261, end, 260, 260], [1] * 5) == ["a", "", "", "", "baa", ""]
    stream = IncrementalDetokenizer(word_piece(), ("<|end|>",))
    stream.push(word_piece().convert_tokens_to_ids(["it", "<|end|>", "do"]))
    assert stream.text == "it"


def test_text_of_special_tokens_that_are_not_shown_stops_nothing():
    ids = tokenizer().encode("a<|role_end|>b", add_special_tokens=False)
    for stop, skip, told in (("role", True, "ab"), ("role", False, "a<|"), ("ab", True, ""), ("ab", False, None)):
        stream = IncrementalDetokenizer(tokenizer(), (stop,), skip_special_tokens=skip)
        assert "".join(shown_of(stream, ids)) == ("a<|role_end|>b" if told is None else told)


def test_nothing_comes_behind_a_stop():
    ids = tokenizer().encode("ab🙂", add_special_tokens=False)
    stream = IncrementalDetokenizer(tokenizer(), ("b",))
    stream.push(ids[:-1])  # ends in the middle of a character
    stream.push(ids)
    assert stream.take(final=True) == stream.text == "a" and stream.find_stop(ids) is None


@pytest.mark.parametrize("stop", ["abc", "aab"])
def test_a_tail_that_may_become_a_stop_is_held_back(stop):
    stream, shown = IncrementalDetokenizer(tokenizer(), (stop,)), []
    for token in tokenizer().encode("aaab", add_special_tokens=False):
        stream.push([token])
        shown.append(stream.take())
    assert shown == {"abc": ["", "a", "a", ""], "aab": ["", "", "a", ""]}[stop]
    assert stream.take(final=True) == {"abc": "ab", "aab": ""}[stop]


def test_the_tail_needs_no_tokenizer():
    """For requests that end early: complete characters that were held back, in any state."""
    counting = Counting(tokenizer())
    stream = IncrementalDetokenizer(counting, ("ab<|role_end|>", "bc"))
    stream.push(tokenizer().encode("xab🙂", add_special_tokens=False)[:-1])
    before = stream.take(), counting.decoded
    assert (before[0], stream.tail(), stream.tail()) == ("x", "ab", "ab") and counting.decoded == before[1]


class Failing:
    """A tokenizer that fails at one of its calls."""

    def __init__(self, calls):
        self.calls = calls
        self.all_special_ids, self.all_special_tokens = byte_level().all_special_ids, byte_level().all_special_tokens

    def decode(self, ids, skip_special_tokens):
        self.calls -= 1
        if self.calls == 0:
            raise RuntimeError("no")
        return byte_level().decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_copy_goes_on_by_itself():
    """What fails in a copy leaves no trace: whichever call of the tokenizer it is, push and take can be done again."""
    ids = byte_level().encode("ab é<|end|>漢 🙂, z", add_special_tokens=False)
    whole, calls = byte_level().decode(ids, skip_special_tokens=True), 0
    failed = True
    while failed:
        calls, failed = calls + 1, False
        stream, shown = IncrementalDetokenizer(Failing(calls), ("zz", "a<|end|>")), ""
        for i, piece in enumerate([*pieces(ids, [2] * len(ids)), []]):
            for _ in range(2):
                trial = stream.copy()
                try:
                    trial.push(piece)
                    part = trial.take(final=not piece)
                except RuntimeError:
                    failed = True
                    continue
                stream, shown = trial, shown + part
                break
            assert stream is trial, i
        assert shown == stream.text == whole
    assert calls > 20
