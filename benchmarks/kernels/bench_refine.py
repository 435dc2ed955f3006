"""The refinement step against its reference and against diffusers' scheduler.step, after a parity gate.

    python -m benchmarks.kernels.bench_refine [--quick] [--json] [--save] [--plot FILE]

On a GPU: the kernels, replayed from a CUDA graph, the reference, eager and under torch.compile, and diffusers, at
V = 157184 in bfloat16 for 1 to 128 rows of 32 positions. On a CPU: the reference, which is the product there, and
diffusers, in float32 at smaller sizes; launches, host syncs and reads of the logits are then those of the kernels, run
without data and in Triton's interpreter. `ratio_vs_diffusers_step` is that of 8 rows, greedy; null without diffusers.
"""

import argparse
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops

from ..aot import recorded
from ..gpu_machine import Machine, ceilings
from ..harness import add_options, finish, timed_rounds
from .cases import Case, Shapes, agree

LENGTH, STEPS, THRESHOLD = 32, 8, 0.9
MODES = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "temperature": (1.0, 0, 1.0),
    "top_p": (1.0, 0, 0.9),
    "top_k_top_p": (1.0, 50, 0.9),
}
_NO_LAUNCH = {"aten::empty", "aten::new_empty", "aten::view", "aten::select", "aten::unbind"}


