"""BlockRefinementScheduler: diffusers' class of that name, over the one refinement step of kernels/refine.py.

Mask mode is kernels/refine.py's rule. Uniform mode (no mask token) is this file's own: see `_uniform_step`.
Source of the interface: diffusers 0.42.1, schedulers/scheduling_block_refinement.py. diffusers itself is not needed.
"""

import json
import math
import os
import warnings
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch

from ...config import SAMPLING_METHODS, as_float32, as_temperature, habits, parse_json
from ...decoding.inputs import check_temperature, checked_sampling, checked_thresholds, row_seeds, sharpened
from ...kernels import refine
from ...kernels.refine import BlockState, RefineParams, SpecialIds, refine_step
from ...model import seen_block_length
from ...outputs import Output
from ...weights import checkpoint

_MOST_STEPS = 2**20  # of a schedule, which is a tensor
_NO_STEPS = 2**30  # as RefineParams.steps: the built-in quota is then at most one, ours comes as min_transfer


@dataclass(eq=False)
class BlockRefinementSchedulerOutput(Output):
    """What a step did; [R, L] unless said otherwise.

    prev_sample: the block after the step, int64; transfer_index, editing_transfer_index: what was committed and edited,
    bool; sampled_tokens, sampled_probs: the candidates, int64, and their confidences, float32; pred_logits: the step's
    model_output [R, L, V].
    """

    prev_sample: torch.Tensor
    transfer_index: torch.Tensor
    editing_transfer_index: torch.Tensor
    sampled_tokens: torch.Tensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor


