"""CUDA graphs of whole steps: input preparation, layers, head, drawing and storing what was drawn.

A graph has room for a number of rows and serves every step with fewer: what is missing is padding.
Graphs of steps in which all rows decode are captured, since those are short and many; a step with a
prompt in it keeps the device busy for longer than launching it takes.  The pair of a step's two
graphs shares its memory with all others: one ends before the next one begins.

The first one ends with the last layer.  The second one scores and draws; what that means depends on
the rows, so there is one for each kind of drawing (see `core.interfaces.SupportsSamplerCapture`),
captured when it is first needed, for it is short.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final

import torch

from core.batch import StepInputs, StepShape

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

NUM_BEFORE_READY: Final = 10
"""Graphs that are captured before the engine is ready; the others follow while it is idle."""
CHEAP_SIZE: Final = 128
"""Up to so many rows a step is bound by reading the weights, and padding costs next to nothing."""
MAX_PADDING: Final = 1.2
"""Beyond that, the size of a graph at most, as a multiple of the rows that there are."""


def decode_sizes(limit: int) -> list[int]:
    """List the numbers of rows to capture, ascending: dense where a padded row costs most."""
    sizes = [
        *range(1, 8),
        *range(8, 128, 8),
        *range(128, 256, 16),
        *range(256, 512, 32),
        *range(512, 1024, 64),
    ]
    sizes = [size for size in sizes if size < limit]
    return [*sizes, min(limit, 1024)]


class StepGraph:
    """One captured shape."""

    def __init__(self, inputs: StepInputs) -> None:
        self.inputs = inputs
        self.forward = torch.cuda.CUDAGraph()
        self.stream = torch.empty(0)
        """[N, hidden], what each replay leaves for the rows that draw."""
        self.draws: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        """By key of the sampler: the graph, and the tokens [N] that each replay leaves."""


class StepGraphs:
    """Captures steps and finds the one to replay.

    :param sizes: numbers of rows, ascending.
    :param keys: kinds of drawing to capture along with each.
    :param run: computes the stream of the rows that draw, from the inputs of a step.
    :param score: computes their logits.
    :param draw: scores, draws and stores tokens, from inputs, stream and a key.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        device: torch.device,
        *,
        keys: Sequence[Hashable],
        run: Callable[[StepInputs], torch.Tensor],
        score: Callable[[torch.Tensor], torch.Tensor],
        draw: Callable[[StepInputs, torch.Tensor, Hashable], torch.Tensor],
    ) -> None:
        self._device = device
        self._keys = keys
        self._run = run
        self._score = score
        self._draw = draw
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, StepGraph] = {}
        self._captured: list[int] = []  # sizes, ascending
        self._sizes = sizes
        self._missing = _in_order_of_need(sizes)

    @property
    def num_sizes(self) -> int:
        """Shapes that there will be in the end."""
        return len(self._sizes)

    @property
    def num_captured(self) -> int:
        """Shapes that can be replayed."""
        return len(self._captured)

    def find(self, num_rows: int) -> StepGraph | None:
        """Return the graph that wastes least on a step in which so many rows decode.

        None if each would waste more than launching the step without one costs.
        """
        index = bisect_left(self._captured, num_rows)
        if index == len(self._captured):
            return None
        size = self._captured[index]
        is_worth_it = size <= CHEAP_SIZE or size <= MAX_PADDING * num_rows
        return self._graphs[size] if is_worth_it else None

    def capture_first(self) -> None:
        """Capture those without which the engine should not start, the largest first."""
        wanted, self._missing = (
            self._missing[:NUM_BEFORE_READY],
            self._missing[NUM_BEFORE_READY:],
        )
        for size in sorted(wanted, reverse=True):
            self._capture(size)

    def capture_next(self) -> bool:
        """Capture one more; whether any is left."""
        if self._missing:
            self._capture(self._missing.pop(0))
        return bool(self._missing)

    def measure(self) -> tuple[int, int]:
        """Capture the largest shape twice.

        :return: bytes that the first one took, pool included, and those that each further one takes.
        """
        taken = []
        for _ in range(2):
            before, _ = torch.cuda.mem_get_info(self._device)
            kept = self._graphs.get(self._sizes[-1])  # noqa: F841  holds its memory till the end
            self._capture(self._sizes[-1])
            after, _ = torch.cuda.mem_get_info(self._device)
            taken.append(max(0, before - after))
        return taken[0], taken[1]

    def replay(self, graph: StepGraph, key: Hashable | None) -> torch.Tensor | None:
        """Run a step whose inputs have been uploaded.

        :param key: `None` leaves the drawing to the caller.
        :return: [N] int64, the tokens drawn; to be read before the next replay.
        """
        graph.forward.replay()
        if key is None:
            return None
        if key not in graph.draws:
            self._capture_draw(graph, key)
        drawing, tokens = graph.draws[key]
        drawing.replay()
        return tokens

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        inputs = StepInputs(StepShape(size, size, size), self._device)
        graph = StepGraph(inputs)
        # Once before, so that nothing is compiled or allocated for good inside.
        self._score(self._run(inputs))
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph.forward, pool=self._pool):
            graph.stream = self._run(inputs)
        for key in self._keys:
            self._capture_draw(graph, key)
        self._graphs[size] = graph
        self._captured = sorted(self._graphs)

    @torch.inference_mode()
    def _capture_draw(self, graph: StepGraph, key: Hashable) -> None:
        # Not run before: it would store tokens.  What is in the inputs is that of a real step.
        drawing = torch.cuda.CUDAGraph()
        with torch.cuda.graph(drawing, pool=self._pool):
            tokens = self._draw(graph.inputs, graph.stream, key)
        graph.draws[key] = (drawing, tokens)


def _in_order_of_need(sizes: Sequence[int]) -> list[int]:
    """Sort so that any first few cover the whole range: powers of two and the largest lead."""
    powers = [size for size in sizes if size & (size - 1) == 0]
    leading = {*powers[-NUM_BEFORE_READY + 1 :], sizes[-1]}
    if sizes[0] not in leading:
        leading = {sizes[0], *sorted(leading)[1:]}
    rest = [size for size in reversed(sizes) if size not in leading]
    return [*sorted(leading, reverse=True), *rest]
