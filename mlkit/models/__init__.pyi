from .families import FAMILIES as FAMILIES, build_model as build_model
from .retrieval import TwoTower as TwoTower
