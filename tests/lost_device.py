"""What becomes of a process whose GPU no longer answers, as after an illegal access, and of the tests it had left."""

import os

import pytest

EXIT_CODE = 17
ALONE = ("test_recorded_decodings_come_out_of_the_graphs",)  # tests of a minute on a GPU: each as if a file of its own


def leave_if_lost(answers):
    """Leave if answers(), which waits for the device, raises: pytest-xdist then starts another worker for the tests
    that are left; without it they would all fail, and the session ends."""
    try:
        answers()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(EXIT_CODE)
        pytest.exit(f"the GPU is lost: {error}", EXIT_CODE)


def file_scheduler(config, log):
    """pytest-xdist's scheduler by files, for workers that leave. xdist 3.8's own runs the test in which one left again
    and again, and ends with a KeyError where two left and one of the new ones has collected ahead of the other."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if any(name in nodeid for name in ALONE) else super()._split_scope(nodeid)

        def _reschedule(self, node):
            if node in self.registered_collections:
                super()._reschedule(node)

        def remove_node(self, node):
            units = self.assigned_work.pop(node)
            ended = next((test for unit in units.values() for test, done in unit.items() if not done), None)
            if ended:
                units[self._split_scope(ended)][ended] = True
                self.workqueue.update({name: unit for name, unit in units.items() if not all(unit.values())})
                for other in self.assigned_work:
                    self._reschedule(other)
            return ended

    return Scheduler(config, log)
