"""generate(): tokens in, tokens out, by the model cards' own signature."""

from dataclasses import dataclass

import torch

from .cache import PagedKVCache
from .config import DecodeParams, habits
from .decoding.decoder import BlockDecoder, CachedForward, Counters, GraphedForward, power_of_two, run
from .decoding.inputs import check_fit, resolve_ids, row_seeds, split_prompts
from .decoding.trace import Trace


@dataclass
class GenerateOutput:
    """What `generate(..., return_dict=True)` gives.

    sequences [B, G] int64: each row cut after its first EOS and filled with the pad id (under other profiles than
    "default" as wide as the longest row); num_tokens: generated tokens up to and with the EOS; finish_reasons: "eos"
    or "length"; counters: per row; tokens_per_forward: over all rows; trace: per row, None unless asked for.
    """

    sequences: torch.Tensor
    num_tokens: list[int]
    finish_reasons: list[str]
    counters: list[Counters]
    trace: list[Trace] | None = None

    @property
    def tokens_per_forward(self):
        """TPF: generated tokens per denoise forward; prefill and settling forwards do not count."""
        return sum(self.num_tokens) / max(1, sum(c.denoise_forwards for c in self.counters))


def generate(
    model,
    inputs,
    temperature=DecodeParams.temperature,
    block_length=DecodeParams.block_length,
    steps=DecodeParams.steps,
    gen_length=DecodeParams.gen_length,
    top_p=DecodeParams.top_p,
    top_k=DecodeParams.top_k,
    eos_early_stop=DecodeParams.eos_early_stop,
    minimal_topk=DecodeParams.minimal_topk,
    threshold=DecodeParams.threshold,
    editing_threshold=DecodeParams.editing_threshold,
    max_post_steps=DecodeParams.max_post_steps,
    eos_id=None,
    mask_id=None,
    num_to_transfer=DecodeParams.num_to_transfer,
    *,
    attention_mask=None,
    pad_id=None,
    sampling_method=DecodeParams.sampling_method,
    attend_tail=DecodeParams.attend_tail,
    profile=DecodeParams.profile,
    seed=DecodeParams.seed,
    generator=None,
    return_dict=False,
    trace=False,
    progress=False,
    use_cache=True,
    settle="carry",
    graphs=False,
    on_step=None,
    **others,
):
    """Continue one or several prompts with an LLaDA2 model.

    inputs: int64 [P]; [B, P], with attention_mask [B, P] where padded (either side; bool, or 1 and 0 = padding); or a
    list of lists of ids. Other integers, NumPy's arrays, and lists of tensors or arrays will do.
    Sampling, thresholds, steps: see DecodeParams. eos_id: one id, several, or None = the checkpoint's; mask_id, pad_id:
    None = the checkpoint's. seed: an int64, which the first row takes as it is and each other one mixes with its number
    (equal prompts get answers of their own), or one per row; without it each row's seed is drawn from `generator` (one
    torch.Generator, or one per row; default: torch's own, which greedy decoding leaves alone). trace: record every
    commit and edit.
    progress: a tqdm bar over generated blocks. use_cache=False recomputes the prefix at every step; settle: "carry" or
    "separate" (decoder.CachedForward). graphs=True (on a GPU) replays each step as a CUDA graph; graphs and cache stay
    with the model for its next call. on_step(decoder, output): called after every step. others: arguments of
    transformers' generate() that change nothing (habits.GENERATING, or do_sample if it says what temperature says).

    Returns int64 [1, n] cut after the first EOS for one prompt, [B, max n] filled with the pad id for several, or a
    GenerateOutput if return_dict. Raises ValueError on bad arguments before any forward, RuntimeError on NaN logits.
    Source: generate() of the LLaDA2.0 and 2.1 model cards (profiles hf-2.0 and hf-2.1 give exactly their tokens,
    sglang-lowconf and sglang-joint those of SGLang's LowConfidence and JointThreshold).
    """
    if settle not in ("carry", "separate"):
        raise ValueError(f"settle={settle!r:.80}: expected 'carry' or 'separate'")
    if graphs and not (model.device.type == "cuda" and use_cache and settle == "carry"):
        raise ValueError(f"graphs=True: expected a model on a GPU (not {model.device}), use_cache and settle='carry'")
    prompts = split_prompts(inputs, attention_mask)
    params = DecodeParams(
        gen_length, block_length, steps, temperature, top_k, top_p, sampling_method, threshold, editing_threshold,
        max_post_steps, minimal_topk, num_to_transfer, eos_early_stop,
        eos_ids=(eos_id,) if isinstance(eos_id, int) else eos_id, mask_id=mask_id, pad_id=pad_id,
        attend_tail=attend_tail, profile=profile,
    )  # fmt: skip
    habits.refuse("generate", others, habits.GENERATING | {"do_sample": (params.temperature > 0,)})
    mask, eos, pad = resolve_ids(model, params)
    check_fit(model.config, prompts, params)
    seeds = row_seeds(seed, generator, len(prompts), params.draws)
    length = params.block_length or model.block_length
    blocks = [-(-(len(p) + params.gen_length) // length) for p in prompts]
    if graphs:
        decoder = _graphed_decoder(model, blocks, length, mask, len(eos))
        decoder.forward.lag = 0 if trace or on_step else 1
        decoder.trace = trace
    else:
        cache = PagedKVCache(model.config, sum(blocks), length, model.dtype, model.device)
        forward = CachedForward(model, cache, settle, reuse=use_cache)
        decoder = BlockDecoder(forward, len(prompts), length, mask, model.device, max(1, len(eos)), trace)
    rows = [
        decoder.open(slot, prompt.to(model.device), params, seeds[slot], eos) for slot, prompt in enumerate(prompts)
    ]
    run(decoder, progress, on_step)
    if graphs:
        for row in rows:
            decoder.close(row.slot)
        model._graphed_decoder = decoder
    return _collect(rows, params, eos, pad, return_dict, trace)


def _graphed_decoder(model, blocks, length, mask, num_eos):
    """A decoder that replays graphs, for rows of so many blocks: that of the model's last such call where it is large
    enough, because its graphs are captured. A call has it to itself, and does not put it back if it fails."""
    rows, widest, pages = len(blocks), max(blocks), sum(blocks)
    decoder = vars(model).pop("_graphed_decoder", None)
    if decoder is not None and (decoder.length, decoder.mask_id) == (length, mask):
        slots, width = decoder.forward.slots.page_table.shape
        room = slots, width, decoder.forward.cache.num_pages, decoder.params.eos_ids.shape[1]
        if all(there >= asked for there, asked in zip(room, (rows, widest, pages, num_eos), strict=True)):
            return decoder
    del decoder  # before its successor's cache is made
    slots, width, pages = (power_of_two(n) for n in (rows, widest, pages))
    cache = PagedKVCache(model.config, pages, length, model.dtype, model.device)
    forward = GraphedForward(model, cache, slots, width)
    return BlockDecoder(forward, slots, length, mask, model.device, max(1, num_eos))


def _collect(rows, params, eos, pad, return_dict, trace):
    texts = [row.output(eos) for row in rows]
    if not return_dict:
        return texts[0][None] if len(texts) == 1 else _fill(texts, max(len(t) for t in texts), pad)
    width = params.gen_length if params.profile == "default" else max(len(t) for t in texts)
    return GenerateOutput(
        _fill(texts, width, pad),
        [len(t) for t in texts],
        [row.finish_reason for row in rows],
        [row.counters for row in rows],
        [Trace.of(row, len(text)) for row, text in zip(rows, texts, strict=True)] if trace else None,
    )


def _fill(rows, width, pad):
    out = rows[0].new_full((len(rows), width), pad)
    for i, ids in enumerate(rows):
        out[i, : len(ids)] = ids
    return out
