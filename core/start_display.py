"""What the person who starts a server sees: one screen, with one line that moves."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import core
from core.status import Phase

if TYPE_CHECKING:
    from types import TracebackType

    from core.config import EngineConfig
    from core.service import Service
    from core.status import Status

PIPE_WIDTH: Final = 120
"""Columns when nobody watches."""
LABELS: Final = {
    Phase.STARTING: "Starting",
    Phase.LOADING: "Loading weights",
    Phase.PROFILING: "Measuring memory",
    Phase.WARMING: "Warming up",
}


class StartDisplay:
    """Writes to standard error: logs come there too, and output stays clean."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._begin = time.monotonic()
        width = None if sys.stderr.isatty() else PIPE_WIDTH
        self._console = Console(stderr=True, width=width, markup=False, highlight=False, emoji=False)
        self._is_quiet = config.log_format == "json"
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[percent]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=self._is_quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task(LABELS[Phase.STARTING], total=None, percent="")
        self._phase = Phase.STARTING

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

    def say(self, text: str) -> None:
        """Write one line."""
        if not self._is_quiet:
            self._console.print(text, soft_wrap=True)

    def show_plugins(self, service: Service) -> None:
        """Say what is about to be served, and which plugins are active and why."""
        self.say(f"cythera {core.__version__} · {service.model_names[0]}")
        rows = [(plugin.name, plugin.reason) for plugin in service.active.selected]
        self._print_table(rows)

    def show_status(self, status: Status) -> None:
        """Move the line."""
        if status.phase not in LABELS:
            self._progress.stop()
            return
        if self._phase != status.phase and not self._console.is_terminal:
            self.say(f"{LABELS[status.phase]} …")
        self._phase = status.phase
        self._progress.update(
            self._task,
            description=LABELS[status.phase],
            total=status.total or None,
            completed=status.done,
            percent=f"{status.percent} %" if status.total else "",
        )

    def show_ready(self, service: Service, url: str) -> None:
        """Say where the server is, what it can do, and how to try it."""
        self._progress.stop()
        plan, limits = service.plan, service.limits
        if plan is None:
            return
        concurrency = limits.max_kv_tokens / limits.max_model_len
        facts = [
            ("family", plan.model.model_type),
            ("dtype", plan.dtype),
            ("device", plan.device),
            ("context", f"{limits.max_model_len} tokens"),
            ("KV cache", f"{limits.max_kv_tokens} tokens, {concurrency:.1f} requests of full length"),
            ("API key", "needed" if self._config.api_key else "none needed"),
            *(("", line) for line in service.active.host.report_header(plan)),
            ("URL", url),
        ]
        self._print_table(facts)
        key = '-H "Authorization: Bearer $CYTHERA_API_KEY" ' if self._config.api_key else ""
        self.say(f"Ready in {time.monotonic() - self._begin:.1f} s. Try it:")
        self.say(
            f"  curl {url}/v1/completions {key}-H 'Content-Type: application/json' "
            f'-d \'{{"model": "{service.model_names[0]}", "prompt": "Hello", "max_tokens": 16}}\''
        )

    def _print_table(self, rows: list[tuple[str, str]]) -> None:
        if self._is_quiet:
            return
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(style="bold" if self._console.is_terminal else "")
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
