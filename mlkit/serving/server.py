"""The model server: equal processes that serve on one port, and a supervisor that replaces those that die.

Python runs one thread at a time, and a model with one thread is faster on one request than with two. So a server for
two processors runs two processes, each with all models and the whole path from the socket to the response. On Linux
each process has a socket of its own on the common port, because most connections of a shared socket would reach the
same process. When a process dies, the others go on, and connections that arrive meanwhile are not refused.
"""

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlkit._files import write_atomic
from mlkit.errors import InputError, MlkitError, ServingError
from mlkit.export.signatures import PREDICT
from mlkit.serving.http import make_web_server
from mlkit.serving.model_manager import LoadedVersion, ModelManager, load_and_warm_up
from mlkit.serving.options import ServedPath, ServerOptions
from mlkit.serving.protocol import VersionStatus
from mlkit.serving.request_log import RequestLog
from mlkit.serving.rest import RestApplication
from mlkit.serving.runtimes import prepare_runtime
from mlkit.serving.telemetry import JsonLines, Telemetry

_log = logging.getLogger("mlkit.server")


class ProcessStatusBoard:
    """Status shared by the processes of a server: one small file per process, in a folder of the server.

    Files are written atomically. The supervisor removes the file of a process that died, and the folder at the end;
    where the supervisor was killed, the last process removes it.
    """

    def __init__(
        self,
        folder: Path | str,
        processes: int,
        index: int | None = None,  # number of this process; None for a reader
    ):
        self.folder, self.processes, self.index = Path(folder), processes, index
        self._published: dict[str, Any] | None = None

    def _file(self, index: int) -> Path:
        return self.folder / f"process-{index}.json"

    def publish(self, status: dict[str, Any]) -> None:
        """Write the status of this process, if it has changed."""
        if status != self._published:
            write_atomic(self._file(self.index), json.dumps(status), durable=False)
            self._published = status

    def remove(self, index: int) -> None:
        """Remove the status of a process that ended."""
        self._file(index).unlink(missing_ok=True)

    def read(self) -> list[dict[str, Any]]:  # by process; {} where nothing is known
        """Status of all processes."""
        return [self.read_process(index) for index in range(self.processes)]

    def read_process(self, index: int) -> dict[str, Any]:
        """Status of one process; {} where nothing is known."""
        try:
            return json.loads(self._file(index).read_text())
        except (OSError, ValueError):
            return {}

    def common_versions(self, model: str) -> set[int]:
        """Versions of a model that all processes have loaded: only these get traffic."""
        return set.intersection(*(set(status.get("loaded", {}).get(model, ())) for status in self.read()))

    def leave(self) -> None:
        """Remove this process, and the folder with the last one: for processes without a supervisor."""
        self.remove(self.index)
        if not any(psutil.pid_exists(status["pid"]) for status in self.read() if status):
            shutil.rmtree(self.folder, ignore_errors=True)

    def request_reload(self) -> None:
        """Have all processes poll their sources now."""
        write_atomic(self.folder / "reload", str(time.time_ns()), durable=False)

    def reload_token(self) -> str:
        """Token that changes with `request_reload`."""
        with contextlib.suppress(OSError):
            return (self.folder / "reload").read_text()
        return ""


