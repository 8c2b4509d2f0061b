"""Conformance of a plugin as a whole, and a folder of fake distributions to test hosts with.

Subclass `PluginConformance` in a test module of your plugin:

    class TestMyPlugin(PluginConformance):
        module = "acme.attention"

It needs no installation, no device and no weights.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest

from core import hookspecs
from core.pluginhost import GROUP, MODULE, PluginHost, Selected, show_plugin
from core.registry import KINDS, Descriptor, Requirements

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REQUIREMENTS = (
    Requirements(device="cpu", dtype="float32"),
    Requirements(device="cuda", dtype="bfloat16", head_dims=frozenset({64, 256}), has_window=True),
    Requirements(
        device="tpu",
        dtype="float64",
        head_dims=frozenset({7}),
        num_heads=3,
        num_kv_heads=1,
        has_softcap=True,
        block_size=5,
        quantization="no such method",
        quantization_config={"quant_method": "no such method", "bits": 11},
        model_type="no such model",
        tensor_parallel_size=3,
        pipeline_parallel_size=5,
    ),
)
"""What `unsupported` of every descriptor must have an answer to: easy, usual, absurd."""

_IMPORT_AND_WATCH = """
import importlib, json, os, sys, threading
module, preload = sys.argv[1], sys.argv[2:]
for name in preload:
    importlib.import_module(name)
writes = []
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
def watch(event, arguments):
    if event == "open" and arguments[2] & WRITING and arguments[0] != os.devnull:
        writes.append(str(arguments[0]))
sys.addaudithook(watch)
environment, threads = dict(os.environ), threading.active_count()
importlib.import_module(module)
torch = sys.modules.get("torch")
changed = {key for key, _ in environment.items() ^ os.environ.items()}
print(json.dumps({
    "writes": writes,
    "environment": sorted(changed),
    "threads": threading.active_count() - threads,
    "cuda": bool(torch and torch.cuda.is_initialized()),
    "modules": sorted(sys.modules),
}))
"""


def watch_import(module: str, preload: tuple[str, ...] = ()) -> dict[str, Any]:
    """Import a module in a fresh interpreter and report what that did besides.

    :param preload: imported before watching.
    :return: `writes`, `environment` (both lists of names), `threads` (how many more), `cuda`
        (whether it is initialised) and `modules` (all that are loaded).
    """
    child = subprocess.run(  # noqa: S603  our own interpreter, our own code
        [sys.executable, "-B", "-c", _IMPORT_AND_WATCH, module, *preload],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.returncode == 0, f"importing {module} alone fails:\n{child.stderr}"
    footprint: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return footprint


_watch_once = functools.cache(watch_import)


class PluginConformance:
    """What every plugin must do, whatever it contributes.

    Each test says in its failure what a user would suffer from.
    """

    module: ClassVar[str]
    """Import path of the plugin's module, `package.module`."""
    preload: ClassVar[tuple[str, ...]] = ("torch",)
    """Modules to import before watching, so that what their import does is not held against the
    plugin."""

    def host(self) -> PluginHost:
        """Start a host with this plugin alone."""
        return PluginHost.start([Selected(MODULE + self.module, "under test")], {})

    def descriptors(self) -> list[Descriptor]:
        """Collect all that the plugin contributes."""
        return [descriptor for _, descriptor in show_plugin(MODULE + self.module).descriptors]

    @pytest.fixture
    def footprint(self) -> dict[str, Any]:
        """Import the module in a fresh interpreter and watch; once for all tests."""
        return _watch_once(self.module, self.preload)

    def test_import_touches_nothing(self, footprint: dict[str, Any]) -> None:
        """Every process imports the plugin again, so an import must have no effect of its own."""
        assert not footprint["cuda"], "importing the plugin initialises CUDA, in every process"
        assert not footprint["writes"], f"importing the plugin writes {footprint['writes']}"
        assert not footprint["environment"], (
            f"importing the plugin changes the environment: {footprint['environment']}"
        )
        assert not footprint["threads"], "importing the plugin starts threads"

    def test_import_leaves_other_plugins_alone(self, footprint: dict[str, Any]) -> None:
        """Plugins know the core and never one another: either may be absent or blocked."""
        own = f"{self.module}."
        foreign = [
            name
            for name in footprint["modules"]
            if name.startswith("plugins.")
            and not (f"{name}.".startswith(own) or own.startswith(f"{name}."))
        ]
        assert not foreign, f"importing {self.module} imports other plugins: {foreign}"

    def test_registers_alone(self) -> None:
        """Registration checks the API version and every hook; its error says what is wrong."""
        assert self.host().active

    def test_states_the_api_it_was_written_for(self) -> None:
        """Without the version nobody can tell whether the plugin still fits."""
        stated = getattr(importlib.import_module(self.module), "core_api", None)
        assert isinstance(stated, str), 'core_api = "major.minor" is missing'

    def test_implements_known_hooks(self) -> None:
        """A plugin without a hook does nothing; one with an unknown hook waits forever."""
        hooks = show_plugin(MODULE + self.module).hooks
        assert hooks, f"{self.module} implements no hook"
        known = [name for name in vars(hookspecs) if name.startswith("core_")]
        implemented = set(hooks) & set(known)
        assert implemented, f"none of {hooks} is a hook of plugin API {hookspecs.API_VERSION}"

    def test_declares_without_problems(self) -> None:
        """What `plugins check` reports: every hook that declares something, called alone."""
        problems = show_plugin(MODULE + self.module).problems
        assert not problems, "\n".join(problems)

    def test_declarations_are_pure(self) -> None:
        """Each process declares anew and has to arrive at the same descriptors and settings."""
        host = self.host()
        first, second = host.collect(), host.collect()
        for kind in KINDS:
            assert first.all(kind) == second.all(kind), f"{kind}: two calls give two answers"
        assert host.register_settings() == host.register_settings(), "settings: a new type per call"

    def test_factories_can_be_imported(self) -> None:
        """Ranks find a factory by module and name, so it has to be there under its own name."""
        for descriptor in self.descriptors():
            for item in dataclasses.fields(descriptor):
                value = getattr(descriptor, item.name)
                if inspect.isroutine(value) or inspect.isclass(value):
                    found = _resolve(value.__module__, value.__qualname__)
                    assert found == value, f"{descriptor.name}.{item.name}: {value} is not importable"

    def test_descriptors_answer_every_requirement(self) -> None:
        """`unsupported` returns all reasons as sentences and never raises, whatever is asked."""
        for descriptor in self.descriptors():
            for requirements in REQUIREMENTS:
                reasons = descriptor.unsupported(requirements)
                assert isinstance(reasons, list), f"{descriptor.name}: {reasons!r} is no list"
                assert all(isinstance(reason, str) and reason.strip() for reason in reasons), reasons

    def test_settings_work_without_being_set(self) -> None:
        """A user who configures nothing gets the defaults."""
        for settings in self.host().register_settings().values():
            assert settings() == settings()

    def test_is_documented(self) -> None:
        """`plugins show` prints the module's docstring and one line for each descriptor."""
        doc = importlib.import_module(self.module).__doc__
        assert doc, f"{self.module} has no docstring"
        assert doc.strip(), f"{self.module} has an empty docstring"
        nameless = [descriptor.name for descriptor in self.descriptors() if not descriptor.summary]
        assert not nameless, f"descriptors without a summary: {nameless}"


