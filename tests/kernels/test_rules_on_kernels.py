"""Every rule of test_refine_rules.py once more, on the kernels in Triton's interpreter."""

import pytest

from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted
from tests.kernels.test_refine_rules import *  # noqa: F403  (pytest collects them here too)


@pytest.fixture(autouse=True)
def kernels():
    with force_ops("triton"), interpreted():
        yield
