"""One job in several processes that train one model together: started, watched, started again when one of them dies."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mlkit._files import write_atomic
from mlkit.config import load_settings, cpu_count
from mlkit.errors import StorageError, InputError, JobInterruptedError, MlkitError, ParameterError
from mlkit.jobs.cluster import Cluster, free_ports
from mlkit.jobs.executor import (
    CancellationToken,
    Watcher,
    archived_notebook,
    check_kernel,
    execute_run,
    interrupt_on_sigterm,
    job_failed,
    restart_run,
    attach_run,
)
from mlkit.jobs.notebook import find_job, read_notebook
from mlkit.jobs.parameters import ParameterSchema
from mlkit.jobs.points import has_ended
from mlkit.jobs.ray import (
    SHUTDOWN_TIMEOUT,
    TaskSpec,
    TaskUpdate,
    localize_run,
    task_spec_for,
    fetch_run,
    run_task,
    import_ray,
    shared_fs_probe,
)
from mlkit.jobs.resources import THREADS, ray_resources, visible_devices
from mlkit.jobs.sweep import ready_engine
from mlkit.runs.record import RUN_FILE, Failure, ProcessInfo, Record, current_owner, list_artifacts
from mlkit.runs.remote import download_run, upload_run
from mlkit.runs.run import Run, RunStore


@dataclass(frozen=True)
class WorkerGroup:
    """How many processes work on one run."""

    workers: int
    servers: int = 0  # parameter servers; with them there is a chief beside the workers

    def __post_init__(self) -> None:
        if self.workers < 1 or self.servers < 0:
            raise ParameterError(f"A crew needs at least one worker and no negative number of servers, not {self}.")

    def check_devices(self) -> None:
        """Refuse more workers than this machine has GPUs, where it has any; raises ParameterError."""
        devices = len(visible_devices())
        if 0 < devices < self.workers:
            raise ParameterError(
                f"{self.workers} workers need a GPU each, and there are {devices}. "
                f"Take {devices} workers, or none of the GPUs: CUDA_VISIBLE_DEVICES=-1."
            )

    def cluster(self) -> Cluster:
        """Addresses on this machine, as the first process sees them."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.workers + self.servers + bool(self.servers))]
        if not self.servers:
            return Cluster({"worker": tuple(addresses)}, "worker", 0)
        workers, servers = addresses[1 : 1 + self.workers], addresses[1 + self.workers :]
        return Cluster({"chief": (addresses[0],), "worker": tuple(workers), "ps": tuple(servers)}, "chief", 0)

    def share(self, number: int) -> dict[str, str]:
        """Variables that give one of the workers its part of the machine."""
        threads = str(max(1, cpu_count() // self.workers))
        devices = visible_devices()[number :: self.workers]
        variables = {name: threads for name in THREADS if name not in os.environ}
        return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})


KEPT = (RUN_FILE, "notebook.ipynb", "notebook.html", "kernel.log")  # of a worker: all else it has made is the run's too


def worker_run(
    run: Run,  # that the worker works on
    number: int,  # from 1; the run itself is that of worker 0
) -> Run:
    """A new run for a worker, inside of the run it works on."""
    folder, record = run.folder / "workers" / str(number), run.record
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    told = {"parameters": record.parameters, "defaults": record.defaults, "notebook": record.notebook}
    told |= {"working_folder": record.working_folder, "parents": [run.id], "owner": current_owner()}
    own = Record(id=str(number), job=record.job, status="created", created=datetime.now(UTC), **told)
    write_atomic(folder / RUN_FILE, own.model_dump_json(indent=1))
    return Run(folder)


def _tidy(run: Run) -> None:
    """Keep what is worth keeping of a worker."""
    for path in run.folder.iterdir():
        if path.name not in KEPT and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in KEPT:
            path.unlink(missing_ok=True)
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)


GRACE_PERIOD = 6.0  # seconds in which the others end by themselves
NODE_LOST = "NodeLost"  # the failure of who has gone with its node


@dataclass(frozen=True)
class _Order:
    """What all members of a crew are told."""

    path: Path  # of the notebook
    watch: Watcher  # told of the first one's run, then of each of its cells
    timeout: float | None  # seconds for each attempt


