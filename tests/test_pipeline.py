"""LLaDA2Pipeline: the three kinds of model, prompts, EOS, callbacks, generators, files, bad input."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llada2_fast import BlockRefinementScheduler, LLaDA2Model, LLaDA2Pipeline, LLaDA2PipelineOutput, demo

MASK, EOS = 255, 252  # of the golden set "tiny"


@pytest.fixture(scope="module")
def tiny(golden):
    return LLaDA2Model.from_pretrained(golden / "tiny", dtype=torch.float32, progress=False)


class Foreign(torch.nn.Module):
    """Our network as somebody else's implementation: no cache, a mask from the caller; remembers its calls."""

    def __init__(self, network, model_type="llada2_moe"):
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(model_type=model_type, vocab_size=network.config.vocab_size)
        self.calls = []

    def forward(self, input_ids, attention_mask, position_ids):
        self.calls.append((input_ids, attention_mask, position_ids))
        return self.network(input_ids, position_ids, attention_mask=attention_mask)


class Plain(torch.nn.Module):
    """No config, no parameters: predicts `token` at every position, surer to the right; remembers its calls."""

    def __init__(self, token=7, vocab=32, bad=None):
        super().__init__()
        self.token, self.vocab, self.bad, self.calls = token, vocab, bad, []

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.calls.append((input_ids.clone(), attention_mask.clone(), position_ids.clone()))
        logits = torch.zeros(*input_ids.shape, self.vocab)
        logits[..., self.token] = 5.0 + position_ids / 100
        if self.bad is not None and len(self.calls) == self.bad:
            logits[-1, 0, 0] = float("nan")
        return SimpleNamespace(logits=logits)


class Restless(Plain):
    """Predicts another token at every call, so that it edits as long as it may."""

    def forward(self, *args, **kwargs):
        self.token = 7 + len(self.calls) % 2
        return super().forward(*args, **kwargs)


class Tokenizer:
    """The least a tokenizer may be: callable, batch_decode, eos_token_id and mask_token_id."""

    eos_token_id, mask_token_id = None, 31

    def __call__(self, prompt, return_tensors, padding):
        assert return_tensors == "pt"
        rows = [[ord(c) % 31 for c in text] for text in (prompt if padding else [prompt])]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    def batch_decode(self, sequences, skip_special_tokens):
        assert isinstance(sequences, list) and skip_special_tokens
        return [" ".join(str(int(i)) for i in sequence) for sequence in sequences]


def pipeline(model, tokenizer=None, **config):
    pipe = LLaDA2Pipeline(model, BlockRefinementScheduler(**config), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, ids=((5, 6, 7, 8),), **kwargs):
    """A call of a pipeline over Plain, by quota alone."""
    kwargs = {
        "gen_length": 8, "block_length": 8, "num_inference_steps": 4, "threshold": 2.0, "editing_threshold": None,
        "mask_token_id": 31, "output_type": "seq", **kwargs,
    }  # fmt: skip
    return pipe(input_ids=torch.tensor(ids, dtype=torch.int64), **kwargs)


PROMPTS = [[17, 30, 4, 99, 101, 7, 7], [3], [], [200, 11, 54, 23, 90, 91, 92, 93, 94, 95, 96, 12, 13]]


def padded(side):
    width = max(map(len, PROMPTS))
    ids, mask = torch.full((len(PROMPTS), width), EOS), torch.zeros(len(PROMPTS), width, dtype=torch.int64)
    for i, prompt in enumerate(PROMPTS):
        at = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[i, at], mask[i, at] = torch.tensor(prompt, dtype=torch.int64), 1
    return {"input_ids": ids, "attention_mask": mask}


CASES = [
    {"threshold": 0.7, "editing_threshold": 0.5},
    {"threshold": 2.0, "editing_threshold": None, "num_inference_steps": 3},
    {"threshold": 0.3, "editing_threshold": 0.2, "max_post_steps": 2, "eos_early_stop": False},
    {"threshold": 0.5, "editing_threshold": 0.0, "minimal_topk": 2, "num_inference_steps": 8},
]


def call(pipe, **kwargs):
    kwargs = {"gen_length": 21, "block_length": 8, "mask_token_id": MASK, "eos_token_id": EOS, **kwargs}
    return pipe(**{"output_type": "seq", **kwargs})


# our model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_a_padded_batch_are_what_they_are_alone(tiny, case, side):
    pipe = pipeline(tiny)
    together = call(pipe, **padded(side), **case).sequences
    assert together.shape == (4, 21) and together.dtype == torch.int64 and not (together == MASK).any()
    for i, prompt in enumerate(PROMPTS):
        alone = call(pipe, input_ids=torch.tensor([prompt], dtype=torch.int64), **case).sequences
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_tokens_as_generate(tiny, case):
    case = {"editing_threshold": None, "eos_early_stop": True, **case}
    from_pipeline = call(pipeline(tiny), **padded("left"), **case).sequences
    steps = case.pop("num_inference_steps", 32)
    case["editing_threshold"] = case["editing_threshold"] or None  # 0.0 is off here, on there
    output = tiny.generate(
        PROMPTS, gen_length=21, block_length=8, steps=steps, mask_id=MASK, eos_id=EOS, attend_tail=False,
        return_dict=True, **case,
    )  # fmt: skip
    for i, sequence in enumerate(from_pipeline):
        n = output.num_tokens[i]
        assert torch.equal(sequence[:n], output.sequences[i, :n])
        if case["eos_early_stop"]:
            assert (sequence[n:] == EOS).all()


