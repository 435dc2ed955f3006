"""The weight files of a checkpoint: which ones belong to it, what they hold, and the values of tensors.

The safetensors library reads them. What it would take in silence, or refuse in words that do not name the tensor, is
checked here first.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..config import parse_json
from .weight_map import STORED, CheckpointError, Entry

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def weight_files(folder: Path) -> Iterator[list[Entry]]:
    """The tensors of each weight file of a checkpoint, which must be exactly those that its index lists.

    folder: the checkpoint's. CheckpointError names the file, and the tensor where there is one.
    """
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
        entries = _entries(folder / file)
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


class WeightFile:
    """A safetensors file that is mapped into memory: what is read of a tensor are the bytes of the part asked for.

    path: the file. CheckpointError in the library's words if it is none.
    """

    def __init__(self, path: Path):
        self.path, self._size = path, path.stat().st_size
        try:
            self._file = safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def entries(self) -> list[Entry]:
        """Its tensors, in file order."""
        slices = {name: self._file.get_slice(name) for name in self._file.offset_keys()}
        return [Entry(self.path, name, x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """A part of a tensor, on the CPU, not copied.

        name: the tensor's.
        index: of the part, () for all.
        CheckpointError if the file has become shorter: to touch what was mapped behind its end would end the process.
        """
        if self.path.stat().st_size < self._size:
            raise CheckpointError(f"{self.path}: truncated: tensor {name} was not read yet")
        tensor = self._file.get_tensor(name)  # reads nothing yet; get_slice puts it on the host's default device
        return tensor[index] if index else tensor


def _entries(path) -> list[Entry]:
    """The tensors of one file, in file order, after all checks of its header."""
    header = _checked_header(path)
    try:
        return WeightFile(path).entries()
    except CheckpointError as error:  # of a dtype that is none the library does not say whose it is
        unjudged = [name for name, fields in header.items() if fields["dtype"] not in STORED]
        more = f"; see tensor {unjudged[0]}" if unjudged and "tensor `" not in str(error) else ""
        raise CheckpointError(f"{error}{more}") from None


def _checked_header(path) -> dict[str, dict]:
    """Name -> dtype, shape and data_offsets, as the header has them. CheckpointError for what safe_open takes (a name
    given twice, an unknown field) and for what it refuses without the tensor's name or in words that do not help.

    The file is 8 bytes of header length, a JSON header, then the tensors' bytes. That these follow each other without
    gap or overlap is left to safe_open."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or corrupt: {size} bytes with a header of {length} bytes")
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    for name, fields in header.items():
        _check_fields(f"{path}: corrupt header: tensor {name}", fields)
    last = max(header, key=lambda name: header[name]["data_offsets"][1], default=None)
    end = 8 + length + (header[last]["data_offsets"][1] if header else 0)
    if size < end:
        raise CheckpointError(f"{path}: truncated: tensor {last} ends at byte {end} of {size}")
    if size > end:
        raise CheckpointError(f"{path}: corrupt: {size - end} bytes after the last tensor")
    return header


def _check_fields(what, fields):
    """Of one tensor in a header: all fields and no others, and a size that fits if the dtype is one that we load."""
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if len(fields) == 3 and all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            if dtype in STORED and math.prod(shape) * STORED[dtype].itemsize != end - begin:
                raise CheckpointError(f"{what}: {dtype} of shape {shape} does not fill data_offsets={[begin, end]}")
        case _:
            expected = "dtype, shape and data_offsets=[begin, end], of integers >= 0, and nothing else"
            raise CheckpointError(f"{what}: {fields!r:.80}: expected {expected}")


def _parse(data, path):
    try:
        return parse_json(data, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def refuse_stale(folder: Path, files: list[str]) -> None:
    """CheckpointError if a folder has weight files or an index that saving to it would leave behind.

    folder: where a checkpoint will be saved.
    files: those that will be written.
    """
    for path in sorted(folder.iterdir()):
        if (path.name == INDEX or _WEIGHT_FILE.fullmatch(path.name)) and path.name not in files:
            raise CheckpointError(f"{path}: belongs to another checkpoint; save to an empty folder")
