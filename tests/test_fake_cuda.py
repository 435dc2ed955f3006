"""The code of a GPU on a CPU: tensors that say they are on a GPU, kernels in Triton's interpreter.

What only a device would show is then an error here: operands on two devices, a kernel given a tensor of the CPU, the
host waiting inside a step. Capture and the compiled kernels are not shown: a step is run in place of its replay.
"""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import MaxLengthCriteria
from triton.runtime.jit import JITFunction

from llada2_fast import Engine, EngineConfig
from llada2_fast.adapters.transformers import LLaDA2MoeModelLM
from llada2_fast.config import DecodeParams
from llada2_fast.decoding.graph_runner import StepGraph
from llada2_fast.kernels import candidates, fp8, norm, refine
from llada2_fast.model import LLaDA2Model
from tests.kernels.interpreter import interpreted

CUDA = torch.device("cuda:1")  # not the current one
CARD = SimpleNamespace(multi_processor_count=8)
OPS = {refine._op: refine._dispatch, candidates._op: candidates._dispatch}
MULTIPLIED = {"div": torch.Tensor.mul, "div_": torch.Tensor.mul_}  # what / and /= become where a number divides
WAITING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "unique"}


class OnGpu(torch.Tensor):
    """A tensor of the CPU, `held`, that says it is on a GPU. Of use within FakeCuda only."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CUDA, **layout)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a fake GPU tensor outside of FakeCuda")


def held(tree):
    return tree_map_only(OnGpu, lambda x: x.held, tree)


def on_gpu(tree):
    return tree_map_only(torch.Tensor, OnGpu, tree)


def is_gpu(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def reciprocal(number, dtype):
    """1 / number as a tensor's kernel rounds it."""
    return (1 / torch.tensor(number, dtype=torch.promote_types(dtype, torch.float32))).item()


class FakeCuda(TorchFunctionMode):
    """Within it "cuda" is a device. waits: names of the functions that made the host wait for it, as on a real one."""

    def __init__(self):
        super().__init__()
        self.waits, self._pinned = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in OPS:
            with self:
                return OPS[func](*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        if func is torch.Tensor.pin_memory:
            return self._pin(args[0].clone())
        made_there = is_gpu(kwargs.get("device"))
        if made_there:
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor):
                self.waits.append(func.__name__)
        ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGpu)]
        if not ours:
            return on_gpu(func(*args, **kwargs)) if made_there else func(*args, **kwargs)
        if func.__name__ == "__get__" and func.__self__.__name__ in ("device", "is_cuda", "is_cpu"):
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[func.__self__.__name__]
        self._check(func, args, kwargs)
        if func is torch.Tensor.__iter__:
            return iter(on_gpu(list(args[0].held)))
        if func.__name__ in MULTIPLIED and isinstance(args[1], (int, float)) and not kwargs:
            func, args = MULTIPLIED[func.__name__], (args[0], reciprocal(args[1], args[0].dtype))
        known = {id(x.held): x for x in ours}  # what works in place returns what it was given
        result = func(*held(args), **held(kwargs))
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnGpu(x), result)

    def _check(self, func, args, kwargs):
        """Note what waits. RuntimeError where tensors of the CPU meet those of the GPU and PyTorch moves neither."""
        mixed = any(isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) for x in tree_leaves((args, kwargs)))
        if func is torch.Tensor.copy_:
            if mixed:
                self._moved(func, args[1], kwargs.get("non_blocking", False))
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnGpu):
            chosen = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
            if mixed or chosen or isinstance(args[1], list):
                self.waits.append(func.__name__)
        elif mixed:
            raise RuntimeError(f"{func.__name__}: tensors on the CPU and on the GPU")
        elif (
            func.__name__ in WAITING
            or func is torch.Tensor.new_tensor
            or (func is torch.where and len(args) == 1)
            or (func.__name__ == "repeat_interleave" and isinstance(args[1], OnGpu))
        ):
            self.waits.append(func.__name__)

    def _to(self, func, x, *args, device=None, non_blocking=False, **kwargs):
        named = [value for value in args if isinstance(value, (str, torch.device))]
        args = [value for value in args if not isinstance(value, (str, torch.device))]
        device = {torch.Tensor.cpu: "cpu", torch.Tensor.cuda: CUDA}.get(func, named[0] if named else device)
        there = isinstance(x, OnGpu) if device is None else is_gpu(device)
        result = held(x).to(*args, **kwargs)
        if there == isinstance(x, OnGpu):
            return x if result is held(x) else OnGpu(result) if there else result
        if non_blocking and not there:
            return self._pin(result.clone())
        self._moved(func, x, non_blocking)
        return OnGpu(result.clone()) if there else result.clone()

    def _pin(self, x):
        self._pinned.append(x.untyped_storage())
        return x

    def _moved(self, func, source, non_blocking):
        """A copy between host and device waits unless it is told not to and comes from pinned memory."""
        pinned = not isinstance(source, OnGpu) and any(
            source.untyped_storage().data_ptr() == storage.data_ptr() for storage in self._pinned
        )
        if not (non_blocking and pinned):
            self.waits.append(func.__name__)


