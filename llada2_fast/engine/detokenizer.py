"""Text of tokens that arrive bit by bit, and the stop strings that end it."""

import copy
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from itertools import groupby

_CHARACTER = 3  # bytes, and so tokens, of an unfinished UTF-8 character at most
_PENDING = 24  # tokens that may wait for the rest of a character before they are taken for broken
_CONTEXT = 16  # the last of them: 3 unfinished characters are 9 bytes at most, 3 more tell where a character begins
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that form no character, or none yet
_UNFINISHED = re.compile(rf"{_BROKEN}{{1,3}}\Z")
# where transformers cleans up spaces: what " .", " ' ", " n't", " 've" and the like begin with, too
_UNFINISHED_OR_UNCLEAN = re.compile(rf"(?:{_BROKEN}{{1,3}}| ?n? ?'[vr]?| ?n| )\Z")


@dataclass
class IncrementalDetokenizer:
    """text: all complete characters of the tokens pushed so far; what is taken from it is never taken back.

    A tail that may become a character, or a stop string, is held back until it is clear what it is. All pieces together
    are ``tokenizer.decode`` of all tokens, however they were cut, except where decode changes its mind late:
    - Byte fallback writes U+FFFD for every byte in a row of bytes that are not all characters. Characters that were out
      before a broken byte came, or that come by themselves after it, are characters here. Where ids that the tokenizer
      does not know follow a U+FFFD in bytes, bytes right behind them may be U+FFFD instead of characters.
    - Clean-up of spaces: more than 24 quotes in a row may have other spaces.

    tokenizer: any object with ``decode(ids, skip_special_tokens=...)``. Where it has them, ``all_special_ids``,
        ``all_special_tokens`` and ``added_tokens_decoder`` say which tokens are special.
    stop: strings that end the text. One that has a special token in it is looked for in the text with special tokens.
    include_stop: the text ends after the stop string, else before it.
    skip_special_tokens: special tokens are no text.
    stopped: the stop string that has ended the text, None if none has.
    """

    tokenizer: object
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    text: str = field(default="", init=False)
    stopped: str | None = field(default=None, init=False)

    # every value below is replaced, never changed: a shallow copy is a copy
    def __post_init__(self):
        self._sent = 0  # characters taken
        special = _special_tokens(self.tokenizer) if self.skip_special_tokens else {}
        self._shown = _Decoded(self.tokenizer, self.skip_special_tokens, frozenset(special))
        self._stop_in_full = tuple(s for s in self.stop if any(content in s for content in special.values()))
        self._full = _Decoded(self.tokenizer, False)  # with special tokens, where a stop string has one
        self._marks = ((0, 0),)  # lengths of both texts where a special token begins or ends

    def copy(self) -> "IncrementalDetokenizer":
        """One in the same state that goes on by itself. Cheap: no text and no tokens are copied."""
        return copy.copy(self)

    def push(self, ids: list[int], stops: bool = True):
        """The next tokens. If they complete a stop string the text ends there, and nothing comes after it.

        stops: False = no stop string counts in these tokens. Else, of several that they complete, the one that begins
            first in the text, of those at one place the shortest.
        """
        if self.stopped is not None:
            return
        shown, full, marks = self._shown, self._full, self._marks
        if not self._stop_in_full:
            return self._go_on(shown.push(ids), full, marks, stops)
        for _, some in groupby(ids, shown.special.__contains__):
            some = list(some)
            shown, full = shown.push(some), full.push(some)
            marks += ((len(full.text), len(shown.text)),)
        self._go_on(shown, full, marks, stops)

    def take(self, final: bool = False, stops: bool = True) -> str:
        """The text that may be shown now and was not taken before; final: nothing more will come; stops: as of push."""
        if final and self.stopped is None:
            shown, full = self._shown.finish(), self._full.finish()
            self._go_on(shown, full, (*self._marks, (len(full.text), len(shown.text))), stops)
        end = len(self.text)
        if not final and self.stopped is None:
            in_full = self._in_shown(len(self._full.text) - _begun(self._full.text, self._stop_in_full), self._marks)
            end = min(end - _begun(self.text, self.stop), in_full if self._stop_in_full else end)
        taken = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return taken

    def tail(self) -> str:
        """The rest of `text`: what may be a stop string and was held back for that. Takes nothing, decodes nothing."""
        return self.text[self._sent :]

    def find_stop(self, ids: list[int]) -> tuple[int, str] | None:
        """How many of the next tokens complete a stop string, and which one; None if all of them do not.

        The first stop string in the text: as few tokens as complete any, then `push`'s choice among those.
        """

        def found(count):
            trial = self.copy()
            trial.push(ids[:count])
            return trial.stopped

        if not self.stop or self.stopped is not None or found(len(ids)) is None:
            return None
        counts = range(1, len(ids) + 1)
        count = counts[bisect_left(counts, True, hi=len(ids) - 1, key=lambda count: found(count) is not None)]
        return count, found(count)

    def _go_on(self, shown, full, marks, stops=True):
        """Take over what has been decoded, up to the first stop string in it."""
        longest = max(map(len, self.stop), default=1) - 1
        found = [(_find(stop, self._shown.text, shown.text), stop) for stop in self.stop if stops]
        for stop in self._stop_in_full if stops else ():
            at = _find(stop, self._full.text, full.text)
            found.append((at if at < 0 else self._in_shown(at, marks), stop))
        at, _, stop = min(((at, len(stop), stop) for at, stop in found if at >= 0), default=(None, 0, None))
        keep = bisect_right(marks, len(full.text) - longest, key=lambda mark: mark[0]) - 1
        self._shown, self._full, self._marks = shown, full, marks[max(0, keep) :]
        self.text = shown.text if stop is None else shown.text[:at] + (stop if self.include_stop else "")
        self.stopped = stop

    def _in_shown(self, at, marks):
        """The place in the shown text of a place in the text with special tokens."""
        i = bisect_right(marks, at, key=lambda mark: mark[0]) - 1
        full, shown = marks[i]
        return min(shown + at - full, marks[min(i + 1, len(marks) - 1)][1])


