"""`mlkit serve`: a model answers on a port."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mlkit.cli.console import JsonOption, console, print_json, text_grid
from mlkit.config import load_settings
from mlkit.errors import InputError, NotFoundError, did_you_mean
from mlkit.runs.run import RunStore

if TYPE_CHECKING:
    from mlkit.serving.options import ServedPath
    from mlkit.serving.ray_serve import RayServer
    from mlkit.serving.server import Supervisor

serving = typer.Typer()
_NAMED = re.compile(r"(?:([A-Za-z0-9][\w.-]*)=)?(.+)", re.DOTALL)


def find_served(
    text: str,  # as typed: [NAME=]MODEL[@ALIAS], [NAME=]PATH or [NAME=]RUN
) -> "ServedPath":
    """What a word on the command line means; raises NotFoundError that tells where was looked."""
    from mlkit.registry.store import Registry
    from mlkit.serving.options import ServedPath

    name, what = _NAMED.fullmatch(text).groups()
    model = re.split("[@/]", what, maxsplit=1)[0]
    registry = Registry()
    known = registry.states()
    if model in known:
        registry.find(what)
        return ServedPath(name or model, reference=what)
    if Path(what).exists():
        return ServedPath(name or _name_of(Path(what).absolute()), path=str(Path(what).absolute()))
    try:
        run = RunStore().get(what, having="saved_model")
    except NotFoundError as error:
        raise NotFoundError(
            f"There is nothing '{what}' to serve: no model in the registry {registry.root}{did_you_mean(model, known)}, "
            f"no such path, and no run. {error}"
        ) from None
    return ServedPath(name or run.id, path=str(run.folder))


def check_shadow(
    model: "ServedPath",
    alias: str,  # of the version in the shadow
) -> None:
    """Refuse a shadow that would not be there; raises InputError, NotFoundError."""
    from mlkit.registry.store import Registry

    if not model.reference or re.search("[@/]", model.reference):
        raise InputError(
            f"--shadow takes models of the registry without @ALIAS or /VERSION, and '{model.name}' is none."
        )
    Registry().find(f"{model.reference}@{alias}")


def _name_of(path: Path) -> str:
    """What a model is called in URLs when it is given by a path."""
    parts = [part for part in reversed(path.parts) if not part.isdigit() and part not in ("saved_model", "litert", "/")]
    return re.sub(r"[^\w.-]", "_", parts[0]) if parts else "model"


_SHORT = 300  # characters of a request that is shown as it is


def example_request(
    folder: Path,  # of a version
) -> str:  # body of a predict request; "" when nothing is known about the model
    """A request that the model answers."""
    from mlkit.export.signatures import read_signatures
    from mlkit.serving.runtimes import blank_row, golden_rows

    rows = golden_rows(folder)
    if not rows and (folder / "saved_model.pb").is_file():
        told = read_signatures(folder).get("serving_default")
        row = blank_row(told.inputs) if told else {}
        values = {name: each[0] if each.dtype == object else each[0].tolist() for name, each in row.items()}
        rows = [{name: "" if value == b"" else value for name, value in values.items()}]
    return json.dumps({"instances": rows[:1]}) if rows and rows[0] else ""


def _example(server: "Supervisor", model: "ServedPath") -> str:
    """A command that asks a model; "" when nothing is known about it."""
    plan = model.source(server.options).look()
    body = example_request(plan.wanted[0].folder) if plan.wanted else ""
    if not body:
        return ""
    if len(body) > _SHORT or "'" in body:
        file = server.folder / f"{model.name}.json"
        file.write_text(body)
        body = f"@{file}"
    access = server.options.access
    key = "-H 'Authorization: Bearer KEY' " if access.keys or access.jwks else ""
    return f"curl {key}-d '{body}' {server.url}/v1/models/{model.name}:predict"


ENGINES = ("local", "ray")


@serving.command(epilog="Example: mlkit serve churn --processes 2")
def serve(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]MODEL...", help="In the registry, a path, or a run.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="For REST; 0: any that is free.")] = 8501,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="For gRPC; none without it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    processes: Annotated[int, typer.Option(min=1, max=256, help="How many answer, each with all models.")] = 1,
    runtime: Annotated[str, typer.Option(metavar="tensorflow|litert|eager", help="What runs them.")] = "tensorflow",
    kind: Annotated[str, typer.Option(help="Which conversion, for litert: float32, int8, ...")] = "float32",
    shadow: Annotated[str, typer.Option(metavar="ALIAS", help="Ask its version as well, compare, answer nobody.")] = "",
    cache: Annotated[int, typer.Option(min=0, help="Megabytes for answers that come again.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 30.0,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait for a model; more are refused.")] = 1024,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="Serve registered models nobody has signed.")] = False,
    engine: Annotated[str, typer.Option(metavar="local|ray", help="On this machine, or over a Ray cluster.")] = "local",
    replicas: Annotated[str, typer.Option(metavar="N|MIN-MAX", help="With ray: how many answer, by load.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Serve models through TF Serving's API, until Ctrl-C; new versions are taken up as they come."""
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
    names = [each.name for each in served]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Two models are called '{twice[0]}'. Give one another name: NAME=MODEL")
    for each in served if shadow else ():
        check_shadow(each, shadow)
    settings = load_settings()
    access, tls = read_options(settings)
    options = ServerOptions(
        tuple(served),
        host,
        port,
        grpc_port,
        processes,
        runtime,
        kind,
        verify=not unsigned,
        limits=BatchingConfig(waiting=waiting, timeout=timeout),
        shadow=shadow,
        cache_bytes=cache * 2**20,
        access=access,
        tls=tls,
        logs=LogOptions.from_settings(settings),
        origins=read_origins(settings.serving.origins),
    )
    if engine == "local":
        run_server(options, _print_json if as_json else _print_server)
    else:
        from mlkit.serving.ray_serve import Replicas, run_on_ray

        run_on_ray(options, Replicas.parse(replicas or "1"), _print_ray_json if as_json else _print_ray)


