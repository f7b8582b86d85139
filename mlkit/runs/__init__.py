"""The run store: what explains a run and repeats it, queries over runs, and their differences."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
