"""Keys, signatures and encryption: what is promised, and each way in which it can go wrong."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("model_signing")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlkit.errors import InputError
from mlkit.registry import sign_folder, verify_folder
from mlkit.registry.encryption import encrypt_folder, new_encryption_key, open_encrypted
from mlkit.registry.signing import KeySigner, TrustedKeys, new_key, read_public_key
from mlkit.runs import Run
from mlkit.runs.run import check_unsigned
from mlkit.runs.store import RunStore
from tests.conftest import run_cli

FILES = {  # one of each kind that leaves with a model
    "saved_model/1/saved_model.pb": "the graph",
    "saved_model/1/variables/variables.index": "the weights",
    "converted/model.tflite": "for telephones",
    "model_card.md": "# What it is for",
    "notebook.ipynb": '{"cells": []}',
    "data/statistics.json": "{}",
    "schema/schema.pbtxt": "feature {}",
    "evaluation.json": '{"accuracy": 0.98}',
    "gate.json": '{"passed": true}',
}

STAYING = {
    "uncommitted.patch": "source",
    "data/quarantine.parquet": "rows",
    "optimizer.npz": "its memory",
}  # need not leave with it


def make_run(root: Path) -> Run:
    """A completed run that holds a little of everything."""
    with RunStore(root).create("train", parameters={"epochs": 3}) as run:
        for name, text in (FILES | STAYING | {"tensorboard/events": "curves"}).items():
            (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / name).write_text(text)
        run.log_metrics({"accuracy": 0.98})
    return run


@pytest.fixture
def run(place: Path) -> Run:
    """A run that is not signed yet."""
    return make_run(place / "runs")


@pytest.fixture
def signed(place: Path, run: Run) -> Run:
    """A run that Alice has signed."""
    sign_folder(run.folder, KeySigner(place / "secret" / "alice.pem"))
    return run


# The way it should go


def test_a_run_is_signed_and_verified_from_the_command_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)  # away from the repository, whose uncommitted changes a run would keep
    run = make_run(project / "runs")
    with_key = {"MLKIT_SIGNING_KEY": str(project / "secret" / "key.pem")}
    for command in ("keys generate alice", "sign latest"):
        result = run_cli(*command.split(), folder=project, **with_key)
        assert result.returncode == 0, result.stderr
    answer = run_cli("verify", "latest", "--json", folder=project)
    output = json.loads(answer.stdout)
    assert (answer.returncode, output["verified"], output["signer"], output["method"]) == (0, True, "alice", "key")
    assert set(output["files"]) == {*FILES, "signed.json"}
    assert output["run"]["metrics"] == {"accuracy": 0.98}
    assert abs(datetime.now(UTC) - datetime.fromisoformat(output["signed"])) < timedelta(minutes=10)
    assert {"model.sig", "signed.json"} <= {artifact.path for artifact in run.record.artifacts}


def test_the_table_shows_each_kind(signed: Run, mlkit: Callable) -> None:
    code, printed, _ = mlkit("verify", signed.folder)
    assert code == 0
    for kind in (
        "model",
        "conversions",
        "model card",
        "notebook",
        "statistics",
        "schema",
        "evaluation",
        "gate",
        "record",
    ):
        assert any(line.startswith(kind) for line in printed.splitlines()), kind


def test_a_copy_verifies_elsewhere_without_the_record(signed: Run, mlkit: Callable, tmp_path: Path) -> None:
    left = shutil.ignore_patterns("run.json", "tensorboard", ".lock", "quarantine.parquet", "optimizer.npz")
    copy = shutil.copytree(signed.folder, tmp_path / "registry" / "churn" / "3", ignore=left)
    shutil.rmtree(signed.folder)
    code, printed, _ = mlkit("verify", copy, "--json")
    assert (code, json.loads(printed)["run"]["id"]) == (0, signed.id)


def test_what_is_logged_later_does_not_break_a_signature(signed: Run, mlkit: Callable) -> None:
    signed.log_metrics({"auc": 0.99})
    signed.log_parents("another")
    (signed.folder / "tensorboard" / "later").write_text("more curves")
    assert mlkit("verify", signed.folder)[0] == 0


def test_any_folder_can_be_signed(place: Path, mlkit: Callable) -> None:
    (place / "model").mkdir()
    (place / "model" / "saved_model.pb").write_text("the graph")
    (place / "model" / "data").mkdir()  # means nothing in a folder that is no run
    (place / "model" / "data" / "words.txt").write_text("words")
    assert mlkit("sign", "model")[0] == 0
    code, printed, _ = mlkit("verify", "model", "--json")
    assert (code, json.loads(printed)["run"]) == (0, {})
    (place / "model" / "data" / "words.txt").write_text("other words")
    assert "data/words.txt has changed" in mlkit("verify", "model")[2]


def test_signatures_of_model_signing_itself_verify(place: Path, mlkit: Callable) -> None:
    from model_signing import hashing, signing

    folder = place / "theirs"
    folder.mkdir()
    (folder / "saved_model.pb").write_text("the graph")
    config = signing.Config().use_elliptic_key_signer(private_key=place / "secret" / "alice.pem")
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=["model.sig"])).sign(
        folder, folder / "model.sig"
    )
    assert mlkit("verify", folder)[0] == 0
    (folder / "saved_model.pb").write_text("another")
    assert "saved_model.pb has changed" in mlkit("verify", folder)[2]


@pytest.mark.parametrize("command", ["keys generate", "keys list", "sign", "verify"])
def test_every_command_has_help_with_an_example(mlkit: Callable, command: str) -> None:
    code, printed, _ = mlkit(*command.split(), "--help")
    assert (code, f"Example: mlkit {command}" in printed) == (0, True)


def test_the_command_line_imports_none_of_it() -> None:
    code = "import sys, mlkit.cli.main\n"
    code += "print([name for name in ('model_signing', 'cryptography', 'pyrage') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Files that are not as they were


def replace_by_link(folder: Path, name: str) -> None:
    """The same content, through a link."""
    target = folder.parent / "outside"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", [*FILES, "signed.json"])
def test_a_changed_file_of_each_kind_is_named(signed: Run, mlkit: Callable, name: str) -> None:
    path = signed.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, printed, complaint = mlkit("verify", signed.folder, "--json")
    assert (code, json.loads(printed)["findings"]) == (1, [f"{name} has changed"])
    assert f"is not what alice signed: {name} has changed" in complaint


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda run: (run / "gate.json").unlink(), "gate.json is missing"),
        (lambda run: (run / "signed.json").unlink(), "signed.json is missing"),
        (lambda run: (run / "optimizer.npz").write_text("?"), "optimizer.npz has changed"),
        (lambda run: (run / "data" / "quarantine.parquet").rename(run / "data" / "r"), "data/r was added"),
        (lambda run: replace_by_link(run, "uncommitted.patch"), "uncommitted.patch is a symbolic link"),
        (lambda run: replace_by_link(run, "data"), "data is a symbolic link"),
        (lambda run: shutil.rmtree(run / "schema"), "schema/schema.pbtxt is missing"),
        (lambda run: (run / "saved_model" / "1" / "x.so").write_text("?"), "saved_model/1/x.so was added"),
        (lambda run: (run / ".hidden").write_text("?"), ".hidden was added"),
        (lambda run: (run / "gate.json").rename(run / "old.json"), "gate.json was renamed to old.json"),
        (lambda run: (run / "model_card.md").rename(run / "gate.json"), "model_card.md is missing"),
        (lambda run: replace_by_link(run, "gate.json"), "gate.json is a symbolic link"),
        (lambda run: replace_by_link(run, "saved_model"), "saved_model is a symbolic link"),
        (lambda run: (run / "plots").symlink_to("/tmp"), "plots is a symbolic link"),
        (lambda run: os.mkfifo(run / "saved_model" / "pipe"), "saved_model/pipe is neither a file nor a folder"),
    ],
)
def test_missing_added_renamed_and_linked_files_are_named(
    signed: Run, mlkit: Callable, spoil: Callable, finding: str
) -> None:
    spoil(signed.folder)
    code, printed, complaint = mlkit("verify", signed.folder, "--json")
    assert code == 1
    assert finding in json.loads(printed)["findings"]
    assert finding in complaint


@pytest.mark.parametrize(
    ("field", "value", "finding"),
    [
        ("metrics", {"accuracy": 0.999}, "run.json: metrics.accuracy was 0.98 when it was signed and is 0.999"),
        ("metrics", {}, "run.json: metrics.accuracy differs from the signed value"),
        ("parameters", {"epochs": 300}, "run.json: parameters.epochs was 3 when it was signed and is 300"),
        ("parents", ["invented"], None),  # may be logged later
        ("id", "20260101-000000-train-zzzz", "run.json: id was"),
    ],
)
def test_an_edited_record_is_named(
    signed: Run, mlkit: Callable, field: str, value: object, finding: str | None
) -> None:
    with signed.edit() as record:
        setattr(record, field, value)
    code, _, complaint = mlkit("verify", signed.folder)
    assert code == (1 if finding else 0)
    assert (finding or "") in complaint


def test_a_damaged_record_is_named(signed: Run, mlkit: Callable) -> None:
    (signed.folder / "run.json").write_text("{")
    code, _, complaint = mlkit("verify", signed.folder)
    assert (code, "run.json: The record of" in complaint) == (1, True)


# Signatures that are none


def edit_statement(text: str) -> str:
    """A signature whose list of files has been edited to fit other files."""
    bundle = json.loads(text)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(bundle)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: "", "is damaged or not a signature"),
        (lambda text: text[: len(text) // 2], "is damaged or not a signature"),
        (lambda text: "[]", "is damaged or not a signature"),
        (lambda text: '{"verificationMaterial": {}}', "is damaged or not a signature"),
        (edit_statement, "is invalid"),
        (lambda text: text.replace("bundle.v0.3", "bundle.v9"), "is invalid"),
    ],
)
def test_a_spoiled_signature_proves_nothing(signed: Run, mlkit: Callable, spoil: Callable, reason: str) -> None:
    path = signed.folder / "model.sig"
    path.write_text(spoil(path.read_text()))
    code, _, complaint = mlkit("verify", signed.folder)
    assert (code, reason in complaint) == (1, True), complaint


def test_the_signature_of_another_run_proves_nothing(place: Path, signed: Run, mlkit: Callable) -> None:
    other = make_run(place / "runs")
    for name in ("model.sig", "signed.json"):
        shutil.copy(signed.folder / name, other.folder / name)
    code, _, complaint = mlkit("verify", other.folder)
    assert (code, "run.json: id was" in complaint) == (1, True)


def test_a_folder_that_is_not_signed_is_refused(run: Run, signed: Run, mlkit: Callable, place: Path) -> None:
    other = make_run(place / "runs")
    code, _, complaint = mlkit("verify", other.folder)
    assert (code, "is not signed. Sign it: mlkit sign" in complaint) == (1, True)
    code, _, complaint = mlkit("verify", signed.folder / "saved_model" / "1")
    assert (code, f"mlkit verify {signed.folder}" in complaint) == (1, True)
    (signed.folder / "model.sig").rename(place / "elsewhere.sig")
    (signed.folder / "model.sig").symlink_to(place / "elsewhere.sig")
    assert mlkit("verify", signed.folder)[0] == 1


# Keys


def test_a_key_that_is_not_trusted_proves_nothing(place: Path, signed: Run, mlkit: Callable) -> None:
    bob = new_key(place / "bob.pem", place / "bob.pub")
    code, _, complaint = mlkit("verify", signed.folder, "--key", bob.path)
    assert (code, f"trusted: bob ({bob.fingerprint[:16]})" in complaint) == (1, True)
    path = signed.folder / "model.sig"  # it is said to be Bob's
    alice = json.loads(path.read_text())["verificationMaterial"]["publicKey"]["hint"]
    path.write_text(path.read_text().replace(alice, bob.fingerprint))
    code, _, complaint = mlkit("verify", signed.folder, "--key", bob.path)
    assert (code, "made with another key than it names" in complaint) == (1, True)


def test_without_a_key_one_is_told_what_to_do(place: Path, run: Run, mlkit: Callable) -> None:
    (place / "secret" / "alice.pem").unlink()
    code, _, complaint = mlkit("sign", run.folder)
    assert (code, "Generate one: mlkit keys generate" in complaint) == (2, True)
    (place / "keys" / "alice.pub").unlink()
    code, _, complaint = mlkit("verify", run.folder)
    assert (code, "holds no public key" in complaint) == (2, True)
    assert mlkit("verify", run.folder, "--key", "nobody.pub")[0] == 2
    assert not list(run.folder.glob("*sig*"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_can_read_is_refused(place: Path, run: Run, mlkit: Callable, mode: int) -> None:
    os.chmod(place / "secret" / "alice.pem", mode)
    code, _, complaint = mlkit("sign", run.folder)
    assert (code, "can be read by others" in complaint, "chmod 600" in complaint) == (2, True, True)
    assert not (run.folder / "model.sig").exists()


def test_keys_are_private_and_never_overwritten(place: Path, mlkit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = place / "secret" / "alice.pem", place / "keys" / "alice.pub"
    assert (private.stat().st_mode & 0o777, private.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    before = private.read_bytes(), public.read_bytes()
    assert mlkit("keys", "generate", "bob")[0] == 2
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "secret" / "other.pem"))
    assert mlkit("keys", "generate", "alice")[0] == 2
    assert mlkit("keys", "generate", "../alice")[0] == 2
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(path.name for path in place.rglob("*.p*")) == ["alice.pem", "alice.pub"]
    assert mlkit("keys", "generate", "bob")[0] == 0
    output = json.loads(mlkit("keys", "list", "--json")[1])
    assert ([key["name"] for key in output["trusted"]], output["private"]["state"]) == (["alice", "bob"], "ready")


def test_a_passphrase_is_asked_of_its_place(
    place: Path, run: Run, mlkit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "secret" / "carol.pem"))
    assert mlkit("keys", "generate", "carol", "--passphrase")[0] == 2  # nobody is here to type one
    monkeypatch.setenv("MLKIT_SIGNING_PASSPHRASE", "env:PHRASE")
    monkeypatch.setenv("PHRASE", "correct horse")
    assert json.loads(mlkit("keys", "generate", "carol", "--json")[1])["passphrase"] is True
    assert b"ENCRYPTED" in (place / "secret" / "carol.pem").read_bytes()
    assert mlkit("sign", run.folder)[0] == 0
    assert json.loads(mlkit("verify", run.folder, "--json")[1])["signer"] == "carol"
    for phrase, reason in {"battery": "cannot be opened with this passphrase", "": "missing or empty"}.items():
        monkeypatch.setenv("PHRASE", phrase)
        code, _, complaint = mlkit("sign", run.folder, "--replace")
        assert (code, reason in complaint) == (2, True), complaint
    monkeypatch.setenv("MLKIT_SIGNING_PASSPHRASE", "correct horse")
    assert "Expected the source of the passphrase" in mlkit("sign", run.folder, "--replace")[2]
    assert mlkit("verify", run.folder)[0] == 0  # the earlier signature is unharmed


def test_other_kinds_of_keys_are_refused(place: Path, run: Run, mlkit: Callable) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    texts = {"ed25519": private_text(ed25519.Ed25519PrivateKey.generate()), "text": b"not a key"}
    for name, text in texts.items():
        path = place / f"{name}.pem"
        path.write_bytes(text)
        path.chmod(0o600)
        assert mlkit("sign", run.folder, "--key", path)[0] == 2
        (place / "keys" / "wrong.pub").write_bytes(text)
        assert mlkit("verify", run.folder)[0] == 2
    assert not (run.folder / "signed.json").exists()


# Signing that does not come to its end

KILLED = """
import os, signal, sys
from pathlib import Path
from mlkit.registry import signing
moment, folder, key = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the signature":
    signing._FolderDigests.hash = die
