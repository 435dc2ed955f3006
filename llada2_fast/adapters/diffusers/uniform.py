"""Uniform mode of the scheduler, which has no mask token, and plain sampling from logits [..., V], in PyTorch."""

import torch

from ...decoding.inputs import check_temperature, checked_sampling
from .checks import raise_on_error


def uniform_step(
    logits, step_index, num_steps, sample, committed, threshold, editing_threshold, sampling, generator
):  # fmt: skip
    """One step without a mask token: what is committed is remembered, the rest is drawn anew uniformly.

    commit  what is not committed and among the `needed` most confident (ties: lowest position), or p > threshold;
            needed = max(0, ceil((t + 1) L / steps) - committed)
    edit    what is committed, c != x and p > editing_threshold

    logits: [R, L, V]; sample: int64 [R, L].
    step_index: t; num_steps: of a block.
    committed: bool [R, L], of the block so far; what is of another shape, or of an earlier block, does not count.
    threshold, editing_threshold: floats, None in the second for no edits.
    sampling: {temperature, top_k, top_p}, checked.
    generator: a torch.Generator, one per row, or None.
    Returns (tokens, commit, edit, candidates, confidence, committed), all [R, L]. RuntimeError on NaN or infinity.
    """
    if step_index == 0 or committed is None or committed.shape != sample.shape:
        committed = torch.zeros_like(sample, dtype=torch.bool)
    candidates, confidence = sample_from_logits(
        logits, **sampling, generator=generator, use_multinomial=sampling["temperature"] > 0
    )
    raise_on_error(~torch.isfinite(confidence).all(-1), step_index)
    owed = -(-(step_index + 1) * sample.shape[1] // num_steps)
    needed = (owed - committed.sum(-1, keepdim=True)).clamp(min=0)
    ranked = confidence.masked_fill(committed, float("-inf"))
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    commit = ~committed & ((rank < needed) | (confidence > threshold))
    edit = torch.zeros_like(commit)
    if editing_threshold is not None:
        edit = committed & (candidates != sample) & (confidence > editing_threshold)
    tokens = torch.where(commit | edit, candidates, sample)
    committed = committed | commit
    tokens = torch.where(committed, tokens, noise(sample, logits, generator))
    return tokens, commit, edit, candidates, confidence, committed


def top_k_filtering(logits, top_k):
    """Logits below the k-th largest become the dtype's least value; ties at the k-th are kept."""
    if top_k is None or top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    least = torch.topk(logits, top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def top_p_filtering(logits, top_p):
    """A logit stays iff the mass of what is larger is at most top_p; ties at the cut are kept."""
    top_p = checked_sampling(0, None, top_p)["top_p"]
    if top_p is None:
        return logits
    ordered = torch.sort(logits, descending=True, dim=-1).values
    mass = torch.softmax(ordered.float(), dim=-1)
    stays = mass.cumsum(-1) - mass <= top_p
    stays[..., 0] = True
    least = ordered.gather(-1, stays.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def sample_from_logits(logits, *, temperature, top_k, top_p, generator, use_multinomial):
    """(token, its probability after temperature and filters), [...] int64 and float32, by torch.multinomial."""
    temperature = check_temperature(temperature)
    if temperature == 0.0 or not use_multinomial:
        probability = torch.softmax(logits.float(), dim=-1)
        token = logits.argmax(dim=-1)
    else:
        scaled = logits / max(temperature, 1e-30)  # below that quotients leave float32
        filtered = top_k_filtering(scaled, top_k)
        filtered = top_p_filtering(filtered, top_p)
        probability = torch.softmax(filtered.float(), dim=-1)
        token = multinomial(probability, generator)
    return token, probability.gather(-1, token[..., None])[..., 0]


def multinomial(probability, generator):
    """One draw from each distribution [..., V]; with a list of generators, each row from its own."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(probability):
            raise ValueError(f"generator={generator!r:.80}: expected one, or one for each of {len(probability)} rows")
        return torch.stack([multinomial(p, g) for p, g in zip(probability, generator, strict=True)])
    flat = probability.reshape(-1, probability.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probability.shape[:-1])


def noise(sample, logits, generator):
    """Uniformly random ids, int64 [R, L]."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([noise(row[None], logits, g) for row, g in zip(sample, generator, strict=True)])
    return torch.randint(logits.shape[-1], sample.shape, device=sample.device, generator=generator)
