"""TF Serving's gRPC services over the loaded versions, with health and reflection, on the server's event loop.

gRPC carries tensors as bytes: from about ten rows on it is faster than JSON, and it has deadlines and clients in every
language. TF Serving's clients connect unchanged. Methods take and return serialized messages: parsing happens here and
not in gRPC, which would report a malformed message as an error of the server.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import Message

from mlkit.errors import InputError, ServingError, did_you_mean, join_names
from mlkit.export.protos import (
    fill_tensor,
    message_class,
    message_pool,
    parse_message,
    serialized_examples,
)
from mlkit.export.signatures import CLASSIFY, PREDICT, REGRESS, SignatureInfo, find_signature
from mlkit.serving.auth import Authenticator
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.protocol import count_rows, fill_model_spec, fill_result, metadata_message, read_tensors
from mlkit.serving.telemetry import Telemetry, current_request
from mlkit.serving.tls import grpc_certificate_name, import_grpc


class ModelSpec(NamedTuple):
    """Requested model, version or label, and signature."""

    model: str
    version: int | None
    label: str | None
    signature: str  # "" for serving_default


def read_spec(
    spec: Message,  # ModelSpec
) -> ModelSpec:
    """Parse a model spec; raises ServingError where it names no model."""
    if not spec.name:
        raise ServingError("INVALID_ARGUMENT", "The request names no model: model_spec.name is empty.")
    choice = spec.WhichOneof("version_choice")
    version = spec.version.value if choice == "version" else None
    return ModelSpec(spec.name, version, spec.version_label if choice == "version_label" else None, spec.signature_name)


def read_output_filter(
    signature: SignatureInfo,
    output_filter: Sequence[str],  # names of outputs; none means all
) -> list[str]:
    """Outputs to return; raises ServingError for unknown or repeated names."""
    names = list(output_filter) or list(signature.outputs)
    for name in names:
        if name not in signature.outputs:
            hint = f"{did_you_mean(name, signature.outputs)} It has {join_names(signature.outputs)}."
            raise ServingError("INVALID_ARGUMENT", f"Signature '{signature.name}' gives no output '{name}'.{hint}")
    if len(set(names)) < len(names):
        raise ServingError("INVALID_ARGUMENT", "output_filter names an output twice.")
    return names


class CallInfo(NamedTuple):
    """Deadline, routing key and client of a call."""

    deadline: float  # on the clock of time.monotonic()
    key: str = ""  # calls with the same key reach the same version where traffic is split
    peer: str = ""  # client address as gRPC writes it: "ipv4:127.0.0.1:54321"
    administrator: str = ""  # principal with the scope admin
    principal: str = ""  # name in the API key, token or certificate


async def predict(
    manager: ModelManager,
    body: bytes,  # PredictRequest
    call: CallInfo,
) -> Message:  # PredictResponse
    """Predict on tensors; raises ServingError."""
    request = parse_message("PredictRequest", body)
    spec = read_spec(request.model_spec)
    with manager.acquire(spec.model, spec.version, spec.label, call.key) as version:
        signature = find_signature(version.signatures, spec.signature, PREDICT, "FAILED_PRECONDITION")
        names = read_output_filter(signature, request.output_filter)
        inputs = read_tensors(signature, request.inputs)
        rows = count_rows(signature, inputs)
        outputs = await version.run(signature.name, inputs, rows, call.deadline, off_loop=True)
        response = message_class("PredictResponse")()
        for name in names:
            fill_tensor(response.outputs[name], outputs[name])
        fill_model_spec(response.model_spec, version.model, version.number, signature.name)
        return response


_RESULTS = {CLASSIFY: "classification_result", REGRESS: "regression_result"}  # fields of an InferenceResult


async def _infer(manager: ModelManager, call: CallInfo, tasks: Sequence[Message], examples: list[bytes]) -> Message:
    """Run classify and regress tasks of one version on the same examples; returns a MultiInferenceResponse."""
    response, spec = message_class("MultiInferenceResponse")(), read_spec(tasks[0].model_spec)
    with manager.acquire(spec.model, spec.version, spec.label, call.key) as version:
        for task in tasks:
            signature = find_signature(version.signatures, task.model_spec.signature_name, task.method_name)
            if len(signature.inputs) != 1:
                message = f"Signature '{signature.name}' takes {join_names(signature.inputs)} rather than examples."
                raise ServingError("FAILED_PRECONDITION", message)
            inputs = {next(iter(signature.inputs)): np.array(examples, object)}
            outputs = await version.run(signature.name, inputs, len(examples), call.deadline, off_loop=True)
            result = response.results.add()
            fill_result(getattr(result, _RESULTS[task.method_name]), task.method_name, outputs, len(examples))
            fill_model_spec(result.model_spec, version.model, version.number, signature.name)
    return response


async def _infer_one(manager: ModelManager, body: bytes, call: CallInfo, method: str, response_name: str) -> Message:
    """Run a classify or regress request."""
    request = parse_message("ExamplesRequest", body)
    task = message_class("InferenceTask")(model_spec=request.model_spec, method_name=method)
    (result,) = (await _infer(manager, call, [task], serialized_examples(request.input))).results
    return message_class(response_name)(result=getattr(result, _RESULTS[method]), model_spec=result.model_spec)


async def classify(
    manager: ModelManager,
    body: bytes,  # ClassificationRequest
    call: CallInfo,
) -> Message:  # ClassificationResponse
    """Predict classes and scores of examples; raises ServingError."""
    return await _infer_one(manager, body, call, CLASSIFY, "ClassificationResponse")


async def regress(
    manager: ModelManager,
    body: bytes,  # RegressionRequest
    call: CallInfo,
) -> Message:  # RegressionResponse
    """Predict one number per example; raises ServingError."""
    return await _infer_one(manager, body, call, REGRESS, "RegressionResponse")


def _check_tasks(tasks: Sequence[Message]) -> None:
    """Raise ServingError where the tasks of a request do not fit together."""
    if not tasks:
        raise ServingError("INVALID_ARGUMENT", "The request has no tasks.")
    specs = [read_spec(task.model_spec) for task in tasks]
    if len({spec[:3] for spec in specs}) > 1:
        raise ServingError("INVALID_ARGUMENT", "All tasks of a request must name the same version of one model.")
    if len({spec.signature for spec in specs}) < len(specs):
        raise ServingError("INVALID_ARGUMENT", "Two tasks of the request name the same signature.")
    for task in tasks:
        if task.method_name not in _RESULTS:
            raise ServingError("UNIMPLEMENTED", f"Tasks are for {join_names(_RESULTS)}, not '{task.method_name}'.")


async def multi_inference(
    manager: ModelManager,
    body: bytes,  # MultiInferenceRequest
    call: CallInfo,
) -> Message:  # MultiInferenceResponse
    """Run several signatures of one version on the same examples; raises ServingError."""
    request = parse_message("SeveralRequest", body)
    _check_tasks(request.tasks)
    return await _infer(manager, call, request.tasks, serialized_examples(request.input))


async def get_metadata(
    manager: ModelManager,
    body: bytes,  # GetModelMetadataRequest
    call: CallInfo,
) -> Message:  # GetModelMetadataResponse
    """Signatures of a version; raises ServingError."""
    request = parse_message("GetModelMetadataRequest", body)
    spec, fields = read_spec(request.model_spec), list(request.metadata_field)
    if not fields:
        raise ServingError("INVALID_ARGUMENT", "The request names no metadata_field. Available: 'signature_def'.")
    if unknown := [name for name in fields if name != "signature_def"]:
        raise ServingError("INVALID_ARGUMENT", f"Unknown metadata_field '{unknown[0]}'. Available: 'signature_def'.")
    with manager.acquire(spec.model, spec.version, spec.label) as version:
        return metadata_message(version.model, version.number, version.signatures)


def check_config(
    manager: ModelManager,
    config: Message,  # ModelServerConfig
) -> None:
    """Raise ServingError for a configuration that differs from what is served.

    TF Serving loads any folder that a client names. A SavedModel is a program, so here a client may at most repeat the
    present configuration. Versions, labels and traffic are decided in the registry.
    """
    if config.WhichOneof("config") == "custom_model_config":
        raise ServingError("UNIMPLEMENTED", "A configuration of another platform is not supported.")
    for model in config.model_config_list.config:
        if model.name not in manager.names():
            served = join_names(manager.names())
            raise ServingError(
                "PERMISSION_DENIED", f"Model '{model.name}' is not served, and no client can add it. Served: {served}."
            )
        if model.base_path and not _is_served_from(manager, model.name, model.base_path):
            raise ServingError("PERMISSION_DENIED", f"Model '{model.name}' is served from where it is, not elsewhere.")
        if model.version_labels or model.HasField("model_version_policy"):
            raise ServingError(
                "UNIMPLEMENTED",
                "Versions and labels follow the registry (mlkit promote, mlkit rollback), not a request.",
            )


def _is_served_from(manager: ModelManager, name: str, path: str) -> bool:
    return any(str(version.folder.parent) == path.rstrip("/") for version in manager.model(name).loaded.values())


async def get_status(
    manager: ModelManager,
    body: bytes,  # GetModelStatusRequest
    call: CallInfo,
) -> Message:  # GetModelStatusResponse
    """States of a model's versions, with the reason of rejected ones; raises ServingError."""
    spec = read_spec(parse_message("GetModelStatusRequest", body).model_spec)
    response = message_class("GetModelStatusResponse")()
    states, codes = (
        message_pool().FindEnumTypeByName(f"tensorflow.{name}").values_by_name
        for name in ("serving.ModelVersionStatus.State", "error.Code")
    )
    for status in manager.statuses(spec.model, spec.version, spec.label):
        row = response.model_version_status.add(version=status.version, state=states[status.state].number)
        row.status.error_code, row.status.error_message = codes[status.code].number, status.message
    return response


