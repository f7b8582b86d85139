"""What a feature is from the file to the served answer: the same bits in training, in Keras and in another process."""

import json
import os
import pickle
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import describe, load_dataset, reload_dataset
from mlkit.data.feature_specs import cast_columns, plan_features, read_features, to_feature_values
from mlkit.errors import DatasetError, ModelError

ROWS = 3000
FEATURES = {
    "standard": {"normalise": "standard"},
    "hours-per-week": {"normalise": "minmax"},
    "log": {"normalise": "log", "missing": True},
    "bare": {"normalise": "none"},
    "bounded": {"type": "bucket", "boundaries": [-1, 0, 0.5]},
    "quantiles": {"type": "bucket", "count": 7, "one_hot": True},
    "Größe": {"type": "category", "max_vocabulary": 5, "unknown": 3},
    "postcode": "category",
    "given": {"type": "category", "vocabulary": ["red", "green"], "one_hot": True},
    "user": {"type": "hash", "buckets": 50, "embedding": 3},
    "salted": {"type": "hash", "buckets": 7, "salt": 3, "one_hot": True},
    "comment": {"type": "text", "length": 6},
    "title": {"type": "text", "buckets": 40, "length": 4, "one_hot": True},
    "sent/at": {"type": "datetime", "parts": ["days", "month", "day", "weekday", "hour", "minute"]},
    "born": {"type": "datetime", "cyclic": False, "parts": ["days", "weekday", "month"]},
    "row": "drop",
    "bounded x postcode": {"type": "cross", "buckets": 30},
    "user x Größe x salted": {"type": "cross", "buckets": 100, "embedding": 4},
}
WORDS = ["good", "Bad", "größe", "ΑΣ", "it's", "日本", "🙂", "x-y", "1.5%", "[UNK]", "\u00a0", "naïve"]
ODD_TEXTS = ["", " ", "[UNK]", "never seen", "Ünïcödé 🙂", "\x00", "a" * 5000, "007", "7", "nan", "-", "\ud7ff"]
ODD_NUMBERS = [np.nan, 0.0, -0.0, 1e38, -1e38, 3.4028235e38, 1e-45, -1e-38, 16777217.0, 0.1]
ODD_MOMENTS = [
    *(
        "",
        "soon",
        "2026-02-30",
        "2026-13-01",
        "0000-01-01",
        "0001-01-01",
        "9999-12-31T23:59:59.999999999",
        "2024-02-29",
    ),
    *("1900-02-29", "2000-02-29T24:00", "2026-01-01T23:30-01:00", "0001-01-01T00:30+01:00", "2026-01-01T10:15:00Z"),
    *(
        "2026-01-01 10:15",
        "2026-1-1",
        "2026-01-01T10",
        " 2026-01-01 ",
        "2026-01-01T10:15:00+0530",
        "\u0662\u0660\u0662\u0666-01-01",
    ),
    *("2026-01-01T10:15:60", "2026-01-01T", "31.1.2026", "2026-01-01T10:15:00.1234567890", "2026-01-01\n", "1e9"),
]


