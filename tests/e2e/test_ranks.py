"""Several ranks as real processes: the same tokens as one, and the end of one is not the end of all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from server_process import ServerProcess

from core import LLM, SamplingParams
from core.errors import CytheraError
from core.plan import Plan
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer

PROMPTS = [[7, 3, 9, 11, 5], list(range(4, 44)), [100], [8] * 17]
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "num_kv_blocks": 40,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
RANDOM = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Give a variant's checkpoint with a tokenizer."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = make_checkpoint(variant, folder, vocab_size=512)
            make_tokenizer("byte-level", folder)
        return made[variant]

    return get


def generate(model, **changes):
    with LLM(str(model), **{**SETTINGS, **changes}) as llm:
        outputs = llm.generate(PROMPTS, [GREEDY, GREEDY, RANDOM, GREEDY])
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("llama-many-heads", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("qwen3", {"tensor_parallel_size": 3}),
        ("gemma3", {"pipeline_parallel_size": 3}),
    ],
)
def test_processes_draw_the_tokens_of_one(variant, sizes, folders):
    model = folders(variant)
    assert generate(model, **sizes) == generate(model)


def test_too_many_ranks_are_refused_by_the_plan(folders):
    from core.errors import PlanError  # noqa: PLC0415  beside its only use

    with pytest.raises(PlanError, match="--tensor-parallel-size 5 is more than the 4 query heads"):
        LLM(str(folders("qwen3")), **SETTINGS, tensor_parallel_size=5)
    with pytest.raises(PlanError, match="--pipeline-parallel-size 3 is more than the 2 layers"):
        LLM(str(folders("qwen3")), **SETTINGS, pipeline_parallel_size=3)


def test_ranks_that_come_to_another_plan_are_refused(folders, monkeypatch):
    monkeypatch.setattr(Plan, "digest", lambda _plan: "of another version")
    with pytest.raises(CytheraError, match=r"rank \d came to another plan than the engine"):
        LLM(str(folders("qwen3")), **SETTINGS, tensor_parallel_size=2)


# --- a server --------------------------------------------------------------------------------------


def ranks_of(process):
    """Find the processes of the ranks below a process, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "core.ranks.worker" in child.cmdline()]
    return sorted(workers, key=lambda worker: worker.create_time())


