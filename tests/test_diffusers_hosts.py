"""Our parts inside diffusers' own LLaDA2Pipeline, and its callbacks inside ours: the real package, 0.38 to 0.42.1.

What 0.38 lacks is not used here: attention_mask, block_length for set_timesteps, a tail that is not attended to. That
the rules are the same wherever they are meant to be is test_diffusers_parity.py's part.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import llada2_fast
from llada2_fast import BlockRefinementScheduler, LLaDA2Model, demo
from llada2_fast.demo import tasks
from llada2_fast.demo.tokenizer import render
from llada2_fast.weights.special_tokens import load_tokenizer

diffusers = pytest.importorskip("diffusers", minversion="0.38")
callbacks = pytest.importorskip("diffusers.callbacks")

ROOT = Path(__file__).parent.parent
SUM = "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943."
PROMPTS = [prompt for task in tasks.TASKS for prompt in tasks.sample(task, 1, tasks.SEED)]
LENGTH = 16  # the embedded model's blocks; the default of diffusers is LLaDA2's 32
CALL = {"gen_length": 64, "block_length": LENGTH, "threshold": 0.9, "editing_threshold": None}


@pytest.fixture(scope="module")
def model():
    return LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


def pipeline(package, model, scheduler, tokenizer=None):
    """scheduler: an instance, or the package whose it is."""
    if scheduler in (llada2_fast, diffusers):
        scheduler = scheduler.BlockRefinementScheduler(block_length=LENGTH)
    pipe = package.LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("home", [llada2_fast, diffusers], ids=lambda package: package.__name__)
def test_our_model_answers_in_their_pipeline(model, tokenizer, home):
    """As it is, no adapter; with our scheduler and with theirs."""
    ours = pipeline(llada2_fast, model, llada2_fast, tokenizer)
    theirs = pipeline(diffusers, model, home, tokenizer)
    assert theirs.model is model and theirs.device == model.device and theirs.dtype == model.dtype
    texts = [theirs(prompt=prompt, **CALL).texts[0] for prompt in PROMPTS]
    assert texts == [ours(prompt=prompt, **CALL).texts[0] for prompt in PROMPTS]
    assert all(map(tasks.check, tasks.TASKS, PROMPTS, texts))


@pytest.mark.parametrize("block_length", [16, 32])
def test_their_two_dimensional_mask_is_anded_with_block_causal(model, block_length, monkeypatch):
    """Tokens of the block-causal model come out only if it is; their blocks have to be the model's, which are the
    checkpoint's unless `block_length` is set."""
    monkeypatch.setattr(model, "block_length", block_length)
    calls = []
    hook = model.register_forward_hook(lambda _, args, kwargs, out: calls.append((args, kwargs)), with_kwargs=True)
    ids = torch.randint(300, (1, 45), generator=torch.Generator().manual_seed(5))
    call = {
        "input_ids": ids, "gen_length": 51, "block_length": block_length, "num_inference_steps": 6, "threshold": 0.6,
        "editing_threshold": None, "mask_token_id": 1, "output_type": "seq",
    }  # fmt: skip
    scheduler = BlockRefinementScheduler(block_length=block_length)
    theirs = pipeline(diffusers, model, scheduler)(**call).sequences
    hook.remove()
    assert torch.equal(theirs, pipeline(llada2_fast, model, scheduler)(**call).sequences)
    for (window,), kwargs in calls:
        assert kwargs["attention_mask"].shape == kwargs["position_ids"].shape == window.shape
        assert kwargs["attention_mask"].all()
    (window,), kwargs = calls[-1]
    assert window.shape == (1, 96)
    bidirectional = torch.ones(1, 1, 96, 96, dtype=torch.bool)
    assert not torch.equal(model(window, attention_mask=bidirectional).logits, model(window, **kwargs).logits)


def test_several_padded_prompts_in_their_pipeline(model):
    """Padded on the left, so that answers follow their prompts. From 0.42 on their mask leaves the padding out."""
    tokenizer = load_tokenizer(demo.path())
    tokenizer.padding_side = "left"
    pipe = pipeline(diffusers, model, llada2_fast, tokenizer)
    chats = [render([{"role": "user", "content": text}]) for text in ("Spell 7.", "Add 847 and 96.")]
    texts = pipe(prompt=chats, use_chat_template=False, **CALL).texts
    assert texts == ["7 is seven", SUM]


