"""Codes of four bits, and the layer and scheme that use them.

Weight w of a block with the largest magnitude m has code round(7 w / m) + 8, 1 to 15, and code c means
(c - 8) m / 7.  A checkpoint holds for each projection

* `codes` [out, ceil(in / 2)] uint8: the code of an even input in the low half of a byte, that of the
  odd one after it in the high half;
* `peaks` [out, ceil(in / 32)] float16: the magnitudes;
* `bias` [out], if there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from acme_cythera.quant import BLOCK
from core.interfaces import Axis, LinearSpec, TensorSpec
from core.model.linear import PlainScheme, make_weight
from core.quant.linear import DequantizedLinear
from core.sharding import local_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

ZERO: Final = 8
LARGEST: Final = 7


# --- codes -----------------------------------------------------------------------------------------


def find_peaks(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Find the largest magnitude of each block.

    :param weight: [out, in] floating.
    :param blocks: [in] int64, the block of each input, in order.
    :return: [out, blocks] float16.
    """
    parts = weight.abs().split(torch.bincount(blocks).tolist(), dim=1)
    return torch.stack([part.amax(1) for part in parts], dim=1).half()


def encode(weight: torch.Tensor, peaks: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Round to the nearest code, given the magnitudes as they are stored: [out, in] uint8."""
    size = peaks.float()[:, blocks]
    scaled = torch.where(size > 0, LARGEST * weight.float() / size, 0.0)
    return (scaled.round().clamp(-LARGEST, LARGEST) + ZERO).to(torch.uint8)


def decode(codes: torch.Tensor, peaks: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Compute what codes mean: [out, in] float32."""
    return (codes.float() - ZERO) / LARGEST * peaks.float()[:, blocks]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put two codes into each byte: [out, n] -> [out, ceil(n / 2)] uint8."""
    codes = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack`, with a code more if their number was odd: [out, n] -> [out, 2 n] uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


# --- layer and scheme ------------------------------------------------------------------------------


class Block4Linear(DequantizedLinear):
    """Holds the inputs that this rank has, packed anew from the first of them on.

    `codes` is [out, ceil(in / 2)] uint8, `peaks` [out, blocks] float16.
    """

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        self.num_inputs = spec.in_features
        blocks = local_groups(spec.input_spans, BLOCK)
        # Not a buffer: dummy weights would put random numbers into it.
        self.blocks = torch.tensor(blocks, device=spec.device)
        rows = spec.out_features
        self.codes = make_weight((rows, -(-self.num_inputs // 2)), torch.uint8, spec.device)
        self.peaks = make_weight((rows, blocks[-1] + 1), torch.float16, spec.device)

    def dequantize(self) -> torch.Tensor:
        """Multiply in float32 and round once."""
        codes = unpack(self.codes)[:, : self.num_inputs]
        return decode(codes, self.peaks, self.blocks).to(self.dtype)


class Block4Scheme:
    """Fulfils `core.interfaces.QuantScheme`; the output projection stays as it is.

    :param is_stored: whether the checkpoint holds codes; else it holds weights, which `load` converts.
    """

    def __init__(self, *, is_stored: bool) -> None:
        self._is_stored = is_stored
        self._plain = PlainScheme()

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer."""
        return self._plain.make_linear(spec) if spec.role == "lm_head" else Block4Linear(spec)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name codes, magnitudes and bias, or what an unquantized layer has."""
        plain = self._plain.tensors(spec, shard)
        if not self._is_stored or spec.role == "lm_head":
            return plain
        rows, inputs = plain["weight"].shape
        return {
            "codes": _stored(rows, inputs, 2, torch.uint8),
            "peaks": _stored(rows, inputs, BLOCK, torch.float16),
            **{name: tensor for name, tensor in plain.items() if name == "bias"},
        }

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard to its rows; convert it first if the checkpoint holds weights."""
        if not isinstance(module, Block4Linear):
            self._plain.load(module, spec, shard, tensors)
            return
        parts = dict(tensors)
        if self._is_stored:
            [span] = spec.input_spans
            first = span.start % 2  # the byte may begin with an input of another rank
            codes = unpack(parts["codes"])[:, first : first + span.size]
        else:
            weight = parts.pop("weight")
            parts["peaks"] = find_peaks(weight, module.blocks)
            codes = encode(weight, parts["peaks"], module.blocks)
        self._plain.load(module, spec, shard, parts | {"codes": pack(codes)})

    def finalize(self, module: nn.Module, spec: LinearSpec, /) -> None:
        """Do nothing: codes are used as they were loaded."""


def _stored(rows: int, inputs: int, step: int, dtype: torch.dtype) -> TensorSpec:
    """Describe a tensor with an index for every `step` inputs; ranks may share one at a cut."""
    axes = (Axis("out"), Axis("in", step, shared=True))
    return TensorSpec((rows, -(-inputs // step)), dtype, axes)
