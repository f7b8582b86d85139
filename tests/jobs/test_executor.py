"""The shipped jobs, executed on the command line, by plain papermill, and killed during training."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import polars as pl
import psutil
import pytest

from mlkit.runs.store import RunStore
from tests.conftest import ADULT, REPOSITORY, run_cli, wait_until

pytestmark = pytest.mark.slow
JOBS = REPOSITORY / "nbs" / "jobs"


def run_job(folder: Path, job: str, *parameters: str) -> dict:
    """Execute a job and return its record."""
    flags = [flag for parameter in parameters for flag in ("-p", parameter)]
    result = run_cli("run", job, *flags, "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_training_digits_leaves_a_complete_run(trained: tuple[Path, dict]) -> None:
    folder, record = trained
    run = Path(record["folder"])
    assert run.parent == folder / "runs"
    assert (record["status"], record["job"], record["parameters"]) == ("completed", "train", {"epochs": 12})
    assert record["metrics"]["val_accuracy"] >= 0.97
    assert record["metrics"]["test_accuracy"] >= 0.95
    assert len(record["history"]["val_loss"]) >= 3
    assert record["defaults"]["dataset"] == "digits"
    assert record["data"][0]["fingerprint"]
    assert record["seeds"]
    assert record["environment"]["packages"]["keras"]
    for name in ("notebook.ipynb", "notebook.html", "saved_model/1/saved_model.pb", "plots/history.png"):
        assert (run / name).is_file(), name
    assert list(run.glob("tensorboard/**/events.*"))
    assert not (run / "checkpoints").exists()


def test_every_artifact_matches_its_hash(trained: tuple[Path, dict]) -> None:
    run = Path(trained[1]["folder"])
    listed = {artifact["path"]: artifact for artifact in trained[1]["artifacts"]}
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - {"run.json", ".lock"}
    assert files == set(listed) | (files & {"uncommitted.patch"})
    for name, artifact in listed.items():
        content = (run / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (artifact["size"], artifact["sha256"])


def test_the_executed_notebook_is_a_report(trained: tuple[Path, dict]) -> None:
    page = (Path(trained[1]["folder"]) / "notebook.html").read_text()
    comparison = trained[1]["summary"].split(" (difference")[0]
    assert comparison in page[page.index("<h1") : page.index("<details")]
    notebook = nbformat.read(Path(trained[1]["folder"]) / "notebook.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.metadata.papermill.status == "completed" for cell in code)
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]


def test_evaluate_uses_the_saved_model_and_the_same_data(trained: tuple[Path, dict]) -> None:
    folder, record = trained
    evaluated = run_job(folder, "evaluate", f"run={record['id'][-4:]}")
    assert evaluated["parents"] == [record["id"]]
    assert evaluated["data"][0]["fingerprint"] == record["data"][0]["fingerprint"]
    assert evaluated["metrics"]["test_accuracy"] == pytest.approx(record["metrics"]["test_accuracy"])


@pytest.mark.parametrize(
    ("dataset", "metric", "minimum"),
    [("wine", "test_accuracy", 0.85), ("breast_cancer", "test_auc", 0.95), ("diabetes", "test_r2", 0.2)],
)
def test_training_tables_of_every_task(dataset: str, metric: str, minimum: float, project: Path) -> None:
    record = run_job(project, "train", f"dataset={dataset}")
    assert record["metrics"][metric] >= minimum


@pytest.fixture
def customers(project: Path) -> Path:
    """Table as CSV: numbers, categories, missing values, a column name with spaces."""
    generator = np.random.default_rng(0)
    visits, tier = generator.gamma(2, 3, 900).round(3), generator.choice(["a", "b", "c", None], 900).tolist()
    bought = visits + np.array([{"a": 6, "b": 0}.get(name, 3) for name in tier]) > 9
    table = pl.DataFrame({"visits-last week": visits, "tier": tier, "bought": np.where(bought, "yes", "no")})
    table.write_csv(project / "shop.csv")
    return project


def test_a_custom_table_is_trained_and_evaluated_on_new_rows(customers: Path) -> None:
    record = run_job(
        customers, "train", "dataset=shop.csv", "label=bought", "model=wide_deep", "epochs=30", "learning_rate=0.01"
    )
    assert record["metrics"]["test_accuracy"] > 0.9
    pl.read_csv(customers / "shop.csv").head(100).write_csv(customers / "new.csv")
    evaluated = run_job(customers, "evaluate", "dataset=new.csv")
    assert evaluated["data"][0]["rows"] == 100
    assert evaluated["metrics"]["test_accuracy"] > 0.9
    assert evaluated["parents"] == [record["id"]]


@pytest.mark.skipif(not ADULT.exists(), reason="the Adult census is not here")
def test_the_adult_census_with_missing_values(project: Path) -> None:
    options = 'dataset_options={"null_values": ["?"]}'
    record = run_job(project, "train", f"dataset={ADULT}", "label=income", options, "epochs=3", "batch_size=256")
    assert record["metrics"]["test_auc"] > 0.88


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["dataset=digit"], "Did you mean 'digits'?"),
        (["dataset=shop.csv"], "label"),
        (["dataset=shop.csv", "label=bougth"], "Did you mean 'bought'?"),
        (["model=wide_dep", "dataset=wine"], "Did you mean 'wide_deep'?"),
    ],
)
def test_invalid_input_is_reported_as_a_user_error(parameters: list[str], message: str, customers: Path) -> None:
    flags = [flag for parameter in parameters for flag in ("-p", parameter)]
    result = run_cli("run", "train", *flags, folder=customers)
    assert result.returncode == 2
    assert message in result.stderr
    assert RunStore(customers / "runs").list().runs[0].status == "failed"


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_jobs_run_under_plain_papermill(job: str, trained: tuple[Path, dict], tmp_path: Path) -> None:
    parameters = {"train": ["-p", "epochs", "1"], "evaluate": ["-p", "run", trained[1]["id"]]}[job]
    command = [sys.executable, "-m", "papermill", str(JOBS / f"{job}.ipynb"), str(tmp_path / "out.ipynb"), *parameters]
    result = subprocess.run([*command, "--cwd", trained[0]], cwd=trained[0], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = RunStore(trained[0] / "runs").list(status="interactive").runs[0]
    assert run.job == job
    assert run.effective_parameters[parameters[1]] in (1, trained[1]["id"])


def test_sigkill_in_the_middle_of_training_leaves_a_readable_run_and_no_kernel(project: Path) -> None:
    command = [sys.executable, "-m", "mlkit", "run", "train", "-p", "epochs=2000", "-p", "patience=2000"]
    environment = os.environ | {"XDG_RUNTIME_DIR": tempfile.mkdtemp()}  # no warm server: the kernel is its own child
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, env=environment)
    store = RunStore(project / "runs")
    wait_until(lambda: [run for run in store.list() if "val_loss" in run.metrics])
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert kernels
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = store.get("latest")
    assert (run.record.status, run.status) == ("running", "interrupted")
    assert len(run.record.history["val_loss"]) >= 1
    assert nbformat.read(run.folder / "notebook.ipynb", 4).cells
    assert [summary.status for summary in store.list()] == ["interrupted"]
    wait_until(
        lambda: not [kernel for kernel in kernels if kernel.is_running() and kernel.status() != "zombie"], seconds=15
    )


def test_two_concurrent_jobs_do_not_interfere(customers: Path) -> None:
    command = [sys.executable, "-m", "mlkit", "run", "train", "-p", "dataset=wine", "-p", "epochs=2", "--json"]
    processes = [subprocess.Popen(command, cwd=customers, stdout=subprocess.PIPE) for _ in range(2)]
    records = [json.loads(process.communicate()[0]) for process in processes]
    assert [record["status"] for record in records] == ["completed", "completed"]
    first, second = (record["metrics"] for record in records)
    assert first == second  # the same seed, the same machine: the same run, bit for bit
    assert records[0]["id"] != records[1]["id"]
