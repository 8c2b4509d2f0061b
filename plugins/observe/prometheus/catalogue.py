"""Every metric of the plugin, once: what is counted, exposed, documented and drawn follows from here.

The names after the prefix are those of vLLM wherever the meaning is the same, so that `is_vllm` is all
that it takes to offer a series under `vllm:` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from core.request import FinishReason
from core.status import Phase

PREFIX: Final = "cythera:"
VLLM_PREFIX: Final = "vllm:"

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, without its prefix and without the `_total` that counters get."""

    name: str
    kind: Kind
    help: str
    is_vllm: bool = False
    """Whether vLLM has it, with the same meaning."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of the buckets of a histogram, ascending; +Inf is understood."""
    labels: tuple[str, ...] = ()
    """Labels besides `model_name`."""
    values: tuple[str, ...] = ()
    """Values of the only label, if they are known from the start: their series begin at 0."""


FIRST_TOKEN: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
# vLLM begins at 10 ms, where a small model on a fast device ends.
PER_TOKEN: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
PER_REQUEST: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
PER_STEP: Final = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
# The same for every model, so that series of different models can be added up.
TOKENS: Final = (*(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)), 1e6)
STEP_TOKENS: Final = (1.0, *(float(2**power) for power in range(3, 15)))

OTHER: Final = "other"
"""The finish reason of what ended for a reason that this version does not know."""
COMPLETED: Final = frozenset({FinishReason.STOP, FinishReason.LENGTH})
"""Reasons of a request that ran to its end."""

_REASONS: Final = tuple(str(reason) for reason in FinishReason)
_PHASES: Final = tuple(str(phase) for phase in Phase)

CATALOGUE: Final = (
    Metric(
        "phase", "gauge", "1 for the phase that the engine is in.", labels=("phase",), values=_PHASES
    ),
    Metric("requests_open", "gauge", "Requests admitted by the front ends that have not ended."),
    Metric("num_requests_running", "gauge", "Sequences that hold a row of the batch.", is_vllm=True),
    Metric("num_requests_waiting", "gauge", "Sequences that wait for a row.", is_vllm=True),
    Metric("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use, 0 to 1.", is_vllm=True),
    Metric(
        "cache_config_info",
        "gauge",
        "Always 1; the labels tell the size of the KV cache.",
        is_vllm=True,
        labels=("block_size", "num_gpu_blocks"),
    ),
    Metric(
        "prompt_tokens", "counter", "Prompt tokens of sequences whose first token came.", is_vllm=True
    ),
    Metric(
        "prompt_tokens_cached",
        "counter",
        "Prompt tokens of the same sequences that the prefix cache held.",
        is_vllm=True,
    ),
    Metric("generation_tokens", "counter", "Tokens generated.", is_vllm=True),
    Metric(
        "prefix_cache_queries",
        "counter",
        "Prompt tokens of sequences that got their first row.",
        is_vllm=True,
    ),
    Metric(
        "prefix_cache_hits",
        "counter",
        "Prompt tokens of the same sequences that the prefix cache held.",
        is_vllm=True,
    ),
    Metric(
        "num_preemptions",
        "counter",
        "Times that a sequence gave its blocks back to wait.",
        is_vllm=True,
    ),
    Metric("kv_blocks_evicted", "counter", "Cached KV blocks that were reused for something else."),
    Metric(
        "request_success",
        "counter",
        "Sequences that ended, by reason.",
        is_vllm=True,
        labels=("finished_reason",),
        values=_REASONS,
    ),
    Metric("requests_refused", "counter", "Requests that were turned away at the door."),
    Metric("steps", "counter", "Steps of the engine whose result was applied."),
    Metric("step_failures", "counter", "Steps that raised; every sequence in them ended."),
    Metric("subscribers_dropped", "counter", "Event subscribers that failed and were switched off."),
    Metric("event_batches_dropped", "counter", "Batches of events that these metrics missed."),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "From the arrival of a sequence to its first token.",
        is_vllm=True,
        bounds=FIRST_TOKEN,
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Between two tokens of a sequence, preemptions included.",
        is_vllm=True,
        bounds=PER_TOKEN,
    ),
    Metric(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean time between the tokens of a sequence that ran to its end.",
        is_vllm=True,
        bounds=PER_TOKEN,
    ),
    Metric(
        "e2e_request_latency_seconds",
        "histogram",
        "From the arrival to the end of a sequence that ran to its end.",
        is_vllm=True,
        bounds=PER_REQUEST,
    ),
    Metric(
        "request_queue_time_seconds",
        "histogram",
        "From the arrival of a sequence to its first row.",
        is_vllm=True,
        bounds=PER_REQUEST,
    ),
    Metric(
        "request_prefill_time_seconds",
        "histogram",
        "From the first row of a sequence to its first token.",
        is_vllm=True,
        bounds=PER_REQUEST,
    ),
    Metric(
        "request_decode_time_seconds",
        "histogram",
        "From the first token to the end of a sequence that ran to its end.",
        is_vllm=True,
        bounds=PER_REQUEST,
    ),
    Metric(
        "request_prompt_tokens",
        "histogram",
        "Prompt tokens of a sequence that ran to its end.",
        is_vllm=True,
        bounds=TOKENS,
    ),
    Metric(
        "request_generation_tokens",
        "histogram",
        "Generated tokens of a sequence that ran to its end.",
        is_vllm=True,
        bounds=TOKENS,
    ),
    Metric(
        "iteration_tokens_total",
        "histogram",
        "Positions computed by a step.",
        is_vllm=True,
        bounds=STEP_TOKENS,
    ),
    Metric(
        "step_duration_seconds",
        "histogram",
        "From submitting a step to applying its result.",
        bounds=PER_STEP,
    ),
)
