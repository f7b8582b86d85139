"""Loading of data sets: other processes, splits, labels, invalid files, no network, size."""

import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import Statistics, load_dataset, read_table, reload_dataset
from mlkit.data.dataset import _source_record
from mlkit.data.io import fingerprint
from mlkit.data.splits import SPLITS
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError, DataValidationError

ADULT = Path(__file__).parents[2] / "shared" / "data" / "adult.csv"
ADULT_COLUMNS = [
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
    "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
]  # fmt: skip


def split_of(dataset, column):
    """{value of the column: split}; fails where a value is in two."""
    owner = {}
    for split in SPLITS:
        for value in dataset.table[column].gather(dataset.splits[split]).to_list():
            assert owner.setdefault(value, split) == split
    return owner


# -- in another process -------------------------------------------------------------------------------------------


def in_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_module_imports_no_tensorflow():
    loaded = in_process(
        "import sys, mlkit.data.dataset as d; d.load_dataset('wine'); print('tensorflow' in sys.modules)"
    )
    assert loaded == "False"


def test_splits_and_fingerprints_are_the_same_in_another_process():
    code = (
        "import json; from mlkit.data import load_dataset as l\n"
        "print(json.dumps([{**d.record(), 'rows': d.splits['test'].tolist()} for d in"
        "  [l('wine'), l('digits'), l('retail', rows=3000, split='hash'), l('retail', rows=3000, split='time')]]))"
    )
    expected = [
        load_dataset("wine"),
        load_dataset("digits"),
        load_dataset("retail", rows=3000, split="hash"),
        load_dataset("retail", rows=3000, split="time"),
    ]
    assert json.loads(in_process(code)) == [{**d.record(), "rows": d.splits["test"].tolist()} for d in expected]


def test_splits_do_not_change_between_versions_of_the_kit(tmp_path):
    assert load_dataset("wine").splits["test"][:8].tolist() == [18, 32, 33, 34, 38, 51, 60, 77]
    table = pl.DataFrame({"id": range(100, 160), "x": range(60), "y": [0, 1] * 30})
    table.write_csv(tmp_path / "t.csv")
    dataset = load_dataset(tmp_path / "t.csv", "y", split="hash", key="id")
    assert dataset.table["id"].gather(dataset.splits["test"]).to_list() == [129, 131, 135, 139, 151]


# -- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes", "retail"])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_splits_cover_all_rows_once(name, seed):
    options = {"rows": 4000} if name == "retail" else {}
    dataset = load_dataset(name, seed=seed, **options)
    together = np.concatenate([dataset.splits[split] for split in SPLITS])
    assert np.array_equal(np.sort(together), dataset.splits["all"])
    shares = [len(dataset.splits[split]) / len(together) for split in SPLITS]
    assert np.allclose(shares, (0.8, 0.1, 0.1), atol=0.01)
    if dataset.classes:
        per_class = np.stack(
            [np.bincount(dataset.labels[dataset.splits[split]], minlength=len(dataset.classes)) for split in SPLITS]
        )
        expected = np.outer((0.8, 0.1, 0.1), np.bincount(dataset.labels))
        assert np.abs(per_class - expected).max() <= max(2, 0.02 * per_class.max())


def test_a_key_keeps_its_split_while_data_grow(tmp_path):
    table = retail(rows=6000, days=20)
    days = table["day"].unique().sort()
    before, seen = {}, 0
    for until in (5, 12, 20):
        table.filter(pl.col("day") <= days[until - 1]).sample(fraction=1, shuffle=True, seed=until).write_parquet(
            tmp_path / "shop.parquet"
        )
        dataset = load_dataset(tmp_path / "shop.parquet", "purchased", split="hash", key="user_id")
        current = split_of(dataset, "user_id")
        assert {user: current[user] for user in before} == before
        assert len(current) > seen
        before, seen = current, len(current)


def test_a_point_in_time_is_in_one_split_and_order_holds(tmp_path):
    generator = np.random.default_rng(0)
    table = pl.DataFrame(
        {"when": generator.integers(0, 12, 500), "x": generator.random(500), "y": generator.random(500)}
    )
    table.write_csv(tmp_path / "t.csv")
    dataset = load_dataset(tmp_path / "t.csv", "y", split="time", key="when")
    owner = split_of(dataset, "when")
    order = [SPLITS.index(owner[moment]) for moment in sorted(owner)]
    assert order == sorted(order)
    assert "when" not in dataset.features


