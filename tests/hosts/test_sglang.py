"""Our algorithm against SGLang's own files: its LowConfidence and JointThreshold, both its loops, its bookkeeping."""

import ast
import functools
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from llada2_fast import LLaDA2Model, demo
from llada2_fast.adapters import sglang as adapter
from llada2_fast.decoding.rules import row_rule
from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.weights.special_tokens import load_tokenizer
from tests.hosts.sglang_host import Runner, batch_of, dllm_config, hot_sampling, make_requests, sampling_info, serve
from tests.hosts.sglang_stubs import EXEC, sglang
from tests.kernels.interpreter import interpreted
from tests.thinned import thinned

VERSION = "sglang==0.5.23"
VOCAB, MASK = 40, 7
NAN = float("nan")
JOINT = {"threshold": 0.5, "edit_threshold": 0.4, "max_post_edit_steps": 3}


@pytest.fixture(scope="module")
def wheel(unpacked):
    return unpacked(VERSION)


@pytest.fixture(scope="module")
def algorithms(wheel):
    """Algorithm name -> class, as SGLang's own registry has them once our plug-in has run."""
    with sglang(wheel) as package:
        adapter.register()
        yield package.algo_name_to_cls


def build(algorithms, name, config, length=8, fdfo=False, mask_id=MASK):
    return algorithms[name](dllm_config(name, config, length, fdfo, mask_id))


# -- one step after the other, on random states ------------------------------------------------------------------------


def random_blocks(generator, rows, length):
    """Blocks with masks, tokens and a prompt of any length; half of the batches with literal masks in the prompt."""
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    tokens[tokens == MASK] = 0
    ends = torch.randint(-1, length + 1, (rows, 1), generator=generator)
    generated = torch.arange(length) >= ends
    share = torch.rand(rows, 1, generator=generator)
    tokens[generated & (torch.rand(rows, length, generator=generator) < share)] = MASK
    tokens[generated[:, -1], -1] = MASK  # no block starts with nothing but tokens that may be edited
    if torch.rand((), generator=generator) < 0.5:
        return tokens, None  # then all tokens in the block are prompt
    tokens[~generated & (torch.rand(rows, length, generator=generator) < 0.2)] = MASK
    return tokens, ~generated


def random_logits(generator, tokens, equal_rows, favour_mask):
    """Logits of all tempers: with equal best tokens, with favourites among the tokens that already stand there, and on
    demand with equal rows and with the mask token as a favourite."""
    rows, length = tokens.shape
    scale = 8 * torch.rand(rows, length, 1, generator=generator)
    logits = scale * torch.randn(rows, length, VOCAB, generator=generator)
    chance = torch.rand(5, rows, length, generator=generator)
    top = logits.amax(-1)
    twin = torch.randint(VOCAB, (rows, length, 1), generator=generator)
    logits.scatter_(2, twin, torch.where(chance[0] < 0.1, top, logits.gather(2, twin)[..., 0])[..., None])
    settled = torch.where(chance[1] < 0.7, top + 4, logits.gather(2, tokens[..., None])[..., 0])
    logits.scatter_(2, tokens[..., None], settled[..., None])
    logits[..., MASK] = logits.amin(-1)  # the line above favours masks where masks stand
    if favour_mask:
        logits[..., MASK] = torch.where(chance[2] < 0.2, top + 3, logits[..., MASK])
    if equal_rows:
        copied = chance[3] < 0.2
        logits[copied] = logits[:, :1].expand_as(logits)[copied]
    return logits


def without_mask(logits):
    """Logits that say the same of all tokens but the mask, whose probability is spread over ids that nobody picks."""
    ids = VOCAB + 4000
    spread = logits.new_full((*logits.shape[:-1], ids), -torch.inf)
    spread[..., :VOCAB] = logits
    spread[..., VOCAB:] = logits[..., MASK : MASK + 1] - torch.tensor(4000.0).log()
    spread[..., MASK] = -torch.inf
    return spread


