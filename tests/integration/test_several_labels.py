"""One model, several labels: from the data set to the served answer."""

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
from mlkit.errors import DatasetError, ModelError
from mlkit.runs.store import RunStore

LABELS = ["returned", "amount"]


def orders(rows: int = 600, seed: int = 1) -> pl.DataFrame:
    """Orders of a shop: whether they come back, and what they are worth, in cents; both follow from the columns."""
    rng = np.random.default_rng(seed)
    kind, size = rng.choice(["shoes", "shirts", "books"], rows), rng.integers(1, 6, rows)
    price = rng.gamma(4.0, 8.0, rows)
    odds = 1.5 * (kind == "shoes") - 2.0 * (kind == "books") + 0.04 * (price - 32)
    returned = np.where(rng.random(rows) < 1 / (1 + np.exp(-odds)), "yes", "no")
    amount = 100 * (price * size + rng.normal(0, 5, rows))
    named = {"kind": kind, "size": size, "price": price, "weight": rng.integers(1, 4, rows)}
    return pl.DataFrame(named | {"returned": returned, "amount": amount})


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    orders().write_csv(path := tmp_path_factory.mktemp("orders") / "orders.csv")
    return path


@pytest.fixture(scope="module")
def both(table):
    return load_dataset(table, LABELS, ignore="weight")


@pytest.fixture(scope="module")
def trained(both):
    from mlkit.models import build_model
    from mlkit.training import fit

    model = build_model("mlp", both)
    return model, fit(model, both, epochs=25, learning_rate=5e-3)


# -- data ----------------------------------------------------------------------------------------------------------


def test_labels_are_no_features_and_travel_by_name(both):
    assert (both.task, both.tasks) == ("multi", {"returned": "binary", "amount": "regression"})
    assert set(both.features) == {"kind", "size", "price"}
    features, truth = next(iter(both.to_tf(batch_size=8)))
    assert list(truth) == LABELS
    assert len(features["kind"]) == len(truth["amount"]) == 8
    [streamed] = both.stream(epochs=range(1), batch_size=1000)
    assert sorted(streamed[1]["amount"].numpy()) == sorted(both.labels_of("train")["amount"])


def test_batches_keep_features_and_labels_together(both):
    of_price = dict(zip(both.arrays["price"].tolist(), both.labels["amount"].tolist(), strict=True))
    for features, truth in both.to_tf(batch_size=100):
        assert truth["amount"].numpy().tolist() == [of_price[price] for price in features["price"].numpy().tolist()]


def test_a_view_is_the_data_set_of_its_label(table, both):
    alone = load_dataset(table, "returned", ignore=["weight", "amount"])
    view = both.outputs["returned"]
    assert view.inputs.equals(alone.inputs)
    assert (view.labels == alone.labels).all()
    assert (view.splits["test"] == alone.splits["test"]).all()
    assert (view.task, view.classes, view.label) == (alone.task, alone.classes, alone.label)


def test_a_list_of_one_is_that_label(table):
    single, plain = (load_dataset(table, label, ignore="amount") for label in (["returned"], "returned"))
    assert (single.task, single.label, single.fingerprint) == (plain.task, "returned", plain.fingerprint)
    assert (single.labels == plain.labels).all()


def test_rows_that_lack_any_label_are_dropped_and_told(tmp_path):
    known = orders(100).with_row_index()
    holes = known.with_columns(
        pl.when(pl.col("index") > 9).then("returned"), pl.when(pl.col("index") % 10 > 0).then("amount")
    )
    holes.drop("index").write_csv(tmp_path / "holes.csv")
    data = load_dataset(tmp_path / "holes.csv", LABELS)
    assert data.sizes["all"] == 81
    assert "10 of 100 rows have no 'returned' and were dropped." in data.warnings
    assert "10 of 100 rows have no 'amount' and were dropped." in data.warnings


def test_rows_weigh_for_all_labels(table, both):
    from mlkit.models import build_model
    from mlkit.training import fit

    weighed = load_dataset(table, LABELS, sample_weight="weight")
    *_, weights = next(iter(weighed.to_tf(batch_size=16)))
    assert set(np.unique(weights)) <= {1.0, 2.0, 3.0}
    history = fit(build_model("linear", weighed), weighed, epochs=2)
    assert np.isfinite(history["val_loss"]).all()
    assert history["loss"] != fit(build_model("linear", both), both, epochs=2)["loss"]


