"""`mlkit predict`: batch prediction of all rows of a source into a Parquet file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlkit.cli.app import app
from mlkit.cli.console import JsonOption, console, errors, print_json, print_line, split_list, text_grid
from mlkit.cli.evaluation import VariantOption
from mlkit.cli.run import EngineOption
from mlkit.errors import InputError

if TYPE_CHECKING:
    from mlkit.serving.batch_predict import BatchPrediction


def result_table(
    result: "BatchPrediction",
) -> Table:
    """One line: model, version, run, rows and rows per second."""
    names = result.names
    version = "-" if names["version"] is None else str(names["version"])
    resumed = f"{result.rows_resumed:,}" if result.rows_resumed else "-"
    row = (names["model"], version, names["run"] or "-", f"{result.rows:,}", resumed, f"{result.speed:,.0f}")
    titles = ("model", "version", "run", "rows", "resumed", "rows/s")
    return text_grid(titles, [row], right=titles[3:], whole=titles[3:])


def _progress_bar(silent: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True, disable=silent or not errors.is_terminal)


@app.command(
    epilog="Example: mlkit predict churn@champion --input 'today-*.parquet' --output scores.parquet --key id",
    rich_help_panel="Serve",
)
def predict(
    model: Annotated[str, typer.Argument(help="In the registry (churn@champion), a run, or a folder.")],
    source: Annotated[str, typer.Option("--input", metavar="SOURCE", help="A file, a pattern, a URL, a database.")],
    output: Annotated[Path, typer.Option(metavar="FILE.parquet", help="File for the predictions.")],
    key: Annotated[str | None, typer.Option(metavar="COLUMN,...", help="Columns copied to the predictions.")] = None,
    query: Annotated[str | None, typer.Option(metavar="SQL", help="Query, for a database.")] = None,
    variant: VariantOption = "savedmodel",
    engine: EngineOption = "local",
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes; by default one per core.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace existing predictions.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict all rows of a source; after a kill the command resumes."""
    from mlkit.serving.batch_predict import predict_table

    if key is not None and not split_list(key):
        raise InputError(f"--key takes COLUMN,..., for example --key id. Received: {key!r}")
    with _progress_bar(as_json) as bar:
        task = bar.add_task("predicting", total=None)
        result = predict_table(
            model,
            source,
            output,
            query=query,
            key=split_list(key),
            precision=variant,
            engine=engine,
            processes=processes,
            replace=replace,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        counts = {"rows": result.rows, "rows_resumed": result.rows_resumed, "seconds": result.seconds}
        quarantine = {"quarantined": result.quarantined, "quarantine": result.quarantine and str(result.quarantine)}
        print_json({"path": str(result.path), **counts, **quarantine, **result.names})
        return
    console.print(result_table(result))
    if result.quarantine:
        print_line(
            f"\nCleaning quarantined {result.quarantined:,} rows, which have no prediction: "
            f"{escape(str(result.quarantine))}"
        )
    print_line(f"\nDescribe them: [bold]mlkit data describe {escape(str(result.path))}[/]")
