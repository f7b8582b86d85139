"""The help page of `mlkit`: panels, whole summaries, examples, and suggestions for commands that do not exist."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import typer
from typer.core import TyperGroup

from mlkit.cli.group import PANELS, command_paths, summary
from mlkit.cli.main import app
from tests.conftest import REPOSITORY, run_cli

ROOT = typer.main.get_command(app)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that it is typed with."""
    for path in command_paths(ROOT, click.Context(ROOT)):
        command = ROOT
        for word in path.split():
            command = command.commands[word]
        yield path, command


COMMANDS = dict(commands())


def test_the_first_page_has_panels_whole_summaries_and_the_typical_workflow(project: Path) -> None:
    text = run_cli("--help", folder=project, COLUMNS="80").stdout
    positions = [text.index(f"\n{panel}:") for panel in PANELS]
    assert positions == sorted(positions)
    assert "..." not in text[positions[0] :]  # nothing is cut
    assert len(ROOT.commands) <= 26
    for name, command in ROOT.commands.items():
        lines = [line for line in text.splitlines() if line.split()[:1] == [name] and line.startswith("  ")]
        assert any(summary(command) in line for line in lines), f"{name} does not stand on one line of 80 characters"
    workflow = text[text.index("From a table to a served model") :].splitlines()
    assert [line.split()[1] for line in workflow[1:7]] == ["new", "run", "gate", "register", "promote", "serve"]


def test_the_first_page_imports_nothing_heavy(project: Path) -> None:
    code = """import sys
sys.argv = ["mlkit", "--help"]
from mlkit.cli.main import main
try:
    main()
finally:
    print([name for name in ("tensorflow", "numpy", "polars", "jupyter_client", "nbformat") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stdout[-300:]


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_a_summary_and_an_example(path: str) -> None:
    command = COMMANDS[path]
    assert command.help
    assert len(summary(command)) <= 66, "cut or folded at 80 columns"
    if isinstance(command, TyperGroup):
        names = [f"{path} {name}" for name in command.commands]
        assert all(len(summary(COMMANDS[name])) + max(map(len, command.commands)) <= 74 for name in names)
    else:
        assert f"Example: mlkit {path}" in (command.epilog or "").replace("mlkit --set runs.root=/archive ", "mlkit ")


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_page_is_printed(path: str, mlkit: Callable) -> None:
    code, output, _ = mlkit(*path.split(), "--help")
    assert code == 0
    assert "Usage:" in output


@pytest.mark.parametrize(
    ("typed", "suggestion"),
    [
        ("train", "Execute it: mlkit run train"),
        ("tune", "Execute it: mlkit run tune"),
        ("show", "Did you mean: mlkit runs show or mlkit jobs show?"),
        ("diff", "Did you mean: mlkit runs diff?"),
        ("traffic", "Did you mean: mlkit models traffic?"),
        ("regster", "Did you mean 'register'?"),
        ("frobnicate", "All commands: mlkit --help"),
    ],
)
def test_a_command_that_does_not_exist_is_answered_with_the_one_that_is_meant(
    typed: str, suggestion: str, mlkit: Callable
) -> None:
    code, _, message = mlkit(typed)
    assert code == 2
    assert suggestion in message


def test_the_reference_page_lists_every_command_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "commands.md"
    command = [
        Path(sys.executable).parent / "typer",
        "mlkit.cli.main",
        "utils",
        "docs",
        "--name",
        "mlkit",
        "--output",
        page,
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    assert page.read_text() == (REPOSITORY / "docs" / "commands.md").read_text(), "run `make docs`"
    assert all(f"`mlkit {path}`" in page.read_text() for path in COMMANDS)
