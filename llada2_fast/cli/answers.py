"""Answers as `generate` and `chat` print them, and the line of statistics beside them."""

import sys
import time
from dataclasses import asdict

from .options import fit


def answer(model, tokenizer, rows, options, progress):
    """One dict per row of prompt ids, as --json prints it; a line of statistics goes to stderr."""
    options = fit(options, model, rows)
    started = time.perf_counter()
    output = model.generate(rows, return_dict=True, progress=progress, tokenizer=tokenizer, **options)
    seconds = time.perf_counter() - started
    answers = []
    for i, ids in enumerate(rows):
        new, counters = output.sequences[i, : output.num_tokens[i]].tolist(), output.counters[i]
        answers.append(told(tokenizer, new, len(ids), output.finish_reasons[i], counters, seconds))
    summarize(answers)
    return answers


def told(tokenizer, new, prompt_tokens, reason, counters, seconds):
    """An answer of the ids `new`, as --json prints it. seconds: the whole batch's."""
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True), "token_ids": new, "prompt_tokens": prompt_tokens,
        "num_tokens": len(new), "finish_reason": reason, **asdict(counters),
        "tokens_per_forward": len(new) / max(1, counters.denoise_forwards), "batch_seconds": seconds,
    }  # fmt: skip


def summarize(answers):
    """One line about a batch, on stderr."""
    tokens = sum(one["num_tokens"] for one in answers)
    forwards = sum(one["denoise_forwards"] for one in answers)
    reasons = ", ".join(dict.fromkeys(one["finish_reason"] for one in answers))
    speed = f"TPF {tokens / max(1, forwards):.2f}, {tokens / answers[0]['batch_seconds']:.1f} tokens/s"
    print(f"{tokens} tokens, {forwards} forwards, {speed}, finish reason: {reasons}", file=sys.stderr)
