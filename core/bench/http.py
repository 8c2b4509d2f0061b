"""What streaming costs the process that serves clients.

Everything is real but the model: HTTP, journal, detokenizer, link, engine and scheduler; an executor
that computes nothing paces the steps.  The serving process is alone on one core, the engine and the
client share the others.  If the server falls behind the engine, the tokens of a stream are joined
into larger chunks, so tokens per chunk is shown beside tokens per second.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

from core.bench.null_executor import NAME
from core.errors import CytheraError

if TYPE_CHECKING:
    from collections.abc import Iterable

GOAL: Final = 60_000
TEXT: Final = (
    "def read(path):\n    with open(path) as file:\n        return file.read()\n\n"
    "A generator is a function that returns an iterator. "
)
START_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class StreamCost:
    """One run of many streams side by side."""

    step_ms: float
    num_streams: int
    num_tokens: int
    num_chunks: int
    wall_seconds: float
    cpu_seconds: float
    """Of the serving process."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens that reached the client."""
        return self.num_tokens / self.wall_seconds

    @property
    def tokens_per_chunk(self) -> float:
        """1 as long as the server keeps up with the engine."""
        return self.num_tokens / self.num_chunks


def measure(
    model: str,
    *,
    num_streams: int = 256,
    num_tokens: int = 512,
    steps_ms: Iterable[float] = (8, 5, 4, 3, 0),
) -> list[StreamCost]:
    """Stream once at each pace.

    :param model: its tokenizer is used, its weights are not.
    :param num_tokens: of each stream.
    :param steps_ms: how long the engine takes for a step; every stream gets a token in each.
    """
    return [_measure_one(model, num_streams, num_tokens, step_ms) for step_ms in steps_ms]


def _measure_one(model: str, num_streams: int, num_tokens: int, step_ms: float) -> StreamCost:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(  # noqa: S603  our own interpreter and module
        _command(model, port, num_streams, num_tokens, step_ms), stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(port, server)
        _pin(server.pid)
        process = psutil.Process(server.pid)
        before = _cpu_seconds(process)
        wall, num_chunks, total = asyncio.run(_stream_all(port, num_streams, num_tokens))
        cpu = _cpu_seconds(process) - before
    finally:
        server.terminate()
        server.wait(30)
    return StreamCost(step_ms, num_streams, total, num_chunks, wall, cpu)


def _command(model: str, port: int, num_streams: int, num_tokens: int, step_ms: float) -> list[str]:
    tokens = _token_ids(model)
    settings = {
        "--plugins": NAME,
        "--executor": "null",
        "--port": str(port),
        "--max-num-seqs": str(num_streams),
        "--max-num-batched-tokens": str(max(2048, num_streams)),
        "--num-kv-blocks": str(num_streams * (num_tokens // 16 + 4)),
        "--device": "cpu",
        "--log-level": "error",
    }
    flags = [word for pair in settings.items() for word in pair]
    flags += ["--set", f"{NAME}.step_ms={step_ms}", "--set", f"{NAME}.tokens={tokens}"]
    return [sys.executable, "-m", "core", "serve", model, *flags]


def _token_ids(model: str) -> list[int]:
    from core.demo import find_model  # noqa: PLC0415  next to its only use
    from core.tokenizer import load_tokenizer  # noqa: PLC0415  imports transformers

    tokenizer = load_tokenizer(find_model(model))
    if tokenizer is None:
        raise CytheraError(f"{model} has no tokenizer, and without one there is no text to stream")
    return tokenizer.encode(TEXT, add_special_tokens=False)


def _wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise CytheraError(f"the server ended with exit code {server.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 1.0) as sock:
                sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                if b" 200 " in sock.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise CytheraError(f"the server was not ready within {START_SECONDS:g} s")


def _pin(pid: int) -> None:
    """Give the serving process a core of its own, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        return
    first, *rest = sorted(os.sched_getaffinity(0))
    if not rest:
        return
    server = psutil.Process(pid)
    for process in (server, *server.children(recursive=True), psutil.Process()):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {first} if process == server else set(rest))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _stream_all(port: int, num_streams: int, num_tokens: int) -> tuple[float, int, int]:
    """Return seconds from the first token to the last, chunks and tokens over all streams."""
    results = await asyncio.gather(*(_stream(port, num_tokens) for _ in range(num_streams)))
    begin, end = min(r[0] for r in results), max(r[1] for r in results)
    return end - begin, sum(r[2] for r in results), sum(r[3] for r in results)


async def _stream(port: int, num_tokens: int) -> tuple[float, float, int, int]:
    body = json.dumps(
        {
            "prompt": [1, 2, 3],
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    begin, received = 0.0, bytearray()
    while not received.endswith(b"0\r\n\r\n"):
        data = await reader.read(2**16)
        if not data:
            raise CytheraError(f"the server closed a stream early: {bytes(received[-200:])!r}")
        begin = begin or time.perf_counter()
        received += data
    end = time.perf_counter()
    writer.close()
    events = [line for line in received.splitlines() if line.startswith(b"data: {")]
    usage = json.loads(events[-1][6:])["usage"]
    return begin, end, len(events) - 1, int(usage["completion_tokens"])


def report(costs: Iterable[StreamCost]) -> str:
    """Format a table with the goal beside the figures."""
    header = ("step ms", "streams", "tokens/s", "tokens/chunk", "µs CPU/token", "tokens/CPU s")
    lines = ["  ".join(f"{name:>12}" for name in header)]
    for cost in costs:
        per_token = cost.cpu_seconds / cost.num_tokens
        values = (
            f"{cost.step_ms:g}",
            f"{cost.num_streams}",
            f"{cost.tokens_per_second:,.0f}",
            f"{cost.tokens_per_chunk:.2f}",
            f"{per_token * 1e6:.1f}",
            f"{1 / per_token:,.0f}",
        )
        lines.append("  ".join(f"{value:>12}" for value in values))
    lines.append(f"goal: {GOAL:,} tokens/s on one core for the serving process")
    return "\n".join(lines)
