"""QK-norm and partial rotary embedding of a fused projection, and the page writes that follow.

qkv [T, nq + 2 nk, D] -> q [T, nq, D], k [T, nk, D], v [T, nk, D]
q, k = rms_norm over D (if there are weights), then the first `rot` dims rotated, half-split pairing:
[a, b] -> [a cos - b sin, b cos + a sin]; dims rot..D-1 pass through
qk_norm_rope_write stores k and v in the pages of a cache instead of returning them
"""

from typing import NamedTuple

import torch

from ._ambient import run_kernel
from ._triton import FLOATS, tl, triton, use_triton
from .attention import check_caches, write_pages
from .gemm import rounded
from .norm import rms_norm_ref
from .overlap import inputs_ready


def rope_angles(position, rotary_dim, theta, factor, dtype):
    """cos and sin [T, rotary_dim] in dtype for int64 positions [T]; angles in float32 whatever the dtype."""
    exponent = torch.arange(0, rotary_dim, 2, device=position.device).float() / rotary_dim
    angle = (position.float() / factor)[:, None] * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Angles(NamedTuple):
    """cos and sin [P, rot], and int64 [T]: the row of each of T tokens; None = a row each."""

    cos: torch.Tensor
    sin: torch.Tensor
    row: torch.Tensor | None = None

    def each(self):
        """cos and sin [T, rot]."""
        return self[:2] if self.row is None else (self.cos[self.row], self.sin[self.row])


def look_up(cos, sin, position):
    """Angles of tokens at `position` int64 [T] from those of positions 0 .. P - 1, cos and sin [P, rot]: looked up by
    the kernel on a GPU, here for the reference, which would do it in every layer."""
    angles = Angles(cos, sin, position)
    return angles if use_triton(position) else Angles(*angles.each())


