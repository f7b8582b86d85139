"""Smaller models: what each method promises, and each way in which making them can go wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras

from mlkit.data import Dataset, load_dataset
from mlkit.errors import InputError, ModelError, NotFoundError, ParameterError
from mlkit.evaluation import evaluate
from mlkit.export import compression, convert_model, export_saved_model, load_saved_model
from mlkit.export.compression import (
    Student,
    build_student,
    cluster_weights,
    copy_model,
    distill,
    measure_sparsity,
    prunable_weights,
    prune,
    quantize_aware,
    quantize_weights,
    weight_size,
)
from mlkit.export.compression_report import compress, keep_variant, measure_variants, read_variants, save_variants
from mlkit.models import build_model
from mlkit.runs.run import RunStore
from mlkit.training import fit
from tests.conftest import run_cli


@pytest.fixture(scope="module")
def network(digits: Dataset) -> keras.Model:
    """A trained network for images."""
    model = build_model("cnn", digits)
    fit(model, digits, epochs=6, learning_rate=2e-3)
    return model


@pytest.fixture(scope="module")
def perceptron(digits: Dataset) -> keras.Model:
    """A smaller one, where only the training matters."""
    model = build_model("mlp", digits, hidden=(16,))
    fit(model, digits, epochs=1)
    return model


@pytest.fixture(scope="module")
def shop() -> Dataset:
    return load_dataset("retail", rows=800)


@pytest.fixture(scope="module")
def patients() -> Dataset:
    return load_dataset("diabetes")


def accuracy(model: Any, dataset: Dataset) -> float:
    return evaluate(model, dataset).metrics["accuracy"]


def zeros(model: keras.Model) -> list[int]:
    return [int((weight.numpy() == 0).sum()) for weight in prunable_weights(model)]


def wanted(model: keras.Model, sparsity: float) -> list[int]:
    return [round(sparsity * weight.numpy().size) for weight in prunable_weights(model)]


# -- pruning --


def test_pruning_is_exact_packs_smaller_and_keeps_the_accuracy(network: keras.Model, digits: Dataset) -> None:
    before = [weight.copy() for weight in network.get_weights()]
    pruned = prune(network, digits, 0.7, epochs=6)
    assert zeros(pruned) == wanted(pruned, 0.7)
    assert weight_size(pruned).packed < 0.5 * weight_size(network).packed
    assert accuracy(pruned, digits) > accuracy(network, digits) - 0.05
    assert all(np.array_equal(one, other) for one, other in zip(before, network.get_weights(), strict=True))
    assert all(weight.constraint is None for weight in prunable_weights(pruned))


def test_zeros_stay_zero_through_many_steps_in_a_call_and_through_parts(
    perceptron: keras.Model, digits: Dataset
) -> None:
    counts: list[list[int]] = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            counts.append(zeros(self.model))

    pruned = prune(perceptron, digits, 0.6, epochs=2, callbacks=[Count()], parts=2)
    assert counts == [wanted(pruned, 0.6)] * 3  # slowly; then both are mended


def test_a_training_that_was_cut_off_goes_on_with_its_zeros(
    perceptron: keras.Model, digits: Dataset, tmp_path: Path
) -> None:
    class Stop(keras.callbacks.Callback):
        epoch = 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if (self.epoch, batch) == (1, 20):
                raise KeyboardInterrupt

    archive, how = RunStore(tmp_path), {"epochs": 4}
    run = archive.create("compress").start()
    with pytest.raises(KeyboardInterrupt):
        prune(perceptron, digits, 0.5, callbacks=[Stop()], run=run, **how)
    cut_off = archive.get(run.id)
    pruned = prune(perceptron, digits, 0.5, run=cut_off, **how)
    assert zeros(pruned) == wanted(pruned, 0.5)
    straight = prune(perceptron, digits, 0.5, epochs=4)
    for one, other in zip(pruned.get_weights(), straight.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_constraint_of_the_model_itself_holds_beside_the_mask(digits: Dataset) -> None:
    model = build_model("mlp", digits, hidden=(8,))
    weight = model.get_layer("hidden_1").kernel
    small = copy_model(model)
    mask = compression.Mask(small.get_layer("hidden_1").kernel)
    mask.earlier = keras.constraints.MaxNorm(0.5)
    mask.thin(0.5)
    left = np.asarray(mask(10 * weight.value))
    assert (left == 0).sum() == 256
    assert np.linalg.norm(left, axis=0).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("sparsity", [1.0, 0.0, -0.5, 1.5, float("nan")])
def test_a_share_of_zeros_that_cannot_be(network: keras.Model, digits: Dataset, sparsity: float) -> None:
    with pytest.raises(ParameterError, match="above 0 and below 1"):
        prune(network, digits, sparsity)


# -- eight bits --


def test_rounded_in_training_it_converts_to_integers_without_examples(
    network: keras.Model, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert")
    from mlkit.export.litert_runtime import load_litert

    aware = quantize_aware(network, digits, epochs=2)
    asked, batches = [], Dataset.batches
    monkeypatch.setattr(
        Dataset, "batches", lambda data, split, *a, **b: asked.append(split) or batches(data, split, *a, **b)
    )
    convert_model(aware, digits, tmp_path, ["int8"])
    assert "train" not in asked
    small = load_litert(tmp_path, "int8")
    details = {one["index"]: one["dtype"] for one in small._interpreter.get_tensor_details()}
    made = {one["op_name"]: details[one["outputs"][0]] for one in small._interpreter._get_ops_details()}
    assert made["CONV_2D"] == made["FULLY_CONNECTED"] == np.int8
    assert accuracy(small, digits) > accuracy(network, digits) - 0.05
    features = next(digits.batches("test", 200))
    exact, rounded = aware.predict(features, verbose=0), small(features)["probabilities"]
    assert (exact.argmax(axis=1) == rounded.argmax(axis=1)).mean() > 0.98  # what was learned is what runs


@pytest.mark.parametrize(("bits", "least"), [(8, 0.97), (4, 0.9)])
def test_keras_weights_answer_the_same_when_they_are_loaded_again(
    network: keras.Model, digits: Dataset, tmp_path: Path, bits: int, least: float
) -> None:
    rounded = quantize_weights(network, bits)
    served = load_saved_model(export_saved_model(rounded, digits, tmp_path))
    features = next(digits.batches("test", 200))
    here = rounded.predict(features, verbose=0)
    np.testing.assert_allclose(served(features)["probabilities"], here, atol=1e-6)
    assert (here.argmax(axis=1) == network.predict(features, verbose=0).argmax(axis=1)).mean() > least
    assert weight_size(rounded).bytes < 0.6 * weight_size(network).bytes


def test_shared_weights_are_few_and_pack_small(network: keras.Model, digits: Dataset) -> None:
    shared = cluster_weights(network, 16)
    assert max(len(np.unique(weight.numpy())) for weight in prunable_weights(shared)) <= 16
    assert weight_size(shared).packed < 0.3 * weight_size(network).packed
    assert accuracy(shared, digits) > accuracy(network, digits) - 0.03
    with pytest.raises(ParameterError, match="from 2 to 256"):
        cluster_weights(network, 257)


# -- students --


def test_a_student_learns_from_its_teacher_and_its_loss_is_not_negative(network: keras.Model, digits: Dataset) -> None:
    student = build_student(network, digits)
    features = next(iter(digits.to_tf("train", batch_size=64, shuffle=False)))[0]
    before = copy_model(student)
    assert distill(network, digits, student, epochs=8, learning_rate=2e-3) is student
    asked = Student(before, network, "multiclass")
    losses = [float(asked.taught_loss(features, model(features))) for model in (before, student, network)]
    assert losses[0] > losses[1] > losses[2] > -1e-6
    assert student.count_params() < network.count_params() / 10
    assert accuracy(student, digits) > 0.7 > accuracy(before, digits)


def test_with_the_teachers_answers_alone_labels_do_not_matter(patients: Dataset) -> None:
    teacher = build_model("mlp", patients)
    fit(teacher, patients, epochs=15, learning_rate=5e-3)
    student = distill(teacher, patients, epochs=15, learning_rate=1e-2, share=1.0)
    said, taught = (evaluate(model, patients).scores for model in (teacher, student))
    assert np.corrcoef(said, taught)[0, 1] > 0.9


def test_two_classes_are_taught_by_one_number(shop: Dataset) -> None:
    teacher = build_model("mlp", shop, hidden=(32,))
    features, labels = next(iter(shop.to_tf("train", batch_size=32, shuffle=False)))[:2]
    student = Student(build_student(teacher, shop, hidden=(4,)), teacher, "binary")
    student.compile("adam", "binary_crossentropy")
    loss = student.compute_loss(features, labels, student(features), None, True)
    assert float(loss) > 0
    assert float(student.taught_loss(features, teacher(features))) == pytest.approx(0, abs=1e-6)


def test_wrong_students(network: keras.Model, digits: Dataset, patients: Dataset) -> None:
    with pytest.raises(ModelError, match="there is nothing to gain"):
        build_student(network, digits, "cnn", filters=(256, 256))
    with pytest.raises(ModelError, match="There is no small 'mpl'"):
        build_student(network, digits, "mpl")
    with pytest.raises(ModelError, match="is for tables"):
        build_student(network, digits, "wide_deep")
    with pytest.raises(ModelError, match=r"cnn takes no size 'hiden'\. Did you mean 'hidden'"):
        build_student(network, digits, "cnn", hiden=3)
    for wrong in ({"temperature": 0}, {"share": 0}, {"share": 1.5}):
        with pytest.raises(ParameterError, match="temperature is above 0"):
            distill(network, digits, **wrong)


# -- models that nothing here is for --


def test_models_that_cannot_be_taken_apart(digits: Dataset, shop: Dataset) -> None:
    class Own(keras.Model):
        def call(self, features: Any) -> Any:
            return features

    with pytest.raises(ModelError, match="is no functional model"):
        prune(Own(name="own"), digits)
    visits = load_dataset("retail", rows=400, label="device")
    with pytest.raises(ModelError, match="is its catalogue"):
        compress(build_model("two_tower", visits), visits, ["prune"])
    both = load_dataset("retail", label=["clicked", "purchased"], rows=400)
    with pytest.raises(ModelError, match="a model for each label"):
        compress(build_model("mlp", both), both, ["prune"])


# -- variants in a run --


@pytest.fixture(scope="module")
def compressed(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with variants of a model for a table, and what was measured."""
    model = build_model("wide_deep", shop, hidden=(16,), cross_rows=0)
    fit(model, shop, epochs=1)
    run = RunStore(tmp_path_factory.mktemp("variants")).create("compress").start()
    models = compress(model, shop, ["quantize_aware", "int8"], epochs=1)
    save_variants(models, shop, run)
    return run, measure_variants(run, shop, "the-original", slices=["device"])


