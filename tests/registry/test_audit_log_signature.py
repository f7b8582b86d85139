"""The signature of the audit log: made with each change, verified by hand, and what it finds."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlkit.errors import InputError
from mlkit.registry.audit_log import Event, decode_event, encode_event
from mlkit.registry.signing import new_key
from mlkit.registry.store import Registry
from mlkit.runs import RunStore


@pytest.fixture
def registry(place: Path) -> Registry:
    """A registry with three events."""
    with RunStore(place / "runs").create("train") as run:
        run.save_model(lambda folder: (folder / "saved_model.pb").write_text("the graph"))
    registry = Registry(place / "models")
    registry.register(run, "churn", force=True)
    for alias in ("champion", "challenger"):
        registry.promote("churn", 1, alias)
    return registry


def write_chain(registry: Registry, count: int, reason: str | None = None) -> None:
    """Write the first events anew, with all digests and the head as an attacker can compute them."""
    lines, previous = b"", ""
    for line in registry.log.path.read_bytes().splitlines()[:count]:
        fields = vars(decode_event(line)) | {"previous": previous, "digest": ""}
        encoded, previous = encode_event(Event(**fields | ({} if reason is None else {"reason": reason})))
        lines += encoded
    registry.log.path.write_bytes(lines)
    registry.log.head_path.write_text(json.dumps({"number": count, "digest": previous}))


def test_the_last_event_is_signed(registry: Registry, place: Path, mlkit: Callable) -> None:
    envelope = json.loads((place / "models" / "audit_log.sig").read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    key = serialization.load_pem_public_key((place / "keys" / "alice.pub").read_bytes())
    covered = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), covered, ec.ECDSA(hashes.SHA256()))
    last = json.loads(registry.log.path.read_bytes().splitlines()[-1])
    assert json.loads(payload)["subject"] == [{"name": "audit_log.jsonl", "digest": {"sha256": last["digest"]}}]
    code, printed, _ = mlkit("models", "check", "--json")
    assert (code, json.loads(printed)) == (
        0,
        {"intact": True, "findings": [], "signer": "alice", "signed_event": last["number"]},
    )
    assert f"signed by alice up to event {last['number']}" in mlkit("models", "check")[1]


def test_a_truncated_log_is_found(registry: Registry, mlkit: Callable) -> None:
    write_chain(registry, 2)
    code, printed, _ = mlkit("models", "check", "--json")
    assert code == 1
    assert "the audit log was truncated: it has 2 events, and alice has signed 3" in json.loads(printed)["findings"]


def test_a_rewritten_log_is_found(registry: Registry, mlkit: Callable) -> None:
    write_chain(registry, 3, reason="it was like this")
    code, printed, _ = mlkit("models", "check", "--json")
    assert code == 1
    expected = "the audit log was rewritten: event 3 is not the one that alice has signed"
    assert expected in json.loads(printed)["findings"]


def test_a_forged_signature_is_found(registry: Registry, place: Path, mlkit: Callable) -> None:
    path = registry.log.signature_path
    envelope = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"])) | {"predicate": {"number": 2}}
    forged = base64.b64encode(json.dumps(statement).encode()).decode()
    for content, reason in (
        (envelope | {"payload": forged}, "not by alice, whose key it names"),
        (envelope | {"signatures": []}, "its signature is damaged"),
        (envelope | {"signatures": [{"keyid": "0" * 64, "sig": "AAAA"}]}, "0000000000000000, which is not trusted"),
    ):
        path.write_text(json.dumps(content))
        code, printed, _ = mlkit("models", "check", "--json")
        assert code == 1
        assert reason in json.loads(printed)["findings"][0]


def test_events_without_a_key_stay_unsigned(
    registry: Registry, place: Path, mlkit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "none.pem"))
    registry.remove_alias("churn", "challenger")
    code, printed, _ = mlkit("models", "check")
    assert code == 0
    assert "up to event 3; 1 later events are not signed" in " ".join(printed.split())


def test_a_key_with_a_passphrase_signs_where_the_settings_name_it(
    registry: Registry, place: Path, mlkit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_key(place / "secret" / "bob.pem", place / "keys" / "bob.pub", "open sesame")
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "secret" / "bob.pem"))
    registry.remove_alias("churn", "challenger")
    assert json.loads(mlkit("models", "check", "--json")[1])["signer"] == "alice"
    monkeypatch.setenv("MLKIT_SIGNING_PASSPHRASE", "env:PHRASE")
    monkeypatch.setenv("PHRASE", "open sesame")
    registry.promote("churn", 1, "challenger")
    assert json.loads(mlkit("models", "check", "--json")[1])["signer"] == "bob"
    monkeypatch.setenv("PHRASE", "another")
    before = registry.log.path.read_bytes()
    with pytest.raises(InputError, match="cannot be opened with this passphrase"):
        registry.remove_alias("churn", "challenger")
    assert registry.log.path.read_bytes() == before


def test_a_key_that_others_can_read_changes_nothing(registry: Registry, place: Path) -> None:
    before = registry.log.path.read_bytes()
    (place / "secret" / "alice.pem").chmod(0o644)
    with pytest.raises(InputError, match="can be read by others"):
        registry.remove_alias("churn", "challenger")
    assert registry.log.path.read_bytes() == before


def test_an_earlier_signature_is_no_finding_and_a_noted_digest_finds_it(registry: Registry, mlkit: Callable) -> None:
    earlier = registry.log.signature_path.with_name("earlier")
    shutil.copy(registry.log.signature_path, earlier)
    registry.remove_alias("churn", "challenger")
    noted = registry.events()[-1].digest
    write_chain(registry, 3)
    earlier.replace(registry.log.signature_path)
    registry.write_config()
    assert mlkit("models", "check")[0] == 0
    assert mlkit("models", "check", "--head", noted)[0] == 1
