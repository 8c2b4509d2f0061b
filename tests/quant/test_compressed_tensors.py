"""What a config of compressed-tensors says, against the library itself."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import CheckpointError
from core.quant.compressed_tensors import Arguments, read_config
from core.testing.lone_linear import TINY_MODEL

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def make_config(*groups, **changes):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [],
        **changes,
    }


def make_group(*targets, weights=INT4, **changes):
    return {"targets": list(targets or ["Linear"]), "weights": weights, **changes}


def test_a_config_as_it_is_written():
    config = make_config(
        {
            "targets": ["Linear"],
            "weights": {
                "actorder": "group",
                "block_structure": None,
                "dynamic": False,
                "group_size": 128,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": False,
                "type": "int",
            },
            "input_activations": None,
            "output_activations": None,
        },
        ignore=["lm_head"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        global_compression_ratio=1.5,
        sparsity_config={},
        transform_config={},
    )
    compressed = read_config(config)
    group = compressed.scheme_of(Q_PROJ)
    assert group == compressed.groups["group_0"]
    assert group.weights == Arguments(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=128, actorder="group"
    )
    assert (group.targets, group.input_activations, group.format) == (
        ("Linear",),
        None,
        "pack-quantized",
    )
    assert compressed.scheme_of("lm_head") is None


# --- what quantizes a number -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}),
        ({"group_size": -1}, {"strategy": "channel", "group_size": None}),
        ({"group_size": 64}, {"strategy": "group", "group_size": 64}),
        ({"strategy": "GROUP", "group_size": 64}, {"strategy": "group"}),
        ({"strategy": "channel", "group_size": 64}, {"strategy": "channel", "group_size": None}),
        ({"strategy": "block", "block_structure": [64, 32]}, {"block_structure": (64, 32)}),
        ({"strategy": "block", "block_structure": "64x32"}, {"block_structure": (64, 32)}),
        ({"actorder": True}, {"actorder": "group"}),
        ({"actorder": "dynamic"}, {"actorder": "group"}),
        ({"actorder": "static"}, {"actorder": "weight"}),
        ({"actorder": False}, {"actorder": None}),
    ],
)
def test_arguments(weights, expected):
    found = read_config(make_config(make_group(weights=weights))).groups["group_0"].weights
    assert {key: getattr(found, key) for key in expected} == expected


@settings(max_examples=60, deadline=None)
@given(
    given_keys=st.fixed_dictionaries(
        {"num_bits": st.integers(1, 8)},
        optional={
            "type": st.sampled_from(["int", "INT"]),
            "symmetric": st.booleans(),
            "group_size": st.sampled_from([None, -1, 32]),
            "actorder": st.sampled_from([None, False, "weight"]),
        },
    )
)
def test_defaults_are_those_of_the_library(given_keys):
    library = pytest.importorskip("compressed_tensors.quantization")
    theirs = library.QuantizationArgs(**given_keys)
    ours = read_config(make_config(make_group(weights=given_keys))).groups["group_0"].weights
    for key in ("num_bits", "type", "symmetric", "strategy", "dynamic", "actorder"):
        assert getattr(ours, key) == getattr(theirs, key)


# --- which layers are meant ------------------------------------------------------------------------

NAMES = [
    "lm_head",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 10)
        for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj")
    ),
]
PATTERNS = [
    "Linear",
    "LlamaAttention",
    "lm_head",
    "model.layers.1",
    "model.layers.1.mlp.up_proj",
    "model.layers.10.mlp.up_proj",
    "up_proj",
    "re:.*down_proj",
    "re:.*layers.1.*",
    r"re:.*layers\.1\.",
    "re:down_proj",
    "re:.*q_proj$",
]


@settings(max_examples=200, deadline=None)
@given(
    targets=st.lists(st.lists(st.sampled_from(PATTERNS), max_size=3), min_size=1, max_size=4),
    ignore=st.lists(st.sampled_from(PATTERNS[1:]), max_size=3),
)
def test_layers_are_those_of_the_library(targets, ignore):
    match = pytest.importorskip("compressed_tensors.utils.match")
    groups = [make_group(*t, weights={**INT8, "num_bits": 2 + i}) for i, t in enumerate(targets)]
    for group, own in zip(groups, targets, strict=True):
        group["targets"] = own
    compressed = read_config(make_config(*groups, ignore=ignore))
    by_target = {target: 2 + i for i, own in enumerate(targets) for target in own}
    linear = nn.Linear(1, 1)
    for name in NAMES:
        expected = None
        if match.is_match(name, linear, list(by_target), ignore):
            expected = by_target[match.match_targets(name, linear, list(by_target))[0]]
        found = compressed.scheme_of(name)
        assert (found and found.weights.num_bits) == expected


def test_names_may_be_those_of_the_checkpoint():
    model = replace(TINY_MODEL, renames=(("language_model.model.", "model."),))
    stored = "language_model." + Q_PROJ
    config = make_config(
        make_group(weights=INT8), make_group("re:language_model.*mlp"), ignore=[stored]
    )
    compressed = read_config(config, model)
    assert compressed.scheme_of(Q_PROJ) is None
    assert compressed.scheme_of("model.layers.0.mlp.up_proj").weights.num_bits == 4
    assert compressed.scheme_of("model.layers.0.self_attn.k_proj").weights.num_bits == 8
    assert read_config(config).scheme_of(Q_PROJ) is not None


def test_groups_that_store_alike_are_equal_whatever_their_targets():
    groups = read_config(
        make_config(make_group("a"), make_group("b"), make_group("c", weights=INT8))
    ).groups.values()
    first, second, other = groups
    assert first == second != other


def test_each_group_may_have_a_format_of_its_own():
    config = make_config(
        make_group("a", format="pack-quantized"),
        make_group("b", format="float-quantized"),
        format="mixed-precision",
    )
    formats = [group.format for group in read_config(config).groups.values()]
    assert formats == ["pack-quantized", "float-quantized"]


# --- older spellings, and what is refused ----------------------------------------------------------


def test_older_configs_are_nested():
    old = {"quant_method": "sparseml", "quantization_config": make_config(make_group())}
    assert read_config(old).scheme_of(Q_PROJ).weights.num_bits == 4
    dense = {"format": "dense", "global_sparsity": 0.14, "targets": []}
    assert read_config({**old, "sparsity_config": dense}).scheme_of(Q_PROJ) is not None


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparsity_config is .*sparse-24-bitmask"],
        ),
        ({"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config is .*R1"]),
        ({"config_groups": {}}, ["config_groups is empty"]),
        ({"config_groups": [1]}, [r"config_groups is \[1\], but a table"]),
        ({"config_groups": {"W4A16": ["Linear"]}}, [r"config_groups\.W4A16 is \['Linear'\]"]),
        ({"ignore": "lm_head"}, ["ignore is 'lm_head', but a list of names"]),
        ({"format": "mixed-precision"}, [r"group_0\.format is mixed-precision"]),
        ({"format": None}, [r"group_0\.format is mixed-precision"]),
        ({"kv_cache_scheme": {"num_bits": "8"}}, [r"kv_cache_scheme\.num_bits is '8'"]),
        (
            {"transform_config": {"config_groups": {"R1": {}}}, "ignore": 3},
            ["transform_config is", "ignore is 3"],
        ),
    ],
)
def test_unsupported_configs(config, reasons):
    refuses(make_config(make_group(), **config) | config, reasons)


@pytest.mark.parametrize(
    ("group", "reasons"),
    [
        ({"weights": None}, [r"group_0\.weights is null"]),
        ({"output_activations": INT8}, [r"group_0\.output_activations is set"]),
        ({"targets": "Linear"}, [r"group_0\.targets is 'Linear', but a list"]),
        ({"weights": 4}, [r"group_0\.weights is 4, but a table"]),
        (
            {"weights": {"strategy": "tensor_group"}},
            ["strategy is 'tensor_group', but only tensor, channel"],
        ),
        ({"weights": {"strategy": ["group"]}}, [r"strategy is \['group'\]"]),
        ({"weights": {"strategy": "group"}}, ["group_size is None"]),
        ({"weights": {"group_size": -2}}, ["group_size is -2"]),
        ({"weights": {"strategy": "block"}}, ["block_structure is None"]),
        ({"weights": {"strategy": "block", "block_structure": [64]}}, [r"block_structure is \[64\]"]),
        ({"weights": {"strategy": "block", "block_structure": "0x64"}}, ["block_structure is '0x64'"]),
        ({"weights": {"num_bits": 0}}, ["num_bits is 0"]),
        ({"weights": {"num_bits": True}}, ["num_bits is True"]),
        ({"weights": {"type": "complex"}}, ["type is 'complex', but only int, float"]),
        ({"weights": {"symmetric": 1}}, ["symmetric is 1"]),
        ({"weights": {"dynamic": "local"}}, [r"weights\.dynamic is 'local'"]),
        ({"weights": {"actorder": "column"}}, ["actorder is 'column'"]),
        ({"input_activations": {"dynamic": "local"}}, [r"input_activations\.dynamic is 'local'"]),
    ],
)
def test_unsupported_groups(group, reasons):
    refuses(make_config(make_group() | group), reasons)


def refuses(config, reasons):
    with pytest.raises(CheckpointError, match=r"^quantization_config: ") as info:
        read_config(config)
    told = str(info.value).removeprefix("quantization_config: ").split("; ")
    assert len(told) == len(reasons)
    for found, reason in zip(told, reasons, strict=True):
        assert re.search(reason, found)


def test_a_malformed_regular_expression_is_named():
    compressed = read_config(make_config(make_group("re:(")))
    with pytest.raises(CheckpointError, match=re.escape("re:(")):
        compressed.scheme_of(Q_PROJ)


def test_reading_needs_no_torch():
    code = "import sys, core.quant.compressed_tensors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours
