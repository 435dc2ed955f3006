"""ModelConfig and DecodeParams: what is accepted, what is normalised, and one clear error for everything else."""

import dataclasses
import json

import numpy as np
import pytest

from llada2_fast.config import ENTROPY_BOUND, DecodeParams, EngineConfig, ModelConfig, habits
from llada2_fast.decoding.rules import row_rule

SETS = ["tiny", "group", "variant", "flat", "moe256", "bf16", "block22"]
NAN, INF = float("nan"), float("inf")


def raw(golden, name="tiny"):
    return json.loads((golden / name / "config.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_golden_configs_round_trip(golden, name):
    config = ModelConfig.from_hf(golden / name)
    assert config == ModelConfig.from_hf(raw(golden, name)) == ModelConfig.from_hf(golden / name / "config.json")
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert {key: value for key, value in config.to_hf().items() if key in raw(golden, name)}.items() >= {
        (key, raw(golden, name)[key]) for key in ("model_type", "hidden_size", "rotary_dim", "rope_theta", "use_bias")
    }


def test_absent_keys_take_the_class_defaults():
    config = ModelConfig.from_hf({"model_type": "llada2_moe", "moe_intermediate_size": 64})
    assert config.use_qk_norm is True and config.use_bias is True and config.use_qkv_bias is False
    assert (config.head_dim, config.num_key_value_heads, config.rotary_dim) == (64, 16, 32)
    assert (config.block_size, config.expert_capacity, config.pad_token_id, config.dtype) == (32, None, None, None)
    assert (config.rope_theta, config.rms_norm_eps, config.routed_scaling_factor) == (1e4, 1e-5, 2.5)


@pytest.mark.parametrize(
    "change, field, value",
    [
        ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"num_key_value_heads": 0}, "num_key_value_heads", 4),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"head_dim": None, "rotary_dim": None}, "head_dim", 16),
        ({"num_shared_experts": None}, "num_shared_experts", 0),
        ({"block_size": None}, "block_size", 32),
        ({"model_type": "llada21_moe"}, "vocab_size", 256),
        ({"model_type": "llada2_moe_veomni"}, "vocab_size", 256),
        ({"eos_token_id": 3}, "eos_token_id", (3,)),
        ({"eos_token_id": [3, 156892]}, "eos_token_id", (3,)),
        ({"eos_token_id": 156892}, "eos_token_id", None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_factor", 4.0),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_factor", 1.0),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 600000}}, "rope_factor", 2.0),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary_dim", 8),
        ({"a_key_of_tomorrow": {"x": [1]}}, "hidden_size", 64),
        ({"expert_capacity": 4, "n_group": 3, "topk_group": 7}, "expert_capacity", 4),  # block routing has no groups
    ],
)
def test_accepted(golden, change, field, value):
    base = raw(golden)
    if "dtype" in change or "torch_dtype" in change:
        del base["torch_dtype"]
    config = ModelConfig.from_hf({**base, **change})
    assert getattr(config, field) == value
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_rope_parameters_alone(golden):
    base = {k: v for k, v in raw(golden).items() if k not in ("rope_theta", "partial_rotary_factor", "rotary_dim")}
    parameters = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}
    config = ModelConfig.from_hf({**base, "rope_parameters": parameters})
    assert (config.rope_theta, config.rotary_dim) == (5e5, 4)


