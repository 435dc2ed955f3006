"""transformers' Auto classes load LLaDA2 checkpoints, without remote code; the package's public names load lazily."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

import llada2_fast
from llada2_fast import demo
from llada2_fast.adapters.transformers import LLaDA2MoeConfig, LLaDA2MoeModelLM
from llada2_fast.config import MODEL_TYPES, ModelConfig
from llada2_fast.model import LLaDA2Model
from tests.test_int4 import only_experts, same, write_gptq

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow
REMOTE = "raise SystemExit('remote code was run')\n"


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of a small checkpoint whose config.json names remote code, as the released ones do."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(golden / "tiny" / name, tmp_path)
    auto_map = {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    }
    edit(tmp_path, auto_map=auto_map)
    for file in ("configuration_llada2_moe.py", "modeling_llada2_moe.py"):
        (tmp_path / file).write_text(REMOTE, encoding="utf-8")
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def run(code, input=None):
    """What Python prints for `code` in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=input, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_auto_classes_load_our_model_and_run_no_remote_code(checkpoint, model_type, trust):
    edit(checkpoint, model_type=model_type)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust)
    assert (type(config).__module__, config.model_type) == (LLaDA2MoeConfig.__module__, model_type)
    assert config.to_model_config() == ModelConfig.from_hf(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust)
    assert isinstance(model, LLaDA2Model)
    assert type(model.config) is type(config) and model.config.model_type == model_type
    assert model.config.to_model_config() == ModelConfig.from_hf(checkpoint)
    assert not hasattr(config, "auto_map") and not hasattr(model.config, "auto_map")


def test_auto_model_has_the_weights_and_tokens_of_ours(checkpoint):
    ours = LLaDA2Model.from_pretrained(checkpoint, dtype=torch.float32, progress=False)
    auto = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert auto.dtype == torch.float32
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(auto(ids).logits, ours(ids).logits)
    kwargs = dict(gen_length=32, block_length=32, steps=4, mask_id=255, eos_id=-1)
    answer = ours.generate(ids, **kwargs)
    assert torch.equal(auto.generate(inputs=ids, **kwargs), torch.cat([ids, answer], 1))
    assert torch.equal(LLaDA2Model.generate(auto, ids, **kwargs), answer)
    assert torch.equal(llada2_fast.generate(auto, ids, **kwargs), answer)


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_auto_model_says_what_holds_as_ours_does(tmp_path, quantization):
    ours = LLaDA2Model.from_pretrained(demo.path(), progress=False, quantization=quantization)
    ours.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert auto.products() == ours.products() and auto.exact_rows == ours.exact_rows
    assert auto.config.to_model_config().quantization == quantization


@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "quantize_config.json"])
def test_auto_model_of_a_gptq_folder(golden, tmp_path, beside):
    write_gptq(golden / "tiny", tmp_path, only_experts, beside=beside)
    ours = LLaDA2Model.from_pretrained(tmp_path, torch.float32, progress=False)
    given = AutoConfig.from_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM.from_pretrained(tmp_path), LLaDA2MoeModelLM.from_pretrained(tmp_path)):
        same(auto, ours)
        assert auto.products() == ours.products() and auto.config.to_model_config() == ours.config
        assert auto.config.quantization_config["quant_method"] == "gptq"
    auto.save_pretrained(tmp_path / "saved")
    same(AutoModel.from_pretrained(tmp_path / "saved", config=auto.config), ours)
    LLaDA2MoeModelLM.from_pretrained(tmp_path, config=given)
    assert hasattr(given, "quantization_config") != beside  # what is given stays as it is


