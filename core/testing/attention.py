"""Conformance of attention backends: what every `core.interfaces.AttentionBackend` must do.

Subclass `AttentionConformance` in a test module and give it the descriptor::

    class TestAcme(AttentionConformance):
        entry = acme_attention.ENTRY
        device = "cuda"
        dtypes = ("bfloat16", "float16")

Everything is checked through the contract alone: ragged steps are run through the backend and
compared with `dense_attention` in float64.  The pool is filled with NaN first, by way of the
backend itself, and blocks are handed out in random order, so that a read of anything that was not
written, or a write to anything that was not handed out, shows in some result.  What the descriptor's
`unsupported` refuses is not tried.

Caches narrower than the model are tried too.  Every query then sees keys and values as they are
stored, even those of its own step: else it would show how a prompt was cut into steps, and a prefix
from the cache would not be what computing it anew gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from core.batch import StepBatch
from core.interfaces import (
    AttentionBackend,
    AttentionSpec,
    KVCacheSpec,
    SupportsQuantizedKV,
    missing_members,
)
from core.registry import AttentionEntry, Requirements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

TOLERANCES: Final = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest absolute and relative error by dtype, for values of order one."""

FP8: Final = "fp8"
"""The `kv_cache_dtype` whose numbers are stored with scales."""

