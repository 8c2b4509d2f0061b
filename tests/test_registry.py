"""The registry of descriptors, against a plain dictionary."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import PluginConflictError, PluginNotFoundError
from core.registry import KINDS, Descriptor, Registered, Registry, Requirements, supports_everything

NAMES = st.sampled_from(["torch", "triton", "flash", "awq"])
ADDITIONS = st.lists(st.tuples(st.sampled_from(list(KINDS)), NAMES, st.sampled_from(["a.a", "b.b"])))


def build(plan):
    pass


def entry(kind, name):
    return KINDS[kind](name=name, factory=build)


@given(ADDITIONS)
def test_registry_is_a_dictionary_of_first_claims(additions):
    registry, model = Registry(), {}
    for kind, name, plugin in additions:
        registered = Registered(entry(kind, name), plugin, f"{plugin} 1.0")
        if (kind, name) in model:
            with pytest.raises(PluginConflictError):
                registry.add(kind, registered.descriptor, plugin=plugin, distribution=f"{plugin} 1.0")
        else:
            registry.add(kind, registered.descriptor, plugin=plugin, distribution=f"{plugin} 1.0")
            model[kind, name] = registered
    for kind in KINDS:
        assert registry.all(kind) == [found for (of, _), found in model.items() if of == kind]
    for (kind, name), registered in model.items():
        assert registry.get(kind, name) == registered


def test_a_conflict_names_both_distributions():
    registry = Registry()
    registry.add("quant", entry("quant", "awq"), plugin="quant.awq", distribution="cythera 0.1.0")
    with pytest.raises(PluginConflictError) as raised:
        registry.add("quant", entry("quant", "awq"), plugin="quant.acme", distribution="acme 2.0")
    for part in ("quant 'awq'", "cythera 0.1.0", "acme 2.0", "no:quant.acme"):
        assert part in str(raised.value)
    assert raised.value.plugin == "quant.acme"


def test_an_unknown_name_suggests_the_nearest():
    registry = Registry()
    with pytest.raises(PluginNotFoundError, match=r"'torch' \(active: none\)"):
        registry.get("attention", "torch")
    for name in ("torch", "triton"):
        registry.add("attention", entry("attention", name), plugin="a.b", distribution="cythera 1")
    with pytest.raises(PluginNotFoundError, match="did you mean 'triton'") as raised:
        registry.get("attention", "tritno")
    assert "active: torch, triton" in str(raised.value)
    assert raised.value.plugin == "attention.tritno"


def test_the_list_of_a_kind_is_a_copy():
    registry = Registry()
    registry.add("quant", entry("quant", "awq"), plugin="a.b", distribution="cythera 1")
    registry.all("quant").clear()
    assert len(registry.all("quant")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_descriptors_are_frozen_and_support_everything_by_default(kind):
    descriptor = entry(kind, "x")
    assert isinstance(descriptor, Descriptor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        descriptor.name = "y"
    requirements = Requirements(device="cpu", dtype="float32")
    assert descriptor.unsupported(requirements) == supports_everything(requirements) == []


def test_requirements_say_what_goes_beyond_a_part():
    requirements = Requirements(device="cpu", dtype="float64")
    assert requirements.beyond() == []
    assert requirements.beyond(devices=["cuda", "cpu"], dtypes=["float64"], modules={"json": "-"}) == []
    assert requirements.beyond(
        devices=["cuda"], dtypes=["bfloat16", "float16"], modules={"no_such_module": "pip install it"}
    ) == [
        "device 'cpu' is not 'cuda'",
        "dtype 'float64' is none of bfloat16, float16",
        "no_such_module is not installed; pip install it",
    ]


def test_requirements_say_what_goes_beyond_a_cache():
    requirements = Requirements(device="cpu", dtype="float16", kv_cache_dtype="fp8", block_size=8)
    assert requirements.beyond(kv_cache_dtypes=["fp8"], block_sizes=[8, 16]) == []
    assert requirements.beyond(kv_cache_dtypes=["float16"], block_sizes=[32, 16]) == [
        "kv_cache_dtype 'fp8' is none of auto, float16",
        "block_size 8 is none of 16, 32",
    ]
    for own in ("auto", "float16"):
        requirements = Requirements(device="cpu", dtype="float16", kv_cache_dtype=own)
        assert requirements.beyond(kv_cache_dtypes=(), block_sizes=[16]) == []
