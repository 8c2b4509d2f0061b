"""A rank that dies, stops, hangs or fails is named, whatever the phase, and nothing hangs.

The processes, their connections and the engine are real; the ranks have no model (fake_rank.py).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.blocks import BlockPool
from core.engine import EngineCore
from core.errors import CytheraError, DeviceLostError
from core.events import EventBus, Subscription, WorkerLost
from core.kv_cache import PagedKVCache
from core.messages import Submit
from core.ranks import launch, watch
from core.ranks.executor import RankExecutor, Recipe
from core.ranks.launch import ProcessLauncher, Worker
from core.request import FinishReason, SamplingParams
from core.scheduler import TokenBudgetScheduler

NUM_RANKS = 3
STARTING = ["join", "load", "measure", "allocate"]
QUICK = {"rank_timeout": 3.0, "step_timeout": 5.0}


@pytest.fixture
def make_executor(tmp_path, monkeypatch):
    """Make an executor whose ranks are fake and one of which has a fault."""
    made = []

    def make(fault="none:none:none", **settings):
        def start(sock):
            stacks = tempfile.TemporaryFile()  # noqa: SIM115  lives with the process
            fds = (sock.fileno(), stacks.fileno())
            command = [sys.executable, str(Path(__file__).with_name("fake_rank.py"))]
            command += [*map(str, fds), str(tmp_path), fault]
            process = subprocess.Popen(command, pass_fds=fds)  # noqa: S603  our own file
            sock.close()
            return Worker(process, stacks)

        monkeypatch.setattr(launch, "start_worker", start)
        monkeypatch.setattr(watch, "STARTING", 15.0)
        values = {"max_in_flight": None, **QUICK, **settings}
        config = SimpleNamespace(**values, to_dict=dict, origins={})
        plan = SimpleNamespace(
            config=config,
            device="cpu",
            world_size=NUM_RANKS,
            pipeline_parallel_size=1,
            digest=lambda: "digest",
        )
        executor = RankExecutor(Recipe(plan, ()), ProcessLauncher(NUM_RANKS))
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()
    assert not children(tmp_path)


def children(folder):
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_text())
    return [line for line in lines if str(folder) in line and "fake_rank" in line]


def start(executor):
    executor.load(lambda _done, _total: None)
    num_blocks = executor.kv_capacity()
    executor.allocate(num_blocks)
    return num_blocks


class Engine:
    """A real engine over an executor that has been started."""

    def __init__(self, executor, num_blocks):
        self.batches, self.lost = [], []
        kv_cache = PagedKVCache(BlockPool(num_blocks), 4, b"", enable_prefix_caching=True)
        subscription = Subscription(
            "test", lambda batch: self.lost.extend(batch.events), (WorkerLost,), policy="block"
        )
        self.core = EngineCore(
            scheduler=TokenBudgetScheduler(kv_cache, max_num_seqs=4, max_num_batched_tokens=16),
            kv_cache=kv_cache,
            executor=executor,
            bus=EventBus([subscription]),
            outbox=self.batches.append,
        )

    def run(self, num_requests, max_tokens=6):
        """Run requests to their ends; return how each ended and what it drew."""
        self.batches.clear()
        for index in range(num_requests):
            params = SamplingParams(max_tokens=max_tokens)
            self.core.send(Submit(f"r{index}", [1, 2, 3 + index], params, max_tokens, [], 0))
        while self.core.step():
            pass
        ended = {end.request_id: end for batch in self.batches for end in batch.ended}
        tokens = {f"r{index}": [] for index in range(num_requests)}
        for batch in self.batches:
            for request_id, token in zip(batch.request_ids, batch.tokens, strict=True):
                tokens[request_id].append(token)
        return ended, tokens


def test_ranks_that_nothing_happens_to(make_executor):
    executor = make_executor()
    progress = []
    executor.load(lambda done, total: progress.append((done, total)))
    assert progress[-1] == (2 * NUM_RANKS, 2 * NUM_RANKS)
    assert executor.kv_capacity() == 20  # of the rank that has the least
    executor.allocate(20)
    ended, tokens = Engine(executor, 20).run(3)
    assert {end.reason for end in ended.values()} == {FinishReason.LENGTH}
    assert all(drawn == [5] * 6 for drawn in tokens.values())


@pytest.mark.parametrize(
    ("rank", "action"), [(0, "kill"), (2, "kill"), (0, "stop"), (2, "stop"), (1, "raise"), (1, "exit")]
)
@pytest.mark.parametrize("phase", STARTING)
def test_a_rank_that_is_lost_while_starting_is_named(rank, phase, action, make_executor):
    executor = make_executor(f"{rank}:{phase}:{action}")
    began = time.monotonic()
    with pytest.raises(CytheraError, match=rf"^rank {rank} \(pid \d+\)") as caught:
        start(executor)
    assert time.monotonic() - began < 30
    expected = {
        "kill": "died of signal 9",
        "stop": "does not answer",
        "raise": "RuntimeError: planted",
        "exit": "ended with exit code 7",
    }
    assert expected[action] in str(caught.value)


@pytest.mark.parametrize("action", ["kill", "stop", "raise", "hang"])
@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_rank_that_is_lost_in_a_step_is_replaced(rank, action, make_executor):
    executor = make_executor(f"{rank}:step:{action}")
    engine = Engine(executor, start(executor))
    began = time.monotonic()
    ended, tokens = engine.run(3)
    assert time.monotonic() - began < 45
    assert {end.reason for end in ended.values()} == {FinishReason.LENGTH}
    assert all(drawn == [5] * 6 for drawn in tokens.values())
    (lost,) = engine.lost
    assert lost.rank == rank
    expected = {
        "kill": "died of signal 9 (Killed), in step 0",
        "stop": "does not answer; step 0 was due",
        "raise": "failed in step 0: RuntimeError: planted",
        "hang": "takes more than 5 s (--step-timeout), in step 0",
    }
    assert expected[action] in lost.reason
    stack = {
        "stop": "is stopped (SIGSTOP)",
        "raise": 'raise RuntimeError("planted")',
        "hang": "hang_here",
    }
    assert stack.get(action, "") in lost.reason
    engine.core.kv_cache.check_integrity([])


def test_a_rank_that_dies_while_idle_is_replaced(make_executor):
    executor = make_executor()
    engine = Engine(executor, start(executor))
    engine.run(1)
    (victim,) = [rank.handle for rank in executor._group._ranks if rank.rank == 1]
    os.kill(victim._worker.process.pid, 9)
    time.sleep(0.2)
    ended, _ = engine.run(2)
    assert {end.reason for end in ended.values()} == {FinishReason.LENGTH}
    assert [event.rank for event in engine.lost] == [1]


def test_requests_whose_step_costs_ranks_again_and_again_are_ended(make_executor):
    executor = make_executor("1:step:kill-always")
    engine = Engine(executor, start(executor))
    for _ in range(2):
        ended, tokens = engine.run(1)
        assert ended["r0"].reason is FinishReason.ERROR
        assert "rank 1" in ended["r0"].error
        assert tokens["r0"] == []
    with pytest.raises(DeviceLostError, match=r"^rank 1 \(pid \d+\) died of signal 9"):
        engine.run(1)
