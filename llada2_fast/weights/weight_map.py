"""The tensors of a checkpoint <-> the parameters of `LLaDA2Model`, by one rename table.

`match` holds what there is, in the files of a checkpoint or in a module, against the table: names, shapes, dtypes,
duplicates, extras, missing. Nothing here reads a weight.
"""

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import ModelConfig
from ..kernels.fp8 import FP8, scale_shape

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": FP8}  # safetensors' names

# Spellings found in published checkpoints, turned into the name the table knows.
_ALIASES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.gate.expert_bias"),
    (re.compile(r"\.mlp\.(experts\.(?:gate|up|down)_proj|w1|w2)\.weight$"), r".mlp.\1"),
)
_FP8 = re.compile(r"(query_key_value|dense|gate_up|down|lm_head)(\.weight)?$")  # parameters held in fp8
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # recomputed from the config


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file or module and, where there is one, the tensor."""


class Entry(NamedTuple):
    """One tensor that is there, in a safetensors file or in a module. As text it is what messages call it."""

    source: Path | str  # the file, or the module's class
    name: str
    dtype: str  # safetensors' name for it, or the source's own if not in STORED
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes, 1 for an element of a dtype not in STORED."""
        return math.prod(self.shape) * (STORED[self.dtype].itemsize if self.dtype in STORED else 1)

    def __str__(self):
        return f"{self.source}: tensor {self.name}"


