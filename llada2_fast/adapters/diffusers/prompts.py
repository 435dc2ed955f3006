"""What a pipeline is given: prompts of three forms become ids, and what diffusers refuses is refused in its words."""

import numpy as np
import torch

from ...config import habits
from ...decoding.inputs import checked_thresholds
from .checks import check_method, check_positive


def prepare_input_ids(
    tokenizer,
    prompt: str | list[str] | None = None,
    messages: list | None = None,
    input_ids: torch.Tensor | np.ndarray | None = None,
    attention_mask: torch.Tensor | np.ndarray | None = None,
    use_chat_template: bool = True,
    add_generation_prompt: bool = True,
    chat_template_kwargs: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), int64 [B, P], of whichever input is given; ids take precedence.

    tokenizer: None with input_ids.
    prompt: str or list of str, wrapped as chats where the tokenizer has a template and use_chat_template is True.
    messages: a chat or a list of chats.
    input_ids: [P] or [B, P], of integers that int64 holds; attention_mask: of the same shape, 0 at padding.
    add_generation_prompt, chat_template_kwargs: for the tokenizer's template.
    ValueError if they clash or are nothing of the kind.
    """
    if input_ids is not None:
        input_ids = check_ids(input_ids)
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
    check_source(tokenizer, prompt, messages, input_ids)
    with torch.device("cpu"):  # a tokenizer leaves it to PyTorch's default, which need not hold data
        if messages is None and not (use_chat_template and getattr(tokenizer, "chat_template", None)):
            encoded = tokenizer(prompt, return_tensors="pt", padding=isinstance(prompt, list))
        else:
            if messages is None and isinstance(prompt, str):
                messages = [{"role": "user", "content": prompt}]
            elif messages is None:
                messages = [[{"role": "user", "content": text}] for text in prompt]
            batch = {"padding": True} if isinstance(messages[0], (list, tuple)) else {}
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_tensors="pt",
                return_dict=True, **batch, **(chat_template_kwargs or {}),
            )  # fmt: skip
    ids = encoded["input_ids"]
    mask = encoded.get("attention_mask")
    return ids, (torch.ones_like(ids) if mask is None else mask).long()


def check_source(tokenizer, prompt, messages, input_ids):
    """ValueError unless the inputs of a call make one source of ids."""
    if prompt is None and messages is None and input_ids is None:
        raise ValueError("Provide one of `prompt`, `messages`, or `input_ids`.")
    if prompt is not None and messages is not None:
        raise ValueError("Provide either `prompt` or `messages`, not both.")
    if input_ids is None and tokenizer is None:
        raise ValueError("Tokenizer is required when `input_ids` is not provided.")
    for name, value in (("prompt", prompt), ("messages", messages)):
        if isinstance(value, list) and not value:
            raise ValueError(f"`{name}` must not be an empty list.")


def check_arguments(
    gen_length, block_length, num_inference_steps, minimal_topk, threshold, sampling_method, output_type,
    callback, names, known_names,
):  # fmt: skip
    """ValueError for arguments of a call that diffusers refuses.

    gen_length to output_type: as of LLaDA2Pipeline.__call__.
    callback: what is called after each step, None for nothing.
    names: of the tensors it asks for; known_names: of those there are.
    """
    counts = {
        "gen_length": gen_length, "block_length": block_length, "num_inference_steps": num_inference_steps,
        "minimal_topk": minimal_topk,
    }  # fmt: skip
    for name, value in counts.items():
        check_positive(name, value)
    checked_thresholds(threshold, None)
    check_method(sampling_method)
    if output_type not in ("seq", "text"):
        raise ValueError(f"`output_type` must be 'seq' or 'text', got {output_type!r:.80}.")
    unknown = [name for name in names if name not in known_names]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has to be in {known_names}, but found {unknown}")
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be callable, got {callback!r:.80}.")


def check_ids(input_ids) -> torch.Tensor:
    """input_ids as int64. ValueError for what are no ids, in the words of diffusers."""
    if not isinstance(input_ids, (torch.Tensor, np.ndarray)):
        raise ValueError(f"`input_ids` must be a tensor, got {type(input_ids).__name__}.")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"`input_ids` must be 1D or 2D, got shape {tuple(input_ids.shape)}.")
    if not habits.holds_ids(input_ids):
        raise ValueError(f"`input_ids` must be int64 token IDs, got dtype={input_ids.dtype}.")
    return habits.token_ids("input_ids", input_ids)


def callback_names(callback, names) -> list[str]:
    """The tensors a callback gets. diffusers' PipelineCallback and MultiPipelineCallbacks name their own."""
    if hasattr(callback, "tensor_inputs"):
        names = callback.tensor_inputs
    return ["block_x"] if names is None else list(names)
