"""BlockRefinementScheduler: settings, schedule, the mask-mode and uniform-mode steps, the questions a loop asks."""

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from fractions import Fraction

import pytest
import torch

from llada2_fast import BlockRefinementScheduler, BlockRefinementSchedulerOutput

MASK = 31
VOCAB = 32


def logits_of(rows):
    """[[(token, logit), ...], ...] -> logits [R, L, VOCAB], zero elsewhere."""
    logits = torch.zeros(len(rows), len(rows[0]), VOCAB)
    for r, row in enumerate(rows):
        for i, (token, value) in enumerate(row):
            logits[r, i, token] = value
    return logits


def scheduler(steps=None, length=None, **config):
    made = BlockRefinementScheduler(**config)
    if steps is not None:
        made.set_timesteps(steps, block_length=length)
    return made


def falling(length, high=10.0):
    """Confidence falls from left to right; position i predicts token i."""
    return logits_of([[(i, high - i) for i in range(length)]])


def masks(length, rows=1):
    return torch.full((rows, length), MASK)


# settings


def test_defaults_and_config_access():
    config = BlockRefinementScheduler().config
    assert dict(config) == {
        "block_length": 32, "num_inference_steps": 32, "threshold": 0.95, "editing_threshold": None, "minimal_topk": 1,
    }  # fmt: skip
    assert config.block_length == config["block_length"] == 32
    with pytest.raises(AttributeError, match="gen_length"):
        _ = config.gen_length


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(threshold=0.1),
        lambda c: c.__setitem__("threshold", 0.1),
        lambda c: setattr(c, "threshold", 0.1),
        lambda c: c.pop("threshold"),
        lambda c: c.__delitem__("threshold"),
    ],
)
def test_config_is_read_only(change):
    config = BlockRefinementScheduler().config
    with pytest.raises(TypeError, match="register_to_config"):
        change(config)
    assert config.threshold == 0.95


def test_register_to_config_replaces_settings():
    made = scheduler(threshold=0.5)
    made.register_to_config(threshold=0.9)
    assert made.config.threshold == 0.9 and made.config.block_length == 32
    with pytest.raises(ValueError, match="`block_length` must be > 0, got 0"):
        made.register_to_config(block_length=0)
    assert made.config.block_length == 32


