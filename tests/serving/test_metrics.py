"""Metrics of several processes, W3C trace contexts, and the text that Prometheus's own parser reads."""

import signal
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlkit.errors import ParameterError
from mlkit.serving.metrics import (
    METRICS,
    MICROSECOND_BUCKETS,
    Metric,
    ProcessMetrics,
    exponential_buckets,
    exposition,
    read_metrics,
    read_trace,
)

RESPONSES = Metric("shop_answers", "counter", "Answers given.", ("model", "status"))
SECONDS = Metric("shop_seconds", "histogram", "How long they took.", ("model",), exponential_buckets(0.001, 10, 3))
QUEUED = Metric("shop_waiting", "gauge", "Requests that wait.")
FAMILIES = [RESPONSES, SECONDS, QUEUED]
TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

KILLED = """
import os, signal, sys
from mlkit.serving.metrics import Metric, ProcessMetrics
responses = Metric("shop_answers", "counter", "Answers given.", ("model", "status"))
queued = Metric("shop_waiting", "gauge", "Requests that wait.")
seconds = Metric("shop_seconds", "histogram", "", ("model",), (0.001, 0.01, 0.1))
metrics = ProcessMetrics(sys.argv[1], 1, [responses, seconds, queued])
metrics.set(queued, value=7)
for status in ("OK", "OK", 'a "quoted" one'):
    metrics.increment(responses, "digits", status)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def metrics(tmp_path: Path) -> ProcessMetrics:
    """Metrics of process 0, with one request."""
    metrics = ProcessMetrics(tmp_path, 0, FAMILIES)
    metrics.increment(RESPONSES, "digits", "OK")
    metrics.observe(SECONDS, "digits", value=0.004)
    yield metrics
    metrics.close()


def run_killed_process(folder: Path) -> None:
    """Process 1 counts and is killed."""
    killed = subprocess.run([sys.executable, "-c", KILLED, folder])
    assert killed.returncode == -signal.SIGKILL


def test_sizes_of_metrics() -> None:
    assert [metric.size for metric in FAMILIES] == [1, 5, 1]
    assert SECONDS.buckets == pytest.approx((0.001, 0.01, 0.1))


def test_a_histogram_needs_buckets_and_values_need_all_labels(metrics: ProcessMetrics) -> None:
    with pytest.raises(ParameterError, match="a histogram with buckets"):
        Metric("shop_seconds", "histogram", "No buckets.")
    with pytest.raises(ParameterError, match=r"has the labels \('model', 'status'\)"):
        metrics.increment(RESPONSES, "digits")


def test_counting_is_cheap(metrics: ProcessMetrics) -> None:
    slot, values = metrics.slot(RESPONSES, "digits", "OK"), metrics.values

    def count() -> None:
        values[slot] += 1

    best = min(timeit.repeat(count, number=40_000, timer=time.process_time)) / 40_000
    assert best < 5e-6  # about 50 ns; the bound allows for a slow and busy machine
    assert values[slot] == 1 + 5 * 40_000


def test_a_killed_process_leaves_its_counters_and_not_its_gauges(metrics: ProcessMetrics, tmp_path: Path) -> None:
    run_killed_process(tmp_path)
    metrics.set(QUEUED, value=2)
    text = exposition(FAMILIES, read_metrics(tmp_path, FAMILIES)).decode()
    assert "shop_waiting{} 2" in text
    assert 'shop_seconds_bucket{model="digits",le="0.01"} 1' in text
    assert 'status="a \\"quoted\\" one"} 1' in text
    assert 'shop_answers{model="digits",status="OK"} 3' in text
    assert {family.name for family in text_string_to_metric_families(text)} == {metric.name for metric in FAMILIES}


def test_a_replacement_continues_the_counters(metrics: ProcessMetrics, tmp_path: Path) -> None:
    run_killed_process(tmp_path)
    before = read_metrics(tmp_path, FAMILIES)[RESPONSES, ("digits", "OK")]
    replacement = ProcessMetrics(tmp_path, 1, FAMILIES)
    replacement.increment(RESPONSES, "digits", "OK")
    assert read_metrics(tmp_path, FAMILIES)[RESPONSES, ("digits", "OK")] == [before[0] + 1]
    replacement.close()


def test_without_capacity_new_labels_are_not_counted_and_the_rest_is(tmp_path: Path) -> None:
    small = ProcessMetrics(tmp_path, 0, FAMILIES, capacity=9)
    for status in ("OK", "INTERNAL", "CANCELLED", "ABORTED"):
        small.increment(RESPONSES, "digits", status)
    assert sum(values[0] for values in read_metrics(tmp_path, FAMILIES).values()) == 3
    small.close()


def test_latency_buckets_are_those_of_tf_serving_and_names_are_unique() -> None:
    assert len(MICROSECOND_BUCKETS) == 33
    assert [f"{bound:g}" for bound in MICROSECOND_BUCKETS[:4]] == ["10", "18", "32.4", "58.32"]
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_trace_is_continued_with_a_span_of_our_own() -> None:
    trace = read_trace(TRACEPARENT)
    assert (trace.trace, trace.parent, trace.flags) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "01")
    assert trace.span != trace.parent
    assert trace.header.decode() == f"00-{trace.trace}-{trace.span}-01"
    later_version = b"cc" + TRACEPARENT[2:] + b"-more"  # later versions of the standard may add fields
    assert read_trace(later_version).trace == trace.trace


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"ff" + TRACEPARENT[2:],
        TRACEPARENT + b"-more",
        TRACEPARENT.upper(),
        b"00-" + b"0" * 32 + TRACEPARENT[35:],
        TRACEPARENT[:-1],
        TRACEPARENT[:36] + b"0" * 16 + b"-01",
    ],
)
def test_a_missing_or_malformed_header_starts_a_new_trace(header: bytes | None) -> None:
    trace = read_trace(header)
    assert trace.parent == ""
    assert len(trace.trace) == 32
    assert trace.trace != "0af7651916cd43dd8448eb211c80319c"
