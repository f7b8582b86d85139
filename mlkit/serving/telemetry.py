"""Metrics under TF Serving's names and under our own, a trace through everything, and log lines that a machine can read."""

import contextlib
import contextvars
import json
import logging
import os
import queue
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlkit.serving.metrics import (
    _LIMITS,
    _ROWS,
    BATCH_ROWS,
    CACHE,
    CACHE_BYTES,
    DROPPED,
    DURATION,
    EXAMPLE_COUNTS,
    EXAMPLE_TOTAL,
    IN_PROGRESS,
    INPUT_SIZE,
    LOADING,
    LOG_COUNT,
    MEMORY,
    METRICS,
    PROCESSED_SIZE,
    PROCESSOR,
    QUEUING_LATENCY,
    REQUEST_COUNT,
    REQUEST_LATENCY,
    REQUESTS,
    RUN_COUNT,
    RUNTIME_LATENCY,
    SHADOW_AGREEING,
    SHADOW_DIFFERENCE,
    SHADOW_REQUESTS,
    SHADOW_ROWS,
    STARTED,
    STATE,
    WAITING,
    WARMUP_LATENCY,
    WARMUP_RECORDS,
    Counters,
    Request,
    exposition,
    read_counters,
    read_trace,
)
from mlkit.serving.protocol import VersionStatus

current_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("current_request", default=None)


