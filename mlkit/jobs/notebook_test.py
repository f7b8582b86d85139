"""Executes notebooks as tests: each in a forked process, by nbdev's rules for which cells are executed."""

# TensorFlow and other large libraries are imported once, by the fork server of mlkit.jobs.kernels, and shared by all
# processes forked from it. The shell is IPython's own, a dependency of ipykernel; nbdev is not needed.

import asyncio
import faulthandler
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mlkit._files import write_atomic
from mlkit.config import load_settings, variable_name
from mlkit.errors import InputError, MlkitError, NotFoundError
from mlkit.jobs import kernels
from mlkit.jobs.executor import interrupt_on_sigterm
from mlkit.jobs.notebook import read_notebook

SKIPPED_NAMES = ("_", ".")  # prefixes of folders and notebooks that are not tests
NO_TESTS = ".notest"  # file whose presence excludes the notebooks of its folder
DURATIONS = Path(".mlkit", "test_durations.json")  # in the project; may be deleted at any time
ENTRY = "mlkit.jobs.notebook_test:execute_notebook"
FRESH_CODE = "import sys; from mlkit.jobs.notebook_test import execute_notebook; execute_notebook(sys.argv[1:])"
EXIT_SECONDS = 10  # time limit for exit handlers and threads after the last cell
DUMP_SECONDS = 1  # time limit for writing the stack traces after a timeout


# Which cells are executed: the rules of nbdev


@dataclass(frozen=True)
class Project:
    """Project with its test configuration from pyproject.toml."""

    root: Path  # folder of pyproject.toml; added to sys.path
    notebooks: Path  # folder
    skip_flags: frozenset[str] = frozenset({"notest"})  # directives of cells that are not executed
    recursive: bool = True
    profile: bool = True  # whether the user's IPython profile is loaded

    @classmethod
    @cache
    def of(
        cls,
        folder: Path,  # folder inside the project
    ) -> "Project":
        """Nearest project with [tool.nbdev], else with a pyproject.toml, else the folder alone."""
        files = [path / "pyproject.toml" for path in (folder, *folder.parents) if (path / "pyproject.toml").is_file()]
        contents = {path: _read_toml(path) for path in files}
        file = next((path for path in files if "nbdev" in contents[path].get("tool", {})), next(iter(files), None))
        given = contents[file].get("tool", {}).get("nbdev", {}) if file else {}
        root = file.parent if file else folder
        flags = given.get("tst_flags", "notest")
        flags = frozenset(flags.split() if isinstance(flags, str) else flags)
        notebooks = root / given.get("nbs_path", "nbs")
        return cls(root, notebooks, flags, given.get("recursive", True), given.get("exec_profile", True))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read as TOML: {error}. Correct it.") from error


def find_notebooks(
    paths: Iterable[Path],  # notebooks and folders; by default the project's folder of notebooks
    folder: Path | None = None,  # folder inside the project; by default the working folder
) -> list[Path]:
    """Notebooks to execute, without duplicates; raises NotFoundError or InputError."""
    project = Project.of((folder or Path.cwd()).resolve())
    notebooks: dict[Path, None] = {}
    for path in list(paths) or [project.notebooks]:
        if path.is_dir():
            notebooks |= dict.fromkeys(_notebooks_in(path.resolve(), project.recursive))
        elif not path.exists():
            raise NotFoundError(f"Expected a notebook or a folder of notebooks; {path} does not exist. Name another.")
        elif path.suffix != ".ipynb":
            raise InputError(f"Expected a notebook (.ipynb) or a folder; received {path}. Name a notebook.")
        else:
            notebooks[path.resolve()] = None
    if not notebooks:
        places = ", ".join(map(str, paths)) or project.notebooks
        raise NotFoundError(f"Expected notebooks in {places}; it has none that are tests. Name another folder.")
    return list(notebooks)


def _notebooks_in(folder: Path, recursive: bool) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith(SKIPPED_NAMES))
        if NO_TESTS not in names:
            chosen = (name for name in sorted(names) if name.endswith(".ipynb") and not name.startswith(SKIPPED_NAMES))
            yield from (Path(place, name) for name in chosen)


