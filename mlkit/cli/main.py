"""The command `mlkit`: its options, its commands, and exit codes."""

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

import mlkit
from mlkit.cli.app import app

from mlkit.cli import (  # noqa: F401  isort: skip  (each adds its commands, in the order of the help page)
    project, test, data, run, runs, jobs, evaluation, export, signing, registry, serving, api_keys, predict,
)  # fmt: skip
from mlkit.cli.console import console, errors, parse_pairs
from mlkit.config import load_settings, unknown_variables, variable_name
from mlkit.errors import JobInterruptedError, MlkitError


def main() -> None:
    """Entry point: run a command, turn the kit's exceptions into messages and exit codes."""
    # jsonschema would import it for a check that notebooks do not need; it takes a second.
    sys.modules.setdefault("rfc3987_syntax", None)
    try:
        app()
    except JobInterruptedError as error:
        errors.print(f"[yellow]{escape(str(error))}[/]", soft_wrap=True)
        sys.exit(143 if "SIGTERM" in str(error) else 130)
    except MlkitError as error:
        errors.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _print_version(requested: bool) -> None:
    if requested:
        console.print(f"mlkit {mlkit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    settings: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Override a setting.")] = [],  # noqa: B006
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    overrides = parse_pairs(settings, "--set takes NAME=VALUE")
    load_settings(overrides)  # rejects what is wrong
    for warning in unknown_variables(os.environ):
        errors.print(f"[yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    os.environ.update({variable_name(name): value for name, value in overrides.items()})  # kernels inherit it