def complete(server, num_tokens=24):
    """Return the text that a prompt is completed with."""
    body = {"prompt": "Hello", "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    status, _, answer = server.get("/v1/completions", body, {"content-type": "application/json"})
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["text"]


def test_a_server_survives_its_ranks(folders, tmp_path):
    flags = [*FLAGS, "-tp", "2", "--rank-timeout", "5"]
    with ServerProcess(folders("llama3"), *flags, folder=tmp_path) as server:
        server.wait_until_ready()
        text = complete(server, 50)
        for victim, number in ((0, signal.SIGKILL), (1, signal.SIGSTOP)):
            with server.open_stream(max_tokens=50, temperature=0) as stream:
                server.wait_for_token(stream)
                before = ranks_of(server.process)
                before[victim].send_signal(number)
                lines = [line for line in stream if line.startswith(b"data: {")]
            assert b'"finish_reason":"length"' in lines[-1]
            after = ranks_of(server.process)
            assert len(after) == 2
            assert {rank.pid for rank in after}.isdisjoint(rank.pid for rank in before)
            assert complete(server, 50) == text
        assert f"rank {0} (pid" in server.errors
        last = ranks_of(server.process)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    psutil.wait_procs(last, timeout=5)
    assert not any(rank.is_running() for rank in last)


def test_ranks_end_with_their_engine(folders, tmp_path):
    with ServerProcess(folders("llama3"), *FLAGS, "-tp", "2", folder=tmp_path) as server:
        server.wait_until_ready()
        ranks = ranks_of(server.process)
        server.engine.kill()
        assert server.process.wait(20) == 1
        gone, alive = psutil.wait_procs(ranks, timeout=5)
        assert len(gone) == 2
        assert not alive


# --- several machines ------------------------------------------------------------------------------

KEY = {"CYTHERA_CLUSTER_KEY": "open sesame"}


def start_agent(model, log, prefix=(), env=None, **flags):
    """Start `serve` on a machine that joins."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [*prefix, sys.executable, "-m", "core", "serve", str(model), *FLAGS, *options]
    with log.open("w") as stderr:
        return subprocess.Popen(  # noqa: S603  our own interpreter and module
            command, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or KEY)}
        )


def free_port():
    import socket  # noqa: PLC0415  beside its only use

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_second_machine_joins_with_the_key(folders, tmp_path):
    model = folders("llama3")
    common = {"master_port": free_port(), "nnodes": 2, "tensor_parallel_size": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    wrong = start_agent(
        model, tmp_path / "wrong", env={"CYTHERA_CLUSTER_KEY": "guess"}, node_rank=1, **common
    )
    with ServerProcess(model, *FLAGS, *options, folder=tmp_path, env=KEY) as server:
        assert wrong.wait(60) == 1
        assert "check --cluster-key" in (tmp_path / "wrong").read_text()
        agent = start_agent(model, tmp_path / "agent", node_rank=1, **common)
        server.wait_until_ready()
        text = complete(server)
        (remote,) = ranks_of(agent)
        remote.kill()
        assert complete(server) == text
        assert "(node 1 at 127.0.0.1, local rank 0) died of signal 9" in server.errors
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert agent.wait(20) == 0


def can_make_namespaces():
    if os.name != "posix" or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "cythera-probe"], capture_output=True, check=False)  # noqa: S607
    subprocess.run(["ip", "netns", "del", "cythera-probe"], capture_output=True, check=False)  # noqa: S607
    return made.returncode == 0


@pytest.fixture
def two_hosts():
    """Make two hosts with a wire between them: network namespaces and a pair of virtual devices."""
    if not can_make_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    names = [f"cythera-{os.getpid()}-{index}" for index in range(2)]
    devices = [f"cy{os.getpid() % 100000}{index}" for index in range(2)]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True)  # noqa: S603, S607

    try:
        for name in names:
            ip("netns", "add", name)
        wire = [part for d, n in zip(devices, names, strict=True) for part in (d, n)]
        ip("link", "add", wire[0], "netns", wire[1], "type", "veth", "peer", wire[2], "netns", wire[3])
        for index, (name, device) in enumerate(zip(names, devices, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)  # noqa: S603, S607


def test_two_hosts_serve_one_model(two_hosts, folders, tmp_path):
    model = folders("llama-many-heads")
    common = {
        "master_addr": "10.77.0.1",
        "nnodes": 2,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "port": 2242,
    }
    inside = [["ip", "netns", "exec", name] for name in two_hosts]
    agent = start_agent(model, tmp_path / "agent", inside[1], node_rank=1, **common)
    server = start_agent(model, tmp_path / "server", inside[0], **common)
    try:
        answer = ask_inside(inside[0], server, tmp_path)
        with LLM(str(model), **SETTINGS) as llm:
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            (alone,) = llm.generate(["Hello"], params)
        assert answer["choices"][0]["text"] == alone.outputs[0].text
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert agent.wait(20) == 0
    finally:
        for process in (server, agent):
            process.kill()


def ask_inside(prefix, server, tmp_path):
    """Ask for a completion from within a host, once its server is ready."""
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    script = (
        "import sys, urllib.request as u\n"
        "r = u.Request('http://127.0.0.1:2242/v1/completions', sys.argv[1].encode())\n"
        "print(u.urlopen(r, timeout=60).read().decode())\n"
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and server.poll() is None:
        command = [*prefix, sys.executable, "-c", script, json.dumps(body)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode == 0:
            return json.loads(done.stdout)
        time.sleep(2)
    raise AssertionError((tmp_path / "server").read_text() + (tmp_path / "agent").read_text())


def test_ray_places_ranks(folders, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    model = folders("qwen3")
    sizes = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert generate(model, **sizes) == generate(model)
