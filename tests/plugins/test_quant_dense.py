from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_compiler import compiling_for, most_shared_bytes, names_of

from core.cli import main
from core.errors import CapacityError, ConfigError
from core.interfaces import LinearSpec
from core.registry import Requirements
from core.testing.lone_linear import TINY_MODEL
from core.testing.quantizer import QuantizerConformance
from plugins.quant import dense as plugin
from plugins.quant.dense import gate_hopper as gate
from plugins.quant.dense import linear
from plugins.quant.dense.candidates import candidates, overlaps, slots_of_head, slots_of_layer
from plugins.quant.dense.command import Budget, Report, merge_entries, show, tune_chain
from plugins.quant.dense.command import _make_console as make_console
from plugins.quant.dense.linear import NUM_ARRIVALS, NUM_PARTIALS, DenseLinear, fit, workspace_on
from plugins.quant.dense.operation import FUSED_GATES, KernelConfig, Operation, partial_sizes
from plugins.quant.dense.search import MIN_GAIN, search
from plugins.quant.dense.table import (
    FUSED,
    LIBRARY,
    MAX_TOKENS,
    MAX_TUNED,
    SHIPPED,
    Card,
    Entry,
    Table,
    guess,
    read_entries,
    shipped_file,
    shrink,
    table_of,
    tuned_file,
    write_entries,
)
from plugins.quant.dense.tuning import _layers_that_fit as layers_that_fit

(ENTRY,) = plugin.core_register_quantizers()
INTERPRETED = Path(__file__).with_name("quant_dense_interpreted.py")
H200 = Card("NVIDIA H200", (9, 0))
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0))
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0))
TILE = KernelConfig("tile", 64, 128, block_m=16, split_k=4, num_stages=3, swap=True, tma=True)


def test_in_the_interpreter():
    triton_interpreter.run_interpreted(INTERPRETED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnTheDevice(QuantizerConformance):
    entry = ENTRY
    device = "cuda"
    dtypes = ("bfloat16", "float16")
    max_weight_error = 5e-3
    settings = settings(QuantizerConformance.settings, max_examples=3)

    def quantize(self, spec, shard, weight, bias):
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


# --- what can be served ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, []),
        ({"dtype": "float16"}, []),
        (
            {"device": "cpu", "dtype": "float32"},
            ["device 'cpu' is not 'cuda'", "dtype 'float32' is none"],
        ),
    ],
)
def test_names_everything_that_it_cannot_serve(wanted, named):
    reasons = ENTRY.unsupported(Requirements(**({"device": "cuda", "dtype": "bfloat16"} | wanted)))
    assert len(reasons) == len(named)
    for reason, start in zip(reasons, named, strict=True):
        assert reason.startswith(start)


def test_says_how_to_get_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (reason,) = ENTRY.unsupported(Requirements(device="cuda", dtype="bfloat16"))
    assert "pip install cythera[cuda]" in reason


