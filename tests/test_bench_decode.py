"""The side-by-side benchmark of decoding at tiny sizes: its token gate, peers, memory meter, fit and result line."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_decode, models
from benchmarks.bench_decode import Plan, Point, fitted, gated_peaks, judged, order, timings
from benchmarks.harness import peak_bytes
from benchmarks.models import SMALL, random_model
from llada2_fast.kernels.moe import experts
from llada2_fast.kernels.router import route
from llada2_fast.model import LLaDA2Model

SHAPE = replace(
    SMALL, vocab_size=512, hidden_size=64, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=32,
    head_dim=16, mask_token_id=511, pad_token_id=510, eos_token_id=(510,),
)  # fmt: skip
TINY = Plan(
    Point("base", prompt=40, generated=40), {"prompt": (96,), "batch": (2,), "threshold": (0.05,)},
    {"diffusers": 1_500, "card": 1_000}, 2, (64, 96, 2048), 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def line(model, tmp_path_factory):
    """What a run of the tiny plan leaves behind."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench_decode.PLANS, "quick", TINY)
        patch.setattr(bench_decode, "SMALL", SHAPE)
        bench_decode.main(["--quick", "--save", str(folder), "--plot", str(folder / "decode.png")])
    assert (folder / "decode.png").stat().st_size > 10_000
    [text] = (folder / "decode.jsonl").read_text("utf-8").splitlines()
    return json.loads(text)


# memory


def test_peak_is_exact_on_known_allocations():
    before = torch.ones(1000)

    def call():
        a = torch.ones(1000)  # 4000 bytes held
        b = torch.ones(500, dtype=torch.int8)  # 4500
        del a  # 500
        c = torch.ones(300, dtype=torch.float64)  # 2900
        c.add_(before[:300])  # 5300 inside: the operator widens its operand
        return b

    result, peak = peak_bytes(call)
    assert peak == 5300 and result.shape == (500,)


def test_peak_does_not_count_the_release_of_older_tensors():
    old = [torch.ones(100_000)]

    def call():
        old.clear()
        return torch.ones(1000)

    assert peak_bytes(call)[1] == 4000
    assert peak_bytes(lambda: None) == (None, 0)


def test_peak_is_the_same_at_every_run(model):
    call = models.ours(model, models.Task(torch.arange(70)[None], 40))
    call()
    assert peak_bytes(call)[1] == peak_bytes(call)[1] > 0


def test_recording_is_on_again_after_a_call_that_fails():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).add_(1)
    assert any(event.name == "aten::add_" for event in profile.events())


# peers


@pytest.mark.parametrize("steps, threshold", [(8, 2.0), (32, 0.05), (5, 0.07)])
@pytest.mark.parametrize("length", [1, 33, 64])
def test_everybody_decodes_the_same_tokens(model, steps, threshold, length):
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, SHAPE.vocab_size - 2, (1, length), generator=generator)
    task = models.Task(prompt, 50, steps, threshold)
    wanted = models.ours(model, task)()
    assert torch.equal(wanted.sequences, models.ours(model, task, profile="hf-2.0")().sequences)
    for name, make in (models.PEERS | models.AT_THE_BASE | models.ABLATIONS).items():
        outcome = make(model, task)()
        assert torch.equal(outcome.sequences, wanted.sequences), name
        if name.startswith("diffusers"):  # it spends a forward on a block that is full before its last step
            assert outcome.forwards["denoise"] >= wanted.forwards["denoise"]
        else:
            assert outcome.forwards["denoise"] == wanted.forwards["denoise"], name


def test_parts_are_really_off(model):
    task = models.Task(torch.arange(64)[None], 64)
    forwards = {name: make(model, task)().forwards for name, make in models.ABLATIONS.items()}
    whole = {"denoise": 16, "prefill": 1, "settle": 0}
    assert forwards["cache"] == {"denoise": 16, "prefill": 0, "settle": 0}
    assert forwards["carried-along settling"] == {"denoise": 16, "prefill": 1, "settle": 1}
    assert forwards["grouped experts"] == forwards["fused refinement"] == whole


