"""Package metadata. Nothing runs on import but reading the version, and no module of the package is imported."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "llada2_fast/__init__.py").read_text("utf-8"), re.M).group(1)

DIFFUSERS = ["diffusers>=0.38"]
EVAL = ["lm-eval[api]>=0.4.13"]  # api: to score a server
PLOT = ["matplotlib>=3.8"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "pydantic>=2.8", "prometheus-client>=0.21"]
STRUCTURED = ["outlines-core>=0.2.14"]  # regular expressions and JSON schemas as automata
BENCH = ["aiohttp>=3.9", *PLOT]  # aiohttp: the load of `llada2-fast bench serve`
TEST = [
    *BENCH,
    *SERVE,
    *STRUCTURED,
    # the oracle of the drop-in tests: its exact behaviour is what they compare with
    "diffusers==0.42.1; python_version >= '3.11'",
    "diffusers==0.41.0; python_version < '3.11'",  # the last for Python 3.10
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "openai>=2",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.15",
    "schemathesis>=4",
    "setuptools>=70.1",  # test_packaging builds a wheel offline; 70.1 is the first that needs no `wheel` package
]
# Root folders that ship inside the package: a top-level `kernels` would collide with Hugging Face's, `benchmarks` with
# many others'. Result lines stay in the repository.
FOLDERS = {
    "llada2_fast.kernels": "kernels",
    "llada2_fast.benchmarks": "benchmarks",
    **{
        f"llada2_fast.benchmarks.{name}": f"benchmarks/{name}"
        for name in ("chaos", "gpu", "kernels", "policies", "report", "tune")
    },
}

setup(
    name="llada2-fast",
    version=VERSION,
    description="LLaDA2 block-diffusion text generation: PyTorch reference, Triton kernels, drop-in interfaces",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["llada2_fast", "llada2_fast.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "llada2_fast": ["py.typed"],
        "llada2_fast.adapters": ["lm_eval_tasks/*.*"],
        "llada2_fast.demo": ["model/*", "model-2.2/*"],
        "llada2_fast.kernels": ["*.json"],
        "llada2_fast.viewer": ["page.*", "scripts/*.js"],
    },
    # safetensors, tokenizers, huggingface_hub and tqdm arrive with transformers. The CPU build of torch does not
    # depend on triton, so it is listed; triton has wheels for Linux only, elsewhere the PyTorch path runs alone.
    install_requires=["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "transformers>=5.17", "numpy"],
    extras_require={
        "bench": BENCH,
        "diffusers": DIFFUSERS,
        "eval": EVAL,
        "plot": PLOT,
        "serve": SERVE,
        "structured": STRUCTURED,
        "test": TEST,
    },
    entry_points={
        "console_scripts": ["llada2-fast = llada2_fast.cli:main"],
        "sglang.srt.plugins": ["llada2_fast = llada2_fast.adapters.sglang:register"],
        "vllm.general_plugins": ["llada2_fast = llada2_fast.adapters.vllm:register"],
    },
)
