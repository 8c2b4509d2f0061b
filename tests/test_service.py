"""The service in front of a real engine in a thread: admission, deadlines, draining, templates."""

from __future__ import annotations

import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import core.service
from core.config import load_config
from core.errors import (
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    PlanError,
    RequestTooLargeError,
)
from core.events import RequestFinished, RequestRefused, StepCompleted, Subscription
from core.outputs import OutputKind
from core.process import EngineThread
from core.request import SamplingParams
from core.service import MAX_SEQUENCES, Service
from core.status import Phase
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

SETTINGS = {
    "dtype": "float32",
    "device": "cpu",
    "num_kv_blocks": 64,
    "block_size": 4,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 120,
    "plugins": ("core.builtin", "attention.torch"),
}
LONG = SamplingParams(max_tokens=110, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("service") / "model"
    make_checkpoint("llama2", folder, vocab_size=512)
    make_tokenizer("byte-level", folder)
    return folder


@pytest.fixture(autouse=True)
def _without_http(monkeypatch):
    monkeypatch.setattr(core.service, "SERVE_PLUGINS", ())


@asynccontextmanager
async def running(path: Path, **settings: Any) -> AsyncIterator[Service]:
    service = make_service(path, **settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        with anyio.fail_after(30):
            while service.status.phase is not Phase.READY:
                await anyio.sleep(0.01)
        yield service
        service.stop()


def make_service(path: Path, **settings: Any) -> Service:
    config = load_config({"model": str(path), **SETTINGS, **settings})
    return Service(config, EngineThread())


def keys(logprobs: list[dict[int, Any]]) -> list[list[int]]:
    return [list(table) for table in logprobs]


async def idle(service: Service) -> None:
    """Wait until the engine holds nothing, which shall take no more than a moment."""
    core_of = service._engine.core
    with anyio.fail_after(5):
        while core_of.has_work or core_of.kv_cache.stats().num_used:
            await anyio.sleep(0.005)


async def test_phases_are_told_in_their_order(path):
    phases = []
    config = load_config({"model": str(path), **SETTINGS})
    service = Service(config, EngineThread(), report=lambda status: phases.append(status.phase))
    with pytest.raises(NotReadyError, match="not ready yet: starting"):
        service.admit("r")
    with pytest.raises(NotReadyError):
        _ = service.limits
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        while service.status.phase is not Phase.READY:
            await anyio.sleep(0.01)
        await service.drain(1.0)
        with pytest.raises(NotReadyError, match="draining"):
            service.admit("r")
        service.stop()
    assert list(dict.fromkeys(phases)) == [
        Phase.LOADING,
        Phase.PROFILING,
        Phase.WARMING,
        Phase.READY,
        Phase.DRAINING,
        Phase.STOPPED,
    ]


async def test_deltas_add_up_to_what_one_final_output_says(path):
    async with running(path) as service:
        prompt = await service.encode("Hello, world")
        params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, logprobs=1, n=2)
        with service.admit("final", num_sequences=2) as admission:
            stream = admission.generate(prompt, params, kind=OutputKind.FINAL_ONLY, prompt_text="hi")
            [final] = [output async for output in stream]
        texts, ids, logprobs = ["", ""], [[], []], [[], []]
        with service.admit("delta", num_sequences=2) as admission:
            async for output in admission.generate(prompt, params):
                await anyio.sleep(0.01)  # a slow reader: deltas are joined
                for delta in output.outputs:
                    texts[delta.index] += delta.text
                    ids[delta.index] += delta.token_ids
                    logprobs[delta.index] += delta.logprobs
                last = output
        assert last.finished
        assert final.prompt == "hi"
        assert texts == [each.text for each in final.outputs]
        assert ids == [each.token_ids for each in final.outputs]
        assert list(map(keys, logprobs)) == [keys(each.logprobs) for each in final.outputs]


async def test_leaving_frees_everything_at_once(path):
    async with running(path) as service:
        with service.admit("r", num_sequences=2) as admission:
            first = admission.generate([1, 2, 3], LONG)
            second = admission.generate([4, 5], LONG)
            await anext(first)
            await anext(second)
            assert (service.num_open, service.num_running) == (1, 2)
        assert (service.num_open, service.num_running, service.num_waiting) == (0, 0, 0)
        await idle(service)


async def test_cancel_ends_all_streams_with_a_last_output(path):
    async with running(path) as service:
        with service.admit("r", num_sequences=2) as admission:
            streams = [admission.generate([1, 2, 3], LONG), admission.generate([4], LONG)]
            await anext(streams[0])
            assert service.cancel("r", "enough")
            for stream in streams:
                *_, last = [output async for output in stream]
                assert last.finished
                assert last.error == "enough"
                assert last.outputs[-1].finish_reason == "abort"
        assert not service.cancel("r")


async def test_a_prompt_that_comes_after_the_cancel_ends_at_once(path):
    async with running(path) as service:
        with service.admit("r") as admission:
            service.cancel("r", "too late")
            *_, last = [output async for output in admission.generate([1, 2, 3], LONG)]
            assert (last.error, last.outputs[-1].finish_reason) == ("too late", "abort")
            assert len(last.outputs[-1].token_ids) <= 1


async def test_an_id_can_be_open_once_only(path):
    async with running(path) as service:
        with (
            service.admit("same"),
            pytest.raises(InvalidRequestError, match="in use"),
        ):
            service.admit("same")
        with service.admit("same"):
            pass


async def test_work_units_are_capped(path):
    async with running(path) as service:
        with pytest.raises(InvalidRequestError, match=f"at most {MAX_SEQUENCES}"):
            service.admit("r", num_sequences=MAX_SEQUENCES + 1)
        assert service.num_open == 0


async def test_a_refused_prompt_leaves_nothing(path):
    async with running(path) as service:
        with service.admit("r") as admission:
            with pytest.raises(InvalidRequestError, match="temperature"):
                admission.generate([1], SamplingParams(temperature=math.nan))
            with pytest.raises(RequestTooLargeError):
                admission.generate([1] * 300, SamplingParams())
        assert (service.num_open, service.num_waiting) == (0, 0)


async def test_the_queue_is_bounded_by_sequences(path):
    async with running(path, max_num_queued_reqs=3) as service:
        admissions = [service.admit(f"r{i}") for i in range(3)]
        with pytest.raises(OverloadedError, match=r"at most 3 may \(--max-num-queued-reqs\)") as caught:
            service.admit("r3")
        assert caught.value.retry_after >= 1
        for admission in admissions:
            admission.__exit__(None, None, None)
        with service.admit("r4", num_sequences=100):  # an empty queue takes any legal request
            pass


async def test_the_queue_is_bounded_by_tokens(path):
    async with running(path, max_num_queued_tokens=100, max_num_seqs=1) as service:
        with service.admit("a") as first, service.admit("b") as second, service.admit("c") as third:
            stream = first.generate([1] * 90, SamplingParams(max_tokens=25, ignore_eos=True))
            await anext(stream)
            second.generate([2] * 90, LONG.__class__(max_tokens=10))
            with pytest.raises(OverloadedError, match=r"over 100 \(--max-num-queued-tokens\)"):
                third.generate([3] * 90, SamplingParams(max_tokens=1))
            third.generate([3] * 9, SamplingParams(max_tokens=1))
        await idle(service)


async def test_a_request_may_not_take_longer_than_its_time(path):
    async with running(path, request_timeout=30) as service:
        with service.admit("r", timeout=0.05) as admission:
            begin = time.monotonic()
            outputs = []
            stream = admission.generate([1], LONG)
            async for output in stream:
                await anyio.sleep(0.01)
                outputs.append(output)
            assert time.monotonic() - begin < 5
        assert "request_timeout" in outputs[-1].error or len(outputs[-1].outputs[-1].token_ids)
        await idle(service)


async def test_the_time_in_the_queue_is_bounded(path):
    async with running(path, max_num_seqs=1, queue_timeout=0.05) as service:
        with service.admit("a") as first, service.admit("b") as second:
            running_stream = first.generate([1], LONG)
            await anext(running_stream)
            [last] = [output async for output in second.generate([2], LONG)]
            assert "in the queue (queue_timeout)" in last.error
            assert last.outputs[-1].token_ids == []
            *_, end = [output async for output in running_stream]
            assert end.outputs[-1].finish_reason == "length", "who runs is left alone"


async def test_draining_waits_for_the_open_ones(path):
    async with running(path) as service:
        with service.admit("r") as admission:
            stream = admission.generate([1], LONG)
            await anext(stream)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(service.drain, 10.0)
                outputs = [output async for output in stream]
                admission.__exit__(None, None, None)
            assert outputs[-1].outputs[-1].finish_reason == "length"


async def test_draining_ends_what_takes_too_long(path):
    async with running(path) as service:
        with service.admit("r") as admission:
            stream = admission.generate([1], LONG)
            await anext(stream)
            await service.drain(0.0)
            *_, last = [output async for output in stream]
            assert last.finished


async def test_models_are_known_by_their_names(path):
    async with running(path, served_model_name=("x", "y")) as service:
        service.check_model("x")
        service.check_model("y")
        with pytest.raises(ModelNotFoundError, match="'z' is not served here, but 'x', 'y' is"):
            service.check_model("z")


async def test_text_goes_there_and_back(path):
    async with running(path) as service:
        for text in ("short", "long " * 5000):
            ids = await service.encode(text)
            assert await service.decode(ids, skip_special_tokens=True) == text
        for bad in ([-1], [512], [2**40]):
            with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
                await service.decode(bad)


async def test_a_template_that_does_not_end_is_ended(path):
    async with running(path, chat_template_timeout=0.1) as service:
        hf = service.tokenizer.hf
        hf.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        assert await service.render_chat([{"role": "user", "content": "hi"}]) == "hi"
        for name in ("messages", "add_generation_prompt", "self", "tokenize"):
            with pytest.raises(InvalidRequestError, match=name):
                await service.render_chat(
                    [{"role": "user", "content": "hi"}], chat_template_kwargs={name: 1}
                )
        loop = "{% for x in range(9999) %}"
        hf.chat_template = loop * 3 + "{% set y = x %}" + "{% endfor %}" * 3
        begin = time.monotonic()
        with pytest.raises(InvalidRequestError, match="--chat-template-timeout"):
            await service.render_chat([{"role": "user", "content": "hi"}])
        assert time.monotonic() - begin < 5


async def test_events_reach_subscribers_and_watchers(path):
    service = make_service(path)
    seen: list[Any] = []
    types = (RequestFinished, RequestRefused)
    service.subscribe(Subscription("s", lambda batch: seen.extend(batch.events), types, "block"))
    service.want(StepCompleted)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        while service.status.phase is not Phase.READY:
            await anyio.sleep(0.01)
        with pytest.raises(EngineDeadError):
            service.want(StepCompleted)
        async with service.watch(StepCompleted) as events:
            with service.admit("r") as admission:
                async for _ in admission.generate(
                    [1, 2], SamplingParams(max_tokens=3, ignore_eos=True)
                ):
                    pass
            batch = await anext(events)
            assert all(isinstance(event, StepCompleted) for event in batch.events)
        service.refuse("bad", InvalidRequestError("no"))
        await idle(service)
        service.stop()
    assert [(type(event), event.request_id) for event in seen] == [
        (RequestFinished, "r"),
        (RequestRefused, "bad"),
    ]


async def test_streams_end_with_an_error_when_the_engine_dies(path):
    service = make_service(path)
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.run)
            while service.status.phase is not Phase.READY:
                await anyio.sleep(0.01)
            with service.admit("r") as admission:
                stream = admission.generate([1], LONG)
                await anext(stream)

                def explode():
                    raise MemoryError("gone")

                service._engine.core.scheduler.plan = explode
                *_, last = [output async for output in stream]
                assert last.outputs[-1].finish_reason == "error"
                assert "gone" in last.error
            await anyio.sleep(5)
    assert "gone" in str(caught.value.exceptions)
    assert service.status.phase is Phase.FAILED
    with pytest.raises(NotReadyError):
        service.admit("again")


async def test_a_service_that_cannot_start_says_why(path):
    service = make_service(path, kv_cache_memory_bytes=10, num_kv_blocks=None, max_model_len=120)
    with pytest.raises(Exception, match="needs") as caught:
        await service.run()
    assert type(caught.value).__name__ == "CapacityError"
    assert service.status.phase is Phase.FAILED
    assert "needs" in service.status.error


async def test_the_context_length_follows_what_fits(path):
    settings = {"max_model_len": None, "num_kv_blocks": None}
    async with running(path, **settings) as service:
        assert service.limits.max_model_len == 128, "the model's limit, as there is memory for it"
        per_block = service.plan.kv_bytes_per_token * service.plan.block_size
    async with running(path, **settings, kv_cache_memory_bytes=11 * per_block) as service:
        assert service.limits.max_model_len == 10 * service.plan.block_size == 40
        with service.admit("r") as admission:
            params = SamplingParams(max_tokens=39, ignore_eos=True, temperature=0)
            *_, last = [output async for output in admission.generate([1], params)]
            assert last.finished
            with pytest.raises(RequestTooLargeError, match="40"):
                admission.generate([1] * 41, SamplingParams(max_tokens=1))


async def test_a_chat_template_can_come_from_a_file(path, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}, it said")
    async with running(path, chat_template=str(file)) as service:
        assert await service.render_chat([{"role": "user", "content": "Hi"}]) == "Hi, it said"
    with pytest.raises(PlanError, match="there is no such file"):
        await make_service(path, chat_template=str(tmp_path / "absent")).run()
