"""What a decoding asks of a machine, counted: the same figures at every run, on any CPU, without a GPU.

    python -m benchmarks.counts [--parts steps,kernels,aot | --quick] [--check] [--json] [--save]

steps   forwards of fixed decodings, and the calls of PyTorch's operators they make on a CPU; launches of a refinement
        step and of a whole denoise step of LLaDA2-mini and of 2.2-flash, run at their real shapes without data, which
        a host sync would end; bytes they read: of the refinement the logits, counted in Triton's interpreter, of the
        step as benchmarks.roofline says; calls of operators around the graph in the loop that replays it (--quick: this
        part)
kernels launches, bytes and operations of each kernel of whole denoise steps of LLaDA2-mini, see benchmarks.launches
aot     registers, spills, shared memory and instructions (PTX and SASS) of some kernels compiled for sm_90

--check holds them against the newest line of benchmarks/results/counts.jsonl by the rule of `benchmarks.compare
--counted` and exits 1 where one has grown or is gone; --save appends a new one. Compiled code depends on Triton's
version, calls of operators on PyTorch's: they are compared within one version only.
"""

import argparse
import json
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from triton.runtime.interpreter import InterpreterBuilder

from llada2_fast import LLaDA2Model, demo
from llada2_fast.config import DecodeParams
from llada2_fast.decoding.decoder import BlockDecoder, decode_all, prefill_all
from llada2_fast.decoding.graph_runner import GraphRunner
from llada2_fast.decoding.lanes import Lanes
from llada2_fast.decoding.sequence import Sequence
from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops
from llada2_fast.kernels.product import torch_products
from llada2_fast.kernels.refine import SpecialIds
from llada2_fast.weights.special_tokens import load_tokenizer

from . import compare, harness
from .aot import SCENARIOS, compile_launch, compiled, recorded
from .gpu.machine import QUANTIZATIONS, Shapes
from .gpu.steps import Step
from .interpreter import interpreted
from .kernels.bench_decoding import Step as RefineStep
from .launches import Calls, steps_of_mini
from .roofline import BLOCK, CAPACITY, MINI, step_costs

PARTS = ("steps", "kernels", "aot")
PROMPTS = ("Add 847 and 96.", "Spell 4071, 22, 608.", "Tell a story about Max the goat near the lake.")
SETTINGS = {  # of decodings of the embedded model; by name what generate() is given
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.9, editing 0.9": {"threshold": 0.9, "editing_threshold": 0.9, "max_post_steps": 16},
    "threshold 0.5, editing 0.5, no post steps": {"threshold": 0.5, "editing_threshold": 0.5, "max_post_steps": 0},
    "quota of 8 steps": {"threshold": 2.0, "steps": 8},
}
GOLDEN = harness.ROOT / "tests" / "golden" / "tiny"
RECORDED = ("aligned", "low_threshold", "quality", "speed")  # cases of it
COMPILED = ("refine bf16 filters", "refine 2.2 bf16", "attention mini bf16 B=1", "attention mini bf16 B=40",
            "moe mini bf16 T=32", "moe mini fp8 T=32", "moe mini int4 T=32", "qk_norm_rope mini bf16",
            "advance A=32 C=8", "add_rms_norm bf16 H=2048")  # scenarios of benchmarks.aot  # fmt: skip
TARGET = "sm_90"
LLADA2_2 = {"expert_capacity": CAPACITY, "delete_token_id": 156930, "split_token_id": 156931}


# Decodings on a CPU.


def cases():
    """Yields (name, model, prompts, what else generate() is given) of the fixed decodings."""
    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, progress=False)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    ids = load_tokenizer(demo.path()).apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    for name, params in SETTINGS.items():
        yield f"embedded model, three prompts, {name}", model, ids, params | {"gen_length": 96, "eos_early_stop": True}
    known = {case["label"]: case for case in json.loads((GOLDEN / "generate.json").read_bytes())["cases"]}
    model = tiny()
    for case in map(known.get, RECORDED):
        rules = {"profile": f"hf-{case['version']}"} | case["params"]
        yield f"golden tiny, {case['label']}", model, torch.tensor([case["prompt"]]), rules


def tiny():
    return LLaDA2Model.from_pretrained(GOLDEN, dtype=torch.float32, progress=False)