@dataclass(frozen=True)
class Cell:
    """A code cell that is executed."""

    number: int  # position in the notebook, from 1
    source: str
    heading: str  # section heading

    @property
    def first_line(self) -> str:
        """First line of code."""
        lines = (line for line in self.source.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        return next(lines, "")


def executed_cells(
    notebook: dict[str, Any],  # as read_notebook returns it
    skip_flags: Iterable[str] = ("notest",),
) -> list[Cell]:
    """Cells that nbdev-test would execute."""
    metadata, front = notebook.get("metadata", {}), _front_matter(notebook)
    language = (metadata.get("kernelspec") or {}).get("language", "python")
    if str(front.get("skip_exec", False)).lower() in ("y", "yes", "t", "true", "on", "1") or language != "python":
        return []
    default = str(front.get("eval")) not in ("False", "false")
    cells, heading, first = [], "", True
    for number, cell in enumerate(notebook["cells"], 1):
        source = cell["source"]
        if cell["cell_type"] == "markdown":
            heading = next((line.strip("# ") for line in source.splitlines() if line.startswith("#")), heading)
        if cell["cell_type"] != "code":
            continue
        directives = _named(cell.get("metadata", {})) | _directives(source)
        flags = {*directives, *(_named(metadata) if first else {})}  # the notebook's directives apply to its first cell
        first = False
        tags = cell.get("metadata", {}).get("tags", [])
        if _is_evaluated(source, directives, tags, default) and not flags & set(skip_flags):
            cells.append(Cell(number, source, heading))
    return cells


def _is_evaluated(source: str, directives: dict[str, str], tags: list[str], default: bool) -> bool:
    if "skip-execution" in tags or "nbdev_export" + "(" in source:
        return False
    values = {"": True, "true": True, "True": True, "false": False, "False": False}
    return values.get(directives.get("eval", "default"), default)


def _named(metadata: dict[str, Any]) -> dict[str, str]:
    """Directives in metadata."""
    return metadata.get("nbdev") or {}


def _directives(source: str) -> dict[str, str]:
    """Directives such as `#| eval: false` above the code of a cell."""
    lines = itertools.takewhile(re.compile(r"\s*#\s*\||\s*%%\w+|\s*$").match, source.splitlines())
    matches = (re.match(r"\s*#\s*\|\s*([^\s:]+)\s*:?\s?(.*?)\s*$", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _front_matter(notebook: dict[str, Any]) -> dict[str, Any]:
    """Options of the notebook from its metadata, its first markdown cell and its first raw cell; the last one wins."""
    first = {cell["cell_type"]: cell["source"] for cell in reversed(notebook["cells"])}
    markdown, raw = first.get("markdown", ""), first.get("raw", "")
    items = re.findall(r"^-\s+(\S.*:.*\S)\s*$", markdown, re.MULTILINE) if re.search(r"^#\s+\S", markdown, re.M) else []
    listed = {}
    with suppress(yaml.YAMLError):
        listed = yaml.safe_load("\n".join(items)) or {}
    return _named(notebook.get("metadata", {})) | (_literal(markdown) or dict(listed)) | _literal(raw)


def _literal(text: str) -> dict[str, Any]:
    """YAML between lines of dashes, if a cell has no other content."""
    match = re.match(r"---\n(.*?)\n(?:---|\.\.\.)(?:\n|\Z)(.*)", text.strip(), re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match and not match[2].strip() else {}
    except yaml.YAMLError as error:
        raise InputError(f"Expected YAML between the dashes; received {text!r}: {error}. Correct it.") from error
    return value if isinstance(value, dict) else {}


# In the process of a notebook


def execute_notebook(
    arguments: list[str],  # path of the notebook
) -> None:
    """Execute a notebook in this process, report each cell and the outcome as lines of JSON, and end the process."""
    report, log = os.fdopen(os.dup(1), "w", buffering=1), os.dup(2)
    os.dup2(2, 1)  # output of child processes goes to the log
    path = Path(*arguments)
    project = Project.of(path.parent)
    sys.argv = [str(path)]
    sys.path[:0] = [folder for folder in (str(path.parent), str(project.root)) if folder not in sys.path]
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    faulthandler.enable(log)
    signal.signal(signal.SIGUSR1, lambda *_: _write_tasks(loop, log))
    faulthandler.register(signal.SIGUSR1, log, all_threads=True, chain=True)
    start, outcome = time.monotonic(), {}
    try:
        cells = executed_cells(read_notebook(path), project.skip_flags)
        shell = _new_shell(project.profile)
        outcome |= loop.run_until_complete(_execute_cells(shell, cells, report))
    except BaseException:
        outcome["error"] = traceback.format_exc()
    outcome |= {"seconds": time.monotonic() - start, "outcome": "failed" if outcome.get("error") else "passed"}
    print(json.dumps(outcome), file=report)
    kernels.exit_fast()


def _new_shell(profile: bool) -> Any:
    """IPython shell as in a kernel: with the user's profile and inline figures, without a history file."""
    from IPython.core.application import BaseIPythonApplication
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.shellapp import InteractiveShellApp
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    class Application(BaseIPythonApplication, InteractiveShellApp):
        name = "ipython"

    class NotebookShell(InteractiveShell):
        def enable_gui(self, gui: str | None = None) -> None:
            """Do nothing: there is no GUI event loop."""

        def showtraceback(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing: errors are part of the result."""

        showsyntaxerror = showtraceback

    application = Application()
    if profile:
        application.initialize([])
    application.config.HistoryManager.hist_file = ":memory:"
    application.shell = shell = NotebookShell.instance(config=application.config)
    shell.history_manager.enabled = False
    shell.display_formatter.active = True  # values are rendered as in a notebook
    shell.input_transformers_cleanup.append(_without_comments_above_magic)
    shell.enable_matplotlib("inline")
    set_matplotlib_formats("retina")
    if profile:
        application.init_extensions()
        application.init_code()
    return shell


def _without_comments_above_magic(lines: list[str]) -> list[str]:
    """Remove comments above a cell magic, which IPython accepts in the first line only."""
    first = next((n for n, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
    return lines[first:] if lines[first:] and lines[first].startswith("%%") else lines


async def _execute_cells(shell: Any, cells: list[Cell], report: Any) -> dict[str, Any]:  # attributes of the result
    from IPython.utils.capture import capture_output

    seconds = {}
    for cell in cells:
        place = {"cell": cell.number, "line": cell.first_line, "heading": cell.heading}
        print(json.dumps(place), file=report)
        start = time.monotonic()
        with capture_output() as captured:
            result = await _run_cell(shell, cell.source)
        seconds[cell.number] = round(time.monotonic() - start, 3)
        if error := result.error_before_exec or result.error_in_exec:
            printed = _tail(captured.stdout + captured.stderr, 20)
            printed = f"\nThe cell had printed:\n{printed}" if printed else ""
            return {"error": _plain_traceback(error) + printed, "cells": seconds}
    return {"cell": None, "line": "", "heading": "", "cells": seconds}


async def _run_cell(shell: Any, source: str) -> Any:
    try:
        code, problem = shell.transform_cell(source), None
    except Exception:
        code, problem = source, sys.exc_info()
    result = None
    try:
        result = await shell.run_cell_async(
            source, store_history=True, transformed_cell=code, preprocessing_exc_tuple=problem
        )
    finally:
        shell.events.trigger("post_execute")  # shows figures
        shell.events.trigger("post_run_cell", result)
    return result


def _plain_traceback(error: BaseException) -> str:
    """Traceback without the frames of IPython and of this module."""
    trace = error.__traceback__
    while trace and ("IPython" in trace.tb_frame.f_code.co_filename or trace.tb_frame.f_code.co_filename == __file__):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _write_tasks(loop: asyncio.AbstractEventLoop, log: int) -> None:
    """Write the stack of each waiting task; the stack of the loop's thread does not show it."""
    for task in asyncio.all_tasks(loop):
        waiting, frames = task.get_coro(), []
        while waiting is not None:
            frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
            frames += [(frame, frame.f_lineno)] if frame else []
            waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
        lines = traceback.StackSummary.extract(iter(frames)).format()
        os.write(log, f"\nA task waits (innermost call last):\n{''.join(lines)}".encode())


# In the process of the command


@dataclass
class Result:
    """State and result of the test of a notebook."""

    path: Path
    outcome: str = "queued"  # queued, running, passed, failed or skipped
    seconds: float = 0.0
    cell: int | None = None  # cell that is being executed or has failed; position in the notebook, from 1
    line: str = ""  # first line of that cell
    heading: str = ""  # section heading of that cell
    error: str = ""
    cells: dict[str, float] = field(default_factory=dict)  # number of a cell -> seconds

    @property
    def is_finished(self) -> bool:
        """Whether the test has ended."""
        return self.outcome in ("passed", "failed", "skipped")

    @property
    def place(self) -> str:
        """Number, heading and first line of the cell."""
        heading = f" ({self.heading})" if self.heading else ""
        return f"{self.cell_name}{heading}: {self.line}" if self.cell else self.cell_name

    @property
    def cell_name(self) -> str:
        """Number of the cell."""
        return f"in cell {self.cell}" if self.cell else "before its first cell"


@dataclass
class _Process:
    """Process that executes a notebook."""

    result: Result
    process: kernels.ForkedKernel | subprocess.Popen
    reports: int  # file descriptor from which its reports are read
    log: Path
    timeout: float  # seconds; 0: none
    started: float = field(default_factory=time.monotonic)
    deadline: float | None = None  # time on the monotonic clock at which it is killed
    unread: bytes = b""

    def has_ended(self) -> bool:
        """Read its reports, and kill it after its deadline."""
        code, now = self.process.poll(), time.monotonic()  # polled first, so that its last reports are read below
        self._read_reports()
        if not self.result.is_finished:
            self.result.seconds = now - self.started
        if code is not None:
            if not self.result.is_finished:
                self._fail(f"The process {_ending(code)} {self.result.cell_name}.")
            self.end()
            return True
        if self.deadline is None and self.timeout and now > self.started + self.timeout and not self.result.is_finished:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR1)  # it writes its stack traces to the log
            self.deadline = now + DUMP_SECONDS
        elif self.deadline is None and self.result.is_finished:
            self.deadline = now + EXIT_SECONDS
        elif self.deadline is not None and now > self.deadline:
            if not self.result.is_finished:
                self._fail(f"It took more than {self.timeout:g} s and was ended {self.result.cell_name}.")
            self.end()
            return True
        return False

    def _read_reports(self) -> None:
        while select.select([self.reports], [], [], 0)[0] and (data := os.read(self.reports, 1 << 16)):
            self.unread += data
        *lines, self.unread = self.unread.split(b"\n")
        for line in lines:
            for name, value in json.loads(line).items():
                setattr(self.result, name, value)

    def _fail(self, reason: str) -> None:
        self.result.outcome = "failed"
        log = _tail(self.log.read_text(errors="replace"), 60)
        self.result.error = reason + (f"\nIts last output:\n{log}" if log else "")

    def end(self) -> None:
        """Kill the process and its child processes, and wait for its end."""
        if self.process.poll() is None:
            kernels.kill_group(self.process.pid)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if isinstance(self.process, subprocess.Popen):
            kernels.kill_group(self.process.pid)  # the fork server does this for its kernels
        with suppress(OSError):
            os.close(self.reports)


def _tail(text: str, lines: int) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"was ended by signal {-code}"


def _start(result: Result, environment: dict[str, str], scratch: Path, timeout: float, preload: list[str]) -> _Process:
    """Fork a process for a notebook from the fork server, or start one where forking is not safe."""
    path, scratch = result.path, Path(tempfile.mkdtemp(dir=scratch))
    log = scratch / "log"
    reader, writer = os.pipe()
    result.outcome = "running"
    try:
        with log.open("wb") as output:
            launch = {"env": environment, "cwd": path.parent, "stdout": writer, "stderr": output}
            if kernels.CAN_FORK:
                launch["env"] = environment | {"XDG_RUNTIME_DIR": str(scratch)}
                _share_server(scratch)
                process = kernels.fork_kernel([str(path)], launch, entry=ENTRY, preload=preload)
            else:
                launch |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
                process = subprocess.Popen([sys.executable, "-c", FRESH_CODE, str(path)], **launch)
    finally:
        os.close(writer)
    return _Process(result, process, reader, log, timeout)


def _share_server(folder: Path) -> None:
    """Link this command's fork server into a runtime folder, so that kernels started by the notebook use it."""
    server = kernels.hold_server(os.environ)
    shared = folder / server.socket_path.parent.name / server.socket_path.name
    shared.parent.mkdir(mode=0o700)
    shared.symlink_to(server.socket_path)


@contextmanager
def _light_server() -> Iterator[None]:
    """Context manager in which this process starts a fork server that does not import TensorFlow."""
    variable = variable_name("kernels.preload")
    modules = load_settings().kernels.preload.split(",")
    light = ",".join(name for name in modules if name.strip().partition(".")[0] not in ("tensorflow", "keras", "mlkit"))
    original = dict(os.environ)
    os.environ[variable] = light
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(original)


def run_notebooks(
    paths: Iterable[Path],  # absolute paths of notebooks
    *,
    max_parallel: int,  # notebooks in parallel
    timeout: float = 0,  # seconds for each; 0: no limit
    preload: Iterable[str] = (),  # modules to import before forking, beside those of the setting kernels.preload
    light: bool = False,  # no notebook needs TensorFlow: it is not imported, unless a running server has done so
    on_progress: Callable[[list[Result]], None] = lambda results: None,  # callback; called several times a second
) -> list[Result]:  # in the order of the paths
    """Execute notebooks as tests; ends all started processes, even when interrupted. Raises InputError."""
    results = [Result(path) for path in paths]
    for result in results:
        cells = executed_cells(read_notebook(result.path), Project.of(result.path.parent).skip_flags)
        if not cells or result.path.with_name(NO_TESTS).exists():
            result.outcome = "skipped"
    durations = {result.path: read_durations(Project.of(result.path.parent)).get(result.path) for result in results}
    queued = [result for result in results if result.outcome == "queued"]
    queued.sort(key=lambda result: durations[result.path] or float("inf"))  # the longest comes first
    running: list[_Process] = []
    on_progress(results)
    environment = os.environ | {"IN_TEST": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="mlkit-", ignore_cleanup_errors=True) as scratch,
        _light_server() if light and not kernels.is_warm(os.environ) else nullcontext(),
        interrupt_on_sigterm(),
    ):
        try:
            while queued or running:
                while queued and len(running) < max_parallel:
                    running.append(_start(queued.pop(), environment, Path(scratch), timeout, list(preload)))
                select.select([process.reports for process in running], [], [], 0.02)
                running = [process for process in running if not process.has_ended()]
                on_progress(results)
        finally:
            for process in running:
                process.end()
            kernels.release_servers()
    write_durations(results)
    return results


def read_durations(
    project: Project,
) -> dict[Path, float]:  # path of a notebook -> seconds
    """Durations of the notebooks when they last passed."""
    with suppress(OSError, ValueError, AttributeError):
        durations = json.loads((project.root / DURATIONS).read_text())
        return {project.root / name: float(seconds) for name, seconds in durations.items()}
    return {}


def write_durations(
    results: Iterable[Result],
) -> None:
    """Store the durations of passed notebooks in each project, in a folder that git ignores."""
    passed = [result for result in results if result.outcome == "passed"]
    for project in {Project.of(result.path.parent) for result in passed}:
        durations = read_durations(project) | {result.path: result.seconds for result in passed}
        within = {path: seconds for path, seconds in durations.items() if path.is_relative_to(project.root)}
        content = {str(path.relative_to(project.root)): round(seconds, 2) for path, seconds in sorted(within.items())}
        with suppress(OSError, MlkitError):
            (project.root / DURATIONS).parent.mkdir(exist_ok=True)
            (project.root / DURATIONS).with_name(".gitignore").write_text("*\n")
            write_atomic(project.root / DURATIONS, json.dumps(content, indent=1), durable=False)
