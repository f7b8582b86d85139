"""Statistics: merging of shards, tables larger than memory, unusual input, statistics from TFDV."""

import base64
import json
import math
import os
import subprocess
import sys
from datetime import date, datetime, time, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from tensorflow_metadata.proto.v0 import statistics_pb2

from mlkit.data import Statistics, describe
from mlkit.data.statistics import ColumnStatistics, merge_statistics
from mlkit.data.statistics_proto import statistics_from_proto, statistics_to_proto
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError
from tests.conftest import ADULT


def random_table(seed: int, rows: int) -> pl.DataFrame:
    """Columns of every type, with missing and non-finite values."""
    generator = np.random.default_rng(seed)
    gaps = generator.random((12, rows)) < generator.choice([0, 0.01, 0.4], (12, 1))
    numbers = generator.lognormal(1, 2, rows)
    numbers[generator.integers(0, rows, 5)] = [math.nan, math.inf, -math.inf, 0.0, -0.0]
    days = generator.integers(0, 4000, rows)
    columns = {
        "number": numbers,
        "rounded": generator.normal(0, 30, rows).round(),
        "half zero": generator.choice([-50.0, 0.0, 0.0, 50.0], rows) * generator.normal(1, 0.02, rows),
        "integer": generator.integers(-(2**62), 2**62, rows),
        "small": generator.integers(-3, 4, rows).astype(np.int8),
        "boolean": generator.random(rows) < 0.2,
        "text": generator.choice(["red", "green", "blue", "grün", ""], rows),
        "name": [f"n{number}" for number in generator.integers(0, 30_000, rows)],
        "long": ["x" * length for length in generator.choice([3, 50, 250], rows)],
        "date": pl.Series(days, dtype=pl.Int32).cast(pl.Date),
        "moment": pl.Series(generator.integers(0, 2**50, rows)).cast(pl.Datetime("us", "Europe/Zurich")),
        "lists": pl.Series([[int(day) % 3] for day in days]),
    }
    table = pl.DataFrame(columns)
    return table.with_columns(
        pl.when(pl.Series(~gap)).then(pl.col(name)).alias(name) for name, gap in zip(columns, gaps, strict=True)
    )


def make_shards(table: pl.DataFrame, generator: np.random.Generator) -> list[pl.DataFrame]:
    """Shards of random sizes, one of them without rows."""
    places = sorted([0, *generator.integers(0, table.height, 4), table.height])
    return [table[start:end] for start, end in pairwise(places)] + [table[:0]]