CONFIGS = {
    "lowconf": ("LowConfidence", [{}, {"threshold": 0.3}, {"threshold": 0.6}, {"threshold": 0.0}, {"threshold": 1.5}]),
    "joint": (
        "JointThreshold",
        [
            JOINT,
            {"edit_threshold": 0},  # SGLang's defaults
            {"threshold": 0.7, "edit_threshold": 0.5, "max_post_edit_steps": 0},
            {"threshold": 2, "edit_threshold": 0.2, "max_post_edit_steps": 2, "penalty_lambda": 1.5},
            {"threshold": 0.2, "edit_threshold": 0.9, "penalty_lambda": 0.3, "vectorized_decoding": True},
        ],
    ),
}


def check_steps(algorithms, rule, fdfo, count, most_rows):
    """count states and more, in runs of up to 12 steps over one batch of blocks. Returns what was met."""
    theirs, configs = CONFIGS[rule]
    generator = torch.Generator().manual_seed(len(rule) + fdfo)
    states = predicted = ended = 0
    while states < count:
        config = configs[states % len(configs)]
        rows, length = (int(torch.randint(1, n, (), generator=generator)) for n in (most_rows + 1, 18))
        tokens, prompt = random_blocks(generator, rows, length)
        own, other = batch_of(tokens, prompt), batch_of(tokens, prompt)
        ours = build(algorithms, "LLaDA2Fast", config, length, fdfo)
        oracle = build(algorithms, theirs, config, length, fdfo)
        assert ours.max_steps(length) == oracle.max_steps(length)
        own_states, other_states = ours.init_step_state(own), oracle.init_step_state(other)
        buffer = own.input_ids
        for _ in range(12):
            favour_mask = bool(torch.rand((), generator=generator) < 1 / 3) and "penalty_lambda" not in config
            # equal rows for LowConfidence alone: JointThreshold's topk takes any of several equal positions
            logits = random_logits(generator, own.input_ids.view(rows, length), rule == "lowconf", favour_mask)
            seen = without_mask(logits) if favour_mask else logits.clone()
            expected = oracle.step(other, seen.flatten(0, 1), other_states)
            got = ours.step(own, logits.flatten(0, 1), own_states)
            assert got == expected
            assert own.input_ids.equal(other.input_ids)
            assert own.input_ids is buffer and all(type(flag) is bool for flag in got)
            states, predicted, ended = states + rows, predicted + favour_mask, ended + sum(got)
            if all(got):
                break
    return states, predicted, ended


@pytest.mark.parametrize("fdfo", [False, True])
@pytest.mark.parametrize("rule", CONFIGS)
def test_steps_are_those_of_sglang(algorithms, rule, fdfo):
    """Tokens and done flags of 12,000 states, 3,000 in each case."""
    states, predicted, ended = check_steps(algorithms, rule, fdfo, 3000, most_rows=16)
    assert states >= 3000 and predicted > 50 and ended > 100


@pytest.mark.parametrize("rule", CONFIGS)
def test_steps_of_the_kernels_are_those_of_sglang(algorithms, rule):
    with force_ops("triton"), interpreted():
        check_steps(algorithms, rule, True, 100, most_rows=5)


# -- a real model through SGLang's two loops and its bookkeeping -------------------------------------------------------


@pytest.fixture(scope="module")
def demo_model():
    return LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def prompts(demo_model):
    tokenizer = load_tokenizer(demo.path())
    texts = ("Add 847 and 96.", "Spell 4071.", "Reverse: a b c", "Tell me a story.", "Add 12 and 7.")
    chats = [[{"role": "user", "content": text}] for text in texts]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    mask = demo_model.special_ids["mask_token_id"]
    return [*ids, ids[0] * 5, [], [ids[0][0], mask, *ids[1] * 2, mask]]  # long, empty, with literal masks


RULES = {  # config of LLaDA2Fast, what generate() is given for it
    "lowconf": ({"threshold": 0.8}, {"profile": "sglang-lowconf", "threshold": 0.8}),
    "joint": (
        {"threshold": 0.4, "edit_threshold": 0.3, "max_post_edit_steps": 2},
        {"profile": "sglang-joint", "threshold": 0.4, "editing_threshold": 0.3, "max_post_steps": 2},
    ),
    "joint-defaults": ({"edit_threshold": 0}, {"profile": "sglang-joint", "threshold": 0.5}),
    "quota": (
        {"profile": "default", "steps": 5, "minimal_topk": 2},
        {"profile": "default", "steps": 5, "minimal_topk": 2},
    ),
    "entropy": (
        {"profile": "default", "policy": "entropy", "entropy_bound": 1.0, "entropy_decay": 0.8},
        {"profile": "default", "policy": "entropy", "entropy_bound": 1.0, "entropy_decay": 0.8},
    ),
}
SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 0.8},
    "filtered": {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
}


