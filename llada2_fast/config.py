"""Frozen, checked settings: `ModelConfig` (what the network is) and `DecodeParams` (how one call decodes).

Every default of the project lives here. A value that cannot be used is a `ValueError` of the form
``name=value: what is allowed``, raised before any weight is read or any forward is run.
"""

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICES = ("cpu", "cuda")
MODEL_TYPES = ("llada2_moe", "llada21_moe", "llada2_moe_veomni")
SAMPLING_METHODS = ("auto", "greedy", "multinomial")
QUANTIZATIONS = ("fp8",)
PROFILES = ("default", "hf-2.0", "hf-2.1", "sglang-lowconf", "sglang-joint")
PRESETS = {  # the modes of the LLaDA2.1 model card
    "quality": {"threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},
    "speed": {"threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},
}

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
# What quantization_config may say; the last value is the one we write.
_FP8 = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128],),
    "activation_scheme": (None, "dynamic"),
    "fmt": (None, "e4m3"),
    "scale_fmt": ("float", None),
}
_INT_MAX = 2**31 - 1  # counts, lengths and ids end up in int32 tensors
_INT64 = 2**63
_FLOAT32 = torch.finfo(torch.float32)  # what numbers of a request end up in


def _bad(name, value, allowed):
    return ValueError(f"{name}={value!r:.80}: expected {allowed}")


def as_int(name, value, low, high=_INT_MAX):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        too_large = isinstance(value, numbers.Integral) and value > high
        limits = f">= {low}" if high == _INT_MAX and not too_large else f"in {low}..{high}"
        raise _bad(name, value, f"an integer {limits}")
    return int(value)


