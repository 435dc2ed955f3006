"""Properties of decoding, on random networks, prompts and parameters.

`by_the_book` says in fifty lines of plain Python what one row's decoding is: no cache, no batch, no tensors but the
network's own logits. generate() must agree with it, token for token and step for step, and hold what the rules promise.
"""

import functools
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from llada2_fast.config import ModelConfig
from llada2_fast.generate import generate
from llada2_fast.kernels.philox import uniform_ref
from llada2_fast.model import LLaDA2Model

GOLDEN = Path(__file__).parent / "golden"
VOCAB, MASK, PAD = 40, 39, 38
NEVER = -1  # an id that no token has
QUICK = (Phase.explicit, Phase.generate)  # shrinking an example of whole decodings takes minutes and helps little

ARCHITECTURES = [
    dict(),
    dict(num_hidden_layers=1, first_k_dense_replace=1, num_key_value_heads=4, use_qk_norm=False, use_bias=True),
    dict(num_experts_per_tok=1, n_group=1, topk_group=1, num_key_value_heads=1, tie_word_embeddings=True),
    dict(num_hidden_layers=3, first_k_dense_replace=1, partial_rotary_factor=1.0, use_qkv_bias=True),
]


@functools.cache
def random_model(architecture, seed):
    """A small network with random weights whose confidences are spread over (0, 1)."""
    shape = dict(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, intermediate_size=20, moe_intermediate_size=10,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=3,
        num_shared_experts=1, n_group=4, topk_group=2, use_bias=False, max_position_embeddings=128, mask_token_id=MASK,
        pad_token_id=PAD, eos_token_id=PAD,
    )  # fmt: skip
    model = LLaDA2Model(ModelConfig(**shape | ARCHITECTURES[architecture]))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(0, 0.1 if name.endswith("bias") else weight.shape[-1] ** -0.5, generator=generator)
        if "norm" in name:
            weight.add_(1.0)
    head = model.word_embeddings if model.config.tie_word_embeddings else model.lm_head
    head.weight.mul_(2.5)
    return model


@functools.cache
def golden_model(name):
    return LLaDA2Model.from_pretrained(GOLDEN / name, dtype=torch.float32, progress=False)


M32, M64 = 2**32 - 1, 2**64 - 1


def uniform(seed, position, step, stream):
    """The uniform number of a draw: the first word of Philox4x32-10, by Salmon et al., in Python's integers."""
    key = [seed & M32, (seed & M64) >> 32]
    c = [position, step, stream, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & M32, (a >> 32) ^ c[3] ^ key[1], a & M32]
        key = [(key[0] + 0x9E3779B9) & M32, (key[1] + 0xBB67AE85) & M32]
    return struct.unpack("f", struct.pack("f", (c[0] >> 8) * 2.0**-24 + 2.0**-25))[0]  # rounded to float32


def candidate(logits, rules, position, step):
    """The candidate of one position and its confidence; logits: a list of floats."""
    allowed = [v for v in range(len(logits)) if v != rules["mask_id"]]
    temperature = rules.get("temperature", 0.0)

    def confidence(v):
        return 1 / sum(math.exp(x - logits[v]) for x in logits)

    if temperature == 0:
        best = max(allowed, key=lambda v: (logits[v], -v))
        return best, confidence(best)
    by_logit = sorted(allowed, key=lambda v: -logits[v])
    if rules.get("top_k"):
        last = logits[by_logit[min(rules["top_k"], len(by_logit)) - 1]]
        by_logit = [v for v in by_logit if logits[v] >= last]
    weight = {v: math.exp((logits[v] - logits[by_logit[0]]) / temperature) for v in by_logit}
    if rules.get("top_p") is not None and rules["top_p"] < 1:
        total, before, cut = sum(weight.values()), 0.0, by_logit[0]
        for v in by_logit:
            if before <= rules["top_p"] * total:
                cut = v
            before += weight[v]
        weight = {v: w for v, w in weight.items() if logits[v] >= logits[cut]}
    total, reached = sum(weight.values()), 0.0
    aim = uniform(rules["seed"], position, step, 1) * total  # stream 1: the one tile of so small a vocabulary
    for v in sorted(weight):
        reached += weight[v]
        if reached > aim:
            return v, confidence(v)


