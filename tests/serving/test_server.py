"""The model server: real processes, called over HTTP, with version swaps, overload, kills and graceful shutdown."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import mlkit.serving.http as http_module
import mlkit.serving.server as server_module
from mlkit.data import load_dataset
from mlkit.errors import MlkitError
from mlkit.export import convert_model, export_saved_model
from mlkit.export.signatures import PREDICT, SignatureInfo, TensorInfo
from mlkit.models import build_model
from mlkit.registry import Registry
from mlkit.runs import Run
from mlkit.serving import ServerOptions, running_server
from mlkit.serving.batcher import BatchingConfig
from mlkit.serving.metrics import METRICS_PATH
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.options import ServedPath
from mlkit.serving.rest import RestApplication
from mlkit.serving.server import ProcessStatusBoard, RunningServer
from mlkit.serving.sources import FolderSource
from mlkit.training import fit
from tests.conftest import Crowd, MemoryTransport, free_port, run_cli, wait_until
from tests.registry.test_store import make_run, place, signing  # noqa: F401  fixtures
from tests.runs.test_store_failures import fill_up

WINE = "/v1/models/wine"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the wines, converted: its processes start in a moment."""
    data = load_dataset("wine")
    folder = tmp_path_factory.mktemp("wine")
    convert_model(build_model("linear", data), data, folder / "litert", ["float32"])
    return folder


@pytest.fixture(scope="module")
def row(converted: Path) -> dict[str, float]:
    """A request."""
    features = json.loads((converted / "litert" / "float32" / "preprocessing.json").read_text())["features"]
    return {feature["name"]: 1.0 for feature in features}


def write_version(shelf: Path, number: int, converted: Path) -> Path:
    """A version whose class names contain its number, moved into place atomically."""
    hidden, target = shelf / f".{number}", shelf / str(number)
    shutil.copytree(converted, hidden)
    record = hidden / "litert" / "float32" / "preprocessing.json"
    content = json.loads(record.read_text())
    content["classes"] = [f"{number}:{name}" for name in content["classes"]]
    record.write_text(json.dumps(content))
    return hidden.rename(target)


@pytest.fixture
def shelf(tmp_path: Path, converted: Path) -> Path:
    """A folder with version 1."""
    folder = tmp_path / "wine"
    folder.mkdir()
    write_version(folder, 1, converted)
    return folder


def serve(shelf: Path, **options: object) -> AbstractContextManager[RunningServer]:
    options = {"runtime": "litert", "poll_interval": 0.05} | options
    return running_server(ServedPath("wine", path=str(shelf)), **options)


def states(server: RunningServer) -> dict[int, str]:
    statuses = httpx.get(server.url + WINE).json()["model_version_status"]
    return {int(status["version"]): status["state"] for status in statuses}


def answered_by(server: RunningServer, row: dict, place: str = "", **headers: str) -> str:  # noqa: F811  of a URL
    """The version of a response, by its header, which must match the prediction."""
    answer = httpx.post(f"{server.url}{WINE}{place}:predict", json={"instances": [row]}, headers=headers)
    assert answer.status_code == 200, answer.text
    number, _, _ = answer.json()["predictions"][0]["class"].partition(":")
    assert answer.headers["model-version"] == number
    return number


class Clients(Crowd):
    """Clients of the wines' model; each prediction must belong to the version in its header."""

    def __init__(self, server: RunningServer, row: dict, threads: int = 4):
        super().__init__(*[self._rest] * threads)
        self.url, self.body = f"{server.url}{WINE}:predict", json.dumps({"instances": [row]})
        self.answers: list[str] = []

    def _rest(self) -> Iterator[None]:
        with httpx.Client() as client:
            while True:
                answer = client.post(self.url, content=self.body)
                number = answer.json().get("predictions", [{}])[0].get("class", "").partition(":")[0]
                if answer.status_code != 200 or number != answer.headers["model-version"]:
                    self.failures.append((answer.status_code, answer.text))
                self.answers.append(number)
                yield


# The status board


def test_versions_are_common_when_all_processes_have_published_them(tmp_path: Path) -> None:
    first, second = ProcessStatusBoard(tmp_path, 2, 0), ProcessStatusBoard(tmp_path, 2, 1)
    first.publish({"loaded": {"churn": [1, 2]}})
    assert first.common_versions("churn") == set()
    second.publish({"loaded": {"churn": [2]}})
    assert first.common_versions("churn") == {2}
    second.remove(1)
    assert first.common_versions("churn") == set()


def test_a_reload_request_reaches_all_processes(tmp_path: Path) -> None:
    first, second = ProcessStatusBoard(tmp_path, 2, 0), ProcessStatusBoard(tmp_path, 2, 1)
    before = first.reload_token()
    second.request_reload()
    assert first.reload_token() != before
    assert first.reload_token() == second.reload_token()


# Version swaps


def test_twenty_swaps_under_load_lose_and_misroute_no_request(shelf: Path, converted: Path, row: dict) -> None:
    with serve(shelf, processes=2) as server, Clients(server, row) as crowd:
        wait_until(lambda: "1" in crowd.answers)
        for number in range(2, 22):
            write_version(shelf, number, converted)
            wait_until(lambda number=number: crowd.answers[-20:] == [str(number)] * 20, 60)
        wait_until(lambda: states(server)[20] == "END" and states(server)[21] == "AVAILABLE")
    assert crowd.failures == []
    assert set(crowd.answers) == {str(number) for number in range(1, 22)}


def test_a_version_that_cannot_be_loaded_is_rejected_until_it_is_repaired(
    shelf: Path, converted: Path, row: dict
) -> None:
    with serve(shelf, processes=2) as server, Clients(server, row) as crowd:
        wait_until(lambda: "1" in crowd.answers)
        hidden = write_version(shelf, 2, converted).rename(shelf / ".2")
        network = hidden / "litert" / "float32" / "model.tflite"
        whole = network.read_bytes()
        network.write_bytes(whole[: len(whole) // 2])  # as in the middle of a copy
        hidden.rename(shelf / "2")
        wait_until(lambda: states(server).get(2) == "END")
        (status,) = httpx.get(f"{server.url}{WINE}/versions/2").json()["model_version_status"]
        assert status["status"]["error_code"] == "FAILED_PRECONDITION"
        assert "is not the file that was converted" in status["status"]["error_message"]
        assert answered_by(server, row) == "1"
        (shelf / "2" / "litert" / "float32" / "model.tflite").write_bytes(whole)
        wait_until(lambda: crowd.answers[-20:] == ["2"] * 20)
    assert crowd.failures == []
    assert set(crowd.answers) == {"1", "2"}


def test_reload_polls_at_once_and_in_all_processes(shelf: Path, converted: Path, row: dict) -> None:
    with serve(shelf, processes=2, poll_interval=1.0) as server:
        write_version(shelf, 2, converted)
        assert httpx.post(f"{server.url}/reload").status_code == 200
        wait_until(lambda: {answered_by(server, row) for _ in range(10)} == {"2"})
        server.supervisor.send_signal(signal.SIGHUP)
        assert answered_by(server, row) == "2"


# The registry


def test_the_registry_decides_which_version_serves(
    project: Path, converted: Path, row: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    registry = Registry(project / "models")
    for number in (1, 2, 3):
        registry.register(converted_run(project, converted, number), "wine", force=True)
    registry.promote("wine", 1)
    served = ServedPath("wine", reference="wine")
    with (
        pytest.raises(MlkitError, match=r"not signed|signature"),
        running_server(served, runtime="litert"),
    ):
        pass
    with running_server(served, runtime="litert", poll_interval=0.05, verify=False, shadow="challenger") as server:
        assert answered_by(server, row) == "1"
        registry.promote("wine", 2, alias="challenger")
        wait_until(lambda: httpx.get(f"{server.url}{WINE}/labels/challenger").status_code == 200)
        assert answered_by(server, row, "/labels/challenger") == "2"
        assert answered_by(server, row) == "1"
        shadow = wait_until(lambda: _shadow(server))
        assert (shadow["version"], shadow["rows"], shadow["rows_agreeing"], shadow["largest_difference"]) == (
            2,
            1,
            0,
            0.0,
        )
        numbers = httpx.get(server.url + METRICS_PATH).text
        assert 'mlkit_shadow_rows_total{model="wine",version="1",shadow="2"} 1\n' in numbers
        assert httpx.post(f"{server.url}{WINE}/versions/3:predict", json={"instances": [row]}).status_code == 404
        registry.split_traffic("wine", {1: 1, 2: 1})
        keys = [f"person {number}" for number in range(40)]
        wait_until(lambda: len({answered_by(server, row, **{"traffic-key": key}) for key in keys}) == 2)
        first, again = ([answered_by(server, row, **{"traffic-key": key}) for key in keys] for _ in range(2))
        assert first == again
        with pytest.raises(MlkitError):
            registry.delete("wine", 1)
        registry.promote("wine", 3)
        wait_until(lambda: answered_by(server, row) == "3" and states(server)[1] == "END")
        files = project / "models" / "wine" / "1" / "litert" / "float32" / "preprocessing.json"
        files.write_text(files.read_text().replace("1:", "9:"))
        registry.promote("wine", 2)
        wait_until(lambda: answered_by(server, row) == "2")
    with (
        pytest.raises(MlkitError, match=r"preprocessing\.json"),
        running_server(ServedPath("wine", reference="wine/1"), runtime="litert", verify=False),
    ):
        pass


def converted_run(project: Path, converted: Path, number: int) -> Run:
    """A completed run with a converted model whose class names contain a number."""
    run = make_run(project, others={})
    shutil.copytree(write_version(project, number, converted) / "litert", run.folder / "litert")
    return run


def refusal(server: RunningServer, number: int) -> str:
    """Reason why a version is rejected, once it is known."""

    def message() -> str:
        statuses = httpx.get(server.url + WINE).json()["model_version_status"]
        return next((status["status"]["error_message"] for status in statuses if status["version"] == str(number)), "")

    return wait_until(message)


def test_only_signed_and_unmodified_versions_are_loaded(
    place: Path,  # noqa: F811
    signing: Callable[[Run], Run],  # noqa: F811
    converted: Path,
    row: dict,
) -> None:
    from mlkit.registry import sign_folder
    from mlkit.registry.signing import KeySigner, new_key

    registry = Registry(place / "models")
    for number in (1, 2, 3):
        registry.register(signing(converted_run(place, converted, number)), "wine")
    stranger = converted_run(place, converted, 4)
    new_key(place / "mallory.pem", place / "mallory.pub")
    sign_folder(stranger.folder, KeySigner(place / "mallory.pem"))
    registry.register(stranger, "wine", force=True)
    registry.register(converted_run(place, converted, 5), "wine", force=True)
    registry.promote("wine", 1)
    registry.promote("wine", 2, alias="challenger")
    network = place / "models" / "wine" / "2" / "litert" / "float32" / "model.tflite"
    network.write_bytes(network.read_bytes()[:-1] + b"?")
    with running_server(ServedPath("wine", reference="wine"), runtime="litert", poll_interval=0.05) as server:
        assert "model.tflite has changed" in refusal(server, 2)
        for number, reason in ((4, "trusted"), (5, "not signed")):
            registry.promote("wine", number)
            assert reason in refusal(server, number)
            assert answered_by(server, row) == "1"
        registry.promote("wine", 3)
        wait_until(lambda: answered_by(server, row) == "3")


def test_a_registry_whose_disk_is_full_is_served_and_changes_when_there_is_room(
    small_disk: Path, converted: Path, row: dict
) -> None:
    registry = Registry(small_disk / "models")
    for number in (1, 2):
        registry.register(converted_run(small_disk.parent, converted, number), "wine", force=True)
    registry.promote("wine", 1)
    fill_up(small_disk)
    served = ServedPath("wine", reference="wine")
    with running_server(
        served, runtime="litert", poll_interval=0.05, verify=False, registry=str(registry.root)
    ) as server:
        assert answered_by(server, row) == "1"
        with pytest.raises(MlkitError, match="space"):
            registry.promote("wine", 2)
        assert httpx.post(f"{server.url}/reload").status_code == 200
        assert answered_by(server, row) == "1"
        (small_disk / "filler").unlink()
        registry.promote("wine", 2)
        wait_until(lambda: answered_by(server, row) == "2")


def _shadow(server: RunningServer) -> dict | None:
    (model,) = httpx.get(f"{server.url}/models").json()
    return model["shadow"] if model["shadow"] and model["shadow"]["rows"] else None


# Killed processes and shutdown


def readiness(server: RunningServer) -> dict:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=30).json()["processes"]
    except httpx.TransportError:  # its connection was the dead one's
        return {}


def test_a_killed_process_is_replaced_and_readiness_is_current(shelf: Path, row: dict) -> None:
    with serve(shelf, processes=2) as server:
        away = shelf.rename(shelf.with_name("away"))  # whoever takes its place finds nothing yet
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until(lambda: readiness(server) == {"ready": 1, "total": 2})
        assert answered_by(server, row) == "1"
        away.rename(shelf)
        wait_until(lambda: readiness(server) == {"ready": 2, "total": 2})
    with serve(shelf) as server:
        os.kill(server.pids[0], signal.SIGKILL)
        assert wait_until(lambda: readiness(server) or None) == {"ready": 1, "total": 1}
        assert answered_by(server, row) == "1"


def raw_request(server: RunningServer, body: bytes, announced: int | None = None) -> socket.socket:
    """The beginning of a request, on a socket of its own."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    length = len(body) if announced is None else announced
    head = f"POST {WINE}:predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_spawned_processes_serve_as_well(shelf: Path, row: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = (
        "import multiprocessing, mlkit.serving.server as server\n"
        "server._PROCESSES = multiprocessing.get_context('spawn')\n"
    )
    monkeypatch.setattr(server_module, "_RUN", spawn + server_module._RUN)
    with serve(shelf, processes=2) as server:
        assert answered_by(server, row) == "1"
        os.kill(server.pids[0], signal.SIGKILL)
        wait_until(lambda: not _lives(server.pids[0]) and readiness(server) == {"ready": 2, "total": 2})
        everybody = [process.pid for process in psutil.Process(server.supervisor.pid).children()]
        server.supervisor.kill()
        wait_until(lambda: not any(map(_lives, everybody)))


def test_the_supervisor_has_no_libraries_that_do_not_survive_a_fork(shelf: Path) -> None:
    with serve(shelf, processes=2) as server:
        supervisor = psutil.Process(server.supervisor.pid)
        assert [child.ppid() for child in map(psutil.Process, server.pids)] == [supervisor.pid] * 2
        libraries = " ".join(memory_map.path for memory_map in supervisor.memory_maps())
    assert not [name for name in ("tensorflow", "polars", "grpc", "uvloop") if name in libraries]


def test_sigterm_finishes_requests_in_progress(shelf: Path, row: dict) -> None:
    with serve(shelf, processes=2) as server:
        body = json.dumps({"instances": [row]}).encode()
        begun = raw_request(server, body[:10], len(body))
        wait_until(lambda: httpx.get(f"{server.url}/readyz").json()["ready"])  # it was read by now
        server.supervisor.terminate()
        wait_until(lambda: not _accepts(server))
        begun.sendall(body[10:])
        answer = begun.recv(100_000)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert server.supervisor.wait(60) == 0


def _accepts(server: RunningServer) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as attempt:
        return attempt.connect_ex((host, int(port))) == 0


def test_processes_stop_when_their_supervisor_is_killed(shelf: Path) -> None:
    with serve(shelf, processes=2) as server:
        mapped = [Path(memory_map.path) for memory_map in psutil.Process(server.pids[0]).memory_maps()]
        folder = next(path.parent for path in mapped if path.parent.name.startswith("mlkit-serve-"))
        assert (folder / "process-0.json").is_file()
        server.supervisor.kill()
        wait_until(lambda: not any(map(_lives, server.pids)))
        assert not folder.exists()  # the last one has tidied up


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Bad input


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, converted: Path) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("served") / "wine"
    folder.mkdir()
    write_version(folder, 1, converted)
    with serve(folder, body_bytes=1_000_000, batching=BatchingConfig(timeout=1.0)) as server:
        yield server
        assert _lives(server.pids[0])  # after all requests


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, ""),
        (b"{", 400, ""),
        (b"\xff\xfe{}", 400, ""),
        (b"[" * 100_000, 400, ""),
        (b'{"instances": ' * 50_000, 400, ""),
        (b'{"instances": [NaN]}', 400, ""),
        (b'{"instances": [], "inputs": {}}', 400, "instances"),
        (b'{"instances": [{"alcohol": 1}]}', 400, "lacks"),
        (b'{"signature_name": "nothing", "instances": [1]}', 400, "nothing"),
        (b" " * 1_000_001, 413, "1,000,000"),
    ],
)
def test_invalid_bodies_are_rejected(served: RunningServer, body: bytes, status: int, message: str) -> None:
    answer = httpx.post(f"{served.url}{WINE}:predict", content=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert list(answer.json()) == ["error"]


def test_wrong_values_name_their_feature(served: RunningServer, row: dict) -> None:
    name = next(iter(row))
    for value in ("dear", [1.0], None, {"b64": "AA=="}):
        answer = httpx.post(f"{served.url}{WINE}:predict", json={"instances": [row | {name: value}]})
        assert answer.status_code == 400
        assert name in answer.json()["error"]
    odd = json.dumps({"instances": [row | {name: float("nan")}, row | {name: float("inf")}]})
    assert httpx.post(f"{served.url}{WINE}:predict", content=odd).status_code == 200


def test_slow_and_disconnecting_clients_delay_no_other_client(served: RunningServer, row: dict) -> None:
    slow = [raw_request(served, b"{", 100) for _ in range(20)]
    gone = [raw_request(served, b"{", 100) for _ in range(20)]
    for connection in gone:
        connection.close()
    assert answered_by(served, row) == "1"
    assert slow[0].recv(1000).startswith(b"HTTP/1.1 408")
    body = json.dumps({"instances": [row] * 100}).encode()
    for _ in range(20):
        raw_request(served, body).close()  # does not wait for its answer
    assert answered_by(served, row) == "1"


def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "IDLE_SECONDS", 1)

    async def story() -> None:
        listening = server_module.open_port("127.0.0.1", 0)
        address = listening.getsockname()
        web = http_module.make_web_server(RestApplication(ModelManager({})), ServerOptions(()))
        serving = asyncio.ensure_future(web.serve(sockets=[listening]))
        request = b"GET /livez HTTP/1.1\r\nhost: here\r\n\r\n"
        for begun in (b"", b"GET /li", request + b"GET /livez HTTP/1.1\r\nhost: he"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(begun)
            response = await asyncio.wait_for(reader.read(), 20)  # until it is closed
            assert response.endswith(b'{"alive": true}' if request in begun else b"")
            writer.close()
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(20):  # whoever asks on stays
            writer.write(request)
            assert (await reader.readuntil(b'{"alive": true}')).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.1)
        writer.close()
        web.should_exit = True
        await serving

    asyncio.run(story())


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/models", 400, "Missing model name in request."),
        ("POST", WINE, 400, f"Malformed request: POST {WINE}"),
        ("GET", f"{WINE}:predict", 400, f"Malformed request: GET {WINE}:predict"),
        ("POST", f"{WINE}:explain", 400, f"Malformed request: POST {WINE}:explain"),
        ("GET", "/v1/models/beer", 404, "beer"),
        ("GET", f"{WINE}/versions/9", 404, "9"),
        ("POST", f"{WINE}/versions/9:predict", 404, "9"),
        ("POST", f"{WINE}/labels/best:predict", 404, "best"),
        ("POST", f"{WINE}:classify", 400, ""),
        ("GET", "/etc/passwd", 404, "Not Found"),
        ("DELETE", "/models", 405, "Method Not Allowed"),
    ],
)
def test_unknown_paths_and_models_have_tf_servings_errors(
    served: RunningServer, method: str, path: str, status: int, message: str
) -> None:
    answer = httpx.request(method, served.url + path, content=b"{}" if method == "POST" else None)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


# Overload


class Slow:
    """A model that returns when it is released."""

    def __init__(self, folder: Path):
        infos = {name: TensorInfo(name, np.dtype("float32"), (None,), name) for name in ("x", "y")}
        inputs, outputs = {"x": infos["x"]}, {"y": infos["y"]}
        signature = SignatureInfo("serving_default", inputs, outputs, PREDICT, has_independent_rows=True)
        self.signatures, self.go, self.calls = {"serving_default": signature}, threading.Event(), 0

    def run(self, signature: str, inputs: dict) -> dict:
        self.calls += 1
        if (inputs["x"] == 0).any():
            time.sleep(0.002)  # so that it is known as slow, and runs off the event loop
            return {"y": inputs["x"]}
        self.go.wait(60)
        return {"y": inputs["x"]}

    def close(self) -> None:
        pass


def test_a_full_queue_rejects_requests_and_deadlines_hold(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()

    async def story() -> None:
        manager = ModelManager({"slow": FolderSource(tmp_path)}, Slow, BatchingConfig(max_queued=5, batch_rows=4))
        await manager.update()
        slow = manager.acquire("slow").predictor
        transport = httpx.ASGITransport(RestApplication(manager))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

            def ask(value: float, **headers: str) -> asyncio.Task:
                body = json.dumps({"instances": [value]})
                return asyncio.ensure_future(client.post("/v1/models/slow:predict", content=body, headers=headers))

            assert (await ask(0)).status_code == 200
            busy = ask(1)
            while slow.calls < 2:
                await asyncio.sleep(0.001)
            late = ask(2, **{"request-timeout": "0.05"})
            assert (await late).status_code == 504  # while the model is still busy
            waiting = [ask(3) for _ in range(5)]
            await asyncio.sleep(0.1)
            refused = await ask(4)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            slow.go.set()
            assert [answer.status_code for answer in await asyncio.gather(busy, *waiting)] == [200] * 6
            assert slow.calls == 4  # four of the five were asked together
        await manager.close()

    asyncio.run(story())


# Packets


def predict_request(body: str, path: str = "/v1/models/slow:predict", version: str = "1.1", **headers: str) -> bytes:
    lines = [f"{name}: {value}" for name, value in {"host": "here", "content-length": len(body), **headers}.items()]
    return "\r\n".join([f"POST {path} HTTP/{version}", *lines, "", body]).encode()


def test_a_response_does_not_depend_on_packet_boundaries(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()
    whole = predict_request('{"instances": [1]}')

    async def story() -> None:
        manager = ModelManager({"slow": FolderSource(tmp_path)}, Slow)
        await manager.update()
        manager.acquire("slow").predictor.go.set()
        web = http_module.make_web_server(RestApplication(manager, body_bytes=1000), ServerOptions(()))
        web.config.load()

        async def answers(*packets: bytes, count: int = 1) -> MemoryTransport:
            wire = MemoryTransport()
            protocol = web.config.http_protocol_class(web.config, web.server_state, {})
            protocol.connection_made(wire)
            for packet in packets:
                protocol.data_received(packet)
                await asyncio.sleep(0)
            async with asyncio.timeout(30):
                while wire.written.count(b"HTTP/1.1 ") < count or not wire.written.endswith(b"}"):
                    await asyncio.sleep(0.001)
            protocol.connection_lost(ConnectionResetError())
            return wire

        expected = await answers(whole)
        assert expected.written.endswith(b'\r\ncontent-length: 21\r\n\r\n{"predictions":[1.0]}')
        assert not expected.closed
        for at in range(1, len(whole)):
            assert (await answers(whole[:at], whole[at:])).written == expected.written
        assert (await answers(*(whole[at : at + 1] for at in range(len(whole))))).written == expected.written
        several = [predict_request(f'{{"instances": [{number}]}}') for number in range(1, 6)]
        for packets in ([b"".join(several)], several, [b"".join(several)[:200], b"".join(several)[200:]]):
            responses = (await answers(*packets, count=5)).written
            assert re.findall(rb"predictions...(.)", responses) == [b"1", b"2", b"3", b"4", b"5"]
        assert (
            await answers(predict_request('{"instances": [1]}', "/v1/models/slo%77:predict"))
        ).written == expected.written
        assert (
            await answers(predict_request('{"instances": [1]}', "/v1/models/slow:predict?a=b"))
        ).written == expected.written
        for last in (
            predict_request('{"instances": [1]}', connection="close"),
            predict_request('{"instances": [1]}', version="1.0"),
        ):
            for packets in ((last,), (last[:-3], last[-3:])):
                ended = await answers(*packets)
                assert ended.closed
                assert b"\r\nconnection: close\r\n" in ended.written
        for size, status in ((1000, b"200"), (1001, b"413")):
            request = predict_request('{"instances": [1]}'.ljust(size))
            for packets in ((request,), (request[:100], request[100:])):
                assert (await answers(*packets)).written.startswith(b"HTTP/1.1 " + status)
        expecting = await answers(predict_request('{"instances": [1]}', expect="100-continue"), count=2)
        assert expecting.written.startswith(b"HTTP/1.1 100 Continue")
        assert (await answers(predict_request('{"instances": [1'))).written.startswith(b"HTTP/1.1 400")
        await manager.close()

    asyncio.run(story())


# TensorFlow


def test_a_foreign_savedmodel_is_served_and_swapped(tmp_path: Path) -> None:
    import tensorflow as tf

    def write(number: int) -> None:
        module = tf.Module()
        module.weight = tf.Variable(float(number))
        module.ask = tf.function(
            lambda x, word: {"y": x * module.weight, "again": tf.strings.upper(word)},
            input_signature=[tf.TensorSpec([None, 2], tf.float32, "x"), tf.TensorSpec([None], tf.string, "word")],
        )
        hidden = tmp_path / ".next"
        tf.saved_model.save(module, str(hidden), signatures=module.ask.get_concrete_function())
        hidden.rename(shelf / str(number))

    shelf = tmp_path / "times"
    shelf.mkdir()
    write(2)
    with running_server(ServedPath("times", path=str(shelf)), poll_interval=0.05) as server:
        url = f"{server.url}/v1/models/times:predict"
        row = {"x": [1, 2.5], "word": "äx"}
        assert httpx.post(url, json={"instances": [row]}).json() == {"predictions": [{"y": [2.0, 5.0], "again": "äX"}]}
        write(3)
        wait_until(lambda: httpx.post(url, json={"instances": [row]}).json()["predictions"][0]["y"] == [3.0, 7.5])
        columns = httpx.post(url, json={"inputs": {"x": [[1, 1]], "word": ["a"]}}).json()
        assert columns == {"outputs": {"y": [[3.0, 3.0]], "again": ["A"]}}


def test_two_processes_switch_to_a_new_version_while_a_client_keeps_predicting(tmp_path: Path) -> None:
    digits, shelf = load_dataset("digits"), tmp_path / "digits"
    model = build_model("cnn", digits)
    fit(model, digits, epochs=2)
    export_saved_model(model, digits, shelf, version=1)
    images = digits.take("test")[0]["image"][:1]
    body, path = json.dumps({"instances": images.tolist()}), "/v1/models/digits:predict"
    with running_server(ServedPath("digits", path=str(shelf)), processes=2, poll_interval=0.1) as server:
        first = httpx.post(server.url + path, content=body)
        ready = httpx.get(f"{server.url}/readyz").json()
        export_saved_model(model, digits, shelf, version=2)
        versions: list[str] = []
        until = time.monotonic() + 60
        while versions[-20:] != ["2"] * 20 and time.monotonic() < until:
            response = httpx.post(server.url + path, content=body)
            versions.append(response.headers["model-version"])
            assert response.json() == first.json()
    assert ready == {"ready": True, "processes": {"ready": 2, "total": 2}}
    assert set(versions) == {"1", "2"}
    expected = model(images).numpy()[0]
    np.testing.assert_allclose(first.json()["predictions"][0]["probabilities"], expected, atol=1e-6)


def test_a_folder_without_a_loadable_model_does_not_start(tmp_path: Path) -> None:
    def start(path: Path) -> None:
        with running_server(ServedPath("digits", path=str(path))):
            pass

    digits = load_dataset("digits")
    export_saved_model(build_model("linear", digits), digits, tmp_path / "digits", version=1)
    with pytest.raises(MlkitError, match="There is no SavedModel"):
        start(tmp_path / "nothing")
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "digits" / "1", broken)
    (broken / "variables" / "variables.data-00000-of-00001").write_bytes(b"half")
    with pytest.raises(MlkitError, match="holds no model that can be loaded"):
        start(broken)


# The command


def test_the_command_shows_a_request_that_works(shelf: Path, project: Path) -> None:
    command = [sys.executable, "-m", "mlkit", "serve", str(shelf), "--runtime", "litert", "--port", "0"]
    command += ["--grpc-port", str(free_port())]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stdout.readline()]
            while "Ctrl-C" not in lines[-1] and lines[-1]:
                lines.append(process.stdout.readline())
            assert lines[1].split()[:2] == ["wine", "1"]
            (url,) = {word for word in lines[1].split() if word.startswith("http")}
            assert httpx.get(url).status_code == 200
            if example := next((line.strip() for line in lines if line.strip().startswith("curl")), ""):
                response = subprocess.run(example, shell=True, capture_output=True, text=True)
                assert "predictions" in response.stdout
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def test_the_command_rejects_what_cannot_be_served(shelf: Path, project: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            ([str(shelf), "--runtime", "litert", "--port", port], "Choose another one"),
            ([project / "nothing"], "There is nothing"),
            ([str(shelf), "--port", 0], "There is no SavedModel in"),
            ([str(shelf), str(shelf)], "Two models are called 'wine'"),
            ([str(shelf), "--runtime", "litret"], "Did you mean 'litert'?"),
        ):
            refused = run_cli("serve", *map(str, arguments), folder=project)
            assert refused.returncode == 2, refused.stderr
            assert message in " ".join(refused.stderr.split())
