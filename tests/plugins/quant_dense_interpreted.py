"""What needs Triton's interpreter, and so a process that was started for it: see test_quant_dense.py.

The interpreter multiplies matrices of bfloat16 wrongly, rounds to it towards zero, and knows no overlap;
those are for tests on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from core.interfaces import LinearSpec, SupportsGate, SupportsNorm, SupportsResidual, missing_members
from core.model.layers import ACTIVATIONS, RMSNorm
from core.testing.lone_linear import TINY_MODEL
from core.testing.quantizer import QuantizerConformance
from plugins.quant import dense as plugin
from plugins.quant.dense import linear
from plugins.quant.dense.candidates import slots_of_head, slots_of_layer
from plugins.quant.dense.launch import Workspace, make_gate, make_launch, make_norm
from plugins.quant.dense.linear import DenseLinear, card_of, workspace_on
from plugins.quant.dense.operation import KernelConfig, Operation, partial_sizes
from plugins.quant.dense.table import MAX_TOKENS, Card, Entry, Table
from plugins.quant.dense.tuning import Chain

triton_interpreter.patch()

(ENTRY,) = plugin.core_register_quantizers()
FEW = settings(
    QuantizerConformance.settings,
    max_examples=14,
    phases=[Phase.explicit, Phase.generate],
    database=None,
)
EPS = 1e-5
HOST = torch.device("cpu")


# --- kernels against float64 -----------------------------------------------------------------------


def tiles():
    """Tile configurations for up to 64 tokens."""
    return st.builds(
        KernelConfig,
        kernel=st.just("tile"),
        block_n=st.sampled_from([16, 32]),
        block_k=st.sampled_from([16, 32]),
        block_m=st.sampled_from([16, 32, 64]),
        split_k=st.integers(1, 4),
        num_stages=st.integers(1, 3),
        swap=st.booleans(),
        eager=st.booleans(),
        tma=st.booleans(),
        fuse_norm=st.booleans(),
        overlap=st.just(""),
    )


def vectors():
    return st.builds(
        KernelConfig,
        kernel=st.just("vector"),
        block_n=st.sampled_from([1, 4, 8]),
        block_k=st.sampled_from([32, 64]),
        block_m=st.sampled_from([1, 2, 4]),
        fuse_norm=st.booleans(),
        overlap=st.just(""),
    )


def operations(most_outputs=70):
    gated = st.builds(
        Operation,
        num_outputs=st.integers(1, most_outputs),
        num_inputs=st.integers(1, 150),
        norm=st.sampled_from(["", "plain", "one_plus"]),
        activation=st.sampled_from(["", *ACTIVATIONS]),
        bias=st.booleans(),
    )
    added = st.builds(
        Operation,
        num_outputs=st.integers(1, most_outputs),
        num_inputs=st.integers(1, 150),
        residual=st.just(True),
        bias=st.booleans(),
    )
    return gated | added


def in_poison(tensor):
    """Surround rows with NaN, so that whoever reads beyond them is found out."""
    rows, cols = tensor.shape
    around = torch.full((rows + 4, cols + 16), math.nan, dtype=tensor.dtype)
    around[2 : rows + 2, 8 : cols + 8] = tensor
    return around[2 : rows + 2, 8 : cols + 8]


def rows_in_poison(tensor):
    """As `in_poison`, for what has to be contiguous."""
    around = torch.full((tensor.numel() + 256,), math.nan, dtype=tensor.dtype)
    inner = around[128 : tensor.numel() + 128].view(tensor.shape)
    return inner.copy_(tensor)


def draw(op, num_tokens, dtype, seed):
    """Make a layer and inputs for an operation."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    weight = random(op.num_rows, op.num_inputs) * op.num_inputs**-0.5
    return SimpleNamespace(
        weight=rows_in_poison(weight),
        bias=rows_in_poison(random(op.num_rows)) if op.bias else None,
        x=in_poison(random(num_tokens, op.num_inputs)),
        norm_weight=rows_in_poison(1 + random(op.num_inputs) / 4) if op.norm else None,
        residual=random(num_tokens, op.num_outputs) if op.residual else None,
    )


def expect(op, given):
    """Compute in float64."""
    x = given.x.double()
    if op.norm:
        gamma = given.norm_weight.double() + (op.norm == "one_plus")
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * gamma
    y = functional.linear(x, given.weight.double(), None if given.bias is None else given.bias.double())
    if op.activation:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[op.activation](gate) * up
    return y if given.residual is None else y + given.residual.double()


def poisoned_workspace():
    return Workspace(torch.full((1 << 17,), math.nan), torch.zeros(256, dtype=torch.int32))


