"""The plugin host: discovers, selects, registers and calls plugins, and says whose fault it was.

Nothing is active merely because it is installed.  `discover` reads metadata only; `PluginSelection`
decides by name; `PluginHost.start` imports what was selected, registers it all or not at all, and
closes the set.  After that every hook call goes through a typed method of the host, which pairs
each result and each exception with the plugin that it came from.  This is the only file that calls
hooks.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import itertools
import re
import reprlib
import sys
import traceback
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import pluggy
import structlog

from core import hookspecs
from core.errors import (
    ConfigError,
    PluginCallError,
    PluginConflictError,
    PluginError,
    PluginImportError,
    PluginNotFoundError,
    PluginRegistrationError,
)
from core.events import Subscription
from core.interfaces import Executor, KVCache, Scheduler, missing_members
from core.registry import KINDS, Descriptor, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from core.plan import Plan
    from core.registry import Registered, Requirements

T = TypeVar("T")
log = structlog.get_logger(__name__)

GROUP: Final = "cythera.plugins"
NAMED: Final = "named by --plugins"
NEEDED: Final = "needed by "
DEFAULT: Final = "default"
ENTRY_POINT: Final = "entry point"
MODULE: Final = "py:"
BLOCK: Final = "no:"

DESCRIPTOR_HOOKS: Final = {
    "core_register_quantizers": "quant",
    "core_register_attention": "attention",
    "core_register_parallel": "parallel",
    "core_register_schedulers": "scheduler",
    "core_register_kv_caches": "kv_cache",
    "core_register_executors": "executor",
    "core_register_launchers": "launcher",
    "core_register_models": "model",
    "core_register_frontends": "frontend",
    "core_register_servers": "server",
    "core_register_samplers": "sampler",
}
"""The kind of descriptors that each hook contributes."""
LIST_HOOKS: Final = {*DESCRIPTOR_HOOKS, "core_check_plan", "core_report_header", "core_subscribe"}
"""Hooks that return an iterable, and may therefore be generators."""
BUILD_HOOKS: Final = ("core_make_executor", "core_make_kv_cache", "core_make_scheduler")
"""The only hooks that can be wrapped."""

_MARK: Final = f"{hookspecs.PROJECT_NAME}_impl"
_FAULTS: Final = (Exception, SystemExit)  # what a plugin can do wrong; Ctrl-C is the user's


# --- discovery -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """A plugin that could be selected: metadata only, nothing of it has been imported."""

    name: str
    """`kind.name`, or `py:package.module`."""
    module: str
    distribution: str = ""
    version: str = ""
    source: str = ENTRY_POINT
    """`entry point`, or `py:` for a module under development."""

    def __str__(self) -> str:
        return f"{self.name} ({self.owner})"

    @property
    def kind(self) -> str:
        """The part before the dot; empty for a module under development."""
        return _kind_of(self.name)

    @property
    def owner(self) -> str:
        """Distribution and version, such as `cythera 0.1.0`."""
        return f"{self.distribution} {self.version}" if self.distribution else "under development"

    @property
    def is_present(self) -> bool:
        """Whether the module exists, as far as can be told without importing anything."""
        path: Sequence[str] | None = None
        for name in itertools.accumulate(self.module.partition(":")[0].split("."), "{}.{}".format):
            finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
            specs = (find(name, path, None) for find in finders if find)
            spec = next((spec for spec in specs if spec), None)
            if spec is None:
                return False
            path = spec.submodule_search_locations or []
        return True


def discover() -> dict[str, PluginEntry]:
    """Read which plugins are installed, by name, without importing any of them.

    All distributions on `sys.path` are read, not only the first of each name, so that a stale
    `.egg-info` folder cannot silently hide or replace a plugin.

    :raises PluginConflictError: a name is offered twice; names every such pair of distributions.
    """
    entries: dict[str, PluginEntry] = {}
    conflicts: dict[str, str] = {}
    for entry in _installed():
        known = entries.setdefault(entry.name, entry)
        if _identity(known) != _identity(entry):
            conflicts[entry.name] = (
                f"plugin {entry.name!r} is offered by both {known.owner} (module {known.module}) and "
                f"{entry.owner} (module {entry.module}); uninstall one, or delete its stale metadata"
            )
    if conflicts:
        raise PluginConflictError("\n".join(conflicts.values()), plugin=next(iter(conflicts)))
    return dict(sorted(entries.items()))


def _installed() -> Iterator[PluginEntry]:
    for distribution in importlib.metadata.distributions():
        # Most distributions have nothing for us; what they wrote there must not be able to stop us.
        if GROUP not in (distribution.read_text("entry_points.txt") or ""):
            continue
        for point in distribution.entry_points.select(group=GROUP):
            yield PluginEntry(point.name, point.value, distribution.name, distribution.version)


def _identity(entry: PluginEntry) -> tuple[str, str]:
    return entry.module, re.sub(r"[-_.]+", "-", entry.distribution).lower()


def _kind_of(name: str) -> str:
    return "" if _is_module(name) else name.partition(".")[0]


def _is_module(name: str) -> bool:
    return name.startswith(MODULE)


def _find(name: str, entries: Mapping[str, PluginEntry]) -> PluginEntry:
    if _is_module(name):
        return PluginEntry(name, name.removeprefix(MODULE), source=MODULE)
    if name in entries:
        return entries[name]
    raise _unknown({name: "asked for"}, entries)


def _unknown(reasons: Mapping[str, str], entries: Mapping[str, PluginEntry]) -> PluginNotFoundError:
    known = ", ".join(entries) or "none"
    lines = [
        f"no installed distribution offers plugin {name!r} ({reason}){_did_you_mean(name, entries)}"
        for name, reason in reasons.items()
    ]
    return PluginNotFoundError(f"{_listing(lines)}; known: {known}", plugin=next(iter(reasons)))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    same_tail = [other for other in known if other.partition(".")[2] == name]  # `awq` for `quant.awq`
    near = same_tail or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_core_location() -> None:
    """Check that this `core` is the one that is installed: a folder of that name can shadow it.

    An editable installation records no `core` of its own and passes, as does a bare source tree.

    :raises ConfigError: the installed distribution has its `core` elsewhere; names both folders.
    """
    running = Path(__file__).resolve().parent
    try:
        distribution = importlib.metadata.distribution(hookspecs.PROJECT_NAME)
    except importlib.metadata.PackageNotFoundError:
        return
    if all(file.as_posix() != "core/__init__.py" for file in distribution.files or ()):
        return
    installed = Path(str(distribution.locate_file("core"))).resolve()
    if installed != running:
        raise ConfigError(
            f"this is {running}, but {hookspecs.PROJECT_NAME} {distribution.version} is installed in "
            f"{installed}; start from another folder, or uninstall the one that you do not mean"
        )


# --- selection -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selected:
    """A plugin that will be active, and who wanted it: plain data, for plans and other processes."""

    name: str
    reason: str
    """`NAMED`, `DEFAULT`, `NEEDED` plus a flag, or any phrase that tells the user why."""


@dataclass(frozen=True, slots=True)
class PluginSelection:
    """What the user says about plugins: names to activate, in order, and names to leave out."""

    names: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @classmethod
    def parse(cls, items: str | Iterable[str]) -> PluginSelection:
        """Read the items of `--plugins`: `kind.name`, `py:package.module` or `no:kind.name`.

        :param items: one string or several, each of which may hold several items between commas.
        :raises ConfigError: a `py:` item is malformed.
        """
        text = items if isinstance(items, str) else ",".join(items)
        words = [word for word in map(str.strip, text.split(",")) if word]
        names = [word for word in words if not word.startswith(BLOCK)]
        for name in names:
            module = name.removeprefix(MODULE)
            if _is_module(name) and not all(part.isidentifier() for part in module.split(".")):
                raise ConfigError(f"--plugins: {name!r} must have the form {MODULE}package.module")
        blocked = (word.removeprefix(BLOCK) for word in words if word.startswith(BLOCK))
        return cls(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(blocked)))

    def resolve(
        self,
        entries: Mapping[str, PluginEntry],
        *,
        defaults: Sequence[str] = (),
        needed: Mapping[str, str] | None = None,
    ) -> tuple[Selected, ...]:
        """Decide which plugins will be active, in the order in which their hooks are called.

        A kind that the user names is exactly what he says; any other takes its defaults.  A `py:`
        item names no kind.  What other settings need is added to either, unless no distribution offers
        it and a `py:` item may: whether that one does shows when parts are chosen.

        :param entries: as `discover` returns them.
        :param defaults: names that are active unless the user names their kind or blocks them.
        :param needed: name of a plugin to the setting that needs it: `--tensor-parallel-size 2`.
        :raises PluginNotFoundError: names are unknown, blocked ones included; lists them all.
        :raises ConfigError: a name is blocked that is also named, or that a setting needs.
        """
        reasons = dict.fromkeys(self.names, NAMED)
        for name, setting in (needed or {}).items():
            if name in entries or not any(map(_is_module, self.names)):
                reasons.setdefault(name, NEEDED + setting)
        for name in self.blocked:
            if name in reasons:
                raise ConfigError(
                    f"plugin {name} is {reasons[name]}, but no:{name} blocks it; drop one"
                )
        kinds = {_kind_of(name) for name in self.names}
        for name in defaults:
            if _kind_of(name) not in kinds:
                reasons.setdefault(name, DEFAULT)
        unknown = {n: why for n, why in reasons.items() if n not in entries and not _is_module(n)}
        unknown |= {name: f"blocked by no:{name}" for name in self.blocked if name not in entries}
        if unknown:
            raise _unknown(unknown, entries)
        return tuple(Selected(*item) for item in reasons.items() if item[0] not in self.blocked)


# --- registration ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActivePlugin:
    """A registered plugin: where it comes from, who wanted it, and the module itself."""

    entry: PluginEntry
    reason: str
    plugin: object

    def __str__(self) -> str:
        return str(self.entry)

    @property
    def name(self) -> str:
        """The name it was selected by."""
        return self.entry.name


def _remedy(name: str, reason: str) -> str:
    if reason == NAMED:
        return f"to disable it, leave {name} out of --plugins"
    if reason.startswith(NEEDED):
        return f"to disable it, drop {reason.removeprefix(NEEDED)}"
    return f"to disable it, add no:{name} to --plugins"


def _shorten(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _static_function(plugin: object, name: str) -> object:
    """Look up a function of a plugin without evaluating anything; `None` if it is something else."""
    member = inspect.getattr_static(plugin, name, None)
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return member if inspect.isroutine(member) else None


class _Manager(pluggy.PluginManager):
    """Knows our hooks, evaluates nothing of a plugin, and can be closed."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT_NAME)
        self.add_hookspecs(hookspecs)
        self.is_closed = False

    def register(self, plugin: object, name: str | None = None) -> str | None:
        if self.is_closed:
            raise PluginRegistrationError(
                f"plugin {name!r} comes too late: the set of plugins is closed when the host has "
                f"started; name it in --plugins",
                plugin=name or "",
            )
        return super().register(plugin, name)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        # The inherited method would evaluate every property and lazy attribute of the plugin.
        opts = getattr(_static_function(plugin, name), _MARK, None)
        return cast("pluggy.HookimplOpts", opts) if isinstance(opts, dict) else None

    def hookimpls(self, plugin: object) -> dict[str, pluggy.HookimplOpts]:
        """Find the marked functions of a plugin, by attribute name."""
        found = ((name, self.parse_hookimpl_opts(plugin, name)) for name in dir(plugin))
        return {name: opts for name, opts in found if opts is not None}

    def spec(self, hook: str) -> pluggy.HookCaller | None:
        """Look a hook up, or return `None` if there is no specification of that name."""
        caller: pluggy.HookCaller | None = vars(self.hook).get(hook)
        return caller if caller is not None and caller.has_spec() else None

    def spec_names(self) -> list[str]:
        """Names of all specified hooks."""
        return [name for name in vars(self.hook) if self.spec(name)]


