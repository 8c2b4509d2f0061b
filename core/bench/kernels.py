"""`python -m core bench kernels`: where the time of a step goes on a GPU, and what a better kernel could win.

A step is run as the engine runs it, graphs included, and profiled with CUPTI.  Bytes and multiplications
are known from the model, not measured: each step has to read every matrix once, and decoding every cached
key and value once.  They are put beside what this very card does with a large copy and a large product.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from core.assemble import build_engine, resolve
from core.bench.ceilings import measure_ceilings
from core.bench.offline import adapt_to_batch
from core.bench.power import PowerMeter
from core.bench.step_profile import Group, StepProfile
from core.bench.step_work import Work, attention_work, count_prefill_steps, linear_work
from core.bench.trace import KernelTotal, add_up, read_spans
from core.bench.workloads import VOCAB_SIZE, uniform
from core.errors import ConfigError, CytheraError
from core.messages import Finish, Submit
from core.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from core.bench.ceilings import Ceilings
    from core.bench.power import Power
    from core.config import EngineConfig
    from core.engine import EngineCore
    from core.messages import OutputBatch
    from core.plan import Plan

ATTENTION_KERNELS: Final = r"attn|attention|flash|fmha|mha_|^decode|^prefill"
LINEAR_KERNELS: Final = (
    r"gemm|gemv|nvjet|matmul|linear|cutlass|cublas|splitk|^vector_kernel|^gate_hopper|marlin|_mm_"
)
"""Names of kernels of the built-in plugins and of the libraries that they call."""
NUM_WARM_STEPS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """Which steps are run."""

    batch_sizes: tuple[int, ...] = (1, 64)
    context_len: int = 512
    prefill_len: int = 2048
    """Tokens of the prompt of a prefill step; 0: none is run."""
    num_steps: int = 20
    attention_kernels: str = ATTENTION_KERNELS
    linear_kernels: str = LINEAR_KERNELS

    def check(self) -> None:
        """Raise unless they can be run.

        :raises ConfigError: a number is too small, or an expression is none.
        """
        least = {"context_len": 1, "prefill_len": 0, "num_steps": 1}
        for name, limit in least.items():
            if (value := getattr(self, name)) < limit:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {limit}")
        for name in ("attention_kernels", "linear_kernels"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(f"--{name.replace('_', '-')} is no expression: {error}") from error


def measure(
    config: EngineConfig, options: KernelOptions, *, trace: Path | None = None
) -> tuple[Ceilings, list[StepProfile]]:
    """Profile decode steps of each batch size, then a prefill step.

    :param trace: folder that gets the traces themselves, for a viewer.
    :raises CytheraError: there is no GPU, or the engine does not run on one alone.
    """
    options.check()
    if not torch.cuda.is_available():
        raise CytheraError(
            "bench kernels looks at what runs on a GPU, and torch finds none here; bench latency "
            "measures on any device"
        )
    assembly = resolve(adapt_to_batch(config, max(options.batch_sizes)))
    plan = assembly.plan
    if not plan.device.startswith("cuda") or plan.world_size > 1:
        raise ConfigError(
            f"bench kernels profiles one GPU in its own process, but this plan has {plan.world_size} "
            f"ranks on {plan.device}; use --device cuda, and no tensor or pipeline parallelism"
        )
    ceilings = measure_ceilings(torch.device(plan.device))
    outputs = _Outputs()
    engine = build_engine(assembly, outputs.take)
    try:
        engine.prepare()
        bench = _StepBench(engine, plan, outputs, options, trace)
        profiles = [bench.profile_decode(size) for size in options.batch_sizes]
        if options.prefill_len:
            profiles.append(bench.profile_prefill())
    finally:
        engine.close()
    return ceilings, profiles


class Measured(NamedTuple):
    """What was measured of some steps."""

    wall_us: float
    """Per step."""
    kernels: list[KernelTotal]
    """Of all profiled steps."""
    power: Power | None


class _Outputs:
    """Receives what an engine gives, and counts the tokens of each request."""

    def __init__(self) -> None:
        self.num_tokens: Counter[str] = Counter()
        self.errors: list[str] = []

    def take(self, batch: OutputBatch) -> None:
        self.num_tokens.update(batch.request_ids)
        self.errors += [ended.error for ended in batch.ended if ended.error]

    def check(self) -> None:
        if self.errors:
            raise CytheraError(f"a request of the benchmark failed: {self.errors[0]}")


class _StepBench:
    """Brings an engine into a steady state and looks at its steps."""

    def __init__(
        self,
        engine: EngineCore,
        plan: Plan,
        outputs: _Outputs,
        options: KernelOptions,
        trace: Path | None,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._outputs = outputs
        self._options = options
        self._trace = trace
        self._limits = plan.limits(engine.kv_cache.num_blocks)
        self._num_requests = 0

    def profile_decode(self, batch_size: int) -> StepProfile:
        options = self._options
        budget = self._plan.config.max_num_batched_tokens
        # Each of two runs takes these steps, and at most one more is in flight behind it; the first
        # requests decode already while the last ones are still in their prompts.
        num_tokens = NUM_WARM_STEPS + 2 * (options.num_steps + 2)
        num_tokens += count_prefill_steps(batch_size, options.context_len, budget) + 8
        self._check_fit(batch_size, options.context_len + num_tokens)
        ids = self._submit(batch_size, options.context_len, num_tokens)
        while not all(self._outputs.num_tokens[request_id] for request_id in ids):
            self._step()
        for _ in range(NUM_WARM_STEPS):
            self._step()
        measured = self._time_and_profile(f"decode-{batch_size}", self._step)
        back = options.num_steps // 2  # to the middle of the steps that were profiled
        lengths = [options.context_len + self._outputs.num_tokens[name] - back for name in ids]
        for request_id in ids:
            self._engine.send(Finish(request_id))
        self._drain()
        linear = linear_work(self._plan, batch_size, batch_size)
        attention = attention_work(self._plan, [(length, 1) for length in lengths])
        what = f"decode, batch {batch_size}, mean context {sum(lengths) / batch_size:.0f}"
        return self._make_profile(what, measured, linear, attention)

    def profile_prefill(self) -> StepProfile:
        options, budget = self._options, self._plan.config.max_num_batched_tokens
        length = min(options.prefill_len, budget, self._limits.max_model_len - 1)

        def run() -> None:
            self._submit(1, length, 1)
            self._drain()

        for _ in range(3):
            run()
        measured = self._time_and_profile(f"prefill-{length}", run)
        linear = linear_work(self._plan, length, 1)
        attention = attention_work(self._plan, [(0, length)])
        what = f"prefill, 1 prompt of {length} tokens"
        return self._make_profile(what, measured, linear, attention)

    def _make_profile(
        self, what: str, measured: Measured, linear: Work, attention: Work
    ) -> StepProfile:
        num_steps = self._options.num_steps
        groups = make_groups(self._options, measured.kernels, num_steps, linear, attention)
        return StepProfile(what, num_steps, measured.wall_us, measured.kernels, groups, measured.power)

    def _check_fit(self, batch_size: int, length: int) -> None:
        """Raise unless the cache holds a whole batch, or requests would have to wait for one another.

        :raises ConfigError: the sequences are too long, or too many.
        """
        limits, block_size = self._limits, self._plan.block_size
        if length > limits.max_model_len:
            raise ConfigError(
                f"--context-len {self._options.context_len} and the steps that are measured make "
                f"{length} tokens, but a sequence has at most {limits.max_model_len} (--max-model-len)"
            )
        needed = batch_size * -(-length // block_size) * block_size
        if needed > limits.max_kv_tokens:
            raise ConfigError(
                f"a batch of {batch_size} sequences of {length} tokens needs a KV cache of {needed} "
                f"tokens, but it has {limits.max_kv_tokens}; lower --batch-size or --context-len"
            )

    def _time_and_profile(self, what: str, run: Any) -> Measured:
        """Run steps twice: once by the clock, since profiling slows the host, and once profiled."""
        num_steps = self._options.num_steps
        torch.cuda.synchronize()
        with PowerMeter(torch.device(self._plan.device)) as meter:
            begin = time.perf_counter()
            for _ in range(num_steps):
                run()
            torch.cuda.synchronize()
            wall = (time.perf_counter() - begin) / num_steps * 1e6
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(num_steps):
                run()
            torch.cuda.synchronize()
        self._outputs.check()
        kernels = add_up(read_spans(self._export(profiler, what)))
        if not kernels:
            raise CytheraError(
                "the profiler has seen no kernel; another one may hold the counters (CUPTI)"
            )
        return Measured(wall, kernels, meter.power)

    def _export(self, profiler: torch.profiler.profile, what: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as own:
            folder = self._trace or Path(own)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{what}.json"
            profiler.export_chrome_trace(str(file))
            trace: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return trace

    def _submit(self, count: int, input_len: int, output_len: int) -> list[str]:
        self._num_requests += count
        vocab_size = min(VOCAB_SIZE, self._plan.model.vocab_size)
        requests = uniform(count, input_len, output_len, vocab_size=vocab_size)
        ids = [f"bench-{self._num_requests}-{index}" for index in range(count)]
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        for index, (request_id, request) in enumerate(zip(ids, requests, strict=True)):
            prompt = [int(token) for token in request.prompt]
            now = time.monotonic()
            self._engine.send(
                Submit(request_id, prompt, params, output_len, [], index, arrival_time=now)
            )
        return ids

    def _step(self) -> None:
        self._engine.step()
        self._outputs.check()

    def _drain(self) -> None:
        while self._engine.has_work:
            self._engine.step()
        self._outputs.check()


def make_groups(
    options: KernelOptions,
    kernels: Sequence[KernelTotal],
    num_steps: int,
    linear: Work,
    attention: Work,
) -> list[Group]:
    """Put each kernel into the group that its name tells; attention first, which also multiplies."""
    times = {"attention": 0.0, "linear": 0.0, "other": 0.0}
    for kernel in kernels:
        if re.search(options.attention_kernels, kernel.name, re.IGNORECASE):
            name = "attention"
        elif re.search(options.linear_kernels, kernel.name, re.IGNORECASE):
            name = "linear"
        else:
            name = "other"
        times[name] += kernel.microseconds / num_steps
    works = {"attention": attention, "linear": linear, "other": Work(0, 0)}
    return [Group(name, times[name], works[name]) for name in ("linear", "attention", "other")]


def to_dict(
    options: KernelOptions, ceilings: Ceilings, profiles: Sequence[StepProfile]
) -> dict[str, Any]:
    """Plain data for a file of results."""
    return {
        "options": asdict(options),
        "ceilings": asdict(ceilings),
        "steps": [profile.to_dict(ceilings) for profile in profiles],
    }
