"""Which layers GPTQ configs mean, and what is said of them before anything is built."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from core.errors import CheckpointError
from core.registry import Requirements
from core.testing import PluginConformance
from core.testing.lone_linear import TINY_MODEL
from plugins.quant import gptq as plugin
from plugins.quant.gptq.formats import LayerFormat
from plugins.quant.gptq.rules import read_gptq

(ENTRY,) = plugin.core_register_quantizers()
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
PLAIN = LayerFormat(layout="gptq", bits=4, group_size=128, symmetric=True)
Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.10.mlp.up_proj"


class TestPlugin(PluginConformance):
    module = "plugins.quant.gptq"


def format_of(name, **changes):
    return read_gptq(CONFIG | changes).format_of(name)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"group_size": -1}, {"group_size": None}),
        ({"group_size": -1, "desc_act": True}, {"group_size": None}),  # one group has one order
        ({"desc_act": True}, {"ordered": True}),
        ({"sym": False, "bits": 3}, {"symmetric": False, "bits": 3}),
        ({"checkpoint_format": "gptq_v2"}, {"layout": "gptq_v2"}),
        ({"format": "GPTQ_V2"}, {"layout": "gptq_v2"}),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, {}),
        ({"checkpoint_format": None, "pack_dtype": "int32", "dynamic": None}, {}),
        ({"static_groups": True, "true_sequential": True, "meta": {"quantizer": ["x"]}}, {}),
    ],
)
def test_formats(changes, expected):
    assert format_of(Q_PROJ, **changes) == replace(PLAIN, **expected)


# --- rules -----------------------------------------------------------------------------------------

RULES = {
    r"+:.*\.up_proj$": {"bits": 8, "group_size": 32},
    r".*\.layers\.1[0-9]\.": {"sym": False, "desc_act": True},
    r"-:model\.layers\.0\.": {},
    r"+:.*\.q_proj": {"bits": 2},
    "-:lm_head": {},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (UP_PROJ, {"bits": 8, "group_size": 32}),
        ("model.layers.10.mlp.down_proj", {"symmetric": False, "ordered": True}),
        (Q_PROJ, None),
        ("model.layers.1.self_attn.q_proj", {"bits": 2}),
        ("model.layers.1.mlp.down_proj", {}),
        ("lm_head", None),
    ],
)
def test_the_first_rule_that_matches_counts(name, expected):
    expected = None if expected is None else replace(PLAIN, **expected)
    assert format_of(name, dynamic=RULES, lm_head=True) == expected


def test_rules_match_from_the_start_of_the_name():
    assert format_of(Q_PROJ, dynamic={"-:self_attn": {}}) == PLAIN
    assert format_of(Q_PROJ, dynamic={"-:.*self_attn": {}}) is None


def test_rules_match_the_names_of_the_checkpoint_too():
    model = replace(TINY_MODEL, renames=(("language_model.model.", "model."),))
    config = read_gptq(CONFIG | {"dynamic": {r"-:language_model\..*q_proj": {}}})
    assert config.format_of(Q_PROJ, model) is None
    assert config.format_of(Q_PROJ) == PLAIN


def test_the_head_is_quantized_only_if_the_config_says_so():
    assert format_of("lm_head") is None
    assert format_of("lm_head", lm_head=True) == PLAIN
    assert format_of("lm_head", lm_head=True, modules_in_block_to_quantize=["mlp"]) == PLAIN


@pytest.mark.parametrize("modules", [["self_attn.q_proj"], [["self_attn.k_proj", "self_attn.q_proj"]]])
def test_modules_of_a_block(modules):
    assert format_of(Q_PROJ, modules_in_block_to_quantize=modules) == PLAIN
    assert format_of(UP_PROJ, modules_in_block_to_quantize=modules) is None


# --- what cannot be read ---------------------------------------------------------------------------


def make_requirements(config):
    return Requirements(
        device="cpu",
        dtype="float32",
        quantization=config["quant_method"],
        quantization_config=config,
    )


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"bits": 5}, ["bits is 5, but only 2, 3, 4, 8"]),
        ({"bits": None}, ["bits is None"]),
        ({"group_size": 0}, ["group_size is 0"]),
        ({"group_size": "128"}, ["group_size is '128'"]),
        ({"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin', but only gptq, gptq_v2"]),
        ({"is_marlin_format": True}, ["is_marlin_format is True"]),
        ({"pack_dtype": "int64"}, ["pack_dtype is 'int64'"]),
        ({"bits": 6, "group_size": -2}, ["bits is 6", "group_size is -2"]),
        ({"dynamic": ["x"]}, [r"dynamic is \['x'\]"]),
        ({"dynamic": {"+:(": {}}}, [r"dynamic\['\+:\('\] is no regular expression"]),
        ({"dynamic": {"x": {"bits": 7}}}, [r"dynamic\['x'\]\.bits is 7"]),
        ({"dynamic": {"x": 7}}, [r"dynamic\['x'\] is 7, but a table"]),
        ({"modules_in_block_to_quantize": [["a"], 3]}, ["modules_in_block_to_quantize holds 3"]),
    ],
)
def test_every_reason_is_named(changes, reasons):
    with pytest.raises(CheckpointError, match=r"^quantization_config: ") as info:
        read_gptq(CONFIG | changes)
    (told,) = ENTRY.unsupported(make_requirements(CONFIG | changes))
    assert told == str(info.value)
    found = told.removeprefix("quantization_config: ").split("; ")
    for sentence, reason in zip(found, reasons, strict=True):
        assert re.match(reason, sentence)


def packed_config(weights=None, **changes):
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, **(weights or {})}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **changes}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            packed_config(format="float-quantized"),
            "format is 'float-quantized', but only pack-quantized",
        ),
        (packed_config({"strategy": "tensor"}), "weights.strategy is 'tensor'"),
        (packed_config({"num_bits": 16}), "weights are 16-bit int"),
        (packed_config({"type": "float"}), "weights are 4-bit float"),
        (packed_config({"dynamic": True}), "weights.dynamic is true"),
        (
            packed_config(input_activations={"num_bits": 8, "dynamic": True}),
            "input_activations are 8-bit",
        ),
        (packed_config(output_activations={}), "output_activations is set"),
    ],
)
def test_what_is_not_packed_is_refused(config, reason):
    (told,) = ENTRY.unsupported(make_requirements(config))
    assert re.search(rf"config_groups\.group_0\.{reason}", told)


@pytest.mark.parametrize(
    ("config", "bits", "step"),
    [
        (CONFIG, 4 + 16 / 128, 128),
        (CONFIG | {"sym": False, "bits": 2, "group_size": 32}, 2 + 24 / 32, 32),
        (CONFIG | {"group_size": -1, "bits": 3}, 3, 32),
        (CONFIG | {"desc_act": True}, 4 + 16 / 128, 8),
        (CONFIG | {"group_size": 48, "bits": 3}, 3 + 16 / 48, 96),
        (CONFIG | {"dynamic": {"x": {"bits": 8, "group_size": 96}}}, 8 + 16 / 96, 384),
        (packed_config(), 4.5, 32),
        (packed_config({"actorder": "group", "symmetric": False}), 4.75, 8),
        (packed_config({"actorder": "weight"}), 4.5, 32),
        (packed_config({"strategy": "channel", "group_size": None, "num_bits": 8}), 8, 4),
    ],
)
def test_what_the_plan_asks_for(config, bits, step):
    requirements = make_requirements(config)
    assert ENTRY.unsupported(requirements) == []
    assert ENTRY.weight_bits(requirements) == bits
    assert ENTRY.cut_step(requirements) == step


def test_registering_does_not_import_torch():
    code = (
        "import sys; from plugins.quant import gptq; (entry,) = gptq.core_register_quantizers();"
        "from core.registry import Requirements;"
        f"entry.unsupported(Requirements(device='', dtype='', quantization_config={CONFIG!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours
