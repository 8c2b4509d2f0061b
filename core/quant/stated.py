"""Where a checkpoint says how it is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from core.errors import CheckpointError

_KEYS: Final = ("quantization_config", "compression_config")  # the latter in older checkpoints
_SIDE_FILES: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json that older tools wrote, and the method that each of them means."""


def find_quantization(hf_config: Any, path: str, revision: str | None = None) -> dict[str, Any]:
    """Find a checkpoint's `quantization_config`: in config.json, in its text part, or in a file of its own.

    :param hf_config: of `transformers`, or config.json as it is stored.
    :param path: folder, or name of a repository whose files have been fetched before.
    :return: the config as the checkpoint has it, with `quant_method`; empty if it is not quantized.
    :raises CheckpointError: the file beside config.json is malformed.
    """
    for config in (hf_config, _get(hf_config, "text_config")):
        for key in _KEYS:
            stated = _get(config, key)
            if stated:
                return dict(stated if isinstance(stated, dict) else stated.to_dict())
    for name, method in _SIDE_FILES.items():
        file = _find_file(path, name, revision)
        if file is not None:
            return {"quant_method": method, **_read(file)}
    return {}


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _find_file(path: str, name: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        file = Path(path, name)
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  folders do without

    found = try_to_load_from_cache(path, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(stated, dict):
        raise CheckpointError(f"{file} holds no table")
    return stated