def test_registering_imports_neither_torch_nor_triton():
    code = (
        "import sys; from plugins.quant import dense as plugin; plugin.core_register_quantizers(); "
        "plugin.core_register_commands(lambda name, function: None); "
        "sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  the arguments are ours


def test_a_host_is_refused_where_nothing_interprets():
    spec = LinearSpec(
        name="layer",
        in_features=16,
        shards=(("a", 8),),
        bias=False,
        dtype=torch.float16,
        device=torch.device("cpu"),
        role="down",
    )
    with pytest.raises(ConfigError, match="run on cuda, not on cpu; see --device"):
        DenseLinear(spec, "plain", "silu")(torch.zeros(1, 16).half())


# --- what is taken back ----------------------------------------------------------------------------


def test_a_card_is_asked_for_nothing_that_it_lacks():
    op = Operation(4096, 4096, norm="plain")
    config = replace(TILE, prefetch=128, overlap="late")
    older = fit(op, config, 16, A100, torch.bfloat16)
    assert (older.tma, older.prefetch, older.overlap) == (False, 0, "")
    assert fit(op, config, 16, H200, torch.bfloat16) is config


def test_rows_of_odd_length_are_not_fetched_by_the_copy_engine():
    op = Operation(64, 1028)
    assert not fit(op, TILE, 16, H200, torch.bfloat16).tma
    assert fit(replace(op, num_inputs=1032), TILE, 16, H200, torch.bfloat16).tma


def test_sums_are_not_split_where_the_workspace_is_too_small():
    op = Operation(200_000, 4096, activation="silu")
    config = replace(TILE, block_m=64)
    assert partial_sizes(op, config, 64)[0] > NUM_PARTIALS
    assert fit(op, config, 64, H200, torch.bfloat16).split_k == 1
    narrow = replace(TILE, block_n=1, block_m=1)
    assert partial_sizes(op, narrow, 1)[1] > NUM_ARRIVALS
    assert fit(op, narrow, 1, H200, torch.bfloat16).split_k == 1


# --- the table -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table_of.cache_clear()
    yield tmp_path
    table_of.cache_clear()


def configs():
    return st.builds(
        KernelConfig,
        kernel=st.sampled_from(["tile", "vector", "library"]),
        block_n=st.sampled_from([1, 64]),
        block_k=st.sampled_from([64, 256]),
        block_m=st.sampled_from([64, 128]),
        split_k=st.integers(1, 8),
        num_warps=st.sampled_from([1, 4, 8]),
        num_stages=st.integers(1, 7),
        swap=st.booleans(),
        eager=st.booleans(),
        tma=st.booleans(),
        prefetch=st.integers(0, 512),
        fuse_norm=st.booleans(),
        overlap=st.sampled_from(["", "early", "late"]),
    )


@given(
    entries=st.lists(
        st.builds(
            Entry,
            kind=st.sampled_from(["gate", "norm", "residual", "plain"]),
            outputs=st.integers(1, 10**6),
            inputs=st.integers(1, 10**6),
            tokens=st.integers(1, MAX_TOKENS),
            config=configs(),
        )
    )
)
def test_files_hold_what_was_written(tmp_path_factory, entries):
    file = tmp_path_factory.mktemp("tuning") / "new" / "card.json"
    write_entries(file, entries)
    assert read_entries(file) == entries


ROW = {"kind": "norm", "outputs": 8, "inputs": 8, "tokens": 16}
GOOD = {"kernel": "tile", "block_m": 16, "block_n": 64, "block_k": 64}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "malformed"),
        ("[]", "malformed"),
        ('{"entries": 7}', "malformed"),
        ('{"entries": [7]}', "malformed"),
        (json.dumps({"entries": [{**ROW, "config": None}]}), "malformed"),
        (json.dumps({"entries": [{**ROW, "config": {**GOOD, "tiles": 3}}]}), "tiles"),
        (json.dumps({"entries": [{"config": GOOD}]}), "malformed"),
        (json.dumps({"entries": [{**ROW, "config": {"kernel": "magic"}}]}), "'magic' is none of"),
        (json.dumps({"entries": [{**ROW, "tokens": 17, "config": GOOD}]}), "17 tokens do not fit"),
        (json.dumps({"entries": [{**ROW, "config": {**GOOD, "block_k": 96}}]}), "powers of two"),
        (json.dumps({"entries": [{**ROW, "config": {**GOOD, "block_n": "64"}}]}), "malformed"),
        (json.dumps({"entries": [{**ROW, "config": {**GOOD, "split_k": 0}}]}), "split_k 0"),
        (json.dumps({"entries": [{**ROW, "tokens": 1025, "config": GOOD}]}), "between 1 and 1024"),
        (
            json.dumps({"entries": [{**ROW, "tokens": 65, "config": {**GOOD, "block_m": 128}}]}),
            "at most 64 tokens, not 65",
        ),
        (
            json.dumps({"entries": [{**ROW, "tokens": 128, "config": {"kernel": "whole"}}]}),
            "gates of more than 64",
        ),
        (
            json.dumps({"entries": [{**ROW, "kind": "gate", "config": {"kernel": "shared"}}]}),
            "gates of more than 64",
        ),
    ],
)
def test_malformed_files_are_named(cache, content, told):
    file = tuned_file(A100)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        table_of(A100)
    assert str(file) in str(caught.value)
    assert "delete it or run `tune` again" in str(caught.value)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_entries_can_be_read_and_need_no_more_than_the_workspace(file):
    for entry in read_entries(file):
        is_gate = entry.kind == "gate"
        op = Operation(entry.outputs, entry.inputs, activation="silu" if is_gate else "")
        partials, arrivals = partial_sizes(op, entry.config, entry.tokens)
        assert partials <= NUM_PARTIALS
        assert arrivals <= NUM_ARRIVALS
        assert entry.tokens <= (MAX_TUNED if is_gate else MAX_TOKENS)


