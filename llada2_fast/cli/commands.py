"""llada2-fast generate | chat | serve | bench | doctor. Text goes to stdout; progress, statistics and errors
go to stderr.

Exit codes: 0 done; 1 failed while running; 2 a mistake in what was asked for, told in one line; 130 interrupted.
torch and the model are imported when a command runs, so that mistakes in the arguments and --help answer at once.
"""

import argparse
import codecs
import contextlib
import json
import os
import sys
from importlib import import_module

from .. import __version__
from . import traced
from .answers import answer
from .doctor import doctor
from .machine import prepare
from .options import Help, add_model_options, decoding, encode, load_model
from .serve import add_options as add_server_options
from .serve import serve

# The benchmarks by the names of `llada2-fast bench`: module of llada2_fast.benchmarks, what it measures.
BENCHMARKS = {
    "throughput": ("bench_throughput", "many requests through the engine: tokens/s and latencies under load; --peers"),
    "latency": ("bench_latency", "one batch through generate(): time to the first block, per block, per forward"),
    "host": ("bench_host", "what the engine's host does: per admitted token, per step, and beside busy clients"),
    "serve": ("bench_serve", "many requests to a server of OpenAI's API: tokens/s and latencies; --against-engine"),
    "kernels": ("kernels.__main__", "every op against its reference"),
    "quality": ("quality", "the embedded model's right answers against its tokens per forward"),
    "policies": ("policies.__main__", "right answers against tokens per forward by decoding policy, on any checkpoint"),
    "sampling": ("sampling", "the embedded model's right answers when tokens are drawn"),
    "structured": ("bench_structured", "answers in a language: valid, as right as free ones, and what they cost"),
    "decode": ("bench_decode", "side by side with diffusers on the same weights"),
    "soak": ("soak", "minutes of an AsyncEngine under everything at once: right answers, nothing left behind"),
    "chaos": ("chaos.__main__", "the server under everything that clients do wrong: its scorecard"),
    "layer": ("bench_layer", "one layer of LLaDA2-mini's shape on a CPU, against its memory's bandwidth"),
    "refine": ("kernels.bench_refine", "the refinement step against diffusers' scheduler"),
}


def main(argv=None) -> int:
    """Run one command (argv: sys.argv[1:] unless given); returns the exit code."""
    prepare()
    _never_lose_output()
    with contextlib.redirect_stderr(_Aside(sys.stderr)):
        if sys.stdout is None:
            return _error("stdout is closed: expected a file, a pipe or a terminal for the text", 2)
        code = _run(argv)
        try:
            sys.stdout.flush()
        except OSError as error:  # what is still in its buffer would fail once more when Python ends
            _discard(sys.stdout)
            return code or (1 if isinstance(error, BrokenPipeError) else _error(error, 1))
        return code


def _run(argv):
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except SystemExit as done:  # --help, --version, and what a benchmark says when it stops
        return _error(done.code, 1) if isinstance(done.code, str) else done.code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing can be said there any more
        return 1
    except (ValueError, ModuleNotFoundError) as error:
        return _error(error, 2)
    except (RuntimeError, OSError) as error:
        return _error(error, 1)


def _never_lose_output():
    """Write what stdout's encoding lacks as "?". stderr does as much by itself."""
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


class _Aside:
    """stderr; nothing where it is closed or nobody takes what is written. That must not cost an answer."""

    def __init__(self, stream):
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._try(self._stream.write, text)

    def flush(self):
        return self._try(self._stream.flush)

    def _try(self, act, *text):
        try:
            return act(*text)
        except OSError:
            _discard(self._stream)


