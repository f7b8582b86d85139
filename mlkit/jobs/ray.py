"""Runs on a Ray cluster: the connection, what a task needs to execute a run on a node, and the backend of sweeps.

Machines are joined into a cluster by Ray's own commands:

    ray start --head                      # on one machine
    ray start --address=FIRST:6379        # on each of the others
    mlkit run train --sweep units=64,128,256 --engine ray

Every machine has the same version of mlkit installed. The machine on which a command is typed is a node itself (with
`--num-cpus=0` if it should not compute). Ray is an extra, `mlkit[ray]`, and imported only when it is used. Whoever can
reach a cluster can execute anything on it; Ray requires a token where `RAY_AUTH_MODE=token` is set.

A task receives a `TaskSpec` in one message: the notebook, the parameters, the settings in effect, and the variables
that change what TensorFlow computes. Secrets are not part of it, because Ray may write messages to disk; a task reads
them on its node: `env:NAME` from the environment in which `ray start` was called, `file:PATH` from the node's disk. A
task yields `TaskUpdate`s: the run has begun, a cell has begun, the run has ended.

A node either sees the run store (a shared file system), or works in a temporary folder and uploads its finished run to
the remote run store, from which it is downloaded.
"""

import contextlib
import logging
import os
import queue
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlkit._compat.ray import redirect_node_output
from mlkit.config import known_settings, load_settings, variable_name
from mlkit.errors import MissingDependencyError, MlkitError, SettingsError
from mlkit.jobs.executor import CancellationToken, CellProgress, ProgressCallback, resume_run, run_job
from mlkit.jobs.points import TrialBackend, TrialQueue, TrialState, TrialTracker, close_abandoned, is_retryable
from mlkit.jobs.resources import ray_resources, thread_variables
from mlkit.runs.record import RUN_FILE, ProcessInfo, current_owner
from mlkit.runs.remote import RAY_EXTRA, download_run, open_remote_store, upload_run
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore

SHUTDOWN_TIMEOUT = 60  # seconds in which cancelled tasks stop their kernels and close their runs
PROPAGATED_VARIABLES = ("TF_", "KERAS_", "XLA_", "OMP_NUM_THREADS")  # prefixes; settings are propagated too


# The connection


def import_ray() -> Any:  # the module ray
    """Import Ray; raises MissingDependencyError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"Work over a cluster needs Ray ({error}). It comes with: {RAY_EXTRA}") from error
    return ray


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:  # the module ray, connected
    """Context manager that connects to the running cluster; raises MlkitError when there is none."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=_cluster_address(), log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise _connection_error(str(error).partition("\n")[0]) from error
    try:
        with quiet_ray():
            yield ray
    finally:
        ray.shutdown()


def _connection_error(reason: str) -> MlkitError:
    advice = (
        "Start one with `ray start --head`, and join it on other machines with `ray start --address=HOST:6379`; "
        "RAY_ADDRESS=HOST:6379 selects one where there are several."
    )
    return MlkitError(f"There is no Ray cluster to run on: {reason.rstrip('.')}. {advice}")


def _cluster_address() -> str:  # "auto" where Ray has to discover it
    """Address of the cluster that RAY_ADDRESS names or that was started last; raises MlkitError when it is closed.

    The port is probed first, because Ray retries an address without a listener for minutes.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    last = Path(folder, "ray", "ray_current_cluster")  # written by `ray start`
    address = os.environ.get("RAY_ADDRESS") or (last.read_text().strip() if last.is_file() else "auto")
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise _connection_error(f"there is no connection to {address} ({error.strerror or error})") from error
    return address


def node_resources() -> list[dict[str, float]]:
    """Resources of the living nodes of the connected cluster."""
    return [node["Resources"] for node in import_ray().nodes() if node["Alive"]]


def quiet_ray() -> AbstractContextManager[None]:
    """Context manager that sends Ray's messages about nodes to the log: standard output is for JSON."""
    return redirect_node_output(lambda lines: logging.getLogger("mlkit").info("Ray: %s", lines))


# The task