def test_cards_of_a_capability_share_entries(cache):
    assert shipped_file(H100) == shipped_file(H200) == SHIPPED / "NVIDIA H200.json"
    assert not shipped_file(A100).exists()


def test_what_this_machine_measured_goes_before_what_is_shipped(cache):
    op = Operation(6144, 4096, norm="plain")
    shipped = table_of(H200).choose(op, 16)
    own = replace(TILE, num_stages=7)
    assert shipped != own
    merge_entries(tuned_file(H200), [Entry("norm", 6144, 4096, 16, own)])
    assert tuned_file(H200) == cache / "cythera" / "tuning" / "dense" / "NVIDIA H200.json"
    assert table_of(H200).choose(op, 16) == own
    assert table_of(H200).choose(op, 17) != own
    assert table_of(H100).choose(op, 16) == shipped, "measured on another card"


def test_tuning_again_keeps_other_shapes(tmp_path):
    file = tmp_path / "card.json"
    first, second = Entry("norm", 8, 8, 16, TILE), Entry("norm", 8, 8, 32, replace(TILE, block_m=32))
    merge_entries(file, [first, second])
    newer = first._replace(config=LIBRARY)
    merge_entries(file, [newer, Entry("gate", 8, 8, 1, LIBRARY)])
    assert read_entries(file) == [Entry("gate", 8, 8, 1, LIBRARY), newer, second]


def some_table():
    small, large = replace(TILE, num_warps=2), replace(TILE, block_m=64, split_k=1)
    return (
        Table(
            [
                Entry("norm", 4096, 4096, 8, small),
                Entry("norm", 4096, 4096, 64, large),
                Entry("norm", 65536, 4096, 16, LIBRARY),
                Entry("residual", 4096, 4096, 16, TILE),
            ]
        ),
        small,
        large,
    )


def test_entries_serve_as_many_tokens_as_they_say():
    table, small, large = some_table()
    op = Operation(4096, 4096, norm="one_plus", bias=True)
    assert [table.choose(op, n) for n in (1, 8, 9, 64)] == [small, small, large, large]
    assert table.choose(op, 0) == table.choose(op, 65) == LIBRARY


def test_gates_of_many_tokens_have_entries_of_their_own():
    whole, shared = KernelConfig("whole"), KernelConfig("shared")
    entries = [
        Entry("gate", 1024, 512, 16, TILE),
        Entry("gate", 1024, 512, 128, whole),
        Entry("gate", 1024, 512, 256, LIBRARY),
        Entry("gate", 1024, 512, 1024, shared),
    ]
    table, op = Table(entries), Operation(1024, 512, norm="plain", activation="silu")
    assert [table.choose(op, n) for n in (16, 65, 128, 129, 257, 1024)] == [
        TILE, whole, whole, LIBRARY, shared, shared,
    ]  # fmt: skip
    assert table.choose(op, 64) == LIBRARY, "what is for many is not for few"
    assert table.choose(op, 1025) == FUSED
    assert table.choose(replace(op, num_outputs=2048), 128) == FUSED
    assert table.choose(Operation(1024, 512, norm="plain"), 128) == LIBRARY


@pytest.mark.parametrize("kernel", FUSED_GATES)
def test_gates_are_fused_on_hopper_only_and_where_the_kernel_serves_them(kernel):
    op = Operation(1024, 512, norm="plain", activation="silu")
    config = KernelConfig(kernel)
    library = replace(config, kernel="library")
    assert fit(op, config, 128, H200, torch.bfloat16) == config
    assert fit(op, config, 128, A100, torch.bfloat16) == replace(library, overlap="")
    assert fit(op, config, 128, H200, torch.float32) == library
    for other in (replace(op, bias=True), replace(op, num_inputs=516), replace(op, num_outputs=1020)):
        assert fit(other, config, 128, H200, torch.bfloat16) == library


def test_a_plain_product_is_served_like_a_sum():
    table, _, _ = some_table()
    assert table.choose(Operation(4096, 4096), 3) == TILE
    assert table.choose(Operation(4096, 4096, residual=True), 3) == TILE


