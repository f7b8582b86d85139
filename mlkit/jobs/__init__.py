"""Parameterized notebooks executed as runs: one, a sweep of many, or one over several processes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
