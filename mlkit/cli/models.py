"""What is done with a model between training and service: measure it, judge it, convert it, compare its forms, sign it, and check what others have signed."""

import dataclasses
import getpass
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mlkit._display import format_number
from mlkit.cli.console import JsonOption, RunArgument, console, errors, print_json, text_grid, watched
from mlkit.config import load_settings
from mlkit.errors import InputError, MlkitError, NotFoundError, SignatureError
from mlkit.runs.run import Run, RunStore

if TYPE_CHECKING:
    from mlkit.registry.signing import Signature, Signer, TrustPolicy

models = typer.Typer(rich_markup_mode=None)
keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make and list keys that sign models.")
models.add_typer(keys, name="keys")
FolderArgument = Annotated[
    str, typer.Argument(metavar="RUN|DIR", help="A run (id, part of one, 'latest' with a model), or any folder.")
]


def _folder(reference: str) -> Path:
    """The folder that is meant: one by its path, or a run's."""
    if Path(reference).is_dir():
        return Path(reference)
    if "/" in reference:
        raise NotFoundError(f"There is no folder {reference}.")
    latest = reference == "latest"  # of those with a model: `mlkit gate` has left a run of its own behind it
    return RunStore().get(reference, having="saved_model" if latest else "").folder


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return "me"


def _ask_passphrase(prompt: str, confirm: bool = False) -> str:
    """Ask the person at the terminal; raises InputError when there is none."""
    if not sys.stdin.isatty():
        raise InputError(
            "The key's passphrase is needed, and nobody is here to type it. Say where it is, for example: "
            "mlkit --set signing.passphrase=env:NAME ..."
        )
    return typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)


