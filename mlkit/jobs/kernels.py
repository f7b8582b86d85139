"""Warm Jupyter kernels: forked in milliseconds from a server that has imported TensorFlow, and ended with their owner.

Importing TensorFlow takes about ten seconds, and every kernel pays for it. A *fork server* imports the libraries once,
runs nothing, starts no thread of TensorFlow's runtime, and forks itself for each kernel that is requested. The copy
shares the server's memory until it changes something. It behaves like a kernel that was started in the ordinary way:
it has its own session, environment, working folder, random seeds and resource limits.

**Which server.** A copy inherits what was decided at import. Environment variables that Python or the libraries read at
import, and the installed packages, are therefore part of the server's key: with other values there is another server.
Variables that TensorFlow reads when its runtime starts, after the fork, are not.

**The protocol.** The server listens on a Unix socket in a folder that only this user can enter. A message is one line
of JSON. The first message of a connection is a request:

| request | reply | the connection then stands for |
|---|---|---|
| `kernel`, with its properties and three file descriptors | `{"pid": ...}`, later `{"exit": ...}` | the kernel |
| `hold`, with the seconds to stay after the last use | `{"pid": ...}` | a client that needs the server |
| `status` | the status | - |
| `stop` | `{"pid": ..., "kernels": ...}` | - |

When the client closes a kernel's connection, the kernel and its child processes are killed; when no kernel and no hold
is left, the server ends. The operating system closes the connections of a client that was killed, so nothing outlives
it.

**Orphan processes.** A cell can start a daemon, which leaves its process group and its parent. Linux hands such
orphans to the nearest ancestor that is a child subreaper. Kernels and server are subreapers: a child of the server that
is not a kernel has outlived one, and is killed.

**Changed code.** Modules outside the installed environment are imported anew by each kernel. The kit's own are kept if
none of their files has changed since the server imported them: comparing fifty files takes milliseconds, importing
them 0.1 s.
"""

import asyncio
import atexit
import gc
import hashlib
import importlib.util
import json
import os
import pkgutil
import platform
import resource
import select
import selectors
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

import mlkit
from mlkit._files import FileLock
from mlkit.config import load_settings
from mlkit.errors import MlkitError

READ_AT_IMPORT = (  # prefixes of environment variables that belong to the key of a server
    *("TF_", "XLA_", "CUDA_", "NVIDIA_", "ROCM_", "HIP_", "KERAS_", "OMP_", "MKL_", "OPENBLAS_", "POLARS_"),
    *("PYTHON", "PYDEVD_", "LD_", "MALLOC_", "MPLCONFIGDIR", "LANG", "LC_", "HOME", "XDG_CONFIG_HOME"),
    *("SKLEARN_", "SCIPY_", "JOBLIB_", "FSSPEC_"),
)
READ_LATER = ("TF_CONFIG", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "POLARS_MAX_THREADS")
READ_LATER += ("PYDEVD_USE_FRAME_EVAL",)  # ipykernel sets it in every kernel
PACKAGE_FOLDER = Path(mlkit.__file__).parent
KERNEL_NAME = "mlkit"  # name of the kernelspec
CAN_FORK = sys.platform == "linux"  # on macOS the system's own libraries do not survive a fork


