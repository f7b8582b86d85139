"""`mlkit data`: look at data, write down what it should look like, check it, compare it, and turn it into another format."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mlkit._files import write_atomic
from mlkit.cli.console import JsonOption, console, errors, print_json, text_grid
from mlkit.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from mlkit.data.drift import Drift, DriftOverTime
    from mlkit.data.schema import Schema
    from mlkit.data.statistics import ColumnStatistics, Statistics
    from mlkit.data.validation import Anomalies

data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Describe, check, compare and convert data before a model sees it.",
)
SourceArgument = Annotated[
    str, typer.Argument(help="A file, a pattern in quotes, a URL, a database, or a built-in set such as wine.")
]
PageOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures that needs nothing else.")
]


@dataclass(frozen=True)
class Reading:
    """How the source of a command is read."""

    query: Annotated[str | None, typer.Option(metavar="SQL", help="What to ask a database.")] = None
    null_values: Annotated[
        str | None, typer.Option(metavar="TEXT,...", help="Texts that mean missing, beside the empty one.")
    ] = None
    encoding: Annotated[str, typer.Option(help="Of a CSV file.")] = "utf-8"
    separator: Annotated[str | None, typer.Option(metavar="CHARACTER", help="Between the fields of a CSV file.")] = None
    types: Annotated[
        str | None, typer.Option(metavar="COLUMN=KIND,...", help="Kinds of columns that are not what they look like.")
    ] = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `open_table`, those that differ from its own."""
        given = {"query": self.query, "null_values": _split(self.null_values), "separator": self.separator}
        given |= {"encoding": self.encoding if self.encoding != "utf-8" else None, "types": _kinds(self.types)}
        return {name: value for name, value in given.items() if value}

    def of(self, source: str, other: str | None) -> "Reading":
        """How one of two sources is read: what is said of text is not for a file of another kind than the other's."""
        from mlkit.data.io import is_delimited

        if other is None or is_delimited(source) or not is_delimited(other):
            return self
        return Reading(query=self.query, types=self.types)


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _kinds(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in _split(text)]
    for name, sign, kind in pairs:
        if not (name and sign and kind):
            raise InputError(f"--types takes COLUMN=KIND, for example zip=text,age=number. Received: {text!r}")
    return {name: kind for name, _, kind in pairs}


