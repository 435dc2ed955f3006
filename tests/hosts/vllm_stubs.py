"""vLLM's real Python files, imported without what no CPU test machine has installed.

`vllm(folder)` puts the unpacked wheel on the path and stands in for the packages in ABSENT, and for nothing else.
A stand-in's attributes are classes that can be called, subclassed, subscripted and used as decorators; msgspec's Struct
keeps its fields, since SamplingParams is one.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import llada2_fast

ABSENT = (
    "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "einops", "fastapi", "gguf", "llguidance", "msgspec",
    "openai", "openai_harmony", "partial_json_parser", "prometheus_client", "psutil", "pybase64", "uvloop", "xgrammar",
    "zmq",
)  # fmt: skip


class _Meta(type):
    def __getattr__(cls, name):
        return _private(name) or stand_in(f"{cls.__name__}.{name}")

    def __or__(cls, other):
        return cls

    __ror__ = __getitem__ = __or__


def _private(name):
    if name.startswith("__"):
        raise AttributeError(name)


def stand_in(name):
    def new(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else object.__new__(cls)

    def schema(cls, *args):
        from pydantic_core import core_schema

        return core_schema.any_schema()

    return _Meta(name, (), {
        "__new__": new, "__init__": lambda self, *args, **kwargs: None,
        "__call__": lambda self, function=None, *args, **kwargs: function,
        "__init_subclass__": classmethod(lambda cls, **kwargs: None),
        "__get_pydantic_core_schema__": classmethod(schema),
    })  # fmt: skip


class _Default:
    def __init__(self, default=None, default_factory=None, **kwargs):
        self.make = default_factory or (lambda: default)


class Struct:
    """Fields with defaults, by keyword or position, then __post_init__; as much of msgspec.Struct as is needed."""

    def __init_subclass__(cls, **kwargs):
        pass

    def __init__(self, *args, **kwargs):
        names = [name for base in reversed(type(self).__mro__) for name in vars(base).get("__annotations__", {})]
        given = dict(zip(names, args, strict=False)) | kwargs
        for name in names:
            default = getattr(type(self), name, None)
            if name not in given:
                given[name] = default.make() if isinstance(default, _Default) else default
            setattr(self, name, given[name])
        getattr(self, "__post_init__", lambda: None)()


class _Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        value = _private(name) or stand_in(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        if module.__name__ == "msgspec":
            module.Struct, module.field, module.UNSET = Struct, _Default, None


_imported = {}  # what the last context left: vLLM can be imported only once, as it defines torch's operators


@contextlib.contextmanager
def vllm(folder):
    """While it is open, `import vllm` gives the files of an unpacked wheel: the same one in all of a process."""
    before, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    sys.modules.update(_imported)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(_Finder())  # last: an installed package is the real one
    try:
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()  # which the wheel, built for CUDA, would not find
        yield folder
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("vllm", *ABSENT):
                _imported[name] = sys.modules.pop(name)
        llada2_fast.register()  # vLLM has entered its config classes in transformers' tables
