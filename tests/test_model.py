"""The network against the recorded logits, hidden states and expert choices of the model cards' code, and its masks."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llada2_fast.config import ModelConfig
from llada2_fast.kernels.attention import masked_attention
from llada2_fast.kernels.rope import Angles
from llada2_fast.model import LLaDA2Model, block_causal_mask

GOLDEN = Path(__file__).parent / "golden"
SETS = ["tiny", "group", "variant", "flat", "moe256", "bf16", "block22"]
BF16_SETS = ["bf16", "moe256"]
ATOL = 1e-4  # float32 against float32
NEAR = 5e-5  # the same product at another height: matrix products round differently, nothing else may
BF16_TOL = 2**-5  # one layer in bfloat16, other order of summation: a few units in the last place


@functools.cache
def load(name, dtype=torch.float32):
    return LLaDA2Model.from_pretrained(GOLDEN / name, dtype=dtype, progress=False)


@functools.cache
def recorded(name):
    return load_file(GOLDEN / name / "inputs.safetensors"), load_file(GOLDEN / name / "outputs.safetensors")


def layer_names(model):
    return ["embed", *(f"layer{i}" for i in range(len(model.layers))), "final_norm"]


@pytest.mark.parametrize("name", SETS)
def test_logits_and_expert_choice(name):
    """At every recorded block length: logits, each token's set of experts and the weights they get."""
    model, (inputs, outputs) = load(name), recorded(name)
    weights = []
    routers = [layer.mlp.router for layer in model.layers if hasattr(layer.mlp, "router")]
    hooks = [router.register_forward_hook(lambda _m, _i, out: weights.append(out[:2])) for router in routers]
    lengths = inputs["block_lengths"].tolist()
    assert lengths == ([8] if name == "block22" else [4, 8, 32])
    for length in lengths:
        weights.clear()
        got = model(
            inputs["input_ids"], position_ids=inputs["position_ids"], block_length=length, output_router_indices=True
        )
        torch.testing.assert_close(got.logits, outputs[f"bl{length}.logits"], atol=ATOL, rtol=0)
        assert got.hidden_states is None
        moe_layers = [i for i, ids in enumerate(got.router_indices) if ids is not None]
        assert moe_layers == list(range(model.config.first_k_dense_replace, len(model.layers)))
        for i, (ids, weight) in zip(moe_layers, weights, strict=True):
            expected = outputs[f"bl{length}.router.layer{i}.topk_idx"].long()
            assert torch.equal(got.router_indices[i].sort(-1).values, expected.sort(-1).values)
            wanted = outputs[f"bl{length}.router.layer{i}.topk_weight"].gather(1, expected.argsort(-1))
            torch.testing.assert_close(weight.gather(1, ids.argsort(-1)), wanted, atol=ATOL, rtol=0)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", SETS)
def test_hidden_states(name):
    model, (inputs, outputs) = load(name), recorded(name)
    got = model(
        inputs["input_ids"], position_ids=inputs["position_ids"], block_length=8, output_hidden_states=True
    ).hidden_states
    assert len(got) == model.config.num_hidden_layers + 2
    worst = {
        layer: (hidden - outputs[f"bl8.hidden.{layer}"]).abs().max().item()
        for hidden, layer in zip(got, layer_names(model), strict=True)
    }
    assert {layer: error for layer, error in worst.items() if not error <= ATOL} == {}