async def reload_config(
    reload: Callable[[str], Awaitable[None]],  # polls the sources; takes the principal's name
    manager: ModelManager,
    body: bytes,  # ReloadConfigRequest
    call: CallInfo,
) -> Message:  # ReloadConfigResponse
    """Poll the sources now, for administrators and clients on this machine; raises ServingError."""
    if not call.administrator and not call.peer.startswith(("ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]", "unix:")):
        raise ServingError("PERMISSION_DENIED", "Only clients on the server's own machine may call this.")
    check_config(manager, parse_message("ReloadConfigRequest", body).config)
    await reload(call.principal or call.peer)
    response = message_class("ReloadConfigResponse")()
    response.status.SetInParent()
    return response


_log = logging.getLogger("mlkit.serving")
_INFERENCE = ("Predict", "Classify", "Regress", "MultiInference")  # methods in TF Serving's metrics
_ACTIONS = {"HandleReloadConfigRequest": "reload"}  # administrative methods, and their names in the audit log
_MAX_MESSAGE = 500  # characters; all headers together have 8 KiB, and a character may take 12 bytes there


@dataclass(frozen=True)
class CallPolicy:
    """Timeout, authentication and telemetry of all calls."""

    timeout: float  # seconds for a call without a deadline
    telemetry: Telemetry | None = None
    auth: Authenticator | None = None  # None: no authentication
    client_certificates: bool = False  # whether clients may have shown a certificate
    on_denied: Callable[[str, str, ServingError], Awaitable[None]] | None = None  # principal, action, error


