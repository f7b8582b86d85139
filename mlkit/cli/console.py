"""What every command has in common: where it prints, tables that fit the window, and JSON for scripts."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlkit.errors import JobFailedError, MlkitError
from mlkit.runs.record import Record
from mlkit.runs.run import Run

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
errors = Console(stderr=True, highlight=False)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def print_json(
    value: Any,  # what JSON cannot hold is written as text
) -> None:
    """Print a value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def text_grid(
    titles: Sequence[str],  # of the columns
    rows: Iterable[Sequence[str]],  # cells
    *,
    right: Sequence[str] = (),  # titles of columns that are set flush right
    whole: Sequence[str] = (),  # titles of columns that are never folded
    markup: Sequence[str] = (),  # titles of columns whose cells hold Rich's markup
) -> Table:
    """A plain table that folds its cells to the width of the window."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in titles:
        side = "right" if title in right else "left"
        grid.add_column(escape(title), overflow="fold", justify=side, no_wrap=title in whole)
    for row in rows:
        cells = zip(titles, row, strict=True)
        grid.add_row(*(cell if title in markup else escape(cell) for title, cell in cells))
    return grid


def print_rows(
    titles: Sequence[str],  # of the columns
    rows: Iterable[Sequence[str]],  # cells
    as_json: bool = False,  # a list of objects instead
) -> None:
    """Print a plain table of texts, or the same as JSON."""
    rows = list(rows)
    if as_json:
        print_json([dict(zip(titles, row, strict=True)) for row in rows])
        return
    console.print(text_grid(titles, rows))


RunArgument = Annotated[str, typer.Argument(help="Id, unique beginning or end of one, or 'latest'.")]


class Watch:
    """What a person sees while a job runs."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.cell: Any = None  # jobs.CellStarted
        self.told = 0  # epochs that have been printed
        self.stopped = threading.Event()

    def __call__(self, run: Run, cell: Any) -> None:
        """Called by the job: once with the run, then with each cell."""
        self.run, self.cell = run, cell
        if not sys.stdout.isatty():
            self._print_epochs()
            console.print(f"cell {cell.number} of {cell.total}  {escape(cell.heading)}" if cell else f"run {run.id}")

    def __enter__(self) -> "Watch":
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self.render, console=console, refresh_per_second=5, transient=True)
            self.live.start()
        else:
            self.thread = threading.Thread(target=self._keep_printing, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.set()
        if sys.stdout.isatty():
            self.live.stop()
        else:
            self.thread.join()

    def record(self) -> Record | None:
        """The record as of now; None where there is none to be read."""
        try:
            return self.run.record if self.run else None
        except MlkitError:  # deleted or being repaired under our eyes: nothing to say
            return None

    def render(self) -> Group:
        """The live block."""
        record = self.record()
        if self.cell is None or record is None:
            return Group(Text("starting ...", style="dim"))
        bar = ProgressBar(total=self.cell.total, completed=self.cell.number - 1, width=24)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, f"cell {self.cell.number} of {self.cell.total}", Text(self.cell.heading, style="bold"))
        return Group(Text(record.id, style="dim"), row, Text(progress_line(record)))

    def _keep_printing(self) -> None:
        while not self.stopped.wait(0.25):
            self._print_epochs()

    def _print_epochs(self) -> None:
        record = self.record()
        for line in epoch_lines(record)[self.told :] if record else []:
            console.print(f"  {escape(line)}")
            self.told += 1


def named_values(
    values: Mapping[str, Any],
) -> str:  # "loss 0.1235  epoch 3"
    """Names with their values, in a line."""
    return "  ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def progress_line(
    record: Record,
) -> str:  # "epoch 3/20, step 12/45  loss 0.1235  val_accuracy 0.9800"; "" when nothing is in progress
    """What a running job says it is doing, with its newest metrics."""
    progress = dict(record.progress)
    counted = ", ".join(
        f"{unit} {progress.pop(unit)}/{progress.pop(f'{unit}s', '?')}" for unit in ("epoch", "step") if unit in progress
    )
    return "  ".join(filter(None, (counted, named_values(record.metrics | progress)))) if record.progress else ""


def epoch_lines(
    record: Record,
) -> list[str]:  # "epoch 3  loss 0.1235  val_accuracy 0.9800", one for each epoch that is over
    """The history of a run, a line for each step of it."""
    steps: dict[int, dict[str, float]] = {}
    for name, points in record.history.items():
        for step, value in points:
            steps.setdefault(step, {})[name] = value
    return [f"epoch {step}  {named_values(values)}" for step, values in sorted(steps.items())]


def explain_failure(
    run: Run,  # that has failed
) -> None:
    """The end of the traceback, and where to read more."""
    failure = run.record.failure
    lines = failure.traceback.strip().splitlines()
    if failure.heading:
        errors.print(f"Failed in [bold]{escape(failure.heading)}[/] (cell {failure.cell} of the executed notebook)")
    errors.print("\n".join(f"  {escape(line)}" for line in lines[-12:]), style="dim", soft_wrap=True)
    errors.print(f"Everything up to there: [bold]mlkit open {run.id}[/]")


@contextmanager
def watched(
    as_json: bool = False,  # a program is waiting: nothing is printed while it runs
) -> Iterator[Callable[[Run, Any], None]]:  # the `watch` of run_job
    """Show a job while it runs, and explain its failure; what the job raises is passed on."""
    try:
        if as_json:
            yield lambda run, cell: None
        else:
            with Watch() as watch:
                yield watch
    except JobFailedError as error:
        explain_failure(error.run)
        raise