if moment == "while it is written":
    real = os.replace
    os.replace = lambda source, target: die() if str(target).endswith("model.sig") else real(source, target)
if moment == "before it is listed":
    signing.Run.log_artifact = die
signing.sign_folder(folder, signing.KeySigner(Path(key)))
"""


@pytest.mark.parametrize("moment", ["before the signature", "while it is written", "before it is listed"])
def test_a_killed_signing_leaves_no_half_signature(place: Path, run: Run, mlkit: Callable, moment: str) -> None:
    command = [sys.executable, "-c", KILLED, moment, str(run.folder), str(place / "secret" / "alice.pem")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    code, _, complaint = mlkit("verify", run.folder)
    if moment == "before it is listed":  # the signature stood there, whole
        assert code == 0
    else:
        assert (code, "is not signed" in complaint) == (1, True)
    assert mlkit("sign", run.folder, "--replace")[0] == 0
    assert mlkit("verify", run.folder)[0] == 0
    assert set(json.loads(mlkit("verify", run.folder, "--json")[1])["files"]) == {*FILES, "signed.json"}


def fill(path: Path) -> None:
    """Take all that the disk has left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_full_disk_leaves_no_half_signature(place: Path, small_disk: Path) -> None:
    run = make_run(small_disk / "runs")
    fill(run.folder / "tensorboard" / "filler")
    result = run_cli("sign", str(run.folder), folder=place)
    assert (result.returncode, "The disk is full" in result.stderr) == (1, True), result.stderr
    assert {path.name for path in run.folder.iterdir()} & {"signed.json", "model.sig"} == set()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run.folder / "notebook.ipynb").write_text("edited"), "notebook.ipynb has changed"),
        (lambda run: (run.folder / "gate.json").unlink(), "gate.json is missing"),
        (lambda run: (run.folder / "optimizer.npz").write_text("edited"), "optimizer.npz has changed"),
        (lambda run: (run.folder / "plots").symlink_to("/tmp"), "plots is a symbolic link"),
        (lambda run: (run.folder / "data" / "more").symlink_to("/tmp"), "data/more is a symbolic link"),
        (lambda run: (run.folder / "signed.json").symlink_to("/tmp/x"), "signed.json is a symbolic link"),
        (lambda run: run.interrupt(), "is interrupted; only a run that has completed"),
    ],
)
def test_what_must_not_be_signed_is_refused(run: Run, mlkit: Callable, spoil: Callable, reason: str) -> None:
    spoil(run)
    code, _, complaint = mlkit("sign", run.folder)
    assert (code, reason in complaint) == (2, True), complaint
    assert not (run.folder / "model.sig").exists()
    assert not (run.folder / "signed.json").is_file()


