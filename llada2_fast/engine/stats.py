"""What an engine has done and holds, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. Counts are since the engine was made.

    num_running, num_waiting: requests now.
    num_finished: by finish reason.
    num_preemptions: places given up for requests of a higher priority.
    num_steps: forwards, of whatever kind.
    prompt_tokens, generated_tokens, shared_tokens: of finished requests; shared ones were found in the cache.
    denoise_forwards: of finished requests, each counted for itself.
    num_pages, num_free_pages, num_idle_pages: of the cache; nobody holds a free one, and an idle one can be matched.
    num_evicted_pages: matchable pages given out again.
    """

    num_running: int
    num_waiting: int
    num_finished: dict[str, int]
    num_preemptions: int
    num_steps: int
    prompt_tokens: int
    generated_tokens: int
    shared_tokens: int
    denoise_forwards: int
    num_pages: int
    num_free_pages: int
    num_idle_pages: int
    num_evicted_pages: int

    @property
    def tokens_per_forward(self) -> float:
        """TPF of the finished requests."""
        return self.generated_tokens / max(1, self.denoise_forwards)
