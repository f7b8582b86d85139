"""Recommendation with two towers: its training, its predictions and its export."""

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset
from mlkit.data.synthetic import interactions
from mlkit.errors import DatasetError, ModelError

ITEM = ("category", "brand", "price")
SMALL = {"rows": 4000, "items": 60}


@pytest.fixture(scope="module")
def choices():
    return load_dataset("interactions", **SMALL)


def tensors(dataset, split="test"):
    import tensorflow as tf

    return {name: tf.constant(values) for name, values in dataset.take(split)[0].items()}


def towers(dataset, **hyperparameters):
    from mlkit.models import build_model

    return build_model("two_tower", dataset, **{"item": ITEM, "dimension": 8, "hidden": (16,)} | hyperparameters)


# -- the data --


def test_what_describes_items_is_no_feature(choices):
    assert set(choices.features).isdisjoint({"user", "item", *ITEM})
    assert choices.task == "multiclass"
    assert len(choices.classes) == 60


def test_options_of_the_simulation_reach_it_and_impossible_ones_are_refused():
    assert load_dataset("interactions", rows=300, items=4, simulation_seed=1).table.equals(interactions(300, 4, 1))
    with pytest.raises(DatasetError, match="two items at least"):
        load_dataset("interactions", items=1)
    with pytest.raises(DatasetError, match="Did you mean 'items'"):
        load_dataset("interactions", itms=3)


# -- training --


def test_training_repeats_itself_and_learns(choices):
    from mlkit.training import fit

    weights = []
    for _ in range(2):
        model = towers(choices)
        history = fit(model, choices, epochs=3, batch_size=128)
        weights.append(model.get_weights())
    assert history["val_loss"][-1] < history["val_loss"][0]
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_batch_that_holds_every_item_is_judged_like_all_items(choices):
    """The correction vanishes, and the loss in training is the loss of the predictions."""
    import keras
    import tensorflow as tf

    model = towers(choices, item_dropout=0.0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy())
    model.catalogue.share = tf.ones_like(model.catalogue.share) * 0.999999  # certain to be in the batch
    features, labels = choices.take("train")
    assert len(np.unique(labels)) == 60
    features = {name: tf.constant(values) for name, values in features.items()}
    among = model.compute_loss(y=tf.constant(labels), y_pred=model(features, training=True))
    whole = model.compute_loss(y=tf.constant(labels), y_pred=model(features, training=False))
    np.testing.assert_allclose(float(among), float(whole), rtol=1e-4)


def test_hopeless_scores_still_have_a_loss(choices):
    """The loss is computed from scores: probabilities would be cut off at 1e-7."""
    import keras
    import tensorflow as tf

    model = towers(choices, temperature=0.005)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy())
    features, labels = choices.take("train")
    features = {name: tf.constant(values) for name, values in features.items()}

    @tf.function(autograph=False)
    def loss():
        return model.compute_loss(y=tf.constant(labels), y_pred=model(features, training=True))

    assert float(loss()) > 16.2  # more than the logarithm of 1e-7


def test_a_weight_of_zero_leaves_a_row_out_of_the_loss(choices):
    import keras
    import tensorflow as tf

    model = towers(choices, item_dropout=0.0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy())
    users, labels = model(tensors(choices), training=True), tf.constant(choices.labels_of("test"))
    first = tf.cast(tf.range(len(labels)) < 10, tf.float32)
    losses = [
        float(model.compute_loss(y=labels, y_pred=users, sample_weight=weights)) for weights in (first, first * 2)
    ]
    assert losses[0] > 0
    np.testing.assert_allclose(losses[1], 2 * losses[0], rtol=1e-6)
    assert float(model.compute_loss(y=labels, y_pred=users, sample_weight=first * 0)) == 0


