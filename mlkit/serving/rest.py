"""TF Serving's REST interface over the versions in service: predict, classify, regress, status and metadata, with its bodies and its codes."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
    """What a path means."""

    model: str
    version: int | None
    label: str | None
    verb: str  # predict, classify, regress, metadata or status


@functools.lru_cache(maxsize=1024)
def read_path(
    path: str,  # of a URL, without what follows a question mark
) -> Target | None:
    """What a path means; None for one that is none of the interface."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    model, version, label, verb, metadata = found.groups()
    told = verb.lower() if verb else "metadata" if metadata else "status"
    return Target(model, int(version) if version else None, label, told)


class _TooLarge(Exception):
    pass


class _Gone(Exception):
    pass


async def _read_body(headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[dict]], limit: int) -> bytes:
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > limit:
        raise _TooLarge
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):  # the usual case: all at once
        if len(message["body"]) > limit:
            raise _TooLarge
        return message["body"]
    parts, size = [], 0
    while True:
        if message["type"] != "http.request":
            raise _Gone
        parts.append(message["body"])
        size += len(message["body"])
        if size > limit:
            raise _TooLarge
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _error_body(text: str) -> bytes:
    return write_error(ServingError("INVALID_ARGUMENT", text))


class _Bodies:
    """Reads bodies of so many bytes in so many seconds."""

    def __init__(self, limit: int, seconds: float):
        self._limit, self._seconds, self._timer = limit, seconds, None
        self._since: dict[asyncio.Task, float] = {}  # the oldest first

    async def read(self, headers: Mapping[bytes, bytes], receive: Callable[[], Awaitable[dict]]) -> bytes:
        task, now = asyncio.current_task(), time.monotonic()
        self._since[task] = now
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)
        try:
            return await _read_body(headers, receive, self._limit)
        except asyncio.CancelledError:
            if task in self._since:  # somebody else has cancelled it
                raise
            task.uncancel()
            raise TimeoutError from None
        finally:
            self._since.pop(task, None)

    def _look(self) -> None:
        now = time.monotonic()
        for task in [task for task, since in self._since.items() if now >= since + self._seconds]:
            del self._since[task]
            task.cancel()
        oldest = next(iter(self._since.values()), None)
        left = None if oldest is None else oldest + self._seconds - now
        self._timer = None if left is None else asyncio.get_running_loop().call_later(left, self._look)


class ResponseCache:
    """The answers of late, up to so many bytes."""

    def __init__(
        self,
        limit: int,  # bytes of questions and answers
    ):
        self.limit, self.size, self.hits, self.misses = limit, 0, 0, 0
        self._answers: OrderedDict[tuple, bytes] = OrderedDict()

    def get(self, key: tuple) -> bytes | None:
        """The answer to a question, if it is known."""
        answer = self._answers.get(key)
        if answer is None:
            self.misses += 1
            return None
        self._answers.move_to_end(key)
        self.hits += 1
        return answer

    def put(self, key: tuple, answer: bytes) -> None:
        """Keep an answer; one that takes more than a tenth of the room is not kept."""
        size = self._size(key, answer)
        if size * 10 > self.limit:
            return
        if key in self._answers:
            self.size -= self._size(key, self._answers.pop(key))
        self._answers[key] = answer
        self.size += size
        while self.size > self.limit:
            self.size -= self._size(*self._answers.popitem(last=False))

    @staticmethod
    def _size(key: tuple, answer: bytes) -> int:
        return len(answer) + sum(len(part) for part in key if isinstance(part, bytes)) + 200


_log = logging.getLogger("mlkit.serving")
CERTIFICATE = "mlkit.certificate"  # where a connection's state has the name in the certificate that was shown
CLOSE = (b"connection", b"close")  # a header
_JSON = (b"content-type", b"application/json")


