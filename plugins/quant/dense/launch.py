"""Launches of the kernels: everything that does not change from call to call is resolved once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from plugins.quant.dense.kernels import gate_kernel, linear_kernel, norm_kernel, vector_kernel
from plugins.quant.dense.operation import FOR_ANY_TOKENS, FUSED_GATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from plugins.quant.dense.gate_hopper import Gate
    from plugins.quant.dense.operation import KernelConfig, Operation

    Launch = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, float], None
    ]
    """launch(x: [T, K], out: [T, N], norm_weight, residual, eps); `out` may be `residual`."""

NORMS: Final = {"": 0, "plain": 1, "one_plus": 2}
OVERLAPS: Final = {"": 0, "early": 1, "late": 2}
VECTOR_BYTES: Final = 16
GATE_BLOCK: Final = 1024


class Weights(Protocol):
    """A layer, as far as launches look at it: its weights may move between calls."""

    @property
    def weight(self) -> torch.Tensor:
        """[rows, K], contiguous."""

    @property
    def bias(self) -> torch.Tensor | None:
        """[rows]."""


class Workspace(NamedTuple):
    """What programs that share a tile leave for each other.  Of one stream: launches take turns."""

    partials: torch.Tensor
    """float32."""
    arrivals: torch.Tensor
    """int32, zero between launches."""


def make_launch(
    op: Operation,
    config: KernelConfig,
    num_tokens: int,
    layer: Weights,
    workspace: Workspace,
    *,
    warm_up: bool = False,
) -> Launch:
    """Make what computes an operation for a number of tokens.

    :param num_tokens: of every call; to launches of `FOR_ANY_TOKENS` any number may be passed.
    :param warm_up: launches compile the kernel, and do not run it.
    """
    if config.kernel in FOR_ANY_TOKENS:
        return _make_library(op, config, layer, workspace)
    make = _make_vector if config.kernel == "vector" else _make_tile
    launch = make(op, config, num_tokens, layer, workspace, warm_up=warm_up)
    return launch if config.fuse_norm or not op.norm else _after_norm(op, config, launch)


def _bind(kernel: Any, grid: tuple[int, ...], *, warm_up: bool) -> Any:
    return partial(kernel.warmup, grid=grid) if warm_up else kernel[grid]


def _common_constants(op: Operation, config: KernelConfig) -> tuple[object, ...]:
    """Return the constants with which both kernels begin."""
    return (
        op.num_outputs,
        op.num_inputs,
        NORMS[op.norm] if config.fuse_norm else 0,
        op.activation,
        op.bias,
        op.residual,
        config.block_m,
        config.block_n,
        config.block_k,
    )


def _make_vector(
    op: Operation, config: KernelConfig, num_tokens: int, layer: Weights, _: Workspace, *, warm_up: bool
) -> Launch:
    run = _bind(vector_kernel, (triton.cdiv(op.num_outputs, config.block_n),), warm_up=warm_up)
    overlap = OVERLAPS[config.overlap]
    constants = (
        *_common_constants(op, config),
        VECTOR_BYTES // layer.weight.element_size(),
        overlap,
    )
    options = {"num_warps": config.num_warps, "launch_pdl": overlap > 0}

    def launch(
        x: torch.Tensor,
        out: torch.Tensor,
        norm_weight: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
    ) -> None:
        run(
            x, layer.weight, out, norm_weight, layer.bias, residual, eps, num_tokens, x.stride(0),
            *constants, **options,
        )  # fmt: skip

    return launch


def _make_tile(
    op: Operation,
    config: KernelConfig,
    num_tokens: int,
    layer: Weights,
    workspace: Workspace,
    *,
    warm_up: bool,
) -> Launch:
    num_tiles = triton.cdiv(num_tokens, config.block_m) * triton.cdiv(op.num_outputs, config.block_n)
    run = _bind(linear_kernel, (num_tiles, config.split_k), warm_up=warm_up)
    overlap = OVERLAPS[config.overlap]
    partials, arrivals = workspace
    tiles = _describe(op, config, layer) if config.tma else None
    constants = (
        *_common_constants(op, config),
        config.split_k,
        config.swap,
        config.tma,
        config.prefetch,
        overlap,
        config.num_stages,
        config.eager,
    )
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "launch_pdl": overlap > 0,
    }

    def launch(
        x: torch.Tensor,
        out: torch.Tensor,
        norm_weight: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
    ) -> None:
        run(
            x, layer.weight, tiles, out, norm_weight, layer.bias, residual, partials, arrivals, eps,
            num_tokens, x.stride(0), *constants, **options,
        )  # fmt: skip

    return launch


def _describe(op: Operation, config: KernelConfig, layer: Weights) -> TensorDescriptor:
    # Its address is asked of the parameter at each launch, so that the storage may be swapped.
    block = [config.block_n, config.block_k]
    return TensorDescriptor(layer.weight, [op.num_rows, op.num_inputs], [op.num_inputs, 1], block)


def _after_norm(op: Operation, config: KernelConfig, launch: Launch) -> Launch:
    normalize = make_norm(op.num_inputs, op.norm, overlap=config.overlap != "")

    def launch_both(
        x: torch.Tensor,
        out: torch.Tensor,
        norm_weight: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
    ) -> None:
        launch(normalize(x, norm_weight, eps), out, None, residual, eps)

    return launch_both


def _make_library(op: Operation, config: KernelConfig, layer: Weights, workspace: Workspace) -> Launch:
    """Make a launch of the library's product, with what surrounds it in kernels of their own.

    Where a gate is to be fused, or may be, another kernel does both at once.
    """
    overlap = config.overlap != ""
    normalize = make_norm(op.num_inputs, op.norm, overlap=overlap) if op.norm else None
    gate = make_gate(op.num_outputs, op.activation, overlap=overlap) if op.activation else None
    is_fused = config.kernel in FUSED_GATES
    fused_gate = _make_fused_gate(op, config, layer, workspace) if is_fused else None

    def multiply(x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None) -> None:
        transposed, bias = layer.weight.t(), layer.bias
        if residual is not None:
            torch.addmm(residual, x, transposed, out=out)
            if bias is not None:
                out.add_(bias)
        elif bias is not None:
            torch.addmm(bias, x, transposed, out=out)
        else:
            torch.mm(x, transposed, out=out)

    def launch(
        x: torch.Tensor,
        out: torch.Tensor,
        norm_weight: torch.Tensor | None,
        residual: torch.Tensor | None,
        eps: float,
    ) -> None:
        if normalize is not None:
            x = normalize(x, norm_weight, eps)
        if gate is None:
            multiply(x, out, residual)
            return
        if fused_gate is not None and (schedule := fused_gate.schedule_for(x.shape[0])) is not None:
            fused_gate(x, out, schedule)
            return
        both = torch.empty((x.shape[0], op.num_rows), dtype=x.dtype, device=x.device)
        multiply(x, both, None)
        gate(both, out)

    return launch


def _make_fused_gate(op: Operation, config: KernelConfig, layer: Weights, workspace: Workspace) -> Gate:
    """Make what computes product and gate at once, on Hopper."""
    # Other cards have no use for Gluon.
    from plugins.quant.dense.gate_hopper import Gate  # noqa: PLC0415

    num_sms = torch.cuda.get_device_properties(layer.weight.device).multi_processor_count
    overlap = config.overlap != ""
    return Gate(layer, op.activation, workspace, num_sms, kernel=config.kernel, overlap=overlap)


def make_norm(
    size: int, style: str, *, overlap: bool
) -> Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]:
    """Make norm(x: [T, size], weight, eps) -> [T, size], contiguous."""
    block = triton.next_power_of_2(size)
    constants = (size, NORMS[style], block, overlap)
    options = {"num_warps": min(max(block // 1024, 1), 16), "launch_pdl": overlap}

    def normalize(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norm_kernel[(x.shape[0],)](x, weight, out, eps, x.stride(0), *constants, **options)
        return out

    return normalize


def make_gate(
    size: int, activation: str, *, overlap: bool
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Make gate(x: [T, 2 · size], out: [T, size])."""
    num_tiles = triton.cdiv(size, GATE_BLOCK)
    constants = (size, activation, GATE_BLOCK, overlap)
    options = {"num_warps": 4, "launch_pdl": overlap}

    def gate(x: torch.Tensor, out: torch.Tensor) -> None:
        gate_kernel[(x.shape[0], num_tiles)](x, out, *constants, **options)

    return gate
