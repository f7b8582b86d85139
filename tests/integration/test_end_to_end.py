"""What the notebooks of the research wing cannot show: fresh processes, other runtimes, broken disks and odd data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset
from mlkit.errors import DatasetError, ModelError, StorageError


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def table(folder: Path, columns: dict, label: str = "y", **options):
    """A data set read from a CSV file with these columns."""
    path = folder / "table.csv"
    pl.DataFrame(columns).write_csv(path)
    return load_dataset(str(path), label=label, **options)


def mixed(folder: Path, rows: int = 300):
    """A table with numbers and categories, some missing, under names that are hard to keep."""
    rng = np.random.default_rng(5)
    columns = {
        "hours-per-week": rng.normal(40, 10, rows),
        "city.name": rng.choice(["a", "b", "c"], rows),
        "a/b": rng.normal(0, 1e6, rows),
        "a b": rng.choice(["x", "y"], rows),
        "A B": rng.choice(["x", "y"], rows),
        "Größe": rng.choice(["klein", "groß"], rows),
    }
    holes = {name: [None if rng.random() < 0.2 else value for value in values] for name, values in columns.items()}
    return table(folder, holes | {"y": rng.choice(["no", "yes"], rows)})


def probabilities(model, dataset, rows: int = 20) -> np.ndarray:
    import tensorflow as tf

    return model({name: tf.constant(values[:rows]) for name, values in dataset.arrays.items()}).numpy()


# -- importing --


def test_evaluation_needs_no_tensorflow():
    done = python(
        "import sys, mlkit.evaluation.evaluator; print('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_tensorflow_is_imported_without_a_word():
    done = python("import mlkit.export.saved_model")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_keras_backend_is_refused():
    done = python("import mlkit.models.families", KERAS_BACKEND="jax")
    assert done.returncode != 0
    assert "MissingDependencyError" in done.stderr
    assert "KERAS_BACKEND is 'jax'" in done.stderr


# -- training --

TRAIN = """
import hashlib
from mlkit.data import load_dataset
from mlkit.models import build_model
from mlkit.training import fit

data = load_dataset("digits")
model = build_model("cnn", data)
fit(model, data, epochs=2)
print(hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_train_the_same_weights():
    first, second = (python(TRAIN) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_digits_reach_the_goal_with_any_seed(seed):
    from mlkit.models import build_model
    from mlkit.training import fit

    data = load_dataset("digits", seed=seed)
    history = fit(build_model("auto", data, seed=seed), data, seed=seed)
    assert history.metrics["val_accuracy"] >= 0.97


def test_a_model_of_ones_own_needs_nothing_of_ours(digits, tmp_path):
    import keras

    from mlkit.evaluation import evaluate
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.training import fit

    image = keras.Input((8, 8, 1), name="image")
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 16)(image))
    model = keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(flat))
    fit(model, digits, epochs=3)
    served = load_saved_model(export_saved_model(model, digits, tmp_path / "own"))
    assert evaluate(model, digits).metrics == pytest.approx(evaluate(served, digits).metrics, abs=1e-6)


def test_a_model_that_is_broken_already_stops_at_once(tmp_path):
    from mlkit.errors import MlkitError
    from mlkit.models import build_model
    from mlkit.training import fit

    data = table(tmp_path, {"x": np.arange(200.0), "y": ["a", "b"] * 100})
    model = build_model("mlp", data)
    weights = model.get_weights()
    weights[-1][:] = np.nan
    model.set_weights(weights)
    with pytest.raises(MlkitError, match="NaN or infinite since epoch 1, step 1"):
        fit(model, data, epochs=1)


def test_progress_reaches_the_run(digits, tmp_path):
    from mlkit.models import build_model
    from mlkit.runs.store import RunStore
    from mlkit.training import fit

    seen = []
    run = RunStore(tmp_path).create("train")
    run.log_progress = lambda **progress: seen.append(progress)
    fit(build_model("cnn", digits), digits, epochs=2, run=run)
    assert {"epoch", "epochs", "step", "steps", "loss", "accuracy"} <= seen[0].keys()
    assert seen[0]["epochs"] == 2
    assert seen[0]["steps"] == len(digits.to_tf("train"))


