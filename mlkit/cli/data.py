"""`mlkit data`: describe, validate, compare and convert tables."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import filesize
from rich.markup import escape
from rich.table import Table

from mlkit._files import write_atomic
from mlkit.cli.app import command_group
from mlkit.cli.console import (
    DONE,
    FAILED,
    JsonOption,
    console,
    errors,
    parse_pairs,
    print_json,
    print_line,
    split_list,
    text_grid,
)
from mlkit.errors import InputError

if TYPE_CHECKING:
    import polars as pl

    from mlkit.data.drift import Drift, DriftOverTime
    from mlkit.data.schema import Schema
    from mlkit.data.statistics import ColumnStatistics, Statistics
    from mlkit.data.validation import Anomalies

data = command_group("data", "Data", "Describe, validate, compare and convert tables.")
SourceArgument = Annotated[
    str, typer.Argument(help="A file, a pattern in quotes, a URL, a database, or a built-in set such as wine.")
]
PageOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots that needs no network.")
]


@dataclass(frozen=True)
class ReadOptions:
    """Options by which the source of a command is read."""

    query: Annotated[str | None, typer.Option(metavar="SQL", help="Query, for a database.")] = None
    null_values: Annotated[
        str | None, typer.Option(metavar="TEXT,...", help="Texts that mean missing, besides the empty one.")
    ] = None
    encoding: Annotated[str, typer.Option(help="Encoding of a CSV file.")] = "utf-8"
    separator: Annotated[
        str | None, typer.Option(metavar="CHARACTER", help="Separator between the fields of a CSV file.")
    ] = None
    types: Annotated[
        str | None, typer.Option(metavar="COLUMN=TYPE,...", help="Types of columns whose inferred type is wrong.")
    ] = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `open_table`, those that differ from its defaults."""
        types = parse_pairs(split_list(self.types), "--types takes COLUMN=TYPE, for example zip=text,age=number")
        arguments = {"query": self.query, "null_values": split_list(self.null_values), "separator": self.separator}
        arguments |= {"encoding": self.encoding if self.encoding != "utf-8" else None, "types": types}
        return {name: value for name, value in arguments.items() if value}

    def for_source(self, source: str, other: str | None) -> "ReadOptions":
        """Options for one of two sources: those of delimited text do not apply to a source of another format."""
        from mlkit.data.io import is_delimited

        if other is None or is_delimited(source) or not is_delimited(other):
            return self
        return ReadOptions(query=self.query, types=self.types)


def reads_source(
    command: Callable[..., None],  # with a parameter `reading`
) -> Callable[..., None]:
    """Decorator that gives a command the options of ReadOptions, in place of its parameter `reading`."""
    options = inspect.signature(ReadOptions).parameters
    *own, as_json = (p for p in inspect.signature(command).parameters.values() if p.name != "reading")

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        reading = ReadOptions(**{name: arguments.pop(name) for name in options})
        command(**arguments, reading=reading)

    wrapper.__signature__ = inspect.Signature([*own, *options.values(), as_json])
    return wrapper


def _name(source: str) -> str:
    """Name of a source in a report, without credentials."""
    from mlkit.data.sql import redact_source

    return Path(source).name if Path(source).exists() else redact_source(source)


_LARGE = 2_000_000_000  # bytes


def _batches(source: str, reading: ReadOptions, large: int) -> "pl.LazyFrame | None":
    """A lazy scan of large files; None for a small source or another kind of source."""
    from mlkit.data.io import find_files, is_splittable, scan_table

    if not is_splittable(source) or "encoding" in reading.arguments:
        return None
    size = sum(file.stat().st_size for file in find_files(source))
    return scan_table(source, **reading.arguments) if size > large else None


def read_statistics(
    source: str,  # rows, or a JSON file of statistics
    reading: ReadOptions,
    by: str | None = None,  # column for slices
    large: int = _LARGE,  # bytes; larger files are read in batches
) -> "Statistics":
    """Statistics of a source; raises `DatasetError`."""
    from mlkit.data.builtin import open_table
    from mlkit.data.statistics import Statistics, describe

    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        if by or reading.arguments:
            raise InputError(f"'{source}' holds statistics, not rows; the options for reading rows do not apply.")
        return Statistics.from_json(path.read_text(encoding="utf-8", errors="replace"))
    with errors.status(f"reading {escape(_name(source))} ..."):
        table = _batches(source, reading, large)
        table = open_table(source, **reading.arguments) if table is None else table
        return describe(table, by=by, name=_name(source))


