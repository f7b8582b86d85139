"""Malformed and malicious requests to a running server: each gets an error message, and serving continues."""

import base64
import contextlib
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("schemathesis")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import grpc
import httpx
import schemathesis
import tensorflow as tf
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from mlkit.export.protos import fill_tensor, message_class
from mlkit.export.signatures import CLASSIFY, REGRESS
from mlkit.serving import running_server
from mlkit.serving.grpc_server import SERVICES
from mlkit.serving.metrics import METRICS_PATH
from mlkit.serving.options import ServedPath
from mlkit.serving.server import RunningServer
from tests.conftest import free_port
from tests.serving.test_auth import ATTACKS, Provider, bearer, call, guarded, keys, provider  # noqa: F401  fixtures
from tests.serving.test_grpc_server import examples, shelf  # noqa: F401  a fixture: our model, of a class and a number
from tests.serving.test_protocol import NASTY, fast, spoil
from tests.serving.test_server import WINE, converted, row  # noqa: F401  fixtures

# -- two models: ours, and a foreign one with every type, unusual shapes, and graphs that reject some inputs

SPEC = tf.TensorSpec
EVERY = {
    "image": (SPEC([None, 2, 2], tf.float32), [[[0.5, 1.0], [2.0, 3.0]], [[1e-3, -4.0], [1e30, 0.0]]]),
    "whole": (SPEC([None], tf.int32), [1, -2]),
    "long": (SPEC([None], tf.int64), [2**60, 0]),
    "flag": (SPEC([None], tf.bool), [True, False]),
    "words": (SPEC([None, None], tf.string), [["Porto", "é"], ["", "x"]]),
    "small": (SPEC([None], tf.uint8), [0, 255]),
    "half": (SPEC([None], tf.float16), [0.5, -1.0]),
    "double": (SPEC([None], tf.float64), [1e300, 0.0]),
}
SIGNATURES = {
    "serving_default": (
        EVERY,
        lambda **inputs: inputs | {"words_bytes": inputs["words"], "double": 1 / inputs["double"]},
    ),
    "scalar": ({"x": (SPEC([], tf.float32), 1.5)}, lambda x: {"y": x / 0.0}),
    "free": ({"x": (SPEC(None, tf.float32), [[1.0], [2.0]])}, lambda x: {"y": x + 1}),
    "picky": ({"x": (SPEC([None], tf.int32), [0, 2])}, lambda x: {"y": tf.gather([1, 2, 3], x)}),
    "fixed": ({"x": (SPEC([2, 1], tf.float32), [[1.0], [2.0]])}, lambda x: {"y": x @ tf.transpose(x)}),
    "number": ({"x": (SPEC([None], tf.string), ["1.5", "-2"])}, lambda x: {"y": tf.strings.to_number(x)}),
    "complex": ({"x": (SPEC([None], tf.complex64), [1.0, 2.0])}, lambda x: {"y": x * x}),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, made = tf.Module(), {}
    for name, (takes, answer) in SIGNATURES.items():
        specs = {key: SPEC(spec.shape, spec.dtype, key) for key, (spec, _) in takes.items()}
        made[name] = tf.function(answer).get_concrete_function(**specs)
    folder = tmp_path_factory.mktemp("odd")
    tf.saved_model.save(module, str(folder / "1"), signatures=made)
    return folder


class Served(NamedTuple):
    """A server, and what shows that it is well."""

    server: RunningServer
    port: int  # of gRPC

    def address(self) -> tuple[str, int]:
        host, port = self.server.url.removeprefix("http://").split(":")
        return host, int(port)

    def check(self) -> None:
        """The processes are those that were started, and answer what they should."""
        with contextlib.closing(Line(self)) as line:
            line.socket.sendall(b"GET /readyz HTTP/1.1\r\nhost: here\r\n\r\n")
            assert json.loads(line.answer()[2])["processes"] == {"ready": 2, "total": 2}
        for pid in self.server.pids:
            os.kill(pid, 0)
        for _ in range(6):  # on new connections, to either process
            with contextlib.closing(Line(self)) as line:
                line.socket.sendall(right_bytes())
                assert json.loads(line.answer()[2]) == {"predictions": [1, 3]}


RIGHT = {"signature_name": "picky", "instances": [0, 2]}
RIGHT_BODY = json.dumps(RIGHT).encode()


@pytest.fixture(scope="module")
def served(shelf: Path, odd: Path) -> Iterator[Served]:  # noqa: F811
    """Two processes, that have to be the same ones after each test."""
    port = free_port()
    models = ServedPath("shop", str(shelf)), ServedPath("odd", str(odd))
    with running_server(*models, processes=2, grpc_port=port, body_bytes=1_000_000) as server:
        yield Served(server, port)


@pytest.fixture(autouse=True)
def _still_well(served: Served) -> Iterator[None]:
    yield
    served.check()


def right_requests() -> list[tuple[str, dict]]:
    """Path and body of valid requests."""
    requests: list[tuple[str, dict]] = []
    for name, (takes, _) in SIGNATURES.items():
        columns = {key: value for key, (_, value) in takes.items()}
        requests.append(("odd:predict", {"signature_name": name, "inputs": columns}))
        if all(isinstance(value, list) for value in columns.values()):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            requests.append(("odd:predict", {"signature_name": name, "instances": rows}))
    buyer, classify, spent = {"age": 31.0, "city": "Porto"}, "kept_classify", "spent_regress"
    text = base64.b64encode(examples()[0].SerializeToString()).decode()
    requests += [
        ("shop:predict", {"instances": [buyer, buyer]}),
        ("shop:predict", {"inputs": {"age": [1], "city": ["x"]}}),
    ]
    requests += [
        ("shop:classify", {"signature_name": classify, "examples": [buyer, buyer], "context": {"city": "Lille"}})
    ]
    requests += [("shop:regress", {"signature_name": spent, "examples": [buyer]})]
    requests += [("shop:predict", {"signature_name": "serving_examples", "instances": [{"b64": text}]})] * 2
    return requests


RIGHT_REQUESTS = right_requests()

# -- what the server promises in its own document


def test_the_document_is_valid_openapi_without_implementation_details(served: Served) -> None:
    document = httpx.get(f"{served.server.url}/openapi.json").json()
    schemathesis.openapi.from_dict(document).validate()
    operations = [operation for place in document["paths"].values() for operation in place.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert "RestApplication" not in json.dumps(document)
    (model, *_) = document["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert model["schema"]["enum"] == ["shop", "odd"]


def cases(served: Served, mode: GenerationMode) -> Iterator[tuple[str, st.SearchStrategy]]:
    """Requests to each operation of the document, valid and invalid by its schemas."""
    schema = schemathesis.openapi.from_url(f"{served.server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.POSITIVE or operation.body or "{version}" in operation.path:  # what can be wrong
            yield operation.label, operation.as_strategy(generation_mode=mode)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name)
def test_responses_conform_to_the_document(served: Served, mode: GenerationMode) -> None:
    """Codes, headers, content types and schemas of all responses, checked by schemathesis."""
    statuses = Counter()
    for _, strategy in cases(served, mode):

        @settings(fast, max_examples=15, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(strategy)
        def ask(case: schemathesis.Case) -> None:
            answer = case.call()
            statuses[answer.status_code] += 1
            # What a signature takes is told by the model's metadata, so not every body of the form is answered.
            case.validate_response(answer, excluded_checks=[CHECKS.get_one("positive_data_acceptance")])

        ask()
    assert statuses.total() > 150


@pytest.mark.parametrize(("path", "body"), [item for item in RIGHT_REQUESTS if "complex" not in item[1].values()])
def test_valid_requests_get_documented_responses(served: Served, path: str, body: dict) -> None:
    schema = schemathesis.openapi.from_url(f"{served.server.url}/openapi.json")
    model, verb = path.split(":")
    for place, more in (("", {}), ("/versions/{version}", {"version": 1})):
        operation = schema[f"/v1/models/{{model}}{place}:{verb}"]["POST"]
        case = operation.Case(path_parameters={"model": model} | more, body=body, media_type="application/json")
        answer = case.call()
        assert answer.status_code == 200, answer.text
        case.validate_response(answer)


# -- REST, byte by byte


class Line:
    """A connection, on which anything can be sent."""

    def __init__(self, served: Served):
        self.socket = socket.create_connection(served.address(), timeout=60)
        self.reader = self.socket.makefile("rb")

    def close(self) -> None:
        self.reader.close()
        self.socket.close()

    def answer(self, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers and body; status 0 when the server has closed the connection."""
        status = self._status()
        while status == 100:
            self.reader.readline()
            status = self._status()
        headers = {}
        while line := self.reader.readline().strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = 0 if method == "HEAD" else int(headers.get("content-length", 0))
        return status, headers, self.reader.read(length)

    def _status(self) -> int:
        try:
            line = self.reader.readline()
        except ConnectionResetError:
            return 0
        return int(line.split()[1]) if line else 0


def check_answer(method: str, status: int, headers: dict[str, str], body: bytes) -> None:
    """Invariants of every response."""
    assert status < 500 or status in (501, 503, 504), (status, body)
    if method == "HEAD":
        return
    if status >= 400:
        assert headers["content-type"] == "application/json", body
        document = json.loads(body)
        assert list(document) == ["error"]
        assert document["error"]
    elif headers.get("content-type") == "application/json":
        json.loads(body)


METHODS = ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "SEARCH", "post"]
PLACES = ["/versions/1", "/versions/9", "/versions/-1", "/versions/1e9", "/versions/" + "9" * 40, "/labels/champion"]
PLACES += ["/labels/", "/labels/%00%ff", "/metadata", "/metadata:predict", "//", "/..", "/%2e%2e/%2e%2e/etc/passwd"]
PATHS = ["/", "/v1", "/v1/models", "/v1/models/", "/v1/models/:predict", "/models", "/reload", "/livez", "/readyz"]
PATHS += ["/docs", "/openapi.json", METRICS_PATH, "/v1/models/odd", "/V1/MODELS/odd:PREDICT", "/v1/models/ODD:predict"]
PATHS += ["/v1/models/" + "x" * 5000, "/%", "/%zz", "/\xc3\xa9".encode().decode("latin-1"), "/?" + "a=b&" * 500]
PATHS += ["/v2/models/odd/infer", "/v1/models/odd:predict:predict", "/v1/models/%6fdd:predict", "/v1/models/odd%0a"]
HEADERS = [("content-type", "text/plain"), ("content-type", "é;=,"), ("content-encoding", "gzip"), ("accept", "x/y")]
HEADERS += [("request-timeout", value) for value in ("-1", "nan", "1e999", "soon", "0x1", "1_0", "", "٣")]
HEADERS += [("request-timeout", "5"), ("request-timeout", "1e-9"), ("traffic-key", "\xff\x80"), ("traffic-key", "")]
HEADERS += [("traceparent", value) for value in ("00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\xff" * 55)]
HEADERS += [("expect", "100-continue"), ("expect", "200-ok"), ("connection", "upgrade"), ("upgrade", "websocket")]
HEADERS += [("authorization", "Bearer x"), ("x-api-key", "x"), ("cookie", "a=b; c"), ("range", "bytes=0-1")]
HEADERS += [("x-long", "x" * 5000), ("host", "elsewhere"), ("connection", "close"), ("accept-encoding", "gzip, br")]


def almost_right(chance: random.Random) -> tuple[str, str, list[tuple[str, str]], bytes]:
    """Method, path, headers and body of a request with few things that should not be there, or none."""
    path, document = chance.choice(RIGHT_REQUESTS)
    method, path, body = "POST", f"/v1/models/{path}", spoil(chance, document)
    kind = chance.random()
    if kind < 0.1:
        method = chance.choice(METHODS)
    elif kind < 0.2:
        model, _, verb = path.rpartition(":")
        path = f"{model}{chance.choice(PLACES)}:{verb}"
    elif kind < 0.3:
        method, path = chance.choice(["POST", *METHODS]), chance.choice(PATHS)
    elif kind < 0.33:
        body = chance.choice([b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf" + body, b"\x00", b'"', b"NaN", b""])
    elif kind < 0.36:
        body = json.dumps({"signature_name": "free", "inputs": [chance.choice(NASTY)] * chance.randint(0, 3)}).encode()
    headers = chance.sample(HEADERS, chance.choice([0, 0, 0, 1, 2]))
    return method, path, headers, body


def as_bytes(chance: random.Random, method: str, path: str, headers: list, body: bytes) -> bytes:
    """A request as it goes over the wire, with a length or in chunks."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += [] if "host" in dict(headers) else ["host: here"]
    if chance.random() < 0.2:
        at = chance.randint(0, len(body))
        parts = [part for part in (body[:at], body[at:]) if part]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        lines.append("transfer-encoding: chunked")
    else:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8" if chance.random() < 0.5 else "latin-1", "replace") + b"\r\n\r\n" + body


def test_ten_thousand_almost_valid_requests_succeed_or_are_rejected(served: Served) -> None:
    chance, statuses = random.Random(0), Counter()
    lines = [Line(served) for _ in range(4)]  # connections that go on and on, to both processes
    for number in range(10_000):
        line = lines[number % 4]
        method, path, headers, body = almost_right(chance)
        line.socket.sendall(as_bytes(chance, method, path, headers, body))
        status, response_headers, answer = line.answer(method)
        statuses[status] += 1
        assert status, (method, path, headers, body)
        check_answer(method, status, response_headers, answer)
        if response_headers.get("connection") == "close":
            line.close()
            lines[number % 4] = Line(served)
    for line in lines:
        line.close()
    assert statuses[200] > 500  # all ways were gone
    assert {200, 400, 404, 405, 501, 504} <= statuses.keys()


# -- HTTP itself


def right_bytes(path: str = "odd:predict", document: dict | None = None) -> bytes:
    body = json.dumps(document or RIGHT).encode()
    return b"POST /v1/models/%b HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (
        path.encode(),
        len(body),
        body,
    )


def test_pipelined_requests_get_responses_in_order(served: Served) -> None:
    chance = random.Random(1)
    with contextlib.closing(Line(served)) as line:
        for _ in range(5):
            expected, pipelined = [], b""
            for _ in range(100):
                value = chance.choice([0, 1, 2, 7, "x"])
                expected.append({0: [1], 1: [2], 2: [3]}.get(value))
                pipelined += right_bytes(document={"signature_name": "picky", "instances": [value]})
            line.socket.sendall(pipelined)
            for predictions in expected:
                status, headers, body = line.answer()
                check_answer("POST", status, headers, body)
                assert json.loads(body).get("predictions") == predictions


def test_a_response_without_a_body_does_not_wait_for_the_next_request(served: Served) -> None:
    with contextlib.closing(Line(served)) as line:
        line.socket.sendall(b"HEAD /livez HTTP/1.1\r\nhost: here\r\n\r\nGET /li")  # half of the next
        assert line.answer("HEAD")[0] == 200
        line.socket.sendall(b"vez HTTP/1.1\r\nhost: here\r\n\r\n")
        assert json.loads(line.answer()[2]) == {"alive": True}


HEAD = b"POST /v1/models/odd:predict HTTP/1.1\r\nhost: here\r\n"
NO_HTTP = {
    "nothing": b"\r\n\r\n",
    "noise": bytes(range(256)) * 4 + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "an unknown version": b"GET /livez HTTP/7.3\r\n\r\n",
    "no version": b"GET /livez HTTP/\r\n\r\n",
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 50\r\n\r\n" + RIGHT_BODY,
    "a length below zero": HEAD + b"content-length: -5\r\n\r\n" + RIGHT_BODY,
    "a length in words": HEAD + b"content-length: five\r\n\r\n" + RIGHT_BODY,
    "a length of 400 digits": HEAD + b"content-length: " + b"9" * 400 + b"\r\n\r\n" + RIGHT_BODY,
    "a length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "another encoding": HEAD + b"transfer-encoding: gzip\r\n\r\n" + RIGHT_BODY,
    "a chunk of no size": HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\nabc\r\n",
    "a chunk below zero": HEAD + b"transfer-encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    "a chunk of too many bytes": HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
    "a chunk longer than its size": HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nabcdefgh\r\n0\r\n\r\n",
    "a header without a colon": HEAD + b"nothing\r\n\r\n",
    "a header with zero bytes": HEAD + b"a\x00b: c\x00\r\n\r\n",
    "a header that goes on": HEAD + b"a: b\r\n c: d\r\ncontent-length: 0\r\n\r\n",
    "a target with spaces": b"GET /a b c HTTP/1.1\r\n\r\n",
    "a target of nothing": b"GET  HTTP/1.1\r\n\r\n",
    "a host to connect to": b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n",
    "everything": b"OPTIONS * HTTP/1.1\r\nhost: here\r\n\r\n",
    "a whole address": b"GET http://example.org/livez HTTP/1.1\r\nhost: example.org\r\n\r\n",
    "a socket of the web": b"GET /livez HTTP/1.1\r\nhost: here\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "a socket of the web, with a body": right_bytes().replace(
        b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 1
    ),
    "HTTP/2, asked for": b"GET /livez HTTP/1.1\r\nhost: here\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
    "a long line": b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": HEAD + b"a: b\r\n" * 20_000 + b"\r\n",
    "a long header": HEAD + b"a: " + b"x" * 500_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_malformed_http_is_rejected_or_closed(served: Served, name: str) -> None:
    with contextlib.closing(Line(served)) as line:
        with contextlib.suppress(ConnectionError):  # it has been told before it had said all
            line.socket.sendall(NO_HTTP[name])
            line.socket.shutdown(socket.SHUT_WR)
        status, headers, body = line.answer()
        if status:
            check_answer("POST", status, headers, body)


def test_a_body_too_large_is_rejected_before_it_has_arrived(served: Served) -> None:
    for head in (b"content-length: 1000001", b"content-length: 99999999999", b"transfer-encoding: chunked"):
        with contextlib.closing(Line(served)) as line:
            line.socket.sendall(HEAD + head + b"\r\n\r\n")
            if b"chunked" in head:
                with contextlib.suppress(ConnectionError):
                    for _ in range(1001):
                        line.socket.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            status, headers, body = line.answer()
            assert status == 413
            check_answer("POST", status, headers, body)


def test_interrupted_requests_delay_no_other_client(served: Served) -> None:
    whole = right_bytes("shop:predict", {"instances": [{"age": 31.0, "city": "Porto"}] * 100})
    for end in range(1, len(whole), 37):
        with contextlib.closing(Line(served)) as line:
            line.socket.sendall(whole[:end])
            if end % 2:  # reset rather than closed
                line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.closing(Line(served)) as line:  # byte by byte is slow, but a request
        for start in range(len(whole)):
            line.socket.sendall(whole[start : start + 1])
        assert line.answer()[0] == 200


# -- gRPC


def right_messages() -> list[tuple[str, Message]]:
    """Method and message of valid calls."""
    calls: list[tuple[str, Message]] = []
    for name, (takes, _) in SIGNATURES.items():
        request = message_class("PredictRequest")()
        request.model_spec.name, request.model_spec.signature_name = "odd", name
        for key, (info, value) in takes.items():
            array = np.array(value, object if info.dtype == tf.string else info.dtype.as_numpy_dtype)
            fill_tensor(request.inputs[key], array)
        if name == "serving_default":
            request.output_filter.extend(["image", "words"])
        calls.append(("PredictionService/Predict", request))
    several = message_class("MultiInferenceRequest")()
    serialized = [example.SerializeToString() for example in examples()]
    for method, signature, name in (
        ("Classify", "kept_classify", "Classification"),
        ("Regress", "spent_regress", "Regression"),
    ):
        request = message_class(f"{name}Request")()
        request.model_spec.name, request.model_spec.signature_name = "shop", signature
        for example in serialized:
            request.input.example_list.examples.add().MergeFromString(example)
        calls += [(f"PredictionService/{method}", request)] * 3
        several.tasks.add(model_spec=request.model_spec, method_name=CLASSIFY if method == "Classify" else REGRESS)
    several.input.CopyFrom(request.input)
    metadata = message_class("GetModelMetadataRequest")(metadata_field=["signature_def"])
    status, reload = message_class("GetModelStatusRequest")(), message_class("ReloadConfigRequest")()
    metadata.model_spec.name = status.model_spec.name = "odd"
    reload.config.model_config_list.config.add(name="odd")
    calls += [("PredictionService/MultiInference", several)] * 3 + [("PredictionService/GetModelMetadata", metadata)]
    return [*calls, ("ModelService/GetModelStatus", status), ("ModelService/HandleReloadConfigRequest", reload)]


RIGHT_MESSAGES = right_messages()


def spoil_tensor(chance: random.Random, tensor: Message) -> None:
    """Have a tensor's type, shape and values not go together."""
    kind, dims = chance.randrange(6), tensor.tensor_shape.dim
    if kind == 0:
        tensor.dtype = chance.choice([*range(26), 101, 107, 9999, -1])
    elif kind == 1:
        dims.add(size=chance.choice([0, 1, 2, -1, 2**40, 2**62]))
    elif kind == 2 and dims:
        dims[chance.randrange(len(dims))].size = chance.choice([0, 1, 3, -1, -(2**63), 2**31, 2**63 - 1])
    elif kind == 3:
        tensor.tensor_content = chance.randbytes(chance.choice([1, 4, 8, 16, 1000]))
    elif kind == 4:
        field = chance.choice(
            [descriptor for descriptor in tensor.DESCRIPTOR.fields if descriptor.name.endswith("_val")]
        )
        value = chance.choice([b"", b"\xff"]) if field.name == "string_val" else chance.choice([0, 1, 255])
        getattr(tensor, field.name).extend([value] * chance.choice([1, 2, 100]))
    else:
        tensor.tensor_shape.unknown_rank = True


def spoil_message(chance: random.Random, request: Message) -> None:
    """Make a request name something unknown, or change its form."""
    spec = request.model_spec if "model_spec" in request.DESCRIPTOR.fields_by_name else None
    kind = chance.randrange(8)
    if spec is not None and kind == 0:
        spec.name = chance.choice(["", "shop", "odd", "x" * 5000, "\x00", "é"])
    elif spec is not None and kind == 1:
        spec.version.value = chance.choice([0, 1, 2, -1, 2**63 - 1, -(2**63)])
    elif spec is not None and kind == 2:
        spec.version_label = chance.choice(["", "champion", "é" * 2000])
    elif spec is not None and kind == 3:
        spec.signature_name = chance.choice([*SIGNATURES, "kept_classify", "spent_regress", "serving_examples", "x"])
    elif getattr(request, "inputs", None) and kind < 7:
        name = chance.choice(list(request.inputs))
        if kind == 4:
            request.inputs[chance.choice(["x", "y", "", "image\x00"])].CopyFrom(request.inputs.pop(name))
        else:
            spoil_tensor(chance, request.inputs[name])
    elif "output_filter" in request.DESCRIPTOR.fields_by_name:
        request.output_filter.extend(chance.choices(["y", "image", "x" * 2000, ""], k=2))
    elif "input" in request.DESCRIPTOR.fields_by_name:
        spoil_examples(chance, request.input.example_list.examples)


def spoil_examples(chance: random.Random, messages: Any) -> None:
    """Have examples lack features, or hold them in another form."""
    for example in messages:
        feature = example.features.feature[chance.choice(["age", "city", "x", ""])]
        feature.Clear()
        lists = [("bytes_list", [b"\xff", b""]), ("float_list", [float("nan"), 1e30]), ("int64_list", [-(2**63)])]
        name, values = chance.choice(lists)
        getattr(feature, name).value.extend(values[: chance.randint(0, 2)])
    if chance.random() < 0.2:
        del messages[:]


def test_three_thousand_almost_valid_messages_succeed_or_are_rejected(served: Served) -> None:
    chance, codes = random.Random(0), Counter()
    methods = [f"{service}/{method}" for service, own in SERVICES.items() for method in own]
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        calls = {method.rpartition(".")[2]: channel.unary_unary(f"/{method}") for method in methods}
        for _ in range(60):
            futures = []
            for _ in range(50):
                method, message = chance.choice(RIGHT_MESSAGES)
                request = type(message).FromString(message.SerializeToString())
                for _ in range(chance.choice([0, 1, 1, 2])):
                    spoil_message(chance, request)
                body = bytearray(request.SerializeToString())
                for _ in range(chance.choice([0, 0, 0, 1, 4])):
                    body[chance.randrange(len(body))] = chance.randrange(256)
                if chance.random() < 0.1:
                    method, body = chance.choice(list(calls)), chance.randbytes(chance.randint(0, 300))
                key = (("traffic-key", "x"), ("request-bin", b"\xff"))[: chance.randint(0, 2)]
                futures.append(calls[method].future(bytes(body), timeout=60, metadata=key))
            for future in futures:
                codes[future.code().name] += 1
    refused = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "PERMISSION_DENIED"}
    assert {"OK", *refused} == codes.keys()
    assert codes["OK"] > 300


# -- tokens


def test_no_forged_or_expired_token_opens_rest_or_grpc(
    guarded: tuple,  # noqa: F811
    provider: Provider,  # noqa: F811
    row: dict,  # noqa: F811
) -> None:
    server, port, _, _ = guarded
    body = {"instances": [row]}
    with httpx.Client(base_url=server.url) as client, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert client.post(f"{WINE}:predict", json=body, headers=bearer(provider.sign())).status_code == 200
        assert call(channel, "PredictionService", "Predict", **bearer(provider.sign()))[0] == "INVALID_ARGUMENT"
        for name in ATTACKS.keys() - {"no text"}:  # which neither library sends
            forged = bearer(ATTACKS[name](provider))
            answer = client.post(f"{WINE}:predict", json=body, headers=forged)
            assert (answer.status_code, list(answer.json())) == (401, ["error"]), name
            assert call(channel, "PredictionService", "Predict", **forged)[0] == "UNAUTHENTICATED", name
