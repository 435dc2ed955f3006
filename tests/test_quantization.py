"""Fp8 models: made from wider checkpoints, written and read back, refused when broken, and how far they deviate."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada2_fast import demo
from llada2_fast.config import ModelConfig
from llada2_fast.demo import tasks
from llada2_fast.kernels import fp8, gemm
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.attention import Span
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.checkpoint import CheckpointError
from llada2_fast.weights.special_tokens import load_tokenizer
from tests.kernels.interpreter import interpreted

LINEAR = (
    "query_key_value.weight",
    "dense.weight",
    "gate_up",
    "gate_up.weight",
    "down",
    "down.weight",
    "lm_head.weight",
)
QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
}


def load(path, dtype=torch.float32, **kwargs):
    return LLaDA2Model.from_pretrained(path, dtype=dtype, progress=False, **kwargs)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def saved(golden, tmp_path):
    """Folder of the golden set tiny as an fp8 checkpoint in one file, and its tensors."""
    load(golden / "tiny", quantization="fp8").save_pretrained(tmp_path / "fp8")
    return tmp_path / "fp8", load_file(tmp_path / "fp8" / "model.safetensors")


@pytest.mark.parametrize("name", ["tiny", "variant", "moe256"])
def test_quantised_while_loading(golden, name):
    """Linear weights become what quantize_weight makes of them; everything else stays as it is."""
    wide, narrow = load(golden / name), load(golden / name, quantization="fp8")
    assert narrow.config.quantization == "fp8" and narrow.dtype == torch.float32
    params, found = dict(narrow.named_parameters()), 0
    for key, value in wide.named_parameters():
        if not key.endswith(LINEAR) or value.ndim == 1:
            assert equal(params.pop(key), value)
            continue
        values, scale = fp8.quantize_weight(value, 2 if "gate_up" in key else 1)
        scale_key = key.removesuffix("weight") + "scale" if key.endswith(".weight") else f"{key}_scale"
        assert equal(params.pop(key), values) and equal(params.pop(scale_key), scale)
        found += 1
    assert not params and found >= 8 and not any("router" in key for key in params)


@pytest.mark.parametrize("name", ["tiny", "variant", "group"])
def test_written_and_read_back(golden, tmp_path, name):
    model = load(golden / name, quantization="fp8")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written["quantization_config"] == QUANTIZATION_CONFIG and "quantization" not in written
    tensors = load_file(tmp_path / "model.safetensors")
    weights = {key for key, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    assert {f"{key}_scale_inv" for key in weights} == {key for key in tensors if key.endswith("_scale_inv")}
    assert (
        "model.layers.1.attention.query_key_value.weight" in weights and "model.word_embeddings.weight" not in weights
    )
    again = load(tmp_path)
    for (key, value), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert equal(value, other), key


def test_an_expert_of_a_checkpoint_has_scales_of_its_own(saved):
    """As published: one scale tensor per stored matrix, over its own blocks."""
    _, tensors = saved
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rows, columns = tensors[name].shape
    assert tensors[f"{name}_scale_inv"].shape == (gemm.num_groups(rows), gemm.num_groups(columns))


def test_what_a_checkpoint_left_wide_is_quantised(golden, saved):
    """modules_to_not_convert is no error: such a tensor has no scales and is quantised like any other."""
    folder, tensors = saved
    wide = load(golden / "tiny").lm_head.weight
    del tensors["lm_head.weight_scale_inv"]
    save_file(tensors | {"lm_head.weight": wide.data}, folder / "model.safetensors")
    values, scale = fp8.quantize_weight(wide)
    model = load(folder)
    assert equal(model.lm_head.weight, values) and equal(model.lm_head.scale, scale)


def test_merged_experts(golden, saved):
    """gate and up in one tensor, stored wide: each gets blocks of its own, as from separate tensors."""
    folder, tensors = saved
    wide, layer = load(golden / "tiny"), "model.layers.1.mlp"
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{layer}.experts.")}
    merged = {
        f"{layer}.w1": wide.layers[1].mlp.experts.gate_up.data,
        f"{layer}.w2": wide.layers[1].mlp.experts.down.data,
    }
    expected = load(folder)
    save_file(kept | merged, folder / "model.safetensors")
    for value, other in zip(load(folder).parameters(), expected.parameters(), strict=True):
        assert equal(value, other)


NAME = "model.layers.1.attention.dense.weight"
SCALE = f"{NAME}_scale_inv"
BROKEN = {
    "scale missing": (lambda t: t.pop(SCALE), SCALE),
    "scale of another shape": (lambda t: t.update({SCALE: torch.ones(2, 1)}), SCALE),
    "scale in another dtype": (lambda t: t.update({SCALE: t[SCALE].bfloat16()}), SCALE),
    "scale not finite": (lambda t: t.update({SCALE: t[SCALE] * float("nan")}), SCALE),
    "scale beside a wide weight": (lambda t: t.update({NAME: t[NAME].float()}), SCALE),
    "weight with NaN": (lambda t: t[NAME].view(torch.uint8).fill_(0x7F), NAME),
    "norm in fp8": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}), "model.norm.weight",
    ),
    "router in fp8": (
        lambda t: t.update({"model.layers.1.mlp.gate.weight": t["model.layers.1.mlp.gate.weight"].to(fp8.FP8)}),
        "model.layers.1.mlp.gate.weight",
    ),
    "scale of a norm": (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}), "norm.weight_scale_inv"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_refused(saved, kind):
    folder, tensors = saved
    change, name = BROKEN[kind]
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{name}"):
        load(folder)


def test_fp8_tensors_need_a_config_that_says_so(saved):
    folder, _ = saved
    content = json.loads((folder / "config.json").read_text("utf-8"))
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match=r"weight_scale_inv is unexpected: config\.json has no place for it"):
        load(folder)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"weight_block_size": [64, 128]}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt"),
    ],
)
def test_other_quantisations_are_refused(golden, change, name):
    raw = json.loads((golden / "tiny" / "config.json").read_text("utf-8"))
    assert ModelConfig.from_hf(raw | {"quantization_config": QUANTIZATION_CONFIG}).fp8
    with pytest.raises(ValueError, match=rf"^quantization_config\.{name}="):
        ModelConfig.from_hf(raw | {"quantization_config": QUANTIZATION_CONFIG | change})


def test_unknown_names_are_refused(golden):
    with pytest.raises(ValueError, match="^quantization='int3'"):
        load(golden / "tiny", quantization="int3")


def test_a_broken_source_is_refused_before_it_is_quantised(golden, tmp_path):
    shutil.copytree(golden / "tiny", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    tensors[NAME][0, 0] = float("inf")
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match=NAME):
        load(tmp_path / "x", quantization="fp8")


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in bfloat16 and in fp8 with bfloat16 activations, and its tokenizer."""
    folder = demo.path()
    wide, narrow = (load(folder, torch.bfloat16, quantization=name) for name in (None, "fp8"))
    return wide, narrow, load_tokenizer(folder)


