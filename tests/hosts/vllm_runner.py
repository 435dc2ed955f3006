"""vLLM's scheduler and model runner, as far as they treat diffusion requests, around our ModelState and sampler.

The rules are those of Scheduler.schedule and update_from_output, of AsyncScheduler and of the kernels in
v1/worker/gpu/input_batch.py (vLLM 0.33), for one batch of running requests; the model is our own, uncached.
Every forward notes, for each position it writes, the tokens its keys and values depend on: those of its whole block. A
forward over a prefix that was written from other tokens than the final ones fails.
"""

from types import SimpleNamespace

import numpy as np
import torch


class Runner:
    """depth: steps in flight, 1 = synchronous, 2 = asynchronous scheduling; budget: tokens of a step."""

    def __init__(self, model, state, slots, length, max_model_len, depth=1, budget=10**6):
        self.model, self.state, self.length, self.max_model_len = model, state, length, max_model_len
        self.depth, self.budget = depth, budget
        self.draft_tokens = torch.zeros(slots, length, dtype=torch.int64)
        base = SimpleNamespace(req_states=SimpleNamespace(draft_tokens=self.draft_tokens))
        self.sampler, rejection_sampler = state.custom_sampler(base)
        assert rejection_sampler is None
        self.free, self.steps = list(range(slots)), 0

    def run(self, requests, abort=None):
        """requests: (name, prompt, SamplingParams) in order of arrival -> {name: (tokens, status)}.

        abort: (name, step): drop that request before that step."""
        waiting, running, flight, done = list(requests), [], [], {}
        while waiting or running:
            assert self.steps < 2000, "requests make no progress"
            if abort is not None and abort[1] == self.steps:
                for request in [r for r in running if r.name == abort[0]]:
                    self._finish(request, running, done)
            while waiting and self.free:
                running.append(self._add(*waiting.pop(0)))
            batch = self._schedule(running)
            if batch:
                flight.append((batch, self._forward(batch)))
            if flight and (len(flight) == self.depth or not batch):
                self._update(*flight.pop(0), running, done)
            self.steps += 1
        return done

    def _add(self, name, prompt, sampling_params):
        slot = self.free.pop(0)
        request = SimpleNamespace(
            name=name, slot=slot, tokens=list(prompt), prompt_len=len(prompt), num_computed_tokens=0,
            num_output_placeholders=0, spec=0, gpu_computed=0, written=[None] * self.max_model_len, finished=False,
            sampling_params=sampling_params, pooling_params=None, max_tokens=sampling_params.max_tokens, status=None,
            stop_reason=None,
        )  # fmt: skip
        new = SimpleNamespace(
            req_id=name, prefill_token_ids=request.tokens, num_computed_tokens=0, sampling_params=sampling_params
        )
        self.draft_tokens[slot] = 0
        self.state.add_request(slot, new)
        self.sampler.add_request(slot, sampling_params)
        self.sampler.apply_staged_writes()
        return request

    def _finish(self, request, running, done):
        running.remove(request)
        request.finished = True
        done[request.name] = request.tokens[request.prompt_len :], request.status
        self.state.remove_request(request.name)
        self.free.append(request.slot)

    def _schedule(self, running):
        """[(request, scheduled tokens, draft tokens among them)], drafting requests first."""
        from llada2_fast.adapters.vllm.scheduler import cut_short

        batch, budget = [], self.budget
        for r in running:
            if self.depth > 1 and cut_short(r, self.length, self.max_model_len):
                continue
            wanted = len(r.tokens) + r.spec + r.num_output_placeholders - r.num_computed_tokens
            new = min(wanted, budget, self.max_model_len - r.num_computed_tokens)
            if new <= 0 or (r.num_computed_tokens < r.prompt_len and new < wanted):  # chunked prefill is off
                continue
            drafts = max(0, new + r.num_computed_tokens - len(r.tokens) - r.num_output_placeholders) if r.spec else 0
            budget -= new
            batch.append((r, new, min(drafts, r.spec)))
            r.num_computed_tokens, r.spec = r.num_computed_tokens + new, 0
            if self.depth > 1:
                r.num_output_placeholders += batch[-1][2]
                r.spec = self.length
        return sorted(batch, key=lambda row: row[2] == 0)

    def _forward(self, batch):
        """One forward and our sampler, as the runner calls it; moves the device's counts. Returns the tokens sampled
        for each request of the batch."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        logits = []
        for r, new, drafts in batch:
            start = r.gpu_computed
            if drafts:
                ids = self.draft_tokens[r.slot, :drafts].tolist()
                assert new == drafts
            else:
                ids = r.tokens[start : start + new]
            row = [*(entry[0] for entry in r.written[:start]), *ids]
            grid = [tuple(row[at : at + self.length]) for at in range(0, len(row), self.length)]
            for at in range(len(grid) - 1):  # the prefix was written from the blocks as they are now
                first = at * self.length
                for entry in r.written[first : min(start, first + self.length)]:
                    assert entry[1] == grid[at], "a forward over keys and values of tokens that changed"
            for at in range(start, len(row)):
                r.written[at] = row[at], grid[at // self.length]
            if drafts:
                out = self.model.forward(torch.tensor([row]), block_length=self.length).logits[0]
                logits.append(out[start : start + drafts])
        logits = torch.cat(logits) if logits else torch.empty(0, self.model.config.vocab_size)
        output = self.sampler(logits, self._input_batch(InputBatch, batch))
        counts = output.num_sampled.tolist()
        for (r, new, _), rejected in zip(batch, output.num_rejected.tolist(), strict=True):
            r.gpu_computed += new - rejected
        return [row[:n] for row, n in zip(output.sampled_token_ids.tolist(), counts, strict=True)]

    def _input_batch(self, cls, batch):
        rows, new, drafts = zip(*batch, strict=True)
        n = len(rows)
        slots = np.array([r.slot for r in rows])
        new, drafts = np.array(new, dtype=np.int32), np.array(drafts, dtype=np.int32)
        before = np.array([r.num_computed_tokens for r in rows], dtype=np.int32) - new
        prefill_len = np.array([r.prompt_len for r in rows], dtype=np.int32)
        starts, logit_starts = (np.concatenate(([0], x.cumsum())).astype(np.int32) for x in (new, drafts))
        values = dict.fromkeys(cls.__dataclass_fields__)
        return cls(**values | {
            "req_ids": [r.name for r in rows], "num_reqs": n, "idx_mapping": torch.from_numpy(slots),
            "idx_mapping_np": slots, "num_scheduled_tokens": new, "num_draft_tokens": int(drafts.sum()),
            "query_start_loc_np": starts, "cu_num_logits_np": logit_starts, "prefill_len_np": prefill_len,
            "num_computed_tokens_np": before, "num_computed_prefill_tokens_np": np.minimum(before, prefill_len),
            "is_prefilling_np": before < prefill_len,
        })  # fmt: skip

    def _update(self, batch, sampled, running, done):
        from vllm.v1.core.sched.utils import check_stop

        for (r, _, drafts), tokens in zip(batch, sampled, strict=True):
            if r.finished:
                continue
            if drafts:
                r.num_computed_tokens -= drafts - len(tokens)
                r.num_output_placeholders -= (drafts - len(tokens)) if self.depth > 1 else 0
            if self.depth > 1:
                r.num_output_placeholders -= len(tokens)
            else:
                r.spec = self.length
            for token in tokens:
                r.tokens.append(token)
                r.output_token_ids = r.tokens[r.prompt_len :]
                r.num_tokens, r.num_output_tokens = len(r.tokens), len(r.output_token_ids)
                if check_stop(r, self.max_model_len):
                    self._finish(r, running, done)
                    break
