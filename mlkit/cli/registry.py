"""`mlkit register`, `promote`, `rollback`, `models`: put a run to use, move what is in service, see who did it and why."""

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.markup import escape
from typer.core import TyperGroup

from mlkit.cli.console import JsonOption, console, print_json, text_grid
from mlkit.errors import InputError, MlkitError
from mlkit.runs.run import RunStore

if TYPE_CHECKING:
    from mlkit.registry.audit_log import Event
    from mlkit.registry.store import ModelVersion, Registry

registry = typer.Typer(rich_markup_mode=None)
ModelArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION|RUN", help="Its number, or the run it was made from.")]
AliasOption = Annotated[str, typer.Option(help="The alias that moves.")]
WhyOption = Annotated[str, typer.Option(metavar="TEXT", help="The reason, for the ledger.")]


def _registry() -> "Registry":
    from mlkit.registry.store import Registry  # not before a command needs it

    return Registry()


def _version_record(version: "ModelVersion") -> dict[str, Any]:
    """A version as JSON can hold it."""
    told = {name: value for name, value in vars(version).items() if name not in ("files", "cells")}
    told |= {"reference": version.reference, "registered": version.registered.isoformat(), "path": str(version.path)}
    try:
        return told | {"metrics": version.metrics, "lineage": version.lineage()}
    except MlkitError:  # its folder has been damaged, which does not hide the others
        return told | {"metrics": {}, "lineage": {}}


def _print_done(done: str, following: str) -> None:
    """What was done, the head of the ledger for whoever notes it, and what one may want next."""
    last = _registry().events()[-1]
    console.print(f"[green]●[/] {escape(done)}", soft_wrap=True)
    console.print(f"[dim]event {last.number} of the ledger, {last.digest[:16]}[/]\n", soft_wrap=True)
    console.print(f"Next: [bold]{escape(following)}[/]", soft_wrap=True)


@registry.command(epilog="Example: mlkit register k3f9 --name churn --why 'retrained on October'")
def register(
    reference: Annotated[str, typer.Argument(metavar="RUN", help="Id, unique part of one, or 'latest'.")] = "latest",
    name: Annotated[str, typer.Option(help="Name of the model it becomes a version of.")] = "",
    why: WhyOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Also when it has not passed its gate or is not signed.")
    ] = False,
    authorities: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Certificates of authorities (PEM), for a signature by certificate."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run a version of a model: copied, verified, numbered. Exit code 1 when gate or signature are missing."""
    from mlkit.registry.signing import TrustedAuthorities

    if not name:
        raise InputError("Say which model it becomes a version of: --name NAME")
    run = RunStore().get(reference, having="saved_model")
    trust = TrustedAuthorities(authorities) if authorities else None
    version = _registry().register(run, name, why, force, trust)
    if as_json:
        print_json(_version_record(version))
        return
    vouched = f"signed by {version.signer}" if version.signer else "signed by nobody who is trusted"
    _print_done(f"{run.id} is {version.reference}, {vouched}", f"mlkit promote {name} {version.version}")
    for objection in version.forced:
        console.print(f"\n[yellow]It was forced, and the ledger says so:[/] {escape(objection)}", soft_wrap=True)


@registry.command(epilog="Example: mlkit promote churn 3 --why 'better on new users'")
def promote(
    name: ModelArgument,
    version: VersionArgument,
    alias: AliasOption = "champion",
    why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; by default champion, which is what is served."""
    found = _registry().promote(name, version, alias, why)
    if as_json:
        print_json(_version_record(found))
        return
    _print_done(f"{name}@{alias} is version {found.version}", f"mlkit models {name}")


@registry.command(
    epilog="Example: mlkit rollback churn --why 'complaints'; mlkit rollback churn --at '2026-11-20 18:00'"
)
def rollback(
    name: ModelArgument,
    to: Annotated[str | None, typer.Option(metavar="VERSION|RUN", help="Where to; by default one step back.")] = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="To where it was at that time (UTC).")] = None,
    alias: AliasOption = "champion",
    why: WhyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Point an alias back: one step, to a version, or to where it was at a time."""
    found = _registry().rollback(name, to, _time(at) if at else None, alias, why)
    if as_json:
        print_json(_version_record(found))
        return
    _print_done(f"{name}@{alias} is version {found.version} again", f"mlkit models log {name}")


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"A time is given as 2026-11-20 or '2026-11-20 18:00' (UTC). Received: {text!r}") from None


