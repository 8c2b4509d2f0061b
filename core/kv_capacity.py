"""How many KV blocks fit on a device: what nothing else needs, found by measuring instead of guessing."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import structlog
import torch

from core.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from core.plan import Plan

log = structlog.get_logger(__name__)

CPU_MEMORY_SHARE: Final = 0.25
"""Of the machine's memory, at most, for the KV cache."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that an engine takes beside its weights and its KV cache."""

    activations: int
    graphs: int
    sampler: int


def count_kv_blocks(plan: Plan, block_bytes: int, free_bytes: Callable[[], float]) -> int:
    """Count the blocks, the null block included.

    :param block_bytes: of one block over all layers of a rank.
    :param free_bytes: asked if no setting says how large the cache shall be.
    :raises CapacityError: not even one sequence of the context length that was asked for fits.
    """
    config = plan.config
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks + 1
    budget = int(config.kv_cache_memory_bytes or free_bytes())
    most_useful = -(-plan.max_model_len // plan.block_size) * config.max_num_seqs + 1
    num_blocks = min(budget // block_bytes, most_useful)
    asked = config.max_model_len or plan.block_size
    needed = -(-asked // plan.block_size) + 1
    if num_blocks < needed:
        raise CapacityError(
            f"a sequence of {asked} tokens needs {needed} KV blocks of {block_bytes} "
            f"bytes, but {budget} bytes hold {num_blocks}; lower --max-model-len, or raise "
            f"--kv-cache-memory-bytes or --gpu-memory-utilization"
        )
    return num_blocks


def free_bytes(device: torch.device, share: float, measure: Callable[[], Needs]) -> int:
    """Return the bytes that the KV cache may take.

    :param share: of a GPU's memory, for everything that is on it.
    :param measure: runs what an engine runs.
    """
    if device.type != "cuda":
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(machine * CPU_MEMORY_SHARE)
    needs = measure()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    limit, in_use = int(total * share), total - free
    available = limit - in_use - needs.activations - needs.graphs - needs.sampler
    log.info("device memory", limit=limit, in_use=in_use, **asdict(needs), kv_cache=available)
    return available


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Return the bytes that a call needs for a while on a GPU."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    # What is reserved counts, not what is allocated: gaps between tensors are lost for others.
    return torch.cuda.max_memory_reserved(device) - before
