"""EngineConfig: how an Engine shares its model among requests."""

import math
from dataclasses import dataclass

from .checks import as_flag, as_float, as_int, check, described, doc, put, renamed
from .decoding import CHECK_PAGES
from .languages import MAX_STATES


@renamed(max_running="max_num_seqs", share_prefixes="enable_prefix_caching", prefill_tokens="max_num_batched_tokens")
@described
@dataclass(frozen=True)
class EngineConfig:
    """How an Engine shares its model among requests; ValueError naming field, value and what is allowed.

    max_running, share_prefixes, prefill_tokens: older names of max_num_seqs, enable_prefix_caching and
        max_num_batched_tokens, taken with a DeprecationWarning.
    """

    block_length: int | None = doc(None, "tokens of a diffusion block; the checkpoint's unless given")
    max_num_seqs: int = doc(16, "rows decoded together, at most")
    max_waiting: int = doc(1024, "requests that may wait for a place")
    cache_tokens: int = doc(65536, "positions of K/V kept for prompts, generated blocks and shared prefixes")
    max_num_batched_tokens: int = doc(512, "prompt tokens that go along with one step, at most")
    enable_prefix_caching: bool = doc(True, "requests use each other's committed blocks")
    priority_s: float = doc(60.0, "seconds of waiting that a unit of priority outweighs")
    max_eos_ids: int = doc(8, "EOS ids a request may have")
    max_states: int = doc(MAX_STATES, "states that the automaton of a regex, a json_schema or choices may have")
    mask_id: int | None = doc(None, "the mask token; the checkpoint's unless given")
    trace: bool | None = doc(
        None, "keep every commit and edit of requests that do not say themselves; unless there are graphs, if not given"
    )
    graphs: bool = doc(False, "replay each denoise step as a CUDA graph, on a GPU")
    capture: bool = doc(True, "False does what the graphs would do launch by launch, on any device")
    overlap: bool = doc(
        True,
        "with graphs, a step is launched before the last one's results are read, which come a step late; a row in a "
        "language, with an edit_window or of policy self_speculative takes part in every second step then",
    )

    def __post_init__(self):
        for name, low in (("block_length", 1), ("mask_id", 0)):
            if getattr(self, name) is not None:
                check(self, name, as_int, low)
        for name in ("max_num_seqs", "max_waiting", "cache_tokens", "max_num_batched_tokens", "max_eos_ids"):
            check(self, name, as_int, 1)
        check(self, "max_states", as_int, 1, 30_000)
        if self.trace is None:
            put(self, "trace", not self.graphs)
        for name in ("enable_prefix_caching", "trace", "graphs", "capture", "overlap"):
            check(self, name, as_flag)
        check(self, "priority_s", as_float, ">= 0 and finite", lambda x: 0 <= x < math.inf)


def room_for(lengths, block_length: int, together: int, edit_window: int = 0, checks: bool = False) -> int:
    """cache_tokens with which the `together` longest of sequences fit at once, and any of them.

    lengths: tokens of each, prompt and answer.
    edit_window: the largest of theirs.
    checks: drafts of some of them are checked (policy self_speculative).
    """
    blocks = sorted((-(-length // block_length) for length in lengths), reverse=True)
    scratch = [scratch_pages(min(edit_window, count - 1), checks) for count in blocks]
    return block_length * max(1, sum(blocks[:together]) + sum(scratch[:together]))


def scratch_pages(edit_window: int, checks: bool) -> int:
    """Pages that a sequence needs beside those of its blocks, as of room_for; edit_window: no more than it can have."""
    return max(edit_window + 1 if edit_window else 0, CHECK_PAGES * checks)


def longest(num_pages: int, block_length: int, edit_window: int = 0, checks: bool = False) -> int:
    """Tokens of the longest sequence, prompt and answer, that so many pages hold; 0 if none. edit_window, checks: its
    own, as of room_for."""
    if checks:
        pages = max(0, num_pages - CHECK_PAGES)
    elif edit_window:  # a window has no more blocks than its sequence, and one of a block alone is none
        pages = max(num_pages - edit_window - 1, num_pages // 2, min(num_pages, 1))
    else:
        pages = num_pages
    return block_length * pages
