from .compilation import compile_model as compile_model
from .compilation import set_seed as set_seed
from .distribution import make_strategy as make_strategy
from .distribution import prepare_devices as prepare_devices
from .history import History as History
from .trainer import fit as fit
from .transfer import (
    load_warm_start_data as load_warm_start_data,
)
from .transfer import (
    restore_model as restore_model,
)
from .transfer import (
    save_optimizer as save_optimizer,
)
from .transfer import (
    warm_start as warm_start,
)