LENGTH, NEW_TOKENS = 8, 29


@pytest.fixture(scope="module")
def generated(demo_model, prompts):
    """generated(rule, sampling, seeds): GenerateOutput of all prompts."""

    @functools.cache
    def generate(rule, sampling, seeds):
        return demo_model.generate(
            prompts, gen_length=NEW_TOKENS, block_length=LENGTH, eos_early_stop=True, return_dict=True,
            eos_id=demo_model.special_ids["eos_token_id"][0], seed=list(seeds), **RULES[rule][1], **SAMPLING[sampling],
        )  # fmt: skip

    return generate


@pytest.mark.parametrize("rule, sampling, fdfo", thinned(2, RULES, SAMPLING, [False, True]))
def test_both_loops_give_the_tokens_of_generate(algorithms, demo_model, prompts, generated, rule, sampling, fdfo):
    config, length = RULES[rule][0], LENGTH
    mask, eos = (demo_model.special_ids[name] for name in ("mask_token_id", "eos_token_id"))
    algorithm = build(algorithms, "LLaDA2Fast", config, length, fdfo, mask)
    runner = Runner(demo_model, length, 200)
    its_config = dllm_config("LLaDA2Fast", config, length, fdfo, mask)
    requests = make_requests(its_config, prompts, runner.cache, NEW_TOKENS, eos[0], **SAMPLING[sampling])
    serve(algorithm, its_config, runner, requests)
    expected = generated(rule, sampling, tuple(req.seed for req in requests))
    got = [req.output_ids.tolist() for req in requests]
    assert got == [ids[:n].tolist() for ids, n in zip(expected.sequences, expected.num_tokens, strict=True)]
    assert [req.reason for req in requests] == expected.finish_reasons
    assert mask not in sum(got, [])


@pytest.mark.parametrize("config", [{"threshold": 0.4}, {"threshold": 0.4, "edit_threshold": 0.3}])
def test_a_greedy_request_beside_one_that_draws_is_decoded_as_alone(algorithms, config):
    """Temperature 0 comes as temperature 1, top_k 1, under which a draw would be sure of every token."""
    greedy, drawing = (SimpleNamespace(seed=n, sampling={"temperature": n}) for n in (0, 1))
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 2, 8, VOCAB, generator=generator)

    def steps(*requests):
        """The greedy request's block after each step, the first of the batch."""
        algorithm = build(algorithms, "LLaDA2Fast", config)
        batch = batch_of(torch.full((len(requests), 8), MASK), sampling=sampling_info(requests))
        states, seen = algorithm.init_step_state(batch), []
        for step in logits:
            algorithm.step(batch, step[: len(requests)].flatten(0, 1).clone(), states)
            seen.append(batch.input_ids[:8].tolist())
        return seen

    assert not sampling_info([greedy, drawing]).is_all_greedy
    alone = steps(greedy)
    assert steps(greedy, drawing) == alone and 0 < alone[0].count(MASK) < 8


def test_a_request_s_seed_decides_its_draws(algorithms):
    algorithm, logits = build(algorithms, "LLaDA2Fast", {"threshold": 0.0}), torch.randn(8, VOCAB)

    def drawn(seed):
        request = SimpleNamespace(seed=seed, sampling={"temperature": 1.0})
        batch = batch_of(torch.full((1, 8), MASK), sampling=sampling_info([request]))
        algorithm.step(batch, logits.clone(), algorithm.init_step_state(batch))
        return batch.input_ids.tolist()

    assert drawn(3) == drawn(3) != drawn(4)


