"""The command line: `python -m core`, or `cythera`.

The flags that set up an engine are read off the fields of `EngineConfig`; this file names none of
them.  Commands import what they need when they run, so that `plugins list` loads no plugin and no
torch.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter

import core
from core.config import (
    ENV_PREFIX,
    GROUPS,
    EngineConfig,
    flag_origin,
    load_config,
    parse_assignments,
)
from core.errors import EXIT_INTERRUPTED, CytheraError, PluginConflictError
from core.hookspecs import API_VERSION, PROJECT_NAME
from core.log import configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pydantic.fields import FieldInfo
    from rich.console import Console

    from core.plan import Plan
    from core.pluginhost import PluginReport

BENCHMARKS: Final = {
    "latency": "Measure how long a batch takes: in all, to the first token, and per token.",
    "throughput": "Measure tokens per second of an engine that has all requests at once.",
    "serve": "Put a load on any server with OpenAI's API, and report what clients saw.",
    "startup": "Measure how long a server takes from its start to the first token.",
    "kernels": "Profile steps on a GPU, kernel by kernel, beside what the card can do.",
    "model": "Write a model with a config and no weights, to be measured.",
}
"""The benchmarks of `core.bench.commands`."""
MAX_ERROR_LINES: Final = 10
EXIT_USAGE: Final = 2
EXIT_PLUGIN: Final = 3
EXIT_BROKEN_PIPE: Final = 141
TRACEBACK: Final = f"{ENV_PREFIX}TRACEBACK"
PIPE_WIDTH: Final = 200
"""Columns of a table that is not written to a terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: arguments without the program's name; `None` takes the process's.
    :return: the exit code; that of a `CytheraError` is its `exit_code`.
    """
    configure_logging()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a closed pipe shall be noticed here, not when the interpreter exits
    except CycloptsError as error:
        return _fail(error, EXIT_USAGE)
    except CytheraError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _run(tokens: list[str]) -> int:
    named, tokens = _split_leading_plugins(tokens)
    app = make_app()
    if tokens and tokens[0] not in app.help_flags and tokens[0] in app:
        tokens += [f"--plugins={item}" for item in named]
    else:
        _add_plugin_commands(app, named or [os.environ.get(f"{ENV_PREFIX}PLUGINS", "")])
    result = app(tokens)
    return result if isinstance(result, int) else 0


def _fail(error: Exception, code: int) -> int:
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        traceback.print_exception(error)
    lines = f"error: {error}".splitlines()
    if len(lines) > MAX_ERROR_LINES:
        num_hidden = len(lines) - MAX_ERROR_LINES + 1
        lines[MAX_ERROR_LINES - 1 :] = [f"  … and {num_hidden} more lines: {TRACEBACK}=1 shows all"]
    print("\n".join(lines), file=sys.stderr)  # noqa: T201  what a command is for
    return code


# --- flags of the engine ---------------------------------------------------------------------------

_GROUPS: Final = {name: Group(name, sort_key=index) for index, name in enumerate(GROUPS, start=1)}
_OUTPUT: Final = Group("Output", sort_key=len(GROUPS) + 1)


def _make_flag(name: str, field: FieldInfo) -> tuple[str, Any, Any]:
    """Describe one flag.  Values stay text: `EngineConfig` alone decides what is legal."""
    extra: Any = field.json_schema_extra
    kind = _bare_type(field.annotation)
    taken: type = {bool: bool, tuple: list[str]}.get(kind, str)
    parameter = Parameter(
        name=["--" + name.replace("_", "-"), *filter(None, [extra["short"]])],
        help=field.description,
        group=_GROUPS[extra["group"]],
        negative=None if taken is bool else (),
        metavar=None if taken is bool else _metavar(kind),
        show_default=_show_default(field.default),
        allow_leading_hyphen=taken is str,
    )
    return name, Annotated[taken | None, parameter], dataclasses.field(default=None)


def _bare_type(annotation: Any) -> Any:
    """Strip `Annotated` and `| None`; for a `Literal` return it as it is."""
    if hasattr(annotation, "__metadata__"):
        return _bare_type(annotation.__origin__)
    if type(None) in get_args(annotation):
        return _bare_type(get_args(annotation)[0])
    origin = get_origin(annotation)
    return annotation if origin in (None, Literal) else origin


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X", tuple: "A,B"}.get(kind, "TEXT")


def _show_default(default: Any) -> Any:
    if default is None or default == ():
        return False
    return lambda _: str(default).lower() if isinstance(default, bool) else str(default)


if TYPE_CHECKING:
    EngineFlags = Any
else:
    EngineFlags = dataclasses.make_dataclass(
        "EngineFlags",
        [
            _make_flag(name, field)
            for name, field in EngineConfig.model_fields.items()
            if name not in ("model", "plugin_settings")  # the argument, and --set
        ],
        kw_only=True,
        namespace={"__module__": __name__},
    )

Flags = Annotated[EngineFlags | None, Parameter(name="*")]
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", metavar="FILE", help="Read settings from a TOML file.")
]
Assignments = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        group=_GROUPS["Plugins"],
        negative=(),
        metavar="NAME.KEY=VALUE",
        help="One setting of a plugin, such as parallel.tp.size=2; may be repeated.",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool,
    Parameter(name="--json", group=_OUTPUT, negative=(), help="Write JSON.", show_default=False),
]


def load_settings(
    model: str | None,
    flags: EngineFlags | None,
    config_file: Path | None,
    assignments: Iterable[str],
    *,
    need_model: bool = True,
) -> EngineConfig:
    """Put flags over environment and file, and check the result.

    :param assignments: what `--set` was given.
    :raises ConfigError: lists every problem, each with its origin.
    """
    given = {"model": model, **(vars(flags) if flags else {})}
    if items := parse_assignments(assignments):
        given["plugin_settings"] = items
    return load_config(
        given,
        config_file=config_file,
        environ=os.environ,
        origin=flag_origin,
        need_model=need_model,
    )


# --- commands --------------------------------------------------------------------------------------


def make_app() -> App:
    """Make the tree of built-in commands."""
    app = App(
        name=PROJECT_NAME,
        help="An LLM inference engine that plugins assemble.",
        help_epilogue=f"{PROJECT_NAME} --plugins A,B COMMAND runs a command that one of these plugins adds.",
        version=_version_text,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        help_on_error=False,
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative=()),
    )
    app.command(serve, alias="run")
    app.command("core.chat:chat", name="chat", help="Talk to a model that a server serves.")
    app.command(plan)
    app.command("core.quantize:quantize", name="quantize", help="Write a quantized checkpoint.")
    app.command(perplexity)
    plugins = App(name="plugins", help="See what is installed and whether it works.")
    for command, name in (
        (plugins_list, "list"),
        (plugins_show, "show"),
        (plugins_check, "check"),
        (plugins_new, "new"),
    ):
        plugins.command(command, name=name)
    app.command(plugins)
    config = App(name="config", help="See settings, and where each comes from.")
    config.command(config_show, name="show")
    app.command(config)
    bench = App(name="bench", help="Measure engines and servers.")
    for name, help_ in BENCHMARKS.items():
        bench.command(f"core.bench.commands:bench_{name}", name=name, help=help_)
    bench.command(bench_steps, name="steps")
    bench.command(bench_compare, name="compare")
    bench.command(bench_http, name="http")
    app.command(bench)
    app.command(version)
    return app


def serve(
    model: str | None = None,
    /,
    *,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
) -> int:
    """Serve a model to clients of the OpenAI API.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    config = load_settings(model, flags, config_file, assignments)
    configure_logging(config.log_level, config.log_format)
    from core import serve as serving  # noqa: PLC0415  not needed for --help

    return serving.serve(config)