BAD = [
    {"model_type": "llama"},
    {"model_type": None},
    {"architectures": ["LlamaForCausalLM"]},
    {"architectures": "LLaDA2MoeModelLM"},
    {"vocab_size": 0},
    {"vocab_size": 256.0},
    {"vocab_size": "256"},
    {"hidden_size": -64},
    {"num_hidden_layers": None},
    {"num_hidden_layers": True},
    {"num_hidden_layers": 2**31},
    {"max_position_embeddings": 0},
    {"block_size": 0},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5, "head_dim": None, "num_key_value_heads": 5},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": False},
    {"head_dim": 0},
    {"head_dim": 2.5},
    {"partial_rotary_factor": 0.2, "rotary_dim": None},
    {"partial_rotary_factor": 1.5},
    {"partial_rotary_factor": 0.0},
    {"partial_rotary_factor": None},
    {"rotary_dim": 16},
    {"rope_theta": 0},
    {"rope_theta": INF},
    {"rope_theta": 10**400},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 0}},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": "linear"},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 1e4}},
    {"rope_parameters": [1]},
    {"rms_norm_eps": NAN},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": 0.0},
    {"routed_scaling_factor": INF},
    {"routed_scaling_factor": True},
    {"num_experts": 0},
    {"num_experts": 10},
    {"n_group": 8},  # groups of one expert
    {"n_group": 3},
    {"n_group": None},
    {"topk_group": 5},
    {"num_experts_per_tok": 5},
    {"num_experts_per_tok": 0},
    {"num_shared_experts": -1},
    {"expert_capacity": 1},
    {"expert_capacity": 9},
    {"expert_capacity": 0},
    {"intermediate_size": None},
    {"moe_intermediate_size": None},
    {"moe_intermediate_size": 0},
    {"first_k_dense_replace": 4},
    {"first_k_dense_replace": -1},
    {"use_qk_norm": 1},
    {"use_qkv_bias": None},
    {"use_bias": "false"},
    {"tie_word_embeddings": 0},
    {"hidden_act": "gelu"},
    {"hidden_act": None},
    {"score_function": "softmax"},
    {"norm_topk_prob": False},
    {"norm_topk_prob": 1},
    {"moe_router_enable_expert_bias": False},
    {"router_dtype": "bf16"},
    {"use_sliding_window": True},
    {"using_split_qkv_in_self_attention": True},
    {"norm_head": True},
    {"quantization_config": {"quant_method": "fp8"}},
    {"pad_token_id": 256},
    {"pad_token_id": -1},
    {"mask_token_id": 300},
    {"mask_token_id": "[MASK]"},
    {"delete_token_id": 156930},
    {"split_token_id": 156931},
    {"eos_token_id": "eos"},
    {"eos_token_id": [1.0]},
    {"dtype": "int8", "torch_dtype": None},
    {"dtype": 16, "torch_dtype": None},
    {"dtype": "bfloat16"},  # beside torch_dtype float32
]


