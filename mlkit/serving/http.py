"""HTTP over uvicorn: protocol settings and a request cycle with less overhead."""

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mlkit.errors import MissingDependencyError, ServingError
from mlkit.serving.options import ServerOptions
from mlkit.serving.protocol import write_error
from mlkit.serving.rest import CERTIFICATE, CLOSE, INFERENCE, RestApplication, Target, allow_origins, read_path
from mlkit.serving.tls import certificate_name

_QUIET = 75  # seconds between two looks at a connection; without a request in the meantime it is closed


def _protocol() -> type:
    """HTTP as uvicorn speaks it, but for these things; raises MissingDependencyError."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watching = self.loop.call_later(_QUIET, self._watch, None)
            if name := certificate_name(transport.get_extra_info("peercert")):
                self.app_state = self.app_state | {CERTIFICATE: name}

        def connection_lost(self, exc: Exception | None) -> None:
            self._watching.cancel()
            super().connection_lost(exc)

        def _watch(self, seen: Any) -> None:  # the latest request, when it was looked last
            if self.cycle is seen and (seen is None or seen.response_complete):
                self.transport.close()
            else:
                self._watching = self.loop.call_later(_QUIET, self._watch, self.cycle)

        def send_400_response(self, msg: str) -> None:
            body = write_error(ServingError("INVALID_ARGUMENT", msg))
            head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    return Protocol


@dataclass(slots=True)
class _Exchange:
    """A request that came whole: what uvicorn has to know of it, as it does of its own cycles."""

    keep_alive: bool
    response_complete: bool = False
    disconnected: bool = False

    message_event: ClassVar = asyncio.Event()  # nobody waits for it


@functools.lru_cache(maxsize=1024)
def _asked_for(url: bytes) -> Target | None:
    """The prediction that a URL asks for, if it does and is written plainly."""
    target = None if not url.isascii() or any(sign in url for sign in b"%?#") else read_path(url.decode())
    return target if target and target.verb in INFERENCE else None


def _quick_protocol(application: RestApplication) -> type:
    """HTTP with a shorter way for predictions that are asked for in one packet."""
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE

    class Protocol(_protocol()):
        _target: Target | None = None  # of a request whose body may have come with its head

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._target is not None:
                self._pass_on()

        def on_headers_complete(self) -> None:
            free = self.cycle is None or self.cycle.response_complete
            if free and not self.expect_100_continue and self.parser.get_method() == b"POST":
                self._target, self._parts = _asked_for(self.url), []
            if self._target is None:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self._target is None:
                super().on_body(body)
            else:
                self._parts.append(body)

        def on_message_complete(self) -> None:
            if self._target is not None and sum(map(len, self._parts)) > application.body_bytes:
                self._pass_on()
            if self._target is None:
                super().on_message_complete()
                return
            target, self._target = self._target, None
            self.cycle = _Exchange(self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive())
            self.scope |= {"method": "POST", "path": self.url.decode()}
            task = self.loop.create_task(self._answer(self.cycle, target, self.scope, b"".join(self._parts)))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)

        def _pass_on(self) -> None:
            """Have uvicorn go on with a request."""
            self._target = None
            super().on_headers_complete()
            for part in self._parts:
                super().on_body(part)

        async def _answer(self, exchange: _Exchange, target: Target, scope: dict, body: bytes) -> None:
            try:
                status, told, answer = await application.answer(target, scope, None, body)
            except BaseException:  # it was cancelled
                self.transport.close()
                raise
            if self.flow.write_paused and not exchange.disconnected:
                await self.flow.drain()
            if not exchange.keep_alive and CLOSE not in told:
                told.append(CLOSE)
            exchange.response_complete = True
            if not exchange.disconnected:
                head = b"".join([b"%b: %b\r\n" % header for header in told])
                self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, answer))
                if CLOSE in told:
                    self.transport.close()
                self.on_response_complete()

        def on_response_complete(self) -> None:
            if self.pipeline or self.transport.is_closing():
                super().on_response_complete()
            else:  # without a timer for each request, since `_watch` closes what is quiet
                self.server_state.total_requests += 1
                self.flow.resume_reading()

        def send_400_response(self, msg: str) -> None:
            self._target = None
            super().send_400_response(msg)

    return Protocol


def _uvicorn(application: RestApplication, options: ServerOptions) -> Any:
    """A web server that leaves signals to us; raises MissingDependencyError."""
    protocol = _protocol() if options.origins else _quick_protocol(application)  # pages are asked for their origin
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        allow_origins(application, options.origins),
        http=protocol,
        lifespan="off",
        ws="none",
        access_log=False,
        proxy_headers=False,  # `administration` looks at them itself; nobody else has to
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=max(1, round(options.grace)),
        timeout_keep_alive=_QUIET,
    )
    return Server(config)
