"""One job in several processes that train one model together: started, supervised, restarted when one of them dies.

`mlkit run train --workers 2` executes the notebook of the job in two kernels. `TF_CONFIG` states the place of each in
the cluster (see `mlkit.jobs.cluster`), and the training inside divides the rows among them. The run of worker 0 is the
run: its metrics, checkpoints and notebook. The runs of the other workers are folders inside it, `workers/1`,
`workers/2` and so on, each with a record, a notebook and a kernel log of its own, so that no file has two writers.

With parameter servers, only the chief executes the notebook; workers and servers are TensorFlow's own processes without
one.

When a process dies, the training cannot continue, but its checkpoints remain: all workers are started again, up to
`retries` times, and resume from the last checkpoint. A notebook that raises an error is not executed again, because it
would raise the error again.
"""

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
from mlkit.config import cpu_count, load_settings
from mlkit.errors import InputError, JobInterruptedError, MlkitError, ParameterError, StorageError
from mlkit.jobs.cluster import Cluster, free_ports
from mlkit.jobs.executor import (
    CancellationToken,
    ProgressCallback,
    attach_run,
    check_kernel,
    execute_run,
    interrupt_on_sigterm,
    interrupted_error,
    job_failed_error,
    restart_run,
    stored_notebook,
)
from mlkit.jobs.notebook import find_job, read_notebook
from mlkit.jobs.parameters import ParameterSchema
from mlkit.jobs.points import has_ended
from mlkit.jobs.ray import (
    SHUTDOWN_TIMEOUT,
    TaskSpec,
    TaskUpdate,
    import_ray,
    localize_run,
    node_resources,
    return_run,
    run_task,
    shared_fs_probe,
    task_spec_for,
)
from mlkit.jobs.resources import ray_resources, thread_variables, visible_devices
from mlkit.jobs.sweep import connected_engine
from mlkit.runs.record import RUN_FILE, Failure, ProcessInfo, Record, current_owner, list_artifacts
from mlkit.runs.remote import download_run, upload_run
from mlkit.runs.run import Run
from mlkit.runs.store import RunStore

RETRIES = 2  # attempts after the first
GRACE_PERIOD = 6.0  # seconds in which workers end by themselves after another one has failed
NODE_LOST = "NodeLost"  # error in the record of a worker whose node has died
WORKER_FILES = (RUN_FILE, "notebook.ipynb", "notebook.html", "kernel.log")  # stored for each worker except worker 0


# The group and its runs


