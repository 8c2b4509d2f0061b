from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.bench.serving_report import (
    METRICS,
    StreamRecord,
    format_report,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    peak_concurrency,
    peak_throughput,
    summarize,
)
from core.errors import ConfigError

TWO = [
    StreamRecord(10, 3, start=100.0, chunk_times=[100.1, 100.2, 100.4], text="abc"),
    StreamRecord(20, 2, start=100.5, chunk_times=[100.8, 101.0], text="de"),
]
FAILED = StreamRecord(30, 0, start=100.0, error="gone")

GOLDEN = """\
============ Serving Benchmark Result ============
Successful requests:                     2         
Failed requests:                         1         
Maximum request concurrency:             8         
Request rate configured (RPS):           4.00      
Benchmark duration (s):                  2.00      
Total input tokens:                      30        
Total generated tokens:                  5         
Request throughput (req/s):              1.00      
Request goodput (req/s):                 0.50      
Output token throughput (tok/s):         2.50      
Peak output token throughput (tok/s):    4.00      
Peak concurrent requests:                1.00      
Total token throughput (tok/s):          17.50     
---------------Time to First Token----------------
Mean TTFT (ms):                          200.00    
Median TTFT (ms):                        200.00    
P99 TTFT (ms):                           298.00    
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          175.00    
Median TPOT (ms):                        175.00    
P99 TPOT (ms):                           199.50    
---------------Inter-token Latency----------------
Mean ITL (ms):                           166.67    
Median ITL (ms):                         200.00    
P99 ITL (ms):                            200.00    
----------------End-to-end Latency----------------
Mean E2EL (ms):                          450.00    
Median E2EL (ms):                        450.00    
P99 E2EL (ms):                           499.00    
=================================================="""  # noqa: W291  columns are padded


def test_the_report_is_the_one_that_scripts_read():
    result = summarize([*TWO, FAILED], 100.0, 2.0, goodput={"ttft": 200})
    report = format_report(
        result, metrics=list(METRICS), percentiles=[99.0], max_concurrency=8, request_rate=4.0
    )
    assert report == GOLDEN


def test_lines_that_only_some_runs_have():
    result = summarize(TWO, 100.0, 2.0, metrics=["tpot"], percentiles=[50.0, 99.9])
    report = format_report(result, metrics=["tpot"], percentiles=[50.0, 99.9])
    for absent in ("Maximum request", "configured", "goodput", "TTFT", "ITL", "E2EL", "P99 "):
        assert absent not in report
    for present in ("P50 TPOT (ms):", "P99.9 TPOT (ms):"):
        assert present in report


def test_the_keys_of_the_file():
    result = summarize([*TWO, FAILED], 100.0, 2.0)
    for name in METRICS:
        for figure in ("mean", "median", "std", "p99"):
            assert f"{figure}_{name}_ms" in result
    assert result["completed"] == 2
    assert result["failed"] == 1
    assert result["input_lens"] == [10, 20, 30]
    assert result["output_lens"] == [3, 2, 0]
    assert result["start_times"] == pytest.approx([0.0, 0.5, 0.0])
    assert result["ttfts"] == pytest.approx([0.1, 0.3, 0.0])
    assert result["itls"][0] == pytest.approx([0.1, 0.2])
    assert result["generated_texts"] == ["abc", "de", ""]
    assert result["errors"] == ["", "", "gone"]
    assert result["request_goodput"] is None


def test_nothing_but_failures():
    result = summarize([FAILED], 100.0, 2.0)
    assert (result["completed"], result["output_throughput"], result["mean_ttft_ms"]) == (0, 0, 0)


# --- figures ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=2, max_size=50), st.integers(1, 99))
def test_percentiles_interpolate(values, percentile):
    records = [StreamRecord(1, 1, start=0.0, chunk_times=[value]) for value in values]
    result = summarize(records, 0.0, 1.0, percentiles=[float(percentile)])
    expected = statistics.quantiles(values, n=100, method="inclusive")[percentile - 1]
    assert result[f"p{percentile}_ttft_ms"] == pytest.approx(expected * 1e3, abs=1e-6)
    assert result["std_ttft_ms"] == pytest.approx(statistics.pstdev(values) * 1e3, abs=1e-6)


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=20)


@given(spans)
def test_peak_concurrency_is_the_most_that_were_open_at_once(lengths):
    records = [
        StreamRecord(1, 1, start=float(begin), chunk_times=[float(begin + length)])
        for begin, length in lengths
    ]
    open_at = [
        sum(begin <= moment < begin + length for begin, length in lengths) for moment in range(41)
    ]
    assert peak_concurrency(records) == max(open_at)


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 9), min_size=1)), max_size=9))
def test_peak_throughput_counts_every_token_once(streams):
    records = [StreamRecord(1, n, chunk_times=sorted(times)) for n, times in streams]
    peak = peak_throughput(records, 0.0)
    total = sum(n for n, _ in streams)
    assert total / 10 <= peak + 1e-9
    assert peak <= total + 1e-9
    lumped = [StreamRecord(1, n, chunk_times=[0.5]) for n, _ in streams]
    assert peak_throughput(lumped, 0.0) == pytest.approx(total)


def test_time_per_token_leaves_the_first_one_out():
    record = StreamRecord(1, 11, start=1.0, chunk_times=[3.0, 4.0, 5.0])
    assert (record.ttft, record.latency, record.tpot) == (2.0, 4.0, 0.2)
    assert StreamRecord(1, 1, start=1.0, chunk_times=[3.0]).tpot == 0
    empty = StreamRecord(1)
    assert (empty.ttft, empty.latency, empty.itls) == (0, 0, [])


def test_one_token_has_no_share_in_the_time_per_token():
    records = [*TWO, StreamRecord(1, 1, start=100.0, chunk_times=[100.1])]
    assert summarize(records, 100.0, 1.0)["mean_tpot_ms"] == pytest.approx(175.0)


@pytest.mark.parametrize(
    ("limits", "count"),
    [({"ttft": 299}, 1), ({"ttft": 301}, 2), ({"ttft": 301, "tpot": 160}, 1), ({"e2el": 1}, 0)],
)
def test_goodput_counts_requests_that_keep_every_limit(limits, count):
    assert summarize(TWO, 100.0, 1.0, goodput=limits)["request_goodput"] == count


# --- settings --------------------------------------------------------------------------------------


def test_settings_are_read():
    assert parse_metrics("ttft, e2el") == ["ttft", "e2el"]
    assert parse_percentiles("50,99.9") == [50.0, 99.9]
    assert parse_goodput(["ttft:500", "tpot:50,e2el:1e3"]) == {"ttft": 500, "tpot": 50, "e2el": 1e3}
    assert parse_goodput([]) == {}
    assert math.isinf(parse_goodput(["ttft:inf"])["ttft"])


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [
        (parse_metrics, "ttft,tbt", "'tbt' is unknown"),
        (parse_percentiles, "50,x", "must be numbers"),
        (parse_percentiles, "101", "101 must be from 0 to 100"),
        (parse_goodput, ["ttft"], "'ttft' must be a metric and ms"),
        (parse_goodput, ["itl:5"], "'itl:5' must be one of"),
        (parse_goodput, ["ttft:-1"], "at least 0"),
        (parse_goodput, ["ttft:nan"], "at least 0"),
    ],
)
def test_settings_that_make_no_sense(parse, value, message):
    with pytest.raises(ConfigError, match=message):
        parse(value)
