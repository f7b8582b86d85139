"""Evaluating more rows than fit in memory, and errors before a model is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from mlkit.cli.main import app
from mlkit.errors import InputError

COLUMNS, CHUNK, CHUNKS = 40, 75_000, 20
MAX_BYTES = 400_000_000  # memory of an evaluation; the table alone would take a fifth more

SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from mlkit.data.streaming import open_rows
from mlkit.evaluation import evaluate, make_report
from mlkit.evaluation.predictions import load_predictions, save_predictions

def peak_memory():  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def model(features):
    positive = (features["x00"] / 100).astype("float32")
    return {"probabilities": np.stack([1 - positive, positive], axis=1)}

before = peak_memory()
record = {"name": "wide", "task": "binary", "tasks": {}, "label": "bought", "classes": ["no", "yes"],
          "features": {f"x{number:02}": "number" for number in range(COLUMNS)}, "arguments": {"source": None}}
evaluation = evaluate(model, open_rows(record, "wide-*.parquet"))
predictions = evaluation.predictions(["device"])
report = make_report(predictions, ["device"], group="device", weak=evaluation.weak_slices())
record = report.record()
save_predictions(predictions, Path("predictions.parquet"))
rows, auc = len(load_predictions("predictions.parquet")), record["metrics"]["auc"]["value"]
print(peak_memory() - before, rows, len(record["slices"]), auc)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_more_rows_than_fit_in_memory_are_evaluated(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = {f"x{number:02}": generator.integers(0, 100, CHUNK).astype("float64") for number in range(COLUMNS)}
    bought = generator.random(CHUNK) < numbers["x00"] / 100
    texts = {"device": generator.choice(["phone", "desktop"], CHUNK), "bought": np.where(bought, "yes", "no")}
    first = tmp_path / "wide-00.parquet"
    pl.DataFrame(numbers | texts).write_parquet(first, compression="lz4")
    for number in range(1, CHUNKS):
        os.link(first, tmp_path / f"wide-{number:02}.parquet")
    assert COLUMNS * CHUNK * CHUNKS * 8 > MAX_BYTES, "the columns alone would exceed the limit"
    code = SCRIPT.replace("COLUMNS", str(COLUMNS))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    growth, rows, slices, auc = map(float, result.stdout.split())
    assert (rows, slices) == (CHUNK * CHUNKS, 2)
    assert auc == pytest.approx(0.83, abs=0.01)
    assert growth < MAX_BYTES, f"it took {growth / 1e6:.0f} MB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all",), "There is no folder nowhere/at/all, and no version of that name"),
        (("churn@champion",), "no version of that name"),
        (("zzzz",), "There is no run with a saved_model 'zzzz'"),
        (("foreign",), "was not exported by mlkit: assets.extra/mlkit.json is missing"),
        (("foreign", "--variant", "int8"), "There is no converted model of kind 'int8'"),
        (("model", "--gate", "nowhere.yaml"), "nowhere.yaml"),
        (("model", "--against", "foreign"), "was not exported by mlkit"),
    ],
)
def test_invalid_arguments_are_rejected_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    description = {"task": "binary", "label": "bought", "classes": ["no", "yes"], "features": []}
    for name in ("foreign", "model"):
        (tmp_path / name / "assets.extra").mkdir(parents=True)
        (tmp_path / name / "saved_model.pb").write_bytes(b"")
    (tmp_path / "model" / "assets.extra" / "mlkit.json").write_text(json.dumps(description))
    error = CliRunner().invoke(app, ["evaluate", *arguments]).exception
    assert isinstance(error, InputError), error
    assert message in str(error)
    assert not list((tmp_path / "runs").glob("*-evaluate-*"))
