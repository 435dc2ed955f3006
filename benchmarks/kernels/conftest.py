"""Runs the timings: every case of a file is built and gated once, then ours and its peer are timed side by side.

pytest benchmarks/kernels/bench_norm.py [--quick]        or all of them: python -m benchmarks.kernels
"""

import pytest
import torch

from .cases import Here

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only the smallest case of every op")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        names = list(metafunc.module.CASES)[: 1 if metafunc.config.getoption("--quick") else None]
        metafunc.parametrize("case", names, indirect=True, scope="module")
        metafunc.parametrize("who", ["ours", "peer"])


@pytest.fixture(scope="module")
def case(request):
    """A name of the file's CASES -> its Case, built anew, ours and the peer in agreement."""
    torch.manual_seed(0)
    with torch.inference_mode():
        case = request.module.case_of(Here(), *request.module.CASES[request.param])
        case.gate(request.param)
    return case


@pytest.fixture
def timed(benchmark, case, who, request):
    """A call that times one of the two; the figures and what they are of go into pytest-benchmark's report."""
    op, name = request.module.__name__.rpartition("bench_")[2], request.node.callspec.params["case"]
    benchmark.group = f"{op} {name}"

    def run():
        with torch.inference_mode():
            call, calls = case.target(who)
            benchmark.extra_info.update(
                op=op, case=name, who=who, peer=case.peer_name, calls=calls, bytes=case.bytes,
                operations=case.operations,
            )  # fmt: skip
            benchmark(call)

    return run
