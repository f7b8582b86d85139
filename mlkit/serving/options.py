"""Options of the model server, in one place; its processes receive them as JSON.

The processes do what the options said when the server started, whatever has become of the settings since.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mlkit.config import Settings
from mlkit.registry.audit_log import current_user
from mlkit.serving.auth import Audit, AuthOptions
from mlkit.serving.batcher import BatchingConfig
from mlkit.serving.sources import FolderSource, RegistrySource, Source
from mlkit.serving.tls import TlsOptions


@dataclass(frozen=True)
class ServedPath:
    """Model to serve: a name, and the location of its versions."""

    name: str  # name in URLs
    path: str = ""  # SavedModel, folder of versions, or run
    reference: str = ""  # in the registry: churn, churn@champion, churn/3

    def source(self, options: "ServerOptions") -> Source:
        """Source of the model's versions; raises NotFoundError."""
        if self.reference:
            return RegistrySource(self.reference, options.registry or None, options.verify)
        return FolderSource(self.path, options.runtime)


@dataclass(frozen=True)
class LogOptions:
    """Logs of a server. No request data is logged by default, and sensitive features never."""

    folder: str = ""  # folder of the audit log and the request log; empty: neither is written
    log_format: str = "text"  # format of log lines: text or json
    access_log: str = "errors"  # requests that get a log line: all, errors or none
    request_sampling_rate: float = 0.0  # sampling rate of the request log
    request_log_format: str = "jsonl"  # format of the request log, one of mlkit.serving.request_log.LOG_FORMATS
    masked_features: tuple[str, ...] = ()  # features that must not appear in logs

    @classmethod
    def from_settings(cls, settings: Settings) -> "LogOptions":
        """Options of the section `[serving]`."""
        section = settings.serving
        masked = tuple(filter(None, (name.strip() for name in section.masked_features.split(","))))
        return cls(
            str(section.logs),
            section.log_format,
            section.access_log,
            section.request_sampling_rate,
            section.request_log_format,
            masked,
        )

    def audit(self) -> Audit | None:
        """Audit log of administrative actions; None without a folder."""
        return Audit(Path(self.folder) / "audit.jsonl") if self.folder else None

    def record(
        self,
        action: str,
        result: str,
        **details: Any,  # JSON-compatible values
    ) -> None:
        """Record an action of the server's operator in the audit log; raises StorageError."""
        if audit := self.audit():
            audit.record(current_user(), action, result, **details)


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server."""

    models: tuple[ServedPath, ...]
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8501  # REST; 0: any free port
    grpc_port: int | None = None  # None: no gRPC
    processes: int = 1
    runtime: str = "tensorflow"  # one of mlkit.serving.runtimes.RUNTIMES
    precision: str = "float32"  # of converted models
    registry: str = ""  # folder; default: the setting registry.root
    verify: bool = True  # registered models must be signed
    batching: BatchingConfig = field(default_factory=BatchingConfig)  # batching and queue limits
    shadow: str = ""  # alias of the version that receives shadow traffic
    body_bytes: int = 64 * 2**20  # largest request body
    cache_bytes: int = 0  # size of the response cache; 0: no cache
    poll_interval: float = 0.5  # seconds between two polls of the sources
    shutdown_grace_period: float = 30.0  # seconds
    auth: AuthOptions = field(default_factory=AuthOptions)  # authentication; default: none
    tls: TlsOptions = field(default_factory=TlsOptions)
    logs: LogOptions = field(default_factory=LogOptions)
    cors_origins: tuple[str, ...] = ()

    @property
    def public(self) -> bool:
        """Whether other machines can reach the server."""
        return not self.host.startswith(("127.", "::1", "localhost"))

    @property
    def reuse_port(self) -> bool:
        """Whether each process has a socket of its own: a shared one gives most connections to one process."""
        return self.processes > 1 and sys.platform == "linux"

    def to_json(self) -> str:
        """Serialize for another process."""
        return _SERIALIZER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "ServerOptions":
        """Options from `to_json`."""
        return _SERIALIZER.validate_json(text)


_SERIALIZER = TypeAdapter(ServerOptions)
