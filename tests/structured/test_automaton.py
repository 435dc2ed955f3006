"""Automata over tokens and the passes over a block, against brute force; compiling under limits."""

import itertools
import os
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_fast import demo
from llada2_fast.config import DecodeParams
from llada2_fast.decoding.guide import BlockGuide, gaps_of
from llada2_fast.structured import automaton_of
from llada2_fast.structured.compiler import Limits, byte_dfa, compile_tokens, token_dfa
from llada2_fast.structured.syntax import unanchored
from llada2_fast.structured.vocabulary import token_texts
from llada2_fast.weights.special_tokens import load_tokenizer
from tests.structured.common import EOS, IDS, LIMITS, MASK, OTHER_EOS, TEXTS, automaton, is_answer, regex_of

seeds = st.integers(0, 2**32)


def chosen(made, words):
    """By position the ids whose class is among the bits."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return [{token for token in IDS if row[made.classes[token]]} for row in bits]


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_a_block_allows_exactly_what_occurs_in_some_completion(seed):
    """Of gaps between given tokens that may go on behind the block, some of it committed."""
    rng = random.Random(seed)
    regex = regex_of(rng)
    try:
        made = automaton(regex)
    except ValueError:  # the tokens have no "d", say
        return
    length, room, prompt = rng.randint(1, 3), rng.randint(0, 1), rng.randint(0, 1)
    given_ids = [2] * prompt + [rng.choice([None, None, None, 3]) for _ in range(length - prompt)]
    total = length + room
    gaps = gaps_of(given_ids, total)
    whole = [
        [token for token in line]
        for line in itertools.product(*(([token] if token is not None else IDS) for token in given_ids + [None] * room))
        if all(is_answer(regex, line[gap.begin : gap.end]) for gap in gaps)
    ]
    if not whole:  # some gap is too small, which is refused before
        return
    tokens = [MASK if token is None else token for token in given_ids]
    guide = BlockGuide(made, gaps, [], tokens, MASK)
    while True:
        inside = [at for at in range(length) if given_ids[at] is None]
        found = chosen(made, guide.words(editing=False))
        expected = [{line[at] for line in whole} for at in range(length)]
        for at in inside:
            if guide.tokens[at] == MASK:
                assert found[at] == expected[at]
                assert (at in guide.forced()) == (len(expected[at]) == 1)
        open_ones = [at for at in inside if guide.tokens[at] == MASK]
        if not open_ones:
            break
        at = rng.choice(open_ones)
        token = rng.choice([*expected[at]] if rng.random() < 0.7 else IDS)
        assert guide.write(at, token) == (token in expected[at])
        if token in expected[at]:
            whole = [line for line in whole if line[at] == token]
        else:
            assert guide.tokens[at] == MASK


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 3))
def test_an_automaton_accepts_the_texts_that_the_expression_matches(seed, length):
    regex = regex_of(random.Random(seed))
    made = automaton(regex)
    for line in itertools.product(range(2, 10), repeat=length):
        states = made.start
        for token in line:
            states = made.after(states, int(made.classes[token]))
        assert bool(states & made.accept) == is_answer(regex, line)
    assert made.fewest == next(
        n for n in range(9) if any(is_answer(regex, line) for line in itertools.product((2, 3, 4, 5, 6, 7), repeat=n))
    )


def test_later_blocks_go_on_where_the_earlier_ended():
    made = automaton("a{5}b")
    gaps = gaps_of([], 8)
    second = BlockGuide(made, gaps, [2, 2, 2, 2], [MASK] * 4, MASK)
    assert chosen(made, second.words(editing=False)) == [{2, 5}, {3, EOS, OTHER_EOS}, {EOS, OTHER_EOS}, {EOS}]
    assert second.forced() == [3]
    assert second.write(1, 3) and second.forced() == [0, 3]


def test_an_edit_has_to_leave_a_completion():
    made = automaton("(?:ab|ba)c")
    guide = BlockGuide(made, gaps_of([], 3), [], [2, 3, MASK], MASK)
    assert not guide.write(0, 3)  # bb
    assert chosen(made, guide.words(editing=True))[:2] == [{2}, {3}]
    free = BlockGuide(automaton("[ab][ab]c"), gaps_of([], 3), [], [2, 3, MASK], MASK)
    assert free.write(0, 3) and free.tokens == [3, 3, MASK]


def test_what_nobody_constrains_is_free():
    """Positions behind the answer, where no gap is."""
    made = automaton("a")
    guide = BlockGuide(made, gaps_of([], 1), [], [MASK] * 2, MASK)
    assert (guide.words(editing=False)[1] == -1).all() and guide.forced() == [0] and guide.write(1, 4)


@pytest.mark.parametrize(
    "regex, says",
    [
        ("(", "DFA"), ("(?=a)b", "DFA"), (r"a\1", "DFA"), (r"\x00", "nothing"),
        ("[ab]*a[ab]{12}", "states, expected at most 4096"),
        ("(((a{100}){100}){100}){100}", "more than 10 s or 2048 MiB"),
    ],
)  # fmt: skip
def test_an_expression_that_cannot_be_had_is_refused(regex, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        compile_tokens(regex, TEXTS, LIMITS)


def test_what_the_tokens_cannot_say_is_refused():
    with pytest.raises(ValueError, match="cannot|no text of it"):
        automaton("xyz")


@pytest.mark.parametrize(
    "pattern, bare",
    [
        ("^a$", "a"), ("^a|^b", "a|b"), ("^a$|^b$", "a|b"), ("(?i)^(yes|no)$", "(?i)(yes|no)"), (r"\Aab\z", "ab"),
        ("^^a$$", "a"), ("a|b$", "a|b"), (r"a\$", r"a\$"), (r"\^a", r"\^a"), ("[$]", "[$]"), ("[^$]", "[^$]"),
        (r"[\]$]", r"[\]$]"), ("[]$]", "[]$]"), ("[a[$]b]$", "[a[$]b]"), (r"\\$", r"\\"), ("[)]", "[)]"),
        (r"\)", r"\)"), ("^", ""), (r"\(?x:1", r"\(?x:1"), ("[(?x)]a", "[(?x)]a"),
    ],
)  # fmt: skip
def test_anchors_on_the_sides_mean_nothing(pattern, bare):
    assert unanchored(pattern) == bare


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("(^a|b)c", "an anchor, '^', inside"), ("^(a|b$)", "an anchor, '$', inside"), ("a^b", "inside"),
        ("a$b", "inside"), (r"a\zb", "inside"), ("a)(?:b", "closed"), (r"[\])]a)", "closed"),
        ("(?x) a b # hi", "flag x"), ("a(?ix:b)", "flag x"),
    ],
)  # fmt: skip
def test_what_would_mean_something_else_inside_is_refused(pattern, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        unanchored(pattern)


def test_the_library_leaves_nothing_out():
    """It finds the first of several alternatives, and drops what goes on behind a match, unless it has to go on."""
    for regex, text in (("a|ab", b"ab"), ("a(?:ba)*", b"ababa"), ("(?:a|ab)c?", b"abc")):
        dfa = byte_dfa(regex, 100)
        state = dfa.start
        for byte in text:
            state = dfa.after[state, byte]
        assert dfa.accepts[state]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


def test_texts_of_tokens_are_what_they_decode_to(tokenizer):
    texts = token_texts(tokenizer, len(tokenizer) + 3)
    assert len(texts) == len(tokenizer) + 3 and texts[-1] is None
    for special in tokenizer.all_special_ids:
        assert texts[special] is None
    ids = tokenizer("Ada is 7 — é", add_special_tokens=False)["input_ids"]
    assert b"".join(texts[token] for token in ids).decode() == "Ada is 7 — é"


def test_a_language_is_made_once_for_all_who_ask(tokenizer):
    params, found = DecodeParams(regex="[0-9]{1,3} cats"), []

    def ask():
        found.append(automaton_of(params, tokenizer, (tokenizer.eos_token_id,), MASK, len(tokenizer), 4096))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one is found[0] for one in found)


def accepted(tokenizer, texts, **language):
    """Those of some texts that are in a language."""
    eos_ids = (tokenizer.eos_token_id,)
    made = automaton_of(DecodeParams(**language), tokenizer, eos_ids, tokenizer.mask_token_id, len(tokenizer), 4096)

    def accepts(text):
        states = made.start
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            states = made.after(states, int(made.classes[token]))
        return bool(states & made.accept)

    return [text for text in texts if accepts(text)]


def test_choices_are_literal(tokenizer):
    choices = ["a.b", "(x)", "[-]#&~^", "$"]
    assert accepted(tokenizer, [*choices, "acb", "x", "a."], choices=choices) == choices


def test_an_end_that_is_a_text_is_refused(tokenizer):
    (token,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="expected none that is a text beside regex"):
        automaton_of(DecodeParams(regex="7+"), tokenizer, (token,), MASK, len(tokenizer), 4096)


def test_the_mask_is_in_no_language(tokenizer):
    (token,) = tokenizer("7", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="no text of it can be made"):
        automaton_of(DecodeParams(regex="7"), tokenizer, (tokenizer.eos_token_id,), token, len(tokenizer), 4096)


def test_a_refusal_is_remembered(tokenizer):
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            automaton_of(DecodeParams(regex="(((b{100}){100}){100}){100}"), tokenizer, (0,), MASK, len(tokenizer), 4096)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1]) and errors[0] is not errors[1]


def test_a_fork_makes_its_own_languages(tokenizer):
    """What another thread was making there nobody makes."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    child = "\n".join([
        "import os, threading, time, signal",
        "from llada2_fast import demo, DecodeParams",
        "from llada2_fast.structured import automaton_of, languages",
        "from llada2_fast.weights.special_tokens import load_tokenizer",
        "tokenizer = load_tokenizer(demo.path())",
        "ask = lambda: automaton_of(DecodeParams(regex='[0-9]+'), tokenizer, (0,), 1, 300, 4096)",
        "threading.Thread(target=ask, daemon=True).start()",
        "while not languages._kept: time.sleep(0.001)",
        "pid = os.fork()",
        "if pid == 0:",
        "    signal.alarm(30)",
        "    os._exit(int(ask().fewest != 1))",
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
    ])  # fmt: skip
    assert subprocess.run([sys.executable, "-c", child], timeout=120).returncode == 0


def test_large_automata_are_refused_by_what_a_step_of_theirs_costs():
    texts = [None] * 20 + [bytes([97 + i % 26, 97 + i // 26 % 26]) for i in range(676)]
    words = "|".join(text.decode() + "x" * (i % 40) for i, text in enumerate(texts[20:]))
    with pytest.raises(ValueError, match=r"states tell more than \d+ classes of tokens apart"):
        token_dfa(words, texts, Limits(30_000, 4000))