class RequestObserver:
    """Connects the models of one process to its metrics, audit log and request log."""

    def __init__(
        self,
        options: ServerOptions,
        index: int,  # number of the process
        manager: ModelManager,
        folder: Path,  # shared by all processes
    ):
        self._manager, logs = manager, options.logs
        self.telemetry = Telemetry(
            folder,
            index,
            models=manager.names(),
            runtime={"tensorflow": "TF1", "eager": "TF2"}.get(options.runtime, "LiteRT"),
            requests=logs.access_log,
            sensitive=logs.masked_features,
        )
        self.audit = logs.audit()
        self.request_log: RequestLog | None = None
        if logs.folder and logs.request_sampling_rate:
            self.request_log = RequestLog(
                logs.folder,
                index,
                sampling_rate=logs.request_sampling_rate,
                log_format=logs.request_log_format,
                sensitive=logs.masked_features,
                on_sampled=self.telemetry.count_logged,
            )
            self.telemetry.export_dropped("requests", self.request_log.writer)
        manager.on_batch, manager.on_shadow = self._count_batch, self.telemetry.count_shadow
        manager.state_listeners += [self.telemetry.set_version_state, self._on_state]
        self.telemetry.samplers.append(self._sample_queues)

    def _count_batch(self, model: str, version: int, signature: str, *timing: Any) -> None:
        loaded = self._manager.model(model).loaded.get(version)
        method = loaded.signatures[signature].method if loaded else PREDICT
        self.telemetry.count_batch(model, version, method.rpartition("/")[2].title(), *timing)

    def _sample_queues(self) -> None:
        for name in self._manager.names():
            for number, version in self._manager.model(name).loaded.items():
                self.telemetry.set_queued(name, number, version.queued)

    def _observe_requests(self, version: LoadedVersion) -> None:
        """Log the requests of a version, and count its examples."""
        takes_examples = {name for name, signature in version.signatures.items() if signature.method != PREDICT}

        def observe(signature: str, inputs: Mapping[str, Any], rows: int | None, outputs: Mapping[str, Any]) -> None:
            if signature in takes_examples:
                self.telemetry.count_examples(version.model, rows or 0)
            if self.request_log is not None:
                self.request_log.add(version, signature or "serving_default", inputs, rows, outputs)

        if takes_examples or self.request_log is not None:
            version.on_request = observe

    def _on_state(self, state: str, model: str, status: VersionStatus) -> None:
        if state == "AVAILABLE":
            self._observe_requests(self._manager.model(model).loaded[status.version])
        if status.code != "OK":
            _log.warning("%s/%s is rejected: %s", model, status.version, status.message)
        elif state in ("AVAILABLE", "END"):
            _log.info("%s/%s is %s", model, status.version, "loaded" if state == "AVAILABLE" else "unloaded")

    def close(self) -> None:
        """Write all queued log entries."""
        if self.request_log is not None:
            self.request_log.close()
        self.telemetry.close()


_COLLECT_DELAY = 10.0  # seconds from the end of a version to garbage collection
_SWITCH_INTERVAL = 0.0005  # seconds that a thread may keep the interpreter when others wait
CANNOT_SERVE = 3  # exit code of a process that has a model without any loadable version


