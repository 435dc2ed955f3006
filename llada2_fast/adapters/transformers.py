"""transformers' Auto classes load LLaDA2 checkpoints with our network, without remote code:

    llada2_fast.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

An `auto_map` in config.json is ignored, also under trust_remote_code=True: no Python file of a checkpoint is ever run.
"""

from dataclasses import fields, replace

import torch
from transformers import PreTrainedConfig

from .. import checkpoint
from ..config import DTYPES, ModelConfig
from ..model import LLaDA2Model

# Arguments of transformers' from_pretrained that change nothing here, and the values they may have beside None.
_WITHOUT_EFFECT = {
    "_from_auto": (True,),
    "adapter_kwargs": ({},),
    "low_cpu_mem_usage": (True, False),
    "trust_remote_code": (True, False),
    "use_safetensors": (True,),
}


class LLaDA2MoeConfig(PreTrainedConfig):
    """config.json of a LLaDA2 checkpoint as transformers hands it around: its keys are attributes, unchecked."""

    model_type = "llada2_moe"

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        # transformers 5 knows rope_scaling only as another name of rope_parameters
        scaling = kwargs.pop("rope_scaling", None)
        if scaling is not None:
            kwargs["rope_parameters"] = {**scaling, **(kwargs.get("rope_parameters") or {})}
        super().__post_init__(**kwargs)

    def to_model_config(self) -> ModelConfig:
        """The checked config of our network. ValueError naming key, value and what is allowed."""
        return ModelConfig.from_hf(self.to_dict())


class LLaDA21MoeConfig(LLaDA2MoeConfig):
    model_type = "llada21_moe"


class LLaDA2MoeVeomniConfig(LLaDA2MoeConfig):
    model_type = "llada2_moe_veomni"


class LLaDA2MoeModelLM(LLaDA2Model):
    """LLaDA2Model as AutoModelForCausalLM gives it. `config` stays the network's own ModelConfig, as everywhere in this
    package; `hf_config` is transformers' config, a LLaDA2MoeConfig."""

    @classmethod
    def from_pretrained(cls, path, *, config=None, dtype=None, torch_dtype=None, device_map=None, device=None,
                        revision=None, progress=True, **kwargs):  # fmt: skip
        """Load a checkpoint folder or hub id, with the arguments that transformers' users give.

        dtype or torch_dtype: a torch dtype, its name, or "auto" = None = the config's; device_map or device: a device,
        {"": device} or "auto" = the GPU if there is one; config: a LLaDA2MoeConfig that says what config.json says, but
        for the dtype. ValueError for other arguments, CheckpointError as from LLaDA2Model.from_pretrained.
        """
        for name, value in kwargs.items():
            if value is not None and value not in _WITHOUT_EFFECT.get(name, ()):
                raise ValueError(f"{name}={value!r}: llada2_fast does not support this argument of from_pretrained")
        folder = checkpoint.resolve(path, revision)
        own = ModelConfig.from_hf(folder)
        if config is None:
            from transformers import AutoConfig

            register()
            config = AutoConfig.from_pretrained(folder)
        _check_same(config, own)
        dtype = _dtype(_either("dtype", dtype, "torch_dtype", torch_dtype)) or config.dtype
        device = _device(_either("device_map", device_map, "device", device))
        model = super().from_pretrained(folder, dtype=dtype, device=device, progress=progress)
        model.hf_config = config
        return model

    @classmethod
    def _from_config(cls, config, **kwargs):
        raise ValueError("from_config: llada2_fast makes no random weights; use from_pretrained")


def register():
    """Make AutoConfig and AutoModelForCausalLM know every LLaDA2 model type; doing it again is harmless."""
    register_configs()
    register_models()


_CONFIGS = (LLaDA2MoeConfig, LLaDA21MoeConfig, LLaDA2MoeVeomniConfig)


def register_configs():
    """The half that needs AutoConfig alone; transformers loads its Auto classes singly (llada2_fast/__init__.py)."""
    from transformers import AutoConfig

    for config_class in _CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models():
    """The half that needs AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    for config_class in _CONFIGS:
        AutoModelForCausalLM.register(config_class, LLaDA2MoeModelLM, exist_ok=True)


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