def test_unknown_shapes_take_after_the_nearest():
    table, small, large = some_table()
    near, far = Operation(5120, 4096, norm="plain"), Operation(50_176, 4096, norm="plain")
    assert table.choose(near, 8) == small
    assert table.choose(near, 17) == large
    assert table.choose(far, 9) == LIBRARY, "as the projection to 65536 is"
    assert table.choose(Operation(896, 896, norm="plain"), 8) == replace(small, split_k=1)
    assert table.choose(Operation(1000, 999, norm="plain"), 8) == LIBRARY, "nothing divides it"
    added = Operation(896, 896, residual=True)
    assert table.choose(added, 1) == guess(added, 1), "one token has no use for tensor cores"
    assert table.choose(Operation(896, 896, activation="silu"), 8) == LIBRARY, "no gate was measured"


@given(
    num_outputs=st.integers(1, 40_000),
    num_inputs=st.integers(1, 40_000),
    kind=st.sampled_from(["norm", "residual", "gate", "plain"]),
    num_tokens=st.integers(0, 300),
    card=st.sampled_from([H200, A100]),
)
def test_every_operation_has_a_kernel_that_holds_its_tokens(
    num_outputs, num_inputs, kind, num_tokens, card
):
    op = Operation(
        num_outputs,
        num_inputs,
        norm="plain" if kind in ("norm", "gate") else "",
        activation="silu" if kind == "gate" else "",
        residual=kind == "residual",
    )
    config = fit(op, table_of(card).choose(op, num_tokens), num_tokens, card, torch.bfloat16)
    if config.kernel in FUSED_GATES:
        assert (kind, card) == ("gate", H200)
        assert num_tokens > MAX_TOKENS
        return
    assert config.kernel == "library" or config.block_m >= num_tokens > 0
    assert config.kernel == "library" or config.split_k * config.block_k < 2 * num_inputs + 4096


@given(
    outputs=st.integers(1, 300).map(lambda n: 32 * n), inputs=st.integers(1, 300).map(lambda n: 32 * n)
)
def test_shrunken_tiles_divide_the_shape_and_stay_large(outputs, inputs):
    small = shrink(Operation(outputs, inputs), replace(TILE, block_n=128, block_k=256))
    if small is None:
        assert outputs % 64 or inputs % 64
    else:
        assert outputs % small.block_n == inputs % (small.block_k * small.split_k) == 0
        assert small.block_n >= 64
        assert small.block_k >= 64


def test_what_already_divides_is_left_alone():
    assert shrink(Operation(4096, 4096), TILE) == TILE
    vector = KernelConfig("vector", 4, 4096)
    assert shrink(Operation(4096, 4096), vector) == vector
    assert shrink(Operation(4096, 2048), vector) is None


@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("num_inputs", [4096, 896, 1000, 14336])
def test_guesses_are_for_one_token(activation, num_inputs):
    op = Operation(1024, num_inputs, activation=activation)
    config = guess(op, 1)
    assert (config.kernel, config.block_m) == ("vector", 1)
    assert 256 <= config.block_k <= 4096
    assert guess(op, 2) == LIBRARY, "several accumulators lose to the library"


# --- what is tried ---------------------------------------------------------------------------------


def test_slots_are_those_of_the_model():
    model = replace(TINY_MODEL, qkv_bias=True, norm_style="one_plus", activation="gelu_tanh")
    slots = {slot.name: slot for slot in slots_of_layer(model)}
    assert slots["qkv"].op == Operation(128, 64, norm="one_plus", bias=True)
    assert slots["out"].op == Operation(64, 64, residual=True)
    assert slots["gate_up"].op == Operation(128, 64, norm="one_plus", activation="gelu_tanh")
    assert slots["down"].op == Operation(64, 128, residual=True)
    (head,) = slots_of_head(model)
    assert head.op == Operation(64, 64, norm="one_plus")


@given(
    num_outputs=st.integers(1, 300).map(lambda n: 16 * n),
    num_inputs=st.integers(1, 300).map(lambda n: 16 * n),
    kind=st.sampled_from(["norm", "gate", "residual"]),
    num_tokens=st.integers(1, MAX_TOKENS),
)
def test_candidates_hold_the_tokens_and_include_what_is_known(
    num_outputs, num_inputs, kind, num_tokens
):
    op = Operation(
        num_outputs,
        num_inputs,
        norm="" if kind == "residual" else "plain",
        activation="silu" if kind == "gate" else "",
        residual=kind == "residual",
    )
    known = table_of(H200).choose(op, num_tokens)
    found = candidates(op, num_tokens, known)
    assert found[0] == replace(known, overlap="early")
    assert LIBRARY in found
    assert len(found) == len(set(found)) >= 2
    assert all(config.kernel == "library" or config.block_m >= num_tokens for config in found)
    assert all(config.overlap == "early" for config in found)


