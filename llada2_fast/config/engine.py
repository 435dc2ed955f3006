"""EngineConfig: how an Engine shares its model among requests."""

import math
from dataclasses import dataclass

from .checks import as_flag, as_float, as_int, check, put


@dataclass(frozen=True)
class EngineConfig:
    """How an Engine shares its model among requests.

    `block_length` None = the model's; `max_running` rows are decoded together, `max_waiting` requests may wait for a
    place; `cache_tokens` of K/V are kept for prompts, generated blocks and shared prefixes; `prefill_tokens` prompt
    tokens at most go along with one step; `share_prefixes` lets requests use each other's committed blocks; a unit of
    priority outweighs `priority_s` seconds of waiting; a request has at most `max_eos_ids` EOS ids; `mask_id` None =
    the checkpoint's; `trace` records every commit and edit; `graphs` replays each denoise step as a CUDA graph, on a
    GPU. With graphs and without a trace a step is launched before the last one's results are read, which then come a
    step late; `trace` None = unless there are graphs."""

    block_length: int | None = None
    max_running: int = 16
    max_waiting: int = 1024
    cache_tokens: int = 65536
    prefill_tokens: int = 512
    share_prefixes: bool = True
    priority_s: float = 60.0
    max_eos_ids: int = 8
    mask_id: int | None = None
    trace: bool | None = None
    graphs: bool = False

    def __post_init__(self):
        for name, low in (("block_length", 1), ("mask_id", 0)):
            if getattr(self, name) is not None:
                check(self, name, as_int, low)
        for name in ("max_running", "max_waiting", "cache_tokens", "prefill_tokens", "max_eos_ids"):
            check(self, name, as_int, 1)
        if self.trace is None:
            put(self, "trace", not self.graphs)
        for name in ("share_prefixes", "trace", "graphs"):
            check(self, name, as_flag)
        check(self, "priority_s", as_float, ">= 0 and finite", lambda x: 0 <= x < math.inf)