class Event:
    """All is done at once here."""

    def record(self, stream):
        assert stream == CUDA

    def synchronize(self):
        pass


@contextmanager
def fake_cuda():
    """FakeCuda with kernels in the interpreter, which must be given tensors of the GPU alone, and that GPU as the
    current one: Triton launches on that, wherever the tensors are."""
    current = [torch.device("cuda:0")]

    @contextmanager
    def device_of(x):
        current.append(x.device if x.is_cuda else current[-1])
        yield
        current.pop()

    with interpreted():
        launch = JITFunction.run

        def run(self, *args, grid, warmup, **kwargs):
            own = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            assert all(isinstance(x, OnGpu) for x in own), f"{self.__name__}: a tensor on the CPU"
            assert current[-1] == CUDA, f"{self.__name__}: launched on {current[-1]}"
            with torch._C.DisableTorchFunction():
                return launch(self, *held(args), grid=grid, warmup=warmup, **held(kwargs))

        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(StepGraph, "replay", StepGraph.run),
            mock.patch.object(torch.cuda, "graph_pool_handle", lambda: None),
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "fake"),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
            mock.patch.object(torch.cuda, "get_device_properties", lambda device: CARD),
            mock.patch.object(torch.cuda, "device_of", device_of),
            mock.patch.object(torch.cuda, "current_stream", torch.device),
            mock.patch.object(torch.cuda, "Event", Event),
            FakeCuda() as mode,
        ):
            yield mode


def load(golden, name="tiny", **options):
    return LLaDA2Model.from_pretrained(golden / name, dtype=torch.float32, progress=False, **options)


def move(model):
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = OnGpu(parameter.detach())
    return model


PROMPTS = [list(range(1, 22)), list(range(1, 6))]
OPTIONS = {"gen_length": 16, "block_length": 8, "threshold": 0.3, "mask_id": 255, "eos_id": 252}


