"""uvicorn's private interfaces: the installed version has them, and the functions that use them work."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlkit._compat.uvicorn import (
    direct_protocol,
    guarded_protocol,
    has_protocol_internals,
    server_without_signals,
    set_tls_context,
)
from tests.conftest import MemoryTransport


async def application(scope: dict, receive: Callable, send: Callable) -> None:
    """ASGI application that responds with the certificate in the scope's state."""
    body = scope["state"].get("certificate", "asgi").encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def run(protocol: type, packets: list[bytes], until: Callable[[MemoryTransport], bool]) -> MemoryTransport:
    """Send packets over one connection, and wait for a condition."""

    async def story() -> MemoryTransport:
        config = uvicorn.Config(application, http=protocol, lifespan="off", log_level="error")
        server, transport = uvicorn.Server(config), MemoryTransport()
        config.load()
        connection = protocol(config, server.server_state, {})
        connection.connection_made(transport)
        for packet in packets:
            connection.data_received(packet)
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while not until(transport):
                await asyncio.sleep(0.001)
        connection.connection_lost(ConnectionResetError())
        return transport

    return asyncio.run(story())


def guarded(idle_seconds: float = 60.0, state: dict[str, str] | None = None) -> type:
    return guarded_protocol(idle_seconds, lambda message: b'{"error": "%b"}' % message.encode(), lambda _: state or {})


def request(method: str, path: str, body: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def test_the_installed_uvicorn_has_the_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_protocol_internals()
    monkeypatch.delattr(HttpToolsProtocol, "on_response_complete")
    assert not has_protocol_internals()


def test_a_guarded_protocol_closes_idle_connections_and_answers_malformed_requests_in_json() -> None:
    assert run(guarded(0.01), [b"GET /li"], lambda transport: transport.closed).written == b""
    refused = run(guarded(), [b"nonsense\r\n\r\n"], lambda transport: transport.closed)
    assert refused.written.startswith(b"HTTP/1.1 400")
    assert refused.written.endswith(b'{"error": "Invalid HTTP request received."}')
    certified = run(guarded(state={"certificate": "webshop"}), [request("GET", "/")], lambda t: b"webshop" in t.written)
    assert not certified.closed


def test_a_direct_protocol_responds_without_asgi_and_leaves_the_rest_to_it() -> None:
    async def respond(target: str, scope: dict, receive: None, body: bytes) -> tuple[int, list, bytes]:
        content = b"%b %b %b" % (target.encode(), scope["path"].encode(), body)
        return 200, [(b"content-length", b"%d" % len(content))], content

    protocol = direct_protocol(guarded(), lambda url: "direct" if url == b"/predict" else None, respond, 100)

    def body_of(*packets: bytes) -> bytes:
        finished = run(protocol, list(packets), lambda t: t.written.endswith((b"asgi", b"xyz")))
        return finished.written.rpartition(b"\r\n\r\n")[2]

    whole = request("POST", "/predict", "xyz")
    assert body_of(whole) == b"direct /predict xyz"
    assert body_of(whole[:-1], whole[-1:]) == b"asgi"
    assert body_of(request("POST", "/other", "xyz")) == b"asgi"
    assert body_of(request("GET", "/predict")) == b"asgi"
    assert body_of(request("POST", "/predict", "x" * 101)) == b"asgi"


def test_a_server_leaves_signals_to_its_process() -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    server = server_without_signals(uvicorn.Config(application))
    assert isinstance(server, uvicorn.Server)
    with server.capture_signals():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_uses_an_existing_tls_context() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server: Any = uvicorn.Server(uvicorn.Config(application, lifespan="off"))
    set_tls_context(server, context)
    assert server.config.ssl is context
    assert server.config.loaded