def test_what_cannot_be_meant_is_refused(table):
    def refuse(words: str, label=LABELS, **options):
        with pytest.raises(DatasetError, match=words):
            load_dataset(table, label, **options)

    refuse("names 'amount' twice", ["amount", "amount"])
    refuse("names no column", [])
    refuse("Did you mean 'amount'", ["returned", "amuont"])
    refuse("sample_weight='amount' is a label", sample_weight="amount")
    refuse("key='returned' is a label", split="hash", key="returned")
    refuse("class_weight= is for one label", class_weight="balanced")
    refuse("names 'amont', which is not a label. Did you mean", task={"amont": "regression"})
    refuse("Did you mean 'regression'", task={"amount": "regresion"})


def test_names_that_would_mean_two_measures_are_refused(tmp_path):
    orders(50).with_columns(pl.col("amount").alias("gain"), pl.col("returned").alias("gain_pr")).with_columns(
        pl.col("returned").alias("paid in cash")
    ).write_csv(tmp_path / "names.csv")
    with pytest.raises(DatasetError, match="rename the column 'paid in cash'"):
        load_dataset(tmp_path / "names.csv", ["gain", "paid in cash"])
    with pytest.raises(DatasetError, match="'gain_pr_auc' would be a metric of both"):
        load_dataset(tmp_path / "names.csv", ["gain", "gain_pr"])


def test_streams_say_where_several_labels_are_possible(tmp_path):
    from mlkit.data import open_dataset

    orders(50).write_parquet(tmp_path / "orders.parquet")
    with pytest.raises(DatasetError, match="load_dataset takes several"):
        open_dataset(tmp_path / "orders.parquet", LABELS)


def test_a_record_loads_the_same_again(table, both):
    record = json.loads(json.dumps(both.record()))
    again = reload_dataset(record)
    assert (again.fingerprint, again.tasks, again.classes) == (both.fingerprint, both.tasks, both.classes)
    new = reload_dataset(record, table)
    assert (new.task, new.sizes["test"], list(new.features)) == ("multi", 600, list(both.features))
    assert reload_dataset(record, table, "amount").task == "regression"
    with pytest.raises(DatasetError, match="Did you mean 'amount'"):
        reload_dataset(record, table, ["returned", "amonut"])


# -- models and training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mlp", "wide_deep", "linear"])
def test_every_family_of_tables_answers_all_labels(both, family):
    from mlkit.models import build_model

    answers = build_model(family, both)(next(iter(both.to_tf(batch_size=5)))[0])
    assert {name: tuple(item.shape) for name, item in answers.items()} == {"returned": (5, 1), "amount": (5, 1)}


def test_a_text_family_answers_all_labels(tmp_path):
    from mlkit.models import build_model

    table = orders(80).with_columns(note=pl.format("{} of size {}", "kind", "size"))
    table.write_csv(tmp_path / "notes.csv")
    data = load_dataset(tmp_path / "notes.csv", [*LABELS, "kind"], features={"note": "text"})
    answers = build_model("text", data)(next(iter(data.to_tf(batch_size=5)))[0])
    assert {name: tuple(item.shape)[1] for name, item in answers.items()} == {"returned": 1, "amount": 1, "kind": 3}


def test_the_labels_weigh_alike_whatever_their_unit(table, both):
    """Cents or euros: the same training."""
    from mlkit.models import build_model
    from mlkit.training import fit

    euros = replace(both, labels=both.labels | {"amount": both.labels["amount"] / 128})  # exact in floats
    first, second = (fit(build_model("mlp", data), data, epochs=3) for data in (both, euros))
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-4)
    assert 1.0 < first["loss"][0] < 3.0


