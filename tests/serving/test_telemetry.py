"""Telemetry of a server: metrics of all processes, traces, log lines, and the request/response log."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client import parser
from prometheus_client.parser import text_string_to_metric_families

from mlkit.errors import ServingError
from mlkit.export.signatures import PREDICT, SignatureInfo, TensorInfo
from mlkit.serving.metrics import (
    INPUT_SIZE,
    MEMORY,
    METRICS_PATH,
    PROCESSED_SIZE,
    REQUEST_COUNT,
    REQUEST_LATENCY,
    SHADOW_DIFFERENCE,
    Request,
    read_trace,
)
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.options import LogOptions
from mlkit.serving.protocol import VersionStatus
from mlkit.serving.request_log import RequestLog
from mlkit.serving.rest import CERTIFICATE, RestApplication
from mlkit.serving.server import RunningServer
from mlkit.serving.sources import FolderSource, ServingPlan, VersionSpec
from mlkit.serving.telemetry import BackgroundWriter, JsonLines, Telemetry, current_request
from tests.conftest import free_port, wait_until
from tests.serving.test_server import WINE, converted, row, serve, shelf, write_version  # noqa: F401  fixtures

COUNT = ":tensorflow:serving:request_count"
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def numbers(text: str) -> dict[tuple[str, frozenset], float]:
    """All samples of a scrape."""
    families = list(parser.text_string_to_metric_families(text))  # which adds _total to names that lack it
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(lines)
    renamed = {
        f"{family.name}_total" for family in families if family.type == "counter" and f"\n{family.name}{{" in text
    }
    return {
        (name.removesuffix("_total") if name in renamed else name, family): value
        for (name, family), value in samples.items()
    }


def total(samples: dict, name: str, **labels: str) -> float:
    """The sum of a metric's numbers that have certain labels."""
    return sum(
        value for (metric, own), value in samples.items() if metric == name and labels.items() <= dict(own).items()
    )


