"""TF Serving's services over the versions in service: predictions, metadata and states of models, beside health and reflection, on the event loop of everything else."""

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

from mlkit.errors import InputError, MissingDependencyError, ServingError, join_names, did_you_mean
from mlkit.export.protos import (
    array_type,
    fill_tensor,
    message_class,
    message_pool,
    parse_message,
    serialized_examples,
    tensor_to_array,
    type_name,
)
from mlkit.export.signatures import CLASSIFY, PREDICT, REGRESS, SignatureInfo, find_signature
from mlkit.serving.auth import Authenticator
from mlkit.serving.model_manager import LoadedVersion, ModelManager
from mlkit.serving.protocol import check_shape, classifications, count_rows, metadata_message, regressions
from mlkit.serving.telemetry import Telemetry, current_request
from mlkit.serving.tls import grpc_certificate_name


class Asked(NamedTuple):
    """Which version of which model a request means."""

    model: str
    version: int | None
    label: str | None
    signature: str  # "" for serving_default


def read_spec(
    spec: Message,  # ModelSpec
) -> Asked:
    """What a request asks; raises ServingError where it names no model."""
    if not spec.name:
        raise ServingError("INVALID_ARGUMENT", "The request names no model: model_spec.name is empty.")
    choice = spec.WhichOneof("version_choice")
    version = spec.version.value if choice == "version" else None
    return Asked(spec.name, version, spec.version_label if choice == "version_label" else None, spec.signature_name)


def read_inputs(
    signature: SignatureInfo,
    tensors: Mapping[str, Message],  # of a PredictRequest
) -> dict[str, np.ndarray]:
    """Tensors as the arrays that a signature takes; raises ServingError for those that do not fit."""
    for name in tensors:
        if name not in signature.inputs:
            hint = did_you_mean(name, signature.inputs)
            raise ServingError("INVALID_ARGUMENT", f"Signature '{signature.name}' takes no input '{name}'.{hint}")
    if missing := [name for name in signature.inputs if name not in tensors]:
        raise ServingError(
            "INVALID_ARGUMENT", f"The request lacks inputs of '{signature.name}': {join_names(missing)}."
        )
    inputs = {}
    for name, info in signature.inputs.items():
        tensor = tensors[name]
        if array_type(tensor.dtype) != info.dtype:
            raise ServingError("INVALID_ARGUMENT", f"Input '{name}' takes {info.dtype}, not {type_name(tensor.dtype)}.")
        inputs[name] = tensor_to_array(tensor, name)
        check_shape(info, inputs[name].shape)
    return inputs


def read_filter(
    signature: SignatureInfo,
    wanted: Sequence[str],  # outputs; none means all
) -> list[str]:
    """Which outputs to answer; raises ServingError for some that are not there, or named twice."""
    names = list(wanted) or list(signature.outputs)
    for name in names:
        if name not in signature.outputs:
            hint = f"{did_you_mean(name, signature.outputs)} It has {join_names(signature.outputs)}."
            raise ServingError("INVALID_ARGUMENT", f"Signature '{signature.name}' gives no output '{name}'.{hint}")
    if len(set(names)) < len(names):
        raise ServingError("INVALID_ARGUMENT", "output_filter names an output twice.")
    return names


class Caller(NamedTuple):
    """What is known of a call beside its message."""

    deadline: float  # of time.monotonic()
    key: str = ""  # calls with the same key meet the same version where traffic is divided
    peer: str = ""  # address, as gRPC writes it: "ipv4:127.0.0.1:54321"
    administrator: str = ""  # who has proven to be one
    name: str = ""  # of whoever has shown a key, a token or a certificate


def _answered(spec: Message, served: LoadedVersion, signature: str) -> None:
    """Write into an answer who has given it."""
    spec.name, spec.signature_name = served.model, signature
    spec.version.value = served.number


