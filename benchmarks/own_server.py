"""`llada2-fast serve` as a process of its own, for benchmarks, the scorecard and tests: its life, log and memory.

What it uses is read from /proc, so on Linux alone.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llada2_fast.cli.machine import environment

SERVE = (sys.executable, "-m", "llada2_fast", "serve", "--no-progress")
START_S, STOP_S = 120.0, 60.0  # at most: to load its model, to end after SIGTERM


class Usage(NamedTuple):
    """memory: resident bytes; files: open descriptors; threads: of the process; cpu_s: that it has used."""

    memory: int
    files: int
    threads: int
    cpu_s: float


class ServerProcess:
    """A server that has begun to serve, until the end of a `with`, which kills it if it still runs.

    options: of its command line, behind the port.
    command: the program that is run, as a list; default `llada2-fast serve`, with the embedded model.
    port: 0 takes a free one.
    variables: of its environment, beside those of this process that its start-up has not set itself.
    RuntimeError, with the end of its log, if it does not come to serve.
    """

    def __init__(self, *options, command=SERVE, port: int = 0, variables=None):
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *map(str, options)], env=environment() | (variables or {}),
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        try:
            self.url = self._first_line(time.monotonic() + START_S)["url"]
        except BaseException:
            self.kill()
            raise
        self.port = int(self.url.rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._log.close()

    def _first_line(self, deadline):
        while time.monotonic() < deadline:
            if served := self.told("serving"):
                return served[0]
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}: {self.last_lines()}")
            time.sleep(0.02)
        raise RuntimeError(f"the server does not serve after {START_S:.0f} s: {self.last_lines()}")

    def log(self) -> str:
        """What it has written so far, stdout and stderr."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def last_lines(self) -> str:
        return " | ".join(self.log().splitlines()[-5:]) or "it said nothing"

    def told(self, event: str | None = None) -> list[dict]:
        """The lines of its log, those of one event or all."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if event in (None, line["event"])]

    def wait_for(self, **facts) -> dict:
        """The first line of its log with these facts; AssertionError if there is none within 10 s."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for line in self.told():
                if facts.items() <= line.items():
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no line with {facts} in {self.log()}")

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Its exit code after SIGTERM; subprocess.TimeoutExpired if it does not end within STOP_S."""
        self.terminate()
        return self.process.wait(STOP_S)

    def usage(self) -> Usage:
        return usage(self.process.pid)


@contextmanager
def serving(*options):
    """Yields a ServerProcess; SystemExit if it does not start, or does not end with exit code 0 after SIGTERM."""
    try:
        server = ServerProcess(*options)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    with server:
        yield server
        if (code := server.stop()) != 0:
            raise SystemExit(f"the server ended with exit code {code}: {server.last_lines()}")


def usage(pid: int | str = "self") -> Usage:
    """Of a process, all its threads; this one unless told otherwise."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, threads = (len(os.listdir(folder / name)) for name in ("fd", "task"))
    fields = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()  # its name may hold anything
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Usage(resident, files, threads, cpu_s)


def busy_seconds():
    """CPU time that all programs of this machine have used."""
    fields = Path("/proc/stat").read_text("utf-8").split()[1:9]  # of all processors; the 4th and 5th are idle
    return sum(int(field) for at, field in enumerate(fields) if at not in (3, 4)) / os.sysconf("SC_CLK_TCK")
