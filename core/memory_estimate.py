"""What a device's memory will go to, estimated from a plan before there is a device.

The engine itself measures (see `core.executor`); this is what `plan` shows, and what an error can
compare a measurement with.  Estimates are of the rank that holds most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from core.plan import Plan
    from core.sharding import Share

RUNTIME_BYTES: Final = 700 * 2**20
"""CUDA's context, kernels and the workspaces of its libraries, as seen on Hopper."""
GRAPH_BYTES: Final = 4 * 2**20
"""Of one captured step beside the pool that all share."""
NUM_GRAPHS: Final = 45
SAMPLER_BYTES_PER_LOGIT: Final = 9
"""Bias, counts and presence, which the sampler keeps room for, by row and token of the vocabulary."""
_DTYPE_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: int
    activations: int
    """Of the largest step."""
    graphs: int
    sampler: int
    runtime: int
    kv_bytes_per_token: int

    @property
    def fixed(self) -> int:
        """Everything but the KV cache."""
        return self.weights + self.activations + self.graphs + self.sampler + self.runtime

    def kv_tokens(self, limit: int) -> int:
        """Count the tokens whose keys and values fit beside the rest; 0 if the rest fills it.

        :param limit: bytes that may be used in all.
        """
        return max(0, limit - self.fixed) // self.kv_bytes_per_token


def estimate_memory(plan: Plan) -> MemoryEstimate:
    """Estimate what each part takes on the rank that holds most."""
    share = max(plan.shares, key=lambda share: share.layers.size * share.inner.size)
    config, model = plan.config, plan.model
    has_graphs = plan.device.startswith("cuda") and not config.enforce_eager and plan.world_size == 1
    size = _DTYPE_BYTES[plan.dtype]
    part = share.layers.size * share.kv_heads.size / (model.num_layers * model.num_kv_heads)
    rows = config.max_num_seqs
    graph_rows = min(rows, 1024)
    per_graph_token = _activation_elements(plan, share) * size
    logits = graph_rows * model.vocab_size * size
    graphs = graph_rows * per_graph_token + logits + NUM_GRAPHS * GRAPH_BYTES
    return MemoryEstimate(
        weights=_weights_on(plan, share),
        activations=config.max_num_batched_tokens * per_graph_token + rows * model.vocab_size * size,
        graphs=graphs if has_graphs else 0,
        sampler=rows * model.vocab_size * SAMPLER_BYTES_PER_LOGIT,
        runtime=RUNTIME_BYTES if plan.device.startswith("cuda") else 0,
        kv_bytes_per_token=max(1, int(plan.kv_bytes_per_token * part)),
    )


def _activation_elements(plan: Plan, share: Share) -> int:
    """Elements per token that are alive at a layer's widest place: stream, its norm, gate, up, product."""
    return 2 * plan.model.hidden_size + 3 * share.inner.size


def _weights_on(plan: Plan, share: Share) -> int:
    model = plan.model
    layers = plan.layer_bytes * share.layers.size * share.inner.size / model.intermediate_size
    others = plan.weight_bytes - plan.layer_bytes * model.num_layers
    return int(layers + others * share.vocab.size / model.vocab_size)
