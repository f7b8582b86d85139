"""Private interfaces of Keras return what their public counterparts imply."""

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras

from mlkit._compat.keras import iter_layers, lookup_default, tensor_source


def test_all_layers_are_visited_nested_ones_included() -> None:
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="inner_dense")], name="inner")
    model = keras.Sequential([keras.Input((2,)), inner, keras.layers.Dense(1, name="last")])
    names = [layer.name for layer in iter_layers(model)]
    assert {"inner", "inner_dense", "last"} <= set(names)
    assert len(names) == len(set(names))


def test_the_default_row_is_that_of_an_unknown_text() -> None:
    layer = keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=1)
    assert lookup_default(layer) == -1 or lookup_default(layer) == int(layer(["never seen"])[0])


def test_the_source_of_a_tensor_is_the_layer_that_made_it() -> None:
    first = keras.Input((2,))
    dense = keras.layers.Dense(3)
    tensor = dense(first)
    operation, node, index = tensor_source(tensor)
    assert operation is dense
    assert node.input_tensors == [first]
    assert node.outputs[index] is tensor
    assert tensor_source(first)[1].is_input