def _write_page(page: Path, text: str, as_json: bool) -> None:
    write_atomic(page, text)
    if not as_json:
        console.print(f"\nWith plots, to open in a browser: [bold]{escape(str(page))}[/]", soft_wrap=True)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(column: "ColumnStatistics") -> str:
    from mlkit.data.statistics import format_value

    if column.is_quantity:
        low, middle, high = (
            format_value(value, column.type) for value in (column.minimum, column.quantile(0.5), column.maximum)
        )
        infinite = f", {column.infinite:,} infinite" if column.infinite else ""
        return f"{low} to {high}, median {middle}{infinite}" if len(column.quantiles) else infinite.removeprefix(", ")
    shares = [(_text(value), rows / column.count) for value, rows in list(column.counts.items())[:3]]
    return ", ".join(f"{value if len(value) < 17 else value[:15] + '…'} {share:.0%}" for value, share in shares)


def _bars(column: "ColumnStatistics", width: int = 10) -> str:
    from mlkit._display import text_sparkline

    if column.is_quantity:
        if not column.minimum < column.maximum < float("inf"):
            return ""
        step = column.maximum / width - column.minimum / width
        shares = column.histogram([column.minimum + step * n for n in range(width)] + [column.maximum])
    else:
        shares = list(column.counts.values())[:width]
    return text_sparkline(shares, 0, max(shares)) if len(shares) else ""


def describe_table(
    statistics: "Statistics",
) -> Table:
    """A line for each column."""
    rows = [
        (
            column.name,
            column.type,
            f"{column.missing / max(column.rows, 1):.1%}" if column.missing else "-",
            f"{column.unique:,}" if column.unique_exact else f"~{column.unique:,}",
            _values(column),
            _bars(column),
        )
        for column in statistics.columns.values()
    ]
    titles = ("column", "type", "missing", "unique", "values", "distribution")
    return text_grid(titles, rows, right=titles[2:4], whole=("type", "missing", "unique", "distribution"))


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
        return format_value(column.mean, column.type)
    value, rows = next(iter(column.counts.items()), ("", 0))
    return f"{_text(value)[:12]} {rows / max(column.count, 1):.0%}" if rows else ""


