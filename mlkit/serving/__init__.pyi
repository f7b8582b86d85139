from .batch_predict import predict_table as predict_table
from .options import ServerOptions as ServerOptions
from .runtimes import load_predictor as load_predictor
from .server import run_server as run_server
from .server import running_server as running_server
