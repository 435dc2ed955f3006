"""A pipeline's folder: model/, scheduler/, tokenizer/ and model_index.json as in diffusers, or a plain checkpoint."""

import json
from pathlib import Path

from ...config import habits
from ...model import LLaDA2Model
from ...weights import checkpoint
from ...weights.special_tokens import load_tokenizer
from .scheduler import BlockRefinementScheduler

INDEX = "model_index.json"


def load_parts(path, dtype, device, model, scheduler, tokenizer, progress: bool, hub: dict) -> tuple:
    """(model, scheduler, tokenizer) of a pipeline.

    path: a folder or hub id.
    dtype, device, progress: as of LLaDA2Model.from_pretrained.
    model, scheduler, tokenizer: what is not None is used in place of the folder's.
    hub: what habits.loading gives, for weights.checkpoint.resolve.
    """
    folder = checkpoint.resolve(path, **hub, subfolders=True)

    def home(name):
        return folder / name if (folder / name).is_dir() else folder

    if model is None:
        model = LLaDA2Model.from_pretrained(home("model"), dtype, device, progress)
    if tokenizer is None and (home("tokenizer") / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(home("tokenizer"))
    if scheduler is None and (home("scheduler") / BlockRefinementScheduler.config_name).is_file():
        scheduler = BlockRefinementScheduler.from_pretrained(home("scheduler"))
    elif scheduler is None:
        scheduler = BlockRefinementScheduler(block_length=model.block_length)
    return model, scheduler, tokenizer


def save_parts(folder: str | Path, pipeline: str, parts: dict, max_shard_size: int | str | None):
    """Write what a pipeline is made of.

    folder: made if need be.
    pipeline: name of its class.
    parts: {name of a folder in it: what is saved there, or None}.
    max_shard_size: of the model's save_pretrained, None = its default.
    """
    shards = {} if max_shard_size is None else {"max_shard_size": habits.shard_bytes(max_shard_size)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": pipeline}
    for name, part in parts.items():
        if part is not None:
            part.save_pretrained(folder / name, **(shards if name == "model" else {}))
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    index.pop("tokenizer", None)  # we find its folder, and diffusers' class fails where it is listed (0.42.1)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
