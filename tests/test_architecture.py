"""What holds for the whole tree: layers, exports, notebooks, the lock."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from .conftest import REPOSITORY

NOTEBOOKS = REPOSITORY / "nbs"
LIBRARY = {path.stem.partition("_")[2]: int(path.stem[:2]) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
ALL_NOTEBOOKS = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
JOBS = sorted((NOTEBOOKS / "jobs").glob("*.ipynb"))


def imported_modules(module: str) -> set[str]:
    """Modules of the kit that a module imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / "mlkit" / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlkit."):
            names.add(node.module.removeprefix("mlkit."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("mlkit.") for alias in node.names if alias.name.startswith("mlkit.")}
    return names


@pytest.mark.parametrize("module", LIBRARY)
def test_a_module_imports_only_lower_floors(module: str) -> None:
    upward = {name for name in imported_modules(module) if LIBRARY[name] >= LIBRARY[module]}
    assert not upward, f"{LIBRARY[module]:02d}_{module} imports {upward}"


def test_the_layer_check_sees_imports() -> None:
    assert {"settings", "runs"} <= imported_modules("jobs")


def test_production_wing_and_data_import_no_tensorflow() -> None:
    light = [module for module, floor in LIBRARY.items() if floor < 12 or floor >= 20]
    code = "import sys\n" + "".join(f"import mlkit.{module}\n" for module in light)
    code += "print([name for name in ('tensorflow', 'keras') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_exported_code_equals_the_notebooks(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(REPOSITORY / "nbs", copy / "nbs", ignore=ignore)
    shutil.copytree(REPOSITORY / "mlkit", copy / "mlkit", ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=copy, check=True, capture_output=True)
    for module in (REPOSITORY / "mlkit").glob("*.py"):
        assert (copy / "mlkit" / module.name).read_text() == module.read_text(), f"{module.name}: run `make export`"


def test_nbdev_clean_changes_nothing_and_keeps_the_parameters_tag(tmp_path: Path) -> None:
    copy = tmp_path / "nbs"
    shutil.copytree(NOTEBOOKS, copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    subprocess.run([Path(sys.executable).parent / "nbdev-clean", "--fname", "nbs"], cwd=tmp_path, check=True)
    for path in ALL_NOTEBOOKS:
        cleaned = json.loads((copy / path.relative_to(NOTEBOOKS)).read_text())
        assert cleaned == json.loads(path.read_text()), f"{path.name}: run `make export`"
    for path in JOBS:
        cells = json.loads((copy / "jobs" / path.name).read_text())["cells"]
        assert ["parameters"] in [cell["metadata"].get("tags") for cell in cells]


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_ready_for_papermill_and_free_of_errors(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.language == "python"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_tells_a_story_that_calls_the_library(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in cells].count(["parameters"]) == 1
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


def test_the_lock_names_no_index_and_pins_with_hashes() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert not re.search(r"https?://|--index|--find-links", lock)
    requirements = re.findall(r"^[a-z][\w.-]*==.*$", lock, re.MULTILINE)
    assert len(requirements) > 100
    assert all(line.endswith("\\") for line in requirements)  # each goes on with its hashes


def test_no_tracked_file_names_a_registry_host() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js.org", "deb.deb" + "ian.org"]
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        path = REPOSITORY / name
        text = path.read_text(errors="ignore") if path.is_file() else ""
        assert not [host for host in hosts if host in text], name