def test_duplicate_rows_are_in_one_split(tmp_path):
    generator = np.random.default_rng(1)
    table = pl.DataFrame(
        {
            "a": generator.integers(0, 6, 2000),
            "b": pl.Series(["x", "", None, "y"])[generator.integers(0, 4, 2000)],
            "y": generator.integers(0, 2, 2000),
        }
    )
    table.write_parquet(tmp_path / "t.parquet")
    dataset = load_dataset(tmp_path / "t.parquet", "y")
    rows = dataset.inputs.with_columns(
        pl.Series("split", np.select([np.isin(dataset.splits["all"], dataset.splits[s]) for s in SPLITS], [0, 1, 2]))
    )
    assert rows.group_by("a", "b").agg(pl.col("split").n_unique())["split"].max() == 1


def test_statistics_come_from_the_training_split_only(tmp_path):
    values = np.arange(1000.0)
    pl.DataFrame({"day": np.arange(1000), "x": values, "kind": ["old"] * 900 + ["new"] * 100, "y": values}).write_csv(
        tmp_path / "t.csv"
    )
    dataset = load_dataset(tmp_path / "t.csv", "y", split="time", key="day")
    spec = dataset.features["x"]
    assert (spec.minimum, spec.maximum) == (0.0, 799.0)
    assert np.isclose(spec.mean, values[:800].mean())
    assert np.isclose(spec.std, values[:800].std())
    assert dataset.features["kind"].vocabulary == ("old",)


# -- labels and features ------------------------------------------------------------------------------------------


def test_rows_without_a_label_are_dropped_and_counted(tmp_path):
    rows = "".join(f"{i},{'ab'[i % 2] if i % 5 else ''}\n" for i in range(100))
    (tmp_path / "t.csv").write_text("x,y\n" + rows)
    dataset = load_dataset(tmp_path / "t.csv", "y")
    assert len(dataset.labels) == 80
    assert dataset.warnings == ("20 of 100 rows have no 'y' and were dropped.",)
    assert dataset.record()["warnings"] == list(dataset.warnings)


def test_columns_become_arrays(tmp_path):
    lines = ["n,flag,day,word,void,y"]
    lines += [
        f"{i if i % 3 else ''},{'true' if i % 2 else 'false'},2026-01-{i + 1:02d},{'w' * (i % 4)},,{i % 2}"
        for i in range(30)
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    dataset = load_dataset(tmp_path / "t.csv", "y")
    arrays = dataset.arrays
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "n": (np.dtype("float32"), (30,)),
        "flag": (np.dtype("float32"), (30,)),
        "day": (np.dtype(object), (30,)),
        "word": (np.dtype(object), (30,)),
        "void": (np.dtype(object), (30,)),
    }
    assert np.isnan(arrays["n"][0])
    assert arrays["n"][1] == 1
    assert arrays["word"][:3].tolist() == ["", "w", "ww"]
    assert arrays["day"][0] == "2026-01-01"
    assert dataset.features["void"].vocabulary == ()
    assert dataset.features["n"].missing
    assert not dataset.features["flag"].missing


def test_the_vocabulary_is_bounded_and_ordered():
    dataset = load_dataset("retail", rows=3000, max_vocabulary=7)
    users = dataset.take("train")[0]["user_id"]
    names, counts = np.unique(users, return_counts=True)
    expected = [name for _, name in sorted(zip(-counts, names, strict=True))][:7]
    assert dataset.features["user_id"].vocabulary == tuple(expected)


@pytest.mark.parametrize(
    ("label", "hidden"), [(None, {"clicked", "purchased"}), ("clicked", {"clicked", "purchased"}), ("price", {"price"})]
)
def test_retail_labels_never_leak(label, hidden):
    dataset = load_dataset("retail", label, rows=2000)
    assert not hidden & set(dataset.features)
    assert not {"clicked", "purchased"} & set(dataset.features)


