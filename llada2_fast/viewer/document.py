"""The trace document: all that the page needs to know of a request, as JSON-ready Python values.

format, version      "llada2_fast.trace", 1
model, prompt        a name; the prompt's text, or None
prompt_tokens        token i of the answer is of block (prompt_tokens + i) // block_length
block_length, mask_id
text, finish_reason, token_ids
vocabulary           {"17": its text} of every id in the document, decoded by itself; special tokens by their name
special_ids          those of them that are special
events               every write in order of steps, of kind "commit", "edit", or "move" where deletions and insertions
                     have brought a token, or a mask, there; position counts generated tokens from 0, and may lie
                     behind the answer's end; old: the id replaced, the mask id for a commit
alternatives         for each of token_ids [[id, logprob], ...], best first; None where they were not asked for
statistics, params   what it cost; the DecodeParams that are not at their defaults, and gen_length
"""

from dataclasses import fields

from ..config import DecodeParams

FORMAT, VERSION = "llada2_fast.trace", 1
ALTERNATIVES = 5  # of each token, where nobody says how many


def trace_document(
    output, tokenizer, *, model: str, prompt: str | None, params: DecodeParams, block_length: int, mask_id: int
) -> dict:
    """The document of a finished request.

    output: its RequestOutput, with a trace.
    tokenizer: any with ``decode(ids, skip_special_tokens=...)``; its special ids are those it lists.
    model: the name to be shown.
    prompt: the text to be shown, None = none.
    params: what it was decoded with.
    block_length, mask_id: the engine's.
    Raises ValueError without a trace, and for a block_length that is not the trace's.
    """
    trace = output.trace
    if trace is None:
        raise ValueError(f"output={output.request_id!r:.80}: expected a request with trace=True")
    if block_length != trace.block_length:
        raise ValueError(f"block_length={block_length!r:.80}: expected {trace.block_length}, the trace's")
    before, alternatives = output.prompt_length, output.top_logprobs
    ids = {mask_id, *output.token_ids}
    ids.update(token for event in trace.events for token in (event.token, event.old))
    ids.update(token for listed in alternatives or () for token, _ in listed)
    text = output.text
    if text is None:
        text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "prompt": prompt,
        "prompt_tokens": before,
        "block_length": block_length,
        "mask_id": mask_id,
        "text": text,
        "finish_reason": output.finish_reason,
        "token_ids": list(output.token_ids),
        "vocabulary": {str(i): tokenizer.decode([i], skip_special_tokens=False) for i in sorted(ids)},
        "special_ids": sorted(ids & {mask_id, *_special_ids(tokenizer)}),
        "events": [
            {
                "step": event.step, "position": event.position - before, "kind": event.kind, "token": event.token,
                "confidence": event.confidence, "old": event.old,
            }
            for event in trace.events
            if event.kind not in ("delete", "insert")
        ],
        "alternatives": None if alternatives is None else [[list(pair) for pair in listed] for listed in alternatives],
        "statistics": _statistics(output),
        "params": _told(params),
    }  # fmt: skip


def _special_ids(tokenizer):
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)}


def _statistics(output):
    forwards = output.counters.forwards_per_block
    return {
        "tokens": len(output.token_ids),
        "denoise_forwards": output.counters.denoise_forwards,
        "tokens_per_forward": output.tokens_per_forward,
        "edits": len(output.edits),
        "blocks": len(forwards),
        "forwards_per_block": list(forwards),
        "queue_s": output.queue_s,
        "prefill_s": output.prefill_s,
        "decode_s": output.decode_s,
    }


def _told(params):
    """The fields that somebody has set, as JSON has them."""
    changed = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if value != field.default or field.name == "gen_length":
            changed[field.name] = list(value) if isinstance(value, tuple) else value
    return changed
