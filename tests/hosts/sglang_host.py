"""The part of SGLang around an algorithm: batches, requests, the model runner and rounds of the scheduler.

Of SGLang's own files these use DllmConfig, ReqDllmMixin and SchedulerDllmMixin, inside `sglang_stubs.sglang`.
"""

import random
from array import array
from types import SimpleNamespace

import torch

from llada2_fast.cache import PagedKVCache
from llada2_fast.kernels.attention import Span


def dllm_config(name, config, length, fdfo, mask_id):
    from sglang.srt.dllm.config import DllmConfig

    return DllmConfig(name, config, length, mask_id, 8, fdfo)


def batch_of(tokens, prompt=None, sampling=None, start=None):
    """What an algorithm reads of a ForwardBatch; tokens, prompt [B, L]."""
    rows, length = tokens.shape
    start = torch.zeros(rows, dtype=torch.int64) if start is None else start
    positions = (start[:, None] + torch.arange(length)).to(torch.int32).flatten()
    return SimpleNamespace(
        batch_size=rows, input_ids=tokens.flatten().clone(), positions=positions, dllm_prompt_mask=prompt,
        sampling_info=sampling,
    )  # fmt: skip


class Runner:
    """SGLang's ModelRunner as far as an algorithm sees it: our network over our pages."""

    def __init__(self, model, length, pages):
        self.model, self.cache = model, PagedKVCache(model.config, pages, length, model.dtype, model.device)
        self.persisted = {}  # page -> the tokens whose K/V it holds

    def forward(self, batch, pp_proxy_tensors=None):
        first = [req.prefix_len // self.cache.block_length for req in batch.reqs]
        runs = [Span(req.pages, block, 1, req.limit) for req, block in zip(batch.reqs, first, strict=True)]
        tokens = batch.input_ids.clone()
        hidden = self.model.forward_blocks(tokens, batch.positions.long(), runs, self.cache)
        for req, block, ids in zip(batch.reqs, first, tokens.view(len(runs), -1).tolist(), strict=True):
            self.persisted[req.pages[block]] = ids
        output = SimpleNamespace(full_logits=self.model.lm_logits(hidden).float())
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def make_requests(config, prompts, cache, max_new_tokens, eos, **sampling):
    from sglang.srt.dllm.mixin.req import ReqDllmMixin

    class Req(ReqDllmMixin):
        """SGLang's request with the part of Req that its diffusion mixins use."""

        def __init__(self, number, prompt):
            self.origin_input_ids, self.output_ids = array("q", prompt), array("q")
            self.full_untruncated_fill_ids, self.extend_end, self.prefix_len = array("q"), None, 0
            self.dllm_initialized, self.scheduled, self.reason = False, False, None
            self.seed = 1000 + number
            self.limit = -(-(len(prompt) + max_new_tokens) // config.block_size) * config.block_size
            self.pages = cache.allocate(self.limit // config.block_size)
            self.sampling = sampling
            self.init_diffusion_llm(config)

        def schedule(self):
            """init_next_round_input: once before each of its rounds."""
            if not self.scheduled:
                self._init_fill_ids_for_dllm()
                self._update_block_offset_for_dllm()
                self.determine_dllm_phase()
                self.extend_end = self.prefix_len + config.block_size
                self.scheduled = True

        def finished(self):
            return self.reason is not None

        @property
        def seqlen(self):
            return len(self.origin_input_ids) + len(self.output_ids)

        def update_finish_state(self, new_accepted_len):
            assert min(self.output_ids) >= 0
            ends = [i for i, token in enumerate(self.output_ids[:max_new_tokens]) if token == eos]
            if ends or len(self.output_ids) >= max_new_tokens:
                self.reason = "eos" if ends else "length"
                self.output_ids = self.output_ids[: ends[0] + 1 if ends else max_new_tokens]

    return [Req(number, prompt) for number, prompt in enumerate(prompts)]


def sampling_info(reqs):
    """As SamplingBatchInfo.from_schedule_batch makes it, under --enable-deterministic-inference."""
    top_k = [1 if req.sampling.get("temperature", 0) == 0 else req.sampling.get("top_k", 1 << 30) for req in reqs]
    top_p = [req.sampling.get("top_p", 1.0) for req in reqs]
    return SimpleNamespace(
        temperatures=torch.tensor([[req.sampling.get("temperature") or 1.0] for req in reqs]),
        top_ks=torch.tensor(top_k, dtype=torch.int32), top_ps=torch.tensor(top_p),
        sampling_seed=torch.tensor([req.seed for req in reqs]), is_all_greedy=all(k <= 1 for k in top_k),
        need_top_k_sampling=any(k != 1 << 30 for k in top_k), need_top_p_sampling=any(p != 1 for p in top_p),
    )  # fmt: skip


def hot_sampling(rows):
    """Of requests that say nothing: SGLang's temperature is 1."""
    return SimpleNamespace(
        temperatures=torch.ones(rows, 1), top_ks=torch.full((rows,), 1 << 30, dtype=torch.int32),
        top_ps=torch.ones(rows), sampling_seed=None, is_all_greedy=False, need_top_k_sampling=False,
        need_top_p_sampling=False,
    )  # fmt: skip


def forward_batch_of(reqs, length):
    """ForwardBatch.init_new of a DLLM_EXTEND batch."""
    tokens = torch.tensor([req.full_untruncated_fill_ids[req.prefix_len : req.extend_end].tolist() for req in reqs])
    start = torch.tensor([req.dllm_block_offset for req in reqs])
    prompt = None
    if any(req.dllm_has_literal_mask for req in reqs):
        committed = torch.tensor([req.seqlen for req in reqs])
        prompt = start[:, None] + torch.arange(length) < committed[:, None]
    batch = batch_of(tokens, prompt, sampling_info(reqs), start)
    batch.reqs = reqs
    return batch


def serve(algorithm, config, runner, requests, seed=0):
    """Rounds of SGLang's scheduler, prefill first, three requests at most, new ones arriving all the time."""
    from sglang.srt.dllm.mixin.scheduler import SchedulerDllmMixin

    ignore = SimpleNamespace(report_prefill_stats=lambda **_: None, num_generated_tokens=0)
    scheduler = SchedulerDllmMixin()
    scheduler.dllm_config, scheduler.metrics_reporter, scheduler.tree_cache = config, ignore, None
    scheduler.output_streamer = SimpleNamespace(stream_output=lambda *_: None)
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(free_group_begin=lambda: 0, free_group_end=lambda: 0)
    scheduler.model_config = SimpleNamespace(context_len=1 << 20)
    for req in requests:
        req.time_stats = SimpleNamespace(set_completion_time=lambda: None)
    shuffled, rounds = random.Random(seed), 0
    while any(not req.finished() for req in requests):
        here = [req for req in requests[: 1 + rounds // 2] if not req.finished()]
        rounds += 1
        if not here:
            continue
        for req in here:
            req.schedule()
        reqs = [req for req in here if req.is_dllm_prefill()] or here
        shuffled.shuffle(reqs)
        reqs = reqs[:3]
        batch = forward_batch_of(reqs, config.block_size)
        carried = [req.dllm_algo_state for req in reqs] if algorithm.fdfo else None
        output, ids, accepted, states, _ = algorithm.run(runner, batch, carried)
        result = SimpleNamespace(next_token_ids=ids, accept_length_per_req_cpu=accepted, dllm_algo_state=states,
                                 copy_done=None, can_run_cuda_graph=False)  # fmt: skip
        emitted = batch.input_ids.view(len(reqs), -1).tolist()
        schedule_batch = SimpleNamespace(
            reqs=reqs, batch_size=lambda reqs=reqs: len(reqs), return_logprob=False, prefill_stats=None,
            dp_cooperation_info=None,
        )  # fmt: skip
        scheduler.process_batch_result_dllm(schedule_batch, result)
        for req, block in zip(reqs, emitted, strict=True):
            req.scheduled = False
            if not req.dllm_incomplete_ids:
                page = req.pages[req.prefix_len // config.block_size]
                assert runner.persisted[page] == block, "a block was emitted before a forward had seen its last tokens"
                req.prefix_len += config.block_size
