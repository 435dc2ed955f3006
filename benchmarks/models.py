"""Networks of random weights, and everybody who decodes a Task with them on a CPU. Speed does not depend on the values.

    ours        generate()
    hf-2.0      generate(profile="hf-2.0"): what the card's loop is held against
    diffusers   the diffusers package's LLaDA2Pipeline with its BlockRefinementScheduler: the whole window at every step
    diffusers_plain   the same, of a network whose products are PyTorch's own and not those of kernels/product.py
    card        the loop of LLaDA2.0's model card, written from its rule: likewise
    without     ours, but for one part: see ABLATIONS

Each is a function of (model, task) that returns a call without arguments, and the call returns an Outcome. Quota and
threshold decoding, greedy, without editing; random networks never predict EOS, so nobody stops early.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llada2_fast.config import DecodeParams, ModelConfig
from llada2_fast.decoding.decoder import BlockDecoder, decode_all, prefill_all
from llada2_fast.decoding.inputs import resolve_ids
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.runner import CachedForward, EagerRunner
from llada2_fast.decoding.sequence import Sequence
from llada2_fast.kernels import int4, refine
from llada2_fast.kernels.gemm import WORDS
from llada2_fast.kernels.moe import gated, mlp
from llada2_fast.kernels.product import torch_products
from llada2_fast.kernels.state import report_ref
from llada2_fast.model import LLaDA2Model
from llada2_fast.weights.shapes import scale_name

from .roofline import BLOCK

# The small shape of the CPU comparison; expert width is half of hidden, as wide as LLaDA2-mini's is in proportion to
# its experts per token.
SMALL = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, intermediate_size=640, moe_intermediate_size=128,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16,
    num_experts_per_tok=4, num_shared_experts=1, n_group=4, topk_group=2, use_bias=False, rms_norm_eps=1e-6,
    rope_theta=600000.0, max_position_embeddings=16384, mask_token_id=4095, pad_token_id=4094, eos_token_id=(4094,),
)  # fmt: skip


def random_model(config, seed=0, dtype=torch.float32, device="cpu"):
    """A network of this shape with weights scaled so that activations and confidences stay in a usual range.

    The head's rows of the mask and EOS ids are zero: neither is ever the most likely token.
    """
    model = LLaDA2Model(config, dtype=dtype, device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("expert_bias"):
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1.0)
        else:
            p.normal_(std=1.0 if "embeddings" in name else p.shape[-1] ** -0.5, generator=generator)
    model.lm_head.weight.mul_(3.0)
    model.lm_head.weight[[config.mask_token_id, *config.eos_token_id]] = 0
    model.products()  # probed now and not within what is measured
    return model


def with_experts(model, make):
    """A network on the same weights whose routed experts are make(its own), a module called as layers.Experts is."""
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for layer in twin.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = make(layer.mlp.experts)
    return twin


def in_int4(model):
    """The same network with its experts in int4."""
    twin = LLaDA2Model(replace(model.config, quantization="int4"), dtype=model.dtype).eval()
    wide, own = dict(model.named_parameters()), dict(twin.named_parameters())
    for name, weight in own.items():
        if weight.dtype == WORDS:
            words, scale = int4.quantize_weight(wide[name])
            weight.copy_(words)
            own[scale_name(name)].copy_(scale)
        elif name in wide:
            weight.data = wide[name].data
    twin.products()
    return twin


# who decodes


class Task(NamedTuple):
    """prompt [B, P] int64, all rows of one length; the quota is BLOCK / steps tokens a step, beside the threshold."""

    prompt: torch.Tensor
    generated: int
    steps: int = 8
    threshold: float = 2.0  # above 1: by quota alone


class Outcome(NamedTuple):
    """sequences [B, generated] int64; forwards: how many a row went through, the most of all rows, by their kind."""

    sequences: torch.Tensor
    forwards: dict[str, int]


def ours(model, task, **options):
    """generate(), with further arguments for it."""

    def call():
        output = model.generate(
            task.prompt, gen_length=task.generated, block_length=BLOCK, steps=task.steps, threshold=task.threshold,
            return_dict=True, **options,
        )  # fmt: skip
        kinds = ("denoise", "prefill", "settle")
        most = {kind: max(getattr(row, f"{kind}_forwards") for row in output.counters) for kind in kinds}
        return Outcome(output.sequences, most)

    return call


class BlockCausal(torch.nn.Module):
    """Our network as diffusers calls a model: its 2D mask becomes the block-causal one the weights are trained for.

    calls: how many forwards there were.
    """

    def __init__(self, model):
        super().__init__()
        self.inner, self.calls = model, 0
        self.dtype, self.device, self.config = model.dtype, model.device, None

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.calls += 1
        return self.inner(input_ids, position_ids=position_ids, block_length=BLOCK)


def diffusers(model, task, on_step=None):
    """The installed diffusers' own pipeline and scheduler. on_step(): called after every step."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    network = BlockCausal(model)
    pipe = LLaDA2Pipeline(model=network, scheduler=BlockRefinementScheduler(block_length=BLOCK))
    pipe.set_progress_bar_config(disable=True)

    def after_step(*_):
        on_step()
        return {}

    def call():
        network.calls = 0
        sequences = pipe(
            input_ids=task.prompt, use_chat_template=False, gen_length=task.generated, block_length=BLOCK,
            num_inference_steps=task.steps, threshold=task.threshold, editing_threshold=None, eos_early_stop=False,
            mask_token_id=model.config.mask_token_id, output_type="seq",
            callback_on_step_end=None if on_step is None else after_step,
        ).sequences  # fmt: skip
        return Outcome(sequences, _only_denoise(network.calls))

    return call


