"""Drift: detected drift, false alarms, and tables that cannot be compared."""

import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from mlkit.data import Statistics, describe, measure_drift, read_table
from mlkit.data.drift import DEFAULT_THRESHOLDS, DISTANCES, Drift
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError
from tests.conftest import ADULT


def sample(generator: np.random.Generator, rows: int, shift: float = 0.0) -> pl.DataFrame:
    """Rows of one population; a shift moves two of its columns."""
    return pl.DataFrame(
        {
            "normal": generator.normal(shift, size=rows),
            "skewed": np.exp(generator.normal(size=rows) * 1.5),
            "zeros": np.where(generator.random(rows) < 0.6, 0, generator.exponential(size=rows)),
            "small": generator.integers(0, 6, rows),
            "letter": generator.choice(list("abcde"), rows, p=[0.5 - shift / 5, 0.2 + shift / 5, 0.15, 0.1, 0.05]),
            "name": generator.integers(0, 100, rows).astype(str),
            "rare": generator.random(rows) < 0.1,
            "gaps": pl.Series(generator.normal(size=rows)).set(pl.Series(generator.random(rows) < 0.1), None),
        }
    )


def pairs(count: int, min_rows: int, max_rows: int, shift: float = 0.0) -> list[tuple[Statistics, Statistics]]:
    generator = np.random.default_rng(1)
    sizes = generator.integers(min_rows, max_rows, (count, 2))
    return [(describe(sample(generator, first)), describe(sample(generator, second, shift))) for first, second in sizes]


def test_small_samples_of_one_population_raise_no_alarm() -> None:
    """With default thresholds and significance, of 240 pairs of 50 to 500 rows; 1 in 100 pairs may be a false alarm."""
    drifts = [measure_drift(*pair) for pair in pairs(240, 50, 500)]
    assert sum(not drift.passed for drift in drifts) <= 6  # 2.4 expected; seven has a probability of 0.01
    naive = sum(any(column.excess > 1 for column in drift.columns.values()) for drift in drifts)
    assert naive > 24  # thresholds alone give a false alarm for one pair in six


def test_the_significance_level_holds_when_every_threshold_is_zero() -> None:
    """Every distance of every column is tested, and only the p-value decides."""
    alarms, drifts = 0, pairs(200, 50, 500)
    for pair in drifts:
        fitting = {name: column.distances for name, column in measure_drift(*pair).columns.items()}
        thresholds = {name: dict.fromkeys(distances, 0.0) for name, distances in fitting.items()}
        alarms += not measure_drift(*pair, thresholds=thresholds, significance=0.05).passed
    assert alarms <= 17, alarms  # 10 expected; 18 has a probability of 0.01


def test_drifted_columns_are_detected_and_no_others() -> None:
    drifts = [measure_drift(*pair) for pair in pairs(40, 300, 500, shift=0.8)]
    assert sum({"normal", "letter"} <= set(drift.drifted) for drift in drifts) >= 38
    assert sum(bool(set(drift.drifted) - {"normal", "letter"}) for drift in drifts) <= 2


@pytest.mark.parametrize("seed", [42, 1, 2])
def test_the_simulated_drift_of_the_shop_is_detected(seed: int) -> None:
    visits = retail(rows=20_000, drift=1, seed=seed)
    days = visits["day"].unique().sort()
    first, last = (describe(visits.filter(pl.col("day").is_in(week.implode()))) for week in (days[:7], days[-7:]))
    drift = measure_drift(first, last, thresholds={"purchased": {"l_infinity": 0.02}})
    assert set(drift.drifted) == {"device", "price", "purchased", "referrer", "category"}
    assert set(drift.drifted[:2]) == {"price", "referrer"}  # the worst first


def test_a_shop_without_drift_passes() -> None:
    visits = retail(rows=20_000)
    days = visits["day"].unique().sort()
    first, last = (describe(visits.filter(pl.col("day").is_in(week.implode()))) for week in (days[:7], days[-7:]))
    assert measure_drift(first, last, thresholds={"purchased": {"l_infinity": 0.02}}).drifted == []


def test_results_are_deterministic_and_do_not_depend_on_other_columns() -> None:
    (first, second), *_ = pairs(1, 50, 80)
    whole = measure_drift(first, second)
    assert whole.to_json() == measure_drift(first, second).to_json()
    thresholds = {"small": {"population_stability": 0.0}}
    fewer = set(first.columns) - {"small", "gaps", "name"}
    ignored = measure_drift(first, second, thresholds=thresholds, ignore=fewer).columns["small"]
    single = measure_drift(first, second, thresholds=thresholds, ignore=set(first.columns) - {"small"}).columns["small"]
    assert ignored.distances == single.distances
    assert ignored.p_value == pytest.approx(min(1, 3 * single.p_value))  # Holm: three tests instead of one


