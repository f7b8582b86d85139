"""Import of TensorFlow on demand, without its start-up messages and only as the backend of Keras.

TensorFlow writes to file descriptor 2 while it is imported, before any log level takes effect; in a job notebook these
messages would be the first output of every run. So the descriptor is redirected during the import. Exceptions are not
affected. Keras has other backends, but only TensorFlow can export a SavedModel: another backend is rejected here rather
than at the end of a training run.

Modules that need both import them from here: `from mlkit._tensorflow import keras, tf`.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from mlkit.errors import MissingDependencyError

if TYPE_CHECKING:
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401


def import_tensorflow() -> ModuleType:
    """Import TensorFlow without its messages; raises MissingDependencyError, also for another Keras backend."""
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise MissingDependencyError(
            f"mlkit trains and exports with Keras on TensorFlow, but KERAS_BACKEND is '{backend}'. "
            "Unset KERAS_BACKEND and start Python again."
        )
    try:
        with silence_stderr():
            tensorflow = importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error}. It comes with: pip install 'tensorflow>=2.21,<2.22'") from error
    tensorflow.get_logger().setLevel("WARNING")
    return tensorflow


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Context manager that discards what libraries write to the file descriptor of standard error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def __getattr__(name: str) -> ModuleType:
    """`tf` and `keras`, imported when they are first asked for."""
    if name not in ("keras", "tf"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    tensorflow = import_tensorflow()
    return tensorflow if name == "tf" else importlib.import_module("keras")
