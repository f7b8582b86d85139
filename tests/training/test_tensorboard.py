"""What TensorBoard finds of a training, and what is noticed in one: the files read back, the training untouched."""

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
from mlkit.training.diagnostics import LayerProbe, TrainingDiagnostics, diagnose, fixed_rows
from mlkit.training.tensorboard import TensorBoardLogger, read_profile, row_names, write_projector
from tests.conftest import ADULT

MULTICLASS, BINARY, SQUARES = "sparse_categorical_crossentropy", "binary_crossentropy", "mean_squared_error"


def train(
    model: keras.Model, data: Dataset, loss: str, *callbacks: Any, epochs: int = 3, optimizer: Any = "adam"
) -> None:
    """Plain Keras, the same order of rows each time."""
    keras.utils.set_random_seed(1)
    model.compile(optimizer, loss, metrics=["accuracy"] if data.task != "regression" else [])
    judged = data.to_tf("validation")
    model.fit(data.to_tf("train"), validation_data=judged, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)


def written(folder: Path, model: keras.Model, data: Dataset, loss: str, **options: Any) -> Path:
    """Train three epochs with a board that profiles steps 5 to 8."""
    watch = TrainingDiagnostics(data)
    board = TensorBoardLogger(folder, watch, **options)
    steps = iter(range(1, 10**6))
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: board.profile_step(next(steps)))
    train(model, data, loss, watch, board, count)
    return folder


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def tags(board: EventAccumulator) -> dict[str, tuple[str, int]]:
    """Kind of each tag, and how often it was written."""
    kind = {tag: board.SummaryMetadata(tag).plugin_data.plugin_name for tag in board.Tags()["tensors"]}
    return {tag: (kind[tag], len(board.Tensors(tag))) for tag in kind}


@pytest.fixture(scope="module")
def shop() -> Dataset:
    return load_dataset("retail", rows=2000)


@pytest.fixture(scope="module")
def images(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, keras.Model]:
    folder, model = tmp_path_factory.mktemp("digits") / "tensorboard", build_model("cnn", digits)
    return written(folder, model, digits, MULTICLASS, profile=(5, 8), parameters={"epochs": 3, "schema": None}), model


def test_curves(images: tuple[Path, keras.Model]) -> None:
    training, validation = (tags(events(images[0] / part)) for part in ("train", "validation"))
    names = ("loss", "accuracy", "learning_rate", "rows_per_second", "gradient_norm")
    assert {name: training[f"epoch_{name}"] for name in names} == dict.fromkeys(names, ("scalars", 3))
    assert validation["epoch_loss"] == validation["epoch_accuracy"] == ("scalars", 3)
    values = [
        tf.make_ndarray(each.tensor_proto) for each in events(images[0] / "train").Tensors("epoch_rows_per_second")
    ]
    assert min(values) > 0


def test_histograms_of_weights_gradients_and_activations(images: tuple[Path, keras.Model]) -> None:
    folder, model = images
    found = tags(events(folder / "train"))
    for weight in model.trainable_weights:
        assert found[f"weights/{weight.path}"] == found[f"gradients/{weight.path}"] == ("histograms", 4)  # epoch 0, too
    for layer in ("convolution_1", "convolution_2", "hidden", "logits", "probabilities"):
        assert found[f"activations/{layer}"] == ("histograms", 4)
    last = tf.make_ndarray(events(folder / "train").Tensors("weights/logits/kernel")[-1].tensor_proto)
    kernel = model.get_layer("logits").kernel.numpy()
    np.testing.assert_allclose([last[0, 0], last[-1, 1], last[:, 2].sum()], [kernel.min(), kernel.max(), kernel.size])


def test_graph_and_pictures(images: tuple[Path, keras.Model]) -> None:
    assert events(images[0] / "train").Tags()["graph"]
    board = events(images[0] / "validation")
    for tag in ("confusion_matrix", "wrong_predictions"):
        assert tags(board)[tag] == ("images", 3)
        for each in board.Tensors(tag):
            width, height, png = each.tensor_proto.string_val
            pixels = tf.io.decode_png(png).numpy()
            assert pixels.shape == (int(height), int(width), 3)
            assert pixels.std() > 10  # something is drawn