def _certificate_name(policy: CallPolicy, context: Any) -> str:
    """Name in the client certificate; "" without one."""
    return grpc_certificate_name(context.auth_context()) if policy.client_certificates else ""


async def _authorize(policy: CallPolicy, name: str, headers: Mapping[bytes, bytes], context: Any) -> CallInfo:
    """Authenticate and authorize a call; raises ServingError for a denied one."""
    remaining, administrator = context.time_remaining(), ""
    principal = _certificate_name(policy, context)
    if policy.auth is not None:
        scope = "admin" if name in _ACTIONS else "predict" if name in _INFERENCE else None
        principal = (await policy.auth.authorize(headers, scope)).name
        administrator = principal if scope == "admin" else ""
    if principal and (request := current_request.get()):
        request.principal = principal
    key = headers.get(b"traffic-key", b"").decode(errors="replace")
    seconds = policy.timeout if remaining is None else min(policy.timeout, remaining)
    return CallInfo(time.monotonic() + seconds, key, context.peer(), administrator, principal)


async def _audit_denial(policy: CallPolicy, name: str, error: ServingError, context: Any) -> None:
    """Report a denied administrative action."""
    if policy.on_denied is not None and name in _ACTIONS:
        await policy.on_denied(_certificate_name(policy, context) or context.peer(), _ACTIONS[name], error)


def _headers(context: Any) -> dict[bytes, bytes]:
    """Metadata of a call, in the form of REST headers."""
    metadata = context.invocation_metadata() or ()
    return {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in metadata}


async def _abort(context: Any, error: ServingError, metadata: tuple[tuple[str, str], ...]) -> None:
    """End a call with an error; an overloaded server tells clients with a retry policy when to retry."""
    codes = import_grpc().StatusCode
    message = error.message if len(error.message) <= _MAX_MESSAGE else error.message[: _MAX_MESSAGE - 3] + "..."
    if error.retry_after is not None:
        metadata += (("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))),)
    await context.abort(codes[error.code], message, metadata)


async def handle_call(
    policy: CallPolicy,
    name: str,  # of the method
    method: Callable[[bytes, CallInfo], Awaitable[Message]],
    body: bytes,
    context: Any,  # grpc.aio.ServicerContext
) -> bytes:
    """Handle one call; unexpected errors are logged, and the client gets no details."""
    headers, failure, response, metadata = _headers(context), None, b"", ()
    counted = policy.telemetry if name in _INFERENCE else None
    if counted is not None:
        request = counted.start_request("GRPC", headers.get(b"traceparent"))
        metadata = (("traceparent", request.trace.header.decode()),)
    try:
        response = (await method(body, await _authorize(policy, name, headers, context))).SerializeToString()
    except ServingError as error:
        failure = error
    except asyncio.CancelledError:
        failure = ServingError("CANCELLED", "The client has disconnected.")
        raise
    except Exception:  # a defect of the server, or of a model
        _log.exception("A gRPC call failed")
        failure = ServingError("INTERNAL", "The server failed; its log has the reason.")
    finally:
        if counted is not None:
            counted.end_request(request, name, *((failure.code, failure.message) if failure else ()))
    if failure is not None:
        await _audit_denial(policy, name, failure, context)
        await _abort(context, failure, metadata)
        return b""
    context.set_trailing_metadata(metadata)
    return response


SERVICES = {
    "tensorflow.serving.PredictionService": {
        "Predict": predict,
        "Classify": classify,
        "Regress": regress,
        "MultiInference": multi_inference,
        "GetModelMetadata": get_metadata,
    },
    "tensorflow.serving.ModelService": {"GetModelStatus": get_status, "HandleReloadConfigRequest": reload_config},
}


def _health_service(manager: ModelManager) -> Any:
    """Health servicer that reports the models' present readiness, to watchers within half a second."""
    from grpc_health.v1 import health, health_pb2

    states = health_pb2.HealthCheckResponse

    class Health(health.aio.HealthServicer):
        """Standard health service, for the server (the empty name) and each of its services."""

        async def refresh(self) -> None:
            """Update the status from the models."""
            status = states.SERVING if manager.ready else states.NOT_SERVING
            for name in ("", *SERVICES):
                if self._server_status.get(name) != status:
                    await self.set(name, status)

        async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
            await self.refresh()
            return await super().Check(request, context)

        async def keep_fresh(self) -> None:
            """Update the status regularly, for watchers."""
            while True:
                await self.refresh()
                await asyncio.sleep(0.5)

    return Health()


def bound_methods(
    manager: ModelManager,
    reload: Callable[[str], Awaitable[None]],  # polls the sources; takes the principal's name
) -> dict[str, dict[str, Callable[[bytes, CallInfo], Awaitable[Message]]]]:  # by service and method
    """Methods of `SERVICES`, bound to the models of a manager."""
    return {
        service: {
            name: functools.partial(method, *([reload] if method is reload_config else []), manager)
            for name, method in methods.items()
        }
        for service, methods in SERVICES.items()
    }


def _add_services(
    server: Any, manager: ModelManager, policy: CallPolicy, reload: Callable[[str], Awaitable[None]]
) -> None:
    """Register TF Serving's services, with bytes as requests and responses."""
    grpc = import_grpc()
    for service, methods in bound_methods(manager, reload).items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(functools.partial(handle_call, policy, name, method))
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def add_reflection(
    server: Any,  # grpc.aio.Server
) -> None:
    """Register server reflection, with which grpcurl and its like need no .proto files."""
    from grpc_health.v1 import health, health_pb2
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    for module in (health_pb2, reflection_pb2):
        message_pool().AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, message_pool())


class GrpcServer:
    """Running gRPC server."""

    def __init__(self, server: Any, health: Any, port: int):
        self._server, self._health, self.port = server, health, port
        self._refresher = asyncio.get_running_loop().create_task(health.keep_fresh())

    async def stop(
        self,
        grace: float = 30.0,  # shutdown grace period, seconds
    ) -> None:
        """Accept no more calls, and end with the last one in progress."""
        self._refresher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._refresher
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


async def start_grpc(
    manager: ModelManager,
    address: str,  # "127.0.0.1:8500"; port 0 is any free port
    *,
    message_bytes: int = 64 * 2**20,  # largest request
    calls: int = 4096,  # maximum calls in progress
    credentials: Any = None,  # grpc.ServerCredentials; None: no TLS
    reload: Callable[[str], Awaitable[None]] | None = None,  # polls the sources; default: in this process
    telemetry: Telemetry | None = None,
    auth: Authenticator | None = None,  # None: no authentication
    on_denied: Callable[[str, str, ServingError], Awaitable[None]] | None = None,  # principal, action, error
) -> GrpcServer:
    """Serve gRPC on this event loop; raises InputError for a port in use.

    Several processes listen on one port, and the kernel distributes connections. gRPC itself rejects messages above
    the limit before they are read, and calls above the limit.
    """
    grpc = import_grpc()
    options = (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 1),
    )
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)

    policy = CallPolicy(manager.batching.timeout, telemetry, auth, credentials is not None, on_denied)
    _add_services(server, manager, policy, reload or (lambda principal: manager.reload()))
    from grpc_health.v1 import health_pb2_grpc

    health = _health_service(manager)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection(server)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise InputError(f"Cannot listen on {address}: {error}. Choose another port: --grpc-port") from None
    await server.start()
    return GrpcServer(server, health, port)
