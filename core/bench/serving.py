"""`python -m core bench serve`: a load for a server that speaks the API of OpenAI, and what it did.

Requests start at their times whether or not earlier ones have been answered, unless concurrency is
limited.  Prompts go out as token ids wherever the data set holds ids, so that every server computes the
same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec

from core.bench.client import Address, StreamClient
from core.bench.progress import show_progress
from core.bench.serving_report import DETAILS, StreamRecord, summarize
from core.bench.workloads import ARRIVAL_SEED, VOCAB_SIZE, BenchRequest, arrivals, shift
from core.errors import ConfigError, CytheraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


CHAT_SUFFIX: Final = "/chat/completions"
READY_INTERVAL: Final = 0.5
"""Seconds between two looks at a server that is not ready."""
LIST_TIMEOUT: Final = 10.0
BUSY_SHARE: Final = 0.8
"""Share of a core above which a client may have measured itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a server is asked, and how."""

    base_url: str
    model: str
    endpoint: str = "/v1/completions"
    headers: Mapping[str, str] = field(default_factory=dict)
    is_insecure: bool = False
    burstiness: float = 1.0
    seed: int | None = None
    max_concurrency: int | None = None
    num_warmups: int = 0
    vocab_size: int = VOCAB_SIZE
    """Bound of the token ids that the server knows."""
    ready_timeout: float = 0.0
    """Seconds to wait for the server to answer a first request; 0 does not ask."""
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are added to each request, or take the place of ours."""
    keep_text: bool = False
    has_progress: bool = True


def find_model(base_url: str, headers: Mapping[str, str], *, is_insecure: bool = False) -> str:
    """Ask a server what it serves.

    :raises CytheraError: it cannot be reached, or names no model.
    """
    url = f"{base_url.rstrip('/')}/v1/models"
    try:
        response = httpx.get(
            url, headers=dict(headers), timeout=LIST_TIMEOUT, verify=not is_insecure, trust_env=False
        )
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise CytheraError(f"{url} names no model: {error}; name it with --model") from error


def run_load(
    load: Load,
    requests: Sequence[BenchRequest],
    rate: float,
    *,
    goodput: Mapping[str, float] | None = None,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99.0,),
) -> dict[str, Any]:
    """Send requests at one rate and compute the figures.

    :param rate: requests per second; infinite: all at once.
    :return: figures of `summarize`, the settings, and `client_cpu_share`, the share of a core that this
        client needed.
    :raises CytheraError: the server does not become ready, or the load makes no sense.
    """
    seed = ARRIVAL_SEED if load.seed is None else load.seed
    times = arrivals(len(requests), rate, burstiness=load.burstiness, seed=seed)
    if load.max_concurrency is not None and load.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency {load.max_concurrency} must be at least 1")
    bodies = [make_body(load, request) for request in requests]
    date = datetime.now().astimezone()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        run = runner.run(_LoadRun(load, requests, bodies).run(times))
    figures = summarize(
        run.records,
        run.begin,
        run.duration,
        goodput=goodput,
        metrics=metrics,
        percentiles=percentiles,
    )
    settings = {
        "date": f"{date:%Y%m%d-%H%M%S}",
        "endpoint_type": "openai-chat" if load.endpoint.endswith(CHAT_SUFFIX) else "openai",
        "model_id": load.model,
        "num_prompts": len(requests),
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
    }
    return settings | figures | {"client_cpu_share": run.cpu_seconds / run.duration}


def make_body(load: Load, request: BenchRequest) -> bytes:
    """Make the JSON of one request.

    :raises ConfigError: the route takes text, and the data set has token ids.
    """
    body: dict[str, Any] = {"model": load.model}
    if load.endpoint.endswith(CHAT_SUFFIX):
        if not isinstance(request.prompt, str):
            raise ConfigError(
                f"--endpoint {load.endpoint} takes text, but this data set holds token ids; use "
                f"--endpoint /v1/completions, or --dataset-name custom with a file of text"
            )
        body["messages"] = [{"role": "user", "content": request.prompt}]
        body["max_completion_tokens"] = request.output_len
    else:
        body["prompt"] = request.prompt
        body["max_tokens"] = request.output_len
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if load.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body | dict(load.extra_body))