def test_variants_of_a_table_are_measured_on_the_same_rows(compressed: Any, shop: Dataset) -> None:
    run, variants = compressed
    names = [each.name for each in variants.variants]
    assert names == [
        "original, SavedModel",
        *(f"original, LiteRT {kind}" for kind in ("float32", "int8", "full_int8")),
        "quantize_aware, SavedModel",
        "quantize_aware, LiteRT int8",
        "int8, SavedModel",
    ]
    assert variants.measure == "auc"
    served = evaluate(load_saved_model(run.folder / "variants" / "original" / "saved_model"), shop)
    assert variants.variants[0].measures["auc"][0] == served.metrics["auc"]
    assert all(each.worst.name.startswith("device=") for each in variants.variants)
    assert all(each.worst.value <= each.measures["auc"][0] + 1e-9 for each in variants.variants)
    assert read_variants(run) == variants
    kept = {artifact.path for artifact in run.record.artifacts}
    assert {"variants.json", "variants/int8/saved_model/1/saved_model.pb"} <= kept


def test_the_front_holds_what_nothing_else_beats(compressed: Any) -> None:
    _, variants = compressed
    for cost in ("packed", "milliseconds"):
        front = variants.front(cost)
        for each in variants.variants:
            beaten = [
                one
                for one in variants.variants
                if getattr(one, cost) <= getattr(each, cost)
                and one.measures["auc"][0] >= each.measures["auc"][0]
                and (getattr(one, cost), -one.measures["auc"][0]) != (getattr(each, cost), -each.measures["auc"][0])
            ]
            assert (each in front) == (not beaten) or each.measures == front[0].measures


