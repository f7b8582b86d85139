"""Telemetry of one process: metrics under TF Serving's names and our own, W3C traces, and structured log lines.

Code below a request finds it through `current_request`, because each request runs in a context of its own. Nothing is
looked up or formatted while a request is handled: the slots of its metrics are cached, and log entries are handed to a
writer thread.
"""

import contextlib
import contextvars
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from mlkit.serving.metrics import (
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
    QUEUED,
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
    WARMUP_LATENCY,
    WARMUP_RECORDS,
    ProcessMetrics,
    Request,
    exposition,
    read_metrics,
    read_trace,
)
from mlkit.serving.protocol import VersionStatus

current_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("current_request", default=None)


class JsonLines(logging.Formatter):
    """Log formatter: one JSON object per line, with the trace of the current request."""

    def __init__(
        self,
        **fields: Any,  # added to each line, for example process=0
    ):
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Line of a log record."""
        entry = {"time": _timestamp(record.created), "level": record.levelname.lower(), "logger": record.name}
        entry |= self._fields | {"message": record.getMessage()}
        if request := current_request.get():
            entry |= {"trace_id": request.trace.trace, "span_id": request.trace.span}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class BackgroundWriter:
    """Bounded queue with a writer thread: a slow disk or pipe drops log entries and never delays a request."""

    def __init__(
        self,
        write: Callable[[Any], None],
        *,
        entries: int = 4096,  # maximum entries in the queue
        size: int = 64 * 2**20,  # maximum bytes in the queue
    ):
        self._write, self._entries, self._size = write, entries, size
        self.dropped = self.failed = 0
        self._queued_bytes = self._written_bytes = 0  # each is changed by one thread only
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._closed = False
        self._thread.start()

    def put(
        self,
        entry: Any,
        size: int = 256,  # approximate bytes held by the entry
    ) -> bool:  # False when it was dropped
        """Queue an entry without waiting."""
        pending = self._queued_bytes - self._written_bytes
        if self._closed or self._queue.qsize() >= self._entries or pending + size > self._size:
            self.dropped += 1
            return False
        self._queued_bytes += size
        self._queue.put((entry, size))
        return True

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            entry, size = item
            try:
                self._write(entry)
            except Exception as error:  # a full disk, a closed pipe: serving must continue
                self.failed += 1
                if self.failed == 1:
                    with contextlib.suppress(Exception):
                        logging.getLogger("mlkit.telemetry").warning("A log cannot be written: %s", error)
            self._written_bytes += size

    def close(
        self,
        seconds: float = 5.0,  # maximum wait
    ) -> None:
        """Write the queued entries and stop."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(seconds)


