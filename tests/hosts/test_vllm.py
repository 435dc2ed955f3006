"""The vLLM adapter against vLLM's own Python files, from its wheel; what needs a GPU has not run."""

import ast
import functools
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llada2_fast import LLaDA2Model, ModelConfig
from llada2_fast.kernels._triton import force_ops
from tests.hosts import vllm_stubs
from tests.hosts.vllm_runner import Runner
from tests.kernels.interpreter import interpreted

GOLDEN = Path(__file__).parent.parent / "golden"
ARCHITECTURE = "LLaDA2MoeModelLM"
MASK, EOS = 255, 252  # of the golden checkpoint `tiny`


@pytest.fixture(scope="module")
def wheel(unpacked):
    """vLLM's files on the path."""
    with vllm_stubs.vllm(unpacked("vllm==0.33.0")) as folder:
        yield folder


LAZY = {f"llada2_fast.adapters.vllm.{name}" for name in ("network", "state", "blocks")}


@pytest.fixture(scope="module")
def loaded(wheel, installed):
    """Names of the modules that vLLM's load of our plug-in, through its entry point, has imported."""
    sys.path.insert(0, str(installed))
    importlib.invalidate_caches()
    for name in LAZY:
        sys.modules.pop(name, None)
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return set(sys.modules)


@pytest.fixture(scope="module")
def registered(wheel, loaded):
    return wheel


def test_registration_is_lazy(loaded):
    assert "llada2_fast.adapters.vllm" in loaded and "vllm.model_executor.models.registry" in loaded
    assert not (LAZY | {"vllm.v1.worker.gpu.model_runner"}) & loaded


def test_registering_again_is_harmless(registered):
    from vllm.model_executor.models.registry import ModelRegistry

    from llada2_fast.adapters.vllm import register

    before = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models.keys() == before.keys()


def test_registry_resolves_the_class(registered):
    from vllm.model_executor.models.interfaces_base import is_text_generation_model, is_vllm_model
    from vllm.model_executor.models.registry import ModelRegistry

    from llada2_fast.adapters.vllm.network import LLaDA2MoeModelLM

    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    cls = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    assert cls is LLaDA2MoeModelLM
    assert is_vllm_model(cls) and is_text_generation_model(cls)


