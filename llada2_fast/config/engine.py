"""EngineConfig: how an Engine shares its model among requests."""

import math
from dataclasses import dataclass

from .checks import as_flag, as_float, as_int, check, put, renamed


@renamed(max_running="max_num_seqs", share_prefixes="enable_prefix_caching", prefill_tokens="max_num_batched_tokens")
@dataclass(frozen=True)
class EngineConfig:
    """How an Engine shares its model among requests; ValueError naming field, value and what is allowed.

    block_length: tokens of a block; None = the model's.
    max_num_seqs: rows decoded together, at most.
    max_waiting: requests that may wait for a place.
    cache_tokens: positions of K/V kept for prompts, generated blocks and shared prefixes.
    max_num_batched_tokens: prompt tokens that go along with one step, at most.
    enable_prefix_caching: requests use each other's committed blocks.
    priority_s: seconds of waiting that a unit of priority outweighs.
    max_eos_ids: EOS ids a request may have.
    mask_id: the mask token; None = the checkpoint's.
    trace: keep every commit and edit of requests that do not say themselves; None = unless there are graphs.
    graphs: replay each denoise step as a CUDA graph, on a GPU.
    capture: False does what the graphs would do launch by launch, on any device.
    overlap: with graphs, a step is launched before the last one's results are read, which come a step late.
    max_running, share_prefixes, prefill_tokens: older names of max_num_seqs, enable_prefix_caching and
        max_num_batched_tokens, taken with a DeprecationWarning.
    """

    block_length: int | None = None
    max_num_seqs: int = 16
    max_waiting: int = 1024
    cache_tokens: int = 65536
    max_num_batched_tokens: int = 512
    enable_prefix_caching: bool = True
    priority_s: float = 60.0
    max_eos_ids: int = 8
    mask_id: int | None = None
    trace: bool | None = None
    graphs: bool = False
    capture: bool = True
    overlap: bool = True

    def __post_init__(self):
        for name, low in (("block_length", 1), ("mask_id", 0)):
            if getattr(self, name) is not None:
                check(self, name, as_int, low)
        for name in ("max_num_seqs", "max_waiting", "cache_tokens", "max_num_batched_tokens", "max_eos_ids"):
            check(self, name, as_int, 1)
        if self.trace is None:
            put(self, "trace", not self.graphs)
        for name in ("enable_prefix_caching", "trace", "graphs", "capture", "overlap"):
            check(self, name, as_flag)
        check(self, "priority_s", as_float, ">= 0 and finite", lambda x: 0 <= x < math.inf)