@dataclass
class _Worker:
    """One of the kernels of a crew."""

    number: int
    run: Run
    order: _Order
    stop: CancellationToken = field(default_factory=CancellationToken)
    error: Exception | None = None
    ended: float = 0.0  # on the monotonic clock
    lost: str = ""  # which of its servers has died
    grace: ClassVar[float] = GRACE_PERIOD

    def execute(self) -> None:
        """Execute the notebook; what goes wrong is kept."""
        try:
            self.work()
        except MlkitError as error:
            self.error = self.error or error
        finally:
            self.ended = time.monotonic()

    def work(self) -> None:
        """Execute the notebook; raises JobFailedError, JobInterruptedError."""
        order = self.order
        secrets = ParameterSchema.of(read_notebook(order.path)).secrets(self.run.record.parameters)
        how = {"secrets": secrets, "timeout": order.timeout, "stop": self.stop, "warm": True}
        execute_run(self.run, order.path, watch=_nobody if self.number else order.watch, **how)

    def give_up(self) -> None:
        """Wait no longer: it does not heed that it was stopped."""

    @property
    def died(self) -> bool:
        """Whether its process was ended from outside, or fell, or one of its servers has."""
        failure = self.run.record.failure if self.error else None
        return bool(self.lost) or (failure is not None and failure.error in ("DeadKernelError", NODE_LOST))

    @property
    def suspicion(self) -> tuple[bool, bool, float]:
        """How likely it is that it was the first to fail; the smallest is the likeliest."""
        follows = "The others cannot go on without it." in str(self.error)
        return follows or isinstance(self.error, JobInterruptedError), not self.died, self.ended


def _nobody(run: Run, cell: Any) -> None:
    """Nobody watches."""


def _attempt(members: Sequence[_Worker], alive: Callable[[], str]) -> None:
    """Execute all members to their ends; raises KeyboardInterrupt when that is what ends them."""
    threads = [threading.Thread(target=member.execute, daemon=True) for member in members]
    for thread in threads:
        thread.start()
    try:
        while not _settled(members):
            _pause(threads)
            if lost := alive():
                members[0].lost = lost
                members[0].stop(lost, True)
        failed = any(member.error for member in members)
        deadline = time.monotonic() + (
            GRACE_PERIOD if failed else SHUTDOWN_TIMEOUT
        )  # whoever is through has only to close its run
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            _pause(threads)
        _stop(members, threads, "Another worker has ended.")
    except BaseException as error:
        _stop(members, threads, str(error) or "Ctrl-C")
        raise


def _settled(members: Sequence[_Worker]) -> bool:
    """Whether there is nothing to wait for: the first member is through, or somebody has failed."""
    return bool(members[0].ended) or any(member.error for member in members)


def _pause(threads: Sequence[threading.Thread]) -> None:
    next((thread for thread in threads if thread.is_alive()), threads[0]).join(0.25)


def _stop(members: Sequence[_Worker], threads: Sequence[threading.Thread], reason: str) -> None:
    """End the kernels that are left; the run of one whose end Jupyter does not notice is closed here."""
    for member in members:
        member.stop(reason)
    deadline = time.monotonic() + members[0].grace
    for member, thread in zip(members, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            member.error = member.error or attach_run(JobInterruptedError(reason), member.run)
            member.give_up()
            member.run.interrupt(Failure(error="Interrupted", message=reason))


SERVE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from mlkit.jobs.cluster import read_cluster
from mlkit.training.distribution import serve
serve(read_cluster())
"""


@contextlib.contextmanager
def serving(
    cluster: Cluster,  # as its chief sees it
    folder: Path,  # where what they say is kept
    share: Callable[[int], dict[str, str]],  # variables of each worker
) -> Iterator[Callable[[], str]]:  # says which of them has died; "" when none has
    """For a while, have the workers and parameter servers of a cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(job, n) for job in ("worker", "ps") for n in range(len(cluster.addresses.get(job, ())))]
    processes: dict[str, subprocess.Popen] = {}
    try:
        for job, number in tasks:
            variables = os.environ | (share(number) if job == "worker" else {"CUDA_VISIBLE_DEVICES": "-1"})
            variables |= {"TF_CONFIG": cluster.task(job, number).config(), "TF_CPP_MIN_LOG_LEVEL": "2"}
            with (folder / f"{job}-{number}.log").open("wb") as log:
                how = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "env": variables}
                command = [sys.executable, "-c", SERVE]
                processes[f"{job} {number}"] = subprocess.Popen(command, start_new_session=True, **how)
        yield lambda: next((f"{name} has ended." for name, one in processes.items() if one.poll() is not None), "")
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.wait()
            process.stdin.close()


