"""The code in `docs/` runs, and prints what the pages say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib

import pytest
from docs_blocks import BLOCKS, MARKS, PAGES, to_pattern
from server_process import ServerProcess

from core import errors, hookspecs
from core.cli import main
from core.config import load_config

FILES = [block for block in BLOCKS if "file" in block.marks]
RUN = [block for block in BLOCKS if not {"file", "not run", "message"} & set(block.marks)]
PYTHON = [block for block in RUN if block.language == "python"]
SHELL = [block for block in RUN if block.language == "sh"]
ASSIGNMENT = re.compile(r"([A-Z_]+)=(\S*)")
COMMAND = ["python", "-m", "core"]
SERVER = "127.0.0.1:2242"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each page a folder with its files."""
    made = {}
    for page in PAGES:
        made[page] = tmp_path_factory.mktemp(page.stem)
        for block in FILES:
            if block.page == page:
                (made[page] / block.marks["file"]).write_text(block.code)
    return made


@pytest.fixture
def folder(request, folders, monkeypatch):
    """The folder of the block under test, as its reader's current one."""
    for name in [name for name in os.environ if name.startswith("CYTHERA_")]:
        monkeypatch.delenv(name)
    path = folders[request.getfixturevalue("block").page]
    monkeypatch.chdir(path)
    monkeypatch.syspath_prepend(str(path))
    yield path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(path)):
            del sys.modules[name]


def check_output(block, actual):
    if block.output is not None:
        assert to_pattern(block.output).search(actual), f"{block} prints:\n{actual}"


# --- python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, folder):
    code = compile(block.code, f"{block}", "exec", dont_inherit=True)
    out = io.StringIO()
    expected = block.marks.get("raises")
    with contextlib.redirect_stdout(out):
        if expected is None:
            exec(code, {"__name__": "__docs__"})  # noqa: S102  our own pages
        else:
            with pytest.raises(getattr(errors, expected)) as caught:
                exec(code, {"__name__": "__docs__"})  # noqa: S102
            out.write(str(caught.value))
    check_output(block, out.getvalue())


# --- toml ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=str)
def test_toml_is_what_it_says(block, folder):
    table = tomllib.loads(block.code)
    if "project" not in table:
        load_config({}, config_file=folder / block.marks["file"])


# --- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """A folder with a plugin that notes every hook, and the file that it notes them in."""
    path = tmp_path_factory.mktemp("recorder")
    (path / "recorder.py").write_text(RECORDER)
    return path


@pytest.fixture(scope="module")
def server(recorder):
    """One server for all blocks, as the pages start it; with a plugin that notes every hook."""
    flags = ("--plugins", "py:recorder", "--device", "cpu", "--num-kv-blocks", "256")
    environ = {"PYTHONPATH": str(recorder), "RECORD": str(recorder / "record.jsonl")}
    with ServerProcess("demo", *flags, folder=recorder, env=environ) as server:
        yield server.wait_until_ready()


def list_commands(code):
    """Split into commands: without comments, joined where a line goes on."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run_core(command):
    """Run one of our own commands in this process; `serve` is only asked whether it has such flags.

    :return: exit code and all output.
    """
    words, given = shlex.split(command), {}
    while match := ASSIGNMENT.fullmatch(words[0]):
        given[match[1]], words = match[2], words[1:]
    assert words[:3] == COMMAND, command
    arguments = ["config", "show", *words[4:]] if words[3] == "serve" else words[3:]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(arguments)
    return code, out.getvalue()


def run_with_server(command, server):
    line = command.replace(SERVER, f"127.0.0.1:{server.port}")
    done = subprocess.run(  # noqa: S602  our own pages
        line, shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_run(block, folder, request):
    output = ""
    for command in list_commands(block.code):
        if SERVER in command:
            code, text = run_with_server(command, request.getfixturevalue("server"))
        else:
            code, text = run_core(command)
        output += text
        assert code == int(block.marks.get("exit", 0)), f"{command}\n{text}"
    check_output(block, output)


def test_every_block_is_known_here():
    for block in BLOCKS:
        assert set(block.marks) <= MARKS, block
        assert block.language in {"python", "sh", "toml", "text", "mermaid"}, block
        assert block.marks.get("not run") != "", f"{block}: say why it cannot run"


def test_what_follows_the_example_package_is_tested_elsewhere():
    """The commands that `plugins new` prints are those that tests/test_scaffold.py runs."""
    [block] = [b for b in SHELL if "plugins new" in b.code]
    assert block.output is not None


# --- the order of hooks ----------------------------------------------------------------------------

RECORDER = """
import json
import os

from core import hookspecs
from core.hookspecs import hookimpl

core_api = "1.0"


def make(name):
    def note():
        with open(os.environ["RECORD"], "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "hook": name}) + chr(10))

    return hookimpl(note)


for name in vars(hookspecs):
    if name.startswith("core_"):
        globals()[name] = make(name)
"""
REGISTER = "core_register_settings, then every other<br/>core_register_* but commands"


def read_diagram():
    """Hooks by participant, in the order of the diagram; `start` marks where ranks are started."""
    [block] = [b for b in BLOCKS if b.page.stem == "plugins" and b.language == "mermaid"]
    found = {"F": [], "E": [], "R": []}
    for line in map(str.strip, block.code.splitlines()):
        if note := re.fullmatch(r"Note over (\w): (.*)", line):
            text = note[2].replace(REGISTER, ", ".join(declaring_hooks()))
            found[note[1]] += re.findall(r"core_\w+", text)
        elif line.startswith("E->>R: start"):
            found["E"].append("start")
    return found


def declaring_hooks():
    names = [name for name in vars(hookspecs) if name.startswith("core_register_")]
    return [name for name in names if name != "core_register_commands"]


def without_repeats(hooks):
    return [hook for hook, before in zip(hooks, [None, *hooks], strict=False) if hook != before]


def test_hooks_are_called_as_the_diagram_shows(server, recorder):
    """Last in this file, as it ends the server."""
    front, engine = server.process.pid, server.engine.pid
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    calls = [json.loads(line) for line in (recorder / "record.jsonl").read_text().splitlines()]
    called = {
        pid: without_repeats([call["hook"] for call in calls if call["pid"] == pid])
        for pid in (front, engine)
    }
    shown = read_diagram()
    assert called[front] == shown["F"]
    # With one rank, the engine is the rank: what it has declared and decided is not called again.
    first = shown["R"].index("core_worker_started")
    start = shown["E"].index("start")
    assert called[engine] == shown["E"][:start] + shown["R"][first:] + shown["E"][start + 1 :]
