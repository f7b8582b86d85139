from .baselines import measure_baselines as measure_baselines
from .evaluator import Evaluation as Evaluation
from .evaluator import evaluate as evaluate
from .predictions import Predictions as Predictions
from .predictions import make_report as make_report
from .slices import find_weak_slices as find_weak_slices
from .slices import measure_slices as measure_slices