def everything(rows: int = ROWS) -> pl.DataFrame:
    """A table with a column for every kind of feature, every one with holes."""
    rng = np.random.default_rng(11)
    start = datetime(2020, 2, 28)
    sentences = [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(rows)]
    columns = {
        "standard": rng.normal(40, 10, rows),
        "hours-per-week": rng.uniform(-5, 60, rows),
        "log": rng.lognormal(3, 3, rows) * rng.choice([-1, 1], rows),
        "bare": rng.normal(0, 1, rows),
        "constant": [1.5] * rows,
        "bounded": rng.normal(0, 1, rows),
        "quantiles": rng.integers(0, 100, rows),
        "Größe": rng.choice(["klein", "groß", "[UNK]", *map(str, range(9))], rows),
        "logits": rng.choice(["x", "y"], rows),
        "postcode": rng.choice(["01067", "80331", "00007"], rows),
        "given": rng.choice(["red", "green", "blue"], rows),
        "user": [f"u{number}" for number in rng.integers(0, 400, rows)],
        "salted": rng.integers(0, 400, rows),
        "comment": sentences,
        "title": rng.permutation(sentences),
        "sent/at": [(start + timedelta(seconds=int(second))).isoformat() for second in rng.integers(0, 2**27, rows)],
        "born": [(start - timedelta(days=int(day))).date().isoformat() for day in rng.integers(0, 30_000, rows)],
        "on": [(date(2026, 1, 1) + timedelta(days=int(day))).isoformat() for day in rng.integers(0, 60, rows)],
        "row": range(rows),
    }
    kept = {name: [None if rng.random() < 0.1 else value for value in values] for name, values in columns.items()}
    kept["constant"] = columns["constant"]
    return pl.DataFrame(kept).with_columns(void=pl.lit(None, pl.String), y=pl.Series(rng.choice(["no", "yes"], rows)))