def plan(
    model: str | None = None,
    /,
    *,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
    as_json: AsJson = False,
) -> None:
    """Show what an engine would be made of and why; needs no GPU and reads no weights.

    :param model: Folder of a checkpoint, or the id of one on the hub.
    """
    config = load_settings(model, flags, config_file, assignments)
    configure_logging(config.log_level, config.log_format)
    from core.assemble import make_plan  # noqa: PLC0415  imports torch and transformers

    made = make_plan(config)
    if as_json:
        _print_json(made.to_dict())
        return
    console = _make_console()
    for section, rows in [*made.render(_device_bytes(made.device)), ("layers", _layer_rows(made))]:
        if rows:
            console.print(section, style="bold")
            _print_table(console, rows)


def _layer_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Say how a layer's slots will be filled, and what stands in the way of more."""
    from core.assemble import compose_slots  # noqa: PLC0415  imports torch

    try:
        forms = compose_slots(plan)
    except CytheraError as error:
        return [("", "not known here", str(error))]
    return [(form.slot, form.form, "; ".join(form.objections)) for form in forms]


def _device_bytes(device: str) -> int | None:
    """Ask the device for its memory; `None` if it is none of its own or not here."""
    import torch  # noqa: PLC0415  slow to import

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def perplexity(
    model: str | None = None,
    /,
    *,
    text: Annotated[Path, Parameter(help="Text to predict; .jsonl holds text or messages per line.")],
    sample_len: Annotated[int, Parameter(help="Tokens that are predicted from one another.")] = 512,
    num_samples: Annotated[
        int | None, Parameter(help="At most so many; unset: the whole text.", show_default=False)
    ] = None,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
    as_json: AsJson = False,
) -> None:
    """Measure how well an engine predicts a text, for example with other weights or another cache.

    :param model: Folder of a checkpoint, or the id of one on the hub; demo is the bundled one.
    """
    config = load_settings(model, flags, config_file, assignments)
    from core.llm import LLM  # noqa: PLC0415  imports torch and transformers
    from core.quant.perplexity import measure  # noqa: PLC0415  imports torch

    with LLM.from_config(config) as llm:
        score = measure(llm, text, sample_len=sample_len, num_samples=num_samples)
    if as_json:
        _print_json({"perplexity": score.perplexity, "num_tokens": score.num_tokens})
    else:
        _print(f"perplexity {score.perplexity:.4f} over {score.num_tokens} tokens")


