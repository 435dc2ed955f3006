"""Runs the timings of __main__.OPS: every case is built and gated once, then ours and its peer are timed in turn."""

import pytest
import torch

from .cases import Here

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only the smallest case of every op")
    parser.addoption("--only", metavar="OPS", help="comma-separated (default: all)")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        quick, only = map(metafunc.config.getoption, ("--quick", "--only"))
        ops = metafunc.module.OPS
        chosen = only.split(",") if only else ops
        cases = [(op, name) for op in chosen for name in list(ops[op][1])[: 1 if quick else None]]
        metafunc.parametrize("case", cases, indirect=True, scope="module", ids=" ".join)
        metafunc.parametrize("who", ["ours", "peer"])


@pytest.fixture(scope="module")
def case(request):
    """(op, name of a case) -> both and the Case, built anew, ours and the peer in agreement."""
    op, name = request.param
    build, cases = request.module.OPS[op]
    torch.manual_seed(0)
    with torch.inference_mode():
        case = build(Here(), *cases[name])
        case.gate(name)
    return op, name, case
