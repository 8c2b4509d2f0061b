"""Which layers are kept on the host: chosen evenly, planned, and refused."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import LLM, SamplingParams
from core.assemble import resolve
from core.config import load_config
from core.errors import ConfigError
from core.offload import choose_layers
from core.sharding import Span
from core.testing.checkpoints import make_checkpoint
from core.testing.simulated_ranks import Recorder, replay

GIB = 2**30


@given(
    start=st.integers(0, 50),
    size=st.integers(1, 100),
    layer_bytes=st.floats(1.0, 1e10),
    wanted=st.floats(0.0, 1e12),
)
def test_the_fewest_layers_that_hold_enough_evenly_spread(start, size, layer_bytes, wanted):
    layers = Span(start, start + size)
    chosen = choose_layers(layers, layer_bytes, wanted)
    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(range(*layers))
    assert len(chosen) * layer_bytes >= wanted or len(chosen) == size
    assert not chosen or (len(chosen) - 1) * layer_bytes < wanted
    # The distances between neighbours, from the last one of a step to the first of the next too.
    ends = [*chosen, chosen[0] + size] if chosen else []
    distances = {later - earlier for earlier, later in itertools.pairwise(ends)}
    assert not distances or max(distances) - min(distances) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_one_has_time_to_arrive(count):
    assert choose_layers(Span(0, 6), 1.0, count) == {1: (5,), 2: (2, 5), 3: (1, 3, 5)}[count]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint("gemma3", tmp_path_factory.mktemp("offload"))


def plan_of(path, num_layers, **changes):
    settings = {"model": str(path), "device": "cpu", "dtype": "float32", **changes}
    plan = resolve(load_config(settings)).plan
    size = num_layers * plan.layer_bytes / GIB
    return resolve(load_config({**settings, "cpu_offload_gb": size})).plan


def rows_of(plan):
    sections = dict(plan.render())
    return {name: (value, why) for name, value, why in sections["memory"]}


def test_nothing_is_offloaded_unless_asked_for(path):
    plan = plan_of(path, 0)
    assert plan.offloaded_layers(0) == ()
    assert {"resident", "offloaded"}.isdisjoint(rows_of(plan))


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(0.1, (3,)), (1, (3,)), (1.1, (1, 3)), (3, (0, 1, 3)), (4, (0, 1, 2, 3)), (99, (0, 1, 2, 3))],
)
def test_parts_of_a_layer_count_as_a_whole_and_too_much_as_all(num_layers, expected, path):
    assert len(plan_of(path, num_layers).offloaded_layers(0)) == len(expected)


def test_each_rank_chooses_among_its_layers(path):
    plan = plan_of(path, 1, tensor_parallel_size=2, pipeline_parallel_size=2)
    for rank, layers in enumerate([(0, 1), (0, 1), (2, 3), (2, 3)]):
        assert plan.offloaded_layers(rank) == layers  # a rank holds half of each


def test_the_plan_says_what_is_where(path):
    plan = plan_of(path, 3)
    rows = rows_of(plan)
    one = 48 * (2 * 4 * 16 + 2 * 2 * 16 + 3 * 96) * 4  # hidden · (q, out, k, v, MLP) in float32
    assert plan.layer_bytes == one
    assert rows["offloaded"] == (f"{3 * one / 1024:.4g} KiB, 3 of 4 layers", "argument cpu_offload_gb")
    resident = (plan.weight_bytes - 3 * one) / 1024
    assert (
        rows["resident"][0] == f"{resident:.4g} KiB, and {2 * one / 1024:.4g} KiB for layers that visit"
    )


@pytest.mark.parametrize("value", [-1, -0.001, float("inf"), "nan", True, "much"])
def test_impossible_sizes_are_refused(value, path):
    with pytest.raises(ConfigError, match="cpu_offload_gb"):
        load_config({"model": str(path), "cpu_offload_gb": value})


# --- engines ---------------------------------------------------------------------------------------

QUANTIZED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
PROMPTS = [[7, 3, 9, 11, 5], list(range(4, 44)), [100]]
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, prompt_logprobs=1)


def settings_of(path, **changes):
    usual = {"model": str(path), "device": "cpu", "dtype": "float32", "num_kv_blocks": 40}
    return {**usual, "max_num_batched_tokens": 24, "max_model_len": 64, "max_num_seqs": 4, **changes}


def generate(settings):
    with LLM(**settings) as llm:
        results = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(r.outputs[0].token_ids, r.prompt_logprobs) for r in results]


@pytest.mark.parametrize("method", sorted(QUANTIZED))
def test_quantized_layers_of_an_engine(method, path, tmp_path):
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = QUANTIZED[method]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = settings_of(tmp_path, load_format="dummy")
    expected = generate(settings)
    one = resolve(load_config(settings)).plan.layer_bytes / GIB
    for size in (one, 3 * one, 1.0):
        assert generate({**settings, "cpu_offload_gb": size}) == expected


def test_layers_that_are_quantized_while_they_are_loaded(path):
    settings = settings_of(path, quantization="fp8", kv_cache_dtype="fp8")
    assert generate({**settings, "cpu_offload_gb": 1.0}) == generate(settings)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_every_rank_keeps_its_own(mesh, path):
    settings = settings_of(path, cpu_offload_gb=1.0)
    with LLM(**settings) as llm:
        recorder = llm.engine.executor = Recorder(llm.engine.executor)
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    sizes = {"tensor_parallel_size": mesh[0], "pipeline_parallel_size": mesh[1]}
    results = replay({**settings, **sizes}, recorder.steps, num_blocks=41)
    assert [r.tokens for r in results] == [expected.tokens for _, expected in recorder.steps]
