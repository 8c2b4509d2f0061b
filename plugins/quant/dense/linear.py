"""A linear layer of plain weights, applied by the kernel that its shape and number of tokens call for."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
import triton
from torch import nn

from core.errors import ConfigError
from core.model.linear import make_weight
from plugins.quant.dense.launch import NORMS, VECTOR_BYTES, Workspace, make_launch
from plugins.quant.dense.operation import FOR_ANY_TOKENS, FUSED_GATES, Operation, partial_sizes
from plugins.quant.dense.table import MAX_TUNED, Card, table_of

if TYPE_CHECKING:
    from core.interfaces import LinearSpec
    from plugins.quant.dense.launch import Launch
    from plugins.quant.dense.operation import KernelConfig

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
NUM_PARTIALS: Final = 1 << 23
"""float32 elements of the workspace: 32 MiB, more than any entry of a table needs for 64 tokens, and a tile of
`gate_hopper` for each of 256 multiprocessors."""
NUM_ARRIVALS: Final = 1 << 14
GATE_ITEM_BYTES: Final = 2
MANY: Final = MAX_TUNED + 1
"""Stands for every number of tokens that no entry of a table is for."""


@functools.cache
def workspace_on(device: torch.device) -> Workspace:
    """Return the workspace of a device; graphs keep its address, so it never moves."""
    return Workspace(
        torch.empty(NUM_PARTIALS, dtype=torch.float32, device=device),
        torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device),
    )


@functools.cache
def card_of(device: torch.device) -> Card:
    """Return the kind of a device.

    :raises ConfigError: it is no GPU, and Triton does not interpret its kernels.
    """
    if device.type == "cuda":
        return Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if not triton.knobs.runtime.interpret:
        raise ConfigError(f"the kernels of quant.dense run on cuda, not on {device}; see --device")
    return Card(device.type, (0, 0))


class DenseLinear(nn.Module):
    """y = x Wᵀ + b, with what comes before and after it where the layer is asked to do that too.

    :param spec: its shards lie one below the other in `weight`: [out_features, in_features].
    :param norm_style: of the model.
    :param activation: of the model.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, spec: LinearSpec, norm_style: str, activation: str) -> None:
        super().__init__()
        self.weight = make_weight((spec.out_features, spec.in_features), spec.dtype, spec.device)
        self.bias = make_weight((spec.out_features,), spec.dtype, spec.device) if spec.bias else None
        # At the latest now: none may be made while a graph is captured.
        workspace_on(self.weight.device)
        plain = Operation(spec.out_features, spec.in_features, bias=spec.bias)
        half = spec.out_features // 2
        self._plain = Form(self, plain)
        self._normed = Form(self, replace(plain, norm=norm_style))
        self._gated = Form(
            self, replace(plain, num_outputs=half, norm=norm_style, activation=activation)
        )
        self._added = Form(self, replace(plain, residual=True))

    # --- what it can do ---

    def norm_objections(self, style: str, /) -> list[str]:
        """Every reason why it cannot normalize its input."""
        return [] if style in NORMS else [f"there is no kernel for norms of style {style!r}"]

    def gate_objections(self, style: str, activation: str, /) -> list[str]:
        """Every reason why it cannot normalize its input and apply activation and gate."""
        objections = self.norm_objections(style)
        if activation not in ACTIVATIONS:
            objections.append(f"there is no kernel for activation {activation!r}")
        return objections

    def residual_objections(self) -> list[str]:
        """Every reason why it cannot add to the stream: none."""
        return []

    # --- forms ---

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply: [T, in_features] -> [T, out_features]."""
        return self._plain(x, None, 0.0)

    def forward_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Apply to norm(x)."""
        return self._normed(x, weight, eps)

    def forward_gate(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Compute activation(gate) · up, where [gate, up] is this layer applied to norm(x)."""
        return self._gated(x, weight, eps)

    def forward_residual(self, x: torch.Tensor, residual: torch.Tensor, /) -> torch.Tensor:
        """Add to the stream, in place."""
        self._added.launch_for(x)(x, residual, None, residual, 0.0)
        return residual


class Form:
    """An operation of a layer, with the launch for each number of tokens that came up."""

    def __init__(self, layer: DenseLinear, op: Operation) -> None:
        self._layer = layer
        self._op = op
        self._launches: dict[int, Launch] = {}
        self._for_any_tokens: dict[KernelConfig, Launch] = {}

    def __call__(self, x: torch.Tensor, norm_weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        """Compute [T, num_outputs] anew."""
        out = torch.empty((x.shape[0], self._op.num_outputs), dtype=x.dtype, device=x.device)
        self.launch_for(x)(x, out, norm_weight, None, eps)
        return out

    def launch_for(self, x: torch.Tensor) -> Launch:
        """Return what computes it for x: [T, num_inputs]."""
        num_tokens = min(x.shape[0], MANY)
        launch = self._launches.get(num_tokens)
        return self._resolve(x.device, num_tokens) if launch is None else launch

    def _resolve(self, device: torch.device, num_tokens: int) -> Launch:
        card = card_of(device)
        config = table_of(card).choose(self._op, num_tokens)
        config = fit(self._op, config, num_tokens, card, self._layer.weight.dtype)
        launch = self._for_any_tokens.get(config)
        if launch is None:
            launch = make_launch(self._op, config, num_tokens, self._layer, workspace_on(device))
        if config.kernel in FOR_ANY_TOKENS:
            self._for_any_tokens[config] = launch
        self._launches[num_tokens] = launch
        return launch


def fit(
    op: Operation, config: KernelConfig, num_tokens: int, card: Card, dtype: torch.dtype
) -> KernelConfig:
    """Take back what the card, the dtype, the shape or the workspace does not allow."""
    changes: dict[str, object] = {}
    if not card.can_overlap:
        changes.update(overlap="", tma=False, prefetch=0)
    if config.kernel in FUSED_GATES and not can_fuse_gate(op, card, dtype):
        changes.update(kernel="library")
    if op.num_inputs * dtype.itemsize % VECTOR_BYTES:
        changes.update(tma=False)
    if dtype != torch.bfloat16 and config.kernel == "tile":
        changes.update(fuse_norm=False)  # it rounds the norm's weight · x, which may overflow
    partials, arrivals = partial_sizes(op, config, num_tokens)
    if partials > NUM_PARTIALS or arrivals > NUM_ARRIVALS:
        changes.update(split_k=1)
    return replace(config, **changes) if changes else config  # type: ignore[arg-type]


def can_fuse_gate(op: Operation, card: Card, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for product and gate of many tokens."""
    sizes = (op.num_inputs, op.num_outputs)
    is_aligned = not any(size * dtype.itemsize % VECTOR_BYTES for size in sizes)
    is_served = op.activation != "" and not op.bias and dtype.itemsize == GATE_ITEM_BYTES
    return card.capability == (9, 0) and is_served and is_aligned
