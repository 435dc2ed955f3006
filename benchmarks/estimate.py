"""What a denoise step of LLaDA2-mini takes, as the sum of its kernels: an estimate for cards that nobody has at hand.

    python -m benchmarks.roofline --estimate

prints it of this tree beside that of the tree at BEFORE, kernel by kernel. What a step launches, and the bytes and
operations of that, are counted (benchmarks.counts, part kernels). A launch takes

    us + max(bytes / (share * copy bandwidth), operations / (rate * bf16 rate))

or their sum, and GAP until the next one begins. The figures of a Rate are fitted to two sizes, 64 and 1280 tokens, of
the H100's profiles of the tree at BEFORE (results/gpu.jsonl). Other sizes and the H200 are held against what they give:
`residuals` has measured steps beside their estimates. On the H200 fp8 takes longer than that, as nobody has tuned its
tiles there. SINCE has the rates of kernels that are others since BEFORE, fitted to its profiles of them. They
were taken of a tree that quantised attention's output within attention and had the default tiles in int4.
"""

from typing import NamedTuple

from . import harness
from .lines import lines_of
from .roofline import BLOCK, GPUS, MINI, floor_ms, gpu_of, step_costs, touched_experts

BEFORE = "f74eaf5"  # commit of the line that others are held against
BATCHES, PREFIX = (1, 8, 32), 1024
CARDS = ("h100", "h200")
GAP = 0.3  # µs between two kernels of a graph
EARLY = -0.25  # the same since BEFORE: less than none, for our own kernels begin early, see kernels/overlap.py


class Rate(NamedTuple):
    """How a kernel spends its time: µs of its own; what it reaches of the copy bandwidth (above 1: a copy also writes),
    or, where it does not wait for memory, the TB/s that go through it on any card; what it reaches of the bf16 rate;
    whether its operations hide behind its bytes."""

    us: float
    share: float = 1.0
    rate: float = 1.0
    through: float | None = None
    hidden: bool = True

    def __str__(self):
        return ", ".join(f"{name} {value}" for name, value in zip(self._fields, self, strict=True)
                         if value != self._field_defaults.get(name))  # fmt: skip


MEASURED = {  # by how a kernel's name begins
    "cuBLAS": Rate(2.8, 0.95, 0.94),
    "aten": Rate(1.4),  # other operators of PyTorch
    "_gemm_kernel gate_up bf16": Rate(0.0, 1.03, 1.5, hidden=False),
    "_gemm_kernel down bf16": Rate(0.0, 1.015, 2.5, hidden=False),
    "_gemm_kernel gate_up fp8": Rate(3.0, 0.965, 1.6, hidden=False),
    "_gemm_kernel down fp8": Rate(1.0, 1.0, 2.3, hidden=False),
    "_gemm_kernel plain fp8": Rate(4.9, 0.98, 0.8),
    "_attention_kernel": Rate(8.65, 1.0, 0.28),
    "_combine_kernel attention": Rate(1.6, through=2.5),
    "_combine_kernel experts": Rate(2.35, 1.2),
    "_rms_norm_kernel": Rate(1.65, through=5.2),
    "_quantize_kernel": Rate(1.55, through=4.1),
    "_qk_norm_rope_kernel": Rate(2.55, through=2.65),
    "_scores_kernel": Rate(3.8, 1.0, 0.165),
    "_select_kernel": Rate(3.7, through=0.26),
    "_align_kernel": Rate(3.25, through=0.023),
    "_vocab_kernel": Rate(2.7, through=2.1),
    "_advance_kernel": Rate(2.0),
    "_commit_kernel": Rate(7.0),
}
SINCE = {  # of kernels that are others since BEFORE
    "_gemm_kernel plain bf16": Rate(3.6, 0.99, 0.79),
    "_gemm_kernel gate_up int4": Rate(3.0, 0.87, 0.102),
    "_gemm_kernel down int4": Rate(3.0, 0.8, 0.098),
    "_attention_kernel": Rate(11.8, 1.0, 0.295),
    "_rms_norm_kernel": Rate(1.45, through=5.0),
    "_rms_norm_kernel experts": Rate(2.25, 1.11),
    "_qk_norm_rope_kernel": Rate(2.6, through=2.4),
    "_scores_kernel": Rate(2.7, 1.0, 0.174),
    "_select_kernel": Rate(6.9, through=0.53),
    "_align_kernel": Rate(3.25, through=0.0223),
}
UNKNOWN = Rate(1.6, 0.8, 0.5)  # of kernels that nobody has timed


class Work(NamedTuple):
    """The launches of one kernel in a step, and the bytes and operations of all of them."""

    kernel: str
    launches: int
    bytes: int
    operations: int

    def us(self, rate, card):
        """µs on a card, without the gaps ahead of them."""
        bandwidth, tflops = GPUS[card]
        moved = self.bytes / (rate.through or rate.share * bandwidth) / 1e6
        counted = self.operations / (rate.rate * tflops) / 1e6
        return self.launches * rate.us + (max(moved, counted) if rate.hidden else moved + counted)


# A line: its part of benchmarks.counts, kernels.


def rates(line):
    return MEASURED if _is_before(line) else MEASURED | SINCE


def _is_before(line):
    return line["commit"].startswith(BEFORE)


def gap_us(kernel, line):
    """Ahead of each launch."""
    return GAP if _is_before(line) or not kernel.startswith("_") else EARLY