def test_an_ablation_takes_its_part_out_and_leaves_the_model_alone(model):
    task, own = models.Task(torch.arange(32)[None], 32), [type(layer.mlp) for layer in model.layers]
    calls = {}
    for name in ("grouped experts", "fused refinement"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            models.ABLATIONS[name](model, task)()
        calls[name] = {event.key: event.count for event in profile.key_averages()}
    assert calls["grouped experts"]["aten::repeat_interleave"] > 0
    assert "llada2_fast::refine_step" not in calls["fused refinement"]
    assert calls["grouped experts"]["llada2_fast::refine_step"] == 8  # steps
    assert [type(layer.mlp) for layer in model.layers] == own
    assert not any(isinstance(part, models.MaskedExperts) for part in model.modules())


def test_masked_experts_is_the_same_function(model):
    mlp = model.layers[1].mlp
    h = torch.randn(37, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    routing = route(h, mlp.router.weight, mlp.router.expert_bias, *mlp.router.rule)
    shared = mlp.shared_experts.weights
    wanted = experts(h, routing, *mlp.experts.weights, shared)
    torch.testing.assert_close(models.MaskedExperts(mlp.experts)(h, routing, shared), wanted, rtol=1e-5, atol=1e-5)


# gate and clock


def test_a_peer_with_other_tokens_is_refused_before_anything_is_timed(model):
    task = models.Task(torch.arange(40)[None], 32)
    right = models.ours(model, task)

    def wrong():
        outcome = right()
        outcome.sequences[0, -1] += 1
        return outcome

    with pytest.raises(SystemExit, match="'wrong' differ from ours: nothing is timed"):
        gated_peaks({"ours": right, "wrong": wrong})
    seen = gated_peaks({"ours": right, "alike": right})
    assert list(seen) == ["ours", "alike"]


def test_ours_runs_before_and_after_every_other_one():
    assert order(["a", "b", "c"], 2) == ["a", "b", "a", "c", "a", "b", "a", "c", "a"]
    assert order(["a"], 1) == ["a", "a", "a"]
    seconds = timings({"a": lambda: None, "b": lambda: None}, order(["a", "b"], 3))
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 3}


# fit and goals


def test_fit_is_the_line_of_least_squares():
    exact = fitted((0, 1024, 3072), [5.0, 7.0, 11.0])
    assert exact["intercept_ms"] == pytest.approx(5) and exact["slope_ms_per_1k"] == pytest.approx(2)
    assert exact["r2"] == pytest.approx(1)
    rough = fitted((0, 1024, 2048), [0.0, 3.0, 3.0])  # by hand: 0.5 + 1.5 x, residuals -0.5, 1, -0.5
    assert rough["intercept_ms"] == pytest.approx(0.5) and rough["slope_ms_per_1k"] == pytest.approx(1.5)
    assert rough["r2"] == pytest.approx(1 - 1.5 / 6)


def test_goals_are_judged_on_their_points():
    def point(prompt, ratio, peak, theirs, **changed):
        values = Point("", prompt=prompt)._replace(**changed)._asdict()
        plain = ratio + 2 if prompt == 512 else None
        return values | {"ratio_vs_diffusers": ratio, "ratio_vs_diffusers_plain": plain, "peak_bytes": peak,
                         "diffusers_peak_bytes": theirs}  # fmt: skip

    points = [point(512, 9.0, 20, 100), point(2048, 31.0, 40, 100), point(2048, 5.0, 10, None, batch=4)]
    goals = judged(points)
    assert [goal["met"] for goal in goals.values()] == [False, False, True, True]
    assert [goal["value"] for goal in goals.values()] == [9.0, 11.0, 31.0, 0.2]
    assert [goal["met"] for goal in judged([point(64, 9.0, 20, 100)]).values()] == [None] * 4


# the run


def test_line_has_its_keys(line):
    assert line["benchmark"] == "decode" and line["quick"] is True and line["threads"] == 1
    assert {"prompt", "generated", "tok_s", "ratio_vs_diffusers", "block_2048_over_64"} <= line.keys()
    assert line["tok_s"] == line["points"][0]["tok_s"] > 0
    assert {"met", "value"} <= set.intersection(*(set(goal) for goal in line["goals"].values()))
    assert [point["factor"] for point in line["points"]] == ["base", "prompt", "batch", "threshold"]
    for point in line["points"]:
        assert {"prompt", "generated", "batch", "threshold", "tok_s", "std_tok_s", "forwards", "tpf", "peak_bytes"} <= {
            key for key, value in point.items() if value is not None
        }
        for peer in ("diffusers", "card"):
            ran = point[f"{peer}_tok_s"] is not None
            assert (point[f"ratio_vs_{peer}"] is not None) == (point[f"{peer}_peak_bytes"] is not None) == ran
            if ran:
                assert point[f"ratio_vs_{peer}"] == pytest.approx(point["tok_s"] / point[f"{peer}_tok_s"])


def test_line_counts_forwards(line):
    base, longer, batch, threshold = line["points"]
    # 40 prompt tokens: the first block has 24 masks to fill, by 4 a step
    assert (base["denoise_forwards"], base["prefill_forwards"], base["forwards"]) == (14, 1, 15)
    assert base["tpf"] == pytest.approx(40 / 14) and base["diffusers_forwards"] == 15
    assert longer["denoise_forwards"] == 16 and batch["denoise_forwards"] == base["denoise_forwards"]
    assert threshold["denoise_forwards"] < base["denoise_forwards"]


def test_line_names_ablations_and_costs(line):
    assert [part["without"] for part in line["ablations"]] == list(models.ABLATIONS)
    assert all(part["ratio"] > 0 and part["peak_bytes"] > 0 for part in line["ablations"])
    assert [cost["who"] for cost in line["cost"]] == ["ours", "diffusers"]
    for cost in line["cost"]:
        assert cost["prefix"] == [64, 96, 2048] and min(cost["ms_per_block"]) > 0
        assert cost.items() >= fitted(cost["prefix"], cost["ms_per_block"]).items()


def test_line_has_experts_in_int4(line, model):
    four = line["int4"]
    assert four["tok_s"] > 0 and four["ratio"] > 0
    assert four["wide_weight_bytes"] == sum(p.nbytes for p in model.parameters())
    words = sum(p.nbytes for p in models.in_int4(model).parameters())
    assert four["weight_bytes"] == words < four["wide_weight_bytes"]


def test_the_twin_in_int4_has_the_weights_of_the_network(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LLaDA2Model.from_pretrained(tmp_path, torch.float32, progress=False, quantization="int4")
    for (name, ours), theirs in zip(models.in_int4(model).named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_peers_are_left_out_where_they_would_take_too_long(line):
    ran = [(point["diffusers_tok_s"] is not None, point["card_tok_s"] is not None) for point in line["points"]]
    assert ran == [(True, True), (True, False), (True, False), (True, True)]


def test_quick_and_full_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["--quick", "--full"])
    assert "expected one of them" in capsys.readouterr().err