@contextlib.contextmanager
def _here(
    run: Run, crew: WorkerGroup, order: _Order, members: list[_Worker]
) -> Iterator[Callable[[], str]]:  # says which of the servers has died
    """Have the members of a crew on this machine."""
    cluster = crew.cluster()
    for number in range(1 if crew.servers else crew.workers):
        members.append(_Worker(number, worker_run(run, number) if number else run, order))
        place = cluster if cluster.job == "chief" else cluster.task("worker", number)
        with members[-1].run.edit() as record:
            record.variables |= crew.share(number) | {"TF_CONFIG": place.config()}
    if not crew.servers:
        yield lambda: ""
        return
    with serving(cluster, run.folder / "workers", crew.share) as alive:
        yield alive


def check_room(
    crew: WorkerGroup,
    nodes: Sequence[Mapping[str, float]],  # resources of each: CPU, GPU
) -> None:
    """Refuse a crew for which a cluster is too small, or that it cannot start; raises ParameterError."""
    if crew.servers:
        raise ParameterError(
            "Parameter servers are started on one machine only, not over a Ray cluster. Leave out --servers: workers "
            "without servers keep the variables themselves."
        )
    for name, thing in (("GPU", "GPU"), ("CPU", "processor")):
        count = sum(int(node.get(name, 0)) for node in nodes)
        if count < crew.workers and (count or name == "CPU"):
            raise ParameterError(
                f"{crew.workers} workers need a {thing} each, and the Ray cluster has {count}. Take fewer workers."
            )


def _alive(ray: Any) -> list[dict[str, float]]:
    """Resources of the nodes that live."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _reserved(ray: Any, workers: int) -> Iterator[tuple[Any, dict[str, float]]]:  # placement group, demand of each
    """For a while, have room for all at once, on as many nodes as possible; raises MlkitError when there is none."""
    from ray.util.placement_group import placement_group, remove_placement_group

    seconds = load_settings().workers.meeting_timeout
    deadline, found = time.monotonic() + seconds, False
    while not found:
        if time.monotonic() > deadline:
            raise MlkitError(
                f"After {seconds:g} seconds the Ray cluster has no room for {workers} workers at once. "
                "Wait until other work there has ended, or take fewer workers."
            )
        demand = ray_resources(_alive(ray), workers)
        demand |= {"num_gpus": 1} if "num_gpus" in demand else {}
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        group = placement_group([{names[name]: value for name, value in demand.items()}] * workers, strategy="SPREAD")
        try:
            if found := group.wait(5):
                yield group, demand
        finally:
            remove_placement_group(group)


@dataclass(frozen=True)
class _Placement:
    """A place on a node that is reserved for a worker."""

    options: Mapping[str, Any]  # of a Ray task that is to run there
    address: str  # host:port
    sees: bool  # whether it sees the archive


def look_around(
    home: Path,  # folder of the run, on the machine where it was started
    token: str,  # name of a file in it
) -> tuple[str, bool]:  # host:port of this node, and whether it sees the archive
    """What a node tells of itself."""
    return f"{import_ray().util.get_node_ip_address()}:{free_ports(1)[0]}", (home / token).exists()


def _find_seats(ray: Any, group: Any, demand: Mapping[str, float], home: Path, token: str) -> list[_Placement]:
    """What is where has been reserved; raises MlkitError when a node does not answer."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    where = [PlacementGroupSchedulingStrategy(group, n) for n in range(group.bundle_count)]
    options = [{"scheduling_strategy": each, "max_retries": 0, **demand} for each in where]
    addresses: list[str] = []
    while len(set(addresses)) < len(options):  # two workers on one node may be told the same port
        asked = [ray.remote(**each)(look_around).remote(home, token) for each in options]
        try:
            told = ray.get(asked, timeout=load_settings().workers.meeting_timeout)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise MlkitError(f"A node of the Ray cluster cannot take part: {reason}") from error
        addresses = [address for address, _ in told]
    seats = [_Placement(each, *answer) for each, answer in zip(options, told, strict=True)]
    return sorted(seats, key=lambda seat: not seat.sees)


