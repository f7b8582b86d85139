"""Which folders are versions of a model."""

from pathlib import Path

import pytest

from mlkit.runs.run import find_model_version, version_number
from mlkit.serving.sources import FolderSource


@pytest.mark.parametrize(
    ("name", "number"),
    [("1", 1), ("0007", 7), ("9" * 18, 10**18 - 1), *((text, None) for text in ("9" * 23, "²", "٣", "1.0", "-1"))],
)
def test_only_plain_decimal_numbers_are_versions(tmp_path: Path, name: str, number: int | None) -> None:
    """`int` takes digits of all scripts, and `str.isdigit` those that `int` does not take."""
    for folder in ("1", name):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "saved_model.pb").touch()
    assert version_number(name) == number
    newest = FolderSource(tmp_path).poll().versions[0]
    assert newest.number == (number or 1)
    assert find_model_version(tmp_path) == tmp_path / (name if number else "1")