def _resolve(module: str, qualname: str) -> object:
    found: object = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


class PluginSite:
    """A folder on `sys.path` that holds fake distributions; use it as a context manager.

    Discovery reads it as it reads any other: nothing is patched.  On leaving, the modules that were
    imported from it are forgotten.

    :param path: an empty folder of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(self.path))
        importlib.invalidate_caches()
        return self

    def __exit__(self, *_exception: object) -> None:
        sys.path.remove(str(self.path))
        ours = [
            name
            for name, module in sys.modules.items()
            if str(getattr(module, "__file__", None) or "").startswith(str(self.path))
        ]
        for name in ours:
            del sys.modules[name]
        importlib.invalidate_caches()

    def module(self, name: str, source: str) -> str:
        """Write a module; return its name."""
        target = self.path.joinpath(*name.split(".")).with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(inspect.cleandoc(source) + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        return name

    def distribution(
        self,
        name: str,
        version: str,
        plugins: Mapping[str, str],
        *,
        suffix: str = ".dist-info",
        group: str = GROUP,
    ) -> Path:
        """Write the metadata of a distribution.

        :param plugins: entry points: name to module.
        :param suffix: `.egg-info` makes what an old `setup.py develop` leaves behind.
        :return: the metadata folder.
        """
        folder = self.path / f"{name}-{version}{suffix}"
        folder.mkdir(parents=True)
        metadata = "PKG-INFO" if suffix == ".egg-info" else "METADATA"
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / metadata).write_text(header, encoding="utf-8")
        lines = [f"[{group}]", *(f"{key} = {value}" for key, value in plugins.items())]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        return folder