def test_only_gates_have_candidates_for_many_tokens():
    op = Operation(1024, 512, norm="plain")
    assert candidates(op, 128, LIBRARY) == [LIBRARY]
    found = candidates(replace(op, activation="silu"), 128, FUSED)
    assert [config.kernel for config in found] == ["fused", "library", "whole", "shared"]


def test_the_library_overlaps_in_two_ways_and_kernels_in_three():
    assert [c.overlap for c in overlaps(TILE)] == ["", "late"]
    assert [c.overlap for c in overlaps(replace(TILE, overlap="late"))] == ["", "early"]
    assert [c.overlap for c in overlaps(LIBRARY)] == [""]


# --- the search ------------------------------------------------------------------------------------

OPTIONS = [replace(TILE, num_stages=n) for n in range(1, 5)]


class Costs:
    """µs that do not depend on neighbours, so that the best chain is the best of each slot."""

    def __init__(self, seed):
        rng = random.Random(seed)
        ways = ("", "early", "late")
        configs = [replace(c, overlap=way) for c in [*OPTIONS, LIBRARY] for way in ways]
        self.of = {slot: {c: rng.uniform(50, 100) for c in configs} for slot in "ab"}
        self.prepared = set()
        self.measured = []

    def prepare(self, jobs):
        self.prepared |= set(jobs)

    def measure(self, configs):
        assert self.prepared >= set(configs.items()), "it would be compiled alone"
        self.measured.append(configs)
        return sum(self.of[slot][config] for slot, config in configs.items())


def run_search(costs, *, most=math.inf):
    chosen, tried = dict.fromkeys("ab", OPTIONS[0]), {slot: [*OPTIONS, LIBRARY] for slot in "ab"}
    return search(chosen, tried, costs.measure, costs.prepare, lambda: len(costs.measured) >= most)


@given(st.integers(0, 10**6))
def test_each_slot_gets_the_best_of_its_best_kernels(seed):
    costs = Costs(seed)
    found = run_search(costs)
    assert found.micros == pytest.approx(costs.measure(found.configs))
    starts = sorted({sum(costs.of[s][c] for s, c in m.items()): m for m in costs.measured[:4]}.items())
    assume(starts[0][0] < starts[1][0] * (1 - MIN_GAIN))
    way = starts[0][1]["a"].overlap
    for slot, config in found.configs.items():
        of_library = "early" if way == "late" else way
        with_way = [*(replace(c, overlap=way) for c in OPTIONS), replace(LIBRARY, overlap=of_library)]
        finalists = sorted(with_way, key=costs.of[slot].__getitem__)[:3]
        variants = [variant for c in finalists for variant in (c, *overlaps(c))]
        # Each gain below the threshold may be passed over.
        assert costs.of[slot][config] <= min(costs.of[slot][v] for v in variants) + 8 * MIN_GAIN * 200


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_a_search_without_time_returns_the_best_so_far(seed, most):
    costs = Costs(seed)
    found = run_search(costs, most=most)
    assert len(costs.measured) <= max(most, 4)
    best = min(sum(costs.of[s][c] for s, c in configs.items()) for configs in costs.measured)
    assert found.micros <= best * (1 + MIN_GAIN) ** len(costs.measured)


def test_less_than_noise_is_no_gain():
    costs = Costs(0)
    for slot in "ab":
        costs.of[slot] = {c: 100 - 0.1 * (c != OPTIONS[0]) for c in costs.of[slot]}
    assert run_search(costs).configs == dict.fromkeys("ab", OPTIONS[0])


def test_what_cannot_run_is_never_chosen():
    costs = Costs(0)
    for slot in "ab":
        for config in costs.of[slot]:
            if config.kernel == "tile":
                costs.of[slot][config] = math.inf
    found = run_search(costs)
    assert math.isinf(found.micros), "one slot at a time cannot mend two"
    costs.of["b"] |= {replace(OPTIONS[0], overlap=way): 5.0 for way in ("", "early", "late")}
    found = run_search(costs)
    assert found.configs["a"].kernel == "library"
    assert found.micros < 200