@dataclass(frozen=True)
class WorkerGroup:
    """Number of processes that train one model together."""

    workers: int
    servers: int = 0  # parameter servers; with them there is a chief beside the workers

    def __post_init__(self) -> None:
        if self.workers < 1 or self.servers < 0:
            raise ParameterError(
                "A worker group needs at least one worker and no negative number of servers. "
                f"Received: workers={self.workers}, servers={self.servers}."
            )

    def check_devices(self) -> None:
        """Check that this machine, if it has GPUs, has one for each worker; raises ParameterError."""
        devices = len(visible_devices())
        if 0 < devices < self.workers:
            raise ParameterError(
                f"{self.workers} workers need a GPU each, and there are {devices}. "
                f"Take {devices} workers, or none of the GPUs: CUDA_VISIBLE_DEVICES=-1."
            )

    def cluster(self) -> Cluster:
        """Cluster of free addresses on this machine, from the point of view of the first process."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(self.workers + self.servers + bool(self.servers))]
        if not self.servers:
            return Cluster({"worker": tuple(addresses)}, "worker", 0)
        workers, servers = addresses[1 : 1 + self.workers], addresses[1 + self.workers :]
        return Cluster({"chief": (addresses[0],), "worker": tuple(workers), "ps": tuple(servers)}, "chief", 0)

    def variables(
        self,
        number: int,  # worker, from 0
    ) -> dict[str, str]:
        """Environment variables that give a worker its part of this machine."""
        devices = visible_devices()[number :: self.workers]
        variables = thread_variables(cpu_count() // self.workers)
        return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})


def worker_group_of(
    run: Run,
) -> WorkerGroup | None:  # None for a run of one process
    """Worker group that a run was started with."""
    values = (run.record.model_extra or {}).get("worker_group")
    return WorkerGroup(**values) if values else None


def worker_run(
    run: Run,  # run of worker 0
    number: int,  # worker, from 1
) -> Run:
    """Create the run of a worker inside the run of worker 0."""
    folder, record = run.folder / "workers" / str(number), run.record
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    worker_record = Record(
        id=str(number),
        job=record.job,
        status="created",
        created=datetime.now(UTC),
        parameters=record.parameters,
        defaults=record.defaults,
        notebook=record.notebook,
        working_directory=record.working_directory,
        parents=[run.id],
        owner=current_owner(),
    )
    write_atomic(folder / RUN_FILE, worker_record.model_dump_json(indent=1))
    return Run(folder)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _remove_duplicates(run: Run) -> None:
    """Remove from the run of a worker what the run of worker 0 has as well: checkpoints, event files, the model."""
    for path in run.folder.iterdir():
        if path.name not in WORKER_FILES:
            _remove(path)
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)


# One attempt: all workers execute side by side


@dataclass(frozen=True)
class _GroupTask:
    """What all workers of a group have in common."""

    notebook: Path
    on_progress: ProgressCallback | None  # callback; receives the run of worker 0, then each of its cells
    timeout: float | None  # seconds after which an attempt fails


@dataclass
class Worker:
    """A worker whose kernel is on this machine."""

    number: int
    run: Run
    task: _GroupTask
    cancellation: CancellationToken = field(default_factory=CancellationToken)
    error: Exception | None = None
    ended: float = 0.0  # time on the monotonic clock; 0 while it executes
    dead_server: str = ""  # message about a parameter server that has died
    grace: ClassVar[float] = GRACE_PERIOD  # seconds in which it ends after its cancellation

    def execute(self) -> None:
        """Execute the notebook and store the exception that ends it."""
        try:
            self.work()
        except MlkitError as error:
            self.error = self.error or error
        finally:
            self.ended = time.monotonic()

    def work(self) -> None:
        """Execute the notebook; raises JobFailedError or JobInterruptedError."""
        schema = ParameterSchema.from_notebook(read_notebook(self.task.notebook))
        execute_run(
            self.run,
            self.task.notebook,
            secrets=schema.secrets(self.run.record.parameters),
            on_progress=None if self.number else self.task.on_progress,
            timeout=self.task.timeout,
            cancellation=self.cancellation,
            warm=True,
        )

    def kill(self) -> None:
        """End a worker that did not react to its cancellation; a local kernel has been killed already."""

    @property
    def died(self) -> bool:
        """Whether its process or node, or one of its servers, has died; such an attempt is repeated."""
        failure = self.run.record.failure if self.error else None
        return bool(self.dead_server) or (failure is not None and failure.error in ("DeadKernelError", NODE_LOST))

    @property
    def failure_rank(self) -> tuple[bool, bool, float]:
        """Sort key: the smallest failed first, all others failed because of it."""
        consequence = "The other workers cannot continue without it." in str(self.error)
        return consequence or isinstance(self.error, JobInterruptedError), not self.died, self.ended


def _run_attempt(workers: Sequence[Worker], dead_server: Callable[[], str]) -> None:
    """Execute all workers until they have ended; raises KeyboardInterrupt when the attempt is interrupted.

    When one fails, the others notice it by themselves and record so; those that have not ended after the grace period
    are cancelled. When worker 0 completes, the others have only to close their runs.
    """
    threads = [threading.Thread(target=worker.execute, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        while not (workers[0].ended or any(worker.error for worker in workers)):
            _wait_briefly(threads)
            if message := dead_server():
                workers[0].dead_server = message
                workers[0].cancellation.cancel(message, True)
        failed = any(worker.error for worker in workers)
        deadline = time.monotonic() + (GRACE_PERIOD if failed else SHUTDOWN_TIMEOUT)
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            _wait_briefly(threads)
        _cancel(workers, threads, "Another worker has ended.")
    except BaseException as error:
        _cancel(workers, threads, str(error) or "Ctrl-C")
        raise


def _wait_briefly(threads: Sequence[threading.Thread]) -> None:
    next((thread for thread in threads if thread.is_alive()), threads[0]).join(0.25)


def _cancel(workers: Sequence[Worker], threads: Sequence[threading.Thread], reason: str) -> None:
    """Cancel the remaining workers; a run whose kernel's end Jupyter does not notice is closed here."""
    for worker in workers:
        worker.cancellation.cancel(reason)
    deadline = time.monotonic() + workers[0].grace
    for worker, thread in zip(workers, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            worker.error = worker.error or attach_run(JobInterruptedError(reason), worker.run)
            worker.kill()
            worker.run.interrupt(Failure(error="Interrupted", message=reason))


# On this machine


SERVER_CODE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from mlkit.jobs.cluster import read_cluster
from mlkit.training.distribution import run_tensorflow_server
run_tensorflow_server(read_cluster())
"""  # standard input is a pipe from the process that started the server: it closes when that process ends


@contextlib.contextmanager
def parameter_servers(
    cluster: Cluster,  # from the chief's point of view
    folder: Path,  # folder of the log files
    variables: Callable[[int], dict[str, str]],  # environment variables of a worker
) -> Iterator[Callable[[], str]]:  # message about a process that has died; "" when all are alive
    """Context manager that runs the workers and parameter servers of a cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(job, n) for job in ("worker", "ps") for n in range(len(cluster.addresses.get(job, ())))]
    processes: dict[str, subprocess.Popen] = {}
    try:
        for job, number in tasks:
            environment = os.environ | (variables(number) if job == "worker" else {"CUDA_VISIBLE_DEVICES": "-1"})
            environment |= {"TF_CONFIG": cluster.task(job, number).config(), "TF_CPP_MIN_LOG_LEVEL": "2"}
            with (folder / f"{job}-{number}.log").open("wb") as log:
                processes[f"{job} {number}"] = subprocess.Popen(
                    [sys.executable, "-c", SERVER_CODE],
                    start_new_session=True,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
        yield lambda: next(
            (f"{name} has ended." for name, process in processes.items() if process.poll() is not None), ""
        )
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.wait()
            process.stdin.close()


@contextlib.contextmanager
def _local_workers(
    run: Run, group: WorkerGroup, task: _GroupTask, workers: list[Worker]
) -> Iterator[Callable[[], str]]:  # message about a server that has died
    """Context manager that creates the workers of an attempt on this machine, and their servers."""
    cluster = group.cluster()
    for number in range(1 if group.servers else group.workers):
        workers.append(Worker(number, worker_run(run, number) if number else run, task))
        view = cluster if cluster.job == "chief" else cluster.task("worker", number)
        with workers[-1].run.edit() as record:
            record.environment_variables |= group.variables(number) | {"TF_CONFIG": view.config()}
    servers = parameter_servers(cluster, run.folder / "workers", group.variables) if group.servers else None
    with servers or contextlib.nullcontext(lambda: "") as dead_server:
        yield dead_server


# On a Ray cluster


def check_room(
    group: WorkerGroup,
    nodes: Sequence[Mapping[str, float]],  # resources of each node: CPU, GPU
) -> None:
    """Check that a cluster is large enough for a group and can start it; raises ParameterError."""
    if group.servers:
        raise ParameterError(
            "Parameter servers are started on one machine only, not over a Ray cluster. Leave out --servers: workers "
            "without servers keep the variables themselves."
        )
    for name, noun in (("GPU", "GPU"), ("CPU", "processor")):
        count = sum(int(node.get(name, 0)) for node in nodes)
        if count < group.workers and (count or name == "CPU"):
            raise ParameterError(
                f"{group.workers} workers need a {noun} each, and the Ray cluster has {count}. Take fewer workers."
            )


@contextlib.contextmanager
def _reserved(workers: int) -> Iterator[tuple[Any, dict[str, float]]]:  # placement group, resources of each
    """Context manager that reserves resources for all workers at once, spread over the nodes; raises MlkitError.

    The cluster may be full now, or a node has just died and its replacement is about to join. The reservation is
    therefore tried, with the resources of the present nodes, until the rendezvous timeout.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    seconds = load_settings().distributed.rendezvous_timeout
    deadline, reserved = time.monotonic() + seconds, False
    while not reserved:
        if time.monotonic() > deadline:
            raise MlkitError(
                f"After {seconds:g} seconds the Ray cluster has no room for {workers} workers at once. "
                "Wait until other work there has ended, or take fewer workers."
            )
        resources = ray_resources(node_resources(), workers)
        resources |= {"num_gpus": 1} if "num_gpus" in resources else {}
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        bundle = {names[name]: value for name, value in resources.items()}
        group = placement_group([bundle] * workers, strategy="SPREAD")
        try:
            if reserved := group.wait(5):
                yield group, resources
        finally:
            remove_placement_group(group)


@dataclass(frozen=True)
class Placement:
    """Reserved place of a worker on a node."""

    options: Mapping[str, Any]  # options of the Ray task that executes there
    address: str  # host:port at which the worker will listen
    shared: bool  # whether the node sees the run store


def describe_node(
    folder: Path,  # folder of the run, on the machine where it was started
    token: str,  # name of the probe file in it
) -> tuple[str, bool]:  # host:port of a free port, and whether the node sees the run store
    """Address of this node for a worker, and whether it shares the run's folder."""
    return f"{import_ray().util.get_node_ip_address()}:{free_ports(1)[0]}", (folder / token).exists()


def _find_placements(ray: Any, group: Any, resources: Mapping[str, float], folder: Path, token: str) -> list[Placement]:
    """Placements of a placement group; raises MlkitError when a node does not respond.

    Nodes that see the run store come first, so that the checkpoints of worker 0 outlive its node.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategies = [PlacementGroupSchedulingStrategy(group, n) for n in range(group.bundle_count)]
    options = [{"scheduling_strategy": strategy, "max_retries": 0, **resources} for strategy in strategies]
    addresses: list[str] = []
    while len(set(addresses)) < len(options):  # two workers on one node may be given the same port
        tasks = [ray.remote(**task_options)(describe_node).remote(folder, token) for task_options in options]
        try:
            nodes = ray.get(tasks, timeout=load_settings().distributed.rendezvous_timeout)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise MlkitError(f"A node of the Ray cluster cannot take part: {reason}") from error
        addresses = [address for address, _ in nodes]
    placements = [Placement(task_options, *node) for task_options, node in zip(options, nodes, strict=True)]
    return sorted(placements, key=lambda placement: not placement.shared)


def _remote_name(
    run: str,  # path in the run store
) -> str:  # name in the remote run store
    return run.replace("/", "-")


def execute_worker(
    spec: TaskSpec,
    root: Path,  # root of the run store on this node
    notebook: Path,
    *,
    on_progress: ProgressCallback,
    cancellation: CancellationToken,
) -> None:
    """Execute the notebook into a worker's run on its node; the run is returned in any case."""
    name, remote = spec.run, root != spec.parent_folder.parent
    if remote:
        root.mkdir(parents=True, exist_ok=True)
    run = download_run(_remote_name(name), RunStore(root), spec.remote_url) if remote else Run(root / name)
    if run is None:
        raise StorageError(f"{_remote_name(name)} is not at {spec.remote_url}.")
    secrets = ParameterSchema.from_notebook(read_notebook(notebook)).secrets(run.record.parameters)
    try:
        execute_run(
            localize_run(run, spec.variables),
            notebook,
            secrets=secrets,
            on_progress=on_progress,
            timeout=spec.timeout,
            cancellation=cancellation,
            warm=True,
        )
    finally:
        return_run(run, spec, _remote_name(name))


def upload_worker_run(
    run: Run,  # run of a worker that is about to begin
    name: str,  # name in the remote run store
    remote_url: str,  # URL of the remote run store
) -> None:
    """Upload the run of a worker, with the checkpoints from which it resumes; raises StorageError."""
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)
    upload_run(run, remote_url, name)


