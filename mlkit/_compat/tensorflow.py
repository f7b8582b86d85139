"""Private interfaces of TensorFlow 2.21: sessions without the rest of TensorFlow, SavedModels, collectives."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlkit.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

_TESTED = "2.21."  # versions with which these functions were tested


def _distribution() -> str:
    """Name of the installed TensorFlow distribution: tensorflow, tensorflow-cpu, ..."""
    return importlib.metadata.packages_distributions()["tensorflow"][0]


def has_tested_sessions() -> bool:
    """Whether the installed TensorFlow is a version whose sessions were tested."""
    installed = importlib.util.find_spec("tensorflow") is not None
    return installed and importlib.metadata.version(_distribution()).startswith(_TESTED)


def import_session_modules() -> None:
    """Import only the modules that sessions need, for the life of this process; nothing where TensorFlow is imported.

    `import tensorflow` brings Keras, data pipelines and distribution strategies, and takes six seconds. Sessions need a
    tenth of these modules. An empty module in place of TensorFlow's own `__init__` lets its submodules load and nothing
    else, so such a process can do nothing else with TensorFlow.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    spec = importlib.util.find_spec("tensorflow")
    if spec is None:
        raise ModelError("TensorFlow is not installed. Serve a converted model instead: --runtime litert.")
    module = types.ModuleType("tensorflow")
    module.__path__, module.__spec__, module.__file__ = list(spec.submodule_search_locations), spec, spec.origin
    module.__version__ = importlib.metadata.version(_distribution())
    sys.modules["tensorflow"] = module
    with _native_stderr_suppressed():
        importlib.import_module("tensorflow.python.client.session")
        importlib.import_module("tensorflow.python.saved_model.loader_impl")


@contextlib.contextmanager
def _native_stderr_suppressed() -> Iterator[None]:
    """Context manager that discards what native libraries print at import; errors are raised as exceptions anyway."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def load_into_session(
    session: tf.compat.v1.Session,  # session with an empty graph, which has to be the default graph
    folder: Path,  # version folder of a SavedModel
) -> Any:  # MetaGraphDef
    """Load a SavedModel as TF Serving does; the public function logs a deprecation warning."""
    from tensorflow.python.saved_model import loader_impl

    return loader_impl.SavedModelLoader(str(folder)).load(session, ["serve"])


def open_session(
    folder: Path,  # SavedModel
) -> Any:  # tensorflow.python.client.session.Session
    """Restore a SavedModel into a session with one thread."""
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.python.client.session import Session
    from tensorflow.python.framework.ops import Graph

    options = config_pb2.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    options.allow_soft_placement = True
    session = Session(graph=Graph(), config=options)
    try:
        with session.graph.as_default():
            load_into_session(session, folder)
    except BaseException:
        session.close()
        raise
    return session


def session_callable(
    session: Any,  # of `open_session`
    feeds: Sequence[str],  # names of the input tensors
    fetches: Sequence[str],  # names of the output tensors
) -> Any:  # function of the inputs, which returns a list of the outputs
    """Function that runs on the calling thread, without the interpreter lock."""
    from tensorflow.core.protobuf import config_pb2

    options = config_pb2.CallableOptions()
    options.feed.extend(feeds)
    options.fetch.extend(fetches)
    options.run_options.inter_op_thread_pool = -1  # the calling thread
    return session._make_callable_from_options(options)


def op_error(
    error: Exception,
) -> tuple[int, str] | None:  # status code and message; None for an exception of another kind
    """Status code of an error inside a graph."""
    from tensorflow.python.framework import errors_impl

    return (error.error_code, str(error.message)) if isinstance(error, errors_impl.OpError) else None


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


def abort_collectives(
    message: str,  # reason, part of the error that is raised
) -> None:
    """Make every collective operation that is running, or will be, fail with UnavailableError."""
    import tensorflow as tf
    from tensorflow.python.eager import context

    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)
