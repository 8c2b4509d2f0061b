"""What the starting packages of the kinds have to say about themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """The starting package of one kind.  `{name}` and `{plugin}` stand for the names of the plugin."""

    summary: str
    """What it does as it is written: begins the README, and describes the distribution."""
    use: str
    """The arguments of `python -m core` that use the plugin."""
    first: str
    """What its author is likely to change first."""
    prefix: str = ""
    """The part of the plugin's name before the dot, where it is not the kind."""


STARTERS: Final[dict[str, Starter]] = {
    "attention": Starter(
        summary="Paged attention in plain torch, one row after the other.",
        use="serve demo --plugins {plugin}",
        first="`attend` in `backend.py` is the formula; `forward` around it stores and finds the pages.",
    ),
    "quant": Starter(
        summary="Weights in int8, one scale for each output feature.",
        use="serve demo --plugins {plugin} --quantization {name}",
        first="`quantize` in `scheme.py` makes the codes, `dequantize` undoes it, and `tensors` names "
        "what a checkpoint holds.",
    ),
    "parallel": Starter(
        summary="Tensor parallelism that divides everything evenly.",
        use="serve demo --plugins {plugin} --tensor-parallel-size 2",
        first="`divide_layers` says what each rank holds, `collectives.py` how ranks talk.",
    ),
    "scheduler": Starter(
        summary="The core's scheduler, which lets short prompts overtake long ones.",
        use="serve demo --plugins {plugin} --scheduler {name}",
        first="`rank` in `order.py` decides who goes first. What shares a step, and who is preempted, is "
        "`TokenBudgetScheduler` of the core: wrap or replace it in `__init__.py`.",
    ),
    "kv_cache": Starter(
        summary="The core's KV cache, over a pool that knows how full it has been.",
        use="serve demo --plugins {plugin} --kv-cache {name}",
        first="`pool.py` hands out blocks. What is kept, shared and evicted is `PagedKVCache` of the core: "
        "override or replace it in `__init__.py`.",
    ),
    "executor": Starter(
        summary="The core's executor, with a clock around its steps.",
        use="serve demo --plugins {plugin} --executor {name}",
        first="`submit` launches a step and `collect` waits for the oldest one, in `executor.py`.",
    ),
    "launcher": Starter(
        summary="Starts the ranks as child processes, and says which process is which rank.",
        use="serve demo --plugins {plugin} --distributed-executor-backend {name} "
        "--tensor-parallel-size 2",
        first="`start` in `launcher.py` returns a handle for every rank.",
        prefix="parallel",  # the name that --distributed-executor-backend enables
    ),
    "model": Starter(
        summary="A model family whose config is spelled as Llama's.",
        use="serve path/to/checkpoint --plugins {plugin}",
        first="`read` in `__init__.py` turns a config into a `ModelSpec`: say there what is different.",
    ),
    "frontend": Starter(
        summary="One route that completes a text.",
        use="serve demo --plugins {plugin},frontend.openai",
        first="`routes.py` is a Starlette route over `core.service.Service`.",
    ),
    "server": Starter(
        summary="Carries the front ends over HTTP with uvicorn.",
        use="serve demo --plugins {plugin} --server {name}",
        first="`server.py` has one small ASGI wrapper for each promise that a server makes.",
    ),
    "sampler": Starter(
        summary="The core's sampler, with top-n-sigma in front of it.",
        use="serve demo --plugins {plugin} --sampler {name} --set {plugin}.n_sigma=1.0",
        first="`sample` in `sampler.py` changes the logits before the core draws from them.",
    ),
    "events": Starter(
        summary="Prints a line for every request that ends.",
        use="serve demo --plugins {plugin}",
        first="`core_subscribe` names the events that you want, `Reporter` takes them in batches.",
    ),
    "command": Starter(
        summary="A command that counts the tokens of a text.",
        use="--plugins {plugin} {name} demo 'How many tokens?'",
        first="The function's parameters become arguments and options, its docstring the help.",
    ),
}
"""By kind: those of `core.registry.KINDS`, then what plugins do without a descriptor."""
