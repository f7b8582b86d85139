"""A Jupyter kernel in which TensorFlow is already imported: forked in milliseconds from a warm server, gone with its owner."""

import asyncio
import atexit
import fcntl
import gc
import hashlib
import importlib.util
import json
import os
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

import mlkit
from mlkit.config import load_settings
from mlkit.errors import MlkitError

READ_AT_IMPORT = (
    *("TF_", "XLA_", "CUDA_", "NVIDIA_", "ROCM_", "HIP_", "KERAS_", "OMP_", "MKL_", "OPENBLAS_", "POLARS_"),
    *("PYTHON", "PYDEVD_", "LD_", "MALLOC_", "MPLCONFIGDIR", "LANG", "LC_", "HOME", "XDG_CONFIG_HOME"),
    *("SKLEARN_", "SCIPY_", "JOBLIB_", "FSSPEC_"),
)
READ_LATER = ("TF_CONFIG", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "POLARS_MAX_THREADS")
READ_LATER += ("PYDEVD_USE_FRAME_EVAL",)  # ipykernel sets it in every kernel
KIT = Path(mlkit.__file__).parent
KERNEL_NAME = "mlkit"  # of the kernelspec
CAN_FORK = sys.platform == "linux"  # on macOS the system's own libraries do not survive a fork


def kernel_environment(
    environment: Mapping[str, str],  # of the process that asks
) -> dict[str, str]:
    """The environment of a kernel: the owner's, with TensorFlow's start-up messages off unless they are asked for."""
    return {"TF_CPP_MIN_LOG_LEVEL": "2"} | dict(environment)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def server_key(
    environment: Mapping[str, str],  # of the kernel to be
    preload: str,  # modules, separated by commas
) -> str:  # 16 hexadecimal digits
    """Names the server whose copies behave like a kernel started in this environment."""
    decisive = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(READ_AT_IMPORT) and name not in READ_LATER
    }
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    changed = [os.stat(folder).st_mtime_ns for folder in folders if os.path.exists(folder)]
    code = _digest(Path(__file__))  # by content: an export writes all modules anew
    files = os.readlink("/proc/self/ns/mnt") if CAN_FORK else ""  # a container sees other files
    identity = [sys.executable, sys.version, platform.node(), files, preload, decisive, changed, code]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def servers_folder() -> Path:
    """The private folder of this user's warm servers; raises MlkitError when somebody else could reach into it."""
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
    descriptors: tuple[int, ...] = (),  # files handed over with it
) -> None:
    """Send a message: one line of JSON."""
    line = json.dumps(message).encode() + b"\n"
    if descriptors:
        sent = socket.send_fds(connection, [line], descriptors)
        line = line[sent:]
    connection.sendall(line)


def receive(
    connection: socket.socket,
) -> tuple[dict[str, Any], list[int]]:  # ({}, []) when the other side has gone
    """Receive a message and the files that came with it."""
    line, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while line and not line.endswith(b"\n"):
        more = connection.recv(1 << 16)
        line = line + more if more else b""
    return (json.loads(line) if line else {}), descriptors


@dataclass(frozen=True)
class ForkRequest:
    """What a forked copy has to become."""

    connection: socket.socket  # to the owner; its end is the kernel's end
    descriptors: list[int]  # standard input, output, error
    arguments: list[str]  # of ipykernel
    environment: dict[str, str]
    folder: str  # working folder
    umask: int
    processors: list[int]
    limits: dict[str, list[int]]  # number of a resource -> soft and hard limit


def fork_request(
    arguments: list[str],  # of ipykernel
    environment: Mapping[str, str],
    folder: str,  # working folder
) -> dict[str, Any]:
    """The request for a kernel that is like this process."""
    umask = os.umask(0)
    os.umask(umask)
    numbers = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
    return {
        "do": "kernel",
        "arguments": arguments,
        "environment": dict(environment),
        "folder": folder,
        "umask": umask,
        "processors": sorted(os.sched_getaffinity(0)),
        "limits": {str(number): resource.getrlimit(number) for number in sorted(numbers)},
    }


