"""Notebooks as tests: a forked process for each, by nbdev's rules of what is executed."""

# TensorFlow and other large libraries are imported once, by the server of mlkit.jobs.kernels, and shared by all
# processes forked from it. The shell is IPython's own, which ipykernel brings: nbdev is not needed to test what
# it exports.

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
from contextlib import contextmanager, suppress
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

SKIPPED_NAMES = ("_", ".")  # how names of folders and notebooks begin that are no tests
NO_TESTS = ".notest"  # a file that keeps the notebooks beside it from being tests
DURATIONS = Path(".mlkit", "test_durations.json")  # in the project; may be deleted at any time
ENTRY = "mlkit.jobs.notebook_test:execute_notebook"
FRESH_CODE = "import sys; from mlkit.jobs.notebook_test import execute_notebook; execute_notebook(sys.argv[1:])"
EXIT_SECONDS = 10  # that exit handlers and threads of a notebook may take after its last cell
DUMP_SECONDS = 1  # that a notebook may take to write where it hangs


# What is executed: the rules of nbdev


@dataclass(frozen=True)
class Project:
    """What pyproject.toml says about notebooks."""

    root: Path  # folder of pyproject.toml; it is importable
    notebooks: Path
    skip_flags: frozenset[str] = frozenset({"notest"})  # directives of cells that are not executed
    recursive: bool = True
    profile: bool = True  # the user's IPython profile is loaded

    @classmethod
    @cache
    def of(
        cls,
        folder: Path,  # or one below the project's
    ) -> "Project":
        """The project with [tool.nbdev], else the one with a pyproject.toml, else the folder alone."""
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
    paths: Iterable[Path],  # notebooks and folders; none: the project's folder of notebooks
    folder: Path | None = None,  # from which the project is looked for; the working folder by default
) -> list[Path]:
    """The notebooks to execute, each once; raises NotFoundError, InputError."""
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

    number: int  # in the notebook, from 1
    source: str
    heading: str  # above it

    @property
    def first_line(self) -> str:
        """The first line that is code."""
        lines = (line for line in self.source.splitlines() if line.strip() and not line.lstrip().startswith("#"))
        return next(lines, "")


def read_notebook(
    path: Path,
) -> dict[str, Any]:  # the sources of its cells as texts
    """A notebook as it lies on the disk; raises InputError when it is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"Expected a notebook (JSON of nbformat 4); {path} cannot be read as one ({reason}). "
            "Restore it, or give it a name that does not end in .ipynb."
        ) from error
    return notebook


def executed_cells(
    notebook: dict[str, Any],  # from `read_notebook`
    skip_flags: Iterable[str] = ("notest",),
) -> list[Cell]:  # none: nothing in it is a test
    """The cells that nbdev-test would execute."""
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
        flags = {*directives, *(_named(metadata) if first else {})}  # those of the notebook count for its first cell
        first = False
        tags = cell.get("metadata", {}).get("tags", [])
        if _is_evaluated(source, directives, tags, default) and not flags & set(skip_flags):
            cells.append(Cell(number, source, heading))
    return cells


def _is_evaluated(source: str, directives: dict[str, str], tags: list[str], default: bool) -> bool:
    if "skip-execution" in tags or "nbdev_export" + "(" in source:
        return False
    wanted = {"": True, "true": True, "True": True, "false": False, "False": False}
    return wanted.get(directives.get("eval", "default"), default)


def _named(metadata: dict[str, Any]) -> dict[str, str]:
    """Directives that are kept in metadata."""
    return metadata.get("nbdev") or {}


def _directives(source: str) -> dict[str, str]:
    """Directives such as `#| eval: false` above the code of a cell."""
    lines = itertools.takewhile(re.compile(r"\s*#\s*\||\s*%%\w+|\s*$").match, source.splitlines())
    matches = (re.match(r"\s*#\s*\|\s*([^\s:]+)\s*:?\s?(.*?)\s*$", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def _front_matter(notebook: dict[str, Any]) -> dict[str, Any]:
    """What the notebook, its first markdown cell and its first raw cell say of the whole; the last one counts."""
    first = {cell["cell_type"]: cell["source"] for cell in reversed(notebook["cells"])}
    markdown, raw = first.get("markdown", ""), first.get("raw", "")
    items = re.findall(r"^-\s+(\S.*:.*\S)\s*$", markdown, re.MULTILINE) if re.search(r"^#\s+\S", markdown, re.M) else []
    listed = {}
    with suppress(yaml.YAMLError):
        listed = yaml.safe_load("\n".join(items)) or {}
    return _named(notebook.get("metadata", {})) | (_literal(markdown) or dict(listed)) | _literal(raw)


def _literal(text: str) -> dict[str, Any]:
    """YAML between lines of dashes, when a cell holds nothing else."""
    match = re.match(r"---\n(.*?)\n(?:---|\.\.\.)(?:\n|\Z)(.*)", text.strip(), re.DOTALL)
    try:
        value = yaml.safe_load(match[1]) if match and not match[2].strip() else {}
    except yaml.YAMLError as error:
        raise InputError(f"Expected YAML between the dashes; received {text!r}: {error}. Correct it.") from error
    return value if isinstance(value, dict) else {}


# In the process of a notebook


def execute_notebook(
    arguments: list[str],  # the notebook's path
) -> None:
    """Execute a notebook in this process, report each cell and the outcome as lines of JSON, and end the process."""
    report, log = os.fdopen(os.dup(1), "w", buffering=1), os.dup(2)
    os.dup2(2, 1)  # what its processes print goes to the log
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
    kernels.leave()


def _new_shell(profile: bool) -> Any:
    """IPython as a kernel has it: with the user's profile and figures inline, without a history on the disk."""
    from IPython.core.application import BaseIPythonApplication
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.core.shellapp import InteractiveShellApp
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    class Application(BaseIPythonApplication, InteractiveShellApp):
        name = "ipython"

    class NotebookShell(InteractiveShell):
        def enable_gui(self, gui: str | None = None) -> None:
            """There is no event loop of a window."""

        def showtraceback(self, *args: Any, **kwargs: Any) -> None:
            """An error is reported as such, not printed."""

        showsyntaxerror = showtraceback

    application = Application()
    if profile:
        application.initialize([])
    application.config.HistoryManager.hist_file = ":memory:"
    application.shell = shell = NotebookShell.instance(config=application.config)
    shell.history_manager.enabled = False
    shell.display_formatter.active = True  # every value is rendered as it would be in a notebook
    shell.input_transformers_cleanup.append(_without_comments_above_magic)
    shell.enable_matplotlib("inline")
    set_matplotlib_formats("retina")
    if profile:
        application.init_extensions()
        application.init_code()
    return shell