def test_unresolved_rows_carry_their_state(algorithms):
    algorithm = build(algorithms, "LLaDA2Fast", {"threshold": 0.9}, fdfo=True)
    batch = batch_of(torch.tensor([[1] * 7 + [MASK], [MASK] * 8]))
    sure = torch.zeros(16, VOCAB)
    sure[:8, 3] = 20
    runner = SimpleNamespace(forward=lambda *_, **__: SimpleNamespace(
        logits_output=SimpleNamespace(full_logits=sure.clone()), can_run_graph=False))  # fmt: skip
    _, ids, accepted, states, _ = algorithm.run(runner, batch, [None, None])
    assert ids[0] == [1] * 7 + [3] and accepted == [0, 0]  # filled, but no forward has seen it
    first, second = states
    _, _, accepted, states, _ = algorithm.run(runner, batch, states)
    assert accepted == [8, 0] and states[0] is None and states[1] is second
    assert (first.step, second.step) == (1, 2)


class Contrary:
    """A network that wants the mask token everywhere, and of the others a new one at each forward."""

    def __init__(self, certain):
        self.certain, self.forwards = certain, 0

    def forward(self, batch, pp_proxy_tensors=None):
        logits = torch.zeros(len(batch.input_ids), VOCAB)
        logits[:, 10 + self.forwards % 20] = self.certain
        logits[:, MASK] = self.certain + 0.5
        self.forwards += 1
        return SimpleNamespace(logits_output=SimpleNamespace(full_logits=logits), can_run_graph=False)


@pytest.mark.parametrize("fdfo", [False, True])
@pytest.mark.parametrize(
    "config",
    [{"threshold": 0.9}, {"threshold": 0.9, **JOINT}, {"profile": "default", "steps": 3, "edit_threshold": 0.0}],
)
def test_progress_is_bounded_where_the_model_wants_masks(algorithms, config, fdfo):
    algorithm, network = build(algorithms, "LLaDA2Fast", config, fdfo=fdfo), Contrary(12)
    tokens = torch.full((3, 8), MASK)
    tokens[1, :5] = 1
    prompt = torch.zeros(3, 8, dtype=torch.bool)
    prompt[1, :5] = prompt[2, 0] = True  # a literal mask at the start of the third
    if fdfo:
        states, left, rounds = [None] * 3, [0, 1, 2], 0
        while left:
            batch = batch_of(tokens[left], prompt[left])
            _, ids, accepted, carried, _ = algorithm.run(network, batch, [states[row] for row in left])
            tokens[left], rounds = torch.tensor(ids), rounds + 1
            for row, state in zip(left, carried, strict=True):
                states[row] = state
            left = [row for row, count in zip(left, accepted, strict=True) if not count]
    else:
        batch = batch_of(tokens, prompt)
        algorithm.run(network, batch)
        tokens = batch.input_ids.view(3, 8)
    assert network.forwards <= algorithm.max_steps(8)
    assert tokens[1, :5].tolist() == [1] * 5 and tokens[2, 0] == MASK
    assert MASK not in tokens[~prompt]


def test_a_step_reads_nothing_but_its_status(algorithms):
    """Fake tensors have no values: whatever reads one on the host raises."""
    algorithm = build(algorithms, "LLaDA2Fast", JOINT | {"penalty_lambda": 0.1})
    with FakeTensorMode():
        hot = hot_sampling(4)
        batch = batch_of(torch.full((4, 8), MASK), torch.zeros(4, 8, dtype=torch.bool), hot)
        states = [adapter.Block(torch.zeros(8, dtype=torch.int8), seed) for seed in range(4)]
        with pytest.raises(DataDependentOutputException) as error:
            algorithm.step(batch, torch.zeros(32, VOCAB), states)
    lines = [str(entry.statement) for entry in error.traceback if entry.path == Path(adapter.__file__)]
    assert "output.status.tolist()" in lines[-1]


# -- what differs from SGLang's algorithms on purpose ------------------------------------------------------------------


def test_sglangs_rules_wait_for_ever_where_the_model_wants_masks(algorithms):
    oracle, batch = build(algorithms, "LowConfidence", {}, fdfo=True), batch_of(torch.full((1, 8), MASK))
    for _ in range(40):
        *_, accepted, _, _ = oracle.run(Contrary(12), batch, [None])
        assert accepted == [0] and (batch.input_ids == MASK).all()