def download_worker_run(
    run: Run,  # in the state in which it was uploaded
    name: str,  # name in the remote run store
    remote_url: str,  # URL of the remote run store
) -> None:
    """Replace the content of a run's folder by the downloaded run, its record last; raises StorageError."""
    with tempfile.TemporaryDirectory(dir=run.folder.parent, prefix=".new-") as folder:
        downloaded = download_run(name, RunStore(Path(folder)), remote_url)
        if downloaded is None:
            raise StorageError(f"{name} is not at {remote_url}.")
        for path in run.folder.iterdir():
            if path.name not in ("workers", RUN_FILE) and not path.name.startswith("."):
                _remove(path)
        for path in downloaded.folder.iterdir():
            if path.name != RUN_FILE:
                path.rename(run.folder / path.name)
        (downloaded.folder / RUN_FILE).replace(run.folder / RUN_FILE)


@dataclass(kw_only=True)
class RayWorker(Worker):
    """A worker on a node of a Ray cluster; a thread here follows its updates."""

    submit: Callable[[], Any]  # starts the task and returns Ray's handle
    remote_url: str  # URL through which its run is transferred; "" where the node sees the run store
    name: str  # name of its run in the remote run store
    handle: Any = None
    process: ProcessInfo | None = None  # process of its kernel
    grace: ClassVar[float] = SHUTDOWN_TIMEOUT

    def work(self) -> None:
        ray = import_ray()
        self.handle = self.submit()
        self.cancellation.on_cancel(lambda: ray.cancel(self.handle))
        problem, lost = self._follow(ray)
        if lost:
            has_ended(self.process)
        elif self.remote_url and not self.error:
            download_worker_run(self.run, self.name, self.remote_url)
        if not self.error:
            self._close(problem, NODE_LOST if lost else "JobFailedError")

    def _follow(self, ray: Any) -> tuple[str, bool]:  # reason for the end, and whether the node has died
        """Process updates until the task has ended."""
        try:
            while True:
                if not ray.wait([self.handle], timeout=0.5)[0]:
                    continue
                update: TaskUpdate = ray.get(next(self.handle))
                self.process = update.owner or self.process
                if update.ended:
                    return update.error, False
                if update.run and self.task.on_progress and not self.number:
                    self.task.on_progress(self.run, update.cell)
        except ray.exceptions.TaskCancelledError:
            return self.cancellation.reason, False
        except ray.exceptions.RayTaskError as error:  # outside the run
            return str(error).strip().splitlines()[-1], False
        except (ray.exceptions.RayError, StopIteration) as error:
            reason = str(error).partition("\n")[0]
            return f"Its node, or its process there, has died ({type(error).__name__}: {reason})", True

    def _close(self, problem: str, error: str) -> None:
        """Close a run that its node has not closed; raises an exception unless it completed."""
        interrupted = self.cancellation.reason and not self.cancellation.failed
        if self.run.record.status == "running":
            close = self.run.interrupt if interrupted else self.run.fail
            close(Failure(error="Interrupted" if interrupted else error, message=problem or "It ended unfinished."))
        record = self.run.record
        if record.status == "interrupted":
            reason = self.cancellation.reason or record.failure.message
            raise interrupted_error(self.run, reason)
        if record.status != "completed":
            raise job_failed_error(record.failure, self.run)

    def kill(self) -> None:
        import_ray().cancel(self.handle, force=True)