@pytest.mark.parametrize("name", BF16_SETS)
def test_bfloat16_end_to_end(name):
    """A rounding may hand a token to another expert and change it for good: so shares of tokens, not maxima."""
    model, (inputs, outputs) = load(name, torch.bfloat16), recorded(name)
    got = model(inputs["input_ids"], position_ids=inputs["position_ids"], block_length=8)
    wanted = outputs["bf16.bl8.logits"]
    assert got.logits.dtype == torch.float32
    assert torch.equal(got.logits, got.logits.bfloat16().float())  # the product is rounded to bfloat16 first
    worst = (got.logits - wanted).abs().amax(-1).flatten()
    assert worst.quantile(0.9) <= 2**-3  # logits of up to 30: one unit in the last place
    assert (got.logits.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.98


@pytest.mark.parametrize("name", BF16_SETS)
def test_bfloat16_layer_by_layer(name):
    """Every layer on the recorded input of that layer, so that roundings do not add up."""
    model, (inputs, outputs) = load(name, torch.bfloat16), recorded(name)
    ids = inputs["input_ids"]
    batch, size = ids.shape
    angles = Angles(*model._angles(inputs["position_ids"].flatten()))
    mask = block_causal_mask(size, 8)[None, None]

    def attend(q, k, v):
        return masked_attention(*(t.unflatten(0, (batch, size)) for t in (q, k, v)), mask).flatten(0, 1)

    hidden = {layer: outputs[f"bf16.bl8.hidden.{layer}"].flatten(0, 1) for layer in layer_names(model)}
    assert torch.equal(model.word_embeddings(ids.flatten()), hidden["embed"])
    before = hidden["embed"]
    for i, layer in enumerate(model.layers):
        got, delta, chosen = layer(before, None, angles, attend)
        got = got + delta
        after = hidden[f"layer{i}"]
        same = torch.ones(batch * size, dtype=torch.bool)
        if chosen is not None:
            wanted = outputs[f"bf16.bl8.router.layer{i}.topk_idx"].long()
            same = (chosen.sort(-1).values == wanted.sort(-1).values).all(-1)
            assert same.float().mean() >= 0.97
        torch.testing.assert_close(got[same], after[same], atol=BF16_TOL, rtol=BF16_TOL)
        before = after
    torch.testing.assert_close(model.norm(before), hidden["final_norm"], atol=BF16_TOL, rtol=BF16_TOL)


def ids_of(name, batch=2, size=32, seed=0):
    vocab = load(name).config.vocab_size
    return torch.randint(vocab, (batch, size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SETS)
def test_a_token_moves_its_own_block_and_later_ones_only(name):
    model, ids = load(name), ids_of(name, batch=1)
    changed = ids.clone()
    changed[0, 23] = (changed[0, 23] + 1) % model.config.vocab_size
    before, after = (model(x, block_length=8).logits[0] for x in (ids, changed))
    assert (before[:16] - after[:16]).abs().max() <= NEAR
    assert (before[16:] - after[16:]).abs().amax(-1).min() > 100 * NEAR


@pytest.mark.parametrize("name", ["tiny", "variant", "block22"])
def test_four_dimensional_masks(name):
    """Bool, additive with -inf, additive with the dtype's lowest number: the block-causal ones equal the default."""
    model, ids = load(name), ids_of(name)
    default = model(ids, block_length=8).logits
    mask = block_causal_mask(32, 8)
    for low in (float("-inf"), torch.finfo(torch.float32).min):
        for dtype in (torch.float32, torch.float64):
            additive = torch.zeros(1, 1, 32, 32, dtype=dtype).masked_fill(~mask, low)
            got = model(ids, block_length=8, attention_mask=additive.expand(2, -1, -1, -1)).logits
            torch.testing.assert_close(got, default, atol=NEAR, rtol=0)
    assert torch.equal(model(ids, block_length=8, attention_mask=mask[None, None]).logits, default)
    assert torch.equal(model(ids, block_length=8, attention_mask=mask.expand(2, 1, -1, -1)).logits, default)


def test_a_four_dimensional_mask_is_taken_as_given():
    model, ids = load("tiny"), ids_of("tiny")
    everything = model(ids, attention_mask=torch.ones(1, 1, 32, 32, dtype=torch.bool)).logits
    torch.testing.assert_close(everything, model(ids, block_length=32).logits, atol=1e-6, rtol=0)
    causal = torch.ones(32, 32).tril().bool()[None, None]
    torch.testing.assert_close(
        model(ids, attention_mask=causal).logits, model(ids, block_length=1).logits, atol=NEAR, rtol=0
    )
    own = torch.stack((causal[0], torch.ones_like(causal[0])))  # one mask per row
    got = model(ids, attention_mask=own).logits
    torch.testing.assert_close(got[0], model(ids[:1], block_length=1).logits[0], atol=NEAR, rtol=0)
    torch.testing.assert_close(got[1], everything[1], atol=NEAR, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["tiny", "flat", "moe256", "block22"])
def test_right_padding_equals_the_row_alone(name, dtype):
    model, ids = load(name), ids_of(name)
    mask = torch.ones(2, 32)
    mask[1, 19:] = 0
    got = model(ids, block_length=8, attention_mask=mask.to(dtype)).logits
    torch.testing.assert_close(got[1, :19], model(ids[1:, :19], block_length=8).logits[0], atol=NEAR, rtol=0)
    torch.testing.assert_close(got[0], model(ids[:1], block_length=8).logits[0], atol=NEAR, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "flat", "moe256", "block22"])
def test_left_padding_by_whole_blocks_with_position_ids_equals_the_row_alone(name):
    """Masks use sequence indices: only padding by whole blocks leaves the row on its own grid."""
    model, ids = load(name), ids_of(name)
    mask, position = torch.ones(2, 32, dtype=torch.int64), torch.arange(32).repeat(2, 1)
    mask[1, :16] = 0
    position[1] = (position[1] - 16).clamp(min=0)
    got = model(ids, position_ids=position, block_length=8, attention_mask=mask).logits
    torch.testing.assert_close(got[1, 16:], model(ids[1:, 16:], block_length=8).logits[0], atol=NEAR, rtol=0)
    torch.testing.assert_close(got[0], model(ids[:1], block_length=8).logits[0], atol=NEAR, rtol=0)


def test_padding_is_anded_with_block_causal_over_sequence_indices():
    """Padding in the middle of blocks, both sides at once, against the same rule written as a 4D mask."""
    model, ids = load("tiny"), ids_of("tiny")
    padding = torch.ones(2, 32, dtype=torch.int64)
    padding[0, :5], padding[0, 29:], padding[1, 11:14] = 0, 0, 0
    written_out = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    for b in range(2):
        for i in range(32):
            for j in range(32):
                written_out[b, 0, i, j] = i // 8 >= j // 8 and bool(padding[b, j])
    got = model(ids, block_length=8, attention_mask=padding).logits
    wanted = model(ids, block_length=8, attention_mask=written_out).logits
    seen = written_out.any(-1)[:, 0]
    torch.testing.assert_close(got[seen], wanted[seen], atol=NEAR, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "block22"])