class Step:
    """One step of `rows` whole blocks of masks, and all that it needs, on a device.

    steady: nothing is ever committed, so that a step can be repeated as it is; else reset() makes the blocks new.
    """

    def __init__(self, rows, vocab, dtype, device, mode="greedy", steady=False):
        self.ids = refine.SpecialIds(vocab - 289)
        generator = None if device == "meta" else torch.Generator(device).manual_seed(rows)
        self.logits = torch.empty(rows, LENGTH, vocab, dtype=dtype, device=device)
        if generator is not None:  # drawn in float32, which is the same in every PyTorch; bfloat16 is not in 2.11
            self.logits.copy_(torch.empty_like(self.logits, dtype=torch.float32).normal_(std=4.0, generator=generator))
            self.logits[..., self.ids.mask] = -20.0  # diffusers would commit it
            best = torch.rand(rows, LENGTH, 1, device=device, generator=generator)  # one each, from unlikely to sure
            self.logits.scatter_(2, (best * vocab).long() // 2, (16 + 10 * best).to(dtype))
        temperature, top_k, top_p = MODES[mode]
        self.filters = (top_k, top_p) != (0, 1.0)

        def each(value, dtype=torch.int32):
            return torch.full((rows,), value, dtype=dtype, device=device)

        self.params = refine.RefineParams(
            each(temperature, torch.float32), each(top_k), each(top_p, torch.float32),
            torch.arange(rows, device=device), each(2.0 if steady else THRESHOLD, torch.float32),
            each(0.0, torch.float32), each(2**30 if steady else STEPS), each(0 if steady else 1), each(2**30), each(0),
            each(refine.BAN_MASK | refine.EOS_STEP), torch.full((rows, 1), 1, device=device),
        )  # fmt: skip
        tokens = torch.full((rows, LENGTH), self.ids.mask, device=device)
        kind = torch.zeros_like(tokens, dtype=torch.int8)
        self.state = refine.BlockState.fresh(tokens, kind, torch.zeros_like(tokens[:, 0]))
        if steady:
            self.state.step.fill_(LENGTH)  # past the schedule's last commit

    def reset(self):
        self.state.tokens.fill_(self.ids.mask)
        for name in ("step", "post_steps", "frozen"):
            getattr(self.state, name).zero_()

    def run(self):
        return refine.refine_step(self.logits, self.state, self.params, self.ids, filters=self.filters)

    def reference(self):
        return refine.refine_step_ref(self.logits, self.state, self.params, self.ids)

    def from_new(self, call):
        """The call on new blocks, every time."""

        def run():
            self.reset()
            return call()

        return run

    def diffusers(self):
        """diffusers' own step on the same logits, as a call; None where it cannot be imported."""
        try:
            from diffusers import BlockRefinementScheduler
        except ImportError:
            return None
        scheduler = BlockRefinementScheduler(block_length=LENGTH)
        scheduler.set_timesteps(STEPS)
        sample = torch.full((len(self.logits), LENGTH), self.ids.mask, device=self.logits.device)
        return lambda: scheduler.step(
            self.logits, 0, sample, mask_token_id=self.ids.mask, temperature=0.0, threshold=THRESHOLD,
            editing_threshold=None, return_dict=True,
        )  # fmt: skip


def gate(vocab, dtype, device):
    """Ours, the reference and diffusers agree on the next block; SystemExit otherwise. Whether diffusers was asked."""
    for mode in MODES:
        ours, wanted = (Step(2, vocab, dtype, device, mode) for _ in range(2))
        got, known = ours.run(), wanted.reference()
        # Confidences near one another may be ordered either way; what must be alike is each candidate.
        same = (got.token == known.token).float().mean()
        if same < (1 if mode == "greedy" else 0.98):
            raise SystemExit(f"{mode}: {same:.1%} of the candidates agree with the reference: nothing is timed")
        torch.testing.assert_close(got.confidence[got.token == known.token], known.confidence[got.token == known.token])
    step = Step(2, vocab, dtype, device)
    peer = step.diffusers()
    if peer is None:
        return False
    theirs = peer().prev_sample
    step.run()
    if not torch.equal(theirs, step.state.tokens):
        raise SystemExit("the next block differs from that of diffusers: nothing is timed")
    return True


# On a CPU


class _Noted(TorchDispatchMode):
    """Notes the names of PyTorch's own ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        self.names.append(op._schema.name)
        return op(*arguments, **(keywords or {}))


def launches(mode):
    """Names of what one step launches, at the real size and without data, which no host sync would survive."""
    step = Step(8, 157184, torch.bfloat16, "meta", mode)
    with recorded() as found, _Noted() as noted:
        refine.launch(step.logits, step.state, step.params, step.ids, None, step.filters, False)
    return [launch.kernel.__name__ for launch in found] + [name for name in noted.names if name not in _NO_LAUNCH]


@contextmanager
def _counted_loads(tensor):
    """Counts the elements of `tensor` that interpreted kernels load; yields a list of them, load by load."""
    from triton.runtime.interpreter import InterpreterBuilder

    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    load, counts = InterpreterBuilder.create_masked_load, []

    def counting(self, pointers, mask, *rest):
        at = pointers.data[mask.data] if pointers.data.shape == mask.data.shape else pointers.data
        counts.append(int(((at >= begin) & (at < end)).sum()))
        return load(self, pointers, mask, *rest)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", counting):
        yield counts


def passes(mode):
    """How often a step's kernels read the logits, as a share of all of them, in Triton's interpreter."""
    from tests.kernels.interpreter import interpreted

    step = Step(1, 157184, torch.bfloat16, "cpu", mode)
    step.logits = step.logits[:, :2].contiguous()  # the interpreter is slow
    step.state = refine.BlockState(*(t[:, :2].contiguous() if t.ndim == 2 else t for t in vars(step.state).values()))
    with interpreted(), force_ops("triton"), _counted_loads(step.logits) as counts:
        step.run()
    return sum(counts) / step.logits.numel()


def on_cpu(options):
    """Points of the reference, eager and compiled, and diffusers; and what the kernels would do."""
    torch.set_num_threads(1)
    dtype = torch.float32
    sizes = [(1, 4096), (8, 32768)] if options.quick else [(1, 4096), (8, 4096), (1, 32768), (8, 32768), (1, 157184)]
    points = []
    for rows, vocab in sizes:
        has_peer = gate(vocab, dtype, "cpu")
        step = Step(rows, vocab, dtype, "cpu")
        calls = {"ours": step.from_new(step.run)}
        if has_peer:
            calls["diffusers"] = step.diffusers()
        if not options.quick:
            calls["compiled"] = step.from_new(torch.compile(step.reference))
        for call in calls.values():
            call()
        times = timed_rounds(list(calls.values()), max(5, min(200, 2**26 // step.logits.numel())))
        points.append(_point(rows, vocab, "greedy", dict(zip(calls, times, strict=True)), step.logits.nbytes))
        print(_line(points[-1]), flush=True)
    sampling = launches("top_k_top_p")
    return points, {
        "launches": len(launches("greedy")), "launches_temperature": len(launches("temperature")),
        "launches_sampling": len(sampling), "host_syncs": 0, "kernels": sampling,
        "passes_over_logits": round(passes("greedy"), 3),
        "passes_temperature": round(passes("temperature"), 3), "passes_sampling": round(passes("top_k_top_p"), 3),
        "passes_reference": 2, "copy_gb_s": _copy_gb_s(),
    }  # fmt: skip


def _copy_gb_s():
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed_rounds([lambda: target.copy_(source)] * 3, 3)) / 1e9


# On a GPU


def on_gpu(options, machine):
    """Points of the kernels in every mode, the reference and diffusers, with what the profiler counted."""
    machine.bandwidth = ceilings(machine)["copy_tb_s"]
    vocab, dtype, device = machine.size(157184, 4096), torch.bfloat16, machine.device.type
    has_peer = gate(vocab, dtype, device)
    points, counts = [], {}
    for rows in (1, 8) if options.quick else (1, 8, 32, 128):
        for mode in MODES:
            step = Step(rows, vocab, dtype, device, mode, steady=True)
            copies = [Step(rows, vocab, dtype, device, mode, True) for _ in range(machine.copies(step.logits.nbytes))]
            times = {"ours": machine.kernel_us([copy.run for copy in copies]), "eager": machine.call_us(step.run)}
            counts.setdefault(mode, machine.counted(step.run))
            if mode == "greedy":
                greedy = times["ours"]
                times["reference"] = machine.call_us(step.reference, rounds=3)
                if rows == 8 and not machine.dry:
                    times["compiled"] = machine.call_us(torch.compile(step.reference), rounds=3)
                if has_peer:
                    times["diffusers"] = machine.call_us(step.diffusers(), rounds=3)
            seconds = {name: time / 1e6 for name, time in times.items()}
            points.append(_point(rows, vocab, mode, seconds, step.logits.nbytes, machine.bandwidth * 1e12))
            points[-1]["over_greedy"] = times["ours"] / greedy
            print(_line(points[-1]), flush=True)
            del step, copies
            if not machine.dry:
                torch.cuda.empty_cache()
    return points, {
        "launches": counts["greedy"]["launches"], "launches_temperature": counts["temperature"]["launches"],
        "launches_sampling": counts["top_k_top_p"]["launches"],
        "host_syncs": max(count["syncs"] for count in counts.values()), "passes_over_logits": 1,
        "copy_gb_s": machine.bandwidth * 1e3,
    }  # fmt: skip


# Both


_RATIOS = ("percent_of_copy", "over_greedy", "ratio_vs_diffusers_step")


def _point(rows, vocab, mode, seconds, size, copy=None):
    """One line's values; copy: bytes/s of the copy bandwidth, None if the time is not one of memory."""
    point = {"rows": rows, "vocab": vocab, "mode": mode, "bytes": size}
    point |= {f"{name}_us".replace(" ", "_"): time * 1e6 for name, time in seconds.items()}
    if copy:
        point["percent_of_copy"] = 100 * size / seconds["ours"] / copy
    if "diffusers" in seconds:
        point["ratio_vs_diffusers_step"] = seconds["diffusers"] / seconds["ours"]
    return point


def _line(point):
    times = ", ".join(f"{name[:-3]} {value:.1f} us" for name, value in point.items() if name.endswith("_us"))
    rest = "".join(
        f", {name} {point[name]:.1f}" for name in ("percent_of_copy", "ratio_vs_diffusers_step") if name in point
    )
    return f"B={point['rows']:<4} V={point['vocab']:<7} {point['mode']:<12} {times}{rest}"


def plot(points, file):
    """Time of a step by rows, one line per contender, greedy at the largest vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    vocab = max(point["vocab"] for point in points)
    shown = [point for point in points if point["mode"] == "greedy" and point["vocab"] == vocab]
    names = sorted({name for point in shown for name in point if name.endswith("_us")})
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in names:
        line = [(point["rows"], point[name]) for point in shown if name in point]
        axes.loglog(*zip(*line, strict=True), marker="o", label=name[:-3].replace("_", " "))
    axes.set(xlabel="rows of 32 positions", ylabel="µs per step", title=f"Refinement step, greedy, V = {vocab}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


# For benchmarks.kernels, beside the other ops


def plain(step):
    """The next blocks [R, L] by the rule in plain PyTorch: the threshold's, or the quota's most confident."""
    confidence, token = torch.softmax(step.logits.float(), -1).max(-1)
    masked = step.state.tokens == step.ids.mask
    confidence = confidence.masked_fill(~masked, -1.0)
    commit = confidence > THRESHOLD
    best = confidence.topk(LENGTH // STEPS, -1).indices
    quota = torch.zeros_like(commit).scatter_(1, best, True)
    few = commit.sum(-1, keepdim=True) < LENGTH // STEPS
    return torch.where(torch.where(few, quota, commit) & masked, token, step.state.tokens)


def case_of(rows, vocab):
    shapes = Shapes()
    step = partial(Step, rows, vocab, shapes.dtype, shapes.device.type)

    def check():
        new = step()
        wanted = plain(new)
        new.run()
        agree("refine", (new.state.tokens,), (wanted,))

    size = step(steady=True).logits.nbytes
    buffers = shapes.rotated(lambda: (step(steady=True),), size)
    return Case(Step.run, plain, "softmax, max, topk", buffers, size, check=check)


CASES = {f"b{rows} v{vocab}": partial(case_of, rows, vocab) for rows, vocab in ((1, 4096), (8, 32768), (1, 157184))}


def test_refine(timed):
    timed()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw time by rows into an image")
    options = parser.parse_args(arguments)
    if options.plot and find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib: pip install "llada2-fast[plot]"')
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        points, counted = on_gpu(options, Machine(dry=False)) if device == "cuda" else on_cpu(options)
    if options.plot:
        plot(points, options.plot)
    ratios = [p.get("ratio_vs_diffusers_step") for p in points if p["rows"] == 8 and p["mode"] == "greedy"]
    finish("bench_refine", options, counted | {"ratio_vs_diffusers_step": ratios[-1], "points": points}, device)


if __name__ == "__main__":
    main()