@contextlib.contextmanager
def _ray_workers(
    run: Run, group: WorkerGroup, task: _GroupTask, workers: list[Worker]
) -> Iterator[Callable[[], str]]:  # as on this machine; there are no servers
    """Context manager that creates the workers of an attempt on the nodes of the connected Ray cluster."""
    ray = import_ray()
    shutil.rmtree(run.folder / "workers", ignore_errors=True)
    if run.record.status == "created":
        run.start()
    with shared_fs_probe(run) as token, _reserved(group.workers) as (placement_group, resources):
        common = task_spec_for(run, token, resources, task.timeout, str(task.notebook))
        placements = _find_placements(ray, placement_group, resources, run.folder, token)
        cluster = Cluster({"worker": tuple(placement.address for placement in placements)}, "worker", 0)
        for number, placement in enumerate(placements):
            own_run = worker_run(run, number).start() if number else run
            path = own_run.folder.relative_to(run.folder.parent).as_posix()
            variables = common.variables | {"TF_CONFIG": cluster.task("worker", number).config()}
            spec = replace(common, run=path, variables=variables)
            workers.append(_ray_worker(own_run, number, task, placement, spec))
        yield lambda: ""


def _ray_worker(run: Run, number: int, task: _GroupTask, placement: Placement, spec: TaskSpec) -> RayWorker:
    """Worker on a node, with its run where the node will find it."""
    name, remote_url = _remote_name(spec.run), "" if placement.shared else spec.remote_url
    if remote_url:
        upload_worker_run(run, name, remote_url)
    remote = import_ray().remote(num_returns="streaming", **placement.options)(run_task)
    return RayWorker(
        number, run, task, submit=partial(remote.remote, spec, execute_worker), remote_url=remote_url, name=name
    )


