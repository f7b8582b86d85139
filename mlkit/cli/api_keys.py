"""`mlkit api-keys create|list|revoke`: API keys of a model server's clients."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mlkit.cli.app import command_group
from mlkit.cli.console import JsonOption, console, print_json, print_line, text_grid
from mlkit.config import load_settings
from mlkit.errors import InputError

api_keys = command_group("api-keys", "Serve", "Create, list and revoke API keys of a server's clients.")


def _key_file() -> Path:
    """The file of API keys; raises InputError where no setting names it."""
    from mlkit.serving.tls import read_options

    settings = load_settings()
    if not settings.auth.keys:
        raise InputError(
            "The setting auth.keys names the file of API keys, and it is empty. In settings.ini: [auth] keys = api.keys"
        )
    return Path(read_options(settings)[0].keys)


@api_keys.command(epilog="Example: mlkit api-keys create webshop --scope predict --days 90")
def create(
    name: Annotated[str, typer.Argument(help="The client, as logs name it.")],
    scope: Annotated[
        list[str] | None, typer.Option(metavar="predict|admin", help="What it permits; may be repeated.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires; by default never.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key, which is shown once."""
    from mlkit.serving.auth import new_api_key

    path = _key_file()
    key = new_api_key(path, name, scope or ["predict"], days)
    if as_json:
        print_json({"name": name, "key": key, "file": str(path)})
        return
    print(key)
    print_line(f"\nThe API key of {escape(name)}, shown only now. Its hash is in {escape(str(path))}.")
    print_line(f"  curl -H 'Authorization: Bearer {key[:14]}...' ...")


@api_keys.command("list", epilog="Example: mlkit api-keys list --json")
def list_keys(as_json: JsonOption = False) -> None:
    """List the clients with an API key."""
    from mlkit.serving.auth import api_keys as read_api_keys

    keys = read_api_keys(_key_file())
    if as_json:
        print_json([{name: value for name, value in vars(key).items() if name != "sha256"} for key in keys])
        return
    rows = [
        (key.name, " ".join(key.scopes), key.created[:10], "expired" if key.expired else (key.expires or "never")[:10])
        for key in keys
    ]
    titles = ("name", "scopes", "created", "expires")
    console.print(text_grid(titles, rows, whole=("name",)) if rows else "No API keys.")


@api_keys.command(epilog="Example: mlkit api-keys revoke webshop")
def revoke(
    name: Annotated[str, typer.Argument(help="The client.")],
    as_json: JsonOption = False,
) -> None:
    """Revoke a client's API key; servers notice within a second."""
    from mlkit.serving.auth import revoke_api_key

    revoked = revoke_api_key(_key_file(), name)
    if as_json:
        print_json({"name": name, "revoked": [key.id for key in revoked]})
    else:
        print_line(f"The API key of {escape(name)} is revoked.")
