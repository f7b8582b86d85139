"""Sweeps on a Ray cluster: points are tasks, their runs are downloaded as they finish."""

import contextlib
import logging
import os
import queue
import secrets
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlkit.config import known_settings, load_settings, variable_name
from mlkit.errors import MissingDependencyError, MlkitError, SettingsError
from mlkit.jobs.executor import CellProgress, CancellationToken, resume_run, run_job
from mlkit.jobs.points import TrialQueue, TrialState, _may_help_again, close_abandoned, has_ended
from mlkit.jobs.resources import THREADS, ray_resources
from mlkit.runs.record import RUN_FILE, Failure, ProcessInfo, current_owner
from mlkit.runs.remote import RAY_EXTRA, open_remote_store, download_run, upload_run
from mlkit.runs.run import Run, RunStore


def import_ray() -> Any:  # the module
    """Ray; raises MissingDependencyError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(f"Work over a cluster needs Ray ({error}). It comes with: {RAY_EXTRA}") from error
    return ray


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:  # the module ray, connected
    """The running cluster, left at the end if it was joined here; raises MlkitError when there is none."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=_cluster_address(), log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(str(error).partition("\n")[0]) from error
    try:
        with quiet_ray(ray):
            yield ray
    finally:
        ray.shutdown()


def _no_cluster(reason: str) -> MlkitError:
    advice = (
        "Start one with `ray start --head`, and join it on other machines with `ray start --address=HOST:6379`; "
        "RAY_ADDRESS=HOST:6379 says which, where there are several."
    )
    return MlkitError(f"There is no Ray cluster to run on: {reason.rstrip('.')}. {advice}")


