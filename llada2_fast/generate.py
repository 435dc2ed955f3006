"""generate(): tokens in, tokens out, by the model cards' own signature."""

from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from .cache import PagedKVCache
from .config import DecodeParams
from .decoder import BlockDecoder, CachedForward, Counters
from .trace import Trace


@dataclass
class GenerateOutput:
    """What `generate(..., return_dict=True)` gives.

    sequences [B, G] int64: each row cut after its first EOS and filled with the pad id (under the hf profiles as wide as
    the longest row); num_tokens: generated tokens up to and with the EOS; finish_reasons: "eos" or "length";
    counters: per row; tokens_per_forward: over all rows; trace: per row, None unless asked for.
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
    on_step=None,
):
    """Continue one or several prompts with an LLaDA2 model.

    inputs: int64 [P]; [B, P], with attention_mask [B, P] where padded (either side); or a list of lists of ids.
    Sampling, thresholds, steps: see DecodeParams. eos_id: one id, several, or None = the checkpoint's; mask_id, pad_id:
    None = the checkpoint's. seed: one int64 for every row as it is, or one per row; without it each row's seed is drawn
    from `generator` (one torch.Generator, or one per row; default: torch's own). trace: record every commit and edit.
    progress: a tqdm bar over generated blocks. use_cache=False recomputes the prefix at every step; settle: "carry" or
    "separate" (decoder.CachedForward). on_step(decoder, output): called after every step.

    Returns int64 [1, n] cut after the first EOS for one prompt, [B, max n] filled with the pad id for several, or a
    GenerateOutput if return_dict. Raises ValueError on bad arguments before any forward, RuntimeError on NaN logits.
    Source: generate() of the LLaDA2.0 and 2.1 model cards (profiles hf-2.0 and hf-2.1 give exactly their tokens).
    """
    if settle not in ("carry", "separate"):
        raise ValueError(f"settle={settle!r}: expected 'carry' or 'separate'")
    prompts = split_prompts(inputs, attention_mask)
    params = DecodeParams(
        gen_length, block_length, steps, temperature, top_k, top_p, sampling_method, threshold, editing_threshold,
        max_post_steps, minimal_topk, num_to_transfer, eos_early_stop,
        eos_ids=(eos_id,) if isinstance(eos_id, int) else eos_id, mask_id=mask_id, pad_id=pad_id,
        attend_tail=attend_tail, profile=profile,
    )  # fmt: skip
    mask, eos, pad = resolve_ids(model, params)
    check_fit(model.config, prompts, params)
    seeds = row_seeds(seed, generator, len(prompts))
    length = params.block_length or model.block_length
    pages = sum(-(-(len(p) + gen_length) // length) for p in prompts)
    cache = PagedKVCache(model.config, pages, length, model.dtype, model.device)
    forward = CachedForward(model, cache, settle, reuse=use_cache)
    decoder = BlockDecoder(forward, len(prompts), length, mask, model.device, max(1, len(eos)), trace)
    for slot, prompt in enumerate(prompts):
        decoder.open(slot, prompt.to(model.device), params, seeds[slot], eos)
    run(decoder, progress, on_step)
    return _collect(decoder, params, eos, pad, return_dict)


def split_prompts(inputs, attention_mask=None):
    """inputs in any accepted form -> list of int64 [n], padding stripped. ValueError for anything else."""
    if isinstance(inputs, torch.Tensor):
        if inputs.dtype != torch.int64:
            raise ValueError(f"inputs: int64 token ids expected, got {inputs.dtype}")
        if inputs.ndim not in (1, 2):
            raise ValueError(f"inputs: [P] or [B, P] expected, got {list(inputs.shape)}")
        if attention_mask is not None and attention_mask.shape != inputs.shape:
            raise ValueError(f"attention_mask: {list(inputs.shape)} expected, got {list(attention_mask.shape)}")
        rows = inputs.reshape(-1, inputs.shape[-1]) if inputs.ndim == 2 else inputs[None]
        if attention_mask is None:
            prompts = list(rows)
        else:
            masks = attention_mask.reshape(rows.shape).bool()
            prompts = [row[keep.to(row.device)] for row, keep in zip(rows, masks, strict=True)]
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: only with inputs [P] or [B, P]; a list of lists has no padding")
        lists = [inputs] if inputs and isinstance(inputs[0], int) else list(inputs)
        for ids in lists:
            if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                raise ValueError("inputs: a list of lists of integer token ids expected")
        prompts = [torch.tensor(ids, dtype=torch.int64) for ids in lists]
    if not prompts:
        raise ValueError("inputs: at least one prompt expected, got none")
    return prompts


def resolve_ids(model, params):
    """(mask id, EOS ids, pad id): the call's, else the checkpoint's. ValueError where neither says."""
    known = model.special_ids
    config = model.config
    mask = _first(params.mask_id, known.get("mask_token_id"), config.mask_token_id)
    eos = _first(params.eos_ids, known.get("eos_token_id"), config.eos_token_id)
    if mask is None:
        raise ValueError("mask_id=None: the checkpoint names no mask token; give mask_id")
    if eos is None:
        raise ValueError("eos_id=None: the checkpoint names no EOS token; give eos_id (-1 for none)")
    pad = _first(params.pad_id, known.get("pad_token_id"), config.pad_token_id, eos[0] if eos else mask)
    if not 0 <= mask < config.vocab_size:
        raise ValueError(f"mask_id={mask}: expected an id in 0..{config.vocab_size - 1}")
    return mask, eos, pad


def _first(*values):
    return next((value for value in values if value is not None), None)


def check_fit(config, prompts, params):
    """ValueError if a prompt does not fit the model: ids outside the vocabulary, too many positions, 2.2 decoding."""
    if config.delete_token_id is not None or config.split_token_id is not None:
        if params.profile != "hf-2.1" and params.editing_threshold is not None:
            raise ValueError(
                "editing_threshold: this checkpoint has delete_token_id/split_token_id (LLaDA2.2); Levenshtein editing is "
                "not there yet, decode it as plain 2.1 with profile='hf-2.1' or editing_threshold=None"
            )
    for i, prompt in enumerate(prompts):
        if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < config.vocab_size:
            raise ValueError(f"inputs: prompt {i} has ids outside 0..{config.vocab_size - 1}")
        if len(prompt) + params.gen_length > config.max_position_embeddings:
            raise ValueError(
                f"gen_length={params.gen_length}: prompt {i} has {len(prompt)} tokens and the model "
                f"{config.max_position_embeddings} positions"
            )


def row_seeds(seed, generator, count):
    """One int64 seed per row: given, or drawn once per call in row order."""
    if seed is not None:
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        if generator is not None or len(seeds) != count or any(isinstance(s, bool) or not -(2**63) <= s < 2**63 for s in seeds):
            raise ValueError(f"seed={seed!r}: expected one int64, or one for each of {count} rows, and no generator")
        return seeds
    if isinstance(generator, (list, tuple)):
        if len(generator) != count:
            raise ValueError(f"generator: expected one or {count}, got {len(generator)}")
        return [_draw(g, 1)[0] for g in generator]
    return _draw(generator, count)


def _draw(generator, count):
    device = "cpu" if generator is None else generator.device
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, device=device).tolist()


def run(decoder, progress=False, on_step=None):
    """Step all rows of a decoder to their ends. RuntimeError naming row and step if one meets NaN logits."""
    rows = decoder.running()
    blocks = sum(row.num_blocks - row.block for row in rows)
    with tqdm(total=blocks, desc="Blocks", unit="block", disable=not progress) as bar:
        while rows:
            done = sum(row.block for row in rows)
            output = decoder.step(rows)
            for row in rows:
                if row.error:
                    raise RuntimeError(f"row {row.slot}: {row.error}")
            if on_step is not None:
                on_step(decoder, output)
            bar.update(sum(row.block for row in rows) - done)
            rows = [row for row in rows if row.finish_reason is None]
        bar.update(blocks - bar.n)


def cut(row, eos):
    """The generated ids of a finished row, cut after the first EOS of its first gen_length tokens.

    Under hf-2.0 an early return is cut where that model card cuts it: at the first EOS of prompt and tail, too.
    """
    end = row.total
    if row.params.profile == "hf-2.0" and row.eos_position is not None:
        hits = torch.where(torch.isin(row.canvas, torch.tensor(eos, device=row.canvas.device)))[0]
        return row.canvas[row.prompt_length : int(hits[0]) + 1]
    ids = row.canvas[row.prompt_length : end]
    hits = torch.where(torch.isin(ids, torch.tensor(eos, device=ids.device)))[0]
    return ids[: int(hits[0]) + 1] if len(hits) else ids


def _collect(decoder, params, eos, pad, return_dict):
    texts = [cut(row, eos) for row in decoder.rows]
    if not return_dict:
        return texts[0][None] if len(texts) == 1 else _fill(texts, max(len(t) for t in texts), pad)
    width = params.gen_length if params.profile == "default" else max(len(t) for t in texts)
    return GenerateOutput(
        _fill(texts, width, pad),
        [len(t) for t in texts],
        [row.finish_reason for row in decoder.rows],
        [row.counters for row in decoder.rows],
        [Trace.of(row) for row in decoder.rows] if decoder.trace else None,
    )


def _fill(rows, width, pad):
    out = rows[0].new_full((len(rows), width), pad)
    for i, ids in enumerate(rows):
        out[i, : len(ids)] = ids
    return out
