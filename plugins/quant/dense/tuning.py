"""Measures kernels where they will run: in a chain of layers of random weights, replayed as a CUDA graph."""

from __future__ import annotations

import contextlib
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn import functional

from core.errors import CapacityError
from core.model.layers import ACTIVATIONS
from plugins.quant.dense.launch import make_launch
from plugins.quant.dense.linear import card_of, fit, workspace_on
from plugins.quant.dense.operation import FOR_ANY_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from plugins.quant.dense.candidates import Slot
    from plugins.quant.dense.launch import Launch
    from plugins.quant.dense.operation import KernelConfig

EPS: Final = 1e-5
MAX_ERROR: Final = 1e-2
"""Of a result, relative: bfloat16 rounds to 2e-3, a wrong tile errs by far more."""
NUM_REPLAYS: Final = 7
MAX_LAYERS: Final = 32
MEMORY_SHARE: Final = 0.7
"""Of the free memory, for weights; what checks compute in float64 comes on top."""
WIDE_BYTES: Final = 8
NUM_COMPILERS: Final = 16


class Layer(NamedTuple):
    """Random weights of one layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None


class Chain:
    """Slots in order, again and again, each layer with weights of its own.

    :param slots: of one layer.
    :param num_layers: at most so many, as far as memory goes.
    :param max_tokens: of what will be measured.
    :raises CapacityError: the memory of the device does not hold one layer.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        num_layers: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self._dtype = dtype
        self._device = device
        self._workspace = workspace_on(device)
        self._generator = torch.Generator(device).manual_seed(0)
        count = min(num_layers, MAX_LAYERS, _layers_that_fit(slots, dtype, device))
        self._layers = [{slot.name: self._draw_layer(slot) for slot in slots} for _ in range(count)]
        self._max_tokens = max_tokens
        self._buffers = {name: self._draw(max_tokens, width) for name, width in _widths(slots).items()}
        self._expected: dict[str, torch.Tensor] = {}
        self._problems: dict[tuple[str, KernelConfig, int], str] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warm_up_library()

    @property
    def num_layers(self) -> int:
        """Layers that fit."""
        return len(self._layers)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)

    def _draw_layer(self, slot: Slot) -> Layer:
        op = slot.op
        center = 0.0 if op.norm == "one_plus" else 1.0
        return Layer(
            self._draw(op.num_rows, op.num_inputs).mul_(op.num_inputs**-0.5),
            self._draw(op.num_rows).mul_(0.1) if op.bias else None,
            self._draw(op.num_inputs).mul_(0.2).add_(center) if op.norm else None,
        )

    def _warm_up_library(self) -> None:
        """Let cuBLAS make what it keeps for a stream, which it could not while that is captured."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                square = torch.ones(64, 64, device=self._device, dtype=self._dtype)
                torch.addmm(torch.mm(square, square), square, square)
            torch.cuda.synchronize(self._device)

    # --- candidates --------------------------------------------------------------------------------

    def fit(self, slot: str, config: KernelConfig, num_tokens: int) -> KernelConfig:
        """Take back what the device or the dtype does not allow."""
        op, card = self.slots[slot].op, card_of(self._device)
        return fit(op, config, num_tokens, card, self._dtype)

    def compile(self, jobs: Iterable[tuple[str, KernelConfig]], num_tokens: int) -> None:
        """Compile kernels side by side; what cannot be compiled is found by `problem`."""

        def attempt(job: tuple[str, KernelConfig]) -> None:
            with contextlib.suppress(Exception):
                self._warm_up(*job, num_tokens)

        with ThreadPoolExecutor(NUM_COMPILERS) as pool:
            list(pool.map(attempt, jobs))

    def _warm_up(self, slot: str, config: KernelConfig, num_tokens: int) -> None:
        op, layer = self.slots[slot].op, self._layers[0][slot]
        if config.kernel in FOR_ANY_TOKENS or (op.norm and not config.fuse_norm):
            return  # kernels that many share: the first check compiles them
        launch = make_launch(op, config, num_tokens, layer, self._workspace, warm_up=True)
        x, out = self._ends(slot, num_tokens)
        launch(x, out, layer.norm_weight, out if op.residual else None, EPS)

    def problem(self, slot: str, config: KernelConfig, num_tokens: int) -> str:
        """Run a configuration twice, and say what is wrong with its results; empty if nothing is."""
        key = (slot, config, num_tokens)
        if key not in self._problems:
            try:
                self._problems[key] = self._find_problem(slot, config, num_tokens)
            except torch.AcceleratorError:
                raise  # the device is lost
            except Exception as error:  # noqa: BLE001  as it is a trial: of memory, compiler, card
                self._problems[key] = f"{type(error).__name__}: {error}"
        return self._problems[key]

    def _find_problem(self, slot: str, config: KernelConfig, num_tokens: int) -> str:
        op, layer = self.slots[slot].op, self._layers[0][slot]
        launch = make_launch(op, config, num_tokens, layer, self._workspace)
        x, before = self._ends(slot, num_tokens)
        outs = []
        for _ in range(2):
            out = before.clone() if op.residual else torch.full_like(before, math.nan)
            launch(x, out, layer.norm_weight, out if op.residual else None, EPS)
            outs.append(out)
        expected = self._expect(slot)[:num_tokens]
        error = ((outs[0].double() - expected).norm() / expected.norm()).item()
        if not error < MAX_ERROR:
            return f"results are off by {error:.2g}"
        return "" if config.kernel == "library" or torch.equal(*outs) else "results do not repeat"

    def _ends(self, slot: str, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where a slot reads, [T, inputs], and what has the shape of its result, [T, outputs]."""
        _, op, reads, writes = self.slots[slot]
        return self._buffers[reads][:num_tokens, : op.num_inputs], self._buffers[writes][:num_tokens]

    def _expect(self, slot: str) -> torch.Tensor:
        """Compute a slot of the first layer in float64, for the most tokens."""
        if slot not in self._expected:
            op, layer = self.slots[slot].op, self._layers[0][slot]
            x, before = (end.double() for end in self._ends(slot, self._max_tokens))
            if layer.norm_weight is not None:
                gamma = layer.norm_weight.double() + (op.norm == "one_plus")
                x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * gamma
            bias = None if layer.bias is None else layer.bias.double()
            y = functional.linear(x, layer.weight.double(), bias)
            if op.activation:
                gate, up = y.chunk(2, -1)
                activate = {str(name): function for name, function in ACTIVATIONS.items()}[
                    op.activation
                ]
                y = activate(gate) * up
            self._expected[slot] = y + before if op.residual else y
        return self._expected[slot]

    # --- the chain ---------------------------------------------------------------------------------

    def make_run(
        self, configs: Mapping[str, KernelConfig], num_tokens: int
    ) -> tuple[Callable[[], None], torch.Tensor]:
        """Prepare a run of all layers.

        :return: what runs them, and what the last slot writes: [T, outputs].
        """
        own = {name: torch.empty_like(buffer[:num_tokens]) for name, buffer in self._buffers.items()}
        steps = [
            self._step(slot, configs[slot.name], layer[slot.name], own, num_tokens)
            for layer in self._layers
            for slot in self.slots.values()
        ]
        start, first = self._buffers["stream"][:num_tokens], own["stream"]

        def run() -> None:
            first.copy_(start)
            for step in steps:
                step()

        return run, own[list(self.slots.values())[-1].writes]

    def _step(
        self,
        slot: Slot,
        config: KernelConfig,
        layer: Layer,
        buffers: Mapping[str, torch.Tensor],
        num_tokens: int,
    ) -> Callable[[], None]:
        launch: Launch = make_launch(slot.op, config, num_tokens, layer, self._workspace)
        x, out = buffers[slot.reads][:, : slot.op.num_inputs], buffers[slot.writes]
        residual = out if slot.op.residual else None

        def step() -> None:
            launch(x, out, layer.norm_weight, residual, EPS)

        return step

    def measure(self, configs: Mapping[str, KernelConfig], num_tokens: int) -> float:
        """Time the chain: the median of a few replays, in µs; infinite if a result is not finite."""
        if any(self.problem(slot, config, num_tokens) for slot, config in configs.items()):
            return math.inf
        run, out = self.make_run(configs, num_tokens)
        graph = self._capture(run)
        out.fill_(math.nan)
        times = []
        for _ in range(NUM_REPLAYS + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            times.append((begin, end))
        torch.cuda.synchronize(self._device)
        micros = statistics.median(1e3 * begin.elapsed_time(end) for begin, end in times[1:])
        return micros if bool(out.isfinite().all()) else math.inf

    def repeats(self, configs: Mapping[str, KernelConfig], num_tokens: int) -> bool:
        """Whether two replays give the same to the bit; if not, kernels race with one another.

        The library does not promise it, so that chains with it always pass.
        """
        if any(config.kernel == "library" for config in configs.values()):
            return True
        run, out = self.make_run(configs, num_tokens)
        graph = self._capture(run)
        outs = []
        for _ in range(2):
            graph.replay()
            outs.append(out.clone())
        return torch.equal(*outs)

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        if stream is None:
            raise RuntimeError("only chains on a GPU can be measured")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


def _widths(slots: Sequence[Slot]) -> dict[str, int]:
    """Find how many columns each buffer has."""
    widths: dict[str, int] = {}
    for slot in slots:
        for name, width in ((slot.reads, slot.op.num_inputs), (slot.writes, slot.op.num_outputs)):
            widths[name] = max(widths.get(name, 0), width)
    return widths


def _layers_that_fit(slots: Sequence[Slot], dtype: torch.dtype, device: torch.device) -> int:
    """Count the layers whose weights fit into the free memory.

    :raises CapacityError: none does.
    """
    if device.type != "cuda":
        return MAX_LAYERS
    sizes = [slot.op.num_rows * slot.op.num_inputs for slot in slots]
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(sizes) * dtype.itemsize
    # One layer at a time is looked at in float64.
    count = int((MEMORY_SHARE * free - WIDE_BYTES * max(sizes)) // needed)
    if count < 1:
        raise CapacityError(
            f"one layer needs {needed / 2**30:.1f} GiB, and to be checked {WIDE_BYTES * max(sizes) / 2**30:.1f}"
            f" GiB more; {free / 2**30:.1f} GiB are free on {device}"
        )
    return count