def test_two_heads_are_as_good_as_two_models(tmp_path):
    from mlkit.evaluation import evaluate
    from mlkit.models import build_model
    from mlkit.training import fit

    orders(3000).drop("weight").write_csv(tmp_path / "many.csv")
    data = load_dataset(tmp_path / "many.csv", LABELS)

    def trained_evaluation(dataset):
        model = build_model("mlp", dataset)
        fit(model, dataset, epochs=12, learning_rate=5e-3)
        return evaluate(model, dataset)

    together, alone = (
        trained_evaluation(data),
        {label: trained_evaluation(view).metrics for label, view in data.outputs.items()},
    )
    guess = evaluate(lambda rows: {"probabilities": np.full((len(rows["kind"]), 2), 0.5)}, data.outputs["returned"])
    gained = guess.metrics["log_loss"] - alone["returned"]["log_loss"]
    assert gained > 0.1
    assert together["returned"].metrics["log_loss"] < alone["returned"]["log_loss"] + 0.1 * gained
    assert together["amount"].metrics["r2"] > alone["amount"]["r2"] - 0.02 > 0.9


def test_measures_are_named_by_label(both, trained):
    from mlkit.evaluation import evaluate

    history = trained[1]
    measures = {"returned_accuracy", "returned_log_loss", "amount_mean_absolute_error"}
    assert measures | {"loss"} | {f"val_{name}" for name in measures} <= set(history.epochs[0])
    assert not {"returned_loss", "amount_loss"} & set(history.epochs[0])
    matches = evaluate(trained[0], both, "validation")
    for name in measures:
        assert history.metrics[f"val_{name}"] == pytest.approx(matches.run_metrics[f"val_{name}"], rel=1e-3)


