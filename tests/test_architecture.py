"""What holds for the whole tree: layers, public names, exports, notebooks, the lock."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from .conftest import REPOSITORY
from .layout import is_generated, layout_problems, library_notebooks, public_names

NOTEBOOKS = REPOSITORY / "nbs"
ALL_NOTEBOOKS = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
JOBS = sorted((NOTEBOOKS / "jobs").glob("*.ipynb"))
WITH_PARAMETERS = [*JOBS, *sorted((NOTEBOOKS / "benchmarks").glob("*.ipynb"))]
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in (REPOSITORY / "mlkit").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "_modidx.py")
)
PACKAGES = sorted(path.parent.name for path in (REPOSITORY / "mlkit").glob("*/__init__.pyi"))
WITH_TENSORFLOW = ("models", "training", "tuning", "export", "_compat")  # packages whose modules may import it
PUBLIC = {
    "": ["Run", "build_model", "evaluate", "export_saved_model", "fit", "load_dataset", "run_job"],
    "data": [
        *("Dataset", "Schema", "Statistics", "StreamedDataset", "clean", "describe", "infer_schema", "load_dataset"),
        *("load_schema", "measure_drift", "open_dataset", "read_table", "reload_dataset", "scan_table", "validate"),
        "write_table",
    ],
    "evaluation": [
        *("Evaluation", "Predictions", "evaluate", "find_weak_slices", "make_report", "measure_baselines"),
        "measure_slices",
    ],
    "export": [
        *("check_parity", "compress", "convert_model", "export_run", "export_saved_model", "load_litert"),
        *("load_saved_model", "write_card"),
    ],
    "jobs": [
        *("ParameterSchema", "list_jobs", "reproduce", "resume_run", "resume_sweep", "run_distributed", "run_job"),
        "run_sweep",
    ],
    "models": ["FAMILIES", "TwoTower", "build_model"],
    "registry": [
        *("GateRules", "ModelMirror", "ModelVersion", "Registry", "resolve_model", "run_gate", "sign_folder"),
        "verify_folder",
    ],
    "runs": ["Run", "RunStore", "compare_runs", "diff_runs"],
    "serving": ["ServerOptions", "load_predictor", "predict_table", "run_server", "running_server"],
    "training": [
        *("History", "compile_model", "fit", "load_warm_start_data", "make_strategy", "prepare_devices"),
        *("restore_model", "save_optimizer", "set_seed", "warm_start"),
    ],
    "tuning": ["Search", "read_space", "train_best", "tune"],
}


def python(code: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Python code in a process of its own, in a folder."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def copy_sources(target: Path) -> Path:
    """The library, its notebooks and the configuration, to be spoilt by a test."""
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    for folder in ("nbs", "mlkit"):
        shutil.copytree(REPOSITORY / folder, target / folder, ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", target)
    return target


def lint_layers(folder: Path) -> subprocess.CompletedProcess:
    """The layer contract checked on the sources in a folder."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


def test_packages_import_only_downwards() -> None:
    checked = lint_layers(REPOSITORY)
    assert checked.returncode == 0, checked.stdout
    assert len(MODULES) > 100  # the check has something to look at
    assert int(re.search(r"Analyzed (\d+) files", checked.stdout)[1]) >= len(MODULES)


