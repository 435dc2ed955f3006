"""Our plug-ins beside hosts that they do not serve: the hosts' own loaders, on the hosts' own files, changed or old."""

import copy
import importlib
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada2_fast.adapters import sglang as sglang_adapter
from llada2_fast.adapters import vllm as vllm_adapter
from llada2_fast.adapters.vllm.config import CONFIG_CLASSES
from tests.hosts import sglang_stubs, vllm_stubs

ARCHITECTURE, ALGORITHM = vllm_adapter.ARCHITECTURE, sglang_adapter.NAME
ROOT = Path(__file__).parents[2]

# Ways in which another version's module may not hold the name that we want of it.


def gone(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)


def renamed(monkeypatch, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)


def holding(value):
    """A name for something else."""

    def change(monkeypatch, module, name):
        monkeypatch.setattr(importlib.import_module(module), name, value)

    return change


def raising(error):
    """A module that ends with `error` when it is imported, or looks the name up at last."""

    def change(monkeypatch, module, name):
        def fail(_):
            raise error

        broken = types.ModuleType(module)
        broken.__getattr__ = fail
        monkeypatch.setitem(sys.modules, module, broken)

    return change


CHANGES = {
    "gone": gone, "renamed": renamed, "none": holding(None), "list": holding([]), "object": holding(object()),
    "read-only": holding(types.MappingProxyType({})),
    **{type(error).__name__: raising(error) for error in (
        ImportError("a"), AttributeError("a"), RuntimeError("two\nlines"), OSError("a"), KeyError("a"),
        AssertionError(), SyntaxError("a"),
    )},
}  # fmt: skip
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def said(caplog):
    """The lines that our package has logged, all of them warnings of one line."""
    records = [record for record in caplog.records if record.name.startswith("llada2_fast")]
    assert all(record.levelname == "WARNING" and not record.exc_info for record in records)
    lines = [record.getMessage() for record in records]
    assert not any("\n" in line for line in lines)
    caplog.clear()
    return lines


# -- vLLM --------------------------------------------------------------------------------------------------------------

TABLES = [
    ("vllm.model_executor.models.registry", "ModelRegistry"),
    ("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"),
    ("vllm.transformers_utils.config", "_CONFIG_REGISTRY"),
]


@pytest.fixture(scope="module")
def vllm_files(unpacked, installed):
    with vllm_stubs.vllm(unpacked("vllm==0.33.0")):
        sys.path.insert(0, str(installed))
        yield


@pytest.fixture
def tables(vllm_files, monkeypatch):
    """vLLM's three tables, as they are before any plug-in: networks, hooks, configs. They are the test's own."""
    held = []
    for module, name in TABLES:
        table = copy.copy(getattr(importlib.import_module(module), name))
        monkeypatch.setattr(sys.modules[module], name, table)
        held.append(table)
    held[0].models = held[0].models.copy()
    tables = [held[0].models, *held[1:]]
    for table in tables:  # other tests of this process may have registered it
        for name in (ARCHITECTURE, *CONFIG_CLASSES):
            table.pop(name, None)
    return tables


@pytest.fixture
def start_vllm(tables, monkeypatch, caplog):
    """What every vllm command does first, in a version that it may be told. Returns what we have logged."""

    def start(version=None):
        from vllm import plugins

        if version is not None:
            monkeypatch.setattr("vllm.__version__", version)
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        plugins.load_general_plugins()
        return said(caplog)

    return start


def ask_for_llada2():
    """vLLM's own two looks for a hook of the architecture, that of a model's config first."""
    from vllm.config.model import ModelConfig
    from vllm.config.vllm import VllmConfig

    model = SimpleNamespace(architecture=ARCHITECTURE)
    with pytest.raises(RuntimeError) as first:
        ModelConfig._try_verify_and_update_model_config(model)
    with pytest.raises(RuntimeError) as second:
        VllmConfig.try_verify_and_update_config(SimpleNamespace(model_config=model))
    assert str(first.value) == str(second.value)
    return str(first.value)