def test_parameters_for_the_hparams_page(images: tuple[Path, keras.Model]) -> None:
    board = events(images[0])
    start = board.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    session = hparams.parse_session_start_info_plugin_data(start)
    assert (session.hparams["epochs"].number_value, session.hparams["schema"].string_value) == (3, "None")
    end = board.SummaryMetadata(hparams.SESSION_END_INFO_TAG).plugin_data.content
    assert hparams.parse_session_end_info_plugin_data(end).status == 1  # success


def test_a_profile_of_the_steps_asked_for(images: tuple[Path, keras.Model]) -> None:
    (trace,) = (images[0] / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_no_profile_without_a_request_or_for_steps_that_are_over(tmp_path: Path) -> None:
    watch = TrainingDiagnostics(load_dataset("breast_cancer"))
    board = TensorBoardLogger(tmp_path / "board", watch, resumed=True, profile=(5, 8))
    board.profile_step(8)
    board.close()
    assert not (tmp_path / "board" / "plugins").exists()
    assert board.profile_pause(8) is None
    assert TensorBoardLogger(tmp_path / "other", watch).profile_pause(0) is None


def test_a_profile_that_is_cut_off_is_written(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, TrainingDiagnostics(load_dataset("breast_cancer")), profile=(3, 9))
    assert board.profile_pause(0) == 2
    board.profile_step(2)
    tf.constant(1.0) + 1
    board.close()
    board.profile_step(5)  # does not start again
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("text", ["10", "20,10", "0,5", "a,b", "1,2,3"])
def test_a_profile_that_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="as in '10,20'"):
        read_profile(text)


def test_tables_of_embeddings_with_named_rows(shop: Dataset, tmp_path: Path) -> None:
    model = build_model("mlp", shop)
    folder = written(tmp_path, model, shop, BINARY if shop.task == "binary" else MULTICLASS) / "train"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    reader = tf.train.load_checkpoint(str(folder))
    assert len(config.embeddings) > 3
    for each in config.embeddings:
        values, layer = reader.get_tensor(each.tensor_name), each.tensor_name.partition("/")[0]
        np.testing.assert_array_equal(values, model.get_layer(layer).get_weights()[0])  # at the end of training
        names = (folder / each.metadata_path).read_text().splitlines()
        assert names == row_names(shop.features[layer.removesuffix("_embedding")])
        assert len(names) == len(values)


def test_rows_of_a_shared_table_say_that_they_have_no_name(shop: Dataset, tmp_path: Path) -> None:
    model = build_model("wide_deep", shop)
    inputs = {name: keras.Input((), name=name, dtype="string") for name in list(shop.features)[:2]}
    numbers = layers.Hashing(5)(keras.ops.stack(list(inputs.values()), axis=1))
    shared = keras.Model(inputs, layers.Dense(1)(layers.Embedding(5, 3, name="both")(numbers)))
    assert write_projector(shared, shop, tmp_path) == ["both"]
    assert (tmp_path / "both.tsv").read_text().splitlines()[-1] == "(row 4, no name)"
    assert "wide_categories" not in write_projector(model, shop, tmp_path)  # one number is no place in space


@pytest.mark.parametrize("family", ["cnn", "resnet"])
def test_training_ends_on_the_same_bits_with_and_without(family: str, digits: Dataset, tmp_path: Path) -> None:
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    variables = []
    for watched in (False, True):
        model = build_model(family, digits)  # with dropout, or batch normalization
        if watched:
            written(tmp_path, model, digits, MULTICLASS, profile=(5, 8))
        else:
            train(model, digits, MULTICLASS)
        variables.append([each.numpy() for each in (*model.variables, *model.optimizer.variables)])
    for plain, seen in zip(*variables, strict=True):
        np.testing.assert_array_equal(plain, seen)


def test_a_resumed_board_adds_to_what_is_there(digits: Dataset, tmp_path: Path) -> None:
    first, second = TrainingDiagnostics(digits), TrainingDiagnostics(digits)
    model = build_model("cnn", digits)
    train(model, digits, MULTICLASS, first, TensorBoardLogger(tmp_path, first), epochs=1)
    second.resume(first.epochs, first.state())
    train(model, digits, MULTICLASS, second, TensorBoardLogger(tmp_path, second, resumed=True), epochs=1)
    found = tags(events(tmp_path / "train"))
    assert found["weights/logits/kernel"] == ("histograms", 3)  # the beginning once
    assert found["epoch_loss"] == ("scalars", 2)
    assert found["epoch_rows_per_second"] == ("scalars", 1)  # of an epoch that may have begun elsewhere nobody knows
    assert [look.epoch for look in second.looks] == [0, 1, 1]


