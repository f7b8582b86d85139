"""Commands typed one after another in a project, as a person would."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mlkit.runs import RunStore
from tests.conftest import run_cli

DESCEND = """
from mlkit.runs import Run
run, x = Run.current(), 1.0
for step in range(10):
    x -= rate * 2 * x
    run.log_metrics({"loss": x * x}, step=step)
"""


@pytest.fixture
def shop(cli: Callable, project: Path) -> Path:
    """A project made by `mlkit new`."""
    assert cli("new", "shop").returncode == 0
    return project / "shop"


@pytest.fixture
def typed(shop: Path) -> Callable[[str], subprocess.CompletedProcess]:
    """Type a command line in the project, in a window of 110 characters."""
    return lambda line: run_cli(*line.split(), folder=shop, COLUMNS="110", MLKIT_KERNELS_PRELOAD="numpy")


def test_a_new_project_lists_its_settings_and_jobs(typed: Callable, shop: Path) -> None:
    assert sorted(path.name for path in shop.iterdir())[:3] == [".gitignore", "first_model.ipynb", "jobs"]
    assert "root = runs" in (shop / "settings.ini").read_text()
    assert typed("jobs show train").returncode == 0
    assert typed("runs list").returncode == 0


def test_runs_from_python_are_listed_shown_and_deleted(typed: Callable, shop: Path) -> None:
    store = RunStore(shop / "runs")
    for rate in (0.1, 0.01, 0.001):
        with store.create("train", parameters={"learning_rate": rate}, defaults={"epochs": 10}) as run:
            run.log_metrics({"val_accuracy": 0.99 - rate, "loss": rate})
    assert typed("runs list --sort val_accuracy").returncode == 0
    assert typed("runs show latest").returncode == 0
    best = typed("runs list --where val_accuracy>0.97 --sort val_accuracy --limit 1 --json")
    assert json.loads(best.stdout)[0]["parameters"] == {"learning_rate": 0.001}
    rejected = (
        "run trian",
        "run train -p epocs=3",
        "run train -p epochs",
        "runs show nothing",
        "runs list --where val_acc>1",
    )
    for line in (*rejected, "--set runs.rot=x runs list", "runs delete latest"):
        assert typed(line).returncode == 2, line
    assert typed("runs delete latest --yes").returncode == 0
    assert len(store.list()) == 2


def test_a_run_closes_with_its_summary_above_its_metrics(typed: Callable, shop: Path) -> None:
    source = """
from mlkit.runs import Run
run = Run.current()
run.log_metrics({"test_loss": 0.25})
run.log_summary("The model [mlp] is worse than the best baseline.")
"""
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), shop / "jobs" / "result.ipynb")
    finished = typed("run result")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    position = lines.index("The model [mlp] is worse than the best baseline.")
    assert lines[position - 1].startswith("completed ")
    assert lines[position + 1].split() == ["test_loss", "0.25"]


@pytest.mark.slow
def test_a_sweep_its_comparison_and_a_repetition(typed: Callable, shop: Path) -> None:
    cells = [new_code_cell("rate: float = 0.1  # step size", metadata={"tags": ["parameters"]}), new_code_cell(DESCEND)]
    nbformat.write(new_notebook(cells=cells), shop / "jobs" / "descend.ipynb")
    swept = typed("run descend --sweep rate=0.05,0.2,0.45 --max-parallel 2")
    assert swept.returncode == 0, swept.stderr
    store = RunStore(shop / "runs")
    (sweep,) = store.list(job="descend-sweep")
    compared = typed(f"runs compare {sweep.id} --json")
    assert compared.returncode == 0
    first, second, _ = (point.run for point in store.get(sweep.id).record.points)
    assert typed(f"reproduce {first}").returncode == 0
    difference = typed(f"runs diff {first} {second}")
    assert difference.returncode == 0
    assert "rate" in difference.stdout
    assert typed(f"resume {first}").returncode == 2
    assert typed("kernels status").returncode == 0
