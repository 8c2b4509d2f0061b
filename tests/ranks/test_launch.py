"""Ranks that are children of the engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from core.errors import EngineStartError
from core.ranks import launch
from core.ranks.launch import ProcessLauncher


def num_open_files():
    return len([*Path("/dev/fd").iterdir()])


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch):
    real, started = subprocess.Popen, []

    def popen(*arguments, **options):
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real(["sleep", "100"], pass_fds=options["pass_fds"]))
        return started[-1]

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    before = num_open_files()
    with pytest.raises(EngineStartError, match="Resource temporarily unavailable"):
        ProcessLauncher(3).start()
    assert [process.returncode for process in started] == [-9, -9]
    assert num_open_files() == before
