"""Failing jobs: each ends in a correct record with the cause of the failure, and leaves no process running."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlkit.jobs.kernels import ForkServerClient
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import START_DAEMON, wait_until

pytestmark = pytest.mark.slow
KERNELSPEC = {"name": "python3", "display_name": "python3", "language": "python"}


def write_job(folder: Path, *sources: str, parameters: str = "count: int = 3", metadata: dict | None = None) -> str:
    """Write a job notebook with a section for each cell."""
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [
        cell for n, source in enumerate(sources) for cell in (new_markdown_cell(f"## Part {n}"), new_code_cell(source))
    ]
    metadata = {"kernelspec": KERNELSPEC} if metadata is None else metadata
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / "job.ipynb")
    return "job.ipynb"


def only_run(project: Path) -> Run:
    """The only run of a project."""
    (summary,) = RunStore(project / "runs").list()
    return RunStore(project / "runs").get(summary.id)


@pytest.fixture(params=["cold", "warm"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernel in which a fault happens: an ordinary one, or a forked one."""
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy,cmd")  # the warm server of no other test
    with ForkServerClient.for_environment(os.environ).hold() if request.param == "warm" else contextlib.nullcontext():
        yield request.param


def test_a_notebook_without_a_kernelspec_runs(cli: Callable, project: Path) -> None:
    assert cli("run", write_job(project, "print(count)", metadata={}), "-p", "count=4").returncode == 0
    executed = nbformat.read(only_run(project).folder / "notebook.ipynb", 4)
    assert "4\n" in str([cell.get("outputs") for cell in executed.cells]).replace("\\n", "\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{ not json", "is not a Jupyter notebook"),
        ('{"cells": 3}', "is not a Jupyter notebook"),
        ("", "is not a Jupyter notebook"),
        (None, "2 cells tagged 'parameters'"),
    ],
)
def test_an_invalid_job_is_rejected(content: str | None, message: str, cli: Callable, project: Path) -> None:
    if content is None:
        cells = [new_code_cell("a = 1", metadata={"tags": ["parameters"]}) for _ in range(2)]
        nbformat.write(new_notebook(cells=cells), project / "job.ipynb")
    else:
        (project / "job.ipynb").write_text(content)
    result = cli("run", "job.ipynb")
    assert (result.returncode, message in result.stderr) == (2, True)
    assert not (project / "runs").exists()


def test_sys_exit(cli: Callable, project: Path, kernel: str) -> None:
    job = write_job(project, "import sys\nsys.exit(count)", "print('never')")
    assert cli("run", job).returncode == 1
    run = only_run(project)
    assert (run.status, run.record.failure.error, run.record.failure.heading) == ("failed", "SystemExit", "Part 0")
    assert cli("run", job, "-p", "count=0").returncode == 0  # papermill's convention: the job completes early


def test_a_kernel_that_kills_itself(cli: Callable, project: Path, kernel: str) -> None:
    result = cli("run", write_job(project, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    assert (result.returncode, "SIGKILL" in result.stderr) == (1, True)
    failure = only_run(project).record.failure
    assert (failure.error, failure.heading) == ("DeadKernelError", "Part 0")


def test_a_crash_in_native_code(cli: Callable, project: Path, kernel: str) -> None:
    result = cli("run", write_job(project, "import ctypes\nctypes.string_at(0)"))
    assert (result.returncode, "SIGSEGV" in result.stderr) == (1, True)


def test_a_cell_that_allocates_until_it_is_killed(cli: Callable, project: Path, kernel: str) -> None:
    """The out-of-memory killer ends the process with the highest score; the job sets its own."""
    set_score = (
        "open('/proc/self/oom_score_adj', 'w').write('1000')\nimport os; open('pid', 'w').write(str(os.getpid()))"
    )
    job = write_job(project, set_score, "hoard = []\nwhile True:\n    hoard.append(bytearray(10_000_000))")
    command = [sys.executable, "-m", "mlkit", "run", job]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (project / "pid").exists() and (project / "pid").read_text())
    kernel_process = psutil.Process(int((project / "pid").read_text()))
    with contextlib.suppress(
        psutil.NoSuchProcess
    ):  # this test acts as the out-of-memory killer, with a limit of 1.5 GB
        wait_until(lambda: kernel_process.memory_info().rss > 1_500_000_000)
        kernel_process.kill()
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, "no memory left" in errors) == (1, True)
    assert only_run(project).status == "failed"


def test_a_hundred_megabytes_of_output_are_truncated(cli: Callable, project: Path, kernel: str) -> None:
    line = "'x' * 99"
    job = write_job(project, f"for _ in range(1_000_000):\n    print({line})\nprint('the end')", "print('and on')")
    assert cli("run", job).returncode == 0
    run = only_run(project)
    assert (run.folder / "notebook.ipynb").stat().st_size < 1_000_000
    assert (run.folder / "notebook.html").stat().st_size < 2_000_000
    executed = nbformat.read(run.folder / "notebook.ipynb", 4)
    texts = [output.text for cell in executed.cells for output in cell.get("outputs", [])]
    assert len(texts) == 2
    assert texts[0].startswith("xxx")
    assert texts[0].endswith("the end\n")
    assert "characters left out" in texts[0]


def test_a_progress_bar_is_one_line(cli: Callable, project: Path) -> None:
    bar = "import sys, time\nfor n in range(400):\n    print(f'\\r{n / 4:.0f}%', end='', file=sys.stderr, flush=True)"
    assert cli("run", write_job(project, bar)).returncode == 0
    executed = nbformat.read(only_run(project).folder / "notebook.ipynb", 4)
    texts = [output.text for cell in executed.cells for output in cell.get("outputs", [])]
    assert [text.strip() for text in texts] == ["100%"]


