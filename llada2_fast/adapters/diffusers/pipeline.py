"""LLaDA2Pipeline: diffusers' class of that name, over the one refinement loop of decoder.py.

Source of the interface: diffusers 0.42.1, pipelines/llada2/pipeline_llada2.py. diffusers itself is not needed; its
schedulers and PipelineCallback objects are welcome. README lists where results differ on purpose.
"""

import json
import warnings
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ...cache import PagedKVCache
from ...config import MODEL_TYPES, SAMPLING_METHODS, DecodeParams, habits
from ...decoding.decoder import BlockDecoder, CachedForward
from ...decoding.inputs import (
    check_fit,
    check_prompts,
    checked_sampling,
    checked_thresholds,
    row_seeds,
    sharpened,
)  # fmt: skip
from ...kernels import refine
from ...model import LLaDA2Model
from ...outputs import Output
from ...weights import checkpoint
from ...weights.special_tokens import load_tokenizer
from .callbacks import CANDIDATES, TENSORS, rewrite, step_tensors
from .foreign import BlockCausalForward, WindowForward, model_device


@dataclass(eq=False)
class LLaDA2PipelineOutput(Output):
    """sequences: int64 [B, gen_length]; texts: one str per row, None without a tokenizer or with output_type="seq"."""

    sequences: torch.Tensor
    texts: list[str] | None = None