# Attempts until the run completes


_WORKER_CONTEXTS = {"local": _local_workers, "ray": _ray_workers}


def _execute_group(run: Run, group: WorkerGroup, task: _GroupTask, engine: str, retries: int) -> Run:
    """Execute a run with a worker group, again when a process dies; raises JobFailedError or JobInterruptedError."""
    for remaining in reversed(range(retries + 1)):
        workers: list[Worker] = []
        try:
            with interrupt_on_sigterm(), _WORKER_CONTEXTS[engine](run, group, task, workers) as dead_server:
                _run_attempt(workers, dead_server)
        except KeyboardInterrupt as error:
            raise _interrupt(run, str(error) or "Ctrl-C") from None
        except MlkitError as error:  # before the attempt began
            run.fail(Failure(error=type(error).__name__, message=str(error)))
            raise attach_run(error, run) from None
        finally:
            _clean_up(run, workers)
        if workers[0].error is None:
            return run
        if not remaining or not any(worker.died for worker in workers):
            raise _first_failure(run, workers)
        _warn_of_lost_checkpoints(run, workers[0])
        restart_run(run)
    return run


def _interrupt(run: Run, reason: str) -> Exception:
    """Close a run whose workers had not begun, and return the exception to raise."""
    if run.record.status in ("created", "running"):
        run.interrupt(Failure(error="Interrupted", message=reason))
    return interrupted_error(run, reason)


