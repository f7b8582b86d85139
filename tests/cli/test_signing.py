"""`mlkit keys`, `sign`, `verify`, and the exports that a signature forbids."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlkit.cli.console import parse_pairs
from mlkit.cli.signing import _find_folder
from mlkit.errors import NotFoundError
from mlkit.runs import Run, RunStore


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlkit: Callable) -> Run:
    """A signed run with a text for a model, in a project with a key pair of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[signing]\nkey = secret/signing.pem\n")
    assert mlkit("keys", "generate", "alice")[0] == 0
    with RunStore().create("train", parameters={"epochs": 3}) as run:
        (run.folder / "model_card.md").write_text("# Purpose")
        (run.folder / "notebook.ipynb").write_text('{"cells": []}')
        run.save_model(lambda folder: (folder / "saved_model.pb").write_text("the model"))
        run.log_metrics({"accuracy": 0.98})
    assert mlkit("sign", "latest")[0] == 0
    return run


def test_the_folder_that_a_reference_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _find_folder(".") == Path()
    with pytest.raises(NotFoundError, match="There is no folder nowhere/at/all"):
        _find_folder("nowhere/at/all")
    trained, evaluated = (RunStore().create(job) for job in ("train", "evaluate"))
    (trained.folder / "saved_model").mkdir()
    assert [_find_folder(reference) for reference in ("latest", evaluated.id)] == [trained.folder, evaluated.folder]


def test_keys_are_listed(signed: Run, mlkit: Callable) -> None:
    code, output, _ = mlkit("keys", "list")
    assert code == 0
    assert "alice" in output
    assert "ready" in output


def test_a_copy_is_verified_and_changes_are_named(signed: Run, tmp_path: Path, mlkit: Callable) -> None:
    copy = shutil.copytree(signed.folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run.json"))
    assert mlkit("verify", "elsewhere")[0] == 0
    (copy / "model_card.md").write_text("# Another purpose")
    (copy / "saved_model" / "1" / "extra.so").write_text("?")
    code, output, _ = mlkit("verify", "elsewhere", "--json")
    assert code == 1
    assert json.loads(output)["findings"] == ["model_card.md has changed", "saved_model/1/extra.so was added"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sign latest --replace", 2),  # the key can be read by others
        ("keys generate alice", 2),
        ("sign latest --key keys/alice.pub", 2),
        ("verify elsewhere --key alice.pub", 2),
        ("verify elsewhere --identity alice@example.com", 2),
        ("verify elsewhere/saved_model", 1),  # without a signature of its own
        ("verify nowhere/at/all", 2),
        ("export latest --to litert-init8", 2),
        ("verify churn@champion", 2),  # nothing is registered here
    ],
)
def test_what_cannot_be_done(line: str, code: int, signed: Run, tmp_path: Path, mlkit: Callable) -> None:
    shutil.copytree(signed.folder, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run.json"))
    (tmp_path / "secret" / "signing.pem").chmod(0o644)
    assert mlkit(*line.split())[0] == code


def test_tolerances_of_parity(mlkit: Callable) -> None:
    assert parse_pairs(["litert-int8=0.02", "keras=1e-6"], "", float) == {"litert-int8": 0.02, "keras": 1e-6}
    for text in ("0.02", "=0.02", "litert-int8=much"):
        code, _, message = mlkit("parity", "--tolerance", text)
        assert (code, f"as litert-int8=0.02. Received: '{text}'" in message) == (2, True)
