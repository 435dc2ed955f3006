"""The tuned tables and the tuner: their form, how they are read, what may stand in them, and dry runs without a GPU."""

import copy
import json
from contextlib import closing
from typing import NamedTuple

import pytest
import torch

from benchmarks import aot
from benchmarks.gpu import gates
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.machine import Machine, Point
from benchmarks.lines import lines_of
from benchmarks.tune import cases
from benchmarks.tune import tuner as tune
from llada2_fast.kernels import _tuned, attention, candidates, dense, gemm, refine
from llada2_fast.kernels._triton import force_ops
from tests.kernels.interpreter import interpreted, products_in_order
from tests.kernels.test_attention import make as attention_inputs
from tests.kernels.test_refine import make as refine_inputs

CPU = torch.device("cpu")
MINI = {"dtype": "torch.bfloat16", "length": 32, "heads": 16, "kv_heads": 4, "dim": 128}
TRIES = {  # family -> part -> what is tried
    "attention": cases.ATTENTION,
    "refine": {"vocab_pass": cases.VOCAB, "filter_pass": cases.FILTER},
}


@pytest.fixture
def machine():
    torch.manual_seed(0)
    return Machine(dry=True)


@pytest.fixture
def short_blocks(monkeypatch):
    """The interpreter is slow."""
    monkeypatch.setattr(gates, "BLOCK", 8)


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
    assert not any("tile_k" in parameters for tries in cases.EXPERT_TRIES["fp8"].values() for parameters in tries)


def test_the_table_of_expert_tiles():
    for entry in _tuned.table("moe"):
        kinds = entry.keys() & {"bf16", "fp8", "int4"}
        assert kinds and entry.keys() == {"device", "hidden", "tokens"} | kinds
        for name in kinds:
            assert entry[name].keys() == {"tile_m", "gate_up", "down"}
            for product in (entry[name]["gate_up"], entry[name]["down"]):
                assert product["tile_n"] % 64 == 0 and product["num_warps"] % 4 == 0  # else not one instruction for all


def test_the_table_of_dense_tiles():
    for entry in _tuned.table("dense"):
        kinds = entry.keys() & {"bf16", "fp8"}
        assert kinds and entry.keys() == {*tune.KEYS["dense"]} | kinds
        for kind in kinds:
            assert entry[kind].keys() - {"tile_k"} == {"tile_m", "tile_n", "num_warps", "num_stages"}
            assert entry[kind]["tile_n"] in (64, 128) and entry[kind]["num_warps"] % 4 == 0
            assert kind == "bf16" or "tile_k" not in entry[kind]


def test_tiles_of_a_product_with_one_matrix(monkeypatch):
    """Told apart by a tile height that no default has."""
    default = dict(tile_n=64, num_warps=4, num_stages=4)
    assert dense.tiles(CPU, 3072, 2048, False, 16, "fp8") == default | {"tile_m": 16}
    assert dense.tiles(CPU, 3072, 2048, False, 320) == default | {"tile_m": 64}
    wide = dict(tile_m=128, num_warps=8, num_stages=4)
    assert dense.tiles(CPU, 3072, 2048, False, 1280, "fp8") == wide | {"tile_n": 64}
    assert dense.tiles(CPU, 157184, 2048, False, 256, "fp8") == wide | {"tile_n": 128}
    assert dense.tiles(CPU, 10240, 2048, True, 1280, "fp8")["tile_m"] == 64
    shape = {"device": "X", "rows": 3072, "columns": 2048, "gated": False}
    entries = [shape | {"tokens": 320, "fp8": {"tile_m": 2}}, shape | {"tokens": 64, "fp8": {"tile_m": 1}}]
    monkeypatch.setattr(_tuned, "table", lambda family: entries if family == "dense" else [])
    monkeypatch.setattr(_tuned, "device_name", lambda device: "X")

    def tile_m(tokens, rows=3072, columns=2048, gated=False, kind="fp8"):
        return dense.tiles.__wrapped__(CPU, rows, columns, gated, tokens, kind)["tile_m"]

    assert [tile_m(tokens) for tokens in (7, 8, 64, 65, 320, 321)] == [16, 1, 1, 2, 2, 64]
    assert [tile_m(64, rows=2048), tile_m(64, columns=1024), tile_m(64, gated=True)] == [64] * 3
    assert tile_m(64, kind=None) == 16


