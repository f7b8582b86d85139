"""`mlkit register`, `promote`, `rollback`, `models`: model versions, aliases, traffic, audit log."""

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mlkit.cli.app import app, command_group
from mlkit.cli.console import DONE, FAILED, JsonOption, console, parse_pairs, print_json, print_line, text_grid
from mlkit.cli.signing import AuthoritiesOption
from mlkit.errors import InputError, MlkitError
from mlkit.runs.store import RunStore

if TYPE_CHECKING:
    from mlkit.registry.audit_log import Event
    from mlkit.registry.store import HeadSignature, ModelVersion, Registry

models = command_group("models", "Publish", "List, check, split traffic, delete, mirror.")
ModelArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION|RUN", help="Its number, or the run it was made from.")]
AliasOption = Annotated[str, typer.Option(help="Alias to move.")]
ReasonOption = Annotated[str, typer.Option(metavar="TEXT", help="Reason, for the audit log.")]
UriOption = Annotated[str, typer.Option(metavar="URI", help="MLflow's URI; by default MLFLOW_TRACKING_URI.")]


def _registry() -> "Registry":
    from mlkit.registry.store import Registry  # imported by the commands that need it

    return Registry()


def _version_record(version: "ModelVersion") -> dict[str, Any]:
    """A version as JSON can represent it."""
    record = {name: value for name, value in vars(version).items() if name not in ("files", "cells")}
    record |= {"reference": version.reference, "registered": version.registered.isoformat(), "path": str(version.path)}
    try:
        return record | {"metrics": version.metrics, "lineage": version.lineage()}
    except MlkitError:  # a damaged folder does not hide the other versions
        return record | {"metrics": {}, "lineage": {}}


def _print_done(sentence: str, next_command: str) -> None:
    """A sentence, the newest event of the audit log, and the command that usually follows."""
    last = _registry().events()[-1]
    print_line(f"{DONE} {escape(sentence)}")
    print_line(f"[dim]event {last.number} of the audit log, {last.digest[:16]}[/]\n")
    print_line(f"Next: [bold]{escape(next_command)}[/]")


def _print_version(version: "ModelVersion", as_json: bool, sentence: str, next_command: str) -> None:
    if as_json:
        print_json(_version_record(version))
    else:
        _print_done(sentence, next_command)


@app.command(
    "register",
    epilog="Example: mlkit register k3f9 --name churn --reason 'retrained on October'",
    rich_help_panel="Publish",
)
def register_run(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="Id, unique part of one, or 'latest'.")] = "latest",
    name: Annotated[str, typer.Option(help="Name of the model.")] = "",
    reason: ReasonOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Override a failed or missing gate or signature; it is recorded.")
    ] = False,
    authorities: AuthoritiesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register a gated, signed run as a version of a model."""
    from mlkit.registry.signing import TrustedAuthorities

    if not name:
        raise InputError("Name the model of which it becomes a version: --name NAME")
    run = RunStore().get(reference, having="saved_model")
    policy = TrustedAuthorities(authorities) if authorities else None
    version = _registry().register(run, name, reason, force, policy)
    signer = f"signed by {version.signer}" if version.signer else "without a trusted signature"
    sentence = f"{run.id} is {version.reference}, {signer}"
    _print_version(version, as_json, sentence, f"mlkit promote {name} {version.version}")
    for objection in () if as_json else version.overrides:
        print_line(f"\n[yellow]Overridden, and recorded in the audit log:[/] {escape(objection)}")


@app.command(epilog="Example: mlkit promote churn 3 --reason 'better on new users'", rich_help_panel="Publish")
def promote(
    name: ModelArgument,
    version: VersionArgument,
    alias: AliasOption = "champion",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; the champion is served."""
    promoted = _registry().promote(name, version, alias, reason)
    sentence = f"{name}@{alias} is version {promoted.version}"
    _print_version(promoted, as_json, sentence, f"mlkit models list {name}")


