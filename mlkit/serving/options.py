"""Options of the model server."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlkit.config import Settings
from mlkit.registry.audit_log import current_user
from mlkit.serving.auth import AuthOptions, Audit
from mlkit.serving.batcher import BatchingConfig
from mlkit.serving.sources import FolderSource, RegistrySource, Source
from mlkit.serving.tls import TlsOptions


@dataclass(frozen=True)
class ServedPath:
    """A model to be served, and where its versions are."""

    name: str  # in URLs
    path: str = ""  # of a SavedModel, of a folder of versions, or of a run
    reference: str = ""  # in the registry: churn, churn@champion, churn/3

    def source(self, options: "ServerOptions") -> Source:
        """Where its versions come from; raises NotFoundError."""
        if self.reference:
            return RegistrySource(self.reference, options.registry or None, options.verify)
        return FolderSource(self.path, options.runtime)


@dataclass(frozen=True)
class LogOptions:
    """What a server writes down."""

    folder: str = ""  # of the audit log, and of requests that are logged; empty: neither is written
    lines: str = "text"  # or json
    requests: str = "errors"  # that get a line: all, errors or none
    share: float = 0.0  # of requests that are logged with their answers
    form: str = "jsonl"  # of mlkit.serving.request_log.LOG_FORMATS
    sensitive: tuple[str, ...] = ()  # features that are told nowhere

    @classmethod
    def from_settings(cls, settings: Settings) -> "LogOptions":
        """What the section `[serving]` says."""
        told = settings.serving
        sensitive = tuple(filter(None, (name.strip() for name in told.sensitive.split(","))))
        return cls(str(told.logs), told.lines, told.requests, told.share, told.form, sensitive)

    def audit(self) -> Audit | None:
        """The record of administrative acts, if one is wanted."""
        return Audit(Path(self.folder) / "audit.jsonl") if self.folder else None

    def record(
        self,
        what: str,
        result: str,
        **facts: Any,  # ready for JSON
    ) -> None:
        """Write down what whoever runs the server has done; raises StorageError."""
        if audit := self.audit():
            audit.add(current_user(), what, result, **facts)


@dataclass(frozen=True)
class ServerOptions:
    """What a server is told; it travels to its processes as JSON."""

    models: tuple[ServedPath, ...]
    host: str = "127.0.0.1"
    port: int = 8501  # 0: any that is free
    grpc_port: int | None = None  # None: no gRPC
    processes: int = 1
    runtime: str = "tensorflow"  # of mlkit.serving.runtimes.RUNTIMES
    kind: str = "float32"  # of converted models
    registry: str = ""  # folder; by default the setting registry.root
    verify: bool = True  # models of the registry have to be signed
    limits: BatchingConfig = field(default_factory=BatchingConfig)
    shadow: str = ""  # alias of the version that is asked in the shadow of the default
    body_bytes: int = 64 * 2**20
    cache_bytes: int = 0
    poll: float = 0.5  # seconds between two looks at the sources
    grace: float = 30.0  # seconds that requests have when the server stops
    access: AuthOptions = field(default_factory=AuthOptions)  # who may ask; by default everybody
    tls: TlsOptions = field(default_factory=TlsOptions)
    logs: LogOptions = field(default_factory=LogOptions)
    origins: tuple[str, ...] = ()  # of web pages that may ask from a browser

    @property
    def public(self) -> bool:
        """Whether other machines reach it."""
        return not self.host.startswith(("127.", "::1", "localhost"))

    @property
    def divided(self) -> bool:
        """Whether each process has a socket of its own: one that is common to all gives most callers to one of them."""
        return self.processes > 1 and sys.platform == "linux"

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ServerOptions":
        """From another process."""
        told = json.loads(text)
        told["models"] = tuple(ServedPath(**each) for each in told["models"])
        told["logs"]["sensitive"], told["origins"] = tuple(told["logs"]["sensitive"]), tuple(told["origins"])
        parts = {"limits": BatchingConfig, "access": AuthOptions, "tls": TlsOptions, "logs": LogOptions}
        return cls(**told | {name: part(**told[name]) for name, part in parts.items()})