# -- tables that are not nice --


@pytest.mark.parametrize("family", ["mlp", "wide_deep"])
def test_tables_of_one_kind_of_column(family, tmp_path):
    from mlkit.models import build_model

    labels = ["a", "b"] * 50
    words = [f"word {n}" for n in range(50)] * 2
    numbers = table(tmp_path, {"x": np.arange(100) + 0.5, "y": labels})
    pairs = table(tmp_path, {"x": words, "z": words[10:] + words[:10], "y": labels})
    single = table(tmp_path, {"x": words, "y": labels})
    for data in (numbers, pairs, single):
        assert probabilities(build_model(family, data), data).shape == (20, 1)


def test_scales_that_float32_can_hardly_hold(tmp_path):
    from mlkit.models import build_model

    steps = np.arange(100.0)
    data = table(tmp_path, {"tiny": steps * 1e-20, "huge": steps * 1e30, "same": np.ones(100), "y": ["a", "b"] * 50})
    answers = probabilities(build_model("mlp", data), data)
    assert np.isfinite(answers).all()
    assert np.unique(answers.round(4)).size > 5  # the columns still say something


def test_regression_answers_in_the_unit_of_the_label(tmp_path):
    from mlkit.evaluation import evaluate
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model
    from mlkit.training import fit

    x = np.random.default_rng(0).normal(size=400)
    data = table(tmp_path, {"x": x, "y": 1e6 + 1e4 * x})
    model = build_model("mlp", data)
    fit(model, data, epochs=20, learning_rate=0.01)
    served = load_saved_model(export_saved_model(model, data, tmp_path / "model"))
    assert served({"x": [0.0, 1.0]})["prediction"].shape == (2,)
    matches = evaluate(served, data).metrics
    assert matches["r2"] > 0.95
    assert matches["root_mean_squared_error"] < 5e3


# -- export --


@pytest.fixture(scope="module", params=["mlp", "wide_deep", "cnn"])
def exported(request, digits, tmp_path_factory):
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model

    folder = tmp_path_factory.mktemp(request.param)
    data = digits if request.param == "cnn" else mixed(folder)
    model = build_model(request.param, data)
    return data, model, load_saved_model(export_saved_model(model, data, folder / "model"))


def test_exported_model_answers_as_keras_does(exported):
    data, model, served = exported
    answers = served(data.arrays)["probabilities"]
    direct = model.predict(data.to_tf("all", batch_size=512), verbose=0)
    assert answers[:, -direct.shape[1] :] == pytest.approx(direct, abs=1e-6)
    alone = served({name: values[:1] for name, values in data.arrays.items()})["probabilities"]
    assert alone[0] == pytest.approx(answers[0], abs=1e-6)


def test_unknown_and_missing_categories_are_told_apart(exported):
    data, _, served = exported
    if "city.name" not in data.features:
        pytest.skip("digits have no categories")
    row = {name: values[:1] for name, values in data.arrays.items()}
    unknown, missing, never = (served(row | {"city.name": [city]})["probabilities"] for city in ("?!", None, "##"))
    assert np.array_equal(unknown, never)
    assert not np.array_equal(unknown, missing)


def test_signature_has_the_names_of_the_table(exported):
    from tensorflow.core.protobuf import saved_model_pb2

    data, _, served = exported
    content = saved_model_pb2.SavedModel.FromString((served.path / "saved_model.pb").read_bytes())
    signature = content.meta_graphs[0].signature_def["serving_default"]
    assert set(signature.inputs) == set(data.features)
    assert set(signature.outputs) == {"probabilities", "class", "score"}
    assert all(info.tensor_shape.dim[0].size == -1 for info in signature.inputs.values())