def test_draws_in_their_pipeline_follow_the_generator(model, tokenizer):
    pipe = pipeline(diffusers, model, llada2_fast, tokenizer)

    def draw(seed):
        sampling = {**CALL, "temperature": 2.0, "top_p": 0.99, "threshold": 0.3, "eos_early_stop": False}
        return pipe(prompt="Tell a story.", generator=torch.Generator().manual_seed(seed), **sampling).sequences

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_models_of_transformers_auto_classes():
    """The example of diffusers' own documentation, which names no device here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.path(), trust_remote_code=True, dtype=torch.bfloat16)
    assert isinstance(model, LLaDA2Model)
    pipe = pipeline(diffusers, model, llada2_fast, AutoTokenizer.from_pretrained(demo.path()))
    assert pipe(prompt="Add 847 and 96.", **CALL).texts == [SUM]


def model_of(name):
    from transformers import AutoModelForCausalLM

    cls = AutoModelForCausalLM if name == "LLaDA2MoeModelLM" else LLaDA2Model
    return cls.from_pretrained(demo.path(), dtype=torch.float32, progress=False)


@pytest.mark.parametrize("name", ["LLaDA2Model", "LLaDA2MoeModelLM"])
@pytest.mark.parametrize("package", [diffusers, llada2_fast], ids=lambda package: package.__name__)
def test_saved_by_either_pipeline_and_loaded_by_both(tokenizer, tmp_path, package, name):
    scheduler = BlockRefinementScheduler(block_length=LENGTH, threshold=0.875)
    pipe = pipeline(package, model_of(name), scheduler, tokenizer)
    pipe.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="1MB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["model"] == ["llada2_fast", name]
    assert index["scheduler"] == ["llada2_fast", "BlockRefinementScheduler"]
    for loader in (diffusers.LLaDA2Pipeline, diffusers.DiffusionPipeline, llada2_fast.LLaDA2Pipeline):
        again = loader.from_pretrained(tmp_path, torch_dtype=torch.float32, tokenizer=tokenizer)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.model, LLaDA2Model) and type(again.scheduler) is BlockRefinementScheduler
        assert again.scheduler.config == scheduler.config
        assert again(prompt="Add 847 and 96.", **CALL).texts == [SUM]
        if package is llada2_fast:  # theirs lists the tokenizer, and cannot load it without being given one
            found = loader.from_pretrained(tmp_path).tokenizer
            assert (found is not None) == (loader is llada2_fast.LLaDA2Pipeline)


@pytest.mark.parametrize(
    "first", ["import diffusers, llada2_fast", pytest.param("import llada2_fast, diffusers", marks=pytest.mark.slow)]
)
def test_a_saved_pipeline_in_another_process(model, tmp_path, first):
    pipeline(diffusers, model, llada2_fast).save_pretrained(tmp_path)
    code = f"{first}; pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r})"
    code += "; print(type(pipe.model).__module__, type(pipe.scheduler).__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["llada2_fast.model", "llada2_fast.adapters.diffusers.scheduler"], done.stderr


def test_our_scheduler_says_so_if_its_blocks_are_not_the_models(model, tokenizer):
    wide = pipeline(diffusers, model, BlockRefinementScheduler(block_length=32), tokenizer)
    with pytest.warns(UserWarning, match="a block of 32 to a model of 16"):
        wide(prompt="Spell 7.", **CALL | {"block_length": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wide(prompt="Spell 7.", **CALL).texts == ["7 is seven"]


def test_their_pipeline_moves_our_model(tokenizer):
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    pipe = pipeline(diffusers, model, llada2_fast, tokenizer).to(torch.bfloat16)
    assert pipe.dtype == model.dtype == torch.bfloat16
    assert pipe(prompt="Spell 7.", **CALL).texts == ["7 is seven"]


# their callbacks in our pipeline


def test_a_callback_of_theirs_gets_every_tensor_they_name(model, tokenizer):
    """Every tensor that any of these versions of diffusers offers: 0.38's x0, x0_p and confidence, 0.42's
    editing_transfer_index, sampled_tokens and sampled_probs."""
    names = list(diffusers.LLaDA2Pipeline._callback_tensor_inputs)
    steps = []

    class Watch(callbacks.PipelineCallback):
        tensor_inputs = names

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == names
            steps.append({name: tuple(tensor.shape) for name, tensor in callback_kwargs.items()})
            return callback_kwargs

    pipe = pipeline(llada2_fast, model, llada2_fast, tokenizer)
    watched = pipe(prompt="Spell 7.", callback_on_step_end=Watch(), **CALL).texts
    assert watched == pipe(prompt="Spell 7.", **CALL).texts == ["7 is seven"]
    assert steps and all(shape == (1, LENGTH) for step in steps for name, shape in step.items() if name != "block_x")


def test_image_callbacks_are_refused_by_both(model, tokenizer):
    """They ask for prompt_embeds, which no text pipeline has."""
    for package in (llada2_fast, diffusers):
        pipe = pipeline(package, model, llada2_fast, tokenizer)
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs.*prompt_embeds"):
            pipe(prompt="Spell 7.", callback_on_step_end=callbacks.SDCFGCutoffCallback(0.5), **CALL)
