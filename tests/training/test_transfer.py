"""Warm start from a source model, and sample weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset, reload_dataset
from mlkit.errors import DatasetError, ModelError, NotFoundError, ParameterError
from mlkit.runs.store import RunStore


def write(folder: Path, name: str, **columns) -> Path:
    pl.DataFrame(columns).write_parquet(path := folder / f"{name}.parquet")
    return path


def shop(folder: Path, name: str, cities: list[str], rows: int = 240, seed: int = 1, label: str = "sold") -> Path:
    """Visits from some cities; the label depends on city, device and price."""
    rng = np.random.default_rng(seed)
    city, device = rng.choice(cities, rows), rng.choice(["phone", "desk", "tablet"], rows)
    price = rng.normal(10, 3, rows)
    probability = 1 / (1 + np.exp(-(np.char.str_len(city) - 5 + (device == "phone") - (price - 10) / 3)))
    sold = rng.random(rows) < probability
    outcome = np.where(sold, "yes", "no") if label == "sold" else price * 2 + sold
    comment = [" ".join(rng.choice([*cities, "good", "dear"], 3)) for _ in range(rows)]
    return write(folder, name, city=city, device=device, price=price, comment=comment, **{label: outcome})


def trained(
    store: RunStore, data, family: str = "wide_deep", optimizer: str = "adam", epochs: int = 1, **hyperparameters
):
    """Run with a trained model and its optimizer state, and the model."""
    from mlkit.export import export_saved_model
    from mlkit.training import save_optimizer

    model = ready(data, family, optimizer, **hyperparameters)
    model.fit(data.to_tf("train", shuffle=False), epochs=epochs, shuffle=False, verbose=0)
    run = store.create("train")
    export_saved_model(model, data, run)
    save_optimizer(model, run)
    return run, model


def ready(data, family: str = "wide_deep", optimizer: str = "adam", **hyperparameters):
    from mlkit.models import build_model
    from mlkit.training import compile_model

    return compile_model(build_model(family, data, **hyperparameters), data.task, 0.01, optimizer)


def predict(model, data) -> np.ndarray:
    import tensorflow as tf

    return model({name: tf.constant(values) for name, values in data.arrays.items()}).numpy()


FAMILIES = {"linear": {}, "wide_deep": {"hidden": (8,)}, "mlp": {"hidden": (8,)}, "text": {"hidden": (8,)}}
FEATURES = {"comment": "text", "city x device": {"type": "cross", "buckets": 30}, "price": {"normalise": "minmax"}}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


# -- restored models --


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adam", "ftrl"])
def test_a_model_with_extended_tables_predicts_old_rows_as_before(tmp_path, store, family, optimizer):
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", features=FEATURES)
    run, model = trained(store, first, family, optimizer, 2, **FAMILIES[family])
    second = shop(tmp_path, "second", ["Rome", "Lisbon", "Oslo", "Amsterdam"], seed=2)
    data = load_warm_start_data(second, source_model=run)
    assert data.features["city"].vocabulary[:2] == first.features["city"].vocabulary
    assert set(data.features["city"].vocabulary[2:]) == {"Lisbon", "Amsterdam"}
    assert set(data.features["comment"].vocabulary[-2:]) == {"lisbon", "amsterdam"}
    extended = ready(data, family, optimizer, **FAMILIES[family])
    report = warm_start(extended, data, run)
    assert report.extended_tables
    assert report.parents == (run.id,)
    np.testing.assert_allclose(predict(extended, first), predict(model, first), atol=1e-6)
    unchanged = load_warm_start_data(second, source_model=run, vocabulary="keep")
    same = ready(unchanged, family, optimizer, **FAMILIES[family])
    assert not warm_start(same, unchanged, run).extended_tables
    np.testing.assert_array_equal(predict(same, first), predict(model, first))


@pytest.mark.parametrize("optimizer", ["adam", "ftrl", "sgd", "rmsprop", "nadam"])
def test_three_epochs_and_two_are_five(tmp_path, store, optimizer):
    from mlkit.training import set_seed, warm_start

    set_seed(3)
    data = load_dataset(shop(tmp_path, "all", ["Rome", "Oslo", "Lisbon"]), "sold", features={"comment": "text"})
    batches = data.to_tf("train", shuffle=False)
    whole = ready(data, "wide_deep", optimizer, hidden=(8,))
    losses = whole.fit(batches, epochs=5, shuffle=False, verbose=0).history["loss"]
    run, _ = trained(store, data, "wide_deep", optimizer, 3, hidden=(8,))
    later = ready(data, "wide_deep", optimizer, hidden=(8,))
    assert "continues after step" in warm_start(later, data, str(run.folder)).optimizer
    assert later.fit(batches, epochs=2, shuffle=False, verbose=0).history["loss"] == losses[3:]
    for weight, expected in zip(later.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_optimizer_slots_follow_the_rows_of_extended_tables(tmp_path, store):
    from mlkit.training import warm_start
    from mlkit.training.transfer import _optimizer_state, load_warm_start_data

    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", ignore="comment")
    run, model = trained(store, first)
    data = load_warm_start_data(
        shop(tmp_path, "second", ["Rome", "Oslo", "Lisbon"]), source_model=run, ignore="comment"
    )
    extended = ready(data)
    warm_start(extended, data, run)
    before, now = _optimizer_state(model), _optimizer_state(extended)
    assert before.keys() == now.keys()
    assert int(now["Adam/iteration"]) == int(before["Adam/iteration"]) > 0
    old, new = (np.asarray(state["Adam/embedding_city_embeddings_velocity"]) for state in (before, now))
    np.testing.assert_array_equal(new[: len(old)], old)
    assert not new[len(old) :].any()
    old, new = (np.asarray(state["Adam/wide_categories_embeddings_momentum"]).ravel() for state in (before, now))
    assert len(new) > len(old)
    np.testing.assert_array_equal(np.sort(new[new != 0]), np.sort(old[old != 0]))


def test_the_scale_of_a_regression_target_is_reused(tmp_path, store):
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    first = load_dataset(shop(tmp_path, "first", ["Rome"], label="worth"), "worth", ignore="comment")
    run, model = trained(store, first, "mlp", epochs=3)
    table = pl.read_parquet(tmp_path / "first.parquet").with_columns(pl.col("worth") * 5 + 100)
    table.write_parquet(tmp_path / "dearer.parquet")
    data = load_warm_start_data(tmp_path / "dearer.parquet", source_model=run, ignore="comment")
    later = ready(data, "mlp")
    warm_start(later, data, run)
    np.testing.assert_array_equal(predict(later, first), predict(model, first))
    other_scale = load_dataset(tmp_path / "dearer.parquet", "worth", ignore="comment")
    with pytest.raises(ModelError, match="the scale of the label"):
        warm_start(ready(other_scale, "mlp"), replace(other_scale, features=first.features), run)


def test_warm_start_of_an_image_model_with_batch_normalization(store, digits):
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    run, model = trained(store, digits, "resnet", filters=8, blocks=1)
    data = load_warm_start_data("digits", source_model=run)
    later = ready(data, "resnet", filters=8, blocks=1)
    warm_start(later, data, run)
    few = {"image": digits.arrays["image"][:50]}
    np.testing.assert_array_equal(later(few).numpy(), model(few).numpy())


def test_repeated_warm_starts(tmp_path, store):
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    cities = ["Rome", "Oslo", "Lisbon", "Amsterdam", "Paris", "Berlin", "Prague", "Vienna", "Athens", "Dublin"]
    data = load_dataset(shop(tmp_path, "day-1", cities[:2]), "sold", ignore="comment")
    run, model = trained(store, data)
    pairs = next(layer for layer in model.layers if layer.name == "wide_categories").blocks
    for day in range(2, 6):
        data = load_warm_start_data(shop(tmp_path, f"day-{day}", cities[: 2 * day]), source_model=run, ignore="comment")
        before = model
        model = ready(data)
        assert "embedding_city/embeddings" in warm_start(model, data, run).extended_tables
        run, model = saved(store, model, data)
    assert data.features["city"].appended == 8
    widths = [weight.shape[1] for weight in model.weights if weight.path == "embedding_city/embeddings"]
    assert widths == [weight.shape[1] for weight in before.weights if weight.path == "embedding_city/embeddings"]
    now = next(layer for layer in model.layers if layer.name == "wide_categories").blocks
    assert [names for names, _ in now] == [names for names, _ in pairs]


def saved(store, model, data):
    from mlkit.export import export_saved_model
    from mlkit.training import save_optimizer

    run = store.create("train")
    export_saved_model(model, data, run)
    save_optimizer(model, run)
    return run, model


def test_warm_start_with_streamed_data(tmp_path, store):
    from mlkit.data import open_dataset
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", ignore="comment")
    run, model = trained(store, first)
    path = shop(tmp_path, "second", ["Rome", "Oslo", "Lisbon"], rows=2_000)
    options = {"source_model": run, "ignore": "comment", "split": "random"}
    data = load_warm_start_data(path, "sold", load=open_dataset, **options)
    assert data.features["city"].vocabulary[2:] == ("Lisbon",)
    extended = ready(data)
    warm_start(extended, data, run)
    np.testing.assert_allclose(predict(extended, first), predict(model, first), atol=1e-6)
    batch, _ = next(iter(data.to_tf("train", batch_size=8)))
    assert list(batch) == list(first.features)


def test_a_custom_model_is_matched_without_keras_numbers(tmp_path, store):
    import keras

    from mlkit.training import warm_start

    data = load_dataset("wine")

    def custom_model() -> keras.Model:
        inputs = {name: keras.Input((), name=name) for name in data.features}
        x = keras.layers.Dense(5, "relu")(keras.ops.stack(list(inputs.values()), axis=-1))
        model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(x))
        model.compile("adam", "sparse_categorical_crossentropy")
        return model

    model = custom_model()
    model.fit(data.to_tf("train", shuffle=False), epochs=2, shuffle=False, verbose=0)
    run, _ = saved(store, model, data)
    later = custom_model()
    assert later.weights[0].path != model.weights[0].path
    report = warm_start(later, data, run)
    np.testing.assert_array_equal(predict(later, data), predict(model, data))
    assert report.optimizer == "Adam, continues after step 10"
    assert all(np.asarray(variable).any() for variable in later.optimizer.variables if "velocity" in variable.path)


def test_optimizer_state_with_loss_scaling(tmp_path, store):
    import keras

    from mlkit.training import warm_start

    data = load_dataset("wine")

    def loss_scaled_model():
        model = ready(data, "mlp", keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
        model.optimizer.build(model.trainable_variables)
        return model

    model = loss_scaled_model()
    model.fit(data.to_tf("train", shuffle=False), epochs=1, verbose=0)
    run, _ = saved(store, model, data)
    later = loss_scaled_model()
    assert warm_start(later, data, run).optimizer == "Adam, continues after step 5"
    plain = ready(data, "mlp")
    assert warm_start(plain, data, run).optimizer == "Adam, continues after step 5"
    momentum, expected = (next(v for v in m.optimizer.variables if "momentum" in v.path) for m in (plain, later))
    np.testing.assert_array_equal(np.asarray(momentum), np.asarray(expected))


# -- errors --


def test_nothing_changes_when_something_does_not_fit(tmp_path, store):
    from mlkit.training import warm_start

    data = load_dataset("wine")
    run, _ = trained(store, data, "mlp", hidden=(8,))
    other = ready(data, "mlp", hidden=(9,))
    before = other.get_weights()
    with pytest.raises(ModelError, match=r"'hidden_1/kernel' is \[13, 9\] here and \[13, 8\]"):
        warm_start(other, data, run)
    with pytest.raises(ModelError, match="of the family 'linear'"):
        warm_start(ready(data, "linear"), data, run)
    (run.folder / "optimizer.npz").write_bytes(b"no arrays")
    fitting = ready(data, "mlp", hidden=(8,))
    untouched = fitting.get_weights()
    with pytest.raises(ModelError, match=r"optimizer\.npz is damaged"):
        warm_start(fitting, data, run)
    for model, weights in ((other, before), (fitting, untouched)):
        for expected, weight in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)


def test_another_optimizer_starts_with_a_new_state(store):
    from mlkit.training import warm_start

    data = load_dataset("wine")
    run, model = trained(store, data, "mlp")
    later = ready(data, "mlp", "ftrl")
    assert warm_start(later, data, run).optimizer == "new Ftrl: the source run has saved that of Adam"
    later.train_on_batch(*next(iter(data.to_tf("train", batch_size=128))))
    change = np.abs(later.get_weights()[0] - model.get_weights()[0]).max()
    assert change < 0.1  # one step away, not at zero
    assert np.abs(model.get_weights()[0]).max() > 0.2


def test_invalid_source_models(tmp_path, store, monkeypatch):
    from mlkit.training.transfer import load_source_model, load_warm_start_data

    monkeypatch.setenv("MLKIT_RUNS_ROOT", str(store.root))
    data = load_dataset("wine")
    run, _ = trained(store, data, "mlp")
    assert (
        load_source_model(run.id).name == load_source_model(run.id[-4:]).name == load_source_model(run).name == run.id
    )
    assert load_source_model(run.folder / "saved_model").folder == run.folder / "saved_model" / "1"
    with pytest.raises(NotFoundError, match="nosuch"):
        load_source_model("nosuch")
    with pytest.raises(NotFoundError, match="no SavedModel"):
        load_source_model(tmp_path)
    (run.folder / "saved_model" / "1" / "assets.extra" / "warm_start.json").unlink()
    with pytest.raises(ModelError, match="Train it again"):
        load_warm_start_data("wine", source_model=run)


def test_columns_and_arguments_that_do_not_fit(tmp_path, store):
    from mlkit.training.transfer import load_warm_start_data

    first = load_dataset(path := shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", ignore="comment")
    run, _ = trained(store, first)
    with pytest.raises(DatasetError, match=r"not trained on: comment.*ignore=\['comment'\]"):
        load_warm_start_data(path, source_model=run)
    pl.read_parquet(path).drop("comment").rename({"city": "town"}).write_parquet(tmp_path / "town.parquet")
    with pytest.raises(DatasetError, match="city"):
        load_warm_start_data(tmp_path / "town.parquet", source_model=run)
    with pytest.raises(ParameterError, match="features= is fixed by the source model"):
        load_warm_start_data(path, source_model=run, features={"city": "hash"})
    with pytest.raises(ParameterError, match="task='multiclass'"):
        load_warm_start_data(path, source_model=run, task="multiclass")
    maybe = pl.read_parquet(path).with_columns(sold=pl.lit("maybe"))
    maybe.write_parquet(tmp_path / "maybe.parquet")
    with pytest.raises(DatasetError, match="'maybe', not among classes no, yes"):
        load_warm_start_data(tmp_path / "maybe.parquet", source_model=run, ignore="comment")


def test_data_with_another_encoding_are_rejected(tmp_path, store):
    from mlkit.training import warm_start

    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", ignore="comment")
    run, _ = trained(store, first)
    other_encoding = load_dataset(shop(tmp_path, "second", ["Rome", "Oslo"], seed=5), "sold", ignore="comment")
    with pytest.raises(ModelError, match=r"'price'.*load_warm_start_data"):
        warm_start(ready(other_encoding), other_encoding, run)


def test_a_saved_optimizer_state_cannot_execute_code(store):
    from mlkit.training import warm_start

    data = load_dataset("wine")
    run, _ = trained(store, data, "mlp")
    np.savez(run.folder / "optimizer.npz", **{"Adam/iteration": np.array([{}], object)})
    with pytest.raises(ModelError, match="is damaged"):
        warm_start(ready(data, "mlp"), data, run)


def test_the_limit_of_a_vocabulary_holds_when_it_is_extended(tmp_path, store):
    from mlkit.training.transfer import load_warm_start_data

    features = {"city": {"max_vocabulary": 3}}
    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", ignore="comment", features=features)
    run, _ = trained(store, first)
    more = shop(tmp_path, "more", ["Rome", "Lisbon", "Paris", "Wien"])
    data = load_warm_start_data(more, source_model=run, ignore="comment")
    assert len(data.features["city"].vocabulary) == 3
    assert any("2 values of 'city' in training are unknown" in note for note in data.warnings)


def test_warm_start_data_can_be_reloaded(tmp_path, store):
    from mlkit.training.transfer import load_warm_start_data

    first = load_dataset(shop(tmp_path, "first", ["Rome", "Oslo"]), "sold", features=FEATURES)
    run, _ = trained(store, first)
    data = load_warm_start_data(shop(tmp_path, "second", ["Rome", "Lisbon"]), source_model=run)
    again = reload_dataset(json.loads(json.dumps(data.record())))
    assert again.fingerprint == data.fingerprint
    assert {name: spec.type for name, spec in again.features.items()} == {
        name: spec.type for name, spec in data.features.items()
    }
    np.testing.assert_array_equal(again.splits["test"], data.splits["test"])


# -- sample weights --


def gradients(model, batch) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of one full batch, as Keras computes them."""
    import keras
    import tensorflow as tf

    features, labels, weights = keras.utils.unpack_x_y_sample_weight(batch)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x=features, y=labels, y_pred=model(features, training=True), sample_weight=weights)
    total = len(labels) if weights is None else float(tf.reduce_sum(weights))
    values = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
    scale = len(labels) / total  # Keras divides by the number of rows; the weighted mean is compared
    return float(loss) * scale, [tf.convert_to_tensor(value).numpy() * scale for value in values]