@changes
@pytest.mark.parametrize("module, name", TABLES, ids=[name for _, name in TABLES])
@pytest.mark.parametrize("version", ["0.40.0", "0.33.1"])
def test_a_vllm_without_one_of_our_names_goes_on(start_vllm, tables, monkeypatch, version, module, name, change):
    before = [table.copy() for table in tables]
    change(monkeypatch, module, name)
    for _ in range(2):
        (line,) = start_vllm(version)
        assert "serves LLaDA2 in vLLM 0.33," in line and version in line
    assert tables == before


@pytest.mark.parametrize("version", ["0.8.5", "0.20.0", "0.32.1", "0.34.0rc1", "0.330.0", "1.0.33", "0.3", "dev", 33])
def test_another_vllm_refuses_llada2_alone(start_vllm, tables, version):
    before = [table.copy() for table in tables]
    (line,) = start_vllm(version)
    assert "serves LLaDA2 in vLLM 0.33," in line and str(version) in line
    said_when_asked = ask_for_llada2()
    assert "serves LLaDA2 in vLLM 0.33," in said_when_asked and str(version) in said_when_asked
    after = [table.copy() for table in tables]
    start_vllm(version)
    assert tables == after
    del after[0][ARCHITECTURE], after[1][ARCHITECTURE]
    assert after == before


def test_a_vllm_that_names_no_version_is_another(start_vllm, tables, monkeypatch):
    monkeypatch.delattr("vllm.__version__")
    (line,) = start_vllm()
    assert "unknown version" in line and "unknown version" in ask_for_llada2()


def test_another_vllm_keeps_its_own_llada2(start_vllm, tables):
    tables[0][ARCHITECTURE] = tables[0]["LlamaForCausalLM"]
    before = [table.copy() for table in tables]
    assert len(start_vllm("0.40.0")) == 1
    assert tables == before


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1", "0.33.0rc2", "0.33.1.dev4+g0a1b2c3", "0.33.0+cu129", "0.33"])
def test_a_vllm_of_the_version_served_is_served(start_vllm, tables, version):
    for _ in range(2):
        assert start_vllm(version) == []
        assert [ARCHITECTURE in table for table in tables] == [True, True, False] and "llada2_moe" in tables[2]


def test_a_registry_that_takes_no_networks(start_vllm, tables, monkeypatch):
    """In another version nothing has been changed by then; in the one served the fault is not hidden."""
    before = [table.copy() for table in tables]

    def register_model(architecture):
        raise AssertionError("never reached")

    registry = sys.modules[TABLES[0][0]].ModelRegistry
    monkeypatch.setattr(type(registry), "register_model", register_model)
    (line,) = start_vllm("0.40.0")
    assert "TypeError" in line
    with pytest.raises(TypeError):
        start_vllm("0.33.0")
    assert tables == before


def test_a_fault_of_ours_is_not_taken_for_another_vllm(start_vllm, tables, monkeypatch):
    before = [table.copy() for table in tables]
    monkeypatch.setitem(sys.modules, "llada2_fast.adapters.vllm.config", None)
    with pytest.raises(ImportError, match="llada2_fast.adapters.vllm.config"):
        start_vllm("0.33.0")
    assert tables == before
    assert len(start_vllm("0.40.0")) == 1  # where it is not even imported


def test_an_interrupt_is_not_taken_for_another_vllm(start_vllm, monkeypatch):
    raising(KeyboardInterrupt())(monkeypatch, *TABLES[1])
    with pytest.raises(KeyboardInterrupt):
        start_vllm()


OLD_VLLM = """
import importlib, sys
from pathlib import Path
from tests.hosts import vllm_stubs
with vllm_stubs.vllm(Path(sys.argv[1])):
    sys.path.insert(0, sys.argv[2])
    import vllm.plugins
    vllm.plugins.load_general_plugins()
    from vllm.model_executor.models.registry import ModelRegistry
    print(f"{vllm.__version__} goes on, {len(ModelRegistry.get_supported_archs()) > 50}")
    if "LLaDA2MoeModelLM" in ModelRegistry.models:
        from tests.hosts.test_plugins import ask_for_llada2
        print(ask_for_llada2())
"""