@app.command(
    epilog="Example: mlkit rollback churn --reason complaints; mlkit rollback churn --at '2026-11-20 18:00'",
    rich_help_panel="Publish",
)
def rollback(
    name: ModelArgument,
    to: Annotated[str | None, typer.Option(metavar="VERSION|RUN", help="Version; by default the previous one.")] = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="The version at that time (UTC).")] = None,
    alias: AliasOption = "champion",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Point an alias back to an earlier version."""
    version = _registry().rollback(name, to, _parse_time(at) if at else None, alias, reason)
    sentence = f"{name}@{alias} is version {version.version} again"
    _print_version(version, as_json, sentence, f"mlkit models log {name}")


def _parse_time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"--at takes a time as 2026-11-20 or '2026-11-20 18:00' (UTC). Received: {text!r}") from None


@models.command("remove-alias", epilog="Example: mlkit models remove-alias churn challenger")
def remove_alias(
    name: ModelArgument,
    alias: Annotated[str, typer.Argument(help="Alias to remove.")],
    reason: ReasonOption = "",
) -> None:
    """Remove an alias; the version stays."""
    _registry().remove_alias(name, alias, reason)
    _print_done(f"{name} has no alias {alias} any more", f"mlkit models list {name}")


@models.command(epilog="Example: mlkit models delete churn 1")
def delete(name: ModelArgument, version: VersionArgument, reason: ReasonOption = "") -> None:
    """Delete a version that has no alias, traffic or server."""
    number = _registry().delete(name, version, reason)
    _print_done(f"{name}/{number} was deleted", f"mlkit models list {name}")


@models.command(epilog="Example: mlkit models traffic churn; mlkit models traffic churn 3=90 4=10")
def traffic(
    name: ModelArgument,
    weights: Annotated[
        list[str] | None, typer.Argument(metavar="[VERSION=WEIGHT]...", help="New split; without it, it is shown.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Send all traffic to the champion.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show or set the traffic split between versions."""
    if weights and reset:
        raise InputError("Give weights or --reset, not both.")
    registry = _registry()
    if weights or reset:
        split = registry.split_traffic(
            name, parse_pairs(weights or [], "A traffic split is given as 3=90 4=10", float), reason
        )
    else:
        split = registry.state(name).traffic
    if as_json:
        print_json({"model": name, "traffic": split})
    elif weights or reset:
        _print_done(f"{name}: {_traffic_text(split)}", f"mlkit models list {name}")
    else:
        print_line(f"{name}: {_traffic_text(split)}")


def _traffic_text(split: dict[int, float]) -> str:
    return ", ".join(f"version {version} {share:.1%}" for version, share in split.items()) or "100 % to the champion"


@models.command("list", epilog="Example: mlkit models list churn; mlkit models list churn@champion --json")
def list_versions(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|NAME/VERSION|NAME@ALIAS]", help="A model or a version; all by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List versions with aliases, traffic, metrics and lineage."""
    from mlkit.registry.store import version_row

    registry = _registry()
    if name and re.search("[/@]", name):
        versions = [registry.find(name)]
    else:
        versions = [
            version for model in ([name] if name else registry.states()) for version in registry.versions(model)
        ]
    if as_json:
        print_json([_version_record(version) for version in versions])
        return
    if not versions:
        print_line(f"No versions in {registry.root}. Register one: mlkit register RUN --name NAME")
        return
    titles = ("version", "aliases", "traffic", "registered", "signed by", "run", "metrics")
    rows = [(version.reference, *version_row(version)) for version in versions]
    console.print(text_grid(titles, rows, right=("traffic",), whole=("version",)))
    if name:
        _print_lineage(versions[-1])


def _print_lineage(version: "ModelVersion") -> None:
    """The run, notebook cells, commit and data of a version."""
    lineage = _version_record(version)["lineage"]
    print_line(f"\n{version.reference} comes from the run {version.run}")
    rows = [
        ("notebook", lineage.get("notebook", "")),
        *((role, _cell_text(cell)) for role, cell in lineage.get("cells", {}).items()),
        ("commit", lineage.get("commit", "")),
        *(("data", _data_text(data)) for data in lineage.get("data", [])),
        ("gate", version.gate.get("reason", "") if version.gate else ""),
    ]
    for title, text in rows:
        if text:
            print_line(f"  {title:9} {escape(text)}")
    for objection in version.overrides:
        print_line(f"  [yellow]override[/]  {escape(objection)}")


def _cell_text(cell: dict[str, Any]) -> str:
    """A cell of the notebook in a line."""
    return f"by cell {cell['index']}, {cell['heading']}:  {cell['line']}"


def _data_text(data: dict[str, Any]) -> str:
    """A data set in a line."""
    return f"{data['name']}  {data['source']}  {str(data['fingerprint'])[:16]}"


@models.command(epilog="Example: mlkit models log churn")
def log(
    name: Annotated[str | None, typer.Argument(help="Name of a model; all by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the audit log; exit code 1 if it was tampered with."""
    events = _registry().events(name)
    if as_json:
        print_json([event.record() for event in events])
        return
    rows = [
        (
            str(event.number),
            f"{event.time:%Y-%m-%d %H:%M:%S}",
            event.user,
            _event_text(event),
            event.reason,
            event.digest[:12],
        )
        for event in events
    ]
    console.print(text_grid(("event", "time (UTC)", "user", "event", "reason", "digest"), rows, whole=("time (UTC)",)))