@pytest.mark.parametrize("change", BAD, ids=lambda change: json.dumps(change)[:60])
def test_bad_configs_are_refused(golden, tmp_path, change):
    key = next(iter(change))
    with pytest.raises(ValueError, match="=.*: expected |=.* contradicts ") as error:
        ModelConfig.from_hf({**raw(golden), **change})
    assert key in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({**raw(golden), **change}))
    with pytest.raises(ValueError, match=r"config\.json: "):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"model_type": "llada2_moe", "vocab_size": 256, "vocab_size": 512}', "duplicate key 'vocab_size'"),
        ('{"model_type": "llada2_moe", "rope_scaling": {"type": "linear", "type": "yarn"}}', "duplicate key 'type'"),
        ('{"model_type": "llada2_moe", "rms_norm_eps": NaN}', "NaN"),
        ('{"model_type": "llada2_moe", "rope_theta": -Infinity}', "-Infinity"),
        ('{"model_type": "llada2_moe", "rope_theta": 1e999}', "rope_theta=inf"),
        ('{"model_type": "llada2_moe"', "not valid JSON"),
        ('["llada2_moe"]', "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(tmp_path)
    assert message in str(error.value) and "config.json" in str(error.value)


def test_undecodable_and_missing_config_files(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)


def test_model_config_is_frozen(golden):
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.from_hf(golden / "tiny").hidden_size = 1


def test_decode_defaults_are_the_cards_with_editing_off():
    assert dataclasses.asdict(DecodeParams()) == {
        "gen_length": 2048, "block_length": None, "steps": 32, "temperature": 0.0, "top_k": None, "top_p": None,
        "sampling_method": "auto", "threshold": 0.95, "editing_threshold": None, "max_post_steps": 16,
        "minimal_topk": 1, "num_to_transfer": 1, "eos_early_stop": False, "eos_ids": None, "mask_id": None,
        "pad_id": None, "seed": None, "attend_tail": True, "profile": "default", "regex": None, "json_schema": None,
        "choices": None, "edit_window": 0, "policy": "threshold", "entropy_bound": None, "entropy_decay": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, field, value",
    [
        ({"top_k": 0}, "top_k", None),
        ({"top_k": 5}, "top_k", 5),
        ({"top_p": 1}, "top_p", None),
        ({"top_p": 7.5}, "top_p", None),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"eos_ids": 7}, "eos_ids", (7,)),
        ({"eos_ids": [7, 156892]}, "eos_ids", (7, 156892)),
        ({"eos_ids": ()}, "eos_ids", ()),
        ({"threshold": 2}, "threshold", 2.0),
        ({"threshold": INF}, "threshold", INF),
        ({"threshold": 1e39}, "threshold", INF),
        ({"threshold": 10**30}, "threshold", 1e30),
        ({"threshold": 10**400}, "threshold", INF),
        ({"editing_threshold": 3.5e38}, "editing_threshold", INF),
        ({"temperature": 3.4e38}, "temperature", 3.4e38),
        ({"temperature": 1e-50}, "temperature", float(np.finfo(np.float32).tiny)),
        ({"top_p": 1e-60}, "top_p", 1e-60),
        ({"editing_threshold": 0}, "editing_threshold", 0.0),
        ({"profile": "hf-2.1"}, "editing_threshold", 0.9),
        ({"profile": "hf-2.1", "editing_threshold": 0.0}, "editing_threshold", 0.0),
        ({"profile": "hf-2.1", "num_to_transfer": 3}, "num_to_transfer", 3),
        ({"profile": "sglang-joint", "edit_window": 2}, "edit_window", 2),
        ({"editing_threshold": 0.0, "edit_window": np.int64(3)}, "edit_window", 3),
        ({"policy": "entropy"}, "entropy_bound", None),
        ({"policy": "entropy", "entropy_bound": 0.1}, "entropy_bound", 0.1),
        ({"policy": "entropy", "entropy_bound": 0}, "entropy_bound", 0.0),
        ({"policy": "entropy", "entropy_bound": 10**400}, "entropy_bound", INF),
        ({"policy": "entropy", "entropy_bound": np.int64(2)}, "entropy_bound", 2.0),
        ({"policy": "entropy", "entropy_decay": np.float64(0.7)}, "entropy_decay", 0.7),
        ({"policy": "entropy", "entropy_decay": 1e-60}, "entropy_decay", float(np.finfo(np.float32).tiny)),
        ({"policy": "entropy", "entropy_decay": 1}, "entropy_decay", 1.0),
        ({"policy": "entropy", "editing_threshold": 0.5, "edit_window": 1, "temperature": 0.7}, "policy", "entropy"),
        ({"policy": "self_speculative", "temperature": 0.7, "sampling_method": "greedy"}, "temperature", 0.7),
        ({"profile": "hf-2.0", "minimal_topk": 2}, "editing_threshold", None),
        ({"seed": -(2**63)}, "seed", -(2**63)),
        ({"gen_length": np.int64(5)}, "gen_length", 5),
        ({"temperature": np.float32(0.5)}, "temperature", 0.5),
    ],
)
def test_decode_params_are_normalised(given, field, value):
    params = DecodeParams(**given)
    assert getattr(params, field) == value and type(getattr(params, field)) is type(value)


def test_a_bound_that_is_not_given_is_that_of_the_policy_alone():
    for policy in ("entropy", "self_speculative"):
        params = DecodeParams(policy=policy)
        assert row_rule(params, 8).entropy_bound == ENTROPY_BOUND == 0.3
        assert dataclasses.replace(params, policy="threshold") == DecodeParams()
    assert row_rule(DecodeParams(policy="entropy", entropy_bound=0.0), 8).entropy_bound == 0.0


