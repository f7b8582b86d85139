"""TensorBoard event files, read back; diagnostics of a training; both without any effect on the training."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from keras import layers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.projector import ProjectorConfig

from mlkit.data import Dataset, load_dataset, open_dataset
from mlkit.errors import ParameterError
from mlkit.models import build_model
from mlkit.training.diagnostics import LayerProbe, TrainingDiagnostics, diagnose, probe_batch
from mlkit.training.tensorboard import TensorBoardLogger, parse_profile, row_names, write_projector
from tests.conftest import ADULT

MULTICLASS, BINARY, SQUARES = "sparse_categorical_crossentropy", "binary_crossentropy", "mean_squared_error"


def train(
    model: keras.Model, data: Dataset, loss: str, *callbacks: Any, epochs: int = 3, optimizer: Any = "adam"
) -> None:
    """Train with plain Keras, in the same order of rows each time."""
    keras.utils.set_random_seed(1)
    model.compile(optimizer, loss, metrics=["accuracy"] if data.task != "regression" else [])
    validation = data.to_tf("validation")
    model.fit(
        data.to_tf("train"), validation_data=validation, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0
    )


def train_with_events(folder: Path, model: keras.Model, data: Dataset, loss: str, **options: Any) -> Path:
    """Train three epochs with diagnostics and event files."""
    diagnostics = TrainingDiagnostics(data)
    logger = TensorBoardLogger(folder, diagnostics, **options)
    steps = iter(range(1, 10**6))
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: logger.profiler.on_step_end(next(steps))
    )
    train(model, data, loss, diagnostics, logger, count)
    return folder


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def read_tags(folder: Path) -> dict[str, tuple[str, int]]:
    """Plugin and number of records of each tag."""
    events = read_events(folder)
    plugins = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.Tags()["tensors"]}
    return {tag: (plugin, len(events.Tensors(tag))) for tag, plugin in plugins.items()}


@pytest.fixture(scope="module")
def shop() -> Dataset:
    return load_dataset("retail", rows=2000)


@pytest.fixture(scope="module")
def images(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, keras.Model]:
    folder, model = tmp_path_factory.mktemp("digits") / "tensorboard", build_model("cnn", digits)
    return train_with_events(
        folder, model, digits, MULTICLASS, profile=(5, 8), parameters={"epochs": 3, "schema": None}
    ), model


def test_curves(images: tuple[Path, keras.Model]) -> None:
    training, validation = (read_tags(images[0] / split) for split in ("train", "validation"))
    names = ("loss", "accuracy", "learning_rate", "rows_per_second", "gradient_norm")
    assert {name: training[f"epoch_{name}"] for name in names} == dict.fromkeys(names, ("scalars", 3))
    assert validation["epoch_loss"] == validation["epoch_accuracy"] == ("scalars", 3)
    rates = read_events(images[0] / "train").Tensors("epoch_rows_per_second")
    assert min(tf.make_ndarray(rate.tensor_proto) for rate in rates) > 0


def test_histograms_of_weights_gradients_and_activations(images: tuple[Path, keras.Model]) -> None:
    folder, model = images
    tags = read_tags(folder / "train")
    for weight in model.trainable_weights:
        assert tags[f"weights/{weight.path}"] == tags[f"gradients/{weight.path}"] == ("histograms", 4)  # with epoch 0
    for layer in ("convolution_1", "convolution_2", "hidden", "logits", "probabilities"):
        assert tags[f"activations/{layer}"] == ("histograms", 4)
    last = tf.make_ndarray(read_events(folder / "train").Tensors("weights/logits/kernel")[-1].tensor_proto)
    kernel = model.get_layer("logits").kernel.numpy()
    np.testing.assert_allclose([last[0, 0], last[-1, 1], last[:, 2].sum()], [kernel.min(), kernel.max(), kernel.size])


def test_graph_and_images(images: tuple[Path, keras.Model]) -> None:
    assert read_events(images[0] / "train").Tags()["graph"]
    events = read_events(images[0] / "validation")
    for tag in ("confusion_matrix", "wrong_predictions"):
        assert read_tags(images[0] / "validation")[tag] == ("images", 3)
        for image in events.Tensors(tag):
            width, height, png = image.tensor_proto.string_val
            pixels = tf.io.decode_png(png).numpy()
            assert pixels.shape == (int(height), int(width), 3)
            assert pixels.std() > 10  # not blank


def test_parameters_for_the_hparams_page(images: tuple[Path, keras.Model]) -> None:
    events = read_events(images[0])
    start = events.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    session = hparams.parse_session_start_info_plugin_data(start)
    assert (session.hparams["epochs"].number_value, session.hparams["schema"].string_value) == (3, "None")
    end = events.SummaryMetadata(hparams.SESSION_END_INFO_TAG).plugin_data.content
    assert hparams.parse_session_end_info_plugin_data(end).status == 1  # success


def test_a_profile_of_the_requested_steps(images: tuple[Path, keras.Model]) -> None:
    (trace,) = (images[0] / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_no_profile_without_a_request_or_for_steps_that_are_over(tmp_path: Path) -> None:
    diagnostics = TrainingDiagnostics(load_dataset("breast_cancer"))
    logger = TensorBoardLogger(tmp_path / "resumed", diagnostics, resumed=True, profile=(5, 8))
    logger.profiler.on_step_end(8)
    logger.profiler.close()
    assert not (tmp_path / "resumed" / "plugins").exists()
    assert logger.profiler.next_boundary(8) is None
    assert TensorBoardLogger(tmp_path / "other", diagnostics).profiler.next_boundary(0) is None


def test_an_interrupted_profile_is_written(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, TrainingDiagnostics(load_dataset("breast_cancer")), profile=(3, 9))
    assert logger.profiler.next_boundary(0) == 2
    logger.profiler.on_step_end(2)
    tf.constant(1.0) + 1
    logger.profiler.close()
    logger.profiler.on_step_end(5)  # does not start again
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("steps", ["10", "20,10", "0,5", "a,b", "1,2,3"])
def test_an_invalid_profile_is_rejected(steps: str) -> None:
    with pytest.raises(ParameterError, match="as in '10,20'"):
        parse_profile(steps)


def test_tables_of_embeddings_with_named_rows(shop: Dataset, tmp_path: Path) -> None:
    model = build_model("mlp", shop)
    folder = train_with_events(tmp_path, model, shop, BINARY if shop.task == "binary" else MULTICLASS) / "train"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    reader = tf.train.load_checkpoint(str(folder))
    assert len(config.embeddings) > 3
    for embedding in config.embeddings:
        values, layer = reader.get_tensor(embedding.tensor_name), embedding.tensor_name.partition("/")[0]
        np.testing.assert_array_equal(values, model.get_layer(layer).get_weights()[0])  # at the end of training
        names = (folder / embedding.metadata_path).read_text().splitlines()
        assert names == row_names(shop.features[layer.removeprefix("embedding_")])
        assert len(names) == len(values)


def test_rows_of_a_shared_table_say_that_they_have_no_name(shop: Dataset, tmp_path: Path) -> None:
    model = build_model("wide_deep", shop)
    inputs = {name: keras.Input((), name=name, dtype="string") for name in list(shop.features)[:2]}
    numbers = layers.Hashing(5)(keras.ops.stack(list(inputs.values()), axis=1))
    shared = keras.Model(inputs, layers.Dense(1)(layers.Embedding(5, 3, name="both")(numbers)))
    assert write_projector(shared, shop, tmp_path) == ["both"]
    assert (tmp_path / "both.tsv").read_text().splitlines()[-1] == "(row 4, no name)"
    assert "wide_categories" not in write_projector(model, shop, tmp_path)  # one dimension is not shown


@pytest.mark.parametrize("family", ["cnn", "resnet"])
def test_logging_does_not_change_the_training(family: str, digits: Dataset, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    variables = []
    for logged in (False, True):
        model = build_model(family, digits)  # with dropout, or batch normalization
        if logged:
            train_with_events(tmp_path, model, digits, MULTICLASS, profile=(5, 8))
        else:
            train(model, digits, MULTICLASS)
        variables.append([variable.numpy() for variable in (*model.variables, *model.optimizer.variables)])
    for without_logging, with_logging in zip(*variables, strict=True):
        np.testing.assert_array_equal(without_logging, with_logging)


def test_a_resumed_training_appends_to_the_event_files(digits: Dataset, tmp_path: Path) -> None:
    first, second = TrainingDiagnostics(digits), TrainingDiagnostics(digits)
    model = build_model("cnn", digits)
    train(model, digits, MULTICLASS, first, TensorBoardLogger(tmp_path, first), epochs=1)
    second.resume(first.epochs, first.state())
    train(model, digits, MULTICLASS, second, TensorBoardLogger(tmp_path, second, resumed=True), epochs=1)
    tags = read_tags(tmp_path / "train")
    assert tags["weights/logits/kernel"] == ("histograms", 3)  # the initial ones once
    assert tags["epoch_loss"] == ("scalars", 2)
    assert tags["epoch_rows_per_second"] == ("scalars", 1)  # not known of an epoch that began in another process
    assert [metrics.epoch for metrics in second.layer_metrics] == [0, 1, 1]


def test_streamed_rows_and_regression(tmp_path: Path) -> None:
    load_dataset("retail", rows=1000).table.write_parquet(tmp_path / "shop.parquet")
    label = load_dataset("retail", rows=1000).label
    data = open_dataset(str(tmp_path / "shop.parquet"), label=label)
    train_with_events(tmp_path / "streamed", build_model("mlp", data), data, BINARY)
    assert read_tags(tmp_path / "streamed" / "validation")["confusion_matrix"] == ("images", 3)
    diabetes = load_dataset("diabetes")
    train_with_events(tmp_path / "regression", build_model("mlp", diabetes), diabetes, SQUARES)
    assert "confusion_matrix" not in read_tags(tmp_path / "regression" / "validation")


def test_without_validation_rows(digits: Dataset, tmp_path: Path) -> None:
    data = replace(digits, splits=digits.splits | {"validation": np.array([], "int64")})
    diagnostics, model = TrainingDiagnostics(data), build_model("cnn", data)
    model.compile("adam", MULTICLASS)
    callbacks = [diagnostics, TensorBoardLogger(tmp_path, diagnostics)]
    model.fit(data.to_tf("train"), epochs=2, callbacks=callbacks, shuffle=False, verbose=0)
    assert read_tags(tmp_path / "train")["epoch_rows_per_second"] == ("scalars", 2)


STRATEGY = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from mlkit.data import load_dataset
from mlkit.training.diagnostics import LayerProbe
from mlkit.training.tensorboard import PredictionImages
from mlkit.models import build_model
import numpy as np
data = load_dataset("digits")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
plain = build_model("cnn", data)
with strategy.scope():
    mirrored = build_model("cnn", data)
results = []
for model in (plain, mirrored):
    model.compile("adam", "sparse_categorical_crossentropy")
    metrics = LayerProbe(model, data)(0).metrics
    results.append((metrics, [image.SerializeToString() for image in PredictionImages(data).summaries(model)]))
assert type(mirrored.weights[0].value).__name__ == "MirroredVariable"
(expected, expected_images), (metrics, images) = results
np.testing.assert_allclose(list(metrics.gradients.values()), list(expected.gradients.values()), rtol=1e-5)
assert metrics.dead_units == expected.dead_units and images == expected_images
"""


