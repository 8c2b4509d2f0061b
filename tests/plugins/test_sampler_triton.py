from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter

from core.config import EngineConfig
from core.registry import Requirements
from core.testing.sampler import SamplerConformance
from plugins.sampler import triton as plugin

(ENTRY,) = plugin.core_register_samplers()
INTERPRETED = Path(__file__).with_name("sampler_triton_interpreted.py")


@pytest.mark.parametrize(
    "part", ["frequencies", "TestTritonSampler and not frequencies", "not TestTritonSampler"]
)
def test_in_the_interpreter(part):
    triton_interpreter.run_interpreted(INTERPRETED, "-k", part)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnTheDevice(SamplerConformance):
    entry = ENTRY
    device = "cuda"


# --- what can be served ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, []),
        ({"dtype": "float16"}, []),
        (
            {"device": "cpu", "dtype": "float64"},
            ["device 'cpu' is not 'cuda'", "dtype 'float64' is none"],
        ),
    ],
)
def test_names_everything_that_it_cannot_serve(wanted, named):
    reasons = ENTRY.unsupported(Requirements(**({"device": "cuda", "dtype": "bfloat16"} | wanted)))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)


def test_says_how_to_install_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (reason,) = ENTRY.unsupported(Requirements(device="cuda", dtype="bfloat16"))
    assert reason == "triton is not installed; pip install cythera[cuda]"


def test_is_preferred_where_it_can_serve():
    assert EngineConfig(model="demo").sampler == "auto"
    assert ENTRY.priority > 0


def test_registering_imports_neither_torch_nor_triton():
    code = (
        "import sys; from plugins.sampler import triton as plugin; "
        "plugin.core_register_samplers(); sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603  ours
