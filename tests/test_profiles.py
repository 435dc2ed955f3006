"""The profiles of SGLang's rules in generate(), against those rules written plainly; tests/hosts has SGLang's code."""

import functools
from pathlib import Path

import pytest
import torch

from llada2_fast.config import DecodeParams
from llada2_fast.generate import generate
from llada2_fast.model import LLaDA2Model

GOLDEN = Path(__file__).parent / "golden"
MASK, EOS, LENGTH = 255, 252, 8  # MASK and EOS of the golden set "tiny"


@functools.cache
def load():
    return LLaDA2Model.from_pretrained(GOLDEN / "tiny", dtype=torch.float32, progress=False)


def prompt_of(n):
    return torch.randint(250, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def plainly(prompt, gen_length, threshold, edit_threshold=None, max_post_edit_steps=0):
    """SGLang's loop over one request without a cache: (tokens, forwards of each block that change something or judge).

    Without edit_threshold LowConfidence, else JointThreshold. Mask tokens are no candidates. Stops behind a block with
    EOS.
    """
    tokens, forwards, limit = list(prompt), [], len(prompt) + gen_length
    while len(tokens) < limit and EOS not in tokens[len(prompt) :]:
        begin = len(tokens) // LENGTH * LENGTH
        fixed = len(tokens) - begin
        block = torch.tensor(tokens[begin:] + [MASK] * (LENGTH - fixed))
        own = torch.arange(LENGTH) >= fixed
        forwards.append(0)
        post_steps = 0
        while True:
            logits = load()(torch.tensor([tokens[:begin] + block.tolist()]), block_length=LENGTH).logits[0, begin:]
            forwards[-1] += 1
            best = logits.index_fill(1, torch.tensor(MASK), -torch.inf).argmax(-1)
            sure = logits.softmax(-1).gather(1, best[:, None])[:, 0]
            masked = (block == MASK) & own
            if not masked.any():
                post_steps += 1
                if edit_threshold is None or post_steps > max_post_edit_steps:
                    break
            write = masked & (sure > threshold)
            if masked.any() and not write.any():
                write[torch.where(masked, sure, -1).argmax()] = True
            if edit_threshold is not None:
                write |= ~masked & own & (best != block) & (sure > edit_threshold)
            if not write.any():
                break
            block = torch.where(write, best, block)
        tokens = tokens[:begin] + block.tolist()
    answer = tokens[len(prompt) : limit]
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer, forwards


RULES = {
    "sglang-lowconf": [(0.05,), (0.2,), (0.6,), (2.0,)],
    "sglang-joint": [(0.05, 0.1, 3), (0.1, 0.0, 16), (0.2, 0.05, 0), (0.05, 0.03, 1), (2.0, 0.02, 2)],
}


@pytest.mark.parametrize("profile, rule", [(profile, rule) for profile, rules in RULES.items() for rule in rules])
def test_tokens_and_forwards_are_those_of_the_rule(profile, rule):
    prompts = [prompt_of(n) for n in (1, 3, 8, 13, 21)]
    threshold, *editing = rule
    if editing:
        editing = dict(editing_threshold=editing[0], max_post_steps=editing[1])
    out = generate(
        load(), prompts, profile=profile, threshold=threshold, **dict(editing), gen_length=19, block_length=LENGTH,
        mask_id=MASK, eos_id=EOS, eos_early_stop=True, return_dict=True, trace=True,
    )  # fmt: skip
    edits = 0
    for i, prompt in enumerate(prompts):
        tokens, forwards = plainly(prompt, 19, *rule)
        assert out.sequences[i, : out.num_tokens[i]].tolist() == tokens
        assert out.finish_reasons[i] == ("eos" if EOS in tokens else "length")
        counters = out.counters[i]
        # SGLang spends one forward more on a block whose last step changed it, to write its K/V
        spent = [a - b for a, b in zip(forwards, counters.forwards_per_block, strict=True)]
        assert set(spent) <= {0, 1} and (editing or set(spent) == {1})
        edits += counters.edits
    assert bool(edits) is bool(editing)


def test_defaults_and_what_is_refused():
    assert DecodeParams(profile="sglang-lowconf").editing_threshold is None
    assert DecodeParams(profile="sglang-joint").editing_threshold == 0.0
    assert DecodeParams(profile="sglang-joint", editing_threshold=0.3).editing_threshold == 0.3
    with pytest.raises(ValueError, match="editing_threshold=0.5: expected None under profile='sglang-lowconf'"):
        DecodeParams(profile="sglang-lowconf", editing_threshold=0.5)
    for profile in RULES:
        with pytest.raises(ValueError, match="attend_tail=False"):
            DecodeParams(profile=profile, attend_tail=False)
        with pytest.raises(ValueError, match="num_to_transfer=2"):
            DecodeParams(profile=profile, num_to_transfer=2)


@pytest.mark.parametrize("profile", RULES)
def test_quota_settings_are_not_read(profile):
    rules = dict(profile=profile, threshold=0.2, gen_length=16, block_length=LENGTH, mask_id=MASK, eos_id=EOS)
    assert generate(load(), prompt_of(5), **rules).equal(
        generate(load(), prompt_of(5), steps=2, minimal_topk=4, **rules)
    )
