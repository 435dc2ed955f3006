"""The tuned tables and the tuner: their form, how they are read, what may stand in them, and dry runs without a GPU."""

import copy
import json

import pytest
import torch

from benchmarks import aot, gpu_gates, tune, tune_cases, tune_moe
from benchmarks.gpu_machine import Machine
from llada2_fast.kernels import _tuned, attention, candidates, gemm, refine
from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted, products_in_order
from tests.kernels.test_attention import make as attention_inputs
from tests.kernels.test_refine import make as refine_inputs

CPU = torch.device("cpu")
MINI = {"dtype": "torch.bfloat16", "length": 32, "heads": 16, "kv_heads": 4, "dim": 128}
TRIES = {  # family -> part -> what is tried
    "attention": {"attention": tune_cases.ATTENTION, "combine": tune_cases.COMBINE},
    "refine": {"vocab_pass": tune_cases.VOCAB, "filter_pass": tune_cases.FILTER},
}


@pytest.fixture
def machine():
    torch.manual_seed(0)
    return Machine(dry=True)


@pytest.fixture
def short_blocks(monkeypatch):
    """The interpreter is slow."""
    monkeypatch.setattr(gpu_gates, "BLOCK", 8)


# the tables


@pytest.mark.parametrize("family", TRIES)
def test_tables_hold_nothing_but_parameters_that_the_tuner_tries(family):
    for entry in _tuned.table(family):
        parts = {name: value for name, value in entry.items() if name not in tune.KEYS[family]}
        assert entry.keys() > set(tune.KEYS[family]) and entry["device"] != "any" and parts
        assert all(value in TRIES[family][name] for name, value in parts.items())


def test_no_entry_depends_on_the_batch_and_what_defines_the_bits_is_never_tried():
    for family, parts in TRIES.items():
        assert not {"batch", "rows", "tokens", "prefix"} & set(tune.KEYS[family])
        for tries in parts.values():
            assert not {"TILE_N", "SPLIT", "MAX_SPLITS", "TILE_V", "CHUNK", "GROUP"} & {key for t in tries for key in t}
    assert not any("tile_k" in parameters for parameters in tune_moe.TRIES)


def test_the_table_of_expert_tiles():
    sizes = gemm.tiles(CPU, 2048, 1)
    assert gemm.tiles(CPU, 2048, sizes["tokens"]) == sizes
    assert gemm.tiles(CPU, 2048, 10**6)["tokens"] == 4096
    for entry in _tuned.table("moe"):
        assert entry.keys() >= {"device", "hidden", "tokens", "tile_m", "bf16"}
        for name in entry.keys() & {"bf16", "fp8"}:
            for product in (entry[name]["gate_up"], entry[name]["down"]):
                assert product["tile_n"] % 64 == 0 and product["num_warps"] % 4 == 0  # else not one instruction for all


def test_an_entry_holds_for_its_device_and_shape_alone(monkeypatch):
    entries = [{"device": "GPU X"} | MINI | {"attention": {"TILE_M": 64, "num_stages": 3}}]
    monkeypatch.setattr(_tuned, "table", lambda family: entries if family == "attention" else [])
    arguments = torch.bfloat16, 32, 16, 4, 128
    _tuned._find.cache_clear()
    default, combine = attention.attention_tiles(CPU, *arguments)
    assert (default["TILE_M"], default["num_warps"], default["num_stages"], default["TILE_N"]) == (128, 8, 5, 32)
    assert (combine["TILE_R"], combine["num_warps"]) == (8, 4)
    monkeypatch.setattr(_tuned, "device_name", lambda device: "GPU X")
    _tuned._find.cache_clear()
    tuned, same = attention.attention_tiles(CPU, *arguments)
    assert tuned == default | {"TILE_M": 64, "num_stages": 3} and same == combine
    assert attention.attention_tiles(CPU, torch.bfloat16, 32, 32, 4, 128)[0]["num_stages"] == 5
    assert candidates.pass_layout(CPU, torch.bfloat16, 157184) == (
        {"SPAN": 1, "STAGES": 1, "num_warps": 8}, {"PIVOTS": 4, "STAGES": 1, "num_warps": 8},
    )  # fmt: skip
    _tuned._find.cache_clear()


