"""Write the trained model as the files that `transformers` and engines load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file
from storage import write_json
from vocab import BOS_ID, END_ID, EOS_ID, PAD_ID

if TYPE_CHECKING:
    from pathlib import Path

    from model import ModelConfig
    from torch import Tensor, nn

RESULT: Final = "result.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
METADATA: Final = {"format": "pt"}

GENERATION_CONFIG: Final = {
    "bos_token_id": BOS_ID,
    "eos_token_id": [EOS_ID, END_ID],
    "pad_token_id": PAD_ID,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
}


def save_checkpoint(
    model: nn.Module, config: ModelConfig, result: dict[str, Any], folder: Path, max_shard_mb: float
) -> None:
    """Write configuration, bfloat16 weights and the result of the training.

    :param max_shard_mb: larger weights are split into files of at most so many million bytes, with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_hf())
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / RESULT, result)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    shards = split_tensors(tensors, max_shard_mb)
    if len(shards) == 1:
        save_file(tensors, folder / WEIGHTS, metadata=METADATA)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata=METADATA)
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": sum(map(num_bytes, tensors.values()))}, "weight_map": places},
    )


def split_tensors(tensors: dict[str, Tensor], max_shard_mb: float) -> list[dict[str, Tensor]]:
    """Distribute tensors over shards in their order; one that is too large alone gets its own."""
    limit = max_shard_mb * 1e6 if math.isfinite(max_shard_mb) else math.inf
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + num_bytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes(tensor)
    return shards


def num_bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's data."""
    return tensor.numel() * tensor.element_size()