def scrape(server: RunningServer) -> dict[tuple[str, frozenset], float]:
    answer = httpx.get(server.url + METRICS_PATH)
    assert answer.status_code == 200
    return numbers(answer.text)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def ask(server: RunningServer, row: dict, times: int, **headers: str) -> httpx.Response:  # noqa: F811
    with httpx.Client(headers={"connection": "close"} | headers) as client:  # any process, each time
        for _ in range(times):
            answer = client.post(f"{server.url}{WINE}:predict", json={"instances": [row]})
    return answer


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory,
    converted: Path,  # noqa: F811
) -> Iterator[RunningServer]:
    """Two processes that log every request, and have something to hide."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "wine").mkdir()
    write_version(folder / "wine", 1, converted)
    logs = LogOptions(str(folder / "logs"), request_sampling_rate=1.0, masked_features=("proline",))
    with serve(folder / "wine", processes=2, logs=logs) as server:
        server.__dict__["logs"] = folder / "logs"
        yield server


def test_every_scrape_has_the_sum_over_processes(watched: RunningServer, row: dict) -> None:  # noqa: F811
    before = total(scrape(watched), COUNT, model_name="wine", status="OK")
    ask(watched, row, 60)
    ask(watched, {}, 7)
    for _ in range(10):  # each goes to whichever process is free
        samples = scrape(watched)
        assert total(samples, COUNT, model_name="wine", status="OK") == before + 60
        assert total(samples, "mlkit_requests_total", version="1", status="INVALID_ARGUMENT") == 7
        latency = {"model_name": "wine", "API": "predict", "entrypoint": "REST"}
        assert total(samples, ":tensorflow:serving:request_latency_count", **latency) == before + 60
        assert total(samples, ":tensorflow:serving:request_latency_bucket", le="+Inf", **latency) == before + 60
        assert total(samples, "mlkit_model_version_state", version="1", state="AVAILABLE") == 2
        assert total(samples, "mlkit_requests_in_progress") == 0
    assert {dict(labels)["process"] for name, labels in samples if name.startswith("mlkit_process_res")} == {"0", "1"}
    assert total(samples, "mlkit_batch_rows_sum", model="wine", version="1") >= 60
    assert total(samples, ":tensorflow:serving:runtime_latency_count", API="Predict") >= 60
    assert total(samples, ":tensorflow:serving:batching_session:queuing_latency_count") >= 60
    rows = [
        total(samples, f":tensorflow:serving:batching_session:{name}_batch_size_sum") for name in ("input", "processed")
    ]
    assert rows[0] == rows[1] == total(samples, "mlkit_batch_rows_sum") >= 60
    warm = ":tensorflow:serving:model_warmup_latency"
    assert total(samples, f"{warm}_count", status="OK") == 2
    assert total(samples, f"{warm}_sum", status="OK") > 0
    assert total(samples, ":tensorflow:serving:model_warmup_records_read", status="OK") >= 40


def test_metrics_survive_a_killed_process(shelf: Path, row: dict) -> None:  # noqa: F811
    with serve(shelf, processes=2) as server:
        ask(server, row, 30)
        os.kill(server.pids[0], signal.SIGKILL)
        for _ in range(10):
            assert total(scrape(server), COUNT, status="OK") == 30
        wait_until(lambda: total(scrape(server), "mlkit_model_version_state", state="AVAILABLE") == 2)
        ask(server, row, 10)
        assert total(scrape(server), COUNT, status="OK") == 40


def test_unknown_model_names_create_no_metrics(watched: RunningServer) -> None:
    before = scrape(watched)
    with httpx.Client(headers={"connection": "close"}) as client:
        for number in range(200):
            path = f"/v1/models/invented{number}:predict" if number % 2 else f"{WINE}/versions/{number + 7}:predict"
            assert client.post(watched.url + path, json={"instances": [{}]}).status_code == 404
    after = scrape(watched)
    assert total(after, COUNT, status="NOT_FOUND") == total(before, COUNT, status="NOT_FOUND") + 200
    assert len(after) < len(before) + 20


@pytest.mark.skipif(not shutil.which("prometheus"), reason="there is no Prometheus here")
def test_prometheus_scrapes_the_server(watched: RunningServer, row: dict, tmp_path: Path) -> None:  # noqa: F811
    address, port = watched.url.removeprefix("http://"), free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n"
        f"  - {{job_name: mlkit, metrics_path: {METRICS_PATH}, static_configs: [{{targets: ['{address}']}}]}}\n"
    )
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    prometheus = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def query(text: str) -> float | None:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text})
        except httpx.TransportError:  # it is not there yet
            return None
        if answer.status_code == 503:  # it is about to be
            return None
        document = answer.json()
        return float(document["data"]["result"][0]["value"][1]) if document["data"]["result"] else None

    try:
        count = f'sum({{__name__="{COUNT}",model_name="wine",status="OK"}})'
        wait_until(lambda: query("up") == 1)
        ask(watched, row, 40)
        expected = total(scrape(watched), COUNT, model_name="wine", status="OK")
        wait_until(lambda: query(count) == expected, 30)
        for metric, unit in ((":tensorflow:serving:request_latency", 1e6), ("mlkit_request_duration_seconds", 1)):
            half = query(f'histogram_quantile(0.5, sum by (le) ({{__name__="{metric}_bucket"}}))')
            assert 1e-5 * unit < half < 10 * unit
        assert query('sum(mlkit_model_version_state{state="AVAILABLE"})') == 2
        assert query("sum(mlkit_process_resident_memory_bytes)") > 20e6
    finally:
        prometheus.terminate()
        prometheus.wait()


# Traces and lines, in this process


class Times:
    """A model that multiplies, and fails at 13."""

    def __init__(self, folder: Path):
        info = TensorInfo("x", np.dtype("float32"), (None, 1), "x")
        self.signatures = {"serving_default": SignatureInfo("serving_default", {"x": info}, {"x": info}, PREDICT)}

    def run(self, signature: str, inputs: dict) -> dict:
        if (inputs["x"] == 13).any():
            raise RuntimeError("13")
        return {"x": inputs["x"] * 2}

    def close(self) -> None:
        """Nothing to give back."""


def in_process(tmp_path: Path, sent: list[tuple[object, dict]], **options: object) -> tuple[list, list, Telemetry]:
    """Send requests to a server in this process: responses, log lines and its telemetry."""
    (tmp_path / "times").mkdir()
    (tmp_path / "times" / "saved_model.pb").touch()
    lines: list[bytes] = []
    telemetry = Telemetry(tmp_path, models=["times"], write=lines.append, **options)

    async def run() -> list[httpx.Response]:
        manager = ModelManager({"times": FolderSource(tmp_path / "times")}, Times)
        await manager.update()
        application = RestApplication(manager, telemetry=telemetry)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://here") as client:
            bodies = [{"content": body} if isinstance(body, bytes) else {"json": body} for body, _ in sent]
            requests = [
                client.post("/v1/models/times:predict", headers=headers, **body)
                for body, (_, headers) in zip(bodies, sent, strict=True)
            ]
            answers = await asyncio.gather(*requests)
        await manager.close()
        return answers

    return asyncio.run(run()), lines, telemetry


def test_a_trace_is_continued_or_started(tmp_path: Path) -> None:
    good = {"instances": [[1.0]]}
    headers = [
        {"traceparent": GIVEN},
        {},
        {"traceparent": GIVEN.upper()},
        {"traceparent": "00-" + "0" * 32 + GIVEN[35:]},
    ]
    answers, lines, telemetry = in_process(tmp_path, [(good, header) for header in headers], requests="all")
    telemetry.close()
    parts = [answer.headers["traceparent"].split("-") for answer in answers]
    assert parts[0][1] == GIVEN[3:35]
    assert parts[0][2] != GIVEN[36:52]
    assert parts[0][3] == "01"
    traces = [trace for _, trace, _, _ in parts]
    assert len(set(traces)) == 4
    assert all(len(trace) == 32 and int(trace, 16) for trace in traces)
    logged = {line["trace_id"]: line for line in map(json.loads, lines)}
    assert set(logged) == set(traces)
    assert (logged[traces[0]]["parent_id"], logged[traces[0]]["version"]) == (GIVEN[36:52], 1)


def test_errors_get_a_log_line(tmp_path: Path) -> None:
    requests = [({"instances": [[value]]}, {"traceparent": GIVEN}) for value in (1.0, 13.0)] + [(b"{", {})]
    answers, lines, telemetry = in_process(tmp_path, requests)
    telemetry.sample()
    text = telemetry.read().decode()
    telemetry.close()
    assert Counter(answer.status_code for answer in answers) == {200: 1, 500: 1, 400: 1}
    entries = [json.loads(line) for line in lines]
    assert sorted(line["status"] for line in entries) == ["INTERNAL", "INVALID_ARGUMENT"]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    failed = next(line for line in entries if line["status"] == "INTERNAL")
    assert (failed["trace_id"], failed["model"], failed["version"]) == (GIVEN[3:35], "times", 1)
    assert total(numbers(text), "mlkit_requests_total", status="INTERNAL", version="1") == 1


def test_the_name_in_a_certificate_is_in_the_log_line(tmp_path: Path) -> None:
    lines: list[bytes] = []
    telemetry = Telemetry(tmp_path, models=["times"], write=lines.append, requests="all")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()

    async def run() -> None:
        manager = ModelManager({"times": FolderSource(tmp_path)}, Times)
        await manager.update()
        application = RestApplication(manager, telemetry=telemetry, client_certificates=True)

        async def certified(scope: dict, *channels: Callable) -> None:
            await application(scope | {"state": {CERTIFICATE: "webshop"}}, *channels)

        for target in (certified, application):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(target), base_url="http://here") as client:
                answer = await client.post("/v1/models/times:predict", json={"instances": [[1.0]]})
                assert answer.status_code == 200
        await manager.close()

    asyncio.run(run())
    telemetry.close()
    assert [json.loads(line).get("principal") for line in lines] == ["webshop", None]


class TwoVersions:
    """A source with a serving version and a shadow version."""

    def __init__(self, folder: Path):
        versions = tuple(VersionSpec(number, folder / str(number)) for number in (1, 2))
        self.plan = ServingPlan(versions, None, 1, {"challenger": 2})

    def poll(self) -> ServingPlan:
        return self.plan


class Halves(Times):
    """Its version 2 returns half as much, and rejects values above 100."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.number = int(folder.name)

    def run(self, signature: str, inputs: dict) -> dict:
        if self.number == 2 and (inputs["x"] > 100).any():
            raise ServingError("INVALID_ARGUMENT", "too much")
        return {"x": super().run(signature, inputs)["x"] / self.number}


