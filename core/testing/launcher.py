"""Conformance of launchers: what starts the processes of ranks, here or elsewhere.

Subclass `LauncherConformance` in a test module and give it the descriptor::

    class TestAcmeLauncher(LauncherConformance):
        entry = acme_launcher.ENTRY

Ranks are started but given nothing to do: a rank that has begun nothing still says how far it is.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from core.config import EngineConfig
from core.interfaces import missing_members
from core.link import READ_BYTES, Framer, encode
from core.ranks.executor import Launcher
from core.ranks.messages import FromRank, Ping, Pong
from core.ranks.watch import RankHandle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from core.registry import LauncherEntry

PATIENCE: Final = 60.0
"""Seconds that a process may take to start, or to end."""


class LauncherConformance:
    """The tests; subclass it and set `entry`, or override `make_launcher`."""

    entry: ClassVar[LauncherEntry | None] = None
    world_size: ClassVar[int] = 2
    config: ClassVar[Mapping[str, Any]] = {}
    """Settings of the engine, such as `nnodes`."""

    # --- what subclasses may change ----------------------------------------------------------------

    def make_launcher(self) -> Launcher:
        """Build the launcher under test."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry and no make_launcher")
        launcher: Launcher = self.entry.factory(self.make_plan())
        return launcher

    def make_plan(self) -> Any:
        """Make what the factory is given: of the plan only what launchers have a use for."""
        return SimpleNamespace(
            world_size=self.world_size,
            tensor_parallel_size=self.world_size,
            pipeline_parallel_size=1,
            device="cpu",
            config=EngineConfig(model="tiny", device="cpu", **self.config),
        )

    @contextlib.contextmanager
    def start(self, launcher: Launcher) -> Iterator[Sequence[RankHandle]]:
        """Start all ranks, and end them in any case."""
        handles = launcher.start()
        try:
            yield handles
        finally:
            for handle in handles:
                handle.kill()
                handle.sock.close()

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The executor calls what the Protocols name, as they say."""
        launcher = self.make_launcher()
        problems = missing_members(launcher, Launcher)
        assert not problems, "; ".join(problems)
        assert launcher.store_host, "store_host names no address at which ranks reach this machine"
        with self.start(launcher) as handles:
            problems = [text for handle in handles for text in missing_members(handle, RankHandle)]
        launcher.close()
        assert not problems, "; ".join(problems)

    def test_every_rank_answers(self) -> None:
        """All are there, each has a name and its place on its machine, and runs."""
        launcher = self.make_launcher()
        with self.start(launcher) as handles:
            assert len(handles) == self.world_size, f"{len(handles)} of {self.world_size} ranks"
            names = [handle.name for handle in handles]
            assert all(names), f"ranks without names: {names}"
            assert len(set(names)) == len(names), f"ranks of one name: {names}"
            for rank, handle in enumerate(handles):
                assert 0 <= handle.local_rank < handle.local_world_size <= self.world_size, (
                    f"rank {rank} is number {handle.local_rank} of {handle.local_world_size} ranks of its "
                    f"machine"
                )
                expect_answer(handle, rank)
                ended = handle.ended(0.0)
                assert ended is None, f"rank {rank} answers, but is said to have ended: {ended}"
        launcher.close()

    def test_a_killed_rank_has_ended(self) -> None:
        """It is told how, and the others run on."""
        launcher = self.make_launcher()
        with self.start(launcher) as handles:
            for rank, handle in enumerate(handles):
                expect_answer(handle, rank)
            handles[-1].kill()
            told = handles[-1].ended(PATIENCE)
            assert told, "a rank that was killed is said to run"
            for rank, handle in enumerate(handles[:-1]):
                expect_answer(handle, rank)
        launcher.close()

    def test_ranks_can_be_started_anew(self) -> None:
        """After all were ended: that is how an engine recovers."""
        launcher = self.make_launcher()
        for _ in range(2):
            with self.start(launcher) as handles:
                for rank, handle in enumerate(handles):
                    expect_answer(handle, rank)
        launcher.close()

    def test_stacks_are_text(self) -> None:
        """Of a rank that does not answer; they may be out of reach."""
        launcher = self.make_launcher()
        with self.start(launcher) as handles:
            expect_answer(handles[0], 0)
            stack = handles[0].dump_stack()
        launcher.close()
        assert isinstance(stack, str), f"dump_stack returns {stack!r}"

    def test_it_can_be_closed_twice(self) -> None:
        """And without having started anything."""
        launcher = self.make_launcher()
        launcher.close()
        launcher.close()


def expect_answer(handle: RankHandle, rank: int) -> None:
    """Ask a rank how far it is, and wait until it says so."""
    framer, deadline = Framer(FromRank), time.monotonic() + PATIENCE
    try:
        handle.sock.settimeout(PATIENCE)
        handle.sock.sendall(encode(Ping()))
        while time.monotonic() < deadline:
            data = handle.sock.recv(READ_BYTES)
            assert data, f"rank {rank} has closed its connection: {handle.ended(1.0)}"
            if any(isinstance(message, Pong) for message in framer.feed(data)):
                return
    except OSError as error:
        raise AssertionError(f"rank {rank} cannot be talked to: {error!r}") from error
    raise AssertionError(f"rank {rank} does not answer")