class FakeChain:
    """A chain that takes as long as `Costs` say, on a card without overlap."""

    def __init__(self, costs, *, can_repeat=True):
        op = Operation(4096, 4096, residual=True)
        (qkv, *_) = slots_of_layer(TINY_MODEL)
        self.slots = {slot: qkv._replace(name=slot, op=op) for slot in "ab"}
        self.costs, self.can_repeat, self.compiled = costs, can_repeat, set()

    def fit(self, slot, config, num_tokens):
        return replace(config, overlap="")

    def compile(self, jobs, num_tokens):
        self.compiled |= set(jobs)

    def measure(self, configs, num_tokens):
        assert all(config.overlap == "" for config in configs.values())
        return sum(self.costs(config) for config in configs.values())

    def repeats(self, configs, num_tokens):
        return self.can_repeat


def stages_cost(config):
    return 50.0 if config.kernel == "library" else 40.0 if config.num_warps == 8 else 60.0


def test_a_chain_is_tuned_and_what_is_faster_is_kept():
    chain = FakeChain(stages_cost)
    report = tune_chain(chain, 16, Budget(60), Table([Entry("residual", 4096, 4096, 16, TILE)]))
    assert (report.library, report.before, report.after) == (100, 120, 80)
    assert {entry[:4] for entry in report.entries} == {("residual", 4096, 4096, 16)}
    assert all(entry.config.num_warps == 8 and entry.config.overlap == "" for entry in report.entries)
    assert {config.kernel for _, config in chain.compiled} == {"tile", "library"}


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        (FakeChain(stages_cost, can_repeat=False), "results differ between runs"),
        (FakeChain(lambda config: 50.0), "nothing is faster"),
    ],
)
def test_nothing_is_kept_that_races_or_gains_nothing(chain, why):
    report = tune_chain(chain, 16, Budget(60), Table([]))
    assert report.entries == [], why


def test_time_to_compile_is_not_counted():
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])

    def take(seconds):
        now[0] += seconds

    budget.run_paused(lambda: take(1000))
    assert not budget.is_over()
    take(9)
    assert not budget.is_over()
    take(1)
    assert budget.is_over()


def test_memory_decides_how_long_a_chain_is(monkeypatch):
    slots = slots_of_layer(TINY_MODEL)
    matrices = (128 * 64, 64 * 64, 256 * 64, 64 * 128)
    layer, checked = 2 * sum(matrices), 8 * max(matrices)
    for num_layers in (0, 1, 7):
        free = int((num_layers * layer + checked) / 0.7) + 8
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        if num_layers:
            assert layers_that_fit(slots, torch.bfloat16, torch.device("cuda")) == num_layers
        else:
            with pytest.raises(CapacityError, match="one layer needs"):
                layers_that_fit(slots, torch.bfloat16, torch.device("cuda"))


# --- the command -----------------------------------------------------------------------------------


def run_tune(*arguments):
    return main(["--plugins", "quant.dense", "tune", "demo", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys, cache):
    assert run_tune() == 2
    assert "torch finds none here" in capsys.readouterr().err
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "1,two,1025"], "--tokens 1,two,1025: 'two', '1025' not between 1 and 1024"),
        (["--tokens", "0"], "'0' not between"),
        (["--tokens", ""], "'' not between"),
        (["--seconds", "0"], "--seconds 0 must be above 0"),
        (["--seconds", "nan"], "--seconds nan must be above 0"),
    ],
)
def test_tuning_says_what_is_wrong_with_its_options(arguments, told, capsys):
    assert run_tune(*arguments) == 2
    assert told in capsys.readouterr().err


