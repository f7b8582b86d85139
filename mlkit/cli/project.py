"""`mlkit new`, `settings`: start a project, see its settings."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mlkit._files import write_atomic
from mlkit.cli.app import app
from mlkit.cli.console import JsonOption, console, print_json, print_rows
from mlkit.config import known_settings, load_settings
from mlkit.errors import InputError

IGNORED_FILES = "runs/\nmodels/\nlogs/\n.ipynb_checkpoints/\n__pycache__/\n"


def settings_template() -> str:
    """A settings.ini with every setting, its default and its meaning."""
    lines, current = ["# Settings of this project; each line shows the default.\n"], ""
    for section, key, field in known_settings().values():
        if section != current:
            lines.append(f"\n[{section}]\n")
            current = section
        lines.append(f"# {field.description}\n{key} = {field.default}\n")
    return "".join(lines)


@app.command(epilog="Example: mlkit new churn && cd churn && mlkit run train", rich_help_panel="Project")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; it may exist if it is empty.")],
    as_json: JsonOption = False,
) -> None:
    """Create a project: settings, jobs, a first notebook."""
    from mlkit.jobs.notebook import shipped_notebooks

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another name.")
    jobs = sorted(shipped_notebooks("jobs").glob("*.ipynb"))
    first = shipped_notebooks("tutorials") / "first_model.ipynb"
    (folder / "jobs").mkdir(parents=True)
    for source, target in [*((path, folder / "jobs" / path.name) for path in jobs), (first, folder / first.name)]:
        shutil.copyfile(source, target)
    write_atomic(folder / "settings.ini", settings_template())
    write_atomic(folder / ".gitignore", IGNORED_FILES)
    if as_json:
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        print_json({"folder": str(folder.absolute()), "files": files})
        return
    console.print(f"{folder} is ready:")
    for line in (f"cd {folder}", "mlkit run train", f"jupyter lab {first.name}"):
        console.print(f"  [bold]{line}[/]")


@app.command(epilog="Example: mlkit --set runs.root=/archive settings", rich_help_panel="Project")
def settings(as_json: JsonOption = False) -> None:
    """Show every setting, its value and its origin."""
    print_rows(("name", "value", "from", "meaning"), load_settings().rows(), as_json)