def expert_tiles(device, name, monkeypatch, entries):
    """tile_m by tokens and kind where the table has these entries too."""
    known = _tuned.table("moe") + entries
    for module in (_tuned, gemm):
        monkeypatch.setattr(module, "table", lambda family: known)
    monkeypatch.setattr(_tuned, "device_name", lambda device: name)
    return lambda tokens, kind=None: gemm.tiles.__wrapped__(device, 2048, tokens, kind)["tile_m"]


def test_an_entry_serves_its_tokens_and_fewer_but_not_more(monkeypatch):
    """Told apart by a tile height that no default has."""

    def entry(tokens, kind, tile_m, hidden=2048):
        return {"device": "X", "hidden": hidden, "tokens": tokens, kind: {"tile_m": tile_m}}

    entries = [entry(64, "bf16", 1), entry(1024, "bf16", 3), entry(320, "bf16", 2), entry(320, "fp8", 5)]
    entries += [entry(4096, "bf16", 4, hidden=4096)]
    tile_m = expert_tiles(CPU, "X", monkeypatch, entries)
    assert [tile_m(tokens) for tokens in (32, 64, 65, 320, 321, 1024)] == [1, 1, 2, 2, 3, 3]
    assert [tile_m(tokens) for tokens in (1025, 4096, 10**6)] == [64, 64, 64]
    assert [tile_m(tokens, "fp8") for tokens in (39, 40, 320, 321)] == [16, 5, 5, 32]
    assert [tile_m(tokens, "int4") for tokens in (39, 40, 321)] == [16, 16, 32]
    assert expert_tiles(CPU, "Y", monkeypatch, entries)(64) == 16
    assert expert_tiles(CPU, "X", monkeypatch, [entry(4096, "bf16", 7)])(10**6) == 7


def test_an_entry_holds_for_its_device_and_shape_alone(monkeypatch):
    entries = [{"device": "GPU X"} | MINI | {"whole": {"TILE_M": 64, "num_stages": 3}}]
    monkeypatch.setattr(_tuned, "table", lambda family: entries if family == "attention" else [])
    arguments = torch.bfloat16, 32, 16, 4, 128
    _tuned._find.cache_clear()
    way, default = attention.attention_tiles(CPU, *arguments, blocks=40)
    assert way == "whole" and (default["TILE_M"], default["num_warps"], default["num_stages"]) == (128, 8, 4)
    narrow = attention.attention_tiles(CPU, *arguments, blocks=1)
    monkeypatch.setattr(_tuned, "device_name", lambda device: "GPU X")
    _tuned._find.cache_clear()
    assert attention.attention_tiles(CPU, *arguments, blocks=40) == (way, default | {"TILE_M": 64, "num_stages": 3})
    assert attention.attention_tiles(CPU, *arguments, blocks=1) == narrow
    assert attention.attention_tiles(CPU, torch.bfloat16, 32, 32, 4, 128, blocks=40)[1]["num_stages"] == 4
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


@pytest.mark.parametrize("entry", [{"split": {"TILE_M": 16}}, {"whole": {"TILE_M": 16}}], ids=str)
def test_attention_keeps_its_bits(entry, monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 32)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 3 if "whole" in entry else 8)
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
    logits, index, before, params, ids = refine_inputs(size, torch.float32, "contiguous", True, 3)

    def run():
        state = copy.deepcopy(before)
        with interpreted():
            out = refine.launch(logits, state, params, ids, index, True, False, size[3])
        return [x.contiguous().view(torch.uint8) for x in (*out, *vars(state).values())]

    default = run()
    with _tuned.tried("refine", entry):
        assert all(torch.equal(a, b) for a, b in zip(run(), default, strict=True))


