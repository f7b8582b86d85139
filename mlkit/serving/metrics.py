"""Counters, gauges and histograms of several processes in one place, as cheap as a list of numbers, and written as Prometheus reads them."""

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

from mlkit.errors import ParameterError


@dataclass(frozen=True)
class Metric:
    """A family of numbers that differ in their labels."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str  # one sentence
    labels: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()  # of a histogram's buckets: the largest value in each; one more takes all others
    living: bool = False  # begins anew with each process, as gauges do

    def __post_init__(self) -> None:
        if self.kind not in ("counter", "gauge", "histogram") or (self.kind == "histogram") != bool(self.limits):
            raise ParameterError(
                f"{self.name} is a counter, a gauge, or a histogram with limits. Received: {self.kind}"
            )

    @property
    def size(self) -> int:
        """Numbers that one combination of labels takes: a histogram's buckets, and the sum of its values."""
        return len(self.limits) + 2 if self.limits else 1


def exponential(
    first: float,  # the first limit
    growth: float,  # each limit, divided by the one before
    count: int,
) -> tuple[float, ...]:
    """Limits that grow by a factor."""
    return tuple(first * growth**place for place in range(count))


_ROOM = 65_536  # numbers of one process: half a megabyte


class Counters:
    """The numbers of this process."""

    def __init__(
        self,
        folder: Path | str,  # of all processes
        index: int,  # of this process: one that takes the place of another has the same
        metrics: Iterable[Metric],  # all that there are
        room: int = _ROOM,
    ):
        self.folder, self.metrics = Path(folder), {metric.name: metric for metric in metrics}
        self._spare = max((metric.size for metric in self.metrics.values()), default=1)  # the place that nobody reads
        self._next, self._room = self._spare + 1, room
        self._names = os.open(_names(self.folder, index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = os.open(_numbers(self.folder, index), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(file, room * 8)
        self._memory = mmap.mmap(file, room * 8)
        os.close(file)
        self.values = memoryview(self._memory).cast("d")
        self._slots: dict[tuple, int] = {}
        self._take_over()
        self.values[self._spare] = os.getpid()

    def _take_over(self) -> None:
        """Go on from the numbers of a process that had this place before."""
        size = os.fstat(self._names).st_size
        lines = os.pread(self._names, size, 0)
        whole = lines[: lines.rfind(b"\n") + 1]
        os.ftruncate(self._names, len(whole))  # a kill may have left half a line
        os.lseek(self._names, 0, os.SEEK_END)
        for slot, name, labels in map(json.loads, whole.splitlines()):
            metric = self.metrics[name]
            self._slots[name, *labels] = slot
            self._next = max(self._next, slot + metric.size)
            if metric.living or metric.kind == "gauge":
                self.values[slot] = 0.0

    def slot(
        self,
        metric: Metric,
        *labels: str,  # a value for each label
    ) -> int:
        """The place of a number in `values`, the first one of a histogram."""
        found = self._slots.get((metric.name, *labels))
        if found is not None:
            return found
        if len(labels) != len(metric.labels):
            raise ParameterError(f"{metric.name} has the labels {metric.labels}. Received: {labels}")
        if self._next + metric.size > self._room:
            return 0
        slot, self._next = self._next, self._next + metric.size
        os.write(self._names, json.dumps([slot, metric.name, labels]).encode() + b"\n")
        self._slots[metric.name, *labels] = slot
        return slot

    def add(self, metric: Metric, *labels: str, amount: float = 1.0) -> None:
        """Let a counter or a gauge grow."""
        self.values[self.slot(metric, *labels)] += amount

    def put(self, metric: Metric, *labels: str, value: float) -> None:
        """Set a gauge."""
        self.values[self.slot(metric, *labels)] = value

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        """Count a value in a histogram."""
        slot = self.slot(metric, *labels)
        self.values[slot + bisect_left(metric.limits, value)] += 1
        self.values[slot + metric.size - 1] += value

    def close(self) -> None:
        """Let go of the files, which stay."""
        self.values.release()
        self._memory.close()
        os.close(self._names)


def _names(folder: Path, index: int) -> Path:
    return folder / f"counters-{index}.names"


def _numbers(folder: Path, index: int) -> Path:
    return folder / f"counters-{index}.numbers"


Numbers = dict[tuple[Metric, tuple[str, ...]], list[float]]


def read_counters(
    folder: Path | str,  # of all processes
    metrics: Iterable[Metric],  # all that there are
) -> Numbers:
    """The numbers of all processes, added up; gauges of those that live."""
    known, found = {metric.name: metric for metric in metrics}, {}
    for names in sorted(Path(folder).glob("counters-*.names")):
        with contextlib.suppress(FileNotFoundError), _mapped(names.with_suffix(".numbers")) as values:
            _add_up(found, known, names.read_bytes(), values)
    return found


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        values = memoryview(memory).cast("d")
        try:
            yield values
        finally:
            values.release()


def _add_up(found: Numbers, known: Mapping[str, Metric], lines: bytes, values: memoryview) -> None:
    spare = max(metric.size for metric in known.values())
    alive = _lives(int(values[spare]))
    for slot, name, labels in map(json.loads, lines[: lines.rfind(b"\n") + 1].splitlines()):
        metric = known[name]
        if alive or not (metric.living or metric.kind == "gauge"):
            numbers = found.setdefault((metric, tuple(labels)), [0.0] * metric.size)
            for place in range(metric.size):
                numbers[place] += values[slot + place]


def _lives(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, OverflowError):
        with contextlib.suppress(PermissionError):
            os.kill(pid, 0)
        return pid > 0
    return False


def exposition(
    metrics: Iterable[Metric],  # in this order
    numbers: Numbers,
) -> bytes:
    """Numbers in Prometheus's text format."""
    lines = []
    for metric in metrics:
        told = sorted((labels, values) for (one, labels), values in numbers.items() if one == metric)
        if told:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, values in told:
            named = ",".join(f'{name}="{_escaped(text)}"' for name, text in zip(metric.labels, labels, strict=True))
            lines += _histogram(metric, named, values) if metric.limits else [_line(metric.name, named, values[0])]
    return "\n".join([*lines, ""]).encode()


def _histogram(metric: Metric, named: str, values: Sequence[float]) -> list[str]:
    lines, total, comma = [], 0.0, "," if named else ""
    for limit, count in zip([*(f"{limit:g}" for limit in metric.limits), "+Inf"], values, strict=False):
        total += count
        lines.append(_line(f"{metric.name}_bucket", f'{named}{comma}le="{limit}"', total))
    return [*lines, _line(f"{metric.name}_sum", named, values[-1]), _line(f"{metric.name}_count", named, total)]


def _line(name: str, named: str, value: float) -> str:
    number = str(int(value)) if value == int(value) else repr(value)
    return f"{name}{{{named}}} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


_LIMITS = exponential(10, 1.8, 33)  # microseconds, TF Serving's: from 10 to 24 minutes
_SECONDS = tuple(limit / 1e6 for limit in _LIMITS)
_ROWS = exponential(1, 2, 15)
_OWN = ("model", "version", "api", "entrypoint")
REQUEST_COUNT = Metric(
    ":tensorflow:serving:request_count", "counter", "The total number of requests.", ("model_name", "status")
)
REQUEST_LATENCY = Metric(
    ":tensorflow:serving:request_latency",
    "histogram",
    "Microseconds from a request to its answer, of those that succeeded.",
    ("model_name", "API", "entrypoint"),
    _LIMITS,
)
RUNTIME_LATENCY = Metric(
    ":tensorflow:serving:runtime_latency",
    "histogram",
    "Microseconds of each call of a model.",
    ("model_name", "API", "runtime"),
    _LIMITS,
)
EXAMPLE_COUNTS = Metric(
    ":tensorflow:serving:request_example_counts", "histogram", "Examples in a request.", ("model",), _ROWS
)
EXAMPLE_TOTAL = Metric(
    ":tensorflow:serving:request_example_count_total", "counter", "The total number of examples.", ("model",)
)
LOG_COUNT = Metric(
    ":tensorflow:serving:request_log_count",
    "counter",
    "Requests that were logged, and those that could not be.",
    ("model_name", "status_code"),
)
QUEUING_LATENCY = Metric(
    ":tensorflow:serving:batching_session:queuing_latency",
    "histogram",
    "Microseconds that requests waited for the model they ask.",
    ("thread_pool_name",),
    exponential(100, 1.2, 52),
)
RUN_COUNT = Metric(":tensorflow:serving:batching_session:wrapped_run_count", "counter", "Calls of models.")
INPUT_SIZE = Metric(
    ":tensorflow:serving:batching_session:input_batch_size", "histogram", "Rows in each request.", (), _ROWS
)
PROCESSED_SIZE = Metric(
    ":tensorflow:serving:batching_session:processed_batch_size", "histogram", "Rows in each call of a model.", (), _ROWS
)
WARMUP_LATENCY = Metric(
    ":tensorflow:serving:model_warmup_latency",
    "histogram",
    "Microseconds of asking a version its golden requests before it is let in.",
    ("model_path", "status"),
    _LIMITS,
)
WARMUP_RECORDS = Metric(
    ":tensorflow:serving:model_warmup_records_read",
    "counter",
    "Requests that a version was asked before it is let in.",
    ("model_path", "status"),
)
_SHADOW = ("model", "version", "shadow")
SHADOW_REQUESTS = Metric(
    "mlkit_shadow_requests_total",
    "counter",
    "Requests that a shadow was asked, or should have been.",
    (*_SHADOW, "result"),
)
SHADOW_ROWS = Metric("mlkit_shadow_rows_total", "counter", "Rows whose answers were compared.", _SHADOW)
SHADOW_AGREEING = Metric(
    "mlkit_shadow_rows_agreeing_total", "counter", "Rows in which all texts are the same.", _SHADOW
)
SHADOW_DIFFERENCE = Metric(
    "mlkit_shadow_largest_difference", "gauge", "Between two numbers of compared answers.", ("process", *_SHADOW)
)
REQUESTS = Metric("mlkit_requests_total", "counter", "Requests answered.", (*_OWN, "status"))
DURATION = Metric(
    "mlkit_request_duration_seconds", "histogram", "From a request to its answer, if it succeeded.", _OWN, _SECONDS
)
IN_PROGRESS = Metric("mlkit_requests_in_progress", "gauge", "Requests being answered.", ("entrypoint",))
WAITING = Metric("mlkit_requests_waiting", "gauge", "Requests that wait for a model.", ("model", "version"))
BATCH_ROWS = Metric("mlkit_batch_rows", "histogram", "Rows that were asked at once.", ("model", "version"), _ROWS)
CACHE = Metric("mlkit_cache_requests_total", "counter", "Requests looked up among known answers.", ("model", "result"))
CACHE_BYTES = Metric("mlkit_cache_bytes", "gauge", "Room that known answers take.")
STATE = Metric(
    "mlkit_model_version_state", "gauge", "Processes in which a version is in a state.", ("model", "version", "state")
)
LOADING = Metric("mlkit_model_load_seconds", "gauge", "How long it took to load and warm.", ("process", *_OWN[:2]))
MEMORY = Metric("mlkit_process_resident_memory_bytes", "gauge", "Memory that a process has.", ("process",))
PROCESSOR = Metric("mlkit_process_cpu_seconds_total", "counter", "Computed by a process.", ("process",), living=True)
STARTED = Metric("mlkit_process_start_time_seconds", "gauge", "When a process began, since 1970.", ("process",))
DROPPED = Metric("mlkit_log_dropped_total", "counter", "Entries that had to be left out.", ("log",))
METRICS = (
    *(REQUEST_COUNT, REQUEST_LATENCY, RUNTIME_LATENCY, EXAMPLE_COUNTS, EXAMPLE_TOTAL, LOG_COUNT),
    *(QUEUING_LATENCY, RUN_COUNT, INPUT_SIZE, PROCESSED_SIZE, WARMUP_LATENCY, WARMUP_RECORDS),
    *(REQUESTS, DURATION, IN_PROGRESS, WAITING, BATCH_ROWS, CACHE, CACHE_BYTES),
    *(SHADOW_REQUESTS, SHADOW_ROWS, SHADOW_AGREEING, SHADOW_DIFFERENCE),
    *(STATE, LOADING, MEMORY, PROCESSOR, STARTED, DROPPED),
)
METRICS_PATH = "/monitoring/prometheus/metrics"  # TF Serving's
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NOTHING = (b"0" * 32, b"0" * 16)


class Trace(NamedTuple):
    """Which request this is."""

    trace: str  # 32 hexadecimal digits, the same for all that take part
    span: str  # 16, our part
    parent: str = ""  # the part that has asked us
    flags: str = "00"

    @property
    def header(self) -> bytes:
        """The value of `traceparent` for whoever comes next, and for the answer."""
        return f"00-{self.trace}-{self.span}-{self.flags}".encode()


def read_trace(
    header: bytes | None,  # value of `traceparent`
) -> Trace:
    """The trace of a request, or a new one."""
    digits = f"{random.getrandbits(192):048x}"
    new, span = digits[:32], digits[32:]
    found = _TRACEPARENT.fullmatch(header) if header else None
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5]):
        return Trace(new, span)
    if found[2] in _NOTHING or found[3] in _NOTHING:
        return Trace(new, span)
    return Trace(found[2].decode(), span, found[3].decode(), found[4].decode())


class Request:
    """A request that is being answered."""

    __slots__ = ("began", "caller", "entrypoint", "model", "trace", "version")

    def __init__(
        self,
        entrypoint: str,  # REST or GRPC
        trace: Trace,
    ):
        self.began, self.entrypoint, self.trace = time.perf_counter(), entrypoint, trace
        self.model: str = ""  # that is asked
        self.version: int | None = None  # that answers
        self.caller: str = ""  # who asks, if that is known