def test_padded_positions_give_no_nan(name, dtype):
    model, ids = load(name, dtype), ids_of(name)
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[0, :20], mask[1] = 0, 0
    got = model(ids, block_length=8, attention_mask=mask, output_hidden_states=True)
    assert got.logits.isfinite().all() and all(h.isfinite().all() for h in got.hidden_states)


def test_block_length_defaults_to_the_model_s_and_is_settable():
    model, ids = LLaDA2Model.from_pretrained(GOLDEN / "tiny", progress=False), ids_of("tiny", size=64)
    assert model.block_length == 32 and load("block22").block_length == 8
    assert torch.equal(model(ids).logits, model(ids, block_length=32).logits)
    model.block_length = 4
    assert torch.equal(model(ids).logits, load("tiny")(ids, block_length=4).logits)
    assert not torch.equal(model(ids).logits, load("tiny")(ids).logits)


def test_position_ids():
    model, ids = load("tiny"), ids_of("tiny")
    default = model(ids, block_length=8).logits
    for position in (torch.arange(32)[None], torch.arange(32).repeat(2, 1)):
        assert torch.equal(model(ids, position_ids=position, block_length=8).logits, default)
    shifted = model(ids, position_ids=torch.arange(100, 132)[None], block_length=8).logits
    torch.testing.assert_close(shifted, default, atol=1e-4, rtol=0)  # angles are relative
    stretched = model(ids, position_ids=2 * torch.arange(32)[None], block_length=8).logits
    assert (stretched - default).abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 7, 31])
def test_sequences_that_end_inside_a_block(size):
    for name in ("tiny", "flat"):
        model, ids = load(name), ids_of(name, size=size)
        assert model(ids, block_length=8).logits.shape == (2, size, model.config.vocab_size)
        torch.testing.assert_close(
            model(ids, block_length=8).logits[:1], model(ids[:1], block_length=8).logits, atol=NEAR, rtol=0
        )


