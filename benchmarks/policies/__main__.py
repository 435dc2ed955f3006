"""The decoding policies on anybody's checkpoint: accuracy against tokens per forward along each one's knob, and which
point to choose. compare.py says what the figures are, formulas.py what the policies.

    llada2-fast bench policies --model FOLDER --data FILE.jsonl [--match exact|contained]
    llada2-fast bench policies --model FOLDER --tasks gsm8k,... [--limit N] [--metric exact_match,strict-match]

--data: lines {"prompt": text, "answer": text}. A prompt is the turn of a chat unless --raw. An answer is right where
    its text, without special tokens and both stripped, is the line's answer (exact) or has it in it (contained).
--tasks: of lm-eval, whose answers are generated, with the chat template if the checkpoint has one; also the embedded
    model's own, llada2_demo. Accuracy is the task's metric, its first unless named.
--policies: those of the product unless named. The others were tried and left out; their steps forward all tokens anew,
    without a cache: with --data alone, and for small models. Policy self_speculative is for models that were trained
    token by token, too.

Everything is greedy: one run says all. `python -m benchmarks.quality --policies` does it for the embedded model.
"""

import argparse
from importlib.util import find_spec

from llada2_fast.cli import options as cli
from llada2_fast.config import DecodeParams
from llada2_fast.weights.special_tokens import load_tokenizer

from .. import harness
from . import compare, frontier, prompts, through_lm_eval

OWN = ("gen_length", "block_length")  # of the decoding options; the others are the policies' or what greedy has none of
BATCH = 16


class _Help(cli.Help, argparse.RawDescriptionHelpFormatter):
    """What DecodeParams says of decoding options, and the description as it is."""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    harness.add_options(parser)
    harness.add_plot_option(parser, "accuracy against tokens per forward")
    parser.add_argument("--data", metavar="FILE", help="JSON lines of prompts and answers")
    parser.add_argument("--match", choices=prompts.MATCHES, help="of --data (default: exact)")
    parser.add_argument("--raw", action="store_true", help="prompts of --data as they are: no chat template")
    parser.add_argument("--tasks", type=_names, metavar="NAME,...", help="lm-eval's; needs llada2-fast[eval]")
    parser.add_argument("--metric", metavar="NAME", help="of --tasks, with its filter")
    parser.add_argument("--limit", type=harness.positive, metavar="N", help="the first N lines, or documents of a task")
    parser.add_argument("--policies", type=_names, metavar="NAME,...", help=f"of {', '.join(compare.POLICIES)}")
    parser.add_argument("--batch-size", type=harness.positive, default=BATCH, metavar="N", help="prompts at a time")
    cli.add_model_options(parser, without=[name for name in cli.DECODING if name not in OWN])
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "bench-policies")
    _check(parser, options)
    named = options.policies or [name for name, policy in compare.POLICIES.items() if policy.arguments]
    facts = {"data": options.data, "tasks": options.tasks, "limit": options.limit}
    points, device, told = (_on_tasks if options.tasks else _on_data)(options, named)
    result = facts | told | {"check_cost": round(frontier.check_cost(), 3)}
    result["policies"] = compare.entries(cli.model_name(options.model), points)
    result["goals"] = compare.goals(result["policies"])
    print(compare.table(result["policies"]))
    if options.plot:
        with harness.drawing(options.plot) as axes:
            compare.draw(result["policies"], axes)
    harness.finish("bench-policies", options, result, device)


def _names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(parser, options):
    """Ends with the parser's error for options that do not go together."""
    if (options.data is None) == (not options.tasks):
        parser.error("expected --data FILE or --tasks NAME,...")
    for name in options.policies or ():
        policy = compare.POLICIES.get(name)
        if policy is None:
            parser.error(f"--policies {name}: expected some of {', '.join(compare.POLICIES)}")
        if options.tasks and policy.arguments is None:
            parser.error(f"--policies {name}: expected --data with it, it is not in the product")
    for name, value in (("raw", options.raw), (f"match {options.match}", options.match)):
        if options.tasks and value:
            parser.error(f"--{name}: expected --data with it")
    if options.data is not None and options.metric is not None:
        parser.error(f"--metric {options.metric}: expected --tasks with it")
    if options.tasks and find_spec("lm_eval") is None:
        parser.error('--tasks: needs lm-eval: pip install "llada2-fast[eval]"')


def _decoding(options):
    return {name: getattr(options, name) for name in OWN if hasattr(options, name)}


def _on_data(options, named):
    pairs, decoding = prompts.read(options.data, options.limit), cli.decoding(options)
    model, folder = cli.load_model(options)
    match = options.match or "exact"
    work = prompts.work_of(pairs, load_tokenizer(folder), match, options.raw, 0, options.batch_size)
    work = work._replace(gen_length=cli.fit(decoding, model, work.prompts)["gen_length"])
    length = decoding.get("block_length")
    points = compare.measure(model, work, named, options.quick, length, options.progress)
    return points, model.device, {"match": match, "prompts": len(pairs), "gen_length": work.gen_length}


def _on_tasks(options, named):
    DecodeParams(**_decoding(options))
    arguments = {
        "pretrained": options.model, "revision": options.revision, "dtype": options.dtype or "auto",
        "device": options.device, "quantization": options.quantization, "exact": options.exact,
        "batch_size": options.batch_size,
    }  # fmt: skip
    points, metrics, device = through_lm_eval.measure(
        arguments | _decoding(options), options.tasks, named, options.quick, options.limit, options.metric,
        options.progress,
    )  # fmt: skip
    return points, device, {"metrics": metrics}


if __name__ == "__main__":
    main()
