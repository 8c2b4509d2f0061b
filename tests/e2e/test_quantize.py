"""`python -m core quantize` as a person runs it, with every built-in method, and engines that load the result."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from core import LLM, SamplingParams
from core.cli import main
from core.quant.names import matches
from core.quant.perplexity import measure
from core.quant.samples import SampleReader
from core.testing.checkpoints import make_checkpoint, reference_logits
from core.testing.tokenizers import make_tokenizer
from core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

METHODS = {
    "awq": ["--method=awq", "--group-size=32"],
    "gptq": ["--method=gptq", "--group-size=32"],
    "gptq-act-order": ["--method=gptq", "--group-size=32", "--act-order", "--asymmetric"],
    "gptq-3-bits": ["--method=gptq", "--bits=3", "--group-size=-1"],
    "fp8-channel": ["--method=fp8"],
    "fp8-tensor-static": ["--method=fp8", "--strategy=tensor", "--activation-scheme=static"],
    "fp8-block": ["--method=fp8", "--strategy=block"],
}
CASES = [
    *(("llama3", method) for method in METHODS),
    ("llama-bias", "awq"),
    ("qwen3", "fp8-block"),
    ("mistral", "gptq"),
    ("phi3", "awq"),
    ("phi3", "gptq-act-order"),
    ("gemma2", "fp8-tensor-static"),
    ("gemma3-multimodal", "fp8-channel"),
]
NUM_SAMPLES, SAMPLE_LEN = 8, 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(3)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("model", "page", "text", "word", "reads", "writes", "and", "then", "quickly")
    file.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(150)))
    return file


def make_source(family: str, folder: Path) -> Path:
    make_checkpoint(family, folder, vocab_size=400)
    return make_tokenizer("byte-level", folder)


def run(source: Path, out: Path, text: Path, *flags: str) -> int:
    sizes = [f"--num-samples={NUM_SAMPLES}", f"--sample-len={SAMPLE_LEN}", "--num-eval-samples=4"]
    texts = ["--calibration", str(text), "--out", str(out)]
    return main(["quantize", str(source), *texts, *sizes, "--device=cpu", *flags])


def rest_of(source: Path, text: Path, file: Path) -> Path:
    """Write down what the report was measured on."""
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    reader = SampleReader(text, tokenizer, SAMPLE_LEN)
    reader.take(NUM_SAMPLES)
    file.write_text(tokenizer.decode(reader.take(4).tokens[:, 1:].flatten().tolist()))
    return file


@pytest.mark.parametrize(("family", "method"), CASES)
def test_engines_compute_what_the_report_says(family, method, text, tmp_path, capsys):
    source, out = make_source(family, tmp_path / "source"), tmp_path / "out"
    assert run(source, out, text, *METHODS[method]) == 0
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "layer 2 of" in printed.err
    report = json.loads((out / "quantize_report.json").read_text())
    assert all(0 < e < 0.5 for layer in report["layers"] for e in layer["linears"].values())
    rest = rest_of(source, text, tmp_path / "rest.txt")
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64}
    with LLM(str(out), max_model_len=128, **settings) as llm:
        score = measure(llm, rest, sample_len=SAMPLE_LEN)
    assert score.num_tokens == report["quality"]["num_tokens"]
    assert score.perplexity == pytest.approx(report["quality"]["after"], rel=1e-3)


@pytest.mark.parametrize("method", ["fp8-channel", "awq", "gptq"])
def test_half_of_the_layers_can_be_left_as_they_are(method, text, tmp_path):
    source, out = make_source("llama3", tmp_path / "source"), tmp_path / "out"
    assert run(source, out, text, *METHODS[method], "--ignore=layers.1", "--ignore=re:.*o_proj") == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if "layers.1." in name or "o_proj" in name]
    assert all(torch.equal(before[name], after[name]) for name in kept if "norm" not in name)
    assert "model.layers.1.mlp.up_proj.weight" in kept
    with LLM(str(out), dtype="float32", device="cpu", num_kv_blocks=64) as llm:
        assert llm.generate("text", use_tqdm=False)[0].finished


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_transformers_computes_the_same_from_what_was_written(scheme, text, tmp_path):
    pytest.importorskip("compressed_tensors")
    source, out = make_source("llama3", tmp_path / "source"), tmp_path / "out"
    assert run(source, out, text, "--method=fp8", f"--activation-scheme={scheme}") == 0
    token_ids = list(range(5, 30))
    logits = reference_logits(out, token_ids)
    expected = -functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:]), reduction="none")
    with LLM(str(out), dtype="float32", device="cpu", num_kv_blocks=64) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        records = llm.generate(token_ids, params, use_tqdm=False)[0].prompt_logprobs
    assert records is not None
    found = [record[t].logprob for t, record in zip(token_ids[1:], records[1:], strict=True) if record]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["fp8-channel", "fp8-tensor-static"])
def test_parts_that_the_decoder_does_not_run_are_named_as_not_quantized(method, text, tmp_path):
    source, out = make_source("gemma3-multimodal", tmp_path / "source"), tmp_path / "out"
    assert run(source, out, text, *METHODS[method]) == 0
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    patterns = stated.get("ignore") or stated["ignored_layers"]
    others = [name for name in load_file(out / "model.safetensors") if "vision_tower" in name]
    assert others
    assert all(any(matches(name, pattern) for pattern in patterns) for name in others)


def test_errors_are_told_and_leave_nothing(text, tmp_path, capsys):
    source, out = make_source("llama3", tmp_path / "source"), tmp_path / "out"
    for flags, message in {
        ("--method=awq", "--bits=3"): "--bits 3",
        ("--method=gptq", "--group-size=128"): "--group-size",
        ("--method=fp8", "--strategy=row"): "--strategy row",
        ("--method=none",): "those that write are awq, gptq, fp8",
        ("--method=fp8", "--dtype=int3"): "--dtype",
    }.items():
        assert run(source, out, text, *flags) != 0
        assert message in capsys.readouterr().err
        assert not out.exists()
        assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(("family", "flags"), [("qwen3", ["--method=fp8"]), ("phi3", METHODS["awq"])])
def test_scales_of_the_kv_cache_are_written_and_used(family, flags, text, tmp_path, capsys):
    source, out = make_source(family, tmp_path / "source"), tmp_path / "out"
    assert run(source, out, text, *flags, "--kv-cache-dtype=fp8") == 0
    stored = load_file(out / "model.safetensors")
    scales = [stored[f"model.layers.1.self_attn.{x}_proj.{x}_scale"] for x in "kv"]
    assert all(scale.shape == () and 0 < scale < 1 for scale in scales)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    is_compressed = config["quant_method"] == "compressed-tensors"
    assert ("kv_cache_scheme" in config) == is_compressed
    capsys.readouterr()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    tokens = {}
    for dtype in ("auto", "fp8"):
        with LLM(str(out), device="cpu", num_kv_blocks=16, kv_cache_dtype=dtype) as llm:
            tokens[dtype] = llm.generate([[5, 6, 7, 8]], params)[0].outputs[0].token_ids
    assert "lacks scales" not in "".join(capsys.readouterr())
    assert tokens["fp8"][0] == tokens["auto"][0]


def test_other_types_of_kv_cache_have_no_scales(text, tmp_path, capsys):
    source = make_source("llama3", tmp_path / "source")
    assert run(source, tmp_path / "out", text, "--method=fp8", "--kv-cache-dtype=int8") == 2
    assert "--kv-cache-dtype int8: scales are written for fp8 only" in capsys.readouterr().err
