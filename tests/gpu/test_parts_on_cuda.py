"""Quantizers, narrow KV caches and offloaded layers on a GPU: the same tokens as on the CPU.

Skipped without a GPU.  Models are tiny and in float32, so that the last digits decide nothing.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from core import LLM, SamplingParams
from core.cli import main
from core.testing.attention import AttentionConformance
from core.testing.checkpoints import make_checkpoint
from core.testing.tokenizers import make_tokenizer
from plugins.attention.torch.backend import TorchAttention

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

METHODS: Final = {
    "awq": ["--method=awq", "--group-size=32"],
    "gptq": ["--method=gptq", "--group-size=32"],
    "gptq-act-order": ["--method=gptq", "--group-size=32", "--act-order", "--asymmetric"],
    "gptq-3-bits": ["--method=gptq", "--bits=3", "--group-size=-1"],
    "fp8-channel": ["--method=fp8"],
    "fp8-tensor-static": ["--method=fp8", "--strategy=tensor", "--activation-scheme=static"],
    "fp8-block": ["--method=fp8", "--strategy=block"],
}
PROMPTS: Final = [[7, 3, 9, 11, 5], list(range(4, 44)), [100]]
GREEDY: Final = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)


class TestTorchAttentionOnCuda(AttentionConformance):
    device = "cuda"

    def make_backend(self) -> TorchAttention:
        return TorchAttention()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama-bias", tmp_path_factory.mktemp("source"), vocab_size=512)
    return make_tokenizer("byte-level", folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("model", "page", "text", "word", "reads", "writes", "and", "then", "quickly")
    file.write_text("\n".join(" ".join(random.Random(i).choices(words, k=8)) for i in range(80)))
    return file


def generate(model: Path, **settings: Any) -> tuple[list[list[int]], list[float]]:
    """Return the tokens and the log-probability of each."""
    with LLM(str(model), dtype="float32", num_kv_blocks=40, max_model_len=64, **settings) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    tokens = [output.token_ids for output in outputs]
    logprobs = [
        step[token].logprob
        for output in outputs
        for step, token in zip(output.logprobs or [], output.token_ids, strict=True)
    ]
    return tokens, logprobs


def assert_same(one: tuple[Any, list[float]], other: tuple[Any, list[float]], tolerance: float) -> None:
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], abs=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_quantizers_compute_what_they_compute_on_the_cpu(
    method: str, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--num-samples=8", "--sample-len=16", "--num-eval-samples=0", "--device=cuda"]
    texts = [f"--calibration={text}", f"--out={out}"]
    assert main(["quantize", str(source), *texts, *flags, *METHODS[method]]) == 0
    assert_same(generate(out, device="cuda"), generate(out, device="cpu"), 0.02)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_weights_are_converted_on_the_gpu_as_on_the_cpu(strategy: str, source: Path) -> None:
    settings = {
        "quantization": "fp8",
        "plugin_settings": {"quant.fp8": {"strategy": strategy, "activations": "keep"}},
    }
    on_gpu = generate(source, device="cuda", **settings)
    assert_same(on_gpu, generate(source, device="cpu", **settings), 1e-3)


def test_a_narrow_cache_holds_the_same_numbers(source: Path) -> None:
    on_gpu = generate(source, device="cuda", kv_cache_dtype="fp8")
    assert_same(on_gpu, generate(source, device="cpu", kv_cache_dtype="fp8"), 0.1)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_offloaded_layers_change_nothing(family: str, share: float, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    size = (model / "model.safetensors").stat().st_size
    expected = generate(model, device="cuda")
    for depth in (1, 2):
        offloaded = generate(
            model, device="cuda", cpu_offload_gb=share * size / 2**30, max_in_flight=depth
        )
        assert_same(offloaded, expected, 0.0)


def test_offloaded_weights_leave_the_device(tmp_path: Path) -> None:
    model = "demo"
    used = {}
    for gib in (0.0, 1.0):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with LLM(
            model,
            device="cuda",
            dtype="float32",
            num_kv_blocks=16,
            max_model_len=64,
            cpu_offload_gb=gib,
        ) as llm:
            used[gib] = torch.cuda.memory_allocated() - before
            llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert used[1.0] < 0.75 * used[0.0]
