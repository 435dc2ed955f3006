"""vLLM's ModelState and sampler for LLaDA2.

How a request goes through vLLM's model runner. Its prompt of n tokens is prefilled in one forward, block-causally. Then
vLLM schedules one canvas of L draft tokens a step, and the block they are is placed on the grid: for the first one the
runner's count of computed tokens is taken back by n % L, so that the canvas begins with the end of the prompt. While
a block is refined every step rejects all its tokens; once settled it is sampled whole, less the prompt tokens in it.
"""

from types import SimpleNamespace

import numpy as np
import torch

from .blocks import Blocks, block_segments
from .config import mask_token_id
from .sampling import decode_params, eos_ids

_INT64 = np.iinfo(np.int64)


def model_state_class():
    """The ModelState, whose base class is vLLM's."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata, ModelState

    class Segments(ModelSpecificAttnMetadata):
        def get_extra_attn_kwargs(self, attn_metadata_builder, num_reqs):
            return {"fast_build": True}  # FlashAttention's schedule made ahead has no room for more rows than requests

    class LLaDA2ModelState(ModelState):
        num_new_sampled_tokens_per_step = 0

        def __init__(self, vllm_config, model, encoder_cache, device):
            super().__init__(vllm_config, model, encoder_cache, device)
            self.length = vllm_config.diffusion_config.canvas_length
            self.blocks = Blocks(self.max_num_reqs, self.length, mask_token_id(self.model_config), device)
            self.lanes = {}  # request id -> its lane
            self.sampler = None

        def custom_sampler(self, sampler):
            self.sampler = BlockSampler(self.blocks, sampler.req_states)
            return self.sampler, None

        def add_request(self, req_index, new_req_data):
            """Lay out the block the request's answer begins in; runs before its prefill."""
            ids, length = new_req_data.prefill_token_ids, self.length
            if new_req_data.num_computed_tokens % length:
                raise ValueError(f"num_computed_tokens={new_req_data.num_computed_tokens}: expected whole blocks")
            lead, width = len(ids) % length, length
            if lead and len(ids) + length > self.max_model_len:
                # vLLM schedules no canvas beyond the context: the rest of the last block, after a causal prompt
                lead, width = 0, self.max_model_len - len(ids)
            start = len(ids) - lead
            sampling_params = new_req_data.sampling_params
            params = decode_params(sampling_params)
            # drawn as vLLM draws seeds: its ranks agree on numpy's generator
            seed = np.random.randint(_INT64.min, _INT64.max) if params.seed is None else params.seed
            self.blocks.open(req_index, ids[start:], start, width, params, seed, eos_ids(sampling_params))
            self.lanes[new_req_data.req_id] = req_index
            self.sampler.begin(req_index, lead)

        def remove_request(self, req_id):
            lane = self.lanes.pop(req_id, None)
            if lane is not None:
                self.blocks.close(lane)

        def prepare_inputs_embeds(self, scheduled_encoder_inputs, input_batch, req_states):
            return None

        def prepare_inputs(self, input_batch, req_states):
            return {}

        def prepare_dummy_inputs(self, num_reqs, num_tokens):
            return {}

        def prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
                         for_capture=False, ubatch_idx=0):  # fmt: skip
            """Attention without a causal mask: a canvas is one block; prompts are cut into one segment per block."""
            if ubatch_idx:
                raise ValueError("ubatch_idx: dual batch overlap is not supported")
            full = cudagraph_mode == CUDAGraphMode.FULL
            if full and input_batch.has_prefill:
                raise ValueError("cudagraph_mode=FULL: expected FULL_AND_PIECEWISE: no graph holds a prompt's segments")
            num_reqs = input_batch.num_reqs_after_padding if full else input_batch.num_reqs
            queries = SimpleNamespace(
                num_reqs=num_reqs,
                start_cpu=torch.from_numpy(input_batch.query_start_loc_np[: num_reqs + 1]),
                start_gpu=input_batch.query_start_loc[: num_reqs + 1],
                longest=input_batch.max_query_len or int(input_batch.num_scheduled_tokens.max()),
                seq_lens=input_batch.seq_lens,
                bound=input_batch.seq_lens_cpu_upper_bound[:num_reqs],
                tables=block_tables,
            )
            if input_batch.has_prefill:
                queries = self._segments(input_batch, block_tables)
            return build_attn_metadata(
                attn_groups=attn_groups,
                num_reqs=queries.num_reqs,
                num_tokens=input_batch.num_tokens_after_padding if full else input_batch.num_tokens,
                query_start_loc_gpu=queries.start_gpu,
                query_start_loc_cpu=queries.start_cpu,
                max_query_len=queries.longest,
                seq_lens=queries.seq_lens,
                max_seq_len=self.max_model_len if for_capture else int(queries.bound.max()),
                block_tables=queries.tables,
                slot_mappings=slot_mappings,
                kv_cache_config=kv_cache_config,
                seq_lens_cpu_upper_bound=queries.bound,
                positions=input_batch.positions,
                for_cudagraph_capture=for_capture,
                causal=False,
                model_specific_attn_metadata=Segments() if input_batch.has_prefill else None,
            )

        def _segments(self, input_batch, block_tables):
            """The batch with every prompt cut into its blocks, as if each were a request over the same pages."""
            n = input_batch.num_reqs
            row, lengths, behind = block_segments(
                input_batch.num_computed_tokens_np[:n], input_batch.num_scheduled_tokens[:n],
                input_batch.is_prefilling_np[:n], self.length,
            )  # fmt: skip
            start_cpu = torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32))
            rows, behind_gpu = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (row, behind))
            return SimpleNamespace(
                num_reqs=len(row),
                start_cpu=start_cpu,
                start_gpu=start_cpu.to(self.device, non_blocking=True),
                longest=int(lengths.max()),
                seq_lens=(input_batch.seq_lens[rows] - behind_gpu).to(torch.int32),
                bound=input_batch.seq_lens_cpu_upper_bound[:n][torch.from_numpy(row)]
                - torch.from_numpy(behind.astype(np.int32)),
                tables=tuple(table[rows] for table in block_tables),
            )

    return LLaDA2ModelState


