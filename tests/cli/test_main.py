"""The command line as a process: exit codes, messages, JSON."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mlkit.runs.store import RunStore
from tests.conftest import run_cli

KERNELSPEC = {"name": "python3", "display_name": "python3", "language": "python"}


@pytest.fixture
def store(project: Path) -> RunStore:
    """Five runs: three good ones, a failed one, a damaged one."""
    store = RunStore(project / "runs")
    for rate in (0.1, 0.01, 0.001):
        with store.create("train", parameters={"learning_rate": rate}, defaults={"epochs": 10}) as run:
            run.log_metrics({"val_accuracy": 0.99 - rate, "val_loss": rate})
    with pytest.raises(RuntimeError), store.create("tune"):
        raise RuntimeError("no luck")
    (store.create("train").folder / "run.json").write_text("{")
    return store


def write_notebook(path: Path, *sources: str, parameters: str | None = "count: int = 3  # how many") -> Path:
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters is not None else []
    cells += [cell for source in sources for cell in (new_markdown_cell("## Step"), new_code_cell(source))]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNELSPEC}), path)
    return path


def test_runs_filters_sorts_and_limits(cli: Callable, store: RunStore) -> None:
    def listed(*arguments: str) -> list[dict]:
        result = cli("runs", "list", "--json", *arguments)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    assert len(listed()) == 5
    assert [
        run["metrics"]["val_accuracy"] for run in listed("--where", "val_accuracy > 0.9", "--sort", "val_accuracy")
    ] == [
        0.989,
        0.98,
    ]
    assert listed("--sort", "val_loss", "--ascending", "--limit", "1")[0]["parameters"] == {"learning_rate": 0.001}
    assert [run["job"] for run in listed("--status", "failed")] == ["tune"]
    assert len(listed("--job", "train")) == 3
    assert [run["status"] for run in listed("--status", "damaged")] == ["damaged"]
    assert all(Path(run["folder"]).is_dir() for run in listed())


def test_runs_for_a_person(cli: Callable, store: RunStore) -> None:
    text = cli("runs", "list", COLUMNS="160").stdout
    assert "damaged" in text
    assert "RuntimeError: no luck" in text
    assert "2 of 5" in cli("runs", "list", "--limit", "2").stdout


def test_an_empty_archive_says_what_to_do(cli: Callable) -> None:
    result = cli("runs", "list")
    assert (result.returncode, "mlkit run train" in result.stdout) == (0, True)
    assert json.loads(cli("runs", "list", "--json").stdout) == []


def test_show_by_prefix_suffix_and_latest(cli: Callable, store: RunStore) -> None:
    run = store.list(where="learning_rate == 0.1").runs[0]
    assert json.loads(cli("runs", "show", run.id[-4:], "--json").stdout)["parameters"] == {"learning_rate": 0.1}
    text = cli("runs", "show", run.id).stdout
    assert "learning_rate" in text
    assert "0.89" in text
    failed = store.list(status="failed").runs[0]
    assert "no luck" in cli("runs", "show", failed.id).stdout


def test_show_begins_with_the_result(cli: Callable, store: RunStore) -> None:
    run = store.get(store.list(where="learning_rate == 0.1").runs[0].id)
    run.log_summary("accuracy 0.89, better than the dummy baseline [0.5]\nlog_loss 0.3")
    lines = cli("runs", "show", run.id).stdout.splitlines()
    assert lines[1:3] == ["accuracy 0.89, better than the dummy baseline [0.5]", "log_loss 0.3"]
    assert json.loads(cli("runs", "show", run.id, "--json").stdout)["summary"].startswith("accuracy 0.89")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "show", "nothing"], "There is no run 'nothing'"),
        (["runs", "show", "2"], "could be any of"),
        (["runs", "open", "latest"], "has no notebook.html"),
        (["tensorboard"], "has TensorBoard logs"),
        (["runs", "list", "--where", "val_acuracy > 1"], "Did you mean 'val_accuracy'?"),
        (["runs", "list", "--where", "val_accuracy >"], "cannot be understood"),
        (["runs", "list", "--limit", "0"], "limit"),
        (["runs", "delete", "latest"], "add --yes"),
        (["run", "trein"], "Did you mean 'train'?"),
        (["run", "nowhere.ipynb"], "There is no notebook"),
        (["jobs", "show", "trein"], "Did you mean 'train'?"),
        (["run", "train", "-p", "epochs"], "takes NAME=VALUE"),
        (["run", "train", "-p", "epoch=3"], "Did you mean 'epochs'?"),
        (["run", "train", "-p", "epochs=0"], "greater than 0"),
        (["run", "train", "-f", "nowhere.yaml"], "cannot be read"),
        (["--set", "runs.rot=x", "runs"], "Did you mean 'runs.root'?"),
        (["--set", "jobs.cell_timeout=soon", "runs"], "valid integer"),
    ],
)
def test_what_cannot_be_done_is_refused_with_2_and_a_way_out(
    arguments: list[str], message: str, cli: Callable, store: RunStore
) -> None:
    result = cli(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert len(store.list()) == 5


def test_jobs_are_listed_with_their_parameters(cli: Callable) -> None:
    jobs = {job["name"]: job["summary"] for job in json.loads(cli("jobs", "list", "--json").stdout)}
    assert jobs.keys() >= {"train", "evaluate"}
    assert all(jobs.values())
    schema = json.loads(cli("jobs", "show", "train", "--json").stdout)["properties"]
    assert (schema["epochs"]["default"], schema["epochs"]["exclusiveMinimum"]) == (20, 0)
    assert schema["split"]["enum"] == ["random", "hash", "time"]
    assert "maximum passes over the training data" in cli("jobs", "show", "train").stdout


def test_settings_come_from_file_environment_and_command_line(cli: Callable, project: Path) -> None:
    def root(*arguments: str, **environment: str) -> str:
        rows = json.loads(cli(*arguments, "settings", "--json", **environment).stdout)
        return Path(next(row["value"] for row in rows if row["name"] == "runs.root")).name

    assert root() == "runs"
    (project / "settings.ini").write_text("[runs]\nroot = from_file\n")
    assert root() == "from_file"
    assert root(MLKIT_RUNS_ROOT="from_environment") == "from_environment"
    assert root("--set", "runs.root=from_command", MLKIT_RUNS_ROOT="from_environment") == "from_command"


def test_rm_deletes_what_it_was_told_to(cli: Callable, store: RunStore) -> None:
    first, second = (run.id for run in store.list(job="train", limit=2))
    result = cli("runs", "delete", first, second, "--yes", "--json")
    assert json.loads(result.stdout) == {"deleted": [first, second]}
    assert len(store.list()) == 3
    damaged = store.list(status="damaged").runs[0]
    headless = store.create("train")
    (headless.folder / "run.json").unlink()
    assert cli("runs", "delete", damaged.id, headless.id, "--yes").returncode == 0
    assert not store.list(status="damaged").runs


def test_rm_refuses_a_running_run(cli: Callable, store: RunStore) -> None:
    run = store.create("train").start()
    result = cli("runs", "delete", run.id, "--yes")
    assert (result.returncode, "is running" in result.stderr) == (2, True)


def test_new_makes_a_project_that_explains_itself(cli: Callable, project: Path) -> None:
    assert cli("new", "shop").returncode == 0
    shop = project / "shop"
    assert {path.name for path in (shop / "jobs").iterdir()} >= {"train.ipynb", "evaluate.ipynb"}
    assert (shop / "first_model.ipynb").exists()
    assert "# folder of the run store" in (shop / "settings.ini").read_text()
    assert json.loads(run_cli("settings", "--json", folder=shop).stdout)[0]["from"].startswith("settings.ini, line")
    assert cli("new", "shop").returncode == 2
    (project / "file").write_text("")
    assert cli("new", "file").returncode == 2


@pytest.mark.slow
def test_any_notebook_runs_by_path_with_a_file_of_parameters(cli: Callable, project: Path) -> None:
    write_notebook(project / "deep {odd} name.ipynb", "print(count, type(count))")
    (project / "values.yaml").write_text("count: 5\n")
    result = cli("run", "deep {odd} name.ipynb", "-f", "values.yaml", "--json")
    assert json.loads(result.stdout)["parameters"] == {"count": 5}
    result = cli("run", "deep {odd} name.ipynb", "-f", "values.yaml", "-p", "count=7", "--json")
    record = json.loads(result.stdout)
    executed = nbformat.read(Path(record["folder"]) / "notebook.ipynb", 4)
    assert executed.cells[-1].outputs[0].text == "7 <class 'int'>\n"
    assert record["job"] == "deep {odd} name"


@pytest.mark.slow
def test_a_failing_job_exits_with_1_and_shows_why(cli: Callable, project: Path) -> None:
    write_notebook(project / "bad.ipynb", "done = 1", "done / 0")
    result = cli("run", "bad.ipynb")
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert "mlkit runs open" in result.stderr
    record = json.loads(cli("runs", "show", "latest", "--json").stdout)
    assert (record["status"], record["failure"]["error"]) == ("failed", "ZeroDivisionError")
    assert json.loads(cli("runs", "open", "latest", "--json").stdout)["notebook"].endswith("notebook.html")


@pytest.mark.slow
def test_bad_input_found_inside_the_job_exits_with_2(cli: Callable, project: Path) -> None:
    write_notebook(project / "bad.ipynb", "from mlkit.data import load_dataset", "load_dataset('digit')")
    result = cli("run", "bad.ipynb")
    assert result.returncode == 2
    assert "Did you mean 'digits'?" in result.stderr


@pytest.mark.slow
def test_a_notebook_without_parameters_cell(cli: Callable, project: Path) -> None:
    write_notebook(project / "plain.ipynb", "1 + 1", parameters=None)
    assert cli("run", "plain.ipynb").returncode == 0
    result = cli("run", "plain.ipynb", "-p", "count=3")
    assert result.returncode == 2
    assert "no cell tagged 'parameters'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_is_interrupted(number: signal.Signals, code: int, project: Path) -> None:
    write_notebook(project / "waits.ipynb", "import time", "print('at work')\ntime.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlkit", "run", "waits.ipynb"], cwd=project, stdout=subprocess.PIPE
    )
    for line in process.stdout:
        if b"cell 3 of 3" in line:
            break
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    run = RunStore(project / "runs").get("latest")
    assert (run.record.status, run.record.failure.error) == ("interrupted", "Interrupted")
    assert nbformat.read(run.folder / "notebook.ipynb", 4).cells[-1].metadata.papermill.status == "failed"


@pytest.mark.slow
def test_a_disk_that_fills_up_during_a_job(cli: Callable, project: Path, small_disk: Path) -> None:
    fill = (
        "from pathlib import Path\nfrom mlkit.runs import Run\n(Run.current().folder / 'big').write_bytes(bytes(10**7))"
    )
    write_notebook(project / "fills.ipynb", fill)
    result = cli("--set", f"runs.root={small_disk}/runs", "run", "fills.ipynb")
    assert result.returncode == 1
    assert "disk is full" in result.stderr
    run = RunStore(small_disk / "runs").get("latest")
    assert run.status in ("failed", "interrupted")
    assert nbformat.read(run.folder / "notebook.ipynb", 4).cells


@pytest.mark.slow
def test_board_serves_the_chosen_runs(trained: tuple[Path, dict]) -> None:
    folder, record = trained
    command = [sys.executable, "-m", "mlkit", "tensorboard", record["id"][-4:], "--port", "0", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        url = json.loads("".join(lines))["url"]
        with urllib.request.urlopen(f"{url.rstrip('/')}/data/runs") as answer:
            runs = json.load(answer)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert f"{record['id']}/train" in runs


def test_json_goes_alone_to_standard_output(cli: Callable, store: RunStore) -> None:
    for arguments in (
        ["runs", "list"],
        ["runs", "show", store.list(status="failed").runs[0].id],
        ["settings"],
        ["new", "a"],
    ):
        json.loads(cli(*arguments, "--json").stdout)


def test_a_closed_pipe_is_no_error(project: Path, store: RunStore) -> None:
    command = f"{sys.executable} -m mlkit runs list | head -1"
    result = subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True, env=os.environ)
    assert result.stderr == ""
