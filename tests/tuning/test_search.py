"""Searches by command line and API: parallel trials, kill and resume, invalid input."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlkit.data import reload_dataset
from mlkit.errors import InputError, JobFailedError, ParameterError
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import hold_server, run_cli, wait_until

pytestmark = pytest.mark.slow
PARAMETERS = 'x: float = 0.0\ny: float = 0.0\nheld: str = ""\nafter: int = 0\nfail: bool = False'
VALLEY = """
import time
from pathlib import Path
from mlkit.runs import Run
run = Run.current()
beginning = len(list(run.checkpoints.iterdir()))
(run.checkpoints / "begun").touch()
run.log_metrics({"loss": (1 - x) ** 2 + 100 * (y - x * x) ** 2, "beginnings": beginning + 1}, step=1)
while held and len(list(Path(held).parent.glob("runs/*-trial*/notebook.html"))) >= after and not Path(held).exists():
    time.sleep(0.05)
assert not fail, "as requested"
"""
SEARCH = """
from mlkit.runs import Run
from mlkit.tuning import tune
options = {"search": search, "trials": trials, "max_parallel": max_parallel}
result = tune(space, fixed, job="trial_of_valley.ipynb", objective="loss", **options)
result
"""
SPACE = {"x": {"min": -2.0, "max": 2.0}, "y": {"min": -1.0, "max": 3.0}}
SEARCH_PARAMETERS = (
    f'space: dict = {SPACE}\nfixed: dict = {{}}\nsearch: str = "random"\ntrials: int = 6\nmax_parallel: int = 1'
)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    hold_server()


def write_jobs(folder: Path) -> None:
    """Write a job that evaluates the Rosenbrock function, and one that searches its minimum."""
    for name, parameters, code in (
        ("trial_of_valley", PARAMETERS, VALLEY),
        ("valley", SEARCH_PARAMETERS, SEARCH),
    ):
        cells = [
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            new_markdown_cell("## Work"),
            new_code_cell(code),
        ]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")


@pytest.fixture
def store(project: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """Run store of a project with the two jobs."""
    monkeypatch.chdir(project)
    write_jobs(project)
    return RunStore(project / "runs")


def find_search(store: RunStore) -> Run:
    """The only search in a run store."""
    (summary,) = store.list(job="valley")
    return store.get(summary.id)


def trial_runs(store: RunStore, search: Run) -> list[Run]:
    """Runs of the trials, in order."""
    return [store.get(point.run) for point in search.record.points]


def suggested_values(search: Run) -> list[dict]:
    """Hyperparameters of each trial."""
    return [{n: v for n, v in point.parameters.items() if n in SPACE} for point in search.record.points]


def read_journal(search: Run) -> list[dict]:
    """Events of a search."""
    return [json.loads(line) for line in (search.folder / "search.jsonl").read_text().splitlines()]


def hold_trials(project: Path, after: int) -> tuple[str, Path]:
    """Parameters that block trials after a number of completed ones, and the file that releases them."""
    gate = project / "gate"
    fixed = json.dumps({"held": str(gate), "after": after})
    return f"fixed={fixed}", gate


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start `mlkit ...` in the background."""
    command = [sys.executable, "-m", "mlkit", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Hyperparameters of the trials of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_jobs(folder)
    result = run_cli("run", "valley.ipynb", folder=folder)
    assert result.returncode == 0, result.stderr
    return suggested_values(find_search(RunStore(folder / "runs")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_search_resumes_without_losing_or_repeating_trials(
    number: signal.Signals, project: Path, store: RunStore, cli: Callable, uninterrupted: list[dict]
) -> None:
    fixed, gate = hold_trials(project, after=3)
    process = start(project, "run", "valley.ipynb", "-p", fixed)
    wait_until(lambda: len(store.list(job="trial_of_valley", status="completed")) == 3, 300)
    wait_until(lambda: store.list(job="trial_of_valley", status="running", where="beginnings > 0").runs)
    process.send_signal(number)
    process.wait(60)
    process.stderr.close()
    search = find_search(store)
    wait_until(lambda: [run.status for run in trial_runs(store, search)] == ["completed"] * 3 + ["interrupted"])
    if number == signal.SIGTERM:
        assert [run.record.status for run in trial_runs(store, search)][3:] == ["interrupted"]
    before = {run.id: run.record.ended for run in trial_runs(store, search)[:3]}
    gate.touch()
    result = cli("resume", search.id)
    assert result.returncode == 0, result.stderr
    runs = trial_runs(store, search)
    assert [run.status for run in runs] == ["completed"] * 6
    assert sorted(run.id for run in runs) == sorted(summary.id for summary in store.list(job="trial_of_valley"))
    assert {run.id: run.record.ended for run in runs[:3]} == before
    assert [run.record.metrics["beginnings"] for run in runs] == [1, 1, 1, 2, 1, 1]  # it result its checkpoint again
    suggested = [event["ask"] for event in read_journal(search) if event.get("ask")]
    ended = [event["end"] for event in read_journal(search) if "end" in event]
    assert (suggested, ended) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert suggested_values(search) == uninterrupted


def test_a_run_whose_id_was_not_recorded_is_found(store: RunStore) -> None:
    """A kill between the creation of a trial's run and the recording of its id."""
    from mlkit.tuning import tune

    result = tune(SPACE, job="trial_of_valley.ipynb", objective="loss", trials=2, max_parallel=1)
    lost = result.run.record.points[1].run
    with result.run.edit() as record:
        record.points[1].run, record.status = None, "interrupted"
    lines = (result.run.folder / "search.jsonl").read_text().splitlines(keepends=True)
    (result.run.folder / "search.jsonl").write_text("".join(lines[:-2]))  # nor its result
    resumed = tune(SPACE, job="trial_of_valley.ipynb", objective="loss", trials=2, max_parallel=1, run=result.run)
    assert resumed.run.record.points[1].run == lost
    assert len(store.list(job="trial_of_valley")) == 2
    assert [event["end"] for event in read_journal(result.run) if "end" in event] == [1, 2]


def test_a_search_fails_after_consecutive_failures(store: RunStore) -> None:
    from mlkit.tuning import Search, tune

    with pytest.raises(JobFailedError, match=r"3 trials in a row have failed, the last one: .*as requested"):
        tune(SPACE, {"fail": True}, job="trial_of_valley.ipynb", objective="loss", trials=9, max_parallel=1)
    (search,) = store.list(job="tune")
    assert search.status == "failed"
    assert [trial.status for trial in Search(store.get(search.id)).trials] == ["failed"] * 3
    chosen = {"x": [0.1, 0.2, 0.3], "fail": [False, True]}
    result = tune(chosen, job="trial_of_valley.ipynb", objective="loss", search="grid", max_parallel=1)
    states = [trial.status for trial in result.trials]
    assert states == ["completed", "failed"] * 3
    assert [trial.score is None for trial in result.trials] == [state == "failed" for state in states]
    assert result.run.status == "completed"


def test_a_run_belongs_to_one_search_and_one_process(store: RunStore) -> None:
    from mlkit.tuning import tune
    from mlkit.tuning.oracle import JOURNAL, Journal

    options = {"job": "trial_of_valley.ipynb", "objective": "loss", "trials": 1, "max_parallel": 1}
    run = store.create("tune").start()
    with Journal(run.folder / JOURNAL), pytest.raises(InputError, match="another process"):
        tune(SPACE, run=run, **options)
    tune(SPACE, run=run, **options)
    with pytest.raises(InputError, match=r"another search \(seed differ\)"):
        tune(SPACE, run=run, seed=7, **options)
    assert len(store.list(job="trial_of_valley")) == 1


def test_an_unknown_objective_is_reported_after_the_first_trial(store: RunStore) -> None:
    from mlkit.tuning import tune

    with pytest.raises(
        ParameterError, match=r"No trial measures 'los'. Did you mean 'loss'\? There are: loss, beginnings"
    ):
        tune(SPACE, job="trial_of_valley.ipynb", objective="los", trials=5, max_parallel=1)
    assert len(store.list(job="trial_of_valley")) == 1


MEMORY = f"""
import ctypes, json, psutil
from mlkit.tuning import tune
options = {{"job": "trial_of_valley.ipynb", "objective": "loss", "max_parallel": 2}}
sizes = []
for trials in (8, 16):
    tune({SPACE}, trials=trials, **options)
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system; only glibc has it
    sizes.append(psutil.Process().memory_full_info().uss / 1e6)
print(json.dumps(sizes))
"""


def test_memory_stays_flat(store: RunStore, project: Path) -> None:
    # one heap for all threads: otherwise each new arena looks like growth
    one_heap = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, cwd=project, env=one_heap, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert second - first < 16 * 0.5, f"{first:.0f}, {second:.0f} MB"  # half a megabyte per trial


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Run store with a search over the breast cancer data, by the command line."""
    folder = tmp_path_factory.mktemp("tuned")
    space = "space={learning_rate: {min: 1e-4, max: 1e-1, sampling: log}, model_options.dropout: [0, 0.4]}"
    flags = [
        "dataset=breast_cancer",
        "class_weight=balanced",
        "precision=float32",
        "model=wide_deep",
        "model_options={hidden: [8]}",
        "epochs=3",
        "trials=4",
        space,
    ]
    result = run_cli(
        "run", "tune", "--max-parallel", "2", *(part for flag in flags for part in ("-p", flag)), folder=folder
    )
    assert result.returncode == 0, result.stderr
    return RunStore(folder / "runs")


def test_every_trial_is_a_run_without_test_metrics(tuned: RunStore) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (summary,) = tuned.list(job="tune")
    search = tuned.get(summary.id)
    assert (search.status, len(search.record.points)) == ("completed", 4)
    assert search.record.parameters["max_parallel"] == 2
    for run in trial_runs(tuned, search):
        assert (run.status, run.parents) == ("completed", [search.id])
        assert run.record.parameters["model_options"]["hidden"] == [8]
        assert (run.record.parameters["class_weight"], run.record.parameters["precision"]) == ("balanced", "float32")
        assert not [name for name in run.record.metrics if name.startswith("test")]
        events = EventAccumulator(str(run.tensorboard))
        events.Reload()
        assert events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    names = {path.name for path in (search.folder / "plots").iterdir()}
    assert {"parallel.png", "importance.png", "curves.png"} <= names


def test_the_final_training_is_tested_on_the_same_rows(tuned: RunStore) -> None:
    from mlkit.tuning import Search

    (summary,) = tuned.list(job="tune")
    result = Search(tuned.get(summary.id))
    (summary,) = tuned.list(job="train")
    trained = tuned.get(summary.id)
    assert trained.parents == [result.run.id, result.best.run.id]
    assert result.best.score == min(trial.score for trial in result.trials)
    parameters = trained.record.parameters
    assert parameters["learning_rate"] == result.best.values["learning_rate"]
    assert (parameters["class_weight"], parameters["precision"]) == ("balanced", "float32")
    assert parameters["epochs"] == result.best.best_epoch
    train_data, trial_data = (reload_dataset(run.record.data[0]) for run in (trained, tuned.get(result.best.run.id)))
    assert train_data.splits["test"].tolist() == trial_data.splits["test"].tolist()
    training_rows = sorted([*trial_data.splits["train"], *trial_data.splits["validation"]])
    assert training_rows == train_data.splits["train"].tolist()
    assert (trained.folder / "saved_model" / "1").is_dir()
    assert any(name.startswith("test") for name in trained.record.metrics)
    assert "log loss" in trained.record.summary  # the comparison with the baselines
    searched = result.run.record
    tested = {name: value for name, value in trained.record.metrics.items() if name.startswith("test_")}
    assert {name: value for name, value in searched.metrics.items() if name.startswith("test_")} == tested
    first, second, *others = searched.summary.splitlines()
    assert first.startswith(f"Trial {result.best.number} of 4 is the best: val_loss")
    assert trained.id in second
    assert "test_accuracy" in second
    assert others == trained.record.summary.splitlines()


def test_warm_start_of_trials(tuned: RunStore, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the family of the source model, and its sizes are not searched."""
    from mlkit.tuning import train_best, tune

    monkeypatch.chdir(project)
    (summary,) = tuned.list(job="train")
    earlier = tuned.get(summary.id)
    sizes = earlier.record.parameters["model_options"]
    common = {"dataset": "breast_cancer", "model_options": sizes, "epochs": 1, "warm_start": str(earlier.folder)}
    space = {"learning_rate": [1e-6, 1e-5], "model_options": "auto"}
    result = tune(space, common, search="grid", max_parallel=2)
    store = RunStore(result.run.folder.parent)
    for run in trial_runs(store, result.run):
        assert run.parents == [result.run.id, earlier.id]
        assert run.record.parameters["model"] == "wide_deep"
        accuracy = run.record.metrics["val_accuracy"]
        assert accuracy > 0.85  # at these learning rates only with the weights of the source model
    final = store.create("train", parents=[result.run.id, result.best.run.id, earlier.id])
    final.start().complete()
    assert train_best(result).id == final.id  # recognised in spite of the third parent


def test_an_invalid_search_has_exit_code_2(cli: Callable, project: Path) -> None:
    given = ["dataset=breast_cancer", "model=mlp", "objective=val_acuracy"]
    result = cli("run", "tune", *(part for flag in given for part in ("-p", flag)))
    assert result.returncode == 2
    assert "Did you mean 'val_accuracy'?" in result.stderr
    assert not len(RunStore(project / "runs").list(job="trial"))


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({"learning_rate": [1e-3, 1e-2]}, {"objective": "val_acuracy"}, "Did you mean 'val_accuracy'?"),
        ({"learning_rat": [1e-3, 1e-2]}, {}, "Did you mean 'learning_rate'?"),
        ({}, {}, "nothing to choose"),
        ({"batch_size": []}, {}, "list of batch_size is empty"),
        ({"batch_size": {"min": 1, "max": 500}}, {"search": "grid"}, "The grid has 500 points"),
    ],
)
def test_invalid_searches_are_rejected_before_the_first_trial(
    space: dict, options: dict, message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.data import load_dataset
    from mlkit.tuning import tune

    monkeypatch.chdir(project)
    common = {"dataset": "breast_cancer", "model": "mlp"}
    with pytest.raises(ParameterError, match=re.escape(message)):
        tune(space, common, dataset=load_dataset("breast_cancer"), **options)
    assert not len(RunStore(project / "runs").list(job="trial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial"], "--max-parallel 2 is for sweeps, and for jobs with a parameter 'max_parallel', such as tune"),
        (["tune", "-p", "max_parallel=1"], "given twice: --max-parallel 2 and -p max_parallel=1"),
        (["tune", "--workers", "2"], "--workers is for one run"),
    ],
)
def test_parallel_runs_need_a_sweep_or_search(arguments: list[str], message: str, cli: Callable, project: Path) -> None:
    result = cli("run", *arguments, "--max-parallel", "2")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (project / "runs").exists()


def test_hyperband_promotes_the_better_trials(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.tuning import tune

    monkeypatch.chdir(project)
    common = {"dataset": "breast_cancer", "model": "mlp", "model_options": {"hidden": [4]}, "epochs": 3}
    space = {"learning_rate": {"min": 1e-4, "max": 1e-1, "sampling": "log"}}
    result = tune(space, common, search="hyperband", max_parallel=2)
    runs = {trial.run.id: trial for trial in result.trials}
    promoted = [trial for trial in result.trials if trial.parameters.get("promoted_from")]
    assert promoted
    for trial in promoted:
        earlier = runs[trial.parameters["promoted_from"]]
        assert earlier.values == trial.values
        before, after = earlier.run.history["val_loss"], trial.run.history["val_loss"]
        assert after[: len(before)] == before
        assert len(before) < len(after) <= 3
