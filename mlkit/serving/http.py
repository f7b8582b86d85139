"""HTTP server of one process: uvicorn, with a direct path for predictions that arrive in one packet."""

import functools
import logging
from typing import Any

from mlkit.errors import MissingDependencyError
from mlkit.serving.options import ServerOptions
from mlkit.serving.rest import CERTIFICATE, INFERENCE, RestApplication, Target, allow_origins, error_body, read_path
from mlkit.serving.tls import certificate_name

_log = logging.getLogger("mlkit.serving")
IDLE_SECONDS = 75  # between two idle checks of a connection; without a request in between, it is closed


def _connection_state(transport: Any) -> dict[str, str]:
    """Name in the client certificate of a connection."""
    name = certificate_name(transport.get_extra_info("peercert"))
    return {CERTIFICATE: name} if name else {}


@functools.lru_cache(maxsize=1024)
def _find_inference_target(url: bytes) -> Target | None:
    """Target of a prediction request; None for other URLs and those with escapes or queries."""
    target = None if not url.isascii() or any(sign in url for sign in b"%?#") else read_path(url.decode())
    return target if target and target.verb in INFERENCE else None


def _protocol(application: RestApplication, options: ServerOptions) -> type | str:
    """Protocol class for uvicorn; its own one where its internals are not as expected."""
    from mlkit._compat import uvicorn as compat

    if not compat.has_protocol_internals():
        _log.warning("This version of uvicorn is not supported by the fast HTTP path; requests take its standard path.")
        return "httptools"
    protocol = compat.guarded_protocol(IDLE_SECONDS, error_body, _connection_state)
    if options.cors_origins:  # the CORS middleware has to see every request
        return protocol
    return compat.direct_protocol(protocol, _find_inference_target, application.respond, application.body_bytes)


def make_web_server(
    application: RestApplication,
    options: ServerOptions,
) -> Any:  # uvicorn.Server
    """HTTP server that leaves signals to its process; raises MissingDependencyError."""
    try:
        import httptools  # noqa: F401
        import uvicorn

        from mlkit._compat.uvicorn import server_without_signals
    except ImportError as error:
        raise MissingDependencyError(f"{error}. The model server needs: pip install 'mlkit[serve]'") from error
    config = uvicorn.Config(
        allow_origins(application, options.cors_origins),
        http=_protocol(application, options),
        lifespan="off",
        ws="none",
        access_log=False,
        proxy_headers=False,  # only the admin API evaluates them
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=max(1, round(options.shutdown_grace_period)),
        timeout_keep_alive=IDLE_SECONDS,
    )
    return server_without_signals(config)