@registry.command(epilog="Example: mlkit demote churn challenger")
def demote(
    name: ModelArgument,
    alias: Annotated[str, typer.Argument(help="The alias that goes.")],
    why: WhyOption = "",
) -> None:
    """Take an alias away; the version stays."""
    _registry().demote(name, alias, why)
    _print_done(f"{name} has no {alias} any more", f"mlkit models {name}")


@registry.command(epilog="Example: mlkit retire churn 1")
def retire(name: ModelArgument, version: VersionArgument, why: WhyOption = "") -> None:
    """Delete a version that has no alias, no traffic, and that nobody serves; its number is not given out again."""
    number = _registry().retire(name, version, why)
    _print_done(f"{name}/{number} was retired", f"mlkit models {name}")


@registry.command(epilog="Example: mlkit traffic churn 3=90 4=10; mlkit traffic churn")
def traffic(
    name: ModelArgument,
    weights: Annotated[list[str] | None, typer.Argument(metavar="VERSION=WEIGHT...")] = None,
    why: WhyOption = "",
) -> None:
    """Divide traffic between versions; without weights it goes to the champion alone again."""
    pairs = [text.partition("=") for text in weights or []]
    try:
        given = {version: float(weight) for version, _, weight in pairs}
    except ValueError:
        raise InputError(f"Traffic is divided as in: 3=90 4=10. Received: {' '.join(weights or [])}") from None
    shares = _registry().divide_traffic(name, given, why)
    told = ", ".join(f"version {version} {share:.1%}" for version, share in shares.items()) or "the champion alone"
    _print_done(f"{name} is answered by {told}", f"mlkit models {name}")


class _TableByDefault(TyperGroup):
    """`mlkit models churn` means `mlkit models show churn`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        first = next(iter(arguments), "")
        if first not in self.commands and first not in ("-h", "--help"):
            arguments = ["show", *arguments]
        return super().parse_args(context, arguments)


models = typer.Typer(
    cls=_TableByDefault,
    rich_markup_mode=None,
    help="Show model versions; their history (log), whether all is as it was registered (check).",
    epilog="Example: mlkit models; mlkit models churn; mlkit models log churn",
)
registry.add_typer(models, name="models")


@models.command(epilog="Example: mlkit models churn/3; mlkit models churn@champion; mlkit models churn --json")
def show(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|NAME/VERSION|NAME@ALIAS]", help="A model or a version; all by default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions with their aliases, traffic, metrics, and where they come from: run, notebook cell, data."""
    from mlkit.registry.store import version_row

    kept = _registry()
    if name and re.search("[/@]", name):
        versions = [kept.find(name)]
    else:
        versions = [version for each in ([name] if name else kept.states()) for version in kept.versions(each)]
    if as_json:
        print_json([_version_record(version) for version in versions])
        return
    if not versions:
        console.print(f"No versions in {kept.root}. Register one: mlkit register RUN --name NAME", soft_wrap=True)
        return
    titles = ("version", "aliases", "traffic", "registered", "signed by", "run", "metrics")
    rows = [(version.reference, *version_row(version)) for version in versions]
    console.print(text_grid(titles, rows, right=("traffic",), whole=("version",)))
    if name:
        _print_lineage(versions[-1])


def _print_lineage(version: "ModelVersion") -> None:
    """Where a version comes from."""
    told = _version_record(version)["lineage"]
    console.print(f"\n{version.reference} comes from the run {version.run}", soft_wrap=True)
    rows = [("notebook", told.get("notebook", ""))]
    rows += [(what, _cell_told(cell)) for what, cell in told.get("cells", {}).items()]
    rows += [("commit", told.get("commit", ""))]
    rows += [
        ("data", f"{each['name']}  {each['source']}  {str(each['fingerprint'])[:16]}") for each in told.get("data", [])
    ]
    for word, text in rows:
        if text:
            console.print(f"  {word:9} {escape(text)}", soft_wrap=True)
    if version.gate:
        console.print(f"  gate      {escape(version.gate.get('reason', ''))}", soft_wrap=True)
    for objection in version.forced:
        console.print(f"  [yellow]forced[/]    {escape(objection)}", soft_wrap=True)


def _cell_told(cell: dict[str, Any]) -> str:
    """A cell of the notebook in a line."""
    return f"by cell {cell['index']}, {cell['heading']}:  {cell['line']}"


