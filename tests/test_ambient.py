"""What a host has switched on in PyTorch changes nothing: the same tokens, confidences and weights, bit for bit."""

from contextlib import contextmanager

import pytest
import torch

from llada2_fast import BlockRefinementScheduler, Engine, EngineConfig, LLaDA2Model, LLaDA2Pipeline, demo
from llada2_fast.adapters.likelihood import likelihood_bound
from llada2_fast.adapters.transformers import LLaDA2MoeModelLM
from llada2_fast.config import DecodeParams
from llada2_fast.refinement import BLOCK_DONE, FINISHED, BlockState, SpecialIds, refine_params, refine_step
from llada2_fast.weights.special_tokens import load_tokenizer
from tests.thinned import thinned

PROMPTS = [[2, 5, 3, 30, 41], [7, 9]]
CALLS = {
    "greedy": {},
    "sampling": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    "editing": {"threshold": 0.5, "editing_threshold": 0.1, "max_post_steps": 2},
    "hf-2.0": {"profile": "hf-2.0", "threshold": 0.6, "steps": 4},
    "sglang": {"profile": "sglang-joint", "threshold": 0.6},
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def strictly_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)  # conftest's


AMBIENT = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "with a device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": strictly_deterministic,
}
DTYPES = [torch.float32, torch.bfloat16]


def load(dtype=torch.float32):
    return LLaDA2Model.from_pretrained(demo.path(), dtype=dtype, device="cpu", progress=False)


def generated(model):
    outputs = [model.generate(PROMPTS, gen_length=12, return_dict=True, trace=True, **call) for call in CALLS.values()]
    drawn = model.generate(PROMPTS, gen_length=16, temperature=1.0, generator=torch.Generator("cpu").manual_seed(5))
    return [(o.sequences.tolist(), o.trace) for o in outputs], drawn.tolist()


def network(model):
    ids = torch.tensor([[2, 5, 3, 30] * 9], dtype=torch.int64, device="cpu")
    output = model(ids, output_hidden_states=True)
    return [x.float().tolist() for x in (output.logits, *output.hidden_states)]


def engine(model):
    engine = Engine(model, EngineConfig(max_num_seqs=2, cache_tokens=256))
    outputs = engine.generate(PROMPTS, [DecodeParams(gen_length=12, **CALLS[name]) for name in ("editing", "sampling")])
    return [(o.token_ids, o.confidences, o.steps, o.error) for o in outputs]


def pipeline(model):
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(block_length=16), load_tokenizer(demo.path()))
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, tensors["block_x"].tolist(), tensors["sampled_probs"].tolist()))

    options = {"gen_length": 16, "eos_token_id": 0, "mask_token_id": 1, "callback_on_step_end": look}
    output = pipe(["What is 3 plus 4?", "Hello"], **options,
                  callback_on_step_end_tensor_inputs=["block_x", "sampled_probs"])  # fmt: skip
    return output.sequences.tolist(), output.texts, seen


def transformers_face(model):
    """As AutoModelForCausalLM loads it, with a criterion that transformers makes tables for."""
    model = LLaDA2MoeModelLM.from_pretrained(demo.path(), dtype=model.dtype, progress=False)
    ids = torch.tensor([PROMPTS[0]], dtype=torch.int64, device="cpu")
    tokenizer = load_tokenizer(demo.path())
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "stop_strings": ["the", " "], "threshold": 0.5}
    output = model.generate(ids, tokenizer=tokenizer, **options)
    return output.sequences.tolist(), output.tokens_per_forward.tolist()


def likelihood(model):
    return [likelihood_bound(model, PROMPTS[0], [5, 6, 7], 1, mc_num=n) for n in (4, 128)]