class RequestServer:
    """Models, REST application, authentication and telemetry of one process, without sockets and signals.

    A server process puts it behind sockets of its own, a Ray Serve replica behind Ray's.
    """

    def __init__(
        self,
        options: ServerOptions,
        index: int,  # number of the process
        folder: Path,  # shared by all processes
        *,
        readiness: Callable[[], dict[str, Any]],  # more fields for /readyz
        reload: Callable[[str], Awaitable[None]],  # polls the sources; takes the principal's name
        common_versions: Callable[[str], set[int]] | None = None,  # versions of a model that all processes have
    ):
        self.options = options
        sources = {model.name: model.source(options) for model in options.models}
        self.manager = ModelManager(sources, self._load, options.batching, options.shadow)
        self.manager.common_versions = common_versions
        self.manager.state_listeners.append(self._collect_garbage_after)
        self.auth = options.auth.open()
        self.observer = RequestObserver(options, index, self.manager, folder)
        self.telemetry, self.audit = self.observer.telemetry, self.observer.audit
        self.on_denied = self.audit.record_denial if self.audit else None
        self.application = RestApplication(
            self.manager,
            body_bytes=options.body_bytes,
            cache_bytes=options.cache_bytes,
            readiness=readiness,
            reload=reload,
            telemetry=self.telemetry,
            auth=self.auth,
            client_certificates=bool(options.tls.client_ca),
            on_denied=self.on_denied,
        )
        self._loop, self._has_garbage = asyncio.get_running_loop(), False

    def _load(self, folder: Path) -> Any:
        return load_and_warm_up(folder, self.options.runtime, self.options.precision, self._on_warm_up)

    def _on_warm_up(self, *result: Any) -> None:  # on the loading thread
        self._loop.call_soon_threadsafe(self.telemetry.count_warm_up, *result)

    def _collect_garbage_after(self, state: str, model: str, status: VersionStatus) -> None:
        """Collect what an unloaded version left behind: some seconds later, or before the next version is loaded.

        It takes some milliseconds, which should not be the first ones of a new version.
        """
        if state == "LOADING":
            self._collect_garbage()
        if state == "END":
            self._has_garbage = True
            self._loop.call_later(_COLLECT_DELAY, self._collect_garbage)

    def _collect_garbage(self) -> None:
        if self._has_garbage:
            self._has_garbage = False
            gc.collect()

    async def load(self) -> None:
        """Load the first versions, and tune the interpreter for serving.

        TensorFlow has a million objects. Frozen, the garbage collector skips them; otherwise one request in a hundred
        would wait for it. The event loop shares the interpreter with the threads that run and load models: with a
        shorter switch interval than Python's 5 ms, batches of 32 rows are a third faster, and loading delays nobody.
        """
        await self.manager.update()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # requests leave no reference cycles, so collections can be rare

    def problems(self) -> dict[str, list[str]]:  # by model
        """Reasons why models cannot predict."""
        return {
            name: [
                f"{name}/{status.version}: {status.message}"
                for status in self.manager.statuses(name)
                if status.code != "OK"
            ]
            or [self.manager.model(name).source_error or f"{name} has no version"]
            for name in self.manager.names()
            if self.manager.model(name).default is None
        }

    async def watch(
        self,
        poll: Callable[[], Awaitable[None]] | None = None,  # called each time; default: poll the sources
    ) -> None:
        """Sample metrics and poll the sources, until cancelled."""
        while True:
            await asyncio.sleep(self.options.poll_interval)
            self.telemetry.sample()
            try:
                await (poll or self.manager.update)()
            except Exception:  # loaded versions go on serving
                _log.exception("The sources of models could not be polled")

    async def close(self) -> None:
        """Unload all versions after their last requests, and write all queued log entries."""
        await self.manager.close()
        self.observer.close()


