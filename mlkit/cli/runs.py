"""`mlkit runs list|show|open|diff|compare|delete` and `mlkit tensorboard`: look at archived runs."""

import re
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mlkit._display import format_number, format_seconds
from mlkit.cli.app import app, command_group
from mlkit.cli.console import (
    JsonOption,
    RunArgument,
    colored_status,
    console,
    print_json,
    print_section,
    print_summary,
    run_record,
    text_grid,
    working,
)
from mlkit.errors import InputError, MlkitError, NotFoundError
from mlkit.runs.query import RunSummary
from mlkit.runs.record import Record
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore

if TYPE_CHECKING:
    from mlkit.runs.compare import RunComparison

runs = command_group("runs", "Runs", "List, show, compare and delete runs.")
JobOption = Annotated[str | None, typer.Option(help="Only runs of this job.")]
WhereOption = Annotated[str | None, typer.Option(help="Filter expression over metrics and parameters.")]


@runs.command("list", epilog="Example: mlkit runs list --where 'val_accuracy > 0.97' --sort val_accuracy --limit 5")
def list_runs(
    job: JobOption = None,
    status: Annotated[str | None, typer.Option(help="Only runs with this status.")] = None,
    where: WhereOption = None,
    sort: Annotated[str | None, typer.Option(help="Metric or parameter to sort by, largest first.")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest (or oldest) first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of runs.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List runs, the newest first."""
    store = RunStore()
    table = store.list(job, status, where, sort, ascending, limit)
    if as_json:
        print_json([vars(run) | {"folder": str(store.root / run.id)} for run in table])
        return
    if not len(table):
        filtered = " match" if where or job or status else ""
        console.print(f"No runs{filtered} in {store.root}. Make one: mlkit run train")
        return
    names = list(dict.fromkeys([*([sort] if sort else []), *table.metric_names(limit=2 if console.width < 110 else 4)]))
    names = [name for name in names if any(name in run.metrics for run in table)]
    console.print(_runs_table(names, "parameters", [_list_row(run, names) for run in table]))
    if table.matching > len(table):
        console.print(f"[dim]{len(table)} of {table.matching}; --limit shows more[/]")


def _runs_table(metric_names: list[str], last_column: str, rows: Iterable[Sequence[str]]) -> Table:
    """A table of runs: id, status, time, metrics, and a last column that folds."""
    titles = ("run", "status", "time", *metric_names, last_column)
    return text_grid(titles, rows, right=titles[2:-1], whole=titles[:-1], markup=titles[1:])


def _list_row(run: RunSummary, metric_names: list[str]) -> tuple[str, ...]:
    metrics = (format_number(run.metrics.get(name)) for name in metric_names)
    parameters = " ".join(f"{name}={value}" for name, value in run.parameters.items())
    note = f"  [red]{escape(run.error[:80])}[/]" if run.status in ("failed", "damaged") else ""
    return run.id, colored_status(run.status), format_seconds(run.seconds), *metrics, escape(parameters) + note


@runs.command(epilog="Example: mlkit runs show latest")
def show(
    reference: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show the whole record of a run, its result first."""
    run = RunStore().get(reference)
    if as_json:
        print_json(run_record(run))
        return
    record = run.record
    console.print(f"[bold]{run.id}[/]  {colored_status(run.status)}  {format_seconds(record.seconds)}")
    print_summary(record)
    for title, rows in _record_sections(record):
        if rows:
            print_section(title, rows)


def _record_sections(record: Record) -> list[tuple[str, list[tuple]]]:
    """Titles with their rows."""
    failure, git, machine = record.failure, record.git, record.environment
    size = sum(artifact.size for artifact in record.artifacts)
    data = [(d.get("name", ""), f"{d.get('rows', '?')} rows", str(d.get("fingerprint", ""))[:16]) for d in record.data]
    cells = [(cell.heading, cell.status, format_seconds(cell.seconds)) for cell in record.cells if cell.seconds >= 0.1]
    uncommitted = "with uncommitted changes" if git and git.uncommitted else ""
    return [
        ("failure", [("error", f"{failure.error}: {failure.message}"), ("in", failure.heading)] if failure else []),
        ("metrics", [(name, format_number(value)) for name, value in record.metrics.items()]),
        (
            "parameters",
            [(n, v, "passed" if n in record.parameters else "") for n, v in record.effective_parameters.items()],
        ),
        ("data", data),
        ("parents", [(parent,) for parent in record.parents]),
        ("cells", cells),
        ("git", [(git.branch, git.commit[:12], uncommitted)] if git else []),
        ("machine", [(machine.platform, f"Python {machine.python}", f"{machine.cpu_count} CPUs")] if machine else []),
        ("files", [(f"{len(record.artifacts)} files", f"{size / 1e6:.1f} MB")] if record.artifacts else []),
    ]


@runs.command(epilog="Example: mlkit runs diff t3ny w8hk")
def diff(
    first: RunArgument,
    second: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show the differences between two runs."""
    from mlkit.runs.diff import diff_runs

    store = RunStore()
    difference = diff_runs(store.get(first), store.get(second))
    if as_json:
        print_json(difference.record())
        return
    for title, rows in difference.sections():
        print_section(title, rows)
    if difference.same:
        console.print("\n[bold]No differences[/] but those that every execution has (times, ids, folders).")


@runs.command(epilog="Example: mlkit runs compare --job train --where 'val_accuracy > 0.9' --html sweep.html")
def compare(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to compare; or use the options below.")
    ] = None,
    job: JobOption = None,
    where: WhereOption = None,
    limit: Annotated[int, typer.Option(min=2, help="Maximum number of runs, the newest.")] = 20,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the parameters, metrics and curves of runs."""
    from mlkit.runs.compare import compare_runs

    comparison = compare_runs(_selected_runs(references or [], job, where, limit))
    saved = comparison.save_html(page) if page else None
    if as_json:
        print_json(comparison.record() | ({"html": str(saved.absolute())} if saved else {}))
        return
    console.print(_comparison_table(comparison))
    for title, rows in comparison.sections()[1:]:
        print_section(title, rows)
    if saved:
        console.print(f"\nWith plots, to open in a browser: [bold]{escape(str(saved))}[/]")


def _selected_runs(references: list[str], job: str | None, where: str | None, limit: int) -> list[Run]:
    """Runs by reference, or those that match the filters; damaged ones cannot be compared and are left out."""
    store = RunStore()
    if references and (job or where):
        raise InputError("Give runs, or --job and --where, not both.")
    if references:
        return [run for reference in references for run in _with_children(store.get(reference))]
    matching = [summary for summary in store.list(job=job, where=where) if summary.status != "damaged"]
    return [store.get(summary.id) for summary in matching[:limit]]


def _comparison_table(comparison: "RunComparison") -> Table:
    """Runs with the parameters that differ and the metrics, the best values in green."""
    metrics = comparison.metrics[: 6 if console.width > 110 else 2]
    best, rows = {name: comparison.best(name) for name in metrics}, []
    for run, label in zip(comparison.runs, comparison.labels, strict=True):
        numbers = [(format_number(run.metrics.get(name)), run.id in best[name]) for name in metrics]
        cells = [f"[bold green]{text}[/]" if is_best else text for text, is_best in numbers]
        rows.append((run.id, colored_status(run.status), format_seconds(run.seconds), *cells, escape(label)))
    return _runs_table(metrics, "parameters", rows)


@runs.command("open", epilog="Example: mlkit runs open latest")
def open_run(
    reference: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Open the executed notebook of a run in the browser."""
    run = RunStore().get(reference)
    page = run.folder / "notebook.html"
    if not page.exists():
        raise NotFoundError(f"{run.id} has no notebook.html: it is {run.status} and was not executed as a job.")
    if as_json:
        print_json({"id": run.id, "notebook": str(page)})
    elif webbrowser.open(page.as_uri()):
        console.print(str(page))
    else:
        console.print(f"No browser was found; the notebook is at {page}")


@runs.command(epilog="Example: mlkit runs delete k3f9 --yes")
def delete(
    references: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs to delete.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete runs with all their files."""
    store = RunStore()
    selected = [store.get(reference) for reference in dict.fromkeys(references)]
    for run in selected:
        if _is_running(run):
            raise InputError(f"{run.id} is running; stop it first.")
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise InputError("There is no terminal to confirm on; add --yes to delete.")
        typer.confirm(f"Delete {', '.join(run.id for run in selected)}?", abort=True)
    for run in selected:
        store.delete(run)
    if as_json:
        print_json({"deleted": [run.id for run in selected]})
    else:
        console.print(f"Deleted {', '.join(run.id for run in selected)}")


def _is_running(run: Run) -> bool:
    try:
        return run.status in ("created", "running")
    except MlkitError:
        return False  # a damaged record does not prevent its deletion


@app.command(epilog="Example: mlkit tensorboard k3f9 x7p2  (without a run: all runs)", rich_help_panel="Runs")
def tensorboard(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to show; all by default.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")] = 6006,
    as_json: JsonOption = False,
) -> None:
    """Show runs in TensorBoard until Ctrl-C."""
    store = RunStore()
    selected = [run for reference in references or [] for run in _with_children(store.get(reference))]
    if references and not any((run.folder / "tensorboard").is_dir() for run in selected):
        raise NotFoundError(f"None of {', '.join(references)} has TensorBoard logs.")
    if not selected and not any(store.root.glob("*/tensorboard")):
        raise NotFoundError(f"No run in {store.root} has TensorBoard logs. Make one: mlkit run train")
    with tempfile.TemporaryDirectory() as links:
        for run in selected:
            if (run.folder / "tensorboard").is_dir():
                Path(links, run.id).symlink_to(run.tensorboard)
        logs = links if selected else str(store.root)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", str(port)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            _serve_until_ended(process, as_json)
        except KeyboardInterrupt:
            pass
        finally:
            process.terminate()
            process.wait()


def _with_children(run: Run) -> list[Run]:
    """A run, or in place of a sweep its runs."""
    points = run.record.points
    store = RunStore(run.folder.parent)
    return [store.get(point.run) for point in points if point.run] if points else [run]


def _serve_until_ended(process: subprocess.Popen, as_json: bool) -> None:
    """Print TensorBoard's address as soon as it is ready, then wait for its end."""
    lines: list[str] = []
    with working("starting TensorBoard"):
        address = _wait_for_address(process, lines)
    if address and as_json:
        print_json({"url": address, "pid": process.pid})
    elif address:
        console.print(f"TensorBoard is at [bold]{address}[/]   (Ctrl-C ends it)")
    sys.stdout.flush()
    for _ in process.stderr:
        pass  # keep its pipe from filling up
    if process.wait() > 0:
        raise InputError(f"TensorBoard could not start: {''.join(lines[-3:]).strip()}")


def _wait_for_address(process: subprocess.Popen, lines: list[str]) -> str:  # "" when it ended
    """The address in TensorBoard's messages, which are collected in `lines`."""
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"http://\S+", line):
            return match[0]
    return ""
