"""A hundred version swaps under REST and gRPC load: no failed or misrouted request, and no memory leak."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import grpc
import httpx
import psutil
import tensorflow as tf

from mlkit.export.protos import fill_tensor, message_class
from mlkit.serving import running_server
from mlkit.serving.options import ServedPath
from mlkit.serving.server import RunningServer
from tests.conftest import Crowd, free_port, wait_until

MARK = b"version-%06d"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 MB that returns its version."""
    module = tf.Module()
    module.weights = tf.Variable(tf.ones([2**20]))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def ask(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x * module.weights[0], "version": tf.fill(tf.shape(x), tf.constant(MARK % 0))}

    folder = tmp_path_factory.mktemp("first") / "0"
    tf.saved_model.save(module, str(folder), signatures=ask)
    assert (folder / "saved_model.pb").read_bytes().count(MARK % 0)
    return folder


def write_version(shelf: Path, number: int, first: Path) -> None:
    """The same model under another number, moved into place atomically."""
    hidden = shelf / f".{number}"
    (hidden / "variables").mkdir(parents=True)
    for file in (first / "variables").iterdir():
        os.link(file, hidden / "variables" / file.name)
    graph = (first / "saved_model.pb").read_bytes()
    (hidden / "saved_model.pb").write_bytes(graph.replace(MARK % 0, MARK % number))
    hidden.rename(shelf / str(number))


class Clients(Crowd):
    """Clients that predict until they are stopped; each prediction must belong to the version that it names."""

    def __init__(self, server: RunningServer, port: int):
        super().__init__(self._rest, self._rest, self._grpc, self._grpc, pause=0.002)  # loading takes the two cores
        self.url, self.port, self.answers = server.url, port, Counter()

    def _rest(self) -> Iterator[None]:
        body = json.dumps({"instances": [1.0]})
        with httpx.Client(timeout=20) as client:
            while True:
                answer = client.post(f"{self.url}/v1/models/big:predict", content=body)
                (prediction,) = answer.json()["predictions"]
                self._answered("rest", int(answer.headers["model-version"]), prediction["version"].encode())
                yield

    def _grpc(self) -> Iterator[None]:
        request = message_class("PredictRequest")()
        request.model_spec.name = "big"
        fill_tensor(request.inputs["x"], np.ones(1, "float32"))
        own = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own, to either process
        with grpc.insecure_channel(f"127.0.0.1:{self.port}", own) as channel:
            call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
            while True:
                answer = message_class("PredictResponse").FromString(call(request.SerializeToString(), timeout=60))
                self._answered("grpc", answer.model_spec.version.value, answer.outputs["version"].string_val[0])
                yield

    def _answered(self, way: str, number: int, mark: bytes) -> None:
        if mark != MARK % number:
            self.failures.append((number, mark))
        self.answers[way, number] += 1


def settled_memory(server: RunningServer) -> int:
    """Bytes of the processes, when they have not changed for a while."""
    seen: list[int] = []

    def read_number() -> int:
        seen.append(sum(psutil.Process(pid).memory_info().rss for pid in server.pids))
        return seen[-1] if len(seen) > 25 and max(seen[-25:]) < 1.01 * min(seen[-25:]) else 0

    return wait_until(read_number)


def test_a_hundred_swaps_under_load_lose_and_misroute_nothing_and_memory_stays(tmp_path: Path, first: Path) -> None:
    shelf, port = tmp_path / "big", free_port()
    shelf.mkdir()
    write_version(shelf, 1, first)
    memory = {}
    with (
        running_server(ServedPath("big", str(shelf)), processes=2, grpc_port=port, poll_interval=0.05) as server,
        Clients(server, port) as crowd,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for number in range(2, 102):
            write_version(shelf, number, first)
            client.post("/reload").raise_for_status()

            def swapped(number: int = number) -> bool:
                ways = ("rest", "grpc")
                return all(crowd.answers[way, number] for way in ways) or bool(crowd.failures)

            wait_until(swapped, 60)
            if number in (6, 101):
                memory[number] = settled_memory(server)
        statuses = client.get("/v1/models/big").json()["model_version_status"]
        assert [status["version"] for status in statuses if status["state"] == "AVAILABLE"] == ["101"]
        assert all(psutil.pid_exists(pid) for pid in server.pids)
    assert crowd.failures == []
    assert {number for _, number in crowd.answers} == set(range(1, 102))
    assert memory[101] < 1.1 * memory[6]


def test_a_savedmodel_that_is_copied_slowly_is_loaded_when_it_is_complete(tmp_path: Path, first: Path) -> None:
    shelf = tmp_path / "big"
    shelf.mkdir()
    write_version(shelf, 1, first)
    write_version(tmp_path, 2, first)
    graph, weights, index = "saved_model.pb", "variables/variables.data-00000-of-00001", "variables/variables.index"
    whole = {name: (tmp_path / "2" / name).read_bytes() for name in (graph, weights, index)}
    stages = [  # of a copy that takes its time, and of one that makes room before it writes
        (graph, whole[graph][: len(whole[graph]) // 2]),
        (graph, whole[graph]),
        (index, whole[index][: len(whole[index]) // 2]),
        (index, whole[index]),
        (weights, whole[weights][: len(whole[weights]) // 2]),
        (weights, bytes(len(whole[weights]))),
    ]
    (shelf / "2" / "variables").mkdir(parents=True)
    with (
        running_server(ServedPath("big", str(shelf)), poll_interval=0.05) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for name, content in stages:
            (shelf / "2" / name).write_bytes(content)
            client.post("/reload").raise_for_status()  # it has been polled when the response arrives
            newest, *_ = client.get("/v1/models/big").json()["model_version_status"]
            assert (newest["version"], newest["state"]) == ("2", "END")
            assert newest["status"]["error_code"] == "FAILED_PRECONDITION"
            answer = client.post("/v1/models/big:predict", json={"instances": [2.0]})
            assert answer.json() == {"predictions": [{"y": 2.0, "version": (MARK % 1).decode()}]}
        (shelf / "2" / weights).write_bytes(whole[weights])
        wait_until(
            lambda: client.post("/v1/models/big:predict", json={"instances": [1]}).headers["model-version"] == "2"
        )
