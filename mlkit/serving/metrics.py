"""Metrics of several processes: counters, gauges and histograms in memory-mapped files, exposed in Prometheus's format.

A server counts each request several times, and Prometheus scrapes whichever process accepts its connection. So each
process keeps its values in a memory-mapped file: counting adds to a number in memory, without a system call, and
scraping adds up the files of all processes. The file of a killed process stays, and the process that replaces it
continues from its values, because counters must never decrease.
"""

import contextlib
import json
import mmap
import os
import random
import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from mlkit.errors import ParameterError


@dataclass(frozen=True)
class Metric:
    """A metric family: one name, one type, a set of label names."""

    name: str
    type: str  # counter, gauge or histogram
    help: str  # one sentence
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram's buckets; +Inf is added
    per_process: bool = False  # restarts with each process, as gauges do; for counters such as CPU seconds

    def __post_init__(self) -> None:
        if self.type not in ("counter", "gauge", "histogram") or (self.type == "histogram") != bool(self.buckets):
            raise ParameterError(
                f"{self.name} must be a counter, a gauge, or a histogram with buckets. Received: {self.type}"
            )

    @property
    def size(self) -> int:
        """Values per combination of labels: 1, or a histogram's buckets, +Inf and sum."""
        return len(self.buckets) + 2 if self.buckets else 1

    @property
    def ends_with_process(self) -> bool:
        """Whether the values of a process that ended no longer count."""
        return self.per_process or self.type == "gauge"


def exponential_buckets(
    first: float,  # upper bound of the first bucket
    factor: float,  # ratio of successive bounds
    count: int,
) -> tuple[float, ...]:
    """Upper bounds that grow by a factor."""
    return tuple(first * factor**index for index in range(count))


_CAPACITY = 65_536  # values per process: half a megabyte


