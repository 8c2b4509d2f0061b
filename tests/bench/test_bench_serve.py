from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.bench import serving
from core.bench.client import StreamClient
from core.bench.serving import Load, file_name, make_body, run_load
from core.bench.workloads import BenchRequest, seed_mix, shift, uniform
from core.cli import main
from core.errors import ConfigError, CytheraError


class Handler(BaseHTTPRequestHandler):
    """Answers like a server of completions: as many tokens as asked for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b'{"object": "list", "data": [{"id": "tiny"}]}' if self.path == "/v1/models" else b"{}"
        self._reply(200, body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.num_open += 1
            self.server.most_open = max(self.server.most_open, self.server.num_open)
            must_fail = len(self.server.seen) in self.server.failing
        self.server.meet()
        with self.server.lock:  # before the client can hear of the end
            self.server.num_open -= 1
        if must_fail:
            self._reply(503, b'{"error": {"message": "busy"}}')
        else:
            self._stream(body)

    def _reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, body):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body.get("max_tokens") or body["max_completion_tokens"]
        choice = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
        usage = {"prompt_tokens": len(body.get("prompt", "abc")), "completion_tokens": count}
        events = [{"choices": [choice]}] * count + [{"choices": [], "usage": usage}]
        for data in [*map(json.dumps, events), "[DONE]"]:
            text = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.num_open, server.most_open = [], 0, 0
        server.lock, server.failing, server.meet = threading.Lock(), (), lambda: None
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_keys_of_the_machine(monkeypatch):
    for name in ("CYTHERA_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def bench(server, *arguments, count=5):
    words = ["--base-url", server.url, "--num-prompts", count, "--input-len", 9, "--output-len", 3]
    return main(["bench", "serve", *map(str, [*words, *arguments])])


def bodies(server):
    return [body for _, _, body in server.seen]


# --- what is sent ----------------------------------------------------------------------------------


def test_prompts_go_out_as_token_ids(server, capsys):
    assert bench(server, "--seed", "3", "--vocab-size", "50") == 0
    expected = uniform(5, 9, 3, vocab_size=50, seed=3)
    assert sorted(body["prompt"] for body in bodies(server)) == sorted(r.prompt for r in expected)
    assert {path for path, _, _ in server.seen} == {"/v1/completions"}
    body = bodies(server)[0]
    del body["prompt"]
    assert body == {
        "model": "tiny",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    out = capsys.readouterr().out.splitlines()
    assert out[1].split(":")[1].strip() == "5"
    assert "Total generated tokens:                  15        " in out


def test_the_mix_is_sent_with_its_lengths(server):
    assert main(["bench", "serve", "--base-url", server.url, "--dataset-name", "seed-mix",
                 "--num-prompts", "4"]) == 0  # fmt: skip
    sent = sorted((body["prompt"], body["max_tokens"]) for body in bodies(server))
    assert sent == sorted((r.prompt, r.output_len) for r in seed_mix(4))


def test_fields_and_headers_can_be_added(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    extra = '{"temperature": 0.5, "top_k": 3}'
    options = ["--extra-body", extra, "--header", "X-One=1", "X-Two=b=c", "--no-ignore-eos"]
    assert bench(server, "--model", "other", *options) == 0
    _, headers, body = server.seen[0]
    assert (body["model"], body["temperature"], body["top_k"]) == ("other", 0.5, 3)
    assert "ignore_eos" not in body
    assert (headers["X-One"], headers["X-Two"]) == ("1", "b=c")
    assert headers["Authorization"] == "Bearer secret"


def test_text_goes_to_the_chat_route(server, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "hello", "output_tokens": 2}\n')
    options = ["--dataset-name", "custom", "--dataset-path", file, "--endpoint", "/v1/chat/completions"]
    assert bench(server, *options) == 0
    [(path, _, body), *_] = server.seen
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert body["max_completion_tokens"] == 2


def test_warm_ups_and_the_first_look_leave_nothing_in_a_prefix_cache(server):
    assert bench(server, "--num-warmups", "2", "--ready-check-timeout-sec", "5") == 0
    prompts = [tuple(body["prompt"][:4]) for body in bodies(server)]
    assert len(prompts) == 1 + 2 + 5
    assert set(prompts[3:]).isdisjoint(prompts[:3])
    assert bodies(server)[0]["max_tokens"] == 1


def test_rates_differ_in_their_tokens_but_not_in_their_lengths(server):
    assert bench(server, "--request-rate", "500,inf", "--random-range-ratio", "0.5") == 0
    first, second = (
        sorted((len(b["prompt"]), b["max_tokens"]) for b in part)
        for part in (bodies(server)[:5], bodies(server)[5:])
    )
    assert first == second
    prompts = {tuple(body["prompt"]) for body in bodies(server)}
    assert len(prompts) == 10


# --- how it is sent --------------------------------------------------------------------------------


def test_concurrency_has_its_limit(server):
    two = threading.Barrier(2, timeout=30)
    server.meet = lambda: (two.wait(), time.sleep(0.05))  # long enough for a third one to come
    assert bench(server, "--max-concurrency", "2", count=6) == 0
    assert server.most_open == 2


def test_without_a_limit_all_are_open_at_once(server):
    server.meet = threading.Barrier(5, timeout=30).wait
    assert bench(server) == 0
    assert server.most_open == 5


def test_requests_start_at_their_times(monkeypatch):
    async def stream(_client, _body, record):
        record.start = time.perf_counter()
        record.chunk_times = [record.start]
        record.output_len = 1

    monkeypatch.setattr(StreamClient, "stream", stream)
    load = Load(base_url="http://a", model="m", has_progress=False)
    result = run_load(load, uniform(20, 3, 1), 200.0)
    due = serving.arrivals(20, 200.0)
    for start, moment in zip(result["start_times"], due, strict=True):
        assert start >= moment  # never early
    assert result["request_rate"] == 200.0


# --- what is made of it ----------------------------------------------------------------------------


def test_files_of_results(server, tmp_path):
    options = ["--save-result", "--result-dir", tmp_path, "--label", "mine", "--metadata", "a=1", "b=x"]
    assert bench(server, *options, "--goodput", "ttft:5000", "tpot:5000") == 0
    [file] = tmp_path.iterdir()
    assert file.name.startswith("mine-infqps-tiny-")
    result = json.loads(file.read_text())
    assert (result["a"], result["b"], result["label"]) == ("1", "x", "mine")
    assert (result["request_rate"], result["burstiness"]) == ("inf", 1.0)
    assert (result["completed"], result["total_output_tokens"]) == (5, 15)
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert "p99_ttft_ms" in result
    assert "ttfts" not in result


def test_detailed_files_and_pictures(server, tmp_path):
    pictures = ["--plot", tmp_path / "plot.svg", "--plot-timeline"]
    options = ["--save-detailed", "--result-dir", tmp_path / "new", "--result-filename", "r.json"]
    assert bench(server, *options, *pictures) == 0
    result = json.loads((tmp_path / "new" / "r.json").read_text())
    assert result["output_lens"] == [3] * 5
    assert result["generated_texts"] == ["xxx"] * 5
    assert [len(itls) for itls in result["itls"]] == [2] * 5
    assert (tmp_path / "new" / "r.timeline.png").stat().st_size > 1000
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_a_file_for_each_rate_and_one_picture(server, tmp_path):
    options = ["--save-result", "--result-dir", tmp_path, "--result-filename", "r.json"]
    assert bench(server, "--request-rate", "900,inf", *options, "--plot", tmp_path / "p.png") == 0
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"r-900.0qps.json", "r-infqps.json", "p.png"}


def test_some_failures_are_told(server, capsys):
    server.failing = (2, 3)
    assert bench(server) == 0
    captured = capsys.readouterr()
    assert "Failed requests:                         2         " in captured.out
    assert '2 requests failed, the first one: HTTP status 503: {"error"' in captured.err


def test_nothing_but_failures_is_an_error(server, capsys):
    server.failing = range(100)
    assert bench(server) == 1
    assert "error: every request failed: HTTP status 503" in capsys.readouterr().err
    assert bench(server, "--ready-check-timeout-sec", "0.01") == 1
    assert "did not answer within 0.01 s (--ready-check-timeout-sec)" in capsys.readouterr().err
    assert bench(server, "--num-warmups", "1") == 1
    assert "a warm-up request failed: HTTP status 503" in capsys.readouterr().err


def test_names_of_files():
    result = {"max_concurrency": 8, "model_id": "org/m", "request_rate": 2.0, "date": "d",
              "endpoint_type": "openai"}  # fmt: skip
    assert file_name(result, "") == "openai-2.0qps-concurrency8-m-d.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "9"], "names no model"),
        (["--model", "m", "--base-url", "nowhere"], "--base-url 'nowhere'"),
        (["--model", "m", "--request-rate", "0"], "--request-rate '0' must be positive"),
        (["--model", "m", "--request-rate", "a"], "--request-rate 'a' must be numbers"),
        (["--model", "m", "--max-concurrency", "0"], "--max-concurrency 0"),
        (["--model", "m", "--plot", "a.gif"], "must end with one of"),
        (["--model", "m", "--metadata", "a"], "--metadata 'a' must be KEY=VALUE"),
        (["--model", "m", "--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["--model", "m", "--extra-body", "{"], "--extra-body is not JSON"),
        (["--model", "m", "--endpoint", "/v1/chat/completions"], "takes text"),
        (["--model", "m", "--goodput", "a:1"], "--goodput 'a:1'"),
    ],
)
def test_what_cannot_be_run(arguments, message, capsys):
    assert main(["bench", "serve", "--num-prompts", "1", "--input-len", "2", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_bodies_of_either_route():
    load = Load(base_url="http://a", model="m", endpoint="/v1/chat/completions")
    with pytest.raises(ConfigError, match="custom"):
        make_body(load, BenchRequest([1, 2], 3))
    assert json.loads(make_body(load, BenchRequest("hi", 3)))["max_completion_tokens"] == 3


def test_a_model_is_found_or_asked_for(server):
    assert serving.find_model(server.url, {}) == "tiny"
    with pytest.raises(CytheraError, match="name it with --model"):
        serving.find_model(server.url + "/other", {})


def test_the_first_rate_has_the_requests_of_the_data_set():
    requests = uniform(2, 5, 1)
    assert shift(requests, 0, 32000) == requests