def _discard(stream):
    """Let what is written to a broken stream vanish from now on, what it still holds included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _error(error, code):
    print("llada2-fast: error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message if len(message) <= 200 else f"{message[:200]}...")  # it may quote a whole prompt


def _parser(argv):
    """argv: only the options of the command in question are looked up where that imports torch."""
    parser = _Parser(prog="llada2-fast", description="Text from LLaDA2 diffusion language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llada2-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run, name, text, prints_json=True):
        added = commands.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False)
        added.set_defaults(run=run)
        if prints_json:
            added.add_argument("--json", action="store_true", help="print JSON instead of text")
        return added

    generate = command(_generate, "generate", "Answer prompts, all in one batch.")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="UTF-8 text; - reads one from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the prompts as they are: no chat template")
    generate.add_argument("--trace", metavar="FILE", help="write every step: as a page (.html) or as .json")
    generate.add_argument("--watch", action="store_true", help="show one prompt's answer as it comes about")
    generate.add_argument(
        "--canvas", metavar="TEXT", help="the answer with gaps, {gap:N} for N tokens; a language holds for each gap"
    )
    chat = command(_chat, "chat", "Talk over several turns: a line of stdin is one; /reset forgets, /exit ends.")
    command(doctor, "doctor", "Say what is installed, what each op will run on, and whether the embedded model works.")
    for added in (generate, chat):
        add_model_options(added)
    served = command(serve, "serve", "Serve a model over HTTP, as OpenAI's API, with a playground.", prints_json=False)
    served.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id; else the embedded model"
    )
    if argv[:1] == ["serve"]:
        add_server_options(served)
    listed = "\n".join(f"  {name:<12}{what}" for name, (_, what) in BENCHMARKS.items())
    bench = commands.add_parser(
        "bench", help="Measure speed and quality.", description=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    bench.set_defaults(run=_bench)
    bench.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="one of those above")
    own = "options of its own: llada2-fast bench BENCHMARK --help"
    bench.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help=own)
    return parser


def _generate(args):
    if args.prompts.count("-") > 1:
        raise ValueError("prompts: stdin (-) can be read only once")
    options = decoding(args)
    if args.canvas is not None and "gen_length" in options:
        raise ValueError(
            f"gen_length={options['gen_length']}: expected none beside --canvas, which is as long as it is"
        )
    traced.check(args.trace, args.watch, args.prompts)
    canvas = None if args.canvas is None else _checked(args.canvas, "canvas")
    prompts = [_read_stdin() if prompt == "-" else _checked(prompt) for prompt in args.prompts]
    model, tokenizer = _load(args)
    if args.raw:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    else:
        rows = [encode(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    if canvas is not None:
        options |= _canvas(canvas, tokenizer)
    if args.trace is None and not args.watch:
        answers, documents, printed = answer(model, tokenizer, rows, options, args.progress), [], False
    else:
        answers, documents, printed = traced.answer(model, tokenizer, prompts, rows, options, args)
    for prompt, one in zip(prompts, answers, strict=True):
        if not printed:
            print(json.dumps({"prompt": prompt} | one) if args.json else one["text"])
    if documents:
        traced.write(args.trace, documents)
    return 0


def _canvas(text, tokenizer):
    """generate()'s keyword arguments for a canvas that is a text."""
    from ..structured import parse_canvas

    ids = parse_canvas(text, tokenizer)
    return {"canvas": ids, "gen_length": len(ids)}


def _chat(args):
    options, messages, lines = decoding(args), [], _turns(_stdin())
    model, tokenizer = _load(args)
    for line in lines:
        try:
            text = _decoded(line).strip()
        except ValueError as error:
            _error(error, 2)
            continue
        if text == "/exit":
            break
        if text == "/reset":
            messages = []
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            try:
                (one,) = answer(model, tokenizer, [encode(tokenizer, turn)], options, args.progress)
            except ValueError as error:  # above all a conversation that has become too long: it can be reset
                _error(error, 2)
                continue
            messages = [*turn, {"role": "assistant", "content": one["text"]}]
            print(json.dumps({"prompt": text} | one) if args.json else one["text"], flush=True)
    return 0


def _bench(args):
    sys.argv[0], invoked = f"llada2-fast bench {args.benchmark}", sys.argv[0]  # its parser calls itself so
    try:
        return import_module(f"llada2_fast.benchmarks.{BENCHMARKS[args.benchmark][0]}").main(args.options) or 0
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: bench {args.benchmark} needs pip install "llada2-fast[test]"') from error
    finally:
        sys.argv[0] = invoked


def _checked(prompt, name="prompt"):
    """An argument as text. Bytes for which the locale has no characters may be UTF-8 all the same."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        try:
            return _decoded(os.fsencode(prompt), name)
        except UnicodeEncodeError:  # a lone surrogate that stands for no byte
            raise ValueError(f"{name}: no valid UTF-8: {prompt[error.start]!r} at position {error.start}") from None
    return prompt


def _decoded(data, name="prompt"):
    """A text of UTF-8 bytes, or of text if stdin has no bytes."""
    if isinstance(data, str):
        return _checked(data, name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise ValueError(f"{name}: no valid UTF-8: {where}") from None


def _stdin():
    """stdin's bytes, whatever encoding Python has chosen for them. ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("stdin is closed: expected text there")
    return getattr(sys.stdin, "buffer", sys.stdin)


def _read_stdin():
    return _decoded(_unmarked(_stdin().read())).replace("\r\n", "\n").rstrip("\n")


def _turns(stdin):
    """Its lines, as bytes or text."""
    first = True
    while True:
        if stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.readline()
        if not line:
            return
        yield _unmarked(line) if first else line
        first = False


def _unmarked(data):
    """The beginning of a file, bytes or text, without the byte order mark that some programs put there."""
    return data.removeprefix("\ufeff" if isinstance(data, str) else codecs.BOM_UTF8)


def _load(args):
    """(model, tokenizer) as the options say."""
    from ..weights.special_tokens import load_tokenizer

    model, folder = load_model(args)
    return model, load_tokenizer(folder)