async def _ask_examples(
    served: LoadedVersion, signature: SignatureInfo, examples: list[bytes], deadline: float
) -> dict[str, np.ndarray]:
    if len(signature.inputs) != 1:
        takes = join_names(signature.inputs)
        raise ServingError("FAILED_PRECONDITION", f"Signature '{signature.name}' takes {takes} rather than examples.")
    inputs = {next(iter(signature.inputs)): np.array(examples, object)}
    return await served.run(signature.name, inputs, len(examples), deadline, aside=True)


def _fill_classes(result: Message, outputs: Mapping[str, np.ndarray], rows: int) -> None:
    for pairs in classifications(outputs, rows):
        row = result.classifications.add()
        for label, score in pairs:
            row.classes.add(label=label, score=score)


def _fill_numbers(result: Message, outputs: Mapping[str, np.ndarray], rows: int) -> None:
    for value in regressions(outputs, rows).tolist():
        result.regressions.add(value=value)


async def predict(
    host: ModelManager,
    body: bytes,  # PredictRequest
    caller: Caller,
) -> Message:  # PredictResponse
    """Answer for tensors; raises ServingError."""
    request = parse_message("PredictRequest", body)
    asked = read_spec(request.model_spec)
    with host.lease(asked.model, asked.version, asked.label, caller.key) as served:
        signature = find_signature(served.signatures, asked.signature, PREDICT, "FAILED_PRECONDITION")
        wanted = read_filter(signature, request.output_filter)
        inputs = read_inputs(signature, request.inputs)
        outputs = await served.run(signature.name, inputs, count_rows(signature, inputs), caller.deadline, aside=True)
        response = message_class("PredictResponse")()
        for name in wanted:
            fill_tensor(response.outputs[name], outputs[name])
        _answered(response.model_spec, served, signature.name)
        return response


async def _examples(host: ModelManager, body: bytes, caller: Caller, method: str, fill: Callable, name: str) -> Message:
    request = parse_message("ExamplesRequest", body)
    asked, examples = read_spec(request.model_spec), serialized_examples(request.input)
    with host.lease(asked.model, asked.version, asked.label, caller.key) as served:
        signature = find_signature(served.signatures, asked.signature, method)
        outputs = await _ask_examples(served, signature, examples, caller.deadline)
        response = message_class(name)()
        response.result.SetInParent()
        fill(response.result, outputs, len(examples))
        _answered(response.model_spec, served, signature.name)
        return response


async def classify(
    host: ModelManager,
    body: bytes,  # ClassificationRequest
    caller: Caller,
) -> Message:  # ClassificationResponse
    """Classes and scores for examples; raises ServingError."""
    return await _examples(host, body, caller, CLASSIFY, _fill_classes, "ClassificationResponse")


async def regress(
    host: ModelManager,
    body: bytes,  # RegressionRequest
    caller: Caller,
) -> Message:  # RegressionResponse
    """A number for each example; raises ServingError."""
    return await _examples(host, body, caller, REGRESS, _fill_numbers, "RegressionResponse")


_TASKS = {
    CLASSIFY: ("classification_result", _fill_classes),
    REGRESS: ("regression_result", _fill_numbers),
}


def _check_tasks(tasks: Sequence[Message]) -> Asked:
    """What all tasks of a request ask together; raises ServingError where they do not fit together."""
    if not tasks:
        raise ServingError("INVALID_ARGUMENT", "The request has no tasks.")
    asked = [read_spec(task.model_spec) for task in tasks]
    if len({each[:3] for each in asked}) > 1:
        raise ServingError("INVALID_ARGUMENT", "All tasks of a request have to ask the same version of one model.")
    if len({each.signature for each in asked}) < len(asked):
        raise ServingError("INVALID_ARGUMENT", "Two tasks of the request ask the same signature.")
    for task in tasks:
        if task.method_name not in _TASKS:
            raise ServingError("UNIMPLEMENTED", f"Tasks are for {join_names(_TASKS)}, not '{task.method_name}'.")
    return asked[0]