def test_signature_answers_as_a_server_asks(exported):
    """TF Serving feeds the tensors that the signature names, in a session."""
    import tensorflow as tf

    data, _, served = exported
    features = {name: values[:20] for name, values in data.arrays.items()}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        graph = tf.compat.v1.saved_model.load(session, ["serve"], str(served.path))
        signature = graph.signature_def["serving_default"]
        feed = {signature.inputs[name].name: list(values) for name, values in features.items()}
        answers = session.run({name: info.name for name, info in signature.outputs.items()}, feed)
    expected = served(features)
    assert answers["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
    assert [name.decode() for name in answers["class"]] == list(expected["class"])


@pytest.mark.parametrize("exported", ["cnn"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_exported_images_run_on_litert_without_flex(exported):
    """Tables are converted by mlkit.export.litert: their vocabularies are files, which LiteRT does not read."""
    import tensorflow as tf

    data, _, served = exported
    converter = tf.lite.TFLiteConverter.from_saved_model(str(served.path), signature_keys=["serving_default"])
    runner = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner("serving_default")
    for rows in (1, 30):
        features = {name: values[:rows] for name, values in data.arrays.items()}
        encoded = {name: served.features[name].tensor(values).numpy() for name, values in features.items()}
        assert runner(**encoded)["probabilities"] == pytest.approx(served(features)["probabilities"], abs=1e-6)


def test_a_column_may_be_called_self(tmp_path):
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model

    data = table(tmp_path, {"self": ["u", "v"] * 50, "features": np.arange(100) + 0.5, "y": ["a", "b"] * 50})
    model = build_model("mlp", data)
    served = load_saved_model(export_saved_model(model, data, tmp_path / "model"))
    assert served(data.arrays)["probabilities"][:20, 1:] == pytest.approx(probabilities(model, data), abs=1e-6)


def test_a_failing_export_leaves_nothing(digits, tmp_path, monkeypatch):
    import tensorflow as tf

    from mlkit.errors import NotFoundError
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model
    from mlkit.runs.store import RunStore

    def break_off(module, path, **options):
        (Path(path) / "saved_model.pb").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", break_off)
    run = RunStore(tmp_path / "runs").create("train")
    for target in (run, tmp_path / "model"):
        with pytest.raises((OSError, StorageError)):
            export_saved_model(build_model("cnn", digits), digits, target)
    for folder in (run.folder / "saved_model", tmp_path / "model"):
        assert list(folder.iterdir()) == []
        with pytest.raises(NotFoundError):
            load_saved_model(folder)


def test_a_target_that_cannot_be_written(digits, tmp_path):
    from mlkit.export import export_saved_model
    from mlkit.models import build_model

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        export_saved_model(build_model("cnn", digits), digits, tmp_path / "file" / "model")


@pytest.mark.parametrize("damage", ["graph", "variables", "description", "not json"])
def test_a_damaged_model_is_refused(damage, digits, tmp_path):
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model

    path = export_saved_model(build_model("cnn", digits), digits, tmp_path / "model")
    graph, about = path / "saved_model.pb", path / "assets.extra" / "mlkit.json"
    if damage == "graph":
        graph.write_bytes(graph.read_bytes()[:1000])
    elif damage == "variables":
        data = path / "variables" / "variables.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:1000])
    elif damage == "description":
        about.write_text(json.dumps({"task": "multiclass"}))
    else:
        about.write_text("{")
    with pytest.raises(ModelError):
        load_saved_model(path)


def test_the_newest_version_is_loaded(digits, tmp_path):
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model

    model = build_model("cnn", digits)
    for version in (2, 10):
        export_saved_model(model, digits, tmp_path, version=version)
    assert load_saved_model(tmp_path).path.name == "10"


# -- evaluation --


def test_a_split_with_one_class_only():
    from mlkit.evaluation import evaluate

    cancer = load_dataset("breast_cancer")
    rows = np.flatnonzero(cancer.labels == 1)
    cancer.splits["ones"] = rows

    def always(features):
        return {"probabilities": np.tile([0.25, 0.75], (len(features["mean_radius"]), 1))}

    matches = evaluate(always, cancer, "ones")
    assert matches.metrics["accuracy"] == 1.0
    assert "auc" not in matches.metrics
    assert matches.plot() is not None
    cancer.splits["none"] = rows[:0]
    with pytest.raises(DatasetError, match="no rows"):
        evaluate(always, cancer, "none")
