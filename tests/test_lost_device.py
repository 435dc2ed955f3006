"""A GPU that is lost ends the process that lost it, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.lost_device import EXIT_CODE, file_scheduler, leave_if_lost


def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_session_ends(monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="lost: CUDA error: an illegal") as left:
        leave_if_lost(lost)
    assert left.value.returncode == EXIT_CODE


def test_a_worker_leaves():
    code = "from tests.test_lost_device import *; leave_if_lost(int); print('here', flush=True); leave_if_lost(lost)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env={**os.environ, "PYTEST_XDIST_WORKER": "gw0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (EXIT_CODE, "here\n")


class Worker:
    shutting_down, gateway = False, SimpleNamespace(id="gw0")

    def __init__(self, scheduler):
        self.sent = []
        scheduler.add_node(self)

    def send_runtest_some(self, tests):
        self.sent += tests

    def shutdown(self):
        self.shutting_down = True


def test_two_workers_may_leave_at_once():
    """The tests they ran are not run again, those they had left by the new workers, each when it has collected them."""
    pytest.importorskip("xdist")
    names = [f"{file}.py::test_{i}" for file in "ab" for i in range(5)]
    options = SimpleNamespace(tx=["popen"] * 2, loadscopereorder=False)
    scheduler = file_scheduler(SimpleNamespace(option=options, getvalue=vars(options).get), None)
    first = [Worker(scheduler), Worker(scheduler)]
    for worker in first:
        scheduler.add_node_collection(worker, names)
    scheduler.schedule()
    assert [worker.sent for worker in first] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    scheduler.mark_test_complete(first[0], 0)
    assert [scheduler.remove_node(worker) for worker in first] == [names[1], names[5]]
    second = [Worker(scheduler), Worker(scheduler)]
    for worker in second:
        scheduler.add_node_collection(worker, names)
        scheduler.schedule()
    assert [worker.sent for worker in second] == [[2, 3, 4], [6, 7, 8, 9]]
