"""Quality against speed of the embedded model: exact match, tokens per forward (TPF) and tokens/s on prompts held out
of its training. `python -m benchmarks.quality --json` ends with one JSON line; `--plot FILE` draws it; `--variant 2.2`
measures the one that was trained as a LLaDA2.2, `--quantization int4` (or fp8) either with such weights; `--policies`
compares the decoding policies instead (policies/compare.py), on the less trained siblings, too.

    thresholds   committed is what is more confident; with and without editing, of finished blocks, too (window), at the
                 block length of the training; a LLaDA2.2 edits by deleting and inserting, too, and has no window
    blocks       the same without editing at half and at twice that length, which the model has never seen
    schedule     no threshold: a block in a fixed number of steps, the most confident positions first

Greedy, float32, end token honoured. TPF = tokens up to and with the end token / denoise forwards; prefill and settling
forwards do not count. The prompts are drawn with a seed that neither training nor its own evaluation uses. Accuracy and
TPF are exact. Tokens/s are not: a few prompts, decoded one by one, each setting in turn, the median of several rounds.
"""

import argparse
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from llada2_fast import DecodeParams, LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness
from .counts import launches

THRESHOLDS, QUICK_THRESHOLDS = (0.95, 0.9, 0.7, 0.5), (0.9, 0.5)
SCHEDULES, QUICK_SCHEDULES = (8, 4, 2, 1), (8, 4)  # positions that a step commits where there is no threshold
EDITING = {  # name -> what generate() is given beside the threshold
    "off": {},
    "0.9, 16 post steps": {"editing_threshold": 0.9, "max_post_steps": 16},
    "0.5, 16 post steps": {"editing_threshold": 0.5, "max_post_steps": 16},
    "0.5, 0 post steps": {"editing_threshold": 0.5, "max_post_steps": 0},
    "0.9, 0 post steps, window 1": {"editing_threshold": 0.9, "max_post_steps": 0, "edit_window": 1},
    "0.9, 0 post steps, window 2": {"editing_threshold": 0.9, "max_post_steps": 0, "edit_window": 2},
}
GEN_LENGTH = 128  # the longest right answer, a story, has 56 tokens
ENDING = {"gen_length": GEN_LENGTH, "eos_early_stop": True, "return_dict": True}  # arguments of generate() everywhere
NEVER = 2.0  # a threshold that no confidence exceeds


class Setting(NamedTuple):
    """How prompts are decoded. threshold None: none, so that `steps` alone says how many positions a step commits."""

    threshold: float | None
    editing: str  # a key of EDITING
    block_length: int
    steps: int = DecodeParams.steps

    def arguments(self):
        """Arguments of generate()."""
        threshold = NEVER if self.threshold is None else self.threshold
        own = {"threshold": threshold, "block_length": self.block_length, "steps": self.steps}
        return ENDING | own | EDITING[self.editing]


