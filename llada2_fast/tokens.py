"""Special token ids and the tokenizer of a checkpoint folder. Nothing here has a default: the checkpoint decides."""

import json
from pathlib import Path

from .config import parse_json

NAMES = ("mask_token_id", "eos_token_id", "pad_token_id")


def special_ids(folder):
    """{mask_token_id, eos_token_id, pad_token_id} as far as the folder says, eos_token_id a tuple of ints.

    Read from generation_config.json, else the tokenizer's files, else config.json. ValueError naming the file for
    unreadable JSON or an id that is no integer.
    """
    folder = Path(folder)
    found = {}
    for source in (
        _from_json(folder, "generation_config.json"),
        _from_tokenizer(folder),
        _from_json(folder, "config.json"),
    ):
        for name, value in source.items():
            found.setdefault(name, value)
    return found


def save_special_ids(folder, ids):
    """Write what `special_ids` gave to the folder's generation_config.json."""
    if ids:
        eos = ids.get("eos_token_id", ())
        ids = {**ids, "eos_token_id": eos[0] if len(eos) == 1 else list(eos)} if eos else ids
        (Path(folder) / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _read(folder, name):
    path = folder / name
    return parse_json(path.read_bytes(), path) if path.is_file() else {}


def _from_json(folder, name):
    raw = _read(folder, name)
    found = {}
    for key in NAMES:
        value = raw.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids) or (key != "eos_token_id" and len(ids) != 1):
            raise ValueError(f"{folder / name}: {key}={value!r}: expected a token id")
        found[key] = tuple(ids) if key == "eos_token_id" else ids[0]
    return found


def _from_tokenizer(folder):
    """Ids of the tokens that tokenizer_config.json names, looked up among the added tokens of either file."""
    config = _read(folder, "tokenizer_config.json")
    known = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    known |= {entry["content"]: entry["id"] for entry in _read(folder, "tokenizer.json").get("added_tokens", [])}
    found = {}
    for key in NAMES:
        token = config.get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        if token in known:
            found[key] = (known[token],) if key == "eos_token_id" else known[token]
    return found


def load_tokenizer(folder):
    """The folder's tokenizer.json as a transformers tokenizer; no file of the folder is ever run.

    The generic fast class, not AutoTokenizer: that one looks at auto_map and may ask to run the checkpoint's own code.
    """
    from transformers import PreTrainedTokenizerFast  # half a second of import time, needed for text only

    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json; give token ids instead of text")
    return PreTrainedTokenizerFast.from_pretrained(folder)
