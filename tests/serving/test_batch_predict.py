"""Batch prediction in chunks: correct predictions, and no partial result after a kill, a full disk or a bad file."""

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest

import mlkit.serving.batch_predict
from mlkit.data import clean, describe, infer_schema, load_dataset, write_table
from mlkit.data.schema import schema_text
from mlkit.errors import (
    DatasetError,
    DataValidationError,
    InputError,
    MlkitError,
    ModelError,
    NotFoundError,
    StorageError,
)
from mlkit.export import convert_model, export_saved_model, load_saved_model
from mlkit.export.saved_model import SavedModel
from mlkit.models import build_model
from mlkit.registry import Registry
from mlkit.runs.store import RunStore
from mlkit.serving.batch_predict import predict_table
from tests.conftest import run_cli, wait_until

ROWS = 600


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """An untrained model of the shop and its rows: texts, dates and numbers; its predictions do not matter here."""
    data = load_dataset("retail", rows=ROWS)
    folder = tmp_path_factory.mktemp("models") / "shop"
    return export_saved_model(build_model("wide_deep", data), data, folder), data.table


@pytest.fixture(scope="module")
def official(shop: tuple[Path, pl.DataFrame]) -> dict[str, np.ndarray]:
    """Predictions of the SavedModel, loaded by TensorFlow."""
    model = load_saved_model(shop[0])
    return answers_of(model, load_dataset("retail", rows=ROWS).inputs)


def answers_of(model: SavedModel, inputs: pl.DataFrame) -> dict[str, np.ndarray]:
    return model({name: inputs[name].to_list() for name in model.features})


@pytest.fixture
def source(shop: tuple[Path, pl.DataFrame], tmp_path: Path) -> Path:
    """The rows as Parquet, with a key."""
    file = tmp_path / "orders.parquet"
    shop[1].with_row_index("order").write_parquet(file)
    return file


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlkit.serving.batch_predict, "_CHUNK_ROWS", 100)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(scores: pl.DataFrame, official: dict[str, np.ndarray]) -> None:
    for name, values in official.items():
        values_found = scores[name].to_numpy()
        if values.dtype == np.float32:
            np.testing.assert_allclose(values_found, values, atol=1e-6)
        else:
            assert scores[name].to_list() == [text if isinstance(text, str) else text.decode() for text in values]


