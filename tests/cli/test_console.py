"""What all commands share: tables, JSON, progress displays."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from mlkit.cli import console as shared
from mlkit.cli.console import (
    SweepProgress,
    epoch_lines,
    print_rows,
    progress_line,
    showing_progress,
    text_grid,
    trial_lines,
)
from mlkit.errors import JobFailedError
from mlkit.jobs.points import TrialState
from mlkit.runs import RunStore, compare_runs
from mlkit.runs.record import Failure, Record

RUNNING = Record(
    id="x",
    job="train",
    status="running",
    created="2026-11-20",
    progress={"epoch": 3, "epochs": 20, "step": 12, "steps": 45, "loss": 0.123456},
    metrics={"val_accuracy": 0.98},
    history={"loss": [(1, 0.4), (2, 0.2)], "val_accuracy": [(1, 0.95), (2, 0.98)]},
)


def printed(table: Table, width: int) -> list[str]:
    """The lines that a terminal of some width shows."""
    terminal = Console(width=width, file=io.StringIO(), force_jupyter=False, force_terminal=False)
    terminal.print(table)
    return [line.rstrip() for line in terminal.file.getvalue().splitlines()]


def test_cells_are_escaped_and_numbers_right_aligned() -> None:
    grid = text_grid(("column", "rows"), [("price [euros]", "20,000"), ("town", "7")], right=["rows"])
    assert printed(grid, 40)[1:] == ["price [euros]  20,000", "town                7"]


def test_long_cells_are_folded_to_the_window() -> None:
    lines = printed(text_grid(("a",), [("word " * 30,)]), 40)
    assert max(map(len, lines)) <= 40
    assert " ".join(lines).count("word") == 30


def test_rows_as_json(capsys: pytest.CaptureFixture) -> None:
    print_rows(("name", "value"), [("a", "1")], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "a", "value": "1"}]


def test_progress_of_a_training() -> None:
    assert progress_line(RUNNING) == "epoch 3/20, step 12/45  val_accuracy 0.9800  loss 0.1235"
    assert epoch_lines(RUNNING) == [
        "epoch 1  loss 0.4000  val_accuracy 0.9500",
        "epoch 2  loss 0.2000  val_accuracy 0.9800",
    ]
    assert progress_line(Record(id="x", job="train", status="running", created="2026-11-20")) == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failed_job_is_explained_on_standard_error(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "errors", Console(stderr=True, highlight=False))
    run = RunStore(tmp_path).create("train").start()
    run.fail(Failure(error="ValueError", message="no rows", traceback="ValueError: no rows", heading="Data", cell=4))
    failed = JobFailedError(f"{run.id} failed: ValueError: no rows")
    failed.run = run

    def wait() -> None:
        with showing_progress(as_json) as progress:
            progress(run, None)
            raise failed

    with pytest.raises(JobFailedError, match="no rows"):
        wait()
    captured = capsys.readouterr()
    assert "Failed in Data (cell 4 of the executed notebook)" in captured.err
    assert f"mlkit runs open {run.id}" in captured.err
    assert ("run " in captured.out) is not as_json


def test_a_sweep_and_a_comparison_show_the_restored_epoch(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    states = []
    for number, values in enumerate(([0.9, 0.8, 0.6], [0.7, 0.6, 0.5]), 1):
        with store.create("train", parameters={"learning_rate": number}) as run:
            for step, value in enumerate(values, 1):
                run.log_metrics({"val_accuracy": value}, step=step)
            run.log_metrics({"val_accuracy": values[1]})  # training restored the second epoch
        states.append(TrialState(number, {"learning_rate": number}, "completed", run))
    progress = SweepProgress()
    progress.update(states)
    assert [line.split()[-2] for line in printed(progress.table(ranked=True), 100)[1:]] == ["0.8", "0.6"]
    sections = dict(compare_runs([state.run for state in states]).sections())
    assert [row[-1] for row in sections["val_accuracy"]] == ["0.8", "0.6"]
    assert [row[-1] for row in sections["runs"][1:]] == ["0.8", "0.6"]


def test_a_line_for_each_finished_trial(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create("tune")
    assert trial_lines(run) == []
    events = [
        {"search": {"objective": "val_loss", "trials": 20}},
        {"ask": 1, "values": {"model_options/units": 64, "learning_rate": 0.00123456, "tuner/epochs": 2}},
        {"ask": 2, "values": {"model_options/units": 32, "learning_rate": 0.1}},
        {"end": 2, "score": None, "step": 0},
        {"end": 1, "score": 0.123456, "step": 2},
    ]
    (run.folder / "search.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"end": 3')
    assert trial_lines(run) == [
        "trial 2 of 20  model_options.units=32 learning_rate=0.1  failed",
        "trial 1 of 20  model_options.units=64 learning_rate=0.001235  val_loss 0.1235",
    ]


def test_a_search_without_a_terminal_prints_its_trials_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunStore(tmp_path).create("tune").start()
    events = [
        {"search": {"objective": "val_loss", "trials": 2}},
        {"ask": 1, "values": {"learning_rate": 0.1}},
        {"end": 1, "score": 0.5, "step": 1},
    ]
    with showing_progress() as progress:
        progress(run, None)
        (run.folder / "search.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert capsys.readouterr().out.count("trial 1 of 2  learning_rate=0.1  val_loss 0.5") == 1