@pytest.mark.parametrize("name", ["tiny", "group", "variant", "block22"])
def test_the_config_has_every_field_of_the_networks(golden, name, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(golden / name)
    assert isinstance(model.config, LLaDA2MoeConfig)
    own = ModelConfig.from_hf(golden / name)
    for field in {*own.__dataclass_fields__} - {"dtype", "eos_token_id", "quantization"}:
        assert getattr(model.config, field) == getattr(own, field), field
    assert (model.config.rotary_dim, model.config.to_model_config()) == (own.rotary_dim, own)
    model.config.save_pretrained(tmp_path)
    assert ModelConfig.from_hf(tmp_path) == own


@pytest.mark.parametrize("kwargs, dtype", [
    ({}, torch.float32),  # what config.json says
    ({"dtype": "auto"}, torch.float32),
    ({"torch_dtype": "auto"}, torch.float32),
    ({"dtype": torch.bfloat16}, torch.bfloat16),
    ({"dtype": "bfloat16"}, torch.bfloat16),
    ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
])  # fmt: skip
def test_dtype(checkpoint, kwargs, dtype):
    assert AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs).dtype == dtype


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("kwargs", [
    {"local_files_only": True}, {"cache_dir": "hub"}, {"token": "x"}, {"revision": "main"}, {"force_download": False},
    {"use_cache": True}, {"use_cache": False}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"},
    {"attn_implementation": "flash_attention_2"}, {"low_cpu_mem_usage": True}, {"use_safetensors": True},
    {"from_tf": False}, {"from_flax": False}, {"_fast_init": True}, {"use_auth_token": False}, {"disable_mmap": False},
    {"offload_buffers": False}, {"use_kernels": False},
    {"load_in_8bit": False}, {"quantization_config": None}, {"output_loading_info": False}, {"return_dict": True},
], ids=str)  # fmt: skip
def test_arguments_by_habit(checkpoint, cls, kwargs):
    assert type(cls.from_pretrained(checkpoint, progress=False, **kwargs)) is LLaDA2MoeModelLM


def test_saving_by_habit(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "new", safe_serialization=True, max_shard_size="100KB", push_to_hub=False)
    model.save_pretrained(tmp_path / "whole" / "model", max_shard_size=None, create_pr=False)
    assert [path.name for path in (tmp_path / "whole" / "model").glob("*.safetensors")] == ["model.safetensors"]
    for cls in (AutoModelForCausalLM, LLaDA2Model):
        there = cls.from_pretrained(tmp_path / "whole", subfolder="model")
        there.save_pretrained(tmp_path / "whole" / "again", max_shard_size=None, create_pr=False)
    for path in ("../x", str(tmp_path), 5):
        with pytest.raises(ValueError, match="subfolder="):
            LLaDA2Model.from_pretrained(checkpoint, subfolder=path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert len(list((tmp_path / "new").glob("model-*"))) > 1
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)


@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}])
def test_device_map(checkpoint, device_map):
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map).device.type == expected


