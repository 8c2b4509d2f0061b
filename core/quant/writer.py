"""Unquantized checkpoint -> quantized checkpoint, one decoder layer at a time.

Each layer is read, shown the calibration text as it comes out of the quantized layers before it,
handed to the quantizer, written, and read back through the scheme that engines read it with.  What
is in memory at any time is one layer, twice; what flows into its linear layers; the calibration text
as a stream; and the tensors of one file.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from core.errors import CheckpointError, ConfigError
from core.model.kv_scales import is_about_cache, scale_tensors
from core.model.layers import Build, make_layer_linears
from core.model.linear import PlainScheme
from core.model.weights import CheckpointReader, list_files, load_weights
from core.quant.checkpoint import ShardWriter
from core.quant.dense import DenseAttention
from core.quant.layers import (
    STREAM,
    KVRange,
    advance,
    calibrate,
    fill_layer,
    load_layer,
    make_layer,
    only_layer,
    split_samples,
    take_changes,
)
from core.quant.names import in_decoder, matches, matches_any
from core.quant.report import LayerReport, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from core.interfaces import LinearSpec, QuantScheme
    from core.model.decoder import Decoder
    from core.model.spec import ModelSpec
    from core.plan import Plan
    from core.quant.calibration import CalibratedLayer, LayerQuantizer, QuantizeOptions
    from core.quant.quality import QualityProbe
    from core.quant.report import Quality
    from core.quant.samples import Samples


FP8: Final = "fp8"
"""The one dtype of a KV cache that scales are written for."""

# --- what stays as it is ---------------------------------------------------------------------------


def complete_ignore(options: QuantizeOptions, model: ModelSpec) -> QuantizeOptions:
    """Add to the layers to leave alone what is never quantized: the head, and parts like vision towers."""
    others = [prefix.removesuffix(".") for prefix in model.ignored_prefixes]
    return replace(options, ignore=tuple(dict.fromkeys(("lm_head", *others, *options.ignore))))


def find_ignored(options: QuantizeOptions, asked: tuple[str, ...], plan: Plan) -> list[frozenset[str]]:
    """Find the modules of each layer that stay as they are.

    :param asked: patterns of the user; each has to mean some layer.
    :raises ConfigError: one means none, or a part of a layer whose parts are stored as one.
    :raises CheckpointError: a regular expression is malformed.
    """
    patterns = in_decoder(options.ignore, plan.model)
    build = Build(
        plan.model,
        PlainScheme(),
        DenseAttention(),
        torch.float32,
        torch.device("meta"),
        plan.model.whole_share(),
        None,
    )
    layers = [make_layer_linears(build, index) for index in range(plan.model.num_layers)]
    specs = [linear.whole for linears in layers for linear in linears.values()]
    names = ["lm_head", *(prefix for spec in specs for prefix, _ in spec.shards)]
    for pattern, spelled in zip(asked, in_decoder(asked, plan.model), strict=True):
        if not any(matches(name, spelled) for name in names):
            raise ConfigError(
                f"--ignore {pattern} matches no linear layer; they are called like {names[1]}"
            )
    return [
        frozenset(name for name, linear in linears.items() if _is_ignored(linear.whole, patterns))
        for linears in layers
    ]


def _is_ignored(spec: LinearSpec, patterns: tuple[str, ...]) -> bool:
    found = {prefix: matches_any(prefix, patterns) for prefix, _ in spec.shards}
    if len(set(found.values())) > 1:
        given, missing = (
            ", ".join(p for p, is_in in found.items() if is_in is k) for k in (True, False)
        )
        raise ConfigError(
            f"--ignore matches {given} but not {missing}, and engines load them as one layer; "
            f"ignore all of them or none"
        )
    return any(found.values())


# --- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that is decided before the first layer is read."""

    source: Plan
    """Of the checkpoint to read; its device and dtype are those of the calibration."""
    written: Plan
    """Of the checkpoint to write, on the same device and in the same dtype; its `quantization` is that
    of before the first layer."""
    folder: Path
    """Of the checkpoint to read."""
    target: Path
    """Folder to write to, which exists."""
    options: QuantizeOptions
    ignored: list[frozenset[str]]
    """Module names that stay as they are, of each layer."""
    quantizer: LayerQuantizer
    calibration: Samples


