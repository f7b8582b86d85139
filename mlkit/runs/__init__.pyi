from .compare import compare_runs as compare_runs
from .diff import diff_runs as diff_runs
from .run import Run as Run
from .store import RunStore as RunStore