@dataclass(frozen=True)
class TaskSpec:
    """All that a process on another machine needs to execute a run."""

    parent_folder: (
        Path  # folder of the parent run (a sweep, or a run of several processes) on the machine that started it
    )
    token: str  # name of a file in that folder, by which a node detects that it sees the same run store
    working_directory: str  # working folder on the machine that started the parent run
    notebook: Path  # path of the job's notebook on that machine
    content: bytes  # content of the notebook
    environment: dict[str, str]  # environment variables to set
    variables: dict[str, str]  # environment variables of the kernel that allocate resources
    remote_url: str  # URL of the remote run store; "" for none
    timeout: float | None = None  # seconds after which the run fails
    parameters: Mapping[str, Any] | None = None
    run: str = ""  # path in the run store of the run to resume, if the node can reach it


@dataclass(frozen=True)
class TaskUpdate:
    """Status update of a task."""

    run: str = ""  # id of the run; "" before it exists
    cell: CellProgress | None = None  # cell that is being executed
    ended: bool = False
    error: str = ""  # reason for the end unless the run completed
    retryable: bool = False  # whether another attempt may help
    owner: ProcessInfo | None = None  # process that executes the task


def propagated_environment() -> dict[str, str]:  # name -> value
    """Environment variables for other nodes: settings in effect, and variables that change what is computed.

    Settings travel as the variables that would set them, so a node needs no `settings.ini`.
    """
    settings = load_settings()
    values = {
        variable_name(name): str(getattr(getattr(settings, section), key))
        for name, (section, key, _) in known_settings().items()
    }
    return values | {name: value for name, value in os.environ.items() if name.startswith(PROPAGATED_VARIABLES)}


def task_spec_for(
    run: Run,  # parent run: a sweep, or a run of several processes
    token: str,  # name of the probe file in its folder
    resources: Mapping[str, float],  # resources of each task, see ray_resources
    timeout: float | None = None,  # seconds after which a run fails
    notebook: str = "",  # notebook of the job; by default the parent run's
) -> TaskSpec:  # without a point
    """Task spec that the tasks of a parent run share; raises SettingsError when runs.remote cannot be written."""
    remote_url, path = load_settings().runs.remote, Path(notebook or run.record.notebook)
    if remote_url:
        open_remote_store(remote_url)
    return TaskSpec(
        parent_folder=run.folder,
        token=token,
        working_directory=os.getcwd(),
        notebook=path,
        content=path.read_bytes(),
        environment=propagated_environment(),
        variables=thread_variables(resources["num_cpus"]),
        remote_url=remote_url,
        timeout=timeout,
    )


@contextlib.contextmanager
def shared_fs_probe(
    run: Run,  # parent run
) -> Iterator[str]:  # name of the file
    """Context manager that creates a uniquely named file in a run's folder; a node that finds it shares the folder."""
    token = run.folder / f".seen-{secrets.token_hex(8)}"
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


def run_task(
    spec: TaskSpec,
    execute: Callable[..., None] | None = None,  # function that executes the run; by default execute_point
) -> Iterator[TaskUpdate]:
    """Execute a task on this machine and yield its updates; closing the generator stops the run.

    The run executes in a thread, because Ray interrupts a cancelled task where it waits for the next update.
    """
    updates: queue.SimpleQueue[TaskUpdate] = queue.SimpleQueue()
    cancellation = CancellationToken()
    arguments = (spec, execute or execute_point, cancellation, updates.put)
    thread = threading.Thread(target=_run_in_thread, args=arguments, name="run")
    thread.start()
    latest = TaskUpdate()
    try:
        while not latest.ended:
            with contextlib.suppress(queue.Empty):  # an interruption is noticed between two short waits
                latest = updates.get(timeout=0.5)
                yield latest
    finally:
        cancellation.cancel("It was stopped from where it was started.")
        thread.join()


