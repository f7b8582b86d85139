"""Private interfaces of Keras Tuner: oracles that write no files and can be replayed."""

from typing import Any

import numpy as np
from keras_tuner import HyperParameters, Objective
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle


def disable_files(
    oracle: Any,
) -> None:
    """Keep an oracle from writing its state and its trials to files."""
    oracle.save = lambda: None
    oracle._save_trial = lambda trial: None


def get_seed_state(
    oracle: Any,
) -> int:
    """State of an oracle's random draws."""
    return oracle._seed_state


def set_seed_state(
    oracle: Any,
    state: int,  # from `get_seed_state`
) -> None:
    """Restore the state of an oracle's random draws."""
    oracle._seed_state = state


def seed_acquisition(
    oracle: BayesianOptimizationOracle,
    seed: int,
) -> None:
    """Seed the random start points of the acquisition function's optimization."""
    oracle._random_state = np.random.RandomState(seed)


def is_duplicate(
    oracle: Any,
    values: dict[str, Any],  # hyperparameter -> value
) -> bool:
    """Whether an oracle has suggested these values before."""
    return oracle._duplicate(values)


def sample_values(
    oracle: BayesianOptimizationOracle,
) -> dict[str, Any]:  # status and values, as `populate_space` returns them
    """Suggest random values that have not been suggested before."""
    return oracle._random_populate_space()


def hyperband_trial_count(
    max_epochs: int,  # epochs of the longest training
) -> int:
    """Number of trials of one Hyperband iteration; a promoted trial counts again in each round."""
    oracle = HyperbandOracle(Objective("loss", "min"), max_epochs=max_epochs, hyperparameters=HyperParameters(), seed=1)
    brackets = range(oracle._get_num_brackets())
    return sum(
        oracle._get_size(bracket, round_) for bracket in brackets for round_ in range(oracle._get_num_rounds(bracket))
    )
