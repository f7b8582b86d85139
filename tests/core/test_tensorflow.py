"""Import of TensorFlow: silent, only as the backend of Keras, and with a helpful error."""

import os
import subprocess
import sys


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Execute code in a new process."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


IMPORT = "from mlkit._tensorflow import import_tensorflow; tensorflow = import_tensorflow()\n"


def test_the_import_is_silent_and_restores_standard_error() -> None:
    code = IMPORT + "import os; os.write(2, b'after'); print(tensorflow is import_tensorflow(), tensorflow.__name__)"
    result = run_python(code)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "True tensorflow", "after")


def test_keras_is_imported_after_tensorflow_and_as_silently() -> None:
    code = (
        "import os; from mlkit._tensorflow import keras, tf; os.write(2, b'after'); print(tf.__name__, keras.__name__)"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "tensorflow keras", "after")


def test_another_backend_of_keras_is_rejected_before_tensorflow_is_imported() -> None:
    code = (
        f"import sys\ntry:\n    {IMPORT}"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "print('tensorflow' in sys.modules)"
    )
    result = run_python(code, KERAS_BACKEND="jax")
    assert result.stdout.splitlines() == [
        "MissingDependencyError mlkit trains and exports with Keras on TensorFlow, but KERAS_BACKEND is 'jax'. "
        "Unset KERAS_BACKEND and start Python again.",
        "False",
    ]


def test_a_missing_tensorflow_names_the_command_that_installs_it() -> None:
    code = (
        "import os, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tensorflow':\n"
        "            raise ModuleNotFoundError(\"No module named 'tensorflow'\")\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from mlkit._tensorflow import import_tensorflow\n"
        "try:\n    import_tensorflow()\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "os.write(2, b'after')"
    )
    result = run_python(code)
    assert result.stdout.startswith("MissingDependencyError No module named 'tensorflow'. It comes with: pip install")
    assert result.stderr == "after"