class CheckpointQuantizer:
    """Quantizes the tensors of one checkpoint; config and side files are others' business.

    :param probe: measures the effect on a text, if given.
    """

    def __init__(self, setup: Setup, probe: QualityProbe | None = None) -> None:
        self._setup = setup
        self._probe = probe
        self._shards = ShardWriter(setup.target)
        self._stream = split_samples(setup.calibration.tokens)
        self._quality: Quality | None = None
        self._num_weights = 0
        self._num_quantized_bytes = 0

    @torch.no_grad()
    def run(self, report_layer: Callable[[LayerReport], None]) -> Report:
        """Write all tensors.

        :param report_layer: called after each layer.
        :raises CytheraError: the checkpoint cannot be read or written, or the quantizer's tensors are
            not those that its scheme reads.
        """
        setup = self._setup
        with ExitStack() as stack:
            # All of the checkpoint, also what the decoder does not run.
            spec = replace(setup.source.model, ignored_prefixes=())
            reader = CheckpointReader(list_files(setup.folder), spec, torch.device("cpu"), stack)
            self._reader, self._left = reader, dict.fromkeys(reader.tensors)
            layers = []
            for index in range(setup.source.model.num_layers):
                layers.append(self._quantize_layer(index))
                report_layer(layers[-1])
            for name in self._left:
                self._shards.add(reader.tensors[name].name, reader.read(name))
            num_before = sum(reader.num_bytes(name) for name in reader.tensors)
        self._shards.finish()
        return Report(
            options=asdict(setup.options),
            num_calibration_tokens=setup.calibration.tokens.numel(),
            bits_per_weight=8 * self._num_quantized_bytes / max(self._num_weights, 1),
            bytes_before=num_before,
            bytes_after=self._shards.num_bytes,
            layers=layers,
            quality=self._quality,
        )

    def _make_scheme(self) -> QuantScheme:
        """Make what engines read the layers with that are written by now."""
        written = self._setup.written
        plan = replace(written, quantization=self._setup.quantizer.config())
        scheme: QuantScheme = written.factory("quant")(plan)
        return scheme

    def _quantize_layer(self, index: int) -> LayerReport:
        begin = time.monotonic()
        setup = self._setup
        attention = DenseAttention()
        exact = load_layer(setup.source, setup.folder, index, attention)
        if self._probe is not None:
            self._probe.advance_before(exact)
        kv_range = KVRange()
        attention.observe = kv_range.see if setup.options.kv_cache_dtype == FP8 else None
        calibrated = calibrate(setup.source, exact, self._stream, setup.ignored[index])
        attention.observe = None
        replaced = self._replace(calibrated)
        take_changes(exact, calibrated)
        kept = self._keep(exact, calibrated)
        self._write(kept, replaced)
        if kv_range.scales is not None:
            self._write_kv_scales(index, *kv_range.scales)
        del calibrated
        readable = make_layer(setup.source, self._make_scheme(), index)
        fill_layer(readable, kept, replaced, exact)
        errors = advance(exact, readable, self._stream)
        if self._probe is not None:
            self._probe.advance_after(readable)
            if index == setup.source.model.num_layers - 1:
                self._quality = self._probe.measure(exact)
        stream_error = errors.pop(STREAM)
        linears = {name: e for name, e in errors.items() if name not in setup.ignored[index]}
        return LayerReport(index, stream_error, linears, time.monotonic() - begin)

    def _replace(self, calibrated: CalibratedLayer) -> dict[str, dict[str, torch.Tensor]]:
        """Let the method quantize a layer: the tensors of each shard, by suffix.

        :raises CheckpointError: it returned other shards than it was asked for.
        """
        returned = self._setup.quantizer.quantize_layer(calibrated)
        linears = [item for name, item in calibrated.linears.items() if name not in calibrated.ignored]
        wanted = {prefix for linear in linears for prefix, _ in linear.spec.shards}
        if wanted != set(returned):
            raise CheckpointError(
                f"the quantizer {self._setup.options.method!r} was to write {sorted(wanted)}, "
                f"but wrote {sorted(returned)}"
            )
        replaced = {prefix: dict(tensors) for prefix, tensors in returned.items()}
        for linear in linears:
            for (prefix, _), weight in zip(linear.spec.shards, linear.weights, strict=True):
                tensors = replaced[prefix]
                self._num_weights += weight.numel()
                self._num_quantized_bytes += sum(t.nbytes for s, t in tensors.items() if s != "bias")
                if f"{prefix}.bias" in self._reader.tensors and "bias" in tensors:
                    tensors["bias"] = self._as_stored(f"{prefix}.bias", tensors["bias"])
        return replaced

    def _keep(self, exact: Decoder, calibrated: CalibratedLayer) -> dict[str, torch.Tensor]:
        """List the tensors of a layer that are stored as they were, by their name in the decoder."""
        layer = only_layer(exact)
        norms = {id(layer.get_submodule(name).weight): norm for name, norm in calibrated.norms.items()}
        kept = {
            weight.name: norms[id(weight.parameter)]
            for weight in exact.plain_weights()
            if id(weight.parameter) in norms
        }
        for name in calibrated.ignored:
            linear = calibrated.linears[name]
            for shard, (prefix, _) in enumerate(linear.spec.shards):
                kept[f"{prefix}.weight"] = linear.weights[shard]
                bias = linear.biases[shard]
                if bias is not None:
                    kept[f"{prefix}.bias"] = bias
        return {name: self._as_stored(name, tensor) for name, tensor in kept.items()}

    def _as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in its dtype in the checkpoint, and bit for bit where nothing changed it."""
        stored = self._reader.read(name)
        is_same = torch.equal(tensor.cpu(), stored.to(tensor.dtype))
        return stored if is_same else tensor.to(stored.dtype)

    def _write(
        self,
        kept: Mapping[str, torch.Tensor],
        replaced: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Write the tensors of a layer, each under the name that the checkpoint gives its owner."""
        for name, tensor in kept.items():
            self._shards.add(self._reader.tensors[name].name, tensor)
            del self._left[name]
        for prefix, tensors in replaced.items():
            stored_prefix = self._reader.tensors[f"{prefix}.weight"].name.removesuffix("weight")
            for suffix, tensor in tensors.items():
                self._shards.add(stored_prefix + suffix, tensor)
            for suffix in ("weight", "bias"):
                self._left.pop(f"{prefix}.{suffix}", None)

    def _write_kv_scales(self, index: int, k_scales: torch.Tensor, v_scales: torch.Tensor) -> None:
        """Write the scales of a layer's KV cache in the place of those that the checkpoint has."""
        attention = f"model.layers.{index}.self_attn."
        stored = self._reader.tensors[f"{attention}o_proj.weight"].name.removesuffix("o_proj.weight")
        for name in [n for n in self._left if n.startswith(attention) and is_about_cache(n)]:
            del self._left[name]
        for prefix, tensors in scale_tensors(index, k_scales, v_scales).items():
            for suffix, tensor in tensors.items():
                self._shards.add(f"{stored}{prefix.removeprefix(attention)}.{suffix}", tensor)


@torch.no_grad()
def verify(written: Plan, folder: Path) -> None:
    """Read a checkpoint as an engine would, a layer at a time.

    :raises CheckpointError: something is missing, or not of the shape or dtype that is read.
    """
    scheme = written.factory("quant")(written)
    for index in range(written.model.num_layers):
        decoder = make_layer(written, scheme, index)
        load_weights(decoder, folder, device=torch.device(written.device))
