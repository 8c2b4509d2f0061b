"""What a client saw of a server: latencies, rates, and the report that scripts know how to read.

Labels, their order and the keys of the JSON are those that clients of serving engines have agreed on, so
that dashboards and comparisons work without a change.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

WIDTH: Final = 50
METRICS: Final = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
DETAILS: Final = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "start_times",
    "generated_texts",
    "errors",
)
"""Lists with an entry for each request, which only a detailed result holds."""


@dataclass(slots=True)
class StreamRecord:
    """One request as its client saw it.  Times are seconds of one clock."""

    input_len: int
    output_len: int = 0
    start: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    """When each piece of the answer came; a piece may hold several tokens."""
    text: str = ""
    error: str = ""
    """Empty if the request succeeded."""

    @property
    def ttft(self) -> float:
        """Seconds to the first piece; 0 if none came."""
        return self.chunk_times[0] - self.start if self.chunk_times else 0.0

    @property
    def latency(self) -> float:
        """Seconds to the last piece; 0 if none came."""
        return self.chunk_times[-1] - self.start if self.chunk_times else 0.0

    @property
    def tpot(self) -> float:
        """Seconds per token after the first one; 0 if there is none."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0

    @property
    def itls(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


# --- settings --------------------------------------------------------------------------------------


def parse_metrics(text: str) -> list[str]:
    """Read `--percentile-metrics`.

    :raises ConfigError: a metric is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise ConfigError(f"--percentile-metrics {name!r} is unknown; there are {known}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """Read `--metric-percentiles`.

    :raises ConfigError: one of them is none.
    """
    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"--metric-percentiles {text!r} must be numbers such as 50,99") from error
    for value in values:
        if not 0 <= value <= 100:
            raise ConfigError(f"--metric-percentiles {value:g} must be from 0 to 100")
    return values


def parse_goodput(words: Iterable[str]) -> dict[str, float]:
    """Read `--goodput`: the most milliseconds that a good request may take, by metric.

    :raises ConfigError: a word is not such as `ttft:500`, or its metric is unknown.
    """
    limits: dict[str, float] = {}
    for word in (part for item in words for part in item.split(",") if part):
        name, _, value = word.partition(":")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--goodput {word!r} must be a metric and ms, as ttft:500") from error
        if name not in GOODPUT_METRICS or not limits[name] >= 0:
            known = ", ".join(GOODPUT_METRICS)
            raise ConfigError(f"--goodput {word!r} must be one of {known}, and ms of at least 0")
    return limits


# --- figures ---------------------------------------------------------------------------------------


def summarize(
    records: Sequence[StreamRecord],
    begin: float,
    duration: float,
    *,
    goodput: Mapping[str, float] | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (99.0,),
) -> dict[str, Any]:
    """Compute the figures of a run.

    :param begin: when the run began, on the clock of the records.
    :param duration: of the run, in seconds.
    :param goodput: see `parse_goodput`.
    :param metrics: keys of `METRICS` that get figures.
    :return: the body of a result file, with the lists of `DETAILS`.
    """
    done = [record for record in records if not record.error]
    num_input = sum(record.input_len for record in done)
    num_output = sum(record.output_len for record in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": _count_good(done, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": peak_throughput(done, begin),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for name in metrics:
        result |= _describe(name, _values(name, done), percentiles)
    return result | _details(records, begin)


def _details(records: Sequence[StreamRecord], begin: float) -> dict[str, Any]:
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [record.output_len for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itls for record in records],
        "start_times": [record.start - begin for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }


def _values(name: str, done: Sequence[StreamRecord]) -> list[float]:
    if name == "ttft":
        return [record.ttft for record in done]
    if name == "tpot":
        return [record.tpot for record in done if record.output_len > 1]
    if name == "itl":
        return [itl for record in done for itl in record.itls]
    return [record.latency for record in done]


def _describe(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = np.asarray(seconds or [0.0]) * 1e3
    result = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    for percentile in percentiles:
        result[f"p{percentile:g}_{name}_ms"] = float(np.percentile(values, percentile))
    return result


def _count_good(done: Sequence[StreamRecord], limits: Mapping[str, float] | None) -> int:
    def is_good(record: StreamRecord) -> bool:
        values = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}
        return all(values[name] * 1e3 <= limit for name, limit in (limits or {}).items())

    return sum(map(is_good, done))


def peak_throughput(done: Sequence[StreamRecord], begin: float) -> float:
    """Most output tokens in any second, counted from the beginning of the run."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for record in done:
        if record.chunk_times:
            per_chunk = record.output_len / len(record.chunk_times)
            for moment in record.chunk_times:
                seconds[math.floor(moment - begin)] += per_chunk
    return max(seconds.values(), default=0.0)


def peak_concurrency(done: Sequence[StreamRecord]) -> int:
    """Most requests that were open at the same moment."""
    # At one moment an end sorts before a beginning: these two requests were never open together.
    changes = sorted(
        change for record in done for change in ((record.start, 1), (record.start + record.latency, -1))
    )
    num_open = most = 0
    for _, change in changes:
        num_open += change
        most = max(most, num_open)
    return most


# --- the report ------------------------------------------------------------------------------------


def format_report(
    result: Mapping[str, Any],
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    max_concurrency: int | None = None,
    request_rate: float = math.inf,
) -> str:
    """Format the figures of `summarize` as people and scripts read them."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += _head(result, max_concurrency, request_rate)
    for name in metrics:
        lines += _section(name, result, percentiles)
    return "\n".join([*lines, "=" * WIDTH])


def _head(result: Mapping[str, Any], max_concurrency: int | None, request_rate: float) -> Iterator[str]:
    yield _line("Successful requests:", result["completed"])
    yield _line("Failed requests:", result["failed"])
    if max_concurrency is not None:
        yield _line("Maximum request concurrency:", max_concurrency)
    if not math.isinf(request_rate):
        yield _line("Request rate configured (RPS):", request_rate)
    yield _line("Benchmark duration (s):", result["duration"])
    yield _line("Total input tokens:", result["total_input_tokens"])
    yield _line("Total generated tokens:", result["total_output_tokens"])
    yield _line("Request throughput (req/s):", result["request_throughput"])
    if result["request_goodput"] is not None:
        yield _line("Request goodput (req/s):", result["request_goodput"])
    yield _line("Output token throughput (tok/s):", result["output_throughput"])
    yield _line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield _line("Peak concurrent requests:", float(result["max_concurrent_requests"]))
    yield _line("Total token throughput (tok/s):", result["total_token_throughput"])


def _section(name: str, result: Mapping[str, Any], percentiles: Sequence[float]) -> Iterator[str]:
    short, title = METRICS[name]
    yield f"{title:-^{WIDTH}}"
    yield _line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
    yield _line(f"Median {short} (ms):", result[f"median_{name}_ms"])
    for percentile in percentiles:
        yield _line(f"P{percentile:g} {short} (ms):", result[f"p{percentile:g}_{name}_ms"])


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"