IDS = torch.zeros(2, 8, dtype=torch.int64)
REFUSED = {
    "ids of one dimension": (dict(input_ids=IDS[0]), "input_ids", "[8]"),
    "ids of three dimensions": (dict(input_ids=IDS[None]), "input_ids", "[1, 2, 8]"),
    "bool ids": (dict(input_ids=IDS.bool()), "input_ids", "bool"),
    "a list": (dict(input_ids=[[1, 2]]), "input_ids", "list"),
    "attentions": (dict(input_ids=IDS, output_attentions=True), "output_attentions", "True"),
    "float ids": (dict(input_ids=IDS.float()), "input_ids", "float32"),
    "positions too short": (dict(input_ids=IDS, position_ids=IDS[:, :7]), "position_ids", "[2, 7]"),
    "positions of one dimension": (dict(input_ids=IDS, position_ids=IDS[0]), "position_ids", "[8]"),
    "positions of three rows": (dict(input_ids=IDS, position_ids=torch.zeros(3, 8).long()), "position_ids", "[3, 8]"),
    "block_length 0": (dict(input_ids=IDS, block_length=0), "block_length", "0"),
    "block_length -4": (dict(input_ids=IDS, block_length=-4), "block_length", "-4"),
    "2D mask too short": (dict(input_ids=IDS, attention_mask=IDS[:, :7]), "attention_mask", "[2, 7]"),
    "2D mask of one row": (dict(input_ids=IDS, attention_mask=IDS[:1]), "attention_mask", "[1, 8]"),
    "1D mask": (dict(input_ids=IDS, attention_mask=IDS[0]), "attention_mask", "[8]"),
    "3D mask": (dict(input_ids=IDS, attention_mask=torch.ones(2, 8, 8)), "attention_mask", "[2, 8, 8]"),
    "4D mask too small": (dict(input_ids=IDS, attention_mask=torch.ones(2, 1, 8, 7)), "attention_mask", "[2, 1, 8, 7]"),
    "4D mask of three rows": (
        dict(input_ids=IDS, attention_mask=torch.ones(3, 1, 8, 8).bool()), "attention_mask", "[3, 1, 8, 8]"
    ),
    "4D mask of three heads": (
        dict(input_ids=IDS, attention_mask=torch.ones(2, 3, 8, 8).bool()), "attention_mask", "[2, 3, 8, 8]"
    ),
    "block_length of text": (dict(input_ids=IDS, block_length="8"), "block_length", "'8'"),
    "ids too large": (dict(input_ids=IDS + 256), "input_ids", "256..256, some outside 0..255"),
    "ids below 0": (dict(input_ids=IDS.numpy() - 1), "input_ids", "-1..-1, some outside 0..255"),
    "a dict of positions": (dict(input_ids=IDS, position_ids={}), "position_ids", "dict"),
    "uneven positions": (dict(input_ids=IDS, position_ids=[[0], [0, 1]]), "position_ids", "[[0], [0, 1]]"),
    "short positions of NumPy": (dict(input_ids=IDS, position_ids=np.zeros((2, 7))), "position_ids", "[2, 7]"),
    "a dict of masks": (dict(input_ids=IDS, attention_mask={"full_attention": IDS}), "attention_mask", "dict"),
    "a mask of text": (dict(input_ids=IDS, attention_mask=[["1"] * 8] * 2), "attention_mask", "'1'"),
    "a short mask of NumPy": (dict(input_ids=IDS, attention_mask=np.ones((2, 7))), "attention_mask", "[2, 7]"),
    "a list of a short mask": (dict(input_ids=IDS, attention_mask=[[1] * 7] * 2), "attention_mask", "[2, 7]"),
    "4D mask of other integers": (
        dict(input_ids=IDS, attention_mask=torch.full((2, 1, 8, 8), -10000)), "attention_mask", "-10000"
    ),
    "4D mask of other floats": (
        dict(input_ids=IDS, attention_mask=torch.full((2, 1, 8, 8), 0.5)), "attention_mask", "0.5"
    ),
    "4D mask with a large number": (
        dict(input_ids=IDS, attention_mask=torch.eye(8)[None, None] * 1e4 - 1e4 + 1), "attention_mask", "-9999"
    ),
    "4D mask with NaN": (
        dict(input_ids=IDS, attention_mask=torch.full((1, 1, 8, 8), float("nan"))), "attention_mask", "nan"
    ),
    "additive 2D mask": (
        dict(input_ids=IDS, attention_mask=torch.tensor([[0.0] * 7 + [float("-inf")]] * 2)), "attention_mask", "-inf"
    ),
    "2D mask of packed sequences": (dict(input_ids=IDS, attention_mask=IDS + 2), "attention_mask", "2"),
    "an unknown argument": (dict(input_ids=IDS, labels=IDS), "labels", ""),
}  # fmt: skip


