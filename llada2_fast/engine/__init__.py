"""Many requests at once over one model, each with exactly the tokens it would get alone.

`Engine` for programs that step it themselves, `AsyncEngine` for servers. A rollout, with what RL and evaluation need:

    engine = Engine(model, EngineConfig(max_num_seqs=32), tokenizer)
    params = DecodeParams.preset("speed", gen_length=256, temperature=1.0, eos_early_stop=True)
    for output in engine.generate(prompts, params):
        output.token_ids, output.text, output.finish_reason
        output.logprobs                 # of each token when it was written, by a commit or an edit
        output.steps                    # the denoise forward that wrote it
        output.first_logprobs           # of what was committed first at its place
        output.edits                    # tokens that replaced others: position, old, new, step, confidence
        output.counters.denoise_forwards, output.tokens_per_forward
    engine.stats()                      # running, waiting, finished, pages, tokens per forward
    engine.update_weights(state)        # or weights_changed(): nothing old is found in the cache after it
"""

from .async_engine import AsyncEngine
from .engine import Engine
from .request import Event, QueueFull, Request, RequestOutput
from .stats import EngineStats

__all__ = ["AsyncEngine", "Engine", "EngineStats", "Event", "QueueFull", "Request", "RequestOutput"]