def test_streamed_rows_and_regression(tmp_path: Path) -> None:
    load_dataset("retail", rows=1000).table.write_parquet(tmp_path / "shop.parquet")
    label = load_dataset("retail", rows=1000).label
    data = open_dataset(str(tmp_path / "shop.parquet"), label=label)
    written(tmp_path / "streamed", build_model("mlp", data), data, BINARY)
    assert tags(events(tmp_path / "streamed" / "validation"))["confusion_matrix"] == ("images", 3)
    diabetes = load_dataset("diabetes")
    written(tmp_path / "numbers", build_model("mlp", diabetes), diabetes, SQUARES)
    assert "confusion_matrix" not in tags(events(tmp_path / "numbers" / "validation"))


def test_without_validation_rows(digits: Dataset, tmp_path: Path) -> None:
    data = replace(digits, splits=digits.splits | {"validation": np.array([], "int64")})
    watch, model = TrainingDiagnostics(data), build_model("cnn", data)
    model.compile("adam", MULTICLASS)
    model.fit(
        data.to_tf("train"), epochs=2, callbacks=[watch, TensorBoardLogger(tmp_path, watch)], shuffle=False, verbose=0
    )
    assert tags(events(tmp_path / "train"))["epoch_rows_per_second"] == ("scalars", 2)


STRATEGY = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from mlkit.data import load_dataset
from mlkit.training.diagnostics import LayerProbe
from mlkit.training.tensorboard import MistakePictures, write_projector
from mlkit.models import build_model
import numpy as np, pathlib, tempfile
data = load_dataset("digits")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
plain = build_model("cnn", data)
with strategy.scope():
    mirrored = build_model("cnn", data)
found = []
for model in (plain, mirrored):
    model.compile("adam", "sparse_categorical_crossentropy")
    look = LayerProbe(model, data)(0)
    found.append((look.measures, [each.SerializeToString() for each in MistakePictures(data).summaries(model)]))