def settings_of(block_length, quick=False, windows=True):
    """All settings that are measured for a model trained with this block length; windows: it may have them."""
    thresholds, schedules = (QUICK_THRESHOLDS, QUICK_SCHEDULES) if quick else (THRESHOLDS, SCHEDULES)
    blocks = [length for length in (block_length // 2, 2 * block_length) if length]
    edits = [name for name, rules in EDITING.items() if windows or "edit_window" not in rules]
    steps = sorted({max(1, block_length // tokens) for tokens in schedules})
    return [
        *(Setting(threshold, edit, block_length) for threshold in thresholds for edit in edits),
        *(Setting(threshold, "off", length) for length in blocks for threshold in thresholds),
        *(Setting(None, "off", block_length, count) for count in steps),
    ]


def headline_of(block_length):
    """The setting whose figures stand for the model."""
    return Setting(0.9, "off", block_length)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser)
    add_prompts_option(parser)
    parser.add_argument(
        "--variant", default="2.1", choices=demo.FOLDERS, help="which embedded model (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="PATH", help="another checkpoint with the same tokenizer")
    parser.add_argument("--quantization", metavar="NAME", help="fp8 or int4; else the checkpoint's")
    parser.add_argument("--device", default="cpu")
    harness.add_plot_option(parser, "accuracy against speed")
    parser.add_argument(
        "--policies",
        action="store_true",
        help="compare the decoding policies, by 200 prompts per task, with --quick 48",
    )
    options = parser.parse_args(argv)
    if options.policies:
        return compare_policies(parser, options)
    name = "quality" if options.variant == "2.1" else f"quality-{options.variant}"
    harness.check_save(parser, options, name)
    path = options.model or demo.path(options.variant)
    model = LLaDA2Model.from_pretrained(
        path, torch.float32, options.device, progress=False, quantization=options.quantization
    )
    tokenizer = load_tokenizer(path)
    n = options.n or (24 if options.quick else tasks.PROMPTS)
    settings = settings_of(model.block_length, options.quick, windows=model.config.delete_token_id is None)
    scores = measure(model, tokenizer, n, settings)
    speed = {"prompts_per_task": min(n, 1 if options.quick else 4), "rounds": 1 if options.quick else 5}
    rates = tokens_per_second(model, tokenizer, settings, **speed)
    result = summary(scores, rates, model.block_length) | {"prompts_per_task": n, "speed": speed}
    if model.config.quantization is not None:
        result |= {"quantization": model.config.quantization}
    moving = model.config.delete_token_id is not None
    with torch.inference_mode():  # at the real size without data, which no host sync would survive
        result |= {"launches": len(launches("greedy", edits=moving)), "host_syncs": 0}
    print(table(result))
    print(f"a refinement step of the kernels: {result['launches']} launches, {result['host_syncs']} host syncs")
    if options.plot:
        with harness.drawing(options.plot, ncols=2, figsize=(13, 5), sharey=True) as panels:
            draw(result, panels[0], "tok_s")
            draw(result, panels[1], "tpf")
            panels[1].get_legend().remove()
    harness.finish(name, options, result, options.device)


def compare_policies(parser, options):
    from .policies import demo as of_policies  # it stands on this module

    if options.variant != "2.1" or options.quantization:
        parser.error("--policies: expected neither --variant nor --quantization")
    harness.check_save(parser, options, "policies")
    of_policies.run(options)


def add_prompts_option(parser):
    text = f"prompts per task (default: {tasks.PROMPTS}, with --quick 24)"
    parser.add_argument("--n", type=harness.positive, metavar="N", help=text)


def measure(model, tokenizer, n, settings, progress=True):
    """{setting: {task: (accuracy, TPF)}} over `n` held-out prompts per task, one batch each."""
    prompts = {task: tasks.sample(task, n, tasks.SEED) for task in tasks.TASKS}
    rows = {task: encode(tokenizer, prompts[task]) for task in tasks.TASKS}
    scores = {setting: {} for setting in settings}
    with tqdm(total=len(scores) * len(tasks.TASKS), desc="Quality", unit="batch", disable=not progress) as bar:
        for setting, by_task in scores.items():
            for task in tasks.TASKS:
                output = model.generate(rows[task], **setting.arguments())
                right = [
                    tasks.check(task, *pair) for pair in zip(prompts[task], decode(tokenizer, output), strict=True)
                ]
                by_task[task] = (sum(right) / n, output.tokens_per_forward)
                bar.update()
    return scores


def tokens_per_second(model, tokenizer, settings, prompts_per_task, rounds, progress=True):
    """{setting: tokens/s} of prompts decoded one by one; in every round each setting has its turn."""
    rows = [row for task in tasks.TASKS for row in encode(tokenizer, tasks.sample(task, prompts_per_task, tasks.SEED))]

    def decode_all(setting):
        return sum(model.generate([row], **setting.arguments()).num_tokens[0] for row in rows)

    tokens = [decode_all(setting) for setting in tqdm(settings, desc="Warm-up", unit="setting", disable=not progress)]
    with tqdm(total=rounds * len(settings), desc="Tokens/s", unit="run", disable=not progress) as bar:

        def timed(setting):
            decode_all(setting)
            bar.update()

        seconds = harness.timed_rounds([lambda s=setting: timed(s) for setting in settings], rounds)
    return {setting: count / s for setting, count, s in zip(settings, tokens, seconds, strict=True)}


def encode(tokenizer, prompts):
    """A list of token ids per prompt, each as the only turn of a chat."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def decode(tokenizer, output):
    """Answers without their end token; other special tokens stay, and make an answer wrong."""
    for ids, count, reason in zip(output.sequences, output.num_tokens, output.finish_reasons, strict=True):
        yield tokenizer.decode(ids[: count - (reason == "eos")], skip_special_tokens=False)


def mean(by_task):
    """(accuracy, TPF) over tasks with equally many prompts: the plain mean, and the mean over tasks of TPF."""
    return tuple(sum(score[i] for score in by_task.values()) / len(by_task) for i in (0, 1))


def figures(score):
    """(accuracy, TPF) as they stand in a JSON line."""
    return {"accuracy": round(score[0], 4), "tpf": round(score[1], 3)}


def summary(scores, rates, block_length):
    """What the JSON line says: the headline's figures, then those of all settings. block_length: the model's own."""
    entries = {}
    for setting, by_task in scores.items():
        by_name = {name: figures(score) for name, score in by_task.items()}
        own = figures(mean(by_task)) | {"tok_s": round(rates[setting], 1), "tasks": by_name}
        entries[setting] = setting._asdict() | own
    return entries[headline_of(block_length)] | {"settings": list(entries.values())}


def mode_of(entry, block_length):
    """The line of the plot that an entry of "settings" is a point of."""
    if entry["threshold"] is None:
        return "fixed schedule (steps per block)"
    if entry["block_length"] != block_length:
        return f"blocks of {entry['block_length']}, editing off"
    return "editing off" if entry["editing"] == "off" else f"editing {entry['editing']}"


def modes(result):
    """{mode: its entries} of a JSON line or of summary()."""
    found = {}
    for entry in result["settings"]:
        found.setdefault(mode_of(entry, result["block_length"]), []).append(entry)
    return found


def label_of(entry):
    """What tells the points of a mode apart: the threshold, or how many steps a block takes."""
    return f"{entry['steps']} steps" if entry["threshold"] is None else f"{entry['threshold']:g}"


def table(result):
    """Accuracy / TPF by task as text, a line per setting, and tokens/s."""
    names = (*tasks.TASKS, "mean")
    lines = [f"{'mode':<38}{'threshold':<10}" + "".join(f"{name:>14}" for name in names) + f"{'tok/s (noisy)':>15}"]
    for mode, entries in modes(result).items():
        for entry in entries:
            cells = [f"{score['accuracy']:.3f} /{score['tpf']:5.2f}" for score in (*entry["tasks"].values(), entry)]
            row = "".join(f"{cell:>14}" for cell in cells)
            lines.append(f"{mode:<38}{label_of(entry):<10}{row}{entry['tok_s']:>15.0f}")
    return "\n".join(lines)


SPEEDS = {"tok_s": "tokens/s, one prompt at a time (noisy)", "tpf": "tokens per forward (exact)"}
TICKS = (1, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0)  # of accuracy: most of what there is to see is near 1


def draw(result, axes, speed="tok_s"):
    """Draw a JSON line, or the settings and block_length of one: accuracy by speed, a line per mode, its thresholds."""
    marks = ("o-", "s--", "x:", "P:", "X:", "v-", "^-", "D-.")
    near = max(entry[speed] for entry in result["settings"]) / 20
    for i, (mode, entries) in enumerate(modes(result).items()):
        points = [(entry[speed], 1 - entry["accuracy"]) for entry in entries]
        axes.plot(*zip(*points, strict=True), marks[i % len(marks)], color=f"C{i}", label=mode, markersize=5)
        labels = {}  # points that lie together share one
        for (x, y), entry in zip(points, entries, strict=True):
            labels.setdefault((x // near, round(y, 2)), (x, y, []))[2].append(label_of(entry))
        for x, y, names in labels.values():
            style = {"color": f"C{i}", "fontsize": 7, "textcoords": "offset points"}
            axes.annotate(", ".join(names), (x, y), xytext=((4, 4), (4, 4), (4, -10), (-20, -12))[i % 4], **style)
    axes.set_yscale("symlog", linthresh=0.02)
    axes.set_yticks([1 - tick for tick in TICKS], [f"{tick:g}" for tick in TICKS])
    axes.set_ylim(max([1 - e["accuracy"] for e in result["settings"]]) * 1.2 + 0.01, -0.003)
    axes.set(xlabel=SPEEDS[speed], ylabel="exact match, mean of five tasks")
    axes.grid(alpha=0.3)
    axes.legend(title=f"thresholds by mode; trained with blocks of {result['block_length']}", fontsize=8)


if __name__ == "__main__":
    main()