def test_config_files(tmp_path):
    made = scheduler(block_length=64, threshold=0.8, editing_threshold=0.5, minimal_topk=2)
    made.save_config(tmp_path / "a")
    made.save_pretrained(tmp_path / "b" / "scheduler")
    raw = json.loads((tmp_path / "a" / "scheduler_config.json").read_text())
    assert raw == {"_class_name": "BlockRefinementScheduler", **made.config}
    assert dict(BlockRefinementScheduler.from_pretrained(tmp_path / "a").config) == dict(made.config)
    loaded = BlockRefinementScheduler.from_pretrained(tmp_path / "b", subfolder="scheduler", threshold=0.1)
    assert loaded.config.threshold == 0.1 and loaded.config.minimal_topk == 2
    assert BlockRefinementScheduler.load_config(tmp_path / "a") == raw
    with pytest.raises(OSError, match="scheduler_config.json"):
        BlockRefinementScheduler.from_pretrained(tmp_path)
    (tmp_path / "a" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json"):
        BlockRefinementScheduler.from_pretrained(tmp_path / "a")


def test_arguments_by_habit(tmp_path):
    scheduler(block_length=64).save_pretrained(tmp_path / "scheduler")
    habits = {
        "local_files_only": True, "cache_dir": "hub", "token": "x", "revision": "main", "force_download": False,
        "torch_dtype": torch.bfloat16, "dtype": "auto", "device_map": {"": 0}, "trust_remote_code": True,
        "low_cpu_mem_usage": True, "use_safetensors": True, "return_unused_kwargs": False, "variant": None,
    }  # fmt: skip
    loaded = BlockRefinementScheduler.from_pretrained(tmp_path, subfolder="scheduler", threshold=0.5, **habits)
    assert (loaded.config.block_length, loaded.config.threshold) == (64, 0.5)
    for name, value in (("beta_end", 1), ("return_unused_kwargs", True), ("variant", "fp16"), ("subfolder", "../x")):
        with pytest.raises(ValueError, match=name):
            BlockRefinementScheduler.from_pretrained(**{"pretrained_model_name_or_path": tmp_path, name: value})
    with pytest.raises(ValueError, match="none: no such folder"):
        BlockRefinementScheduler.from_pretrained(tmp_path, subfolder="none")


def test_from_config():
    made = scheduler(block_length=16, threshold=0.7)
    again = BlockRefinementScheduler.from_config(made.config, minimal_topk=3)
    assert (again.config.block_length, again.config.threshold, again.config.minimal_topk) == (16, 0.7, 3)
    with pytest.warns(UserWarning, match="beta_end"):
        other = BlockRefinementScheduler.from_config({"block_length": 8, "beta_end": 1, "_class_name": "DDIMScheduler"})
    assert other.config.block_length == 8
    with pytest.raises(TypeError, match="beta_end"):
        BlockRefinementScheduler.from_config({}, beta_end=1)


def test_copies():
    made = scheduler(4, threshold=0.5)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again.config == made.config and again.config is not made.config
        assert torch.equal(again._transfer_schedule, made._transfer_schedule)


@pytest.mark.parametrize(
    "config, text",
    [
        ({"block_length": 0}, "`block_length` must be > 0, got 0"),
        ({"num_inference_steps": -1}, "`num_inference_steps` must be > 0, got -1"),
        ({"minimal_topk": 0}, "`minimal_topk` must be > 0, got 0"),
        ({"minimal_topk": 1.5}, "`minimal_topk` must be an integer, got 1.5"),
        ({"threshold": -0.1}, "`threshold` must be in"),
        ({"threshold": float("nan")}, "`threshold` must be in"),
        ({"editing_threshold": float("nan")}, "`editing_threshold` must be a number or None"),
    ],
)
def test_bad_settings(config, text):
    with pytest.raises(ValueError, match=text):
        BlockRefinementScheduler(**config)


def test_diffusers_is_not_imported():
    script = (
        "import sys; from llada2_fast import BlockRefinementScheduler, LLaDA2Pipeline; BlockRefinementScheduler(); "
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# schedule


def test_set_timesteps():
    made = scheduler()
    assert made.num_inference_steps == len(made.timesteps) == 32 and made._transfer_schedule is None
    assert made.order == 1
    made.set_timesteps(8)
    assert made.num_inference_steps == 8
    assert made.timesteps.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert made._transfer_schedule.tolist() == [4] * 8
    made.set_timesteps(3, block_length=10)
    assert made._transfer_schedule.tolist() == [4, 3, 3]
    made.set_timesteps(5, block_length=3, device="cpu")
    assert made._transfer_schedule.tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "args, text",
    [
        ((0,), "`num_inference_steps` must be > 0, got 0."),
        ((-3,), "`num_inference_steps` must be > 0, got -3."),
        ((2.0,), "`num_inference_steps` must be an integer, got 2.0."),
        ((2, None, 0), "`block_length` must be > 0, got 0."),
    ],
)
def test_bad_timesteps(args, text):
    with pytest.raises(ValueError, match=text):
        scheduler().set_timesteps(*args)


def test_get_num_transfer_tokens():
    made = scheduler()
    for length in (1, 7, 32, 33):
        for steps in (1, 2, 7, 32, 50):
            schedule = made.get_num_transfer_tokens(block_length=length, num_inference_steps=steps)
            assert schedule.dtype == torch.int64 and len(schedule) == steps
            assert schedule.sum() == length and schedule.max() - schedule.min() <= 1
            assert (schedule.diff() <= 0).all()
    assert made.get_num_transfer_tokens(8, 0).shape == (0,)


# a step in mask mode


def test_quota_when_few_are_confident():
    out = scheduler(2, length=8).step(falling(8), 0, masks(8), mask_token_id=MASK)
    assert out.transfer_index.tolist() == [[True] * 4 + [False] * 4]
    assert out.prev_sample.tolist() == [[0, 1, 2, 3] + [MASK] * 4]


def test_all_above_the_threshold_when_many_are_confident():
    logits = falling(8, high=40.0)
    out = scheduler(8, length=8).step(logits, 0, masks(8), mask_token_id=MASK, threshold=0.95)
    assert out.prev_sample.tolist() == [list(range(8))]
    assert scheduler(8, length=8).step(
        logits, 0, masks(8), mask_token_id=MASK, threshold=2.0
    ).transfer_index.sum() == 1  # fmt: skip


def test_schedule_follows_the_timestep_and_clamps():
    made = scheduler(4, length=10, threshold=2.0)  # 3 3 2 2
    counts = [
        int(made.step(falling(10), t, masks(10), mask_token_id=MASK).transfer_index.sum()) for t in (0, 1, 2, 3, 9)
    ]
    assert counts == [3, 3, 2, 2, 2]
    assert made.step(falling(10), torch.tensor(2), masks(10), mask_token_id=MASK).transfer_index.sum() == 2


def test_before_set_timesteps_the_configs_schedule_is_used():
    made = scheduler(block_length=8, num_inference_steps=4, threshold=2.0)
    assert made.step(falling(8), 0, masks(8), mask_token_id=MASK).transfer_index.sum() == 2


def test_minimal_topk_is_enforced():
    made = scheduler(8, length=8, threshold=2.0, minimal_topk=3)
    assert made.step(falling(8), 0, masks(8), mask_token_id=MASK).transfer_index.sum() == 3
    assert made.step(falling(8), 0, masks(8), mask_token_id=MASK, minimal_topk=1).transfer_index.sum() == 1
    assert made.step(falling(8), 0, masks(8), mask_token_id=MASK, minimal_topk=20).transfer_index.all()


def test_a_step_without_quota_still_commits_one():
    made = scheduler(16, length=4, threshold=2.0)
    assert made._transfer_schedule[9] == 0
    assert made.step(falling(4), 9, masks(4), mask_token_id=MASK).transfer_index.sum() == 1


def test_none_means_the_configs_value():
    sample = torch.tensor([[3, MASK]])
    logits = logits_of([[(5, 9.0), (6, 9.0)]])
    made = scheduler(1, length=2, editing_threshold=0.5, threshold=0.5)
    assert made.step(logits, 0, sample, mask_token_id=MASK).prev_sample.tolist() == [[5, 6]]
    assert made.step(logits, 0, sample, mask_token_id=MASK, editing_threshold=0.0).prev_sample.tolist() == [[3, 6]]
    assert made.step(logits, 0, sample, mask_token_id=MASK, editing_threshold=-1.0).prev_sample.tolist() == [[3, 6]]
    plain = scheduler(1, length=2)
    assert plain.step(logits, 0, sample, mask_token_id=MASK).editing_transfer_index.sum() == 0


def test_editing():
    sample = torch.tensor([[10, 20, MASK, MASK]])
    logits = logits_of([[(15, 20.0), (20, 20.0), (5, 5.0), (6, 5.0)]])
    out = scheduler(2, length=4).step(logits, 0, sample, mask_token_id=MASK, editing_threshold=0.5)
    assert out.editing_transfer_index.tolist() == [[True, False, False, False]]
    assert out.transfer_index.tolist() == [[False, False, True, True]]
    assert out.prev_sample.tolist() == [[15, 20, 5, 6]]
    assert sample.tolist() == [[10, 20, MASK, MASK]]


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_prompt_positions_are_never_written(shape):
    sample = torch.tensor([[10, MASK, 20, MASK]] * 2)
    prompt = torch.tensor([True, True, False, False]).expand(shape)
    logits = logits_of([[(15, 20.0)] * 4] * 2)
    out = scheduler(1, length=4).step(logits, 0, sample, mask_token_id=MASK, editing_threshold=0.5, prompt_mask=prompt)
    assert out.prev_sample.tolist() == [[10, MASK, 15, 15]] * 2


def test_the_mask_is_never_a_candidate():
    logits = logits_of([[(MASK, 9.0), (MASK, 9.0)]])
    logits[0, 1, 7] = 1.0
    for temperature in (0.0, 1.0):
        out = scheduler(1, length=2).step(logits, 0, masks(2), mask_token_id=MASK, temperature=temperature, top_k=1)
        assert out.sampled_tokens[0, 1] == 7 and (out.sampled_tokens != MASK).all()
        assert (out.prev_sample != MASK).all()
    greedy = scheduler(1, length=2).step(logits, 0, masks(2), mask_token_id=MASK)
    assert greedy.sampled_probs[0, 1] == pytest.approx(float(logits[0, 1].softmax(-1)[7]))  # of the full vocabulary


def test_ties_go_to_the_lowest_position_and_id():
    out = scheduler(4, length=8, threshold=2.0).step(
        torch.zeros(1, 8, VOCAB), 0, masks(8), mask_token_id=MASK
    )  # fmt: skip
    assert out.prev_sample.tolist() == [[0, 0] + [MASK] * 6]


def test_output_by_attribute_key_and_index():
    logits = falling(4)
    out = scheduler(2, length=4).step(logits, 0, masks(4), mask_token_id=MASK)
    assert isinstance(out, BlockRefinementSchedulerOutput)
    names = [
        "prev_sample", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs", "pred_logits",
    ]  # fmt: skip
    assert list(out) == names and len(out) == 6
    for i, name in enumerate(names):
        assert out[name] is getattr(out, name) is out[i] is out.to_tuple()[i]
    assert out.pred_logits is logits
    assert [t.dtype for t in out.to_tuple()[:5]] == [torch.int64, torch.bool, torch.bool, torch.int64, torch.float32]
    plain = scheduler(2, length=4).step(logits, 0, masks(4), mask_token_id=MASK, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, out.to_tuple(), strict=True))


