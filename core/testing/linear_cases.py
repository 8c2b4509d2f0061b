"""Linear layers to try a quantizer on: random sizes, weights, parts of them, and damaged tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from hypothesis import strategies as st

from core.interfaces import LinearSpec
from core.sharding import Cut, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.interfaces import Axis, QuantScheme, TensorSpec

LAYERS: Final = {
    1: ("down", "model.layers.0.mlp", "down_proj", ("down_proj",)),
    2: ("gate_up", "model.layers.0.mlp", "gate_up_proj", ("gate_proj", "up_proj")),
    3: ("qkv", "model.layers.0.self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
}
"""By number of shards: role, parent, name, and prefixes of the shards below the parent."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a layer."""

    inputs: Span
    outputs: tuple[tuple[Span, ...], ...]
    """Of each shard."""
    has_bias: bool
    """Whether this rank adds it, if there is one."""

    def __str__(self) -> str:
        spans = ", ".join("+".join(map(_explain, shard)) for shard in self.outputs)
        return f"the part with inputs {_explain(self.inputs)} and outputs {spans}"


@dataclass(frozen=True, slots=True)
class LinearCase:
    """One generated layer, its input, and a part of it."""

    dtype: str
    in_features: int
    out_features: tuple[int, ...]
    """Of each shard."""
    has_bias: bool
    num_rows: int
    """Of the input."""
    seed: int
    shard_order: tuple[int, ...] = (0,)
    part: Part | None = None

    def spec(self, device: str = "cpu", name: str | None = None) -> LinearSpec:
        """Describe the whole layer.

        :param name: of a layer with a single shard, in place of the usual one.
        """
        role, parent, module, shards = LAYERS[len(self.out_features)]
        if name is not None:
            parent, _, module = name.rpartition(".")
            shards = (module,)
        sizes = zip(shards, self.out_features, strict=True)
        return LinearSpec(
            name=f"{parent}.{module}",
            in_features=self.in_features,
            shards=tuple((f"{parent}.{shard}", size) for shard, size in sizes),
            bias=self.has_bias,
            dtype=getattr(torch, self.dtype),
            device=torch.device(device),
            role=role,
        )

    def local_spec(self, device: str = "cpu") -> LinearSpec:
        """Describe what the rank holds."""
        whole = self.spec(device)
        return whole if self.part is None else cut_linear(whole, self.part)

    def part_rows(self) -> list[int]:
        """List the output features of the layer that the rank holds, in order."""
        spec = self.spec()
        return [
            index
            for shard in range(len(spec.shards))
            for span in (self.part.outputs[shard] if self.part else spec.output_spans(shard))
            for index in range(*span.shifted(spec.rows(shard).start))
        ]

    def generator(self) -> torch.Generator:
        """Make a source of random numbers."""
        return torch.Generator().manual_seed(self.seed)

    def draw_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw what is to be quantized.

        Features differ in size, and no mean is zero, so that a wrong scale or zero point shows.

        :return: weight [out_features, in_features] and bias [out_features], float32.
        """
        generator = self.generator()
        num_outputs = sum(self.out_features)
        weight = torch.randn(num_outputs, self.in_features, generator=generator) + 0.4
        weight *= torch.rand(num_outputs, 1, generator=generator) + 0.5
        weight *= torch.rand(self.in_features, generator=generator) + 0.5
        bias = torch.randn(num_outputs, generator=generator)
        return weight, bias if self.has_bias else None

    def draw_rows(self, device: str = "cpu") -> torch.Tensor:
        """Draw an input of the layer: [num_rows, in_features] in the dtype."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows = torch.randn(self.num_rows, self.in_features, generator=generator)
        return rows.to(getattr(torch, self.dtype)).to(device)


def cut_linear(whole: LinearSpec, part: Part) -> LinearSpec:
    """Describe a part of a layer as a rank sees it."""
    shards = zip(whole.shards, part.outputs, strict=True)
    return replace(
        whole,
        in_features=part.inputs.size,
        shards=tuple((prefix, sum(span.size for span in spans)) for (prefix, _), spans in shards),
        bias=whole.bias and part.has_bias,
        cut=Cut(part.inputs, part.outputs),
    )


