"""A bar on standard error while something is measured; nothing where nobody watches."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def show_progress(what: str, total: int, *, is_shown: bool = True) -> Iterator[Callable[[], None]]:
    """Show how far a measurement is.

    :param what: is measured.
    :param total: how many parts it has.
    :return: to be called when a part is done.
    """
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (is_shown and console.is_terminal),
    )
    with progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def warn(text: str) -> None:
    """Write one line to standard error."""
    Console(stderr=True, markup=False, highlight=False, emoji=False).print(text, soft_wrap=True)
