"""One load at several rates, and what becomes of the results: reports, files and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.bench.plots import check_plot, plot_distributions, plot_rates, plot_timeline
from core.bench.progress import warn
from core.bench.results import write_json
from core.bench.serving import BUSY_SHARE, file_name, run_load, without_details
from core.bench.serving_report import format_report
from core.bench.workloads import shift
from core.errors import CytheraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from core.bench.serving import Load
    from core.bench.workloads import BenchRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """Which rates are run, which figures are wanted, and where they go."""

    rates: Sequence[float]
    metrics: Sequence[str]
    percentiles: Sequence[float]
    goodput: Mapping[str, float] = field(default_factory=dict)
    is_saved: bool = False
    is_detailed: bool = False
    folder: Path = Path()
    file_name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    plot: Path | None = None
    has_timeline: bool = False

    def check(self) -> None:
        """Raise before anything runs if a result could not be kept.

        :raises ConfigError: a picture cannot be made.
        """
        check_plot(self.plot)
        if self.has_timeline:
            check_plot(Path("timeline.png"), "--plot-timeline")

    def run(
        self, load: Load, requests: Sequence[BenchRequest], tell: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """Run each rate, and tell, write and draw the results.

        Lengths are the same at each rate, but token ids are not: a server that caches prefixes would
        find those of the rate before.

        :param tell: receives each report.
        :return: the results, with their lists.
        :raises CytheraError: a load cannot be run, or no request of it succeeded.
        """
        results = []
        for number, rate in enumerate(self.rates):
            result = run_load(
                load,
                shift(requests, number, load.vocab_size),
                rate,
                goodput=self.goodput,
                metrics=self.metrics,
                percentiles=self.percentiles,
            )
            results.append(result)
            tell(self._format(load, rate, result))
            self._complain(result)
            self._keep(result)
        if self.plot is not None:
            self._draw(self.plot, load, results)
        if not any(result["completed"] for result in results):
            raise CytheraError(f"every request failed: {_first_error(results[0])}")
        return results

    def _format(self, load: Load, rate: float, result: Mapping[str, Any]) -> str:
        return format_report(
            result,
            metrics=self.metrics,
            percentiles=self.percentiles,
            max_concurrency=load.max_concurrency,
            request_rate=rate,
        )

    def _complain(self, result: Mapping[str, Any]) -> None:
        if result["failed"]:
            warn(f"{result['failed']} requests failed, the first one: {_first_error(result)}")
        if (share := result["client_cpu_share"]) > BUSY_SHARE:
            warn(
                f"this client needed {share:.0%} of a core, so it may have been the bottleneck; split "
                f"the load over several"
            )

    def _keep(self, result: Mapping[str, Any]) -> None:
        file = self._file_of(result)
        if self.is_saved:
            kept = result if self.is_detailed else without_details(result)
            write_json(file, {**kept, "label": self.label or None, **self.metadata})
        if self.has_timeline:
            plot_timeline(file.with_suffix(".timeline.png"), result, _title(result))

    def _file_of(self, result: Mapping[str, Any]) -> Path:
        """Name the file of one rate; a name that the user gave gets the rate where there are several."""
        if self.file_name is None:
            return self.folder / file_name(result, self.label)
        file = self.folder / self.file_name
        if len(self.rates) == 1:
            return file
        return file.with_name(f"{file.stem}-{result['request_rate']}qps{file.suffix}")

    def _draw(self, file: Path, load: Load, results: Sequence[Mapping[str, Any]]) -> None:
        if len(results) == 1:
            plot_distributions(file, results[0], _title(results[0]))
        elif self.metrics:
            title = f"{load.model}: {results[0]['num_prompts']} requests at each rate"
            plot_rates(file, results, self.percentiles, title)


def _title(result: Mapping[str, Any]) -> str:
    return (
        f"{result['model_id']}: {result['num_prompts']} requests, {result['request_rate']} a second, "
        f"{result['output_throughput']:.0f} output tokens a second"
    )


def _first_error(result: Mapping[str, Any]) -> str:
    return next((error for error in result["errors"] if error), "")
