"""What a step did to requests -> entries of their logs and outputs. Host side only: lists of ints, no tensors."""

from itertools import takewhile

from ..decoding.trace import EDITS, Trace, until
from .request import Entry, Event, Request, RequestOutput


def process(request: Request, now: float) -> list[Entry]:
    """What a step gives to a request that it refined: nothing while the block goes on, else its tokens, and the last
    entry if it ends. Nothing of it counts before the entries are in the log.

    now: on the engine's clock.
    """
    sequence = request.sequence
    if not sequence.block_ended:
        if not _stops_inside(request):
            return []
        sequence.keep_block()
    return _give(request, _fresh_tokens(request), sequence.finish_reason, now)


def end_early(request: Request, reason: str, now: float) -> list[Entry]:
    """The entries that end a request where it stands, by nobody's fault: no window pass revises any more what was held
    back for one. reason: "cancelled" or "deadline"."""
    sequence, held = request.sequence, []
    if sequence.edit_window and not _closed(request):
        held = _kept_tokens(sequence, len(sequence.ids) // sequence.block_length)
    return _give(request, held, reason, now) if held else [finish(request, request.log[-1], reason, now)]


def _give(request, fresh, reason, now):
    """The entry that gives these tokens out, up to a stop, and the last one where there is a reason or a stop."""
    count, stop = request.stops(fresh) or (len(fresh), None)
    if stop is not None and not (count == len(fresh) and reason == "eos"):
        reason = "stop" if stop in (*request.options.stop, *request.options.stop_token_ids) else "eos"
    entry = _entry(request, fresh[:count], now)
    return [entry, finish(request, entry, reason, now, stop if reason == "stop" else None)] if reason else [entry]


def draft(request: Request, now: float) -> Event | None:
    """The event that shows the open block as it stands, behind the tokens that are held back for window passes; None
    where nobody wants it, or an EOS was given out before."""
    sequence = request.sequence
    if not request.drafts or _closed(request):
        return None
    where = sequence.generated
    opens = sequence.block_start + where.start - sequence.prompt_length
    start = sequence.num_delivered if sequence.edit_window else opens
    return Event(
        request.request_id, "draft", now, start,
        sequence.ids[sequence.prompt_length + start : sequence.block_start] + sequence.tokens[where],
        sequence.token_confidences[start:opens] + sequence.confidences[where],
        sequence.token_steps[start:opens] + sequence.row_steps()[where],
        edits=_edits(sequence, start, sequence.gen_length),
    )  # fmt: skip


def _ends(sequence, ids, start):
    """How many of the generated ids from number `start` on come before the end that an EOS makes, itself among them."""
    skip = max(0, sequence.min_tokens - start)
    return next((i + 1 for i in range(skip, len(ids)) if ids[i] in sequence.eos_ids), len(ids))


def _closed(request):
    """An EOS was given out: what comes after it is not."""
    sequence, given = request.sequence, request.sequence.num_delivered
    last = sequence.ids[sequence.prompt_length + given - 1 : sequence.prompt_length + given] if given else []
    return given > sequence.min_tokens and last[0] in sequence.eos_ids


def _fresh_tokens(request):
    """The tokens to be given out now: of an answer that is over all that are left, else the active block's."""
    sequence, given = request.sequence, request.sequence.num_delivered
    if sequence.finished:
        return sequence.answer()[given:]
    if _closed(request) or _is_held(sequence):
        return []
    if sequence.edit_window:
        return _kept_tokens(sequence, sequence.num_kept_blocks)
    ids = sequence.tokens[sequence.generated]
    return ids[: _ends(sequence, ids, given)]


def _kept_tokens(sequence, blocks):
    """The tokens of so many leading blocks that were not given out, up to an EOS."""
    given, end = sequence.num_delivered, min(blocks * sequence.block_length, sequence.total)
    ids = sequence.ids[sequence.prompt_length + given : end]
    return ids[: _ends(sequence, ids, given)]


def _is_held(sequence):
    """Whether nothing can be given out before the end: an early return under hf-2.0 is cut at the first EOS of the
    prompt, and nobody knows yet whether it will be one."""
    params = sequence.params
    may_return_early = params.traits.cuts_canvas and params.eos_early_stop and not sequence.min_tokens
    return may_return_early and not {*sequence.eos_ids}.isdisjoint(sequence.prompt)


def _stops_inside(request):
    """Is a stop committed in the open block, with no mask before it? Never with editing on: the tokens may change."""
    sequence = request.sequence
    if sequence.params.editing_threshold is not None or not request.has_stops:
        return False
    resolved = takewhile(lambda token: token != sequence.mask_id, _fresh_tokens(request))
    return request.stops(list(resolved)) is not None


def _entry(request, fresh, now):
    """The entry that gives these tokens out."""
    sequence, detokenizer = request.sequence, request.detokenizer
    start = sequence.num_delivered
    end, text, event = start + len(fresh), "", None
    if fresh and detokenizer:
        detokenizer = detokenizer.copy()
        early = max(0, min(sequence.min_tokens - start, len(fresh)))
        if early:
            detokenizer.push(fresh[:early], stops=False)
        detokenizer.push(fresh[early:])
        text = detokenizer.take()
    if fresh:
        event = Event(
            request.request_id, "commit", now, start, fresh, sequence.token_confidences[start:end],
            sequence.token_steps[start:end], sequence.token_top[start:end], _edits(sequence, start, end), text,
        )  # fmt: skip
    return Entry(event, sequence.mark()._replace(num_delivered=end), detokenizer)


def _edits(sequence, start, end):
    """The edits so far of the generated tokens start .. end - 1, none without a trace."""
    begin, end = sequence.prompt_length + start, sequence.prompt_length + end
    events = until(sequence.events_since(begin // sequence.block_length), end)
    return [event for event in events if event.kind in EDITS and event.position >= begin]


def finish(request: Request, last: Entry, reason: str, now: float, stop=None, error: str | None = None) -> Entry:
    """The last entry of a request, behind `last`.

    reason: why it ends; stop: which stop has matched; error: what happened.
    """
    tail, detokenizer = "", last.detokenizer
    if detokenizer:
        detokenizer = detokenizer.copy()
        stops = last.mark.num_delivered > request.sequence.min_tokens
        tail = detokenizer.tail() if reason in ("cancelled", "error") else detokenizer.take(final=True, stops=stops)
        if stop is None and detokenizer.stopped is not None:  # in what was incomplete until now
            reason, stop = "stop", detokenizer.stopped
    output = _output(request, last.mark.num_delivered, detokenizer, reason, now, stop, error)
    return Entry(Event(request.request_id, "finish", now, text=tail, output=output), last.mark, detokenizer)


def _output(request, count, detokenizer, reason, now, stop, error):
    sequence, n = request.sequence, request.sequence.prompt_length
    admitted = now if request.admitted is None else request.admitted
    prefilled = now if request.prefilled is None else request.prefilled
    return RequestOutput(
        request_id=request.request_id,
        token_ids=sequence.ids[n : n + count],
        text=detokenizer.text if detokenizer else None,
        finish_reason=reason,
        stop_reason=stop,
        error=error,
        confidences=sequence.token_confidences[:count],
        steps=sequence.token_steps[:count],
        top_logprobs=sequence.token_top[:count] if request.options.top_logprobs else None,
        trace=None if sequence.events is None else Trace.of(sequence, count),
        counters=sequence.counters,
        prompt_length=n,
        shared_tokens=request.shared_tokens,
        preemptions=request.preemptions,
        queue_s=admitted - request.arrived,
        prefill_s=prefilled - admitted,
        decode_s=now - prefilled,
    )
