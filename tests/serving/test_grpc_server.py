"""gRPC as seen by clients written elsewhere, under overload, with deadlines and with malformed messages."""

import asyncio
import contextlib
import functools
import json
import random
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import grpc
import tensorflow as tf
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from mlkit.data import load_dataset
from mlkit.errors import InputError, ServingError
from mlkit.export import export_saved_model, load_saved_model
from mlkit.export.protos import fill_tensor, message_class, tensor_to_array
from mlkit.export.signatures import CLASSIFY, PREDICT, REGRESS, SignatureInfo, TensorInfo
from mlkit.models import build_model
from mlkit.serving import running_server
from mlkit.serving.batcher import BatchingConfig
from mlkit.serving.grpc_server import (
    SERVICES,
    CallInfo,
    get_status,
    predict,
    read_output_filter,
    read_spec,
    reload_config,
    start_grpc,
)
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.options import ServedPath
from mlkit.serving.protocol import read_tensors
from mlkit.serving.server import RunningServer
from mlkit.serving.sources import FolderSource, ServingPlan, VersionSpec
from mlkit.training import fit
from tests.conftest import free_port

ROWS = {"age": [31.0, 47.0, 22.0], "city": ["Porto", "Lille", "nowhere"]}
FLOAT = np.dtype("float32")

