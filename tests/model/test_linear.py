"""The scheme of unquantized weights."""

from __future__ import annotations

import pytest
import torch

from core.interfaces import LinearSpec, QuantScheme, missing_members
from core.model.linear import PlainScheme

SHARDS = (("a.q_proj", 6), ("a.k_proj", 3), ("a.v_proj", 3))


def make_spec(**changes):
    settings = {
        "name": "a.qkv_proj",
        "in_features": 5,
        "shards": SHARDS,
        "bias": True,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "role": "qkv",
    }
    return LinearSpec(**{**settings, **changes})


def test_it_fulfils_the_protocol():
    assert missing_members(PlainScheme(), QuantScheme) == []


@pytest.mark.parametrize("bias", [True, False])
def test_shards_are_stacked_in_order(bias):
    scheme, spec = PlainScheme(), make_spec(bias=bias)
    module = scheme.make_linear(spec)
    parts = []
    for shard in (2, 0, 1):  # in whatever order they come
        wanted = scheme.tensors(spec, shard)
        tensors = {name: torch.randn(tensor.shape) for name, tensor in wanted.items()}
        scheme.load(module, spec, shard, tensors)
        parts.append((shard, tensors))
    scheme.finalize(module, spec)
    x = torch.randn(4, 5)
    expected = [
        torch.nn.functional.linear(x, tensors["weight"], tensors.get("bias"))
        for _, tensors in sorted(parts, key=lambda part: part[0])
    ]
    torch.testing.assert_close(module(x), torch.cat(expected, dim=-1))


def test_tensors_name_the_shapes_of_a_shard():
    scheme = PlainScheme()
    shapes = {name: t.shape for name, t in scheme.tensors(make_spec(), 1).items()}
    assert shapes == {"weight": (3, 5), "bias": (3,)}
    assert set(scheme.tensors(make_spec(bias=False), 0)) == {"weight"}


def test_loading_converts_the_dtype():
    scheme, spec = PlainScheme(), make_spec(bias=False, dtype=torch.bfloat16)
    module = scheme.make_linear(spec)
    weight = torch.randn(6, 5)
    scheme.load(module, spec, 0, {"weight": weight})
    torch.testing.assert_close(module.weight[:6], weight.bfloat16(), rtol=0, atol=0)
