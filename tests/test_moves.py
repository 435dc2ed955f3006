"""A network that is moved, converted or copied: what must stay wide stays, results with it, and what is saved."""

import copy
import functools
import io

import pytest
import torch

from llada2_fast import BlockRefinementScheduler, LLaDA2Model, LLaDA2Pipeline
from llada2_fast.adapters.transformers import LLaDA2MoeModelLM
from llada2_fast.kernels.fp8 import FP8

IDS = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
WAYS = {
    "to": lambda model, dtype: model.to(dtype),
    "to a device": lambda model, dtype: model.to("cpu", dtype),
    "to by name": lambda model, dtype: model.to(device="cpu", dtype=dtype),
    "to as another tensor": lambda model, dtype: model.to(torch.zeros(1, dtype=dtype)),
    "type": lambda model, dtype: model.type(dtype),
    "half, bfloat16, float": lambda model, dtype: getattr(model, NAMES[dtype])(),
    "pipe": lambda model, dtype: LLaDA2Pipeline(model, BlockRefinementScheduler()).to(dtype).model,
    "layer by layer": lambda model, dtype: (
        [part.to(dtype) for part in (model.word_embeddings, model.norm, *model.layers, model.lm_head)], model
    )[1],
}  # fmt: skip
NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}


@functools.cache
def loaded(folder, dtype, quantization=None):
    return LLaDA2Model.from_pretrained(folder, dtype=dtype, progress=False, quantization=quantization)


@functools.cache
def wanted(folder, dtype):
    return results(loaded(folder, dtype))


def fresh(*arguments):
    return copy.deepcopy(loaded(*arguments))


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor


def same(a, b):
    """Two networks hold the same parameters, in type and bits."""
    theirs = dict(b.named_parameters())
    assert {name for name, _ in a.named_parameters()} == theirs.keys()
    return all(x.dtype == theirs[n].dtype and torch.equal(bits(x), bits(theirs[n])) for n, x in a.named_parameters())


def results(model):
    output = model(IDS, output_router_indices=True)
    return output.logits.tolist(), [None if ids is None else ids.tolist() for ids in output.router_indices]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_dtype_it_has_already_changes_nothing(golden, dtype, way):
    for name in ("moe256", "group"):
        model = fresh(golden / name, dtype)
        moved = way(model, dtype)
        assert moved is model and same(moved, loaded(golden / name, dtype))
        assert results(moved) == wanted(golden / name, dtype)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_narrower_weights_and_routers_as_wide_as_before(golden, tmp_path, way):
    """Equal to a checkpoint read in that dtype, but for the dtype of router weights, whose values are what was read."""
    folder = golden / "moe256"
    wide, expected = fresh(folder, torch.float32), wanted(folder, torch.bfloat16)
    kept = {name: x.clone() for name, x in wide.named_parameters() if ".router." in name}
    moved = way(wide, torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert {name: x.dtype for name, x in moved.named_parameters() if name in kept} == dict.fromkeys(kept, torch.float32)
    for name, x in moved.named_parameters():
        assert torch.equal(x, kept[name]) if name in kept else x.dtype == torch.bfloat16
    assert results(moved) == expected
    moved.save_pretrained(tmp_path)
    again = LLaDA2Model.from_pretrained(tmp_path, progress=False)
    assert results(again) == expected
    for name, bias in again.named_parameters():
        if name.endswith("expert_bias"):
            assert bias.dtype == torch.float32 and torch.equal(bias, kept[name])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_fp8_values_and_scales_stay_what_they_are(golden, dtype, way):
    before = loaded(golden / "tiny", torch.bfloat16, "fp8")
    moved = way(fresh(golden / "tiny", torch.bfloat16, "fp8"), dtype)
    assert moved.dtype == dtype and moved.norm.weight.dtype == dtype
    theirs = dict(before.named_parameters())
    seen = 0
    for name, x in moved.named_parameters():
        if theirs[name].dtype == FP8 or name.endswith("scale"):
            assert x.dtype == theirs[name].dtype and torch.equal(bits(x), bits(theirs[name]))
            seen += 1
    assert seen and torch.isfinite(moved(IDS).logits).all()
    back = way(moved, torch.bfloat16)
    assert torch.equal(back(IDS).logits, before(IDS).logits)


def test_a_device_takes_everything_along(golden):
    for name, quantization in (("tiny", "fp8"), ("moe256", None)):
        model = loaded(golden / name, torch.bfloat16, quantization)
        types = {key: x.dtype for key, x in model.named_parameters()}
        for moved in (copy.deepcopy(model).to("meta"), copy.deepcopy(model).to_empty(device="meta")):
            assert {x.device.type for x in moved.parameters()} == {"meta"}
            assert {key: x.dtype for key, x in moved.named_parameters()} == types
        narrower = copy.deepcopy(model).to("meta", torch.float16)  # both at once
        assert {x.device.type for x in narrower.parameters()} == {"meta"} and narrower.dtype == torch.float16


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "a file": through_a_file}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("name, quantization", [("tiny", None), ("tiny", "fp8"), ("moe256", None)])
def test_a_copy_is_a_model_of_its_own(golden, name, quantization, make):
    model = fresh(golden / name, torch.bfloat16, quantization)
    twin = make(model)
    assert twin.config == model.config and twin.special_ids == model.special_ids
    assert same(twin, model) and results(twin) == results(model)
    before = results(model)
    with torch.no_grad():
        for x in twin.parameters():
            x.zero_()
    assert results(model) == before