def test_output_is_as_fixed_as_diffusers():
    out = scheduler(2, length=4).step(falling(4), 0, masks(4), mask_token_id=MASK)
    out.prev_sample = masks(4)
    assert out["prev_sample"] is out[0] is out.prev_sample
    with pytest.raises(TypeError, match="neither be added nor removed"):
        out.pop("prev_sample")
    with pytest.raises(AttributeError, match="latents"):
        out["latents"] = masks(4)
    again = copy.copy(out)
    assert again.sampled_tokens is out.sampled_tokens and list(again) == list(out)


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, VOCAB, generator=generator) * 4
    sample = torch.randint(MASK, (5, 8), generator=generator)
    sample[torch.rand(5, 8, generator=generator) < 0.6] = MASK
    made = scheduler(3, length=8, threshold=0.5)
    kwargs = {"mask_token_id": MASK, "editing_threshold": 0.3}
    together = made.step(logits, 1, sample, **kwargs)
    for row in range(5):
        alone = made.step(logits[row : row + 1], 1, sample[row : row + 1], **kwargs)
        assert torch.equal(alone.prev_sample[0], together.prev_sample[row])
        assert torch.equal(alone.sampled_probs[0], together.sampled_probs[row])


def test_empty_batch_and_half_precision():
    made = scheduler(2, length=4)
    assert made.step(torch.zeros(0, 4, VOCAB), 0, masks(4, rows=0), mask_token_id=MASK).prev_sample.shape == (0, 4)
    out = made.step(falling(4).to(torch.bfloat16), 0, masks(4), mask_token_id=MASK)
    assert out.sampled_probs.dtype == torch.float32 and out.sampled_tokens.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mask_id", [MASK, None])
