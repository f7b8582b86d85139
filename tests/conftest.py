"""Fixtures: projects in temporary folders, and the command line as a process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from mlkit.data import Dataset

# The longest files start first, so that none is alone at the end; the two that start Ray stay apart.
LONG = ["ray", "sweep", "distributed", "search", "version_swaps", "resume", "convert", "gate", "ray_serve", "faults"]
LONG += ["trainer", "several_labels", "end_to_end", "store", "batch_predict", "transfer", "parity", "server"]
REPOSITORY = Path(__file__).parent.parent
ADULT = REPOSITORY.parent / "shared" / "data" / "adult.csv"


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C; some tests are about Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the longest files first, the others in their order."""
    rank = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine reaches a test."""
    for name in [name for name in os.environ if name.startswith("MLKIT_") or name == "COLUMNS"]:
        monkeypatch.delenv(name)


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Poll until something is true; fail when it does not become so in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def free_port() -> int:
    """A port at which nobody listens, and that the system gives to nobody meanwhile."""
    from mlkit.jobs.cluster import free_ports

    return free_ports(1)[0]


class Crowd:
    """Threads that ask until the block is left, each in one of the ways: a way asks once before each `yield`."""

    def __init__(self, *ways: Callable[[], Iterator[None]], pause: float = 0):
        self.failures: list[Any] = []
        self._left, self._pause = threading.Event(), pause  # seconds from an answer to the next request
        self._threads = [threading.Thread(target=self._ask, args=(way,)) for way in ways]

    def _ask(self, way: Callable[[], Iterator[None]]) -> None:
        try:
            for _ in way():
                if self._left.wait(self._pause):
                    return
        except Exception as error:  # a request that failed
            self.failures.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join()


class MemoryTransport(asyncio.Transport):
    """The server's end of a connection, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


# Code that leaves a daemon behind; its process id can then be read from `reader`.
START_DAEMON = """
import os
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(writer, str(os.getpid()).encode())
        os.execvp("sleep", ["sleep", "600"])
    os._exit(0)
"""

EXECUTE_JOBS = {"run", "resume", "reproduce", "evaluate", "compress", "gate"}  # commands
RUNTIME_FOLDER = os.environ.get("XDG_RUNTIME_DIR")


HELD: dict[str, object] = {}  # connections to warm servers, by their keys


def hold_server(**environment: str) -> None:
    """Keep a warm server for the session, as `mlkit kernels start` does: it imports TensorFlow once."""
    from mlkit.jobs import kernels

    server = kernels.ForkServerClient.for_environment(os.environ | environment)
    if kernels.CAN_FORK and not (server.key in HELD and server.is_running()):
        HELD[server.key] = server.hold()


def run_cli(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`mlkit ...` in a process of its own."""
    command = [sys.executable, "-m", "mlkit", *map(str, arguments)]
    variables = os.environ | environment
    shared = variables.get("XDG_RUNTIME_DIR") == RUNTIME_FOLDER
    if EXECUTE_JOBS & set(arguments) and shared and "MLKIT_KERNELS_PRELOAD" not in variables:
        hold_server()
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty folder to work in: what is archived goes to its runs/."""
    return tmp_path


@pytest.fixture
def cli(project: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Type a command in the project."""
    return lambda *arguments, **environment: run_cli(*arguments, folder=project, **environment)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A project in which the digits have been trained once for all workers, with the record of that run."""
    from mlkit._files import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (record := folder / "record.json").exists():
            result = run_cli("run", "train", "-p", "epochs=12", "--json", folder=folder)
            assert result.returncode == 0, result.stderr
            record.write_text(result.stdout)
        return folder, json.loads(record.read_text())


@pytest.fixture(scope="session")
def digits() -> "Dataset":
    """Images of handwritten digits; nobody changes them."""
    from mlkit.data import load_dataset

    return load_dataset("digits")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 256 KB; needs the right to mount."""
    monkeypatch.chdir(tmp_path)  # away from the repository, whose uncommitted changes a run would keep
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def mlkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Type a command in this process: the same entry point, without the start of another Python."""
    from mlkit.cli.main import main

    def type_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return ended.value.code or 0, output.out, " ".join(output.err.split())

    return type_command