def run(op, launch, given, num_tokens):
    out = torch.full((num_tokens, op.num_outputs), math.nan, dtype=given.x.dtype)
    if op.residual:
        out.copy_(given.residual)
    launch(given.x, out, given.norm_weight, out if op.residual else None, EPS)
    return out


def assert_close(actual, expected, dtype):
    bound = {torch.float16: 4e-3, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    scale = expected.abs().amax().clamp(min=1.0)
    torch.testing.assert_close(actual.double() / scale, expected / scale, atol=bound, rtol=0)


def check(op, config, num_tokens, dtype, seed):
    workspace = poisoned_workspace()
    partials, arrivals = partial_sizes(op, config, num_tokens)
    assert partials <= workspace.partials.numel()
    assert arrivals <= workspace.arrivals.numel()
    given = draw(op, num_tokens, dtype, seed)
    launch = make_launch(op, config, num_tokens, given, workspace)
    first = run(op, launch, given, num_tokens)
    assert_close(first, expect(op, given), dtype)
    assert not workspace.arrivals.any(), "the next launch would take this one's parts for its own"
    if config.kernel != "library":
        assert torch.equal(run(op, launch, given, num_tokens), first)


@FEW
@example(
    op=Operation(37, 150, norm="one_plus", activation="silu", bias=True),
    config=KernelConfig("tile", 16, 16, block_m=16, split_k=3, swap=True, eager=True, overlap=""),
    num_tokens=13,
    dtype=torch.float16,
    seed=0,
)
@given(
    op=operations(),
    config=tiles(),
    num_tokens=st.integers(1, 70),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_tiles_match_float64(op, config, num_tokens, dtype, seed):
    num_tokens = min(num_tokens, config.block_m)
    # The copy engine wants rows of whole 16 bytes; `fit` sees to it.
    assume(not config.tma or op.num_inputs * dtype.itemsize % 16 == 0)
    check(op, config, num_tokens, dtype, seed)


@FEW
@example(
    op=Operation(10, 150, norm="plain", activation="gelu", bias=True),
    config=KernelConfig("vector", 4, 32, block_m=2, overlap=""),
    num_tokens=2,
    dtype=torch.float16,
    seed=0,
)
@given(
    op=operations(most_outputs=18),  # each program takes long
    config=vectors(),
    num_tokens=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_vectors_match_float64(op, config, num_tokens, dtype, seed):
    check(op, config, min(num_tokens, config.block_m), dtype, seed)


@FEW
@given(
    op=operations(),
    num_tokens=st.integers(0, 70),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_the_library_with_what_surrounds_it_matches_float64(op, num_tokens, dtype, seed):
    if num_tokens == 0:
        given = draw(op, 0, dtype, seed)
        launch = make_launch(op, KernelConfig("library", overlap=""), 0, given, poisoned_workspace())
        assert run(op, launch, given, 0).shape == (0, op.num_outputs)
    else:
        check(op, KernelConfig("library", overlap=""), num_tokens, dtype, seed)


def test_tiles_take_any_number_of_tokens_where_they_are_large():
    op = Operation(40, 48, norm="plain", activation="silu")
    config = KernelConfig("tile", 16, 16, block_m=128, split_k=2, num_stages=2, overlap="")
    check(op, config, 150, torch.float16, 0)


@pytest.mark.parametrize("style", ["plain", "one_plus"])
def test_the_norm_alone_rounds_as_the_model_does(style):
    torch.manual_seed(0)
    norm = RMSNorm(96, EPS, style, torch.float16, HOST)
    torch.nn.init.normal_(norm.weight, 0.8, 0.3)
    x = in_poison(torch.randn(40, 96).half())
    out = make_norm(96, style, overlap=False)(x, norm.weight, EPS)
    # The root may differ in its last bit, and then a value in between two may go the other way.
    torch.testing.assert_close(out, norm(x), rtol=4 * 2**-10, atol=0)
    assert (out == norm(x)).float().mean() > 0.99


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate_alone_matches_float64(activation):
    size = 1500  # more than one program's
    x = torch.randn(3, 2 * size) * 3
    out = torch.full((3, size), math.nan)
    make_gate(size, activation, overlap=False)(x, out)
    gate, up = x.double().chunk(2, -1)
    assert_close(out, ACTIVATIONS[activation](gate) * up, torch.float32)


def test_a_norm_that_would_overflow_is_left_to_its_own_kernel():
    """In float16: 300 times the weight 300 is more than 65504, and normalized it is 300."""
    op = Operation(16, 32, norm="plain")
    config = KernelConfig("tile", 16, 16, block_m=16, swap=True)
    config = linear.fit(op, config, 8, card_of(HOST), torch.float16)
    given = draw(op, 8, torch.float16, 0)
    given.x.fill_(300)
    given.norm_weight.fill_(300)
    given.weight.mul_(0.1)
    launch = make_launch(op, config, 8, given, poisoned_workspace())
    assert_close(run(op, launch, given, 8), expect(op, given), torch.float16)


# --- layers ----------------------------------------------------------------------------------------

SHAPES = {"gate": 20, "norm": 40, "residual": 40}


def table_of_tiles():
    """Serve the layer of `make_layer` by tiles, as a measured card does."""
    tile = KernelConfig("tile", 16, 16, block_m=16, split_k=2, swap=True, eager=True)
    more = replace(tile, block_m=64, split_k=1, tma=True, prefetch=32, overlap="late")
    rows = [(16, tile), (64, more)]
    return Table(Entry(k, n, 64, tokens, c) for k, n in SHAPES.items() for tokens, c in rows)


def make_layer(dtype=torch.float16, *, bias=True, norm_style="one_plus", activation="gelu_tanh"):
    spec = LinearSpec(
        name="layer",
        in_features=64,
        shards=(("a", 20), ("b", 20)),
        bias=bias,
        dtype=dtype,
        device=HOST,
        role="gate_up",
    )
    layer = DenseLinear(spec, norm_style, activation)
    torch.manual_seed(5)
    layer.weight.normal_(0, 64**-0.5)
    if layer.bias is not None:
        layer.bias.normal_()
    return layer


def verify_forms(layer, num_tokens):
    style, activation = layer._normed._op.norm, layer._gated._op.activation
    bias = layer.bias is not None
    plain = Operation(40, 64, bias=bias)
    cases = {
        "forward": plain,
        "forward_norm": replace(plain, norm=style),
        "forward_gate": replace(plain, num_outputs=20, norm=style, activation=activation),
        "forward_residual": replace(plain, residual=True),
    }
    for name, op in cases.items():
        given = draw(op, num_tokens, layer.weight.dtype, num_tokens)
        given.weight, given.bias = layer.weight, layer.bias
        form = getattr(layer, name)
        if op.residual:
            stream = given.residual.clone()
            out = form(given.x, stream)
            assert out is stream, "a graph's next kernel reads the stream where it was"
        elif op.norm:
            out = form(given.x, given.norm_weight, EPS)
        else:
            out = form(given.x)
        assert_close(out, expect(op, given), layer.weight.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 64, 65])
def test_all_forms_of_a_layer(num_tokens, bias, monkeypatch):
    monkeypatch.setattr(linear, "table_of", lambda card: table_of_tiles())
    layer = make_layer(bias=bias)
    if num_tokens:
        verify_forms(layer, num_tokens)
    else:
        empty = torch.empty(0, 64, dtype=torch.float16)
        assert layer(empty).shape == (0, 40)
        assert layer.forward_gate(empty, torch.ones(64).half(), EPS).shape == (0, 20)


def test_a_card_without_entries_serves_too():
    for num_tokens in (1, 2, 5, 70):
        verify_forms(make_layer(torch.float32), num_tokens)


def test_launches_are_made_once_for_each_number_of_tokens_or_once_for_all(monkeypatch):
    made = []

    def count(*args):
        made.append(args[2])
        return make_launch(*args)

    monkeypatch.setattr(linear, "make_launch", count)
    layer = make_layer()
    for num_tokens in (1, 3, 1, 3, 70, 100, 90):
        layer(torch.randn(num_tokens, 64).half())
    assert made == [1, 3], "from 3 tokens on the library serves them"


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("vector", 4, 32, overlap=""),
        KernelConfig("tile", 16, 16, block_m=16, num_stages=2, overlap=""),
        KernelConfig("tile", 16, 16, block_m=16, tma=True, overlap=""),
        KernelConfig("tile", 16, 16, block_m=16, tma=True, eager=True, overlap=""),
        KernelConfig("library", overlap=""),
    ],
    ids=str,
)
def test_weights_may_be_swapped_below_a_launch(config):
    """As offloading does: `weight.data` is another storage at each step."""
    op = Operation(20, 64, bias=True)
    given = draw(op, 1, torch.float16, 0)
    given.weight = torch.nn.Parameter(given.weight, requires_grad=False)
    given.bias = torch.nn.Parameter(given.bias, requires_grad=False)
    launch = make_launch(op, config, 1, given, poisoned_workspace())
    run(op, launch, given, 1)
    old, other = (given.weight.data, given.bias.data), draw(op, 1, torch.float16, 1)
    given.weight.data, given.bias.data = other.weight, other.bias
    for tensor in old:
        tensor.fill_(math.nan)
    assert_close(run(op, launch, given, 1), expect(op, given), torch.float16)


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_weights_may_be_swapped_below_a_layer(num_tokens, monkeypatch):
    monkeypatch.setattr(linear, "table_of", lambda card: table_of_tiles())
    layer = make_layer()
    verify_forms(layer, num_tokens)
    old = layer.weight.data
    layer.weight.data = torch.randn_like(old)
    old.fill_(math.nan)
    verify_forms(layer, num_tokens)


def test_layers_share_a_workspace_that_they_leave_clean(monkeypatch):
    monkeypatch.setattr(linear, "table_of", lambda card: table_of_tiles())
    workspace = workspace_on(HOST)
    workspace.partials.fill_(math.nan)
    verify_forms(make_layer(), 9)
    verify_forms(make_layer(norm_style="plain", activation="silu"), 16)
    assert workspace_on(HOST) is workspace
    assert not workspace.arrivals.any()
    assert not workspace.partials.isnan().all(), "no sum was split"


def test_says_what_it_has_no_kernel_for():
    layer = make_layer()
    for protocol in (SupportsNorm, SupportsGate, SupportsResidual):
        assert not missing_members(layer, protocol)
    assert layer.norm_objections("plain") == []
    assert layer.gate_objections("one_plus", "relu") == []
    assert layer.residual_objections() == []
    assert layer.norm_objections("layer") == ["there is no kernel for norms of style 'layer'"]
    assert len(layer.gate_objections("layer", "swish7")) == 2


# --- the kit of quantizers -------------------------------------------------------------------------


class TestDense(QuantizerConformance):
    entry = replace(ENTRY, unsupported=lambda requirements: [])
    dtypes = ("float16", "bfloat16", "float32")
    in_step, out_step = 3, 2
    max_weight_error = 5e-3
    settings = settings(QuantizerConformance.settings, max_examples=4)

    def quantize(self, spec, shard, weight, bias):
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def dequantize(self, spec, shard, tensors):
        return tensors["weight"].double()


class TestDenseInTiles(TestDense):
    """With a table in which every shape takes a tile, whatever its size."""

    dtypes = ("float16", "float32")

    @pytest.fixture(autouse=True)
    def tiles_for_all(self, monkeypatch):
        tile = KernelConfig("tile", 16, 32, block_m=64, split_k=2, num_stages=2)

        class OnlyTiles(Table):
            def choose(self, op, num_tokens):
                return tile if 0 < num_tokens <= 64 else super().choose(op, num_tokens)

        monkeypatch.setattr(linear, "table_of", lambda card: OnlyTiles(()))


def test_the_host_is_no_card():
    assert card_of(HOST) == Card("cpu", (0, 0))


# --- what tuning does before it measures -----------------------------------------------------------

TINY = replace(TINY_MODEL, qkv_bias=True)
TILE = KernelConfig("tile", 16, 32, block_m=16, split_k=2, num_stages=2, overlap="")
LIBRARY = KernelConfig("library", overlap="")


def make_chain(slots=None, num_layers=2):
    return Chain(slots or slots_of_layer(TINY), num_layers, MAX_TOKENS, torch.float16, HOST)


@pytest.mark.parametrize("slot", ["qkv", "out", "gate_up", "down"])
def test_candidates_are_checked_before_they_are_measured(slot):
    chain = make_chain()
    one = KernelConfig("vector", 8, 64, overlap="")
    assert [chain.problem(slot, config, 1) for config in (one, TILE, LIBRARY)] == ["", "", ""]
    assert chain.problem(slot, one, 2).startswith("results are off by"), "it computes one token"
    assert "Error" in chain.problem(slot, replace(TILE, block_n=24), 1)


def test_a_chain_computes_what_its_layers_do():
    chain, outs = make_chain(), []
    for config in (LIBRARY, TILE):
        run_all, out = chain.make_run(dict.fromkeys(chain.slots, config), 7)
        out.fill_(math.nan)
        run_all()
        outs.append(out.clone())
    assert outs[0].shape == (7, TINY.hidden_size)
    assert_close(outs[1], outs[0].double(), torch.float16)
    start = chain._buffers["stream"][:7].float()
    assert (outs[0].float() - start).norm() > 0.1 * start.norm()


def test_a_chain_of_heads_has_no_layers_around_it():
    run_all, out = make_chain(slots_of_head(TINY), num_layers=1).make_run({"lm_head": TILE}, 3)
    out.fill_(math.nan)
    run_all()
    assert out.shape == (3, TINY.vocab_size)
    assert out.isfinite().all()
    assert slots_of_head(replace(TINY, tied=True)) == ()


def test_what_a_card_lacks_is_not_tried():
    config = KernelConfig("tile", 16, 32, block_m=16, tma=True, prefetch=64, overlap="late")
    fitted = make_chain().fit("qkv", config, 16)
    assert (fitted.tma, fitted.prefetch, fitted.overlap, fitted.fuse_norm) == (False, 0, "", False)
