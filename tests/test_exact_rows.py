"""A row's bits do not depend on the rows beside it: on this machine, under other settings of its libraries, and where
a library does otherwise the probe says so."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llada2_fast.adapters.lm_eval import LLaDA2LM
from llada2_fast.cli import doctor
from llada2_fast.config import DecodeParams, EngineConfig
from llada2_fast.engine import Engine
from llada2_fast.kernels import product
from llada2_fast.kernels.product import linear, rows_of

from . import rows
from .thinned import thinned

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow
NEVER = "this machine's libraries round a row by its batch, at any height: nothing is promised"


def library(same_bits):
    """A product that rounds its rows in one way at heights for which same_bits(height), and in another elsewhere."""

    def multiply(x, weight, bias):
        y = (x.double()[:, None] * weight.double()).sum(-1)  # each element by itself
        return (y if same_bits(len(x)) else y + 1e-3 * len(x)).to(x.dtype)

    return multiply


@pytest.mark.parametrize(
    ("same_bits", "least", "padded"),
    [
        (lambda m: True, 2, (0, 2)),
        (lambda m: m >= 7, 7, (0, 7, 7, 7, 7, 7, 7)),
        (lambda m: m % 4 == 0 or m > 12, 12, (0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12)),
        (lambda m: m >= 16 or m == 3, 16, (0, 3, 3, 3, *[16] * 12)),
        (lambda m: m == product.TALL, None, ()),
        (lambda m: m != 100, None, ()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_probe_finds_the_heights_that_will_do(same_bits, least, padded, dtype):
    assert product._probe(library(same_bits), 24, 40, dtype) == (least, padded)


def test_products_are_padded_to_a_height_that_will_do():
    heights = []

    def watched(x, weight, bias):
        heights.append(len(x))
        return F.linear(x, weight, bias)

    x, weight, bias, out = torch.randn(9, 6), torch.randn(4, 6), torch.randn(4), torch.empty(9, 4)
    way = product.Rows("other", watched, 4, (0, 4, 4, 4))
    for count in range(9):
        assert torch.equal(way(x[:count], weight, bias), F.linear(F.pad(x[:count], (0, 0, 0, 4)), weight, bias)[:count])
        way.into(x[:count], weight, out[:count])
    assert heights == [0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    torch.testing.assert_close(out[:8], F.linear(x[:8], weight))


@pytest.mark.parametrize("dtype", [*rows.DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*rows.SHAPES, (1, 7), (3, 10)], ids=str)
def test_a_row_has_the_same_bits_at_any_height(shape, dtype):
    if not rows.promised(*shape, dtype):
        pytest.skip(NEVER)
    assert rows.unlike(*shape, dtype) == []


@pytest.mark.parametrize("dtype", [*rows.DTYPES, torch.float16], ids=str)
def test_it_is_the_product(dtype):
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((3, 5, 2, 48), (40, 48), (40,)))
    for rows_in, b in ((x, None), (x.transpose(0, 1), bias)):
        y, wanted = linear(rows_in, weight, b), rows_in.double() @ weight.double().T
        wanted = wanted if b is None else wanted + b.double()
        torch.testing.assert_close(y.double(), wanted, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
        assert y.dtype == dtype
    assert linear(x[:0], weight).shape == (0, 5, 2, 40)
    experts, out = torch.stack([weight, 2 * weight]), torch.empty(7, 40, dtype=dtype)
    for e in (0, 1):
        rows_of(experts).into(x.flatten(0, 2)[:7], experts[e], out)
        assert torch.equal(out, linear(x.flatten(0, 2)[:7], experts[e]))


@pytest.mark.parametrize("length, dtype", thinned(2, [1, 2, 5, 8], rows.DTYPES), ids=str)
def test_a_prompt_gets_the_tokens_and_trace_it_gets_alone(length, dtype):
    model = rows.model(dtype=dtype)
    if not model.exact_rows:
        pytest.skip(NEVER)
    assert rows.differing(model, length) == []


@pytest.mark.parametrize(
    ("threads", "settings"),
    [
        (2, {}),  # the tests above run with one thread
        pytest.param(1, {"MKL_CBWR": "AVX512,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, marks=SLOW),
        (1, {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
        pytest.param(2, {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "SSE41"}, marks=SLOW),
    ],
    ids=lambda value: ",".join(value.values()) or "as it is" if isinstance(value, dict) else str(value),
)
def test_what_the_probe_says_holds_under_other_settings(threads, settings):
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    del environment["OMP_NUM_THREADS"]
    command = [sys.executable, str(ROOT / "tests" / "rows.py"), str(threads)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    assert json.loads(run.stdout)["broken"] == []


def test_rows_that_share_an_expert_in_16_bits():
    """Experts of 16 inputs, of which a few rows were once computed unlike many: 16 bits hid it from the probe."""
    model = rows.LLaDA2Model.from_pretrained(ROOT / "tests/golden/tiny", dtype=torch.bfloat16, progress=False)
    if not model.exact_rows:
        pytest.skip(NEVER)
    generator = torch.Generator().manual_seed(5)
    kw = {"gen_length": 6, "mask_id": 255, "eos_id": [], "block_length": 8, "trace": True, "return_dict": True}
    for _ in range(12):
        batch = [torch.randint(0, 252, (20,), generator=generator).tolist() for _ in range(2)]
        together = model.generate(batch, **kw).trace
        assert [trace.events for trace in together] == [model.generate([p], **kw).trace[0].events for p in batch]


def test_a_model_says_what_holds():
    model = rows.model()
    found = model.products()
    assert {(16, 512), (461, 512)}.isdisjoint(shape[:2] for shape in found)
    assert (8, 512, torch.float32) in found and (61, 512, torch.float32) in found and (40, 512, torch.float32) in found
    assert model.exact_rows == all(way.least is not None for way in found.values())
    wide = rows.model(dtype=torch.bfloat16).products()
    assert wide.keys() - found.keys() == {(*shape[:2], torch.bfloat16) for shape in found if shape[0] != 8}


def test_a_network_that_is_on_no_cpu_is_exact_unless_told():
    model = LLaDA2Elsewhere(rows.WIDE)
    assert model.exact and model.exact_rows and model.lm_head.exact
    model.exact = False
    assert not model.exact_rows and not model.lm_head.exact and not model.layers[0].mlp.down.exact
    narrow = LLaDA2Elsewhere(replace(rows.WIDE, quantization="fp8"))
    narrow.exact = False
    assert narrow.exact_rows
    tied = LLaDA2Elsewhere(replace(rows.WIDE, quantization="fp8", tie_word_embeddings=True))
    assert tied.exact_rows
    tied.exact = False
    assert not tied.exact_rows


def test_a_copy_keeps_what_was_told():
    model = rows.LLaDA2Model(rows.WIDE)
    model.exact = False
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert not twin.exact and not twin.lm_head.exact
    twin.exact = True
    assert not model.exact and not model.lm_head.exact


def test_doctor_says_what_holds_on_no_cpu():
    model = LLaDA2Elsewhere(rows.WIDE)
    assert doctor._exactness(model) == "yes: no product rounds a row by the rows beside it"
    model.exact = False
    wanted = "not promised: without Triton, or with cuBLAS's products, a row is rounded by the number of rows"
    assert doctor._exactness(model) == wanted


@pytest.mark.parametrize("value", ["no", None, 0])
def test_exact_is_a_flag(value):
    message = f"^exact={value!r}: expected true or false$"
    with pytest.raises(ValueError, match=message):
        LLaDA2Elsewhere.from_pretrained("no such folder", exact=value)  # before the folder is looked for
    model = LLaDA2Elsewhere(rows.WIDE)
    with pytest.raises(ValueError, match=message):
        model.exact = value
    assert model.exact and model.lm_head.exact


def test_lm_eval_can_ask_for_the_other_products():
    settings = {"threshold": 0.9, "device": "cpu", "quantization": "int4"}
    wide, narrow = LLaDA2LM(**settings), LLaDA2LM(**settings, exact=False)
    assert wide.model.exact and not narrow.model.exact and not narrow.model.lm_head.exact
    assert narrow.get_model_info()["llada2_fast"]["exact"] is False
    with pytest.raises(ValueError, match="exact='no'"):
        LLaDA2LM(**settings, exact="no")


def test_nothing_is_promised_of_a_gpu_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; from tests.test_exact_rows import LLaDA2Elsewhere, replace, rows; "
        "kinds = (None, 'fp8', 'int4'); "
        "print([LLaDA2Elsewhere(replace(rows.WIDE, quantization=kind)).exact_rows for kind in kinds])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == "[False, False, False]\n", run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_a_gpu_gives_a_prompt_the_tokens_and_trace_it_gets_alone(dtype):
    model = copy.deepcopy(rows.model(dtype=dtype)).to("cuda")
    for length in (1, 5, 8):
        assert rows.differing(model, length) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", rows.DTYPES, ids=str)
def test_a_gpu_engine_gives_every_request_what_it_gets_alone(dtype):
    """Alone, in a batch that others join at random, and with its prompt in the cache."""
    model = copy.deepcopy(rows.model(dtype=dtype)).to("cuda")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (40, 3, 90, 17, 64, 33, 8, 51)]
    params = [DecodeParams(gen_length=40, threshold=0.3, eos_ids=(), temperature=i % 2 * 0.8, seed=i) for i in range(8)]
    config = EngineConfig(8, max_num_seqs=8, cache_tokens=2048, max_num_batched_tokens=64, graphs=True)

    def facts(output):
        return output.token_ids, output.confidences

    alone = [facts(Engine(model, config).generate([p], [rule])[0]) for p, rule in zip(prompts, params, strict=True)]
    engine = Engine(model, config)
    for _ in range(2):  # the second time prompts are found in the cache
        requests = []
        for job in zip(prompts, params, strict=True):
            requests.append(engine.add_request(*job))
            engine.step()
        while engine.has_work:
            engine.step()
        assert [facts(request.output) for request in requests] == alone


class LLaDA2Elsewhere(rows.LLaDA2Model):
    """One that is on no CPU."""

    def __init__(self, config):
        super().__init__(config, device="meta")