@keys.command("new", epilog="Example: mlkit keys new alice --passphrase")
def new_keys(
    name: Annotated[str | None, typer.Argument(help="Who signs with it; by default the name of this login.")] = None,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Encrypt the private key; asks for one.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a pair of keys: a private one that signs, and a public one that proves."""
    from mlkit.registry.signing import new_key, read_passphrase

    name, signing = name or _own_name(), load_settings().signing
    if not NAME.fullmatch(name):
        raise InputError(f"A key's name has letters, digits, and . _ @ - in it. Received: {name!r}")
    if signing.key.exists():
        raise InputError(
            f"You have a private key: {signing.key}. A key is never overwritten; "
            "for another one say where: mlkit --set signing.key=FILE keys new"
        )
    secret = read_passphrase(signing.passphrase) or (_ask_passphrase("Passphrase", True) if passphrase else None)
    public = new_key(signing.key, signing.trusted / f"{name}.pub", secret)
    if as_json:
        print_json(_described(public) | {"private": str(signing.key), "passphrase": bool(secret)})
        return
    rows = [
        ("private key", str(signing.key), "keep it: it signs in your name"),
        ("public key", str(public.path), "give it away: it proves your signatures"),
    ]
    console.print(text_grid(("", "file", ""), rows))
    console.print(f"\n{escape(name)} signs with the key {public.fingerprint[:16]}. Next: [bold]mlkit sign latest[/]")


def _described(key: Any) -> dict[str, str]:
    return {"name": key.name, "fingerprint": key.fingerprint, "path": str(key.path)}


@keys.command("show", epilog="Example: mlkit keys show --json")
def show_keys(as_json: JsonOption = False) -> None:
    """Show whether there is a key to sign with, and whose signatures are accepted."""
    from mlkit.registry.signing import read_public_keys

    signing = load_settings().signing
    trusted, state = read_public_keys(signing.trusted), _state(signing.key)
    if as_json:
        private = {"path": str(signing.key), "state": state}
        print_json({"private": private, "trusted": [_described(key) for key in trusted]})
        return
    console.print(f"private key  {escape(str(signing.key))}: {escape(state)}\n", soft_wrap=True)
    if trusted:
        rows = [(key.name, key.fingerprint[:16], str(key.path)) for key in trusted]
        console.print(text_grid(("trusted", "key", "file"), rows, whole=("trusted", "key")))
    else:
        console.print(f"No public keys in {signing.trusted}. Make some: mlkit keys new", soft_wrap=True)


def _state(path: Path) -> str:
    """What can be said of a private key."""
    from mlkit.registry.signing import has_passphrase

    if not path.exists():
        return "not there"
    try:
        return "ready, with a passphrase" if has_passphrase(path) else "ready"
    except MlkitError as error:
        return str(error)


def _signer(key: Path | None, certificate: Path | None, sigstore: bool) -> "Signer":
    """Who signs, from the options of the command."""
    from mlkit.registry.signing import CertificateSigner, KeySigner, SigstoreSigner, has_passphrase, read_passphrase

    if sigstore:
        if key or certificate:
            raise InputError("Sigstore signs with an identity: leave out --key and --certificate.")
        return SigstoreSigner()
    signing = load_settings().signing
    key = key or signing.key
    if certificate:
        return CertificateSigner(key, certificate)
    if not has_passphrase(key):
        return KeySigner(key)
    return KeySigner(key, read_passphrase(signing.passphrase) or _ask_passphrase(f"Passphrase of {key}"))


def _print_signature(signature: "Signature", done: str = "") -> None:
    """Whose it is, and what it binds."""
    console.print(f"[green]●[/] {escape(signature.folder.name)} {done}{escape(signature.summary)}\n", soft_wrap=True)
    titles = ("bound", "files", "bytes")
    console.print(text_grid(titles, signature.rows(), right=titles[1:]))


@models.command(epilog="Example: mlkit sign k3f9")
def sign(
    reference: FolderArgument = "latest",
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key; by default signing.key.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate of the key, and those up to the authority (PEM).")
    ] = None,
    sigstore: Annotated[bool, typer.Option("--sigstore", help="Sign with a login, by Sigstore's servers.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Sign anew what is signed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign all that leaves with a run: model, conversions, card, notebook, statistics, schema, evaluation, gate."""
    from mlkit.registry.signing import read_public_keys, sign_folder

    signature = sign_folder(_folder(reference), _signer(key, certificate, sigstore), replace)
    trusted = load_settings().signing.trusted
    names = {key.fingerprint: key.name for key in read_public_keys(trusted)}
    signature = dataclasses.replace(signature, signer=signature.signer or names.get(signature.fingerprint, ""))
    if as_json:
        print_json(signature.record())
        return
    _print_signature(signature)
    if signature.method == "key" and not signature.signer:
        console.print(f"\nNobody trusts this key here yet: its public half is not in {trusted}.", soft_wrap=True)
    console.print(f"\nTo check it, here or in a copy: [bold]mlkit verify {escape(reference)}[/]", soft_wrap=True)


def _signed_folder(reference: str) -> Path:
    """What is to be verified: a run, a folder, or a version in the registry (churn/3, churn@champion)."""
    if Path(reference).is_dir() or not re.fullmatch(r"[^/@]+(/\d+|@\w+)", reference):
        return _folder(reference)
    from mlkit.registry.store import Registry

    return Registry().find(reference).path


def _trust(key: Path | None, authorities: Path | None, identity: str | None, issuer: str | None) -> "TrustPolicy":
    """Whose signature counts, from the options of the command."""
    from mlkit.registry.signing import (
        TrustedAuthorities,
        TrustedIdentity,
        TrustedKeys,
        read_public_key,
        read_public_keys,
    )

    if (identity is None) != (issuer is None):
        raise InputError("Sigstore needs both: --identity, who has signed, and --issuer, who has logged them in.")
    if sum(value is not None for value in (key, authorities, identity)) > 1:
        raise InputError("Give one of --key, --authorities and --identity: whose signature counts.")
    if authorities:
        return TrustedAuthorities(authorities)
    if identity and issuer:
        return TrustedIdentity(identity, issuer)
    if key:
        return TrustedKeys((read_public_key(key),))
    folder = load_settings().signing.trusted
    found = read_public_keys(folder)
    if not found:
        raise InputError(f"No signature counts yet: {folder} holds no public key (*.pub). Put one there, or use --key.")
    return TrustedKeys(tuple(found))


@models.command(epilog="Example: mlkit verify k3f9 --key keys/alice.pub")
def verify(
    reference: FolderArgument = "latest",
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public key; by default all in signing.trusted.")
    ] = None,
    authorities: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Certificates of authorities (PEM), for a signature by certificate."),
    ] = None,
    identity: Annotated[str | None, typer.Option(help="Who has signed through Sigstore, as alice@example.com.")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="Who has confirmed that identity.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a signed run, or a copy of one. The exit code is 1 where anything is not as it was signed."""
    from mlkit.registry.signing import verify_folder

    folder, trust = _signed_folder(reference), _trust(key, authorities, identity, issuer)
    try:
        signature = verify_folder(folder, trust)
    except SignatureError as error:
        if as_json:
            told = {"verified": False, "folder": str(folder.absolute())}
            print_json(told | {"error": str(error), "findings": error.findings})
        raise
    if as_json:
        print_json({"verified": True} | signature.record())
        return
    _print_signature(signature, "verified: ")


KindOption = Annotated[
    str, typer.Option(metavar="KIND", help="savedmodel, or a conversion: float32, float16, int8, ...")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model in service, asked the same rows: a run, NAME@alias, or a folder."),
]
MEASURE_OF_ROWS = {"binary": "log_loss", "multiclass": "log_loss", "regression": "mean_absolute_error"}
MOST_SHOWN = 10  # slices


@models.command(epilog="Example: mlkit evaluate latest --slice device --slice device,age --group city_tier")
def evaluate(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, NAME@alias, NAME/3, or a folder with a model.")
    ] = "latest",
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="New data; by default the model's own test rows.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the new data that holds the truth.")] = None,
    slices: Annotated[
        list[str], typer.Option("--slice", metavar="COLUMN[,COLUMN]", help="Measure its values, or pairs of values.")
    ] = [],  # noqa: B006
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="Groups that should be treated alike.")] = None,
    lists: Annotated[
        str | None, typer.Option("--list", metavar="COLUMN", help="Rows with the same value are one ranked list.")
    ] = None,
    kind: KindOption = "savedmodel",
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Read Parquet larger than memory piece by piece.")
    ] = False,
    rules: Annotated[Path | None, typer.Option("--gate", metavar="FILE", help="Rules that it has to pass.")] = None,
    against: AgainstOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on any data, by slices and groups, with intervals. Exit code 1 when a gate refuses it."""
    from mlkit.jobs.executor import run_job
    from mlkit.registry.gate import read_rules
    from mlkit.registry.resolve import resolve_model

    given = {"run": resolve_model(reference, kind).reference, "kind": kind, "dataset": data, "label": label}
    given |= {"slices": [each.split(",") if "," in each else each for each in slices], "groups": group, "lists": lists}
    given |= {"streamed": streamed, "against": resolve_model(against).reference if against else None}
    if rules:
        read_rules(rules)
        given["gate"] = str(rules)
    with watched(as_json) as watch:
        run = run_job("evaluate", {name: value for name, value in given.items() if value is not None}, watch=watch)
    report = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    verdict = json.loads((run.folder / "gate.json").read_text(encoding="utf-8")) if rules else None
    if as_json:
        print_json(report | ({"gate": verdict} if verdict else {}))
    else:
        _print_report(run, report)
        if verdict:
            _print_checks(verdict)
    if verdict and not verdict["passed"]:
        raise typer.Exit(1)


def _print_report(run: Run, report: dict[str, Any]) -> None:
    """What an evaluation has found, as tables."""
    for label, found in report["labels"].items():
        console.print(f"\n[bold]{escape(label)}[/] ({found['task']}), {found['rows']:,} rows\n")
        _print_grid("measure", [(name.replace("_", " "), *_interval(one)) for name, one in _measures(found).items()])
        _print_slices(found)
        if found["disparities"]:
            told = [
                (each["measure"].replace("_", " "), *_interval(each), f"{each['highest']} over {each['lowest']}")
                for each in found["disparities"]
            ]
            _print_grid("between groups", told, "")
    known = report["run"] if "/" not in report["run"] else Path(report["run"]).name
    console.print(
        f"\n{escape(known)} was measured in {run.id}. The report: [bold]mlkit open {run.id[-4:]}[/]", soft_wrap=True
    )


def _print_slices(found: dict[str, Any]) -> None:
    """The worst of the slices that were named, and those that nobody has named."""
    name = MEASURE_OF_ROWS[found["task"]]
    measured = [each for each in found["slices"] if name in each["measures"]]
    worst = sorted(measured, key=lambda each: -each["measures"][name]["value"])[:MOST_SHOWN]
    if worst:
        told = [
            (each["slice"] + (" (uncertain)" if each["uncertain"] else ""), *_interval(each["measures"][name]))
            for each in worst
        ]
        _print_grid(f"worst slices by {name.replace('_', ' ')}", told)
    if found["weak_slices"]:
        told = [
            (each["name"], format_number(each["loss"]), format_number(each["others"]), f"{each['rows']:,}")
            for each in found["weak_slices"]
        ]
        console.print(
            text_grid(("found to be worse", "loss", "of others", "rows"), told, right=("loss", "of others", "rows"))
        )
        console.print()


def _measures(found: dict[str, Any]) -> dict[str, Any]:
    return found["measures"] | found["ranking"]


def _interval(found: dict[str, float | None]) -> tuple[str, str, str]:
    numbers = (found[name] for name in ("value", "low", "high"))
    return tuple("" if number is None else format_number(number) for number in numbers)


def _print_grid(title: str, rows: list[tuple[str, ...]], *more: str) -> None:
    numbers = ("value", "from", "to")
    console.print(text_grid((title, *numbers, *more), rows, right=numbers))
    console.print()


@models.command(epilog="Example: mlkit gate latest --against churn@champion")
def gate(
    reference: RunArgument = "latest",
    against: AgainstOption = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of rules; by default gate.rules.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge whether a run's model may go into service; what has not been measured is measured now."""
    from mlkit.registry.gate import run_gate, read_rules, read_verdict
    from mlkit.registry.resolve import resolve_model

    archive = RunStore()
    run = archive.get(reference, having="saved_model")
    champion = resolve_model(against, archive=archive) if against else None
    wanted = read_rules(rules or load_settings().gate.rules)
    with watched(as_json) as watch:
        passed = run_gate(run, wanted, champion, archive, watch=watch).passed
    verdict = read_verdict(run)
    if as_json:
        print_json(verdict)
    else:
        _print_checks(verdict)
        if passed:
            console.print(f"\nNext: [bold]mlkit sign {run.id[-4:]}[/]")
    if not passed:
        raise typer.Exit(1)


