"""The rules of the house that a parser can check: layering, host syncs, unsafe calls, paths outside the repository."""

import ast
import io
import os
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bottom first. A module imports from its own tier's lower tiers only, so modules of one tier never import each other.
# A package counts as one module. A module that is not here fails the test: enter it where it belongs.
TIERS = [
    {"folders"},
    {"kernels", "config", "outputs"},
    {"weights", "cache", "structured"},
    {"layers", "masks"},
    {"model"},
    {"decoding"},
    {"refinement", "generate", "engine"},
    {"demo", "viewer"},
    {"adapters", "distributed"},
    {"__init__"},
    {"server"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
]
TIER = {module: height for height, tier in enumerate(TIERS) for module in tier}
assert len(TIER) == sum(map(len, TIERS)), "a module in two tiers"

# (importing module, qualified name of the function, imported module): the only imports that point upwards.
LAZY_UPWARD = {
    ("model", "LLaDA2Model.generate", "generate"),
}

# Packages a module may import when it is itself imported; everything else belongs inside the function that needs it.
CORE = {"torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm"}
NARROWER = {"kernels": {"torch", "triton"}, "config": {"torch", "numpy"}}
WIDER = {"server": {"fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client"}}  # its extra
NEVER = {"kernels", "tests", "benchmarks"}  # `kernels` is Hugging Face's; ours is llada2_fast.kernels


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def files(*folders):
    paths = python_files(*folders)
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def module_of(path):
    """The layering name of a file, e.g. llada2_fast/engine/request.py -> engine."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(tree, package):
    """Yields (line, dotted target, qualified name of the enclosing function or "") of every import that runs.

    package: dotted name that relative imports start from. `from x import y` yields x.y.
    """

    def visit(node, scope, in_function):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            children = node.orelse
        else:
            children = list(ast.iter_child_nodes(node))
        where = ".".join(scope) if in_function else ""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, where
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], base]))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", where
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            scope, in_function = [*scope, node.name], True
        elif isinstance(node, ast.ClassDef):
            scope = [*scope, node.name]
        for child in children:
            yield from visit(child, scope, in_function)

    return visit(tree, [], False)


def layering_faults(source, module, package):
    """Lists what `source`, a file of `module` with dotted package `package`, imports and may not."""
    if module not in TIER:
        return [f"module {module!r} is not in the table of layers"]
    faults = []
    for line, target, where in imports(ast.parse(source), package):
        top, _, rest = target.partition(".")
        if top == "llada2_fast":
            name = rest.partition(".")[0]
            name = name if name in TIER else "__init__"
            if name != module and TIER[name] >= TIER[module] and (module, where, name) not in LAZY_UPWARD:
                faults.append(f"line {line}: {module} imports {target}, which is not below it")
        elif top in NEVER:
            faults.append(f"line {line}: never import {top}")
        elif top in sys.stdlib_module_names or where:
            continue
        elif top not in NARROWER.get(module, CORE) | WIDER.get(module, set()):
            faults.append(f"line {line}: import {top} inside the function that needs it")
    return faults


@files("kernels", "llada2_fast")
def test_imports_point_downwards(path):
    parts = path.relative_to(ROOT).parent.parts
    package = ".".join(["llada2_fast", *parts] if parts[0] == "kernels" else parts)
    assert layering_faults(path.read_text("utf-8"), module_of(path), package) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("brand_new", ""),
        ("kernels", "from llada2_fast.config import ModelConfig"),
        ("kernels", "import numpy"),
        ("config", "from .kernels import refine"),
        ("cache", "from .weights import checkpoint"),
        ("decoding", "def run():\n    from . import generate"),
        ("generate", "from .adapters.diffusers.scheduler import BlockRefinementScheduler"),
        ("adapters", "import diffusers"),
        ("decoding", "try:\n    import matplotlib\nexcept ImportError:\n    matplotlib = None"),
        ("generate", "from llada2_fast import LLaDA2Model"),
        ("model", "from . import generate"),
        ("model", "class LLaDA2Model:\n    def forward(self):\n        from .generate import generate"),
        ("cli", "import kernels.refine"),
        ("cli", "def main():\n    import benchmarks.bench_decode"),
    ],
)
def test_layering_finds(module, source):
    assert len(layering_faults(source, module, "llada2_fast")) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("kernels", "import math\nimport torch\nfrom . import philox\nfrom .philox import uniform"),
        ("model", "class LLaDA2Model:\n    def generate(self):\n        from .generate import generate"),
        ("adapters", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
        ("adapters", "def convert():\n    import diffusers"),
        ("cli", "from . import __version__, generate"),
        ("__init__", "from .generate import generate\nfrom .kernels import refine"),
    ],
)
def test_layering_allows(module, source):
    package = "llada2_fast.kernels" if module == "kernels" else "llada2_fast"
    assert layering_faults(source, module, package) == []


@files("benchmarks", "tests")
def test_kernels_are_imported_as_ours(path):
    targets = imports(ast.parse(path.read_text("utf-8")), ".".join(path.relative_to(ROOT).parent.parts))
    assert [f"line {line}: {target}" for line, target, _ in targets if target.split(".")[0] == "kernels"] == []


@files("benchmarks")
def test_benchmarks_need_no_tests(path):
    """They ship, tests do not."""
    targets = imports(ast.parse(path.read_text("utf-8")), "benchmarks")
    assert [f"line {line}: {target}" for line, target, _ in targets if target.split(".")[0] == "tests"] == []


SYNCS = {"item", "tolist", "cpu", "nonzero"}
CASTS = {"int", "float", "bool"}  # a sync if given a tensor, which a parser cannot see: may be marked, need not be


def sync_faults(source):
    """Lists host syncs on lines without `# sync: <reason>`, and such marks on lines without a host sync."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    marked = {comment.start[0] for comment in comments if re.search(r"#\s*sync: \w", comment.string)}
    syncs, casts = {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in SYNCS:
                syncs[node.func.end_lineno] = name
            elif name in CASTS:
                casts.add(node.func.end_lineno)
    faults = [f"line {line}: {syncs[line]}() without `# sync: <reason>`" for line in sorted(syncs.keys() - marked)]
    return faults + [f"line {line}: marked as a sync, but is none" for line in sorted(marked - syncs.keys() - casts)]


def no_sync_files():
    rooms = python_files("llada2_fast/decoding")
    networks = [ROOT / "llada2_fast" / f"{name}.py" for name in ("layers", "masks", "model")]
    return [*python_files("kernels"), *networks, *(p for p in rooms if p.stem != "inputs")]


@pytest.mark.parametrize("path", no_sync_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_host_syncs_are_marked(path):
    assert sync_faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source, faults",
    [
        ("n = x.sum().item()", 1),
        ("n = (\n    x.sum()\n    .item()  # sync: the loop's end\n)", 0),
        ("n = x.tolist()  # sync:", 1),
        ("rows = torch.nonzero(mask)", 1),
        ("rows = nonzero(mask)", 1),
        ("y = x.cpu()  # sync: the status tensor", 0),
        ("n = int(block[-1])  # sync: sizes a buffer", 0),
        ("y = x + 1  # sync: none here", 1),
        ('"""Never call .item( here."""', 0),
    ],
)
def test_sync_lint(source, faults):
    assert len(sync_faults(source)) == faults


UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


def unsafe_faults(source):
    """Lists what could run code that arrives as data: pickles, eval, exec, remote code."""
    tree = ast.parse(source)
    faults = [f"imports {target}" for _, target, _ in imports(tree, "none") if target.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "torch.load"):
            faults.append(f"line {node.lineno}: {ast.unparse(node.func)}(")
        if isinstance(node, (ast.Attribute, ast.Name, ast.alias)):
            name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
            if "object_list" in name:
                faults.append(f"line {node.lineno}: {name} unpickles what it receives")
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                faults.append(f"line {node.lineno}: {node.arg} is not False")
    return faults


@files("llada2_fast", "kernels", "benchmarks")
def test_nothing_runs_code_from_data(path):
    assert unsafe_faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source, faults",
    [
        ("import pickle", 1),
        ("def f():\n    from pickle import loads", 1),
        ("torch.load(path, weights_only=True)", 1),
        ("dist.broadcast_object_list(x)", 1),
        ("eval(text)", 1),
        ("AutoModel.from_pretrained(p, trust_remote_code=flag)", 1),
        ("AutoModel.from_pretrained(p, trust_remote_code=False)", 0),
        ("model.eval()", 0),
        ("raise ValueError('pickle files are refused')", 0),
    ],
)
def test_unsafe_lint(source, faults):
    assert len(unsafe_faults(source)) == faults


# Of torch: what makes tensors where the host's default device is, and those that may be of its default dtype, too.
PLACED = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
TYPED = {
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randn",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def ambient_faults(source):
    """Lists what depends on what the host has set: its default device and dtype, its current GPU."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg for keyword in node.keywords}
        module, _, name = ast.unparse(node.func).rpartition(".")
        if module == "torch" and name in PLACED | TYPED and None not in given:
            needed = {"device", "dtype"} if name in TYPED else {"device"}
            faults += [f"line {node.lineno}: torch.{name} without {missing}" for missing in sorted(needed - given)]
        if isinstance(node.func, ast.Subscript) and ast.unparse(node.func.value).endswith("_kernel"):
            faults.append(f"line {node.lineno}: launched on the current GPU, without run_kernel")
    return faults


def library_files():
    """The demo trains its network in a process of its own."""
    trainers = {ROOT / "llada2_fast" / "demo" / f"{name}.py" for name in ("evaluate", "network", "train")}
    return [path for path in python_files("kernels", "llada2_fast") if path not in trainers]


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_depends_on_what_the_host_has_set(path):
    assert ambient_faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source, faults",
    [
        ("torch.zeros(3)", 2),
        ("torch.zeros(3, device=x.device)", 1),
        ("torch.full((3,), 1.0, dtype=torch.float32)", 1),
        ("torch.tensor(ids, dtype=torch.int64, device='cpu')", 0),
        ("torch.tensor(ids, **on_cpu)", 0),
        ("torch.arange(3)", 1),
        ("torch.arange(3, device=x.device)", 0),
        ("x.new_zeros(3), torch.zeros_like(x)", 0),
        ("_norm_kernel[(1,)](x)", 1),
        ("norm._norm_kernel[grid](x)", 1),
        ("run_kernel(_norm_kernel, grid, x)", 0),
    ],
)
def test_ambient_lint(source, faults):
    assert len(ambient_faults(source)) == faults


# Spelled in pieces, so that this file does not find itself.
OUTSIDE = re.compile(rb"\.\./sha" rb"red|(?<![\w./-])/(?:wo" rb"rk|tm" rb"p|ho" rb"me|ro" rb"ot)\b")


def text_files():
    """Every file of the checkout but environments, caches, weights and git's own."""
    for folder, folders, names in os.walk(ROOT):
        if "pyvenv.cfg" in names:
            folders.clear()
            continue
        folders[:] = [
            name for name in folders if not re.fullmatch(r"\.(?!ci$).*|build|dist|.*\.egg-info|__pycache__", name)
        ]
        # .git: in a worktree of git's a file that says where the repository is
        yield from (Path(folder, name) for name in names if not name.endswith((".git", ".safetensors", ".png")))


def test_no_file_mentions_a_path_outside_the_repository():
    hits = [
        (path.relative_to(ROOT), hit.group()) for path in text_files() for hit in OUTSIDE.finditer(path.read_bytes())
    ]
    assert hits == []
