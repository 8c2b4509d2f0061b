"""Many clients at once, some of them rude, against a whole server in this process.

    python tests/soak_http.py --seconds 120 --streams 200

Streams and plain requests side by side; a tenth of the clients leaves at a random moment, every
twentieth request is invalid.  Afterwards each request has ended in exactly one terminal event, no
block is in use, and tasks, file descriptors and memory are back to where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import psutil

from core.config import load_config
from core.events import RequestFinished, RequestQueued, RequestRefused, Subscription
from core.process import EngineThread
from core.service import Service
from core.status import Phase
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

LEAVING_SHARE, INVALID_SHARE, STREAMING_SHARE = 0.10, 0.05, 0.8
MAX_GROWTH_BYTES = 24 * 2**20
INVALID = [
    {"prompt": "x", "temperature": -1},
    {"prompt": [], "max_tokens": 4},
    {"prompt": [10**9], "max_tokens": 4},
    {"prompt": "x", "max_tokens": "many"},
    {"prompt": "x", "n": 10**6},
    {"prompt": "x", "stop": ["a"] * 99},
    {"prompt": "x", "logprobs": 99},
    {"model": "nobody", "prompt": "x"},
]


@dataclass
class Tally:
    """What the clients saw and what the engine said."""

    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    queued: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def take(self, batch):
        for event in batch.events:
            kinds = {RequestQueued: self.queued, RequestFinished: self.finished}
            kinds.get(type(event), self.refused)[event.request_id] += 1


@dataclass(frozen=True)
class Footprint:
    num_tasks: int
    num_fds: int
    num_threads: int
    rss: int

    @classmethod
    def now(cls):
        gc.collect()
        process = psutil.Process()
        tasks = len(asyncio.all_tasks())
        return cls(tasks, process.num_fds(), process.num_threads(), process.memory_info().rss)


async def client(number, port, deadline, tally):
    """One client after the other in one place, until time is up."""
    rng = random.Random(number)
    while time.monotonic() < deadline:
        try:
            await one_request(rng, port, tally)
        except OSError as error:
            tally.problems.append(f"connection failed: {error!r}")
            return


async def one_request(rng, port, tally):
    is_invalid = rng.random() < INVALID_SHARE
    is_leaving = not is_invalid and rng.random() < LEAVING_SHARE
    is_stream = rng.random() < STREAMING_SHARE
    body = {
        "prompt": "word " * rng.randrange(1, 12),
        "max_tokens": rng.randrange(1, 30),
        "ignore_eos": True,
        "n": rng.choice([1, 1, 1, 2]),
        "stream": is_stream,
        "logprobs": rng.choice([None, 2]),
    }
    if is_invalid:
        body = {"stream": is_stream, **rng.choice(INVALID)}
    tally.sent["invalid" if is_invalid else "leaving" if is_leaving else "whole"] += 1
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n"
        writer.write((head + "Connection: close\r\n\r\n").encode() + data)
        if is_leaving:
            await leave(rng, reader, writer)
            return
        answer = await asyncio.wait_for(reader.read(), 60)
        judge(answer, tally, is_invalid=is_invalid, is_stream=is_stream)
    except TimeoutError:
        tally.problems.append(f"no answer within 60 s: {body}")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def leave(rng, reader, writer):
    """Go at a random moment: before anything came, or after some of it; politely, or not."""
    if rng.random() < 0.7:
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(rng.randrange(1, 2000)), rng.random() / 2)
    if rng.random() < 0.5:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()


def judge(answer, tally, *, is_invalid, is_stream):
    status = answer.split(b" ", 2)[1].decode() if answer else "none"
    tally.answers[status] += 1
    if is_invalid:
        is_right = status in ("400", "404") and b'"error"' in answer
    elif is_stream:
        is_right = status == "429" or (
            status == "200" and b"data: [DONE]" in answer and b'"error"' not in answer
        )
    else:
        is_right = status == "429" or (status == "200" and b'"finish_reason"' in answer)
    if not is_right:
        tally.problems.append(f"invalid={is_invalid} stream={is_stream}: {answer[:300]!r}")


async def run(folder, seconds, num_streams):
    config = load_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "device": "cpu",
            "num_kv_blocks": 1024,
            "log_level": "error",
            "plugins": ("no:observe.log",),
        }
    )
    service = Service(config, EngineThread())
    tally = Tally()
    types = (RequestQueued, RequestFinished, RequestRefused)
    service.subscribe(Subscription("soak", tally.take, types, "block"))
    server = service.make_server(service.make_frontends())
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = sock.getsockname()[1]
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        tasks.start_soon(server.serve, sock, stop, 5.0)
        while service.status.phase is not Phase.READY:
            await anyio.sleep(0.05)
        await load(port, min(10.0, seconds / 2), num_streams, Tally())  # warms caches and pools
        await settle(service)
        tally.queued.clear(), tally.finished.clear(), tally.refused.clear()
        before = Footprint.now()
        await load(port, seconds, num_streams, tally)
        await settle(service)
        service._engine.bus.flush()
        after = Footprint.now()
        check(service, tally, before, after)
        service.stop()
        stop.set()
    return tally, before, after


async def load(port, seconds, num_streams, tally):
    deadline = time.monotonic() + seconds
    async with anyio.create_task_group() as tasks:
        for number in range(num_streams):
            tasks.start_soon(client, number, port, deadline, tally)


async def settle(service):
    """Wait until whoever left has been noticed."""
    engine = service._engine.core
    with anyio.move_on_after(10):
        while service.num_open or engine.has_work or engine.kv_cache.stats().num_used:
            await anyio.sleep(0.02)
    await anyio.sleep(0.2)


def check(service, tally, before, after):
    stats = service._engine.core.kv_cache.stats()
    problems = tally.problems
    if service.num_open or stats.num_used:
        problems.append(
            f"{service.num_open} requests open and {stats.num_used} blocks in use at the end"
        )
    if service._engine.core.num_integrity_errors:
        problems.append("the KV pool was inconsistent")
    if tally.queued != tally.finished:
        odd = (tally.queued - tally.finished) + (tally.finished - tally.queued)
        problems.append(f"{len(odd)} requests without exactly one terminal event: {odd.most_common(3)}")
    if tally.refused.total() < tally.sent["invalid"]:
        problems.append(
            f"{tally.refused.total()} refusals for {tally.sent['invalid']} invalid requests"
        )
    for name in ("num_tasks", "num_fds", "num_threads"):
        if getattr(after, name) > getattr(before, name) + 2:
            problems.append(f"{name} grew from {getattr(before, name)} to {getattr(after, name)}")
    if after.rss - before.rss > MAX_GROWTH_BYTES:
        problems.append(f"memory grew by {(after.rss - before.rss) / 2**20:.1f} MiB")


def soak(folder, seconds, num_streams):
    """Run it; raises if anything was not as it should be."""
    tally, before, after = asyncio.run(run(folder, seconds, num_streams))
    lines = [
        f"sent {dict(tally.sent)}, answers {dict(tally.answers)}",
        f"sequences queued {tally.queued.total()}, finished {tally.finished.total()}",
        f"requests refused {tally.refused.total()}",
        f"before {before}",
        f"after  {after}",
    ]
    if tally.problems:
        raise AssertionError("\n".join([*lines, *tally.problems[:10]]))
    return "\n".join(lines)


def make_model(folder):
    make_checkpoint("llama2", folder, vocab_size=512)
    make_tokenizer("byte-level", folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=200)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        print(soak(make_model(Path(folder)), arguments.seconds, arguments.streams))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
