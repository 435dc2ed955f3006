"""generate --watch: what a terminal shows while and after an answer is written."""

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llada2_fast.cli import commands, doctor, traced
from llada2_fast.cli.screen import Screen, colours
from tests.viewer.terminal import Terminal, open_pty, read_all

ROOT = Path(__file__).parent.parent.parent
STORY = "Tell a story about Max the goat near the lake."
# what is wide, what takes no room, what wraps
characters = st.sampled_from(list("abc de fgh\n\t") + ["語", "é", "e\u0301", "🙂", "\x1b", "░"])
texts = st.lists(characters, max_size=30).map("".join)


class Paper(io.StringIO):
    """What is written, beside a terminal that has a size: what went through that one would come a little later."""

    encoding = "utf-8"

    def __init__(self, columns, lines):
        super().__init__()
        self.ours, self._theirs = open_pty(columns, lines)

    def fileno(self):
        return self._theirs

    def take(self):
        """What is new, as the terminal gets it."""
        text = self.getvalue().replace("\n", "\r\n")
        self.seek(0)
        self.truncate()
        return text

    def resize(self, columns, lines):
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def close(self):
        os.close(self.ours)
        os.close(self._theirs)
        super().close()


def drawn(columns, lines, frames):
    """The terminal after a Screen has shown these (text, pieces), and what it showed after each."""
    terminal, seen = Terminal(columns, lines), []
    with closing(Paper(columns, lines)) as paper:
        with Screen(paper) as screen:
            for text, pieces in frames:
                screen.show(text, [(piece, "") for piece in pieces])
                terminal.feed(paper.take())
                seen.append(terminal.shown)
        terminal.feed(paper.take())
    return terminal, seen


def plain(columns, text):
    terminal = Terminal(columns, 1000)
    terminal.feed(text.replace("\x1b", "\N{REPLACEMENT CHARACTER}").replace("\n", "\r\n"))
    return terminal.shown


@given(st.integers(4, 20), st.integers(3, 8), st.lists(st.tuples(texts, st.lists(texts, max_size=6)), max_size=6))
@example(4, 3, [("abcd", ["efgh"]), ("e", ["f"]), ("fgh", [])])  # lines that are full
@example(5, 3, [("ab語", ["語"]), ("語", ["x"]), ("語語", ["語" * 20])])
def test_what_stays_is_the_text(columns, lines, frames):
    terminal, _ = drawn(columns, lines, frames)
    assert terminal.shown == plain(columns, "".join(text for text, _ in frames))
    assert terminal.cursor_shown


@given(st.integers(4, 20), texts, texts, st.lists(texts, max_size=6))
def test_pieces_stand_behind_the_text(columns, first, second, pieces):
    _, seen = drawn(columns, 60, [(first, ["gone", "語"]), (second, pieces)])
    assert seen[-1] == plain(columns, first + second + "".join(pieces))


def test_pieces_keep_to_the_window():
    terminal, seen = drawn(10, 4, [("text", ["\nx"] * 20), ("more", [])])
    assert seen[0] == ["text", "x", "x"] and terminal.shown == ["textmore"]


def test_another_size_is_drawn_again():
    terminal = Terminal(16, 6)
    with closing(Paper(10, 6)) as paper:
        with Screen(paper) as screen:
            screen.show("some text that is long", [(8 * screen.mask, "")])
            paper.take()
            paper.resize(16, 6)
            screen.show(" enough", [(screen.mask, "")])
        terminal.feed(paper.take())
    assert screen.mask == "░" and terminal.shown == plain(16, "some text that is long enough")


@pytest.mark.parametrize("environment, unsure, mask", [
    ({"TERM": "xterm-256color"}, "38;5;208", "2"), ({"TERM": "xterm"}, "33", "2"),
    ({"TERM": "xterm", "COLORTERM": "truecolor"}, "38;5;208", "2"), ({"TERM": "xterm", "NO_COLOR": "1"}, "", ""),
    ({"TERM": "xterm", "NO_COLOR": ""}, "33", "2"),
])  # fmt: skip
def test_colours(environment, unsure, mask):
    style = colours(environment)
    assert (style(0.1), style(None)) == (unsure, mask)
    assert len({style(p) for p in (0.1, 0.8, 0.95)}) == (3 if unsure else 1)


def watch(*arguments, columns=40, lines=12, stdout=None, **env):
    """(terminal, all that was written to it, stdout if it is no terminal) of the command line in a pty."""
    ours, theirs = open_pty(columns, lines)
    command = [sys.executable, "-m", "llada2_fast", "generate", "--no-progress", "--watch", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", **env}
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=environment, text=True
    )
    os.close(theirs)
    written = read_all(ours)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, written
    terminal = Terminal(columns, lines)
    terminal.feed(written)
    return terminal, written, out


def test_the_command_line_shows_masks_then_the_answer():
    terminal, written, _ = watch(doctor.QUESTION, "--threshold", "2")  # a token a step
    answer = doctor.ANSWER.splitlines()
    assert terminal.shown[:4] == answer and re.fullmatch(r"36 tokens, .*", terminal.shown[4])
    assert terminal.cursor_shown and "2" in terminal.codes and "38;5;110" in terminal.codes
    half = Terminal(40, 12)
    half.feed(written[: written.index("\r", len(written) // 2)])  # no code is cut
    assert re.search(r"\d", "".join(half.shown)) and "░" in "".join(half.shown) and not half.cursor_shown


def test_drafts_that_are_checked_are_drawn_when_they_are_written():
    terminal, written, _ = watch(doctor.QUESTION, "--policy", "self_speculative", "--entropy-bound", "0")
    answer = doctor.ANSWER.splitlines()
    assert terminal.shown[:4] == answer and re.fullmatch(r"36 tokens, 6 forwards, .*", terminal.shown[4])


def test_text_for_a_pipe_is_drawn_on_stderr():
    terminal, written, out = watch(STORY, stdout=subprocess.PIPE, NO_COLOR="1", lines=6)
    assert out.startswith("Once there was a goat named Max.") and out.endswith("The end.\n")
    assert "".join(terminal.shown).startswith("Once there was a goat") and "\x1b[2m" not in written
    assert plain(40, out) == terminal.shown[: len(plain(40, out))]


def test_no_terminal_is_told_before_anything_is_loaded(capsys):
    assert commands.main(["generate", "x", "--watch", "--model", "no/such/folder"]) == 2
    assert capsys.readouterr() == ("", "llada2-fast: error: --watch: expected a terminal\n")


@pytest.mark.parametrize("environment, arguments, words", [
    ({"TERM": "xterm"}, ["one", "two"], "--watch: expected one prompt, got 2"),
    ({"TERM": "dumb"}, ["one"], "--watch: expected a terminal whose cursor can be moved, but TERM=dumb"),
])  # fmt: skip
def test_what_cannot_be_watched(monkeypatch, environment, arguments, words):
    ours, theirs = open_pty(80, 24)
    monkeypatch.setenv("TERM", environment["TERM"])
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(ValueError, match=words):
            traced.check(None, True, arguments)
    os.close(ours)
