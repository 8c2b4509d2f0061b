"""Latency and throughput with an executor that computes nothing, and the folders of models."""

from __future__ import annotations

import json
import os

import pytest

from core.assemble import make_plan
from core.bench import latency, offline, shapes, throughput
from core.bench.latency import BatchLatency, LatencyOptions
from core.bench.null_executor import NAME
from core.bench.workloads import Dataset, uniform
from core.cli import main
from core.config import load_config
from core.errors import ConfigError

NULL = {"model": "demo", "plugins": (NAME,), "executor": "null", "device": "cpu", "log_level": "error"}
FLAGS = ["demo", "--plugins", NAME, "--executor", "null", "--device", "cpu", "--log-level", "error"]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CYTHERA_")]:
        monkeypatch.delenv(name)


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "rows", "tokens"), [(128, 128, 2048), (129, 1024, 2048), (4000, 4000, 8192)]
)
def test_a_batch_gets_the_rows_and_tokens_that_it_needs(batch_size, rows, tokens):
    config = offline.adapt_to_batch(load_config(NULL), batch_size)
    assert config.enable_prefix_caching is False
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (rows, tokens)
    # What is unset may still become more where the device has other defaults; what is needed stays.
    is_set = config.origin_of("max_num_seqs") != "default"
    assert is_set == (batch_size > 128)


def test_what_somebody_has_set_stays():
    stated = load_config({**NULL, "enable_prefix_caching": True, "max_num_seqs": 9})
    kept = offline.adapt_to_batch(stated, 9)
    assert (kept.enable_prefix_caching, kept.max_num_seqs) == (True, 9)
    assert kept.origin_of("max_num_seqs") == "argument max_num_seqs"
    few = load_config({**NULL, "max_num_batched_tokens": 200})
    assert offline.adapt_to_batch(few, 150).max_num_seqs == 200


def test_a_batch_that_a_setting_splits_is_refused():
    config = load_config({**NULL, "max_num_seqs": 4})
    with pytest.raises(ConfigError, match=r"batch of 5 .* max_num_seqs = 4 \(argument max_num_seqs\)"):
        offline.adapt_to_batch(config, 5)


# --- latency ---------------------------------------------------------------------------------------


def test_time_per_token_is_a_difference_of_the_best_runs():
    options = LatencyOptions(output_len=145)
    assert options.short_len == 17
    result = BatchLatency(options, 8, [3.0, 2.28, 2.5], [1.0, 1.5, 1.2], [0.2, 0.1, 0.9])
    assert result.seconds_per_token == pytest.approx(1.28 / 128)
    assert result.seconds_to_first == 0.2
    assert result.tokens_per_second == pytest.approx(8 * 145 / ((3.0 + 2.28 + 2.5) / 3))


@pytest.mark.parametrize(
    ("output_len", "short_len"), [(1, 1), (2, 1), (3, 1), (33, 16), (34, 17), (1000, 17)]
)
def test_length_of_the_short_runs(output_len, short_len):
    assert LatencyOptions(output_len=output_len).short_len == short_len


def test_one_token_has_no_time_per_token():
    result = BatchLatency(LatencyOptions(output_len=1), 1, [1.0], [1.0], [1.0])
    assert result.seconds_per_token is None
    assert "per output token" not in latency.report([result])
    assert result.to_dict()["ms_per_output_token"] is None


def test_runs_are_those_that_were_asked_for(monkeypatch):
    seen = []

    def generate(_llm, requests):
        seen.append(requests)
        return 0, 0

    monkeypatch.setattr(latency, "generate", generate)
    options = LatencyOptions(
        input_len=9, output_len=40, batch_sizes=(2, 3), num_iters=2, num_iters_warmup=1, seed=5
    )
    results = latency.measure(load_config(NULL), options)
    lengths = [40, 40, 17, 1, 40, 17, 1]
    expected = [
        uniform(size, 9, length, vocab_size=4096, seed=5) for size in (2, 3) for length in lengths
    ]
    assert seen == expected
    for result in results:
        for times in (result.latencies, result.short_latencies, result.first_latencies):
            assert len(times) == 2


