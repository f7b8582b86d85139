"""Fixtures that several tests of the registry share."""

from pathlib import Path

import pytest

from mlkit.registry.signing import new_key


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with Alice's keys, in which we stand."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(project / "secret" / "alice.pem"))
    new_key(project / "secret" / "alice.pem", project / "keys" / "alice.pub")
    return project