NUM_CODE_BITS: Final = 8
"""Of the numbers in `retrieval_inputs`: more positions than any row has, in the smallest head."""


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, start: int
) -> torch.Tensor:
    """Attend in float64, as the formula is written: the oracle for one sequence.

    :param q: [C, H, D], queries at positions start .. start + C - 1.
    :param k: [start + C, G, D], keys at positions 0 .. start + C - 1.
    :param v: [start + C, G, D].
    :param start: position of the first query.
    :return: [C, H, D] float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    queries = torch.arange(start, start + q.shape[0], device=q.device)[:, None]
    keys = torch.arange(k.shape[0], device=q.device)[None]
    hidden = keys > queries
    if spec.window is not None:
        hidden = hidden | (keys <= queries - spec.window)
    k, v = (x.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1) for x in (k, v))
    scores = spec.scale * torch.einsum("qhd,khd->hqk", q, k)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def make_batch(
    starts: Sequence[int],
    counts: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    *,
    device: str = "cpu",
    num_padding: int = 0,
) -> StepBatch:
    """Build the inputs of a step as the executor does.

    :param starts: position of the first token of each row.
    :param counts: tokens of each row; rows with one token come first.
    :param tables: the blocks of each row, enough for `starts + counts` positions.
    :param num_padding: columns of the null block beyond the longest table.
    :raises ValueError: rows are out of order or a table is too short.
    """
    singles = [count == 1 for count in counts]
    if sorted(singles, reverse=True) != singles:
        raise ValueError(f"rows with one token must come first, not counts {list(counts)}")
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    for end, table in zip(ends, tables, strict=True):
        if len(table) * block_size < end:
            raise ValueError(f"{len(table)} blocks of {block_size} do not hold {end} positions")
    positions = [range(start, end) for start, end in zip(starts, ends, strict=True)]
    width = max(map(len, tables)) + num_padding

    def tensor(values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return StepBatch(
        num_tokens=sum(counts),
        num_rows=len(counts),
        num_decodes=sum(singles),
        token_ids=tensor([0] * sum(counts)),
        positions=tensor([p for row in positions for p in row]),
        slots=tensor(
            [
                table[p // block_size] * block_size + p % block_size
                for table, row in zip(tables, positions, strict=True)
                for p in row
            ]
        ),
        rows=tensor(list(range(len(counts)))),
        query_starts=tensor([sum(counts[:i]) for i in range(len(counts) + 1)], torch.int32),
        seq_lens=tensor(ends, torch.int32),
        block_tables=tensor([[*t, *[0] * (width - len(t))] for t in tables], torch.int32),
        starts=list(starts),
        counts=list(counts),
    )


@dataclass(frozen=True, slots=True)
class Case:
    """One generated situation: the shape of a model and the rows of a step."""

    dtype: str
    block_size: int
    head_dim: int
    num_kv_heads: int
    group: int
    """Query heads for each key-value head."""
    window: int | None
    softcap: float | None
    scale: float
    rows: tuple[tuple[int, int], ...]
    """(start, count) of each row in the step; what lies before `start` is computed before it."""
    chunk: int
    """Positions of a row that each of the steps before computes."""
    seed: int
    kv_cache_dtype: str = "auto"

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the cache."""
        if self.kv_cache_dtype == FP8:
            return torch.float8_e4m3fn
        name = self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def kv_scales(self) -> torch.Tensor:
        """Draw the scales of keys and of values: [2, layers, G] float32.

        Powers of two, so that dividing by them is exact and there is one right way to round; the
        smallest ones make half of all normally distributed values too large.
        """
        shape = (2, len(self.specs()), self.num_kv_heads)
        if self.kv_cache_dtype != FP8:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.ldexp(torch.ones(shape), torch.randint(-9, -4, shape, generator=generator))

    @property
    def lengths(self) -> list[int]:
        """Positions of each row, with one more to decode after the step."""
        return [start + count + 1 for start, count in self.rows]

    def num_blocks(self, lengths: Iterable[int]) -> int:
        """Blocks that rows of these lengths need."""
        return sum(-(-length // self.block_size) for length in lengths)

    def specs(self) -> list[AttentionSpec]:
        """Two layers: the first sees everything, the second has the window."""
        return [
            AttentionSpec(
                layer=layer,
                num_heads=self.num_kv_heads * self.group,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=self.scale,
                window=window,
                softcap=self.softcap,
            )
            for layer, window in enumerate((None, self.window))
        ]


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to the nearest number of a dtype, ties to even, and saturate: the oracle for what is stored.

    :return: float64.
    """
    info = torch.finfo(dtype)
    x = x.double()
    smallest = math.frexp(info.smallest_normal)[1]
    exponents = torch.frexp(x).exponent.clamp(min=smallest)
    units = torch.ldexp(torch.full_like(x, info.eps / 2), exponents)  # x = m · 2^exponent, m < 1
    return (torch.round(x / units) * units).clamp(-info.max, info.max)


Inputs = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""By layer: q [length, H, D], k and v [length, G, D] of one sequence."""


def random_inputs(case: Case, length: int, seed: int) -> Inputs:
    """Draw a sequence from a normal distribution, always the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(length, heads, case.head_dim, generator=generator).to(dtype)

    return [
        (draw(spec.num_heads), draw(spec.num_kv_heads), draw(spec.num_kv_heads))
        for spec in case.specs()
    ]


@dataclass(slots=True)
class Row:
    """One sequence, its blocks, and what the backend returned for it so far."""

    inputs: Inputs
    table: list[int]
    done: int = 0
    outputs: list[list[torch.Tensor]] = field(default_factory=lambda: [[], []])

    def output(self, layer: int) -> torch.Tensor:
        """All positions computed so far: [done, H, D] on the host."""
        return torch.cat(self.outputs[layer])


class Rig:
    """A backend with a small pool in which every position holds NaN, and rows that use it."""

    def __init__(
        self, backend: AttentionBackend, case: Case, *, num_blocks: int, device: str = "cpu"
    ) -> None:
        self.backend = backend
        self.case = case
        self.device = device
        self.specs = case.specs()
        with torch.inference_mode():
            backend.allocate_cache(cache_spec(case, num_blocks + 1, device))
            if case.kv_cache_dtype == FP8:
                self._set_scales()
        self._poison(num_blocks + 1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(case.seed))
        self.free_blocks: list[int] = (order + 1).tolist()

    def _set_scales(self) -> None:
        problems = missing_members(self.backend, SupportsQuantizedKV)
        assert not problems, "it does not refuse fp8, but " + "; ".join(problems)
        backend: Any = self.backend
        backend.set_kv_scales(*self.case.kv_scales().to(self.device))

    def _poison(self, num_blocks: int) -> None:
        """Compute a sequence of NaN that lies on all blocks, the null block included."""
        length = num_blocks * self.case.block_size
        inputs = random_inputs(self.case, length, seed=0)
        for tensors in inputs:
            for tensor in tensors:
                tensor.fill_(math.nan)
        self.step([(Row(inputs, list(range(num_blocks))), length)])

    def add_row(self, inputs: Inputs) -> Row:
        """Give a sequence its blocks."""
        num_blocks = self.case.num_blocks([len(inputs[0][0])])
        return Row(inputs, [self.free_blocks.pop() for _ in range(num_blocks)])

    def step(self, work: Sequence[tuple[Row, int]]) -> None:
        """Compute the next `count` positions of each row, in one step of the backend."""
        work = sorted(work, key=lambda item: item[1] != 1)
        rows, counts = [row for row, _ in work], [count for _, count in work]
        batch = make_batch(
            [row.done for row in rows],
            counts,
            [row.table for row in rows],
            self.case.block_size,
            device=self.device,
            num_padding=2,
        )
        with torch.inference_mode():
            meta = self.backend.prepare(batch)
            for layer, spec in enumerate(self.specs):
                out = self._forward(work, layer, spec, meta)
                for row, part in zip(rows, torch.split(out, counts), strict=True):
                    row.outputs[layer].append(part)
        for row, count in work:
            row.done += count

    def _forward(
        self, work: Sequence[tuple[Row, int]], layer: int, spec: AttentionSpec, meta: Any
    ) -> torch.Tensor:
        fused = torch.cat(
            [
                torch.cat([x[row.done : row.done + count].flatten(1) for x in row.inputs[layer]], dim=1)
                for row, count in work
            ]
        ).to(self.device)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = (
            part.view(len(fused), -1, spec.head_dim)  # strided, as a fused projection gives them
            for part in torch.split(fused, [n * spec.head_dim for n in heads], dim=1)
        )
        # Leaves NaN where an uninitialised result is likely to be allocated next.
        torch.full(q.shape, math.nan, dtype=q.dtype, device=self.device)
        out = self.backend.forward(q, k, v, spec, meta)
        assert out.shape == q.shape, f"forward returned {tuple(out.shape)}, not {tuple(q.shape)}"
        assert out.dtype == q.dtype, f"forward returned {out.dtype} for queries of {q.dtype}"
        return out.cpu()

    def advance(self, rows: Sequence[Row], ends: Sequence[int], chunk: int) -> None:
        """Compute rows up to `ends`, all together, `chunk` positions of each in a step."""
        while work := [
            (row, min(chunk, end - row.done))
            for row, end in zip(rows, ends, strict=True)
            if row.done < end
        ]:
            self.step(work)

    def run(self, rows: Sequence[Row]) -> None:
        """Compute the case's rows: the starts in chunks, the step itself, one token more."""
        self.advance(rows, [start for start, _ in self.case.rows], self.case.chunk)
        self.step([(row, count) for row, (_, count) in zip(rows, self.case.rows, strict=True)])
        self.step([(row, 1) for row in rows])

    def verify(self, row: Row, tolerance: float) -> None:
        """Compare all that was computed of a row with `dense_attention`."""
        for layer, spec in enumerate(self.specs):
            q, k, v = (x[: row.done] for x in row.inputs[layer])
            k, v = self._as_stored(k, v, layer)
            expected = dense_attention(q, k, v, spec, 0)
            assert_close(row.output(layer), expected, tolerance, f"layer {layer}, {spec}")

    def _as_stored(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> Iterator[torch.Tensor]:
        """Round keys and values as the cache does: [T, G, D] float64."""
        for x, scales in zip((k, v), self.case.kv_scales()[:, layer].double(), strict=True):
            yield round_to(x / scales[:, None], self.case.stored_dtype) * scales[:, None]


def cache_spec(case: Case, num_blocks: int, device: str = "cpu") -> KVCacheSpec:
    """Describe the cache of a case; `num_blocks` includes the null block."""
    return KVCacheSpec(
        num_layers=len(case.specs()),
        num_blocks=num_blocks,
        block_size=case.block_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=case.stored_dtype,
        device=torch.device(device),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Compare with the same absolute and relative tolerance; NaN equals nothing."""
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        atol=tolerance,
        rtol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )


class AttentionConformance:
    """The tests; subclass it and set `entry`, or override `make_backend`."""

    entry: ClassVar[AttentionEntry | None] = None
    """Tells what need not be tried; without it everything is."""
    plan: ClassVar[Any] = None
    """Passed to the entry's factory."""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    head_dims: ClassVar[tuple[int, ...]] = (8, 24, 64, 80, 128)
    """Multiples of 8."""
    kv_cache_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", FP8)
    """Of narrow caches, as the flag names them."""
    tolerances: ClassVar[dict[str, float]] = TOLERANCES
    settings: ClassVar[hypothesis_settings] = hypothesis_settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck)
    )

    # --- what subclasses may change ----------------------------------------------------------------

    def make_backend(self) -> AttentionBackend:
        """Build a backend that has no cache yet."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry and no make_backend")
        backend: AttentionBackend = self.entry.factory(self.plan)
        return backend

    # --- generation --------------------------------------------------------------------------------

    def refusals(self, **wanted: Any) -> list[str]:
        """Ask the descriptor why it cannot serve something."""
        if self.entry is None:
            return []
        requirements = {"device": self.device, "dtype": self.dtypes[0]} | wanted
        return self.entry.unsupported(Requirements(**requirements))

    def _refusals_of(self, case: Case) -> list[str]:
        return self.refusals(
            dtype=case.dtype,
            head_dims=frozenset({case.head_dim}),
            num_heads=case.num_kv_heads * case.group,
            num_kv_heads=case.num_kv_heads,
            has_window=case.window is not None,
            has_softcap=case.softcap is not None,
            block_size=case.block_size,
            kv_cache_dtype=case.kv_cache_dtype,
        )

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The page sizes to try."""
        if self.entry is None:
            return (1, 4, 16)
        return self.entry.block_sizes or (1, 4, self.entry.default_block_size)

    def cases(self, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
        """Generate situations that the descriptor does not refuse.

        :param fixed: strategies for fields of `Case` that replace the usual ones.
        """
        dtypes = [x for x in self.dtypes if not self.refusals(dtype=x)]
        if not dtypes:
            pytest.skip("; ".join(self.refusals()))
        head_dims = [x for x in self.head_dims if not self.refusals(head_dims=frozenset({x}))]
        windows = [None] if self.refusals(has_window=True) else [None, 1, 5]
        softcaps = [None] if self.refusals(has_softcap=True) else [None, 2.0, 20.0]
        fields = {
            "dtype": st.sampled_from(dtypes),
            "block_size": st.sampled_from(self.block_sizes),
            "head_dim": st.sampled_from(head_dims),
            "num_kv_heads": st.integers(1, 3),
            "group": st.integers(1, 8),
            "window": st.sampled_from(windows),
            "softcap": st.sampled_from(softcaps),
            "scale": st.sampled_from([0.05, 0.125, 0.3]),
            "rows": row_lists(),
            "chunk": st.integers(1, 20),
            "seed": st.integers(0, 2**32 - 1),
        }
        return st.builds(Case, **(fields | fixed)).filter(lambda case: not self._refusals_of(case))

    def narrow_caches(self) -> st.SearchStrategy[str]:
        """Generate names of narrow caches that the descriptor does not refuse; skip without any."""
        refusals = {name: self.refusals(kv_cache_dtype=name) for name in self.kv_cache_dtypes}
        served = [name for name, reasons in refusals.items() if not reasons]
        if not served:
            pytest.skip("; ".join(reason for reasons in refusals.values() for reason in reasons))
        return st.sampled_from(served)

    def _requires_scales(self) -> None:
        reasons = self.refusals(kv_cache_dtype=FP8)
        if reasons or FP8 not in self.kv_cache_dtypes:
            pytest.skip("; ".join(reasons) or f"{FP8} is not to be tried")

    def check(self, law: Callable[[Case], None], **fixed: st.SearchStrategy[Any]) -> None:
        """Try a law on generated situations."""

        @self.settings
        @given(case=self.cases(**fixed))
        def attempt(case: Case) -> None:
            law(case)

        attempt()

    def rig(self, case: Case, lengths: Iterable[int]) -> Rig:
        """Make a rig whose pool holds rows of these lengths and two blocks more."""
        num_blocks = case.num_blocks(lengths) + 2
        return Rig(self.make_backend(), case, num_blocks=num_blocks, device=self.device)

    def _rows(self, rig: Rig, lengths: Iterable[int]) -> list[Row]:
        case = rig.case
        return [rig.add_row(random_inputs(case, n, case.seed + i)) for i, n in enumerate(lengths)]

    def _computed(self, case: Case) -> tuple[Rig, list[Row]]:
        rig = self.rig(case, case.lengths)
        rows = self._rows(rig, case.lengths)
        rig.run(rows)
        return rig, rows

    def _matches_dense_attention(self, case: Case) -> None:
        rig, rows = self._computed(case)
        for row in rows:
            rig.verify(row, self.tolerances[case.dtype])

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The loop calls what the Protocol names, as the Protocol says."""
        problems = missing_members(self.make_backend(), AttentionBackend)
        assert not problems, "; ".join(problems)

    def test_default_block_size_is_supported(self) -> None:
        """A default outside `block_sizes` could never be served."""
        if self.entry is not None and self.entry.block_sizes:
            default, sizes = self.entry.default_block_size, self.entry.block_sizes
            assert default in sizes, f"default_block_size {default} is none of {sizes}"

    def test_mixed_steps_match_dense_attention(self) -> None:
        """Every output of every ragged step is what the formula says.

        If this fails, look at the mask first, then at how heads are grouped, then at what is read
        beyond the end of a row: all of that is NaN here.
        """
        self.check(self._matches_dense_attention)

    def test_decodes_match_dense_attention(self) -> None:
        """Steps in which each row has one token."""
        self.check(self._matches_dense_attention, rows=row_lists(max_count=1), chunk=st.just(20))

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """A row computed alone gives what it gives among others."""

        def law(case: Case) -> None:
            _, rows = self._computed(case)
            for row, place in zip(rows, case.rows, strict=True):
                lone_case = replace(case, rows=(place,))
                rig = self.rig(lone_case, lone_case.lengths)
                lone = rig.add_row(row.inputs)
                rig.run([lone])
                for layer, spec in enumerate(rig.specs):
                    tolerance = self.tolerances[case.dtype]
                    assert_close(row.output(layer), lone.output(layer), tolerance, f"{spec}")

        self.check(law)

    def _any_split_agrees(self, case: Case) -> None:
        length = case.lengths[0]
        inputs = random_inputs(case, length, case.seed)
        rows = []
        for chunk in (length, 1, case.chunk):
            rig = self.rig(case, [length])
            rows.append(rig.add_row(inputs))
            rig.advance(rows[-1:], [length], chunk)
        for row in rows[1:]:
            for layer, spec in enumerate(case.specs()):
                tolerance = self.tolerances[case.dtype]
                assert_close(row.output(layer), rows[0].output(layer), tolerance, f"{spec}")

    def test_any_split_into_steps_agrees(self) -> None:
        """Whole prompt, token by token, or in chunks: the outputs are the same."""
        self.check(self._any_split_agrees, rows=row_lists(max_rows=1))

    def _shared_prefix_agrees(self, case: Case) -> None:
        length, size = case.lengths[0], case.block_size
        rig = self.rig(case, [length, length])
        row = rig.add_row(random_inputs(case, length, case.seed))
        rig.advance([row], [length], length)
        shared = (length - 1) // size
        own = [rig.free_blocks.pop() for _ in row.table[shared:]]
        heir = Row(row.inputs, row.table[:shared] + own, done=shared * size)
        rig.advance([heir], [length], case.chunk)
        for layer, spec in enumerate(rig.specs):
            expected = row.output(layer)[shared * size :]
            assert_close(heir.output(layer), expected, self.tolerances[case.dtype], f"{spec}")

    def test_prefix_of_another_row_is_as_good_as_its_own(self) -> None:
        """A row that begins with blocks which another one wrote gives what it gives alone."""
        self.check(self._shared_prefix_agrees, rows=row_lists(max_rows=1))

    # --- caches that are narrower than the model ---

    def test_narrow_cache_matches_dense_attention(self) -> None:
        """Keys and values are rounded to the nearest once, and multiplied by the scale of their head."""
        self.check(self._matches_dense_attention, kv_cache_dtype=self.narrow_caches())

    def test_narrow_cache_agrees_on_any_split(self) -> None:
        """Queries see the tokens of their own step as the cache holds them."""
        caches, rows = self.narrow_caches(), row_lists(max_rows=1)
        self.check(self._any_split_agrees, kv_cache_dtype=caches, rows=rows)

    def test_narrow_cache_lends_prefixes(self) -> None:
        """A prefix from the cache is what computing it anew would give."""
        caches, rows = self.narrow_caches(), row_lists(max_rows=1)
        self.check(self._shared_prefix_agrees, kv_cache_dtype=caches, rows=rows)

    def test_quantized_cache_saturates(self) -> None:
        """What is too large becomes the largest number that can be stored, and not NaN."""
        self._requires_scales()

        def law(case: Case) -> None:
            rig = self.rig(case, case.lengths)
            rows = self._rows(rig, case.lengths)
            largest = torch.finfo(getattr(torch, case.dtype)).max
            for row in rows:
                for q, k, v in row.inputs:
                    q[:, :, 0] = 0.0  # so that a key may be anything there but NaN
                    k[:, :, 0] = torch.where(k[:, :, 0] > 0, k.new_tensor(largest), -math.inf)
                    v.mul_(1000.0)
            rig.run(rows)
            size = float(case.kv_scales().max()) * torch.finfo(case.stored_dtype).max
            for row in rows:
                rig.verify(row, size * self.tolerances[case.dtype])

        self.check(law, kv_cache_dtype=st.just(FP8))

    # --- one row among others ---

    def test_leaves_blocks_of_others_alone(self) -> None:
        """A step changes nothing in blocks that belong to rows outside of it."""

        def law(case: Case) -> None:
            bystanders = [2 * case.block_size + 1, case.block_size]
            rig = self.rig(case, [*bystanders, *case.lengths])
            rows = self._rows(rig, [*bystanders, *case.lengths])
            others, own = rows[:2], rows[2:]
            rig.advance(others, [n - 1 for n in bystanders], case.chunk)
            rig.run(own)
            rig.advance(others, bystanders, 1)
            for row in others:
                rig.verify(row, self.tolerances[case.dtype])

        self.check(law)

    def test_nan_of_one_row_stays_in_it(self) -> None:
        """A request whose hidden states became NaN does not harm the others in its steps."""

        def law(case: Case) -> None:
            rig = self.rig(case, case.lengths)
            rows = self._rows(rig, case.lengths)
            for tensors in rows[0].inputs:
                for tensor in tensors:
                    tensor.fill_(math.nan)
            rig.run(rows)
            for row in rows[1:]:
                rig.verify(row, self.tolerances[case.dtype])

        self.check(law)

    def test_keeps_exactly_what_was_written(self) -> None:
        """A query that matches one key and no other returns that key's value, bit for bit."""

        def law(case: Case) -> None:
            length = max(case.lengths)
            inputs, expected = retrieval_inputs(case, length)
            rig = self.rig(case, [2 * length])
            row = rig.add_row(inputs)
            rig.advance([row], [2 * length], case.chunk)
            for layer, values in enumerate(expected):
                actual = row.output(layer)[length:]
                wrong = [i for i in range(length) if not torch.equal(actual[i], values[i])]
                assert not wrong, f"layer {layer}: queries {wrong} did not find their values"

        nothing = st.none()
        self.check(law, window=nothing, softcap=nothing, scale=st.just(1.0))

    def test_cache_can_be_allocated_anew(self) -> None:
        """Another size, another shape: nothing of the old cache is left."""

        def law(case: Case) -> None:
            rig, _ = self._computed(case)
            other = replace(case, num_kv_heads=4 - case.num_kv_heads, rows=case.rows[:1])
            again = Rig(
                rig.backend,
                other,
                num_blocks=other.num_blocks(other.lengths),
                device=self.device,
            )
            row = again.add_row(random_inputs(other, other.lengths[0], case.seed))
            again.run([row])
            again.verify(row, self.tolerances[case.dtype])

        self.check(law)

    def test_bytes_per_block_count_all_layers(self) -> None:
        """The number that decides how many blocks fit into memory."""

        def law(case: Case) -> None:
            backend = self.make_backend()
            spec = cache_spec(case, 3, self.device)
            size = backend.cache_bytes_per_block(spec)
            assert size > 0, f"a block takes {size} bytes"
            other = backend.cache_bytes_per_block(replace(spec, num_blocks=7))
            assert other == size, f"one block of 3 takes {size} bytes, one of 7 takes {other}"
            twice = backend.cache_bytes_per_block(replace(spec, num_layers=2 * spec.num_layers))
            assert twice == 2 * size, f"{size} bytes became {twice} with twice the layers"

        self.check(law)


def row_lists(
    *, max_rows: int = 6, max_count: int = 20
) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Generate (start, count) of the rows of a step, half of them decodes."""
    counts = st.just(1) | st.integers(1, max_count)
    rows = st.lists(st.tuples(st.integers(0, 40), counts), min_size=1, max_size=max_rows)
    return rows.map(tuple)


def retrieval_inputs(case: Case, length: int) -> tuple[Inputs, list[torch.Tensor]]:
    """Make a sequence whose second half asks for the values of its first half, one by one.

    Keys are the bits of a number that is different at each position, as signs; a query is such a
    key, so long that every other key has a weight of exactly zero.  Values have 11 significant bits,
    which even the fastest matrix units multiply by one without rounding.

    :return: the inputs, 2 · length positions, and by layer what positions `length` and later must
        give: [length, H, D].
    """
    inputs = random_inputs(case, 2 * length, case.seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(case.seed))
    bits = 2 ** (torch.arange(case.head_dim) % NUM_CODE_BITS)
    numbers = torch.arange(2 * length)[:, None] + 37 * torch.arange(case.num_kv_heads)
    keys = torch.where((numbers % 2**NUM_CODE_BITS)[:, :, None] & bits != 0, 1.0, -1.0)
    length_of_query = 100.0 / (case.head_dim // NUM_CODE_BITS)
    expected = []
    for q, k, v in inputs:
        k.copy_(keys)
        v.copy_(v.half())
        q[length:] = length_of_query * k[order].repeat_interleave(case.group, dim=1)
        expected.append(v[order].repeat_interleave(case.group, dim=1))
    return inputs, expected
