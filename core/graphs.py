"""CUDA graphs of whole steps: input preparation, layers, head, drawing and storing what was drawn.

A graph has room for some tokens and rows, and serves every step with fewer: what is missing is padding.
Two families are captured.  In the one all rows decode, so a size says it all.  In the other some rows
have prompts; those are short enough that launching them would take longer than running them.

The pair of a step's two graphs shares its memory with all others: one ends before the next one begins.
The first one ends with the last layer.  The second one scores and draws; what that means depends on
the rows, so there is one for each kind of drawing (see `core.interfaces.SupportsSamplerCapture`),
captured when it is first needed, for it is short.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import torch

from core.batch import StepInputs, StepShape

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from concurrent.futures import Executor

NUM_BEFORE_READY: Final = 10
"""Graphs that are captured before the engine is ready; the others follow while it is idle."""
CHEAP_TOKENS: Final = 128
"""Up to so many tokens a step is bound by reading the weights, and padding costs next to nothing."""
MAX_PADDING: Final = 1.2
"""Beyond that, the tokens of a graph at most, as a multiple of those that there are."""
MAX_ROWS: Final = 1024
NUM_COMPILERS: Final = 8
MAX_TELLING: Final = 64
"""Kernels of their own exist for as many rows that decode; beyond, one size stands for all."""
PROMPT_TOKENS: Final = (*range(64, 513, 64), *range(640, 1025, 128))
PROMPT_ROWS: Final = (8, 128)


def decode_shapes(max_rows: int) -> list[StepShape]:
    """List shapes in which all rows decode, ascending: dense where a padded row costs most."""
    sizes = [
        *range(1, 8),
        *range(8, 128, 8),
        *range(128, 256, 16),
        *range(256, 512, 32),
        *range(512, MAX_ROWS, 64),
    ]
    sizes = [*(size for size in sizes if size < max_rows), min(max_rows, MAX_ROWS)]
    return [StepShape(size, size, size) for size in sizes]


def prompt_shapes(max_rows: int, max_tokens: int) -> list[StepShape]:
    """List shapes with room for prompts, ascending."""
    rows = sorted({min(count, max_rows) for count in PROMPT_ROWS})
    shapes = [StepShape(tokens, count, count) for tokens in PROMPT_TOKENS for count in rows]
    return [shape for shape in shapes if shape.num_rows < shape.num_tokens <= max_tokens]


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

    :param shapes: what to capture, the most needed first.
    :param keys: kinds of drawing to capture along with each.
    :param run: computes the stream of the rows that draw, from the inputs of a step.
    :param score: computes their logits.
    :param draw: scores, draws and stores tokens, from inputs, stream and a key.
    """

    def __init__(
        self,
        shapes: Sequence[StepShape],
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
        self._shapes = list(shapes)
        self._missing = list(shapes)
        self._graphs: dict[StepShape, StepGraph] = {}
        self._captured: list[StepShape] = []  # ascending

    @property
    def num_shapes(self) -> int:
        """Shapes that there will be in the end."""
        return len(self._shapes)

    @property
    def num_captured(self) -> int:
        """Shapes that can be replayed."""
        return len(self._captured)

    def find(self, needed: StepShape) -> StepGraph | None:
        """Return the graph that wastes least on a step.

        None if each would waste more than launching the step without one costs.
        """
        limit = max(CHEAP_TOKENS, MAX_PADDING * needed.num_tokens)
        for shape in self._captured:
            if can_hold(shape, needed):
                return self._graphs[shape] if shape.num_tokens <= limit else None
        return None

    def pad_draws(self, shape: StepShape) -> StepShape:
        """Round up how many rows draw in a step that is launched without a graph, to a size that has one.

        The library has kernels of its own for nearly every number of rows, and loads each when it is
        first needed, for which it waits until the device is idle.
        """
        if shape.is_decode or not shape.num_draws:
            return shape
        sizes = (known.num_draws for known in self._shapes if known.num_draws >= shape.num_draws)
        padded = shape._replace(num_draws=min(sizes, default=shape.num_draws))
        return shape if padded.is_decode else padded

    def compile(self, *others: Callable[[], None]) -> None:
        """Run shapes that between them need every kernel once, side by side.

        Each run waits for its own kernels, while those of the others are compiled.

        :param others: run beside them.
        """
        runs: list[Callable[[], None]] = list(others)
        runs += [partial(self._try, shape) for shape in telling_shapes(self._shapes)]
        # What an interrupted compilation leaves set is forgotten with the context.
        copy_context().run(self._run_all, runs)
        torch.cuda.synchronize(self._device)
        # Each thread had its own handle of cuBLAS, whose workspaces nobody needs any more.
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  there is no public name for it

    def _run_all(self, runs: Sequence[Callable[[], None]]) -> None:
        with (
            ThreadPoolExecutor(NUM_COMPILERS) as compilers,
            compiling_once(compilers),
            ThreadPoolExecutor(len(runs)) as runners,
        ):
            # A thread begins without the context that tells Triton where to compile.
            tasks = [partial(copy_context().run, self._run_on_device, run) for run in runs]
            for running in [runners.submit(task) for task in tasks]:
                running.result()

    def _run_on_device(self, run: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):  # each thread has a current one of its own
            run()

    @torch.inference_mode()
    def _try(self, shape: StepShape) -> None:
        self._score(self._run(StepInputs(shape, self._device)))

    def capture_first(self) -> None:
        """Capture those without which the engine should not start, the largest first."""
        self.compile()
        wanted, self._missing = self._missing[:NUM_BEFORE_READY], self._missing[NUM_BEFORE_READY:]
        for shape in sorted(wanted, reverse=True):
            self._capture(shape)

    def capture_next(self) -> bool:
        """Capture one more; whether any is left."""
        if self._missing:
            self._capture(self._missing.pop(0))
        return bool(self._missing)

    def measure(self) -> int:
        """Count the bytes that all shapes will take, pool included.

        It captures the largest ones, and one of them once more: so much will each of the others take.
        """
        largest = [max(self._shapes), max(self._shapes, key=lambda shape: shape.num_rows)]
        taken = []
        kept = []  # or a shape that is captured again would leave its memory to its successor
        for shapes in (largest, largest[:1]):
            before = self._free_bytes()
            for shape in shapes:
                self._capture(shape)
                kept.append(self._graphs[shape])
            taken.append(max(0, before - self._free_bytes()))
        return taken[0] + taken[1] * (self.num_shapes - len(largest))

    def _free_bytes(self) -> int:
        # What the allocator keeps for later would be given back by the capture itself.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return free

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
    def _capture(self, shape: StepShape) -> None:
        inputs = StepInputs(shape, self._device)
        graph = StepGraph(inputs)
        # Once before, so that nothing is compiled or allocated for good inside.
        self._score(self._run(inputs))
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph.forward, pool=self._pool):
            graph.stream = self._run(inputs)
        for key in self._keys:
            self._capture_draw(graph, key)
        self._graphs[shape] = graph
        self._captured = sorted(self._graphs)

    @torch.inference_mode()
    def _capture_draw(self, graph: StepGraph, key: Hashable) -> None:
        # Not run before: it would store tokens.  What is in the inputs is that of a real step.
        drawing = torch.cuda.CUDAGraph()
        with torch.cuda.graph(drawing, pool=self._pool):
            tokens = self._draw(graph.inputs, graph.stream, key)
        graph.draws[key] = (drawing, tokens)


