"""config.json, Hugging Face's spelling of a network <-> the values of a ModelConfig."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields

from .checks import as_float, bad, choice, merge

MODEL_TYPES = ("llada2_moe", "llada21_moe", "llada2_moe_veomni")

# Keys of config.json that may be absent but, when present, can only have the value the network implements.
_FIXED = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32", "float32", None),
    "norm_topk_prob": (True,),
    "moe_router_enable_expert_bias": (True,),
    "use_rmsnorm": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "use_sliding_window": (False,),
    "using_split_qkv_in_self_attention": (False,),
}
# What quantization_config may say, by its quant_method; the last value is the one we write.
_FP8 = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128],),
    "activation_scheme": (None, "dynamic"),
    "fmt": (None, "e4m3"),
    "scale_fmt": ("float", None),
}
_GPTQ = {
    "quant_method": ("gptq",),
    "bits": (4,),
    "group_size": (128,),
    "sym": (True,),
    "desc_act": (None, True, False),  # whether columns were reordered is seen from the tensors
    "lm_head": (None, False),
    "checkpoint_format": (None, "gptq_v2", "gptq"),
    "format": ("gptq_v2", "gptq", None),
    "pack_dtype": (None, "int32"),
}
_METHODS = {"fp8": ("fp8", _FP8), "gptq": ("int4", _GPTQ)}  # by quant_method: our name and what the table may say


def read_config(raw, names):
    """The values that the contents of a config.json, a dict, give the fields `names` of a ModelConfig. Keys the network
    does not need are ignored; ValueError names key, value and what is allowed."""
    choice("model_type", raw.get("model_type"), MODEL_TYPES)
    architectures = raw.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and any(str(name).startswith("LLaDA2") for name in architectures)
    ):
        raise bad("architectures", architectures, "a LLaDA2 architecture such as LLaDA2MoeModelLM")
    for key, allowed in _FIXED.items():
        value = raw.get(key, allowed[0])
        if not any(value is x or (value == x and isinstance(value, str)) for x in allowed):
            raise bad(key, value, " or ".join(json.dumps(x) for x in allowed))
    values = {name: raw[name] for name in names if name in raw}
    values["dtype"] = merge("dtype", raw.get("dtype"), "torch_dtype", raw.get("torch_dtype"))
    if isinstance(values["dtype"], str):
        values["dtype"] = values["dtype"].removeprefix("torch.")
    values["quantization"] = _quantization(raw.get("quantization_config"))
    return values | _rope(raw)


def check_rotary_dim(raw, config):
    """ValueError if a config.json's rotary_dim is not that of the ModelConfig made of it."""
    if raw.get("rotary_dim") is not None and raw["rotary_dim"] != config.rotary_dim:
        allowed = f"{config.rotary_dim}, from head_dim={config.head_dim} and partial_rotary_factor="
        raise bad("rotary_dim", raw["rotary_dim"], allowed + str(config.partial_rotary_factor))


def write_config(config):
    """The contents of a config.json from which `ModelConfig.from_hf` gives an equal config and Hugging Face's class
    loads, a dict."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) is not None}
    factor = values.pop("rope_factor")
    quantization = values.pop("quantization", None)
    for name, allowed in _METHODS.values():
        if name == quantization:
            written = {key: options[-1] for key, options in allowed.items() if options[-1] is not None}
            values["quantization_config"] = written
    if config.eos_token_id is not None:
        values["eos_token_id"] = config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id)
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "hidden_act": "silu",
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "norm_topk_prob": True,
        "moe_router_enable_expert_bias": True,
        "use_sliding_window": False,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
        "rotary_dim": config.rotary_dim,
        **values,
    }


def _quantization(table):
    """The ModelConfig.quantization that a config.json's quantization_config means. Which modules were left out of it
    (modules_to_not_convert) is seen from the tensors."""
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise bad("quantization_config", table, "null or an object")
    method = table.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise bad("quantization_config.quant_method", method, " or ".join(map(json.dumps, _METHODS)))
    quantization, allowed = _METHODS[method]
    for key, options in allowed.items():
        if table.get(key) not in options:
            raise bad(f"quantization_config.{key}", table.get(key), " or ".join(json.dumps(x) for x in options))
    return quantization


def _rope(raw):
    """rope_theta, rope_factor and partial_rotary_factor (those present) from the three spellings of config.json: plain
    keys, `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    values, factor = {}, None
    for name, table in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if table is None:
            continue
        if not isinstance(table, Mapping):
            raise bad(name, table, "null or an object")
        kind = merge(f"{name}.rope_type", table.get("rope_type"), "type", table.get("type"))
        if kind not in (None, "default", "linear"):
            raise bad(f"{name}.rope_type", kind, "null, default or linear")
        if kind is None and table.get("factor") is not None:
            raise bad(f"{name}.rope_type", kind, "default or linear beside a factor")
        own = table.get("factor") if kind == "linear" else 1.0
        own = as_float(f"{name}.factor", own, "above 0 and finite", lambda x: 0 < x < math.inf)
        factor = merge(f"{name}.factor", own, "rope_scaling.factor", factor)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = merge(key, raw.get(key), f"rope_parameters.{key}", (parameters or {}).get(key))
        if value is not None or key in raw:
            values[key] = value
    return values if factor is None else {**values, "rope_factor": factor}
