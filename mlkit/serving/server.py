"""Several equal processes answer on one port, and one more sees to it that they live."""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlkit._files import write_atomic
from mlkit.errors import InputError, MlkitError, ServingError
from mlkit.export.signatures import PREDICT
from mlkit.serving.http import _uvicorn
from mlkit.serving.model_manager import LoadedVersion, ModelManager, load_warm
from mlkit.serving.options import ServedPath, ServerOptions
from mlkit.serving.protocol import VersionStatus
from mlkit.serving.request_log import RequestLog
from mlkit.serving.rest import RestApplication
from mlkit.serving.runtimes import sessions_work, use_session_only
from mlkit.serving.telemetry import JsonLines, Telemetry


class ProcessStatusBoard:
    """What the processes of a server tell one another."""

    def __init__(
        self,
        folder: Path | str,
        processes: int,
        index: int | None = None,  # of this process; None for one that only looks
    ):
        self.folder, self.processes, self.index = Path(folder), processes, index
        self._told: dict[str, Any] | None = None

    def _file(self, index: int) -> Path:
        return self.folder / f"process-{index}.json"

    def tell(self, told: dict[str, Any]) -> None:
        """Write down how this process stands, if that is news."""
        if told != self._told:
            write_atomic(self._file(self.index), json.dumps(told), durable=False)
            self._told = told

    def forget(self, index: int) -> None:
        """A process has gone."""
        self._file(index).unlink(missing_ok=True)

    def read(self) -> list[dict[str, Any]]:  # of each process; {} where nothing is known
        """How the processes stand."""
        return [self._read(index) for index in range(self.processes)]

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return json.loads(self._file(index).read_text())
        except (OSError, ValueError):
            return {}

    def agreed(self, model: str) -> set[int]:
        """Versions of a model that all processes have."""
        told = [set(each.get("loaded", {}).get(model, ())) for each in self.read()]
        return set.intersection(*told)

    def leave(self) -> None:
        """Go, when nobody is there who would tidy up: the last one removes the folder."""
        import psutil

        self.forget(self.index)
        if not any(psutil.pid_exists(told["pid"]) for told in self.read() if told):
            shutil.rmtree(self.folder, ignore_errors=True)

    def ask_reload(self) -> None:
        """Let all processes look at their sources now."""
        write_atomic(self.folder / "reload", str(time.time_ns()), durable=False)

    def reload_token(self) -> str:
        """Another one after `ask_reload`."""
        with contextlib.suppress(OSError):
            return (self.folder / "reload").read_text()
        return ""


_log = logging.getLogger("mlkit.server")