def kill_group(
    pid: int,  # of the process that leads the group
) -> None:
    """End a group of processes at once, if it is still there."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _descendants(process: Any) -> list[Any]:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@dataclass
class _Kernels:
    """The kernels of a server: forked, watched, and cleared up after."""

    listener: socket.socket
    kernels: dict[int, socket.socket] = field(default_factory=dict)  # process id -> connection to the owner
    holds: set[socket.socket] = field(default_factory=set)
    watched: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def _fork(self, connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> ForkRequest | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy and Polars have threads; they see to forks
            pid = os.fork()
        if pid == 0:
            for other in (self.listener, *self.holds, *self.kernels.values()):
                other.close()
            self.watched.close()
            del request["do"]
            return ForkRequest(connection, descriptors, **request)
        for descriptor in descriptors:
            os.close(descriptor)
        self.kernels[pid] = connection
        self._watch(connection, lambda _: kill_group(pid))  # the owner has gone
        ended = os.pidfd_open(pid)
        self.watched.register(ended, selectors.EVENT_READ, lambda: self._ended(pid, ended))
        with suppress(OSError):
            send(connection, {"pid": pid})
        return None

    def _watch(self, connection: socket.socket, gone: Callable[[socket.socket], None]) -> None:
        """Call `gone` when the other side of a connection has closed."""

        def closed() -> None:
            if connection.fileno() < 0:
                return  # the kernel has ended at the same moment, and that was seen first
            self.watched.unregister(connection)
            connection.close()
            gone(connection)

        self.watched.register(connection, selectors.EVENT_READ, closed)

    def _ended(self, pid: int, ended: int) -> None:
        """Clear up after a kernel and tell its owner."""
        self.watched.unregister(ended)
        os.close(ended)
        kill_group(pid)  # what its cells have left running; before its number can be given to another process
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection = self.kernels.pop(pid)
        self._end_strays()
        if connection.fileno() >= 0:
            self.watched.unregister(connection)
            with suppress(OSError):
                send(connection, {"exit": code})
            connection.close()

    def _end_strays(self) -> None:
        """End what the system has handed to this server: children of kernels that have died."""
        import psutil

        for stray in psutil.Process().children():
            if stray.pid not in self.kernels:
                for process in (stray, *_descendants(stray)):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                with suppress(ChildProcessError):
                    os.waitpid(stray.pid, 0)


@dataclass
class ForkServer(_Kernels):
    """Forks kernels, tells their owners when they end, and ends itself when nobody needs it."""

    key: str = ""
    keep: float = 0.0  # seconds to stay when nobody needs it
    until: float = 0.0  # the moment on the monotonic clock at which it goes, unless it is needed
    started: float = field(default_factory=time.time)

    def serve(self) -> ForkRequest | None:  # None when nobody needs the server any more
        """Answer requests; in a copy, return what it has to become."""
        self.watched.register(self.listener, selectors.EVENT_READ, self._accept)
        self.until = time.monotonic() + 15  # whoever has started it will connect by then
        while self.kernels or self.holds or time.monotonic() < self.until:
            for key, _ in self.watched.select(timeout=1.0):
                if birth := key.data():
                    return birth
            if self.kernels or self.holds:
                self.until = time.monotonic() + self.keep
        return None

    def _accept(self) -> ForkRequest | None:
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        try:
            request, descriptors = receive(connection)
            return self._answer(connection, request, descriptors)
        except (OSError, ValueError):  # gone before it was answered, or not one of ours
            connection.close()
        return None

    def _answer(self, connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> ForkRequest | None:
        match request.get("do"):
            case "kernel":
                return self._fork(connection, request, descriptors)
            case "hold":
                self.keep = max(self.keep, request["keep"])
                self._watch(connection, self.holds.discard)
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

    def _stop(self) -> None:
        """Take no more requests; kernels that live go on to their own end."""
        self.watched.unregister(self.listener)
        self.listener.close()
        self.keep = self.until = 0.0
        for connection in self.holds:
            self.watched.unregister(connection)
            connection.close()
        self.holds.clear()

    def status(self) -> dict[str, Any]:
        """What `mlkit warm status` tells."""
        import psutil

        return {
            "key": self.key,
            "pid": os.getpid(),
            "started": self.started,  # seconds since 1970
            "kernels": sorted(self.kernels),  # process ids
            "holds": len(self.holds),
            "keep": self.keep,  # seconds
            "memory": psutil.Process().memory_info().rss,  # bytes
        }


PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


KERNEL_MODULES = (  # what ipykernel imports while it starts
    *("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipykernel.debugger"),
    *("IPython.core.magics", "IPython.core.debugger", "IPython.core.completerlib", "IPython.core.oinspect"),
    *("IPython.extensions.storemagic", "sqlite3", "tornado.platform.asyncio", "psutil"),
)


def run_server(
    path: str,  # of the socket
    preload: str,  # modules, separated by commas
    import_path: list[str],  # sys.path of a kernel
) -> None:
    """A warm server's whole life; in a copy, the life of a kernel."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        adopt_orphans()
        modules = [module.strip() for module in preload.split(",")]
        kit = kit_files() if any(module.partition(".")[0] == "mlkit" for module in modules) else {}
        for module in (*KERNEL_MODULES, *modules):
            try:
                importlib.import_module(module)
            except ImportError as error:
                print(f"{module} is not preloaded: {error}", flush=True)
        changeable = changeable_modules()
        gc.collect()
        gc.freeze()
        birth = ForkServer(listener, key=Path(path).stem).serve()
        if birth is None:
            for left in (Path(path), Path(path).with_suffix(".log")):
                left.unlink(missing_ok=True)
            return
    exec_kernel(birth, import_path, changeable, kit)


