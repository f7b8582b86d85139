"""Warm kernels as processes: who lives, who dies with whom, and what a kernel inherits."""

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
from mlkit.jobs.kernels import WarmServer, kernel_specs, running_servers, servers_folder
from tests.conftest import run_cli, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not kernels.CAN_FORK, reason="warm kernels need Linux")]


def gone(*pids: int) -> bool:
    """Whether processes have ended."""
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    return all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive)


@pytest.fixture(autouse=True)
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Warm servers of this test alone, which preload little; none is left."""
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
    """Start kernels that end with the test."""
    managers = []

    def started(**launch: Any) -> tuple[KernelManager, BlockingKernelClient]:
        manager = KernelManager(kernel_name="mlkit", kernel_spec_manager=kernel_specs())
        manager.start_kernel(**launch)
        managers.append(manager)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        return manager, client

    yield started
    for manager in managers:
        manager.shutdown_kernel(now=True)


def ask(client: BlockingKernelClient, code: str) -> str:
    """What a kernel prints."""
    texts = []

    def hook(message: dict) -> None:
        content = message["content"]
        texts.append(content.get("text") or "\n".join(content.get("traceback", [])))

    client.execute_interactive(textwrap.dedent(code), output_hook=hook, timeout=60)
    return "".join(texts).strip()


def is_warm(client: BlockingKernelClient) -> bool:
    """Whether numpy was there before anybody imported it."""
    return ask(client, "import sys; print('numpy' in sys.modules)") == "True"


def test_a_kernel_is_like_its_owner(start: Callable, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        _, client = start(cwd=str(tmp_path), env=os.environ | {"TZ": "Asia/Tokyo", "COLOR": "blue"})
    finally:
        os.umask(mask)
    answer = ask(
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
    assert json.loads(answer) == [*owner, "ipykernel_launcher", limit, False]


def test_a_kernel_imports_from_where_an_ordinary_one_does(start: Callable, tmp_path: Path) -> None:
    ordinary = KernelManager(kernel_name="python3")
    ordinary.start_kernel(cwd=str(tmp_path))
    client = ordinary.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    question = "import sys, json; print(json.dumps(sys.path))"
    expected = ask(client, question)
    ordinary.shutdown_kernel(now=True)
    assert ask(start(cwd=str(tmp_path))[1], question) == expected


def test_variables_read_at_import_choose_another_server(start: Callable) -> None:
    start()
    _, other = start(env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"})
    start(env=os.environ | {"TF_NUM_INTRAOP_THREADS": "1"})
    assert sorted(len(server["kernels"]) for server in running_servers()) == [1, 2]
    assert ask(other, "import os; print(os.environ['OMP_NUM_THREADS'])") == "1"


def test_code_is_never_stale(start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "pricing.py"
    module.write_text("price = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy,pricing")
    assert ask(start()[1], "import pricing; print(pricing.price)") == "1"
    module.write_text("price = 22")
    _, client = start()
    assert (
        ask(client, "import sys; print([name for name in sys.modules if name.split('.')[0] in ('pricing', 'mlkit')])")
        == "[]"
    )
    assert ask(client, "import pricing; print(pricing.price)") == "22"
    assert len(running_servers()) == 1


@pytest.fixture
def own_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kit that a test may change, and the way to have kernels import it."""
    shutil.copytree(kernels.KIT, tmp_path / "kit" / "mlkit", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kit" / "mlkit"


KIT_KERNEL = """
import os, sys
from pathlib import Path
from mlkit import kernels
from jupyter_client import KernelManager

def ask(code):
    texts = []
    manager = KernelManager(kernel_name="mlkit", kernel_spec_manager=kernels.kernel_specs())
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    client.execute_interactive(code, output_hook=lambda message: texts.append(message["content"].get("text", "")))
    manager.shutdown_kernel()
    return "".join(texts).strip()

loaded = "import sys; print('mlkit.settings' in sys.modules)"
answers = [ask(loaded)]
settings = kernels.KIT / "settings.py"
settings.write_text(settings.read_text() + "\\nMARK = 'changed'\\n")
answers += [ask(loaded), ask("from mlkit.config import MARK; print(MARK)")]
print(answers, len(kernels.running_servers()))
"""


def test_the_kit_is_imported_already_unless_it_has_changed(own_kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(kernels.KIT.parent / "jupyter", own_kit.parent / "jupyter")
    monkeypatch.setenv("PYTHONPATH", str(own_kit.parent))
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "mlkit.runs")
    result = subprocess.run([sys.executable, "-c", KIT_KERNEL], cwd="/", capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['True', 'False', 'changed'] 1", result.stderr


def test_newly_installed_packages_mean_a_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    before = WarmServer.fitting(os.environ).key
    site_packages = Path(nbformat.__file__).parent.parent
    marker = Path(tempfile.mkdtemp(dir=site_packages))
    marker.rmdir()
    assert WarmServer.fitting(os.environ).key != before


def test_many_ask_for_the_same_server_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        holds = list(pool.map(lambda _: WarmServer.fitting(os.environ).hold(), range(8)))
    (server,) = running_servers()
    assert server["holds"] == 8
    for hold in holds:
        hold.close()
    wait_until(lambda: gone(server["pid"]))
    assert not list(servers_folder().glob("*.sock"))


def test_restart_and_interrupt(start: Callable) -> None:
    manager, client = start()
    first = ask(client, "import os; value = 1; print(os.getpid())")
    manager.restart_kernel()
    client.wait_for_ready(timeout=60)
    assert ask(client, "print('value' in globals(), os.getpid() if 'os' in globals() else '')") == "False"
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


def test_exit_handlers_and_threads_of_a_kernel_come_to_their_end(start: Callable, tmp_path: Path) -> None:
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
    assert ask(client, code) == ""
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


def test_without_fork_the_ordinary_kernel_starts_with_a_notice(
    start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "CAN_FORK", False)
    with caplog.at_level(logging.WARNING):
        manager, client = start()
    assert not is_warm(client)
    assert manager.transport == "ipc"
    assert "starts cold: Warm kernels need Linux" in caplog.text


def test_a_folder_others_can_enter_is_refused(private: Path) -> None:
    servers_folder().chmod(0o777)
    with pytest.raises(MlkitError, match="should belong to you alone"):
        WarmServer.fitting(os.environ).hold()
    (private / f"mlkit-{os.getuid()}").chmod(0o700)


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SERVER_CODE", "raise SystemExit('no luck')")
    with pytest.raises(MlkitError, match="no luck"):
        WarmServer.fitting(os.environ).hold()


@pytest.fixture
def connection(tmp_path: Path) -> Path:
    """A connection file, as a program writes it that starts kernels by the command line alone."""
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
    kernel = int(ask(client, "import os; print(os.getpid())"))
    assert kernel != process.pid
    process.send_signal(number)
    process.wait(timeout=30)
    wait_until(lambda: gone(kernel), 20)
    client.stop_channels()


def test_plain_papermill_executes_in_it(tmp_path: Path) -> None:
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
    """A job that records whether its kernel was warm."""
    code = "import sys\nwarm = 'numpy' in sys.modules\nfrom mlkit.runs import Run\n"
    code += "Run.current().log_metrics({'warm': warm})"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), project / "probe.ipynb")
    return "probe.ipynb"


