"""The weight files of a checkpoint: which ones belong to it, what they hold, and a tensor's values."""

import math
import re
from collections.abc import Iterator

import torch

from ..config import parse_json
from .weight_map import STORED, CheckpointError, Entry

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def weight_files(folder) -> Iterator[list[Entry]]:
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
            raise CheckpointError(
                f"{path}: tensor {tensor} is in {shard!r:.80}: expected a plain *.safetensors file name"
            )
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
            raise CheckpointError(f"{what} has {key}={numbers!r:.80}: expected a list of integers >= 0")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{what} has dtype={dtype!r:.80}: expected a name")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what} has data_offsets={offsets}: expected a begin and an end")
    if dtype in STORED and math.prod(shape) * STORED[dtype].itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(f"{what}: {dtype} of shape {shape} does not fill data_offsets={offsets}")
    return Entry(path, name, dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _parse(data, path):
    try:
        return parse_json(data, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read(entry, buffer) -> torch.Tensor:
    """The tensor's values, in the front of the uint8 `buffer`."""
    window = buffer[: entry.end - entry.begin]
    with open(entry.source, "rb") as file:
        file.seek(entry.begin)
        if file.readinto(memoryview(window.numpy())) != len(window):
            raise CheckpointError(f"{entry.source}: truncated: tensor {entry.name} ends at byte {entry.end}")
    return window.view(STORED[entry.dtype]).view(entry.shape)


def refuse_stale(folder, files):
    for path in sorted(folder.iterdir()):
        if (path.name == INDEX or _WEIGHT_FILE.fullmatch(path.name)) and path.name not in files:
            raise CheckpointError(f"{path}: belongs to another checkpoint; save to an empty folder")
