"""The model server: REST and gRPC as TF Serving has them, batch prediction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
