"""What a step has to do, known from the model: bytes to move and operations to carry out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from core.plan import Plan


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that one kind of kernel must move in a step, and operations that it must do."""

    num_bytes: float
    num_flops: float


def linear_work(plan: Plan, num_tokens: int, num_sampled: int) -> Work:
    """Count what the matrices of all layers and the head cost.

    :param num_tokens: of the step.
    :param num_sampled: rows that draw a token.
    """
    model = plan.model
    head = model.vocab_size * model.hidden_size
    item = _item_size(plan.dtype)
    num_bytes = plan.layer_bytes * model.num_layers + head * item
    num_flops = 2 * (model.num_linear_parameters() * num_tokens + head * num_sampled)
    return Work(num_bytes, num_flops)


def attention_work(plan: Plan, spans: Iterable[tuple[int, int]]) -> Work:
    """Count what attention costs.

    :param spans: first position and length of what each sequence computes in the step.
    """
    model = plan.model
    per_layer = plan.kv_bytes_per_token / model.num_layers
    num_bytes = num_flops = 0.0
    for start, count in spans:
        for layer in model.layers:
            limit = layer.window or start + count
            num_bytes += per_layer * min(start + count, limit + count - 1)
            num_pairs = sum(min(position + 1, limit) for position in range(start, start + count))
            num_flops += 4.0 * model.num_heads * model.head_dim * num_pairs
    return Work(num_bytes, num_flops)


def count_prefill_steps(batch_size: int, context_len: int, budget: int) -> int:
    """Count the steps until every sequence has its first token, if all are there at the beginning.

    :param budget: tokens of a step, of which each sequence that decodes takes one.
    """
    num_steps = num_done = 0
    while num_done < batch_size * context_len:
        num_done += max(1, budget - num_done // context_len)
        num_steps += 1
    return num_steps


def _item_size(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