def test_signing_again_has_to_be_said_and_a_refusal_keeps_the_old_one(signed: Run, mlkit: Callable) -> None:
    before = (signed.folder / "model.sig").read_bytes()
    assert mlkit("sign", signed.folder)[0] == 2
    (signed.folder / "link").symlink_to("gate.json")
    assert mlkit("sign", signed.folder, "--replace")[0] == 2
    (signed.folder / "link").unlink()
    assert (signed.folder / "model.sig").read_bytes() == before
    assert mlkit("verify", signed.folder)[0] == 0
    assert mlkit("sign", signed.folder, "--replace")[0] == 0
    assert (signed.folder / "model.sig").read_bytes() != before


# Certificates and Sigstore


def private_text(key: object) -> bytes:
    """A private key in PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Authority:
    """A small certificate authority."""

    def __init__(
        self, name: str, parent: "Authority | None" = None, years: tuple[int, int] = (-1, 1), leaf: bool = False
    ):
        self.key, self.parent = ec.generate_private_key(ec.SECP256R1()), parent
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now, public = datetime.now(UTC), self.key.public_key()
        issuer = parent or self
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
        usage |= {"digital_signature": leaf, "key_cert_sign": not leaf, "crl_sign": not leaf}
        builder = (
            x509.CertificateBuilder(issuer.name, self.name, public, x509.random_serial_number())
            .not_valid_before(now + timedelta(days=365 * years[0]))
            .not_valid_after(now + timedelta(days=365 * years[1]))
            .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage, encipher_only=False, decipher_only=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        )
        self.certificate = builder.sign(issuer.key, hashes.SHA256())

    @property
    def text(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Private key, and the chain up to the authority without it."""
        key, chain = folder / "signer.pem", folder / "chain.pem"
        key.write_bytes(private_text(self.key))
        key.chmod(0o600)
        chain.write_bytes(self.text + self.parent.text)
        return key, chain