@models.command(epilog="Example: mlkit models log churn")
def log(
    name: Annotated[str | None, typer.Argument(help="Name of a model; all by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was done, by whom and why; the exit code is 1 where the ledger was tampered with."""
    events = _registry().events(name)
    if as_json:
        print_json([event.record() for event in events])
        return
    rows = [
        (str(event.number), f"{event.time:%Y-%m-%d %H:%M:%S}", event.who, _told(event), event.why, event.digest[:12])
        for event in events
    ]
    console.print(text_grid(("event", "time (UTC)", "who", "what", "why", "digest"), rows, whole=("time (UTC)",)))


def _told(event: "Event") -> str:
    """An event in a few words."""
    facts = event.facts
    name, version, alias = facts["model"], facts.get("version"), facts.get("alias")
    before = f", was {facts['before']}" if facts.get("before") else ""
    match event.what:
        case "registered":
            forced = f", forced: {'; '.join(facts['forced'])}" if facts["forced"] else ""
            return f"{name}/{version} registered from {facts['run']}{forced}"
        case "promoted" | "rolled back" | "demoted":
            return f"{name}@{alias} {event.what}" + (f": {version}" if version else "") + before
        case "divided":
            shares = ", ".join(f"{number} {share:.0%}" for number, share in facts["traffic"].items())
            return f"{name}: traffic to {shares or 'the champion alone'}"
    return f"{name}/{version} {event.what}"


@models.command(epilog="Example: mlkit models check --head 8c1f0e9a2b3d4f56")
def check(
    head: Annotated[
        str, typer.Option(metavar="DIGEST", help="Of an event that was noted earlier: is the ledger still that one?")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Prove the ledger and every file of every version. The exit code is 1 where something is not as it was."""
    kept = _registry()
    findings = kept.check(head)
    if as_json:
        print_json({"whole": not findings, "findings": findings})
    else:
        for finding in findings:
            console.print(f"[red]●[/] {escape(finding)}", soft_wrap=True)
        if not findings:
            versions = sum(len(state.versions) for state in kept.states().values())
            console.print(f"[green]●[/] {len(kept.events())} events and {versions} versions are as they were written")
    raise typer.Exit(1 if findings else 0)


@models.command(epilog="Example: mlkit models config --base /models")
def config(
    base: Annotated[
        str, typer.Option(metavar="DIR", help="Print it for a server that sees the registry under this path.")
    ] = "",
) -> None:
    """Write models.config for tensorflow_model_server from the ledger, or print it for another place."""
    from mlkit.registry.tf_serving_config import models_config

    kept = _registry()
    if base:
        typer.echo(models_config(kept.states().values(), base.rstrip("/")), nl=False)
        return
    path = kept.write_config()
    console.print(f"[green]●[/] {escape(str(path))} is what the ledger says", soft_wrap=True)


mirror = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Mirror runs and models into MLflow, and back.")
registry.add_typer(mirror, name="mlflow")
UriOption = Annotated[
    str, typer.Option(metavar="URI", help="Where MLflow is; by default the variable MLFLOW_TRACKING_URI.")
]


@mirror.command(epilog="Example: mlkit mlflow push churn --uri sqlite:///mlflow.db")
def push(
    reference: Annotated[str | None, typer.Argument(metavar="[NAME|RUN]", help="By default all models.")] = None,
    uri: UriOption = "",
    as_json: JsonOption = False,
) -> None:
    """Mirror models with their versions, aliases and runs, or one run."""
    from mlkit.registry.mlflow import ModelPull

    kept, there = _registry(), ModelPull(uri)
    names = list(kept.states())
    if reference and reference not in names:
        run = RunStore().get(reference)
        made = there.push_run(run)
        print_json({"run": run.id, "mlflow": made}) if as_json else console.print(f"{run.id} is {made} in MLflow")
        return
    done = [each for name in ([reference] if reference else names) for each in there.push_model(kept, name)]
    if as_json:
        print_json([vars(each) for each in done])
        return
    rows = [(each.reference, str(each.number), ", ".join(each.aliases), "new" if each.new else "") for each in done]
    console.print(text_grid(("version", "in MLflow", "aliases", ""), rows, right=("in MLflow",)))


@mirror.command(epilog="Example: mlkit mlflow pull churn@champion")
def pull(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS|NAME/VERSION", help="As MLflow has it.")],
    uri: UriOption = "",
    as_json: JsonOption = False,
) -> None:
    """Bring a model that is registered in MLflow into the archive, as a run."""
    from mlkit.registry.mlflow import ModelPull

    run = ModelPull(uri).pull_model(reference, RunStore())
    if as_json:
        print_json({"run": run.id, "path": str(run.folder)})
        return
    name = re.split("[@/]", reference)[0]
    console.print(f"[green]●[/] {reference} is the run {run.id}\n", soft_wrap=True)
    console.print(f"Next: [bold]mlkit register {run.id} --name {name}[/]", soft_wrap=True)
