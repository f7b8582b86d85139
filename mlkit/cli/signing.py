"""`mlkit sign`, `verify`, `keys`: sign what a run releases, and verify the signatures of others."""

import dataclasses
import getpass
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from mlkit.cli.app import app, command_group
from mlkit.cli.console import DONE, JsonOption, console, print_json, print_line, text_grid
from mlkit.config import load_settings
from mlkit.errors import InputError, MlkitError, NotFoundError, SignatureError
from mlkit.runs.record import RUN_FILE
from mlkit.runs.run import find_model_version
from mlkit.runs.store import RunStore

if TYPE_CHECKING:
    from mlkit.registry.signing import Signature, Signer, TrustPolicy

keys = command_group("keys", "Publish", "Generate and list keys that sign models.")
FolderArgument = Annotated[
    str, typer.Argument(metavar="RUN|DIR", help="A run (id, part of one, 'latest' with a model), or any folder.")
]
AuthoritiesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Certificate authorities (PEM), for a signature by certificate.")
]
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")


def _find_folder(reference: str) -> Path:
    """A folder by its path, or a run's folder."""
    if Path(reference).is_dir():
        return Path(reference)
    if "/" in reference:
        raise NotFoundError(f"There is no folder {reference}.")
    latest = reference == "latest"  # the latest with a model: `mlkit gate` may have archived a later run
    return RunStore().get(reference, having="saved_model" if latest else "").folder


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return "me"


def _prompt_passphrase(prompt: str, confirm: bool = False) -> str:
    """Passphrase typed at the terminal; raises InputError when there is none."""
    if not sys.stdin.isatty():
        raise InputError(
            "The key's passphrase is needed, and there is no terminal to type it on. Say where it is, for example: "
            "mlkit --set signing.passphrase=env:NAME ..."
        )
    return typer.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True)


