"""`mlkit data` as a process: what it prints, what it writes, and its exit codes."""

import gzip
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from mlkit.cli.data import ReadOptions, read_statistics
from mlkit.data import Statistics, describe, measure_drift, read_table
from mlkit.data.synthetic import retail
from mlkit.errors import InputError
from tests.conftest import ADULT, run_cli

Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three days of visits, a schema, and a database."""
    folder = tmp_path_factory.mktemp("shop")
    visits = retail(rows=6_000)
    days = {"monday": visits[::2], "tuesday": visits[1::2], "friday": retail(rows=3_000, drift=2, dirty=0.02)}
    for name, table in days.items():
        table.write_csv(folder / f"{name}.csv")
    with sqlite3.connect(folder / "shop.db") as database:
        database.execute("create table visits (price real, device text)")
        database.executemany("insert into visits values (?, ?)", visits.select("price", "device").rows())
    result = run_cli("data", "infer", "monday.csv", "--label", "purchased", "--output", "schema.pbtxt", folder=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def data(shop: Path) -> Command:
    """Type a data command in the shop, in a window of 80 characters."""
    return lambda *arguments, **environment: run_cli(
        "data", *arguments, folder=shop, **({"COLUMNS": "80"} | environment)
    )


def test_describe_fits_the_window_and_shows_every_column(data: Command) -> None:
    result = data("describe", "monday.csv")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "monday.csv  3,000 rows, 18 columns"
    shown = {line.split()[0]: line for line in lines[3:] if line and not line.startswith(" ")}
    assert list(shown) == retail(rows=1).columns
    assert re.search(r"number +\d+\.\d% +\d+  16 to \d\d, median \d\d +[▁-█]{10}", shown["age"])
    assert re.search(r"text +- +3  mobile 5\d%, desktop 3\d%,", shown["device"])
    assert "2026-01-01 to 2026-01-30" in shown["day"]


@pytest.mark.parametrize("width", ["40", "80"])
def test_every_table_fits_the_window(data: Command, width: str) -> None:
    for arguments in (("infer", "monday.csv"), ("drift", "monday.csv", "friday.csv")):
        lines = data(*arguments, COLUMNS=width).stdout.splitlines()
        assert max(map(len, [line for line in lines if "rows" not in line])) <= int(width), arguments


def test_describe_by_a_column_shows_its_slices(data: Command) -> None:
    result = data("describe", "monday.csv", "--by", "segment")
    assert "3 slices by segment" in result.stdout
    assert re.search(r"segment=bargain +1,\d\d\d +2026-01-1\d", result.stdout)
    missing = data("describe", "monday.csv", "--by", "segmnet")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "Did you mean 'segment'?" in missing.stderr


def test_json_of_statistics_stands_for_the_rows(data: Command, shop: Path) -> None:
    printed = data("describe", "monday.csv", "--json").stdout
    assert Statistics.from_json(printed).columns["price"].unique == read_table(shop / "monday.csv")["price"].n_unique()
    (shop / "monday.json").write_text(printed)
    from_rows, from_statistics = (
        json.loads(data("drift", name, "friday.csv", "--json").stdout) for name in ("monday.csv", "monday.json")
    )
    assert from_rows == from_statistics
    assert data("validate", "monday.json", "--schema", "schema.pbtxt").returncode == 0
    assert data("describe", "monday.json").stdout.startswith("monday.csv  3,000 rows")
    refused = data("describe", "monday.json", "--by", "day")
    assert (refused.returncode, "holds statistics, not rows" in refused.stderr) == (2, True)
    (shop / "other.json").write_text('{"rows": 3}')
    assert data("describe", "other.json").returncode == 2


def test_pages_need_nothing_else(data: Command, shop: Path) -> None:
    commands = {
        "describe.html": ("describe", "friday.csv"),
        "drift.html": ("drift", "monday.csv", "friday.csv"),
        "validate.html": ("validate", "friday.csv", "--schema", "schema.pbtxt"),
        "time.html": ("drift", "monday.csv", "--by", "returning"),
    }
    for name, arguments in commands.items():
        result = data(*arguments, "--html", name)
        assert f"to open in a browser: {name}" in result.stdout, result.stderr
        page = (shop / name).read_text()
        assert page.lower().startswith("<!doctype html>")
        assert not re.search(r"(src|href)=['\"]?(http|//)|@import|url\(http", page)
    drift = (shop / "drift.html").read_text()
    assert drift.count("data:image/svg+xml") >= 18  # a histogram for each column
    assert "<svg" in drift  # what moved
    assert "data:image/svg+xml" in (shop / "describe.html").read_text()
    silent = data("describe", "friday.csv", "--html", "silent.html", "--json")
    assert json.loads(silent.stdout)["rows"] == 3_000
    assert (shop / "silent.html").exists()


def test_a_page_that_cannot_be_written_is_told(data: Command) -> None:
    result = data("describe", "monday.csv", "--html", "/proc/nowhere/page.html")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr


def test_validate_is_a_gate(data: Command) -> None:
    good, bad = (data("validate", f"{day}.csv", "--schema", "schema.pbtxt") for day in ("tuesday", "friday"))
    assert (good.returncode, good.stderr) == (0, "")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "error  quantity: " in bad.stdout
    assert "quantity', minimum=-1)" in bad.stdout.replace("\n", "")  # what would mend it, in one piece
    matches = json.loads(data("validate", "friday.csv", "--schema", "schema.pbtxt", "--json").stdout)
    assert matches["passed"] is False
    assert {"quantity", "age"} <= {
        anomaly["column"] for anomaly in matches["anomalies"] if anomaly["severity"] == "error"
    }


def test_the_label_is_not_expected_in_serving(data: Command, shop: Path) -> None:
    read_table(shop / "tuesday.csv").drop("purchased").write_csv(shop / "serving.csv")
    output = ("validate", "serving.csv", "--schema", "schema.pbtxt")
    assert data(*output, "--environment", "SERVING").returncode == 0
    assert data(*output, "--environment", "TRAINING").returncode == 1
    unknown = data(*output, "--environment", "SERVIN")
    assert (unknown.returncode, "Did you mean 'SERVING'?" in unknown.stderr) == (2, True)


def test_infer_does_not_wipe_out_corrections(data: Command, shop: Path) -> None:
    folder = shop / "corrected"
    output = ("infer", "monday.csv", "--output", "corrected/schema.pbtxt")
    assert data(*output).returncode == 0
    first = (folder / "schema.pbtxt").read_text()
    (folder / "schema.pbtxt").write_text(first.replace("mobile", "phone"))
    refused = data(*output)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--replace keeps it in corrected/history" in refused.stderr
    assert "phone" in (folder / "schema.pbtxt").read_text()
    assert data(*output, "--replace").returncode == 0
    assert "phone" not in (folder / "schema.pbtxt").read_text()
    assert any("phone" in path.read_text() for path in (folder / "history").iterdir())
    named = data("infer", "monday.csv", "--output", "mine.txt")
    assert (named.returncode, "kept as schema.pbtxt" in named.stderr) == (2, True)


def test_infer_as_json_is_what_tensorflow_metadata_reads(data: Command) -> None:
    from google.protobuf.json_format import ParseDict
    from tensorflow_metadata.proto.v0 import schema_pb2

    printed = json.loads(data("infer", "monday.csv", "--label", "purchased", "--json").stdout)
    schema = ParseDict(printed["schema"], schema_pb2.Schema())
    assert {feature.name for feature in schema.feature} == set(retail(rows=1).columns)
    label = next(feature for feature in schema.feature if feature.name == "purchased")
    assert list(label.not_in_environment) == ["SERVING"]
    wrong = data("infer", "monday.csv", "--label", "purchase")
    assert (wrong.returncode, "Did you mean 'purchased'?" in wrong.stderr) == (2, True)


def test_drift_is_a_gate(data: Command) -> None:
    same, other = data("drift", "monday.csv", "tuesday.csv"), data("drift", "monday.csv", "friday.csv")
    assert (same.returncode, "no column drifted" in same.stdout) == (0, True)
    assert other.returncode == 1
    assert re.search(r"device +drifted +<0.0001 +'mobile' went from 5\d", other.stdout)
    record = json.loads(data("drift", "monday.csv", "friday.csv", "--json").stdout)
    assert {"price", "device", "referrer", "category"} <= set(record["drifted"])
    ignored = data("drift", "monday.csv", "friday.csv", "--ignore", ",".join(record["drifted"]))
    assert ignored.returncode == 0


def test_limits_come_from_the_schema(data: Command, shop: Path) -> None:
    from mlkit.data import load_schema

    folder = shop / "limits"
    folder.mkdir(exist_ok=True)
    wide = {"l_infinity": 0.5}
    schema = load_schema(shop / "schema.pbtxt").change("device", drift=wide).change("referrer", drift=wide)
    schema.save(folder / "schema.pbtxt")
    output = ("drift", "monday.csv", "friday.csv", "--schema", "limits/schema.pbtxt", "--json")
    assert not {"device", "referrer"} & set(json.loads(data(*output).stdout)["drifted"])


def test_drift_over_time_of_one_source(data: Command, shop: Path) -> None:
    retail(rows=30_000, drift=1).write_parquet(shop / "month.parquet")
    result = data("drift", "month.parquet", "--by", "day")
    assert result.returncode == 1
    assert "29 slices, each against the first one" in result.stdout
    assert re.search(r"price +\d+ of 29 +day=2026-01-", result.stdout)
    for wrong in (("drift", "month.parquet"), ("drift", "monday.csv", "friday.csv", "--by", "day")):
        refused = data(*wrong)
        assert (refused.returncode, "Give two sources, or one and --by" in refused.stderr) == (2, True)


def test_statistics_of_different_tables_are_refused(data: Command) -> None:
    result = data("drift", "wine", "monday.csv")
    assert (result.returncode, result.stdout) == (2, "")
    assert "'wine' and 'monday.csv' have no column in common" in result.stderr


@pytest.mark.parametrize("ending", [".csv.gz", ".jsonl", ".tfrecord.gz"])
def test_convert_changes_the_format_and_nothing_else(data: Command, shop: Path, ending: str) -> None:
    result = data("convert", "monday.csv", f"copy{ending}", "--json")
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout)
    assert (output["rows"], output["columns"], output["files"]) == (3_000, 18, [f"copy{ending}"])
    assert output["bytes"] == (shop / f"copy{ending}").stat().st_size
    columns = ["price", "device", "age", "referrer", "hour"]
    before, after = (describe(read_table(shop / name)[columns]) for name in ("monday.csv", f"copy{ending}"))
    assert {column.distance for column in measure_drift(before, after).columns.values()} == {0.0}


def test_convert_in_shards_and_never_over_what_is_there(data: Command, shop: Path) -> None:
    result = data("convert", "monday.csv", "shards/visits.parquet", "--shards", "3")
    assert result.returncode == 0, result.stderr
    assert re.search(r"3,000 rows, 18 columns, \d+\.\d kB: ", result.stdout)
    assert "and 2 more files" in result.stdout
    assert read_table(shop / "shards" / "visits-*.parquet").equals(read_table(shop / "monday.csv"))
    again = data("convert", "tuesday.csv", "shards/visits.parquet", "--shards", "3")
    assert (again.returncode, "--replace overwrites it" in again.stderr) == (2, True)
    assert read_table(shop / "shards" / "visits-*.parquet").equals(read_table(shop / "monday.csv"))
    assert data("convert", "tuesday.csv", "shards/visits.parquet", "--shards", "3", "--replace").returncode == 0
    assert read_table(shop / "shards" / "visits-*.parquet").equals(read_table(shop / "tuesday.csv"))
    strange = data("convert", "monday.csv", "visits.xlsx")
    assert (strange.returncode, ".xlsx" in strange.stderr) == (2, True)
    assert not (shop / "visits.xlsx").exists()


def test_sources_of_all_sorts(data: Command, shop: Path) -> None:
    (shop / "europe.csv").write_bytes("stadt;größe\nZürich;1\nGenf;?\n".encode("latin-1"))
    output = data(
        "describe", "europe.csv", "--encoding", "latin-1", "--separator", ";", "--null-values", "?,NA", "--types",
        "größe=text",
    )  # fmt: skip
    assert re.search(r"größe +text +50.0%", output.stdout), output.stderr
    with gzip.open(shop / "packed.csv.gz", "wt") as packed:
        packed.write("a,b\n1,x\n2,y\n")
    assert data("describe", "packed.csv.gz").stdout.startswith("packed.csv.gz  2 rows")
    assert "6,000 rows" in data("describe", "[mt]*day.csv").stdout
    assert data("describe", "wine").stdout.startswith("wine  178 rows, 14 columns")
    images = data("describe", "digits")
    assert (images.returncode, "holds images" in images.stderr) == (2, True)
    kinds = data("describe", "monday.csv", "--types", "age")
    assert (kinds.returncode, "--types takes COLUMN=TYPE" in kinds.stderr) == (2, True)


def test_a_database_is_asked_by_query_and_its_password_is_not_printed(data: Command, shop: Path) -> None:
    result = data("describe", f"sqlite:///{shop}/shop.db", "--query", "select * from visits where device = 'mobile'")
    assert result.returncode == 0, result.stderr
    assert re.search(r"device +text +- +1  mobile 100%", result.stdout)
    secret = data("describe", "postgresql://me:hunter2@localhost:1/shop", "--query", "select 1")
    assert secret.returncode == 2
    assert "hunter2" not in secret.stdout + secret.stderr
    assert "Traceback" not in secret.stderr


def test_bad_files_are_told_without_a_traceback(data: Command, shop: Path) -> None:
    (shop / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (shop / "empty.csv").write_text("")
    (shop / "bad.pbtxt").write_text("feature { nam: 'x' }")
    for arguments, output in {
        ("describe", "nowhere.csv"): "There is no file",
        ("describe", "ragged.csv"): "Line 3",
        ("describe", "empty.csv"): "is empty",
        ("describe", "winee"): "Did you mean 'wine'?",
        ("validate", "monday.csv", "--schema", "bad.pbtxt"): "no field 'nam'",
        ("drift", "monday.csv", "empty.csv"): "is empty",
        ("convert", "ragged.csv", "x.parquet"): "Line 3",
    }.items():
        result = data(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), (arguments, result.stdout)
        assert output in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_table_of_strange_names_and_values_is_shown_as_it_is(data: Command, shop: Path) -> None:
    pl.DataFrame(
        {"[red]x[/]": ["[bold]y", "z"], "never": [None, None], "same": [1, 1], "far": [1.0, float("inf")]}
    ).write_parquet(shop / "strange.parquet")
    result = data("describe", "strange.parquet")
    assert result.returncode == 0, result.stderr
    assert "[red]x[/]" in result.stdout
    assert "[bold]y 50%" in result.stdout
    assert "1 infinite" in result.stdout
    assert "nan" not in result.stdout.lower()
    assert data("drift", "strange.parquet", "strange.parquet").returncode == 0


def test_a_broken_pipe_is_no_error(shop: Path) -> None:
    command = f"{sys.executable} -m mlkit data describe monday.csv --json | head -c 10"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=shop, capture_output=True, text=True)
    assert result.stderr == ""


def test_commands_import_what_they_need_and_no_more(shop: Path) -> None:
    code = """
