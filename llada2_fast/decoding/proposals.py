"""Steps of sequences under a language: the device proposes, and the host decides by the rules of kernels/commit.py.

Of what the rules choose, commits first, in order of confidence, and then edits, each is written only if a completion of
the block is left beside those before it; the first commit always is. Positions where one token alone is possible are
filled whatever its confidence.
"""

import numpy as np
import torch

from ..kernels.commit import commit_ref
from ..kernels.refine import BlockState, SpecialIds
from .rules import batch_params
from .sequence import Sequence


def decide(sequences: list[Sequence], proposed, ids: SpecialIds) -> tuple[BlockState, np.ndarray]:
    """What a step does to the active blocks of R sequences that have an automaton.

    proposed: of each its candidates, anything, and their confidences, lists [L].
    ids: the model's special ids.
    Returns the blocks' states after it, and the report int32 [R, 9 + 3 L] of kernels.state.report_ref, on the CPU.
    """
    kinds, tokens, steps = ([getattr(s, name) for s in sequences] for name in ("kinds", "tokens", "steps"))
    state = BlockState.fresh(_long(tokens), _long(kinds).to(torch.int8), _long([s.block_start for s in sequences]))
    state.step, state.post_steps, state.prior_flags = (
        _long([getattr(s, name) for s in sequences]).int() for name in ("block_steps", "post_steps", "prior_flags")
    )
    state.commit_step = _long(steps).int()
    state.commit_confidence = torch.tensor([s.confidences for s in sequences], dtype=torch.float32, device="cpu")
    params = batch_params([s.rule for s in sequences], [0] * len(sequences), [s.ending_ids for s in sequences])
    confidence = torch.tensor([one[2] for one in proposed], dtype=torch.float32, device="cpu")
    token = _long([one[0] for one in proposed])

    def check(commit, edit, masked):
        kept = torch.zeros_like(commit), torch.zeros_like(edit)
        for row, sequence in enumerate(sequences):
            guide = sequence.guide()
            commit[row, guide.forced()] = True
            order = confidence[row].argsort(descending=True, stable=True).tolist()
            for chosen, into in zip((commit[row].tolist(), edit[row].tolist()), kept, strict=True):
                for at in order:
                    if chosen[at]:
                        into[row, at] = guide.write(at, int(token[row, at]))
        return kept

    output = commit_ref(token, confidence, state, params, ids, check=check)
    return state, output.report.numpy()


def _long(numbers):
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