class Telemetry:
    """Metrics and request log lines of one server process.

    Clients choose the model names in their requests, so names of models that are not served are counted together,
    under an empty name: otherwise anybody could fill the memory of the server and of Prometheus with names. Log
    messages may quote request data, so a message that names a sensitive feature is replaced.
    """

    def __init__(
        self,
        folder: Path | str,  # shared by all processes of the server
        index: int = 0,  # number of this process
        *,
        models: Iterable[str] = (),  # names of served models
        runtime: str = "TF1",  # TF Serving's name of the runtime
        requests: str = "errors",  # requests that get a log line: all, errors or none
        write: Callable[[bytes], None] | None = None,  # writer of log lines; default: standard error
        sensitive: Iterable[str] = (),  # features that must not appear in logs
    ):
        self.folder, self.index, self.models, self._runtime = Path(folder), index, frozenset(models), runtime
        self._metrics = ProcessMetrics(folder, index, METRICS)
        self._values, self._requests, self._sensitive = self._metrics.values, requests, tuple(sensitive)
        self._request_slots: dict[tuple, tuple[int, ...]] = {}
        self._batch_slots: dict[tuple, tuple[int, ...]] = {}
        self._loading_since: dict[tuple[str, int], float] = {}
        self._progress = {name: self._metrics.slot(IN_PROGRESS, name) for name in ("REST", "GRPC")}
        self._metrics.set(STARTED, str(index), value=time.time())
        self.samplers: list[Callable[[], None]] = []  # called before metrics are read
        self._write = write or _to_standard_error
        self._writer = BackgroundWriter(self._write_line)
        self.export_dropped("access", self._writer)

    # Requests

    def start_request(
        self,
        entrypoint: str,  # REST or GRPC
        traceparent: bytes | None = None,  # header
    ) -> Request:
        """Count a request in and make it the current one."""
        self._values[self._progress[entrypoint]] += 1
        request = Request(entrypoint, read_trace(traceparent))
        current_request.set(request)
        return request

    def end_request(
        self,
        request: Request,
        api: str,  # predict, classify, ... for REST; Predict, Classify, ... for gRPC
        code: str = "OK",  # gRPC status code
        message: str = "",  # error message
    ) -> None:
        """Count a request out, with its status and latency."""
        seconds = time.perf_counter() - request.began
        values = self._values
        values[self._progress[request.entrypoint]] -= 1
        key = (request.entrypoint, api, request.model, request.version, code)
        count, latency, own_count, own_latency = self._request_slots.get(key) or self._find_slots(*key)
        values[count] += 1
        values[own_count] += 1
        if latency:
            self._metrics.observe_at(latency, REQUEST_LATENCY, seconds * 1e6)
            self._metrics.observe_at(own_latency, DURATION, seconds)
        if self._requests == "all" or (code != "OK" and self._requests == "errors"):
            self._writer.put((time.time(), request, key, seconds, message))

    def _find_slots(self, entrypoint: str, api: str, model: str, version: int | None, code: str) -> tuple[int, ...]:
        name = model if model in self.models else ""
        number = str(version) if version is not None and name else ""
        slot, own = self._metrics.slot, (name, number, api, entrypoint)
        slots = (  # 0: not counted
            slot(REQUEST_COUNT, name, code),
            slot(REQUEST_LATENCY, name, api, entrypoint) if code == "OK" else 0,
            slot(REQUESTS, *own, code),
            slot(DURATION, *own) if code == "OK" else 0,
        )
        if name == model:
            self._request_slots[entrypoint, api, model, version, code] = slots
        return slots

    # Models

    def count_batch(
        self,
        model: str,
        version: int,
        api: str,  # Predict, Classify, Regress
        sizes: Sequence[int],  # rows of each request in the batch
        seconds: float,  # duration of the model call
        waits: Iterable[float],  # seconds that each request was queued
    ) -> None:
        """Count one model call."""
        key = (model, version, api)
        slots = self._batch_slots.get(key)
        if slots is None:
            slot = self._metrics.slot
            own = (slot(BATCH_ROWS, model, str(version)), slot(QUEUING_LATENCY, model), slot(RUN_COUNT))
            slots = self._batch_slots[key] = (*own, slot(RUNTIME_LATENCY, model, api, self._runtime), slot(INPUT_SIZE))
        batch, queuing, runs, runtime, input_size = slots
        self._values[runs] += 1
        observe = self._metrics.observe_at
        observe(batch, BATCH_ROWS, sum(sizes))
        observe(runtime, RUNTIME_LATENCY, seconds * 1e6)
        for size, wait in zip(sizes, waits, strict=True):
            observe(input_size, INPUT_SIZE, size)
            observe(queuing, QUEUING_LATENCY, wait * 1e6)

    def set_version_state(self, state: str, model: str, status: VersionStatus) -> None:
        """Record the new state of a version: a state listener of `ModelManager`."""
        key, now = (model, status.version), time.monotonic()
        for name in _STATES:
            self._metrics.set(STATE, model, str(status.version), name, value=float(name == state))
        if state == "LOADING":
            self._loading_since[key] = now
        elif (began := self._loading_since.pop(key, None)) is not None and state == "AVAILABLE":
            self._metrics.set(LOADING, str(self.index), model, str(status.version), value=now - began)

    def count_warm_up(
        self,
        path: Path | str,  # folder of the version
        code: str,  # OK, or why the version was rejected
        seconds: float,
        requests: int,  # warm-up requests that succeeded
    ) -> None:
        """Count the warm-up of a version."""
        self._metrics.observe(WARMUP_LATENCY, str(path), code, value=seconds * 1e6)
        self._metrics.increment(WARMUP_RECORDS, str(path), code, amount=requests)

    def count_shadow(
        self,
        model: str,
        version: int,  # serving version
        shadow: int,  # shadow version
        result: str,  # compared, failed or skipped
        rows: int = 0,  # compared rows
        agreeing: int = 0,  # compared rows with equal string outputs
        difference: float = 0.0,  # largest difference of two numeric outputs
    ) -> None:
        """Count a shadow request."""
        labels = (model, str(version), str(shadow))
        self._metrics.increment(SHADOW_REQUESTS, *labels, result)
        if result == "compared":
            self._metrics.increment(SHADOW_ROWS, *labels, amount=rows)
            self._metrics.increment(SHADOW_AGREEING, *labels, amount=agreeing)
            slot = self._metrics.slot(SHADOW_DIFFERENCE, str(self.index), *labels)
            self._values[slot] = max(self._values[slot], difference)

    def count_examples(self, model: str, rows: int) -> None:
        """Count the examples of a request."""
        self._metrics.observe(EXAMPLE_COUNTS, model, value=rows)
        self._metrics.increment(EXAMPLE_TOTAL, model, amount=rows)

    def count_cache_lookup(
        self,
        model: str,
        hit: bool,
        size: int,  # bytes of the response cache
    ) -> None:
        """Count a lookup in the response cache."""
        self._metrics.increment(CACHE, model, "hit" if hit else "miss")
        self._metrics.set(CACHE_BYTES, value=size)

    def set_queued(self, model: str, version: int, requests: int) -> None:
        """Record the queue size of a version: for samplers."""
        self._metrics.set(QUEUED, model, str(version), value=requests)

    def count_logged(self, model: str, logged: bool) -> None:
        """Count a request sampled for the request log, logged or dropped."""
        self._metrics.increment(LOG_COUNT, model, "0" if logged else "8")

    def export_dropped(
        self,
        log: str,  # name of the log
        writer: BackgroundWriter,
    ) -> None:
        """Export how many entries a log dropped or could not write."""
        slot = self._metrics.slot(DROPPED, log)
        before = self._values[slot]  # count of the process that this one replaces

        def sample() -> None:
            self._values[slot] = before + writer.dropped + writer.failed

        self.samplers.append(sample)

    def _write_line(self, entry: tuple) -> None:
        moment, request, (entrypoint, api, model, version, code), seconds, message = entry
        line = {"time": _timestamp(moment), "level": "info" if code == "OK" else "warning", "logger": "mlkit.requests"}
        line |= {"process": self.index, "trace_id": request.trace.trace, "span_id": request.trace.span}
        line |= {"parent_id": request.trace.parent} if request.trace.parent else {}
        line |= {"entrypoint": entrypoint, "api": api, "model": model[:100], "version": version, "status": code}
        line |= {"milliseconds": round(seconds * 1000, 3)} | (
            {"principal": request.principal} if request.principal else {}
        )
        if message:
            masked = any(name in message for name in self._sensitive)
            line["message"] = "(it names a sensitive feature)" if masked else message[:1000]
        self._write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")

    # Reading

    def sample(self) -> None:
        """Update the gauges of this process: regularly, since any process may be scraped."""
        for sampler in self.samplers:
            sampler()
        self._metrics.set(MEMORY, str(self.index), value=_resident_bytes())
        self._metrics.set(PROCESSOR, str(self.index), value=time.process_time())

    def read(self) -> bytes:
        """Metrics of all processes in Prometheus's text format; from any thread."""
        samples = read_metrics(self.folder, METRICS)
        if batches := [values for (metric, _), values in samples.items() if metric == BATCH_ROWS]:
            samples[PROCESSED_SIZE, ()] = [sum(column) for column in zip(*batches, strict=True)]
        return exposition(METRICS, samples)

    def close(self) -> None:
        """Write the queued log lines; nothing may be counted afterwards."""
        self._writer.close()
        self._metrics.close()


_STATES = ("START", "LOADING", "AVAILABLE", "UNLOADING", "END")


def _to_standard_error(line: bytes) -> None:
    os.write(2, line)  # one call, so that lines of several processes do not mix


def _resident_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss
