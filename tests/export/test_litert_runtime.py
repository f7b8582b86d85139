"""Converted models predict without TensorFlow, and every failure of a conversion is reported."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras
import tensorflow as tf

from mlkit.data import Dataset, load_dataset
from mlkit.errors import MissingDependencyError, ModelError, NotFoundError, ParameterError, StorageError
from mlkit.export import convert_model
from mlkit.export import litert as conversion
from mlkit.export.litert_runtime import load_litert
from mlkit.models import build_model

WITHOUT_TENSORFLOW = """
import json, sys
for name in ("tensorflow", "keras", "polars", "pydantic_settings"):
    sys.modules[name] = None  # importing it fails
from mlkit.export.litert_runtime import load_litert
outputs = load_litert(sys.argv[1])(json.loads(sys.argv[2]))
print(json.dumps({name: values.tolist() for name, values in outputs.items()}))
"""
KILLED = """
import os, sys
from pathlib import Path
from mlkit.export import litert as conversion
write, written = conversion.write_atomic, []
def killed(path, content):
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), 9)
    write(path, content)
conversion.write_atomic = killed
conversion._write_kinds(Path(sys.argv[1]), {"float32": b"one", "int8": b"two"}, {})
"""


@pytest.fixture(scope="module")
def shop() -> Dataset:
    return load_dataset("retail", rows=600)


@pytest.fixture(scope="module")
def converted(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a table, converted."""
    folder = tmp_path_factory.mktemp("converted")
    convert_model(build_model("wide_deep", shop), shop, folder, ["float32", "int8"])
    return folder


def rows_of(dataset: Dataset, count: int) -> dict[str, list]:
    """Test rows as a client sends them: None where a value is missing."""
    rows = {name: values.tolist() for name, values in next(dataset.batches("test", max(count, 1))).items()}
    return {name: [None if value != value else value for value in values[:count]] for name, values in rows.items()}


def test_a_process_that_cannot_import_tensorflow_predicts(converted: Path, shop: Dataset) -> None:
    rows = rows_of(shop, 3)
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(converted), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outputs = load_litert(converted)(rows)
    assert json.loads(done.stdout) == {name: values.tolist() for name, values in outputs.items()}


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_no_row_and_one_row(converted: Path, shop: Dataset, kind: str) -> None:
    model = load_litert(converted, kind)
    empty, single, several = (model(rows_of(shop, count)) for count in (0, 1, 5))
    assert empty["probabilities"].shape == (0, 2)
    assert empty["class"].shape == (0,)
    assert single["probabilities"].shape == (1, 2)
    np.testing.assert_array_equal(several["probabilities"][:1], single["probabilities"])


def test_a_killed_conversion_leaves_no_model(tmp_path: Path, shop: Dataset) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    with pytest.raises(NotFoundError, match="There is no converted model"):
        load_litert(tmp_path)
    convert_model(build_model("linear", shop), shop, tmp_path, ["float32"])
    assert load_litert(tmp_path).kind == "float32"


def test_a_full_disk_leaves_nothing(tmp_path: Path, shop: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_disk_full(path: Path, content: bytes) -> None:
        raise StorageError("No space left on device")

    monkeypatch.setattr(conversion, "write_atomic", raise_disk_full)
    with pytest.raises(StorageError, match="No space left"):
        convert_model(build_model("linear", shop), shop, tmp_path / "out", ["float32", "int8"])
    assert list((tmp_path / "out").iterdir()) == []


def test_an_operation_that_does_not_convert_is_named(tmp_path: Path, digits: Dataset) -> None:
    image = keras.Input((8, 8, 1), name="image")
    odd = keras.layers.Lambda(lambda x: tf.linalg.svd(x[..., 0], compute_uv=False), output_shape=(8,))(image)
    model = keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(odd))
    with pytest.raises(ModelError, match=r"LiteRT has no Svd\. Replace the layer that needs it"):
        convert_model(model, digits, tmp_path / "out", ["float32"])
    assert not (tmp_path / "out").exists()


