"""Which kernel computes an operation on a card, by its shape and the number of tokens.

Entries are measured: those of this machine (`tune`) go before those that are shipped in `configs/`.  A
shape that is in neither takes what the nearest shape of its kind takes, in tiles that divide it evenly.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from core.errors import ConfigError
from plugins.quant.dense.operation import FOR_ANY_TOKENS, FUSED_GATES, Kernel, KernelConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from plugins.quant.dense.operation import Operation

MAX_TOKENS: Final = 64
"""Beyond that many, the library's products are at the limit of the card."""
MAX_TUNED: Final = 1024
"""Most tokens of an entry: of gates there are some for more than MAX_TOKENS."""
MAX_DISTANCE: Final = 2.0
"""How far a shape may be from a measured one to be served just like it, see `_distance`."""
SHIPPED: Final = Path(__file__).parent / "configs"
SAME_CARDS: Final = {(9, 0): "NVIDIA H200"}
"""Whose entries hold for all cards of a compute capability that have none of their own."""
MIN_BLOCK_K: Final = 256
"""What a warp loads at once."""
MIN_TILE: Final = 64
"""Rows and columns of a weight's tile: what tensor cores take, and a full line of memory."""

LIBRARY: Final = KernelConfig("library")
FUSED: Final = KernelConfig("fused")
"""What gates of many tokens are where nothing was measured."""


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
        self._of_many: dict[tuple[str, int, int], dict[int, KernelConfig]] = {}
        for kind, outputs, inputs, tokens, config in entries:
            by_shape = self._by_shape if tokens <= MAX_TOKENS else self._of_many
            by_shape.setdefault((kind, outputs, inputs), {})[tokens] = config

    def choose(self, op: Operation, num_tokens: int) -> KernelConfig:
        """Choose the configuration of an operation."""
        if num_tokens > MAX_TOKENS:
            return self._choose_for_many(op, num_tokens)
        if num_tokens < 1:
            return LIBRARY
        # A sum onto the stream costs what a plain product does.
        kind = "residual" if op.kind == "plain" else op.kind
        for known in (op.kind, kind):
            config = _for_tokens(self._by_shape.get((known, op.num_outputs, op.num_inputs)), num_tokens)
            if config is not None:
                return config
        return self._like_nearest(op, kind, num_tokens) or guess(op, num_tokens)

    def _choose_for_many(self, op: Operation, num_tokens: int) -> KernelConfig:
        """Choose for more tokens than tiles are for; only of gates there is more than one way."""
        if not op.activation:
            return LIBRARY
        shape = op.kind, op.num_outputs, op.num_inputs
        return _for_tokens(self._of_many.get(shape), num_tokens) or FUSED

    def _like_nearest(self, op: Operation, kind: str, num_tokens: int) -> KernelConfig | None:
        """Take over what the nearest shape of the kind has; `None` if that does not suit."""
        shapes = [
            shape
            for shape, configs in self._by_shape.items()
            if shape[0] == kind and _for_tokens(configs, num_tokens) is not None
        ]
        near = min(shapes, key=lambda shape: _distance(op, shape), default=None)
        config = None if near is None else _for_tokens(self._by_shape[near], num_tokens)
        if near is None or config is None:
            return None
        if _distance(op, near) <= MAX_DISTANCE and _divides(op, config):
            return config
        return shrink(op, config) if num_tokens > 1 else None


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


def shrink(op: Operation, config: KernelConfig) -> KernelConfig | None:
    """Halve a measured tile, or the parts of its sum, until the shape is a multiple of it.

    :return: `None` if that takes tiles that are too small to be fast.
    """
    if config.kernel != "tile":
        return config if _divides(op, config) else None
    block_n, block_k, split_k = config.block_n, config.block_k, config.split_k
    while op.num_outputs % block_n and block_n > MIN_TILE:
        block_n //= 2
    while op.num_inputs % block_k and block_k > MIN_TILE:
        block_k //= 2
    while op.num_inputs % (block_k * split_k) and split_k > 1:
        split_k //= 2
    smaller = replace(config, block_n=block_n, block_k=block_k, split_k=split_k)
    return smaller if _divides(op, smaller) else None


def guess(op: Operation, num_tokens: int) -> KernelConfig:
    """Choose where nothing was measured: for one token the kernel without tensor cores.

    With several accumulators that kernel loses to the library in nearly all shapes that were measured.
    """
    if num_tokens > 1:
        return LIBRARY
    block_k = math.gcd(op.num_inputs, 4096)
    if block_k < MIN_BLOCK_K:
        block_k = 1024
    return KernelConfig(
        "vector",
        block_n=2 if op.activation else 4,
        block_k=block_k,
        num_warps=min(max(block_k // 512, 1), 8),
    )


@functools.cache
def table_of(card: Card) -> Table:
    """Read what is known of a card.

    :raises ConfigError: a file is malformed.
    """
    files = (shipped_file(card), tuned_file(card))
    return Table(entry for file in files if file.exists() for entry in read_entries(file))


def shipped_file(card: Card) -> Path:
    """Where the entries that come with the package are, if there are any."""
    own = SHIPPED / f"{card.name}.json"
    same = SAME_CARDS.get(card.capability)
    return own if own.exists() or same is None else SHIPPED / f"{same}.json"


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
        entries = [Entry(**{**row, "config": KernelConfig(**row["config"])}) for row in rows]
        for entry in entries:
            _check(entry)
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is malformed ({error}); delete it or run `tune` again") from error
    return entries


def _check(entry: Entry) -> None:
    """Refuse what would leave tokens out, or could not be launched.

    :raises ValueError: says what is wrong.
    """
    config = entry.config
    if not 0 < entry.tokens <= MAX_TUNED:
        raise ValueError(f"{entry.tokens} tokens are not between 1 and {MAX_TUNED}")
    if config.kernel not in get_args(Kernel):
        raise ValueError(f"kernel {config.kernel!r} is none of {', '.join(get_args(Kernel))}")
    if config.kernel in FOR_ANY_TOKENS:
        if config.kernel in FUSED_GATES and (entry.kind != "gate" or entry.tokens <= MAX_TOKENS):
            raise ValueError(f"{config.kernel!r} is for gates of more than {MAX_TOKENS} tokens")
        return
    if entry.tokens > MAX_TOKENS:
        raise ValueError(f"{config.kernel!r} is for at most {MAX_TOKENS} tokens, not {entry.tokens}")
    if config.block_m < entry.tokens:
        raise ValueError(f"{entry.tokens} tokens do not fit into tiles of {config.block_m}")
    sizes = (config.block_m, config.block_n, config.block_k, config.num_warps)
    if any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"sizes {sizes} are not all powers of two")
    if config.split_k < 1 or config.num_stages < 1:
        raise ValueError(f"split_k {config.split_k} and num_stages {config.num_stages} start at 1")


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