def test_tuning_refuses_a_dtype_that_is_not_served(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_tune("--dtype", "float32") == 2
    assert "dtype 'float32' is none of bfloat16, float16; see --dtype" in capsys.readouterr().err


def test_what_was_found_is_shown(capsys, tmp_path):
    report = Report(slots_of_layer(TINY_MODEL), 8)
    report.library, report.before, report.after = 4031.4, 3800.0, 3681.0
    kept = Report(slots_of_head(TINY_MODEL), 64)
    report.configs = dict.fromkeys(("qkv", "out", "gate_up", "down"), TILE)
    show(make_console(), [report, kept], tmp_path / "card.json")
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["what", "tokens"]
    assert second.split() == ["layers", "8", "4031", "3800", "3681"]
    assert third.split()[:2] == ["lm_head", "64"]
    assert third.strip().endswith("nothing new")
    assert last == f"written to {tmp_path / 'card.json'}"
    assert [entry.kind for entry in report.entries] == ["norm", "residual", "gate", "residual"]


@pytest.mark.parametrize(
    ("num_tokens", "kernel"),
    [
        (65, "library"), (128, "whole"), (129, "library"), (192, "library"), (256, "shared"), (384, "library"),
        (448, "shared"), (512, "library"), (640, "shared"), (1024, "whole"), (1025, "fused"),
    ],
)  # fmt: skip
def test_gates_of_many_tokens_take_what_was_fastest(cache, num_tokens, kernel):
    op = Operation(14336, 4096, norm="plain", activation="silu")
    assert table_of(H200).choose(op, num_tokens).kernel == kernel


@pytest.mark.parametrize("num_tokens", [128, 256, 448, 480, 576, 640, 768, 896, 1024, 2048, 8192])
def test_gates_without_entries_are_fused_where_tiles_fill_the_card(num_tokens):
    assert gate.choose_schedule(num_tokens, 14336, 132)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 96, 144, 192, 288, 320])
def test_gates_without_entries_are_left_to_the_library_where_they_do_not(num_tokens):
    assert gate.choose_schedule(num_tokens, 14336, 132) is None


@given(
    num_tokens=st.integers(1, 10_000),
    num_outputs=st.integers(1, 40_000),
    num_sms=st.sampled_from([1, 7, 78, 132]),
)
def test_a_schedule_has_a_program_for_each_range_and_no_more_than_fit(num_tokens, num_outputs, num_sms):
    num_blocks = -(-num_tokens // (gate.NUM_GROUPS.value * gate.ROWS.value))
    for is_shared in (False, True):
        schedule = gate.make_schedule(num_tokens, num_outputs, num_sms, is_shared=is_shared)
        assert 1 <= schedule.num_programs <= num_sms
        assert schedule.is_shared == (is_shared and num_blocks <= num_sms)
        assert not schedule.is_shared or schedule.num_programs % num_blocks == 0


def test_the_gates_for_hopper_fit_on_a_multiprocessor():
    cpu = torch.device("cpu")
    layer = SimpleNamespace(weight=torch.empty(28672, 4096, dtype=torch.bfloat16, device=cpu))
    with compiling_for(H200.capability) as compiled:
        gate.Gate(layer, "silu", workspace_on(cpu), 132, overlap=True)
    assert [kernel.metadata.name for kernel in compiled] == ["gate_hopper"] * 2  # whole and shared
    assert most_shared_bytes(compiled) <= 227 << 10


@pytest.mark.parametrize(
    ("card", "shared_bytes"),
    [
        (A100, 163 << 10),
        (Card("NVIDIA GeForce RTX 3090", (8, 6)), 99 << 10),
        (Card("NVIDIA GeForce RTX 4090", (8, 9)), 99 << 10),
        (H100, 227 << 10),
        (Card("NVIDIA B200", (10, 0)), 227 << 10),
        (Card("NVIDIA GeForce RTX 5090", (12, 0)), 99 << 10),
    ],
    ids=str,
)
def test_kernels_for_other_cards_fit(card, shared_bytes, monkeypatch):
    monkeypatch.setattr(linear, "card_of", lambda _: card)
    norm = torch.ones(512, dtype=torch.bfloat16)
    with compiling_for(card.capability) as compiled:
        for num_outputs in (768, 2048):
            shards = (("up", num_outputs),)
            spec = LinearSpec("up", 512, shards, False, torch.bfloat16, torch.device("cpu"), "up")
            layer = DenseLinear(spec, "plain", "silu")
            for num_tokens in (1, 2, 4, 8, 64):
                x = torch.zeros(num_tokens, 512, dtype=torch.bfloat16)
                layer.forward_norm(x, norm, 1e-5)
                layer.forward_gate(x, norm, 1e-5)
                layer.forward_residual(x, torch.zeros(num_tokens, num_outputs, dtype=torch.bfloat16))
    assert {"vector_kernel", "norm_kernel"} <= names_of(compiled)
    assert most_shared_bytes(compiled) <= shared_bytes
