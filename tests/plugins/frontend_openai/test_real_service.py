"""The same routes over the real service and an engine in a thread."""

from __future__ import annotations

import anyio
import pytest

from core.config import load_config
from core.process import EngineThread
from core.service import Service
from core.status import Phase
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SETTINGS = {
    "served_model_name": "tiny",
    "dtype": "float32",
    "device": "cpu",
    "num_kv_blocks": 128,
    "block_size": 4,
    "max_model_len": 120,
    "plugins": (
        "core.builtin",
        "attention.torch",
        "frontend.openai",
        "no:server.http",
        "no:observe.prometheus",
    ),
}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("openai"), vocab_size=400)
    make_tokenizer("byte-level", folder)
    return folder


@pytest.fixture
async def client(path, client_of):
    service = Service(load_config({"model": str(path), **SETTINGS}), EngineThread())
    (frontend,) = service.make_frontends()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service.run)
        with anyio.fail_after(60):
            while service.status.phase is not Phase.READY:
                await anyio.sleep(0.01)
        yield client_of(service, frontend)
        service.stop()


async def _until_idle(service):
    core = service._engine.core
    with anyio.fail_after(10):
        while core.has_work or core.kv_cache.stats().num_used:
            await anyio.sleep(0.005)


async def test_an_answer_is_the_same_in_one_piece_and_as_a_stream(client, body):
    fields = body("The quick brown fox", n=2, max_tokens=20, temperature=0.7, seed=3)
    whole = await client.run("POST", CHAT, fields)
    stream = await client.run("POST", CHAT, {**fields, "stream": True})
    assert whole.status == 200
    texts = {0: "", 1: ""}
    for chunk in stream.events:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole.json["choices"]]
    await _until_idle(client.service)


async def test_what_the_model_says_by_itself_is_what_it_finds_likeliest(client):
    """Follow an evaluation harness: its test for a greedy continuation compares floats exactly."""
    prompt, fields = [30, 31, 32, 33], {"temperature": 0, "ignore_eos": True}
    told = await client.run(
        "POST", COMPLETIONS, {"prompt": prompt, "max_tokens": 12, "return_token_ids": True, **fields}
    )
    ids = told.json["choices"][0]["token_ids"]
    other = [*ids[:-1], (ids[-1] + 1) % 400]
    fields |= {"echo": True, "logprobs": 1, "max_tokens": 1}
    scored = await client.run("POST", COMPLETIONS, {"prompt": [prompt + ids, prompt + other], **fields})
    is_greedy = []
    for choice in scored.json["choices"]:
        values = choice["logprobs"]["token_logprobs"][len(prompt) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(prompt) : -1]
        assert len(values) == len(ids)
        is_greedy.append(all(v == max(top.values()) for v, top in zip(values, tops, strict=True)))
    assert is_greedy == [True, False]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_blocks(client, body, stream):
    leave = anyio.Event()
    async with anyio.create_task_group() as tasks:
        fields = body(max_tokens=100, ignore_eos=True, stream=stream)
        tasks.start_soon(lambda: client.run("POST", CHAT, fields, leave=leave))
        with anyio.fail_after(10):
            while not client.service.num_running:
                await anyio.sleep(0.001)
        leave.set()
    assert client.service.num_open == 0
    await _until_idle(client.service)


async def test_a_deadline_ends_a_request(client, body):
    fields = body(max_tokens=100, ignore_eos=True, timeout=1e-6)
    reply = await client.run("POST", CHAT, fields)
    assert reply.status == 408
    assert reply.headers["x-should-retry"] == "false"
    await _until_idle(client.service)


async def test_what_the_engine_refuses_is_explained(client, body):
    reply = await client.run("POST", CHAT, body("word " * 200))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    reply = await client.run("POST", COMPLETIONS, {"prompt": [[30], [-1]]})
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    reply = await client.run("POST", COMPLETIONS, {"prompt": [30, 400], "echo": True})
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert client.service.num_open == 0
    await _until_idle(client.service)