@pytest.mark.usefixtures("small_parts")
def test_two_processes_predict_in_the_order_of_the_rows(
    shop: tuple[Path, pl.DataFrame], official: dict[str, np.ndarray], source: Path, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []
    done = predict_table(
        shop[0], source, tmp_path / "scores.parquet", key=["order", "item_id"], processes=2,
        progress=lambda *counts: progress.append(counts),
    )  # fmt: skip
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.columns == ["order", "item_id", *sorted(official), "model", "version", "run"]
    assert scores["order"].to_list() == list(range(ROWS))
    assert scores["item_id"].to_list() == shop[1]["item_id"].to_list()
    check(scores, official)
    assert [count for count, _ in progress] == list(range(0, ROWS + 1, 100))
    assert (done.rows, done.rows_resumed) == (ROWS, 0)
    assert left_in(tmp_path) == ["orders.parquet", "scores.parquet"]


def test_a_csv_file_and_a_pattern_of_parquet_files_get_equal_predictions(
    shop: tuple[Path, pl.DataFrame], official: dict[str, np.ndarray], tmp_path: Path
) -> None:
    shop[1].write_csv(tmp_path / "orders.csv")
    for number in range(3):
        shop[1][number * 200 : (number + 1) * 200].write_parquet(tmp_path / f"day-{number}.parquet")
    for given in ("orders.csv", "day-*.parquet"):
        predict_table(shop[0], tmp_path / given, tmp_path / "scores.parquet", replace=True)
        scores = pl.read_parquet(tmp_path / "scores.parquet")
        check(scores, official)
        assert scores["row"].to_list() == list(range(ROWS))


def test_texts_of_digits_stay_texts_and_a_database_is_queried(tmp_path: Path) -> None:
    shelves = ["007", "7", "x", "008"] * 30
    rows = pl.DataFrame({"shelf": shelves, "size": [float(n) for n in range(120)], "sold": [0, 1] * 60})
    rows.write_parquet(tmp_path / "train.parquet")
    data = load_dataset(str(tmp_path / "train.parquet"), label="sold", task="binary")
    model = export_saved_model(build_model("wide_deep", data), data, tmp_path / "model")
    today = pl.DataFrame({"shelf": ["007", "7", "008"], "size": [1, 1, 1]})
    expected = load_saved_model(model)({"shelf": ["007", "7", "008"], "size": [1.0] * 3})["probabilities"]
    assert len({tuple(row) for row in expected}) == 3
    today.write_csv(tmp_path / "today.csv")
    with sqlite3.connect(tmp_path / "today.db") as database:
        database.execute("create table today (shelf text, size integer)")
        database.executemany("insert into today values (?, ?)", today.rows())
    database.close()
    sources = {"today.csv": None, f"sqlite:///{tmp_path}/today.db": "select * from today"}
    for given, query in sources.items():
        place = given if query else tmp_path / given
        predict_table(model, place, tmp_path / "scores.parquet", query=query, replace=True)
        np.testing.assert_allclose(pl.read_parquet(tmp_path / "scores.parquet")["probabilities"], expected, atol=1e-6)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(model: Path, source: Path, output: Path, *options: str) -> subprocess.Popen:
    """`mlkit predict` in parts of 20 rows, in a process of its own."""
    code = "import mlkit.serving.batch_predict as p, sys; p._CHUNK_ROWS = 20; from mlkit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "predict", model, "--input", source, "--output", output, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_job_resumes(
    shop: tuple[Path, pl.DataFrame], official: dict[str, np.ndarray], source: Path, tmp_path: Path
) -> None:
    output, parts = tmp_path / "scores.parquet", tmp_path / ".scores.parquet.parts"
    first = start(shop[0], source, output)
    wait_until(lambda: list(parts.glob("part-*.parquet")))
    answering = psutil.Process(first.pid).children()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_until(lambda: not any(map(is_alive, answering)))
    assert not output.exists()
    finished = list(parts.glob("part-*.parquet"))
    with pytest.raises(InputError, match=r"another key. The same command"):
        predict_table(shop[0], source, output, key=["order"])
    second = start(shop[0], source, output, "--json")
    stdout, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert json.loads(stdout)["rows_resumed"] >= 20 * len(finished)
    check(pl.read_parquet(output), official)
    assert left_in(tmp_path) == ["orders.parquet", "scores.parquet"]


@pytest.mark.usefixtures("small_parts")
def test_a_process_that_is_killed_is_an_error_and_what_is_finished_stays(
    shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path
) -> None:
    def kill_one(answered: int, total: int) -> None:
        if answered == 100:
            for child in psutil.Process().children():
                if "predict_chunks" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)

    output = tmp_path / "scores.parquet"
    output.write_text("older")
    with pytest.raises(MlkitError, match=r"signal 9, perhaps for lack of memory.*the same command goes on"):
        predict_table(shop[0], source, output, replace=True, progress=kill_one)
    assert left_in(tmp_path) == [".scores.parquet.parts", "orders.parquet", "scores.parquet"]
    assert output.read_text() == "older"
    done = predict_table(shop[0], source, output, replace=True)
    assert (done.rows, done.rows_resumed > 0) == (ROWS, True)