def is_edited(held, found, editing):
    return editing is not None and found[0] != held and found[1] > editing


def window_mask(size, length, begin):
    """bool [1, 1, size, size]: block-causal, but from block `begin` on everybody sees everything."""
    block = torch.arange(size) // length
    return ((block[:, None] >= block) | (block[:, None] >= begin))[None, None]


def entropy(logits):
    """In nats, of the softmax of all of them."""
    weight = [math.exp(x - max(logits)) for x in logits]
    shares = [w / sum(weight) for w in weight]
    return -sum(p * math.log(p) for p in shares if p > 0)


def certain(logits, masked, rules):
    """The masked positions by rising entropy, and those of them that the bound lets a step commit."""
    own = {i: entropy(logits[i]) for i in masked}
    order, decay = sorted(masked, key=lambda i: own[i]), rules.get("entropy_decay", 1.0)
    ahead = [sum(own[j] * decay ** (abs(i - j) - 1) for j in order[:k]) for k, i in enumerate(order)]
    return order, [i for i, load in zip(order, ahead, strict=True) if load <= rules["entropy_bound"]]


def token_by_token(model, canvas, begin, at, length, mask):
    """The likeliest token at a position after those before it in its block, which begins at `begin`, one by one."""
    ids = torch.tensor([[*canvas[:at], mask]])
    place = torch.arange(at + 1)
    block, late = place // length, place >= begin
    sees = (block[:, None] >= block) & ((place[:, None] >= place) | ~late)
    logits = model(ids, attention_mask=sees[None, None], block_length=length).logits[0, at].tolist()
    return max((v for v in range(len(logits)) if v != mask), key=lambda v: (logits[v], -v))