def _event_text(event: "Event") -> str:
    """An event in a few words."""
    payload = event.payload
    name, version, alias = payload["model"], payload.get("version"), payload.get("alias")
    before = f", was {payload['before']}" if payload.get("before") else ""
    match event.kind:
        case "registered":
            overrides = f", override: {'; '.join(payload['overrides'])}" if payload["overrides"] else ""
            return f"{name}/{version} registered from {payload['run']}{overrides}"
        case "promoted" | "rolled back" | "alias removed":
            return f"{name}@{alias} {event.kind}" + (f": {version}" if version else "") + before
        case "traffic split":
            shares = ", ".join(f"{number} {share:.0%}" for number, share in payload["traffic"].items())
            return f"{name}: traffic to {shares or 'the champion alone'}"
    return f"{name}/{version} {event.kind}"


@models.command(epilog="Example: mlkit models check --head 8c1f0e9a2b3d4f56")
def check(
    head: Annotated[
        str, typer.Option(metavar="DIGEST", help="Digest noted earlier; the audit log must still contain it.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Verify audit log and files; exit code 1 for a difference."""
    from mlkit.registry.store import read_head_signature

    registry = _registry()
    findings, signature = registry.check(head), read_head_signature(registry.log)
    if as_json:
        signed = {"signer": signature.signer, "signed_event": signature.number}
        print_json({"intact": not findings, "findings": findings} | signed)
    else:
        for finding in findings:
            print_line(f"{FAILED} {escape(finding)}")
        if not findings:
            versions = sum(len(state.versions) for state in registry.states().values())
            count = len(registry.events())
            console.print(f"{DONE} {count} events and {versions} versions are as they were written")
            if count:
                print_line(_signature_text(signature, count))
    raise typer.Exit(1 if findings else 0)


def _signature_text(signature: "HeadSignature", count: int) -> str:
    """Who signed the audit log, and how many events nobody has signed."""
    if not signature.number:
        return "The audit log is not signed: no signing key that needs no typed passphrase was used to change it"
    unsigned = f"; {count - signature.number} later events are not signed" if count > signature.number else ""
    return f"The audit log is signed by {escape(signature.signer)} up to event {signature.number}{unsigned}"


@models.command(epilog="Example: mlkit models config --base /models")
def config(
    base: Annotated[
        str, typer.Option(metavar="DIR", help="Print it for a server that sees the registry under this path.")
    ] = "",
) -> None:
    """Write or print models.config for tensorflow_model_server."""
    from mlkit.registry.tf_serving_config import models_config

    registry = _registry()
    if base:
        typer.echo(models_config(registry.states().values(), base.rstrip("/")), nl=False)
        return
    path = registry.write_config()
    print_line(f"{DONE} {escape(str(path))} follows from the audit log")


@models.command(epilog="Example: mlkit models push churn --uri sqlite:///mlflow.db")
def push(
    reference: Annotated[str | None, typer.Argument(metavar="[NAME|RUN]", help="By default all models.")] = None,
    uri: UriOption = "",
    as_json: JsonOption = False,
) -> None:
    """Mirror models or a run to MLflow."""
    from mlkit.registry.mlflow import ModelMirror

    registry, mirror = _registry(), ModelMirror(uri)
    names = list(registry.states())
    if reference and reference not in names:
        run = RunStore().get(reference)
        number = mirror.push_run(run)
        print_json({"run": run.id, "mlflow": number}) if as_json else console.print(f"{run.id} is {number} in MLflow")
        return
    pushed = [
        version for name in ([reference] if reference else names) for version in mirror.push_model(registry, name)
    ]
    if as_json:
        print_json([vars(version) for version in pushed])
        return
    rows = [(v.reference, str(v.number), ", ".join(v.aliases), "new" if v.new else "") for v in pushed]
    console.print(text_grid(("version", "in MLflow", "aliases", ""), rows, right=("in MLflow",)))


@models.command(epilog="Example: mlkit models pull churn@champion")
def pull(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS|NAME/VERSION", help="As MLflow has it.")],
    uri: UriOption = "",
    as_json: JsonOption = False,
) -> None:
    """Download a model registered in MLflow as a run."""
    from mlkit.registry.mlflow import ModelMirror

    run = ModelMirror(uri).pull_model(reference, RunStore())
    if as_json:
        print_json({"run": run.id, "path": str(run.folder)})
        return
    name = re.split("[@/]", reference)[0]
    print_line(f"{DONE} {reference} is the run {run.id}\n")
    print_line(f"Next: [bold]mlkit register {run.id} --name {name}[/]")
