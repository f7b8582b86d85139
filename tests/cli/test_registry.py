"""`mlkit register`, `promote`, `rollback`, `models`, typed one after another."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlkit.registry import sign_folder
from mlkit.registry.signing import KeySigner, new_key
from mlkit.runs import Run, RunStore


def executed_cell(source: str) -> dict[str, Any]:
    """A cell of an executed notebook, which was executed for a minute around now."""
    start, end = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (-30, 30))
    timing = {"start_time": start.isoformat(), "end_time": end.isoformat()}
    return {"cell_type": "code", "source": source, "outputs": [], "metadata": {"papermill": timing}}


@pytest.fixture
def sample_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Make a run with a text for a model, a notebook, and a gate result."""
    monkeypatch.chdir(tmp_path)
    new_key(tmp_path / "alice.pem", tmp_path / "keys" / "alice.pub")

    def make(accuracy: float, signed: bool = True) -> Run:
        with RunStore(tmp_path / "runs").create("train", notebook="nbs/jobs/train.ipynb") as run:
            run.save_model(lambda folder: (folder / "saved_model.pb").write_text(f"a model of {accuracy}"))
            cells = [{"cell_type": "markdown", "source": "## Export", "metadata": {}}]
            cells += [executed_cell("export_saved_model(network, data, run)")]
            (run.folder / "notebook.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
            result = {"passed": True, "reason": "The only check passed.", "run": run.id}
            (run.folder / "gate.json").write_text(json.dumps(result))
            run.log_data(
                {"name": "retail", "source": "retail.parquet", "fingerprint": "5d41402abc4b2a76b9719d911017c592"}
            )
            run.log_metrics({"test_accuracy": accuracy})
        if signed:
            sign_folder(run.folder, KeySigner(tmp_path / "alice.pem"))
        return run

    return make


def test_versions_aliases_traffic_and_the_audit_log(sample_run: Callable, tmp_path: Path, mlkit: Callable) -> None:
    sample_run(0.91)
    assert mlkit("register", "latest", "--name", "churn", "--reason", "the first")[0] == 0
    assert mlkit("promote", "churn", "1")[0] == 0
    sample_run(0.94)
    assert mlkit("register", "latest", "--name", "churn")[0] == 0
    assert mlkit("models", "traffic", "churn", "1=90", "2=10", "--reason", "carefully")[0] == 0
    assert mlkit("promote", "churn", "latest")[0] == 2
    assert mlkit("promote", "churn", "2", "--reason", "better on new users")[0] == 0
    assert mlkit("rollback", "churn", "--reason", "complaints")[0] == 0
    assert mlkit("models", "list", "churn")[0] == 0
    assert "saved     by cell 1, Export" in mlkit("models", "list", "churn/1")[1]
    assert mlkit("models", "log", "churn")[0] == 0

    unsigned = sample_run(0.97, signed=False)
    for arguments, expected in {
        ("register", "latest", "--name", "churn"): 1,  # not signed
        ("register", "latest"): 2,
        ("rollback", "churn"): 2,  # there is no earlier version
        ("rollback", "churn", "--at", "yesterday"): 2,
        ("models", "delete", "churn", "1"): 2,  # it is the champion
        ("promote", "churn", "1", "--alias", "v3"): 2,
        ("models", "list", "chrun"): 2,
        ("models", "list", "churn/7"): 2,
    }.items():
        assert mlkit(*arguments)[0] == expected, arguments

    assert mlkit("register", unsigned.id, "--name", "churn", "--force", "--reason", "for a trial")[0] == 0
    assert mlkit("models", "check")[0] == 0
    log = tmp_path / "models" / "audit_log.jsonl"
    log.write_text(log.read_text().replace("complaints", "fireworks!"))
    assert mlkit("models", "check")[0] == 1


def test_showing_traffic_changes_nothing(sample_run: Callable, tmp_path: Path, mlkit: Callable) -> None:
    for accuracy in (0.91, 0.94):
        sample_run(accuracy)
        assert mlkit("register", "latest", "--name", "churn")[0] == 0
    assert mlkit("promote", "churn", "1")[0] == 0
    assert "100 % to the champion" in mlkit("models", "traffic", "churn")[1]
    assert mlkit("models", "traffic", "churn", "1=90", "2=10")[0] == 0
    before = (tmp_path / "models" / "audit_log.jsonl").read_bytes()
    code, output, _ = mlkit("models", "traffic", "churn")
    assert (code, output.strip()) == (0, "churn: version 1 90.0%, version 2 10.0%")
    assert json.loads(mlkit("models", "traffic", "churn", "--json")[1])["traffic"] == {"1": 0.9, "2": 0.1}
    assert mlkit("models", "list", "churn")[0] == 0
    assert (tmp_path / "models" / "audit_log.jsonl").read_bytes() == before
    assert mlkit("models", "traffic", "churn", "1=90", "--reset")[0] == 2
    assert mlkit("models", "traffic", "churn", "--reset")[0] == 0
    assert "100 % to the champion" in mlkit("models", "traffic", "churn")[1]
    assert mlkit("models", "traffic", "churn", "one=ninety")[0] == 2
