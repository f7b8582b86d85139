"""Model families, builders of one's own and baselines, on data and in places that their notebooks do not show."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from mlkit.data import Dataset, load_dataset
from mlkit.errors import DatasetError, ModelError
from tests.conftest import ADULT


@pytest.fixture(scope="module")
def cancer() -> Dataset:
    return load_dataset("breast_cancer")


def texts(folder: Path, length: int = 12, rows: int = 300, **options) -> Dataset:
    """A table with two texts, one of them often missing, beside a number and a category."""
    rng = np.random.default_rng(5)
    words = np.array(["good", "bad", "soup", "service", "never", "again", "ÄÖ", "so-so"])
    columns = {
        "review": [" ".join(rng.choice(words, rng.integers(1, 8))) for _ in range(rows)],
        "title/line": [" ".join(rng.choice(words, 2)) if rng.random() < 0.7 else None for _ in range(rows)],
        "guests": [None if rng.random() < 0.1 else float(rng.integers(1, 9)) for _ in range(rows)],
        "town": rng.choice(["Rome", "Oslo", "logits"], rows),
        "y": rng.choice(["no", "yes", "perhaps"], rows),
    }
    pl.DataFrame(columns).write_csv(folder / "texts.csv")
    text = {"type": "text", "length": length}
    return load_dataset(str(folder / "texts.csv"), "y", features={"review": text, "title/line": text} | options)


def predictions_of(model, dataset: Dataset, rows: int = 30) -> np.ndarray:
    import tensorflow as tf

    return model({name: tf.constant(values[:rows]) for name, values in dataset.arrays.items()}).numpy()


# -- families --

HYPERPARAMETERS = {
    "resnet": [{}],
    "linear": [{}, {"l2": 0.01}],
    "text": [{}, {"encoder": "transformer", "blocks": 2}],
}


@pytest.mark.parametrize(
    ("family", "hyperparameters"),
    [(name, hyperparameters) for name, all_of in HYPERPARAMETERS.items() for hyperparameters in all_of],
)
def test_exported_model_predicts_as_keras_does(
    family: str, hyperparameters: dict, digits: Dataset, tmp_path: Path
) -> None:
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model

    data = digits if family == "resnet" else texts(tmp_path)
    model = build_model(family, data, **hyperparameters)
    model.compile("adam", "sparse_categorical_crossentropy")
    history = model.fit(data.to_tf("train"), epochs=2, shuffle=False, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    served = load_saved_model(export_saved_model(model, data, tmp_path / "model"))
    predictions = served(data.arrays)["probabilities"]
    assert predictions == pytest.approx(
        model.predict(data.to_tf("all", batch_size=64, shuffle=False), verbose=0), abs=1e-5
    )
    alone = served({name: values[:1] for name, values in data.arrays.items()})["probabilities"]
    assert alone[0] == pytest.approx(predictions[0], abs=1e-5)


@pytest.mark.parametrize("encoder", ["convolution", "transformer"])
def test_places_behind_a_text_have_no_say(encoder: str, tmp_path: Path) -> None:
    """The same weights with room for 16 words and for 24 give the same predictions, for texts of 14 words at most."""
    from mlkit.models import build_model

    narrow, wide = (build_model("text", texts(tmp_path, length), encoder=encoder) for length in (16, 24))
    wide.set_weights(narrow.get_weights())
    data = texts(tmp_path)
    assert predictions_of(wide, data) == pytest.approx(predictions_of(narrow, data), abs=1e-5)


@pytest.mark.parametrize("encoder", ["convolution", "transformer"])
def test_order_of_words_matters_to_text_and_not_to_mlp(encoder: str, tmp_path: Path) -> None:
    from mlkit.models import build_model

    data = texts(tmp_path)
    turned = {name: values.copy() for name, values in data.arrays.items()}
    turned["review"] = np.array([" ".join(reversed(text.split())) for text in turned["review"]], object)
    other = replace(data, inputs=pl.DataFrame({name: pl.Series(values) for name, values in turned.items()}))
    for family, hyperparameters, same in (("text", {"encoder": encoder}, False), ("mlp", {}, True)):
        model = build_model(family, data, **hyperparameters)
        assert np.allclose(predictions_of(model, data), predictions_of(model, other), atol=1e-5) == same


def test_texts_of_every_kind(tmp_path: Path) -> None:
    """Hashed words, texts alone in a table, and texts of which training knows none."""
    from mlkit.models import build_model

    hashed = texts(tmp_path, review={"type": "text", "buckets": 20, "embedding": 5})
    alone = texts(tmp_path, guests="drop", town="drop")
    void = load_dataset(
        str(_csv(tmp_path, {"t": [None] * 40, "y": ["a", "b"] * 20})), "y", features={"t": "text"}, fractions=(1, 0, 0)
    )
    for data in (hashed, alone, void):
        for hyperparameters in ({}, {"encoder": "transformer", "hidden": ()}):
            assert np.isfinite(predictions_of(build_model("text", data, **hyperparameters), data)).all()
        assert np.isfinite(predictions_of(build_model("linear", data), data)).all()
    weights = build_model("text", hashed).get_layer("embedding_review").get_weights()[0]
    assert weights.shape == (21, 5)


def _csv(folder: Path, columns: dict) -> Path:
    pl.DataFrame(columns).write_csv(folder / "table.csv")
    return folder / "table.csv"


def test_images_of_many_sizes(digits: Dataset) -> None:
    from mlkit.models import build_model

    for shape in ((5, 9, 1), (32, 32, 3), (64, 48, 3)):
        images = np.random.default_rng(1).uniform(0, 255, (len(digits.labels), *shape)).astype("float32")
        spec = replace(digits.features["image"], shape=shape, maximum=255.0)
        data = replace(digits, inputs=images[:40], features={"image": spec})
        for family, hyperparameters in (("resnet", {"blocks": 1, "filters": 4}), ("linear", {})):
            predictions = predictions_of(build_model(family, data, **hyperparameters), data, rows=3)
            assert predictions.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)


def test_linear_finds_a_line(tmp_path: Path) -> None:
    from mlkit.models import build_model
    from mlkit.training import fit

    x = np.linspace(-1, 1, 400)
    town = np.where(np.arange(400) % 3 == 0, "far", "near")
    y = 1e4 + 300 * x + np.where(town == "far", 50.0, 0.0)
    data = load_dataset(str(_csv(tmp_path, {"x": x, "town": town, "y": y})), "y")
    model = build_model("linear", data)
    fit(model, data, epochs=60, learning_rate=0.05)
    known, labels = data.take("test")
    assert model.predict(known, verbose=0)[:, 0] == pytest.approx(labels, abs=3)


def test_the_penalty_draws_weights_to_zero(cancer: Dataset) -> None:
    from mlkit.models import build_model
    from mlkit.training import fit

    sizes = []
    for l2 in (0.0, 1.0):
        model = build_model("linear", cancer, l2=l2)
        fit(model, cancer, epochs=5, learning_rate=0.02)
        sizes.append(np.abs(model.get_layer("logits").get_weights()[0]).sum())
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(
    ("family", "hyperparameters", "message"),
    [
        ("text", {}, r"tables with text.*features=\{'column': 'text'\}"),
        ("resnet", {}, "Families for tables: mlp, wide_deep"),
        ("linear", {"l1": 1}, "It takes l2=0.0"),
        ("linear", {"l2": "much"}, "cannot be built"),
        ("linnear", {}, "Did you mean 'linear'"),
    ],
)
def test_unsuitable_families_are_errors(family: str, hyperparameters: dict, message: str, cancer: Dataset) -> None:
    from mlkit.models import build_model

    with pytest.raises(ModelError, match=message):
        build_model(family, cancer, **hyperparameters)


def test_sizes_out_of_range_are_refused(digits: Dataset, tmp_path: Path) -> None:
    from mlkit.models import build_model

    data = texts(tmp_path)
    for family, dataset, hyperparameters in (
        ("resnet", digits, {"blocks": 0}),
        ("resnet", digits, {"filters": -1}),
        ("text", data, {"encoder": "lstm"}),
        ("text", data, {"encoder": "transformer", "heads": 0}),
        ("text", data, {"dimension": 0}),
    ):
        with pytest.raises(ModelError):
            build_model(family, dataset, **hyperparameters)


# -- search spaces --


def corner(last: bool) -> SimpleNamespace:
    """Answers as Keras Tuner's hp does: always the first value, or always the last one."""
    ends = lambda name, low, high, **options: high if last else low  # noqa: E731
    return SimpleNamespace(
        Int=ends,
        Float=ends,
        Choice=lambda name, values, **options: values[-1 if last else 0],
        Boolean=lambda name, **options: last,
    )


