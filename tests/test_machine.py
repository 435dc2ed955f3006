"""What programs ask of the machine's libraries before torch loads, and that a library call asks nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada2_fast.cli import machine

ROOT = Path(__file__).parent.parent
NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")


def run(code, **settings):
    """What a new Python process prints as JSON, in an environment without our variables but for `settings`."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | settings
    command = [sys.executable, "-c", f"import json, os, sys; {code}"]
    return json.loads(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    ("vendor", "flags", "more"),
    [
        ("GenuineIntel", {"avx2", "avx512f", "amx_bf16"}, {"MKL_CBWR", "ONEDNN_MAX_CPU_ISA"}),
        ("GenuineIntel", {"avx2", "avx512f"}, {"MKL_CBWR"}),
        ("GenuineIntel", {"avx2"}, set()),
        ("AuthenticAMD", {"avx2", "avx512f"}, set()),
        ("", set(), set()),
    ],
)
def test_what_is_asked_of_which_processor(vendor, flags, more):
    wanted = machine.wanted(vendor, flags)
    assert wanted.keys() == {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} | more
    assert wanted["OMP_WAIT_POLICY"] == "passive"
    assert wanted["OMP_NUM_THREADS"] == str(machine.processors())
    assert wanted.get("MKL_CBWR") in (None, "AVX512,STRICT")


def test_a_program_sets_what_is_not_set():
    code = "from llada2_fast.cli.machine import prepare; new = prepare(); print(json.dumps([new, dict(os.environ)]))"
    new, environment = run(code)
    assert {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} <= new.keys() <= set(NAMES)
    assert new.items() <= environment.items()
    new, environment = run(code, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="7")
    assert environment["OMP_WAIT_POLICY"] == "active" and environment["OMP_NUM_THREADS"] == "7"
    assert not new.keys() & {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


def test_a_program_that_another_starts_chooses_for_itself():
    code = "from llada2_fast.cli.machine import environment, prepare; prepare(); print(json.dumps(environment()))"
    environment = run(code, OMP_WAIT_POLICY="active")
    assert environment["OMP_WAIT_POLICY"] == "active" and "OMP_NUM_THREADS" not in environment
    assert environment["PATH"] == os.environ["PATH"]


def test_it_is_too_late_once_torch_is_there():
    assert run("import torch; from llada2_fast.cli.machine import prepare; print(json.dumps(prepare()))") == {}


def test_a_library_call_changes_nothing_of_its_host():
    code = (
        "before = dict(os.environ); import torch; threads = torch.get_num_threads(); import llada2_fast as l; "
        "m = l.LLaDA2Model.from_pretrained(l.demo.path(), progress=False); m.exact_rows; "
        "m.generate([[2, 3]], gen_length=4); "
        "l.Engine(m, l.EngineConfig()).generate([[2, 3]], l.DecodeParams(gen_length=4)); "
        "print(json.dumps([before == dict(os.environ), threads == torch.get_num_threads()]))"
    )
    assert run(code) == [True, True]


def test_a_small_network_gets_one_thread_unless_the_number_is_given():
    code = (
        "from llada2_fast.cli import main; main(['generate', '--no-progress', '--max-tokens', '4', '--json', 'x']); "
        "import torch; print(torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    for given, threads in (({}, "1"), ({"OMP_NUM_THREADS": "2"}, "2")):
        command = [sys.executable, "-c", code]
        said = subprocess.run(command, env=environment | given, cwd=ROOT, capture_output=True, text=True, check=True)
        assert said.stdout.splitlines()[-1] == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_no_more_threads_than_processors():
    one = f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    assert run(f"{one}; from llada2_fast.cli.machine import processors; print(processors())") == 1


def test_doctor_says_what_was_found():
    code = """
from contextlib import redirect_stdout
from io import StringIO
from llada2_fast.cli import main
with redirect_stdout(StringIO()) as out:
    main(["doctor", "--json"])
from llada2_fast import LLaDA2Model, demo
model = LLaDA2Model.from_pretrained(demo.path(), "float32", "auto", progress=False)
print(json.dumps([json.loads(out.getvalue()), [[rows.library, rows.least] for rows in model.products().values()]]))
"""
    said, products = run(code, OMP_NUM_THREADS="1")
    assert said["this process"]["OMP_WAIT_POLICY"] == "passive"
    assert said["this process"]["OMP_NUM_THREADS"] == "1"
    libraries, heights = ({*found} for found in zip(*products, strict=True))
    if "ops on cuda" in said:
        wanted = "yes: no product rounds a row by the rows beside it"
    elif None in heights:
        failed = sum(height is None for _, height in products)
        wanted = f"no: {failed} of {len(products)} products round a row by the rows beside it, at any height"
    else:
        names = ", ".join(sorted(libraries))
        wanted = f"yes: products round a row alike from a height of {max(heights)} on ({names})"
    assert said["embedded model"]["exact rows"] == wanted
