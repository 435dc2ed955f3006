"""The refinement step on a CPU against its reference and against diffusers' scheduler.step, after a parity gate.

    python -m benchmarks.kernels.bench_refine [--quick] [--json] [--save]

The reference, which is the product there, eager and under torch.compile, and diffusers, in float32. Launches, host
syncs and reads of the logits are those of the kernels, run without data and in Triton's interpreter.
`ratio_vs_diffusers_step` is that of 8 rows, greedy; null without diffusers. On a GPU the step is timed by
benchmarks.kernels, beside the other ops, and by benchmarks.gpu.
"""

import argparse

import torch

from llada2_fast.kernels import refine

from ..counts import launches, passes
from ..harness import add_options, check_save, finish, timed_rounds
from ..roofline import BLOCK
from .bench_decoding import MODES, STEPS, THRESHOLD, Step


def reference(step):
    return refine.refine_step_ref(step.logits, step.state, step.params, step.ids)


def diffusers_step(step):
    """diffusers' own step on the same logits, as a call; None where it cannot be imported."""
    try:
        from diffusers import BlockRefinementScheduler
    except ImportError:
        return None
    scheduler = BlockRefinementScheduler(block_length=BLOCK)
    scheduler.set_timesteps(STEPS)
    sample = torch.full((len(step.logits), BLOCK), step.ids.mask)
    return lambda: scheduler.step(
        step.logits, 0, sample, mask_token_id=step.ids.mask, temperature=0.0, threshold=THRESHOLD,
        editing_threshold=None, return_dict=True,
    )  # fmt: skip


def gate(vocab):
    """Ours, the reference and diffusers agree on the next block; SystemExit otherwise. Whether diffusers was asked."""
    for mode in MODES:
        got, known = (call(Step(2, vocab, torch.float32, "cpu", mode)) for call in (Step.run, reference))
        if not (torch.equal(got.token, known.token) and torch.equal(got.confidence, known.confidence)):
            raise SystemExit(f"{mode}: the candidates differ from the reference's: nothing is timed")
    step = Step(2, vocab, torch.float32, "cpu")
    peer = diffusers_step(step)
    if peer is None:
        return False
    theirs = peer().prev_sample
    step.run()
    if not torch.equal(theirs, step.state.tokens):
        raise SystemExit("the next block differs from that of diffusers: nothing is timed")
    return True


def point(rows, vocab, compiled):
    """The times of a greedy step of one size, printed and as an entry of the JSON line."""
    has_peer = gate(vocab)
    step = Step(rows, vocab, torch.float32, "cpu")

    def from_new(call):
        def run():
            step.reset()
            return call(step)

        return run

    calls = {"ours": from_new(Step.run)}
    if has_peer:
        calls["diffusers"] = diffusers_step(step)
    if compiled:
        calls["compiled"] = from_new(torch.compile(reference))
    for call in calls.values():
        call()
    times = timed_rounds(list(calls.values()), max(5, min(200, 2**26 // step.logits.numel())))
    us = {name: time * 1e6 for name, time in zip(calls, times, strict=True)}
    found = {"rows": rows, "vocab": vocab, "mode": "greedy", "bytes": step.logits.nbytes}
    found |= {f"{name}_us": time for name, time in us.items()}
    text = ", ".join(f"{name} {time:.1f} us" for name, time in us.items())
    if has_peer:
        found["ratio_vs_diffusers_step"] = us["diffusers"] / us["ours"]
        text += f", ratio_vs_diffusers_step {found['ratio_vs_diffusers_step']:.1f}"
    print(f"B={rows:<4} V={vocab:<7} {text}", flush=True)
    return found


def counted():
    """What the kernels would do, by mode, and the bandwidth of this CPU's memory in a copy."""
    sampling = launches("top_k_top_p")
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    copies = timed_rounds([lambda: target.copy_(source)] * 3, 3)
    return {
        "launches": len(launches("greedy")), "launches_temperature": len(launches("temperature")),
        "launches_sampling": len(sampling), "host_syncs": 0, "kernels": sampling,
        "passes_over_logits": round(passes("greedy"), 3),
        "passes_temperature": round(passes("temperature"), 3), "passes_sampling": round(passes("top_k_top_p"), 3),
        "passes_reference": 2, "copy_gb_s": 2 * source.nbytes / min(copies) / 1e9,
    }  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    options = parser.parse_args(arguments)
    check_save(parser, options, "bench_refine")
    torch.set_num_threads(1)
    sizes = [(1, 4096), (8, 32768)] if options.quick else [(1, 4096), (8, 4096), (1, 32768), (8, 32768), (1, 157184)]
    with torch.inference_mode():
        points = [point(*size, compiled=not options.quick) for size in sizes]
        result = counted()
    ratios = [p.get("ratio_vs_diffusers_step") for p in points if p["rows"] == 8]
    finish("bench_refine", options, result | {"ratio_vs_diffusers_step": ratios[-1], "points": points})


if __name__ == "__main__":
    main()
