"""GPTQ checkpoints that are written, and what reads them."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from core import LLM
from core.errors import CheckpointError, ConfigError
from core.interfaces import LinearSpec
from core.quant.calibration import CalibratedLayer, CalibratedLinear, LayerQuantizer, QuantizeOptions
from core.quant.job import QuantizeJob, make_source_config
from core.registry import Requirements
from core.testing.checkpoints import make_checkpoint
from core.testing.lone_linear import TINY_MODEL, LoneLinear
from core.testing.tokenizers import make_tokenizer
from plugins.quant import gptq as plugin
from plugins.quant.gptq.rules import read_gptq
from plugins.quant.gptq.scheme import GptqScheme

CPU = torch.device("cpu")
(ENTRY,) = plugin.core_register_quantizers()
PREFIX = "model.layers.0"
IGNORED = "model.layers.0.mlp.down_proj"


def make_writer(**changes):
    return ENTRY.make_writer(QuantizeOptions(method="gptq", **({"group_size": 32} | changes)))


def make_linear(name, shards, num_inputs, *, bias=False, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    parent = f"{PREFIX}.{name.rpartition('.')[0]}"
    named = tuple((f"{parent}.{shard}", size) for shard, size in shards.items())
    spec = LinearSpec(f"{PREFIX}.{name}", num_inputs, named, bias, dtype, CPU, "qkv")
    mixing = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    return CalibratedLinear(
        spec=spec,
        weights=[torch.randn(n, num_inputs, generator=generator) for n in shards.values()],
        biases=[torch.randn(n, generator=generator) if bias else None for n in shards.values()],
        inputs=torch.randn(400, num_inputs, generator=generator) @ mixing,
    )


def make_layer(*, ignored=()):
    qkv = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    linears = {
        "qkv_proj": make_linear("self_attn.qkv_proj", qkv, 64, bias=True, seed=1),
        "out_proj": make_linear("self_attn.o_proj", {"o_proj": 64}, 64, seed=2),
        "down_proj": make_linear("mlp.down_proj", {"down_proj": 64}, 96, seed=3),
    }
    return CalibratedLayer(0, TINY_MODEL, linears, {}, frozenset(ignored))


def read_back(linear, tensors, config):
    """Load what was written as an engine does."""
    layer = LoneLinear(GptqScheme(read_gptq(config).format_of), linear.spec)
    prefixes = [prefix for prefix, _ in linear.spec.shards]
    layer.load({f"{p}.{suffix}": x for p in prefixes for suffix, x in tensors[p].items()})
    return layer


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_it_fulfils_the_protocol():
    assert isinstance(make_writer(), LayerQuantizer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize(
    "changes", [{}, {"symmetric": False}, {"act_order": True}], ids=["sym", "asym", "ordered"]
)
def test_what_is_written_is_read(bits, group_size, changes):
    writer, layer = make_writer(bits=bits, group_size=group_size, **changes), make_layer()
    tensors = writer.quantize_layer(layer)
    config = writer.config()
    requirements = Requirements(
        device="cpu", dtype="float32", quantization="gptq", quantization_config=config
    )
    assert ENTRY.unsupported(requirements) == []
    for linear in layer.linears.values():
        weight, bias = torch.cat(linear.weights), None
        if linear.spec.bias:
            bias = torch.cat(linear.biases)
        exact = torch.nn.functional.linear(linear.inputs, weight, bias)
        found = read_back(linear, tensors, config).run(linear.inputs)
        assert relative_error(found, exact) < 3.2 * 0.5**bits


@pytest.mark.parametrize("act_order", [True, False])
def test_outputs_are_nearer_than_without_calibration(act_order):
    layer, blind = make_layer(), make_layer()
    for linear in blind.linears.values():
        linear.inputs = linear.inputs[:0]
    for name, linear in layer.linears.items():
        errors = []
        for calibrated in (layer, blind):
            writer = make_writer(act_order=act_order)
            tensors = writer.quantize_layer(calibrated)
            found = read_back(linear, tensors, writer.config()).linear.dequantize()
            errors.append(
                relative_error(linear.inputs @ found.T, linear.inputs @ torch.cat(linear.weights).T)
            )
        assert errors[0] < 0.9 * errors[1], name


def test_shards_share_inputs_and_nothing_else():
    """Each is what it would be alone."""
    whole = make_layer().linears["qkv_proj"]
    together = make_writer(act_order=True).quantize_layer(
        CalibratedLayer(0, TINY_MODEL, {"qkv_proj": whole}, {})
    )
    for shard, (prefix, size) in enumerate(whole.spec.shards):
        alone = CalibratedLinear(
            replace(whole.spec, shards=((prefix, size),)),
            [whole.weights[shard]],
            [whole.biases[shard]],
            whole.inputs,
        )
        tensors = make_writer(act_order=True).quantize_layer(
            CalibratedLayer(0, TINY_MODEL, {"qkv_proj": alone}, {})
        )
        assert set(tensors[prefix]) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
        for suffix, tensor in tensors[prefix].items():
            assert torch.equal(tensor, together[prefix][suffix])


def test_tensors_are_as_gptq_stores_them():
    layer = make_layer()
    tensors = make_writer(symmetric=True).quantize_layer(layer)
    assert sorted(tensors) == sorted(p for x in layer.linears.values() for p, _ in x.spec.shards)
    stored = tensors[f"{PREFIX}.mlp.down_proj"]
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert shapes == {
        "qweight": ((96 // 8, 64), torch.int32),
        "qzeros": ((3, 64 // 8), torch.int32),
        "scales": ((3, 64), torch.float16),
        "g_idx": ((96,), torch.int32),
    }
    assert (stored["qzeros"] == 0x77777777).all()
    assert torch.equal(stored["g_idx"], (torch.arange(96) // 32).int())


def test_the_config_says_what_was_written():
    writer = make_writer(bits=3, act_order=True, damp_percent=0.05, symmetric=False)
    assert writer.config() == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 32,
        "desc_act": True,
        "sym": False,
        "checkpoint_format": "gptq",
        "damp_percent": 0.05,
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
    }
    assert make_writer().config()["sym"] is True


# --- layers that stay as they are ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (IGNORED, {IGNORED}),
        ("layers.1.mlp", {"model.layers.1.mlp.down_proj"}),
        ("down_proj", {IGNORED, "model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"}),
        (r"re:.*\.layers\.0\.", {IGNORED, "model.layers.0.self_attn.q_proj"}),
        ("layers.1", {"model.layers.1.mlp.down_proj"}),
    ],
)
def test_ignored_layers_are_rules_of_the_config(pattern, meant):
    names = {
        IGNORED,
        "model.layers.1.mlp.down_proj",
        "model.layers.10.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }
    config = make_writer(ignore=("lm_head", pattern)).config()
    rules = read_gptq(config)
    assert {name for name in names if rules.format_of(name) is None} == meant
    for rule in config["dynamic"]:  # as other engines match them
        skipped = {name for name in names if re.match(rule.removeprefix("-:"), name)}
        assert skipped == meant


def test_fused_layers_are_named_as_engines_fuse_them():
    writer = make_writer(ignore=("lm_head", "self_attn"))
    layer = make_layer(ignored=["qkv_proj", "out_proj"])
    assert set(writer.quantize_layer(layer)) == {IGNORED}
    rules = [rule.removeprefix("-:") for rule in writer.config()["dynamic"]]
    assert r"^model\.layers\.0\.self_attn\.qkv_proj$" in rules
    assert len(rules) == 2


# --- what cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"bits": 5}, ["--bits 5 is none of 2, 3, 4, 8"]),
        ({"group_size": 48}, ["--group-size 48 is none of -1, 32, 64, 128"]),
        ({"damp_percent": 0.0}, [r"--damp-percent 0\.0 is not between"]),
        ({"bits": 16, "damp_percent": 1.0}, ["--bits 16", r"--damp-percent 1\.0"]),
    ],
)
def test_options_out_of_range(changes, messages):
    with pytest.raises(ConfigError) as info:
        make_writer(**changes)
    told = str(info.value).split("; ")
    for found, message in zip(told, messages, strict=True):
        assert re.match(message, found)


@pytest.mark.parametrize(
    ("num_inputs", "size", "group_size"), [(80, 64, -1), (64, 40, -1), (96, 64, 64), (64, 64, 128)]
)
def test_sizes_that_do_not_fit(num_inputs, size, group_size):
    linear = make_linear("mlp.down_proj", {"down_proj": size}, num_inputs)
    layer = CalibratedLayer(0, TINY_MODEL, {"down_proj": linear}, {})
    with pytest.raises(ConfigError, match=rf"{IGNORED} has {num_inputs} inputs and {size} outputs"):
        make_writer(group_size=group_size).quantize_layer(layer)


def test_inputs_that_are_not_finite_are_refused():
    layer = make_layer()
    layer.linears["qkv_proj"].inputs[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"Hessian of model\.layers\.0\.self_attn\.qkv_proj"):
        make_writer().quantize_layer(layer)


# --- a whole model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"act_order": True}),
        ("phi3", {"symmetric": False, "ignore": ("lm_head", "layers.1.mlp")}),
    ],
)
def test_a_checkpoint_is_written_and_served(family, options, tmp_path):
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    make_checkpoint(family, source, vocab_size=400)
    make_tokenizer("byte-level", source)
    draw = random.Random(1)
    text.write_text("\n".join(" ".join(draw.choices(["one", "two", "three"], k=9)) for _ in range(60)))
    report = QuantizeJob(
        config=make_source_config(str(source), device="cpu"),
        options=QuantizeOptions(**{"method": "gptq", "bits": 8, "group_size": 32, **options}),
        out=out,
        calibration=text,
        num_samples=6,
        sample_len=24,
        num_eval_samples=4,
    ).run(lambda _layer, _count: None)
    assert all(error < 0.02 for layer in report.layers for error in layer.linears.values())
    assert abs(report.quality.after / report.quality.before - 1) < 0.02
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    skipped = [name for name in load_file(out / "model.safetensors") if name.endswith("proj.weight")]
    assert bool(skipped) == ("ignore" in options)
    with LLM(str(out), dtype="float32", device="cpu", num_kv_blocks=16, max_model_len=64) as llm:
        (answer,) = llm.generate(["one two"])
    assert answer.outputs[0].token_ids
