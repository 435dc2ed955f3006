"""Who may change an engine: one call at a time, in the thread that owns it; and whose an exception is."""

import inspect
import sys
import threading
import traceback
from itertools import pairwise, starmap


class Gate:
    """Calls enter one at a time. Who is inside is known by the frame it runs in: a call that an exception has ended at
    whatever line, even while it left, is not taken for one that goes on.

    owner: ident of the one thread that may enter, None = any.
    """

    def __init__(self):
        self.owner: int | None = None
        self._inside = {}  # "frame": of the call that is inside

    def enter(self, frame):
        """RuntimeError if another thread owns the engine, or is inside, or this one is already."""
        if self.owner not in (None, threading.get_ident()):
            raise RuntimeError("the engine belongs to an AsyncEngine: use that, e.g. its call(function)")
        inside = self._inside.setdefault("frame", frame)
        if inside is not frame:
            thread = _thread_of(inside)
            if thread is not None:
                here = "this thread, and cannot be used from what it calls or from a signal handler"
                raise RuntimeError(f"the engine is at work in {here if thread == threading.get_ident() else 'another'}")
            self._inside["frame"] = frame

    def leave(self):
        self._inside.clear()

    @property
    def is_free(self) -> bool:
        """This thread may enter."""
        return not self._inside and self.owner in (None, threading.get_ident())


def _thread_of(frame):
    """Ident of the thread that runs a frame, None if it is over."""
    for thread, top in sys._current_frames().items():
        while top is not None:
            if top is frame:
                return thread
            top = top.f_back
    return None


def is_callers(error: BaseException) -> bool:
    """Whether an exception is for who called, no fault of what it has interrupted: Ctrl-C, exit, whatever a signal
    handler raises. A panic of a tokenizer in Rust is none, though no Exception either."""
    if not isinstance(error, Exception):
        return type(error).__module__ != "pyo3_runtime"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(starmap(_handles, pairwise(frames)))


def _handles(interrupted, frame):
    """Whether a frame is a signal handler's, which is called with a number and the frame that the signal came in."""
    code, values = frame.f_code, frame.f_locals
    given = [values.get(name) for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        given += values.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ())
    return any(isinstance(number, int) and at is interrupted for number, at in pairwise(given))
