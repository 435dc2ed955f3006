"""A terminal for tests: what its screen shows after what was written to it, as xterm has it."""

import fcntl
import os
import pty
import re
import struct
import termios
import unicodedata

_CODE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])")


class Terminal:
    """columns, lines: its size. `shown` has all rows, those that have scrolled away as well."""

    def __init__(self, columns, lines):
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column = [[]], 0, 0
        self.cursor_shown, self.codes = True, set()

    @property
    def shown(self):
        text = ["".join(row).replace("\0", "").rstrip() for row in self.rows]
        while text and not text[-1]:
            text.pop()
        return text

    @property
    def top(self):
        return max(0, len(self.rows) - self.lines)

    def feed(self, text):
        at = 0
        while at < len(text):
            code = _CODE.match(text, at)
            if code:
                self._obey(*code.groups())
                at = code.end()
            else:
                self._put(text[at])
                at += 1

    def _obey(self, argument, name):
        count = int(argument) if argument.isdigit() else 1
        if name == "A":
            assert self.row - count >= self.top, "the cursor would leave the screen"
            self.row -= count
        elif name == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif name == "J" and not argument:
            del self.rows[self.row + 1 :]
            del self.rows[self.row][self.column :]
        elif name == "J":
            self.rows, self.row, self.column = [[]], 0, 0
        elif name == "H":
            self.row, self.column = self.top, 0
        elif argument == "?25":
            self.cursor_shown = name == "h"
        elif name == "m":
            self.codes.add(argument)
        else:
            raise AssertionError(f"unknown code {argument}{name}")

    def _put(self, character):
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        elif character == "\t":
            self.column = max(self.column, min(self.columns - 1, self.column // 8 * 8 + 8))
        else:
            self._print(character)

    def _print(self, character):
        assert character >= " ", f"{character!r} moves the cursor"
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            if self.column:
                self.rows[self.row][self.column - 1] += character
            return
        wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + wide > self.columns:
            self._down()
            self.column = 0
        row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        row[self.column : self.column + wide] = [character, "\0"][:wide]
        self.column += wide

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])


def open_pty(columns, lines):
    """(our end, the program's end) of a terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return ours, theirs


def read_all(descriptor):
    """What was written to the program's end, which is closed by now."""
    pieces = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError:  # Linux: nobody has the other end any more
        pass
    os.close(descriptor)
    return b"".join(pieces).decode()
