"""`python -m core --plugins quant.dense tune MODEL`: measures kernels for a model on this card."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from core.config import flag_origin, load_config
from core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from core.plan import Plan
    from plugins.quant.dense.candidates import Slot
    from plugins.quant.dense.operation import KernelConfig
    from plugins.quant.dense.search import Configs, Found
    from plugins.quant.dense.table import Entry, Table
    from plugins.quant.dense.tuning import Chain

NUM_HEADS: Final = 4
"""Output projections in a chain of them: enough for one to overlap with the next."""
PIPE_WIDTH: Final = 120
"""Columns when nobody watches."""


def tune(
    model: str,
    /,
    *,
    tokens: Annotated[
        str, Parameter(help="Numbers of tokens of a step to measure, up to 1024.", metavar="N,N")
    ] = "1,2,4,8,16,32,64",
    seconds: Annotated[
        float, Parameter(help="Time for measuring; compiling kernels comes on top.", metavar="X")
    ] = 90.0,
    dtype: Annotated[str, Parameter(help="As serve takes it: auto, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure which kernels of quant.dense are fastest for a model on this card, and remember it.

    :param model: Folder of a checkpoint, or the id of one on the hub; only its config is read.
    """
    counts = parse_counts(tokens)
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g} must be above 0")
    import torch  # noqa: PLC0415  the help needs none

    if not torch.cuda.is_available():
        raise ConfigError("tune measures kernels on a GPU, and torch finds none here")
    plan = make_plan_of(model, dtype)
    from plugins.quant.dense.linear import card_of  # noqa: PLC0415  imports triton
    from plugins.quant.dense.table import tuned_file  # noqa: PLC0415  as above

    device = torch.device("cuda", torch.cuda.current_device())
    file, console = tuned_file(card_of(device)), _make_console()
    reports = tune_model(plan, counts, seconds, device, console)
    merge_entries(file, [entry for report in reports for entry in report.entries])
    show(console, reports, file)


def parse_counts(text: str) -> list[int]:
    """Read numbers of tokens.

    :raises ConfigError: one of them is none, or has no entries of its own.
    """
    from plugins.quant.dense.table import MAX_TUNED  # noqa: PLC0415  the help needs none

    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isdecimal() and 0 < int(part) <= MAX_TUNED)]
    if wrong:
        raise ConfigError(
            f"--tokens {text}: {', '.join(map(repr, wrong))} not between 1 and {MAX_TUNED}"
        )
    return sorted({int(part) for part in parts})


def make_plan_of(model: str, dtype: str) -> Plan:
    """Read the config of a model.

    :raises ConfigError: the kernels do not serve its dtype.
    """
    from core.assemble import make_plan  # noqa: PLC0415  imports torch and transformers
    from core.registry import Requirements  # noqa: PLC0415  with the above
    from plugins.quant.dense import unsupported  # noqa: PLC0415  it imports this module

    settings = {"model": model, "dtype": dtype, "device": "cuda"}
    plan = make_plan(load_config(settings, environ=os.environ, origin=flag_origin))
    reasons = unsupported(Requirements(device="cuda", dtype=plan.dtype))
    if reasons:
        raise ConfigError(f"quant.dense cannot serve {model}: {'; '.join(reasons)}; see --dtype")
    return plan


# --- measuring -------------------------------------------------------------------------------------


class Report:
    """What came of the chain of some slots for a number of tokens."""

    def __init__(self, slots: Sequence[Slot], num_tokens: int) -> None:
        self.slots = slots
        self.num_tokens = num_tokens
        self.library = self.before = self.after = 0.0
        """µs of the chain: all slots by the library, as the table had it, as it has it now."""
        self.configs: Configs = {}
        """Empty if results did not repeat, so that nothing is kept."""

    @property
    def name(self) -> str:
        """What was measured."""
        return "layers" if len(self.slots) > 1 else self.slots[0].name

    @property
    def entries(self) -> list[Entry]:
        """What the table is to learn."""
        from plugins.quant.dense.table import Entry  # noqa: PLC0415  the help needs none

        return [
            Entry(
                kind="residual" if slot.op.kind == "plain" else slot.op.kind,
                outputs=slot.op.num_outputs,
                inputs=slot.op.num_inputs,
                tokens=self.num_tokens,
                config=self.configs[slot.name],
            )
            for slot in self.slots
            if slot.name in self.configs
        ]