@pytest.mark.slow
@pytest.mark.parametrize("version, refuses", [("0.8.5", False), ("0.20.0", True), ("0.32.0", True)])
def test_real_other_versions_of_vllm(unpacked, installed, version, refuses):
    """Of 0.8.5, which has no config hooks, to the one before ours. Slow: a wheel has 250 MB and more."""
    command = [sys.executable, "-c", OLD_VLLM, str(unpacked(f"vllm=={version}")), str(installed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentence = f"llada2_fast serves LLaDA2 in vLLM 0.33, not in this vLLM, {version}"
    assert f"{version} goes on, True" in done.stdout
    assert done.stderr.count(sentence) == 1 and done.stdout.count(sentence) == refuses


# -- SGLang ------------------------------------------------------------------------------------------------------------

NAMES = [
    ("sglang.version", "__version__"),
    ("sglang.srt.dllm.algorithm", "algo_name_to_cls"),
    ("sglang.srt.dllm.algorithm.base", "DllmAlgorithm"),
]


@pytest.fixture
def algorithms(unpacked):
    """SGLang's own table of algorithms, before any plug-in."""
    with sglang_stubs.sglang(unpacked("sglang==0.5.23")) as package:
        yield package.algo_name_to_cls


@pytest.fixture
def start_sglang(installed, monkeypatch, caplog):
    """What every sglang command does first, in a version that it may be told. Returns what we have logged."""

    def start(version=None):
        from sglang.srt import plugins

        if version is not None:
            monkeypatch.setattr(importlib.import_module("sglang.version"), "__version__", version)
        monkeypatch.syspath_prepend(str(installed))
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
        assert not [record.getMessage() for record in caplog.records if record.name == plugins.__name__]
        return said(caplog)

    return start


@changes
@pytest.mark.parametrize("module, name", NAMES, ids=[name for _, name in NAMES])
def test_an_sglang_without_one_of_our_names_goes_on(algorithms, start_sglang, monkeypatch, module, name, change):
    before = algorithms.copy()
    change(monkeypatch, module, name)
    for _ in range(2):
        (line,) = start_sglang()
        assert "serves LLaDA2 in SGLang 0.5.23," in line
    assert algorithms == before


@pytest.mark.parametrize("version", ["0.5.12", "0.5.22", "0.5.24", "0.5.230", "0.5", "0.0.0.dev0", "1.0.5.23", None])
def test_another_sglang_stays_as_it_is(algorithms, start_sglang, monkeypatch, version):
    before = algorithms.copy()
    monkeypatch.setattr(importlib.import_module("sglang.version"), "__version__", version)
    (line,) = start_sglang()
    assert "serves LLaDA2 in SGLang 0.5.23," in line and str(version) in line
    assert algorithms == before


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.23rc0", "0.5.23+cu129"])
def test_an_sglang_of_the_version_served_is_served(algorithms, start_sglang, version):
    before = algorithms.copy()
    assert start_sglang(version) == []
    registered = algorithms[ALGORITHM]
    assert start_sglang(version) == [] and algorithms[ALGORITHM] is registered
    assert algorithms == before | {ALGORITHM: registered}


def test_a_fault_of_ours_is_not_taken_for_another_sglang(algorithms, monkeypatch):
    before = algorithms.copy()
    monkeypatch.setattr(sglang_adapter, "Refinement", bool)  # which nothing can be derived from
    with pytest.raises(TypeError, match="not an acceptable base type"):
        sglang_adapter.register()
    assert algorithms == before


@pytest.mark.parametrize("version", ["0.5.12", "0.5.22"])
def test_real_other_versions_of_sglang(unpacked, start_sglang, version):
    with sglang_stubs.sglang(unpacked(f"sglang=={version}")) as package:
        before = package.algo_name_to_cls.copy()
        (line,) = start_sglang()
        assert f"serves LLaDA2 in SGLang 0.5.23, not in this SGLang, {version}" in line
        assert package.algo_name_to_cls == before and {"LowConfidence", "JointThreshold"} <= before.keys()


# -- neither -----------------------------------------------------------------------------------------------------------


def test_entry_points_without_their_hosts(installed, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.syspath_prepend(str(installed))
    for group, host in [("vllm.general_plugins", "vLLM 0.33"), ("sglang.srt.plugins", "SGLang 0.5.23")]:
        (point,) = entry_points(group=group, name="llada2_fast")
        point.load()()
        (line,) = said(caplog)
        assert host in line