def _print_checks(verdict: dict[str, Any]) -> None:
    """What was asked, and what was found."""
    marks = {True: "[green]passed[/]", False: "[red]failed[/]"}
    rows = [(marks[check["passed"]], check["rule"], check["found"]) for check in verdict["checks"]]
    console.print(text_grid(("verdict", "asked", "found"), rows, whole=("verdict",), markup=("verdict",)))
    console.print(f"\n{escape(verdict['run'])}: {escape(verdict['reason'])}", soft_wrap=True)


def _print_exports(run: Run, found: list[Any]) -> None:
    """What was made, with sizes, and then why some were not."""
    from mlkit.export.formats import find_format

    colours = {"made": "green", "kept": "dim", "failed": "red"}
    litert = find_format(run.folder, "litert")
    rows = []
    for each in found:
        form, of_float32 = each.form, ""
        if form and litert and each.name.startswith("litert-"):
            of_float32 = f"{form.bytes / litert.bytes:.0%}"
        shown = (str(len(form.files)), f"{form.bytes:,}") if form else ("", "")
        place = str(form.path.relative_to(run.folder)) if form else ""
        rows.append((each.name, f"[{colours[each.state]}]{each.state}[/]", *shown, of_float32, place))
    titles = ("target", "", "files", "bytes", "of float32", "in the run")
    console.print(text_grid(titles, rows, right=titles[2:5], whole=titles[:1], markup=("",)))
    for each in found:
        if each.reason:
            console.print(f"\n[red]{each.name}[/] {escape(each.reason)}", soft_wrap=True)


