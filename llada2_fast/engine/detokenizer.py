"""Text of tokens that arrive bit by bit, and the stop strings that end it."""

from dataclasses import dataclass, field, replace

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of the first bytes of a character


@dataclass
class IncrementalDetokenizer:
    """text: all complete characters of the tokens pushed so far; what is taken from it is never taken back.

    A tail that may become a character, or a stop string, is held back until it is clear what it is.
    """

    tokenizer: object
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    text: str = ""
    sent: int = 0  # characters taken
    window: list[int] = field(default_factory=list)  # the last tokens: what follows is decoded behind them
    read: int = 0  # characters of the window's text that are in `text`

    def copy(self):
        return replace(self)

    def tail(self):
        taken = self.text[self.sent :]
        self.sent = len(self.text)
        return taken

    def find_stop(self, ids):
        count = self.tokens_to_stop(ids)
        if count is None:
            return None
        trial = self.copy()
        trial._append(ids)
        return count, next(s for s in self.stop if s in trial.text)

    def push(self, ids, stops=True):
        """The next tokens, a list of ints. If they complete a stop string the text ends where it begins."""
        at = self._stopped(ids) if stops else None
        self._append(ids)
        if at is not None:
            self.text, self.window, self.read = self.text[:at], [], 0

    def take(self, final=False):
        """The text that may be shown now and was not taken before; final: nothing more will come."""
        if final:
            self.text += self._decode(self.window)[self.read :]
            self.window, self.read = [], 0
        end = len(self.text) - (0 if final else self._held())
        taken = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return taken

    def tokens_to_stop(self, ids):
        """How many of the next ids complete a stop string; None if all of them do not."""
        if self._stopped(ids) is None:
            return None
        return next(count for count in range(1, len(ids) + 1) if self._stopped(ids[:count]) is not None)

    def _append(self, ids):
        window = self.window + ids
        decoded = self._decode(window)
        complete = decoded.rstrip(_INCOMPLETE)
        self.text += complete[self.read :]
        if complete == decoded and ids:
            self.window, self.read = ids, len(self._decode(ids))
        else:
            self.window, self.read = window, max(self.read, len(complete))

    def _decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _stopped(self, ids):
        """Where in the text the first stop string would begin if these ids were pushed, None if there were none."""
        if not self.stop:
            return None
        trial = replace(self)
        trial._append(ids)
        begin = max(0, len(self.text) - max(map(len, self.stop)) + 1)
        return min((at for at in (trial.text.find(stop, begin) for stop in self.stop) if at >= 0), default=None)

    def _held(self):
        """Length of the longest tail of the text that a stop string begins with."""
        longest = max(map(len, self.stop), default=1) - 1
        sizes = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self.text[-n:]) for stop in self.stop)), 0)
