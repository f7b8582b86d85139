"""Private interfaces of TensorFlow that training needs."""

from mlkit._tensorflow import import_tensorflow

import_tensorflow()  # quietly

import tensorflow as tf  # noqa: E402


def abort_collectives(
    message: str,  # reason, part of the error that is raised
) -> None:
    """Make every collective operation that is running, or will be, fail with UnavailableError."""
    from tensorflow.python.eager import context

    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)
