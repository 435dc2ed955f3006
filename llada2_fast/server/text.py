"""Text to tokens and back; off the event loop where it takes long, and a chat's for no longer than allowed."""

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from ..weights.special_tokens import render_chat
from .errors import ApiError

SHORT = 8192  # characters, or tokens, that are seen to at once: a change of threads costs more beside a busy engine
PER_MESSAGE = 64  # characters that a message costs beside its text
THREADS = 2
TEMPLATE = "<template>"  # the file that jinja2 says a template's code is of


class TooSlow(Exception):
    """A chat template has not come to an end in its time."""


class Texts:
    """The model's tokenizer, for a server.

    tokenizer: of transformers'.
    template_timeout_s: for rendering one chat.
    """

    def __init__(self, tokenizer, template_timeout_s: float):
        self.tokenizer, self.template_timeout_s = tokenizer, template_timeout_s
        self._threads = ThreadPoolExecutor(THREADS, "llada2-text")
        self.token = lru_cache(65536)(self._token)

    def close(self):
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode_chat(self, messages: list[dict]) -> list[int]:
        """A chat's prompt. ApiError if there is no template, or if it raises or takes too long."""
        size = sum(len(message["content"]) + PER_MESSAGE for message in messages)
        return await self.run(size, self._encode_chat, messages)

    async def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, with the tokens that the tokenizer puts around one."""
        return await self.run(sum(map(len, texts)), lambda: self.tokenizer(texts)["input_ids"])

    async def decode(self, ids: list[int]) -> str:
        return await self.run(len(ids), self.tokenizer.decode, ids)

    async def run(self, size: int, function, *args):
        """function(*args), which takes a time that grows with `size`, so that nobody else has to wait for it."""
        if size <= SHORT:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _encode_chat(self, messages):
        return self.tokenizer(self._render(messages), add_special_tokens=False)["input_ids"]

    def _render(self, messages):
        from jinja2 import TemplateError

        try:
            with _Within(self.template_timeout_s):
                return render_chat(self.tokenizer, messages)
        except TooSlow:
            raise ApiError(400, "messages: the chat template took too long", "messages", "template_timeout") from None
        except TemplateError as error:  # it refuses what it was given, as roles that do not alternate
            raise ApiError(400, f"messages: the chat template says: {error.message:.200}", "messages") from error
        except ValueError as error:
            raise ApiError(400, str(error), "messages", "no_chat_template") from error

    def _token(self, token: int) -> tuple[str, list[int] | None]:
        """(text, UTF-8 bytes) of one token by itself; no bytes where its tokenizer does not say them."""
        text = self.tokenizer.decode([token])
        if "\ufffd" not in text:
            return text, list(text.encode())
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return text, None
        if len(raw) == 6 and raw.startswith("<0x"):  # byte fallback
            return text, [int(raw[3:5], 16)]
        data = [_byte_level().get(character) for character in raw]
        return text, None if None in data else data


@lru_cache(1)
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where it can be seen, else the next of
    those from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class _Within:
    """While it is open, a template of jinja2's raises TooSlow in this thread once its time is over: it is a program,
    and a thread cannot be stopped from outside. Looked at between lines: one call that takes long is not seen.
    """

    def __init__(self, seconds):
        self._seconds = seconds

    def __enter__(self):
        self._end, self._before = time.monotonic() + self._seconds, sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _enter(self, frame, event, argument):
        return self._look if frame.f_code.co_filename == TEMPLATE else None  # to look at others costs more than they do

    def _look(self, frame, event, argument):
        if time.monotonic() > self._end:
            raise TooSlow
        return self._look