def as_float(name, value, allowed, ok):
    """`value` as a float for which `ok` holds; `ok` is a comparison, so that NaN always fails it."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer above 1e308
            number = math.inf if value > 0 else -math.inf
    if not ok(number):
        raise _bad(name, value, f"a number {allowed}")
    return number


def as_float32(value):
    """A number >= 0 as a float32 tensor can hold it: infinity where it is larger than all float32."""
    return math.inf if value > _FLOAT32.max else value


def as_temperature(value):
    """A temperature as a float32 tensor can hold it: what is above 0 stays so, and does not become greedy."""
    return max(value, _FLOAT32.tiny) if value > 0 else value


def _choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise _bad(name, value, "one of " + ", ".join(allowed))
    return value


def _bool(name, value):
    if not isinstance(value, bool):
        raise _bad(name, value, "true or false")
    return value


def find_device(name=None, argument="device"):
    """The torch.device of this name, else the GPU if there is one. ValueError, which speaks of `argument`, if it is
    none that we run on, or none that this machine has."""
    cuda = torch.cuda.is_available()
    known = ("cuda" if cuda else "cpu") if name is None else name
    if isinstance(name, numbers.Integral) and not isinstance(name, bool):
        known = f"cuda:{name}"  # of itself PyTorch makes that only where it has a GPU
    try:
        device = torch.device(known)
    except (RuntimeError, TypeError):
        raise _bad(argument, name, "a device such as cpu, cuda or cuda:1") from None
    if device.type not in DEVICES:
        raise _bad(argument, str(name), f"{' or '.join(DEVICES)}: there are no kernels for {device.type}")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"{argument}={name!r:.80}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _set(owner, name, value):
    """Store a normalised value in a frozen dataclass; for use in its __post_init__ only."""
    object.__setattr__(owner, name, value)


def _check(owner, name, check, *args):
    _set(owner, name, check(name, getattr(owner, name), *args))


def parse_json(data: bytes, source) -> dict:
    """The JSON object in `data`. ValueError naming `source` for anything else: syntax errors, duplicate keys (where
    json.loads silently keeps the last), NaN and Infinity, nesting too deep to parse."""

    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"duplicate key {key!r:.80}")
            found[key] = value
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not a number")

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{source}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


@dataclass(frozen=True)
class ModelConfig:
    """A LLaDA2 network. Field names and defaults are those of the Hugging Face config class, except that special ids
    have no default. `num_key_value_heads` 0 or None = one per attention head; `head_dim` None = hidden_size / heads;
    `expert_capacity` set = block routing over blocks of `block_size` (then n_group and topk_group are not read)."""

    vocab_size: int = 30592
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    intermediate_size: int | None = None  # of the dense layers, needed when there are any
    moe_intermediate_size: int | None = None  # of one expert, needed when there are MoE layers
    first_k_dense_replace: int = 0
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 0
    head_dim: int | None = None
    num_experts: int = 16
    num_experts_per_tok: int = 2
    num_shared_experts: int | None = 0
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    rope_factor: float = 1.0  # linear scaling: angle = position / rope_factor * inverse frequency
    partial_rotary_factor: float = 0.5
    max_position_embeddings: int = 16384
    block_size: int | None = 32
    expert_capacity: int | None = None
    delete_token_id: int | None = None
    split_token_id: int | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    eos_token_id: tuple[int, ...] | None = None  # ids outside the vocabulary are dropped: they mean "none"
    dtype: str | None = None
    quantization: str | None = None  # "fp8": block-scaled weights, all but embeddings, norms, biases and routers

    def __post_init__(self):
        if self.num_shared_experts is None:
            _set(self, "num_shared_experts", 0)
        if self.block_size is None:
            _set(self, "block_size", 32)
        for name in ("use_qk_norm", "use_qkv_bias", "use_bias", "tie_word_embeddings"):
            _check(self, name, _bool)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "block_size"):
            _check(self, name, as_int, 1)
        for name in ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_factor"):
            _check(self, name, as_float, "above 0 and finite", lambda x: 0 < x < math.inf)
        if self.dtype is not None:
            _check(self, "dtype", _choice, tuple(DTYPES))
        if self.quantization is not None:
            _check(self, "quantization", _choice, QUANTIZATIONS)
        self._check_widths()
        self._check_heads()
        self._check_experts()
        self._check_special_ids()

    def _check_widths(self):
        _check(self, "first_k_dense_replace", as_int, 0, self.num_hidden_layers)
        if self.intermediate_size is not None or self.first_k_dense_replace > 0:
            _check(self, "intermediate_size", as_int, 1)
        if self.moe_intermediate_size is not None or self.first_k_dense_replace < self.num_hidden_layers:
            _check(self, "moe_intermediate_size", as_int, 1)

    def _check_heads(self):
        _check(self, "num_attention_heads", as_int, 1)
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            _set(self, "num_key_value_heads", 0)
        _check(self, "num_key_value_heads", as_int, 0)
        if self.num_key_value_heads == 0:
            _set(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            raise _bad("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads={heads}")
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise _bad("num_attention_heads", heads, f"a divisor of hidden_size={self.hidden_size}, or a head_dim")
            _set(self, "head_dim", self.hidden_size // heads)
        _check(self, "head_dim", as_int, 1)
        _check(self, "partial_rotary_factor", as_float, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            allowed = f"an even number >= 2 of the head_dim={self.head_dim} dimensions, not {self.rotary_dim}"
            raise _bad("partial_rotary_factor", self.partial_rotary_factor, allowed)

    def _check_experts(self):
        for name in ("num_experts", "num_experts_per_tok", "n_group", "topk_group"):
            _check(self, name, as_int, 1)
        _check(self, "num_shared_experts", as_int, 0)
        experts, top_k = self.num_experts, self.num_experts_per_tok
        if self.expert_capacity is not None:
            _check(self, "expert_capacity", as_int, 1, experts)
            if top_k > self.expert_capacity:
                raise _bad("num_experts_per_tok", top_k, f"at most expert_capacity={self.expert_capacity}")
            return
        if experts % self.n_group or experts < 2 * self.n_group:  # a group's score is the sum of its two best experts
            raise _bad("n_group", self.n_group, f"equal groups of at least 2 out of num_experts={experts}")
        if self.topk_group > self.n_group:
            raise _bad("topk_group", self.topk_group, f"at most n_group={self.n_group}")
        eligible = self.topk_group * (experts // self.n_group)
        if top_k > eligible:
            allowed = f"at most {eligible}: topk_group={self.topk_group} groups of {experts // self.n_group} experts"
            raise _bad("num_experts_per_tok", top_k, allowed)

    def _check_special_ids(self):
        for name in ("pad_token_id", "mask_token_id", "delete_token_id", "split_token_id"):
            if getattr(self, name) is not None:
                _check(self, name, as_int, 0, self.vocab_size - 1)
        if self.eos_token_id is not None:
            ids = as_ids("eos_token_id", self.eos_token_id)
            _set(self, "eos_token_id", tuple(i for i in ids if 0 <= i < self.vocab_size) or None)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def float8(self) -> bool:
        return self.quantization == "fp8"

    @classmethod
    def from_hf(cls, source) -> "ModelConfig":
        """From a config.json: its path, the folder that holds it, or its contents as a dict. Keys the network does not
        need are ignored, absent ones take the class defaults; ValueError names key, value and what is allowed."""
        if isinstance(source, Mapping):
            return cls._from_dict(source)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a checkpoint folder needs its config.json")
        raw = parse_json(path.read_bytes(), path)
        try:
            return cls._from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, raw):
        _choice("model_type", raw.get("model_type"), MODEL_TYPES)
        architectures = raw.get("architectures")
        if architectures is not None and not (
            isinstance(architectures, list) and any(str(name).startswith("LLaDA2") for name in architectures)
        ):
            raise _bad("architectures", architectures, "a LLaDA2 architecture such as LLaDA2MoeModelLM")
        for key, allowed in _FIXED.items():
            value = raw.get(key, allowed[0])
            if not any(value is x or (value == x and isinstance(value, str)) for x in allowed):
                raise _bad(key, value, " or ".join(json.dumps(x) for x in allowed))
        values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        values["dtype"] = _merge("dtype", raw.get("dtype"), "torch_dtype", raw.get("torch_dtype"))
        if isinstance(values["dtype"], str):
            values["dtype"] = values["dtype"].removeprefix("torch.")
        values["quantization"] = _quantization(raw.get("quantization_config"))
        values.update(_rope(raw))
        config = cls(**values)
        if raw.get("rotary_dim") is not None and raw["rotary_dim"] != config.rotary_dim:
            allowed = f"{config.rotary_dim}, from head_dim={config.head_dim} and partial_rotary_factor="
            raise _bad("rotary_dim", raw["rotary_dim"], allowed + str(config.partial_rotary_factor))
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json from which `from_hf` gives an equal config and Hugging Face's class loads."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        factor = values.pop("rope_factor")
        if values.pop("quantization", None):
            values["quantization_config"] = {key: allowed[-1] for key, allowed in _FP8.items() if allowed[-1]}
        if self.eos_token_id is not None:
            values["eos_token_id"] = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id)
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
            "rotary_dim": self.rotary_dim,
            **values,
        }


def _quantization(table):
    """The ModelConfig.quantization that a config.json's quantization_config means. Which modules were left out of it
    (modules_to_not_convert) is seen from the tensors."""
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise _bad("quantization_config", table, "null or an object")
    for key, allowed in _FP8.items():
        if table.get(key) not in allowed:
            raise _bad(f"quantization_config.{key}", table.get(key), " or ".join(json.dumps(x) for x in allowed))
    return table["quant_method"]


def as_ids(name, value):
    """A tuple of ints from one int or a sequence, set, array or tensor of them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    values = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
    return tuple(as_int(name, v, -_INT64, _INT64 - 1) for v in values)