def with_reading(
    command: Callable,  # takes `reading` as its last argument
) -> Callable:  # takes the options of `Reading` instead
    """Give a command the options by which its sources are read."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "reading"]
    options = list(inspect.signature(Reading).parameters.values())
    names = [option.name for option in options]

    @wraps(command)
    def with_options(**given: Any) -> None:
        reading = Reading(**{name: given.pop(name) for name in names})
        command(**given, reading=reading)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *options)]
    with_options.__signature__ = inspect.Signature(parameters)
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options


def _name(source: str) -> str:
    """What a source is called in a report."""
    from mlkit.data.sql import safe_source

    return Path(source).name if Path(source).exists() else safe_source(source)


_LARGE = 2_000_000_000  # bytes


def _batches(source: str, reading: Reading, large: int) -> "pl.LazyFrame | None":
    """The plan to read large files; None where the source is small, or something else."""
    from mlkit.data.io import find_files, is_splittable, scan_table

    if not is_splittable(source) or "encoding" in reading.options:
        return None
    size = sum(file.stat().st_size for file in find_files(source))
    return scan_table(source, **reading.options) if size > large else None


def read_statistics(
    source: str,  # of rows, or a file with the JSON of statistics
    reading: Reading,
    by: str | None = None,  # also of slices by this column
    large: int = _LARGE,  # bytes; larger files are read in batches
) -> "Statistics":
    """What the columns of a source hold; raises `DatasetError`."""
    from mlkit.data.builtin import open_table
    from mlkit.data.statistics import Statistics, describe

    with errors.status(f"reading {escape(_name(source))} ..."):
        if (text := _saved_statistics(source)) is None:
            table = _batches(source, reading, large)
            table = open_table(source, **reading.options) if table is None else table
            return describe(table, by=by, name=_name(source))
    if by or reading.options:
        raise InputError(f"'{source}' holds statistics, not rows; the options for reading rows do not apply.")
    return Statistics.from_json(text)


def _saved_statistics(source: str) -> str | None:
    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _write_page(page: Path, text: str, as_json: bool) -> None:
    write_atomic(page, text)
    if not as_json:
        console.print(f"\nWith pictures, to open in a browser: [bold]{escape(str(page))}[/]", soft_wrap=True)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(column: "ColumnStatistics") -> str:
    from mlkit.data.statistics import format_value

    if column.is_quantity:
        low, middle, high = (
            format_value(value, column.kind) for value in (column.minimum, column.quantile(0.5), column.maximum)
        )
        infinite = f", {column.infinite:,} infinite" if column.infinite else ""
        return f"{low} to {high}, median {middle}{infinite}" if len(column.quantiles) else infinite.removeprefix(", ")
    shares = [(_text(value), rows / column.known) for value, rows in list(column.counts.items())[:3]]
    return ", ".join(f"{value if len(value) < 17 else value[:15] + '…'} {share:.0%}" for value, share in shares)


def _bars(column: "ColumnStatistics", width: int = 10) -> str:
    from mlkit._display import text_curve

    if column.is_quantity:
        if not column.minimum < column.maximum < float("inf"):
            return ""
        step = column.maximum / width - column.minimum / width
        shares = column.histogram([column.minimum + step * n for n in range(width)] + [column.maximum])
    else:
        shares = list(column.counts.values())[:width]
    return text_curve(shares, 0, max(shares)) if len(shares) else ""


def describe_table(
    statistics: "Statistics",
) -> Table:
    """A line for each column."""
    rows = [
        (
            column.name,
            column.kind,
            f"{column.missing / max(column.rows, 1):.1%}" if column.missing else "-",
            f"{column.unique:,}" if column.unique_exact else f"~{column.unique:,}",
            _values(column),
            _bars(column),
        )
        for column in statistics.columns.values()
    ]
    titles = ("column", "kind", "missing", "unique", "values", "distribution")
    return text_grid(titles, rows, right=titles[2:4], whole=("kind", "missing", "unique", "distribution"))


def slices_table(
    statistics: "Statistics",  # with slices
    width: int,  # of the window, in characters
) -> Table:
    """A line for each slice: its rows, and the mean or the most frequent value of as many columns as fit."""
    slices = list(statistics.slices.values())
    names = list(statistics.columns)[: max(1, (width - 32) // 13)]
    rows = [(part.name, f"{part.rows:,}", *(_middle(part.columns[name]) for name in names)) for part in slices[:50]]
    return text_grid(("slice", "rows", *names), rows, right=("rows",), whole=("rows",))


def _middle(column: "ColumnStatistics") -> str:
    from mlkit.data.statistics import format_value

    if column.is_quantity:
        return format_value(column.mean, column.kind)
    value, rows = next(iter(column.counts.items()), ("", 0))
    return f"{_text(value)[:12]} {rows / max(column.known, 1):.0%}" if rows else ""


@data.command(epilog="Example: mlkit data describe 'logs/*.csv' --null-values '?,NA' --by day --html logs.html")
@with_reading
def describe(
    source: SourceArgument,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Also each slice of rows by this column.")] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
    *,
    reading: Reading,
) -> None:
    """Show what the columns hold. Missing values, different values, limits, distributions."""
    statistics = read_statistics(source, reading, by)
    if as_json:
        typer.echo(statistics.to_json())
    else:
        counted = f"{statistics.rows:,} rows, {len(statistics.columns):,} columns"
        console.print(f"[bold]{escape(statistics.name)}[/]  {counted}\n", soft_wrap=True)
        console.print(describe_table(statistics))
        if statistics.slices:
            console.print(f"\n[dim]{len(statistics.slices):,} slices by {escape(by or '')}[/]\n")
            console.print(slices_table(statistics, console.width))
    if page:
        _write_page(page, statistics.to_html(), as_json)


def _save_schema(schema: "Schema", path: Path, replace: bool, source: str) -> None:
    from mlkit.data.schema import SchemaHistory

    if path.name != "schema.pbtxt":
        raise InputError(f"A schema is kept as schema.pbtxt, next to its history. Received: {path}")
    if path.exists() and not replace:
        raise InputError(f"{path} exists, perhaps corrected by hand. --replace keeps it in {path.parent / 'history'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    SchemaHistory(path.parent).save(schema, f"inferred from {_name(source)}")


def schema_table(
    schema: "Schema",
) -> Table:
    """A line for each column."""
    titles = str(schema).partition("\n")[0].split()
    return text_grid(titles, schema.rows(), whole=("kind", "required"))


@data.command(epilog="Example: mlkit data infer train.csv --label income --output schema/schema.pbtxt")
@with_reading
def infer(
    source: SourceArgument,
    output: Annotated[Path | None, typer.Option(metavar="schema.pbtxt", help="Where to write it.")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="What is not there when a model serves.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a schema; the old one stays in the history.")
    ] = False,
    as_json: JsonOption = False,
    *,
    reading: Reading,
) -> None:
    """Infer a schema from trusted data. It is to be read and corrected."""
    from mlkit.data.schema import infer_schema, schema_to_proto

    schema = infer_schema(read_statistics(source, reading), label=_split(label))
    if output:
        _save_schema(schema, output, replace, source)
    if as_json:
        from google.protobuf.json_format import MessageToDict

        saved = {"path": str(output.absolute())} if output else {}
        print_json(saved | {"schema": MessageToDict(schema_to_proto(schema), preserving_proto_field_name=True)})
        return
    console.print(schema_table(schema))
    if output:
        console.print(f"\nWritten to [bold]{escape(str(output))}[/]. Read it, correct it, then:", soft_wrap=True)
        console.print(f"  [bold]mlkit data validate {escape(source)} --schema {escape(str(output))}[/]", soft_wrap=True)


def _rows_or_statistics(source: str, reading: Reading) -> "pl.DataFrame | Statistics":
    """Rows, which can be shown as examples, unless there are none or too many."""
    path = Path(source)
    if path.suffix == ".json" or (path.is_file() and path.stat().st_size > _LARGE):
        return read_statistics(source, reading)
    from mlkit.data.builtin import open_table

    return open_table(source, **reading.options)


def print_anomalies(
    anomalies: "Anomalies",
) -> None:
    """Print errors first, each with what would mend it."""
    color = "green" if anomalies.passed else "red"
    console.print(f"[{color}]●[/] {escape(anomalies.title)}", soft_wrap=True)
    for anomaly in anomalies:
        color = {"error": "red", "warning": "yellow"}.get(anomaly.severity, "default")
        place = f"[bold]{escape(anomaly.column)}[/]: " if anomaly.column else ""
        console.print(f"\n[{color}]{anomaly.severity}[/]  {place}{escape(anomaly.message)}")
        for line in anomaly.suggestion.splitlines():
            console.print(f"    {line}", style="dim", markup=False, soft_wrap=True)


@data.command(epilog="Example: mlkit data validate today.csv --schema schema.pbtxt --environment SERVING")
@with_reading
def validate(
    source: SourceArgument,
    schema: Annotated[Path, typer.Option(metavar="schema.pbtxt", help="What the data should look like.")],
    environment: Annotated[str | None, typer.Option(help="TRAINING or SERVING: which columns are expected.")] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
    *,
    reading: Reading,
) -> None:
    """Check data against a schema. The exit code is 1 where a rule is broken."""
    from mlkit.data.schema import load_schema
    from mlkit.data.validation import validate as find_anomalies

    expected = load_schema(schema)
    rows = _rows_or_statistics(source, reading)
    anomalies = find_anomalies(rows, expected, environment=environment, name=_name(source))
    if as_json:
        typer.echo(anomalies.to_json())
    else:
        print_anomalies(anomalies)
    if page:
        _write_page(page, anomalies.to_html(), as_json)
    if not anomalies.passed:
        raise typer.Exit(1)


def drift_table(
    drift: "Drift",
) -> Table:
    """The worst column first."""
    from mlkit.data.drift import VERDICT_COLORS, format_p

    colors = VERDICT_COLORS | {"unproven": "yellow", "new": "dim", "not judged": "dim"}
    rows = [
        (c.name, f"[{colors[c.verdict]}]{c.verdict}[/]", format_p(c.p_value), c.reason) for c in drift.columns.values()
    ]
    titles = ("column", "verdict", "p", "why")
    return text_grid(titles, rows, whole=titles[1:3], markup=titles[1:2])


def _steps_table(course: "DriftOverTime") -> Table:
    rows = [(name, f"{len(labels)} of {len(course.steps)}", labels[0]) for name, labels in course.drifted.items()]
    return text_grid(("column", "slices drifted", "first"), rows)


def _limits(schema: Path | None, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Limits of a schema, of the columns that there are."""
    if schema is None:
        return {}
    from mlkit.data.schema import load_schema

    return {name: limits for name, limits in load_schema(schema).thresholds().items() if name in columns}