class ServerProcess:
    """One of a server's equal processes: a `RequestServer` behind a REST and a gRPC port."""

    def __init__(
        self,
        options: ServerOptions,
        index: int,  # number of the process, from 0
        listening: socket.socket,
        board: ProcessStatusBoard,
    ):
        self.options, self.index, self.listening, self.board = options, index, listening, board
        self.tls = options.tls.open()
        self.server = RequestServer(
            options,
            index,
            board.folder,
            readiness=self._readiness,
            reload=self._reload_all,
            common_versions=board.common_versions if options.processes > 1 else None,
        )
        self.manager = self.server.manager
        self._stop, self._reload_token, self._orphaned = asyncio.Event(), board.reload_token(), False

    def _readiness(self) -> dict[str, Any]:
        ready = self.manager.ready and not self.server.application.draining  # whatever the board says
        others = [status for index, status in enumerate(self.board.read()) if index != self.index]
        return {
            "processes": {
                "ready": ready + sum(bool(status.get("ready")) for status in others),
                "total": self.options.processes,
            }
        }

    async def _reload_all(self, principal: str) -> None:
        """Poll the sources in all processes; raises ServingError where that cannot be recorded."""
        audit = self.server.audit
        if audit is not None:
            try:
                await audit.record_async(principal, "reload", "begun")
            except MlkitError as error:
                _log.error("A reload is denied because it cannot be recorded: %s", error)
                raise ServingError("UNAVAILABLE", "Administrative actions cannot be recorded at present.") from None
        self.board.request_reload()
        await self._poll()
        if audit is not None:
            versions = {name: self.manager.model(name).default for name in self.manager.names()}
            await audit.record_async(principal, "reload", "done", versions=versions)

    async def _refresh(self) -> None:
        if self.tls is not None:
            self.tls.refresh()
        await self._poll()

    async def _poll(self) -> None:
        token = self.board.reload_token()
        await (self.manager.update() if token == self._reload_token else self.manager.reload())
        self._reload_token = token
        self._publish_status()

    def _publish_status(self, serving: bool = True) -> None:
        models = {name: self.manager.model(name) for name in self.manager.names()}
        status = {
            "pid": os.getpid(),
            "ready": serving and self.manager.ready,
            "loaded": {name: sorted(model.loaded) for name, model in models.items()},
            "default": {name: model.default for name, model in models.items()},
            "problems": self.server.problems(),
        }
        with contextlib.suppress(OSError):  # a full disk must not stop serving
            self.board.publish(status)

    async def run(self) -> int:  # exit code
        """Serve until SIGTERM or SIGINT, then shut down gracefully.

        A process that stops first reports that it is not ready, then finishes the requests in progress. It also stops
        when its supervisor is gone.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self.server.load()
        if not self.manager.ready:
            self._publish_status(serving=False)
            return CANNOT_SERVE
        async with contextlib.AsyncExitStack() as ports:
            await self._start_rest(ports)
            await self._start_grpc(ports)
            self._publish_status()
            watchers = [loop.create_task(self.server.watch(self._refresh)), loop.create_task(self._watch_supervisor())]
            await self._stop.wait()
            self.server.application.draining = True
            self._publish_status(serving=False)
            for task in watchers:
                task.cancel()
        await self.server.close()
        if self._orphaned:
            self.board.leave()
        return 0

    async def _start_rest(self, ports: contextlib.AsyncExitStack) -> None:
        web_server = make_web_server(self.server.application, self.options)
        if self.tls is not None:
            from mlkit._compat.uvicorn import set_tls_context

            set_tls_context(web_server, self.tls.context)
        listening = self.listening
        if self.options.reuse_port:
            listening = open_port(self.options.host, self.options.port, reuse_port=True)
        serving = asyncio.create_task(web_server.serve(sockets=[listening]))
        while not web_server.started:
            if serving.done():
                serving.result()
                raise MlkitError("The web server stopped before it had started.")
            await asyncio.sleep(0.001)

        async def close() -> None:
            web_server.should_exit = True
            await serving

        ports.push_async_callback(close)

    async def _start_grpc(self, ports: contextlib.AsyncExitStack) -> None:
        if self.options.grpc_port is None:
            return
        from mlkit.serving.grpc_server import start_grpc

        grpc_server = await start_grpc(
            self.manager,
            f"{self.options.host}:{self.options.grpc_port}",
            message_bytes=self.options.body_bytes,
            credentials=self.tls.grpc_credentials() if self.tls else None,
            reload=self._reload_all,
            telemetry=self.server.telemetry,
            auth=self.server.auth,
            on_denied=self.server.on_denied,
        )
        ports.push_async_callback(grpc_server.stop, self.options.shutdown_grace_period)

    async def _watch_supervisor(self) -> None:
        """Stop when the process that started this one is gone."""
        while os.getppid() == multiprocessing.parent_process().pid:
            await asyncio.sleep(self.options.poll_interval)
        self._orphaned = True
        self._stop.set()


def run_process(
    options: ServerOptions,
    index: int,  # number of the process, from 0
    listening: socket.socket,
    board: ProcessStatusBoard,
) -> int:  # exit code
    """Run one of a server's processes."""
    _set_up_logging(options, f"process {index}", process=index)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    prepare_runtime(options.runtime)

    async def serve() -> int:
        return await ServerProcess(options, index, listening, board).run()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve())


