"""The plugin host, over real metadata and real modules in a temporary folder."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
from structlog.testing import capture_logs

from core import hookspecs, interfaces
from core.errors import (
    CapacityError,
    ConfigError,
    PluginCallError,
    PluginConflictError,
    PluginImportError,
    PluginNotFoundError,
    PluginRegistrationError,
)
from core.pluginhost import (
    DEFAULT,
    NAMED,
    NEEDED,
    PluginEntry,
    PluginHost,
    PluginSelection,
    Selected,
    check_core_location,
    check_plugin,
    discover,
    list_plugins,
    show_plugin,
)
from core.registry import KINDS, Registered, Requirements
from core.testing.plugin import PluginSite

HEADER = 'from core.hookspecs import hookimpl\ncore_api = "1.0"\n'
PLAN: Any = object()  # the host only passes it on
REQUIREMENTS = Requirements(device="cpu", dtype="float32")


@pytest.fixture
def site(tmp_path):
    with PluginSite(tmp_path / "site") as site:
        yield site


@pytest.fixture
def start(site):
    """Write modules (name=source), and start a host that calls them in this order."""

    def start(reason=NAMED, header=HEADER, **sources):
        for name, source in sources.items():
            site.module(name, header + source)
        return PluginHost.start([Selected(f"py:{name}", reason) for name in sources], {})

    return start


def entries(*names, module="{}"):
    return {name: PluginEntry(name, module.format(name), "acme", "1.0") for name in names}


def fulfil(protocol):
    """Make an object that fulfils a Protocol and does nothing."""
    return type("Fake", (protocol,), dict.fromkeys(protocol.__annotations__, 0))()


def implement(hook, body, *, arguments="", mark="hookimpl"):
    return f"@{mark}\ndef {hook}({arguments}):\n    {body}\n"


# --- discovery -------------------------------------------------------------------------------------


def test_discover_imports_nothing(site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    site.module("acme_quant", "raise RuntimeError('imported')")
    assert discover()["quant.acme"] == PluginEntry("quant.acme", "acme_quant", "acme", "1.2")
    assert "acme_quant" not in sys.modules


def test_discover_finds_the_plugins_of_this_distribution():
    found = discover()
    assert found["attention.torch"].module == "plugins.attention.torch"
    assert found["attention.torch"].owner.startswith("cythera ")
    assert list(found) == sorted(found)


def test_entry_describes_itself():
    entry = PluginEntry("quant.awq", "acme.awq", "acme", "1.2")
    assert (entry.kind, str(entry)) == ("quant", "quant.awq (acme 1.2)")
    assert PluginEntry("py:acme.awq", "acme.awq", source="py:").kind == ""


def test_one_name_from_two_distributions_is_a_conflict(site):
    site.distribution("acme", "1.2", {"quant.x": "acme_x", "quant.y": "acme_y"})
    site.distribution("umbrella", "3.4", {"quant.x": "umbrella_x", "quant.y": "umbrella_y"})
    with pytest.raises(PluginConflictError) as raised:
        discover()
    for part in ("quant.x", "quant.y", "acme 1.2", "umbrella 3.4"):
        assert part in str(raised.value)
    assert raised.value.plugin in ("quant.x", "quant.y")


def test_one_module_from_two_distributions_is_a_conflict_too(site):
    site.distribution("acme", "1.2", {"quant.x": "acme_x"})
    site.distribution("fork", "1.3", {"quant.x": "acme_x"})
    with pytest.raises(PluginConflictError) as raised:
        discover()
    assert "acme 1.2" in str(raised.value)
    assert "fork 1.3" in str(raised.value)


def test_the_same_metadata_twice_is_no_conflict(site):
    site.distribution("acme_quant", "1.2", {"quant.x": "acme_x"})
    site.distribution("Acme.Quant", "1.1", {"quant.x": "acme_x"}, suffix=".egg-info")
    assert discover()["quant.x"].module == "acme_x"


def test_metadata_of_others_cannot_stop_discovery(site):
    folder = site.distribution("broken", "1.0", {"a": "b"}, group="console_scripts")
    (folder / "entry_points.txt").write_text("[console_scripts]\nthis line says nothing\n")
    (site.path / "empty-1.0.dist-info").mkdir()
    assert "attention.torch" in discover()


@pytest.mark.parametrize(
    ("module", "is_present"),
    [
        ("acme.deep.quant", True),
        ("acme.deep.quant:plugin", True),
        ("acme.deep", True),
        ("acme.deep.missing", False),
        ("acme.deep.quant.below_a_module", False),
        ("no_such_package.quant", False),
    ],
)
def test_presence_is_told_without_importing(site, module, is_present):
    for package in ("acme", "acme.deep"):
        site.module(f"{package}.__init__", "raise RuntimeError('imported')")
    site.module("acme.deep.quant", "raise RuntimeError('imported')")
    assert PluginEntry("quant.acme", module).is_present is is_present


# --- which core this is ----------------------------------------------------------------------------


def installed_core(site, root):
    folder = site.distribution("cythera", "9.9", {})
    (folder / "RECORD").write_text("core/__init__.py,,\ncore/cli.py,,\n")
    (root / "core").mkdir(exist_ok=True)
    (root / "core" / "__init__.py").touch()


def test_a_core_that_shadows_the_installed_one_is_refused(site):
    installed_core(site, site.path)
    with pytest.raises(ConfigError) as raised:
        PluginHost.start([], {})
    assert str(site.path / "core") in str(raised.value)
    assert str(hookspecs.__file__).removesuffix("/hookspecs.py") in str(raised.value)


def test_the_installed_core_is_accepted(site, monkeypatch):
    installed_core(site, site.path)
    monkeypatch.setattr("core.pluginhost.__file__", str(site.path / "core" / "pluginhost.py"))
    check_core_location()


def test_an_editable_installation_is_accepted(site):
    site.distribution("cythera", "9.9", {})
    check_core_location()


def test_a_bare_source_tree_is_accepted(monkeypatch):
    monkeypatch.setattr(hookspecs, "PROJECT_NAME", "no such distribution")
    check_core_location()


# --- selection -------------------------------------------------------------------------------------


KNOWN = entries("quant.awq", "quant.gptq", "observe.log", "observe.prometheus", "parallel.tp")


def resolve(items, **options):
    selected = PluginSelection.parse(items).resolve(KNOWN, **options)
    return {choice.name: choice.reason for choice in selected}


def test_a_named_kind_is_exactly_what_the_list_says():
    defaults = ("quant.gptq", "observe.log", "observe.prometheus")
    assert resolve("quant.awq", defaults=defaults) == {
        "quant.awq": NAMED,
        "observe.log": DEFAULT,
        "observe.prometheus": DEFAULT,
    }
    assert resolve("observe.log", defaults=defaults) == {"observe.log": NAMED, "quant.gptq": DEFAULT}


def test_blocking_takes_one_default_away_and_names_no_kind():
    defaults = ("observe.log", "observe.prometheus")
    assert list(resolve("no:observe.prometheus", defaults=defaults)) == ["observe.log"]
    assert resolve("no:quant.awq", defaults=defaults) == dict.fromkeys(defaults, DEFAULT)


def test_other_settings_add_what_they_need():
    needed = {"parallel.tp": "--tensor-parallel-size 2", "quant.awq": "--quantization awq"}
    assert resolve("quant.awq,observe.log", needed=needed) == {
        "quant.awq": NAMED,
        "observe.log": NAMED,
        "parallel.tp": "needed by --tensor-parallel-size 2",
    }


def test_a_module_under_development_leaves_the_defaults_alone():
    selected = resolve("py:acme.quant", defaults=("quant.gptq",))
    assert selected == {"py:acme.quant": NAMED, "quant.gptq": DEFAULT}


@pytest.mark.parametrize(
    "items", ["quant.awq,observe.log", ["quant.awq", "observe.log"], [" quant.awq, ", "observe.log,"]]
)
def test_items_come_in_one_string_or_several(items):
    assert list(resolve(items)) == ["quant.awq", "observe.log"]


def test_naming_twice_is_naming_once():
    assert list(resolve("quant.awq,quant.awq")) == ["quant.awq"]
    assert resolve("") == {}


@pytest.mark.parametrize("item", ["py:", "py:acme quant", "py:acme..quant", "py:../quant", "py:a-b"])
def test_a_malformed_module_is_refused(item):
    with pytest.raises(ConfigError, match=r"py:package.module"):
        PluginSelection.parse(item)


def test_named_and_blocked_is_refused():
    with pytest.raises(ConfigError, match=r"named by --plugins, but no:quant\.awq blocks it"):
        resolve("quant.awq,no:quant.awq")
    with pytest.raises(ConfigError, match=r"needed by --tensor-parallel-size 2, but no:parallel\.tp"):
        resolve("no:parallel.tp", needed={"parallel.tp": "--tensor-parallel-size 2"})


@pytest.mark.parametrize(
    ("items", "options", "hint"),
    [
        ("quant.akq", {}, "did you mean 'quant.awq'"),
        ("awq", {}, "did you mean 'quant.awq'"),
        ("no:observe.promethius", {}, "did you mean 'observe.prometheus'"),
        ("py:a,no:py:a.b", {}, "blocked by no:py:a.b"),
        ("", {"needed": {"quant.avq": "--quantization avq"}}, "needed by --quantization avq"),
        ("", {"defaults": ["quant.awk"]}, r"\(default\)"),
        ("xyzzy", {}, "known: quant.awq, quant.gptq"),
    ],
)
def test_unknown_names_suggest_the_nearest(items, options, hint):
    with pytest.raises(PluginNotFoundError, match=hint):
        resolve(items, **options)


def test_all_unknown_names_are_listed_at_once():
    with pytest.raises(PluginNotFoundError) as raised:
        resolve("quant.one,no:quant.two")
    assert "'quant.one'" in str(raised.value)
    assert "'quant.two'" in str(raised.value)
    assert raised.value.plugin == "quant.one"


def test_nothing_installed_is_said():
    with pytest.raises(PluginNotFoundError, match="known: none"):
        PluginSelection.parse("quant.awq").resolve({})


# --- registration ----------------------------------------------------------------------------------


def refusal(start, source, match, header=HEADER):
    """Start a host with one faulty plugin; its name and how to disable it are always told."""
    with pytest.raises(PluginRegistrationError, match=match) as raised:
        start(header=header, faulty=source)
    assert raised.value.plugin == "py:faulty"
    assert "leave py:faulty out of --plugins" in str(raised.value)
    return raised.value


def test_started_hosts_know_their_plugins(start):
    host = start(one="", two="")
    assert host.selected == (Selected("py:one", NAMED), Selected("py:two", NAMED))
    assert [str(plugin) for plugin in host.active] == [
        "py:one (under development)",
        "py:two (under development)",
    ]
    assert host.active[0].plugin is sys.modules["one"]


def test_an_installed_plugin_starts_by_name(site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    site.module("acme_quant", HEADER + implement("core_check_plan", "return ['no']"))
    host = PluginHost.start([Selected("quant.acme", NAMED)])
    assert host.check_plan(PLAN) == ["quant.acme: no"]


def test_unknown_plugins_do_not_start():
    with pytest.raises(PluginNotFoundError, match=r"quant\.awk.*did you mean 'quant\.awq'"):
        PluginHost.start([Selected("quant.awk", NAMED)], KNOWN)


def test_known_but_not_importable_is_another_error(site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    site.module("acme_quant", "import no_such_dependency")
    with pytest.raises(PluginImportError) as raised:
        PluginHost.start([Selected("quant.acme", DEFAULT)])
    for part in ("quant.acme (acme 1.2)", "is known", "no_such_dependency", "no:quant.acme"):
        assert part in str(raised.value)
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("source", ["1 / 0", "raise SystemExit(3)", "def broken(:"])
def test_whatever_an_import_raises_names_the_plugin(start, source):
    with pytest.raises(PluginImportError, match="py:faulty"):
        start(faulty=source)


def test_ctrl_c_during_an_import_is_the_users(start):
    with pytest.raises(KeyboardInterrupt):
        start(faulty="raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (NAMED, "leave py:faulty out of --plugins"),
        (DEFAULT, "add no:py:faulty to --plugins"),
        (NEEDED + "--quantization x", "drop --quantization x"),
        ("stated by the checkpoint", "add no:py:faulty to --plugins"),
    ],
)
def test_the_remedy_fits_the_reason(start, reason, remedy):
    with pytest.raises(PluginImportError, match=remedy):
        start(reason, faulty="1 / 0")


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ("", "does not state the plugin API"),
        ("core_api = 1.0\n", r"core_api is 1\.0, but must be a string"),
        ("core_api = '1'\n", "core_api is '1', but must be a string"),
        ("core_api = '1.0.0'\n", "must be a string such as"),
        ("core_api = '2.0'\n", r"written for plugin API 2\.0, but this is plugin API 1\.0"),
        ("core_api = '0.9'\n", r"written for plugin API 0\.9, but this is plugin API 1\.0"),
        ("core_api = '1.7'\n", r"needs plugin API 1\.7, but this is plugin API 1\.0; upgrade"),
    ],
)
def test_the_api_version_is_checked(start, stated, match):
    refusal(start, stated, match, header="")


def test_an_older_minor_version_is_accepted(start, monkeypatch):
    monkeypatch.setattr(hookspecs, "API_VERSION", (1, 3))
    assert start(older='core_api = "1.2"').active


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (implement("core_engine_startd", "pass"), "did you mean 'core_engine_started'"),
        (implement("core_xyzzy", "pass"), "core_xyzzy is not a hook$"),
        (
            implement("f", "pass", mark='hookimpl(specname="core_check_plam")'),
            "did you mean 'core_check_plan'",
        ),
        (implement("core_check_plan", "pass", arguments="plam"), "did you mean 'plan'"),
        (implement("core_register_models", "pass", arguments="x"), r"no argument 'x' \(it has: none"),
        (implement("core_check_plan", "pass", arguments="*plan"), r"takes \*plan"),
        (implement("core_check_plan", "pass", arguments="**plan"), r"takes \*\*plan"),
        (implement("core_check_plan", "pass", arguments="*, plan"), "by keyword only"),
        (implement("core_check_plan", "pass", arguments="plan=1"), "a default"),
        ("@hookimpl\nasync def core_check_plan(plan): pass", "is async"),
        ("@hookimpl\nasync def core_check_plan(plan): yield 1", "is async"),
        (implement("core_check_plan", "yield", mark="hookimpl(hookwrapper=True)"), "old style"),
        (implement("core_check_plan", "yield", mark="hookimpl(wrapper=True)"), "cannot be wrapped"),
        (implement("core_engine_started", "yield"), "would never run"),
        (implement("core_make_executor", "yield"), "would never run"),
        ("def core_check_plan(plan): return ['no']", "not marked with @core.hookimpl"),
        (implement("core_make_executor", "pass", mark="hookimpl(wrapper=True)"), "not a generator"),
    ],
)
def test_a_faulty_hook_is_refused(start, source, match):
    refusal(start, source, match)


def test_all_problems_of_a_plugin_are_listed(start):
    source = implement("core_xyzzy", "pass") + implement(
        "core_check_plan", "pass", arguments="*, plan=1"
    )
    message = str(refusal(start, "core_api = '9.0'\n" + source, "is not a hook"))
    assert message.count("\n  - ") == 3


def test_all_broken_plugins_are_listed_in_order(start):
    with pytest.raises(PluginRegistrationError) as raised:
        start(one="1 / 0", good="", two=implement("core_xyzzy", "pass"))
    message = str(raised.value)
    assert message.startswith("2 plugins cannot be used")
    assert 0 < message.index("py:one") < message.index("py:two")
    assert "py:good" not in message
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert [error.plugin for error in raised.value.__cause__.exceptions] == ["py:one", "py:two"]


def test_optional_hooks_of_other_versions_are_accepted(start):
    assert start(newer=implement("core_in_2_0", "pass", mark="hookimpl(optionalhook=True)")).active


def test_a_hook_may_take_fewer_arguments(start):
    host = start(brief=implement("core_worker_started", "seen.append(device)", arguments="device"))
    sys.modules["brief"].seen = seen = []
    host.worker_started(0, "cpu")
    assert seen == ["cpu"]


def test_one_module_under_two_names_is_refused(start, site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    site.module("acme_quant", HEADER)
    both = [Selected("quant.acme", NAMED), Selected("py:acme_quant", NAMED)]
    with pytest.raises(PluginRegistrationError, match="already registered"):
        PluginHost.start(both)


@pytest.mark.parametrize("name", ["acme", "quant.acme.extra", "quant.ac-me"])
def test_entry_points_are_called_kind_dot_name(site, name):
    site.distribution("acme", "1.2", {name: "acme_quant"})
    site.module("acme_quant", HEADER)
    with pytest.raises(PluginRegistrationError, match=r"must be called kind\.name"):
        PluginHost.start([Selected(name, NAMED)])


def test_an_instance_can_be_a_plugin(site):
    source = """
        from core.hookspecs import hookimpl
        class Plugin:
            core_api = "1.0"
            @hookimpl
            def core_check_plan(self, plan): return ["method"]
            @staticmethod
            @hookimpl
            def core_report_header(plan): return ["static"]
        plugin = Plugin()
    """
    site.module("acme_quant", source)
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant:plugin"})
    host = PluginHost.start([Selected("quant.acme", NAMED)])
    assert host.check_plan(PLAN) == ["quant.acme: method"]
    assert host.report_header(PLAN) == ["static"]


def test_the_set_is_closed_after_the_start(start):
    host = start(one="")
    with pytest.raises(PluginRegistrationError, match="comes too late"):
        host._manager.register(object(), "quant.late")
    with pytest.raises(PluginRegistrationError, match="comes too late"):
        host._manager.register(object())


# --- hooks that declare ----------------------------------------------------------------------------


def declares(start, hook, kind):
    """Two plugins, one of which yields, contribute to one kind; who brought what is kept."""
    entry = KINDS[kind].__name__
    make = f"from core.registry import {entry}\ndef build(plan): pass\n"
    host = start(
        one=make + implement(hook, f"return [{entry}(name='a', factory=build)]"),
        two=make + implement(hook, f"yield {entry}(name='b', factory=build)"),
        three=implement(hook, "return None"),
    )
    registry = host.collect()
    found = [(one.descriptor.name, one.plugin, one.distribution) for one in registry.all(kind)]
    assert found == [("a", "py:one", "under development"), ("b", "py:two", "under development")]
    assert all(isinstance(one.descriptor, KINDS[kind]) for one in registry.all(kind))
    assert not any(registry.all(other) for other in KINDS if other != kind)


def test_hook_core_register_quantizers(start):
    declares(start, "core_register_quantizers", "quant")


def test_hook_core_register_attention(start):
    declares(start, "core_register_attention", "attention")


def test_hook_core_register_parallel(start):
    declares(start, "core_register_parallel", "parallel")


def test_hook_core_register_schedulers(start):
    declares(start, "core_register_schedulers", "scheduler")


def test_hook_core_register_kv_caches(start):
    declares(start, "core_register_kv_caches", "kv_cache")


def test_hook_core_register_executors(start):
    declares(start, "core_register_executors", "executor")


def test_hook_core_register_launchers(start):
    declares(start, "core_register_launchers", "launcher")


def test_hook_core_register_models(start):
    declares(start, "core_register_models", "model")


def test_hook_core_register_frontends(start):
    declares(start, "core_register_frontends", "frontend")


def test_hook_core_register_servers(start):
    declares(start, "core_register_servers", "server")


def test_hook_core_register_samplers(start):
    declares(start, "core_register_samplers", "sampler")


QUANT = "from core.registry import QuantizerEntry, AttentionEntry\ndef build(plan): pass\n"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("return 5", "returned 5, but must return an iterable of QuantizerEntry"),
        ("return 'awq'", "returned 'awq', but must return an iterable of QuantizerEntry"),
        ("return QuantizerEntry(name='x', factory=build)", "must return an iterable"),
        ("return {'x': 1}", "returned 'x', but must return an iterable of QuantizerEntry"),
        ("return [AttentionEntry(name='x', factory=build)]", "returned AttentionEntry"),
        ("yield None", "returned None, but must return an iterable of QuantizerEntry"),
        ("yield QuantizerEntry(name='', factory=build)", "named '', which must be an identifier"),
        ("yield QuantizerEntry(name='a b', factory=build)", "named 'a b', which must be"),
        ("yield QuantizerEntry(name=3, factory=build)", "named 3, which must be"),
        ("yield QuantizerEntry(name='x', factory=lambda plan: 1)", "factory is .*<lambda>"),
        ("yield 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
    ],
)
def test_a_faulty_declaration_names_plugin_and_hook(start, body, match):
    host = start(DEFAULT, faulty=QUANT + implement("core_register_quantizers", body))
    with pytest.raises(PluginCallError, match=match) as raised:
        host.collect()
    message = str(raised.value)
    assert message.startswith("plugin py:faulty (under development): core_register_quantizers ")
    assert message.endswith("to disable it, add no:py:faulty to --plugins")
    assert raised.value.plugin == "py:faulty"


def test_an_exception_is_the_cause(start):
    host = start(faulty=implement("core_register_quantizers", "1 / 0"))
    with pytest.raises(PluginCallError) as raised:
        host.collect()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_one_descriptor_name_twice_is_a_conflict(site):
    hook = implement("core_register_quantizers", "yield QuantizerEntry(name='x', factory=build)")
    for name, version in (("acme", "1.2"), ("umbrella", "3.4")):
        site.distribution(name, version, {f"quant.{name}": name})
        site.module(name, HEADER + QUANT + hook)
    host = PluginHost.start([Selected("quant.acme", NAMED), Selected("quant.umbrella", NAMED)])
    with pytest.raises(PluginConflictError, match=r"quant 'x'.*acme 1\.2.*umbrella 3\.4"):
        host.collect()


SETTINGS = "from dataclasses import dataclass, field\n"


def test_hook_core_register_settings(start):
    source = SETTINGS + "@dataclass(frozen=True)\nclass Settings:\n    size: int = 1\n"
    source += "    names: list = field(default_factory=list)\n"
    host = start(
        one=source + implement("core_register_settings", "return Settings"),
        two=implement("core_register_settings", "return None"),
    )
    assert host.register_settings() == {"py:one": sys.modules["one"].Settings}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("return 5", "returned 5, but must return a dataclass type"),
        ("return int", "but must return a dataclass type"),
        ("return dataclass(frozen=True)(type('S', (), {}))()", "but must return a dataclass type"),
        ("return dataclass(type('S', (), {}))", "returned S, which must be frozen"),
        (
            "return dataclass(frozen=True)(type('S', (), {'__annotations__': {'a': int, 'b': int}}))",
            r"returned S, whose fields \['a', 'b'\] have no default",
        ),
        ("1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_faulty_settings_name_the_plugin(start, body, match):
    host = start(faulty=SETTINGS + implement("core_register_settings", body))
    with pytest.raises(PluginCallError, match=match):
        host.register_settings()


def test_settings_are_declared_once(start):
    source = SETTINGS + "@dataclass(frozen=True)\nclass Settings: pass\n"
    source += implement("core_register_settings", "return Settings")
    source += implement("again", "return Settings", mark='hookimpl(specname="core_register_settings")')
    with pytest.raises(PluginCallError, match="implemented twice"):
        start(faulty=source).register_settings()


def test_hook_core_register_commands(start):
    body = "subcommands('greet', greet)\ndef greet(name: str): pass"
    host = start(one=implement("core_register_commands", body, arguments="subcommands"))
    commands = {}
    host.register_commands(commands.__setitem__)
    assert commands == {"greet": sys.modules["one"].greet}


# --- hooks that decide -----------------------------------------------------------------------------


def candidates(*names):
    return [Registered(KINDS["attention"](name=n, factory=print), "core", "cythera 1") for n in names]


def chooser(body):
    return implement("core_select_backend", body, arguments="kind, candidates, requirements")


def test_hook_core_select_backend(start):
    host = start(
        declines=chooser("return None"),
        last=chooser("return candidates[-1].descriptor.name if kind == 'attention' else None"),
        first=chooser("return candidates[0].descriptor.name if requirements.dtype else None"),
    )
    assert host.select_backend("attention", candidates("a", "b"), REQUIREMENTS) == "b"
    assert host.select_backend("quant", candidates("a", "b"), REQUIREMENTS) == "a"


def test_nobody_has_to_choose(start):
    host = start(declines=chooser("return None"))
    assert host.select_backend("attention", candidates("a"), REQUIREMENTS) is None


@pytest.mark.parametrize("answer", ["'c'", "''", "0", "False", "[]", "candidates[0]"])
def test_only_a_candidate_can_be_chosen(start, answer):
    host = start(faulty=chooser(f"return {answer}"), never=chooser("1 / 0"))
    with pytest.raises(PluginCallError, match=r"py:faulty.* must return one of a, b, or None"):
        host.select_backend("attention", candidates("a", "b"), REQUIREMENTS)


def test_hook_core_check_plan(start):
    host = start(
        one=implement("core_check_plan", "return ['too big', 'too slow']", arguments="plan"),
        two=implement("core_check_plan", "return None"),
        three=implement("core_check_plan", "yield 'too odd'"),
    )
    assert host.check_plan(PLAN) == ["py:one: too big", "py:one: too slow", "py:three: too odd"]


def test_a_single_objection_is_no_list(start):
    host = start(faulty=implement("core_check_plan", "return 'too big'"))
    with pytest.raises(PluginCallError, match="returned 'too big', but must return an iterable of str"):
        host.check_plan(PLAN)


def test_hook_core_report_header(start):
    host = start(
        one=implement("core_report_header", "return ('a', 'b')", arguments="plan"),
        two=implement("core_report_header", "return []"),
    )
    assert host.report_header(PLAN) == ["a", "b"]


# --- hooks that build ------------------------------------------------------------------------------


def builds(start, hook, protocol, call):
    """Default, replacement and wrapper of one part; `call(host, default)` asks for it."""
    default, other = fulfil(protocol), fulfil(protocol)
    wrapper = "seen.append((yield))\n    return seen[-1]"
    host = start(
        wraps="seen = []\n" + implement(hook, wrapper, mark="hookimpl(wrapper=True)"),
        declines=implement(hook, "return None"),
        late=implement(hook, "return other", mark="hookimpl(trylast=True)") + "other = None\n",
    )
    assert call(host, lambda: default) is default
    assert sys.modules["wraps"].seen == [default]
    sys.modules["late"].other = other
    assert call(host, lambda: pytest.fail("not asked for")) is other
    sys.modules["late"].other = False
    with pytest.raises(PluginCallError, match=f"{hook} returned False, but must return .*attribute"):
        call(host, lambda: default)
    with pytest.raises(CapacityError, match="as it is"):
        call(start(none=""), lambda: _raise(CapacityError("as it is")))


def _raise(error):
    raise error


def test_hook_core_make_executor(start):
    def call(host, default):
        return host.make_executor(PLAN, 0, default)

    builds(start, "core_make_executor", interfaces.Executor, call)


def test_hook_core_make_kv_cache(start):
    def call(host, default):
        return host.make_kv_cache(PLAN, 7, default)

    builds(start, "core_make_kv_cache", interfaces.KVCache, call)


def test_hook_core_make_scheduler(start):
    def call(host, default):
        return host.make_scheduler(PLAN, fulfil(interfaces.KVCache), default)

    builds(start, "core_make_scheduler", interfaces.Scheduler, call)


def test_a_part_gets_what_it_is_built_from(start):
    source = implement("core_make_executor", "seen.append((plan, rank))", arguments="rank, plan")
    host = start(one="seen = []\n" + source)
    host.make_executor(PLAN, 3, lambda: fulfil(interfaces.Executor))
    assert sys.modules["one"].seen == [(PLAN, 3)]


EXECUTOR_WRAPPER = implement("core_make_executor", "{}", mark="hookimpl(wrapper=True)")


def make_executor(host, default=None):
    return host.make_executor(PLAN, 0, default or (lambda: fulfil(interfaces.Executor)))


@pytest.mark.parametrize(
    ("sources", "culprit"),
    [
        (
            {
                "wraps": EXECUTOR_WRAPPER.format("return (yield)"),
                "declines": implement("core_make_executor", "return None"),
                "guilty": implement("core_make_executor", "1 / 0"),
            },
            "plugin py:guilty (under development): core_make_executor raised ZeroDivisionError",
        ),
        (
            {
                "guilty": EXECUTOR_WRAPPER.format("1 / 0\n    yield"),
                "wraps": EXECUTOR_WRAPPER.format("return (yield)"),
            },
            "plugin py:guilty (under development): core_make_executor raised ZeroDivisionError",
        ),
        (
            {
                "wraps": EXECUTOR_WRAPPER.format("return (yield)"),
                "guilty": EXECUTOR_WRAPPER.format("yield\n    1 / 0"),
            },
            "plugin py:guilty (under development): core_make_executor raised ZeroDivisionError",
        ),
        (
            {
                "guilty": "def deep(): 1 / 0\n" + implement("core_make_executor", "deep()"),
                "innocent": implement("core_make_executor", "return None"),
            },
            "plugin py:guilty (under development): core_make_executor raised ZeroDivisionError",
        ),
        (
            {
                "one": EXECUTOR_WRAPPER.format("yield\n    yield"),
                "two": implement("core_make_executor", "return None"),
            },
            "plugin py:one (under development) (or it was py:two (under development))",
        ),
    ],
)
def test_the_plugin_that_raised_is_named(start, sources, culprit):
    with pytest.raises(PluginCallError) as raised:
        make_executor(start(**sources))
    assert culprit in str(raised.value)
    assert raised.value.__cause__ is not None


def test_a_decorated_hook_is_named_too(start):
    source = "import functools\ndef passing(f):\n    return functools.wraps(f)(lambda: f())\n"
    source += implement("core_make_executor", "1 / 0", mark="hookimpl\n@passing")
    innocent = implement("core_make_executor", "return None")
    with pytest.raises(PluginCallError, match=r"^plugin py:guilty \(under development\): core_make"):
        make_executor(start(innocent=innocent, guilty=source))


def test_what_the_default_raises_passes_through_wrappers(start):
    host = start(wraps=EXECUTOR_WRAPPER.format("return (yield)"))
    with pytest.raises(CapacityError, match="no room"):
        make_executor(host, lambda: _raise(CapacityError("no room")))


def test_the_default_is_not_kept_for_the_next_call(start):
    host = start(none="")
    make_executor(host)
    assert host._fallback.build is None


def test_the_default_is_not_judged_here(start):
    part = object()  # assembly checks what the plan names, and says which part it is
    assert make_executor(start(none=""), lambda: part) is part


def test_a_wrapper_that_forgets_to_return_is_named(start):
    host = start(forgetful=EXECUTOR_WRAPPER.format("yield"))
    with pytest.raises(PluginCallError, match=r"py:forgetful.*returned None.*fulfils Executor"):
        make_executor(host)


# --- hooks while it lives --------------------------------------------------------------------------


def test_hook_core_subscribe(start):
    source = "from core.events import Subscription\ndef handle(batch): pass\n"
    body = "return [Subscription('watch', handle)]"
    host = start(one=source + implement("core_subscribe", body, arguments="plan"))
    assert [found.name for found in host.subscribe(PLAN)] == ["watch"]


def test_a_handler_is_no_subscription(start):
    host = start(faulty=implement("core_subscribe", "return [print]"))
    with pytest.raises(PluginCallError, match="iterable of Subscription"):
        host.subscribe(PLAN)


def recorder(hook, arguments):
    return "seen = []\n" + implement(hook, f"seen.append(({arguments}))", arguments=arguments)


def test_hook_core_worker_started(start):
    host = start(one=recorder("core_worker_started", "rank, device"))
    host.worker_started(1, "cuda:1")
    assert sys.modules["one"].seen == [(1, "cuda:1")]


def test_hook_core_engine_started(start):
    host = start(one=recorder("core_engine_started", "engine"))
    host.engine_started("engine")
    assert sys.modules["one"].seen == ["engine"]


def test_a_notification_returns_nothing(start):
    host = start(faulty=implement("core_engine_started", "return 5"))
    with pytest.raises(PluginCallError, match=r"py:faulty.*core_engine_started returned 5"):
        host.engine_started("engine")


def test_a_failing_notification_aborts_the_start(start):
    host = start(faulty=implement("core_engine_started", "1 / 0"))
    with pytest.raises(PluginCallError, match=r"py:faulty.*core_engine_started raised"):
        host.engine_started("engine")


def test_hook_core_engine_stopping(start):
    hook = "core_engine_stopping"
    host = start(
        one=implement(hook, "1 / 0"),
        two=recorder(hook, "engine, reason"),
        three=implement(hook, "raise SystemExit"),
        four=recorder(hook, "reason, engine"),
    )
    with capture_logs() as logs:
        host.engine_stopping("engine", "shutdown")
    assert sys.modules["two"].seen == [("engine", "shutdown")]
    assert sys.modules["four"].seen == [("shutdown", "engine")]
    assert [(entry["plugin"], entry["hook"]) for entry in logs] == [
        ("py:one", hook),
        ("py:three", hook),
    ]


# --- reports ---------------------------------------------------------------------------------------


def test_plugins_are_listed_without_importing(site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    listed = {entry.name: entry for entry in list_plugins()}
    assert listed["quant.acme"].version == "1.2"
    assert not listed["quant.acme"].is_present


def test_a_healthy_plugin_is_shown(site):
    site.distribution("acme", "1.2", {"quant.acme": "acme_quant"})
    source = '"""Quantizes."""\n' + HEADER + QUANT
    source += implement("core_register_quantizers", "yield QuantizerEntry(name='x', factory=build)")
    source += implement("head", "yield 'x'", mark='hookimpl(specname="core_report_header")')
    site.module("acme_quant", source)
    report = show_plugin("quant.acme")
    assert report.entry == PluginEntry("quant.acme", "acme_quant", "acme", "1.2")
    assert (report.core_api, report.doc, report.problems) == ("1.0", "Quantizes.", [])
    assert sorted(report.hooks) == ["core_register_quantizers", "core_report_header"]
    assert [(kind, found.name) for kind, found in report.descriptors] == [("quant", "x")]
    assert check_plugin("quant.acme") == []


def test_every_problem_of_a_plugin_is_reported(site):
    source = HEADER + implement("core_register_quantizers", "1 / 0")
    source += implement("core_register_attention", "return 5")
    source += implement("core_register_settings", "return 5")
    source += implement("core_register_commands", "return 5")
    site.module("faulty", source)
    problems = check_plugin("py:faulty")
    assert len(problems) == 4
    assert all("py:faulty" in problem for problem in problems)


def test_a_plugin_that_cannot_register_is_shown_with_reasons(site):
    source = "from core.hookspecs import hookimpl\n" + implement("core_xyzzy", "pass")
    site.module("faulty", source)
    report = show_plugin("py:faulty")
    assert (report.core_api, report.hooks, report.descriptors) == ("", ["core_xyzzy"], [])
    assert len(report.problems) == 2


def test_a_plugin_that_pluggy_refuses_is_shown_too(site):
    source = HEADER + implement("core_make_executor", "pass", mark="hookimpl(wrapper=True)")
    site.module("faulty", source)
    assert len(check_plugin("py:faulty")) == 1


def test_a_plugin_that_cannot_be_imported_is_shown_with_the_cause(site):
    site.module("faulty", "import no_such_dependency")
    report = show_plugin("py:faulty")
    assert len(report.problems) == 1
    assert "no_such_dependency" in report.problems[0]


def test_an_unknown_plugin_cannot_be_shown():
    with pytest.raises(PluginNotFoundError, match=r"did you mean 'attention\.torch'"):
        show_plugin("attention.torhc")


def test_entries_and_selections_are_plain_data():
    for value in (PluginEntry("a.b", "c"), Selected("a.b", NAMED), PluginSelection()):
        assert dataclasses.replace(value) == value
        assert hash(value) == hash(dataclasses.replace(value))
