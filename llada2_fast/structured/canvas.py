"""Texts with gaps, as people write them: `The capital of {gap:2} is Paris.`"""

import re

from ..config.request import MAX_CANVAS

_GAP = re.compile(r"(?<!\{)\{gap:([0-9]+)\}")  # doubled braces stand for themselves


def parse_canvas(text: str, tokenizer) -> list[int | None]:
    """The ids of a text, None for each token of its gaps.

    text: `{gap:n}` is a gap of n tokens; what `{{gap:n}}` says is `{gap:n}`.
    tokenizer: of transformers'; each part of the text is tokenised by itself, without special tokens around it.
    Raises ValueError for a text without a gap, for a gap without tokens, and for more than MAX_CANVAS tokens in gaps.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"canvas={text!r:.80}: expected a text without surrogates") from None
    ids: list[int | None] = []
    left = MAX_CANVAS
    parts = _GAP.split(text)  # text, number, text, ..., text
    for part, size in zip(parts[::2], [*parts[1::2], None], strict=True):
        literal = re.sub(r"\{(\{gap:[0-9]+\})\}", r"\1", part)
        ids += tokenizer(literal, add_special_tokens=False)["input_ids"] if literal else []
        if size is not None:
            if len(size) > len(str(MAX_CANVAS)) or not 0 < int(size) <= left:
                raise ValueError(
                    f"canvas={text!r:.80}: expected gaps of 1..{MAX_CANVAS} tokens in all, one is of {size:.20}"
                )
            ids += [None] * int(size)
            left -= int(size)
    if len(parts) == 1:
        raise ValueError(f"canvas={text!r:.80}: expected at least one gap, such as {{gap:8}}")
    return ids