def test_generate_by_graphs(golden):
    """The CPU's tokens; the host waits ahead of the first step, for prompts, and behind the last one, for the text."""
    wanted = load(golden).generate(PROMPTS, **OPTIONS)
    waits, run = [], StepGraph.run

    def counted(self):
        waits.append(len(mode.waits))
        result = run(self)
        waits.append(len(mode.waits))
        return result

    with fake_cuda() as mode, mock.patch.object(StepGraph, "replay", counted):
        got = move(load(golden)).generate(PROMPTS, graphs=True, **OPTIONS)
    assert torch.equal(held(got), wanted)
    assert len(waits) > 8 and len(set(waits)) == 1
    assert mode.waits[: waits[0]].count("to") <= 2 * len(PROMPTS) + 1  # ids and kinds of each, pages of their prefill
    assert len(mode.waits) > waits[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_kernels_leave_each_other_is_not_of_the_default_dtype(golden, dtype):
    options = OPTIONS | {"gen_length": 8, "temperature": 0.8, "top_k": 7, "seed": 3, "return_dict": True, "trace": True}
    wanted = load(golden).generate(PROMPTS[1:], **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with fake_cuda():
            got = move(load(golden)).generate(PROMPTS[1:], **options)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(held(got.sequences), wanted.sequences)
    theirs = [event.confidence for row in wanted.trace for event in row.events]
    assert [event.confidence for row in got.trace for event in row.events] == pytest.approx(theirs, abs=1e-4)


def test_graphs_kept_with_a_model_know_another_mask(golden):
    """Where the second call took the first one's graphs, its masks would be tokens. The third one takes the second's,
    and the pages that it has given back."""
    masks = 255, 254, 254
    options = OPTIONS | {"gen_length": 3, "threshold": 0.0}  # a step
    with fake_cuda():
        model = move(load(golden))
        got = [held(model.generate(PROMPTS[1:], graphs=True, **options | {"mask_id": mask})) for mask in masks]
    for mask, tokens in zip(masks, got, strict=True):
        assert torch.equal(tokens, load(golden).generate(PROMPTS[1:], **options | {"mask_id": mask}))
    assert not torch.equal(*got[:2])


class Roomy(LLaDA2Model):
    """Counts the caches that are made for it."""

    caches = 0

    def new_cache(self, *args):
        self.caches += 1
        return super().new_cache(*args)


def test_graphs_are_kept_as_long_as_the_weights_are_where_they_were(golden):
    options = {"gen_length": 3, "block_length": 4, "threshold": 0.0, "mask_id": 255, "eos_id": -1, "graphs": True}
    with fake_cuda():
        model = move(Roomy.from_pretrained(golden / "tiny", progress=False))
        for _ in range(2):
            model.generate([[1]], **options)
        assert model.caches == 1
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
        model.generate([[1]], **options)
        assert model.caches == 2


class Measured(LLaDA2Model):
    """Notes how many tokens each forward has."""

    def forward_blocks(self, tokens, *args, **more):
        vars(self).setdefault("sizes", []).append(tokens.numel())
        return super().forward_blocks(tokens, *args, **more)


@pytest.mark.parametrize("editing, sizes", [(None, [4, 8]), (5.0, [4, 4, 4, 4])])
def test_a_graph_has_no_place_for_a_block_that_was_seen_as_it_stays(golden, editing, sizes):
    """A block that a step has filled goes along with the next one; not where a step without an edit has followed."""
    options = {"gen_length": 7, "block_length": 4, "threshold": 0.0, "mask_id": 255, "eos_id": -1}
    with fake_cuda():
        model = move(Measured.from_pretrained(golden / "tiny", progress=False))
        model.generate([[1]], graphs=True, on_step=lambda *_: None, editing_threshold=editing, **options)
    assert model.sizes == sizes


class Recorder:
    """A streamer that keeps what it is given, drafts too."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(("final", *value[0].tolist()))

    def put_draft(self, value):
        self.seen.append(("draft", *value[0].tolist()))

    def end(self):
        self.seen.append(("end",))


def test_streamers_and_stops_see_a_step_of_a_graph_when_it_is_done(golden):
    """As without graphs: the same drafts after the same steps, and no step behind the one that ends a row."""
    options = {"max_new_tokens": 11, "block_length": 4, "threshold": 0.5, "mask_token_id": 255, "eos_token_id": 252}

    def decode(place, **more):
        model, recorder = place(LLaDA2MoeModelLM.from_pretrained(golden / "tiny", progress=False)), Recorder()
        out = model.generate(
            torch.tensor(PROMPTS[1:]), streamer=recorder, stopping_criteria=[MaxLengthCriteria(5 + 5)],
            return_dict_in_generate=True, **options, **more,
        )  # fmt: skip
        return held(out.sequences).tolist(), held(out.tokens_per_forward).tolist(), recorder.seen

    wanted = decode(lambda model: model)
    with fake_cuda():
        assert decode(move, graphs=True) == wanted
    assert len(wanted[0][0]) == 5 + 5 and len(wanted[2]) == 10


def test_generate_without_graphs(golden):
    options = OPTIONS | {"gen_length": 9}
    wanted = load(golden).generate(PROMPTS[:1], **options)
    with fake_cuda():
        assert torch.equal(held(move(load(golden)).generate(PROMPTS[:1], **options)), wanted)


@pytest.mark.parametrize("name, quantization", [("tiny", "fp8"), ("block22", None)])
def test_other_networks(golden, name, quantization):
    """A step a block: fp8, and experts chosen per block."""
    options = {"gen_length": 9, "block_length": 8, "threshold": 0.0, "profile": "hf-2.1", "num_to_transfer": 8}
    model = load(golden, name, quantization=quantization)
    ids = {"mask_id": model.config.vocab_size - 1, "eos_id": 3}
    with fake_cuda() as mode:
        got = move(model).generate(PROMPTS[1:], graphs=True, **options, **ids)
        assert got.is_cuda
    assert not bool((held(got) == ids["mask_id"]).any()) and mode.waits


def test_an_engine_on_graphs(golden):
    """Rows of two kinds one after the other in a slot, the second one's prefix found in the cache."""
    each = [
        DecodeParams(gen_length=11, threshold=0.4, mask_id=255, eos_ids=(252,)),
        DecodeParams(gen_length=8, threshold=0.4, mask_id=255, eos_ids=(252,), temperature=0.8, top_k=7, seed=3),
    ]
    options = {"block_length": 8, "mask_id": 255, "max_num_seqs": 1, "cache_tokens": 64, "trace": False}

    def tokens(model, **more):
        engine = Engine(model, EngineConfig(**options, **more))
        outputs = engine.generate([PROMPTS[0], PROMPTS[0]], each)
        engine.check_integrity()
        return [(output.token_ids, output.steps, output.shared_tokens, output.error) for output in outputs]

    wanted = tokens(load(golden))
    with fake_cuda():
        assert tokens(move(load(golden)), graphs=True) == wanted
    assert wanted[1][2] == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fp8_of_a_gpu_is_that_of_a_cpu(dtype):
    """Weights by PyTorch, activations by PyTorch and by the kernel: the same bits everywhere."""
    x = torch.randn(40, 1100).to(dtype)
    weights, rows = fp8.quantize_weight(x, 2), fp8.quantize_ref(x)
    with fake_cuda():
        there = on_gpu(x)
        made = held((fp8.quantize_weight(there, 2), fp8.quantize_ref(there), fp8.quantize(there)))
    for got, wanted in zip(made, (weights, rows, rows), strict=True):
        assert torch.equal(got.values.view(torch.uint8), wanted.values.view(torch.uint8))
        assert torch.equal(got.scale, wanted.scale)


def test_what_is_seen():
    x = torch.arange(4.0)
    with fake_cuda() as mode:
        y = x.to("cuda")
        assert y.is_cuda and y.device == CUDA and (y + 1).device == CUDA and torch.zeros(2, device="cuda").is_cuda
        assert torch.equal(held(y / 7), x * (1 / torch.tensor(7.0))) and not torch.equal(held(y / 7), x / 7)
        assert not y.cpu().is_cuda and mode.waits == ["to", "cpu"]
        for mix in (lambda: y + x, lambda: x[y.long()], lambda: torch.cat((y, x))):
            with pytest.raises(RuntimeError, match="tensors on the CPU and on the GPU"):
                mix()
        with pytest.raises(AssertionError, match="_rms_norm_kernel: a tensor on the CPU"):
            norm.launch(y, None, x, 1e-6)
        mode.waits.clear()
        report = y.to("cpu", non_blocking=True)  # pinned
        back = report[1:].to("cuda", non_blocking=True)
        y[1:].copy_(back)
        y[torch.tensor(2, device="cuda") - 1] = 5
        assert mode.waits == ["tensor"]
        mode.waits.clear()
        y[y > 2], y[x.long()], y.tolist(), bool(y[0] > 0), x.to("cuda", non_blocking=True)
        assert mode.waits == ["__getitem__", "__getitem__", "tolist", "__bool__", "to"]
    with pytest.raises(RuntimeError, match="outside of FakeCuda"):
        y + 1
