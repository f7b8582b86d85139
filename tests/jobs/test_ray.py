"""Sweeps, searches and distributed training on a Ray cluster: real nodes on this machine, some of which are killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import polars as pl
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mlkit.config import load_settings
from mlkit.data import load_dataset
from mlkit.errors import MissingDependencyError, MlkitError, SettingsError, StorageError
from mlkit.export import export_saved_model, load_saved_model
from mlkit.jobs import run_sweep
from mlkit.jobs.kernels import ForkServerClient, running_servers
from mlkit.jobs.ray import SHUTDOWN_TIMEOUT, TaskSpec, propagated_environment, run_task, task_spec_for
from mlkit.models import build_model
from mlkit.runs import Run
from mlkit.runs.remote import download_run, open_remote_store
from mlkit.runs.store import RunStore
from tests.conftest import free_port, run_cli, wait_until
from tests.jobs import test_distributed

pytestmark = pytest.mark.slow
PARAMETERS = 'number: int = 0\nmeeting: str = ""\nnodes: int = 0\nheld: str = ""\nfail: bool = False'
LOG_NODE = """
import os, time
from pathlib import Path
from mlkit.runs import Run
node = os.environ["RAY_RAYLET_PID"]  # one for each node
Run.current().log_metrics({"node": int(node), "kernel": os.getpid()})
Path(meeting, node).touch()
while len(os.listdir(meeting)) < nodes:
    time.sleep(0.05)
"""
WAIT = "while held and not Path(held).exists():\n    time.sleep(0.05)"
FAIL = "assert not (fail and Run.current().record.attempts == 1), 'failure on request'"
RENDEZVOUS = """
import os
from mlkit.jobs.cluster import read_cluster, rendezvous
from mlkit.runs import Run
peers = rendezvous(read_cluster())
Run.current().log_metrics({"rank": peers.cluster.rank, "node": int(os.environ["RAY_RAYLET_PID"])})
"""
DRIVER = """
import json, sys
from mlkit.runs.store import RunStore
from mlkit.errors import MlkitError
from mlkit.jobs import resume_sweep, run_sweep
options = json.loads(sys.argv[1])
show = lambda states: print([(state.status, bool(state.run)) for state in states], file=sys.stderr)
try:
    if sweep := options.pop("sweep", None):
        resume_sweep(RunStore().get(sweep), engine="ray", on_progress=show, **options)
    else:
        run_sweep(options.pop("job"), options.pop("points"), engine="ray", on_progress=show, **options)
except MlkitError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass
class Cluster:
    """Ray nodes of one processor each; the processes of a node form a session, by which they are killed."""

    folder: str
    address: str = ""
    sessions: list[int] = field(default_factory=list)  # sessions of the running nodes

    def start(self, *wrapper: str) -> int:  # session of the node
        """Start a node and wait until it has joined."""
        starter = self.launch(*wrapper)
        assert starter.wait(120) == 0
        return starter.pid

    def launch(self, *wrapper: str) -> subprocess.Popen:
        """Begin to start a node; the first one is the head."""
        first = [f"--address={self.address}"]
        if not self.address:
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            first = ["--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
            first.append(f"--ray-client-server-port={free_port()}")
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        options = ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLKIT_", "RAY_"))}
        # Ray imports jsonschema, and that a grammar of URLs, for 2.5 seconds in each of a node's eight processes.
        Path(self.folder, "rfc3987_syntax.py").write_text("raise ImportError")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (self.folder, os.environ.get("PYTHONPATH"))))
        starter = subprocess.Popen(
            [*wrapper, *ray, *first, *options], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self.sessions.append(starter.pid)
        return starter

    def is_listening(self) -> bool:
        """Whether other nodes can join."""
        host, port = self.address.split(":")
        with socket.socket() as connection:
            return connection.connect_ex((host, int(port))) == 0

    def kill(self, session: int) -> None:
        """Kill a node at once, raylet and workers, as a power failure would."""
        while processes := self.processes(session):
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, 5)
        self.sessions.remove(session)

    def processes(self, session: int) -> list[psutil.Process]:
        """Processes of a node; the fork servers of its kernels have sessions of their own."""
        processes = []
        for process in psutil.process_iter(["status"]):
            try:
                if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except ProcessLookupError:
                continue
        return processes

    def raylet(self, session: int) -> int:
        """Process id of a node's raylet, which the runs on the node log."""
        return next(process.pid for process in self.processes(session) if process.name() == "raylet")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, the second of which a test may kill or replace."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mlkit[ray]'")
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # Ray's sockets need a short path
        cluster = Cluster(folder)
        try:
            head = cluster.launch()
            wait_until(cluster.is_listening)
            second = cluster.launch()
            assert head.wait(120) == 0
            if second.wait(120):  # on a busy machine the head may have started too late for it
                cluster.kill(second.pid)
                cluster.start()
            yield cluster
        finally:
            for session in list(cluster.sessions):
                cluster.kill(session)