@contextmanager
def compiling_once(compilers: Executor) -> Iterator[None]:
    """Have the kernels of Triton compiled by others, each once, however many threads ask for it.

    By itself, every thread that finds no kernel compiles it, though others may be at it already.
    Enter it in a context of its own: if it is left by an error, what it has set there stays.
    """
    try:
        from triton import AsyncCompileMode  # noqa: PLC0415  not where there is no GPU
    except ImportError:
        yield
        return

    class CompilingOnce(AsyncCompileMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(compilers)
            self._lock = Lock()

        def submit(self, *arguments: Any) -> Any:
            with self._lock:
                return super().submit(*arguments)

    with CompilingOnce():
        yield


def telling_shapes(shapes: Sequence[StepShape]) -> list[StepShape]:
    """List shapes that between them need every kernel, those in which all rows decode first.

    Prompts come last, when what they have in common with the others is compiled; how many rows they
    have tells nothing.
    """
    powers = [shape for shape in shapes if shape.num_tokens & (shape.num_tokens - 1) == 0]
    decodes = [shape for shape in powers if shape.is_decode and shape.num_tokens <= 2 * MAX_TELLING]
    prompts: dict[int, StepShape] = {}
    for shape in sorted(shape for shape in powers if not shape.is_decode):
        prompts.setdefault(shape.num_tokens, shape)
    return [*decodes, *prompts.values()]


def can_hold(shape: StepShape, needed: StepShape) -> bool:
    """Whether a step fits into a captured shape; one in which all rows decode fits only its like."""
    if shape.is_decode != needed.is_decode:
        return False
    return all(room >= count for room, count in zip(shape, needed, strict=True))


def in_order_of_need(decodes: Sequence[StepShape], prompts: Sequence[StepShape]) -> list[StepShape]:
    """Sort so that any first few cover the whole range: powers of two and the largest lead."""
    powers = [shape for shape in decodes if shape.num_rows & (shape.num_rows - 1) == 0]
    leading = {decodes[0], decodes[-1], *powers[-NUM_BEFORE_READY + 2 :]}
    others = [shape for shape in decodes if shape not in leading]
    # Alternating, since nobody knows what comes first.
    paired = [shape for pair in zip(prompts, reversed(others), strict=False) for shape in pair]
    rest = [shape for shape in [*prompts, *reversed(others)] if shape not in set(paired)]
    return [*sorted(leading, reverse=True), *paired, *rest]