def kernel_environment(
    environment: Mapping[str, str],  # environment of the owner
) -> dict[str, str]:
    """Environment of a kernel: the owner's, with TensorFlow's start-up messages off unless it sets that variable."""
    return {"TF_CPP_MIN_LOG_LEVEL": "2"} | dict(environment)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def server_key(
    environment: Mapping[str, str],  # environment of the kernel
    preload: str,  # modules, separated by commas
) -> str:  # 16 hexadecimal digits
    """Key of the server whose copies behave like a kernel started in this environment."""
    read_at_import = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(READ_AT_IMPORT) and name not in READ_LATER
    }
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    installed = [os.stat(folder).st_mtime_ns for folder in folders if os.path.exists(folder)]
    code = _digest(Path(__file__))  # content, because an export rewrites all modules
    mounts = os.readlink("/proc/self/ns/mnt") if CAN_FORK else ""  # a container sees other files
    identity = [sys.executable, sys.version, platform.node(), mounts, preload, read_at_import, installed, code]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def servers_folder() -> Path:
    """Private folder of this user's servers; raises MlkitError when another user can access it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime if os.path.isdir(runtime) else tempfile.gettempdir(), f"mlkit-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise MlkitError(f"{folder} should belong to you alone; remove it, or set XDG_RUNTIME_DIR to a private folder.")
    return folder


def send(
    connection: socket.socket,
    message: Mapping[str, Any],
    descriptors: tuple[int, ...] = (),  # file descriptors to pass with it
) -> None:
    """Send a message: one line of JSON, with file descriptors."""
    line = json.dumps(message).encode() + b"\n"
    if descriptors:
        sent = socket.send_fds(connection, [line], descriptors)
        line = line[sent:]
    connection.sendall(line)


def receive(
    connection: socket.socket,
) -> tuple[dict[str, Any], list[int]]:  # ({}, []) when the peer has closed the connection
    """Receive a message and its file descriptors."""
    line, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while line and not line.endswith(b"\n"):
        more = connection.recv(1 << 16)
        line = line + more if more else b""
    return (json.loads(line) if line else {}), descriptors


KERNEL_ENTRY = "mlkit.jobs.kernels:run_kernel"


@dataclass(frozen=True)
class ForkRequest:
    """Properties of the kernel, or other process, that a forked copy executes."""

    connection: socket.socket  # connection to the owner; the kernel ends when it is closed
    descriptors: list[int]  # standard input, output, error
    arguments: list[str]  # arguments of the entry point: for a kernel, those of ipykernel
    environment: dict[str, str]
    folder: str  # working folder
    umask: int
    processors: list[int]  # processors that it may use
    limits: dict[str, list[int]]  # resource number -> soft and hard limit
    entry: str  # entry point, as module:function


def fork_request(
    arguments: list[str],  # command-line arguments of ipykernel
    environment: Mapping[str, str],
    folder: str,  # working folder
    entry: str = KERNEL_ENTRY,  # entry point, as module:function, called with the arguments
    preload: Iterable[str] = (),  # modules that the server imports before it forks, besides its own
) -> dict[str, Any]:
    """Message that requests a kernel, or another process, with this process's umask, processors and limits."""
    umask = os.umask(0)
    os.umask(umask)
    numbers = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {
        "request": "kernel",
        "arguments": arguments,
        "environment": dict(environment),
        "folder": folder,
        "umask": umask,
        "processors": sorted(os.sched_getaffinity(0)),
        "limits": {str(number): resource.getrlimit(number) for number in sorted(numbers)},
        "entry": entry,
        "preload": list(preload),
    }


