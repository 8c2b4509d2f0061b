from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from acme_cythera import quant
from acme_cythera.block4 import decode, encode, find_peaks, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from core.interfaces import LinearSpec
from core.registry import Requirements
from core.testing import PluginConformance
from core.testing.quantizer import QuantizerConformance

(ENTRY,) = quant.core_register_quantizers()


def blocks_of(num_inputs):
    return torch.arange(num_inputs) // quant.BLOCK


def store(weight, bias=None):
    blocks = blocks_of(weight.shape[1])
    peaks = find_peaks(weight, blocks)
    stored = {"codes": pack(encode(weight, peaks, blocks)), "peaks": peaks}
    return stored if bias is None else {**stored, "bias": bias}


class TestPlugin(PluginConformance):
    module = "acme_cythera.quant"


class TestBlock4(QuantizerConformance):
    entry = ENTRY
    quantization_config: ClassVar = {"quant_method": "acme-block4", "block_size": 32}
    in_step = 31  # so that blocks and bytes are left unfilled
    out_step = 3
    max_weight_error = 4 / 14  # half a step, a seventh of a peak that is four times the usual size
    settings = settings(QuantizerConformance.settings, max_examples=12)

    def quantize(self, spec, shard, weight, bias):
        return store(weight, bias)

    def dequantize(self, spec, shard, tensors):
        codes = torch.stack((tensors["codes"] & 15, tensors["codes"] >> 4), -1).flatten(1)
        codes = codes[:, : spec.in_features].double()
        return (codes - 8) / 7 * tensors["peaks"].double()[:, blocks_of(spec.in_features)]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_packed_codes_come_back(codes):
    row = torch.tensor([codes], dtype=torch.uint8)
    assert torch.equal(unpack(pack(row))[:, : len(codes)], row)


def test_the_largest_of_a_block_is_exact_and_zeros_stay_zero():
    weight = torch.zeros(2, 64)
    weight[0, 5], weight[0, 40] = -2.0, 0.5
    blocks = blocks_of(64)
    peaks = find_peaks(weight, blocks)
    assert peaks.tolist() == [[2.0, 0.5], [0.0, 0.0]]
    assert torch.equal(decode(encode(weight, peaks, blocks), peaks, blocks), weight)


def test_converting_gives_what_is_stored():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 70, generator=generator)
    spec = LinearSpec(
        name="a.down_proj",
        in_features=70,
        shards=(("a.down_proj", 6),),
        bias=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
        role="down",
    )
    outs = []
    for config, tensors in (({}, {"weight": weight}), ({"quant_method": quant.METHOD}, store(weight))):
        scheme = ENTRY.factory(SimpleNamespace(quantization=config))
        module = scheme.make_linear(spec)
        with torch.no_grad():
            scheme.load(module, spec, 0, tensors)
        scheme.finalize(module, spec)
        outs.append(module(torch.eye(70)))
    assert torch.equal(*outs)


def test_refuses_another_block_size():
    config = {"quant_method": quant.METHOD, "block_size": 64}
    wanted = Requirements(device="cpu", dtype="float32", quantization_config=config)
    assert "64" in ENTRY.unsupported(wanted)[0]
