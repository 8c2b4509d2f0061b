"""The prepared data on disk: token ids as xz-compressed little-endian uint16, and a manifest."""

from __future__ import annotations

import json
import lzma
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TRAIN: Final = "train.bin.xz"
HELD_OUT: Final = "heldout.bin.xz"
MANIFEST: Final = "manifest.json"
TOKEN_DTYPE: Final = np.dtype("<u2")


def write_tokens(path: Path, tokens: NDArray[np.uint16]) -> None:
    """Store token ids; code and prose shrink to about a third of their two bytes a token."""
    path.write_bytes(lzma.compress(tokens.astype(TOKEN_DTYPE).tobytes(), preset=6))


def read_tokens(path: Path) -> NDArray[np.int32]:
    """Load token ids, [tokens]."""
    return np.frombuffer(lzma.decompress(path.read_bytes()), TOKEN_DTYPE).astype(np.int32)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Load what `prepare.py` wrote down about the data."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def write_json(path: Path, value: object) -> None:
    """Write a value as people like to read it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
