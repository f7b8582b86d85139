from .compression_report import compress as compress
from .convert import export_run as export_run
from .litert import convert_model as convert_model
from .litert_runtime import load_litert as load_litert
from .model_card import write_card as write_card
from .parity import check_parity as check_parity
from .saved_model import export_saved_model as export_saved_model
from .saved_model import load_saved_model as load_saved_model
