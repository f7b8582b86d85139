"""Metrics with confidence intervals, on slices, beside baselines and for groups."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