def steps(model):
    """The refinement step as a library, and the scheduler's own, on the same random logits."""
    generator = torch.Generator("cpu").manual_seed(1)
    logits = torch.randn(2, 8, 50, generator=generator, dtype=torch.float32, device="cpu")
    ints = {"dtype": torch.int64, "device": "cpu"}
    blocks, start = torch.full((2, 8), 1, **ints), torch.zeros(2, **ints)
    state = BlockState.fresh(blocks.clone(), torch.zeros_like(blocks, dtype=torch.int8), start)
    each = [DecodeParams(temperature=t, top_p=0.9, threshold=0.3) for t in (0, 0.7)]
    params = refine_params(each, 8, [1, 2], [[], []])
    found = []
    while not bool((state.frozen & (BLOCK_DONE | FINISHED)).all()):
        output = refine_step(logits, state, params, SpecialIds(1))
        found.append((output.status.tolist(), output.confidence.tolist(), state.tokens.tolist()))
    scheduler = BlockRefinementScheduler(8, 4)
    scheduler.set_timesteps(4)
    for mask_id in (1, None):
        for step in range(2):
            generator = torch.Generator("cpu").manual_seed(step)
            output = scheduler.step(
                logits, step, blocks, mask_token_id=mask_id, temperature=0.7, generator=generator
            )  # fmt: skip
            found.append((output.prev_sample.tolist(), output.sampled_probs.tolist()))
    noisy = scheduler.add_noise(blocks, torch.ones_like(blocks), prompt_length=2, block_length=4, mask_token_id=1,
                                generator=torch.Generator("cpu").manual_seed(2))  # fmt: skip
    return found, scheduler.timesteps.tolist(), [x.tolist() for x in noisy]


FACES = (generated, network, engine, pipeline, transformers_face, likelihood, steps)
_wanted = {}


def wanted(face, dtype):
    if (face, dtype) not in _wanted:
        _wanted[face, dtype] = face(load(dtype))
    return _wanted[face, dtype]


@pytest.mark.parametrize(
    "name, dtype, face", thinned(2, AMBIENT, DTYPES, FACES), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_results_are_those_without(name, dtype, face):
    expected = wanted(face, dtype)
    with AMBIENT[name]():
        model = load(dtype)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert face(model) == expected
    assert face(model) == expected  # and what was made within goes on working outside


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_weights_that_are_trained(face):
    model = load().requires_grad_(True)
    assert face(model) == wanted(face, torch.float32)
    assert not model(torch.tensor([PROMPTS[0]])).logits.requires_grad


def test_logits_that_are_trained():
    logits = torch.randn(1, 4, 20, requires_grad=True)
    tokens = torch.full((1, 4), 1)
    for made in (logits, logits * 1):
        state = BlockState.fresh(tokens.clone(), torch.zeros(1, 4, dtype=torch.int8), torch.tensor([0]))
        output = refine_step(made, state, refine_params([DecodeParams(threshold=0.0)], 4, [0], [[]]), SpecialIds(1))
        assert not output.confidence.requires_grad and not bool((state.tokens == 1).any())
        step = BlockRefinementScheduler(4, 4).step(made, 0, tokens, mask_token_id=1)
        assert not step.sampled_probs.requires_grad


def test_autocast_is_back_on_behind_a_call():
    model = load()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(PROMPTS, gen_length=4)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.is_grad_enabled() and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_an_engine_made_in_inference_mode_goes_on_outside():
    with torch.inference_mode():
        model = load()
        made = Engine(model, EngineConfig(max_num_seqs=1, cache_tokens=256))
        first = made.add_request(PROMPTS[0], DecodeParams(gen_length=12))
        made.step()
    while made.has_work:
        made.step()
    with torch.inference_mode():
        again = made.generate(PROMPTS[:1], DecodeParams(gen_length=12))[0]
    assert first.output.error is None and again.token_ids == first.output.token_ids
    assert first.output.token_ids == Engine(load()).generate(PROMPTS[:1], DecodeParams(gen_length=12))[0].token_ids
    model.requires_grad_(True)  # which tensors made in inference mode refuse
    model.to(torch.bfloat16).generate(PROMPTS, gen_length=4)


def test_a_checkpoint_is_read_and_written_alike(tmp_path):
    model = load()
    model.save_pretrained(tmp_path / "without")
    names = [path.name for path in (tmp_path / "without").iterdir()]
    for i, ambient in enumerate(AMBIENT.values()):
        with ambient():
            load().save_pretrained(tmp_path / str(i))
        for name in names:
            assert (tmp_path / str(i) / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_reference_under_autocast_is_what_an_op_keeps_off():
    """The contexts of this file bite: a plain product, and a reference that is not behind an op, see them."""
    with AMBIENT["autocast to bfloat16"]():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == torch.bfloat16
    with AMBIENT["default dtype float64"]():
        assert torch.zeros(1).dtype == torch.float64
    for name in ("default device", "with a device"):
        with AMBIENT[name]():
            assert torch.zeros(1).is_meta
