"""Conversations for training: questions written by hand, and those that were mined."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vocab import render_chat

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

QUESTIONS: Final = Path(__file__).with_name("questions.toml")
SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a small demo model of cythera.",
    "You answer questions about Python.",
    "You are a helpful coding assistant. Answer briefly.",
    "Answer the user's question.",
)
SHARE_WITH_SYSTEM: Final = 0.25
SHARE_WITH_GREETING: Final = 0.08

_SUFFIXES: Final = ("", "", " Please.", " Give an example.", " Be brief.")


class Questions:
    """The questions written by hand, in all their forms.

    :param path: a TOML file with `[[small_talk]]` (`ask`, `answer`: lists of equal standing),
        `[[howto]]` (`task`, `answer`, `code`) and `[[fact]]` (`ask`, `answer`).
    """

    def __init__(self, path: Path = QUESTIONS) -> None:
        self._table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))

    def greeting(self, rng: random.Random) -> tuple[str, str]:
        """Return a greeting or a question about the model itself, and an answer."""
        entry = rng.choice(self._table["small_talk"])
        return _vary(rng.choice(entry["ask"]), rng), rng.choice(entry["answer"])

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Return any question in any of its forms, and its answer."""
        kind = rng.choices(("howto", "fact", "small_talk"), (5, 4, 2))[0]
        if kind == "small_talk":
            return self.greeting(rng)
        entry = rng.choice(self._table[kind])
        if kind == "fact":
            return _vary(rng.choice(entry["ask"]), rng), entry["answer"]
        question = rng.choice(self._table["howto_forms"]).format(task=entry["task"])
        return _vary(question, rng), f"{entry['answer']}\n\n```python\n{entry['code'].strip()}\n```"


def _vary(question: str, rng: random.Random) -> str:
    """Change what people change without meaning anything by it."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    elif len(question) > 25:
        question += rng.choice(_SUFFIXES)
    return question


def make_conversations(
    mined: list[tuple[str, str]], num_written: int, rng: random.Random
) -> Iterator[str]:
    """Yield rendered conversations: every mined pair once, and so many pairs that were written by hand."""
    questions = Questions()
    pairs = mined + [questions.draw(rng) for _ in range(num_written)]
    rng.shuffle(pairs)
    position = 0
    while position < len(pairs):
        turns = rng.choices((1, 2, 3), (5, 3, 1))[0]
        chosen = pairs[position : position + turns]
        position += turns
        if rng.random() < SHARE_WITH_GREETING:
            chosen = [questions.greeting(rng), *chosen]
        yield render_chat(_messages(chosen, rng))


def _messages(pairs: list[tuple[str, str]], rng: random.Random) -> Iterator[dict[str, str]]:
    if rng.random() < SHARE_WITH_SYSTEM:
        yield {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
    for question, answer in pairs:
        yield {"role": "user", "content": question}
        yield {"role": "assistant", "content": answer}
