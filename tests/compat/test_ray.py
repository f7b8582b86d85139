"""The private APIs of Ray that mlkit uses exist and do what it expects."""

from collections.abc import Iterator

import pytest

from mlkit._compat.ray import get_cluster_value, put_cluster_value, redirect_node_output

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'mlkit[ray]'")


def test_node_output_is_redirected_and_restored() -> None:
    worker, lines = ray._private.worker, []
    original = worker.print_to_stdstream
    with redirect_node_output(lines.append):
        worker.print_to_stdstream({"lines": ["A node has died."]}, ignore_prefix=False)
    assert lines == [["A node has died."]]
    assert worker.print_to_stdstream is original


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster in this process; Ray gives a node half a minute to start, which a busy machine may exceed."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Ray would write a token to ~/.ray, which later clusters would use
    for attempts_left in reversed(range(3)):
        try:
            ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
            break
        except Exception:
            ray.shutdown()
            if not attempts_left:
                raise
    yield
    ray.shutdown()


@pytest.mark.slow
def test_cluster_values_are_stored_and_replaced(cluster: None) -> None:
    assert get_cluster_value(b"mlkit-test") is None
    for value in (b"first", b"second"):
        put_cluster_value(b"mlkit-test", value)
        assert get_cluster_value(b"mlkit-test") == value
