"""The command `serve`: phases, the OpenAI client, draining, deaths, and starts that fail."""

from __future__ import annotations

import json
import signal
import time

import openai
import psutil
import pytest
from server_process import ServerProcess

from core import LLM, SamplingParams
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

FLAGS = (
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--num-kv-blocks",
    "512",
    "--served-model-name",
    "tiny",
)
SETTINGS = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 512}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("serve") / "model", vocab_size=512)
    make_tokenizer("byte-level", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def early():
    """What a server said before it was ready."""
    return {}


@pytest.fixture(scope="module")
def server(model, early, tmp_path_factory):
    with ServerProcess(model, *FLAGS, folder=tmp_path_factory.mktemp("out")) as server:
        server.wait_until_listening()
        early["livez"] = server.get("/livez")
        early["readyz"] = server.get("/readyz")
        early["completion"] = server.get("/v1/completions", {"prompt": "x", "max_tokens": 1})
        yield server.wait_until_ready()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until_idle(server):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        load = json.loads(server.get("/load")[2])["server_load"]
        metrics = server.get("/metrics")[2].decode()
        usage = [
            line for line in metrics.splitlines() if line.startswith("cythera:kv_cache_usage_perc")
        ]
        if load == 0 and usage[0].endswith(" 0.0"):
            return
        time.sleep(0.05)
    pytest.fail(f"still busy: {load} requests, {usage}")


def test_the_port_answers_while_the_model_loads(server, early):
    assert early["livez"][0] == 200
    assert early["readyz"][0] == 503
    assert set(json.loads(early["readyz"][2])) >= {"phase", "percent"}
    status, headers, body = early["completion"]
    assert status == 503
    assert int(headers["Retry-After"]) >= 1
    assert "not ready" in json.loads(body)["error"]["message"]


def test_start_output_is_one_screen_that_says_it_all(server):
    text = server.errors
    assert len(text.splitlines()) <= 40
    for part in ("tiny", "attention.torch", "default", server.url, "KV", "context", "curl", "API key"):
        assert part in text, part


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "cythera")
    assert client.models.retrieve("tiny").max_model_len == 128
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completions_equal_the_offline_api(client, model):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(model), **SETTINGS) as llm:
        expected = llm.generate(["Hello world"], params)[0].outputs[0]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny",
            prompt="Hello world",
            temperature=0,
            max_tokens=12,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert text == expected.text


def test_chat_streams_what_it_answers_at_once(client):
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi there"}],
        "temperature": 0,
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant"
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 10
    tokens = [entry.token for c in choices if c.logprobs for entry in c.logprobs.content]
    assert tokens == [entry.token for entry in whole.choices[0].logprobs.content]
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)


def test_n_and_stop_and_unknown_fields(client):
    free = client.completions.create(
        model="tiny", prompt="abc", temperature=0, max_tokens=30, extra_body={"ignore_eos": True}
    )
    stop = free.choices[0].text[8:11]
    answer = client.completions.create(
        model="tiny",
        prompt="abc",
        temperature=0,
        max_tokens=30,
        n=2,
        stop=[stop],
        extra_body={"ignore_eos": True, "flavour": "odd"},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert all(stop not in choice.text for choice in answer.choices)
    assert any("flavour" in warning for warning in answer.warnings)


def test_errors_are_those_that_clients_know(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert caught.value.body["param"] == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="128"):
        client.completions.create(model="tiny", prompt=[1] * 500)


def test_closing_a_stream_frees_its_blocks(client, server):
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until_idle(server)


def test_cancel_by_id_ends_the_stream(server):
    with server.open_stream(max_tokens=120, request_id="mine") as stream:
        server.wait_for_token(stream)
        status, _, _ = server.get("/v1/requests/mine/cancel", {})
        rest = stream.read()
        assert status in (200, 404)  # it may have come to its end
        assert b"[DONE]" in rest
    assert server.get("/v1/requests/mine/cancel", {})[0] == 404
    wait_until_idle(server)


def test_nothing_but_the_port_listens(server):
    processes = [psutil.Process(server.process.pid), server.engine]
    listening = [
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [server.port]


def test_at_idle_it_uses_no_cpu_to_speak_of(server):
    wait_until_idle(server)
    time.sleep(0.5)
    processes = [psutil.Process(server.process.pid), server.engine]

    def used():
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = used()
    time.sleep(2)
    assert used() - before <= 0.04


def test_sigterm_lets_open_requests_finish(model, tmp_path):
    with ServerProcess(model, *FLAGS, folder=tmp_path) as server:
        server.wait_until_ready()
        with server.open_stream(max_tokens=100) as stream:
            server.wait_for_token(stream)
            engine = server.engine
            server.process.send_signal(signal.SIGTERM)
            assert b'"finish_reason":"length"' in stream.read()
        assert server.process.wait(20) == 0
        assert not engine.is_running()


def test_the_death_of_the_engine_is_told_to_everybody(model, tmp_path):
    with ServerProcess(model, *FLAGS, folder=tmp_path) as server:
        server.wait_until_ready()
        with server.open_stream(max_tokens=120) as stream:
            server.wait_for_token(stream)
            server.engine.kill()
            assert b'"error"' in stream.read()
        assert server.process.wait(20) == 1
        last = server.errors.splitlines()[-10:]
        assert any("error: the engine's process was killed" in line for line in last), server.errors


def test_when_the_server_is_killed_its_engine_ends(model, tmp_path):
    with ServerProcess(model, *FLAGS, folder=tmp_path) as server:
        server.wait_until_ready()
        engine = server.engine
        server.process.kill()
        engine.wait(15)


def test_a_signal_while_loading_stops_it(model, tmp_path):
    with ServerProcess(model, *FLAGS, folder=tmp_path) as server:
        server.wait_until_listening()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) in (0, 130)  # 130 before it has begun to listen for signals


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["MODEL", "--host", "0.0.0.0"], 2, "--api-key"),  # noqa: S104  it is refused
        (["MODEL", "--plugins", "frontend.opena1"], 3, "frontend.openai"),
        (["MODEL", "--kv-cache-memory-bytes", "1000", "--max-model-len", "128"], 6, "--max-model-len"),
    ],
)
def test_a_failed_start_ends_with_what_to_do(model, tmp_path, arguments, code, part):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    with ServerProcess(*arguments, folder=tmp_path) as server:
        assert server.process.wait(60) == code, server.errors
        lines = server.errors.splitlines()
        begin = next(index for index, line in enumerate(lines) if line.startswith("error: "))
        assert len(lines) - begin <= 10
        assert part in "\n".join(lines[begin:])
        assert "Traceback" not in server.errors


def test_a_taken_port_is_named(server, model, tmp_path):
    with ServerProcess(model, folder=tmp_path, port=server.port) as second:
        assert second.process.wait(30) == 2
        assert f"port {server.port}" in second.errors