def largest_error(column: ColumnStatistics, values: np.ndarray) -> float:
    """Largest error of the cumulative distribution, at the values and between them."""
    rising = np.sort(values)
    points = np.concatenate([rising[:: max(len(rising) // 2000, 1)], np.linspace(rising[0], rising[-1], 500)])
    truth = np.searchsorted(rising, points, side="right") / len(rising)
    return float(np.abs(column.cumulative(points) - truth).max())


def numbers_of(column: pl.Series) -> np.ndarray:
    """Finite values in the units of the statistics."""
    physical = column.drop_nulls().to_physical().cast(pl.Float64).to_numpy()
    physical = physical / 86_400_000_000 if column.dtype == pl.Datetime else physical
    return physical[np.isfinite(physical)]


@pytest.mark.parametrize("seed", range(8))
def test_merged_statistics_of_shards_are_those_of_the_table(seed: int) -> None:
    generator = np.random.default_rng(seed)
    table = random_table(seed, int(generator.integers(200, 40_000)))
    parts = make_shards(table, generator)
    whole, merged = describe(table), merge_statistics(describe(part) for part in parts)
    assert (merged.rows, list(merged.columns)) == (whole.rows, list(whole.columns))
    for name, truth in whole.columns.items():
        column = merged.columns[name]
        for exact in ("type", "rows", "missing", "zeros", "infinite", "shortest", "longest"):
            assert getattr(column, exact) == getattr(truth, exact), name
        for number in ("mean", "std", "minimum", "maximum", "mean_length"):
            np.testing.assert_allclose(getattr(column, number), getattr(truth, number), rtol=1e-9, err_msg=name)
        if column.unique_exact:
            assert column.unique == truth.unique, name
        elif column.type != "other":
            assert column.unique == pytest.approx(truth.unique, rel=0.09), name  # four standard errors
        if truth.complete:
            assert list(column.counts.items()) == list(truth.counts.items()), name
            np.testing.assert_array_equal(column.quantiles, truth.quantiles, err_msg=name)
        elif truth.is_numeric:
            values = numbers_of(table[name])
            assert largest_error(truth, values) < 0.001 + 2 / len(values), name
            assert largest_error(column, values) < 0.002 + 2 * len(parts) / len(values), name


def test_repeated_merging_stays_within_its_bound() -> None:
    values = np.sort(np.random.default_rng(0).lognormal(0, 2, 64_000))  # each part has a range of its own
    parts = [describe(pl.DataFrame({"x": part})) for part in np.split(values, 64)]
    rounds = 0
    while len(parts) > 1:
        parts = [merge_statistics(parts[start : start + 2]) for start in range(0, len(parts), 2)]
        rounds += 1
    assert rounds == 6
    assert largest_error(parts[0].columns["x"], values) < 0.001 * (1 + rounds) + 2 * 64 / 64_000


def test_merging_is_the_same_in_any_order() -> None:
    parts = [describe(part) for part in make_shards(random_table(3, 20_000), np.random.default_rng(1))]
    forward, backward = merge_statistics(parts), merge_statistics(parts[::-1])
    for name, column in forward.columns.items():
        assert column.unique == backward.columns[name].unique
        assert column.counts == backward.columns[name].counts
        np.testing.assert_allclose(column.quantiles, backward.columns[name].quantiles, rtol=1e-9)


def test_a_lazy_table_gives_the_statistics_of_its_rows(tmp_path: Path) -> None:
    table = random_table(5, 30_000)
    table.write_parquet(tmp_path / "table.parquet")
    lazily = describe(pl.scan_parquet(tmp_path / "table.parquet"), by="text")
    assert lazily.to_json() == describe(table, by="text").to_json()  # one batch
    nothing = describe(pl.scan_parquet(tmp_path / "table.parquet").filter(pl.lit(False)), by="text")
    assert (nothing.rows, list(nothing.columns), nothing.slices) == (0, table.columns, {})


def test_memory_does_not_grow_with_a_lazy_table(tmp_path: Path) -> None:
    pl.DataFrame({"x": np.random.default_rng(0).random((1_000_000, 2))}).select(
        a=pl.col("x").arr.first(), b=pl.col("x").arr.last()
    ).write_parquet(tmp_path / "million.parquet")
    code = f"""
import resource
import polars as pl
from mlkit.data import describe
for files in (12, 48):
    scan = pl.concat([pl.scan_parquet({str(tmp_path / "million.parquet")!r})] * files)
    assert describe(scan).rows == files * 1_000_000
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    few, many = map(int, printed.split())
    assert many < few + 250, f"{few} MB for 12 million rows, {many} MB for 48 million, which are 768 MB"


def test_rows_that_cannot_be_read_to_the_end_are_an_error(tmp_path: Path) -> None:
    visits = retail(rows=20_000)
    visits.write_parquet(tmp_path / "visits.parquet", row_group_size=1000)
    content = (tmp_path / "visits.parquet").read_bytes()
    (tmp_path / "visits.parquet").write_bytes(content[:20_000] + bytes(40_000) + content[60_000:])
    with pytest.raises(DatasetError, match="Not all rows could be read"):
        describe(pl.scan_parquet(tmp_path / "visits.parquet"))


HASHES = """
import polars as pl
import mlkit.data.statistics
values = [pl.Series(["a", "grün", "a\\0b", "x" * 300]), pl.Series([1, -1, 2**60]), pl.Series([0.5, -0.0, 1e300])]
print([int(number) for series in values for number in mlkit.data.statistics._hash(series)])
"""


FIXED_HASHES = [
    1533152188014638354,
    15533072291972144332,
    2360871280639519551,
    18037894833880258040,
    10451216379200822465,
    16490336266968443936,
    10427778489764412663,
    17606427253252083309,
    16294208416658607535,
    18400163445926009254,
]


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", HASHES],
            env=os.environ | {"PYTHONHASHSEED": seed, "POLARS_MAX_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    ]
    assert printed[0] == printed[1]
    assert json.loads(printed[0]) == FIXED_HASHES  # saved statistics depend on them: never change these numbers


def test_shards_saved_by_different_processes_are_merged(tmp_path: Path) -> None:
    code = """
import sys
import polars as pl
from mlkit.data import describe
start = int(sys.argv[1])
print(describe(pl.DataFrame({"id": [f"customer-{n}" for n in range(start, start + 30_000)]})).to_json())
"""
    parts = [
        Statistics.from_json(
            subprocess.run([sys.executable, "-c", code, start], capture_output=True, text=True, check=True).stdout
        )
        for start in ("0", "15000")
    ]
    merged = merge_statistics(parts).columns["id"]
    assert not merged.unique_exact
    assert merged.unique == pytest.approx(45_000, rel=0.09)  # 15,000 of the 60,000 occur in both


def test_five_thousand_columns() -> None:
    generator = np.random.default_rng(0)
    table = pl.DataFrame(
        {f"c{n}": generator.random(50) if n % 2 else generator.integers(0, 9, 50).astype(str) for n in range(5000)}
    )
    statistics = describe(table)
    assert len(statistics.columns) == 5000
    assert "and 4,900 more columns" in statistics._repr_html_()
    assert len(statistics._repr_html_()) < 1_000_000
    assert "c4999" in statistics.to_html()
    assert Statistics.from_json(statistics.merge(statistics).to_json()).columns["c4999"].rows == 100


ODD = {
    "empty": pl.Series([], dtype=pl.String),
    "empty numbers": pl.Series([], dtype=pl.Float32),
    "empty lists": pl.Series([], dtype=pl.List(pl.Int8)),
    "nulls": pl.Series([None, None]),
    "missing numbers": pl.Series([None, math.nan]),
    "constant": pl.Series([2.5, 2.5]),
    "constant text": pl.Series(["a", "a"]),
    "infinite": pl.Series([math.inf, -math.inf]),
    "huge": pl.Series([1.7e308, -1.7e308]),
    "tiny": pl.Series([5e-324, 0.0]),
    "unsigned": pl.Series([2**64 - 1, 0]),
    "signed": pl.Series([-(2**63), 2**63 - 1]),
    "beyond 64 bits": pl.Series([2**100, -(2**100)]),
    "decimals": pl.Series(["1.10", "2.20"]).cast(pl.Decimal(10, 2)),
    "categories": pl.Series(["a", "b"], dtype=pl.Categorical),
    "enumeration": pl.Series(["a", None], dtype=pl.Enum(["b", "a"])),
    "bytes": pl.Series([b"a\xff", b""]),
    "lists": pl.Series([[1, None], []]),
    "structs": pl.Series([{"a": 1, "b": [None]}, None]),
    "arrays": pl.Series([[1, 2], [1, 2]], dtype=pl.Array(pl.Int8, 2)),
    "objects": pl.Series([{1}, None], dtype=pl.Object),
    "NUL bytes": pl.Series(["a\0b", "\0"]),
    "a megabyte": pl.Series(["x" * 1_000_000, "y" * 1_000_000]),
    "markup": pl.Series(["<script>alert(1)</script>", "\"'&"]),
    "right to left": pl.Series(["\u202eabc", "🙂"]),
    "first and last date": pl.Series([date.min, date.max]),
    "far dates": pl.Series([-(2**31), 2**31 - 1], dtype=pl.Int32).cast(pl.Date),
    "far moments": pl.Series([-(2**63) + 1, 2**63 - 1]).cast(pl.Datetime("ms")),
    "nanoseconds": pl.Series([1, 2]).cast(pl.Datetime("ns")),
    "zones": pl.Series([datetime(2026, 1, 1), None]).dt.replace_time_zone("Asia/Tokyo"),
    "times": pl.Series([time.min, time.max]),
    "durations": pl.Series([timedelta(days=-1), timedelta(days=100_000_000)]),
    "far durations": pl.Series([2**63 - 1, -(2**63) + 1]).cast(pl.Duration("ms")),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_columns_are_described_merged_shown_and_saved(case: str) -> None:
    table = pl.DataFrame({"odd": ODD[case]})
    statistics = describe(table)
    column = statistics.columns["odd"]
    assert (column.rows, column.count + column.missing) == (table.height, table.height)
    assert all(len(str(value)) <= 200 for value in column.counts)
    restored = Statistics.from_json(statistics.to_json())
    assert restored.to_json() == statistics.to_json()
    assert restored.columns["odd"].counts == column.counts
    twice = merge_statistics([statistics, restored, describe(table[:0])]).columns["odd"]
    assert (twice.rows, twice.missing, twice.unique) == (2 * column.rows, 2 * column.missing, column.unique)
    assert repr([twice.minimum, twice.maximum]) == repr([column.minimum, column.maximum])
    assert statistics_from_proto(statistics_to_proto(statistics)).columns["odd"].missing == column.missing
    page = statistics.overlay(restored).to_html()
    assert len(page) < 16_000
    assert "\0" not in page
    assert "<script" not in page


def test_each_odd_column_has_the_expected_figures() -> None:
    columns = {case: describe(pl.DataFrame({"odd": series})).columns["odd"] for case, series in ODD.items()}
    assert columns["unsigned"].counts == {0: 1, 2**64 - 1: 1}
    assert columns["signed"].counts == {-(2**63): 1, 2**63 - 1: 1}
    assert columns["beyond 64 bits"].maximum == 2.0**100
    assert (columns["decimals"].type, columns["decimals"].counts) == ("number", {1.1: 1, 2.2: 1})
    assert [columns[case].type for case in ("categories", "enumeration", "nulls")] == ["text"] * 3
    assert [columns[case].unique for case in ("bytes", "lists", "structs", "arrays")] == [2, 2, 1, 1]
    assert (columns["objects"].unique, columns["objects"].unique_exact) == (0, False)
    assert (columns["a megabyte"].longest, columns["a megabyte"].counts) == (1_000_000, {})
    assert len(describe(pl.DataFrame({"odd": ODD["a megabyte"]})).to_json()) < 2000
    assert list(columns["first and last date"].counts) == [date.min, date.max]
    assert columns["far dates"].counts == {-(2.0**31): 1, 2.0**31 - 1: 1}
    assert columns["nanoseconds"].counts == {datetime(1970, 1, 1): 2}  # Python has microseconds
    assert columns["infinite"].infinite == 2
    assert math.isnan(columns["infinite"].mean)
    assert math.isfinite(columns["huge"].mean)
    assert columns["durations"].counts == {timedelta(days=-1): 1, timedelta(days=100_000_000): 1}


def test_shards_whose_types_differ() -> None:
    numbers, texts = describe(pl.DataFrame({"x": [1, 2]}), name="one"), describe(pl.DataFrame({"x": ["a"]}), name="two")
    with pytest.raises(DatasetError, match=r"'x' \(text in two, integer in one\)"):
        numbers.merge(texts)
    empty = describe(pl.DataFrame({"x": [None, None]}))  # a column without values has no type to compare
    with pytest.raises(DatasetError, match="'x'"):
        merge_statistics([empty, numbers, texts])
    with pytest.raises(DatasetError, match=r"'y' \(only in two\)"):
        numbers.merge(describe(pl.DataFrame({"x": [1], "y": [1]}), name="two"))
    assert empty.merge(numbers).columns["x"].type == "integer"
    assert numbers.merge(empty).columns["x"].missing == 2
    milliseconds = describe(pl.DataFrame({"x": pl.Series([datetime(2026, 1, 1)]).dt.cast_time_unit("ms")}))
    assert milliseconds.merge(describe(pl.DataFrame({"x": [datetime(2026, 1, 1)]}))).columns["x"].unique == 1


def test_tables_without_rows_or_columns() -> None:
    for table in (pl.DataFrame(), pl.LazyFrame(), pl.DataFrame({"a": []}), pl.LazyFrame({"a": []})):
        statistics = describe(table)
        assert statistics.rows == 0
        assert list(statistics.columns) == table.collect_schema().names()
        assert Statistics.from_json(statistics.merge(statistics).to_json()).rows == 0
        assert "0 rows" in statistics.to_html()
        assert statistics_from_proto(statistics_to_proto(statistics)).rows == 0


def test_slices_of_every_kind_of_column() -> None:
    table = pl.DataFrame(
        {
            "text": ["a", "", None, "a"],
            "number": [1.5, math.nan, None, 1.5],
            "boolean": [True, False, None, True],
            "date": [date(2026, 1, 1), None, None, date(2026, 1, 1)],
            "lists": [[1], [1], [2], [2]],
        }
    )
    rows = {by: {key: part.rows for key, part in describe(table, by=by).slices.items()} for by in table.columns[:-1]}
    assert rows == {
        "text": {"text=": 2, "text=a": 2},
        "number": {"number=": 2, "number=1.5": 2},
        "boolean": {"boolean=": 1, "boolean=false": 1, "boolean=true": 2},
        "date": {"date=": 2, "date=2026-01-01": 2},
    }
    with pytest.raises(DatasetError, match="holds List"):
        describe(table, by="lists")
    for many in (pl.DataFrame({"x": range(101)}), pl.LazyFrame({"x": range(101)})):
        with pytest.raises(DatasetError, match="by='x' would give 101 slices"):
            describe(many, by="x")
    assert len(describe(pl.DataFrame({"x": range(100)}), by="x").slices) == 100


class Tags(HTMLParser):
    """Counts open tags, and collects external sources and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.fetched, self.scripts = [], [], 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.scripts += tag == "script"
        self.check_sources(attrs)
        self.scripts += sum(name.startswith("on") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag == "img"
        assert {name for name, _ in attrs} == {"alt", "title", "width", "height", "src"}
        self.check_sources(attrs)

    def check_sources(self, attrs: list) -> None:
        """Collect external sources: everything but well-formed inline images."""
        for name, value in attrs:
            if name == "src" and value.startswith(inline := "data:image/svg+xml;base64,"):
                ElementTree.fromstring(base64.b64decode(value.removeprefix(inline)))
            elif name in ("src", "href"):
                self.fetched.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_well_formed_and_self_contained() -> None:
    table = pl.DataFrame({"<script>alert(1)</script>": ["</td><script>", "' onload='x"], "a'b\"c&d": [1, 2]})
    statistics = describe(table, name="</title><script>", by="a'b\"c&d")
    for page in (statistics.to_html(), statistics.overlay(describe(retail(rows=500))).to_html()):
        tags = Tags()
        tags.feed(page)
        assert (tags.open, tags.fetched, tags.scripts) == ([], [], 0)
        assert "url(" not in page


def test_json_is_strict_and_other_text_is_an_error() -> None:
    text = describe(pl.DataFrame({"x": [math.inf, None]})).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    broken_texts = ("", "[]", "null", text[:-20], text.replace("missing", "mising"), text.replace("[[", "["))
    for broken in (*broken_texts, text.replace('"number"', '"<b>"')):
        with pytest.raises(DatasetError, match=r"Expected the output of Statistics\.to_json"):
            Statistics.from_json(broken)


def tfdv_numbers(feature: statistics_pb2.FeatureNameStatistics, ends: list[float], counts: list[float]) -> None:
    """Histograms as TFDV fills them: infinities in buckets of their own, the outer quantiles infinite."""
    equal, even = feature.num_stats.histograms.add(), feature.num_stats.histograms.add(type="QUANTILES")
    for histogram in (equal, even):
        for (low, high), count in zip(pairwise(ends), counts, strict=True):
            histogram.buckets.add(low_value=low, high_value=high, sample_count=count)
    equal.buckets.add(low_value=math.inf, high_value=math.inf, sample_count=2)
    even.buckets[-1].high_value = math.inf


def test_statistics_as_tfdv_makes_them_are_read() -> None:
    """Fields as TFDV 1.16.1 fills them from a CSV file of 200 rows."""
    proto = statistics_pb2.DatasetFeatureStatisticsList()
    dataset = proto.datasets.add(name="All Examples", num_examples=200)
    age = dataset.features.add(type="FLOAT")
    age.path.step.append("age")
    age.num_stats.common_stats.num_non_missing, age.num_stats.common_stats.max_num_values = 200, 1
    age.num_stats.mean, age.num_stats.max, age.num_stats.num_zeros = math.nan, math.inf, 7
    tfdv_numbers(age, [0.0, 10.0, 20.0], [99.0, 99.0])
    age.num_stats.histograms[0].num_nan = 10
    device = dataset.features.add(type="STRING", name="device")
    device.string_stats.common_stats.num_non_missing, device.string_stats.common_stats.num_missing = 197, 3
    device.string_stats.unique, device.string_stats.avg_length = 3, 6.38
    for rank, (value, rows) in enumerate([("mobile", 120), ("täblet", 76), ("", 1)]):
        device.string_stats.top_values.add(value=value, frequency=rows)
        device.string_stats.rank_histogram.buckets.add(low_rank=rank, high_rank=rank, label=value, sample_count=rows)
    gone = dataset.features.add(type="STRING", name="gone")
    gone.string_stats.common_stats.num_missing = 200
    code = dataset.features.add(type="INT", name="code")
    code.string_stats.common_stats.num_non_missing, code.string_stats.unique = 200, 2
    for value, rows in (("7", 150), ("10", 50)):
        code.string_stats.rank_histogram.buckets.add(label=value, sample_count=rows)
    several = dataset.features.add(type="INT", name="several")
    several.num_stats.common_stats.num_non_missing, several.num_stats.common_stats.max_num_values = 190, 4
    proto.datasets.add(name="device_mobile", num_examples=120)

    statistics = statistics_from_proto(proto)
    columns = statistics.columns
    assert (statistics.rows, list(statistics.slices)) == (200, ["device_mobile"])
    assert (columns["age"].missing, columns["age"].infinite, columns["age"].zeros) == (10, 2, 7)
    assert (columns["age"].minimum, columns["age"].quantile(0.25), columns["age"].maximum) == (0, 5, 20)
    assert math.isnan(columns["age"].std)
    assert (columns["device"].missing, columns["device"].unique) == (4, 2)
    assert (columns["device"].counts, columns["device"].complete) == ({"mobile": 120, "täblet": 76}, True)
    assert (columns["device"].shortest, columns["device"].mean_length) == (6, 6)
    assert (columns["gone"].type, columns["gone"].missing, columns["gone"].count) == ("text", 200, 0)
    assert (columns["code"].type, columns["code"].counts, columns["code"].mean) == ("integer", {7: 150, 10: 50}, 7.75)
    assert (columns["several"].type, columns["several"].missing) == ("other", 10)
    assert statistics.merge(statistics).columns["age"].rows == 400
    assert "device_mobile" in statistics.overlay(statistics).to_html()


def test_the_proto_message_preserves_what_it_has_fields_for() -> None:
    statistics = describe(retail(rows=5000), by="device")
    restored = statistics_from_proto(statistics_to_proto(statistics))
    sizes = {key: part.rows for key, part in statistics.slices.items()}
    assert {key: part.rows for key, part in restored.slices.items()} == sizes
    for name, column in statistics.columns.items():
        same = restored.columns[name]
        assert (same.type, same.rows, same.missing, same.unique) == (
            column.type,
            column.rows,
            column.missing,
            column.unique,
        )
        np.testing.assert_equal([same.mean, same.std], [column.mean, column.std])
        np.testing.assert_allclose(same.quantiles[::100], column.quantiles[::100])
    message = statistics_to_proto(statistics).datasets[0].features[10]
    assert sum(bucket.sample_count for bucket in message.num_stats.histograms[0].buckets) == pytest.approx(5000)


@pytest.mark.skipif(not ADULT.exists(), reason="the Adult data are not here")
def test_real_data() -> None:
    adult = pl.read_csv(ADULT, null_values="?")
    statistics = describe(adult, by="income")
    assert sum(part.rows for part in statistics.slices.values()) == adult.height
    for column in statistics.columns.values():
        values = adult[column.name]
        assert (column.missing, column.unique) == (values.null_count(), values.drop_nulls().n_unique())
        if column.is_numeric:
            assert column.mean == pytest.approx(values.mean())
            assert column.quantile(0.5) == values.median()
        else:
            assert column.mean_length == pytest.approx(values.str.len_chars().mean())
            assert next(iter(column.counts)) in values.mode().to_list()


def test_a_column_may_be_called_like_a_pattern() -> None:
    statistics = describe(pl.DataFrame({"^a.*$": ["x", "y", "x"], "abc": [1, 2, 3], "*": [1.5, None, 2.5]}))
    assert statistics.columns["^a.*$"].counts == {"x": 2, "y": 1}
    assert statistics.columns["*"].mean == 2
