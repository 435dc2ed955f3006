"""pytest plugin: a JSON line for every test, or file of tests, as soon as it has failed, appended to a file.

python -m pytest -p benchmarks.gpu.failed_tests --failed-to FILE
"""

from pathlib import Path

from ..lines import append_line

LONGEST = 3000  # characters of a traceback, the last ones


def pytest_addoption(parser):
    parser.addoption("--failed-to", type=Path, metavar="FILE", help="append a line for each failed test to it")


def pytest_configure(config):
    path = config.getoption("failed_to")
    if path is not None and not hasattr(config, "workerinput"):  # of pytest-xdist's processes the one that hears of all
        config.pluginmanager.register(_Lines(path))


class _Lines:
    def __init__(self, path):
        self.path = path

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            line = {"test": report.nodeid, "ok": False}
            append_line(self.path, line | {"error": report.longreprtext[-LONGEST:]})