def _without_comments_above_magic(lines: list[str]) -> list[str]:
    """A cell magic counts even below directives."""
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
    """A traceback from the cell's own line on."""
    trace = error.__traceback__
    while trace and ("IPython" in trace.tb_frame.f_code.co_filename or trace.tb_frame.f_code.co_filename == __file__):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _write_tasks(loop: asyncio.AbstractEventLoop, log: int) -> None:
    """Where the tasks of a loop wait: its thread itself only shows that it waits for something."""
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
    """Where the test of a notebook stands."""

    path: Path
    outcome: str = "waiting"  # then running, and passed, failed or skipped
    seconds: float = 0.0
    cell: int | None = None  # at work, or where it has failed; from 1, markdown counts
    line: str = ""  # the first one of that cell
    heading: str = ""  # above that cell
    error: str = ""
    cells: dict[str, float] = field(default_factory=dict)  # number of a cell -> seconds

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.outcome in ("passed", "failed", "skipped")

    @property
    def place(self) -> str:
        """The cell in words."""
        if self.cell is None:
            return "before its first cell"
        return f"in cell {self.cell}" + (f" ({self.heading})" if self.heading else "") + f": {self.line}"

    @property
    def cell_name(self) -> str:
        """The cell by its number."""
        return f"in cell {self.cell}" if self.cell else "before its first cell"


@dataclass
class _Process:
    """The process of a notebook."""

    result: Result
    process: kernels.ForkedKernel | subprocess.Popen
    reports: int  # file descriptor
    log: Path
    timeout: float  # seconds; 0: none
    started: float = field(default_factory=time.monotonic)
    ends: float | None = None  # the moment by which it has to have ended
    unread: bytes = b""

    def has_ended(self) -> bool:
        """Take in what it has reported, and see to its end."""
        code, now = self.process.poll(), time.monotonic()  # first: what it has reported before its end is there
        self._read_reports()
        if not self.result.is_finished:
            self.result.seconds = now - self.started
        if code is not None:
            if not self.result.is_finished:
                self._fail(f"The process {_ending(code)} {self.result.cell_name}.")
            self.end()
            return True
        if self.ends is None and self.timeout and now > self.started + self.timeout and not self.result.is_finished:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR1)  # it writes where it hangs
            self.ends = now + DUMP_SECONDS
        elif self.ends is None and self.result.is_finished:
            self.ends = now + EXIT_SECONDS
        elif self.ends is not None and now > self.ends:
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
        """End the process with everything it has started, and wait for that."""
        if self.process.poll() is None:
            kernels.kill_group(self.process.pid)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        if isinstance(self.process, subprocess.Popen):
            kernels.kill_group(self.process.pid)  # a warm server does so itself
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
    """Fork a process for a notebook from the warm server, or start one where forking is not safe."""
    path, scratch = result.path, Path(tempfile.mkdtemp(dir=scratch))
    log = scratch / "log"
    reader, writer = os.pipe()
    result.outcome = "running"
    try:
        with log.open("wb") as output:
            if kernels.CAN_FORK:
                environment = environment | {"XDG_RUNTIME_DIR": str(scratch)}
                _share_server(scratch)
                launch = {"env": environment, "cwd": path.parent, "stdout": writer, "stderr": output}
                process = kernels.fork_kernel([str(path)], launch, entry=ENTRY, preload=preload)
            else:
                launch = {"env": environment, "cwd": path.parent, "stdout": writer, "stderr": output}
                launch |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
                process = subprocess.Popen([sys.executable, "-c", FRESH_CODE, str(path)], **launch)
    finally:
        os.close(writer)
    return _Process(result, process, reader, log, timeout)


