"""A quantized model on several ranks draws the tokens that it draws on one."""

from __future__ import annotations

import random

import pytest
from recorded_steps import assert_same, record, settings_of

from core.cli import main
from core.testing.checkpoints import make_checkpoint
from core.testing.simulated_ranks import replay
from core.testing.tokenizers import make_tokenizer

METHODS = {
    "awq": ["--method=awq", "--group-size=32"],
    "gptq": ["--method=gptq", "--group-size=32"],
    "gptq-act-order": ["--method=gptq", "--group-size=32", "--act-order", "--asymmetric"],
    "gptq-3-bits": ["--method=gptq", "--bits=3", "--group-size=-1"],
    "gptq-8-bits": ["--method=gptq", "--bits=8", "--group-size=32"],
    "fp8-channel": ["--method=fp8"],
    "fp8-tensor-static": ["--method=fp8", "--strategy=tensor", "--activation-scheme=static"],
    "fp8-block": ["--method=fp8", "--strategy=block"],
}
MESHES = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
# Dynamic scales of inputs see a rank's own inputs, so that results differ by their rounding.
EXACT = {"plugin_settings": {"quant.fp8": {"activations": "keep"}}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_checkpoint("llama-bias", tmp_path_factory.mktemp("source"), vocab_size=512)
    return make_tokenizer("byte-level", folder)


@pytest.fixture(scope="module")
def recorded(source, tmp_path_factory):
    """Give settings and steps of a method, quantized and recorded at its first use."""
    made = {}
    text = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("model", "page", "text", "word", "reads", "writes", "and", "then", "quickly")
    text.write_text("\n".join(" ".join(random.Random(i).choices(words, k=8)) for i in range(80)))

    def get(method):
        if method not in made:
            out = tmp_path_factory.mktemp(method) / "model"
            flags = [f"--calibration={text}", f"--out={out}", "--num-samples=8", "--sample-len=16"]
            measure_nothing = ["--num-eval-samples=0", "--device=cpu"]
            assert main(["quantize", str(source), *flags, *measure_nothing, *METHODS[method]]) == 0
            settings = settings_of(out, **EXACT)
            made[method] = settings, record(settings)
        return made[method]

    return get


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh[0]}-pp{mesh[1]}")
@pytest.mark.parametrize("method", METHODS)
def test_every_quantizer_on_several_ranks(method, mesh, recorded):
    settings, steps = recorded(method)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    assert_same(replay({**settings, **sizes}, steps, num_blocks=41), steps)


@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (2, 2)], ids=lambda mesh: f"tp{mesh[0]}-pp{mesh[1]}")
@pytest.mark.parametrize(
    ("kv_cache_dtype", "tolerance"),
    [("auto", 1e-3), ("fp8", 0.1)],  # the last digit of a key decides how it is rounded to FP8
)
def test_weights_that_are_converted_at_load(kv_cache_dtype, tolerance, mesh, source):
    settings = settings_of(source, **EXACT, quantization="fp8", kv_cache_dtype=kv_cache_dtype)
    steps = record(settings)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    results = replay({**settings, **sizes}, steps, num_blocks=41)
    assert_same(results, steps, tolerance)