def test_a_pool_stays_between_commands_and_goes_when_idle(project: Path, job: str) -> None:
    def probe() -> float:
        result = run_cli("run", job, "--json", folder=project)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["metrics"]["warm"]

    assert probe() == 0.0
    assert "No kernels are warm" in run_cli("warm", "status", folder=project).stdout
    started = json.loads(run_cli("warm", "start", "--idle-timeout", "600", "--json", folder=project).stdout)
    assert probe() == 1.0
    assert [server["pid"] for server in json.loads(run_cli("warm", "status", "--json", folder=project).stdout)] == [
        started["pid"]
    ]
    assert "600" in json.dumps(started) or "10 min" in run_cli("warm", "status", folder=project).stdout
    assert "Stopped 1 warm server." in run_cli("warm", "stop", folder=project).stdout
    wait_until(lambda: gone(started["pid"]))
    assert probe() == 0.0
    brief = json.loads(run_cli("warm", "start", "--idle-timeout", "1", "--json", folder=project).stdout)
    wait_until(lambda: gone(brief["pid"]), 20)
    assert run_cli("warm", "start", "--idle-timeout", "0", folder=project).returncode == 2


def test_a_pool_that_was_killed_is_started_again(project: Path, job: str) -> None:
    first = json.loads(run_cli("warm", "start", "--json", folder=project).stdout)
    os.kill(first["pid"], signal.SIGKILL)
    assert run_cli("run", job, "--json", folder=project).returncode == 0
    second = json.loads(run_cli("warm", "start", "--json", folder=project).stdout)
    assert second["pid"] != first["pid"]
    run_cli("warm", "stop", folder=project)


def test_stopping_a_pool_leaves_its_kernels_at_work(start: Callable) -> None:
    _, client = start()
    (server,) = running_servers()
    WarmServer(server["key"]).ask("stop")
    assert not WarmServer(server["key"]).is_running()
    assert ask(client, "print('at work')") == "at work"
    start()
    assert [other["pid"] for other in running_servers()] != [server["pid"]]