def _cluster_address() -> str:  # "auto" where Ray has to look for one
    """Address of the cluster that RAY_ADDRESS names, or was started last; raises MlkitError when it does not answer."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    last = Path(folder, "ray", "ray_current_cluster")  # where `ray start` leaves it
    address = os.environ.get("RAY_ADDRESS") or (last.read_text().strip() if last.is_file() else "auto")
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise _no_cluster(f"nobody answers at {address} ({error.strerror or error})") from error
    return address


@contextlib.contextmanager
def quiet_ray(
    ray: Any,  # the module
) -> Iterator[None]:
    """Send what Ray would print about its nodes to the log; Ray has no option for it."""
    worker = getattr(ray._private, "worker", None)
    print_it = getattr(worker, "print_to_stdstream", None)
    if print_it is None:
        yield
        return
    worker.print_to_stdstream = lambda data, **_: logging.getLogger("mlkit").info("Ray: %s", data.get("lines"))
    try:
        yield
    finally:
        worker.print_to_stdstream = print_it


TRAVELLING = ("TF_", "KERAS_", "XLA_", "OMP_NUM_THREADS")  # and every setting


@dataclass(frozen=True)
class TaskSpec:
    """All a process on another machine has to know to execute a point, or what it is given else."""

    home: Path  # folder of the sweep, or of the run of several processes, on the machine where it was started
    token: str  # name of a file in it; who finds that sees the same archive
    folder: str  # the working folder there
    notebook: Path  # of the job, there
    content: bytes  # of that notebook
    environment: dict[str, str]  # variables to have
    share: dict[str, str]  # variables of the kernel that divide the machine
    mirror: str  # URL at which finished runs are left by who does not see the archive
    timeout: float | None = None  # seconds
    parameters: Mapping[str, Any] | None = None
    run: str = ""  # to go on with, if it is within reach; its path in the archive


def travelling_environment() -> dict[str, str]:  # name -> value
    """The settings in effect as environment variables, and the variables that change what is computed."""
    settings = load_settings()
    values = {
        variable_name(name): str(getattr(getattr(settings, section), key))
        for name, (section, key, _) in known_settings().items()
    }
    return values | {name: value for name, value in os.environ.items() if name.startswith(TRAVELLING)}


@dataclass(frozen=True)
class TaskUpdate:
    """What a task tells of its point."""

    run: str = ""  # "" before there is one
    cell: CellProgress | None = None  # at work
    ended: bool = False
    error: str = ""  # why it ended, if that was not in peace
    again: bool = False  # whether another attempt could help
    owner: ProcessInfo | None = None  # the process that does it


def run_task(
    assignment: TaskSpec,
    execute: Callable[..., None] | None = None,  # what is done in the workplace; by default a point is executed
) -> Iterator[TaskUpdate]:
    """Do on this machine what was assigned; it is stopped when the caller stops listening."""
    news: queue.SimpleQueue[TaskUpdate] = queue.SimpleQueue()
    stop = CancellationToken()
    order = (assignment, execute or execute_point, stop, news.put)
    thread = threading.Thread(target=_run_task, args=order, name="point")
    thread.start()
    latest = TaskUpdate()
    try:
        while not latest.ended:
            with contextlib.suppress(queue.Empty):  # a short wait, because only between two waits can it be interrupted
                latest = news.get(timeout=0.5)
                yield latest
    finally:
        stop("It was stopped from where it was started.")
        thread.join()


def _run_task(
    assignment: TaskSpec, execute: Callable[..., None], stop: CancellationToken, tell: Callable[[TaskUpdate], None]
) -> None:
    """Do what was assigned and tell how it went, whatever happens."""
    latest = TaskUpdate(owner=current_owner())

    def watch(run: Run, cell: CellProgress | None) -> None:
        nonlocal latest
        latest = replace(latest, run=run.id, cell=cell)
        tell(latest)

    try:
        with _workplace(assignment) as (root, notebook):
            tell(latest)
            how = {"stop": stop, "timeout": assignment.timeout, "warm": True}
            execute(assignment, root, notebook, watch=watch, **how)
        tell(TaskUpdate(latest.run, ended=True))
    except Exception as error:
        again = _may_help_again(error)
        message = str(error) if isinstance(error, MlkitError) else f"{type(error).__name__}: {error}"
        tell(TaskUpdate(latest.run, ended=True, error=message, again=again))


@contextlib.contextmanager
def _workplace(assignment: TaskSpec) -> Iterator[tuple[Path, Path]]:  # archive's folder, notebook
    """Environment and folders as where the sweep was started; raises SettingsError when no run could come home."""
    if not (shared := (assignment.home / assignment.token).exists()):
        if not assignment.mirror:
            raise SettingsError(
                f"{socket.gethostname()} does not see the archive {assignment.home.parent}, and no mirror is set. Put "
                "runs.root on a file system that all nodes share, or set runs.mirror to a URL that they can reach."
            )
        open_remote_store(assignment.mirror)  # refused now rather than after hours
    with tempfile.TemporaryDirectory(prefix="mlkit-") as scratch:
        root = assignment.home.parent if shared else Path(scratch, "runs")
        notebook = assignment.notebook
        if not (notebook.is_file() and notebook.read_bytes() == assignment.content):
            notebook = Path(scratch, notebook.name)
            notebook.write_bytes(assignment.content)
        folder = assignment.folder if Path(assignment.folder).is_dir() else scratch
        with contextlib.chdir(folder), _environment(assignment.environment | {"MLKIT_RUNS_ROOT": str(root)}):
            yield root, notebook


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables, and of the kit's own no others."""
    before = dict(os.environ)
    try:
        for name in [name for name in os.environ if name.startswith("MLKIT_") or name == "OMP_NUM_THREADS"]:
            del os.environ[name]
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute_point(
    assignment: TaskSpec,
    root: Path,  # of the archive to work in
    notebook: Path,  # of the job
    *,
    watch: Callable[[Run, CellProgress | None], None],
    **how: Any,  # stop, timeout, warm: see execute_run
) -> None:
    """Go on with the run where its folder can be reached, else make a new one; it goes home whatever comes of it."""
    begun: set[Path] = set()

    def note(run: Run, cell: CellProgress | None) -> None:
        begun.add(run.folder)
        watch(run, cell)

    try:
        if assignment.run and (root / assignment.run / RUN_FILE).exists():
            resume_run(localize_run(Run(root / assignment.run), assignment.share), watch=note, **how)
            return
        told = {"parents": [assignment.home.name], "variables": assignment.share}
        run_job(str(notebook), assignment.parameters, archive=RunStore(root), watch=note, **told, **how)
    finally:
        for folder in begun:
            if notebook != assignment.notebook:
                with Run(folder).edit() as record:
                    record.notebook = str(assignment.notebook)
            fetch_run(Run(folder), assignment)


