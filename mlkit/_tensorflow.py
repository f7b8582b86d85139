"""None"""

import importlib
import os
import sys
from types import ModuleType

from mlkit.errors import MissingDependencyError


def import_tensorflow() -> ModuleType:
    """TensorFlow, imported without its greeting; raises MissingDependencyError for another Keras backend."""
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise MissingDependencyError(
            f"mlkit trains and exports with Keras on TensorFlow, but KERAS_BACKEND is '{backend}'. "
            "Unset KERAS_BACKEND and start Python again."
        )
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        tensorflow = importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{error}. It comes with: pip install 'tensorflow>=2.21,<2.22'") from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    tensorflow.get_logger().setLevel("WARNING")
    return tensorflow
