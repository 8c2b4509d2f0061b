"""A linear layer of plain weights, applied by the kernel that its shape and number of tokens call for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import nn
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from core.model.linear import make_weight
from plugins.quant.dense.launch import (
    NORMS,
    Operation,
    Workspace,
    launch_gate,
    launch_norm,
    launch_tile,
    launch_vector,
    workspace_sizes,
)
from plugins.quant.dense.table import MAX_TOKENS, choose

if TYPE_CHECKING:
    from core.interfaces import LinearSpec
    from plugins.quant.dense.launch import KernelConfig

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
NUM_PARTIALS: Final = 1 << 23
"""float32 elements of the workspace: 32 MiB, more than any entry of the table needs for 64 tokens."""
NUM_ARRIVALS: Final = 1 << 14

_workspaces: dict[torch.device, Workspace] = {}


def workspace_on(device: torch.device) -> Workspace:
    """Return the workspace of a device; graphs keep its address, so it never moves."""
    if device not in _workspaces:
        _workspaces[device] = Workspace(
            torch.empty(NUM_PARTIALS, dtype=torch.float32, device=device),
            torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device),
        )
    return _workspaces[device]


class DenseLinear(nn.Module):
    """y = x Wᵀ + b, with what comes before and after it where the layer is asked to do that too.

    :param spec: its shards lie one below the other in `weight`: [out_features, in_features].
    :param norm_style: of the model.
    :param activation: of the model.
    """

    def __init__(self, spec: LinearSpec, norm_style: str, activation: str) -> None:
        super().__init__()
        self.weight = make_weight((spec.out_features, spec.in_features), spec.dtype, spec.device)
        self.bias = make_weight((spec.out_features,), spec.dtype, spec.device) if spec.bias else None
        self._activation = activation
        self._can_fuse_norm = spec.dtype == torch.bfloat16  # weight · x alone may overflow in float16
        plain = Operation(spec.out_features, spec.in_features, bias=spec.bias)
        self._plain = plain
        self._normed = replace(plain, norm=norm_style)
        self._added = replace(plain, residual=True)
        self._gated = replace(
            plain, num_outputs=spec.out_features // 2, norm=norm_style, activation=activation
        )
        self._configs: dict[tuple[Operation, int], KernelConfig | None] = {}
        self._tiles: dict[tuple[int, int, int], TensorDescriptor] = {}
        self._is_hopper = spec.device.type == "cuda" and torch.cuda.get_device_capability(spec.device) >= (9, 0)

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
        config = self._config(self._plain, x)
        if config is None:
            return functional.linear(x, self.weight, self.bias)
        out = x.new_empty((len(x), self._plain.num_outputs))
        self._launch(self._plain, config, x, out)
        return out

    def forward_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Apply to norm(x)."""
        config = self._config(self._normed, x)
        if config is None:
            return functional.linear(self._norm(x, weight, eps), self.weight, self.bias)
        out = x.new_empty((len(x), self._normed.num_outputs))
        self._launch_normed(self._normed, config, x, out, weight, eps)
        return out

    def forward_gate(self, x: torch.Tensor, weight: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Compute activation(gate) · up, where [gate, up] is this layer applied to norm(x)."""
        config = self._config(self._gated, x)
        out = x.new_empty((len(x), self._gated.num_outputs))
        if config is None:
            both = functional.linear(self._norm(x, weight, eps), self.weight, self.bias)
            launch_gate(both, out, self._activation, pdl=self._is_hopper)
        else:
            self._launch_normed(self._gated, config, x, out, weight, eps)
        return out

    def forward_residual(self, x: torch.Tensor, residual: torch.Tensor, /) -> torch.Tensor:
        """Add to the stream, in place."""
        config = self._config(self._added, x)
        if config is not None:
            self._launch(self._added, config, x, residual, residual=residual)
            return residual
        if self.bias is not None:
            residual = residual.add_(self.bias)
        return torch.addmm(residual, x, self.weight.t(), out=residual)

    # --- launching ---

    def _norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = torch.empty_like(x)
        launch_norm(x, weight, normed, eps, self._normed.norm, pdl=self._is_hopper)
        return normed

    def _launch_normed(
        self, op: Operation, config: KernelConfig, x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        if not config.fuse_norm:
            x = self._norm(x, weight, eps)
        self._launch(op, config, x, out, norm_weight=weight, eps=eps)

    def _launch(
        self,
        op: Operation,
        config: KernelConfig,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        residual: torch.Tensor | None = None,
    ) -> None:
        weight, pdl = self.weight, self._is_hopper
        if config.kernel == "vector":
            launch_vector(op, config, x, weight, out, norm_weight, self.bias, residual, eps, pdl=pdl)
            return
        tiles = self._descriptor(config) if config.tma else None
        workspace = workspace_on(x.device)
        launch_tile(
            op, config, x, weight, tiles, out, norm_weight, self.bias, residual, eps, workspace, pdl=pdl
        )

    def _config(self, op: Operation, x: torch.Tensor) -> KernelConfig | None:
        num_tokens = len(x)
        if num_tokens > MAX_TOKENS or not x.is_cuda or not self._is_hopper:
            return None
        key = (op, num_tokens)
        if key not in self._configs:
            self._configs[key] = self._fit(op, choose(op, num_tokens), num_tokens)
        return self._configs[key]

    def _fit(self, op: Operation, config: KernelConfig | None, num_tokens: int) -> KernelConfig | None:
        """Take back what this layer or its workspace cannot do."""
        if config is None:
            return None
        if not self._can_fuse_norm:
            config = replace(config, fuse_norm=False)
        partials, arrivals = workspace_sizes(op, config, num_tokens)
        if partials > NUM_PARTIALS or arrivals > NUM_ARRIVALS:
            return replace(config, split_k=1)
        return config

    def _descriptor(self, config: KernelConfig) -> TensorDescriptor:
        weight = self.weight
        key = (weight.data_ptr(), config.block_n, config.block_k)  # offloaded layers move
        if key not in self._tiles:
            block = [config.block_n, config.block_k]
            self._tiles[key] = TensorDescriptor(weight, list(weight.shape), list(weight.stride()), block)
        return self._tiles[key]