def _set_up_logging(options: ServerOptions, name: str, **fields: Any) -> None:
    """Log to standard error as text or JSON; each line names its process."""
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s {name}: %(message)s")
    handler.setFormatter(JsonLines(**fields) if options.logs.log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: half the overhead of Python's own event loop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def open_port(
    host: str,
    port: int,  # 0: any free port
    *,
    reuse_port: bool = False,  # several sockets on the port; the kernel distributes connections among them
    listen: bool = True,  # False: only reserve the port
) -> socket.socket:
    """Listen on a port; raises InputError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
        if listen:
            listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"Cannot listen on {host}, port {port}: {error}. Choose another one: --port 0") from None
    return listening


# On Linux a process is a fork of the supervisor: modules that the supervisor has imported need not be imported again,
# which is most of the start time of a converted model. That is safe as long as the supervisor has no TensorFlow, whose
# threads do not survive a fork.
_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _process_main(options: ServerOptions, index: int, listening: socket.socket, folder: Path) -> None:
    """Main function of a server process; drops the supervisor's terminal, signal handlers and log first."""
    os.setsid()  # Ctrl-C goes to the supervisor, which forwards it
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    logging.getLogger().handlers.clear()
    sys.exit(run_process(options, index, listening, ProcessStatusBoard(folder, options.processes, index)))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Context manager that defers signals: a fork would run the supervisor's handlers until it has its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class Supervisor:
    """Starts a server's processes and restarts those that die.

    It reserves the port before any process starts, so that a port in use is reported at once. A process that dies is
    restarted immediately the first time, then after growing delays. Where a model has no version that can be loaded
    and the server has not been ready yet, the server stops with the reason.
    """

    def __init__(
        self,
        options: ServerOptions,
        ready: Callable[["Supervisor"], None],  # called once, when all processes serve
    ):
        self._listening = open_port(options.host, options.port)  # exclusive: SO_REUSEPORT would hide a port in use
        self.options = dataclasses.replace(options, port=self._listening.getsockname()[1])
        if options.reuse_port:
            self._listening.close()
            self._listening = open_port(options.host, self.options.port, reuse_port=True, listen=False)
        self._ready, self._stopping, self._failure = ready, asyncio.Event(), ""
        self._processes: dict[int, multiprocessing.process.BaseProcess] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="mlkit-serve-"))
        self.board = ProcessStatusBoard(self.folder, options.processes)

    @property
    def url(self) -> str:
        """URL of the REST API."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{'https' if self.options.tls.certificate else 'http'}://{host}:{self.options.port}"

    @property
    def grpc_address(self) -> str:
        """Address of the gRPC services; "" without gRPC."""
        number = self.options.grpc_port
        return "" if number is None else f"{self.options.host}:{number}"

    @property
    def pids(self) -> list[int]:
        """Process IDs of the server processes."""
        return [process.pid for _, process in sorted(self._processes.items())]

    async def run(self) -> None:
        """Supervise until SIGTERM or Ctrl-C; raises MlkitError when the models cannot be served."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        models = {model.name: model.reference or model.path for model in self.options.models}
        self.options.logs.record("start", "begun", models=models, url=self.url, processes=self.options.processes)
        keepers = [loop.create_task(self._keep_running(index)) for index in range(self.options.processes)]
        try:
            await self._wait_until_ready()
            await self._stopping.wait()
        finally:
            await self._stop(keepers)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.options.logs.record("stop", self._failure or "done", url=self.url)
        if self._failure:
            raise MlkitError(self._failure)

    def _reload(self) -> None:
        """SIGHUP: have all processes poll their sources."""
        try:
            self.options.logs.record("reload", "begun", by="SIGHUP")
        except MlkitError as error:
            _log.error("A reload is denied because it cannot be recorded: %s", error)
        else:
            self.board.request_reload()

    async def _wait_until_ready(self) -> None:
        while not self._stopping.is_set():
            if all(status.get("ready") for status in self.board.read()):
                self._ready(self)
                return
            await asyncio.sleep(0.01)

    async def _keep_running(self, index: int) -> None:
        """Start a process, and restart it whenever it ends."""
        delay, was_ready = 0.0, False
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._wait_for_end(self._start(index))
            status = self.board.read_process(index)
            was_ready |= bool(status.get("ready")) or bool(status.get("loaded") and not status.get("problems"))
            self.board.remove(index)
            if self._stopping.is_set():
                return
            if not was_ready and (code == CANNOT_SERVE or delay >= 4):
                self._failure = _explain_failure(status, code)
                self._stopping.set()
                return
            _log.warning("process %s has ended (%s) and is restarted", index, _describe_exit(code))
            lifetime = time.monotonic() - started
            delay = 0.0 if lifetime > 60 or (was_ready and not delay) else min(30.0, delay * 2 + 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    def _start(self, index: int) -> multiprocessing.process.BaseProcess:
        arguments = (self.options, index, self._listening, self.folder)
        process = _PROCESSES.Process(target=_process_main, args=arguments, daemon=True)
        with _signals_blocked():
            process.start()
        self._processes[index] = process
        return process

    async def _wait_for_end(self, process: multiprocessing.process.BaseProcess) -> int:  # exit code
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process.sentinel)
        process.join()
        return process.exitcode

    async def _stop(self, keepers: list[asyncio.Task]) -> None:
        self._stopping.set()
        self._listening.close()  # new connections are refused rather than left waiting
        for process in self._processes.values():
            process.terminate()
        _, late = await asyncio.wait(keepers, timeout=self.options.shutdown_grace_period + 5)
        for process in self._processes.values():
            if late:
                process.kill()
        if late:
            await asyncio.wait(late)


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _explain_failure(status: Mapping[str, Any], code: int) -> str:
    problems = [line for lines in status.get("problems", {}).values() for line in lines]
    return "\n".join(problems) if problems else f"The server's processes do not start ({_describe_exit(code)})."