# -- a server process, called by tensorflow-serving-api


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a class and a number."""
    folder = tmp_path_factory.mktemp("grpc")
    generator = np.random.default_rng(0)
    age, city = generator.integers(18, 70, 200), generator.choice(["Porto", "Lille"], 200)
    table = pl.DataFrame({"age": age.astype("float32"), "city": city})
    table.with_columns(
        kept=pl.Series(np.where(age > 40, "yes", "no")), spent=pl.Series(age * 2.5)
    ).write_csv(folder / "shop.csv")  # fmt: skip
    dataset = load_dataset(str(folder / "shop.csv"), label=["kept", "spent"])
    export_saved_model(build_model("mlp", dataset), dataset, folder / "shop")
    return folder / "shop"


@pytest.fixture(scope="module")
def server(shelf: Path) -> Iterator[tuple[RunningServer, int]]:
    """REST and gRPC in one process."""
    port = free_port()
    with running_server(ServedPath("shop", str(shelf)), grpc_port=port) as running:
        yield running, port


@pytest.fixture(scope="module")
def channel(server: tuple[RunningServer, int]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server[1]}") as opened:
        yield opened


def predict_request(**spec: Any) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "shop"
    for name, value in spec.items():
        if name == "version":
            request.model_spec.version.value = value
        else:
            setattr(request.model_spec, name, value)
    for name, values in ROWS.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(values, dtype="float32" if name == "age" else None))
    return request


def examples() -> list[tf.train.Example]:
    made = []
    for age, city in zip(*ROWS.values(), strict=True):
        features = {
            "age": tf.train.Feature(float_list=tf.train.FloatList(value=[age])),
            "city": tf.train.Feature(bytes_list=tf.train.BytesList(value=[city.encode()])),
        }
        made.append(tf.train.Example(features=tf.train.Features(feature=features)))
    return made


def code_of(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name


def test_predict_equals_the_model_and_rest(
    shelf: Path, server: tuple[RunningServer, int], channel: grpc.Channel
) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.Predict(predict_request(), timeout=20)
    outputs = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
    expected = load_saved_model(shelf / "1")(ROWS)
    assert outputs.keys() == expected.keys()
    np.testing.assert_allclose(outputs["spent_prediction"], expected["spent_prediction"], rtol=1e-5)
    assert outputs["kept_class"].tolist() == [name.encode() for name in expected["kept_class"]]
    assert (response.model_spec.version.value, response.model_spec.signature_name) == (1, "serving_default")
    assert list(response.outputs["spent_prediction"].float_val) == outputs["spent_prediction"].tolist()
    body = json.dumps({"inputs": ROWS}).encode()
    with urllib.request.urlopen(f"{server[0].url}/v1/models/shop:predict", body, timeout=20) as answer:
        rest = json.load(answer)["outputs"]
    np.testing.assert_array_equal(np.array(rest["kept_probabilities"], "float32"), outputs["kept_probabilities"])


def test_predict_takes_versions_filters_and_both_ways_to_write_a_tensor(channel: grpc.Channel) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    request = predict_request(version=1)
    request.output_filter.append("kept_class")
    assert request.inputs["age"].tensor_content
    packed = stub.Predict(request, timeout=20)
    assert list(packed.outputs) == ["kept_class"]
    request.inputs["age"].tensor_content = b""
    request.inputs["age"].float_val.extend(ROWS["age"])
    assert stub.Predict(request, timeout=20) == packed


def test_examples_are_classified_and_regressed_alone_and_together(channel: grpc.Channel) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    plain = {
        name: tf.make_ndarray(value) for name, value in stub.Predict(predict_request(), timeout=20).outputs.items()
    }
    classify, regress = classification_pb2.ClassificationRequest(), regression_pb2.RegressionRequest()
    several = inference_pb2.MultiInferenceRequest()
    for request, signature in ((classify, "kept_classify"), (regress, "spent_regress")):
        request.model_spec.name, request.model_spec.signature_name = "shop", signature
        request.input.example_list.examples.extend(examples())
        several.tasks.add(model_spec=request.model_spec)
    several.tasks[0].method_name, several.tasks[1].method_name = CLASSIFY, REGRESS
    several.input.CopyFrom(classify.input)
    classes = stub.Classify(classify, timeout=20).result
    numbers = stub.Regress(regress, timeout=20).result
    assert [[item.label for item in row.classes] for row in classes.classifications] == [["no", "yes"]] * 3
    scores = [[item.score for item in row.classes] for row in classes.classifications]
    np.testing.assert_allclose(scores, plain["kept_probabilities"], rtol=1e-5)
    np.testing.assert_allclose([item.value for item in numbers.regressions], plain["spent_prediction"], rtol=1e-5)
    together = stub.MultiInference(several, timeout=20).results
    assert (together[0].classification_result, together[1].regression_result) == (classes, numbers)
    assert together[1].model_spec.signature_name == "spent_regress"


def test_a_context_counts_for_every_example(channel: grpc.Channel) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    whole, parted = regression_pb2.RegressionRequest(), regression_pb2.RegressionRequest()
    for request in (whole, parted):
        request.model_spec.name, request.model_spec.signature_name = "shop", "spent_regress"
    whole.input.example_list.examples.extend(examples()[:1])
    parted.input.example_list_with_context.context.CopyFrom(examples()[0])
    parted.input.example_list_with_context.examples.add()
    assert stub.Regress(whole, timeout=20).result == stub.Regress(parted, timeout=20).result


def test_warm_up_requests_of_a_model_get_their_stored_responses(shelf: Path, channel: grpc.Channel) -> None:
    """`assets.extra/tf_serving_warmup_requests`, read by our messages and by TensorFlow's alike."""
    stub, requests = prediction_service_pb2_grpc.PredictionServiceStub(channel), 0
    for record in tf.data.TFRecordDataset(str(shelf / "1/assets.extra/tf_serving_warmup_requests")):
        ours, theirs = message_class("PredictionLog").FromString(record.numpy()), prediction_log_pb2.PredictionLog()
        theirs.ParseFromString(record.numpy())
        kind = ours.WhichOneof("log_type")
        assert (theirs.WhichOneof("log_type"), ours.ByteSize()) == (kind, theirs.ByteSize())
        if kind == "predict_log":
            theirs.predict_log.request.model_spec.name = "shop"
            answer = stub.Predict(theirs.predict_log.request, timeout=20)
            for name, tensor in theirs.predict_log.response.outputs.items():
                predicted, expected = tf.make_ndarray(answer.outputs[name]), tf.make_ndarray(tensor)
                assert (
                    predicted.tolist() == expected.tolist()
                    if predicted.dtype == object
                    else np.allclose(predicted, expected, 1e-4)
                )
            requests += 1
    assert requests


def test_metadata_and_status(channel: grpc.Channel) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "shop"
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.GetModelMetadata(request, timeout=20)
    described = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(described)
    signature = described.signature_def["serving_default"]
    assert (signature.method_name, signature.inputs["age"].dtype) == (PREDICT, 1)
    assert [dim.size for dim in signature.inputs["age"].tensor_shape.dim] == [-1]
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = "shop"
    [version] = models.GetModelStatus(status, timeout=20).model_version_status
    assert (version.version, version.state, version.status.error_code) == (1, 30, 0)


