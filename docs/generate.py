"""Write the parts of the pages that are made of docstrings and settings: `python docs/generate.py`.

A part stands between two comments, `<!-- generated: NAME -->` and `<!-- end -->`; what is between them
is replaced.  A test fails when a page is not what this script would make of it.
"""  # noqa: INP001  a folder of pages is no package

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core import hookspecs, interfaces, registry, testing
from core.config import GROUPS, EngineConfig
from core.errors import EXIT_INTERRUPTED, CytheraError
from core.pluginhost import DESCRIPTOR_HOOKS
from core.registry import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

FOLDER: Final = Path(__file__).parent
PART: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIELD: Final = re.compile(r"^:(param|return|raises) ?(\w*): ", re.MULTILINE)
PROTOCOLS: Final = {
    "attention": (
        "AttentionBackend",
        "SupportsRotary",
        "SupportsQuantizedKV",
        "SupportsCudaGraph",
    ),
    "quant": ("QuantScheme", "SupportsNorm", "SupportsGate", "SupportsResidual"),
    "parallel": ("TensorParallel", "PipelineParallel"),
    "scheduler": ("Scheduler",),
    "kv_cache": ("KVCache", "BlockAllocator"),
    "executor": ("Executor", "SupportsIdleWork", "SupportsRecovery"),
    "frontend": ("Frontend",),
    "server": ("Server",),
    "sampler": ("Sampler", "SupportsSamplerCapture"),
}
"""What the factory of each kind returns, and what it may offer besides."""
SUBENTRIES: Final = {"parallel": ("TensorParallelEntry", "PipelineParallelEntry")}


