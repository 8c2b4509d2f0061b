"""Steps as the device sees them: what a plan says, gathered from persistent rows, with padding."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from itertools import pairwise

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from core.batch import BatchState, StepInputs, StepShape
from core.graphs import (
    NUM_BEFORE_READY,
    StepGraphs,
    can_hold,
    compiling_once,
    decode_shapes,
    in_order_of_need,
    prompt_shapes,
    telling_shapes,
)
from core.llm import LLM
from core.request import SamplingParams
from core.step import BlockAppend, RowEntry, StepPlan
from core.testing.checkpoints import make_checkpoint

BLOCK = 4
MAX_LEN = 24
NUM_ROWS = 6
CPU = torch.device("cpu")


@st.composite
def steps(draw, *, decode_only=False):
    """Rows with tokens and blocks, and a step over some of them."""
    rows = draw(st.permutations(range(NUM_ROWS)))[: draw(st.integers(1, NUM_ROWS))]
    known = [draw(st.integers(1, MAX_LEN)) for _ in rows]
    plan = StepPlan(0)
    ids = iter(draw(st.permutations(range(1, 1 + NUM_ROWS * MAX_LEN // BLOCK))))
    counts = []
    for row, length in zip(rows, known, strict=True):
        tokens = [draw(st.integers(0, 99)) for _ in range(length)]
        plan.added.append(RowEntry(row, f"r{row}", tokens, length, SamplingParams(), 0, []))
        plan.appended.append(BlockAppend(row, 0, [next(ids) for _ in range(-(-length // BLOCK))]))
        counts.append(1 if decode_only else draw(st.integers(1, length)))
    order = sorted(range(len(rows)), key=lambda index: counts[index] > 1)
    plan.rows = [rows[i] for i in order]
    plan.counts = [counts[i] for i in order]
    plan.starts = [known[i] - counts[i] for i in order]
    plan.samples = [counts[i] == 1 or draw(st.booleans()) for i in order]
    plan.num_decodes = sum(count == 1 for count in plan.counts)
    return plan


def gather(plan, shape, *, is_captured):
    state = BatchState(NUM_ROWS, MAX_LEN, BLOCK, CPU)
    state.update(plan)
    inputs = StepInputs(shape, CPU)
    inputs.upload(state.describe(plan, shape))
    return state, inputs, state.make_batch(inputs, None if is_captured else plan)


def exact_shape(plan):
    return StepShape(plan.num_tokens, len(plan.rows), sum(plan.samples))


@given(steps())
def test_a_step_is_what_its_plan_says(plan):
    _, inputs, batch = gather(plan, exact_shape(plan), is_captured=False)
    entries = {entry.row: entry for entry in plan.added}
    tables = {append.row: append.block_ids for append in plan.appended}
    tokens, positions, slots = [], [], []
    for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
        tokens += entries[row].token_ids[start : start + count]
        positions += range(start, start + count)
        slots += [tables[row][p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + count)]
    assert batch.token_ids.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.rows.tolist() == plan.rows
    ends = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
    assert batch.seq_lens.tolist() == ends
    starts = [sum(plan.counts[:i]) for i in range(len(plan.rows) + 1)]
    assert batch.query_starts.tolist() == starts
    assert batch.query_starts.dtype == batch.seq_lens.dtype == batch.block_tables.dtype == torch.int32
    for row, table in zip(plan.rows, batch.block_tables.tolist(), strict=True):
        assert table[: len(tables[row])] == tables[row]
        assert not any(table[len(tables[row]) :])
    drawing = [i for i, samples in enumerate(plan.samples) if samples]
    draws = inputs.draws
    last = range(len(drawing)) if draws.tokens is None else draws.tokens.tolist()
    assert list(last) == [starts[i + 1] - 1 for i in drawing]
    assert draws.rows.tolist() == [plan.rows[i] for i in drawing]
    assert draws.positions.tolist() == [ends[i] for i in drawing]


@given(st.data())
def test_rows_keep_what_they_are_given_until_others_enter_them(data):
    state = BatchState(NUM_ROWS, MAX_LEN, BLOCK, CPU)
    tokens, tables = {}, {}
    for _ in range(data.draw(st.integers(1, 6))):
        plan = StepPlan(step=0)
        for row in data.draw(st.sets(st.integers(0, NUM_ROWS - 1))):
            ids = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=MAX_LEN))
            plan.added.append(RowEntry(row, "r", ids, len(ids), SamplingParams(), 0, []))
            tokens[row], tables[row] = ids, []
        for row in data.draw(st.sets(st.sampled_from(sorted(tables)))) if tables else ():
            room = MAX_LEN // BLOCK - len(tables[row])
            new = data.draw(st.lists(st.integers(1, 99), max_size=room))
            plan.appended.append(BlockAppend(row, len(tables[row]), new))
            tables[row] = tables[row] + new
        state.update(plan)
        for row, blocks in tables.items():
            assert state.tokens[row].tolist()[: len(tokens[row])] == tokens[row]
            table = state.block_tables[row].tolist()
            assert table == blocks + [0] * (len(table) - len(blocks))


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 9))
def test_all_fields_begin_where_wide_loads_may(num_tokens, num_rows, num_draws):
    """Kernels are compiled for the alignment of their arguments: another one would compile them anew."""
    shape = StepShape(num_tokens, num_rows, num_draws)
    inputs = StepInputs(shape, CPU)
    start = inputs.fields.positions.data_ptr()
    places = []
    for field in inputs.fields:
        begin = field.data_ptr() - start
        assert begin % 16 == 0 or len(field) == 0
        places.append((begin, begin + field.nbytes))
    places.sort()
    for (_, end), (begin, _) in pairwise(place for place in places if place[0] < place[1]):
        assert end <= begin
    assert places[-1][1] <= 8 * shape.num_words


@given(steps(decode_only=True), st.integers(0, 3))
def test_padding_changes_nothing_else_and_stays_in_the_null_block(plan, num_padding):
    count = len(plan.rows)
    size = count + num_padding
    _, _, exact = gather(plan, StepShape(count, count, count), is_captured=False)
    state, inputs, padded = gather(plan, StepShape(size, size, size), is_captured=True)
    assert padded.num_rows == padded.num_tokens == padded.num_decodes == size
    for name in ("token_ids", "positions", "slots", "rows", "seq_lens"):
        assert getattr(padded, name)[:count].equal(getattr(exact, name)), name
    width = exact.block_tables.shape[1]
    assert padded.block_tables[:count, :width].equal(exact.block_tables)
    assert not padded.slots[count:].any()
    assert not padded.seq_lens[count:].any()
    assert padded.query_starts.tolist() == list(range(size + 1))
    before = state.tokens.clone()
    draws = inputs.draws
    state.store(draws.rows, draws.positions, torch.full((size,), 7))
    changed = (state.tokens != before).any(dim=1)
    assert not changed[[row for row in range(NUM_ROWS) if row not in plan.rows]].any()


@given(steps(), st.integers(0, 5), st.integers(0, 3))
def test_mixed_steps_can_be_padded_too(plan, num_tokens, num_rows):
    exact = exact_shape(plan)
    if exact.is_decode:
        return
    shape = StepShape(exact.num_tokens + num_tokens, exact.num_rows + num_rows, NUM_ROWS + 3)
    _, _, alone = gather(plan, exact, is_captured=False)
    _, inputs, padded = gather(plan, shape, is_captured=True)
    assert padded.token_ids[: exact.num_tokens].equal(alone.token_ids)
    assert padded.slots[: exact.num_tokens].equal(alone.slots)
    assert not padded.slots[exact.num_tokens :].any()
    assert padded.query_starts[: exact.num_rows + 1].equal(alone.query_starts)
    assert set(padded.query_starts[exact.num_rows :].tolist()) == {exact.num_tokens}
    assert inputs.draws.rows[exact.num_draws :].eq(NUM_ROWS).all()


@given(st.integers(1, 3000))
def test_sizes_to_capture_ascend_to_the_limit_and_lose_little(limit):
    shapes = decode_shapes(limit)
    assert all(shape.is_decode for shape in shapes)
    sizes = [shape.num_rows for shape in shapes]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == min(limit, 1024)
    for small, large in pairwise(sizes):
        assert large - small <= max(8, small // 7)


@given(st.integers(1, 3000), st.integers(1, 9000))
def test_shapes_with_prompts_are_no_decodes_and_within_the_limits(max_rows, max_tokens):
    for shape in prompt_shapes(max_rows, max_tokens):
        assert not shape.is_decode
        assert shape.num_rows <= max_rows
        assert shape.num_tokens <= max_tokens


@given(st.integers(1, 3000), st.integers(1, 9000))
def test_the_first_shapes_cover_the_whole_range(max_rows, max_tokens):
    decodes, prompts = decode_shapes(max_rows), prompt_shapes(max_rows, max_tokens)
    order = in_order_of_need(decodes, prompts)
    assert sorted(order) == sorted([*decodes, *prompts])
    first = order[:NUM_BEFORE_READY]
    assert decodes[0] in first
    assert decodes[-1] in first


def test_a_step_fits_into_a_shape_of_its_kind_that_is_large_enough():
    assert can_hold(StepShape(8, 8, 8), StepShape(5, 5, 5))
    assert not can_hold(StepShape(8, 8, 8), StepShape(9, 9, 9))
    assert can_hold(StepShape(64, 8, 8), StepShape(60, 3, 2))
    assert not can_hold(StepShape(64, 8, 8), StepShape(60, 9, 2))
    assert not can_hold(StepShape(64, 8, 8), StepShape(5, 5, 5))  # decodes have their own
    assert not can_hold(StepShape(8, 8, 8), StepShape(6, 3, 3))


def test_shapes_that_need_every_kernel_are_few_and_prompts_come_last():
    shapes = in_order_of_need(decode_shapes(1024), prompt_shapes(1024, 8192))
    telling = telling_shapes(shapes)
    decodes = [shape.num_tokens for shape in telling if shape.is_decode]
    assert sorted(decodes) == [1, 2, 4, 8, 16, 32, 64, 128]
    prompts = telling[len(decodes) :]
    assert prompts == [StepShape(tokens, 8, 8) for tokens in (64, 128, 256, 512, 1024)]


SHAPES = in_order_of_need(decode_shapes(16), prompt_shapes(16, 256))


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Make graphs that can do all but capture."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def make(run):
        return StepGraphs(SHAPES, CPU, keys=[], run=run, score=lambda stream: stream, draw=None)

    return make


def test_compiling_runs_each_telling_shape_and_what_else_is_wanted(graphs_on_cpu):
    ran, others = [], []

    def run(inputs):
        ran.append(inputs.shape)
        return torch.zeros(1)

    graphs = graphs_on_cpu(run)
    graphs.compile(lambda: others.append(1))
    assert sorted(ran) == sorted(telling_shapes(SHAPES))
    assert others == [1]
    assert graphs.num_captured == 0

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):  # as if it had been run alone
        graphs.compile(fail)


def test_threads_that_want_the_same_kernel_have_it_compiled_once():
    compiled, meet = [], threading.Barrier(4)

    def want(key):
        meet.wait()
        mode = triton.runtime._async_compile.active_mode.get()
        return mode.submit(key, lambda: compiled.append(key), lambda _: None)

    with (
        ThreadPoolExecutor(2) as compilers,
        compiling_once(compilers),
        ThreadPoolExecutor(4) as wanting,
    ):
        runs = [wanting.submit(copy_context().run, want, key) for key in "abba"]
        kernels = [run.result() for run in runs]
    assert sorted(compiled) == ["a", "b"]
    assert kernels[0] is kernels[3]
    assert kernels[1] is kernels[2]


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_kernel_that_cannot_be_compiled_is_an_error_and_leaves_nothing_behind(
    graphs_on_cpu, is_awaited
):
    def fail():
        raise ValueError

    def run(_):
        mode = triton.runtime._async_compile.active_mode.get()
        kernel = mode.submit("key", fail, lambda _: None)
        if is_awaited:
            kernel.result()
        return torch.zeros(1)

    graphs = graphs_on_cpu(run)
    for _ in range(2):
        with pytest.raises(ValueError):
            graphs.compile()
    assert triton.runtime._async_compile.active_mode.get() is None


@given(st.integers(1, 64), st.integers(0, 80), st.integers(0, 64))
def test_draws_are_padded_to_a_size_that_has_a_graph(num_rows, more_tokens, num_draws):
    sizes = [shape.num_draws for shape in decode_shapes(64)]
    graphs = StepGraphs.__new__(StepGraphs)
    graphs._shapes = decode_shapes(64)
    shape = StepShape(num_rows + more_tokens, num_rows, min(num_draws, num_rows))
    padded = graphs.pad_draws(shape)
    assert padded[:2] == shape[:2]
    assert padded.is_decode == shape.is_decode
    if shape.num_draws and padded != shape:
        assert padded.num_draws == min(size for size in sizes if size >= shape.num_draws)
    if not shape.num_draws:
        assert padded == shape


def test_padding_the_rows_that_draw_changes_nothing(tmp_path):
    path = make_checkpoint("llama3", tmp_path)
    prompts = [[7, 3, 9, 11, 5], list(range(4, 44)), [100], [8, 9], list(range(30))]
    params = [
        SamplingParams(max_tokens=5 + i, temperature=0, ignore_eos=True, logprobs=1) for i in range(4)
    ]
    params.append(SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=1))
    settings = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 60, "max_model_len": 64}
    settings |= {"max_num_batched_tokens": 24, "max_num_seqs": 6}
    results, num_padded = [], 0

    class Counting(StepGraphs):
        def __init__(self):
            self._shapes, self._captured = [StepShape(size, size, size) for size in (4, 6)], []

        def pad_draws(self, shape):
            nonlocal num_padded
            padded = super().pad_draws(shape)
            num_padded += padded != shape
            return padded

    for graphs in (None, Counting()):
        with LLM(str(path), **settings) as llm:
            llm.engine.executor._graphs = graphs
            outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([(r.outputs[0].token_ids, r.outputs[0].logprobs) for r in outputs])
    assert num_padded >= 3
    tokens = [[ids for ids, _ in result] for result in results]
    assert tokens[0] == tokens[1]
    for (_, expected), (_, got) in zip(*results, strict=True):
        values = [[next(iter(x.values())).logprob for x in one or []] for one in (expected, got)]
        assert values[1] == pytest.approx(values[0], abs=1e-4)
