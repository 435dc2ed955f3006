"""Text on a terminal with something behind it that changes: drawn again in place, a window of the terminal's height."""

import os
import re
import unicodedata

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all that moves a cursor but tab and line break
_FRAMES = {"256": ("38;5;208", "38;5;180", "38;5;110"), "8": ("33", "37", "36")}  # unsure, fairly sure, sure
_SURE, _FAIRLY = 0.9, 0.7


def colours(environment):
    """(confidence or None for a mask) -> the terminal's code for its colour, "" where there are to be none."""
    depth = "256" if "256" in environment.get("TERM", "") or environment.get("COLORTERM") else "8"
    unsure, fairly, sure = _FRAMES[depth]
    if environment.get("NO_COLOR"):
        return lambda confidence: ""
    return lambda p: "2" if p is None else sure if p >= _SURE else fairly if p >= _FAIRLY else unsure


def cells(character):
    """How many columns a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Screen:
    """Text that stays, and pieces behind it that are drawn anew with every show().

    stream: a terminal.
    Where the terminal breaks lines is reckoned as it does it: a full line ends when the next character comes. After a
    change of its size everything is written again.
    """

    def __init__(self, stream):
        self._stream, self._text = stream, ""
        self._column = self._below = 0  # of the text's end; rows from there to where the cursor is
        self._last = ""  # the text's last character and what is drawn over it
        self._size = self._measure()
        self.mask = "\N{LIGHT SHADE}" if _encodes(stream, "\N{LIGHT SHADE}") else "."

    def __enter__(self):
        self._write("\x1b[?25l")  # no cursor
        return self

    def __exit__(self, *_):
        self._write(f"{self._back()}\n\x1b[?25h")

    def show(self, text, pieces=()):
        """Add text that stays; behind it stand pieces, (text, colour's code or ""), as far as the window has room."""
        out, size = self._back(), self._measure()
        if size != self._size:
            self._size, self._column, self._last = size, 0, ""
            out, text, self._text = "\x1b[2J\x1b[H", self._text + text, ""
        self._text += text
        text = _plain(text)
        _, self._column = self._walk(text, self._column)
        self._last = _tail(self._last + text)
        drawn, self._below = self._fit(pieces)
        self._write(out + text + drawn)

    def _back(self):
        """Codes that take the cursor back to the text's end and clear what is behind it."""
        up = f"\x1b[{self._below}A" if self._below else ""
        column, again = self._column, ""
        if column >= self._size.columns:  # behind a full line no cursor can be put: write its last character again
            again = self._last
            column -= sum(map(cells, again))
        self._below = 0
        return "\r" + up + (f"\x1b[{column}C" if column > 0 else "") + "\x1b[J" + again

    def _fit(self, pieces):
        """(what is to be written of the pieces, how many rows below the text it ends)."""
        out, row, column = [], 0, self._column
        for text, code in pieces:
            text, kept = _plain(text), ""
            for character in text:
                rows, after = self._walk(character, column)
                if row + rows > self._size.lines - 2:
                    break
                row, column, kept = row + rows, after, kept + character
            out.append(f"\x1b[{code}m{kept}\x1b[0m" if code and kept else kept)
            if kept != text:
                break
        return "".join(out), row

    def _walk(self, text, column):
        """(rows down, column) of the cursor after writing text from `column` on; a full line's is the width."""
        rows, width = 0, self._size.columns
        for character in text:
            if character == "\n":
                rows, column = rows + 1, 0
            elif character == "\t":
                column = max(column, min(width - 1, column // 8 * 8 + 8))
            else:
                wide = cells(character)
                if wide and column + wide > width:
                    rows, column = rows + 1, 0
                column += wide
        return rows, column

    def _measure(self):
        return os.get_terminal_size(self._stream.fileno())

    def _write(self, text):
        self._stream.write(text)
        self._stream.flush()


def _plain(text):
    """Text without what would move the cursor or change the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _tail(text):
    """The last character that takes room, and all behind it."""
    at = max((i for i, character in enumerate(text) if cells(character)), default=0)
    return text[at:]


def _encodes(stream, text):
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
