"""Hugging Face safetensors <-> the parameters of `LLaDA2Model`, by one rename table.

With quantization "fp8" linear weights are e4m3 with scales: stored so, or made from wider ones as they are read.

Reading: `inspect` checks every header of every shard against the table (names, shapes, dtypes, duplicates, extras,
missing) before a single weight is read; `load` then streams the weights, one tensor at a time. Writing: `save` applies
the same table backwards. Only safetensors is ever opened: nothing pickled, no code from the checkpoint.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .config import DTYPES, ModelConfig, parse_json
from .kernels.fp8 import E4M3, quantize_weight, scale_shape

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_STORED = _DTYPES | {"F8_E4M3": E4M3}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Spellings found in published checkpoints, turned into the name the table knows.
_ALIASES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"\.mlp\.gate\.e_score_correction_bias$"), ".mlp.gate.expert_bias"),
    (re.compile(r"\.mlp\.(experts\.(?:gate|up|down)_proj|w1|w2)\.weight$"), r".mlp.\1"),
)
_FLOAT8 = re.compile(r"(query_key_value|dense|gate_up|down|lm_head)(\.weight)?$")  # parameters held in float8
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # recomputed from the config


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and, where there is one, the tensor."""


class Slot(NamedTuple):
    """Where one tensor of a checkpoint goes: `view(params[param])` has its `shape`. `covers` are the names of the
    standard layout that it provides: its own, or those of every expert for merged tensors."""

    param: str
    shape: tuple[int, ...]
    covers: tuple[str, ...]
    expert: int | None = None
    half: int | None = None  # of the stacked gate (0) and up (1) rows

    @property
    def parts(self) -> int:
        """Matrices one above the other that it holds, each with float8 blocks of its own."""
        return 2 if "gate_up" in self.param and self.half is None else 1

    @property
    def scale(self) -> "Slot":
        """Where the float8 scales of what goes here go."""
        covers = tuple(f"{name}_scale_inv" for name in self.covers)
        return self._replace(param=_scale_name(self.param), shape=scale_shape(self.shape, self.parts), covers=covers)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor if self.half is None else tensor.chunk(2, dim=-2)[self.half]


class Entry(NamedTuple):
    """One tensor in one safetensors file: bytes `begin` to `end` of the file hold it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


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
    if config.float8:
        weights = {name: shape for name, shape in shapes.items() if _FLOAT8.search(name)}
        scales = {_scale_name(name): scale_shape(shape, 1 + ("gate_up" in name)) for name, shape in weights.items()}
        shapes.update(scales)
    return shapes


def _scale_name(param):
    """The parameter that holds the scales of a float8 one."""
    return param.removesuffix(".weight") + (".scale" if param.endswith(".weight") else "_scale")


def rename_table(config: ModelConfig) -> dict[str, Slot]:
    """Name in a checkpoint -> where it goes, for the standard layout and for merged experts; scales follow weights."""
    table = {}

    def add(name, param, shape, covers=None, **where):
        table[name] = slot = Slot(param, shape, covers or (name,), **where)
        if config.float8 and _FLOAT8.search(param):
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


def resolve(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the folder itself, or a snapshot of a Hugging Face Hub repository (json,
    safetensors and jinja files only; `revision` is its branch, tag or commit). CheckpointError when it is neither."""
    name = os.fspath(path_or_hub_id)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name}: is a file; expected the folder of a checkpoint")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(f"{name}: no such folder, and not the id of a hub repository (owner/name)")
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such folder, and the hub did not provide it: {reason}") from error


def inspect(folder: str | os.PathLike, config: ModelConfig) -> list[tuple[Entry, Slot]]:
    """What `load` will read, in file order, after every check that needs no weights. CheckpointError names file and
    tensor: broken index or header, wrong dtype or shape, a tensor that is unknown, provided twice or missing."""
    folder, provided, plan = Path(folder), {}, []
    entries = [entry for file in _weight_files(folder) for entry in file]
    _check_plausible(folder, config, entries)
    table = rename_table(config)
    for entry in entries:
        name = entry.name
        for pattern, replacement in _ALIASES:
            name = pattern.sub(replacement, name)
        if _IGNORED.search(name):
            continue
        what = f"{entry.file}: tensor {entry.name}"
        slot = table.get(name)
        if slot is None:
            raise CheckpointError(f"{what} is unexpected: config.json has no place for it")
        if entry.shape != slot.shape:
            raise CheckpointError(f"{what} has shape {list(entry.shape)}, config.json gives {list(slot.shape)}")
        allowed = _allowed(config, slot)
        if entry.dtype not in allowed:
            raise CheckpointError(f"{what} has dtype {entry.dtype}, expected one of {', '.join(allowed)}")
        for covered in slot.covers:
            if covered in provided:
                other = provided[covered]
                raise CheckpointError(f"{what} is provided twice, also by {other.name} in {other.file.name}")
            provided[covered] = entry
        plan.append((entry, slot))
    wide = {f"{name}_scale_inv" for name, entry in provided.items() if entry.dtype != "F8_E4M3"}
    for entry in [provided[name] for name in sorted(wide & provided.keys())]:
        raise CheckpointError(f"{entry.file}: tensor {entry.name} is unexpected: its weight is not float8")
    missing = [name for name, slot in table.items() if slot.covers == (name,) and name not in provided.keys() | wide]
    if missing:
        files = {entry.file for entry in entries}
        where = folder / INDEX if len(files) > 1 else files.pop()
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: missing tensor {missing[0]}{more}, which config.json calls for")
    return plan


