"""Files that benchmarks write."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def write_json(file: Path, value: Any) -> None:
    """Write a result; folders are made.

    :raises ConfigError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error


def parse_numbers(flag: str, text: str) -> list[float]:
    """Read a list such as `1,2,inf` of positive numbers.

    :param flag: named in messages.
    :raises ConfigError: it is none.
    """
    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} must be numbers, separated by commas") from error
    if not values or any(math.isnan(value) or value <= 0 for value in values):
        raise ConfigError(f"{flag} {text!r} must be positive numbers, separated by commas")
    return values


def parse_counts(flag: str, text: str) -> list[int]:
    """Read a list such as `1,16,64` of whole positive numbers.

    :param flag: named in messages.
    :raises ConfigError: it is none.
    """
    values = parse_numbers(flag, text)
    if not all(value.is_integer() for value in values):
        raise ConfigError(f"{flag} {text!r} must be whole numbers, separated by commas")
    return [int(value) for value in values]


def parse_pairs(flag: str, items: Iterable[str]) -> dict[str, str]:
    """Read a list of `KEY=VALUE`.

    :param flag: named in messages.
    :raises ConfigError: an item has no equals sign.
    """
    pairs = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"{flag} {item!r} must be KEY=VALUE")
        pairs[key.strip()] = value.strip()
    return pairs