async def infer_several(
    host: ModelManager,
    body: bytes,  # MultiInferenceRequest
    caller: Caller,
) -> Message:  # MultiInferenceResponse
    """Classes, scores and numbers for the same examples; raises ServingError."""
    request = parse_message("SeveralRequest", body)
    asked, examples = _check_tasks(request.tasks), serialized_examples(request.input)
    response = message_class("MultiInferenceResponse")()
    with host.lease(asked.model, asked.version, asked.label, caller.key) as served:
        for task in request.tasks:
            signature = find_signature(served.signatures, task.model_spec.signature_name, task.method_name)
            outputs = await _ask_examples(served, signature, examples, caller.deadline)
            place, fill = _TASKS[task.method_name]
            result = response.results.add()
            getattr(result, place).SetInParent()
            fill(getattr(result, place), outputs, len(examples))
            _answered(result.model_spec, served, signature.name)
    return response


async def get_metadata(
    host: ModelManager,
    body: bytes,  # GetModelMetadataRequest
    caller: Caller,
) -> Message:  # GetModelMetadataResponse
    """What a model takes and gives; raises ServingError."""
    request = parse_message("GetModelMetadataRequest", body)
    asked, fields = read_spec(request.model_spec), list(request.metadata_field)
    if not fields:
        raise ServingError("INVALID_ARGUMENT", "The request names no metadata_field; there is 'signature_def'.")
    if unknown := [name for name in fields if name != "signature_def"]:
        raise ServingError("INVALID_ARGUMENT", f"There is no metadata_field '{unknown[0]}', but 'signature_def'.")
    with host.lease(asked.model, asked.version, asked.label) as served:
        return metadata_message(served.model, served.number, served.signatures)


def check_config(
    host: ModelManager,
    config: Message,  # ModelServerConfig
) -> None:
    """Raise ServingError for a configuration that asks for more than to look at what is served already."""
    if config.WhichOneof("config") == "custom_model_config":
        raise ServingError("UNIMPLEMENTED", "A configuration of another platform is not understood.")
    for told in config.model_config_list.config:
        if told.name not in host.models():
            raise ServingError(
                "PERMISSION_DENIED",
                f"Model '{told.name}' is not served, and no client can add it. Served: {join_names(host.models())}.",
            )
        if told.base_path and not _is_served(host, told.name, told.base_path):
            raise ServingError("PERMISSION_DENIED", f"Model '{told.name}' is served from where it is, not elsewhere.")
        if told.version_labels or told.HasField("model_version_policy"):
            raise ServingError(
                "UNIMPLEMENTED",
                "Versions and labels follow the registry (mlkit promote, mlkit rollback), not a request.",
            )


def _is_served(host: ModelManager, name: str, path: str) -> bool:
    """Whether the versions of a model lie in that folder."""
    return any(str(version.folder.parent) == path.rstrip("/") for version in host.state(name).loaded.values())


async def get_status(
    host: ModelManager,
    body: bytes,  # GetModelStatusRequest
    caller: Caller,
) -> Message:  # GetModelStatusResponse
    """How far the versions of a model are; raises ServingError."""
    asked = read_spec(parse_message("GetModelStatusRequest", body).model_spec)
    response = message_class("GetModelStatusResponse")()
    states, codes = (
        message_pool().FindEnumTypeByName(f"tensorflow.{name}").values_by_name
        for name in ("serving.ModelVersionStatus.State", "error.Code")
    )
    for told in host.statuses(asked.model, asked.version, asked.label):
        row = response.model_version_status.add(version=told.version, state=states[told.state].number)
        row.status.error_code, row.status.error_message = codes[told.code].number, told.message
    return response


async def reload_config(
    reload: Callable[[str], Awaitable[None]],  # look at the sources now, for somebody
    host: ModelManager,
    body: bytes,  # ReloadConfigRequest
    caller: Caller,
) -> Message:  # ReloadConfigResponse
    """Look at the sources now, for administrators and callers on this machine; raises ServingError."""
    if not caller.administrator and not caller.peer.startswith(("ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]", "unix:")):
        raise ServingError("PERMISSION_DENIED", "Only callers on the server's own machine may ask for this.")
    check_config(host, parse_message("ReloadConfigRequest", body).config)
    await reload(caller.name or caller.peer)
    response = message_class("ReloadConfigResponse")()
    response.status.SetInParent()
    return response


