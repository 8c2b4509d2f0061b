"""Collect freely licensed text, train the tokenizer on it, and write what `train.py` reads."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from chat import make_conversations
from corpus import Document, DuplicateFilter, cap_sources, make_document
from fetch import Source, fetch_all, load_table, read_texts, standard_library
from mining import mine
from storage import HELD_OUT, MANIFEST, TRAIN, write_json, write_tokens
from vocab import BOS_ID, EOS_ID, save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

KINDS: Final = ("docs", "code", "chat")
TOKENIZER_MB: Final = 24
ENCODE_CHUNK: Final = 512
NUM_DOCS_COPIES: Final = 2
"""Documentation is scarcer than code, so the training stream holds it so many times."""
WRITTEN_SHARE: Final = 0.25
"""Pairs written by hand, as a share of those that were mined; they come back in several forms."""
MIN_WRITTEN: Final = 2000
"""At least so many pairs are written by hand."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder for downloads, kept between runs")
    parser.add_argument("--folder", type=Path, help="read this folder of texts and download nothing")
    parser.add_argument("--out", type=Path, required=True, help="folder for the prepared data")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--docs-mb", type=float, default=4.0, help="most documentation of a source")
    parser.add_argument(
        "--code-mb", type=float, default=0.8, help="most code of a source; Python's own is not cut"
    )
    parser.add_argument(
        "--chat-share", type=float, default=0.13, help="most mined chat, as a share of the text"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.cache is None) == (args.folder is None):
        parser.error("give either --cache or --folder")
    return args


def find_sources(args: argparse.Namespace) -> list[Source]:
    """Return what is to be read, fetched."""
    if args.folder is not None:
        return [Source("folder", args.folder.name, "unknown", args.folder)]
    return [standard_library(), *fetch_all(load_table(), args.cache)]


def is_python_itself(source: Source | Document) -> bool:
    """Tell Python's own library and documentation from packages."""
    name = source.name if isinstance(source, Source) else source.source
    return name.startswith(("cpython", "python3"))


def read_documents(source: Source) -> list[Document]:
    """Return the documents of one source that are worth reading."""
    found = (make_document(source.name, path, text) for path, text in read_texts(source))
    return [document for document in found if document is not None]


def collect(sources: list[Source], max_bytes: dict[str, int]) -> list[Document]:
    """Read all sources, drop duplicates, and cap what each gives; Python's own comes first and whole.

    :param max_bytes: for each kind of document, the most that one source may give.
    """
    with ProcessPoolExecutor() as pool:
        per_source = list(pool.map(read_documents, sources))
    duplicates = DuplicateFilter()
    order = sorted(
        zip(sources, per_source, strict=True), key=lambda pair: not is_python_itself(pair[0])
    )
    kept = []
    for source, documents in order:
        admitted = [document for document in documents if duplicates.admit(document)]
        kept += admitted if is_python_itself(source) else cap_sources(admitted, max_bytes)
    return kept


def make_chat(documents: list[Document], share: float, rng: random.Random) -> list[Document]:
    """Make conversations out of documents and of the questions written by hand."""
    sources = [document for document in documents if not document.is_held_out]
    with ProcessPoolExecutor() as pool:
        mined = list(pool.map(mine, sources, chunksize=64))
    pairs = _choose_pairs(sources, mined, share * sum(len(d.text) for d in documents), rng)
    num_written = max(MIN_WRITTEN, int(WRITTEN_SHARE * len(pairs)))
    texts = make_conversations(pairs, num_written, rng)
    return [Document("chat", "chat", str(i), text) for i, text in enumerate(texts)]


def _choose_pairs(
    documents: list[Document], mined: list[list[tuple[str, str]]], limit: float, rng: random.Random
) -> list[tuple[str, str]]:
    """Take the pairs about Python itself first, then others as long as there is room."""
    tagged = [
        (not is_python_itself(document), rng.random(), pair)
        for document, pairs in zip(documents, mined, strict=True)
        for pair in dict.fromkeys(pairs)
    ]
    chosen, used = [], 0
    for _, _, pair in sorted(tagged):
        used += len(pair[0]) + len(pair[1]) + 40
        if used > limit:
            break
        chosen.append(pair)
    return chosen