def kill_group(
    pid: int,  # process id of the group's leader
) -> None:
    """Kill a process group if it exists."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@dataclass
class ForkServer:
    """Server that forks kernels, notifies their owners when they end, and ends itself when it is not needed any more.

    Its loop returns in the forked copies, each with the request it has to fulfil. A kernel therefore ends like any
    Python program, its exit handlers included.
    """

    listener: socket.socket
    key: str = ""
    idle_timeout: float = 0.0  # seconds to stay after the last use
    deadline: float = 0.0  # time on the monotonic clock at which it ends unless it is in use
    started: float = field(default_factory=time.time)
    kernels: dict[int, socket.socket] = field(default_factory=dict)  # process id -> connection to the owner
    holds: set[socket.socket] = field(default_factory=set)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self) -> ForkRequest | None:  # None when the server is not needed any more
        """Process requests; in a forked copy, return the request to fulfil."""
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.deadline = time.monotonic() + 15  # the client that has started it connects by then
        while self.kernels or self.holds or time.monotonic() < self.deadline:
            for key, _ in self.selector.select(timeout=1.0):
                if request := key.data():
                    return request
            if self.kernels or self.holds:
                self.deadline = time.monotonic() + self.idle_timeout
        return None

    def status(self) -> dict[str, Any]:
        """Status of the server, as `mlkit kernels status` shows it."""
        import psutil

        return {
            "key": self.key,
            "pid": os.getpid(),
            "started": self.started,  # seconds since 1970
            "kernels": sorted(self.kernels),  # process ids
            "holds": len(self.holds),
            "idle_timeout": self.idle_timeout,  # seconds
            "memory": psutil.Process().memory_info().rss,  # bytes
        }

    def _accept(self) -> ForkRequest | None:
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        try:
            message, descriptors = receive(connection)
            return self._handle(connection, message, descriptors)
        except (OSError, ValueError):  # closed before the reply, or not the protocol
            connection.close()
        return None

    def _handle(self, connection: socket.socket, message: dict[str, Any], descriptors: list[int]) -> ForkRequest | None:
        match message.get("request"):
            case "kernel":
                return self._fork(connection, message, descriptors)
            case "hold":
                self.idle_timeout = max(self.idle_timeout, message["idle_timeout"])
                self._on_close(connection, self.holds.discard)
                self.holds.add(connection)
                send(connection, {"pid": os.getpid()})
            case "status":
                send(connection, self.status())
                connection.close()
            case "stop":
                self._stop()
                send(connection, {"pid": os.getpid(), "kernels": len(self.kernels)})
                connection.close()
            case _:
                connection.close()
        return None

    def _fork(self, connection: socket.socket, message: dict[str, Any], descriptors: list[int]) -> ForkRequest | None:
        import_modules(message.pop("preload"))
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy and Polars have threads, and support forks
            pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(reader)
            os.close(writer)
            for other in (self.listener, *self.holds, *self.kernels.values()):
                other.close()
            self.selector.close()
            del message["request"]
            return ForkRequest(connection, descriptors, **message)
        os.close(writer)
        os.read(reader, 1)  # returns when the copy has its own process group, which the owner may signal at once
        os.close(reader)
        for descriptor in descriptors:
            os.close(descriptor)
        self.kernels[pid] = connection
        self._on_close(connection, lambda _: kill_group(pid))  # the owner has ended
        pidfd = os.pidfd_open(pid)
        self.selector.register(pidfd, selectors.EVENT_READ, lambda: self._kernel_ended(pid, pidfd))
        with suppress(OSError):
            send(connection, {"pid": pid})
        return None

    def _on_close(self, connection: socket.socket, action: Callable[[socket.socket], None]) -> None:
        """Call `action` when the peer has closed a connection."""

        def closed() -> None:
            if connection.fileno() < 0:
                return  # the kernel has ended at the same moment, and that event was processed first
            self.selector.unregister(connection)
            connection.close()
            action(connection)

        self.selector.register(connection, selectors.EVENT_READ, closed)

    def _kernel_ended(self, pid: int, pidfd: int) -> None:
        """Kill what a kernel has left behind, and send its exit code to the owner."""
        self.selector.unregister(pidfd)
        os.close(pidfd)
        kill_group(pid)  # before its process id is reaped and can be given to another process
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection = self.kernels.pop(pid)
        self._kill_orphans()
        if connection.fileno() >= 0:
            self.selector.unregister(connection)
            with suppress(OSError):
                send(connection, {"exit": code})
            connection.close()

    def _kill_orphans(self) -> None:
        """Kill the orphan processes that this server has adopted from kernels that have ended."""
        import psutil

        for orphan in psutil.Process().children():
            if orphan.pid not in self.kernels:
                for process in (orphan, *orphan.children(recursive=True)):  # not reaped yet, so it exists
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                with suppress(ChildProcessError):
                    os.waitpid(orphan.pid, 0)

    def _stop(self) -> None:
        """Accept no more requests; running kernels continue to their end."""
        self.selector.unregister(self.listener)
        self.listener.close()
        self.idle_timeout = self.deadline = 0.0
        for connection in self.holds:
            self.selector.unregister(connection)
            connection.close()
        self.holds.clear()


PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def adopt_orphans() -> None:
    """Become the child subreaper: the parent of descendants whose own parent has ended."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