class RequestObserver:
    """Has what happens in one process counted, and written down as far as it is wanted."""

    def __init__(
        self,
        options: ServerOptions,
        index: int,  # of the process
        host: ModelManager,
        folder: Path,  # common to all processes
    ):
        self._host, logs = host, options.logs
        self.telemetry = Telemetry(
            folder,
            index,
            models=host.models(),
            runtime={"tensorflow": "TF1", "eager": "TF2"}.get(options.runtime, "LiteRT"),
            requests=logs.requests,
            mask=logs.sensitive,
        )
        self.audit = logs.audit()
        self.exchanges: RequestLog | None = None
        if logs.folder and logs.share:
            told = {"share": logs.share, "form": logs.form, "mask": logs.sensitive, "logged": self.telemetry.logged}
            self.exchanges = RequestLog(logs.folder, index, **told)
            self.telemetry.report_dropped("exchanges", self.exchanges.writer)
        host.batches, host.shadows = self._count_batch, self.telemetry.shadow
        host.listeners += [self.telemetry.state, self._note]
        self.telemetry.samplers.append(self._count_waiting)

    def _count_batch(self, model: str, version: int, signature: str, *told: Any) -> None:
        found = self._host.state(model).loaded.get(version)
        method = found.signatures[signature].method if found else PREDICT
        self.telemetry.batch(model, version, method.rpartition("/")[2].title(), *told)

    def _count_waiting(self) -> None:
        for name in self._host.models():
            for number, version in self._host.state(name).loaded.items():
                self.telemetry.waiting(name, number, version.waiting)

    def _listen_to(self, version: LoadedVersion) -> None:
        """Have the requests that a version answers logged, and examples counted."""
        takes_examples = {name for name, told in version.signatures.items() if told.method != PREDICT}

        def told(signature: str, inputs: Mapping[str, Any], rows: int | None, outputs: Mapping[str, Any]) -> None:
            if signature in takes_examples:
                self.telemetry.examples(version.model, rows or 0)
            if self.exchanges is not None:
                self.exchanges.add(version, signature or "serving_default", inputs, rows, outputs)

        if takes_examples or self.exchanges is not None:
            version.listener = told

    def _note(self, what: str, model: str, status: VersionStatus) -> None:
        if what == "AVAILABLE":
            self._listen_to(self._host.state(model).loaded[status.version])
        if status.code != "OK":
            _log.warning("%s/%s is refused: %s", model, status.version, status.message)
        elif what in ("AVAILABLE", "END"):
            _log.info("%s/%s %s", model, status.version, "is loaded" if what == "AVAILABLE" else "has left")

    def close(self) -> None:
        """Write what waits."""
        if self.exchanges is not None:
            self.exchanges.close()
        self.telemetry.close()


_TIDYING = 10.0  # seconds after a version has left
_TURN = 0.0005  # seconds that a thread may keep the interpreter when others want it
CANNOT_SERVE = 3  # exit code of a process that has a model without any version that can be loaded