def test_nested_and_infinite_columns_are_refused_until_ignored(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"tags": ["a"], "x": i, "y": i % 2}) + "\n" for i in range(40))
    )
    with pytest.raises(DatasetError, match="Column 'tags' holds List"):
        load_dataset(tmp_path / "t.jsonl", "y")
    assert list(load_dataset(tmp_path / "t.jsonl", "y", ignore=["tags"]).features) == ["x"]
    (tmp_path / "t.csv").write_text("x,z,y\n" + "inf,1,a\n2,2,b\n" * 20)
    with pytest.raises(DatasetError, match="'x' has 20 values that are infinite"):
        load_dataset(tmp_path / "t.csv", "y")
    with pytest.raises(DatasetError, match="No feature is left"):
        load_dataset(tmp_path / "t.csv", "y", ignore=["x", "z"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\n1,a\n2,a\n", "'y' is constant: always 'a'"),
        ("x,y\n1,\n2,\n", "no value in any of 2 rows"),
        ("x,z\n1,a\n2,b\n", "Label column 'y' is not in t. Columns: x, z"),
        ("x,y\n1,2026-01-01\n2,2026-01-02\n", "holds Date; a label is"),
    ],
)
def test_labels_that_cannot_be_learned(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path / "t.csv", "y")


# -- files --------------------------------------------------------------------------------------------------------


def assert_rejected(path, *messages, **options):
    with pytest.raises(DatasetError) as caught:
        read_table(path, **options)
    for text in messages:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("long.csv", b"a,b\n1,2\n3,4,5\n", ("Line 3", "has 3 fields", "first line has 2")),
        ("short.csv", b"a,b,c\n1,2,3\n4,5\n6,7,\n", ("Line 3", "has 2 fields", "first line has 3")),
        ("quoted.csv", b'a,b,c\n"x, y",2,3\n"p\nq",5\n6,7,\n', ("Line 4", "has 2 fields")),
        ("bytes.csv", "a,b\nZürich,2\n".encode("latin-1"), ("byte 5 (line 2)", "0xfc", "encoding='latin-1'")),
        ("wide.csv", "a,b\nx,2\n".encode("utf-16"), ("encoding='utf-16'",)),
        ("headless.csv", b"1.5,2\n2.5,3\n", ("no header", "columns=[")),
        ("empty.csv", b"", ("is empty",)),
        ("empty.tsv", b"", ("is empty",)),
        ("empty.jsonl", b"", ("is empty",)),
        ("header.csv", b"a,b\n", ("no rows", "a, b")),
        ("twice.csv", b"a,b,a\n1,2,3\n", ("more than one column named 'a'",)),
        ("index.csv", b",a\n0,1\n", ("Column 1", "no name")),
        ("stray.csv", b'a,b\n5" disk,2\n', ("Line 2", "unbalanced quote")),
        ("broken.parquet", b"PAR1nothing", ("not a complete Parquet file",)),
        ("empty.parquet", b"", ("not a complete Parquet file",)),
        ("broken.jsonl", b'{"a": 1}\n\n{"a": oops}\n', ("Line 3", "not valid JSON")),
        ("list.jsonl", b'{"a": 1}\n[1, 2]\n', ("Line 2", "not a JSON object")),
        ("bytes.jsonl", b'{"a": "\xe9"}\n', ("byte 7 (line 1)",)),
        ("table.xlsx", b"PK", ("ends in '.xlsx'", ".csv, .tsv, .parquet, .jsonl, .ndjson")),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, messages):
    (tmp_path / name).write_bytes(content)
    assert_rejected(tmp_path / name, name, *messages)


def test_a_truncated_parquet_file(tmp_path):
    retail(rows=500).write_parquet(tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    assert_rejected(tmp_path / "t.parquet", "not a complete Parquet file")


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "adult.csv").write_text("a,b\n1,2\n")
    assert_rejected(tmp_path / "adlut.csv", "no file", "Did you mean 'adult.csv'?")
    assert_rejected(tmp_path / "nowhere" / "adult.csv", "no file")
    assert_rejected(tmp_path / "*.parquet", "No file matches")
    assert_rejected(tmp_path, "is a folder", "*.parquet")
    assert_rejected([], "empty list")
    monkeypatch.setattr(
        Path, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "x"))
    )
    assert_rejected(tmp_path / "adult.csv", "cannot be read", "Permission denied")


def test_encodings_and_separators(tmp_path):
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-8-sig"):
        (tmp_path / "t.csv").write_bytes("stadt;n\nZürich;1\nBern;2\n".encode(encoding))
        table = read_table(tmp_path / "t.csv", encoding=encoding, separator=";")
        assert table.to_dict(as_series=False) == {"stadt": ["Zürich", "Bern"], "n": [1, 2]}
    (tmp_path / "bom.csv").write_bytes("a,b\n1,2\n".encode("utf-8-sig"))
    assert read_table(tmp_path / "bom.csv").columns == ["a", "b"]


