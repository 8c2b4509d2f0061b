"""What was measured of a step, and the table that shows it beside what the card can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from core.bench.trace import KernelTotal, busy_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core.bench.ceilings import Ceilings
    from core.bench.power import Power
    from core.bench.step_work import Work

MAX_ROWS: Final = 24
"""Kernels that a table shows; the others are in the file of results."""


@dataclass(frozen=True, slots=True)
class Group:
    """All kernels of one kind, and what they had to do per step."""

    name: str
    microseconds: float
    """Per step."""
    work: Work

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain data: rates, and shares of what the card can do."""
        seconds = self.microseconds / 1e6
        rates = (
            (self.work.num_bytes / seconds, self.work.num_flops / seconds) if seconds else (0.0, 0.0)
        )
        return {
            "name": self.name,
            "us_per_step": self.microseconds,
            "bytes": self.work.num_bytes,
            "flops": self.work.num_flops,
            "bytes_per_second": rates[0],
            "flops_per_second": rates[1],
            "share_of_bandwidth": rates[0] / ceilings.bytes_per_second,
            "share_of_flops": rates[1] / ceilings.flops,
        }


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Steps of one shape."""

    what: str
    num_steps: int
    wall_us: float
    """Per step, without the profiler."""
    kernels: list[KernelTotal]
    """Of all profiled steps together, the longest first."""
    groups: list[Group] = field(default_factory=list)
    power: Power | None = None
    """Of the steps that were run without the profiler, if the card tells."""

    @property
    def busy_us(self) -> float:
        """µs per step in which the GPU did something."""
        return busy_time(self.kernels) / self.num_steps

    @property
    def idle_us(self) -> float:
        """µs per step in which it did nothing."""
        return max(0.0, self.wall_us - self.busy_us)

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain data for a file of results."""
        return {
            "step": self.what,
            "num_steps": self.num_steps,
            "wall_us": self.wall_us,
            "busy_us": self.busy_us,
            "idle_us": self.idle_us,
            "power": None if self.power is None else self.power.to_dict(),
            "groups": [group.to_dict(ceilings) for group in self.groups],
            "kernels": [
                {
                    "name": kernel.name,
                    "per_step": kernel.count / self.num_steps,
                    "us_per_step": kernel.microseconds / self.num_steps,
                }
                for kernel in self.kernels
            ],
        }


def report(ceilings: Ceilings, profiles: Sequence[StepProfile]) -> str:
    """Format a table for each step, with what the card can do above them."""
    return "\n".join(_lines(ceilings, profiles))


def _lines(ceilings: Ceilings, profiles: Sequence[StepProfile]) -> Iterator[str]:
    yield (
        f"{ceilings.name}: read {ceilings.read_bytes_per_second / 1e12:.2f} TB/s, "
        f"copy {ceilings.copy_bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 product {ceilings.flops / 1e12:.0f} TFLOP/s"
    )
    for profile in profiles:
        yield ""
        yield f"{profile.what}: {profile.wall_us:.1f} µs a step, mean of {profile.num_steps}"
        if profile.power is not None:
            yield f"  {profile.power}"
        yield f"  {'kernel':<56} {'per step':>9} {'µs':>9} {'share':>6}"
        for kernel in profile.kernels[:MAX_ROWS]:
            microseconds = kernel.microseconds / profile.num_steps
            count = kernel.count / profile.num_steps
            yield _row(kernel.name, f"{count:.4g}", microseconds, profile.wall_us)
        rest = profile.kernels[MAX_ROWS:]
        if rest:
            microseconds = busy_time(rest) / profile.num_steps
            yield _row(f"({len(rest)} more)", "", microseconds, profile.wall_us)
        yield _row("(idle)", "", profile.idle_us, profile.wall_us)
        for group in profile.groups:
            yield _group_line(group, ceilings, profile.wall_us)


def _row(name: str, count: str, microseconds: float, wall: float) -> str:
    return f"  {name:<56} {count:>9} {microseconds:>9.1f} {microseconds / wall:>6.1%}"


def _group_line(group: Group, ceilings: Ceilings, wall: float) -> str:
    start = f"  {group.name:<10} {group.microseconds:>9.1f} µs {group.microseconds / wall:>6.1%}"
    if not group.work.num_bytes or not group.microseconds:
        return start
    figures = group.to_dict(ceilings)
    return (
        f"{start}  {figures['bytes_per_second'] / 1e12:.2f} TB/s ({figures['share_of_bandwidth']:.0%}), "
        f"{figures['flops_per_second'] / 1e12:.1f} TFLOP/s ({figures['share_of_flops']:.0%})"
    )
