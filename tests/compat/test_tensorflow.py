"""TensorFlow's private interfaces: sessions in a process without the rest of TensorFlow."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import tensorflow as tf

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
