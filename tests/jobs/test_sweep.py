"""Sweeps, resumed runs and reproductions on the command line, interrupted and killed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import hold_server, run_cli, wait_until

pytestmark = pytest.mark.slow
PARAMETERS = 'rate: float = 0.1  # step size\nsteps: int = 3  # number of steps\nwait: float = 0.0\nnote: str = ""'
DESCENT = """
import os, time
from mlkit.runs import Run
run, x = Run.current(), 1.0
run.log_seed("kernel", os.getpid())
for step in range(steps):
    x -= rate * 2 * x
    run.log_metrics({"loss": x * x}, step=step)
    time.sleep(wait)
assert abs(x) < 10, "it diverged"
"""


@pytest.fixture(autouse=True)
def _light_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy")
    hold_server()


@pytest.fixture
def job(project: Path) -> str:
    """Small job that logs a loss."""
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_markdown_cell("## Descent"),
        new_code_cell(DESCENT),
    ]
    nbformat.write(new_notebook(cells=cells), project / "descend.ipynb")
    return "descend.ipynb"


@pytest.fixture
def store(project: Path) -> RunStore:
    return RunStore(project / "runs")


def children(store: RunStore, sweep: Run) -> list[Run]:
    """Runs of a sweep, by point."""
    return [store.get(point.run) for point in sweep.record.points if point.run]


def sweep_of(store: RunStore) -> Run:
    """The only sweep of a run store."""
    (summary,) = store.list(job="descend-sweep")
    return store.get(summary.id)


def test_a_sweep_runs_every_point_and_ranks_them(cli: Callable, job: str, store: RunStore) -> None:
    axes = ["--sweep", "rate=0.1,0.3,0.45", "--sweep", "note=a,b"]
    result = cli("run", job, *axes, "-p", "steps=4", "--max-parallel", "2")
    assert result.returncode == 0, result.stderr
    sweep = sweep_of(store)
    runs = children(store, sweep)
    assert [run.record.parameters for run in runs] == [
        {"steps": 4, "rate": rate, "note": note} for rate in (0.1, 0.3, 0.45) for note in "ab"
    ]
    assert {(run.status, *run.record.parents) for run in runs} == {("completed", sweep.id)}
    assert sweep.status == "completed"
    assert "6 of 6  completed" in result.stdout
    ranked = [line for line in result.stdout.splitlines() if line[:4] in {run.id[-4:] for run in runs}]
    assert [line.split()[-2] for line in ranked] == ["0.45", "0.45", "0.3", "0.3", "0.1", "0.1"]


def test_a_sweep_from_a_file_of_points_drawn_at_random(cli: Callable, job: str, project: Path) -> None:
    (project / "points.yaml").write_text("- {rate: 0.1}\n- {rate: 0.2}\n- {rate: 0.3, steps: 1}\n")
    flags = ["--points", "points.yaml", "--sweep", "note=a,b", "--random", "3", "--json"]
    record = json.loads(cli("run", job, *flags).stdout)
    assert (record["status"], len(record["points"]), len(record["runs"])) == ("completed", 3, 3)
    assert len({json.dumps(point["parameters"]) for point in record["points"]}) == 3
    again = json.loads(cli("run", job, *flags).stdout)
    assert [p["parameters"] for p in again["points"]] == [p["parameters"] for p in record["points"]]


def test_a_failing_point_does_not_stop_the_others(cli: Callable, job: str, store: RunStore) -> None:
    result = cli("run", job, "--sweep", "rate=5.0,0.1,0.2", "--max-parallel", "1", "--retries", "1")
    assert result.returncode == 1
    assert "1 of 3 runs failed" in result.stderr
    assert "Traceback" not in result.stderr
    runs = children(store, sweep_of(store))
    assert [(run.status, run.record.attempts) for run in runs] == [("failed", 2), ("completed", 1), ("completed", 1)]


def test_a_run_that_takes_too_long_fails_alone(cli: Callable, job: str, store: RunStore) -> None:
    result = cli("run", job, "--sweep", "wait=600,0", "--timeout", "10", "--max-parallel", "2")
    assert result.returncode == 1
    slow, fast = children(store, sweep_of(store))
    assert (slow.status, slow.record.failure.error, fast.status) == ("failed", "RunTimeout", "completed")
    single = cli("run", job, "-p", "wait=600", "--timeout", "3", "--json")
    assert (single.returncode, json.loads(single.stdout)["failure"]["error"]) == (1, "RunTimeout")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "rat=1,2"], "Did you mean 'rate'?"),
        (["--sweep", "rate=1,fast"], "valid number"),
        (["--sweep", "rate"], "NAME=VALUE,VALUE"),
        (["--points", "nowhere.yaml"], "cannot be read"),
        (["--sweep", "rate=1,2", "--max-parallel", "0"], "max-parallel"),
    ],
)
def test_an_invalid_sweep_is_rejected_before_anything_runs(
    flags: list[str], message: str, cli: Callable, job: str, store: RunStore
) -> None:
    result = cli("run", job, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert not len(store.list())


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """`mlkit ...` in the background."""
    command = [sys.executable, "-m", "mlkit", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def running_kernels(store: RunStore, count: int) -> list[int]:
    """Process ids of the running kernels; [] until there are enough."""
    running = [store.get(run.id).record for run in store.list(job="descend", status="running")]
    kernels = [record.seeds["kernel"] for record in running if "loss" in record.metrics]
    return kernels if len(kernels) >= count else []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_sweep_has_correct_records_no_kernel_and_can_be_resumed(
    number: signal.Signals, code: int, project: Path, job: str, store: RunStore, cli: Callable
) -> None:
    process = start(project, "run", job, "--sweep", "rate=0.1,0.2,0.3,0.4", "-p", "wait=0.2", "--max-parallel", "2")
    wait_until(lambda: len(store.list(status="completed")) >= 1)
    kernels = wait_until(lambda: running_kernels(store, 2))
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in process.stderr.read()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in kernels), 20)
    sweep = sweep_of(store)
    states = [run.status for run in children(store, sweep)]
    assert sweep.status == "interrupted"
    assert set(states) == {"completed", "interrupted"}
    if number != signal.SIGKILL:
        assert [run.record.status for run in children(store, sweep)] == states
    done = {run.id: run.record.ended for run in children(store, sweep) if run.status == "completed"}
    result = cli("resume", sweep.id, "--max-parallel", "2")
    assert result.returncode == 0, result.stderr
    runs = children(store, sweep_of(store))
    assert [run.status for run in runs] == ["completed"] * 4
    assert {run.id: run.record.ended for run in runs if run.id in done} == done
    assert cli("resume", sweep.id).returncode == 2  # nothing is missing


def test_twenty_concurrent_sweeps(project: Path, job: str, store: RunStore) -> None:
    processes = [start(project, "run", job, "--sweep", "rate=0.1,0.2", "--max-parallel", "1") for _ in range(20)]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, errors
    assert len(store.list(job="descend", status="completed")) == 40
    assert len(store.list(job="descend-sweep", status="completed")) == 20
    parents = [run.record.parents[0] for run in map(store.get, (run.id for run in store.list(job="descend")))]
    assert sorted(parents.count(parent) for parent in set(parents)) == [2] * 20


def test_hparams_of_a_sweep_are_in_the_event_files(cli: Callable, job: str, store: RunStore) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    assert cli("run", job, "--sweep", "rate=0.1,5.0", "--max-parallel", "1").returncode == 1
    contents = []
    for run in children(store, sweep_of(store)):
        events = EventAccumulator(str(run.tensorboard))
        events.Reload()
        raw = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        contents.append(
            plugin_data_pb2.HParamsPluginData.FromString(raw).session_start_info.hparams["rate"].number_value
        )
        assert "loss" in events.Tags()["scalars"]
    assert contents == [0.1, 5.0]


def test_compare_and_board_take_a_sweep(cli: Callable, job: str, project: Path) -> None:
    sweep = json.loads(cli("run", job, "--sweep", "rate=0.1,0.4", "--json").stdout)
    compared = json.loads(cli("runs", "compare", sweep["id"], "--html", "page.html", "--json").stdout)
    assert {run["id"] for run in compared["runs"]} == {run["id"] for run in sweep["runs"]}
    page = (project / "page.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["']?http|url\(http|@import""", page)
    assert "rate" in cli("runs", "compare", sweep["id"]).stdout
    board = start(project, "board", sweep["id"], "--port", "0", "--json")
    board.send_signal(signal.SIGINT)
    board.wait(timeout=60)


