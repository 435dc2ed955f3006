"""Refuses requests in vLLM's front end, where a refusal is that request's HTTP 400 and not the end of the engine.

vLLM asks its custom logits processors about every request's parameters; `RequestCheck` is one that only does that.
"""

from .sampling import check


def __getattr__(name):
    """`RequestCheck` is made when vLLM looks it up: its base class is vLLM's."""
    if name != "RequestCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class RequestCheck(LogitsProcessor):
        """Changes no logits: refuses, by ValueError, parameters that a LLaDA2 request would not get."""

        @classmethod
        def validate_params(cls, sampling_params):
            check(sampling_params)

        def add_request(self, req_idx, sampling_params):
            return False

        def apply(self, logits, ctx):
            return logits

    RequestCheck.__qualname__ = "RequestCheck"  # so that it can be found by name, as pickle does
    globals()["RequestCheck"] = RequestCheck
    return RequestCheck
