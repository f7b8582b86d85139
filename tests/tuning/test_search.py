"""Searches as users start them: several trials at a time, killed and resumed, over a cluster, with wrong input."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlkit.data import reload_dataset
from mlkit.errors import InputError, JobFailedError, ParameterError
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import run_cli, wait_until

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
assert not fail, "as asked"
"""
SEARCH = """
from mlkit.runs import Run
from mlkit.tuning import tune
found = tune(space, fixed, job="trial_of_valley.ipynb", search=search, objective="loss", trials=trials, jobs=jobs)
found
"""
SPACE = {"x": {"min": -2.0, "max": 2.0}, "y": {"min": -1.0, "max": 3.0}}
SEARCH_PARAMETERS = f'space: dict = {SPACE}\nfixed: dict = {{}}\nsearch: str = "random"\ntrials: int = 6\njobs: int = 1'


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Warm kernels of this module's own, that know what searches need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("xdg")))
        folder = tmp_path_factory.mktemp("warm")
        run_cli("kernels", "start", folder=folder)
        yield
        run_cli("kernels", "stop", folder=folder)


def write_jobs(folder: Path) -> None:
    """A job that measures how far along a valley a point lies, and one that searches the valley."""
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
def archive(project: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """The archive of a project that has the two jobs."""
    monkeypatch.chdir(project)
    write_jobs(project)
    return RunStore(project / "runs")


def search_of(archive: RunStore) -> Run:
    """The only search of an archive."""
    (summary,) = archive.list(job="valley")
    return archive.get(summary.id)


def trials_of(archive: RunStore, search: Run) -> list[Run]:
    """The runs of its trials, in order."""
    return [archive.get(point.run) for point in search.record.points]


def choices(search: Run) -> list[dict]:
    """What was chosen for each trial."""
    return [{n: v for n, v in point.parameters.items() if n in SPACE} for point in search.record.points]


def journal(search: Run) -> list[dict]:
    """All that has happened in a search."""
    return [json.loads(line) for line in (search.folder / "search.jsonl").read_text().splitlines()]


def hold(project: Path, after: int) -> tuple[str, Path]:
    """Parameters with which trials wait once so many have ended, and the file that lets them go on."""
    gate = project / "gate"
    fixed = json.dumps({"held": str(gate), "after": after})
    return f"fixed={fixed}", gate


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """`mlkit ...` in the background."""
    command = [sys.executable, "-m", "mlkit", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What is chosen by a search that nobody cuts off."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_jobs(folder)
    result = run_cli("run", "valley.ipynb", folder=folder)
    assert result.returncode == 0, result.stderr
    return choices(search_of(RunStore(folder / "runs")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_search_that_is_cut_off_goes_on_and_no_trial_is_lost_or_repeated(
    number: signal.Signals, project: Path, archive: RunStore, cli: Callable, undisturbed: list[dict]
) -> None:
    fixed, gate = hold(project, after=3)
    process = start(project, "run", "valley.ipynb", "-p", fixed)
    wait_until(lambda: len(archive.list(job="trial_of_valley", status="completed")) == 3, 300)
    wait_until(lambda: archive.list(job="trial_of_valley", status="running", where="beginnings > 0").runs)
    process.send_signal(number)
    process.wait(60)
    process.stderr.close()
    search = search_of(archive)
    wait_until(lambda: [run.status for run in trials_of(archive, search)] == ["completed"] * 3 + ["interrupted"])
    if number == signal.SIGTERM:
        assert [run.record.status for run in trials_of(archive, search)][3:] == ["interrupted"]
    before = {run.id: run.record.ended for run in trials_of(archive, search)[:3]}
    gate.touch()
    result = cli("resume", search.id)
    assert result.returncode == 0, result.stderr
    runs = trials_of(archive, search)
    assert [run.status for run in runs] == ["completed"] * 6
    assert sorted(run.id for run in runs) == sorted(each.id for each in archive.list(job="trial_of_valley"))
    assert {run.id: run.record.ended for run in runs[:3]} == before
    assert [run.record.metrics["beginnings"] for run in runs] == [1, 1, 1, 2, 1, 1]  # it found its checkpoint again
    asked = [event["ask"] for event in journal(search) if event.get("ask")]
    ended = [event["end"] for event in journal(search) if "end" in event]
    assert (asked, ended) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert choices(search) == undisturbed


def test_a_run_whose_id_could_not_be_noted_is_found_again(archive: RunStore) -> None:
    """A kill between the making of a trial's run and the writing of its id."""
    from mlkit.tuning import tune

    found = tune(SPACE, job="trial_of_valley.ipynb", objective="loss", trials=2, jobs=1)
    lost = found.run.record.points[1].run
    with found.run.edit() as record:
        record.points[1].run, record.status = None, "interrupted"
    lines = (found.run.folder / "search.jsonl").read_text().splitlines(keepends=True)
    (found.run.folder / "search.jsonl").write_text("".join(lines[:-2]))  # nor how it ended
    again = tune(SPACE, job="trial_of_valley.ipynb", objective="loss", trials=2, jobs=1, run=found.run)
    assert again.run.record.points[1].run == lost
    assert len(archive.list(job="trial_of_valley")) == 2
    assert [event["end"] for event in journal(found.run) if "end" in event] == [1, 2]


def test_a_search_gives_up_when_trials_fail_one_after_another(archive: RunStore) -> None:
    from mlkit.tuning import Search, tune

    with pytest.raises(JobFailedError, match=r"3 trials in a row have failed, the last one: .*as asked"):
        tune(SPACE, {"fail": True}, job="trial_of_valley.ipynb", objective="loss", trials=9, jobs=1)
    (search,) = archive.list(job="tune")
    assert search.status == "failed"
    assert [trial.status for trial in Search(archive.get(search.id)).trials] == ["failed"] * 3
    chosen = {"x": [0.1, 0.2, 0.3], "fail": [False, True]}
    found = tune(chosen, job="trial_of_valley.ipynb", objective="loss", search="grid", jobs=1)
    states = [trial.status for trial in found.trials]
    assert states == ["completed", "failed"] * 3
    assert [trial.score is None for trial in found.trials] == [state == "failed" for state in states]
    assert found.run.status == "completed"


def test_two_searches_cannot_share_a_folder_and_another_search_cannot_take_it(archive: RunStore) -> None:
    from mlkit.tuning import tune
    from mlkit.tuning.oracle import JOURNAL, Journal

    how = {"job": "trial_of_valley.ipynb", "objective": "loss", "trials": 1, "jobs": 1}
    run = archive.create("tune").start()
    with Journal(run.folder / JOURNAL), pytest.raises(InputError, match="another process"):
        tune(SPACE, run=run, **how)
    tune(SPACE, run=run, **how)
    with pytest.raises(InputError, match=r"another search \(seed differ\)"):
        tune(SPACE, run=run, seed=7, **how)
    assert len(archive.list(job="trial_of_valley")) == 1


def test_a_measure_that_trials_do_not_report_is_named_after_the_first(archive: RunStore) -> None:
    from mlkit.tuning import tune

    with pytest.raises(
        ParameterError, match=r"No trial measures 'los'. Did you mean 'loss'\? There are: loss, beginnings"
    ):
        tune(SPACE, job="trial_of_valley.ipynb", objective="los", trials=5, jobs=1)
    assert len(archive.list(job="trial_of_valley")) == 1


MEMORY = f"""
import ctypes, json, psutil
from mlkit.tuning import tune
how = {{"job": "trial_of_valley.ipynb", "objective": "loss", "jobs": 2}}
sizes = []
for trials in (8, 16):
    tune({SPACE}, trials=trials, **how)
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not kept; only glibc has it, and its arenas
    sizes.append(psutil.Process().memory_full_info().uss / 1e6)
print(json.dumps(sizes))
"""


def test_memory_stays_flat(archive: RunStore, project: Path) -> None:
    # one heap for all threads: otherwise each new one that a thread meets looks like growth
    one_heap = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, cwd=project, env=one_heap, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert second - first < 16 * 0.5, f"{first:.0f}, {second:.0f} MB"  # half a megabyte a trial


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """An archive with a search over the breast cancer data, by the command line."""
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


def test_every_trial_is_a_run_that_has_not_seen_the_test_split(tuned: RunStore) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (summary,) = tuned.list(job="tune")
    search = tuned.get(summary.id)
    assert (search.status, len(search.record.points)) == ("completed", 4)
    assert search.record.parameters["jobs"] == 2
    for run in trials_of(tuned, search):
        assert (run.status, run.parents) == ("completed", [search.id])
        assert run.record.parameters["model_options"]["hidden"] == [8]
        assert (run.record.parameters["class_weight"], run.record.parameters["precision"]) == ("balanced", "float32")
        assert not [name for name in run.record.metrics if name.startswith("test")]
        events = EventAccumulator(str(run.tensorboard))
        events.Reload()
        assert events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    names = {path.name for path in (search.folder / "plots").iterdir()}
    assert {"parallel.png", "importance.png", "curves.png"} <= names


def test_the_best_trial_is_trained_again_and_tested_on_the_same_rows(tuned: RunStore) -> None:
    from mlkit.tuning import Search

    (summary,) = tuned.list(job="tune")
    found = Search(tuned.get(summary.id))
    (summary,) = tuned.list(job="train")
    trained = tuned.get(summary.id)
    assert trained.parents == [found.run.id, found.best.run.id]
    assert found.best.score == min(trial.score for trial in found.trials)
    parameters = trained.record.parameters
    assert parameters["learning_rate"] == found.best.values["learning_rate"]
    assert (parameters["class_weight"], parameters["precision"]) == ("balanced", "float32")
    assert parameters["epochs"] == found.best.best_epoch
    data, judged = (reload_dataset(run.record.data[0]) for run in (trained, tuned.get(found.best.run.id)))
    assert data.splits["test"].tolist() == judged.splits["test"].tolist()
    assert sorted([*judged.splits["train"], *judged.splits["validation"]]) == data.splits["train"].tolist()
    assert (trained.folder / "saved_model" / "1").is_dir()
    assert any(name.startswith("test") for name in trained.record.metrics)


def test_trials_go_on_from_an_earlier_model(tuned: RunStore, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is then its family, and its sizes are not chosen anew."""
    from mlkit.tuning import train_best, tune

    monkeypatch.chdir(project)
    (summary,) = tuned.list(job="train")
    earlier = tuned.get(summary.id)
    sizes = earlier.record.parameters["model_options"]
    common = {"dataset": "breast_cancer", "model_options": sizes, "epochs": 1, "warm_start": str(earlier.folder)}
    space = {"learning_rate": [1e-6, 1e-5], "model_options": "auto"}
    found = tune(space, common, search="grid", jobs=2)
    archive = RunStore(found.run.folder.parent)
    for run in trials_of(archive, found.run):
        assert run.parents == [found.run.id, earlier.id]
        assert run.record.parameters["model"] == "wide_deep"
        assert run.record.metrics["val_accuracy"] > 0.85  # at these rates, only of what it has brought along
    again = archive.create("train", parents=[found.run.id, found.best.run.id, earlier.id])
    again.start().complete()
    assert train_best(found).id == again.id  # it is known in spite of the third parent


def test_a_wrong_search_ends_with_exit_code_2(cli: Callable, project: Path) -> None:
    given = ["dataset=breast_cancer", "model=mlp", "objective=val_acuracy"]
    result = cli("run", "tune", *(part for flag in given for part in ("-p", flag)))
    assert result.returncode == 2
    assert "Did you mean 'val_accuracy'?" in result.stderr
    assert not len(RunStore(project / "runs").list(job="trial"))


@pytest.mark.parametrize(
    ("space", "how", "message"),
    [
        ({"learning_rate": [1e-3, 1e-2]}, {"objective": "val_acuracy"}, "Did you mean 'val_accuracy'?"),
        ({"learning_rat": [1e-3, 1e-2]}, {}, "Did you mean 'learning_rate'?"),
        ({}, {}, "nothing to choose"),
        ({"batch_size": []}, {}, "list of batch_size is empty"),
        ({"batch_size": {"min": 1, "max": 500}}, {"search": "grid"}, "The grid has 500 points"),
    ],
)
def test_wrong_searches_are_refused_before_the_first_trial(
    space: dict, how: dict, message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.data import load_dataset
    from mlkit.tuning import tune

    monkeypatch.chdir(project)
    common = {"dataset": "breast_cancer", "model": "mlp"}
    with pytest.raises(ParameterError, match=re.escape(message)):
        tune(space, common, dataset=load_dataset("breast_cancer"), **how)
    assert not len(RunStore(project / "runs").list(job="trial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial"], "--max-parallel 2 is for sweeps, and for jobs with a parameter 'jobs', such as tune"),
        (["tune", "-p", "jobs=1"], "given twice: --max-parallel 2 and -p jobs=1"),
        (["tune", "--workers", "2"], "--workers is for one run"),
    ],
)
def test_runs_at_a_time_where_there_is_one(arguments: list[str], message: str, cli: Callable, project: Path) -> None:
    result = cli("run", *arguments, "--max-parallel", "2")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (project / "runs").exists()


def test_hyperband_lets_the_better_trainings_go_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.tuning import tune

    monkeypatch.chdir(project)
    common = {"dataset": "breast_cancer", "model": "mlp", "model_options": {"hidden": [4]}, "epochs": 3}
    space = {"learning_rate": {"min": 1e-4, "max": 1e-1, "sampling": "log"}}
    found = tune(space, common, search="hyperband", jobs=2)
    runs = {trial.run.id: trial for trial in found.trials}
    promoted = [trial for trial in found.trials if trial.parameters.get("continues")]
    assert promoted
    for trial in promoted:
        earlier = runs[trial.parameters["continues"]]
        assert earlier.values == trial.values
        before, after = earlier.run.history["val_loss"], trial.run.history["val_loss"]
        assert after[: len(before)] == before
        assert len(before) < len(after) <= 3
