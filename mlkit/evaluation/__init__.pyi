from .baselines import measure_baselines as measure_baselines
from .evaluator import Evaluation as Evaluation, evaluate as evaluate
from .predictions import Predictions as Predictions, make_report as make_report
from .slices import find_weak_slices as find_weak_slices, measure_slices as measure_slices
