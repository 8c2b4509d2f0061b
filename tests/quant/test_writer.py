"""Whole checkpoints quantized: what is computed while writing, what is written, what engines read."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import rtn_quantizer
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from core import LLM
from core.errors import CheckpointError, ConfigError, PluginNotFoundError
from core.quant import layers
from core.quant.job import make_source_config
from core.quant.perplexity import measure
from core.quant.samples import SampleReader
from core.testing.checkpoints import reference_logits
from core.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FAMILIES = (
    "llama3",
    "llama3.2",  # tied
    "llama-bias",
    "mistral",  # a window
    "qwen3",  # norms of heads
    "phi3",  # stored fused, longrope
    "gemma2",  # norms of 1 + w, two more of them, caps, a scaled embedding
    "gemma3-multimodal",  # renamed, with a vision tower
)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def dequantize(source: Path, written: Path, target: Path) -> Path:
    """Make an unquantized checkpoint with the weights that the quantized one stands for."""
    target.mkdir()
    tensors = read_all(written)
    for name in [name for name in tensors if name.endswith(".codes")]:
        prefix = name.removesuffix("codes")
        tensors[f"{prefix}weight"] = tensors.pop(name) * tensors.pop(f"{prefix}scales")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def reference_perplexity(folder: Path, samples: Any, max_model_len: int) -> float:
    loss = 0.0
    for row in samples.tokens:
        logits = reference_logits(folder, row.tolist(), max_model_len=max_model_len)
        first = samples.first_target
        loss += float(functional.cross_entropy(logits[first - 1 : -1], row[first:], reduction="sum"))
    return math.exp(loss / samples.num_targets)


def evaluation_samples(source: Path, text: Path) -> Any:
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    reader = SampleReader(text, tokenizer, 24)
    reader.take(6)
    return reader.take(4)


@pytest.mark.parametrize("family", FAMILIES)
def test_report_engine_and_transformers_agree_on_the_written_checkpoint(
    family, checkpoint, quantize, text, tmp_path
):
    source, out, rest = checkpoint(family), tmp_path / "out", tmp_path / "rest.txt"
    report = quantize(source, out, text)
    assert report.quality is not None
    samples = evaluation_samples(source, text)
    plain = dequantize(source, out, tmp_path / "plain")
    config = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64, "max_model_len": 128}
    before = reference_perplexity(source, samples, 128)
    after = reference_perplexity(plain, samples, 128)
    assert report.quality.before == pytest.approx(before, rel=1e-4)
    assert report.quality.after == pytest.approx(after, rel=1e-4)
    assert report.quality.before != report.quality.after
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    rest.write_text(tokenizer.decode(samples.tokens[:, 1:].flatten().tolist()))
    with LLM(str(out), plugins=["py:rtn_quantizer"], **config) as llm:
        score = measure(llm, rest, sample_len=24)
    assert score.perplexity == pytest.approx(report.quality.after, rel=1e-4)
    assert score.num_tokens == report.quality.num_tokens


def test_what_is_ignored_stays_bit_for_bit_and_the_rest_is_replaced(
    checkpoint, quantize, text, tmp_path
):
    source, out = checkpoint("gemma3-multimodal", 3), tmp_path / "out"
    ignore = ("layers.0", "re:.*mlp.down_proj")
    report = quantize(source, out, text, options={"ignore": ignore})
    before, after = read_all(source), read_all(out)
    replaced = {name.removesuffix(".weight") for name in before if name not in after}
    assert replaced == {name.removesuffix(".codes") for name in after if name.endswith(".codes")}
    assert all(".codes" in name or ".scales" in name for name in set(after) - set(before))
    assert replaced
    assert not any(".layers.0." in name or "down_proj" in name for name in replaced)
    same = [name for name in before if name in after and not _is_folded(name, ignore_first=True)]
    assert any("vision_tower" in name for name in same)
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert [set(layer.linears) for layer in report.layers] == [
        set(),
        *[{"qkv_proj", "out_proj", "gate_up_proj"}] * 3,
    ]


def _is_folded(name: str, *, ignore_first: bool) -> bool:
    """Whether the quantizer of the tests changes this, though it does not replace it."""
    is_first = ignore_first and ".layers.0." in name
    return name.endswith("pre_feedforward_layernorm.weight") or (
        is_first and ("gate_proj" in name or "up_proj" in name)
    )


def test_what_a_method_changes_in_place_is_written(checkpoint, quantize, text, tmp_path):
    source, out = checkpoint("llama3"), tmp_path / "out"
    quantize(source, out, text, options={"ignore": ("layers.0",)})
    before, after = read_all(source), read_all(out)
    norm = "model.layers.{}.post_attention_layernorm.weight"
    assert all(torch.equal(after[norm.format(i)], before[norm.format(i)] / 2) for i in range(2))
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(after[gate], before[gate] * 2)


def test_weights_that_need_no_rounding_have_no_errors(checkpoint, quantize, text, tmp_path):
    source = checkpoint("llama3")
    quantize(source, tmp_path / "once", text)
    exact = dequantize(source, tmp_path / "once", tmp_path / "exact")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (exact / name).write_text((source / name).read_text())
    report = quantize(exact, tmp_path / "twice", text)
    assert all(layer.error < 1e-5 for layer in report.layers)
    assert all(error < 1e-5 for layer in report.layers for error in layer.linears.values())
    assert report.quality is not None
    assert report.quality.agreement == 1.0
    assert report.quality.after == pytest.approx(report.quality.before, rel=1e-5)


def test_errors_are_those_of_the_definition(checkpoint, quantize, text, tmp_path, monkeypatch):
    """Each linear layer's, from what the exact one is given; and they grow when bits go."""
    source = checkpoint("llama3")
    fine = quantize(source, tmp_path / "fine", text)
    monkeypatch.setattr(rtn_quantizer, "MAX_CODE", 7)
    coarse = quantize(source, tmp_path / "coarse", text)
    for one, other in zip(fine.layers, coarse.layers, strict=True):
        assert set(one.linears) == {"qkv_proj", "out_proj", "gate_up_proj", "down_proj"}
        for name, error in one.linears.items():
            # Rounding errors are independent of the weights, so 127 / 7 times as large.
            assert other.linears[name] / error == pytest.approx(127 / 7, rel=0.2)
            assert 0.002 < error < 0.01
        assert 0 < one.error < other.error
    assert fine.bits_per_weight == pytest.approx(8 + 32 * 4 / 64, rel=0.3)


