"""The product with a gate behind it, for many tokens on Hopper, against float64.  Skipped on other cards."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from plugins.quant.dense.gate_hopper import Gate, make_schedule
from plugins.quant.dense.linear import workspace_on

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def draw(num_tokens, num_outputs, num_inputs, dtype):
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_inputs, generator=generator, device="cuda", dtype=torch.float32)
    weight = torch.randn(2 * num_outputs, num_inputs, generator=generator, device="cuda")
    return x.to(dtype), (weight * num_inputs**-0.5).to(dtype)


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: None = None


def run(x, weight, activation, num_sms=132, *, is_shared=False):
    num_outputs = len(weight) // 2
    out = torch.full((len(x), num_outputs), math.nan, device="cuda", dtype=x.dtype)
    workspace = workspace_on(x.device)
    schedule = make_schedule(len(x), num_outputs, num_sms, is_shared=is_shared)
    Gate(Layer(weight), activation, workspace, num_sms, overlap=True)(x, out, schedule)
    assert not workspace.arrivals.any()
    return out


def check(out, x, weight, activation):
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=-1)
    expected = ACTIVATIONS[activation](gate) * up
    assert ((out.double() - expected).norm() / expected.norm()).item() < 4e-3


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations(activation, dtype, is_shared):
    x, weight = draw(300, 1024, 512, dtype)
    check(run(x, weight, activation, is_shared=is_shared), x, weight, activation)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 128, 129, 1000, 3001])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1024, 1024), (136, 520), (8, 64), (3000, 72)])
@pytest.mark.parametrize("is_shared", [False, True])
def test_sizes_that_tiles_do_not_divide(num_tokens, num_outputs, num_inputs, is_shared):
    x, weight = draw(num_tokens, num_outputs, num_inputs, torch.bfloat16)
    check(run(x, weight, "silu", is_shared=is_shared), x, weight, "silu")


@pytest.mark.parametrize("num_sms", [1, 7, 132])
def test_any_grid_gives_the_same_and_gives_it_again(num_sms):
    x, weight = draw(900, 2048, 1024, torch.bfloat16)
    expected = run(x, weight, "silu")
    for _ in range(20):
        assert torch.equal(run(x, weight, "silu", num_sms), expected)


@pytest.mark.parametrize("num_sms", [8, 19, 132])
@pytest.mark.parametrize("num_tokens", [128, 300, 900])
def test_shared_tiles_are_added_in_the_same_order_each_time(num_tokens, num_sms):
    x, weight = draw(num_tokens, 2048, 4096, torch.bfloat16)
    expected = run(x, weight, "silu", num_sms, is_shared=True)
    check(expected, x, weight, "silu")
    for _ in range(20):
        assert torch.equal(run(x, weight, "silu", num_sms, is_shared=True), expected)


def test_rows_may_lie_apart():
    x, weight = draw(300, 1024, 512, torch.bfloat16)
    apart = torch.full((300, 640), math.nan, device="cuda", dtype=torch.bfloat16)
    apart[:, :512] = x
    assert torch.equal(run(apart[:, :512], weight, "silu"), run(x, weight, "silu"))
