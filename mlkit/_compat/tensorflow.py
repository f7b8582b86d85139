"""TensorFlow: sessions without the rest of TensorFlow, and their callables; tested with TensorFlow 2.21."""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlkit.errors import ModelError

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


def open_session(
    folder: Path,  # SavedModel
) -> Any:  # tensorflow.python.client.session.Session
    """Restore a SavedModel into a session with one thread, without TensorFlow's deprecation warning."""
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.python.client.session import Session
    from tensorflow.python.framework.ops import Graph
    from tensorflow.python.platform import tf_logging
    from tensorflow.python.saved_model import loader_impl

    options = config_pb2.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    options.allow_soft_placement = True
    graph, level = Graph(), tf_logging.get_verbosity()
    session = Session(graph=graph, config=options)
    tf_logging.set_verbosity(tf_logging.ERROR)
    try:
        with graph.as_default():
            loader_impl.load(session, ["serve"], str(folder))
    except BaseException:
        session.close()
        raise
    finally:
        tf_logging.set_verbosity(level)
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
