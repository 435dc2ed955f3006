"""SGLang's own files for diffusion LMs, loaded from its wheel without the rest of it, which needs a GPU.

Real: srt/dllm (DllmConfig, the registry, DllmAlgorithm with both loops, LowConfidence, JointThreshold, the request and
scheduler mixins) and srt/plugins. A stub stands for what those import from elsewhere: a name they annotate with, or the
least that runs.
"""

import contextlib
import importlib
import sys
import types
from types import SimpleNamespace

EXEC = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))


class _Name:
    """A class that SGLang's files import to name it and never call here."""


class ModelConfig:
    """Of the checkpoint that a test's server arguments carry."""

    @staticmethod
    def from_server_args(server_args, **_):
        return SimpleNamespace(hf_config=server_args.hf_config)


STUBS = {
    "sglang.srt.arg_groups.model_override_base": {"model_config_of": ModelConfig.from_server_args},
    "sglang.srt.arg_groups.overrides": {"resolving_view": lambda server_args: server_args},
    "sglang.srt.configs.model_config": {"ModelConfig": ModelConfig},
    "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_PLUGINS=SimpleNamespace(get=lambda: "llada2_fast"),
                                                   SGLANG_PLATFORM=SimpleNamespace(get=lambda: ""))},
    "sglang.srt.layers.logits_processor": {"LogitsProcessorOutput": _Name},
    "sglang.srt.managers.schedule_batch": {"FINISH_LENGTH": SimpleNamespace, "Req": _Name, "ScheduleBatch": _Name},
    "sglang.srt.managers.schedule_policy": {"AddReqResult": _Name, "PrefillAdder": _Name},
    "sglang.srt.mem_cache.common": {"release_kv_cache": lambda *_, **__: None},
    "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": _Name, "ForwardMode": _Name},
    "sglang.srt.model_executor.model_runner": {"ModelRunner": _Name},
    "sglang.srt.observability.req_time_stats": {"set_time_batch": _Name},
    "sglang.srt.runtime_context": {"get_exec": lambda: EXEC, "get_schedule": _Name},
    "sglang.srt.server_args": {"ServerArgs": _Name},
    "sglang.srt.utils": {"is_npu": lambda: False},
}  # fmt: skip


@contextlib.contextmanager
def sglang(folder):
    """While it is open, `import sglang.srt.dllm...` gives the files of an unpacked wheel."""
    assert "sglang" not in sys.modules, "the real SGLang is loaded"
    package = types.ModuleType("sglang")
    package.__path__ = [str(folder / "sglang")]  # without its __init__, which imports everything
    sys.modules["sglang"] = package
    for name, contents in STUBS.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        yield importlib.import_module("sglang.srt.dllm.algorithm")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            del sys.modules[name]
