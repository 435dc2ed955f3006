"""What a pipeline's callback sees of a step, and what it may change."""

import torch

from ...decoding.decoder import BlockDecoder
from ...decoding.runner import StepResult
from ...decoding.sequence import Sequence
from ...kernels import refine

TENSORS = (
    "block_x", "x0", "x0_p", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs",
    "confidence", "active_block",
)  # fmt: skip
CANDIDATES = {"x0", "x0_p", "sampled_tokens", "sampled_probs"}  # asking for one of these needs logits everywhere


def step_tensors(
    decoder: BlockDecoder, stepped: list[Sequence], result: StepResult, names: list[str], pad: int
) -> dict[str, torch.Tensor]:
    """What a step of some sequences did, {name: tensor}.

    decoder: all its lanes are taken.
    stepped: those the step refined; result: of the step.
    names: of TENSORS; pad: the pad id.
    Returns of the names: block_x int64 [B, W], all rows up to their active blocks' ends, after the step, filled with
    the pad id on the right. Of the active blocks, [B, L]: x0 = sampled_tokens int64 and x0_p = sampled_probs float32,
    the candidates and their confidences (without one, the token that is there and 0.0); active_block bool, the masks
    that the step could fill; confidence float32, there, -inf elsewhere; transfer_index, editing_transfer_index bool,
    what was written.
    """
    state, output, mask_id = decoder.lanes.state, result.output, decoder.lanes.mask_id
    tokens = state.tokens
    running = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    running[[sequence.lane for sequence in stepped]] = True
    active = running & (state.kind == refine.GENERATED) & (output.commit | (tokens == mask_id))
    chosen = output.token >= 0
    token = torch.where(chosen, output.token, tokens)
    probability = output.confidence.masked_fill(~chosen, 0.0)
    made = {
        "x0": token, "sampled_tokens": token, "x0_p": probability, "sampled_probs": probability,
        "transfer_index": output.commit, "editing_transfer_index": output.edit, "active_block": active,
        "confidence": output.confidence.masked_fill(~active, float("-inf")),
    }  # fmt: skip
    return {name: _windows(decoder, pad) if name == "block_x" else made[name].clone() for name in names}


def _width(decoder):
    return max(sequence.block_start for sequence in decoder.sequences) + decoder.lanes.block_length


def _windows(decoder, pad):
    """int64 [B, W]: all rows up to their active blocks' ends, the shorter ones filled with the pad id."""
    state, width = decoder.lanes.state, _width(decoder)
    before = [sequence.ids[: sequence.block_start] for sequence in decoder.sequences]
    rows = [ids + [pad] * (width - len(ids)) for ids in before]
    rows = torch.tensor(rows, dtype=torch.int64, device="cpu").to(decoder.lanes.device)
    at = state.block_start[:, None] + torch.arange(decoder.lanes.block_length, device=rows.device)
    return rows.scatter_(1, at, state.tokens)


def rewrite(
    decoder: BlockDecoder, stepped: list[Sequence], result: StepResult, block_x: torch.Tensor, vocab_size: int | None
):
    """Take over a callback's block_x after a step.

    decoder: all its lanes are taken.
    stepped: those the step refined; result: of the step.
    block_x: int64 [B, W], as of step_tensors.
    vocab_size: None where it is not known.
    Prompts, what a canvas gives, padding, tails and rows that were finished before the step stay as they are. A change
    before the active block has that row's keys and values made anew from there. Masks may come back in the active
    block, until it has had all its steps.
    ValueError if block_x does not fit, holds ids outside the vocabulary, or masks before an active block.
    """
    expected = (len(decoder.sequences), _width(decoder))
    if not isinstance(block_x, torch.Tensor) or block_x.shape != expected or block_x.dtype != torch.int64:
        got = f"{block_x.dtype} {list(block_x.shape)}" if isinstance(block_x, torch.Tensor) else type(block_x).__name__
        raise ValueError(f"block_x: the callback must return int64 {list(expected)}, got {got}")
    changes, tokens = [], decoder.lanes.state.tokens.tolist()
    for sequence, wanted in zip(decoder.sequences, block_x.tolist(), strict=True):
        if sequence.finished and sequence not in stepped:
            continue
        present = sequence.ids[: sequence.block_start] + tokens[sequence.lane]
        free = [at < sequence.total and not sequence.is_given(at) for at in range(len(present))]
        wanted = [asked if may else there for asked, there, may in zip(wanted, present, free, strict=False)]
        if wanted != present:
            _check_tokens(sequence, wanted, decoder.lanes.mask_id, vocab_size)
            if result.status[sequence.lane][refine.STEP] >= sequence.params.steps:
                wanted = _without_masks(wanted, present, decoder.lanes.mask_id)
        if wanted != present:
            changes.append((sequence, wanted, present))
    if changes:
        _take_over(decoder, changes, result)


def _check_tokens(sequence, wanted, mask_id, vocab_size):
    lane, begin = sequence.lane, sequence.prompt_length
    if mask_id in wanted[begin : sequence.block_start]:
        raise ValueError(f"block_x: row {lane} holds the mask id {mask_id} before its active block {sequence.block}")
    low, high = min(wanted[begin:]), max(wanted[begin:])
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(f"block_x: row {lane} holds ids from {low} to {high}, outside the vocabulary")


def _without_masks(wanted, present, mask_id):
    """A callback that puts masks back after a block's last step could go on for ever."""
    return [there if asked == mask_id else asked for asked, there in zip(wanted, present, strict=True)]


def _take_over(decoder, changes, result):
    """changes: (sequence, its ids up to the active block's end as wanted, as they are)."""
    lanes, state = [sequence.lane for sequence, _, _ in changes], decoder.lanes.state
    blocks = [wanted[sequence.block_start :] for sequence, wanted, _ in changes]
    state.tokens[lanes] = torch.tensor(blocks, dtype=torch.int64, device="cpu").to(state.tokens.device)
    earlier = [wanted[sequence.prompt_length : sequence.block_start] for sequence, wanted, _ in changes]
    over = decoder.lanes.judge(lanes, earlier, result.output)
    for (sequence, wanted, present), flags in zip(changes, over, strict=True):
        changed = next(at for at, token in enumerate(wanted) if token != present[at])
        sequence.rewrite(wanted, changed, flags)
