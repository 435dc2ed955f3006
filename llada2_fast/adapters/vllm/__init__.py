"""vLLM serves LLaDA2.0 and 2.1 checkpoints, once this package is installed beside it:

    vllm serve inclusionAI/LLaDA2.1-mini

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins; VLLM_PLUGINS=llada2_fast loads
no other). It keeps its scheduler, its layers, its paged cache and its CUDA graphs; the refinement step is ours, on the
logits as they come: no softmax, no float32 copy and no sorted copy of [sequences, block, vocab] is ever made. Written
against vLLM 0.33 (Model Runner V2).

A request's own parameters go into SamplingParams(extra_args={...}), over HTTP "vllm_xargs", spelled as in DecodeParams:
threshold, editing_threshold, max_post_steps, steps, minimal_topk, temperature, seed; top_k and top_p are vLLM's own.
Without a temperature the most likely token is taken. vLLM refuses its own `temperature` (but 1), `seed`, `min_p`,
`min_tokens`, `logit_bias`, `bad_words` and structured outputs for diffusion models; logprobs, penalties, vLLM's
diffusion_* arguments, unknown ones and values out of range are refused here: HTTP 400, by name.

Attention is block-causal and the block grid starts at the prompt's first token, as the models were trained; a block is
handed out when a forward has seen its final tokens, so prefix caching shares right keys and values. Two consequences:
`max_model_len` is a multiple of the block length, and prompts are prefilled whole (no chunked prefill; the token budget
is raised to the longest context plus a canvas per sequence). Of a prompt that ends inside the context's last block the
rest of that block is decoded over the prompt's keys and values as they were prefilled.

NOT RUN: no GPU was at hand, so vLLM as a whole has not served a token with this. Checked, against vLLM's own Python
files on a CPU (tests/hosts/test_vllm.py): registration, config, weight loading, the network's maths, the calls between
runner, state and sampler, the tokens. Not checked: CUDA graphs, torch.compile, tensor and expert parallelism, fp8
checkpoints, the attention backends' kernels, speed. Refused: LLaDA2.2, pipeline parallelism, speculative decoding.
"""

ARCHITECTURE = "LLaDA2MoeModelLM"


def register():
    """Make vLLM know LLaDA2's architecture and config; imports no model code, doing it again is harmless."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .config import CONFIG_CLASSES, ServingConfig

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.network:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServingConfig
    _CONFIG_REGISTRY.update(CONFIG_CLASSES)
