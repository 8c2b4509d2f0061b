"""Every built-in quantizer, in each format that it reads, does what a quantizer must do."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings

from core.builtin import core_register_quantizers
from core.testing.quantizer import QuantizerConformance
from plugins.quant import awq, fp8, gptq

(NONE,) = core_register_quantizers()
(AWQ,) = awq.core_register_quantizers()
(FP8,) = fp8.core_register_quantizers()
(GPTQ,) = gptq.core_register_quantizers()
FEW = settings(QuantizerConformance.settings, max_examples=10)


def with_bias(tensors, bias):
    return tensors if bias is None else {**tensors, "bias": bias}


class TestPlain(QuantizerConformance):
    entry = NONE
    dtypes = ("float32", "bfloat16", "float16", "float64")
    in_step, out_step = 3, 2
    max_weight_error = 5e-3
    skipped_layer = "model.layers.1.mlp.down_proj"

    def quantize(self, spec, shard, weight, bias):
        return with_bias({"weight": weight}, bias)

    def dequantize(self, spec, shard, tensors):
        return tensors["weight"].double()


# --- AWQ -------------------------------------------------------------------------------------------

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight consecutive codes is


def awq_pack(codes):
    """[K, N] -> [K, N / 8], one nibble at a time."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for index in range(codes.shape[1]):
        words[:, index // 8] |= codes[:, index].long() << 4 * AWQ_NIBBLES[index % 8]
    return (words - (words >= 2**31) * 2**32).int()


def awq_unpack(words):
    shifts = torch.tensor(AWQ_NIBBLES) * 4
    return (words.long()[:, :, None] >> shifts & 15).flatten(1)


AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "version": "gemm",
    "zero_point": True,
    "modules_to_not_convert": ["layers.1.mlp"],
}
AWQ_WITHOUT_GROUPS = {**AWQ_CONFIG, "group_size": -1}


class TestAwq(QuantizerConformance):
    entry = AWQ
    group_size = 32
    quantization_config = AWQ_CONFIG
    dtypes = ("float32", "bfloat16", "float64")
    in_step, out_step = 32, 8
    skipped_layer = "model.layers.1.mlp.down_proj"
    refused_sizes = ((48, 8), (32, 12))
    settings = FEW

    def quantize(self, spec, shard, weight, bias):
        size = self.group_size if self.group_size > 0 else weight.shape[1]
        groups = weight.T.unflatten(0, (-1, size))  # [G, size, outputs]
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (groups / scales.float()[:, None]).round().add(zeros[:, None]).clamp(0, 15)
        tensors = {
            "qweight": awq_pack(codes.flatten(0, 1)),
            "qzeros": awq_pack(zeros),
            "scales": scales,
        }
        return with_bias(tensors, bias)

    def dequantize(self, spec, shard, tensors):
        codes, zeros = awq_unpack(tensors["qweight"]), awq_unpack(tensors["qzeros"])
        group = torch.arange(len(codes)) // (len(codes) // len(zeros))
        return ((codes - zeros[group]) * tensors["scales"].double()[group]).T


class TestAwqWithoutGroups(TestAwq):
    group_size = -1
    quantization_config = AWQ_WITHOUT_GROUPS
    in_step = 24
    refused_sizes = ((48, 12),)


# --- FP8 -------------------------------------------------------------------------------------------


DEFAULTS = {fp8.NAME: fp8.Settings()}
KEEP_INPUTS = {fp8.NAME: fp8.Settings(activations="keep")}
KEEP_INPUTS_BLOCKS = {fp8.NAME: fp8.Settings(activations="keep", strategy="block")}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["layers.1.mlp"]}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}


class Fp8Kit:
    entry = FP8
    plugin_settings = DEFAULTS
    max_weight_error = 2**-4  # half of the last bit of a mantissa of 3
    settings = FEW


def fp8_encode(weight, scale):
    return (weight / scale).to(torch.float8_e4m3fn)


def fp8_round(x, scale):
    """Round as the layer does: in float32, then to the dtype of activations."""
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class TestFp8Static(Fp8Kit, QuantizerConformance):
    quantization_config = STATIC
    skipped_layer = "model.layers.1.mlp.down_proj"
    input_scales = (2.0**-6, 2.0**-5, 2.0**-6)

    def quantize(self, spec, shard, weight, bias):
        scale = weight.abs().max() / 448
        tensors = {
            "weight": fp8_encode(weight, scale),
            "weight_scale": scale,
            "input_scale": torch.tensor([self.input_scales[shard]]),
        }
        return with_bias(tensors, bias)

    def dequantize(self, spec, shard, tensors):
        return tensors["weight"].double() * tensors["weight_scale"].double()

    def round_inputs(self, spec, shard, x):
        return fp8_round(x, torch.tensor(self.input_scales[shard]))