KERNEL_MODULES = (  # modules that ipykernel imports while it starts
    *("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipykernel.debugger"),
    *("IPython.core.magics", "IPython.core.debugger", "IPython.core.completerlib", "IPython.core.oinspect"),
    *("IPython.extensions.storemagic", "sqlite3", "tornado.platform.asyncio", "psutil"),
)


_unavailable: set[str] = set()  # modules that could not be imported


def import_modules(
    names: Iterable[str],
) -> None:
    """Import modules before a fork; a module that cannot be imported is reported in the log and left out."""
    missing = [name for name in names if name and name not in sys.modules and name not in _unavailable]
    for name in missing:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            _unavailable.add(name)
            print(f"{name} is not preloaded: {error}", flush=True)
    if missing:
        gc.collect()
        gc.freeze()


def run_server(
    path: str,  # socket
    preload: str,  # modules, separated by commas
    import_path: list[str],  # sys.path of a kernel
) -> None:
    """Run a fork server until it ends; in a forked copy, run the kernel.

    It imports before it accepts requests. Everything imported is then moved out of the garbage collector's sight: a
    collection would touch the memory that kernels share with the server, and thereby copy it.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        adopt_orphans()
        modules = [module.strip() for module in preload.split(",")]
        kit = kit_files() if any(module.partition(".")[0] == "mlkit" for module in modules) else {}
        import_modules((*KERNEL_MODULES, *modules))
        request = ForkServer(listener, key=Path(path).stem).serve()
        if request is None:
            for file in (Path(path), Path(path).with_suffix(".log")):
                file.unlink(missing_ok=True)
            return
    exec_kernel(request, import_path, kit)


def exec_kernel(
    request: ForkRequest,
    import_path: list[str],  # sys.path of a kernel
    kit: dict[str, str],  # digests of the kit's files when the server imported them; {} if it did not
) -> None:
    """Turn this copy of the server into the requested kernel or other process, and run it until it ends."""
    entry = pkgutil.resolve_name(request.entry)
    changeable = changeable_modules()  # after the import of the entry point, so that no module exists twice
    adopt_orphans()
    for target, descriptor in enumerate(request.descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    time.tzset()
    os.umask(request.umask)
    os.sched_setaffinity(0, request.processors)
    for number, limits in request.limits.items():
        with suppress(ValueError, OSError):  # a hard limit cannot be raised
            resource.setrlimit(int(number), limits)
    os.chdir(request.folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_owner, args=(request.connection,), daemon=True, name="owner").start()
    sys.path[:] = import_path
    sys.argv = ["ipykernel_launcher", *request.arguments]
    tempfile.tempdir = None
    reload_changed(changeable, kit)
    reseed()
    choose_backend()
    read_storage_options()
    entry(request.arguments)


def _end_with_owner(connection: socket.socket) -> None:
    """Kill this kernel's process group when the owner has closed the connection."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    kill_group(os.getpid())


def run_kernel(
    arguments: list[str],  # command-line arguments of ipykernel
) -> None:
    """Run ipykernel in this process, without its own check of the parent process."""
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=[*arguments, "--IPKernelApp.parent_handle=1"])
    exit_fast()


def exit_fast() -> NoReturn:
    """End this process after its threads and exit handlers; finalizing modules would take half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
    os._exit(0)


def changeable_modules() -> list[str]:  # names
    """Imported modules outside the installed environment, and the kit's own."""
    installed = (sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages())
    files = {name: vars(module).get("__file__") for name, module in list(sys.modules.items())}
    return [
        name
        for name, file in files.items()
        if name.partition(".")[0] == "mlkit" or (file and name != "__main__" and not file.startswith(installed))
    ]


