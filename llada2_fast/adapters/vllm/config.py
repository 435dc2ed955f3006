"""What vLLM reads from the checkpoint's config, and what its own config must be to serve LLaDA2."""

from ...config import ModelConfig
from ...decoding.inputs import EDIT_IDS
from ..transformers.config import CONFIGS

MAX_NUM_SEQS = 64  # where the user names no number: a step's logits are [sequences x block, vocab] in the model's dtype


class _Canvas:
    @property
    def canvas_length(self):
        """vLLM takes a model for a diffusion model if its config has this: the block length."""
        return getattr(self, "block_size", None) or ModelConfig.block_size


# transformers' config classes of this package, by model type, with vLLM's attribute
CONFIG_CLASSES = {
    config_class.model_type: type(config_class.__name__, (_Canvas, config_class), {"__module__": __name__})
    for config_class in CONFIGS
}
globals().update({config_class.__name__: config_class for config_class in CONFIG_CLASSES.values()})  # for pickle


class ServingConfig:
    """vLLM's hook for one architecture (VerifyAndUpdateConfig)."""

    @staticmethod
    def verify_and_update_model_config(model_config):
        """Checks config.json: ValueError naming key, value and what is allowed."""
        own = model_config.hf_config.to_model_config()
        for name in ("expert_capacity", *EDIT_IDS):
            value = getattr(own, name)
            if value is not None:
                raise ValueError(f"{name}={value}: expected none: LLaDA2.2 is not served by vLLM")

    @classmethod
    def verify_and_update_config(cls, vllm_config):
        """Settings without which tokens would be wrong: made where the user left them open, else refused."""
        from vllm.config.diffusion import DiffusionConfig
        from vllm.config.scheduler import SchedulerConfig

        model, cache = vllm_config.model_config, vllm_config.cache_config
        scheduler = vllm_config.scheduler_config
        cls.verify_and_update_model_config(model)
        length = model.hf_config.canvas_length
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=length)
        _expect("canvas_length", vllm_config.diffusion_config.canvas_length, length, "the checkpoint's block length")
        _expect("max_denoising_steps", vllm_config.diffusion_config.max_denoising_steps, None, "`steps` is a request's")
        if model.max_model_len % length:
            raise ValueError(f"max_model_len={model.max_model_len}: expected a multiple of the block length {length}")

        # Keys and values of a position depend on its whole block: pages are shared between requests by whole blocks,
        if cache.enable_prefix_caching and not cache.user_specified_block_size:
            cache.block_size, cache.user_specified_block_size = max(length, cache.block_size), True
        if cache.enable_prefix_caching and cache.block_size % length:
            raise ValueError(f"block_size={cache.block_size}: expected a multiple of {length}, or no prefix caching")
        if cache.enable_prefix_caching and cache.prefix_match_unit not in (None, cache.block_size):
            raise ValueError(f"prefix_match_unit={cache.prefix_match_unit}: expected None or {cache.block_size}")
        # and a prompt is not cut: a chunk could end inside a block.
        if scheduler.max_num_seqs >= SchedulerConfig.DEFAULT_MAX_NUM_SEQS:
            scheduler.max_num_seqs = MAX_NUM_SEQS
        scheduler.enable_chunked_prefill = False
        _expect("scheduler_cls", scheduler.scheduler_cls, None, "LLaDA2 is scheduled by its own class")
        if scheduler.async_scheduling is not False:
            scheduler.scheduler_cls = "llada2_fast.adapters.vllm.scheduler.LLaDA2Scheduler"
        _expect("long_prefill_token_threshold", scheduler.long_prefill_token_threshold, 0, "prompts are not cut")
        least = model.max_model_len + scheduler.max_num_seqs * length
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, least)

        vllm_config.attention_config.use_non_causal = True
        # vLLM refuses any temperature but 1 for a diffusion model; a request's own one is in its extra_args.
        model.override_generation_config.setdefault("temperature", None)
        check = "llada2_fast.adapters.vllm.admission:RequestCheck"
        model.logits_processors = [*(model.logits_processors or ()), check]


def _expect(name, value, wanted, why):
    if value != wanted:
        raise ValueError(f"{name}={value!r:.80}: expected {wanted!r}: {why}")


def mask_token_id(model_config):
    """The mask token of a checkpoint: of its config (or --hf-overrides), else of its tokenizer. ValueError if none."""
    from vllm.tokenizers import cached_tokenizer_from_config

    own = model_config.hf_config.to_model_config()
    if own.mask_token_id is not None:
        return own.mask_token_id
    found = getattr(cached_tokenizer_from_config(model_config), "mask_token_id", None)
    if found is None:
        raise ValueError('mask_token_id=None: expected in config.json or the tokenizer, or as --hf-overrides '
                         """'{"mask_token_id": 156895}'""")  # fmt: skip
    return found