class SchedulerConfig(dict):
    """Read-only settings, by key and by attribute. `scheduler.register_to_config` makes changed ones."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(f"the scheduler's config has no {name!r:.80}: expected one of {sorted(self)}")
        return self[name]

    def __reduce__(self):
        return type(self), (dict(self),)

    def _frozen(self, *args, **kwargs):
        raise TypeError("a scheduler's config is read-only: use scheduler.register_to_config(...)")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _frozen
    update = setdefault = pop = popitem = clear = _frozen


class BlockRefinementScheduler:
    """Commit by confidence, block by block.

    block_length, num_inference_steps: the commit schedule before `set_timesteps`; threshold: commit above it;
    editing_threshold: edit above it, None, 0 and less = off; minimal_topk: least commits per step.
    ValueError for values out of range.
    """

    config_name = "scheduler_config.json"
    order = 1

    def __init__(self, block_length=32, num_inference_steps=32, threshold=0.95, editing_threshold=None, minimal_topk=1):
        self.register_to_config(
            block_length=block_length, num_inference_steps=num_inference_steps, threshold=threshold,
            editing_threshold=editing_threshold, minimal_topk=minimal_topk,
        )  # fmt: skip
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device="cpu")
        self._transfer_schedule = None
        self._committed = None  # uniform mode: bool [R, L], what is committed of the present block
        self._warned = False

    # settings

    @property
    def config(self):
        return self._config

    def register_to_config(self, **settings):
        """Replace some settings. ValueError for values out of range."""
        config = SchedulerConfig({**getattr(self, "_config", {}), **settings})
        for name in ("block_length", "num_inference_steps"):
            _positive(name, config[name], _MOST_STEPS)
        _positive("minimal_topk", config["minimal_topk"])
        checked_thresholds(config["threshold"], config["editing_threshold"])
        self._config = config

    def to_json_string(self):
        """The contents of scheduler_config.json, as diffusers reads them too."""
        return json.dumps({"_class_name": type(self).__name__, **self.config}, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory):
        """Write scheduler_config.json into a folder, made if need be."""
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, self.config_name).write_text(self.to_json_string(), encoding="utf-8")

    save_pretrained = save_config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """The settings in the scheduler_config.json of a folder or hub id, a dict.

        kwargs: as of LLaDA2Model.from_pretrained, from torch_dtype on. OSError if there is no such file,
        CheckpointError if there is no such folder or hub id, ValueError naming an argument that cannot be honoured.
        """
        hub, others = habits.split_hub(kwargs)
        habits.refuse("from_pretrained", others, habits.NO_WEIGHTS | {"return_unused_kwargs": (False,)})
        folder = checkpoint.resolve(pretrained_model_name_or_path, subfolder=subfolder, patterns=("*.json",), **hub)
        path = folder / cls.config_name
        if not path.is_file():
            raise OSError(f"Error no file named {cls.config_name} found in directory {path.parent}.")
        return parse_json(path.read_bytes(), path)

    @classmethod
    def from_config(cls, config, **kwargs):
        """A scheduler with the settings of a config (a mapping), those in kwargs replaced.

        Keys of other schedulers are left out with a warning, as diffusers does: its schedulers share config files.
        """
        if not isinstance(config, dict):
            raise ValueError(f"config: a mapping expected, got {type(config).__name__}")
        own = cls().config
        foreign = sorted(key for key in config if key not in own and not key.startswith("_"))
        if foreign:
            warnings.warn(f"{cls.__name__} does not know the config attributes {foreign}: left out", stacklevel=2)
        return cls(**{key: value for key, value in config.items() if key in own} | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """A scheduler with the settings that `load_config` finds, those in kwargs replaced; other kwargs are its."""
        settings = {name: kwargs.pop(name) for name in cls().config if name in kwargs}
        return cls.from_config(cls.load_config(pretrained_model_name_or_path, subfolder, **kwargs), **settings)

    # schedule

    def set_timesteps(self, num_inference_steps, device=None, block_length=None):
        """Spread the commits of a block (default: the config's block_length) over num_inference_steps steps."""
        _positive("num_inference_steps", num_inference_steps, _MOST_STEPS)
        block_length = self.config.block_length if block_length is None else block_length
        _positive("block_length", block_length)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device or "cpu")
        self._transfer_schedule = self.get_num_transfer_tokens(block_length, num_inference_steps).to(device or "cpu")
        self._committed = None

    def get_num_transfer_tokens(self, block_length, num_inference_steps):
        """int64 [num_inference_steps]: block_length commits spread evenly, the first steps take what is left over."""
        if num_inference_steps <= 0:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        steps = torch.arange(num_inference_steps, device="cpu")
        return block_length // num_inference_steps + (steps < block_length % num_inference_steps).long()

    # one step

    def step(
        self, model_output, timestep, sample, *, mask_token_id=None, temperature=0.0, top_p=None, top_k=None,
        sampling_method="auto", threshold=None, editing_threshold=None, minimal_topk=None, prompt_mask=None,
        generator=None, return_dict=True,
    ):  # fmt: skip
        """One refinement step of R blocks, each by itself.

        model_output: logits [R, L, V], any float dtype; timestep: the step's number in the block, from 0, an int;
        sample: int64 [R, L], unchanged; mask_token_id: None = uniform mode; threshold, editing_threshold, minimal_topk:
        None = the config's; prompt_mask: bool [L] or [R, L], True = never written (mask mode); generator: one
        torch.Generator, or one per row.
        A drawn token's confidence is its probability after temperature and filters, as in diffusers, of which the first
        step warns that has a temperature below 1, top_k or top_p.
        Returns BlockRefinementSchedulerOutput, or its six fields as a tuple. Raises ValueError on bad arguments,
        RuntimeError where logits hold NaN or infinity. Warns if logits are a slice of what our model gave for blocks of
        another length.
        """
        config = self.config
        threshold = config.threshold if threshold is None else threshold
        editing_threshold = config.editing_threshold if editing_threshold is None else editing_threshold
        minimal_topk = config.minimal_topk if minimal_topk is None else minimal_topk
        step_index = _step_index(timestep)
        _check_blocks(model_output, sample, prompt_mask)
        _check_block_length(model_output, sample)
        threshold, editing_threshold = checked_thresholds(threshold, editing_threshold)
        _positive("minimal_topk", minimal_topk)
        sampling = checked_sampling(temperature, top_k, top_p)
        _check_method(sampling_method)
        if editing_threshold is not None and editing_threshold <= 0:
            editing_threshold = None
        if sampling_method == "greedy":
            sampling["temperature"] = 0.0
        if not self._warned and (warning := sharpened(**sampling)):
            self._warned = True
            warnings.warn(warning, stacklevel=2)
        if mask_token_id is None:
            fields = self._uniform_step(
                model_output, step_index, sample, threshold, editing_threshold, sampling, generator
            )
        else:
            quota = self._quota(step_index, minimal_topk).to(sample.device, torch.int32)
            fields = _mask_step(
                model_output, step_index, sample, mask_token_id, quota, threshold, editing_threshold, sampling,
                prompt_mask, generator,
            )  # fmt: skip
        fields = (*fields, model_output)
        return BlockRefinementSchedulerOutput(*fields) if return_dict else fields

    def _quota(self, step_index, minimal_topk):
        """int64 []: the least commits of a step."""
        schedule = self._transfer_schedule
        if schedule is None:
            schedule = self.get_num_transfer_tokens(self.config.block_length, self.num_inference_steps)
        return schedule[min(step_index, len(schedule) - 1)].clamp(min=min(minimal_topk, _NO_STEPS))

    def _uniform_step(self, logits, step_index, sample, threshold, editing_threshold, sampling, generator):
        """No mask token: what is committed is remembered in `_committed`, the rest is drawn anew uniformly.

        commit  what is not committed and among the `needed` most confident (ties: lowest position), or p > threshold;
                needed = max(0, ceil((t + 1) L / steps) - committed)
        edit    what is committed, c != x and p > editing_threshold
        """
        if step_index == 0 or self._committed is None or self._committed.shape != sample.shape:
            self._committed = torch.zeros_like(sample, dtype=torch.bool)
        committed = self._committed
        candidates, confidence = self._sample_from_logits(
            logits, **sampling, generator=generator, use_multinomial=sampling["temperature"] > 0
        )
        _raise_on_error(~torch.isfinite(confidence).all(-1), step_index)
        owed = -(-(step_index + 1) * sample.shape[1] // self.num_inference_steps)
        needed = (owed - committed.sum(-1, keepdim=True)).clamp(min=0)
        ranked = confidence.masked_fill(committed, float("-inf"))
        rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        commit = ~committed & ((rank < needed) | (confidence > threshold))
        edit = torch.zeros_like(commit)
        if editing_threshold is not None:
            edit = committed & (candidates != sample) & (confidence > editing_threshold)
        tokens = torch.where(commit | edit, candidates, sample)
        self._committed = committed | commit
        tokens = torch.where(self._committed, tokens, _noise(sample, logits, generator))
        return tokens, commit, edit, candidates, confidence

    # sampling, as plain functions of logits [..., V]

    @staticmethod
    def _top_k_filtering(logits, top_k):
        """Logits below the k-th largest become the dtype's least value; ties at the k-th are kept."""
        if top_k is None or top_k <= 0 or top_k >= logits.shape[-1]:
            return logits
        least = torch.topk(logits, top_k, dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)

    @staticmethod
    def _top_p_filtering(logits, top_p):
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

    @staticmethod
    def _sample_from_logits(logits, *, temperature, top_k, top_p, generator, use_multinomial):
        """(token, its probability after temperature and filters), [...] int64 and float32, by torch.multinomial."""
        temperature = check_temperature(temperature)
        if temperature == 0.0 or not use_multinomial:
            probability = torch.softmax(logits.float(), dim=-1)
            token = logits.argmax(dim=-1)
        else:
            scaled = logits / max(temperature, 1e-30)  # below that quotients leave float32
            filtered = BlockRefinementScheduler._top_k_filtering(scaled, top_k)
            filtered = BlockRefinementScheduler._top_p_filtering(filtered, top_p)
            probability = torch.softmax(filtered.float(), dim=-1)
            token = _multinomial(probability, generator)
        return token, probability.gather(-1, token[..., None])[..., 0]

    # what a loop asks after a step

    @staticmethod
    def check_eos_finished(
        cur_x, sampled_tokens, final_transfer, finished, eos_token_id, mask_token_id, prompt_length
    ):  # fmt: skip
        """bool [R]: rows that are finished, or now hold an EOS in the generated part with no mask before it.

        cur_x: int64 [R, S], prompt_length of them prompt; finished: bool [R]. sampled_tokens and final_transfer are
        not looked at: an EOS may resolve later than it is committed.
        """
        generated = cur_x[:, prompt_length:]
        eos = torch.as_tensor(eos_token_id, dtype=torch.int64, device=cur_x.device)
        mask_before = (generated == mask_token_id).cumsum(-1) > 0
        return finished | (torch.isin(generated, eos) & ~mask_before).any(-1)

    def check_block_should_continue(
        self, step_idx, masks_remaining, editing_enabled, editing_transfer_index, post_steps, max_post_steps, finished
    ):  # fmt: skip
        """bool: whether a block needs another step. step_idx: steps done; post_steps: mask-free ones among them."""
        if finished.all():
            return False
        if masks_remaining:
            return step_idx < self.num_inference_steps
        return bool(editing_enabled and post_steps <= max_post_steps and editing_transfer_index.any())

    # training

    def add_noise(
        self, original_samples, attention_mask, *, prompt_length, block_length, mask_token_id, generator=None
    ):  # fmt: skip
        """Two noisy copies of clean tokens for training: what one masks the other shows.

        original_samples, attention_mask: int64 [B, S]. Of every block after the prompt a fraction drawn for the row and
        the block is masked. Returns noisy, noisy_rev (int64) and masked, masked_rev (bool), all [B, S].
        """
        _positive("block_length", block_length)
        batch, size = original_samples.shape
        device = original_samples.device
        valid = attention_mask.bool()
        masked = torch.zeros_like(valid)
        masked_rev = torch.zeros_like(valid)
        for begin in range(prompt_length, size, block_length):
            block = slice(begin, min(size, begin + block_length))
            fraction = torch.rand((batch, 1), dtype=torch.float32, device=device, generator=generator)
            shape = batch, block.stop - begin
            draws = torch.rand(shape, dtype=torch.float32, device=device, generator=generator)
            masked[:, block] = (draws < fraction) & valid[:, block]
            masked_rev[:, block] = (draws >= fraction) & valid[:, block]
        noisy = original_samples.masked_fill(masked, mask_token_id)
        noisy_rev = original_samples.masked_fill(masked_rev, mask_token_id)
        return noisy, noisy_rev, masked, masked_rev


def _mask_step(
    logits, step_index, sample, mask_id, quota, threshold, editing_threshold, sampling, prompt_mask, generator
):  # fmt: skip
    """kernels/refine.py's step on fresh blocks. quota: int32 []; other arguments as in step, checked."""
    rows, device = len(sample), sample.device

    def per_row(value, dtype=torch.int32):
        return torch.full((rows,), value, dtype=dtype, device=device)

    temperature, top_k, top_p = sampling.values()
    seeds = row_seeds(None, generator, rows) if temperature > 0 else [0] * rows
    editing = editing_threshold is not None
    params = RefineParams(
        temperature=per_row(as_temperature(temperature), torch.float32),
        top_k=per_row(min(max(top_k or 0, 0), logits.shape[-1])),
        top_p=per_row(1.0 if top_p is None else top_p, torch.float32),
        seed=torch.tensor(seeds, dtype=torch.int64, device=device),
        threshold=per_row(as_float32(threshold), torch.float32),
        edit_threshold=per_row(as_float32(editing_threshold) if editing else 0.0, torch.float32),
        steps=per_row(_NO_STEPS),
        min_transfer=quota.expand(rows).contiguous(),
        max_steps=per_row(_NO_STEPS),
        max_post_steps=per_row(_NO_STEPS),
        flags=per_row(refine.BAN_MASK | (refine.EDITING if editing else 0)),
        eos_ids=torch.full((rows, 1), -1, dtype=torch.int64, device=device),
    )
    kind = torch.full_like(sample, refine.GENERATED, dtype=torch.int8)
    if prompt_mask is not None:
        kind.masked_fill_(prompt_mask.to(device).bool(), refine.PROMPT)
    state = BlockState.fresh(sample.clone(), kind, per_row(0, torch.int64))
    state.step.fill_(step_index)
    output = refine_step(logits, state, params, SpecialIds(mask_id))
    _raise_on_error((output.status[:, refine.FLAGS] & refine.ERROR) != 0, step_index)
    return state.tokens, output.commit, output.edit, output.token, output.confidence


def _positive(name, value, most=math.inf):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be an integer, got {value!r:.80}.")
    if value <= 0:
        raise ValueError(f"`{name}` must be > 0, got {value}.")
    if value > most:
        raise ValueError(f"`{name}` must be <= {most}, got {value!r:.80}.")


def _check_method(sampling_method):
    if not isinstance(sampling_method, str) or sampling_method not in SAMPLING_METHODS:
        allowed = "{'auto','greedy','multinomial'}"
        raise ValueError(f"`sampling_method` must be one of {allowed}, got {sampling_method!r:.80}.")


def _step_index(timestep):
    try:
        index = int(timestep)
    except (TypeError, ValueError, OverflowError):
        index = -1
    if index < 0:
        raise ValueError(f"`timestep` must be >= 0, got {timestep!r:.80}.")
    if index > _NO_STEPS:
        raise ValueError(f"`timestep` must be <= {_NO_STEPS}, got {timestep!r:.80}.")
    return index


def _check_blocks(logits, sample, prompt_mask):
    if sample.ndim != 2 or sample.dtype != torch.int64:
        raise ValueError(f"`sample` must be int64 [R, L], got {sample.dtype} {list(sample.shape)}.")
    if logits.ndim != 3 or logits.shape[:2] != sample.shape:
        raise ValueError(f"`model_output` must be {[*sample.shape, 'V']}, got {list(logits.shape)}.")
    if prompt_mask is not None and prompt_mask.shape not in (sample.shape[1:], sample.shape):
        expected = f"{list(sample.shape[1:])} or {list(sample.shape)}"
        raise ValueError(f"`prompt_mask` must be {expected}, got {list(prompt_mask.shape)}.")


def _check_block_length(logits, sample):
    """Warn if our model saw other blocks than the sample: whoever calls both may have asked neither for its length."""
    length = seen_block_length(logits)
    if length not in (None, sample.shape[1]):
        warnings.warn(
            f"block_length: a block of {sample.shape[1]} to a model of {length}: expected "
            f"BlockRefinementScheduler(block_length={length}), and calls that name no other",
            stacklevel=3,
        )


def _raise_on_error(error, step_index):
    if error.any():
        row = int(error.to(torch.uint8).argmax())
        raise RuntimeError(f"row {row}: logits hold NaN or infinity at step {step_index}")


def _multinomial(probability, generator):
    """One draw from each distribution [..., V]; with a list of generators, each row from its own."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(probability):
            raise ValueError(f"generator={generator!r:.80}: expected one, or one for each of {len(probability)} rows")
        return torch.stack([_multinomial(p, g) for p, g in zip(probability, generator, strict=True)])
    flat = probability.reshape(-1, probability.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probability.shape[:-1])


def _noise(sample, logits, generator):
    """Uniformly random ids, int64 [R, L]."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([_noise(row[None], logits, g) for row, g in zip(sample, generator, strict=True)])
    return torch.randint(logits.shape[-1], sample.shape, device=sample.device, generator=generator)
