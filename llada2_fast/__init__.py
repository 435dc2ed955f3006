"""LLaDA2 diffusion language models, fast and with the right tokens.

Public names load on first use, so `import llada2_fast` alone imports neither torch nor transformers. The first use of
one of them, or an import of this package after transformers', also makes transformers' Auto classes load LLaDA2
checkpoints (`register()` does it on its own). A plain import does not: the Auto classes take 2 seconds of CPU time to
import, where torch takes one.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

# Public name -> the submodule it lives in; `demo` is that submodule itself.
_HOME = {
    "BlockRefinementScheduler": "scheduler",
    "BlockRefinementSchedulerOutput": "scheduler",
    "CheckpointError": "checkpoint",
    "DecodeParams": "config",
    "GenerateOutput": "generate",
    "LLaDA2Model": "model",
    "LLaDA2Pipeline": "pipeline",
    "LLaDA2PipelineOutput": "pipeline",
    "ModelConfig": "config",
    "demo": "demo",
    "generate": "generate",
}
__all__ = [*_HOME, "register"]


class _Package(types.ModuleType):
    """Keeps `llada2_fast.generate` the function: importing the submodule of that name would put the module there."""

    def __setattr__(self, name, value):
        if name == "generate" and isinstance(value, types.ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def register():
    """Make AutoConfig and AutoModelForCausalLM load LLaDA2 checkpoints with LLaDA2Model; doing it again is harmless."""
    from .adapters import transformers

    transformers.register()


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    globals()[name] = module if name == _HOME[name] != "generate" else getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    register()