def test_nothing_depends_on_how_samples_are_batched(checkpoint, quantize, text, tmp_path, monkeypatch):
    source = checkpoint("gemma2")
    together = quantize(source, tmp_path / "together", text).to_dict()
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 30)
    apart = quantize(source, tmp_path / "apart", text).to_dict()
    for report in (together, apart):
        for layer in report["layers"]:
            layer.pop("seconds")
    assert _flatten(apart) == pytest.approx(_flatten(together), rel=1e-3)
    first, second = read_all(tmp_path / "together"), read_all(tmp_path / "apart")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_calibration_may_compute_in_another_dtype(checkpoint, quantize, text, tmp_path):
    source = checkpoint("llama3")
    wide = quantize(source, tmp_path / "wide", text)
    config = make_source_config(
        str(source), plugins=["py:rtn_quantizer"], device="cpu", dtype="bfloat16"
    )
    narrow = quantize(source, tmp_path / "narrow", text, config=config)
    for one, other in zip(wide.layers, narrow.layers, strict=True):
        assert other.linears == pytest.approx(one.linears, rel=0.5)
    first, second = read_all(tmp_path / "wide"), read_all(tmp_path / "narrow")
    assert {name: tensor.dtype for name, tensor in second.items()} == {
        name: tensor.dtype for name, tensor in first.items()
    }