def test_an_endless_cell_exceeds_its_time_limit(cli: Callable, project: Path, kernel: str) -> None:
    result = cli("--set", "jobs.cell_timeout=2", "run", write_job(project, "while True:\n    pass"))
    assert result.returncode == 1
    failure = only_run(project).record.failure
    assert (failure.error, failure.heading) == ("CellTimeoutError", "Part 0")


CHILD_AND_DAEMON = f"""
import subprocess
child = subprocess.Popen(["sleep", "600"])
{START_DAEMON}
open("pids", "w").write(f"{{child.pid}} {{os.read(reader, 20).decode()}}")
"""


def test_children_do_not_outlive_the_job(cli: Callable, project: Path, kernel: str) -> None:
    assert cli("run", write_job(project, CHILD_AND_DAEMON)).returncode == 0
    child, daemon = map(int, (project / "pids").read_text().split())
    wait_until(lambda: not psutil.pid_exists(child), 20)
    if kernel == "warm":
        wait_until(lambda: not psutil.pid_exists(daemon), 20)
    else:  # an ordinary kernel cannot end a daemon
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon, 9)


def test_the_notebook_is_readable_at_any_time(project: Path) -> None:
    loop = "import time\nfor n in range(20):\n    print(n, 'x' * 10_000)\n    time.sleep(0.05)"
    command = [sys.executable, "-m", "mlkit", "run", write_job(project, *[loop] * 3)]
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL)
    store = RunStore(project / "runs")
    wait_until(
        lambda: store.root.is_dir() and len(store.list()) and (store.get("latest").folder / "notebook.ipynb").exists()
    )
    path, output_counts = store.get("latest").folder / "notebook.ipynb", set()
    while process.poll() is None:
        notebook = nbformat.reads(path.read_text(), 4)
        nbformat.validate(notebook)
        assert store.get("latest").record.status in ("created", "running", "completed")
        output_counts.add(sum(len(cell.get("outputs", [])) for cell in notebook.cells))
    assert process.returncode == 0
    assert len(output_counts) >= 3


SECRET = 'Zq7x "wörd" <&> \\core9X'
LEAKS = """
import sys
from mlkit.runs import Run
print(token); print(repr(token), file=sys.stderr)
Run.current().log_progress(token=token)
Run.current().log_metrics({"length": len(token)})
open(Run.current().folder / "note.txt", "w").write(token)
open(Run.current().folder / "note.bin", "wb").write(b"\\xff\\x00" + token.encode())
import os; os.write(2, token.encode())
token
"""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("source", ["env", "file", "default"])
def test_a_secret_is_not_stored_in_the_run(fails: bool, source: str, cli: Callable, project: Path) -> None:
    parameters = 'token: Secret = ""  # of the feature store'
    cells = [
        "assert token, 'the secret is missing'",
        LEAKS,
        "raise ValueError(f'refused: {token}')" if fails else "'fine'",
    ]
    job = write_job(project, *cells, parameters=f"from pydantic import Secret\n{parameters}")
    (project / "secret.txt").write_text(SECRET + "\n")
    flags = {"env": ["-p", "token=env:STORE"], "file": ["-p", "token=file:secret.txt"], "default": []}[source]
    name = {"env": "STORE", "default": "TOKEN"}.get(source, "UNUSED")
    result = cli("run", job, *flags, **{name: SECRET if source != "file" else "nothing here"})
    assert result.returncode == int(fails), result.stderr
    run = only_run(project)
    assert run.record.metrics == {"length": len(SECRET)}
    files = [path for path in (project / "runs").rglob("*") if path.is_file()]
    assert not [path.name for path in files if b"Zq7x" in path.read_bytes() or b"core9X" in path.read_bytes()]
    assert "core9X" not in result.stdout + result.stderr
    executed = nbformat.read(run.folder / "notebook.ipynb", 4)
    assert "*****" in str(executed.cells)


def test_a_secret_passed_by_value_is_rejected(cli: Callable, project: Path) -> None:
    job = write_job(project, "1", parameters='from pydantic import Secret\ntoken: Secret = ""')
    for value, message in (
        ("hunter2hunter2", "give its source, not its value"),
        ("env:NOWHERE", "no environment variable NOWHERE"),
    ):
        result = cli("run", job, "-p", f"token={value}")
        assert (result.returncode, message in result.stderr) == (2, True)
        assert "hunter2" not in result.stdout + result.stderr.replace("hunter2hunter2'", "")
    assert not (project / "runs").exists()


def test_a_job_with_a_secret_runs_under_plain_papermill(project: Path) -> None:
    job = write_job(project, "assert token == 'hunter2'", parameters='from pydantic import Secret\ntoken: Secret = ""')
    command = [sys.executable, "-m", "papermill", job, "out.ipynb", "-p", "token", "hunter2"]
    assert subprocess.run(command, cwd=project, capture_output=True).returncode == 0


def test_the_help_of_a_job_shows_its_parameters(cli: Callable, project: Path) -> None:
    text = cli("run", "train", "--help").stdout
    for part in ("--sweep", "learning_rate", "PositiveFloat", "0.002", "> 0", "learning rate of the optimizer"):
        assert part in text
    assert cli("run", "trian", "--help").returncode == 2
    assert "mlkit jobs list" in cli("run").stderr
