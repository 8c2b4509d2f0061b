"""Pictures of what was measured; needs matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

from core.bench.serving_report import METRICS
from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = (".png", ".svg", ".pdf")
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which everybody can tell apart."""
PREFILL_COLOR: Final = "#bdbdbd"
WIDTH: Final = 9.0
MAX_TICKS: Final = 9


def check_plot(file: Path | None, flag: str = "--plot") -> None:
    """Raise before anything is measured if a picture could not be made afterwards.

    :param flag: named in messages.
    :raises ConfigError: the format is unknown, or matplotlib is not installed.
    """
    if file is None:
        return
    if file.suffix.lower() not in FORMATS:
        raise ConfigError(f"{flag} {file} must end with one of {', '.join(FORMATS)}")
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415  an extra, and slow to import
    except ImportError as error:
        raise ConfigError(f"{flag} needs matplotlib: pip install cythera[bench]") from error


def plot_batches(file: Path, runs: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw throughput, and time per token and to the first one, over the batch size.

    :param runs: figures of `bench latency`, one for each batch size.
    """
    runs = sorted(runs, key=lambda run: run["batch_size"])
    sizes = [run["batch_size"] for run in runs]
    figure, (left, right) = _make_figure(2, title)
    rates = [run["output_tokens_per_second"] for run in runs]
    left.plot(sizes, rates, marker="o", color=COLORS[0])
    left.set_ylim(bottom=0)
    _label(left, "batch size", "output tokens per second", "Throughput")
    lines = (("ms_per_output_token", "per output token"), ("ms_to_first_token", "to first token"))
    for (key, name), color in zip(lines, COLORS, strict=False):
        points = [(run["batch_size"], run[key]) for run in runs if run[key] is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    _label(right, "batch size", "ms", "Latency")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        _set_ticks(axes, sizes)
    _save(figure, file)


def plot_rates(
    file: Path, results: Sequence[Mapping[str, Any]], percentiles: Sequence[float], title: str
) -> None:
    """Draw percentiles of each latency over the request rate.

    :param results: of `run_load`, one for each rate.
    """
    results = sorted(results, key=lambda result: float(result["request_rate"]))
    names = [name for name in METRICS if f"mean_{name}_ms" in results[0]]
    # An infinite rate has its place behind the last finite one.
    places = list(range(len(results)))
    figure, all_axes = _make_figure(len(names), title)
    for axes, name in zip(all_axes, names, strict=True):
        lines = [("median", f"median_{name}_ms")]
        lines += [(f"P{p:g}", f"p{p:g}_{name}_ms") for p in percentiles if p != 50]
        for (label, key), color in zip(lines, itertools.cycle(COLORS), strict=False):
            values = [result[key] for result in results]
            axes.plot(places, values, marker="o", color=color, label=label)
        axes.set_ylim(bottom=0)
        axes.set_xticks(places, [f"{float(result['request_rate']):g}" for result in results])
        _label(axes, "requests per second", "ms", METRICS[name][1])
    all_axes[0].legend(frameon=False)
    _save(figure, file)


def plot_distributions(file: Path, result: Mapping[str, Any], title: str) -> None:
    """Draw the share of requests that are as fast, over each latency.

    :param result: of `run_load`, with its lists.
    """
    itls, ttfts, lens = result["itls"], result["ttfts"], result["output_lens"]
    good = [index for index, error in enumerate(result["errors"]) if not error]
    values = {
        "ttft": [ttfts[i] for i in good],
        "tpot": [sum(itls[i]) / (lens[i] - 1) for i in good if lens[i] > 1],
        "itl": [itl for i in good for itl in itls[i]],
        "e2el": [ttfts[i] + sum(itls[i]) for i in good],
    }
    figure, all_axes = _make_figure(len(values), title)
    for axes, (name, seconds) in zip(all_axes, values.items(), strict=True):
        points = [0.0, *sorted(second * 1e3 for second in seconds)]
        shares = [index / max(1, len(seconds)) for index in range(len(points))]
        axes.step(points, shares, where="post", color=COLORS[0])
        axes.set_ylim(0, 1.02)
        axes.set_xlim(left=0)
        _label(axes, "ms", "share at most as long", METRICS[name][1])
    _save(figure, file)


def plot_timeline(file: Path, result: Mapping[str, Any], title: str) -> None:
    """Draw each request as a line from its start to its end, the wait for its first token in grey.

    :param result: of `run_load`, with its lists.
    """
    rows = [
        (start, start + ttft, start + ttft + sum(itls), error)
        for start, ttft, itls, error in zip(
            result["start_times"], result["ttfts"], result["itls"], result["errors"], strict=True
        )
    ]
    rows.sort()
    figure, (axes,) = _make_figure(1, title, height=min(12.0, max(3.0, 0.03 * len(rows) + 1.5)))
    kinds = (
        (
            "to first token",
            PREFILL_COLOR,
            [(i, a, b) for i, (a, b, _, error) in enumerate(rows) if not error],
        ),
        ("tokens", COLORS[0], [(i, b, c) for i, (_, b, c, error) in enumerate(rows) if not error]),
    )
    for label, color, spans in kinds:
        if spans:
            numbers, begins, ends = zip(*spans, strict=True)
            axes.hlines(
                numbers, begins, ends, colors=color, label=label, linewidth=_line_width(len(rows))
            )
    failed = [(start, number) for number, (start, _, _, error) in enumerate(rows) if error]
    if failed:
        axes.scatter(*zip(*failed, strict=True), marker="x", color=COLORS[1], label="failed")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _label(axes, "seconds", "requests by start", "")
    if rows:
        axes.legend(frameon=False, loc="upper right")
    _save(figure, file)


def _line_width(num_rows: int) -> float:
    return max(0.4, min(6.0, 250.0 / max(1, num_rows)))


def _make_figure(
    num_axes: int, title: str, *, height: float | None = None
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and slow to import

    num_columns = min(2, num_axes)
    num_rows = math.ceil(num_axes / num_columns)
    figure = Figure(figsize=(WIDTH, height or 3.2 * num_rows + 0.5), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten().tolist()
    for axes in all_axes[num_axes:]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    return figure, all_axes[:num_axes]


def _label(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(b=True)
    axes.spines[["top", "right"]].set_visible(b=False)


def _set_ticks(axes: Axes, sizes: Sequence[int]) -> None:
    """Name the sizes that were measured, unless there are too many to read."""
    step = math.ceil(len(sizes) / MAX_TICKS)
    axes.set_xticks(list(sizes)[::step], [str(size) for size in sizes[::step]])
    axes.minorticks_off()


def _save(figure: Figure, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
