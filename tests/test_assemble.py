"""From a configuration to a plan, and from a plan to parts: who is named when that does not work."""

from __future__ import annotations

import json

import pytest

from core.assemble import make_parts, resolve
from core.config import load_config
from core.errors import CheckpointError, PlanError, PluginCallError
from core.testing.checkpoints import make_checkpoint

PLUGIN = '''
"""An attention backend that is none."""

from core import hookimpl
from core.registry import AttentionEntry

core_api = "1.0"


def make_backend(plan):
    {body}


@hookimpl
def core_register_attention():
    return [AttentionEntry(name="odd", factory=make_backend)]
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def quantized(model, tmp_path):
    """Write the config of a checkpoint that says how it is quantized."""

    def write(**stated):
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = stated
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def plan_of(model, **settings):
    return resolve(load_config({"model": str(model), "device": "cpu", **settings})).plan


# --- parts -----------------------------------------------------------------------------------------


@pytest.fixture
def with_backend(model, tmp_path, monkeypatch):
    """Plan with a plugin whose factory has this body."""

    def make(name, body):
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(body=body))
        monkeypatch.syspath_prepend(tmp_path)
        return plan_of(model, plugins=[f"py:{name}"], attention_backend="odd")

    return make


def test_a_factory_that_raises_is_named(with_backend):
    plan = with_backend("odd_raises", "raise ValueError('no luck')")
    with pytest.raises(PluginCallError, match=r"py:odd_raises .*attention 'odd': ValueError: no luck"):
        make_parts(plan)


def test_a_part_that_lacks_methods_is_refused_with_all_of_them(with_backend):
    plan = with_backend("odd_object", "return object()")
    with pytest.raises(PlanError) as caught:
        make_parts(plan)
    assert "attention odd: method 'forward' is missing" in str(caught.value)
    assert "attention odd: method 'prepare' is missing" in str(caught.value)


# --- which quantizer -------------------------------------------------------------------------------


def test_the_checkpoint_chooses_its_quantizer(quantized):
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    choice = plan_of(quantized(**gptq)).choices["quant"]
    assert (choice.name, choice.why) == ("gptq", "stated by the checkpoint")
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert plan_of(quantized(**awq)).choices["quant"].name == "awq"


@pytest.mark.parametrize(
    ("file", "stated", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
    ],
)
def test_older_tools_state_it_in_a_file_beside_the_config(file, stated, method, model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    (tmp_path / file).write_text(json.dumps({**stated, "zero_point": True}))
    plan = plan_of(tmp_path)
    assert plan.choices["quant"].name == method
    assert plan.quantization["quant_method"] == method
    (tmp_path / file).write_text("[1]")
    with pytest.raises(CheckpointError, match=f"{file} holds no table"):
        plan_of(tmp_path)


def test_plain_weights_are_not_quantized_unless_asked_for(model):
    assert plan_of(model).choices["quant"].name == "none"
    plan = plan_of(model, quantization="fp8")
    assert plan.choices["quant"].name == "fp8"
    assert plan.weight_bytes < plan_of(model).weight_bytes


@pytest.mark.parametrize(
    ("stated", "asked", "message"),
    [
        (
            {"quant_method": "exl9"},
            None,
            r"quantized with 'exl9', which no active plugin reads \(those",
        ),
        (
            {"quant_method": "awq", "bits": 4},
            "fp8",
            "--quantization fp8: the checkpoint is quantized wi",
        ),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, None, "quant.awq: .*3"),
    ],
)
def test_what_cannot_be_read_is_refused(stated, asked, message, quantized):
    with pytest.raises(PlanError, match=message):
        plan_of(quantized(**stated), quantization=asked)


def test_a_quantizer_that_only_reads_converts_nothing(model):
    with pytest.raises(PlanError, match=r"converts at load \(those that do: fp8\)"):
        plan_of(model, quantization="awq")


# --- ranks -----------------------------------------------------------------------------------------


def test_ranks_hold_all_of_the_model(model):
    plan = plan_of(model, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert plan.world_size == 4
    assert plan.sampling_rank == 2
    assert [tuple(share.layers) for share in plan.shares] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [tuple(share.heads) for share in plan.shares] == [(0, 2), (2, 4)] * 2


def test_a_plugin_may_be_told_its_size(model):
    settings = {"parallel.tp": {"size": 2}}
    assert plan_of(model, plugins=["parallel.tp"], plugin_settings=settings).tensor_parallel_size == 2
    with pytest.raises(PlanError, match=r"size is 2, but argument tensor_parallel_size says 3"):
        plan_of(model, tensor_parallel_size=3, plugin_settings=settings)


def test_stages_may_be_of_given_lengths(tmp_path):
    model = make_checkpoint("gemma3", tmp_path)
    layers = {"parallel.pp": {"layers": [1, 3]}}
    plan = plan_of(model, pipeline_parallel_size=2, plugin_settings=layers)
    assert [tuple(share.layers) for share in plan.shares] == [(0, 1), (1, 4)]
    with pytest.raises(PlanError, match=r"2 numbers above 0 are needed that add up to the 4 layers"):
        plan_of(model, pipeline_parallel_size=2, plugin_settings={"parallel.pp": {"layers": [1, 2]}})


def test_more_machines_than_ranks_are_refused(model):
    with pytest.raises(PlanError, match="--nnodes 3 is more than the 2 ranks"):
        plan_of(model, tensor_parallel_size=2, nnodes=3)
