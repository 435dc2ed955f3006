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
from ..kernels.fp8 import FP8
from ..kernels.gemm import SCALE_GROUP, num_groups, scale_shape
from .shapes import WHOLE, Share, is_fp8, parameter_shapes, scale_name

STORED = {  # by safetensors' names
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": FP8, "I32": torch.int32,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32")
ROLES = ("qweight", "qzeros", "scales", "g_idx")  # tensors that are one weight in GPTQ's layout, see gptq.py

# Spellings found in published checkpoints, turned into the name the table knows.
_ALIASES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.gate.expert_bias"),
    (re.compile(r"\.mlp\.(experts\.(?:gate|up|down)_proj|w1|w2)\.weight$"), r".mlp.\1"),
)
_LINEAR = tuple(f".{name}.weight" for name in ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj"))
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
    """Where one tensor of a checkpoint goes: `pieces` of it into those of `view(params[param])`.

    param: the parameter.
    shape: the stored tensor's.
    covers: the names of the standard layout that it provides: its own, or those of every expert for merged tensors.
    expert: its place among the experts that are held, None unless it is a single expert's.
    half: of the stacked gate (0) and up (1) rows; None: both, or neither.
    dim, ranges: what is read of it, ranges of one dimension, one after the other; None: all.
    role: one of ROLES for a part of a weight in GPTQ's layout; what is read is then told of the weight.
    """

    param: str
    shape: tuple[int, ...]
    covers: tuple[str, ...]
    expert: int | None = None
    half: int | None = None
    dim: int = 0
    ranges: tuple[range, ...] | None = None
    role: str | None = None

    @property
    def parts(self) -> int:
        """Matrices one above the other that it holds, each with fp8 groups of its own."""
        return 2 if "gate_up" in self.param and self.half is None else 1

    @property
    def scale(self) -> "WeightTarget":
        """Where the scales of what goes here go."""
        shape, covers = scale_shape(self.shape, self.parts), tuple(f"{name}_scale_inv" for name in self.covers)
        size = SCALE_GROUP if self.dim >= len(shape) - 2 else 1  # rows and columns have scales in groups, experts not
        ranges = self.ranges and tuple(range(part.start // size, part.stop // size) for part in self.ranges)
        return self._replace(param=scale_name(self.param), shape=shape, covers=covers, ranges=ranges)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a parameter, what its tensor goes into."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2, dim=-2)[self.half]

    def pieces(self) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Index of the stored tensor and index of what `view` gives, for each piece that is read."""
        if self.ranges is None:
            return [((), ())]
        before, at, pieces = (slice(None),) * self.dim, 0, []
        for part in self.ranges:
            pieces.append(((*before, slice(part.start, part.stop)), (*before, slice(at, at + len(part)))))
            at += len(part)
        return pieces


def rename_table(config: ModelConfig, share: Share = WHOLE) -> dict[str, WeightTarget]:
    """Name in a checkpoint -> where it goes, for the standard layout and for merged experts; scales follow weights. In
    int4 also for the parts that GPTQ makes of the weight of any linear layer within a layer.

    config: the checkpoint's.
    share: what is held of its layers; tensors of which nothing is read are in the table, too.
    """
    table = {}
    share.check(config)

    def add(name, param, shape, covers=None, expert=None, half=None):
        dim, ranges = share.cut(config, param)
        if expert is not None and ranges is not None:
            (held,) = ranges
            expert, ranges = expert - held.start, None if expert in held else ()
        table[name] = target = WeightTarget(param, shape, covers or (name,), expert, half, dim, ranges)
        if is_fp8(config, param):
            table[f"{name}_scale_inv"] = target.scale
        if config.int4 and name.endswith(_LINEAR):
            table.update(_gptq(name, target))

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


def _gptq(name, target):
    """The parts of a weight [N, K] in GPTQ's layout. The digits stand for the weight itself."""
    (rows, columns), stem = target.shape, name.removesuffix("weight")
    groups = num_groups(columns)
    shapes = {
        "qweight": (columns // 8, rows), "qzeros": (groups, rows // 8), "scales": (groups, rows), "g_idx": (columns,),
    }  # fmt: skip
    return {
        stem + role: target._replace(shape=shape, covers=(name if role == "qweight" else stem + role,), role=role)
        for role, shape in shapes.items()
    }


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
    some files list it all the same, and live modules do.

    entries: all tensors there are.
    config: of the network that they must make.
    Raises CheckpointError for a head that cannot be equal to the embeddings.
    """
    heads = [entry for entry in entries if config.tie_word_embeddings and entry.name == "lm_head.weight"]
    for head in heads[1:]:
        raise CheckpointError(f"{head} is provided twice, also in {os.path.basename(heads[0].source)}")
    for head in heads:
        if head.shape != (config.vocab_size, config.hidden_size) or head.dtype not in FLOATS:
            raise untied(head)
    return [entry for entry in entries if entry not in heads], heads[0] if heads else None


def untied(head: Entry) -> CheckpointError:
    """What is wrong with an LM head that is not the embeddings."""
    return CheckpointError(f"{head} is not equal to the embeddings, to which tie_word_embeddings=true ties it")


def match(
    entries: list[Entry], config: ModelConfig, where: Path | str, authority: str, share: Share = WHOLE
) -> list[tuple[Entry, WeightTarget]]:
    """The entries, in their order, and where each goes; those that the network recomputes are left out.

    entries: all tensors there are.
    config: of the network that they must make.
    where: what a missing tensor is missing from, for messages.
    authority: where the config was read, for messages.
    share: what is held of its layers.
    Raises CheckpointError naming source and tensor: wrong dtype or shape, a tensor that is unknown, provided twice or
    missing.
    """
    table, provided, plan = rename_table(config, share), {}, []
    for entry in entries:
        name = entry.name
        for pattern, replacement in _ALIASES:
            name = pattern.sub(replacement, name)
        if _IGNORED.search(name):
            continue
        target = table.get(name)
        if target is None:
            raise CheckpointError(f"{entry} is unexpected: {authority} has no place for it")
        if entry.shape != target.shape:
            raise CheckpointError(f"{entry} has shape {list(entry.shape)}, {authority} gives {list(target.shape)}")
        allowed = _allowed(config, target)
        if entry.dtype not in allowed:
            raise CheckpointError(f"{entry} has dtype {entry.dtype}, expected one of {', '.join(allowed)}")
        for covered in target.covers:
            if covered in provided:
                other = provided[covered]
                there = os.path.basename(other.source)
                raise CheckpointError(f"{entry} is provided twice, also by {other.name} in {there}")
            provided[covered] = entry
        plan.append((entry, target))
    wide = {f"{name}_scale_inv" for name, entry in provided.items() if entry.dtype != "F8_E4M3"}
    for name in sorted(wide & provided.keys()):
        raise CheckpointError(f"{provided[name]} is unexpected: its weight is not fp8")
    if config.int4:
        whole = [name.removesuffix("weight") for name, entry in provided.items() if entry.dtype != "I32"]
        unpacked = {stem + role for stem in whole for role in ROLES}
        for name in sorted(unpacked & provided.keys()):
            raise CheckpointError(f"{provided[name]} is unexpected: its weight has no qweight")
        wide |= unpacked
    found = provided.keys() | wide
    missing = [name for name, target in table.items() if target.covers == (name,) and name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: missing tensor {missing[0]}{more}, which {authority} calls for")
    return plan


def _allowed(config, target):
    """The dtypes that the tensor for `target` may have."""
    if target.covers[0].endswith("_scale_inv"):
        return ("F32",)
    if target.role in ("qweight", "qzeros", "g_idx"):
        return ("I32",)
    return (*FLOATS, "F8_E4M3") if is_fp8(config, target.param) else FLOATS
