"""The engine's half of an executor of several ranks.

Every rank is a process of its own, the first one too: an engine that never enters a collective can
always say what is wrong with those who do.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import structlog
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from core.errors import CapacityError, ConfigError, DeviceLostError
from core.ranks.messages import Allocate, Begin, Done, Load, Measure, Run
from core.ranks.watch import STARTING, RankGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from core.plan import Plan
    from core.ranks.watch import RankHandle
    from core.step import StepPlan, StepResult

log = structlog.get_logger(__name__)

EXIT_PATIENCE: Final = 3.0
"""Seconds that idle ranks get to end by themselves."""


class Launcher(Protocol):
    """Starts the processes of all ranks."""

    store_host: str
    """Address of this machine at which all ranks reach it."""

    def start(self) -> Sequence[RankHandle]:
        """Start all ranks, or start them anew; in order of rank.

        :raises CytheraError: they cannot be started, or machines have not joined in time.
        """

    def close(self) -> None:
        """Let nobody join any more."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a rank needs to come to the same plan."""

    plan: Plan
    defaults: tuple[str, ...]
    """Plugins that are active unless the configuration says otherwise."""


class RankExecutor:
    """Fulfils `core.interfaces.Executor` and `SupportsRecovery` with several ranks."""

    def __init__(self, recipe: Recipe, launcher: Launcher) -> None:
        plan = recipe.plan
        self._recipe = recipe
        self._launcher = launcher
        self._has_stages = plan.pipeline_parallel_size > 1
        self.max_in_flight = self._choose_depth(plan)
        self._group: RankGroup | None = None
        self._store: TCPStore | None = None
        self._num_blocks = 0
        self._in_flight: deque[StepPlan] = deque()
        self._drawn: tuple[list[int], list[int], list[int]] = ([], [], [])

    @staticmethod
    def _choose_depth(plan: Plan) -> int:
        if plan.config.max_in_flight is not None:
            return plan.config.max_in_flight
        if plan.pipeline_parallel_size > 1:  # as many steps as stages, so that none is idle
            return plan.pipeline_parallel_size
        return 1 if plan.device == "cpu" else 2

    # --- start ---

    def load(self, report: Callable[[int, int], None], /) -> None:
        """Start all ranks and let each load its part of the weights.

        :raises CytheraError: a rank has failed or is lost.
        """
        self._start()
        self._running.ask_all(Load(), report)

    def kv_capacity(self) -> int:
        """Find how many blocks fit on the rank that can hold the fewest, the null block included."""
        answers = self._running.ask_all(Measure())
        counts = [answer.num_blocks for answer in answers if isinstance(answer, Done)]
        if not counts or min(counts) < 2:
            raise CapacityError(f"the ranks can hold {counts} KV blocks; at least 2 are needed on each")
        return min(counts)

    def allocate(self, num_blocks: int, /) -> None:
        """Let every rank allocate its part of the KV cache."""
        self._num_blocks = num_blocks
        self._running.ask_all(Allocate(num_blocks))

    def recover(self) -> None:
        """Start all ranks anew; the weights are loaded again.

        :raises CytheraError: that fails too.
        """
        self._stop()
        self._start()
        log.warning("ranks restarted, loading again", ranks=self._recipe.plan.world_size)
        self._running.ask_all(Load())
        self._running.ask_all(Allocate(self._num_blocks))

    def close(self) -> None:
        """End all ranks."""
        self._stop(EXIT_PATIENCE)
        self._launcher.close()

    @property
    def _running(self) -> RankGroup:
        if self._group is None:
            raise DeviceLostError("the ranks have not been started", rank=0)
        return self._group

    def _start(self) -> None:
        plan, host = self._recipe.plan, self._launcher.store_host
        config = plan.config
        self._store = store = _open_store(host)
        handles = self._launcher.start()
        self._group = group = RankGroup(
            handles, answer_timeout=config.rank_timeout, step_timeout=config.step_timeout
        )
        settings, digest = config.to_dict(), plan.digest()  # the same for all
        for rank, handle in enumerate(handles):
            begin = Begin(
                rank=rank,
                local_rank=handle.local_rank,
                world_size=plan.world_size,
                local_world_size=handle.local_world_size,
                config=settings,
                origins=config.origins,
                defaults=list(self._recipe.defaults),
                digest=digest,
                store_host=host,
                store_port=store.port,
                timeout=max(STARTING, 2 * config.step_timeout),
            )
            group.send(begin, rank)
        joined = group.ask_all(None)
        devices = [getattr(answer, "device", "") for answer in joined]
        log.info("ranks joined", devices=devices)

    def _stop(self, patience: float = 0.0) -> None:
        self._in_flight.clear()
        self._drawn = ([], [], [])
        group, self._group, self._store = self._group, None, None
        if group is not None:
            group.close(patience)

    # --- steps ---

    def submit(self, plan: StepPlan, /) -> None:
        """Send one step to all ranks."""
        if self._has_stages and self._drawn[0]:
            plan.drawn, self._drawn = self._drawn, ([], [], [])
        self._in_flight.append(plan)
        self._running.expect(plan.step)
        self._running.send(Run(plan))

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight.

        :raises DeviceLostError: a rank is lost; names it, with its last step and where it was.
        """
        group = self._running
        result = group.take_result()
        plan = self._in_flight.popleft()
        if self._has_stages:
            self._note_drawn(plan, result)
        if self._in_flight:
            group.restart_clock()
        else:
            group.expect(None)
        return result

    def _note_drawn(self, plan: StepPlan, result: StepResult) -> None:
        """Keep what stages must be told that did not draw it, with the next step."""
        rows, positions, tokens = self._drawn
        # A step behind this one may have given a row to another request, whose tokens are there by now.
        given_away = {entry.row for later in self._in_flight for entry in later.added}
        for row, start, count, samples, token in zip(
            plan.rows, plan.starts, plan.counts, plan.samples, result.tokens, strict=True
        ):
            if samples and row not in given_away:
                rows.append(row)
                positions.append(start + count)
                tokens.append(token)


def _open_store(host: str) -> TCPStore:
    """Open torch.distributed's store at one address; by itself it would listen at all of them.

    :raises ConfigError: the address is not one of this machine.
    """
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise ConfigError(f"cannot listen for ranks at {host}: {error.strerror}") from error
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
