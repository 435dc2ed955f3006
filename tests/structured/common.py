"""A small language world: a vocabulary, random regular expressions, and what fills a gap by the book."""

import functools
import random
import re

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llada2_fast.structured.automaton import TokenAutomaton
from llada2_fast.structured.compiler import Limits, token_dfa
from tests.engine.common import EOS, MASK, VOCAB

LIMITS = Limits(4096, 1000)
WORDS = ["a", "b", "c", "ab", "ca", "Ã©", "Ã", "©"]  # in the alphabet of byte-level tokens; the last three make an é
OTHER_EOS = 21
IDS = [*range(2, 2 + len(WORDS)), OTHER_EOS, EOS]  # what may stand in an answer
TEXTS = [None, None, b"a", b"b", b"c", b"ab", b"ca", "é".encode(), "é".encode()[:1], "é".encode()[1:]]
TEXTS += [None] * (VOCAB - len(TEXTS))


@functools.cache
def word_tokenizer(shift: int = 0):
    """The tokenizer of the vocabulary. shift: to ids that it does not have."""
    vocabulary = {word: at + shift for at, word in enumerate(WORDS, 2)} | {
        "<eos>": EOS,
        "<mask>": MASK,
        "<other>": OTHER_EOS,
    }
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", mask_token="<mask>", additional_special_tokens=["<other>"]
    )


def regex_of(rng: random.Random, depth: int = 3) -> str:
    """A random regular expression."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(["a", "b", "c", "é", "[ab]", "[^a]", ".", "ab"])
    if kind < 0.55:
        return regex_of(rng, depth - 1) + regex_of(rng, depth - 1)
    if kind < 0.75:
        return f"(?:{regex_of(rng, depth - 1)}|{regex_of(rng, depth - 1)})"
    return f"(?:{regex_of(rng, depth - 1)})" + rng.choice(["*", "+", "?", "{2}", "{0,2}", "{1,3}", "*?"])


def automaton(regex: str, eos_ids=(EOS, OTHER_EOS)) -> TokenAutomaton:
    return TokenAutomaton(token_dfa(regex, TEXTS, LIMITS), eos_ids)


def is_answer(regex: str, ids) -> bool:
    """Whether ids fill a gap: a text of the language, then maybe an EOS, and then the first EOS id until the end."""
    end = next((at for at, token in enumerate(ids) if token in (EOS, OTHER_EOS)), len(ids))
    if any(token != EOS for token in ids[end + 1 :]) or any(TEXTS[token] is None for token in ids[:end]):
        return False
    try:
        return re.fullmatch(regex, b"".join(TEXTS[token] for token in ids[:end]).decode()) is not None
    except UnicodeDecodeError:
        return False
