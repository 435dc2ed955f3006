"""vLLM serves LLaDA2.0 and 2.1 checkpoints, once this package is installed beside it:

    vllm serve inclusionAI/LLaDA2.1-mini

vLLM calls `register` in each of its processes (entry point group vllm.general_plugins; VLLM_PLUGINS=llada2_fast loads
no other). It keeps its scheduler, its layers, its paged cache and its CUDA graphs; the refinement step is ours, on the
logits as they come: no softmax, no float32 copy and no sorted copy of [sequences, block, vocab] is ever made. Written
against vLLM 0.33 (Model Runner V2); beside any other version nothing but LLaDA2 changes, which is refused by name.

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

from dataclasses import dataclass

from ..versions import Host

ARCHITECTURE = "LLaDA2MoeModelLM"
HOST = Host("vLLM", "0.33")
_NETWORK = f"{__name__}.network:{ARCHITECTURE}"


def register():
    """Make vLLM know LLaDA2's architecture and config; imports no model code, doing it again is harmless.

    vLLM does not guard this call. Beside another version it logs one line, refuses LLaDA2 where it can, and raises
    nothing. Another version is one that says so, or one whose own files raise any Exception while what is to be changed
    is looked up; all of it is, before the first change. What a version served raises after that is our fault: raised.
    """
    version = "of an unknown version"
    try:
        import vllm

        version = str(getattr(vllm, "__version__", version))
        registry, register_model, hooks, configs = _tables()
        if not HOST.serves(version):
            if ARCHITECTURE not in getattr(registry, "models", ()):  # it has no LLaDA2 of its own
                register_model(ARCHITECTURE, _NETWORK)
                hooks[ARCHITECTURE] = Refusal(version)
            HOST.stand_back(version)
            return
    except Exception as error:  # only vLLM's own code runs in here, and another version's may raise anything
        HOST.stand_back(version, error)
        return

    from .config import CONFIG_CLASSES, ServingConfig

    register_model(ARCHITECTURE, _NETWORK)
    hooks[ARCHITECTURE] = ServingConfig
    configs.update(CONFIG_CLASSES)


def _tables():
    """vLLM's registry of networks, what adds to it, config hooks by architecture, config classes by model type."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    if not isinstance(MODELS_CONFIG_MAP, dict) or not isinstance(_CONFIG_REGISTRY, dict):
        raise TypeError("MODELS_CONFIG_MAP, _CONFIG_REGISTRY: expected two dicts")
    return ModelRegistry, ModelRegistry.register_model, MODELS_CONFIG_MAP, _CONFIG_REGISTRY


@dataclass(frozen=True)
class Refusal:
    """The hook for our architecture in a version of vLLM that has the tables and is not served."""

    version: str

    def verify_and_update_model_config(self, model_config):
        """RuntimeError naming the versions served and this one."""
        raise RuntimeError(HOST.refusal(self.version))

    verify_and_update_config = verify_and_update_model_config
