"""Special token ids and the tokenizer of a checkpoint. Nothing here has a default: the checkpoint decides."""

import json
import os
import re
from pathlib import Path

import torch

from ..config import habits, parse_json
from .hub import resolve

NAMES = ("mask_token_id", "eos_token_id", "pad_token_id")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
_RELEASE = re.compile(r"llada-?2[._]?(\d)", re.IGNORECASE)

Ids = dict[str, int | tuple[int, ...]]  # of some of NAMES; eos_token_id's is a tuple


def special_ids(folder: str | os.PathLike, vocab_size: int) -> Ids:
    """{mask_token_id, eos_token_id, pad_token_id} as far as a folder says, from its generation_config.json, else the
    tokenizer's files, else config.json.

    folder: a checkpoint's.
    vocab_size: EOS ids outside 0..vocab_size - 1 mean none and are left out.
    Raises ValueError naming the file for unreadable JSON, an id that is no integer, and a mask or pad id outside the
    vocabulary.
    """
    folder = Path(folder)
    found = {}
    for source, ids in (
        ("generation_config.json", _from_json(folder, "generation_config.json")),
        ("tokenizer_config.json", _from_tokenizer(folder)),
        ("config.json", _from_json(folder, "config.json")),
    ):
        ids = {name: value for name, value in ids.items() if name not in found}
        found |= check_ids(ids, vocab_size, folder / source)
    return found


def special_ids_of(module: torch.nn.Module, vocab_size: int) -> Ids:
    """As `special_ids`, of a model that is loaded already: its generation_config's, else its config's.

    module: has a `config`, perhaps a `generation_config`, both with to_dict().
    vocab_size: EOS ids outside 0..vocab_size - 1 mean none and are left out.
    Raises ValueError naming the module's class for a mask or pad id outside the vocabulary.
    """
    said = module.config.to_dict()
    if getattr(module, "generation_config", None) is not None:
        said |= {name: value for name, value in module.generation_config.to_dict().items() if value is not None}
    ids = {name: said[name] for name in NAMES if said.get(name) is not None}
    eos = ids.get("eos_token_id")
    if isinstance(eos, (int, list)):
        ids["eos_token_id"] = (eos,) if isinstance(eos, int) else tuple(eos)
    return check_ids(ids, vocab_size, type(module).__name__)


def release_of(folder: str | os.PathLike, name: str | os.PathLike) -> str | None:
    """Which LLaDA2 a checkpoint calls itself, "2.0", "2.1", ...; None if it does not say.

    folder: its own, whose config.json may name where it comes from.
    name: what it was asked for by, a folder or a hub id.
    """
    return release_in(_read(Path(folder), "config.json").get("_name_or_path")) or release_in(name) or release_in(folder)


def release_in(name: str | os.PathLike | None) -> str | None:
    """Which LLaDA2 a name speaks of: the last folder of a path, or part of a hub id, that is about LLaDA."""
    about = next((part for part in reversed(Path(str(name)).parts) if "llada" in part.lower()), "")
    found = _RELEASE.findall(about)
    return f"2.{found[-1]}" if found else None


def check_ids(ids: Ids, vocab_size: int, source: str | os.PathLike) -> Ids:
    """Special ids without EOS ids outside the vocabulary.

    ids: what a source names.
    vocab_size: ids are 0..vocab_size - 1.
    source: what names them, for messages.
    Raises ValueError for other ids outside the vocabulary.
    """
    for name, value in ids.items():
        if name != "eos_token_id" and not 0 <= value < vocab_size:
            raise ValueError(f"{source}: {name}={value}: expected an id in 0..{vocab_size - 1}, the vocabulary")
    eos = {name: tuple(i for i in ids[name] if 0 <= i < vocab_size) for name in ids if name == "eos_token_id"}
    return ids | eos


def save_special_ids(folder: str | os.PathLike, ids: Ids) -> None:
    """Write special ids, if there are any, to a folder's generation_config.json.

    folder: the checkpoint's.
    ids: as `special_ids` gave them.
    """
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
            raise ValueError(f"{folder / name}: {key}={value!r:.80}: expected a token id")
        found[key] = tuple(ids) if key == "eos_token_id" else ids[0]
    return found


def _from_tokenizer(folder):
    """Ids of the tokens that tokenizer_config.json names, looked up among the added tokens of either file."""
    config, tokens = _read(folder, "tokenizer_config.json"), _read(folder, "tokenizer.json")
    try:
        known = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        known |= {entry["content"]: int(entry["id"]) for entry in tokens.get("added_tokens", [])}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}: tokenizer_config.json or tokenizer.json: added tokens without ids") from None
    found = {}
    for key in NAMES:
        token = config.get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in known:
            found[key] = (known[token],) if key == "eos_token_id" else known[token]
    return found


def load_tokenizer(path: str | os.PathLike, *, padding_side: str | None = None, **kwargs):
    """The tokenizer.json of a folder or hub id as a transformers tokenizer; no file of the checkpoint is ever run.

    path: the folder, or the id of a hub repository.
    padding_side: "left" or "right", None = what the checkpoint says.
    kwargs: as of LLaDA2Model.from_pretrained.
    Raises CheckpointError where there is no such folder or hub id, ValueError without a tokenizer.json, for files that
    make no tokenizer and for arguments that cannot be honoured.
    The generic fast class, not AutoTokenizer: that one looks at auto_map and may ask to run the checkpoint's own code.
    """
    hub, others = habits.split_hub(kwargs)
    habits.refuse("load_tokenizer", others, habits.NO_WEIGHTS | {"use_fast": (True,)})
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"padding_side={padding_side!r:.80}: expected 'left' or 'right'")
    folder = resolve(path, **hub, patterns=("*.json", "*.jinja"))
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json; give token ids instead of text")
    for name in FILES:
        _read(folder, name)  # transformers does not say which file it could not read
    from transformers import PreTrainedTokenizerFast  # half a second of import time, needed for text only

    asked = {} if padding_side is None else {"padding_side": padding_side}
    with _Naming(folder):
        return PreTrainedTokenizerFast.from_pretrained(folder, **asked)


def render_chat(tokenizer, messages: list[dict]) -> str:
    """The prompt for a conversation's next turn, as text.

    messages: dicts with "role" and "content".
    Raises ValueError if the tokenizer has no chat template, jinja2.TemplateError where that refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected prompts as the model saw them, without roles")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """The prompt for a conversation's next turn, as token ids; messages and errors as of `render_chat`."""
    return tokenizer(render_chat(tokenizer, messages), add_special_tokens=False)["input_ids"]


class _Naming:
    """Errors of tokenizer libraries, which raise a bare Exception or whatever comes, as a ValueError naming files."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is Exception or isinstance(error, (ValueError, TypeError, AttributeError, LookupError)):
            files = ", ".join(path.name for path in sorted(self._folder.iterdir()) if path.name in (*FILES, TEMPLATE))
            said = " ".join(str(error).split())
            raise ValueError(f"{self._folder}: no tokenizer in {files}: {kind.__name__}: {said:.200}") from error
