"""SavedModels of other teams: the server predicts what `tf.saved_model.load` computes, for one client and for many."""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mlkit.errors import MlkitError
from mlkit.export.signatures import read_signatures
from mlkit.serving import running_server
from mlkit.serving.options import ServedPath
from mlkit.serving.server import RunningServer
from tests.conftest import REPOSITORY, free_port
from tests.serving import model_zoo
from tests.serving.model_zoo import ZOO

REJECTED = ("python_function", "keras_saved_by_tensorflow")  # by the session, when they are loaded
REQUESTS = [
    pytest.param(name, signature, number, id=f"{name}-{signature}-{number}")
    for name, model in ZOO.items()
    if name not in REJECTED
    for signature, requests in model.requests.items()
    for number in range(len(requests))
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, one folder each."""
    root = tmp_path_factory.mktemp("zoo")
    command = [sys.executable, "-m", "tests.serving.model_zoo", "make", root]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def expected(zoo: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What TensorFlow computes in a process of its own."""
    command = [sys.executable, "-m", "tests.serving.model_zoo", "predict", zoo]
    return json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout)


def served_models(zoo: Path) -> list[ServedPath]:
    return [ServedPath(name, str(zoo / name)) for name in ZOO if name not in REJECTED]


@pytest.fixture(scope="module", params=["tensorflow", "eager"])
def server(zoo: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """A server of all models."""
    with running_server(*served_models(zoo), runtime=request.param) as running:
        yield running


def predict(client: httpx.Client, name: str, signature: str, inputs: dict[str, Any]) -> Any:
    body = json.dumps({"signature_name": signature, "inputs": inputs}, allow_nan=True)
    response = client.post(f"/v1/models/{name}:predict", content=body)
    assert response.status_code == 200, response.text
    return json.loads(response.text)["outputs"]


def as_array(value: Any) -> np.ndarray:
    """Bytes where the response has text or base64, numbers in float64."""
    decoded = model_zoo.decode(value)
    has_text = isinstance(decoded, bytes) or (isinstance(decoded, list) and "b'" in repr(decoded))
    return np.array(decoded, object if has_text else None)


def check(outputs: Any, reference: dict[str, Any]) -> None:
    """A single output comes without its name."""
    named = {next(iter(reference)): outputs} if len(reference) == 1 else outputs
    assert named.keys() == reference.keys()
    for name, value in reference.items():
        actual, desired = as_array(named[name]), as_array(value)
        if desired.dtype == object or desired.dtype.kind in "biu":
            np.testing.assert_array_equal(actual, desired, name)
        else:
            np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("name", "signature", "number"), REQUESTS)
def test_a_client_gets_what_tensorflow_computes(
    server: RunningServer, expected: dict, name: str, signature: str, number: int
) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        outputs = predict(client, name, signature, ZOO[name].requests[signature][number])
    check(outputs, expected[name][signature][number])


def predict_grpc(channel: Any, zoo: Path, name: str, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs from a client of TF Serving's package."""
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    infos = signatures_of(zoo / name / "1")[signature].inputs
    for key, value in inputs.items():
        dtype = tf.dtypes.as_dtype(infos[key].dtype)
        array = np.array(model_zoo.decode(value), dtype.as_numpy_dtype)  # a list would lose large numbers
        request.inputs[key].CopyFrom(tf.make_tensor_proto(array, dtype))
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
    outputs = {key: tf.make_ndarray(value) for key, value in response.outputs.items()}
    return {key: model_zoo.encode(value) for key, value in outputs.items()}


signatures_of = functools.cache(read_signatures)


def test_sixteen_clients_of_two_processes_over_rest_and_grpc(zoo: Path, expected: dict) -> None:
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("tensorflow_serving")
    port = free_port()

    def send_all(client_number: int) -> None:
        order = np.random.default_rng(client_number).permutation(np.repeat(np.arange(len(REQUESTS)), 3))
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            for name, signature, number in (REQUESTS[index].values for index in order):
                inputs, reference = ZOO[name].requests[signature][number], expected[name][signature][number]
                if client_number % 2:
                    outputs = predict_grpc(channel, zoo, name, signature, inputs)
                    check(outputs if len(outputs) > 1 else next(iter(outputs.values())), reference)
                else:
                    check(predict(client, name, signature, inputs), reference)

    with running_server(*served_models(zoo), processes=2, grpc_port=port) as server, ThreadPoolExecutor(16) as clients:
        list(clients.map(send_all, range(16)))


def test_sixteen_clients_get_what_tensorflow_computes(server: RunningServer, expected: dict) -> None:
    """Each client sends all requests, in an order of its own, so that requests for a signature meet in a queue."""

    def send_all(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(REQUESTS)), 5))
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for name, signature, number in (REQUESTS[index].values for index in order):
                outputs = predict(client, name, signature, ZOO[name].requests[signature][number])
                check(outputs, expected[name][signature][number])

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(send_all, range(16)))