def _compare(
    reference: str,
    current: str | None,
    by: str | None,
    against: str,
    schema: Path | None,
    ignore: Sequence[str],
    reading: Reading,
) -> "Drift | DriftOverTime":
    from mlkit.data.drift import drift_over_time, measure_drift

    if (current is None) == (by is None):
        raise InputError("Give two sources, or one and --by COLUMN to compare its slices.")
    first = read_statistics(reference, reading.of(reference, current), by)
    if current is None:
        return drift_over_time(first, against=against, thresholds=_limits(schema, first.columns), ignore=ignore)
    second = read_statistics(current, reading.of(current, reference))
    limits = _limits(schema, {**first.columns, **second.columns})
    return measure_drift(first, second, thresholds=limits, ignore=ignore)


@data.command(epilog="Example: mlkit data drift last_week.parquet today.csv --schema schema.pbtxt --html drift.html")
@with_reading
def drift(
    reference: SourceArgument,
    current: Annotated[str | None, typer.Argument(help="What is compared with it; or use --by.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Compare the slices of one source, as by day.")
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="first|previous", help="The slice that others are compared with.")
    ] = "first",
    schema: Annotated[Path | None, typer.Option(metavar="schema.pbtxt", help="Holds limits of columns.")] = None,
    ignore: Annotated[str | None, typer.Option(metavar="COLUMN,...", help="Columns that are left out.")] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
    *,
    reading: Reading,
) -> None:
    """Compare two tables, or one over time. The exit code is 1 where a column has drifted."""
    found = _compare(reference, current, by, against, schema, _split(ignore), reading)
    if as_json:
        typer.echo(found.to_json())
    else:
        console.print(f"[{'green' if found.passed else 'red'}]●[/] {escape(found.summary)}\n", soft_wrap=True)
        console.print(_steps_table(found) if by else drift_table(found))
    if page:
        _write_page(page, found.to_html(), as_json)
    if not found.passed:
        raise typer.Exit(1)


