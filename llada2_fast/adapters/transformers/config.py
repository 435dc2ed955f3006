"""config.json of a LLaDA2 checkpoint as transformers' config classes."""

from dataclasses import fields

from transformers import PreTrainedConfig

from ...config import ModelConfig


class LLaDA2MoeConfig(PreTrainedConfig):
    """config.json of a LLaDA2 checkpoint as transformers hands it around: its keys are attributes, unchecked.

    The `config` of a loaded model has every field of our ModelConfig beside them, checked and with its defaults.
    """

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

    def complete(self, own):
        """Take over what the network's ModelConfig says, but for what transformers spells in its own way."""
        for name in {field.name for field in fields(own)} - {"dtype", "eos_token_id", "quantization"}:
            setattr(self, name, getattr(own, name))
        self.rotary_dim = own.rotary_dim
        self.eos_token_id = getattr(self, "eos_token_id", None)


class LLaDA21MoeConfig(LLaDA2MoeConfig):
    model_type = "llada21_moe"


class LLaDA2MoeVeomniConfig(LLaDA2MoeConfig):
    model_type = "llada2_moe_veomni"


CONFIGS = (LLaDA2MoeConfig, LLaDA21MoeConfig, LLaDA2MoeVeomniConfig)
