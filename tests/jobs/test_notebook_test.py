"""Notebooks as tests: what is executed, how a notebook may fail, what is left behind, and what a change affects."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from mlkit.cli import test as test_command
from mlkit.errors import InputError, NotFoundError
from mlkit.jobs import kernels, notebook_test
from mlkit.jobs.import_graph import affected, any_imports, changed_files
from mlkit.jobs.notebook_test import (
    DURATIONS,
    Result,
    executed_cells,
    find_notebooks,
    read_durations,
    read_notebook,
    run_notebooks,
)
from tests.affected import files_of_tests
from tests.conftest import REPOSITORY, run_cli, wait_until

PRELOAD = "matplotlib.pyplot,matplotlib_inline.backend_inline"  # no TensorFlow: it takes seconds


def write(path: Path, *cells: str | tuple[str, str], **metadata: Any) -> Path:
    """A notebook of code cells, or of others: (kind, source)."""
    typed = [("code", cell) if isinstance(cell, str) else cell for cell in cells]
    extra = {"code": {"outputs": [], "execution_count": None}}
    content = [{"cell_type": kind, "source": text, "metadata": {}} | extra.get(kind, {}) for kind, text in typed]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": content, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """The environment of these tests, with a warm server that preloads little; none is left."""
    folder = tempfile.mkdtemp(prefix="mlkit-test-")  # short: a socket's path may have 107 characters
    variables = {"XDG_RUNTIME_DIR": folder, "MLKIT_KERNELS_PRELOAD": PRELOAD}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server = kernels.ForkServerClient.for_environment(os.environ).hold() if kernels.CAN_FORK else None
        yield variables
        if server:
            server.close()
        wait_until(lambda: not kernels.running_servers(), 20)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of nbdev's."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "pyproject.toml").write_text("[tool.nbdev]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, folder: Path, **environment: str) -> tuple[int, dict]:
    """The exit code and the JSON of `mlkit test`."""
    result = run_cli("test", "--json", *map(str, arguments), folder=folder, **environment)
    return result.returncode, json.loads(result.stdout) if result.returncode < 2 else {"error": result.stderr}


def run_one(folder: Path, *cells: str | tuple[str, str], arguments: tuple = ()) -> dict:
    """The result of a notebook of these cells."""
    _, report = run(write(folder / "nbs" / "example.ipynb", *cells), *arguments, folder=folder)
    return report["notebooks"][0]


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


RULES = [
    ["1", ("markdown", "text"), "#| eval: false\n1/0", "#|eval:true\n1", "# | notest\n1/0", "#| hide\n#| notest\n1/0"],
    ["%%bash\n#| eval: false\nexit 1", "\n#| eval: False\n1/0", "x = 1\n#| eval: false", "nbdev_export" + "()"],
    [("raw", "---\nskip_exec: true\n---"), "1/0"],
    [("raw", "---\neval: false\n---"), "1/0", "#| eval: true\n1"],
    [("markdown", "# Title\n\n> Text\n\n- skip_exec: true"), "1/0"],
    [("markdown", "---\neval: false\n---\n"), "1/0", "#| eval: true\n1"],
    [("markdown", "---\neval: false\n---\nmore"), "1"],
    [("markdown", "- skip_exec: true"), "1"],
]
METADATA = [
    {"kernelspec": {"language": "julia"}},
    {"kernelspec": {"language": "python"}},
    {"nbdev": {"skip_exec": "true"}},
    {"nbdev": {"notest": "true"}},
]


def assert_like_nbdev(path: Path) -> None:
    test = pytest.importorskip("nbdev.test")
    with_config = {"skip_flags": ["notest"]}
    metadata = read_notebook(path)["metadata"]
    expected = [cell.idx_ + 1 for cell in test.nb_test_cells(path, **with_config)]
    assert [cell.number for cell in executed_cells(read_notebook(path))] == expected, (path, metadata)


@pytest.mark.parametrize("cells", RULES)
def test_the_cells_that_nbdev_executes(project: Path, cells: list) -> None:
    assert_like_nbdev(write(project / "rule.ipynb", *cells))


@pytest.mark.parametrize("metadata", METADATA)
def test_the_notebooks_that_nbdev_executes(project: Path, metadata: dict) -> None:
    assert_like_nbdev(write(project / "rule.ipynb", "1", "#| eval: true\n1", **metadata))


def test_this_repository_is_executed_as_nbdev_does() -> None:
    for path in sorted((REPOSITORY / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            assert_like_nbdev(path)


def test_folders_are_searched_as_nbdev_does(project: Path) -> None:
    names = (
        "a.ipynb",
        "_b.ipynb",
        ".c.ipynb",
        "sub/d.ipynb",
        "_sub/e.ipynb",
        ".ipynb_checkpoints/f.ipynb",
        "no/g.ipynb",
    )
    for name in names:
        write(project / "nbs" / name, "1")
    (project / "nbs" / "no" / ".notest").touch()
    (project / "nbs" / "data.csv").touch()
    assert run(project / "nbs" / "no" / "g.ipynb", folder=project)[1]["skipped"] == 1
    matches = [project / "nbs" / "a.ipynb", project / "nbs" / "sub" / "d.ipynb"]
    assert find_notebooks([]) == find_notebooks([Path("nbs"), matches[0]]) == matches
    (project / "pyproject.toml").write_text('[tool.nbdev]\nnbs_path = "nbs/sub"\ntst_flags = "slow"\n')
    notebook_test.Project.of.__func__.cache_clear()
    assert find_notebooks([]) == matches[1:]
    assert find_notebooks([], project / "nbs") == matches[1:]  # from anywhere in the project
    assert notebook_test.Project.of(project).skip_flags == {"slow"}


def test_a_notebook_is_executed_as_in_jupyter(project: Path) -> None:
    (project / "helper.py").write_text("value = 3")
    cells = [
        "print('text')\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nassert 'inline' in plt.get_backend()",
        "assert get_ipython().user_ns['plt'] is plt",
        "import asyncio\ntask = asyncio.ensure_future(asyncio.sleep(0.1, 'later'))",
        "assert await task == 'later'",
        "%%bash\necho shell > made.txt",
        "#| export\n\n%%capture text\nprint('kept')",
        "text.stdout",
        "words = !cat made.txt\nassert words == ['shell'], words",
        "import os, signal, sys\nassert os.getcwd().endswith('nbs') and os.environ['IN_TEST'] == '1'",
        "import helper\nassert sys.path[0] == os.getcwd() and sys.argv == [os.getcwd() + '/example.ipynb']",
        "assert os.getpgrp() == os.getpid() == os.getsid(0)\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)",
        "import pickle\nclass Mine: pass\nassert isinstance(pickle.loads(pickle.dumps(Mine())), Mine)",
    ]
    result = run_one(project, *cells)
    assert (result["outcome"], result["error"]) == ("passed", "")


def test_nothing_passes_from_one_notebook_to_another(project: Path) -> None:
    cell = "import os, numpy, builtins\nassert not hasattr(builtins, 'mark') and 'MARK' not in os.environ\n"
    cell += "builtins.mark = os.environ['MARK'] = '1'\nos.chdir('/')\nprint(numpy.random.rand(), file=open({!r}, 'w'))"
    for name in "ab":
        write(project / "nbs" / f"{name}.ipynb", cell.format(str(project / name)))
    assert run("-n", 1, folder=project)[1]["passed"] == 2
    assert (project / "a").read_text() != (project / "b").read_text()


def test_a_cell_that_raises(project: Path) -> None:
    write(project / "nbs" / "good.ipynb", "1")
    write(project / "nbs" / "skipped.ipynb", "#| notest\n1/0")
    bad = write(project / "nbs" / "bad.ipynb", "x = 0", ("markdown", "## Ratio"), "# a\nprint('so far')\n1 / x", "2")
    code, report = run(folder=project)
    assert (code, report["passed"], report["failed"], report["skipped"]) == (1, 1, 1, 1)
    (failed,) = [result for result in report["notebooks"] if result["outcome"] == "failed"]
    assert (failed["path"], failed["cell"], failed["heading"]) == (str(bad), 3, "Ratio")
    assert failed["line"] == "print('so far')"
    assert "line 3, in <module>\n    1 / x\n    ~~^~~\nZeroDivisionError: division by zero" in failed["error"]
    assert "so far" in failed["error"]
    assert "\x1b" not in failed["error"]
    result = run_cli("test", folder=project)
    assert result.returncode == 1
    assert "in cell 3 (Ratio): print('so far')" in result.stdout
    assert "1 passed, 1 failed, 1 skipped in" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [("x = = 1", "SyntaxError"), ("import sys\nsys.exit(0)", "SystemExit"), ("%no", "UsageError")],
)
def test_other_ways_to_raise(project: Path, source: str, expected: str) -> None:
    result = run_one(project, source)
    assert result["outcome"] == "failed"
    assert expected in result["error"]


@pytest.mark.parametrize(
    "source",
    [
        "import time\ndef wait():\n    time.sleep(600)\nwait()",
        "import asyncio\nasync def wait():\n    await asyncio.sleep(600)\nawait wait()",
    ],
)
def test_a_notebook_that_hangs(project: Path, source: str) -> None:
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nprint(child.pid, file=open('child', 'w'))"
    result = run_one(project, child, source, arguments=("--timeout", 1.5))
    assert (result["outcome"], result["cell"]) == ("failed", 2)
    assert "It took more than 1.5 s and was ended in cell 2." in result["error"]
    assert "line 3 in wait" in result["error"] or "line 3, in wait" in result["error"]
    assert has_ended(int((project / "nbs" / "child").read_text()))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9 (SIGKILL) in cell 2."),
        ("import os\nos._exit(3)", "ended with exit code 3 in cell 2."),
        ("import ctypes\nctypes.string_at(0)", "was ended by signal 11 (SIGSEGV) in cell 2."),
    ],
)
def test_a_notebook_that_ends_its_process(project: Path, source: str, expected: str) -> None:
    result = run_one(project, ("markdown", "# Title"), source)
    assert (result["outcome"], result["cell"]) == ("failed", 2)
    assert f"The process {expected}" in result["error"]
    assert "SEGV" not in expected or "string_at" in result["error"]  # where it was


def test_processes_of_a_notebook_end_with_it(project: Path) -> None:
    daemon = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open('daemon', 'w').write(str(os.getpid()))
        os.execvp('sleep', ['sleep', '600'])
    os._exit(0)
while not os.path.exists('daemon') or not open('daemon').read():
    pass
import subprocess
print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, file=open('child', 'w'))
import threading, time
threading.Thread(target=time.sleep, args=(0.5,)).start()
"""
    assert run_one(project, daemon)["outcome"] == "passed"
    assert has_ended(int((project / "nbs" / "daemon").read_text()))
    assert has_ended(int((project / "nbs" / "child").read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing(
    project: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "json")  # a warm server of its own
    source = "import subprocess, os, time\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    source += "print(os.getpid(), child.pid, file=open('{0}', 'w'))\nos.rename('{0}', '{0}.pids')\ntime.sleep(600)"
    for name in "ab":
        write(project / "nbs" / f"{name}.ipynb", source.format(name))
    command = [sys.executable, "-m", "mlkit", "test", "-n", "2"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        files = wait_until(lambda: len(files := list((project / "nbs").glob("*.pids"))) == 2 and files, 60)
        (server,) = [server["pid"] for server in kernels.running_servers() if server["kernels"]]
        process.send_signal(number)
        output = process.communicate(timeout=30)[0]
    assert (process.returncode, "interrupted" in output) == (code, True), output
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert all(map(has_ended, pids))
    wait_until(lambda: has_ended(server), 10)


def test_wrong_input(project: Path) -> None:
    write(project / "nbs" / "good.ipynb", "open('was-executed', 'w')")
    (project / "nbs" / "broken.ipynb").write_text('{"cells": [')
    (project / "notes.txt").write_text("text")
    (project / "list.ipynb").write_text("[]")
    (project / "empty").mkdir()
    expected = {"no/such": "does not exist", "notes.txt": "received notes.txt", "list.ipynb": "Restore it"}
    expected |= {"nbs": "broken.ipynb", "empty": "none that are tests"}
    for path, message in expected.items():
        code, report = run(path, folder=project)
        text = " ".join(report["error"].split())
        assert (code, "Expected" in text, message in text) == (2, True, True), text
    assert not (project / "nbs" / "was-executed").exists()
    with pytest.raises(NotFoundError):
        find_notebooks([Path("empty")])


def test_fresh_processes_where_forking_is_not_safe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CAN_FORK", False)
    source = "import subprocess\nprint(subprocess.Popen(['sleep', '600']).pid, file=open('{}', 'w'))\n{}"
    last = {"good": "1", "bad": "1/0", "dead": "import os\nos._exit(2)", "hang": "import time\ntime.sleep(600)"}
    paths = [write(project / "nbs" / f"{name}.ipynb", source.format(name, end)) for name, end in last.items()]
    results = run_notebooks(paths, max_parallel=4, timeout=5)
    assert [result.outcome for result in results] == ["passed", "failed", "failed", "failed"]
    assert "exit code 2" in results[2].error
    assert "time.sleep" in results[3].line or "subprocess" in results[3].line
    assert all(has_ended(int((project / "nbs" / name).read_text())) for name in last)


def test_the_longest_comes_first(project: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    seconds = {"a": 0.0, "b": 0.6, "c": 0.3}
    source = "import time\nprint('{0}', file=open('order', 'a'))\ntime.sleep({1})"
    paths = [write(project / "nbs" / f"{name}.ipynb", source.format(name, wait)) for name, wait in seconds.items()]
    for _ in range(2):
        (project / "nbs" / "order").unlink(missing_ok=True)
        assert run("-n", 1, folder=project)[1]["passed"] == 3
    assert (project / "nbs" / "order").read_text().split() == ["b", "c", "a"]
    assert set(read_durations(notebook_test.Project.of(project))) == set(paths)
    status = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=project, capture_output=True, text=True)
    assert ".mlkit" not in status.stdout
    (project / DURATIONS).write_text("{")  # damaged: as if there were none
    assert run("-n", 1, folder=project)[1]["passed"] == 3


@pytest.mark.skipif(not kernels.CAN_FORK, reason="warm kernels need Linux")
def test_kernels_of_a_notebook_come_from_the_same_server(project: Path) -> None:
    source = "import os\nfrom mlkit.jobs.kernels import is_warm, running_servers\nassert is_warm(os.environ)\n"
    result = run_one(project, source + "(server,) = running_servers()\nassert server['kernels'] == [os.getpid()]")
    assert result["error"] == ""


# What a change affects


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    if not (folder / ".git").exists():
        git(folder, "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "State")


def names_affected(folder: Path) -> list[str]:
    return [path.stem for path in affected(find_notebooks([], folder), changed_files(folder), folder)]


@pytest.fixture
def flat(project: Path) -> Path:
    """A package without folders, with a notebook for each module."""
    package = project / "kit"
    package.mkdir()
    (package / "web").mkdir()
    files = {"__init__": "", "base": "", "other": "", "lazy": "def f():\n    from .base import x", "shell": "import os"}
    files |= {
        "hints": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kit.base",
        "__main__": "import kit.other",
    }
    for name, code in files.items():
        (package / f"{name}.py").write_text(code)
    (package / "web" / "page.html").write_text("<p>")
    cells = {"lazy": "import kit.lazy as l", "hints": "from kit import hints", "other": "from kit.other import *"}
    cells |= {"text": 'code = "from kit.lazy import f"', "command": "!ls\nimport sys\n[sys.executable, '-m', 'kit']"}
    cells |= {"alone": "import json\n'''kit.base is described here'''", "base": "import kit.base"}
    for name, cell in cells.items():
        write(project / "nbs" / f"{name}.ipynb", "%matplotlib inline", cell)
    commit(project)
    return project


def test_nothing_has_changed(flat: Path) -> None:
    result = run_cli("test", "--changed", folder=flat)
    assert (result.returncode, "Nothing to test" in result.stdout) == (0, True)
    code, report = run("--changed", folder=flat)
    assert (code, report["notebooks"]) == (0, [])
    result = run_cli("test", "--changed", "--base", "nowhere", folder=flat)
    assert (result.returncode, "revision" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("kit/base.py", ["base", "lazy", "text"]),
        ("kit/lazy.py", ["lazy", "text"]),
        ("kit/other.py", ["command", "other"]),
        ("kit/shell.py", []),
        ("kit/web/page.html", ["base", "command", "hints", "lazy", "other", "text"]),
        ("nbs/alone.ipynb", ["alone"]),
        ("nbs/new.ipynb", ["new"]),
        ("README.md", []),
        ("requirements.lock", ["alone", "base", "command", "hints", "lazy", "other", "text"]),
        ("tests/conftest.py", ["alone", "base", "command", "hints", "lazy", "other", "text"]),
    ],
)
def test_what_imports_a_changed_file_is_affected(flat: Path, path: str, expected: list[str]) -> None:
    (flat / path).parent.mkdir(exist_ok=True)
    if path.endswith(".ipynb"):
        write(flat / path, "2")
    else:
        (flat / path).write_text("# changed")
    assert names_affected(flat) == expected
    commit(flat)
    assert names_affected(flat) == []
    base = changed_files(flat, "HEAD~1")
    assert [path.stem for path in affected(find_notebooks([], flat), base, flat)] == expected


def test_what_imports_a_deleted_module_is_affected(flat: Path) -> None:
    (flat / "kit" / "base.py").unlink()
    assert names_affected(flat) == ["base", "lazy", "text"]


def test_changed_notebooks_are_executed(flat: Path) -> None:
    (flat / "kit" / "lazy.py").write_text("def f():\n    1")
    code, report = run("--changed", folder=flat)
    assert (code, [Path(result["path"]).stem for result in report["notebooks"]]) == (0, ["lazy", "text"])


@pytest.fixture(params=["stub", "names", "eager"])
def layered(project: Path, request: pytest.FixtureRequest) -> Path:
    """Packages in a package, which hand on what their modules define: lazily with a stub or without, or at once."""
    attach = "import lazy_loader as lazy\n__getattr__, __dir__, __all__ = lazy.attach"
    code = {
        "stub": f"{attach}_stub(__name__, __file__)",
        "names": f"{attach}(__name__, submod_attrs={{'io': ['load'], 'kinds': ['kind']}})",
        "eager": "from .io import load\nfrom .kinds import kind",
    }[request.param]
    files = {"__init__.py": "", "data/__init__.py": code, "data/io.py": "load = 1", "data/kinds.py": "kind = 1"}
    files |= {
        "model/__init__.py": "",
        "model/net.py": "def f():\n    from kit.data import load",
        "data/rules.yaml": "a: 1",
    }
    files |= {"data/deep/__init__.py": "", "data/deep/inner.py": "from ..kinds import kind\nfrom ...model import net"}
    if request.param == "stub":
        files["data/__init__.pyi"] = "from .io import load as load\nfrom .kinds import kind\n"
    for name, text in files.items():
        (project / "kit" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "kit" / name).write_text(text)
    cells = {
        "load": ["from kit.data import load"],
        "kind": ["import kit.data as d", "d.kind"],
        "net": ["import kit.model.net"],
    }
    cells |= {
        "module": ["from kit.data import io"],
        "deep": ["from kit.data.deep.inner import kind"],
        "root": ["import kit"],
    }
    for name, sources in cells.items():
        write(project / "nbs" / "library" / "data" / f"{name}.ipynb", *sources)
    commit(project)
    return project


def test_names_that_come_through_a_package(layered: Path, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["layered"]
    (layered / "kit" / "data" / "kinds.py").write_text("kind = 2")
    exact = ["deep", "kind"]
    assert (
        names_affected(layered)
        == {
            "stub": exact,
            "names": ["deep", "kind", "load", "net"],  # the whole package counts
            "eager": ["deep", "kind", "load", "module", "net"],  # to import one of its modules executes the package
        }[kind]
    )
    commit(layered)
    (layered / "kit" / "data" / "io.py").write_text("load = 2")
    assert set(names_affected(layered)) >= {"deep", "load", "module", "net"}
    assert ("kind" in names_affected(layered)) == (kind != "stub")
    commit(layered)
    (layered / "kit" / "data" / "rules.yaml").write_text("a: 2")
    assert names_affected(layered) == ["deep", "kind", "load", "module", "net"]
    commit(layered)
    (layered / "kit" / "__init__.py").write_text("__version__ = '2'")
    assert "root" in names_affected(layered)


def test_the_tests_that_a_change_affects(tmp_path: Path) -> None:
    always, ray, files = (
        tmp_path / "tests" / name for name in ("test_architecture.py", "jobs/test_ray.py", "core/test_files.py")
    )
    for path in (always, ray, files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for changed, test in {"mlkit/jobs/ray.py": ray, "mlkit/_files.py": files, "tests/jobs/test_ray.py": ray}.items():
        assert set(files_of_tests({tmp_path / changed}, tmp_path)) == {always, test}, changed
    assert files_of_tests({tmp_path / "mlkit/jobs/other.py", tmp_path / "README.md"}, tmp_path) == [always]


def test_notebooks_that_need_no_tensorflow(flat: Path) -> None:
    (flat / "kit" / "heavy.py").write_text("def f():\n    from tensorflow import data")
    light = write(flat / "nbs" / "light.ipynb", "import kit.lazy", "import tensorflow_metadata")
    direct = write(flat / "nbs" / "direct.ipynb", "if True:\n    import tensorflow.data as d")
    indirect = write(flat / "nbs" / "indirect.ipynb", "from kit.heavy import f")
    packages = ("tensorflow", "keras")
    assert [any_imports([path], packages, flat) for path in (light, direct, indirect)] == [False, True, True]
    assert any_imports([light, indirect], packages, flat)


@pytest.mark.skipif(not kernels.CAN_FORK, reason="warm kernels need Linux")
def test_a_light_server_leaves_the_settings_as_they_are(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "tensorflow, mlkit.tuning.oracle, json")
    cell = "import os, sys\nassert not {'tensorflow', 'mlkit.tuning.oracle'} & set(sys.modules)\n"
    cell += "assert os.environ['MLKIT_KERNELS_PRELOAD'] == 'tensorflow, mlkit.tuning.oracle, json'"
    path = write(project / "nbs" / "light.ipynb", cell)
    (result,) = run_notebooks([path], max_parallel=1, light=True)
    assert result.error == ""
    assert os.environ["MLKIT_KERNELS_PRELOAD"] == "tensorflow, mlkit.tuning.oracle, json"


def test_a_project_without_git(project: Path) -> None:
    with pytest.raises(InputError, match="git"):
        changed_files(project)


def test_a_terminal_shows_what_is_at_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        test_command, "console", Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    monkeypatch.setattr(test_command, "REFRESH_SECONDS", 0)
    results = [Result(project / "nbs" / f"{name}.ipynb") for name in ("good", "slow")]
    with test_command.TestProgress(silent=False) as progress:
        progress(results)
        results[0].outcome, results[0].seconds = "passed", 1.5
        results[1].outcome, results[1].cell, results[1].line = "running", 7, "train()"
        progress(results)
    text = screen.getvalue()
    assert text.count("passed  nbs/good.ipynb  1.5 s") == 1
    assert "1 of 2 notebooks" in text
    assert "in cell 7: train()" in text


def test_the_command_explains_itself(cli: Callable[..., subprocess.CompletedProcess]) -> None:
    result = cli("test", "--help")
    assert "Example: mlkit test --changed" in result.stdout