def kit_files() -> dict[str, str]:  # relative path -> digest of the content
    """Digests of the kit's files on disk; {} while one of them is being replaced."""
    with suppress(OSError):
        return {str(path.relative_to(PACKAGE_FOLDER)): _digest(path) for path in PACKAGE_FOLDER.rglob("*.py")}
    return {}


def _finds_kit() -> bool:
    """Whether `import mlkit` would import this kit in the present working folder."""
    spec = PathFinder.find_spec("mlkit", [os.getcwd()]) or importlib.util.find_spec("mlkit")
    return spec is not None and spec.origin == mlkit.__file__


def reload_changed(
    changeable: list[str],  # names of modules
    kit: dict[str, str],  # digests of the kit's files when they were imported; {} to reload them in any case
) -> None:
    """Remove modules from sys.modules, so that they are imported anew; the kit's own only if a file has changed."""
    kit_modules = {name: sys.modules[name] for name in changeable if name.partition(".")[0] == "mlkit"}
    for name in changeable:
        sys.modules.pop(name, None)
    if kit and kit == kit_files() and _finds_kit():
        sys.modules.update(kit_modules)


def reseed() -> None:
    """Seed NumPy's global generator anew; Python does so for `random` after a fork."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def choose_backend() -> None:
    """Set matplotlib's inline backend, and read a configuration in this folder that the server has not read."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    if matplotlib := sys.modules.get("matplotlib"):
        if "MATPLOTLIBRC" in os.environ or os.path.exists("matplotlibrc"):
            matplotlib.rcParams.update(matplotlib.rc_params())
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]


def read_storage_options() -> None:
    """Read fsspec's configuration files and variables anew."""
    if config := sys.modules.get("fsspec.config"):
        config.conf.clear()
        with suppress(Exception):  # an invalid file is reported when it is used
            config.set_conf_files(config.conf_dir, config.conf)
        config.set_conf_env(config.conf)


SERVER_CODE = (
    "import sys; path = sys.path[1:]; sys.path[:] = [*path, {package!r}]; "
    "from mlkit.jobs.kernels import run_server; run_server({socket!r}, {preload!r}, path)"
)


