"""Writing a checkpoint: shards that fill up, an index, and a folder that appears only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError
from safetensors.torch import save_file

from core.errors import CheckpointError, ConfigError
from core.model.weights import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

MAX_SHARD_BYTES: Final = 5 * 10**9
CONFIG_FILE: Final = "config.json"
_KEPT_SUFFIXES: Final = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_KEPT_NAMES: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_METADATA: Final = {"format": "pt"}  # transformers reads no file without it


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Lend a folder to fill, which gets its name when all has gone well and vanishes when not.

    A process that is killed leaves it behind under its temporary name, which starts with a dot.

    :param out: must not exist, or be empty.
    :raises ConfigError: it is there already, or cannot be made.
    """
    out = out.absolute()
    check_free(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(out: Path) -> None:
    """Refuse to write where something is.

    :raises ConfigError: `out` is a file, or a folder that holds something.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ConfigError(f"--out {out} is there already and not empty; name a new folder")


class ShardWriter:
    """Writes tensors to files of bounded size, in the order in which they come.

    Holds no more than one file's tensors in memory.

    :param max_bytes: of the tensors in one file; a larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.num_bytes = 0
        """Of all tensors so far."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor.

        :raises CheckpointError: a file cannot be written.
        """
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        # A view would be refused, and keep alive what it is a view of.
        kept = tensor.detach().cpu()
        is_whole = kept.is_contiguous() and kept.untyped_storage().nbytes() == kept.nbytes
        self._pending[name] = kept if is_whole else kept.clone().contiguous()
        self._pending_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, give the files their names, and write the index if there are several.

        :raises CheckpointError: a file cannot be written.
        """
        self._flush()
        count = len(self._shards)
        names = [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
        names = [SINGLE_FILE] if count == 1 else names
        mode = self._folder.stat().st_mode & 0o666  # safetensors lets nobody else read what it writes
        for index, name in enumerate(names):
            self._temporary(index).rename(self._folder / name).chmod(mode)
        if count > 1:
            shards = zip(names, self._shards, strict=True)
            weight_map = {tensor: name for name, tensors in shards for tensor in tensors}
            metadata = {"total_size": self.num_bytes}
            write_json(self._folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})

    def _flush(self) -> None:
        file = self._temporary(len(self._shards))
        try:
            save_file(self._pending, file, metadata=_METADATA)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be written: {error}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, index: int) -> Path:
        return self._folder / f"shard-{index}.partial"


def write_json(file: Path, value: Any) -> None:
    """Write a value as people like to read it.

    :raises CheckpointError: it cannot be written.
    """
    try:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is stored.

    :raises CheckpointError: it is missing or no JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object")
    return config


def write_config(folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
    """Write config.json with a `quantization_config`, all else as it was."""
    write_json(folder / CONFIG_FILE, {**config, "quantization_config": dict(quantization)})


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation defaults, chat template, licence.

    :raises CheckpointError: a file cannot be read or written.
    """
    for file in sorted(source.iterdir()):
        if not file.is_file() or not _is_kept(file.name) or (target / file.name).exists():
            continue
        try:
            shutil.copyfile(file, target / file.name)  # caches hold links, and not ours to share
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be copied: {error}") from error


def _is_kept(name: str) -> bool:
    if name.endswith(".index.json") or name == CONFIG_FILE:
        return False
    return name.endswith(_KEPT_SUFFIXES) or name.upper().startswith(_KEPT_NAMES)