class ServerProcess:
    """One of a server's equal processes."""

    def __init__(
        self,
        options: ServerOptions,
        index: int,
        listening: socket.socket,
        board: ProcessStatusBoard,
    ):
        self.options, self.index, self.listening, self.board = options, index, listening, board
        sources = {model.name: model.source(options) for model in options.models}
        loop = asyncio.get_running_loop()
        warmed = lambda *told: loop.call_soon_threadsafe(self.telemetry.warmed, *told)  # noqa: E731
        load = lambda folder: load_warm(folder, options.runtime, options.kind, warmed)  # noqa: E731
        self.host = ModelManager(sources, load, options.limits, options.shadow)
        self.host.agreed = board.agreed if options.processes > 1 else None
        self.host.listeners.append(self._note)
        self.access, self.tls = options.access.open(), options.tls.open()
        self.observer = RequestObserver(options, index, self.host, board.folder)
        self.telemetry, self.audit = self.observer.telemetry, self.observer.audit
        self.refused = self.audit.refuse if self.audit else None
        self.application = RestApplication(
            self.host,
            body_bytes=options.body_bytes,
            cache_bytes=options.cache_bytes,
            readiness=self._readiness,
            reload=self._reload_all,
            telemetry=self.telemetry,
            access=self.access,
            certificates=bool(options.tls.clients),
            refused=self.refused,
        )
        self._stop, self._reloaded, self._alone = asyncio.Event(), board.reload_token(), False
        self._untidy = False

    def _note(self, what: str, model: str, status: VersionStatus) -> None:
        if what == "LOADING":
            self._tidy()
        if what == "END":
            self._untidy = True
            asyncio.get_running_loop().call_later(_TIDYING, self._tidy)

    def _tidy(self) -> None:
        """Give back what a version has left behind."""
        if self._untidy:
            self._untidy = False
            gc.collect()

    def _readiness(self) -> dict[str, Any]:
        own = self.host.ready and not self.application.draining  # whoever is asked can answer, told or not
        others = [told for index, told in enumerate(self.board.read()) if index != self.index]
        ready = own + sum(bool(each.get("ready")) for each in others)
        return {"processes": {"ready": ready, "of": self.options.processes}}

    async def _reload_all(self, who: str) -> None:
        """Look at the sources in all processes, for somebody; raises ServingError where it cannot be recorded."""
        if self.audit is not None:
            try:
                await self.audit.write(who, "reload", "begun")
            except MlkitError as error:
                _log.error("A reload is not done, since it cannot be recorded: %s", error)
                raise ServingError("UNAVAILABLE", "What administrators do cannot be recorded at present.") from None
        self.board.ask_reload()
        await self._step()
        if self.audit is not None:
            serving = {name: self.host.state(name).default for name in self.host.models()}
            await self.audit.write(who, "reload", "done", versions=serving)

    async def _step(self) -> None:
        token = self.board.reload_token()
        await (self.host.step() if token == self._reloaded else self.host.reload())
        self._reloaded = token
        self._tell()

    def _tell(self, serving: bool = True) -> None:
        """Write on the board how this process stands."""
        states = {name: self.host.state(name) for name in self.host.models()}
        refused = {
            name: [f"{name}/{told.version}: {told.message}" for told in self.host.statuses(name) if told.code != "OK"]
            for name in states
        }
        told = {
            "pid": os.getpid(),
            "ready": serving and self.host.ready,
            "loaded": {name: sorted(state.loaded) for name, state in states.items()},
            "default": {name: state.default for name, state in states.items()},
            "problems": {
                name: (refused[name] or [state.problem or "it has no version"])
                for name, state in states.items()
                if state.default is None
            },
        }
        with contextlib.suppress(OSError):  # a full disk must not stop what answers
            self.board.tell(told)

    async def run(self) -> int:  # exit code
        """Serve until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        await self._load()
        if not self.host.ready:
            self._tell(serving=False)
            return CANNOT_SERVE
        async with contextlib.AsyncExitStack() as doors:
            await self._open(doors)
            self._tell()
            watching = [loop.create_task(self._watch()), loop.create_task(self._watch_supervisor())]
            await self._stop.wait()
            self.application.draining = True
            self._tell(serving=False)
            for task in watching:
                task.cancel()
        await self._unload()
        if self._alone:
            self.board.leave()
        return 0

    async def _load(self) -> None:
        """Have the first versions in service."""
        await self.host.step()
        sys.setswitchinterval(_TURN)
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # a request leaves no circles behind, so that looking for some can wait

    async def _unload(self) -> None:
        """Unload everything, once all requests have been answered, and write what waits."""
        await self.host.close()
        self.observer.close()

    async def _open(self, doors: contextlib.AsyncExitStack) -> None:
        """Answer on the socket of REST, and on gRPC's port if there is one."""
        rest = _uvicorn(self.application, self.options)
        if self.tls is not None:
            rest.config.load()
            rest.config.ssl = self.tls.context
        listening = self.listening
        if self.options.divided:
            listening = open_port(self.options.host, self.options.port, divided=True)
        serving = asyncio.create_task(rest.serve(sockets=[listening]))
        while not rest.started:
            if serving.done():
                serving.result()
                raise MlkitError("The web server has stopped before it started.")
            await asyncio.sleep(0.001)

        async def close() -> None:
            rest.should_exit = True
            await serving

        doors.push_async_callback(close)
        if self.options.grpc_port is not None:
            from mlkit.serving.grpc_server import start_grpc

            address = f"{self.options.host}:{self.options.grpc_port}"
            server = await start_grpc(
                self.host,
                address,
                message_bytes=self.options.body_bytes,
                credentials=self.tls.credentials() if self.tls else None,
                reload=self._reload_all,
                telemetry=self.telemetry,
                access=self.access,
                refused=self.refused,
            )
            doors.push_async_callback(server.stop, self.options.grace)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll)
            self.telemetry.sample()
            try:
                if self.tls is not None:
                    self.tls.refresh()
                await self._step()
            except Exception:  # what is in service goes on
                _log.exception("The sources of models could not be watched")

    async def _watch_supervisor(self) -> None:
        """Stop when the process that has started this one is there no more."""
        while os.getppid() == multiprocessing.parent_process().pid:
            await asyncio.sleep(self.options.poll)
        self._alone = True
        self._stop.set()


