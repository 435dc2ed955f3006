"""Arguments that people pass by habit, from transformers and diffusers: those that change nothing here are taken, all
others are refused by name. Nothing is left out in silence."""

import re

import numpy as np
import torch

from . import DTYPES, find_device

HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")  # of checkpoint.resolve

ANY = object()
# Argument -> the values, beside None and empty collections, at which it changes nothing.
LOADING = {
    "_fast_init": (True, False),
    "adapter_kwargs": (),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2"),  # attention is ours, whatever it is called
    "code_revision": ANY,  # no code of a checkpoint is ever run
    "disable_mmap": (False,),
    "from_flax": (False,),
    "from_tf": (False,),
    "ignore_mismatched_sizes": (False,),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "low_cpu_mem_usage": (True, False),  # it always is
    "offload_buffers": (False,),
    "offload_state_dict": (False,),
    "output_loading_info": (False,),
    "proxies": (),
    "resume_download": (True, False),  # it always is
    "return_dict": (True,),
    "trust_remote_code": (True, False),  # no code of a checkpoint is ever run
    "use_auth_token": (False,),
    "use_cache": (True, False),  # of the network's config; generate() has an argument of its own
    "use_kernels": (False,),
    "use_safetensors": (True,),
    "weights_only": (True,),
}
# Of from_pretrained where no weights are loaded: tokenizers and schedulers.
NO_WEIGHTS = LOADING | {"device": ANY, "device_map": ANY, "dtype": ANY, "torch_dtype": ANY}
SAVING = {
    "create_pr": ANY,  # of use to push_to_hub alone
    "is_main_process": (True,),
    "push_to_hub": (False,),
    "safe_serialization": (True,),
    "save_original_format": (True, False),
    "save_peft_format": (True, False),
    "token": ANY,  # as create_pr
}
GENERATING = {
    "min_length": (0,), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "min_p": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "diversity_penalty": (0,), "num_beams": (1,),
    "num_beam_groups": (1,), "typical_p": (1,), "repetition_penalty": (1,), "encoder_repetition_penalty": (1,),
    "length_penalty": (1,), "guidance_scale": (1,), "num_return_sequences": (1,), "synced_gpus": (False,),
    "output_scores": (False,), "output_logits": (False,), "output_attentions": (False,),
    "output_hidden_states": (False,), "return_dict_in_generate": (False,), "logits_processor": (),
    "early_stopping": (False,), "renormalize_logits": (False,),
    "stopping_criteria": (), "bad_words_ids": (), "suppress_tokens": (), "begin_suppress_tokens": (),
}  # fmt: skip
FORWARD = {
    "use_cache": (True, False),  # there is none: whole sequences
    "output_attentions": (False,),
    "logits_to_keep": (0,),  # all of them
}

_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"}  # those that int64 holds
_KINDS = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}  # by NumPy's letters for kinds of dtypes

_SPLITS = ("balanced", "balanced_low_0", "sequential")  # ways to share a model among devices

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def is_neutral(name, value, table):
    """Whether an argument is given in vain: None, or in the table and empty or one of the values there."""
    allowed = table.get(name, ())
    if value is None or allowed is ANY:
        return True
    if isinstance(value, (list, tuple, dict)):
        return name in table and not value
    plain = isinstance(value, (bool, int, float, str))  # others need not compare to a bool
    return plain and any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in allowed)


def refuse(where, given, table):
    """ValueError naming the first argument of the dict `given` that would have to change what `where` does."""
    for name, value in given.items():
        if not is_neutral(name, value, table):
            allowed = " or ".join(map(repr, table.get(name, ())))
            raise ValueError(f"{name}={value!r:.80}: not supported by our {where}; expected {allowed or 'none such'}")


def split_hub(given):
    """(those that checkpoint.resolve takes, the others) of a dict of arguments."""
    return {k: v for k, v in given.items() if k in HUB}, {k: v for k, v in given.items() if k not in HUB}


def loading(given):
    """The arguments for checkpoint.resolve among those beside from_pretrained's own. ValueError as of `refuse`."""
    hub, others = split_hub(given)
    refuse("from_pretrained", others, LOADING)
    return hub


