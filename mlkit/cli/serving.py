"""`mlkit serve`: serve models through TF Serving's API."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mlkit.cli.app import app
from mlkit.cli.console import JsonOption, console, print_json, print_line, text_grid, working
from mlkit.cli.run import EngineOption
from mlkit.config import load_settings
from mlkit.errors import InputError, NotFoundError, did_you_mean
from mlkit.runs.store import RunStore

if TYPE_CHECKING:
    from mlkit.serving.options import ServedPath
    from mlkit.serving.ray_serve import RayServer
    from mlkit.serving.server import Supervisor


_NAMED = re.compile(r"(?:([A-Za-z0-9][\w.-]*)=)?(.+)", re.DOTALL)


def find_served(
    text: str,  # [NAME=]MODEL[@ALIAS], [NAME=]PATH or [NAME=]RUN
) -> "ServedPath":
    """The model that an argument names; raises NotFoundError that lists where it was looked up."""
    from mlkit.registry.store import Registry
    from mlkit.serving.options import ServedPath

    name, reference = _NAMED.fullmatch(text).groups()
    model = re.split("[@/]", reference, maxsplit=1)[0]
    registry = Registry()
    known = registry.states()
    if model in known:
        registry.find(reference)
        return ServedPath(name or model, reference=reference)
    if Path(reference).exists():
        path = Path(reference).absolute()
        return ServedPath(name or _name_from_path(path), path=str(path))
    try:
        run = RunStore().get(reference, having="saved_model")
    except NotFoundError as error:
        raise NotFoundError(
            f"There is nothing '{reference}' to serve: no model in the registry {registry.root}"
            f"{did_you_mean(model, known)}, no such path, and no run. {error}"
        ) from None
    return ServedPath(name or run.id, path=str(run.folder))


def check_shadow(
    model: "ServedPath",
    alias: str,  # of the shadow version
) -> None:
    """Reject a shadow version that does not exist; raises InputError, NotFoundError."""
    from mlkit.registry.store import Registry

    if not model.reference or re.search("[@/]", model.reference):
        raise InputError(
            f"--shadow takes models of the registry without @ALIAS or /VERSION, and '{model.name}' is none."
        )
    Registry().find(f"{model.reference}@{alias}")


def _name_from_path(path: Path) -> str:
    """Name of a model in URLs when it is given by its path."""
    parts = [part for part in reversed(path.parts) if not part.isdigit() and part not in ("saved_model", "litert", "/")]
    return re.sub(r"[^\w.-]", "_", parts[0]) if parts else "model"


MAX_BODY = 300  # characters of an example request that is printed whole


def example_request(
    folder: Path,  # of a version
) -> str:  # body of a predict request; "" when nothing is known about the model
    """An example request that the model can predict."""
    from mlkit.export.signatures import read_signatures
    from mlkit.serving.runtimes import blank_row, golden_rows

    rows = golden_rows(folder)
    if not rows and (folder / "saved_model.pb").is_file():
        signature = read_signatures(folder).get("serving_default")
        row = blank_row(signature.inputs) if signature else {}
        values = {name: array[0] if array.dtype == object else array[0].tolist() for name, array in row.items()}
        rows = [{name: "" if value == b"" else value for name, value in values.items()}]
    return json.dumps({"instances": rows[:1]}) if rows and rows[0] else ""


def _example_command(server: "Supervisor", model: "ServedPath") -> str:
    """A curl command for a prediction; "" when nothing is known about the model."""
    plan = model.source(server.options).poll()
    body = example_request(plan.versions[0].folder) if plan.versions else ""
    if not body:
        return ""
    if len(body) > MAX_BODY or "'" in body:
        file = server.folder / f"{model.name}.json"
        file.write_text(body)
        body = f"@{file}"
    auth = server.options.auth
    key = "-H 'Authorization: Bearer KEY' " if auth.keys or auth.jwks else ""
    return f"curl {key}-d '{body}' {server.url}/v1/models/{model.name}:predict"


ENGINES = ("local", "ray")


@app.command(epilog="Example: mlkit serve churn --processes 2", rich_help_panel="Serve")
def serve(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]MODEL...", help="In the registry, a path, or a run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="REST port; 0 for any free port.")] = 8501,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="gRPC port; by default none.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    processes: Annotated[int, typer.Option(min=1, max=256, help="Server processes, each with all models.")] = 1,
    runtime: Annotated[str, typer.Option(metavar="tensorflow|litert|eager", help="Backend.")] = "tensorflow",
    variant: Annotated[str, typer.Option(help="Conversion, for litert: float32, int8, ...")] = "float32",
    shadow: Annotated[str, typer.Option(metavar="ALIAS", help="Alias that receives shadow traffic.")] = "",
    cache: Annotated[int, typer.Option(min=0, help="Megabytes of the response cache.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request times out.")] = 30.0,
    queue_size: Annotated[int, typer.Option(min=1, help="Queued requests per model; more are rejected.")] = 1024,
    batching_parameters_file: Annotated[Path | None, typer.Option(help="TF Serving's batching parameters.")] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Serve registered models without signature.")] = False,
    engine: EngineOption = "local",
    replicas: Annotated[str, typer.Option(metavar="N|MIN-MAX", help="Replicas on Ray, scaled by load.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Serve models through TF Serving's REST and gRPC API until Ctrl-C."""
    from mlkit.serving.batcher import BatchingConfig
    from mlkit.serving.options import LogOptions, ServerOptions
    from mlkit.serving.rest import read_origins
    from mlkit.serving.runtimes import RUNTIMES
    from mlkit.serving.server import run_server
    from mlkit.serving.tls import read_options

    _check_engine(engine, replicas)
    if runtime not in RUNTIMES:
        raise InputError(f"Unknown runtime '{runtime}'.{did_you_mean(runtime, RUNTIMES)} One of {', '.join(RUNTIMES)}.")
    served = [find_served(text) for text in models]
    names = [model.name for model in served]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Two models are called '{duplicates[0]}'. Give one another name: NAME=MODEL")
    for model in served if shadow else ():
        check_shadow(model, shadow)
    settings = load_settings()
    batching = BatchingConfig(max_queued=queue_size, timeout=timeout, shared=settings.serving.batching)
    if batching_parameters_file is not None:
        batching = batching.with_tf_serving_file(batching_parameters_file)
    for name in names:
        batching.mode(name)  # rejects what is wrong
    auth, tls = read_options(settings)
    options = ServerOptions(
        tuple(served),
        host,
        port,
        grpc_port,
        processes,
        runtime,
        variant,
        verify=not unsigned,
        batching=batching,
        body_bytes=settings.serving.max_body * 2**20,
        shadow=shadow,
        cache_bytes=cache * 2**20,
        auth=auth,
        tls=tls,
        logs=LogOptions.from_settings(settings),
        cors_origins=read_origins(settings.serving.cors_origins),
    )
    with contextlib.ExitStack() as stack:
        if settings.serving.log_format != "json":  # standard error then has nothing but JSON
            stack.enter_context(working(f"loading {', '.join(names)}"))

        def announce(server: Any) -> None:
            stack.close()
            (_print_local if engine == "local" else _print_ray)(server, as_json)

        if engine == "local":
            run_server(options, announce)
        else:
            from mlkit.serving.ray_serve import Replicas, run_on_ray

            run_on_ray(options, Replicas.parse(replicas or "1"), announce)


