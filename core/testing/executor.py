"""Conformance of executors: what every `core.interfaces.Executor` must do.

Subclass `ExecutorConformance` in a test module and give it the descriptor::

    class TestAcmeExecutor(ExecutorConformance):
        entry = acme_executor.ENTRY
        device = "cuda"

The scheduler and the KV cache of the core plan the steps, of a tiny model whose greedy tokens
`transformers` knows.  Steps are kept in flight, requests share them, come and go; one step fails.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import deque
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from core.assemble import Assembly, Parts, make_parts, resolve
from core.blocks import BlockPool
from core.config import load_config
from core.errors import CapacityError
from core.interfaces import Executor, StepOutputs, missing_members
from core.kv_cache import PagedKVCache
from core.request import Request, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.step import NO_TOKEN
from core.testing.checkpoints import make_checkpoint, reference_generate, reference_logits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from core.interfaces import Sampler
    from core.plan import Plan
    from core.registry import ExecutorEntry
    from core.sampling import Sampled, SampleRows
    from core.step import RowEntry, StepPlan, StepResult

NUM_BLOCKS: Final = 40
"""Usable ones."""
BLOCK_SIZE: Final = 4
NUM_TOKENS: Final = 7
"""That each request generates."""
PROMPTS: Final = ([5, 9, 2], [7] * 11, [3, 80, 41, 6, 100, 23, 64, 9], [12], [5, 9, 2, 4, 4])
LOGPROB_TOLERANCE: Final = 1e-3


class Tripwire:
    """A sampler that raises when it is told to; otherwise the one behind it."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.is_armed = False

    def memory_bytes(self, max_rows: int, vocab_size: int, device: torch.device, /) -> int:
        """Pass on."""
        return self._sampler.memory_bytes(max_rows, vocab_size, device)

    def allocate(
        self, max_rows: int, vocab_size: int, max_model_len: int, device: torch.device, /
    ) -> None:
        """Pass on."""
        self._sampler.allocate(max_rows, vocab_size, max_model_len, device)

    def add(self, entry: RowEntry, /) -> None:
        """Pass on."""
        self._sampler.add(entry)

    def sample(self, logits: torch.Tensor, rows: SampleRows, /) -> Sampled:
        """Pass on, or raise once.

        :raises ArithmeticError: it was armed.
        """
        if self.is_armed:
            self.is_armed = False
            raise ArithmeticError("this step was made to fail")
        return self._sampler.sample(logits, rows)


@dataclass(slots=True)
class ExecutorRig:
    """An executor with a scheduler and a KV cache that feed it."""

    executor: Executor
    scheduler: TokenBudgetScheduler
    tripwire: Tripwire
    in_flight: deque[StepPlan]

    def submit(self) -> bool:
        """Launch one step; whether there was one."""
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self.in_flight.append(plan)
        self.executor.submit(plan)
        return True

    def collect(self) -> tuple[StepPlan, StepResult, StepOutputs]:
        """Take the oldest step back, checked, and give it to the scheduler."""
        plan = self.in_flight.popleft()
        result = self.executor.collect()
        assert result.step == plan.step, (
            f"step {result.step} comes back where {plan.step} is the oldest"
        )
        assert len(result.tokens) == len(plan.rows), (
            f"{len(result.tokens)} tokens for {len(plan.rows)} rows"
        )
        for token, samples in zip(result.tokens, plan.samples, strict=True):
            is_drawn = token != NO_TOKEN
            assert is_drawn == samples, f"a row {'samples' if samples else 'does not sample'}: {token}"
        return plan, result, self.scheduler.apply(result)

    def finish(self) -> None:
        """Work until nothing is left, with as many steps in flight as the executor takes."""
        while True:
            while len(self.in_flight) < self.executor.max_in_flight and self.submit():
                pass
            if not self.in_flight:
                return
            self.collect()

    def serve(self, names: Sequence[str], params: SamplingParams | None = None) -> list[Request]:
        """Complete the usual prompts; each has a name of its own."""
        requests = [
            make_request(name, prompt, params) for name, prompt in zip(names, PROMPTS, strict=False)
        ]
        for request in requests:
            self.scheduler.add(request)
        self.finish()
        return requests