def test_bad_logits_name_row_and_step(bad, mask_id):
    logits = torch.zeros(3, 4, VOCAB)
    logits[2, 1, 5] = bad
    with pytest.raises(RuntimeError, match="row 2: logits hold NaN or infinity at step 1"):
        scheduler(2, length=4).step(logits, 1, masks(4, rows=3), mask_token_id=mask_id)


def test_bad_logits_where_nothing_is_read_do_not_matter():
    logits = logits_of([[(5, 9.0), (5, 9.0)]])
    logits[0, 0] = float("nan")
    sample = torch.tensor([[3, MASK]])
    assert scheduler(1, length=2).step(logits, 0, sample, mask_token_id=MASK).prev_sample.tolist() == [[3, 5]]


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"temperature": -1.0}, "`temperature` must be >= 0, got -1.0."),
        ({"temperature": float("nan")}, "`temperature` must be >= 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0."),
        ({"threshold": -0.5}, "`threshold` must be in"),
        ({"editing_threshold": float("nan")}, "`editing_threshold` must be"),
        ({"minimal_topk": 0}, "`minimal_topk` must be > 0, got 0."),
        ({"sampling_method": "beam"}, "`sampling_method` must be one of .*, got 'beam'."),
        ({"timestep": -1}, "`timestep` must be >= 0, got -1."),
        ({"prompt_mask": torch.zeros(3, dtype=torch.bool)}, r"`prompt_mask` must be \[4\] or \[1, 4\], got \[3\]."),
        ({"sample": torch.zeros(1, 4)}, "`sample` must be int64"),
        ({"sample": torch.zeros(4, dtype=torch.int64)}, "`sample` must be int64"),
        ({"model_output": torch.zeros(1, 3, VOCAB)}, "`model_output` must be"),
        ({"temperature": 1.0, "generator": [torch.Generator()] * 2}, "generator=.*one for each of 1 rows"),
    ],
)
def test_bad_step_arguments(kwargs, text):
    call = {"model_output": falling(4), "timestep": 0, "sample": masks(4), "mask_token_id": MASK, **kwargs}
    with pytest.raises(ValueError, match=text):
        scheduler(2, length=4).step(**call)


