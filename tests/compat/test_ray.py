"""The private interfaces of Ray that mlkit uses exist and do what it expects."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from mlkit._compat.ray import (
    get_cluster_value,
    pass_through,
    put_cluster_value,
    redirect_node_output,
    running_configuration,
)
from tests.conftest import free_port

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'mlkit[ray]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'mlkit[ray]'")


def test_node_output_is_redirected_and_restored() -> None:
    worker, lines = ray._private.worker, []
    original = worker.print_to_stdstream
    with redirect_node_output(lines.append):
        worker.print_to_stdstream({"lines": ["A node has died."]}, ignore_prefix=False)
    assert lines == [["A node has died."]]
    assert worker.print_to_stdstream is original


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster on this machine; a busy one may need several attempts to start it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
    for attempt in range(3):
        try:
            ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, num_cpus=1)
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_cluster_values_are_stored_and_replaced(cluster: Any) -> None:
    assert get_cluster_value(b"mlkit-test") is None
    for value in (b"first", b"second"):
        put_cluster_value(b"mlkit-test", value)
        assert get_cluster_value(b"mlkit-test") == value


@pytest.mark.slow
def test_the_configuration_is_that_of_the_running_instance(cluster: Any) -> None:
    from ray import serve

    assert running_configuration(cluster) is None
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    configuration = running_configuration(cluster)
    serve.shutdown()
    assert (configuration.host, configuration.port, configuration.grpc_port) == ("127.0.0.1", port, None)
    assert not configuration.has_haproxy


@pytest.mark.slow
def test_a_proxy_passes_a_service_through() -> None:
    from ray.serve._private.grpc_util import gRPCGenericServer

    assert callable(gRPCGenericServer.add_passthrough_service)
    passed: list[str] = []

    class Server:
        add_passthrough_service = staticmethod(passed.append)

    pass_through(Server(), "grpc.reflection.v1alpha.ServerReflection")
    assert passed == ["grpc.reflection.v1alpha.ServerReflection"]