BAD_PARAMS = [
    *({name: value} for name in ("gen_length", "steps", "minimal_topk", "num_to_transfer", "block_length")
      for value in (0, -1, 1.0, True, NAN, "8", 2**31)),
    *({name: None} for name in ("gen_length", "steps", "temperature", "threshold", "max_post_steps", "minimal_topk")),
    *({name: value} for name in ("temperature", "threshold", "editing_threshold")
      for value in (-0.1, NAN, -INF, True, "0.5")),
    *({"temperature": value} for value in (INF, 3.5e38, 1e39, 10**39, 10**400)),
    *({name: 2**31} for name in ("top_k", "max_post_steps", "mask_id", "pad_id")),
    *({"top_p": value} for value in (0, -0.5, NAN, False, "0.9")),
    *({"top_k": value} for value in (-1, 2.0, True, NAN)),
    *({"max_post_steps": value} for value in (-1, 0.5, False, NAN)),
    {"sampling_method": "beam"},
    {"sampling_method": None},
    {"profile": "hf-2.2"},
    {"profile": ["default"]},
    *({"edit_window": value} for value in (-1, 1.0, True, None, 2**31)),
    {"edit_window": 1},
    *({"edit_window": 1, "editing_threshold": 0.5, "profile": name} for name in ("hf-2.1", "diffusers")),
    *({"edit_window": 2, "profile": name} for name in ("hf-2.0", "sglang-lowconf")),
    *({"edit_window": 1, "editing_threshold": 0.5} | form for form in ({"regex": "a"}, {"choices": ["a", "b"]},
                                                                       {"json_schema": {"type": "null"}})),
    *({"policy": value} for value in ("credit", "", None, True, ["entropy"])),
    *({"policy": policy, "profile": name} for policy in ("entropy", "self_speculative")
      for name in ("hf-2.0", "hf-2.1", "sglang-lowconf", "sglang-joint", "sglang-indel", "diffusers")),
    *({"policy": policy} | form for policy in ("entropy", "self_speculative")
      for form in ({"regex": "a"}, {"choices": ["a", "b"]}, {"json_schema": {"type": "null"}})),
    {"policy": "self_speculative", "temperature": 0.7},
    {"policy": "self_speculative", "temperature": 0.7, "sampling_method": "multinomial", "seed": 1},
    *({"policy": "self_speculative", "editing_threshold": value} for value in (0.0, 2.0)),
    *({"entropy_bound": value, "policy": "entropy"} for value in (-0.1, NAN, -INF, True, "0.5")),
    *({"entropy_decay": value, "policy": "entropy"} for value in (0, -0.5, 1.01, NAN, INF, None, True, "1")),
    *({"entropy_bound": value} for value in (0.3, 0)),
    {"entropy_bound": 0.3, "profile": "hf-2.1"},
    {"entropy_decay": 0.5},
    {"num_to_transfer": 2},
    {"num_to_transfer": 2, "profile": "hf-2.0"},
    {"editing_threshold": 0.9, "profile": "hf-2.0"},
    {"attend_tail": False, "profile": "hf-2.1"},
    {"attend_tail": 1},
    {"eos_early_stop": None},
    {"eos_ids": "2"},
    {"eos_ids": (True,)},
    {"eos_ids": [1.5]},
    {"mask_id": -1},
    {"mask_id": True},
    {"pad_id": 0.0},
    {"seed": 2**63},
    {"seed": 1.0},
    {"seed": True},
]  # fmt: skip


@pytest.mark.parametrize("given", BAD_PARAMS, ids=str)
def test_bad_decode_params_are_refused(given):
    name = next(iter(given))
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected "):
        DecodeParams(**given)


def test_sizes_of_shards_are_bytes_or_have_a_unit():
    sizes = {"1KB": 10**3, "2 MB": 2 * 10**6, "5GB": 5 * 10**9, "1TB": 10**12, "1KiB": 2**10, "500mib": 500 * 2**20}
    sizes |= {"3GiB": 3 * 2**30, "1TiB": 2**40, 7: 7, None: 5 * 10**9}
    assert {size: habits.shard_bytes(size) for size in sizes} == sizes


def test_older_names_of_engine_settings():
    with pytest.warns(DeprecationWarning, match="max_num_seqs"):
        old = EngineConfig(max_running=3, share_prefixes=False, prefill_tokens=64)
    assert old == EngineConfig(max_num_seqs=3, enable_prefix_caching=False, max_num_batched_tokens=64)
    with pytest.raises(ValueError, match="max_running=3: expected max_num_seqs alone"):
        EngineConfig(max_running=3, max_num_seqs=3)
