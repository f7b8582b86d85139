"""Tests of `mlkit.data.cleaning`: every row is accounted for, whatever the steps, also in unusual tables."""

import json
from datetime import date

import numpy as np
import polars as pl
import pytest

from mlkit.data import clean, read_table, write_table
from mlkit.data.cleaning import CleaningResult, load_steps
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError
from tests.conftest import ADULT

CATEGORIES = "books|electronics|fashion|garden|grocery|home|sports|toys"


def check_accounting(table: pl.DataFrame, cleaned: CleaningResult) -> None:
    """Rows in = rows out + rows in quarantine, and the quarantine holds the original rows with their numbers."""
    removed = cleaned.quarantine.filter(_scope="row")
    assert removed["_row"].is_unique().all()
    assert cleaned.table.height + removed.height == table.height
    original = table.with_row_index("_row", offset=1).filter(
        pl.col("_row").is_in(cleaned.quarantine["_row"].unique().implode())
    )
    quarantined = cleaned.quarantine.select("_row", *table.columns).unique("_row").sort("_row")
    assert quarantined.equals(original.cast({"_row": pl.Int64}))
    assert cleaned.quarantine["_reason"].null_count() == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_row_disappears_whatever_the_steps(seed):
    table = retail(rows=4000, dirty=0.3, seed=seed).with_columns(pl.col("price").cast(pl.String))
    all_steps = [
        {"step": "trim"},
        {"step": "match", "column": "category", "pattern": CATEGORIES},
        {"step": "match", "column": "device", "pattern": "desktop|mobile", "otherwise": "value"},
        {"step": "match", "column": "brand", "pattern": "[a-h].*"},
        {"step": "convert", "column": "price", "type": "integer", "otherwise": "row"},
        {"step": "convert", "column": "day", "type": "text"},
        {"step": "missing", "columns": ["quantity", "age"], "values": [-1, 999], "rule": "drop"},
        {"step": "missing", "columns": ["brand"], "rule": "most_frequent"},
        {"step": "deduplicate", "columns": ["user_id"], "keep": "last"},
        {"step": "missing", "rule": "drop"},
    ]
    order = np.random.default_rng(seed).permutation(len(all_steps))[:6]
    cleaned = clean(table, [all_steps[number] for number in order])
    check_accounting(table, cleaned)
    assert cleaned.counts["rows_out"][-1] == cleaned.table.height
    assert cleaned.counts["rows_in"].to_list() == [table.height, *cleaned.counts["rows_out"].to_list()[:-1]]


def test_a_quarantined_value_is_stored_with_its_row():
    table = pl.DataFrame({"id": [1, 2, 3], "mail": ["a@b.c", "nothing", None]})
    cleaned = clean(table, [{"step": "match", "column": "mail", "pattern": ".+@.+", "otherwise": "value"}])
    assert cleaned.table.rows() == [(1, "a@b.c"), (2, None), (3, None)]
    [entry] = cleaned.quarantine.to_dicts()
    assert entry == {
        "_row": 2, "_step": "1 match", "_column": "mail", "_value": "nothing", "_reason": "does not match .+@.+",
        "_scope": "value", "id": 2, "mail": "nothing",
    }  # fmt: skip
    assert cleaned.counts["values_quarantined"].to_list() == [1]


def test_the_record_and_the_quarantine_can_be_written(tmp_path):
    cleaned = clean(retail(rows=500, dirty=0.2), [{"step": "match", "column": "category", "pattern": CATEGORIES}])
    record = json.loads(json.dumps(cleaned.record()))
    assert record["counts"][0]["rows_in"] - record["counts"][0]["rows_out"] == cleaned.quarantine.height > 0
    [file] = write_table(cleaned.quarantine, tmp_path / "quarantine.csv")
    assert read_table(file)["_row"].to_list() == cleaned.quarantine["_row"].to_list()


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (["1,234.5", "12,34", "1,234,567"], {"thousands": ","}, [1234.5, None, 1234567.0]),
        (["1.234,5", "3.14", "-2"], {"thousands": ".", "decimal": ","}, [1234.5, None, -2.0]),
        (["1 234,5", "1 2"], {"thousands": " ", "decimal": ","}, [1234.5, None]),
        (["1'000", "+7", "1e3"], {"thousands": "'"}, [1000.0, 7.0, 1000.0]),
        (["0,5", "0.5", ",5"], {"decimal": ","}, [0.5, None, None]),
        (["NaN", "inf", "--1", "1-"], {"decimal": ","}, [None, None, None, None]),
    ],
)
def test_numbers_with_separators(values, options, expected):
    step = {"step": "convert", "column": "x", "type": "number", **options}
    cleaned = clean(pl.DataFrame({"x": values}), [step])
    assert cleaned.table["x"].to_list() == expected
    assert cleaned.quarantine["_value"].to_list() == [v for v, e in zip(values, expected, strict=True) if e is None]