def test_what_is_tried_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), _tuned.tried("refine", {"vocab_pass": {"SPAN": 4}}):
        assert candidates.pass_layout(CPU, torch.float32, 99)[0] == {"SPAN": 4, "STAGES": 1, "num_warps": 8}
        raise ZeroDivisionError
    assert candidates.pass_layout(CPU, torch.float32, 99)[0]["SPAN"] == 1


# what may be tuned changes no bit


@pytest.mark.parametrize("entry", [{"attention": {"TILE_M": 16}}, {"combine": {"TILE_R": 4}}], ids=str)
def test_attention_keeps_its_bits(entry, monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 16)
    inputs = attention_inputs([(9, 1, 2), (0, 1, 0), (2, 2, 1)], 8, 4, 1, 16)

    def run():
        with force_ops("triton"), interpreted(), products_in_order():
            return attention.block_attention(*inputs)

    default = run()
    with _tuned.tried("attention", entry):
        assert torch.equal(run(), default)


@pytest.mark.parametrize(
    "entry",
    [{"vocab_pass": {"SPAN": 2, "STAGES": 2}}, {"vocab_pass": {"SPAN": 4}}, {"filter_pass": {"PIVOTS": 8}}],
    ids=str,
)
def test_refinement_keeps_its_bits(entry):
    """Seven tiles: the last program of a span has fewer."""
    size = (3, 4, 64 * 13 - 5, 128)
    logits, index, before, params, mask_id = refine_inputs(size, torch.float32, "contiguous", True, 3)

    def run():
        state = copy.deepcopy(before)
        with interpreted():
            out = refine.launch(logits, state, params, mask_id, index, True, False, size[3])
        return [x.contiguous().view(torch.uint8) for x in (*out, *vars(state).values())]

    default = run()
    with _tuned.tried("refine", entry):
        assert all(torch.equal(a, b) for a, b in zip(run(), default, strict=True))


def test_parameters_that_change_bits_are_refused(machine, capsys, short_blocks):
    group = next(group for group in tune_cases.attention_groups(machine) if group.part == "attention")
    line = tune.tune(machine, group._replace(tries=[{"TILE_N": 16}, {"num_stages": 4}]))
    assert line["left_out"] == 1 and line["fastest"] == {"num_stages": 4}
    assert capsys.readouterr().out.endswith("left out {'TILE_N': 16}: other bits than the defaults\n")
    assert "fastest" not in tune.tune(machine, group._replace(tries=[{"TILE_N": 16}]))


def test_parameters_that_do_not_compile_are_named():
    """Far more shared memory than there is; the other one is fine."""

    def call(parameters):
        with _tuned.tried("attention", {"attention": parameters}):
            aot.SCENARIOS["attention mini bf16 one split"]()

    found = tune.faults([{"num_stages": 32}, {"num_stages": 3}], [call], "sm_90")
    assert list(found) == [0] and "shared memory" in found[0]


# the tuner


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("main", [tune.main, tune_moe.main])
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2(main, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_ops_are_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", "--ops", "moe,speed"])
    assert "--ops speed: expected some of attention, refine, moe" in capsys.readouterr().err


@pytest.mark.parametrize("op", tune.FAMILIES)
def test_dry_run_is_kept_and_resumed(op, tmp_path, capsys, short_blocks):
    path, before = tmp_path / "tune.jsonl", _tuned.table_path(op).read_bytes()
    command = ["--dry-run", "--ops", op, "--device-name", "X", "--tables", str(tmp_path), "--results", str(path)]
    assert tune.main(command) == 0
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["point"] for line in lines] == [group.name for group in tune.FAMILIES[op](Machine(dry=True))]
    for line in lines:
        assert line["benchmark"] == "tune" and line["tried"] == tune.DRY_TRIES and line["left_out"] == 0
        assert line["share"] > 0 and line["noise"] >= tune.LEAST_GAIN and min(line["us"] + line["default_us"]) > 0
    capsys.readouterr()
    assert tune.main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 0
    assert _tuned.table_path(op).read_bytes() == before