@pytest.mark.slow
def test_a_training_cut_off_ends_as_if_it_had_not_been(choices, tmp_path):
    import keras

    from mlkit.runs.store import RunStore
    from mlkit.training import fit

    class Cut(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    whole = towers(choices)
    fit(whole, choices, epochs=4, batch_size=128, callbacks=[keras.callbacks.Callback()])
    run = RunStore(tmp_path).create("train")
    with pytest.raises(KeyboardInterrupt):
        fit(towers(choices), choices, epochs=4, batch_size=128, run=run, callbacks=[Cut()])
    again = towers(choices)
    fit(again, choices, epochs=4, batch_size=128, run=RunStore(tmp_path).get(run.id))
    for first, second in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_more_is_found_than_by_popularity():
    from mlkit.evaluation import evaluate
    from mlkit.training import fit

    data = load_dataset("interactions", rows=20_000, items=200)
    model = towers(data, dimension=32, hidden=(64,))
    fit(model, data, epochs=6, batch_size=256, learning_rate=2e-3)
    scores, wanted = evaluate(model, data).scores, data.labels_of("test")

    def recall(scores):
        return (np.argsort(-scores, axis=1)[:, :10] == wanted[:, None]).any(axis=1).mean()

    popular = np.tile(np.bincount(data.labels_of("train"), minlength=200), (len(wanted), 1))
    assert recall(scores) > 1.5 * recall(popular)


# -- items --


def own(folder, rows=400):
    """A table of choices: item `b` costs more as time goes on."""
    rng = np.random.default_rng(0)
    item = rng.choice(["a", "b", "c"], rows)
    price = np.where(item == "b", np.arange(rows) / 10, 5.0)
    people = {"mood": rng.choice(["good", "bad"], rows), "age": rng.normal(40, 9, rows)}
    table = pl.DataFrame(people | {"item": item, "price": price})
    table.write_csv(path := folder / "own.csv")
    return str(path)


def test_an_item_is_described_by_its_last_training_row(tmp_path):
    from mlkit.models.families import _rows_of_items

    data = load_dataset(own(tmp_path), label="item", ignore=["price"])
    train = data.rows("train")
    wanted = [train[data.labels[train] == number].max() for number in range(3)]
    assert _rows_of_items(data).tolist() == wanted


def test_an_item_without_training_rows_is_predicted_by_its_columns(tmp_path):
    """Never chosen in training, it is nothing but its columns: two such items differ in nothing else."""
    table = pl.read_csv(own(tmp_path)).with_columns(kind=pl.lit("old"), when=pl.int_range(pl.len()))
    new = pl.DataFrame({"mood": ["good"] * 4, "age": [30.0] * 4, "item": ["x", "y"] * 2, "price": [5.0] * 4})
    new = new.with_columns(kind=pl.lit("new"))
    new = new.with_columns(when=pl.int_range(1000, 1004, dtype=pl.Int64))
    pl.concat([table, new.select(table.columns)]).write_csv(path := tmp_path / "new.csv")
    options = {"split": "time", "key": "when", "fractions": (0.9, 0.05, 0.05), "ignore": ["price", "kind"]}
    data = load_dataset(str(path), label="item", **options)
    model = towers(data, item=["price", "kind"])
    vectors = dict(zip(data.classes, model.item_embeddings(), strict=True))
    np.testing.assert_array_equal(vectors["x"], vectors["y"])
    assert not np.array_equal(vectors["x"], vectors["a"])
    assert np.isfinite(model(tensors(data))).all()


@pytest.mark.parametrize(
    ("options", "hyperparameters", "message"),
    [
        ({"ignore": ["price"]}, {"item": ["prise"]}, "Did you mean 'price'"),
        ({}, {"item": ["price"]}, r"ignore=\['price'\]"),
        ({"ignore": ["price"]}, {"item": ["item"]}, "not a column"),
        ({"ignore": ["price"], "classes": ["a", "b", "c", "d"]}, {"item": "price"}, "1 of 4 items have no row.*: d"),
        ({"ignore": ["price"]}, {"item": {"price": "text"}}, "words are needed"),
        ({"ignore": ["price"]}, {"item": (), "temperature": -1}, "greater than 0"),
        ({"ignore": ["price"]}, {"item": (), "dimension": -1}, "cannot be built"),
    ],
)
def test_items_that_cannot_be_described_are_refused(tmp_path, options, hyperparameters, message):
    data = load_dataset(own(tmp_path), label="item", **options)
    with pytest.raises((ModelError, DatasetError), match=message):
        towers(data, **hyperparameters)


def test_another_task_is_refused():
    with pytest.raises(ModelError, match="task 'binary'"):
        towers(load_dataset("breast_cancer"), item=())


def test_items_with_words_and_gaps(tmp_path):
    titles = {"a": "red shoe", "b": None, "c": "blue shoe"}
    path = own(tmp_path)
    table = pl.read_csv(path).with_columns(title=pl.col("item").replace_strict(titles))
    table.write_csv(path)
    data = load_dataset(path, label="item", ignore=["price", "title"])
    model = towers(data, item={"price": "bucket", "title": "text"})
    assert np.isfinite(model(tensors(data))).all()


# -- serving --


def test_the_best_ten_are_those_of_the_model(choices, tmp_path):
    from mlkit.export import export_saved_model, load_saved_model

    model = towers(choices)
    served = load_saved_model(export_saved_model(model, choices, tmp_path / "shop"))
    assert not set(served.features) & set(ITEM)
    customers = choices.take("test")[0]
    strangers = {
        name: np.array([None, "never seen"] if feature.dtype == "string" else [np.nan, 1e6], object)
        for name, feature in served.features.items()
    }
    everybody = {name: np.concatenate([customers[name].astype(object), strangers[name]]) for name in served.features}
    prediction = served(everybody)
    raw = {name: feature.tensor(everybody[name]) for name, feature in served.features.items()}
    probabilities = model(raw).numpy()
    np.testing.assert_allclose(prediction["probabilities"], probabilities, atol=1e-6)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :10]
    np.testing.assert_allclose(prediction["top_scores"], np.take_along_axis(probabilities, best, axis=1), atol=1e-6)
    same = prediction["top_classes"] == np.array(choices.classes, object)[best]
    gaps = np.abs(np.diff(np.sort(-probabilities, axis=1)[:, :11], axis=1)).min(axis=1)
    assert same[gaps > 1e-5].all()
    assert prediction["top_classes"].shape == (len(best), 10)


def test_few_classes_are_predicted_without_top_items(tmp_path):
    from mlkit.export import export_saved_model, load_saved_model

    data = load_dataset(own(tmp_path), label="item", ignore=["price"])
    served = load_saved_model(export_saved_model(towers(data, item=()), data, tmp_path / "small"))
    assert set(served({"mood": ["good"], "age": [30]})) == {"probabilities", "class", "score"}


def test_an_index_outside_finds_what_the_model_finds(choices, tmp_path):
    import tensorflow as tf

    from mlkit.export import export_saved_model

    model = towers(choices)
    path = export_saved_model(model, choices, tmp_path / "shop")
    index = pl.read_parquet(path / "assets.extra" / "item_embeddings.parquet")
    assert index["item"].to_list() == list(choices.classes)
    customers = tensors(choices)
    loaded = tf.saved_model.load(str(path))
    names = set(loaded.signatures["user_embedding"].structured_input_signature[1])
    assert len(names) == len(choices.features)
    scores = loaded.user_embedding(customers)["user_embedding"].numpy() @ index["embedding"].to_numpy().T
    probabilities = model(customers).numpy()
    shifted = np.log(probabilities) - scores
    np.testing.assert_allclose(shifted, np.broadcast_to(shifted.mean(axis=1, keepdims=True), shifted.shape), atol=1e-4)
