"""The async API: many streams over one engine, on asyncio and trio."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import from_thread

from core import LLM, Engine, SamplingParams
from core.assemble import start_plugins
from core.config import load_config
from core.errors import EngineDeadError, InvalidRequestError, PluginNotFoundError
from core.outputs import OutputKind
from core.process import EngineProcess
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DEVICE = os.environ.get("CYTHERA_TEST_DEVICE", "cpu")

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": DEVICE,
    "max_model_len": 96,
    "num_kv_blocks": 64,
    "block_size": 4,
}

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("async"), vocab_size=400)
    make_tokenizer("byte-level", folder)
    return folder


@pytest.fixture
async def engine(path: Path) -> AsyncIterator[Engine]:
    async with Engine(str(path), **SETTINGS) as engine:
        yield engine


async def wait_until_idle(engine: Engine) -> None:
    with anyio.fail_after(5):
        while engine.core.scheduler.has_work or engine.core.kv_cache.stats().num_used:
            await anyio.sleep(0.002)


async def test_many_streams_get_what_the_offline_api_gives(engine: Engine, path: Path) -> None:
    params = [
        SamplingParams(temperature=i % 3 / 2, max_tokens=4 + i, seed=i, ignore_eos=True)
        for i in range(8)
    ]
    prompts = [f"prompt number {i}" for i in range(8)]
    with LLM(str(path), **SETTINGS) as llm:
        expected = [r.outputs[0].text for r in llm.generate(prompts, params)]
    got = [""] * 8

    async def read(index: int, kind: OutputKind) -> None:
        async for output in engine.generate(prompts[index], params[index], kind=kind):
            for completion in output.outputs:
                is_delta = kind is OutputKind.DELTA
                got[index] = got[index] + completion.text if is_delta else completion.text
        assert output.finished

    kinds = list(OutputKind)
    async with anyio.create_task_group() as tasks:
        for index in range(8):
            tasks.start_soon(read, index, kinds[index % 3])
    assert got == expected
    await wait_until_idle(engine)


async def test_delta_stream_of_n_completions(engine: Engine) -> None:
    params = SamplingParams(n=3, temperature=1.5, max_tokens=7, seed=1, ignore_eos=True, logprobs=1)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ends = dict.fromkeys(tokens, 0)
    async for output in engine.generate("abc", params, kind=OutputKind.DELTA):
        for completion in output.outputs:
            tokens[completion.index] += completion.token_ids
            assert completion.logprobs is not None
            assert len(completion.logprobs) == len(completion.token_ids)
            ends[completion.index] += completion.finish_reason is not None
    assert ends == {0: 1, 1: 1, 2: 1}
    assert {len(t) for t in tokens.values()} == {7}


async def test_leaving_the_iterator_frees_the_blocks(engine: Engine) -> None:
    stream = engine.generate("Once upon a time", SamplingParams(max_tokens=70, ignore_eos=True))
    async for _output in stream:
        break
    await stream.aclose()
    await wait_until_idle(engine)
    assert engine.journal.num_open == 0


async def test_abort_by_id_ends_the_stream(engine: Engine) -> None:
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    with anyio.fail_after(10):
        first = engine.generate("Once", params, "mine")
        await anext(first)
        second = engine.generate("Once", params, "mine")
        with pytest.raises(InvalidRequestError, match="in use"):
            await anext(second)
        await first.aclose()
        async for _output in engine.generate("Once", params, "other"):
            engine.abort("other")
    engine.abort("nobody")
    await wait_until_idle(engine)


async def test_cancelling_a_reader_frees_the_blocks(engine: Engine) -> None:
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            async for _output in engine.generate("x", SamplingParams(max_tokens=80, ignore_eos=True)):
                tasks.cancel_scope.cancel()

        tasks.start_soon(read)
    await wait_until_idle(engine)


async def test_refusals_do_not_disturb_others(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    seen = 0
    async for output in engine.generate("Once", params):
        seen = len(output.outputs[0].token_ids)
        with pytest.raises(InvalidRequestError, match="top_p"):
            await anext(engine.generate("Once", SamplingParams(top_p=0.0)))
    assert seen == 20


async def test_dead_engine_tells_every_stream(path: Path) -> None:
    async with Engine(str(path), **SETTINGS) as engine:

        def explode() -> None:
            raise ZeroDivisionError("a bug in a scheduler")

        stream = engine.generate("Once", SamplingParams(max_tokens=80, ignore_eos=True))
        await anext(stream)
        engine.core.scheduler.plan = explode  # type: ignore[method-assign, assignment]
        with anyio.fail_after(10):
            last = [output async for output in stream][-1]
        assert last.outputs[0].finish_reason == "error"
        assert "a bug in a scheduler" in last.error
        with pytest.raises(EngineDeadError):
            await anext(engine.generate("again"))
    with pytest.raises(EngineDeadError):
        await anext(engine.generate("after the end"))


async def test_no_thread_outlives_the_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A thread that comes back from the event loop while Python shuts down aborts the process.
    run = from_thread.run

    def run_late(*args: Any, **options: Any) -> None:
        run(*args, **options)
        time.sleep(0.2)

    monkeypatch.setattr(from_thread, "run", run_late)
    async with Engine(str(path), **SETTINGS):
        pass
    assert not [t.name for t in threading.enumerate() if t.name.startswith("engine")]
    with pytest.raises(PluginNotFoundError):
        async with Engine(str(path), **SETTINGS, quantization="nonsense"):
            pass
    assert not [t.name for t in threading.enumerate() if t.name.startswith("engine")]


async def test_an_engine_whose_thread_cannot_be_started(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "engine-link":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        async with Engine(str(path), **SETTINGS):
            pass


async def test_an_engine_whose_process_cannot_be_started(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    config = load_config({"model": str(path), **SETTINGS})
    engine = Engine.over(config, EngineProcess(), start_plugins(config))
    with pytest.raises(OSError, match="no more processes"):
        async with engine:
            pass
    assert not [t.name for t in threading.enumerate() if t.name.startswith("engine")]