def checked(model, canvas, masked, found, length, mask):
    """What block size 1 says at the masked positions, up to the first where it is not what was found."""
    draft, written = list(canvas), {}
    for i in masked:
        draft[i] = found[i][0]
    for i in masked:
        written[i] = token_by_token(model, draft, masked[0] // length * length, i, length, mask)
        if written[i] != draft[i]:
            break
    return written


def has_ended(tokens, where, rules):
    """An EOS is there before any mask."""
    told = (tokens[i] for i in where if tokens[i] in (*rules["eos_id"], rules["mask_id"]))
    return next(told, rules["mask_id"]) != rules["mask_id"]


def by_the_book(model, prompt, rules):
    """Output ids up to the first EOS, events (step, position, kind, token, old; no edits behind the output) and steps
    of each block."""
    n, total, length, mask = len(prompt), len(prompt) + rules["gen_length"], rules["block_length"], rules["mask_id"]
    steps, editing, most = rules["steps"], rules.get("editing_threshold"), rules["max_post_steps"]
    window = rules.get("edit_window", 0)
    size = -(-total // length) * length
    canvas, events, per_block = [*prompt, *[mask] * (size - n)], [], []
    finished = False
    while not finished and (block := n // length + len(per_block)) < size // length:
        end = (block + 1) * length
        limit = end if rules["attend_tail"] else min(end, total)
        own, t, post, done = range(max(block * length, n), limit), 0, 0, False
        while not done and not finished:
            logits = model(torch.tensor([canvas[:limit]]), block_length=length).logits[0].tolist()
            found = {i: candidate(logits[i], rules, i, t) for i in own}
            masked = [i for i in own if canvas[i] == mask]
            quota = max(length // steps + (min(t, steps - 1) < length % steps), rules["minimal_topk"])
            policy = rules.get("policy", "threshold")
            if policy == "threshold":
                order = sorted(masked, key=lambda i: -found[i][1])
                commit = [i for i in masked if found[i][1] > rules["threshold"]]
            else:
                order, commit = certain(logits, masked, rules)
            if len(commit) < quota:
                commit = order[:quota]
            drafted = dict(enumerate(canvas)) | {i: found[i][0] for i in commit}
            ends = rules["eos_early_stop"] and has_ended(drafted, range(n, min(end, total)), rules)
            if policy == "self_speculative" and len(commit) < len(masked) and not ends:
                t += 1  # the draft, which writes nothing
                written = checked(model, canvas, masked, found, length, mask)
                found |= {i: (token, None) for i, token in written.items()}
                commit = list(written)
            edit = [i for i in own if i not in masked and is_edited(canvas[i], found[i], editing)]
            for kind, where in (("commit", sorted(commit)), ("edit", edit)):
                events += [(sum(per_block) + t, i, kind, found[i][0], canvas[i]) for i in where]
            for i in [*commit, *edit]:
                canvas[i] = found[i][0]
            t, post = t + 1, post + (not masked)
            if editing is None or most == 0:
                done = all(canvas[i] != mask for i in own)
            else:
                done = not masked and (not edit or post == most)
            begin = block - min(window, block - n // length)
            if done and begin < block:
                logits = model(torch.tensor([canvas[:limit]]), attention_mask=window_mask(limit, length, begin)).logits
                own = range(max(begin * length, n), limit)
                found = {i: candidate(logits[0, i].tolist(), rules, i, 2**20 + block) for i in own}
                for i in [i for i in own if is_edited(canvas[i], found[i], editing)]:
                    events.append((sum(per_block) + t, i, "edit", found[i][0], canvas[i]))
                    canvas[i] = found[i][0]
                t += 1
            if rules["eos_early_stop"] and (done or editing is None):
                finished = has_ended(canvas, range(n, min(end, total)), rules)
        per_block.append(t)
    output = canvas[n:total]
    first = next((i for i, token in enumerate(output) if token in rules["eos_id"]), len(output))
    output = output[: first + 1]
    events = [event for event in events if event[2] == "commit" or event[1] < n + len(output)]
    return output, events, per_block


def allowed(rules):
    """Without what contradicts the rest."""
    if rules["editing_threshold"] is None:
        rules = rules | {"edit_window": 0}
    elif rules["policy"] == "self_speculative":
        rules = rules | {"policy": "entropy"}
    if rules["policy"] == "threshold":
        rules = rules | {"entropy_bound": None, "entropy_decay": 1.0}
    return rules


# Hypothesis likes first choices best: they are the ones that exercise most.
rules_of = st.fixed_dictionaries(
    dict(
        gen_length=st.sampled_from([17, 12, 20, 8, 5, 1]),
        block_length=st.sampled_from([4, 8, 5, 1]),
        steps=st.sampled_from([8, 3, 2, 5, 1, 12]),
        threshold=st.sampled_from([0.4, 0.25, 0.6, 2.0, 0.9, 0.0]),
        minimal_topk=st.sampled_from([1, 2, 3]),
        max_post_steps=st.sampled_from([2, 1, 3, 0]),
        eos_early_stop=st.sampled_from([True, True, False]),
        attend_tail=st.booleans(),
        eos_id=st.sampled_from([tuple(range(0, MASK, 3)), tuple(range(1, MASK, 5)), (9, 18, 27, 36), (NEVER,)]),
        editing_threshold=st.sampled_from([None, 0.3, 0.0, 0.6]),
        edit_window=st.sampled_from([1, 0, 2, 9]),
        mask_id=st.just(MASK),
        policy=st.sampled_from(["threshold", "entropy", "threshold", "self_speculative"]),
        entropy_bound=st.sampled_from([1.0, 0.0, 4.0, 20.0]),
        entropy_decay=st.sampled_from([1.0, 0.7]),
    )
).map(allowed)


def drawn(rules):
    """The same with draws, which are not checked."""
    return rules | ({"policy": "entropy"} if rules["policy"] == "self_speculative" else {})


sampling_of = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([1.0, 0.3, 0.8, 1.7]),
        top_k=st.sampled_from([None, 5, 2, 20, VOCAB + 5]),
        top_p=st.sampled_from([None, 0.9, 0.5, 0.1, 1.0]),
    )
)
# No empty prompts: all positions of a first block of masks are equal, so that roundings alone would rank them.
prompts_of = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=19), min_size=2, max_size=4)
models_of = st.builds(random_model, st.integers(0, len(ARCHITECTURES) - 1), st.integers(0, 2))
seeds_of = st.integers(-(2**63), 2**63 - 1)


def facts(out, i):
    """Row i of a GenerateOutput: tokens, events without confidences, steps of each block, reason; then confidences."""
    events = [(e.step, e.position, e.kind, e.token, e.old) for e in out.trace[i].events]
    tokens = out.sequences[i, : out.num_tokens[i]].tolist()
    certain = (tokens, events, out.counters[i].forwards_per_block, out.finish_reasons[i])
    return certain, [e.confidence for e in out.trace[i].events]


def promises(out, prompts, rules):
    """What the default profile promises of every row, whatever the model says."""
    length, gen_length, eos = rules["block_length"], rules["gen_length"], rules["eos_id"]
    assert out.sequences.shape == (len(prompts), gen_length)
    editing = rules.get("editing_threshold") is not None
    at_most = min(rules["steps"], length) + (rules["max_post_steps"] if editing else 0) + (rules["edit_window"] > 0)
    if rules["policy"] == "self_speculative":
        at_most = 2 * length  # each of its pairs of steps writes a token at least
    for i, prompt in enumerate(prompts):
        n, counters, events = len(prompt), out.counters[i], out.trace[i].events
        row, used = out.sequences[i].tolist(), out.num_tokens[i]
        assert MASK not in row and all(token == PAD for token in row[used:])
        assert not set(row[: used - 1]) & set(eos)
        assert used == gen_length or row[used - 1] in eos
        assert (out.finish_reasons[i] == "eos") <= (row[used - 1] in eos)
        assert all(1 <= steps <= at_most for steps in counters.forwards_per_block)
        assert sum(counters.forwards_per_block) == counters.denoise_forwards
        passes = len(counters.forwards_per_block) - 1 if rules["edit_window"] else 0
        assert counters.window_forwards == passes
        commits = [e.position for e in events if e.kind == "commit"]
        assert len(set(commits)) == len(commits) == counters.commits
        edits = [e.position for e in events if e.kind == "edit"]
        assert len(edits) <= counters.edits and (editing or counters.edits == 0)
        assert len(edits) == counters.edits or used < gen_length or rules["attend_tail"]
        assert all(n <= at < n + used for at in edits)
        blocks = n // length + len(counters.forwards_per_block)
        end = blocks * length if rules["attend_tail"] else min(blocks * length, n + gen_length)
        if out.finish_reasons[i] == "length":
            assert sorted(commits) == list(range(n, end)) and end >= n + gen_length
        assert set(range(n, n + used)) <= set(commits) <= set(range(n, end))
        for e in events:
            assert (e.old == MASK) == (e.kind == "commit") and e.token not in (MASK, e.old) and 0 < e.confidence <= 1
            assert e.block == e.position // length


def same(a, b, i, j):
    """Row i of a is row j of b; confidences may differ by the roundings of matrix products of other heights."""
    (certain, p), (wanted, q) = facts(a, i), facts(b, j)
    assert certain == wanted
    assert p == pytest.approx(q, abs=1e-4)


@settings(max_examples=60, phases=QUICK)
@given(models_of, prompts_of, rules_of, sampling_of | st.none(), st.data())
def test_generate_by_the_book_alone_in_a_batch_cached_and_uncached(model, prompts, rules, sampling, data):
    how = dict(return_dict=True, trace=True)
    seeds = None
    if sampling is not None:
        rules = drawn(rules | sampling)
        seeds = data.draw(st.lists(seeds_of, min_size=len(prompts), max_size=len(prompts)))
    batch = generate(model, prompts, seed=seeds, **how, **rules)
    promises(batch, prompts, rules)
    mode = data.draw(st.sampled_from([dict(use_cache=False), dict(settle="separate")]))
    other = generate(model, prompts, seed=seeds, **how, **mode, **rules)
    order = data.draw(st.permutations(range(len(prompts))))
    shuffled = generate(model, [prompts[i] for i in order], seed=seeds and [seeds[i] for i in order], **how, **rules)
    for i, prompt in enumerate(prompts):
        same(batch, other, i, i)
        same(shuffled, batch, order.index(i), i)
        output, events, per_block = by_the_book(model, prompt, rules | dict(seed=seeds and seeds[i]))
        certain, _ = facts(batch, i)
        assert certain[:3] == (output, events, per_block)
    i = data.draw(st.integers(0, len(prompts) - 1))
    alone = generate(model, [prompts[i]], seed=seeds and seeds[i], **how, **rules)
    same(alone, batch, 0, i)


@settings(max_examples=12, phases=QUICK)
@given(
    st.sampled_from(["tiny", "group", "variant", "flat", "moe256", "bf16"]),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=2, max_size=4),
    rules_of, st.booleans(),
)  # fmt: skip
def test_recorded_networks_alone_in_a_batch_and_uncached(name, sizes, rules, samples):
    model = golden_model(name)
    vocab = model.config.vocab_size
    prompts = [
        torch.randint(vocab - 6, (n,), generator=torch.Generator().manual_seed(100 * n + fill)).tolist()
        for n, fill in sizes
    ]
    rules = rules | dict(mask_id=vocab - 1, pad_id=vocab - 2, return_dict=True, trace=True)
    seeds = [7 * n + fill for n, fill in sizes]
    rules = drawn(rules | dict(temperature=0.7, top_p=0.9)) if samples else rules
    batch = generate(model, prompts, seed=seeds, **rules)
    uncached = generate(model, prompts, seed=seeds, use_cache=False, **rules)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        same(uncached, batch, i, i)
        same(generate(model, [prompt], seed=seed, **rules), batch, 0, i)
        assert vocab - 1 not in batch.sequences[i]


