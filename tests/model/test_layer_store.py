"""Layers on the host compute what they compute on the device, whatever the copies' timing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core.errors import CapacityError
from core.model.decoder import make_decoder
from core.model.families import load_hf_config, read_model
from core.model.layer_store import LayerStore
from core.model.linear import PlainScheme
from core.model.slots import LayerSlots
from core.model.weights import load_dummy, load_weights
from core.quant.dense import DenseAttention
from core.sharding import Span
from core.testing.checkpoints import FAMILIES

CPU = torch.device("cpu")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class LateCopier:
    """Copies as late as it may; until then the buffer holds what no layer can compute with."""

    def __init__(self):
        self.pending = {}
        self.num_started = 0

    def start(self, buffer, target, source):
        self.num_started += 1
        target.fill_(255)  # NaN in every floating dtype
        self.pending[buffer] = target, source

    def wait(self, buffer):
        if buffer in self.pending:
            target, source = self.pending.pop(buffer)
            target.copy_(source)


def make(spec, store=None, scheme=None, share=None):
    return make_decoder(
        spec,
        scheme=scheme or PlainScheme(),
        attention=DenseAttention(),
        dtype=torch.float32,
        device=CPU,
        max_len=64,
        share=share,
        store=store,
    )


@torch.inference_mode()
def run(decoder):
    hidden = decoder(torch.tensor(TOKENS), torch.arange(len(TOKENS)), len(TOKENS))
    return decoder.logits(hidden)


def num_bytes(decoder):
    """Count the bytes of all memory that parameters and buffers lie in, what is shared once."""
    tensors = [*decoder.parameters(), *decoder.buffers()]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not t.is_meta}
    return sum(storage.nbytes() for storage in memory.values())


# --- whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(FAMILIES))
@pytest.mark.parametrize("copier", [None, LateCopier], ids=["plain", "late"])
def test_every_family_computes_the_same_bits(variant, copier, checkpoint):
    spec = read_model(load_hf_config(checkpoint(variant)))
    whole = make(spec)
    load_weights(whole, checkpoint(variant), device=CPU)
    expected = run(whole)
    for count in range(1, spec.num_layers + 1):
        store = LayerStore(range(spec.num_layers - count, spec.num_layers), CPU, copier and copier())
        decoder = make(spec, store)
        load_weights(decoder, checkpoint(variant), device=CPU)
        for _ in range(3):
            assert torch.equal(run(decoder), expected)


class MixedLinear(nn.Module):
    """Weights of several dtypes and layouts, as parameters and as buffers, made by `finalize`."""

    def __init__(self, spec):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(spec.out_features, spec.in_features, device=spec.device), requires_grad=False
        )

    def pack(self):
        scale = self.weight.abs().amax(dim=1) / 127
        codes = (self.weight / scale[:, None]).round().to(torch.int8)
        del self.weight
        self.register_buffer("codes", codes.t().contiguous().t())  # column by column
        self.register_buffer("scale", scale.double())
        self.register_buffer("empty", scale[:0])
        self.offset = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return (
            nn.functional.linear(x.double(), self.codes * self.scale[:, None]) * self.offset
        ).float()


class MixedScheme(PlainScheme):
    def make_linear(self, spec, /):
        return MixedLinear(spec)

    def finalize(self, module, spec, /):
        module.pack()


@pytest.mark.parametrize("num_stored", range(1, 5))
@pytest.mark.parametrize("copier", [None, LateCopier], ids=["plain", "late"])
def test_what_finalize_makes_is_what_is_stored(num_stored, copier, checkpoint):
    spec = read_model(load_hf_config(checkpoint("gemma3")))
    whole = make(spec, scheme=MixedScheme())
    load_dummy(whole, 0)
    decoder = make(spec, LayerStore(range(num_stored), CPU, copier and copier()), MixedScheme())
    load_dummy(decoder, 0)
    for _ in range(2):
        assert torch.equal(run(decoder), run(whole))
    for ours, theirs in zip(decoder.layers, whole.layers, strict=True):
        for name, tensor in theirs.named_buffers():
            assert ours.get_buffer(name).stride() == tensor.stride()


def test_dummy_weights_are_the_same_with_and_without(checkpoint):
    spec = read_model(load_hf_config(checkpoint("llama3")))
    whole, decoder = make(spec), make(spec, LayerStore([0, 1], CPU))
    load_dummy(whole, 5)
    load_dummy(decoder, 5)
    assert torch.equal(run(decoder), run(whole))


def test_a_stage_stores_layers_by_their_index_in_the_model(checkpoint):
    spec = read_model(load_hf_config(checkpoint("gemma3")))
    share = replace(spec.whole_share(), layers=Span(2, 4))
    whole, decoder = make(spec, share=share), make(spec, LayerStore([3], CPU), share=share)
    for stage in (whole, decoder):
        load_weights(stage, checkpoint("gemma3"), device=CPU)
    stream = torch.randn(len(TOKENS), spec.hidden_size)
    with torch.inference_mode():
        outs = [d(stream, torch.arange(len(TOKENS)), len(TOKENS)) for d in (whole, decoder)]
    assert torch.equal(*outs)


# --- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stored", range(1, 5))
def test_the_device_holds_two_of_the_stored_layers(num_stored, checkpoint):
    path = checkpoint("gemma3")
    spec = read_model(load_hf_config(path))
    whole = make(spec)
    layer_bytes = num_bytes(whole.layers[0])
    padded = layer_bytes + 256 * len(list(whole.layers[0].parameters()))
    rest = num_bytes(whole) - num_stored * layer_bytes
    seen = []
    decoder = make(spec, LayerStore(range(num_stored), CPU))
    assert num_bytes(decoder) == rest
    load_weights(decoder, path, device=CPU, report=lambda *_: seen.append(num_bytes(decoder)))
    assert max(seen[:-1]) <= rest + layer_bytes  # the last one comes when all are stored
    assert num_bytes(decoder) <= rest + min(num_stored, 2) * padded
    assert num_bytes(decoder) >= rest + min(num_stored, 2) * layer_bytes


def test_a_host_without_memory_is_told_the_knob(monkeypatch, checkpoint):
    spec = read_model(load_hf_config(checkpoint("llama3")))
    decoder = make(spec, LayerStore([0, 1], CPU))
    usual = torch.empty

    def empty(*args, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            raise RuntimeError("out of memory")
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(CapacityError, match=r"after 0 bytes for 0 of 2; lower --cpu-offload-gb"):
        load_dummy(decoder, 0)


# --- the order of copies ---------------------------------------------------------------------------


def make_store(count):
    """Make a store of layers that each add their own number, and their slots."""
    store = LayerStore(range(count), CPU, LateCopier())
    slots = []
    for number in range(count):
        layer = nn.Linear(1, 1 + number, bias=False, dtype=torch.float64)
        layer.requires_grad_(requires_grad=False)
        layer.weight.fill_(number + 1)

        def add(_inner, stream, layer=layer, number=number):
            if stream is None:
                raise RuntimeError("a step that fails")
            assert (layer.weight == number + 1).all()
            return [*stream, number]

        plain = LayerSlots(lambda x: x, None, None, lambda x: x, add)
        slots.append(store.take(layer, plain))
    store.settle()
    return store, slots


def run_layers(slots, fails_at=None):
    stream = []
    for number, layer in enumerate(slots):
        layer.qkv(stream)
        stream = layer.down(None, None if number == fails_at else stream)
    return stream


@given(count=st.integers(1, 7), failures=st.lists(st.none() | st.integers(0, 6), max_size=4))
def test_every_layer_finds_its_weights_even_after_steps_that_failed(count, failures):
    _, slots = make_store(count)
    for failure in [*failures, None, None]:
        if failure is None or failure >= count:
            assert run_layers(slots) == list(range(count))
        else:
            with pytest.raises(RuntimeError, match="fails"):
                run_layers(slots, failure)


@pytest.mark.parametrize(
    ("count", "num_copies"), [(1, 0), (2, 0), (3, 2), (4, 4), (5, 5), (6, 6), (7, 7)]
)
def test_each_step_copies_every_layer_that_shares_its_buffer_once(count, num_copies):
    store, slots = make_store(count)
    copier = store._copier
    assert copier.num_started == min(count, 2)
    for _ in range(3):
        before = copier.num_started
        run_layers(slots)
        assert copier.num_started - before == num_copies


def test_the_next_layer_is_under_way_while_one_runs():
    store, slots = make_store(5)
    for turn in range(5):
        slots[turn].qkv([])
        following = (turn + 1) % 5
        same_buffer = following % 2 == turn % 2
        assert (store._held[following % 2] == following) is not same_buffer
        slots[turn].down(None, [])
