"""What ran on a GPU, read from a trace of `torch.profiler`: how often, how long, and what lay between.

A kernel may start while the one before it still runs (programmatic dependent launch) and then wait for
it.  Its time counts from the end of what began before it, so that the times of all kernels add up to the
time in which the GPU was busy, and nothing is counted twice.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GPU_CATEGORIES: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
MAX_NAME: Final = 56
FUNCTOR: Final = re.compile(
    r"(\w*[Ff]unctor\w*|\w+_kernel_impl\w*|\w+_kernel_cuda\w*|(?!ReduceOp\b)\b\w+Ops?\b)"
)
"""In the arguments of a template of torch: what the kernel does."""
GENERIC: Final = re.compile(r"elementwise|reduce_kernel|index|scatter|gather|Catarray", re.IGNORECASE)
"""Kernels whose name does not say what they do."""
COPIES: Final = ("Memcpy", "Memset")
NAMELESS: Final = "(anonymous namespace)::"


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel or copy.  Times in µs."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class KernelTotal:
    """All runs of one kernel."""

    name: str
    count: int
    microseconds: float


def read_spans(trace: Mapping[str, Any]) -> list[Span]:
    """List what ran on the GPU, from a trace as `export_chrome_trace` writes it."""
    return [
        Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace.get("traceEvents", ())
        if event.get("cat") in GPU_CATEGORIES and event.get("ph") == "X"
    ]


def add_up(spans: Iterable[Span]) -> list[KernelTotal]:
    """Add up the time that each kernel kept the GPU busy; the longest first."""
    counts: defaultdict[str, int] = defaultdict(int)
    times: defaultdict[str, float] = defaultdict(float)
    busy_until = float("-inf")
    for span in sorted(spans, key=lambda span: (span.begin, span.end)):
        name = short_name(span.name)
        counts[name] += 1
        times[name] += max(0.0, span.end - max(span.begin, busy_until))
        busy_until = max(busy_until, span.end)
    totals = [KernelTotal(name, counts[name], times[name]) for name in counts]
    return sorted(totals, key=lambda total: -total.microseconds)


def busy_time(totals: Sequence[KernelTotal]) -> float:
    """Return the µs in which the GPU did something."""
    return sum(total.microseconds for total in totals)


def short_name(name: str) -> str:
    """Cut a kernel's name down to what tells it from others."""
    plain = name.removeprefix("void ").replace(NAMELESS, "").strip()
    if plain.startswith(COPIES):
        return plain
    base, _, rest = plain.partition("<")
    base = base.partition("(")[0] or plain
    base = base.rpartition("::")[2]
    if rest and GENERIC.search(base):
        found = FUNCTOR.search(rest)
        base = f"{base}<{found[1]}>" if found else base
    if len(base) <= MAX_NAME:
        return base
    return f"{base[: MAX_NAME - 1]}…"
