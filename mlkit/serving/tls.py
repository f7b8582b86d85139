"""TLS of the model server: its certificate, client certificates (mTLS), and the names in them.

REST and gRPC use the same files. Renewed certificate files count for the next connection, without a restart; files
that do not fit together are ignored until they do. A new client authority needs a restart.
"""

import logging
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlkit.config import Settings
from mlkit.errors import InputError, MissingDependencyError, join_names
from mlkit.serving.auth import AuthOptions

_log = logging.getLogger("mlkit.auth")


def import_grpc() -> Any:
    """The module grpc; raises MissingDependencyError."""
    try:
        import grpc.aio
    except ImportError as error:
        raise MissingDependencyError(f"{error}. gRPC needs: pip install 'mlkit[serve]'") from error
    return grpc


class Tls:
    """TLS context of a server, with an optional authority for client certificates (mTLS)."""

    def __init__(
        self,
        certificate: Path | str,  # PEM file, with the intermediate certificates
        key: Path | str,  # PEM file of its private key, not encrypted
        client_ca: Path | str = "",  # PEM file of the client authority; empty: no client certificates
    ):
        self._certificate, self._key = Path(certificate), Path(key)
        self._client_ca = Path(client_ca) if client_ca else None
        self._loaded_revision = self._checked_revision = self._revision()
        self.context = self._new_context()

    def _new_context(self) -> ssl.SSLContext:
        def no_password() -> str:
            raise ValueError("the private key is encrypted, and a server has nobody to ask for the password")

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._certificate, self._key, no_password)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            files = join_names(map(str, self._paths))
            raise InputError(f"These files do not make a certificate to serve with: {files}: {error}") from None
        return context

    @property
    def _paths(self) -> list[Path]:
        return [path for path in (self._certificate, self._key, self._client_ca) if path]

    def _revision(self) -> list[tuple]:
        """Identity of the files' present content."""
        try:
            return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self._paths)]
        except OSError as error:
            raise InputError(f"There is no {error.filename}.") from None

    def refresh(self) -> bool:  # whether new files were loaded
        """Load renewed certificate files; to be called regularly."""
        try:
            revision = self._revision()
            if revision == self._checked_revision:
                return False
            self._checked_revision = revision
            self._new_context()  # raises where they do not fit together
            self.context.load_cert_chain(self._certificate, self._key)
        except InputError as error:
            _log.warning("The renewed certificate is not used: %s", error)
            return False
        self._loaded_revision = revision
        return True

    def grpc_credentials(self) -> Any:  # grpc.ServerCredentials
        """The same files as credentials for gRPC; raises MissingDependencyError."""
        grpc, used = import_grpc(), self._loaded_revision

        def read() -> Any:
            pair = (self._key.read_bytes(), self._certificate.read_bytes())
            return grpc.ssl_server_certificate_configuration([pair], self._client_ca and self._client_ca.read_bytes())

        def read_renewed() -> Any:
            nonlocal used
            if self._loaded_revision == used:
                return None
            used = self._loaded_revision
            return read()

        return grpc.dynamic_ssl_server_credentials(
            read(), read_renewed, require_client_authentication=bool(self._client_ca)
        )


@dataclass(frozen=True)
class TlsOptions:
    """TLS files as the settings name them; sent to the server's processes."""

    certificate: str = ""  # PEM file
    key: str = ""  # PEM file of the private key
    client_ca: str = ""  # PEM file of the client authority

    def open(self) -> Tls | None:
        """Load the files; None without a certificate. Raises InputError for files that cannot be used."""
        if not self.certificate and (self.key or self.client_ca):
            raise InputError("TLS needs the server's certificate: auth.certificate, beside auth.private_key.")
        return Tls(self.certificate, self.key, self.client_ca) if self.certificate else None


def read_options(
    settings: Settings,
) -> tuple[AuthOptions, TlsOptions]:
    """Options of the section `[auth]`, with paths relative to the project."""
    section = settings.auth

    def path(text: str) -> str:
        return str(settings.project / Path(text).expanduser()) if text else ""

    jwks = section.jwks if section.jwks.startswith(("http:", "https:")) else path(section.jwks)
    auth = AuthOptions(path(section.keys), jwks, section.issuer, section.audience)
    return auth, TlsOptions(path(section.certificate), path(section.private_key), path(section.client_ca))


# The name in a client certificate is verified by its authority. It grants no permission, which is what API keys and
# tokens are for; it appears in logs and in the audit log.
_MAX_NAME_LENGTH = 200  # characters: names come from outside


def certificate_name(
    certificate: Mapping[str, Any] | None,  # result of `ssl.SSLSocket.getpeercert`
) -> str:  # "" without a certificate, or without a name in it
    """Common name of an HTTPS client's certificate, else its first alternative name."""
    fields = certificate or {}
    common = [value for part in fields.get("subject", ()) for name, value in part if name == "commonName"]
    alternative = [value for _, value in fields.get("subjectAltName", ())]
    return next(filter(None, (*common, *alternative)), "")[:_MAX_NAME_LENGTH]


def grpc_certificate_name(
    auth_context: Mapping[str, Iterable[bytes]],  # result of `grpc.ServicerContext.auth_context`
) -> str:  # "" without a certificate, or without a name in it
    """Common name of a gRPC client's certificate, else its first alternative name."""
    names = (
        *auth_context.get("x509_common_name", ()),
        *auth_context.get("x509_subject_alternative_name", ()),
    )
    return next(filter(None, names), b"").decode(errors="replace")[:_MAX_NAME_LENGTH]
