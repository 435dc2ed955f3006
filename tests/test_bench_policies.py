"""The comparison of decoding policies: its formulas against the kernels' rules and against generate(), its figures by
hand, and what its commands end with."""

import itertools
import json
import math
import random

import pytest
import torch

from benchmarks import harness, quality, sampling
from benchmarks.policies import __main__ as policies
from benchmarks.policies import compare, demo, formulas, frontier, plain
from llada2_fast import DecodeParams, LLaDA2Model
from llada2_fast.cli import commands as cli
from llada2_fast.decoding.rules import refine_params
from llada2_fast.demo import tasks
from llada2_fast.kernels import refine
from llada2_fast.weights.special_tokens import load_tokenizer

MASK = 3
UNDERTRAINED = str(sampling.SIBLING)


@pytest.fixture(scope="module")
def sibling():
    return LLaDA2Model.from_pretrained(UNDERTRAINED, dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def work():
    return demo.work_of(load_tokenizer(UNDERTRAINED), 2)


def grid(values=(0.0, 1.0, 2.5)):
    """All blocks of two masks, or one and token 0, with all logits of these values: block int64 [R, 2], logits
    [R, 2, 4]. Without those where rounding alone says which of the two is the surer."""
    logits = torch.tensor(list(itertools.product(itertools.product(values, repeat=3), repeat=2)))
    logits = torch.cat([logits, logits[..., :1] + 1], -1)  # the mask is never a candidate, however likely
    share = logits.double().softmax(-1)
    ranks = torch.stack([share[..., :MASK].amax(-1), torch.special.entr(share).sum(-1)])
    tied = ((ranks[..., 0] - ranks[..., 1]).abs() < 1e-9).any(0) & (logits[:, 0] != logits[:, 1]).any(-1)
    logits = logits[~tied]
    blocks = torch.tensor([[MASK, MASK], [MASK, 0], [0, MASK]]).repeat_interleave(len(logits), 0)
    return blocks, logits.repeat(3, 1, 1)


def shuffled(length, rows, seed):
    """As grid, but some of many."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 6, generator=generator) * 3
    blocks = torch.where(torch.rand(rows, length, generator=generator) < 0.7, MASK, 0)
    blocks[:, 0] = MASK
    return blocks, logits


CASES = {"every block of 2": grid(), "blocks of 4": shuffled(4, 2000, 0), "blocks of 7": shuffled(7, 500, 1)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "rule, params",
    [
        *((formulas.threshold(tau), {"threshold": tau}) for tau in (0.3, 0.6, 0.95)),
        *(
            (formulas.entropy(bound, decay), {"policy": "entropy", "entropy_bound": bound, "entropy_decay": decay})
            for bound, decay in ((0.0, 1.0), (0.4, 1.0), (1.3, 1.0), (0.9, 0.5), (9.0, 1.0))
        ),
    ],
)
def test_a_refinement_step_commits_what_the_formula_says(case, rule, params):
    block, logits = CASES[case]
    expected = rule(formulas.Step(logits, block, block == MASK, MASK))
    rows = refine_params([DecodeParams(**params)] * len(block), block.shape[1], [0] * len(block), [[]] * len(block))
    state = refine.BlockState.fresh(
        block.clone(), torch.full_like(block, refine.GENERATED, dtype=torch.int8), torch.zeros(len(block)).long()
    )
    refine.refine_step(logits, state, rows, refine.SpecialIds(MASK))
    assert torch.equal(state.tokens, expected) and (expected != block).any(1).all()


def subsets(places):
    return itertools.chain.from_iterable(itertools.combinations(places, size) for size in range(1, len(places) + 1))


@pytest.mark.parametrize("bound", [0.2, 0.71, 1.9])
def test_the_entropy_bound_lets_the_most_tokens_through_that_it_can(bound):
    """No set of positions that holds the bound is larger than what is committed."""
    block, logits = shuffled(4, 200, 2)
    found = formulas.candidates(logits, MASK)
    commit = formulas.entropy_commits(found, block == MASK, bound)
    for row, entropy in enumerate(found.entropy.tolist()):
        costs = [[entropy[i] for i in some] for some in subsets(torch.where(block[row] == MASK)[0].tolist())]
        largest = max((len(cost) for cost in costs if sum(cost) - max(cost) <= bound), default=1)
        assert commit[row].sum() == largest


def test_a_product_of_confidences_holds_its_bound():
    block, logits = shuffled(4, 200, 3)
    found = formulas.candidates(logits, MASK)
    commit = formulas.product_commits(found, block == MASK, 0.5)
    for row, sure in enumerate(found.confidence.tolist()):
        ranked = sorted((sure[i] for i in torch.where(block[row] == MASK)[0].tolist()), reverse=True)
        expected = max((k for k in range(1, len(ranked) + 1) if math.prod(ranked[:k]) >= 0.5), default=1)
        assert commit[row].sum() == expected


def peak(*confidences):
    """Logits [1, L, 4] of which token 1 has these probabilities, and the others but the mask the rest."""
    share = torch.tensor([[[(1 - p) / 2, p, (1 - p) / 2, 0.0] for p in confidences]])
    return share.log()


def committed(rule, logits, **given):
    block = torch.full(logits.shape[:2], MASK)
    return (rule(formulas.Step(logits, block, block == MASK, MASK, **given)) != MASK)[0].tolist()


def test_an_annealed_threshold_falls_with_the_steps_of_a_block():
    rule, logits = formulas.anneal(0.9, 0.5, steps=5), peak(0.95, 0.85, 0.75, 0.55)
    counts = [sum(committed(rule, logits, number=number)) for number in (1, 2, 3, 4, 5, 6)]
    assert counts == [1, 2, 3, 3, 4, 4]  # 0.9, 0.8, 0.7, 0.6, 0.5


def test_credit_is_what_a_token_has_won_so_far():
    tau, alpha, beta, gamma = 0.7, 0.7, 0.8, 0.2
    logits, memory = peak(0.6, 0.5), {}

    def passes(p, step):
        credit = sum(beta**before * p**gamma for before in range(step))
        odds = p / (1 - p) * math.exp(alpha * math.log(1 + credit))
        return odds / (1 + odds) > tau

    expected = [[passes(p, step) for p in (0.6, 0.5)] for step in (1, 2, 3, 4)]
    assert [committed(formulas.credit(tau), logits, memory=memory) for _ in expected] == expected
    assert expected == [[True, False]] * 3 + [[True, True]]
    assert torch.where(memory["credit"][0])[1].tolist() == [1, 1]  # of the candidates alone


def test_a_block_is_looked_at_once_more_and_its_own_doubtful_tokens_become_masks():
    rule, memory = formulas.remask(formulas.threshold(0.1), 0.3), {}
    logits, doubt = peak(0.9, 0.9, 0.9), peak(0.2, 0.2, 0.9)

    def step(block, logits, over):
        block = torch.tensor([block])
        given = formulas.Step(logits, block, block == MASK, MASK, 1, torch.tensor([over]), memory)
        return rule(given)[0].tolist(), memory["again"].tolist()

    assert step([1, MASK, MASK], logits, False) == ([1, 1, 1], [True])
    assert step([1, 1, 1], doubt, True) == ([1, MASK, 1], [False])  # the first one is the prompt's
    assert step([1, MASK, 1], logits, False) == ([1, 1, 1], [False])
    assert step([1, 1, 1], doubt, True) == ([1, 1, 1], [False])


@pytest.mark.parametrize(
    "said, bound, written",
    [
        ((1, 1, 1), 0.0, [1, 1, 1]),
        ((1, 2, 1), 0.0, [1, 2, MASK]),
        ((0, 1, 1), 0.0, [0, MASK, MASK]),
        ((0, 2, 0), 9.0, [1, 1, 1]),  # the block is filled without a check
    ],
)
def test_a_draft_is_written_as_far_as_the_check_agrees(said, bound, written):
    asked = []

    def check(rows, draft):
        asked.append(draft.tolist())
        return torch.nn.functional.one_hot(torch.tensor([said]), 4).float()

    block = torch.full((1, 3), MASK)
    step = formulas.Step(peak(0.9, 0.8, 0.7), block, block == MASK, MASK, check=check)
    assert formulas.self_speculative(bound)(step).tolist() == [written]
    assert asked == ([] if bound else [[[1, 1, 1]]])


@pytest.mark.parametrize("name", compare.POLICIES)
@pytest.mark.parametrize("logits", [torch.zeros(3, 4, 5), torch.eye(5)[MASK].expand(3, 4, 5) * 99])
def test_every_policy_writes_a_token_at_least_whatever_the_model_says(name, logits):
    policy = compare.POLICIES[name]
    block = torch.tensor([[MASK] * 4, [0, MASK, 0, MASK], [0, 0, 0, MASK]])
    for knob in policy.knobs:
        step = formulas.Step(logits, block, block == MASK, MASK, check=lambda rows, draft: logits[rows])
        written = policy.rule(knob, 4)(step)
        assert ((written != block).sum(1) >= 1).all() and torch.equal(written[block != MASK], block[block != MASK])


@pytest.mark.parametrize("gen_length", [quality.GEN_LENGTH, 21, 9])
@pytest.mark.parametrize("name", [name for name, policy in compare.POLICIES.items() if policy.arguments])
def test_generate_gives_the_tokens_and_forwards_of_the_formula(sibling, work, name, gen_length):
    policy, own = compare.POLICIES[name], work._replace(gen_length=gen_length)
    for length in (sibling.block_length, 48):
        by_formula = plain.decode(sibling, own.prompts, policy.rule(policy.default, length), gen_length, length)
        assert compare.answers_of(sibling, own, policy, policy.default, length) == by_formula
        assert any(answer.checks for answer in by_formula) == (name == "self_speculative")
        assert any(answer.tokens == gen_length for answer in by_formula) >= (gen_length < 30)


def test_area_under_accuracy_by_hand():
    weight = math.exp(-3 * (1 - 78 / 80))
    area = 2 * 80 + (4 - 2) * (78 * weight + 80) / 2
    assert frontier.aup([(4, 78), (2, 80)], best=80) == pytest.approx(area)
    assert frontier.aup([(4, 78), (2, 80), (6, 74.9)], best=80) == pytest.approx(area)  # more than five points below
    assert frontier.aup([(3, 50)], best=80) == 150  # the first rectangle is not weighed
    assert frontier.aup([(3, 0)], best=0) == 0


def test_speed_at_equal_accuracy_by_hand():
    base = [(2, 0.9), (4, 0.8), (3, 0.7), (6, 0.6)]  # the third is worth nothing
    assert frontier.envelope(base) == [(6, 0.6), (4, 0.8), (2, 0.9)]
    found = frontier.gains([(6, 0.85), (5, 0.7), (8, 0.65)], base)  # the second is worth nothing
    assert [accuracy for accuracy, _ in found] == [0.65, 0.8, 0.85]  # of either, where both are
    assert [ratio for _, ratio in found] == pytest.approx([8 / 5.5, 6.5 / 4, 6 / 3])
    assert frontier.gains([(9, 0.95)], base) == []


def test_a_check_costs_more_than_a_forward_and_less_than_two():
    assert frontier.check_cost() == pytest.approx(1.34, abs=0.005)
    answers = [plain.Answer([1] * 29, 30, 2, 1), plain.Answer([1] * 9, 10, 3, 0)]
    point = compare.point(0.3, answers, 0.5)
    assert point["tpf"] == round(40 / (5 + frontier.check_cost()), 3)
    assert point["short"] == {"answers": 1, "tpf": 3.333} and (point["drafts"], point["checks"]) == (5, 1)


def points(*values):
    return [{"knob": knob, "accuracy": y, "tpf": rho, "short": {"answers": 0, "tpf": None}} for knob, rho, y in values]


def test_what_is_said_of_a_policy():
    measured = {
        "threshold": points((0.95, 2.0, 0.9), (0.5, 4.0, 0.8)),
        "entropy": points((0.6, 4.8, 0.8), (0.3, 3.0, 0.9), (2.5, 9.0, 0.5)),
        "credit": points((0.95, 9.9, 0.9)),
    }
    base, entropy, credit = compare.entries("m", measured)
    assert (entropy["accuracy"], entropy["tpf"], entropy["in_product"]) == (0.9, 3.0, True)  # of its default
    assert entropy["gain"] == {"best": 1.5, "at": 0.9, "median": 1.35, "points": 2}
    assert base["gain"]["best"] == base["gain"]["median"] == 1.0
    assert (credit["leads"], entropy["leads"], base["leads"], credit["in_product"]) == (1, 3, 0, False)
    close = {"threshold": points((0.9, 8.0, 0.9)), "credit": points((0.9, 8.05, 0.901), (0.8, 8.2, 0.9))}
    assert [point["leads"] for point in compare.entries("m", close)[1]["points"]] == [False, True]  # but for chance
    assert entropy["aup"] == round(frontier.aup([(3.0, 90), (4.8, 80), (9.0, 50)], 90), 1)
    goals = {one["goal"]: (one["policy"], one["knob"]) for one in compare.goals([base, entropy, credit])}
    assert goals == {"quality": ("entropy", 0.3), "balanced": ("entropy", 0.3), "speed": ("entropy", 0.3)}


def test_the_models_are_the_embedded_one_and_in_a_checkout_its_siblings():
    assert harness.IN_CHECKOUT
    assert [name for name, _ in demo.checkpoints(None)] == ["embedded", "undertrained", "mixed"]
    assert demo.checkpoints(UNDERTRAINED) == [("undertrained", UNDERTRAINED)]


def test_quality_compares_the_policies(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "policies.svg"
    few = ["--policies", "--quick", "--n", "2", "--model", UNDERTRAINED, "--json"]
    quality.main([*few, "--save", str(tmp_path), "--plot", str(plot)])
    line = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(line)
    assert (tmp_path / "policies.jsonl").read_text("utf-8") == line + "\n"
    assert (result["benchmark"], result["prompts_per_task"], result["check_cost"]) == ("policies", 2, 1.339)
    assert [entry["policy"] for entry in result["policies"]] == list(compare.POLICIES)
    for entry in result["policies"]:
        assert entry["model"] == "undertrained" and 0 <= entry["accuracy"] <= 1 < entry["tpf"] < entry["aup"]
        assert tuple(point["knob"] for point in entry["points"]) == compare.POLICIES[entry["policy"]].quick
        assert any(point["checks"] for point in entry["points"]) == (entry["policy"] == "self_speculative")
    assert any(entry["leads"] for entry in result["policies"]) and plot.stat().st_size > 0


def test_quality_compares_policies_of_one_kind_of_weights(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--policies", "--quantization", "int4"])
    assert "--policies: expected neither --variant nor --quantization" in capsys.readouterr().err


@pytest.fixture
def bench(capsys):
    """`llada2-fast bench policies` in this process: (exit code, stdout, stderr)."""

    def bench(*arguments):
        code = cli.main(["bench", "policies", *map(str, arguments)])
        return code, *capsys.readouterr()

    return bench


@pytest.fixture
def data(tmp_path):
    path, prompts = tmp_path / "own.jsonl", tasks.sample("spell", 3, tasks.SEED)
    pairs = [{"prompt": prompt, "answer": tasks.answer("spell", prompt, random.Random(0))} for prompt in prompts]
    pairs[0]["answer"] += "\u2028\n"  # a line's end for Python, not for JSON
    pairs[-1]["answer"] = f"\n{pairs[-1]['answer'].splitlines()[-1][1:]} "  # a part of it
    path.write_text("\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs) + "\n\n", "utf-8")
    return path


def test_anybodys_prompts(bench, data, tmp_path):
    named = ["--policies", "threshold,credit", "--quick", "--json", "--no-progress"]
    results = {}
    for match in ("exact", "contained"):
        code, out, err = bench("--data", data, "--match", match, *named, "--save", tmp_path)
        assert code == 0, err
        results[match] = json.loads(out.splitlines()[-1])
    own = results["exact"]
    assert [json.loads(line) for line in (tmp_path / "bench-policies.jsonl").open()] == list(results.values())
    assert (own["prompts"], own["match"], own["gen_length"]) == (3, "exact", 256)
    assert [(e["model"], e["policy"]) for e in own["policies"]] == [
        ("llada2-fast-demo", "threshold"), ("llada2-fast-demo", "credit")
    ]  # fmt: skip
    assert [e["accuracy"] for e in own["policies"]] == [0.6667, 0.6667]
    assert [e["accuracy"] for e in results["contained"]["policies"]] == [1.0, 1.0]
    assert [goal["policy"] for goal in own["goals"]] == ["threshold"] * 3
    code, out, err = bench("--data", data, *named, "--limit", 1, "--gen-length", 4)
    result = json.loads(out.splitlines()[-1])
    assert (result["prompts"], result["gen_length"], result["policies"][0]["accuracy"]) == (1, 4, 0.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected --data FILE or --tasks NAME,..."),
        (("--data", "x", "--tasks", "y"), "expected --data FILE or --tasks NAME,..."),
        (("--data", "no/such/file"), "--data='no/such/file': [Errno 2]"),
        (("--data", "x", "--policies", "entropy,beam"), "--policies beam: expected some of threshold, entropy,"),
        (("--data", "x", "--metric", "acc"), "--metric acc: expected --tasks with it"),
        (("--tasks", "x", "--raw"), "--raw: expected --data with it"),
        (("--tasks", "x", "--match", "exact"), "--match exact: expected --data with it"),
        (("--data", "x", "--gen-length", "0"), "--data='x'"),
    ],
)
def test_mistakes_in_what_is_compared(bench, arguments, message):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "") and message in err


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a"}', 'expected {"prompt": text, "answer": text}'),
        ('["a", "b"]', 'expected {"prompt": text, "answer": text}'),
        ('{"prompt": "a", "answer": " "}', "answer=' ': expected some text"),
        ("{", "Expecting property name"),
    ],
)
def test_lines_that_say_no_prompt_and_answer_are_named(bench, tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n' + line + "\n", "utf-8")
    code, _, err = bench("--data", path)
    assert code == 2 and "own.jsonl', line 3: " in err and message in err
    path.write_text("\n", "utf-8")
    assert "expected a line at least" in bench("--data", path)[2]


@pytest.mark.parametrize(
    "there, arguments, message",
    [
        (False, (), '--tasks: needs lm-eval: pip install "llada2-fast[eval]"'),
        (True, ("--policies", "credit"), "--policies credit: expected --data with it, it is not in the product"),
        (True, ("--raw",), "--raw: expected --data with it"),
    ],
)
def test_tasks_want_lm_eval_and_policies_of_the_product(capsys, monkeypatch, there, arguments, message):
    monkeypatch.setattr(policies, "find_spec", lambda name: there or None)
    with pytest.raises(SystemExit):
        policies.main(["--tasks", "gsm8k", *arguments])
    assert message in capsys.readouterr().err