@dataclass(frozen=True)
class ForkServerClient:
    """Client of a fork server, which may or may not be running."""

    key: str
    preload: str = ""  # modules, separated by commas
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def for_environment(cls, environment: Mapping[str, str]) -> "ForkServerClient":
        """Server whose kernels behave like an ordinary one in this environment."""
        environment = kernel_environment(environment)
        preload = load_settings().kernels.preload
        return cls(server_key(environment, preload), preload, environment)

    @property
    def socket_path(self) -> Path:
        """Socket at which the server listens."""
        return servers_folder() / f"{self.key}.sock"

    @property
    def log_path(self) -> Path:
        """Log file of the server."""
        return servers_folder() / f"{self.key}.log"

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.socket_path))
        except OSError:
            connection.close()
            return None
        return connection

    def is_running(self) -> bool:
        """Whether the server accepts requests, or will when it has imported."""
        if connection := self._connect():
            connection.close()
        return connection is not None

    def request(
        self,
        name: str,  # "status" or "stop"
    ) -> dict[str, Any]:  # {} when the server is not running
        """Send a request and return the reply."""
        if connection := self._connect():
            with connection, suppress(OSError):
                send(connection, {"request": name})
                return receive(connection)[0]
        return {}

    def hold(
        self,
        idle_timeout: float = 0.0,  # seconds for which the server stays after the last use
    ) -> socket.socket:  # connection; the server is needed until it is closed
        """Start the server if necessary, wait for it, and hold it; raises MlkitError when it cannot start."""
        for _ in range(3):
            self._start()
            if connection := self._connect():
                with suppress(OSError):
                    send(connection, {"request": "hold", "idle_timeout": idle_timeout})
                    if receive(connection)[0]:
                        return connection
                connection.close()  # the server was about to end
        raise MlkitError(f"The warm server did not start (log: {self.log_path}): {_last_line(self.log_path)}")

    def _start(self) -> None:
        """Start the server's process unless it is running, and wait until it listens; a lock admits one client."""
        with FileLock(servers_folder() / "lock"):
            if self.is_running():
                return
            _remove_stale_files()
            package = str(PACKAGE_FOLDER.parent)
            code = SERVER_CODE.format(package=package, socket=str(self.socket_path), preload=self.preload)
            with self.log_path.open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env=self.environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while not self.is_running() and process.poll() is None:
                time.sleep(0.02)

    def start_kernel(
        self,
        arguments: list[str],  # command-line arguments of ipykernel
        environment: Mapping[str, str],
        folder: str | Path,  # working folder
        descriptors: tuple[int, int, int] = (0, 1, 2),  # standard input, output, error
        **options: Any,  # entry, preload: see fork_request
    ) -> "ForkedKernel":
        """Fork a kernel from the server; raises MlkitError when the server does not respond."""
        if connection := self._connect():
            with suppress(OSError):
                request = fork_request(arguments, kernel_environment(environment), os.fspath(folder), **options)
                send(connection, request, descriptors)
                if reply := receive(connection)[0]:
                    return ForkedKernel(connection, reply["pid"])
            connection.close()
        raise MlkitError("The warm server does not respond.")


def _remove_stale_files() -> None:
    """Remove the files of servers that were killed."""
    for path in servers_folder().glob("*.sock"):
        if not ForkServerClient(path.stem).is_running():
            path.unlink(missing_ok=True)
            path.with_suffix(".log").unlink(missing_ok=True)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "nothing"


def running_servers() -> list[dict[str, Any]]:  # status of each
    """Running servers of this user."""
    statuses = [ForkServerClient(path.stem).request("status") for path in sorted(servers_folder().glob("*.sock"))]
    return [status for status in statuses if status]