class _Fallback:
    """An internal plugin behind all others: builds what the plan names when no plugin built it.

    It takes part in the hook call, so that wrappers get an object to wrap in this case too.
    """

    name: Final = "core"

    def __init__(self) -> None:
        self.build: Callable[[], object] | None = None

    @hookspecs.hookimpl(trylast=True)
    def core_make_executor(self) -> object:
        return self.build and self.build()

    @hookspecs.hookimpl(trylast=True)
    def core_make_kv_cache(self) -> object:
        return self.build and self.build()

    @hookspecs.hookimpl(trylast=True)
    def core_make_scheduler(self) -> object:
        return self.build and self.build()


def _import(entry: PluginEntry, reason: str) -> object:
    module, _, attribute = entry.module.partition(":")
    try:
        plugin = importlib.import_module(module)
        return functools.reduce(getattr, attribute.split(".") if attribute else [], plugin)
    except _FAULTS as error:
        raise PluginImportError(
            f"plugin {entry} is known, but importing {entry.module} failed: {_describe(error)}; "
            f"install what it needs, or {_remedy(entry.name, reason)}",
            plugin=entry.name,
        ) from error


def _register(manager: _Manager, entry: PluginEntry, reason: str) -> ActivePlugin:
    plugin = _import(entry, reason)
    problems = _problems(manager, entry, plugin)
    cause: Exception | None = None
    if not problems:
        try:
            manager.register(plugin, entry.name)
        except Exception as error:  # noqa: BLE001  raised again below, with the name
            # pluggy leaves a plugin that failed half registered, and its other hooks would answer.
            manager.unregister(name=entry.name)
            problems, cause = [str(error)], error
    if problems:
        raise PluginRegistrationError(
            f"plugin {entry} breaks the contract of plugins ({_remedy(entry.name, reason)}): "
            f"{_listing(problems)}",
            plugin=entry.name,
        ) from cause
    return ActivePlugin(entry, reason, plugin)


