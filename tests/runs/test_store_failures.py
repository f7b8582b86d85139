"""Failures of a run store: full disk, no permission, damaged and deleted runs."""

import contextlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from mlkit.errors import NotFoundError, StorageError
from mlkit.runs.query import INDEX_FILE
from mlkit.runs.record import RUN_FILE
from mlkit.runs.store import RunStore


def fill_up(folder: Path) -> None:
    """Use all remaining space."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)


def test_a_full_disk_rejects_new_runs_and_preserves_existing_ones(small_disk: Path) -> None:
    store = RunStore(small_disk / "runs")
    run = store.create("train")
    run.log_metrics({"loss": 1.0})
    fill_up(small_disk)
    with pytest.raises(StorageError, match=r"disk is full.*--set runs.root"):
        store.create("train")
    with pytest.raises(StorageError, match="disk is full"):
        run.log_metrics({"loss": 0.5})
    assert run.record.metrics == {"loss": 1.0}
    assert [summary.id for summary in store.list()] == [run.id]
    assert sorted(path.name for path in store.root.iterdir() if path.name != INDEX_FILE) == [run.id]


def test_a_read_only_store_can_be_listed_but_not_written(small_disk: Path) -> None:
    store = RunStore(small_disk / "runs")
    run = store.create("train")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert [summary.id for summary in store.list()] == [run.id]
    for write in (lambda: store.create("train"), lambda: run.log_metrics({"loss": 1}), lambda: store.delete(run)):
        with pytest.raises(StorageError, match="read-only"):
            write()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_missing_permission_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="No permission"):
        RunStore(tmp_path / "runs").create("train")


def test_runs_deleted_during_a_listing_are_no_error(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    runs = [store.create("train") for _ in range(40)]
    deleter = threading.Thread(target=lambda: [store.delete(run) for run in runs])
    deleter.start()
    tables = []
    while deleter.is_alive():
        tables.append(store.list())
    deleter.join()
    assert all(summary.status in ("created", "damaged") for table in tables for summary in table)
    assert len(store.list()) == 0


def test_a_damaged_record_is_listed_and_other_runs_are_unaffected(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    whole, damaged, empty, wrong = (store.create("train") for _ in range(4))
    (damaged.folder / RUN_FILE).write_text('{"id": "cut off')
    (empty.folder / RUN_FILE).unlink()
    (wrong.folder / RUN_FILE).write_text('{"id": 3}')
    states = {summary.id: summary.status for summary in store.list()}
    assert states == {whole.id: "created", damaged.id: "damaged", empty.id: "damaged", wrong.id: "damaged"}
    with pytest.raises(StorageError, match="damaged"):
        _ = damaged.record
    with pytest.raises(NotFoundError):
        _ = empty.record


def test_folders_that_are_not_runs_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("ours")
    assert len(RunStore(tmp_path).list()) == 0


def test_the_index_can_be_deleted_or_damaged_at_any_time(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.create("train").log_metrics({"loss": 1})
    before = store.list().runs
    (tmp_path / INDEX_FILE).unlink()
    assert store.list().runs == before
    (tmp_path / INDEX_FILE).write_bytes(b"SQLite format 3\0" + os.urandom(4096))
    assert store.list().runs == before


def test_the_next_listing_shows_a_change(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = store.create("train")
    for value in range(20):
        run.log_metrics({"loss": value})
        assert store.list().runs[0].metrics == {"loss": value}
