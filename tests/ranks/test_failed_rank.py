"""A rank on which a step has raised does not disturb the collectives of the others."""

from __future__ import annotations

import pytest

from core.assemble import Parts, resolve
from core.config import load_config
from core.executor import TorchExecutor
from core.request import SamplingParams
from core.step import RowEntry, StepPlan
from core.testing.checkpoints import make_checkpoint
from core.testing.simulated_ranks import Meeting, SimulatedTensorParallel


def test_a_rank_that_has_failed_meets_nobody_in_later_steps(tmp_path):
    model = make_checkpoint("qwen3", tmp_path)
    settings = {"model": str(model), "device": "cpu", "num_kv_blocks": 40, "max_model_len": 64}
    plan = resolve(load_config({**settings, "tensor_parallel_size": 2})).plan
    calls = []

    class Broken(SimulatedTensorParallel):
        def all_reduce(self, _tensor):
            calls.append("all_reduce")
            raise RuntimeError("planted")

    parts = Parts(
        attention=plan.factory("attention")(plan),
        scheme=plan.factory("quant")(plan),
        sampler=plan.factory("sampler")(plan),
        tensor=Broken(Meeting(2), 0),
    )
    executor = TorchExecutor(plan, parts)
    executor.load(lambda _done, _total: None)
    executor.allocate(41)
    entry = RowEntry(0, "r", [1, 2, 3], 3, SamplingParams(), 0, [])
    for number, added in enumerate(([entry], [])):
        executor.submit(StepPlan(number, added, [], [0], [number], [1], [False]))
    with pytest.raises(RuntimeError, match="planted"):
        executor.collect()
    with pytest.raises(RuntimeError, match="failed in an earlier step"):
        executor.collect()
    assert calls == ["all_reduce"]