def relative(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


def test_error_of_each_layer(embedded):
    """Every layer on the very input it has in the bfloat16 model: what it adds is at most 12 % off, 7 % on the mean.

    Measured 3 to 9 %: one product is off by 3.7 % (test_fp8.py), a layer chains four, and where two experts nearly tie
    a token may go to the other.
    """
    wide, narrow, tokenizer = embedded
    text = "".join(tasks.sample("story", 4, seed=0))
    ids = torch.tensor([tokenizer(text).input_ids[:64]])
    calls = []
    hooks = [layer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for layer in wide.layers]
    wide(ids)
    for hook in hooks:
        hook.remove()
    errors = []
    for layer, (_, args, kwargs, wanted) in zip(narrow.layers, calls, strict=True):
        got, before = layer(*args, **kwargs), args[0] if args[1] is None else args[0] + args[1]
        added = (x + delta - before for x, delta, _ in (got, wanted))
        errors.append(relative(*added))
    assert max(errors) <= 0.12 and sum(errors) / len(errors) <= 0.07, errors


def test_agreement_on_committed_tokens(embedded):
    """Held-out prompts of all tasks: at least 97 % of the tokens are those of the bfloat16 model."""
    wide, narrow, tokenizer = embedded
    same = total = 0
    for task in tasks.TASKS:
        for prompt in tasks.sample(task, 4, seed=1):
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            a, b = (
                model.generate(ids["input_ids"], gen_length=64, threshold=0.9, eos_early_stop=True)[0].tolist()
                for model in (wide, narrow)
            )
            same += sum(x == y for x, y in zip(a, b, strict=False))
            total += max(len(a), len(b))
    print(f"{same} of {total} tokens agree")
    assert same >= 0.97 * total


def test_kernels_and_reference_agree(golden):
    model = load(golden / "tiny", quantization="fp8")
    ids = load_file(golden / "tiny" / "inputs.safetensors")["input_ids"][:, :32]
    wanted = model(ids, block_length=8).logits
    with force_ops("triton"), interpreted():
        got = model(ids, block_length=8).logits
    assert relative(got, wanted) <= 0.05  # where two experts nearly tie, a token may go to the other
    assert (got - wanted).abs().median() <= 1e-3 * wanted.abs().mean()


def test_what_the_last_norm_leaves_for_the_head(golden):
    """Over pages: in fp8, of which a part may be read, and unquantised where hidden states are asked for."""
    model = load(golden / "tiny", quantization="fp8")
    ids = load_file(golden / "tiny" / "inputs.safetensors")["input_ids"][:1, :24]
    with force_ops("triton"), interpreted():
        cache = model.new_cache(3, 8)
        hidden = model.forward_blocks(ids[0], torch.arange(24), [Span((2, 0, 1), 0, 3, 24)], cache)
        logits = model.lm_logits(hidden)
        assert torch.equal(model.lm_logits(hidden[:8]), logits[:8])
        output = model(ids, block_length=8, output_hidden_states=True)
    assert isinstance(hidden, fp8.QuantRows)
    torch.testing.assert_close(output.logits[0], logits, atol=1e-2, rtol=1e-2)  # attention in another order
    last = output.hidden_states[-1]
    assert last.dtype == model.dtype
    torch.testing.assert_close(fp8.linear_ref(last, model.lm_head.weight, model.lm_head.scale), output.logits)
