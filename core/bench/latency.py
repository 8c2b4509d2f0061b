"""`python -m core bench latency`: how long a batch takes in which all requests start together.

Beside the time of the whole batch it gives the two times that a user notices: to the first token, and
per token after it.  The latter is a difference, so that nothing that happens once per batch is in it:
(t(output_len) - t(short)) / (output_len - short), each t the best run of as many.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from core.bench.offline import PERCENTILES, adapt_to_batch, generate, vocab_size_of
from core.bench.progress import show_progress
from core.bench.workloads import uniform
from core.errors import ConfigError
from core.llm import LLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from core.config import EngineConfig

MAX_SHORT_LEN: Final = 17
"""Output length of the short runs, unless half the length is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """What is run, and how often."""

    input_len: int = 32
    output_len: int = 128
    batch_sizes: tuple[int, ...] = (8,)
    num_iters_warmup: int = 10
    num_iters: int = 30
    seed: int = 0

    def check(self) -> None:
        """Raise unless it can be run.

        :raises ConfigError: a number is too small.
        """
        least = {"input_len": 1, "output_len": 1, "num_iters": 1, "num_iters_warmup": 0}
        for name, limit in least.items():
            if (value := getattr(self, name)) < limit:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {limit}")

    @property
    def short_len(self) -> int:
        """Output length of the runs that are subtracted."""
        return min(MAX_SHORT_LEN, max(1, self.output_len // 2))


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """Times of one batch size, in seconds, a run each."""

    options: LatencyOptions
    batch_size: int
    latencies: list[float]
    """Of all tokens."""
    short_latencies: list[float]
    """Of `short_len` tokens each."""
    first_latencies: list[float]
    """Of one token each."""

    @property
    def seconds_per_token(self) -> float | None:
        """Time from token to token of each request; `None` if there is one token only."""
        num_tokens = self.options.output_len - self.options.short_len
        if num_tokens == 0:
            return None
        return (min(self.latencies) - min(self.short_latencies)) / num_tokens

    @property
    def seconds_to_first(self) -> float:
        """Median time until all requests have their first token."""
        return float(np.median(self.first_latencies))

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second, by the mean latency."""
        return self.batch_size * self.options.output_len / float(np.mean(self.latencies))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file of results."""
        per_token = self.seconds_per_token
        return {
            "batch_size": self.batch_size,
            "avg_latency": float(np.mean(self.latencies)),
            "latencies": self.latencies,
            "percentiles": {
                str(percentile): float(np.percentile(self.latencies, percentile))
                for percentile in PERCENTILES
            },
            "short_output_len": self.options.short_len,
            "short_latencies": self.short_latencies,
            "first_token_latencies": self.first_latencies,
            "ms_to_first_token": self.seconds_to_first * 1e3,
            "ms_per_output_token": None if per_token is None else per_token * 1e3,
            "output_tokens_per_second": self.tokens_per_second,
        }


def measure(config: EngineConfig, options: LatencyOptions) -> list[BatchLatency]:
    """Measure each batch size with one engine.

    :raises CytheraError: the engine cannot be made, or the sizes do not fit it.
    """
    options.check()
    config = adapt_to_batch(config, max(options.batch_sizes))
    num_runs = len(options.batch_sizes) * (options.num_iters_warmup + 3 * options.num_iters)
    with LLM.from_config(config) as llm, show_progress("runs", num_runs) as advance:
        return [_measure_batch(llm, options, size, advance) for size in options.batch_sizes]


def _measure_batch(
    llm: LLM, options: LatencyOptions, batch_size: int, advance: Callable[[], None]
) -> BatchLatency:
    def run(output_len: int) -> float:
        requests = uniform(
            batch_size,
            options.input_len,
            output_len,
            vocab_size=vocab_size_of(llm),
            seed=options.seed,
        )
        begin = time.perf_counter()
        generate(llm, requests)
        seconds = time.perf_counter() - begin
        advance()
        return seconds

    for _ in range(options.num_iters_warmup):
        run(options.output_len)
    # Interleaved, so that a change of the device's clock does not look like a difference.
    lengths = (options.output_len, options.short_len, 1)
    rounds = [[run(length) for length in lengths] for _ in range(options.num_iters)]
    return BatchLatency(options, batch_size, *(list(times) for times in zip(*rounds, strict=True)))


def to_dict(results: Sequence[BatchLatency]) -> dict[str, Any]:
    """Plain data for a file: of one batch size its figures, of several a list of them as `runs`."""
    [*figures] = (result.to_dict() for result in results)
    options = asdict(results[0].options)
    return {**options, **figures[0]} if len(figures) == 1 else {**options, "runs": figures}


def report(results: Iterable[BatchLatency]) -> str:
    """Format the figures, a block for each batch size."""
    return "\n\n".join("\n".join(_lines(result.to_dict(), result)) for result in results)


def _lines(figures: Mapping[str, Any], result: BatchLatency) -> Iterator[str]:
    yield f"Avg latency: {figures['avg_latency']} seconds"
    for percentile, seconds in figures["percentiles"].items():
        yield f"{percentile}% percentile latency: {seconds} seconds"
    options = result.options
    size = f"batch of {result.batch_size}, {options.input_len} tokens in"
    yield f"Time to first token: {figures['ms_to_first_token']:.3f} ms ({size})"
    if figures["ms_per_output_token"] is not None:
        what = f"{size}, {options.output_len} less {options.short_len} out"
        yield f"Time per output token: {figures['ms_per_output_token']:.3f} ms ({what})"
    yield f"Output token throughput: {figures['output_tokens_per_second']:.2f} tokens/s"