def test_no_client_has_a_folder_of_its_choosing_loaded(channel: grpc.Channel, shelf: Path, tmp_path: Path) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_management_pb2.ReloadConfigRequest()
    model = request.config.model_config_list.config.add(name="shop", base_path=str(shelf))
    assert stub.HandleReloadConfigRequest(request, timeout=20).status.error_code == 0
    model.base_path = str(tmp_path)
    assert code_of(lambda: stub.HandleReloadConfigRequest(request, timeout=20)) == "PERMISSION_DENIED"
    model.base_path, model.name = str(shelf), "mine"
    assert code_of(lambda: stub.HandleReloadConfigRequest(request, timeout=20)) == "PERMISSION_DENIED"


def test_errors_have_tf_servings_codes(channel: grpc.Channel) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    for code, request in {
        "NOT_FOUND": [predict_request(name="shops"), predict_request(version=7), predict_request(version_label="x")],
        "FAILED_PRECONDITION": [predict_request(signature_name="classify")],
        "INVALID_ARGUMENT": [predict_request(name=""), bad_input("age", [1]), bad_input("age", [[1.5]])],
    }.items():
        for invalid in request:
            assert code_of(lambda invalid=invalid: stub.Predict(invalid, timeout=20)) == code
    with pytest.raises(grpc.RpcError, match="Input 'age' takes float32, not DT_INT32"):
        stub.Predict(bad_input("age", [1]), timeout=20)
    assert len(stub.Predict(predict_request(), timeout=20).outputs) > 1  # and everything goes on


def bad_input(name: str, values: list) -> predict_pb2.PredictRequest:
    request = predict_request()
    request.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    return request


def test_reflection_and_health_serve_clients_without_definitions(channel: grpc.Channel) -> None:
    """As grpcurl and grpc-health-probe go about it."""
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(SERVICES) | {"grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName("tensorflow.serving.PredictionService").FindMethodByName("Predict")
    asks, answers = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
    call = channel.unary_unary(
        "/tensorflow.serving.PredictionService/Predict", asks.SerializeToString, answers.FromString
    )
    response = call(asks.FromString(predict_request().SerializeToString()), timeout=20)
    assert "kept_class" in response.outputs
    pool.FindServiceByName("grpc.health.v1.Health")
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20).status == 1
    assert code_of(lambda: health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=20)) == "NOT_FOUND"


def test_two_thousand_corrupted_messages_break_nothing(channel: grpc.Channel) -> None:
    """No INTERNAL, no UNKNOWN, and serving continues."""
    chance, codes = random.Random(0), set()
    valid = {"Predict": predict_request(), "Classify": classification_pb2.ClassificationRequest()}
    valid["Classify"].model_spec.name, valid["Classify"].model_spec.signature_name = "shop", "kept_classify"
    valid["Classify"].input.example_list.examples.extend(examples())
    bodies = {name: message.SerializeToString() for name, message in valid.items()}
    methods = [f"/{service}/{method}" for service, all_methods in SERVICES.items() for method in all_methods]
    calls = {path: channel.unary_unary(path) for path in methods}
    for start in range(0, 2000, 100):
        futures = []
        for _ in range(100):
            body = bytearray(bodies[chance.choice(list(bodies))])
            for _ in range(chance.randint(0, 4)):
                body[chance.randrange(len(body))] = chance.randrange(256)
            if chance.random() < 0.1:
                del body[chance.randrange(len(body)) :]
            path = chance.choice(methods) if chance.random() < 0.3 else methods[start // 100 % 2]
            futures.append(calls[path].future(bytes(body), timeout=60))
        codes |= {future.code().name for future in futures}
    assert (
        {"OK", "INVALID_ARGUMENT"}
        <= codes
        <= {
            *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "PERMISSION_DENIED"),
            "RESOURCE_EXHAUSTED",
        }
    )
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    assert stub.Predict(predict_request(), timeout=20).outputs


# -- a controllable model, in this process


