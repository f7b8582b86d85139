"""`mlkit`: run jobs, look at what they left, and hand it on. Quick to answer, useful in scripts, honest in its exit codes."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import mlkit
from mlkit._display import format_number, format_seconds
from mlkit._files import write_atomic
from mlkit.cli.console import JsonOption, RunArgument, console, errors, named_values, print_json, print_rows, watched
from mlkit.cli.data import data
from mlkit.cli.models import models
from mlkit.cli.predict import prediction
from mlkit.cli.registry import registry
from mlkit.cli.serving import serving
from mlkit.config import load_settings, variable_name
from mlkit.errors import InputError, JobFailedError, JobInterruptedError, MlkitError, NotFoundError
from mlkit.runs.query import RunSummary
from mlkit.runs.record import Record
from mlkit.runs.run import STATUS_COLORS, Run, RunStore, RunTable

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: half the time to show it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From notebook cell to served answer: run notebooks as jobs, keep every run, find the best one again.",
)
EngineOption = Annotated[str, typer.Option(metavar="local|ray", help="Where runs go: here, or on a Ray cluster.")]
RetriesOption = Annotated[
    int | None, typer.Option(min=0, help="Tries after a failure in a sweep (0), or after the death of a worker (2).")
]


def main() -> None:
    """Entry point: run a command, turn the kit's errors into messages and exit codes."""
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
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"mlkit {mlkit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    settings: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Override a setting.")] = [],  # noqa: B006
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""
    overrides = dict(_pair(text, "--set") for text in settings)
    load_settings(overrides)  # refuses what is wrong
    os.environ.update({variable_name(name): value for name, value in overrides.items()})  # kernels inherit it


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise InputError(f"{option} takes NAME=VALUE; '{text}' came.")
    return name, value


@app.command(
    epilog="Example: mlkit run train --sweep learning_rate=1e-2,1e-3 --sweep model=cnn,mlp", add_help_option=False
)
def run(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(help="Name of a job, or path of a notebook.")] = None,
    parameters: Annotated[list[str], typer.Option("-p", metavar="NAME=VALUE", help="Set a parameter.")] = [],  # noqa: B006
    file: Annotated[Path | None, typer.Option("-f", metavar="FILE", help="Read parameters from YAML.")] = None,
    sweep: Annotated[list[str], typer.Option(metavar="NAME=VALUE,...", help="Run at each value.")] = [],  # noqa: B006
    points: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run at each parameter set in a YAML list.")
    ] = None,
    draw: Annotated[int | None, typer.Option("--random", min=1, help="Only so many points, at random.")] = None,
    at_once: Annotated[int | None, typer.Option("--jobs", min=1, help="Runs at a time.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds a run may take.")] = None,
    retries: RetriesOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train one model together.")] = None,
    servers: Annotated[int, typer.Option(min=0, help="Parameter servers for the workers.")] = 0,
    engine: EngineOption = "local",
    as_json: JsonOption = False,
    show_help: Annotated[bool, typer.Option("--help", "-h", help="Show this, with the job's parameters.")] = False,
) -> None:
    """Execute a job notebook into a new run, in several processes, or at many points of a sweep."""
    if show_help or job is None:
        _explain_run(context, job, show_help)
        return
    given = _read_parameters(file) | dict(_pair(text, "-p") for text in parameters)
    if (sweep or points or at_once) and workers:
        raise InputError("--workers is for one run; a sweep has --jobs.")
    if sweep or points:
        how = {"jobs": at_once, "timeout": timeout, "retries": retries or 0, "engine": engine}
        _run_sweep(job, given, sweep, points, draw, as_json, **how)
        return
    if servers and not workers:
        raise InputError("--servers needs --workers, which say who computes.")
    if workers:
        from mlkit.jobs.distributed import RETRIES, run_distributed

        how = {"workers": workers, "servers": servers, "timeout": timeout, "engine": engine}
        how["retries"] = RETRIES if retries is None else retries
        _execute(lambda watch: run_distributed(job, given, watch=watch, **how), as_json)
        return
    from mlkit.jobs.executor import run_job

    given |= _engine_parameter(job, engine) | _jobs_parameter(job, at_once, given)
    _execute(lambda watch: run_job(job, given, watch=watch, timeout=timeout), as_json)