def test_a_row_with_weight_three_counts_as_three_rows(tmp_path):
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 4, 120)
    columns = {"x": rng.normal(size=120), "c": rng.choice(["a", "b"], 120), "y": rng.choice(["no", "yes"], 120)}
    once = write(tmp_path, "once", **columns, n=counts)
    often = write(tmp_path, "often", **{name: np.repeat(values, counts) for name, values in columns.items()})
    weighted = load_dataset(once, "y", sample_weight="n", fractions=(1, 0, 0))
    repeated = load_dataset(often, "y", fractions=(1, 0, 0))
    repeated = replace(repeated, features=weighted.features)
    model = ready(weighted, "mlp")
    results = [gradients(model, next(iter(data.to_tf("train", batch_size=500)))) for data in (weighted, repeated)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for gradient, expected in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_balanced_class_weights_increase_the_recall_of_a_rare_class(tmp_path):
    from mlkit.training import fit

    rng = np.random.default_rng(6)
    x = rng.normal(size=(3_000, 2))
    fraud = rng.random(3_000) < 0.06 / (1 + np.exp(-2 * x[:, 0])) * 2
    path = write(tmp_path, "cards", x=x[:, 0], z=x[:, 1], y=np.where(fraud, "fraud", "honest"))
    recall = {}
    for class_weight in (None, "balanced"):
        data = load_dataset(path, "y", class_weight=class_weight, split="random")
        model = ready(data, "linear")
        fit(model, data, epochs=8, learning_rate=0.05)
        predicted_fraud = predict(model, data)[:, 0] < 0.5  # class 0 is fraud
        recall[class_weight] = predicted_fraud[fraud].mean()
    assert recall[None] < 0.05
    assert recall["balanced"] > 0.5


def test_streamed_and_loaded_rows_have_the_same_weights(tmp_path):
    from mlkit.data import open_dataset

    rng = np.random.default_rng(2)
    columns = {"x": rng.normal(size=500), "c": rng.choice(["a", "b"], 500), "key": np.arange(500)}
    outcome = rng.choice(["no", "yes"], 500, p=[0.9, 0.1])
    path = write(tmp_path, "rows", **columns, w=rng.integers(0, 3, 500), y=outcome)
    options = {"sample_weight": "w", "class_weight": "balanced", "split": "hash", "key": "key"}
    opened, loaded = open_dataset(path, "y", **options), load_dataset(path, "y", **options)
    for split in ("train", "validation", "all"):
        streamed_batch, loaded_batch = (
            next(iter(data.to_tf(split, batch_size=500, shuffle=False))) for data in (opened, loaded)
        )
        np.testing.assert_array_equal(streamed_batch[1], loaded_batch[1])
        np.testing.assert_allclose(streamed_batch[2], loaded_batch[2], rtol=1e-6)
    again = open_dataset(**json.loads(json.dumps(opened.arguments)))
    assert again.split_digest == opened.split_digest != open_dataset(path, "y", ignore="w").split_digest
    pl.read_parquet(path).with_columns(w=pl.col("w") - 1).write_parquet(tmp_path / "negative.parquet")
    with pytest.raises(DatasetError, match="Weight column 'w' is missing, negative"):
        open_dataset(tmp_path / "negative.parquet", "y", sample_weight="w")


def test_rows_with_weight_zero_do_not_change_the_training(tmp_path):
    from mlkit.training import set_seed

    set_seed(1)
    path = write(tmp_path, "rows", x=np.arange(40.0), y=["a", "b"] * 20, w=[1.0] * 20 + [0.0] * 20)
    changed = write(
        tmp_path, "changed", x=np.arange(40.0), y=["a", "b"] * 10 + ["b", "a"] * 10, w=[1.0] * 20 + [0.0] * 20
    )
    learned = []
    for file in (path, changed):
        data = load_dataset(file, "y", sample_weight="w", fractions=(1, 0, 0))
        model = ready(data, "mlp")
        model.fit(data.to_tf("train", shuffle=False, batch_size=8), epochs=2, shuffle=False, verbose=0)
        learned.append(model.get_weights())
    for weight, expected in zip(*learned, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_fit_uses_class_weights_for_training_only(tmp_path):
    from mlkit.training import fit

    wine = load_dataset("wine")
    plain, weighted = wine, load_dataset("wine", class_weight={"class_0": 5})
    assert {len(weighted.to_tf(split).element_spec) for split in ("train", "validation", "test")} == {3}
    histories = [fit(ready(data, "mlp"), data, epochs=2, seed=1) for data in (plain, weighted)]
    assert histories[0]["loss"] != histories[1]["loss"]
    rows = weighted.splits["validation"]
    assert set(weighted.weights[rows]) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_weight": "alcool"}, "Did you mean 'alcohol'"),
        ({"class_weight": "balansed"}, "Did you mean 'balanced'"),
        ({"class_weight": {"class_9": 1}}, "class_weight= names 'class_9'"),
        ({"class_weight": {"class_1": "much"}}, "gives 'class_1' 'much'"),
        ({"class_weight": 3}, "Received: 3"),
    ],
)
def test_invalid_weights_are_rejected(options, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset("wine", **options)


@pytest.mark.parametrize("bad", [-1.0, None, float("nan"), float("inf")])
def test_rows_without_a_weight_are_named(tmp_path, bad):
    path = write(tmp_path, "rows", x=np.arange(40.0), y=["a", "b"] * 20, w=[1.0] * 7 + [bad] + [1.0] * 32)
    with pytest.raises(DatasetError, match=r"Weight column 'w' .* in 1 rows, among them row 7"):
        load_dataset(path, "y", sample_weight="w")


def test_class_weights_change_the_training_signature(tmp_path, store, capsys):
    from mlkit.training.checkpoints import training_signature

    signatures = []
    for options in ({}, {"class_weight": "balanced"}, {"class_weight": {"class_0": 2}}):
        data = load_dataset("wine", **options)
        signatures.append(json.dumps(training_signature(ready(data, "linear"), data, batch_size=32)))
    assert len(set(signatures)) == 3


def test_loading_data_does_not_import_tensorflow():
    code = "import sys; from mlkit.data import load_dataset; load_dataset('wine', class_weight='balanced');"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('tensorflow' in sys.modules)"],
        capture_output=True, text=True, env=os.environ.copy(), check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr
