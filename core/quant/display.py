"""What the person who quantizes sees: a bar that moves while layers are done, and the report."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from core.quant.report import LayerReport, Report

PIPE_WIDTH: Final = 120
"""Columns when nobody watches."""


def make_console(*, stderr: bool = False) -> Console:
    """Make a console that wraps nothing where nobody watches."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


class QuantizeDisplay:
    """Writes progress to standard error: a bar on a terminal, else a line for each layer."""

    def __init__(self) -> None:
        self._console = make_console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[error]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("Layers", total=None, error="")
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show_layer(self, layer: LayerReport, num_layers: int) -> None:
        """Move on by one layer."""
        done, error = layer.index + 1, f"error {layer.error:.3%}"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, total=num_layers, error=error)
            return
        per_layer = (time.monotonic() - self._begin) / done
        left = per_layer * (num_layers - done)
        self._console.print(
            f"layer {done} of {num_layers}: {error}, {layer.seconds:.1f} s, about {left:.0f} s left",
            soft_wrap=True,
        )


def print_report(console: Console, report: Report) -> None:
    """Write the errors of all layers, the sizes, and what the text says."""
    names = list(dict.fromkeys(name for layer in report.layers for name in layer.linears))
    table = Table(box=None, padding=(0, 2, 0, 0), title="relative output errors", title_justify="left")
    for name in ("layer", *names, "stream"):
        table.add_column(name, justify="right")
    for layer in report.layers:
        cells = [f"{layer.linears[name]:.3%}" if name in layer.linears else "-" for name in names]
        table.add_row(str(layer.index), *cells, f"{layer.error:.3%}")
    console.print(table)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in _facts(report):
        facts.add_row(*row)
    console.print(facts)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "calibration", f"{report.num_calibration_tokens} tokens"
    yield "bits per weight", f"{report.bits_per_weight:.2f}"
    share = report.bytes_after / report.bytes_before
    yield "size", f"{report.bytes_before} -> {report.bytes_after} bytes ({share:.1%})"
    quality = report.quality
    if quality is None:
        yield "perplexity", "not measured: none was wanted, or no text was left; see --eval"
        return
    change = quality.after / quality.before - 1
    yield "perplexity", f"{quality.before:.4f} -> {quality.after:.4f} ({change:+.2%})"
    yield "same best token", f"{quality.agreement:.2%} of {quality.num_tokens} tokens"
    yield "measured on", quality.text
