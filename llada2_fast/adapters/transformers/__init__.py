"""transformers' users get our network without remote code: Auto classes, generate(), streamers, pipelines.

    llada2_fast.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    answer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)

An `auto_map` in config.json is ignored, also under trust_remote_code=True: no Python file of a checkpoint is ever run.
"""

from .config import CONFIGS, LLaDA2MoeConfig
from .generation import LLaDA2GenerateOutput
from .model import LLaDA2MoeModelLM

__all__ = ["LLaDA2GenerateOutput", "LLaDA2MoeConfig", "LLaDA2MoeModelLM", "register"]


def register():
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know every LLaDA2 model type; doing it again is harmless."""
    register_configs()
    register_models()


def register_configs():
    """The half that needs AutoConfig alone; transformers loads its Auto classes singly (llada2_fast/__init__.py)."""
    from transformers import AutoConfig

    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models():
    """The half that needs the classes of models. AutoModel gives the same as AutoModelForCausalLM: with its LM head."""
    from transformers import AutoModel, AutoModelForCausalLM

    for config_class in CONFIGS:
        AutoModel.register(config_class, LLaDA2MoeModelLM, exist_ok=True)
        AutoModelForCausalLM.register(config_class, LLaDA2MoeModelLM, exist_ok=True)