class WeightTarget(NamedTuple):
    """Where one tensor of a checkpoint goes: `view(params[param])` has its `shape`. `covers` are the names of the
    standard layout that it provides: its own, or those of every expert for merged tensors."""

    param: str
    shape: tuple[int, ...]
    covers: tuple[str, ...]
    expert: int | None = None
    half: int | None = None  # of the stacked gate (0) and up (1) rows

    @property
    def parts(self) -> int:
        """Matrices one above the other that it holds, each with fp8 blocks of its own."""
        return 2 if "gate_up" in self.param and self.half is None else 1

    @property
    def scale(self) -> "WeightTarget":
        """Where the fp8 scales of what goes here go."""
        covers = tuple(f"{name}_scale_inv" for name in self.covers)
        return self._replace(param=_scale_name(self.param), shape=scale_shape(self.shape, self.parts), covers=covers)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2, dim=-2)[self.half]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the network, in its own (fused) layout."""
    V, H, D, E = config.vocab_size, config.hidden_size, config.head_dim, config.num_experts
    nq, nk = config.num_attention_heads, config.num_key_value_heads
    shapes = {"word_embeddings.weight": (V, H), "norm.weight": (H,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, H)

    def add_mlp(name, width):
        shapes[f"{name}.gate_up.weight"] = (2 * width, H)
        shapes[f"{name}.down.weight"] = (H, width)

    for i in range(config.num_hidden_layers):
        layer, attention, mlp = f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.mlp"
        shapes[f"{layer}.input_layernorm.weight"] = (H,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
        shapes[f"{attention}.query_key_value.weight"] = ((nq + 2 * nk) * D, H)
        shapes[f"{attention}.dense.weight"] = (H, nq * D)
        if config.use_qkv_bias:
            shapes[f"{attention}.query_key_value.bias"] = ((nq + 2 * nk) * D,)
        if config.use_bias:
            shapes[f"{attention}.dense.bias"] = (H,)
        if config.use_qk_norm:
            shapes[f"{attention}.query_layernorm.weight"] = (D,)
            shapes[f"{attention}.key_layernorm.weight"] = (D,)
        if i < config.first_k_dense_replace:
            add_mlp(mlp, config.intermediate_size)
            continue
        width = config.moe_intermediate_size
        shapes[f"{mlp}.router.weight"] = (E, H)
        shapes[f"{mlp}.router.expert_bias"] = (E,)
        shapes[f"{mlp}.experts.gate_up"] = (E, 2 * width, H)
        shapes[f"{mlp}.experts.down"] = (E, H, width)
        if config.num_shared_experts:
            add_mlp(f"{mlp}.shared_experts", config.num_shared_experts * width)
    if config.fp8:
        weights = {name: shape for name, shape in shapes.items() if is_fp8(config, name)}
        scales = {_scale_name(name): scale_shape(shape, 1 + ("gate_up" in name)) for name, shape in weights.items()}
        shapes.update(scales)
    return shapes


def is_fp8(config: ModelConfig, param: str) -> bool:
    """Whether the network holds this parameter in fp8."""
    return config.fp8 and _FP8.search(param) is not None


def _scale_name(param):
    """The parameter that holds the scales of an fp8 one."""
    return param.removesuffix(".weight") + (".scale" if param.endswith(".weight") else "_scale")


def rename_table(config: ModelConfig) -> dict[str, WeightTarget]:
    """Name in a checkpoint -> where it goes, for the standard layout and for merged experts; scales follow weights."""
    table = {}

    def add(name, param, shape, covers=None, **where):
        table[name] = slot = WeightTarget(param, shape, covers or (name,), **where)
        if is_fp8(config, param):
            table[f"{name}_scale_inv"] = slot.scale

    for param, shape in parameter_shapes(replace(config, quantization=None)).items():
        name = param if param == "lm_head.weight" else f"model.{param}"
        name = name.replace(".mlp.router.", ".mlp.gate.")
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "gate_up" and not stem.endswith(".experts"):
            for half, part in enumerate(("gate_proj", "up_proj")):
                add(f"{stem}.{part}.weight", param, (shape[0] // 2, shape[1]), half=half)
        elif leaf == "down" and not stem.endswith(".experts"):
            add(f"{stem}.down_proj.weight", param, shape)
        elif leaf in ("gate_up", "down"):
            _add_experts(add, stem, param, shape)
        else:
            add(name, param, shape)
    return table


def _add_experts(add, stem, param, shape):
    """The three layouts of stacked expert weights: one tensor per expert and projection (standard), one per projection
    (dFactory), gate and up fused as well (dInfer's w1 and w2)."""
    experts, rows, columns = shape
    fused = param.endswith("gate_up")
    parts = {"gate_proj": 0, "up_proj": 1} if fused else {"down_proj": None}
    rows = rows // len(parts)
    names = {part: tuple(f"{stem}.{e}.{part}.weight" for e in range(experts)) for part in parts}
    for part, half in parts.items():
        for expert, name in enumerate(names[part]):
            add(name, param, (rows, columns), expert=expert, half=half)
        add(f"{stem}.{part}", param, (experts, rows, columns), names[part], half=half)
    add(stem.removesuffix("experts") + ("w1" if fused else "w2"), param, shape, sum(names.values(), ()))


def split_tied_head(entries: list[Entry], config: ModelConfig) -> tuple[list[Entry], Entry | None]:
    """The entries without the LM head of a config that ties it to the embeddings, and that head, None if there is none:
    some files list it all the same, and live modules do. CheckpointError if it cannot be equal to the embeddings."""
    heads = [entry for entry in entries if config.tie_word_embeddings and entry.name == "lm_head.weight"]
    for head in heads[1:]:
        raise CheckpointError(f"{head} is provided twice, also in {os.path.basename(heads[0].source)}")
    for head in heads:
        if head.shape != (config.vocab_size, config.hidden_size) or STORED.get(head.dtype, FP8) == FP8:
            raise untied(head)
    return [entry for entry in entries if entry not in heads], heads[0] if heads else None


def untied(head: Entry) -> CheckpointError:
    """What is wrong with an LM head that is not the embeddings."""
    return CheckpointError(f"{head} is not equal to the embeddings, to which tie_word_embeddings=true ties it")


def match(
    entries: list[Entry], config: ModelConfig, where: Path | str, authority: str
) -> list[tuple[Entry, WeightTarget]]:
    """The entries, in their order, and where each goes; those that the network recomputes are left out. CheckpointError
    names source and tensor: wrong dtype or shape, a tensor that is unknown, provided twice or missing. In its messages
    `where` is what a missing tensor is missing from and `authority` where `config` was read."""
    table, provided, plan = rename_table(config), {}, []
    for entry in entries:
        name = entry.name
        for pattern, replacement in _ALIASES:
            name = pattern.sub(replacement, name)
        if _IGNORED.search(name):
            continue
        slot = table.get(name)
        if slot is None:
            raise CheckpointError(f"{entry} is unexpected: {authority} has no place for it")
        if entry.shape != slot.shape:
            raise CheckpointError(f"{entry} has shape {list(entry.shape)}, {authority} gives {list(slot.shape)}")
        allowed = _allowed(config, slot)
        if entry.dtype not in allowed:
            raise CheckpointError(f"{entry} has dtype {entry.dtype}, expected one of {', '.join(allowed)}")
        for covered in slot.covers:
            if covered in provided:
                other = provided[covered]
                there = os.path.basename(other.source)
                raise CheckpointError(f"{entry} is provided twice, also by {other.name} in {there}")
            provided[covered] = entry
        plan.append((entry, slot))
    wide = {f"{name}_scale_inv" for name, entry in provided.items() if entry.dtype != "F8_E4M3"}
    for name in sorted(wide & provided.keys()):
        raise CheckpointError(f"{provided[name]} is unexpected: its weight is not fp8")
    missing = [name for name, slot in table.items() if slot.covers == (name,) and name not in provided.keys() | wide]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: missing tensor {missing[0]}{more}, which {authority} calls for")
    return plan


def _allowed(config, slot):
    """The dtypes that the tensor for `slot` may have."""
    if slot.covers[0].endswith("_scale_inv"):
        return ("F32",)
    return tuple(name for name, dtype in STORED.items() if dtype != FP8 or is_fp8(config, slot.param))
