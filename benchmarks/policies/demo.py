"""The policies on the embedded model's tasks: `python -m benchmarks.quality --policies`."""

import torch

from llada2_fast import LLaDA2Model
from llada2_fast.demo import tasks
from llada2_fast.weights.special_tokens import load_tokenizer

from .. import harness, quality, sampling
from . import compare, frontier

PROMPTS, QUICK_PROMPTS = 200, 48  # of each task: what tells policies apart is a point or two of accuracy
MIXED = harness.ROOT / "tests" / "data" / "mixed"  # trained on blocks of several lengths, 1 among them


def checkpoints(path):
    """[(name, path)] of the model given, or of the embedded one and, in a checkout, its two siblings."""
    named = sampling.checkpoints([path] if path else None)
    return named + ([(MIXED.name, str(MIXED))] if harness.IN_CHECKOUT and not path else [])


def work_of(tokenizer, n):
    """`n` held-out prompts of each task."""
    prompts = [(task, prompt) for task in tasks.TASKS for prompt in tasks.sample(task, n, tasks.SEED)]

    def is_right(place, ids):
        return tasks.check(*prompts[place], tokenizer.decode(ids, skip_special_tokens=False))

    return compare.Work(quality.encode(tokenizer, [prompt for _, prompt in prompts]), quality.GEN_LENGTH, is_right)


def run(options):
    """options: of benchmarks.quality."""
    torch.set_num_threads(1)
    n, found = options.n or (QUICK_PROMPTS if options.quick else PROMPTS), []
    for name, path in checkpoints(options.model):
        model = LLaDA2Model.from_pretrained(path, torch.float32, options.device, progress=False)
        work = work_of(load_tokenizer(path), n)
        found += compare.entries(name, compare.measure(model, work, list(compare.POLICIES), options.quick))
    result = {
        "prompts_per_task": n, "seed": tasks.SEED, "check_cost": round(frontier.check_cost(), 3),
        "goals": compare.goals(found), "policies": found,
    }  # fmt: skip
    print(compare.table(found))
    if options.plot:
        with harness.drawing(options.plot) as axes:
            compare.draw(found, axes)
    harness.finish("policies", options, result, options.device)