def test_a_certificate_is_trusted_through_its_authority(place: Path, run: Run, mlkit: Callable) -> None:
    root, other = Authority("Root of the company"), Authority("Another company")
    key, chain = Authority("Dora", Authority("Models", root), leaf=True).write(place)
    for name, authority in {"root": root, "other": other}.items():
        (place / f"{name}.crt").write_bytes(authority.text)
    assert mlkit("sign", run.folder, "--key", key, "--certificate", chain)[0] == 0
    code, printed, _ = mlkit("verify", run.folder, "--authorities", "root.crt", "--json")
    assert (code, json.loads(printed)["signer"], json.loads(printed)["method"]) == (0, "Dora", "certificate")
    code, _, complaint = mlkit("verify", run.folder, "--authorities", "other.crt")
    assert (code, "is invalid" in complaint) == (1, True)
    code, _, complaint = mlkit("verify", run.folder)
    assert (code, "was signed with the method certificate; expected: key" in complaint) == (1, True)
    assert mlkit("verify", run.folder, "--authorities", "nowhere.crt")[0] == 2
    (run.folder / "gate.json").write_text("edited")
    assert "gate.json has changed" in mlkit("verify", run.folder, "--authorities", "root.crt")[2]


def test_a_certificate_that_had_run_out_is_refused(place: Path, run: Run, mlkit: Callable) -> None:
    root = Authority("Root", years=(-9, 1))
    key, chain = Authority("Dora", Authority("Models", root, years=(-9, 1)), years=(-2, -1), leaf=True).write(place)
    (place / "root.crt").write_bytes(root.text)
    assert mlkit("sign", run.folder, "--key", key, "--certificate", chain)[0] == 0
    code, _, complaint = mlkit("verify", run.folder, "--authorities", "root.crt")
    assert (code, "the certificate is valid from" in complaint) == (1, True), complaint