class ProcessMetrics:
    """Metric values of this process, in a memory-mapped file.

    `slot` allocates the position of a value once; from then on `values[slot] += 1` is the whole cost. Label values are
    appended to a second file before the first value is written. One process and one thread write to a file, so no lock
    is needed. When the capacity is used up, new label combinations share a slot that is never read.
    """

    def __init__(
        self,
        folder: Path | str,  # shared by all processes
        index: int,  # number of this process; a replacement process has the same
        metrics: Iterable[Metric],  # all metrics of the server
        capacity: int = _CAPACITY,  # values
    ):
        self.folder, self.metrics = Path(folder), {metric.name: metric for metric in metrics}
        self._pid_slot = max((metric.size for metric in self.metrics.values()), default=1)  # below it: never read
        self._next, self._capacity = self._pid_slot + 1, capacity
        self._labels = os.open(_labels_path(self.folder, index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = os.open(_values_path(self.folder, index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(file, capacity * 8)
        self._memory = mmap.mmap(file, capacity * 8)
        os.close(file)
        self.values = memoryview(self._memory).cast("d")
        self._slots: dict[tuple, int] = {}
        self._restore()
        self.values[self._pid_slot] = os.getpid()

    def _restore(self) -> None:
        """Continue from the values of the process that this one replaces."""
        size = os.fstat(self._labels).st_size
        lines = os.pread(self._labels, size, 0)
        complete = lines[: lines.rfind(b"\n") + 1]
        os.ftruncate(self._labels, len(complete))  # a kill may have left half a line
        os.lseek(self._labels, 0, os.SEEK_END)
        for slot, name, labels in map(json.loads, complete.splitlines()):
            metric = self.metrics[name]
            self._slots[name, *labels] = slot
            self._next = max(self._next, slot + metric.size)
            if metric.ends_with_process:
                self.values[slot] = 0.0

    def slot(
        self,
        metric: Metric,
        *labels: str,  # a value for each label
    ) -> int:
        """Position of a value in `values`, the first one of a histogram; raises ParameterError for missing labels."""
        slot = self._slots.get((metric.name, *labels))
        if slot is not None:
            return slot
        if len(labels) != len(metric.labels):
            raise ParameterError(f"{metric.name} has the labels {metric.labels}. Received: {labels}")
        if self._next + metric.size > self._capacity:
            return 0
        slot, self._next = self._next, self._next + metric.size
        os.write(self._labels, json.dumps([slot, metric.name, labels]).encode() + b"\n")
        self._slots[metric.name, *labels] = slot
        return slot

    def increment(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter or a gauge."""
        self.values[self.slot(metric, *labels)] += amount

    def set(self, metric: Metric, *labels: str, value: float) -> None:
        """Set a gauge."""
        self.values[self.slot(metric, *labels)] = value

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Count a value in a histogram."""
        self.observe_at(self.slot(metric, *labels), metric, value)

    def observe_at(self, slot: int, metric: Metric, value: float) -> None:
        """Count a value in the histogram at a slot."""
        self.values[slot + bisect_left(metric.buckets, value)] += 1
        self.values[slot + len(metric.buckets) + 1] += value

    def close(self) -> None:
        """Close the files, which stay on disk."""
        self.values.release()
        self._memory.close()
        os.close(self._labels)


def _labels_path(folder: Path, index: int) -> Path:
    return folder / f"counters-{index}.names"


def _values_path(folder: Path, index: int) -> Path:
    return folder / f"counters-{index}.numbers"


Samples = dict[tuple[Metric, tuple[str, ...]], list[float]]


def read_metrics(
    folder: Path | str,  # shared by all processes
    metrics: Iterable[Metric],  # all metrics of the server
) -> Samples:
    """Values of all processes, added up; gauges of running processes only."""
    by_name = {metric.name: metric for metric in metrics}
    samples: Samples = {}
    for labels in sorted(Path(folder).glob("counters-*.names")):
        with contextlib.suppress(FileNotFoundError), _mapped(labels.with_suffix(".numbers")) as values:
            _add_up(samples, by_name, labels.read_bytes(), values)
    return samples


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        values = memoryview(memory).cast("d")
        try:
            yield values
        finally:
            values.release()


def _add_up(samples: Samples, by_name: Mapping[str, Metric], lines: bytes, values: memoryview) -> None:
    pid_slot = max(metric.size for metric in by_name.values())
    pid = int(values[pid_slot])
    running = pid > 0 and psutil.pid_exists(pid)
    for slot, name, labels in map(json.loads, lines[: lines.rfind(b"\n") + 1].splitlines()):
        metric = by_name[name]
        if running or not metric.ends_with_process:
            totals = samples.setdefault((metric, tuple(labels)), [0.0] * metric.size)
            for offset in range(metric.size):
                totals[offset] += values[slot + offset]


def exposition(
    metrics: Iterable[Metric],  # in this order
    samples: Samples,
) -> bytes:
    """Values in Prometheus's text format."""
    lines = []
    for metric in metrics:
        rows = sorted((labels, values) for (family, labels), values in samples.items() if family == metric)
        if rows:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.type}"]
        for labels, values in rows:
            pairs = ",".join(f'{name}="{_escaped(text)}"' for name, text in zip(metric.labels, labels, strict=True))
            lines += _histogram(metric, pairs, values) if metric.buckets else [_line(metric.name, pairs, values[0])]
    return "\n".join([*lines, ""]).encode()


def _histogram(metric: Metric, pairs: str, values: Sequence[float]) -> list[str]:
    """Lines of a histogram, with cumulative buckets."""
    lines, total, comma = [], 0.0, "," if pairs else ""
    for bound, count in zip([*(f"{bound:g}" for bound in metric.buckets), "+Inf"], values, strict=False):
        total += count
        lines.append(_line(f"{metric.name}_bucket", f'{pairs}{comma}le="{bound}"', total))
    return [*lines, _line(f"{metric.name}_sum", pairs, values[-1]), _line(f"{metric.name}_count", pairs, total)]


def _line(name: str, pairs: str, value: float) -> str:
    number = str(int(value)) if value == int(value) else repr(value)
    return f"{name}{{{pairs}}} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# TF Serving's metrics have its names, labels, units and buckets, so that dashboards made for it work unchanged. It has
# no version label: metrics per version have names of our own, in seconds. Rows are never padded, so there is no
# `padding_size`.
MICROSECOND_BUCKETS = exponential_buckets(10, 1.8, 33)  # TF Serving's: 10 microseconds to 24 minutes
_SECOND_BUCKETS = tuple(bound / 1e6 for bound in MICROSECOND_BUCKETS)
ROW_BUCKETS = exponential_buckets(1, 2, 15)
_REQUEST_LABELS = ("model", "version", "api", "entrypoint")
REQUEST_COUNT = Metric(
    ":tensorflow:serving:request_count", "counter", "The total number of requests.", ("model_name", "status")
)
REQUEST_LATENCY = Metric(
    ":tensorflow:serving:request_latency",
    "histogram",
    "Microseconds from request to response, successful requests only.",
    ("model_name", "API", "entrypoint"),
    MICROSECOND_BUCKETS,
)
RUNTIME_LATENCY = Metric(
    ":tensorflow:serving:runtime_latency",
    "histogram",
    "Microseconds of each model call.",
    ("model_name", "API", "runtime"),
    MICROSECOND_BUCKETS,
)
EXAMPLE_COUNTS = Metric(
    ":tensorflow:serving:request_example_counts", "histogram", "Examples per request.", ("model",), ROW_BUCKETS
)
EXAMPLE_TOTAL = Metric(
    ":tensorflow:serving:request_example_count_total", "counter", "The total number of examples.", ("model",)
)
LOG_COUNT = Metric(
    ":tensorflow:serving:request_log_count",
    "counter",
    "Requests sampled for the request log, logged or dropped.",
    ("model_name", "status_code"),
)
QUEUING_LATENCY = Metric(
    ":tensorflow:serving:batching_session:queuing_latency",
    "histogram",
    "Microseconds that requests were queued.",
    ("thread_pool_name",),
    exponential_buckets(100, 1.2, 52),
)
RUN_COUNT = Metric(":tensorflow:serving:batching_session:wrapped_run_count", "counter", "Model calls.")
INPUT_SIZE = Metric(
    ":tensorflow:serving:batching_session:input_batch_size", "histogram", "Rows per request.", (), ROW_BUCKETS
)
PROCESSED_SIZE = Metric(
    ":tensorflow:serving:batching_session:processed_batch_size", "histogram", "Rows per model call.", (), ROW_BUCKETS
)
WARMUP_LATENCY = Metric(
    ":tensorflow:serving:model_warmup_latency",
    "histogram",
    "Microseconds of a version's warm-up with its golden requests.",
    ("model_path", "status"),
    MICROSECOND_BUCKETS,
)
WARMUP_RECORDS = Metric(
    ":tensorflow:serving:model_warmup_records_read",
    "counter",
    "Warm-up requests run before a version gets traffic.",
    ("model_path", "status"),
)
_SHADOW_LABELS = ("model", "version", "shadow")  # the serving version and its shadow
SHADOW_REQUESTS = Metric(
    "mlkit_shadow_requests_total",
    "counter",
    "Shadow requests: compared, failed or skipped.",
    (*_SHADOW_LABELS, "result"),
)
SHADOW_ROWS = Metric("mlkit_shadow_rows_total", "counter", "Rows whose predictions were compared.", _SHADOW_LABELS)
SHADOW_AGREEING = Metric(
    "mlkit_shadow_rows_agreeing_total", "counter", "Rows in which all string outputs are equal.", _SHADOW_LABELS
)
SHADOW_DIFFERENCE = Metric(
    "mlkit_shadow_largest_difference",
    "gauge",
    "Largest difference of two numeric outputs.",
    ("process", *_SHADOW_LABELS),
)
REQUESTS = Metric("mlkit_requests_total", "counter", "Requests handled.", (*_REQUEST_LABELS, "status"))
DURATION = Metric(
    "mlkit_request_duration_seconds",
    "histogram",
    "Seconds from request to response, successful requests only.",
    _REQUEST_LABELS,
    _SECOND_BUCKETS,
)
IN_PROGRESS = Metric("mlkit_requests_in_progress", "gauge", "Requests in progress.", ("entrypoint",))
QUEUED = Metric("mlkit_requests_queued", "gauge", "Requests queued for a model.", ("model", "version"))
BATCH_ROWS = Metric("mlkit_batch_rows", "histogram", "Rows per batch.", ("model", "version"), ROW_BUCKETS)
CACHE = Metric("mlkit_cache_requests_total", "counter", "Response cache lookups.", ("model", "result"))
CACHE_BYTES = Metric("mlkit_cache_bytes", "gauge", "Size of the response cache.")
STATE = Metric(
    "mlkit_model_version_state", "gauge", "Processes in which a version is in a state.", ("model", "version", "state")
)
LOADING = Metric(
    "mlkit_model_load_seconds", "gauge", "Seconds to load and warm up a version.", ("process", *_REQUEST_LABELS[:2])
)
# Process metrics carry the process as a label, because adding up start times would mean nothing.
MEMORY = Metric("mlkit_process_resident_memory_bytes", "gauge", "Resident memory of a process.", ("process",))
PROCESSOR = Metric(
    "mlkit_process_cpu_seconds_total", "counter", "CPU seconds of a process.", ("process",), per_process=True
)
STARTED = Metric("mlkit_process_start_time_seconds", "gauge", "Start time of a process, Unix time.", ("process",))
DROPPED = Metric("mlkit_log_dropped_total", "counter", "Log entries dropped or not written.", ("log",))
METRICS = (
    *(REQUEST_COUNT, REQUEST_LATENCY, RUNTIME_LATENCY, EXAMPLE_COUNTS, EXAMPLE_TOTAL, LOG_COUNT),
    *(QUEUING_LATENCY, RUN_COUNT, INPUT_SIZE, PROCESSED_SIZE, WARMUP_LATENCY, WARMUP_RECORDS),
    *(REQUESTS, DURATION, IN_PROGRESS, QUEUED, BATCH_ROWS, CACHE, CACHE_BYTES),
    *(SHADOW_REQUESTS, SHADOW_ROWS, SHADOW_AGREEING, SHADOW_DIFFERENCE),
    *(STATE, LOADING, MEMORY, PROCESSOR, STARTED, DROPPED),
)
METRICS_PATH = "/monitoring/prometheus/metrics"  # TF Serving's
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_INVALID_IDS = (b"0" * 32, b"0" * 16)


class Trace(NamedTuple):
    """W3C trace context of one request."""

    trace: str  # trace ID, 32 hexadecimal digits, common to all services involved
    span: str  # span ID, 16 hexadecimal digits, of this server
    parent: str = ""  # span ID of the caller
    flags: str = "00"

    @property
    def header(self) -> bytes:
        """Value of `traceparent` for the response and for services called from here."""
        return f"00-{self.trace}-{self.span}-{self.flags}".encode()


def read_trace(
    header: bytes | None,  # value of `traceparent`
) -> Trace:
    """Continue the trace of a request; start a new one where the header is missing or malformed."""
    digits = f"{random.getrandbits(192):048x}"
    new, span = digits[:32], digits[32:]
    match = _TRACEPARENT.fullmatch(header) if header else None
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[5]):
        return Trace(new, span)
    if match[2] in _INVALID_IDS or match[3] in _INVALID_IDS:
        return Trace(new, span)
    return Trace(match[2].decode(), span, match[3].decode(), match[4].decode())


class Request:
    """Request in progress: what logs and metrics need to know about it."""

    __slots__ = ("began", "entrypoint", "model", "principal", "trace", "version")

    def __init__(
        self,
        entrypoint: str,  # REST or GRPC
        trace: Trace,
    ):
        self.began, self.entrypoint, self.trace = time.perf_counter(), entrypoint, trace
        self.model: str = ""  # requested model
        self.version: int | None = None  # serving version
        self.principal: str = ""  # name, if known