def test_no_token_is_edited_into_a_mask(algorithms):
    tokens = torch.arange(20, 28)[None]
    prompt = torch.zeros(1, 8, dtype=torch.bool)
    logits = torch.zeros(8, VOCAB)
    logits[:, MASK], logits[:, 30] = 9, 8.5
    blocks = {}
    for name in ("JointThreshold", "LLaDA2Fast"):
        algorithm, batch = build(algorithms, name, JOINT | {"edit_threshold": 0.2}), batch_of(tokens, prompt)
        algorithm.step(batch, logits.clone(), algorithm.init_step_state(batch))
        blocks[name] = batch.input_ids.tolist()
    assert blocks == {"JointThreshold": [MASK] * 8, "LLaDA2Fast": [30] * 8}


@pytest.mark.parametrize("config", [{}, JOINT])
def test_the_lowest_of_equal_positions_is_filled(algorithms, config):
    algorithm = build(algorithms, "LLaDA2Fast", config)
    batch = batch_of(torch.tensor([[5] + [MASK] * 7]))
    logits = torch.zeros(8, VOCAB)
    logits[:, [9, 4]] = 1.0
    logits[0, 5] = 9.0
    algorithm.step(batch, logits, algorithm.init_step_state(batch))
    assert batch.input_ids.tolist() == [5, 4] + [MASK] * 6


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_request_with_broken_logits_fails_alone(algorithms, bad):
    """Ids below 0 are what SGLang's Req takes for "NaN happened"; a forward never sees one."""
    tokens = torch.tensor([[1] * 6 + [MASK] * 2, [2] * 8, [MASK] * 8])
    logits = torch.zeros(24, VOCAB)
    logits[:, 3] = 20
    logits[6, 11] = bad  # of the first request
    logits[12, 11] = bad  # a prompt position, whose logits nobody reads
    fails, fine = [1] * 6 + [-1] * 2, [3] * 8

    algorithm, batch = build(algorithms, "LLaDA2Fast", {}, fdfo=True), batch_of(tokens)
    assert algorithm.step(batch, logits, algorithm.init_step_state(batch)) == [True, True, False]
    assert batch.input_ids.tolist() == fails + [2] * 8 + fine

    algorithm, batch = build(algorithms, "LLaDA2Fast", {}), batch_of(tokens)
    states = algorithm.init_step_state(batch)
    assert algorithm.step(batch, logits, states) == [True, True, False]
    assert batch.input_ids.tolist() == tokens[:2].flatten().tolist() + fine  # another forward comes
    assert algorithm.step(batch, logits, states) == [True, True, True]
    assert batch.input_ids.tolist() == fails + [2] * 8 + fine

    oracle, batch = build(algorithms, "LowConfidence", {}), batch_of(tokens)
    oracle.step(batch, logits, oracle.init_step_state(batch))
    assert 0 <= min(batch.input_ids.tolist())  # says nothing


def test_greedy_on_demand_whatever_requests_ask_for(algorithms):
    generator = torch.Generator().manual_seed(3)
    tokens, logits = torch.full((4, 8), MASK), torch.randn(32, VOCAB, generator=generator)
    logits[:, MASK] = -9
    blocks = []
    for name, config in (
        ("LowConfidence", {"threshold": 0.2}),
        ("LLaDA2Fast", {"threshold": 0.2, "sampling_method": "greedy"}),
        ("LLaDA2Fast", {"threshold": 0.2}),
        ("LLaDA2Fast", {"threshold": 0.2, "seed": 0}),
        ("LLaDA2Fast", {"threshold": 0.2, "seed": 1}),
    ):
        algorithm, batch = build(algorithms, name, config), batch_of(tokens, sampling=hot_sampling(4))
        algorithm.step(batch, logits.clone(), algorithm.init_step_state(batch))
        blocks.append(batch.input_ids)
    sglangs, greedy, drawn, again, other = blocks
    assert sglangs.equal(greedy) and drawn.equal(again)
    assert not drawn.equal(greedy) and not drawn.equal(other)


