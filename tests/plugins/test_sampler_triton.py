from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter
from kernel_compiler import compiling_for, most_shared_bytes, names_of

from core.config import EngineConfig
from core.registry import Requirements
from core.sampling import SampleRows
from core.testing.sampler import SamplerConformance
from plugins.sampler import triton as plugin
from plugins.sampler.triton.sampler import Cut, TritonSampler, Tuning

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


# --- kernels for cards that are not here -----------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_kernels_for_other_cards(capability):
    sampler = TritonSampler("bfloat16", Tuning(Cut(2048, 4, 2048), Cut(1024, 4, 2048)))
    sampler.allocate(8, 32_000, 64, torch.device("cpu"))
    sampler._has_pdl = capability >= (9, 0)
    zeros = torch.zeros(2, dtype=torch.int64)
    logits = torch.zeros(2, 32_000, dtype=torch.bfloat16)
    with compiling_for(capability) as compiled:
        sampler._draw_with_kernels(logits, SampleRows(zeros, zeros, [0, 0]), is_random=True)
    assert names_of(compiled) == {"find_likeliest", "race"}
    assert most_shared_bytes(compiled) <= 99 << 10  # the least that any of them has
