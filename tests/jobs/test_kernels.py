"""Warm kernels as real processes: lifetime, what a kernel inherits, and orphan processes."""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from nbformat.v4 import new_code_cell, new_notebook

from mlkit.errors import MlkitError
from mlkit.jobs import kernels
from mlkit.jobs.kernels import (
    ForkServerClient,
    kernel_environment,
    kernel_specs,
    running_servers,
    server_key,
    servers_folder,
)
from tests.conftest import START_DAEMON, run_cli, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not kernels.CAN_FORK, reason="warm kernels need Linux")]


def gone(*pids: int) -> bool:
    """Whether processes have ended."""
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    return all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive)


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Private folder of the test's warm servers, which preload little; none may be left running."""
    folder = Path(tempfile.mkdtemp(prefix="mlkit-test-"))  # short: a socket's path may have 107 characters
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy")
    yield folder
    kernels.release_servers()
    try:
        wait_until(lambda: not running_servers(), 20)
    finally:
        for server in running_servers():
            os.kill(server["pid"], signal.SIGKILL)
        shutil.rmtree(folder)


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[KernelManager, BlockingKernelClient]]]:
    """Function that starts a kernel; all kernels end with the test."""
    managers = []

    def start_kernel(**launch: Any) -> tuple[KernelManager, BlockingKernelClient]:
        manager = KernelManager(kernel_name="mlkit", kernel_spec_manager=kernel_specs())
        manager.start_kernel(**launch)
        managers.append(manager)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=180)
        return manager, client

    yield start_kernel
    for manager in managers:
        manager.shutdown_kernel(now=True)


def execute(client: BlockingKernelClient, code: str) -> str:
    """Execute code in a kernel and return what it prints."""
    texts = []

    def hook(message: dict) -> None:
        content = message["content"]
        texts.append(content.get("text") or "\n".join(content.get("traceback", [])))

    client.execute_interactive(textwrap.dedent(code), output_hook=hook, timeout=60)
    return "".join(texts).strip()


def is_warm(client: BlockingKernelClient) -> bool:
    """Whether numpy was imported before any cell was executed."""
    return execute(client, "import sys; print('numpy' in sys.modules)") == "True"