def exec_kernel(
    birth: ForkRequest,
    import_path: list[str],  # sys.path of a kernel
    changeable: list[str],  # names of modules to import anew
    kit: dict[str, str],  # the kit's files as they were when the server imported them; {} if it did not
) -> None:
    """Turn this copy of the server into a kernel, run it to its end."""
    os.setsid()
    adopt_orphans()
    for target, descriptor in enumerate(birth.descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(birth.environment)
    time.tzset()
    os.umask(birth.umask)
    os.sched_setaffinity(0, birth.processors)
    for number, limits in birth.limits.items():
        with suppress(ValueError, OSError):  # a hard limit that cannot be raised
            resource.setrlimit(int(number), limits)
    os.chdir(birth.folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_owner, args=(birth.connection,), daemon=True, name="owner").start()
    sys.path[:] = import_path
    sys.argv = ["ipykernel_launcher", *birth.arguments]
    tempfile.tempdir = None
    reload_changed(changeable, kit)
    reseed()
    choose_backend()
    read_storage_options()
    run_kernel(birth.arguments)


def _end_with_owner(connection: socket.socket) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    kill_group(os.getpid())


def run_kernel(
    arguments: list[str],  # of ipykernel
) -> None:
    """ipykernel in this process; its own watch over the parent process is off."""
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=[*arguments, "--IPKernelApp.parent_handle=1"])
    leave()


def leave() -> NoReturn:
    """End this process when its threads and exit handlers have; taking apart what was imported takes half a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
    os._exit(0)


def changeable_modules() -> list[str]:  # names
    """Imported modules that lie outside the installed environment, and the kit's own."""
    installed = (sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages())
    files = {name: vars(module).get("__file__") for name, module in list(sys.modules.items())}
    return [
        name
        for name, file in files.items()
        if name.partition(".")[0] == "mlkit" or (file and name != "__main__" and not file.startswith(installed))
    ]


def kit_files() -> dict[str, str]:  # name -> digest of the content
    """The kit's modules as they lie on the disk now; none while one of them is being replaced."""
    with suppress(OSError):
        return {str(path.relative_to(KIT)): _digest(path) for path in KIT.rglob("*.py")}
    return {}


def _finds_kit() -> bool:
    """Whether `import mlkit` would find this kit, here and now."""
    found = PathFinder.find_spec("mlkit", [os.getcwd()]) or importlib.util.find_spec("mlkit")
    return found is not None and found.origin == mlkit.__file__


def reload_changed(
    changeable: list[str],  # names of modules
    kit: dict[str, str],  # the kit's files as they were when they were imported; {} to forget them, too
) -> None:
    """Have modules imported anew when they are next asked for; the kit's own only if they have changed."""
    ours = {name: sys.modules[name] for name in changeable if name.partition(".")[0] == "mlkit"}
    for name in changeable:
        sys.modules.pop(name, None)
    if kit and kit == kit_files() and _finds_kit():
        sys.modules.update(ours)


