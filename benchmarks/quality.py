"""How right and how fast the embedded model is: exact match and tokens per forward (TPF) on prompts held out of its
training, by task, threshold and editing. `python -m benchmarks.quality --json` ends with one JSON line.

Greedy, float32, end token honoured. TPF = tokens up to and with the end token / denoise forwards; prefill and settling
forwards do not count. The prompts are drawn with a seed that neither training nor its own evaluation uses.
"""

import argparse
from importlib.util import find_spec

import torch
from tqdm.auto import tqdm

from benchmarks import harness
from llada2_fast import LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.tokens import load_tokenizer

THRESHOLDS = (0.95, 0.9, 0.7, 0.5)
EDITING = {  # name -> what generate() is given beside the threshold
    "off": {},
    "0.9, 16 post steps": {"editing_threshold": 0.9, "max_post_steps": 16},
    "0.5, 0 post steps": {"editing_threshold": 0.5, "max_post_steps": 0},
}
HEADLINE = (0.9, "off")
GEN_LENGTH = 128  # the longest right answer, a story, has 56 tokens
SEED = 20


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser)
    parser.add_argument("--n", type=int, help="prompts per task, 120 or with --quick 24 unless given")
    parser.add_argument(
        "--model", default=demo.path(), metavar="PATH", help="another checkpoint with the same tokenizer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", metavar="FILE", help="draw accuracy against TPF; needs llada2-fast[plot]")
    options = parser.parse_args(argv)
    if options.n is not None and options.n < 1:
        parser.error(f"--n {options.n}: expected at least 1")
    if options.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install llada2-fast[plot]")
    model = LLaDA2Model.from_pretrained(options.model, dtype=torch.float32, device=options.device, progress=False)
    tokenizer = load_tokenizer(options.model)
    n = options.n or (24 if options.quick else 120)
    scores = measure(model, tokenizer, n)
    print(table(scores))
    if options.plot:
        plot(scores, options.plot)
    harness.finish("quality", options, summary(scores, n), options.device)


def measure(model, tokenizer, n, thresholds=THRESHOLDS, editing=tuple(EDITING), progress=True):
    """{(threshold, editing): {task: (accuracy, TPF)}} over `n` held-out prompts per task, one batch each."""
    prompts = {task: tasks.sample(task, n, SEED) for task in tasks.TASKS}
    rows = {task: encode(tokenizer, prompts[task]) for task in tasks.TASKS}
    settings = [(threshold, edit) for threshold in thresholds for edit in editing]
    scores = {setting: {} for setting in settings}
    with tqdm(total=len(settings) * len(tasks.TASKS), desc="Quality", unit="batch", disable=not progress) as bar:
        for threshold, edit in settings:
            for task in tasks.TASKS:
                output = model.generate(
                    rows[task], gen_length=GEN_LENGTH, threshold=threshold, eos_early_stop=True, return_dict=True,
                    **EDITING[edit],
                )  # fmt: skip
                right = [
                    tasks.check(task, *pair) for pair in zip(prompts[task], decode(tokenizer, output), strict=True)
                ]
                scores[threshold, edit][task] = (sum(right) / n, output.tokens_per_forward)
                bar.update()
    return scores


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


def table(scores):
    """Accuracy / TPF as text, a line per setting."""
    lines = [f"{'threshold':<10}{'editing':<20}" + "".join(f"{name:>14}" for name in (*tasks.TASKS, "mean"))]
    for (threshold, edit), by_task in scores.items():
        cells = [f"{accuracy:.3f} /{tpf:5.2f}" for accuracy, tpf in (*by_task.values(), mean(by_task))]
        lines.append(f"{threshold:<10}{edit:<20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def summary(scores, n):
    """What the JSON line says: the headline's figures, then all settings by task."""

    def figures(score):
        return {"accuracy": round(score[0], 4), "tpf": round(score[1], 3)}

    settings = []
    for (threshold, edit), by_task in scores.items():
        by_name = {name: figures(score) for name, score in by_task.items()}
        settings.append({"threshold": threshold, "editing": edit} | figures(mean(by_task)) | {"tasks": by_name})
    headline = {"threshold": HEADLINE[0], "editing": HEADLINE[1]} | figures(mean(scores[HEADLINE]))
    by_name = {name: figures(score) for name, score in scores[HEADLINE].items()}
    return headline | {"tasks": by_name, "prompts_per_task": n, "settings": settings}


def plot(scores, file):
    """Accuracy against TPF, a line per kind of editing, a point per threshold, to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for edit, style in zip(EDITING, ("o-", "s--", "x:"), strict=True):
        points = {threshold: mean(by_task) for (threshold, kind), by_task in scores.items() if kind == edit}
        axes.plot([tpf for _, tpf in points.values()], [right for right, _ in points.values()], style, label=edit)
        for threshold, (accuracy, tpf) in points.items():
            axes.annotate(f"{threshold:g}", (tpf, accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("exact match, mean of five tasks")
    axes.legend(title="editing threshold")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
