"""Private interfaces of Keras 3.15: layers, placement of variables, building, losses, optimizer variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras
    import numpy as np
    import tensorflow as tf


def iter_layers(
    model: keras.Model,
) -> Iterator[keras.Layer]:
    """A model and all its layers, nested ones included; `layers` has only those of the first level."""
    yield from model._flatten_layers()


def lookup_default(
    layer: keras.layers.StringLookup,
) -> int:
    """The row that a lookup layer's table returns for an unknown text."""
    return layer._default_value


def tensor_source(
    tensor: keras.KerasTensor,
) -> tuple[keras.Operation, Any, int]:
    """The operation that computes a symbolic tensor, the node of that call, and the index among its outputs."""
    operation, node_index, output_index = tensor._keras_history
    return operation, operation._inbound_nodes[node_index], output_index


def set_model_strategy(
    model: keras.Model,
    strategy: tf.distribute.Strategy | None,  # strategy that holds the variables; None: no strategy
) -> None:
    """Record the strategy of a model, which Keras otherwise looks up when the model is created."""
    model._distribute_strategy = strategy
    model.train_function = model.test_function = model.predict_function = None


def set_optimizer_strategy(
    optimizer: keras.optimizers.Optimizer,
    strategy: tf.distribute.Strategy | None,  # strategy that holds the variables; None: the default strategy
) -> None:
    """Record the strategy of an optimizer, and index its variables by their present backend variables."""
    import tensorflow as tf

    optimizer._distribution_strategy = strategy or tf.distribute.get_strategy()
    variables = getattr(optimizer, "_trainable_variables", ())
    optimizer._trainable_variables_indices = {optimizer._var_key(variable): n for n, variable in enumerate(variables)}


def create_backend_variable(
    variable: keras.Variable,
    value: np.ndarray,
) -> None:
    """Give a Keras variable a new `tf.Variable`, created in the current scope."""
    variable._initialize(value)


def replace_backend_variable(
    variable: keras.Variable,
    backend_variable: tf.Variable,
) -> tf.Variable:  # the one that it had
    """Exchange the `tf.Variable` of a Keras variable."""
    previous, variable._value = variable.value, backend_variable
    return previous


def output_loss_names(
    model: keras.Model,  # compiled
) -> set[str]:
    """Names of the metrics that report the loss of each output; none for a model with one output."""
    return {metric.name for metric in model._compile_loss.metrics} if model._compile_loss else set()


def user_loss_weights(
    model: keras.Model,  # compiled
) -> Any:  # as given to `compile`; None where none were given
    """Loss weights of a model."""
    return getattr(model._compile_loss, "_user_loss_weights", None)


def training_loss(
    model: keras.Model,  # compiled
    features: Any,
    labels: Any,
    predictions: Any,
    sample_weight: Any,
) -> tf.Tensor:
    """Loss as in `Model.train_step`, also of a model whose `compute_loss` takes no `training`."""
    return model._compute_loss(features, labels, predictions, sample_weight, training=True)


def update_loss_metric(
    model: keras.Model,  # compiled
    loss: tf.Tensor,
    row_count: tf.Tensor,  # rows that the loss is a mean over
) -> None:
    """Add a loss to the metric `loss`."""
    model._loss_tracker.update_state(loss, sample_weight=row_count)


def build_from_batch(
    model: keras.Model,  # compiled
    batch: tuple,
) -> None:
    """Create the variables of a model, its loss and its metrics without training."""
    model._symbolic_build(data_batch=batch)


def own_variables(
    optimizer: keras.optimizers.Optimizer,
) -> list[keras.Variable]:
    """Variables of an optimizer without those of an inner optimizer."""
    return list(optimizer._variables)


def ftrl_slots(
    optimizer: keras.optimizers.Ftrl,  # built
) -> Iterator[tuple[keras.Variable, keras.Variable, keras.Variable]]:  # weight, squared-gradient sum, gradient sum
    """Weights of an FTRL optimizer with their slot variables."""
    return zip(optimizer._trainable_variables, optimizer._accumulators, optimizer._linears, strict=True)