def reseed() -> None:
    """Give NumPy's global generator a seed of its own; Python has already done so for `random`."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def choose_backend() -> None:
    """Let figures show as in any kernel; a configuration in this folder that the server has not seen is read."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    if matplotlib := sys.modules.get("matplotlib"):
        if "MATPLOTLIBRC" in os.environ or os.path.exists("matplotlibrc"):
            matplotlib.rcParams.update(matplotlib.rc_params())
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]


def read_storage_options() -> None:
    """Read the user's files of options for remote storage as they are now."""
    if config := sys.modules.get("fsspec.config"):
        config.conf.clear()
        with suppress(Exception):  # a file that is broken now will be told of by whoever needs it
            config.set_conf_files(config.conf_dir, config.conf)
        config.set_conf_env(config.conf)


SERVER_CODE = (
    "import sys; path = sys.path[1:]; sys.path[:] = [*path, {package!r}]; "
    "from mlkit.jobs.kernels import run_server; run_server({socket!r}, {preload!r}, path)"
)


@dataclass(frozen=True)
class WarmServer:
    """A warm server as its users see it, whether it runs or not."""

    key: str
    preload: str = ""  # modules, separated by commas
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def fitting(cls, environment: Mapping[str, str]) -> "WarmServer":
        """The server whose kernels are like an ordinary one in this environment."""
        environment = kernel_environment(environment)
        preload = load_settings().kernels.preload
        return cls(server_key(environment, preload), preload, environment)

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return servers_folder() / f"{self.key}.sock"

    @property
    def log_path(self) -> Path:
        """What it has said."""
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
        """Whether it takes requests, or will once it has imported."""
        if connection := self._connect():
            connection.close()
        return connection is not None

    def ask(
        self,
        do: str,  # "status" or "stop"
    ) -> dict[str, Any]:  # {} when it does not run
        """Ask the server one thing."""
        connection = self._connect()
        if connection is None:
            return {}
        with connection, suppress(OSError):
            send(connection, {"do": do})
            return receive(connection)[0]
        return {}

    def hold(
        self,
        keep: float = 0.0,  # seconds for which it stays after the last use
    ) -> socket.socket:  # closing it, or dying, lets go
        """Make the server run, wait until it is ready, and keep it; raises MlkitError when it cannot start."""
        for _ in range(3):
            self._start()
            if connection := self._connect():
                with suppress(OSError):
                    send(connection, {"do": "hold", "keep": keep})
                    if receive(connection)[0]:
                        return connection
                connection.close()  # it ended as we came
        raise MlkitError(f"The warm server did not start; {self.log_path} says why: {_last_line(self.log_path)}")

    def _start(self) -> None:
        """Start the server's process unless it runs; returns when it listens."""
        with (servers_folder() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.is_running():
                return
            _remove_leftovers()
            code = SERVER_CODE.format(package=str(KIT.parent), socket=str(self.socket_path), preload=self.preload)
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
        arguments: list[str],  # of ipykernel
        environment: Mapping[str, str],
        folder: str | Path,  # working folder
        descriptors: tuple[int, int, int] = (0, 1, 2),  # standard input, output, error
    ) -> "ForkedKernel":
        """A kernel forked from the server; raises MlkitError when the server does not answer."""
        if connection := self._connect():
            with suppress(OSError):
                request = fork_request(arguments, kernel_environment(environment), os.fspath(folder))
                send(connection, request, descriptors)
                if answer := receive(connection)[0]:
                    return ForkedKernel(connection, answer["pid"])
            connection.close()
        raise MlkitError("The warm server does not answer.")


def _remove_leftovers() -> None:
    """Remove what servers have left that were killed."""
    for path in servers_folder().glob("*.sock"):
        if not WarmServer(path.stem).is_running():
            path.unlink(missing_ok=True)
            path.with_suffix(".log").unlink(missing_ok=True)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "nothing"


def running_servers() -> list[dict[str, Any]]:  # what each says of itself
    """The warm servers of this user that are running."""
    found = [WarmServer(path.stem).ask("status") for path in sorted(servers_folder().glob("*.sock"))]
    return [status for status in found if status]


