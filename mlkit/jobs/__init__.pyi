from .distributed import run_distributed as run_distributed
from .executor import resume_run as resume_run
from .executor import run_job as run_job
from .notebook import list_jobs as list_jobs
from .parameters import ParameterSchema as ParameterSchema
from .reproduction import reproduce as reproduce
from .sweep import resume_sweep as resume_sweep
from .sweep import run_sweep as run_sweep
