"""`llada2-fast serve` as a process of its own, for as long as a benchmark needs it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llada2_fast.cli.machine import environment

READY_S, STOP_S = 120.0, 30.0  # to load its model, to end after SIGTERM


class Server(NamedTuple):
    base_url: str
    pid: int


@contextmanager
def serving(*options):
    """Yields a Server with the embedded model, ready, on a free port of 127.0.0.1, started with these options.

    SystemExit if it does not get ready, or does not end with exit code 0 after SIGTERM; both tell its last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llada2_fast", "serve", "--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment())
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        try:
            _wait_until_ready(server, process, log)
            yield server
        finally:
            code = _stop(process)
        if code != 0:
            raise SystemExit(f"llada2-fast serve ended with exit code {code}: {_last_lines(log)}")


def cpu_seconds(pid):
    """CPU time that a process has used, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()  # its name may hold anything
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds():
    """CPU time that all programs of this machine have used."""
    fields = Path("/proc/stat").read_text("utf-8").split()[1:9]  # of all processors; the 4th and 5th are idle
    return sum(int(field) for at, field in enumerate(fields) if at not in (3, 4)) / os.sysconf("SC_CLK_TCK")


def _wait_until_ready(server, process, log):
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.base_url}/ready", timeout=5):
                return
        except OSError:  # nobody listens yet, or 503
            time.sleep(0.1)
    state = "is not ready" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise SystemExit(f"llada2-fast serve {state}: {_last_lines(log)}")


def _stop(process):
    """Its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"SIGKILL, {STOP_S:.0f} s after SIGTERM"


def _last_lines(log, count=5):
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return " | ".join(lines[-count:]) or "it said nothing"