def decodings():
    """(forwards of each decoding, calls of operators of each)."""
    forwards, calls = [], []
    for name, model, prompts, rules in cases():
        with torch_products(padded=False), Calls() as counted:
            counters = model.generate(prompts, return_dict=True, **rules).counters
        kinds = ("denoise_forwards", "prefill_forwards", "settle_forwards")
        forwards.append({"decoding": name} | {kind: sum(getattr(c, kind) for c in counters) for kind in kinds})
        calls.append({"decoding": name, "torch": version(torch), "calls": counted.names.total()})
    return forwards, calls


def version(package):
    return package.__version__.partition("+")[0]


class _Apart:
    """A step whose own calls of operators are counted by themselves."""

    def __init__(self, graph, inside):
        self.load, self._graph, self._inside = graph.load, graph, inside

    def run(self):
        with Calls() as counted:
            result = self._graph.run()
        self._inside.append(counted.names)
        return result


class _Counted(GraphRunner):
    """inside: of every step, the calls of its own."""

    def __init__(self, *args):
        super().__init__(*args, capture=False)
        self.inside = []

    def graph(self, active, carried):
        return _Apart(super().graph(active, carried), self.inside)


def around_the_graph():
    """Calls of operators by the loop that replays graphs, all but those inside a step; here a step runs as it is."""
    model = tiny()
    row = Sequence(list(range(40)), DecodeParams(gen_length=64), 0, (252,), model.block_length, special=SpecialIds(255))
    with torch.inference_mode(), torch_products(padded=False), Calls() as all_calls:
        cache = model.new_cache(row.num_blocks, row.block_length)
        runner = _Counted(model, cache, Lanes(1, row.block_length, row.special, pages=row.num_blocks))
        decoder = BlockDecoder(runner)
        row.pages = cache.allocate(row.num_blocks)
        prefill_all(decoder, [row])
        decoder.admit(row)
        decode_all(decoder, [row])
    outside = (all_calls.names - sum(runner.inside, Counter())).total()
    return {"decoding": f"around {len(runner.inside)} replayed steps", "torch": version(torch), "calls": outside}


# The kernels at their real shapes, without data.


def launches(mode, **kind):
    """Names of what a refinement step launches, at the real size and without data, which no host sync would survive.
    kind: of the rows, as of RefineStep."""
    step = RefineStep(8, 157184, torch.bfloat16, "meta", mode, **kind)
    rules = step.state, step.params, step.ids, None, step.filters, False
    with recorded() as kernels, Calls() as counted:
        refine.launch(step.logits, *rules, allowed=step.allowed, moves=step.moves)
    return [*(found.kernel.__name__ for found in kernels), *counted.launched.elements()]


@contextmanager
def _counted_loads(tensor):
    """Counts the elements of `tensor` that interpreted kernels load; yields a list of them, load by load."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    load, counts = InterpreterBuilder.create_masked_load, []

    def counting(self, pointers, mask, *rest):
        at = pointers.data[mask.data] if pointers.data.shape == mask.data.shape else pointers.data
        counts.append(int(((at >= begin) & (at < end)).sum()))
        return load(self, pointers, mask, *rest)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", counting):
        yield counts


def passes(mode, edits=False, entropy=False):
    """How often a refinement step's kernels read the logits, as a share of all of them, in Triton's interpreter."""
    step = RefineStep(1, 157184, torch.bfloat16, "cpu", mode, edits=edits, entropy=entropy)
    step.logits = step.logits[:, :2].contiguous()  # the interpreter is slow
    step.state = refine.BlockState(*(t[:, :2].contiguous() if t.ndim == 2 else t for t in vars(step.state).values()))
    step.moves = refine.Moves.fresh(1, 2) if edits else None
    with interpreted(), force_ops("triton"), _counted_loads(step.logits) as counts:
        step.run()
    return sum(counts) / step.logits.numel()


def refinement():
    """A refinement step of 8 blocks by mode: launches, passes over the logits and the bytes these are; launches where
    the rows are guided."""
    logits = 8 * BLOCK * MINI.vocab_size * 2
    kinds = {"": {}, ", deleting and inserting": {"edits": True}, ", by entropy": {"entropy": True}}
    plain = [(mode, "") for mode in ("greedy", "temperature", "top_k_top_p")]
    for mode, kind in (*plain, ("greedy", ", deleting and inserting"), ("temperature", ", by entropy")):
        read = passes(mode, **kinds[kind])
        yield {
            "what": f"refinement, 8 blocks, {mode}{kind}",
            "launches": len(launches(mode, **kinds[kind])), "syncs": 0,
            "passes": round(read, 4), "bytes": round(read * logits),
        }  # fmt: skip
    for mode in ("greedy", "top_k_top_p"):
        count = len(launches(mode, guided=True))
        yield {"what": f"refinement, 8 blocks, {mode}, guided", "launches": count, "syncs": 0}


def whole_step(quantization, name="mini", **changes):
    """A denoise step, batch 1, prefix 1024: launches within its graph and, from the host, ahead of it.

    name: the model's; changes: of its config."""
    machine = Shapes()
    config = replace(machine.config(name, quantization), **changes)
    step = Step(machine, LLaDA2Model(config, dtype=machine.dtype, device=machine.device), 1, 1024)
    with recorded():
        step.graph.run()  # what is made once is there then, as when a graph is captured
    with recorded() as kernels, Calls() as counted:
        step.graph.run()
    with Calls() as ahead:
        step.load()
    own = counted.launched
    costs = step_costs(config, 1, 1024, quantization)
    return {
        "what": f"denoise step of {name}{' 2.2' * bool(changes)}, {quantization or 'bf16'}, batch 1, prefix 1024",
        "launches": len(kernels) + own.total(), "launches_of_torch": own.total(),
        "launches_outside_graph": ahead.launched.total(), "syncs": 0,
        "bytes": round(sum(cost.bytes for cost in costs.values())),
    }  # fmt: skip


