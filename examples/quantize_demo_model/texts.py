"""Two texts for the demo model: one of what it was trained with, one of files that were held out."""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FILES: Final = {"calibration.txt": "train.bin.xz", "heldout.txt": "heldout.bin.xz"}
"""What is written, and the stream of `examples/train_demo_model` that it is taken from."""
PIECE_LEN: Final = 1024
"""Tokens that stay together."""
TRAINING: Final = Path(__file__).parents[1] / "train_demo_model"
MAX_FILE_TOKENS: Final = 4000
"""Of one installed file, so that many are there."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="what train_demo_model/prepare.py wrote")
    source.add_argument(
        "--installed",
        metavar="A,B",
        help="Python code instead: the standard library, and these installed packages",
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


def find_code(packages: Sequence[str]) -> dict[str, list[str]]:
    """Collect code that is installed here, divided as the training divides: by hash of each file.

    :return: the files of each text, in an order that is always the same.
    """
    sys.path.insert(0, str(TRAINING))
    import corpus  # noqa: PLC0415  of the other example
    import fetch  # noqa: PLC0415

    library = fetch.standard_library()
    files = [
        (library.name, path, text)
        for path, text in fetch.read_texts(library)
        if not path.startswith("site-packages")
    ]
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"--installed {name}: no such package is installed")
        folder = Path(found.submodule_search_locations[0])
        for file in sorted(folder.rglob("*.py")):
            relative = str(file.relative_to(folder.parent))
            files.append((name, relative, file.read_text(encoding="utf-8", errors="replace")))
    documents = [document for file in files if (document := corpus.make_document(*file))]
    random.Random(0).shuffle(documents)
    return {
        "calibration.txt": [d.text for d in documents if not d.is_held_out],
        "heldout.txt": [d.text for d in documents if d.is_held_out],
    }


def write_code(packages: Sequence[str], out: Path, num_tokens: int) -> None:
    """Write the beginnings of many files, up to about `num_tokens` tokens in each text."""
    from core.demo import find_model  # noqa: PLC0415  only this way needs the bundled tokenizer

    tokenizer = Tokenizer.from_file(str(Path(find_model("demo")) / "tokenizer.json"))
    for name, texts in find_code(packages).items():
        pieces, count = [], 0
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids[:MAX_FILE_TOKENS]
            pieces.append(tokenizer.decode(ids))
            count += len(ids)
            if count >= num_tokens:
                break
        (out / name).write_text("\n".join(pieces), encoding="utf-8")
        print(f"{out / name}: {count} tokens of {len(pieces)} files")


def main() -> None:
    """Write both texts."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.installed is not None:
        write_code(list(filter(None, args.installed.split(","))), args.out, args.num_tokens)
        return
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    for name, stream in FILES.items():
        tokens = np.frombuffer(lzma.decompress((args.data / stream).read_bytes()), "<u2")
        pieces = take_pieces(tokens, args.num_tokens)
        text = "\n".join(map(tokenizer.decode, pieces.tolist()))
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{args.out / name}: {pieces.size} tokens")


if __name__ == "__main__":
    main()
