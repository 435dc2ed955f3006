"""Exact match and tokens per forward (TPF) where tokens are drawn, by the rules of how sure a drawn token is:

    own     its probability in the model's own softmax, at temperature 1 among all tokens: what generate() does
    drawn   its probability among what it is drawn from, after temperature, top-k and top-p: the model cards' and
            diffusers' rule, here by profile hf-2.0
    single  own, with one token a step: what the draws cost by themselves, whatever the rule

    python -m benchmarks.sampling [--model PATH ...] [--n PROMPTS] [--json] [--save]

Models: the embedded one and, in a checkout, the less trained sibling of the tests: its training at step 2500 of 9000,
before the cooldown (`python -m llada2_fast.demo.train --undertrained FOLDER`). Prompts and answers are those of
benchmarks.quality, float32, no editing; every draw comes from the seed of the prompts, so that all figures are exact.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from llada2_fast import LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness, quality

RULES = {"own": {}, "drawn": {"profile": "hf-2.0"}, "single": {"threshold": quality.NEVER}}  # -> arguments
TITLES = {"own": "the model's own softmax", "drawn": "probability of the draw", "single": "one token a step"}
THRESHOLD = 0.9
DRAWS = (  # temperature, top_k, top_p
    (0.0, None, None), (0.1, None, None), (0.3, None, None), (0.7, None, None), (1.0, None, None), (1.0, 1, None),
    (1.0, None, 0.1),
)  # fmt: skip
QUICK_DRAWS = DRAWS[:2]
SIBLING = harness.ROOT / "tests" / "data" / "undertrained"


class Setting(NamedTuple):
    """How prompts are decoded: `rule` is a key of RULES, the others are arguments of generate()."""

    temperature: float
    top_k: int | None
    top_p: float | None
    rule: str

    def arguments(self):
        """Arguments of generate()."""
        own = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": tasks.SEED}
        return quality.ENDING | own | {"threshold": THRESHOLD} | RULES[self.rule]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser)
    quality.add_prompts_option(parser)
    add_model_option(parser)
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "sampling")
    n = options.n or (24 if options.quick else tasks.PROMPTS)
    settings = [Setting(*draw, rule) for draw in (QUICK_DRAWS if options.quick else DRAWS) for rule in RULES]
    draws = [entry for model in checkpoints(options.model) for entry in entries(*model, n, settings)]
    result = {"threshold": THRESHOLD, "prompts_per_task": n, "seed": tasks.SEED, "draws": draws}
    print(table(result))
    harness.finish("sampling", options, result)


def add_model_option(parser):
    parser.add_argument("--model", action="append", metavar="PATH", help="instead of both; may be repeated")


def checkpoints(paths):
    """[(name, path)] of the models given, or of the embedded one and, in a checkout, its less trained sibling."""
    paths = paths or [demo.path(), *([str(SIBLING)] if harness.IN_CHECKOUT else [])]
    return [("embedded" if path == demo.path() else Path(path).name, path) for path in paths]


def entries(name, path, n, settings):
    """A dict for each draw of the settings: the model's name, the draw, and {rule: {"accuracy", "tpf", "tasks"}}, where
    tasks has the accuracy of each."""
    model = LLaDA2Model.from_pretrained(path, dtype=torch.float32, progress=False)
    found = {}
    for setting, by_task in quality.measure(model, load_tokenizer(path), n, settings).items():
        *draw, rule = setting
        entry = found.setdefault(tuple(draw), {"model": name} | dict(zip(Setting._fields, draw, strict=False)))
        accuracies = {task: round(accuracy, 4) for task, (accuracy, _) in by_task.items()}
        entry[rule] = quality.figures(quality.mean(by_task)) | {"tasks": accuracies}
    return list(found.values())


def draw_of(entry):
    """What a draw is called in a table."""
    narrowed = [f"{name} {entry[name]:g}" for name in ("top_k", "top_p") if entry[name] is not None]
    return ", ".join([f"temperature {entry['temperature']:g}", *narrowed])


def table(result):
    """A line of text per model and draw."""
    head = "".join(f"{f'{rule}: exact match, TPF':>28}" for rule in RULES)
    lines = [f"{'model':<16}{'draw':<30}{head}"]
    for entry in result["draws"]:
        cells = "".join(f"{entry[rule]['accuracy']:>20.3f}, {entry[rule]['tpf']:6.2f}" for rule in RULES)
        lines.append(f"{entry['model']:<16}{draw_of(entry):<30}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
