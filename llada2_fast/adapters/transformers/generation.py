"""generate() as transformers has it: prompts [B, P] in, prompts and answers [B, P + G] out, settings from a
GenerationConfig, streamers, stopping criteria, num_return_sequences. Names are those of transformers' DiffusionGemma.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from ...config import PROFILES, DecodeParams
from ...config.checks import choice
from ...config.habits import GENERATING, is_neutral, token_ids
from ...decoding.decoder import BlockDecoder
from ...decoding.inputs import padding_mask
from ...decoding.runner import StepResult
from ...decoding.sequence import Phase, Sequence

# The model cards' names for settings of a GenerationConfig.
_CARD_NAMES = {
    "gen_length": "max_new_tokens", "eos_id": "eos_token_id", "pad_id": "pad_token_id", "mask_id": "mask_token_id",
}  # fmt: skip
# Settings of LLaDA2 that a GenerationConfig may hold as well: arguments of llada2_fast.generate.
_SETTINGS = (
    "block_length", "steps", "threshold", "editing_threshold", "max_post_steps", "edit_window", "minimal_topk",
    "num_to_transfer", "eos_early_stop", "attend_tail", "profile", "policy", "entropy_bound", "entropy_decay", "seed",
)  # fmt: skip
# Further arguments of llada2_fast.generate, which belong to a call.
_OF_A_CALL = ("generator", "progress", "settle", "graphs", "regex", "json_schema", "choices")
# What is honoured of transformers' own settings; bos_token_id: of no use where a prompt may be empty.
_HONOURED = (
    "max_new_tokens", "max_length", "max_time", "stop_strings", "do_sample", "temperature", "top_k", "top_p",
    "use_cache", "num_return_sequences", "return_dict_in_generate", "eos_token_id", "pad_token_id", "bos_token_id",
    "mask_token_id", "disable_compile", "transformers_version",
)  # fmt: skip


@dataclass
class LLaDA2GenerateOutput(ModelOutput):
    """What generate() gives under return_dict_in_generate.

    sequences [B, P + G] int64: the prompts as given, then the answers, pad ids after EOS, as wide as the longest;
    tokens_per_forward [B] float32: generated tokens per denoise forward of each row.
    """

    sequences: torch.Tensor
    tokens_per_forward: torch.Tensor | None = None


class LLaDA2GenerationMixin:
    """generate() and what pipelines ask of a model that has it, over LLaDA2Model.generate."""

    def can_generate(self):
        return True

    def generate(self, inputs=None, generation_config=None, *, input_ids=None, attention_mask=None,
                 decoder_input_ids=None, stopping_criteria=None, streamer=None, tokenizer=None, **kwargs):  # fmt: skip
        """Continue prompts, by transformers' convention.

        inputs or input_ids: ids [B, P], None = one empty prompt; attention_mask [B, P]: 0 at padding, on either side;
        without it every position counts. Settings come from kwargs, else generation_config, else the model's own, which
        holds what the checkpoint's generation_config.json says:
        - lengths: max_new_tokens (the cards' gen_length; 2048 if nothing is said) or max_length = P + max_new_tokens;
          of both in one place the former counts;
        - do_sample with temperature (1.0), top_k, top_p (off); a temperature above 0 without do_sample samples, too;
          num_return_sequences answers in a row per prompt. Nothing said = greedy;
        - eos_token_id, pad_token_id, mask_token_id (eos_id, pad_id, mask_id); max_time in s, after which rows end with
          their block; stop_strings (with tokenizer), use_cache, return_dict_in_generate;
        - block_length, steps, threshold, editing_threshold, max_post_steps, edit_window, minimal_topk, num_to_transfer,
          attend_tail, profile, policy, entropy_bound, entropy_decay, seed, eos_early_stop (here True but under the hf
          profiles; see DecodeParams);
        - kwargs alone: generator, progress, settle, graphs; with tokenizer regex, json_schema, choices (see
          llada2_fast.generate).
        decoder_input_ids: what is given of the answers, int64 [B, G], or [G] for all prompts, the mask id in gaps;
        answers are then as long, whatever max_new_tokens says (canvas, see llada2_fast.generate).
        stopping_criteria: asked with (ids [1, n], None) for each row and each of its tokens in order, as soon as their
        block is final; the row ends with the first token they stop at. streamer, for one row: put(the prompt [1, P]),
        put(the tokens of each block that has become final, [1, n]; under hf-2.0 all at the end, since that card may cut
        earlier blocks), put_draft(value=the best guess of the open block, [1, n]) after every step where it has that,
        end() always, also on errors.

        Returns int64 [B, P + G], or a LLaDA2GenerateOutput. Raises ValueError naming any other argument or setting that
        is not at its neutral value, before any forward; otherwise as llada2_fast.generate.
        """
        try:
            config, rest = self._prepare_generation_config(generation_config, **kwargs)
            _refuse_unsupported(config, rest)
            prompt, mask = _prompts(inputs, input_ids, attention_mask, config)
            rest |= {"canvas": _canvas(decoder_input_ids, prompt, config), "tokenizer": tokenizer}
            criteria = _criteria(stopping_criteria, config, tokenizer)
            observer = _Observer(prompt, criteria, config.max_time, streamer)
            return self._decode(prompt, mask, config, rest, observer)
        finally:
            if streamer is not None:
                streamer.end()  # also where nothing came of it: somebody may be waiting at the other end

    def _decode(self, prompt, mask, config, call, observer):
        arguments = {name: getattr(config, name, None) for name in (*_SETTINGS, "use_cache")}
        arguments |= {name: call.get(name) for name in (*_OF_A_CALL, "canvas", "tokenizer")}
        if arguments["eos_early_stop"] is None:
            profile = DecodeParams.profile if arguments["profile"] is None else arguments["profile"]
            arguments["eos_early_stop"] = not PROFILES[choice("profile", profile, tuple(PROFILES))].card
        if config.do_sample:
            arguments["temperature"] = 1.0 if config.temperature is None else config.temperature
            arguments |= {"top_k": config.top_k, "top_p": config.top_p}
        output = super().generate(
            prompt,
            attention_mask=mask,
            gen_length=_new_tokens(config, prompt),
            eos_id=tuple(config.eos_token_id) if isinstance(config.eos_token_id, list) else config.eos_token_id,
            mask_id=getattr(config, "mask_token_id", None),
            pad_id=config.pad_token_id,
            return_dict=True,
            on_step=observer if observer.needed else None,
            **{name: value for name, value in arguments.items() if value is not None},
        )
        answers = output.sequences[:, : max(output.num_tokens)]
        sequences = torch.cat([prompt.to(answers.device), answers], 1)
        if not config.return_dict_in_generate:
            return sequences
        costs = zip(output.num_tokens, output.counters, strict=True)
        rates = [tokens / max(1, counters.denoise_forwards) for tokens, counters in costs]
        return LLaDA2GenerateOutput(sequences, torch.tensor(rates, dtype=torch.float32, device=sequences.device))

    def default_generation_config(self, said):
        """The model's generation config: what the checkpoint's own says, and its special ids; greedy if it is silent.

        A setting that generate() does not know stays in it, and generate() refuses it there. A pipeline has defaults of
        its own, sampling at 0.7, for what is None here.
        """
        config = GenerationConfig(do_sample=False, temperature=1.0)
        unknown = _override(config, _settings(said))
        eos = self.special_ids.get("eos_token_id", ())
        ids = {**self.special_ids, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
        config.update(**unknown, **ids, defaults_only=True, allow_custom_entries=True)
        return config

    def _prepare_generation_config(self, generation_config=None, **kwargs):
        """(the settings of a call, the kwargs that are no settings); pipelines call it by this name."""
        config = copy.deepcopy(self.generation_config)
        if generation_config is not None:
            if not isinstance(generation_config, GenerationConfig):
                name = type(generation_config).__name__
                raise ValueError(f"generation_config: {name}: expected a transformers.GenerationConfig")
            config.update(**_override(config, _settings(generation_config)), allow_custom_entries=True)
        return config, _override(config, kwargs)


def _settings(config):
    """What a GenerationConfig sets."""
    return {k: v for k, v in config.to_dict().items() if v is not None and k[0] != "_" and k != "transformers_version"}


def _override(config, settings):
    """Set in `config` what `settings` say, in transformers' names or the cards'. Returns those that are none."""
    settings = dict(settings)
    for card_name, name in _CARD_NAMES.items():
        if card_name in settings:
            if settings.get(name) is not None:
                raise ValueError(f"{card_name}={settings[card_name]!r:.80}: give it or {name}, not both")
            settings[name] = settings.pop(card_name)
    if settings.get("max_length") is not None:
        settings.setdefault("max_new_tokens", None)
    if settings.get("temperature") is not None and settings.get("do_sample") is None:
        settings["do_sample"] = settings["temperature"] != 0
    if settings.get("temperature") == 0 and not settings.get("do_sample"):
        settings["temperature"] = None  # the cards' way to say greedy, of which transformers would warn
    for name in (*_SETTINGS, "mask_token_id"):
        if name in settings:
            setattr(config, name, settings.pop(name))
    return config.update(**settings)


def _refuse_unsupported(config, call):
    """ValueError for the first setting or argument that would do something we do not do."""
    asked = {name: value for name, value in config.to_dict().items() if name not in (*_HONOURED, *_SETTINGS)}
    asked |= {name: value for name, value in call.items() if name not in _OF_A_CALL}
    for name, value in asked.items():
        neutral = value is False or is_neutral(name, value, GENERATING)
        if not neutral and name[0] != "_":
            allowed = ", ".join((*_HONOURED, *_SETTINGS, *_OF_A_CALL))
            raise ValueError(f"{name}={value!r:.80}: not supported by LLaDA2's generate(); expected one of {allowed}")
    if config.do_sample and config.temperature == 0:
        raise ValueError("temperature=0: do_sample=True needs one above 0; greedy is do_sample=False")


def _prompts(inputs, input_ids, attention_mask, config):
    """(ids [B * num_return_sequences, P], mask or None)."""
    if inputs is not None and input_ids is not None:
        raise ValueError("input_ids: give it or inputs, not both")
    ids = input_ids if inputs is None else inputs
    ids = torch.empty(1, 0, dtype=torch.int64, device="cpu") if ids is None else ids
    if not isinstance(ids, (torch.Tensor, np.ndarray)) or ids.ndim != 2 or not len(ids):
        got = list(getattr(ids, "shape", ())) or type(ids).__name__
        raise ValueError(f"inputs: a tensor [B, P] of token ids expected, got {got}")
    ids = token_ids("inputs", ids)
    mask = None if attention_mask is None else padding_mask(attention_mask, ids.shape)
    copies = _copies(config)
    if type(copies) is not int or copies < 1:  # that several are sampled is for GenerationConfig to see to
        raise ValueError(f"num_return_sequences={copies!r:.80}: expected an integer >= 1")
    if copies == 1:
        return ids, mask
    return ids.repeat_interleave(copies, 0), mask if mask is None else mask.repeat_interleave(copies, 0)


def _copies(config):
    return 1 if config.num_return_sequences is None else config.num_return_sequences


def _canvas(ids, prompt, config):
    """decoder_input_ids as a canvas of generate(), with that of each row where there are several."""
    if ids is None:
        return None
    copies = _copies(config)
    rows = len(prompt) // copies
    if (
        not isinstance(ids, (torch.Tensor, np.ndarray))
        or ids.ndim not in (1, 2)
        or (ids.ndim == 2 and len(ids) != rows)
    ):
        got = list(getattr(ids, "shape", ())) or type(ids).__name__
        raise ValueError(f"decoder_input_ids: a tensor [{rows}, G] or [G] of token ids expected, got {got}")
    ids = token_ids("decoder_input_ids", ids)
    return ids if ids.ndim == 1 else ids.repeat_interleave(copies, 0)


def _new_tokens(config, prompt):
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    if config.max_length is None:
        return DecodeParams.gen_length
    room = config.max_length - prompt.shape[1]
    if room < 1:
        raise ValueError(f"max_length={config.max_length}: expected more than the prompt's {prompt.shape[1]} tokens")
    return room


def _criteria(given, config, tokenizer):
    criteria = StoppingCriteriaList(given or ())
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={config.stop_strings!r:.80}: needs the argument tokenizer")
        with torch.device("cpu"):  # transformers leaves its table to PyTorch's default, which need not hold data
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
    return criteria


class _Observer:
    """Follows the rows step by step: asks the stopping criteria about what has become final, and streams it."""

    def __init__(self, prompt, criteria, max_time, streamer):
        self.prompt, self.criteria, self.streamer = prompt, criteria, streamer
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.asked = [0] * len(prompt)  # generated tokens of each row that the criteria have seen
        self.sent = 0
        self.open = set(range(len(prompt)))
        self.needed = bool(criteria) or max_time is not None or streamer is not None
        if streamer is None:
            return
        if len(prompt) > 1:
            raise ValueError(f"streamer: expected one row, not {len(prompt)}: they do not grow in step")
        if getattr(streamer, "_takes_logits", False):
            raise ValueError("streamer: expected one that takes the ids of drafts; their logits are not kept")
        streamer.put(prompt.cpu())

    def __call__(self, decoder: BlockDecoder, result: StepResult):
        """A step has been taken; rows are in the lanes of their numbers."""
        for lane in sorted(self.open):
            sequence = decoder.sequences[lane]
            if hasattr(self.streamer, "put_draft"):
                self.streamer.put_draft(value=_draft(decoder, sequence, result.output.token[lane])[None].cpu())
            if sequence.phase is Phase.DECODE:
                continue
            final = self._stop(decoder.lanes.device, sequence)
            # hf-2.0 may return early and then cut at an EOS of the prompt: only its last word is final
            if self.streamer is not None and (sequence.finished or not sequence.params.traits.cuts_canvas):
                if len(final) > self.sent:
                    self.streamer.put(torch.tensor([final[self.sent :]], dtype=torch.int64, device="cpu"))
                self.sent = len(final)
            if sequence.finished:
                self.open.remove(lane)

    def _stop(self, device, sequence):
        """End a row where a criterion says so or time is up. Returns what is final of its answer now."""
        kept = sequence.num_kept_blocks * sequence.block_length - sequence.prompt_length
        final = sequence.answer()[: max(0, kept)]
        old, self.asked[sequence.lane] = self.asked[sequence.lane], len(final)
        end = None
        if self.criteria:
            new = torch.tensor(final, dtype=torch.int64, device="cpu").to(device)
            ids = torch.cat([self.prompt[sequence.lane].to(device), new])[None]
            begin = ids.shape[1] - len(final)
            lengths = range(old + 1, len(final) + 1)
            end = next((n for n in lengths if self.criteria(ids[:, : begin + n], None).all()), None)
        if end is None and self.deadline is not None and time.monotonic() > self.deadline:
            end = len(final)
        if end:
            sequence.stop(end)
        return final[:end]


def _draft(decoder: BlockDecoder, sequence: Sequence, candidates: torch.Tensor) -> torch.Tensor:
    """The generated part of a row's block, int64 [n], with the last step's candidates [L] where masks are, unless
    tokens have moved since."""
    tokens = decoder.lanes.state.tokens[sequence.lane]
    if sequence.moves:
        return tokens[sequence.generated]
    guess = torch.where((tokens == decoder.lanes.mask_id) & (candidates >= 0), candidates, tokens)
    return guess[sequence.generated]
