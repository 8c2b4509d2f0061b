"""The pages of `docs/`, taken apart into blocks, for the tests in `tests/docs`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs"
PAGES = sorted(FOLDER.glob("*.md"))
MARK = re.compile(r"<!-- ([a-z ]+?)(?:: (.*))? -->")
MARKS = {"file", "exit", "raises", "not run", "message"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    A comment before it says what becomes of it: `<!-- file: NAME -->` is written to a file,
    `<!-- exit: 3 -->` ends with that code, `<!-- raises: NAME -->` raises, `<!-- not run: WHY -->` is
    only read, `<!-- message -->` is something that the code says.  A `text` block behind a block that
    runs is what that prints; in it, `…` stands for anything.
    """

    page: Path
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)
    output: str | None = None

    def __str__(self):
        return f"{self.page.stem}:{self.line}"


def read_blocks(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, marks, number = [], {}, 0
    while number < len(lines):
        line = lines[number]
        if mark := MARK.fullmatch(line):
            marks[mark[1]] = mark[2] or ""
        elif line.startswith("```"):
            end = lines.index("```", number + 1)
            code = "\n".join(lines[number + 1 : end]) + "\n"
            blocks.append(Block(page, number + 1, line[3:], code, marks))
            marks, number = {}, end
        elif line:
            marks = {}
        number += 1
    return list(join_outputs(blocks))


def join_outputs(blocks):
    """Join a block with what it prints."""
    previous = None
    for block in blocks:
        if block.language == "text" and "message" not in block.marks:
            assert previous, f"{block} is the output of nothing"
            previous = dataclasses.replace(previous, output=block.code)
            continue
        if previous:
            yield previous
        previous = block
    if previous:
        yield previous


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def to_pattern(output):
    """Make a regular expression of an output in which `…` stands for anything.

    Columns of tables are as wide as their content, which depends on the machine, so blanks are equal
    to any number of blanks.
    """
    lines = []
    for line in output.strip().splitlines():
        if line.strip() == "…":
            lines.append(r"(?s:.*?)")
            continue
        words = [".*?".join(map(re.escape, word.split("…"))) for word in line.split()]
        lines.append(r"^[ ]*" + "[ ]+".join(words) + r"[ ]*$")
    return re.compile(r"\n*".join(lines), re.MULTILINE)
