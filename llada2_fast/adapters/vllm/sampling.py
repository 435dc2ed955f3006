"""vLLM's SamplingParams as our DecodeParams: what is honoured, what is refused."""

from ...config import DecodeParams
from ...decoding.rules import refuse_checks

# extra_args (vllm_xargs over HTTP) that a request may have, all spelled as in DecodeParams. vLLM itself refuses its own
# `temperature` and `seed` for diffusion models, so they are carried here.
EXTRA_ARGS = (
    "threshold", "editing_threshold", "max_post_steps", "steps", "minimal_topk", "temperature", "seed", "policy",
    "entropy_bound", "entropy_decay",
)  # fmt: skip

# Attributes of SamplingParams that ask for what a block-wise sampler does not give, with their neutral values.
_NEUTRAL = {
    "logprobs": (None,), "prompt_logprobs": (None,), "logprob_token_ids": (None, []),
    "prompt_logprob_token_ids": (None,), "presence_penalty": (0.0,), "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,), "thinking_token_budget": (None,), "trace_decode_token_ids": (None, []),
}  # fmt: skip


def decode_params(sampling_params):
    """DecodeParams of a request; ValueError naming an argument of extra_args that is unknown or out of range."""
    extra = sampling_params.extra_args or {}
    unknown = sorted(extra.keys() - set(EXTRA_ARGS))
    if unknown:
        asked = f"{unknown[0]:.80}={extra[unknown[0]]!r:.80}"
        raise ValueError(f"extra_args: {asked}: expected one of {', '.join(EXTRA_ARGS)}")
    top_k = sampling_params.top_k
    params = DecodeParams(
        **extra, top_k=top_k if top_k > 0 else None, top_p=sampling_params.top_p, eos_early_stop=True
    )  # fmt: skip
    refuse_checks(params)
    return params


def check(sampling_params):
    """Refuse, by ValueError, what a request asks for and would not get."""
    params = decode_params(sampling_params)
    for name, neutral in _NEUTRAL.items():
        value = getattr(sampling_params, name)
        if not any(value is one or value == one for one in neutral):
            raise ValueError(f"{name}={value!r:.80}: expected {neutral[0]}: LLaDA2 blocks are not sampled with it")
    if sampling_params.n > 1 and (params.temperature == 0 or params.seed is not None):
        raise ValueError(f"n={sampling_params.n}: expected 1 without a temperature or with a seed: all would be equal")


def eos_ids(sampling_params):
    """The ids at which vLLM's scheduler stops this request, so that no block is refined behind them."""
    first = [] if sampling_params.eos_token_id is None else [sampling_params.eos_token_id]
    return list(dict.fromkeys([*first, *(sampling_params.stop_token_ids or ())]))
