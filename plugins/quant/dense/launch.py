"""Launches of the kernels, by what an operation is and by the configuration that was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from plugins.quant.dense.kernels import gate_kernel, linear_kernel, norm_kernel, vector_kernel

if TYPE_CHECKING:
    from typing import Any

NORMS: Final = {"": 0, "plain": 1, "one_plus": 2}
VECTOR_BYTES: Final = 16
GATE_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """How an operation is computed."""

    kernel: Literal["vector", "tile"]
    block_n: int
    block_k: int
    block_m: int = 1
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 1
    swap: bool = False
    """Whether the weight takes the rows of the tensor cores and the tokens the columns."""
    eager: bool = False
    """Whether weights go through registers, the first of them before the previous kernel has ended."""
    tma: bool = False
    """Whether weights are fetched by the copy engine of compute capability 9."""
    prefetch: int = 0
    """Columns of the weight to bring to L2 before the previous kernel has ended; needs 9.0 too."""
    fuse_norm: bool = True
    """Whether the kernel normalizes its input, or leaves it to a kernel before it."""


class Workspace(NamedTuple):
    """What programs that share a tile leave for each other.  Of one stream: launches take turns."""

    partials: torch.Tensor
    """float32."""
    arrivals: torch.Tensor
    """int32, zero between launches."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What a linear layer is to compute, but for the number of tokens."""

    num_outputs: int
    """Of the result: with a gate, half the rows of the weight."""
    num_inputs: int
    norm: str = ""
    """Style of the norm before it; empty: none."""
    activation: str = ""
    """Between the halves of a gated layer; empty: no gate."""
    residual: bool = False
    bias: bool = False


def workspace_sizes(op: Operation, config: KernelConfig, num_tokens: int) -> tuple[int, int]:
    """Elements of partials and arrivals that a launch needs."""
    if config.split_k == 1:
        return 0, 0
    tiles = triton.cdiv(num_tokens, config.block_m) * triton.cdiv(op.num_outputs, config.block_n)
    halves = 2 if op.activation else 1
    part = halves * config.block_m * config.block_n + config.block_m
    return tiles * config.split_k * part, tiles


def launch_tile(
    op: Operation,
    config: KernelConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    tiles: TensorDescriptor | None,
    out: torch.Tensor,
    norm_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    workspace: Workspace,
    *,
    pdl: bool,
    run: Any = None,
) -> Any:
    """Launch `linear_kernel`."""
    m = len(x)
    num_tiles = triton.cdiv(m, config.block_m) * triton.cdiv(op.num_outputs, config.block_n)
    launch = run or linear_kernel[(num_tiles, config.split_k)]
    return launch(
        x,
        weight,
        tiles,
        out,
        norm_weight,
        bias,
        residual,
        workspace.partials,
        workspace.arrivals,
        eps,
        m,
        x.stride(0),
        N=op.num_outputs,
        K=op.num_inputs,
        NORM=NORMS[op.norm] if config.fuse_norm else 0,
        ACTIVATION=op.activation,
        HAS_BIAS=op.bias,
        HAS_RESIDUAL=op.residual,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        SWAP=config.swap,
        TMA=config.tma,
        PREFETCH=config.prefetch,
        PDL=pdl,
        STAGES=config.num_stages,
        EAGER=config.eager,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=pdl,
    )


def launch_vector(
    op: Operation,
    config: KernelConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    norm_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    *,
    pdl: bool,
    run: Any = None,
) -> Any:
    """Launch `vector_kernel`."""
    launch = run or vector_kernel[(triton.cdiv(op.num_outputs, config.block_n),)]
    return launch(
        x,
        weight,
        out,
        norm_weight,
        bias,
        residual,
        eps,
        N=op.num_outputs,
        K=op.num_inputs,
        NORM=NORMS[op.norm] if config.fuse_norm else 0,
        ACTIVATION=op.activation,
        HAS_BIAS=op.bias,
        HAS_RESIDUAL=op.residual,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        VECTOR=VECTOR_BYTES // x.element_size(),
        PDL=pdl,
        num_warps=config.num_warps,
        launch_pdl=pdl,
    )


def launch_norm(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, style: str, *, pdl: bool
) -> None:
    """Launch `norm_kernel`."""
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    norm_kernel[(len(x),)](
        x,
        weight,
        out,
        eps,
        x.stride(0),
        K=size,
        NORM=NORMS[style],
        BLOCK_K=block,
        PDL=pdl,
        num_warps=min(max(block // 1024, 1), 16),
        launch_pdl=pdl,
    )


def launch_gate(x: torch.Tensor, out: torch.Tensor, activation: str, *, pdl: bool) -> None:
    """Launch `gate_kernel`."""
    size = out.shape[1]
    gate_kernel[(len(x), triton.cdiv(size, GATE_BLOCK))](
        x, out, N=size, ACTIVATION=activation, BLOCK_N=GATE_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
