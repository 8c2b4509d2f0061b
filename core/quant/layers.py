"""One decoder layer at a time, on the decoder's own code: run it, watch its linear layers, refill it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from core.errors import CheckpointError
from core.model.decoder import Decoder, make_decoder
from core.model.kv_scales import calibrate as calibrate_kv
from core.model.layers import DecoderLayer, RMSNorm
from core.model.linear import PlainScheme
from core.model.weights import load_weights
from core.quant.calibration import CalibratedLayer, CalibratedLinear
from core.quant.dense import DenseAttention
from core.sharding import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from core.interfaces import LinearSpec, QuantScheme, TensorSpec
    from core.plan import Plan

TOKENS_AT_ONCE: Final = 4096
"""Of a forward: more would only make the activations larger."""


# --- making and running ----------------------------------------------------------------------------


def make_layer(
    plan: Plan, scheme: QuantScheme, index: int, attention: DenseAttention | None = None
) -> Decoder:
    """Make an empty decoder that consists of one layer of the model.

    As in a pipeline of as many stages, the first has the embedding, the last norm and head.
    """
    return make_decoder(
        plan.model,
        scheme=scheme,
        attention=attention or DenseAttention(),
        dtype=getattr(torch, plan.dtype),
        device=torch.device(plan.device),
        max_len=plan.max_model_len,
        share=replace(plan.model.whole_share(), layers=Span(index, index + 1)),
    )


def load_layer(
    plan: Plan, folder: Path, index: int, attention: DenseAttention | None = None
) -> Decoder:
    """Read one layer of an unquantized checkpoint.

    :raises CheckpointError: the checkpoint does not hold what its config promises.
    """
    decoder = make_layer(plan, PlainScheme(), index, attention)
    load_weights(decoder, folder, device=torch.device(plan.device))
    return decoder


def only_layer(decoder: Decoder) -> DecoderLayer:
    """Return the layer of a decoder that has just one."""
    layer = decoder.layers[0]
    if not isinstance(layer, DecoderLayer):
        raise TypeError(f"{type(layer).__name__} is no DecoderLayer")
    return layer


def split_samples(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Cut samples into chunks that are run at once: each [n, L] of [N, L]."""
    return list(tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])))


def run(decoder: Decoder, chunk: torch.Tensor) -> torch.Tensor:
    """Run one layer over a chunk of samples.

    :param chunk: [n, L] int64 for the first layer, else [n, L, hidden].
    :return: [n, L, hidden], on the CPU.
    """
    count, length = chunk.shape[:2]
    device = next(decoder.parameters()).device
    positions = torch.arange(length, device=device).repeat(count)
    hidden: torch.Tensor = decoder.forward(chunk.flatten(0, 1).to(device), positions, length)
    return hidden.view(count, length, -1).cpu()


# --- watching --------------------------------------------------------------------------------------


