"""Against the real diffusers package: same scheduler, same pipeline, same interface, wherever its rules are ours.

They are not where (README): several positions tie; the mask token is the best candidate; minimal_topk exceeds the
schedule; a row shares its batch with others; attention is not block-causal; the block has a tail; EOS ids or mask ids
stand in the prompt; post-mask editing goes on after a block that used its whole schedule; steps exceed gen_length.
"""

import inspect
from dataclasses import fields

import pytest
import torch

import llada2_fast
from llada2_fast import BlockRefinementScheduler, LLaDA2Model, LLaDA2Pipeline

diffusers = pytest.importorskip("diffusers", minversion="0.42.1")

MASK = 255


@pytest.fixture(scope="module")
def model(golden):
    """The golden network `tiny`, but with the mask's row of its LM head turned away from every hidden state seen here:
    diffusers would take the mask for a candidate."""
    network = LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)
    ids = torch.randint(250, (1, 64), generator=torch.Generator().manual_seed(3))
    ids[:, 40:] = MASK
    hidden = network(ids, output_hidden_states=True).hidden_states[-1][0]
    network.lm_head.weight[MASK] = -hidden.mean(0)
    return network


class BlockCausal(torch.nn.Module):
    """Our network for diffusers' pipeline: makes of its 2D mask the block-causal one the model was trained with."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, network, block_length):
        super().__init__()
        self.network, self.block_length = network, block_length

    def forward(self, input_ids, attention_mask, position_ids):
        return self.network(input_ids, position_ids, self.block_length, attention_mask)


class Bidirectional(BlockCausal):
    """The same without blocks: a model that is no LLaDA2."""

    def forward(self, input_ids, attention_mask, position_ids):
        size = input_ids.shape[1]
        seen = attention_mask.bool()[:, None, None, :].expand(-1, 1, size, size)
        return self.network(input_ids, position_ids, attention_mask=seen | torch.eye(size, dtype=torch.bool))


def both(model, block_length):
    """(our pipeline with its cache, theirs with the adapter)."""
    ours = LLaDA2Pipeline(model, BlockRefinementScheduler())
    theirs = diffusers.LLaDA2Pipeline(
        model=BlockCausal(model, block_length), scheduler=diffusers.BlockRefinementScheduler()
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


# interface


def parameters(function):
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def test_call_has_diffusers_arguments_in_their_order_with_their_defaults():
    *ours, canvas = parameters(LLaDA2Pipeline.__call__)
    assert ours == parameters(diffusers.LLaDA2Pipeline.__call__)
    assert len(ours) == 26  # self and 25
    assert canvas == ("canvas", None, inspect.Parameter.KEYWORD_ONLY)  # our own


@pytest.mark.parametrize("name", ["__init__", "check_inputs", "_prepare_input_ids", "set_progress_bar_config"])
def test_pipeline_methods_have_diffusers_arguments(name):
    assert parameters(getattr(LLaDA2Pipeline, name)) == parameters(getattr(diffusers.LLaDA2Pipeline, name))


@pytest.mark.parametrize(
    "name",
    [
        "__init__", "set_timesteps", "get_num_transfer_tokens", "step", "check_eos_finished",
        "check_block_should_continue", "add_noise", "_top_p_filtering", "_top_k_filtering", "_sample_from_logits",
    ],
)  # fmt: skip
def test_scheduler_methods_have_diffusers_arguments(name):
    theirs = diffusers.BlockRefinementScheduler
    assert parameters(getattr(BlockRefinementScheduler, name)) == parameters(getattr(theirs, name))


def test_attributes_and_outputs():
    ours, theirs = BlockRefinementScheduler(), diffusers.BlockRefinementScheduler()
    assert {name for name in vars(theirs) if name != "_internal_dict"} <= set(dir(ours))
    assert {name for name in theirs.config if not name.startswith("_")} == set(ours.config)
    assert ours.order == theirs.order and ours.config_name == theirs.config_name
    outputs = [
        (llada2_fast.BlockRefinementSchedulerOutput, diffusers.BlockRefinementSchedulerOutput),
        (llada2_fast.LLaDA2PipelineOutput, diffusers.pipelines.llada2.LLaDA2PipelineOutput),
    ]
    for mine, original in outputs:
        assert [(f.name, f.default) for f in fields(mine)] == [(f.name, f.default) for f in fields(original)]
    assert {*diffusers.LLaDA2Pipeline._callback_tensor_inputs} == {*LLaDA2Pipeline._callback_tensor_inputs} - {
        "x0", "x0_p", "confidence",
    }  # fmt: skip


BAD_CALLS = [
    {"input_ids": None},
    {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
    {"input_ids": None, "prompt": "a"},
    {"input_ids": torch.zeros(1, 1, 3, dtype=torch.int64)},
    {"input_ids": torch.zeros(1, 3)},
    {"gen_length": 0},
    {"block_length": 0},
    {"num_inference_steps": 0},
    {"minimal_topk": 0},
    {"threshold": -0.5},
    {"sampling_method": "beam"},
    {"output_type": "latent"},
    {"mask_token_id": None},
    {"attention_mask": torch.ones(2, 3, dtype=torch.int64)},
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: ",".join(bad))
def test_errors_read_alike(model, bad):
    texts = []
    for pipe in both(model, 8):
        call = {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "mask_token_id": MASK, "gen_length": 5, **bad}
        with pytest.raises(ValueError) as error:
            pipe(**call)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_steps_is_unknown_to_both(model):
    for pipe in both(model, 8):
        with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
            pipe(steps=4)


def test_config_files_are_shared(tmp_path):
    settings = {"block_length": 16, "threshold": 0.7, "editing_threshold": 0.5, "minimal_topk": 2}
    BlockRefinementScheduler(**settings).save_config(tmp_path / "ours")
    diffusers.BlockRefinementScheduler(**settings).save_config(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for loaded in (
            BlockRefinementScheduler.from_pretrained(tmp_path / folder),
            diffusers.BlockRefinementScheduler.from_pretrained(tmp_path / folder),
        ):
            assert {name: loaded.config[name] for name in settings} == settings
    ours = BlockRefinementScheduler.from_config(diffusers.BlockRefinementScheduler(**settings).config)
    theirs = diffusers.BlockRefinementScheduler.from_config(BlockRefinementScheduler(**settings).config)
    assert ours.config.threshold == theirs.config.threshold == 0.7


# the scheduler


def random_state(generator):
    """Sample, logits and arguments of a step, without ties and with the mask far from being a candidate."""

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows, length, vocab = integer(1, 5), integer(1, 24), integer(4, 60)
    mask = integer(0, vocab)
    sample = torch.randint(vocab, (rows, length), generator=generator)
    sample[torch.rand(rows, length, generator=generator) < float(torch.rand((), generator=generator))] = mask
    logits = torch.randn(rows, length, vocab, generator=generator) * integer(1, 9)
    logits[..., mask] = -1e4
    prompt = torch.arange(length) < integer(0, length + 1)
    prompt &= (sample != mask).all(0)  # a literal mask in a prompt is filled by them, kept by us
    steps = integer(1, length + 1)  # so that each step's schedule is at least 1
    kwargs = {
        "timestep": integer(0, steps + 2),
        "threshold": [0.3, 0.7, 0.95, 2.0][integer(0, 4)],
        "editing_threshold": [None, 0.0, -1.0, 0.2, 0.6][integer(0, 5)],
        "prompt_mask": [None, prompt][integer(0, 2)],
        "mask_token_id": mask,
    }
    return logits, sample, steps, kwargs


def test_steps_are_the_same_on_thousands_of_states():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = BlockRefinementScheduler(), diffusers.BlockRefinementScheduler()
    commits = edits = 0
    for _ in range(2000):
        logits, sample, steps, kwargs = random_state(generator)
        outputs = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps, block_length=sample.shape[1])
            outputs.append(scheduler.step(logits, sample=sample, **kwargs))
        for name in ("prev_sample", "transfer_index", "editing_transfer_index", "sampled_tokens"):
            assert torch.equal(outputs[0][name], outputs[1][name]), name
        torch.testing.assert_close(outputs[0].sampled_probs, outputs[1].sampled_probs)
        assert list(outputs[0]) == list(outputs[1]) and outputs[0].pred_logits is outputs[1].pred_logits
        commits += int(outputs[0].transfer_index.sum())
        edits += int(outputs[0].editing_transfer_index.sum())
    assert commits > 8000 and edits > 1000


def test_uniform_steps_are_the_same():
    generator = torch.Generator().manual_seed(0)
    for case in range(100):
        rows, length, vocab, steps = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 20, 40, 12))
        settings = {"threshold": [0.5, 0.9, 2.0][case % 3], "editing_threshold": [None, 0.4][case % 2]}
        ours, theirs = BlockRefinementScheduler(**settings), diffusers.BlockRefinementScheduler(**settings)
        sample = torch.randint(vocab, (rows, length), generator=generator)
        temperature = float(case % 4 == 0)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps, block_length=length)
        for t in range(steps):
            logits = torch.randn(rows, length, vocab, generator=generator) * 4
            outputs = [
                scheduler.step(
                    logits, t, sample, temperature=temperature, top_p=0.9, generator=torch.Generator().manual_seed(case)
                )
                for scheduler in (ours, theirs)
            ]
            for name in ("prev_sample", "transfer_index", "editing_transfer_index", "sampled_tokens"):
                assert torch.equal(outputs[0][name], outputs[1][name]), name
            assert torch.equal(ours._committed, theirs._committed)
            sample = outputs[0].prev_sample
        assert ours._committed.all()


def test_filters_and_draws_are_the_same():
    generator = torch.Generator().manual_seed(0)
    theirs = diffusers.BlockRefinementScheduler
    for _ in range(200):
        logits = torch.randn(3, 17, generator=generator) * 3
        k = int(torch.randint(-1, 20, (), generator=generator))
        p = float(torch.rand((), generator=generator)) * 1.1 + 1e-3
        assert torch.equal(BlockRefinementScheduler._top_k_filtering(logits, k), theirs._top_k_filtering(logits, k))
        assert torch.equal(BlockRefinementScheduler._top_p_filtering(logits, p), theirs._top_p_filtering(logits, p))
        drawn = [
            cls._sample_from_logits(
                logits, temperature=0.7, top_k=k, top_p=p, generator=torch.Generator().manual_seed(k),
                use_multinomial=True,
            )
            for cls in (BlockRefinementScheduler, theirs)
        ]  # fmt: skip
        assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_noise_is_the_same():
    clean = torch.arange(60).view(3, 20)
    valid = (torch.arange(20) < torch.tensor([[20], [13], [5]])).long()
    noisy = [
        scheduler.add_noise(
            clean, valid, prompt_length=3, block_length=8, mask_token_id=99, generator=torch.Generator().manual_seed(1)
        )
        for scheduler in (BlockRefinementScheduler(), diffusers.BlockRefinementScheduler())
    ]
    for ours, theirs in zip(*noisy, strict=True):
        assert torch.equal(ours, theirs)


def test_continue_and_schedule_are_the_same():
    ours, theirs = BlockRefinementScheduler(), diffusers.BlockRefinementScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7, block_length=24)
    assert torch.equal(ours._transfer_schedule, theirs._transfer_schedule)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for case in range(64):
        masks, editing, edits, done = (bool(case >> bit & 1) for bit in range(4))
        for step_idx, post_steps in ((6, 2), (7, 3), (8, 4)):
            answers = [
                scheduler.check_block_should_continue(
                    step_idx=step_idx, masks_remaining=masks, editing_enabled=editing,
                    editing_transfer_index=torch.full((2, 3), edits), post_steps=post_steps, max_post_steps=3,
                    finished=torch.tensor([True, done]),
                )
                for scheduler in (ours, theirs)
            ]  # fmt: skip
            assert answers[0] == answers[1]


# the pipelines

PIPELINE_CASES = [
    (length, steps, threshold)
    for length, steps in ((1, 1), (4, 4), (8, 3), (8, 8), (16, 5), (32, 32))
    for threshold in (0.3, 0.7, 2.0)
]


@pytest.mark.parametrize("length, steps, threshold", PIPELINE_CASES)
def test_same_tokens_where_the_rules_are_the_same(model, length, steps, threshold):
    """One row, no EOS, no tail, no editing, the mask never the best candidate."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(250, (1, 11), generator=generator)
    gen_length = -(-(11 + 32) // length) * length - 11
    sequences = [
        pipe(
            input_ids=prompt, gen_length=gen_length, block_length=length, num_inference_steps=steps,
            threshold=threshold, editing_threshold=None, mask_token_id=MASK, output_type="seq",
        ).sequences
        for pipe in both(model, length)
    ]  # fmt: skip
    assert torch.equal(*sequences)
    assert len(sequences[0].unique()) > 2


@pytest.mark.parametrize("steps, threshold", [(3, 0.5), (8, 2.0)])
def test_same_tokens_from_other_models(model, steps, threshold):
    """Several rows, padded, given to both pipelines as they are; still no tail, EOS or editing."""
    ids = torch.randint(250, (3, 9), generator=torch.Generator().manual_seed(steps))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, 6:] = 0
    sequences = []
    for package in (llada2_fast, diffusers):
        pipe = package.LLaDA2Pipeline(Bidirectional(model, None), package.BlockRefinementScheduler())
        pipe.set_progress_bar_config(disable=True)
        output = pipe(
            input_ids=ids, attention_mask=mask, gen_length=31, block_length=8, num_inference_steps=steps,
            threshold=threshold, editing_threshold=None, mask_token_id=MASK, output_type="seq",
        )  # fmt: skip
        sequences.append(output.sequences)
    assert torch.equal(*sequences)


