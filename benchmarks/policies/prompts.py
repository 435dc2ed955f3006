"""Anybody's prompts: a file of JSON lines {"prompt": text, "answer": text}."""

import json
from pathlib import Path

from llada2_fast.cli.options import encode

from .compare import Work

MATCHES = {  # how an answer is right: (text, the right answer) -> bool
    "exact": lambda text, answer: text.strip() == answer.strip(),
    "contained": lambda text, answer: answer.strip() in text,
}


def read(path, limit=None):
    """[(prompt, answer)] of the first `limit` lines; empty lines do not count. ValueError for what is no such file."""
    name, pairs = f"--data={str(path)!r:.200}", []
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and len(pairs) != limit:
            pairs.append(_pair(line, f"{name}, line {number}"))
    if not pairs:
        raise ValueError(f"{name}: expected a line at least")
    return pairs


def _pair(line, where):
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("prompt", "answer")):
        raise ValueError(f'{where}: expected {{"prompt": text, "answer": text}}, got {line!r:.80}')
    if not entry["answer"].strip():
        raise ValueError(f"{where}: answer={entry['answer']!r:.80}: expected some text")
    return entry["prompt"], entry["answer"]


def work_of(pairs, tokenizer, match, raw, gen_length, batch):
    """match: of MATCHES; raw: prompts as they are, not as turns of a chat; gen_length, batch: of Work."""
    if raw:
        rows = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    else:
        rows = [encode(tokenizer, [{"role": "user", "content": prompt}]) for prompt, _ in pairs]

    def is_right(place, ids):
        return MATCHES[match](tokenizer.decode(ids, skip_special_tokens=True), pairs[place][1])

    return Work(rows, gen_length, is_right, batch)
