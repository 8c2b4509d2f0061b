"""The example plugins: their own tests pass, and the commands of their READMEs do what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess
from transformers import AutoConfig

from core import cli
from core.pluginhost import show_plugin

ROOT = Path(__file__).parents[2] / "examples"
NAMES = sorted({path.parent.name for path in ROOT.glob("*/test_*.py")})
SERVE = "PYTHONPATH=. python -m core serve "
TEST = "python -m pytest"


def commands(name):
    blocks = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / name / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return [line for block in blocks for line in block.splitlines()]


def serve_arguments(name):
    [line] = [line for line in commands(name) if line != TEST]
    assert line.startswith(SERVE)
    return shlex.split(line.removeprefix(SERVE))


def test_all_examples_are_found():
    assert NAMES == [
        "attention_timer",
        "int8_weights",
        "jsonl_events",
        "model_family",
        "shortest_prompt_first",
    ]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_own_tests_pass(name):
    assert TEST in commands(name)
    env = {**os.environ, "PYTEST_ADDOPTS": "-q -p no:cacheprovider"}
    command = [sys.executable, *TEST.split()[1:]]
    done = subprocess.run(  # noqa: S603  ours
        command, cwd=ROOT / name, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- what the command chooses ----------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A config is all that a plan reads of a checkpoint."""
    AutoConfig.for_model("smollm3", num_hidden_layers=4).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_command_makes_the_plugin_part_of_the_plan(name, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / name)
    monkeypatch.syspath_prepend(ROOT / name)
    model, *flags = serve_arguments(name)
    model = str(checkpoint) if model == "path/to/checkpoint" else model
    assert cli.main(["plan", model, *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    [plugin] = [entry["name"] for entry in plan["plugins"] if entry["name"].startswith("py:")]
    chosen = {choice["plugin"] for choice in plan["choices"].values()}
    assert plugin in chosen or not show_plugin(plugin).descriptors


# --- all of them in one server ---------------------------------------------------------------------


def merged(all_arguments):
    """Join the flags of several commands for the same model."""
    plugins, others = [], []
    for _, *flags in all_arguments:
        index = flags.index("--plugins")
        plugins.append(flags[index + 1])
        others += flags[:index] + flags[index + 2 :]
    return ["--plugins", ",".join(plugins), *others]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What a server with all examples left behind: answers, events, and what it wrote."""
    folder = tmp_path_factory.mktemp("examples")
    flags = merged(a for a in map(serve_arguments, NAMES) if a[0] == "demo")
    flags = [flag.replace("events.jsonl", str(folder / "events.jsonl")) for flag in flags]
    env = {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in NAMES)}
    flags += ["--device", "cpu", "--num-kv-blocks", "64"]
    with ServerProcess("demo", *flags, folder=folder, env=env) as server:
        server.wait_until_ready()
        body = {"prompt": "import os", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        answers = [json.loads(server.get("/v1/completions", body)[2]) for _ in range(2)]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        lines = (folder / "events.jsonl").read_text().splitlines()
        return answers, [json.loads(line) for line in lines], server.errors


def test_the_examples_serve_together(stopped):
    answers, _, _ = stopped
    first, second = (answer["choices"][0] for answer in answers)
    assert first["text"]
    assert first["text"] == second["text"]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {8}


def test_events_are_those_of_the_requests(stopped):
    _, events, _ = stopped
    assert [event["type"] for event in events] == [
        "EngineStarted",
        "RequestFinished",
        "RequestFinished",
        "EngineStopping",
    ]
    assert {event["num_output"] for event in events[1:3]} == {8}


def test_attention_is_reported_at_the_end(stopped):
    [line] = [json.loads(text) for text in stopped[2].splitlines() if '"attention.timer"' in text]
    assert line["layers"] == "full"
    assert line["calls"] == 6 * 16  # layers, steps
    assert line["seconds"] > 0
