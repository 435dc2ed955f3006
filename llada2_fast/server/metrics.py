"""What Prometheus is told: the engine's counts when it asks, and how long requests that have ended have taken."""

from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..engine import Request

FINISH_REASONS = ("eos", "length", "stop", "deadline", "cancelled", "error")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TPF = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)


class Metrics:
    """One server's, in a registry of its own. All of them are there from the start on."""

    def __init__(self, block_length: int):
        self.block_length, self.registry, self.stats, self.warm_up = block_length, CollectorRegistry(), None, None
        self.registry.register(self)

        def counter(name, text, labels=()):
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name, text, buckets=SECONDS):
            return Histogram(f"llada2:{name}", text, buckets=buckets, registry=self.registry)

        self.first_block = histogram("time_to_first_block_seconds", "from a request's arrival to its first block")
        self.inter_block = histogram("inter_block_seconds", "between two blocks of a request")
        self.end_to_end = histogram("e2e_request_latency_seconds", "from a request's arrival to its end")
        self.queue = histogram("request_queue_time_seconds", "from a request's arrival to its place")
        self.tokens_per_forward = histogram("tokens_per_forward", "of a request: tokens of its answer a forward", TPF)
        self.responses = counter("llada2:http_responses", "HTTP responses", ("route", "status"))
        # As vLLM counts them, for its dashboards and `vllm bench serve`: a block takes one more step there, which
        # commits it, and counts with all its positions, also those of the prompt and behind the answer's end.
        steps, canvas = "vllm:diffusion_num_denoising_steps", "vllm:diffusion_num_canvas_positions"
        self.steps = counter(steps, "denoise forwards of each request's own, and one for each of its blocks")
        self.positions = counter(canvas, "positions in those steps, a whole block in each")
        self.committed = counter("vllm:diffusion_num_committed_tokens", "positions of blocks that have ended")

    def observe(self, request: Request):
        """A request that has ended, by whatever."""
        output, events = request.output, [entry.event for entry in request.log if entry.event is not None]
        forwards, tokens = output.counters.denoise_forwards, len(output.token_ids)
        blocks = len(output.counters.forwards_per_block)
        self.steps.inc(forwards + blocks)
        self.positions.inc((forwards + blocks) * self.block_length)
        self.committed.inc(blocks * self.block_length)
        if output.finish_reason in ("cancelled", "error"):
            return
        times = [event.time for event in events if event.kind == "commit"]
        for first in times[:1]:
            self.first_block.observe(first - request.arrived)
        for before, after in pairwise(times):
            self.inter_block.observe(after - before)
        self.end_to_end.observe(events[-1].time - request.arrived)
        self.queue.observe(output.queue_s)
        if tokens:
            self.tokens_per_forward.observe(tokens / max(1, forwards))

    def begin(self, stats):
        """Count from here on. stats: EngineStats."""
        self.warm_up = stats

    def text(self, stats) -> bytes:
        """Everything in Prometheus' format. stats: EngineStats."""
        self.stats = stats
        return generate_latest(self.registry)

    def collect(self):
        """The engine's numbers, for prometheus_client."""
        stats = self.stats
        if stats is None:  # while it registers
            return
        in_use = stats.num_pages - stats.num_free_pages
        for name, text, value in (
            ("num_requests_running", "requests that have a place", stats.num_running),
            ("num_requests_waiting", "requests that wait for one", stats.num_waiting),
            ("kv_cache_usage_perc", "share of the cache's pages in use, 1 = all", in_use / stats.num_pages),
            ("num_pages_used", "pages of the cache in use", in_use),
            ("num_pages_reusable", "pages not in use whose blocks can be found again", stats.num_idle_pages),
        ):
            yield GaugeMetricFamily(f"llada2:{name}", text, value)
        for name, text, of in (
            ("prompt_tokens", "tokens of finished requests' prompts", "prompt_tokens"),
            ("generation_tokens", "tokens of finished requests' answers", "generated_tokens"),
            ("cached_tokens", "prompt tokens of finished requests that were found in the cache", "shared_tokens"),
            ("denoise_forwards", "of finished requests, each counted for itself", "denoise_forwards"),
            ("engine_steps", "forwards of whatever kind, of all rows together", "num_steps"),
            ("num_preemptions", "places given up for requests of a higher priority", "num_preemptions"),
            ("evicted_pages", "reusable pages given out again", "num_evicted_pages"),
        ):
            yield CounterMetricFamily(f"llada2:{name}", text, getattr(stats, of) - getattr(self.warm_up, of, 0))
        finished = CounterMetricFamily("llada2:requests", "requests that have ended", labels=["finish_reason"])
        for reason in FINISH_REASONS:
            before = self.warm_up.num_finished.get(reason, 0) if self.warm_up else 0
            finished.add_metric([reason], stats.num_finished.get(reason, 0) - before)
        yield finished