class ExecutorConformance:
    """The tests; subclass it and set `entry`, or override `make_executor`."""

    entry: ClassVar[ExecutorEntry | None] = None
    device: ClassVar[str] = "cpu"
    plugin_settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By plugin name, as in a configuration file."""

    # --- what subclasses may change ----------------------------------------------------------------

    def make_executor(self, plan: Plan, parts: Parts) -> Executor:
        """Build the executor under test."""
        if self.entry is None:
            raise NotImplementedError(f"{type(self).__name__} sets no entry and no make_executor")
        executor: Executor = self.entry.factory(plan, parts)
        return executor

    def assemble(self, **settings: Any) -> Assembly:
        """Decide everything for the tiny model.

        :param settings: of the engine, over the usual ones.
        """
        usual = {
            "model": str(tiny_model()),
            "device": self.device,
            "dtype": "float32",
            "num_kv_blocks": NUM_BLOCKS,
            "block_size": BLOCK_SIZE,
            "max_num_seqs": 3,
            "max_num_batched_tokens": 8,
            "max_model_len": 64,
            "max_in_flight": 3,
            "plugin_settings": {name: dict(table) for name, table in self.plugin_settings.items()},
        }
        return resolve(load_config(usual | settings))

    def start(self, **settings: Any) -> ExecutorRig:
        """Build an executor, load and allocate, and put a scheduler before it."""
        plan = self.assemble(**settings).plan
        parts = make_parts(plan)
        tripwire = Tripwire(parts.sampler)
        executor = self.make_executor(plan, replace(parts, sampler=tripwire))
        executor.load(lambda _done, _total: None)
        num_blocks = executor.kv_capacity()
        executor.allocate(num_blocks)
        kv_cache = PagedKVCache(
            BlockPool(num_blocks), plan.block_size, b"test", enable_prefix_caching=False
        )
        scheduler = TokenBudgetScheduler(
            kv_cache,
            max_num_seqs=plan.config.max_num_seqs,
            max_num_batched_tokens=plan.config.max_num_batched_tokens,
        )
        return ExecutorRig(executor, scheduler, tripwire, deque())

    # --- the laws ----------------------------------------------------------------------------------

    def test_fulfils_the_protocol(self) -> None:
        """The engine calls what the Protocol names, as the Protocol says."""
        plan = self.assemble().plan
        executor = self.make_executor(plan, make_parts(plan))
        problems = missing_members(executor, Executor)
        assert not problems, "; ".join(problems)
        assert executor.max_in_flight >= 1, f"max_in_flight is {executor.max_in_flight}"
        executor.close()

    def test_loading_is_reported(self) -> None:
        """From nothing to all, never backwards."""
        plan = self.assemble().plan
        executor = self.make_executor(plan, make_parts(plan))
        told: list[tuple[int, int]] = []
        executor.load(lambda done, total: told.append((done, total)))
        executor.close()
        assert told, "nothing is reported"
        assert told == sorted(told, key=lambda pair: pair[0]), f"progress goes backwards: {told}"
        assert all(0 <= done <= total for done, total in told), f"more is done than there is: {told}"
        assert told[-1][0] == told[-1][1], f"the last report is {told[-1][0]} of {told[-1][1]}"

    def test_capacity_is_what_was_asked_for(self) -> None:
        """The null block is counted besides, and what does not fit is refused."""
        plan = self.assemble().plan
        executor = self.make_executor(plan, make_parts(plan))
        executor.load(lambda _done, _total: None)
        capacity = executor.kv_capacity()
        executor.close()
        assert capacity == NUM_BLOCKS + 1, (
            f"kv_capacity is {capacity}, but num_kv_blocks {NUM_BLOCKS} and the null block make "
            f"{NUM_BLOCKS + 1}"
        )

    def test_too_little_memory_is_refused(self) -> None:
        """Where not even one sequence fits."""
        plan = self.assemble(num_kv_blocks=None, kv_cache_memory_bytes=64).plan
        executor = self.make_executor(plan, make_parts(plan))
        executor.load(lambda _done, _total: None)
        try:
            with pytest.raises(CapacityError):
                executor.kv_capacity()
        finally:
            executor.close()

    def test_tokens_are_those_of_the_model(self) -> None:
        """Greedy, in chunks, with more requests than rows, and several steps in flight."""
        rig = self.start()
        requests = rig.serve([f"r{index}" for index in range(len(PROMPTS))])
        rig.executor.close()
        for request, prompt in zip(requests, PROMPTS, strict=True):
            expected = expected_tokens(tuple(prompt))
            assert request.output_token_ids == expected, (
                f"{request.output_token_ids} after {prompt}, not {expected}"
            )

    def test_results_come_in_order_of_submission(self) -> None:
        """As many steps as `max_in_flight` may wait; the oldest comes first."""
        rig = self.start()
        for index, prompt in enumerate(PROMPTS[:3]):
            rig.scheduler.add(make_request(f"r{index}", prompt))
        while len(rig.in_flight) < rig.executor.max_in_flight and rig.submit():
            pass
        while rig.in_flight:
            rig.collect()
        rig.executor.close()

    def test_log_probabilities_are_reported(self) -> None:
        """Of drawn tokens and of the prompt, where a request asks, by index of the scheduled row."""
        rig = self.start()
        params = SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1)
        asking = make_request("asking", PROMPTS[1], params)
        rig.scheduler.add(make_request("silent", PROMPTS[0]))
        rig.scheduler.add(asking)
        found = _collect_logprobs(rig, asking)
        rig.executor.close()
        tokens = [*PROMPTS[1], *asking.output_token_ids]
        exact = reference_logits(tiny_model(), tokens[:-1]).log_softmax(-1)
        assert sorted(found) == list(range(1, len(tokens))), f"positions {sorted(found)} are reported"
        for position, (token_id, logprob) in found.items():
            wanted = float(exact[position - 1, tokens[position]])
            assert token_id == tokens[position], f"position {position}: token {token_id}"
            assert abs(logprob - wanted) <= LOGPROB_TOLERANCE, (
                f"log-probability at position {position} is {logprob:.5g}, not {wanted:.5g}"
            )

    def test_an_error_is_raised_by_collect(self) -> None:
        """Not by `submit`, so that results stay in order; then the executor goes on."""
        rig = self.start()
        for index, prompt in enumerate(PROMPTS[:2]):
            rig.scheduler.add(make_request(f"r{index}", prompt))
        rig.submit()
        rig.collect()
        rig.tripwire.is_armed = True
        try:
            rig.submit()
        except ArithmeticError as error:
            raise AssertionError("submit raises what collect should") from error
        num_behind = sum(rig.submit() for _ in range(rig.executor.max_in_flight - 1))
        with pytest.raises(ArithmeticError, match="was made to fail"):
            rig.executor.collect()
        for _ in range(num_behind):  # computed on what was left behind, and of no use to anybody
            rig.executor.collect()
        rig.in_flight.clear()
        rig.scheduler.fail("this step was made to fail")
        requests = rig.serve(["later 0", "later 1"])
        rig.executor.close()
        for request, prompt in zip(requests, PROMPTS, strict=False):
            expected = expected_tokens(tuple(prompt))
            assert request.output_token_ids == expected, (
                f"after a failed step {request.output_token_ids} follow {prompt}, not {expected}"
            )

    def test_it_can_be_closed_at_any_time(self) -> None:
        """Before it was loaded, with a step in flight, and twice."""
        plan = self.assemble().plan
        unused = self.make_executor(plan, make_parts(plan))
        unused.close()
        unused.close()
        rig = self.start()
        rig.scheduler.add(make_request("r", PROMPTS[0]))
        rig.submit()
        rig.executor.close()
        rig.executor.close()


def make_request(name: str, prompt: Sequence[int], params: SamplingParams | None = None) -> Request:
    """Make a request that generates `NUM_TOKENS` tokens, greedily by default."""
    params = params or SamplingParams(temperature=0.0)
    return Request(name, list(prompt), params, max_tokens=NUM_TOKENS)


def _collect_logprobs(rig: ExecutorRig, request: Request) -> dict[int, tuple[int, float]]:
    """Serve all that was added.

    :return: token and its log-probability by position, of one request.
    """
    found: dict[int, tuple[int, float]] = {}
    while rig.submit():
        plan = rig.in_flight[0]
        row = request.row
        _, result, _ = rig.collect()
        for index, (scheduled, start, count) in enumerate(
            zip(plan.rows, plan.starts, plan.counts, strict=True)
        ):
            if scheduled != row:
                assert index not in result.logprobs, "log-probabilities that nobody asked for"
                assert index not in result.prompt_logprobs, "log-probabilities that nobody asked for"
                continue
            if index in result.logprobs:
                entry = result.logprobs[index]
                assert len(entry.top_ids) == 2, f"{len(entry.top_ids)} alternatives, not 2"
                found[start + count] = (entry.token_id, entry.logprob)
            if index in result.prompt_logprobs:
                chunk = result.prompt_logprobs[index]
                for offset, entry in enumerate(chunk.entries):
                    found[chunk.first + offset] = (entry.token_id, entry.logprob)
    return found


@cache
def tiny_model() -> Path:
    """Write a tiny checkpoint, once for all tests of this process."""
    folder = Path(tempfile.mkdtemp(prefix="cythera-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_checkpoint("llama3", folder)


@cache
def expected_tokens(prompt: tuple[int, ...]) -> list[int]:
    """Complete a prompt with `transformers`."""
    return reference_generate(tiny_model(), list(prompt), NUM_TOKENS)
