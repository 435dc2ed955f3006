"""A share of the heads or of the experts: loaded as the slices of whole tensors, computed like any other layer."""

import dataclasses

import pytest
import torch

from llada2_fast.config import ModelConfig
from llada2_fast.kernels.attention import Span, masked_attention
from llada2_fast.kernels.fp8 import FP8
from llada2_fast.kernels.gemm import SCALE_GROUP
from llada2_fast.kernels.rope import Angles
from llada2_fast.model import LLaDA2Model, block_causal_mask
from llada2_fast.weights import checkpoint
from llada2_fast.weights.checkpoint import CheckpointError
from llada2_fast.weights.shapes import WHOLE, Share, parameter_shapes
from tests.test_checkpoint import merged, poke, prefused, rewrite, same_bytes

SHARES = [
    ("tiny", Share(experts=range(2, 6))),
    ("tiny", Share(kv_heads=range(0, 1))),
    ("group", Share(range(1, 2), range(15, 16))),
    ("variant", Share(range(1, 3), range(0, 5))),  # biases, a query head for each KV head
    ("flat", Share(range(0, 1), range(0, 8))),  # everything, spelled out
]
WIDE = ModelConfig(  # heads that are whole fp8 groups
    vocab_size=64, hidden_size=192, num_hidden_layers=2, intermediate_size=96, moe_intermediate_size=160,
    first_k_dense_replace=1, num_attention_heads=6, num_key_value_heads=3, head_dim=SCALE_GROUP, num_experts=4,
    n_group=1, topk_group=1, num_shared_experts=1, dtype="float32",
)  # fmt: skip


def load(folder, share=WHOLE, quantization=None):
    config = dataclasses.replace(ModelConfig.from_hf(folder), quantization=quantization)
    model = LLaDA2Model(config, share=share)
    checkpoint.load(folder, config, dict(model.named_parameters()), progress=False, share=share)
    return model


def tensors(model):
    """Its parameters, fp8 values as bytes."""
    return {name: x.data.view(torch.uint8) if x.dtype == FP8 else x.data for name, x in model.named_parameters()}


