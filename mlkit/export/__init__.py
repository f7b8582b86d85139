"""SavedModel and what is converted from it, with checks that all formats predict the same."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
