"""Limits of memory and time for clients without credentials: pipelined requests, held bodies, long names."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlparse

import httpx
import psutil
import pytest

from mlkit.serving import running_server
from mlkit.serving.options import ServedPath
from mlkit.serving.server import RunningServer
from tests.serving import model_zoo

NAME = "no_default_signature"
PREDICT = f"/v1/models/{NAME}:predict"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("models")
    model_zoo.make(root, [NAME])
    with running_server(ServedPath(NAME, str(root / NAME))) as running:
        yield running


def resident_megabytes(server: RunningServer) -> float:
    return psutil.Process(server.pids[0]).memory_info().rss / 2**20


def connect(server: RunningServer) -> socket.socket:
    address = urlparse(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    connection.settimeout(1)
    return connection


def slowest_probe(server: RunningServer, until: threading.Thread) -> float:
    """Seconds of the slowest response to /livez while a thread is alive."""
    slowest = 0.0
    while until.is_alive():
        started = time.monotonic()
        assert httpx.get(f"{server.url}/livez", timeout=60).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
    return slowest


def test_a_client_that_pipelines_and_reads_nothing_takes_no_memory(server: RunningServer) -> None:
    httpx.get(f"{server.url}/livez")
    before, sent = resident_megabytes(server), 0
    with connect(server) as connection:
        with contextlib.suppress(TimeoutError):  # the server has stopped reading
            while sent < 50_000_000:
                sent += connection.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
        assert sent < 50_000_000
        assert resident_megabytes(server) < before * 1.15
        assert httpx.get(f"{server.url}/livez").status_code == 200


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    """More than the limit of waiting requests, in packets that end within a request."""
    bodies = [json.dumps({"signature_name": "embed", "inputs": {"x": [number]}}) for number in range(300)]
    head = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: "
    data = "".join(f"{head}{len(body)}\r\n\r\n{body}" for body in bodies).encode()
    with connect(server) as connection:
        connection.settimeout(30)
        packets = [data[start : start + 7001] for start in range(0, len(data), 7001)]
        sender = threading.Thread(target=lambda: list(map(connection.sendall, packets)))
        sender.start()
        received = b""
        while received.count(b'{"outputs":[') < 300 or not received.endswith(b"]}"):
            received += connection.recv(65_536)
        sender.join()
    numbers = [float(part.partition(b"]")[0]) for part in received.split(b'{"outputs":[')[1:]]
    assert numbers == [2.0 * number for number in range(300)]


def test_held_bodies_are_limited_and_their_memory_is_returned(server: RunningServer) -> None:
    """Forty clients send a large body, except for its last byte."""
    before, size = resident_megabytes(server), 50_000_000
    with contextlib.ExitStack() as stack:
        connections, statuses = [stack.enter_context(connect(server)) for _ in range(40)], []
        for connection in connections:
            connection.sendall(f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: {size + 1}\r\n\r\n".encode())
            with contextlib.suppress(OSError):  # rejected, and closed
                connection.sendall(b" " * size)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                statuses.append(connection.recv(4096))
        assert resident_megabytes(server) < before + 450
        rejected = [status for status in statuses if status]
        assert len(rejected) >= 30
        assert all(status.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in status for status in rejected)
    deadline = time.monotonic() + 20
    while resident_megabytes(server) > before * 1.15:
        assert time.monotonic() < deadline, (before, resident_megabytes(server))
        httpx.get(f"{server.url}/livez")


@pytest.mark.parametrize(
    "content",
    [
        {"signature_name": "embed", "inputs": {f"xx{number}": 1 for number in range(60_000)}},
        {"signature_name": "embed", "inputs": {"x" * 1_000_000: 1}},
        {"signature_name": "e" * 1_000_000, "inputs": {"x": [1]}},
        {"signature_name": "embed", "instances": [{f"xx{number}": 1 for number in range(60_000)}]},
    ],
)
def test_long_and_many_wrong_names_block_nothing(server: RunningServer, content: dict) -> None:
    body, responses = json.dumps(content), []

    def send() -> None:
        responses.append(httpx.post(server.url + PREDICT, content=body, timeout=60))

    client = threading.Thread(target=send)
    client.start()
    assert slowest_probe(server, client) < 1
    assert responses[0].status_code == 400
    assert len(responses[0].text) < 3000
