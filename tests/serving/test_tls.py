"""Certificates of the server and of its clients, with real handshakes in memory."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlkit.config import load_settings
from mlkit.errors import InputError
from mlkit.serving.tls import Tls, TlsOptions, certificate_name, grpc_certificate_name, read_options

Issuer = tuple[str, ec.EllipticCurvePrivateKey]


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def write_certificate(folder: Path, name: str, issuer: Issuer | None = None) -> Issuer:
    """Write a key and a certificate, of an authority or issued by one."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject, issuer_name = common_name(name), common_name(issuer[0] if issuer else name)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer_name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return name, key


@pytest.fixture
def authority(tmp_path: Path) -> Issuer:
    """Our authority, with a server, a client, and a client of another authority."""
    ours, theirs = write_certificate(tmp_path, "ours"), write_certificate(tmp_path, "theirs")
    for name, issuer in (("server", ours), ("friend", ours), ("other", theirs)):
        write_certificate(tmp_path, name, issuer)
    return ours


@pytest.fixture
def handshake(tmp_path: Path, authority: Issuer) -> Callable[..., str]:
    """Perform a handshake with a server; its TLS version and serial number, or the reason why it failed."""

    def perform(tls: Tls, client: str | None = None) -> str:
        context = ssl.create_default_context(cafile=tmp_path / "ours.pem")
        if client:
            context.load_cert_chain(tmp_path / f"{client}.pem", tmp_path / f"{client}.key")
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client_side = context.wrap_bio(to_client, to_server, server_hostname="localhost")
        server_side = tls.context.wrap_bio(to_server, to_client, server_side=True)
        for side in (client_side, server_side) * 3:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return error.reason
        return f"{server_side.version()}, {client_side.getpeercert()['serialNumber'][:6]}"

    return perform


def test_only_clients_of_the_authority_connect(tmp_path: Path, handshake: Callable[..., str]) -> None:
    tls = Tls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ours.pem")
    assert handshake(tls, "friend")[:7] == "TLSv1.3"
    assert handshake(tls) == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    assert handshake(tls, "other") == "CERTIFICATE_VERIFY_FAILED"


def test_renewed_files_count_for_the_next_connection(
    tmp_path: Path, authority: Issuer, handshake: Callable[..., str]
) -> None:
    tls = Tls(tmp_path / "server.pem", tmp_path / "server.key")
    before = handshake(tls)
    assert (tls.refresh(), handshake(tls)) == (False, before)
    write_certificate(tmp_path, "server", authority)
    assert (tls.refresh(), handshake(tls) != before) == (True, True)
    (tmp_path / "server.key").write_text("half a ke")
    assert (tls.refresh(), handshake(tls)[:7]) == (False, "TLSv1.3")
    with pytest.raises(InputError, match="do not make a certificate"):
        Tls(tmp_path / "server.pem", tmp_path / "server.key")


def test_a_missing_file_is_named(tmp_path: Path, authority: Issuer) -> None:
    with pytest.raises(InputError, match="There is no"):
        Tls(tmp_path / "none.pem", tmp_path / "server.key")


def test_options_are_relative_to_the_project() -> None:
    auth, tls = read_options(load_settings({"auth.keys": "api.keys", "auth.certificate": "own.pem"}))
    assert Path(auth.keys).is_absolute()
    assert (Path(tls.certificate).name, tls.client_ca) == ("own.pem", "")
    assert TlsOptions().open() is None
    with pytest.raises(InputError, match=r"auth\.certificate"):
        TlsOptions(key="own.key").open()


def test_the_common_name_counts_and_then_the_first_alternative_name() -> None:
    certificate = {
        "subject": ((("organizationName", "Shop"),), (("commonName", "webshop"),)),
        "subjectAltName": (("DNS", "a"),),
    }
    assert certificate_name(certificate) == "webshop"
    assert certificate_name(certificate | {"subject": ()}) == "a"
    assert (certificate_name(None), certificate_name({}), grpc_certificate_name({})) == ("", "", "")
    alternative = {"x509_subject_alternative_name": [b"a"]}
    assert grpc_certificate_name({"x509_common_name": [b"webshop"]} | alternative) == "webshop"
    assert grpc_certificate_name({"x509_common_name": [b""]} | alternative) == "a"
