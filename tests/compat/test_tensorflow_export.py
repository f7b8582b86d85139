"""Private interfaces of TensorFlow write and load SavedModels that the public ones read."""

from pathlib import Path

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from mlkit._compat.tensorflow_export import load_into_session, save_context, write_fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A SavedModel that doubles numbers."""
    module = tf.Module()
    module.double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec([None], name="x")])
    with save_context():
        signature = module.double.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path), signatures=signature)
    return tmp_path


def test_functions_are_traced_once_for_saving() -> None:
    traces = []
    double = tf.function(lambda x: traces.append(x) or 2 * x, input_signature=[tf.TensorSpec([None])])
    module = tf.Module()
    module.double = double
    with save_context():
        double.get_concrete_function()
        double.get_concrete_function()
    assert len(traces) == 1


def test_the_fingerprint_is_that_of_the_edited_file(saved: Path) -> None:
    before = tf.saved_model.experimental.read_fingerprint(str(saved))
    message = saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes())
    message.meta_graphs[0].meta_info_def.tags.append("edited")
    (saved / "saved_model.pb").write_bytes(message.SerializeToString())
    write_fingerprint(saved)
    after = tf.saved_model.experimental.read_fingerprint(str(saved))
    assert after.saved_model_checksum != before.saved_model_checksum


def test_a_model_is_loaded_into_a_session(saved: Path) -> None:
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        signature = load_into_session(session, saved).signature_def["serving_default"]
        outputs = session.run(signature.outputs["y"].name, {signature.inputs["x"].name: np.float32([1, 2])})
    assert outputs.tolist() == [2, 4]
