"""Steps of which the device proposes the tokens, and the host decides by the rules of kernels/commit.py.

Under a language: of what the rules choose, commits first, in order of confidence, and then edits, each is written only
if a completion of the block is left beside those before it; the first commit always is. Positions where one token alone
is possible are filled whatever its confidence. Of a draft that was checked: what speculation.py says.
"""

import math

import numpy as np
import torch

from ..kernels.commit import commit_ref
from ..kernels.refine import BlockState, SpecialIds
from .rules import batch_params
from .sequence import Sequence
from .speculation import Check, everything


def decide(sequences: list[Sequence], proposed, ids: SpecialIds) -> tuple[BlockState, np.ndarray]:
    """What a step does to the active blocks of R sequences under a language.

    proposed: of each its candidates, anything, and their confidences, lists [L].
    ids: the model's special ids.
    Returns the blocks' states after it, and the report int32 [R, 9 + 3 L] of kernels.state.report_ref, on the CPU.
    """

    def check(commit, edit):
        rows = zip(sequences, proposed, commit.tolist(), edit.tolist(), strict=True)  # sync: on the CPU
        pairs = (_written(s.guide(), token, sure, *chosen) for s, (token, _, sure, _), *chosen in rows)
        return tuple(torch.tensor(chosen, dtype=torch.bool, device="cpu") for chosen in zip(*pairs, strict=True))

    return _apply(sequences, [s.rule for s in sequences], proposed, ids, check)


def accept(
    sequences: list[Sequence], checks: list[Check], found, bad: list[bool], ids: SpecialIds
) -> tuple[BlockState, np.ndarray]:
    """What their checks do to the active blocks of N sequences.

    checks: of each.
    found: of each, as of StepResult.read, its block with all masks written.
    bad: of each, whether its logits hold NaN or infinity.
    ids: the model's special ids.
    Returns as of proposals.decide.
    """

    def agreed(commit, edit):
        rows = [_agreed(one, tokens) for one, (tokens, *_) in zip(checks, found, strict=True)]
        return commit & torch.tensor(rows, dtype=torch.bool, device="cpu"), edit

    nothing = [math.nan] * len(checks[0].tokens)
    proposed = [(*one[:2], nothing, None) if error else one for one, error in zip(found, bad, strict=True)]
    return _apply(sequences, [everything(one.rule) for one in checks], proposed, ids, agreed)


def _apply(sequences, rules, proposed, ids, check):
    """What R sequences' rules make of what is proposed, as `decide` returns it; check: as of commit_ref."""
    token, confidence = ([one[at] for one in proposed] for at in (0, 2))
    state = BlockState.fresh(
        _column(sequences, "tokens"), _column(sequences, "kinds", torch.int8), _column(sequences, "block_start")
    )
    state.step, state.post_steps, state.commit_step = (
        _column(sequences, name, torch.int32) for name in ("block_steps", "post_steps", "steps")
    )
    state.commit_confidence = _column(sequences, "confidences", torch.float32)
    params = batch_params(rules, [0] * len(sequences), [s.ending_ids for s in sequences])
    output = commit_ref(
        torch.tensor(token, dtype=torch.int64, device="cpu"),
        torch.tensor(confidence, dtype=torch.float32, device="cpu"), state, params, ids, check=check,
    )  # fmt: skip
    return state, output.report.numpy()


def _written(guide, token, confidence, commit, edit):
    """Which of the chosen commits and edits of one block are written, bools [L] each."""
    for at in guide.forced():
        commit[at] = True
    order = sorted(range(len(token)), key=lambda at: -confidence[at])  # ties: lowest position
    for chosen in (commit, edit):
        for at in order:
            chosen[at] = chosen[at] and guide.write(at, token[at])
    return commit, edit


def _agreed(one, tokens):
    """The masks up to the first at which block size 1 says something else than the draft, bools [L]."""
    agrees, chosen = True, []
    for held, draft, token in zip(one.tokens, one.draft, tokens, strict=True):
        chosen.append(held < 0 and agrees)
        agrees = agrees and draft == token
    return chosen


def _column(sequences, name, dtype=torch.int64):
    return torch.tensor([getattr(s, name) for s in sequences], dtype=dtype, device="cpu")
