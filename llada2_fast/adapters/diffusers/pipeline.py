"""LLaDA2Pipeline: diffusers' class of that name, over the one refinement loop, decoding/decoder.py.

Source of the interface: diffusers 0.42.1, pipelines/llada2/pipeline_llada2.py. diffusers itself is not needed; its
schedulers and PipelineCallback objects are welcome. README lists where results differ on purpose.
"""

import warnings
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ...config import DecodeParams, habits
from ...decoding.decoder import prefill_all
from ...decoding.inputs import checked_sampling, checked_thresholds, sharpened
from ...decoding.sequence import Phase
from ...kernels import refine
from ...outputs import Output
from .callbacks import CANDIDATES, TENSORS, rewrite, step_tensors
from .checks import is_int
from .decoder import open_decoder
from .files import INDEX, load_parts, save_parts
from .foreign import model_device
from .prompts import callback_names, check_arguments, check_ids, check_source, prepare_input_ids


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

    config_name = INDEX
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
        hub = habits.loading(kwargs)
        dtype, device = habits.find_dtype(dtype, torch_dtype), habits.find_place(device, device_map)
        model, scheduler, tokenizer = load_parts(path, dtype, device, model, scheduler, tokenizer, progress, hub)
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
        save_parts(save_directory, type(self).__name__, self.components, max_shard_size)

    # prompts

    def _prepare_input_ids(
        self, *, prompt, messages, input_ids, use_chat_template, add_generation_prompt, chat_template_kwargs,
        attention_mask=None,
    ):  # fmt: skip
        """(ids, attention mask), int64 [B, P], of whichever input is given; see prompts.prepare_input_ids."""
        return prepare_input_ids(
            self.tokenizer, prompt, messages, input_ids, attention_mask, use_chat_template, add_generation_prompt,
            chat_template_kwargs,
        )  # fmt: skip

    def check_inputs(
        self, prompt, messages, input_ids, gen_length, block_length, num_inference_steps, minimal_topk, threshold,
        sampling_method, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs,
    ):  # fmt: skip
        """ValueError for what diffusers refuses, in its words."""
        check_source(self.tokenizer, prompt, messages, input_ids)
        if input_ids is not None:
            check_ids(input_ids)
        names = callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_arguments(
            gen_length, block_length, num_inference_steps, minimal_topk, threshold, sampling_method, output_type,
            callback_on_step_end, names, self._callback_tensor_inputs,
        )  # fmt: skip

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
        *,
        canvas=None,
    ):
        """Continue prompts.

        prompt: str or list of str.
        messages: a chat or a list of chats.
        input_ids: [P] or [B, P], a tensor or array of integers that int64 holds. Ids take precedence.
        attention_mask: of input_ids' shape, bool, or 1 and 0 = padding, on either side.
        use_chat_template: wrap prompts as chats where the tokenizer has a template.
        add_generation_prompt: end a chat with the opening of the answer.
        gen_length: tokens to generate.
        block_length: positions refined together; None = the scheduler's config's.
        num_inference_steps: per block.
        temperature: 0 = greedy. A drawn token's confidence is its probability after temperature and filters, as in
            diffusers: a call with a temperature below 1, top_k or top_p warns of it.
        top_p, top_k: what a draw is among; None = all tokens.
        sampling_method: "auto", "greedy" or "multinomial"; auto draws where the temperature is above 0.
        threshold: commit above it; above 1 by quota alone.
        editing_threshold: edit above it; None, 0 and less = off.
        max_post_steps: steps of editing after a block's last mask.
        minimal_topk: least commits per step.
        eos_early_stop: end a row at its first EOS; its sequence is filled with the pad id (else the EOS id) from there.
        eos_token_id: None = the tokenizer's; without one there is no EOS.
        mask_token_id: None = the tokenizer's; without one a ValueError.
        generator: one torch.Generator, or one per row.
        output_type: "text", or "seq" for ids alone.
        return_dict: False = (sequences, texts).
        callback_on_step_end: called as (pipe, step, timestep, tensors) after every step; step counts all, timestep
            those of the block that found masks. It may return None, or a dict whose "block_x" takes effect
            (callbacks.rewrite); so does writing into block_x.
        callback_on_step_end_tensor_inputs: names of the tensors it is given (callbacks.step_tensors).
        canvas: what is given of the answers, with gaps, as of llada2_fast.generate: ids and None or the mask id, or a
            text where the tokenizer is transformers'; one for all rows or a list with that of each. Answers are as long
            as it is, whatever gen_length says; shorter rows of `sequences` are filled with the pad id.

        Returns LLaDA2PipelineOutput, or (sequences, texts); texts end at the first EOS in any case. Raises ValueError
        on bad arguments before any forward, RuntimeError naming row and step where logits hold NaN or infinity.
        """
        names = callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
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
            mask_id=mask_id, attend_tail=False, profile="diffusers",
        )  # fmt: skip
        if params.draws and (warning := sharpened(**sampling)):
            warnings.warn(warning, stacklevel=3)  # torch.no_grad lies between
        ids, prompt_mask = self._prepare_input_ids(
            prompt=prompt, messages=messages, input_ids=input_ids, attention_mask=attention_mask,
            use_chat_template=use_chat_template, add_generation_prompt=add_generation_prompt, chat_template_kwargs=None,
        )  # fmt: skip
        device = self._execution_device
        everywhere = bool(CANDIDATES & {*names})
        ids, prompt_mask = ids.to(device), prompt_mask.to(device)
        decoder, sequences = open_decoder(
            self.model, ids, prompt_mask, params, generator, everywhere, canvas, self.tokenizer
        )
        self.scheduler.set_timesteps(num_inference_steps, device=device, block_length=block_length)
        self._num_timesteps = num_inference_steps * max(s.num_blocks - s.first_block for s in sequences)

        pad = getattr(self.tokenizer, "pad_token_id", None)
        pad = next(i for i in (pad, *eos, mask_id) if i is not None)
        if decoder.runner.cached:
            prefill_all(decoder, sequences)
        for sequence in sequences:
            decoder.admit(sequence)
        self._refine(decoder, params, callback_on_step_end, names, pad)

        answers = [sequence.answer() for sequence in sequences]
        rows = answers if eos_early_stop else [s.canvas[s.prompt_length : s.total] for s in sequences]
        width = max(s.gen_length for s in sequences)
        rows = [row + [pad] * (width - len(row)) for row in rows]
        rows = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return LLaDA2PipelineOutput(rows, texts) if return_dict else (rows, texts)

    def _special_ids(self, eos, mask):
        """(EOS ids, mask id): the call's, else the tokenizer's. ValueError without a mask id."""
        eos = self.eos_token_id if eos is None else eos
        mask = self.mask_token_id if mask is None else mask
        eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        if mask is None:
            raise ValueError("`mask_token_id` must be provided (or available on the tokenizer).")
        if not is_int(mask) or mask < 0:
            raise ValueError(f"`mask_token_id` must be a token id, got {mask!r:.80}.")
        if not all(is_int(i) for i in eos):
            raise ValueError(f"`eos_token_id` must be a token id, several or None, got {eos!r:.80}.")
        return eos, mask

    def _refine(self, decoder, params, callback, names, pad):
        """Drive the decoder to the end, the rows' k-th blocks together."""
        vocab_size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        blocks = max(s.num_blocks - s.first_block for s in decoder.sequences)
        step = 0
        for block in self.progress_bar(range(blocks), desc="Blocks", position=0):
            rows, timestep = decoder.running(), 0
            if not rows:
                break
            bar = self.progress_bar(total=params.steps, desc=f"Block {block} Inference Steps", position=1, leave=False)
            with bar:
                while rows:
                    result = decoder.step(rows)
                    for row in rows:
                        if row.error:
                            raise RuntimeError(f"row {row.lane}: {row.error}")
                    if callback is not None:
                        tensors = step_tensors(decoder, rows, result, names, pad)
                        seen = tensors.get("block_x")
                        returned = callback(self, step, timestep, tensors) or {}
                        seen = returned.get("block_x", seen)
                        if seen is not None:
                            rewrite(decoder, rows, result, seen, vocab_size)
                    step += 1
                    if any(result.status[row.lane][refine.MASKS_BEFORE] for row in rows):
                        timestep += 1
                        bar.update(1)
                    rows = [row for row in decoder.running() if row.phase is Phase.DECODE]
