"""Questions and answers found in code and documentation: docstrings, short functions, sections, glossaries."""

from __future__ import annotations

import ast
import random
import re
import warnings
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from corpus import Document

Pair = tuple[str, str]

MAX_FUNCTION_LINES: Final = 24
MAX_ANSWER: Final = 900
MAX_PAIRS_PER_FILE: Final = 24

_PURPOSE_FORMS: Final = (
    "What does {name} do?",
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain {name}.",
    "What is {name} in Python?",
    "Tell me about `{name}`.",
)
_WRITE_FORMS: Final = (
    "Write a function that {task}",
    "Write a Python function that {task}",
    "Can you write a function that {task}",
    "I need a Python function `{name}` that {task}",
)
_IMPERATIVE_FORMS: Final = (
    "Write a function to {task}",
    "Write a Python function to {task}",
    "Write `{name}`, a function to {task}",
)
_CODE_FORMS: Final = (
    "What does this code do?\n\n```python\n{code}\n```",
    "Explain this function:\n\n```python\n{code}\n```",
    "Write a docstring for this function:\n\n```python\n{code}\n```",
)
_TOPIC_FORMS: Final = (
    "Explain: {topic}",
    "What can you tell me about {topic}?",
    "{topic}?",
    "Explain {topic}.",
)
_TERM_FORMS: Final = (
    "What is {article} {term} in Python?",
    "What does the term {term} mean?",
    "Define {term}.",
    "What is {article} {term}?",
    'Explain the term "{term}".',
)
_VERB_TEXT: Final = """
    add apply build calculate check clear close compute convert count create decode delete encode evaluate extract
    fetch filter find fit format generate get iterate join list load make merge normalize open parse plot print
    process raise read register remove render replace reset return run save search select send set sort split
    store strip test transform update validate verify wait wrap write yield
"""
_VERBS: Final = frozenset(_VERB_TEXT.split())


def mine(document: Document) -> list[Pair]:
    """Return pairs of question and answer, the same for the same document."""
    rng = random.Random(document.digest)
    if document.kind == "code":
        pairs = list(_mine_code(document, rng))
    elif document.path.endswith(("glossary.rst.txt", "glossary.rst")):
        return list(_mine_glossary(document.text, rng))
    else:
        pairs = list(_mine_sections(document.text, rng))
    return rng.sample(pairs, min(len(pairs), MAX_PAIRS_PER_FILE))


# --- code -----------------------------------------------------------------------------------------


def _mine_code(document: Document, rng: random.Random) -> Iterator[Pair]:
    try:
        with warnings.catch_warnings(action="ignore"):  # other people's escapes
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    module = module_name(document.path)
    summary = summarize(ast.get_docstring(tree))
    if summary:
        yield _ask_purpose(module, summary, rng)
    for prefix, node in _public_definitions(tree, module):
        name = f"{prefix}.{node.name}"
        text = ast.get_docstring(node)
        summary = summarize(text)
        if not text or not summary:
            continue
        yield _ask_purpose(name, summary, rng)
        if isinstance(node, ast.FunctionDef) and _is_short(node) and prefix == module:
            yield _ask_to_write(node, text, rng)
            yield _ask_what_code_does(node, summary, rng)


def module_name(path: str) -> str:
    """Turn the path of a file into the dotted name of its module."""
    parts = path.removesuffix(".py").split("/")
    if "src" in parts:
        parts = parts[parts.index("src") + 1 :]
    if re.search(r"-\d", parts[0]) and len(parts) > 1:  # the top folder of an sdist
        parts = parts[1:]
    return ".".join(part for part in parts if part != "__init__") or parts[0]


def _public_definitions(
    tree: ast.Module, module: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield module, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{module}.{node.name}", inner


def summarize(text: str | None) -> str:
    """Return the first paragraph of a docstring, and the second if both are short; empty if unfit."""
    if not text:
        return ""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)[:2]]
    usable = [
        p for p in paragraphs if not re.search(r"^(:|\.\.|>>>|-{3}|Parameters|Args|Returns|=+)|-{4}", p)
    ]
    if not usable or usable[0] != paragraphs[0]:
        return ""
    answer = " ".join(usable) if sum(map(len, usable)) < 400 else usable[0]
    answer = re.sub(r":[\w:]+:`~?([^`]+)`", r"`\1`", answer).replace("``", "`")
    if not (
        20 <= len(answer) <= MAX_ANSWER and answer.isascii() and answer[0].isalpha() and " " in answer
    ):
        return ""
    return answer if answer.endswith((".", "!", ":")) else answer + "."


