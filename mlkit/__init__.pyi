from .data.dataset import load_dataset as load_dataset
from .evaluation.evaluator import evaluate as evaluate
from .export.saved_model import export_saved_model as export_saved_model
from .jobs.executor import run_job as run_job
from .models.families import build_model as build_model
from .runs.run import Run as Run
from .training.trainer import fit as fit
