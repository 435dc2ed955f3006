"""llada2-fast generate | chat | doctor. Text goes to stdout; progress, statistics and errors go to stderr.

Exit codes: 0 done; 1 failed while running; 2 a mistake in what was asked for, told in one line; 130 interrupted.
torch and the model are imported when a command runs, so that mistakes in the arguments and --help answer at once.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict

from . import __version__

GEN_LENGTH = 256  # when neither an option nor the model's positions say less
QUESTION, ANSWER = "Add 847 and 96.", "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943."  # what doctor tries

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
    "seed": _COUNT | {"help": "of the draws; drawn itself unless given"},
    "profile": {"metavar": "NAME", "help": "default, hf-2.0 or hf-2.1: whose decoding rules to follow exactly"},
    "eos_early_stop": _SWITCH | {"help": "stop at the first end token (on)"},
    "attend_tail": _SWITCH | {"help": "denoise the last block whole"},
    "eos_id": _COUNT | {"action": "append", "help": "an end token, may be repeated; the checkpoint's unless given"},
    "mask_id": _COUNT | {"help": "the mask token; the checkpoint's unless given"},
    "pad_id": _COUNT | {"help": "the padding token; the checkpoint's unless given"},
}


def main(argv=None) -> int:
    """Run one command (argv: sys.argv[1:] unless given); returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as done:  # --help and --version
        return done.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing can be said there any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        return _error(error, 2)
    except (RuntimeError, OSError) as error:
        return _error(error, 1)