# --- generation --------------------------------------------------------------------------------------


def linear_cases(dtypes: Sequence[str], in_step: int, out_step: int) -> st.SearchStrategy[LinearCase]:
    """Generate layers of one to three shards whose sizes are multiples of the steps."""
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    return sizes.flatmap(
        lambda counts: st.builds(
            LinearCase,
            dtype=st.sampled_from(dtypes),
            in_features=st.integers(1, 4).map(lambda count: count * in_step),
            out_features=st.just(tuple(count * out_step for count in counts)),
            has_bias=st.booleans(),
            num_rows=st.integers(0, 6),
            seed=st.integers(0, 2**32 - 2),
            shard_order=st.permutations(range(len(counts))).map(tuple),
        )
    )


def part_cases(case: LinearCase, in_step: int, out_step: int) -> st.SearchStrategy[LinearCase]:
    """Generate parts of a layer: some inputs, and up to three spans of the outputs of each shard.

    :param in_step: inputs by multiples of which the layer can be cut.
    :param out_step: the same of outputs.
    """
    parts = st.builds(
        Part,
        inputs=_spans(case.in_features, in_step, max_spans=1).map(lambda spans: spans[0]),
        outputs=st.tuples(*(_spans(size, out_step, max_spans=3) for size in case.out_features)),
        has_bias=st.booleans(),
    )
    return parts.map(lambda part: replace(case, part=part))


def _spans(size: int, step: int, max_spans: int) -> st.SearchStrategy[tuple[Span, ...]]:
    num_marks = size // step + 1
    limit = min(max_spans, num_marks // 2)
    if not limit:
        raise AssertionError(f"{size} features cannot be cut by multiples of {step}")
    bounds = st.integers(1, limit).flatmap(
        lambda count: st.lists(
            st.integers(0, num_marks - 1), min_size=2 * count, max_size=2 * count, unique=True
        )
    )
    return bounds.map(
        lambda marks: tuple(
            Span(start * step, stop * step)
            for start, stop in zip(sorted(marks)[::2], sorted(marks)[1::2], strict=True)
        )
    )


def cut_steps(scheme: QuantScheme, spec: LinearSpec) -> tuple[int, int]:
    """Find by multiples of how many inputs and outputs a layer can be cut: what is not shared."""
    axes: list[Axis] = [
        axis
        for shard in range(len(spec.shards))
        for tensor in scheme.tensors(spec, shard).values()
        for axis in tensor.axes
        if axis is not None and not axis.shared
    ]
    steps = {along: [axis.step for axis in axes if axis.along == along] for along in ("in", "out")}
    return math.lcm(*steps["in"]), math.lcm(*steps["out"])


def damages(tensor: torch.Tensor, wanted: TensorSpec) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Spoil a stored tensor in every way that must be noticed.

    :return: what is wrong with it, and what is stored instead; `None` for nothing.
    """
    yield "is missing", None
    for dim, size in enumerate(tensor.shape):
        longer = torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
        yield f"has {size + 1} instead of {size} in dimension {dim}", longer
    yield "has a dimension too many", tensor.expand(2, *tensor.shape).contiguous()
    accepted = wanted.dtype if isinstance(wanted.dtype, tuple) else (wanted.dtype,)
    if torch.bool not in accepted:
        yield "is of dtype bool", torch.zeros(tensor.shape, dtype=torch.bool)


def _explain(span: Span) -> str:
    return f"{span.start}..{span.stop - 1}"


def round_up(value: int, step: int) -> int:
    """Return the next multiple."""
    return -(-value // step) * step


def describe(value: Any) -> str:
    """Name a dtype, or several."""
    values = value if isinstance(value, tuple) else (value,)
    return " or ".join(str(item).removeprefix("torch.") for item in values)