@settings(max_examples=15, phases=QUICK)
@given(
    models_of, prompts_of, st.sampled_from(["hf-2.0", "hf-2.1"]), st.integers(1, 20), st.sampled_from([4, 5, 8]),
    st.sampled_from([0.0, 0.3, 0.6, 2.0]), st.booleans(), st.integers(0, 3),
)  # fmt: skip
@example(random_model(0, 0), [[1, 2, 3, MASK, 5, MASK]], "hf-2.0", 9, 4, 0.3, True, 0)
@example(random_model(0, 0), [[1, 2, 3, MASK, 5, MASK]], "hf-2.1", 9, 4, 0.3, True, 2)
def test_the_cards_profiles_alone_in_a_batch_cached_and_uncached(
    model, prompts, profile, gen_length, block_length, threshold, early, post
):
    rules = dict(
        profile=profile, gen_length=gen_length, block_length=block_length, threshold=threshold, eos_early_stop=early,
        max_post_steps=post, eos_id=[3, 30, 31], steps=6, return_dict=True, trace=True,
    )  # fmt: skip
    batch = generate(model, prompts, **rules)
    uncached = generate(model, prompts, use_cache=False, **rules)
    at_most = min(6, gen_length) if profile == "hf-2.0" else block_length + post + 1
    for i, prompt in enumerate(prompts):
        same(uncached, batch, i, i)
        same(generate(model, [prompt], **rules), batch, 0, i)
        assert all(steps <= at_most for steps in batch.counters[i].forwards_per_block)


@settings(max_examples=30)
@given(seed=seeds_of, position=st.integers(0, 2**31 - 1), step=st.integers(0, 1000), stream=st.integers(0, 50))
def test_the_book_s_draws_are_the_kernels(seed, position, step, stream):
    got = uniform_ref(*(torch.tensor(x) for x in (seed, position, step, stream)))
    assert got.item() == uniform(seed, position, step, stream)
