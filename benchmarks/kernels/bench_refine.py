"""The refinement step on a CPU against its reference and against diffusers' scheduler.step, after a parity gate.

    python -m benchmarks.kernels.bench_refine [--quick] [--json] [--save]

The reference, which is the product there, eager and under torch.compile, and diffusers, in float32. Launches, host
syncs and reads of the logits are those of the kernels, run without data and in Triton's interpreter.
`ratio_vs_diffusers_step` is that of 8 rows, greedy; null without diffusers. On a GPU the step is timed by
benchmarks.kernels, beside the other ops, and by benchmarks.gpu.
"""

import argparse
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llada2_fast.kernels import refine
from llada2_fast.kernels._triton import force_ops

from ..aot import recorded
from ..gpu.gates import refine_case
from ..harness import add_options, finish, timed_rounds
from .cases import Case, agree

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
    from ..interpreter import interpreted

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
        points.append(_point(rows, vocab, dict(zip(calls, times, strict=True)), step.logits.nbytes))
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


def _point(rows, vocab, seconds, size):
    """One line's values."""
    point = {"rows": rows, "vocab": vocab, "mode": "greedy", "bytes": size}
    point |= {f"{name}_us": time * 1e6 for name, time in seconds.items()}
    if "diffusers" in seconds:
        point["ratio_vs_diffusers_step"] = seconds["diffusers"] / seconds["ours"]
    return point


def _line(point):
    times = ", ".join(f"{name[:-3]} {value:.1f} us" for name, value in point.items() if name.endswith("_us"))
    ratio = "".join(f", {name} {point[name]:.1f}" for name in ("ratio_vs_diffusers_step",) if name in point)
    return f"B={point['rows']:<4} V={point['vocab']:<7} {times}{ratio}"


# For benchmarks.kernels and benchmarks.gpu, beside the other ops


def steady(machine, batch, mode):
    """A step of the GPU suite: of each row the mode of gates.refine_case; it commits nothing and can be repeated."""
    modes = [mode] * machine.size(batch, 2)
    first = refine_case(machine, modes)
    buffers = machine.rotated(lambda: (first[0].clone(), *first[1:]), first[0].nbytes)
    return Case(partial(refine.refine_step, filters=mode == "filters"), None, "", buffers, first[0].nbytes)


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


def case_of(machine, rows, vocab):
    step = partial(Step, rows, vocab, machine.dtype, machine.device.type)

    def check():
        new = step()
        wanted = plain(new)
        new.run()
        agree("refine", (new.state.tokens,), (wanted,))

    size = step(steady=True).logits.nbytes
    buffers = machine.rotated(lambda: (step(steady=True),), size)
    return Case(Step.run, plain, "softmax, max, topk", buffers, size, check=check)


CASES = {f"b{rows} v{vocab}": (rows, vocab) for rows, vocab in ((1, 4096), (8, 32768), (1, 157184))}


def test_refine(timed):
    timed()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    options = parser.parse_args(arguments)
    with torch.inference_mode():
        points, counted = on_cpu(options)
    ratios = [p.get("ratio_vs_diffusers_step") for p in points if p["rows"] == 8]
    finish("bench_refine", options, counted | {"ratio_vs_diffusers_step": ratios[-1], "points": points})


if __name__ == "__main__":
    main()
