"""TensorFlow work from notebook cell to served answer: notebooks as library, as jobs and as archived runs

Modules:

- `mlkit.export.protos`: Protocol Buffers messages of TensorFlow and TF Serving, and conversion of tensors, without TensorFlow."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
