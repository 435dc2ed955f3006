"""The options that say which model to run, where, and how to decode: the same for every command and benchmark."""

import argparse
from pathlib import Path

from .machine import choose_threads

GEN_LENGTH = 256  # when neither an option nor the model's positions say less

# Parameters of generate() that the command line offers; their help is that of DecodeParams. Left out, they keep its
# defaults, but for gen_length (see GEN_LENGTH) and eos_early_stop, which is on.
_NUMBER, _COUNT, _NAME = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}, {"metavar": "NAME"}
_SWITCH = {"action": argparse.BooleanOptionalAction}
DECODING = {
    "gen_length": _COUNT, "block_length": _COUNT, "steps": _COUNT, "threshold": _NUMBER, "editing_threshold": _NUMBER,
    "max_post_steps": _COUNT, "minimal_topk": _COUNT, "num_to_transfer": _COUNT, "temperature": _NUMBER,
    "top_k": _COUNT, "top_p": _NUMBER, "sampling_method": _NAME, "seed": _COUNT, "profile": _NAME,
    "eos_early_stop": _SWITCH, "attend_tail": _SWITCH, "eos_id": _COUNT | {"action": "append"}, "mask_id": _COUNT,
    "pad_id": _COUNT, "regex": {"metavar": "PATTERN"}, "json_schema": {"metavar": "FILE"},
    "choices": {"metavar": "TEXT,TEXT", "action": "append"}, "edit_window": _COUNT,
    "policy": _NAME, "entropy_bound": _NUMBER, "entropy_decay": _NUMBER,
}  # fmt: skip
_OWN_DEFAULTS = {
    "gen_length": f"{GEN_LENGTH}, or as many as the model has positions left", "eos_early_stop": "on",
    "eos_id": "may be repeated", "json_schema": "a file of JSON",
    "choices": "separated by commas; where it is repeated each TEXT is one choice, commas and all",
}  # fmt: skip


class Help(argparse.HelpFormatter):
    """Says of decoding options what DecodeParams says. Getting that imports torch, which only the help of a subcommand
    waits for."""

    def _get_help_string(self, action):
        if action.dest not in DECODING:
            return action.help
        from ..config import DecodeParams

        described = DecodeParams.__dataclass_fields__["eos_ids" if action.dest == "eos_id" else action.dest]
        own = _OWN_DEFAULTS.get(action.dest) or (None if described.default is None else f"default: {described.default}")
        text = described.metadata["help"]
        return text if own is None else f"{text} ({own})"


def add_model_options(parser, without=()):
    """Add the groups "model" and "decoding" to an argparse parser. without: names of some that it says otherwise."""
    group = parser.add_argument_group("model")
    if "model" not in without:
        group.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint folder or hub id; else the embedded model")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub id; else its main branch")
    group.add_argument("--dtype", help="bfloat16, float16 or float32; else the checkpoint's (embedded model: float32)")
    group.add_argument("--quantization", metavar="NAME", help="fp8 or int4 weights; else the checkpoint's")
    group.add_argument("--no-exact", dest="exact", action="store_false", help="cuBLAS's products on a GPU")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; else the GPU if there is one")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    group = parser.add_argument_group("decoding")
    for name, keywords in DECODING.items():
        if name in without:
            continue
        aliases = ["--max-tokens"] if name == "gen_length" else []
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, *aliases, dest=name, default=argparse.SUPPRESS, help=name, **keywords)


def decoding(args):
    """generate()'s keyword arguments as asked for. ValueError for what no model allows."""
    given = {name: getattr(args, name) for name in DECODING if hasattr(args, name)}
    if len(given.get("choices", ())) == 1:
        given["choices"] = given["choices"][0].split(",")
    if "json_schema" in given:
        given["json_schema"] = _read_schema(given["json_schema"])
    params(given)
    return {"eos_early_stop": True} | given


def _read_schema(path):
    from ..config import parse_json

    try:
        return parse_json(Path(path).read_bytes(), f"--json-schema={path!r:.200}")
    except OSError as error:
        raise ValueError(f"--json-schema={path!r:.200}: {error.strerror}") from None


def params(decoding):
    """DecodeParams of generate()'s keyword arguments."""
    from ..config import DecodeParams

    given = decoding | {"eos_ids": decoding.get("eos_id")}
    given.pop("eos_id", None)
    return DecodeParams(**given)


def fit(decoding, model, rows):
    """generate()'s keyword arguments with a gen_length that fits the model, where none was asked for.

    rows: the prompts' ids. ValueError if one of them leaves no position free.
    """
    longest, positions = max(map(len, rows)), model.config.max_position_embeddings
    if longest >= positions:
        raise ValueError(f"prompt: {longest} tokens, expected fewer than the model's {positions} positions")
    return {"gen_length": min(GEN_LENGTH, positions - longest)} | decoding


def load_model(args):
    """(LLaDA2Model, its folder) as the options say. ValueError if there is no such checkpoint, dtype or device."""
    from .. import demo
    from ..config import QUANTIZATIONS, find_device
    from ..config.habits import find_dtype
    from ..model import LLaDA2Model
    from ..weights.checkpoint import resolve

    dtype = find_dtype("float32" if args.dtype is None and args.model is None else args.dtype)
    if args.quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization={args.quantization!r:.80}: expected one of {', '.join(QUANTIZATIONS)}")
    if args.revision is not None and args.model is None:
        raise ValueError(f"revision={args.revision!r:.80}: expected --model with the hub id whose revision it is")
    device = find_device(args.device)
    folder = resolve(demo.path() if args.model is None else args.model, args.revision)
    model = LLaDA2Model.from_pretrained(folder, dtype, device, args.progress, args.quantization, args.exact)
    choose_threads(model)
    return model, folder


def model_name(model):
    """What a model is called unless it is told: its hub id, or the last part of its folder's path."""
    if model is None:
        return "llada2-fast-demo"
    return Path(model).resolve().name if Path(model).is_dir() else model


def encode(tokenizer, messages):
    """`encode_chat`, with an error that names the option which does without."""
    from ..weights.special_tokens import encode_chat

    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected --raw and prompts as the model saw them")
    return encode_chat(tokenizer, messages)