def test_shadow_results_are_counted_under_both_versions(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, models=["times"])

    async def run() -> None:
        manager = ModelManager({"times": TwoVersions(tmp_path)}, Halves, shadow="challenger")
        manager.on_shadow = telemetry.count_shadow
        await manager.update()
        served = manager.model("times").loaded[1]
        for value, rows in ((0.25, 1), (0.5, 3), (200.0, 1)):
            with manager.acquire("times") as version:
                await version.run("serving_default", {"x": np.full((rows, 1), value, "float32")}, rows)
        while served.shadow._tasks:
            await asyncio.sleep(0)
        for _ in range(70):  # at once: more than are compared
            served.shadow.mirror("serving_default", {"x": np.ones((1, 1), "float32")}, 1, {})
        await manager.close()

    asyncio.run(run())
    telemetry.sample()
    samples = numbers(telemetry.read().decode())
    telemetry.close()
    about = {"model": "times", "version": "1", "shadow": "2"}
    assert total(samples, "mlkit_shadow_requests_total", result="compared", **about) == 2
    assert total(samples, "mlkit_shadow_requests_total", result="skipped", **about) == 6
    assert total(samples, "mlkit_shadow_requests_total", result="failed", **about) == 1 + 64  # the answers had no form
    assert total(samples, "mlkit_shadow_rows_total", **about) == 4
    assert total(samples, "mlkit_shadow_rows_agreeing_total", **about) == 4
    assert total(samples, "mlkit_shadow_largest_difference", process="0", **about) == 0.5


