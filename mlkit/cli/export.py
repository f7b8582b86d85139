"""`mlkit export`, `compress`, `parity`: convert models, make them smaller, compare the predictions of all formats."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from mlkit.cli.app import app
from mlkit.cli.console import (
    JsonOption,
    RunArgument,
    console,
    errors,
    parse_pairs,
    print_json,
    print_line,
    print_unsigned,
    showing_progress,
    text_grid,
)
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore


@app.command(epilog="Example: mlkit export k3f9 --to litert-int8,litertjs", rich_help_panel="Evaluate and export")
def export(
    reference: RunArgument = "latest",
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMATS",
            help="savedmodel, litert, litert-float16, litert-int8, litert-full-int8, litert-int4, "
            "litertjs (a browser demo), tfjs; separated by commas.",
        ),
    ] = "savedmodel,litert,litert-int8",
    replace: Annotated[bool, typer.Option("--replace", help="Replace existing exports.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a run's model to other formats and write its model card."""
    from mlkit.export.convert import export_run, parse_formats

    targets, run = parse_formats(to), RunStore().get(reference, having="saved_model")
    with errors.status("...") as status:
        exports = export_run(run, targets, replace, on_progress=lambda name: status.update(f"exporting {name}"))
    card = run.folder / "model_card.md"
    if as_json:
        print_json({"run": run.id, "card": str(card), "targets": [result.record() for result in exports]})
    else:
        _print_exports(run, exports)
        print_line(f"\nModel card: {escape(str(card))}")
        print_line(f"Compare their predictions: [bold]mlkit parity {escape(run.id)}[/]")
        print_unsigned(run)
    if any(result.state == "failed" for result in exports):
        raise typer.Exit(1)


def _print_exports(run: Run, exports: list[Any]) -> None:
    """The exports with their sizes, and the reasons of those that failed."""
    from mlkit.export.formats import find_format

    colors = {"exported": "green", "existing": "dim", "failed": "red"}
    litert = find_format(run.folder, "litert")
    rows = []
    for result in exports:
        files, ratio = result.model_format, ""
        if files and litert and result.name.startswith("litert-"):
            ratio = f"{files.bytes / litert.bytes:.0%}"
        sizes = (str(len(files.files)), f"{files.bytes:,}") if files else ("", "")
        place = str(files.path.relative_to(run.folder)) if files else ""
        rows.append((result.name, f"[{colors[result.state]}]{result.state}[/]", *sizes, ratio, place))
    titles = ("target", "", "files", "bytes", "of float32", "in the run")
    console.print(text_grid(titles, rows, right=titles[2:5], whole=titles[:1], markup=("",)))
    for result in exports:
        if result.reason:
            print_line(f"\n[red]{result.name}[/] {escape(result.reason)}")


@app.command(
    epilog="Example: mlkit compress k3f9 --method prune --method int8 --sparsity 0.9",
    rich_help_panel="Evaluate and export",
)
def compress(
    reference: RunArgument = "latest",
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Method; may be repeated; by default all.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights that pruning sets to zero.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Maximum epochs of fine-tuning.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="NAME", help="Method whose model the new run stores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model smaller by several methods and compare them."""
    from mlkit.export.compression_report import METHODS, check_kept_method, check_methods, read_variants
    from mlkit.jobs.executor import run_job

    chosen = check_methods(methods or list(METHODS))
    check_kept_method(keep, chosen)
    run = RunStore().get(reference, having="saved_model")
    options = {"sparsity": sparsity, "epochs": epochs, "keep": keep}
    options = {name: value for name, value in options.items() if value is not None}
    with showing_progress(as_json) as progress:
        compressed = run_job("compress", {"run": run.id, "methods": chosen, **options}, on_progress=progress)
    variants = read_variants(compressed)
    if as_json:
        print_json({"run": compressed.id, **variants.record()})
        return
    titles = variants.titles()
    console.print(text_grid(titles, variants.lines(), right=titles[2:8], whole=titles[:2]))
    plot = compressed.folder / "plots" / "variants.png"
    print_line(f"\n{compressed.id}: {variants.rows:,} test rows. The plot: {plot}")
    following = "gate" if variants.kept_method else "runs open"
    console.print(f"Next: [bold]mlkit {following} {compressed.id[-4:]}[/]")


@app.command(epilog="Example: mlkit parity k3f9 --tolerance litert-int8=0.02", rich_help_panel="Evaluate and export")
def parity(
    reference: RunArgument = "latest",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only this format, as litert-int8; may be repeated. By default all that exist."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET=X", help="Largest allowed difference; the mean may be a tenth of it."),
    ] = None,
    server: Annotated[str, typer.Option(metavar="URL", help="A server, as http://HOST:8501/v1/models/NAME.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Test that all formats predict the same; exit code 1 if not."""
    from mlkit.export.parity import COLUMNS, check_parity

    tolerances = parse_pairs(tolerance or [], "--tolerance takes TARGET=NUMBER, as litert-int8=0.02", float)
    run = RunStore().get(reference, having="saved_model")
    result = check_parity(run, target or (), tolerances, server)
    if as_json:
        print_json(result.record())
    else:
        right, whole = ("largest", "mean", "tolerance", "same class"), COLUMNS[:-1]
        console.print(text_grid(COLUMNS, result.rows(), right=right, whole=whole))
        print_line(f"\n{run.id}: {escape(result.reason)}")
        print_unsigned(run)
    if not result.passed:
        raise typer.Exit(1)
    if not as_json:
        print_line(f"Next: [bold]mlkit gate {run.id}[/]")