def _ask_purpose(name: str, summary: str, rng: random.Random) -> Pair:
    verb, _, rest = summary.partition(" ")
    answer = summary
    if verb.lower() in _VERBS and rng.random() < 0.6:
        answer = f"`{name}` {third_person(verb.lower())} {rest}"
    return rng.choice(_PURPOSE_FORMS).format(name=name), answer


def third_person(verb: str) -> str:
    """Return the verb as it follows a name."""
    if verb.endswith(("s", "x", "ch", "sh")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def _is_short(node: ast.FunctionDef) -> bool:
    return (node.end_lineno or 0) - node.lineno <= MAX_FUNCTION_LINES + 12 and len(node.body) > 1


def _ask_to_write(node: ast.FunctionDef, text: str, rng: random.Random) -> Pair:
    sentence = " ".join(re.split(r"\n\s*\n|(?<=\.)\s", text)[0].split()).replace("``", "`")
    verb, _, rest = sentence.partition(" ")
    lower = verb.lower()
    if lower in _VERBS:
        question = rng.choice(_IMPERATIVE_FORMS).format(name=node.name, task=f"{lower} {rest}")
    elif lower.endswith("s") and lower.removesuffix("s") in _VERBS:
        question = rng.choice(_WRITE_FORMS).format(name=node.name, task=f"{lower} {rest}")
    else:
        question = f"Write a Python function `{node.name}`: {sentence}"
    return question, f"```python\n{_unparse(node, with_docstring=rng.random() < 0.4)}\n```"


def _ask_what_code_does(node: ast.FunctionDef, summary: str, rng: random.Random) -> Pair:
    return rng.choice(_CODE_FORMS).format(code=_unparse(node, with_docstring=False)), summary


def _unparse(node: ast.FunctionDef, *, with_docstring: bool) -> str:
    body = node.body if with_docstring else node.body[1:]
    fields = {name: getattr(node, name) for name in node._fields}
    return ast.unparse(
        ast.FunctionDef(**(fields | {"body": body, "decorator_list": []}), lineno=node.lineno)
    )


# --- documentation --------------------------------------------------------------------------------


def _mine_sections(text: str, rng: random.Random) -> Iterator[Pair]:
    for match in re.finditer(r"(?:^|\n)([A-Z][^\n]{3,60})\n[=\-~^*]{4,}\n\n+((?:[^\n]+\n)+)", text):
        topic, paragraph = match[1].strip(), " ".join(match[2].split())
        if is_prose(paragraph) and re.fullmatch(r"[\w `'\-,()]+", topic):
            yield rng.choice(_TOPIC_FORMS).format(topic=topic), paragraph.replace("``", "`")


def _mine_glossary(text: str, rng: random.Random) -> Iterator[Pair]:
    pattern = r"\n {3}(\S[^\n]*)\n((?: {6}[^\n]+\n|\n(?= {6}))+)"
    for match in re.finditer(pattern, text):
        term = match[1].strip("`")
        answer = " ".join(match[2].split("\n\n")[0].split()).replace("``", "`")
        if is_prose(answer):
            article = "an" if term[0] in "aeiouAEIOU" else "a"
            for form in rng.sample(_TERM_FORMS, 3):
                yield form.format(term=term, article=article), answer


def is_prose(text: str) -> bool:
    """Tell a paragraph of English from directives, lists and code."""
    words = text.split()
    return (
        60 <= len(text) <= MAX_ANSWER
        and text.isascii()
        and text[0].isalpha()
        and text.endswith(".")
        and not re.search(r"::|\.\. |\|\w+\||`_|[{}<>]|^\W", text)
        and sum(word.isalpha() and word.islower() for word in words) > 0.5 * len(words)
    )
