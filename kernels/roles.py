"""What a position of a block is to a refinement step, and where its logits are.

    masked    holds the mask id and may be filled      M2T commits over it
    editable  holds a token and may be replaced        T2T edits it

A step needs the logits of those positions only. Prompt positions are neither, but for mask ids under FILL_PROMPT;
padding and frozen rows have no roles. Shapes: R rows, L block_length, V vocab; n = r * L + l.
"""

from typing import NamedTuple

import torch

from ._triton import tl, triton

# kind of a position
GENERATED, PROMPT, TAIL, PADDING = 0, 1, 2, 3  # TAIL is denoised but never returned; PADDING is not even denoised

# bits of a row's flags that decide roles and candidates; state.py has the others
BAN_MASK = 1  # the mask id is never a candidate
FILL_PROMPT = 2  # mask ids at prompt positions are filled like any other (model cards)
EDITING = 4  # T2T editing
OWN_SOFTMAX = 256  # a drawn token's confidence is its share of all ids at temperature 1, not of what it was drawn from
GUIDED = 512  # candidates come from allowed ids alone and are not written: they are in the report, for a host to decide
BAN_EDITS = 1024  # the ids of deletions and insertions are never candidates
LEVENSHTEIN = 2048  # LLaDA2.2's editing, see levenshtein.py; with EDITING, and where the row draws with OWN_SOFTMAX
ENTROPY = 4096  # M2T by the entropies of positions, see commit.py; where the row draws with OWN_SOFTMAX
SPECULATES = 8192  # commits are written if they fill the block or end the row; else it reports as a GUIDED one does


MAX_CLASSES = 4096  # of a row's ids
WORDS = MAX_CLASSES // 32


class Allowed(NamedTuple):
    """What GUIDED rows may choose from: the ids fall into classes, and positions allow some of these.

    A row's entries are read where it is GUIDED.
    """

    classes: torch.Tensor  # int16 [R, V]: each id's class, from 0 to MAX_CLASSES - 1
    bits: torch.Tensor  # int32 [R, L, WORDS]: bit c % 32 of word c // 32: class c may stand at the position


class SpecialIds(NamedTuple):
    """The token ids that mean something to a step's rules, of which EOS is not one: rows bring their own (eos_ids)."""

    mask: int  # a position that is not filled yet
    delete: int = -1  # LLaDA2.2: drops its position; -1 where a model has none, as below
    split: int = -1  # LLaDA2.2: puts a mask before its position

    @property
    def edits(self) -> bool:
        """The model deletes and inserts."""
        return self.delete >= 0


ID_ARGUMENTS = ", ".join(f"int {name}_id" for name in SpecialIds._fields)  # of an op, which takes them one by one

_PROMPT, _PADDING = tl.constexpr(PROMPT), tl.constexpr(PADDING)
_FILL_PROMPT, _EDITING = tl.constexpr(FILL_PROMPT), tl.constexpr(EDITING)


def block_tokens(given: list[int | None], length: int, mask_id: int) -> list[int]:
    """A block's tokens when it begins: masks where nothing is given; arguments as of block_kinds."""
    return [mask_id if token is None else token for token in given] + [mask_id] * (length - len(given))


def block_kinds(given: list[int | None], start: int, length: int, total: int, limit: int) -> list[int]:
    """The kinds of a block's positions.

    given: the ids that it begins with, None where none is.
    start: position of its first token.
    length: L.
    total: the row's positions that are prompt or generated; limit: those that exist.
    """
    given = given + [None] * (length - len(given))
    behind = [GENERATED if at < total else TAIL if at < limit else PADDING for at in range(start, start + length)]
    return [kind if token is None else PROMPT for kind, token in zip(behind, given, strict=True)]


def roles_ref(
    tokens: torch.Tensor,
    kind: torch.Tensor,
    frozen: torch.Tensor,
    flags: torch.Tensor,
    mask_id: int,
    asked: int = ~0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions are masked and which editable: bool [R, L] each.

    tokens: int64 [R, L]
    kind: int8 [R, L]
    frozen: int32 [R], non-zero on rows that are left alone
    flags: int32 [R]
    mask_id: what a masked position holds
    asked: all rows' flags in one int, where they are known; what no row asks for is not computed
    """
    holds_mask = tokens == mask_id
    generated = kind != PROMPT
    live = (kind != PADDING) & (frozen == 0)[:, None]  # [R] -> [R, 1]
    fillable = generated | ((flags & FILL_PROMPT) != 0)[:, None] if asked & FILL_PROMPT else generated
    masked = live & holds_mask & fillable
    if not asked & EDITING:
        return masked, torch.zeros_like(masked)
    return masked, live & ~holds_mask & generated & ((flags & EDITING) != 0)[:, None]


@triton.jit
def _roles(token, kind, frozen, flags, mask_id):
    """roles_ref in a kernel, of one position or of one row's positions; frozen and flags are the row's."""
    live = (kind != _PADDING) & (frozen == 0)
    masked = live & (token == mask_id) & ((kind != _PROMPT) | ((flags & _FILL_PROMPT) != 0))
    editable = live & (token != mask_id) & (kind != _PROMPT) & ((flags & _EDITING) != 0)
    return masked, editable


def needed_ref(tokens, kind, frozen, flags, mask_id):
    """bool [R, L]: the positions whose logits a step reads; arguments as of roles_ref."""
    masked, editable = roles_ref(tokens, kind, frozen, flags, mask_id)
    return masked | editable


@triton.jit
def _needed(token, kind, frozen, flags, mask_id):
    """needed_ref in a kernel."""
    masked, editable = _roles(token, kind, frozen, flags, mask_id)
    return masked | editable


@triton.jit
def _locate(
    LOGITS, INDEX, TOKENS, KIND, FROZEN, flags, mask_id, n, stride_r, stride_l,
    L: tl.constexpr, ONLY_NEEDED: tl.constexpr,
):  # fmt: skip
    """The start of position n's logits, and whether a step wants them.

    LOGITS [R, L, V] and INDEX None, or [M, V] and INDEX int64 [R, L]: the row, negative for none; strides in elements.
    TOKENS, KIND [R, L], FROZEN [R] are read where ONLY_NEEDED.
    """
    if INDEX is None:
        start = (n // L).to(tl.int64) * stride_r + (n % L).to(tl.int64) * stride_l
        wanted = n >= 0
    else:
        source = tl.load(INDEX + n)
        start = source * stride_r
        wanted = source >= 0
    if ONLY_NEEDED:
        wanted &= _needed(tl.load(TOKENS + n), tl.load(KIND + n), tl.load(FROZEN + n // L), flags, mask_id)
    return LOGITS + start, wanted
