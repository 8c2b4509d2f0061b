"""The tensors of a shard: what a checkpoint holds, and how it is brought into the form of `Stored`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn import functional

from core.errors import CheckpointError
from core.interfaces import Axis, TensorSpec
from core.quant.packing import WORD_BITS, codes_per_period, unpack
from core.sharding import Span
from plugins.quant.gptq.stored import Stored, word_span

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from core.interfaces import LinearSpec
    from plugins.quant.gptq.formats import LayerFormat, Layout

    Tensors = Mapping[str, torch.Tensor]

_INTEGERS: Final = (torch.int32, torch.int64)


# --- GPTQ ------------------------------------------------------------------------------------------


def gptq_tensors(shape: tuple[int, int], layout: LayerFormat) -> dict[str, TensorSpec]:
    """Name the tensors of a layer that GPTQ has stored.

    :param shape: outputs and inputs of the shard.
    """
    num_outputs, num_inputs = shape
    groups, axis = _count_groups(num_inputs, layout), layout.group_axis
    codes = (_num_words(num_inputs, layout.bits), num_outputs)
    # Zero points are few, and a rank's outputs may begin anywhere: read whole along the outputs.
    zeros = (groups, _num_words(num_outputs, layout.bits))
    return {
        "qweight": TensorSpec(codes, torch.int32, (_word_axis(layout.bits), Axis("out"))),
        "qzeros": TensorSpec(zeros, torch.int32, (axis, None), optional=layout.symmetric),
        "scales": TensorSpec((groups, num_outputs), axes=(axis, Axis("out"))),
        "g_idx": TensorSpec((num_inputs,), _INTEGERS, optional=True),
    }


def read_gptq_tensors(tensors: Tensors, spec: LinearSpec, shard: int, layout: LayerFormat) -> Stored:
    """Turn around what GPTQ stores inputs first.

    :raises CheckpointError: a value is impossible or contradicts the config.
    """
    prefix = spec.shards[shard][0]
    zeros = None
    if "qzeros" in tensors:
        zeros = _unpack_zeros(tensors["qzeros"].T, spec, shard, layout)
        if layout.layout == "gptq":
            # Of a zero point of 0, less one, only the lower bits are kept.
            zeros = (zeros + 1) & ((1 << layout.bits) - 1)
    if layout.symmetric and zeros is not None:
        _expect_middle(zeros, layout, prefix)
        zeros = None
    scales = _finite(tensors["scales"], f"{prefix}.scales").T
    return Stored(
        codes=_take_words(tensors["qweight"].T, spec, layout.bits),
        scales=scales,
        zeros=None if zeros is None else zeros.to(torch.uint8),
        groups=_read_order(tensors.get("g_idx"), scales.shape[1], spec, layout, f"{prefix}.g_idx"),
    )


def _expect_middle(zeros: torch.Tensor, layout: LayerFormat, prefix: str) -> None:
    is_other = zeros != layout.middle
    if is_other.any():
        raise CheckpointError(
            f"{prefix}.qzeros holds the zero point {zeros[is_other][0].item()}, but sym is true in "
            f"quantization_config, which makes it {layout.middle}; set sym to false, or correct "
            f"checkpoint_format (gptq_v2 stores zero points as they are, gptq stores them less one)"
        )


# --- compressed-tensors ----------------------------------------------------------------------------


def packed_tensors(shape: tuple[int, int], layout: LayerFormat) -> dict[str, TensorSpec]:
    """Name the tensors of a layer in the format pack-quantized.

    :param shape: outputs and inputs of the shard.
    """
    num_outputs, num_inputs = shape
    groups, axis = _count_groups(num_inputs, layout), layout.group_axis
    codes = (num_outputs, _num_words(num_inputs, layout.bits))
    tensors = {
        "weight_packed": TensorSpec(codes, torch.int32, (Axis("out"), _word_axis(layout.bits))),
        "weight_scale": TensorSpec((num_outputs, groups), axes=(Axis("out"), axis)),
        "weight_shape": TensorSpec((2,), _INTEGERS, optional=True),
    }
    if not layout.symmetric:
        zeros = (_num_words(num_outputs, layout.bits), groups)
        tensors["weight_zero_point"] = TensorSpec(zeros, torch.int32, (None, axis))
    if layout.ordered:
        tensors["weight_g_idx"] = TensorSpec((num_inputs,), _INTEGERS, optional=True)
    return tensors


def read_packed_tensors(tensors: Tensors, spec: LinearSpec, shard: int, layout: LayerFormat) -> Stored:
    """Take over what lies the right way round.

    Integers are stored as codes, 2 ** (bits - 1) above what they stand for; so are zero points, and
    their difference is the same.

    :raises CheckpointError: a value is impossible or contradicts the config.
    """
    prefix, num_outputs = spec.shards[shard]
    if spec.cut is None and "weight_shape" in tensors:
        shape, stated = [num_outputs, spec.in_features], tensors["weight_shape"].tolist()
        if stated != shape:
            raise CheckpointError(f"{prefix}.weight_shape is {stated}, but the config asks for {shape}")
    zeros = None
    if not layout.symmetric:
        zeros = _unpack_zeros(tensors["weight_zero_point"], spec, shard, layout).to(torch.uint8)
    scales = _finite(tensors["weight_scale"], f"{prefix}.weight_scale")
    return Stored(
        codes=_take_words(tensors["weight_packed"], spec, layout.bits),
        scales=scales,
        zeros=zeros,
        groups=_read_order(
            tensors.get("weight_g_idx"), scales.shape[1], spec, layout, f"{prefix}.weight_g_idx"
        ),
    )


# --- what both need --------------------------------------------------------------------------------


def _num_words(num_codes: int, bits: int) -> int:
    return -(-num_codes * bits // WORD_BITS)


def _count_groups(num_inputs: int, layout: LayerFormat) -> int:
    return layout.num_groups(Span(0, num_inputs))


def _word_axis(bits: int) -> Axis | None:
    """Describe a dimension of words along the inputs.

    Where codes are split between words, no word stands for a number of features: read it whole.
    """
    period = codes_per_period(bits)
    return Axis("in", period, shared=True) if period * bits == WORD_BITS else None


def _pad(words: torch.Tensor, count: int) -> torch.Tensor:
    """Append words of zeros to the last dimension until there are `count`."""
    return functional.pad(words, (0, count - words.shape[-1]))


def _take_words(words: torch.Tensor, spec: LinearSpec, bits: int) -> torch.Tensor:
    """Find the words of a rank's inputs, where they have not been cut already.

    :param words: [N, words] int32.
    """
    (inputs,) = spec.input_spans
    wanted = word_span(inputs, bits).words
    if _word_axis(bits) is None:
        words = words[:, wanted.start : wanted.stop]
    return _pad(words, wanted.size)


def _unpack_zeros(
    words: torch.Tensor, spec: LinearSpec, shard: int, layout: LayerFormat
) -> torch.Tensor:
    """Unpack the zero points of a rank's outputs.

    :param words: [words of all outputs, G] int32.
    :return: [N, G] int32.
    """
    whole = word_span(Span(0, words.shape[0] * WORD_BITS // layout.bits), layout.bits).words.size
    zeros = unpack(_pad(words.T, whole), layout.bits).T
    return torch.cat([zeros[span.start : span.stop] for span in spec.output_spans(shard)])


def _finite(scales: torch.Tensor, name: str) -> torch.Tensor:
    is_finite = scales.isfinite()
    if not is_finite.all():
        raise CheckpointError(f"{name} holds {scales[~is_finite][0].item()}, but scales are finite")
    return scales


def _read_order(
    order: torch.Tensor | None, num_groups: int, spec: LinearSpec, layout: LayerFormat, name: str
) -> torch.Tensor | None:
    """Find the group of each of a rank's inputs.

    Some tools fill the tensor with zeros, or with -1, where there is no order.

    :param order: of all inputs of the layer.
    :param num_groups: that this rank has read.
    :return: `None` if the groups are in order.
    """
    (inputs,) = spec.input_spans
    if order is not None and (order <= 0).all():
        order = None
    if not layout.ordered:
        if order is not None:
            _expect_order(order, layout, name)
        return None
    if order is None:
        order = _usual_order(inputs.stop, layout, spec.device)
    low, high = order.min().item(), order.max().item()
    if low < 0 or high >= num_groups:
        raise CheckpointError(f"{name} holds groups from {low} to {high}, but there are {num_groups}")
    return order[inputs.start : inputs.stop].long()


def _usual_order(num_inputs: int, layout: LayerFormat, device: torch.device) -> torch.Tensor:
    return torch.arange(num_inputs, device=device) // (layout.group_size or num_inputs)


def _expect_order(order: torch.Tensor, layout: LayerFormat, name: str) -> None:
    if not torch.equal(order.long(), _usual_order(len(order), layout, order.device)):
        raise CheckpointError(
            f"{name} puts inputs into groups in an order of its own, but quantization_config says that "
            f"there is none; set desc_act to true"
        )


class LayoutEntry(NamedTuple):
    """How tensors of a layout are named and read."""

    describe: Callable[[tuple[int, int], LayerFormat], dict[str, TensorSpec]]
    read: Callable[[Tensors, LinearSpec, int, LayerFormat], Stored]


LAYOUTS: Final[Mapping[Layout, LayoutEntry]] = {
    "gptq": LayoutEntry(gptq_tensors, read_gptq_tensors),
    "gptq_v2": LayoutEntry(gptq_tensors, read_gptq_tensors),
    "pack-quantized": LayoutEntry(packed_tensors, read_packed_tensors),
}
