"""Laws of what joins ranks, to be run on every rank at once.

Every rank can compute what each other one puts in, so it knows what has to come out.  Numbers differ
from stage to stage as well, so that it shows if the ranks of two stages are mixed up.  A law yields
complaints instead of raising, so that a rank that finds something wrong goes on with the others.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import distributed

from core.interfaces import PipelineParallel, TensorParallel, missing_members

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TOLERANCES: Final = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of a sum of a few numbers of order one."""
HIDDEN: Final = 24
Complaints = Iterator[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is among all."""

    rank: int
    tensor_size: int
    num_stages: int
    device: str

    @property
    def stage(self) -> int:
        """Of the pipeline."""
        return self.rank // self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Within the stage."""
        return self.rank % self.tensor_size

    def plan(self) -> Any:
        """Make what a factory is given: of the plan only what strategies have a use for."""
        return SimpleNamespace(
            tensor_parallel_size=self.tensor_size,
            pipeline_parallel_size=self.num_stages,
            world_size=self.tensor_size * self.num_stages,
            device=self.device.partition(":")[0],
            settings={},
        )


def draw(
    seed: int, stage: int, rank: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw what a rank of a stage puts in; the same everywhere."""
    generator = torch.Generator().manual_seed(10_000 * seed + 100 * stage + rank)
    return torch.randn(*shape, generator=generator).to(dtype)


# --- ranks that share layers -----------------------------------------------------------------------


def knows_its_place(link: TensorParallel, place: Place) -> Complaints:
    """Size and rank are those of the stage."""
    yield from missing_members(link, TensorParallel)
    if (link.size, link.rank) != (place.tensor_size, place.tensor_rank):
        yield (
            f"size {link.size} and rank {link.rank}, not {place.tensor_size} and {place.tensor_rank}"
        )


def all_reduce_sums(link: TensorParallel, place: Place) -> Complaints:
    """Over the ranks of the stage, whatever dtype and shape."""
    shapes = [(3, HIDDEN), (1, 1), (0, HIDDEN), (257, 5), (7,)]
    for seed, dtype in enumerate(TOLERANCES):
        for shape in shapes:
            parts = [draw(seed, place.stage, rank, shape, dtype) for rank in range(link.size)]
            out = link.all_reduce(parts[link.rank].clone().to(place.device))
            yield from compare(out, sum_of(parts), f"all_reduce of {dtype} {shape}")


def all_reduce_takes_strided(link: TensorParallel, place: Place) -> Complaints:
    """Sum a part of a larger tensor, and a transposed one; what is around stays as it is."""
    parts = [draw(1, place.stage, rank, (6, HIDDEN)) for rank in range(link.size)]
    own = parts[link.rank].clone().to(place.device)
    yield from compare(link.all_reduce(own.T), sum_of(parts).T, "all_reduce of a transposed tensor")
    own = parts[link.rank].clone().to(place.device)
    out = link.all_reduce(own[:, :10])
    yield from compare(out, sum_of(parts)[:, :10], "all_reduce of some columns")
    yield from compare(own[:, 10:], parts[link.rank][:, 10:], "what is beside the input of all_reduce")


def all_reduce_agrees(link: TensorParallel, place: Place) -> Complaints:
    """To the bit, or the ranks' computations drift apart."""
    for dtype in TOLERANCES:
        own = draw(2, place.stage, link.rank, (64, HIDDEN), dtype).to(place.device)
        bits = link.all_reduce(own).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        everybody: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everybody, (place.stage, bits))
        sums = {text for stage, text in everybody if stage == place.stage}
        if len(sums) > 1:
            yield f"all_reduce of {dtype} gives {len(sums)} results on {link.size} ranks"


def gather_joins_uneven_parts(link: TensorParallel, place: Place) -> Complaints:
    """In order of rank, complete on rank 0, of the right shape on all."""
    sizes_of = (
        [3] * link.size,
        [1 + 4 * rank for rank in range(link.size)],
        [7, *[2] * (link.size - 1)],
    )
    for seed, sizes in enumerate(sizes_of):
        for num_rows in (5, 1, 0):
            parts = [draw(seed, place.stage, rank, (num_rows, size)) for rank, size in enumerate(sizes)]
            out = link.gather(parts[link.rank].clone().to(place.device), sizes)
            joined = torch.cat(parts, -1)
            yield from compare(
                out if link.rank == 0 or out.shape != joined.shape else joined,
                joined,
                f"gather of {num_rows} rows of {sizes}",
            )


def gather_takes_strided(link: TensorParallel, place: Place) -> Complaints:
    """Join parts that are columns of larger tensors."""
    parts = [draw(3, place.stage, rank, (4, 9)) for rank in range(link.size)]
    out = link.gather(parts[link.rank].to(place.device)[:, 2:7], [5] * link.size)
    if link.rank == 0:
        expected = torch.cat([part[:, 2:7] for part in parts], -1)
        yield from compare(out, expected, "gather of some columns")


def broadcast_gives_what_rank_0_has(link: TensorParallel, place: Place) -> Complaints:
    """As result and in place."""
    for count in (4, 1, 0):
        tokens = torch.arange(count) + 1000 * place.stage + 2**40
        own = (tokens if link.rank == 0 else torch.full_like(tokens, -1)).to(place.device)
        yield from compare(link.broadcast(own), tokens, f"result of broadcast of {count} tokens")
        yield from compare(own, tokens, f"tensor that was given to broadcast, {count} tokens")


def results_stay_as_they_are(link: TensorParallel, place: Place) -> Complaints:
    """Later calls, of any kind and size, do not write into earlier results."""
    outs, expected = [], []
    for seed in range(8):
        parts = [draw(seed, place.stage, rank, (seed % 3 + 1, HIDDEN)) for rank in range(link.size)]
        own = parts[link.rank].clone().to(place.device)
        outs.append(link.all_reduce(own.clone()))
        expected.append(sum_of(parts))
        joined = link.gather(own, [HIDDEN] * link.size)
        if link.rank == 0:
            outs.append(joined)
            expected.append(torch.cat(parts, -1))
        outs.append(link.broadcast(own))
        expected.append(parts[0])
    for index, pair in enumerate(zip(outs, expected, strict=True)):
        yield from compare(*pair, f"result {index} of {len(outs)} after all the others")


# --- stages ----------------------------------------------------------------------------------------


def knows_its_stage(link: PipelineParallel, place: Place) -> Complaints:
    """Size and stage are those of the pipeline."""
    yield from missing_members(link, PipelineParallel)
    if (link.size, link.stage) != (place.num_stages, place.stage):
        yield f"size {link.size} and stage {link.stage}, not {place.num_stages} and {place.stage}"


def streams_arrive_in_order(link: PipelineParallel, place: Place) -> Complaints:
    """Several are on their way at a time, of different lengths; nobody keeps what was sent."""
    for dtype in TOLERANCES:
        shapes = [(5, HIDDEN), (1, HIDDEN), (900, HIDDEN), (2, HIDDEN)]
        yield from _pass_on(link, place, shapes, dtype)


def empty_streams_arrive(link: PipelineParallel, place: Place) -> Complaints:
    """Without keeping others from arriving."""
    yield from _pass_on(link, place, [(0, HIDDEN), (3, HIDDEN)], torch.float32)


def strided_streams_arrive(link: PipelineParallel, place: Place) -> Complaints:
    """Columns of a larger tensor."""
    yield from _pass_on(link, place, [(6, HIDDEN)], torch.float32, is_strided=True)


def _pass_on(
    link: PipelineParallel,
    place: Place,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    is_strided: bool = False,
) -> Complaints:
    """Pass streams through all stages; each knows what the others of its number send."""
    for seed, shape in enumerate(shapes):
        stream = draw(seed, 0, place.tensor_rank, shape, dtype)
        if link.stage > 0:
            given = torch.full(shape, -1.0, dtype=dtype, device=place.device)
            received = link.recv(given)
            what = f"stream {seed} of {len(shapes)}, {dtype} {shape}"
            yield from compare(received, stream, f"result of recv: {what}")
            yield from compare(given, stream, f"tensor that was given to recv: {what}")
        if link.stage < link.size - 1:
            wide = torch.cat((stream, stream), -1).to(place.device)
            link.send(wide[:, : shape[1]] if is_strided else stream.to(place.device))


# --- judging ---------------------------------------------------------------------------------------


Law = Callable[[Any, Place], Complaints]

TENSOR_LAWS: Final[tuple[Law, ...]] = (
    knows_its_place,
    all_reduce_sums,
    all_reduce_takes_strided,
    all_reduce_agrees,
    gather_joins_uneven_parts,
    gather_takes_strided,
    broadcast_gives_what_rank_0_has,
    results_stay_as_they_are,
)
PIPELINE_LAWS: Final[tuple[Law, ...]] = (
    knows_its_stage,
    streams_arrive_in_order,
    empty_streams_arrive,
    strided_streams_arrive,
)


def judge(
    rank: int,
    factory: Callable[[Any, int], Any],
    laws: Sequence[Law],
    sizes: tuple[int, int],
    device: str,
) -> dict[str, str]:
    """Try laws on this rank; all ranks call this.

    :param factory: of the descriptor.
    :param sizes: ranks of a stage, and stages.
    :return: what went wrong, by name of the law.
    """
    place = Place(rank, *sizes, device if device == "cpu" else f"{device}:{rank}")
    link = factory(place.plan(), rank)
    failures: dict[str, str] = {}
    for law in laws:
        complaints: list[str] = []
        try:
            complaints.extend(law(link, place))
        except Exception:  # noqa: BLE001  told to whoever started the ranks
            complaints.append(traceback.format_exc())
        if complaints:
            failures[law.__name__] = "; ".join(complaints[:3])
        # A law that failed on one rank must not meet the next one on another.
        try:
            distributed.barrier()
        except RuntimeError as error:
            failures.setdefault(law.__name__, f"other ranks did not get to the end: {error}")
            break
    return failures


def merge(failures: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Join what the ranks tell, by law."""
    merged: dict[str, str] = {}
    for rank, told in enumerate(failures):
        for name, text in told.items():
            merged[name] = "\n".join(filter(None, (merged.get(name), f"rank {rank}: {text}")))
    return merged


def compare(actual: torch.Tensor, expected: torch.Tensor, what: str) -> Complaints:
    """Compare with the tolerance of the dtype; integers must be equal."""
    actual = actual.cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        yield (
            f"{what}: {actual.dtype} {tuple(actual.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        )
        return
    tolerance = TOLERANCES.get(expected.dtype, 0.0)
    error = (actual.double() - expected.double()).abs()
    num_wrong = int((~(error <= tolerance * (1 + expected.double().abs()))).sum())
    if num_wrong:
        yield f"{what}: {num_wrong} of {error.numel()} numbers are wrong"


def sum_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum up in float64, and round once."""
    return torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)
