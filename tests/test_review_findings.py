"""One regression test for each finding of the review of diffusers' LLaDA2Pipeline (huggingface/diffusers#13598)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada2_fast import BlockRefinementScheduler, LLaDA2Pipeline, demo

DEMO = Path(demo.__file__).parent / "model"


class Recorder(torch.nn.Module):
    """Predicts token 5 everywhere, or what `rule(logits [B, S, 128])` writes over it; remembers ids and masks."""

    def __init__(self, rule=lambda logits: None):
        super().__init__()
        self.rule, self.ids, self.masks = rule, [], []

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.ids.append(input_ids.clone())
        self.masks.append(attention_mask.clone())
        logits = torch.zeros(*input_ids.shape, 128)
        logits[..., 5] = 10
        self.rule(logits)
        return SimpleNamespace(logits=logits)


class PaddingTokenizer:
    """Two prompts of unequal length, padded on the right."""

    eos_token_id, mask_token_id, pad_token_id, chat_template = None, 127, 0, None

    def __call__(self, prompt, return_tensors=None, padding=False):
        assert padding is True and len(prompt) == 2
        return {
            "input_ids": torch.tensor([[10, 11, 12], [20, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        }

    def batch_decode(self, sequences, skip_special_tokens=True):
        return [" ".join(str(int(token)) for token in sequence) for sequence in sequences]


def make(model, tokenizer=None):
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, ids, **kwargs):
    kwargs = {"threshold": 2.0, "mask_token_id": 127, "eos_token_id": 2, "output_type": "seq", **kwargs}
    return pipe(input_ids=torch.tensor(ids, dtype=torch.int64), **kwargs)


@pytest.fixture(scope="module")
def embedded():
    pipe = LLaDA2Pipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_1_padding_masks_reach_the_model():
    model = Recorder()
    output = make(model, PaddingTokenizer())(["a", "b"], gen_length=4, block_length=4, num_inference_steps=2)
    assert output.texts == ["5 5 5 5"] * 2
    assert model.masks[0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert model.masks[-1].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 0]]  # nor does the tail count


@pytest.mark.parametrize("side", ["left", "right"])
def test_1_padding_changes_no_row_of_an_llada2_model(embedded, side):
    prompts = ["Add 847 and 96.", "Reverse moon crow bread lamp seal.", "Add 3 and 4."]
    tokenizer = embedded.tokenizer
    tokenizer.padding_side = side
    together = embedded(prompts, gen_length=24, eos_early_stop=False)
    alone = [embedded(prompt, gen_length=24, eos_early_stop=False) for prompt in prompts]
    assert torch.equal(together.sequences, torch.cat([output.sequences for output in alone]))
    assert together.texts == [output.texts[0] for output in alone]


def test_2_block_length_drives_the_schedule():
    commits = []
    pipe = make(Recorder())
    run(
        pipe, [[]], gen_length=8, block_length=8, num_inference_steps=8, minimal_topk=1,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: commits.append(int(kwargs["transfer_index"].sum())),
        callback_on_step_end_tensor_inputs=["transfer_index"],
    )  # fmt: skip
    assert commits == [1] * 8 + [0]  # by the config's block length it would be 4 at a time; the last step may edit
    assert pipe.scheduler._transfer_schedule.tolist() == [1] * 8 and pipe.scheduler.config.block_length == 32


def test_3_every_callback_tensor_is_there():
    seen = {}
    names = LLaDA2Pipeline._callback_tensor_inputs
    assert {"x0", "x0_p", "confidence", "active_block"} <= {*names}
    for name in names:
        run(
            make(Recorder()), [[9, 9]], gen_length=4, block_length=4,
            callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.update(kwargs),
            callback_on_step_end_tensor_inputs=[name],
        )  # fmt: skip
    assert list(seen) == list(names)
    assert all(isinstance(value, torch.Tensor) and value.shape[0] == 1 for value in seen.values())


def test_4_eos_at_the_first_generated_position():
    def eos_first(logits):
        logits[:, 2, 2] = 20

    model = Recorder(eos_first)
    for editing_threshold, forwards in ((None, 1), (0.5, 4)):  # with editing, the row ends with its block
        output = run(
            make(model), [[10, 11]], gen_length=10, block_length=4, num_inference_steps=4,
            editing_threshold=editing_threshold,
        )  # fmt: skip
        assert output.sequences.tolist() == [[2] * 10]
        assert len(model.ids) == forwards
    finished = BlockRefinementScheduler.check_eos_finished(
        cur_x=torch.tensor([[10, 2, 99]]), sampled_tokens=torch.tensor([[0, 2]]),
        final_transfer=torch.tensor([[False, True]]), finished=torch.tensor([False]), eos_token_id=2,
        mask_token_id=99, prompt_length=1,
    )  # fmt: skip
    assert finished.tolist() == [True]


def test_5_finished_rows_are_frozen_and_trimmed():
    def two_rows(logits):
        logits[1, :, 6] = 20
        if logits.shape[1] <= 3:
            logits[0, 2, 2] = 20
        else:
            logits[0, :, 7] = 20

    model = Recorder(two_rows)
    tokenizer = PaddingTokenizer()
    tokenizer.pad_token_id = None
    output = run(
        make(model, tokenizer), [[10], [20]], gen_length=5, block_length=3, num_inference_steps=3, output_type="text"
    )  # fmt: skip
    assert output.sequences.tolist() == [[5, 2, 2, 2, 2], [6] * 5]
    assert output.texts == ["5 2", "6 6 6 6 6"]
    assert all(7 not in ids for ids in model.ids)


def test_6_progress_bar_config_holds_and_stays(capsys):
    pipe = make(Recorder())
    before = dict(pipe._progress_bar_config)
    assert before == {"disable": True}
    run(pipe, [[9]], gen_length=8, block_length=4, num_inference_steps=2)
    assert capsys.readouterr() == ("", "")
    assert pipe._progress_bar_config == before
    pipe.set_progress_bar_config(desc="mine", ncols=60)
    run(pipe, [[9]], gen_length=8, block_length=4, num_inference_steps=2)
    assert "Blocks" in capsys.readouterr().err
    assert pipe._progress_bar_config == {"desc": "mine", "ncols": 60}


def test_7_integration(embedded):
    """Real tokenizer, chat template, padded batch, EOS stop, callbacks: all at once, and each row as it is alone."""
    tokenizer = embedded.tokenizer
    chats = [
        [{"role": "user", "content": "Add 12 and 9."}],
        [
            {"role": "user", "content": "Spell 15."},
            {"role": "assistant", "content": "15 is fifteen"},
            {"role": "user", "content": "Spell 7305, 12."},
        ],
    ]
    prompts = [chat[-1]["content"] for chat in chats]
    steps = []

    def watch(pipe, step, timestep, tensors):
        assert pipe is embedded and step == len(steps)
        assert not (tensors["transfer_index"] & ~tensors["active_block"]).any()
        steps.append(tensors)

    output = embedded(
        messages=chats, gen_length=48, callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["transfer_index", "active_block", "block_x"],
    )  # fmt: skip
    eos = tokenizer.eos_token_id
    assert embedded.eos_token_id == eos and embedded.mask_token_id == tokenizer.mask_token_id
    for chat, sequence, text in zip(chats, output.sequences, output.texts, strict=True):
        end = sequence.tolist().index(eos) + 1
        assert (sequence[end:] == tokenizer.pad_token_id).all()
        assert text == tokenizer.decode(sequence[:end], skip_special_tokens=True)
        assert text and "<|" not in text and "<role>" not in text
        assert embedded(messages=chat, gen_length=48).texts == [text]
    ids = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    for row, prompt in enumerate(ids):
        assert steps[-1]["block_x"][row, : len(prompt)].tolist() == prompt  # no padding inside

    batch = embedded(prompts, gen_length=48)
    assert batch.texts == [embedded(prompt, gen_length=48).texts[0] for prompt in prompts]
    assert batch.texts[0] == output.texts[0]
    raw = embedded(prompts, use_chat_template=False, gen_length=16)
    assert raw.texts != batch.texts
