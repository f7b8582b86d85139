"""What all commands share: consoles, tables that fit the window, JSON for scripts, and progress displays."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlkit._display import format_number, format_seconds, format_value
from mlkit._files import read_records
from mlkit.errors import InputError, JobFailedError, MlkitError, StorageError
from mlkit.runs.record import Record
from mlkit.runs.run import SIGNATURE_FILE, STATUS_COLORS, Run

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
errors = Console(stderr=True, highlight=False)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
RunArgument = Annotated[str, typer.Argument(help="Id, unique beginning or end of one, or 'latest'.")]
DONE = "[green]●[/]"  # in front of a sentence that reports success
FAILED = "[red]●[/]"
SEARCH_JOURNAL = "search.jsonl"  # tuning.oracle.JOURNAL, whose module imports Keras


def print_json(
    value: Any,  # what JSON cannot represent is written as text
) -> None:
    """Print a value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def print_line(
    text: str,  # with Rich's markup
) -> None:
    """Print a sentence that the terminal may wrap, but that is not cut or folded."""
    console.print(text, soft_wrap=True)


def print_unsigned(run: Run) -> None:
    """Say that files were added to a signed run."""
    if (run.folder / SIGNATURE_FILE).exists():
        print_line(f"{run.id} is signed, and the new files are not: [bold]mlkit sign {escape(run.id)}[/] signs them")


def print_next(
    *commands: tuple[str, str],  # command, purpose
) -> None:
    """Print the commands that usually follow, each with its purpose."""
    console.print("\nNext:")
    for command, purpose in commands:
        console.print(f"  [bold]{escape(command):42}[/] [dim]{escape(purpose)}[/]", soft_wrap=True)


def text_grid(
    titles: Sequence[str],  # column titles
    rows: Iterable[Sequence[str]],  # cells
    *,
    right: Sequence[str] = (),  # titles of right-aligned columns
    whole: Sequence[str] = (),  # titles of columns that are never folded
    markup: Sequence[str] = (),  # titles of columns whose cells contain Rich's markup
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
    titles: Sequence[str],  # column titles
    rows: Iterable[Sequence[str]],  # cells
    as_json: bool = False,  # a list of objects instead
) -> None:
    """Print a plain table of texts, or the same as JSON."""
    rows = list(rows)
    if as_json:
        print_json([dict(zip(titles, row, strict=True)) for row in rows])
        return
    console.print(text_grid(titles, rows))