import sys
from mlkit.cli.main import main

def told(line, *heavy):
    sys.argv = ["mlkit", "data", *line.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
    print("imported", [name for name in heavy if name in sys.modules])

heavy = ("tensorflow", "keras", "matplotlib", "sklearn", "scipy", "pandas")
told("--help", "numpy", "polars", *heavy)
told("describe monday.csv", *heavy)
told("drift monday.csv tuesday.csv", *heavy)
told("validate tuesday.csv --schema schema.pbtxt", *heavy)
told("convert monday.csv quick.parquet --replace", *heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=shop, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.findall("imported .*", result.stdout) == ["imported []"] * 5


@pytest.mark.skipif(not ADULT.exists(), reason="the Adult data are not here")
def test_real_data(data: Command) -> None:
    result = data("describe", ADULT, "--null-values", "?")
    assert "32,561 rows, 15 columns" in result.stdout
    assert re.search(r"workclass +text +5\.6% +8  Private 7\d%", result.stdout)
    assert describe(read_table(ADULT, null_values=["?"])).rows == 32_561


def test_options_for_reading() -> None:
    options = ReadOptions(null_values="?, NA", types="zip=text")
    assert options.arguments == {"null_values": ["?", "NA"], "types": {"zip": "text"}}
    assert ReadOptions().arguments == {}
    assert ReadOptions(null_values="?").for_source("days.parquet", "a.csv.gz").arguments == {}
    assert ReadOptions(null_values="?").for_source("a.csv", "days.parquet").arguments == {"null_values": ["?"]}
    with pytest.raises(InputError, match="--types takes COLUMN=TYPE"):
        _ = ReadOptions(types="zip").arguments


def test_large_files_are_described_in_batches(tmp_path: Path) -> None:
    visits = retail(rows=4_000)
    visits.write_csv(tmp_path / "visits.csv")
    batches = read_statistics(str(tmp_path / "visits.csv"), ReadOptions(), large=0)
    assert (batches.rows, batches.columns["device"].counts) == (4_000, describe(visits).columns["device"].counts)


def test_the_five_commands_in_a_window_of_80_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlkit: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    visits, later = retail(rows=8_000), retail(rows=4_000, drift=2, dirty=0.01)
    for name, table in {"monday": visits[::2], "tuesday": visits[1::2], "friday": later}.items():
        table.write_csv(f"{name}.csv")
    for line, code in {
        "describe monday.csv --html monday.html": 0,
        "infer monday.csv --label purchased --output schema.pbtxt": 0,
        "validate friday.csv --schema schema.pbtxt --html friday.html": 1,
        "drift monday.csv tuesday.csv": 0,
        "drift monday.csv friday.csv --html drift.html": 1,
        "convert monday.csv monday.parquet": 0,
        "convert wine wine.jsonl.gz --json": 0,
        "describe monda.csv": 2,
        "describe winee": 2,
        "infer monday.csv --output schema.pbtxt": 2,
        "drift monday.csv": 2,
        "validate monday.csv --schema schem.pbtxt": 2,
    }.items():
        assert mlkit("data", *line.split())[0] == code, line
    assert mlkit("data", "convert", "monday.csv", "monday.parquet")[0] == 2  # it exists now