def test_types_are_inferred_over_the_whole_file(tmp_path):
    (tmp_path / "t.csv").write_text("x,day\n" + "1,2026-01-01\n" * 30_000 + "1.5,\n")
    assert read_table(tmp_path / "t.csv").schema == {"x": pl.Float64, "day": pl.Date}
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n' * 30_000 + '{"x": 1.5, "late": "a"}\n')
    assert read_table(tmp_path / "t.jsonl").schema == {"x": pl.Float64, "late": pl.String}


def test_many_files_are_one_table(tmp_path):
    table = retail(rows=900)
    for part in range(3):
        table[part * 300 : (part + 1) * 300].write_csv(tmp_path / f"part-{part}.csv")
    assert fingerprint(read_table(tmp_path / "part-*.csv")) == fingerprint(table)
    table.drop("brand").write_csv(tmp_path / "part-3.csv")
    assert_rejected(tmp_path / "part-*.csv", "part-3.csv", "differ in columns: brand")


def test_the_fingerprint_forgets_the_file_format(tmp_path):
    table = retail(rows=2000, dirty=0.1)
    table.write_csv(tmp_path / "t.csv")
    table.write_parquet(tmp_path / "t.parquet", row_group_size=100)
    table.write_csv(tmp_path / "t.tsv", separator="\t")
    prints = {fingerprint(read_table(tmp_path / f"t.{end}")) for end in ("csv", "parquet", "tsv")}
    assert prints == {fingerprint(table)}
    moments = pl.Series("t", [1, 2]).cast(pl.Datetime("ms"))
    assert len({fingerprint(moments.dt.cast_time_unit(unit).to_frame()) for unit in ("ms", "us", "ns")}) == 1
    nanoseconds = pl.Series("t", [1, 2]).cast(pl.Datetime("ns")).to_frame()
    assert fingerprint(nanoseconds) != fingerprint(nanoseconds.with_columns(pl.col("t").dt.truncate("1us")))
    assert fingerprint(nanoseconds[:1]) != fingerprint(nanoseconds[1:])


# -- Keras' sets without a network --------------------------------------------------------------------------------


def test_no_network_is_said_clearly(monkeypatch, tmp_path):
    import keras
    from keras.src.utils import file_utils

    def no_network(*_):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(file_utils, "urlretrieve", no_network)
    monkeypatch.setattr(keras.config, "keras_home", lambda: str(tmp_path), raising=False)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path))
    with pytest.raises(DatasetError, match=r"'mnist' is not in Keras' cache and could not be fetched.*'digits'"):
        load_dataset("mnist")


def test_a_published_test_set_stays_the_test_split(monkeypatch):
    import keras

    generator = np.random.default_rng(0)
    train, test = ((generator.integers(0, 256, (n, 32, 32, 3), "uint8"), np.arange(n)[:, None] % 10) for n in (200, 40))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (train, test))
    dataset = load_dataset("cifar10")
    assert dataset.splits["test"].tolist() == list(range(200, 240))
    assert len(dataset.splits["validation"]) == 22
    assert dataset.classes[:2] == ("airplane", "automobile")
    assert dataset.features["image"].shape == (32, 32, 3)
    assert dataset.labels[:3].tolist() == [0, 1, 2]
    assert "published test set" in dataset.split_rule


# -- batches -------------------------------------------------------------------------------------------------------


def test_batches_repeat_under_op_determinism():
    code = """
import keras, numpy as np, tensorflow as tf
from mlkit.data import load_dataset
keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()
data = load_dataset("retail", rows=3000)
def orders():
    batches = data.to_tf(batch_size=100)
    return [np.concatenate([x["price"].numpy() for x, _ in batches]) for _ in range(3)]
a, b = orders(), orders()
assert all(map(np.array_equal, a, b)) and not np.array_equal(a[0], a[1])
inputs = {n: keras.Input((), name=n, dtype=s.dtype) for n, s in data.features.items()}
model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Reshape((1,))(inputs["price"])))
model.compile("adam", "mse")
history = model.fit(data.to_tf(batch_size=100), epochs=2, verbose=0)
assert data.to_tf(batch_size=100).cardinality() == 24
print("repeats", len(history.history["loss"]))
"""
    assert in_process(code).splitlines()[-1] == "repeats 2"


