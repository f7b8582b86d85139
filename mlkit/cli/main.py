"""The command `mlkit`: its options, its commands in panels, and exit codes."""

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

import mlkit
from mlkit.cli import (
    api_keys,
    data,
    evaluation,
    export,
    jobs,
    predict,
    project,
    registry,
    run,
    runs,
    serving,
    signing,
    test,
)
from mlkit.cli.console import console, errors
from mlkit.cli.group import PanelGroup
from mlkit.cli.run import parse_pair
from mlkit.config import load_settings, variable_name
from mlkit.errors import JobInterruptedError, MlkitError

WORKFLOW = """\b
From a table to a served model:
  mlkit new churn && cd churn                          a project
  mlkit run train -p dataset=sales.csv -p label=bought train and archive the run
  mlkit gate latest && mlkit sign latest               evaluate, sign
  mlkit register latest --name churn                   a version of a model
  mlkit promote churn 1                                make it the champion
  mlkit serve churn                                    TF Serving's API on port 8501
"""

app = typer.Typer(
    cls=PanelGroup,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help takes half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From notebook cell to served prediction: run notebooks as jobs, archive every run, publish and serve models.",
    epilog=WORKFLOW,
)


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
    overrides = dict(parse_pair(text, "--set") for text in settings)
    load_settings(overrides)  # rejects what is wrong
    os.environ.update({variable_name(name): value for name, value in overrides.items()})  # kernels inherit it


for module in (project, test, data, run, runs, jobs, evaluation, export, signing, registry, serving, api_keys, predict):
    module.register(app)