def test_it_ends_within_its_minutes(capsys):
    assert tune.main(["--dry-run", "--minutes", "0"]) == 0
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["measured"] == 0 and outcome["left_out"] == 8


def line(parameters, share, default_us=100.0):
    return {"fastest": parameters, "share": share, "noise": 0.02, "default_us": [default_us]}


def test_what_beats_the_defaults_by_more_than_the_noise_becomes_an_entry(machine):
    groups = tune_cases.attention_groups(machine) + tune_cases.refine_groups(machine)
    lines = {
        "attention mini attention": line({"TILE_M": 64}, 0.9), "attention mini combine": line({"TILE_R": 4}, 0.99),
        "refine vocab_pass": {"skipped": "nothing"}, "refine filter_pass": {"error": "x"},
    }  # fmt: skip
    found = tune.entries(groups, lines, "X")
    assert found["attention"] == [
        {"device": "X"} | groups[0].shape | {"attention": {"TILE_M": 64}},
        {"device": "X"} | groups[0].shape | {"combine": None},
    ]
    assert found["refine"] == [{"device": "X"} | groups[2].shape | {"vocab_pass": None}]


def test_expert_entries_are_whole(machine):
    """A height counts if everything at it was measured and no type loses; other tokens keep the defaults."""
    groups = [
        tune_cases.Group(f"{kind} {tokens} {tile_m} {product}", "moe",
                         {"hidden": 2048, "tokens": tokens, "tile_m": tile_m, "kind": kind}, product, [], None)
        for kind in ("bf16", "fp8") for tokens in (32, 1024) for tile_m in (16, 32) for product in ("gate_up", "down")
    ]  # fmt: skip
    shares = {("bf16", 16): 0.95, ("fp8", 16): 0.95, ("bf16", 32): 0.5, ("fp8", 32): 1.2}
    lines = {
        group.name: line({"tile_n": group.shape["tile_m"]}, shares[group.shape["kind"], group.shape["tile_m"]])
        for group in groups if group.shape["tokens"] == 32
    }  # fmt: skip
    few, many = tune_moe.entries(groups, lines, "X")
    product = {"gate_up": {"tile_n": 16}, "down": {"tile_n": 16}}
    assert few == {"device": "X", "hidden": 2048, "tokens": 32, "tile_m": 16, "bf16": product, "fp8": product}
    default = gemm.tiles(CPU, 2048, 1024)
    assert many == default | {"device": "X", "hidden": 2048, "tokens": 1024}
    del lines["fp8 32 16 down"]
    assert tune_moe.entries(groups, lines, "X") == []


@pytest.mark.parametrize("family", tune.KEYS)
def test_writing_a_table_keeps_what_was_not_measured(family, tmp_path):
    path, table = tmp_path / f"{family}_tuned.json", _tuned.table(family)
    tune.write_table(family, [], tmp_path)
    assert path.read_text("utf-8") == _tuned.table_path(family).read_text("utf-8")
    key = {"device": "zzz"} | {name: 7 for name in tune.KEYS[family][1:]}
    tune.write_table(family, [key | {"a": {"num_warps": 4}}, key | {"a": None, "b": {"num_warps": 8}}], tmp_path)
    assert json.loads(path.read_text("utf-8")) == [*table, key | {"b": {"num_warps": 8}}]
    tune.write_table(family, [key | {"a": None}], tmp_path)
    assert json.loads(path.read_text("utf-8")) == table
