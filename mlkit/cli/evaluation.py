"""`mlkit evaluate` and `mlkit gate`: evaluate a model on any data, and decide by rules whether it may be published."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mlkit._display import format_number
from mlkit.cli.app import app
from mlkit.cli.console import (
    JsonOption,
    RunArgument,
    console,
    print_json,
    print_line,
    print_unsigned,
    showing_progress,
    text_grid,
)
from mlkit.config import load_settings
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore

VariantOption = Annotated[
    str, typer.Option("--variant", metavar="NAME", help="savedmodel, or a conversion: float32, float16, int8, ...")
]
ChampionOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Model to compare with on the same rows: a run, NAME@alias, or a folder."),
]
LOSS_METRICS = {"binary": "log_loss", "multiclass": "log_loss", "regression": "mean_absolute_error"}
MAX_SLICES = 10  # rows of the table


@app.command(
    epilog="Example: mlkit evaluate latest --slice device --slice device,age --group city_tier",
    rich_help_panel="Evaluate and export",
)
def evaluate(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, NAME@alias, NAME/3, or a folder with a model.")
    ] = "latest",
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="New data; by default the model's own test rows.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Label column of the new data.")] = None,
    slices: Annotated[
        list[str], typer.Option("--slice", metavar="COLUMN[,COLUMN]", help="Slice by values, or pairs of values.")
    ] = [],  # noqa: B006
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="Groups for the fairness gap.")] = None,
    lists: Annotated[
        str | None, typer.Option("--list", metavar="COLUMN", help="Rows with the same value are one ranked list.")
    ] = None,
    variant: VariantOption = "savedmodel",
    streamed: Annotated[bool, typer.Option("--streamed", help="Read Parquet larger than memory in batches.")] = False,
    rules: Annotated[Path | None, typer.Option("--gate", metavar="FILE", help="Gate rules to apply.")] = None,
    against: ChampionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on any data, by slices and groups."""
    from mlkit.jobs.executor import run_job
    from mlkit.registry.gate import read_rules
    from mlkit.registry.resolve import resolve_model

    if rules:
        read_rules(rules)
    candidate = resolve_model(reference, variant)
    options = {
        "run": candidate.reference,
        "kind": variant,
        "dataset": data,
        "label": label,
        "slices": [text.split(",") if "," in text else text for text in slices],
        "groups": group,
        "lists": lists,
        "streamed": streamed,
        "against": resolve_model(against).reference if against else None,
        "gate": str(rules) if rules else None,
    }
    parameters = {name: value for name, value in options.items() if value is not None}
    with showing_progress(as_json) as progress:
        run = run_job("evaluate", parameters, on_progress=progress)
    report = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    result = json.loads((run.folder / "gate.json").read_text(encoding="utf-8")) if rules else None
    if as_json:
        print_json(report | ({"gate": result} if result else {}))
    else:
        _print_report(run, report)
        if result:
            _print_gate_result(result)
            if candidate.run:
                print_unsigned(candidate.run)
    if result and not result["passed"]:
        raise typer.Exit(1)


def _print_report(run: Run, report: dict[str, Any]) -> None:
    """The metrics of an evaluation, as tables."""
    for label, labelled in report["labels"].items():
        console.print(f"\n[bold]{escape(label)}[/] ({labelled['task']}), {labelled['rows']:,} rows\n")
        metrics = labelled["metrics"] | labelled["ranking"]
        _print_estimates("metric", [(name.replace("_", " "), *_interval(value)) for name, value in metrics.items()])
        _print_slices(labelled)
        if labelled["fairness_gaps"]:
            gaps = [
                (gap["metric"].replace("_", " "), *_interval(gap), f"{gap['highest']} over {gap['lowest']}")
                for gap in labelled["fairness_gaps"]
            ]
            _print_estimates("between groups", gaps, "")
    model = report["run"] if "/" not in report["run"] else Path(report["run"]).name
    print_line(f"\n{escape(model)} was evaluated in {run.id}. The report: [bold]mlkit runs open {run.id[-4:]}[/]")


def _print_slices(labelled: dict[str, Any]) -> None:
    """The worst of the requested slices, and weak slices that were found without being named."""
    name = LOSS_METRICS[labelled["task"]]
    measured = [part for part in labelled["slices"] if name in part["metrics"]]
    worst = sorted(measured, key=lambda part: -part["metrics"][name]["value"])[:MAX_SLICES]
    if worst:
        rows = [
            (part["slice"] + (" (uncertain)" if part["uncertain"] else ""), *_interval(part["metrics"][name]))
            for part in worst
        ]
        _print_estimates(f"worst slices by {name.replace('_', ' ')}", rows)
    if labelled["weak_slices"]:
        rows = [
            (part["name"], format_number(part["loss"]), format_number(part["loss_elsewhere"]), f"{part['rows']:,}")
            for part in labelled["weak_slices"]
        ]
        numbers = ("loss", "of other rows", "rows")
        console.print(text_grid(("weak slice", *numbers), rows, right=numbers))
        console.print()


def _interval(estimate: dict[str, float | None]) -> tuple[str, str, str]:
    numbers = (estimate[name] for name in ("value", "low", "high"))
    return tuple("" if number is None else format_number(number) for number in numbers)


def _print_estimates(title: str, rows: list[tuple[str, ...]], *more: str) -> None:
    """Metrics with their 95 % confidence intervals."""
    numbers = ("value", "from", "to")
    console.print(text_grid((title, *numbers, *more), rows, right=numbers))
    console.print()


@app.command(epilog="Example: mlkit gate latest --against churn@champion", rich_help_panel="Evaluate and export")
def gate(
    reference: RunArgument = "latest",
    against: ChampionOption = None,
    rules: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of rules; by default gate.rules.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Apply the quality gate to a run's model; exit code 1 if it fails."""
    from mlkit.registry.gate import read_gate_result, read_rules, run_gate
    from mlkit.registry.resolve import resolve_model

    store = RunStore()
    run = store.get(reference, having="saved_model")
    champion = resolve_model(against, store=store) if against else None
    gate_rules = read_rules(rules or load_settings().gate.rules)
    with showing_progress(as_json) as progress:
        passed = run_gate(run, gate_rules, champion, store, on_progress=progress).passed
    result = read_gate_result(run)
    if as_json:
        print_json(result)
    else:
        _print_gate_result(result)
        print_unsigned(run)
        if passed:
            console.print(f"\nNext: [bold]mlkit sign {run.id[-4:]}[/]")
    if not passed:
        raise typer.Exit(1)


def _print_gate_result(result: dict[str, Any]) -> None:
    """Each rule with what was required and the actual value."""
    marks = {True: "[green]passed[/]", False: "[red]failed[/]"}
    rows = [(marks[check["passed"]], check["rule"], check["actual"]) for check in result["checks"]]
    titles = ("result", "required", "actual")
    console.print(text_grid(titles, rows, whole=titles[:1], markup=titles[:1]))
    print_line(f"\n{escape(result['run'])}: {escape(result['reason'])}")
