"""`mlkit jobs list|show` and `mlkit kernels start|status|stop`."""

import os
import time
from typing import Annotated

import typer

from mlkit._display import format_seconds
from mlkit.cli.app import command_group
from mlkit.cli.console import JsonOption, console, print_json, print_rows, working
from mlkit.cli.run import job_schema, print_parameters
from mlkit.config import load_settings
from mlkit.errors import InputError

jobs = command_group("jobs", "Runs", "List job notebooks and their parameters.")
kernels = command_group("kernels", "Runs", "Start and stop the pool of warm kernels.")


@jobs.command("list", epilog="Example: mlkit jobs list")
def list_jobs(as_json: JsonOption = False) -> None:
    """List jobs with their purpose."""
    from mlkit.jobs.notebook import job_summary, list_jobs, read_notebook

    rows = [(name, job_summary(read_notebook(path))) for name, path in list_jobs().items()]
    print_rows(("name", "summary"), rows, as_json)


@jobs.command(epilog="Example: mlkit jobs show train --json")
def show(
    job: Annotated[str, typer.Argument(help="Name of a job, or path of a notebook.")],
    as_json: JsonOption = False,
) -> None:
    """Show the parameters of a job; with --json their JSON Schema."""
    schema = job_schema(job)
    if as_json:
        print_json(schema.model.model_json_schema())
    else:
        print_parameters(schema)


@kernels.command(epilog="Example: mlkit kernels start --idle-timeout 600")
def start(
    idle_timeout: Annotated[int | None, typer.Option(min=1, help="Seconds it stays after its last use.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Import TensorFlow once and fork kernels from then on."""
    from mlkit.jobs.kernels import CAN_FORK, ForkServerClient

    if not CAN_FORK:
        raise InputError("Warm kernels need Linux; jobs run in ordinary kernels here.")
    seconds = idle_timeout or load_settings().kernels.idle_timeout
    server = ForkServerClient.for_environment(os.environ)
    with working("importing TensorFlow"):
        server.hold(seconds).close()
    if as_json:
        print_json(server.request("status"))
    else:
        console.print(f"ready; ends {format_seconds(seconds)} after its last use, or by [bold]mlkit kernels stop[/]")


@kernels.command(epilog="Example: mlkit kernels status --json")
def status(as_json: JsonOption = False) -> None:
    """List the pools of warm kernels."""
    from mlkit.jobs.kernels import running_servers

    servers = running_servers()
    if as_json:
        print_json(servers)
        return
    if not servers:
        console.print("No kernels are warm. Start a pool: mlkit kernels start")
        return
    rows = [
        (
            server["key"],
            str(server["pid"]),
            format_seconds(time.time() - server["started"]),
            str(len(server["kernels"])),
            f"{server['memory'] / 1e6:.0f} MB",
            format_seconds(server["idle_timeout"]) if server["idle_timeout"] else "with its owner",
        )
        for server in servers
    ]
    print_rows(("environment", "process", "age", "kernels", "memory", "idle timeout"), rows)


@kernels.command(epilog="Example: mlkit kernels stop")
def stop(as_json: JsonOption = False) -> None:
    """Stop all pools; kernels that execute a job finish it."""
    from mlkit.jobs.kernels import ForkServerClient, running_servers

    stopped = [ForkServerClient(server["key"]).request("stop") for server in running_servers()]
    if as_json:
        print_json(stopped)
    else:
        console.print(f"Stopped {len(stopped)} pool{'' if len(stopped) == 1 else 's'} of warm kernels.")