def odd_rows(dataset, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Requests nobody has trained on: a third of the texts and some of the numbers are odd."""
    rng = np.random.default_rng(12)
    requests = {}
    for name, values in dataset.arrays.items():
        spec = dataset.features[name]
        odd = ODD_NUMBERS if spec.dtype == "float32" else ODD_MOMENTS if spec.type == "datetime" else ODD_TEXTS
        odd = np.array(odd, values.dtype)
        share = 0.03 if spec.dtype == "float32" else 0.3
        requests[name] = np.where(rng.random(rows) < share, rng.choice(odd, rows), rng.choice(values, rows))
    return requests


ELSEWHERE = """
import pickle, sys
import tensorflow as tf
folder, requests = sys.argv[1:]
with open(requests, "rb") as file:
    features, examples = pickle.load(file)
model = tf.saved_model.load(folder)
tensors = {name: tf.constant(values) for name, values in features.items()}
by_name = model.predict(tensors)
by_example = model.signatures["serving_examples"](examples=tf.constant(examples))
both = [{name: values.numpy() for name, values in answers.items()} for answers in (by_name, by_example)]
with open(requests, "wb") as file:
    pickle.dump(both, file)
"""


def served_elsewhere(path: Path, features: dict, examples: list[bytes], folder: Path) -> list[dict]:
    """Answers of a SavedModel in a process that knows TensorFlow alone, by name and by example."""
    requests = folder / "requests"
    requests.write_bytes(pickle.dumps((features, examples)))
    command = [sys.executable, "-c", ELSEWHERE, str(path), str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    return pickle.loads(requests.read_bytes())


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and first.tobytes() == second.tobytes()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "shop.csv"
    everything().write_csv(path)
    return load_dataset(path, "y", features=FEATURES)


@pytest.fixture(scope="module", params=["mlp", "wide_deep"])
def trained(request, shop):
    from mlkit.models import build_model

    model = build_model(request.param, shop)
    model.compile("adam", "binary_crossentropy")
    history = model.fit(shop.to_tf(batch_size=256), epochs=2, verbose=0)
    return model, history


# -- the same bits everywhere --


def test_every_kind_of_feature_is_served_as_it_was_trained(trained, shop, tmp_path):
    """Thousands of odd rows: Keras, and the SavedModel in another process, by name and as examples."""
    import tensorflow as tf

    from mlkit.export import export_saved_model
    from mlkit.export.saved_model import as_examples

    model, _ = trained
    path = export_saved_model(model, shop, tmp_path / "model")
    requests = odd_rows(shop)
    tensors = {name: tf.constant(values) for name, values in requests.items()}
    takes = {name: tf.TensorSpec([None], values.dtype) for name, values in tensors.items()}
    answers = tf.function(lambda features: model(features, training=False), input_signature=[takes])(tensors).numpy()
    holes = {name: [value or None for value in values] for name, values in requests.items() if values.dtype == object}
    named, examples = served_elsewhere(path, requests, as_examples(requests | holes), tmp_path)
    assert len(np.unique(answers)) > 0.8 * ROWS
    assert same_bits(named["probabilities"][:, 1:].copy(), answers)
    assert same_bits(named["probabilities"], examples["probabilities"])
    assert named["class"].tolist() == examples["class"].tolist()
    # The last bit is another one without a graph, where dense layers are not fused, and on some processors in a graph
    # for a known number of rows, where TensorFlow adds up in another order.
    for others in (model(tensors, training=False).numpy(), model.predict(tensors, batch_size=ROWS, verbose=0)):
        assert np.allclose(others, answers, rtol=0, atol=1e-6, equal_nan=True)


def test_preprocessing_gives_the_same_bits_with_and_without_a_graph(shop):
    import keras
    import tensorflow as tf

    from mlkit.models.preprocessing import SeededLayers, concatenate_features, encode_table

    make = SeededLayers(1)
    table = encode_table(shop.features, make)
    front = keras.Model(table.inputs, concatenate_features(table, make))
    tensors = {name: tf.constant(values) for name, values in odd_rows(shop).items()}
    assert same_bits(front(tensors).numpy(), front.predict(tensors, batch_size=ROWS, verbose=0))


def test_images_are_served_as_they_were_trained(tmp_path, digits):
    import tensorflow as tf

    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.export.saved_model import as_examples
    from mlkit.models import build_model

    model = build_model("cnn", digits)
    images = digits.arrays["image"][:200]
    png = [tf.io.encode_png(image.astype("uint8")).numpy() for image in images]
    path = export_saved_model(model, digits, tmp_path / "model")
    named, examples = served_elsewhere(path, {"image": images}, as_examples({"image": png}), tmp_path)
    assert same_bits(named["probabilities"], model({"image": images}).numpy())
    assert same_bits(named["probabilities"], examples["probabilities"])
    served = load_saved_model(path)
    for broken in (as_examples({"image": [b"no picture"]}), [b""]):
        with pytest.raises(ModelError, match="not what the model takes"):
            served.predict_examples(broken)


def test_the_training_pipeline_gives_what_direct_calls_give(trained, shop):
    """Batches of `to_tf`, and raw values made by hand from the rows of the table."""
    import tensorflow as tf

    model, _ = trained
    rows = shop.splits["validation"]
    batches = [model(features, training=False).numpy() for features, _ in shop.to_tf("validation", batch_size=100)]
    ready = cast_columns(shop.table.select(set(shop.features)), {k: v for k, v in shop.arguments["features"].items()
                                                                if k in shop.features})  # fmt: skip
    for number, start in enumerate(range(0, len(rows), 100)):
        chosen = ready[rows[start : start + 100]]
        raw = {column.name: tf.constant(to_feature_values(column).to_numpy()) for column in chosen}
        assert same_bits(model(raw, training=False).numpy(), batches[number])


def test_every_kind_of_feature_can_be_trained_and_saved(trained, shop, tmp_path):
    import keras
    import tensorflow as tf

    model, history = trained
    assert np.isfinite(history.history["loss"]).all()
    model.save(tmp_path / "shop.keras")
    raw = {name: tf.constant(values[:50]) for name, values in shop.arrays.items()}
    assert same_bits(keras.models.load_model(tmp_path / "shop.keras")(raw).numpy(), model(raw).numpy())


def test_half_precision_does_not_reach_raw_values(tmp_path):
    import keras
    import tensorflow as tf

    from mlkit.models.preprocessing import SeededLayers, concatenate_features, encode_table

    table = pl.DataFrame(
        {"id": [70001.0, 70002.0, 70003.0], "at": ["2026-01-31T10:15:01", "2026-01-31T10:15:02", None]}
    )
    overrides = read_features(
        {"id": {"type": "bucket", "boundaries": [70001.5, 70002.5], "one_hot": True}, "at": "datetime"}
    )
    ready = cast_columns(table, overrides)
    specs = plan_features(describe(ready), overrides)
    raw = {column.name: tf.constant(to_feature_values(column).to_numpy()) for column in ready}
    results = []
    for policy in ("float32", "mixed_float16"):
        keras.mixed_precision.set_global_policy(policy)
        try:
            front = encode_table(specs, SeededLayers(1))
            results.append(keras.Model(front.inputs, concatenate_features(front, SeededLayers(1)))(raw).numpy())
        finally:
            keras.mixed_precision.set_global_policy("float32")
    assert same_bits(*results)


def test_a_hundred_numbers_are_one_group():
    from mlkit.models import build_model

    def operations(count: int) -> int:
        table = pl.DataFrame({f"x{n}": np.random.default_rng(n).normal(size=50) for n in range(count)})
        specs = plan_features(describe(table))
        data = load_dataset("breast_cancer")
        object.__setattr__(data, "features", specs)
        return len(build_model("mlp", data).layers) - count

    assert operations(100) == operations(2)


# -- datetimes, parsed alike by Polars and by TensorFlow --


def test_polars_and_the_graph_read_the_same_moments():
    import tensorflow as tf

    from mlkit.models.preprocessing import DatetimeParser

    rng = np.random.default_rng(5)
    texts = [*ODD_MOMENTS]
    zones = ["", "Z", "+02:00", "-0330", " +14:59", "+15:00"]
    for _ in range(4000):
        clock = rng.choice(["", "T{:02}:{:02}", " {:02}:{:02}:{:02}", "T{:02}:{:02}:{:02}.{}"])
        day = f"{rng.integers(0, 10_000):04}-{rng.integers(0, 14):02}-{rng.integers(0, 33):02}"
        text = day + clock.format(*rng.integers(0, [26, 62, 62, 1000])) + (rng.choice(zones) if clock else "")
        if rng.random() < 0.1:
            place = rng.integers(len(text))
            text = text[:place] + rng.choice(list("0x- ")) + text[place + 1 :]
        texts.append(text)
    moments = cast_columns(pl.DataFrame({"at": texts}), {"at": {"type": "datetime"}})["at"]
    fields = DatetimeParser()([tf.constant(texts)]).numpy()[:, 0]
    assert (fields[:, 0] == 1).tolist() == moments.is_not_null().to_list()
    known = moments.is_not_null().to_numpy()
    assert 500 < known.sum() < 4000
    present_times = moments.drop_nulls()
    for place, part in enumerate(("month", "day", "weekday", "hour", "minute"), start=3):
        expected = getattr(present_times.dt, part)().to_numpy() - (part == "weekday")
        assert np.array_equal(fields[known, place], expected), part
    assert np.array_equal(fields[known, 1], present_times.dt.date().to_physical().to_numpy())
    days = present_times.to_physical().to_numpy() / 86_400e6
    assert np.abs(fields[known, 1].astype("float64") + fields[known, 2] - days).max() < 1e-6
    canonical = to_feature_values(moments).to_list()
    again = DatetimeParser()([tf.constant(canonical)]).numpy()[:, 0]
    assert np.array_equal(again, fields)


# -- what is kept with a run --


def test_a_text_that_looks_like_a_number_stays_what_it_is(tmp_path):
    rows = [f"{n % 7:03},{n % 7 + 0.5},{'ab'[n % 2]}\n" for n in range(70)]
    (tmp_path / "t.csv").write_text("zip,x,y\n" + "".join(rows))
    assert load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0)).features["zip"].type == "number"
    (tmp_path / "features.yaml").write_text("zip: category\n")
    data = load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0), features=tmp_path / "features.yaml")
    assert set(data.arrays["zip"]) == {f"{n:03}" for n in range(7)}
    record = json.loads(json.dumps(data.record()))
    again = reload_dataset(record)
    assert (again.features, again.fingerprint) == (data.features, data.fingerprint)
    (tmp_path / "new.csv").write_text("x,zip,y,extra\n1,005,a,1\n2,006,b,2\n")
    new = reload_dataset(record, tmp_path / "new.csv")
    assert list(new.features) == ["zip", "x"]
    assert new.arrays["zip"].tolist() == ["005", "006"]


def test_a_category_of_words_stays_text_in_new_data_of_digits(tmp_path):
    (tmp_path / "t.csv").write_text("code,y\n" + "007,a\nx1,b\n" * 20)
    record = load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0)).record()
    (tmp_path / "new.csv").write_text("code,y\n007,a\n008,b\n")
    assert reload_dataset(record, tmp_path / "new.csv").arrays["code"].tolist() == ["007", "008"]
    (tmp_path / "other.csv").write_text("cod,y\n007,a\n008,b\n")
    with pytest.raises(DatasetError, match="Did you mean 'cod'"):
        reload_dataset(record, tmp_path / "other.csv")


def test_new_data_of_another_kind_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n" + "1,a\n2,b\n" * 20)
    record = load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0)).record()
    (tmp_path / "new.csv").write_text("x,y\none,a\ntwo,b\n")
    with pytest.raises(DatasetError, match="'x' is declared as number, but the column holds String"):
        reload_dataset(record, tmp_path / "new.csv")
    (tmp_path / "void.csv").write_text("x,y\n,a\n,b\n")
    assert np.isnan(reload_dataset(record, tmp_path / "void.csv").arrays["x"]).all()


def test_what_was_declared_reaches_the_model_of_another_type_of_file(tmp_path):
    """Parquet knows types: numbers that are names become the texts that a request would hold."""
    ids = [7.0, 8.0, None, 7.0] * 20
    pl.DataFrame({"id": ids, "flag": [True, False] * 40, "y": ["a", "b"] * 40}).write_parquet(tmp_path / "t.parquet")
    kinds = {"id": "category", "flag": "category"}
    data = load_dataset(tmp_path / "t.parquet", "y", fractions=(1, 0, 0), features=kinds)
    assert set(data.arrays["id"]) == {"7", "8", ""}
    assert data.features["id"].vocabulary[0] == "7"
    assert set(data.features["flag"].vocabulary) == {"true", "false"}


# -- what cannot be --


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"prise": "bucket"}, "There is no column for feature 'prise'.*Did you mean 'price'"),
        ({"prise": "category"}, "'prise'.*Did you mean 'price'"),
        ({"price": "catgory"}, "no type 'catgory'.*Did you mean 'category'"),
        ({"price": {"normalize": "log"}}, "no option 'normalize'.*Did you mean 'normalise'"),
        ({"price": {"type": "bucket", "boundaries": [1, 1]}}, "boundaries = .*must be ascending"),
        ({"price": {"type": "bucket", "boundaries": [1, float("nan")]}}, "finite number"),
        ({"price": {"type": "bucket", "count": 1}}, "greater than or equal to 2"),
        ({"town": {"type": "category", "vocabulary": ["a", True]}}, "True is not text: put quotes around it"),
        ({"town": {"type": "category", "embedding": 0}}, "greater than or equal to 1"),
        ({"town": "number"}, "declared as number, but the column holds String; numbers are needed"),
        ({"town": "bucket"}, "declared as bucket"),
        ({"town": "datetime"}, "none of its values is like 2026-01-31T10:15:00; the first is 'Rome'"),
        ({"price": "datetime"}, "dates or texts like"),
        ({"town": "image"}, "declared as image"),
        ({"town x price": {"type": "cross"}}, "'price' is of type number"),
        ({"town x twon": {"type": "cross"}}, "Did you mean 'town'"),
        ({"town": {"type": "cross"}}, "expected the names of its columns"),
        ({"y": "category"}, "no column for feature 'y'"),
        ({"price": "drop", "town": "drop"}, "No feature is left"),
        ([], "Received: \\[\\]"),
        ("nowhere.yaml", "nowhere.yaml cannot be read"),
    ],
)
def test_invalid_feature_overrides_are_errors(features, message, tmp_path):
    table = pl.DataFrame({"price": [1.0, 2.0] * 30, "town": ["Rome", "Oslo", "Lima"] * 20, "y": ["a", "b"] * 30})
    table.write_csv(tmp_path / "t.csv")
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0), features=features)


@pytest.mark.parametrize("text", ["town: {type: hash", "- a\n- b", "town: 3", "town: [a]", "\x00"])
def test_a_features_file_that_is_none(text, tmp_path):
    (tmp_path / "features.yaml").write_text(text)
    with pytest.raises(DatasetError):
        read_features(tmp_path / "features.yaml")


def test_an_empty_features_file_says_nothing(tmp_path):
    (tmp_path / "features.yaml").write_text("# nothing yet\n")
    assert read_features(tmp_path / "features.yaml") == {}


def test_columns_without_values_and_constants(tmp_path):
    """In every kind that can be asked for; the model answers all the same."""
    import tensorflow as tf

    from mlkit.models import build_model

    void = {f"v {kind}": [None] * 60 for kind in ("number", "bucket", "category", "hash", "text", "datetime")}
    same = {"s number": [3.5] * 60, "s category": ["x"] * 60, "s datetime": ["2026-01-31"] * 60, "s bucket": [1] * 60}
    columns = void | same
    pl.DataFrame(columns | {"y": ["a", "b"] * 30}).write_csv(tmp_path / "t.csv")
    kinds = {name: name.split()[1] for name in columns}
    data = load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0), features=kinds)
    for family in ("mlp", "wide_deep"):
        model = build_model(family, data)
        model.compile("adam", "binary_crossentropy")
        assert np.isfinite(model.fit(data.to_tf(), verbose=0).history["loss"]).all()
        raw = {name: tf.constant(values) for name, values in odd_rows(data, 20).items()}
        assert model(raw).shape == (20, 1)


@pytest.mark.parametrize("kind", ["number", "bucket", "category", "hash", "text", "datetime"])
def test_a_table_of_one_column(kind, tmp_path):
    import tensorflow as tf

    from mlkit.models import build_model

    texts = [f"2026-01-{n % 28 + 1:02}" for n in range(60)]
    values = list(range(60)) if kind in ("number", "bucket") else texts
    pl.DataFrame({"x": values, "y": ["a", "b"] * 30}).write_csv(tmp_path / "t.csv")
    data = load_dataset(tmp_path / "t.csv", "y", fractions=(1, 0, 0), features={"x": kind})
    for family in ("mlp", "wide_deep"):
        model = build_model(family, data)
        assert len(np.unique(model({"x": tf.constant(data.arrays["x"])}).numpy())) > 5
        assert all(layer.supports_jit for layer in model.layers) == (kind in ("number", "bucket"))


def test_a_million_different_values(tmp_path):
    from mlkit.models import build_model

    number = np.arange(1_000_000)
    pl.DataFrame({"user": [f"u{n}" for n in number], "y": number % 2}).write_parquet(tmp_path / "t.parquet")
    data = load_dataset(tmp_path / "t.parquet", "y")
    assert len(data.features["user"].vocabulary) == 10_000
    assert "features={'user': 'hash'}" in data.warnings[0]
    assert build_model("mlp", data).count_params() < 1_000_000
    hashed = load_dataset(tmp_path / "t.parquet", "y", features={"user": "hash"})
    assert (hashed.features["user"].buckets, hashed.warnings) == (100_000, ())
    with pytest.raises(DatasetError, match=r"800,000 distinct values.*max_vocabulary: 10000, or type: hash"):
        load_dataset(tmp_path / "t.parquet", "y", max_vocabulary=50_000)


def test_examples_that_do_not_fit(trained, shop, tmp_path):
    import tensorflow as tf

    from mlkit.export import export_saved_model, load_saved_model

    def example(**features) -> bytes:
        message = tf.train.Features(feature={name: tf.train.Feature(**value) for name, value in features.items()})
        return tf.train.Example(features=message).SerializeToString()

    served = load_saved_model(export_saved_model(trained[0], shop, tmp_path / "model"))
    empty = example(
        standard={}, postcode={"bytes_list": tf.train.BytesList()}, log={"float_list": tf.train.FloatList()}
    )
    answers = served.predict_examples([empty, b""])["probabilities"]
    assert same_bits(answers[0], answers[1])
    for wrong in (
        example(standard={"bytes_list": tf.train.BytesList(value=[b"x"])}),
        example(standard={"float_list": tf.train.FloatList(value=[1, 2])}),
        b"\xff",
    ):
        with pytest.raises(ModelError, match="not what the model takes"):
            served.predict_examples([empty, wrong])


def test_tf_serving_finds_its_methods(trained, shop, tmp_path):
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    from mlkit.export import export_saved_model
    from mlkit.export.saved_model import as_examples
    from mlkit.models import build_model

    path = export_saved_model(trained[0], shop, tmp_path / "model")
    content = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    classify = content.meta_graphs[0].signature_def["classify"]
    assert classify.method_name == "tensorflow/serving/classify"
    assert (set(classify.inputs), set(classify.outputs)) == ({"inputs"}, {"classes", "scores"})
    loaded = tf.saved_model.load(str(path))
    examples = tf.constant(as_examples({"standard": [1.0, 2.0]}))
    answers = loaded.signatures["classify"](inputs=examples)
    assert answers["classes"].numpy().tolist() == [[b"no", b"yes"]] * 2
    expected = loaded.signatures["serving_examples"](examples=examples)
    assert same_bits(answers["scores"].numpy(), expected["probabilities"].numpy())
    diabetes = load_dataset("diabetes")
    path = export_saved_model(build_model("mlp", diabetes), diabetes, tmp_path / "diabetes")
    loaded = tf.saved_model.load(str(path))
    examples = tf.constant(as_examples({name: values[:3] for name, values in diabetes.arrays.items()}))
    assert loaded.signatures["regress"](inputs=examples)["outputs"].shape == (3,)


# -- that it helps --


def accuracy(data) -> float:
    import keras

    from mlkit.models import build_model

    model = build_model("mlp", data)
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    model.fit(data.to_tf(), epochs=15, verbose=0)
    return model.evaluate(data.to_tf("test"), verbose=0)[1]


def test_words_weekdays_hashes_and_crosses_are_learned(tmp_path):
    rng = np.random.default_rng(3)
    rows = 1500
    days = [date(2025, 1, 1) + timedelta(days=int(day)) for day in rng.integers(0, 500, rows)]
    sad = rng.random(rows) < 0.5
    fillers = rng.choice(["the", "a", "film", "was", "very", "thing"], (rows, 6)).tolist()
    comments = [
        " ".join(sorted([*words, "awful" if bad else "lovely"])) for words, bad in zip(fillers, sad, strict=True)
    ]
    left, right = rng.choice(["a", "b"], rows), rng.choice(["c", "d"], rows)
    users = [f"u{number}" for number in rng.integers(0, 20, rows)]
    tasks = {
        "comment": ({"comment": {"type": "text"}}, sad),
        "words": ({"comment": {"type": "text", "buckets": 100}}, sad),
        "day": ({}, np.array([day.weekday() >= 5 for day in days])),
        "user": ({"user": "hash"}, np.array([int(user[1:]) % 3 == 0 for user in users])),
        "left x right": ({"left x right": {"type": "cross", "buckets": 50}}, (left == "a") == (right == "c")),
    }
    table = pl.DataFrame({"comment": comments, "day": days, "user": users, "left": left, "right": right})
    for name, (features, truth) in tasks.items():
        used = name.replace("words", "comment").split(" x ")
        noise = pl.Series(rng.normal(size=rows))  # no two rows are equal, so each value is in each split
        table.select(used).with_columns(noise=noise, y=pl.Series(truth)).write_parquet(tmp_path / "t.parquet")
        data = load_dataset(tmp_path / "t.parquet", "y", features=features)
        assert accuracy(data) > 0.95, name