def test_a_custom_layer_needs_no_registration(tmp_path: Path, digits: Dataset) -> None:
    class Halved(keras.layers.Layer):
        def call(self, inputs: tf.Tensor) -> tf.Tensor:
            return inputs * 0.5

    image = keras.Input((8, 8, 1), name="image")
    flat = keras.layers.Flatten()(Halved()(image))
    model = keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(flat))
    convert_model(model, digits, tmp_path, ["float32"])
    images, _ = digits.take("test")
    outputs = load_litert(tmp_path)(images)["probabilities"]
    np.testing.assert_allclose(outputs, model(images).numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["cnn", "wide_deep"])
def test_a_model_of_mixed_precision_is_converted_in_float32(
    family: str, tmp_path: Path, digits: Dataset, shop: Dataset
) -> None:
    dataset = digits if family == "cnn" else shop
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = build_model(family, dataset)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    whole = build_model(family, dataset)
    whole.set_weights(model.get_weights())
    convert_model(model, dataset, tmp_path, ["float32"])
    rows = rows_of(dataset, 20)
    convert_model(whole, dataset, tmp_path / "whole", ["float32"])
    outputs, exact = (load_litert(folder)(rows)["probabilities"] for folder in (tmp_path, tmp_path / "whole"))
    np.testing.assert_allclose(outputs, exact, atol=1e-5)
    assert {layer.compute_dtype for layer in model.layers} >= {"bfloat16"}  # unchanged


def test_a_variable_shape_is_rejected(tmp_path: Path, digits: Dataset) -> None:
    image = keras.Input((None, None, 1), name="image")
    mean = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    model = keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(mean))
    with pytest.raises(ModelError, match=r"The input 'image' of the network has the shape .* Give its keras.Input"):
        convert_model(model, digits, tmp_path / "out", ["float32"])


class Subclassed(keras.Model):
    """A subclassed model, whose layers are not known."""

    def __init__(self, columns: int, activation: str) -> None:
        super().__init__()
        self.flat, self.last = keras.layers.Flatten(), keras.layers.Dense(columns, activation)

    def call(self, features: dict[str, tf.Tensor]) -> tf.Tensor:
        return self.last(self.flat(features["image"] if "image" in features else features["price"][:, None]))


def test_a_subclassed_model_is_converted_as_a_whole_or_rejected(tmp_path: Path, digits: Dataset, shop: Dataset) -> None:
    images, _ = digits.take("test")
    model = Subclassed(10, "softmax")
    model(images)
    convert_model(model, digits, tmp_path, ["float32"])
    outputs = load_litert(tmp_path)(images)["probabilities"]
    np.testing.assert_allclose(outputs, model(images).numpy(), atol=1e-5)
    with pytest.raises(ModelError, match=r"is no functional model, so its preprocessing .* cannot be split off"):
        convert_model(Subclassed(1, "sigmoid"), shop, tmp_path / "shop", ["float32"])


def test_an_unknown_kind_and_an_existing_folder_are_rejected(converted: Path, shop: Dataset) -> None:
    model = build_model("linear", shop)
    with pytest.raises(ParameterError, match=r"Unknown kind 'float23'\. Did you mean 'float32'"):
        convert_model(model, shop, converted / "new", ["float23"])
    with pytest.raises(ModelError, match="float32 exists already"):
        convert_model(model, shop, converted, ["float32"])


def test_missing_extras_are_reported(converted: Path, shop: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlkit\[edge\]'"):
        load_litert(converted)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlkit\[edge\]'"):
        convert_model(build_model("linear", shop), shop, converted / "new", ["int4"])
    assert not (converted / "new").exists()


def test_a_record_that_differs_from_the_model_is_rejected(shop: Dataset) -> None:
    split = conversion.split_preprocessing(build_model("linear", shop), shop)
    record = conversion.preprocessing_record(split, shop)
    record["inputs"][0]["columns"][0]["shift"] += 1
    with pytest.raises(ModelError, match="do not encode 'numbers' alike"):
        conversion._check_record(record, split, shop)


def test_a_newer_format_is_rejected(converted: Path, tmp_path: Path) -> None:
    record = json.loads((converted / "float32" / "preprocessing.json").read_text(encoding="utf-8"))
    (tmp_path / "preprocessing.json").write_text(json.dumps(record | {"format": 2}), encoding="utf-8")
    with pytest.raises(ModelError, match="newer mlkit"):
        load_litert(tmp_path)