def test_bad_input_is_refused_before_anything_is_written(
    shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.parquet"
    pl.read_parquet(source).rename({"price": "prize"}).write_parquet(tmp_path / "renamed.parquet")
    pl.read_parquet(source).rename({"price": "prize"}).write_csv(tmp_path / "renamed.csv")
    pl.read_parquet(source).head(0).write_parquet(tmp_path / "empty.parquet")
    (tmp_path / "torn.parquet").write_bytes(source.read_bytes()[:-50])
    before = left_in(tmp_path)
    for name in ("renamed.parquet", "renamed.csv"):
        with pytest.raises(DatasetError, match=r"no column 'price'.*'prize'"):
            predict_table(shop[0], tmp_path / name, output)
    with pytest.raises(DatasetError, match="no column 'ordre'"):
        predict_table(shop[0], source, output, key=["ordre"])
    with pytest.raises(DatasetError, match=r"torn.parquet"):
        predict_table(shop[0], tmp_path / "torn.parquet", output)
    with pytest.raises(DatasetError, match="no rows"):
        predict_table(shop[0], tmp_path / "empty.parquet", output)
    with pytest.raises(DatasetError, match="no file"):
        predict_table(shop[0], tmp_path / "nowhere.parquet", output)
    with pytest.raises(NotFoundError):
        predict_table(tmp_path / "nowhere", source, output)
    with pytest.raises(InputError, match="column 'run' of its own"):
        predict_table(shop[0], source, output, key=["run"])
    with pytest.raises(InputError, match="At least one process"):
        predict_table(shop[0], source, output, processes=0)
    assert left_in(tmp_path) == before


def test_what_only_the_rows_show_ends_it_without_a_result(
    shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path
) -> None:
    rows = pl.read_parquet(source)
    rows.with_columns(price=pl.lit("dear")).write_parquet(tmp_path / "typed.parquet")
    rows.drop("order").write_parquet(tmp_path / "spoilt.parquet", compression="uncompressed")
    content = bytearray((tmp_path / "spoilt.parquet").read_bytes())
    content[4:600] = b"\xff" * 596  # pages, not the footer
    (tmp_path / "spoilt.parquet").write_bytes(content)
    refused = {"typed": "rows 1 to 600: Feature 'price' is declared as number", "spoilt": "cannot be read"}
    for name, message in refused.items():
        with pytest.raises(DatasetError, match=f"{name}.parquet.*{message}"):
            predict_table(shop[0], tmp_path / f"{name}.parquet", tmp_path / "scores.parquet")
    assert left_in(tmp_path) == ["orders.parquet", "spoilt.parquet", "typed.parquet"]


def test_a_result_is_replaced_only_on_request_and_only_by_a_complete_one(
    shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scores.parquet"
    output.write_text("precious")
    with pytest.raises(InputError, match=r"exists. --replace"):
        predict_table(shop[0], source, output)
    with pytest.raises(DatasetError):
        predict_table(shop[0], source, output, key=["ordre"], replace=True)
    assert output.read_text() == "precious"
    predict_table(shop[0], source, output, replace=True)
    assert pl.read_parquet(output).height == ROWS


def test_two_do_not_write_one_result(shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".scores.parquet.parts"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another process"):
            predict_table(shop[0], source, tmp_path / "scores.parquet")
    assert folder.is_dir()


def test_a_full_disk_is_named(shop: tuple[Path, pl.DataFrame], source: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"0" * 230_000)
    with pytest.raises(StorageError, match="No space left on device"):
        predict_table(shop[0], source, small_disk / "scores.parquet")
    assert not (small_disk / "scores.parquet").exists()
    (small_disk / "ballast").unlink()
    assert predict_table(shop[0], source, small_disk / "scores.parquet").rows == ROWS


CLEAN = [
    {"step": "trim"},
    {"step": "range", "column": "age", "minimum": 0, "maximum": 110},
    {"step": "missing", "columns": ["size"], "rule": "fill", "value": 1.0},
    {"step": "missing", "columns": ["bought"], "rule": "drop"},
]


def visits(rows: int) -> pl.DataFrame:
    """Visits of which every seventh has an impossible age, and some other faults that can be mended."""
    ages = [400 if row % 7 == 3 else 18 + row % 60 for row in range(rows)]
    devices = [(" phone", "phone", "tablet ")[row % 3] for row in range(rows)]
    sizes = [None if row % 5 == 0 else row % 11 / 2 for row in range(rows)]
    return pl.DataFrame({"visit": range(rows), "age": ages, "device": devices, "size": sizes})


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training rows were cleaned and validated against a schema."""
    folder = tmp_path_factory.mktemp("cleaned")
    rows = visits(700).drop("visit").with_columns(bought=pl.Series(["yes", "no"] * 350))
    rows.write_parquet(folder / "train.parquet")
    schema = schema_text(infer_schema(describe(clean(rows, CLEAN).table), label="bought"))
    data = load_dataset(folder / "train.parquet", "bought", clean=CLEAN, schema=schema)
    with RunStore(folder / "runs").create("train") as run:
        export_saved_model(build_model("linear", data), data, run)
        run.log_data(data.record())
    return run.folder


@pytest.mark.usefixtures("small_parts")
def test_rows_are_cleaned_as_in_training_and_quarantined_rows_are_written(cleaned: Path, tmp_path: Path) -> None:
    rows, source = visits(350), tmp_path / "today.parquet"
    rows.write_parquet(source)
    done = predict_table(cleaned, source, tmp_path / "scores.parquet", key=["visit"], processes=1)
    scores, quarantine = pl.read_parquet(done.path), pl.read_parquet(tmp_path / "scores.quarantine.parquet")
    expected = clean(rows, CLEAN[:-1])
    assert scores["visit"].to_list() == [row for row in range(350) if row % 7 != 3]
    assert (done.rows, done.quarantined, done.quarantine) == (300, 50, tmp_path / "scores.quarantine.parquet")
    assert quarantine["visit"].to_list() == quarantine["_row"].to_list() == [row for row in range(350) if row % 7 == 3]
    assert quarantine["_value"].unique().to_list() == ["400"]
    model = load_saved_model(cleaned / "saved_model")
    answers = model({name: expected.table[name].to_list() for name in model.features})
    np.testing.assert_allclose(scores["probabilities"].to_numpy(), answers["probabilities"], atol=1e-5)

    with pytest.raises(InputError, match=r"scores\.parquet exists"):
        predict_table(cleaned, source, tmp_path / "scores.parquet")
    rows.filter(pl.col("age") < 400).write_csv(tmp_path / "today.csv")
    again = predict_table(cleaned, tmp_path / "today.csv", tmp_path / "scores.parquet", replace=True, processes=1)
    unkeyed = pl.read_parquet(again.path)
    assert (again.quarantined, again.quarantine, unkeyed["row"].to_list()) == (0, None, list(range(300)))
    np.testing.assert_allclose(unkeyed["probabilities"].to_numpy(), answers["probabilities"], atol=1e-5)
    assert left_in(tmp_path) == ["scores.parquet", "today.csv", "today.parquet"]


def test_rows_that_violate_the_schema_get_no_predictions(cleaned: Path, tmp_path: Path) -> None:
    visits(100).with_columns(device=pl.lit("toaster")).write_parquet(tmp_path / "today.parquet")
    with pytest.raises(DataValidationError, match="toaster"):
        predict_table(cleaned, tmp_path / "today.parquet", tmp_path / "scores.parquet")
    assert left_in(tmp_path) == ["today.parquet"]


PEAK = """
import json, sys, threading
from pathlib import Path
from mlkit.data.materialize import plan_chunks, materialize
source, folder, query = sys.argv[1:]
done, peak = threading.Event(), 0
def watch():  # memory of its own: a file that is mapped can be given back at any time
    global peak
    while not done.wait(0.005):
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        peak = max(peak, (resident - shared) * 4096 / 2**20)
threading.Thread(target=watch, daemon=True).start()
files = materialize(source, Path(folder), ["note", "age"], query=query or None)
done.set()
print(json.dumps({"rows": sum(part["rows"] for part in plan_chunks(files)), "megabytes": peak}))
"""


def write_long(rows: int, file: Path) -> str:
    """So many rows with long texts as a database or in a file; where they are, as a source."""
    table = pl.select(note=pl.int_range(rows).cast(pl.String).str.zfill(400)).with_columns(age=pl.lit(30.0))
    if file.suffix != ".db":
        write_table(table, file)
        return str(file)
    with sqlite3.connect(file) as database:
        database.execute("create table notes (note text, age real)")
        database.executemany("insert into notes values (?, ?)", table.iter_rows())
    database.close()
    return f"sqlite:///{file}"


@pytest.mark.parametrize("name", ["notes.csv.gz", "notes.db"])
def test_memory_does_not_grow_with_the_source(name: str, tmp_path: Path) -> None:
    measurements = []
    for rows in (800_000, 1_600_000):
        source = write_long(rows, tmp_path / f"{rows}-{name}")
        query = "select * from notes" if name.endswith(".db") else ""
        command = [sys.executable, "-c", PEAK, source, tmp_path / str(rows), query]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        measurements.append(json.loads(done.stdout))
    assert [measurement["rows"] for measurement in measurements] == [800_000, 1_600_000]
    # in memory the rows more take 320 megabytes
    assert measurements[1]["megabytes"] < measurements[0]["megabytes"] + 150, measurements


def test_images_are_no_table(tmp_path: Path) -> None:
    data = load_dataset("digits")
    model = export_saved_model(build_model("linear", data), data, tmp_path / "digits")
    with pytest.raises(ModelError, match="'image', which is no single value"):
        predict_table(model, tmp_path / "rows.parquet", tmp_path / "scores.parquet")


def test_the_command_predicts_and_suggests_the_next_step(
    shop: tuple[Path, pl.DataFrame], source: Path, tmp_path: Path
) -> None:
    common = ("predict", str(shop[0]), "--input", "orders.parquet", "--output", "scores.parquet", "--key", "order")
    result = run_cli(*common, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "600" in result.stdout
    assert "mlkit data describe" in result.stdout
    assert result.stderr == ""
    again = run_cli(*common, folder=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--replace" in again.stderr


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, pl.DataFrame]:
    """A registry with a version of a model of wine, whose run also holds a conversion; and that run."""
    folder, data = tmp_path_factory.mktemp("registered"), load_dataset("wine")
    with RunStore(folder / "runs").create("train", notebook="nbs/jobs/train.ipynb") as run:
        model = build_model("linear", data)
        export_saved_model(model, data, run)
        convert_model(model, data, run, kinds=["float32"])
        run.log_data(data.record())
    Registry(folder / "models").register(run, "wine", force=True)
    return folder, run.id, data.table


@pytest.mark.parametrize(
    ("reference", "precision", "names"),
    [("wine", "savedmodel", ("wine", 1)), ("wine/1", "float32", ("wine", 1)), ("latest", "savedmodel", (None, None))],
)
def test_each_prediction_names_its_version_and_run(
    reference: str, precision: str, names: tuple, registered: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, run, rows = registered
    monkeypatch.chdir(folder)
    done = predict_table(reference, "wine", tmp_path / "scores.parquet", precision=precision, key=["cultivar"])
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    model, version = names
    assert done.names == {"model": model or run, "version": version, "run": run}
    assert scores.select("model", "version", "run").unique().rows() == [(model or run, version, run)]
    assert scores["cultivar"].to_list() == rows["cultivar"].to_list()
    inputs = load_dataset("wine").inputs
    expected = answers_of(load_saved_model(folder / "models" / "wine"), inputs)["probabilities"]
    np.testing.assert_allclose(scores["probabilities"].to_numpy(), expected, atol=1e-5)


def test_a_modified_version_makes_no_predictions(
    registered: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(registered[0], folder)
    monkeypatch.chdir(folder)
    file = Registry().find("wine").path / "saved_model.pb"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(StorageError, match=r"saved_model\.pb"):
        predict_table("wine", "wine", tmp_path / "scores.parquet")
    assert left_in(tmp_path) == ["copy"]