def run_process(
    options: ServerOptions,
    index: int,  # from 0
    listening: socket.socket,
    board: ProcessStatusBoard,
) -> int:  # exit code
    """Be one of a server's processes."""
    _set_up_logging(options, f"process {index}", process=index)
    for noisy in ("uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if options.runtime == "tensorflow" and sessions_work():
        use_session_only()

    async def serve() -> int:
        return await ServerProcess(options, index, listening, board).run()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve())


def _set_up_logging(options: ServerOptions, name: str, **always: Any) -> None:
    """Write to standard error: for people, or for machines."""
    handler = logging.StreamHandler()
    text = logging.Formatter(f"%(asctime)s {name}: %(message)s")
    handler.setFormatter(JsonLines(**always) if options.logs.lines == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed: half the time of Python's own loop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def open_port(
    host: str,
    port: int,  # 0: any that is free
    *,
    divided: bool = False,  # several sockets share the port, and the system divides callers among those that listen
    listen: bool = True,  # otherwise the port is only kept
) -> socket.socket:
    """Listen on a port; raises InputError when that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if divided:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
        if listen:
            listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"Cannot listen on {host}, port {port}: {error}. Choose another one: --port 0") from None
    return listening


_STARTING = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _begin(options: ServerOptions, index: int, listening: socket.socket, folder: Path) -> None:
    """The whole life of a process that the supervisor has started."""
    os.setsid()  # Ctrl-C is for the supervisor, who passes it on
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    logging.getLogger().handlers.clear()
    sys.exit(run_process(options, index, listening, ProcessStatusBoard(folder, options.processes, index)))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Have signals wait: until it has handlers of its own, a copy would call those of the supervisor."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class Supervisor:
    """Starts a server's processes, and again those that die."""

    def __init__(
        self,
        options: ServerOptions,
        ready: Callable[["Supervisor"], None],  # is called once, when all processes answer
    ):
        self._listening = open_port(options.host, options.port)  # of nobody else: a divided port would not tell
        self.options = dataclasses.replace(options, port=self._listening.getsockname()[1])
        if options.divided:
            self._listening.close()
            self._listening = open_port(options.host, self.options.port, divided=True, listen=False)
        self._ready, self._stopping, self._failed = ready, asyncio.Event(), ""
        self._running: dict[int, multiprocessing.process.BaseProcess] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="mlkit-serve-"))
        self.board = ProcessStatusBoard(self.folder, options.processes)

    @property
    def url(self) -> str:
        """Where the models are."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{'https' if self.options.tls.certificate else 'http'}://{host}:{self.options.port}"

    @property
    def grpc_address(self) -> str:
        """Where gRPC is answered; "" where it is not."""
        number = self.options.grpc_port
        return "" if number is None else f"{self.options.host}:{number}"

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [each.pid for _, each in sorted(self._running.items())]

    async def run(self) -> None:
        """Supervise until SIGTERM or Ctrl-C; raises MlkitError when the models cannot be served."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        models = {model.name: model.reference or model.path for model in self.options.models}
        self.options.logs.record("start", "begun", models=models, url=self.url, processes=self.options.processes)
        keeping = [loop.create_task(self._keep(index)) for index in range(self.options.processes)]
        try:
            await self._wait_until_ready()
            await self._stopping.wait()
        finally:
            await self._stop(keeping)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.options.logs.record("stop", self._failed or "done", url=self.url)
        if self._failed:
            raise MlkitError(self._failed)

    def _reload(self) -> None:
        """SIGHUP: have all processes look at their sources."""
        try:
            self.options.logs.record("reload", "begun", by="SIGHUP")
        except MlkitError as error:
            _log.error("A reload is not done, since it cannot be recorded: %s", error)
        else:
            self.board.ask_reload()

    async def _wait_until_ready(self) -> None:
        while not self._stopping.is_set():
            if all(each.get("ready") for each in self.board.read()):
                self._ready(self)
                return
            await asyncio.sleep(0.01)

    async def _keep(self, index: int) -> None:
        """Start a process, and again when it has died."""
        pause, been_ready = 0.0, False
        while not self._stopping.is_set():
            started = time.monotonic()
            code = await self._end_of(self._start(index))
            told = self.board._read(index)
            been_ready |= bool(told.get("ready")) or bool(told.get("loaded") and not told.get("problems"))
            self.board.forget(index)
            if self._stopping.is_set():
                return
            if not been_ready and (code == CANNOT_SERVE or pause >= 4):
                self._failed = _explain(told, code)
                self._stopping.set()
                return
            _log.warning("process %s has ended (%s) and is started again", index, _meaning(code))
            lived = time.monotonic() - started
            pause = 0.0 if lived > 60 or (been_ready and not pause) else min(30.0, pause * 2 + 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    def _start(self, index: int) -> multiprocessing.process.BaseProcess:
        told = (self.options, index, self._listening, self.folder)
        process = _STARTING.Process(target=_begin, args=told, daemon=True)
        with _undisturbed():
            process.start()
        self._running[index] = process
        return process

    async def _end_of(self, process: multiprocessing.process.BaseProcess) -> int:  # exit code
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(process.sentinel)
        process.join()
        return process.exitcode

    async def _stop(self, keeping: list[asyncio.Task]) -> None:
        self._stopping.set()
        self._listening.close()  # whoever comes now is refused, rather than left waiting
        for process in self._running.values():
            process.terminate()
        _, late = await asyncio.wait(keeping, timeout=self.options.grace + 5)
        for process in self._running.values():
            if late:
                process.kill()
        if late:
            await asyncio.wait(late)


def _meaning(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _explain(told: Mapping[str, Any], code: int) -> str:
    problems = [line for lines in told.get("problems", {}).values() for line in lines]
    return "\n".join(problems) if problems else f"The server's processes do not start ({_meaning(code)})."


def run_server(
    options: ServerOptions,
    ready: Callable[[Supervisor], None],  # is called once, when all processes answer
) -> None:
    """Serve until SIGTERM or Ctrl-C; raises InputError for a port in use, MlkitError for what cannot be served."""
    _set_up_logging(options, "server")
    guarded = [options.access.open(), options.tls.open()]
    for model in options.models:
        model.source(options)  # what is not there is told before anything is started
    if options.public and not (guarded[0] or options.tls.clients):
        _log.warning("Everybody who reaches %s may ask: no keys, no tokens ([access] in settings.ini)", options.host)

    async def supervise() -> None:
        await Supervisor(options, ready).run()

    asyncio.run(supervise())


@dataclass(frozen=True)
class RunningServer:
    """A server in processes of its own."""

    url: str
    pids: tuple[int, ...]  # of the processes that answer
    supervisor: subprocess.Popen


_RUN = (
    "import sys, json\n"
    "from mlkit.serving import ServerOptions, run_server\n"
    "tell = lambda server: print(json.dumps({'url': server.url, 'pids': server.pids}), flush=True)\n"
    "run_server(ServerOptions.from_json(sys.argv[1]), tell)\n"
)


@contextlib.contextmanager
def running_server(
    *models: ServedPath,
    port: int = 0,  # any that is free
    **options: Any,  # see ServerOptions
) -> Iterator[RunningServer]:
    """Have a server while the `with` lasts; raises MlkitError when it does not start."""
    told = ServerOptions(models, port=port, **options)
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-c", _RUN, told.to_json()]
        supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            line = supervisor.stdout.readline()
            if not line:
                supervisor.wait()
                errors.seek(0)
                raise MlkitError(errors.read().decode(errors="replace").strip()[-2000:])
            found = json.loads(line)
            yield RunningServer(found["url"], tuple(found["pids"]), supervisor)
        finally:
            supervisor.terminate()
            supervisor.wait()
            supervisor.stdout.close()
