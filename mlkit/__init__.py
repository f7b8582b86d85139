"""TensorFlow work from notebook cell to served prediction: notebooks as library, as jobs and as archived runs

Modules:

- `mlkit.data.dataset_html`: HTML representation of a data set in a notebook.
- `mlkit.export.protos`: Protocol Buffers messages of TensorFlow and TF Serving, and conversion of tensors, without TensorFlow.
- `mlkit.jobs.distributed`: One job in several processes that train one model together: started, supervised, restarted when one of them dies.
- `mlkit.jobs.kernels`: Warm Jupyter kernels: forked in milliseconds from a server that has imported TensorFlow, and ended with their owner.
- `mlkit.jobs.ray`: Runs on a Ray cluster: the connection, what a task needs to execute a run on a node, and the backend of sweeps.
- `mlkit.serving.grpc_server`: TF Serving's gRPC services over the loaded versions, with health and reflection, on the server's event loop.
- `mlkit.serving.metrics`: Metrics of several processes: counters, gauges and histograms in memory-mapped files, exposed in Prometheus's format.
- `mlkit.serving.rest`: TF Serving's REST API over the loaded versions: predict, classify, regress, status and metadata.
- `mlkit.serving.server`: The model server: equal processes that serve on one port, and a supervisor that replaces those that die.
- `mlkit.serving.telemetry`: Telemetry of one process: metrics under TF Serving's names and our own, W3C traces, and structured log lines.
- `mlkit.serving.tls`: TLS of the model server: its certificate, client certificates (mTLS), and the names in them."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