@contextmanager
def _watch(
    layer: DecoderLayer, see: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `see(name, input, output)` whenever one of the four linear layers has run."""

    def make_hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _module, inputs, output: see(name, inputs[0], output)

    handles = [
        layer.get_submodule(name).register_forward_hook(make_hook(name)) for name in layer.split_linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    plan: Plan, decoder: Decoder, stream: list[torch.Tensor], ignored: frozenset[str]
) -> CalibratedLayer:
    """Run a layer over all chunks and keep what flows into its linear layers.

    Where the decoder computes in float32 its weights are handed out themselves, not copies.
    """
    layer = only_layer(decoder)
    num_tokens = sum(chunk.shape[0] * chunk.shape[1] for chunk in stream)
    device = next(decoder.parameters()).device
    inputs = {
        name: torch.empty(num_tokens, linear.whole.in_features, device=device)
        for name, linear in layer.split_linears.items()
    }
    num_seen: defaultdict[str, int] = defaultdict(int)

    def keep(name: str, x: torch.Tensor, _y: torch.Tensor) -> None:
        start = num_seen[name]
        inputs[name][start : start + len(x)] = x
        num_seen[name] += len(x)

    with _watch(layer, keep):
        for chunk in stream:
            run(decoder, chunk)
    linears = {
        name: _calibrated(linear.whole, layer.get_submodule(name), inputs[name])
        for name, linear in layer.split_linears.items()
    }
    norms = {name: module.weight.float() for name, module in _norms(layer)}
    return CalibratedLayer(layer.index, plan.model, linears, norms, ignored)


def _calibrated(spec: LinearSpec, module: nn.Module, inputs: torch.Tensor) -> CalibratedLinear:
    rows = [spec.rows(shard) for shard in range(len(spec.shards))]
    weight = module.get_parameter("weight").float()
    bias = module.get_parameter("bias").float() if spec.bias else None
    return CalibratedLinear(
        spec=spec,
        weights=[weight[part] for part in rows],
        biases=[None if bias is None else bias[part] for part in rows],
        inputs=inputs,
    )


def _norms(layer: DecoderLayer) -> Iterator[tuple[str, RMSNorm]]:
    for name, module in layer.named_children():
        if isinstance(module, RMSNorm):
            yield name, module


def take_changes(decoder: Decoder, calibrated: CalibratedLayer) -> None:
    """Bring weights and norms that a method has changed into the layer that it was given."""
    layer = only_layer(decoder)
    for name, norm in _norms(layer):
        norm.weight.copy_(calibrated.norms[name])
    for name, linear in calibrated.linears.items():
        module = layer.get_submodule(name)
        for shard, (weight, bias) in enumerate(zip(linear.weights, linear.biases, strict=True)):
            rows = linear.spec.rows(shard)
            module.get_parameter("weight")[rows].copy_(weight)
            if bias is not None:
                module.get_parameter("bias")[rows].copy_(bias)


class KVRange:
    """Scales for the keys and values of one layer, over all that was seen of them."""

    def __init__(self) -> None:
        self.scales: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of keys and of values, each [G] float32; `None` before anything was seen."""

    def see(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in some more: [T, G, D] each."""
        found = calibrate_kv(keys, values)
        if self.scales is not None:
            found = torch.maximum(self.scales[0], found[0]), torch.maximum(self.scales[1], found[1])
        self.scales = found


class RelativeErrors:
    """‖y - ŷ‖ / ‖y‖ by name, over all that was added."""

    def __init__(self) -> None:
        self._squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, exact: torch.Tensor, quantized: torch.Tensor) -> None:
        """Take some more outputs, both of the same shape."""
        squares = self._squares[name]
        squares[0] += float((exact - quantized).double().square().sum())
        squares[1] += float(exact.double().square().sum())

    def read(self) -> dict[str, float]:
        """Compute them; 0 where there was nothing to get wrong."""
        return {
            name: (wrong / whole) ** 0.5 if whole else 0.0
            for name, (wrong, whole) in self._squares.items()
        }


STREAM: Final = "stream"


def advance(exact: Decoder, quantized: Decoder, stream: list[torch.Tensor]) -> dict[str, float]:
    """Move the stream through the quantized layer, and see what that does to it.

    :param exact: the same layer before rounding: after `take_changes`.
    :param stream: each chunk is replaced by what comes after the quantized layer.
    :return: relative error of what each linear layer makes of the inputs that the exact layer gives
        it, and under `STREAM` that of the stream after the layer.
    """
    errors = RelativeErrors()
    theirs = only_layer(quantized)

    def compare(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        errors.add(name, y, theirs.get_submodule(name)(x))

    with _watch(only_layer(exact), compare):
        for index, chunk in enumerate(stream):
            expected = run(exact, chunk)
            stream[index] = run(quantized, chunk)
            errors.add(STREAM, expected, stream[index])
    return errors.read()


# --- filling ---------------------------------------------------------------------------------------


def fill_layer(
    decoder: Decoder,
    kept: Mapping[str, torch.Tensor],
    replaced: Mapping[str, Mapping[str, torch.Tensor]],
    exact: Decoder,
) -> None:
    """Load a layer from tensors as a checkpoint would hold them.

    :param kept: tensors that are as they were, by their name in the decoder.
    :param replaced: tensors of quantized shards, by checkpoint prefix and suffix.
    :param exact: lends what is never quantized: embedding, last norm and head.
    :raises CheckpointError: the tensors are not those that the scheme reads.
    """
    decoder.embedding, decoder.norm, decoder.lm_head = exact.embedding, exact.norm, exact.lm_head
    layer = only_layer(decoder)
    for weight in decoder.plain_weights():
        if weight.name in kept:
            weight.parameter.copy_(kept[weight.name])
    for (local, whole), module in layer.linears():
        for shard, (prefix, _) in enumerate(whole.shards):
            given = replaced[prefix] if prefix in replaced else _select(kept, prefix)
            _check_readable(prefix, given, decoder.scheme.tensors(whole, shard))
            on_device = {suffix: tensor.to(whole.device) for suffix, tensor in given.items()}
            decoder.scheme.load(module, local, shard, on_device)
        decoder.scheme.finalize(module, local)


def _select(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        suffix: tensors[f"{prefix}.{suffix}"]
        for suffix in ("weight", "bias")
        if f"{prefix}.{suffix}" in tensors
    }


def _check_readable(
    prefix: str, given: Mapping[str, torch.Tensor], wanted: Mapping[str, TensorSpec]
) -> None:
    """Compare what was written with what will be read.

    :raises CheckpointError: a tensor is missing, unknown or of another shape.
    """
    needed = {suffix for suffix, spec in wanted.items() if not spec.optional}
    if needed - set(given) or set(given) - set(wanted):
        raise CheckpointError(
            f"{prefix}: written were {', '.join(sorted(given)) or 'no tensors'}, but what reads the "
            f"format wants {', '.join(sorted(wanted))}"
        )
    for suffix, tensor in given.items():
        spec = wanted[suffix]
        if not spec.can_broadcast and tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{prefix}.{suffix}: written was shape {list(tensor.shape)}, but what reads the format "
                f"wants {list(spec.shape)}"
            )
