"""How AWQ checkpoints are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from core.errors import CheckpointError
from core.interfaces import Axis, TensorSpec
from core.model.linear import PlainScheme
from core.quant.linear import DequantizedLinear
from core.quant.names import ask_shards, in_decoder, matches_any
from core.sharding import local_groups
from plugins.quant.awq.config import ALL_INPUTS, CODES_PER_WORD
from plugins.quant.awq.layout import unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from core.interfaces import LinearSpec
    from core.model.spec import ModelSpec
    from plugins.quant.awq.config import AwqConfig

_HEAD_ROLE: Final = "lm_head"
_SCALE_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_INPUTS_AT_ONCE: Final = 512  # bounds the int32 and float32 copies of a weight
_SYMMETRIC_ZEROS: Final = 0x88888888 - (1 << 32)  # eight zero points of 8, as int32
_PLAIN: Final = PlainScheme()


class AwqLinear(DequantizedLinear):
    """y = x Wᵀ + b, where W is (code - zero point) · scale.

    The product is computed in float32, which holds it exactly if scales have 16 bits, and rounded to
    the dtype of activations once.

    :param group_size: inputs of the whole layer that share a scale.
    """

    qweight: torch.Tensor
    """[in_features, out_features / 8] int32."""
    qzeros: torch.Tensor
    """[groups, out_features / 8] int32."""
    scales: torch.Tensor
    """[groups, out_features] float16, or float32 if they are stored otherwise."""

    def __init__(self, spec: LinearSpec, group_size: int) -> None:
        super().__init__(spec)
        groups = local_groups(spec.input_spans, group_size)
        num_groups, num_words = groups[-1] + 1, spec.out_features // CODES_PER_WORD
        # No buffer: those are filled with anything where weights are dummies.
        self.groups = torch.tensor(groups, device=spec.device)

        def add(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=spec.device))

        add("qweight", (spec.in_features, num_words), torch.int32)
        add("qzeros", (num_groups, num_words), torch.int32)
        add("scales", (num_groups, spec.out_features), torch.float16)

    def dequantize(self) -> torch.Tensor:
        """Make the weight: [out_features, in_features] in the dtype of activations."""
        zeros = unpack(self.qzeros)
        shape = (len(self.qweight), zeros.shape[-1])
        weight = torch.empty(shape, dtype=self.dtype, device=zeros.device)
        parts = (x.split(_INPUTS_AT_ONCE) for x in (self.qweight, self.groups, weight))
        for words, groups, part in zip(*parts, strict=True):
            steps = unpack(words).sub_(zeros[groups])
            torch.mul(steps, self.scales[groups].float(), out=part)
        return weight.T


class AwqScheme:
    """Fulfils `core.interfaces.QuantScheme` for weights in AWQ's GEMM layout.

    :param config: of the checkpoint.
    :param model: whose names the config may spell otherwise.
    """

    def __init__(self, config: AwqConfig, model: ModelSpec) -> None:
        self._config = config
        self._skipped = in_decoder(config.skipped, model)

    def make_linear(self, spec: LinearSpec, /) -> nn.Module:
        """Make an empty layer.

        :raises CheckpointError: its outputs do not fill whole words, or its inputs whole groups.
        """
        if not self._is_quantized(spec):
            return _PLAIN.make_linear(spec)
        size = self._config.group_size
        check_layer(spec, size)
        return AwqLinear(spec, spec.input_spans[-1].stop if size == ALL_INPUTS else size)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        """Name `qweight`, `qzeros`, `scales`, and `bias` if there is one."""
        tensors = dict(_PLAIN.tensors(spec, shard))
        if not self._is_quantized(spec):
            return tensors
        size = self._config.group_size
        check_layer(spec, size)
        size = spec.in_features if size == ALL_INPUTS else size
        num_inputs, num_outputs = spec.in_features, spec.shards[shard][1]
        num_groups, num_words = num_inputs // size, num_outputs // CODES_PER_WORD
        inputs, groups = Axis("in"), Axis("in", size, shared=True)
        outputs, words = Axis("out"), Axis("out", CODES_PER_WORD)
        can_lack_zeros = not self._config.has_zero_points
        del tensors["weight"]
        return {
            "qweight": TensorSpec((num_inputs, num_words), torch.int32, (inputs, words)),
            "qzeros": TensorSpec(
                (num_groups, num_words), torch.int32, (groups, words), optional=can_lack_zeros
            ),
            "scales": TensorSpec((num_groups, num_outputs), _SCALE_DTYPES, (groups, outputs)),
            **tensors,
        }

    def load(
        self,
        module: nn.Module,
        spec: LinearSpec,
        shard: int,
        tensors: Mapping[str, torch.Tensor],
        /,
    ) -> None:
        """Copy a shard to its columns.

        :raises CheckpointError: a scale is NaN or infinite, or there are zero points that the config
            denies.
        """
        if not isinstance(module, AwqLinear):
            _PLAIN.load(module, spec, shard, tensors)
            return
        self._check_values(spec.shards[shard][0], tensors)
        rows, scales = spec.rows(shard), tensors["scales"]
        words = slice(rows.start // CODES_PER_WORD, rows.stop // CODES_PER_WORD)
        if scales.dtype != torch.float16:
            module.scales = module.scales.float()
        module.qweight[:, words].copy_(tensors["qweight"])
        module.qzeros[:, words] = tensors.get("qzeros", _SYMMETRIC_ZEROS)
        module.scales[:, rows].copy_(scales)
        if module.bias is not None:
            module.bias[rows].copy_(tensors["bias"])

    def finalize(self, module: nn.Module, spec: LinearSpec, /) -> None:
        """Do nothing: layers compute with what is stored."""

    def _check_values(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        if not tensors["scales"].isfinite().all():
            raise CheckpointError(f"{prefix}.scales holds a number that is not finite")
        if self._config.has_zero_points or "qzeros" not in tensors:
            return
        if (tensors["qzeros"] != _SYMMETRIC_ZEROS).any():
            raise CheckpointError(
                f"{prefix}.qzeros holds zero points other than 8, but the config says zero_point false; "
                f"set it to true in config.json if they are meant"
            )

    def _is_quantized(self, spec: LinearSpec) -> bool:
        if spec.role == _HEAD_ROLE and not self._config.is_head_quantized:
            return False
        return not ask_shards(spec, self._is_skipped, "whether they are skipped")

    def _is_skipped(self, prefix: str) -> bool:
        return matches_any(prefix, self._skipped)


def check_layer(spec: LinearSpec, group_size: int) -> None:
    """Check that words and groups hold features of this layer only.

    :param group_size: inputs that share a scale, or `ALL_INPUTS`.
    :raises CheckpointError: names the layer and the size that does not fit.
    """
    for prefix, size in spec.shards:
        if size % CODES_PER_WORD:
            raise CheckpointError(
                f"{prefix} has {size} output features, but AWQ packs {CODES_PER_WORD} into a word"
                if spec.cut is None
                else f"a rank's part of {prefix} has {size} output features, but AWQ packs "
                f"{CODES_PER_WORD} into a word; use another --tensor-parallel-size"
            )
    # A rank's part may begin or end inside of a group.
    if spec.cut is None and group_size != ALL_INPUTS and spec.in_features % group_size:
        raise CheckpointError(
            f"{spec.name} has {spec.in_features} input features, which group_size {group_size} does not "
            f"divide"
        )