# -- the real thing -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ADULT.exists(), reason="adult.csv is not here")
def test_adult(tmp_path):
    adult = load_dataset(ADULT, "income", null_values="?")
    assert len(adult.labels) == 32561
    assert adult.classes == ("<=50K", ">50K")
    assert [name for name, spec in adult.features.items() if spec.missing] == [
        "workclass", "occupation", "native-country",
    ]  # fmt: skip
    headless = tmp_path / "adult.csv"
    headless.write_text("".join(ADULT.read_text().splitlines(keepends=True)[1:]))
    assert_rejected(headless, "no header", "columns=[")
    assert fingerprint(read_table(headless, columns=ADULT_COLUMNS)) == fingerprint(read_table(ADULT))
    with pytest.raises(DatasetError, match="Did you mean 'income'"):
        load_dataset(ADULT, "incom")


STEPS = [
    {"step": "trim", "columns": ["device"]},
    {"step": "range", "column": "quantity", "minimum": 1},
]
RULES = """
feature { name: "quantity" type: INT presence { min_fraction: 1 } int_domain { min: 1 } }
feature { name: "device" type: BYTES domain: "device" }
feature { name: "purchased" type: INT }
string_domain { name: "device" value: "desktop" value: "mobile" value: "tablet" }
"""


@pytest.fixture
def dirty(tmp_path):
    table = retail(rows=3000, dirty=0.05).select("quantity", "device", "price", "purchased")
    table.write_csv(tmp_path / "visits.csv")
    (tmp_path / "schema.pbtxt").write_text(RULES)
    return tmp_path / "visits.csv"


def test_rows_that_break_the_schema_stop_everything(dirty):
    with pytest.raises(DataValidationError, match=r"quantity"):
        load_dataset(dirty, "purchased", schema=dirty.parent / "schema.pbtxt")


def test_cleaned_and_checked_rows_are_recorded_and_loaded_again(dirty, tmp_path):
    table = read_table(dirty)
    soiled = int((table["quantity"] < 1).sum())
    dataset = load_dataset(dirty, "purchased", clean=STEPS, schema=dirty.parent / "schema.pbtxt")
    assert len(dataset.labels) == table.height - soiled
    assert set(dataset.features["device"].vocabulary) == {"desktop", "mobile", "tablet"}
    assert dataset.warnings[0] == f"Cleaning has moved {soiled} rows and 0 values to the quarantine."
    dataset.save(tmp_path / "data")
    assert pl.read_parquet(tmp_path / "data" / "quarantine.parquet")["quantity"].to_list() == [-1] * soiled
    statistics = Statistics.from_json((tmp_path / "data" / "statistics.json").read_text())
    assert statistics.rows == dataset.sizes["train"]
    assert json.loads((tmp_path / "data" / "anomalies.json").read_text())

    record = json.loads(json.dumps(dataset.record()))
    (dirty.parent / "schema.pbtxt").unlink()  # the record holds its text
    again = reload_dataset(record)
    assert again.fingerprint == dataset.fingerprint
    assert record["cleaning"] == again.record()["cleaning"]
    assert len(reload_dataset(record, dirty).labels) == len(dataset.labels)


def test_the_domain_of_a_schema_is_the_vocabulary(dirty):
    lenient = RULES.replace('domain: "device"', 'domain: "device" distribution_constraints { min_domain_mass: 0.9 }')
    dataset = load_dataset(dirty, "purchased", clean=STEPS[1:], schema=lenient)
    assert " mobile " in dataset.table["device"].to_list()
    assert dataset.features["device"].vocabulary == ("desktop", "mobile", "tablet")
    given = load_dataset(
        dirty, "purchased", clean=STEPS[1:], schema=lenient, features={"device": {"max_vocabulary": 2}}
    )
    assert len(given.features["device"].vocabulary) == 2
    assert dataset.anomalies.warnings


def test_a_database_is_recorded_without_its_password(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "shop.db") as database:
        database.execute("create table visits (x real, y text)")
        database.executemany("insert into visits values (?, ?)", [(i, "ab"[i % 2]) for i in range(100)])
    dataset = load_dataset(f"sqlite:///{tmp_path}/shop.db", "y", query="select * from visits")
    assert dataset.name == "shop"
    assert reload_dataset(dataset.record()).fingerprint == dataset.fingerprint
    assert _source_record("postgresql://ann:secret@host/shop") == {"source": "postgresql://ann@host/shop"}


def test_images_have_no_schema():
    with pytest.raises(DatasetError, match="are for tables"):
        load_dataset("digits", clean=STEPS)
