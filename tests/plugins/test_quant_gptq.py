"""Whole models of packed weights, against `transformers` with the weights that they stand for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from gptq_oracle import round_weight, store_gptq, store_packed
from safetensors.torch import load_file, save_file

from core.assemble import make_plan
from core.config import load_config
from core.errors import CheckpointError, PlanError
from core.interfaces import KVCacheSpec
from core.model.decoder import make_decoder
from core.model.weights import load_dummy, load_weights
from core.testing.attention import make_batch
from core.testing.checkpoints import make_checkpoint, reference_logits
from plugins.attention.torch.backend import TorchAttention
from plugins.quant.gptq.linear import PackedLinear

CPU = torch.device("cpu")
TOKENS = [3, 17, 5, 99, 42, 8, 8, 120, 64, 31, 77, 4]
LINEAR = re.compile(r"(?:.*\.(?:q|k|v|o|qkv|gate|up|down|gate_up)_proj|lm_head)\.weight")


def gptq_config(bits=4, group_size=32, **changes):
    settings = {"bits": bits, "group_size": group_size, "sym": True, "desc_act": False}
    return {"quant_method": "gptq", "checkpoint_format": "gptq", **settings, **changes}


def packed_config(*, ignore=("lm_head",), **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def store(weight, config, seed):
    """Round a weight as a config says; the tensors of a checkpoint, and the weight in float64."""
    random = np.random.default_rng(seed)
    if "config_groups" in config:
        (group,) = config["config_groups"].values()
        weights = {"symmetric": True, "group_size": -1, **group["weights"]}
        bits, size, symmetric = (weights[key] for key in ("num_bits", "group_size", "symmetric"))
        is_ordered = weights.get("actorder") == "group"
    else:
        bits, size, symmetric = (config[key] for key in ("bits", "group_size", "sym"))
        is_ordered = config["desc_act"]
    order = random.permutation(weight.shape[1]) if is_ordered else None
    rounded = round_weight(weight, bits, size, symmetric=symmetric, order=order)
    if "config_groups" in config:
        tensors = store_packed(rounded, bits, symmetric=symmetric, with_order=is_ordered)
    else:
        tensors = store_gptq(rounded, bits, version=1 if config["checkpoint_format"] == "gptq" else 2)
    return tensors, rounded.weight()


def write_pair(config, variant, folder, is_skipped=lambda name: name == "lm_head"):
    """Write a quantized checkpoint, and an unquantized one of the weights that it stands for."""
    plain, quantized = folder / "plain", folder / "quantized"
    make_checkpoint(variant, plain)
    make_checkpoint(variant, quantized)
    dense, stored = load_file(plain / "model.safetensors"), {}
    for index, name in enumerate(list(dense)):
        prefix = name.removesuffix(".weight")
        if not LINEAR.fullmatch(name) or is_skipped(prefix) or "vision" in name:
            stored[name] = dense[name]
            continue
        tensors, weight = store(dense[name], config, index)
        dense[name] = weight.float()
        stored |= {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    state(quantized, config)


def state(folder, config, key="quantization_config"):
    content = json.loads((folder / "config.json").read_text())
    content[key] = config
    (folder / "config.json").write_text(json.dumps(content))


def make_decoder_of(path, dtype="float32"):
    """Assemble what a plan of the checkpoint says."""
    plan = make_plan(load_config({"model": str(path), "dtype": dtype, "device": "cpu"}))
    attention, dtype = TorchAttention(), getattr(torch, dtype)
    decoder = make_decoder(
        plan.model,
        scheme=plan.factory("quant")(plan),
        attention=attention,
        dtype=dtype,
        device=CPU,
        max_len=64,
    )
    size = (plan.model.num_layers, 5, 16, plan.model.num_kv_heads, plan.model.head_dim)
    attention.allocate_cache(KVCacheSpec(*size, dtype=dtype, device=CPU))
    return decoder, attention


@torch.inference_mode()
def logits_of(decoder, attention):
    count = len(TOKENS)
    meta = attention.prepare(make_batch([0], [count], [[1]], 16))
    return decoder.logits(decoder(torch.tensor(TOKENS), torch.arange(count), meta))


def check(folder):
    decoder, attention = make_decoder_of(folder / "quantized")
    load_weights(decoder, folder / "quantized", device=CPU)
    expected = reference_logits(folder / "plain", TOKENS, max_model_len=64)
    torch.testing.assert_close(logits_of(decoder, attention), expected, rtol=1e-5, atol=1e-5)
    return decoder


def count_packed(decoder):
    return sum(isinstance(module, PackedLinear) for _, module, _ in decoder.linears())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sym": False}, {"sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}],
    ids=["sym", "asym", "ordered"],
)
def test_logits_are_those_of_the_weights_that_are_meant(bits, group_size, changes, tmp_path):
    write_pair(gptq_config(bits, group_size, **changes), "llama-bias", tmp_path)
    assert count_packed(check(tmp_path)) == 8


@pytest.mark.parametrize(
    "weights",
    [
        {"strategy": "group", "group_size": 32},
        {"strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"},
        {"strategy": "channel", "num_bits": 8, "symmetric": False},
    ],
    ids=["group", "ordered", "channel"],
)
def test_packed_logits(weights, tmp_path):
    write_pair(packed_config(**weights), "llama-bias", tmp_path)
    assert count_packed(check(tmp_path)) == 8


@pytest.mark.parametrize("variant", ["phi3", "gemma3-multimodal", "qwen3", "llama3.2"])
@pytest.mark.parametrize("kind", ["gptq", "packed"])
def test_families(kind, variant, tmp_path):
    ignore = ["lm_head", "re:.*vision_tower", "re:.*multi_modal"]
    config = gptq_config(desc_act=True, dynamic={"-:.*vision_tower": {}})
    if kind == "packed":
        config = packed_config(strategy="group", group_size=16, ignore=ignore)
    write_pair(config, variant, tmp_path)
    check(tmp_path)


def test_layers_may_be_skipped_by_rules_and_the_head_may_be_quantized(tmp_path):
    config = gptq_config(lm_head=True, dynamic={r"-:.*\.layers\.0\.self_attn": {}, r"-:.*\.k_proj": {}})
    skipped = re.compile(r".*(layers\.0\.self_attn|k_proj)")
    write_pair(config, "llama3", tmp_path, skipped.match)
    decoder = check(tmp_path)
    assert count_packed(decoder) == 2 * 4 - 2 + 1
    assert [type(part).__name__ for part in decoder.layers[1].qkv_proj.shards] == [
        "PackedPart",
        "PlainPart",
        "PackedPart",
    ]


def test_modules_of_a_block(tmp_path):
    config = gptq_config(modules_in_block_to_quantize=[["self_attn.o_proj"], ["mlp.down_proj"]])
    write_pair(config, "llama3", tmp_path, lambda name: not name.endswith(("o_proj", "down_proj")))
    assert count_packed(check(tmp_path)) == 4


def test_older_checkpoints_call_their_config_otherwise(tmp_path):
    config = packed_config(strategy="group", group_size=32)
    write_pair(config, "llama3", tmp_path)
    path = tmp_path / "quantized" / "config.json"
    content = json.loads(path.read_text())
    content["compression_config"] = content.pop("quantization_config")
    path.write_text(json.dumps(content))
    check(tmp_path)


def test_the_plan_says_why_a_checkpoint_is_refused(tmp_path):
    make_checkpoint("llama3", tmp_path)
    state(tmp_path, gptq_config(bits=5))
    with pytest.raises(PlanError, match=r"quant\.gptq: .*bits is 5"):
        make_decoder_of(tmp_path)


def test_a_config_that_forgets_the_order_is_noticed(tmp_path):
    write_pair(gptq_config(desc_act=True), "llama3", tmp_path)
    state(tmp_path / "quantized", gptq_config())
    with pytest.raises(CheckpointError, match=r"layers\.\d\..*g_idx .* set desc_act to true"):
        check(tmp_path)


@pytest.mark.parametrize("config", [gptq_config(8, -1), gptq_config(2, 32, sym=False, desc_act=True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dummy_weights_keep_activations_sane(config, dtype, tmp_path):
    make_checkpoint("llama3", tmp_path)
    state(tmp_path, config)
    decoder, attention = make_decoder_of(tmp_path, dtype)
    load_dummy(decoder, 0)
    logits = logits_of(decoder, attention)
    assert logits.isfinite().all()
    assert len(set(logits.argmax(-1).tolist())) > 3