@pytest.mark.parametrize("arguments, name, value", REFUSED.values(), ids=REFUSED.keys())
def test_bad_shapes_are_refused_by_name(arguments, name, value):
    with pytest.raises(ValueError) as refused:
        load("tiny")(**arguments)
    assert name in str(refused.value) and value in str(refused.value)


AS_OTHERS_GIVE_THEM = {
    "arrays": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "floats": lambda x: x.numpy() + 0.0,
}


@pytest.mark.parametrize("given", AS_OTHERS_GIVE_THEM.values(), ids=AS_OTHERS_GIVE_THEM.keys())
def test_masks_and_positions_that_are_no_tensors(given):
    model, ids = load("tiny"), ids_of("tiny")
    padding, position = torch.ones_like(ids), torch.arange(32).flip(0)[None]
    padding[0, :5] = 0
    square = block_causal_mask(32, 4).long()[None, None]
    for mask in (padding, square):
        wanted = model(ids, attention_mask=mask.bool(), position_ids=position).logits
        assert torch.equal(model(ids.numpy(), attention_mask=given(mask), position_ids=given(position)).logits, wanted)
    additive = torch.zeros(1, 1, 32, 32).masked_fill(square == 0, float("-inf"))
    wanted = model(ids, attention_mask=additive).logits
    assert torch.equal(model(ids, attention_mask=given(additive)).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_4d_masks_of_integers_zero_and_one_are_read_as_bool(dtype):
    model, ids = load("tiny"), ids_of("tiny")
    mask = block_causal_mask(32, 4)[None, None]
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits)


def test_arguments_of_other_models_that_change_nothing_are_taken():
    model, ids = load("tiny"), ids_of("tiny")
    assert torch.equal(model(ids, use_cache=False, return_dict=True).logits, model(ids).logits)
    given = dict(past_key_values=None, labels=None, output_attentions=False, logits_to_keep=0)
    assert torch.equal(model(ids.int(), **given).logits, model(ids).logits)


@pytest.mark.parametrize("given", [
    {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "torch.bfloat16"},
    {"dtype": "bfloat16", "device_map": {"": "cpu"}}, {"torch_dtype": "bfloat16", "device_map": "cpu"},
])  # fmt: skip
def test_dtypes_and_devices_by_other_names(given):
    model = LLaDA2Model.from_pretrained(GOLDEN / "tiny", progress=False, **given)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")


def test_from_pretrained_and_save_pretrained_take_what_changes_nothing(tmp_path):
    given = dict(local_files_only=True, cache_dir="hub", token="x", revision="main", force_download=False,
                 trust_remote_code=True, low_cpu_mem_usage=True, use_safetensors=True, attn_implementation="sdpa",
                 use_cache=True, load_in_8bit=False, quantization_config=None, dtype="auto", proxies={})  # fmt: skip
    model = LLaDA2Model.from_pretrained(GOLDEN / "tiny", progress=False, **given)
    assert torch.equal(model(ids_of("tiny")).logits, load("tiny")(ids_of("tiny")).logits)
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="100KiB", push_to_hub=False, variant=None)
    assert max(path.stat().st_size for path in tmp_path.glob("model-*.safetensors")) < 110_000
    again = LLaDA2Model.from_pretrained(tmp_path, progress=False)
    assert torch.equal(again(ids_of("tiny")).logits, model(ids_of("tiny")).logits)