class Slow:
    """Returns its input, or raises an error."""

    def __init__(self) -> None:
        takes, gives = (TensorInfo(name, FLOAT, (None,), name) for name in ("x", "y"))
        self.signatures = {"serving_default": SignatureInfo("serving_default", {"x": takes}, {"y": gives}, PREDICT)}
        self.failure: Exception | None = None

    def run(self, signature: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.failure:
            raise self.failure
        return {"y": inputs["x"]}

    def close(self) -> None:
        pass


class Here:
    """A source with one version."""

    def __init__(self, folder: Path):
        self.folder = folder

    def poll(self) -> ServingPlan:
        return ServingPlan((VersionSpec(1, self.folder),), 1)


Ask = Callable[..., Awaitable[Any]]


@contextlib.asynccontextmanager
async def serving(folder: Path, batching: BatchingConfig | None = None, **options: Any) -> AsyncIterator[tuple]:
    """A server with one model, its manager, and a client."""
    model = Slow()
    manager = ModelManager({"slow": Here(folder)}, load=lambda _: model, batching=batching)
    await manager.update()
    server = await start_grpc(manager, "127.0.0.1:0", **options)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")

        async def ask(value: float = 1.0, **options: Any) -> float:
            request = message_class("PredictRequest")()
            request.model_spec.name = "slow"
            fill_tensor(request.inputs["x"], np.array([value], "float32"))
            response = message_class("PredictResponse").FromString(await call(request.SerializeToString(), **options))
            return float(tensor_to_array(response.outputs["y"])[0])

        yield server, manager, model, ask, channel
    await server.stop(0)
    await manager.close()


async def code(answer: Awaitable[Any]) -> tuple[str, dict[str, str], str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code().name, dict(caught.value.trailing_metadata()), caught.value.details()


def hold(manager: ModelManager) -> Callable[[], None]:
    """Let no call of the model begin until the returned function is called."""
    version = manager.model("slow").loaded[1]
    run, gate = version.run, asyncio.Event()

    async def held(*arguments: Any, **options: Any) -> Any:
        await gate.wait()
        return await run(*arguments, **options)

    version.run = held
    return gate.set


def test_a_deadline_is_kept_and_its_request_is_dropped(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path) as (_, manager, _, ask, _):
            release = hold(manager)
            assert (await code(ask(timeout=0.05)))[0] == "DEADLINE_EXCEEDED"
            while manager.model("slow").loaded[1].in_flight:  # the server has let go of it, too
                await asyncio.sleep(0.01)
            release()
            assert await ask(3.0, timeout=20) == 3.0

    asyncio.run(story())


def test_an_overloaded_server_sends_a_retry_delay(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path) as (_, _, model, ask, _):
            model.failure = ServingError("RESOURCE_EXHAUSTED", "128 requests wait.", retry_after=1.5)
            assert await code(ask(timeout=20)) == (
                "RESOURCE_EXHAUSTED", {"grpc-retry-pushback-ms": "1500"}, "128 requests wait."
            )  # fmt: skip

    asyncio.run(story())


def test_calls_above_the_limit_are_rejected_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path, calls=2) as (_, manager, _, ask, _):
            release = hold(manager)
            waiting = [asyncio.ensure_future(ask(number, timeout=20)) for number in range(2)]
            while manager.model("slow").loaded[1].in_flight < 2:
                await asyncio.sleep(0.01)
            assert (await code(ask(timeout=20)))[0] == "RESOURCE_EXHAUSTED"
            release()
            assert await asyncio.gather(*waiting) == [0.0, 1.0]

    asyncio.run(story())


def test_a_message_that_is_too_long_is_rejected_unread(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path, message_bytes=1000) as (_, _, _, ask, channel):
            raw = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
            assert (await code(raw(bytes(1001), timeout=20)))[0] == "RESOURCE_EXHAUSTED"
            assert (await code(raw(bytes(10**6), timeout=20, compression=grpc.Compression.Gzip)))[
                0
            ] == "RESOURCE_EXHAUSTED"
            assert await ask(timeout=20) == 1.0

    asyncio.run(story())


def test_a_defect_is_logged_and_not_disclosed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with serving(tmp_path) as (_, manager, _, ask, _):

            async def broken(*_: Any, **__: Any) -> None:
                raise ZeroDivisionError("secret")

            manager.model("slow").loaded[1].run = broken
            name, _, words = await code(ask(timeout=20))
            assert (name, "secret" in words, "secret" in caplog.text) == ("INTERNAL", False, True)

    asyncio.run(story())


def test_health_is_current_and_stopping_waits_for_the_last_response(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path) as (server, manager, _, ask, channel):
            health = health_pb2_grpc.HealthStub(channel)
            status = health.Watch(health_pb2.HealthCheckRequest())
            assert (await status.read()).status == health_pb2.HealthCheckResponse.SERVING
            release = hold(manager)
            last = asyncio.ensure_future(ask(7.0, timeout=20))
            while not manager.model("slow").loaded[1].in_flight:
                await asyncio.sleep(0.01)
            stopping = asyncio.ensure_future(server.stop(20))
            assert (await status.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            status.cancel()
            release()
            assert await last == 7.0
            await stopping
            assert (await code(ask(timeout=20)))[0] == "UNAVAILABLE"

    asyncio.run(story())


def test_health_follows_the_models(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path) as (_, manager, _, _, channel):
            health = health_pb2_grpc.HealthStub(channel)
            manager.model("slow").default = None
            checked = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert checked.status == health_pb2.HealthCheckResponse.NOT_SERVING
            manager.model("slow").default = 1
            checked = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(story())


def test_an_unavailable_address_is_an_error(tmp_path: Path) -> None:
    async def story() -> None:
        manager = ModelManager({"slow": Here(tmp_path)}, load=lambda _: Slow())
        with pytest.raises(InputError, match=r"Cannot listen on 192\.0\.2\.1:8500"):  # an address of nobody
            await start_grpc(manager, "192.0.2.1:8500")
        await manager.close()

    asyncio.run(story())


# -- methods in this process, without a channel

DIGITS = SignatureInfo(
    "serving_default",
    {"image": TensorInfo("image", FLOAT, (None, 8, 8, 1), "image")},
    {
        "probabilities": TensorInfo("probabilities", FLOAT, (None, 10), "p"),
        "score": TensorInfo("score", FLOAT, (None,), "s"),
    },
    PREDICT,
)


def tensors(name: str, values: np.ndarray) -> Any:
    """Inputs of a PredictRequest."""
    request = message_class("PredictRequest")()
    fill_tensor(request.inputs[name], values)
    return request.inputs


def test_tensors_become_the_arrays_of_a_signature() -> None:
    images = np.random.default_rng(0).random((2, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(read_tensors(DIGITS, tensors("image", images))["image"], images)


@pytest.mark.parametrize(
    ("message", "name", "values"),
    [
        ("takes no input 'imgae'. Did you mean 'image'?", "imgae", np.zeros((1, 8, 8, 1), "float32")),
        ("'image' takes float32, not DT_DOUBLE", "image", np.zeros((1, 8, 8, 1))),
        ("'image' takes values of shape [rows, 8, 8, 1], not [8, 8]", "image", np.zeros((8, 8), "float32")),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(message: str, name: str, values: np.ndarray) -> None:
    with pytest.raises(ServingError) as caught:
        read_tensors(DIGITS, tensors(name, values))
    assert message in str(caught.value)


def test_a_request_needs_a_model_inputs_and_known_outputs() -> None:
    with pytest.raises(ServingError, match="names no model"):
        read_spec(message_class("PredictRequest")().model_spec)
    with pytest.raises(ServingError, match="lacks inputs of 'serving_default': image"):
        read_tensors(DIGITS, {})
    assert read_output_filter(DIGITS, ["score"]) == ["score"]
    assert read_output_filter(DIGITS, []) == ["probabilities", "score"]
    with pytest.raises(ServingError, match=r"Did you mean 'score'\?"):
        read_output_filter(DIGITS, ["scores"])
    with pytest.raises(ServingError, match="twice"):
        read_output_filter(DIGITS, ["score"] * 2)


@pytest.fixture(scope="module")
def digits_shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, np.ndarray]:
    """A trained model of the digits: its folder, the model, and two images."""
    digits, folder = load_dataset("digits"), tmp_path_factory.mktemp("digits") / "digits"
    model = build_model("linear", digits)
    fit(model, digits, epochs=3)
    export_saved_model(model, digits, folder)
    return folder, model, digits.take("test")[0]["image"][:2]


@contextlib.asynccontextmanager
async def digits_manager(folder: Path) -> AsyncIterator[ModelManager]:
    manager = ModelManager({"digits": FolderSource(folder)})
    await manager.update()
    yield manager
    await manager.close()


def digits_request(images: np.ndarray) -> Any:
    request = message_class("PredictRequest")()
    request.model_spec.name = "digits"
    fill_tensor(request.inputs["image"], images)
    return request


async def error_of(call: Awaitable[Any]) -> str:
    """Code and message of the error that a method raises."""
    with pytest.raises(ServingError) as caught:
        await call
    return f"{caught.value.code}: {caught.value.message}"


def test_predict_returns_the_models_predictions_and_rejects_what_does_not_fit(
    digits_shelf: tuple[Path, Any, np.ndarray],
) -> None:
    folder, model, images = digits_shelf

    async def story() -> None:
        async with digits_manager(folder) as manager:
            call, request = CallInfo(time.monotonic() + 60), digits_request(images)
            response = await predict(manager, request.SerializeToString(), call)
            np.testing.assert_allclose(
                tensor_to_array(response.outputs["probabilities"]), model(images).numpy(), atol=1e-5
            )
            assert (response.model_spec.name, response.model_spec.version.value) == ("digits", 1)
            request.output_filter.append("score")
            assert list((await predict(manager, request.SerializeToString(), call)).outputs) == ["score"]
            assert "is no PredictRequest" in await error_of(predict(manager, b"\xff\xff", call))
            request.model_spec.signature_name = "predict"
            error = await error_of(predict(manager, request.SerializeToString(), call))
            assert error.startswith("FAILED_PRECONDITION: There is no sig")
            request.model_spec.version.value = 7
            assert (await error_of(predict(manager, request.SerializeToString(), call))).startswith("NOT_FOUND")
            status = message_class("GetModelStatusRequest")()
            status.model_spec.name = "digits"
            (version,) = (await get_status(manager, status.SerializeToString(), call)).model_version_status
            assert (version.version, version.state) == (1, 30)

    asyncio.run(story())


def reload_request(**model: Any) -> bytes:
    """A request to reload a configuration with one model."""
    request = message_class("ReloadConfigRequest")()
    request.config.model_config_list.config.add(**model)
    return request.SerializeToString()


def test_only_the_present_configuration_can_be_reloaded_and_only_by_administrators(
    digits_shelf: tuple[Path, Any, np.ndarray],
) -> None:
    folder = digits_shelf[0]
    principals: list[str] = []

    async def story() -> None:
        async with digits_manager(folder) as manager:

            async def reload_sources(principal: str) -> None:
                principals.append(principal)
                await manager.reload()

            reload = functools.partial(reload_config, reload_sources, manager)
            local = CallInfo(time.monotonic() + 60, peer="ipv4:127.0.0.1:1234")
            present = reload_request(name="digits", base_path=str(folder), model_platform="tensorflow")
            for allowed in (b"", reload_request(name="digits"), present):
                assert (await reload(allowed, local)).status.error_code == 0
            for message, body in {
                "PERMISSION_DENIED: Model 'mine' is not served": reload_request(name="mine", base_path="/tmp/mine"),
                "PERMISSION_DENIED: Model 'digits' is served from where it is": reload_request(
                    name="digits", base_path="/tmp/mine"
                ),
                "UNIMPLEMENTED: Versions and labels follow the registry": reload_request(
                    name="digits", version_labels={"stable": 1}
                ),
            }.items():
                assert (await error_of(reload(body, local))).startswith(message)
            remote = CallInfo(time.monotonic() + 60, peer="ipv4:10.0.0.7:1234")
            assert "own machine" in await error_of(reload(b"", remote))
            await reload(b"", remote._replace(administrator="operator", principal="operator"))

    asyncio.run(story())
    assert principals == ["ipv4:127.0.0.1:1234"] * 3 + ["operator"]


async def failure(call: Awaitable[Any]) -> tuple[str, str]:
    """Status code and details with which a call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details()


def test_errors_reach_clients_with_their_codes_and_a_bounded_message(
    digits_shelf: tuple[Path, Any, np.ndarray],
) -> None:
    folder, model, images = digits_shelf
    path = "/tensorflow.serving.PredictionService"

    async def story() -> None:
        async with digits_manager(folder) as manager:
            server = await start_grpc(manager, "127.0.0.1:0")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                call = channel.unary_unary(f"{path}/Predict")
                request = digits_request(images)
                request.output_filter.append("class")
                response = message_class("PredictResponse").FromString(
                    await call(request.SerializeToString(), timeout=30)
                )
                predicted = tensor_to_array(response.outputs["class"])
                assert [int(name) for name in predicted] == model(images).numpy().argmax(axis=1).tolist()
                request.model_spec.name = "digit"
                code, details = await failure(call(request.SerializeToString(), timeout=30))
                assert (code, "Did you mean 'digits'?" in details) == ("NOT_FOUND", True)
                assert (await failure(call(b"\xff" * 20, timeout=30)))[0] == "INVALID_ARGUMENT"
                request = digits_request(images)
                fill_tensor(request.inputs["x" * 100_000], images)
                code, details = await failure(call(request.SerializeToString(), timeout=30))
                assert (code, len(details)) == ("INVALID_ARGUMENT", 500)
                unknown = channel.unary_unary(f"{path}/Explain")
                assert (await failure(unknown(b"", timeout=30)))[0] == "UNIMPLEMENTED"
                stub = health_pb2_grpc.HealthStub(channel)
                health = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
                assert health.status == health_pb2.HealthCheckResponse.SERVING
            await server.stop(1)

    asyncio.run(story())
