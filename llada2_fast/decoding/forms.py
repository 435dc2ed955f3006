"""The form of an answer: what is given in it, and what the rest has to be; all that can be said before a forward."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..config import DecodeParams
from ..config.habits import token_ids
from ..structured import TokenAutomaton, parse_canvas
from .guide import gaps_of
from .inputs import plain_integers


class Form(NamedTuple):
    """Of one answer.

    params: as given, with the canvas' gen_length where there is one.
    canvas: by position of the answer the id that is given there, None in gaps; None: nothing is given.
    automaton: of the language that each gap is in, None if it may be anything.
    """

    params: DecodeParams
    canvas: list[int | None] | None
    automaton: TokenAutomaton | None

    def of(self, params: DecodeParams) -> "Form":
        """The same for an answer with other params, in the same language."""
        own = params if self.canvas is None else replace(params, gen_length=len(self.canvas))
        form = self._replace(params=own)
        form.check_room()
        return form

    def check_room(self):
        """ValueError where a gap is too small for any text of the language."""
        if self.automaton is None:
            return
        fewest, length = self.automaton.fewest, self.params.gen_length
        if min(gap.end - gap.begin for gap in gaps_of(self.canvas or [], length)) < fewest:
            where = f"gen_length={length}: expected" if self.canvas is None else "canvas: expected in each gap"
            raise ValueError(
                f"{where} at least {fewest} tokens, what the shortest text of {self.params.language} takes"
            )


def forms_of(params, canvas, count, tokenizer, mask_id, vocab_size, automaton=None) -> list[Form]:
    """The Form of each of several answers.

    params: DecodeParams of them all.
    canvas: one for all, or a list with that of each; of ids, None or the mask id in gaps, or a text with `{gap:n}`.
    count: how many there are.
    tokenizer: for a text.
    mask_id: resolved.
    vocab_size: of the model.
    automaton: of the language that params ask for.
    Raises ValueError for what cannot be had, before anything is done.
    """
    forms = []
    for one in canvases(canvas, count):
        ids = None if one is None else _canvas(one, tokenizer, mask_id, vocab_size)
        if ids is not None and not params.traits.shapes:
            raise ValueError(f"canvas: expected none under profile={params.profile!r}, which may leave masks or move")
        if ids is not None and params.edit_window:
            raise ValueError(f"edit_window={params.edit_window}: expected 0 with a canvas")
        if ids is not None and params.checks:
            raise ValueError("policy='self_speculative': expected another one with a canvas, which it does not look at")
        forms.append(Form(params, ids, automaton).of(params))
    return forms


def canvases(canvas, count: int) -> list:
    """The canvas of each of so many answers, as it is, from one for all or a list with that of each."""
    nested = isinstance(canvas, (list, tuple)) and any(isinstance(one, (str, list, tuple)) for one in canvas)
    nested |= getattr(canvas, "ndim", 1) > 1
    if not nested:
        return [canvas] * count
    if len(canvas) != count:
        raise ValueError(f"canvas: expected one for all, or one for each of {count} prompts, got {len(canvas)}")
    return list(canvas)


def _canvas(canvas, tokenizer, mask_id, vocab_size):
    """One canvas as ids and None. ValueError for what is none."""
    if isinstance(canvas, str):
        if tokenizer is None:
            raise ValueError(f"canvas={canvas!r:.80}: expected ids, or a tokenizer for a text")
        canvas = parse_canvas(canvas, tokenizer)
    if isinstance(canvas, (torch.Tensor, np.ndarray)):
        canvas = token_ids("canvas", canvas).tolist()  # sync: once a call
    if not isinstance(canvas, (list, tuple)):
        raise ValueError(f"canvas={canvas!r:.80}: expected a list of ids and gaps, or a text with {{gap:n}}")
    canvas = plain_integers(canvas)
    for at, token in enumerate(canvas):
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise ValueError(f"canvas: expected ids in 0..{vocab_size - 1} and None, got {token!r:.40} at {at}")
    ids = [None if token == mask_id else token for token in canvas]
    if None not in ids:
        raise ValueError(f"canvas: expected at least one gap, None or the mask id {mask_id}, in {len(ids)} positions")
    return ids