def _run_in_thread(
    spec: TaskSpec,
    execute: Callable[..., None],
    cancellation: CancellationToken,
    report: Callable[[TaskUpdate], None],
) -> None:
    """Execute a run and report its progress; the last update says that it has ended, whatever happens."""
    latest = TaskUpdate(owner=current_owner())

    def on_progress(run: Run, cell: CellProgress | None) -> None:
        nonlocal latest
        latest = replace(latest, run=run.id, cell=cell)
        report(latest)

    try:
        with _task_environment(spec) as (root, notebook):
            report(latest)
            execute(spec, root, notebook, on_progress=on_progress, cancellation=cancellation)
        report(TaskUpdate(latest.run, ended=True))
    except Exception as error:
        message = str(error) if isinstance(error, MlkitError) else f"{type(error).__name__}: {error}"
        report(TaskUpdate(latest.run, ended=True, error=message, retryable=is_retryable(error)))


@contextlib.contextmanager
def _task_environment(spec: TaskSpec) -> Iterator[tuple[Path, Path]]:  # root of the run store, notebook
    """Context manager for the folders and variables of a task; raises SettingsError when its run could not be uploaded.

    The folders of the machine that started the task are used where this node sees them, else a temporary folder with
    the notebook that was sent. A file of the same name with other content is not the job's notebook.
    """
    shared = (spec.parent_folder / spec.token).exists()
    if not shared:
        if not spec.remote_url:
            raise SettingsError(
                f"{socket.gethostname()} does not see the run store {spec.parent_folder.parent}, "
                "and runs.remote is not set. Put runs.root on a file system that all nodes share, "
                "or set runs.remote to a URL that they can reach."
            )
        open_remote_store(spec.remote_url)  # fails now rather than after hours
    with tempfile.TemporaryDirectory(prefix="mlkit-") as scratch:
        root = spec.parent_folder.parent if shared else Path(scratch, "runs")
        notebook = spec.notebook
        if not (notebook.is_file() and notebook.read_bytes() == spec.content):
            notebook = Path(scratch, notebook.name)
            notebook.write_bytes(spec.content)
        folder = spec.working_directory if Path(spec.working_directory).is_dir() else scratch
        with contextlib.chdir(folder), _replaced_environment(spec.environment | {"MLKIT_RUNS_ROOT": str(root)}):
            yield root, notebook


@contextlib.contextmanager
def _replaced_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Context manager that sets environment variables and removes the kit's others.

    Ray sets OMP_NUM_THREADS in its processes. Warm kernels are keyed by such variables, so it is removed as well; a
    run on a node then uses the same warm server as one that was started by `mlkit` there.
    """
    original = dict(os.environ)
    try:
        for name in [name for name in os.environ if name.startswith("MLKIT_") or name == "OMP_NUM_THREADS"]:
            del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(original)


def execute_point(
    spec: TaskSpec,
    root: Path,  # root of the run store
    notebook: Path,
    *,
    on_progress: ProgressCallback,
    cancellation: CancellationToken,
) -> None:
    """Execute a sweep point: resume its run where it can be reached, else create one; it is returned in any case."""
    runs: set[Path] = set()

    def note_run(run: Run, cell: CellProgress | None) -> None:
        runs.add(run.folder)
        on_progress(run, cell)

    try:
        if spec.run and (root / spec.run / RUN_FILE).exists():
            run = localize_run(Run(root / spec.run), spec.variables)
            resume_run(run, on_progress=note_run, timeout=spec.timeout, cancellation=cancellation, warm=True)
            return
        run_job(
            str(notebook),
            spec.parameters,
            store=RunStore(root),
            parents=[spec.parent_folder.name],
            variables=spec.variables,
            on_progress=note_run,
            timeout=spec.timeout,
            cancellation=cancellation,
            warm=True,
        )
    finally:
        for folder in runs:
            if notebook != spec.notebook:
                with Run(folder).edit() as record:
                    record.notebook = str(spec.notebook)
            return_run(Run(folder), spec)


def localize_run(
    run: Run,  # run to resume in this process
    variables: Mapping[str, str],  # environment variables of the kernel that allocate resources of this machine
) -> Run:  # the same run
    """Prepare a run for this machine: its resources, and a working folder that exists."""
    with run.edit() as record:
        record.environment_variables = {
            n: value for n, value in record.environment_variables.items() if not n.startswith("CUDA")
        }
        record.environment_variables |= variables
        if not Path(record.working_directory).is_dir():
            record.working_directory = os.getcwd()
    return run


def return_run(
    run: Run,  # ended
    spec: TaskSpec,
    name: str = "",  # name in the remote run store; by default its id
) -> None:
    """Restore the run's original working folder, and upload it unless it is in the run store; raises StorageError."""
    if not Path(spec.working_directory).is_dir():
        with run.edit() as record:
            record.working_directory = spec.working_directory
    if not run.folder.is_relative_to(spec.parent_folder.parent):
        upload_run(run, spec.remote_url, name)