def _listing(lines: Sequence[str]) -> str:
    if len(lines) == 1:
        return lines[0]
    return "".join("\n  - " + line.replace("\n", "\n  ") for line in lines)


def _problems(manager: _Manager, entry: PluginEntry, plugin: object) -> list[str]:
    """Every reason why a plugin that was imported cannot be registered."""
    if inspect.isclass(plugin):
        return [f"{entry.module} is a class, but its hooks need an instance; register a module instead"]
    problems = []
    if entry.source == ENTRY_POINT and not re.fullmatch(r"\w+\.\w+", entry.name):
        problems.append(f"its entry point is called {entry.name!r}, but must be called kind.name")
    if type(plugin).__eq__ is not object.__eq__:
        problems.append(
            f"{entry.module} compares by value, so two plugins could be taken for one; "
            f"use a module, or @dataclass(eq=False)"
        )
    problems += _api_problems(inspect.getattr_static(plugin, "core_api", None))
    for name, opts in manager.hookimpls(plugin).items():
        hook = opts.get("specname") or name
        problems += _hookimpl_problems(manager, hook, getattr(plugin, name), opts)
    for name in manager.spec_names():
        function = _static_function(plugin, name)
        if function is not None and getattr(function, _MARK, None) is None:
            problems.append(f"{name} is not marked with @core.hookimpl, so nobody would call it")
    return problems


