"""LLaDA2Model as transformers' Auto classes and pipelines want it."""

import copy
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from ... import checkpoint
from ...config import DTYPES, ModelConfig
from ...model import LLaDA2Model
from .config import CONFIGS, LLaDA2MoeConfig
from .generation import LLaDA2GenerationMixin

# Arguments of transformers' from_pretrained that change nothing here, and the values they may have beside None.
_WITHOUT_EFFECT = {
    "_from_auto": (True,),
    "_from_pipeline": ("text-generation",),
    "adapter_kwargs": ({},),
    "local_files_only": (False,),
    "low_cpu_mem_usage": (True, False),
    "trust_remote_code": (True, False),
    "use_safetensors": (True,),
}


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
        for the dtype. ValueError for other arguments, CheckpointError as from LLaDA2Model.from_pretrained.
        """
        for name, value in kwargs.items():
            if value is not None and value not in _WITHOUT_EFFECT.get(name, ()):
                raise ValueError(f"{name}={value!r}: llada2_fast does not support this argument of from_pretrained")
        folder = checkpoint.resolve(path, _commit_hash or revision)  # a pipeline has resolved the revision
        own = ModelConfig.from_hf(folder)
        if config is None:
            from transformers import AutoConfig

            from . import register

            register()
            config = AutoConfig.from_pretrained(folder)
        _check_same(config, own)
        dtype = _dtype(_either("dtype", dtype, "torch_dtype", torch_dtype)) or config.dtype
        device = _device(_either("device_map", device_map, "device", device))
        model = super().from_pretrained(folder, dtype=dtype, device=device, progress=progress)
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

    def save_pretrained(self, path):
        """Write the weights in the checkpoint's own layout, byte-equal, config.json and generation_config.json."""
        checkpoint.save(path, self.config.to_model_config(), dict(self.named_parameters()))
        self.generation_config.save_pretrained(path)


def _check_same(config, own):
    if not isinstance(config, LLaDA2MoeConfig):
        raise ValueError(f"config: {type(config).__name__}: expected a LLaDA2MoeConfig, as AutoConfig gives it")
    for name in ("attn_implementation", "experts_implementation"):
        value = getattr(config, f"_{name}")
        if value is not None:
            raise ValueError(f"{name}={value!r}: llada2_fast has its own and no choice of it")
    given = replace(config.to_model_config(), dtype=own.dtype)
    for field in fields(ModelConfig):
        asked, there = getattr(given, field.name), getattr(own, field.name)
        if asked != there:
            raise ValueError(f"{field.name}={asked!r}: the checkpoint's config.json says {there!r}; change it there")


def _either(name, value, other_name, other):
    if value is not None and other is not None:
        raise ValueError(f"{other_name}={other!r}: give it or {name}, not both")
    return other if value is None else value


def _dtype(value):
    if value in (None, "auto"):
        return None
    dtype = DTYPES.get(value, value) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={value!r}: expected 'auto' or one of {', '.join(DTYPES)}")
    return dtype


def _device(value):
    if isinstance(value, dict) and list(value) == [""]:
        value = value[""]
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError):
        allowed = "a device, 'auto' or {'': device}; no model is split over devices"
        raise ValueError(f"device_map={value!r}: expected {allowed}") from None
