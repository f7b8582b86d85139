"""Diff reports and comparisons of runs: invalid input, damaged notebooks, non-finite numbers, self-contained pages."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlkit.errors import InputError, NotFoundError, StorageError
from mlkit.metrics import lower_is_better
from mlkit.runs import Run, compare_runs, diff_runs
from mlkit.runs.notebook_diff import align_cells, read_cells
from mlkit.runs.store import RunStore

from ..chromium import CHROMIUM, Page, as_address


def code(source: str, *outputs: dict[str, Any], tags: Sequence[str] = (), seconds: float = 1.0) -> dict[str, Any]:
    """An executed code cell."""
    timing = {"start_time": "2026-11-21T01:58:09+00:00", "duration": seconds, "status": "completed"}
    metadata = {"papermill": timing, "tags": list(tags)}
    return {"cell_type": "code", "source": source, "metadata": metadata, "outputs": list(outputs)}


def printed(text: str) -> dict[str, Any]:
    """The output of a cell that prints."""
    return {"output_type": "stream", "name": "stdout", "text": text}


def displayed(kind: str, content: Any) -> dict[str, Any]:
    """The output of a cell that displays a value."""
    return {"output_type": "execute_result", "execution_count": 7, "data": {kind: content}, "metadata": {}}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """Make a completed run with parameters, histories and a notebook."""
    store = RunStore(tmp_path / "my runs")

    def create(
        parameters: Mapping[str, Any] | None = None,
        cells: Sequence[dict] | str | None = None,
        job: str = "train",
        **metrics: Sequence[float],
    ) -> Run:
        with store.create(job, parameters=parameters, defaults={"epochs": 20}) as run:
            for name, values in metrics.items():
                for step, value in enumerate(values):
                    run.log_metrics({name: value}, step=step)
        (run.folder / "uncommitted.patch").unlink(missing_ok=True)
        if cells is not None:
            text = cells if isinstance(cells, str) else json.dumps({"cells": list(cells), "nbformat": 4})
            (run.folder / "notebook.ipynb").write_text(text)
        return run

    return create


def test_import_loads_no_plotting_and_no_data_frames() -> None:
    program = (
        "import sys, mlkit.runs.compare; print([m for m in ('matplotlib', 'polars', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_repeated_run_is_the_same(make: Callable[..., Run]) -> None:
    runs = [make({"rate": 0.1}, [], loss=[1.0, 0.5]) for _ in range(2)]
    for run, seconds, address in zip(runs, (8.3, 71.0), ("0x7f3b5c2e1d50", "0x7f3b00001d50"), strict=True):
        cells = [
            code("run", displayed("text/html", f"<code>{run.id}</code> running {seconds} s in {run.folder}")),
            code("fit()", printed(f"12 rows in {seconds} s, {seconds * 9:.1f} rows/s\n"), seconds=seconds),
            code("plot()", displayed("text/plain", f"[<Line2D at {address}>]")),
            code("save()", displayed("text/plain", f"PosixPath('{run.folder}/saved_model/1')")),
        ]
        (run.folder / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    difference = diff_runs(*runs)
    assert difference.changed_cells == []
    assert difference.same
    assert difference.record()["same"] is True
    assert "the same" in difference._repr_html_()


def test_a_differing_output_is_reported(make: Callable[..., Run]) -> None:
    runs = [make(cells=[code("a"), code("evaluate()", printed(f"accuracy {value}\n"))]) for value in (0.91, 0.92)]
    difference = diff_runs(*runs)
    assert not difference.same
    assert [(pair.change, pair.cell.index) for pair in difference.changed_cells] == [("output", 1)]
    assert difference.record()["cells"][1]["output"] == ["-accuracy 0.91", "+accuracy 0.92"]
    rows = dict(difference.sections())
    assert rows["cell 1: output differs (1.0 s, 1.0 s)"] == [("-accuracy 0.91",), ("+accuracy 0.92",)]


def test_cells_are_aligned_by_source(make: Callable[..., Run]) -> None:
    left = [code("import numpy"), code("data = load('digits')"), code("x = 1"), code("fit(data, epochs=20)")]
    right = [code("import numpy"), code("fit(data, epochs=30)"), code("completely, different = here()")]
    pairs = align_cells(*[read_cells(make(cells=cells)) for cells in (left, right)])
    changes = [pair.change for pair in pairs]
    assert changes == ["same", "first only", "first only", "source", "second only"]


def test_cells_added_by_papermill_are_ignored(make: Callable[..., Run]) -> None:
    banner = {"cell_type": "markdown", "source": "An Exception", "metadata": {"tags": ["papermill-error-cell-tag"]}}
    failed = make(cells=[banner, code("# Parameters\nrate = 1", tags=["injected-parameters"]), code("fit()")])
    plain = make(cells=[code("fit()")])
    assert [cell.index for cell in read_cells(failed)] == [2]
    assert diff_runs(failed, plain).same


@pytest.mark.parametrize(
    "content", ['{"cells": [{"cell', "[]", "{}", '{"cells": [1]}', '{"cells": [{"source": 3}]}', ""]
)
def test_a_damaged_notebook_is_a_problem_not_a_crash(make: Callable[..., Run], content: str) -> None:
    whole, damaged = make({"rate": 1}, [code("fit()")]), make({"rate": 2}, content)
    with pytest.raises(StorageError, match="damaged"):
        read_cells(damaged)
    difference = diff_runs(whole, damaged)
    assert difference.problems[0].startswith(f"The notebook of {damaged.id} is damaged")
    assert not difference.same
    assert [change.name for change in difference.changes["parameters"]] == ["rate"]
    assert "is damaged" in difference._repr_html_()


def test_a_run_without_a_notebook_is_compared_by_its_record(make: Callable[..., Run]) -> None:
    whole, without = make({"rate": 1}, [code("fit()")]), make({"rate": 1})
    difference = diff_runs(whole, without)
    assert "has no notebook.ipynb" in difference.problems[0]
    assert not difference.same
    assert diff_runs(without, make({"rate": 1})).same  # neither run has a notebook


def test_invalid_selections_of_runs_are_rejected(make: Callable[..., Run]) -> None:
    run = make()
    with pytest.raises(InputError, match="with itself"):
        diff_runs(run, Run(run.folder))
    with pytest.raises(InputError, match="two or more"):
        compare_runs([run])
    with pytest.raises(InputError, match="Received: none"):
        compare_runs(iter(()))
    with pytest.raises(InputError, match="more than once"):
        compare_runs([run, make(), Run(run.folder)])
    with pytest.raises(NotFoundError):
        compare_runs([run, Run(run.folder.with_name("gone"))])


def test_runs_without_a_common_metric(make: Callable[..., Run]) -> None:
    comparison = compare_runs([make({"rate": 1}, accuracy=[0.5]), make({"rate": 2}, recall=[0.7])])
    assert comparison.table["accuracy"].to_list() == [0.5, None]
    assert comparison.best("accuracy") == []
    with pytest.raises(NotFoundError, match="Fewer than two runs"):
        comparison.plot_parallel()
    assert comparison.plot_curves().axes  # one point per run


def test_runs_without_any_history(make: Callable[..., Run]) -> None:
    comparison = compare_runs([make(), make()])
    with pytest.raises(NotFoundError, match="history"):
        comparison.plot_curves()
    assert "<svg" not in comparison._repr_html_()
    assert comparison.labels == [run.id[-4:] for run in comparison.runs]


@pytest.mark.filterwarnings("error")
def test_metrics_that_are_not_finite(make: Callable[..., Run], tmp_path: Path) -> None:
    infinite = [1.0, math.inf, -math.inf]
    runs = [
        make({"rate": n}, loss=values) for n, values in enumerate(([1.0, math.nan], infinite, [3.0, 2.0], [4.0, 3.0]))
    ]
    comparison = compare_runs(runs)
    assert comparison.best("loss") == [runs[2].id]
    assert "2 without a number left out" in comparison.plot_parallel("loss").axes[0].get_title()
    metrics = [run["metrics"]["loss"] for run in json.loads(json.dumps(comparison.record(), allow_nan=False))["runs"]]
    assert metrics == ["NaN", "-Infinity", 2.0, 3.0]
    assert comparison.save_html(tmp_path / "page.html").read_text().count("<svg") == 2
    assert any(title == "loss" for title, _ in comparison.sections())


@pytest.mark.filterwarnings("error")
def test_parameters_of_all_types(make: Callable[..., Run]) -> None:
    values = [[1, 2], {"depth": 3}, None, True, 0.5, "$x$ \\foo", "_hidden", "<b>&\"'", "naïve 数"]
    comparison = compare_runs([make({"option": value}, loss=[n, n / 2]) for n, value in enumerate(values)])
    assert comparison.parameters == ["option"]
    assert len(comparison.table) == len(values)
    page = comparison._repr_html_()
    assert '<b>&"' not in page
    assert "&lt;b&gt;&amp;" in page
    assert "$x$" in page


def test_a_parameter_that_only_some_runs_have(make: Callable[..., Run]) -> None:
    comparison = compare_runs([make({"rate": 1}, loss=[1.0]), make({"depth": 2}, loss=[2.0]), make(loss=[0.5])])
    assert set(comparison.parameters) == {"rate", "depth"}
    assert comparison.table["depth"].to_list() == [None, 2, None]
    assert comparison.plot_parallel("loss")


def test_names_that_collide_keep_their_columns(make: Callable[..., Run]) -> None:
    runs = [make({"loss": name, "id": n, "seconds": n}, loss=[n]) for n, name in enumerate(("hinge", "huber"))]
    assert {"id", "parameter id", "parameter loss", "parameter seconds", "loss"} <= set(
        compare_runs(runs).table.columns
    )


def test_fifty_runs(make: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make({"rate": 10 ** (-n / 10)}, val_loss=[1.0, n / 50], loss=[1.0, n / 60]) for n in range(50)]
    comparison = compare_runs(runs)
    assert comparison.best("val_loss") == [runs[0].id]
    assert len(comparison.plot_curves().legends[0].texts) == 5
    page = comparison.save_html(tmp_path / "page.html").read_text()
    assert page.count("<tr>") == 51
    assert not re.search(r"(?:src|href)=['\"]?(?:https?:)?//", page)
    assert len(page) < 600_000


def test_a_listing_of_a_store_can_be_compared(make: Callable[..., Run]) -> None:
    runs = [make({"rate": n}, loss=[n]) for n in range(3)]
    listed = RunStore(runs[0].folder.parent).list(where="rate > 0", ascending=True)
    assert [run.id for run in compare_runs(listed).runs] == [run.id for run in runs[1:]]


def test_uncommitted_changes_are_compared(make: Callable[..., Run]) -> None:
    first, second = make(), make()
    patch = "diff --git a/my file.py b/my file.py\nindex 1..{}\n--- a\n+++ b\n@@ -1 +1 @@\n-a\n+{}\n"
    (first.folder / "uncommitted.patch").write_text(patch.format(5, "b"))
    (second.folder / "uncommitted.patch").write_text(patch.format(6, "b"))
    assert diff_runs(first, second).same
    (second.folder / "uncommitted.patch").write_text(patch.format(6, "c"))
    assert diff_runs(first, second).record()["patches"] == [{"file": "my file.py", "lines": [" -a", "-+b", "++c"]}]


def test_hostile_texts_are_escaped_in_a_diff_report(make: Callable[..., Run]) -> None:
    evil = "<img src=x onerror=alert(1)>"
    first = make({evil: "a"}, [code("x", printed(evil), displayed("image/png", f"'{evil}"))])
    second = make({evil: evil}, [code("x", printed(f"{evil}2"))])
    assert "<img src=x" not in diff_runs(first, second)._repr_html_()


def test_metrics_by_name() -> None:
    assert all(map(lower_is_better, ("loss", "val_mae", "MSE", "root_mean_squared_error", "test_brier")))
    assert not any(map(lower_is_better, ("accuracy", "auc", "neg_mean_squared_error", "primae", "")))


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_click_on_a_title_sorts_the_page(make: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make({"rate": rate}, loss=[loss]) for rate, loss in ((0.1, 9.0), (0.02, math.nan), (0.003, 10.0))]
    path = compare_runs(runs).save_html(tmp_path / "page.html")
    rates = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[3].textContent)"
    click = "[...document.querySelectorAll('th button')].find(button => button.textContent === '{}').click()"
    with Page(as_address(path)) as page:
        page.ask(click.format("loss"))
        assert page.ask(rates) == ["0.1", "0.003", "0.02"]  # 9, 10, NaN
        page.ask(click.format("loss"))
        assert page.ask(rates) == ["0.003", "0.1", "0.02"]
        page.ask(click.format("rate"))
        assert page.ask(rates) == ["0.003", "0.02", "0.1"]
