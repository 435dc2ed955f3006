"""Decoding by a rule of formulas.py: batched over rows, without a cache, a forward of everything at each step."""

from collections import defaultdict
from typing import NamedTuple

import torch

from llada2_fast.config import DecodeParams
from llada2_fast.decoding.inputs import resolve_ids

from .formulas import Step

ROWS = 256  # of a batch


class Answer(NamedTuple):
    """ids: without the end token; tokens: how many with it; drafts, checks: forwards of one block's and of two blocks'
    positions."""

    ids: list[int]
    tokens: int
    drafts: int
    checks: int

    @classmethod
    def of(cls, ids, tokens, counters):
        """counters: of the product."""
        checks = counters.check_forwards
        return cls(ids, tokens, counters.denoise_forwards - checks, checks)


@torch.inference_mode()
def decode(model, prompts, rule, gen_length, block_length=None):
    """The greedy Answers to prompts, lists of ids, each until its end token. Blocks are as of generate(): the first has
    what is left of the prompt, and the last is filled whole, also behind gen_length."""
    length = model.block_length if block_length is None else block_length
    alike = defaultdict(list)  # by the number of the first block: their blocks are in step
    for place, prompt in enumerate(prompts):
        alike[len(prompt) // length].append(place)
    answers = [None] * len(prompts)
    for first, places in alike.items():
        for begin in range(0, len(places), ROWS):
            part = places[begin : begin + ROWS]
            batch = _Batch(model, [prompts[place] for place in part], gen_length, length)
            for block in range(first, batch.blocks):
                batch.fill(block, rule)
            for place, answer in zip(part, batch.answers(), strict=True):
                answers[place] = answer
    return answers


class _Batch:
    """Rows whose prompts have equally many whole blocks."""

    def __init__(self, model, prompts, gen_length, length):
        self.model, self.gen_length, self.length = model, gen_length, length
        self.mask_id, self.eos_ids, _ = resolve_ids(model, DecodeParams())
        self.ends = torch.tensor(self.eos_ids, device=model.device)
        self.starts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.blocks = -(-(int(self.starts.max()) + gen_length) // length)
        self.ids = torch.full((len(prompts), self.blocks * length), self.mask_id, device=model.device)
        for row, prompt in enumerate(prompts):
            self.ids[row, : len(prompt)] = torch.tensor(prompt, device=model.device)
        self.finished = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
        self.forwards = torch.zeros(2, len(prompts), dtype=torch.int64, device=model.device)  # drafts, checks

    def fill(self, block, rule):
        """Decode this block of the rows that have not finished."""
        begin, end = block * self.length, (block + 1) * self.length
        at = torch.arange(begin, end, device=self.ids.device)
        rows = torch.where(~self.finished & (begin < self.starts + self.gen_length))[0]
        memory, number = {}, 0
        over = torch.zeros_like(rows, dtype=torch.bool)
        while len(rows):
            number += 1
            ids, starts = self.ids[rows, :end], self.starts[rows, None]
            own = at >= starts
            logits = self.model(ids, block_length=self.length).logits[:, begin:]
            self.forwards[0, rows] += 1

            def check(some, draft, ids=ids, rows=rows):
                self.forwards[1, rows[some]] += 1
                return self._by_block_size_1(ids[some, :begin], draft)

            def ends(block, own=own, starts=starts):
                masked = own & (block == self.mask_id)
                is_end = own & (at < starts + self.gen_length) & torch.isin(block, self.ends)
                return (is_end & (masked.cumsum(1) == 0)).any(1)

            held = ids[:, begin:]
            step = Step(logits, held, own & (held == self.mask_id), self.mask_id, number, over, memory, check, ends)
            written = rule(step)
            self.ids[rows, begin:end] = written
            ended = ends(written)
            over = ended | ~(own & (written == self.mask_id)).any(1)
            stays = ~over | memory.get("again", torch.zeros_like(over))
            self.finished[rows[ended & ~stays]] = True
            rows, over = rows[stays], over[stays]
            memory = {name: kept[stays] for name, kept in memory.items()}

    def _by_block_size_1(self, prefix, draft):
        """Logits [N, L, V] at masks that stand for the draft's positions: each sees the prefix, the draft before it and
        itself, and each position of the draft sees those before it and itself."""
        begin, length, device = prefix.shape[1], self.length, draft.device
        end = begin + length
        ids = torch.cat([prefix, draft, torch.full_like(draft, self.mask_id)], 1)
        position = torch.cat([torch.arange(end, device=device), torch.arange(begin, end, device=device)])
        block = torch.arange(begin, device=device) // length
        sees = torch.zeros(end + length, end + length, dtype=torch.bool, device=device)
        sees[:begin, :begin] = block[:, None] >= block
        sees[begin:, :begin] = True
        within = torch.ones(length, length, dtype=torch.bool, device=device)
        sees[begin:end, begin:end] = within.tril()
        sees[end:, begin:end] = within.tril(-1)
        sees[end:, end:] = within.tril() & within.triu()
        return self.model(ids, position[None], length, sees[None, None]).logits[:, end:]

    def answers(self):
        for row, (start, drafts, checks) in enumerate(zip(self.starts.tolist(), *self.forwards.tolist(), strict=True)):
            ids = self.ids[row, start : start + self.gen_length].tolist()
            tokens = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
            yield Answer(ids[:tokens], len(ids) if tokens is None else tokens + 1, drafts, checks)