def card(model, task):
    """The loop of LLaDA2.0's model card, one row, greedy; steps at most gen_length."""
    mask_id = model.config.mask_token_id
    quotas = [BLOCK // task.steps + (t < BLOCK % task.steps) for t in range(task.steps)]
    begin, end = task.prompt.shape[1], task.prompt.shape[1] + task.generated

    def call():
        canvas = task.prompt.new_full((1, -(-end // BLOCK) * BLOCK), mask_id)
        canvas[:, :begin] = task.prompt
        forwards = 0
        for stop in range(begin // BLOCK * BLOCK + BLOCK, canvas.shape[1] + 1, BLOCK):
            window, block = canvas[:, :stop], canvas[0, stop - BLOCK : stop]
            for quota in quotas:
                masked = block == mask_id
                if not masked.any():
                    break
                logits = model(window, block_length=BLOCK).logits[0, -BLOCK:]
                forwards += 1
                confidence, token = F.softmax(logits, dim=-1, dtype=torch.float32).max(-1)
                confidence = torch.where(masked, confidence, -torch.inf)
                commit = confidence > task.threshold
                if commit.sum() < quota:
                    commit = torch.zeros_like(masked)
                    commit[confidence.topk(min(quota, int(masked.sum()))).indices] = True
                block[commit] = token[commit]
        return Outcome(canvas[:, begin:end], _only_denoise(forwards))

    return call


def _only_denoise(forwards):
    return {"denoise": forwards, "prefill": 0, "settle": 0}


# ours with a part removed


class MaskedExperts(torch.nn.Module):
    """The network's routed experts as the cards' modelling code computes them: each in turn picks its tokens out of all
    pairs."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x, routing, shared):
        gate_up, down = self.own.weights
        pairs, expert = x.repeat_interleave(routing.ids.shape[1], 0), routing.ids.flatten()
        y = torch.empty_like(pairs)
        for e in range(len(gate_up.values)):
            chosen = expert == e
            y[chosen] = F.linear(gated(F.linear(pairs[chosen], gate_up.values[e])), down.values[e])
        y = (y.unflatten(0, routing.ids.shape) * routing.weights[..., None]).sum(1).to(x.dtype)
        return y if shared is None else y + mlp(x, *shared)


class SchedulerLanes(Lanes):
    """Lanes whose step is diffusers' scheduler.step: softmax, argmax, gather and topk, each an operation of its own, on
    the logits of whole blocks. For one row that decodes greedily and does not edit."""

    def __init__(self, scheduler, *args):
        super().__init__(*args)
        self.scheduler = scheduler

    def needed(self):
        return (self.state.frozen == 0)[:, None].expand(self.state.tokens.shape)

    def step(self, logits, index=None, filters=True, only_needed=False, guided=False):
        state, mask_id = self.state, self.mask_id
        output = self.scheduler.step(
            logits[index], int(state.step[0]), state.tokens, mask_token_id=mask_id,
            threshold=float(self.params.threshold[0]), editing_threshold=None,
        )  # fmt: skip
        state.tokens.copy_(output.prev_sample)
        state.step += 1
        done = not (state.tokens == mask_id).any()
        state.frozen += refine.BLOCK_DONE * done
        status = torch.zeros(refine.NUM_STATUS, 1, dtype=torch.int32)
        status[refine.FLAGS] = refine.CHANGED + refine.BLOCK_DONE * done
        return refine.RefineOutput(
            report_ref(tuple(status), state),
            output.sampled_tokens,
            output.sampled_probs,
            output.transfer_index,
            output.editing_transfer_index,
        )


def within(context, call):
    """The call, each time inside of what context() gives."""

    def inside():
        with context():
            return call()

    return inside


def scheduled(model, task):
    """ours on SchedulerLanes, one row."""
    from diffusers import BlockRefinementScheduler

    scheduler = BlockRefinementScheduler(block_length=BLOCK)
    params = DecodeParams(task.generated, BLOCK, task.steps, threshold=task.threshold)
    mask_id, eos_ids, _ = resolve_ids(model, params)

    def call():
        scheduler.set_timesteps(task.steps, block_length=BLOCK)
        row = Sequence(task.prompt[0].tolist(), params, 0, eos_ids, BLOCK, refine.SpecialIds(mask_id))
        cache = model.new_cache(row.num_blocks, BLOCK)
        lanes = SchedulerLanes(scheduler, 1, BLOCK, refine.SpecialIds(mask_id))
        decoder = BlockDecoder(EagerRunner(CachedForward(model, cache), lanes))
        row.pages = cache.allocate(row.num_blocks)
        prefill_all(decoder, [row])
        decoder.admit(row)
        decode_all(decoder, [row])
        counters = row.counters
        forwards = {"denoise": counters.denoise_forwards, "prefill": counters.prefill_forwards, "settle": 0}
        return Outcome(torch.tensor([row.answer()]), forwards)

    return call


PEERS: dict[str, Callable] = {"ours": ours, "diffusers": diffusers, "card": card}
AT_THE_BASE: dict[str, Callable] = {  # peers of one point alone
    "diffusers_plain": lambda model, task: within(torch_products, diffusers(model, task)),
}
ABLATIONS: dict[str, Callable] = {
    "cache": partial(ours, use_cache=False),
    "carried-along settling": partial(ours, settle="separate"),
    "grouped experts": lambda model, task: ours(with_experts(model, MaskedExperts), task),
    "products of oneDNN's": lambda model, task: within(torch_products, ours(model, task)),
    "fused refinement": scheduled,
}
