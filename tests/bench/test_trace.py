from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bench.trace import MAX_NAME, Span, add_up, busy_time, read_spans, short_name

spans = st.lists(
    st.builds(
        lambda name, begin, length: Span(name, float(begin), float(begin + length)),
        st.sampled_from("abc"),
        st.integers(0, 60),
        st.integers(0, 20),
    ),
    max_size=25,
)


@given(spans)
def test_times_add_up_to_the_time_in_which_something_ran(found):
    painted = {moment for span in found for moment in range(int(span.begin), int(span.end))}
    totals = add_up(found)
    assert busy_time(totals) == len(painted)
    assert sum(total.count for total in totals) == len(found)
    times = [total.microseconds for total in totals]
    assert times == sorted(times, reverse=True)


def test_a_kernel_that_waits_for_the_one_before_counts_from_its_end():
    totals = add_up([Span("second", 8.0, 15.0), Span("first", 0.0, 10.0)])
    assert [(total.name, total.microseconds) for total in totals] == [("first", 10), ("second", 5)]


def test_only_what_runs_on_the_gpu_is_read():
    events = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 5, "dur": 2.5},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": "9", "dur": "1"},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 5, "dur": 2},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 0, "dur": 99},
        {"ph": "i", "cat": "kernel", "name": "mark", "ts": 5},
        {"ph": "M", "name": "process_name"},
    ]
    trace = json.loads(json.dumps({"traceEvents": events}))
    assert read_spans(trace) == [Span("k", 5.0, 7.5), Span("Memcpy DtoH", 9.0, 10.0)]
    assert read_spans({}) == []


FILL = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, "
    "std::array<char*, 1> >(int, at::native::FillFunctor<int>)"
)
ARGMAX = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, "
    "at::native::ArgMaxOps<float>, unsigned int, long, 4> >(at::native::ReduceOp<float>)"
)


CAT = (
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::"
    "OpaqueType<8u>, unsigned int, 1, 64, 64>(at::native::(anonymous namespace)::OpaqueType<8u>*)"
)
NAMELESS = "(anonymous namespace)::softmax_warp_forward(float*, int)"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("linear_kernel", "linear_kernel"),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT"),
        (FILL, "vectorized_elementwise_kernel<FillFunctor>"),
        (ARGMAX, "reduce_kernel<ArgMaxOps>"),
        (CAT, "CatArrayBatchedCopy"),
        (NAMELESS, "softmax_warp_forward"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>(cublasGemvParams)", "gemv2T_kernel_val"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH (Device -> Pinned)"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_names_are_cut_to_what_tells_kernels_apart(name, short):
    assert short_name(name) == short


def test_long_names_end_early():
    assert len(short_name("x" * 200)) == MAX_NAME