# The backend of sweeps


@dataclass(eq=False)
class RayBackend(TrialBackend):
    """Executes the trials of a sweep as tasks on a Ray cluster.

    Ray's own retries are off: they would send the same message again, which does not name the run that was begun.
    Ctrl-C and SIGTERM cancel every task; running ones have a minute to close their runs, then they are killed. When
    the driver is killed, Ray ends its tasks.
    """

    remote_url: str = field(default_factory=lambda: load_settings().runs.remote, init=False)
    tasks: dict[Any, TrialState] = field(default_factory=dict, init=False)  # Ray's handle of the task -> trial

    def execute(
        self,
        trials: TrialQueue,
        max_parallel: int | None,  # runs in parallel; None: as many as the cluster has room for
    ) -> None:
        """Execute trials until the queue has no more."""
        self.ray = import_ray()
        self.tracker = TrialTracker(self.sweep, trials, self.retries, self.on_change, self._download)
        try:
            with shared_fs_probe(self.sweep) as token:
                submit = self._submitter(token, max_parallel)
                while True:
                    while len(self.tasks) < (max_parallel or trials.max_parallel) and (
                        state := self.tracker.next_trial()
                    ):
                        submit(state)
                    if not self.tasks:
                        return
                    self._poll()
        except BaseException:
            self._cancel()
            raise
        finally:
            close_abandoned(self.sweep)  # runs of nodes that died before they sent an update

    def _download(self, run_id: str) -> Run | None:
        """Run from the remote run store; None when it is not there, or there is none."""
        return download_run(run_id, self.tracker.store, self.remote_url) if self.remote_url else None

    def _submitter(self, token: str, max_parallel: int | None) -> Callable[[TrialState], None]:
        """Function that submits a trial to Ray."""
        resources = ray_resources(node_resources(), max_parallel)
        options = {"num_returns": "streaming", "max_retries": 0, "scheduling_strategy": "SPREAD", **resources}
        task = self.ray.remote(**options)(run_task)
        common = task_spec_for(self.sweep, token, resources, self.timeout, self.notebook)

        def submit(state: TrialState) -> None:
            run = state.run.id if state.run else ""
            self.tasks[task.remote(replace(common, parameters=state.parameters, run=run))] = state

        return submit

    def _poll(self) -> None:
        """Process the next update of a task, if there is one within half a second."""
        for task in self.ray.wait(list(self.tasks), num_returns=1, timeout=0.5)[0]:
            self._process(task, self.tasks[task])

    def _process(self, task: Any, state: TrialState) -> None:
        """Pass the next update of a task, or its end, to the state machine."""
        errors = self.ray.exceptions
        try:
            update = self.ray.get(next(task))
        except errors.TaskCancelledError:
            self._end(task, state)
        except errors.RayTaskError as error:  # outside the run: for example, mlkit is not installed on the node
            self._end(task, state, str(error).strip().splitlines()[-1])
        except (errors.RayError, StopIteration) as error:
            del self.tasks[task]
            self.tracker.lose(state, f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            self.tracker.update(state, update.run, update.cell)
            if update.ended:
                error = update.error or ("" if update.run else "It ended before its run began.")
                self._end(task, state, error, update.retryable)

    def _end(self, task: Any, state: TrialState, error: str = "", retryable: bool = False) -> None:
        del self.tasks[task]
        self.tracker.settle(state, error)
        self.tracker.release(state, retryable)

    def _cancel(self) -> None:
        """Cancel all tasks, wait until they have closed their runs, and kill what is left."""
        self.tracker.stop()
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for task in list(self.tasks):
            self.ray.cancel(task)
        while self.tasks and time.monotonic() < deadline:
            self._poll()
        for task in self.tasks:
            self.ray.cancel(task, force=True)