@pytest.mark.parametrize("device", ["mps", "xpu", "mps:0", torch.device("xpu"), "hpu", "meta", "", "gpu", 1.5])
def test_a_device_that_is_not_supported_is_refused_before_weights_are_read(golden, tmp_path, device):
    """The folder has no weights, of which there is no word."""
    (tmp_path / "config.json").write_bytes((golden / "tiny" / "config.json").read_bytes())
    for load in (LLaDA2Model.from_pretrained, LLaDA2Pipeline.from_pretrained):
        with pytest.raises(ValueError, match="^device=.*: expected .*cpu") as refused:
            load(tmp_path, device=device)
        assert "\n" not in str(refused.value)
    if str(device)[:3] in ("mps", "xpu"):  # the others are no device_map either
        with pytest.raises(ValueError, match="^device(_map)?=.*: expected cpu or cuda"):
            LLaDA2MoeModelLM.from_pretrained(tmp_path, device_map=device)


def test_a_gpu_that_is_not_there_is_refused_by_its_number(golden, tmp_path):
    (tmp_path / "config.json").write_bytes((golden / "tiny" / "config.json").read_bytes())
    absent = torch.cuda.device_count()
    for load in (LLaDA2Model.from_pretrained, LLaDA2MoeModelLM.from_pretrained, LLaDA2Pipeline.from_pretrained):
        for given in ({"device": absent}, {"device_map": absent}, {"device_map": {"": absent}}):
            with pytest.raises(ValueError, match=f"^{[*given][0]}={absent}: this machine has {absent} CUDA devices"):
                load(tmp_path, **given)
        with pytest.raises(ValueError, match="^device=-1: expected a device such as cpu"):
            load(tmp_path, device=-1)
        with pytest.raises(ValueError, match="^device=True: expected a device such as cpu"):
            load(tmp_path, device=True)
    model = fresh(golden / "tiny", torch.float32)
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler())
    for move in (model.cuda, model.to, pipe.to):
        for device in (absent, f"cuda:{absent}", torch.device("cuda", absent)):
            with pytest.raises(ValueError, match=f"^device=.*{absent}.*: this machine has {absent} CUDA devices"):
                move(device)
    if not absent:
        with pytest.raises(ValueError, match="^device='cuda': this machine has 0 CUDA devices"):
            model.cuda()
    for move in (model.xpu, model.ipu, model.mtia):
        for arguments in ([], [0]):
            with pytest.raises(ValueError, match=f"^device='{move.args[0]}': expected cpu or cuda"):
                move(*arguments)
    assert same(model, loaded(golden / "tiny", torch.float32)) and model.device.type == "cpu"


@pytest.mark.parametrize("dtype", [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64
], ids=str)  # fmt: skip
def test_a_dtype_that_no_network_has_is_refused_before_anything_changes(golden, dtype):
    ways = [way for name, way in WAYS.items() if name not in ("half, bfloat16, float", "layer by layer")]
    for quantization in (None, "fp8"):
        model = fresh(golden / "tiny", torch.bfloat16, quantization)
        for way in ways:
            with pytest.raises(ValueError, match=f"^dtype={dtype}: expected float64 or one of bfloat16, float16"):
                way(model, dtype)
            assert same(model, loaded(golden / "tiny", torch.bfloat16, quantization))
        assert results(model) == results(loaded(golden / "tiny", torch.bfloat16, quantization))


def test_float64_and_the_arguments_of_diffusers(golden):
    model = fresh(golden / "tiny", torch.float32)
    assert model.to(torch.float64).dtype == torch.float64
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler())
    assert pipe.to("cpu", torch.float32, silence_dtype_warnings=True) is pipe and pipe.dtype == torch.float32


def test_models_are_not_moved_to_other_devices(golden):
    model = fresh(golden / "tiny", torch.float32)
    for move in (model.to, LLaDA2Pipeline(model, BlockRefinementScheduler()).to):
        for arguments in (["mps"], ["xpu:1", torch.float16], [torch.device("mps")]):
            with pytest.raises(ValueError, match="^device='(mps|xpu).*: expected cpu or cuda"):
                move(*arguments)
        with pytest.raises(ValueError, match="^device='mps': expected cpu or cuda"):
            move(device="mps")
    assert model.device.type == "cpu" and model.dtype == torch.float32
