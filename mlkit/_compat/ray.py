"""Private interfaces of Ray 2.60: the driver's standard output, the cluster's key-value store, Serve's proxies."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


@contextlib.contextmanager
def redirect_node_output(
    write: Callable[[Any], None],  # receives the lines that Ray would print about a node
) -> Iterator[None]:
    """Context manager that redirects what Ray prints about its nodes.

    Ray prints half a page to standard output when a node dies, and has no option to turn it off. Private:
    `ray._private.worker.print_to_stdstream`. Where Ray no longer has it, the output is not redirected.
    """
    import ray

    worker = getattr(ray._private, "worker", None)
    original = getattr(worker, "print_to_stdstream", None)
    if original is None:
        yield
        return
    worker.print_to_stdstream = lambda data, **_: write(data.get("lines"))
    try:
        yield
    finally:
        worker.print_to_stdstream = original


def put_cluster_value(
    key: bytes,
    value: bytes,
) -> None:
    """Store a value for the lifetime of the connected cluster, replacing an earlier one.

    Ray has no public key-value store that is consistent for all drivers. Private:
    `ray.experimental.internal_kv._internal_kv_put`.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True)


def get_cluster_value(
    key: bytes,
) -> bytes | None:  # None when the key is not set
    """Read a value that put_cluster_value stored. Private: `ray.experimental.internal_kv._internal_kv_get`."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(key)


class ServeConfiguration(NamedTuple):
    """Ports and proxies of a running Ray Serve instance."""

    host: str
    port: int
    grpc_port: int | None  # None: no gRPC
    has_haproxy: bool


def running_configuration(
    ray: Any,  # the module, connected to a cluster
) -> ServeConfiguration | None:
    """Configuration of the Ray Serve instance in a cluster; None where none is running."""
    try:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    methods = (controller.get_http_config, controller.get_grpc_config, controller.get_proxies)
    http, grpc, proxies = ray.get([method.remote() for method in methods])
    grpc_port = grpc.port if grpc.grpc_servicer_functions else None
    return ServeConfiguration(
        http.host, http.port, grpc_port, any("HAProxy" in repr(proxy) for proxy in proxies.values())
    )


def pass_through(
    server: Any,  # gRPC server of a Ray Serve proxy
    service: str,  # full name
) -> None:
    """Have a proxy handle a service itself, rather than call a replica."""
    server.add_passthrough_service(service)