# sampling


def draw(generator, rows=2, **kwargs):
    logits = torch.randn(rows, 6, VOCAB, generator=torch.Generator().manual_seed(7))
    kwargs = {"temperature": 1.0, "mask_token_id": MASK, **kwargs}
    out = scheduler(6, length=6).step(logits, 0, masks(6, rows=rows), generator=generator, **kwargs)
    return out.sampled_tokens


def test_draws_follow_the_generator():
    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(seeded(1)), draw(seeded(1)))
    assert not torch.equal(draw(seeded(1)), draw(seeded(2)))
    shared = seeded(1)
    assert not torch.equal(draw(shared), draw(shared))  # fresh seeds at every call
    torch.manual_seed(5)
    first = draw(None)
    torch.manual_seed(5)
    assert torch.equal(draw(None), first)


@pytest.mark.parametrize("mask_id", [MASK, None])
def test_a_generator_per_row(mask_id):
    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    both = draw([seeded(1), seeded(2)], mask_token_id=mask_id)
    other = draw([seeded(1), seeded(3)], mask_token_id=mask_id)
    assert torch.equal(both[0], other[0]) and not torch.equal(both[1], other[1])


def test_greedy_takes_no_draws():
    before = torch.get_rng_state()
    greedy = draw(None, sampling_method="greedy")
    assert torch.equal(greedy, draw(None, temperature=0.0, sampling_method="multinomial"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kwargs", [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.5, "top_k": 2, "top_p": 0.9}])
def test_draws_stay_inside_the_filters_and_reach_all_of_them(kwargs):
    logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.0, -1.0]).repeat(1, 4000, 1)
    temperature = kwargs.get("temperature", 1.0)
    scaled = BlockRefinementScheduler._top_k_filtering(logits[0, :1] / temperature, kwargs.get("top_k"))
    expected = BlockRefinementScheduler._top_p_filtering(scaled, kwargs.get("top_p")).softmax(-1)[0]
    out = scheduler(1, length=4000).step(
        logits, 0, torch.full((1, 4000), 5), mask_token_id=9, generator=torch.Generator().manual_seed(0),
        **{"temperature": 1.0, **kwargs},
    )  # fmt: skip
    share = torch.bincount(out.sampled_tokens[0], minlength=6) / 4000
    assert ((share > 0) == (expected > 0)).all()
    assert (share - expected).abs().max() < 0.03  # 3 standard deviations of a fair coin over 4000 draws: 0.024
    assert torch.allclose(out.sampled_probs[0], expected[out.sampled_tokens[0]], atol=1e-6)


NARROW = [{"temperature": 0.1}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}]


@pytest.mark.parametrize("kwargs", NARROW, ids=str)
@pytest.mark.parametrize("mask_id", [MASK, None])
def test_narrow_draws_make_every_confidence_one_with_a_warning(kwargs, mask_id):
    made, logits = scheduler(), logits_of([[(i, 3.0) for i in range(8)]])
    assert draw_all(made, logits, mask_id, temperature=0.0) == [0]  # greedy: none is above the threshold
    with pytest.warns(UserWarning, match="confidence is its probability among those it is drawn from") as told:
        committed = [draw_all(made, logits, mask_id, **kwargs) for _ in range(3)]
    assert committed == [list(range(8))] * 3
    assert len(told) == 1 and told[0].filename == __file__  # once, not at every step


