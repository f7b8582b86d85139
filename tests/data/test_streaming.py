"""Tests of `mlkit.data.streaming` beyond its notebook: constant memory, the usual calls, damaged and missing files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset, open_dataset, reload_dataset
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError

PEAK = """
import json, resource, sys
from mlkit.data import open_dataset
data = open_dataset([sys.argv[1]] * int(sys.argv[2]), "purchased", ignore="clicked")
rows = sum(len(labels) for _, labels in data.to_tf("train", batch_size=1024))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": rows, "expected": data.sizes["train"], "megabytes": peak}))
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    retail(rows=300_000).write_parquet(tmp_path / "visits.parquet")
    results = []
    for copies in (2, 16):
        command = [sys.executable, "-c", PEAK, tmp_path / "visits.parquet", str(copies)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert all(result["rows"] == result["expected"] for result in results)
    assert results[1]["rows"] > 7.9 * results[0]["rows"]
    # 4.2 million rows more would take more than a gigabyte in memory
    assert results[1]["megabytes"] < results[0]["megabytes"] + 200, results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visits")
    for number, table in enumerate(retail(rows=40_000).iter_slices(10_000)):
        table.write_parquet(folder / f"part-{number}.parquet")
    return folder


def test_a_model_is_trained_evaluated_and_exported_by_the_same_calls(files: Path, tmp_path: Path) -> None:
    from mlkit.evaluation import evaluate
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model
    from mlkit.runs.store import RunStore
    from mlkit.training import fit

    choices = {"split": "hash", "key": "user_id", "ignore": ["clicked", "item_id"]}
    opened, loaded = (
        reader(files / "part-*.parquet", "purchased", **choices) for reader in (open_dataset, load_dataset)
    )
    scores = []
    for data in (opened, loaded):
        model = build_model("mlp", data)
        with RunStore(tmp_path / "runs").create("train") as run:
            run.log_data(data.record())
            fit(model, data, epochs=3, batch_size=256, run=run)
            evaluation = evaluate(model, data, "test")
            scores.append(evaluation.metrics["auc"])
            if data is opened:
                export_saved_model(model, data, run)
                served = evaluate(load_saved_model(run.folder / "saved_model"), data, "test")
                np.testing.assert_allclose(served.scores, evaluation.scores, atol=1e-5)
                worst = evaluation.mistakes()[0]
                label = pl.concat([pl.read_parquet(file) for file in sorted(files.iterdir())])["purchased"][int(worst)]
                assert label == bool(evaluation.labels[np.flatnonzero(opened.rows("test") == worst)[0]])
    reloaded = reload_dataset(json.loads(json.dumps(opened.record())), files / "part-3.parquet")
    assert (reloaded.classes, list(reloaded.features)) == (opened.classes, list(opened.features))
    assert min(scores) > 0.6
    assert abs(scores[0] - scores[1]) < 0.05, scores


def test_rows_without_a_label_belong_to_no_split(tmp_path: Path) -> None:
    table = pl.DataFrame({"x": np.arange(1000.0), "y": [None, "a", "b", ""] * 250})
    table.write_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path / "t.parquet", "y")
    assert data.sizes["all"] == 500
    assert data.warnings == ("500 of 1000 rows have no 'y' and were dropped.",)
    assert (
        sorted(x for batch in data.batches("all") for x in batch["x"]) == table.filter(pl.col("y") != "")["x"].to_list()
    )


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    """Damaged texts raise an error when read: ignored columns are not read, nor features if only labels are needed."""

    def damage(name: str) -> None:
        path = tmp_path / "t.parquet"
        path.write_bytes(path.read_bytes().replace(name.encode() * 8, b"\xff" * 8))

    table = pl.DataFrame({name: [f"{name * 8}{row % 9}" for row in range(900)] for name in "QZ"})
    table = table.with_columns(y=pl.Series(["a", "b", "b"] * 300))
    table.write_parquet(tmp_path / "t.parquet", compression="uncompressed", statistics=False)
    damage("Z")
    data = open_dataset(tmp_path / "t.parquet", "y", ignore="Z")
    assert sum(len(batch["Q"]) for batch in data.batches("all")) == 900
    damage("Q")
    assert data.rows("all").tolist() == list(range(900))
    assert np.bincount(data.labels_of("all")).tolist() == [300, 600]
    with pytest.raises(DatasetError, match=r"t\.parquet"):
        next(data.batches("all"))


def test_a_regression_knows_the_scale_of_its_label(tmp_path: Path) -> None:
    table = pl.DataFrame({"x": np.arange(200_000.0), "y": np.random.default_rng(0).normal(50, 3, 200_000)})
    table.write_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path / "t.parquet", "y")
    labels = data.labels_of("train")
    assert data.task == "regression"
    assert data.label_scale == pytest.approx((labels.mean(), labels.std()), rel=1e-5)


def test_files_with_different_columns_are_rejected(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1, 2], "y": ["a", "b"]}).write_parquet(tmp_path / "1.parquet")
    pl.DataFrame({"z": [1, 2], "y": ["a", "b"]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(DatasetError, match=r"cannot be read as one table|z"):
        open_dataset(tmp_path / "*.parquet", "y")


def test_a_file_that_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    retail(rows=1000).write_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path / "t.parquet", "purchased", ignore="clicked")
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(DatasetError, match=r"t\.parquet"):
        next(data.batches("train"))