@pytest.fixture
def two_nodes(cluster: Cluster) -> Cluster:
    """Two nodes that share the file system."""
    if len(cluster.sessions) < 2:
        cluster.start()
    return cluster


@dataclass
class Sweeps:
    """Project in which sweeps on a cluster are started."""

    folder: Path
    meeting: Path  # folder outside the project in which runs leave a file for each node
    environment: dict[str, str]
    drivers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def store(self) -> RunStore:
        return RunStore(self.folder / "runs")

    def start(self, **options: Any) -> subprocess.Popen:
        """Start a sweep in a process of its own."""
        return self._start("-c", DRIVER, json.dumps(options))

    def command(self, *arguments: Any) -> subprocess.Popen:
        """Start `mlkit ...`."""
        return self._start("-m", "mlkit", *map(str, arguments))

    def _start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, *arguments]
        driver = subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def points(self, count: int, **parameters: Any) -> list[dict[str, Any]]:
        """Points whose runs wait for one another in a folder of their own."""
        meeting = tempfile.mkdtemp(dir=self.meeting)
        return [{"number": n, "meeting": meeting} | parameters for n in range(count)]

    def begun(self, count: int) -> list[Run]:
        """Runs of the job, as soon as that many have logged their nodes."""
        return wait_until(lambda: len(runs := self.runs()) == count and runs)

    def runs(self) -> list[Run]:
        """Runs of the job that have logged their nodes, by number."""
        runs = [self.store.get(run.id) for run in self.store.list(job="where") if "node" in run.metrics]
        return sorted(runs, key=lambda run: run.record.parameters["number"])

    @property
    def sweep(self) -> Run:
        return self.store.get(next(iter(self.store.list(job="where-sweep"))).id)

    def points_runs(self) -> list[Run]:
        """The run of each point."""
        return [self.store.get(point.run) for point in self.sweep.record.points]


