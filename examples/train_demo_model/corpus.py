"""What of the sources becomes training text: filters, tidying, duplicates and the held-out files."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

HELD_OUT_ONE_IN: Final = 100
MIN_BYTES: Final = 300
MAX_BYTES: Final = 300_000

_UNWANTED_PATH: Final = re.compile(
    r"(^|/)(tests?|testing|test_[^/]*|[^/]*_test|conftest|locales?|i18n|_?vendor(ed)?|_vendored?|extern(al)?s?"
    r"|site-packages|lib2to3|idlelib|encodings|pydoc_data|turtledemo|ensurepip|migrations|generated|_static"
    r"|node_modules|fixtures|[^/]*_pb2|[^/]*lextab|[^/]*yacctab|_version|licen[cs]es?|copying|copyright|notice"
    r"|authors|contributors|credits|thanks|requirements[^/]*|changelog[^/]*|changes[^/]*|history|news[^/]*"
    r"|whats[_-]new[^/]*|release[^/]*|sources|top_level|entry_points|robots|[^/]*\.(dist|egg)-info"
    r"|[^/]*[_-]tables?|unicodedata|lm_models|[^/]*prober)(/|\.(py|rst|md|txt)|$)",
    re.IGNORECASE,
)
_DOCS_PATH: Final = re.compile(
    r"(\.rst|\.md|\.rst\.txt|\.md\.txt|(^|/)(docs?|html|rst|howto|_sources)/.*\.txt)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Document:
    """One file of a source; `kind` is `code`, `docs` or `chat`."""

    kind: str
    source: str
    path: str
    text: str

    @property
    def digest(self) -> int:
        """A number that depends on nothing but where the text comes from and what it says."""
        data = f"{self.source}\0{self.path}\0{self.text}".encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

    @property
    def is_held_out(self) -> bool:
        """Whether the document measures the model instead of training it."""
        return self.digest % HELD_OUT_ONE_IN == 0


def make_document(source: str, path: str, text: str) -> Document | None:
    """Return the tidied document, or `None` if the file is not worth reading."""
    if _UNWANTED_PATH.search(path):
        return None
    if path.endswith(".py"):
        kind, text = "code", tidy_code(text)
    elif _DOCS_PATH.search(path):
        kind, text = "docs", tidy_docs(text)
    else:
        return None
    return Document(kind, source, path, text) if is_worth_reading(text) else None


def is_worth_reading(text: str) -> bool:
    """Tell English prose and hand-written code from tables, dumps, other languages and boilerplate."""
    size = len(text)
    if not MIN_BYTES <= size <= MAX_BYTES:
        return False
    lines = text.splitlines()
    num_ascii = sum(map(str.isascii, text))
    num_letters = len(re.findall(r"[A-Za-z]", text))
    ratio = len(zlib.compress(text.encode(), 6)) / size
    return (
        num_ascii >= 0.98 * size
        and num_letters >= 0.45 * size
        and max(map(len, lines)) <= 600
        and size <= 90 * len(lines) + 4000
        and 0.12 <= ratio <= 0.62
    )


def tidy_code(text: str) -> str:
    """Drop a leading licence notice, tabs, and space at the ends of lines."""
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    end = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    head = "\n".join(lines[:end])
    if re.search(r"licen[cs]e|copyright|coding[:=]|^#!", head, re.IGNORECASE):
        lines = lines[end:]
    return _join(lines)


def tidy_docs(text: str) -> str:
    """Spell reStructuredText roles as plain literals, and drop comments, targets and substitutions."""
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]+?)\s*(<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line.rstrip() for line in text.expandtabs(4).splitlines()]
    unwanted = re.compile(
        r"\s*\.\. (_[^ ]*:|\||index::|-\*-|sectionauthor|moduleauthor|currentmodule)|\s*\[!\["
    )
    return _join([line for line in lines if not unwanted.match(line)])


def _join(lines: list[str]) -> str:
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


@dataclass(slots=True)
class DuplicateFilter:
    """Remembers the lines of all documents that it let pass, and refuses those that add little.

    :param max_known: the share of a document's longer lines that may have been seen before.
    """

    max_known: float = 0.5
    _seen: set[int] = field(default_factory=set)

    def admit(self, document: Document) -> bool:
        """Return whether the document is new; if so, remember it."""
        lines = {hash(line.strip()) for line in document.text.splitlines() if len(line.strip()) >= 24}
        if lines and len(lines & self._seen) > self.max_known * len(lines):
            return False
        self._seen |= lines
        return bool(lines)


def cap_sources(documents: list[Document], max_bytes: Mapping[str, int]) -> list[Document]:
    """Keep at most so many bytes of each kind of document, chosen by hash, so that no source dominates."""
    used: Counter[str] = Counter()
    kept = []
    for document in sorted(documents, key=lambda document: document.digest):
        used[document.kind] += len(document.text)
        if used[document.kind] <= max_bytes[document.kind]:
            kept.append(document)
    return kept