class ForkedKernel:
    """A forked kernel with the part of the interface of `subprocess.Popen` that Jupyter uses.

    It is not a child process of its owner: its end arrives as a message, or as the end of the connection when the
    server was killed.
    """

    stdin = stdout = stderr = None

    def __init__(
        self,
        connection: socket.socket,  # connection to the server; the kernel ends when it is closed
        pid: int,
    ):
        self.connection, self.pid = connection, pid
        self.returncode: int | None = None  # negative: the signal that ended it

    def poll(self) -> int | None:  # None while it runs
        """Exit code of the kernel."""
        return self._read_exit_code(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the kernel has ended; raises subprocess.TimeoutExpired."""
        if self._read_exit_code(timeout) is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return self.returncode

    def _read_exit_code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], timeout)[0]:
            try:
                message, _ = receive(self.connection)
            except OSError:
                message = {}
            self.returncode = message.get("exit", -signal.SIGKILL)
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel, not to its child processes."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


_holds: dict[str, socket.socket] = {}  # key of a server -> connection that holds it until this process ends
_holds_lock = threading.Lock()


def hold_server(
    environment: Mapping[str, str],
) -> ForkServerClient:
    """Hold the server for an environment until this process ends; raises MlkitError when it cannot run."""
    if not CAN_FORK:
        raise MlkitError(f"Warm kernels need Linux; this is {platform.system()}.")
    server = ForkServerClient.for_environment(environment)
    with _holds_lock:
        connection = _holds.get(server.key)
        if connection is None or select.select([connection], [], [], 0)[0]:  # not held, or the server has ended
            _holds[server.key] = server.hold()
    return server


def is_warm(
    environment: Mapping[str, str],
) -> bool:
    """Whether the server for an environment is running."""
    with suppress(MlkitError, OSError):
        return CAN_FORK and ForkServerClient.for_environment(environment).is_running()
    return False


def release_servers() -> None:
    """Release all servers that this process holds; running kernels continue."""
    with _holds_lock:
        for connection in _holds.values():
            connection.close()
        _holds.clear()


class WarmProvisioner(LocalProvisioner):
    """Jupyter kernel provisioner that forks kernels from a warm server.

    The kernelspec `mlkit` names it. Kernels communicate over sockets in a private folder instead of network ports, so
    that two kernels never get the same port. Where forking is impossible, it logs a warning and starts an ordinary
    kernel.
    """

    sockets: str | None = None  # folder of the kernel's sockets

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Prepare the launch: use sockets in a private folder instead of ports."""
        manager = self.parent
        if manager and manager.transport == "tcp" and hasattr(socket, "AF_UNIX"):
            self.sockets = tempfile.mkdtemp(prefix="mlkit-")
            manager.transport, manager.ip, manager.cache_ports = "ipc", f"{self.sockets}/kernel", False
        return await super().pre_launch(**kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Fork the kernel, or start an ordinary one."""
        arguments, warm = cmd[cmd.index("-f") :], kwargs.pop("warm", True)
        loop = asyncio.get_running_loop()
        try:
            if warm:
                self.process = await loop.run_in_executor(None, fork_kernel, arguments, kwargs)
        except (MlkitError, OSError) as error:
            self.log.warning("The kernel starts cold: %s", error)
        if self.process is None:
            return await super().launch_kernel([sys.executable, "-m", "ipykernel_launcher", *arguments], **kwargs)
        self.pid = self.pgid = self.process.pid
        self.cwd = kwargs.get("cwd") or os.getcwd()
        return self.connection_info

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the sockets unless the kernel restarts."""
        await super().cleanup(restart=restart)
        if self.sockets and not restart:
            shutil.rmtree(self.sockets, ignore_errors=True)


def fork_kernel(
    arguments: list[str],  # command-line arguments of ipykernel
    launch: Mapping[str, Any],  # keyword arguments of a launch: env, cwd, stdout, stderr
    **options: Any,  # entry, preload: see fork_request
) -> ForkedKernel:
    """Fork a kernel from the server for its environment, which is started if necessary; raises MlkitError."""
    environment, folder = launch.get("env") or os.environ, launch.get("cwd") or os.getcwd()
    with open(os.devnull, "rb") as empty:
        streams = (empty, launch.get("stdout") or 1, launch.get("stderr") or 2)
        descriptors = tuple(stream if isinstance(stream, int) else stream.fileno() for stream in streams)
        if min(descriptors) < 0:
            raise MlkitError("Standard output of a warm kernel should be a file, not a pipe.")
        try:
            return hold_server(environment).start_kernel(arguments, environment, folder, descriptors, **options)
        except MlkitError:  # the server may have died; try once more with a new one
            release_servers()
            return hold_server(environment).start_kernel(arguments, environment, folder, descriptors, **options)


def main() -> None:
    """Command of the kernelspec: run a warm kernel, or turn this process into an ordinary one.

    Programs that start kernels by the kernelspec's command alone, without a provisioner, get this process. It passes
    signals on and ends with the kernel.
    """
    arguments = sys.argv[1:]
    try:
        kernel = fork_kernel(arguments, {})
    except (MlkitError, OSError) as error:
        print(f"The kernel starts cold: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *arguments])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: kernel.send_signal(number))
    code = kernel.wait()
    sys.exit(code if code >= 0 else 128 - code)


def kernel_specs() -> KernelSpecManager:
    """Installed kernelspecs, and the kit's own where it runs from a checkout."""
    manager = KernelSpecManager()
    manager.kernel_dirs.append(str(PACKAGE_FOLDER.parent / "jupyter" / "kernels"))
    return manager