def test_latency_command(tmp_path, capsys):
    file, plot = tmp_path / "new" / "r.json", tmp_path / "p.png"
    options = [
        "--batch-size",
        "1,2",
        "--output-len",
        "6",
        "--num-iters",
        "2",
        "--num-iters-warmup",
        "0",
    ]
    assert (
        main(["bench", "latency", *FLAGS, *options, "--output-json", str(file), "--plot", str(plot)])
        == 0
    )
    out = capsys.readouterr().out
    for label in (
        "Avg latency: ",
        "10% percentile latency: ",
        "99% percentile latency: ",
        "Time to first token: ",
        "(batch of 2, 32 tokens in, 6 less 3 out)",
    ):
        assert label in out
    result = json.loads(file.read_text())
    assert [run["batch_size"] for run in result["runs"]] == [1, 2]
    assert set(result["runs"][0]["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert plot.stat().st_size > 1000


def test_one_batch_size_has_the_keys_at_the_top(tmp_path):
    file = tmp_path / "r.json"
    options = ["--batch-size", "3", "--output-len", "2", "--num-iters", "1", "--num-iters-warmup", "0"]
    assert main(["bench", "latency", *FLAGS, *options, "--output-json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["avg_latency"] == result["latencies"][0] == result["percentiles"]["50"]
    assert (result["batch_size"], result["output_len"]) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-iters", "0"], "--num-iters 0 must be at least 1"),
        (["--output-len", "0"], "--output-len 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size '0' must be positive"),
        (["--batch-size", "1.5"], "--batch-size '1.5' must be whole"),
        (["--plot", "x.bmp"], "--plot x.bmp must end with"),
        (["--max-num-seqs", "2", "--batch-size", "3"], "a batch of 3 cannot run as one"),
    ],
)
def test_latencies_that_cannot_be_measured(arguments, message, capsys):
    assert main(["bench", "latency", *FLAGS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", "latency", *FLAGS, "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib: pip install cythera[bench]" in capsys.readouterr().err


# --- throughput ------------------------------------------------------------------------------------


def test_throughput_counts_what_was_generated():
    dataset = Dataset(num_prompts=6, input_len=20, output_len=5, range_ratio=0.5, vocab_size=4096)
    result = throughput.measure(load_config(NULL), dataset, num_warmups=2)
    requests = dataset.requests()
    assert result.num_requests == 6
    assert result.num_prompt_tokens == sum(len(request.prompt) for request in requests)
    assert result.num_output_tokens == sum(request.output_len for request in requests)


def test_throughput_command(tmp_path, capsys):
    file = tmp_path / "r.json"
    options = [
        "--num-prompts",
        "4",
        "--input-len",
        "8",
        "--output-len",
        "3",
        "--output-json",
        str(file),
    ]
    assert main(["bench", "throughput", *FLAGS, *options]) == 0
    out = capsys.readouterr().out.splitlines()
    words = out[0].split()
    assert (words[0], words[2], words[4:6], words[7:]) == (
        "Throughput:",
        "requests/s,",
        ["total", "tokens/s,"],
        ["output", "tokens/s"],
    )
    assert out[1:] == ["Total num prompt tokens:  32", "Total num output tokens:  12"]
    result = json.loads(file.read_text())
    assert (result["num_requests"], result["total_num_tokens"]) == (4, 44)
    assert result["tokens_per_second"] == pytest.approx(44 / result["elapsed_time"])


def test_answers_of_conversations_are_measured_with_the_models_tokenizer(tmp_path):
    file = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "def f("}, {"from": "gpt", "value": "return x + 1"}]
    file.write_text(json.dumps({"conversations": turns}))
    dataset = Dataset(name="custom", num_prompts=3, path=file)
    result = throughput.measure(load_config(NULL), dataset, num_warmups=0)
    assert result.num_output_tokens % 3 == 0
    assert 3 < result.num_output_tokens < 40


# --- folders of models -----------------------------------------------------------------------------


@pytest.mark.parametrize("quant", shapes.QUANTIZATION)
def test_a_model_without_weights_can_be_planned(quant, tmp_path, capsys):
    folder = tmp_path / "m"
    assert main(["bench", "model", str(folder), "--quant", quant, "--max-len", "512"]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'config.json'}\n"
    plan = make_plan(load_config({"model": str(folder), "load_format": "dummy", "device": "cpu"}))
    assert plan.model.num_parameters() == 8_030_261_248  # as the publisher counts them
    assert plan.max_model_len == 512
    assert plan.choices["quant"].name == (quant if quant in ("fp8", "awq", "gptq") else "none")


@pytest.mark.parametrize(
    ("size", "billions"),
    [("7b", 6.74), ("13b", 13.02), ("34b", 33.74), ("70b", 70.55), ("405b", 405.85)],
)
def test_sizes_are_those_of_the_models(size, billions, tmp_path):
    shapes.write_model(tmp_path, size)
    plan = make_plan(load_config({"model": str(tmp_path), "load_format": "dummy", "device": "cpu"}))
    assert plan.model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)


def test_another_model_is_not_overwritten(tmp_path):
    shapes.write_model(tmp_path, "8b")
    shapes.write_model(tmp_path, "8b")
    with pytest.raises(ConfigError, match="holds another model"):
        shapes.write_model(tmp_path, "7b")
    with pytest.raises(ConfigError, match="--size 9b is unknown"):
        shapes.write_model(tmp_path, "9b")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        shapes.write_model(blocked, "8b")
