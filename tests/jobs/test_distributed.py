"""Distributed training in real processes, some of which are killed."""

import importlib.util
import json
import os
import re
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

from mlkit.errors import JobFailedError, MlkitError, ParameterError, StorageError
from mlkit.jobs import run_distributed
from mlkit.jobs.cluster import Cluster, free_ports
from mlkit.jobs.distributed import (
    WorkerGroup,
    check_room,
    download_worker_run,
    resume_distributed,
    upload_worker_run,
    worker_group_of,
    worker_run,
)
from mlkit.runs import Run
from mlkit.runs.record import RUN_FILE, list_artifacts
from mlkit.runs.remote import download_run, upload_run
from mlkit.runs.store import RunStore
from tests.conftest import hold_server, run_cli, wait_until

pytestmark = pytest.mark.slow
PARAMETERS = """
rows: int = 1511  # rows of the data; a worker may be given another number
model: str = "mlp"
epochs: int = 4
hold: str = ""  # file for which a worker waits at the end of the second epoch
"""
BEGIN = """
import os, time
from pathlib import Path
import keras
from mlkit.data import load_dataset
from mlkit.models import build_model
from mlkit.runs import Run
from mlkit.training.steps import StepsPerCall
from mlkit.training import make_strategy
from mlkit.training import fit
run = Run.current()
distribution = make_strategy()
"""
TRAIN = """
def wait(epoch, logs):
    marker = Path(f"{hold}.{distribution.local_replicas.start}")
    if hold and epoch == 1 and not marker.exists():  # in the first attempt
        marker.write_text(str(os.getpid()))
        while not os.path.exists(hold):
            time.sleep(0.05)

if distribution.local_replicas.start and "OTHER_ROWS" in os.environ:
    rows = int(os.environ["OTHER_ROWS"])
data = load_dataset("retail", rows=rows)
network = build_model(model, data, seed=1)
callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=wait)] if hold else []
if distribution.local_replicas.start:
    StepsPerCall.TARGET_SECONDS = 100.0  # this worker would use ever more steps per call if it decided alone
options = {"strategy": distribution, "checkpoint_every_minutes": 1e-6, "patience": 99}
history = fit(network, data, epochs=epochs, batch_size=250, run=run, callbacks=callbacks, **options)
run.log_metrics({"weights": sum(float(abs(weight).sum()) for weight in network.get_weights())})
"""


@dataclass
class TrainingProject:
    """Project with a training job, and the processes that execute it."""

    folder: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": "-1"}

    @property
    def run(self) -> Run:
        return RunStore(self.folder / "runs").get("latest")

    def execute(self, *options: Any, code: int = 0, **environment: str) -> dict:
        """Execute the job and return its record."""
        arguments = ("run", "learn.ipynb", *options, "--json")
        result = run_cli(*arguments, folder=self.folder, **self.environment, **environment)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout)

    def start(self, *arguments: Any) -> subprocess.Popen:
        """Start an `mlkit` command in the background."""
        command = [sys.executable, "-m", "mlkit", *map(str, arguments)]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, env=os.environ | self.environment, **streams)
        self.started.append(process)
        return process

    def waiting_kernel(self, hold: Path, rank: int) -> int:
        """Process id of the kernel that waits for the file, as soon as it waits."""
        marker = Path(f"{hold}.{rank}")
        return int(wait_until(lambda: marker.exists() and marker.read_text(), seconds=300))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingProject]:
    """The project; processes that a failed test has left running are killed."""
    folder = tmp_path_factory.mktemp("training")
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(BEGIN), new_code_cell(TRAIN)]), folder / "learn.ipynb")
    training = TrainingProject(folder)
    hold_server(**training.environment)
    yield training
    for process in training.started:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def single(training: TrainingProject) -> dict:
    """Record of the job executed by one process."""
    return training.execute()


@pytest.fixture(scope="module")
def distributed(training: TrainingProject) -> dict:
    """Record of the job executed by two workers."""
    return training.execute("--workers", 2)


def assert_same(record: dict, other: dict, tolerance: float) -> None:
    """Assert that every metric of every epoch, and the weights, agree."""
    assert record["history"].keys() == other["history"].keys()
    for name, points in record["history"].items():
        expected = [value for _, value in other["history"][name]]
        assert [value for _, value in points] == pytest.approx(expected, rel=tolerance), name
    assert record["metrics"] == pytest.approx(other["metrics"], rel=tolerance)


def test_two_workers_train_the_same_model_as_one_process(single: dict, distributed: dict) -> None:
    assert_same(distributed, single, 1e-4)
    folder = Path(distributed["folder"])
    files = {path.name for path in (folder / "workers" / "1").iterdir() if path.name[0] != "."}
    assert files - {"kernel.log"} == {"run.json", "notebook.ipynb", "notebook.html"}
    worker = Run(folder / "workers" / "1")
    assert worker.record.status == "completed"
    assert worker.record.metrics == distributed["metrics"]
    assert list((folder / "tensorboard").rglob("events.*"))
    assert "TF_CONFIG" not in distributed["environment_variables"]
    assert distributed["worker_group"] == {"workers": 2, "servers": 0}
    listed = {artifact["path"] for artifact in distributed["artifacts"]}
    assert "workers/1/notebook.ipynb" in listed


