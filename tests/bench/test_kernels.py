from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from core.assemble import build_engine, make_plan, resolve
from core.bench import kernels, step_profile
from core.bench.ceilings import Ceilings
from core.bench.kernels import KernelOptions, make_groups
from core.bench.null_executor import NAME
from core.bench.offline import adapt_to_batch
from core.bench.power import Power
from core.bench.step_profile import Group, StepProfile
from core.bench.step_work import Work, attention_work, count_prefill_steps, linear_work
from core.bench.trace import KernelTotal
from core.cli import main
from core.config import load_config
from core.errors import ConfigError, CytheraError

CEILINGS = Ceilings("a card", 4e12, 3e12, 8e14)
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of a dense model, by type, and of one with a window."""
    folder = tmp_path_factory.mktemp("models")
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7}
    made = {}
    for name, dtype, config in (
        ("bfloat16", "bfloat16", llama),
        ("float32", "float32", llama),
        ("window", "float32", {**CONFIG, **mistral}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        settings = {
            "model": str(folder / name),
            "dtype": dtype,
            "device": "cpu",
            "load_format": "dummy",
        }
        made[name] = make_plan(load_config(settings))
    return made


# --- what a step has to do -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "num_tokens"), [("bfloat16", 1), ("float32", 5)])
def test_linear_work_is_that_of_transformers(plans, dtype, num_tokens):
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(getattr(torch, dtype))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    num_flops = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    work = linear_work(plans[dtype], num_tokens, num_tokens)
    assert work.num_flops == num_flops
    assert work.num_bytes == sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.parametrize("name", ["float32", "window"])
@given(spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=4))
def test_attention_work_counts_each_key_that_is_seen(plans, name, spans):
    plan = plans[name]
    window = 7 if name == "window" else 10**6
    num_keys = num_pairs = 0
    for start, count in spans:
        seen = [set(range(max(0, p - window + 1), p + 1)) for p in range(start, start + count)]
        num_keys += len(set().union(*seen))
        num_pairs += sum(map(len, seen))
    work = attention_work(plan, spans)
    assert work.num_bytes == num_keys * plan.kv_bytes_per_token
    # Twice a product of head_dim numbers for each query head: with the key, and with the value.
    assert work.num_flops == 3 * 2 * 2 * 4 * 16 * num_pairs


# --- figures ---------------------------------------------------------------------------------------


def total(name, microseconds, count=20):
    return KernelTotal(name, count, microseconds)


KERNELS = [
    total("linear_kernel", 4000.0),
    total("nvjet_sm90_tst_64x8", 2000.0),
    total("decode", 1000.0),
    total("flash_fwd_splitkv_kernel", 500.0),
    total("vectorized_elementwise_kernel<FillFunctor>", 300.0),
    total("plan_decodes", 200.0),
]


def test_groups_hold_each_kernel_once():
    groups = make_groups(KernelOptions(), KERNELS, 20, Work(8e8, 1e9), Work(1e8, 1e6))
    assert [(g.name, g.microseconds) for g in groups] == [
        ("linear", 300.0),
        ("attention", 75.0),
        ("other", 25.0),
    ]
    figures = groups[0].to_dict(CEILINGS)
    assert figures["bytes_per_second"] == pytest.approx(8e8 / 300e-6)
    assert figures["share_of_bandwidth"] == pytest.approx(8e8 / 300e-6 / 4e12)
    assert figures["share_of_flops"] == pytest.approx(1e9 / 300e-6 / 8e14)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("decode_hopper", "attention"),
        ("prefill_hopper", "attention"),
        ("gate_hopper", "linear"),
        ("gate_kernel", "other"),
        ("vector_kernel", "linear"),
    ],
)
def test_kernels_of_the_built_in_plugins_are_known(name, group):
    groups = make_groups(KernelOptions(), [total(name, 100.0)], 20, Work(1, 1), Work(1, 1))
    assert [g.name for g in groups if g.microseconds] == [group]


def test_groups_can_be_named_by_the_user():
    options = KernelOptions(attention_kernels="^plan", linear_kernels="^vec")
    groups = make_groups(options, KERNELS, 20, Work(1, 1), Work(1, 1))
    assert [g.microseconds for g in groups] == [15.0, 10.0, 375.0]


def test_a_kind_of_kernel_that_never_ran_has_no_rate():
    assert Group("linear", 0.0, Work(1, 1)).to_dict(CEILINGS)["bytes_per_second"] == 0


def test_the_report_adds_up():
    groups = make_groups(KernelOptions(), KERNELS, 20, Work(8e8, 1e9), Work(1e8, 1e6))
    profile = StepProfile("decode, batch 1, context 512", 20, 450.0, KERNELS, groups)
    assert (profile.busy_us, profile.idle_us) == (400.0, 50.0)
    lines = step_profile.report(CEILINGS, [profile]).splitlines()
    assert lines[0] == "a card: read 4.00 TB/s, copy 3.00 TB/s, bf16 product 800 TFLOP/s"
    assert lines[2] == "decode, batch 1, context 512: 450.0 µs a step, mean of 20"
    rows = [line.split() for line in lines[4 : 4 + len(KERNELS) + 1]]
    assert rows[0] == ["linear_kernel", "1", "200.0", "44.4%"]
    assert rows[-1] == ["(idle)", "50.0", "11.1%"]
    assert sum(float(row[-2]) for row in rows) == pytest.approx(450.0)
    assert lines[-3].split()[:4] == ["linear", "300.0", "µs", "66.7%"]
    assert "2.67 TB/s (67%), 3.3 TFLOP/s (0%)" in lines[-3]
    plain = kernels.to_dict(KernelOptions(), CEILINGS, [profile])
    assert json.loads(json.dumps(plain))["steps"][0]["kernels"][0]["us_per_step"] == 200.0


def test_a_step_says_what_it_drew():
    power = Power(690.0, 700.0, 1500.0, 1980.0)
    profile = StepProfile("x", 20, 50.0, KERNELS, power=power)
    assert step_profile.report(CEILINGS, [profile]).splitlines()[3] == f"  {power}"
    assert profile.to_dict(CEILINGS)["power"]["watts"] == 690.0


def test_the_rest_of_a_long_table_is_one_line():
    many = [total(f"kernel{i}", 20.0) for i in range(step_profile.MAX_ROWS + 5)]
    report = step_profile.report(CEILINGS, [StepProfile("x", 20, 50.0, many)])
    [line] = [line for line in report.splitlines() if "more)" in line]
    assert line.split() == ["(5", "more)", "5.0", "10.0%"]


# --- running ---------------------------------------------------------------------------------------


@pytest.fixture
def bench():
    """A bench over a real engine whose executor computes nothing, and the plans of its steps."""
    settings = {"model": "demo", "plugins": (NAME,), "executor": "null", "device": "cpu"}
    config = adapt_to_batch(
        load_config({**settings, "max_num_seqs": 8, "max_num_batched_tokens": 64}), 5
    )
    assembly = resolve(config)
    outputs = kernels._Outputs()
    engine = build_engine(assembly, outputs.take)
    submitted = []
    submit = engine.executor.submit
    engine.executor.submit = lambda plan: (submitted.append(plan), submit(plan))
    options = KernelOptions(batch_sizes=(5,), context_len=200, prefill_len=100, num_steps=4)
    yield kernels._StepBench(engine, assembly.plan, outputs, options, None), submitted
    engine.close()


def record_steps(bench, submitted, monkeypatch):
    """Have steps run as often as they would be, and return their plans."""
    seen = []

    def time_and_profile(_what, run):
        submitted.clear()
        for _ in range(2 * 4 + 2):  # twice num_steps, and what a second step in flight adds
            run()
        seen.extend(submitted)
        return kernels.Measured(10.0, [total("linear", 20.0)], None)

    monkeypatch.setattr(bench, "_time_and_profile", time_and_profile)
    return seen


def test_decode_steps_hold_the_whole_batch_and_nothing_else(bench, monkeypatch):
    bench, submitted = bench
    seen = record_steps(bench, submitted, monkeypatch)
    for _ in range(2):  # the second one finds nothing left over from the first one
        profile = bench.profile_decode(5)
        assert len(seen) == 10
        for plan in seen:
            assert (plan.num_decodes, plan.num_tokens, plan.added) == (5, 5, [])
        profiled = [start + 1 for plan in seen[-4:] for start in plan.starts]
        mean = float(profile.what.removeprefix("decode, batch 5, mean context "))
        assert mean == pytest.approx(sum(profiled) / len(profiled), abs=1.5)
        seen.clear()
        assert not bench._engine.has_work


@given(st.integers(1, 8), st.integers(1, 60), st.integers(8, 100))
def test_steps_until_all_decode(batch_size, context_len, budget):
    left, num_steps = [context_len] * batch_size, 0
    while any(left):
        free = budget - sum(not rest for rest in left)
        for index, rest in enumerate(left):
            taken = min(rest, free)
            left[index] -= taken
            free -= taken
        num_steps += 1
    assert count_prefill_steps(batch_size, context_len, budget) == num_steps


def test_prefill_steps_hold_one_whole_prompt(bench, monkeypatch):
    bench, submitted = bench
    seen = record_steps(bench, submitted, monkeypatch)
    profile = bench.profile_prefill()
    assert profile.what == "prefill, 1 prompt of 64 tokens"  # no longer than the budget of a step
    assert [(plan.num_tokens, plan.starts, plan.samples) for plan in seen] == [(64, [0], [True])] * 10


def test_a_request_that_fails_ends_the_benchmark(bench, monkeypatch):
    bench, _ = bench

    def collect():
        raise ZeroDivisionError

    monkeypatch.setattr(bench._engine.executor, "collect", collect)
    with pytest.raises(CytheraError, match="a request of the benchmark failed: ZeroDivisionError"):
        bench.profile_decode(5)


def test_a_batch_that_does_not_fit(bench):
    bench, _ = bench
    bench._options = replace(bench._options, context_len=2048)
    with pytest.raises(ConfigError, match=r"make 2108 tokens, .* at most 2048 \(--max-model-len\)"):
        bench.profile_decode(1)
    with pytest.raises(ConfigError, match=r"600 sequences of 2018 .* needs .* 1219200 .* has 1048576"):
        bench._check_fit(600, 2018)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu(capsys):
    assert main(["bench", "kernels", "demo"]) == 1
    assert "bench kernels looks at what runs on a GPU" in capsys.readouterr().err


def test_a_plan_for_something_else_than_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load_config({"model": "demo", "device": "cpu", "num_kv_blocks": 9})
    with pytest.raises(ConfigError, match="1 ranks on cpu"):
        kernels.measure(config, KernelOptions())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_steps": 0}, "--num-steps 0"),
        ({"context_len": 0}, "--context-len 0"),
        ({"prefill_len": -1}, "--prefill-len -1"),
        ({"linear_kernels": "("}, "--linear-kernels is no expression"),
    ],
)
def test_options_that_make_no_sense(option, message):
    with pytest.raises(ConfigError, match=message):
        KernelOptions(**option).check()
