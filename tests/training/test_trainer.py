"""Training: micro-batches, mixed precision, checkpoint interval, NaN losses."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset
from mlkit.errors import MlkitError, ParameterError
from mlkit.runs.store import RunStore


@pytest.fixture
def restore_float32():
    """Set the default precision for the models of other tests."""
    from mlkit.training import prepare_devices

    yield
    prepare_devices("float32")


def model_with_memory_limit(rows: int, in_tensorflow: bool = True):
    """A network that allocates petabytes when a batch has more rows than that; TensorFlow tries so for ten seconds."""
    import keras
    import tensorflow as tf

    class AllocatingLayer(keras.layers.Layer):
        def call(self, inputs):
            size = tf.where(tf.shape(inputs)[0] > rows, tf.constant(2**50, "int64"), 1)
            if not in_tensorflow:  # NumPy fails at once
                size = tf.ensure_shape(tf.numpy_function(lambda size: np.empty(size)[:0].sum(), [size], "float64"), ())
            else:
                size = tf.reduce_max(tf.range(size))
            return inputs + tf.cast(size, "float32")

    keras.utils.set_random_seed(4)
    image = keras.Input((8, 8, 1), name="image")
    hidden = keras.layers.Dense(16, "relu")(keras.layers.Flatten()(image))
    return keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(AllocatingLayer()(hidden)))


def test_a_batch_that_does_not_fit_is_split_into_micro_batches(capsys) -> None:
    """The result equals that of a given number of micro-batches, bit by bit."""
    from mlkit.training import fit

    data = load_dataset("digits")
    limited = model_with_memory_limit(rows=50)
    history = fit(limited, data, epochs=2, batch_size=160)
    output = capsys.readouterr().out
    assert "160 rows does not fit into memory: using 2 micro-batches" in output
    assert "using 4 micro-batches" in output
    unlimited = model_with_memory_limit(rows=10_000)
    assert fit(unlimited, data, epochs=2, batch_size=160, micro_batches=4).epochs == history.epochs
    for weight, expected in zip(limited.get_weights(), unlimited.get_weights(), strict=True):
        assert np.array_equal(weight, expected)


def test_a_single_row_does_not_fit() -> None:
    from mlkit.training import fit

    with pytest.raises(ParameterError, match="Not even a single row fits"):
        fit(model_with_memory_limit(rows=0, in_tensorflow=False), load_dataset("digits"), epochs=1, batch_size=4)


@pytest.mark.usefixtures("restore_float32")
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_large_values_are_normalised_in_full_precision(precision: str, tmp_path: Path) -> None:
    """Amounts beyond the range of 16 bits are normalised in float32."""
    from mlkit.export import export_saved_model, load_saved_model
    from mlkit.models import build_model
    from mlkit.training import fit, prepare_devices

    rng = np.random.default_rng(1)
    amount = rng.normal(5e7, 1e7, 2000)
    table = pl.DataFrame({"amount": amount, "kind": rng.choice(["a", "b"], 2000), "large": amount > 5e7})
    table.write_csv(tmp_path / "amounts.csv")
    data = load_dataset(str(tmp_path / "amounts.csv"), "large")
    assert prepare_devices(precision).precision == precision
    for family in ("mlp", "wide_deep"):
        model = build_model(family, data)
        history = fit(model, data, epochs=8, learning_rate=0.01)
        assert history.metrics["val_accuracy"] > 0.95
        assert {weight.dtype for weight in model.trainable_weights} == {"float32"}
    saved = load_saved_model(export_saved_model(model, data, tmp_path / "exported"))
    predictions = saved({"amount": [3e7, 7e7], "kind": ["a", "b"]})
    assert predictions["probabilities"].dtype == np.float32
    assert list(predictions["class"]) == [data.classes[0], data.classes[1]]


def test_checkpoints_are_written_at_the_given_interval(tmp_path: Path) -> None:
    """A long interval leaves only the last checkpoint, a tiny one writes a checkpoint after every call."""
    from mlkit.models import build_model
    from mlkit.training import fit
    from mlkit.training.checkpoints import TrainingCheckpoint

    saved = []
    data, store = load_dataset("digits"), RunStore(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        save = TrainingCheckpoint.save
        patch.setattr(TrainingCheckpoint, "save", lambda self, state: saved.append(str(state)) or save(self, state))
        fit(build_model("mlp", data), data, epochs=2, run=store.create("train"), checkpoint_every_minutes=60)
        assert saved == ["after epoch 2"]
        saved.clear()
        fit(build_model("mlp", data), data, epochs=2, run=store.create("train"), checkpoint_every_minutes=1e-6)
    assert len(saved) > 5
    with pytest.raises(ParameterError, match="checkpoint_every_minutes must be greater than 0"):
        fit(build_model("mlp", data), data, checkpoint_every_minutes=0)


def test_a_nan_loss_is_reported_with_its_step() -> None:
    """The step is named although many steps are executed in one call."""
    import keras

    from mlkit.models import build_model
    from mlkit.training import fit

    data = load_dataset("digits")
    model = build_model("mlp", data)
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([36], [0.001, 1e30])
    model.compile(keras.optimizers.SGD(rate), "sparse_categorical_crossentropy")
    with pytest.raises(MlkitError, match=r"NaN or infinite since epoch 1, step 3[89]"):
        fit(model, data, epochs=3)


def test_the_state_in_the_checkpoint_is_json(tmp_path: Path) -> None:
    from mlkit.training.checkpoints import TrainingState

    state = TrainingState({"seed": 1}, [{"loss": 0.1}], step=3, steps_per_epoch=9)
    assert TrainingState(**json.loads(json.dumps(vars(state)))) == state