def _error(error, code):
    print("llada2-fast: error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class _Help(argparse.HelpFormatter):
    """Adds the defaults of DecodeParams. Getting them imports torch, which only the help of a subcommand waits for."""

    def _get_help_string(self, action):
        from .config import DecodeParams

        default = None if action.dest in ("gen_length", "eos_early_stop") else getattr(DecodeParams, action.dest, None)
        return action.help if default is None or action.dest not in DECODING else f"{action.help} (default: {default})"


def _parser():
    parser = _Parser(prog="llada2-fast", description="Text from LLaDA2 diffusion language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llada2-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run, name, text):
        added = commands.add_parser(name, help=text, description=text, formatter_class=_Help, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        return added

    generate = command(_generate, "generate", "Answer prompts, all in one batch.")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="- reads one from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the prompts as they are: no chat template")
    chat = command(_chat, "chat", "Talk over several turns: a line of stdin is one; /reset forgets, /exit ends.")
    command(_doctor, "doctor", "Say what is installed, what each op will run on, and whether the embedded model works.")
    for added in (generate, chat):
        _add_model_options(added)
    return parser


def _add_model_options(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint folder or hub id; else the embedded model")
    group.add_argument("--dtype", help="bfloat16, float16 or float32; else the checkpoint's (embedded model: float32)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; else the GPU if there is one")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    group = parser.add_argument_group("decoding")
    for name, keywords in DECODING.items():
        aliases = ["--max-tokens"] if name == "gen_length" else []
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, *aliases, dest=name, default=argparse.SUPPRESS, **keywords)


def _generate(args):
    if args.prompts.count("-") > 1:
        raise ValueError("prompts: stdin (-) can be read only once")
    options = _options(args)
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts]
    model, tokenizer = _load(args)
    if args.raw:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        rows = [_encode(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    for prompt, answer in zip(prompts, _answer(model, tokenizer, rows, options, args.progress), strict=True):
        print(json.dumps({"prompt": prompt} | answer) if args.json else answer["text"])
    return 0


def _chat(args):
    options, messages = _options(args), []
    model, tokenizer = _load(args)
    while line := _read_turn():
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = []
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            try:
                (answer,) = _answer(model, tokenizer, [_encode(tokenizer, turn)], options, args.progress)
            except ValueError as error:  # above all a conversation that has become too long: it can be reset
                _error(error, 2)
                continue
            messages = [*turn, {"role": "assistant", "content": answer["text"]}]
            print(json.dumps({"prompt": text} | answer) if args.json else answer["text"], flush=True)
    return 0


def _read_turn():
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _options(args):
    """generate()'s keyword arguments as asked for, checked before anything is loaded."""
    from .config import DecodeParams

    given = {name: getattr(args, name) for name in DECODING if hasattr(args, name)}
    checked = given | {"eos_ids": given.get("eos_id")}
    checked.pop("eos_id", None)
    DecodeParams(**checked)
    return {"eos_early_stop": True} | given


def _load(args):
    """(model, tokenizer) as the options say. ValueError if there is no such checkpoint, dtype or device."""
    from . import demo
    from .checkpoint import resolve
    from .config import DTYPES
    from .model import LLaDA2Model
    from .tokens import load_tokenizer

    dtype = "float32" if args.dtype is None and args.model is None else args.dtype
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    device = _device(args.device)
    folder = resolve(demo.path() if args.model is None else args.model)
    model = LLaDA2Model.from_pretrained(folder, dtype=DTYPES.get(dtype), device=device, progress=args.progress)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder}: no tokenizer.json; without a tokenizer there is no text")
    return model, load_tokenizer(folder)


def _device(name):
    import torch

    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError:
        raise ValueError(f"device={name!r}: expected a device such as cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _encode(tokenizer, messages):
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: expected --raw and prompts as the model saw them")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _answer(model, tokenizer, rows, options, progress):
    """One dict per row of prompt ids, as --json prints it; a line of statistics goes to stderr."""
    longest, positions = max(map(len, rows)), model.config.max_position_embeddings
    if longest >= positions:
        raise ValueError(f"prompt: {longest} tokens, expected fewer than the model's {positions} positions")
    options = {"gen_length": min(GEN_LENGTH, positions - longest)} | options
    started = time.perf_counter()
    output = model.generate(rows, return_dict=True, progress=progress, **options)
    seconds = time.perf_counter() - started
    answers = []
    for i, ids in enumerate(rows):
        count, counters = output.num_tokens[i], output.counters[i]
        new = output.sequences[i, :count].tolist()
        answers.append({
            "text": tokenizer.decode(new, skip_special_tokens=True), "token_ids": new, "prompt_tokens": len(ids),
            "num_tokens": count, "finish_reason": output.finish_reasons[i], **asdict(counters),
            "tokens_per_forward": count / max(1, counters.denoise_forwards), "batch_seconds": seconds,
        })  # fmt: skip
    tokens, forwards = sum(output.num_tokens), sum(counters.denoise_forwards for counters in output.counters)
    reasons = ", ".join(dict.fromkeys(output.finish_reasons))
    speed = f"TPF {output.tokens_per_forward:.2f}, {tokens / seconds:.1f} tokens/s"
    print(f"{tokens} tokens, {forwards} forwards, {speed}, finish reason: {reasons}", file=sys.stderr)
    return answers


def _doctor(args):
    device = _device(None)
    report = {
        "versions": _versions(),
        "devices": _devices(),
        f"ops on {device}": _ops(device),
        "embedded model": _try_embedded_model(device),
    }
    if args.json:
        print(json.dumps(report))
    else:
        for title, lines in report.items():
            print(title, *(f"  {name:<18} {value}" for name, value in lines.items()), sep="\n")
    return 0 if report["embedded model"]["answer"] == "right" else 1


def _versions():
    from importlib import metadata

    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    versions = {"llada2-fast": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "diffusers"):
        versions[name] = installed.get(name, "not installed")
    versions["kernels (of HF)"] = installed.get("kernels", "not installed")  # shares the name of our folder kernels/
    return versions


def _devices():
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    found["CUDA"] = torch.version.cuda or "torch is built without it"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{i}"] = f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} SMs, {memory}"
    return found


def _ops(device):
    """{op: what it runs on `device` and why}. An op is whatever has a reference, `<op>_ref`, in a file of kernels/."""
    from importlib import import_module
    from pkgutil import iter_modules

    import torch

    from . import kernels
    from .kernels import _triton

    decisions = {}
    for file in sorted(info.name for info in iter_modules(kernels.__path__)):
        module = import_module(f"{kernels.__name__}.{file}")
        for name in (name.removesuffix("_ref") for name in vars(module) if name.endswith("_ref")):
            if not callable(getattr(module, name, None)) or getattr(module, name).__module__ != module.__name__:
                continue  # a piece of other ops
            if not hasattr(module, "use_triton"):
                decisions[name] = "PyTorch: has no Triton kernel yet"
            elif module.use_triton(torch.empty(0, device=device)):
                decisions[name] = "Triton"
            else:
                decisions[name] = f"PyTorch: {'no GPU' if _triton.HAS_TRITON else 'Triton is not installed'}"
    return decisions


def _try_embedded_model(device):
    import torch

    from . import demo
    from .model import LLaDA2Model
    from .tokens import load_tokenizer

    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, device=device, progress=False)
    tokenizer = load_tokenizer(demo.path())
    ids = _encode(tokenizer, [{"role": "user", "content": QUESTION}])
    started = time.perf_counter()
    output = model.generate([ids], gen_length=64, eos_early_stop=True, return_dict=True)
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output.sequences[0, : output.num_tokens[0]], skip_special_tokens=True)
    return {
        "folder": demo.path(),
        "question": QUESTION,
        "answer": "right" if text == ANSWER else f"wrong: {text!r}, expected {ANSWER!r}",
        "speed": f"{output.num_tokens[0]} tokens in {seconds:.2f} s, {output.tokens_per_forward:.1f} per forward",
    }
