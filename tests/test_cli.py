from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest

import core.bench.compare
import core.bench.steps
from core.assemble import make_plan
from core.cli import MAX_ERROR_LINES, main
from core.config import GROUPS, EngineConfig, load_config
from core.errors import CapacityError, PlanError
from core.pluginhost import PluginEntry

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CYTHERA_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a config and no weights: all that a plan may read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return str(folder)


def run(*arguments, environ=None):
    command = [sys.executable, "-m", "core", *arguments]
    environ = {**os.environ, **(environ or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)  # noqa: S603  ours


def refuse(monkeypatch, error):
    def plan(_config):
        raise error

    monkeypatch.setattr("core.assemble.make_plan", plan)


# --- plan ------------------------------------------------------------------------------------------


def test_plan_shows_every_part_and_why(checkpoint, capsys):
    assert main(["plan", checkpoint, "--max-model-len", "256", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in (checkpoint, "256 tokens", "flag --max-model-len", "attention.torch", "float32"):
        assert part in out


def test_plan_as_json_is_what_the_plan_says(checkpoint, capsys):
    assert main(["plan", checkpoint, "--json", "--block_size=32", "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = make_plan(load_config({"model": checkpoint, "block_size": 32, "device": "cpu"}))
    assert shown == json.loads(json.dumps(plan.to_dict()))
    assert shown["block_size"] == 32


def test_plan_takes_file_environment_and_flags(checkpoint, tmp_path, capsys, monkeypatch):
    file = tmp_path / "engine.toml"
    file.write_text(f'model = "{checkpoint}"\nseed = 1\nmax_n = 1\nmax_logprobs = 1\ndevice = "cpu"\n')
    monkeypatch.setenv("CYTHERA_MAX_N", "2")
    monkeypatch.setenv("CYTHERA_MAX_LOGPROBS", "2")
    arguments = ["--config", str(file), "--max-logprobs", "3", "--set", "observe.log.interval=5"]
    assert main(["plan", "--json", *arguments]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert [config[name] for name in ("seed", "max_n", "max_logprobs")] == [1, 2, 3]
    assert config["plugin_settings"] == {"observe.log": {"interval": 5}}


def test_every_setting_is_a_flag_in_its_group(capsys):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    for group in GROUPS:
        assert f"─ {group} ─" in out
    words = "".join(out.split()).replace("│", "")
    for name in EngineConfig.model_fields:
        flag = {"model": "MODEL", "plugin_settings": "--set"}.get(name, "--" + name.replace("_", "-"))
        assert flag in words or flag[:26] in words, name


VALUES = {
    bool: ([], True),
    "max_model_len": (["32k"], 32768),
    "kv_cache_memory_bytes": (["1GiB"], 2**30),
    "block_size": (["64"], 64),
    "gpu_memory_utilization": (["0.5"], 0.5),
    "dtype": (["half"], "float16"),
    "device": (["cpu"], "cpu"),
    "load_format": (["dummy"], "dummy"),
    "generation_config": (["none"], "none"),
    "scheduling_policy": (["priority"], "priority"),
    "log_level": (["error"], "error"),
    "log_format": (["json"], "json"),
    "plugins": (["a.b,no:c.d"], ["a.b", "no:c.d"]),
    "served_model_name": (["x,y"], ["x", "y"]),
    "max_num_batched_tokens": (["4k"], 4096),
    "chat_template_timeout": (["0.5"], 0.5),
    "request_timeout": (["7"], 7.0),
    "queue_timeout": (["7"], 7.0),
    "shutdown_timeout": (["7"], 7.0),
    "join_timeout": (["7"], 7.0),
    "rank_timeout": (["7"], 7.0),
    "step_timeout": (["7"], 7.0),
    "cpu_offload_gb": (["1.5"], 1.5),
}
SECRETS = {"api_key", "cluster_key"}


@pytest.mark.parametrize(
    "name",
    [n for n in EngineConfig.model_fields if n not in {"model", "plugin_settings", *SECRETS}],
)
def test_every_flag_reaches_its_setting(name, capsys):
    kind = EngineConfig.model_fields[name].annotation
    fallback = (["7"], 7) if "int" in str(kind) else (["word"], "word")
    arguments, value = VALUES.get(name) or VALUES.get(kind) or fallback
    flag = "--" + name.replace("_", "-")
    assert main(["config", "show", "--json", "--origin", flag, *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop(name) == {"value": value, "origin": f"flag {flag}"}
    assert {entry["origin"] for entry in shown.values()} == {"default"}


def test_keys_are_never_shown(capsys, monkeypatch):
    monkeypatch.setenv("CYTHERA_API_KEY", "hidden-1")
    for arguments in ([], ["--json"], ["--origin"], ["--api-key", "hidden-2"]):
        assert main(["config", "show", "m", *arguments]) == 0
        assert "hidden" not in capsys.readouterr().out


def test_short_flags_and_switches(capsys):
    arguments = ["-tp", "2", "-pp", "3", "-q", "awq", "--no-enable-prefix-caching"]
    assert main(["config", "show", "--json", "m", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["tensor_parallel_size"], shown["pipeline_parallel_size"]) == (2, 3)
    assert (shown["quantization"], shown["enable_prefix_caching"], shown["model"]) == (
        "awq",
        False,
        "m",
    )


def test_plugins_may_be_named_before_the_command(capsys):
    assert main(["--plugins", "a.b", "--plugins=c.d", "config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plugins"] == ["a.b", "c.d"]


# --- config ----------------------------------------------------------------------------------------


def test_what_config_show_writes_can_be_read_again(tmp_path, capsys):
    arguments = ["m", "--max-num-seqs", "3", "--set", "a.b.c=[1, 2]", "--plugins", "a.b"]
    assert main(["config", "show", "--origin", *arguments]) == 0
    out = capsys.readouterr().out
    assert "# flag --max-num-seqs" in out
    assert "# flag --set a.b.c" in out
    file = tmp_path / "engine.toml"
    file.write_text(out)
    assert main(["config", "show", "--config", str(file)]) == 0
    again = capsys.readouterr().out
    assert main(["config", "show", *arguments]) == 0
    assert capsys.readouterr().out == again


# --- plugins ---------------------------------------------------------------------------------------


def test_plugins_list_imports_no_plugin_and_no_torch():
    code = """
        import sys
        from core.cli import main
        assert main(["plugins", "list"]) == 0
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"torch", "transformers", "plugins", "numpy"}, loaded
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  ours
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "module", "distribution", "version", "state"]
    assert any(line.startswith("observe.log ") and "cythera" in line for line in lines)


def test_plugins_list_as_json(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["attention.torch"]["module"] == "plugins.attention.torch"
    assert entries["attention.torch"]["distribution"] == "cythera"
    assert entries["attention.torch"]["is_present"] is True


def test_plugins_list_says_when_a_module_is_missing(capsys, monkeypatch):
    gone = PluginEntry("quant.gone", "gone_with_the_wind", "acme", "1.0")
    monkeypatch.setattr("core.pluginhost.list_plugins", lambda: [gone])
    assert main(["plugins", "list"]) == 0
    assert "module is missing" in capsys.readouterr().out


def test_plugins_show(capsys):
    assert main(["plugins", "show", "observe.log"]) == 0
    out = capsys.readouterr().out
    for part in ("plugins.observe.log", "1.0", "core_subscribe", "Writes what the engine does"):
        assert part in out
    assert main(["plugins", "show", "attention.torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["core_api"] == "1.0"
    assert report["problems"] == []
    assert {(d["kind"], d["name"]) for d in report["descriptors"]} == {("attention", "torch")}


@pytest.fixture
def broken_plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_cli_plugin.py").write_text(
        "from core import hookimpl\n\n@hookimpl\ndef core_subscribe(plam):\n    return []\n"
    )
    return "py:broken_cli_plugin"


def test_plugins_check_lists_every_problem_and_fails(broken_plugin, capsys):
    assert main(["plugins", "check", "observe.log"]) == 0
    assert capsys.readouterr().out.split() == ["observe.log", "ok"]
    assert main(["plugins", "check", "observe.log", broken_plugin]) == 3
    out = capsys.readouterr().out
    assert "core_api" in out
    assert "plam" in out
    assert main(["plugins", "check", "--json", "observe.log", broken_plugin]) == 3
    problems = json.loads(capsys.readouterr().out)
    assert problems["observe.log"] == []
    assert len(problems[broken_plugin]) == 2
    assert main(["plugins", "show", broken_plugin]) == 3
    assert "problem" in capsys.readouterr().out


def test_all_installed_plugins_are_checked(capsys):
    assert main(["plugins", "list", "--json"]) == 0
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert main(["plugins", "check", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == names


# --- commands of plugins ---------------------------------------------------------------------------


@pytest.fixture
def greeting_plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "greeting_cli_plugin.py").write_text(
        textwrap.dedent('''
            from core import hookimpl

            core_api = "1.0"

            def greet(name: str, *, times: int = 1) -> int:
                """Greet somebody."""
                print(f"hello {name}" * times)
                return 7

            @hookimpl
            def core_register_commands(subcommands):
                subcommands("greet", greet)
        ''')
    )
    return "py:greeting_cli_plugin"


def test_a_named_plugin_adds_commands(greeting_plugin, capsys, monkeypatch):
    assert main(["--plugins", greeting_plugin, "greet", "you", "--times", "2"]) == 7
    assert capsys.readouterr().out == "hello youhello you\n"
    assert main(["--plugins", greeting_plugin, "--help"]) == 0
    assert "Greet somebody." in capsys.readouterr().out
    monkeypatch.setenv("CYTHERA_PLUGINS", greeting_plugin)
    assert main(["greet", "you"]) == 7


def test_a_plugin_that_nobody_named_adds_none(greeting_plugin, capsys):
    assert main(["greet", "you"]) == 2
    assert "greet" in capsys.readouterr().err


def test_a_plugin_cannot_take_a_command_over(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "greedy_cli_plugin.py").write_text(
        'from core import hookimpl\n\ncore_api = "1.0"\n\n@hookimpl\n'
        'def core_register_commands(subcommands):\n    subcommands("plan", print)\n'
    )
    assert main(["--plugins", "py:greedy_cli_plugin", "anything"]) == 3
    assert "the command 'plan' exists already" in capsys.readouterr().err


# --- bench, version --------------------------------------------------------------------------------


def test_bench_steps_measures_what_is_asked_for(capsys, monkeypatch):
    one_round = partial(core.bench.steps.measure, num_rounds=1)
    monkeypatch.setattr("core.bench.steps.measure", one_round)
    assert main(["bench", "steps", "1", "2", "--num-steps", "3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[:3]] == ["running", "1", "2"]
    assert float(rows[1][1]) > 0


def test_bench_compare_passes_the_workload_on(capsys, monkeypatch):
    def compare(workload, *, hidden_size, num_layers):
        assert (workload.num_requests, hidden_size, num_layers) == (3, 64, 2)
        return [core.bench.compare.Run(name, 2.0, [[1, 2]]) for name in ("ours", "a", "b")]

    monkeypatch.setattr("core.bench.compare.compare", compare)
    arguments = ["--num-requests", "3", "--hidden-size", "64", "--num-layers", "2"]
    assert main(["bench", "compare", *arguments]) == 0
    assert "ours" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["version", "--version"])
def test_version(command, capsys):
    assert main([command]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"cythera {core.__version__} (plugin API 1.0, torch ")


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["plan"], 2, "model is required"),
        (["plan", "m", "--max-num-seq", "3"], 2, "--max-num-seqs"),
        (["plan", "m", "--max-num-seqs", "-1"], 2, "max_num_seqs = '-1' (flag --max-num-seqs)"),
        (["plan", "m", "--set", "size=2"], 2, "must be plugin.key=value"),
        (["plan", "m", "--config", "nowhere.toml"], 2, "nowhere.toml cannot be read"),
        (["plan", "m", "n"], 2, "n"),
        (["plan", "m", "--max-num-seqs"], 2, "requires an argument"),
        (["pla"], 2, "plan"),
        (["plugins", "show", "observe.lag"], 3, "observe.log"),
    ],
)
def test_errors_are_one_clear_message_on_stderr(arguments, code, text, capsys):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(("error", "code"), [(PlanError(["a: b"]), 4), (CapacityError("full"), 6)])
def test_the_exit_code_is_the_errors(error, code, monkeypatch, capsys):
    refuse(monkeypatch, error)
    assert main(["plan", "m"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_at_most_ten_lines(monkeypatch, capsys):
    refuse(monkeypatch, PlanError([f"part {i}: no" for i in range(40)]))
    assert main(["plan", "m"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_ERROR_LINES == 10
    assert "32 more lines" in lines[-1]


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_a_traceback_on_demand(value, shown, monkeypatch, capsys):
    refuse(monkeypatch, CapacityError("full"))
    monkeypatch.setenv("CYTHERA_TRACEBACK", value)
    assert main(["plan", "m"]) == 6
    err = capsys.readouterr().err
    assert ("Traceback" in err) == shown
    assert err.splitlines()[-1] == "error: full"


def test_interrupted(monkeypatch, capsys):
    refuse(monkeypatch, KeyboardInterrupt())
    assert main(["plan", "m"]) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch):
    refuse(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["plan", "m"])


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m core config show 2>&1 >&3 | cat; exit ${{PIPESTATUS[0]}}"
    read, write = os.pipe()
    os.close(read)  # nobody will ever read what the command writes
    done = subprocess.run(  # noqa: S603  ours
        ["/bin/bash", "-c", command.replace(">&3", f">&{write}")],
        capture_output=True,
        text=True,
        pass_fds=[write],
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_the_module_is_the_command():
    done = run("plugins", "show", "nobody.knows")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert run("version").stdout.startswith("cythera ")