def draw_all(made, logits, mask_id, **kwargs):
    """The positions that a first step commits."""
    made.set_timesteps(8, block_length=8)
    sample = masks(8) if mask_id is not None else torch.zeros(1, 8, dtype=torch.int64)
    return torch.where(made.step(logits, 0, sample, mask_token_id=mask_id, **kwargs).transfer_index[0])[0].tolist()


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 0},
                                    {"temperature": 0.1, "sampling_method": "greedy"}], ids=str)  # fmt: skip
def test_nothing_is_warned_of_where_confidences_mean_something(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_all(scheduler(), falling(8), MASK, **kwargs)


def test_numbers_that_float32_and_int32_do_not_hold():
    logits, made = falling(8), scheduler(8, length=8)
    greedy = made.step(logits, 0, masks(8), mask_token_id=MASK, threshold=2.0)
    for kwargs in (
        {"threshold": 1e39}, {"threshold": 2.0, "editing_threshold": 1e39},
        {"threshold": 2.0, "temperature": 1e-60}, {"threshold": 2.0, "temperature": 1.0, "top_p": 1e-60},
    ):  # fmt: skip
        got = made.step(logits, 0, masks(8), mask_token_id=MASK, **kwargs)
        assert torch.equal(got.sampled_tokens, greedy.sampled_tokens) and int(got.transfer_index.sum()) == 1
    assert made.step(logits, 0, masks(8), mask_token_id=MASK, minimal_topk=2**40).transfer_index.all()
    draws = [draw(torch.Generator().manual_seed(1), top_k=top_k) for top_k in (None, 2**40)]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="`temperature` must be >= 0"):
        made.step(logits, 0, masks(8), mask_token_id=MASK, temperature=1e39)


# a step in uniform mode


def uniform(**config):
    config = {"block_length": 256, "num_inference_steps": 48, "threshold": 1.0, **config}
    made = BlockRefinementScheduler(**config)
    made.set_timesteps(config["num_inference_steps"], block_length=config["block_length"])
    return made


def test_uniform_quota_grows_evenly():
    made = uniform()
    sample, logits = torch.randint(1000, (2, 256)), torch.zeros(2, 256, 1000)
    for t, total in enumerate((6, 11, 16, 22)):  # ceil((t + 1) * 256 / 48)
        sample = made.step(logits, t, sample).prev_sample
        assert made._committed.sum(-1).tolist() == [total, total]
    made.step(logits, 47, sample)
    assert made._committed.all()


def test_uniform_commits_all_above_the_threshold():
    made = uniform(threshold=0.5)
    logits = torch.zeros(1, 256, 1000)
    logits[0, 100:120, 3] = 1e6
    out = made.step(logits, 0, torch.randint(1000, (1, 256)))
    assert made._committed.sum() == 20 and made._committed[0, 100:120].all()
    assert (out.prev_sample[0, 100:120] == 3).all()


def test_uniform_editing_and_state_from_outside():
    made = uniform(editing_threshold=0.5)
    sample = torch.zeros(1, 256, dtype=torch.int64)
    logits = torch.zeros(1, 256, 1000)
    logits[0, 0, 1] = 1e6
    for value, first in ((0.5, 1), (0.0, 0), (-1.0, 0)):  # 0 and less = off
        made._committed = torch.ones_like(sample, dtype=torch.bool)
        out = made.step(logits, 24, sample, editing_threshold=value)
        assert out.prev_sample[0].tolist() == [first] + [0] * 255
        assert out.editing_transfer_index.sum() == first and out.transfer_index.sum() == 0


def test_uniform_state_is_reset():
    made = uniform()
    sample, logits = torch.randint(1000, (1, 256)), torch.zeros(1, 256, 1000)
    made.step(logits, 5, sample)
    made.step(logits, 0, sample)
    assert made._committed.sum() == 6
    made.step(torch.zeros(2, 256, 1000), 5, sample.expand(2, -1))  # a new shape
    assert made._committed.sum(-1).tolist() == [32, 32]
    made.set_timesteps(48, block_length=256)
    assert made._committed is None