def test_parameters_that_change_bits_are_refused(machine, capsys, short_blocks):
    group = next(group for group in cases.attention_groups(machine) if group.part == "split")
    compiled = tune.Compiled("sm_90", dry=True)
    line = tune.tune(machine, group._replace(name="two", tries=[{"TILE_N": 16}, {"num_stages": 4}]), compiled)
    assert line["left_out"] == 1 and line["fastest"] == {"num_stages": 4}
    assert capsys.readouterr().out.endswith("left out {'TILE_N': 16}: other bits than the defaults\n")
    assert "fastest" not in tune.tune(machine, group._replace(name="one", tries=[{"TILE_N": 16}]), compiled)


def test_parameters_that_do_not_compile_are_named():
    """Far more shared memory than there is; the other one is fine. None of it needs data."""
    group = next(iter(tune.groups(tune.Shapes(), ["attention"])))
    group = group._replace(tries=[{"num_stages": 32}, {"num_stages": 3}])
    with closing(tune.Compiled("sm_90", ahead=[group])) as compiled:
        found = compiled.faults(group)
    assert list(found) == [0] and "shared memory" in found[0]


def test_a_kernel_is_compiled_once_however_many_groups_launch_it(monkeypatch):
    """Tokens are no constant: groups of several numbers of them share kernels."""
    compiled, done = tune.Compiled("sm_90"), []
    monkeypatch.setattr(
        aot, "compile_each", lambda work, processes: [done.append(w) or Compilation(None) for w in work]
    )
    few = [group for group in tune.groups(tune.Shapes(), ["moe"]) if group.shape["tokens"] <= 64][:8]
    assert [compiled.faults(group) for group in few] == [{}] * 8
    kernels = {launch.name for launch, *_ in done}
    assert len(kernels) == len(done) == len({x.name for x in tune.launches(tune.Shapes(), few)} & kernels) == 134


def test_launches_are_those_of_the_real_shapes():
    """Also where there is no GPU."""
    found = tune.launches(tune.Shapes(), tune.groups(tune.Shapes(), ["moe"])[:3])
    names = [launch.kernel.__name__ for launch in found]
    assert names.count("_gemm_kernel") == 32 + 32 + 10 and {"_select_kernel", "_quantize_kernel"} < set(names)
    gemms = [launch for launch in found if launch.kernel.__name__ == "_gemm_kernel"]
    assert {launch.constants[gemms[0].kernel.arg_names.index("K"),] for launch in gemms} == {2048, 512}


@pytest.mark.parametrize("op", tune.FAMILIES)
def test_shapes_launch_what_tensors_do(op, machine, short_blocks):
    shapes = tune.Shapes(dry=True)
    for real, empty in zip(tune.groups(machine, [op]), tune.groups(shapes, [op]), strict=True):
        there, early = tune.launches(machine, [real]), tune.launches(shapes, [empty])
        assert [aot.not_early(one).name for one in early] == [aot.not_early(one).name for one in there] != []


# the tuner


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_ops_are_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", "--ops", "moe,speed"])
    assert "--ops speed: expected some of moe, attention, refine, dense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", "--models", "large"])
    assert "--models large: expected some of mini, flash" in capsys.readouterr().err


def test_groups_by_their_names(capsys):
    every = tune.groups(tune.Shapes(), ["moe"])
    chosen = tune.groups(tune.Shapes(), ["moe"], names=["int4 m64", "fp8 m32 "])
    wanted = [g.name for g in every if (g.shape["kind"], g.shape["tokens"]) in (("int4", 64), ("fp8", 32))]
    assert [group.name for group in chosen] == wanted and len(wanted) == 4
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", "--names", "int5"])
    assert "--names int5: no group of these" in capsys.readouterr().err


def test_the_telling_groups_come_first():
    groups = tune.groups(tune.Shapes())
    moe = [(group.shape["tokens"], group.shape["kind"], group.shape["tile_m"]) for group in groups[:66]]
    assert list(dict.fromkeys(moe))[:6] == [
        (tokens, kind, 16) for tokens in (64, 32) for kind in ("bf16", "fp8", "int4")
    ]
    assert list(dict.fromkeys(tokens for tokens, *_ in moe)) == [64, 32, 320, 1280, 1024, 4096]
    assert [tile_m for tokens, kind, tile_m in dict.fromkeys(moe) if (tokens, kind) == (1024, "fp8")] == [32, 16, 64]
    assert [group.family for group in groups[66:70]] == ["attention"] * 2 + ["refine"] * 2
    names = [group.name.removeprefix("dense mini fp8 ") for group in groups[70:]]
    assert names[:4] == ["LM head m1024", "QKV m64", "dense m64", "LM head m32"] and len(names) == 30
    assert any("flash" in group.name for group in tune.groups(tune.Shapes(), models=tune.MODELS))


