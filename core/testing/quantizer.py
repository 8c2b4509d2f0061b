"""Conformance of quantizers: what every `core.interfaces.QuantScheme` must do.

Subclass `QuantizerConformance` in a test module, once for each configuration that your quantizer
reads, and say how a checkpoint stores a weight::

    class TestAcme4Bit(QuantizerConformance):
        entry = acme_quant.ENTRY
        quantization_config = {"quant_method": "acme", "bits": 4, "group_size": 32}
        in_step, out_step = 32, 8

        def quantize(self, spec, shard, weight, bias):
            return {"codes": ..., "scales": ..., **({} if bias is None else {"bias": bias})}

Layers of random sizes are stored in files and loaded as the engine loads them: whole, and cut as
ranks share them.  The weight that a layer applies is found by feeding it the identity; it must be near
the float weight that was quantized, the same in every part, and the output must be its product with
the input.  Define `dequantize` too, and the weight must be exactly that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from core.errors import CheckpointError
from core.interfaces import LinearSpec, QuantScheme, TensorSpec, missing_members
from core.registry import QuantizerEntry, Requirements
from core.testing.linear_cases import (
    LinearCase,
    cut_steps,
    damages,
    describe,
    linear_cases,
    part_cases,
    round_up,
)
from core.testing.lone_linear import TINY_MODEL, LoneLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TOLERANCES: Final = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest error of an output by dtype, relative to |x| |W|ᵀ + |b|."""

WEIGHT_TOLERANCES: Final = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative error of a weight: it may be computed in float32, and is rounded to the dtype."""

MAX_BITS_OFF: Final = 0.1
"""Largest relative difference between `weight_bits` and what a layer occupies."""

_FLOATING: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A layer as its checkpoint holds it."""

    spec: LinearSpec
    weight: torch.Tensor
    """[out_features, in_features] float32, before it was quantized."""
    bias: torch.Tensor | None
    """[out_features] float32."""
    shards: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """By suffix."""

    def named(self) -> dict[str, torch.Tensor]:
        """All tensors by their whole name."""
        return {
            f"{prefix}.{suffix}": tensor
            for (prefix, _), tensors in zip(self.spec.shards, self.shards, strict=True)
            for suffix, tensor in tensors.items()
        }