@pytest.mark.parametrize("rank", [1, 0])
def test_training_resumes_after_a_worker_dies(
    rank: int, training: TrainingProject, distributed: dict, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    launcher = training.start("run", "learn.ipynb", "--workers", 2, "-p", f"hold={hold}")
    kernels = [training.waiting_kernel(hold, number) for number in range(2)]
    os.kill(kernels[rank], signal.SIGKILL)
    assert launcher.wait(300) == 0, launcher.stderr.read()
    record = json.loads((training.run.folder / "run.json").read_text())
    assert (record["status"], record["attempts"]) == ("completed", 2)
    assert_same(record, distributed, 1e-6)
    outputs = nbformat.read(training.run.folder / "notebook.ipynb", 4).cells[-1].outputs
    assert any("Resumes after epoch 1" in output.get("text", "") for output in outputs)


def test_an_interrupted_run_resumes_with_the_same_worker_group(
    training: TrainingProject, distributed: dict, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    launcher = training.start("run", "learn.ipynb", "--workers", 2, "-p", f"hold={hold}")
    kernels = [training.waiting_kernel(hold, number) for number in range(2)]
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 143
    wait_until(lambda: not any(map(psutil.pid_exists, kernels)))
    run = training.run
    assert run.record.status == "interrupted"
    assert training.start("resume", run.id).wait(300) == 0
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["status"], record["attempts"]) == ("completed", 2)
    assert_same(record, distributed, 1e-6)
    assert Run(run.folder / "workers" / "1").record.status == "completed"


def test_a_worker_that_dies_without_retries_fails_the_run(training: TrainingProject, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    launcher = training.start("run", "learn.ipynb", "--workers", 2, "--retries", 0, "-p", f"hold={hold}")
    os.kill(training.waiting_kernel(hold, 1), signal.SIGKILL)
    assert launcher.wait(120) == 1
    failure = training.run.record.failure
    assert failure.error == "DeadKernelError"
    assert failure.message.startswith("Worker 1: The kernel was terminated by SIGKILL")


def test_workers_with_different_data_are_rejected(training: TrainingProject) -> None:
    record = training.execute("--workers", 2, code=2, OTHER_ROWS="1600")
    assert record["failure"]["error"] == "ParameterError"
    assert "Worker 1 differs from worker 0: data" in record["failure"]["message"]
    assert record["attempts"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{cluster:", "TF_CONFIG is not JSON"),
        ("UNREACHABLE", "After 2 seconds there is no connection from worker 1 (127.0.0.1:"),
    ],
)
def test_an_invalid_cluster_is_rejected_in_time(config: str, message: str, training: TrainingProject) -> None:
    if config == "UNREACHABLE":
        peers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
        config = Cluster({"worker": peers}, "worker", 0).config()
    code = 1 if "After" in message else 2
    record = training.execute(code=code, TF_CONFIG=config, MLKIT_DISTRIBUTED_RENDEZVOUS_TIMEOUT="2")
    assert message in record["failure"]["message"]
    assert record["cells"][-1]["seconds"] < 60


def test_processes_that_disagree_report_the_same_error(training: TrainingProject) -> None:
    first, second, third = (f"127.0.0.1:{port}" for port in free_ports(3))
    clusters = [Cluster({"worker": (first, second)}, "worker", 0), Cluster({"worker": (first, third)}, "worker", 1)]
    code = "from mlkit.jobs.cluster import read_cluster, rendezvous; rendezvous(read_cluster(), 20)"
    environments = [os.environ | {"TF_CONFIG": cluster.config()} for cluster in clusters]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for environment in environments
    ]
    for process in processes:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert f"MlkitError: TF_CONFIG differs: {third} has" in errors


def test_parameter_servers_store_what_workers_learn(training: TrainingProject, single: dict) -> None:
    record = training.execute("--workers", 2, "--servers", 1, "-p", "model=wide_deep", "-p", "epochs=6")
    assert record["worker_group"] == {"workers": 2, "servers": 1}
    losses = [value for _, value in record["history"]["val_loss"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert record["metrics"]["val_accuracy"] == pytest.approx(single["metrics"]["val_accuracy"], abs=0.1)
    logs = {path.name for path in (Path(record["folder"]) / "workers").glob("*.log")}
    assert logs == {"worker-0.log", "worker-1.log", "ps-0.log"}


def test_incompatible_options_are_rejected(training: TrainingProject) -> None:
    for options, message in [
        (["--workers", 2, "--sweep", "rows=100,200"], "--workers is for one run"),
        (["--servers", 1], "--servers needs --workers"),
    ]:
        result = run_cli("run", "learn.ipynb", *options, folder=training.folder)
        assert result.returncode == 2
        assert message in result.stderr


def test_a_worker_group_has_a_cluster_of_free_addresses() -> None:
    cluster = WorkerGroup(2, servers=1).cluster()
    assert str(cluster) == "chief 0 of 1 chief and 2 workers and 1 ps"
    assert str(WorkerGroup(2).cluster()) == "worker 0 of 2 workers"
    assert len({address for tasks in cluster.addresses.values() for address in tasks}) == 4
    with pytest.raises(ParameterError, match="at least one worker"):
        WorkerGroup(0)


def test_a_cluster_that_is_too_small_is_rejected() -> None:
    check_room(WorkerGroup(3), [{"CPU": 2}, {"CPU": 1}])
    for group, nodes, message in [
        (WorkerGroup(4), [{"CPU": 2}, {"CPU": 1}], "and the Ray cluster has 3"),
        (WorkerGroup(4), [{"CPU": 8, "GPU": 2}, {"CPU": 8}], "need a GPU each"),
        (WorkerGroup(2, servers=1), [{"CPU": 8}], "Leave out --servers"),
    ]:
        with pytest.raises(ParameterError, match=message):
            check_room(group, nodes)


def test_a_worker_run_is_transferred_with_its_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    remote, node = (tmp_path / "remote").as_uri(), RunStore(tmp_path / "node")
    run = RunStore(tmp_path / "home").create("train").start()
    (run.checkpoints / "old").write_text("of the first attempt")
    upload_worker_run(run, "sent", remote)
    node.root.mkdir()
    on_node = download_run("sent", node, remote)
    on_node.log_metrics({"loss": 0.5})
    (on_node.checkpoints / "old").rename(on_node.checkpoints / "new")
    on_node.interrupt()
    upload_run(on_node, remote, "returned")
    worker_run(run, 1)
    download_worker_run(run, "returned", remote)
    assert (run.status, run.record.metrics) == ("interrupted", {"loss": 0.5})
    assert [path.name for path in run.checkpoints.iterdir()] == ["new"]
    assert (run.folder / "workers" / "1" / RUN_FILE).exists()
    with pytest.raises(StorageError, match="nothing is not at"):
        download_worker_run(run, "nothing", remote)


RENDEZVOUS = """
from mlkit.jobs.cluster import read_cluster, rendezvous
cluster = read_cluster()
peers = rendezvous(cluster)
print(cluster)
"""
FAIL = """
assert cluster.rank != fail, 'failure on request'
if fail >= 0:  # as in training: a peer is lost
    peers.lost_event.wait(60)
    raise RuntimeError(f'{peers.loss_message} The other workers cannot continue without it.')
"""
LOG_RANK = "from mlkit.runs import Run\nRun.current().log_metrics({'rank': cluster.rank})"


@pytest.fixture(scope="module")
def rendezvous_job(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Job without TensorFlow whose workers rendezvous and log their ranks."""
    cells = [new_code_cell("fail: int = -1  # rank of the worker that fails", metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in (RENDEZVOUS, FAIL, LOG_RANK)]
    path = tmp_path_factory.mktemp("rendezvous") / "rendezvous.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return str(path)


def test_each_worker_has_a_run_inside_the_run(rendezvous_job: str, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    run = run_distributed(rendezvous_job, workers=3, store=store)
    notebooks = sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("notebook.ipynb"))
    assert notebooks == ["notebook.ipynb", "workers/1/notebook.ipynb", "workers/2/notebook.ipynb"]
    assert run.record.metrics == {"rank": 0}
    assert [Run(run.folder / "workers" / n).record.metrics["rank"] for n in "12"] == [1, 2]
    text = nbformat.read(run.folder / "workers" / "2" / "notebook.ipynb", 4).cells[1].outputs[0].text
    assert text == "worker 2 of 3 workers\n"
    assert worker_group_of(run) == WorkerGroup(3)
    artifacts = [artifact.path for artifact in run.record.artifacts]
    assert artifacts == [artifact.path for artifact in list_artifacts(run.folder)]
    assert "TF_CONFIG" not in run.record.environment_variables
    assert [summary.id for summary in store.list()] == [run.id]
    with pytest.raises(MlkitError, match="is completed; only an interrupted or failed run"):
        resume_distributed(run)


def test_the_run_records_which_worker_failed_first(rendezvous_job: str, tmp_path: Path) -> None:
    with pytest.raises(JobFailedError) as raised:
        run_distributed(rendezvous_job, {"fail": 1}, workers=2, store=RunStore(tmp_path / "runs"))
    run = raised.value.run
    assert run.record.failure.message.startswith("Worker 1: failure on request")
    assert (run.status, run.record.attempts) == ("failed", 1)


def test_without_a_ray_cluster_no_run_is_created(
    rendezvous_job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path / "runs")
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")
    with pytest.raises(ParameterError, match=re.escape("Did you mean 'ray'?")):
        run_distributed(rendezvous_job, engine="rya", store=store)
    if importlib.util.find_spec("ray"):
        with pytest.raises(MlkitError, match="there is no connection to localhost:1"):
            run_distributed(rendezvous_job, engine="ray", store=store)
    assert not len(store.list())