def qk_norm_rope_ref(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads):
    """qkv [T, nq + 2 nk, D]; q_weight, k_weight [D] or None; Angles of the T tokens -> q, k, v as above."""
    cos, sin = angles.each()
    heads = num_heads + num_kv_heads
    qk, v = qkv[:, :heads], qkv[:, heads:]
    if q_weight is not None:  # both norms in one pass: [nq + nk, D] weights
        weight = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
        qk = rms_norm_ref(qk, weight, eps)
    rot = cos.shape[-1]
    turned = qk[..., :rot]
    half = torch.cat((-turned[..., rot // 2 :], turned[..., : rot // 2]), -1)
    turned = (turned * cos[:, None]).add_(half.mul_(sin[:, None]))
    qk = torch.cat((turned, qk[..., rot:]), -1) if rot < qk.shape[-1] else turned
    return qk[:, :num_heads], qk[:, num_heads:], v


def qk_norm_rope_write_ref(
    qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k_cache, v_cache, slot
):  # fmt: skip
    """qk_norm_rope_ref, then k and v at slots [T] int64 of the caches [pages, L, nk, D], -1 = nowhere -> q."""
    q, k, v = qk_norm_rope_ref(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads)
    if slot.numel() and int(slot.min()) < 0:  # sync: reference
        kept = slot >= 0
        k, v, slot = k[kept], v[kept], slot[kept]
    write_pages(k, v, k_cache, v_cache, slot)
    return q


@triton.jit(do_not_specialize=["tokens"])
def _qk_norm_rope_kernel(
    QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, ROW, Q, K, V, SLOT, eps, tokens, qkv_stride, page_stride, token_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ROT: tl.constexpr, L: tl.constexpr,
    TILE_R: tl.constexpr, TILE_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the T * (nq + 2 nk) vectors,). Weights None: no norm. V None: v is not stored.

    ROW None: the angles of token t are in row t. SLOT None: k of token t goes to K[t]. Every rounding of the reference
    is made: after the norm, after the weight, after both products and after their sum; launched without fusion, else
    LLVM makes one fma in 16 bits of the last. What other loads wait for is loaded first.
    """
    inputs_ready(EARLY)
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = ROT // 2
    r = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)[:, None]
    d = tl.arange(0, TILE_D)[None, :]
    token = r // ALL
    head = r % ALL
    exists = token < tokens
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    inside = exists & (d < D)
    turns = d < ROT
    partner = tl.where(d < HALF, d + HALF, d - HALF)  # the dim a dim is paired with
    row = token if ROW is None else tl.load(ROW + token, mask=exists, other=0)
    vector = QKV + token * qkv_stride + head * D
    raw = tl.load(vector + d, mask=inside, other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(vector + partner, mask=inside & turns, other=0.0).to(tl.float32)
    cos = tl.load(COS + row * ROT + d, mask=exists & turns, other=1.0).to(tl.float32)
    sin = tl.load(SIN + row * ROT + d, mask=exists & turns, other=0.0).to(tl.float32)
    if Q_WEIGHT is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        q_weight = tl.load(Q_WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)
        k_weight = tl.load(K_WEIGHT + d, mask=d < D, other=0.0).to(tl.float32)
        x = rounded(rounded(x * scale, QKV) * tl.where(is_q, q_weight, k_weight), QKV)
        q_weight = tl.load(Q_WEIGHT + partner, mask=turns, other=0.0).to(tl.float32)
        k_weight = tl.load(K_WEIGHT + partner, mask=turns, other=0.0).to(tl.float32)
        y = rounded(rounded(y * scale, QKV) * tl.where(is_q, q_weight, k_weight), QKV)
    turned = rounded(x * cos, QKV) + rounded(tl.where(d < HALF, -y, y) * sin, QKV)
    result = tl.where(turns, turned, x).to(Q.dtype.element_ty)
    tl.store(Q + (token * HEADS + head) * D + d, result, mask=inside & is_q)
    if SLOT is None:
        place = token * page_stride
    else:
        slot = tl.load(SLOT + token, mask=exists, other=-1)
        inside = inside & (slot >= 0)
        place = slot // L * page_stride + slot % L * token_stride
    tl.store(K + place + (head - HEADS) * D + d, result, mask=inside & (head >= HEADS) & (head < HEADS + KV_HEADS))
    if V is not None:
        tl.store(V + place + (head - HEADS - KV_HEADS) * D + d, raw, mask=inside & is_v)


def qk_norm_rope(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads):
    """QK-norm and rotary embedding; see qk_norm_rope_ref for shapes. One launch; v is a view of qkv."""
    if not use_triton(qkv):
        return qk_norm_rope_ref(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads)
    k = qkv.new_empty(qkv.shape[0], num_kv_heads, qkv.shape[2])
    q = launch(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k[:, None], None, None)
    return q, k, qkv[:, num_heads + num_kv_heads :]


def qk_norm_rope_write(
    qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k_cache, v_cache, slot
):  # fmt: skip
    """QK-norm, rotary embedding and page writes; see qk_norm_rope_write_ref. One launch. Returns q [T, nq, D]."""
    args = (qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k_cache, v_cache, slot)
    return launch(*args) if use_triton(qkv) else qk_norm_rope_write_ref(*args)


def launch(qkv, q_weight, k_weight, angles, eps, num_heads, num_kv_heads, k_cache, v_cache, slot):
    tokens, heads, dim = qkv.shape
    cos, sin, row = angles
    angle_rows, rot = (tokens if row is None else cos.shape[0]), cos.shape[-1]
    if heads != num_heads + 2 * num_kv_heads or qkv.stride()[1:] != (dim, 1) or qkv.dtype not in FLOATS:
        raise ValueError(
            f"qkv: [T, {num_heads} + 2 * {num_kv_heads}, D] of {FLOATS} expected, a token's heads side by side, "
            f"got {qkv.dtype} {list(qkv.shape)} with strides {qkv.stride()}"
        )
    for name, x, shape in (
        ("q_weight", q_weight, (dim,)), ("k_weight", k_weight, (dim,)),
        ("cos", cos, (angle_rows, rot)), ("sin", sin, (angle_rows, rot)),
    ):  # fmt: skip
        if x is not None and (x.shape != shape or x.dtype != qkv.dtype or not x.is_contiguous()):
            raise ValueError(f"{name}: contiguous {qkv.dtype} {list(shape)} expected, got {x.dtype} {list(x.shape)}")
    if rot % 2 or rot > dim:
        raise ValueError(f"cos: an even number of rotated dims up to {dim} expected, got {rot}")
    if slot is not None:
        check_caches(qkv, k_cache, v_cache, num_kv_heads)
    for name, x in (("angles.row", row), ("slot", slot)):
        if x is not None and (x.shape != (tokens,) or x.dtype != torch.int64 or not x.is_contiguous()):
            raise ValueError(f"{name}: contiguous int64 [{tokens}] expected, got {x.dtype} {list(x.shape)}")
    q = qkv.new_empty(tokens, num_heads, dim)
    if tokens:
        meta = rope_tile(num_heads, num_kv_heads, dim)
        run_kernel(
            _qk_norm_rope_kernel, (triton.cdiv(tokens * heads, meta["TILE_R"]),),
            qkv, q_weight, k_weight, cos, sin, row, q, k_cache, v_cache, slot, eps, tokens,
            qkv.stride(0), k_cache.stride(0), k_cache.stride(1), ROT=rot, L=k_cache.shape[1], enable_fp_fusion=False,
            **meta,
        )  # fmt: skip
    return q


def rope_tile(num_heads, num_kv_heads, dim):
    """Compile-time arguments of the kernel that depend on the heads; a program takes about 1024 elements."""
    tile = triton.next_power_of_2(dim)
    shape = {"TILE_R": max(1, 1024 // tile), "TILE_D": tile, "num_warps": 4}
    return {"HEADS": num_heads, "KV_HEADS": num_kv_heads, "D": dim, **shape}