@data.command(epilog="Example: mlkit data describe 'logs/*.csv' --null-values '?,NA' --by day --html logs.html")
@reads_source
def describe(
    source: SourceArgument,
    reading: ReadOptions,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Also describe each slice by this column.")] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe columns: types, missing values, ranges, distributions."""
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
    return text_grid(titles, schema.rows(), whole=("type", "required"))


@data.command(epilog="Example: mlkit data infer train.csv --label income --output schema/schema.pbtxt")
@reads_source
def infer(
    source: SourceArgument,
    reading: ReadOptions,
    output: Annotated[Path | None, typer.Option(metavar="schema.pbtxt", help="File to write.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column that is absent when a model serves.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a schema; the old one stays in the history.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Infer a schema from trusted data, to be corrected by hand."""
    from mlkit.data.schema import infer_schema, schema_to_proto

    schema = infer_schema(read_statistics(source, reading), label=split_list(label))
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


def _rows_or_statistics(source: str, reading: ReadOptions) -> "pl.DataFrame | Statistics":
    """Rows, which can be shown as examples, unless there are none or too many."""
    path = Path(source)
    if path.suffix == ".json" or (path.is_file() and path.stat().st_size > _LARGE):
        return read_statistics(source, reading)
    from mlkit.data.builtin import open_table

    return open_table(source, **reading.arguments)


def print_anomalies(
    anomalies: "Anomalies",
) -> None:
    """Print errors first, each with its suggested fix."""
    print_line(f"{DONE if anomalies.passed else FAILED} {escape(anomalies.title)}")
    for anomaly in anomalies:
        color = {"error": "red", "warning": "yellow"}.get(anomaly.severity, "default")
        place = f"[bold]{escape(anomaly.column)}[/]: " if anomaly.column else ""
        console.print(f"\n[{color}]{anomaly.severity}[/]  {place}{escape(anomaly.message)}")
        for line in anomaly.suggestion.splitlines():
            console.print(f"    {line}", style="dim", markup=False, soft_wrap=True)


@data.command(epilog="Example: mlkit data validate today.csv --schema schema.pbtxt --environment SERVING")
@reads_source
def validate(
    source: SourceArgument,
    reading: ReadOptions,
    schema: Annotated[Path, typer.Option(metavar="schema.pbtxt", help="Expected schema.")],
    environment: Annotated[
        str | None, typer.Option(help="TRAINING or SERVING, which decides the expected columns.")
    ] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Validate data against a schema; exit code 1 for errors."""
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
    from mlkit.data.drift import RESULT_COLORS, format_p

    colors = RESULT_COLORS | {"not significant": "yellow", "new": "dim", "not tested": "dim"}
    rows = [
        (c.name, f"[{colors[c.result]}]{c.result}[/]", format_p(c.p_value), c.reason) for c in drift.columns.values()
    ]
    titles = ("column", "result", "p", "reason")
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
    reading: ReadOptions,
) -> "Drift | DriftOverTime":
    from mlkit.data.drift import drift_over_time, measure_drift

    if (current is None) == (by is None):
        raise InputError("Give two sources, or one and --by COLUMN to compare its slices.")
    first = read_statistics(reference, reading.for_source(reference, current), by)
    if current is None:
        return drift_over_time(first, against=against, thresholds=_limits(schema, first.columns), ignore=ignore)
    second = read_statistics(current, reading.for_source(current, reference))
    limits = _limits(schema, {**first.columns, **second.columns})
    return measure_drift(first, second, thresholds=limits, ignore=ignore)


@data.command(epilog="Example: mlkit data drift last_week.parquet today.csv --schema schema.pbtxt --html drift.html")
@reads_source
def drift(
    reference: SourceArgument,
    reading: ReadOptions,
    current: Annotated[str | None, typer.Argument(help="Table to compare with it; or use --by.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Compare the slices of one source, for example days.")
    ] = None,
    against: Annotated[str, typer.Option(metavar="first|previous", help="Slice to compare the others with.")] = "first",
    schema: Annotated[Path | None, typer.Option(metavar="schema.pbtxt", help="Schema with drift thresholds.")] = None,
    ignore: Annotated[str | None, typer.Option(metavar="COLUMN,...", help="Columns to leave out.")] = None,
    page: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure drift between tables or over time; exit code 1 for drift."""
    result = _compare(reference, current, by, against, schema, split_list(ignore), reading)
    if as_json:
        typer.echo(result.to_json())
    else:
        print_line(f"{DONE if result.passed else FAILED} {escape(result.summary)}\n")
        console.print(_steps_table(result) if by else drift_table(result))
    if page:
        _write_page(page, result.to_html(), as_json)
    if not result.passed:
        raise typer.Exit(1)


def _refuse_existing(target: str, shards: int) -> None:
    path = Path(target)
    packed = path.suffix in (".gz", ".zst")
    ending = "".join(path.suffixes[-2:]) if packed else path.suffix
    number = "" if shards == 1 else r"-\d{5}-of-\d{5}"
    pattern = re.compile(re.escape(path.name.removesuffix(ending)) + number + re.escape(ending))
    if existing := [file for file in path.parent.glob("*") if pattern.fullmatch(file.name)]:
        raise InputError(f"{existing[0]} exists; --replace overwrites it.")


@data.command(epilog="Example: mlkit data convert train.csv train.tfrecord.gz --shards 8")
@reads_source
def convert(
    source: SourceArgument,
    reading: ReadOptions,
    target: Annotated[str, typer.Argument(help="A name that ends in .csv, .parquet, .jsonl, .arrow or .tfrecord.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of files.")] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a table to another format."""
    from mlkit.data.builtin import open_table
    from mlkit.data.io import write_table

    if not replace:
        _refuse_existing(target, shards)
    with errors.status(f"reading {escape(_name(source))} ..."):
        table = open_table(source, **reading.arguments)
    with errors.status(f"writing {escape(target)} ..."):
        files = write_table(table, target, shards=shards)
    size = sum(file.stat().st_size for file in files if file.exists())
    if as_json:
        print_json(
            {"files": [str(file) for file in files], "rows": table.height, "columns": table.width, "bytes": size}
        )
        return
    named = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    counted = f"{table.height:,} rows, {table.width} columns, {filesize.decimal(size)}"
    console.print(f"{counted}: [bold]{escape(named)}[/]", soft_wrap=True)