def test_a_certificate_of_another_key_is_refused(place: Path, run: Run, mlkit: Callable) -> None:
    _, chain = Authority("Dora", Authority("Root"), leaf=True).write(place)
    code, _, complaint = mlkit("sign", run.folder, "--certificate", chain)
    assert (code, "cannot be used with the key" in complaint) == (2, True)
    assert mlkit("sign", run.folder, "--certificate", "nowhere.pem")[0] == 2
    assert mlkit("sign", run.folder, "--sigstore", "--certificate", chain)[0] == 2


def test_sigstore_without_a_network_says_so(place: Path, run: Run, signed: Run) -> None:
    proxy = "http://127.0.0.1:9"  # nobody listens there
    offline = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "HOME": str(place), "XDG_DATA_HOME": str(place / "share")}
    other = make_run(place / "runs")
    result = run_cli("sign", str(other.folder), "--sigstore", folder=place, **offline)
    assert (result.returncode, "It needs network access" in " ".join(result.stderr.split())) == (2, True), result.stderr
    assert not (other.folder / "signed.json").exists()
    command = ["verify", str(signed.folder), "--identity", "alice@example.com", "--issuer", "https://example.com"]
    result = run_cli(*command, folder=place, **offline)
    assert (result.returncode, "expected: sigstore" in " ".join(result.stderr.split())) == (1, True), result.stderr