def steps():
    """The cheap part of the counts."""
    forwards, calls = decodings()
    with torch.inference_mode():
        kernels = [*refinement(), *map(whole_step, QUANTIZATIONS.values()), whole_step(None, "flash", **LLADA2_2)]
    return {"part": "steps", "decodings": forwards, "calls": [*calls, around_the_graph()], "kernels": kernels}


def kernels():
    """Those of whole steps."""
    return {"part": "kernels", "launches": steps_of_mini()}


# Compiled code.


def aot():
    """Figures of the kernels of COMPILED, each specialisation once."""
    import triton

    found = {}
    for scenario in COMPILED:
        with recorded() as noted:
            SCENARIOS[scenario]()
        for number, launch in enumerate(noted):
            result = compile_launch(launch, scenario, TARGET)
            if result.error:
                raise SystemExit(f"{scenario}, {result.kernel}: {result.error}")
            asm = compiled(launch, TARGET).asm  # from Triton's cache
            found.setdefault(launch.name, {
                "triton": version(triton), "target": TARGET, "scenario": scenario, "number": number,
                "kernel": result.kernel, "registers": result.registers, "spilled": result.spilled,
                "shared": result.shared, "instructions_ptx": len(re.findall(r"^\t[^.\s/].*;$", asm["ptx"], re.M)),
                "instructions_sass": len(re.findall(r"^\S+:\S+:\S+:\S+:\S+\t", asm["sass"], re.M)),
            })  # fmt: skip
    return {"part": "aot", "compiled": list(found.values())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a count has grown since the saved line")
    harness.add_options(parser)
    options = parser.parse_args(argv)
    harness.check_save(parser, options, "counts")
    chosen = ["steps"] if options.quick else options.parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--parts {','.join(unknown)}: expected some of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    worse = 0
    for part in chosen:
        results = {"steps": steps, "kernels": kernels, "aot": aot}[part]()
        if options.check:
            findings, gone = compare.compare(baseline(), [{"benchmark": "counts"} | results], counted=True)
            worse += compare.report(findings, gone)
        elif not options.json:
            print("\n".join(show(results)))
        harness.finish("counts", options, results)
    return int(worse > 0)


def baseline():
    """The newest saved line of each part; of compiled kernels, one for each Triton."""
    newest = {}
    for line in compare.select(str(harness.RESULTS / "counts.jsonl")):
        newest[line["part"], line["versions"]["triton"] if line["part"] == "aot" else None] = line
    return list(newest.values())


def show(results):
    for points in results.values():
        for point in points if isinstance(points, list) else ():
            yield ", ".join(f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in point.items())


if __name__ == "__main__":
    sys.exit(main())
