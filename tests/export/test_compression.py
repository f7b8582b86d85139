"""Compressed models have the promised size and accuracy, and invalid input is rejected."""

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
from mlkit.runs.store import RunStore
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
    """A smaller network, for tests of the training."""
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


def expected_zeros(model: keras.Model, sparsity: float) -> list[int]:
    return [round(sparsity * weight.numpy().size) for weight in prunable_weights(model)]


# -- pruning --


def test_pruning_is_exact_compresses_and_keeps_the_accuracy(network: keras.Model, digits: Dataset) -> None:
    before = [weight.copy() for weight in network.get_weights()]
    pruned = prune(network, digits, 0.7, epochs=6)
    assert zeros(pruned) == expected_zeros(pruned, 0.7)
    assert weight_size(pruned).packed < 0.5 * weight_size(network).packed
    assert accuracy(pruned, digits) > accuracy(network, digits) - 0.05
    assert all(np.array_equal(old, new) for old, new in zip(before, network.get_weights(), strict=True))
    assert all(weight.constraint is None for weight in prunable_weights(pruned))


def test_zeros_stay_zero_with_many_steps_per_execution_and_with_micro_batches(
    perceptron: keras.Model, digits: Dataset
) -> None:
    counts: list[list[int]] = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            counts.append(zeros(self.model))

    pruned = prune(perceptron, digits, 0.6, epochs=2, callbacks=[Count()], micro_batches=2)
    assert counts == [expected_zeros(pruned, 0.6)] * 3  # gradual; then both are fine-tuned


def test_a_resumed_training_keeps_its_zeros(perceptron: keras.Model, digits: Dataset, tmp_path: Path) -> None:
    class Stop(keras.callbacks.Callback):
        epoch = 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if (self.epoch, batch) == (1, 20):
                raise KeyboardInterrupt

    store = RunStore(tmp_path)
    run = store.create("compress").start()
    with pytest.raises(KeyboardInterrupt):
        prune(perceptron, digits, 0.5, callbacks=[Stop()], run=run, epochs=4)
    interrupted = store.get(run.id)
    pruned = prune(perceptron, digits, 0.5, run=interrupted, epochs=4)
    assert zeros(pruned) == expected_zeros(pruned, 0.5)
    uninterrupted = prune(perceptron, digits, 0.5, epochs=4)
    for resumed, expected in zip(pruned.get_weights(), uninterrupted.get_weights(), strict=True):
        np.testing.assert_array_equal(resumed, expected)


def test_the_models_own_constraint_is_applied_with_the_mask(digits: Dataset) -> None:
    model = build_model("mlp", digits, hidden=(8,))
    weight = model.get_layer("hidden_1").kernel
    small = copy_model(model)
    mask = compression.PruningMask(small.get_layer("hidden_1").kernel)
    mask.original_constraint = keras.constraints.MaxNorm(0.5)
    mask.prune(0.5)
    masked = np.asarray(mask(10 * weight.value))
    assert (masked == 0).sum() == 256
    assert np.linalg.norm(masked, axis=0).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("sparsity", [1.0, 0.0, -0.5, 1.5, float("nan")])
def test_an_invalid_sparsity_is_rejected(network: keras.Model, digits: Dataset, sparsity: float) -> None:
    with pytest.raises(ParameterError, match="above 0 and below 1"):
        prune(network, digits, sparsity)


# -- eight bits --


