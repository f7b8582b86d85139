"""Ray Serve: the configuration of a running instance, its gRPC servers, and Ray's key-value store; tested with 2.60."""

from typing import Any, NamedTuple


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


def put_value(key: bytes, value: bytes) -> None:
    """Store a value in the key-value store of the connected cluster."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, value, overwrite=True)


def get_value(key: bytes) -> bytes | None:
    """Value in the key-value store of the connected cluster."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(key)
