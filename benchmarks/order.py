"""The order in which an answer came about: which positions were written at which step, how sure, and what was edited.

    python -m benchmarks.order [--prompt TEXT] [--out FILE] [--threshold P] [--editing-threshold P]

Decodes a prompt with the embedded model, greedily, prints a line per step and draws positions against steps. In the
lines `·` is a mask, [x] was committed in this step, {x>y} edited. In the picture a grey line is a position that waits
in its active block, a square its commit, coloured by the step within the block, a red cross an edit.
"""

import argparse
from pathlib import Path

import torch

from llada2_fast import LLaDA2Model, demo
from llada2_fast.weights.special_tokens import load_tokenizer

from . import harness, quality

PROMPT = "Tell a story about Max the goat near the lake."
OUT = Path(__file__).parent / "plots" / "order.png" if harness.IN_CHECKOUT else Path("order.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT, help=f'default: "{PROMPT}"')
    harness.add_plot_option(parser, "positions against steps", "--out", str(OUT))
    parser.add_argument("--threshold", type=float, default=0.9, help="default: %(default)g")
    parser.add_argument("--editing-threshold", type=float, help="default: no editing")
    options = parser.parse_args(argv)
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    tokenizer = load_tokenizer(demo.path())
    output = model.generate(
        quality.encode(tokenizer, [options.prompt]), threshold=options.threshold,
        editing_threshold=options.editing_threshold, trace=True, **quality.ENDING,
    )  # fmt: skip
    trace, count = output.trace[0], output.num_tokens[0]
    print("\n".join(lines(trace, count, tokenizer)))
    print(f"\n{tokenizer.decode(output.sequences[0, :count], skip_special_tokens=True)}\n")
    print(f"{count} tokens, {output.counters[0].denoise_forwards} forwards, TPF {output.tokens_per_forward:.2f}")
    with harness.drawing(
        options.out, nrows=2, sharex=True, figsize=(max(8, 0.24 * count + 2), 6), height_ratios=(3, 1)
    ) as (steps, confidences):
        draw(trace, count, tokenizer, steps, confidences)
    print(options.out)


def shown(trace, count):
    """(events of the answer's `count` positions, which count from its first; {block: its first step})."""
    events = [event._replace(position=event.position - trace.prompt_length) for event in trace.events]
    first_steps = {}
    for event in events:
        first_steps.setdefault(event.block, event.step)
    return [event for event in events if 0 <= event.position < count], first_steps


def text_of(tokenizer, token):
    """A token as it is printed: line breaks made visible."""
    return tokenizer.decode([token]).replace("\n", "⏎")


def lines(trace, count, tokenizer):
    """Text: the active block of the answer after each step that wrote into it."""
    events, _ = shown(trace, count)
    held = {}
    by_step = {}
    for event in events:
        by_step.setdefault(event.step, []).append(event)
    for step, written in by_step.items():
        block = written[0].block
        start = max(0, block * trace.block_length - trace.prompt_length)
        end = min(count, (block + 1) * trace.block_length - trace.prompt_length)
        cells = dict.fromkeys(range(start, end), "·") | {at: held[at] for at in range(start, end) if at in held}
        for event in written:
            new = text_of(tokenizer, event.token)
            cells[event.position] = f"[{new}]" if event.kind == "commit" else f"{{{held[event.position]}>{new}}}"
            held[event.position] = new
        sure = f"{len(written):>3} written, p >= {min(event.confidence for event in written):.3f}"
        yield f"step {step:>3}  block {block:>2} {sure}  {''.join(cells.values())}"


def draw(trace, count, tokenizer, steps, confidences):
    """Positions against steps on the axes `steps`, against the confidence they were written with on `confidences`."""
    events, first_steps = shown(trace, count)
    edits = [event for event in events if event.kind == "edit"]
    commits = [event for event in events if event.kind == "commit"]
    x, y = [event.position for event in commits], [event.step for event in commits]
    waited = [event.step - first_steps[event.block] for event in commits]
    steps.vlines(x, [first_steps[event.block] for event in commits], y, color="0.8", zorder=0)
    drawn = steps.scatter(x, y, c=waited, cmap="viridis", marker="s", s=40, vmin=0)
    scale = steps.inset_axes([1.01, 0, 0.01, 1])
    steps.figure.colorbar(drawn, cax=scale, ticks=range(max(waited) + 1), label="step within the block")
    steps.scatter([e.position for e in edits], [e.step for e in edits], color="red", marker="x", label="edit")
    confidences.bar(x, [event.confidence for event in commits], color=drawn.to_rgba(waited))
    confidences.scatter([e.position for e in edits], [e.confidence for e in edits], color="red", marker="x", s=16)
    for block in first_steps:
        for axes in (steps, confidences):
            axes.axvline(block * trace.block_length - trace.prompt_length - 0.5, color="0.6", linestyle=":", zorder=0)
    if edits:
        steps.legend()
    steps.invert_yaxis()
    steps.yaxis.get_major_locator().set_params(integer=True)
    steps.set(ylabel="step (denoise forward)", title="When each token was committed")
    last = {event.position: event.token for event in events}
    names = [text_of(tokenizer, last[at]) if at in last else "" for at in range(count)]
    confidences.set_xticks(range(count), names, rotation=90, fontsize=7)
    confidences.set(ylabel="confidence", ylim=(0, 1.05), xlim=(-1, count))


if __name__ == "__main__":
    main()