def slices(model, share):
    """The parameters of a whole network cut by hand to what a share holds: whole heads, whole experts."""
    c = model.config
    nq, nk = c.num_attention_heads, c.num_key_value_heads
    kv_heads = list(share.kv_heads or range(nk))
    heads = [head for head in range(nq) if head // (nq // nk) in kv_heads]
    rows = [*heads, *(nq + head for head in kv_heads), *(nq + nk + head for head in kv_heads)]

    def cut(name, x):
        size = 1 if name.endswith("scale") else c.head_dim
        if ".experts." in name:
            return x[list(share.experts or range(c.num_experts))]
        if ".query_key_value." in name:
            return x.unflatten(0, (-1, size))[rows].flatten(0, 1)
        if ".dense." in name and not name.endswith("bias"):
            return x.unflatten(1, (-1, size))[:, heads].flatten(1)
        return x

    return {name: cut(name, x) for name, x in tensors(model).items()}


@pytest.mark.parametrize("layout", [dict, merged, prefused])
@pytest.mark.parametrize("name, share", SHARES)
def test_a_share_is_loaded_as_slices(golden, tmp_path, name, share, layout):
    rewrite(golden / name, tmp_path, layout)
    part = load(tmp_path, share)
    assert parameter_shapes(part.config, share) == {key: tuple(x.shape) for key, x in part.named_parameters()}
    same_bytes(tensors(part), slices(load(golden / name), share))


@pytest.mark.parametrize("stored, layout", [("fp8", dict), (None, dict), (None, merged), (None, prefused)])
def test_a_share_in_fp8_has_the_scales_of_the_whole(tmp_path, stored, layout):
    """Read as fp8, and made fp8 while it is read."""
    params = dict(LLaDA2Model(WIDE).named_parameters())
    for x in params.values():
        x.data.normal_()
    checkpoint.save(tmp_path / "wide", WIDE, params)
    whole = load(tmp_path / "wide", quantization="fp8")
    if stored:
        whole.save_pretrained(tmp_path / "wide")
    rewrite(tmp_path / "wide", tmp_path / "given", layout)
    for share in (Share(range(1, 3)), Share(experts=range(1, 3)), Share(range(0, 1), range(3, 4))):
        same_bytes(tensors(load(tmp_path / "given", share, "fp8")), slices(whole, share))


def test_shares_of_the_heads_add_up_to_the_layer(golden):
    """Each is a layer like any other, of fewer heads."""
    whole = load(golden / "group")
    shares = [load(golden / "group", Share(kv_heads=range(head, head + 1))) for head in range(2)]
    x = torch.randn(16, whole.config.hidden_size)
    angles = Angles(*whole._angles(torch.arange(16)))
    mask = block_causal_mask(16, 8)[None, None]

    def attend(q, k, v):
        return masked_attention(q[None], k[None], v[None], mask)[0]

    wanted, *parts = (model.layers[1].attention(x, angles, attend) for model in (whole, *shares))
    torch.testing.assert_close(sum(parts), wanted, atol=5e-5, rtol=0)
    assert all((part - wanted).abs().max() > 1e-2 for part in parts)


def test_a_share_of_the_heads_has_pages_of_its_own(golden):
    model, length = load(golden / "group", Share(kv_heads=range(1, 2))), 8
    ids = torch.randint(model.config.vocab_size, (1, 24))
    cache = model.new_cache(4, length)
    assert cache.k.shape == cache.v.shape == (4, 4, length, 1, model.config.head_dim)
    hidden = model.forward_blocks(ids[0], torch.arange(24), [Span((2, 0, 3), 0, 3, 24)], cache)
    torch.testing.assert_close(model.lm_logits(hidden), model(ids, block_length=length).logits[0], atol=5e-5, rtol=0)


def test_a_share_of_the_experts_does_not_answer_for_all(golden):
    model = load(golden / "tiny", Share(experts=range(2, 6)))
    with pytest.raises(AssertionError, match="experts that others hold"):
        model(torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("share, message", [
    (Share(kv_heads=range(0, 3)), r"kv_heads=range\(0, 3\): expected a range within 0\.\.1"),
    (Share(kv_heads=range(1, 1)), r"kv_heads=range\(1, 1\)"),
    (Share(experts=range(-1, 2)), r"experts=range\(-1, 2\): expected a range within 0\.\.7"),
    (Share(experts=range(0, 8, 2)), r"experts=range\(0, 8, 2\)"),
])  # fmt: skip
def test_shares_that_there_are_not_are_refused(golden, share, message):
    config = ModelConfig.from_hf(golden / "tiny")
    for make in (LLaDA2Model, lambda config, share: checkpoint.inspect(golden / "tiny", config, share)):
        with pytest.raises(ValueError, match=message):
            make(config, share=share)


def test_heads_that_share_scales_are_not_cut(golden):
    config = dataclasses.replace(ModelConfig.from_hf(golden / "tiny"), quantization="fp8")
    with pytest.raises(ValueError, match="heads of 16 share scales"):
        parameter_shapes(config, Share(kv_heads=range(0, 1)))


@pytest.mark.parametrize("layout", [dict, merged])
def test_nothing_is_read_of_other_shares(golden, tmp_path, layout):
    """A value there that would be refused is not seen."""
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    rewrite(golden / "tiny", tmp_path, lambda tensors: layout(poke(float("nan"), name)(tensors)))
    load(tmp_path, Share(experts=range(2, 6)))
    with pytest.raises(CheckpointError, match="holds values from nan"):
        load(tmp_path, Share(experts=range(4, 8)))


def test_a_broken_tensor_of_another_share_is_refused(golden, tmp_path):
    """What is not read is looked at all the same, as far as headers tell."""
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    rewrite(golden / "tiny", tmp_path, lambda tensors: {**tensors, name: tensors[name][:, :-1].contiguous()})
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path, Share(experts=range(2, 6)))