def test_a_quantization_aware_model_converts_to_integers_without_representative_data(
    network: keras.Model, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ai_edge_litert")
    from mlkit.export.litert_runtime import load_litert

    aware = quantize_aware(network, digits, epochs=2)
    splits, batches = [], Dataset.batches
    monkeypatch.setattr(
        Dataset, "batches", lambda data, split, *a, **b: splits.append(split) or batches(data, split, *a, **b)
    )
    convert_model(aware, digits, tmp_path, ["int8"])
    assert "train" not in splits
    small = load_litert(tmp_path, "int8")
    details = {tensor["index"]: tensor["dtype"] for tensor in small._interpreter.get_tensor_details()}
    types = {op["op_name"]: details[op["outputs"][0]] for op in small._interpreter._get_ops_details()}
    assert types["CONV_2D"] == types["FULLY_CONNECTED"] == np.int8
    assert accuracy(small, digits) > accuracy(network, digits) - 0.05
    features = next(digits.batches("test", 200))
    exact, rounded = aware.predict(features, verbose=0), small(features)["probabilities"]
    assert (exact.argmax(axis=1) == rounded.argmax(axis=1)).mean() > 0.98  # the converter keeps the learned rounding


@pytest.mark.parametrize(("bits", "least"), [(8, 0.97), (4, 0.9)])
def test_quantized_weights_are_exported_and_loaded(
    network: keras.Model, digits: Dataset, tmp_path: Path, bits: int, least: float
) -> None:
    rounded = quantize_weights(network, bits)
    served = load_saved_model(export_saved_model(rounded, digits, tmp_path))
    features = next(digits.batches("test", 200))
    expected = rounded.predict(features, verbose=0)
    np.testing.assert_allclose(served(features)["probabilities"], expected, atol=1e-6)
    assert (expected.argmax(axis=1) == network.predict(features, verbose=0).argmax(axis=1)).mean() > least
    assert weight_size(rounded).bytes < 0.6 * weight_size(network).bytes


def test_clustered_weights_are_few_and_compress_well(network: keras.Model, digits: Dataset) -> None:
    clustered = cluster_weights(network, 16)
    assert max(len(np.unique(weight.numpy())) for weight in prunable_weights(clustered)) <= 16
    assert weight_size(clustered).packed < 0.3 * weight_size(network).packed
    assert accuracy(clustered, digits) > accuracy(network, digits) - 0.03
    with pytest.raises(ParameterError, match="from 2 to 256"):
        cluster_weights(network, 257)


# -- students --


def test_a_student_learns_from_its_teacher_and_its_loss_is_not_negative(network: keras.Model, digits: Dataset) -> None:
    student = build_student(network, digits)
    features = next(iter(digits.to_tf("train", batch_size=64, shuffle=False)))[0]
    before = copy_model(student)
    assert distill(network, digits, student, epochs=8, learning_rate=2e-3) is student
    probe = Student(before, network, "multiclass")
    losses = [float(probe.distillation_loss(features, model(features))) for model in (before, student, network)]
    assert losses[0] > losses[1] > losses[2] > -1e-6
    assert student.count_params() < network.count_params() / 10
    assert accuracy(student, digits) > 0.7 > accuracy(before, digits)


def test_with_the_teacher_alone_labels_do_not_matter(patients: Dataset) -> None:
    teacher = build_model("mlp", patients)
    fit(teacher, patients, epochs=15, learning_rate=5e-3)
    student = distill(teacher, patients, epochs=15, learning_rate=1e-2, teacher_weight=1.0)
    teacher_scores, student_scores = (evaluate(model, patients).scores for model in (teacher, student))
    assert np.corrcoef(teacher_scores, student_scores)[0, 1] > 0.9


def test_a_binary_teacher_has_one_output(shop: Dataset) -> None:
    teacher = build_model("mlp", shop, hidden=(32,))
    features, labels = next(iter(shop.to_tf("train", batch_size=32, shuffle=False)))[:2]
    student = Student(build_student(teacher, shop, hidden=(4,)), teacher, "binary")
    student.compile("adam", "binary_crossentropy")
    loss = student.compute_loss(features, labels, student(features), None, True)
    assert float(loss) > 0
    assert float(student.distillation_loss(features, teacher(features))) == pytest.approx(0, abs=1e-6)


def test_invalid_students_are_rejected(network: keras.Model, digits: Dataset, patients: Dataset) -> None:
    with pytest.raises(ModelError, match="there is nothing to gain"):
        build_student(network, digits, "cnn", filters=(256, 256))
    with pytest.raises(ModelError, match="There is no small 'mpl'"):
        build_student(network, digits, "mpl")
    with pytest.raises(ModelError, match="is for tables"):
        build_student(network, digits, "wide_deep")
    with pytest.raises(ModelError, match=r"cnn has no hyperparameter 'hiden'\. Did you mean 'hidden'"):
        build_student(network, digits, "cnn", hiden=3)
    for options in ({"temperature": 0}, {"teacher_weight": 0}, {"teacher_weight": 1.5}):
        with pytest.raises(ParameterError, match="temperature is above 0"):
            distill(network, digits, **options)


# -- models that cannot be compressed --


def test_models_that_cannot_be_compressed_are_rejected(digits: Dataset, shop: Dataset) -> None:
    class Subclassed(keras.Model):
        def call(self, features: Any) -> Any:
            return features

    with pytest.raises(ModelError, match="is no functional model"):
        prune(Subclassed(name="own"), digits)
    visits = load_dataset("retail", rows=400, label="device")
    with pytest.raises(ModelError, match="is its catalogue"):
        compress(build_model("two_tower", visits), visits, ["prune"])
    both = load_dataset("retail", label=["clicked", "purchased"], rows=400)
    with pytest.raises(ModelError, match="a model for each label"):
        compress(build_model("mlp", both), both, ["prune"])


# -- variants in a run --


@pytest.fixture(scope="module")
def compressed(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with variants of a model for a table, and their results."""
    model = build_model("wide_deep", shop, hidden=(16,), cross_rows=0)
    fit(model, shop, epochs=1)
    run = RunStore(tmp_path_factory.mktemp("variants")).create("compress").start()
    models = compress(model, shop, ["quantize_aware", "int8"], epochs=1)
    save_variants(models, shop, run)
    return run, measure_variants(run, shop, "the-original", slices=["device"])


def test_variants_of_a_table_are_measured_on_the_same_rows(compressed: Any, shop: Dataset) -> None:
    run, variants = compressed
    names = [variant.name for variant in variants.variants]
    assert names == [
        "original, SavedModel",
        *(f"original, LiteRT {kind}" for kind in ("float32", "int8", "full_int8")),
        "quantize_aware, SavedModel",
        "quantize_aware, LiteRT int8",
        "int8, SavedModel",
    ]
    assert variants.metric == "auc"
    served = evaluate(load_saved_model(run.folder / "variants" / "original" / "saved_model"), shop)
    assert variants.variants[0].metrics["auc"][0] == served.metrics["auc"]
    assert all(variant.worst.name.startswith("device=") for variant in variants.variants)
    assert all(variant.worst.value <= variant.metrics["auc"][0] + 1e-9 for variant in variants.variants)
    assert read_variants(run) == variants
    listed = {artifact.path for artifact in run.record.artifacts}
    assert {"variants.json", "variants/int8/saved_model/1/saved_model.pb"} <= listed


def test_the_front_has_all_variants_that_are_not_dominated(compressed: Any) -> None:
    _, variants = compressed
    for cost in ("packed", "milliseconds"):
        front = variants.front(cost)
        points = [(getattr(variant, cost), -variant.metrics["auc"][0]) for variant in variants.variants]
        for variant, (price, loss) in zip(variants.variants, points, strict=True):
            dominating = [
                point for point in points if point[0] <= price and point[1] <= loss and point != (price, loss)
            ]
            assert (variant in front) == (not dominating) or variant.metrics == front[0].metrics


def test_a_variant_is_kept_unless_the_run_is_signed(compressed: Any) -> None:
    run, _ = compressed
    report = keep_variant(run, "quantize_aware")
    assert report.kept_method == read_variants(run).kept_method == "quantize_aware"
    source = run.folder / "variants" / "quantize_aware"
    for file in ("saved_model/1/saved_model.pb", "litert/int8/model.tflite"):
        assert (run.folder / file).read_bytes() == (source / file).read_bytes()
        assert any(artifact.path == file for artifact in run.record.artifacts)
    (run.folder / "model.sig").write_text("{}")
    with pytest.raises(InputError, match="is signed"):
        keep_variant(run, "int8")
    (run.folder / "model.sig").unlink()
    assert read_variants(run).kept_method == "quantize_aware"


def test_missing_and_damaged_results_are_reported(compressed: Any, shop: Dataset, tmp_path: Path) -> None:
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
    with pytest.raises(ParameterError, match="keep='distill' is none of what is made"):
        keep_variant(run, "distill")


# -- the command --


def test_the_command_compresses_a_run_and_keeps_one(trained: tuple[Path, dict]) -> None:
    folder, record = trained
    options = ("--method", "cluster", "--method", "int8", "--keep", "cluster", "--json")
    result = run_cli("compress", record["id"], *options, folder=folder)
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout)
    assert {variant["method"] for variant in output["variants"]} == {"original", "cluster", "int8"}
    run = RunStore(folder / "runs").get(output["run"])
    assert run.parents == [record["id"]]
    assert run.record.metrics["original_test_accuracy"] == pytest.approx(record["metrics"]["test_accuracy"], abs=1e-6)
    assert run.record.metrics["cluster_packed"] < 0.5 * run.record.metrics["original_packed"]
    assert run.record.metrics["test_accuracy"] == run.record.metrics["cluster_test_accuracy"]
    assert (run.folder / "saved_model" / "1" / "saved_model.pb").is_file()
    assert (run.folder / "plots" / "variants.png").is_file()
    assert measure_sparsity(copy_model(build_model("cnn", load_dataset("digits")))) == 0  # a fresh model has no zeros


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latest", "--method", "prunn"), "Did you mean 'prune'?"),
        (("latest",), "saved_model"),
    ],
)
def test_the_command_rejects_invalid_arguments_before_a_run_starts(
    cli: Any, project: Path, arguments: tuple, message: str
) -> None:
    with RunStore(project / "runs").create("train"):
        pass  # without a model
    result = cli("compress", *arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert len(list((project / "runs").glob("*-compress-*"))) == 0
