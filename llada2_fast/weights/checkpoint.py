"""Hugging Face safetensors <-> the parameters of `LLaDA2Model`, by the rename table of weight_map.py.

With quantization "fp8" linear weights are e4m3 with scales, with "int4" experts are words with scales: stored so, or
made from wider ones as they are read. A folder in GPTQ's layout may hold other linear weights in four bits, too: these
are widened as they are read.

Reading: `inspect` matches every header of every shard with the table before a single weight is read; `load` then
copies the weights out of the mapped files, tensor after tensor. Writing: `save` applies the same table backwards.
`adopt` takes the tensors of a module that is loaded already. Only safetensors is ever opened: nothing pickled, no code
from the checkpoint.
"""

import json
import math
import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..config import DTYPES, ModelConfig
from ..kernels import int4
from ..kernels.fp8 import FP8, quantize_weight
from ..kernels.gemm import WORDS
from . import gptq
from .files import INDEX, ONE_FILE, WeightFile, refuse_stale, weight_files
from .hub import resolve as resolve  # for those who load
from .shapes import WHOLE, Share, is_fp8, is_int4, parameter_shapes, scale_name
from .weight_map import (
    STORED,
    CheckpointError,
    Entry,
    WeightTarget,
    match,
    rename_table,
    split_tied_head,
    untied,
)


def inspect(folder: str | os.PathLike, config: ModelConfig, share: Share = WHOLE) -> list[tuple[Entry, WeightTarget]]:
    """All tensors of a checkpoint in file order and where each goes, after every check that needs no weights, and a
    look at the LM head that a file may hold although config.json ties it: it must be equal to the embeddings.

    folder: the checkpoint's.
    config: its config.
    share: what `load` will read of its layers. All tensors are checked, whatever it is.
    Raises CheckpointError naming file and tensor: broken index or header, wrong dtype or shape, a tensor that is
    unknown, provided twice or missing.
    """
    folder = Path(folder)
    entries = [entry for file in weight_files(folder) for entry in file]
    _check_plausible(folder, config, entries)
    files = {entry.source for entry in entries}
    entries, head = split_tied_head(entries, config)
    plan = match(entries, config, folder / INDEX if len(files) > 1 else files.pop(), "config.json", share)
    if head is not None:
        _check_tied(head, _embeddings(plan))
    return plan


