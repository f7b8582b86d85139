from .gate import GateRules as GateRules, run_gate as run_gate
from .mlflow import ModelMirror as ModelMirror
from .resolve import resolve_model as resolve_model
from .signing import sign_folder as sign_folder, verify_folder as verify_folder
from .store import ModelVersion as ModelVersion, Registry as Registry