def run_server(
    options: ServerOptions,
    ready: Callable[[Supervisor], None],  # called once, when all processes serve
) -> None:
    """Serve until SIGTERM or Ctrl-C; raises InputError for a port in use, MlkitError for what cannot be served."""
    _set_up_logging(options, "server")
    auth, _ = options.auth.open(), options.tls.open()
    for model in options.models:
        model.source(options)  # report a missing model before anything is started
    if options.public and not (auth or options.tls.client_ca):
        _log.warning("%s is reachable without API keys or tokens ([auth] in settings.ini)", options.host)

    async def supervise() -> None:
        await Supervisor(options, ready).run()

    asyncio.run(supervise())


@dataclass(frozen=True)
class RunningServer:
    """Server in a process tree of its own."""

    url: str
    pids: tuple[int, ...]  # process IDs of the server processes
    supervisor: subprocess.Popen


_RUN = (
    "import sys, json\n"
    "from mlkit.serving import ServerOptions, run_server\n"
    "ready = lambda server: print(json.dumps({'url': server.url, 'pids': server.pids}), flush=True)\n"
    "run_server(ServerOptions.from_json(sys.argv[1]), ready)\n"
)


@contextlib.contextmanager
def running_server(
    *models: ServedPath,
    port: int = 0,  # 0: any free port
    **options: Any,  # see ServerOptions
) -> Iterator[RunningServer]:
    """Context manager that runs a server, for notebooks and tests; raises MlkitError when it does not start."""
    server_options = ServerOptions(models, port=port, **options)
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-c", _RUN, server_options.to_json()]
        supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            line = supervisor.stdout.readline()
            if not line:
                supervisor.wait()
                errors.seek(0)
                raise MlkitError(errors.read().decode(errors="replace").strip()[-2000:])
            record = json.loads(line)
            yield RunningServer(record["url"], tuple(record["pids"]), supervisor)
        finally:
            supervisor.terminate()
            supervisor.wait()
            supervisor.stdout.close()