@pytest.fixture
def sweeps(cluster: Cluster, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeps]:
    """A project with a job, which needs no TensorFlow."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in (LOG_NODE, WAIT, FAIL)]
    nbformat.write(new_notebook(cells=cells), project / "where.ipynb")
    preload = "numpy,mailbox"  # gives the warm servers a key of their own
    environment = {"RAY_ADDRESS": cluster.address, "MLKIT_KERNELS_PRELOAD": preload}
    sweeps = Sweeps(project, tmp_path_factory.mktemp("meeting"), environment)
    yield sweeps
    for driver in sweeps.drivers:  # of a test that failed
        driver.kill()
        driver.wait()


def finish(driver: subprocess.Popen, code: int = 0) -> str:  # its standard error
    """Wait for the end of a sweep."""
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == code, errors
    assert output == ""  # standard output is for JSON
    return errors


def finish_json(driver: subprocess.Popen) -> dict:
    """The record that a command prints at its end."""
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    return json.loads(output)


def test_a_sweep_fans_out_over_the_nodes(two_nodes: Cluster, sweeps: Sweeps) -> None:
    points = sweeps.points(4, nodes=2)
    points[1]["fail"] = points[2]["fail"] = True
    errors = finish(sweeps.start(job="where.ipynb", points=points, retries=1))
    runs = sweeps.points_runs()
    assert [run.status for run in runs] == ["completed"] * 4
    assert [run.record.attempts for run in runs] == [1, 2, 2, 1]
    assert {run.record.metrics["node"] for run in runs} == {two_nodes.raylet(session) for session in two_nodes.sessions}
    assert {run.record.parents[0] for run in runs} == {sweeps.sweep.id}
    assert {run.record.working_directory for run in runs} == {str(sweeps.folder)}
    assert {run.record.notebook for run in runs} == {"where.ipynb"}
    assert all(run.record.environment_variables["TF_NUM_INTRAOP_THREADS"] == "1" for run in runs)
    assert list((runs[0].folder / "tensorboard").glob("*.hparams"))
    assert "('running', True)" in errors  # the callback receives runs while they are executed
    assert not [path for path in sweeps.sweep.folder.iterdir() if path.name.startswith(".seen")]


def has_begun(run: Run, attempt: int) -> bool:
    """Whether a run is in its n-th attempt and has logged its node."""
    record = run.record
    return record.attempts == attempt and "kernel" in record.metrics


def node_of(run: Run) -> int:
    return int(run.record.metrics["node"])


def test_an_interrupted_sweep_leaves_no_process_running(two_nodes: Cluster, sweeps: Sweeps) -> None:
    go = sweeps.meeting / "go"
    driver = sweeps.start(job="where.ipynb", points=sweeps.points(3, nodes=2, held=str(go)))
    runs = sweeps.begun(2)
    for attempt, number in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
        wait_until(lambda attempt=attempt: all(has_begun(run, attempt) for run in runs))
        kernels = {int(run.record.metrics["kernel"]) for run in runs}
        servers = {server["pid"] for server in running_servers() if kernels & set(server["kernels"])}
        assert servers
        driver.send_signal(number)
        errors = driver.communicate(timeout=2 * SHUTDOWN_TIMEOUT)[1]
        wait_until(lambda: [run.status for run in (*runs, sweeps.sweep)] == ["interrupted"] * 3)
        wait_until(lambda alive=kernels | servers: not any(map(psutil.pid_exists, alive)))
        if number == signal.SIGTERM:
            assert "JobInterruptedError" in errors
            assert [run.record.status for run in (*runs, sweeps.sweep)] == ["interrupted"] * 3
        else:
            go.touch()
        driver = sweeps.start(sweep=sweeps.sweep.id)
    finish(driver)
    assert [run.status for run in sweeps.points_runs()] == ["completed"] * 3
    assert [run.record.attempts for run in runs] == [3, 3]
    assert len(sweeps.runs()) == 3


def test_runs_of_a_lost_node_resume_on_another(two_nodes: Cluster, sweeps: Sweeps) -> None:
    doomed, go = two_nodes.sessions[1], sweeps.meeting / "go"
    raylet = two_nodes.raylet(doomed)
    driver = sweeps.start(job="where.ipynb", points=sweeps.points(3, nodes=2, held=str(go)))
    lost = next(run for run in sweeps.begun(2) if node_of(run) == raylet)
    kernel = int(lost.record.metrics["kernel"])
    two_nodes.kill(doomed)
    wait_until(lambda: lost.record.status == "interrupted")  # recorded by the sweep: the process of the run is dead
    assert lost.record.failure.error == "NodeLost"
    wait_until(lambda: not psutil.pid_exists(kernel))
    assert sweeps.sweep.status == "running"
    go.touch()
    finish(driver)
    runs = sweeps.points_runs()
    assert [run.status for run in runs] == ["completed"] * 3
    assert {run.id: run.record.attempts for run in runs} == {run.id: 1 + (run.id == lost.id) for run in runs}
    assert lost.id in {run.id for run in runs}
    assert node_of(lost) != raylet
    assert len(sweeps.runs()) == 3


def test_a_node_without_the_shared_run_store_uses_the_remote_one(cluster: Cluster, sweeps: Sweeps) -> None:
    own = tempfile.mkdtemp(dir=sweeps.meeting)  # another machine has warm servers of its own
    script = f'mount -t tmpfs none {sweeps.folder} && exec env XDG_RUNTIME_DIR={own} "$@"'
    hide = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    for session in cluster.sessions[1:]:
        cluster.kill(session)
    blind = cluster.start(*hide)
    raylet, first, second = cluster.raylet(blind), sweeps.meeting / "first", sweeps.meeting / "second"
    driver = sweeps.start(job="where.ipynb", points=sweeps.points(2, held=str(first)))
    next(line for line in driver.stderr if "failed" in line)  # the other node is held
    first.touch()
    finish(driver, code=1)
    assert "runs.remote is not set" in sweeps.sweep.record.failure.message

    sweeps.environment["MLKIT_RUNS_REMOTE"] = (sweeps.meeting / "remote").as_uri()
    finish(sweeps.start(job="where.ipynb", points=sweeps.points(3, nodes=2)))
    runs = sweeps.points_runs()
    assert [run.status for run in runs] == ["completed"] * 3
    remote_runs = [run for run in runs if node_of(run) == raylet]
    assert remote_runs
    assert {run.record.working_directory for run in runs} == {str(sweeps.folder)}
    assert {run.record.notebook for run in remote_runs} == {str(sweeps.folder / "where.ipynb")}
    assert all((sweeps.meeting / "remote" / run.id / "run.json").exists() for run in remote_runs)

    nbformat.write(new_notebook(cells=[new_code_cell(RENDEZVOUS)]), sweeps.folder / "rendezvous.ipynb")
    record = finish_json(sweeps.command("run", "rendezvous.ipynb", "--workers", 2, "--engine", "ray", "--json"))
    worker = Run(Path(record["folder"], "workers", "1"))  # worker 0 is on the node that shares the run store
    assert [record["status"], worker.record.status] == ["completed"] * 2
    assert [record["metrics"]["node"] == raylet, worker.record.metrics["node"]] == [False, raylet]
    assert (worker.folder / "notebook.html").exists()

    points = sweeps.points(2, nodes=2, held=str(second))
    driver = sweeps.start(job="where.ipynb", points=points)
    wait_until(lambda: len(os.listdir(points[0]["meeting"])) == 2 and all(p.run for p in sweeps.sweep.record.points))
    begun = {point.run for point in sweeps.sweep.record.points}
    cluster.kill(blind)
    second.touch()
    finish(driver)
    runs = sweeps.points_runs()
    assert [run.status for run in runs] == ["completed"] * 2
    assert len(begun & {run.id for run in runs}) == 1  # the other one was lost with its node and replaced


TRIAL = """
import os, time
from pathlib import Path
from mlkit.runs import Run
Run.current().log_metrics({"loss": (x - 1) ** 2, "node": int(os.environ["RAY_RAYLET_PID"])}, step=1)
while not Path(held).exists():
    time.sleep(0.05)