def localize_run(
    run: Run,  # to go on with in this process
    share: Mapping[str, str],  # variables of the kernel that divide this machine
) -> Run:  # the same
    """A run made ready to go on here."""
    with run.edit() as record:
        record.variables = {n: value for n, value in record.variables.items() if not n.startswith("CUDA")} | dict(share)
        if not Path(record.working_folder).is_dir():
            record.working_folder = os.getcwd()
    return run


def fetch_run(
    run: Run,  # ended
    assignment: TaskSpec,
    name: str = "",  # at the mirror; by default its id
) -> None:
    """Write its folder as it is at home, and send the run there unless that is where it lies; raises StorageError."""
    if not Path(assignment.folder).is_dir():
        with run.edit() as record:
            record.working_folder = assignment.folder
    if not run.folder.is_relative_to(assignment.home.parent):
        upload_run(run, assignment.mirror, name)


MAX_NODE_FAILURES = 3  # how often a point may lose its node; a fourth time, the point itself is the likely cause


class _RayTrials:
    """What becomes of the points of a sweep that are executed elsewhere."""

    def __init__(
        self, sweep: Run, timeout: float | None, retries: int, changed: Callable[[], None], notebook: str = ""
    ):
        self.sweep, self.timeout, self.retries, self.changed = sweep, timeout, retries, changed
        self.notebook = notebook or sweep.record.notebook
        self.archive = RunStore(sweep.folder.parent)
        self.mirror = load_settings().runs.mirror
        self.waiting: deque[TrialState] = deque()
        self.failures: Counter[int] = Counter()  # by number of the point
        self.losses: Counter[int] = Counter()
        self.ending = False  # whether no more points are taken

    def hear(self, state: TrialState, news: TaskUpdate) -> None:
        """Note what a task tells."""
        if news.run and news.run != self.sweep.record.points[state.number - 1].run:
            with self.sweep.edit() as record:
                record.points[state.number - 1].run = news.run
        state.status, state.cell, state.error = "running", news.cell, news.error
        if news.run and not news.ended:
            folder = self.archive.root / news.run
            state.run = Run(folder) if folder.is_dir() else None  # None: it is still elsewhere
        if news.ended:
            self.settle(state, news.error or ("" if news.run else "It ended before its run began."))
            self.failures[state.number] += 1
            if news.again and not self.ending and self.failures[state.number] <= self.retries:
                self.waiting.append(state)

    def settle(self, state: TrialState, error: str = "") -> None:
        """Note how a point has ended; a run that is not here yet is fetched from the mirror."""
        name, state.cell, state.error = self.sweep.record.points[state.number - 1].run, None, error
        try:
            state.run = self._reach(name) if name else None
        except MlkitError as failure:
            state.run, state.error = None, error or str(failure)
        state.status = state.run.status if state.run else "failed" if state.error else "waiting"

    def _reach(self, name: str) -> Run | None:
        """A run in the archive, or brought there now; None when it is out of reach."""
        if (self.archive.root / name).is_dir():
            return Run(self.archive.root / name)
        return download_run(name, self.archive, self.mirror) if self.mirror else None

    def lose(self, state: TrialState, reason: str) -> None:
        """Close the run of a node that has died, and put the point back, unless it keeps happening."""
        self.losses[state.number] += 1
        if state.run is not None:
            self._close_lost(state, reason)
        self.settle(state, reason)
        if state.status != "completed" and not self.ending and self.losses[state.number] <= MAX_NODE_FAILURES:
            state.status, state.error = "waiting", ""
            self.waiting.append(state)

    def _close_lost(self, state: TrialState, reason: str) -> None:
        """Interrupt a run whose process has ended; one whose process goes on in spite of all is left to it."""
        if not has_ended(state.run.record.owner):
            state.run = None
        elif state.run.record.status in ("created", "running"):
            state.run.interrupt(Failure(error="NodeLost", message=reason))


@contextlib.contextmanager
def shared_fs_probe(
    run: Run,  # a sweep, or a run of several processes
) -> Iterator[str]:  # name of the file
    """For a while, have a file in a run's folder that no other folder has."""
    token = run.folder / f".seen-{secrets.token_hex(8)}"
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)


SHUTDOWN_TIMEOUT = 60  # seconds that cancelled tasks have to stop their kernels and close their records


