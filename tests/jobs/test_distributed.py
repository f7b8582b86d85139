"""Several processes that train one model: real ones, some of which are killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mlkit.jobs.cluster import Cluster, free_ports
from mlkit.runs import Run
from mlkit.runs.run import RunStore
from tests.conftest import run_cli, wait_until

pytestmark = pytest.mark.slow
PARAMETERS = """
rows: int = 1511  # of the data; a worker may be given others
model: str = "mlp"
epochs: int = 4
hold: str = ""  # who holds at the end of the second epoch waits for this file
"""
BEGIN = """
import os, time
from pathlib import Path
import keras
from mlkit.data import load_dataset
from mlkit.models import build_model
from mlkit.runs import Run
from mlkit.training.steps import Pace
from mlkit.training import make_strategy
from mlkit.training import fit
run = Run.current()
distribution = make_strategy()
"""
TRAIN = """
def wait(epoch, logs):
    note = Path(f"{hold}.{distribution.mine.start}")
    if hold and epoch == 1 and not note.exists():  # in the first attempt
        note.write_text(str(os.getpid()))
        while not os.path.exists(hold):
            time.sleep(0.05)

if distribution.mine.start and "OTHER_ROWS" in os.environ:
    rows = int(os.environ["OTHER_ROWS"])
data = load_dataset("retail", rows=rows)
network = build_model(model, data, seed=1)
waiting = [keras.callbacks.LambdaCallback(on_epoch_end=wait)] if hold else []
if distribution.mine.start:
    Pace.GOAL = 100.0  # this one would ask for more and more steps at once, were it allowed to