def rate_of(kernel, known):
    """The Rate of the longest name that the kernel's begins with."""
    names = [name for name in known if kernel.startswith(name)]
    return known[max(names, key=len)] if names else UNKNOWN


def steps_of(line):
    """{(dtype, batch): [Work]} of a line."""
    found = {}
    for row in line["launches"]:
        found.setdefault((row["dtype"], row["batch"]), []).append(Work(*(row[field] for field in Work._fields)))
    return found


def estimate_ms(works, line, card):
    """The ms on a card of a line's step."""
    known, gaps = rates(line), sum(work.launches * gap_us(work.kernel, line) for work in works)
    return (gaps + sum(work.us(rate_of(work.kernel, known), card) for work in works)) / 1e3


def with_touched(works, batch, touched):
    """The works with another number of experts touched than independent routing gives."""
    share = touched / touched_experts(MINI, batch * BLOCK)
    return [
        work._replace(bytes=work.bytes * (share if {"gate_up", "down"} & {*work.kernel.split()} else 1))
        for work in works
    ]


def floor_of(dtype, batch, card):
    """ms of benchmarks.roofline."""
    return floor_ms(step_costs(MINI, batch, PREFIX, None if dtype == "bf16" else dtype), *GPUS[card])


def before_and_after(lines):
    """{"before": the line of BEFORE, "after": the newest other one} of dicts in order of time, where they are there."""
    own = [line for line in lines if line["benchmark"] == "counts" and line["part"] == "kernels"]
    return {"before" if _is_before(line) else "after": line for line in own}


def compared(named):
    """A row for each step: by the name of a line launches and, of each card, ms and these over the floor."""
    rows = {}
    for name, line in named.items():
        for (dtype, batch), works in steps_of(line).items():
            row = rows.setdefault((dtype, batch), {"dtype": dtype, "batch": batch})
            row[name] = {"launches": sum(work.launches for work in works)}
            for card in CARDS:
                ms, floor = estimate_ms(works, line, card), floor_of(dtype, batch, card)
                row[name][card] = {"ms": ms, "floor_ms": floor, "over_floor": ms / floor}
    return list(rows.values())


def residuals(named, lines):
    """A row for each measured step that a line has, too: what that gives with the experts touched there. Steps measured
    before the line of BEFORE was made are held against it, later ones against the other.

    lines: dicts of gpu.jsonl in order of time; the newest of a point and a card counts.
    """
    rows = {}
    for found in lines:
        name = "before" if "before" in named and found["time"] <= named["before"]["time"] else "after"
        for (dtype, batch), works in steps_of(named[name]).items() if name in named and "ms" in found else ():
            card = gpu_of(found["device"])
            if found["point"] == f"step mini {dtype} b{batch} p{PREFIX} carried" and card in CARDS:
                touched = with_touched(works, batch, found["experts_touched"])
                ms = estimate_ms(touched, named[name], card)
                rows[name, card, found["point"]] = {
                    "line": name, "card": card, "point": found["point"], "commit": found["commit"],
                    "measured_ms": found["ms"], "estimate_ms": ms, "off": ms / found["ms"] - 1,
                }  # fmt: skip
    return list(rows.values())


def show(named, lines):
    """The steps of the newest line kernel by kernel; then the sums of all lines and how far they are off."""
    line = [*named.values()][-1]
    for (dtype, batch), works in steps_of(line).items():
        yield f"\nmini {dtype}, batch {batch}, prefix {PREFIX}, each of its launches:"
        yield f"  {'kernel':36}{'launches':>8}{'MB':>10}{'GFLOP':>9}" + "".join(f"{card + ' µs':>10}" for card in CARDS)
        for work in works:
            rate, count = rate_of(work.kernel, rates(line)), work.launches
            size = f"{work.bytes / count / 1e6:10.3f}{work.operations / count / 1e9:9.3f}"
            times = "".join(f"{work.us(rate, card) / count:10.2f}" for card in CARDS)
            yield f"  {work.kernel:36}{count:8}{size}{times}  {rate}{', a guess' * (rate is UNKNOWN)}"
        yield f"  gaps{sum(work.launches * gap_us(work.kernel, line) for work in works):59.1f}"
    yield "\nms of a step, over its floor:"
    for row in compared(named):
        yield f"  {row['dtype']:4} b{row['batch']:<2} " + "; ".join(
            f"{name} {row[name]['launches']} launches, "
            + ", ".join(f"{card} {row[name][card]['ms']:.2f} ({row[name][card]['over_floor']:.2f}x)" for card in CARDS)
            for name in named
            if name in row
        )
    for row in residuals(named, lines):
        yield ("  {card} {point}: measured {measured_ms:.3f}, estimate ({line}) {estimate_ms:.3f}, "
               "{off:+.1%}").format(**row)  # fmt: skip


def main():
    """Print the estimate of this tree beside that of BEFORE's saved line."""
    from .launches import steps_of_mini  # which takes its names from here

    saved = {name: lines_of(harness.RESULTS / f"{name}.jsonl") for name in ("counts", "gpu")}
    named = {name: line for name, line in before_and_after(saved["counts"]).items() if name == "before"}
    named["after"] = {"commit": str(harness.commit()), "launches": steps_of_mini()}
    print("\n".join(show(named, saved["gpu"])))