def test_without_the_extra_the_pip_line_is_told(run: Run) -> None:
    code = "import sys; sys.modules['model_signing'] = sys.modules['model_signing.signing'] = None\n"
    code += f"sys.argv = ['mlkit', 'sign', {str(run.folder)!r}]\nfrom mlkit.cli.main import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, "pip install 'mlkit[signing]'" in result.stderr) == (2, True), result.stderr
    assert not (run.folder / "signed.json").exists()


# Encryption


@pytest.fixture
def sealed(place: Path, signed: Run) -> Path:
    """The signed run, for Carol only."""
    receiver = new_encryption_key(place / "carol.txt")
    return encrypt_folder(signed.folder, place / "model.age", [receiver])


def test_an_encrypted_run_is_opened_privately_and_verifies(place: Path, sealed: Path) -> None:
    trust = TrustedKeys((read_public_key(place / "keys" / "alice.pub"),))
    assert not [text for text in FILES.values() if len(text) > 5 and text.encode() in sealed.read_bytes()]
    with open_encrypted(sealed, place / "carol.txt") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "saved_model/1/saved_model.pb").read_text() == "the graph"
        assert verify_folder(folder, trust).signer == "alice"
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), open_encrypted(sealed, place / "carol.txt") as folder:
        raise KeyboardInterrupt
    assert not folder.exists()