def without_details(result: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a result holds for each request."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def file_name(result: Mapping[str, Any], label: str) -> str:
    """Name a result file after what was measured."""
    concurrency = result["max_concurrency"]
    limit = "" if concurrency is None else f"-concurrency{concurrency}"
    model = str(result["model_id"]).rstrip("/").rpartition("/")[2]
    label = label or str(result["endpoint_type"])
    return f"{label}-{result['request_rate']}qps{limit}-{model}-{result['date']}.json"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  faster, where it exists
    except ImportError:
        return None
    return uvloop.new_event_loop


class _LoadRun:
    """One run of a load."""

    def __init__(self, load: Load, requests: Sequence[BenchRequest], bodies: Sequence[bytes]) -> None:
        self._load = load
        self._bodies = bodies
        self._requests = requests
        self.records = [_make_record(request) for request in requests]
        self.begin = self.duration = self.cpu_seconds = 0.0

    async def run(self, times: Sequence[float]) -> _LoadRun:
        load = self._load
        address = Address.parse(load.base_url)
        client = StreamClient(
            address,
            load.endpoint,
            headers=load.headers,
            keep_text=load.keep_text,
            is_insecure=load.is_insecure,
        )
        with contextlib.closing(client):
            await self._wait_until_ready(client)
            await self._warm_up(client)
            with (
                show_progress("requests", len(self.records), is_shown=load.has_progress) as advance,
                _no_collection(),
            ):
                cpu = time.process_time()
                self.begin = time.perf_counter()
                await self._send_all(client, times, advance)
                self.duration = time.perf_counter() - self.begin
                self.cpu_seconds = time.process_time() - cpu
        return self

    async def _send_all(
        self, client: StreamClient, times: Sequence[float], advance: Callable[[], None]
    ) -> None:
        limit = self._load.max_concurrency
        seats = asyncio.Semaphore(limit) if limit is not None else contextlib.nullcontext()

        async def send(body: bytes, record: StreamRecord) -> None:
            async with seats:
                await client.stream(body, record)
            advance()

        async with asyncio.TaskGroup() as tasks:
            for moment, body, record in zip(times, self._bodies, self.records, strict=True):
                # Some event loops wake up a fraction of a millisecond early.
                while (rest := self.begin + moment - time.perf_counter()) > 0:  # noqa: ASYNC110  a time
                    await asyncio.sleep(rest)
                tasks.create_task(send(body, record))

    def _others(self, count: int) -> list[BenchRequest]:
        """Make requests like the first ones that leave nothing for them in a cache of prefixes."""
        return shift(self._requests[:count], -1, self._load.vocab_size)

    async def _wait_until_ready(self, client: StreamClient) -> None:
        """Have the server answer a request of one token.

        :raises CytheraError: it does not within the time that it has.
        """
        load = self._load
        if load.ready_timeout <= 0:
            return
        [request] = self._others(1)
        body = make_body(load, BenchRequest(request.prompt, 1))
        deadline = time.monotonic() + load.ready_timeout
        while True:
            record = _make_record(request)
            await client.stream(body, record)
            if not record.error:
                return
            if time.monotonic() > deadline:
                raise CytheraError(
                    f"{load.base_url} did not answer within {load.ready_timeout:g} s "
                    f"(--ready-check-timeout-sec): {record.error}"
                )
            await asyncio.sleep(READY_INTERVAL)

    async def _warm_up(self, client: StreamClient) -> None:
        requests = self._others(self._load.num_warmups)
        records = list(map(_make_record, requests))
        bodies = [make_body(self._load, request) for request in requests]
        await asyncio.gather(*map(client.stream, bodies, records))
        if error := next((record.error for record in records if record.error), None):
            raise CytheraError(f"a warm-up request failed: {error}")


def _make_record(request: BenchRequest) -> StreamRecord:
    # Of text only the server knows the tokens; it tells them with the usage.
    return StreamRecord(0 if isinstance(request.prompt, str) else len(request.prompt))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from stopping all streams at once; nothing here makes cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parse_body(text: str) -> dict[str, Any]:
    """Read `--extra-body`.

    :raises ConfigError: it is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--extra-body must be a JSON object")
    return value