def _merge(name, value, other_name, other):
    """One setting spelled in two places: either may be absent, both must not differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name}={value!r:.80} contradicts {other_name}={other!r:.80}: expected equal values")
    return other if value is None else value


def _rope(raw):
    """rope_theta, rope_factor and partial_rotary_factor (those present) from the three spellings of config.json: plain
    keys, `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters")
    values, factor = {}, None
    for name, table in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if table is None:
            continue
        if not isinstance(table, Mapping):
            raise _bad(name, table, "null or an object")
        kind = _merge(f"{name}.rope_type", table.get("rope_type"), "type", table.get("type"))
        if kind not in (None, "default", "linear"):
            raise _bad(f"{name}.rope_type", kind, "null, default or linear")
        if kind is None and table.get("factor") is not None:
            raise _bad(f"{name}.rope_type", kind, "default or linear beside a factor")
        own = table.get("factor") if kind == "linear" else 1.0
        own = as_float(f"{name}.factor", own, "above 0 and finite", lambda x: 0 < x < math.inf)
        factor = _merge(f"{name}.factor", own, "rope_scaling.factor", factor)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = _merge(key, raw.get(key), f"rope_parameters.{key}", (parameters or {}).get(key))
        if value is not None or key in raw:
            values[key] = value
    return values if factor is None else {**values, "rope_factor": factor}


@dataclass(frozen=True)
class DecodeParams:
    """How one request is decoded. Defaults are those of the LLaDA2.1 card's generate(), but editing is off.

    A drawn token's confidence is what the model itself gives it, its probability at temperature 1 among all tokens, so
    that thresholds mean the same at any temperature, `top_k` and `top_p`; under the profiles it is the probability of
    the draw, as on the cards and in diffusers: near 1 at a low temperature or with narrow filters, where whole blocks
    are committed at once.
    `block_length` None = the model's; `threshold` and `editing_threshold` are strict and may exceed 1 (never reached);
    `editing_threshold` None = off, 0.0 = edit whenever the candidate differs (under `hf-2.1` None = the card's 0.9,
    under `sglang-joint` SGLang's 0.0); `top_k` None or 0 and `top_p` None or >= 1 = off (kept as None);
    `eos_ids` None = the checkpoint's, () = none, an id outside the vocabulary never occurs; `seed` is an int64,
    None = drawn from torch's generator where tokens are drawn; `attend_tail` denoises the last block whole;
    `num_to_transfer` belongs to `hf-2.1` alone. The `sglang` profiles, SGLang's LowConfidence and JointThreshold, read
    neither `steps` nor `minimal_topk`."""

    gen_length: int = 2048
    block_length: int | None = None
    steps: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    sampling_method: str = "auto"
    threshold: float = 0.95
    editing_threshold: float | None = None
    max_post_steps: int = 16
    minimal_topk: int = 1
    num_to_transfer: int = 1
    eos_early_stop: bool = False
    eos_ids: tuple[int, ...] | None = None
    mask_id: int | None = None
    pad_id: int | None = None
    seed: int | None = None
    attend_tail: bool = True
    profile: str = "default"

    def __post_init__(self):
        for name in ("gen_length", "steps", "minimal_topk", "num_to_transfer"):
            _check(self, name, as_int, 1)
        _check(self, "max_post_steps", as_int, 0)
        for name, low in (("block_length", 1), ("top_k", 0), ("mask_id", 0), ("pad_id", 0)):
            if getattr(self, name) is not None:
                _check(self, name, as_int, low)
        _set(self, "top_k", self.top_k or None)
        _check(self, "temperature", as_float, f">= 0 and at most {_FLOAT32.max:.4g}", lambda x: 0 <= x <= _FLOAT32.max)
        _set(self, "temperature", as_temperature(self.temperature))
        _check(self, "threshold", as_float, ">= 0", lambda x: x >= 0)
        _set(self, "threshold", as_float32(self.threshold))
        if self.editing_threshold is not None:
            _check(self, "editing_threshold", as_float, ">= 0, or None for off", lambda x: x >= 0)
            _set(self, "editing_threshold", as_float32(self.editing_threshold))
        if self.top_p is not None:
            _check(self, "top_p", as_float, "above 0, or None for off", lambda x: x > 0)
            _set(self, "top_p", self.top_p if self.top_p < 1 else None)
        for name in ("eos_early_stop", "attend_tail"):
            _check(self, name, _bool)
        if self.eos_ids is not None:
            _set(self, "eos_ids", as_ids("eos_ids", self.eos_ids))
        if self.seed is not None:
            _check(self, "seed", as_int, -_INT64, _INT64 - 1)
        _check(self, "sampling_method", _choice, SAMPLING_METHODS)
        _check(self, "profile", _choice, PROFILES)
        self._check_profile()

    @property
    def draws(self) -> bool:
        """Tokens are drawn at random, not the most likely ones."""
        return self.temperature > 0 and self.sampling_method != "greedy"

    @classmethod
    def preset(cls, name, **changes) -> "DecodeParams":
        """One of PRESETS, "quality" or "speed", with other fields as given."""
        return cls(**PRESETS[_choice("preset", name, tuple(PRESETS))] | changes)

    def _check_profile(self):
        if self.num_to_transfer != 1 and self.profile != "hf-2.1":
            raise _bad("num_to_transfer", self.num_to_transfer, f"1 outside profile='hf-2.1', not {self.profile!r}")
        if self.profile != "default" and not self.attend_tail:
            raise _bad("attend_tail", self.attend_tail, f"True under profile={self.profile!r}")
        if self.profile in ("hf-2.0", "sglang-lowconf") and self.editing_threshold is not None:
            allowed = f"None under profile={self.profile!r}, which has no editing"
            raise _bad("editing_threshold", self.editing_threshold, allowed)
        if self.editing_threshold is None:
            _set(self, "editing_threshold", {"hf-2.1": 0.9, "sglang-joint": 0.0}.get(self.profile))


@dataclass(frozen=True)
class EngineConfig:
    """How an Engine shares its model among requests.

    `block_length` None = the model's; `max_running` rows are decoded together, `max_waiting` requests may wait for a
    place; `cache_tokens` of K/V are kept for prompts, generated blocks and shared prefixes; `prefill_tokens` prompt
    tokens at most go along with one step; `share_prefixes` lets requests use each other's committed blocks; a unit of
    priority outweighs `priority_s` seconds of waiting; a request has at most `max_eos_ids` EOS ids; `mask_id` None =
    the checkpoint's; `trace` records every commit and edit; `graphs` replays each denoise step as a CUDA graph, on a
    GPU. With graphs and without a trace a step is launched before the last one's results are read, which then come a
    step late; `trace` None = unless there are graphs."""

    block_length: int | None = None
    max_running: int = 16
    max_waiting: int = 1024
    cache_tokens: int = 65536
    prefill_tokens: int = 512
    share_prefixes: bool = True
    priority_s: float = 60.0
    max_eos_ids: int = 8
    mask_id: int | None = None
    trace: bool | None = None
    graphs: bool = False

    def __post_init__(self):
        for name, low in (("block_length", 1), ("mask_id", 0)):
            if getattr(self, name) is not None:
                _check(self, name, as_int, low)
        for name in ("max_running", "max_waiting", "cache_tokens", "prefill_tokens", "max_eos_ids"):
            _check(self, name, as_int, 1)
        if self.trace is None:
            _set(self, "trace", not self.graphs)
        for name in ("share_prefixes", "trace", "graphs"):
            _check(self, name, _bool)
        _check(self, "priority_s", as_float, ">= 0 and finite", lambda x: 0 <= x < math.inf)