def _allowed(config, slot):
    """The dtypes that the tensor for `slot` may have."""
    if slot.covers[0].endswith("_scale_inv"):
        return ("F32",)
    return tuple(_STORED if config.float8 and _FLOAT8.search(slot.param) else _DTYPES)


def router_dtypes(plan: list[tuple[Entry, Slot]], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameter -> dtype for the routers of a network whose other weights are held as `dtype`: wide enough that neither
    the gate nor expert_bias loses a bit, because near-ties between experts are decided by it."""
    return {
        slot.param: torch.promote_types(_DTYPES[entry.dtype], dtype) for entry, slot in plan if ".router." in slot.param
    }


def load(
    folder: str | os.PathLike, config: ModelConfig, params: dict[str, torch.Tensor], progress: bool = True
) -> None:
    """Fill `params` (named and shaped as `parameter_shapes`; bf16, fp16, fp32, or float8 where the config has it; on
    any device) from the safetensors in `folder`, converting to each parameter's dtype. Beyond `params` it holds one
    tensor at a time. CheckpointError for whatever `inspect` refuses, for a file that ends early and for weights that
    are not finite in their target dtype."""
    _check_params(config, params)
    plan = inspect(folder, config)
    sizes = [entry.end - entry.begin for entry, _ in plan]
    buffer = torch.empty(max(sizes), dtype=torch.uint8)
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="Loading weights", disable=not progress)
    with bar, torch.no_grad():
        for entry, slot in plan:
            source, target = _read(entry, buffer), slot.view(params[slot.param])
            quantize = target.dtype == E4M3 != source.dtype
            limit = source.dtype if quantize else target.dtype
            _check_finite(source, limit, f"{entry.file}: tensor {entry.name}")
            if quantize:
                source, scale = quantize_weight(source.to(target.device), slot.parts)
                slot.scale.view(params[slot.scale.param]).copy_(scale)
            target.copy_(source)
            bar.update(entry.end - entry.begin)


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `params` in the standard layout, with config.json, and an index where they fill more than one shard.

    Tensors keep their dtype, or are converted to `dtype`, all but expert_bias and float8. So a checkpoint that was
    loaded without conversion is written back byte for byte. A folder with weight files that would not be overwritten is
    refused."""
    _check_params(config, params)
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes!r}: expected an integer >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    slots = {name: slot for name, slot in rename_table(config).items() if slot.covers == (name,)}
    dtypes = {
        name: params[slot.param].dtype if dtype is None or _keeps_dtype(config, slot) else dtype
        for name, slot in slots.items()
    }
    shards, used, total = [[]], 0, 0
    for name, slot in slots.items():
        size = math.prod(slot.shape) * dtypes[name].itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [ONE_FILE]
    _refuse_stale(folder, [*files, INDEX] if len(files) > 1 else files)
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            tensor = slots[name].view(params[slots[name].param].detach())
            _check_finite(tensor, dtypes[name], f"{folder / file}: tensor {name}")
            tensors[name] = tensor.to("cpu", dtypes[name]).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    main_dtype = str(dtypes["model.word_embeddings.weight"]).removeprefix("torch.")
    _write_json(folder / "config.json", replace(config, dtype=main_dtype).to_hf())


def _keeps_dtype(config, slot):
    float8 = config.float8 and (_FLOAT8.search(slot.param) or slot.covers[0].endswith("_scale_inv"))
    return float8 or slot.param.endswith(".expert_bias")


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_stale(folder, files):
    for path in sorted(folder.iterdir()):
        if (path.name == INDEX or _WEIGHT_FILE.fullmatch(path.name)) and path.name not in files:
            raise CheckpointError(f"{path}: belongs to another checkpoint; save to an empty folder")