def digest(folder: Path) -> str:
    """sha256 over the weights of the exported model."""
    (path,) = folder.glob("saved_model/1/variables/variables.data-*")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_killed_training_is_resumed_to_the_same_weights_and_reproduced(
    project: Path, trained: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixture `trained` is the same job without an interruption; the first attempt imports TensorFlow, others fork."""
    original = trained[1]
    store = RunStore(project / "runs")
    epochs = 0

    def is_further(attempt: int) -> int:
        """Completed epochs, once this attempt has added one."""
        if not len(store.list()):
            return 0
        record = store.get("latest").record
        done = len(record.history.get("val_loss", []))
        return done if record.attempts == attempt and done > epochs else 0

    for attempt, arguments in enumerate((("run", "train", "-p", "epochs=12"), ("resume", "latest")), 1):
        process = start(project, *arguments)
        epochs = wait_until(lambda attempt=attempt: is_further(attempt))
        process.kill()
        process.wait()
        assert store.get("latest").status == "interrupted"
        monkeypatch.delenv("MLKIT_KERNELS_PRELOAD", raising=False)
    result = run_cli("resume", "latest", "--json", folder=project)
    assert result.returncode == 0, result.stderr
    resumed = json.loads(result.stdout)
    assert (resumed["status"], resumed["attempts"], len(store.list())) == ("completed", 3, 1)
    assert resumed["metrics"] == original["metrics"]
    assert resumed["history"] == original["history"]
    assert digest(Path(resumed["folder"])) == digest(Path(original["folder"]))
    result = run_cli("reproduce", original["id"], "--json", folder=trained[0])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["result"], report["model"], report["first_difference"]) == ("identical", "same weights", "")


def test_a_warm_training_is_the_same_as_a_cold_one(
    trained: tuple[Path, dict], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLKIT_KERNELS_PRELOAD")
    sweep = run_cli("run", "train", "--sweep", "epochs=12", "--max-parallel", "1", "--json", folder=project)
    assert sweep.returncode == 0, sweep.stderr
    (warm,) = json.loads(sweep.stdout)["runs"]
    assert warm["metrics"] == trained[1]["metrics"]
    assert digest(Path(warm["folder"])) == digest(Path(trained[1]["folder"]))


def test_the_exit_code_of_reproduce_reports_a_difference(cli: Callable, job: str, project: Path) -> None:
    assert cli("run", job).returncode == 0
    (project / "runs").rename(project / "stored")
    flags = ("--set", "runs.root=stored")
    assert cli(*flags, "reproduce").returncode == 0
    store = RunStore(project / "stored")
    first = min(store.list(job="descend"), key=lambda run: run.created)
    page = store.root / first.id / "notebook.ipynb"
    page.write_text(page.read_text().replace("diverged", "went astray"))
    edited = cli(*flags, "reproduce", first.id)
    assert (edited.returncode, "notebook.ipynb has changed" in edited.stderr) == (1, True)
    assert cli("resume", "--json", *()).returncode == 2


def test_environment_of_a_point_is_recorded_for_its_repetition(cli: Callable, job: str) -> None:
    sweep = json.loads(cli("run", job, "--sweep", "rate=0.1,0.2", "--max-parallel", "2", "--json").stdout)
    variables = [run["environment_variables"] for run in sweep["runs"]]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [run.get("TF_NUM_INTRAOP_THREADS") for run in variables] == [threads, threads]