class ForkedKernel:
    """A forked kernel, with the part of `subprocess.Popen` that Jupyter uses."""

    stdin = stdout = stderr = None

    def __init__(
        self,
        connection: socket.socket,  # whose end is the kernel's end
        pid: int,
    ):
        self.connection, self.pid = connection, pid
        self.returncode: int | None = None  # negative: the number of the signal that ended it

    def poll(self) -> int | None:  # None while it lives
        """How it ended."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        if self._read(timeout) is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return self.returncode

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], timeout)[0]:
            try:
                message, _ = receive(self.connection)
            except OSError:
                message = {}
            self.returncode = message.get("exit", -signal.SIGKILL)
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel alone."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


_holds: dict[str, socket.socket] = {}  # of this process, until it ends
_holding = threading.Lock()


def hold_server(
    environment: Mapping[str, str],
) -> WarmServer:
    """The fitting server, running, for as long as this process lives; raises MlkitError when it cannot run."""
    if not CAN_FORK:
        raise MlkitError(f"Warm kernels need Linux; this is {platform.system()}.")
    server = WarmServer.fitting(environment)
    with _holding:
        held = _holds.get(server.key)
        if held is None or select.select([held], [], [], 0)[0]:  # never had, or ended since
            _holds[server.key] = server.hold()
    return server


def is_warm(
    environment: Mapping[str, str],
) -> bool:
    """Whether a fitting server runs already."""
    with suppress(MlkitError, OSError):
        return CAN_FORK and WarmServer.fitting(environment).is_running()
    return False


def release_servers() -> None:
    """Let go of all servers this process holds; kernels that live go on."""
    with _holding:
        for held in _holds.values():
            held.close()
        _holds.clear()


class WarmProvisioner(LocalProvisioner):
    """Starts kernels by forking them from a warm server."""

    sockets: str | None = None  # folder of the kernel's sockets

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Prepare the launch: sockets in a private folder in place of ports."""
        manager = self.parent
        if manager and manager.transport == "tcp" and hasattr(socket, "AF_UNIX"):
            self.sockets = tempfile.mkdtemp(prefix="mlkit-")
            manager.transport, manager.ip, manager.cache_ports = "ipc", f"{self.sockets}/kernel", False
        return await super().pre_launch(**kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Fork the kernel, or start an ordinary one."""
        arguments, wanted = cmd[cmd.index("-f") :], kwargs.pop("warm", True)
        loop = asyncio.get_running_loop()
        try:
            if wanted:
                self.process = await loop.run_in_executor(None, fork_kernel, arguments, kwargs)
        except (MlkitError, OSError) as error:
            self.log.warning("The kernel starts cold: %s", error)
        if self.process is None:
            return await super().launch_kernel([sys.executable, "-m", "ipykernel_launcher", *arguments], **kwargs)
        self.pid = self.pgid = self.process.pid
        self.cwd = kwargs.get("cwd") or os.getcwd()
        return self.connection_info

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the sockets unless the kernel comes back."""
        await super().cleanup(restart=restart)
        if self.sockets and not restart:
            shutil.rmtree(self.sockets, ignore_errors=True)


def fork_kernel(
    arguments: list[str],  # of ipykernel
    launch: Mapping[str, Any],  # keyword arguments of a launch: env, cwd, stdout, stderr
) -> ForkedKernel:
    """A kernel from the fitting server, which is started if need be; raises MlkitError."""
    environment, folder = launch.get("env") or os.environ, launch.get("cwd") or os.getcwd()
    with open(os.devnull, "rb") as nothing:
        streams = (nothing, launch.get("stdout") or 1, launch.get("stderr") or 2)
        descriptors = tuple(stream if isinstance(stream, int) else stream.fileno() for stream in streams)
        if min(descriptors) < 0:
            raise MlkitError("standard output into a pipe is not supported")
        try:
            return hold_server(environment).start_kernel(arguments, environment, folder, descriptors)
        except MlkitError:  # it may just have died; the next one is a new one
            release_servers()
            return hold_server(environment).start_kernel(arguments, environment, folder, descriptors)


def main() -> None:
    """The command of the kernelspec: a warm kernel, or this process as an ordinary one."""
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
    """The installed kernelspecs, and the kit's own where it runs from a checkout."""
    manager = KernelSpecManager()
    manager.kernel_dirs.append(str(KIT.parent / "jupyter" / "kernels"))
    return manager