def test_mirrored_weights_have_the_same_metrics_and_images() -> None:
    result = subprocess.run([sys.executable, "-c", STRATEGY], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


# -- diagnostics --


def train_with_diagnostics(
    model: keras.Model, data: Dataset, loss: str, epochs: int, optimizer: Any = "adam"
) -> TrainingDiagnostics:
    diagnostics, stop = TrainingDiagnostics(data), keras.callbacks.EarlyStopping(patience=5)
    train(model, data, loss, diagnostics, stop, epochs=epochs, optimizer=optimizer)
    return diagnostics


@pytest.mark.parametrize(
    ("name", "family", "loss", "epochs"),
    [
        ("digits", "cnn", MULTICLASS, 30),
        ("digits", "resnet", MULTICLASS, 16),  # after 8 epochs it is still falling with the rounding of some CPUs
        ("breast_cancer", "mlp", BINARY, 60),
        ("diabetes", "mlp", SQUARES, 60),
        ("wine", "mlp", MULTICLASS, 80),
    ],
)
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_healthy_trainings_have_no_warnings(name: str, family: str, loss: str, epochs: int, rate: float) -> None:
    data = load_dataset(name)
    diagnostics = train_with_diagnostics(build_model(family, data), data, loss, epochs, keras.optimizers.Adam(rate))
    assert diagnostics.warnings == []


@pytest.mark.slow
@pytest.mark.skipif(not ADULT.exists(), reason="the census is not here")
@pytest.mark.parametrize("family", ["mlp", "wide_deep"])
def test_a_healthy_training_on_the_census_has_no_warnings(family: str) -> None:
    data = load_dataset(str(ADULT), label=ADULT.open().readline().strip().split(",")[-1])
    diagnostics = train_with_diagnostics(build_model(family, data), data, BINARY, 3, keras.optimizers.Adam(2e-3))
    assert diagnostics.warnings == []


def stacked(activation: str, count: int, bias: float = 0.0) -> keras.Model:
    inputs = {"image": keras.Input((8, 8, 1), name="image")}
    x = layers.Flatten()(inputs["image"]) / 16
    for number in range(1, count + 1):
        initializer = keras.initializers.Constant(bias if number == 1 else 0.0)
        x = layers.Dense(32, activation, bias_initializer=initializer, name=f"hidden_{number}")(x)
    return keras.Model(inputs, layers.Dense(10, "softmax", name="probabilities")(x))


def find_warning(diagnostics: TrainingDiagnostics, text: str) -> str:
    """The only warning that contains a text."""
    (warning,) = [warning for warning in diagnostics.warnings if text in warning]
    return warning


def test_dead_units_are_noticed(digits: Dataset) -> None:
    warning = find_warning(train_with_diagnostics(stacked("relu", 2, bias=-10.0), digits, MULTICLASS, 2), "dead")
    assert warning.startswith("32 of 32 units of hidden_1")
    assert "after epoch 2 (never active on 179 training rows)" in warning


def test_vanishing_gradients_are_noticed(digits: Dataset) -> None:
    warning = find_warning(train_with_diagnostics(stacked("sigmoid", 12), digits, MULTICLASS, 3), "Vanishing")
    assert "the gradient of hidden_1 is" in warning


def test_exploding_gradients_are_noticed() -> None:
    data = load_dataset("diabetes")
    optimizer = keras.optimizers.Adam(0.3)
    diagnostics = train_with_diagnostics(build_model("mlp", data), data, SQUARES, 3, optimizer)
    assert "smaller learning_rate" in find_warning(diagnostics, "Exploding")


def test_a_nan_loss_is_noticed() -> None:
    data = load_dataset("diabetes")
    diagnostics = train_with_diagnostics(build_model("mlp", data), data, SQUARES, 2, keras.optimizers.SGD(0.1))
    assert diagnostics.warnings == ["The loss is NaN or infinite since epoch 1: try a smaller learning_rate."]


def test_overfitting_is_noticed() -> None:
    data = load_dataset("diabetes")
    few = replace(data, splits=data.splits | {"train": data.splits["train"][:60]})
    diagnostics = TrainingDiagnostics(few)
    train(build_model("mlp", few, hidden=(256, 256)), few, SQUARES, diagnostics, epochs=60)
    assert "the validation loss has risen from" in find_warning(diagnostics, "Overfitting since epoch")


def test_a_training_without_learning_is_noticed(digits: Dataset) -> None:
    optimizer = keras.optimizers.SGD(1e-9)
    diagnostics = train_with_diagnostics(build_model("cnn", digits), digits, MULTICLASS, 3, optimizer)
    assert find_warning(diagnostics, "No learning in 3 epochs")


def test_too_few_epochs_are_noticed(digits: Dataset) -> None:
    diagnostics = train_with_diagnostics(build_model("mlp", digits), digits, MULTICLASS, 3)
    assert "more than 3 epochs would help" in find_warning(diagnostics, "falling")


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"loss": loss, "val_loss": loss} for loss in losses]