def _jobs_parameter(job: str, at_once: int | None, given: Mapping[str, Any]) -> dict[str, int]:
    """Runs at a time as a parameter of a job that has one, a search for example; raises InputError for another job."""
    from mlkit.jobs.notebook import find_job, read_notebook
    from mlkit.jobs.parameters import ParameterSchema

    if at_once is None:
        return {}
    if "jobs" not in ParameterSchema.of(read_notebook(find_job(job))).parameters:
        raise InputError(
            f"--jobs {at_once} is for sweeps, and for jobs with a parameter 'jobs', such as tune. "
            "Add --sweep NAME=VALUE,... or --points FILE, or leave it out."
        )
    if "jobs" in given:
        raise InputError(f"Runs at a time are given twice: --jobs {at_once} and -p jobs={given['jobs']}. Give one.")
    return {"jobs": at_once}


def _engine_parameter(job: str, engine: str) -> dict[str, str]:
    """The engine as a parameter of a job that has one, a search for example; raises InputError for one that has not."""
    from mlkit.jobs.notebook import find_job, read_notebook
    from mlkit.jobs.parameters import ParameterSchema

    if engine == "local":
        return {}
    if "engine" not in ParameterSchema.of(read_notebook(find_job(job))).parameters:
        raise InputError(
            f"--engine {engine} is for sweeps, for --workers, and for jobs with a parameter 'engine', such as tune. "
            "Add --sweep NAME=VALUE,..., --points FILE or --workers N."
        )
    return {"engine": engine}


def _explain_run(context: typer.Context, job: str | None, asked: bool) -> None:
    """The command's help, and below it the job's parameters."""
    if not asked:
        raise InputError("Which job? `mlkit jobs` lists them; for example: mlkit run train")
    console.print(context.get_help(), markup=False)
    if job:
        from mlkit.jobs.notebook import find_job, read_notebook
        from mlkit.jobs.parameters import ParameterSchema

        console.print(f"\nParameters of {escape(job)} (-p NAME=VALUE):\n")
        _print_contract(ParameterSchema.of(read_notebook(find_job(job))))


def _execute(execute: Callable[[Callable], Run], as_json: bool) -> None:
    """Execute one run while a person or a program waits for it."""
    try:
        with watched(as_json) as watch:
            finished = execute(watch)
    except JobFailedError as error:
        if as_json:
            print_json(_record(error.run))
        raise
    if as_json:
        print_json(_record(finished))
    else:
        _close(finished)


def _record(run: Run) -> dict[str, Any]:
    """A run's record for a script: with its folder, and its state as of now."""
    return run.record.model_dump(mode="json") | {"status": run.status, "folder": str(run.folder)}


def _run_sweep(
    job: str, given: dict, axes: list[str], file: Path | None, draw: int | None, as_json: bool, **how: Any
) -> None:
    from mlkit.jobs.points import grid_points, parse_sweep_axis, read_points, random_points
    from mlkit.jobs.sweep import run_sweep

    points = grid_points(dict(map(parse_sweep_axis, axes)))
    if file:
        points = [base | point for base in read_points(file) for point in points]
    if draw:
        points = random_points(points, draw)
    _sweep(lambda watch: run_sweep(job, points, given, watch=watch, **how), as_json)


def _sweep(execute: Callable[[Callable], Run], as_json: bool) -> None:
    """Execute a sweep while a person or a program waits for it."""
    watch = SweepWatch()
    try:
        if as_json:
            finished = execute(watch.update)
        else:
            with watch:
                finished = execute(watch)
    except (JobFailedError, JobInterruptedError) as error:
        _close_sweep(error.run, watch, as_json)
        raise
    _close_sweep(finished, watch, as_json)