def test_dates_in_a_declared_format():
    step = {"step": "convert", "column": "x", "type": "date", "format": "%d.%m.%Y"}
    cleaned = clean(pl.DataFrame({"x": ["31.01.2026", "30.02.2026", " 1.2.2026", ""]}), [step])
    assert cleaned.table["x"].cast(pl.String).to_list() == ["2026-01-31", None, "2026-02-01", None]
    assert cleaned.quarantine["_value"].to_list() == ["30.02.2026"]


def test_unusual_tables():
    empty = pl.DataFrame({"x": pl.Series([], dtype=pl.String)})
    steps = [{"step": "trim"}, {"step": "match", "column": "x", "pattern": "a"}, {"step": "deduplicate"}]
    steps += [{"step": "missing", "rule": "drop"}, {"step": "convert", "column": "x", "type": "number"}]
    assert clean(empty, steps).table.shape == (0, 1)
    void = pl.DataFrame({"x": pl.Series([None, None], dtype=pl.String)})
    assert clean(void, steps[:3]).table.height == 1
    wide = pl.DataFrame({f"c{number}": [" a", None] for number in range(5000)})
    cleaned = clean(wide, [{"step": "trim"}, {"step": "missing", "rule": "drop"}])
    assert cleaned.table.row(0)[:2] == ("a", "a")
    assert cleaned.quarantine.height == 1
    long = pl.DataFrame({"x": ["y" * 1_000_000, "y\nz", "y"]})
    assert clean(long, [{"step": "match", "column": "x", "pattern": "y+"}]).table.height == 2


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"step": "dedup"}], "Did you mean 'deduplicate'?"),
        ([{"step": "trim"}, {"step": "match", "column": "x"}], "Step 2: 'match' needs the option 'pattern'"),
        ([{"step": "convert", "column": "x", "type": "integr"}], "Did you mean 'integer'?"),
        ([{"step": "convert", "column": "x", "type": "number", "thousand": ","}], "Did you mean 'thousands'?"),
        ([{"step": "match", "column": "x", "pattern": "["}], "is no regular expression"),
        ([{"step": "trim", "columns": ["n"]}], "holds Int64 and no text"),
        ([{"step": "deduplicate", "columns": ["X"]}], "Did you mean 'x'?"),
        ([{"step": "missing", "rule": "fil"}], "rule"),
        ([{"step": "missing", "columns": ["x"], "rule": "mean"}], "has no mean"),
        (["trim"], "needs 'step'"),
    ],
)
def test_invalid_steps(steps, expected):
    table = pl.DataFrame({"x": ["a", None], "n": [1, 2]})
    with pytest.raises(DatasetError) as caught:
        clean(table, steps)
    assert expected in str(caught.value)
    assert "Step " in str(caught.value)
    assert table.rows() == [("a", 1), (None, 2)]


def test_a_table_with_column_names_of_the_quarantine():
    with pytest.raises(DatasetError, match="_row"):
        clean(pl.DataFrame({"_row": [1]}), [])


def test_a_file_of_steps(tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text("- {step: trim}\n- {step: missing, values: ['?', -1], rule: keep}\n")
    assert load_steps(path) == [{"step": "trim"}, {"step": "missing", "values": ["?", -1], "rule": "keep"}]
    for content, expected in {
        "- {step: trim}\n- {step: mach}": "Step 2.*'match'",
        "a: [": "is not YAML",
        "3": "a list",
    }.items():
        path.write_text(content)
        with pytest.raises(DatasetError, match=expected):
            load_steps(path)


@pytest.mark.skipif(not ADULT.exists(), reason="adult.csv is not here")
def test_adult():
    table = read_table(ADULT)
    steps = [{"step": "trim"}, {"step": "missing", "values": ["?"], "rule": "drop"}, {"step": "deduplicate"}]
    cleaned = clean(table, steps)
    check_accounting(table, cleaned)
    complete = table.filter(~pl.any_horizontal(pl.col(pl.String).str.strip_chars() == "?"))
    assert cleaned.counts["rows_out"].to_list() == [32561, complete.height, complete.unique().height]


def test_a_range_can_be_repeated_from_the_record_of_a_run() -> None:
    table = pl.DataFrame({"day": [date(2026, 1, 1), date(1900, 1, 1)], "x": [1.0, 2.0]})
    steps = [{"step": "range", "column": "day", "minimum": date(2000, 1, 1)}]
    cleaned = clean(table, steps)
    again = clean(table, json.loads(json.dumps(cleaned.record(), default=str))["steps"])
    assert again.table.equals(cleaned.table)
    assert again.quarantine["_value"].to_list() == ["1900-01-01"]
