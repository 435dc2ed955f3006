"""LLaDA2 diffusion language models, fast and with the right tokens.

Public names load on first use, so `import llada2_fast` alone imports neither torch nor transformers, which take 1 and 2
seconds of CPU time. As soon as both packages are imported, in either order, transformers' Auto classes load LLaDA2
checkpoints (`register()` does it on its own), and diffusers' pipelines save and load our parts.
"""

import importlib
import sys
import types
from importlib.machinery import PathFinder

__version__ = "0.1.0"

# Public name -> the submodule it lives in; `demo` is that submodule itself.
_HOME = {
    "AsyncEngine": "engine",
    "BLOCK_DONE": "refinement",
    "BlockRefinementScheduler": "adapters.diffusers.scheduler",
    "BlockRefinementSchedulerOutput": "adapters.diffusers.scheduler",
    "BlockState": "refinement",
    "CheckpointError": "weights.checkpoint",
    "DecodeParams": "config",
    "Engine": "engine",
    "EngineConfig": "config",
    "FINISHED": "refinement",
    "FLAGS": "refinement",
    "GENERATED": "refinement",
    "GenerateOutput": "generate",
    "LLaDA2Model": "model",
    "LLaDA2MoeModelLM": "adapters.transformers",
    "LLaDA2Pipeline": "adapters.diffusers.pipeline",
    "LLaDA2PipelineOutput": "adapters.diffusers.pipeline",
    "Lanes": "refinement",
    "ModelConfig": "config",
    "PROMPT": "refinement",
    "QueueFull": "engine",
    "RefineParams": "refinement",
    "RequestOptions": "config",
    "SpecialIds": "refinement",
    "TAIL": "refinement",
    "VALID": "refinement",
    "demo": "demo",
    "generate": "generate",
    "load_tokenizer": "weights.special_tokens",
    "refine_params": "refinement",
    "refine_step": "refinement",
    "row_rule": "refinement",
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
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    globals()[name] = module if name == _HOME[name] != "generate" else getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


class _Hosts(PathFinder):
    """Registers with other libraries' tables when somebody imports them, so that nobody else pays for them."""

    # Their module -> our adapter, and what it does each time that module has been executed.
    STEPS = {
        "transformers.models.auto.configuration_auto": ("transformers", "register_configs"),
        "transformers.models.auto.modeling_auto": ("transformers", "register_models"),
        "diffusers.pipelines.pipeline_loading_utils": ("diffusers", "register"),
    }

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name in cls.STEPS else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register(*cls.STEPS[name])

        spec.loader.exec_module = exec_module
        return spec


def _register(adapter, step):
    getattr(importlib.import_module(f".adapters.{adapter}", __name__), step)()


for _step in [_step for _name, _step in _Hosts.STEPS.items() if _name in sys.modules]:  # configs ahead of models
    _register(*_step)
sys.meta_path.insert(0, _Hosts)
