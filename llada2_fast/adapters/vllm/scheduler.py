"""vLLM's scheduler for asynchronous diffusion, held back at the end of the context.

There vLLM cuts the canvas of a request that has a step in flight by what that step may yet turn out to have sampled,
and two cut canvases in turn are never a whole block: the request would go on for ever.
"""


def cut_short(request, canvas_length, max_model_len):
    """The next canvas of a request would be cut because of a step in flight."""
    room = max_model_len - request.num_computed_tokens
    return request.num_output_placeholders > 0 and room < canvas_length


def __getattr__(name):
    """`LLaDA2Scheduler` is made when vLLM looks it up: its base class is vLLM's."""
    if name != "LLaDA2Scheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler

    class LLaDA2Scheduler(DiffusionAsyncScheduler):
        def schedule(self, throttle_prefills=False):
            for request in self.running:
                if cut_short(request, self.num_spec_tokens, self.max_model_len):
                    # schedule() counts its step before it looks at this: left out of this call alone
                    request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
            return super().schedule(throttle_prefills)

    LLaDA2Scheduler.__qualname__ = "LLaDA2Scheduler"
    globals()["LLaDA2Scheduler"] = LLaDA2Scheduler
    return LLaDA2Scheduler