def _label(
    run: str,  # its path in the archive
) -> str:  # its name at the mirror
    return run.replace("/", "-")


def execute_member(
    assignment: TaskSpec,
    root: Path,  # of the archive to work in
    notebook: Path,  # of the job
    **how: Any,  # watch, stop, timeout, warm: see execute_run
) -> None:
    """Execute the notebook into a member's run, on its node; the run goes home whatever comes of it."""
    name, away = assignment.run, root != assignment.home.parent
    if away:
        root.mkdir(parents=True, exist_ok=True)
    run = download_run(_label(name), RunStore(root), assignment.mirror) if away else Run(root / name)
    if run is None:
        raise StorageError(f"{_label(name)} is not at {assignment.mirror}.")
    secrets = ParameterSchema.of(read_notebook(notebook)).secrets(run.record.parameters)
    try:
        execute_run(localize_run(run, assignment.share), notebook, secrets=secrets, **how)
    finally:
        fetch_run(run, assignment, _label(name))


def send_away(
    run: Run,  # of a member that is about to begin
    name: str,  # at the mirror
    mirror: str,  # URL
) -> None:
    """Leave a run at the mirror as it is now; raises StorageError."""
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)
    upload_run(run, mirror, name)


def take_home(
    run: Run,  # as it was when it was sent
    name: str,  # at the mirror
    mirror: str,  # URL
) -> None:
    """Replace what is in a run's folder by what has come back, its record last; raises StorageError."""
    with tempfile.TemporaryDirectory(dir=run.folder.parent, prefix=".new-") as folder:
        arrived = download_run(name, RunStore(Path(folder)), mirror)
        if arrived is None:
            raise StorageError(f"{name} is not at {mirror}.")
        for path in run.folder.iterdir():
            if path.is_dir() and path.name != "workers":
                shutil.rmtree(path)
            elif path.is_file() and path.name != RUN_FILE and not path.name.startswith("."):
                path.unlink()
        for path in arrived.folder.iterdir():
            if path.name != RUN_FILE:
                path.rename(run.folder / path.name)
        (arrived.folder / RUN_FILE).replace(run.folder / RUN_FILE)


@dataclass(kw_only=True)
class _RayWorker(_Worker):
    """A member of a crew on a node of a Ray cluster."""

    begin: Callable[[], Any]  # has the node begin; Ray's handle of what it tells
    mirror: str  # through which its run travels; "" where the node sees the archive
    name: str  # of its run, at the mirror
    task: Any = None
    process: ProcessInfo | None = None  # that has its kernel
    grace: ClassVar[float] = SHUTDOWN_TIMEOUT

    def work(self) -> None:
        ray = import_ray()
        self.task = self.begin()
        self.stop.on_stop(lambda: ray.cancel(self.task))
        problem, lost = self._follow(ray)
        if lost:
            has_ended(self.process)
        elif self.mirror and not self.error:
            take_home(self.run, self.name, self.mirror)
        if not self.error:
            self._judge(problem, NODE_LOST if lost else "JobFailedError")

    def _follow(self, ray: Any) -> tuple[str, bool]:  # what has gone wrong; whether its node has gone
        """Hear what the node tells until it has ended."""
        try:
            while True:
                if not ray.wait([self.task], timeout=0.5)[0]:
                    continue
                news: TaskUpdate = ray.get(next(self.task))
                self.process = news.owner or self.process
                if news.ended:
                    return news.error, False
                if news.run and not self.number:
                    self.order.watch(self.run, news.cell)
        except ray.exceptions.TaskCancelledError:
            return self.stop.reason, False
        except ray.exceptions.RayTaskError as error:  # before or after the job
            return str(error).strip().splitlines()[-1], False
        except (ray.exceptions.RayError, StopIteration) as error:
            told = str(error).partition("\n")[0]
            return f"Its node, or its process there, has gone ({type(error).__name__}: {told})", True

    def _judge(self, problem: str, kind: str) -> None:
        """Close a run that its node has not closed; raises JobFailedError or JobInterruptedError unless it is completed."""
        stopped = self.stop.reason and not self.stop.failed
        if self.run.record.status == "running":
            close = self.run.interrupt if stopped else self.run.fail
            close(Failure(error="Interrupted" if stopped else kind, message=problem or "It ended unfinished."))
        record = self.run.record
        if record.status == "interrupted":
            told = self.stop.reason or record.failure.message
            raise attach_run(JobInterruptedError(f"{self.run.id} was interrupted ({told})."), self.run)
        if record.status != "completed":
            raise attach_run(job_failed(record.failure, self.run), self.run)

    def give_up(self) -> None:
        import_ray().cancel(self.task, force=True)


