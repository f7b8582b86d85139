"""Serving over a Ray cluster of two nodes: replaced, scaled and swapped under load, and one node is killed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'mlkit[ray]'")
pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import grpc
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from mlkit.data import load_dataset
from mlkit.export import export_saved_model, load_saved_model
from mlkit.models import build_model
from mlkit.serving import ServerOptions
from mlkit.serving.auth import AuthOptions, new_api_key
from mlkit.serving.options import ServedPath
from tests.conftest import Crowd, free_port, wait_until
from tests.jobs.test_ray import Cluster

pytestmark = pytest.mark.slow
DIGITS = "/v1/models/digits"
BROKEN = (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)

REPLACE = """
import sys
from mlkit.serving.ray_serve import Replicas, run_on_ray
from mlkit.serving import ServerOptions
run_on_ray(ServerOptions.from_json(sys.argv[1]), Replicas(1, 2, load=0.1), lambda server: print("{\\n}", flush=True))
"""


class Nodes(Cluster):
    """Nodes of one processor each; one that is slow to start gets a second chance."""

    def start(self, *wrapper: str) -> int:
        for _ in range(3):
            starter = self.launch(*wrapper)
            if starter.wait(120) == 0:
                return starter.pid
            self.kill(starter.pid)
            self.address = self.address if self.sessions else ""
        raise AssertionError("no node starts")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes, the second of which is killed by a test."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # Ray's sockets need a short path
        nodes = Nodes(folder)
        try:
            nodes.start()
            nodes.start()
            yield nodes
        finally:
            for session in list(nodes.sessions):
                nodes.kill(session)


@dataclass
class Service:
    """A project that is served over the nodes, by one command after another."""

    folder: Path
    nodes: Nodes
    key: str  # to api.keys
    port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    commands: list[subprocess.Popen] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *arguments: object) -> subprocess.Popen:
        """Type `mlkit serve digits --engine ray ...`."""
        ports = ("--port", self.port, "--grpc-port", self.grpc_port)
        return self.start("-m", "mlkit", "serve", "digits", "--engine", "ray", "--json", *ports, *arguments)

    def start(self, *arguments: object) -> subprocess.Popen:
        """Start Python in the project."""
        given = {name: value for name, value in os.environ.items() if not name.startswith(("MLKIT_", "RAY_"))}
        given |= {"RAY_ADDRESS": self.nodes.address, "PYTHONPATH": self.nodes.folder}
        given["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "4"
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.commands.append(subprocess.Popen(command, cwd=self.folder, env=given, **pipes))
        return self.commands[-1]

    def ready(self, command: subprocess.Popen) -> dict:
        """What a command prints when the server answers."""
        lines = []
        while "}\n" not in lines:
            lines.append(command.stdout.readline())
            assert lines[-1], command.stderr.read()
        return json.loads("".join(lines))

    def replicas(self) -> set[str]:
        """Who answers, as far as a few connections meet them."""
        return {httpx.get(f"{self.url}/readyz", timeout=30).json()["replica"] for _ in range(12)}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return load_dataset("digits").take("test")[0]["image"][:3]


@pytest.fixture(scope="module")
def service(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The handwritten digits, by an untrained model."""
    folder = tmp_path_factory.mktemp("service")
    data = load_dataset("digits")
    export_saved_model(build_model("linear", data), data, folder / "digits", version=1)
    service = Service(folder, nodes, new_api_key(folder / "api.keys", "crowd"))
    yield service
    for command in service.commands:  # of a test that failed
        command.kill()
        command.wait()


@pytest.fixture(scope="module")
def first(service: Service) -> tuple[subprocess.Popen, dict]:
    """The first command, as soon as its one replica serves, with its output."""
    command = service.command()
    return command, service.ready(command)


class Clients(Crowd):
    """Callers with a key, each over one connection, and over another when that breaks."""

    def __init__(self, service: Service, images: np.ndarray, threads: int = 6):
        super().__init__(*[self._rest] * threads, pause=0.005)
        self.headers = {"authorization": f"Bearer {service.key}"}
        self.url, self.body = f"{service.url}{DIGITS}:predict", json.dumps({"instances": images[:1].tolist()})
        self.versions: list[str] = []
        self.broken: list[str] = []

    def _rest(self) -> Iterator[None]:
        while True:
            try:
                yield from self._over_one_connection()
            except BROKEN as error:
                self.broken.append(repr(error))
                yield

    def _over_one_connection(self) -> Iterator[None]:
        with httpx.Client(timeout=60, headers=self.headers) as client:
            while True:
                answer = client.post(self.url, content=self.body)
                if answer.status_code == 200:
                    self.versions.append(answer.headers["model-version"])
                else:
                    self.failures.append((answer.status_code, answer.text))
                yield


