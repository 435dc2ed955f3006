"""What a step did to a request -> events and its output. Host side only: lists of ints, no tensors."""

from itertools import takewhile

from ..decoding.decoder import Counters
from ..decoding.trace import Trace, events_of
from .request import Event, RequestOutput


def fresh_tokens(request, tokens):
    """The generated tokens of the active block, up to the first EOS of the request; none if there was one before."""
    if request.closed:
        return []
    begin, end = _span(request)
    ids = tokens[begin:end]
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in request.eos_ids), len(ids))]


def stops_inside(request, tokens, mask_id):
    """Is a stop committed in the open block, with no mask before it? Never with editing on: the tokens may change."""
    if request.params.editing_threshold is not None or not request.has_stops:
        return False
    resolved = takewhile(lambda token: token != mask_id, fresh_tokens(request, tokens))
    return request.stops(list(resolved)) is not None


def commit_block(request, tokens, steps, confidences, now):
    """Take in the active block of a request, which is finished or holds a stop. Returns (its event, or None if it adds
    no tokens; whether a stop ends the request)."""
    row, begin = request.row, _span(request)[0]
    fresh = fresh_tokens(request, tokens)
    stop = request.stops(fresh)
    stopped = stop is not None and not (stop == len(fresh) and row.finish_reason == "eos")
    fresh = fresh[:stop]
    request.closed = request.closed or bool(fresh and fresh[-1] in request.eos_ids)
    confidences, steps = confidences[begin:], _row_steps(row, steps)[begin:]
    request.ids[row.span.start :] = tokens
    request.confidences += confidences
    request.steps += steps
    if not fresh:
        return None, stopped
    text = ""
    if request.stream:
        request.stream.push(fresh)
        text = request.stream.take()
    start, count = request.delivered, len(fresh)
    request.delivered += count
    event = Event(
        request.request_id, "commit", now, start, fresh, confidences[:count], steps[:count],
        _edits(row, request.delivered), text,
    )  # fmt: skip
    return event, stopped


def draft_block(request, tokens, steps, confidences, now):
    """The event that shows the open block as it stands."""
    row, (begin, end) = request.row, _span(request)
    return Event(
        request.request_id, "draft", now, row.span.start + begin - row.prompt_length, tokens[begin:end],
        confidences[begin:end], _row_steps(row, steps)[begin:end], _edits(row, row.params.gen_length),
    )  # fmt: skip


def make_output(request, reason, error, now):
    """The output of a request that has ended."""
    row, n, count = request.row, len(request.prompt), request.delivered
    text = request.stream.text if request.stream else None
    if row is not None and row.params.profile != "default" and reason in ("eos", "length"):
        count = len(row.output(request.eos_ids))  # the cards' own rule where to cut
        text = text and request.stream.tokenizer.decode(request.ids[n : n + count], skip_special_tokens=True)
    admitted = now if request.admitted is None else request.admitted
    prefilled = now if request.prefilled is None else request.prefilled
    return RequestOutput(
        request_id=request.request_id,
        token_ids=request.ids[n : n + count],
        text=text,
        finish_reason=reason,
        error=error,
        confidences=request.confidences[:count],
        steps=request.steps[:count],
        trace=None if row is None or row.events is None else Trace.of(row, count),
        counters=row.counters if row else Counters(),
        prompt_length=len(request.prompt),
        shared_tokens=request.shared_tokens,
        preemptions=request.preemptions,
        queue_s=admitted - request.arrived,
        prefill_s=prefilled - admitted,
        decode_s=now - prefilled,
    )


def _span(request):
    """Where the active block's generated tokens lie in it: (begin, end), without prompt and tail."""
    row = request.row
    return max(0, row.prompt_length - row.span.start), min(row.length, row.total - row.span.start)


def _row_steps(row, steps):
    """Steps of the block -> steps of the row; -1 stays."""
    before = row.mark[0].denoise_forwards
    return [step + before if step >= 0 else -1 for step in steps]


def _edits(row, num_tokens):
    """Edits of the active block so far among the first num_tokens generated ones, none without traces."""
    return [event for event in events_of(row, num_tokens, row.mark[1]) if event.kind == "edit"] if row.events else []