def test_an_import_against_the_layers_is_named_with_both_modules_and_the_rule(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    with (copy / "mlkit" / "data" / "sql.py").open("a") as file:
        file.write("\n\ndef later():\n    from mlkit.serving import server\n\n    return server\n")
    checked = lint_layers(copy)
    assert checked.returncode == 1
    assert "Packages import only downwards" in checked.stdout
    assert re.search(r"mlkit\.data\.sql -> mlkit\.serving(\.server)?", checked.stdout)


def test_packages_without_training_import_no_tensorflow() -> None:
    light = [name for name in MODULES if not name.startswith(tuple(f"mlkit.{package}" for package in WITH_TENSORFLOW))]
    assert {"mlkit.data.dataset", "mlkit.runs.run", "mlkit.jobs.executor", "mlkit.registry.store"} <= set(light)
    assert {"mlkit.evaluation.evaluator", "mlkit.serving.server", "mlkit.cli.main"} <= set(light)
    code = "import sys\n" + "".join(f"import {module}\n" for module in light)
    code += "print([name for name in ('tensorflow', 'keras') if name in sys.modules])"
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = "import sys, mlkit\n" + "".join(f"import mlkit.{package}\n" for package in PACKAGES)
    code += "print([name for name in ('tensorflow', 'keras', 'polars', 'numpy', 'pydantic') if name in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package: str) -> None:
    module = importlib.import_module(f"mlkit.{package}".rstrip("."))
    names = sorted(public_names(REPOSITORY / "mlkit" / package))
    assert names == PUBLIC[package]
    assert sorted(set(module.__all__)) == names
    modules = {path.stem for path in (REPOSITORY / "mlkit" / package).glob("*.py")}
    assert not modules & set(names), "a name and a module of the package are called the same"
    for name in names:
        assert getattr(module, name).__doc__ or isinstance(getattr(module, name), tuple | dict), name


def test_every_package_but_the_command_line_has_public_names() -> None:
    folders = {path.parent.name for path in (REPOSITORY / "mlkit").glob("*/__init__.py")}
    assert folders - {"cli", "_compat"} == set(PACKAGES) == set(PUBLIC) - {""}


def test_a_public_name_that_does_not_exist_is_named(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    stub = copy / "mlkit" / "runs" / "__init__.pyi"
    stub.write_text(stub.read_text() + "from .query import RunQuery as RunQuery\n")
    result = python("from mlkit.runs import RunQuery", copy)
    assert result.returncode == 1
    assert "mlkit.runs" in result.stderr
    assert "RunQuery" in result.stderr


def test_exported_code_equals_the_notebooks(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path / "copy")
    for module in (copy / "mlkit").rglob("*.py"):
        if is_generated(module):
            module.unlink()
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=copy, check=True, capture_output=True)
    files = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "mlkit").rglob("*.py")}
    assert files == {path.relative_to(copy) for path in (copy / "mlkit").rglob("*.py")}
    for file in sorted(files):
        assert (copy / file).read_text() == (REPOSITORY / file).read_text(), f"{file}: run `make export`"


def test_notebooks_lie_where_their_modules_do() -> None:
    assert layout_problems(REPOSITORY) == []
    assert len(library_notebooks(REPOSITORY)) > 50


def test_a_notebook_in_the_wrong_folder_is_named(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    notebook = next((copy / "nbs" / "library" / "data").glob("*_sql.ipynb"))
    notebook.rename(copy / "nbs" / "library" / "runs" / notebook.name)
    (problem,) = layout_problems(copy)
    assert f"nbs/library/runs/{notebook.name}: expected `#| default_exp runs.sql`, found `data.sql`" in problem


def test_a_file_written_by_hand_is_not_overwritten_by_an_export(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    (copy / "mlkit" / "data" / "sql.py").write_text('"""Written by hand."""\n')
    (problem,) = layout_problems(copy)
    assert "would overwrite mlkit/data/sql.py, which is written by hand" in problem


def test_a_module_without_a_notebook_is_named(tmp_path: Path) -> None:
    copy = copy_sources(tmp_path)
    next((copy / "nbs" / "library" / "data").glob("*_sql.ipynb")).unlink()
    (problem,) = layout_problems(copy)
    assert problem.startswith("mlkit/data/sql.py was exported by a notebook that is not there any more")


def test_the_wheel_lists_every_package() -> None:
    listed = re.findall(r'^    "(mlkit[\w.]*)",$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in REPOSITORY.glob("mlkit/**/__init__.py")}
    assert folders <= set(listed)


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


@pytest.mark.parametrize("path", ALL_NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_name_no_path_of_a_machine_and_no_log_line(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            data = {key: value for key, value in output.get("data", {}).items() if not key.startswith("image/")}
            text = json.dumps([output.get("text", ""), data])
            assert not re.search(r"/(tmp|root|home|work|Users|private/var)/", text), f"{path.name}: {cell.source[:60]}"
            assert not re.search(r"^[WEI]\d{4} \d\d:|\b(WARNING|INFO):tensorflow", text, re.MULTILINE), cell.source[:60]


@pytest.mark.parametrize("path", WITH_PARAMETERS, ids=lambda path: path.stem)
def test_a_notebook_that_is_executed_as_a_job_has_one_parameters_cell(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in cells].count(["parameters"]) == 1


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_tells_a_story_that_calls_the_library(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


def test_the_lock_names_no_index_and_pins_with_hashes() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    assert not re.search(r"https?://|--index|--find-links", lock)
    requirements = re.findall(r"^[a-z][\w.-]*==.*$", lock, re.MULTILINE)
    assert len(requirements) > 100
    assert all(line.endswith("\\") for line in requirements)  # each is followed by its hashes


def test_no_tracked_file_names_a_registry_host() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js.org", "deb.deb" + "ian.org"]
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        path = REPOSITORY / name
        text = path.read_text(errors="ignore") if path.is_file() else ""
        assert not [host for host in hosts if host in text], name