@models.command(epilog="Example: mlkit export k3f9 --to litert-int8,litertjs")
def export(
    reference: RunArgument = "latest",
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMS",
            help="Of savedmodel, litert, litert-float16, litert-int8, litert-full-int8, litert-int4, "
            "litertjs (a page to try it), tfjs.",
        ),
    ] = "savedmodel,litert,litert-int8",
    replace: Annotated[bool, typer.Option("--replace", help="Make anew what is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a run's model to other forms, beside its SavedModel, and write its card."""
    from mlkit.export.convert import export_run, read_targets

    targets, run = read_targets(to), RunStore().get(reference, having="saved_model")
    with errors.status("...") as status:
        found = export_run(run, targets, replace, watch=lambda name: status.update(f"making {name}"))
    if as_json:
        card = str(run.folder / "model_card.md")
        print_json({"run": run.id, "card": card, "targets": [each.record() for each in found]})
    else:
        _print_exports(run, found)
        console.print(f"\nIts card: {escape(str(run.folder / 'model_card.md'))}", soft_wrap=True)
        console.print(f"Do all of them answer alike? [bold]mlkit parity {escape(run.id)}[/]", soft_wrap=True)
    if any(each.state == "failed" for each in found):
        raise typer.Exit(1)


def _read_tolerances(given: list[str]) -> dict[str, float]:
    """Tolerances from TARGET=NUMBER; raises InputError for anything else."""
    found = {}
    for text in given:
        target, _, number = text.partition("=")
        try:
            found[target] = float(number)
        except ValueError:
            raise InputError(f"A tolerance is given as litert-int8=0.02. Received: {text!r}") from None
    return found


@models.command(epilog="Example: mlkit parity k3f9 --tolerance litert-int8=0.02")
def parity(
    reference: RunArgument = "latest",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only this form, as litert-int8; may be repeated. By default all there are."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET=X", help="The largest difference that is allowed; the mean may be a tenth."),
    ] = None,
    server: Annotated[str, typer.Option(metavar="URL", help="A server, as http://HOST:8501/v1/models/NAME.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Replay the golden requests against every form of a run's model; exit code 1 when one answers differently."""
    from mlkit.export.parity import COLUMNS, check_parity

    tolerances = _read_tolerances(tolerance or [])
    run = RunStore().get(reference, having="saved_model")
    found = check_parity(run, target or (), tolerances, server)
    if as_json:
        print_json(found.record())
    else:
        right, whole = ("largest", "mean", "allowed", "same class"), COLUMNS[:-1]
        console.print(text_grid(COLUMNS, found.rows(), right=right, whole=whole))
        console.print(f"\n{run.id}: {escape(found.reason)}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)
    if not as_json:
        console.print(f"Next: [bold]mlkit gate {run.id}[/]", soft_wrap=True)


@models.command(epilog="Example: mlkit compress k3f9 --method prune --method int8 --sparsity 0.9")
def compress(
    reference: RunArgument = "latest",
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="How; may be repeated; by default all.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights that prune sets to zero.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs of a model that is trained on.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="NAME", help="Method whose model the new run keeps.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run's model smaller in several ways, and compare them: size, time, measures, worst part of the rows."""
    from mlkit.export.compression_report import METHODS, check_kept, check_methods, read_variants
    from mlkit.jobs.executor import run_job

    chosen = check_methods(methods or list(METHODS))
    check_kept(keep, chosen)
    run = RunStore().get(reference, having="saved_model")
    given = {"sparsity": sparsity, "epochs": epochs, "keep": keep}
    given = {name: value for name, value in given.items() if value is not None}
    with watched(as_json) as watch:
        made = run_job("compress", {"run": run.id, "methods": chosen, **given}, watch=watch)
    variants = read_variants(made)
    if as_json:
        print_json({"run": made.id, **variants.record()})
        return
    _print_variants(made, variants)


def _print_variants(run: Run, variants: Any) -> None:
    """A line for each variant, and where to go on."""
    titles = variants.titles()
    console.print(text_grid(titles, variants.lines(), right=titles[2:8], whole=titles[:2]))
    console.print(f"\n{run.id}: {variants.rows:,} test rows. The picture: {run.folder / 'plots' / 'variants.png'}",
                  soft_wrap=True)  # fmt: skip
    following = "gate" if variants.kept else "open"
    console.print(f"Next: [bold]mlkit {following} {run.id[-4:]}[/]")
