"""Outputs and events of the engine -> OpenAI's JSON. Dicts, for they are made at every block of every stream."""

import time
from itertools import accumulate

from .. import __version__
from ..decoding.trace import logprob

# The engine's finish reasons in OpenAI's words. A deadline is told apart by stop_reason, as vLLM tells stop strings.
REASONS = {"eos": "stop", "stop": "stop", "length": "length", "deadline": "length", "cancelled": "abort"}


class Format:
    """One of the two kinds of completions.

    texts: Texts.
    model: the name in answers.
    body: the request.
    document: (body, finished request) -> its trace document.
    """

    prefix = whole = part = ""

    def __init__(self, request_id, model, body, texts, document):
        self.request_id, self.model, self.body, self.texts, self.document = request_id, model, body, texts, document
        self.created = int(time.time())

    def answer(self, requests) -> dict:
        """The body of a plain response. requests: finished handles, in order."""
        choices = [self._choice(index, request) for index, request in enumerate(requests)]
        return self._head(self.whole) | {"choices": choices, "usage": self.usage(requests)}

    def chunk(self, choices, **more) -> dict:
        """One event of a stream."""
        return self._head(self.part) | {"choices": choices} | more

    def first(self, index) -> dict | None:
        """The choice of the chunk that a stream begins with."""
        return None

    def commit(self, index, event) -> dict | None:
        """The choice of a commit's chunk, None if it shows nothing yet."""
        if not (event.text or self.logprobs_wanted or self.body.draft):
            return None
        choice = self._text(index, event.text) | {"finish_reason": None}
        if self.logprobs_wanted:
            choice["logprobs"] = self._logprobs(event.token_ids, event.confidences, event.top_logprobs)
        return choice | ({"commit": self._block(event)} if self.body.draft else {})

    def draft(self, index, event) -> dict:
        """The choice of a draft's chunk, an extension: nothing of it is text yet."""
        return self._text(index, "") | {"finish_reason": None, "draft": self._block(event)}

    def last(self, index, request, event) -> dict:
        """The choice of a stream's last chunk."""
        return self._text(index, event.text) | self._end(request)

    def usage(self, requests) -> dict:
        """requests: finished handles. A prompt counts once, whatever number of answers it has."""
        outputs = [request.output for request in requests]
        firsts = outputs[:: self.body.n or 1]
        prompts = sum(output.prompt_length for output in firsts)
        tokens = sum(len(output.token_ids) for output in outputs)
        forwards = sum(output.counters.denoise_forwards for output in outputs)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": tokens,
            "total_tokens": prompts + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(output.shared_tokens for output in firsts)},
            "denoise_forwards": forwards,
            "tokens_per_forward": tokens / max(1, forwards),
        }

    def _head(self, kind):
        head = {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}
        return head | {"system_fingerprint": f"llada2-fast-{__version__}"}

    def _end(self, request):
        output = request.output
        reason = "deadline" if output.finish_reason == "deadline" else output.stop_reason
        end = {"finish_reason": REASONS[output.finish_reason], "stop_reason": reason}
        return end | ({"trace": self.document(self.body, request)} if self.body.trace else {})

    def _block(self, event):
        """Tokens of a draft or a commit, one by one; a mask, which no step has written, has no text."""
        tokens = [
            self.texts.token(token)[0] if step >= 0 else ""
            for token, step in zip(event.token_ids, event.steps, strict=True)
        ]
        return {
            "start": event.start, "token_ids": event.token_ids, "tokens": tokens,
            "confidences": event.confidences, "steps": event.steps,
        }  # fmt: skip


class ChatFormat(Format):
    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @property
    def logprobs_wanted(self):
        return bool(self.body.logprobs)

    def first(self, index):
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _text(self, index, text):
        return {"index": index, "delta": {"content": text} if text else {}, "logprobs": None}

    def _choice(self, index, request):
        output = request.output
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = None
        if self.logprobs_wanted:
            logprobs = self._logprobs(output.token_ids, output.confidences, output.top_logprobs or ())
        return {"index": index, "message": message, "logprobs": logprobs} | self._end(request)

    def _logprobs(self, ids, confidences, tops):
        count = self.body.top_logprobs or 0
        tops = [one[:count] for one in tops] or [[]] * len(ids)
        return {
            "content": [
                self._token(token, logprob(confidence)) | {"top_logprobs": [self._token(*one) for one in top]}
                for token, confidence, top in zip(ids, confidences, tops, strict=True)
            ],
            "refusal": None,
        }

    def _token(self, token, logprob):
        text, data = self.texts.token(token)
        return {"token": text, "logprob": _told(logprob), "bytes": data}


class CompletionFormat(Format):
    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args):
        super().__init__(*args)
        self._offsets = {}  # by choice, the characters of tokens told so far

    @property
    def logprobs_wanted(self):
        return self.body.logprobs is not None

    def _text(self, index, text):
        return {"index": index, "text": text, "logprobs": None}

    def _choice(self, index, request):
        output = request.output
        logprobs = None
        if self.logprobs_wanted:
            logprobs = self._logprobs(output.token_ids, output.confidences, output.top_logprobs or ())
        return {"index": index, "text": output.text, "logprobs": logprobs} | self._end(request)

    def commit(self, index, event):
        choice = super().commit(index, event)
        if choice and choice["logprobs"]:
            begin = self._offsets.get(index, 0)
            choice["logprobs"]["text_offset"] = [begin + at for at in choice["logprobs"]["text_offset"]]
            self._offsets[index] = begin + sum(map(len, choice["logprobs"]["tokens"]))
        return choice

    def _logprobs(self, ids, confidences, tops):
        texts = [self.texts.token(token)[0] for token in ids]
        tops = [one[: self.body.logprobs] for one in tops]
        return {
            "tokens": texts,
            "token_logprobs": [logprob(confidence) for confidence in confidences],
            "top_logprobs": [self._likeliest(top) for top in tops] or None,
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }

    def _likeliest(self, top):
        """By text: of tokens that have the same, as parts of characters do, the likeliest."""
        return {self.texts.token(token)[0]: _told(value) for token, value in reversed(top)}


def _told(logprob):
    """JSON has no infinity; this is OpenAI's word for it."""
    return max(logprob, -9999.0)
