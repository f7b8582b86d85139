"""Private interfaces of Keras return what their public counterparts imply, and what training relies on."""

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras
import numpy as np
import pytest
import tensorflow as tf

from mlkit._compat import keras as compat


def test_all_layers_are_visited_nested_ones_included() -> None:
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="inner_dense")], name="inner")
    model = keras.Sequential([keras.Input((2,)), inner, keras.layers.Dense(1, name="last")])
    names = [layer.name for layer in compat.iter_layers(model)]
    assert {"inner", "inner_dense", "last"} <= set(names)
    assert len(names) == len(set(names))


def test_the_default_row_is_that_of_an_unknown_text() -> None:
    layer = keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=1)
    assert compat.lookup_default(layer) == -1 or compat.lookup_default(layer) == int(layer(["never seen"])[0])


def test_the_source_of_a_tensor_is_the_layer_that_made_it() -> None:
    first = keras.Input((2,))
    dense = keras.layers.Dense(3)
    tensor = dense(first)
    operation, node, index = compat.tensor_source(tensor)
    assert operation is dense
    assert node.input_tensors == [first]
    assert node.outputs[index] is tensor
    assert compat.tensor_source(first)[1].is_input


@pytest.fixture
def model() -> keras.Model:
    inputs = keras.Input((3,), name="x")
    hidden = keras.Sequential([keras.layers.Dense(4, name="hidden")], name="block")(inputs)
    outputs = {name: keras.layers.Dense(1, name=name)(hidden) for name in ("a", "b")}
    model = keras.Model(inputs, outputs)
    model.compile("adam", {"a": "mse", "b": "mse"}, loss_weights={"a": 0.5, "b": 2.0})
    return model


@pytest.fixture
def batch() -> tuple:
    return tf.ones((2, 3)), {"a": tf.zeros((2, 1)), "b": tf.zeros((2, 1))}


def test_a_model_uses_the_strategy_that_is_set(model: keras.Model) -> None:
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    model.train_function = object()
    compat.set_model_strategy(model, strategy)
    assert model.distribute_strategy is strategy
    assert model.train_function is model.test_function is model.predict_function is None
    compat.set_model_strategy(model, None)
    assert model.distribute_strategy is tf.distribute.get_strategy()


def test_an_optimizer_updates_variables_that_were_replaced(model: keras.Model) -> None:
    optimizer, weights = model.optimizer, model.trainable_variables
    optimizer.build(weights)
    for variable in weights:
        compat.replace_backend_variable(variable, tf.Variable(variable.value))
    compat.set_optimizer_strategy(optimizer, None)
    before = weights[0].numpy()
    optimizer.apply([tf.ones(variable.shape) for variable in weights], weights)
    np.testing.assert_allclose(weights[0].numpy(), before - float(optimizer.learning_rate), rtol=1e-3)


def test_a_backend_variable_is_created_in_the_current_scope(model: keras.Model) -> None:
    variable = model.trainable_variables[0]
    value, previous = variable.numpy(), variable.value
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        compat.create_backend_variable(variable, value)
    assert variable.value is not previous
    assert "Mirrored" in type(variable.value).__name__
    np.testing.assert_array_equal(variable.numpy(), value)


def test_a_backend_variable_is_replaced(model: keras.Model) -> None:
    variable, replacement = model.trainable_variables[0], tf.Variable(tf.ones((3, 4)))
    previous = variable.value
    assert compat.replace_backend_variable(variable, replacement) is previous
    assert variable.value is replacement


def test_layers_within_layers_are_listed(model: keras.Model) -> None:
    assert {"block", "hidden", "a", "b"} <= {layer.name for layer in compat.iter_layers(model)}


def test_names_of_output_losses(model: keras.Model, batch: tuple) -> None:
    assert compat.output_loss_names(keras.Sequential([keras.Input((1,))])) == set()
    compat.build_from_batch(model, batch)
    assert compat.output_loss_names(model) == {"a_loss", "b_loss"}
    assert set(model.get_metrics_result()) == {"loss", "a_loss", "b_loss"}


def test_loss_weights_are_those_given_to_compile(model: keras.Model) -> None:
    assert compat.user_loss_weights(model) == {"a": 0.5, "b": 2.0}
    model.compile("adam", {"a": "mse", "b": "mse"})
    assert compat.user_loss_weights(model) is None


def test_training_loss_is_the_one_of_a_training_step(model: keras.Model, batch: tuple) -> None:
    features, labels = batch
    expected = model.compute_loss(features, labels, model(features, training=True), None)
    loss = compat.training_loss(model, features, labels, model(features, training=True), None)
    np.testing.assert_array_equal(loss, expected)


def test_training_loss_of_a_model_whose_compute_loss_takes_no_training_argument() -> None:
    class OldModel(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return tf.reduce_sum(y_pred)

    old_model = OldModel([keras.Input((1,))])
    old_model.compile("sgd", "mse")
    assert float(compat.training_loss(old_model, None, None, tf.ones((2, 1)), None)) == 2.0


def test_losses_are_averaged_over_rows(model: keras.Model, batch: tuple) -> None:
    compat.build_from_batch(model, batch)
    model.reset_metrics()
    compat.update_loss_metric(model, tf.constant(1.0), tf.constant(3))
    compat.update_loss_metric(model, tf.constant(5.0), tf.constant(1))
    assert float(model.get_metrics_result()["loss"]) == 2.0


def test_a_model_is_built_without_training(model: keras.Model, batch: tuple) -> None:
    weights = model.get_weights()
    compat.build_from_batch(model, batch)
    assert model.metrics_variables
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_own_variables_leave_out_those_of_an_inner_optimizer() -> None:
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    optimizer.build([keras.Variable(np.ones(3, "float32"))])
    own = [variable.name for variable in compat.own_variables(optimizer)]
    inner = [variable.name for variable in compat.own_variables(optimizer.inner_optimizer)]
    assert "dynamic_scale" in own
    assert not [name for name in own if "momentum" in name]
    assert [name for name in inner if "momentum" in name]


def test_ftrl_slots_belong_to_their_weights() -> None:
    optimizer, weight = keras.optimizers.Ftrl(0.1), keras.Variable(np.ones(3, "float32"), name="weight")
    optimizer.build([weight])
    ((variable, squares, gradients),) = compat.ftrl_slots(optimizer)
    assert variable is weight
    assert ("accumulator" in squares.name, "linear" in gradients.name) == (True, True)
