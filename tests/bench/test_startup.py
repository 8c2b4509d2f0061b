from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from core.bench import startup
from core.bench.null_executor import NAME
from core.bench.startup import CACHE_VARIABLES, Startup
from core.cli import main
from core.config import load_config

FLAGS = ["demo", "--plugins", NAME, "--executor", "null", "--device", "cpu"]
RUNS = [
    Startup(True, 0.5, 6.0, 8.0, {"starting": 4.0, "loading": 2.0}),
    Startup(True, 1.5, 8.0, 9.0, {"starting": 6.0, "loading": 1.0}),
    Startup(False, 0.5, 3.0, 3.5, {"starting": 3.0}),
]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [name for name in os.environ if name.startswith("CYTHERA_")]:
        monkeypatch.delenv(name)


def test_a_real_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CYTHERA_PORT", "1")  # the command's own settings count, not the servers'
    file = tmp_path / "r.json"
    options = ["--num-iters-cold", "1", "--num-iters-warm", "0", "--output-json", str(file)]
    assert main(["bench", "startup", *FLAGS, *options]) == 0
    result = json.loads(file.read_text())
    [run] = result["cold"]["runs"]
    assert 0 < run["port_open"] < run["ready"] < run["first_token"]
    assert sum(run["phases"].values()) <= run["ready"] + 1e-6
    assert result["warm"] == {"runs": []}
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:2] == ["cold", "1"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_seqs": 7, "dtype": "float32", "gpu_memory_utilization": 0.25},
        {"enforce_eager": True, "enable_prefix_caching": False, "load_format": "dummy"},
        {"plugins": ("a.b", "no:c.d"), "served_model_name": ("x", "y")},
        {"plugin_settings": {"a.b": {"size": 2, "name": "2", "list": [1, "x"], "on": True}}},
        {"plugin_settings": {"py:a.b": {"step_ms": 0.5, "table": {"x": [{"y": 1}], "z": False}}}},
        {"api_key": ("k",), "cluster_key": "k"},
    ],
)
def test_servers_get_what_was_set_and_nothing_else(settings, capsys):
    config = load_config({"model": "m", **settings, "host": "0.0.0.0", "port": 9})  # noqa: S104
    flags = startup.to_flags(config)
    assert "k" not in " ".join(flags).split("=")
    assert main(["config", "show", "--json", "--origin", "m", *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    for name, value in config.to_dict().items():
        if name not in ("host", "port"):
            assert shown[name]["value"] == value
            is_set = name in {"model", *settings} - {"plugin_settings"}
            assert (shown[name]["origin"] != "default") == is_set, name


def test_a_server_that_does_not_start_says_why(capsys):
    arguments = ["demo", "--num-iters-cold", "1", "--num-iters-warm", "0", "--plugins", "no.such"]
    assert main(["bench", "startup", *arguments]) == 1
    err = capsys.readouterr().err
    assert "the server ended with exit code 3" in err
    assert "no.such" in err


@pytest.mark.parametrize(
    ("num_cold", "num_warm", "expected"),
    [
        (2, 2, [(True, 0), (True, 1), (False, 1), (False, 1)]),
        (0, 2, [(False, 0), (False, 0)]),
        (1, 0, [(True, 0)]),
    ],
)
def test_warm_starts_find_what_the_last_cold_one_left(monkeypatch, num_cold, num_warm, expected):
    seen = []

    def start(starting, caches):
        if not starting._result.is_cold:
            assert (caches / "made").exists()
        else:
            assert not caches.exists()
            caches.mkdir()
            (caches / "made").touch()
        seen.append(int(Path(caches).parent.name))
        return starting._result

    monkeypatch.setattr(startup._Starting, "measure", start)
    results = startup.measure(
        load_config({"model": "demo"}), num_cold=num_cold, num_warm=num_warm, timeout=1.0
    )
    counted = seen[len(seen) - len(results) :]
    assert [(r.is_cold, place) for r, place in zip(results, counted, strict=True)] == expected


def test_the_report():
    lines = startup.report(RUNS).splitlines()
    assert lines[1].split() == ["cold", "2", "1.00", "7.00", "8.50"]
    assert lines[2].strip() == "of which: starting 5.00, loading 1.50"
    assert lines[3].split() == ["warm", "1", "0.50", "3.00", "3.50"]
    plain = startup.to_dict(RUNS)
    assert plain["cold"]["avg_ready"] == 7.0
    assert plain["warm"]["first_token_percentiles"]["50"] == 3.5
    assert len(plain["cold"]["runs"]) == 2


def test_one_kind_of_start_alone():
    lines = startup.report([replace(RUNS[2])]).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["warm", "of"]


@pytest.mark.parametrize(("cold", "warm"), [("0", "0"), ("-1", "2")])
def test_there_is_something_to_start(cold, warm, capsys):
    words = ["--num-iters-cold", cold, "--num-iters-warm", warm]
    assert main(["bench", "startup", "demo", *words]) == 2
    assert "--num-iters-cold" in capsys.readouterr().err


def test_compilers_keep_nothing_elsewhere():
    assert {"TRITON_CACHE_DIR", "XDG_CACHE_HOME"} <= set(CACHE_VARIABLES)
    assert len(set(CACHE_VARIABLES.values())) == len(CACHE_VARIABLES)
