"""Stages that do not draw are told what was drawn, and never write over a row's next request."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from core.batch import BatchState
from core.blocks import BlockPool
from core.kv_cache import PagedKVCache
from core.ranks.executor import RankExecutor, Recipe
from core.request import FinishReason, Request, SamplingParams
from core.scheduler import TokenBudgetScheduler
from core.step import NO_TOKEN, StepResult

BLOCK = 4
MAX_LEN = 64
VOCAB = 97
NUM_STAGES = 3
NUM_ROWS = 4


class FirstStage:
    """In place of the ranks: keeps rows as the first stage does, and draws from what it finds there."""

    def __init__(self):
        self.state = BatchState(NUM_ROWS, MAX_LEN, BLOCK, torch.device("cpu"))
        self.results = deque()

    def send(self, message):
        plan = message.plan
        if plan.drawn is not None:
            self.state.store(*torch.tensor(plan.drawn).unbind())
        self.state.update(plan)
        tokens = []
        for row, start, count, samples in zip(
            plan.rows, plan.starts, plan.counts, plan.samples, strict=True
        ):
            known = self.state.tokens[row, : start + count].tolist()
            tokens.append(draw(known) if samples else NO_TOKEN)
        self.results.append(StepResult(plan.step, tokens))

    def take_result(self):
        return self.results.popleft()

    def expect(self, step):
        pass

    def restart_clock(self):
        pass


def draw(tokens):
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 100_003
    return value % VOCAB


def expected(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(draw(tokens))
    return tokens


@pytest.mark.parametrize("seed", range(30))
def test_requests_that_come_and_go_draw_what_they_would_alone(seed):
    chance = random.Random(seed)
    config = SimpleNamespace(max_in_flight=None)
    plan = SimpleNamespace(config=config, pipeline_parallel_size=NUM_STAGES, device="cpu")
    executor = RankExecutor(Recipe(plan, ()), None)
    executor._group = FirstStage()
    cache = PagedKVCache(
        BlockPool(20), BLOCK, b"", enable_prefix_caching=False
    )  # preempts now and then
    scheduler = TokenBudgetScheduler(
        cache, max_num_seqs=NUM_ROWS, max_num_batched_tokens=8, num_micro_batches=NUM_STAGES
    )
    waiting = [
        Request(
            f"r{index}",
            [chance.randrange(VOCAB) for _ in range(chance.randint(1, 30))],
            SamplingParams(),
            max_tokens=chance.randint(1, 20),
            stop_ids=frozenset(),
            seed=0,
        )
        for index in range(25)
    ]
    running, in_flight = {}, 0
    while waiting or scheduler.has_work or in_flight:
        if waiting and chance.random() < 0.5:
            request = waiting.pop()
            running[request.request_id] = request
            scheduler.add(request)
        if scheduler.has_work and chance.random() < 0.1:
            victim = chance.choice([*scheduler.open_requests()])
            scheduler.finish(victim.request_id, FinishReason.ABORT)
        while in_flight < executor.max_in_flight and (step := scheduler.plan()) is not None:
            executor.submit(step)
            in_flight += 1
        if in_flight:
            scheduler.apply(executor.collect())
            in_flight -= 1
    for request in running.values():
        assert list(request.token_ids) == expected(
            request.token_ids[: request.num_prompt], request.num_output
        )
    cache.check_integrity([])
