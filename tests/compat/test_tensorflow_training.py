"""Private interfaces of TensorFlow, each with what training relies on."""

import subprocess
import sys

ABORT = """
from mlkit._compat.tensorflow_training import abort_collectives
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
