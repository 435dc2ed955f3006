"""LLaDA2.2's editing in a step: the kernels in Triton's interpreter against the reference."""

import copy

import pytest
import torch

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.refine import BlockState, Moves, RefineParams, SpecialIds, refine_step
from tests.kernels.interpreter import interpreted

IDS = SpecialIds(5, 7, 8)
FEW = [5, 7, 8, 0, 1, 2, 3]  # ids that random candidates and tokens come from
ON = refine.LEVENSHTEIN | refine.EDITING


def params_of(rows, flags=ON | refine.BAN_MASK, **rules):
    """Parameters of rows, each of the rules one number for all of them or a list."""
    rules = {
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "threshold": 0.5, "edit_threshold": 0.0,
        "steps": 32, "min_transfer": 1, "max_steps": 25, "max_post_steps": 16, "flags": flags,
        "entropy_bound": 0.0, "entropy_decay": 1.0,
    } | rules  # fmt: skip
    real = ("temperature", "top_p", "threshold", "edit_threshold", "entropy_bound", "entropy_decay")
    types = {name: torch.float32 if name in real else torch.int64 if name == "seed" else torch.int32 for name in rules}
    columns = {name: torch.tensor(value, dtype=types[name]).expand(rows).clone() for name, value in rules.items()}
    return RefineParams(**columns, eos_ids=torch.full((rows, 1), -1))


def state_of(tokens, prompts=0, behind=0, kind=refine.PADDING):
    """Blocks that begin with so many prompt tokens, and have so many positions of another kind at their ends."""
    kinds = torch.full((len(tokens), len(tokens[0])), refine.GENERATED, dtype=torch.int8)
    kinds[:, :prompts] = refine.PROMPT
    kinds[:, kinds.shape[1] - behind :] = kind
    return BlockState.fresh(torch.tensor(tokens), kinds, torch.zeros(len(tokens), dtype=torch.int64))


def random_logits(rows, length, vocab, generator):
    """One of FEW is likely at every position, sometimes as likely as another."""
    logits = torch.randn(rows, length, vocab, generator=generator)
    for _ in range(2):
        likely = torch.tensor(FEW)[torch.randint(len(FEW), (rows, length, 1), generator=generator)]
        height = torch.tensor([2.0, 4.0, 6.0, 8.0])[torch.randint(4, (rows, length, 1), generator=generator)]
        logits.scatter_(2, likely, height)
    return logits


@pytest.mark.parametrize("seed, packed", [(0, False), (1, True), (2, True), (3, False)])
def test_kernels_and_reference_agree_step_by_step(seed, packed):
    """Rows of all kinds side by side, over a block's life; logits come again, so that blocks do."""
    rows, length, vocab = 7, (6, 8, 16, 5)[seed], 40
    generator = torch.Generator().manual_seed(seed)

    def one_of(values):
        return [values[int(torch.randint(len(values), (), generator=generator))] for _ in range(rows)]

    params = params_of(
        rows, flags=one_of([ON, ON | refine.BAN_MASK, ON | refine.BAN_MASK | refine.OWN_SOFTMAX, refine.BAN_EDITS,
                            refine.EDITING | refine.BAN_EDITS | refine.BAN_MASK, refine.EDITING]),
        threshold=one_of([0.2, 0.5, 0.9]), edit_threshold=one_of([0.0, 0.3, 0.8]), max_post_steps=one_of([0, 1, 3, 16]),
        max_steps=one_of([length + 4, length + 17]), min_transfer=one_of([1, 1, 3]),
    )  # fmt: skip
    tokens = [one_of(FEW[3:] + [5] * 4)[:length] + [5] * max(0, length - rows) for _ in range(rows)]
    states = [state_of(tokens, prompts=1, behind=seed % 3)]
    states.append(copy.deepcopy(states[0]))
    moves = [Moves.fresh(rows, length) for _ in range(2)]
    some = [random_logits(rows, length, vocab, generator) for _ in range(2)]
    structural = 0
    for step in range(9):
        logits, index = some[step % 2], None
        if packed:
            needed = refine.needed_positions(states[0], params, IDS)
            index = torch.where(needed, needed.flatten().cumsum(0).view(rows, length) - 1, -1)
            logits = logits[needed]
        arguments = dict(index=index, filters=False, only_needed=packed)
        wanted = refine_step(logits, states[0], params, IDS, moves=moves[0], **arguments)
        with force_ops("triton"), interpreted():
            got = refine_step(logits, states[1], params, IDS, moves=moves[1], **arguments)
        for name, a, b in zip(got._fields, got, wanted, strict=True):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            elif name == "report":
                at = 9 + 2 * length  # the confidences' bits
                assert torch.equal(a[:, :at], b[:, :at]) and torch.equal(a[:, at + length :], b[:, at + length :])
            else:
                assert torch.equal(a, b), (step, name)
        for name, a in vars(states[1]).items():
            torch.testing.assert_close(a, getattr(states[0], name), rtol=1e-5, atol=1e-7, msg=f"{step} {name}")
        on = (params.flags & refine.LEVENSHTEIN) != 0
        for a, b in zip(moves[1], moves[0], strict=True):
            assert torch.equal(a[on & (states[0].frozen == 0)], b[on & (states[0].frozen == 0)])
        structural += int(((got.commit | got.edit) & ((got.token == 7) | (got.token == 8)))[on].sum())
    assert structural > 5 and bool((states[0].frozen != 0).any())


def test_a_block_is_known_again_whenever_it_was_there():
    """Nine new blocks, then two that alternate: the kernel looks at more of the past than it takes together."""
    states, moves = [state_of([[10, 10]]) for _ in range(2)], [Moves.fresh(1, 2) for _ in range(2)]
    params = params_of(1, max_post_steps=64, max_steps=67)
    seen = []
    for token in (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 20, 21, 20):
        logits = torch.zeros(1, 2, 40)
        logits[0, :, token], logits[0, :, 25] = 9.0, 5.0
        refine_step(logits, states[0], params, IDS, moves=moves[0], filters=False)
        with force_ops("triton"), interpreted():
            refine_step(logits, states[1], params, IDS, moves=moves[1], filters=False)
        assert torch.equal(states[0].tokens, states[1].tokens)
        seen += states[0].tokens.flatten().tolist()
    assert 25 in seen  # a cycle was broken
