"""uvicorn: its HTTP protocol class, its signal handling and its TLS context; tested with uvicorn 0.54."""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

_CLOSE = (b"connection", b"close")  # header
_METHODS = {
    *("connection_made", "connection_lost", "data_received", "send_400_response"),
    *("on_headers_complete", "on_body", "on_message_complete", "on_response_complete"),
}
_ATTRIBUTES = {
    *("app_state", "cycle", "expect_100_continue", "flow", "loop", "parser"),
    *("pipeline", "scope", "server_state", "tasks", "transport", "url"),
}

_MAX_PIPELINED = 16  # requests of a connection that wait for the response to an earlier one
_PARSE_BYTES = 65_536  # bytes parsed at once, which may hold some thousand requests

Respond = Callable[[Any, dict, None, bytes], Awaitable[tuple[int, list[tuple[bytes, bytes]], bytes]]]


def has_protocol_internals() -> bool:
    """Whether uvicorn's HTTP protocol has the methods and attributes that the subclasses below use."""
    try:
        from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
    except ImportError:
        return False
    assigned = {*HttpToolsProtocol.__init__.__code__.co_names, *HttpToolsProtocol.on_message_begin.__code__.co_names}
    return vars(HttpToolsProtocol).keys() >= _METHODS and assigned >= _ATTRIBUTES and 200 in STATUS_LINE


def guarded_protocol(
    idle_seconds: float,  # after which a connection without a complete request is closed
    error_body: Callable[[str], bytes],  # JSON body for a message
    connection_state: Callable[[asyncio.BaseTransport], Mapping[str, Any]],  # added to each request's `scope["state"]`
) -> type:
    """HTTP protocol that closes idle connections, limits pipelined requests and answers malformed ones in JSON.

    Sockets are limited. Without this, a client that opens connections and sends nothing, or half a head, could take
    all of them. Memory is limited, too: uvicorn reads on after each response, however many requests of the connection
    are waiting, so a client that sends small requests and reads no response could fill it.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class GuardedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._unparsed = b""
            self._idle_timer = self.loop.call_later(idle_seconds, self._check_idle, None)
            if state := connection_state(transport):
                self.app_state = self.app_state | state

        def connection_lost(self, exc: Exception | None) -> None:
            self._idle_timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._unparsed and len(data) <= _PARSE_BYTES and len(self.pipeline) <= _MAX_PIPELINED:
                super().data_received(data)
            else:
                self._unparsed += data
                self._parse_pipelined()

        def _parse_pipelined(self) -> None:
            while self._unparsed and len(self.pipeline) <= _MAX_PIPELINED and not self.transport.is_closing():
                data, self._unparsed = self._unparsed[:_PARSE_BYTES], self._unparsed[_PARSE_BYTES:]
                super().data_received(data)
            if self._unparsed:
                self.flow.pause_reading()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if len(self.pipeline) > _MAX_PIPELINED:
                self.flow.pause_reading()
            elif self._unparsed:
                self.flow.pause_reading()
                self.loop.call_soon(self._parse_pipelined)

        def _check_idle(self, last_cycle: Any) -> None:  # latest request at the previous check
            if self.cycle is last_cycle and (last_cycle is None or last_cycle.response_complete):
                self.transport.close()
            else:
                self._idle_timer = self.loop.call_later(idle_seconds, self._check_idle, self.cycle)

        def send_400_response(self, msg: str) -> None:
            body = error_body(msg)
            head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    return GuardedProtocol


@dataclass(slots=True)
class _DirectCycle:
    """Request that arrived complete, with the attributes that uvicorn expects of its own request cycles."""

    keep_alive: bool
    response_complete: bool = False
    disconnected: bool = False

    message_event: ClassVar = asyncio.Event()  # nothing waits for it


def direct_protocol(
    protocol: type,  # of `guarded_protocol`
    find_target: Callable[[bytes], Any],  # target of a URL; None: left to the ASGI application
    respond: Respond,  # target, scope, None, body -> status, headers, body
    body_bytes: int,  # largest body; larger ones are left to the ASGI application
) -> type:
    """HTTP protocol that passes a complete POST request to `respond` without an ASGI cycle.

    ASGI covers bodies and responses in any number of pieces, which costs a third of a small prediction. A request that
    arrives complete, in one packet, goes straight to `respond`, and its response is written at once. Every other
    request takes uvicorn's way, also those that arrive while the previous one of the connection is in progress.
    """
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE

    class DirectProtocol(protocol):
        _target: Any = None  # of a request whose body may have arrived with its head

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._target is not None:
                self._leave_to_uvicorn()

        def on_headers_complete(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and not self.expect_100_continue and self.parser.get_method() == b"POST":
                self._target, self._parts = find_target(self.url), []
            if self._target is None:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._target is None:
                super().on_body(body)
            else:
                self._parts.append(body)

        def on_message_complete(self) -> None:
            if self._target is not None and sum(map(len, self._parts)) > body_bytes:
                self._leave_to_uvicorn()
            if self._target is None:
                super().on_message_complete()
                return
            target, self._target = self._target, None
            self.cycle = _DirectCycle(self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive())
            self.scope |= {"method": "POST", "path": self.url.decode()}
            task = self.loop.create_task(self._respond(self.cycle, target, self.scope, b"".join(self._parts)))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)

        def _leave_to_uvicorn(self) -> None:
            self._target = None
            super().on_headers_complete()
            for part in self._parts:
                super().on_body(part)

        async def _respond(self, cycle: _DirectCycle, target: Any, scope: dict, body: bytes) -> None:
            try:
                status, headers, content = await respond(target, scope, None, body)
            except BaseException:  # it was cancelled
                self.transport.close()
                raise
            if self.flow.write_paused and not cycle.disconnected:
                await self.flow.drain()
            if not cycle.keep_alive and _CLOSE not in headers:
                headers.append(_CLOSE)
            cycle.response_complete = True
            if not cycle.disconnected:
                head = b"".join([b"%b: %b\r\n" % header for header in headers])
                self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, content))
                if _CLOSE in headers:
                    self.transport.close()
                self.on_response_complete()

        def on_response_complete(self) -> None:
            if self.pipeline or self._unparsed or self.transport.is_closing():
                super().on_response_complete()
            else:  # without uvicorn's timer for each request: the idle check closes quiet connections
                self.server_state.total_requests += 1
                self.flow.resume_reading()

        def send_400_response(self, msg: str) -> None:
            self._target = None
            super().send_400_response(msg)

    return DirectProtocol


def server_without_signals(
    config: Any,  # uvicorn.Config
) -> Any:  # uvicorn.Server
    """Server that leaves signals to its process, which has more to close than a web server."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)


def set_tls_context(
    server: Any,  # uvicorn.Server
    context: ssl.SSLContext,  # kept by the caller, who may load renewed certificates into it
) -> None:
    """Have a server use an existing TLS context; uvicorn's options only take file names."""
    server.config.load()
    server.config.ssl = context