@pytest.mark.parametrize(
    "epochs", [[], curve(0.5), curve(0.5, 0.5), [{"loss": 0.5}], [{"loss": 0.0}] * 9, curve(0.0, 0.0)]
)
@pytest.mark.parametrize("baseline_loss", [None, 0.0, 0.4])
def test_short_and_flat_curves_can_be_diagnosed(epochs: list, baseline_loss: float | None) -> None:
    problems = diagnose(epochs, max_epochs=len(epochs), baseline_loss=baseline_loss)
    assert all(isinstance(problem, str) for problem in problems)


def test_a_probe_uses_fewer_rows_when_memory_runs_out(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("cnn", digits)
    model.compile("adam", MULTICLASS)
    probe = LayerProbe(model, digits, rows=100)
    compute: Callable = probe._compute

    def compute_with_little_memory(weights: Any) -> Any:
        if len(probe._batch[1]) > 30:
            raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
        return compute(weights)

    monkeypatch.setattr(probe, "_compute", compute_with_little_memory)
    assert probe(0).metrics.rows == 25


def test_fewer_large_images_are_probed(digits: Dataset) -> None:
    pixels = np.zeros((len(digits.labels), 8, 8, 1), "float32")
    large = {"image": replace(digits.features["image"], shape=(4096, 1024, 1))}
    assert len(probe_batch(replace(digits, inputs=pixels, features=large), "train", 256)[1]) == 4
