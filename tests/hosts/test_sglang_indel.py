"""The profile sglang-indel against SGLang's own JointThresholdInDel, step by step from the same blocks and logits."""

import pytest
import torch

from llada2_fast import DecodeParams
from llada2_fast.decoding.rules import batch_params, row_rule
from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.refine import BlockState, Moves, SpecialIds, refine_step
from tests.hosts.sglang_host import batch_of
from tests.hosts.sglang_stubs import sglang
from tests.hosts.test_sglang import VERSION
from tests.kernels.interpreter import interpreted

VOCAB, MASK, DELETE, SPLIT = 60, 7, 11, 23
IDS = SpecialIds(MASK, DELETE, SPLIT)
FAVOURITES = [[0, 1, 2, 3, 4, 5, 6], [0, 1], [0, DELETE, SPLIT], [MASK, 0, 1, SPLIT], [MASK, DELETE, SPLIT]]
CONFIGS = [
    {"threshold": 0.3, "edit_threshold": 0.0, "max_post_edit_steps": 16},
    {},  # SGLang's defaults
    {"threshold": 0.7, "edit_threshold": 0.4, "max_post_edit_steps": 3},
    {"threshold": 0.5, "edit_threshold": 0.2, "max_post_edit_steps": 0},
    {"threshold": 2.0, "edit_threshold": 0.0, "max_post_edit_steps": 1},
    {"threshold": 0.2, "edit_threshold": 0.9, "max_post_edit_steps": 5},
]


@pytest.fixture(scope="module")
def theirs(unpacked):
    """theirs(config, length): SGLang's algorithm for blocks of that length."""
    with sglang(unpacked(VERSION)) as package:
        from sglang.srt.dllm.config import DllmConfig

        def build(config, length):
            name = "JointThresholdInDel"
            ids = dict(delete_token_id=DELETE, split_token_id=SPLIT)
            return package.algo_name_to_cls[name](DllmConfig(name, config, length, MASK, 8, **ids))

        yield build


def some_blocks(generator, rows, length):
    """Blocks of prompt, and behind it of masks and drafted tokens; half of the batches with literal masks in the
    prompt. Returns (tokens [R, L], where the prompt is [R, L] or None: all tokens ahead of the first mask)."""
    tokens = torch.randint(7, (rows, length), generator=generator)
    ends = torch.randint(length, (rows, 1), generator=generator)
    place = torch.arange(length)
    share = torch.rand(rows, 1, generator=generator)
    tokens[(place > ends) & (torch.rand(rows, length, generator=generator) < share)] = MASK
    if torch.rand((), generator=generator) < 0.5:
        tokens[place == ends] = MASK
        return tokens, None
    tokens[(place < ends) & (torch.rand(rows, length, generator=generator) < 0.2)] = MASK
    return tokens, place < ends


def some_logits(generator, rows, length):
    """Without ties; at each position one of few ids is the best by more or less."""
    logits = torch.randn(rows, length, VOCAB, generator=generator)
    favourites = FAVOURITES[int(torch.randint(len(FAVOURITES), (), generator=generator))]
    liked = torch.tensor(favourites)[torch.randint(len(favourites), (rows, length, 1), generator=generator)]
    return logits.scatter_add(2, liked, 9 * torch.rand(rows, length, 1, generator=generator))


def check_blocks(theirs, number, batches, most_rows):
    """Tokens, marks of original masks, counters and ends, step by step; logits come again, so that blocks do.

    Returns how many deletions and insertions there were, and how many steps began with a block seen before.
    """
    config, generator = CONFIGS[number], torch.Generator().manual_seed(number)
    asked = {
        "threshold": config.get("threshold", 0.5), "editing_threshold": config.get("edit_threshold", 0.0),
        "max_post_steps": config.get("max_post_edit_steps", 16),
    }  # fmt: skip
    moved = again = 0
    for _ in range(batches):
        rows, length = (int(torch.randint(1, n, (), generator=generator)) for n in (most_rows + 1, 14))
        tokens, prompt = some_blocks(generator, rows, length)
        oracle, batch = theirs(config, length), batch_of(tokens, prompt)
        states = oracle.init_step_state(batch)
        kind = torch.stack([state["prompt_index"] for state in states]).to(torch.int8) * refine.PROMPT
        own = BlockState.fresh(tokens, kind, torch.zeros(rows, dtype=torch.int64))
        rule = row_rule(DecodeParams(profile="sglang-indel", **asked), length, edits=True)
        params, moves = batch_params([rule] * rows, [0] * rows, [()] * rows), Moves.fresh(rows, length)
        some = [some_logits(generator, rows, length) for _ in range(int(torch.randint(1, 4, (), generator=generator)))]
        for step in range(oracle.max_steps(length)):
            logits, ended = some[step % len(some)], own.frozen != 0
            again += sum(
                tuple(block) in state["seen_input_keys"] and not state["finished"]
                for block, state in zip(own.tokens.tolist(), states, strict=True)
            )
            done = oracle.step(batch, logits.flatten(0, 1), states)
            out = refine_step(logits, own, params, IDS, moves=moves)
            assert own.tokens.flatten().tolist() == batch.input_ids.tolist()
            assert (own.frozen != 0).tolist() == [state["finished"] for state in states]
            assert own.step.tolist() == [state["num_update_steps"] for state in states]
            assert own.post_steps.tolist() == [state["post_edit_steps"] for state in states]
            assert moves.original.tolist() == torch.stack([state["is_orig_mask"] for state in states]).int().tolist()
            assert done == (ended | (own.frozen != 0) & (own.changed == 0)).tolist()  # the block's K/V are final
            moved += int(((out.commit | out.edit) & ((out.token == DELETE) | (out.token == SPLIT))).sum())
            if all(done):
                break
        assert all(done)
    return moved, again


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_blocks_go_as_in_sglang(theirs, number):
    moved, again = check_blocks(theirs, number, batches=40, most_rows=5)
    assert moved > 100 and again > 10


@pytest.mark.parametrize("number", [0, 3])
def test_blocks_of_the_kernels_go_as_in_sglang(theirs, number):
    with force_ops("triton"), interpreted():
        check_blocks(theirs, number, batches=4, most_rows=2)