def _check_engine(engine: str, replicas: str) -> None:
    if engine not in ENGINES:
        raise InputError(f"Unknown engine '{engine}'.{did_you_mean(engine, ENGINES)} One of {', '.join(ENGINES)}.")
    if replicas and engine != "ray":
        raise InputError("--replicas is for --engine ray. On this machine: --processes")


def _print_local(server: "Supervisor", as_json: bool) -> None:
    """Print the models of a server on this machine, with an example request for each."""
    versions = server.board.read()[0].get("default", {})
    models = {name: {"version": versions.get(name), "url": url} for name, url in _model_urls(server).items()}
    if as_json:
        _print_json(server, models, pids=server.pids)
        return
    count = server.options.processes
    _print_models(server, models, "1 process" if count == 1 else f"{count} processes")
    for model in server.options.models:
        if command := _example_command(server, model):
            print_line(f"  {escape(command)}")
    console.print("\nCtrl-C stops the server after the requests in flight.")


def _print_ray(server: "RayServer", as_json: bool) -> None:
    """Print the models of a server on Ray."""
    models = {name: {"url": url} for name, url in _model_urls(server).items()}
    low, high = server.replicas.minimum, server.replicas.maximum
    if as_json:
        _print_json(server, models, replicas={"minimum": low, "maximum": high})
        return
    replicas = "1 replica" if high == 1 else f"{low} replicas" if low == high else f"{low} to {high} replicas"
    place = "on 1 machine" if server.machines == 1 else f"over {server.machines} machines"
    _print_models(server, models, f"{replicas} {place}")
    console.print("Ctrl-C stops the server after the requests in flight.")


def _model_urls(server: "Supervisor | RayServer") -> dict[str, str]:
    return {model.name: f"{server.url}/v1/models/{model.name}" for model in server.options.models}


def _print_json(server: "Supervisor | RayServer", models: dict[str, dict[str, Any]], **size: Any) -> None:
    print_json({"url": server.url, "grpc": server.grpc_address, **size, "models": models})
    sys.stdout.flush()


def _print_models(server: "Supervisor | RayServer", models: dict[str, dict[str, Any]], size: str) -> None:
    """Print the table of models, and the size and addresses of the server."""
    titles = ("model", *next(iter(models.values())))
    rows = [(name, *map(str, fields.values())) for name, fields in models.items()]
    console.print(text_grid(titles, rows, whole=titles[:-1]))
    grpc = f", gRPC on {server.grpc_address}" if server.grpc_address else ""
    print_line(f"\n{size}, {server.options.runtime}{grpc}, ready. Documentation: {server.url}/docs\n")