def test_one_is_taken_over_unless_the_run_is_signed(compressed: Any) -> None:
    run, _ = compressed
    kept = keep_variant(run, "quantize_aware")
    assert kept.kept == read_variants(run).kept == "quantize_aware"
    source = run.folder / "variants" / "quantize_aware"
    for place in ("saved_model/1/saved_model.pb", "litert/int8/model.tflite"):
        assert (run.folder / place).read_bytes() == (source / place).read_bytes()
        assert any(artifact.path == place for artifact in run.record.artifacts)
    (run.folder / "model.sig").write_text("{}")
    with pytest.raises(InputError, match="is signed"):
        keep_variant(run, "int8")
    (run.folder / "model.sig").unlink()
    assert read_variants(run).kept == "quantize_aware"


def test_what_is_missing_or_damaged_is_said(compressed: Any, shop: Dataset, tmp_path: Path) -> None:
    run, _ = compressed
    empty = RunStore(tmp_path).create("compress").start()
    with pytest.raises(NotFoundError, match="holds no variants"):
        measure_variants(empty, shop)
    with pytest.raises(NotFoundError, match=r"has no variants\.json"):
        read_variants(empty)
    shutil.copy(run.folder / "variants.json", empty.folder)
    (empty.folder / "variants.json").write_text((empty.folder / "variants.json").read_text()[:-20])
    with pytest.raises(ModelError, match="is damaged"):
        read_variants(empty)
    with pytest.raises(ParameterError, match="keep='distil' is none of what is made"):
        keep_variant(run, "distil")


