"""generate(): tokens in, tokens out, by the model cards' own signature."""

import weakref
from dataclasses import dataclass

import torch

from .config import MAX_STATES, DecodeParams, habits
from .decoding.decoder import PREFILL_TOKENS, BlockDecoder, decode_all, prefill_all
from .decoding.forms import forms_of
from .decoding.graph_runner import GraphRunner, power_of_two
from .decoding.inputs import check_fit, resolve_ids, row_seeds, special_ids, split_prompts, warn_of_editing
from .decoding.lanes import Lanes
from .decoding.runner import CachedForward, EagerRunner
from .decoding.sequence import Counters, Sequence
from .decoding.trace import Trace
from .decoding.window import check_size
from .structured import automaton_of


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
    canvas=None,
    regex=DecodeParams.regex,
    json_schema=DecodeParams.json_schema,
    choices=DecodeParams.choices,
    edit_window=DecodeParams.edit_window,
    policy=DecodeParams.policy,
    entropy_bound=DecodeParams.entropy_bound,
    entropy_decay=DecodeParams.entropy_decay,
    tokenizer=None,
    **others,
):
    """Continue one or several prompts with an LLaDA2 model.

    model: LLaDA2Model.
    inputs: int64 [P]; [B, P], with attention_mask [B, P] where padded (either side; bool, or 1 and 0 = padding); or a
        list of lists of ids. Other integers, NumPy's arrays, and lists of tensors or arrays will do.
    temperature .. num_to_transfer, sampling_method, attend_tail, profile, edit_window, policy, entropy_bound,
        entropy_decay: see DecodeParams.
    eos_id: one id, several, or None = the checkpoint's; mask_id, pad_id: None = the checkpoint's.
    seed: an int64, which the first row takes as it is and each other one mixes with its number (equal prompts get
        answers of their own), or one per row.
    generator: of the seeds where none is given, a torch.Generator or one per row; None = torch's own, which greedy
        decoding leaves alone.
    return_dict: a GenerateOutput in place of ids.
    trace: keep every commit and edit.
    progress: a tqdm bar over generated blocks.
    use_cache: False recomputes the prefix at every step.
    settle: how a block that its last step has changed gets its final K/V, "carry" = with the next block's first
        forward, "separate" = by a forward of its own.
    graphs: replay each step as a CUDA graph, on a GPU; graphs and cache are kept for the model's next call.
    on_step: called as on_step(decoder, result) after every step, with the BlockDecoder, whose `sequences` are the rows,
        and the step's StepResult (decoding/runner.py).
    canvas: what is given of the answers: a list of ids and gaps (None or the mask id), or a text with `{gap:n}` for n
        tokens; one for all prompts, or a list with that of each. Answers are as long as it is, whatever gen_length
        says; what is given is seen from the blocks that it is in on, and never written. An EOS in front of the last
        given token ends nothing.
    regex, json_schema, choices: see DecodeParams; what an answer is, or with a canvas each of its gaps. Behind its end
        a gap is filled with EOS.
    tokenizer: transformers' one of the model; needed for a canvas that is a text and for the three above.
    others: arguments of transformers' generate() that change nothing (habits.GENERATING, or do_sample if it says what
        temperature says).

    Returns int64 [1, n] cut after the first EOS for one prompt, [B, max n] filled with the pad id for several, or a
    GenerateOutput. Raises ValueError on bad arguments before any forward, RuntimeError on NaN logits.
    Source: generate() of the LLaDA2.0 and 2.1 model cards (profiles hf-2.0 and hf-2.1 give exactly their tokens,
    sglang-lowconf, sglang-joint and sglang-indel those of SGLang's LowConfidence, JointThreshold and
    JointThresholdInDel).
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
        attend_tail=attend_tail, profile=profile, regex=regex, json_schema=json_schema, choices=choices,
        edit_window=edit_window, policy=policy, entropy_bound=entropy_bound, entropy_decay=entropy_decay,
    )  # fmt: skip
    habits.refuse("generate", others, habits.GENERATING | {"do_sample": (params.temperature > 0,)})
    mask, eos, pad = resolve_ids(model, params)
    vocab_size = model.config.vocab_size
    automaton = automaton_of(params, tokenizer, eos, mask, vocab_size, MAX_STATES)
    forms = forms_of(params, canvas, len(prompts), tokenizer, mask, vocab_size, automaton)
    for number, (prompt, form) in enumerate(zip(prompts, forms, strict=True)):
        check_fit(model.config, [prompt], form, number)
    warn_of_editing(model, params)
    seeds = row_seeds(seed, generator, len(prompts), params.draws)
    length, ids = params.block_length or model.block_length, special_ids(model.config, mask, eos)
    sequences = [
        Sequence(
            prompt.tolist(), form.params, one, eos, length, ids, trace, canvas=form.canvas, automaton=form.automaton
        )
        for prompt, form, one in zip(prompts, forms, seeds, strict=True)
    ]  # fmt: skip
    for sequence in sequences:
        check_size(sequence, PREFILL_TOKENS[model.device.type])
    runner, cache = _kept_runner(model, sequences) if graphs else _eager_runner(model, sequences, use_cache)
    decoder = BlockDecoder(runner, overlap=int(graphs and on_step is None))
    for sequence in sequences:
        sequence.pages = cache.allocate(sequence.num_pages)
    if use_cache:
        prefill_all(decoder, sequences)
    for sequence in sequences:
        decoder.admit(sequence)
    decode_all(decoder, sequences, progress, settle, on_step)
    if graphs:
        for sequence in sequences:
            decoder.release(sequence)
            cache.free(sequence.pages)
        _KEPT[model] = runner, _addresses(model)
    return _collect(sequences, pad, return_dict, model.device)


def _eager_runner(model, sequences, use_cache):
    cache, lanes = _room(model, sequences[0], len(sequences), sum(s.num_pages for s in sequences))
    return EagerRunner(CachedForward(model, cache, cached=use_cache), lanes), cache


def _room(model, one, count, pages, width=0):
    """(an empty cache of so many pages, `count` lanes for sequences like `one` with tables of `width` pages)."""
    lanes = Lanes(count, one.block_length, one.special, model.device, max(1, len(one.eos_ids)), width)
    return model.new_cache(pages, one.block_length), lanes


# By model, the runner of its last call with graphs, and where its weights were then.
_KEPT: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kept_runner(model, sequences):
    """A runner that replays graphs: that of the model's last such call where it is large enough, because its graphs are
    captured. A call has it to itself, and does not put it back if it fails."""
    one = sequences[0]
    asked = [len(sequences), max(s.num_blocks for s in sequences), sum(s.num_pages for s in sequences)]
    runner, addresses = _KEPT.pop(model, (None, None))
    if runner is not None and addresses == _addresses(model):
        lanes = runner.lanes
        room = *lanes.page_table.shape, runner.cache.num_pages, lanes.max_eos
        alike = (lanes.block_length, lanes.ids) == (one.block_length, one.special)
        if alike and all(there >= n for there, n in zip(room, (*asked, len(one.eos_ids)), strict=True)):
            return runner, runner.cache
    del runner  # before its successor's cache is made
    count, width, pages = map(power_of_two, asked)
    cache, lanes = _room(model, one, count, pages, width)
    runner = GraphRunner(weakref.proxy(model), cache, lanes)  # if it held its model, that would be kept for ever
    return runner, cache


def _addresses(model):
    """Where the weights are: graphs hold these addresses."""
    return [weight.data_ptr() for weight in model.parameters()]


def _collect(sequences, pad, return_dict, device):
    answers = [sequence.answer() for sequence in sequences]
    longest = max(map(len, answers))
    if not return_dict:
        return _fill(answers, longest, pad, device)
    width = max(sequence.params.gen_length for sequence in sequences)
    return GenerateOutput(
        _fill(answers, width if sequences[0].params.traits.padded else longest, pad, device),
        [len(answer) for answer in answers],
        [sequence.finish_reason for sequence in sequences],
        [sequence.counters for sequence in sequences],
        [Trace.of(s, len(answer)) for s, answer in zip(sequences, answers, strict=True)]
        if sequences[0].events is not None
        else None,
    )


def _fill(rows, width, pad, device):
    filled = [ids + [pad] * (width - len(ids)) for ids in rows]
    return torch.tensor(filled, dtype=torch.int64, device="cpu").view(len(rows), width).to(device)
