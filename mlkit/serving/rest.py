"""TF Serving's REST API over the loaded versions: predict, classify, regress, status and metadata.

The ASGI application handles inference, status, metadata and probes itself, without a framework: they are nearly all of
a server's requests. FastAPI provides the documentation and the admin API; it takes half a second to import, so it is
loaded with the first request that needs it. Request and response bodies are handled by `mlkit.serving.protocol`.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import mlkit
from mlkit.errors import InputError, MissingDependencyError, ServingError
from mlkit.export.signatures import CLASSIFY, REGRESS
from mlkit.serving.auth import Authenticator
from mlkit.serving.metrics import METRICS_PATH
from mlkit.serving.model_manager import LoadedVersion, ModelManager
from mlkit.serving.protocol import (
    read_examples,
    read_predict,
    write_classify,
    write_error,
    write_metadata,
    write_predict,
    write_regress,
    write_status,
)
from mlkit.serving.telemetry import Telemetry, current_request

_PATH = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d{1,18})|/labels/([^/:]+))?(?::(predict|classify|regress)|(/metadata))?",
    re.IGNORECASE,
)


class Target(NamedTuple):
    """Parsed request path: a verb on a model, optionally on a version or a label."""

    model: str
    version: int | None
    label: str | None
    verb: str  # predict, classify, regress, metadata or status


@functools.lru_cache(maxsize=1024)
def read_path(
    path: str,  # of a URL, without the query
) -> Target | None:
    """Parse a request path; None for a path outside TF Serving's API."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    model, version, label, verb, metadata = match.groups()
    verb = verb.lower() if verb else "metadata" if metadata else "status"
    return Target(model, int(version) if version else None, label, verb)


class _BodyTooLargeError(Exception):
    pass


class _DisconnectedError(Exception):
    pass


async def _read_body(headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[dict]], limit: int) -> bytes:
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > limit:
        raise _BodyTooLargeError
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _DisconnectedError
        parts.append(message["body"])
        size, more = size + len(message["body"]), message.get("more_body")
        if size > limit:
            raise _BodyTooLargeError
    return b"".join(parts)


def error_body(
    message: str,
) -> bytes:
    """Body of the response to a malformed request."""
    return write_error(ServingError("INVALID_ARGUMENT", message))


_HELD_BODIES = 4  # bodies of the largest size that may be in memory at the same time


class _BodyBudget:
    """Reads request bodies within limits of bytes and seconds; all bodies in memory together are limited, too."""

    def __init__(self, limit: int, total: int, seconds: float):
        self._limit, self._total, self._seconds = limit, total, seconds
        self._held, self._freed = 0, 0  # bytes in memory; bytes freed since memory was last returned

    @contextlib.asynccontextmanager
    async def read(
        self, headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[dict]]
    ) -> AsyncIterator[bytes]:
        """Context manager that holds a body until its request has ended; raises ServingError beyond the budget."""
        size = 0

        async def receive_within_budget() -> dict:
            nonlocal size
            message = await receive()
            received = len(message.get("body", b""))
            size += received
            self._held += received
            if self._held > self._total:
                raise ServingError(
                    "UNAVAILABLE", f"Bodies of {self._total:,} bytes are in memory, which is the limit.", 1.0
                )
            return message

        try:
            async with asyncio.timeout(self._seconds):
                body = await _read_body(headers, receive_within_budget, self._limit)
            yield body
        finally:
            self._held -= size
            self._freed += size
            if self._freed > _TRIM_BYTES:
                self._freed = 0
                _return_free_memory()


_TRIM_BYTES = 64 * 2**20  # freed bytes after which memory is returned to the system


def _return_free_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class ResponseCache:
    """Least-recently-used cache of response bodies, by version and request body."""

    def __init__(
        self,
        limit: int,  # bytes of keys and responses
    ):
        self.limit, self.size = limit, 0
        self._responses: OrderedDict[tuple, bytes] = OrderedDict()

    def get(self, key: tuple) -> bytes | None:
        """Cached response for a key."""
        if key not in self._responses:
            return None
        self._responses.move_to_end(key)
        return self._responses[key]

    def put(self, key: tuple, response: bytes) -> None:
        """Cache a response, unless it takes more than a tenth of the cache."""
        size = self._size(key, response)
        if size * 10 > self.limit:
            return
        if key in self._responses:
            self.size -= self._size(key, self._responses.pop(key))
        self._responses[key] = response
        self.size += size
        while self.size > self.limit:
            self.size -= self._size(*self._responses.popitem(last=False))

    @staticmethod
    def _size(key: tuple, response: bytes) -> int:
        return len(response) + sum(len(part) for part in key if isinstance(part, bytes)) + 200


