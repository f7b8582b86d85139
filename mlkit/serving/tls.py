"""TLS and client certificates of the model server."""

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlkit.config import Settings
from mlkit.errors import InputError, MissingDependencyError, join_names
from mlkit.serving.auth import AuthOptions, _log


class Tls:
    """The certificate of a server, and whose certificates its clients have to show."""

    def __init__(
        self,
        certificate: Path | str,  # PEM, with those that lead up to its authority
        key: Path | str,  # PEM, its private key, not encrypted
        clients: Path | str = "",  # PEM: the authority of clients; empty: they need no certificate
    ):
        self._certificate, self._key, self._clients = Path(certificate), Path(key), Path(clients) if clients else None
        self._files = self._seen = self._token()
        self.context = self._new_context()

    def _new_context(self) -> ssl.SSLContext:
        def no_password() -> str:
            raise ValueError("the private key is encrypted, and a server has nobody to ask for the password")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._certificate, self._key, no_password)
            if self._clients:
                context.load_verify_locations(self._clients)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            files = join_names(str(path) for path in (self._certificate, self._key, self._clients) if path)
            raise InputError(f"These files do not make a certificate to serve with: {files}: {error}") from None
        return context

    def _token(self) -> list[tuple]:
        paths = [path for path in (self._certificate, self._key, self._clients) if path]
        try:
            return [(told.st_ino, told.st_size, told.st_mtime_ns) for told in map(Path.stat, paths)]
        except OSError as error:
            raise InputError(f"There is no {error.filename}.") from None

    def refresh(self) -> bool:  # whether there was something new
        """Take up renewed files: to be called now and then."""
        try:
            token = self._token()
            if token == self._seen:
                return False
            self._seen = token
            self._new_context()  # they fit together
            self.context.load_cert_chain(self._certificate, self._key)
        except InputError as error:
            _log.warning("The renewed certificate is not used: %s", error)
            return False
        self._files = token
        return True

    def credentials(self) -> Any:  # grpc.ServerCredentials
        """The same for gRPC; raises MissingDependencyError."""
        try:
            import grpc
        except ImportError as error:
            raise MissingDependencyError(f"{error}. gRPC needs: pip install 'mlkit[serve]'") from error
        used = self._files

        def read() -> Any:
            pair = (self._key.read_bytes(), self._certificate.read_bytes())
            return grpc.ssl_server_certificate_configuration([pair], self._clients and self._clients.read_bytes())

        def renewed() -> Any:
            nonlocal used
            if self._files == used:
                return None
            used = self._files
            return read()

        return grpc.dynamic_ssl_server_credentials(read(), renewed, require_client_authentication=bool(self._clients))


@dataclass(frozen=True)
class TlsOptions:
    """Certificates, as settings tell them; they travel to a server's processes."""

    certificate: str = ""
    key: str = ""
    clients: str = ""

    def open(self) -> Tls | None:
        """The files; None without a certificate. Raises InputError for some that cannot be used."""
        if not self.certificate and (self.key or self.clients):
            raise InputError("TLS needs the server's certificate: access.certificate, beside access.private_key.")
        return Tls(self.certificate, self.key, self.clients) if self.certificate else None


def read_options(
    settings: Settings,
) -> tuple[AuthOptions, TlsOptions]:
    """What the section `[access]` says, with files relative to the project."""
    told = settings.access

    def path(text: str) -> str:
        return str(settings.project / Path(text).expanduser()) if text else ""

    jwks = told.jwks if told.jwks.startswith(("http:", "https:")) else path(told.jwks)
    access = AuthOptions(path(told.keys), jwks, told.issuer, told.audience)
    return access, TlsOptions(path(told.certificate), path(told.private_key), path(told.clients))


_LONGEST_NAME = 200  # characters: names come from elsewhere


def certificate_name(
    certificate: Mapping[str, Any] | None,  # as `ssl.SSLSocket.getpeercert` tells it
) -> str:  # "" where there is none, or one without a name
    """Who has shown a certificate over HTTPS."""
    told = certificate or {}
    common = [value for part in told.get("subject", ()) for name, value in part if name == "commonName"]
    others = [value for _, value in told.get("subjectAltName", ())]
    return next(filter(None, (*common, *others)), "")[:_LONGEST_NAME]


def grpc_certificate_name(
    told: Mapping[str, Iterable[bytes]],  # as `grpc.ServicerContext.auth_context` tells it
) -> str:  # "" where there is none, or one without a name
    """Who has shown a certificate over gRPC."""
    names = (*told.get("x509_common_name", ()), *told.get("x509_subject_alternative_name", ()))
    return next(filter(None, names), b"").decode(errors="replace")[:_LONGEST_NAME]
