"""pytest plugin: a JSON line for every failed test as soon as it has failed, appended to a file.

python -m pytest -p benchmarks.failed_tests --failed-to FILE
"""

import json
from pathlib import Path

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

    def pytest_runtest_logreport(self, report):
        if report.failed:
            line = {"test": report.nodeid, "ok": False, "seconds": round(report.duration, 1)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"error": report.longreprtext[-LONGEST:]}) + "\n")