@keys.command(epilog="Example: mlkit keys generate alice --passphrase")
def generate(
    name: Annotated[str | None, typer.Argument(help="Signer's name; by default the login.")] = None,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Encrypt the private key; asks for one.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate a key pair for signing and verification."""
    from mlkit.registry.signing import new_key, read_passphrase

    name, signing = name or _login_name(), load_settings().signing
    if not KEY_NAME.fullmatch(name):
        raise InputError(f"A key's name consists of letters, digits, and . _ @ -. Received: {name!r}")
    if signing.key.exists():
        raise InputError(
            f"There is a private key: {signing.key}. A key is never overwritten; "
            "for another one name its file: mlkit --set signing.key=FILE keys generate"
        )
    secret = read_passphrase(signing.passphrase) or (_prompt_passphrase("Passphrase", True) if passphrase else None)
    public = new_key(signing.key, signing.trusted_keys / f"{name}.pub", secret)
    if as_json:
        print_json(_key_record(public) | {"private": str(signing.key), "passphrase": bool(secret)})
        return
    rows = [
        ("private key", str(signing.key), "keep it secret: it signs in your name"),
        ("public key", str(public.path), "distribute it: it verifies your signatures"),
    ]
    console.print(text_grid(("", "file", ""), rows))
    console.print(f"\n{escape(name)} signs with the key {public.fingerprint[:16]}.")
    console.print("Next: [bold]mlkit gate latest[/], then [bold]mlkit sign latest[/]")


def _key_record(key: Any) -> dict[str, str]:
    return {"name": key.name, "fingerprint": key.fingerprint, "path": str(key.path)}


@keys.command("list", epilog="Example: mlkit keys list --json")
def list_keys(as_json: JsonOption = False) -> None:
    """List the private key and the trusted public keys."""
    from mlkit.registry.signing import read_public_keys

    signing = load_settings().signing
    trusted, state = read_public_keys(signing.trusted_keys), _private_key_state(signing.key)
    if as_json:
        private = {"path": str(signing.key), "state": state}
        print_json({"private": private, "trusted": [_key_record(key) for key in trusted]})
        return
    print_line(f"private key  {escape(str(signing.key))}: {escape(state)}\n")
    if trusted:
        rows = [(key.name, key.fingerprint[:16], str(key.path)) for key in trusted]
        console.print(text_grid(("trusted", "key", "file"), rows, whole=("trusted", "key")))
    else:
        print_line(f"No public keys in {signing.trusted_keys}. Generate a pair: mlkit keys generate")


def _private_key_state(path: Path) -> str:
    from mlkit.registry.signing import has_passphrase

    if not path.exists():
        return "not found"
    try:
        return "ready, with a passphrase" if has_passphrase(path) else "ready"
    except MlkitError as error:
        return str(error)


def _make_signer(key: Path | None, certificate: Path | None, sigstore: bool) -> "Signer":
    """The signer that the options of the command describe."""
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
    return KeySigner(key, read_passphrase(signing.passphrase) or _prompt_passphrase(f"Passphrase of {key}"))


def _print_signature(signature: "Signature", prefix: str = "") -> None:
    """Signer and the signed files in groups."""
    print_line(f"{DONE} {escape(signature.folder.name)} {prefix}{escape(signature.summary)}")
    for layer in signature.layers[1:]:
        print_line(f"  layer {layer.layer}: {escape(layer.summary)}, {len(layer.files)} files")
    print_line("")
    titles = ("signed", "files", "bytes")
    console.print(text_grid(titles, signature.rows(), right=titles[1:]))


@app.command(epilog="Example: mlkit sign k3f9", rich_help_panel="Publish")
def sign(
    reference: FolderArgument = "latest",
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key; by default signing.key.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate of the key, with its chain (PEM).")
    ] = None,
    sigstore: Annotated[bool, typer.Option("--sigstore", help="Sign with a login, through Sigstore.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace all layers of a signature by one.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign all release artifacts of a run, or those added since."""
    from mlkit.registry.signing import read_public_keys, sign_folder

    signature = sign_folder(_find_folder(reference), _make_signer(key, certificate, sigstore), replace)
    trusted = load_settings().signing.trusted_keys
    names = {key.fingerprint: key.name for key in read_public_keys(trusted)}
    signature = dataclasses.replace(signature, signer=signature.signer or names.get(signature.fingerprint, ""))
    if as_json:
        print_json(signature.record())
        return
    _print_signature(signature)
    if signature.method == "key" and not signature.signer:
        print_line(f"\nThis key is not trusted here yet: its public key is not in {trusted}.")
    print_line(f"\nTo verify it, here or in a copy: [bold]mlkit verify {escape(reference)}[/]")
    _print_next_step(signature.folder)


def _print_next_step(folder: Path) -> None:
    """The command that follows the signature of a run: the gate first, where it has no result yet."""
    if not (folder / RUN_FILE).exists() or not find_model_version(folder / "saved_model"):
        return
    if (folder / "gate.json").exists():
        print_line(f"Next: [bold]mlkit register {escape(folder.name)} --name NAME[/]")
    else:
        print_line(
            f"It has no gate result, which `mlkit register` requires. "
            f"Next: [bold]mlkit gate {escape(folder.name)}[/], then [bold]mlkit sign[/] again for the result"
        )


def _signed_folder(reference: str) -> Path:
    """The folder to verify: a run, a folder, or a registered version (churn/3, churn@champion)."""
    if Path(reference).is_dir() or not re.fullmatch(r"[^/@]+(/\d+|@\w+)", reference):
        return _find_folder(reference)
    from mlkit.registry.store import Registry

    return Registry().find(reference).path


def _trust_policy(
    key: Path | None, authorities: Path | None, identity: str | None, issuer: str | None
) -> "TrustPolicy":
    """The trust policy that the options of the command describe."""
    from mlkit.registry.signing import (
        TrustedAuthorities,
        TrustedIdentity,
        TrustedKeys,
        read_public_key,
        read_public_keys,
    )

    if (identity is None) != (issuer is None):
        raise InputError("Sigstore needs both: --identity, the signer, and --issuer, the login provider.")
    if sum(value is not None for value in (key, authorities, identity)) > 1:
        raise InputError("Give one of --key, --authorities and --identity.")
    if authorities:
        return TrustedAuthorities(authorities)
    if identity and issuer:
        return TrustedIdentity(identity, issuer)
    if key:
        return TrustedKeys((read_public_key(key),))
    folder = load_settings().signing.trusted_keys
    keys = read_public_keys(folder)
    if not keys:
        raise InputError(f"No key is trusted yet: {folder} holds no public key (*.pub). Put one there, or use --key.")
    return TrustedKeys(tuple(keys))


@app.command(epilog="Example: mlkit verify k3f9 --key keys/alice.pub", rich_help_panel="Publish")
def verify(
    reference: FolderArgument = "latest",
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public key; by default all in signing.trusted_keys.")
    ] = None,
    authorities: AuthoritiesOption = None,
    identity: Annotated[str | None, typer.Option(help="Signer's Sigstore identity, as alice@example.com.")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="Login provider of that identity.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a signed run or a copy of one; exit code 1 for any change."""
    from mlkit.registry.signing import verify_folder

    folder, policy = _signed_folder(reference), _trust_policy(key, authorities, identity, issuer)
    try:
        signature = verify_folder(folder, policy)
    except SignatureError as error:
        if as_json:
            result = {"verified": False, "folder": str(folder.absolute())}
            print_json(result | {"error": str(error), "findings": error.findings})
        raise
    if as_json:
        print_json({"verified": True} | signature.record())
        return
    _print_signature(signature, "verified: ")
