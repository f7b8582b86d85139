"""Private interfaces of Keras Tuner, each with what the search relies on."""

from pathlib import Path

import pytest
from keras_tuner import HyperParameters, Objective
from keras_tuner.oracles import BayesianOptimizationOracle, RandomSearchOracle

from mlkit._compat import keras_tuner as compat


def make_oracle(kind: type = RandomSearchOracle, **options) -> RandomSearchOracle:
    space = HyperParameters()
    space.Float("rate", 0.0, 1.0)
    return kind(objective=Objective("loss", "min"), max_trials=20, hyperparameters=space, seed=3, **options)


def test_an_oracle_without_files_writes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    oracle = make_oracle()
    compat.disable_files(oracle)
    trial = oracle.create_trial("1")
    oracle.update_trial(trial.trial_id, {"loss": 1.0})
    trial.status = "COMPLETED"
    oracle.end_trial(trial)
    oracle.save()
    assert not list(tmp_path.iterdir())


def test_the_seed_state_decides_the_next_random_values() -> None:
    first, second = make_oracle(), make_oracle()
    for oracle in (first, second):
        compat.disable_files(oracle)
    suggested = [first.create_trial(str(n)).hyperparameters.values for n in range(2)]
    state = compat.get_seed_state(make_oracle())
    assert compat.get_seed_state(first) > state
    second.create_trial("0")
    after_one = compat.get_seed_state(second)
    third = make_oracle()
    compat.disable_files(third)
    compat.set_seed_state(third, after_one)
    assert third.create_trial("0").hyperparameters.values == suggested[1]


def test_the_acquisition_is_seeded() -> None:
    oracle = make_oracle(BayesianOptimizationOracle)
    draws = []
    for _ in range(2):
        compat.seed_acquisition(oracle, 7)
        draws.append(oracle._random_state.uniform())
    assert draws[0] == draws[1]


def test_values_that_were_suggested_are_duplicates() -> None:
    oracle = make_oracle()
    compat.disable_files(oracle)
    trial = oracle.create_trial("1")
    assert compat.is_duplicate(oracle, trial.hyperparameters.values)
    assert not compat.is_duplicate(oracle, {"rate": -1.0})


def test_random_values_are_new_ones() -> None:
    oracle = make_oracle(BayesianOptimizationOracle)
    sample = compat.sample_values(oracle)
    assert sample["status"] == "RUNNING"
    assert 0 <= sample["values"]["rate"] <= 1


@pytest.mark.parametrize(("max_epochs", "trials"), [(3, 6), (9, 23)])
def test_trials_of_hyperband(max_epochs: int, trials: int) -> None:
    assert compat.hyperband_trial_count(max_epochs) == trials
