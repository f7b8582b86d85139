"""HTML representation of data sets: tables, images, several labels, names that contain markup."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit.data import load_dataset
from mlkit.data.dataset_html import render_dataset
from mlkit.data.synthetic import retail


class TagBalance(HTMLParser):
    """Checks that every tag is closed, and collects the sources of images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.sources.append(dict(attrs)["src"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "visits.parquet"
    retail(rows=2_000).write_parquet(path)
    return path


def test_a_table_shows_rows_splits_label_and_features(shop: Path) -> None:
    dataset = load_dataset(shop, "purchased", ignore=["clicked", "item_id"], features={"price": {"normalise": "log"}})
    page = render_dataset(dataset)
    TagBalance(page)
    assert dataset._repr_html_() == page
    assert "2,000 rows, 15 features" in page
    assert f"train {dataset.sizes['train']:,} · validation" in page
    assert "split at random, 0.8 / 0.1 / 0.1, seed 42" in page
    assert "binary: <code>purchased</code>" in page
    for name, rows in zip(dataset.classes, np.bincount(dataset.labels), strict=True):
        assert f"{name}: {rows:,} (" in page
    assert "2026-01-01 to 2026-01-30" in page  # a date
    assert "logarithm" in page
    assert "desktop" in page  # a vocabulary
    assert "✱ some values are missing" in page


def test_features_that_are_bucketed_and_hashed_show_their_sizes(shop: Path) -> None:
    features = {"user_id": {"type": "hash", "buckets": 5000}, "age": {"type": "bucket", "boundaries": [18, 65]}}
    page = render_dataset(load_dataset(shop, "purchased", features=features))
    assert "5,000 hash buckets" in page
    assert "3 buckets" in page


def test_images_are_shown_as_one_inline_picture() -> None:
    page = render_dataset(load_dataset("digits"))
    (source,) = TagBalance(page).sources
    assert source.startswith("data:image/png;base64,")
    assert "1,797 rows, 1 feature<" in page
    assert "(8, 8, 1), 0 to 16" in page


def test_a_regression_target_is_shown_as_a_histogram() -> None:
    dataset = load_dataset("diabetes")
    page = render_dataset(dataset)
    counts, _ = np.histogram(dataset.labels, bins=8)
    assert all(f": {rows:,} ({rows / counts.sum():.1%})" in page for rows in counts)


def test_each_of_several_labels_is_shown(shop: Path) -> None:
    page = render_dataset(load_dataset(shop, ["clicked", "price"], ignore="purchased"))
    TagBalance(page)
    assert "binary: <code>clicked</code>" in page
    assert "regression: <code>price</code>" in page


def test_many_classes_and_features_are_cut(tmp_path: Path) -> None:
    columns = {f"c{n}": np.arange(400.0) for n in range(30)} | {"y": [f"class {n % 15}" for n in range(400)]}
    pl.DataFrame(columns).write_parquet(tmp_path / "wide.parquet")
    page = render_dataset(load_dataset(tmp_path / "wide.parquet", "y"))
    assert "and 3 more" in page  # classes
    assert "and 6 more" in page  # features


def test_names_and_values_are_escaped(tmp_path: Path) -> None:
    table = {"<script>": ["<b>", "<i>", "<b>"] * 20, "x": range(60), "y": ["<u>", "</div>", "<u>"] * 20}
    pl.DataFrame(table).write_parquet(tmp_path / "<s>.parquet")
    page = render_dataset(load_dataset(tmp_path / "<s>.parquet", "y"))
    assert not TagBalance(page).tags & {"script", "b>", "i", "u", "s"}
    assert "&lt;script&gt;" in page
