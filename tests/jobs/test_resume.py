"""Interrupted and resumed training: the result is bit-identical to that of an uninterrupted training."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlkit.data import load_dataset
from mlkit.runs import Run
from mlkit.runs.store import RunStore

pytestmark = pytest.mark.slow

CHILD = """
import hashlib, json, sys
from mlkit.data import load_dataset
from mlkit.models import build_model
from mlkit.runs import Run
from mlkit.training import fit

data = load_dataset("digits")
model = build_model("cnn", data)  # with dropout
history = fit(model, data, epochs=32, patience=32, run=Run(sys.argv[1]))
variables = [*model.variables, *model.optimizer.variables]
content = hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in variables)).hexdigest()
print(json.dumps([content, history.epochs]))
"""


def restarted(run: Run) -> Run:
    """Reset a run as before another attempt; `progress` then shows that training has begun."""
    with run.edit() as record:
        record.history, record.metrics, record.progress = {}, {}, {}
    return Run(run.folder)


def start(run: Run) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, run.folder], stdout=subprocess.PIPE, text=True)


def finish(run: Run) -> tuple[list[str], list]:
    """Lines that a training prints, and its result."""
    process = start(run)
    *lines, result = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    return lines, json.loads(result)


def train_and_signal(run: Run, number: int, delay: float) -> float:
    """Start a training and send it a signal some seconds after its first progress; time of the signal."""
    process = start(run)
    deadline = time.monotonic() + 120
    while not run.record.progress:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    signalled = time.time()
    process.send_signal(number)
    assert process.wait(30) == -number
    process.stdout.close()
    return signalled


def test_a_training_killed_repeatedly_is_bit_identical(tmp_path: Path) -> None:
    store, seed = RunStore(tmp_path), int(os.environ.get("RESUME_SEED", time.time_ns() % 10_000))
    delays = random.Random(seed)
    print(f"RESUME_SEED={seed}")
    reference, interrupted = store.create("train"), store.create("train")
    _, expected = finish(reference)
    for number, minimum in ((signal.SIGKILL, 1.6), (signal.SIGTERM, 0.1), (signal.SIGKILL, 0.1)):
        signalled = train_and_signal(restarted(interrupted), number, minimum + delays.random())
        if number == signal.SIGTERM:  # SIGTERM: it saves a checkpoint before it ends
            saved = (interrupted.checkpoints / "fit-1" / "checkpoint").stat().st_mtime
            assert saved > signalled - 0.1  # a file's time lags behind the clock
    lines, result = finish(restarted(interrupted))
    assert lines[0].startswith("Resumes after epoch ")
    assert result == expected
    assert interrupted.record.history == reference.record.history
    assert interrupted.record.metrics == reference.record.metrics


def truncate_data(folder: Path) -> None:
    (data,) = folder.glob("*.data-*")
    os.truncate(data, data.stat().st_size // 2)


def remove_index(folder: Path) -> None:
    (index,) = folder.glob("*.index")
    index.unlink()


def empty_pointer(folder: Path) -> None:
    (folder / "checkpoint").write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate_data, remove_index, empty_pointer])
def test_a_damaged_checkpoint_is_reported_and_training_restarts(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlkit.models import build_model
    from mlkit.training import fit

    data, run = load_dataset("wine"), RunStore(tmp_path).create("train")
    expected = fit(build_model("mlp", data), data, epochs=2, run=run)
    damage(run.checkpoints / "fit-1")
    capsys.readouterr()
    again = fit(build_model("mlp", data), data, epochs=2, run=restarted(run))
    assert "Training starts from the beginning: the checkpoint cannot be read" in capsys.readouterr().out
    assert again.epochs == expected.epochs
    assert len(run.record.history["loss"]) == 2
    restored = fit(build_model("mlp", data), data, epochs=2, run=restarted(run))  # the new checkpoint is intact
    assert "Training has finished" in capsys.readouterr().out
    assert restored.epochs == expected.epochs


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"epochs": 3}, {"seed": 1}, {"learning_rate": 0.01}])
def test_a_different_training_does_not_resume_this_one(
    change: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlkit.models import build_model
    from mlkit.training import fit

    data, run = load_dataset("wine"), RunStore(tmp_path).create("train")
    settings = {"epochs": 2, "batch_size": 32, "seed": 42}
    fit(build_model("mlp", data), data, run=run, **settings)
    capsys.readouterr()
    history = fit(build_model("mlp", data), data, run=restarted(run), **settings | change)
    output = capsys.readouterr().out
    assert "Training starts from the beginning: the checkpoint is of another training (" in output
    assert ("optimizer" if "learning_rate" in change else next(iter(change))) in output
    assert len(history) == change.get("epochs", 2)


def test_an_averaging_optimizer_and_a_schedule_resume(tmp_path: Path) -> None:
    """Averages replace weights at the very end only, and several steps may be executed at once."""
    import keras

    from mlkit.models import build_model
    from mlkit.training import fit

    class InterruptTraining(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations >= 60:
                signal.raise_signal(signal.SIGINT)

    def train(run: Run, *callbacks: keras.callbacks.Callback) -> tuple:
        model = build_model("cnn", data)
        schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 50, 0.5)
        optimizer = keras.optimizers.AdamW(schedule, use_ema=True)
        loss, metric = keras.losses.SparseCategoricalCrossentropy(), "accuracy"
        model.compile(optimizer, loss, metrics=[metric], steps_per_execution=6)
        history = fit(model, data, epochs=3, run=run, callbacks=callbacks)
        return history.epochs, [v.numpy().tolist() for v in (*model.variables, *optimizer.variables)]

    data, store = load_dataset("digits"), RunStore(tmp_path)
    assert len(data.to_tf()) % 6  # 45 steps: seven calls of six, one of three
    reference, interrupted = store.create("train"), store.create("train")
    expected = train(reference)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, InterruptTraining())
    assert train(restarted(interrupted)) == expected
    assert interrupted.record.history == reference.record.history


def test_the_best_weights_may_be_older_than_the_interruption(tmp_path: Path) -> None:
    import keras

    from mlkit.models import build_model
    from mlkit.training import fit

    class Diverge(keras.callbacks.Callback):
        """Negative learning rate after the first epoch."""

        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = -0.001 if epoch else 0.001

    class InterruptTraining(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                signal.raise_signal(signal.SIGINT)

    def train(run: Run, *callbacks: keras.callbacks.Callback) -> tuple:
        model = build_model("mlp", data)
        history = fit(model, data, epochs=4, run=run, callbacks=[Diverge(), *callbacks])
        return history.best_epoch, history.epochs, [weight.tolist() for weight in model.get_weights()]

    data, store = load_dataset("breast_cancer"), RunStore(tmp_path)
    expected, interrupted = train(store.create("train")), store.create("train")
    assert expected[0] == 1
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, InterruptTraining())
    assert train(restarted(interrupted)) == expected
