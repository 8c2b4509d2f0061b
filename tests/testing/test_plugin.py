"""The conformance kit for plugins: it passes healthy plugins and catches planted faults."""

from __future__ import annotations

import pytest

from core.errors import PluginError
from core.testing.plugin import PluginConformance, PluginSite, watch_import

HEALTHY = '''
"""Quantizes."""
from dataclasses import dataclass
from core.hookspecs import hookimpl
from core.registry import QuantizerEntry
core_api = "1.0"
def build(plan): pass
def renamed(plan): pass
renamed.__qualname__ = "gone"
def raises(requirements): return [requirements.quantization_config["bits"]]
def speaks(requirements): return "one reason"
def mumbles(requirements): return [""]
def count(calls=[]):
    calls.append(1)
    return len(calls)
@dataclass(frozen=True)
class Settings:
    size: int = 0
    def __post_init__(self): raise ValueError("0 is too small")
@hookimpl
def core_register_quantizers():
    yield QuantizerEntry(name="x", factory=build, summary="a quantizer")
'''


class TestBuiltin(PluginConformance):
    module = "core.builtin"
    preload = ()


class TestOutsider(PluginConformance):
    module = "acme_quant"
    preload = ()

    @pytest.fixture(autouse=True)
    def site(self, tmp_path):
        with PluginSite(tmp_path / "site") as site:
            site.module(self.module, HEALTHY)
            yield


SETTINGS = "@hookimpl\ndef core_register_settings(): return Settings\n"


@pytest.fixture
def kit(tmp_path):
    """A suite for a plugin with a planted fault: some text of the healthy one is replaced."""
    with PluginSite(tmp_path / "site") as site:

        def kit(old, new):
            assert old in HEALTHY
            site.module("faulty", HEALTHY.replace(old, new))
            return type("Suite", (PluginConformance,), {"module": "faulty"})()

        yield kit


@pytest.mark.parametrize(
    ("old", "new", "test"),
    [
        ('core_api = "1.0"', "", "test_registers_alone"),
        ('core_api = "1.0"', "", "test_states_the_api_it_was_written_for"),
        ("@hookimpl", "", "test_implements_known_hooks"),
        ("core_register_q", "core_registre_q", "test_implements_known_hooks"),
        ("core_register_q", "core_registre_q", "test_declares_without_problems"),
        ("yield Q", "1 / 0\n    yield Q", "test_declares_without_problems"),
        ("factory=build", "factory=lambda plan: 1", "test_declares_without_problems"),
        ('name="x"', 'name=f"x{count()}"', "test_declarations_are_pure"),
        ("factory=build", "factory=renamed", "test_factories_can_be_imported"),
        ("factory=build", "factory=build, unsupported=raises", "test_descriptors_answer_every_"),
        ("factory=build", "factory=build, unsupported=speaks", "test_descriptors_answer_every_"),
        ("factory=build", "factory=build, unsupported=mumbles", "test_descriptors_answer_every_"),
        ('"""Quantizes."""', "", "test_is_documented"),
        ('"""Quantizes."""', '" "', "test_is_documented"),
        (', summary="a quantizer"', "", "test_is_documented"),
        ("@hookimpl", SETTINGS + "@hookimpl", "test_settings_"),
    ],
)
def test_a_planted_fault_is_caught(kit, old, new, test):
    suite = kit(old, new)
    (name,) = [name for name in dir(suite) if name.startswith(test)]
    with pytest.raises((AssertionError, PluginError, LookupError, ValueError)):
        getattr(suite, name)()


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("open(__file__ + '.lock', 'w').close()", "test_import_touches_nothing"),
        ("import os; os.environ['ACME'] = '1'", "test_import_touches_nothing"),
        (
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
            "test_import_touches_nothing",
        ),
        ("import plugins.attention", "test_import_leaves_other_plugins_alone"),
    ],
)
def test_a_side_effect_of_an_import_is_caught(kit, source, test):
    suite = kit('"""Quantizes."""', f'"""Quantizes."""\n{source}')
    footprint = watch_import(suite.module)
    with pytest.raises(AssertionError, match="importing"):
        getattr(suite, test)(footprint)


def test_an_initialised_device_is_caught(kit):
    footprint = {"cuda": True, "writes": [], "environment": [], "threads": 0}
    with pytest.raises(AssertionError, match="initialises CUDA"):
        kit("build", "build").test_import_touches_nothing(footprint)


def test_a_plugin_that_cannot_be_imported_is_caught():
    with pytest.raises(AssertionError, match="No module named 'no_such_module'"):
        watch_import("no_such_module")
