"""Four-bit weights as GPTQModel writes them: four tensors in place of a linear layer's `weight` [N, K].

    qweight int32 [K / 8, N]    eight digits of a column, from the lowest up; a digit stands for digit - 8
    scales  [K / 128, N]        a float for each group of 128 of K
    qzeros  int32 [K / 128, N / 8]    the digit that stands for 0, less one in the first version of the format: 7 or 8
    g_idx   int32 [K]           the group of each column: k // 128 unless columns were ordered by activations

Read are symmetric ones whose groups lie in order: what the config may say is in config/hf.py.
"""

import torch

from ..config import ModelConfig
from ..kernels import int4
from ..kernels.gemm import SCALE_GROUP
from .weight_map import CheckpointError

DIGITS = 8  # of an int32
ZEROS = (0x77777777, 0x88888888 - 2**32)  # of a symmetric weight, in the first version of the format and the second


def check_widths(config: ModelConfig):
    """ValueError if the experts of a network do not fill the layout's integers."""
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, name) % DIGITS:
            raise ValueError(f"{name}={getattr(config, name)}: expected a multiple of {DIGITS}, to write int4")


def unpack(qweight: torch.Tensor) -> torch.Tensor:
    """qweight int32 [K / 8, N] -> digits uint8 [N, K]."""
    parts = [(qweight >> 4 * i & 15).to(torch.uint8) for i in range(DIGITS)]
    return torch.stack(parts, 1).flatten(0, 1).T.contiguous()


def pack(digits: torch.Tensor) -> torch.Tensor:
    """unpack backwards."""
    parts = digits.T.to(torch.int64).unflatten(0, (-1, DIGITS))
    words = sum(parts[:, i] << 4 * i for i in range(DIGITS))
    return (words - (words >> 31 << 32)).to(torch.int32)


def zeros(groups: int, rows: int) -> torch.Tensor:
    """qzeros of a symmetric weight in the first version of the format."""
    return torch.full((groups, rows // DIGITS), ZEROS[0], dtype=torch.int32, device="cpu")


def order(columns: int) -> torch.Tensor:
    """g_idx of groups in order."""
    return torch.arange(columns, dtype=torch.int32, device="cpu") // SCALE_GROUP


def widen(digits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """digits [N, K] and scales [K / 128, N] -> the weight they stand for, float32 [N, K]."""
    spread = scales.T.float().repeat_interleave(SCALE_GROUP, 1)[:, : digits.shape[1]]
    return (digits.float() - int4.ZERO) * spread


def check(role: str, tensor: torch.Tensor, what):
    """CheckpointError if qzeros or g_idx (`role`) are not those of a symmetric weight with its groups in order.

    With sym the zero is 8; writers store it as 7 or 8, so that both are taken whatever the config calls the format.
    what: the tensor, for messages."""
    if role == "qzeros" and not any(bool((tensor == value).all()) for value in ZEROS):
        raise CheckpointError(f"{what} is not of a symmetric weight: expected 7 (or 8, in gptq_v2) in all digits")
    if role == "g_idx" and not torch.equal(tensor, order(len(tensor))):
        raise CheckpointError(f"{what} reorders columns (desc_act): expected k // {SCALE_GROUP}")