def test_the_server_writes_json_lines(shelf: Path, project: Path) -> None:  # noqa: F811
    port = free_port()
    command = ["--set", "serving.log_format=json", "serve", f"wine={shelf}", "--runtime", "litert", "--port", str(port)]
    with open(project / "lines", "wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlkit", *command], stdout=subprocess.DEVNULL, stderr=errors, cwd=project
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{url}/readyz"))
            answer = httpx.post(url + WINE + ":predict", content=b"{", headers={"traceparent": GIVEN})
            assert answer.status_code == 400
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    texts = (project / "lines").read_text().splitlines()
    lines = [json.loads(text) for text in texts if not text.startswith("INFO: ")]  # LiteRT has a way of its own
    assert GIVEN[3:35] in [line.get("trace_id") for line in lines]
    assert any(line["message"] == "wine/1 is loaded" for line in lines if "message" in line)


# Request/response log


def test_requests_are_logged_without_sensitive_features(watched: RunningServer, row: dict) -> None:  # noqa: F811
    secret = row | {"proline": 1234567.0}
    trace = ask(watched, secret, 1, traceparent=GIVEN).headers["traceparent"]
    assert trace.startswith(GIVEN[:35])
    folder = watched.__dict__["logs"]

    def entries() -> list[dict]:
        return [json.loads(line) for path in folder.glob("requests-*.jsonl") for line in path.read_text().splitlines()]

    entry = wait_until(lambda: next((logged for logged in entries() if logged["trace_id"] == GIVEN[3:35]), None), 20)
    assert (entry["model"], entry["version"], entry["rows"]) == ("wine", 1, 1)
    assert entry["inputs"]["proline"] == "***"
    assert entry["inputs"]["alcohol"] == [1.0]
    assert "1234567" not in "".join(path.read_text() for path in folder.iterdir())
    samples = scrape(watched)
    assert total(samples, ":tensorflow:serving:request_log_count", status_code="0") == len(entries())