def test_rest_and_grpc_equal_the_saved_model(
    service: Service, first: tuple[subprocess.Popen, dict], images: np.ndarray
) -> None:
    _, printed = first
    assert (printed["url"], printed["grpc"]) == (service.url, f"127.0.0.1:{service.grpc_port}")
    expected = load_saved_model(service.folder / "digits" / "1")({"image": images})["probabilities"]
    answer = httpx.post(f"{service.url}{DIGITS}:predict", json={"instances": images.tolist()}, timeout=30)
    predicted = [row["probabilities"] for row in answer.json()["predictions"]]
    np.testing.assert_allclose(predicted, expected, atol=1e-6)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "digits"
    request.inputs["image"].CopyFrom(tf.make_tensor_proto(images))
    with grpc.insecure_channel(printed["grpc"]) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict(request, timeout=30)
        np.testing.assert_array_equal(
            tf.make_ndarray(response.outputs["probabilities"]), np.array(predicted, "float32")
        )
        assert response.model_spec.version.value == 1
        request.model_spec.name = "digit"
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request, timeout=30)
        assert caught.value.code().name == "NOT_FOUND"
        assert "Did you mean 'digits'?" in caught.value.details()
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "tensorflow.serving.PredictionService" in services


def test_the_application_is_the_same_behind_the_proxy(
    service: Service, first: tuple[subprocess.Popen, dict], images: np.ndarray
) -> None:
    for method, path, status in (
        ("POST", f"{DIGITS}:explain", 400),
        ("GET", f"{DIGITS}/versions/9", 404),
        ("GET", "/nothing", 404),
        ("POST", "/reload", 501),
    ):
        answer = httpx.request(method, service.url + path, timeout=30)
        assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    trace = httpx.post(f"{service.url}{DIGITS}:predict", json={"instances": images.tolist()}, timeout=30)
    assert trace.headers["traceparent"]
    metrics = httpx.get(f"{service.url}/monitoring/prometheus/metrics", timeout=30).text
    assert ':tensorflow:serving:request_count{model_name="digits",status="OK"}' in metrics


def test_a_new_version_is_loaded_under_load(
    service: Service, first: tuple[subprocess.Popen, dict], images: np.ndarray
) -> None:
    before = service.replicas()
    with Clients(service, images, 2) as crowd:
        wait_until(lambda: crowd.versions)
        data = load_dataset("digits")
        export_saved_model(build_model("linear", data), data, service.folder / "digits", version=2)
        wait_until(lambda: crowd.versions[-20:] == ["2"] * 20)
    assert (crowd.failures, crowd.broken) == ([], [])
    assert set(crowd.versions) == {"1", "2"}
    assert service.replicas() == before  # nothing was deployed


def test_other_options_and_more_load_fail_no_request(
    service: Service, first: tuple[subprocess.Popen, dict], images: np.ndarray
) -> None:
    """Another command replaces the replica by one that requires API keys, and has two of them under load."""
    old = service.replicas()
    models = (ServedPath("digits", str(service.folder / "digits")),)
    auth = AuthOptions(str(service.folder / "api.keys"))
    options = ServerOptions(models, port=service.port, grpc_port=service.grpc_port, auth=auth)
    with Clients(service, images) as crowd:
        wait_until(lambda: crowd.versions)
        second = service.start("-c", REPLACE, options.to_json())
        service.ready(second)
        wait_until(lambda: not service.replicas() & old)
        wait_until(lambda: len(service.replicas()) == 2)
        assert first[0].wait(60) == 0
    assert (crowd.failures, crowd.broken) == ([], [])
    assert set(crowd.versions) == {"2"}
    assert "Another command has replaced this server" in first[0].stderr.read()
    body = {"instances": images.tolist()}
    assert httpx.post(f"{service.url}{DIGITS}:predict", json=body, timeout=30).status_code == 401


def test_a_killed_node_fails_its_requests_in_progress_and_nothing_else(
    nodes: Nodes, service: Service, images: np.ndarray
) -> None:
    with Clients(service, images) as crowd:
        wait_until(lambda: crowd.versions)
        nodes.kill(nodes.sessions[1])
        wait_until(lambda: len(service.replicas()) == 1)
        before = len(crowd.versions)
        wait_until(lambda: len(crowd.versions) > before + 200)
    assert set(crowd.versions) == {"2"}
    lost = crowd.failures + crowd.broken
    assert len(lost) <= 6, lost  # each thread has one request at work


def test_impossible_options_are_rejected(service: Service) -> None:
    for arguments, words in (
        (("--processes", 2), "--replicas is the number of replicas"),
        (("--replicas", "2-1"), "--replicas is a number"),
        (("--replicas", 90), "for 90 of them"),
        (("--port", free_port()), "serve shutdown"),
    ):
        refused = service.command(*arguments)
        assert refused.wait(60) in (1, 2)
        assert words in refused.stderr.read()


def test_sigterm_stops_the_server(service: Service) -> None:
    last = service.commands[1]
    last.terminate()
    assert last.wait(90) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/livez")