@pytest.mark.parametrize("op, names", [
    ("moe", "int4"), pytest.param("moe", "", marks=pytest.mark.slow),
    *((op, "") for op in tune.FAMILIES if op != "moe"),
])  # fmt: skip
def test_dry_run_is_kept_and_resumed(op, names, tmp_path, capsys, short_blocks):
    path, before = tmp_path / "tune.jsonl", _tuned.table_path(op).read_bytes()
    command = ["--dry-run", "--ops", op, "--device-name", "X", "--tables", str(tmp_path), "--results", str(path)]
    command += ["--names", names]
    assert tune.main(command) == 0
    lines = lines_of(path)
    groups = tune.FAMILIES[op](Machine(dry=True))
    assert [line["point"] for line in lines] == [group.name for group in groups if names in group.name] != []
    for line in lines:
        assert line["benchmark"] == "tune" and line["tried"] == tune.DRY_TRIES and line["left_out"] == 0
        assert line["share"] > 0 and line["noise"] >= tune.LEAST_GAIN and min(line["us"] + line["default_us"]) > 0
    capsys.readouterr()
    assert tune.main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["measured"] == 0
    assert _tuned.table_path(op).read_bytes() == before


def test_it_ends_within_its_minutes(capsys):
    assert tune.main(["--dry-run", "--minutes", "0"]) == gpu.LEFT_OUT
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["measured"] == 0 and outcome["left_out"] == 12


class Compilation(NamedTuple):
    fault: str | None


def line(parameters, share, default_us=100.0):
    return {"fastest": parameters, "share": share, "noise": 0.02, "default_us": [default_us]}


def test_what_beats_the_defaults_by_more_than_the_noise_becomes_an_entry(machine):
    groups = cases.attention_groups(machine) + cases.refine_groups(machine)
    lines = {
        "attention mini split": line({"TILE_M": 64}, 0.9), "attention mini whole": line({"TILE_M": 64}, 0.99),
        "refine vocab_pass": {"kept": "nothing"}, "refine filter_pass": {"error": "x"},
    }  # fmt: skip
    found = tune.entries(groups, lines, "X")
    assert found["attention"] == [
        {"device": "X"} | groups[0].shape | {"split": {"TILE_M": 64}},
        {"device": "X"} | groups[0].shape | {"whole": None},
    ]
    assert found["refine"] == [{"device": "X"} | groups[2].shape | {"vocab_pass": None}]


def test_every_dense_product_that_was_measured_has_an_entry(machine):
    """The defaults where nothing gains: else an entry measured at more tokens would be taken."""
    groups = cases.dense_groups(tune.Shapes())[:4]
    lines = {
        "dense mini fp8 LM head m1024": line({"tile_m": 7}, 0.9), "dense mini fp8 QKV m64": line({"tile_m": 7}, 0.99),
        "dense mini fp8 dense m64": {"error": "x"},
    }  # fmt: skip
    head, qkv = tune.entries(groups, lines, "X")["dense"]
    assert head == {"device": "X"} | groups[0].shape | {"fp8": {"tile_m": 7}}
    assert qkv == {"device": "X"} | groups[1].shape | {"fp8": dense.default_tiles(3072, False, 64, "fp8")}
    assert qkv["rows"] == 3072 and qkv["columns"] == 2048 and qkv["tokens"] == 64 and qkv["gated"] is False


def test_dense_tries_suit_their_tokens():
    """Few tokens try many stages, many tokens high tiles, and the defaults are among what is tried."""
    for group in cases.dense_groups(tune.Shapes()):
        rows, _, gated, tokens = group.shape.values()
        heights = {parameters["tile_m"] for parameters in group.tries}
        defaults = cases.dense_defaults(rows, gated, tokens, group.part)
        assert max(heights) <= tokens and len(heights) > 1 and defaults in group.tries
        assert (128 in heights) == (tokens > 64 and not gated)