def test_tf_serving_reads_the_records(tmp_path: Path) -> None:
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    import tensorflow as tf

    model = Times(tmp_path)
    model.model, model.number = "times", 3
    log = RequestLog(tmp_path, sampling_rate=1.0, log_format="tfrecord")
    for number in range(3):
        x = np.full((2, 1), number, "float32")
        log.add(model, "serving_default", {"x": x}, 2, {"x": x * 2})
    log.close()
    records = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(tmp_path / "requests-0.tfrecord"))
    ]
    assert [tf.make_ndarray(logged.predict_log.request.inputs["x"]).tolist() for logged in records][2] == [[2.0], [2.0]]
    assert tf.make_ndarray(records[1].predict_log.response.outputs["x"]).tolist() == [[2.0], [2.0]]
    assert records[0].log_metadata.model_spec.version.value == 3


def test_a_stalled_log_delays_no_request(tmp_path: Path) -> None:
    gate, model = threading.Event(), Times(tmp_path)
    model.model, model.number = "times", 1
    logged: list[bool] = []
    log = RequestLog(tmp_path, sampling_rate=1.0, on_sampled=lambda _, queued: logged.append(queued))
    write, log.file.write = log.file.write, lambda data: (gate.wait(), write(data))
    x = np.zeros((1, 1), "float32")
    for _ in range(3000):
        log.add(model, "serving_default", {"x": x}, 1, {"x": x})
    assert logged.count(False) == 3000 - logged.count(True) > 1900
    gate.set()
    log.close()
    assert len((tmp_path / "requests-0.jsonl").read_text().splitlines()) == logged.count(True)


def test_the_queue_of_a_writer_is_limited_in_bytes(tmp_path: Path) -> None:
    gate = threading.Event()
    writer = BackgroundWriter(lambda entry: gate.wait(), size=1000)
    taken = [writer.put(b"", 300) for _ in range(10)]
    gate.set()
    writer.close()
    assert (sum(taken), writer.dropped) == (3, 7)


# Telemetry of two processes, without a server


def test_json_lines_carry_the_trace_of_the_current_request() -> None:
    record = logging.LogRecord("mlkit.server", logging.WARNING, "", 0, "%s is\nrejected", ("digits/4",), None)
    trace = read_trace(GIVEN.encode())
    token = current_request.set(Request("REST", trace))
    line = JsonLines(process=1).format(record)
    current_request.reset(token)
    entry = json.loads(line)
    assert (entry["trace_id"], entry["message"], entry["process"]) == (trace.trace, "digits/4 is\nrejected", 1)
    assert "trace_id" not in JsonLines().format(record)
    assert "\n" not in line


def test_a_full_queue_drops_entries_and_counts_them() -> None:
    gate, written = threading.Event(), []
    writer = BackgroundWriter(lambda entry: (gate.wait(), written.append(entry)), entries=3)
    taken = [writer.put(number) for number in range(10)]
    gate.set()
    writer.close()
    assert (len(written), writer.dropped) == (sum(taken), 10 - sum(taken))
    assert 3 <= sum(taken) <= 4
    tight = BackgroundWriter(lambda entry: 1 / entry, size=1000)
    assert [tight.put(0, size=size) for size in (1001, 10)] == [False, True]
    tight.close()
    assert (tight.dropped, tight.failed) == (1, 1)