class BlockSampler:
    """vLLM's sampler: refines the canvases of a batch on the device, without a read-back.

    blocks: Blocks; req_states: vLLM's RequestState, whose draft_tokens [S, L] are the runner's next input.
    """

    penalties_state = SimpleNamespace(output_bin_counts=None)  # the runner's way to say: none are counted

    def __init__(self, blocks, req_states):
        self.blocks, self.req_states = blocks, req_states
        self.lead = np.zeros_like(blocks.width)  # prompt tokens in a request's first block

    def begin(self, lane: int, lead: int):
        """A request's first block has been laid out in a lane, with so many tokens of the prompt."""
        self.lead[lane] = lead
        self.req_states.draft_tokens[lane] = self.blocks.lanes.state.tokens[lane]

    def add_request(self, req_idx, sampling_params):
        """Nothing to do: ModelState.add_request has seen the parameters, with the prompt."""

    def apply_staged_writes(self):
        """Nothing is staged."""

    def __call__(self, logits, input_batch, draft_logits=None):
        """logits [M, V], the rows of each request's draft tokens -> SamplerOutput over the batch's requests."""
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        n, blocks, device = input_batch.num_reqs, self.blocks, logits.device
        lanes = input_batch.idx_mapping_np[:n]
        scheduled = np.diff(input_batch.query_start_loc_np[: n + 1])
        first = input_batch.cu_num_logits_np[:n]
        # A canvas cut short, at the end of the context or of the token budget, is no forward of its block: not a step.
        whole = np.diff(input_batch.cu_num_logits_np[: n + 1]) == blocks.width[lanes]
        whole &= input_batch.num_draft_tokens > 0
        # Of a prompt all tokens are computed, but for those in the block that is refined next; else all or none.
        prompts = input_batch.is_prefilling_np[:n]
        ends = input_batch.num_computed_prefill_tokens_np[:n] + scheduled >= input_batch.prefill_len_np[:n]
        rejected = np.where(prompts, np.where(ends, self.lead[lanes], 0), scheduled)
        num_rejected = torch.from_numpy(rejected.astype(np.int32)).to(device, non_blocking=True)
        if not whole.any():
            sampled = torch.zeros(n, blocks.length, dtype=torch.int64, device=device)
            return SamplerOutput(sampled, None, None, torch.zeros_like(num_rejected), num_rejected)
        sampled, num_sampled, error = blocks.step(logits, lanes[whole], first[whole])
        rows = input_batch.idx_mapping[:n]
        self.req_states.draft_tokens[rows] = blocks.lanes.state.tokens[rows]
        num_sampled = num_sampled[rows].to(torch.int32)
        num_rejected = torch.where(num_sampled > 0, 0, num_rejected)
        return SamplerOutput(sampled[rows], None, error[rows].to(torch.int32), num_sampled, num_rejected)
