"""The events of a request, one after the other."""

from .request import Event, Request


class Stream:
    """An iterator over the events of a request, the last one "finish". The engine steps while there are none.

    engine, request: whose, and which.
    """

    def __init__(self, engine, request: Request):
        self.engine, self.request, self._over = engine, request, False

    def __iter__(self):
        return self

    def __next__(self) -> Event:
        while not self._over:
            event = self.request.next_event()
            if event is not None:
                self._over = event.kind == "finish"
                return event
            if self.request.output is not None:  # somebody else has read it
                break
            self.engine.check_awake()
            self.engine.step()
        raise StopIteration

    def close(self):
        """Cancel the request if it is not finished."""
        self._over = True
        if self.request.output is None:
            self.engine.leave(self.request)

    def __del__(self):
        self.close()