def handle(
    telemetry: Telemetry,
    entrypoint: str,
    model: str,
    version: int | None,
    *outcome: str,
    client: str = "",
    header: bytes | None = None,
) -> None:
    """Count one request."""
    request = telemetry.start_request(entrypoint, header)
    request.model, request.version, request.principal = model, version, client
    telemetry.end_request(request, "predict" if entrypoint == "REST" else "Predict", *outcome)


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[tuple[dict, list[bytes]]]:
    """Prometheus's families for two processes that handled some requests, and their log lines."""
    lines: list[bytes] = []
    first, second = (Telemetry(tmp_path, index, models=["digits"], write=lines.append) for index in range(2))
    for _ in range(3):
        handle(first, "REST", "digits", 3)
    invalid = ("INVALID_ARGUMENT", "pixels are missing")
    handle(second, "REST", "digits", 3, *invalid, client="shop", header=GIVEN.encode())
    for name in ("x" * 5000, "../../etc/passwd"):
        handle(second, "GRPC", name, None, "NOT_FOUND")
    first.count_batch("digits", 3, "Predict", [1, 1, 6], 0.0004, [0.0, 0.0001, 0.0002])
    second.count_batch("digits", 4, "Predict", [16], 0.0008, [0.0])
    first.count_warm_up("/models/digits/3", "OK", 0.012, 53)
    first.count_shadow("digits", 3, 4, "compared", 8, 7, 0.25)
    second.count_shadow("digits", 3, 4, "compared", 16, 16, 0.125)
    second.count_shadow("digits", 3, 4, "skipped")
    second.set_version_state("LOADING", "digits", VersionStatus(4, "LOADING"))
    second.set_version_state("AVAILABLE", "digits", VersionStatus(4, "AVAILABLE"))
    first.sample()
    second.sample()
    families = {family.name: family for family in text_string_to_metric_families(first.read().decode())}
    first.close()
    second.close()
    return families, lines


def test_metrics_are_those_of_both_processes(scraped: tuple[dict, list[bytes]]) -> None:
    families, _ = scraped
    counts = {(s.labels["model_name"], s.labels["status"]): s.value for s in families[REQUEST_COUNT.name].samples}
    assert counts == {("digits", "OK"): 3, ("digits", "INVALID_ARGUMENT"): 1, ("", "NOT_FOUND"): 2}
    latency = [s for s in families[REQUEST_LATENCY.name].samples if s.name.endswith("_bucket")]
    assert (len(latency), latency[-1].labels["le"], latency[-1].value) == (34, "+Inf", 3)
    shadows = {s.labels["result"]: s.value for s in families["mlkit_shadow_requests"].samples}
    rows = [families[f"mlkit_shadow_{name}"].samples[0].value for name in ("rows", "rows_agreeing")]
    assert (shadows, rows) == ({"compared": 2, "skipped": 1}, [24, 23])
    assert max(s.value for s in families[SHADOW_DIFFERENCE.name].samples) == 0.25
    sums = [
        {s.name.rpartition("_")[2]: s.value for s in families[metric.name].samples if "bucket" not in s.name}
        for metric in (INPUT_SIZE, PROCESSED_SIZE)
    ]
    assert sums == [{"sum": 24, "count": 4}, {"sum": 24, "count": 2}]
    memory = {s.labels["process"]: s.value for s in families[MEMORY.name].samples}
    assert (sorted(memory), min(memory.values()) > 2**20) == (["0", "1"], True)


def test_each_failed_request_has_a_line(scraped: tuple[dict, list[bytes]]) -> None:
    _, lines = scraped
    assert len(lines) == 3
    entry = next(json.loads(line) for line in lines if b"pixels" in line)
    assert (entry["trace_id"], entry["parent_id"], entry["status"]) == (GIVEN[3:35], GIVEN[36:52], "INVALID_ARGUMENT")
    assert entry["principal"] == "shop"


def test_a_message_that_names_a_sensitive_feature_is_replaced(tmp_path: Path) -> None:
    lines: list[bytes] = []
    telemetry = Telemetry(tmp_path, 2, models=["digits"], write=lines.append, sensitive=["income"])
    handle(telemetry, "REST", "digits", 3, "INVALID_ARGUMENT", "income is 99,000 in row 3")
    telemetry.close()
    assert "99,000" not in lines[0].decode()


def test_telemetry_of_a_request_is_cheap(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, models=["digits"])
    best = min(timeit.repeat(lambda: handle(telemetry, "REST", "digits", 3), number=2000, timer=time.process_time))
    telemetry.close()
    assert best / 2000 < 200e-6  # a few microseconds; the bound allows for a slow and busy machine