def _share_server(folder: Path) -> None:
    """Let kernels of a notebook come from this command's server; servers of other kinds are the notebook's own."""
    server = kernels.hold_server(os.environ)
    shared = folder / server.socket_path.parent.name / server.socket_path.name
    shared.parent.mkdir(mode=0o700)
    shared.symlink_to(server.socket_path)


@contextmanager
def _light_server(wanted: bool) -> Iterator[None]:
    """Within this, the warm server that this process starts imports neither TensorFlow nor what needs it."""
    variable = variable_name("kernels.preload")
    modules = load_settings().kernels.preload.split(",")
    light = ",".join(name for name in modules if name.strip().partition(".")[0] not in ("tensorflow", "keras", "mlkit"))
    before = os.environ.get(variable)
    if wanted and not kernels.is_warm(os.environ):
        os.environ[variable] = light
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        os.environ |= {variable: before} if before is not None else {}


def run_notebooks(
    paths: Iterable[Path],  # of notebooks, absolute
    *,
    max_parallel: int,  # notebooks at a time
    timeout: float = 0,  # seconds for each; 0: as long as it takes
    preload: Iterable[str] = (),  # modules to import once, beside those of the setting kernels.preload
    light: bool = False,  # the notebooks need no TensorFlow: it is not imported, unless a server has done so
    on_progress: Callable[[list[Result]], None] = lambda results: None,  # called again and again
) -> list[Result]:  # in the order of the paths
    """Execute notebooks as tests; ends every process it has started, even when interrupted. Raises InputError."""
    results = [Result(path) for path in paths]
    for result in results:
        cells = executed_cells(read_notebook(result.path), Project.of(result.path.parent).skip_flags)
        if not cells or result.path.with_name(NO_TESTS).exists():
            result.outcome = "skipped"
    durations = {result.path: read_durations(Project.of(result.path.parent)).get(result.path) for result in results}
    waiting = [result for result in results if result.outcome == "waiting"]
    waiting.sort(key=lambda result: durations[result.path] or float("inf"))  # the longest is taken first
    running: list[_Process] = []
    on_progress(results)
    environment = os.environ | {"IN_TEST": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="mlkit-", ignore_cleanup_errors=True) as scratch,
        _light_server(light),
        interrupt_on_sigterm(),
    ):
        try:
            while waiting or running:
                while waiting and len(running) < max_parallel:
                    running.append(_start(waiting.pop(), environment, Path(scratch), timeout, list(preload)))
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
    """How long notebooks took when they last passed."""
    with suppress(OSError, ValueError, AttributeError):
        durations = json.loads((project.root / DURATIONS).read_text())
        return {project.root / name: float(seconds) for name, seconds in durations.items()}
    return {}


def write_durations(
    results: Iterable[Result],
) -> None:
    """Remember how long notebooks took, in each project, where git does not see it."""
    passed = [result for result in results if result.outcome == "passed"]
    for project in {Project.of(result.path.parent) for result in passed}:
        durations = read_durations(project) | {result.path: result.seconds for result in passed}
        within = {path: seconds for path, seconds in durations.items() if path.is_relative_to(project.root)}
        content = {str(path.relative_to(project.root)): round(seconds, 2) for path, seconds in sorted(within.items())}
        with suppress(OSError, MlkitError):
            (project.root / DURATIONS).parent.mkdir(exist_ok=True)
            (project.root / DURATIONS).with_name(".gitignore").write_text("*\n")
            write_atomic(project.root / DURATIONS, json.dumps(content, indent=1), durable=False)