def test_a_kernel_inherits_from_its_owner(start: Callable, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        _, client = start(cwd=str(tmp_path), env=os.environ | {"TZ": "Asia/Tokyo", "COLOR": "blue"})
    finally:
        os.umask(mask)
    output = execute(
        client,
        """
        import json, os, resource, sys, time
        mask = os.umask(0)
        print(json.dumps([os.getcwd(), os.environ["COLOR"], time.tzname[0], mask, os.getsid(0) == os.getpid(),
                          os.getpgrp() == os.getpid(), sorted(os.sched_getaffinity(0)), sys.argv[0],
                          resource.getrlimit(resource.RLIMIT_NOFILE)[0], sys.stdin.isatty()]))
        """,
    )
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    owner = [str(tmp_path), "blue", "JST", 0o027, True, True, sorted(os.sched_getaffinity(0))]
    assert json.loads(output) == [*owner, "ipykernel_launcher", limit, False]


def test_a_kernel_imports_from_where_an_ordinary_one_does(start: Callable, tmp_path: Path) -> None:
    ordinary = KernelManager(kernel_name="python3")
    ordinary.start_kernel(cwd=str(tmp_path))
    client = ordinary.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    question = "import sys, json; print(json.dumps(sys.path))"
    expected = execute(client, question)
    ordinary.shutdown_kernel(now=True)
    assert execute(start(cwd=str(tmp_path))[1], question) == expected


def test_variables_read_at_import_choose_another_server(start: Callable) -> None:
    start()
    _, other = start(env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"})
    start(env=os.environ | {"TF_NUM_INTRAOP_THREADS": "1"})
    assert sorted(len(server["kernels"]) for server in running_servers()) == [1, 2]
    assert execute(other, "import os; print(os.environ['OMP_NUM_THREADS'])") == "1"


def test_code_is_never_stale(start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "pricing.py"
    module.write_text("price = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy,pricing")
    assert execute(start()[1], "import pricing; print(pricing.price)") == "1"
    module.write_text("price = 22")
    _, client = start()
    is_ours = "name.split('.')[0] in ('pricing', 'mlkit')"
    assert execute(client, f"import sys; print([name for name in sys.modules if {is_ours}])") == "[]"
    assert execute(client, "import pricing; print(pricing.price)") == "22"
    assert len(running_servers()) == 1


@pytest.fixture
def kit_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the kit that a test may change."""
    shutil.copytree(kernels.PACKAGE_FOLDER, tmp_path / "kit" / "mlkit", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kit" / "mlkit"


KIT_KERNEL = """
import os, sys
from pathlib import Path
from mlkit.jobs import kernels
from jupyter_client import KernelManager

def run_in_kernel(code):
    texts = []
    manager = KernelManager(kernel_name="mlkit", kernel_spec_manager=kernels.kernel_specs())
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    client.execute_interactive(code, output_hook=lambda message: texts.append(message["content"].get("text", "")))
    manager.shutdown_kernel()
    return "".join(texts).strip()

is_loaded = "import sys; print('mlkit.config' in sys.modules)"
outputs = [run_in_kernel(is_loaded)]
config = kernels.PACKAGE_FOLDER / "config.py"
config.write_text(config.read_text() + "\\nMARK = 'changed'\\n")
outputs += [run_in_kernel(is_loaded), run_in_kernel("from mlkit.config import MARK; print(MARK)")]
print(outputs, len(kernels.running_servers()))
"""


def test_the_kit_is_imported_already_unless_it_has_changed(kit_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(kernels.PACKAGE_FOLDER.parent / "jupyter", kit_copy.parent / "jupyter")
    monkeypatch.setenv("PYTHONPATH", str(kit_copy.parent))
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "mlkit.runs")
    result = subprocess.run([sys.executable, "-c", KIT_KERNEL], cwd="/", capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['True', 'False', 'changed'] 1", result.stderr


def test_newly_installed_packages_mean_a_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ForkServerClient.for_environment(os.environ).key
    site_packages = Path(nbformat.__file__).parent.parent
    marker = Path(tempfile.mkdtemp(dir=site_packages))
    marker.rmdir()
    assert ForkServerClient.for_environment(os.environ).key != before


def test_many_clients_start_the_same_server_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        holds = list(pool.map(lambda _: ForkServerClient.for_environment(os.environ).hold(), range(8)))
    (server,) = running_servers()
    assert server["holds"] == 8
    for hold in holds:
        hold.close()
    wait_until(lambda: gone(server["pid"]))
    assert not list(servers_folder().glob("*.sock"))


def test_restart_and_interrupt(start: Callable) -> None:
    manager, client = start()
    first = execute(client, "import os; value = 1; print(os.getpid())")
    manager.restart_kernel()
    client.wait_for_ready(timeout=60)
    assert execute(client, "print('value' in globals(), os.getpid() if 'os' in globals() else '')") == "False"
    assert gone(int(first))
    client.execute("import time; print('begun', flush=True); time.sleep(600)")
    while client.get_iopub_msg(timeout=30)["content"].get("text") != "begun\n":
        pass

    def interrupted() -> dict | None:
        manager.interrupt_kernel()
        try:
            return client.get_shell_msg(timeout=2)["content"]
        except Empty:
            return None

    assert wait_until(interrupted)["ename"] == "KeyboardInterrupt"


def test_exit_handlers_and_threads_of_a_kernel_complete(start: Callable, tmp_path: Path) -> None:
    manager, client = start(cwd=str(tmp_path))
    code = """
    import atexit, concurrent.futures, threading, time
    atexit.register(lambda: open("handler", "w").write("done"))
    def write():
        time.sleep(1)
        open("thread", "w").write("done")
    threading.Thread(target=write).start()
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(lambda: (time.sleep(1), open("pool", "w").write("done")))
    """
    assert execute(client, code) == ""
    manager.shutdown_kernel()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["handler", "pool", "thread"]


OWNER = """
import json, os, sys, time
from jupyter_client import KernelManager
from mlkit.jobs.kernels import kernel_specs, running_servers
manager = KernelManager(kernel_name="mlkit", kernel_spec_manager=kernel_specs())
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
texts = []
code = '''
import os, subprocess
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), child.pid)
'''
client.execute_interactive(code, output_hook=lambda message: texts.append(message["content"].get("text", "")))
print(*"".join(texts).split(), running_servers()[0]["pid"], flush=True)
time.sleep(600)
"""


def test_nothing_outlives_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 3
    assert not any(gone(pid) for pid in pids)
    owner.kill()
    owner.wait()
    wait_until(lambda: gone(*pids), 20)
    assert not list(servers_folder().glob("*.sock"))


def test_a_busy_kernel_that_holds_the_interpreter_ends_with_its_owner(start: Callable) -> None:
    manager, client = start()
    client.execute("import numpy; numpy.linalg.svd(numpy.random.rand(6000, 6000))")
    pid = manager.provisioner.pid
    wait_until(lambda: psutil.Process(pid).cpu_times().user > 0.3)
    manager.provisioner.process.connection.shutdown(
        socket.SHUT_RDWR
    )  # as the operating system does when the owner is killed
    wait_until(lambda: gone(pid), 20)


def test_without_fork_an_ordinary_kernel_starts_with_a_warning(
    start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "CAN_FORK", False)
    with caplog.at_level(logging.WARNING):
        manager, client = start()
    assert not is_warm(client)
    assert manager.transport == "ipc"
    assert "starts cold: Warm kernels need Linux" in caplog.text


def test_a_folder_that_others_can_enter_is_rejected(private: Path) -> None:
    servers_folder().chmod(0o777)
    with pytest.raises(MlkitError, match="should belong to you alone"):
        ForkServerClient.for_environment(os.environ).hold()
    (private / f"mlkit-{os.getuid()}").chmod(0o700)


def test_a_server_that_cannot_start_reports_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SERVER_CODE", "raise SystemExit('no luck')")
    with pytest.raises(MlkitError, match="no luck"):
        ForkServerClient.for_environment(os.environ).hold()


@pytest.fixture
def connection(tmp_path: Path) -> Path:
    """Connection file of a program that starts kernels by the kernelspec's command alone."""
    from jupyter_client.connect import write_connection_file

    path, _ = write_connection_file(str(tmp_path / "kernel.json"), transport="ipc", ip=f"{tmp_path}/socket")
    return Path(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_kernelspecs_command_line_gives_a_warm_kernel(number: signal.Signals, connection: Path) -> None:
    argv = json.loads((Path(kernel_specs().get_kernel_spec("mlkit").resource_dir) / "kernel.json").read_text())["argv"]
    command = [sys.executable, *(word.replace("{connection_file}", str(connection)) for word in argv[1:])]
    process = subprocess.Popen(command)
    wait_until((connection.parent / "socket-5").exists)  # the kernel listens
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    assert is_warm(client)
    kernel = int(execute(client, "import os; print(os.getpid())"))
    assert kernel != process.pid
    process.send_signal(number)
    process.wait(timeout=30)
    wait_until(lambda: gone(kernel), 20)
    client.stop_channels()


def test_plain_papermill_executes_in_a_warm_kernel(tmp_path: Path) -> None:
    cells = [new_code_cell("import sys\nassert 'numpy' in sys.modules")]
    nbformat.write(
        new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "mlkit", "display_name": "mlkit", "language": "python"}}
        ),
        tmp_path / "in.ipynb",
    )
    spec_folder = tmp_path / "share" / "kernels"
    shutil.copytree(kernel_specs().get_kernel_spec("mlkit").resource_dir, spec_folder / "mlkit")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    environment = os.environ | {"JUPYTER_PATH": str(tmp_path / "share")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def job(project: Path) -> str:
    """Job that logs whether its kernel was warm."""
    code = "import sys\nwarm = 'numpy' in sys.modules\nfrom mlkit.runs import Run\n"
    code += "Run.current().log_metrics({'warm': warm})"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), project / "probe.ipynb")
    return "probe.ipynb"


