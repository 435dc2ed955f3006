"""Ops of decoding: candidates without and with filters, the likeliest ids, random draws, the refinement step, rows that
begin a new block.

Each case_of_<op>(machine, ...) builds a Case; OPS names them and their arguments. B rows, V ids.
"""

from functools import partial

import torch

from llada2_fast.decoding.rules import NEVER, Rule, batch_params
from llada2_fast.kernels import advance, candidates, refine, top_logprobs
from llada2_fast.kernels._triton import tl, triton
from llada2_fast.kernels.philox import _uniform, uniform_ref
from llada2_fast.kernels.refine import BLOCK_DONE, PRIOR_MASK, BlockState, SpecialIds
from llada2_fast.kernels.roles import GENERATED, PADDING, PROMPT, TAIL, roles_ref

from ..gpu.gates import refine_case, require
from ..roofline import BLOCK
from .cases import Case, agree

STEPS, THRESHOLD = 8, 0.9
MODES = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "temperature": (1.0, 0, 1.0),
    "top_p": (1.0, 0, 0.9),
    "top_k_top_p": (1.0, 50, 0.9),
}


class Step:
    """One step of `rows` whole blocks of masks, and all that it needs, on a device.

    steady: nothing is ever committed, so that a step can be repeated as it is; else reset() makes the blocks new.
    guided: the rows may take any id, as tables say; edits: they are LLaDA2.2's, which delete and insert; entropy: a
    bound on entropies says what is committed, of the steady ones none.
    """

    def __init__(
        self, rows, vocab, dtype, device, mode="greedy", steady=False, guided=False, edits=False, entropy=False
    ):
        self.ids = SpecialIds(vocab - 289, *((vocab - 254, vocab - 253) if edits else ()))
        self.moves = refine.Moves.fresh(rows, BLOCK, device) if edits else None
        self.logits = torch.empty(rows, BLOCK, vocab, dtype=dtype, device=device)
        if device != "meta":  # drawn in float32, which is the same in every PyTorch; bfloat16 is not in 2.11
            generator = torch.Generator(device).manual_seed(rows)
            self.logits.copy_(torch.empty_like(self.logits, dtype=torch.float32).normal_(std=4.0, generator=generator))
            self.logits[..., self.ids.mask] = -20.0  # diffusers would commit it
            best = torch.rand(rows, BLOCK, 1, device=device, generator=generator)  # one each, from unlikely to sure
            self.logits.scatter_(2, (best * vocab).long() // 2, (16 + 10 * best).to(dtype))
        temperature, top_k, top_p = MODES[mode]
        self.filters = (top_k, top_p) != (0, 1.0)
        rule = Rule(
            temperature, top_k, top_p, threshold=2.0 if steady else THRESHOLD, edit_threshold=0.0,
            steps=NEVER if steady else STEPS, min_transfer=0 if steady else 1, max_steps=NEVER, max_post_steps=0,
            entropy_bound=-1.0 if steady else 1.0, entropy_decay=0.8,
            flags=refine.BAN_MASK | refine.EOS_STEP | guided * refine.GUIDED
            | entropy * (refine.ENTROPY | refine.OWN_SOFTMAX)
            | edits * (refine.EDITING | refine.LEVENSHTEIN),
        )  # fmt: skip
        self.allowed = None
        if guided:
            classes = torch.arange(vocab, device=device) % refine.MAX_CLASSES
            bits = torch.full((rows, BLOCK, refine.WORDS), -1, dtype=torch.int32, device=device)
            self.allowed = refine.Allowed(classes.to(torch.int16).repeat(rows, 1), bits)
        self.params = batch_params([rule] * rows, range(rows), [(1,)] * rows, device)
        tokens = torch.full((rows, BLOCK), self.ids.mask, device=device)
        kind = torch.zeros_like(tokens, dtype=torch.int8)
        self.state = BlockState.fresh(tokens, kind, torch.zeros_like(tokens[:, 0]))
        if steady:
            self.state.step.fill_(BLOCK)  # past the schedule's last commit

    def reset(self):
        self.state.tokens.fill_(self.ids.mask)
        for name in ("step", "post_steps", "frozen"):
            getattr(self.state, name).zero_()

    def run(self):
        rules = (self.state, self.params, self.ids)
        return refine.refine_step(self.logits, *rules, filters=self.filters, allowed=self.allowed, moves=self.moves)


def wide(logits):
    """In float32; float64 where they are that already, for the truth: float32 softmax is off by 1e-5 at V = 157184."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def greedy(logits, *_rest):
    confidence, token = torch.softmax(wide(logits), -1).max(-1)
    return token, confidence


def plain_refine(step):
    """The next blocks [B, 32] by the rule in plain PyTorch: the threshold's, or the quota's most confident."""
    token, confidence = greedy(step.logits)
    masked = step.state.tokens == step.ids.mask
    confidence = confidence.masked_fill(~masked, -1.0)
    commit = confidence > THRESHOLD
    best = confidence.topk(BLOCK // STEPS, -1).indices
    quota = torch.zeros_like(commit).scatter_(1, best, True)
    few = commit.sum(-1, keepdim=True) < BLOCK // STEPS
    return torch.where(torch.where(few, quota, commit) & masked, token, step.state.tokens)


def case_of_refine(machine, rows, vocab):
    """A greedy refinement step."""
    step = partial(Step, rows, vocab, machine.dtype, machine.device.type)

    def check():
        new = step()
        wanted = plain_refine(new)
        new.run()
        agree("refine", (new.state.tokens,), (wanted,))

    size = step(steady=True).logits.nbytes
    buffers = machine.rotated(lambda: (step(steady=True),), size)
    return Case(Step.run, plain_refine, "softmax, max, topk", buffers, size, check=check)


def case_of_steady(machine, batch, mode):
    """A step of the GPU suite: of each row the mode of gates.refine_case; it commits nothing and can be repeated."""
    modes = [mode] * machine.size(batch, 2)
    first = refine_case(machine, modes)
    buffers = machine.rotated(lambda: (first[0].clone(), *first[1:]), first[0].nbytes)
    return Case(partial(refine.refine_step, filters=mode == "filters"), None, "", buffers, first[0].nbytes)


def unfiltered(logits, start, step, params, ids, *_rest):
    """Probabilities [B, 32, V] without the mask id."""
    x = wide(logits) / params.temperature[:, None, None]
    x[..., ids.mask] = float("-inf")
    return torch.softmax(x, -1)


def filtered(logits, start, step, params, ids, *_rest):
    """Probabilities [B, 32, V] of what top-k and top-p keep, by sorting, as samplers do."""
    p = unfiltered(logits, start, step, params, ids)
    ordered = p.sort(-1, descending=True).values
    top_k, top_p = params.top_k.long()[:, None, None], params.top_p[:, None, None]
    limit = torch.where(top_k > 0, top_k, p.shape[-1])
    at_limit = ordered.gather(2, (limit - 1).expand(-1, p.shape[1], -1))
    ordered = ordered.masked_fill(ordered < at_limit, 0)
    mass = ordered.cumsum(-1)
    count = (mass - ordered <= top_p * mass[..., -1:]).logical_and(ordered > 0).sum(-1, keepdim=True)
    p = p.masked_fill(p < ordered.gather(2, count - 1), 0)
    return p / p.sum(-1, keepdim=True)


_SORTED = filtered, "sort, multinomial"
_PEERS = {  # by mode: probabilities that torch.multinomial draws from, None = greedy; the peer's name
    "greedy": (None, "softmax, max"),
    "temperature": (unfiltered, "softmax, multinomial"),
    "top_p": _SORTED,
    "top_k_top_p": _SORTED,
}


def case_of_candidates(machine, mode, rows, vocab):
    """Candidates of whole blocks, the most likely id or a draw: one read of the logits without filters."""
    probabilities, name = _PEERS[mode]

    def make():
        step = Step(rows, vocab, machine.dtype, machine.device.type, mode, steady=True)
        p = step.params
        sample = candidates.SampleParams(p.temperature, p.top_k, p.top_p, p.seed)
        ban = torch.full_like(p.flags, candidates.BAN_MASK)
        return step.logits, step.state.block_start, step.state.step, sample, step.ids, ban, None, step.filters

    def drawn(*args):
        weight = probabilities(*args).flatten(0, 1)
        token = torch.multinomial(weight, 1)
        return token, weight.gather(1, token)

    first = make()

    def check():
        token, confidence = candidates.candidates(*first)
        truth = first[0].double(), *first[1:]
        if probabilities is not None:  # draws of others differ; what ours drew must be as likely as it says
            wanted = probabilities(*truth).gather(2, token[..., None])[..., 0]
        else:
            known, wanted = greedy(*truth)
            # in 16 bits the largest logit may be there twice
            require("share of tokens that differ", (token != known).float().mean().item(), 0.0 if machine.dry else 0.05)
        agree("candidates", (confidence,), (wanted,))

    plain = greedy if probabilities is None else drawn
    size = first[0].nbytes + rows * BLOCK * (8 + 4)
    buffers = machine.rotated(make, size)
    return Case(candidates.candidates, plain, name, buffers, size, check=check, graph=probabilities is None)


TILE = 256


@triton.jit
def _uniform_kernel(SEED, POSITION, STEP, OUT, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = tl.load(POSITION + at, mask=at < n, other=0)
    draw = _uniform(tl.load(SEED), position, tl.load(STEP), tl.full([], 0, tl.int32))
    tl.store(OUT + at, draw, mask=at < n)


def philox_kernel(seed, position, step):
    out = torch.empty(position.shape, dtype=torch.float32, device=position.device)
    _uniform_kernel[(triton.cdiv(len(out), TILE),)](seed, position, step, out, len(out), TILE=TILE)
    return out


def philox_reference(seed, position, step):
    return uniform_ref(seed, position, step, torch.zeros_like(step))


def philox_in_integers(seed, position, step):
    """The draw of one counter, from the definition of Philox4x32-10."""
    low = 2**32 - 1
    c0, c1, c2, c3, k0, k1 = position & low, step & low, 0, 0, seed & low, seed >> 32 & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return (c0 >> 8) * 2.0**-24 + 2.0**-25


def case_of_philox(machine, count):
    """Uniform draws by counter: `count` positions of one row. Operations are those on 32-bit integers.

    The peer is torch.rand, whose draws depend on what was drawn before; parity is against plain Python integers.
    """

    def make():
        each = torch.tensor([-3_141_592_653_589_793, 5], device=machine.device)
        return each[:1], torch.randint(2**32, (count,), device=machine.device), each[1:]

    first = make()
    ours = philox_reference if machine.dry else philox_kernel

    def check():
        seed, position, step = (x[:64].tolist() for x in first)
        truth = torch.tensor([philox_in_integers(seed[0], at, step[0]) for at in position], dtype=torch.float32)
        agree("philox", (ours(*first)[:64].cpu().view(torch.int32),), (truth.view(torch.int32),))

    def plain(_seed, position, _step):
        return torch.rand(len(position), device=position.device)

    size = count * (8 + 4)
    return Case(ours, plain, "torch.rand", machine.rotated(make, size), size, 100.0 * count, check)


def case_of_top_logprobs(machine, rows, vocab, k):
    """The k likeliest ids of all positions of `rows` blocks. The peer's are in any order where logits tie."""
    index = torch.arange(rows * BLOCK, device=machine.device).view(rows, BLOCK)
    flags = torch.zeros(rows, dtype=torch.int32, device=machine.device)

    def make():
        logits = torch.randn(rows * BLOCK, vocab, device=machine.device)
        return logits.to(machine.dtype), index, flags, vocab - 289, k

    def plain(logits, *_):
        return torch.log_softmax(logits.float(), -1).topk(k)

    size = rows * BLOCK * vocab * machine.dtype.itemsize
    buffers = machine.rotated(make, size)

    def check():
        logits = buffers[0][0]
        ids, logprobs = (part.flatten(0, 1) for part in top_logprobs.top_logprobs(*buffers[0]))
        listed = torch.log_softmax(logits.float(), -1).gather(1, ids.long().clamp(0, vocab - 1))
        agree("top_logprobs", (logprobs, listed), (plain(logits).values, logprobs))

    return Case(top_logprobs.top_logprobs, plain, "log_softmax, topk", buffers, size, check=check)


def plain_advance(state, bounds, page_table, flags, lane, repeat, carried, ids):
    device, length = lane.device, state.tokens.shape[1]
    active, riding = [], []
    for row in lane.tolist():
        start, total = int(state.block_start[row]), int(bounds.total[row])
        ready = int(state.frozen[row]) == BLOCK_DONE and start + length < total
        changed = bool(state.changed[row])
        if ready and (not changed or len(riding) < carried):
            if changed:
                riding.append((row, start // length, state.tokens[row].clone()))
            masked = ((state.tokens[row] == ids.mask) & (state.kind[row] != PROMPT)).any()
            start += length
            position = torch.arange(start, start + length, device=device)
            kind = torch.where(position < bounds.limit[row], TAIL, PADDING).masked_fill_(position < total, GENERATED)
            tokens = bounds.given[row, start // length % 2].masked_fill(position >= total, ids.mask)
            kind[tokens != ids.mask] = PROMPT
            prior_flags = state.prior_flags[row] | masked.int() * PRIOR_MASK
            state.reset_block(row, tokens, kind.to(state.kind.dtype), start, prior_flags)
        active.append((row, start // length, state.tokens[row]))
    empty = [(-1, 0, torch.full_like(state.tokens[0], ids.mask))] * (carried - len(riding))
    rows, index, laid = zip(*active, *riding, *empty, strict=True)
    rows, index = (torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, index))
    offset, page = torch.arange(length, device=device), page_table[rows, index]
    position, slot = (first[:, None] * length + offset for first in (index, page))
    slot[rows < 0] = -1
    own = (x[lane.long()] for x in (state.tokens, state.kind, state.frozen, flags))
    order = torch.stack(roles_ref(*own, ids.mask)).any(0).flatten().nonzero()[:, 0].int()
    return rows, index, torch.stack(laid), position, slot, order, order.new_full((1,), len(order))


def case_of_advance(machine, rows):
    """Rows whose block has ended beginning their next one: half of them go on, half of those carried along.

    What is timed is the step in which no block has ended, most of them: the others change the state they are timed on.
    The peer is the same rule on the host, row by row.
    """
    each = partial(torch.arange, device=machine.device, dtype=torch.int32)
    carried, mask_id = rows // 4, 1000

    def make(ended=False):
        tokens = torch.randint(mask_id + 1, (rows, BLOCK), device=machine.device)
        start = each(rows).long() * BLOCK
        state = BlockState.fresh(tokens, torch.full_like(tokens, GENERATED, dtype=torch.int8), start)
        if ended:
            state.frozen[::2] = BLOCK_DONE
        total = start.int() + 2 * BLOCK - 5
        state.changed.copy_(each(rows) // 2 % 2)
        given = torch.where(tokens % 4 == 0, tokens, mask_id)[:, None].repeat(1, 2, 1)
        bounds = advance.RowBounds(total, total + 3, given)
        pages = torch.randperm(rows * (rows + 1), device=machine.device).int().view(rows, -1)
        flags = torch.zeros_like(total)
        return state, bounds, pages, flags, each(rows), torch.zeros_like(total), carried, SpecialIds(mask_id)

    def check():
        first = make(ended=True)
        twin = BlockState(*(x.clone() for x in vars(first[0]).values()))
        got, wanted = advance.advance(*first), plain_advance(twin, *first[1:])
        got = got._replace(order=got.order[: int(got.count)])
        agree("advance", (*got, *vars(first[0]).values()), (*wanted, *vars(twin).values()))

    state = make()[0]
    size = 2 * state.tokens.nbytes + state.kind.nbytes
    buffers = machine.rotated(make, size)
    return Case(advance.advance, plain_advance, "row by row, on the host", buffers, size, check=check, graph=False)


def _modes(*shapes):
    return {f"{mode} b{rows} v{vocab}": (mode, rows, vocab) for mode, rows, vocab in shapes}


_CANDIDATES = _modes(
    ("greedy", 1, 4096), ("greedy", 8, 32768), ("temperature", 8, 32768), ("greedy", 1, 157184),
    ("temperature", 1, 157184),
)  # fmt: skip
_FILTERS = _modes(("top_k_top_p", 1, 4096), ("top_p", 1, 32768), ("top_k_top_p", 8, 32768), ("top_k_top_p", 1, 157184))
OPS = {
    "candidates": (case_of_candidates, _CANDIDATES),
    "filters": (case_of_candidates, _FILTERS),
    "refine": (case_of_refine, {f"b{b} v{v}": (b, v) for b, v in ((1, 4096), (8, 32768), (1, 157184))}),
    "top_logprobs": (
        case_of_top_logprobs,
        {f"b{b} v{v} k{k}": (b, v, k) for b, v, k in ((1, 4096, 5), (8, 32768, 20), (1, 157184, 20))},
    ),
    "philox": (case_of_philox, {f"n{count}": (count,) for count in (256, 2**18)}),
    "advance": (case_of_advance, {f"rows {rows}": (rows,) for rows in (8, 128)}),
}