def test_sampling_depends_on_the_rows_seed_alone(tiny):
    pipe = pipeline(tiny)
    sampling = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "threshold": 0.4}

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = padded("left")
    together = call(pipe, **batch, generator=seeded(1, 2, 3, 4), **sampling).sequences
    flipped = {name: value.flip(0) for name, value in batch.items()}
    assert torch.equal(call(pipe, **flipped, generator=seeded(4, 3, 2, 1), **sampling).sequences.flip(0), together)
    alone = call(pipe, input_ids=torch.tensor(PROMPTS[3]), generator=seeded(4)[0], **sampling).sequences
    assert torch.equal(alone[0], together[3])
    other = call(pipe, **batch, generator=seeded(5, 2, 3, 4), **sampling).sequences
    assert not torch.equal(other[0], together[0]) and torch.equal(other[1:], together[1:])
    once = [call(pipe, **batch, generator=torch.Generator().manual_seed(9), **sampling).sequences for _ in range(2)]
    assert torch.equal(*once)


@pytest.mark.parametrize(
    "narrow", [{"temperature": 1e-3}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}], ids=str
)
def test_narrow_draws_commit_whole_blocks_as_in_diffusers_with_a_warning(tiny, narrow):
    pipe, steps = pipeline(tiny), []
    kwargs = {
        "editing_threshold": None,
        "threshold": 0.9,
        "callback_on_step_end": lambda _, step, *__: steps.append(step),
    }
    with pytest.warns(UserWarning, match="confidence is its probability among those it is drawn from") as told:
        call(pipe, **padded("left"), **kwargs, **narrow)
    assert len(told) == 1 and told[0].filename == __file__ and steps[-1] <= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain_draw in ({"temperature": 1.0}, {"temperature": 0.1, "sampling_method": "greedy"}, {}):
            call(pipe, **padded("left"), **kwargs, **plain_draw)
    assert steps[-1] > 20


def test_greedy_decoding_leaves_torch_s_generator_alone(tiny):
    before = torch.get_rng_state()
    call(pipeline(tiny), **padded("left"))
    assert torch.equal(before, torch.get_rng_state())


def test_one_dimensional_ids_and_tuple_output(tiny):
    pipe = pipeline(tiny)
    ids = torch.tensor(PROMPTS[0])
    sequences, texts = call(pipe, input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=False)
    assert texts is None and torch.equal(sequences, call(pipe, input_ids=ids[None]).sequences)


def test_output_object(tiny):
    output = call(pipeline(tiny), input_ids=torch.tensor(PROMPTS[0]))
    assert isinstance(output, LLaDA2PipelineOutput)
    assert output[0] is output["sequences"] is output.sequences and output.texts is None
    assert list(output) == ["sequences"] and len(output.to_tuple()) == 1
    with_text = LLaDA2PipelineOutput(output.sequences, ["a"])
    assert with_text[1] == with_text["texts"] == ["a"]


@pytest.mark.parametrize("value", [None, 0.0, -1.0])
def test_editing_is_off_at_none_zero_and_less(tiny, value):
    edits = []

    def look(pipe, step, timestep, tensors):
        edits.append(tensors["editing_transfer_index"].sum())

    names = ["editing_transfer_index"]
    off = call(
        pipeline(tiny), **padded("right"), editing_threshold=value, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    assert sum(edits) == 0
    assert torch.equal(off.sequences, call(pipeline(tiny), **padded("right"), editing_threshold=5.0).sequences)


# another implementation of LLaDA2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_foreign_llada2_gives_the_same_tokens(tiny, case):
    own = call(pipeline(tiny), **padded("left"), **case).sequences
    assert torch.equal(call(pipeline(Foreign(tiny)), **padded("left"), **case).sequences, own)


@pytest.mark.parametrize("model_type, ranks", [("llada21_moe", 4), ("llada2_moe_veomni", 4), ("llama", 2), (None, 2)])
def test_llada2_is_known_by_its_model_type(tiny, model_type, ranks):
    model = Foreign(tiny, model_type)
    call(pipeline(model), input_ids=torch.tensor(PROMPTS[1]), gen_length=4)
    assert {made[1].ndim for made in model.calls} == {ranks}


def test_foreign_llada2_sees_a_block_causal_mask(tiny):
    model = Foreign(tiny)
    call(pipeline(model), **padded("left"), threshold=2.0)
    for ids, mask, position in model.calls:
        size = ids.shape[1]
        assert ids.shape == position.shape == (1, size) and size % 8 == 0
        assert torch.equal(position[0], torch.arange(size))
        assert mask.shape == (1, 1, size, size) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
    ids, mask, _ = max(model.calls, key=lambda made: made[0].shape[1])
    n = len(PROMPTS[3])
    block = torch.arange(40) // 8
    seen = (block[:, None] >= block) & (torch.arange(40) < n + 21)  # no padding, no tail
    assert torch.equal(mask[0, 0] == 0, seen)
    assert ids[0, :n].tolist() == PROMPTS[3]


# any other model


def test_other_models_are_called_as_diffusers_calls_them():
    model = Plain()
    ids = ((10, 11, 12, 0), (0, 0, 0, 20))
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]])
    out = plain(pipeline(model), ids, attention_mask=mask, gen_length=9, block_length=4, num_inference_steps=2)
    assert out.sequences.tolist() == [[7] * 9] * 2
    assert [made[0].shape for made in model.calls] == [(2, 8)] * 2 + [(2, 12)] * 2 + [(2, 16)]
    seen, attended, position = model.calls[-1]
    assert seen[:, :4].tolist() == [list(row) for row in ids]
    assert attended[:, :4].tolist() == mask.tolist() and attended.dtype == torch.int64
    assert attended[:, 4:].tolist() == [[1] * 9 + [0] * 3] * 2
    assert position.tolist() == [list(range(16))] * 2
    assert model.calls[0][0][:, 4:].tolist() == [[31] * 4] * 2