def _flatten(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {path: value} if isinstance(value, float) else {}
    return {k: v for key, item in pairs for k, v in _flatten(item, f"{path}.{key}").items()}


def test_dtypes_and_files_of_the_checkpoint_are_kept(checkpoint, quantize, text, tmp_path):
    source, half = checkpoint("llama-bias"), tmp_path / "half"
    half.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in read_all(source).items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (half / file.name).write_text(file.read_text().replace("float32", "bfloat16"))
    (half / "chat_template.jinja").write_text("template")
    quantize(half, tmp_path / "out", text)
    after = read_all(tmp_path / "out")
    plain = {name: tensor for name, tensor in after.items() if not name.endswith((".codes", ".scales"))}
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert any(name.endswith(".bias") for name in plain)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = config.pop("quantization_config")
    assert config == json.loads((half / "config.json").read_text())
    assert stated == {"quant_method": "rtn8", "ignored": ["lm_head"]}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["options"]["method"] == "rtn8"
    assert report["bytes_before"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["bytes_after"] == sum(tensor.nbytes for tensor in after.values())


def test_a_text_to_measure_on_is_the_users_or_what_calibration_left(
    checkpoint, quantize, text, tmp_path
):
    source, other = checkpoint("llama3"), tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    named = quantize(source, tmp_path / "named", text, evaluation=other).quality
    assert named is not None
    assert named.text == str(other)
    none = quantize(source, tmp_path / "none", text, num_eval_samples=0)
    assert none.quality is None
    other.write_text(text.read_text()[:500])
    short = quantize(source, tmp_path / "short", other, num_samples=2, sample_len=100)
    assert short.quality is None


# --- what goes wrong -------------------------------------------------------------------------------


def test_a_run_that_fails_leaves_nothing(checkpoint, quantize, text, tmp_path, monkeypatch):
    def fail(_self: Any, _layer: Any) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(rtn_quantizer.Int8Writer, "quantize_layer", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint("llama3"), tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda written: written.popitem(), "was to write"),
        (lambda written: next(iter(written.values())).pop("scales"), "wants codes, scales"),
        (lambda written: next(iter(written.values())).update(more=torch.zeros(1)), "were codes, more"),
        (
            lambda written: next(iter(written.values())).update(scales=torch.zeros(3, 1)),
            r"shape \[3, 1\], but",
        ),
    ],
)
def test_tensors_that_would_not_be_read_are_noticed_at_once(
    checkpoint, quantize, text, tmp_path, *, monkeypatch, damage, message
):
    whole = rtn_quantizer.Int8Writer.quantize_layer

    def write(self: Any, layer: Any) -> Any:
        written = dict(whole(self, layer))
        damage(written)
        return written

    monkeypatch.setattr(rtn_quantizer.Int8Writer, "quantize_layer", write)
    with pytest.raises(CheckpointError, match=message):
        quantize(checkpoint("llama3"), tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_its_config_does_not_describe_is_not_left(
    checkpoint, quantize, text, tmp_path, monkeypatch
):
    def config(_self: Any) -> dict[str, Any]:  # forgets that the head was ignored
        return {"quant_method": "rtn8", "ignored": []}

    monkeypatch.setattr(rtn_quantizer.Int8Writer, "config", config)
    with pytest.raises(CheckpointError, match=r"the model does not have: lm_head\.weight"):
        quantize(checkpoint("llama3"), tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"options": {"ignore": ("layers.7",)}}, ConfigError, "layers.7 matches no linear layer"),
        ({"options": {"ignore": ("q_proj",)}}, ConfigError, "but not .*k_proj"),
        ({"options": {"ignore": ("re:(",)}}, CheckpointError, "no regular expression"),
        ({"options": {"bits": 4}}, ConfigError, "--bits 4: rtn8 has 8"),
        ({"options": {"method": "rtn9"}}, PluginNotFoundError, "did you mean 'rtn8'"),
        (
            {"options": {"method": "none"}},
            ConfigError,
            "only reads checkpoints; those that write.*rtn8",
        ),
        ({"num_samples": 0}, ConfigError, "--num-samples 0: at least 1"),
        (
            {"num_samples": 10_000},
            ConfigError,
            r"holds \d+ tokens, but 230000 are needed",
        ),
        ({"sample_len": 129}, ConfigError, "--sample-len 129 is beyond the model's 128 positions"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    checkpoint, quantize, text, tmp_path, *, changes, kind, message
):
    with pytest.raises(kind, match=message):
        quantize(checkpoint("llama3"), tmp_path / "out", text, **changes)
    assert not list(tmp_path.iterdir())


def test_the_head_may_be_named_though_it_always_stays(checkpoint, quantize, text, tmp_path):
    quantize(checkpoint("llama3"), tmp_path / "out", text, options={"ignore": ("lm_head",)})
    assert "lm_head.weight" in read_all(tmp_path / "out")


def test_what_is_quantized_is_not_quantized_again(checkpoint, quantize, text, tmp_path):
    quantize(checkpoint("llama3"), tmp_path / "once", text)
    with pytest.raises(ConfigError, match=r"quantized already \(rtn8\)"):
        quantize(tmp_path / "once", tmp_path / "twice", text)


def test_what_says_so_in_a_file_beside_its_config_is_quantized_too(
    checkpoint, quantize, text, tmp_path
):
    source = shutil.copytree(checkpoint("llama3"), tmp_path / "source")
    stated = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (source / "quantize_config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=r"quantized already \(gptq\)"):
        quantize(source, tmp_path / "out", text)


def test_without_a_tokenizer_no_text_can_be_read(checkpoint, quantize, text, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint("llama3").iterdir():
        if not file.name.startswith("tokenizer"):
            (source / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="--tokenizer"):
        quantize(source, tmp_path / "out", text)