class LLaDA2Pipeline:
    """Text from a diffusion language model, block by block.

    model: our LLaDA2Model (decoded with a cache); another implementation of LLaDA2 (recognised by config.model_type,
    called with a 4D block-causal mask, one row at a time); or anything called as
    `model(ids, attention_mask=, position_ids=).logits`. scheduler: its config gives the default block_length; a warning
    says so if that is not the model's.
    """

    config_name = "model_index.json"
    _callback_tensor_inputs = list(TENSORS)

    def __init__(self, model, scheduler, tokenizer=None):
        self.model, self.scheduler, self.tokenizer = model, scheduler, tokenizer
        self.eos_token_id = getattr(tokenizer, "eos_token_id", None)
        self.mask_token_id = getattr(tokenizer, "mask_token_id", None)
        self._progress_bar_config = {}
        self._num_timesteps = 0
        self._check_block_length()

    def _check_block_length(self, stacklevel=3):
        """Warn of a scheduler with another block length than the model's, which writes well in its own only."""
        model = getattr(self.model, "block_length", None)
        scheduler = getattr(getattr(self.scheduler, "config", None), "block_length", None)
        if None not in (model, scheduler) and model != scheduler:
            warnings.warn(
                f"the scheduler's block_length={scheduler} is not the model's {model}: expected "
                f"BlockRefinementScheduler(block_length={model}), or block_length={model} in each call",
                stacklevel=stacklevel,
            )

    # the parts, and where they are

    @property
    def components(self):
        return {"model": self.model, "scheduler": self.scheduler, "tokenizer": self.tokenizer}

    @property
    def device(self):
        return model_device(self.model)

    _execution_device = device

    @property
    def dtype(self):
        return self.model.dtype

    @property
    def num_timesteps(self):
        """Steps of the last call, if every block took all its num_inference_steps."""
        return self._num_timesteps

    def to(self, *args, silence_dtype_warnings=False, **kwargs):
        """Move the model, as torch.nn.Module.to; returns the pipeline. There are no warnings to be silenced."""
        self.model.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs):
        """Arguments of tqdm for the bars of later calls, e.g. disable=True."""
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable=None, total=None, **kwargs):
        """A tqdm bar with the arguments of set_progress_bar_config; `kwargs` replace them."""
        if iterable is None and total is None:
            raise ValueError("Either `total` or `iterable` has to be defined.")
        return tqdm(iterable, total=total, **{**self._progress_bar_config, **kwargs})

    @classmethod
    def from_pretrained(
        cls, path, *, torch_dtype=None, dtype=None, device=None, device_map=None, model=None, scheduler=None,
        tokenizer=None, progress=True, **kwargs,
    ):  # fmt: skip
        """Load a checkpoint folder or hub id, or one in the layout of save_pretrained (model/, scheduler/, tokenizer/).

        torch_dtype or dtype, device or device_map, kwargs: as of LLaDA2Model.from_pretrained; model, scheduler,
        tokenizer: used in place of the folder's. A folder without a scheduler_config.json gets a scheduler with the
        model's block length. EOS ids are those of the checkpoint, where it names any, else the tokenizer's; progress: a
        bar while weights are read.
        """
        from .scheduler import BlockRefinementScheduler

        hub = habits.loading(kwargs)
        dtype, device = habits.find_dtype(dtype, torch_dtype), habits.find_place(device, device_map)
        folder = checkpoint.resolve(path, **hub, subfolders=True)

        def home(name):
            return folder / name if (folder / name).is_dir() else folder

        if model is None:
            model = LLaDA2Model.from_pretrained(home("model"), dtype, device, progress)
        if tokenizer is None and (home("tokenizer") / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(home("tokenizer"))
        if scheduler is None and (home("scheduler") / BlockRefinementScheduler.config_name).is_file():
            scheduler = BlockRefinementScheduler.from_pretrained(home("scheduler"))
        elif scheduler is None:
            scheduler = BlockRefinementScheduler(block_length=model.block_length)
        pipe = cls(model, scheduler, tokenizer)
        known = getattr(model, "special_ids", {})
        if known.get("eos_token_id"):
            eos = known["eos_token_id"]
            pipe.eos_token_id = eos[0] if len(eos) == 1 else eos
        if pipe.mask_token_id is None:
            pipe.mask_token_id = known.get("mask_token_id")
        return pipe

    def save_pretrained(self, save_directory, safe_serialization=True, max_shard_size=None, **kwargs):
        """Write model/, scheduler/, tokenizer/ (where there is one) and model_index.json, in diffusers' layout.

        max_shard_size: of the model's save_pretrained, None = its default; kwargs: what changes nothing
        (habits.SAVING). ValueError naming any other argument.
        """
        habits.saving(safe_serialization=safe_serialization, **kwargs)
        shards = {} if max_shard_size is None else {"max_shard_size": habits.shard_bytes(max_shard_size)}
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        index = {"_class_name": type(self).__name__}
        for name, part in self.components.items():
            if part is not None:
                part.save_pretrained(folder / name, **(shards if name == "model" else {}))
                index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        index.pop("tokenizer", None)  # we find its folder, and diffusers' class fails where it is listed (0.42.1)
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    # prompts

    def _prepare_input_ids(
        self, *, prompt, messages, input_ids, use_chat_template, add_generation_prompt, chat_template_kwargs,
        attention_mask=None,
    ):  # fmt: skip
        """(ids, attention mask), int64 [B, P], from whichever of the inputs is given. ValueError if they clash."""
        if input_ids is not None:
            input_ids = _check_ids(input_ids)
            if input_ids.ndim == 1:
                input_ids = input_ids[None]
            if attention_mask is None:
                return input_ids, torch.ones_like(input_ids)
            attention_mask = habits.as_tensor("`attention_mask`", attention_mask)
            if attention_mask.ndim == 1:
                attention_mask = attention_mask[None]
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"`attention_mask` shape {tuple(attention_mask.shape)} must match `input_ids` shape "
                    f"{tuple(input_ids.shape)}."
                )
            return input_ids, habits.as_bool(attention_mask).long()
        if attention_mask is not None:
            raise ValueError("`attention_mask` needs `input_ids`: a prompt's own is the tokenizer's.")
        self._check_source(prompt, messages, input_ids)
        with torch.device("cpu"):  # a tokenizer leaves it to PyTorch's default, which need not hold data
            if messages is None and not (use_chat_template and getattr(self.tokenizer, "chat_template", None)):
                encoded = self.tokenizer(prompt, return_tensors="pt", padding=isinstance(prompt, list))
            else:
                if messages is None and isinstance(prompt, str):
                    messages = [{"role": "user", "content": prompt}]
                elif messages is None:
                    messages = [[{"role": "user", "content": text}] for text in prompt]
                batch = {"padding": True} if isinstance(messages[0], (list, tuple)) else {}
                encoded = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_tensors="pt",
                    return_dict=True, **batch, **(chat_template_kwargs or {}),
                )  # fmt: skip
        ids = encoded["input_ids"]
        mask = encoded.get("attention_mask")
        return ids, (torch.ones_like(ids) if mask is None else mask).long()

    def _check_source(self, prompt, messages, input_ids):
        if prompt is None and messages is None and input_ids is None:
            raise ValueError("Provide one of `prompt`, `messages`, or `input_ids`.")
        if prompt is not None and messages is not None:
            raise ValueError("Provide either `prompt` or `messages`, not both.")
        if input_ids is None and self.tokenizer is None:
            raise ValueError("Tokenizer is required when `input_ids` is not provided.")
        for name, value in (("prompt", prompt), ("messages", messages)):
            if isinstance(value, list) and not value:
                raise ValueError(f"`{name}` must not be an empty list.")

    def check_inputs(
        self, prompt, messages, input_ids, gen_length, block_length, num_inference_steps, minimal_topk, threshold,
        sampling_method, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs,
    ):  # fmt: skip
        """ValueError for what diffusers refuses, in its words."""
        self._check_source(prompt, messages, input_ids)
        if input_ids is not None:
            _check_ids(input_ids)
        counts = {
            "gen_length": gen_length, "block_length": block_length, "num_inference_steps": num_inference_steps,
            "minimal_topk": minimal_topk,
        }  # fmt: skip
        for name, value in counts.items():
            if not _is_int(value):
                raise ValueError(f"`{name}` must be an integer, got {value!r:.80}.")
            if value <= 0:
                raise ValueError(f"`{name}` must be > 0, got {value}.")
        checked_thresholds(threshold, None)
        if sampling_method not in SAMPLING_METHODS:
            raise ValueError(
                f"`sampling_method` must be one of {{'auto','greedy','multinomial'}}, got {sampling_method!r:.80}."
            )
        if output_type not in ("seq", "text"):
            raise ValueError(f"`output_type` must be 'seq' or 'text', got {output_type!r:.80}.")
        names = _callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, got {callback_on_step_end!r:.80}.")

    # generation

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        messages=None,
        input_ids=None,
        attention_mask=None,
        use_chat_template=True,
        add_generation_prompt=True,
        gen_length=2048,
        block_length=None,
        num_inference_steps=32,
        temperature=0.0,
        top_p=None,
        top_k=None,
        sampling_method="multinomial",
        threshold=0.7,
        editing_threshold=0.5,
        max_post_steps=16,
        minimal_topk=1,
        eos_early_stop=True,
        eos_token_id=None,
        mask_token_id=None,
        generator=None,
        output_type="text",
        return_dict=True,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=None,
    ):
        """Continue prompts.

        prompt: str or list of str, wrapped as chats where the tokenizer has a template and use_chat_template is True;
        messages: a chat or a list of chats; input_ids: [P] or [B, P], a tensor or array of integers that int64 holds,
        with attention_mask of the same shape (bool, or 1 and 0 = padding, either side). Ids take precedence.
        block_length: None = the scheduler's config's; num_inference_steps: per block; threshold: commit above it (> 1:
        by quota alone); editing_threshold: edit above it, None, 0 and less = off; minimal_topk: least commits per step;
        eos_token_id, mask_token_id: None = the tokenizer's (without one: no EOS, and an error); generator: one
        torch.Generator, or one per row. A drawn token's confidence is its probability after temperature and filters, as
        in diffusers: a call with a temperature below 1, top_k or top_p warns of it.

        callback_on_step_end(pipe, step, timestep, tensors) is called after every step: step counts all steps, timestep
        those of the block that found masks; tensors holds the named ones (callbacks.step_tensors). It may return None,
        or a dict whose "block_x" takes effect (callbacks.rewrite); so does writing into block_x.

        Returns LLaDA2PipelineOutput, or (sequences, texts). With eos_early_stop a row's sequence is filled with the
        pad id (else the EOS id) after its first EOS; texts end there in any case. Raises ValueError on bad arguments
        before any forward, RuntimeError naming row and step where logits hold NaN or infinity.
        """
        names = _callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if block_length is None:
            self._check_block_length(stacklevel=4)  # no_grad is a frame of its own
            block_length = self.scheduler.config.block_length
        self.check_inputs(
            prompt, messages, input_ids, gen_length, block_length, num_inference_steps, minimal_topk, threshold,
            sampling_method, output_type, callback_on_step_end, names,
        )  # fmt: skip
        eos, mask_id = self._special_ids(eos_token_id, mask_token_id)
        sampling = checked_sampling(temperature, top_k, top_p)
        threshold, editing_threshold = checked_thresholds(threshold, editing_threshold)
        off = editing_threshold is None or editing_threshold <= 0
        params = DecodeParams(
            gen_length=gen_length, block_length=block_length, steps=num_inference_steps, **sampling,
            sampling_method=sampling_method, threshold=threshold, editing_threshold=None if off else editing_threshold,
            max_post_steps=max_post_steps, minimal_topk=minimal_topk, eos_early_stop=eos_early_stop, eos_ids=eos,
            mask_id=mask_id, attend_tail=False,
        )  # fmt: skip
        if params.draws and (warning := sharpened(**sampling)):
            warnings.warn(warning, stacklevel=3)  # torch.no_grad lies between
        ids, prompt_mask = self._prepare_input_ids(
            prompt=prompt, messages=messages, input_ids=input_ids, attention_mask=attention_mask,
            use_chat_template=use_chat_template, add_generation_prompt=add_generation_prompt, chat_template_kwargs=None,
        )  # fmt: skip
        device = self._execution_device
        decoder = self._open(ids.to(device), prompt_mask.to(device), params, generator, bool(CANDIDATES & {*names}))
        self.scheduler.set_timesteps(num_inference_steps, device=device, block_length=block_length)
        self._num_timesteps = num_inference_steps * max(row.num_blocks - row.first_block for row in decoder.rows)

        pad = getattr(self.tokenizer, "pad_token_id", None)
        pad = next(i for i in (pad, *eos, mask_id) if i is not None)
        self._refine(decoder, params, callback_on_step_end, names, pad)

        answers = [row.output(eos) for row in decoder.rows]
        sequences = torch.stack([row.canvas[row.prompt_length : row.total] for row in decoder.rows])
        if eos_early_stop:
            for sequence, answer in zip(sequences, answers, strict=True):
                sequence[len(answer) :] = pad
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return LLaDA2PipelineOutput(sequences, texts) if return_dict else (sequences, texts)

    def _special_ids(self, eos, mask):
        """(EOS ids, mask id): the call's, else the tokenizer's. ValueError without a mask id."""
        eos = self.eos_token_id if eos is None else eos
        mask = self.mask_token_id if mask is None else mask
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if mask is None:
            raise ValueError("`mask_token_id` must be provided (or available on the tokenizer).")
        if not _is_int(mask) or mask < 0:
            raise ValueError(f"`mask_token_id` must be a token id, got {mask!r:.80}.")
        if not all(_is_int(i) for i in eos):
            raise ValueError(f"`eos_token_id` must be a token id, several or None, got {eos!r:.80}.")
        return eos, mask

    def _open(self, ids, prompt_mask, params, generator, all_logits):
        """A decoder with one row per prompt; all checks that need prompts or model are done first."""
        if not len(ids):
            raise ValueError("`input_ids` must hold at least one row, got none.")
        model, length = self.model, params.block_length
        config = getattr(model, "config", None)
        own = isinstance(model, LLaDA2Model)
        padded = not own and getattr(config, "model_type", None) not in MODEL_TYPES
        prompts = list(ids) if padded else [row[keep] for row, keep in zip(ids, prompt_mask.bool(), strict=True)]
        vocab_size = getattr(config, "vocab_size", None)
        positions = getattr(config, "max_position_embeddings", None)
        check_prompts(prompts, params.gen_length, vocab_size, positions, "`input_ids`")
        if vocab_size is not None and params.mask_id >= vocab_size:
            raise ValueError(f"`mask_token_id` must be in 0..{vocab_size - 1}, got {params.mask_id}.")
        if own:
            check_fit(config, prompts, params)
            pages = sum(-(-(len(p) + params.gen_length) // length) for p in prompts)
            forward = CachedForward(model, PagedKVCache(config, pages, length, model.dtype, model.device))
        else:
            forward = WindowForward(model, prompt_mask) if padded else BlockCausalForward(model)
        seeds = row_seeds(None, generator, len(prompts), params.draws)
        slots, eos = len(prompts), params.eos_ids
        forward.all_logits = all_logits
        decoder = BlockDecoder(forward, slots, length, params.mask_id, ids.device, max(1, len(eos)))
        for slot, prompt in enumerate(prompts):
            decoder.open(slot, prompt, params, seeds[slot], eos)
        decoder.params.flags &= ~refine.OWN_SOFTMAX  # a drawn token is as sure as diffusers' scheduler has it
        return decoder

    def _refine(self, decoder, params, callback, names, pad):
        """Drive the decoder to the end, the rows' k-th blocks together."""
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        blocks = max(row.num_blocks - row.first_block for row in decoder.rows)
        step = 0
        for block in self.progress_bar(range(blocks), desc="Blocks", position=0):
            rows, timestep = decoder.running(), 0
            if not rows:
                break
            bar = self.progress_bar(total=params.steps, desc=f"Block {block} Inference Steps", position=1, leave=False)
            with bar:
                while rows:
                    output = decoder.step(rows)
                    for row in rows:
                        if row.error:
                            raise RuntimeError(f"row {row.slot}: {row.error}")
                    if callback is not None:
                        tensors = step_tensors(decoder, rows, output, names, pad)
                        seen = tensors.get("block_x")
                        returned = callback(self, step, timestep, tensors) or {}
                        seen = returned.get("block_x", seen)
                        if seen is not None:
                            rewrite(decoder, rows, seen, vocab_size)
                    step += 1
                    if any(decoder.report.status[row.slot][refine.MASKS_BEFORE] for row in rows):
                        timestep += 1
                        bar.update(1)
                    rows = [row for row in decoder.running() if not row.block_done]


def _is_int(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_ids(input_ids):
    """input_ids as int64. ValueError for what are no ids, in the words of diffusers."""
    if not isinstance(input_ids, (torch.Tensor, np.ndarray)):
        raise ValueError(f"`input_ids` must be a tensor, got {type(input_ids).__name__}.")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"`input_ids` must be 1D or 2D, got shape {tuple(input_ids.shape)}.")
    if not habits.holds_ids(input_ids):
        raise ValueError(f"`input_ids` must be int64 token IDs, got dtype={input_ids.dtype}.")
    return habits.token_ids("input_ids", input_ids)


def _callback_names(callback, names):
    """The tensors a callback gets. diffusers' PipelineCallback and MultiPipelineCallbacks name their own."""
    if hasattr(callback, "tensor_inputs"):
        names = callback.tensor_inputs
    return ["block_x"] if names is None else list(names)