def _api_problems(stated: object) -> list[str]:
    major, minor = hookspecs.API_VERSION
    ours = f"this is plugin API {major}.{minor}"
    if stated is None:
        return [f'it does not state the plugin API that it was written for: core_api = "1.0"; {ours}']
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", stated) if isinstance(stated, str) else None
    if match is None:
        return [f'core_api is {_shorten(stated)}, but must be a string such as "1.0"; {ours}']
    if int(match[1]) != major:
        return [f"it was written for plugin API {stated}, but {ours}, which is incompatible"]
    if int(match[2]) > minor:
        return [f"it needs plugin API {stated}, but {ours}; upgrade {hookspecs.PROJECT_NAME}"]
    return []


def _hookimpl_problems(
    manager: _Manager, hook: str, function: Callable[..., object], opts: pluggy.HookimplOpts
) -> Iterator[str]:
    caller = manager.spec(hook)
    if caller is None or caller.spec is None:
        if not opts.get("optionalhook"):
            yield f"{hook} is not a hook{_did_you_mean(hook, manager.spec_names())}"
        return
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        yield f"{hook} is async, but hooks are synchronous and nobody would await it"
    if opts.get("hookwrapper"):
        yield f"{hook} is a wrapper of the old style; use wrapper=True"
    elif opts.get("wrapper"):
        if hook not in BUILD_HOOKS:
            yield f"{hook} cannot be wrapped, only {', '.join(BUILD_HOOKS)} can"
    elif inspect.isgeneratorfunction(function) and hook not in LIST_HOOKS:
        yield f"{hook} is a generator, but does not return an iterable, so it would never run"
    yield from _parameter_problems(hook, function, caller.spec.argnames)