def print_section(
    title: str,
    rows: list[tuple],  # of one length; lines of a difference begin with - or +
) -> None:
    """Print a title with its rows; lines that begin with - or + are coloured."""
    console.print(f"\n[dim]{escape(title)}[/]")
    if all(len(row) == 1 for row in rows):
        for (line,) in rows:
            style = {"-": "red", "+": "green"}.get(line[:1], "")
            console.print(Text(f"  {line}", style=style), soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def colored_status(
    status: str,  # of a run
) -> str:  # Rich's markup
    """A run's status in its colour."""
    return f"[{STATUS_COLORS.get(status, 'default')}]{status}[/]"


def split_list(
    text: str | None,  # values separated by commas
) -> list[str]:
    """The values of an option that takes a list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def parse_pairs(
    texts: Iterable[str],  # NAME=VALUE
    expected: str,  # option and syntax, for the message
    convert: Callable[[str], Any] = str,  # raises ValueError for an invalid value
) -> dict[str, Any]:
    """Names and values of an option that may be repeated; raises InputError for anything else."""
    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        try:
            values[name] = convert(value)
        except ValueError:
            separator = ""
        if not (name and separator):
            raise InputError(f"{expected}. Received: '{text}'")
    return values


def print_summary(
    record: Record,
) -> None:
    """Print the result of a run in sentences, such as the comparison with the baselines."""
    for sentence in record.summary.splitlines():
        print_line(f"[bold]{escape(sentence)}[/]")


def relative_path(path: Path) -> Path:
    """A path relative to the working folder, where it lies inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_record(run: Run) -> dict[str, Any]:
    """A run's record for a script: with its folder, and its status as of now."""
    return run.record.model_dump(mode="json") | {"status": run.status, "folder": str(run.folder)}


@contextmanager
def working(
    text: str,  # "starting TensorBoard"
) -> Iterator[None]:
    """Say immediately what a slow command is doing: a spinner in a terminal, a line elsewhere."""
    if errors.is_terminal:
        with errors.status(f"{escape(text)} ..."):
            yield
    else:
        errors.print(f"{escape(text)} ...", soft_wrap=True)
        yield


class JobProgress:
    """Progress display of one run."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.cell: Any = None  # jobs.executor.CellProgress
        self.printed = {"epochs": 0, "trials": 0}  # number of lines
        self.printing = threading.Lock()
        self.stopped = threading.Event()

    def __call__(self, run: Run, cell: Any) -> None:
        """Callback of the job: once with the run, then with each cell."""
        self.run, self.cell = run, cell
        if not sys.stdout.isatty():
            self._print_finished()
            console.print(f"cell {cell.number} of {cell.total}  {escape(cell.heading)}" if cell else f"run {run.id}")

    def __enter__(self) -> "JobProgress":
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self.render, console=console, refresh_per_second=5, transient=True)
            self.live.start()
        else:
            self.thread = threading.Thread(target=self._print_until_stopped, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.set()
        if sys.stdout.isatty():
            self.live.stop()
        else:
            self.thread.join()
            self._print_finished()

    def render(self) -> Group:
        """The live block."""
        record = readable_record(self.run)
        if self.cell is None or record is None:
            return Group(Text("starting a kernel ...", style="dim"))
        bar = ProgressBar(total=self.cell.total, completed=self.cell.number - 1, width=24)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, f"cell {self.cell.number} of {self.cell.total}", Text(self.cell.heading, style="bold"))
        return Group(Text(record.id, style="dim"), row, Text(progress_line(record)))

    def _print_until_stopped(self) -> None:
        while not self.stopped.wait(0.25):
            self._print_finished()

    def _print_finished(self) -> None:
        """Print the epochs and trials that have finished since the last call."""
        with self.printing:
            record = readable_record(self.run)
            if record is None:
                return
            for kind, lines in {"epochs": epoch_lines(record), "trials": trial_lines(self.run)}.items():
                for line in lines[self.printed[kind] :]:
                    print_line(f"  {escape(line)}")
                    self.printed[kind] += 1


class SweepProgress:
    """Progress display of a sweep: a row for each point."""

    def __init__(self) -> None:
        self.states: list[Any] = []  # jobs.points.TrialState
        self.printed: set[tuple[int, str]] = set()
        self.live: Live | None = None

    def update(self, states: list[Any]) -> None:
        """Callback of the sweep for a script: remembers the states."""
        self.states = states

    def __call__(self, states: list[Any]) -> None:
        """Callback of the sweep: without a live table, prints each point that has ended."""
        self.update(states)
        if self.live:
            return
        for state in states:
            if state.status in ("queued", "running", "created") or (state.number, state.status) in self.printed:
                continue
            self.printed.add((state.number, state.status))
            best = headline(state.run.record) if state.run and state.run.record.metrics else None
            values = named_values(dict([best])) if best else ""
            parameters = " ".join(f"{name}={value}" for name, value in state.parameters.items())
            console.print(f"{state.number} of {len(states)}  {state.status}  {escape(parameters)}  {values}")

    def __enter__(self) -> "SweepProgress":
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self.table, console=console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def table(self, ranked: bool = False) -> Table:
        """A row for each point; ranked: the best first."""
        titles = ("run", "status", "time", "at", "result", *self._varying_parameters())
        rows = map(self._row, sorted(self.states, key=_rank) if ranked else self.states)
        return text_grid(titles, rows, right=("time",), whole=[*titles[:3], *titles[4:]], markup=("status",))

    def _varying_parameters(self) -> list[str]:
        names = dict.fromkeys(name for state in self.states for name in state.parameters)
        return [name for name in names if len({str(state.parameters.get(name)) for state in self.states}) > 1]

    def _row(self, state: Any) -> list[str]:
        record = readable_record(state.run)
        values = [str(state.parameters.get(name, "")) for name in self._varying_parameters()]
        if record is None:
            return ["", colored_status(state.status), "", "", "", *values]
        position = f"{state.cell.number}/{state.cell.total} {state.cell.heading}" if state.cell else ""
        if "epoch" in record.progress:
            position += f", epoch {record.progress['epoch']}/{record.progress.get('epochs', '?')}"
        if state.status == "failed" and record.failure and record.failure.message:
            position = record.failure.message.splitlines()[0][:60]
        name, value = headline(record) or ("", None)
        best = f"{name} {format_number(value)}" if name else ""
        seconds = format_seconds(record.seconds)
        return [state.run.id[-4:], colored_status(state.status), seconds, position, best, *values]


def readable_record(run: Run | None) -> Record | None:
    """A run's record as of now; None where it cannot be read: deleted, or being repaired."""
    try:
        return run.record if run else None
    except MlkitError:
        return None


def headline(
    record: Record,
) -> tuple[str, float] | None:  # None when the run has no metrics
    """The most important metric of a run: its reported value, or the best so far while the run has not completed."""
    from mlkit.metrics import lower_is_better

    name = min(record.metrics, key=lambda metric: not metric.startswith(("val_", "test_")), default=None)
    if name is None:
        return None
    values = [value for _, value in record.history.get(name, [])]
    if record.status == "completed" or not values:
        return name, record.metrics[name]
    return name, (min if lower_is_better(name) else max)(values)


def _rank(state: Any) -> tuple[bool, float]:
    """Sorting key of the closing table: best first, unmeasured last."""
    from mlkit.metrics import lower_is_better

    record = readable_record(state.run)
    best = headline(record) if record else None
    if not best or best[1] != best[1]:
        return True, 0.0
    return False, best[1] if lower_is_better(best[0]) else -best[1]


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
    """The reported progress of a running job with its newest metrics."""
    progress = dict(record.progress)
    counted = ", ".join(
        f"{unit} {progress.pop(unit)}/{progress.pop(f'{unit}s', '?')}" for unit in ("epoch", "step") if unit in progress
    )
    return "  ".join(filter(None, (counted, named_values(record.metrics | progress)))) if record.progress else ""


def epoch_lines(
    record: Record,
) -> list[str]:  # "epoch 3  loss 0.1235  val_accuracy 0.9800", one for each completed epoch
    """The metric history of a run, a line for each step."""
    steps: dict[int, dict[str, float]] = {}
    for name, points in record.history.items():
        for step, value in points:
            steps.setdefault(step, {})[name] = value
    return [f"epoch {step}  {named_values(values)}" for step, values in sorted(steps.items())]


def trial_lines(
    run: Run,  # a search, or any other run
) -> list[str]:  # "trial 3 of 20  learning_rate=0.01  val_loss 0.1235", one for each finished trial
    """The finished trials of a search, in the order in which they finished."""
    try:
        header, *events = read_records(run.folder / SEARCH_JOURNAL)
    except (StorageError, ValueError):  # no search, or a search that has not started
        return []
    plan, trials = header["search"], {event["ask"]: event["values"] for event in events if event.get("ask")}
    finished = []
    for event in (event for event in events if "end" in event):
        values = {name.replace("/", "."): value for name, value in trials[event["end"]].items() if "tuner/" not in name}
        hyperparameters = " ".join(f"{name}={format_value(value, 40)}" for name, value in values.items())
        score = "failed" if event["score"] is None else f"{plan['objective']} {format_number(event['score'])}"
        finished.append(f"trial {event['end']} of {plan['trials']}  {hyperparameters}  {score}")
    return finished


def explain_failure(
    run: Run,  # with status failed
) -> None:
    """Print the end of the traceback, and the command that shows more."""
    failure = run.record.failure
    lines = failure.traceback.strip().splitlines()
    if failure.heading:
        errors.print(f"Failed in [bold]{escape(failure.heading)}[/] (cell {failure.cell} of the executed notebook)")
    errors.print("\n".join(f"  {escape(line)}" for line in lines[-12:]), style="dim", soft_wrap=True)
    errors.print(f"All cells until then: [bold]mlkit runs open {run.id}[/]")


@contextmanager
def showing_progress(
    as_json: bool = False,  # a script is waiting: nothing is printed while the job runs
) -> Iterator[Callable[[Run, Any], None]]:  # the progress callback of run_job
    """Context manager that shows a job's progress and explains its failure; the job's exceptions pass through."""
    try:
        if as_json:
            yield lambda run, cell: None
        else:
            with JobProgress() as progress:
                yield progress
    except JobFailedError as error:
        explain_failure(error.run)
        raise
