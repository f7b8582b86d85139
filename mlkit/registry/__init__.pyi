from .gate import GateRules as GateRules
from .gate import run_gate as run_gate
from .mlflow import ModelMirror as ModelMirror
from .resolve import resolve_model as resolve_model
from .signing import sign_folder as sign_folder
from .signing import verify_folder as verify_folder
from .store import ModelVersion as ModelVersion
from .store import Registry as Registry