def tune_model(
    plan: Plan, counts: Sequence[int], seconds: float, device: torch.device, console: Console
) -> list[Report]:
    """Tune the layers, then the output projection if the model has one of its own."""
    import torch  # noqa: PLC0415  the help needs none

    from plugins.quant.dense.candidates import slots_of_head, slots_of_layer  # noqa: PLC0415  as above
    from plugins.quant.dense.linear import card_of  # noqa: PLC0415  imports triton
    from plugins.quant.dense.table import table_of  # noqa: PLC0415  as above
    from plugins.quant.dense.tuning import Chain  # noqa: PLC0415  as above

    table = table_of(card_of(device))
    dtype: torch.dtype = getattr(torch, plan.dtype)
    parts = [
        (slots_of_layer(plan.model), plan.model.num_layers),
        (slots_of_head(plan.model), NUM_HEADS),
    ]
    parts = [part for part in parts if part[0]]
    num_slots = sum(len(slots) for slots, _ in parts)
    reports = []
    with _make_progress(console) as progress, torch.inference_mode():
        task = progress.add_task("", total=len(counts) * len(parts), step="")
        for slots, num_layers in parts:
            chain = Chain(slots, num_layers, max(counts), dtype, device)
            share = seconds * len(slots) / num_slots / len(counts)
            for num_tokens in counts:
                progress.update(task, step=f"{slots[0].name} …, {num_tokens} tokens")
                reports.append(tune_chain(chain, num_tokens, Budget(share), table))
                progress.advance(task)
            del chain  # its memory is the next one's
            torch.cuda.empty_cache()
    return reports


class Budget:
    """Time that passes only while it is not paused.

    :param seconds: how much there is.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def is_over(self) -> bool:
        """Whether all of it has passed."""
        return self._clock() >= self._end

    def run_paused(self, function: Callable[[], object]) -> None:
        """Call something that takes time of its own."""
        begin = self._clock()
        function()
        self._end += self._clock() - begin


def tune_chain(chain: Chain, num_tokens: int, budget: Budget, table: Table) -> Report:
    """Find the fastest configurations of a chain.

    :param table: what is known so far.
    """
    from plugins.quant.dense.candidates import candidates  # noqa: PLC0415  the help needs none
    from plugins.quant.dense.search import search  # noqa: PLC0415  as above
    from plugins.quant.dense.table import LIBRARY  # noqa: PLC0415  as above

    def fit(configs: Configs) -> Configs:
        return {slot: chain.fit(slot, config, num_tokens) for slot, config in configs.items()}

    def measure(configs: Configs) -> float:
        return chain.measure(fit(configs), num_tokens)

    def prepare(jobs: Iterable[tuple[str, KernelConfig]]) -> None:
        fitted = dict.fromkeys((slot, chain.fit(slot, config, num_tokens)) for slot, config in jobs)
        budget.run_paused(lambda: chain.compile(fitted, num_tokens))

    report = Report(list(chain.slots.values()), num_tokens)
    chosen = {slot: table.choose(s.op, num_tokens) for slot, s in chain.slots.items()}
    options = {slot: candidates(s.op, num_tokens, chosen[slot]) for slot, s in chain.slots.items()}
    prepare(chosen.items())
    report.library = measure(dict.fromkeys(chain.slots, LIBRARY))
    report.before = measure(chosen)
    found: Found = search(chosen, options, measure, prepare, budget.is_over)
    configs = fit(found.configs)
    # Once more: the fastest of many measurements is also the luckiest.
    report.after = chain.measure(configs, num_tokens)
    if chain.repeats(configs, num_tokens) and report.after < min(report.library, report.before):
        report.configs = configs
    return report


# --- what is kept and shown ------------------------------------------------------------------------


def merge_entries(file: Path, entries: Iterable[Entry]) -> None:
    """Write entries in the place of those for the same operation, shape and number of tokens.

    :raises ConfigError: there is a file, and it is malformed.
    """
    from plugins.quant.dense.table import read_entries, table_of, write_entries  # noqa: PLC0415  the help needs none

    kept = read_entries(file) if file.exists() else []
    by_key = {entry[:-1]: entry for entry in [*kept, *entries]}
    write_entries(file, sorted(by_key.values(), key=lambda entry: entry[:-1]))
    table_of.cache_clear()


def show(console: Console, reports: Sequence[Report], file: Path) -> None:
    """Write what was found as a table."""
    from rich.table import Table  # noqa: PLC0415  the help needs none

    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("what", "tokens", "library µs", "before µs", "now µs", ""):
        table.add_column(header, justify="left" if header in ("what", "") else "right")
    for report in reports:
        times = [f"{micros:.0f}" for micros in (report.library, report.before, report.after)]
        note = "" if report.configs else "no gain that repeats; nothing new"
        table.add_row(report.name, str(report.num_tokens), *times, note)
    console.print(table)
    console.print(f"written to {file}")


def _make_console() -> Console:
    from rich.console import Console  # noqa: PLC0415  the help needs none

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _make_progress(console: Console) -> Progress:
    from rich import progress  # noqa: PLC0415  the help needs none

    columns: list[Any] = [
        progress.BarColumn(bar_width=32),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[step]}"),
        progress.TimeElapsedColumn(),
    ]
    return progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
