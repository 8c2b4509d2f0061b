"""Turn the data that the demo model was trained with back into text: to calibrate with, and held out."""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILES: Final = {"calibration.txt": "train.bin.xz", "heldout.txt": "heldout.bin.xz"}
"""What is written, and the stream of `examples/train_demo_model` that it is taken from."""
PIECE_LEN: Final = 1024
"""Tokens that stay together."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="what train_demo_model/prepare.py wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the two texts")
    parser.add_argument("--num-tokens", type=int, default=131072, help="of each text, about")
    return parser.parse_args()


def take_pieces(tokens: NDArray[np.uint16], num_tokens: int) -> NDArray[np.uint16]:
    """Take pieces at equal distances, so that all kinds of text are there: [pieces, PIECE_LEN]."""
    num_there = len(tokens) // PIECE_LEN
    if num_there == 0:
        raise SystemExit(f"{len(tokens)} tokens are less than a piece of {PIECE_LEN}")
    chosen = np.linspace(
        0, num_there, min(num_there, num_tokens // PIECE_LEN), endpoint=False, dtype=int
    )
    return tokens[: num_there * PIECE_LEN].reshape(-1, PIECE_LEN)[chosen]


def main() -> None:
    """Write both texts."""
    args = parse_arguments()
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, stream in FILES.items():
        tokens = np.frombuffer(lzma.decompress((args.data / stream).read_bytes()), "<u2")
        pieces = take_pieces(tokens, args.num_tokens)
        text = "\n".join(map(tokenizer.decode, pieces.tolist()))
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{args.out / name}: {pieces.size} tokens")


if __name__ == "__main__":
    main()
