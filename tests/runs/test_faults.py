"""The archive on bad days: no room, no permission, damaged and vanishing runs."""

import contextlib
import os
import subprocess
import threading
from pathlib import Path

import pytest

from mlkit.errors import NotFoundError, StorageError
from mlkit.runs.query import INDEX_FILE
from mlkit.runs.record import RUN_FILE
from mlkit.runs.run import RunStore


def fill_up(folder: Path) -> None:
    """Take every byte that is left."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)


def test_a_full_disk_refuses_new_runs_and_keeps_the_old(small_disk: Path) -> None:
    archive = RunStore(small_disk / "runs")
    run = archive.create("train")
    run.log_metrics({"loss": 1.0})
    fill_up(small_disk)
    with pytest.raises(StorageError, match=r"disk is full.*--set runs.root"):
        archive.create("train")
    with pytest.raises(StorageError, match="disk is full"):
        run.log_metrics({"loss": 0.5})
    assert run.record.metrics == {"loss": 1.0}
    assert [summary.id for summary in archive.list()] == [run.id]
    assert sorted(path.name for path in archive.root.iterdir() if path.name != INDEX_FILE) == [run.id]


def test_a_read_only_archive_can_be_listed_but_not_written(small_disk: Path) -> None:
    archive = RunStore(small_disk / "runs")
    run = archive.create("train")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert [summary.id for summary in archive.list()] == [run.id]
    for write in (lambda: archive.create("train"), lambda: run.log_metrics({"loss": 1}), lambda: archive.delete(run)):
        with pytest.raises(StorageError, match="read-only"):
            write()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_an_archive_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="No permission"):
        RunStore(tmp_path / "runs").create("train")


def test_runs_vanishing_under_a_listing_are_no_error(tmp_path: Path) -> None:
    archive = RunStore(tmp_path)
    runs = [archive.create("train") for _ in range(40)]
    deleter = threading.Thread(target=lambda: [archive.delete(run) for run in runs])
    deleter.start()
    seen = []
    while deleter.is_alive():
        seen.append(archive.list())
    deleter.join()
    assert all(summary.status in ("created", "damaged") for table in seen for summary in table)
    assert len(archive.list()) == 0


def test_a_damaged_record_is_listed_and_the_others_unaffected(tmp_path: Path) -> None:
    archive = RunStore(tmp_path)
    whole, damaged, empty, wrong = (archive.create("train") for _ in range(4))
    (damaged.folder / RUN_FILE).write_text('{"id": "cut off')
    (empty.folder / RUN_FILE).unlink()
    (wrong.folder / RUN_FILE).write_text('{"id": 3}')
    states = {summary.id: summary.status for summary in archive.list()}
    assert states == {whole.id: "created", damaged.id: "damaged", empty.id: "damaged", wrong.id: "damaged"}
    with pytest.raises(StorageError, match="damaged"):
        _ = damaged.record
    with pytest.raises(NotFoundError):
        _ = empty.record


def test_folders_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("ours")
    assert len(RunStore(tmp_path).list()) == 0


def test_the_index_can_be_deleted_or_damaged_at_any_time(tmp_path: Path) -> None:
    archive = RunStore(tmp_path)
    archive.create("train").log_metrics({"loss": 1})
    before = archive.list().runs
    (tmp_path / INDEX_FILE).unlink()
    assert archive.list().runs == before
    (tmp_path / INDEX_FILE).write_bytes(b"SQLite format 3\0" + os.urandom(4096))
    assert archive.list().runs == before


def test_a_change_is_seen_by_the_next_listing(tmp_path: Path) -> None:
    archive = RunStore(tmp_path)
    run = archive.create("train")
    for value in range(20):
        run.log_metrics({"loss": value})
        assert archive.list().runs[0].metrics == {"loss": value}
