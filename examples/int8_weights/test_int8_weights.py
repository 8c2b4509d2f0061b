from __future__ import annotations

import json
import shutil
from typing import ClassVar

import int8_weights as plugin
import pytest
import torch
from hypothesis import settings
from int8_linear import quantize
from safetensors.torch import load_file, save_file

from core import LLM, SamplingParams
from core.interfaces import LinearSpec
from core.quant.calibration import CalibratedLayer, CalibratedLinear, QuantizeOptions
from core.testing import PluginConformance
from core.testing.checkpoints import make_checkpoint
from core.testing.quantizer import QuantizerConformance

(ENTRY,) = plugin.core_register_quantizers()
SETTINGS = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 16}


class TestPlugin(PluginConformance):
    module = "int8_weights"


class TestStored(QuantizerConformance):
    entry = ENTRY
    quantization_config: ClassVar = {"quant_method": "int8-rows", "ignore": ["lm_head", "layers.7"]}
    dtypes = ("float32", "bfloat16", "float64")
    in_step = out_step = 1
    max_weight_error = 0.02
    skipped_layer = "model.layers.7.mlp.down_proj"
    settings = settings(QuantizerConformance.settings, max_examples=10)

    def quantize(self, spec, shard, weight, bias):
        return quantize(weight) | ({} if bias is None else {"bias": bias})

    def dequantize(self, spec, shard, tensors):
        return tensors["weight"].double() * tensors["scale"].double()[:, None]


def test_codes_use_the_whole_range_and_rows_of_zeros_stay_zero():
    weight = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]])
    stored = quantize(weight)
    assert stored["weight"].tolist() == [[64, -127, 32], [0, 0, 0]]
    assert stored["scale"].tolist() == [pytest.approx(1 / 127), 1.0]


# --- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint("llama-bias", tmp_path_factory.mktemp("int8") / "plain")


@pytest.fixture(scope="module")
def stored(plain, tmp_path_factory):
    """The same model with each layer as the writer writes it."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("int8") / "stored")
    tensors = load_file(folder / "model.safetensors")
    writer = ENTRY.make_writer(QuantizeOptions(method="int8"))
    for prefix in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
        layer = make_layer(prefix, tensors[f"{prefix}.weight"], tensors.get(f"{prefix}.bias"))
        for suffix, tensor in writer.quantize_layer(layer)[prefix].items():
            tensors[f"{prefix}.{suffix}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = writer.config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_layer(prefix, weight, bias, ignored=()):
    out_features, in_features = weight.shape
    spec = LinearSpec(
        name=prefix,
        in_features=in_features,
        shards=((prefix, out_features),),
        bias=bias is not None,
        dtype=torch.float32,
        device=weight.device,
        role="out",
    )
    linear = CalibratedLinear(spec, [weight], [bias], inputs=weight.new_empty(0, in_features))
    return CalibratedLayer(0, None, {"out_proj": linear}, norms={}, ignored=frozenset(ignored))


def test_layers_that_are_ignored_are_not_written():
    writer = ENTRY.make_writer(QuantizeOptions(method="int8"))
    layer = make_layer("a.o_proj", torch.ones(2, 2), None, ignored=["out_proj"])
    assert writer.quantize_layer(layer) == {}
    assert writer.config() == {"quant_method": "int8-rows", "ignore": ["lm_head"]}


def run(folder, **settings):
    with LLM(str(folder), plugins=["py:int8_weights"], **SETTINGS, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
        completion = llm.generate([[3, 1, 4, 1, 5, 9, 2, 6]], params)[0].outputs[0]
        return completion, llm.assembly.plan


def test_a_written_checkpoint_gives_what_converting_gives(plain, stored):
    expected, converted_plan = run(plain, quantization="int8")
    actual, plan = run(stored)
    assert actual == expected
    for made in (plan, converted_plan):
        assert made.choices["quant"].name == "int8"
        assert made.weight_bytes < 0.5 * run(plain)[1].weight_bytes


def test_the_model_is_hardly_another_one(plain):
    exact, quantized = run(plain)[0], run(plain, quantization="int8")[0]
    assert quantized.token_ids[:1] == exact.token_ids[:1]
    logprobs = [one.logprobs[0][one.token_ids[0]].logprob for one in (exact, quantized)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.1)
    assert logprobs[0] != logprobs[1]
