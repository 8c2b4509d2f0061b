"""Other people's clients, unmodified, against the server; run by scripts/test-clients."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from server_process import ServerProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

CLIENTS = os.environ.get("TEST_CLIENTS")
pytestmark = [
    pytest.mark.skipif(not CLIENTS, reason="needs the clients: scripts/test-clients"),
    pytest.mark.timeout(600),
]
FLAGS = (
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--num-kv-blocks",
    "2048",
    "--served-model-name",
    "tiny",
)
SAMPLES = [
    ("Hello", " world and all"),
    ("def read(path):", "\n    return path"),
    ("A", " b"),
    ("The quick brown fox", " jumps over the lazy dog"),
]
TASK = """
task: local_loglikelihood
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{ctx}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint("llama3", tmp_path_factory.mktemp("clients") / "model", vocab_size=512)
    make_tokenizer("byte-level", folder)
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with ServerProcess(model, *FLAGS, folder=tmp_path_factory.mktemp("out")) as server:
        yield server.wait_until_ready()


def run(name, *arguments, folder):
    """Run a client in a folder; its output, if it ends with success."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603  a client of the list in requirements.txt
        [Path(CLIENTS) / name, *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def loglikelihoods(model):
    """Natural log-probability of each target after its context, and whether it is the greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for context, target in SAMPLES:
        encode = partial(tokenizer.encode, add_special_tokens=False)  # as lm-eval does
        start = len(encode(context))
        ids = torch.tensor([encode(context + target)])
        with torch.inference_mode():
            logprobs = network(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        wanted = ids[0, start:]
        chosen = logprobs.gather(-1, wanted[:, None]).sum().item()
        yield chosen, bool((logprobs.argmax(-1) == wanted).all())


def test_lm_eval_measures_what_transformers_computes(server, model, tmp_path):
    data = tmp_path / "samples.jsonl"
    lines = [json.dumps({"ctx": context, "target": target}) for context, target in SAMPLES]
    data.write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": model,
        "num_concurrent": 2,
        "max_length": 128,
    }
    run(
        "lm_eval",
        "run",
        "--model=local-completions",
        f"--model_args={','.join(f'{key}={value}' for key, value in arguments.items())}",
        "--tasks=local_loglikelihood",
        f"--include_path={tmp_path}",
        "--output_path=out",
        "--log_samples",
        folder=tmp_path,
    )
    [file] = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
    for sample, (logprob, is_greedy) in zip(samples, loglikelihoods(model), strict=True):
        found, found_greedy = sample["resps"][0][0]
        assert float(found) == pytest.approx(logprob, abs=1e-3)
        assert found_greedy == str(is_greedy)


def test_guidellm_measures_without_an_error(server, model, tmp_path):
    run(
        "guidellm",
        "run",
        f"--backend=kind=openai_http,target={server.url},model=tiny",
        "--profile=kind=concurrent,streams=4",
        "--constraint=kind=max_requests,count=12",
        f"--tokenizer=kind=huggingface_auto,model={model}",
        "--data=kind=synthetic_text,prompt_tokens=16,output_tokens=12",
        "--output=kind=json,path=report.json",
        "--disable-progress",
        folder=tmp_path,
    )
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    counts = {key: len(value) for key, value in benchmark["requests"].items() if value is not None}
    assert counts == {"successful": 12, "errored": 0, "incomplete": 0}


def test_schemathesis_finds_no_breach(server, tmp_path):
    checks = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
    output = run(
        "schemathesis",
        "run",
        f"{server.url}/openapi.json",
        "--max-examples=50",
        f"--checks={','.join(checks)},content_type_conformance",
        folder=tmp_path,
    )
    assert "passed" in output
    assert server.get("/health")[0] == 200
