"""A quantizer that reads and writes, as an outsider's plugin: int8, one scale for each output feature.

It scales the inputs of the MLP too, and halves its norm to make up for it, so that a test sees
whether what a method changes in place is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from core.errors import ConfigError
from core.hookspecs import hookimpl
from core.interfaces import Axis, LinearSpec, TensorSpec
from core.model.linear import PlainScheme
from core.quant.linear import DequantizedLinear
from core.quant.names import ask_shards, in_decoder, matches
from core.registry import QuantizerEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from core.quant.calibration import CalibratedLayer, QuantizeOptions

core_api = "1.0"
METHOD = "rtn8"
MAX_CODE = 127


class Int8Linear(DequantizedLinear):
    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(spec)
        shape = (spec.out_features, spec.in_features)
        self.register_buffer("codes", torch.empty(shape, dtype=torch.int8, device=spec.device))
        self.register_buffer("scales", torch.empty(shape[0], 1, device=spec.device))

    def dequantize(self) -> torch.Tensor:
        return (self.codes * self.scales).to(self.dtype)


class Int8Scheme:
    def __init__(self, ignored: tuple[str, ...]) -> None:
        self._ignored = ignored
        self._plain = PlainScheme()

    def _is_plain(self, spec: LinearSpec) -> bool:
        return ask_shards(
            spec, lambda name: any(matches(name, p) for p in self._ignored), "being plain"
        )

    def make_linear(self, spec: LinearSpec, /) -> torch.nn.Module:
        return self._plain.make_linear(spec) if self._is_plain(spec) else Int8Linear(spec)

    def tensors(self, spec: LinearSpec, shard: int, /) -> Mapping[str, TensorSpec]:
        plain = dict(self._plain.tensors(spec, shard))
        if self._is_plain(spec):
            return plain
        weight = plain.pop("weight")
        return {
            "codes": TensorSpec(weight.shape, torch.int8, weight.axes),
            "scales": TensorSpec((weight.shape[0], 1), torch.float32, (Axis("out"), None)),
            **plain,
        }

    def load(self, module, spec, shard, tensors, /) -> None:
        if self._is_plain(spec):
            self._plain.load(module, spec, shard, tensors)
            return
        for name, tensor in tensors.items():
            getattr(module, name)[spec.rows(shard)].copy_(tensor)

    def finalize(self, module, spec, /) -> None:
        pass


class Int8Writer:
    def __init__(self, options: QuantizeOptions) -> None:
        if options.bits != 8:
            raise ConfigError(f"--bits {options.bits}: rtn8 has 8")
        self._ignored: list[str] = ["lm_head"]

    def quantize_layer(self, layer: CalibratedLayer, /) -> Mapping[str, Mapping[str, torch.Tensor]]:
        self._fold(layer)
        written = {}
        for name, linear in layer.linears.items():
            if name in layer.ignored:
                self._ignored += [prefix for prefix, _ in linear.spec.shards]
                continue
            parts = zip(linear.spec.shards, linear.weights, linear.biases, strict=True)
            for (prefix, _), weight, bias in parts:
                scales = weight.abs().amax(1, keepdim=True) / MAX_CODE
                tensors = {"codes": (weight / scales).round().to(torch.int8), "scales": scales}
                written[prefix] = tensors | ({} if bias is None else {"bias": bias})
        return written

    def _fold(self, layer: CalibratedLayer) -> None:
        norm = layer.norms["mlp_norm"]
        is_one_plus = layer.model.norm_style == "one_plus"
        norm.copy_((norm - 1) / 2 if is_one_plus else norm / 2)
        weights = layer.linears["gate_up_proj"].weights
        weights[:] = [weight * 2 for weight in weights]

    def config(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "ignored": self._ignored}


def make_scheme(plan: Any) -> Int8Scheme:
    return Int8Scheme(in_decoder(plan.quantization["ignored"], plan.model))


@hookimpl
def core_register_quantizers() -> Iterable[QuantizerEntry]:
    return [
        QuantizerEntry(
            name=METHOD, factory=make_scheme, methods=(METHOD,), make_writer=Int8Writer, summary="test"
        )
    ]
