"""Evaluating more rows than fit in memory, and what is refused before a model has to answer."""

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

COLUMNS, PART, PARTS = 40, 75_000, 20
BOUND = 400_000_000  # bytes that an evaluation may take; the table alone would take a fifth more

MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from mlkit.evaluation import make_report; from mlkit.evaluation.predictions import load_answers, save_answers
from mlkit.evaluation import evaluate
from mlkit.data.streaming import open_rows

def peak():  # of resident memory, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def model(features):
    positive = (features["x00"] / 100).astype("float32")
    return {"probabilities": np.stack([1 - positive, positive], axis=1)}

before = peak()
record = {"name": "wide", "task": "binary", "tasks": {}, "label": "bought", "classes": ["no", "yes"],
          "features": {f"x{number:02}": "number" for number in range(COLUMNS)}, "arguments": {"source": None}}
evaluation = evaluate(model, open_rows(record, "wide-*.parquet"))
answers = evaluation.answers(["device"])
report = make_report(answers, ["device"], group="device", weak=evaluation.weak_slices())
record = report.record()
save_answers(answers, Path("answers.parquet"))
print(peak() - before, len(load_answers("answers.parquet")), len(record["slices"]), record["measures"]["auc"]["value"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_more_rows_than_the_bound_would_hold_are_evaluated(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = {f"x{number:02}": generator.integers(0, 100, PART).astype("float64") for number in range(COLUMNS)}
    bought = generator.random(PART) < numbers["x00"] / 100
    texts = {"device": generator.choice(["phone", "desktop"], PART), "bought": np.where(bought, "yes", "no")}
    first = tmp_path / "wide-00.parquet"
    pl.DataFrame(numbers | texts).write_parquet(first, compression="lz4")
    for number in range(1, PARTS):
        os.link(first, tmp_path / f"wide-{number:02}.parquet")
    assert COLUMNS * PART * PARTS * 8 > BOUND, "the columns alone would break the bound"
    code = MEASURE.replace("COLUMNS", str(COLUMNS))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    grown, rows, slices, auc = map(float, result.stdout.split())
    assert (rows, slices) == (PART * PARTS, 2)
    assert auc == pytest.approx(0.83, abs=0.01)
    assert grown < BOUND, f"it took {grown / 1e6:.0f} MB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all",), "There is no folder nowhere/at/all, and no version of that name"),
        (("churn@champion",), "no version of that name"),
        (("zzzz",), "There is no run with a saved_model 'zzzz'"),
        (("foreign",), "was not exported by mlkit: assets.extra/mlkit.json is missing"),
        (("foreign", "--kind", "int8"), "There is no converted model of kind 'int8'"),
        (("model", "--gate", "nowhere.yaml"), "nowhere.yaml"),
        (("model", "--against", "foreign"), "was not exported by mlkit"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    about = {"task": "binary", "label": "bought", "classes": ["no", "yes"], "features": []}
    for name in ("foreign", "model"):
        (tmp_path / name / "assets.extra").mkdir(parents=True)
        (tmp_path / name / "saved_model.pb").write_bytes(b"")
    (tmp_path / "model" / "assets.extra" / "mlkit.json").write_text(json.dumps(about))
    refusal = CliRunner().invoke(app, ["evaluate", *arguments]).exception
    assert isinstance(refusal, InputError), refusal
    assert message in str(refusal)
    assert not list((tmp_path / "runs").glob("*-evaluate-*"))
