"""The pages of `docs/` are complete, up to date, and lead somewhere."""

from __future__ import annotations

import ast
import functools
import re
import runpy

import pytest
from docs_blocks import BLOCKS, FOLDER, PAGES

from core import events, hookspecs, interfaces, registry, testing
from core.errors import CytheraError
from core.pluginhost import DESCRIPTOR_HOOKS
from core.registry import KINDS
from core.scaffold.kinds import STARTERS

ROOT = FOLDER.parent
READMES = [ROOT / "README.md"]
LINK = re.compile(r"\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^)\s]+)\)")
PLUGINS = (FOLDER / "plugins.md").read_text(encoding="utf-8")


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# --- up to date ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_generated_parts_are_up_to_date(page):
    fill = runpy.run_path(str(FOLDER / "generate.py"))["fill"]
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python docs/generate.py"


def test_every_part_is_on_some_page():
    parts = set(runpy.run_path(str(FOLDER / "generate.py"))["PARTS"])
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- generated: (\w+) -->", text)) == parts


# --- complete --------------------------------------------------------------------------------------

PUBLIC_CLASSES = [
    name
    for module in (registry, interfaces)
    for name, value in vars(module).items()
    if isinstance(value, type) and value.__module__ == module.__name__
    if name.endswith("Entry") or getattr(value, "_is_protocol", False)
]


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in vars(hookspecs) if name.startswith("core_")),
        *KINDS,
        *STARTERS,
        *(name for name in testing.__all__ if name.endswith("Conformance")),
        *PUBLIC_CLASSES,
        "Requirements",
        "LayerQuantizer",
        "ModelSpec",
        *(kind.__name__ for kind in (events.Subscription, events.EventBatch, events.SubscriberDropped)),
    ],
)
def test_authors_of_plugins_read_of(name):
    assert re.search(rf"\b{name}\b", PLUGINS)


def test_every_kind_has_its_section_and_hook():
    for hook, kind in DESCRIPTOR_HOOKS.items():
        assert f"\n### {kind}\n\nHook: [`{hook}`](#{hook})." in PLUGINS


def test_every_exit_code_is_explained():
    text = (FOLDER / "operators.md").read_text(encoding="utf-8")
    for error in [CytheraError, *CytheraError.__subclasses__()]:
        if "exit_code" in vars(error):
            assert f"| {error.exit_code} | `{error.__name__}` |" in text


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"](docs/{page.name})" in text


# --- links -----------------------------------------------------------------------------------------


def anchors_of(page):
    """The anchors that GitHub makes of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def links():
    for page in [*PAGES, *READMES]:
        for text, target in LINK.findall(prose(page)):
            yield page, text, target


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for source, _, target in links():
        if source != page or re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name}: {target}"


def names_in(file):
    """Everything that a module defines: functions, classes, methods as `Class.method`, constants."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)
        if isinstance(node, ast.ClassDef):
            members = (ast.FunctionDef, ast.AsyncFunctionDef)
            yield from (f"{node.name}.{item.name}" for item in node.body if isinstance(item, members))


def test_linked_functions_are_where_the_links_say():
    num_checked = 0
    for page, text, target in links():
        name = re.fullmatch(r"`([A-Za-z_][\w.]*)`", text)
        if name and target.endswith(".py") and not name[1].endswith(".py"):
            file = (page.parent / target).resolve()
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            wanted = name[1].removeprefix(f"{module}.")
            assert wanted in set(names_in(file)), f"{page.name}: {text} is not in {target}"
            num_checked += 1
    assert num_checked > 60


# --- messages --------------------------------------------------------------------------------------

MESSAGES = [block for block in BLOCKS if "message" in block.marks]


@functools.cache
def texts_of_the_code():
    """Every text that a message is made of: what stands before, between and behind what is filled in."""
    found = []
    for file in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value for part in parts if isinstance(part, ast.Constant)]
            texts = [text for text in texts if isinstance(text, str)]
            if len("".join(texts)) > 12:
                found.append(texts)
    return found


def num_said(texts, message):
    """Letters of a message that a text accounts for; 0 if it is not in there, in order."""
    position, count = 0, 0
    for text in texts:
        position = message.find(text, position)
        if position < 0:
            return count if message.endswith("…") else 0
        position += len(text)
        count += len(text)
    return count


def is_said_by_the_code(message):
    """Whether some text of the code accounts for a good deal of a message, or of each part of it."""
    parts = [part for part in message.split("; ") if part != "…"]
    return any(
        all(max(num_said(texts, x) for texts in texts_of_the_code()) > 0.3 * len(x) for x in pieces)
        for pieces in ([message], parts)
    )


@pytest.mark.parametrize("block", MESSAGES, ids=str)
def test_messages_are_those_of_the_code(block):
    assert is_said_by_the_code(block.code.removeprefix("error: ").strip())


def test_messages_to_clients_are_those_of_the_code():
    text = (FOLDER / "operators.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d{3} \| `(.*?)` \|", text, re.MULTILINE)
    assert len(rows) == 8
    for message in rows:
        assert is_said_by_the_code(re.sub("…(?!$)", "x", message)), message


def test_a_message_that_nobody_says_would_be_found():
    assert not is_said_by_the_code("the frobnicator is out of widgets (--num-widgets)")


# --- style -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prose_is_plain(page):
    text = re.sub(r"<!-- generated: .*?<!-- end -->", "", prose(page), flags=re.DOTALL)
    assert "—" not in text, "no long dashes"
    words = ("blazing", "seamless", "powerful", "state-of-the-art", "simply", "easily")
    assert not [word for word in words if re.search(rf"\b{word}", text.lower())]
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith(("|", "-", "`", "#", "<")):
            assert len(line) <= 150, f"{page.name}, line {number} of its prose"