@contextlib.contextmanager
def _over_ray(
    run: Run, crew: WorkerGroup, order: _Order, members: list[_Worker]
) -> Iterator[Callable[[], str]]:  # as on this machine; there are no servers
    """Have the members of a crew on the nodes of the Ray cluster that we have joined."""
    ray = import_ray()
    shutil.rmtree(run.folder / "workers", ignore_errors=True)
    if run.record.status == "created":
        run.start()
    with shared_fs_probe(run) as token, _reserved(ray, crew.workers) as (group, demand):
        common = task_spec_for(run, token, demand, order.timeout, str(order.path))
        seats = _find_seats(ray, group, demand, run.folder, token)
        cluster = Cluster({"worker": tuple(seat.address for seat in seats)}, "worker", 0)
        for number, seat in enumerate(seats):
            own = worker_run(run, number).start() if number else run
            name = own.folder.relative_to(run.folder.parent).as_posix()
            share = common.share | {"TF_CONFIG": cluster.task("worker", number).config()}
            members.append(_far_member(own, number, order, seat, replace(common, run=name, share=share)))
        yield lambda: ""


def _far_member(run: Run, number: int, order: _Order, seat: _Placement, assignment: TaskSpec) -> _RayWorker:
    """A member that is about to begin; its run is where its node will find it."""
    name, mirror = _label(assignment.run), "" if seat.sees else assignment.mirror
    if mirror:
        send_away(run, name, mirror)
    task = import_ray().remote(num_returns="streaming", **seat.options)(run_task)
    return _RayWorker(
        number, run, order, begin=partial(task.remote, assignment, execute_member), mirror=mirror, name=name
    )


RETRIES = 2  # attempts after the first
_PLACES = {"local": _here, "ray": _over_ray}


def _execute_crew(run: Run, crew: WorkerGroup, order: _Order, engine: str, retries: int) -> Run:
    """Execute a run with a crew, again when a process dies; raises JobFailedError or JobInterruptedError."""
    for left in reversed(range(retries + 1)):
        members: list[_Worker] = []
        try:
            with interrupt_on_sigterm(), _PLACES[engine](run, crew, order, members) as alive:
                _attempt(members, alive)
        except KeyboardInterrupt as error:
            raise _stopped(run, str(error) or "Ctrl-C") from None
        except MlkitError as error:  # before it began
            run.fail(Failure(error=type(error).__name__, message=str(error)))
            raise attach_run(error, run) from None
        finally:
            _conclude(run, members)
        if members[0].error is None:
            return run
        if not left or not any(member.died for member in members):
            raise _blame(run, members)
        _warn_of_loss(run, members[0])
        restart_run(run)
    return run


def _stopped(run: Run, reason: str) -> Exception:
    """The error that tells so; a run whose members had not begun is closed here."""
    if run.record.status in ("created", "running"):
        run.interrupt(Failure(error="Interrupted", message=reason))
    return attach_run(JobInterruptedError(f"{run.id} was interrupted ({reason})."), run)