def config_show(
    model: str | None = None,
    /,
    *,
    flags: Flags = None,
    config_file: ConfigFile = None,
    assignments: Assignments = (),
    origin: Annotated[
        bool, Parameter(group=_OUTPUT, help="Say where each value comes from.", show_default=False)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the settings that are in force, as a file that --config reads.

    :param model: Folder of a checkpoint, or the id of one on the hub.
    """
    config = load_settings(model, flags, config_file, assignments, need_model=False)
    if not as_json:
        _print(config.to_toml(with_origins=origin), end="")
        return
    values = config.to_dict()
    if origin:
        values = {k: {"value": v, "origin": config.origin_of(k)} for k, v in values.items()}
    _print_json(values)


def plugins_list(*, as_json: AsJson = False) -> None:
    """List the plugins that are installed; imports none of them."""
    from core.pluginhost import list_plugins  # noqa: PLC0415  not needed for --help

    entries = list_plugins()
    if as_json:
        _print_json([{**dataclasses.asdict(e), "is_present": e.is_present} for e in entries])
        return
    header = ("name", "module", "distribution", "version", "state")
    states = {True: "installed", False: "module is missing"}
    rows = [(e.name, e.module, e.distribution, e.version, states[e.is_present]) for e in entries]
    _print_table(_make_console(), rows, header)


def plugins_show(name: str, /, *, as_json: AsJson = False) -> int:
    """Import one plugin and show what it contributes.

    :param name: As in --plugins: kind.name, or py:package.module.
    """
    from core.pluginhost import show_plugin  # noqa: PLC0415  not needed for --help

    report = show_plugin(name)
    if as_json:
        _print_json(_report_to_dict(report))
    else:
        _print_report(report)
    return EXIT_PLUGIN if report.problems else 0


def plugins_check(*names: str, as_json: AsJson = False) -> int:
    """Import plugins one by one and list every breach of the plugin contract.

    :param names: As in --plugins; without any, all that are installed.
    """
    from core.pluginhost import check_plugin, list_plugins  # noqa: PLC0415  not needed for --help

    chosen = names or tuple(entry.name for entry in list_plugins())
    problems = {name: check_plugin(name) for name in chosen}
    if as_json:
        _print_json(problems)
    else:
        rows = [(name, line) for name, found in problems.items() for line in found or ["ok"]]
        _print_table(_make_console(), rows)
    return EXIT_PLUGIN if any(problems.values()) else 0


def plugins_new(
    kind: str,
    name: str,
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder to make the package's folder in.")] = Path(),
) -> None:
    """Write a starting package for a plugin: it works, it has tests, and it can be installed.

    :param kind: attention, quant, events …; any other word lists them all.
    :param name: Such as acme, for a distribution cythera-acme and a plugin KIND.acme.
    """
    from core.scaffold.package import make_package  # noqa: PLC0415  not needed for --help

    package, folder = make_package(kind, name, out)
    _print(f"made {folder}: the plugin {package.plugin}. What comes next:")
    for command in package.next_commands(folder):
        _print(f"  {command}")


def bench_steps(
    *num_running: int,
    num_steps: Annotated[int, Parameter(help="Steps per round.")] = 400,
) -> None:
    """Measure what an engine step costs on the host, with a fake executor and ten idle plugins.

    :param num_running: Running requests; without any: 1, 64 and 256.
    """
    from core.bench import steps  # noqa: PLC0415  imports the engine

    counts = num_running or (1, 64, 256)
    _print(steps.report(steps.measure(count, num_steps=num_steps) for count in counts))


def bench_compare(
    *,
    num_requests: Annotated[int, Parameter(help="Requests of mixed lengths.")] = 32,
    hidden_size: Annotated[int, Parameter(help="Width of the random model.")] = 512,
    num_layers: Annotated[int, Parameter(help="Depth of the random model.")] = 8,
) -> None:
    """Compare tokens per second with transformers on the same model, requests and machine."""
    from core.bench import compare  # noqa: PLC0415  imports torch and transformers

    workload = compare.Workload(num_requests=num_requests)
    _print(compare.report(compare.compare(workload, hidden_size=hidden_size, num_layers=num_layers)))


def bench_http(
    model: str = "demo",
    /,
    *,
    num_streams: Annotated[int, Parameter(help="Streams side by side.")] = 256,
    num_tokens: Annotated[int, Parameter(help="Tokens of each stream.")] = 512,
) -> None:
    """Measure what streaming over HTTP costs, with a real server and an engine that computes nothing.

    :param model: Folder of a checkpoint, whose tokenizer is used.
    """
    from core.bench import http  # noqa: PLC0415  imports psutil, an extra

    _print(http.report(http.measure(model, num_streams=num_streams, num_tokens=num_tokens)))


def version() -> None:
    """Show the versions to state in a bug report."""
    _print(_version_text())


def _version_text() -> str:
    api = ".".join(map(str, API_VERSION))
    torch = importlib.metadata.version("torch")
    details = f"plugin API {api}, torch {torch}, Python {platform.python_version()}"
    return f"{PROJECT_NAME} {core.__version__} ({details})"


# --- commands of plugins ---------------------------------------------------------------------------


def _split_leading_plugins(tokens: list[str]) -> tuple[list[str], list[str]]:
    """Take `--plugins` off the front: before the command, it says which plugins may add commands."""
    named = []
    while tokens and tokens[0].partition("=")[0] == "--plugins":
        value = tokens[0].partition("=")[2]
        num_taken = 1 if value else 2
        named += [value] if value else tokens[1:2]
        tokens = tokens[num_taken:]
    return named, tokens


def _add_plugin_commands(app: App, items: list[str]) -> None:
    """Start the named plugins, and none that nobody named, for the commands that they add."""
    from core.pluginhost import (  # noqa: PLC0415  not needed for built-in commands
        PluginHost,
        PluginSelection,
        discover,
    )

    selection = PluginSelection.parse(items)
    if not selection.names:
        return
    group = Group("Commands of plugins", sort_key=1)

    def add(name: str, function: Callable[..., Any]) -> None:
        if name in app:
            raise PluginConflictError(f"the command {name!r} exists already")
        app.command(function, name=name, group=group)

    entries = discover()
    PluginHost.start(selection.resolve(entries), entries).register_commands(add)


# --- output ----------------------------------------------------------------------------------------


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end)  # noqa: T201  what a command is for


def _print_json(value: Any) -> None:
    _print(json.dumps(value, indent=2, ensure_ascii=False))


def _make_console() -> Console:
    from rich.console import Console  # noqa: PLC0415  not needed for JSON

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _print_table(console: Console, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    from rich.table import Table  # noqa: PLC0415  not needed for JSON

    rows = list(rows)
    num_columns = len(header) or max(map(len, rows), default=0)
    table = Table(box=None, show_header=bool(header), padding=(0, 2, 0, 0))
    for index in range(num_columns):
        table.add_column(header[index] if header else "", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _report_to_dict(report: PluginReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report.entry),
        "core_api": report.core_api,
        "doc": report.doc,
        "hooks": report.hooks,
        "descriptors": [
            {"kind": kind, "name": descriptor.name, "summary": descriptor.summary}
            for kind, descriptor in report.descriptors
        ],
        "problems": report.problems,
    }


def _print_report(report: PluginReport) -> None:
    entry = report.entry
    rows = [
        ("name", entry.name),
        ("module", entry.module),
        ("distribution", f"{entry.distribution} {entry.version}".strip() or entry.source),
        ("plugin API", report.core_api or "not stated"),
        ("hooks", ", ".join(report.hooks) or "none"),
        *((kind, f"{found.name}: {found.summary}") for kind, found in report.descriptors),
        *(("problem", line) for line in report.problems),
    ]
    console = _make_console()
    _print_table(console, rows)
    if report.doc:
        console.print(f"\n{report.doc}")
