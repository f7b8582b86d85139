"""The help page of `mlkit` in panels, and suggestions for commands that do not exist."""

from collections import defaultdict
from collections.abc import Iterator

import click
from typer.core import TyperGroup

from mlkit.errors import InputError, did_you_mean

PANELS = ("Project", "Data", "Runs", "Evaluate and export", "Publish", "Serve")  # in the order of a typical workflow


class SummaryGroup(TyperGroup):
    """A command group whose help page shows the whole summary of each command."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """A command by its name; its summary is the first sentence of its help, which is never cut."""
        command = super().get_command(context, name)
        if command is not None:
            command.short_help = summary(command)
        return command


class PanelGroup(SummaryGroup):
    """The top-level command group: commands in panels, and suggestions for commands that do not exist."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of each panel."""
        panels = defaultdict(list)
        for name in self.list_commands(context):
            command = self.get_command(context, name)
            panels[getattr(command, "rich_help_panel", None) or PANELS[0]].append((name, command.short_help))
        for panel in sorted(panels, key=PANELS.index):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; raises InputError that names the command that is probably meant."""
        if arguments and self.get_command(context, arguments[0]) is None and not arguments[0].startswith("-"):
            raise InputError(self._suggestion(context, arguments[0]))
        return super().resolve_command(context, arguments)

    def _suggestion(self, context: click.Context, name: str) -> str:
        from mlkit.jobs.notebook import list_jobs

        if name in list_jobs():
            return f"There is no command '{name}', but a job of that name. Execute it: mlkit run {name}"
        paths = list(command_paths(self, context))
        if same := [path for path in paths if path.split()[-1] == name]:
            return f"There is no command '{name}'. Did you mean: {' or '.join(f'mlkit {path}' for path in same)}?"
        return f"There is no command '{name}'.{did_you_mean(name, paths)} All commands: mlkit --help"


def summary(command: click.Command) -> str:
    """The first sentence of a command's help, which is never cut."""
    return (command.help or "").strip().split("\n")[0].split(". ")[0].rstrip(".")


def command_paths(group: click.Group, context: click.Context) -> Iterator[str]:  # "runs show"
    """Every command as it is typed after `mlkit`."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield name
        if isinstance(command, TyperGroup):
            yield from (f"{name} {path}" for path in command_paths(command, context))
