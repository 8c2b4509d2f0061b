"""Which layers a checkpoint's config means: skip lists and targets, as other tools write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeVar

from core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec

REGEX: Final = "re:"
T = TypeVar("T")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a config means a module.

    `re:` begins a regular expression, matched from the start of the name.  Any other pattern is a
    name or a run of whole parts of one: `self_attn` and `layers.1` mean
    `model.layers.1.self_attn.q_proj`, but `layers.1` does not mean `model.layers.10.…`.

    :raises CheckpointError: the regular expression is malformed.
    """
    if pattern.startswith(REGEX):
        try:
            return re.match(pattern.removeprefix(REGEX), name) is not None
        except re.error as error:
            raise CheckpointError(f"{pattern!r} is no regular expression: {error}") from error
    return f".{pattern}." in f".{name}."


def matches_exactly(name: str, pattern: str) -> bool:
    """Whether a pattern is a module's whole name, or `re:` and what matches from the start of it.

    :raises CheckpointError: the regular expression is malformed.
    """
    return matches(name, pattern) if pattern.startswith(REGEX) else name == pattern


def spellings(name: str, model: ModelSpec | None) -> tuple[str, ...]:
    """List a decoder's name and those that the checkpoint may have for it, where the family renames.

    Unlike plain patterns (see `in_decoder`), regular expressions cannot be renamed; they are matched
    with each of these.
    """
    renames = () if model is None else model.renames
    return (
        name,
        *(old + name.removeprefix(new) for old, new in renames if name.startswith(new)),
    )


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of several patterns means a module; see `matches`."""
    return any(matches(name, pattern) for pattern in patterns)


def in_decoder(patterns: Iterable[str], model: ModelSpec) -> tuple[str, ...]:
    """Spell plain patterns as the decoder spells names, where the family renames the checkpoint's."""
    return tuple(_rename(pattern, model) for pattern in patterns)


def _rename(pattern: str, model: ModelSpec) -> str:
    for old, new in model.renames:
        if pattern.startswith(old):
            return new + pattern.removeprefix(old)
    return pattern


def ask_shards(spec: LinearSpec, ask: Callable[[str], T], what: str) -> T:
    """Ask the same of every shard of a layer, by its prefix in the checkpoint.

    :param what: what is asked, for the message.
    :raises CheckpointError: the shards, which are stacked into one layer, do not agree.
    """
    answers = {prefix: ask(prefix) for prefix, _ in spec.shards}
    first, *others = answers.values()
    if any(other != first for other in others):
        told = ", ".join(f"{prefix}: {answer}" for prefix, answer in answers.items())
        raise CheckpointError(f"the parts of {spec.name} must agree on {what}, but are {told}")
    return first
