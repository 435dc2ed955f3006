"""transformers' Auto classes load LLaDA2 checkpoints, without remote code; the package's public names load lazily."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import llada2_fast
from llada2_fast.adapters.transformers import LLaDA2MoeConfig, LLaDA2MoeModelLM
from llada2_fast.config import MODEL_TYPES, ModelConfig
from llada2_fast.model import LLaDA2Model

ROOT = Path(__file__).parent.parent
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
    assert model.config == ModelConfig.from_hf(checkpoint)
    assert (model.hf_config.model_type, model.hf_config.hidden_size) == (model_type, model.config.hidden_size)
    assert not hasattr(config, "auto_map") and not hasattr(model.hf_config, "auto_map")


def test_auto_model_has_the_weights_and_tokens_of_ours(checkpoint):
    ours = LLaDA2Model.from_pretrained(checkpoint, dtype=torch.float32, progress=False)
    auto = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert auto.dtype == torch.float32
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(auto(ids).logits, ours(ids).logits)
    kwargs = dict(gen_length=32, block_length=32, steps=4, mask_id=255, eos_id=-1)
    assert torch.equal(auto.generate(inputs=ids, **kwargs), ours.generate(ids, **kwargs))


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


@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}])
def test_device_map(checkpoint, device_map):
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map).device.type == expected


def test_a_config_may_be_given_if_it_says_what_the_checkpoint_says(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    assert model.hf_config is config and model.dtype == torch.bfloat16
    config.rope_theta = 1.0
    with pytest.raises(ValueError, match="rope_theta=1.0: .* says 600000"):
        AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    with pytest.raises(ValueError, match="config: PreTrainedConfig: expected a LLaDA2MoeConfig"):
        LLaDA2MoeModelLM.from_pretrained(checkpoint, config=PreTrainedConfig())


def test_the_class_itself_needs_no_config(checkpoint):
    assert LLaDA2MoeModelLM.from_pretrained(str(checkpoint)).hf_config.num_experts == 8


@pytest.mark.parametrize("kwargs, message", [
    ({"block_size": 8}, "block_size"),  # not a key of this config.json
    ({"num_hidden_layers": 1}, "num_hidden_layers=1: .* says 3"),
    ({"attn_implementation": "eager"}, "attn_implementation"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"cache_dir": "somewhere"}, "cache_dir"),
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
    model.hf_config.save_pretrained(tmp_path / "theirs")
    assert ModelConfig.from_hf(tmp_path / "theirs") == model.config
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert replace(again.config, dtype=None) == replace(model.config, dtype=None)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_embedded_model_and_its_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(llada2_fast.demo.path())
    model = AutoModelForCausalLM.from_pretrained(llada2_fast.demo.path(), dtype=torch.float32)
    chat = [{"role": "user", "content": "Add 847 and 96."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, gen_length=64, eos_early_stop=True)
    assert "The answer is 943." in tokenizer.decode(out[0], skip_special_tokens=True)


def test_import_is_light():
    assert run("import llada2_fast, sys; print({'torch', 'transformers'} & {*sys.modules})") == ["set()"]


@pytest.mark.parametrize("first", [
    "import llada2_fast.generate; from llada2_fast import generate; llada2_fast.register()",
    "from llada2_fast import generate; import llada2_fast.generate",
    "import transformers; from llada2_fast.generate import generate",
    "from transformers import AutoModelForCausalLM; from llada2_fast import generate",
    "import llada2_fast; from transformers import AutoModelForCausalLM; from llada2_fast import generate",
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
    code = f"from llada2_fast.tokens import load_tokenizer; print(load_tokenizer({str(tmp_path)!r}).mask_token)"
    assert run(code, input="y\n") == ["<|mask|>"]


def test_public_names():
    for name in llada2_fast.__all__:
        assert getattr(llada2_fast, name).__name__.removeprefix("llada2_fast.") == name
        assert name in dir(llada2_fast)
    assert llada2_fast.LLaDA2Model is LLaDA2Model
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llada2_fast.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from llada2_fast import nonsense  # noqa: F401
