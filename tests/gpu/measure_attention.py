"""How fast an attention backend is, beside torch's own kernels: µs, TB/s of keys and values, TFLOP/s.

python tests/gpu/measure_attention.py                   32 query heads over 8 of 128, bf16, on a GPU
python tests/gpu/measure_attention.py --device cpu --backend torch --scale 64    a dry run

A launch is timed within a CUDA graph that goes from layer to layer, so that no keys are left in a cache
by the launch before.  FlashInfer cannot be captured: what planning and launching cost the host counts there, once
for all layers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from core.interfaces import AttentionBackend, AttentionSpec, KVCacheSpec, SupportsRotary
from core.testing.attention import make_batch

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_HEADS, NUM_KV_HEADS, DIM, BLOCK = 32, 8, 128, 64
CACHE_BYTES = 2 << 30  # of all layers together, far more than what any cache between holds


@dataclass(frozen=True)
class Case:
    """Rows of a step."""

    name: str
    starts: list[int]
    counts: list[int]

    @property
    def kv_bytes(self) -> int:
        positions = sum(start + count for start, count in zip(self.starts, self.counts, strict=True))
        return positions * 2 * NUM_KV_HEADS * DIM * 2

    @property
    def num_flops(self) -> float:
        pairs = sum(c * s + c * (c + 1) / 2 for s, c in zip(self.starts, self.counts, strict=True))
        return 4 * NUM_HEADS * DIM * pairs


def make_cases(scale: int) -> list[Case]:
    lengths = [random.Random(0).randint(100, 2048) for _ in range(256)]
    decodes = [
        (1, 593),
        (1, 8192),
        (1, 32768),
        (32, 593),
        (64, 593),
        (128, 593),
        (256, 593),
        (600, 1170),
    ]
    cases = [
        Case(f"decode {rows} x {length}", [length // scale - 1] * rows, [1] * rows)
        for rows, length in decodes
    ]
    cases.append(Case("decode 256 of 100 to 2048", [n // scale for n in lengths], [1] * 256))
    prompts = [(4, 0, 2048), (1, 0, 8192), (1, 0, 32768), (1, 30720, 2048)]
    return [
        *cases,
        *(
            Case(f"prompt {n} x {count} behind {start}", [start // scale] * n, [count // scale] * n)
            for n, start, count in prompts
        ),
    ]


class Measured:
    """A backend with a filled cache, ready to attend in one case."""

    def __init__(self, backend: AttentionBackend, case: Case, device: torch.device) -> None:
        self.backend = backend
        self.num_layers = max(1, min(64, CACHE_BYTES // case.kv_bytes))
        tables, first = [], 1
        for start, count in zip(case.starts, case.counts, strict=True):
            size = -(-(start + count) // BLOCK)
            tables.append(list(range(first, first + size)))
            first += size
        self.batch = make_batch(case.starts, case.counts, tables, BLOCK, device=str(device))
        dtype = torch.bfloat16
        backend.allocate_cache(
            KVCacheSpec(self.num_layers, first, BLOCK, NUM_KV_HEADS, DIM, dtype, device)
        )
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * DIM
        self.qkv = torch.randn(self.batch.num_tokens, width, device=device, dtype=dtype)
        longest = max(s + c for s, c in zip(case.starts, case.counts, strict=True))
        self.cos = torch.randn(longest, DIM // 2, device=device, dtype=dtype)
        self.sin = torch.randn_like(self.cos)
        self.specs = [
            AttentionSpec(layer, NUM_HEADS, NUM_KV_HEADS, DIM, DIM**-0.5)
            for layer in range(self.num_layers)
        ]

    def run(self) -> None:
        """Attend once in each layer."""
        meta = self.backend.prepare(self.batch)
        for spec in self.specs:
            if isinstance(self.backend, SupportsRotary):
                self.backend.forward_rotary(self.qkv, self.cos, self.sin, spec, meta)
                continue
            heads = self.qkv.view(len(self.qkv), -1, DIM)
            q, k, v = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
            self.backend.forward(q, k, v, spec, meta)


def seconds(run: Callable[[], object], device: torch.device, *, is_captured: bool) -> float:
    """Median of some runs after a first one."""
    run()
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    replay = run
    if is_captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    times = []
    for _ in range(11):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return float(statistics.median(times))


def report(name: str, took: float, case: Case) -> None:
    rate = (
        f"{case.kv_bytes / took / 1e12:6.2f} TB/s"
        if max(case.counts) == 1
        else f"{case.num_flops / took / 1e12:6.0f} TFLOP/s"
    )
    print(f"{case.name:32} {name:10} {took * 1e6:10.1f} µs  {rate}", flush=True)  # noqa: T201  that is its job


def measure_torch(case: Case, device: torch.device) -> None:
    """Time torch's kernels on prompts that begin in this step."""
    if max(case.counts) == 1 or any(case.starts) or device.type == "cpu":
        return
    shape = (len(case.counts), NUM_HEADS, case.counts[0], DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    for name, kernel in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(kernel):
            took = seconds(
                lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device, is_captured=True
            )
        report(name, took, case)


def make_backend(name: str) -> AttentionBackend:
    if name == "torch":
        from plugins.attention.torch.backend import TorchAttention  # noqa: PLC0415  the one that is wanted

        return TorchAttention()
    if name == "flashinfer":
        import flashinfer  # noqa: PLC0415  an extra

        from plugins.attention.flashinfer.backend import FlashInferAttention  # noqa: PLC0415  as above

        return FlashInferAttention(flashinfer)
    from plugins.attention.triton.backend import TritonAttention  # noqa: PLC0415  triton is an extra

    return TritonAttention()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["triton", "flashinfer", "torch"], default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this")
    args = parser.parse_args()
    device = torch.device(args.device)
    for case in make_cases(args.scale):
        backend = make_backend(args.backend)
        measured = Measured(backend, case, device)
        is_captured = bool(getattr(backend, "can_capture", False))
        took = seconds(measured.run, device, is_captured=is_captured) / measured.num_layers
        report(args.backend, took, case)
        del measured, backend
        measure_torch(case, device)


if __name__ == "__main__":
    main()