def test_other_models_see_finished_rows_too():
    class Stops(Plain):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            output = super().forward(input_ids, attention_mask, position_ids)
            output.logits[0, 5, 2] = 20.0  # row 0 ends at its second generated token
            return output

    model = Stops()
    out = plain(pipeline(model), ((5,) * 4, (6,) * 4), gen_length=12, block_length=4, eos_token_id=2)
    assert out.sequences.tolist() == [[7, 2] + [2] * 10, [7] * 12]
    assert all(len(made[0]) == 2 for made in model.calls)
    assert model.calls[-1][0][0, 4:12].tolist() == [7, 2, 7, 7, 31, 31, 31, 31]  # frozen as it was


def test_empty_prompts():
    model = Plain()
    assert plain(pipeline(model), [[], []], gen_length=5).sequences.tolist() == [[7] * 5] * 2
    assert model.calls[0][0].shape == (2, 8)


@pytest.mark.parametrize("steps, gen_length, forwards", [(8, 8, 8), (8, 3, 3), (3, 16, 6), (1, 8, 1), (100, 4, 4)])
def test_steps_per_block(steps, gen_length, forwards):
    model = Plain()
    pipe = pipeline(model)
    plain(pipe, [[]], num_inference_steps=steps, gen_length=gen_length)
    assert len(model.calls) == forwards
    assert pipe.num_timesteps == steps * -(-gen_length // 8)
    assert pipe.scheduler.num_inference_steps == steps and len(pipe.scheduler._transfer_schedule) == steps


@pytest.mark.parametrize("max_post_steps, forwards", [(0, 4), (1, 5), (3, 7)])
def test_max_post_steps_counts_exactly(max_post_steps, forwards):
    model = Restless()
    plain(pipeline(model), [[]], editing_threshold=0.1, max_post_steps=max_post_steps)
    assert len(model.calls) == forwards


def test_no_wasted_forward():
    model = Plain()
    plain(pipeline(model), [[]], threshold=0.5)  # the first step is sure of all
    assert len(model.calls) == 1
    plain(pipeline(model), [[]], threshold=0.5, editing_threshold=0.5)  # and one that edits nothing
    assert len(model.calls) == 3


def test_the_default_block_length_is_the_schedulers():
    model = Plain()
    plain(pipeline(model, block_length=4), [[]], block_length=None, gen_length=8)
    assert sorted({made[0].shape[1] for made in model.calls}) == [4, 8]


# texts


def test_prompts_become_texts():
    pipe = pipeline(Plain(), Tokenizer())
    assert (pipe.eos_token_id, pipe.mask_token_id) == (None, 31)
    arguments = {"gen_length": 4, "block_length": 4, "num_inference_steps": 4}
    output = pipe("abc", **arguments)
    assert output.texts == ["7 7 7 7"] and output.sequences.tolist() == [[7] * 4]
    assert pipe(["abc", "d"], use_chat_template=False, **arguments).texts == ["7 7 7 7"] * 2
    assert pipe(["abc", "d"], output_type="seq", **arguments).texts is None
    assert plain(pipeline(Plain()), output_type="text").texts is None


@pytest.mark.parametrize("early", [True, False])
def test_texts_end_at_the_eos(early):
    class Writes(Plain):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            output = super().forward(input_ids, attention_mask, position_ids)
            output.logits[..., 6, 2] = 20.0
            return output

    tokenizer = Tokenizer()
    tokenizer.eos_token_id, tokenizer.pad_token_id = 2, 0
    pipe = pipeline(Writes(), tokenizer)
    output = plain(pipe, eos_early_stop=early, output_type="text", mask_token_id=None)
    assert output.texts == ["7 7 2"]
    assert output.sequences.tolist() == [[7, 7, 2] + ([0] * 5 if early else [7] * 5)]
    assert plain(pipe, eos_token_id=9).sequences.tolist() == [[7, 7, 2] + [7] * 5]


def test_several_eos_ids():
    class Writes(Plain):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            output = super().forward(input_ids, attention_mask, position_ids)
            output.logits[0, 5, 2] = output.logits[1, 6, 3] = 20.0
            return output

    output = plain(pipeline(Writes()), ((5,) * 4,) * 2, eos_token_id=[3, 2], gen_length=4)
    assert output.sequences.tolist() == [[7, 2, 3, 3], [7, 7, 3, 3]]


def test_eos_ids_in_prompts_and_padding_do_not_count(tiny):
    pipe = pipeline(tiny)
    prompt = torch.tensor([[5, EOS, 9]])
    free = call(pipe, input_ids=prompt, eos_token_id=None).sequences
    assert not torch.equal(free, torch.full_like(free, EOS))
    hits = torch.where(free[0] == EOS)[0]
    end = int(hits[0]) + 1 if len(hits) else 21
    assert torch.equal(call(pipe, input_ids=prompt).sequences[0, :end], free[0, :end])


def test_prepare_input_ids():
    def prepare(pipe, **kwargs):
        kwargs = {
            "prompt": None, "messages": None, "input_ids": None, "use_chat_template": False,
            "add_generation_prompt": False, "chat_template_kwargs": None, **kwargs,
        }  # fmt: skip
        return pipe._prepare_input_ids(**kwargs)

    ids, mask = prepare(pipeline(Plain()), input_ids=torch.tensor([1, 2, 3]))
    assert ids.tolist() == [[1, 2, 3]] and mask.tolist() == [[1, 1, 1]] and mask.dtype == torch.int64
    ids, mask = prepare(pipeline(Plain(), Tokenizer()), prompt=["ab", "c"])
    assert mask.tolist() == [[1, 1], [1, 0]]
    for kwargs in ({"prompt": "a"}, {}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(ValueError):
            prepare(pipeline(Plain()), **kwargs)
    for kwargs in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(ValueError, match="Provide"):
            prepare(pipeline(Plain(), Tokenizer()), **kwargs)


# callbacks


def test_callback_tensors(tiny):
    pipe, seen = pipeline(tiny), []
    names = list(pipe._callback_tensor_inputs)
    assert {*names} == {
        "block_x", "x0", "x0_p", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs",
        "confidence", "active_block",
    }  # fmt: skip

    def look(given, step, timestep, tensors):
        assert given is pipe and list(tensors) == names
        seen.append((step, timestep, tensors))

    batch = padded("right")
    output = call(
        pipe, **batch, threshold=0.3, editing_threshold=0.2, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    starts = [len(prompt) // 8 * 8 for prompt in PROMPTS]
    states = [torch.full((64,), MASK) for _ in PROMPTS]
    for state, prompt in zip(states, PROMPTS, strict=True):
        state[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    block = -1
    for _, timestep, t in seen:
        block += timestep == 0
        assert torch.equal(t["x0"], t["sampled_tokens"]) and torch.equal(t["x0_p"], t["sampled_probs"])
        assert ((t["x0_p"] >= 0) & (t["x0_p"] <= 1)).all() and (t["x0"] >= 0).all()
        assert torch.equal(t["confidence"] > float("-inf"), t["active_block"])
        assert (t["confidence"][t["active_block"]] == t["x0_p"][t["active_block"]]).all()
        assert not (t["transfer_index"] & ~t["active_block"]).any()
        assert not (t["editing_transfer_index"] & t["active_block"]).any()
        assert t["block_x"].dtype == torch.int64 and t["transfer_index"].dtype == torch.bool
        for i, (state, prompt) in enumerate(zip(states, PROMPTS, strict=True)):
            written = t["transfer_index"][i] | t["editing_transfer_index"][i]
            if not t["active_block"][i].any() and not written.any():
                continue
            at = starts[i] + 8 * block
            span = slice(at, at + 8)
            valid = (torch.arange(at, at + 8) >= len(prompt)) & (torch.arange(at, at + 8) < len(prompt) + 21)
            assert torch.equal(t["active_block"][i], (state[span] == MASK) & valid)
            state[span] = torch.where(written, t["x0"][i], state[span])
            assert torch.equal(t["block_x"][i, : at + 8], state[: at + 8])
            assert (t["block_x"][i, at + 8 :] == EOS).all()  # right-filled with the pad id
    for state, prompt, sequence in zip(states, PROMPTS, output.sequences, strict=True):
        end = [*sequence.tolist(), EOS].index(EOS)
        assert torch.equal(state[len(prompt) : len(prompt) + end], sequence[:end])


LOOKS = [(["block_x", "confidence"], {"x0": 1}), (None, None), (["x0"], {}), ([], None)]  # what is asked for, returned


@pytest.mark.parametrize("kind, looks", [
    pytest.param(lambda model: model, LOOKS, id="ours"), pytest.param(Foreign, LOOKS[:1], id="foreign"),
    pytest.param(Foreign, LOOKS, id="foreign, all", marks=pytest.mark.slow),
])  # fmt: skip
def test_looking_changes_nothing(tiny, kind, looks):
    tiny = kind(tiny)
    expected = call(pipeline(tiny), **padded("left")).sequences
    for names, returned in looks:
        got = call(
            pipeline(tiny), **padded("left"), callback_on_step_end=lambda *_, returned=returned: returned,
            callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip
        assert torch.equal(got.sequences, expected)


@pytest.mark.parametrize("model, timesteps", [(Plain, [0, 1, 2]), (Restless, [0, 1, 2, 2, 2, 2])])
def test_steps_and_timesteps_of_callbacks(model, timesteps):
    """From the third step of a block on there was no mask."""
    seen = []
    plain(
        pipeline(model()), [[]], gen_length=16, num_inference_steps=2, editing_threshold=0.1, max_post_steps=4,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append((step, timestep)),
    )  # fmt: skip
    assert seen == list(enumerate(timesteps * 2))


class Named:
    """What diffusers' PipelineCallback looks like."""

    tensor_inputs = ["active_block", "block_x"]

    def __init__(self):
        self.seen = []

    def __call__(self, pipe, step, timestep, tensors):
        self.seen.append(list(tensors))
        return tensors


def test_callbacks_that_name_their_tensors():
    callback = Named()
    plain(pipeline(Plain()), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["x0"])
    assert callback.seen == [["active_block", "block_x"]] * len(callback.seen)


def put(changes, in_place=False):
    """A callback that writes {(step, row, position): token}."""

    def callback(pipe, step, timestep, tensors):
        block_x = tensors["block_x"] if in_place else tensors["block_x"].clone()
        for (when, row, position), token in changes.items():
            if when == step:
                block_x[row, position] = token
        return None if in_place else {"block_x": block_x}

    return callback


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_writes_into_the_active_block(in_place):
    model = Plain()
    out = plain(pipeline(model), callback_on_step_end=put({(0, 0, 5): 9, (0, 0, 2): 9, (1, 0, 4): 8}, in_place))
    assert out.sequences.tolist() == [[8, 9] + [7] * 6]  # position 2 is prompt: ignored
    assert model.calls[1][0].tolist()[0][:6] == [5, 6, 7, 8, 31, 9]


@pytest.mark.parametrize("when", [1, 3, 5, 8])
def test_a_change_before_the_active_block_recomputes_the_cache(tiny, when):
    """The cached decoding of a rewritten prefix is that of a model without a cache."""
    changes = {(when, i, len(prompt) + at): 40 + at for i, prompt in enumerate(PROMPTS) for at in (0, 1, 2)}
    arguments = {
        **padded("left"), "threshold": 2.0, "num_inference_steps": 2, "editing_threshold": None, "gen_length": 40,
        "eos_early_stop": False, "callback_on_step_end": put(changes),
    }  # fmt: skip
    cached = call(pipeline(tiny), **arguments).sequences
    uncached = call(pipeline(Foreign(tiny)), **arguments).sequences
    assert torch.equal(cached, uncached)
    if when > 1:  # a row's second block starts with step 2
        assert cached[:, :3].tolist() == [[40, 41, 42]] * 4
    arguments["callback_on_step_end"] = None
    assert not torch.equal(cached[:, 24:], call(pipeline(tiny), **arguments).sequences[:, 24:])


def test_masks_may_come_back_until_the_steps_are_used_up():
    model = Plain()
    out = plain(pipeline(model), [[]], num_inference_steps=8, threshold=0.5, callback_on_step_end=put({(0, 0, 3): 31}))
    assert out.sequences.tolist() == [[7] * 8] and len(model.calls) == 2

    def never_content(pipe, step, timestep, tensors):
        tensors["block_x"][:] = 31

    model = Plain()
    out = plain(pipeline(model), [[]], gen_length=8, num_inference_steps=4, callback_on_step_end=never_content)
    assert out.sequences.tolist() == [[7] * 8] and len(model.calls) == 4 + 3  # 2 of 8 in each, once they stay


def test_with_editing_masks_that_come_back_are_filled_before_the_block_ends():
    model = Plain()
    out = plain(
        pipeline(model), [[]], num_inference_steps=8, threshold=0.0, editing_threshold=0.1,
        callback_on_step_end=put({(1, 0, 3): 31}),
    )  # fmt: skip
    assert out.sequences.tolist() == [[7] * 8] and len(model.calls) == 4  # filled, seen, filled, seen


def test_a_callback_takes_no_mask_free_step_away():
    model = Restless()
    plain(
        pipeline(model), [[]], threshold=0.0, editing_threshold=0.1, max_post_steps=3,
        callback_on_step_end=put({(2, 0, 0): 9}),
    )  # fmt: skip
    assert len(model.calls) == 1 + 3


def test_a_callback_ends_and_reopens_rows():
    model = Plain()
    stop = put({(1, 0, 1): 2, (1, 0, 0): 9})
    out = plain(pipeline(model), [[]], num_inference_steps=8, gen_length=16, eos_token_id=2, callback_on_step_end=stop)
    assert out.sequences.tolist() == [[9] + [2] * 15] and len(model.calls) == 2

    model = Plain(token=2)
    go_on = put({(0, 0, 0): 9})
    out = plain(pipeline(model), [[]], num_inference_steps=1, gen_length=16, eos_token_id=2, callback_on_step_end=go_on)
    assert out.sequences.tolist() == [[9] + [2] * 15] and len(model.calls) == 1
    everything = put({(0, 0, i): 9 for i in range(8)})
    out = plain(
        pipeline(model), [[]], num_inference_steps=1, gen_length=16, eos_token_id=2, callback_on_step_end=everything
    )  # fmt: skip
    assert out.sequences.tolist() == [[9] * 8 + [2] * 8] and len(model.calls) == 3


def test_an_eos_in_an_earlier_block_ends_the_row():
    model = Plain()
    stop = put({(2, 0, 3): 2})
    out = plain(pipeline(model), [[]], num_inference_steps=2, gen_length=16, eos_token_id=2, callback_on_step_end=stop)
    assert out.sequences.tolist() == [[7] * 3 + [2] * 13] and len(model.calls) == 3


@pytest.mark.parametrize("when, forwards", [(0, 4), (1, 2)])
def test_with_editing_a_row_ends_with_its_block(when, forwards):
    """The step after the last mask edits nothing and ends the block, or edits the callback's EOS away."""
    model = Plain()
    out = plain(
        pipeline(model), [[]], num_inference_steps=1, gen_length=16, eos_token_id=2, editing_threshold=0.1,
        max_post_steps=1, callback_on_step_end=put({(when, 0, 3): 2}),
    )  # fmt: skip
    assert out.sequences.tolist() == [[7] * 16 if when == 0 else [7] * 3 + [2] * 13] and len(model.calls) == forwards


def test_finished_rows_stay_as_they_are():
    class Stops(Plain):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            output = super().forward(input_ids, attention_mask, position_ids)
            output.logits[0, :, 2] = 20.0
            return output

    out = plain(
        pipeline(Stops()), [[], []], gen_length=16, eos_token_id=2, num_inference_steps=1,
        callback_on_step_end=put({(1, 0, 0): 9, (1, 1, 0): 9}),
    )  # fmt: skip
    assert out.sequences.tolist() == [[2] * 16, [9] + [7] * 15]


@pytest.mark.parametrize(
    "returned, text",
    [
        (torch.zeros(1, 15, dtype=torch.int64), r"int64 \[1, 16\], got torch.int64 \[1, 15\]"),
        (torch.zeros(1, 16), r"int64 \[1, 16\], got torch.float32"),
        ([[0] * 16], "got list"),
        (torch.full((1, 16), 31), "row 0 holds the mask id 31 before its active block 1"),
        (torch.full((1, 16), -1), "row 0 holds ids from -1 to -1, outside the vocabulary"),
    ],
)
def test_bad_block_x(returned, text):
    def callback(pipe, step, timestep, tensors):
        return {"block_x": returned} if tensors["block_x"].shape[1] == 16 else None

    with pytest.raises(ValueError, match=text):
        plain(pipeline(Plain()), [[]], gen_length=16, callback_on_step_end=callback)


# canvases

GAPS = [[None] * 3 + [40, 41] + [None] * 12 + [42, 43, 44], [None] * 5, [50] + [None] * 20 + [51], [None, 60, None]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_canvas_gives_the_tokens_of_generate(tiny, case):
    """With our model, with another implementation of it, and for each row alone."""
    out = call(pipeline(tiny), **padded("left"), **case, canvas=GAPS).sequences
    assert torch.equal(call(pipeline(Foreign(tiny)), **padded("left"), **case, canvas=GAPS).sequences, out)
    early = case.get("eos_early_stop", True)
    output = tiny.generate(
        PROMPTS, block_length=8, steps=case.get("num_inference_steps", 32), mask_id=MASK, eos_id=EOS, canvas=GAPS,
        attend_tail=False, return_dict=True, eos_early_stop=early, threshold=case["threshold"],
        editing_threshold=case["editing_threshold"] or None, max_post_steps=case.get("max_post_steps", 16),
        minimal_topk=case.get("minimal_topk", 1),
    )  # fmt: skip
    assert out.shape == (4, 22)
    for i, (prompt, given) in enumerate(zip(PROMPTS, GAPS, strict=True)):
        n = output.num_tokens[i]
        assert torch.equal(out[i, :n], output.sequences[i, :n])
        assert [(at, token) for at, token in enumerate(given) if token not in (None, out[i, at])] == []
        assert (out[i, len(given) :] == EOS).all() and MASK not in out[i]
        ids = torch.tensor([prompt], dtype=torch.int64)
        masked = torch.tensor([MASK if token is None else token for token in given])
        alone = call(pipeline(tiny), input_ids=ids, **case, canvas=masked).sequences
        assert torch.equal(alone[0], out[i, : len(given)])


def test_what_is_given_on_the_right_is_seen_within_its_block(tiny):
    def gap(*behind):
        canvas = [None] * 4 + list(behind)
        return call(pipeline(tiny), input_ids=torch.tensor(PROMPTS[1]), canvas=canvas).sequences[0, :4].tolist()

    assert gap(9, 9, 9) != gap(90, 91, 92)
    assert gap(None, None, None, 9) == gap(None, None, None, 90)  # which is in the next block


def test_other_models_see_a_canvas_from_the_step_on_that_its_block_begins_with():
    model, canvas = Plain(), [[None, 9, None, None, None, 8], [10, None]]
    out = plain(pipeline(model), ((5,) * 4, (6,) * 4), block_length=4, canvas=canvas, num_inference_steps=1)
    assert out.sequences.tolist() == [[7, 9, 7, 7, 7, 8], [10, 7, 31, 31, 31, 31]]
    assert model.calls[0][0][:, 4:].tolist() == [[31, 9, 31, 31], [10, 31, 31, 31]]
    assert [made[1][:, 4:].tolist() for made in model.calls] == [
        [[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
    ]  # fmt: skip
    assert model.calls[1][0][0, 4:].tolist() == [7, 9, 7, 7, 31, 8, 31, 31]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_cannot_write_over_what_is_given(in_place):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((tensors["active_block"], tensors["transfer_index"], tensors["block_x"].clone()))
        return put({(0, 0, 5): 8, (0, 0, 4): 3, (1, 0, 5): 31}, in_place)(pipe, step, timestep, tensors)

    out = plain(
        pipeline(Plain()), canvas=[None, 9, None, None, None, 9], block_length=8, num_inference_steps=3,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["block_x", "active_block", "transfer_index"],
    )  # fmt: skip
    assert out.sequences.tolist() == [[3, 9, 7, 7, 7, 9]]
    assert not any(flags[0, 5] for active, written, _ in seen for flags in (active, written))
    assert all(block[0, 5] == 9 for _, _, block in seen)


def test_a_canvas_may_be_a_text():
    pipe = LLaDA2Pipeline.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    pipe.set_progress_bar_config(disable=True)
    (text,) = pipe(prompt="Spell 4071.", canvas="{gap:2} is {gap:5}.", threshold=0.9, editing_threshold=None).texts
    assert " is " in text and text.endswith(".") and len(pipe.tokenizer(text)["input_ids"]) > 4


# the parts


def test_components_and_devices(tiny):
    pipe = pipeline(tiny)
    assert pipe.components == {"model": tiny, "scheduler": pipe.scheduler, "tokenizer": None}
    assert pipe.device == pipe._execution_device == torch.device("cpu") and pipe.dtype == torch.float32
    assert pipe.to("cpu") is pipe and pipe.to(torch.float32) is pipe
    assert pipeline(Plain()).to("cpu").device == torch.device("cpu")
    sibling = LLaDA2Pipeline(**pipe.components)
    assert sibling.model is tiny


def test_progress_bar(capsys):
    pipe = LLaDA2Pipeline(Plain(), BlockRefinementScheduler())
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    with pipe.progress_bar(total=3) as bar:
        bar.update(3)
    with pytest.raises(ValueError, match="Either `total` or `iterable` has to be defined."):
        pipe.progress_bar()
    capsys.readouterr()
    plain(pipe)
    assert "Blocks" in capsys.readouterr().err


def test_from_pretrained_of_a_plain_checkpoint(golden, tmp_path):
    pipe = LLaDA2Pipeline.from_pretrained(golden / "tiny")
    assert isinstance(pipe.model, LLaDA2Model) and pipe.tokenizer is None
    assert pipe.eos_token_id == EOS and pipe.mask_token_id is None
    assert pipe.scheduler.config.block_length == pipe.model.block_length
    pipe.set_progress_bar_config(disable=True)
    scheduler = BlockRefinementScheduler(block_length=8, threshold=0.6)
    assert LLaDA2Pipeline.from_pretrained(golden / "tiny", scheduler=scheduler).scheduler is scheduler
    half = LLaDA2Pipeline.from_pretrained(golden / "tiny", torch_dtype=torch.bfloat16, progress=False)
    assert half.dtype == torch.bfloat16 and call(half, input_ids=IDS).sequences.shape == (1, 21)
    with pytest.raises(ValueError, match="give it or dtype, not both"):
        LLaDA2Pipeline.from_pretrained(golden / "tiny", torch_dtype=torch.float32, dtype=torch.float32)


def test_arguments_by_habit(golden, tmp_path):
    pipe = LLaDA2Pipeline.from_pretrained(
        golden / "tiny", device_map="cpu", low_cpu_mem_usage=True, use_safetensors=True, local_files_only=True,
        trust_remote_code=True, dtype="float32", progress=False,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="200KB", push_to_hub=False)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    again = LLaDA2Pipeline.from_pretrained(tmp_path, model=pipe.model, progress=False)
    assert again.model is pipe.model
    with pytest.raises(ValueError, match="load_in_8bit=True"):
        LLaDA2Pipeline.from_pretrained(golden / "tiny", load_in_8bit=True)
    with pytest.raises(ValueError, match="safe_serialization=False"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


def test_save_and_load(golden, tmp_path):
    first = LLaDA2Pipeline.from_pretrained(golden / "tiny", scheduler=BlockRefinementScheduler(block_length=8))
    first.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {
        "_class_name": "LLaDA2Pipeline", "model": ["llada2_fast", "LLaDA2Model"],
        "scheduler": ["llada2_fast", "BlockRefinementScheduler"],
    }  # fmt: skip
    second = LLaDA2Pipeline.from_pretrained(tmp_path)
    assert second.scheduler.config == first.scheduler.config
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
    arguments = {**padded("left"), "block_length": None}
    assert torch.equal(call(first, **arguments).sequences, call(second, **arguments).sequences)


# bad input


class Untouched(torch.nn.Module):
    """No forward is ever reached."""

    config = SimpleNamespace(vocab_size=32, max_position_embeddings=64)

    def forward(self, *args, **kwargs):
        raise AssertionError("a forward was made")


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"input_ids": None}, "Provide one of `prompt`, `messages`, or `input_ids`."),
        ({"prompt": "a", "messages": []}, "Provide either `prompt` or `messages`, not both."),
        ({"input_ids": None, "prompt": "a"}, "Tokenizer is required when `input_ids` is not provided."),
        ({"input_ids": None, "messages": [{}]}, "Tokenizer is required when `input_ids` is not provided."),
        ({"input_ids": IDS[None]}, "`input_ids` must be 1D or 2D"),
        ({"input_ids": IDS.float()}, "`input_ids` must be int64 token IDs, got dtype=torch.float32"),
        ({"input_ids": IDS.bool().numpy()}, "`input_ids` must be int64 token IDs, got dtype=bool"),
        ({"input_ids": [[1, 2]]}, "`input_ids` must be a tensor, got list"),
        ({"input_ids": IDS[:0]}, "`input_ids` must hold at least one row"),
        ({"input_ids": IDS + 30}, "`input_ids`: prompt 0 .*outside 0..31"),
        ({"input_ids": IDS - 2}, "`input_ids`: prompt 0 .*outside 0..31"),
        ({"gen_length": 0}, "`gen_length` must be > 0, got 0."),
        ({"gen_length": 62}, "gen_length=62: prompt 0 has 3 tokens and the model 64 positions"),
        ({"gen_length": 2.5}, "`gen_length` must be an integer, got 2.5."),
        ({"num_inference_steps": True}, "`num_inference_steps` must be an integer, got True."),
        ({"block_length": -1}, "`block_length` must be > 0, got -1."),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be > 0, got 0."),
        ({"minimal_topk": 0}, "`minimal_topk` must be > 0, got 0."),
        ({"threshold": -0.1}, r"`threshold` must be in \[0, 1\] \(or > 1 to force top-k commits\), got -0.1."),
        ({"threshold": float("nan")}, "`threshold` must be in .* got nan."),
        ({"editing_threshold": float("nan")}, "editing_threshold"),
        ({"temperature": -1.0}, "`temperature` must be >= 0, got -1.0."),
        ({"temperature": float("nan")}, "`temperature` must be >= 0, got nan."),
        ({"temperature": float("inf")}, "`temperature`"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\], got 0.0."),
        ({"max_post_steps": -1}, "max_post_steps"),
        ({"sampling_method": "beam"}, "`sampling_method` must be one of .* got 'beam'."),
        ({"output_type": "latent"}, "`output_type` must be 'seq' or 'text', got 'latent'."),
        ({"mask_token_id": None}, r"`mask_token_id` must be provided \(or available on the tokenizer\)."),
        ({"mask_token_id": -1}, "`mask_token_id` must be a token id, got -1."),
        ({"eos_token_id": [2, "a"]}, "`eos_token_id` must be a token id, several or None"),
        ({"mask_token_id": 32}, "`mask_token_id` must be in 0..31, got 32."),
        (
            {"attention_mask": torch.ones(1, 2)},
            r"`attention_mask` shape \(1, 2\) must match `input_ids` shape \(1, 3\).",
        ),
        *[
            ({"attention_mask": made([[1, odd, 0]])}, f"attention_mask: bool, or 0 and 1, expected, got {odd}")
            for odd in (0.5, 2, -1, float("-inf"), float("nan"))
            for made in (torch.tensor, np.array, list)
        ],
        ({"canvas": [None] * 62}, "gen_length=62: prompt 0 has 3 tokens and the model 64 positions"),
        ({"canvas": [1, 2, 3]}, "canvas: expected at least one gap, None or the mask id 31"),
        ({"canvas": [None, 32]}, r"canvas: expected ids in 0..31 and None, got 32 at 1"),
        ({"canvas": [[None], [None]]}, "canvas: expected one for all, or one for each of 1 prompts, got 2"),
        ({"canvas": "{gap:3}"}, "canvas='{gap:3}': expected ids, or a tokenizer for a text"),
        ({"attention_mask": "111"}, "`attention_mask`: .* expected, got str"),
        ({"attention_mask": [[1], [1, 1]]}, r"`attention_mask`: .* expected, got \[\[1\], \[1, 1\]\]"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"has to be in \[.*\], but found \['latents'\]"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be callable, got 3."),
        ({"generator": [torch.Generator()] * 2}, "generator=.*one for each of 1 rows"),
    ],
)
def test_bad_input(kwargs, text):
    with pytest.raises(ValueError, match=text):
        pipeline(Untouched())(
            **{"input_ids": IDS, "mask_token_id": 31, "gen_length": 8, "output_type": "seq", **kwargs}
        )


def test_bad_input_of_prompts():
    pipe = pipeline(Untouched(), Tokenizer())
    with pytest.raises(ValueError, match="`attention_mask` needs `input_ids`"):
        pipe("a", attention_mask=torch.ones(1, 1))
    with pytest.raises(ValueError, match="`prompt` must not be an empty list"):
        pipe([])


def test_ids_of_other_integers_and_of_numpy(tiny):
    pipe = pipeline(tiny)
    ids, mask = padded("left").values()
    wanted = call(pipe, input_ids=ids, attention_mask=mask).sequences
    for given in (ids.int(), ids.numpy(), ids.numpy().astype("uint16")):
        assert torch.equal(call(pipe, input_ids=given, attention_mask=mask.numpy()).sequences, wanted)
    for given in (mask.tolist(), mask.float(), mask.bool(), mask.numpy() > 0, mask.bool().tolist()):
        assert torch.equal(call(pipe, input_ids=ids, attention_mask=given).sequences, wanted)
    counted = call(pipe, input_ids=ids, attention_mask=mask, gen_length=np.int64(21), eos_token_id=np.int32(EOS))
    assert torch.equal(counted.sequences, call(pipe, input_ids=ids, attention_mask=mask, eos_token_id=EOS).sequences)


def test_a_scheduler_of_other_blocks_than_the_models_says_so(tiny):
    with pytest.warns(UserWarning, match="block_length=8 is not the model's 32"):
        pipe = pipeline(tiny, block_length=8)
    with pytest.warns(UserWarning, match="block_length=8 is not the model's 32"):
        call(pipe, input_ids=IDS, block_length=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe, input_ids=IDS, block_length=32)
        call(pipeline(tiny, block_length=32), input_ids=IDS, block_length=None)


def test_steps_is_no_argument():
    with pytest.raises(TypeError, match="steps"):
        plain(pipeline(Plain()), steps=4)


def test_long_prompts_of_our_model_are_refused(tiny):
    with pytest.raises(ValueError, match="prompt 0 has 1010 tokens and the model 1024 positions"):
        call(pipeline(tiny), input_ids=torch.zeros(1, 1010, dtype=torch.int64))


@pytest.mark.parametrize("bad", [1, 3])
def test_nan_logits_name_row_and_step(bad):
    with pytest.raises(RuntimeError, match=f"row 1: logits hold NaN or infinity at step {bad - 1} of block 0"):
        plain(pipeline(Plain(bad=bad)), [[], []])