@pytest.mark.parametrize("name", ["tiny", "variant", "moe256"])
def test_config_is_found_without_remote_code(registered, name, tmp_path):
    from vllm.config.model import ModelConfig as HostConfig
    from vllm.transformers_utils.config import get_config

    raw = json.loads((GOLDEN / name / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = get_config(str(tmp_path), trust_remote_code=False)
    assert config.canvas_length == raw.get("block_size", 32)
    assert HostConfig.is_diffusion.func(SimpleNamespace(hf_config=config)) is True
    assert config.to_model_config() == ModelConfig.from_hf(GOLDEN / name)


def served(registered, **changes):
    """A VllmConfig as far as the hook for our architecture reads it, of vLLM's own parts."""
    from vllm.config.attention import AttentionConfig
    from vllm.config.cache import CacheConfig
    from vllm.config.scheduler import SchedulerConfig
    from vllm.transformers_utils.config import get_config

    config = get_config(str(GOLDEN / changes.get("checkpoint", "tiny")), trust_remote_code=False)
    model = SimpleNamespace(
        hf_config=config, max_model_len=changes.get("max_model_len", 1024), override_generation_config={},
        logits_processors=None,
    )  # fmt: skip
    scheduler = SchedulerConfig(max_model_len=1024, is_encoder_decoder=False, **changes.get("scheduler", {}))
    return SimpleNamespace(
        model_config=model, cache_config=CacheConfig(**changes.get("cache", {})), scheduler_config=scheduler,
        attention_config=AttentionConfig(), diffusion_config=changes.get("diffusion"),
    )  # fmt: skip


def hook():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return MODELS_CONFIG_MAP[ARCHITECTURE]


def test_config_hook(registered):
    config = served(registered)
    hook().verify_and_update_model_config(config.model_config)
    hook().verify_and_update_config(config)
    assert config.diffusion_config.canvas_length == 32
    assert config.cache_config.block_size % 32 == 0 and config.cache_config.user_specified_block_size
    assert config.scheduler_config.max_num_seqs == 64
    assert config.scheduler_config.enable_chunked_prefill is False
    assert config.scheduler_config.max_num_batched_tokens >= 1024 + 64 * 32
    assert config.attention_config.use_non_causal is True
    assert config.model_config.override_generation_config == {"temperature": None}
    assert len(config.model_config.logits_processors) == 1


def test_config_hook_refuses(registered):
    from vllm.config.diffusion import DiffusionConfig

    for changes, message in (
        ({"max_model_len": 1000}, "max_model_len=1000"),
        ({"cache": {"block_size": 48}}, "block_size=48"),
        ({"diffusion": DiffusionConfig(canvas_length=16)}, "canvas_length=16"),
        ({"diffusion": DiffusionConfig(canvas_length=32, max_denoising_steps=4)}, "max_denoising_steps=4"),
        ({"scheduler": {"long_prefill_token_threshold": 64}}, "long_prefill_token_threshold=64"),
        ({"checkpoint": "block22"}, "expert_capacity=10"),
    ):
        with pytest.raises(ValueError, match=message):
            hook().verify_and_update_config(served(registered, **changes))


def test_scheduler_holds_back_what_would_be_cut(registered):
    """Our schedule() on vLLM's own base class, with the rest of schedule() left out."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    config = served(registered)
    hook().verify_and_update_config(config)
    cls = resolve_obj_by_qualname(config.scheduler_config.scheduler_cls)
    assert config.scheduler_config.get_scheduler_cls() is cls and issubclass(cls, AsyncScheduler)
    assert inspect.signature(cls.schedule) == inspect.signature(Scheduler.schedule).replace(
        parameters=[p.replace(annotation=p.empty) for p in inspect.signature(Scheduler.schedule).parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    scheduler = cls.__new__(cls)
    scheduler.num_spec_tokens, scheduler.max_model_len, scheduler.current_step = 32, 128, 7
    scheduler.running = [
        SimpleNamespace(num_computed_tokens=c, num_output_placeholders=p, next_decode_eligible_step=0,
                        spec_token_ids=[], sampling_params=sampling_params())
        for c, p in ((96, 32), (97, 32), (97, 0), (127, 1))
    ]  # fmt: skip
    with pytest.raises(AttributeError):  # the half-made scheduler goes no further than the loops before it
        scheduler.schedule()
    assert [r.next_decode_eligible_step for r in scheduler.running] == [0, 9, 0, 9]


def sampling_params(max_tokens=24, eos=EOS, **kwargs):
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, **kwargs)
    params._eos_token_id = eos
    return params


def test_requests_are_checked_at_admission(registered):
    """By vLLM's own validator, over the class named in the config."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    config = served(registered)
    hook().verify_and_update_config(config)
    validate = build_custom_logits_processors_params_validator(config.model_config.logits_processors)
    extra = {"threshold": 0.7, "editing_threshold": 0.5, "temperature": 0.8, "seed": 3, "steps": 16}
    validate(sampling_params(extra_args=extra, top_k=5, top_p=0.9))
    validate(sampling_params(n=2, extra_args={"temperature": 1.0}))
    validate(sampling_params(extra_args={"policy": "entropy", "entropy_bound": 0.5, "entropy_decay": 0.9}))
    for refused, message in (
        ({"extra_args": {"treshold": 0.5}}, "treshold=0.5"),
        ({"extra_args": {"diffusion_max_steps": 3}}, "diffusion_max_steps=3"),
        ({"extra_args": {"threshold": -1}}, "threshold=-1"),
        ({"extra_args": {"seed": "one"}}, "seed='one'"),
        ({"extra_args": {"policy": "credit"}}, "policy='credit'"),
        ({"extra_args": {"policy": "self_speculative"}}, "policy='self_speculative': expected another one"),
        ({"extra_args": {"entropy_bound": 0.5}}, "entropy_bound=0.5"),
        ({"extra_args": {"policy": "entropy", "entropy_decay": 0}}, "entropy_decay=0"),
        ({"logprobs": 1}, "logprobs=1"),
        ({"prompt_logprobs": 1}, "prompt_logprobs=1"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"n": 2}, "n=2"),
        ({"n": 2, "extra_args": {"temperature": 1.0, "seed": 1}}, "n=2"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            validate(sampling_params(**refused))


@pytest.mark.parametrize("top_k, expected", [(-1, None), (0, None), (1, 1), (9, 9)])
def test_top_k_is_off_where_vllm_has_it_off(registered, top_k, expected):
    from llada2_fast.adapters.vllm.sampling import decode_params

    assert decode_params(sampling_params(top_k=top_k)).top_k == expected


def test_state_implements_the_interface(registered):
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    from llada2_fast.adapters.vllm.network import LLaDA2MoeModelLM

    cls = resolve_model_state_cls(None, LLaDA2MoeModelLM.__new__(LLaDA2MoeModelLM))
    assert issubclass(cls, ModelState) and not inspect.isabstract(cls)
    assert cls.num_new_sampled_tokens_per_step == 0
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        theirs = getattr(ModelState, name, None)
        if method.__module__.startswith("llada2_fast") and theirs is not None:
            assert list(inspect.signature(method).parameters) == list(inspect.signature(theirs).parameters), name


def calls(source, owner):
    """(method, number of positional arguments, keywords) of every `self.<owner>.<method>(...)` in a source file, and of
    `self.<owner>(...)` as __call__."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            target = ast.unparse(node.func)
            if target == f"self.{owner}":
                yield "__call__", len(node.args), [k.arg for k in node.keywords]
            elif target.startswith(f"self.{owner}.") and target.count(".") == 2:
                yield target.split(".")[2], len(node.args), [k.arg for k in node.keywords]


# calls under conditions that a LLaDA2 model does not meet: a Watermark or sharded sampler, tensors of multimodal models
_OTHERS = {"get_logprobs_dims"}


@pytest.mark.parametrize("owner", ["model_state", "sampler", "model"])
def test_the_runners_calls_fit(registered, owner):
    from llada2_fast.adapters.vllm import network, state

    cls = {"model_state": state.model_state_class(), "sampler": state.BlockSampler,
           "model": network.LLaDA2MoeModelLM}[owner]  # fmt: skip
    source = (registered / "vllm/v1/worker/gpu/model_runner.py").read_text("utf-8")
    found = [call for call in calls(source, owner) if call[0] not in _OTHERS]
    assert len(found) >= 2
    for name, positional, keywords in found:
        if owner == "model" and name in ("compute_logits_local", "make_empty_intermediate_tensors", "__call__"):
            continue  # batch-sharded sampling, pipeline parallelism; forward is bound by is_vllm_model
        inspect.signature(getattr(cls, name)).bind(None, *[None] * positional, **dict.fromkeys(filter(None, keywords)))


@pytest.fixture(scope="module")
def tiny():
    return LLaDA2Model.from_pretrained(GOLDEN / "tiny", progress=False)


def new_state(registered, slots, length, max_model_len):
    from vllm.config.diffusion import DiffusionConfig
    from vllm.transformers_utils.config import get_config

    from llada2_fast.adapters.vllm.state import model_state_class

    config = get_config(str(GOLDEN / "tiny"), trust_remote_code=False)
    config.mask_token_id = MASK
    model_config = SimpleNamespace(
        hf_config=config, max_model_len=max_model_len, dtype=torch.float32, get_inputs_embeds_size=lambda: 64,
        skip_tokenizer_init=True,
    )  # fmt: skip
    host = SimpleNamespace(
        model_config=model_config, diffusion_config=DiffusionConfig(canvas_length=length),
        scheduler_config=SimpleNamespace(max_num_seqs=slots, max_num_batched_tokens=4096),
    )  # fmt: skip
    return model_state_class()(host, None, None, torch.device("cpu"))


REQUESTS = [  # prompt length, max_tokens, vLLM's own parameters, extra_args
    (8, 24, {}, {}),
    (13, 20, {}, {"threshold": 0.3}),
    (5, 17, {}, {"threshold": 0.2, "editing_threshold": 0.1, "max_post_steps": 3}),
    (1, 30, {"top_k": 9, "top_p": 0.8}, {"temperature": 0.9, "seed": 11}),
    (23, 9, {"top_p": 0.7}, {"temperature": 1.3, "seed": -5, "threshold": 0.1, "minimal_topk": 2}),
    (16, 16, {}, {"threshold": 0.05, "steps": 2}),
    (7, 1, {}, {"editing_threshold": 0.0}),
    (6, 21, {}, {"policy": "entropy", "entropy_bound": 2.0, "editing_threshold": 0.2, "max_post_steps": 2}),
    (9, 18, {"top_k": 9}, {"policy": "entropy", "entropy_decay": 0.5, "temperature": 0.9, "seed": 4}),
]


def requests():
    draw = torch.Generator().manual_seed(1)
    return [
        (f"r{i}", torch.randint(0, 250, (n,), generator=draw).tolist(), max_tokens, own, extra)
        for i, (n, max_tokens, own, extra) in enumerate(REQUESTS)
    ]


@pytest.fixture(scope="module")
def answers(tiny):
    """answers(length): {name: the answer of our own loop} to `requests`."""

    @functools.cache
    def answer(length):
        return {name: alone(tiny, *request, length) for name, *request in requests()}

    return answer


def alone(model, prompt, max_tokens, own, extra, length, eos=EOS):
    """The answer of our own loop, cut where vLLM cuts."""
    out = model.generate(
        torch.tensor(prompt), gen_length=max_tokens, block_length=length, eos_id=eos, mask_id=MASK,
        eos_early_stop=True, **own, **extra,
    )  # fmt: skip
    return out[0].tolist()


@pytest.mark.parametrize("length", [8, 32])
@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_requests_get_the_tokens_of_our_loop(registered, tiny, answers, depth, length):
    runner = Runner(tiny, new_state(registered, 3, length, 512), 3, length, 512, depth)
    given = [(name, p, sampling_params(n, extra_args=extra, **own)) for name, p, n, own, extra in requests()]
    done = runner.run(given)
    assert {name: tokens for name, (tokens, _) in done.items()} == answers(length)


def test_an_aborted_request_leaves_no_trace(registered, tiny, answers):
    runner = Runner(tiny, new_state(registered, 2, 8, 512), 2, 8, 512, depth=2)
    given = [(name, p, sampling_params(n, extra_args=extra, **own)) for name, p, n, own, extra in requests()]
    done = runner.run(given, abort=("r1", 4))
    del done["r1"]
    assert {name: tokens for name, (tokens, _) in done.items()} == {k: v for k, v in answers(8).items() if k != "r1"}


@pytest.mark.parametrize("which", [2, 3, 4])
def test_a_preempted_request_goes_on_as_it_would_have(registered, tiny, which):
    """vLLM prefills its prompt and what it has of its answer, which ends with a block."""
    _, prompt, n, own, extra = requests()[which]
    expected = alone(tiny, prompt, n, own, extra, 8, eos=())
    k = 8 - len(prompt) % 8
    runner = Runner(tiny, new_state(registered, 1, 8, 512), 1, 8, 512)
    again = sampling_params(n - k, eos=None, extra_args=extra, **own)
    assert runner.run([("a", prompt + expected[:k], again)])["a"][0] == expected[k:]


def test_stops_at_eos(registered, tiny):
    from vllm.v1.request import RequestStatus

    prompt = requests()[0][1]
    plain = alone(tiny, prompt, 24, {}, {}, 8, eos=())
    eos = plain[10]
    runner = Runner(tiny, new_state(registered, 1, 8, 512), 1, 8, 512)
    done = runner.run([("a", prompt, sampling_params(24, eos=eos))])
    assert done["a"] == (plain[: plain.index(eos) + 1], RequestStatus.FINISHED_STOPPED)
    steps = runner.steps
    runner.run([("b", prompt, sampling_params(24, eos=None, stop_token_ids=[eos]))])
    assert runner.steps - steps == steps


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("prompt_length", [40, 43, 55, 56, 57, 63])
def test_up_to_the_end_of_the_context(registered, tiny, prompt_length, depth):
    """A canvas that vLLM cuts short, at the end of the context, is no step; every request ends, with as many tokens."""
    prompt = [i * 7 % 250 for i in range(prompt_length)]
    runner = Runner(tiny, new_state(registered, 1, 8, 64), 1, 8, 64, depth)
    ((tokens, _),) = runner.run([("a", prompt, sampling_params(500, eos=None))]).values()
    assert len(tokens) == 64 - prompt_length and MASK not in tokens
    if prompt_length <= 56:
        assert tokens == alone(tiny, prompt, 64 - prompt_length, {}, {}, 8, eos=())


def test_a_canvas_cut_by_the_token_budget_is_no_step(registered, tiny, answers):
    given = [(name, p, sampling_params(n, extra_args=extra, **own)) for name, p, n, own, extra in requests()]
    runner = Runner(tiny, new_state(registered, 4, 8, 512), 4, 8, 512, budget=29)
    done = runner.run(given)
    assert {name: tokens for name, (tokens, _) in done.items()} == answers(8)


def sampler_of(state):
    """(sampler of a ModelState, the draft tokens it writes)."""
    drafts = torch.zeros(state.max_num_reqs, state.length, dtype=torch.int64)
    return state.custom_sampler(SimpleNamespace(req_states=SimpleNamespace(draft_tokens=drafts)))[0], drafts


def test_the_kernels_filter_for_the_request_that_has_the_slot_now(registered):
    """What a draw may be is for the request to say, not for the slot's last one: drafts of a slot after a step each."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    logits, runner = torch.randn(8, 256), Runner.__new__(Runner)
    batch = runner._input_batch(InputBatch, [(SimpleNamespace(name="r", slot=0, num_computed_tokens=16, prompt_len=8),
                                              8, 8)])  # fmt: skip

    def drawn():
        state, seen = new_state(registered, 1, 8, 64), []
        sampler, drafts = sampler_of(state)
        for own in ({}, {"top_k": 2}, {"top_p": 0.05}):
            params = sampling_params(extra_args={"temperature": 1.0, "seed": 1, "threshold": 0.0}, **own)
            state.add_request(0, SimpleNamespace(req_id="r", prefill_token_ids=[1] * 8, num_computed_tokens=0,
                                                 sampling_params=params))  # fmt: skip
            sampler(logits, batch)
            seen.append(drafts[0].tolist())
            state.remove_request("r")
        return seen

    expected = drawn()
    assert len({tuple(tokens) for tokens in expected}) == 3
    with force_ops("triton"), interpreted():
        assert drawn() == expected


def test_nan_logits_end_one_block_and_are_counted(registered):
    state = new_state(registered, 2, 8, 64)
    sampler, _ = sampler_of(state)
    for i in range(2):
        state.add_request(i, SimpleNamespace(req_id=f"r{i}", prefill_token_ids=[1] * 8, num_computed_tokens=0,
                                             sampling_params=sampling_params()))  # fmt: skip
    logits = torch.randn(16, 256)
    logits[3, 7] = float("nan")
    runner = Runner.__new__(Runner)
    rows = [SimpleNamespace(name=f"r{i}", slot=i, num_computed_tokens=16, prompt_len=8) for i in range(2)]
    from vllm.v1.worker.gpu.input_batch import InputBatch

    output = sampler(logits, runner._input_batch(InputBatch, [(r, 8, 8) for r in rows]))
    assert output.num_nans.tolist() == [1, 0] and output.num_sampled.tolist() == [8, 0]


def test_segments_are_block_causal():
    from llada2_fast.adapters.vllm.blocks import block_segments

    generator = np.random.default_rng(0)
    for _ in range(200):
        length, n = int(generator.integers(1, 9)), int(generator.integers(1, 5))
        split = generator.random(n) < 0.7
        starts = generator.integers(0, 5, n) * length
        lengths = np.where(split, generator.integers(1, 40, n), length)
        row, queries, behind = block_segments(starts, lengths, split, length)
        assert np.bincount(row, queries, n).tolist() == lengths.tolist()
        for i in range(n):
            mine, total = row == i, starts[i] + lengths[i]
            seen = np.repeat(total - behind[mine], queries[mine])  # keys each query of the row sees
            positions = starts[i] + np.arange(lengths[i])
            assert seen.tolist() == np.minimum((positions // length + 1) * length, total).tolist()


class Recorder:
    """An attention group of vLLM's build_attn_metadata, whose builder keeps what it is given."""

    layer_names = ("layer",)
    kv_cache_spec = None
    supports_update_block_table = False

    def get_metadata_builder(self, ubatch_idx):
        return self

    def build_metadata(self, common, ubatch_idx, **kwargs):
        return common, kwargs

    build_metadata_for_cudagraph_capture = build_metadata


def attention_of(registered, prefilling, scheduled, computed, mode="NONE", **kwargs):
    """CommonAttentionMetadata and the builder's further arguments for a batch of requests, block length 8."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.input_batch import InputBatch

    scheduled, computed = np.array(scheduled, dtype=np.int32), np.array(computed, dtype=np.int32)
    n, bounds = len(scheduled), torch.from_numpy(scheduled + computed)
    starts = np.concatenate(([0], scheduled.cumsum())).astype(np.int32)
    batch = InputBatch(**dict.fromkeys(InputBatch.__dataclass_fields__) | {
        "num_reqs": n, "num_reqs_after_padding": n, "num_scheduled_tokens": scheduled, "seq_lens": bounds,
        "num_tokens": int(starts[-1]), "num_tokens_after_padding": int(starts[-1]), "query_start_loc_np": starts,
        "query_start_loc": torch.from_numpy(starts), "seq_lens_cpu_upper_bound": bounds,
        "num_computed_tokens_np": computed, "is_prefilling_np": np.array(prefilling), "has_prefill": any(prefilling),
    })  # fmt: skip
    state = new_state(registered, 4, 8, 512)
    tables = (torch.arange(n, dtype=torch.int32)[:, None].expand(n, 5).contiguous(),)
    slots = torch.zeros(1, int(starts[-1]), dtype=torch.int64)
    cache = SimpleNamespace(kv_cache_groups=[None])
    found = state.prepare_attn(batch, CUDAGraphMode[mode], tables, slots, [[Recorder()]], cache, **kwargs)
    return found["layer"]


def test_attention_of_canvases(registered):
    common, further = attention_of(registered, [False, False], [8, 8], [16, 40], "FULL", for_capture=True)
    assert common.causal is False and further == {}
    assert common.seq_lens.tolist() == [24, 48] and common.query_start_loc.tolist() == [0, 8, 16]
    assert common.max_query_len == 8 and common.max_seq_len == 512 and common.num_reqs == 2


def test_attention_of_prompts(registered):
    common, further = attention_of(registered, [False, True, True], [8, 19, 3], [16, 8, 0])
    assert common.causal is False and further == {"fast_build": True}
    assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist() == [0, 8, 16, 24, 27, 30]
    assert common.seq_lens.tolist() == common.seq_lens_cpu_upper_bound.tolist() == [24, 16, 24, 27, 3]
    assert common.block_table_tensor[:, 0].tolist() == [0, 1, 1, 1, 2]
    assert common.num_reqs == 5 and common.max_query_len == 8 and common.max_seq_len == 27
    assert common.num_actual_tokens == 30 and common.seq_lens.dtype == torch.int32
    with pytest.raises(ValueError, match="cudagraph_mode"):
        attention_of(registered, [True], [8], [0], "FULL")


def test_builders_take_what_is_passed(registered):
    for path in ("flash_attn", "triton_attn", "flashinfer"):
        tree = ast.parse((registered / f"vllm/v1/attention/backends/{path}.py").read_text("utf-8"))
        builds = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "build"]
        assert builds and all("fast_build" in [a.arg for a in node.args.args] for node in builds)


def test_dummy_batches(registered):
    """What the runner does at start-up: a profile run of the sampler with parameters that no request may have."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    state = new_state(registered, 4, 8, 64)
    sampler, _ = sampler_of(state)
    batch = InputBatch.make_dummy(4, 4, InputBuffers(4, 64, torch.device("cpu")))
    sampler.add_request(0, SamplingParams.for_sampler_warmup())
    sampler.apply_staged_writes()
    output = sampler(torch.randn(4, 256), batch)
    assert output.num_sampled.tolist() == [0] * 4
    state.add_request(0, SimpleNamespace(req_id="w", prefill_token_ids=[1] * 9, num_computed_tokens=0,
                                         sampling_params=SamplingParams.for_sampler_warmup()))  # fmt: skip
    state.remove_request("w")
    state.remove_request("never seen")


@pytest.fixture(scope="module")
def one_rank(registered, tmp_path_factory):
    """vLLM's process groups, of one rank, and a config in which its layers can be made."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.compilation import CompilationConfig, CompilationMode
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["none"]))
    with set_current_vllm_config(config):
        store = tmp_path_factory.mktemp("store") / "group"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield config
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def on_vllms_layers(config, name):
    """Our network for vLLM, made of its real layers, with the weights of a golden checkpoint."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import X86CPUUnquantizedExperts
    from vllm.transformers_utils.config import get_config

    from llada2_fast.adapters.vllm.network import LLaDA2MoeModelLM

    hf_config = get_config(str(GOLDEN / name), trust_remote_code=False)
    model_config = SimpleNamespace(
        hf_config=hf_config, hf_text_config=hf_config, dtype=torch.float32, head_dtype=torch.float32, model=name,
        quantization=None, is_mm_prefix_lm=False, is_moe=True, enable_return_routed_experts=False, rswa_window=None,
    )  # fmt: skip
    object.__setattr__(config, "model_config", model_config)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        # the kernels for experts on a CPU want other sizes than some golden checkpoints have; none of them is run
        patch.setattr(X86CPUUnquantizedExperts, "is_supported_config", staticmethod(lambda *args: (True, None)))
        model = LLaDA2MoeModelLM(vllm_config=config)
    for module in model.modules():
        module.cpu_linear = torch.nn.functional.linear  # chosen when weights are processed, which packs experts, too
    stored = {}
    for path in (GOLDEN / name).glob("model*.safetensors"):
        stored |= load_file(path)
    return model, stored


CHECKPOINTS = ["tiny", "group", "variant", "flat", "moe256"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_loaded_once_each(one_rank, name):
    """Every parameter is filled, from tensors that together have as many numbers as there are places."""
    model, stored = on_vllms_layers(one_rank, name)
    params = dict(model.named_parameters())
    for param in params.values():
        param.data.fill_(float("nan"))
    assert set(model.load_weights(stored.items())) == set(params)
    assert not any(param.isnan().any() for param in params.values())
    rows = model.config.vocab_size  # vLLM's tables are padded
    kept = [p[:rows] if "word_embeddings" in n or "lm_head" in n else p for n, p in params.items()]
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in kept)
    with pytest.raises((ValueError, KeyError)):
        model.load_weights([("model.layers.0.attention.rotten.weight", torch.zeros(1))])


class BlockCausal(torch.nn.Module):
    """In place of vLLM's paged attention, whose kernels need a GPU: one sequence, by plain torch."""

    def __init__(self, attn, length):
        super().__init__()
        self.shape, self.scale, self.length = (
            (attn.num_heads, attn.num_kv_heads, attn.head_size),
            attn.impl.scale,
            length,
        )

    def forward(self, q, k, v):
        heads, kv_heads, size = self.shape
        q, k, v = (x.view(len(x), -1, size).transpose(0, 1) for x in (q, k, v))
        block = torch.arange(q.shape[1]) // self.length
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, block[:, None] >= block, scale=self.scale, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(-2)


def routed(experts):
    """In place of the experts' kernels: vLLM's own grouped_topk with the layer's own settings, then plain matrices."""
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    router, weights, shared = experts.router, experts.routed_experts, experts.shared_experts

    def forward(hidden_states, router_logits):
        assert router_logits.dtype == torch.float32 and router.use_grouped_topk
        chosen, ids = grouped_topk(
            hidden_states, router_logits, router.top_k, router.renormalize, router.num_expert_group, router.topk_group,
            router.scoring_func, router.routed_scaling_factor, router.e_score_correction_bias,
        )  # fmt: skip
        gate, up = torch.einsum("tkih,th->tki", weights.w13_weight[ids], hidden_states).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        out = (torch.einsum("tkhi,tki->tkh", weights.w2_weight[ids], inner) * chosen[..., None]).sum(1)
        return out if shared is None else out + shared._layer(hidden_states)

    return forward


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_network_is_ours(one_rank, name):
    from vllm.forward_context import set_forward_context

    model, stored = on_vllms_layers(one_rank, name)
    model.load_weights(stored.items())
    for layer in model.model.layers:
        layer.attention.attn = BlockCausal(layer.attention.attn, 8)
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.forward = routed(layer.mlp.experts)
    ours = LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)
    ids = torch.randint(0, ours.config.vocab_size, (43,), generator=torch.Generator().manual_seed(3))
    with set_forward_context(None, one_rank), torch.compiler.set_stance("force_eager"):
        logits = model.compute_logits(model(ids, torch.arange(43)))
    torch.testing.assert_close(logits, ours(ids[None], block_length=8).logits[0], atol=1e-4, rtol=1e-4)
