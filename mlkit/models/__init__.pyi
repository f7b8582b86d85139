from .families import FAMILIES as FAMILIES
from .families import build_model as build_model
from .retrieval import TwoTower as TwoTower