"""
SEARCH = """
from mlkit.tuning import tune
space = {"x": {"min": -2.0, "max": 2.0}}
tune(space, {"held": held}, job="try.ipynb", objective="loss", trials=4, max_parallel=2, engine=engine)
"""


def test_a_search_over_a_cluster(two_nodes: Cluster, sweeps: Sweeps) -> None:
    """A node is killed during a trial, then the search: no trial is lost, none is executed twice."""
    for name, parameters, source in (
        ("try", 'x: float = 0.0\nheld: str = ""', TRIAL),
        ("seek", 'engine: str = "local"\nheld: str = ""', SEARCH),
    ):
        cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), sweeps.folder / f"{name}.ipynb")
    store, go, doomed = sweeps.store, sweeps.meeting / "go", two_nodes.sessions[1]
    raylet = two_nodes.raylet(doomed)

    def trials() -> list[Run]:
        return [
            run for run in (store.get(summary.id) for summary in store.list(job="try")) if "node" in run.record.metrics
        ]

    driver = sweeps.command("run", "seek.ipynb", "--engine", "ray", "-p", f"held={go}", "--json")
    begun = wait_until(lambda: len(runs := trials()) == 2 and runs, 300)
    (lost,) = (run for run in begun if node_of(run) == raylet)
    two_nodes.kill(doomed)
    wait_until(lambda: lost.record.status == "interrupted")
    two_nodes.start()
    wait_until(lambda: lost.record.attempts == 2 and "node" in lost.record.metrics)
    driver.kill()
    driver.communicate()
    (search,) = (store.get(summary.id) for summary in store.list(job="seek"))
    wait_until(lambda: [run.status for run in (*begun, search)] == ["interrupted"] * 3)

    go.touch()
    finish_json(sweeps.command("resume", search.id, "--json"))
    runs = [store.get(point.run) for point in search.record.points]
    assert [run.status for run in runs] == ["completed"] * 4
    assert {run.id for run in runs} == {summary.id for summary in store.list(job="try")}
    assert sorted(run.record.attempts for run in runs) == [1, 1, 2, 3]
    events = [json.loads(line) for line in (search.folder / "search.jsonl").read_text().splitlines()]
    for kind in ("ask", "end"):
        assert sorted(event[kind] for event in events if event.get(kind)) == [1, 2, 3, 4]


PRINT_NODE = 'print("On node", os.environ.get("RAY_RAYLET_PID"))'


def nodes_of(run: Run) -> set[str]:
    """Process ids of the raylets on whose nodes a run and its worker were executed."""
    notebooks = [nbformat.read(folder / "notebook.ipynb", 4) for folder in (run.folder, run.folder / "workers" / "1")]
    return {output["text"].split()[-1] for notebook in notebooks for output in notebook.cells[-2].outputs}


def test_distributed_training_on_a_cluster(two_nodes: Cluster, sweeps: Sweeps) -> None:
    """It is interrupted, resumed, loses a node, continues, and trains the same model as one process."""
    sweeps.environment["MLKIT_KERNELS_PRELOAD"] = "tensorflow,keras,mailbox"
    cells = [new_code_cell(test_distributed.PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in (test_distributed.BEGIN, PRINT_NODE, test_distributed.TRAIN)]
    nbformat.write(new_notebook(cells=cells), sweeps.folder / "learn.ipynb")
    hold = sweeps.meeting / "hold"
    markers = [Path(f"{hold}.{n}") for n in range(2)]
    engine = ("--engine", "ray", "--json")
    driver = sweeps.command("run", "learn.ipynb", "-p", f"hold={hold}", "--workers", 2, *engine)
    kernels = [int(wait_until(lambda marker=marker: marker.exists() and marker.read_text(), 300)) for marker in markers]
    warm = [ForkServerClient(server["key"]).hold() for server in running_servers()]  # imports TensorFlow once
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 143
    wait_until(lambda: not any(map(psutil.pid_exists, kernels)))
    run = sweeps.store.get("latest")
    assert [run.record.status, Run(run.folder / "workers" / "1").record.status] == ["interrupted"] * 2
    assert nodes_of(run) == {str(two_nodes.raylet(session)) for session in two_nodes.sessions}

    for marker in markers:
        marker.unlink()
    driver = sweeps.command("resume", run.id, *engine)
    wait_until(lambda: all(marker.exists() and marker.read_text() for marker in markers), 300)
    two_nodes.kill(two_nodes.sessions[1])
    two_nodes.start()
    record = finish_json(driver)
    assert (record["status"], record["attempts"]) == ("completed", 3)
    output = nbformat.read(run.folder / "notebook.ipynb", 4).cells[-1].outputs
    assert any("Resumes after epoch 1" in line.get("text", "") for line in output)
    worker = Run(run.folder / "workers" / "1").record
    assert (worker.status, worker.metrics) == ("completed", record["metrics"])
    assert "TF_CONFIG" not in record["environment_variables"] | worker.environment_variables
    for hold in warm:
        hold.close()
    single = run_cli("run", "learn.ipynb", "--json", folder=sweeps.folder)
    test_distributed.assert_same(record, json.loads(single.stdout), 1e-4)


PREDICT = "import mlkit.serving.batch_predict as p, sys; p._CHUNK_ROWS = 10; from mlkit.cli.main import main; main()"


def test_batch_prediction_on_a_cluster(two_nodes: Cluster, tmp_path: Path) -> None:
    """A node is killed during a chunk: another one predicts it, and the result is complete."""
    data, doomed = load_dataset("wine"), two_nodes.sessions[1]
    model = export_saved_model(build_model("linear", data), data, tmp_path / "model")
    data.table.write_parquet(tmp_path / "wine.parquet")
    files = ["--input", tmp_path / "wine.parquet", "--output", tmp_path / "scores.parquet"]
    command = [sys.executable, "-c", PREDICT, "predict", model, *files, "--engine", "ray", "--json"]
    environment = os.environ | {"RAY_ADDRESS": two_nodes.address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(list(map(str, command)), env=environment, **pipes)

    def is_predicting() -> bool:
        titles = (" ".join(process.cmdline()) for process in two_nodes.processes(doomed))
        return any(title.startswith("ray::predict_chunk") for title in titles)

    try:
        wait_until(lambda: is_predicting() or driver.poll() is not None, 120)
        assert driver.poll() is None, driver.communicate()
        two_nodes.kill(doomed)
        output, errors = driver.communicate(timeout=180)
    finally:
        driver.kill()
    assert driver.returncode == 0, errors
    assert json.loads(output)["rows"] == data.table.height
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores["row"].to_list() == list(range(data.table.height))
    expected = load_saved_model(model)({name: data.inputs[name].to_list() for name in data.features})
    np.testing.assert_allclose(scores["probabilities"].to_numpy(), expected["probabilities"], atol=1e-5)


def test_without_a_cluster(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mlkit[ray]'")
    nbformat.write(new_notebook(), project / "empty.ipynb")
    monkeypatch.chdir(project)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(MlkitError, match=re.escape("there is no connection to 127.0.0.1")) as raised:
        run_sweep("empty.ipynb", [{}], engine="ray")
    assert "ray start --head" in str(raised.value)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(project))
    (project / "ray").mkdir()
    (project / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")  # one that has been killed
    with pytest.raises(MlkitError, match="there is no connection"):
        run_sweep("empty.ipynb", [{}], engine="ray")
    assert not (project / "runs").exists()


def test_without_ray(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat.write(new_notebook(), project / "empty.ipynb")
    monkeypatch.chdir(project)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlkit\[ray\]'$"):
        run_sweep("empty.ipynb", [{}], engine="ray")
    assert not (project / "runs").exists()


def test_the_module_does_not_import_ray() -> None:
    code = "import sys, mlkit.jobs.sweep; sys.exit('ray' in sys.modules or 'fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_travel_as_variables_and_the_rest_of_the_environment_does_not() -> None:
    variables = propagated_environment()
    assert variables["MLKIT_RUNS_ROOT"] == str(load_settings().runs.root)
    assert not [name for name in variables if name in ("PATH", "HOME", "LD_LIBRARY_PATH")]


@pytest.fixture
def remote_spec(project: Path, monkeypatch: pytest.MonkeyPatch) -> TaskSpec:
    """Task of a sweep for a node that does not see the run store: the probe file does not exist."""
    pytest.importorskip("fsspec")
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy")
    monkeypatch.setenv("MLKIT_RUNS_REMOTE", (project / "remote").as_uri())
    cells = [new_code_cell("rate: float = 0.1", metadata={"tags": ["parameters"]}), new_code_cell("rate")]
    nbformat.write(new_notebook(cells=cells), project / "job.ipynb")
    sweep = RunStore(project / "runs").create("job-sweep", notebook=str(project / "job.ipynb")).start()
    spec = task_spec_for(sweep, token="no-such-file", resources={"num_cpus": 1})
    return replace(spec, parameters={"rate": 0.4})


def test_a_task_without_the_run_store_uploads_its_run(remote_spec: TaskSpec, project: Path) -> None:
    """The task is executed here, as a node would execute it."""
    *_, update = run_task(remote_spec)
    assert (update.ended, update.error) == (True, "")
    assert not (project / "runs" / update.run).exists()
    store = RunStore(project / "runs")
    run = download_run(update.run, store, remote_spec.remote_url)
    assert (run.status, run.record.parents) == ("completed", [remote_spec.parent_folder.name])
    assert run.record.working_directory == os.getcwd()
    assert download_run("nothing", store, remote_spec.remote_url) is None

    store.delete(run)
    report = project / "remote" / run.id / "notebook.html"
    report.write_text(report.read_text() + "<!-- altered -->")
    with pytest.raises(StorageError, match="its files differ from its record"):
        download_run(run.id, store, remote_spec.remote_url)
    with pytest.raises(SettingsError, match=re.escape("runs.remote = 's4://bucket'")):
        open_remote_store("s4://bucket")


def test_a_task_whose_run_could_not_be_uploaded_is_rejected(remote_spec: TaskSpec) -> None:
    *_, update = run_task(replace(remote_spec, remote_url=""))
    assert (update.ended, update.run, "set runs.remote" in update.error) == (True, "", True)
