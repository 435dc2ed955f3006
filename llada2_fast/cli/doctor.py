"""llada2-fast doctor: what is installed, what each op will run on, and whether the embedded model works."""

import json
import os
import platform
import time

from .. import __version__
from .machine import choose_threads, processor, processors, wanted
from .options import encode

QUESTION, ANSWER = "Add 847 and 96.", "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943."


def doctor(args):
    """Print the report, as JSON if args.json; returns the exit code."""
    from ..config import find_device

    device = find_device()
    report = {
        "versions": _versions(),
        "devices": _devices(),
        "this process": _process(),
        f"ops on {device}": _ops(device),
        "embedded model": _try_embedded_model(device),
    }
    if args.json:
        print(json.dumps(report))
    else:
        for title, lines in report.items():
            print(title, *(f"  {name:<18} {value}" for name, value in lines.items()), sep="\n")
    return 0 if report["embedded model"]["answer"] == "right" else 1


def _versions():
    from importlib import metadata

    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    versions = {"llada2-fast": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "diffusers", "outlines_core"):
        versions[name] = installed.get(name, "not installed")
    versions["kernels (of HF)"] = installed.get("kernels", "not installed")  # shares the name of our folder kernels/
    return versions


def _devices():
    import torch

    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    found["CUDA"] = torch.version.cuda or "torch is built without it"
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{i}"] = f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} SMs, {memory}"
    return found


def _process():
    """What machine.prepare asked of the libraries, here or by whoever set it before."""
    found = {"processors": f"{processors()} for this process"}
    for name in wanted(*processor()):
        found[name] = os.environ.get(name, "not set")
    return found


def _ops(device):
    """{op: what it runs on `device` and why}. An op is whatever has a reference, `<op>_ref`, in a file of kernels/."""
    from importlib import import_module
    from pkgutil import iter_modules

    import torch

    from .. import kernels
    from ..kernels import _triton

    decisions = {}
    for file in sorted(info.name for info in iter_modules(kernels.__path__)):
        module = import_module(f"{kernels.__name__}.{file}")
        for name in (name.removesuffix("_ref") for name in vars(module) if name.endswith("_ref")):
            if not callable(getattr(module, name, None)) or getattr(module, name).__module__ != module.__name__:
                continue  # a piece of other ops
            if not hasattr(module, "use_triton"):
                decisions[name] = "PyTorch: has no Triton kernel yet"
            elif module.use_triton(torch.empty(0, dtype=torch.float32, device=device)):
                decisions[name] = "Triton"
            else:
                decisions[name] = f"PyTorch: {'no GPU' if _triton.HAS_TRITON else 'Triton is not installed'}"
    return decisions


def _try_embedded_model(device):
    import torch

    from .. import demo
    from ..model import LLaDA2Model
    from ..weights.special_tokens import load_tokenizer

    model = LLaDA2Model.from_pretrained(demo.path(), dtype=torch.float32, device=device, progress=False)
    choose_threads(model)
    tokenizer = load_tokenizer(demo.path())
    ids = encode(tokenizer, [{"role": "user", "content": QUESTION}])
    started = time.perf_counter()
    output = model.generate([ids], gen_length=64, eos_early_stop=True, return_dict=True)
    seconds = time.perf_counter() - started
    text = tokenizer.decode(output.sequences[0, : output.num_tokens[0]], skip_special_tokens=True)
    return {
        "folder": demo.path(),
        "question": QUESTION,
        "answer": "right" if text == ANSWER else f"wrong: {text!r}, expected {ANSWER!r}",
        "threads": torch.get_num_threads(),
        "exact rows": _exactness(model),
        "speed": f"{output.num_tokens[0]} tokens in {seconds:.2f} s, {output.tokens_per_forward:.1f} per forward",
    }


def _exactness(model):
    """Whether a request's tokens are those it gets alone, and how that is known."""
    if model.device.type != "cpu":
        if model.exact_rows:
            return "yes: no product rounds a row by the rows beside it"
        return "not promised: without Triton, or with cuBLAS's products, a row is rounded by the number of rows"
    products = model.products().values()
    if not model.exact_rows:
        none = sum(rows.least is None for rows in products)
        return f"no: {none} of {len(products)} products round a row by the rows beside it, at any height"
    libraries = ", ".join(sorted({rows.library for rows in products}))
    return f"yes: products round a row alike from a height of {max(rows.least for rows in products)} on ({libraries})"
