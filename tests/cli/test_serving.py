"""What `mlkit serve` and `mlkit predict` accept and print; the servers themselves are tested in tests/serving."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlkit.cli.console import console
from mlkit.cli.predict import result_table
from mlkit.cli.serving import _check_engine, _name_from_path, check_shadow, find_served
from mlkit.errors import InputError, NotFoundError


def test_names_of_models_in_urls() -> None:
    assert _name_from_path(Path("/shelf/churn/3")) == "churn"
    run = "20261121-174942-train-jan6"
    assert _name_from_path(Path(f"/runs/{run}/saved_model/1")) == run


def test_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="There is nothing 'chrun' to serve"):
        find_served("chrun")
    (tmp_path / "my models").mkdir()
    served = find_served(f"prices={tmp_path / 'my models'}")
    assert (served.name, served.path) == ("prices", str(tmp_path / "my models"))
    with pytest.raises(InputError, match="takes models of the registry"):
        check_shadow(served, "challenger")


def test_engines() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'ray'\?"):
        _check_engine("rya", "")
    with pytest.raises(InputError, match="--replicas is for --engine ray"):
        _check_engine("local", "2")


def test_the_closing_line_of_a_batch_prediction(capsys: pytest.CaptureFixture) -> None:
    names = {"model": "churn", "version": 3, "run": "k3f9"}
    result = SimpleNamespace(names=names, rows=1_000_000, rows_resumed=0, speed=210_000.0)
    with console.capture() as captured:
        console.print(result_table(result))
    assert captured.get().split("\n")[1].split() == ["churn", "3", "k3f9", "1,000,000", "-", "210,000"]


def test_predict_rejects_what_it_cannot_read(mlkit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, _ = mlkit("predict", "--help")
    assert code == 0
    assert "--replace" in output
    command = ["predict", "no-such-model", "--input", "rows.csv", "--output", "rows.parquet"]
    code, _, message = mlkit(*command, "--key", ",")
    assert (code, "--key takes COLUMN,..." in message) == (2, True)
    code, _, message = mlkit(*command)
    assert (code, "no-such-model" in message) == (2, True)