def _warn_of_loss(run: Run, first: _Worker) -> None:
    """Say when checkpoints have gone with a node."""
    failure = first.run.record.failure
    if getattr(first, "mirror", "") and failure and failure.error == NODE_LOST:
        warnings.warn(
            f"{run.id} begins anew: its checkpoints have gone with a node that does not see the archive. On a file "
            "system that all nodes share they would be left.",
            stacklevel=2,
        )


def _conclude(run: Run, members: Sequence[_Worker]) -> None:
    """Leave the run as any other: it must not try to meet anybody when it is executed again."""
    for member in members:
        with member.run.edit() as record:
            record.variables = {name: value for name, value in record.variables.items() if name != "TF_CONFIG"}
        if member.number:
            _tidy(member.run)
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)


def _blame(run: Run, members: Sequence[_Worker]) -> Exception:
    """The error of the member that failed first; the run tells of it too."""
    culprit = min((member for member in members if member.error), key=lambda member: member.suspicion)
    failure = culprit.run.record.failure
    if culprit.number == 0 or failure is None:
        return members[0].error
    told = f"Worker {culprit.number}: {failure.message} See {culprit.run.folder}."
    run.fail(failure.model_copy(update={"message": told}))
    return attach_run(job_failed(run.record.failure, run), run)


@contextlib.contextmanager
def _ready(engine: str, crew: WorkerGroup) -> Iterator[None]:
    """A place that can take a crew; raises ParameterError, or MlkitError when there is no cluster."""
    with ready_engine(engine):
        if engine == "local":
            crew.check_devices()
        else:
            check_room(crew, _alive(import_ray()))
        yield


def run_distributed(
    job: str,  # a name, or the path of a notebook
    parameters: Mapping[str, Any] | None = None,  # name -> value; texts are converted to the declared types
    *,
    workers: int = 2,  # processes that compute
    servers: int = 0,  # parameter servers
    engine: str = "local",  # or "ray": on the nodes of the running Ray cluster
    retries: int = RETRIES,  # attempts after the first, when a process has died
    archive: RunStore | None = None,  # by default the one in settings
    watch: Watcher = _nobody,  # told of the run, then of each cell of the first process
    timeout: float | None = None,  # seconds for each attempt
) -> Run:
    """Execute a job in several processes, into one run; raises JobFailedError or JobInterruptedError, whose `run` tells more."""
    settings, crew = load_settings(), WorkerGroup(workers, servers)
    path = find_job(job, settings)
    contract = ParameterSchema.of(read_notebook(path))
    given = contract.check(parameters or {})
    contract.secrets(given)
    check_kernel(settings.jobs.kernel)
    told = {"parameters": given, "defaults": contract.defaults, "notebook": str(path.absolute())}
    with _ready(engine, crew):
        run = (archive or RunStore(settings.runs.root)).create(path.stem, **told)
        with run.edit() as record:
            record.crew = vars(crew)
        return _execute_crew(run, crew, _Order(path.absolute(), watch, timeout), engine, retries)


def worker_group_of(
    run: Run,
) -> WorkerGroup | None:  # None for a run of one process
    """Who has worked on a run."""
    told = (run.record.model_extra or {}).get("crew")
    return WorkerGroup(**told) if told else None


def resume_distributed(
    run: Run,  # interrupted or failed, of several processes
    *,
    engine: str = "local",  # or "ray"; it need not be the one it was started on
    retries: int = RETRIES,  # attempts after the first, when a process has died
    watch: Watcher = _nobody,
    timeout: float | None = None,  # seconds for each attempt
) -> Run:
    """Go on with a run that did not complete, with as many processes; raises InputError when nothing is left to do."""
    crew, path = worker_group_of(run), archived_notebook(run)
    if crew is None:
        raise InputError(f"{run.id} was a run of one process.")
    check_kernel(load_settings().jobs.kernel)
    with _ready(engine, crew):
        restart_run(run)
        return _execute_crew(run, crew, _Order(path.absolute(), watch, timeout), engine, retries)
