"""`mlkit run`, `resume`, `reproduce`: execute job notebooks into runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mlkit._display import format_number, format_seconds
from mlkit.cli.app import app
from mlkit.cli.console import (
    JsonOption,
    RunArgument,
    SweepProgress,
    colored_status,
    console,
    parse_pairs,
    print_json,
    print_next,
    print_rows,
    print_section,
    print_summary,
    relative_path,
    run_record,
    showing_progress,
)
from mlkit.errors import InputError, JobFailedError, JobInterruptedError
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore

if TYPE_CHECKING:
    from mlkit.jobs.parameters import ParameterSchema

EngineOption = Annotated[str, typer.Option(metavar="local|ray", help="This machine, or a Ray cluster.")]
ParallelOption = Annotated[int | None, typer.Option("--max-parallel", min=1, help="Runs of a sweep in parallel.")]
TimeoutOption = Annotated[float | None, typer.Option(min=0, help="Seconds a run may take.")]
RetriesOption = Annotated[
    int | None, typer.Option(min=0, help="Retries after a failure in a sweep (0), or the loss of a worker (2).")
]


@app.command(
    epilog="Example: mlkit run train --sweep learning_rate=1e-2,1e-3 --sweep model=cnn,mlp",
    add_help_option=False,
    rich_help_panel="Runs",
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
    random: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only N points, chosen at random.")] = None,
    max_parallel: ParallelOption = None,
    timeout: TimeoutOption = None,
    retries: RetriesOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes that train one model.")] = None,
    servers: Annotated[int, typer.Option(min=0, help="Parameter servers for the workers.")] = 0,
    engine: EngineOption = "local",
    as_json: JsonOption = False,
    show_help: Annotated[bool, typer.Option("--help", "-h", help="Show this, with the job's parameters.")] = False,
) -> None:
    """Execute a job notebook into a new run, or a sweep of runs."""
    if show_help or job is None:
        _explain_run(context, job, show_help)
        return
    values = read_parameter_file(file) | parse_pairs(parameters, "-p takes NAME=VALUE")
    if (sweep or points or max_parallel) and workers:
        raise InputError("--workers is for one run; a sweep takes --max-parallel.")
    if servers and not workers:
        raise InputError("--servers needs --workers, which compute.")
    if sweep or points:
        from mlkit.jobs.sweep import run_sweep

        options = {"max_parallel": max_parallel, "timeout": timeout, "retries": retries or 0, "engine": engine}
        sweep_points = _sweep_points(sweep, points, random)
        execute_sweep(lambda progress: run_sweep(job, sweep_points, values, on_progress=progress, **options), as_json)
    elif workers:
        from mlkit.jobs.distributed import RETRIES, run_distributed

        options = {"workers": workers, "servers": servers, "timeout": timeout, "engine": engine}
        options["retries"] = RETRIES if retries is None else retries
        execute_run(lambda progress: run_distributed(job, values, on_progress=progress, **options), as_json)
    else:
        from mlkit.jobs.executor import run_job

        values |= _engine_parameter(job, engine) | _parallel_parameter(job, max_parallel, values)
        execute_run(lambda progress: run_job(job, values, on_progress=progress, timeout=timeout), as_json)


def _sweep_points(axes: list[str], file: Path | None, count: int | None) -> list[dict[str, Any]]:
    """The points of a sweep from its options."""
    from mlkit.jobs.points import grid_points, parse_sweep_axis, random_points, read_points

    points = grid_points(dict(map(parse_sweep_axis, axes)))
    if file:
        points = [base | point for base in read_points(file) for point in points]
    return random_points(points, count) if count else points


def job_schema(
    job: str,  # name, or path of a notebook
) -> "ParameterSchema":
    """The parameter schema of a job; raises NotFoundError without it."""
    from mlkit.jobs.notebook import find_job, read_notebook
    from mlkit.jobs.parameters import ParameterSchema

    return ParameterSchema.from_notebook(read_notebook(find_job(job)))


def _parallel_parameter(job: str, max_parallel: int | None, values: Mapping[str, Any]) -> dict[str, int]:
    """`--max-parallel` as a parameter of a job that has one, such as tune; raises InputError for another job."""
    if max_parallel is None:
        return {}
    if "max_parallel" not in job_schema(job).parameters:
        raise InputError(
            f"--max-parallel {max_parallel} is for sweeps, and for jobs with a parameter 'max_parallel', such as tune. "
            "Add --sweep NAME=VALUE,... or --points FILE, or leave it out."
        )
    if "max_parallel" in values:
        raise InputError(
            f"Runs in parallel are given twice: --max-parallel {max_parallel} and "
            f"-p max_parallel={values['max_parallel']}. Give one."
        )
    return {"max_parallel": max_parallel}


def _engine_parameter(job: str, engine: str) -> dict[str, str]:
    """`--engine` as a parameter of a job that has one, such as tune; raises InputError for another job."""
    if engine == "local":
        return {}
    if "engine" not in job_schema(job).parameters:
        raise InputError(
            f"--engine {engine} is for sweeps, for --workers, and for jobs with a parameter 'engine', such as tune. "
            "Add --sweep NAME=VALUE,..., --points FILE or --workers N."
        )
    return {"engine": engine}


def _explain_run(context: typer.Context, job: str | None, requested: bool) -> None:
    """The command's help, and below it the job's parameters."""
    if not requested:
        raise InputError("Which job? `mlkit jobs list` shows them; for example: mlkit run train")
    console.print(context.get_help(), markup=False)
    if job:
        console.print(f"\nParameters of {escape(job)} (-p NAME=VALUE):\n")
        print_parameters(job_schema(job))


def print_parameters(
    schema: "ParameterSchema",
) -> None:
    """Print the parameters that a job takes."""
    rows = [
        (p.name, p.type_name, repr(p.default) if p.has_literal_default else "...", p.bounds, p.help)
        for p in schema.parameters.values()
    ]
    print_rows(("name", "type", "default", "range", "meaning"), rows)


def read_parameter_file(file: Path | None) -> dict[str, Any]:
    """Parameters from a YAML file; raises InputError where it holds none."""
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


def execute_run(
    execute: Callable[[Callable], Run],  # takes the progress callback
    as_json: bool,
) -> None:
    """Execute one run, show its progress, and close with its metrics."""
    try:
        with showing_progress(as_json) as progress:
            finished = execute(progress)
    except JobFailedError as error:
        if as_json:
            print_json(run_record(error.run))
        raise
    if as_json:
        print_json(run_record(finished))
    else:
        _print_result(finished)


def execute_sweep(
    execute: Callable[[Callable], Run],  # takes the progress callback
    as_json: bool,
) -> None:
    """Execute a sweep, show its progress, and close with its runs, the best first."""
    progress = SweepProgress()
    try:
        if as_json:
            finished = execute(progress.update)
        else:
            with progress:
                finished = execute(progress)
    except (JobFailedError, JobInterruptedError) as error:
        _print_sweep_result(error.run, progress, as_json)
        raise
    _print_sweep_result(finished, progress, as_json)


def _print_sweep_result(sweep: Run, progress: SweepProgress, as_json: bool) -> None:
    """The closing table of a sweep, best run first."""
    if as_json:
        runs = [run_record(state.run) for state in progress.states if state.run]
        print_json(run_record(sweep) | {"runs": runs})
        return
    console.print(progress.table(ranked=True))
    console.print(f"{colored_status(sweep.status)} {sweep.id}  {format_seconds(sweep.record.seconds)}")
    short = sweep.id[-4:]
    missing = (f"mlkit resume {short}", "run the missing points")
    print_next(
        (f"mlkit runs compare {short}", "its runs side by side, with curves"),
        (f"mlkit tensorboard {short}", "curves and HParams in TensorBoard"),
        missing if sweep.status != "completed" else ("mlkit runs list", "all runs"),
    )


def _print_result(run: Run) -> None:
    """The result of a completed job: its summary, such as the comparison with the baselines, and its metrics."""
    record = run.record
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in record.metrics.items():
        table.add_row(name, f"[bold]{format_number(value)}[/]")
    table.add_row("time", format_seconds(record.seconds))
    table.add_row("archived in", str(relative_path(run.folder)))
    console.print(f"{colored_status('completed')} {run.id}")
    print_summary(record)
    console.print(table)
    print_next(*_next_commands(run))


def _next_commands(run: Run) -> list[tuple[str, str]]:
    """The three commands that usually follow, with their purpose."""
    short = run.id[-4:]
    commands = [(f"mlkit runs open {short}", "read the executed notebook")]
    if (run.folder / "tensorboard").is_dir():
        commands.append((f"mlkit tensorboard {short}", "curves in TensorBoard"))
    if (run.folder / "saved_model").is_dir():
        commands.append((f"mlkit evaluate {short}", "evaluate its model, also on new data"))
    return [*commands, (f"mlkit runs show {short}", "its whole record"), ("mlkit runs list", "all runs")][:3]


@app.command(epilog="Example: mlkit resume k3f9", rich_help_panel="Runs")
def resume(
    reference: RunArgument = "latest",
    max_parallel: ParallelOption = None,
    timeout: TimeoutOption = None,
    retries: RetriesOption = None,
    engine: EngineOption = "local",
    as_json: JsonOption = False,
) -> None:
    """Resume an interrupted or failed run, or a sweep."""
    from mlkit.jobs.executor import resume_run
    from mlkit.jobs.sweep import resume_sweep

    run = RunStore().get(reference)
    if run.record.points and not (run.folder / "notebook.ipynb").exists():  # a search has a notebook, a sweep has none
        options = {"max_parallel": max_parallel, "timeout": timeout, "retries": retries or 0, "engine": engine}
        execute_sweep(lambda progress: resume_sweep(run, on_progress=progress, **options), as_json)
    elif (run.record.model_extra or {}).get("worker_group"):
        from mlkit.jobs.distributed import RETRIES, resume_distributed

        options = {"retries": RETRIES if retries is None else retries, "timeout": timeout, "engine": engine}
        execute_run(lambda progress: resume_distributed(run, on_progress=progress, **options), as_json)
    else:
        execute_run(lambda progress: resume_run(run, on_progress=progress, timeout=timeout), as_json)


@app.command(epilog="Example: mlkit reproduce k3f9 --tolerance 0.001", rich_help_panel="Runs")
def reproduce(
    reference: RunArgument = "latest",
    tolerance: Annotated[float, typer.Option(min=0, help="Relative difference of metrics that passes.")] = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Execute a run again from its record and report differences."""
    from mlkit.jobs.reproduction import reproduce as reproduce_run

    run = RunStore().get(reference)
    with showing_progress(as_json) as progress:
        repeated, report = reproduce_run(run, tolerance, on_progress=progress)
    if as_json:
        print_json(report.record())
    else:
        for title, rows in report.sections():
            print_section(title, rows)
        color = {"identical": "green", "different": "red"}.get(report.result, "yellow")
        command = f"mlkit runs diff {run.id[-4:]} {repeated.id[-4:]}"
        console.print(f"\n{repeated.id} is [{color}]{report.result}[/]. Side by side: [bold]{command}[/]")
    if report.result == "different":
        raise typer.Exit(1)