# -- settings, requests, registration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, profile, changed",
    [
        ({}, "sglang-lowconf", {"threshold": 0.95}),
        ({"threshold": 0.8, "block_size": 8}, "sglang-lowconf", {"threshold": 0.8}),
        ({"penalty_lambda": 0}, "sglang-joint", {"threshold": 0.5, "edit_threshold": 0.0, "max_post_steps": 16}),
        ({"vectorized_decoding": False}, "sglang-joint", {"threshold": 0.5}),
        (
            {"max_post_edit_steps": 3, "edit_threshold": 0.4},
            "sglang-joint",
            {"max_post_steps": 3, "edit_threshold": 0.4},
        ),
        ({"max_post_steps": 3, "editing_threshold": 0.4}, "sglang-joint", {"max_post_steps": 3, "edit_threshold": 0.4}),
        ({"profile": "default", "steps": 4, "minimal_topk": 2}, "default", {"steps": 4, "min_transfer": 2}),
        ({"profile": "default", "policy": "entropy"}, "default", {"entropy_bound": 0.3, "entropy_decay": 1.0}),
    ],
)
def test_settings(config, profile, changed):
    settings = adapter.Settings.read(config, 8)
    rule = row_rule(settings.params, 8)
    assert settings.params.profile == profile
    assert {name: getattr(rule, name) for name in changed} == pytest.approx(changed)
    assert bool(rule.flags & refine.EDITING) is (profile == "sglang-joint")


@pytest.mark.parametrize(
    "config, named",
    [
        ({"thresold": 0.9}, "thresold=0.9"),
        ({"profile": "hf-2.0"}, "profile='hf-2.0'"),
        ({"profile": ["default"]}, "profile=['default']"),
        ({"profile": "sglang-lowconf", "edit_threshold": 0.5}, "editing_threshold=0.5"),
        ({"steps": 8}, "steps=8"),
        ({"edit_threshold": 0.5, "minimal_topk": 8}, "minimal_topk=8"),
        ({"profile": "default", "penalty_lambda": 1}, "penalty_lambda=1"),
        ({"edit_threshold": 0.5, "editing_threshold": 0.5}, "editing_threshold=0.5"),
        ({"penalty_lambda": -1}, "penalty_lambda=-1"),
        ({"penalty_lambda": NAN}, "penalty_lambda=nan"),
        ({"vectorized_decoding": "yes"}, "vectorized_decoding='yes'"),
        ({"threshold": "0.9"}, "threshold='0.9'"),
        ({"max_post_edit_steps": -1}, "max_post_steps=-1"),
        ({"sampling_method": "beam"}, "sampling_method='beam'"),
        ({"seed": None}, "seed=None"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"policy": "entropy"}, "policy='entropy'"),
        ({"profile": "sglang-joint", "entropy_bound": 0.5}, "entropy_bound=0.5"),
        ({"profile": "default", "entropy_bound": 0.5}, "entropy_bound=0.5"),
        ({"profile": "default", "policy": "self_speculative"}, "policy='self_speculative': expected another one"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError) as error:
        adapter.Settings.read(config, 8)
    assert named in str(error.value)


def defaults_of(path, name):
    """Field -> default of a class in a file that cannot be imported here; None where it is no literal."""
    (found,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: getattr(node.value, "value", None) for node in fields}


@pytest.fixture(scope="module")
def request_of(algorithms, wheel):
    """Makes requests with SGLang's own defaults; a name may be one of its sampling parameters or of the request."""
    sampling = defaults_of(wheel / "sglang/srt/sampling/sampling_params.py", "SamplingParams")
    source = ast.parse((wheel / "sglang/srt/managers/schedule_batch.py").read_text())
    (req,) = [node for node in source.body if getattr(node, "name", None) == "Req"]
    (init,) = [node for node in req.body if getattr(node, "name", None) == "__init__"]
    names, values = init.args.args[-len(init.args.defaults) :], init.args.defaults
    own = {name.arg: getattr(value, "value", None) for name, value in zip(names, values, strict=True)}

    def make(config=None, **changes):
        assert not changes.keys() - sampling.keys() - own.keys()
        request = SimpleNamespace(**own | {name: value for name, value in changes.items() if name in own})
        request.sampling_params = SimpleNamespace(
            **sampling | {name: value for name, value in changes.items() if name in sampling}
        )
        request.dllm_config = dllm_config("LLaDA2Fast", config or {}, 8, False, MASK)
        return request

    return make


def test_requests_that_can_be_honoured(request_of):
    for changes in ({}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "ignore_eos": True, "stop": ["x"]},
                    {"sampling_seed": 5, "top_k": 1}, {"n": 3, "max_new_tokens": 7}):  # fmt: skip
        request = request_of(**changes)
        assert request.dllm_config.validate_request(request) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("min_p", 0.1), ("frequency_penalty", 0.5), ("presence_penalty", -0.5), ("repetition_penalty", 1.2),
        ("min_new_tokens", 4), ("beam_width", 2), ("logit_bias", {"5": 1.0}), ("json_schema", "{}"), ("regex", "a"),
        ("ebnf", "root"), ("structural_tag", "x"), ("watermark", {}), ("return_logprob", True),
        ("return_flat_raw_top_logprobs", True), ("return_sampling_mask", True), ("return_hidden_states", True),
        ("custom_logit_processor", "x"), ("sampling_seed", 3),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_honoured_are_refused(request_of, name, value):
    request = request_of(**{name: value})
    assert name in request.dllm_config.validate_request(request)


