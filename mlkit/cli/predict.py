"""`mlkit predict`: every row of a source gets its answer, in a Parquet file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlkit.cli.console import JsonOption, console, errors, print_json, text_grid
from mlkit.errors import InputError

if TYPE_CHECKING:
    from mlkit.serving.batch_predict import Predicted


def predicted_table(
    predicted: "Predicted",
) -> Table:
    """One line about a result."""
    names = predicted.names
    version = "-" if names["version"] is None else str(names["version"])
    kept = f"{predicted.kept:,}" if predicted.kept else "-"
    row = (names["model"], version, names["run"] or "-", f"{predicted.rows:,}", kept, f"{predicted.speed:,.0f}")
    titles = ("model", "version", "run", "rows", "from before", "rows/s")
    return text_grid(titles, [row], right=titles[3:], whole=titles[3:])


prediction = typer.Typer()


def _columns(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _bar(silent: bool) -> Progress:
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*parts, console=errors, transient=True, disable=silent or not errors.is_terminal)


@prediction.command(
    epilog="Example: mlkit predict churn@champion --input 'today-*.parquet' --output scores.parquet --key id"
)
def predict(
    model: Annotated[str, typer.Argument(help="In the registry (churn@champion), a run, or a folder.")],
    source: Annotated[str, typer.Option("--input", metavar="SOURCE", help="A file, a pattern, a URL, a database.")],
    output: Annotated[Path, typer.Option(metavar="FILE.parquet", help="Where the answers go.")],
    key: Annotated[str | None, typer.Option(metavar="COLUMN,...", help="Kept beside the answers.")] = None,
    query: Annotated[str | None, typer.Option(metavar="SQL", help="What to ask a database.")] = None,
    kind: Annotated[str, typer.Option(help="savedmodel, or a conversion: float32, int8, ...")] = "savedmodel",
    engine: Annotated[str, typer.Option(help="local, or ray: the nodes of the running cluster.")] = "local",
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="How many answer; by default all cores.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put the answers in place of older ones.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer every row of a source; killed, the same command goes on where it was."""
    from mlkit.serving.batch_predict import predict_table

    if key is not None and not _columns(key):
        raise InputError(f"--key takes COLUMN,..., for example --key id. Received: {key!r}")
    with _bar(as_json) as bar:
        task = bar.add_task("answering", total=None)
        predicted = predict_table(
            model,
            source,
            output,
            query=query,
            key=_columns(key),
            kind=kind,
            engine=engine,
            processes=processes,
            replace=replace,
            progress=lambda answered, total: bar.update(task, completed=answered, total=total),
        )
    if as_json:
        told = {"rows": predicted.rows, "from_before": predicted.kept, "seconds": predicted.seconds}
        aside = {"set_aside": predicted.set_aside, "aside": predicted.aside and str(predicted.aside)}
        print_json({"path": str(predicted.path), **told, **aside, **predicted.names})
        return
    console.print(predicted_table(predicted))
    if predicted.aside:
        told = f"\nCleaning took out {predicted.set_aside:,} rows, which have no answer: {escape(str(predicted.aside))}"
        console.print(told, soft_wrap=True)
    console.print(f"\nLook at them: [bold]mlkit data describe {escape(str(predicted.path))}[/]", soft_wrap=True)