def send(server: RunningServer, path: str, content: dict[str, Any], **headers: str) -> httpx.Response:
    url, headers = f"{server.url}/v1/models/{path}", {name.replace("_", "-"): text for name, text in headers.items()}
    return httpx.post(url, content=json.dumps(content), headers=headers, timeout=60)


def test_signatures_of_tensorflow_2_classify_and_regress(server: RunningServer) -> None:
    """`tf.saved_model.save` writes the method `predict` for all signatures."""
    examples = {"examples": [{"age": 40.0}]}
    classes = send(server, "classify_and_regress:classify", examples).json()["results"]
    assert [label for label, _ in classes[0]] == ["no", "yes"]
    assert classes[0][1][1] == pytest.approx(1 / (1 + np.exp(-0.4)), abs=1e-6)
    regression = {**examples, "signature_name": "regression"}
    assert send(server, "classify_and_regress:regress", regression).json() == {"results": [80.0]}
    refused = send(server, "listwise:classify", examples)
    assert refused.status_code == 400
    assert "is for predict, and the request is a classify request" in refused.json()["error"]


def test_only_the_signature_with_composite_tensors_is_rejected(server: RunningServer) -> None:
    refused = send(server, "ragged_output:predict", {"inputs": {"text": ["a b"]}})
    assert refused.status_code == 501
    assert "composite tensors (ragged or sparse), which no request can hold: words" in refused.json()["error"]


def test_models_without_requests_of_their_own_are_not_called_before_their_clients(zoo: Path) -> None:
    counter, warmed_up = (ServedPath(name, str(zoo / name)) for name in ("counter", "warmed_up"))
    with running_server(counter, warmed_up) as server:
        assert send(server, "counter:predict", {"inputs": {"who": ["a"]}}).json() == {"outputs": [1]}
        assert send(server, "warmed_up:predict", {"inputs": {"x": [2.0]}}).json() == {"outputs": [4]}  # after three


def test_a_model_with_python_functions_is_rejected_when_it_is_loaded(zoo: Path) -> None:
    with (
        pytest.raises(MlkitError, match=r"serving_default calls Python functions \(tf.py_function"),
        running_server(ServedPath("python_function", str(zoo / "python_function"))),
    ):
        pass


def test_a_keras_model_that_has_lost_its_weights_is_rejected_when_it_is_loaded(zoo: Path, expected: dict) -> None:
    name, message = "keras_saved_by_tensorflow", "reads variables without values in the model: y/bias, y/kernel"
    served = ServedPath(name, str(zoo / name))
    with pytest.raises(MlkitError, match=message), running_server(served):
        pass
    with running_server(served, runtime="eager") as server:  # which the message names
        outputs = send(server, f"{name}:predict", {"inputs": ZOO[name].requests["serving_default"][0]}).json()
    check(outputs["outputs"], expected[name]["serving_default"][0])


@pytest.mark.parametrize("runtime", ["tensorflow", "eager"])
def test_a_slow_model_delays_no_other_and_ends_at_its_deadline(zoo: Path, runtime: str) -> None:
    """The event loop, the probes and other models go on while a call computes; its client gets a timeout in time."""
    served = [ServedPath(name, str(zoo / name)) for name in ("busy", "no_default_signature")]
    quick = {"signature_name": "embed", "inputs": {"x": [1.0]}}
    with running_server(*served, runtime=runtime) as server, ThreadPoolExecutor(4) as clients:
        for seconds in (0.0, 0.0, 6.0):  # cheap calls first: their duration says nothing about the next one
            slow = clients.submit(send, server, "busy:predict", {"inputs": {"seconds": [seconds]}}, request_timeout="2")
            if not seconds:
                assert slow.result().status_code == 200
        started, slowest = time.monotonic(), 0.0
        while not slow.done():
            before = time.monotonic()
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert send(server, "no_default_signature:predict", quick).json() == {"outputs": [2.0]}
            slowest = max(slowest, time.monotonic() - before)
        assert slow.result().status_code == 504
        assert "did not end by its deadline" in slow.result().json()["error"]
        assert time.monotonic() - started < 5.5  # two seconds, and not the six that the model computes
        assert slowest < 1.5, "a call of another model waited for the slow one"
        queued = send(server, "busy:predict", {"inputs": {"seconds": [0.0]}}, request_timeout="0.5")
        assert queued.status_code == 504  # behind the call that goes on computing