def _warn_of_lost_checkpoints(run: Run, first: Worker) -> None:
    """Warn when the checkpoints of worker 0 were lost with its node."""
    failure = first.run.record.failure
    if getattr(first, "remote_url", "") and failure and failure.error == NODE_LOST:
        warnings.warn(
            f"{run.id} starts from the beginning: its checkpoints were lost with a node that does not see the run "
            "store. Put runs.root on a file system that all nodes share to keep them.",
            stacklevel=2,
        )


def _clean_up(run: Run, workers: Sequence[Worker]) -> None:
    """Leave the run like any other: without TF_CONFIG, or it would wait for its peers when it is executed again."""
    for worker in workers:
        with worker.run.edit() as record:
            record.environment_variables = {
                name: value for name, value in record.environment_variables.items() if name != "TF_CONFIG"
            }
        if worker.number:
            _remove_duplicates(worker.run)
    with run.edit() as record:
        record.artifacts = list_artifacts(run.folder)


def _first_failure(run: Run, workers: Sequence[Worker]) -> Exception:
    """Exception of the worker that failed first; the run records its failure too."""
    first = min((worker for worker in workers if worker.error), key=lambda worker: worker.failure_rank)
    failure = first.run.record.failure
    if first.number == 0 or failure is None:
        return workers[0].error
    message = f"Worker {first.number}: {failure.message} See {first.run.folder}."
    run.fail(failure.model_copy(update={"message": message}))
    return job_failed_error(run.record.failure, run)


