"""What a pipeline's callback sees of a step, and what it may change."""

import torch

from ...kernels import refine

TENSORS = (
    "block_x", "x0", "x0_p", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs",
    "confidence", "active_block",
)  # fmt: skip
CANDIDATES = {"x0", "x0_p", "sampled_tokens", "sampled_probs"}  # asking for one of these needs logits everywhere


def step_tensors(decoder, stepped, output, names, pad):
    """{name: tensor} of the step that gave `output` (RefineOutput) to the rows `stepped`.

    block_x int64 [B, W]: all rows up to their active blocks' ends, after the step, filled with the pad id on the right.
    Of the active blocks, [B, L]: x0 = sampled_tokens int64 and x0_p = sampled_probs float32, the candidates and their
    confidences (without one, the token that is there and 0.0); active_block bool, the masks that the step could fill;
    confidence float32, there, -inf elsewhere; transfer_index, editing_transfer_index bool, what was written.
    """
    tokens = decoder.state.tokens
    running = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    running[[row.slot for row in stepped]] = True
    active = running & (decoder.state.kind == refine.GENERATED) & (output.commit | (tokens == decoder.mask_id))
    chosen = output.token >= 0
    token = torch.where(chosen, output.token, tokens)
    probability = output.confidence.masked_fill(~chosen, 0.0)
    made = {
        "x0": token, "sampled_tokens": token, "x0_p": probability, "sampled_probs": probability,
        "transfer_index": output.commit, "editing_transfer_index": output.edit, "active_block": active,
        "confidence": output.confidence.masked_fill(~active, float("-inf")),
    }  # fmt: skip
    return {name: windows(decoder, pad) if name == "block_x" else made[name].clone() for name in names}


def windows(decoder, pad):
    """int64 [B, W]: all rows up to their active blocks' ends, the shorter ones filled with the pad id."""
    out = decoder.state.tokens.new_full((len(decoder.rows), max(row.span.stop for row in decoder.rows)), pad)
    for row in decoder.rows:
        out[row.slot, : row.span.stop] = _window(decoder, row)
    return out


def _window(decoder, row):
    return torch.cat([row.canvas[: row.span.start], decoder.state.tokens[row.slot]])


def rewrite(decoder, stepped, block_x, vocab_size=None):
    """Take over a callback's block_x [B, W] after the step of the rows `stepped`.

    Prompts, padding, tails and rows that were finished before the step stay as they are. A change before the active
    block drops that row's pages from there. Masks may come back in the active block, until it has had all its steps.
    ValueError if block_x does not fit, holds ids outside the vocabulary, or masks before an active block.
    """
    width = max(row.span.stop for row in decoder.rows)
    expected = (len(decoder.rows), width)
    if not isinstance(block_x, torch.Tensor) or block_x.shape != expected or block_x.dtype != torch.int64:
        got = f"{block_x.dtype} {list(block_x.shape)}" if isinstance(block_x, torch.Tensor) else type(block_x).__name__
        raise ValueError(f"block_x: the callback must return int64 {list(expected)}, got {got}")
    for row in decoder.rows:
        if row.finish_reason is not None and row not in stepped:
            continue
        present = _window(decoder, row)
        valid = row.kind[: row.span.stop] == refine.GENERATED
        wanted = torch.where(valid, block_x[row.slot, : row.span.stop].to(present.device), present)
        if not torch.equal(wanted, present):
            _check_tokens(row, wanted, decoder.mask_id, vocab_size)
            _rewrite_row(decoder, row, wanted, present)


def _check_tokens(row, wanted, mask_id, vocab_size):
    begin = row.prompt_length
    if bool((wanted[begin : row.span.start] == mask_id).any()):
        raise ValueError(f"block_x: row {row.slot} holds the mask id {mask_id} before its active block {row.block}")
    low, high = int(wanted[begin:].min()), int(wanted[begin:].max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(f"block_x: row {row.slot} holds ids from {low} to {high}, outside the vocabulary")


def _rewrite_row(decoder, row, wanted, present):
    state, slot, params = decoder.state, row.slot, row.params
    masked = (wanted == decoder.mask_id) & (row.kind[: row.span.stop] == refine.GENERATED)
    if int(state.step[slot]) >= params.steps:  # else a callback that puts masks back could go on for ever
        wanted = torch.where(masked, present, wanted)
        masked &= present == decoder.mask_id
    changed = torch.where(wanted != present)[0]
    if not len(changed):
        return
    row.canvas[: row.span.stop] = wanted
    state.tokens[slot] = wanted[row.span]
    row.settled = min(row.settled, int(changed[0]) // row.length)

    editing = params.editing_threshold is not None
    filled = not bool(masked.any())
    row.block_done = filled and (row.block_done or not editing or params.max_post_steps == 0)
    ended = params.eos_early_stop and (row.block_done or not editing) and _holds_eos(decoder, row, wanted)
    if ended:
        row.finish_reason = "eos"
    else:
        row.finish_reason = "length" if row.block_done and row.block + 1 == row.num_blocks else None
    state.frozen[slot] = row.block_done * refine.BLOCK_DONE | ended * refine.FINISHED


def _holds_eos(decoder, row, tokens):
    """Whether the generated part holds an EOS with no mask before it."""
    generated = tokens[row.prompt_length : row.total]
    unresolved = (generated == decoder.mask_id).cumsum(0) > 0
    return bool((torch.isin(generated, decoder.params.eos_ids[row.slot]) & ~unresolved).any())