def test_a_batch_in_parts_has_the_same_gradient(both):
    from mlkit.models import build_model
    from mlkit.training import fit

    losses = [
        fit(build_model("mlp", both), both, epochs=2, batch_size=64, micro_batches=micro_batches)["loss"]
        for micro_batches in (1, 3)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_models_with_other_heads_are_refused(both, trained, tmp_path):
    from mlkit.evaluation import evaluate
    from mlkit.export import export_saved_model
    from mlkit.models import build_model
    from mlkit.training import fit

    single = build_model("mlp", both.outputs["returned"])
    other = build_model("mlp", replace(both, label=("returned", "size"), tasks={"returned": "binary", "size": "binary"},
                                       classes={"returned": ("no", "yes"), "size": ("a", "b")},
                                       labels=both.labels | {"size": both.labels["returned"]}))  # fmt: skip
    for wrong in (single, other):
        with pytest.raises(ModelError):
            fit(wrong, both)
        with pytest.raises(ModelError):
            evaluate(wrong, both)
        with pytest.raises(ModelError):
            export_saved_model(wrong, both, tmp_path / "wrong")
    with pytest.raises(ModelError, match="the label returned"):
        fit(trained[0], both.outputs["returned"])
    assert not (tmp_path / "wrong").exists()


def test_a_builder_of_ones_own_answers_by_label(both):
    import keras

    from mlkit.models import build_model
    from mlkit.models.preprocessing import SeededLayers, concatenate_features, encode_table

    def build(dataset, seed, named=("returned", "amount")):
        encoded = encode_table(dataset.features, make := SeededLayers(seed))
        x = concatenate_features(encoded, make)
        last = {"returned": "sigmoid", "amount": None}
        return keras.Model(encoded.inputs, {name: keras.layers.Dense(1, last[name])(x) for name in named})

    assert set(build_model(build, both).output) == set(LABELS)
    with pytest.raises(ModelError, match="needs a dictionary of predictions for returned, amount"):
        build_model(build, both, named=("amount",))


# -- runs ----------------------------------------------------------------------------------------------------------


class PowerCutError(Exception):
    """Interrupts a training as a power cut would."""


def test_a_training_that_was_cut_off_ends_on_the_same_bits(both, tmp_path):
    import keras

    from mlkit.models import build_model
    from mlkit.training import fit
    from mlkit.training.trainer import _fit_counts

    def train(run, **options):
        model = build_model("mlp", both)
        history = fit(model, both, epochs=5, run=run, checkpoint_every_minutes=1e-9, **options)
        return model.get_weights(), history

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise PowerCutError

    store = RunStore(tmp_path)
    whole, measured = train(store.create("train"))
    run = store.create("train")
    with pytest.raises(PowerCutError):
        train(run, callbacks=[Stop()])
    _fit_counts.pop(run)  # as in another process
    weights, history = train(run)
    assert all((single == other).all() for single, other in zip(whole, weights, strict=True))
    assert history.epochs == measured.epochs


def test_a_later_day_goes_on_with_all_heads(both, trained, tmp_path):
    from mlkit.export import export_saved_model
    from mlkit.models import build_model
    from mlkit.training import warm_start
    from mlkit.training.transfer import load_warm_start_data

    folder = export_saved_model(trained[0], both, tmp_path / "first")
    later = orders(300, seed=2).with_columns(kind=pl.col("kind").replace("books", "hats")).drop("weight")
    later.write_csv(tmp_path / "later.csv")
    data = load_warm_start_data(tmp_path / "later.csv", source_model=folder)
    assert (data.label, data.tasks) == (both.label, both.tasks)
    assert data.label_scale == both.label_scale
    model = build_model("mlp", data)
    assert warm_start(model, data, folder).extended_tables
    features = next(iter(both.to_tf("test", batch_size=50)))[0]
    for name, answers in trained[0](features).items():
        np.testing.assert_allclose(answers, model(features)[name], rtol=1e-5)
    with pytest.raises(DatasetError, match="labels and their order stay the same"):
        load_warm_start_data(tmp_path / "later.csv", ["amount", "returned"], source_model=folder)


def test_the_whole_job(table, tmp_path):
    """The list of labels from the command line to the SavedModel, asked in Python and by TensorFlow alone."""
    from mlkit.export import load_saved_model

    env = os.environ | {"MLKIT_RUNS_ROOT": str(tmp_path / "runs"), "CUDA_VISIBLE_DEVICES": ""}
    parameters = {"dataset": table, "label": "[returned, amount]", "model": "mlp", "epochs": 3}
    given = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    command = [sys.executable, "-m", "mlkit", "run", "train", *given, "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    run = RunStore(tmp_path / "runs").get("latest")
    assert run.record.parameters["label"] == LABELS
    metrics = {"val_returned_accuracy", "test_returned_auc", "test_amount_r2", "baseline_linear_returned_log_loss"}
    assert metrics <= set(run.record.metrics)
    assert run.record.data[0]["tasks"] == {"returned": "binary", "amount": "regression"}
    assert len(RunStore(tmp_path / "runs").list(where="test_returned_accuracy > 0"))
    report = (run.folder / "notebook.ipynb").read_text(encoding="utf-8")
    assert "<h4>returned</h4>" in report
    assert "<h4>amount</h4>" in report
    served = load_saved_model(run.folder)
    answers = served({"kind": ["shoes", "books"], "size": [2, 1], "price": [80.0, 20.0], "weight": [1, 1]})
    assert {"returned_class", "returned_probabilities", "returned_score", "amount_prediction"} == set(answers)
    assert set(answers["returned_class"]) <= {"yes", "no"}

    other = [sys.executable, "-m", "mlkit", "run", "evaluate", "-p", f"run={run.id}", "--json"]
    done = subprocess.run(other, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    metrics = RunStore(tmp_path / "runs").get("latest").record.metrics
    assert metrics["test_amount_r2"] == pytest.approx(run.record.metrics["test_amount_r2"], rel=1e-3)


def test_board_draws_each_classification(both, trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mlkit.models import build_model
    from mlkit.training import fit

    run = RunStore(tmp_path).create("train")
    fit(build_model("mlp", both), both, epochs=1, run=run)
    board = EventAccumulator(str(run.tensorboard / "validation")).Reload()
    tags = set(board.Tags()["tensors"])
    assert {"epoch_returned_accuracy", "epoch_amount_mean_absolute_error"} <= tags
    assert {tag for tag in tags if tag.endswith("_confusion_matrix")} == {"returned_confusion_matrix"}


def test_health_knows_what_a_constant_answer_costs(both):
    from mlkit.models import build_model
    from mlkit.training import compile_model
    from mlkit.training.diagnostics import constant_loss

    model = compile_model(build_model("mlp", both), both)
    assert constant_loss(model, both) == pytest.approx(2.0, rel=1e-3)
    model.compile("sgd", {"returned": "binary_crossentropy", "amount": "mae"})  # weighed by nobody
    numbers = both.outputs["amount"].labels_of("train")
    expected = 0.69 + np.abs(numbers - numbers.mean()).mean()
    assert constant_loss(model, both) == pytest.approx(expected, rel=1e-2)
