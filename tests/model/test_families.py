"""Reading config.json: both spellings, what is refused, and families from outside."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from core.errors import CheckpointError
from core.model import llama_config
from core.model.families import BUILTIN_MODELS, load_hf_config, read_decoder, read_model
from core.model.spec import RopeSpec
from core.registry import KINDS, ModelEntry
from core.testing.checkpoints import FAMILIES, make_checkpoint, reference_logits

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def write(tmp_path):
    """Write a config.json; return its folder."""

    def make(config, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path

    return make


def old_llama(**changes):
    """A config as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        "vocab_size": 160,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        **changes,
    }


def read(path):
    return read_model(load_hf_config(path))


# --- spellings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_old_spelling_of_rope_means_the_same_as_the_new_one(key, write):
    scaling = {key: "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}
    old = read(write(old_llama(rope_scaling=scaling)))
    config = old_llama(rope_parameters={**LLAMA3, "rope_theta": 500_000.0})
    del config["rope_theta"], config["rope_scaling"]
    assert read(write(config)) == old
    rope = old.ropes["default"]
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", 500_000.0, 8.0)
    assert rope.original_max_position == 8192


def test_the_old_spelling_of_phi3_means_the_same_as_the_new_one(checkpoint, write):
    path = checkpoint("phi4")
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {
            "type": "longrope",
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        },
    }
    assert read(write(config, **old)) == read(path)


def test_the_old_spelling_of_gemma3_means_the_same_as_the_new_one(checkpoint, write):
    path = checkpoint("gemma3")
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    old = {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert read(write(config, **old)) == read(path)


def test_an_old_config_serves_a_whole_checkpoint(checkpoint, load, run, tmp_path):
    path = make_checkpoint("llama3.1", tmp_path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    file.write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": rope}))
    tokens = list(range(50))
    expected = reference_logits(checkpoint("llama3.1"), tokens)
    assert (run(load(path), tokens) - expected).abs().max() < 1e-3


ROPES = st.sampled_from(
    [
        {},
        {"rope_theta": 500_000.0, "rope_scaling": None},
        {"rope_theta": 500_000, "rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_theta": 500_000.0}},
        {"rope_parameters": None},
    ]
)
OTHER_KEYS = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": st.integers(1, 1 << 18),
        "hidden_size": st.sampled_from([64, 4096, 65]),
        "intermediate_size": st.integers(1, 1 << 15),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([4, 32]),
        "num_key_value_heads": st.sampled_from([None, 2, 4]),
        "head_dim": st.sampled_from([None, 16, 128]),
        "hidden_act": st.sampled_from(["silu", "gelu"]),
        "max_position_embeddings": st.integers(1 << 13, 1 << 17),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "eos_token_id": st.sampled_from([None, 7, [7, 8]]),
        "torch_dtype": st.sampled_from(["bfloat16", "float16"]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "partial_rotary_factor": st.just(1.0),
        "quantization_config": st.just({"quant_method": "fp8"}),
        "pretraining_tp": st.just(1),
        "rope_theta": st.sampled_from([10_000, "many"]),
        "acme": st.just("anything"),
    },
)


@given(ROPES, OTHER_KEYS)
def test_configs_of_llama_say_what_they_say_to_transformers(rope, others):
    raw = {"model_type": "llama", **others, **rope}
    try:
        expected = LlamaConfig.from_dict(json.loads(json.dumps(raw)))
    except Exception as error:  # noqa: BLE001  of whatever type
        with pytest.raises(type(error)):
            llama_config.LlamaConfig.from_dict(raw)
        return
    config = llama_config.LlamaConfig.from_dict(json.loads(json.dumps(raw)))
    assert config.to_dict() == expected.to_dict()
    assert type(config.dtype) is type(expected.dtype)