def _parameter_problems(
    hook: str, function: Callable[..., object], offered: Sequence[str]
) -> Iterator[str]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield f"{hook} takes {parameter}, which would stay empty; name the arguments"
        elif parameter.name not in offered:
            near = _did_you_mean(parameter.name, offered)
            offer = ", ".join(offered) or "none"
            yield f"{hook} has no argument {parameter.name!r}{near} (it has: {offer})"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            yield f"{hook} takes {parameter.name!r} by keyword only, but arguments are positional"
        elif parameter.default is not parameter.empty:
            yield f"{hook} gives {parameter.name!r} a default, so it would never get the real value"


# --- the host --------------------------------------------------------------------------------------


class PluginHost:
    """The active plugins of one process; a closed set, called through one typed method per hook.

    Hooks of plugins that come earlier in the selection are called earlier.
    """

    def __init__(self, manager: pluggy.PluginManager, active: Sequence[ActivePlugin]) -> None:
        """Use `PluginHost.start`."""
        self.active = tuple(active)
        """In the order in which their hooks are called."""
        self._manager = manager
        self._fallback = cast("_Fallback", manager.get_plugin(_Fallback.name))
        self._by_name = {plugin.name: plugin for plugin in self.active}

    @classmethod
    def start(
        cls, selected: Sequence[Selected], entries: Mapping[str, PluginEntry] | None = None
    ) -> PluginHost:
        """Import and register the selected plugins, and close the set.

        :param selected: in the order in which their hooks shall be called.
        :param entries: what is installed; `None` discovers it.
        :raises PluginError: a plugin is unknown, cannot be imported or breaks the contract.  Several
            that fail are listed in one `PluginRegistrationError`, whose cause is the group of all.
        :raises ConfigError: another `core` shadows the installed one.
        """
        check_core_location()
        entries = discover() if entries is None else entries
        manager = _Manager()
        active: list[ActivePlugin] = []
        errors: list[PluginError] = []
        for choice in reversed(selected):  # pluggy calls the last registered first
            try:
                active.append(_register(manager, _find(choice.name, entries), choice.reason))
            except PluginError as error:
                errors.append(error)
        if errors:
            _raise_all(errors[::-1])
        manager.register(_Fallback(), _Fallback.name)  # last, so that it comes last among `trylast`
        manager.check_pending()
        manager.is_closed = True
        return cls(manager, active[::-1])

    @property
    def selected(self) -> tuple[Selected, ...]:
        """What `start` was given; another process starts the same set from it."""
        return tuple(Selected(plugin.name, plugin.reason) for plugin in self.active)

    # declare

    def register_settings(self) -> dict[str, type]:
        """Call `core_register_settings`.

        :return: settings type by plugin: a frozen dataclass whose fields all have defaults.
        :raises PluginCallError: a plugin raised or returned something else.
        """
        hook = "core_register_settings"
        settings: dict[str, type] = {}
        for plugin, impl in self._implementations(hook):
            declared = _call(plugin, hook, impl, {})
            if declared is None:
                continue
            if not isinstance(declared, type) or not dataclasses.is_dataclass(declared):
                raise _fault([plugin], hook, _returned(declared, "a dataclass type"))
            problem = _settings_problem(declared)
            if plugin.name in settings:
                problem = "is implemented twice"
            if problem:
                raise _fault([plugin], hook, problem)
            settings[plugin.name] = declared
        return settings

    def collect(self) -> Registry:
        """Call every hook that contributes descriptors, and register what they return.

        :raises PluginCallError: a plugin raised or returned something else.
        :raises PluginConflictError: two plugins use one name; names both distributions.
        """
        registry = Registry()
        for hook in DESCRIPTOR_HOOKS:
            self.collect_from(hook, registry)
        return registry

    def collect_from(self, hook: str, registry: Registry) -> None:
        """Call one of `DESCRIPTOR_HOOKS` and add what it returns to the registry.

        :raises PluginCallError: see `collect`.
        :raises PluginConflictError: see `collect`.
        """
        kind = DESCRIPTOR_HOOKS[hook]
        for plugin, descriptor in self._gather(hook, KINDS[kind]):
            problem = _descriptor_problem(descriptor)
            if problem:
                raise _fault([plugin], hook, problem)
            registry.add(kind, descriptor, plugin=plugin.name, distribution=plugin.entry.owner)

    def register_commands(self, subcommands: Callable[[str, Callable[..., Any]], None]) -> None:
        """Call `core_register_commands`.

        :raises PluginCallError: a plugin raised.
        """
        self._notify("core_register_commands", subcommands=subcommands)

    # decide

    def select_backend(
        self, kind: str, candidates: Sequence[Registered], requirements: Requirements
    ) -> str | None:
        """Call `core_select_backend` until one plugin has an opinion.

        :return: the name of one of the candidates; `None` if no plugin cares.
        :raises PluginCallError: a plugin raised or named something that is no candidate.
        """
        hook = "core_select_backend"
        names = [candidate.descriptor.name for candidate in candidates]
        arguments = {"kind": kind, "candidates": candidates, "requirements": requirements}
        for plugin, impl in self._implementations(hook):
            answer = _call(plugin, hook, impl, arguments)
            if isinstance(answer, str) and answer in names:
                return answer
            if answer is not None:
                raise _fault([plugin], hook, _returned(answer, f"one of {', '.join(names)}, or None"))
        return None

    def check_plan(self, plan: Plan) -> list[str]:
        """Call `core_check_plan`.

        :return: objections of all plugins, each as `plugin: objection`.
        :raises PluginCallError: a plugin raised or returned something else.
        """
        return [
            f"{plugin.name}: {line}" for plugin, line in self._gather("core_check_plan", str, plan=plan)
        ]

    def report_header(self, plan: Plan) -> list[str]:
        """Call `core_report_header`.

        :raises PluginCallError: a plugin raised or returned something else.
        """
        return [line for _, line in self._gather("core_report_header", str, plan=plan)]

    # build

    def make_executor(self, plan: Plan, rank: int, default: Callable[[], Executor]) -> Executor:
        """Call `core_make_executor`.

        :param default: builds the one that the plan names, when no plugin builds another; wrappers
            wrap this one too.  What it raises is passed on as it is.
        :raises PluginCallError: a plugin raised or built something that is no executor.
        """
        return self._make("core_make_executor", Executor, default, plan=plan, rank=rank)

    def make_kv_cache(self, plan: Plan, num_blocks: int, default: Callable[[], KVCache]) -> KVCache:
        """Call `core_make_kv_cache`.

        :param default: see `make_executor`.
        :raises PluginCallError: a plugin raised or built something that is no KV cache.
        """
        return self._make("core_make_kv_cache", KVCache, default, plan=plan, num_blocks=num_blocks)

    def make_scheduler(
        self, plan: Plan, kv_cache: KVCache, default: Callable[[], Scheduler]
    ) -> Scheduler:
        """Call `core_make_scheduler`.

        :param default: see `make_executor`.
        :raises PluginCallError: a plugin raised or built something that is no scheduler.
        """
        return self._make("core_make_scheduler", Scheduler, default, plan=plan, kv_cache=kv_cache)

    # live

    def subscribe(self, plan: Plan) -> list[Subscription]:
        """Call `core_subscribe`.

        :raises PluginCallError: a plugin raised or returned something else.
        """
        return [found for _, found in self._gather("core_subscribe", Subscription, plan=plan)]

    def worker_started(self, rank: int, device: str) -> None:
        """Call `core_worker_started`.

        :raises PluginCallError: a plugin raised.
        """
        self._notify("core_worker_started", rank=rank, device=device)

    def engine_started(self, engine: object) -> None:
        """Call `core_engine_started`.

        :raises PluginCallError: a plugin raised.
        """
        self._notify("core_engine_started", engine=engine)

    def engine_stopping(self, engine: object, reason: str) -> None:
        """Call every `core_engine_stopping`, whatever the others raise; errors are logged."""
        hook = "core_engine_stopping"
        for plugin, impl in self._implementations(hook):
            try:
                _call_void(plugin, hook, impl, {"engine": engine, "reason": reason})
            except PluginCallError as error:
                log.exception("plugin failed", plugin=plugin.name, hook=hook, error=str(error))

    # how hooks are called

    def _implementations(self, hook: str) -> list[tuple[ActivePlugin, pluggy.HookImpl]]:
        """All implementations by plugins, in the order of calling."""
        impls = getattr(self._manager.hook, hook).get_hookimpls()
        return [
            (self._by_name[impl.plugin_name], impl)
            for impl in reversed(impls)
            if impl.plugin_name in self._by_name
        ]

    def _notify(self, hook: str, **arguments: object) -> None:
        for plugin, impl in self._implementations(hook):
            _call_void(plugin, hook, impl, arguments)

    def _gather(self, hook: str, wanted: type[T], **arguments: object) -> list[tuple[ActivePlugin, T]]:
        found: list[tuple[ActivePlugin, T]] = []
        for plugin, impl in self._implementations(hook):
            result = _call(plugin, hook, impl, arguments)
            if result is None:
                continue
            items = result if isinstance(result, list) else []
            wrong = [item for item in items if not isinstance(item, wanted)]
            if wrong or items is not result:
                value = wrong[0] if wrong else result
                raise _fault([plugin], hook, _returned(value, f"an iterable of {wanted.__name__}"))
            found += [(plugin, item) for item in items]
        return found

    def _make(self, hook: str, protocol: type, default: Callable[[], T], **arguments: object) -> T:
        built: list[T] = []

        def build() -> T:
            built.append(default())
            return built[0]

        self._fallback.build = build
        try:
            made: T = getattr(self._manager.hook, hook)(**arguments)
        except _FAULTS as error:
            self._blame(hook, error)
            raise
        finally:
            self._fallback.build = None
        problems = missing_members(made, protocol)
        if problems and not any(made is one for one in built):
            makers = [plugin for plugin, _ in self._implementations(hook)]
            lack = f"an object that fulfils {protocol.__name__}: {'; '.join(problems)}"
            raise _fault(makers, hook, _returned(made, lack))
        return made

    def _blame(self, hook: str, error: BaseException) -> None:
        """Raise the error anew with the plugin's name, unless the default raised it.

        The innermost frame of a hook is the one that raised: wrappers only pass the error on.
        """
        impls = getattr(self._manager.hook, hook).get_hookimpls()
        suspects = [impl.plugin_name for impl in reversed(impls)]
        for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
            owners = [i.plugin_name for i in impls if _code_of(i.function) is frame.f_code]
            if owners:
                suspects = owners
                break
        plugins = [self._by_name[name] for name in suspects if name in self._by_name]
        if plugins:
            raise _fault(plugins, hook, f"raised {_describe(error)}") from error


def _fault(plugins: Sequence[ActivePlugin], hook: str, what: str) -> PluginCallError:
    """Make the error that names the plugin, the hook and how to do without the plugin."""
    first, *others = plugins
    doubt = f" (or it was {' or '.join(map(str, others))})" if others else ""
    remedy = _remedy(first.name, first.reason)
    return PluginCallError(f"plugin {first}{doubt}: {hook} {what}; {remedy}", plugin=first.name)


def _returned(value: object, wanted: str) -> str:
    return f"returned {_shorten(value)}, but must return {wanted}"


def _raise_all(errors: Sequence[PluginError]) -> None:
    if len(errors) == 1:
        raise errors[0]
    raise PluginRegistrationError(
        f"{len(errors)} plugins cannot be used: {_listing([str(error) for error in errors])}",
        plugin=errors[0].plugin,
    ) from ExceptionGroup("plugins", errors)


@contextmanager
def _attributed(plugin: ActivePlugin, hook: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise _fault([plugin], hook, f"raised {_describe(error)}") from error


def _call(
    plugin: ActivePlugin, hook: str, impl: pluggy.HookImpl, arguments: Mapping[str, object]
) -> object:
    """Call one implementation; what a list hook returns is consumed here, while we know whose it is."""
    with _attributed(plugin, hook):
        result = impl.function(*[arguments[name] for name in impl.argnames])
        if hook in LIST_HOOKS and isinstance(result, Iterable) and not isinstance(result, str | bytes):
            return list(result)
        return result


def _call_void(
    plugin: ActivePlugin, hook: str, impl: pluggy.HookImpl, arguments: Mapping[str, object]
) -> None:
    result = _call(plugin, hook, impl, arguments)
    if result is not None:
        raise _fault([plugin], hook, _returned(result, "None"))


def _code_of(function: Callable[..., object]) -> object:
    return getattr(inspect.unwrap(function), "__code__", None)


def _settings_problem(declared: type) -> str:
    if not declared.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"returned {declared.__qualname__}, which must be frozen: @dataclass(frozen=True)"
    missing = dataclasses.MISSING
    bare = [
        item.name
        for item in dataclasses.fields(declared)
        if item.default is missing and item.default_factory is missing
    ]
    return f"returned {declared.__qualname__}, whose fields {bare} have no default" if bare else ""


def _descriptor_problem(descriptor: Descriptor) -> str:
    if not isinstance(descriptor.name, str) or not descriptor.name.isidentifier():
        return f"returned a descriptor named {descriptor.name!r}, which must be an identifier"
    for item in dataclasses.fields(descriptor):
        value = getattr(descriptor, item.name)
        function = value.func if isinstance(value, functools.partial) else value
        if callable(function) and "<" in getattr(function, "__qualname__", ""):
            return (
                f"returned descriptor {descriptor.name!r} whose {item.name} is {function.__qualname__}, "
                f"but it must be defined at the top of a module: every rank imports it again"
            )
    return ""


# --- reports ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class PluginReport:
    """What importing one plugin, and nothing else, shows about it."""

    entry: PluginEntry
    core_api: str = ""
    doc: str = ""
    hooks: list[str] = field(default_factory=list)
    descriptors: list[tuple[str, Descriptor]] = field(default_factory=list)
    """Kind and descriptor."""
    problems: list[str] = field(default_factory=list)


def list_plugins() -> list[PluginEntry]:
    """List what is installed, by name; imports nothing.

    :raises PluginConflictError: a name is offered twice.
    """
    return list(discover().values())


def check_plugin(name: str) -> list[str]:
    """Register one plugin alone and let it declare its parts; return every problem.

    :raises PluginNotFoundError: the name is unknown.
    """
    return show_plugin(name).problems


def show_plugin(name: str) -> PluginReport:
    """Import one plugin and describe it; its faults are reported, not raised.

    :param name: `kind.name`, or `py:package.module`.
    :raises PluginNotFoundError: the name is unknown.
    """
    entries = discover()
    report = PluginReport(_find(name, entries))
    try:
        plugin = _import(report.entry, "")
    except PluginImportError as error:
        report.problems.append(str(error))
        return report
    manager = _Manager()
    report.core_api = str(inspect.getattr_static(plugin, "core_api", ""))
    report.doc = inspect.getdoc(plugin) or ""
    report.hooks = [opts.get("specname") or hook for hook, opts in manager.hookimpls(plugin).items()]
    report.problems += _problems(manager, report.entry, plugin)
    if not report.problems:
        _declare(report, entries)
    return report


def _declare(report: PluginReport, entries: Mapping[str, PluginEntry]) -> None:
    """Start a host of its own for the plugin and call all that it declares."""
    registry = Registry()
    try:
        host = PluginHost.start([Selected(report.entry.name, "")], entries)
    except PluginError as error:
        report.problems.append(str(error))
        return
    calls: list[Callable[[], object]] = [host.register_settings]
    calls += [functools.partial(host.collect_from, hook, registry) for hook in DESCRIPTOR_HOOKS]
    calls += [functools.partial(host.register_commands, lambda _name, _function: None)]
    for call in calls:
        try:
            call()
        except PluginError as error:
            report.problems.append(str(error))
    report.descriptors = [(kind, found.descriptor) for kind in KINDS for found in registry.all(kind)]
