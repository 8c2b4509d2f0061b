from __future__ import annotations

from typing import ClassVar

import pytest
import smollm3 as plugin
from transformers import AutoConfig, AutoModelForCausalLM

from core import LLM, SamplingParams
from core.errors import CheckpointError
from core.model.spec import LayerSpec
from core.testing import PluginConformance
from core.testing.checkpoints import randomize, reference_generate
from core.testing.model import ModelConformance

PROMPT = [7, 3, 99, 42, 5, 17, 120, 3, 8, 64, 31, 2, 11, 90, 45, 6, 77, 12]


def make_config(**changes):
    small = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model("smollm3", **{**small, **changes})


class TestPlugin(PluginConformance):
    module = "smollm3"


class TestSmolLM3(ModelConformance):
    (entry,) = plugin.core_register_models()
    changes: ClassVar = {}

    def make_checkpoint(self, path):
        model = AutoModelForCausalLM.from_config(make_config(**self.changes))
        randomize(model, seed=0)
        model.save_pretrained(path)
        return path


class TestSliding(TestSmolLM3):
    changes: ClassVar = {"use_sliding_window": True, "sliding_window": 8}


class TestYarn(TestSmolLM3):
    changes: ClassVar = {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 2_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    }


class TestOwnLayers(TestSmolLM3):
    changes: ClassVar = {
        "no_rope_layers": [0, 1, 1, 0, 1],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }


def test_whole_engine_draws_the_tokens_of_transformers(tmp_path):
    folder = TestSliding().make_checkpoint(tmp_path)
    settings = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 32}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(folder), plugins=["py:smollm3"], **settings) as llm:
        [result] = llm.generate([PROMPT], params)
    assert result.outputs[0].token_ids == reference_generate(folder, PROMPT, 24)


def test_every_fourth_layer_has_no_rope():
    spec = plugin.read_smollm3(make_config(num_hidden_layers=8))
    assert [layer.rope for layer in spec.layers] == [*["default"] * 3, "none"] * 2
    assert spec.tied


def test_windows_are_those_of_the_layers_without_rope():
    config = make_config(use_sliding_window=True, sliding_window=8)
    layers = plugin.read_smollm3(config).layers
    assert layers[3] == LayerSpec(8, "none")
    assert layers[0] == layers[4] == LayerSpec(None, "default")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"no_rope_layers": [1]}, "no_rope_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 5}, "'linear_attention'"),
        ({"hidden_act": "xielu"}, "hidden_act"),
    ],
)
def test_refuses_what_it_cannot_serve(changes, part):
    config = make_config()
    for key, value in changes.items():  # transformers would refuse some of them by itself
        object.__setattr__(config, key, value)
    with pytest.raises(CheckpointError, match=part):
        plugin.read_smollm3(config)


def test_refuses_several_ropes():
    config = make_config()
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    kinds = ["full_attention", "sliding_attention"]
    object.__setattr__(config, "rope_parameters", dict.fromkeys(kinds, rope))
    object.__setattr__(config, "layer_types", [*kinds, *kinds, "full_attention"])
    with pytest.raises(CheckpointError, match="rope_parameters"):
        plugin.read_smollm3(config)
