"""Data against a schema: real data, bad data, and the job that stops before a model is built on them."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import Schema, Statistics, describe, infer_schema, read_table, validate
from mlkit.data.schema import ColumnSchema, parse_schema, schema_text
from mlkit.data.synthetic import retail
from mlkit.data.validation import conform
from mlkit.errors import DatasetError, DataValidationError
from tests.conftest import ADULT, run_cli

needs_adult = pytest.mark.skipif(not ADULT.is_file(), reason="the Adult data are not here")


def count_anomalies(data: pl.DataFrame | Statistics, schema: Schema, **options: str) -> dict[tuple[str, str], int]:
    """(column, rule) -> rows."""
    return {(anomaly.column, anomaly.rule): anomaly.count for anomaly in validate(data, schema, **options)}


@pytest.fixture(scope="module")
def adult() -> pl.DataFrame:
    return read_table(ADULT, null_values=["?"])


@needs_adult
def test_adult_fits_the_schema_that_was_inferred_from_it(adult: pl.DataFrame) -> None:
    schema = parse_schema(schema_text(infer_schema(describe(adult), label="income")))
    assert count_anomalies(adult, schema) == {}
    assert count_anomalies(adult.drop("income"), schema, environment="SERVING") == {}
    assert count_anomalies(adult.drop("income"), schema) == {("income", "absent"): 0}
    assert (len(schema["native-country"].domain), schema["age"].minimum) == (41, 0)
    half = infer_schema(describe(adult.head(16_000)), label="income")
    assert validate(adult.tail(16_561), half).passed  # what was not in the first half is no error


@needs_adult
def test_changes_of_the_adult_data_are_found(adult: pl.DataFrame) -> None:
    schema = infer_schema(describe(adult), label="income")
    row = pl.int_range(pl.len())
    corrupted = adult.with_columns(
        pl.when(row < 40).then(-1).otherwise("age").alias("age"),
        pl.when(row < 900).then(pl.lit("Femal")).otherwise("sex").alias("sex"),
        pl.when(row >= 20_000).then("workclass").alias("workclass"),
        pl.lit("x").alias("surprise"),
        pl.lit(40).alias("hours-per-week"),
    ).drop("race")
    assert count_anomalies(corrupted, schema) == {
        ("race", "absent"): 0,
        ("age", "range"): 40,
        ("sex", "domain"): 900,
        ("workclass", "presence"): corrupted["workclass"].null_count(),
        ("surprise", "unexpected"): 0,
        ("hours-per-week", "distinct"): adult.height,
    }
    anomalies = {anomaly.column: anomaly for anomaly in validate(corrupted, schema)}
    assert "meant 'Female'?" in anomalies["sex"].message
    assert anomalies["age"].examples["row"].to_list() == [1, 2, 3, 4, 5]
    assert [anomaly.column for anomaly in validate(corrupted, schema).warnings] == ["surprise", "hours-per-week"]
    with pytest.raises(DataValidationError, match="'race': the column is missing"):
        validate(corrupted, schema).check()


def test_six_kinds_of_corruption_are_found_as_far_as_rules_can() -> None:
    schema = infer_schema(describe(retail(rows=50_000)))
    clean, dirty = retail(rows=50_000), retail(rows=50_000, dirty=0.02)  # the same shop
    assert count_anomalies(clean, schema) == {}
    changed = {name: int((clean[name].ne_missing(dirty[name])).sum()) for name in clean.columns}
    seen = {column: rows for (column, _), rows in count_anomalies(dirty, schema).items()}
    for column in ("quantity", "category", "discount", "age"):
        hidden = {"category": 0.3}.get(column, 0)  # swapping equal letters changes nothing
        assert changed[column] * (1 - hidden) <= seen[column] <= changed[column], column
    assert 100 < seen["device"] == changed["device"]
    assert 0.5 * changed["price"] < seen["price"] <= changed["price"]


def random_table(seed: int) -> pl.DataFrame:
    chance = np.random.default_rng(seed)
    rows = int(chance.integers(1, 400))
    columns = {
        "number": chance.normal(0, 10, rows).round(1),
        "text": chance.choice(["a", "b", "c ", "", "dd"], rows),
        "integer": chance.integers(-5, 12, rows),
        "day": (np.datetime64("2026-01-01") + chance.integers(-400, 400, rows)).astype("datetime64[D]"),
        "flag": chance.random(rows) < 0.5,
        "moment": np.datetime64("2026-01-01T00:00:00.000000") + chance.integers(-(10**13), 10**13, rows),
    }
    columns["number"][chance.random(rows) < 0.1] = chance.choice([np.nan, np.inf, -np.inf])
    table = pl.DataFrame(columns)
    hidden = [pl.when(pl.Series(chance.random(rows) > 0.1)).then(pl.col(name)).alias(name) for name in columns]
    return table.with_columns(hidden)


RULES = """
feature { name: "number" type: FLOAT presence { min_fraction: 0.9 }
          float_domain { min: -9.5 max: 9.5 disallow_inf: true } annotation { tag: "mlkit.unique=true" } }
