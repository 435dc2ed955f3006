"""Renders the tables and plots of README.md and benchmarks/README.md from the result lines alone.

    python -m benchmarks.report [--check]

A file has its tables between `<!-- report:NAME -->` and `<!-- /report -->`; what stands there is replaced. Lines are
those of benchmarks/results/*.jsonl: of each benchmark, machine (device and threads) and quantisation the newest, a full
run before a quick one. README's short table and the plots take the machine that ran last, its weights as they are;
benchmarks/README.md has all of them.
Plots are SVG files in benchmarks/plots/, drawn anew where their data or their code has changed; that needs matplotlib.

--check writes nothing and exits 1 where a table, a plot or a number typed by hand differs from what the lines give.
"""

import argparse
import re
import sys
from importlib.util import find_spec

from ..harness import ROOT
from . import plots, tables

BLOCK = re.compile(r"<!-- report:(\S+) -->\n(.*?)<!-- /report -->", re.DOTALL)
BLOCKS = tables.BLOCKS | {"plots": plots.images}
FILES = {"README.md": "## Numbers", "benchmarks/README.md": None}  # file -> the section in which no number is typed
# A measured quantity: a number with its unit.
TYPED = re.compile(r"(?<![\w.])\d[\d.,]*(?:[x×]|\s?(?:tok(?:ens)?/s|ms|µs|us|[KMG]B(?:/s)?|%))(?![\w/])")


def render(text, lines):
    """The text with every block made from the lines. ValueError for a block of an unknown name."""
    return BLOCK.sub(lambda match: block(match[1], lines), text)


def block(name, lines):
    if name not in BLOCKS:
        raise ValueError(f"report:{name}: expected one of {', '.join(BLOCKS)}")
    return f"<!-- report:{name} -->\n{BLOCKS[name](lines)}\n<!-- /report -->"


def typed(text, section):
    """Measured quantities that stand outside the blocks, in the section with this heading or, with None, anywhere."""
    if section is not None:
        text = text.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    return TYPED.findall(BLOCK.sub("", text))


def faults(root, lines):
    """What differs from the lines, a sentence each."""
    found = []
    for name, section in FILES.items():
        text = (root / name).read_text("utf-8")
        blocks = [match[1] for match in BLOCK.finditer(text) if match[0] != block(match[1], lines)]
        found += [f"{name}: report:{wrong} is not what the lines give" for wrong in blocks]
        found += [f"{name}: {number!r} is typed by hand" for number in typed(text, section)]
    stale = plots.stale(root / "benchmarks" / "plots", lines)
    return found + [f"benchmarks/plots/{name}.svg is not what the lines give" for name in stale]


def main(argv=None, root=ROOT):
    """root: the folder that holds README.md and benchmarks/. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs")
    options = parser.parse_args(argv)
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        parser.error(f"needs a checkout: there is no {', no '.join(missing)} in {root}")
    lines, folder = tables.read(root / "benchmarks" / "results"), root / "benchmarks" / "plots"
    if options.check:
        found = faults(root, lines)
        print("\n".join([*found, "run: python -m benchmarks.report"] if found else ["all from the result lines"]))
        return int(bool(found))
    stale = plots.stale(folder, lines)
    if stale and find_spec("matplotlib") is None:
        parser.error('needs matplotlib: pip install "llada2-fast[plot]"')
    for name in stale:
        plots.draw(name, folder, lines)
    for name in FILES:
        text = (root / name).read_text("utf-8")
        (root / name).write_text(render(text, lines), "utf-8")
    print(f"{', '.join(FILES)}: from {len(lines)} result lines; plots drawn: {', '.join(stale) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
