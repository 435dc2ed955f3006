"""LLaDA2Model as transformers' Auto classes and pipelines want it."""

import copy
from dataclasses import fields, replace
from pathlib import Path

from transformers import GenerationConfig

from ...config import ModelConfig, habits
from ...model import LLaDA2Model
from ...weights import checkpoint
from .config import CONFIGS, LLaDA2MoeConfig
from .generation import LLaDA2GenerationMixin

# What transformers itself says to from_pretrained.
_INTERNAL = {"_from_auto": (True,), "_from_pipeline": ("text-generation",)}


class LLaDA2MoeModelLM(LLaDA2GenerationMixin, LLaDA2Model):
    """LLaDA2Model as AutoModelForCausalLM gives it: `config` is a LLaDA2MoeConfig, `generation_config` a
    GenerationConfig, and generate() is transformers', which returns prompt and answer. LLaDA2Model.generate(model, ids)
    is still the model cards', which returns the answer alone."""

    input_modalities = output_modalities = ("text",)

    @classmethod
    def from_pretrained(cls, path, *, config=None, dtype=None, torch_dtype=None, device_map=None, device=None,
                        revision=None, _commit_hash=None, progress=True, **kwargs):  # fmt: skip
        """Load a checkpoint folder or hub id, with the arguments that transformers' users give.

        dtype or torch_dtype: a torch dtype, its name, or "auto" = None = the config's; device_map or device: a device,
        {"": device} or "auto" = the GPU if there is one; config: a LLaDA2MoeConfig that says what config.json says, but
        for the dtype; kwargs: as of LLaDA2Model.from_pretrained. ValueError for other arguments, CheckpointError as
        from there.
        """
        kwargs = {name: value for name, value in kwargs.items() if not habits.is_neutral(name, value, _INTERNAL)}
        hub = habits.loading(kwargs)
        dtype = habits.find_dtype(dtype, torch_dtype)
        device = habits.find_place(device, device_map)
        hub["revision"] = _commit_hash or revision  # a pipeline has resolved the revision
        folder = checkpoint.resolve(path, **hub)
        own = ModelConfig.from_hf(folder)
        if config is None:
            from transformers import AutoConfig

            from . import register

            register()
            config = AutoConfig.from_pretrained(folder)
        if own.quantization is not None and getattr(config, "quantization_config", None) is None:
            config = copy.deepcopy(config)  # AutoConfig knows no quantize_config.json
            config.quantization_config = own.to_hf()["quantization_config"]
        _check_same(config, own)
        model = super().from_pretrained(folder, dtype=dtype or config.dtype, device=device, progress=progress)
        said = (Path(folder) / "generation_config.json").is_file()
        model._take(config, GenerationConfig.from_pretrained(folder) if said else GenerationConfig())
        return model

    @classmethod
    def from_transformers(cls, model):
        """LLaDA2Model.from_transformers, which takes over `config` and `generation_config` as well."""
        network = super().from_transformers(model)
        config_class = next(known for known in CONFIGS if known.model_type == model.config.model_type)
        config = config_class.from_dict(model.config.to_dict())
        network._take(config, getattr(model, "generation_config", None) or GenerationConfig())
        return network

    def _take(self, config, generation_config):
        """Make a copy of `config` ours, and a generation config of what the checkpoint says."""
        own, self.config = self.config, copy.deepcopy(config)
        self.config.complete(own)
        self.generation_config = self.default_generation_config(generation_config)

    @classmethod
    def _from_config(cls, config, **kwargs):
        raise ValueError("from_config: llada2_fast makes no random weights; use from_pretrained")

    def save_pretrained(self, path, *, max_shard_size="5GB", safe_serialization=True, **kwargs):
        """LLaDA2Model.save_pretrained, with everything of our `generation_config`."""
        habits.saving(safe_serialization=safe_serialization, **kwargs)
        config, params = self.config.to_model_config(), dict(self.named_parameters())
        checkpoint.save(path, config, params, max_shard_bytes=habits.shard_bytes(max_shard_size))
        self.generation_config.save_pretrained(path)


def _check_same(config, own):
    if not isinstance(config, LLaDA2MoeConfig):
        raise ValueError(f"config: {type(config).__name__}: expected a LLaDA2MoeConfig, as AutoConfig gives it")
    chosen = ("attn_implementation", "experts_implementation")  # AutoConfig takes them for itself
    habits.refuse("from_pretrained", {name: getattr(config, f"_{name}") for name in chosen}, habits.LOADING)
    given = replace(config.to_model_config(), dtype=own.dtype)
    for field in fields(ModelConfig):
        asked, there = getattr(given, field.name), getattr(own, field.name)
        if asked != there:
            said = f"the checkpoint's config.json says {there!r:.80}; change it there"
            raise ValueError(f"{field.name}={asked!r:.80}: {said}")