def _format_size(size: int) -> str:
    """Bytes as one says them."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000
    return f"{size:.3g} GB"


def _refuse_existing(target: str, shards: int) -> None:
    path = Path(target)
    packed = path.suffix in (".gz", ".zst")
    ending = "".join(path.suffixes[-2:]) if packed else path.suffix
    number = "" if shards == 1 else r"-\d{5}-of-\d{5}"
    wanted = re.compile(re.escape(path.name.removesuffix(ending)) + number + re.escape(ending))
    there = [file for file in path.parent.glob("*") if wanted.fullmatch(file.name)]
    if there:
        raise InputError(f"{there[0]} exists; --replace overwrites it.")


@data.command(epilog="Example: mlkit data convert train.csv train.tfrecord.gz --shards 8")
@with_reading
def convert(
    source: SourceArgument,
    target: Annotated[str, typer.Argument(help="A name that ends in .csv, .parquet, .jsonl, .arrow or .tfrecord.")],
    shards: Annotated[int, typer.Option(min=1, help="Files that the rows are spread over.")] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite what is there.")] = False,
    as_json: JsonOption = False,
    *,
    reading: Reading,
) -> None:
    """Write a table in another format."""
    from mlkit.data.builtin import open_table
    from mlkit.data.io import write_table

    if not replace:
        _refuse_existing(target, shards)
    with errors.status(f"reading {escape(_name(source))} ..."):
        table = open_table(source, **reading.options)
    with errors.status(f"writing {escape(target)} ..."):
        files = write_table(table, target, shards=shards)
    size = sum(file.stat().st_size for file in files if file.exists())
    if as_json:
        print_json(
            {"files": [str(file) for file in files], "rows": table.height, "columns": table.width, "bytes": size}
        )
        return
    named = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    counted = f"{table.height:,} rows, {table.width} columns, {_format_size(size)}"
    console.print(f"{counted}: [bold]{escape(named)}[/]", soft_wrap=True)
