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
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core.errors import CheckpointError
from core.interfaces import LinearSpec, QuantScheme, TensorSpec, missing_members
from core.registry import QuantizerEntry, Requirements
from core.sharding import Span
from core.testing.lone_linear import TINY_MODEL, LoneLinear, cut_linear, indices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TOLERANCES: Final = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest error of an output by dtype, relative to |x| |W|ᵀ + |b|."""

WEIGHT_TOLERANCES: Final = {"float64": 1e-6, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative error of a weight: it may be computed in float32, and is rounded to the dtype."""

LAYERS: Final = {
    1: ("down", "model.layers.0.mlp", "down_proj", ("down_proj",)),
    2: ("gate_up", "model.layers.0.mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    3: ("qkv", "model.layers.0.self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
}
"""By number of shards: role, parent, name, and prefixes of the shards below the parent."""

MAX_BITS_OFF: Final = 0.1
"""Largest relative difference between `weight_bits` and what a layer occupies."""


@dataclass(frozen=True, slots=True)
class PartCase:
    """What one rank holds of a layer."""

    inputs: Span
    outputs: tuple[tuple[Span, ...], ...]
    """Of each shard."""
    bias: bool
    """Whether this rank adds it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One generated layer, its input, and a part of it."""

    dtype: str
    in_features: int
    out_features: tuple[int, ...]
    """Of each shard."""
    bias: bool
    num_rows: int
    seed: int
    part: PartCase | None = None
    shard_order: tuple[int, ...] = ()

    def spec(self, device: str = "cpu") -> LinearSpec:
        """Describe the whole layer."""
        return make_spec(self, torch.device(device))


@dataclass(frozen=True, slots=True)
class Stored:
    """A layer as its checkpoint holds it."""

    weight: torch.Tensor
    """[out_features, in_features] float32, before it was quantized."""
    bias: torch.Tensor | None
    """[out_features] float32."""
    shards: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """By suffix."""

    def named(self, spec: LinearSpec) -> dict[str, torch.Tensor]:
        """All tensors by their whole name."""
        return {
            f"{prefix}.{suffix}": tensor
            for (prefix, _), tensors in zip(spec.shards, self.shards, strict=True)
            for suffix, tensor in tensors.items()
        }


class QuantizerConformance:
    """The tests; subclass it, define `quantize`, and set `entry` or override `make_scheme`."""

    entry: ClassVar[QuantizerEntry | None] = None
    quantization_config: ClassVar[Mapping[str, Any]] = {}
    """Of the checkpoint; what `plan.quantization` holds."""
    plugin_settings: ClassVar[Mapping[str, Any]] = {}
    """Bound settings by plugin name; what `plan.settings` holds."""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    in_step: ClassVar[int] = 8
    """Layers have multiples of so many inputs."""
    out_step: ClassVar[int] = 8
    """Shards have multiples of so many outputs."""
    max_weight_error: ClassVar[float] = 0.2
    """Largest error that quantizing makes, relative, as root mean square over an output feature."""
    whole_dims: ClassVar[frozenset[tuple[str, int]]] = frozenset()
    """(suffix, dimension) of stored dimensions that every rank reads whole, on purpose."""
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
    ) -> torch.Tensor | None:
        """Compute the weight of a shard from what `quantize` returned, as the format defines it.

        :return: [outputs of the shard, inputs] float64, or `None` to go without this oracle.
        """
        return None

    def round_inputs(self, spec: LinearSpec, shard: int, x: torch.Tensor) -> torch.Tensor:
        """Round inputs as the layer does, if it quantizes them too.

        The identity must stay as it is; with a stored scale, make it a power of two.

        :param spec: of the part of the layer that is fed.
        :param x: [T, inputs of the part].
        """
        return x

    # --- generation --------------------------------------------------------------------------------

    def supported_dtypes(self) -> list[str]:
        """List the dtypes to try, which are those that the descriptor does not refuse."""
        refusals = {name: self._refusals(name) for name in self.dtypes}
        supported = [name for name, reasons in refusals.items() if not reasons]
        if not supported:
            pytest.skip("; ".join(refusals[self.dtypes[0]]))
        return supported

    def _refusals(self, dtype: str) -> list[str]:
        return [] if self.entry is None else self.entry.unsupported(self._requirements(dtype))

    def _requirements(self, dtype: str) -> Requirements:
        config = dict(self.quantization_config)
        method = config.get("quant_method") or (self.entry.name if self.entry else None)
        return Requirements(
            device=self.device,
            dtype=dtype,
            quantization=method,
            quantization_config=config,
            model_type=TINY_MODEL.model_type,
        )

    def check(self, law: Callable[[Case], None], *, cut: bool = False) -> None:
        """Try a law on generated layers.

        :param cut: with a part that a rank holds.
        """
        cases = layer_cases(self.supported_dtypes(), self.in_step, self.out_step)
        if cut:
            cases = cases.flatmap(lambda case: self._cut(case))

        @self.settings
        @given(case=cases)
        def attempt(case: Case) -> None:
            law(case)

        attempt()

    def _cut(self, case: Case) -> st.SearchStrategy[Case]:
        steps = cut_steps(self.make_scheme(), case.spec(self.device))
        return part_cases(case, steps)

    # --- how layers are made -----------------------------------------------------------------------

    def store(self, case: Case) -> Stored:
        """Draw weights and quantize them."""
        spec = case.spec(self.device)
        stored = Stored(*draw_weights(case))
        for shard in range(len(spec.shards)):
            rows = spec.rows(shard)
            bias = None if stored.bias is None else stored.bias[rows].clone()
            tensors = self.quantize(spec, shard, stored.weight[rows].clone(), bias)
            stored.shards.append(dict(tensors))
        return stored

    def load(
        self, case: Case, stored: Stored, local: LinearSpec | None = None, *, bias: bool = True
    ) -> LoneLinear:
        """Load a layer, or a part of it, as the engine does.

        :param bias: `False` for the layer without its bias.
        """
        whole = case.spec(self.device)
        tensors = stored.named(whole)
        if not bias:
            whole = without_bias(whole)
            local = local and without_bias(local)
            tensors = {name: x for name, x in tensors.items() if not name.endswith(".bias")}
        layer = LoneLinear(self.make_scheme(), whole, local)
        layer.load(tensors)
        return layer

    def find_weight(self, case: Case, stored: Stored, local: LinearSpec | None = None) -> torch.Tensor:
        """Find the weight that a layer applies, by feeding it the identity.

        :return: [outputs, inputs] float64.
        """
        spec = local or case.spec(self.device)
        identity = torch.eye(spec.in_features, dtype=spec.dtype, device=spec.device)
        return self.load(case, stored, local, bias=False).run(identity).T.double()

    def draw_rows(self, case: Case, num_features: int) -> torch.Tensor:
        """Draw an input: [num_rows, num_features] in the dtype."""
        generator = torch.Generator().manual_seed(case.seed + 1)
        x = torch.randn(case.num_rows, num_features, generator=generator)
        return x.to(getattr(torch, case.dtype)).to(self.device)

    def expect_output(
        self, spec: LinearSpec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the output in float64, and the sum of magnitudes that its error is relative to."""
        out, size = [], []
        for shard in range(len(spec.shards)):
            rows = spec.rows(shard)
            rounded = self.round_inputs(spec, shard, x).double()
            out.append(rounded @ weight[rows].T)
            size.append(rounded.abs() @ weight[rows].abs().T)
        total, magnitude = torch.cat(out, -1), torch.cat(size, -1)
        if bias is None:
            return total, magnitude
        bias = bias.to(spec.dtype).double()
        return total + bias, magnitude + bias.abs()

    def _check_output(
        self,
        layer: LoneLinear,
        case: Case,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        what: str,
    ) -> None:
        spec = layer.split.local
        x = self.draw_rows(case, spec.in_features)
        before = x.clone()
        out = layer.run(x)
        assert torch.equal(x, before), f"{what}: forward changes its input"
        shape = (case.num_rows, spec.out_features)
        assert tuple(out.shape) == shape, f"{what}: output {tuple(out.shape)}, not {shape}"
        assert out.dtype == spec.dtype, f"{what}: output in {out.dtype} for input in {spec.dtype}"
        expected, magnitude = self.expect_output(spec, weight, bias, x)
        assert_within(out, expected, self.tolerances[case.dtype] * magnitude, what)

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The core calls what the Protocol names, as the Protocol says."""
        problems = missing_members(self.make_scheme(), QuantScheme)
        assert not problems, "; ".join(problems)

    def test_tensors_describe_what_is_stored(self) -> None:
        """Names, shapes and dtypes are known before a byte is read."""

        def law(case: Case) -> None:
            scheme, spec = self.make_scheme(), case.spec(self.device)
            for shard, held in enumerate(self.store(case).shards):
                problems = list(compare_tensors(scheme.tensors(spec, shard), held))
                assert not problems, f"{spec.shards[shard][0]}: " + "; ".join(problems)

        self.check(law)

    def test_every_stored_dimension_can_be_cut(self) -> None:
        """A dimension without an axis is read whole by every rank; say so in `whole_dims`."""

        def law(case: Case) -> None:
            scheme, spec = self.make_scheme(), case.spec(self.device)
            for shard, (prefix, _) in enumerate(spec.shards):
                for suffix, tensor in scheme.tensors(spec, shard).items():
                    problems = list(axis_problems(suffix, tensor, spec, shard, self.whole_dims))
                    assert not problems, f"{prefix}: " + "; ".join(problems)

        self.check(law)

    def test_shards_load_in_any_order(self) -> None:
        """And each writes all of its rows and no other's."""

        def law(case: Case) -> None:
            stored, orders = self.store(case), (tuple(range(len(case.out_features))), case.shard_order)
            outs = [self._load_directly(case, stored, order) for order in orders]
            for order, out in zip(orders, outs, strict=True):
                assert out.isfinite().all(), (
                    f"shards loaded in order {order}: something that make_linear made was not written"
                )
            assert torch.equal(*outs), f"shards loaded in order {orders[1]} give another output"

        self.check(law)

    def _load_directly(self, case: Case, stored: Stored, order: Sequence[int]) -> torch.Tensor:
        scheme, spec = self.make_scheme(), case.spec(self.device)
        layer = LoneLinear(scheme, spec)
        with torch.no_grad():
            for tensor in (*layer.linear.parameters(), *layer.linear.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.full(tensor.shape, math.nan))
            for shard in order:
                scheme.load(layer.linear, spec, shard, dict(stored.shards[shard]))
            scheme.finalize(layer.linear, spec)
        return layer.run(self.draw_rows(case, spec.in_features))

    def test_weight_is_near_the_one_that_was_quantized(self) -> None:
        """Codes, zero points, scales and rows are where the format puts them.

        If this fails, look at the order of packed codes first, then at zero points, then at which
        inputs share a scale.
        """

        def law(case: Case) -> None:
            stored = self.store(case)
            weight = self.find_weight(case, stored).cpu()
            off = (weight - stored.weight.double()).pow(2).mean(-1).sqrt()
            size = stored.weight.double().pow(2).mean(-1).sqrt()
            error, row = (off / size).nan_to_num(math.inf).max(0)
            assert error <= self.max_weight_error, (
                f"output feature {int(row)} has weights that are off by {float(error):.2g} of their "
                f"size, and max_weight_error is {self.max_weight_error}"
            )

        self.check(law)

    def test_weight_is_what_the_format_says(self) -> None:
        """Equal to `dequantize`, up to rounding to the dtype."""

        def law(case: Case) -> None:
            stored, spec = self.store(case), case.spec(self.device)
            weight = self.find_weight(case, stored).cpu()
            for shard, tensors in enumerate(stored.shards):
                expected = self.dequantize(spec, shard, tensors)
                if expected is None:
                    pytest.skip("no dequantize")
                bound = self.weight_tolerances[case.dtype] * expected.abs()
                assert_within(weight[spec.rows(shard)], expected, bound, spec.shards[shard][0])

        self.check(law)

    def test_output_is_the_product(self) -> None:
        """Y = x Wᵀ + b for any number of rows, none included."""

        def law(case: Case) -> None:
            stored = self.store(case)
            weight = self.find_weight(case, stored)
            bias = None if stored.bias is None else stored.bias.to(self.device)
            self._check_output(self.load(case, stored), case, weight, bias, "whole layer")

        self.check(law)

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """A row alone gives what it gives among others, even if another one is NaN."""

        def law(case: Case) -> None:
            stored = self.store(case)
            layer, bias = self.load(case, stored), stored.bias
            x = self.draw_rows(case, case.in_features)
            if not case.num_rows:
                return
            weight = self.find_weight(case, stored)
            bias = None if bias is None else bias.to(self.device)
            _, magnitude = self.expect_output(layer.split.local, weight, bias, x)
            bound = 2 * self.tolerances[case.dtype] * magnitude
            together = layer.run(x).double()
            for row in range(case.num_rows):
                alone = layer.run(x[row : row + 1])
                assert_within(alone, together[row : row + 1], bound[row : row + 1], f"row {row} alone")
            spoiled, larger = x.clone(), x.clone()
            spoiled[0] = math.nan
            larger[0] *= 1000
            for others, what in ((spoiled, "NaN"), (larger, "large")):
                out = layer.run(others)[1:]
                assert_within(out, together[1:], bound[1:], f"rows beside a row that is {what}")

        self.check(law)

    def test_parts_are_parts_of_the_whole(self) -> None:
        """What a rank computes is its part of the whole layer, wherever the layer is cut.

        Side by side the outputs of ranks are the layer's, and over its inputs their sum.  If this
        fails only where a cut begins inside an index, look at `core.sharding.local_groups`.
        """

        def law(case: Case) -> None:
            if case.part is None:
                return
            stored, spec = self.store(case), case.spec(self.device)
            part = case.part
            local = cut_linear(spec, part.inputs, part.outputs, bias=part.bias)
            rows = [
                spec.rows(shard).start + index
                for shard, spans in enumerate(part.outputs)
                for index in indices(spans)
            ]
            what = f"the part with inputs {tuple(part.inputs)} and outputs {explain(part.outputs)}"
            whole = self.find_weight(case, stored)
            expected = whole[rows][:, slice(*part.inputs)]
            actual = self.find_weight(case, stored, local)
            bound = self.weight_tolerances[case.dtype] * expected.abs()
            assert_within(actual, expected, bound, f"weight of {what}")
            bias = stored.bias[rows].to(self.device) if local.bias and stored.bias is not None else None
            self._check_output(self.load(case, stored, local), case, expected, bias, what)

        self.check(law, cut=True)

    def test_dummy_weights_are_usable(self) -> None:
        """Without a checkpoint the outputs are finite and differ, from part to part too."""

        def law(case: Case) -> None:
            spec, local = case.spec(self.device), None
            if case.part is not None:
                local = cut_linear(spec, case.part.inputs, case.part.outputs, bias=case.part.bias)
            outs = []
            for seed in (1, 1, 2):
                layer = LoneLinear(self.make_scheme(), spec, local)
                layer.fill(seed)
                x = torch.randn(4, layer.split.local.in_features, generator=generator_of(case))
                outs.append(layer.run(x.to(spec.dtype).to(spec.device)).double())
            first, again, other = outs
            assert first.isfinite().all(), "dummy weights give outputs that are not finite"
            assert torch.equal(first, again), "the same seed gives other dummy weights"
            assert not torch.equal(first, other), "another seed gives the same dummy weights"
            assert first.std() > 0, "dummy weights give the same output everywhere"

        self.check(law, cut=True)

    def test_wrong_tensors_are_refused(self) -> None:
        """Wrong shapes and dtypes are a `CheckpointError` that names the tensor, as is a missing one."""

        def law(case: Case) -> None:
            scheme, spec, stored = self.make_scheme(), case.spec(self.device), self.store(case)
            for shard, (prefix, _) in enumerate(spec.shards):
                wanted = scheme.tensors(spec, shard)
                for suffix, tensor in stored.shards[shard].items():
                    named = stored.named(spec)
                    name = f"{prefix}.{suffix}"
                    for damage, replacement in damages(tensor, wanted[suffix]):
                        damaged = {key: x for key, x in named.items() if key != name}
                        damaged |= {} if replacement is None else {name: replacement}
                        may_load = replacement is None and wanted[suffix].optional
                        self._expect_refusal(spec, damaged, name, damage, may_load=may_load)

        few = min(5, self.settings.max_examples)
        kit = type(self)()
        kit.__dict__["settings"] = hypothesis_settings(self.settings, max_examples=few)
        kit.__dict__.update({k: v for k, v in vars(self).items() if k != "settings"})
        kit.check(law)

    def _expect_refusal(
        self,
        spec: LinearSpec,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        damage: str,
        *,
        may_load: bool,
    ) -> None:
        what = f"a checkpoint whose {name} {damage}"
        try:
            LoneLinear(self.make_scheme(), spec).load(tensors)
        except CheckpointError as error:
            assert name.rpartition(".")[0] in str(error), f"{what}: {error!s} does not name it"
        except Exception as error:
            raise AssertionError(f"{what} raises {error!r}, which is no CheckpointError") from error
        else:
            assert may_load, f"{what} is loaded without complaint"

    def test_skipped_layers_are_plain(self) -> None:
        """What the config skips is stored and applied as it is."""
        if self.skipped_layer is None:
            pytest.skip("no skipped_layer")
        prefix, dtype = self.skipped_layer, self.supported_dtypes()[0]
        case = Case(dtype, self.in_step, (self.out_step,), bias=True, num_rows=3, seed=1)
        spec = make_spec(case, torch.device(self.device), prefix)
        scheme = self.make_scheme()
        names = set(scheme.tensors(spec, 0))
        assert names == {"weight", "bias"}, f"{prefix} is skipped, but wants {sorted(names)}"
        weight, bias = draw_weights(case)
        layer = LoneLinear(scheme, spec)
        layer.load({f"{prefix}.weight": weight, f"{prefix}.bias": bias.clone()})  # type: ignore[union-attr]
        x = self.draw_rows(case, case.in_features)
        expected = torch.nn.functional.linear(x.double().cpu(), weight.double(), bias.double())  # type: ignore[union-attr]
        torch.testing.assert_close(
            layer.run(x).double().cpu(), expected, atol=2e-2, rtol=2e-2
        )

    def test_impossible_sizes_are_refused(self) -> None:
        """A layer that cannot be stored so is a `CheckpointError` that names it."""
        if not self.refused_sizes:
            pytest.skip("no refused_sizes")
        for in_features, out_features in self.refused_sizes:
            case = Case(self.supported_dtypes()[0], in_features, (out_features,), False, 1, 0)
            spec = case.spec(self.device)
            scheme = self.make_scheme()
            with pytest.raises(CheckpointError) as caught:
                scheme.tensors(spec, 0)
                scheme.make_linear(spec)
            assert any(name in str(caught.value) for name in (spec.name, spec.shards[0][0])), (
                f"{caught.value} does not name {spec.name}"
            )

    def test_weight_bits_are_those_of_a_layer(self) -> None:
        """The number that tells whether a model fits before it is loaded."""
        if self.entry is None:
            pytest.skip("no entry")
        dtype = self.supported_dtypes()[0]
        stated = self.entry.weight_bits(self._requirements(dtype))
        in_features, out_features = round_up(2048, self.in_step), round_up(512, self.out_step)
        case = Case(dtype, in_features, (out_features,), False, 1, 0)
        layer = LoneLinear(self.make_scheme(), case.spec(self.device))
        held = (*layer.linear.parameters(), *layer.linear.buffers())
        actual = 8 * sum(tensor.nbytes for tensor in held) / (in_features * out_features)
        wanted = 8 * getattr(torch, dtype).itemsize if stated is None else stated
        assert abs(actual - wanted) <= MAX_BITS_OFF * wanted, (
            f"a layer takes {actual:.3g} bits per element, but weight_bits says {stated}"
        )


# --- layers and parts --------------------------------------------------------------------------------


def make_spec(case: Case, device: torch.device, prefix: str | None = None) -> LinearSpec:
    """Describe the layer of a case.

    :param prefix: of a layer with a single shard, in place of the usual one.
    """
    role, parent, name, shards = LAYERS[len(case.out_features)]
    if prefix is not None:
        parent, _, name = prefix.rpartition(".")
        shards = (name,)
    sizes = zip(shards, case.out_features, strict=True)
    return LinearSpec(
        name=f"{parent}.{name}",
        in_features=case.in_features,
        shards=tuple((f"{parent}.{shard}", size) for shard, size in sizes),
        bias=case.bias,
        dtype=getattr(torch, case.dtype),
        device=device,
        role=role,
    )


def without_bias(spec: LinearSpec) -> LinearSpec:
    """Describe the same layer without a bias."""
    return LinearSpec(
        spec.name, spec.in_features, spec.shards, False, spec.dtype, spec.device, spec.role, spec.cut
    )


def layer_cases(dtypes: Sequence[str], in_step: int, out_step: int) -> st.SearchStrategy[Case]:
    """Generate layers of one to three shards."""
    outs = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    return outs.flatmap(
        lambda sizes: st.builds(
            Case,
            dtype=st.sampled_from(dtypes),
            in_features=st.integers(1, 4).map(lambda count: count * in_step),
            out_features=st.just(tuple(size * out_step for size in sizes)),
            bias=st.booleans(),
            num_rows=st.integers(0, 6),
            seed=st.integers(0, 2**32 - 2),
            shard_order=st.permutations(range(len(sizes))).map(tuple),
        )
    )