def _check_engine(engine: str, replicas: str) -> None:
    if engine not in ENGINES:
        raise InputError(f"Unknown engine '{engine}'.{did_you_mean(engine, ENGINES)} One of {', '.join(ENGINES)}.")
    if replicas and engine != "ray":
        raise InputError("--replicas is for --engine ray. On this machine: --processes")


def _versions(server: "Supervisor") -> dict[str, Any]:
    """The version of each model that answers."""
    return server.board.read()[0].get("default", {})


def _print_json(server: "Supervisor") -> None:
    models = {name: {"version": version} for name, version in _versions(server).items()}
    for model in server.options.models:
        models[model.name]["url"] = f"{server.url}/v1/models/{model.name}"
    print_json({"url": server.url, "grpc": server.grpc_address, "pids": server.pids, "models": models})
    sys.stdout.flush()


def _print_server(server: "Supervisor") -> None:
    versions = _versions(server)
    rows = [
        (model.name, str(versions.get(model.name)), f"{server.url}/v1/models/{model.name}")
        for model in server.options.models
    ]
    console.print(text_grid(("model", "version", "url"), rows, whole=("model", "version")))
    console.print(f"\n{_what(server)}, ready. Documentation: {server.url}/docs\n", soft_wrap=True)
    for model in server.options.models:
        if example := _example(server, model):
            console.print(f"  {escape(example)}", soft_wrap=True)
    console.print("\nCtrl-C stops the server; what has been asked is answered first.")


def _what(server: "Supervisor") -> str:
    count, runtime = server.options.processes, server.options.runtime
    processes = "1 process" if count == 1 else f"{count} processes"
    return f"{processes}, {runtime}" + (f", gRPC on {server.grpc_address}" if server.grpc_address else "")


def _print_ray_json(server: "RayServer") -> None:
    models = {model.name: {"url": f"{server.url}/v1/models/{model.name}"} for model in server.options.models}
    count = {"least": server.replicas.least, "most": server.replicas.most}
    print_json({"url": server.url, "grpc": server.grpc_address, "replicas": count, "models": models})
    sys.stdout.flush()


def _print_ray(server: "RayServer") -> None:
    rows = [(model.name, f"{server.url}/v1/models/{model.name}") for model in server.options.models]
    console.print(text_grid(("model", "url"), rows, whole=("model",)))
    least, most, machines = server.replicas.least, server.replicas.most, server.machines
    replicas = "1 replica" if most == 1 else f"{least} replicas" if least == most else f"{least} to {most} replicas"
    where = "on 1 machine" if machines == 1 else f"over {machines} machines"
    gives = f", gRPC on {server.grpc_address}" if server.grpc_address else ""
    console.print(f"\n{replicas} {where}, {server.options.runtime}{gives}, ready. Documentation: {server.url}/docs")
    console.print("\nCtrl-C ends the server; what has been asked is answered first.")


access = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Hand out keys to callers of a model server.")
serving.add_typer(access, name="access")


def _key_file() -> Path:
    """Where keys are; raises InputError where nobody has said that."""
    from mlkit.serving.tls import read_options

    settings = load_settings()
    if not settings.access.keys:
        raise InputError(
            "The setting access.keys names the file of keys, and it is empty. In settings.ini: [access] keys = api.keys"
        )
    return Path(read_options(settings)[0].keys)


@access.command("new", epilog="Example: mlkit access new webshop --scope predict --days 90")
def new_access(
    name: Annotated[str, typer.Argument(help="Who will have the key; it stands in logs.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="predict|admin", help="What it allows: predict, or several of these.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="Until it expires; without this, never.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Hand out a key; it is shown once."""
    from mlkit.serving.auth import new_api_key

    path = _key_file()
    text = new_api_key(path, name, scope or ["predict"], days)
    if as_json:
        print_json({"name": name, "key": text, "file": str(path)})
        return
    print(text)
    console.print(f"\nThe key of {escape(name)}, shown this once. Its hash is in {escape(str(path))}.", soft_wrap=True)
    console.print(f"  curl -H 'Authorization: Bearer {text[:14]}...' ...", soft_wrap=True)


@access.command("list", epilog="Example: mlkit access list --json")
def list_access(as_json: JsonOption = False) -> None:
    """List who has a key."""
    from mlkit.serving.auth import api_keys

    keys = api_keys(_key_file())
    if as_json:
        print_json([{name: value for name, value in vars(key).items() if name != "sha256"} for key in keys])
        return
    rows = [
        (key.name, " ".join(key.scopes), key.created[:10], "expired" if key.expired else (key.expires or "never")[:10])
        for key in keys
    ]
    console.print(text_grid(("name", "scopes", "since", "expires"), rows, whole=("name",)) if rows else "No keys.")


@access.command("revoke", epilog="Example: mlkit access revoke webshop")
def revoke_access(
    name: Annotated[str, typer.Argument(help="Whose key is taken back.")],
    as_json: JsonOption = False,
) -> None:
    """Take a key back; servers notice within a second."""
    from mlkit.serving.auth import revoke_api_key

    gone = revoke_api_key(_key_file(), name)
    if as_json:
        print_json({"name": name, "revoked": [key.id for key in gone]})
        return
    console.print(f"The key of {escape(name)} is good no longer.", soft_wrap=True)
