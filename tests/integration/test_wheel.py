"""The wheel, installed into an empty environment far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds nothing but the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".venv", ".git", "node_modules", "build", "*.egg-info")

    def ignore(place: str, names: list[str]) -> set[str]:
        """What is not part of the sources; runs/ only at the top, since a package has that name."""
        return left_out(place, names) | ({"runs"} if Path(place) == REPOSITORY else set())

    shutil.copytree(REPOSITORY, source, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True
    )
    wheel = next(folder.glob("mlkit-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    # The lock's versions, and its CPU build of TensorFlow in place of the one the wheel names.
    (folder / "override").write_text("tensorflow ; sys_platform == 'darwin'\n")
    command = [
        Path(sys.executable).parent / "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        folder / "venv" / "bin" / "python",
    ]
    command += [f"{wheel}", "tensorflow-cpu", "--override", folder / "override", "--constraint", folder / "constraint"]
    lock = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = [line.removesuffix(" \\") for line in lock if line[:1].isalnum()]
    (folder / "constraint").write_text("\n".join(pins))
    subprocess.run(command, check=True)
    return folder / "venv" / "bin"


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_train_job_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    result = run(installed / "mlkit", "run", "train", "-p", "epochs=1", "--json", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["status"] == "completed"
    assert Path(record["folder"]).parent == tmp_path / "runs"


def test_a_new_project_runs_its_own_jobs(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "mlkit", "new", "shop", folder=tmp_path).returncode == 0
    result = run(
        installed / "mlkit", "run", "train", "-p", "epochs=1", "-p", "dataset=wine", "--json", folder=tmp_path / "shop"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["notebook"] == "jobs/train.ipynb"


def test_the_library_is_there_without_the_tools_of_its_developers(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util, mlkit.data.dataset, mlkit.models.families, mlkit.training.trainer\n"
    code += "import mlkit.export.saved_model, mlkit.runs.run\n"
    code += "print(importlib.util.find_spec('nbdev'))"
    result = run(installed / "python", "-c", code, folder=tmp_path)
    assert result.stdout == "None\n", result.stderr


def test_the_warm_kernel_comes_with_it(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLKIT_KERNELS_PRELOAD", "numpy")
    kernelspec = {"name": "mlkit", "display_name": "mlkit", "language": "python"}
    cells = [new_code_cell("import sys\nassert 'numpy' in sys.modules")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), tmp_path / "in.ipynb")
    result = run(installed / "papermill", "in.ipynb", "out.ipynb", folder=tmp_path)
    assert result.returncode == 0, result.stderr


def test_its_templates_and_web_pages_come_with_it(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.resources\nfrom mlkit._display import html_page\nprint(html_page('Report', '')[:15])\n"
    code += "print((importlib.resources.files('mlkit') / 'web' / 'page.html').is_file())"
    result = run(installed / "python", "-c", code, folder=tmp_path)
    assert result.stdout == "<!DOCTYPE html>\nTrue\n", result.stderr