class QuantizerConformance:
    """The tests; subclass it, define `quantize`, and set `entry` or override `make_scheme`."""

    entry: ClassVar[QuantizerEntry | None] = None
    quantization_config: ClassVar[Mapping[str, Any]] = {}
    """Of the checkpoint: what `plan.quantization` holds."""
    plugin_settings: ClassVar[Mapping[str, Any]] = {}
    """Bound settings by plugin name: what `plan.settings` holds."""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    in_step: ClassVar[int] = 8
    """Layers have multiples of so many inputs."""
    out_step: ClassVar[int] = 8
    """Shards have multiples of so many outputs."""
    max_weight_error: ClassVar[float] = 0.2
    """Largest error that quantizing makes: root mean square over an output feature, relative."""
    whole_dims: ClassVar[frozenset[tuple[str, int]]] = frozenset()
    """(suffix, dimension) of what every rank reads whole, on purpose."""
    skipped_layer: ClassVar[str | None] = None
    """Checkpoint prefix of a layer that the config leaves unquantized."""
    refused_sizes: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(inputs, outputs) of layers that cannot be stored so."""
    tolerances: ClassVar[Mapping[str, float]] = TOLERANCES
    weight_tolerances: ClassVar[Mapping[str, float]] = WEIGHT_TOLERANCES
    settings: ClassVar[hypothesis_settings] = hypothesis_settings(
        max_examples=20, deadline=None, suppress_health_check=list(HealthCheck)
    )

    # --- what subclasses define --------------------------------------------------------------------

    def make_scheme(self) -> QuantScheme:
        """Build the scheme under test; by default with the factory of `entry`."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry and no make_scheme")
        scheme: QuantScheme = self.entry.factory(self.make_plan())
        return scheme

    def make_plan(self) -> Any:
        """Make what the factory is given: of the plan only what quantizers have a use for."""
        return SimpleNamespace(
            model=TINY_MODEL,
            quantization=dict(self.quantization_config),
            settings=dict(self.plugin_settings),
            device=self.device,
            dtype=self.dtypes[0],
        )

    def quantize(
        self, spec: LinearSpec, shard: int, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> Mapping[str, torch.Tensor]:
        """Quantize as whoever writes such checkpoints does; need not be clever.

        :param spec: of the whole layer.
        :param weight: [outputs of the shard, inputs] float32.
        :param bias: [outputs of the shard] float32.
        :return: what a checkpoint holds of the shard, by suffix, the bias included.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no quantize")

    def dequantize(
        self, spec: LinearSpec, shard: int, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Compute the weight of a shard from what `quantize` returned, as the format defines it.

        Optional: the oracle of a law that is skipped without it.

        :return: [outputs of the shard, inputs] float64.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no dequantize")

    def round_inputs(self, spec: LinearSpec, shard: int, x: torch.Tensor) -> torch.Tensor:
        """Round inputs as the layer does, if it quantizes them too.

        The identity must come out as it is: where checkpoints hold a scale, store a power of two.

        :param spec: of the part of the layer that is fed.
        :param x: [T, inputs of the part].
        """
        return x

    # --- generation --------------------------------------------------------------------------------

    def check(
        self, law: Callable[[LinearCase], None], *, cut: bool = False, max_examples: int | None = None
    ) -> None:
        """Try a law on generated layers.

        :param cut: with a part that a rank holds.
        :param max_examples: at most so many, where each is a lot of work.
        """
        cases = linear_cases(self._dtypes(), self.in_step, self.out_step)
        if cut:
            cases = cases.flatmap(
                lambda case: part_cases(case, *cut_steps(self.make_scheme(), case.spec(self.device)))
            )
        count = min(self.settings.max_examples, max_examples or self.settings.max_examples)

        @hypothesis_settings(self.settings, max_examples=count)
        @given(case=cases)
        def attempt(case: LinearCase) -> None:
            law(case)

        attempt()

    def _dtypes(self) -> list[str]:
        """List the dtypes to try: those that the descriptor does not refuse."""
        if self.entry is None:
            return list(self.dtypes)
        refusals = {name: self.entry.unsupported(self._requirements(name)) for name in self.dtypes}
        supported = [name for name, reasons in refusals.items() if not reasons]
        if not supported:
            pytest.skip("; ".join(refusals[self.dtypes[0]]))
        return supported

    def _requirements(self, dtype: str) -> Requirements:
        config = dict(self.quantization_config)
        name = None if self.entry is None else self.entry.name
        return Requirements(
            device=self.device,
            dtype=dtype,
            quantization=config.get("quant_method", name),
            quantization_config=config,
            model_type=TINY_MODEL.model_type,
        )

    # --- how layers are made -----------------------------------------------------------------------

    def store(self, case: LinearCase) -> StoredLinear:
        """Draw weights and quantize them."""
        spec = case.spec(self.device)
        stored = StoredLinear(spec, *case.draw_weights())
        for shard in range(len(spec.shards)):
            rows = spec.rows(shard)
            bias = None if stored.bias is None else stored.bias[rows].clone()
            tensors = self.quantize(spec, shard, stored.weight[rows].clone(), bias)
            stored.shards.append(dict(tensors))
        return stored

    def load(self, stored: StoredLinear, local: LinearSpec | None = None) -> LoneLinear:
        """Load a layer, or the part of it that a rank holds, as the engine does."""
        layer = LoneLinear(self.make_scheme(), stored.spec, local)
        layer.load(stored.named())
        return layer

    def find_weight(self, stored: StoredLinear, local: LinearSpec | None = None) -> torch.Tensor:
        """Find the weight that a layer or a part of it applies, by feeding it the identity.

        :return: [outputs, inputs] float64 on the host.
        """
        bare = StoredLinear(
            replace(stored.spec, bias=False),
            stored.weight,
            None,
            [{k: v for k, v in tensors.items() if k != "bias"} for tensors in stored.shards],
        )
        local = local and replace(local, bias=False)
        spec = local or bare.spec
        identity = torch.eye(spec.in_features, dtype=spec.dtype, device=spec.device)
        return self.load(bare, local).run(identity).T.double().cpu()

    def expect_output(
        self, spec: LinearSpec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute an output in float64, and the magnitudes that its error is relative to.

        :param weight: [outputs, inputs] of the part.
        :return: both [T, outputs] on the host.
        """
        parts = []
        for shard in range(len(spec.shards)):
            rows = spec.rows(shard)
            rounded_bias = None if bias is None else bias[rows].to(spec.dtype)
            parts.append(_multiply(self.round_inputs(spec, shard, x), weight[rows], rounded_bias))
        outs, magnitudes = zip(*parts, strict=True)
        return torch.cat(outs, -1), torch.cat(magnitudes, -1)

    def _verify(
        self,
        layer: LoneLinear,
        x: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
        what: str,
    ) -> None:
        """Compare what a layer makes of x with what `expect_output` says."""
        spec, before = layer.split.local, x.clone()
        out = layer.run(x)
        assert torch.equal(x, before), f"{what}: forward changes its input"
        shape = (len(x), spec.out_features)
        assert tuple(out.shape) == shape, f"{what}: the output is {tuple(out.shape)}, not {shape}"
        assert out.dtype == spec.dtype, f"{what}: the output is {out.dtype}, not {spec.dtype}"
        expected, magnitude = wanted
        tolerance = self.tolerances[describe(spec.dtype)]
        assert_within(out, expected, tolerance * magnitude, f"output of {what}")

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The core calls what the Protocol names, as the Protocol says."""
        problems = missing_members(self.make_scheme(), QuantScheme)
        assert not problems, "; ".join(problems)

    def test_tensors_describe_what_is_stored(self) -> None:
        """Names, shapes and dtypes are known before a byte is read."""

        def law(case: LinearCase) -> None:
            scheme, stored = self.make_scheme(), self.store(case)
            for shard, (prefix, _) in enumerate(stored.spec.shards):
                wanted = scheme.tensors(stored.spec, shard)
                problems = list(_differences(wanted, stored.shards[shard]))
                assert not problems, f"{prefix}: " + "; ".join(problems)

        self.check(law)

    def test_every_stored_dimension_can_be_cut(self) -> None:
        """A dimension without an axis is read whole by every rank; if it must be, say `whole_dims`."""

        def law(case: LinearCase) -> None:
            scheme, spec = self.make_scheme(), case.spec(self.device)
            for shard, (prefix, size) in enumerate(spec.shards):
                features = {"in": spec.in_features, "out": size}
                for suffix, tensor in scheme.tensors(spec, shard).items():
                    problems = list(_axis_problems(suffix, tensor, features, self.whole_dims))
                    assert not problems, f"{prefix}: " + "; ".join(problems)

        self.check(law)

    def test_shards_load_in_any_order(self) -> None:
        """Each writes all of its rows and no other's."""

        def law(case: LinearCase) -> None:
            stored = self.store(case)
            usual = tuple(range(len(case.out_features)))
            x = case.draw_rows(self.device)
            first, second = (
                self._load_in_order(stored, order).run(x) for order in (usual, case.shard_order)
            )
            assert first.isfinite().all(), "load does not write all that make_linear has made"
            assert torch.equal(first, second), f"the order {case.shard_order} gives another layer"

        self.check(law)

    @torch.no_grad()
    def _load_in_order(self, stored: StoredLinear, order: Sequence[int]) -> LoneLinear:
        """Fill a layer that held NaN before."""
        layer = LoneLinear(self.make_scheme(), stored.spec)
        for tensor in layer.storage():
            if tensor.is_floating_point():
                tensor.copy_(torch.full(tensor.shape, math.nan))
        for shard in order:
            tensors = {name: x.to(self.device) for name, x in stored.shards[shard].items()}
            layer.scheme.load(layer.linear, stored.spec, shard, tensors)
        layer.scheme.finalize(layer.linear, stored.spec)
        return layer

    def test_weight_is_near_the_one_that_was_quantized(self) -> None:
        """Codes, zero points, scales and rows are where the format puts them.

        If this fails, look at the order of packed codes first, then at zero points, then at which
        inputs share a scale.
        """

        def law(case: LinearCase) -> None:
            stored = self.store(case)
            exact = stored.weight.double()
            errors = (self.find_weight(stored) - exact).pow(2).mean(-1).sqrt()
            error, row = (errors / exact.pow(2).mean(-1).sqrt()).nan_to_num(math.inf).max(0)
            assert error <= self.max_weight_error, (
                f"the weights of output feature {int(row)} are off by {float(error):.3g} of their size, "
                f"and max_weight_error is {self.max_weight_error}"
            )

        self.check(law)

    def test_weight_is_what_the_format_says(self) -> None:
        """Equal to `dequantize`, up to rounding to the dtype."""
        if type(self).dequantize is QuantizerConformance.dequantize:
            pytest.skip("no dequantize")

        def law(case: LinearCase) -> None:
            stored = self.store(case)
            weight = self.find_weight(stored)
            for shard, tensors in enumerate(stored.shards):
                expected = self.dequantize(stored.spec, shard, tensors)
                bound = self.weight_tolerances[case.dtype] * expected.abs()
                what = f"weight of {stored.spec.shards[shard][0]}"
                assert_within(weight[stored.spec.rows(shard)], expected, bound, what)

        self.check(law)

    def test_output_is_the_product(self) -> None:
        """Y = x Wᵀ + b for any number of rows, none included."""

        def law(case: LinearCase) -> None:
            stored = self.store(case)
            x = case.draw_rows(self.device)
            wanted = self.expect_output(stored.spec, self.find_weight(stored), stored.bias, x)
            self._verify(self.load(stored), x, wanted, "the layer")

        self.check(law)

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """A row alone gives what it gives among others, even where another one is NaN or huge."""

        def law(case: LinearCase) -> None:
            stored = self.store(case)
            layer, x = self.load(stored), case.draw_rows(self.device)
            _, magnitude = self.expect_output(stored.spec, self.find_weight(stored), stored.bias, x)
            bound = 2 * self.tolerances[case.dtype] * magnitude
            together = layer.run(x)
            for row in range(case.num_rows):
                part = slice(row, row + 1)
                assert_within(layer.run(x[part]), together[part], bound[part], f"row {row} alone")
            for factor in (math.nan, 1000.0):
                other = x.clone()
                other[:1] *= factor
                what = f"rows beside one that was multiplied by {factor}"
                assert_within(layer.run(other)[1:], together[1:], bound[1:], what)

        self.check(law)

    def test_parts_are_parts_of_the_whole(self) -> None:
        """What a rank computes is its part of the whole layer, wherever the layer is cut.

        So the outputs of ranks side by side are the layer's, and over its inputs their sum.  If this
        fails where a part begins inside a group, look at `core.sharding.local_groups`.
        """

        def law(case: LinearCase) -> None:
            stored, local = self.store(case), case.local_spec(self.device)
            (inputs,), rows, what = local.input_spans, case.part_rows(), str(case.part)
            expected = self.find_weight(stored)[rows][:, slice(*inputs)]
            bound = self.weight_tolerances[case.dtype] * expected.abs()
            assert_within(self.find_weight(stored, local), expected, bound, f"weight of {what}")
            bias = stored.bias[rows] if local.bias and stored.bias is not None else None
            x = case.draw_rows(self.device)[:, slice(*inputs)].contiguous()
            wanted = self.expect_output(local, expected, bias, x)
            self._verify(self.load(stored, local), x, wanted, what)

        self.check(law, cut=True)

    def test_dummy_weights_are_usable(self) -> None:
        """Without a checkpoint the outputs are finite and not all the same."""

        def law(case: LinearCase) -> None:
            first, again, other = (self._run_dummy(case, seed) for seed in (1, 1, 2))
            assert first.isfinite().all(), "dummy weights give outputs that are not finite"
            assert first.float().std() > 0, "dummy weights give the same output everywhere"
            assert torch.equal(first, again), "the same seed gives other dummy weights"
            assert not torch.equal(first, other), "another seed gives the same dummy weights"

        self.check(law, cut=True)

    def _run_dummy(self, case: LinearCase, seed: int) -> torch.Tensor:
        whole, local = case.spec(self.device), case.local_spec(self.device)
        layer = LoneLinear(self.make_scheme(), whole, local)
        layer.fill(seed)
        x = torch.randn(4, local.in_features, generator=case.generator())
        return layer.run(x.to(whole.dtype).to(self.device))

    def test_wrong_tensors_are_refused(self) -> None:
        """A wrong shape or dtype is a `CheckpointError` that names the tensor, as is a missing one."""

        def law(case: LinearCase) -> None:
            scheme, stored, shard = self.make_scheme(), self.store(case), case.shard_order[0]
            prefix, _ = stored.spec.shards[shard]
            wanted = scheme.tensors(stored.spec, shard)
            for suffix, tensor in stored.shards[shard].items():
                for damage, replacement in damages(tensor, wanted[suffix]):
                    may_load = replacement is None and wanted[suffix].optional
                    name = f"{prefix}.{suffix}"
                    self._expect_refusal(stored, name, damage, replacement, may_load=may_load)

        self.check(law, max_examples=4)

    def _expect_refusal(
        self,
        stored: StoredLinear,
        name: str,
        damage: str,
        replacement: torch.Tensor | None,
        *,
        may_load: bool,
    ) -> None:
        tensors = stored.named()
        del tensors[name]
        if replacement is not None:
            tensors[name] = replacement
        told = _refusal(lambda: LoneLinear(self.make_scheme(), stored.spec).load(tensors))
        if told is None:
            assert may_load, f"{name} {damage}, and is loaded all the same"
        else:
            owner = name.rpartition(".")[0]
            assert owner in told, f"{name} {damage}, and the error does not name {owner}: {told}"

    def test_skipped_layers_are_plain(self) -> None:
        """What the config skips is stored and applied as it is."""
        if self.skipped_layer is None:
            pytest.skip("no skipped_layer")
        scheme, name, dtype = self.make_scheme(), self.skipped_layer, self._dtypes()[0]
        case = LinearCase(dtype, self.in_step, (self.out_step,), has_bias=True, num_rows=3, seed=1)
        spec = case.spec(self.device, name)
        names = sorted(scheme.tensors(spec, 0))
        assert names == ["bias", "weight"], f"{name} is skipped, but {names} are wanted of it"
        weight, bias = case.draw_weights()
        stored = StoredLinear(spec, weight, bias, [{"weight": weight, "bias": bias}])  # type: ignore[dict-item]
        x = case.draw_rows(self.device)
        wanted = _multiply(x, weight.to(spec.dtype), None if bias is None else bias.to(spec.dtype))
        self._verify(self.load(stored), x, wanted, name)

    def test_impossible_sizes_are_refused(self) -> None:
        """A layer that cannot be stored so is a `CheckpointError` that names it."""
        if not self.refused_sizes:
            pytest.skip("no refused_sizes")
        for num_inputs, num_outputs in self.refused_sizes:
            case = LinearCase(self._dtypes()[0], num_inputs, (num_outputs,), False, 1, 0)
            scheme, spec = self.make_scheme(), case.spec(self.device)
            what = f"a layer of {num_inputs} inputs and {num_outputs} outputs"
            told = _refusal(lambda: (scheme.make_linear(spec), scheme.tensors(spec, 0)))  # noqa: B023  called at once
            assert told is not None, f"{what} is accepted"
            assert spec.name in told, f"{what}: the error does not name {spec.name}: {told}"

    def test_weight_bits_are_those_of_a_layer(self) -> None:
        """The number that tells whether a model fits before it is loaded."""
        if self.entry is None:
            pytest.skip("no entry")
        dtype = self._dtypes()[0]
        num_inputs, num_outputs = round_up(2048, self.in_step), round_up(512, self.out_step)
        case = LinearCase(dtype, num_inputs, (num_outputs,), False, 1, 0)
        layer = LoneLinear(self.make_scheme(), case.spec(self.device))
        num_bytes = sum(tensor.nbytes for tensor in layer.storage())
        actual = 8 * num_bytes / (num_inputs * num_outputs)
        stated = self.entry.weight_bits(self._requirements(dtype))
        wanted = 8 * case.spec().dtype.itemsize if stated is None else stated
        assert abs(actual - wanted) <= MAX_BITS_OFF * wanted, (
            f"an element takes {actual:.4g} bits, but weight_bits says {stated}"
        )


# --- judging ---------------------------------------------------------------------------------------


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    """Compare element by element; NaN equals nothing.

    :param bound: largest absolute error of each element.
    """
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    is_wrong = ~((actual - expected).abs() <= bound + 1e-30)
    if is_wrong.any():
        place = tuple(is_wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(is_wrong.sum())} of {is_wrong.numel()} elements are wrong, the first at "
            f"{place}: {actual[place].item():.6g} instead of {expected[place].item():.6g}"
        )


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute x Wᵀ + b and |x| |W|ᵀ + |b| in float64, on the host."""
    x, weight = x.double().cpu(), weight.double().cpu()
    offset = torch.zeros(len(weight)) if bias is None else bias.double().cpu()
    return x @ weight.T + offset, x.abs() @ weight.abs().T + offset.abs()


def _refusal(attempt: Callable[[], object]) -> str | None:
    """Return the message of the `CheckpointError` that something raises, if it does."""
    try:
        attempt()
    except CheckpointError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{error!r} is raised where CheckpointError is expected") from error
    return None


def _differences(wanted: Mapping[str, TensorSpec], held: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Compare what `tensors` names with what a checkpoint holds."""
    for suffix in held.keys() - wanted.keys():
        yield f"the checkpoint holds {suffix}, which tensors does not name"
    for suffix, spec in wanted.items():
        if suffix not in held:
            if not spec.optional:
                yield f"tensors names {suffix}, which the checkpoint does not hold"
            continue
        shape, dtype = tuple(held[suffix].shape), held[suffix].dtype
        if shape != spec.shape and not spec.can_broadcast:
            yield f"{suffix} has shape {shape}, but tensors says {spec.shape}"
        accepted = spec.dtype or _FLOATING
        if dtype not in (accepted if isinstance(accepted, tuple) else (accepted,)):
            yield f"{suffix} is {describe(dtype)}, but tensors says {describe(accepted)}"


def _axis_problems(
    suffix: str,
    tensor: TensorSpec,
    features: Mapping[str, int],
    whole_dims: frozenset[tuple[str, int]],
) -> Iterator[str]:
    """Compare the axes of a stored tensor with its shape."""
    if len(tensor.axes) > len(tensor.shape):
        yield f"{suffix} has {len(tensor.axes)} axes, but {len(tensor.shape)} dimensions"
    axes = (*tensor.axes, *[None] * len(tensor.shape))
    for dim, (size, axis) in enumerate(zip(tensor.shape, axes, strict=False)):
        if axis is None:
            if size > 1 and (suffix, dim) not in whole_dims:
                yield f"dimension {dim} of {suffix} has no axis"
            continue
        count = -(-features[axis.along] // axis.step)
        if size != count:
            yield (
                f"dimension {dim} of {suffix} has {size} indices, but {axis} makes {count} of "
                f"{features[axis.along]} features"
            )