@pytest.mark.parametrize("editing_threshold", [None, 0.4])
def test_our_scheduler_in_their_pipeline(model, editing_threshold):
    sequences = []
    for scheduler in (BlockRefinementScheduler(), diffusers.BlockRefinementScheduler()):
        pipe = diffusers.LLaDA2Pipeline(model=BlockCausal(model, 8), scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.scheduler is scheduler
        output = pipe(
            input_ids=torch.tensor([[5, 6, 7], [100, 120, 140]]), gen_length=29, block_length=8, num_inference_steps=6,
            threshold=0.6, editing_threshold=editing_threshold, mask_token_id=MASK, eos_token_id=252, output_type="seq",
        )  # fmt: skip
        sequences.append(output.sequences)
    assert torch.equal(*sequences)


def test_their_scheduler_in_our_pipeline(model):
    sequences = []
    for scheduler in (BlockRefinementScheduler(block_length=8), diffusers.BlockRefinementScheduler(block_length=8)):
        pipe = LLaDA2Pipeline(model, scheduler)
        pipe.set_progress_bar_config(disable=True)
        output = pipe(input_ids=torch.tensor([5, 6, 7]), gen_length=20, mask_token_id=MASK, output_type="seq")
        assert len(scheduler._transfer_schedule) == 32
        sequences.append(output.sequences)
    assert torch.equal(*sequences)


def test_pipeline_callbacks(model):
    class Watch(diffusers.callbacks.PipelineCallback):
        tensor_inputs = ["block_x", "transfer_index"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append((self.config.cutoff_step_ratio, step_index, timestep, list(callback_kwargs)))
            return callback_kwargs

    class Write(Watch):
        tensor_inputs = ["block_x"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            block_x = callback_kwargs["block_x"].clone()
            block_x[0, 3] = 42
            return {**callback_kwargs, "block_x": block_x}

    outputs = []
    for pipe in both(model, 8):
        seen = []
        callback = diffusers.callbacks.MultiPipelineCallbacks([Watch(0.5), Write()])
        output = pipe(
            input_ids=torch.tensor([[5, 6, 7]]), gen_length=13, block_length=8, num_inference_steps=4, threshold=2.0,
            editing_threshold=None, mask_token_id=MASK, output_type="seq", callback_on_step_end=callback,
        )  # fmt: skip
        outputs.append((seen, output.sequences))
        single = pipe(
            input_ids=torch.tensor([[5, 6, 7]]), gen_length=13, block_length=8, mask_token_id=MASK, output_type="seq",
            callback_on_step_end=Watch(1.0),
        )  # fmt: skip
        assert single.sequences.shape == (1, 13)
    (calls, ours), (_, theirs) = outputs
    assert ours[0, 0] == 42 and torch.equal(ours, theirs)
    watched = [made for made in calls if made[0] == 0.5]
    assert [made[1] for made in watched] == list(range(len(watched)))
    assert [made[2] for made in watched] == [0, 1, 2, 0, 1, 2, 3]  # the callback filled one mask of the first block
    assert all(made[3] == ["block_x", "transfer_index"] for made in watched)