# --- docstrings ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Doc:
    """A docstring, taken apart."""

    text: str
    """All that comes before the fields, in one paragraph per paragraph."""
    fields: list[tuple[str, str, str]]
    """Kind (`param`, `return`, `raises`), name and text."""

    @classmethod
    def of(cls, text: str | None) -> Doc:
        """Parse one."""
        text = inspect.cleandoc(text or "")
        marks = list(FIELD.finditer(text))
        head = text[: marks[0].start()] if marks else text
        ends = [*(mark.start() for mark in marks[1:]), len(text)][: len(marks)]
        found, tail = [], ""
        for mark, end in zip(marks, ends, strict=True):
            body, _, rest = text[mark.end() : end].partition("\n\n")
            found.append((mark[1], mark[2], _one_line(body)))
            tail += rest
        paragraphs = [_one_line(part) for part in (head + "\n\n" + tail).split("\n\n")]
        return cls("\n\n".join(filter(None, paragraphs)), found)

    @property
    def summary(self) -> str:
        """The first paragraph."""
        return self.text.partition("\n\n")[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _members(owner: type) -> Iterator[tuple[str, str, Doc]]:
    """Name, signature and docstring of each method, property and documented attribute, in order."""
    (node,) = ast.parse(inspect.getsource(owner)).body
    if not isinstance(node, ast.ClassDef):
        return
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            yield item.name, _signature(item), Doc.of(ast.get_docstring(item))
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, is_class_var = item.target.id, "ClassVar" in ast.unparse(item.annotation)
            if not is_class_var:
                yield name, name, Doc.of(_string(following))


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return str(node.value.value)
    return ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        return node.name
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)][1:]
    keywords = [
        argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    return f"{node.name}({', '.join([*names, *(['*', *keywords] if keywords else [])])})"


# --- hooks -----------------------------------------------------------------------------------------


def make_hooks() -> Iterator[str]:
    """Describe every hook, in the order of calling, under the headings of `core/hookspecs.py`."""
    source = inspect.getsource(hookspecs)
    for line in source.splitlines():
        if heading := re.match(r"# --- (\w+): (.*?) -*$", line):
            yield f"### {heading[1].capitalize()}\n\n{_sentence(heading[2])}\n"
        elif match := re.match(r"def (core_\w+)\(", line):
            yield from _hook(getattr(hookspecs, match[1]))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _hook(spec: Callable[..., Any]) -> Iterator[str]:
    arguments = ", ".join(inspect.signature(spec).parameters)
    result = str(spec.__annotations__["return"])
    doc = Doc.of(spec.__doc__)
    yield f"#### {spec.__name__}\n\n`{spec.__name__}({arguments}) -> {result}`\n\n{doc.text}\n"
    yield from _field_list(doc)
    yield ""


def _field_list(doc: Doc) -> Iterator[str]:
    words = {"return": "returns", "raises": "raises"}
    for kind, name, text in doc.fields:
        label = f"`{name}`" if kind == "param" else f"{words[kind]}{f' `{name}`' if name else ''}"
        yield f"- {label}: {text}"


# --- kinds -----------------------------------------------------------------------------------------


def make_kinds() -> Iterator[str]:
    """Describe the hook, the descriptor and the interfaces of every kind."""
    hooks = {kind: hook for hook, kind in DESCRIPTOR_HOOKS.items()}
    for kind, entry in KINDS.items():
        yield f"### {kind}\n"
        entries = [getattr(registry, name) for name in SUBENTRIES.get(kind, ())] or [entry]
        yield f"Hook: [`{hooks[kind]}`](#{hooks[kind]}).\n"
        for one in entries:
            yield f"`{one.__name__}`: {_one_line(Doc.of(one.__doc__).text)}\n"
            yield from _table("field", _members(one))
        for protocol in _protocols(kind):
            yield f"`{protocol.__module__}.{protocol.__name__}`: {Doc.of(protocol.__doc__).summary}\n"
            yield from _table("member", _members(protocol))


def _protocols(kind: str) -> Iterator[type]:
    for name in PROTOCOLS.get(kind, ()):
        yield getattr(interfaces, name)
    if kind == "launcher":
        for module, name in (("core.ranks.executor", "Launcher"), ("core.ranks.watch", "RankHandle")):
            yield getattr(importlib.import_module(module), name)


def _table(title: str, members: Iterator[tuple[str, str, Doc]]) -> Iterator[str]:
    rows = [f"| `{shown}` | {_cell(doc.summary)} |" for _, shown, doc in members]
    if rows:
        yield f"| {title} | |\n|---|---|"
        yield from rows
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the kit, the settings, the exit codes ---------------------------------------------------------


def make_kit() -> Iterator[str]:
    """List the conformance classes."""
    yield "| class | checks |\n|---|---|"
    for name in sorted(testing.__all__):
        if name.endswith("Conformance"):
            doc = Doc.of(_module_of(name).__doc__)
            yield f"| `{name}` | {_cell(doc.summary.removeprefix('Conformance of '))} |"


def _module_of(name: str) -> ModuleType:
    return importlib.import_module(getattr(testing, name).__module__)


def make_settings() -> Iterator[str]:
    """List every setting by group, with its flag and default."""
    for group in GROUPS:
        yield f"#### {group}\n\n| flag | | default |\n|---|---|---|"
        for name, field in EngineConfig.model_fields.items():
            extra: Any = field.json_schema_extra
            if extra["group"] != group or name in ("model", "plugin_settings"):
                continue
            flags = [extra["short"], "--" + name.replace("_", "-")]
            shown = ", ".join(f"`{flag}`" for flag in flags if flag)
            yield f"| {shown} | {_cell(field.description or '')} | {_default(field.default)} |"
        yield ""


def _default(value: Any) -> str:
    if value is None or value == ():
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def make_exit_codes() -> Iterator[str]:
    """List which error ends a command with which code."""
    yield "| code | error | |\n|--:|---|---|"
    yield "| 0 | | The command has done what it was asked, or a signal has ended the server. |"
    errors: list[type[CytheraError]] = [CytheraError, *CytheraError.__subclasses__()]
    for error in sorted(errors, key=lambda error: error.exit_code):
        if "exit_code" in vars(error):
            yield f"| {error.exit_code} | `{error.__name__}` | {Doc.of(error.__doc__).summary} |"
    yield f"| {EXIT_INTERRUPTED} | | Ctrl-C has ended the command. |"


PARTS: Final[dict[str, Callable[[], Iterator[str]]]] = {
    "hooks": make_hooks,
    "kinds": make_kinds,
    "kit": make_kit,
    "settings": make_settings,
    "exit_codes": make_exit_codes,
}


def fill(text: str) -> str:
    """Replace every generated part of a page."""

    def make(match: re.Match[str]) -> str:
        body = "\n".join(PARTS[match[2]]()).strip("\n")
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return PART.sub(make, text)


def main() -> None:
    """Write all pages anew."""
    for page in sorted(FOLDER.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{page.name} was out of date\n")


if __name__ == "__main__":
    main()
