"""Which kernel computes an operation on a card, by its shape and the number of tokens.

Entries are measured: those of this machine (`tune`) go before those that are shipped in `configs/`.  A
shape that is in neither takes what the nearest shape of its kind takes, where that divides it evenly.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from core.errors import ConfigError
from plugins.quant.dense.operation import TOKENS_OF_VECTOR, KernelConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from plugins.quant.dense.operation import Operation

MAX_TOKENS: Final = 64
"""Beyond that many, the library's products are at the limit of the card."""
MAX_DISTANCE: Final = 2.0
"""How far a shape may be from a measured one to be served like it, see `_distance`."""
SHIPPED: Final = Path(__file__).parent / "configs"
SAME_CARDS: Final = {(9, 0): "NVIDIA H200"}
"""Whose entries hold for all cards of a compute capability that have none of their own."""
MIN_BLOCK_K: Final = 256
"""What a warp loads at once."""

LIBRARY: Final = KernelConfig("library")


class Card(NamedTuple):
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]

    @property
    def can_overlap(self) -> bool:
        """Whether kernels can start while the one before still runs, and have a copy engine."""
        return self.capability >= (9, 0)


class Entry(NamedTuple):
    """A measured choice."""

    kind: str
    """See `Operation.kind`."""
    outputs: int
    inputs: int
    tokens: int
    """The most that it is for."""
    config: KernelConfig


class Table:
    """Entries of a card."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_shape: dict[tuple[str, int, int], dict[int, KernelConfig]] = {}
        for kind, outputs, inputs, tokens, config in entries:
            self._by_shape.setdefault((kind, outputs, inputs), {})[tokens] = config

    def choose(self, op: Operation, num_tokens: int) -> KernelConfig:
        """Choose the configuration of an operation."""
        if num_tokens > MAX_TOKENS:
            return LIBRARY
        # A sum onto the stream costs what a plain product does.
        kind = "residual" if op.kind == "plain" else op.kind
        for known in (op.kind, kind):
            config = _for_tokens(self._by_shape.get((known, op.num_outputs, op.num_inputs)), num_tokens)
            if config is not None:
                return config
        near = min(
            (shape for shape in self._by_shape if shape[0] == kind),
            key=lambda shape: _distance(op, shape),
            default=None,
        )
        if near is not None and _distance(op, near) <= MAX_DISTANCE:
            config = _for_tokens(self._by_shape[near], num_tokens)
            if config is not None and _divides(op, config):
                return config
        return guess(op, num_tokens)


def _for_tokens(configs: Mapping[int, KernelConfig] | None, num_tokens: int) -> KernelConfig | None:
    enough = [tokens for tokens in configs or () if tokens >= num_tokens]
    return configs[min(enough)] if configs and enough else None


def _distance(op: Operation, shape: tuple[str, int, int]) -> float:
    """Doublings from one shape to the other: of the size, and of the inputs."""
    _, outputs, inputs = shape
    size = math.log2(op.num_outputs * op.num_inputs / (outputs * inputs))
    return abs(size) + abs(math.log2(op.num_inputs / inputs))


def _divides(op: Operation, config: KernelConfig) -> bool:
    if config.kernel == "library":
        return True
    return (
        op.num_inputs % (config.block_k * config.split_k) == 0 and op.num_outputs % config.block_n == 0
    )


def guess(op: Operation, num_tokens: int) -> KernelConfig:
    """Choose where nothing was measured: the kernel without tensor cores, or the library."""
    if num_tokens > TOKENS_OF_VECTOR[-1]:
        return LIBRARY
    tokens = next(tokens for tokens in TOKENS_OF_VECTOR if tokens >= num_tokens)
    block_k = math.gcd(op.num_inputs, 4096)
    if block_k < MIN_BLOCK_K:
        block_k = 1024
    rows = 4 if tokens == 1 else 2
    return KernelConfig(
        "vector",
        block_m=tokens,
        block_n=rows // 2 if op.activation else rows,
        block_k=block_k,
        num_warps=min(max(block_k // 512, 1), 8),
    )


@functools.cache
def table_of(card: Card) -> Table:
    """Read what is known of a card.

    :raises ConfigError: a file is malformed.
    """
    shipped = SHIPPED / f"{card.name}.json"
    if not shipped.exists():
        shipped = SHIPPED / f"{SAME_CARDS.get(card.capability)}.json"
    files = (shipped, tuned_file(card))
    return Table(entry for file in files if file.exists() for entry in read_entries(file))


def tuned_file(card: Card) -> Path:
    """Where the entries measured on this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cythera" / "tuning" / "dense" / f"{card.name}.json"


def read_entries(file: Path) -> list[Entry]:
    """Read a file that `write_entries` wrote.

    :raises ConfigError: it is malformed.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return [Entry(**{**row, "config": KernelConfig(**row["config"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is malformed ({error}); delete it or run `tune` again") from error


def write_entries(file: Path, entries: Iterable[Entry]) -> None:
    """Write entries, one a line."""
    rows = [json.dumps({**entry._asdict(), "config": _shorten(entry.config)}) for entry in entries]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"entries": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


def _shorten(config: KernelConfig) -> dict[str, Any]:
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or value != default
    }