class RestApplication:
    """An ASGI application that answers for models in service."""

    def __init__(
        self,
        host: ModelManager,
        *,
        body_bytes: int = 64 * 2**20,  # the longest body
        cache_bytes: int = 0,  # room for answers that come again; 0: none are kept
        readiness: Callable[[], dict[str, Any]] | None = None,  # more about the server, beside {"ready": ...}
        reload: Callable[[str], Awaitable[None]] | None = None,  # look at the sources now, for somebody
        telemetry: Telemetry | None = None,
        access: Authenticator | None = None,  # None: everybody may ask
        certificates: bool = False,  # whether callers have shown one: its name is in the scope's state
        refused: Callable[[str, str, ServingError], Awaitable[None]] | None = None,  # is told who asked what in vain
    ):
        self.host, self.body_bytes, self._readiness = host, body_bytes, readiness or dict
        self._bodies = _Bodies(body_bytes, host.limits.timeout)
        self._reload, self._telemetry, self._access = reload or self._reload_here, telemetry, access
        self._refused, self._asks_who = refused, access is not None or certificates
        self.cache = ResponseCache(cache_bytes) if cache_bytes else None
        self.draining = False
        self._rest: Callable | None = None

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return
        target = read_path(scope["path"])
        if target is None or scope["method"] not in ("GET", "POST"):
            await self._other(scope, receive, send)
            return
        with contextlib.suppress(_Gone):
            status, told, body = await self.answer(target, scope, receive)
            await send({"type": "http.response.start", "status": status, "headers": told})
            await send({"type": "http.response.body", "body": body})

    async def answer(
        self,
        target: Target,
        scope: Mapping[str, Any],  # as ASGI has it
        receive: Callable[[], Awaitable[dict]] | None,  # as ASGI has it; None where the body has come already
        body: bytes | None = None,  # of the request, where it has
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body of an answer."""
        counted = self._telemetry if scope["method"] == "POST" and target.verb in INFERENCE else None
        headers, end = dict(scope["headers"]), ("CANCELLED", "The caller has gone.")
        request = counted and counted.begin("REST", headers.get(b"traceparent"))
        try:
            status, told, answer, end = await self._answer(target, scope, headers, receive, body)
        finally:
            if counted:
                counted.end(request, target.verb, *end)
        if request:
            told.append((b"traceparent", request.trace.header))
        told.append((b"content-length", b"%d" % len(answer)))
        if self.draining and CLOSE not in told:
            told.append(CLOSE)
        return status, told, answer

    async def _answer(
        self, target: Target, scope: Mapping, headers: dict[bytes, bytes], receive: Callable | None, body: bytes | None
    ) -> tuple[int, list, bytes, tuple]:
        """Status, headers and body; code and words of an error."""
        method = scope["method"]
        try:
            if self._asks_who:
                await self._admit(scope, headers, "predict" if target.verb in INFERENCE else None)
            if method == "POST" and target.verb in INFERENCE:
                return 200, *await self._infer(target, headers, receive, body), ()
            if method == "GET" and target.verb not in INFERENCE:
                return 200, [_JSON], self._describe(target), ()
            raise ServingError("INVALID_ARGUMENT", f"Malformed request: {method} {scope['path']}")
        except ServingError as error:
            return error.http_status, _headers_of(error), write_error(error), (error.code, error.message)
        except _TooLarge:
            text = f"The body has more than the {self.body_bytes:,} bytes that are accepted."
            return 413, [_JSON, CLOSE], _error_body(text), ("INVALID_ARGUMENT", text)
        except TimeoutError:
            text = "The body did not come in time."
            return 408, [_JSON, CLOSE], _error_body(text), ("DEADLINE_EXCEEDED", text)
        except _Gone:
            raise
        except Exception:  # a defect of ours
            _log.exception("A request failed")
            error = ServingError("INTERNAL", "The server failed; its log says why.")
            return error.http_status, [_JSON], write_error(error), (error.code, error.message)

    async def _admit(self, scope: dict, headers: dict[bytes, bytes], needed: str | None) -> str:
        """Who asks, if that is known; raises ServingError for somebody who may not."""
        name = _certified(scope)
        if self._access is not None:
            name = (await self._access.check(headers, needed)).name
        if (request := current_request.get()) is not None:
            request.caller = name
        return name

    async def note_refusal(self, scope: dict, error: ServingError) -> None:
        """Tell of an administrator's act that somebody may not ask for."""
        if self._refused is None or error.code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return
        address = scope["client"][0] if scope.get("client") else "this machine"
        what = "reload" if scope["path"] == "/reload" else f"{scope['method']} {scope['path']}"[:100]
        await self._refused(getattr(error, "caller", "") or _certified(scope) or address, what, error)

    async def _reload_here(self, who: str) -> None:
        await self.host.reload()

    def _describe(self, target: Target) -> bytes:
        """Status or metadata of a model; raises ServingError."""
        if target.verb == "status":
            return write_status(self.host.statuses(target.model, target.version, target.label))
        served = self.host.lease(target.model, target.version, target.label)
        return write_metadata(served.model, served.number, served.signatures)

    async def _infer(
        self, target: Target, headers: dict[bytes, bytes], receive: Callable | None, body: bytes | None
    ) -> tuple[list, bytes]:
        deadline = time.monotonic() + _seconds(headers, self.host.limits.timeout)
        if body is None:
            body = await self._bodies.read(headers, receive)
        key = headers.get(b"traffic-key", b"").decode("latin-1")
        with self.host.lease(target.model, target.version, target.label, key) as served:
            ask = INFERENCE[target.verb] if self.cache is None else functools.partial(self._remember, target.verb)
            return [_JSON, *served.headers], await ask(served, body, deadline)

    async def _remember(self, verb: str, served: LoadedVersion, body: bytes, deadline: float) -> bytes:
        """The answer that is known already, or a new one."""
        asked = (served.model, served.number, verb, body)
        known = self.cache.get(asked)
        if self._telemetry is not None:
            self._telemetry.cache(served.model, known is not None, self.cache.size)
        if known is None:
            known = await INFERENCE[verb](served, body, deadline)
            self.cache.put(asked, known)
        return known

    async def _other(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Everything that is not asked a thousand times a second."""
        if scope["path"] in ("/livez", "/readyz") and scope["method"] in ("GET", "HEAD"):
            ready = scope["path"] == "/livez" or (self.host.ready and not self.draining)
            told = {"ready": ready, **self._readiness()} if scope["path"] == "/readyz" else {"alive": True}
            await _send(send, 200 if ready else 503, json.dumps(told).encode())
            return
        if scope["path"].startswith("/v1/models") and scope["method"] in ("GET", "POST"):
            missing = scope["path"].rstrip("/") == "/v1/models" and scope["method"] == "GET"
            text = (
                "Missing model name in request." if missing else f"Malformed request: {scope['method']} {scope['path']}"
            )
            await _send(send, 400, _error_body(text))
            return
        looks = scope["method"] in ("GET", "HEAD", "OPTIONS")
        try:
            scope["mlkit.caller"] = await self._admit(scope, dict(scope["headers"]), None if looks else "admin")
            scope["mlkit.administrator"] = self._access is not None and not looks
        except ServingError as error:
            if not looks:
                await self.note_refusal(scope, error)
            await _send(send, error.http_status, write_error(error), _headers_of(error))
            return
        if scope["path"] == METRICS_PATH and scope["method"] == "GET" and self._telemetry is not None:
            self._telemetry.sample()
            numbers = await asyncio.to_thread(self._telemetry.read)  # of all processes
            await _send(send, 200, numbers, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")])
            return
        if self._rest is None:
            self._rest = await asyncio.get_running_loop().run_in_executor(None, administration, self, self._reload)
        await self._rest(scope, receive, send)


def _certified(scope: Mapping[str, Any]) -> str:
    """The name in the certificate that a caller has shown; "" without one."""
    return scope.get("state", {}).get(CERTIFICATE, "")


def _headers_of(error: ServingError) -> list[tuple[bytes, bytes]]:
    told = [_JSON]
    if error.retry_after is not None:
        told.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
    if error.code == "UNAUTHENTICATED":
        told.append((b"www-authenticate", b'Bearer realm="mlkit"'))
    return told


async def _send(send: Callable, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = (_JSON,)) -> None:
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _seconds(headers: Mapping[bytes, bytes], longest: float) -> float:
    """How long a request may take; raises ServingError."""
    given = headers.get(b"request-timeout")
    if given is None:
        return longest
    try:
        seconds = float(given)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise ServingError("INVALID_ARGUMENT", f"request-timeout is a number of seconds. Received: {given[:40]!r}")
    return min(seconds, longest)


async def _predict(served: LoadedVersion, body: bytes, deadline: float) -> bytes:
    call = read_predict(body, served.signatures)
    outputs = await served.run(call.signature.name, call.inputs, call.rows, deadline)
    return write_predict(outputs, call.row_format)


async def _classify(served: LoadedVersion, body: bytes, deadline: float) -> bytes:
    return write_classify(*await _ask_examples(served, body, deadline, CLASSIFY))


async def _regress(served: LoadedVersion, body: bytes, deadline: float) -> bytes:
    return write_regress(*await _ask_examples(served, body, deadline, REGRESS))


async def _ask_examples(served: LoadedVersion, body: bytes, deadline: float, method: str) -> tuple[dict, int]:
    call = read_examples(body, served.signatures, method)
    inputs = {next(iter(call.signature.inputs)): np.array(call.examples, object)}
    return await served.run(call.signature.name, inputs, len(call.examples), deadline), len(call.examples)


INFERENCE = {"predict": _predict, "classify": _classify, "regress": _regress}
_HERE = ("127.0.0.1", "::1", None)  # None: a unix socket
_OWN_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")  # others may lead here, too, by somebody's DNS


def _is_here(address: str | None, headers: Mapping[str, str]) -> bool:
    """Whether somebody on this machine asks, and not a page from elsewhere that a browser on it shows."""
    origin, name = headers.get("origin"), headers.get("host", "")
    own = origin is None or (_OWN_NAME.fullmatch(name) and origin in (f"http://{name}", f"https://{name}"))
    return address in _HERE and bool(own)


def overview(host: ModelManager) -> list[dict[str, Any]]:  # ready for JSON
    """All models, with who answers what."""
    return [_overview(host, name) for name in host.models()]


def _overview(host: ModelManager, name: str) -> dict[str, Any]:
    served = host.state(name)
    told = {"name": name, "default": served.default, "labels": served.labels, "traffic": served.traffic}
    versions = [status._asdict() for status in host.statuses(name)]
    shadows = [version.shadow for version in served.loaded.values() if version.shadow is not None]
    shadow = dataclasses.asdict(shadows[0].counts) if shadows else None
    return told | {"versions": versions, "shadow": shadow, "problem": served.problem}


def administration(
    application: RestApplication,
    reload: Callable[[str], Awaitable[None]],  # for somebody
) -> Callable:  # an ASGI application
    """FastAPI's part of the interface; raises MissingDependencyError."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, RedirectResponse
        from starlette.exceptions import HTTPException
        from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error
    host, refusals = application.host, (401, 403) if application._access else ()
    told = {"title": "mlkit", "summary": "Models in service, as TF Serving serves them", "version": mlkit.__version__}
    api = FastAPI(**told, docs_url="/docs", redoc_url=None)

    @api.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @api.exception_handler(ServingError)
    async def explain(request: Request, error: ServingError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.http_status)

    @api.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse("/docs")

    told = {"tags": ["administration"], "response_class": JSONResponse}
    looking, acting = _answers(_OVERVIEW, *refusals), _answers(_OVERVIEW, *refusals[:1], 403, 503)

    @api.get("/models", summary="All models, and which version answers what", openapi_extra=looking, **told)
    async def models() -> list[dict]:
        return overview(host)

    @api.post("/reload", summary="Look for new versions now", openapi_extra=acting, **told)
    async def reload_now(request: Request) -> list[dict]:
        who, place = request.scope["mlkit.caller"], request.client.host if request.client else None
        if not request.scope["mlkit.administrator"] and not _is_here(place, request.headers):
            error = ServingError("PERMISSION_DENIED", "Administrators ask from the machine on which the server runs.")
            await application.note_refusal(request.scope, error)
            raise error
        await reload(who or str(place))
        return overview(host)

    _document(api, host.models(), refusals)
    return ProxyHeadersMiddleware(api)  # who asks through a proxy on this machine is not on this machine


def _object(*required: str, **properties: dict) -> dict[str, Any]:
    """The schema of a JSON object."""
    return {"type": "object", "properties": properties, "required": list(required)}


_TEXT, _LIST = {"type": "string"}, {"type": "array", "minItems": 1}
_ASKED = _object(signature_name=_TEXT, instances=_LIST, inputs={})
_EXAMPLES = _object("examples", signature_name=_TEXT, examples=_LIST | {"items": _object()}, context=_object())
_BODIES = {  # what is asked, an example of it, what is answered
    "predict": (
        _ASKED | {"oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}]},
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
_REFUSALS = {
    400: "It does not fit the model, or is no such request",
    401: "Nobody knows who asks",
    403: "Whoever asks may not",
    404: "There is no such model, version or label",
    408: "The body did not come in time",
    413: "The body is too long",
    429: "Too many requests wait; `retry-after` tells when to come again",
    500: "The model failed",
    501: "The signature takes or gives what JSON cannot hold",
    503: "It cannot be done at present",
    504: "The time that the request had is over",
}


def _answers(answer: dict, *refusals: int, kind: str = "application/json", **more: Any) -> dict[str, Any]:
    """What comes back: schema of the answer, and codes of refusals."""
    good = {"description": "The answer", "content": {kind: {"schema": answer}}} | more
    refused = {"content": {"application/json": {"schema": _ERROR}}}
    return {"responses": {"200": good} | {str(code): {"description": _REFUSALS[code]} | refused for code in refusals}}


def _parameter(place: str, name: str, schema: dict, **more: str) -> dict[str, Any]:
    return {"in": place, "name": name, "schema": schema, "required": place == "path"} | more


def _inference(verb: str, refusals: Sequence[int]) -> dict[str, Any]:
    """How a model is asked."""
    takes, example, gives = _BODIES[verb]
    named = {name: {"schema": _TEXT, "required": True} for name in ("model-name", "model-version")}
    told = _answers(gives, 400, *refusals, 404, 408, 413, 429, 500, 501, 503, 504, headers=named)
    body = {"required": True, "content": {"application/json": {"schema": takes, "example": example}}}
    seconds, same = {"type": "number", "exclusiveMinimum": 0}, "Requests with the same key meet the same version"
    parameters = [
        _parameter("header", "request-timeout", seconds, description="Seconds that the answer may take"),
        _parameter("header", "traffic-key", _TEXT, description=f"{same}, where traffic is divided"),
    ]
    return told | {"requestBody": body, "parameters": parameters}


def _document(api: Any, models: Sequence[str], refusals: Sequence[int]) -> None:
    """Describe the paths that `RestApplication` answers itself."""
    add, numbers = functools.partial(_add, api, models), _answers(_TEXT, *refusals, kind="text/plain")
    for place, which in (("", "the default"), ("/versions/{version}", "one"), ("/labels/{label}", "a label's")):
        path = f"/v1/models/{{model}}{place}"
        for verb in _BODIES:
            add(f"{path}:{verb}", f"{verb.title()} by {which} version", "inference", _inference(verb, refusals))
        add(path, "How versions stand", "models", _answers(_STATUS, 400, *refusals, 404))
        described = _answers(_METADATA, 400, *refusals, 404, 503)
        add(f"{path}/metadata", "What a version takes and gives", "models", described)
    ready = _answers(_READY)
    ready["responses"]["503"] = ready["responses"]["200"] | {"description": "Some model cannot answer"}
    add("/livez", "Whether the process is alive", "probes", _answers(_object("alive")))
    add("/readyz", "Whether every model can answer", "probes", ready)
    add(METRICS_PATH, "Numbers for Prometheus", "administration", numbers)


def _add(api: Any, models: Sequence[str], path: str, summary: str, tag: str, told: dict[str, Any]) -> None:
    from fastapi import Response

    async def answered() -> None:
        pass  # never called: `RestApplication` has answered

    schemas = {"model": _TEXT | {"enum": models}, "version": {"type": "integer", "minimum": 0}, "label": _TEXT}
    places = [_parameter("path", name, schemas[name]) for name in re.findall(r"{(\w+)}", path)]
    told["parameters"] = places + told.get("parameters", [])
    method = "POST" if "requestBody" in told else "GET"
    options = {"name": summary.replace(" ", "_"), "response_class": Response, "openapi_extra": told}
    api.add_api_route(path, answered, methods=[method], summary=summary, tags=[tag], **options)


_ORIGIN = re.compile(r"https?://[^/\s*?#]+")
_MAY_SEND = ("authorization", "content-type", "request-timeout", "traceparent", "traffic-key", "x-api-key")
_MAY_READ = ("model-name", "model-version", "retry-after", "traceparent")


def read_origins(
    text: str,  # with commas between them
) -> tuple[str, ...]:
    """Origins of web pages; raises InputError for what is none."""
    origins = tuple(filter(None, (each.strip() for each in text.split(","))))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(f"A page's origin is like https://shop.example or http://localhost:3000, not '{origin}'.")
    return origins


def allow_origins(
    application: Callable,  # an ASGI application
    origins: Sequence[str],  # none: no page of others may ask
) -> Callable:
    """Let web pages of these origins ask; raises MissingDependencyError."""
    if not origins:
        return application
    try:
        from starlette.middleware.cors import CORSMiddleware
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error
    allowed = {"allow_methods": ("GET", "POST"), "allow_headers": _MAY_SEND, "expose_headers": _MAY_READ}
    return CORSMiddleware(application, allow_origins=origins, **allowed)
