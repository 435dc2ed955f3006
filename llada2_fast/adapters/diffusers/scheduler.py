"""BlockRefinementScheduler: diffusers' class of that name, over the one refinement step of kernels/refine.py.

Mask mode is in masked.py, uniform mode (no mask token) in uniform.py.
Source of the interface: diffusers 0.42.1, schedulers/scheduling_block_refinement.py. diffusers itself is not needed.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ...config import habits, parse_json
from ...decoding.inputs import checked_sampling, checked_thresholds, sharpened
from ...outputs import Output
from ...weights import checkpoint
from .checks import (
    NO_STEPS,
    check_block_length,
    check_blocks,
    check_method,
    check_positive,
    check_timestep,
)
from .masked import mask_step
from .uniform import sample_from_logits, top_k_filtering, top_p_filtering, uniform_step

_MOST_STEPS = 2**20  # of a schedule, which is a tensor


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
            check_positive(name, config[name], _MOST_STEPS)
        check_positive("minimal_topk", config["minimal_topk"])
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
        check_positive("num_inference_steps", num_inference_steps, _MOST_STEPS)
        block_length = self.config.block_length if block_length is None else block_length
        check_positive("block_length", block_length)
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

        model_output: logits [R, L, V], any float dtype.
        timestep: the step's number in the block, from 0, an int.
        sample: int64 [R, L], unchanged.
        mask_token_id: None = uniform mode.
        temperature: 0 = greedy. A drawn token's confidence is its probability after temperature and filters, as in
            diffusers, of which the first step warns that has a temperature below 1, top_k or top_p.
        top_p, top_k: what a draw is among; None = all tokens.
        sampling_method: "auto", "greedy" or "multinomial"; auto draws where the temperature is above 0.
        threshold, editing_threshold, minimal_topk: None = the config's.
        prompt_mask: bool [L] or [R, L], True = never written (mask mode).
        generator: one torch.Generator, or one per row.
        return_dict: False = the output's six fields as a tuple.
        Returns BlockRefinementSchedulerOutput, or a tuple. Raises ValueError on bad arguments,
        RuntimeError where logits hold NaN or infinity. Warns if logits are a slice of what our model gave for blocks of
        another length.
        """
        config = self.config
        threshold = config.threshold if threshold is None else threshold
        editing_threshold = config.editing_threshold if editing_threshold is None else editing_threshold
        minimal_topk = config.minimal_topk if minimal_topk is None else minimal_topk
        step_index = check_timestep(timestep)
        check_blocks(model_output, sample, prompt_mask)
        check_block_length(model_output, sample)
        threshold, editing_threshold = checked_thresholds(threshold, editing_threshold)
        check_positive("minimal_topk", minimal_topk)
        sampling = checked_sampling(temperature, top_k, top_p)
        check_method(sampling_method)
        if editing_threshold is not None and editing_threshold <= 0:
            editing_threshold = None
        if sampling_method == "greedy":
            sampling["temperature"] = 0.0
        if not self._warned and (warning := sharpened(**sampling)):
            self._warned = True
            warnings.warn(warning, stacklevel=2)
        if mask_token_id is None:
            *fields, self._committed = uniform_step(
                model_output, step_index, self.num_inference_steps, sample, self._committed, threshold,
                editing_threshold, sampling, generator,
            )  # fmt: skip
        else:
            quota = self._quota(step_index, minimal_topk).to(sample.device, torch.int32)
            fields = mask_step(
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
        return schedule[min(step_index, len(schedule) - 1)].clamp(min=min(minimal_topk, NO_STEPS))

    # sampling, as plain functions of logits [..., V]

    _top_k_filtering = staticmethod(top_k_filtering)
    _top_p_filtering = staticmethod(top_p_filtering)
    _sample_from_logits = staticmethod(sample_from_logits)

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
        check_positive("block_length", block_length)
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