def _weight_files(folder) -> Iterator[list[Entry]]:
    """The tensors of each weight file of a checkpoint, which must be exactly those that its index lists."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    names = sorted(path.name for path in folder.iterdir())
    if INDEX in names:
        weight_map = _weight_map(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif ONE_FILE in names:
        weight_map, files = None, [ONE_FILE]
    else:
        pickled = [name for name in names if name.endswith(_PICKLES)]
        if pickled:
            raise CheckpointError(f"{folder / pickled[0]}: pickled weights are never opened; expected {ONE_FILE}")
        raise CheckpointError(f"{folder}: no {ONE_FILE} and no {INDEX}")
    for name in names:
        if _WEIGHT_FILE.fullmatch(name) and name not in files:
            raise CheckpointError(f"{folder / name}: weights that do not belong to the checkpoint ({', '.join(files)})")
    for file in files:
        entries = _header(folder / file)
        if weight_map is not None:
            _check_listed(folder / file, {entry.name for entry in entries}, weight_map)
        yield entries


def _weight_map(path) -> dict[str, str]:
    """Tensor name -> shard file name, from an index."""
    weight_map = _parse(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty; expected tensor names and their shards")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard, re.ASCII):
            raise CheckpointError(f"{path}: tensor {tensor} is in {shard!r}: expected a plain *.safetensors file name")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: tensor {tensor} is in {shard}, which does not exist")
    return weight_map


def _check_listed(path, held, weight_map):
    for tensor in sorted(held):
        if weight_map.get(tensor) != path.name:
            listed = f"lists in {weight_map[tensor]}" if tensor in weight_map else "does not list"
            raise CheckpointError(f"{path}: holds tensor {tensor}, which {INDEX} {listed}")
    for tensor, shard in weight_map.items():
        if shard == path.name and tensor not in held:
            raise CheckpointError(f"{path}: does not hold tensor {tensor}, which {INDEX} lists there")


def _header(path) -> list[Entry]:
    """The tensors of one safetensors file in file order. The file is 8 bytes of header length, a JSON header, then the
    tensors' bytes, which must follow each other without gap or overlap to the end of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or corrupt: {size} bytes with a header of {length} bytes")
        header = _parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: corrupt header: __metadata__ must map strings to strings")
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 8 + length
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: corrupt header: tensor {entry.name} {kind} at byte {entry.begin}")
        if entry.end > size:
            raise CheckpointError(f"{path}: truncated: tensor {entry.name} ends at byte {entry.end} of {size}")
        position = entry.end
    if position != size:
        raise CheckpointError(f"{path}: corrupt: {size - position} bytes after the last tensor")
    return entries


def _entry(path, name, fields, data_begin) -> Entry:
    what = f"{path}: corrupt header: tensor {name}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{what} has {key}={numbers!r}: expected a list of integers >= 0")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{what} has dtype={dtype!r}: expected a name")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has data_offsets={offsets}: expected a begin and an end")
    if dtype in _STORED and math.prod(shape) * _STORED[dtype].itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(f"{what}: {dtype} of shape {shape} does not fill data_offsets={offsets}")
    return Entry(path, name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _parse(data, path):
    try:
        return parse_json(data, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _check_plausible(folder, config, entries):
    """Refuse absurd sizes before the table, which has an entry per layer and expert, is built for them."""
    held = sum(entry.end - entry.begin for entry in entries)
    if config.num_hidden_layers * config.num_experts > held:
        sizes = f"num_hidden_layers={config.num_hidden_layers}, num_experts={config.num_experts}"
        raise CheckpointError(f"{folder}/config.json: {sizes}: the weight files hold only {held} bytes of tensors")


def _check_params(config, params):
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() ^ params.keys()):
        raise ValueError(f"params: {name} is {'missing' if name in shapes else 'unexpected'}")
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params: {name} has shape {list(params[name].shape)}, expected {list(shape)}")
        allowed = (E4M3,) if config.float8 and _FLOAT8.search(name) else tuple(_DTYPES.values())
        if params[name].dtype not in allowed:
            raise ValueError(f"params: {name} is {params[name].dtype}, expected one of {allowed}")


def _read(entry, buffer) -> torch.Tensor:
    """The tensor's values, in the front of the uint8 `buffer`."""
    window = buffer[: entry.end - entry.begin]
    with open(entry.file, "rb") as file:
        file.seek(entry.begin)
        if file.readinto(memoryview(window.numpy())) != len(window):
            raise CheckpointError(f"{entry.file}: truncated: tensor {entry.name} ends at byte {entry.end}")
    return window.view(_STORED[entry.dtype]).view(entry.shape)


def _check_finite(tensor, dtype, what):
    """One pass without temporaries: NaN goes through aminmax and fails every comparison. float8 has no infinities."""
    if tensor.dtype == E4M3:
        if bool((tensor.contiguous().view(torch.uint8) & 0x7F == 0x7F).any()):
            raise CheckpointError(f"{what} holds NaN")
        return
    low, high = (value.item() for value in tensor.aminmax())
    limit = torch.finfo(dtype).max
    if not -limit <= low <= high <= limit:
        raise CheckpointError(f"{what} holds values from {low} to {high}, not finite in {dtype}")