feature { name: "text" type: BYTES presence { min_fraction: 0.8 } string_domain { value: "a" value: "b" value: "c" } }
feature { name: "integer" type: INT int_domain { min: -2 } annotation { tag: "mlkit.domain=[0, 1, 2, 3]" } }
feature { name: "day" type: BYTES time_domain { string_format: "%Y-%m-%d" }
          annotation { tag: "mlkit.minimum=2025-12-24" tag: "mlkit.maximum=2026-06-30" } }
feature { name: "moment" type: BYTES time_domain { string_format: "%Y-%m-%dT%H:%M:%S" }
          annotation { tag: "mlkit.maximum=2026-03-01" } }
feature { name: "flag" type: INT presence { min_fraction: 0.95 } bool_domain {}
          annotation { tag: "mlkit.distinct=[2, null]" } }
"""


def plain_count(table: pl.DataFrame) -> dict[tuple[str, str], int]:
    """The same rules, written down once more in plain Python."""
    days = [day for day in table["day"] if day is not None]
    numbers = [x for x in table["number"] if x is not None and x == x]
    finite = [x for x in numbers if np.isfinite(x)]
    counts = {
        ("number", "presence"): table.height - len(numbers) if len(numbers) < 0.9 * table.height else 0,
        ("number", "finite"): len(numbers) - len(finite),
        ("number", "range"): sum(not -9.5 <= x <= 9.5 for x in finite),
        ("number", "unique"): sum(numbers.count(x) > 1 for x in numbers),
        ("text", "domain"): sum(x not in (None, "", "a", "b", "c") for x in table["text"]),
        ("integer", "range"): sum(x is not None and x < -2 for x in table["integer"]),
        ("integer", "domain"): sum(x is not None and x >= -2 and x not in (0, 1, 2, 3) for x in table["integer"]),
        ("day", "range"): sum(not "2025-12-24" <= str(day) <= "2026-06-30" for day in days),
        ("moment", "range"): sum(x is not None and str(x)[:10] > "2026-03-01" for x in table["moment"]),
    }
    texts = sum(x in (None, "") for x in table["text"])
    counts["text", "presence"] = texts if table.height - texts < 0.8 * table.height else 0
    flags = [x for x in table["flag"] if x is not None]
    counts["flag", "presence"] = table.height - len(flags) if len(flags) < 0.95 * table.height else 0
    counts["flag", "distinct"] = len(flags) if len(set(flags)) == 1 else 0
    return {key: count for key, count in counts.items() if count}


@pytest.mark.parametrize("seed", range(40))
def test_tables_and_statistics_agree_with_plain_python(seed: int) -> None:
    table, schema = random_table(seed), parse_schema(RULES)
    assert count_anomalies(table, schema) == plain_count(table)
    assert count_anomalies(describe(table), schema) == plain_count(table)
    halves = describe(table.head(50)).merge(describe(table[50:])) if table.height > 50 else describe(table)
    assert count_anomalies(Statistics.from_json(halves.to_json()), schema) == plain_count(table)


def test_mixed_types_in_a_column_are_named_by_value(tmp_path: Path) -> None:
    rows = ["price,day", "1.5,2026-01-01", "2,2026-02-30", '"1,234.50",x', "free,2026-01-02", ",", "7,"]
    (tmp_path / "mixed.csv").write_text("\n".join(rows))
    schema = Schema({"price": ColumnSchema("price", "number"), "day": ColumnSchema("day", "date")})
    table = conform(read_table(tmp_path / "mixed.csv"), schema)
    anomalies = validate(table, schema)
    assert {(anomaly.column, anomaly.rule): anomaly.count for anomaly in anomalies} == {
        ("price", "type"): 2,
        ("day", "type"): 2,
    }
    assert "'1,234.50' (1 row)" in anomalies[0].message
    assert "'free' (1 row)" in anomalies[0].message
    assert anomalies[1].examples["day"].to_list() == ["2026-02-30", "x"]
    assert count_anomalies(describe(table), schema) == count_anomalies(table, schema)


def test_statistics_of_other_columns() -> None:
    schema = infer_schema(describe(retail(rows=2_000)))
    anomalies = validate(describe(pl.DataFrame({"x": [1.0]})), schema)
    assert len(anomalies) == 1
    assert "has none of the 18 columns of the schema" in anomalies[0].message


def test_an_empty_table() -> None:
    schema = infer_schema(describe(retail(rows=2_000)))
    for data in (retail(rows=1).clear(), describe(retail(rows=1).clear()), pl.DataFrame()):
        assert ("", "rows") in count_anomalies(data, schema)
    with pytest.raises(DataValidationError, match="0 rows, at least 1 expected"):
        validate(retail(rows=1).clear(), schema).check()
    assert count_anomalies(pl.DataFrame({"x": [1]}), Schema({})) == {("x", "unexpected"): 0}


@pytest.mark.parametrize("nothing", [pl.Series([None] * 5), pl.Series([""] * 5), pl.Series([float("nan")] * 5)])
def test_a_column_in_which_everything_is_missing(nothing: pl.Series) -> None:
    table = pl.DataFrame({"x": nothing})
    assert count_anomalies(table, infer_schema(describe(table))) == {}
    full = infer_schema(describe(pl.DataFrame({"x": [1, 2, 3, 4, 5]})))
    assert count_anomalies(table, full) == count_anomalies(describe(table), full) == {("x", "presence"): 5}
    assert conform(table, full)["x"].null_count() in (0, 5)


def test_five_thousand_columns() -> None:
    table = pl.DataFrame({f"c{n}": [n, n + 1, None] for n in range(5_000)})
    schema = infer_schema(describe(table))
    assert count_anomalies(table, schema) == {}
    negative = validate(table.select(-pl.all()), schema)
    assert len(negative.errors) == 5_000
    assert len(str(negative).splitlines()) < 200
    with pytest.raises(DataValidationError) as error:
        negative.check()
    assert len(str(error.value).splitlines()) == 12
    other = validate(pl.DataFrame({"a": [1], "b": [2]}), schema)
    assert len(other) == 1
    assert len(other[0].message) < 300
    assert "5,000" in other[0].message


ODD_NAMES = ["", "*", 'qu"ote', "new\nline", "naïve Größe", "a.b", "'", "名前", "<script>", "row", "^x.*$"]


def test_odd_column_names() -> None:
    table = pl.DataFrame({name: [1, 2, -3] for name in ODD_NAMES})
    schema = Schema({name: ColumnSchema(name, "integer", minimum=0, unique=True) for name in ODD_NAMES})
    anomalies = validate(table, schema)
    assert count_anomalies(table, schema) == {(name, "range"): 1 for name in ODD_NAMES}
    assert "<script>" not in anomalies.to_html()
    assert "row number" in anomalies[0].examples.columns
    json.loads(anomalies.to_json())
    assert conform(table, schema).equals(table)


def test_columns_of_every_type_are_validated() -> None:
    table = pl.DataFrame(
        {
            "decimal": pl.Series(["1.5", "2.5"]).cast(pl.Decimal(9, 2)),
            "category": pl.Series(["a", "b"], dtype=pl.Categorical),
            "small": pl.Series([1, 2], dtype=pl.Int8),
            "large": pl.Series([2**63, 5], dtype=pl.UInt64),
            "zoned": pl.Series(["2026-01-01T10:00:00+02:00", None]).str.to_datetime(),
            "bytes": [b"\x00", b"\xff"],
            "struct": [{"a": 1}, {"a": 2}],
            "object": pl.Series([object(), object()], dtype=pl.Object),
            "list": [["a"], []],
            "duration": pl.Series([1, 2], dtype=pl.Duration),
            "clock": pl.Series([1, 2], dtype=pl.Time),
            "float": pl.Series([1.0, float("inf")], dtype=pl.Float32),
        }
    )
    schema = infer_schema(describe(table))
    assert count_anomalies(table, schema) == {}
    assert conform(table, schema).drop("object").equals(table.drop("object"))
    wrong = Schema({name: ColumnSchema(name, "date", required=1) for name in table.columns})
    rules = {rule for _, rule in count_anomalies(table, wrong)}
    assert rules == {"type", "presence"}
    assert {name for name, rule in count_anomalies(table, wrong) if rule == "type"} == set(table.columns)
    small = Schema({name: ColumnSchema(name, "integer", minimum=0, maximum=1, domain=(1,)) for name in table.columns})
    for schema in (wrong, small):
        anomalies = validate(table, schema)
        assert len(json.loads(anomalies.to_json())["anomalies"]) == len(anomalies)
        assert anomalies.to_html().count("<details>") == sum(anomaly.count > 0 for anomaly in anomalies)


def test_validation_leaves_the_table_alone() -> None:
    table = retail(rows=1_000, dirty=0.1)
    before, schema = table.clone(), infer_schema(describe(retail(rows=1_000)))
    validate(table, schema)
    conform(table, schema)
    assert table.equals(before)


def test_a_lazy_table_is_an_error() -> None:
    with pytest.raises(DatasetError, match="describe"):
        validate(retail(rows=10).lazy(), Schema({}))  # type: ignore[arg-type]


def test_what_is_found_does_not_depend_on_the_order_of_rows() -> None:
    schema = infer_schema(describe(retail(rows=5_000)))
    dirty = retail(rows=5_000, dirty=0.05)
    order = list(range(dirty.height))
    random.Random(3).shuffle(order)
    assert count_anomalies(dirty[order], schema) == count_anomalies(dirty, schema)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a schema and two files, one of them dirty."""
    folder = tmp_path_factory.mktemp("shop")
    infer_schema(describe(retail(rows=4_000)), label=["clicked", "purchased"]).save(folder / "schema.pbtxt")
    retail(rows=4_000).write_csv(folder / "clean.csv")
    retail(rows=4_000, dirty=0.02, drift=1.0).write_parquet(folder / "dirty.parquet")
    return folder


@pytest.mark.slow
def test_the_job_passes_clean_data(shop: Path) -> None:
    parameters = ("-p", "dataset=clean.csv", "-p", "schema=schema.pbtxt")
    result = run_cli("run", "validate", *parameters, "--json", folder=shop)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    run = Path(record["folder"])
    assert record["metrics"] == {"rows": 4_000, "errors": 0, "warnings": 0}
    assert record["data"][0]["fingerprint"]
    assert parse_schema((run / "schema.pbtxt").read_text()) == parse_schema((shop / "schema.pbtxt").read_text())
    assert Statistics.from_json((run / "statistics.json").read_text()).rows == 4_000
    assert json.loads((run / "anomalies.json").read_text())["passed"] is True


@pytest.mark.slow
def test_the_job_fails_on_dirty_data_and_stores_its_anomalies(shop: Path) -> None:
    earlier = run_cli("run", "validate", "-p", "dataset=clean.csv", "--json", folder=shop)
    reference = json.loads(earlier.stdout)["id"]
    arguments = ["dataset=dirty.parquet", "schema=schema.pbtxt", f"reference={reference}"]
    result = run_cli("run", "validate", *[part for argument in arguments for part in ("-p", argument)], folder=shop)
    assert result.returncode == 1
    assert "DataValidationError" in result.stderr
    assert "'quantity'" in result.stderr
    run = max((shop / "runs").glob("*-validate-*"), key=lambda path: path.stat().st_mtime)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["failure"]["error"]) == ("failed", "DataValidationError")
    assert record["metrics"]["errors"] >= 3
    assert record["metrics"]["drifted"] >= 1
    anomalies = json.loads((run / "anomalies.json").read_text())["anomalies"]
    quantity = next(anomaly for anomaly in anomalies if anomaly["column"] == "quantity")
    assert quantity["examples"][0]["quantity"] == -1
    artifacts = {artifact["path"] for artifact in record["artifacts"]}
    assert {"notebook.ipynb", "notebook.html", "statistics.json", "schema.pbtxt", "anomalies.json"} <= artifacts
