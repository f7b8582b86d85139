"""TensorFlow's private interfaces: sessions without the rest of TensorFlow, SavedModels, collectives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import mlkit._compat.tensorflow as compat


@pytest.fixture(scope="module")
def doubling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel that doubles its input, and rejects negative numbers."""
    module = tf.Module()
    module.factor = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def double(x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, "x is negative")]):
            return {"y": x * module.factor}

    folder = tmp_path_factory.mktemp("doubling") / "1"
    tf.saved_model.save(module, str(folder), signatures=double)
    return folder


def tensor_names(folder: Path) -> tuple[list[str], list[str]]:
    from mlkit.export.signatures import read_signatures

    signature = read_signatures(folder)["serving_default"]
    return [info.tensor for info in signature.inputs.values()], [info.tensor for info in signature.outputs.values()]


def test_the_installed_version_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.has_tested_sessions()
    monkeypatch.setattr(compat, "_TESTED", "1.15.")
    assert not compat.has_tested_sessions()


def test_a_process_with_session_modules_has_no_keras(doubling: Path) -> None:
    code = (
        "import sys\n"
        "from mlkit._compat.tensorflow import import_session_modules, open_session\n"
        "import_session_modules()\n"
        "open_session(sys.argv[1]).close()\n"
        "print('keras' in sys.modules, 'tensorflow.python.client.session' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, doubling], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("False True", "")


def test_nothing_changes_where_tensorflow_is_imported() -> None:
    compat.import_session_modules()
    assert sys.modules["tensorflow"] is tf


def test_a_session_is_opened_without_a_warning_and_closed_on_errors(
    doubling: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    compat.open_session(doubling).close()
    assert "deprecated" not in capfd.readouterr().err
    with pytest.raises(OSError, match="SavedModel"):
        compat.open_session(tmp_path)


def test_a_callable_returns_the_outputs_of_the_signature(doubling: Path) -> None:
    session = compat.open_session(doubling)
    call = compat.session_callable(session, *tensor_names(doubling))
    (outputs,) = call(np.array([1.0, 2.5], "float32"))
    np.testing.assert_array_equal(outputs, [2.0, 5.0])
    del call
    session.close()


def test_an_error_in_the_graph_has_its_code(doubling: Path) -> None:
    session = compat.open_session(doubling)
    call = compat.session_callable(session, *tensor_names(doubling))
    with pytest.raises(Exception, match="x is negative") as caught:
        call(np.array([-1.0], "float32"))
    code, message = compat.op_error(caught.value)
    assert (code, "x is negative" in message) == (3, True)  # INVALID_ARGUMENT
    assert compat.op_error(ValueError("x")) is None
    del call
    session.close()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A SavedModel that doubles numbers."""
    module = tf.Module()
    module.double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec([None], name="x")])
    with compat.save_context():
        signature = module.double.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path), signatures=signature)
    return tmp_path


def test_functions_are_traced_once_for_saving() -> None:
    traces = []
    double = tf.function(lambda x: traces.append(x) or 2 * x, input_signature=[tf.TensorSpec([None])])
    module = tf.Module()
    module.double = double
    with compat.save_context():
        double.get_concrete_function()
        double.get_concrete_function()
    assert len(traces) == 1


def test_the_fingerprint_is_that_of_the_edited_file(saved: Path) -> None:
    before = tf.saved_model.experimental.read_fingerprint(str(saved))
    message = saved_model_pb2.SavedModel.FromString((saved / "saved_model.pb").read_bytes())
    message.meta_graphs[0].meta_info_def.tags.append("edited")
    (saved / "saved_model.pb").write_bytes(message.SerializeToString())
    compat.write_fingerprint(saved)
    after = tf.saved_model.experimental.read_fingerprint(str(saved))
    assert after.saved_model_checksum != before.saved_model_checksum


def test_a_model_is_loaded_into_a_session(saved: Path) -> None:
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        signature = compat.load_into_session(session, saved).signature_def["serving_default"]
        outputs = session.run(signature.outputs["y"].name, {signature.inputs["x"].name: np.float32([1, 2])})
    assert outputs.tolist() == [2, 4]


ABORT = """
from mlkit._compat.tensorflow import abort_collectives
import tensorflow as tf
from tensorflow.python.ops import collective_ops
abort_collectives("worker 1 has ended")
try:
    collective_ops.all_reduce_v2(tf.constant([1.0]), group_size=2, group_key=1, instance_key=1, timeout=30)
except tf.errors.UnavailableError as error:
    assert "worker 1 has ended" in str(error)
    print("aborted")
"""


def test_collective_operations_fail_after_an_abort() -> None:
    result = subprocess.run([sys.executable, "-c", ABORT], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "aborted", result.stderr[-2000:]