_log = logging.getLogger("mlkit.serving")
_COUNTED = ("Predict", "Classify", "Regress", "MultiInference")  # what TF Serving's metrics count
_ACTS = {"HandleReloadConfigRequest": "reload"}  # what administrators do, and what it is called in the record
_LONGEST = 500  # characters of an error; all headers together have 8 KiB, and a character may take 12 bytes there


def _grpc() -> Any:
    try:
        import grpc.aio
    except ImportError as error:
        raise MissingDependencyError(f"{error}. gRPC needs: pip install 'mlkit[serve]'") from error
    return grpc


@dataclass(frozen=True)
class Surroundings:
    """What is around every call."""

    timeout: float  # seconds that a call without a deadline has
    telemetry: Telemetry | None = None
    access: Authenticator | None = None  # None: everybody may ask
    certificates: bool = False  # whether callers may have shown one
    refused: Callable[[str, str, ServingError], Awaitable[None]] | None = None  # is told who asked what in vain


def _certified(around: Surroundings, context: Any) -> str:
    """The name in the certificate that a caller has shown; "" without one."""
    return grpc_certificate_name(context.auth_context()) if around.certificates else ""


async def _caller(around: Surroundings, name: str, headers: Mapping[bytes, bytes], context: Any) -> Caller:
    """Who calls, and until when an answer is wanted; raises ServingError for somebody who may not."""
    left, who = context.time_remaining(), ""
    known = _certified(around, context)
    if around.access is not None:
        scope = "admin" if name in _ACTS else "predict" if name in _COUNTED else None
        known = (await around.access.check(headers, scope)).name
        who = known if scope == "admin" else ""
    if known and (request := current_request.get()):
        request.caller = known
    key = headers.get(b"traffic-key", b"").decode(errors="replace")
    seconds = around.timeout if left is None else min(around.timeout, left)
    return Caller(time.monotonic() + seconds, key, context.peer(), who, known)


async def _note_refusal(around: Surroundings, name: str, error: ServingError, context: Any) -> None:
    """Tell of an administrator's act that somebody may not ask for."""
    if around.refused is None or name not in _ACTS or error.code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return
    who = getattr(error, "caller", "") or _certified(around, context) or context.peer()
    await around.refused(who, _ACTS[name], error)


def _headers(context: Any) -> dict[bytes, bytes]:
    """Metadata of a call, as REST has its headers."""
    told = context.invocation_metadata() or ()
    return {name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in told}


