"""Experts in int4: made from wider checkpoints, read and written in GPTQ's layout, refused where they do not fit, and
how far they deviate."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada2_fast import demo
from llada2_fast.config import ModelConfig
from llada2_fast.demo import tasks
from llada2_fast.kernels import int4
from llada2_fast.kernels._triton import force_ops
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights import checkpoint
from llada2_fast.weights.checkpoint import CheckpointError
from llada2_fast.weights.shapes import WHOLE, Share
from llada2_fast.weights.special_tokens import load_tokenizer
from tests.kernels.interpreter import interpreted
from tests.test_checkpoint import merged, prefused, rewrite

QUANTIZATION_CONFIG = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False,
    "checkpoint_format": "gptq", "pack_dtype": "int32",
}  # fmt: skip
WIDE = ModelConfig(  # K of one whole group and a cut one
    vocab_size=64, hidden_size=192, num_hidden_layers=2, intermediate_size=96, moe_intermediate_size=160,
    first_k_dense_replace=1, num_attention_heads=6, num_key_value_heads=3, head_dim=32, num_experts=4, n_group=1,
    topk_group=1, num_shared_experts=1, use_bias=True, dtype="float32",
)  # fmt: skip
EXPERTS = (".mlp.experts.", ".mlp.shared_experts.")


def load(path, dtype=torch.float32, **kwargs):
    return LLaDA2Model.from_pretrained(path, dtype=dtype, progress=False, **kwargs)


def same(model, other):
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    assert all(key == name and x.dtype == y.dtype and torch.equal(x, y) for (key, x), (name, y) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "variant", "moe256"])
def test_quantised_while_loading(golden, name, dtype):
    """Experts become what quantize_weight makes of them; everything else stays as it is, the dense MLPs too."""
    wide, narrow = load(golden / name), load(golden / name, dtype, quantization="int4")
    assert narrow.config.quantization == "int4" and narrow.dtype == dtype
    params, found = dict(narrow.named_parameters()), 0
    for key, value in wide.named_parameters():
        if not any(part in key for part in EXPERTS):
            own = params.pop(key)
            assert torch.equal(own, value.to(own.dtype))
            continue
        words, scale = int4.quantize_weight(value, dtype)
        stem = key.removesuffix(".weight")
        assert torch.equal(params.pop(key), words)
        assert torch.equal(params.pop(f"{stem}.scale" if stem != key else f"{key}_scale"), scale)
        found += 1
    assert not params and found == 4 * (wide.config.num_hidden_layers - wide.config.first_k_dense_replace)


@pytest.mark.parametrize("layout", [merged, prefused])
def test_merged_experts(golden, tmp_path, layout):
    rewrite(golden / "tiny", tmp_path, layout)
    same(load(tmp_path, quantization="int4"), load(golden / "tiny", quantization="int4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "variant", "group"])
def test_written_and_read_back(golden, tmp_path, name, dtype):
    model = load(golden / name, dtype, quantization="int4")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written["quantization_config"] == QUANTIZATION_CONFIG and "quantization" not in written
    same(model, load(tmp_path, dtype))
    tensors, stem = load_file(tmp_path / "model.safetensors"), "model.layers.2.mlp.experts.3.down_proj"
    assert f"{stem}.weight" not in tensors and "model.layers.0.mlp.down_proj.weight" in tensors
    experts, inner = model.layers[2].mlp.experts, model.config.moe_intermediate_size
    stored = digits_of(tensors[f"{stem}.qweight"]) - 8
    wide = int4.dequantize_weight(experts.down[3], experts.down_scale[3], inner)
    assert torch.equal(stored * tensors[f"{stem}.scales"].T.float(), wide) and stored.abs().max() == 8


def digits_of(qweight):
    """[K / 8, N] -> [N, K], one by one."""
    rows = [[(word >> 4 * i) % 16 for word in line for i in range(8)] for line in qweight.T.tolist()]
    return torch.tensor(rows)


def test_rows_that_do_not_come_in_eights_cannot_be_written(tmp_path):
    config = replace(WIDE, moe_intermediate_size=20, quantization="int4")
    params = dict(LLaDA2Model(config).named_parameters())
    with pytest.raises(ValueError, match="^moe_intermediate_size=20: expected a multiple of 8"):
        checkpoint.save(tmp_path, config, params)
    assert not list(tmp_path.iterdir())


# GPTQ's layout


def gptq_tensors(weight, dtype, zero=7):
    """Of a linear layer as GPTQModel writes it, with the scales that we round to nearest with."""
    rows, columns = weight.shape
    _, scale = int4.quantize_weight(weight, dtype)
    spread = scale.float().repeat_interleave(128, 1)[:, :columns]
    digits = ((weight.float() / spread).round().clamp(-8, 7) + 8).long().T.tolist()  # [K][N]
    words = [[sum(digits[8 * k + i][n] << 4 * i for i in range(8)) for n in range(rows)] for k in range(columns // 8)]
    return {
        "qweight": torch.tensor(words).to(torch.uint32).view(torch.int32),
        "qzeros": torch.full((scale.shape[1], rows // 8), zero * 0x11111111).to(torch.uint32).view(torch.int32),
        "scales": scale.T.contiguous(),
        "g_idx": torch.tensor([k // 128 for k in range(columns)], dtype=torch.int32),
    }


def quantised(name):
    """Whether GPTQModel makes four bits of this tensor of LLaDA2's: every linear layer but the router and the head."""
    parts = ("query_key_value", "attention.dense", "gate_proj", "up_proj", "down_proj")
    return name.endswith(".weight") and any(part in name for part in parts)


