"""ModelConfig: what a LLaDA2 network is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from . import hf
from .checks import DTYPES, as_flag, as_float, as_ids, as_int, bad, check, choice, parse_json, put

QUANTIZATIONS = ("fp8", "int4")


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
    # "fp8": block-scaled weights, all but embeddings, norms, biases and routers; "int4": weights of 4 bits in groups of
    # 128, those of experts, routed and shared
    quantization: str | None = None

    def __post_init__(self):
        if self.num_shared_experts is None:
            put(self, "num_shared_experts", 0)
        if self.block_size is None:
            put(self, "block_size", 32)
        for name in ("use_qk_norm", "use_qkv_bias", "use_bias", "tie_word_embeddings"):
            check(self, name, as_flag)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "block_size"):
            check(self, name, as_int, 1)
        for name in ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_factor"):
            check(self, name, as_float, "above 0 and finite", lambda x: 0 < x < math.inf)
        if self.dtype is not None:
            check(self, "dtype", choice, tuple(DTYPES))
        if self.quantization is not None:
            check(self, "quantization", choice, QUANTIZATIONS)
        self._check_widths()
        self._check_heads()
        self._check_experts()
        self._check_special_ids()

    def _check_widths(self):
        check(self, "first_k_dense_replace", as_int, 0, self.num_hidden_layers)
        if self.intermediate_size is not None or self.first_k_dense_replace > 0:
            check(self, "intermediate_size", as_int, 1)
        if self.moe_intermediate_size is not None or self.first_k_dense_replace < self.num_hidden_layers:
            check(self, "moe_intermediate_size", as_int, 1)

    def _check_heads(self):
        check(self, "num_attention_heads", as_int, 1)
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            put(self, "num_key_value_heads", 0)
        check(self, "num_key_value_heads", as_int, 0)
        if self.num_key_value_heads == 0:
            put(self, "num_key_value_heads", heads)
        if heads % self.num_key_value_heads:
            raise bad("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads={heads}")
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise bad("num_attention_heads", heads, f"a divisor of hidden_size={self.hidden_size}, or a head_dim")
            put(self, "head_dim", self.hidden_size // heads)
        check(self, "head_dim", as_int, 1)
        check(self, "partial_rotary_factor", as_float, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            allowed = f"an even number >= 2 of the head_dim={self.head_dim} dimensions, not {self.rotary_dim}"
            raise bad("partial_rotary_factor", self.partial_rotary_factor, allowed)

    def _check_experts(self):
        for name in ("num_experts", "num_experts_per_tok", "n_group", "topk_group"):
            check(self, name, as_int, 1)
        check(self, "num_shared_experts", as_int, 0)
        experts, top_k = self.num_experts, self.num_experts_per_tok
        if self.expert_capacity is not None:
            check(self, "expert_capacity", as_int, 1, experts)
            if top_k > self.expert_capacity:
                raise bad("num_experts_per_tok", top_k, f"at most expert_capacity={self.expert_capacity}")
            return
        if experts % self.n_group or experts < 2 * self.n_group:  # a group's score is the sum of its two best experts
            raise bad("n_group", self.n_group, f"equal groups of at least 2 out of num_experts={experts}")
        if self.topk_group > self.n_group:
            raise bad("topk_group", self.topk_group, f"at most n_group={self.n_group}")
        eligible = self.topk_group * (experts // self.n_group)
        if top_k > eligible:
            allowed = f"at most {eligible}: topk_group={self.topk_group} groups of {experts // self.n_group} experts"
            raise bad("num_experts_per_tok", top_k, allowed)

    def _check_special_ids(self):
        for name in ("pad_token_id", "mask_token_id", "delete_token_id", "split_token_id"):
            if getattr(self, name) is not None:
                check(self, name, as_int, 0, self.vocab_size - 1)
        if self.delete_token_id is not None and self.delete_token_id == self.split_token_id:
            raise bad("split_token_id", self.split_token_id, "another id than delete_token_id")
        if self.eos_token_id is not None:
            ids = as_ids("eos_token_id", self.eos_token_id)
            put(self, "eos_token_id", tuple(i for i in ids if 0 <= i < self.vocab_size) or None)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def fp8(self) -> bool:
        return self.quantization == "fp8"

    @property
    def int4(self) -> bool:
        return self.quantization == "int4"

    @classmethod
    def from_hf(cls, source) -> "ModelConfig":
        """From a config.json: its path, the folder that holds it, or its contents as a dict. Keys the network does not
        need are ignored, absent ones take the class defaults; ValueError names key, value and what is allowed. A
        quantize_config.json beside it stands for its quantization_config where it has none."""
        if isinstance(source, Mapping):
            return cls._from_dict(source)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a checkpoint folder needs its config.json")
        raw = parse_json(path.read_bytes(), path)
        beside = path.with_name("quantize_config.json")
        if isinstance(raw, dict) and raw.get("quantization_config") is None and beside.is_file():
            raw["quantization_config"] = {"quant_method": "gptq"} | parse_json(beside.read_bytes(), beside)
        try:
            return cls._from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, raw):
        config = cls(**hf.read_config(raw, [field.name for field in fields(cls)]))
        hf.check_rotary_dim(raw, config)
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json from which `from_hf` gives an equal config and Hugging Face's class loads."""
        return hf.write_config(self)