def saving(**given):
    """ValueError naming the first argument that save_pretrained cannot honour."""
    refuse("save_pretrained", given, SAVING)


def either(name, value, other_name, other):
    """One setting that has two names. ValueError if both are given."""
    if value is not None and other is not None:
        raise ValueError(f"{other_name}={other!r:.80}: give it or {name}, not both")
    return other if value is None else value


def find_dtype(dtype=None, torch_dtype=None):
    """The torch dtype that either names, by itself or its name; None for None and "auto". ValueError for others."""
    value = either("dtype", dtype, "torch_dtype", torch_dtype)
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={value!r:.80}: expected 'auto' or one of {', '.join(DTYPES)}")
    return dtype


def find_place(device=None, device_map=None):
    """The torch.device of a device, {"": device} or "auto" = the GPU if there is one; the CPU for None. ValueError for
    a map that would split the model."""
    value = either("device_map", device_map, "device", device)
    argument = "device" if device_map is None else "device_map"
    if isinstance(value, dict) and list(value) == [""]:
        value = value[""]
    if isinstance(value, dict) or (isinstance(value, str) and value in _SPLITS):
        raise ValueError(f"{argument}={value!r:.80}: expected a device, 'auto' or {{'': device}}; no model is split")
    if isinstance(value, str) and value == "auto":
        return find_device()
    return find_device("cpu" if value is None else value, argument)


def holds_ids(ids):
    """Whether a tensor or NumPy array is of a type whose values int64 holds: neither floats, bools nor uint64."""
    name = str(ids.dtype).removeprefix("torch.") if isinstance(ids, torch.Tensor) else ids.dtype.name
    return name in _INTEGERS


def token_ids(name, ids):
    """A tensor or NumPy array of ids as an int64 tensor. ValueError for anything else."""
    if not isinstance(ids, (torch.Tensor, np.ndarray)) or not holds_ids(ids):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise ValueError(f"{name}: int64 token ids expected, or integers that it holds, got {got}")
    if isinstance(ids, torch.Tensor) and (ids.is_meta or ids.layout is not torch.strided):
        raise ValueError(f"{name}: a dense tensor that has values expected, got {ids.layout} on {ids.device}")
    return ids.long() if isinstance(ids, torch.Tensor) else torch.from_numpy(ids.astype(np.int64))


def as_tensor(name, value):
    """A tensor as it is; a NumPy array or lists of bools or numbers as a tensor of bool, int64 or float64 on the CPU.
    ValueError for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    kind = None
    if isinstance(value, (np.ndarray, list, tuple)):
        try:
            array = np.asarray(value)
            kind = _KINDS.get(array.dtype.kind)
        except (RuntimeError, TypeError, ValueError):  # uneven rows, or tensors that NumPy cannot read
            pass
    if kind is None:
        got = f"{value!r:.80}" if isinstance(value, (list, tuple)) else getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name}: a tensor, an array or even lists of numbers expected, got {got}")
    return torch.from_numpy(array.astype(kind, order="C"))


def as_bool(mask, otherwise=""):
    """An attention mask of bools or of numbers 0 and 1 as bool. ValueError for others, NaN among them."""
    if mask.dtype == torch.bool:
        return mask
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        value = strange[0].item()  # sync: for the message
        raise ValueError(f"attention_mask: bool, or 0 and 1{otherwise}, expected, got {value} in it")
    return mask.bool()


def check_vocabulary(what, ids, vocab_size):
    """ValueError, which begins with `what`, if some ids are none of the vocabulary's. Waits for the device."""
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())  # sync: their values decide
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{what} ids {low}..{high}, some outside 0..{vocab_size - 1}")


def shard_bytes(size):
    """Bytes of "5GB", "500MiB", ... or of an int, as save_pretrained takes them; None = 5 GB. ValueError for anything
    else."""
    size = "5GB" if size is None else size
    if isinstance(size, str):
        number = re.fullmatch(r"(\d+) ?([KMGT]I?B)", size.upper())
        size = int(number[1]) * _UNITS[number[2]] if number else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_shard_size={size!r:.80}: expected bytes, an integer >= 1, or a size such as '5GB'")
    return size
