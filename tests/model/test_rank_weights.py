"""A rank reads its own bytes of a checkpoint, and no others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from recorded_steps import settings_of

from core.assemble import resolve
from core.config import load_config
from core.model.decoder import make_decoder
from core.model.linear import PlainScheme
from core.model.weights import CheckpointReader, load_weights
from core.quant.dense import DenseAttention
from core.testing.simulated_ranks import Meeting, SimulatedTensorParallel

CPU = torch.device("cpu")


@pytest.fixture
def num_elements_read(monkeypatch):
    """Count the elements that are read, by name of the tensor."""
    counts = {}
    read = CheckpointReader.read

    def counting(reader, name, part=()):
        tensor = read(reader, name, part)
        counts[name] = counts.get(name, 0) + math.prod(tensor.shape)
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", counting)
    return counts


def load(plan, rank):
    share, tensor = plan.shares[rank], plan.tensor_parallel_size
    decoder = make_decoder(
        plan.model,
        scheme=PlainScheme(),
        attention=DenseAttention(),
        dtype=torch.float32,
        device=CPU,
        max_len=64,
        share=share,
        tensor=SimulatedTensorParallel(Meeting(tensor), share.tensor_rank) if tensor > 1 else None,
    )
    progress = []
    load_weights(decoder, plan.model_path, device=CPU, report=lambda *done: progress.append(done))
    return decoder, progress[-1][1]


@pytest.mark.parametrize("variant", ["llama3", "llama-bias", "phi3", "gemma2"])
@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_all_ranks_together_read_each_weight_once(variant, mesh, checkpoint, num_elements_read):
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    plan = resolve(load_config({**settings_of(checkpoint(variant)), **sizes})).plan
    num_bytes = [load(plan, rank)[1] for rank in range(plan.world_size)]
    together = dict(num_elements_read)
    num_elements_read.clear()
    whole = replace(plan, shares=(plan.model.whole_share(),), tensor_parallel_size=1)
    _, num_bytes_alone = load(whole, 0)
    for name, count in num_elements_read.items():
        is_shared = "norm" in name  # every rank of a stage has the norms
        has_copies = "k_proj" in name or "v_proj" in name or "qkv_proj" in name  # 3 ranks, 2 KV heads
        copies = mesh[0] if is_shared else 1
        if name.startswith("model.embed_tokens") and plan.model.tied and mesh[1] > 1:
            copies = 2  # the last stage needs it for the logits
        if has_copies and mesh[0] == 3:
            assert count < together[name] < 2 * count
        else:
            assert together[name] == copies * count, name
    assert max(num_bytes) < num_bytes_alone * (0.75 if plan.world_size < 4 else 0.6)
