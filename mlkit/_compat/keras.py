"""Private interfaces of Keras 3.15."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


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