def test_uniform_refills_what_is_not_committed():
    made = uniform()
    sample, logits = torch.full((1, 256), 1000), torch.zeros(1, 256, 1000)
    first = made.step(logits, 0, sample, generator=torch.Generator().manual_seed(3)).prev_sample
    assert (first < 1000).all() and len(first.unique()) > 150
    again = made.step(logits, 0, sample, generator=torch.Generator().manual_seed(3)).prev_sample
    assert torch.equal(first, again)


# what a loop asks


@pytest.mark.parametrize(
    "tokens, finished, expected",
    [
        ([10, 11, 5, 2, MASK, MASK], False, True),
        ([10, 11, 2, MASK, MASK, MASK], False, True),  # the first generated position
        ([10, 11, MASK, 2, MASK, MASK], False, False),  # a mask before it
        ([10, 2, 5, 6, 7, 8], False, False),  # in the prompt
        ([10, 2, 5, 2, 7, 8], False, True),  # in both
        ([10, 11, 5, 6, 7, 8], True, True),  # finished stays finished
        ([10, 11, 5, 6, 7, 8], False, False),
    ],
)
def test_check_eos_finished(tokens, finished, expected):
    before = torch.tensor([finished, False])
    after = BlockRefinementScheduler.check_eos_finished(
        cur_x=torch.tensor([tokens, [2] * 2 + [MASK] * 4]), sampled_tokens=torch.zeros(2, 4, dtype=torch.int64),
        final_transfer=torch.zeros(2, 4, dtype=torch.bool), finished=before, eos_token_id=2, mask_token_id=MASK,
        prompt_length=2,
    )  # fmt: skip
    assert after.tolist() == [expected, False]
    assert before.tolist() == [finished, False]


@pytest.mark.parametrize(
    "case, expected",
    [
        ({}, True),
        ({"finished": [True, True]}, False),
        ({"finished": [True, False]}, True),
        ({"step_idx": 7}, True),
        ({"step_idx": 8}, False),
        ({"masks_remaining": False}, False),  # editing off
        ({"masks_remaining": False, "editing_enabled": True}, False),  # nothing was edited
        ({"masks_remaining": False, "editing_enabled": True, "edited": True, "post_steps": 16}, True),
        ({"masks_remaining": False, "editing_enabled": True, "edited": True, "post_steps": 17}, False),
        ({"masks_remaining": False, "editing_enabled": True, "edited": True, "step_idx": 99}, True),
    ],
)
def test_check_block_should_continue(case, expected):
    case = {
        "step_idx": 0, "masks_remaining": True, "editing_enabled": False, "edited": False, "post_steps": 0,
        "finished": [False], **case,
    }  # fmt: skip
    edited = torch.full((1, 4), case.pop("edited"))
    case["finished"] = torch.tensor(case["finished"])
    got = scheduler(8).check_block_should_continue(editing_transfer_index=edited, max_post_steps=16, **case)
    assert got is expected


# plain functions


def test_top_k_filtering():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0, 3.0]])
    least = torch.finfo(torch.float32).min
    assert BlockRefinementScheduler._top_k_filtering(logits, 2).tolist() == [[least, 4.0, least, 3.0, 3.0]]
    for off in (None, 0, -1, 5, 100):
        assert BlockRefinementScheduler._top_k_filtering(logits, off) is logits


def test_top_p_filtering():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 1.0, 0.0]])
    least = torch.finfo(torch.float32).min
    filtered = BlockRefinementScheduler._top_p_filtering(logits, 0.5)
    assert filtered.tolist() == [[least, least, least, 4.0], [4.0, 4.0, least, least]]
    assert BlockRefinementScheduler._top_p_filtering(logits[:1], 0.7).tolist() == [[least, least, 3.0, 4.0]]
    assert (BlockRefinementScheduler._top_p_filtering(logits, 1e-9) > least).sum(-1).tolist() == [1, 2]
    for off in (None, 1.0, 2.0):
        assert BlockRefinementScheduler._top_p_filtering(logits, off) is logits
    with pytest.raises(ValueError, match="`top_p` must be"):
        BlockRefinementScheduler._top_p_filtering(logits, 0.0)