@pytest.mark.parametrize("given, message", [
    ({"load_in_8bit": True}, "load_in_8bit=True: not supported by our from_pretrained; expected False"),
    ({"load_in_4bit": True}, "load_in_4bit=True"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4}"),
    ({"use_safetensors": False}, "use_safetensors=False"),
    ({"attn_implementation": "paged"}, "attn_implementation='paged'"),
    ({"progres": False}, "progres=False: .*; expected none such"),
    ({"max_memory": {0: "1GB"}}, "max_memory="),
    ({"tp_plan": "auto"}, "tp_plan='auto'"),
    ({"dtype": "int8"}, "dtype='int8': expected 'auto' or one of bfloat16"),
    ({"dtype": torch.float64}, "dtype=torch.float64"),
    ({"dtype": "float32", "torch_dtype": "float32"}, "give it or dtype, not both"),
    *[({"device_map": way}, f"device_map='{way}': .* no model is split")
      for way in ("balanced", "balanced_low_0", "sequential")],
    ({"device_map": {"layers.0": 0, "lm_head": 1}}, "device_map="),
    ({"device": "cpu", "device_map": "cpu"}, "give it or device_map, not both"),
    ({"state_dict": {"x" * 5000: 1}}, "state_dict="),
])  # fmt: skip
def test_from_pretrained_refuses_by_name_what_it_cannot_honour(given, message):
    with pytest.raises(ValueError, match=message) as refused:
        LLaDA2Model.from_pretrained("no/such/folder", **given)  # before the folder is looked for
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("given, message", [
    ({"safe_serialization": False}, "safe_serialization=False: .*save_pretrained; expected True"),
    ({"push_to_hub": True}, "push_to_hub=True"),
    ({"variant": "fp16"}, "variant='fp16'"),
    ({"is_main_process": False}, "is_main_process=False"),
    ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples': expected bytes"),
    ({"max_shard_size": 0}, "max_shard_size=0"),
    ({"max_shard_size": 1.5}, "max_shard_size=1.5"),
])  # fmt: skip
def test_save_pretrained_refuses_by_name_what_it_cannot_honour(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        load("tiny").save_pretrained(tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_masks_of_zeros_and_ones_are_read_as_bool(dtype):
    """The LLaDA2.1 card's own loop passes such a mask; added to the scores it would let the future through."""
    model, ids = load("tiny"), ids_of("tiny")
    mask = block_causal_mask(32, 8)[None, None]
    wanted = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, wanted)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype).expand(2, -1, -1, -1)).logits, wanted)
    everything = torch.ones(1, 1, 32, 32)
    assert torch.equal(
        model(ids, attention_mask=everything.to(dtype)).logits, model(ids, attention_mask=everything.bool()).logits
    )
    nothing_added = model(ids, attention_mask=torch.zeros(1, 1, 32, 32, dtype=dtype)).logits
    torch.testing.assert_close(nothing_added, model(ids, attention_mask=everything.bool()).logits, atol=NEAR, rtol=0)
    padding = torch.ones(2, 32)
    padding[0, :3] = 0
    assert torch.equal(
        model(ids, attention_mask=padding.to(dtype)).logits, model(ids, attention_mask=padding.bool()).logits
    )


def test_outputs_are_those_that_users_of_transformers_know():
    model, ids = load("tiny"), ids_of("tiny")
    output = model(ids, output_hidden_states=True)
    assert output[0] is output["logits"] is output.logits and output[1] is output.hidden_states
    assert list(output) == ["logits", "hidden_states"] and len(output.to_tuple()) == 2
    assert len(model(ids)) == 1 and len(model(ids, return_dict=None)[:1]) == 1
    values = model(ids, output_hidden_states=True, return_dict=False)
    assert type(values) is tuple and len(values) == 2 and torch.equal(values[0], output.logits)
    (logits,) = model(ids, return_dict=False)
    assert torch.equal(logits, output.logits)


def test_no_gradients_and_no_state():
    model, ids = load("tiny"), ids_of("tiny")
    logits = model(ids).logits
    assert not logits.requires_grad and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, logits)
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")


def test_from_pretrained_takes_the_dtype_of_the_config_and_keeps_the_expert_bias_in_float32():
    for name, dtype in (("tiny", torch.float32), ("bf16", torch.bfloat16), ("moe256", torch.bfloat16)):
        model = LLaDA2Model.from_pretrained(GOLDEN / name, progress=False)
        biases = [v.dtype for k, v in model.named_parameters() if k.endswith("expert_bias")]
        assert model.dtype == dtype and set(biases) == {torch.float32}
        pad = model.config.pad_token_id
        assert model.special_ids == {"eos_token_id": (pad,), "pad_token_id": pad}


@pytest.mark.parametrize("name", ["variant", "group", "block22"])
def test_save_pretrained_round_trip(name, tmp_path):
    model, ids = load(name), ids_of(name)
    model.save_pretrained(tmp_path)
    again = LLaDA2Model.from_pretrained(tmp_path, progress=False)
    assert again.config == ModelConfig.from_hf(tmp_path)
    assert torch.equal(again(ids, block_length=8).logits, model(ids, block_length=8).logits)