@contextlib.contextmanager
def _checked_engine(engine: str, group: WorkerGroup) -> Iterator[None]:
    """Context manager that connects an engine with room for a group; raises ParameterError, or MlkitError."""
    with connected_engine(engine):
        if engine == "local":
            group.check_devices()
        else:
            check_room(group, node_resources())
        yield


def run_distributed(
    job: str,  # name, or path of a notebook
    parameters: Mapping[str, Any] | None = None,  # name -> value; text is converted to the declared types
    *,
    workers: int = 2,  # processes that compute
    servers: int = 0,  # parameter servers
    engine: str = "local",  # "local", or "ray" for the nodes of the running Ray cluster
    retries: int = RETRIES,  # further attempts after a process has died
    store: RunStore | None = None,  # run store; by default the one in settings
    on_progress: ProgressCallback | None = None,  # callback; receives the run, then each cell of worker 0 as it begins
    timeout: float | None = None,  # seconds after which an attempt fails
) -> Run:  # the completed run
    """Execute a job in several processes into one run; raises JobFailedError or JobInterruptedError with the run.

    Raises NotFoundError, ParameterError, or MlkitError when there is no cluster, before a run is created.
    """
    settings, group = load_settings(), WorkerGroup(workers, servers)
    path = find_job(job, settings)
    schema = ParameterSchema.from_notebook(read_notebook(path))
    values = schema.validate(parameters or {})
    schema.secrets(values)  # an unreadable secret is rejected before the run is created
    check_kernel(settings.jobs.kernel)
    with _checked_engine(engine, group):
        run = (store or RunStore(settings.runs.root)).create(
            path.stem, parameters=values, defaults=schema.defaults, notebook=str(path.absolute())
        )
        with run.edit() as record:
            record.worker_group = vars(group)
        return _execute_group(run, group, _GroupTask(path.absolute(), on_progress, timeout), engine, retries)


def resume_distributed(
    run: Run,  # interrupted or failed run of several processes
    *,
    engine: str = "local",  # "local" or "ray"; it may differ from the first attempt's
    retries: int = RETRIES,  # further attempts after a process has died
    on_progress: ProgressCallback | None = None,  # callback; receives the run, then each cell of worker 0 as it begins
    timeout: float | None = None,  # seconds after which an attempt fails
) -> Run:  # the completed run
    """Resume a run with the same worker group; raises InputError when it is completed or had one process."""
    group, path = worker_group_of(run), stored_notebook(run)
    if group is None:
        raise InputError(f"{run.id} was a run of one process.")
    check_kernel(load_settings().jobs.kernel)
    with _checked_engine(engine, group):
        restart_run(run)
        return _execute_group(run, group, _GroupTask(path.absolute(), on_progress, timeout), engine, retries)
