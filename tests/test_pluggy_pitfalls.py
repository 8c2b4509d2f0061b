"""What raw pluggy does, and that the host avoids it: one test for each verified pitfall.

The numbers are those of the list of pitfalls in the project's style guide.  In each test the first
part shows what pluggy does when it is used as its tutorial does; the second what our host does.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from typing import Any

import pluggy
import pytest
from structlog.testing import capture_logs

from core import hookspecs, pluginhost
from core.errors import (
    ConfigError,
    PluginCallError,
    PluginConflictError,
    PluginImportError,
    PluginNotFoundError,
    PluginRegistrationError,
)
from core.pluginhost import DEFAULT, NAMED, PluginHost, PluginSelection, Selected, discover
from core.registry import AttentionEntry, Registered, Requirements
from core.testing.plugin import PluginSite

HEADER = 'from core.hookspecs import hookimpl\ncore_api = "1.0"\n'
PLAN: Any = object()
spec, impl = pluggy.HookspecMarker("raw"), pluggy.HookimplMarker("raw")


class Specs:
    @spec
    def gather(self, value): ...

    @spec(firstresult=True)
    def pick(self, value): ...


def raw(*plugins):
    manager = pluggy.PluginManager("raw")
    manager.add_hookspecs(Specs)
    for plugin in plugins:
        manager.register(plugin)
    return manager


def plugin(**functions):
    """Make a plugin whose hooks are these functions."""
    return type("Plugin", (), {name: staticmethod(impl(f)) for name, f in functions.items()})()


@pytest.fixture
def site(tmp_path):
    with PluginSite(tmp_path / "site") as site:
        yield site


@pytest.fixture
def start(site):
    def start(**sources):
        for name, source in sources.items():
            site.module(name, HEADER + source)
        return PluginHost.start([Selected(f"py:{name}", NAMED) for name in sources], {})

    return start


# --- calling ---------------------------------------------------------------------------------------


def test_1_the_last_registered_is_called_first(start):
    assert raw(*(plugin(gather=lambda n=n: n) for n in "abc")).hook.gather(value=0) == ["c", "b", "a"]

    source = "@hookimpl\ndef core_report_header(): yield __name__\n"
    first = "@hookimpl(tryfirst=True)\ndef core_report_header(): yield __name__\n"
    last = "@hookimpl(trylast=True)\ndef core_report_header(): yield __name__\n"
    assert start(a=source, b=source, c=source).report_header(PLAN) == ["a", "b", "c"]
    assert start(d=last, e=source, f=first, g=source).report_header(PLAN) == ["f", "e", "g", "d"]


@pytest.mark.parametrize("flag", [0, False, "", []])
def test_2_falsy_results_win(start, flag):
    later, first = plugin(pick=lambda: "later"), plugin(pick=lambda: flag)
    assert raw(later, first).hook.pick(value=0) == flag

    chooser = f"@hookimpl\ndef core_select_backend(): return {flag!r}\n"
    able = [Registered(AttentionEntry(name="torch", factory=print), "core", "cythera 1")]
    with pytest.raises(PluginCallError, match=r"py:a .* must return one of torch, or None"):
        start(a=chooser).select_backend("attention", able, Requirements(device="cpu", dtype="float32"))
    maker = f"@hookimpl\ndef core_make_executor(): return {flag!r}\n"
    with pytest.raises(PluginCallError, match=r"py:b .* must return an object that fulfils Executor"):
        start(b=maker).make_executor(PLAN, 0, lambda: pytest.fail("the flag won"))


def test_3_none_is_dropped_so_positions_tell_nothing(start):
    assert raw(plugin(gather=lambda: 1), plugin(gather=lambda: None)).hook.gather(value=0) == [1]

    silent = "@hookimpl\ndef core_check_plan(): return None\n"
    host = start(a=silent, b="@hookimpl\ndef core_check_plan(): yield 'too big'\n")
    assert host.check_plan(PLAN) == ["py:b: too big"]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_4_nobody_awaits_a_coroutine(start):
    async def pick():
        pytest.fail("nobody awaits this")

    result = raw(plugin(pick=pick)).hook.pick(value=0)
    assert result.close() is None  # it is the coroutine, not what it would return

    with pytest.raises(PluginRegistrationError, match="core_make_executor is async"):
        start(a="@hookimpl\nasync def core_make_executor(plan, rank): return None\n")
    hidden = "async def late(): pass\n@hookimpl\ndef core_engine_started(engine): return late()\n"
    with pytest.raises(PluginCallError, match="core_engine_started returned <coroutine"):
        start(b=hidden).engine_started(None)


def test_5_a_missing_argument_is_only_a_warning(start):
    with pytest.warns(UserWarning, match="value"):
        assert raw(plugin(gather=lambda: 1)).hook.gather() == [1]

    host = start(a="@hookimpl\ndef core_worker_started(): pass\n")
    with pytest.raises(TypeError, match="device"):
        host.worker_started(0)


def test_6_arguments_are_matched_by_name(start):
    with pytest.raises(TypeError):
        raw(plugin(gather=lambda value: value)).hook.gather(1)

    host = start(a="seen = []\n@hookimpl\ndef core_worker_started(device, rank): seen.append(rank)\n")
    host.worker_started(7, "cpu")
    assert sys.modules["a"].seen == [7]


def test_7_an_exception_keeps_later_plugins_from_being_called(start):
    called = []
    later, broken = plugin(gather=lambda: called.append(1)), plugin(gather=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        raw(later, broken).hook.gather(value=0)
    assert not called

    source = "called = []\n@hookimpl\ndef core_engine_stopping(): called.append(1)\n"
    host = start(a="@hookimpl\ndef core_engine_stopping(): 1 / 0\n", b=source)
    with capture_logs() as logs:
        host.engine_stopping(None, "shutdown")
    assert sys.modules["b"].called == [1]
    assert "py:a (under development): core_engine_stopping raised ZeroDiv" in logs[0]["error"]


def test_8_a_generator_runs_after_the_hook_has_returned(start):
    def gather():
        yield 1 / 0

    (pending,) = raw(plugin(gather=gather)).hook.gather(value=0)
    with pytest.raises(ZeroDivisionError):
        next(pending)

    with pytest.raises(PluginCallError, match=r"py:a .*core_check_plan raised ZeroDivisionError"):
        start(a="@hookimpl\ndef core_check_plan(): yield 1 / 0\n").check_plan(PLAN)


# --- declaring -------------------------------------------------------------------------------------


def test_9_keyword_only_parameters_are_not_seen(start):
    def gather(*, value):
        return value

    with pytest.raises(TypeError, match="keyword-only"):
        raw(plugin(gather=gather)).hook.gather(value=1)

    with pytest.raises(PluginRegistrationError, match="takes 'plan' by keyword only"):
        start(a="@hookimpl\ndef core_check_plan(*, plan): pass\n")


def test_10_parameters_with_defaults_are_never_filled(start):
    assert raw(plugin(gather=lambda value="default": value)).hook.gather(value=1) == ["default"]

    with pytest.raises(PluginRegistrationError, match="gives 'plan' a default"):
        start(a="@hookimpl\ndef core_check_plan(plan=None): pass\n")


def test_11_historic_hooks_exclude_results_and_wrappers():
    with pytest.raises(ValueError, match="historic"):
        spec(historic=True, firstresult=True)(lambda: None)

    manager = pluginhost._Manager()
    assert not any(getattr(manager.hook, name).is_historic() for name in manager.spec_names())


def test_12_a_misspelt_hook_registers_silently(start):
    manager = raw(plugin(gahter=lambda: 1))
    assert manager.hook.gather(value=0) == []
    with pytest.raises(pluggy.PluginValidationError, match="gahter"):
        manager.check_pending()

    with pytest.raises(PluginRegistrationError, match=r"py:a .*did you mean 'core_check_plan'"):
        start(a="@hookimpl\ndef core_chekc_plan(plan): pass\n")


# --- registering -----------------------------------------------------------------------------------


def test_13_a_failed_registration_leaves_the_plugin_active(site):
    manager = raw()
    half = plugin(gather=lambda: "still here", pick=lambda no_such_argument: 1)
    with pytest.raises(pluggy.PluginValidationError):
        manager.register(half)
    assert manager.hook.gather(value=0) == ["still here"]

    site.module(
        "a",
        HEADER + "@hookimpl\ndef core_check_plan(): yield 'still here'\n"
        "@hookimpl(wrapper=True)\ndef core_make_executor(): return 'no generator'\n",
    )
    ours = pluginhost._Manager()
    with pytest.raises(PluginRegistrationError, match="not a generator"):
        pluginhost._register(ours, pluginhost._find("py:a", {}), NAMED)
    assert not ours.list_name_plugin()
    assert not ours.hook.core_check_plan.get_hookimpls()


LAZY = """
from core.hookspecs import hookimpl
class Plugin:
    core_api = "1.0"
    @property
    def device(self): raise RuntimeError("a property was evaluated")
    @property
    def core_register_models(self): raise RuntimeError("a property was evaluated")
    @hookimpl
    def core_check_plan(self): yield "called"