def test_a_pool_stays_between_commands_and_ends_when_idle(project: Path, job: str) -> None:
    def probe() -> float:
        result = run_cli("run", job, "--json", folder=project)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["metrics"]["warm"]

    assert probe() == 0.0
    assert "No kernels are warm" in run_cli("kernels", "status", folder=project).stdout
    started = json.loads(run_cli("kernels", "start", "--idle-timeout", "600", "--json", folder=project).stdout)
    assert probe() == 1.0
    assert [server["pid"] for server in json.loads(run_cli("kernels", "status", "--json", folder=project).stdout)] == [
        started["pid"]
    ]
    assert "600" in json.dumps(started) or "10 min" in run_cli("kernels", "status", folder=project).stdout
    assert "Stopped 1 pool of warm kernels." in run_cli("kernels", "stop", folder=project).stdout
    wait_until(lambda: gone(started["pid"]))
    assert probe() == 0.0
    brief = json.loads(run_cli("kernels", "start", "--idle-timeout", "1", "--json", folder=project).stdout)
    wait_until(lambda: gone(brief["pid"]), 20)
    assert run_cli("kernels", "start", "--idle-timeout", "0", folder=project).returncode == 2


def test_a_pool_that_was_killed_is_started_again(project: Path, job: str) -> None:
    first = json.loads(run_cli("kernels", "start", "--json", folder=project).stdout)
    os.kill(first["pid"], signal.SIGKILL)
    assert run_cli("run", job, "--json", folder=project).returncode == 0
    second = json.loads(run_cli("kernels", "start", "--json", folder=project).stdout)
    assert second["pid"] != first["pid"]
    run_cli("kernels", "stop", folder=project)


def test_stopping_a_pool_leaves_its_kernels_running(start: Callable) -> None:
    _, client = start()
    (server,) = running_servers()
    ForkServerClient(server["key"]).request("stop")
    assert not ForkServerClient(server["key"]).is_running()
    assert execute(client, "print('running')") == "running"
    start()
    assert [other["pid"] for other in running_servers()] != [server["pid"]]