def moe_groups(*cells):
    """Names are "kind tokens tile_m product"."""
    return [
        cases.Group(f"{kind} {tokens} {tile_m} {product}", "moe",
                         {"hidden": 2048, "tokens": tokens, "tile_m": tile_m, "kind": kind}, product, [], None)
        for kind, tokens, tile_m in cells for product in cases.PRODUCTS
    ]  # fmt: skip


def found_tiles(lines):
    """{(tokens, kind): tiles} of the entries; lines {group's name: line}."""
    groups = moe_groups(*((kind, tokens, m) for kind in ("bf16", "fp8") for tokens in (32, 1024) for m in (16, 32)))
    assert set(lines) <= {group.name for group in groups}
    entries = tune.entries(groups, lines, "X").get("moe", [])
    return {(entry["tokens"], kind): entry[kind] for entry in entries for kind in ("bf16", "fp8") if kind in entry}


def test_the_first_product_measured_makes_an_entry():
    """The other one keeps its defaults; so do both where nothing is gained; what failed was not measured."""
    default = gemm.tiles(CPU, 2048, 32)
    assert found_tiles({}) == {}
    found = found_tiles({"bf16 32 16 gate_up": line({"tile_n": 7}, 0.9)})
    assert found == {(32, "bf16"): default | {"gate_up": {"tile_n": 7}}}
    small = {"bf16 32 16 gate_up": line({"tile_n": 7}, 0.99), "bf16 32 16 down": line({"tile_n": 8}, 0.9)}
    assert found_tiles(small) == {(32, "bf16"): default | {"down": {"tile_n": 8}}}
    assert found_tiles({"bf16 32 16 down": line({"tile_n": 7}, 0.99)}) == {(32, "bf16"): default}
    assert found_tiles({"bf16 32 16 down": {"kept": "nothing"}}) == {(32, "bf16"): default}
    for unmeasured in ({"error": "x"}, {"skipped": "weights need 9.9 GB"}):
        assert found_tiles({"bf16 32 16 down": unmeasured}) == {}


def test_another_height_must_be_measured_whole_and_save_more():
    own = {f"fp8 1024 32 {product}": line({"tile_n": 1}, 0.9) for product in cases.PRODUCTS}
    other = {"fp8 1024 16 gate_up": line({"tile_n": 2}, 0.6, 200.0)}
    default = gemm.tiles(CPU, 2048, 1024, "fp8")
    assert found_tiles(own | other) == {(1024, "fp8"): default | {"gate_up": {"tile_n": 1}, "down": {"tile_n": 1}}}
    other["fp8 1024 16 down"] = line({"tile_n": 3}, 1.3)
    expected = {"tile_m": 16, "gate_up": {"tile_n": 2}, "down": {"tile_n": 3}}
    assert found_tiles(own | other) == {(1024, "fp8"): expected}
    other["fp8 1024 16 down"] = line({"tile_n": 3}, 1.79)
    assert found_tiles(other) == {(1024, "fp8"): default}  # less than the noise


def test_tables_hold_what_was_measured_before_the_run_ended(machine, tmp_path):
    """Every line is in them as soon as it is in the results; other entries stay."""
    groups = moe_groups(("bf16", 64, 16), ("fp8", 64, 16))
    results = tune.Kept(machine, None, False, "tune", "x", groups=groups, device="zzz", folder=tmp_path)
    for kinds, group in ((["bf16"], groups[0]), (["bf16"], groups[1]), (["bf16", "fp8"], groups[2])):
        results.add(Point(group.name, "tune", 1.0, None), 1.0, line({"tile_n": 7}, 0.5))
        *others, last = json.loads((tmp_path / "moe_tuned.json").read_text("utf-8"))
        assert others == _tuned.table("moe") and last.keys() == {"device", "hidden", "tokens", *kinds}
    assert last["bf16"] == {"tile_m": 16, "gate_up": {"tile_n": 7}, "down": {"tile_n": 7}}
    assert [path.name for path in tmp_path.iterdir()] == ["moe_tuned.json"]


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