def test_configs_of_llama_are_read_without_the_models_of_transformers(write):
    code = (
        "import sys\n"
        "from core.model.families import load_hf_config\n"
        "load_hf_config(sys.argv[1])\n"
        "print('torch._dynamo' in sys.modules, 'transformers.models.llama' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(write(old_llama()))]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    assert shown.split() == ["False", "False"]


# --- what is read ----------------------------------------------------------------------------------


def test_sliding_layers(checkpoint):
    def windows(variant):
        return [layer.window for layer in read(checkpoint(variant)).layers]

    assert windows("llama3") == [None, None]
    assert windows("mistral") == windows("phi3-sliding") == [8, 8]
    assert windows("mistral-nemo") == [None, None]
    assert windows("qwen2-sliding") == [None, 8]
    assert windows("gemma2") == [8, None]
    assert windows("gemma3") == [8, 8, None, 8]


def test_each_layer_type_of_gemma3_has_its_rope(checkpoint):
    spec = read(checkpoint("gemma3"))
    kinds = [(spec.ropes[layer.rope].kind, spec.ropes[layer.rope].theta) for layer in spec.layers]
    sliding, full = ("default", 10_000.0), ("linear", 1_000_000.0)
    assert kinds == [sliding, sliding, full, sliding]


def test_max_position_includes_the_scaling(checkpoint, write):
    assert read(checkpoint("llama3.1")).max_position == 128
    assert read(checkpoint("llama-dynamic")).max_position == 128  # 32 x 4
    assert read(checkpoint("llama-linear")).max_position == 512  # 128 x 4
    assert read(checkpoint("llama-yarn")).max_position == 128  # 32 x 4, already counted
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    config = old_llama(max_position_embeddings=32_768, rope_scaling=yarn)
    assert read(write(config)).max_position == 131_072
    assert read(checkpoint("gemma3")).max_position == 128


def test_head_dim_need_not_divide_the_hidden_size(checkpoint):
    assert read(checkpoint("mistral-nemo")).head_dim == 24
    assert read(checkpoint("llama3")).head_dim == 16


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type 'spiral' of llama .* yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor -1.0"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' .* silu"),
        ({"num_local_experts": 8}, "num_local_experts 8 .* dense"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 .* num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"head_dim": 15}, "head_dim 15"),
    ],
)
def test_what_llama_configs_may_not_say(changes, message, write):
    with pytest.raises(CheckpointError, match=message):
        read(write(old_llama(**changes)))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation 'mish'"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types|num_hidden_layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
    ],
)
def test_what_other_configs_may_not_say(variant, changes, message, checkpoint, write):
    config = json.loads((checkpoint(variant) / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        read(write(config, **changes))


def test_longrope_needs_a_factor_for_every_pair(checkpoint):
    config = load_hf_config(checkpoint("phi3"))
    config.rope_parameters["long_factor"] = [1.0]
    with pytest.raises(CheckpointError, match="long_factor has 1 numbers"):
        read_model(config)


def test_an_unknown_family_is_told_how_to_come_in(write):
    with pytest.raises(CheckpointError, match=r"'acme' .* llama.*core_register_models"):
        read(write({"model_type": "acme"}))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}'])
def test_malformed_configs(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_config(tmp_path)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "acme"])
def test_code_in_a_checkpoint_never_runs(model_type, write, tmp_path):
    sentinel = tmp_path / "ran"
    code = f"open({str(sentinel)!r}, 'w').close()\nclass AcmeConfig: pass\n"
    (tmp_path / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.AcmeConfig", "AutoModelForCausalLM": "evil.AcmeConfig"}
    config = load_hf_config(write(old_llama(model_type=model_type, auto_map=auto_map)))
    assert config.model_type == model_type
    assert not sentinel.exists()


# --- the door --------------------------------------------------------------------------------------


def test_built_in_families_are_ordinary_descriptors():
    assert all(isinstance(entry, KINDS["model"]) for entry in BUILTIN_MODELS)
    read_types = {name for entry in BUILTIN_MODELS for name in entry.model_types}
    assert {variant.model_type for variant in FAMILIES.values()} == read_types
    assert len({entry.name for entry in BUILTIN_MODELS}) == len(BUILTIN_MODELS)


def read_acme(config):
    return dataclasses.replace(
        read_decoder(config, activation_key="acme_activation"), renames=(("acme.", "model."),)
    )


ACME = ModelEntry(name="acme", factory=read_acme, model_types=("acme",))


NEW_ROPE = {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0}}
OLD_ROPE = {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("rope", [NEW_ROPE, OLD_ROPE])
def test_a_family_that_transformers_does_not_know(rope, write):
    config = old_llama(model_type="acme", acme_activation="relu")
    del config["rope_theta"], config["rope_scaling"]
    spec = read_model(load_hf_config(write(config, **rope)), [ACME])
    assert (spec.model_type, spec.activation, spec.hidden_size) == ("acme", "relu", 64)
    assert spec.ropes["default"] == RopeSpec(kind="linear", theta=77.0, rotary_dim=16, factor=2.0)


@pytest.mark.parametrize("key", ["rms_norm_eps", "num_attention_heads", "acme_activation"])
def test_what_a_config_of_an_unknown_family_lacks_is_named(key, write):
    config = old_llama(model_type="acme", acme_activation="relu")
    del config[key]
    with pytest.raises(CheckpointError, match=f"{key} None"):
        read_model(load_hf_config(write(config)), [ACME])


def test_a_plugin_may_take_a_built_in_family_over(checkpoint):
    def read_other(config):
        return dataclasses.replace(read_decoder(config), logit_softcap=1.0)

    entry = ModelEntry(name="mine", factory=read_other, model_types=("llama",))
    config = load_hf_config(checkpoint("llama3"))
    assert read_model(config, [entry]).logit_softcap == 1.0
    assert read_model(config).logit_softcap is None


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
def test_missing_folder_is_not_taken_for_the_name_of_a_repository(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give a checkpoint's folder"):
        load_hf_config(name)