async def _abort(context: Any, error: ServingError, metadata: tuple[tuple[str, str], ...]) -> None:
    """End a call with an error."""
    codes = _grpc().StatusCode
    told = error.message if len(error.message) <= _LONGEST else error.message[: _LONGEST - 3] + "..."
    if error.retry_after is not None:
        metadata += (("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))),)
    await context.abort(codes[error.code], told, metadata)


async def answer_call(
    around: Surroundings,
    name: str,  # of the method
    method: Callable[[bytes, Caller], Awaitable[Message]],
    body: bytes,
    context: Any,  # grpc.aio.ServicerContext
) -> bytes:
    """Answer one call, also with an error."""
    headers, refusal, answer, metadata = _headers(context), None, b"", ()
    counted = around.telemetry if name in _COUNTED else None
    if counted is not None:
        request = counted.begin("GRPC", headers.get(b"traceparent"))
        metadata = (("traceparent", request.trace.header.decode()),)
    try:
        answer = (await method(body, await _caller(around, name, headers, context))).SerializeToString()
    except ServingError as error:
        refusal = error
    except asyncio.CancelledError:
        refusal = ServingError("CANCELLED", "The caller has gone.")
        raise
    except Exception:  # a defect of ours, or of a model
        _log.exception("A gRPC call failed")
        refusal = ServingError("INTERNAL", "The server failed; its log says why.")
    finally:
        if counted is not None:
            counted.end(request, name, *((refusal.code, refusal.message) if refusal else ()))
    if refusal is not None:
        await _note_refusal(around, name, refusal, context)
        await _abort(context, refusal, metadata)
        return b""
    context.set_trailing_metadata(metadata)
    return answer


SERVICES = {
    "tensorflow.serving.PredictionService": {
        "Predict": predict,
        "Classify": classify,
        "Regress": regress,
        "MultiInference": infer_several,
        "GetModelMetadata": get_metadata,
    },
    "tensorflow.serving.ModelService": {"GetModelStatus": get_status, "HandleReloadConfigRequest": reload_config},
}


def _health_service(host: ModelManager) -> Any:
    """A health service that looks at the models before it answers."""
    from grpc_health.v1 import health, health_pb2

    states = health_pb2.HealthCheckResponse

    class Health(health.aio.HealthServicer):
        """Tells what is so."""

        async def refresh(self) -> None:
            """Have it agree with the models in service."""
            present = states.SERVING if host.ready else states.NOT_SERVING
            for name in ("", *SERVICES):
                if self._server_status.get(name) != present:
                    await self.set(name, present)

        async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
            await self.refresh()
            return await super().Check(request, context)

        async def keep_fresh(self) -> None:
            """For those who watch."""
            while True:
                await self.refresh()
                await asyncio.sleep(0.5)

    return Health()


def bound_methods(
    host: ModelManager,
    reload: Callable[[str], Awaitable[None]],  # look at the sources now, for somebody
) -> dict[str, dict[str, Callable[[bytes, Caller], Awaitable[Message]]]]:  # of each service, by name
    """The methods of `SERVICES` for the models of a host."""
    return {
        service: {
            name: functools.partial(method, *([reload] if method is reload_config else []), host)
            for name, method in methods.items()
        }
        for service, methods in SERVICES.items()
    }


def _add_services(
    server: Any, host: ModelManager, around: Surroundings, reload: Callable[[str], Awaitable[None]]
) -> None:
    """Let a server answer for the services of TF Serving."""
    grpc = _grpc()
    for service, methods in bound_methods(host, reload).items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(functools.partial(answer_call, around, name, method))
            for name, method in methods.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def add_reflection(
    server: Any,  # grpc.aio.Server
) -> None:
    """Let a server tell what it speaks."""
    from grpc_health.v1 import health, health_pb2
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    for module in (health_pb2, reflection_pb2):
        message_pool().AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, message_pool())


class GrpcServer:
    """A server that answers."""

    def __init__(self, server: Any, health: Any, port: int):
        self._server, self._health, self.port = server, health, port
        self._fresh = asyncio.get_running_loop().create_task(health.keep_fresh())

    async def stop(
        self,
        grace: float = 30.0,  # seconds that calls have to end
    ) -> None:
        """Take no more calls, and end when the last one is answered."""
        self._fresh.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._fresh
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


async def start_grpc(
    host: ModelManager,
    address: str,  # "127.0.0.1:8500"; port 0 is any that is free
    *,
    message_bytes: int = 64 * 2**20,  # the longest request
    calls: int = 4096,  # at once; more are refused
    credentials: Any = None,  # grpc.ServerCredentials; None: no TLS
    reload: Callable[[str], Awaitable[None]] | None = None,  # look at the sources now; by default in this process
    telemetry: Telemetry | None = None,
    access: Authenticator | None = None,  # None: everybody may ask
    refused: Callable[[str, str, ServingError], Awaitable[None]] | None = None,  # is told who asked what in vain
) -> GrpcServer:
    """Answer gRPC on this event loop; raises InputError for a port in use."""
    grpc = _grpc()
    options = (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 1),
    )
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=calls)

    async def reload_here(who: str) -> None:
        await host.reload()

    around = Surroundings(host.limits.timeout, telemetry, access, credentials is not None, refused)
    _add_services(server, host, around, reload or reload_here)
    from grpc_health.v1 import health_pb2_grpc

    health = _health_service(host)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_reflection(server)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise InputError(f"Cannot listen on {address}: {error}. Choose another port: --grpc-port") from None
    await server.start()
    return GrpcServer(server, health, port)