@pytest.mark.parametrize("family", ["cnn", "resnet", "mlp", "wide_deep", "linear", "text"])
def test_both_ends_of_a_search_space_build_a_model(family: str, digits: Dataset, tmp_path: Path) -> None:
    from mlkit.models import FAMILIES, build_model
    from mlkit.models.families import search_space

    data = digits if "images" in FAMILIES[family].data else texts(tmp_path)
    for last in (False, True):
        hyperparameters = search_space(family, data)(corner(last))
        assert build_model(family, data, **hyperparameters).count_params() > 0


# -- builders of one's own --

OWN = """
import numpy as np
import keras
from mlkit.models.preprocessing import SeededLayers, encode_table, concatenate_features

constant = 3

def build(dataset, seed, *, width=8):
    table = encode_table(dataset.features, make := SeededLayers(seed))
    x = keras.layers.Dense(width, "relu")(concatenate_features(table, make))  # no seed of its own
    x = keras.layers.Dropout(0.1)(x)
    return keras.Model(table.inputs, keras.layers.Dense(1, "sigmoid")(x))

def logits(dataset, seed):
    table = encode_table(dataset.features, make := SeededLayers(seed))
    return keras.Model(table.inputs, keras.layers.Dense(1)(concatenate_features(table, make)) * 100)

def broken(dataset, seed):
    raise KeyError("what I forgot")

def space(hp):
    return {"width": hp.Int("width", 4, 16)}
"""