plugin = Plugin()
"""


def test_14_properties_are_evaluated(site):
    site.module("a", LAZY)
    site.module("b", HEADER + "def __dir__(): return ['x']\ndef __getattr__(name): 1 / 0\n")
    site.distribution("acme", "1.0", {"kind.a": "a:plugin"})
    lazy = __import__("a").plugin
    with pytest.raises(RuntimeError, match="a property was evaluated"):
        raw(lazy)

    host = PluginHost.start([Selected("kind.a", NAMED), Selected("py:b", NAMED)])
    assert host.check_plan(PLAN) == ["kind.a: called"]


BY_VALUE = """
from dataclasses import dataclass
from core.hookspecs import hookimpl
@dataclass{arguments}
class Plugin:
    core_api = "1.0"
    @hookimpl
    def core_check_plan(self): yield "called"
plugin = Plugin()
"""


def test_15_equal_plugins_are_taken_for_one(site):
    @dataclasses.dataclass
    class Plugin:
        name: str = "same"

    manager = raw(Plugin())
    with pytest.raises(ValueError, match="already registered"):
        manager.register(Plugin(), "another")
    with pytest.raises(TypeError, match="unhashable"):
        manager.get_plugins()

    site.module("by_value", BY_VALUE.format(arguments=""))
    site.module("by_identity", BY_VALUE.format(arguments="(eq=False)"))
    site.distribution("acme", "1.0", {"kind.a": "by_value:plugin", "kind.b": "by_identity:plugin"})
    with pytest.raises(PluginRegistrationError, match=r"kind\.a .*compares by value"):
        PluginHost.start([Selected("kind.a", NAMED)])
    assert PluginHost.start([Selected("kind.b", NAMED)]).check_plan(PLAN) == ["kind.b: called"]


def test_16_a_class_fails_only_when_it_is_called(site):
    class Plugin:
        @impl
        def gather(self, value):
            return value

    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        raw(Plugin).hook.gather(value=1)

    site.module("a", BY_VALUE.format(arguments="(eq=False)"))
    site.distribution("acme", "1.0", {"kind.a": "a:Plugin"})
    with pytest.raises(PluginRegistrationError, match="a:Plugin is a class"):
        PluginHost.start([Selected("kind.a", NAMED)])


# --- discovering -----------------------------------------------------------------------------------


def test_17_loading_entry_points_imports_everything(site):
    for group in ("raw.plugins", pluginhost.GROUP):
        modules = {"kind.broken": "broken", "kind.good": "good"}
        site.distribution(f"acme_{group}", "1.0", modules, group=group)
    site.module("broken", "import no_such_dependency")
    site.module("good", HEADER)
    with pytest.raises(ModuleNotFoundError):  # and the error names no plugin
        raw().load_setuptools_entrypoints("raw.plugins")

    assert {"kind.broken", "kind.good"} <= discover().keys()
    assert PluginHost.start([Selected("kind.good", NAMED)]).active
    assert "broken" not in sys.modules
    with pytest.raises(PluginImportError, match=r"kind\.broken .*no:kind\.broken"):
        PluginHost.start([Selected("kind.broken", DEFAULT)])


def test_18_the_second_of_two_equal_names_is_skipped_silently(site):
    for group in ("raw.plugins", pluginhost.GROUP):
        site.distribution(f"one_{group}", "1.0", {"kind.a": "one"}, group=group)
        site.distribution(f"two_{group}", "2.0", {"kind.a": "two"}, group=group)
    site.module("one", "")
    site.module("two", "")
    assert raw().load_setuptools_entrypoints("raw.plugins") == 1

    with pytest.raises(PluginConflictError) as raised:
        discover()
    assert f"one_{pluginhost.GROUP} 1.0" in str(raised.value)
    assert f"two_{pluginhost.GROUP} 2.0" in str(raised.value)


def test_18_stale_metadata_cannot_win_silently(site):
    site.distribution("acme", "1.0", {"kind.a": "old_home"}, suffix=".egg-info")
    site.distribution("acme", "2.0", {"kind.a": "new_home", "kind.b": "b"})
    seen = importlib.metadata.entry_points(group=pluginhost.GROUP)
    assert len([point for point in seen if point.name == "kind.a"]) == 1  # either, by luck

    with pytest.raises(PluginConflictError) as raised:
        discover()
    assert "acme 1.0 (module old_home)" in str(raised.value)
    assert "acme 2.0 (module new_home)" in str(raised.value)


def test_19_a_missing_name_loads_nothing():
    assert raw().load_setuptools_entrypoints(pluginhost.GROUP, name="attention.torhc") == 0

    with pytest.raises(PluginNotFoundError, match=r"did you mean 'attention\.torch'"):
        PluginSelection.parse("attention.torhc").resolve(discover())


def test_20_a_subset_still_calls_hooks_under_another_name(site):
    class Renamed:
        @impl(specname="gather")
        def other_name(self):
            return "still called"

    renamed = Renamed()
    subset = raw(renamed).subset_hook_caller("gather", remove_plugins=[renamed])
    assert subset(value=0) == ["still called"]

    source = "@hookimpl(specname='core_check_plan')\ndef other_name(): yield __name__\n"
    site.distribution("acme", "1.0", {"kind.a": "a", "kind.b": "b"})
    for name in "ab":
        site.module(name, HEADER + source)
    selection = PluginSelection.parse("no:kind.a")
    selected = selection.resolve(discover(), defaults=["kind.a", "kind.b"])
    assert PluginHost.start(selected).check_plan(PLAN) == ["kind.b: b"]
    assert "a" not in sys.modules


# --- packaging and engine --------------------------------------------------------------------------


def test_22_a_core_folder_can_shadow_the_installed_one(site):
    metadata = site.distribution(hookspecs.PROJECT_NAME, "9.9", {})
    (metadata / "RECORD").write_text("core/__init__.py,,\n")
    site.module("core.__init__", "")
    with pytest.raises(ConfigError, match="is installed in"):
        PluginHost.start([])


def test_23_the_marker_is_named_after_the_distribution():
    @hookspecs.hookimpl
    def hook():
        pass

    assert [name for name in vars(hook) if name.endswith("_impl")] == ["cythera_impl"]


@pytest.mark.parametrize(
    ("factory", "shown"),
    [
        ("lambda plan: plan", "<lambda>"),
        ("local()", "<locals>"),
        ("functools.partial(lambda plan: plan)", "<lambda>"),
    ],
)
def test_26_ranks_cannot_import_a_closure(start, factory, shown):
    source = "import functools\nfrom core.registry import QuantizerEntry\n"
    source += "def local():\n    def build(plan): pass\n    return build\n"
    source += f"@hookimpl\ndef core_register_quantizers():\n    yield QuantizerEntry(name='x', factory={factory})"
    with pytest.raises(PluginCallError, match=f"factory is .*{shown}.*every rank imports it again"):
        start(a=source).collect()
