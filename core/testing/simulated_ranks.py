"""Several ranks in one process: threads for ranks, memory for the network.

Shows that the parts of a model on several ranks do together what the whole does on one, without the
seconds that real processes take to start.  What one rank computes is exactly what it would compute
alone; only the collectives are simulated.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from core.assemble import Parts, resolve
from core.config import load_config
from core.executor import TorchExecutor
from core.step import StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.interfaces import Executor
    from core.plan import Plan

TIMEOUT = 30.0
"""Seconds after which a rank that waits for others gives up."""


class Meeting:
    """Where the ranks of one stage exchange tensors: every collective is one exchange."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[torch.Tensor | None] = [None] * size

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Put down a copy of a tensor and take those of all ranks."""
        self._slots[rank] = tensor.clone()
        self._barrier.wait(TIMEOUT)
        everybody = [slot for slot in self._slots if slot is not None]
        self._barrier.wait(TIMEOUT)
        return everybody

    def leave(self) -> None:
        """Let those who wait fail instead of waiting for a rank that has failed."""
        self._barrier.abort()


class SimulatedTensorParallel:
    """Fulfils `core.interfaces.TensorParallel`; sums in order of rank."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.size = meeting.size
        self.rank = rank

    def all_reduce(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Sum over the ranks."""
        first, *others = self.meeting.exchange(self.rank, tensor)
        for other in others:
            first = first + other
        return first

    def gather(self, tensor: torch.Tensor, sizes: Sequence[int], /) -> torch.Tensor:
        """Join the ranks' parts, having checked that each is as large as all expect."""
        parts = self.meeting.exchange(self.rank, tensor)
        found = [part.shape[-1] for part in parts]
        if found != list(sizes):
            raise ValueError(f"ranks gather parts of {found} columns, but {list(sizes)} are expected")
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Give all ranks what rank 0 has."""
        return self.meeting.exchange(self.rank, tensor)[0]


@dataclass(slots=True)
class SimulatedPipeline:
    """Fulfils `core.interfaces.PipelineParallel`."""

    size: int
    stage: int
    links: Sequence[queue.SimpleQueue[torch.Tensor]]
    """From each stage to the next."""

    def send(self, tensor: torch.Tensor, /) -> None:
        """Give the stream to the next stage."""
        self.links[self.stage].put(tensor.clone())

    def recv(self, tensor: torch.Tensor, /) -> torch.Tensor:
        """Take the stream of the previous stage."""
        return tensor.copy_(self.links[self.stage - 1].get(timeout=TIMEOUT))


# --- steps that were run on one rank ---------------------------------------------------------------


@dataclass(slots=True)
class Recorder:
    """An executor that notes what the one behind it was given and gave back."""

    executor: Executor
    steps: list[tuple[StepPlan, StepResult]] = field(default_factory=list)
    _plans: list[StepPlan] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def submit(self, plan: StepPlan) -> None:
        """Note a plan as it is now: the scheduler goes on using its lists."""
        self._plans.append(_copy(plan, StepPlan))
        self.executor.submit(plan)

    def collect(self) -> StepResult:
        """Note a result."""
        result = self.executor.collect()
        self.steps.append((self._plans.pop(0), _copy(result, StepResult)))
        return result


def _copy(message: Any, kind: type) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


def replay(
    settings: dict[str, Any], steps: Sequence[tuple[StepPlan, StepResult]], num_blocks: int
) -> list[StepResult]:
    """Run recorded steps on simulated ranks.

    :param settings: of the engine, with `tensor_parallel_size` and `pipeline_parallel_size`.
    :param num_blocks: of the KV cache that they were recorded with, the null block included.
    :return: the results of the rank that samples.
    :raises Exception: what the first failing rank has raised.
    """
    plan = resolve(load_config(settings)).plan
    tensor, num_stages = plan.tensor_parallel_size, plan.pipeline_parallel_size
    meetings = [Meeting(tensor) for _ in range(num_stages)]
    links = [queue.SimpleQueue[torch.Tensor]() for _ in range(num_stages)]
    results: list[StepResult] = []

    def work(rank: int) -> None:
        stage, row = divmod(rank, tensor)
        parts = Parts(
            attention=plan.factory("attention")(plan),
            scheme=plan.factory("quant")(plan),
            sampler=plan.factory("sampler")(plan),
            rank=rank,
            tensor=SimulatedTensorParallel(meetings[stage], row) if tensor > 1 else None,
            pipeline=SimulatedPipeline(num_stages, stage, links) if num_stages > 1 else None,
        )
        outputs = _run_steps(plan, parts, steps, num_blocks)
        if rank == plan.sampling_rank:
            results.extend(outputs)

    def leave() -> None:
        for meeting in meetings:
            meeting.leave()

    _run_threads(plan.world_size, work, leave)
    return results


def _run_steps(
    plan: Plan, parts: Parts, steps: Sequence[tuple[StepPlan, StepResult]], num_blocks: int
) -> list[StepResult]:
    executor = TorchExecutor(plan, parts)
    executor.load(lambda _done, _total: None)
    executor.allocate(num_blocks)
    outputs = []
    drawn: tuple[list[int], list[int], list[int]] = ([], [], [])
    for recorded, result in steps:
        step = _copy(recorded, StepPlan)
        if parts.pipeline is not None and drawn[0]:
            step.drawn = drawn
        executor.submit(step)
        outputs.append(executor.collect())
        sampling = [i for i, samples in enumerate(step.samples) if samples]
        drawn = (
            [step.rows[i] for i in sampling],
            [step.starts[i] + step.counts[i] for i in sampling],
            [result.tokens[i] for i in sampling],
        )
    executor.close()
    return outputs


def _run_threads(count: int, work: Callable[[int], None], on_error: Callable[[], Any]) -> None:
    """Run one thread for each rank; raise what the first failing one has raised."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001  raised by the caller's thread
            errors.append(error)
            on_error()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