def router_dtypes(plan: list[tuple[Entry, WeightTarget]], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameter -> dtype for the routers: wide enough that neither the gate nor expert_bias loses a bit, because
    near-ties between experts are decided by it.

    plan: what `inspect` or `match` gave.
    dtype: in which the network's other weights are held.
    """
    routers = [(entry, target.param) for entry, target in plan if ".router." in target.param]
    return {param: torch.promote_types(STORED[entry.dtype], dtype) for entry, param in routers}


def load(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, torch.Tensor],
    progress: bool = True,
    share: Share = WHOLE,
    plan: list[tuple[Entry, WeightTarget]] | None = None,
) -> None:
    """Fill `params` from the safetensors in a folder, converting to each parameter's dtype.

    folder: the checkpoint's.
    config: its config; with a quantization wider weights become what it says.
    params: name -> tensor, named and shaped as `parameter_shapes`; bf16, fp16, fp32, or fp8 or words of int4 where the
        config has them; on any device. Beyond them it holds nothing, or one tensor where weights become something else.
    progress: show a bar.
    share: what is held of each layer; of the other tensors nothing is read but the headers.
    plan: what `inspect` has found, None = it is asked now.
    Raises CheckpointError for whatever `inspect` refuses, for a file that becomes shorter, for weights that are not
    finite in their target dtype and for GPTQ's that are not symmetric or whose columns are not in order.
    """
    _check_params(config, params, share)
    plan = inspect(folder, config, share) if plan is None else plan
    plan = [(entry, target) for entry, target in plan if target.pieces()]
    total, scales = sum(entry.nbytes for entry, _ in plan), {e.name: e for e, target in plan if target.role == "scales"}
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress)
    with bar, torch.no_grad():
        for path, part in groupby(plan, key=lambda item: item[0].source):
            file = WeightFile(path)
            for entry, target in part:
                if target.role is None:
                    _fill(params, target, file, entry)
                else:
                    _fill_gptq(params, target, file, entry, scales)
                bar.update(entry.nbytes)


def _fill(params, target, file, entry):
    """Copy what is read of a stored tensor to where it goes."""
    param = target.view(params[target.param])
    kept = param.dtype not in (FP8, WORDS) or param.dtype == STORED[entry.dtype]
    for i, (stored, place) in enumerate(target.pieces()):
        source = file.read(entry.name, stored)
        if kept:
            _check_finite(source, param.dtype, entry)
            param[place].copy_(source)
            continue
        own = target.scale.view(params[target.scale.param])[target.scale.pieces()[i][1]]
        _check_finite(source, own.dtype, entry)  # its scales are not beyond it
        source = source.to(param.device)
        four = param.dtype == WORDS
        values, scale = int4.quantize_weight(source, own.dtype) if four else quantize_weight(source, target.parts)
        param[place].copy_(values)
        own.copy_(scale)


def _fill_gptq(params, target, file, entry, scales):
    """The same of a part of a weight in GPTQ's layout: digits become words, or the weight that they and the scales of
    their name stand for."""
    param, packed = target.view(params[target.param]), params[target.param].dtype == WORDS
    source = file.read(entry.name)
    if target.role == "qweight":
        digits = gptq.unpack(source.to(param.device))
        if packed:
            param.copy_(int4.pack(digits))
            return
        of = scales[entry.name.removesuffix("qweight") + "scales"]
        wide = gptq.widen(digits, WeightFile(of.source).read(of.name).to(param.device))
        _check_finite(wide, param.dtype, of)
        for stored, place in target.pieces():
            param[place].copy_(wide[stored])
    elif target.role == "scales":
        if packed:
            own = target.view(params[scale_name(target.param)])
            _check_finite(source, own.dtype, entry)
            own.copy_(source.T)
    else:
        gptq.check(target.role, source, entry)


@torch.no_grad()
def adopt(module: torch.nn.Module, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Parameters for the network on the tensors of a module that is loaded already: name -> tensor, named and shaped as
    `parameter_shapes`.

    module: its state_dict has a checkpoint's names. A tensor that is a whole parameter is used where it is. Others are
        copied into theirs, one parameter at a time, and become views of it. All have the embeddings' dtype, routers a
        wider one if theirs is. A tensor of another dtype is converted and left alone.
    config: the module's.
    Raises ValueError for fp8 and int4, CheckpointError for what `inspect` refuses, for tensors that are not all on one
    device and for those that are not finite.
    """
    if config.quantization is not None:
        raise ValueError(f"quantization={config.quantization!r}: expected a model without; load its folder instead")
    tensors, what = module.state_dict(keep_vars=True), type(module).__name__
    spelling = {dtype: name for name, dtype in STORED.items()}
    entries = [Entry(what, name, spelling.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()]
    entries, head = split_tied_head(entries, config)
    plan = match(entries, config, what, "its config")
    given, device = {}, tensors[plan[0][0].name].device
    for entry in [entry for entry, _ in plan] + [head] * (head is not None):
        where = tensors[entry.name].device
        if where.type == "meta" or where != device:
            raise CheckpointError(f"{entry} is on {where}; no model is split or offloaded")
    if head is not None and not _equal(tensors[head.name], tensors[_embeddings(plan).name]):
        raise untied(head)
    for entry, target in plan:
        tensor = tensors[entry.name]
        _check_finite(tensor, tensor.dtype, entry)
        given.setdefault(target.param, []).append((target, tensor))
    dtype = given["word_embeddings.weight"][0][1].dtype
    dtypes = router_dtypes(plan, dtype)
    shapes = parameter_shapes(config)
    return {name: _whole(given[name], shape, dtypes.get(name, dtype)) for name, shape in shapes.items()}


def _whole(given, shape, dtype) -> torch.Tensor:
    """A parameter of what was given for it, [(target, tensor)]: the one tensor, or one that they become views of."""
    target, tensor = given[0]
    if target.shape == shape:
        return tensor.detach().to(dtype)
    whole = torch.empty(shape, dtype=dtype, device=tensor.device)
    for target, tensor in given:
        view = target.view(whole).copy_(tensor)
        if tensor.dtype == dtype:
            tensor.data = view
    return whole


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint in the standard layout, experts in int4 in GPTQ's, with config.json, and an index where it
    fills more than one shard. One that was loaded without conversion is written back byte for byte.

    folder: made if it is not there; one with weight files that would not be overwritten is refused.
    config: the network's; what is written names the dtype of the embeddings.
    params: its parameters, named and shaped as `parameter_shapes`.
    dtype: which they are converted to, all but expert_bias, fp8 and int4; None = each keeps its own.
    max_shard_bytes: of a weight file, unless a single tensor has more.
    Raises CheckpointError for what would not be loaded again, ValueError for arguments that do not fit.
    """
    _check_params(config, params)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes!r:.80}: expected an integer >= 1")
    if config.int4:
        gptq.check_widths(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    targets = {name: target for name, target in rename_table(config).items() if _is_written(config, name, target)}
    dtypes = {name: _written_dtype(config, target, params, dtype) for name, target in targets.items()}
    shards, used, total = [[]], 0, 0
    for name, target in targets.items():
        size = math.prod(target.shape) * dtypes[name].itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [ONE_FILE]
    refuse_stale(folder, [*files, INDEX] if len(files) > 1 else files)
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            tensor = _written(targets[name], params)
            _check_finite(tensor, dtypes[name], f"{folder / file}: tensor {name}")
            tensors[name] = tensor.to("cpu", dtypes[name]).contiguous()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    main_dtype = str(dtypes["model.word_embeddings.weight"]).removeprefix("torch.")
    _write_json(folder / "config.json", replace(config, dtype=main_dtype).to_hf())


def _is_written(config, name, target):
    """Of the several layouts, the standard one; of experts in int4 GPTQ's."""
    if target.role is not None or is_int4(config, target.param):
        return target.role is not None and is_int4(config, target.param)
    return target.covers == (name,)


def _written_dtype(config, target, params, dtype):
    if target.role is not None:
        return params[scale_name(target.param)].dtype if target.role == "scales" else torch.int32
    fp8 = is_fp8(config, target.param) or target.covers[0].endswith("_scale_inv")
    return params[target.param].dtype if dtype is None or fp8 or target.param.endswith(".expert_bias") else dtype


def _written(target, params):
    """What of the parameters a tensor of the checkpoint holds."""
    held = target.view(params[target.param].detach())
    if target.role is None:
        return held
    if target.role == "qweight":
        return gptq.pack(int4.unpack(held, target.shape[0] * gptq.DIGITS).cpu())
    if target.role == "scales":
        return target.view(params[scale_name(target.param)].detach()).T
    return gptq.order(*target.shape) if target.role == "g_idx" else gptq.zeros(target.shape[0], target.shape[1] * 8)


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_plausible(folder, config, entries):
    """Refuse absurd sizes before the table, which has an entry per layer and expert, is built for them."""
    held = sum(entry.nbytes for entry in entries)
    if config.num_hidden_layers * config.num_experts > held:
        sizes = f"num_hidden_layers={config.num_hidden_layers}, num_experts={config.num_experts}"
        raise CheckpointError(f"{folder}/config.json: {sizes}: the weight files hold only {held} bytes of tensors")


def _check_params(config, params, share=WHOLE):
    shapes = parameter_shapes(config, share)
    for name in sorted(shapes.keys() ^ params.keys()):
        raise ValueError(f"params: {name} is {'missing' if name in shapes else 'unexpected'}")
    for name, shape in shapes.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params: {name} has shape {list(params[name].shape)}, expected {list(shape)}")
        quantized = (FP8,) if is_fp8(config, name) else (WORDS,) if is_int4(config, name) else None
        allowed = quantized or tuple(DTYPES.values())
        if params[name].dtype not in allowed:
            raise ValueError(f"params: {name} is {params[name].dtype}, expected one of {allowed}")


def _embeddings(plan):
    return next(entry for entry, target in plan if target.param == "word_embeddings.weight")


def _equal(a, b):
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float())


def _check_tied(head, embeddings):
    """Some rows at a time: those of different dtypes are both widened."""
    rows = max(1, 2**22 // embeddings.shape[1])
    both = (WeightFile(entry.source).read(entry.name).split(rows) for entry in (head, embeddings))
    if not all(_equal(a, b) for a, b in zip(*both, strict=True)):
        raise untied(head)


def _check_finite(tensor, dtype, what):
    """One pass without temporaries: NaN goes through aminmax and fails every comparison. fp8 has no infinities."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype == FP8:
        if bool((tensor.contiguous().view(torch.uint8) & 0x7F == 0x7F).any()):
            raise CheckpointError(f"{what} holds NaN")
        return
    low, high = (value.item() for value in tensor.aminmax())
    limit = torch.finfo(dtype).max
    if not -limit <= low <= high <= limit:
        raise CheckpointError(f"{what} holds values from {low} to {high}, not finite in {dtype}")