def _close_sweep(sweep: Run, watch: "SweepWatch", as_json: bool) -> None:
    """The closing table of a sweep, best run first."""
    if as_json:
        runs = [_record(state.run) for state in watch.states if state.run]
        print_json(_record(sweep) | {"runs": runs})
        return
    console.print(watch.table(ranked=True))
    console.print(f"{_status(sweep.status)} {sweep.id}  {format_seconds(sweep.record.seconds)}")
    console.print("\nNext:")
    short = sweep.id[-4:]
    commands = [
        (f"mlkit compare {short}", "its runs side by side, with curves"),
        (f"mlkit board {short}", "curves and HParams in TensorBoard"),
        (f"mlkit resume {short}", "run what is missing") if sweep.status != "completed" else ("mlkit runs", "all runs"),
    ]
    for command, meaning in commands:
        console.print(f"  [bold]{command:42}[/] [dim]{meaning}[/]")


class SweepWatch:
    """What a person sees while a sweep runs."""

    def __init__(self) -> None:
        self.states: list[Any] = []  # sweeps.PointState
        self.told: set[tuple[int, str]] = set()
        self.live: Live | None = None

    def update(self, states: list[Any]) -> None:
        """Called by the sweep whenever something has changed."""
        self.states = states

    def __call__(self, states: list[Any]) -> None:
        """The same, and tell of runs that have ended where no table is shown."""
        self.update(states)
        if self.live:
            return
        for state in states:
            if state.status not in ("waiting", "running", "created") and (state.number, state.status) not in self.told:
                self.told.add((state.number, state.status))
                values = (
                    named_values(dict([headline(state.run.record)])) if state.run and state.run.record.metrics else ""
                )
                chosen = " ".join(f"{name}={value}" for name, value in state.parameters.items())
                console.print(f"{state.number} of {len(states)}  {state.status}  {escape(chosen)}  {values}")

    def __enter__(self) -> "SweepWatch":
        if sys.stdout.isatty():
            self.live = Live(get_renderable=self.table, console=console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def table(self, ranked: bool = False) -> Table:
        """A row for each point; ranked: the best first."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("run", "status", "time", "at", "best", *self._varying()):
            table.add_column(title, no_wrap=title != "at", justify="right" if title == "time" else "left")
        for state in sorted(self.states, key=_rank) if ranked else self.states:
            table.add_row(*self._row(state))
        return table

    def _varying(self) -> list[str]:
        """Parameters that are not the same at all points."""
        names = dict.fromkeys(name for state in self.states for name in state.parameters)
        return [name for name in names if len({str(state.parameters.get(name)) for state in self.states}) > 1]

    def _row(self, state: Any) -> list[str]:
        record = _readable(state.run)
        chosen = [escape(str(state.parameters.get(name, ""))) for name in self._varying()]
        if record is None:
            return ["", _status(state.status), "", "", "", *chosen]
        at = f"{state.cell.number}/{state.cell.total} {state.cell.heading}" if state.cell else ""
        if "epoch" in record.progress:
            at += f", epoch {record.progress['epoch']}/{record.progress.get('epochs', '?')}"
        failed = state.status == "failed" and record.failure
        told = record.failure.message.splitlines()[0][:60] if failed and record.failure.message else at
        name, value = headline(record) or ("", None)
        best = f"{name} {format_number(value)}" if name else ""
        return [state.run.id[-4:], _status(state.status), format_seconds(record.seconds), escape(told), best, *chosen]


def _readable(run: Run | None) -> Record | None:
    """A run's record as of now; None where there is none to be read."""
    try:
        return run.record if run else None
    except MlkitError:  # deleted or being repaired under our eyes: nothing to say
        return None


def headline(
    record: Record,
) -> tuple[str, float] | None:  # None when the run has measured nothing
    """The metric that matters most in a run, with its best value so far."""
    from mlkit.metrics import lower_is_better

    names = RunTable([_summary(record)], 1, Path()).metric_names(most=1)
    if not names:
        return None
    values = [value for _, value in record.history.get(names[0], [])] or [record.metrics[names[0]]]
    return names[0], (min if lower_is_better(names[0]) else max)(values)


def _summary(record: Record) -> RunSummary:
    return RunSummary(record.id, record.job, record.status, "", None, record.metrics, {}, {})


def _rank(state: Any) -> tuple[bool, float]:
    """Order of the closing table."""
    from mlkit.metrics import lower_is_better

    record = _readable(state.run)
    found = headline(record) if record else None
    if not found or found[1] != found[1]:
        return True, 0.0
    return False, found[1] if lower_is_better(found[0]) else -found[1]


@app.command(epilog="Example: mlkit resume k3f9")
def resume(
    reference: RunArgument = "latest",
    at_once: Annotated[int | None, typer.Option("--jobs", min=1, help="Runs at a time, of a sweep.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds a run may take.")] = None,
    retries: RetriesOption = None,
    engine: EngineOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Go on with an interrupted or failed run, or with what is missing of a sweep."""
    from mlkit.jobs.executor import resume_run
    from mlkit.jobs.sweep import resume_sweep

    run = RunStore().get(reference)
    if run.record.points and not (run.folder / "notebook.ipynb").exists():  # a search has a notebook, a sweep has none
        how = {"jobs": at_once, "timeout": timeout, "retries": retries or 0, "engine": engine}
        _sweep(lambda watch: resume_sweep(run, watch=watch, **how), as_json)
        return
    if (run.record.model_extra or {}).get("crew"):
        from mlkit.jobs.distributed import RETRIES, resume_distributed

        how = {"retries": RETRIES if retries is None else retries, "timeout": timeout, "engine": engine}
        _execute(lambda watch: resume_distributed(run, watch=watch, **how), as_json)
        return
    _execute(lambda watch: resume_run(run, watch=watch, timeout=timeout), as_json)


@app.command(epilog="Example: mlkit reproduce k3f9 --tolerance 0.001")
def reproduce(
    reference: RunArgument = "latest",
    tolerance: Annotated[float, typer.Option(min=0, help="Relative difference of metrics that still passes.")] = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Execute a run again from its record, and say whether the same came out."""
    from mlkit.jobs import reproduction

    run = RunStore().get(reference)
    with watched(as_json) as watch:
        again, receipt = reproduction.reproduce(run, tolerance, watch=watch)
    if as_json:
        print_json(receipt.record())
    else:
        for title, rows in receipt.sections():
            _print_section(title, rows)
        _print_verdict(run, again, receipt.verdict)
    if receipt.verdict == "different":
        raise typer.Exit(1)


def _print_verdict(run: Run, again: Run, verdict: str) -> None:
    color = {"identical": "green", "different": "red"}.get(verdict, "yellow")
    command = f"mlkit diff {run.id[-4:]} {again.id[-4:]}"
    console.print(f"\n{again.id} is [{color}]{verdict}[/]. Side by side: [bold]{command}[/]")


@app.command(epilog="Example: mlkit jobs train")
def jobs(
    job: Annotated[
        str | None, typer.Argument(help="Name of a job, or path of a notebook; all jobs by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, or the parameters of one."""
    from mlkit.jobs.notebook import find_job, job_summary, list_jobs, read_notebook
    from mlkit.jobs.parameters import ParameterSchema

    if job is None:
        rows = [(name, job_summary(read_notebook(path))) for name, path in list_jobs().items()]
        print_rows(("name", "summary"), rows, as_json)
        return
    contract = ParameterSchema.of(read_notebook(find_job(job)))
    if as_json:
        print_json(contract.model.model_json_schema())
        return
    _print_contract(contract)


def _print_contract(contract: Any) -> None:
    """What a job takes."""
    rows = [
        (p.name, p.written, repr(p.default) if p.literal else "...", p.range, p.help)
        for p in contract.parameters.values()
    ]
    print_rows(("name", "type", "default", "range", "meaning"), rows)


def _read_parameters(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The parameters file {file} cannot be read: {error}") from None
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise InputError(f"The parameters file {file} should map names to values, for example 'epochs: 20'.")
    return dict(values)


def _close(run: Run) -> None:
    """The closing table of a completed job."""
    record = run.record
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in record.metrics.items():
        table.add_row(name, f"[bold]{format_number(value)}[/]")
    table.add_row("time", format_seconds(record.seconds))
    table.add_row("archived in", str(_near(run.folder)))
    console.print(f"[{STATUS_COLORS['completed']}]completed[/] {run.id}")
    console.print(table)
    console.print("\nNext:")
    for command, meaning in _next_commands(run):
        console.print(f"  [bold]{command:42}[/] [dim]{meaning}[/]")


def _next_commands(run: Run) -> list[tuple[str, str]]:
    """The three commands that make sense now, with their meaning."""
    short = run.id[-4:]
    commands = [(f"mlkit open {short}", "read the executed notebook")]
    if (run.folder / "tensorboard").is_dir():
        commands.append((f"mlkit board {short}", "curves in TensorBoard"))
    if (run.folder / "saved_model").is_dir():
        commands.append((f"mlkit evaluate {short}", "measure its model, on new data too"))
    return [*commands, (f"mlkit show {short}", "everything that is known about it"), ("mlkit runs", "all runs")][:3]


def _near(path: Path) -> Path:
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _status(status: str) -> str:
    return f"[{STATUS_COLORS.get(status, 'default')}]{status}[/]"


def _runs_table(runs: list[RunSummary], metric_names: list[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("time", *metric_names):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("given", overflow="fold")
    for run in runs:
        metrics = [format_number(run.metrics.get(name)) for name in metric_names]
        given = " ".join(f"{name}={value}" for name, value in run.parameters.items())
        note = f"  [red]{escape(run.error[:80])}[/]" if run.status in ("failed", "damaged") else ""
        table.add_row(run.id, _status(run.status), format_seconds(run.seconds), *metrics, escape(given) + note)
    return table


@app.command(epilog="Example: mlkit runs --where 'val_accuracy > 0.97' --sort val_accuracy --limit 5")
def runs(
    job: Annotated[str | None, typer.Option(help="Only runs of this job.")] = None,
    status: Annotated[str | None, typer.Option(help="Only runs in this state.")] = None,
    where: Annotated[str | None, typer.Option(help="Condition over metrics and parameters.")] = None,
    sort: Annotated[str | None, typer.Option(help="Metric or parameter to sort by, largest first.")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest (or oldest) first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List runs, the newest first."""
    archive = RunStore()
    table = archive.list(job, status, where, sort, ascending, limit)
    if as_json:
        print_json([vars(run) | {"folder": str(archive.root / run.id)} for run in table])
        return
    if not len(table):
        console.print(
            f"No runs{' match' if where or job or status else ''} in {archive.root}. Make one: mlkit run train"
        )
        return
    columns = [sort] if sort else []
    names = list(dict.fromkeys([*columns, *table.metric_names(most=2 if console.width < 110 else 4)]))
    console.print(_runs_table(table.runs, [name for name in names if any(name in run.metrics for run in table)]))
    if table.matching > len(table):
        console.print(f"[dim]{len(table)} of {table.matching}; --limit shows more[/]")


@app.command(epilog="Example: mlkit show latest")
def show(
    reference: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show everything that is known about a run."""
    run = RunStore().get(reference)
    if as_json:
        print_json(_record(run))
        return
    record = run.record
    console.print(f"[bold]{run.id}[/]  {_status(run.status)}  {format_seconds(record.seconds)}")
    for title, rows in _sections(record):
        if rows:
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
            for row in rows:
                table.add_row(*(escape(str(cell)) for cell in row))
            console.print(f"\n[dim]{title}[/]")
            console.print(table)


def _sections(record: Record) -> list[tuple[str, list[tuple]]]:
    """What `show` shows: titles with their rows."""
    failure, code, machine = record.failure, record.code, record.environment
    size = sum(artifact.size for artifact in record.artifacts)
    return [
        ("failure", [("error", f"{failure.error}: {failure.message}"), ("in", failure.heading)] if failure else []),
        ("metrics", [(name, format_number(value)) for name, value in record.metrics.items()]),
        ("parameters", [(n, v, "given" if n in record.parameters else "") for n, v in record.values.items()]),
        (
            "data",
            [
                (d.get("name", ""), f"{d.get('rows', '?')} rows", str(d.get("fingerprint", ""))[:16])
                for d in record.data
            ],
        ),
        ("parents", [(parent,) for parent in record.parents]),
        (
            "cells",
            [(cell.heading, cell.status, format_seconds(cell.seconds)) for cell in record.cells if cell.seconds >= 0.1],
        ),
        (
            "code",
            [(code.branch, code.commit[:12], "with uncommitted changes" if code.uncommitted else "")] if code else [],
        ),
        ("machine", [(machine.platform, f"Python {machine.python}", f"{machine.processors} CPUs")] if machine else []),
        ("files", [(f"{len(record.artifacts)} files", f"{size / 1e6:.1f} MB")] if record.artifacts else []),
    ]


@app.command(epilog="Example: mlkit diff t3ny w8hk")
def diff(
    first: RunArgument,
    second: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Show what is different between two runs: parameters, data, code, packages, cells."""
    from mlkit.runs.diff import diff_runs

    archive = RunStore()
    difference = diff_runs(archive.get(first), archive.get(second))
    if as_json:
        print_json(difference.record())
        return
    for title, rows in difference.sections():
        _print_section(title, rows)
    if difference.same:
        console.print("\n[bold]The same[/] but for what varies by nature (times, ids, folders).")


def _print_section(title: str, rows: list[tuple]) -> None:
    """A title with its rows; lines that a difference marks with - and + are coloured."""
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


@app.command(epilog="Example: mlkit compare --job train --where 'val_accuracy > 0.9' --html sweep.html")
def compare(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to compare; or use the options below.")
    ] = None,
    job: Annotated[str | None, typer.Option(help="Only runs of this job.")] = None,
    where: Annotated[str | None, typer.Option(help="Condition over metrics and parameters.")] = None,
    limit: Annotated[int, typer.Option(min=2, help="At most so many, the newest.")] = 20,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: what differs in their parameters, their metrics, their curves."""
    from mlkit.runs.compare import compare_runs

    comparison = compare_runs(_chosen_runs(references or [], job, where, limit))
    saved = comparison.save_html(page) if page else None
    if as_json:
        print_json(comparison.record() | ({"html": str(saved.absolute())} if saved else {}))
        return
    console.print(_comparison_table(comparison))
    for title, rows in comparison.sections()[1:]:
        _print_section(title, rows)
    if saved:
        console.print(f"\nWith plots, to open in a browser: [bold]{escape(str(saved))}[/]")


def _chosen_runs(references: list[str], job: str | None, where: str | None, limit: int) -> list[Run]:
    """Runs by name, or those that meet the conditions; a damaged one cannot be compared and is passed over."""
    archive = RunStore()
    if references and (job or where):
        raise InputError("Give runs, or --job and --where, not both.")
    if references:
        return [run for reference in references for run in _with_children(archive.get(reference))]
    listed = [summary for summary in archive.list(job=job, where=where) if summary.status != "damaged"]
    return [archive.get(summary.id) for summary in listed[:limit]]


def _comparison_table(comparison: Any, most: int = 6) -> Table:
    """Runs with the parameters that differ and the metrics, the best values in green."""
    metrics = comparison.metrics[: most if console.width > 110 else 2]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in ("time", *metrics):
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    best = {name: comparison.best(name) for name in metrics}
    for run, label in zip(comparison.runs, comparison.labels, strict=True):
        numbers = [(format_number(run.metrics.get(name)), run.id in best[name]) for name in metrics]
        marked = [f"[bold green]{text}[/]" if is_best else text for text, is_best in numbers]
        table.add_row(run.id, _status(run.status), format_seconds(run.seconds), *marked, escape(label))
    return table


@app.command("open", epilog="Example: mlkit open latest")
def open_run(
    reference: RunArgument = "latest",
    as_json: JsonOption = False,
) -> None:
    """Open a run's executed notebook in the browser."""
    run = RunStore().get(reference)
    page = run.folder / "notebook.html"
    if not page.exists():
        raise NotFoundError(f"{run.id} has no notebook.html: it is {run.status} and was not executed as a job.")
    if as_json:
        print_json({"id": run.id, "notebook": str(page)})
        return
    opened = webbrowser.open(page.as_uri())
    console.print(str(page) if opened else f"No browser to be had here; the notebook is at {page}")


@app.command(epilog="Example: mlkit board k3f9 x7p2  (without a run: the whole archive)")
def board(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs to look at; all by default.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 picks a free one.")] = 6006,
    as_json: JsonOption = False,
) -> None:
    """Look at runs in TensorBoard; Ctrl-C ends it."""
    archive = RunStore()
    chosen = [run for reference in references or [] for run in _with_children(archive.get(reference))]
    if references and not any((run.folder / "tensorboard").is_dir() for run in chosen):
        raise NotFoundError(f"None of {', '.join(references)} has TensorBoard logs.")
    if not chosen and not any(archive.root.glob("*/tensorboard")):
        raise NotFoundError(f"No run in {archive.root} has TensorBoard logs. Make one: mlkit run train")
    with tempfile.TemporaryDirectory() as links:
        for run in chosen:
            if (run.folder / "tensorboard").is_dir():
                Path(links, run.id).symlink_to(run.tensorboard)
        logs = links if chosen else str(archive.root)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", str(port)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            _announce(process, as_json)
        except KeyboardInterrupt:
            pass
        finally:
            process.terminate()
            process.wait()


def _with_children(run: Run) -> list[Run]:
    """A run, or in place of a sweep the runs it has made."""
    points = run.record.points
    archive = RunStore(run.folder.parent)
    return [archive.get(point.run) for point in points if point.run] if points else [run]


def _announce(process: subprocess.Popen, as_json: bool) -> None:
    """Pass on what TensorBoard says until it serves, then wait for its end."""
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"http://\S+", line):
            if as_json:
                print_json({"url": found[0], "pid": process.pid})
            else:
                console.print(f"TensorBoard is at [bold]{found[0]}[/]   (Ctrl-C ends it)")
            sys.stdout.flush()
            break
    for _ in process.stderr:
        pass  # keep its pipe from filling up
    if process.wait() > 0:
        raise InputError(f"TensorBoard could not start: {''.join(said[-3:]).strip()}")


@app.command(epilog="Example: mlkit rm k3f9 --yes")
def rm(
    references: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs to delete.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete runs with everything in their folders."""
    archive = RunStore()
    chosen = [archive.get(reference) for reference in dict.fromkeys(references)]
    for run in chosen:
        if _is_running(run):
            raise InputError(f"{run.id} is running; stop it first.")
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise InputError("Nobody is here to confirm; add --yes to delete.")
        typer.confirm(f"Delete {', '.join(run.id for run in chosen)}?", abort=True)
    for run in chosen:
        archive.delete(run)
    if as_json:
        print_json({"deleted": [run.id for run in chosen]})
    else:
        console.print(f"Deleted {', '.join(run.id for run in chosen)}")


def _is_running(run: Run) -> bool:
    try:
        return run.status in ("created", "running")
    except MlkitError:
        return False  # a damaged record has no say in its deletion


warm = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keep kernels warm between commands.")
app.add_typer(warm, name="warm")


@warm.command("start", epilog="Example: mlkit warm start --idle-timeout 600")
def warm_start(
    idle_timeout: Annotated[int | None, typer.Option(min=1, help="Seconds it stays after its last use.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Import the libraries once; kernels of this environment are forked from then on."""
    from mlkit.jobs.kernels import CAN_FORK, WarmServer

    if not CAN_FORK:
        raise InputError("Warm kernels need Linux; jobs run in ordinary kernels here.")
    keep = idle_timeout or load_settings().kernels.idle_timeout
    server = WarmServer.fitting(os.environ)
    with errors.status("importing TensorFlow ..."):
        server.hold(keep).close()
    if as_json:
        print_json(server.ask("status"))
        return
    console.print(f"warm; ends {format_seconds(keep)} after its last use, or by [bold]mlkit warm stop[/]")


@warm.command("status", epilog="Example: mlkit warm status --json")
def warm_status(as_json: JsonOption = False) -> None:
    """List the warm servers that run."""
    from mlkit.jobs.kernels import running_servers

    servers = running_servers()
    if as_json:
        print_json(servers)
        return
    if not servers:
        console.print("No kernels are warm. Start some: mlkit warm start")
        return
    rows = [
        (
            server["key"],
            str(server["pid"]),
            format_seconds(time.time() - server["started"]),
            str(len(server["kernels"])),
            f"{server['memory'] / 1e6:.0f} MB",
            format_seconds(server["keep"]) if server["keep"] else "with its owner",
        )
        for server in servers
    ]
    print_rows(("environment", "process", "age", "kernels", "memory", "stays"), rows)


@warm.command("stop", epilog="Example: mlkit warm stop")
def warm_stop(as_json: JsonOption = False) -> None:
    """Stop every warm server; kernels that are at work go on."""
    from mlkit.jobs.kernels import WarmServer, running_servers

    stopped = [WarmServer(server["key"]).ask("stop") for server in running_servers()]
    if as_json:
        print_json(stopped)
        return
    console.print(f"Stopped {len(stopped)} warm server{'' if len(stopped) == 1 else 's'}.")


app.add_typer(data, name="data")
app.add_typer(models)  # without a name: its commands are the app's own
app.add_typer(registry)
app.add_typer(serving)
app.add_typer(prediction)
IGNORED_FILES = "runs/\nmodels/\nlogs/\n.ipynb_checkpoints/\n__pycache__/\n"


def settings_template() -> str:
    """A settings.ini that says what can be set and what happens otherwise."""
    lines, current = ["# Settings of this project; each line shows the default.\n"], ""
    from mlkit.config import known_settings

    for section, key, field in known_settings().values():
        if section != current:
            lines.append(f"\n[{section}]\n")
            current = section
        lines.append(f"# {field.description}\n{key} = {field.default}\n")
    return "".join(lines)


@app.command(epilog="Example: mlkit new churn && cd churn && mlkit run train")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make; it may exist if it is empty.")],
    as_json: JsonOption = False,
) -> None:
    """Start a project: settings, jobs, and a first notebook to change."""
    from mlkit.jobs.notebook import shipped_notebooks

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another name.")
    jobs = sorted(shipped_notebooks("jobs").glob("*.ipynb"))
    first = shipped_notebooks("tutorials") / "first_model.ipynb"
    (folder / "jobs").mkdir(parents=True)
    for source, target in [*((path, folder / "jobs" / path.name) for path in jobs), (first, folder / first.name)]:
        shutil.copyfile(source, target)
    write_atomic(folder / "settings.ini", settings_template())
    write_atomic(folder / ".gitignore", IGNORED_FILES)
    if as_json:
        print_json(
            {"folder": str(folder.absolute()), "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))}
        )
        return
    console.print(f"{folder} is ready:")
    for line in (f"cd {folder}", "mlkit run train", f"jupyter lab {first.name}"):
        console.print(f"  [bold]{line}[/]")


@app.command(epilog="Example: mlkit --set runs.root=/archive settings")
def settings(as_json: JsonOption = False) -> None:
    """Show every setting, its value and where that came from."""
    print_rows(("name", "value", "from", "meaning"), load_settings().rows(), as_json)