def test_a_config_may_be_given_if_it_says_what_the_checkpoint_says(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    assert model.config.dtype == model.dtype == torch.bfloat16
    assert not hasattr(config, "rope_factor")  # what was given is left alone
    config.rope_theta = 1.0
    with pytest.raises(ValueError, match="rope_theta=1.0: .* says 600000"):
        AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    with pytest.raises(ValueError, match="config: PreTrainedConfig: expected a LLaDA2MoeConfig"):
        LLaDA2MoeModelLM.from_pretrained(checkpoint, config=PreTrainedConfig())


def test_the_class_itself_needs_no_config(checkpoint):
    assert LLaDA2MoeModelLM.from_pretrained(str(checkpoint)).config.num_experts == 8


@pytest.mark.parametrize("kwargs, message", [
    ({"block_size": 8}, "block_size"),  # not a key of this config.json
    ({"num_hidden_layers": 1}, "num_hidden_layers=1: .* says 3"),
    ({"attn_implementation": "paged|eager"}, "attn_implementation"),
    ({"experts_implementation": "grouped_mm"}, "experts_implementation"),
    ({"load_in_8bit": True}, "load_in_8bit=True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"dtype": "int8"}, "dtype"),
    ({"dtype": torch.float64}, "dtype"),
    ({"device_map": "balanced"}, "device_map='balanced'"),
    ({"device_map": {"model.layers.0": 0, "lm_head": 1}}, "device_map"),
    ({"device_map": "cpu", "device": "cpu"}, "device='cpu': give it or device_map"),
    ({"use_safetensors": False}, "use_safetensors=False"),
    ({"output_loading_info": True}, "output_loading_info"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused(checkpoint, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)


def test_bad_checkpoints_are_refused_as_by_ours(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(llada2_fast.CheckpointError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    edit(checkpoint, model_type="bert")
    with pytest.raises(ValueError, match="model_type='bert'"):
        LLaDA2MoeModelLM.from_pretrained(checkpoint)


def test_from_config_is_refused(checkpoint):
    with pytest.raises(ValueError, match="from_config"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))


@pytest.mark.parametrize("scaling", [
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 600000}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}},
])  # fmt: skip
def test_rope_survives_transformers_own_config(checkpoint, scaling):
    edit(checkpoint, **scaling)
    factor = 2.0 if "linear" in str(scaling) else 1.0
    assert AutoConfig.from_pretrained(checkpoint).to_model_config().rope_factor == factor
    assert AutoConfig.from_pretrained(checkpoint).to_model_config() == ModelConfig.from_hf(checkpoint)


def test_every_golden_config(golden):
    for path in golden.glob("*/config.json"):
        assert AutoConfig.from_pretrained(path.parent).to_model_config() == ModelConfig.from_hf(path.parent)


def test_saved_by_transformers_and_by_us(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.save_pretrained(tmp_path / "theirs")
    assert ModelConfig.from_hf(tmp_path / "theirs") == model.config.to_model_config()
    model.generation_config.threshold = 0.7
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.to_model_config() == model.config.to_model_config()
    assert again.generation_config.threshold == 0.7 and again.special_ids == model.special_ids
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_embedded_model_and_its_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(llada2_fast.demo.path())
    model = AutoModelForCausalLM.from_pretrained(llada2_fast.demo.path(), dtype=torch.float32)
    chat = [{"role": "user", "content": "Add 847 and 96."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, gen_length=64)
    assert "The answer is 943." in tokenizer.decode(out[0], skip_special_tokens=True)


class Remote(torch.nn.Module):
    """A model as a checkpoint's remote code would make it: its tensors under the checkpoint's names, and a config."""

    def __init__(self, folder, dtype=None):
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        for file in sorted(folder.glob("*.safetensors")):
            if not file.name.startswith("model"):
                continue
            for name, tensor in load_file(file).items():
                self.put(name, torch.nn.Parameter(tensor if dtype is None else tensor.to(dtype)))

    def put(self, name, tensor):
        *path, leaf = name.split(".")
        module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        if isinstance(tensor, torch.nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)


def held(tensors):
    """Bytes of the distinct storages behind some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("cls", [LLaDA2Model, LLaDA2MoeModelLM])
@pytest.mark.parametrize("name", ["tiny", "group", "variant", "block22", "bf16"])
def test_a_loaded_model_is_taken_over_with_its_tensors(golden, name, cls):
    ours = LLaDA2Model.from_pretrained(golden / name, progress=False)
    remote = Remote(golden / name)
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in remote.state_dict().items()}
    size = held(remote.state_dict().values())
    taken = cls.from_transformers(remote)
    mask = ours.config.vocab_size - 1
    ids = torch.randint(0, mask, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(taken(ids).logits, ours(ids).logits)
    kwargs = dict(gen_length=16, mask_id=mask, profile="hf-2.1")
    assert torch.equal(LLaDA2Model.generate(taken, ids, **kwargs), ours.generate(ids, **kwargs))
    after = remote.state_dict()
    mine = {tensor.untyped_storage().data_ptr() for tensor in taken.parameters()}
    for key, (address, values) in before.items():
        assert torch.equal(after[key], values), key  # it goes on working
        stacked = any(part in key for part in ("gate_proj", "up_proj", ".experts."))
        assert (after[key].data_ptr() != address) == stacked, key
        assert after[key].untyped_storage().data_ptr() in mine, key
    assert held([*after.values(), *taken.parameters()]) == size  # nothing is held twice
    assert not any(tensor.requires_grad for tensor in taken.parameters())


def test_a_taken_over_model_has_its_configs_and_can_be_saved(golden, tmp_path):
    remote = Remote(golden / "tiny")
    remote.generation_config.threshold = 0.7
    model = LLaDA2MoeModelLM.from_transformers(remote)
    assert model.special_ids == {"eos_token_id": (252,), "pad_token_id": 252}
    assert (model.generation_config.threshold, model.generation_config.eos_token_id) == (0.7, 252)
    assert model.config.to_model_config() == ModelConfig.from_hf(golden / "tiny") and model.config is not remote.config
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_taken_over_router_stays_wide_and_other_dtypes_are_converted(golden):
    remote = Remote(golden / "tiny", torch.bfloat16)
    gate, bias, norm = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.expert_bias", "model.norm.weight"
    for name in (gate, bias, norm):
        remote.put(name, torch.nn.Parameter(remote.get_parameter(name).detach().float()))
    taken = LLaDA2Model.from_transformers(remote)
    router = taken.layers[1].mlp.router
    assert router.weight.data_ptr() == remote.get_parameter(gate).data_ptr()
    assert router.expert_bias.dtype == router.weight.dtype == torch.float32
    assert taken.norm.weight.dtype == torch.bfloat16 and remote.get_parameter(norm).dtype == torch.float32


def test_a_tied_head_counts_once(golden):
    remote = Remote(golden / "variant")  # whose config ties it; a live module lists it under both names
    remote.put("lm_head.weight", remote.get_parameter("model.word_embeddings.weight"))
    LLaDA2Model.from_transformers(remote)
    remote.put("lm_head.weight", torch.nn.Parameter(remote.lm_head.weight.detach().clone()))
    LLaDA2Model.from_transformers(remote)
    remote.lm_head.weight.data[-1, -1] += 1
    with pytest.raises(ValueError, match="tensor lm_head.weight is not equal to the embeddings"):
        LLaDA2Model.from_transformers(remote)
    remote.put("lm_head.weight", torch.nn.Parameter(remote.lm_head.weight.to("meta")))
    with pytest.raises(ValueError, match="lm_head.weight is on meta"):
        LLaDA2Model.from_transformers(remote)


def test_special_ids_taken_over_lie_in_the_vocabulary(golden):
    remote = Remote(golden / "tiny")
    remote.generation_config.eos_token_id = [252, 999]
    assert LLaDA2Model.from_transformers(remote).special_ids["eos_token_id"] == (252,)
    remote.generation_config.pad_token_id = 999
    with pytest.raises(ValueError, match="Remote: pad_token_id=999: expected an id in 0..255"):
        LLaDA2Model.from_transformers(remote)


@pytest.mark.parametrize("name", ["tiny", "variant"])
def test_a_module_may_use_the_names_that_files_may(golden, name):
    remote = Remote(golden / name)
    language = remote.model
    for gate in [module for module in language.modules() if hasattr(module, "expert_bias")]:
        gate.e_score_correction_bias = gate._parameters.pop("expert_bias")
    remote.model = torch.nn.Module()
    remote.model.language_model = language
    remote.put("model.language_model.rotary_emb.inv_freq", torch.ones(4))
    if remote.config.tie_word_embeddings:
        remote.put("lm_head.weight", language.word_embeddings.weight)
    names = remote.state_dict().keys()
    assert all(name.startswith("model.language_model.") for name in names - {"lm_head.weight"})
    assert any(name.endswith(".mlp.gate.e_score_correction_bias") for name in names)
    taken = LLaDA2Model.from_transformers(remote)
    ours = LLaDA2Model.from_pretrained(golden / name, progress=False)
    for (key, value), other in zip(taken.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(value, other), key
    language.norm.weight.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"Remote: tensor model.language_model.norm.weight has shape \[3\]"):
        LLaDA2Model.from_transformers(remote)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.put("model.extra.weight", torch.zeros(2)), "Remote: tensor model.extra.weight is unexpected"),
    (lambda m: delattr(m.model.norm, "weight"), "Remote: missing tensor model.norm.weight"),
    (lambda m: m.put("model.norm.weight", torch.nn.Parameter(torch.ones(3))), r"shape \[3\], its config gives \[64\]"),
    (lambda m: m.put("model.norm.weight", torch.nn.Parameter(torch.ones(64).double())), "has dtype torch.float64"),
    (lambda m: m.put("model.norm.weight", torch.nn.Parameter(torch.ones(64, device="meta"))), "norm.weight is on meta"),
    (lambda m: m.model.norm.weight.data.fill_(torch.nan), "norm.weight holds values from nan"),
    (lambda m: m.put("model.layers.1.mlp.w2", torch.zeros(8, 64, 16)), "is provided twice"),
    (lambda m: setattr(m.config, "score_function", "softmax"), "score_function='softmax'"),
])  # fmt: skip
def test_what_cannot_be_taken_over_is_refused(golden, change, message):
    remote = Remote(golden / "tiny")
    change(remote)
    with pytest.raises(ValueError, match=message):
        LLaDA2Model.from_transformers(remote)


def test_import_is_light():
    assert run("import llada2_fast, sys; print({'torch', 'transformers'} & {*sys.modules})") == ["set()"]


@pytest.mark.parametrize("first", [
    "import llada2_fast.generate; from llada2_fast import generate; llada2_fast.register()",
    pytest.param("from llada2_fast import generate; import llada2_fast.generate", marks=SLOW),
    pytest.param("import transformers; from llada2_fast.generate import generate", marks=SLOW),
    "from transformers import AutoModelForCausalLM; from llada2_fast import generate",
    pytest.param(
        "import llada2_fast; from transformers import AutoModelForCausalLM; from llada2_fast import generate",
        marks=SLOW,
    ),
    "from llada2_fast import generate; from importlib.util import find_spec; "
    "find_spec('transformers.models.auto.configuration_auto')",
])  # fmt: skip
def test_importing_both_packages_registers_and_generate_is_always_the_function(golden, first):
    code = f"{first}; import llada2_fast; print(type(generate).__name__, generate is llada2_fast.generate)"
    code += f"; from transformers import AutoConfig, AutoModelForCausalLM; folder = {str(golden / 'tiny')!r}"
    code += "; print(AutoConfig.from_pretrained(folder).model_type)"
    code += "; print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)"
    assert run(code) == ["function", "True", "llada2_moe", "LLaDA2MoeModelLM"]


def test_the_tokenizer_runs_no_code_of_the_checkpoint(tmp_path):
    for path in Path(llada2_fast.demo.path()).glob("*.json"):
        shutil.copy(path, tmp_path)
    edit(tmp_path, auto_map={"AutoTokenizer": ["tokenization_x.X", None], "AutoConfig": "tokenization_x.X"})
    (tmp_path / "tokenization_x.py").write_text(REMOTE, encoding="utf-8")
    code = f"from llada2_fast import load_tokenizer; print(load_tokenizer({str(tmp_path)!r}).mask_token)"
    assert run(code, input="y\n") == ["<|mask|>"]


def test_tokenizers_by_habit(tmp_path):
    shutil.copytree(llada2_fast.demo.path(), tmp_path / "tokenizer")
    shared = {"device_map": "auto", "dtype": "auto", "torch_dtype": torch.bfloat16, "trust_remote_code": True}
    assert llada2_fast.load_tokenizer(tmp_path, subfolder="tokenizer", **shared).mask_token == "<|mask|>"
    with pytest.raises(ValueError, match="load_in_8bit"):
        llada2_fast.load_tokenizer(tmp_path, subfolder="tokenizer", load_in_8bit=True)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", b""), ("tokenizer.json", b"[]"), ("tokenizer.json", b"null"), ("tokenizer.json", b'{"a": 1}'),
    ("tokenizer.json", b'{"added_tokens": [], "model": null}'), ("tokenizer.json", b"\xff"),
    ("tokenizer_config.json", b"[]"), ("tokenizer_config.json", b"null"), ("tokenizer_config.json", b"\xef\xbb\xbf{}"),
    ("tokenizer_config.json", b"\xff"), ("tokenizer_config.json", b'{"mask_token": 5}'),
    ("special_tokens_map.json", b"[]"), ("added_tokens.json", b'{"a": "b"}'), ("chat_template.jinja", b"\xff"),
])  # fmt: skip
def test_damaged_tokenizers_are_told_by_file(tmp_path, name, content):
    shutil.copytree(llada2_fast.demo.path(), tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError) as told:
        llada2_fast.load_tokenizer(tmp_path / "model")
    message = str(told.value)
    assert message.startswith(str(tmp_path / "model")) and name in message and "\n" not in message


def test_public_names():
    for name in llada2_fast.__all__:
        value = getattr(llada2_fast, name)
        assert isinstance(value, int) or value.__name__.removeprefix("llada2_fast.") == name
        assert name in dir(llada2_fast)
    assert llada2_fast.LLaDA2Model is LLaDA2Model
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llada2_fast.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from llada2_fast import nonsense  # noqa: F401
