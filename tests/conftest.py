"""What every test runs under: one thread, repeatable random examples, poisoned uninitialised memory."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.lost_device import file_scheduler, leave_if_lost

# One thread per pytest-xdist worker; the variable is for the processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# torch.empty then returns NaN, or the largest integer, so that reading before writing shows.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# A busy machine fails no test: there is no deadline for an example, nor for the making of it.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    # pytest-timeout's own marker: without it the tests still run, and only the limits are gone.
    config.addinivalue_line("markers", "timeout(seconds): how long a test may take")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Ahead of all fixtures: what a test draws depends on no test before it."""
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return file_scheduler(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Behind all reports of a test."""
    failed = item.session.testsfailed
    result = yield
    if item.session.testsfailed > failed and item.get_closest_marker("gpu"):
        leave_if_lost(torch.cuda.synchronize)
    return result


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden():
    """The folder of recorded tokens, logits and hidden states that the model cards' code produced."""
    return Path(__file__).parent / "golden"