def test_it_is_opened_by_its_receiver_only_and_only_whole(place: Path, sealed: Path) -> None:
    def refuse(reason: str, file: Path = sealed, key: str = "carol.txt") -> None:
        with pytest.raises(InputError, match=reason), open_encrypted(file, place / key):
            raise AssertionError("opened")

    new_encryption_key(place / "dave.txt")
    refuse("cannot be decrypted with this key", key="dave.txt")
    refuse("There is no private key", key="nobody.txt")
    os.chmod(place / "dave.txt", 0o644)
    refuse("can be read by others", key="dave.txt")
    data = sealed.read_bytes()
    for damaged in (b"", data[:50], data[: len(data) // 2], data[:-1], data[:-20] + b"?" + data[-19:]):
        (place / "damaged.age").write_bytes(damaged)
        refuse("or is damaged", file=place / "damaged.age")


def test_a_failed_encryption_leaves_no_file(
    place: Path, signed: Run, sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.errors import MlkitError
    from mlkit.registry import encryption

    receiver = new_encryption_key(place / "eve.txt")
    for target, receivers in (
        (sealed, [receiver]),
        (signed.folder / "x.age", [receiver]),
        (place / "b.age", ["age1x"]),
    ):
        with pytest.raises(MlkitError):
            encrypt_folder(signed.folder, target, receivers)

    def vanish(*_: object) -> None:
        raise OSError("the disk has gone")

    monkeypatch.setattr(encryption, "_write_tar", vanish)
    with pytest.raises(MlkitError, match="the disk has gone"):
        encrypt_folder(signed.folder, place / "c.age", [receiver])
    assert sorted(path.name for path in place.rglob("*.age*")) == ["model.age"]


def test_what_is_signed_is_not_replaced(run: Run, place: Path) -> None:
    check_unsigned(run.folder)
    sign_folder(run.folder, KeySigner(place / "secret" / "alice.pem"))
    with pytest.raises(
        InputError,
        match=r"is signed: a signed file cannot be replaced\. Remove model\.sig and signed\.json, and sign it again",
    ):
        check_unsigned(run.folder)
    for name in ("model.sig", "signed.json"):
        (run.folder / name).unlink()
    check_unsigned(run.folder)
