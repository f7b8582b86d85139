"""`mlkit test`: execute notebooks as tests, all of them or those that a change affects."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from mlkit._display import format_seconds
from mlkit.cli.app import app
from mlkit.cli.console import JsonOption, console, print_json, relative_path, split_list, text_grid
from mlkit.config import cpu_count, load_settings
from mlkit.errors import JobInterruptedError

if TYPE_CHECKING:
    from mlkit.jobs.notebook_test import Result

REFRESH_SECONDS = 0.2
COLORS = {"passed": "green", "failed": "red", "skipped": "dim", "running": "cyan"}


class TestProgress:
    """Progress display: a line for each notebook that has ended, a table of the running ones."""

    def __init__(self, silent: bool):
        self.silent = silent
        self.printed: set[Path] = set()
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.refreshed = 0.0

    def __enter__(self) -> "TestProgress":
        if not self.silent and console.is_terminal:
            self.live.start()  # without a thread of its own
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, results: "list[Result]") -> None:
        """Called by `run_notebooks` again and again."""
        if self.silent:
            return
        for result in results:
            if result.is_finished and result.path not in self.printed:
                self.printed.add(result.path)
                print_result(result)
        if self.live.is_started and time.monotonic() > self.refreshed + REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            self.live.update(progress_table(results), refresh=True)


def print_result(result: "Result") -> None:
    """A line for a notebook, and below it the reason of its failure."""
    outcome = f"[{COLORS[result.outcome]}]{result.outcome:7}[/]"
    console.print(
        f"{outcome} {escape(str(relative_path(result.path)))}  {format_seconds(result.seconds)}", soft_wrap=True
    )
    if result.outcome == "failed":
        console.print(f"{result.place}\n{result.error}\n", markup=False, soft_wrap=True)


def progress_table(results: "list[Result]") -> Table:
    """A row for each notebook at work, and for those that have failed."""
    ended = sum(result.is_finished for result in results)
    rows = [
        (str(relative_path(result.path)), result.outcome, format_seconds(result.seconds), result.place)
        for result in sorted(results, key=lambda result: result.outcome)
        if result.outcome in ("running", "failed")
    ]
    titles = (f"{ended} of {len(results)} notebooks", "state", "time", "at")
    return text_grid(titles, rows, right=("time",), whole=("state", "time"))


def summary(results: "list[Result]", seconds: float) -> dict[str, Any]:
    """The result of the whole command for a script."""
    outcomes = [result.outcome for result in results]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
    return counts | {"seconds": round(seconds, 2), "notebooks": [asdict(result) for result in results]}


@app.command("test", epilog="Example: mlkit test --changed", rich_help_panel="Project")
def run_tests(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="[PATH]...", help="Notebooks and folders.")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only notebooks affected by changes in git.")] = False,
    base: Annotated[str, typer.Option(metavar="REV", help="Revision to compare with.")] = "HEAD",
    max_parallel: Annotated[
        int | None, typer.Option("-n", min=1, metavar="N", help="Notebooks in parallel; by default one per core.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds per notebook; 0 for no limit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run notebooks as tests; exit code 1 if any fails."""
    from mlkit.jobs.import_graph import affected, any_imports, changed_files
    from mlkit.jobs.notebook_test import Project, find_notebooks, run_notebooks

    start, limits = time.monotonic(), load_settings().tests
    notebooks = find_notebooks(paths or [])
    if changed:
        root = Project.of(Path.cwd()).root
        notebooks = affected(notebooks, changed_files(root, base), root)
        if not notebooks and not as_json:
            console.print(f"Nothing to test: no notebook is affected by what has changed since {escape(base)}.")
            return
    options = {"max_parallel": max_parallel or cpu_count(), "timeout": limits.timeout if timeout is None else timeout}
    options["light"] = not any_imports(notebooks, ("tensorflow", "keras"), Project.of(Path.cwd()).root)
    with TestProgress(as_json) as progress:
        try:
            results = run_notebooks(notebooks, preload=split_list(limits.preload), on_progress=progress, **options)
        except KeyboardInterrupt as error:
            raise JobInterruptedError(
                f"The tests were interrupted ({str(error) or 'Ctrl-C'}); no process is left."
            ) from None
    report = summary(results, time.monotonic() - start)
    if as_json:
        print_json(report)
    else:
        counts = ", ".join(f"{report[name]} {name}" for name in ("passed", "failed", "skipped"))
        console.print(f"{counts} in {report['seconds']:.1f} s")
    raise typer.Exit(1 if report["failed"] else 0)