@dataclass(frozen=True)
class _Decoded:
    """The text of tokens that arrive bit by bit; `push` and `finish` return the next value.

    Decodes a window of the last tokens and takes what is new in it. `tokenizers.decoders.DecodeStream` does that, too,
    but raises where byte fallback takes a character back, keeps bytes that form no character in its window for ever,
    and knows neither tokenizers in Python nor transformers' clean-up of spaces.
    """

    tokenizer: object
    skip_special_tokens: bool
    special: frozenset[int] = frozenset()  # tokens that may be skipped
    text: str = ""
    window: tuple[int, ...] = ()
    seen: str = ""  # the window's text so far as it is in `text`
    context: int = 0  # tokens the window begins with whose text is complete
    context_seen: int = 0  # characters of that text

    def push(self, ids):
        ids = tuple(token for token in ids if token not in self.special or self._decode((token,)))
        if not ids:
            return self
        window = self.window + ids
        decoded = text = self._decode(window)
        unfinished = self._unfinished(decoded)
        # byte fallback hides complete characters ahead of an incomplete one: look without the last tokens, too
        for end in range(len(window), max(self.context, len(window) - _CHARACTER) - 1, -1):
            before = self._decode(window[: end - 1]) if self._unfinished(text) else ""
            # a text gets shorter where bytes become a real U+FFFD
            complete = not self._unfinished(text) or len(text) < len(before)
            if complete and text.startswith(self.seen):
                return self._settled(window, end, text, decoded)._shortened()
            text = before
        if not decoded.startswith(self.seen) and self.context:
            return self._without_context().push(ids)
        for size in range(1, min(_CHARACTER + 1, len(window) - 1) + 1):  # a character that earlier bytes have broken?
            seen = self._decode(window[-size:])
            if unfinished and seen and not self._unfinished(seen):
                text = self.text + self._decode(window[:-size])[len(self.seen) :] + seen
                return replace(self, text=text, window=window[-size:], seen=seen, context=size, context_seen=len(seen))
        seen = decoded[: max(len(self.seen), len(decoded) - unfinished)]
        text = self.text + seen[len(self.seen) :]
        return replace(self, text=text, window=window, seen=seen)._shortened()

    def finish(self):
        """Nothing more will come: what is unfinished is text as it is."""
        decoded = self._decode(self.window)
        if not decoded.startswith(self.seen) and self.context:
            return self._without_context().finish()
        return replace(self, window=(), seen="", context=0, context_seen=0, text=self.text + decoded[len(self.seen) :])

    def _settled(self, window, end, text, decoded):
        """The next value where the window's tokens before `end` give `text`, which is complete, and all give `decoded`:
        the tokens that are complete since the last such place are the context of what follows."""
        seen = text
        if decoded.startswith(text) and not decoded.startswith(_BROKEN, len(text)):
            seen = decoded[: max(len(text), len(decoded) - self._unfinished(decoded))]
        after = replace(self, text=self.text + seen[len(self.seen) :], window=window, seen=seen)
        context = self._decode(window[self.context : end])
        if not context:  # the first token that has text often lacks the space it has behind others: keep one before it
            return after
        return replace(
            after, window=window[self.context :], seen=context + seen[len(text) :], context=end - self.context,
            context_seen=len(context),
        )  # fmt: skip

    def _without_context(self):
        """Byte fallback makes a complete character U+FFFD when a broken byte follows; it is out, so leave it alone."""
        window, seen = self.window[self.context :], self.seen[self.context_seen :]
        return replace(self, window=window, seen=seen, context=0, context_seen=0)

    def _shortened(self):
        """The same with a window of bounded length, so that all pushes together cost what the tokens are."""
        pending = self.window[self.context :]
        if len(pending) <= _PENDING:
            return self
        twice = self._decode(self.window + self.window)
        silent = {  # without text, also between others, where a space has some that was taken off at the end
            token
            for token in set(pending[:-_CHARACTER])
            if not self._decode((token,)) and self._decode((*self.window, token, *self.window)) == twice
        }
        told = tuple(token for token in pending[:-_CHARACTER] if token not in silent) + pending[-_CHARACTER:]
        window = self.window[: self.context] + told
        unfinished = self._decode(window)[len(self.seen) :]
        if len(told) <= _PENDING or not unfinished:
            return replace(self, window=window)
        window = window[-_CONTEXT:]
        seen = self._decode(window)[: -len(unfinished)]
        return replace(self, window=window, seen=seen, context=len(window) - _CHARACTER, context_seen=len(seen))

    def _decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=self.skip_special_tokens) if ids else ""

    def _unfinished(self, text):
        """How many characters at the end of the text the next tokens may change."""
        cleans = getattr(self.tokenizer, "clean_up_tokenization_spaces", False)
        found = (_UNFINISHED_OR_UNCLEAN if cleans else _UNFINISHED).search(text)
        return len(found[0]) if found else 0


def _special_tokens(tokenizer):
    """Ids and texts of the tokens that may be special; which of them decode leaves out differs by kind of tokenizer."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = zip(getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "all_special_tokens", ()), strict=True)
    return {**{i: token.content for i, token in added.items() if token.special}, **dict(named)}


def _find(stop, before, text):
    """Where in the text, which was `before` until now, a stop string is that is complete only now; -1: nowhere."""
    return text.find(stop, max(0, len(before) - len(stop) + 1))


def _begun(text, stops):
    """Length of the longest tail of the text that a stop string begins with."""
    longest = 0
    for stop in stops:
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1)
        longest = max(longest, len(text) - at if at >= 0 else 0)
    return longest
