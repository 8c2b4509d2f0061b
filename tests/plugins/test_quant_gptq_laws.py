"""Every way in which the quantizer stores layers does what a quantizer must do."""

from __future__ import annotations

import numpy as np
import pytest
from gptq_oracle import round_weight, store_gptq, store_packed
from hypothesis import settings

from core.testing.quantizer import QuantizerConformance
from plugins.quant import gptq as plugin

(ENTRY,) = plugin.core_register_quantizers()


class GptqLaws(QuantizerConformance):
    """`bits`, groups and so on are those of the config."""

    entry = ENTRY
    dtypes = ("float32", "bfloat16", "float16", "float64")
    in_step, out_step = 16, 16
    settings = settings(QuantizerConformance.settings, max_examples=10)
    # Zero points are few, and which inputs form a group is asked of all of them.
    whole_dims = frozenset({("qzeros", 1), ("g_idx", 0)})
    skipped_layer = "model.layers.1.mlp.down_proj"
    max_weight_error = 0.2

    def rounded(self, spec, weight):
        config, order = self.quantization_config, None
        if config["desc_act"]:
            order = np.random.default_rng(len(spec.name)).permutation(weight.shape[1])
        return round_weight(
            weight, config["bits"], config["group_size"], symmetric=config["sym"], order=order
        )

    def quantize(self, spec, shard, weight, bias):
        config = self.quantization_config
        version = 2 if config["checkpoint_format"] == "gptq_v2" else 1
        tensors = store_gptq(self.rounded(spec, weight), config["bits"], version=version)
        self.weights[tensors["qweight"].numpy().tobytes()] = self.rounded(spec, weight).weight()
        return tensors if bias is None else {**tensors, "bias": bias}

    def dequantize(self, spec, shard, tensors):
        return self.weights[tensors["qweight"].numpy().tobytes()]

    @pytest.fixture(autouse=True)
    def _remember(self):
        self.weights = {}


def gptq_config(bits, group_size, **changes):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "dynamic": {r"-:.*\.layers\.1\.mlp": {}},
        **changes,
    }


class TestFourBits(GptqLaws):
    quantization_config = gptq_config(4, 32, sym=False)


class TestFourBitsInAnyOrder(GptqLaws):
    quantization_config = gptq_config(4, 16, sym=False, desc_act=True, checkpoint_format="gptq_v2")
    whole_dims = GptqLaws.whole_dims | {("qzeros", 0), ("scales", 0)}


class TestEightBitsWithoutGroups(GptqLaws):
    quantization_config = gptq_config(8, -1)
    in_step, out_step = 12, 8


class TestThreeBits(GptqLaws):
    quantization_config = gptq_config(3, 32, sym=False)
    in_step, out_step = 32, 32
    whole_dims = GptqLaws.whole_dims | {("qweight", 0)}  # words do not hold whole codes
    max_weight_error = 0.3


class TestTwoBits(GptqLaws):
    quantization_config = gptq_config(
        2, 24, sym=False
    )  # groups end inside of words, the last one early
    max_weight_error = 0.6


class PackedLaws(GptqLaws):
    whole_dims = frozenset({("weight_shape", 0)})

    def quantize(self, spec, shard, weight, bias):
        (group,) = self.quantization_config["config_groups"].values()
        weights, order = group["weights"], None
        if weights.get("actorder"):
            order = np.random.default_rng(len(spec.name)).permutation(weight.shape[1])
        bits, symmetric = weights["num_bits"], weights["symmetric"]
        size = weights.get("group_size", -1)
        rounded = round_weight(weight, bits, size, symmetric=symmetric, order=order)
        tensors = store_packed(rounded, bits, symmetric=symmetric, with_order=order is not None)
        self.weights[tensors["weight_packed"].numpy().tobytes()] = rounded.weight()
        return tensors if bias is None else {**tensors, "bias": bias}

    def dequantize(self, spec, shard, tensors):
        return self.weights[tensors["weight_packed"].numpy().tobytes()]


def packed_config(**weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*layers.1.mlp"],
    }


class TestPackedFourBits(PackedLaws):
    quantization_config = packed_config(num_bits=4, strategy="group", group_size=32, symmetric=True)


class TestPackedFourBitsAsymmetric(PackedLaws):
    quantization_config = packed_config(num_bits=4, strategy="group", group_size=16, symmetric=False)
    whole_dims = PackedLaws.whole_dims | {("weight_zero_point", 0)}


class TestPackedInAnyOrder(PackedLaws):
    quantization_config = packed_config(
        num_bits=4, strategy="group", group_size=16, symmetric=False, actorder="group"
    )
    whole_dims = PackedLaws.whole_dims | {
        ("weight_zero_point", 0),
        ("weight_zero_point", 1),
        ("weight_scale", 1),
        ("weight_g_idx", 0),
    }


class TestPackedEightBitsByChannel(PackedLaws):
    quantization_config = packed_config(num_bits=8, strategy="channel", symmetric=True)
    in_step, out_step = 9, 7  # words are filled up


class TestPackedFiveBits(PackedLaws):
    quantization_config = packed_config(num_bits=5, strategy="group", group_size=10, symmetric=False)
    in_step, out_step = 20, 6
    whole_dims = PackedLaws.whole_dims | {("weight_packed", 1), ("weight_zero_point", 0)}
