"""Private interfaces of TensorFlow 2.21 for exporting and loading SavedModels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


@contextlib.contextmanager
def save_context() -> Iterator[None]:
    """Context manager that traces functions as `tf.saved_model.save` does, so that it need not trace them again."""
    import tensorflow as tf
    from tensorflow.python.saved_model import save_context as context

    with context.save_context(tf.saved_model.SaveOptions()):
        yield


def write_fingerprint(
    folder: Path,  # version folder of a SavedModel
) -> None:
    """Write fingerprint.pb anew for a saved_model.pb that was edited."""
    from tensorflow.python.saved_model import fingerprinting_utils

    fingerprinting_utils.write_fingerprint(str(folder))


def load_into_session(
    session: tf.compat.v1.Session,  # session with an empty graph, which has to be the default graph
    folder: Path,  # version folder of a SavedModel
) -> Any:  # MetaGraphDef
    """Load a SavedModel as TF Serving does; the public function logs a deprecation warning."""
    from tensorflow.python.saved_model import loader_impl

    return loader_impl.SavedModelLoader(str(folder)).load(session, ["serve"])
