"""The options that say which model to run, where, and how to decode: the same for every command and benchmark."""

import argparse

from .machine import choose_threads

GEN_LENGTH = 256  # when neither an option nor the model's positions say less

# Parameters of generate() that the command line offers. Left out, they keep the defaults of DecodeParams, but for
# gen_length (see GEN_LENGTH) and eos_early_stop, which is on.
_NUMBER, _COUNT = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
_SWITCH = {"action": argparse.BooleanOptionalAction}
DECODING = {
    "gen_length": _COUNT | {"help": f"most tokens to generate; {GEN_LENGTH} unless the model has fewer positions left"},
    "block_length": _COUNT | {"help": "tokens per diffusion block; the checkpoint's unless given"},
    "steps": _COUNT | {"help": "steps over which a block's quota is spread"},
    "threshold": _NUMBER | {"help": "commit tokens with a confidence above this"},
    "editing_threshold": _NUMBER | {"help": "replace tokens by others with a confidence above this; off unless given"},
    "max_post_steps": _COUNT | {"help": "most editing steps of a block without masks"},
    "minimal_topk": _COUNT | {"help": "least tokens to commit per step"},
    "num_to_transfer": _COUNT | {"help": "least tokens to commit per step under --profile hf-2.1"},
    "temperature": _NUMBER | {"help": "0 = greedy"},
    "top_k": _COUNT | {"help": "sample among the k likeliest tokens"},
    "top_p": _NUMBER | {"help": "sample among the likeliest tokens of this mass"},
    "sampling_method": {"metavar": "NAME", "help": "auto, greedy or multinomial"},
    "seed": _COUNT | {"help": "of the draws, with the number of the prompt; drawn itself unless given"},
    "profile": {"metavar": "NAME", "help": "whose rules: default, hf-2.0, hf-2.1, sglang-lowconf or sglang-joint"},
    "eos_early_stop": _SWITCH | {"help": "stop at the first end token (on)"},
    "attend_tail": _SWITCH | {"help": "denoise the last block whole"},
    "eos_id": _COUNT | {"action": "append", "help": "an end token, may be repeated; the checkpoint's unless given"},
    "mask_id": _COUNT | {"help": "the mask token; the checkpoint's unless given"},
    "pad_id": _COUNT | {"help": "the padding token; the checkpoint's unless given"},
}


class Help(argparse.HelpFormatter):
    """Adds the defaults of DecodeParams. Getting them imports torch, which only the help of a subcommand waits for."""

    def _get_help_string(self, action):
        from ..config import DecodeParams

        default = None if action.dest in ("gen_length", "eos_early_stop") else getattr(DecodeParams, action.dest, None)
        return action.help if default is None or action.dest not in DECODING else f"{action.help} (default: {default})"


def add_model_options(parser):
    """Add the groups "model" and "decoding" to an argparse parser."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint folder or hub id; else the embedded model")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the hub id; else its main branch")
    group.add_argument("--dtype", help="bfloat16, float16 or float32; else the checkpoint's (embedded model: float32)")
    group.add_argument("--quantization", metavar="NAME", help="fp8: block-scaled fp8 weights; else the checkpoint's")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; else the GPU if there is one")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    group = parser.add_argument_group("decoding")
    for name, keywords in DECODING.items():
        aliases = ["--max-tokens"] if name == "gen_length" else []
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, *aliases, dest=name, default=argparse.SUPPRESS, **keywords)


def decoding(args):
    """generate()'s keyword arguments as asked for. ValueError for what no model allows."""
    given = {name: getattr(args, name) for name in DECODING if hasattr(args, name)}
    params(given)
    return {"eos_early_stop": True} | given


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
    model = LLaDA2Model.from_pretrained(folder, dtype, device, args.progress, args.quantization)
    choose_threads(model)
    return model, folder


def encode(tokenizer, messages):
    """A conversation -> token ids of the prompt for its next turn. ValueError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected --raw and prompts as the model saw them")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
