"""Server-sent events as their bytes come: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import re

_LINE_END = re.compile(rb"\r\n|\r|\n")
MAX_BYTES = 2**26  # of one event; a server that never ends one would fill the memory


class EventStream:
    """feed() takes bytes, cut anywhere, and gives the data of the events that they end.

    Lines end with CR LF, LF or CR. Comments, names, ids and events without data are left out. What no blank line has
    ended when the bytes are over is no event.
    """

    def __init__(self):
        self._line, self._data, self._size = b"", [], 0
        self._first, self._after_cr = True, False

    def feed(self, chunk: bytes) -> list[str]:
        """ValueError if what is there is no UTF-8, or an event has more than MAX_BYTES."""
        if not chunk:
            return []
        ended_with_cr, self._after_cr = self._after_cr, chunk.endswith(b"\r")
        if ended_with_cr and chunk.startswith(b"\n"):  # the second half of a CR LF
            chunk = chunk[1:]
        *lines, self._line = _LINE_END.split(self._line + chunk)
        events = []
        for line in lines:
            if self._first:
                self._first, line = False, line.removeprefix(b"\xef\xbb\xbf")
            if line:
                self._take(line)
            elif self._data:
                events.append("\n".join(self._data))
                self._data, self._size = [], 0
        if self._size + len(self._line) > MAX_BYTES:
            raise ValueError(f"an event of more than {MAX_BYTES} bytes")
        return events

    def _take(self, line):
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode())
            self._size += len(value)
