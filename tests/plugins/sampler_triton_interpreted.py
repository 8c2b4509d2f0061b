"""What needs Triton's interpreter, and so a process that was started for it: see test_sampler_triton.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from core.counter_rng import exponentials
from core.interfaces import Sampler, SupportsSamplerCapture, missing_members
from core.request import SamplingParams
from core.sampling import SampleRows, Stage, TorchSampler
from core.step import BAD_LOGITS
from core.testing.sampler import SamplerConformance
from core.testing.sampling_cases import SamplerCase
from plugins.sampler import triton as plugin
from plugins.sampler.triton.sampler import GATHERED_ROWS, Cut, TritonSampler, Tuning

triton_interpreter.patch()

CPU = torch.device("cpu")
(ENTRY,) = plugin.core_register_samplers()
FEW = settings(max_examples=25, phases=[Phase.generate], deadline=None, database=None)
SMALL = Tuning(Cut(16, 1, 8), Cut(32, 1, 8))
"""Several tiles and parts even of a few hundred tokens."""


class TestTritonSampler(SamplerConformance):
    entry = replace(ENTRY, unsupported=lambda _: [])
    num_draws = 480
    settings = settings(SamplerConformance.settings, max_examples=12, database=None)


def make(cls, params, vocab_size, tuning=SMALL):
    """Make a sampler whose rows want what is given, with a seed each."""
    sampler = TritonSampler(tuning=tuning) if cls is TritonSampler else cls()
    sampler.allocate(len(params), vocab_size, 4096, CPU)
    for row, wanted in enumerate(params):
        case = SamplerCase(SamplingParams(**wanted), [[0.0]], prompt=[0, 0], seed=7919 * row + 5)
        sampler.add(case.entry(row))
    return sampler


def rows_at(positions, rows=None):
    rows = list(range(len(positions))) if rows is None else rows
    return SampleRows(torch.tensor(rows), torch.tensor(positions), rows)


def random_logits(num_rows, vocab_size, dtype=torch.float32, scale=3.0):
    return (torch.randn(num_rows, vocab_size) * scale).to(dtype)


def race_values(sampler, logits, rows):
    """[N, V] float64: logarithms of what the tokens run."""
    params = sampler.state.params(rows.rows)
    wide = logits.double()
    shifted = (wide - wide.max(1, keepdim=True).values) / params.temperature.double()
    noise = exponentials(params.seed.squeeze(1), rows.positions, sampler.state.token_ids)
    return shifted - noise.double().log()


# --- equal to the sampler of the core ----------------------------------------------------------------

TEMPERATURES = st.sampled_from([0.0, 1.0, 0.05, 1e-30, 100.0]) | st.floats(0.1, 3.0)


@settings(FEW)
@given(
    temperatures=st.lists(TEMPERATURES, min_size=1, max_size=5),
    vocab_size=st.sampled_from([1, 7, 16, 33, 250, 515]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=st.sampled_from([0.0, 0.1, 3.0, 20.0, 400.0]),
    seed=st.integers(0, 2**31),
)
def test_draws_what_the_sampler_of_the_core_draws(temperatures, vocab_size, dtype, scale, seed):
    torch.manual_seed(seed)
    params = [{"temperature": temperature} for temperature in temperatures]
    ours, reference = (make(cls, params, vocab_size) for cls in (TritonSampler, TorchSampler))
    logits = random_logits(len(params), vocab_size, dtype, scale)
    rows = rows_at(torch.randint(2, 4000, (len(params),)).tolist())
    drawn, expected = (sampler.sample(logits, rows).tokens for sampler in (ours, reference))
    values = race_values(reference, logits.float(), rows)
    for row, (token, other) in enumerate(zip(drawn.tolist(), expected.tolist(), strict=True)):
        if token != other:
            assert temperatures[row] > 0.0, f"{token}, not {other}, at temperature 0"
            gap = abs(float(values[row, token] - values[row, other]))
            assert gap < 1e-5, f"{token}, not {other}, at temperature {temperatures[row]}: {gap}"


def test_the_race_is_run_with_the_same_noise():
    # Equal weights: the winner is whoever has the least noise, and a wrong bit of a hash changes it.
    num_rows, vocab_size = 40, 700
    ours = make(TritonSampler, [{}] * num_rows, vocab_size)
    rows = rows_at([row * 1_000_003 for row in range(num_rows)])
    seeds = ours.state.params(rows.rows).seed.squeeze(1)
    noise = exponentials(seeds, rows.positions, ours.state.token_ids)
    drawn = ours.sample(torch.zeros(num_rows, vocab_size), rows).tokens
    assert drawn.tolist() == noise.argmin(1).tolist()


def test_unlikely_tokens_are_drawn_as_often_as_they_should():
    # What the shortcut must not cut off: the likeliest token has only a small part of the probability.
    vocab_size, num_draws = 200, 100
    tuning = Tuning(Cut(256, 1, 1), Cut(64, 1, 1))
    ours, reference = (make(cls, [{}], vocab_size, tuning) for cls in (TritonSampler, TorchSampler))
    logits = torch.linspace(0.0, -3.0, vocab_size)[torch.randperm(vocab_size)].expand(num_draws, -1)
    rows = rows_at(list(range(num_draws)), [0] * num_draws)
    drawn, expected = (sampler.sample(logits, rows).tokens for sampler in (ours, reference))
    assert len(drawn.unique()) > 40
    assert torch.equal(drawn, expected)


def test_equal_logits_go_to_the_lowest_id():
    vocab_size = 300
    logits = torch.full((4, vocab_size), -1.0)
    logits[0, [40, 70, 299]] = 2.0
    logits[1, [290, 299]] = 2.0
    logits[2] = 0.0
    logits[3, 100], logits[3, 200] = -0.0, 0.0
    greedy = make(TritonSampler, [{"temperature": 0.0}] * 4, vocab_size)
    assert greedy.sample(logits, rows_at([5] * 4)).tokens.tolist() == [40, 290, 0, 100]


def test_equal_logits_are_drawn_by_chance_even_at_the_lowest_temperature():
    vocab_size, num_draws = 100, 90
    sampler = make(TritonSampler, [{"temperature": 1e-30}], vocab_size)
    logits = torch.full((num_draws, vocab_size), -1.0)
    logits[:, [3, 40, 90]] = 2.0
    drawn = sampler.sample(logits, rows_at(list(range(num_draws)), [0] * num_draws)).tokens
    counts = drawn.bincount(minlength=vocab_size)
    assert counts[[3, 40, 90]].sum() == num_draws
    assert counts[[3, 40, 90]].min() > 15


# --- what there is no distribution for ---------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 15, 16, 100, 298, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_logits_anywhere_are_reported(where, dtype):
    params = [{"temperature": 0.0}, {}, {"temperature": 0.0}, {}, {"temperature": 0.0}, {}]
    ours, reference = (make(cls, params, 300) for cls in (TritonSampler, TorchSampler))
    logits = random_logits(6, 300, dtype)
    logits[:2, where], logits[2:4, where] = math.nan, math.inf
    logits[4:, where] = -math.inf
    logits[5, : where + 1] = -math.inf
    drawn, expected = (s.sample(logits, rows_at([9] * 6)).tokens.tolist() for s in (ours, reference))
    assert drawn == expected
    assert drawn[:4] == [BAD_LOGITS] * 4


def test_nothing_but_minus_infinity_is_bad():
    ours = make(TritonSampler, [{"temperature": 0.0}, {}], 300)
    nothing = torch.full((2, 300), -math.inf)
    assert ours.sample(nothing, rows_at([9, 9])).tokens.tolist() == [BAD_LOGITS] * 2
    nothing[:, 299] = -1e30
    assert ours.sample(nothing, rows_at([9, 9])).tokens.tolist() == [299] * 2


# --- layouts and sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_be_any_distance_apart(dtype):
    params = [{"temperature": 0.0}, {}, {"temperature": 0.5}]
    ours = make(TritonSampler, params, 130)
    logits = random_logits(3, 130, dtype)
    expected = ours.sample(logits, rows_at([9] * 3)).tokens
    wide = torch.full((7, 139), math.nan, dtype=dtype)
    parts = wide[::2, 3:133][:3], wide.new_full((130, 3), 0.0).t(), wide.new_empty(1, 130)
    parts[0].copy_(logits)
    parts[1].copy_(logits)
    for part in parts[:2]:
        assert torch.equal(ours.sample(part, rows_at([9] * 3)).tokens, expected)
    same = logits[:1].expand(3, -1)
    alone = [ours.sample(logits[:1], rows_at([9], [row])).tokens.item() for row in range(3)]
    assert ours.sample(same, rows_at([9] * 3)).tokens.tolist() == alone


@pytest.mark.parametrize("num_programs", [1, 3, 8, 1000])
def test_the_cut_decides_nothing(num_programs):
    params = [{"temperature": 0.0}, {}, {"temperature": 0.3}, {"temperature": 2.0}]
    logits = random_logits(4, 401, torch.bfloat16)
    expected = make(TritonSampler, params, 401, Tuning(Cut(512, 1, 1), Cut(512, 1, 1)))
    tuning = Tuning(Cut(16, 1, num_programs), Cut(64, 1, num_programs))
    ours = make(TritonSampler, params, 401, tuning)
    for position in (5, 6, 7):  # the counters are in order again
        rows = rows_at([position] * 4)
        drawn = ours.sample(logits, rows).tokens
        assert torch.equal(drawn, expected.sample(logits, rows).tokens)
        assert not ours._workspace.arrivals.any()


@given(
    num_rows=st.integers(1, 5000),
    vocab_size=st.integers(1, 300_000),
    block=st.sampled_from([16, 1024, 4096]),
    num_programs=st.integers(1, 3000),
)
def test_parts_cover_the_vocabulary_and_fit_the_workspace(num_rows, vocab_size, block, num_programs):
    cut = Cut(block, 4, num_programs)
    num_parts, part_tiles = cut.divide(num_rows, vocab_size)
    assert num_parts * part_tiles * block >= vocab_size > (num_parts - 1) * part_tiles * block
    assert num_parts <= cut.max_parts(vocab_size)
    assert num_rows * num_parts <= max(num_rows, num_programs)


def test_more_draws_than_rows_are_launched_in_pieces():
    params = [{}, {"temperature": 0.0}]
    ours, reference = (make(cls, params, 50) for cls in (TritonSampler, TorchSampler))
    logits = random_logits(7, 50)
    rows = rows_at([2, 2, 3, 3, 4, 4, 5], [0, 1, 0, 1, 0, 1, 0])
    assert torch.equal(ours.sample(logits, rows).tokens, reference.sample(logits, rows).tokens)


def test_no_rows_draw_nothing():
    ours = make(TritonSampler, [{}], 50)
    assert ours.sample(torch.zeros(0, 50), rows_at([])).tokens.shape == (0,)


# --- rows that want more -----------------------------------------------------------------------------

MIXED = [
    {"temperature": 0.0},
    {},
    {"top_k": 5},
    {"temperature": 0.7, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"min_p": 0.1},
    {"top_p": 0.5},
    {"temperature": 0.0, "logprobs": 0},
    {"frequency_penalty": 0.5, "banned_token_ids": [3]},
]
CAPTURED = [0, 1, 2, 5, 6]
"""Those whose parameters never move."""


def test_a_row_draws_the_same_whatever_shares_its_step():
    vocab_size = 90
    ours, alone = make(TritonSampler, MIXED, vocab_size), make(TritonSampler, MIXED, vocab_size)
    for position in range(2, 6):
        logits = random_logits(len(MIXED), vocab_size, torch.bfloat16)
        order = torch.randperm(len(MIXED)).tolist()
        drawn = ours.sample(logits[order], rows_at([position] * len(MIXED), order)).tokens.tolist()
        for row, token in zip(order, drawn, strict=True):
            single = alone.sample(logits[row : row + 1], rows_at([position], [row])).tokens
            assert token == single.item(), f"{MIXED[row]}"


def test_mixed_steps_draw_and_report_as_the_sampler_of_the_core():
    vocab_size = 90
    ours, reference = (make(cls, MIXED, vocab_size) for cls in (TritonSampler, TorchSampler))
    for position in range(2, 8):  # penalties count what was drawn
        logits = random_logits(len(MIXED), vocab_size)
        rows = rows_at([position] * len(MIXED))
        drawn, expected = ours.sample(logits, rows), reference.sample(logits, rows)
        assert torch.equal(drawn.tokens, expected.tokens)
        for told, wanted in zip(drawn.logprobs, expected.logprobs, strict=True):
            assert torch.equal(told, wanted)


def test_only_rows_that_need_torch_take_that_way(monkeypatch):
    seen = []

    def note(self, raw, rows, stages, num_top):
        seen.append((list(rows.row_list), stages))
        return draw(self, raw, rows, stages, num_top)

    draw = TorchSampler._sample_part
    monkeypatch.setattr(TorchSampler, "_sample_part", note)
    ours = make(TritonSampler, MIXED, 90)
    ours.sample(random_logits(len(MIXED), 90), rows_at([2] * len(MIXED)))
    ((row_list, stages),) = seen
    assert row_list == [2, 4, 5, 6, 8]
    assert not stages & Stage.LOGPROBS
    assert ours.sample(random_logits(2, 90), rows_at([3] * 2, [0, 3])).logprobs is not None
    assert len(seen) == 1


def test_many_rows_for_torch_are_copied_in_pieces():
    params = [{"top_k": 5, "temperature": 100.0}] * (GATHERED_ROWS + 16) + [{}]
    ours, reference = (make(cls, params, 20) for cls in (TritonSampler, TorchSampler))
    logits, rows = random_logits(len(params), 20), rows_at([4] * len(params))
    assert torch.equal(ours.sample(logits, rows).tokens, reference.sample(logits, rows).tokens)


# --- captured steps ----------------------------------------------------------------------------------


def test_greedy_and_random_steps_have_one_key():
    ours = make(TritonSampler, MIXED, 90)
    keys = ours.capture_keys()
    assert [ours.capture_key(rows) for rows in ([0], [1], [0, 1], [])] == keys * 4
    assert ours.capture_key([0, 2]) == Stage.RANDOM | Stage.TOP_K
    assert [ours.capture_key([row]) for row in (3, 4, 7, 8)] == [None] * 4
    assert not missing_members(ours, Sampler)
    assert not missing_members(ours, SupportsSamplerCapture)


@pytest.mark.parametrize("row_list", [[0], [1], [0, 1], CAPTURED, [2, 0], [5, 6]])
def test_captured_steps_draw_the_same(row_list):
    ours = make(TritonSampler, MIXED, 90)
    logits = random_logits(len(row_list) + 1, 90)
    rows = rows_at([7] * len(row_list), row_list)
    expected = ours.sample(logits[:-1], rows).tokens
    # The last row is padding.
    padded = SampleRows(torch.tensor([*row_list, 4]), torch.tensor([7] * len(row_list) + [0]), ())
    drawn = ours.sample_captured(logits, padded, ours.capture_key(row_list))
    assert torch.equal(drawn[:-1], expected)


def test_captured_rows_keep_to_their_own_way(monkeypatch):
    ours = make(TritonSampler, MIXED, 90)
    monkeypatch.setattr(
        TorchSampler, "sample_captured", lambda _, logits, *__: torch.full((len(logits),), -9)
    )
    rows = SampleRows(torch.tensor(CAPTURED), torch.tensor([7] * len(CAPTURED)), ())
    drawn = ours.sample_captured(random_logits(len(CAPTURED), 90), rows, ours.capture_key(CAPTURED))
    assert [token == -9 for token in drawn.tolist()] == [False, False, True, True, True]


def test_strange_keys_are_refused():
    ours = make(TritonSampler, [{}], 9)
    with pytest.raises(TypeError, match="'greedy' is no Stage"):
        ours.sample_captured(torch.zeros(1, 9), rows_at([2]), "greedy")


# --- state ---------------------------------------------------------------------------------------------


def test_memory_covers_the_workspace():
    ours, reference = make(TritonSampler, [{}] * 9, 90), TorchSampler()
    workspace = ours._workspace
    tensors = workspace.values, workspace.ids, workspace.bests, workspace.arrivals
    room = ours.memory_bytes(9, 90, CPU) - reference.memory_bytes(9, 90, CPU)
    assert sum(tensor.nbytes for tensor in tensors) + 9 * 90 * 4 <= room


def test_a_row_that_someone_else_takes_changes_its_way():
    ours, reference = (make(cls, [{"top_k": 2}], 40) for cls in (TritonSampler, TorchSampler))
    for wanted in ({"temperature": 0.0}, {"top_k": 3}, {}):
        case = SamplerCase(SamplingParams(**wanted), [[0.0]], prompt=[0, 0], seed=77)
        logits = random_logits(1, 40)
        drawn = []
        for sampler in (ours, reference):
            sampler.add(case.entry(0))
            drawn.append(sampler.sample(logits, rows_at([2])).tokens.item())
            padded = SampleRows(torch.tensor([0]), torch.tensor([2]), ())
            drawn.append(sampler.sample_captured(logits, padded, sampler.capture_key([0])).item())
        assert len(set(drawn)) == 1