class JsonLines(logging.Formatter):
    """Log records as JSON objects, one on each line."""

    def __init__(
        self,
        **always: Any,  # belongs to each line, for example process=0
    ):
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        told = {"time": _moment(record.created), "level": record.levelname.lower(), "logger": record.name}
        told |= self._always | {"message": record.getMessage()}
        if request := current_request.get():
            told |= {"trace_id": request.trace.trace, "span_id": request.trace.span}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class BackgroundWriter:
    """Writes what it is given, one after another, on a thread of its own."""

    def __init__(
        self,
        write: Callable[[Any], None],
        *,
        entries: int = 4096,  # that may wait
        size: int = 64 * 2**20,  # bytes that may wait
    ):
        self._write, self._entries, self._size = write, entries, size
        self.left_out = self.failed = 0
        self._given = self._done = 0  # bytes; each is changed by one thread only
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._closed = False
        self._thread.start()

    def put(
        self,
        entry: Any,
        size: int = 256,  # bytes it holds on to, about
    ) -> bool:  # False when it is left out
        """Hand over an entry; never waits."""
        if self._closed or self._queue.qsize() >= self._entries or self._given - self._done + size > self._size:
            self.left_out += 1
            return False
        self._given += size
        self._queue.put((entry, size))
        return True

    def _run(self) -> None:
        while (told := self._queue.get()) is not None:
            try:
                self._write(told[0])
            except Exception as error:  # a full disk, a closed pipe: what answers must go on
                self.failed += 1
                if self.failed == 1:
                    with contextlib.suppress(Exception):
                        logging.getLogger("mlkit.telemetry").warning("A log cannot be written: %s", error)
            self._done += told[1]

    def close(
        self,
        seconds: float = 5.0,  # at most
    ) -> None:
        """Write what waits, and stop."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(seconds)


class _Places(NamedTuple):
    """Where a kind of request is counted; 0 where it is not."""

    count: int
    latency: int
    own_count: int
    own_latency: int


class Telemetry:
    """What one process of a server tells about itself."""

    def __init__(
        self,
        folder: Path | str,  # the same for all processes of the server
        index: int = 0,  # of this process
        *,
        models: Iterable[str] = (),  # in service
        runtime: str = "TF1",  # as TF Serving calls what runs the model
        requests: str = "errors",  # which get a line: all, errors or none
        write: Callable[[bytes], None] | None = None,  # a line; by default to standard error
        mask: Iterable[str] = (),  # features that must not be told
    ):
        self.folder, self.index, self.models, self._runtime = Path(folder), index, frozenset(models), runtime
        self._counters = Counters(folder, index, METRICS)
        self._values, self._requests, self._mask = self._counters.values, requests, tuple(mask)
        self._places: dict[tuple, _Places] = {}
        self._batches: dict[tuple, tuple[int, ...]] = {}
        self._began: dict[tuple[str, int], float] = {}
        self._progress = {each: self._counters.slot(IN_PROGRESS, each) for each in ("REST", "GRPC")}
        self._counters.put(STARTED, str(index), value=time.time())
        self.samplers: list[Callable[[], None]] = []  # are called before numbers are read
        self._write = write or _to_standard_error
        self._writer = BackgroundWriter(self._write_line)
        self.report_dropped("requests", self._writer)

    # -- requests

    def begin(
        self,
        entrypoint: str,  # REST or GRPC
        traceparent: bytes | None = None,  # the header
    ) -> Request:
        """A request has come."""
        self._values[self._progress[entrypoint]] += 1
        request = Request(entrypoint, read_trace(traceparent))
        current_request.set(request)
        return request

    def end(
        self,
        request: Request,
        api: str,  # predict, classify... or Predict, Classify... with gRPC
        code: str = "OK",  # of gRPC
        message: str = "",  # of the error
    ) -> None:
        """It has been answered."""
        seconds = time.perf_counter() - request.began
        values = self._values
        values[self._progress[request.entrypoint]] -= 1
        key = (request.entrypoint, api, request.model, request.version, code)
        places = self._places.get(key) or self._find_places(*key)
        values[places.count] += 1
        values[places.own_count] += 1
        if places.latency:
            bucket = bisect_left(_LIMITS, seconds * 1e6)
            values[places.latency + bucket] += 1
            values[places.latency + _SUM] += seconds * 1e6
            values[places.own_latency + bucket] += 1
            values[places.own_latency + _SUM] += seconds
        if self._requests == "all" or (code != "OK" and self._requests == "errors"):
            self._writer.put((time.time(), request, key, seconds, message))

    def _find_places(self, entrypoint: str, api: str, model: str, version: int | None, code: str) -> _Places:
        known = model if model in self.models else ""
        number = str(version) if version is not None and known else ""
        slot, own = self._counters.slot, (known, number, api, entrypoint)
        places = _Places(
            slot(REQUEST_COUNT, known, code),
            slot(REQUEST_LATENCY, known, api, entrypoint) if code == "OK" else 0,
            slot(REQUESTS, *own, code),
            slot(DURATION, *own) if code == "OK" else 0,
        )
        if known == model:
            self._places[entrypoint, api, model, version, code] = places
        return places

    # -- models

    def batch(
        self,
        model: str,
        version: int,
        api: str,  # Predict, Classify, Regress
        sizes: Sequence[int],  # rows of each request in it
        seconds: float,  # that the model took
        waits: Iterable[float],  # seconds that each of them had waited
    ) -> None:
        """A model has been asked."""
        key = (model, version, api)
        places = self._batches.get(key)
        if places is None:
            slot = self._counters.slot
            own = (slot(BATCH_ROWS, model, str(version)), slot(QUEUING_LATENCY, model), slot(RUN_COUNT))
            places = self._batches[key] = (*own, slot(RUNTIME_LATENCY, model, api, self._runtime), slot(INPUT_SIZE))
        batch, queuing, runs, runtime, given = places
        values, rows = self._values, sum(sizes)
        values[runs] += 1
        values[given + INPUT_SIZE.size - 1] += rows
        for size in sizes:
            values[given + bisect_left(_ROWS, size)] += 1
        values[batch + bisect_left(_ROWS, rows)] += 1
        values[batch + BATCH_ROWS.size - 1] += rows
        values[runtime + bisect_left(_LIMITS, seconds * 1e6)] += 1
        values[runtime + _SUM] += seconds * 1e6
        for wait in waits:
            values[queuing + bisect_left(QUEUING_LATENCY.limits, wait * 1e6)] += 1
            values[queuing + QUEUING_LATENCY.size - 1] += wait * 1e6

    def state(self, state: str, model: str, status: VersionStatus) -> None:
        """A version has come into a state: one of the listeners of `ModelManager`."""
        key, now = (model, status.version), time.monotonic()
        for each in _STATES:
            self._counters.put(STATE, model, str(status.version), each, value=float(each == state))
        if state == "LOADING":
            self._began[key] = now
        elif (began := self._began.pop(key, None)) is not None and state == "AVAILABLE":
            self._counters.put(LOADING, str(self.index), model, str(status.version), value=now - began)

    def warmed(
        self,
        path: Path | str,  # of a version
        code: str,  # OK, or why it is refused
        seconds: float,  # that it took
        requests: int,  # that were answered
    ) -> None:
        """A version has been asked its golden requests."""
        self._counters.observe(WARMUP_LATENCY, str(path), code, value=seconds * 1e6)
        self._counters.add(WARMUP_RECORDS, str(path), code, amount=requests)

    def shadow(
        self,
        model: str,
        version: int,  # that has answered
        shadow: int,  # the version that was asked the same
        result: str,  # compared, failed or skipped
        rows: int = 0,  # that were compared
        agreeing: int = 0,  # of these, those whose texts are the same
        difference: float = 0.0,  # the largest between two numbers
    ) -> None:
        """A shadow was asked, or should have been."""
        told = (model, str(version), str(shadow))
        self._counters.add(SHADOW_REQUESTS, *told, result)
        if result == "compared":
            self._counters.add(SHADOW_ROWS, *told, amount=rows)
            self._counters.add(SHADOW_AGREEING, *told, amount=agreeing)
            slot = self._counters.slot(SHADOW_DIFFERENCE, str(self.index), *told)
            self._values[slot] = max(self._values[slot], difference)

    def examples(self, model: str, rows: int) -> None:
        """A request had so many examples."""
        self._counters.observe(EXAMPLE_COUNTS, model, value=rows)
        self._counters.add(EXAMPLE_TOTAL, model, amount=rows)

    def cache(
        self,
        model: str,
        hit: bool,
        size: int,  # bytes that known answers take by now
    ) -> None:
        """An answer was looked up."""
        self._counters.add(CACHE, model, "hit" if hit else "miss")
        self._counters.put(CACHE_BYTES, value=size)

    def waiting(self, model: str, version: int, requests: int) -> None:
        """So many requests wait for a version: for samplers to tell."""
        self._counters.put(WAITING, model, str(version), value=requests)

    def logged(self, model: str, done: bool) -> None:
        """What was asked and answered has been logged, or could not be."""
        self._counters.add(LOG_COUNT, model, "0" if done else "8")

    def report_dropped(
        self,
        log: str,  # its name
        writer: BackgroundWriter,
    ) -> None:
        """Tell how many entries a log had to leave out."""
        slot = self._counters.slot(DROPPED, log)
        before = self._values[slot]  # of a process whose place we have taken

        def sample() -> None:
            self._values[slot] = before + writer.left_out + writer.failed

        self.samplers.append(sample)

    def _write_line(self, entry: tuple) -> None:
        moment, request, (entrypoint, api, model, version, code), seconds, message = entry
        told = {"time": _moment(moment), "level": "info" if code == "OK" else "warning", "logger": "mlkit.requests"}
        told |= {"process": self.index, "trace_id": request.trace.trace, "span_id": request.trace.span}
        told |= {"parent_id": request.trace.parent} if request.trace.parent else {}
        told |= {"entrypoint": entrypoint, "api": api, "model": model[:100], "version": version, "status": code}
        told |= {"milliseconds": round(seconds * 1000, 3)} | ({"caller": request.caller} if request.caller else {})
        if message:
            named = any(name in message for name in self._mask)
            told["message"] = "(it names a sensitive feature)" if named else message[:1000]
        self._write(json.dumps(told, ensure_ascii=False).encode(errors="replace") + b"\n")

    # -- for those who look

    def sample(self) -> None:
        """Look how this process stands: now and then, for whoever is asked by Prometheus."""
        for sampler in self.samplers:
            sampler()
        self._counters.put(MEMORY, str(self.index), value=_resident_bytes())
        self._counters.put(PROCESSOR, str(self.index), value=time.process_time())

    def read(self) -> bytes:
        """The numbers of all processes, in Prometheus's text format; from any thread."""
        numbers = read_counters(self.folder, METRICS)
        if batches := [values for (metric, _), values in numbers.items() if metric == BATCH_ROWS]:
            numbers[PROCESSED_SIZE, ()] = [sum(each) for each in zip(*batches, strict=True)]
        return exposition(METRICS, numbers)

    def scrape(self) -> bytes:
        """The same, with a look at how this process stands."""
        self.sample()
        return self.read()

    def close(self) -> None:
        """Write what waits; afterwards nothing may be counted any more."""
        self._writer.close()
        self._counters.close()


_SUM = REQUEST_LATENCY.size - 1
_STATES = ("START", "LOADING", "AVAILABLE", "UNLOADING", "END")


def _to_standard_error(line: bytes) -> None:
    os.write(2, line)  # one call, so that lines of several processes do not mix


def _resident_bytes() -> int:
    """Memory that this process has; the most it ever had where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