def test_a_job_trains_a_builder_of_the_working_folder(project: Path, cli) -> None:
    (project / "my_models.py").write_text(OWN)
    options = ("-p", "dataset=breast_cancer", "-p", "epochs=2", "-p", 'model_options={"width": 5}')
    done = cli("run", "train", *options, "-p", "model=my_models:build", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["parameters"]["model"] == "my_models:build"
    assert record["metrics"]["test_accuracy"] > 0.5
    wrong = cli("run", "train", "-p", "dataset=breast_cancer", "-p", "model=my_models:biuld")
    assert wrong.returncode != 0
    assert "Did you mean 'build'?" in wrong.stdout + wrong.stderr


def test_the_same_seed_gives_the_same_weights_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text(OWN)
    code = (
        "import sys, random, hashlib, numpy as np\n"
        "from mlkit.data import load_dataset\nfrom mlkit.models import build_model\n"
        "[random.random() for _ in range(int(sys.argv[1]))]; np.random.seed(int(sys.argv[1]))\n"
        "model = build_model('my_models:build', load_dataset('breast_cancer'), seed=3)\n"
        "print(hashlib.sha256(b''.join(w.tobytes() for w in model.get_weights())).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    digests = [
        subprocess.run([*command, noise], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for noise in ("1", "2")
    ]
    assert digests[0] == digests[1] != ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_models:buld", "has no 'buld'. Did you mean 'build'"),
        ("own_models:constant", "should be a function; it is int"),
        ("own_model:build", "There is no module 'own_model'.*Did you mean 'own_models'"),
        ("own_models.inner:build", "There is no module 'own_models.inner'"),
        ("own_models:logits", "End the model with a sigmoid"),
        ("own_models:broken", "raised KeyError: 'what I forgot'"),
        ("unfinished:build", "cannot be imported: SyntaxError"),
        ("needs_more:build", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        (":build", "Expected a model function like my_package.models:build"),
        ("own_models:", "Expected a model function like my_package.models:build"),
        ("own_models:build:again", "Expected a model function like my_package.models:build"),
    ],
)
def test_an_unusable_model_function_is_an_error_with_a_reason(
    name: str, message: str, cancer: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.models import build_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "unfinished.py").write_text("def build(")
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    try:
        with pytest.raises(ModelError, match=message):
            build_model(name, cancer)
    finally:
        sys.modules.pop("own_models", None)


def test_a_builder_leaves_the_generators_as_they_were(cancer: Dataset) -> None:
    import random

    from mlkit.models import build_model
    from mlkit.models.families import mlp

    def build(dataset: Dataset, seed: int):
        np.random.random(10)
        return mlp(dataset, random.randint(0, 100))

    random.seed(1)
    np.random.seed(1)
    build_model(build, cancer)
    numbers = random.random(), np.random.random()
    assert numbers == (random.Random(1).random(), np.random.RandomState(1).random())


# -- baselines --


def test_baselines_learn_from_the_training_split_alone(cancer: Dataset) -> None:
    """Where the labels of test and validation are turned round, whoever learned from training is wrong."""
    from mlkit.evaluation import measure_baselines

    turned = cancer.labels.copy()
    for split in ("test", "validation"):
        turned[cancer.rows(split)] = 1 - turned[cancer.rows(split)]
    baselines = measure_baselines(replace(cancer, labels=turned)).by_name
    assert baselines["linear"].evaluation.metrics["accuracy"] < 0.3
    assert baselines["gradient_boosting"].evaluation.metrics["accuracy"] < 0.3


def test_verdicts_are_fair(cancer: Dataset) -> None:
    from mlkit.evaluation import measure_baselines

    measured = measure_baselines(cancer)
    best = measured.best.evaluation
    assert measured.compare(best).result == "same"
    worse = replace(best, scores=0.8 * best.scores + 0.1)
    assert measured.compare(worse, "the timid one").result == "worse"
    assert "the timid one is worse than the best baseline" in str(measured.compare(worse, "the timid one"))
    perfect = replace(best, scores=np.eye(2)[best.labels])
    dummy = replace(measured, by_name={"dummy": measured.by_name["dummy"]})
    assert dummy.compare(perfect).result == "better"
    train = replace(best, split="train")
    with pytest.raises(DatasetError, match="on the same rows"):
        measured.compare(train)


@pytest.mark.skipif(not ADULT.exists(), reason="adult.csv is not here")
def test_baselines_of_the_adult_census() -> None:
    from mlkit.evaluation import measure_baselines

    data = load_dataset(ADULT, "income", null_values="?")
    measured = measure_baselines(data, max_rows=6000)
    boosted = measured.by_name["gradient_boosting"]
    assert boosted.evaluation.metrics["accuracy"] > 0.85
    assert measured.by_name["linear"].evaluation.metrics["auc"] > 0.88
    assert boosted.rows == 6000
    assert "a sample of 6,000 of" in measured._repr_html_()


def test_a_class_that_the_sample_does_not_have(tmp_path: Path) -> None:
    from mlkit.evaluation import measure_baselines

    rng = np.random.default_rng(1)
    label = np.where(rng.random(2000) < 0.01, "rare", rng.choice(["a", "b"], 2000))
    data = load_dataset(str(_csv(tmp_path, {"x": rng.normal(size=2000), "y": label})), "y")
    measured = measure_baselines(data, max_rows=20, seed=3)
    sampled = {baseline.evaluation.scores[:, 2].max() for baseline in measured.by_name.values()}
    assert sampled == {0.0}
    assert all(np.isfinite(list(measured.run_metrics.values())))


def test_tables_of_every_kind_have_baselines(tmp_path: Path) -> None:
    from mlkit.evaluation import measure_baselines

    rng = np.random.default_rng(1)
    rows = 200
    columns = {
        "void": [None] * rows,
        "void text": [None] * rows,
        "same": [1.0] * rows,
        "Größe/m": [None if rng.random() < 0.3 else value for value in rng.normal(size=rows)],
        "user": [f"u{number}" for number in range(rows)],
        "said": rng.choice(["good soup", "bad soup", ""], rows),
        "at": [f"2026-01-{number % 28 + 1:02}T10:00:00" for number in range(rows)],
        "age": rng.integers(1, 90, rows),
        "y": rng.normal(size=rows),
    }
    kinds = {"void text": "text", "said": "text", "user": "hash", "at": "datetime", "age": "bucket"}
    data = load_dataset(str(_csv(tmp_path, columns)), "y", features=kinds)
    assert set(measure_baselines(data).by_name) == {"dummy", "linear", "gradient_boosting"}
    alone = load_dataset(str(_csv(tmp_path, {"void": [None] * 50, "y": ["a", "b"] * 25})), "y", fractions=(1, 0, 0))
    assert list(measure_baselines(alone, "train").by_name) == ["dummy"]


def test_too_many_classes_leave_the_constant(tmp_path: Path) -> None:
    from mlkit.evaluation import measure_baselines

    item = np.arange(1200) % 60
    data = load_dataset(str(_csv(tmp_path, {"x": item * 1.0, "item": [f"i{first}" for first in item]})), "item")
    measured = measure_baselines(data)
    assert list(measured.by_name) == ["dummy"]
    assert "60 classes are too many" in measured.warnings[0]


def test_without_rows_there_is_no_baseline(cancer: Dataset) -> None:
    from mlkit.evaluation import measure_baselines

    nothing = replace(cancer, splits=cancer.splits | {"train": np.array([], "int64")})
    with pytest.raises(DatasetError, match="training split is empty"):
        measure_baselines(nothing)
    unjudged = replace(cancer, splits=cancer.splits | {"test": np.array([], "int64")})
    with pytest.raises(DatasetError, match="no rows to evaluate"):
        measure_baselines(unjudged)