assert type(mirrored.weights[0].value).__name__ == "MirroredVariable"
np.testing.assert_allclose(list(found[0][0].gradients.values()), list(found[1][0].gradients.values()), rtol=1e-5)
assert found[0][0].dead == found[1][0].dead and found[0][1] == found[1][1]
"""


def test_mirrored_weights_look_the_same() -> None:
    result = subprocess.run([sys.executable, "-c", STRATEGY], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


# What is noticed


def watched(model: keras.Model, data: Dataset, loss: str, epochs: int, optimizer: Any = "adam") -> TrainingDiagnostics:
    watch, stop = TrainingDiagnostics(data), keras.callbacks.EarlyStopping(patience=5)
    train(model, data, loss, watch, stop, epochs=epochs, optimizer=optimizer)
    return watch


@pytest.mark.parametrize(
    ("name", "family", "loss", "epochs"),
    [
        ("digits", "cnn", MULTICLASS, 30),
        ("digits", "resnet", MULTICLASS, 16),  # after 8 some processors' roundings leave it still falling
        ("breast_cancer", "mlp", BINARY, 60),
        ("diabetes", "mlp", SQUARES, 60),
        ("wine", "mlp", MULTICLASS, 80),
    ],
)
@pytest.mark.parametrize("rate", [1e-3, 3e-3])
def test_healthy_trainings_give_no_alarm(name: str, family: str, loss: str, epochs: int, rate: float) -> None:
    data = load_dataset(name)
    assert watched(build_model(family, data), data, loss, epochs, keras.optimizers.Adam(rate)).remarks == []


@pytest.mark.slow
@pytest.mark.skipif(not ADULT.exists(), reason="the census is not here")
@pytest.mark.parametrize("family", ["mlp", "wide_deep"])
def test_a_healthy_training_on_the_census_gives_no_alarm(family: str) -> None:
    data = load_dataset(str(ADULT), label=ADULT.open().readline().strip().split(",")[-1])
    assert watched(build_model(family, data), data, BINARY, 3, keras.optimizers.Adam(2e-3)).remarks == []


def stacked(activation: str, count: int, bias: float = 0.0) -> keras.Model:
    inputs = {"image": keras.Input((8, 8, 1), name="image")}
    x = layers.Flatten()(inputs["image"]) / 16
    for number in range(1, count + 1):
        start = keras.initializers.Constant(bias if number == 1 else 0.0)
        x = layers.Dense(32, activation, bias_initializer=start, name=f"hidden_{number}")(x)
    return keras.Model(inputs, layers.Dense(10, "softmax", name="probabilities")(x))


def noticed(watch: TrainingDiagnostics, beginning: str) -> str:
    (remark,) = [remark for remark in watch.remarks if beginning in remark]
    return remark


def test_dead_units_are_noticed(digits: Dataset) -> None:
    remark = noticed(watched(stacked("relu", 2, bias=-10.0), digits, MULTICLASS, 2), "dead")
    assert remark.startswith("32 of 32 units of hidden_1")
    assert "after epoch 2 (never active on 179 training rows)" in remark


def test_vanishing_gradients_are_noticed(digits: Dataset) -> None:
    remark = noticed(watched(stacked("sigmoid", 12), digits, MULTICLASS, 3), "vanish")
    assert "that of hidden_1 is" in remark


def test_exploding_gradients_are_noticed() -> None:
    data = load_dataset("diabetes")
    optimizer = keras.optimizers.Adam(0.3)
    assert "smaller learning_rate" in noticed(watched(build_model("mlp", data), data, SQUARES, 3, optimizer), "explode")


def test_a_loss_that_is_no_number_is_noticed() -> None:
    data = load_dataset("diabetes")
    watch = watched(build_model("mlp", data), data, SQUARES, 2, keras.optimizers.SGD(0.1))
    assert watch.remarks == ["The loss is no longer a number since epoch 1: try a smaller learning_rate."]


def test_overfitting_is_noticed() -> None:
    data = load_dataset("diabetes")
    few = replace(data, splits=data.splits | {"train": data.splits["train"][:60]})
    watch = TrainingDiagnostics(few)
    train(build_model("mlp", few, hidden=(256, 256)), few, SQUARES, watch, epochs=60)
    assert "the validation loss has risen from" in noticed(watch, "Overfitting since epoch")


def test_learning_nothing_is_noticed(digits: Dataset) -> None:
    watch = watched(build_model("cnn", digits), digits, MULTICLASS, 3, keras.optimizers.SGD(1e-9))
    assert noticed(watch, "Nothing is learned in 3 epochs")


def test_a_training_that_should_go_on_is_noticed(digits: Dataset) -> None:
    assert "more than 3 epochs would help" in noticed(
        watched(build_model("mlp", digits), digits, MULTICLASS, 3), "falling"
    )


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"loss": loss, "val_loss": loss} for loss in losses]


@pytest.mark.parametrize(
    "epochs", [[], curve(0.5), curve(0.5, 0.5), [{"loss": 0.5}], [{"loss": 0.0}] * 9, curve(0.0, 0.0)]
)
@pytest.mark.parametrize("constant", [None, 0.0, 0.4])
def test_short_and_flat_curves_can_be_diagnosed(epochs: list, constant: float | None) -> None:
    assert all(isinstance(remark, str) for remark in diagnose(epochs, limit=len(epochs), constant=constant))


def test_a_look_with_too_little_memory_takes_fewer_rows(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("cnn", digits)
    model.compile("adam", MULTICLASS)
    probe = LayerProbe(model, digits, rows=100)
    compute: Callable = probe._compute

    def scarce(weights: Any) -> Any:
        if len(probe._batch[1]) > 30:
            raise tf.errors.ResourceExhaustedError(None, None, "out of memory")
        return compute(weights)

    monkeypatch.setattr(probe, "_compute", scarce)
    assert probe(0).measures.rows == 25


def test_large_images_are_looked_at_in_small_numbers(digits: Dataset) -> None:
    pixels = np.zeros((len(digits.labels), 8, 8, 1), "float32")
    large = {"image": replace(digits.features["image"], shape=(4096, 1024, 1))}
    assert len(fixed_rows(replace(digits, inputs=pixels, features=large), "train", 256)[1]) == 4
