"""What a step did to requests -> events and outputs. Host side only: lists of ints, no tensors."""

from itertools import takewhile

from ..decoding.trace import Trace, until
from .request import Event, Request, RequestOutput


def process(request: Request, now: float) -> tuple[list[Event], str | None]:
    """The events of a request whose sequence a step has refined, and why it ends, None if it goes on.

    now: on the engine's clock.
    """
    sequence = request.sequence
    over = sequence.block_ended
    if not over and _stops_inside(request):
        sequence.keep_block()
        over = True
    if over:
        event, stopped = _commit_block(request, now)
        request.draft = None
        request.events.extend(event)
        return event, "stop" if stopped else sequence.finish_reason
    if request.drafts and not request.closed:
        request.draft = _draft_block(request, now)
        return [request.draft], None
    return [], None


def _fresh_tokens(request):
    """The generated tokens of the active block, up to the first EOS of the request; none if there was one before."""
    if request.closed:
        return []
    sequence = request.sequence
    ids = sequence.tokens[sequence.generated]
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in sequence.eos_ids), len(ids))]


def _stops_inside(request):
    """Is a stop committed in the open block, with no mask before it? Never with editing on: the tokens may change."""
    sequence = request.sequence
    if sequence.params.editing_threshold is not None or not request.has_stops:
        return False
    resolved = takewhile(lambda token: token != sequence.mask_id, _fresh_tokens(request))
    return request.stops(list(resolved)) is not None


def _commit_block(request, now):
    """Give out the active block of a request, which has ended or holds a stop. Returns (its event in a list, or none if
    it adds no tokens; whether a stop ends the request)."""
    sequence, fresh = request.sequence, _fresh_tokens(request)
    stop = request.stops(fresh)
    stopped = stop is not None and not (stop == len(fresh) and sequence.finish_reason == "eos")
    fresh = fresh[:stop]
    request.closed = request.closed or bool(fresh and fresh[-1] in sequence.eos_ids)
    if not fresh:
        return [], stopped
    text = ""
    if request.detokenizer:
        request.detokenizer.push(fresh)
        text = request.detokenizer.take()
    start = sequence.num_delivered
    end = sequence.num_delivered = start + len(fresh)
    event = Event(
        request.request_id, "commit", now, start, fresh, sequence.token_confidences[start:end],
        sequence.token_steps[start:end], _edits(sequence, end), text,
    )  # fmt: skip
    return [event], stopped


def _draft_block(request, now):
    """The event that shows the open block as it stands."""
    sequence = request.sequence
    where = sequence.generated
    start = sequence.block_start + where.start - sequence.prompt_length
    return Event(
        request.request_id, "draft", now, start, sequence.tokens[where], sequence.confidences[where],
        sequence.row_steps()[where], _edits(sequence, sequence.gen_length),
    )  # fmt: skip


def _edits(sequence, num_tokens):
    """Edits of the active block so far among the first num_tokens generated ones, none without a trace."""
    events = until(sequence.block_events(), sequence.prompt_length + num_tokens)
    return [event for event in events if event.kind == "edit"]


def make_output(request: Request, reason: str, error: str | None, now: float) -> RequestOutput:
    """The output of a request that ends for this reason; error: what happened, where it is "error"."""
    sequence, n, count = request.sequence, request.sequence.prompt_length, request.sequence.num_delivered
    text = request.detokenizer.text if request.detokenizer else None
    if reason in ("eos", "length") and count != len(sequence.answer()):
        count = len(sequence.answer())  # a model card's own rule where to cut
        ids = sequence.ids[n : n + count]
        text = text and request.detokenizer.tokenizer.decode(ids, skip_special_tokens=True)
    admitted = now if request.admitted is None else request.admitted
    prefilled = now if request.prefilled is None else request.prefilled
    return RequestOutput(
        request_id=request.request_id,
        token_ids=sequence.ids[n : n + count],
        text=text,
        finish_reason=reason,
        error=error,
        confidences=sequence.token_confidences[:count],
        steps=sequence.token_steps[:count],
        trace=None if sequence.events is None else Trace.of(sequence, count),
        counters=sequence.counters,
        prompt_length=n,
        shared_tokens=request.shared_tokens,
        preemptions=request.preemptions,
        queue_s=admitted - request.arrived,
        prefill_s=prefilled - admitted,
        decode_s=now - prefilled,
    )
