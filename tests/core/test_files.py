"""Locks and journals under several processes, SIGKILL and a full disk."""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlkit import _files
from mlkit._files import FileLock, append_line, append_record, locked, read_lines, read_records
from mlkit.errors import NotFoundError, StorageError

FORK = multiprocessing.get_context("fork")


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Execute a function in a new process."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def append_numbers(path: Path, worker: int, count: int) -> None:
    """Append records of different lengths."""
    for number in range(count):
        append_record(path, {"worker": worker, "number": number, "padding": "x" * (number * 37 % 3000)})


def test_appends_of_many_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    processes = [start(append_numbers, path, worker, 40) for worker in range(8)]
    for process in processes:
        process.join()
    records = read_records(path)
    assert len(records) == 8 * 40
    for worker in range(8):
        assert [record["number"] for record in records if record["worker"] == worker] == list(range(40))


def test_sigkill_during_appends_leaves_a_readable_journal(tmp_path: Path) -> None:
    path, generator = tmp_path / "journal.jsonl", random.Random(0)
    for attempt in range(15):
        process = start(append_numbers, path, attempt, 100_000)
        time.sleep(0.01 + generator.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        append_record(path, {"worker": "main", "number": attempt})
        records = read_records(path)
        assert records[-1] == {"worker": "main", "number": attempt}
        numbers = [record["number"] for record in records if record["worker"] == attempt]
        assert numbers == list(range(len(numbers)))
    assert [record["number"] for record in records if record["worker"] == "main"] == list(range(15))


def die_in_the_middle_of_a_line(path: Path) -> None:
    """Write half a line and die before the rest."""
    write = os.pwrite

    def half(descriptor: int, data: bytes, position: int) -> int:
        write(descriptor, data[: len(data) // 2], position)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    os.pwrite = half
    append_record(path, {"number": 2, "padding": "x" * 10_000})


def test_an_incomplete_last_line_is_ignored_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append_record(path, {"number": 1})
    process = start(die_in_the_middle_of_a_line, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    assert read_records(path) == [{"number": 1}]
    append_record(path, {"number": 3})  # the lock of the dead process is free
    assert read_records(path) == [{"number": 1}, {"number": 3}]
    assert path.read_bytes().count(b"\n") == 2


def test_an_incomplete_first_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"number"' + b" " * 9000)
    assert read_records(path) == []
    append_record(path, {"number": 1})
    assert path.read_bytes() == b'{"number": 1}\n'


@pytest.mark.parametrize("written", [0, 5])
def test_a_failed_append_leaves_the_journal_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    path, write = tmp_path / "journal.jsonl", os.pwrite
    append_record(path, {"number": 1})
    before = path.read_bytes()

    def fail(descriptor: int, data: bytes, position: int) -> int:
        if position > len(before) or not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:written], position)

    monkeypatch.setattr(_files.os, "pwrite", fail)
    with pytest.raises(StorageError, match="The disk is full"):
        append_record(path, {"number": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    append_record(path, {"number": 3})
    assert [record["number"] for record in read_records(path)] == [1, 3]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(_files.os, "pwrite", lambda descriptor, data, position: write(descriptor, data[:3], position))
    append_record(tmp_path / "journal.jsonl", {"number": 12345})
    assert read_records(tmp_path / "journal.jsonl") == [{"number": 12345}]


def test_a_full_disk_is_reported_and_loses_no_record(small_disk: Path) -> None:
    path, appended = small_disk / "journal.jsonl", []

    def append_until_full() -> None:
        while True:
            append_record(path, {"number": len(appended), "padding": "x" * 5000})
            appended.append(len(appended))

    with pytest.raises(StorageError, match="The disk is full"):
        append_until_full()
    assert [record["number"] for record in read_records(path)] == appended
    assert len(appended) > 10


def test_lines_are_bytes_and_exactly_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, b"\xff\x00\n")
    assert read_lines(path) == [b"\xff\x00"]
    for line in (b"", b"a", b"a\nb\n", b"\na"):
        with pytest.raises(ValueError, match="one line"):
            append_line(path, line)
    assert read_lines(path) == [b"\xff\x00"]


def test_a_damaged_record_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"number": 1}\nnot JSON\n{"number": 3}\n')
    with pytest.raises(StorageError, match="is damaged in line 2"):
        read_records(path)
    with pytest.raises(StorageError, match="Cannot read"):
        read_records(tmp_path)


def hold(path: Path, ready: Any) -> None:
    """Hold a lock until the process is killed."""
    FileLock(path).acquire()
    ready.set()
    signal.pause()


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    path, ready = tmp_path / "lock", FORK.Event()
    process = start(hold, path, ready)
    ready.wait()
    lock = FileLock(path)
    assert not lock.acquire(blocking=False)
    process.kill()
    process.join()
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_shared_lock_excludes_only_exclusive_ones(tmp_path: Path) -> None:
    first, second = (FileLock(tmp_path, shared=True, create=False) for _ in range(2))
    exclusive = FileLock(tmp_path, create=False)
    with first, second:
        assert not exclusive.acquire(blocking=False)
    with exclusive:
        assert not first.acquire(blocking=False)
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "none", create=False).acquire()
    assert list(tmp_path.iterdir()) == []


def increment(path: Path, count: int) -> None:
    """Read, change and write a number under the lock of its folder."""
    for _ in range(count):
        with locked(path.parent):
            path.write_text(str(int(path.read_text()) + 1))


def test_the_lock_of_a_folder_serializes_processes(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    processes = [start(increment, path, 50) for _ in range(4)]
    for process in processes:
        process.join()
    assert path.read_text() == "200"


def test_the_lock_of_a_deleted_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has been deleted"), locked(tmp_path / "none"):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="nothing has been changed"),
        locked(tmp_path / "file", advice="nothing has been changed"),
    ):
        pass