def sample_for_tokenizer(documents: list[Document]) -> Iterator[str]:
    """Yield texts until there is enough to learn merges from."""
    used = 0
    for document in documents:
        if used > TOKENIZER_MB * 1e6:
            return
        used += len(document.text)
        yield document.text


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[NDArray[np.uint16]]:
    """Yield the ids of each document, between the tokens that begin and end a text."""
    for i in range(0, len(documents), ENCODE_CHUNK):
        texts = [document.text for document in documents[i : i + ENCODE_CHUNK]]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([BOS_ID, *encoding.ids, EOS_ID], np.uint16)


def write_streams(
    tokenizer: Tokenizer, documents: list[Document], out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Write the training and the held-out stream; return the sizes of each kind.

    The held-out stream has one kind after another, in the order of the list.
    """
    train = [document for document in documents if not document.is_held_out]
    pieces = list(encode(tokenizer, train))
    write_tokens(out / TRAIN, np.concatenate(pieces))
    sizes: dict[str, list[dict[str, Any]]] = {"train": _sizes(train, pieces), "heldout": []}
    streams = []
    for kind in KINDS:
        chosen = [d for d in documents if d.is_held_out and d.kind == kind]
        pieces = list(encode(tokenizer, chosen))
        streams += pieces
        sizes["heldout"] += _sizes(chosen, pieces)
    write_tokens(out / HELD_OUT, np.concatenate(streams) if streams else np.zeros(0, np.uint16))
    return sizes


def _sizes(documents: list[Document], pieces: list[NDArray[np.uint16]]) -> list[dict[str, Any]]:
    num_bytes: Counter[str] = Counter()
    num_tokens: Counter[str] = Counter()
    for document, piece in zip(documents, pieces, strict=True):
        num_bytes[document.kind] += len(document.text.encode())
        num_tokens[document.kind] += len(piece)
    return [
        {"kind": kind, "num_tokens": num_tokens[kind], "num_bytes": num_bytes[kind]}
        for kind in KINDS
        if num_tokens[kind]
    ]


def describe_sources(sources: Iterable[Source], documents: list[Document]) -> list[dict[str, Any]]:
    """Return name, version, licence and size of everything that was read."""
    used: Counter[str] = Counter()
    for document in documents:
        used[document.source] += len(document.text.encode())
    by_name: dict[str, Source] = {}
    for source in sources:
        by_name.setdefault(source.name, source)
    return [
        {"name": name, "version": source.version, "licence": source.licence, "bytes": used[name]}
        for name, source in sorted(by_name.items())
        if used[name]
    ]


def main() -> None:
    """Fetch, filter, mix, encode and write."""
    args = parse_arguments()
    rng = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sources = find_sources(args)
    documents = collect(sources, {"docs": int(args.docs_mb * 1e6), "code": int(args.code_mb * 1e6)})
    rng.shuffle(documents)
    mixed = documents + make_chat(documents, args.chat_share, rng)
    mixed += [d for d in documents if d.kind == "docs" and not d.is_held_out] * (NUM_DOCS_COPIES - 1)
    rng.shuffle(mixed)
    print({kind: sum(len(d.text) for d in mixed if d.kind == kind) for kind in KINDS}, flush=True)
    tokenizer = train_tokenizer(sample_for_tokenizer(mixed), args.vocab_size)
    save_tokenizer(tokenizer, args.out)
    sizes = write_streams(tokenizer, mixed, args.out)
    manifest = {
        "vocab_size": tokenizer.get_vocab_size(),
        **sizes,
        "sources": describe_sources(sources, documents),
    }
    write_json(args.out / MANIFEST, manifest)
    print({"train": sizes["train"], "heldout": sizes["heldout"]})


if __name__ == "__main__":
    main()