def test_the_record_is_plain_json_that_a_gate_can_read() -> None:
    (first, second), *_ = pairs(1, 300, 500, shift=2)
    record = json.loads(measure_drift(first, second).to_json(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert record["passed"] is False
    assert "normal" in record["drifted"]
    column = next(column for column in record["columns"] if column["name"] == "normal")
    assert column["result"] == "drifted"
    assert column["distance_name"] == "population_stability"
    assert column["distance"] > column["threshold"] == 0.2
    assert column["p_value"] < 0.01
    assert column["reason"].startswith("the median went from")


def test_columns_with_many_values_are_compared_by_quantiles() -> None:
    """Statistics that hold only quantiles and the most frequent texts."""
    generator = np.random.default_rng(3)

    def table(shift: float) -> pl.DataFrame:
        people = np.where(generator.random(60_000) < 0.3, 0, generator.integers(1, 30_000, 60_000))
        return pl.DataFrame({"number": generator.normal(shift, 2, 60_000), "person": people.astype(str)})

    first, second, third = (describe(table(shift)) for shift in (0, 0, 1))
    assert not first.columns["number"].complete
    assert not first.columns["person"].complete
    assert measure_drift(first, second).passed
    drift = measure_drift(first, third)
    assert drift.drifted == ["number"]
    assert drift.columns["number"].distances["wasserstein"] == pytest.approx(0.5, abs=0.02)
    assert drift.columns["number"].distances["wasserstein_raw"] == pytest.approx(1, abs=0.04)
    assert drift.columns["person"].distances["l_infinity"] < 0.01


def test_every_column_type_gets_a_result() -> None:
    moments = pl.datetime_range(pl.datetime(2026, 1, 1), pl.datetime(2026, 1, 10), "1h", eager=True)
    table = pl.DataFrame({"at": moments}).with_columns(
        date=pl.col("at").dt.date(),
        time=pl.col("at").dt.time(),
        lasted=pl.col("at") - pl.col("at").first(),
        list=pl.concat_list(pl.lit(1)),
        huge=pl.lit(2**63, pl.UInt64),
    )
    results = {name: column.result for name, column in measure_drift(describe(table), describe(table)).columns.items()}
    assert results == dict.fromkeys(("time", "lasted", "list", "huge"), "stable") | dict.fromkeys(
        ("at", "date"), "not tested"
    )
    later = table.with_columns(
        time=pl.lit(None, pl.Time), list=pl.lit(None, pl.List(pl.Int32)), lasted=pl.duration(days=99)
    )
    assert set(measure_drift(describe(table), describe(later)).drifted) == {"time", "list", "lasted"}


def test_single_rows_are_not_statistically_significant() -> None:
    drift = measure_drift(
        describe(pl.DataFrame({"x": [1.0], "y": ["a"]})), describe(pl.DataFrame({"x": [9.0], "y": ["b"]}))
    )
    assert drift.passed
    assert {column.result for column in drift.columns.values()} == {"not significant"}
    assert "but not statistically significant with 1 and 1 rows" in drift.columns["x"].reason


def test_statistics_of_different_tables_are_refused() -> None:
    wine, shop = describe(read_wine(), name="wine"), describe(retail(rows=100), name="shop")
    with pytest.raises(DatasetError, match=r"'wine' and 'shop' have no column in common: .*alcohol.*; and day, hour"):
        measure_drift(wine, shop)
    with pytest.raises(DatasetError, match="'later' has no rows"):
        measure_drift(shop, describe(retail(rows=100).head(0), name="later"))
    with pytest.raises(DatasetError, match=r"ignore= names column 'pirce', .*Did you mean 'price'\?"):
        measure_drift(shop, shop, ignore=["pirce"])


def read_wine() -> pl.DataFrame:
    from sklearn.datasets import load_wine

    wine = load_wine()
    return pl.DataFrame(wine.data, schema=wine.feature_names)


def test_every_column_type_has_default_thresholds_that_apply() -> None:
    assert {name for thresholds in DEFAULT_THRESHOLDS.values() for name in thresholds} <= set(DISTANCES)


@pytest.mark.skipif(not ADULT.exists(), reason="the Adult data are not here")
def test_real_data_halves_agree_and_a_subgroup_does_not() -> None:
    adult = read_table(ADULT, null_values=["?"]).sample(fraction=1, shuffle=True, seed=0)
    assert measure_drift(describe(adult[:16_000]), describe(adult[16_000:])).passed
    women, men = (describe(adult.filter(pl.col("sex") == sex)) for sex in ("Female", "Male"))
    drift: Drift = measure_drift(men, women, ignore=["sex"])
    assert {"relationship", "occupation", "hours_per_week"} <= {name.replace("-", "_") for name in drift.drifted}
    assert all(math.isfinite(d) for column in drift.columns.values() for d in column.distances.values())


def test_measuring_drift_imports_neither_matplotlib_nor_tensorflow() -> None:
    code = """
import sys, polars
from mlkit.data import measure_drift
from mlkit.data import describe
table = describe(polars.DataFrame({"x": [1.0, 2.0] * 50}))
measure_drift(table, table)._repr_html_()
print([name for name in ("matplotlib", "tensorflow", "scipy", "sklearn") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