def test_a_seed_is_honoured_where_sglang_hands_it_on(request_of, monkeypatch):
    greedy = request_of({"sampling_method": "greedy"}, sampling_seed=3)
    assert greedy.dllm_config.validate_request(greedy) is None  # it draws nothing
    drawing = request_of(sampling_seed=3)
    monkeypatch.setattr(EXEC.deterministic, "enable_deterministic_inference", True)
    assert drawing.dllm_config.validate_request(drawing) is None


def test_the_sampling_info_read_is_sglangs(wheel):
    read = {"temperatures", "top_ks", "top_ps", "sampling_seed", "is_all_greedy", "need_top_k_sampling",
            "need_top_p_sampling"}  # fmt: skip
    assert read <= defaults_of(wheel / "sglang/srt/sampling/sampling_batch_info.py", "SamplingBatchInfo").keys()
    batch = defaults_of(wheel / "sglang/srt/model_executor/forward_batch_info.py", "ForwardBatch").keys()
    assert {"batch_size", "input_ids", "positions", "sampling_info", "dllm_prompt_mask"} <= batch


def test_the_command_line_resolves_the_plug_in(algorithms, installed, tmp_path, monkeypatch):
    """Installed metadata -> SGLang's load_plugins -> --dllm-algorithm LLaDA2Fast --dllm-algorithm-config x.yaml."""
    from sglang.srt import plugins
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    monkeypatch.syspath_prepend(str(installed))
    assert "llada2_fast" in {point.name for point in entry_points(group="sglang.srt.plugins")}
    monkeypatch.delitem(algorithms, "LLaDA2Fast")
    plugins.load_plugins()
    settings = tmp_path / "x.yaml"
    settings.write_text("threshold: 0.5\nedit_threshold: 0.2\nmax_post_edit_steps: 4\nblock_size: 16\n")
    arguments = SimpleNamespace(
        dllm_algorithm="LLaDA2Fast", dllm_algorithm_config=str(settings), dllm_fdfo=True, model_path="x", revision=None,
        max_running_requests=4, hf_config=SimpleNamespace(architectures=["LLaDA2MoeModelLM"]),
    )  # fmt: skip
    algorithm = DllmAlgorithm.from_server_args(arguments)
    assert type(algorithm) is algorithms["LLaDA2Fast"] and isinstance(algorithm, DllmAlgorithm)
    assert (algorithm.block_size, algorithm.mask_id, algorithm.fdfo) == (16, 156895, True)
    assert algorithm.max_steps(16) == 16 + 4 + 1
    adapter.register()
    assert type(algorithm) is algorithms["LLaDA2Fast"]  # once more is harmless
    arguments.hf_config.architectures = ["SDARForCausalLM"]
    with pytest.raises(ValueError, match="does not support model architecture"):
        DllmAlgorithm.from_server_args(arguments)


def test_a_checkpoint_of_llada22_is_refused(algorithms):
    plain = SimpleNamespace(hf_config=SimpleNamespace(delete_token_id=None))
    algorithms["LLaDA2Fast"].configure_server_args(plain)
    plain.hf_config.delete_token_id = 5
    with pytest.raises(ValueError, match="delete_token_id .LLaDA2.2."):
        algorithms["LLaDA2Fast"].configure_server_args(plain)