_log = logging.getLogger("mlkit.serving")
CERTIFICATE = "mlkit.certificate"  # key of the client certificate's name in a connection's state
CLOSE = (b"connection", b"close")  # header
_JSON = (b"content-type", b"application/json")


class RestApplication:
    """ASGI application for TF Serving's REST API and the admin API.

    Request headers: requests with the same `traffic-key` reach the same version where traffic is split, and
    `request-timeout` limits the time to the response. Response headers: `model-version` names the version that
    predicted, `traceparent` the trace.
    """

    def __init__(
        self,
        manager: ModelManager,
        *,
        body_bytes: int = 64 * 2**20,  # largest request body
        cache_bytes: int = 0,  # size of the response cache; 0: no cache
        readiness: Callable[[], dict[str, Any]] | None = None,  # more fields for /readyz
        reload: Callable[[str], Awaitable[None]] | None = None,  # polls the sources; takes the principal's name
        telemetry: Telemetry | None = None,
        auth: Authenticator | None = None,  # None: no authentication
        client_certificates: bool = False,  # whether the scope's state has the name in a client certificate
        on_denied: Callable[[str, str, ServingError], Awaitable[None]] | None = None,  # principal, action, error
    ):
        self.manager, self.body_bytes, self._readiness = manager, body_bytes, readiness or dict
        self._bodies = _BodyBudget(body_bytes, _HELD_BODIES * body_bytes, manager.batching.timeout)
        self._reload, self._telemetry, self.auth = reload or (lambda principal: manager.reload()), telemetry, auth
        self._on_denied, self._identifies = on_denied, auth is not None or client_certificates
        self.cache = ResponseCache(cache_bytes) if cache_bytes else None
        self.draining = False
        self._admin_api: Callable | None = None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return
        target = read_path(scope["path"])
        if target is None or scope["method"] not in ("GET", "POST"):
            await self._handle_other(scope, receive, send)
            return
        with contextlib.suppress(_DisconnectedError):
            status, headers, body = await self.respond(target, scope, receive)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def respond(
        self,
        target: Target,
        scope: Mapping[str, Any],  # ASGI scope
        receive: Callable[[], Awaitable[dict]] | None,  # ASGI receive; None where the body has arrived
        body: bytes | None = None,  # request body, if it has arrived
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body of the response to a request of TF Serving's API."""
        counted = self._telemetry if scope["method"] == "POST" and target.verb in INFERENCE else None
        headers, outcome = dict(scope["headers"]), ("CANCELLED", "The client has disconnected.")
        request = counted and counted.start_request("REST", headers.get(b"traceparent"))
        try:
            status, response_headers, content, outcome = await self._respond(target, scope, headers, receive, body)
        finally:
            if counted:
                counted.end_request(request, target.verb, *outcome)
        if request:
            response_headers.append((b"traceparent", request.trace.header))
        response_headers.append((b"content-length", b"%d" % len(content)))
        if self.draining and CLOSE not in response_headers:
            response_headers.append(CLOSE)
        return status, response_headers, content

    async def _respond(
        self, target: Target, scope: Mapping, headers: dict[bytes, bytes], receive: Callable | None, body: bytes | None
    ) -> tuple[int, list, bytes, tuple]:
        """Status, headers and body; code and message of an error."""
        method = scope["method"]
        try:
            if self._identifies:
                await self._authorize(scope, headers, "predict" if target.verb in INFERENCE else None)
            if method == "POST" and target.verb in INFERENCE:
                return 200, *await self._infer(target, headers, receive, body), ()
            if method == "GET" and target.verb not in INFERENCE:
                return 200, [_JSON], self._describe(target), ()
            raise ServingError("INVALID_ARGUMENT", f"Malformed request: {method} {scope['path']}")
        except ServingError as error:
            return error.http_status, _error_headers(error), write_error(error), (error.code, error.message)
        except _BodyTooLargeError:
            message = f"The body has more than the {self.body_bytes:,} bytes that are accepted."
            return 413, [_JSON, CLOSE], error_body(message), ("INVALID_ARGUMENT", message)
        except TimeoutError:
            message = "The body did not arrive in time."
            return 408, [_JSON, CLOSE], error_body(message), ("DEADLINE_EXCEEDED", message)
        except _DisconnectedError:
            raise
        except Exception:  # a defect of the server
            _log.exception("A request failed")
            error = ServingError("INTERNAL", "The server failed; its log has the reason.")
            return error.http_status, [_JSON], write_error(error), (error.code, error.message)

    async def _authorize(self, scope: dict, headers: dict[bytes, bytes], required: str | None) -> str:
        """Name of the principal, if known; raises ServingError for a denied request."""
        name = _certificate_name(scope)
        if self.auth is not None:
            name = (await self.auth.authorize(headers, required)).name
        if (request := current_request.get()) is not None:
            request.principal = name
        return name

    async def audit_denial(self, scope: dict, error: ServingError) -> None:
        """Report a denied administrative action."""
        if self._on_denied is None:
            return
        address = scope["client"][0] if scope.get("client") else "this machine"
        action = "reload" if scope["path"] == "/reload" else f"{scope['method']} {scope['path']}"[:100]
        await self._on_denied(_certificate_name(scope) or address, action, error)

    def _describe(self, target: Target) -> bytes:
        """Status or metadata of a model; raises ServingError."""
        if target.verb == "status":
            return write_status(self.manager.statuses(target.model, target.version, target.label))
        version = self.manager.acquire(target.model, target.version, target.label)
        return write_metadata(version.model, version.number, version.signatures)

    async def _infer(
        self, target: Target, headers: dict[bytes, bytes], receive: Callable | None, body: bytes | None
    ) -> tuple[list, bytes]:
        deadline = time.monotonic() + _timeout(headers, self.manager.batching.timeout)
        if body is None:
            async with self._bodies.read(headers, receive) as body:
                return await self._infer_body(target, headers, body, deadline)
        return await self._infer_body(target, headers, body, deadline)

    async def _infer_body(
        self, target: Target, headers: dict[bytes, bytes], body: bytes, deadline: float
    ) -> tuple[list, bytes]:
        key = headers.get(b"traffic-key", b"").decode("latin-1")
        with self.manager.acquire(target.model, target.version, target.label, key) as version:
            infer = INFERENCE[target.verb] if self.cache is None else functools.partial(self._cached, target.verb)
            return [_JSON, *version.headers], await infer(version, body, deadline)

    async def _cached(self, verb: str, version: LoadedVersion, body: bytes, deadline: float) -> bytes:
        """Response from the cache, or a new one."""
        key = (version.model, version.number, verb, body)
        response = self.cache.get(key)
        if self._telemetry is not None:
            self._telemetry.count_cache_lookup(version.model, response is not None, self.cache.size)
        if response is None:
            response = await INFERENCE[verb](version, body, deadline)
            self.cache.put(key, response)
        return response

    async def _handle_other(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Probes, metrics, malformed paths and the admin API: everything that is not frequent."""
        path, method = scope["path"], scope["method"]
        if path in ("/livez", "/readyz") and method in ("GET", "HEAD"):
            ready = path == "/livez" or (self.manager.ready and not self.draining)
            content = {"ready": ready, **self._readiness()} if path == "/readyz" else {"alive": True}
            await _send(send, 200 if ready else 503, json.dumps(content).encode())
            return
        if path.startswith("/v1/models") and method in ("GET", "POST"):
            missing = path.rstrip("/") == "/v1/models" and method == "GET"
            message = "Missing model name in request." if missing else f"Malformed request: {method} {path}"
            await _send(send, 400, error_body(message))
            return
        if not await self._admit_to_admin_api(scope, send):
            return
        if path == METRICS_PATH and method == "GET" and self._telemetry is not None:
            self._telemetry.sample()
            metrics = await asyncio.to_thread(self._telemetry.read)  # of all processes
            await _send(send, 200, metrics, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])
            return
        if self._admin_api is None:
            loop = asyncio.get_running_loop()
            self._admin_api = await loop.run_in_executor(None, make_admin_api, self, self._reload)
        await self._admin_api(scope, receive, send)

    async def _admit_to_admin_api(self, scope: dict, send: Callable) -> bool:
        """Authorize reading or changing; False when the request was denied and answered."""
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        try:
            scope["mlkit.principal"] = await self._authorize(scope, dict(scope["headers"]), None if reads else "admin")
            scope["mlkit.administrator"] = self.auth is not None and not reads
        except ServingError as error:
            if not reads:
                await self.audit_denial(scope, error)
            await _send(send, error.http_status, write_error(error), _error_headers(error))
            return False
        return True


def _certificate_name(scope: Mapping[str, Any]) -> str:
    """Name in the client certificate; "" without one."""
    return scope.get("state", {}).get(CERTIFICATE, "")


def _error_headers(error: ServingError) -> list[tuple[bytes, bytes]]:
    headers = [_JSON]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
    if error.code == "UNAUTHENTICATED":
        headers.append((b"www-authenticate", b'Bearer realm="mlkit"'))
    return headers


async def _send(send: Callable, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = (_JSON,)) -> None:
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _timeout(headers: Mapping[bytes, bytes], default: float) -> float:
    """Seconds until the deadline of a request; raises ServingError."""
    header = headers.get(b"request-timeout")
    if header is None:
        return default
    try:
        seconds = float(header)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise ServingError("INVALID_ARGUMENT", f"request-timeout is a number of seconds. Received: {header[:40]!r}")
    return min(seconds, default)


_LOOP_BYTES = 262_144  # largest body that is parsed on the event loop
_LOOP_VALUES = 65_536  # largest output that is written on the event loop


async def _predict(version: LoadedVersion, body: bytes, deadline: float) -> bytes:
    if len(body) > _LOOP_BYTES:
        call = await asyncio.to_thread(read_predict, body, version.signatures)
    else:
        call = read_predict(body, version.signatures)
    outputs = await version.run(call.signature.name, call.inputs, call.rows, deadline)
    for values in outputs.values():
        if values.size > _LOOP_VALUES:
            return await asyncio.to_thread(write_predict, outputs, call.row_format)
    return write_predict(outputs, call.row_format)


async def _classify(version: LoadedVersion, body: bytes, deadline: float) -> bytes:
    return write_classify(*await _predict_examples(version, body, deadline, CLASSIFY))


async def _regress(version: LoadedVersion, body: bytes, deadline: float) -> bytes:
    return write_regress(*await _predict_examples(version, body, deadline, REGRESS))


async def _predict_examples(version: LoadedVersion, body: bytes, deadline: float, method: str) -> tuple[dict, int]:
    if len(body) > _LOOP_BYTES:
        call = await asyncio.to_thread(read_examples, body, version.signatures, method)
    else:
        call = read_examples(body, version.signatures, method)
    inputs = {next(iter(call.signature.inputs)): np.array(call.examples, object)}
    return await version.run(call.signature.name, inputs, len(call.examples), deadline), len(call.examples)


INFERENCE = {"predict": _predict, "classify": _classify, "regress": _regress}
_LOCAL_ADDRESSES = ("127.0.0.1", "::1", None)  # None: a unix socket
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")  # other names may resolve here, by foreign DNS


def _is_local(address: str | None, headers: Mapping[str, str]) -> bool:
    """Whether the client is on this machine, and is not a foreign web page in a browser on it."""
    origin, host = headers.get("origin"), headers.get("host", "")
    same_origin = origin is None or (_LOCAL_HOST.fullmatch(host) and origin in (f"http://{host}", f"https://{host}"))
    return address in _LOCAL_ADDRESSES and bool(same_origin)


def overview(manager: ModelManager) -> list[dict[str, Any]]:  # ready for JSON
    """All models, with their versions and routing."""
    return [_overview(manager, name) for name in manager.names()]


def _overview(manager: ModelManager, name: str) -> dict[str, Any]:
    model = manager.model(name)
    routing = {"name": name, "default": model.default, "labels": model.labels, "traffic": model.traffic}
    versions = [status._asdict() for status in manager.statuses(name)]
    shadows = [version.shadow for version in model.loaded.values() if version.shadow is not None]
    shadow = dataclasses.asdict(shadows[0].counts) if shadows else None
    return routing | {"versions": versions, "shadow": shadow, "problem": model.source_error}


def make_admin_api(
    application: RestApplication,
    reload: Callable[[str], Awaitable[None]],  # polls the sources; takes the principal's name
) -> Callable:  # an ASGI application
    """FastAPI application with the documentation and the admin API; raises MissingDependencyError.

    `POST /reload` takes no path and no name, so that no client can have a file of its choice loaded. It requires the
    scope admin, or, without authentication, a client on this machine. A browser on this machine may show foreign
    pages, which can send such a request without being able to read the response: only the server's own pages may.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, RedirectResponse
        from starlette.exceptions import HTTPException
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error
    manager, denials = application.manager, (401, 403) if application.auth else ()
    about = {"title": "mlkit", "summary": "Deployed models, with TF Serving's API", "version": mlkit.__version__}
    api = FastAPI(**about, docs_url="/docs", redoc_url=None)

    @api.exception_handler(HTTPException)
    async def send_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @api.exception_handler(ServingError)
    async def send_serving_error(request: Request, error: ServingError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.http_status)

    @api.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse("/docs")

    route = {"tags": ["administration"], "response_class": JSONResponse}
    reading, changing = _responses(_OVERVIEW, *denials), _responses(_OVERVIEW, *denials[:1], 403, 503)

    @api.get("/models", summary="All models, their versions and routing", openapi_extra=reading, **route)
    async def models() -> list[dict]:
        return overview(manager)

    @api.post("/reload", summary="Poll for new versions now", openapi_extra=changing, **route)
    async def reload_now(request: Request) -> list[dict]:
        principal, address = request.scope["mlkit.principal"], request.client.host if request.client else None
        if not request.scope["mlkit.administrator"] and not _is_local(address, request.headers):
            error = ServingError("PERMISSION_DENIED", "Without API keys, only clients on the server's machine may.")
            await application.audit_denial(request.scope, error)
            raise error
        await reload(principal or str(address))
        return overview(manager)

    _document(api, manager.names(), denials)
    return ProxyHeadersMiddleware(api)  # a client behind a proxy on this machine is not on this machine


# FastAPI documents the paths that `RestApplication` handles itself, from the schemas below. The inputs of a model's
# signatures are left to its metadata, because versions come and go while the server runs.
def _object(*required: str, **properties: dict) -> dict[str, Any]:
    """JSON schema of an object."""
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT, _LIST = {"type": "string"}, {"type": "array", "minItems": 1}
_PREDICT_BODY = _object(signature_name=_TEXT, instances=_LIST, inputs={})
_EXAMPLES = _object("examples", signature_name=_TEXT, examples=_LIST | {"items": _object()}, context=_object())
_BODIES = {  # schema of the request, an example of it, schema of the response
    "predict": (
        _PREDICT_BODY | {"oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}]},
        {"instances": [{"feature": 1.0}]},
        _object(predictions=_LIST, outputs={}) | {"oneOf": [{"required": ["predictions"]}, {"required": ["outputs"]}]},
    ),
    "classify": (_EXAMPLES, {"examples": [{"feature": 1.0}]}, _object("results", results=_LIST)),
    "regress": (_EXAMPLES, {"examples": [{"feature": 1.0}]}, _object("results", results=_LIST)),
}
_STATE = _object(
    "version", "state", "status", version=_TEXT, state=_TEXT, status=_object("error_code", "error_message")
)
_STATUS = _object("model_version_status", model_version_status=_LIST | {"items": _STATE})
_METADATA = _object("model_spec", "metadata", model_spec=_object("name", "version"), metadata=_object("signature_def"))
_OVERVIEW = {"type": "array", "items": _object("name", "default", "labels", "traffic", "versions", "shadow", "problem")}
_READY = _object("ready", ready={"type": "boolean"})
_ERROR = _object("error", error=_TEXT) | {"additionalProperties": False}
_ERROR_DESCRIPTIONS = {
    400: "The request is malformed or does not fit the model",
    401: "The client is not authenticated",
    403: "The client is not authorized",
    404: "Unknown model, version or label",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many queued requests; `retry-after` has the seconds to wait",
    500: "The model failed",
    501: "The signature has types that JSON cannot represent",
    503: "Temporarily unavailable",
    504: "The deadline was exceeded",
}


def _responses(schema: dict, *errors: int, content_type: str = "application/json", **more: Any) -> dict[str, Any]:
    """OpenAPI responses: schema of a success, status codes of errors."""
    success = {"description": "Success", "content": {content_type: {"schema": schema}}} | more
    error = {"content": {"application/json": {"schema": _ERROR}}}
    descriptions = {str(code): {"description": _ERROR_DESCRIPTIONS[code]} | error for code in errors}
    return {"responses": {"200": success} | descriptions}


def _parameter(place: str, name: str, schema: dict, **more: str) -> dict[str, Any]:
    return {"in": place, "name": name, "schema": schema, "required": place == "path"} | more


def _inference(verb: str, denials: Sequence[int]) -> dict[str, Any]:
    """OpenAPI description of an inference request."""
    request, example, response = _BODIES[verb]
    headers = {name: {"schema": _TEXT, "required": True} for name in ("model-name", "model-version")}
    operation = _responses(response, 400, *denials, 404, 408, 413, 429, 500, 501, 503, 504, headers=headers)
    body = {"required": True, "content": {"application/json": {"schema": request, "example": example}}}
    seconds = {"type": "number", "exclusiveMinimum": 0}
    same = "Requests with the same key reach the same version where traffic is split"
    parameters = [
        _parameter("header", "request-timeout", seconds, description="Maximum seconds until the response"),
        _parameter("header", "traffic-key", _TEXT, description=same),
    ]
    return operation | {"requestBody": body, "parameters": parameters}


def _document(api: Any, models: Sequence[str], denials: Sequence[int]) -> None:
    """Describe the paths that `RestApplication` handles itself."""
    add, metrics = functools.partial(_add, api, models), _responses(_TEXT, *denials, content_type="text/plain")
    for place, version in (("", "the default"), ("/versions/{version}", "one"), ("/labels/{label}", "a label's")):
        path = f"/v1/models/{{model}}{place}"
        for verb in _BODIES:
            add(f"{path}:{verb}", f"{verb.title()} by {version} version", "inference", _inference(verb, denials))
        add(path, "Status of the versions", "models", _responses(_STATUS, 400, *denials, 404))
        metadata = _responses(_METADATA, 400, *denials, 404, 503)
        add(f"{path}/metadata", "Signatures of a version", "models", metadata)
    ready = _responses(_READY)
    ready["responses"]["503"] = ready["responses"]["200"] | {"description": "Some model cannot predict"}
    add("/livez", "Liveness of the process", "probes", _responses(_object("alive")))
    add("/readyz", "Readiness of all models", "probes", ready)
    add(METRICS_PATH, "Metrics for Prometheus", "administration", metrics)


def _add(api: Any, models: Sequence[str], path: str, summary: str, tag: str, operation: dict[str, Any]) -> None:
    from fastapi import Response

    async def never_called() -> None:
        pass  # `RestApplication` has handled the request

    schemas = {"model": _TEXT | {"enum": models}, "version": {"type": "integer", "minimum": 0}, "label": _TEXT}
    places = [_parameter("path", name, schemas[name]) for name in re.findall(r"{(\w+)}", path)]
    operation["parameters"] = places + operation.get("parameters", [])
    method = "POST" if "requestBody" in operation else "GET"
    options = {"name": summary.replace(" ", "_"), "response_class": Response, "openapi_extra": operation}
    api.add_api_route(path, never_called, methods=[method], summary=summary, tags=[tag], **options)


# A browser lets a page call only the server it came from, unless another server allows the page's origin (CORS):
# https://fetch.spec.whatwg.org/#http-cors-protocol. Origins are declared one by one; by default none is allowed.
# Programs other than browsers are not affected: for those there are API keys.
_ORIGIN = re.compile(r"https?://[^/\s*?#]+")
_REQUEST_HEADERS = ("authorization", "content-type", "request-timeout", "traceparent", "traffic-key", "x-api-key")
_RESPONSE_HEADERS = ("model-name", "model-version", "retry-after", "traceparent")


def read_origins(
    text: str,  # separated by commas
) -> tuple[str, ...]:
    """Parse allowed CORS origins; raises InputError for a malformed one."""
    origins = tuple(filter(None, (origin.strip() for origin in text.split(","))))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(f"A page's origin is like https://shop.example or http://localhost:3000, not '{origin}'.")
    return origins


def allow_origins(
    application: Callable,  # an ASGI application
    origins: Sequence[str],  # none: no cross-origin requests
) -> Callable:
    """Allow web pages of these origins (CORS); raises MissingDependencyError."""
    if not origins:
        return application
    try:
        from starlette.middleware.cors import CORSMiddleware
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error
    headers = {"allow_headers": _REQUEST_HEADERS, "expose_headers": _RESPONSE_HEADERS}
    return CORSMiddleware(application, allow_origins=origins, allow_methods=("GET", "POST"), **headers)
