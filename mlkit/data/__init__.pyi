from .cleaning import clean as clean
from .dataset import Dataset as Dataset, load_dataset as load_dataset, reload_dataset as reload_dataset
from .drift import measure_drift as measure_drift
from .io import read_table as read_table, scan_table as scan_table, write_table as write_table
from .schema import Schema as Schema, infer_schema as infer_schema, load_schema as load_schema
from .statistics import Statistics as Statistics, describe as describe
from .streaming import StreamedDataset as StreamedDataset, open_dataset as open_dataset
from .validation import validate as validate