def test_the_key_of_a_server_depends_on_variables_read_at_import() -> None:
    environment = kernel_environment(os.environ)
    keys = {
        "unchanged": server_key(environment, "tensorflow"),
        "more threads": server_key(environment | {"TF_NUM_INTRAOP_THREADS": "8"}, "tensorflow"),
        "another folder in PATH": server_key(environment | {"PATH": "/opt/bin"}, "tensorflow"),
        "without oneDNN": server_key(environment | {"TF_ENABLE_ONEDNN_OPTS": "0"}, "tensorflow"),
        "one thread for OpenMP": server_key(environment | {"OMP_NUM_THREADS": "1"}, "tensorflow"),
        "another Keras backend": server_key(environment | {"KERAS_BACKEND": "jax"}, "tensorflow"),
    }
    same = [name for name, key in keys.items() if key == keys["unchanged"]]
    assert same == ["unchanged", "more threads", "another folder in PATH"]
    assert len(set(keys.values())) == 4


def test_a_message_is_one_line_with_file_descriptors() -> None:
    sender, receiver = socket.socketpair()
    with open(os.devnull) as file:
        kernels.send(sender, {"cells": ["x" * 100_000]}, (file.fileno(),))
    message, descriptors = kernels.receive(receiver)
    sender.close()
    assert message == {"cells": ["x" * 100_000]}
    assert len(descriptors) == 1
    assert kernels.receive(receiver) == ({}, [])
    os.close(descriptors[0])
    receiver.close()


@pytest.fixture
def tensorflow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that preload what the settings say."""
    monkeypatch.delenv("MLKIT_KERNELS_PRELOAD")


INSPECT = """
import os, numpy, random, tensorflow
from tensorflow.python.eager import context
print(context._context, os.getsid(0) == os.getpid(), os.getcwd(), os.environ["GREETING"])
print(numpy.random.rand(), random.random(), tensorflow.random.uniform(()).numpy())
"""
SUM_OF_ONES = "print(int(tensorflow.reduce_sum(tensorflow.ones((600, 600)) @ tensorflow.ones((600, 600)))))"
SUM_OF_RANGE = """
import polars
print(polars.DataFrame({'a': range(10**6)}).lazy().select(polars.sum('a')).collect().item())
"""


def test_kernels_of_a_tensorflow_server(tensorflow_server: None, start: Callable, tmp_path: Path) -> None:
    """The second kernel starts fast; neither shares runtime state or random numbers, and both compute on threads."""
    environments = [os.environ | {"GREETING": greeting} for greeting in ("hello", "hi")]
    pairs, seconds = [], []
    for environment in environments:
        begin = time.monotonic()
        pairs.append(start(cwd=str(tmp_path), env=environment))
        seconds.append(time.monotonic() - begin)
    assert seconds[1] < seconds[0]
    private = psutil.Process(pairs[1][0].provisioner.pid).memory_full_info().uss / 1e6
    assert private < 100  # MB that an idle kernel does not share with its server
    outputs = [execute(client, INSPECT).splitlines() for _, client in pairs]
    assert [lines[0] for lines in outputs] == [f"None True {tmp_path} {word}" for word in ("hello", "hi")]
    first, second = (lines[1].split() for lines in outputs)
    assert not [number for number in first if number in second]
    manager, client = pairs[0]
    assert execute(client, SUM_OF_ONES) == "216000000"
    assert execute(client, SUM_OF_RANGE) == "499999500000"
    assert manager.transport == "ipc"


def test_orphan_processes_end_with_their_kernel(start: Callable) -> None:
    """Also a daemon, which has left the process group, the session and its parent."""
    pairs = [start() for _ in range(2)]
    daemons = [int(execute(client, f"{START_DAEMON}print(os.read(reader, 20).decode())")) for _, client in pairs]
    pids = [manager.provisioner.pid for manager, _ in pairs]
    pairs[0][0].shutdown_kernel()
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: gone(*pids, *daemons))
    wait_until(lambda: not pairs[1][0].is_alive())  # the server informs the owner a moment later


def test_a_killed_server_leaves_its_kernels_and_is_replaced(start: Callable) -> None:
    manager, client = start()
    (server,) = [status for status in running_servers() if manager.provisioner.pid in status["kernels"]]
    os.kill(server["pid"], signal.SIGKILL)
    wait_until(lambda: gone(server["pid"]))
    assert execute(client, "print('still running')") == "still running"
    second, _ = start()
    (replacement,) = [status for status in running_servers() if second.provisioner.pid in status["kernels"]]
    assert replacement["pid"] != server["pid"]
