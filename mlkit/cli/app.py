"""The Typer application `mlkit`, to which each module of this package adds its commands."""

import typer

from mlkit.cli.group import PanelGroup, SummaryGroup

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


def command_group(
    name: str,
    panel: str,  # panel of the help page
    text: str,  # summary
) -> typer.Typer:
    """Add a group of commands, such as `mlkit runs`, to the application."""
    group = typer.Typer(cls=SummaryGroup, no_args_is_help=True, rich_markup_mode=None, help=text)
    app.add_typer(group, name=name, rich_help_panel=panel)
    return group