def test_sample_from_logits():
    def sample(logits, temperature, multinomial, **kwargs):
        kwargs = {"top_k": None, "top_p": None, "generator": None, **kwargs}
        return BlockRefinementScheduler._sample_from_logits(
            logits, temperature=temperature, use_multinomial=multinomial, **kwargs
        )

    token, probability = sample(torch.tensor([[1.0, 5.0, 2.0]]), 0.0, False)
    assert token.tolist() == [1] and probability.shape == (1,)
    assert sample(torch.tensor([[1.0, 2.0, 3.0]]), 0.01, False)[0].item() == 2
    generator = torch.Generator().manual_seed(42)
    token, probability = sample(torch.tensor([[[0.0, 100.0, -100.0]]]), 1.0, True, generator=generator)
    assert token.tolist() == [[1]] and probability.tolist() == [[1.0]]
    draws = sample(torch.zeros(500, 8), 1.0, True, top_k=None, generator=generator)[0]
    assert len(draws.unique()) == 8
    with pytest.raises(ValueError, match="`temperature` must be >= 0, got -1.0."):
        sample(torch.zeros(1, 2), -1.0, False)


def test_add_noise():
    clean = torch.arange(1, 25).view(2, 12)
    valid = torch.ones_like(clean)
    valid[1, 9:] = 0
    made = scheduler()
    noisy, noisy_rev, masked, masked_rev = made.add_noise(
        clean, valid, prompt_length=2, block_length=4, mask_token_id=99, generator=torch.Generator().manual_seed(0)
    )
    assert not masked[:, :2].any() and not masked_rev[:, :2].any()
    assert not (masked & masked_rev).any()
    assert torch.equal((masked | masked_rev)[:, 2:], valid[:, 2:].bool())
    assert torch.equal(noisy, clean.masked_fill(masked, 99)) and torch.equal(
        noisy_rev, clean.masked_fill(masked_rev, 99)
    )
    assert masked.any() and masked_rev.any()
    with pytest.raises(ValueError, match="`block_length` must be > 0"):
        made.add_noise(clean, valid, prompt_length=0, block_length=0, mask_token_id=99)


HUGE = 10**400


@pytest.mark.parametrize("mask_id", [31, None], ids=["masks", "uniform"])
@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("top_p", 1e39, True), ("threshold", HUGE, True), ("editing_threshold", HUGE, True),
        ("temperature", 1e-50, True), ("temperature", 5e-324, True),
        ("threshold", Fraction(1, 2), True), ("top_p", Fraction(1, 2), True),
        ("temperature", HUGE, False), ("temperature", "x", False), ("threshold", [1], False), ("top_p", 1j, False),
        ("top_k", math.nan, False), ("top_k", "x", False), ("editing_threshold", "x", False),
        ("sampling_method", ["greedy"], False), ("timestep", 2**31, False), ("timestep", math.inf, False),
    ],
)  # fmt: skip
def test_numbers_of_a_step_are_taken_or_refused_by_name(mask_id, name, value, taken):
    scheduler = BlockRefinementScheduler(block_length=8, num_inference_steps=4)
    logits = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    kwargs = {"timestep": 0, "temperature": 1.0, "mask_token_id": mask_id} | {name: value}
    sample = torch.full((2, 8), 31)
    if taken:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert scheduler.step(logits, sample=sample, **kwargs).prev_sample.shape == (2, 8)
    else:
        with pytest.raises(ValueError, match=f"`{name}`"):
            scheduler.step(logits, sample=sample, **kwargs)


@pytest.mark.parametrize("name", ["editing_threshold", "threshold", "num_inference_steps", "block_length"])
def test_settings_that_are_no_numbers_or_too_many_are_refused(name):
    for value in ("x", [1], *([HUGE] if name in ("num_inference_steps", "block_length") else [])):
        with pytest.raises(ValueError, match=f"`{name}`"):
            BlockRefinementScheduler(**{name: value})
    assert BlockRefinementScheduler(editing_threshold=0.5).config.editing_threshold == 0.5