options = {"strategy": distribution, "checkpoint_minutes": 1e-6, "patience": 99}
history = fit(network, data, epochs=epochs, batch_size=250, run=run, callbacks=waiting, **options)
run.log_metrics({"weights": sum(float(abs(weight).sum()) for weight in network.get_weights())})
"""


@dataclass
class Workshop:
    """A project with a job that trains, and processes that execute it."""

    folder: Path
    runtime: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"XDG_RUNTIME_DIR": str(self.runtime), "CUDA_VISIBLE_DEVICES": "-1"}

    @property
    def run(self) -> Run:
        return RunStore(self.folder / "runs").get("latest")

    def execute(self, *options: Any, code: int = 0, **environment: str) -> dict:
        """Execute the job to its end; the record."""
        arguments = ("run", "learn.ipynb", *options, "--json")
        result = run_cli(*arguments, folder=self.folder, **self.environment, **environment)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout)

    def start(self, *arguments: Any) -> subprocess.Popen:
        """Begin a command."""
        command = [sys.executable, "-m", "mlkit", *map(str, arguments)]
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, env=os.environ | self.environment, **how)
        self.started.append(process)
        return process

    def holding(self, hold: Path, rank: int) -> int:
        """Process id of the kernel that holds, as soon as it does."""
        note = Path(f"{hold}.{rank}")
        return int(wait_until(lambda: note.exists() and note.read_text(), seconds=300))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """The project; whatever a failed test has left running is ended."""
    folder = tmp_path_factory.mktemp("workshop")
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(BEGIN), new_code_cell(TRAIN)]), folder / "learn.ipynb")
    workshop = Workshop(folder, tmp_path_factory.mktemp("runtime"))
    yield workshop
    for process in workshop.started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def alone(workshop: Workshop) -> dict:
    """What one process makes of the job."""
    return workshop.execute()


@pytest.fixture(scope="module")
def together(workshop: Workshop) -> dict:
    """What two workers make of it."""
    return workshop.execute("--workers", 2)


def assert_same(record: dict, other: dict, tolerance: float) -> None:
    """Every measure of every epoch, and the weights."""
    assert record["history"].keys() == other["history"].keys()
    for name, points in record["history"].items():
        expected = [value for _, value in other["history"][name]]
        assert [value for _, value in points] == pytest.approx(expected, rel=tolerance), name
    assert record["metrics"] == pytest.approx(other["metrics"], rel=tolerance)


def test_two_workers_train_what_one_would(alone: dict, together: dict) -> None:
    assert_same(together, alone, 1e-4)
    folder = Path(together["folder"])
    files = {path.name for path in (folder / "workers" / "1").iterdir() if path.name[0] != "."}
    assert files - {"kernel.log"} == {"run.json", "notebook.ipynb", "notebook.html"}
    worker = Run(folder / "workers" / "1")
    assert worker.record.status == "completed"
    assert worker.record.metrics == together["metrics"]
    assert list((folder / "tensorboard").rglob("events.*"))
    assert "TF_CONFIG" not in together["variables"]
    assert together["crew"] == {"workers": 2, "servers": 0}
    listed = {artifact["path"] for artifact in together["artifacts"]}
    assert "workers/1/notebook.ipynb" in listed


@pytest.mark.parametrize("rank", [1, 0])
def test_all_go_on_after_the_death_of_one(rank: int, workshop: Workshop, together: dict, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    launcher = workshop.start("run", "learn.ipynb", "--workers", 2, "-p", f"hold={hold}")
    kernels = [workshop.holding(hold, number) for number in range(2)]
    os.kill(kernels[rank], signal.SIGKILL)
    assert launcher.wait(300) == 0, launcher.stderr.read()
    record = json.loads((workshop.run.folder / "run.json").read_text())
    assert (record["status"], record["attempts"]) == ("completed", 2)
    assert_same(record, together, 1e-6)
    said = nbformat.read(workshop.run.folder / "notebook.ipynb", 4).cells[-1].outputs
    assert any("Continues after epoch 1" in output.get("text", "") for output in said)


def test_a_stopped_run_goes_on_with_as_many_workers(workshop: Workshop, together: dict, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    launcher = workshop.start("run", "learn.ipynb", "--workers", 2, "-p", f"hold={hold}")
    kernels = [workshop.holding(hold, number) for number in range(2)]
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 143
    wait_until(lambda: not any(map(psutil.pid_exists, kernels)))
    run = workshop.run
    assert run.record.status == "interrupted"
    assert workshop.start("resume", run.id).wait(300) == 0
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["status"], record["attempts"]) == ("completed", 2)
    assert_same(record, together, 1e-6)
    assert Run(run.folder / "workers" / "1").record.status == "completed"


def test_a_worker_that_dies_each_time_fails_the_run(workshop: Workshop, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    launcher = workshop.start("run", "learn.ipynb", "--workers", 2, "--retries", 0, "-p", f"hold={hold}")
    os.kill(workshop.holding(hold, 1), signal.SIGKILL)
    assert launcher.wait(120) == 1
    failure = workshop.run.record.failure
    assert failure.error == "DeadKernelError"
    assert failure.message.startswith("Worker 1: The kernel was ended by SIGKILL")


def test_workers_with_other_data_are_refused(workshop: Workshop) -> None:
    record = workshop.execute("--workers", 2, code=2, OTHER_ROWS="1600")
    assert record["failure"]["error"] == "ParameterError"
    assert "Worker 1 does not train the same as worker 0: data" in record["failure"]["message"]
    assert record["attempts"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{cluster:", "TF_CONFIG is not JSON"),
        ("DEAD", "After 2 seconds there is no sign of worker 1 (127.0.0.1:"),
    ],
)
def test_a_wrong_cluster_is_refused_in_time(config: str, message: str, workshop: Workshop) -> None:
    if config == "DEAD":
        peers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
        config = Cluster({"worker": peers}, "worker", 0).config()
    code = 1 if "After" in message else 2
    record = workshop.execute(code=code, TF_CONFIG=config, MLKIT_WORKERS_MEETING_TIMEOUT="2")
    assert message in record["failure"]["message"]
    assert record["cells"][-1]["seconds"] < 60


def test_processes_that_disagree_both_say_so(workshop: Workshop) -> None:
    first, second, third = (f"127.0.0.1:{port}" for port in free_ports(3))
    clusters = [Cluster({"worker": (first, second)}, "worker", 0), Cluster({"worker": (first, third)}, "worker", 1)]
    code = "from mlkit.jobs.cluster import meet, read_cluster; meet(read_cluster(), 20)"
    how = {"stderr": subprocess.PIPE, "text": True}
    told = [os.environ | {"TF_CONFIG": cluster.config()} for cluster in clusters]
    processes = [subprocess.Popen([sys.executable, "-c", code], env=one, **how) for one in told]
    for process in processes:
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert f"MlkitError: TF_CONFIG differs: {third} has" in said


def test_parameter_servers_keep_what_workers_learn(workshop: Workshop, alone: dict) -> None:
    record = workshop.execute("--workers", 2, "--servers", 1, "-p", "model=wide_deep", "-p", "epochs=6")
    assert record["crew"] == {"workers": 2, "servers": 1}
    losses = [value for _, value in record["history"]["val_loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert record["metrics"]["val_accuracy"] == pytest.approx(alone["metrics"]["val_accuracy"], abs=0.1)
    logs = {path.name for path in (Path(record["folder"]) / "workers").glob("*.log")}
    assert logs == {"worker-0.log", "worker-1.log", "ps-0.log"}


def test_options_that_do_not_go_together(workshop: Workshop) -> None:
    for options, message in [
        (["--workers", 2, "--sweep", "rows=100,200"], "--workers is for one run"),
        (["--servers", 1], "--servers needs --workers"),
    ]:
        result = run_cli("run", "learn.ipynb", *options, folder=workshop.folder)
        assert result.returncode == 2
        assert message in result.stderr