class TestFp8Blocks(Fp8Kit, QuantizerConformance):
    quantization_config = BLOCKS
    in_step, out_step = 5, 7  # blocks at the ends are smaller than others

    def spread(self, scale, shape):
        return scale.repeat_interleave(16, 0).repeat_interleave(8, 1)[: shape[0], : shape[1]]

    def quantize(self, spec, shard, weight, bias):
        rows, columns = -(-weight.shape[0] // 16), -(-weight.shape[1] // 8)
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                scale[i, j] = weight[16 * i : 16 * i + 16, 8 * j : 8 * j + 8].abs().max() / 448
        codes = fp8_encode(weight, self.spread(scale, weight.shape))
        return with_bias({"weight": codes, "weight_scale_inv": scale}, bias)

    def dequantize(self, spec, shard, tensors):
        scale = self.spread(tensors["weight_scale_inv"].double(), tensors["weight"].shape)
        return tensors["weight"].double() * scale

    def round_inputs(self, spec, shard, x):
        (inputs,) = spec.input_spans
        rounded = x.clone()
        for group in range(inputs.start // 8, -(-inputs.stop // 8)):
            part = slice(max(8 * group - inputs.start, 0), max(8 * group + 8 - inputs.start, 0))
            if rounded[:, part].numel():
                scale = x[:, part].float().abs().amax(-1, keepdim=True) / 448
                rounded[:, part] = fp8_round(x[:, part], scale)
        return rounded


class TestFp8AtLoad(Fp8Kit, QuantizerConformance):
    plugin_settings = KEEP_INPUTS
    in_step, out_step = 5, 3
    whole_dims = frozenset({("weight", 1)})  # a scale is chosen from all inputs of an output

    def quantize(self, spec, shard, weight, bias):
        return with_bias({"weight": weight}, bias)

    def dequantize(self, spec, shard, tensors):
        scale = tensors["weight"].abs().amax(1, keepdim=True) / 448
        return fp8_encode(tensors["weight"], scale).double() * scale.double()


class TestFp8AtLoadInBlocks(TestFp8AtLoad):
    plugin_settings = KEEP_INPUTS_BLOCKS
    in_step, out_step = 72, 40
    whole_dims = frozenset({("weight", 0), ("weight", 1)})

    def dequantize(self, spec, shard, tensors):
        weight = tensors["weight"]
        out = torch.empty_like(weight, dtype=torch.float64)
        for i in range(0, weight.shape[0], 128):
            for j in range(0, weight.shape[1], 128):
                block = weight[i : i + 128, j : j + 128]
                scale = block.abs().max() / 448
                out[i : i + 128, j : j + 128] = fp8_encode(block, scale).double() * scale.double()
        return out


COMPRESSED_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["re:.*layers.1.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


class TestFp8Channels(Fp8Kit, QuantizerConformance):
    """As compressed-tensors stores it."""

    quantization_config = COMPRESSED_FP8
    skipped_layer = "model.layers.1.mlp.down_proj"

    def quantize(self, spec, shard, weight, bias):
        scale = weight.abs().amax(1, keepdim=True) / 448
        return with_bias({"weight": fp8_encode(weight, scale), "weight_scale": scale}, bias)

    def dequantize(self, spec, shard, tensors):
        return tensors["weight"].double() * tensors["weight_scale"].double()

    def round_inputs(self, spec, shard, x):
        return fp8_round(x, x.float().abs().amax(-1, keepdim=True) / 448)


# --- GPTQ ------------------------------------------------------------------------------------------


def bits_of(codes, bits):
    """Write codes as a stream of bits, lowest first, in words of 32; along the last dimension."""
    stream = codes.numpy().astype(np.int64)[..., None] >> np.arange(bits) & 1
    stream = stream.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32).copy())


def codes_of(words, bits, count):
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return torch.from_numpy((stream.astype(np.int64) << np.arange(bits)).sum(-1))


def quantize_groups(weight, bits, group_size, symmetric, order=None):
    """Round to nearest: codes [outputs, inputs], zero points and scales [outputs, groups]."""
    order = torch.arange(weight.shape[1]) // group_size if order is None else order
    num_groups, top = int(order.max()) + 1, 2**bits - 1
    scales = torch.empty(len(weight), num_groups, dtype=torch.float16)
    zeros = torch.full((len(weight), num_groups), 2 ** (bits - 1))
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for group in range(num_groups):
        part = weight[:, order == group]
        if symmetric:
            scale = (part.abs().amax(1) / 2 ** (bits - 1)).half()
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / top).half()
            zeros[:, group] = (-low / scale.float()).round().clamp(0, top)
        scales[:, group] = scale
        steps = (part / scale.float()[:, None]).round().long() + zeros[:, group, None]
        codes[:, order == group] = steps.clamp(0, top)
    return codes, zeros, scales


GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "dynamic": {r"-:model\.layers\.1\.": {}},
}
GPTQ_ORDERED = {
    "quant_method": "gptq",
    "bits": 8,
    "group_size": 16,
    "sym": False,
    "desc_act": True,
    "checkpoint_format": "gptq_v2",
}
GPTQ_OF_THREE_BITS = {"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False}


def packed_config(**arguments):
    strategy = "channel" if arguments["group_size"] is None else "group"
    weights = {"type": "int", "strategy": strategy, **arguments}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


class GptqKit:
    """`bits`, `group_size` and the rest are those of `quantization_config`."""

    entry = GPTQ
    dtypes = ("float32", "bfloat16", "float64")
    in_step, out_step = 32, 5
    settings = FEW

    def order(self, shard, num_inputs):
        size = self.quantization_config["group_size"]
        size = num_inputs if size < 0 else size
        if not self.quantization_config.get("desc_act"):
            return torch.arange(num_inputs) // size
        return (torch.arange(num_inputs) + shard) % (num_inputs // size)

    def quantize(self, spec, shard, weight, bias):
        config = self.quantization_config
        order, bits = self.order(shard, spec.in_features), config["bits"]
        codes, zeros, scales = quantize_groups(weight, bits, None, config["sym"], order)
        if config.get("checkpoint_format", "gptq") == "gptq":
            zeros = (zeros - 1) % 2**bits
        tensors = {
            "qweight": bits_of(codes, bits).T.contiguous(),
            "qzeros": bits_of(zeros.T.contiguous(), bits),
            "scales": scales.T.contiguous(),
            "g_idx": order.int(),
        }
        return with_bias(tensors, bias)

    def dequantize(self, spec, shard, tensors):
        config, order = self.quantization_config, tensors["g_idx"].long()
        bits, size = config["bits"], spec.shards[shard][1]
        codes = codes_of(tensors["qweight"].T, bits, spec.in_features)
        zeros = codes_of(tensors["qzeros"], bits, size)
        if config.get("checkpoint_format", "gptq") == "gptq":
            zeros = (zeros + 1) % 2**bits
        return (codes - zeros.T[:, order]) * tensors["scales"].double().T[:, order]


class TestGptq(GptqKit, QuantizerConformance):
    quantization_config = GPTQ_CONFIG
    whole_dims = frozenset({("qzeros", 1), ("g_idx", 0)})
    skipped_layer = "model.layers.1.mlp.down_proj"


class TestGptqOrdered(GptqKit, QuantizerConformance):
    """Inputs in an order of their own, another for each shard; zero points as they are."""

    quantization_config = GPTQ_ORDERED
    whole_dims = frozenset({("qzeros", 0), ("qzeros", 1), ("g_idx", 0), ("scales", 0)})


class TestGptqOfThreeBits(GptqKit, QuantizerConformance):
    """Codes that are split between words."""

    quantization_config = GPTQ_OF_THREE_BITS
    max_weight_error = 0.4
    whole_dims = frozenset({("qweight", 0), ("qzeros", 0), ("qzeros", 1), ("g_idx", 0), ("scales", 0)})


class PackedKit:
    """As compressed-tensors stores integers."""

    entry = GPTQ
    in_step, out_step = 32, 8
    settings = FEW

    def quantize(self, spec, shard, weight, bias):
        arguments = self.quantization_config["config_groups"]["group_0"]["weights"]
        size = arguments["group_size"] or spec.in_features
        bits = arguments["num_bits"]
        codes, zeros, scales = quantize_groups(weight, bits, size, arguments["symmetric"])
        tensors = {
            "weight_packed": bits_of(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not arguments["symmetric"]:
            tensors["weight_zero_point"] = bits_of(zeros.T.contiguous(), bits).T.contiguous()
        return with_bias(tensors, bias)


class TestPackedGroups(PackedKit, QuantizerConformance):
    quantization_config = packed_config(num_bits=4, symmetric=False, group_size=16)
    whole_dims = frozenset({("weight_zero_point", 0), ("weight_shape", 0)})


class TestPackedChannels(PackedKit, QuantizerConformance):
    quantization_config = packed_config(num_bits=8, symmetric=True, group_size=None)
    max_weight_error = 0.02
    whole_dims = frozenset({("weight_shape", 0)})
