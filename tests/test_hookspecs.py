"""Hooks cannot rot: each is documented, called by the host, tested, and called from nowhere else."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import core
from core import hookspecs, interfaces
from core.pluginhost import BUILD_HOOKS, DESCRIPTOR_HOOKS, LIST_HOOKS, PluginHost, Selected
from core.registry import KINDS, Requirements
from core.testing.plugin import PluginSite

LIFECYCLE = [
    "core_register_settings",
    "core_register_quantizers",
    "core_register_attention",
    "core_register_parallel",
    "core_register_schedulers",
    "core_register_kv_caches",
    "core_register_executors",
    "core_register_launchers",
    "core_register_models",
    "core_register_frontends",
    "core_register_servers",
    "core_register_samplers",
    "core_register_commands",
    "core_select_backend",
    "core_check_plan",
    "core_report_header",
    "core_make_executor",
    "core_make_kv_cache",
    "core_make_scheduler",
    "core_subscribe",
    "core_worker_started",
    "core_engine_started",
    "core_engine_stopping",
]
CORE = Path(core.__file__).parent
SPECS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, "cythera_spec")}
PLAN = object()


def returns(name):
    return SPECS[name].__annotations__["return"]


def test_hooks_stand_in_lifecycle_order():
    assert list(SPECS) == LIFECYCLE


@pytest.mark.parametrize("name", SPECS)
def test_hook_is_documented(name):
    doc = inspect.getdoc(SPECS[name])
    paragraphs = doc.split("\n\n")
    assert re.match(r"[A-Z][^.]*\.", paragraphs[0]), "starts with a sentence on what it is for"
    assert any(text.startswith("Called ") for text in paragraphs[1:]), "says when and where"
    assert re.search(r"\bprocess\b", doc), "says in which process"
    for argument in inspect.signature(SPECS[name]).parameters:
        assert f"\n:param {argument}: " in doc, f"explains {argument}"
    assert ("\n:return: " in doc) == (returns(name) != "None"), "says what it returns"
    assert "\n:raises " in doc, "says what an exception does"
    assert re.fullmatch(r"Since API \d+\.\d+\.", paragraphs[-1]), "says since when it exists"
    if SPECS[name].cythera_spec["firstresult"]:
        assert "Stops at the first" in " ".join(doc.split()), "says that one result is enough"
        assert returns(name).endswith("| None"), "can be declined"


@pytest.mark.parametrize("name", SPECS)
def test_hook_has_arguments_that_a_plugin_can_take(name):
    for parameter in inspect.signature(SPECS[name]).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is parameter.empty
        assert name.startswith("core_")


def test_every_hook_has_a_test():
    tests = ast.parse(Path(__file__).with_name("test_pluginhost.py").read_text(encoding="utf-8"))
    names = {node.name for node in tests.body if isinstance(node, ast.FunctionDef)}
    assert not {f"test_hook_{name}" for name in SPECS} - names


def test_the_host_knows_the_shape_of_every_hook():
    assert {name for name in SPECS if returns(name).startswith("Iterable[")} == LIST_HOOKS
    assert list(BUILD_HOOKS) == [name for name in SPECS if name.startswith("core_make_")]
    assert list(DESCRIPTOR_HOOKS.values()) == [
        kind
        for name in SPECS
        for kind, entry in KINDS.items()
        if returns(name) == f"Iterable[{entry.__name__}]"
    ]
    assert set(DESCRIPTOR_HOOKS.values()) == set(KINDS), "every kind can be contributed"


def test_the_host_calls_every_hook_with_all_its_arguments(tmp_path):
    source = 'from core.hookspecs import hookimpl\ncore_api = "1.0"\ncalled = []\n'
    for name, spec in SPECS.items():
        arguments = ", ".join(inspect.signature(spec).parameters)
        source += f"@hookimpl\ndef {name}({arguments}): called.append('{name}')\n"
    with PluginSite(tmp_path / "site") as site:
        site.module("recorder", source)
        host = PluginHost.start([Selected("py:recorder", "under test")], {})
        host.register_settings()
        host.collect()
        host.register_commands(lambda name, function: None)
        host.select_backend("attention", [], Requirements(device="cpu", dtype="float32"))
        host.check_plan(PLAN)
        host.report_header(PLAN)
        host.make_executor(PLAN, 0, fake(interfaces.Executor))
        host.make_kv_cache(PLAN, 1, fake(interfaces.KVCache))
        host.make_scheduler(PLAN, PLAN, fake(interfaces.Scheduler))
        host.subscribe(PLAN)
        host.worker_started(0, "cpu")
        host.engine_started(PLAN)
        host.engine_stopping(PLAN, "shutdown")
        assert host.active[0].plugin.called == LIFECYCLE


def fake(protocol):
    return type("Fake", (protocol,), dict.fromkeys(protocol.__annotations__, 0))


def test_no_hook_is_called_outside_of_the_host():
    callers = set()
    for path in [*CORE.rglob("*.py"), *CORE.with_name("plugins").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if "hook" in attributes:
            callers.add(path.relative_to(CORE).as_posix())
    assert callers == {"pluginhost.py"}