def write_gptq(folder, target, chosen=quantised, dtype=torch.float32, zero=7, beside=False):
    """The checkpoint in a folder with the chosen weights in GPTQ's layout; its tensors."""
    target.mkdir(exist_ok=True)
    found = {}
    for name, x in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix("weight")
        parts = {stem + role: y for role, y in gptq_tensors(x, dtype, zero).items()} if chosen(name) else {name: x}
        found |= parts
    save_file(found, target / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    if beside:
        table = {key: value for key, value in QUANTIZATION_CONFIG.items() if key != "quant_method"}
        (target / "quantize_config.json").write_text(json.dumps(table), "utf-8")
    else:
        raw["quantization_config"] = QUANTIZATION_CONFIG | {"meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    (target / "config.json").write_text(json.dumps(raw), "utf-8")
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Folder of a random checkpoint in full precision whose weights have more than a group of K."""
    folder = tmp_path_factory.mktemp("wide")
    model, generator = LLaDA2Model(WIDE), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def only_experts(name):
    return quantised(name) and any(part in name for part in EXPERTS)


@pytest.mark.parametrize("zero", [7, 8])
@pytest.mark.parametrize("beside", [False, True])
def test_a_gptq_folder_is_what_is_quantised_while_loading(wide, tmp_path, zero, beside):
    write_gptq(wide, tmp_path, only_experts, zero=zero, beside=beside)
    same(load(tmp_path), load(wide, quantization="int4"))


def test_a_gptq_folder_decodes_the_same_tokens(golden, tmp_path):
    write_gptq(golden / "tiny", tmp_path, only_experts)
    models = load(tmp_path), load(golden / "tiny", quantization="int4")
    rules = {"gen_length": 64, "mask_id": 255, "eos_id": 252, "trace": True, "return_dict": True}
    texts = [model.generate(torch.arange(40)[None], **rules) for model in models]
    assert torch.equal(texts[0].sequences, texts[1].sequences) and texts[0].trace[0].events == texts[1].trace[0].events


def test_other_layers_in_four_bits_are_widened(wide, tmp_path):
    """Attention and the dense MLP: their weights are what the digits and scales stand for."""
    stored = write_gptq(wide, tmp_path, dtype=torch.float16)
    model, plain = load(tmp_path), load(wide)
    for layer, own in zip(model.layers, plain.layers, strict=True):
        for part, before in ((layer.attention.query_key_value, own.attention.query_key_value),
                             (layer.attention.dense, own.attention.dense)):  # fmt: skip
            words, scale = int4.quantize_weight(before.weight, torch.float16)
            assert torch.equal(part.weight, int4.dequantize_weight(words, scale, before.weight.shape[1]))
    assert torch.equal(model.layers[0].attention.dense.bias, plain.layers[0].attention.dense.bias)
    wanted = [int4.dequantize_weight(*int4.quantize_weight(half, torch.float16), 192)
              for half in plain.layers[0].mlp.gate_up.weight.chunk(2)]  # fmt: skip
    assert torch.equal(model.layers[0].mlp.gate_up.weight, torch.cat(wanted))
    scales = stored["model.layers.1.mlp.experts.2.up_proj.scales"]
    assert torch.equal(model.layers[1].mlp.experts.gate_up_scale[2, 160:], scales.T.float())


@pytest.mark.parametrize("share", [Share(experts=range(1, 3)), Share(kv_heads=range(1, 3))])
def test_a_share_of_a_gptq_folder(wide, tmp_path, share):
    write_gptq(wide, tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    found = {}
    for own in (WHOLE, share):
        model = LLaDA2Model(config, share=own)
        checkpoint.load(tmp_path, config, dict(model.named_parameters()), progress=False, share=own)
        found[own] = dict(model.named_parameters())
    whole, part = found[WHOLE], found[share]
    if share.experts:
        for name in ("gate_up", "gate_up_scale", "down", "down_scale"):
            name = f"layers.1.mlp.experts.{name}"
            assert torch.equal(part[name], whole[name][1:3])
        name = "layers.1.mlp.shared_experts.down.weight"
        assert torch.equal(part[name], whole[name])
    else:
        name = "layers.0.attention.dense.weight"
        assert torch.equal(part[name], whole[name][:, 64:])  # query heads 2 .. 5 of 32 each


def swapped(x):
    x = x.clone()
    x[[0, -1]] = x[[-1, 0]]
    return x


STEM = "model.layers.1.mlp.experts.2.up_proj"
DENSE = "model.layers.0.attention.dense"
BROKEN = {
    "another zero": (lambda t: t.update({f"{STEM}.qzeros": t[f"{STEM}.qzeros"] + 1}), f"{STEM}.qzeros"),
    "columns in another order": (lambda t: t.update({f"{STEM}.g_idx": swapped(t[f"{STEM}.g_idx"])}), f"{STEM}.g_idx"),
    "columns of attention in another order": (
        lambda t: t.update({f"{DENSE}.g_idx": swapped(t[f"{DENSE}.g_idx"])}), f"{DENSE}.g_idx",
    ),
    "scales missing": (lambda t: t.pop(f"{STEM}.scales"), f"{STEM}.scales"),
    "zeros missing": (lambda t: t.pop(f"{STEM}.qzeros"), f"{STEM}.qzeros"),
    "order missing": (lambda t: t.pop(f"{STEM}.g_idx"), f"{STEM}.g_idx"),
    "words missing": (lambda t: t.pop(f"{STEM}.qweight"), f"{STEM}.weight"),
    "groups of 64": (
        lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"].repeat_interleave(2, 0)}), f"{STEM}.scales",
    ),
    "eight bits": (
        lambda t: t.update({f"{STEM}.qweight": t[f"{STEM}.qweight"].repeat_interleave(2, 0)}), f"{STEM}.qweight",
    ),
    "words of another type": (lambda t: t.update({f"{STEM}.qweight": t[f"{STEM}.qweight"].float()}), f"{STEM}.qweight"),
    "scales not finite": (lambda t: t.update({f"{STEM}.scales": t[f"{STEM}.scales"] / 0}), f"{STEM}.scales"),
    "scales of attention not finite": (
        lambda t: t.update({f"{DENSE}.scales": t[f"{DENSE}.scales"] * float("nan")}), f"{DENSE}.scales",
    ),
    "the weight as well": (lambda t: t.update({f"{STEM}.weight": torch.zeros(160, 192)}), f"{STEM}.weight"),
    "scales beside a whole weight": (
        lambda t: t.update({f"{STEM}.weight": torch.zeros(160, 192)}) or t.pop(f"{STEM}.qweight"), f"{STEM}.",
    ),
    "a head in four bits": (lambda t: t.update({"lm_head.qweight": t[f"{STEM}.qweight"] + 0}), "lm_head.qweight"),
    "a norm of whole numbers": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}), "model.norm.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_refused(wide, tmp_path, kind):
    tensors = write_gptq(wide, tmp_path)
    change, name = BROKEN[kind]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{name}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"bits": 8}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": 64}, "group_size"),
        ({"group_size": -1}, "group_size"),
        ({"sym": False}, "sym"),
        ({"lm_head": True}, "lm_head"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"format": "bitblas"}, "format"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"quant_method": "awq"}, "quant_method"),
    ],
)
def test_other_quantisations_are_refused(golden, change, name):
    raw = json.loads((golden / "tiny" / "config.json").read_text("utf-8"))
    assert ModelConfig.from_hf(raw | {"quantization_config": QUANTIZATION_CONFIG}).int4
    with pytest.raises(ValueError, match=rf"^quantization_config\.{name}="):
        ModelConfig.from_hf(raw | {"quantization_config": QUANTIZATION_CONFIG | change})


def test_what_is_quantised_already_is_not_quantised_again(golden, tmp_path):
    for stored, other in (("fp8", "int4"), ("int4", "fp8")):
        load(golden / "tiny", quantization=stored).save_pretrained(tmp_path / stored)
        assert load(tmp_path / stored, quantization=stored).config.quantization == stored
        with pytest.raises(ValueError, match=f"^quantization='{other}': expected None or '{stored}'"):
            load(tmp_path / stored, quantization=other)


def test_four_bits_need_a_config_that_says_so(wide, tmp_path):
    write_gptq(wide, tmp_path)
    (tmp_path / "config.json").write_text((wide / "config.json").read_text("utf-8"), "utf-8")
    with pytest.raises(CheckpointError, match=r"unexpected: config\.json has no place for it"):
        load(tmp_path)


# The network


def test_dtypes_and_copies_leave_words_and_scales_alone(golden):
    model = load(golden / "tiny", torch.bfloat16, quantization="int4")
    experts = model.layers[1].mlp.experts
    before = copy.deepcopy(experts)
    for change in (lambda m: m.to(torch.float16), lambda m: m.float(), lambda m: m.type(torch.bfloat16)):
        change(model)
        assert experts.gate_up.dtype == torch.int16 and experts.gate_up_scale.dtype == torch.bfloat16
    same(experts, before)
    state = load(golden / "tiny", torch.float32, quantization="int4").state_dict()
    twin = LLaDA2Model(model.config)
    twin.load_state_dict(state)
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in twin.state_dict().items())


def test_an_expert_alone_is_widened(golden, monkeypatch):
    """A CPU reads words of the experts that some token chose, one at a time."""
    model = load(golden / "tiny", quantization="int4")
    calls, widen = [], int4.widen
    monkeypatch.setattr(int4, "widen", lambda words, *args: calls.append(words) or widen(words, *args))
    routing = model.layers[1].mlp(torch.randn(3, model.config.hidden_size))[1]
    assert len(calls) == 2 * (routing.unique().numel() + 1) and all(words.ndim == 3 for words in calls)


@pytest.mark.parametrize("name", ["tiny", "variant"])
def test_tokens_do_not_depend_on_the_batch(golden, name):
    model = load(golden / name, quantization="int4")
    assert model.exact_rows
    c, inner = model.config, model.config.moe_intermediate_size
    for rows in (2 * inner, 2 * c.num_shared_experts * inner, c.hidden_size):
        assert (rows, 128, torch.float32) in model.products()  # of K that is less than one group
    ids = torch.randint(c.vocab_size - 8, (3, 32), generator=torch.Generator().manual_seed(0))
    together = model(ids, block_length=8).logits
    assert torch.equal(model(ids[1:2], block_length=8).logits, together[1:2])


def test_kernels_and_reference_agree(golden):
    model = load(golden / "tiny", quantization="int4")
    ids = load_file(golden / "tiny" / "inputs.safetensors")["input_ids"][:, :32]
    wanted = model(ids, block_length=8).logits
    with force_ops("triton"), interpreted():
        got = model(ids, block_length=8).logits
    torch.testing.assert_close(got, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)


def test_agreement_on_committed_tokens():
    """Held-out prompts of all tasks: at least 95 % of the tokens are those of the bfloat16 model."""
    folder = demo.path()
    wide, narrow = (load(folder, torch.bfloat16, quantization=name) for name in (None, "int4"))
    tokenizer, agreed, total = load_tokenizer(folder), 0, 0
    for task in tasks.TASKS:
        for prompt in tasks.sample(task, 4, seed=1):
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            a, b = (
                model.generate(ids["input_ids"], gen_length=64, threshold=0.9, eos_early_stop=True)[0].tolist()
                for model in (wide, narrow)
            )
            agreed += sum(x == y for x, y in zip(a, b, strict=False))
            total += max(len(a), len(b))
    print(f"{agreed} of {total} tokens agree")
    assert agreed >= 0.95 * total