class _RayBackend(_RayTrials):
    """The points of a sweep being executed over a Ray cluster."""

    tasks: dict[Any, TrialState]  # Ray's handle -> the point

    def execute(self, points: TrialQueue, jobs: int | None) -> None:
        """Execute points: so many at a time, as far as the cluster has room."""
        self.tasks, self.ray, self.points = {}, import_ray(), points
        try:
            with shared_fs_probe(self.sweep) as token:
                self._execute(self._submitter(token, jobs), jobs or points.most)
        except BaseException:
            self._cancel()
            raise
        finally:
            close_abandoned(self.sweep)  # by a node that died before it could tell

    def _execute(self, submit: Callable[[TrialState], None], most: int) -> None:
        """Hand out points until there are no more, and hear of each until it has ended."""
        while True:
            while len(self.tasks) < most and (state := self._next()):
                submit(state)
            if not self.tasks:
                return
            self._listen()

    def _next(self) -> TrialState | None:
        """A point to hand out: one to be tried again, or a new one."""
        while not self.waiting and (state := self.points.take()):
            if not self._has_come_home(state):
                return state
            self.points.give_back(state)
        return self.waiting.popleft() if self.waiting else None

    def _has_come_home(self, state: TrialState) -> bool:
        """Whether the point's run is complete at the mirror: the sweep was killed before it could fetch it."""
        if state.run is None:
            self.settle(state)
        return state.status == "completed"

    def _submitter(self, token: str, jobs: int | None) -> Callable[[TrialState], None]:
        """What hands a point to Ray."""
        demand = ray_resources([node["Resources"] for node in self.ray.nodes() if node["Alive"]], jobs)
        options = {"num_returns": "streaming", "max_retries": 0, "scheduling_strategy": "SPREAD", **demand}
        task, common = (
            self.ray.remote(**options)(run_task),
            task_spec_for(self.sweep, token, demand, self.timeout, self.notebook),
        )

        def submit(state: TrialState) -> None:
            run = state.run.id if state.run else ""
            self.tasks[task.remote(replace(common, parameters=state.parameters, run=run))] = state

        return submit

    def _listen(self) -> None:
        """Wait a moment for news, and take them."""
        for task in self.ray.wait(list(self.tasks), num_returns=1, timeout=0.5)[0]:
            state = self.tasks[task]
            self._take(task, state)
            if task not in self.tasks and state not in self.waiting and not self.ending:
                self.points.give_back(state)
            self.changed()

    def _take(self, task: Any, state: TrialState) -> None:
        """Take the next news of a task, or what Ray says of its end."""
        errors = self.ray.exceptions
        try:
            news = self.ray.get(next(task))
            if news.ended:
                del self.tasks[task]
            self.hear(state, news)
            return
        except errors.TaskCancelledError:
            ended, reason = self.settle, ""
        except errors.RayTaskError as error:  # before or after the job: mlkit is missing there, for example
            ended, reason = self.settle, str(error).strip().splitlines()[-1]
        except (errors.RayError, StopIteration) as error:
            ended, reason = self.lose, f"{type(error).__name__}: {error}".partition("\n")[0]
        del self.tasks[task]
        ended(state, reason)

    def _cancel(self) -> None:
        """End all tasks, and wait until they have."""
        self.ending, deadline = True, time.monotonic() + SHUTDOWN_TIMEOUT
        self.waiting.clear()
        for task in list(self.tasks):
            self.ray.cancel(task)
        while self.tasks and time.monotonic() < deadline:
            self._listen()
        for task in self.tasks:
            self.ray.cancel(task, force=True)


def task_spec_for(
    run: Run,  # a sweep, or a run of several processes
    token: str,  # name of a file in its folder
    demand: Mapping[str, float],  # see ray_resources
    timeout: float | None = None,  # seconds for each run
    notebook: str = "",  # of the job; by default the sweep's
) -> TaskSpec:  # without a point
    """What every task has to know; raises SettingsError when runs.mirror cannot be written."""
    mirror, path = load_settings().runs.mirror, Path(notebook or run.record.notebook)
    if mirror:
        open_remote_store(mirror)
    return TaskSpec(
        home=run.folder,
        token=token,
        folder=os.getcwd(),
        notebook=path,
        content=path.read_bytes(),
        environment=travelling_environment(),
        share={name: str(demand["num_cpus"]) for name in THREADS if name not in os.environ},
        mirror=mirror,
        timeout=timeout,
    )
