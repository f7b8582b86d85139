"""Signature layers: what is added to a signed run is signed by a further layer, and every fault in a layer is found."""

import base64
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("model_signing")

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from model_signing import hashing, signing

from mlkit.errors import InputError, SignatureError
from mlkit.registry.signing import KeySigner, TrustedKeys, new_key, read_public_keys, sign_folder, verify_folder
from mlkit.registry.store import Registry
from mlkit.runs import Run, RunStore
from tests.conftest import run_cli

LAYERS = {"alice": "saved_model/1/saved_model.pb", "bob": "litert/model.tflite", "carol": "tfjs/model.json"}
SIGNATURES = ("model.sig", "model.2.sig", "model.3.sig")


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the keys of three trusted signers, in which we stand."""
    monkeypatch.chdir(project)
    for name in LAYERS:
        new_key(project / "secret" / f"{name}.pem", project / "keys" / f"{name}.pub")
    return project


def add_layer(run: Run, place: Path, name: str) -> None:
    """Add the file of a signer to a run, rewrite the documents that an export rewrites, and sign."""
    path = run.folder / LAYERS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"by {name}")
    for document in ("model_card.md", "gate.json"):
        (run.folder / document).write_text(json.dumps({"passed": True, "by": name}))
        run.log_artifact(run.folder / document)
    sign_folder(run.folder, KeySigner(place / "secret" / f"{name}.pem"))


@pytest.fixture
def run(place: Path) -> Run:
    """A run with three signature layers."""
    with RunStore(place / "runs").create("train") as run:
        (run.folder / "notebook.ipynb").write_text('{"cells": []}')
    for name in LAYERS:
        add_layer(run, place, name)
    return run


def trusted(place: Path) -> TrustedKeys:
    return TrustedKeys(tuple(read_public_keys(place / "keys")))


def findings(place: Path, folder: Path) -> str:
    """The error of the verification."""
    with pytest.raises(SignatureError) as error:
        verify_folder(folder, trusted(place))
    return str(error.value)


def read_envelope(path: Path) -> tuple[bytes, bytes, dict]:
    """The bytes that a DSSE signature covers, the signature, and the in-toto statement."""
    envelope = json.loads(path.read_bytes())["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    covered = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    return covered, base64.b64decode(envelope["signatures"][0]["sig"]), json.loads(payload)


def test_each_layer_is_verified_by_hand_and_names_the_one_below(run: Run, place: Path) -> None:
    for number, name in enumerate(LAYERS):
        covered, signature, statement = read_envelope(run.folder / SIGNATURES[number])
        key = serialization.load_pem_public_key((place / "keys" / f"{name}.pub").read_bytes())
        key.verify(signature, covered, ec.ECDSA(hashes.SHA256()))
        with pytest.raises(InvalidSignature):
            key.verify(signature, covered + b" ", ec.ECDSA(hashes.SHA256()))
        resources = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
        below = SIGNATURES[number - 1] if number else None
        record = f"signed.{number + 1}.json" if number else "signed.json"
        expected = {LAYERS[name], "model_card.md", "gate.json", record} | ({below} if below else {"notebook.ipynb"})
        assert set(resources) == expected
        if below:
            assert resources[below] == hashlib.sha256((run.folder / below).read_bytes()).hexdigest()
    verified = verify_folder(run.folder, trusted(place))
    assert verified.signers == [layer.signer for layer in verified.layers] == list(LAYERS)


def test_a_layer_verifies_with_the_command_of_model_signing(run: Run, place: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(run.folder), "--ignore_unsigned_files"]
    for signature, name in (("model.3.sig", "carol"), ("model.3.sig", "bob")):
        options = ["--signature", str(run.folder / signature), "--public_key", str(place / "keys" / f"{name}.pub")]
        assert (subprocess.run([*command, *options]).returncode == 0) == (name == "carol")


@pytest.mark.parametrize("path", [*LAYERS.values(), "signed.json", "signed.2.json", "model_card.md", "notebook.ipynb"])
def test_a_changed_or_removed_file_of_each_layer_is_found(run: Run, place: Path, path: str) -> None:
    before = (run.folder / path).read_bytes()
    (run.folder / path).write_bytes(before + b" ")
    assert f"{path} has changed" in findings(place, run.folder)
    (run.folder / path).unlink()
    assert f"{path} is missing" in findings(place, run.folder)
    with pytest.raises(InputError, match=f"no layer is added: .*{path} is missing"):
        sign_folder(run.folder, KeySigner(place / "secret" / "alice.pem"))
    (run.folder / path).write_bytes(before)
    verify_folder(run.folder, trusted(place))


def test_a_document_cannot_be_set_back_to_the_digest_of_a_lower_layer(run: Run, place: Path) -> None:
    (run.folder / "gate.json").write_text(json.dumps({"passed": True, "by": "alice"}))
    assert "gate.json has changed" in findings(place, run.folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.sig").unlink(), "the signature layer 1 (model.sig) is missing"),
        (lambda folder: (folder / "model.2.sig").unlink(), "the signature layer 2 (model.2.sig) is missing"),
        (lambda folder: (folder / "model.3.sig").unlink(), "tfjs/model.json was added"),
        (lambda folder: swap(folder, "model.2.sig", "model.3.sig"), "model.2.sig was not made for model.sig"),
        (lambda folder: swap(folder, "model.sig", "model.2.sig"), "model.2.sig was not made for model.sig"),
        (lambda folder: shutil.copy(folder / "model.3.sig", folder / "model.4.sig"), "was not made for model.3.sig"),
        (lambda folder: (folder / "model.2.sig").write_text("{}"), "model.2.sig is damaged"),
    ],
)
def test_missing_and_reordered_layers_are_found(run: Run, place: Path, spoil: Callable, reason: str) -> None:
    spoil(run.folder)
    assert reason in findings(place, run.folder)


def swap(folder: Path, first: str, second: str) -> None:
    """Exchange two files."""
    texts = (folder / first).read_bytes(), (folder / second).read_bytes()
    (folder / second).write_bytes(texts[0])
    (folder / first).write_bytes(texts[1])


@pytest.mark.parametrize("name", LAYERS)
def test_the_signer_of_each_layer_has_to_be_trusted(run: Run, place: Path, name: str) -> None:
    (place / "keys" / f"{name}.pub").unlink()
    signature = SIGNATURES[list(LAYERS).index(name)]
    assert f"{signature} was signed with the key" in findings(place, run.folder)


@pytest.mark.parametrize("number", range(3))
def test_a_forged_signature_of_each_layer_is_found(run: Run, place: Path, number: int) -> None:
    path = run.folder / SIGNATURES[number]
    content = json.loads(path.read_bytes())
    _, _, statement = read_envelope(path)
    statement["predicate"]["resources"][-1]["digest"] = "0" * 64
    content["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(content))
    if number < 2:  # an attacker also has to adapt the layer above, whose signature breaks as well
        assert f"was not made for {SIGNATURES[number]}" in findings(place, run.folder)
        for upper in SIGNATURES[number + 1 :]:
            (run.folder / upper).unlink()
    assert f"{path} is invalid" in findings(place, run.folder)


def test_a_layer_that_signs_a_file_of_a_lower_one_is_refused(run: Run, place: Path) -> None:
    for path in [*run.folder.glob("*.[23].*"), run.folder / "litert", run.folder / "tfjs"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run.folder / LAYERS["alice"]).write_text("exchanged")  # and signed by a trusted signer, without mlkit
    files = [run.folder / name for name in (LAYERS["alice"], "gate.json", "model_card.md", "model.sig")]
    config = signing.Config().use_elliptic_key_signer(private_key=place / "secret" / "bob.pem")
    hasher = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
    manifest = hasher.hash(run.folder, files_to_hash=files)
    fixed = SimpleNamespace(hash=lambda *_, **__: manifest, add_ignored_paths=lambda **_: None)
    config.set_hashing_config(fixed).sign(run.folder, run.folder / "model.2.sig")
    assert f"model.2.sig covers files of a lower layer: {LAYERS['alice']}" in findings(place, run.folder)


def test_new_files_are_signed_from_the_command_line(run: Run, place: Path) -> None:
    key = {"MLKIT_SIGNING_KEY": str(place / "secret" / "alice.pem")}
    (run.folder / "litert" / "more.tflite").write_text("more")
    refused = run_cli("verify", run.id, folder=place)
    assert refused.returncode == 1
    sentence = (
        f"litert/more.tflite was added. If you have made these files, sign them as a further layer: mlkit sign {run.id}"
    )
    assert sentence in " ".join(refused.stderr.split())
    assert run_cli("sign", run.id, folder=place, **key).returncode == 0
    verified = json.loads(run_cli("verify", run.id, "--json", folder=place).stdout)
    assert [layer["signer"] for layer in verified["layers"]] == [*LAYERS, "alice"]
    again = run_cli("sign", run.id, folder=place, **key)
    assert (again.returncode, "has no new files" in " ".join(again.stderr.split())) == (2, True)
    assert run_cli("sign", run.id, "--replace", folder=place, **key).returncode == 0
    verified = verify_folder(run.folder, trusted(place))
    assert (verified.signers, len(verified.layers)) == (["alice"], 1)
    assert [path.name for path in run.folder.glob("model*.sig")] == ["model.sig"]
    assert not [artifact.path for artifact in run.record.artifacts if artifact.path == "model.2.sig"]


def test_an_interrupted_layer_is_signed_again(run: Run, place: Path) -> None:
    (run.folder / "litert" / "more.tflite").write_text("more")
    (run.folder / "signed.4.json").write_text("{")  # written before the signature, then killed
    assert "signed.4.json was added" in findings(place, run.folder)
    sign_folder(run.folder, KeySigner(place / "secret" / "bob.pem"))
    assert verify_folder(run.folder, trusted(place)).layers[3].signer == "bob"


def test_a_layered_run_is_registered_with_all_signers(run: Run, place: Path) -> None:
    registry = Registry(place / "models")
    version = registry.register(run, "churn")
    assert version.signer == "alice, bob, carol"
    assert verify_folder(version.path, trusted(place)).signers == list(LAYERS)  # the model is moved to the top
    assert registry.check() == []
    with contextlib.suppress(OSError):
        (version.path / "model.2.sig").chmod(0o644)
    (version.path / "model.2.sig").unlink()
    assert any("model.2.sig is missing" in finding for finding in registry.check())