# -- the command --


def test_the_command_compresses_a_run_and_keeps_one(trained: tuple[Path, dict]) -> None:
    folder, record = trained
    options = ("--method", "cluster", "--method", "int8", "--keep", "cluster", "--json")
    result = run_cli("compress", record["id"], *options, folder=folder)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert {each["method"] for each in told["variants"]} == {"original", "cluster", "int8"}
    run = RunStore(folder / "runs").get(told["run"])
    assert run.parents == [record["id"]]
    assert run.record.metrics["original_test_accuracy"] == pytest.approx(record["metrics"]["test_accuracy"], abs=1e-6)
    assert run.record.metrics["cluster_packed"] < 0.5 * run.record.metrics["original_packed"]
    assert run.record.metrics["test_accuracy"] == run.record.metrics["cluster_test_accuracy"]
    assert (run.folder / "saved_model" / "1" / "saved_model.pb").is_file()
    assert (run.folder / "plots" / "variants.png").is_file()
    assert measure_sparsity(copy_model(build_model("cnn", load_dataset("digits")))) == 0  # a fresh model has no zeros


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("latest", "--method", "prunn"), "Did you mean 'prune'?"),
        (("latest",), "saved_model"),
    ],
)
def test_the_command_refuses_before_anything_runs(cli: Any, project: Path, arguments: tuple, said: str) -> None:
    with RunStore(project / "runs").create("train"):
        pass  # without a model
    result = cli("compress", *arguments)
    assert result.returncode == 2
    assert said in " ".join(result.stderr.split())
    assert len(list((project / "runs").glob("*-compress-*"))) == 0
