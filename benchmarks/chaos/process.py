"""A server as a process of its own, whose life, memory and log a gate looks at. Linux's /proc is needed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ..own_server import cpu_seconds

START_S, STOP_S = 60.0, 60.0  # at most
# PyTorch's own caches of 1024 shapes each take minutes and 200 MB to fill; see soak.py. What glibc keeps for a thread
# comes and goes by tens of MB. One thread: what the command line chooses for this model, and what the expected answers
# are computed with.
ENVIRONMENT = {
    "LRU_CACHE_CAPACITY": "16",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


class Usage(NamedTuple):
    """memory: resident bytes; files: open descriptors; threads: of the process; cpu_s: that it has used."""

    memory: int
    files: int
    threads: int
    cpu_s: float


class ServerProcess:
    """`llada2-fast serve` with the embedded model and these options, for `with`; killed at its end if it still runs.

    module: run in place of llada2_fast serve, as chaos' own launcher.
    RuntimeError where it does not come to serve.
    """

    def __init__(self, *options, module: str | None = None, port: int = 0):
        what = ["llada2_fast", "serve", "--no-progress"] if module is None else [module]
        self._command = [sys.executable, "-m", *what, "--port", str(port), *map(str, options)]
        self._log = tempfile.TemporaryFile()
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        try:
            self.port = self._wait()
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - self._begun

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self._log.close()

    def _wait(self):
        while time.monotonic() < self._begun + START_S:
            if served := self.told("serving"):
                return int(served[0]["url"].rpartition(":")[2])
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"{' '.join(self._command)} does not serve: {self.log()[-2000:]}")

    def log(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def told(self, event: str | None = None) -> list[dict]:
        """The lines of its log, those of one event or all."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if event in (None, line["event"])]

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.terminate()
        return self.process.wait(STOP_S)

    def usage(self) -> Usage:
        folder = Path(f"/proc/{self.process.pid}")
        resident = int((folder / "statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files, threads = (len(os.listdir(folder / name)) for name in ("fd", "task"))
        return Usage(resident, files, threads, cpu_seconds(self.process.pid))
