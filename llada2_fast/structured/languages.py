"""What an answer has to be, as DecodeParams says it -> an automaton over the tokens of a model, made once."""

import json
import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future

from ..kernels.refine import MAX_CLASSES
from .automaton import TokenAutomaton
from .compiler import Limits, TooLong, compile_tokens
from .schema import json_regex
from .syntax import unanchored
from .vocabulary import token_texts

KEPT = 32  # languages of a tokenizer that are not made again
_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~")  # characters that mean something in a regular expression


def _forget():
    """Nothing is known, and nobody is making anything: in the child of a fork, where others' threads are not."""
    global _kept, _lock, _making
    _kept = weakref.WeakKeyDictionary()  # tokenizer -> OrderedDict: key -> Future of an automaton or a ValueError
    _lock, _making = threading.Lock(), threading.BoundedSemaphore(2)  # one takes a core, and gigabytes at worst


_forget()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)


def automaton_of(params, tokenizer, eos_ids: tuple[int, ...], mask_id: int, vocab_size: int, max_states: int):
    """The TokenAutomaton of the language that the answers of some DecodeParams are in; None if they may be anything.

    params: of which regex, json_schema and choices are read.
    tokenizer: of transformers', with byte-level tokens.
    eos_ids: that end an answer; mask_id: which is in none.
    vocab_size: V, of the model.
    max_states: languages with more are refused.
    Raises ValueError for a language that cannot be had, before anything is done; ModuleNotFoundError without
    outlines-core. It may take seconds where the language is new, and none where it is known.
    """
    name = params.language
    if name is None:
        return None
    if tokenizer is None:
        raise ValueError(f"{name}: expected a tokenizer, which says what the model's tokens are")
    key = _key(params, eos_ids, mask_id, vocab_size, max_states)
    eos_ids = key[1]
    if not eos_ids:
        raise ValueError(f"{name}: expected EOS ids in the vocabulary, by which an answer ends")

    def make():
        texts = token_texts(tokenizer, vocab_size)
        texts[mask_id] = None
        text = next((token for token in eos_ids if texts[token] is not None), None)
        if text is not None:
            raise ValueError(f"eos_ids={eos_ids!r:.80}: expected none that is a text beside {name}, unlike {text}")
        try:
            with _making:
                dfa = compile_tokens(_pattern(params), texts, Limits(max_states, MAX_CLASSES - len(eos_ids)))
            return TokenAutomaton(dfa, eos_ids)
        except ValueError as error:
            value, why = getattr(params, name), str(error).removeprefix(f"{name}: ")
            raise ValueError(f"{name}={value!r:.80}: expected one that can be had, but {why}") from error

    return _remember(tokenizer, key, make)


def known_as(params, tokenizer, eos_ids: tuple[int, ...], mask_id: int, vocab_size: int, max_states: int):
    """(what a language is known by, whether automaton_of, with the same arguments, takes no time)."""
    if params.language is None or tokenizer is None:
        return None, True
    key = _key(params, eos_ids, mask_id, vocab_size, max_states)
    with _lock:
        future = _kept.get(tokenizer, {}).get(key)
    return key, future is not None and future.done()


def _key(params, eos_ids, mask_id, vocab_size, max_states):
    """What a language is known by, and cheap to tell of a schema, too."""
    name = params.language
    known = tuple(token for token in eos_ids if 0 <= token < vocab_size)
    return (name, json.dumps(getattr(params, name))), known, mask_id, vocab_size, max_states


def _pattern(params):
    if params.choices is not None:
        return "|".join(map(_escape, params.choices))
    return json_regex(params.json_schema) if params.regex is None else unanchored(params.regex)


def _escape(text):
    return "".join("\\" + one if one in _SPECIAL else one for one in text)


def _remember(tokenizer, key, make):
    """make(), once for all who ask for it now or later; that it is refused is remembered as well, unless another time
    might do."""
    mine = Future()
    try:
        with _lock:
            own = _kept.setdefault(tokenizer, OrderedDict())
            future = own.setdefault(key, mine)
            own.move_to_end(key)
            while len(own) > KEPT:
                own.popitem(last=False)
        if future is mine:
            try:
                future.set_result(make())
            except ValueError as error:
                if isinstance(error.__cause__, TooLong):
                    raise
                future.set_result(error)
    except BaseException as error:
        with _lock:
            if own.get(key) is mine:
                del own[key]
        mine.set_exception(error if isinstance(error, Exception) else RuntimeError("who was making it was interrupted"))
        raise
    made = future.result()
    if isinstance(made, ValueError):
        raise ValueError(*made.args)  # of its own, since each raise adds to an exception
    return made
