"""Authentication and authorization over the wire: API keys, tokens, certificates, and the audit log of the server."""

import asyncio
import base64
import contextlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mlkit.errors import InputError, MlkitError, ServingError, StorageError
from mlkit.export.protos import message_class
from mlkit.serving.auth import Audit, AuthOptions, FileKeySet, JwtVerifier, UrlKeySet, new_api_key, revoke_api_key
from mlkit.serving.options import LogOptions
from mlkit.serving.server import RunningServer
from mlkit.serving.tls import TlsOptions
from tests.chromium import CHROMIUM, Page
from tests.conftest import free_port, run_cli, wait_until
from tests.serving.test_server import WINE, converted, row, serve, shelf, write_version  # noqa: F401  fixtures

ISSUER, AUDIENCE = "https://id.example", "models"


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def call(channel: grpc.Channel, service: str, method: str, body: bytes = b"", **headers: str) -> tuple[str, str]:
    """Code and words with which a call ends."""
    ask = channel.unary_unary(f"/tensorflow.serving.{service}/{method}")
    try:
        ask(body, timeout=20, metadata=tuple(headers.items()))
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


# An identity provider


class Provider:
    """Signs tokens, well and badly."""

    def __init__(self, folder: Path):
        self.rsa, self.ec = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())
        self.stranger = ec.generate_private_key(ec.SECP256R1())
        self.path = folder / "jwks.json"
        self.publish(r1=self.rsa, e1=self.ec)

    def publish(self, **keys: Any) -> None:
        algorithms = jwt.algorithms.RSAAlgorithm, jwt.algorithms.ECAlgorithm
        entries = [
            json.loads(algorithms[isinstance(key, ec.EllipticCurvePrivateKey)].to_jwk(key.public_key())) | {"kid": kid}
            for kid, key in keys.items()
        ]
        self.path.write_text(json.dumps({"keys": entries}))

    def claims(self, **claims: Any) -> dict[str, Any]:
        payload = {"iss": ISSUER, "aud": AUDIENCE, "sub": "shop", "scope": "predict", "exp": time.time() + 300} | claims
        return {name: value for name, value in payload.items() if value is not None}

    def sign(self, kid: str | None = "r1", key: Any = None, algorithm: str | None = None, **claims: Any) -> str:
        key = key or (self.ec if kid == "e1" else self.rsa)
        algorithm = algorithm or ("ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256")
        return jwt.encode(self.claims(**claims), key, algorithm, headers={"kid": kid} if kid else None)

    def forge(self, head: dict[str, Any], secret: bytes = b"") -> str:
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, self.claims())]
        signed = b".".join(parts)
        proof = hmac.digest(secret, signed, "sha256") if secret else b""
        return (signed + b"." + base64.urlsafe_b64encode(proof).rstrip(b"=")).decode()

    def pem(self) -> bytes:
        form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.rsa.public_key().public_bytes(*form)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    return Provider(tmp_path_factory.mktemp("provider"))


ATTACKS: dict[str, Callable[[Provider], str]] = {
    "none": lambda provider: provider.forge({"alg": "none"}),
    "NONE": lambda provider: provider.forge({"alg": "NONE", "kid": "r1"}),
    "HS256 with the public key": lambda provider: provider.forge({"alg": "HS256", "kid": "r1"}, provider.pem()),
    "expired": lambda provider: provider.sign(exp=time.time() - 120),
    "not yet valid": lambda provider: provider.sign(nbf=time.time() + 600),
    "forged": lambda provider: provider.sign("e1", provider.stranger),
    "another algorithm": lambda provider: provider.sign("r1", provider.ec),
    "RS512": lambda provider: provider.sign("r1", algorithm="RS512"),
    "wrong audience": lambda provider: provider.sign(aud="mail"),
    "wrong issuer": lambda provider: provider.sign(iss="https://id.example.org"),
    "no end": lambda provider: provider.sign(exp=None),
    "no audience": lambda provider: provider.sign(aud=None),
    "no issuer": lambda provider: provider.sign(iss=None),
    "an end that is no number": lambda provider: provider.sign(exp="tomorrow"),
    "unknown key": lambda provider: provider.sign("r2"),
    "changed": lambda provider: provider.sign()[:-6] + "AAAAAA",
    "no token": lambda provider: "a.b.c",
    "no text": lambda provider: "\udc80.é.\x00",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_invalid_token_is_denied(provider: Provider, attack: str) -> None:
    tokens = JwtVerifier(FileKeySet(provider.path), ISSUER, AUDIENCE)
    assert asyncio.run(tokens.authenticate(provider.sign())).name == "shop"
    text = ATTACKS[attack](provider).encode(errors="replace").decode("latin-1")
    with pytest.raises(ServingError) as caught:
        asyncio.run(tokens.authenticate(text))
    assert (caught.value.code, caught.value.http_status) == ("UNAUTHENTICATED", 401)


def test_a_cached_token_expires_with_its_key_and_its_lifetime(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlkit.serving.auth._CLOCK_SKEW", 0)
    tokens = JwtVerifier(FileKeySet(provider.path, seconds=0), ISSUER, AUDIENCE)
    good, short = provider.sign("e1"), provider.sign("r1", exp=time.time() + 2)

    def denial(text: str) -> str:
        try:
            assert asyncio.run(tokens.authenticate(text)).scopes == {"predict"}
        except ServingError as error:
            return str(error)
        return ""

    assert [denial(text) for text in (good, short, good)] == [""] * 3
    assert "expired" in wait_until(lambda: denial(short), 20)
    assert not denial(good)
    provider.publish(r1=provider.rsa)
    assert "unknown key" in denial(good)
    provider.publish(r1=provider.rsa, e1=provider.ec)
    assert not denial(good)


def test_many_clients_fetch_keys_once(provider: Provider) -> None:
    keys, fetched = UrlKeySet("https://id.example/jwks"), []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.05)  # the others come in the meantime
        return provider.path.read_bytes()

    keys._fetch = fetch

    async def authenticate() -> list:
        tokens = JwtVerifier(keys, ISSUER, AUDIENCE)
        good = [tokens.authenticate(provider.sign("e1", sub=f"caller {number}")) for number in range(10)]
        bad = [tokens.authenticate(provider.sign(f"unknown {number}")) for number in range(10)]
        return await asyncio.gather(*good, *bad, return_exceptions=True)

    principals = asyncio.run(authenticate())
    assert [principal.name for principal in principals[:10]] == [f"caller {number}" for number in range(10)]
    assert {error.code for error in principals[10:]} == {"UNAUTHENTICATED"}
    assert len(fetched) == 1


def test_options_that_would_deny_or_admit_everybody_are_rejected(tmp_path: Path, provider: Provider) -> None:
    for options in (
        AuthOptions(jwks=str(provider.path)),
        AuthOptions(jwks=str(provider.path), issuer=ISSUER),
        AuthOptions(jwks="http://id.example/jwks", issuer=ISSUER, audience=AUDIENCE),
        AuthOptions(keys=str(tmp_path / "none.keys")),
    ):
        with pytest.raises(InputError):
            options.open()


# A server with authentication


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "api.keys"


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory,
    converted: Path,  # noqa: F811
    keys: Path,
    provider: Provider,
) -> Iterator[tuple[RunningServer, int, dict[str, str], Path]]:
    """Two processes, with REST and gRPC, keys and tokens."""
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    (folder / "wine").mkdir()
    write_version(folder / "wine", 1, converted)
    texts = {name: new_api_key(keys, name, scopes) for name, scopes in {"shop": ["predict"], "boss": ["admin"]}.items()}
    options = AuthOptions(str(keys), str(provider.path), ISSUER, AUDIENCE)
    logs = LogOptions(folder=str(folder / "logs"))
    with serve(folder / "wine", processes=2, auth=options, grpc_port=port, logs=logs) as server:
        yield server, port, texts, folder / "logs" / "audit.jsonl"


def test_rest_distinguishes_401_from_403(guarded: tuple, row: dict, provider: Provider) -> None:  # noqa: F811
    server, _, texts, _ = guarded
    body = {"instances": [row]}

    def ask(headers: dict[str, str], path: str = f"{WINE}:predict", body: Any = body) -> httpx.Response:
        return httpx.post(server.url + path, json=body, headers=headers)

    assert ask(bearer(texts["shop"])).status_code == 200
    assert ask({"x-api-key": texts["shop"]}).status_code == 200
    assert ask(bearer(provider.sign("e1"))).status_code == 200
    for headers in ({}, bearer("mlkit_x_y"), bearer(provider.forge({"alg": "none"})), {"authorization": "Basic YTpi"}):
        answer = ask(headers)
        assert (answer.status_code, set(answer.json())) == (401, {"error"})
        assert answer.headers["www-authenticate"].startswith("Bearer")
    answer = ask(bearer(texts["boss"]))
    assert (answer.status_code, answer.json()) == (
        403,
        {"error": "boss may admin here, and this needs the scope 'predict'."},
    )
    assert ask(bearer(texts["shop"]), "/reload").status_code == 403
    assert ask(bearer(provider.sign(scope="admin")), "/reload").status_code == 200


@pytest.mark.parametrize(
    "path", [WINE, f"{WINE}/metadata", "/models", "/docs", "/openapi.json", "/monitoring/prometheus/metrics"]
)
def test_reading_requires_authentication_and_probes_do_not(guarded: tuple, path: str) -> None:
    server, _, texts, _ = guarded
    assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + path, headers=bearer(texts["shop"])).status_code == 200
    for probe in ("/livez", "/readyz"):
        assert httpx.get(server.url + probe).status_code == 200


def test_grpc_authorizes_alike(guarded: tuple, provider: Provider) -> None:
    _, port, texts, _ = guarded
    request = message_class("GetModelStatusRequest")()
    request.model_spec.name = "wine"
    body = request.SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for header in (bearer(texts["shop"]), bearer(provider.sign())):
            assert call(channel, "ModelService", "GetModelStatus", body, **header)[0] == "OK"
        assert call(channel, "ModelService", "GetModelStatus", body)[0] == "UNAUTHENTICATED"
        assert call(channel, "PredictionService", "Predict", b"\xff")[0] == "UNAUTHENTICATED"
        code, words = call(channel, "ModelService", "HandleReloadConfigRequest", **bearer(texts["shop"]))
        assert code == "PERMISSION_DENIED"
        assert "'admin'" in words
        assert call(channel, "ModelService", "HandleReloadConfigRequest", **bearer(texts["boss"]))[0] == "OK"
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=20)


def test_administrative_actions_are_recorded(guarded: tuple) -> None:
    server, port, texts, path = guarded
    before = len(Audit(path).actions())
    assert httpx.post(f"{server.url}/reload", headers=bearer(texts["boss"])).status_code == 200
    assert httpx.post(f"{server.url}/reload", headers=bearer(texts["shop"])).status_code == 403
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert call(channel, "ModelService", "HandleReloadConfigRequest", **bearer(texts["boss"]))[0] == "OK"
    actions = Audit(path).actions()
    summaries = [(action["action"], action["principal"], action["result"]) for action in actions[before:]]
    done = [("reload", "boss", "begun"), ("reload", "boss", "done")]
    assert summaries == [*done, ("reload", "shop", "denied"), *done]
    assert actions[-1]["versions"] == {"wine": 1}
    assert actions[0]["action"] == "start"
    intact = path.read_text()
    path.write_text(intact.replace('"boss"', '"shop"', 1))
    with pytest.raises(StorageError, match="tampered with"):
        Audit(path).actions()
    refused = httpx.post(f"{server.url}/reload", headers=bearer(texts["boss"]))
    assert refused.status_code == 503  # what cannot be recorded is not done
    path.write_text(intact)


def test_denied_actions_are_recorded_too(guarded: tuple, row: dict) -> None:  # noqa: F811
    server, port, texts, path = guarded
    before = len(Audit(path).actions())
    assert httpx.post(f"{server.url}/reload").status_code == 401
    assert httpx.delete(f"{server.url}/models", headers=bearer(texts["shop"])).status_code == 403
    assert httpx.post(f"{server.url}{WINE}:predict", json={"instances": [row]}).status_code == 401  # no act
    assert httpx.get(f"{server.url}/models").status_code == 401
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for headers in ({}, bearer(texts["shop"])):
            call(channel, "ModelService", "HandleReloadConfigRequest", **headers)
        assert call(channel, "PredictionService", "Predict")[0] == "UNAUTHENTICATED"
    actions = Audit(path).actions()[before:]
    assert [(action["action"], action["principal"].partition(":")[0], action["code"]) for action in actions] == [
        ("reload", "127.0.0.1", "UNAUTHENTICATED"),
        ("DELETE /models", "shop", "PERMISSION_DENIED"),
        ("reload", "ipv4", "UNAUTHENTICATED"),
        ("reload", "shop", "PERMISSION_DENIED"),
    ]
    assert {action["result"] for action in actions} == {"denied"}
    assert actions[1]["reason"] == "shop may predict here, and this needs the scope 'admin'."


def test_a_revoked_key_is_no_longer_valid(guarded: tuple, keys: Path, row: dict) -> None:  # noqa: F811
    server, _, _, _ = guarded
    guest = new_api_key(keys, "guest")

    def status() -> int:
        return httpx.post(f"{server.url}{WINE}:predict", json={"instances": [row]}, headers=bearer(guest)).status_code

    wait_until(lambda: status() == 200, 10)
    revoke_api_key(keys, "guest")
    wait_until(lambda: [status() for _ in range(6)] == [401] * 6, 10)


def test_the_command_hands_out_lists_and_takes_back(project: Path) -> None:
    def access(*arguments: str) -> Any:
        result = run_cli("--set", "auth.keys=api.keys", "api-keys", *arguments, "--json", folder=project)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    made = access("create", "shop", "--days", "30")
    options = AuthOptions(str(project / "api.keys")).open()
    principal = asyncio.run(options.authorize({b"x-api-key": made["key"].encode()}, "predict"))
    assert (principal.name, principal.credential) == ("shop", "key")
    assert made["key"] not in (project / "api.keys").read_text()
    (listed,) = access("list")
    assert (listed["name"], listed["scopes"], "sha256" in listed) == ("shop", ["predict"], False)
    access("revoke", "shop")
    assert access("list") == []
    result = run_cli("api-keys", "create", "shop", folder=project)
    assert result.returncode == 2
    assert "auth.keys" in result.stderr


# Certificates


class Authority:
    """Makes certificates."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.key, self.certificate = self._make(name, name, None)
        self.file = self._write(name, self.key, self.certificate)[0]

    def certify(self, name: str) -> tuple[Path, Path]:  # certificate and key
        return self._write(name, *self._make(name, self.name, self.key))

    def _make(self, name: str, issuer: str, signer: Any) -> tuple:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
        made = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number())
        made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        made = made.add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return key, made.sign(signer or key, hashes.SHA256())

    def _write(self, name: str, key: Any, certificate: Any) -> tuple[Path, Path]:
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *private))
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return paths


def test_only_clients_of_our_authority_get_in(shelf: Path, tmp_path: Path, row: dict) -> None:  # noqa: F811
    ours, theirs, port = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs"), free_port()
    friend, other = ours.certify("friend"), theirs.certify("other")
    tls = TlsOptions(*map(str, ours.certify("server")), str(ours.file))

    def client(pair: tuple[Path, Path] | None) -> httpx.Client:
        context = ssl.create_default_context(cafile=ours.file)
        if pair:
            context.load_cert_chain(*pair)
        return httpx.Client(verify=context)

    def channel(pair: tuple[Path, Path] | None) -> grpc.Channel:
        certificate, key = (path.read_bytes() for path in pair) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials(ours.file.read_bytes(), key, certificate)
        return grpc.secure_channel(f"localhost:{port}", credentials)

    logs = LogOptions(folder=str(tmp_path / "logs"))
    with serve(shelf, tls=tls, grpc_port=port, logs=logs) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        assert url.startswith("https://")
        with client(friend) as asking:
            answer = asking.post(f"{url}{WINE}:predict", json={"instances": [row]})
            assert answer.status_code == 200, answer.text
            assert asking.post(f"{url}/reload").status_code == 200
        for pair in (None, other):
            with (
                client(pair) as asking,
                pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)),
            ):
                asking.get(f"{url}/livez")
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.get(server.url.replace("https", "http") + "/livez")
        with channel(friend) as asking:
            assert call(asking, "PredictionService", "Predict")[0] == "INVALID_ARGUMENT"
            assert call(asking, "ModelService", "HandleReloadConfigRequest")[0] == "OK"
        actions = Audit(tmp_path / "logs" / "audit.jsonl").actions()
        assert [(action["action"], action["principal"], action["result"]) for action in actions[1:]] == [
            ("reload", "friend", "begun"),
            ("reload", "friend", "done"),
        ] * 2
        for pair in (None, other):
            with channel(pair) as asking:
                assert call(asking, "PredictionService", "Predict")[0] == "UNAVAILABLE"


def test_a_renewed_certificate_is_used_and_a_damaged_one_is_not(shelf: Path, tmp_path: Path) -> None:  # noqa: F811
    ours, port = Authority(tmp_path, "ours"), free_port()
    certificate, key = ours.certify("server")

    def shown(port: int) -> str:
        return ssl.get_server_certificate(("localhost", port))

    with serve(shelf, tls=TlsOptions(str(certificate), str(key)), grpc_port=port) as server:
        ports = int(server.url.rpartition(":")[2]), port
        assert [shown(port_number) for port_number in ports] == [certificate.read_text()] * 2
        ours.certify("server")
        wait_until(lambda: [shown(port_number) for port_number in ports] == [certificate.read_text()] * 2, 20)
        good = certificate.read_text()
        certificate.write_text("half a certif")
        with httpx.Client(verify=ssl.create_default_context(cafile=ours.file)) as client:
            for _ in range(5):
                assert client.get(f"https://localhost:{ports[0]}/livez").status_code == 200
        assert [shown(port_number) for port_number in ports] == [good] * 2


def test_files_that_make_no_certificate_are_refused_at_the_start(shelf: Path, tmp_path: Path) -> None:  # noqa: F811
    ours = Authority(tmp_path, "ours")
    certificate, _ = ours.certify("server")
    _, key = ours.certify("another")
    for pair in ((certificate, key), (certificate, tmp_path / "none.key")):
        with pytest.raises(MlkitError), serve(shelf, tls=TlsOptions(*map(str, pair))):
            pass


# Web pages


@contextlib.contextmanager
def site(page: bytes = b"<title>shop</title>") -> Iterator[str]:
    """A server of a web page; its origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


ASK = """
fetch("URL", {method: "POST", headers: {"content-type": "application/json", "x-api-key": "KEY"}, body: 'BODY'})
  .then(async (answer) => [answer.status, answer.headers.get("model-version"), await answer.json()])
  .catch((error) => error.name)
"""


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_pages_of_allowed_origins_predict_from_a_browser(shelf: Path, tmp_path: Path, row: dict) -> None:  # noqa: F811
    key = new_api_key(tmp_path / "api.keys", "page")
    with site() as ours, site() as theirs:
        auth = AuthOptions(str(tmp_path / "api.keys"))
        with serve(shelf, cors_origins=(ours,), auth=auth) as server:
            script = ASK.replace("URL", f"{server.url}{WINE}:predict")
            good, bad = (json.dumps({"instances": [instance]}) for instance in (row, {}))
            with Page(f"{ours}/") as page:
                status, version, answer = page.ask(script.replace("KEY", key).replace("BODY", good))
                assert (status, version, len(answer["predictions"])) == (200, "1", 1)
                status, _, answer = page.ask(script.replace("KEY", key).replace("BODY", bad))
                assert (status, answer["error"][:20]) == (400, "Row 0 of 'instances'")
                status, _, answer = page.ask(script.replace("KEY", "mlkit_x_y").replace("BODY", good))
                assert (status, list(answer)) == (401, ["error"])
            with Page(f"{theirs}/") as page:
                assert page.ask(script.replace("KEY", key).replace("BODY", good)) == "TypeError"


def test_no_cross_origin_page_is_allowed_by_default(guarded: tuple, row: dict) -> None:  # noqa: F811
    server, _, texts, _ = guarded
    origin, key = {"origin": "https://shop.example"}, bearer(texts["shop"])
    before = httpx.options(
        f"{server.url}{WINE}:predict", headers=origin | {"access-control-request-method": "POST"} | key
    )
    response = httpx.post(f"{server.url}{WINE}:predict", json={"instances": [row]}, headers=origin | key)
    assert response.status_code == 200
    assert not [name for answer in (before, response) for name in answer.headers if name.startswith("access-control")]


def test_what_is_no_origin_is_refused_before_anything_starts(project: Path) -> None:
    (project / "1").mkdir()
    (project / "1" / "saved_model.pb").touch()
    result = run_cli("--set", "serving.cors_origins=*", "serve", "shop=.", folder=project)
    assert result.returncode == 2
    assert "like https://shop.example" in result.stderr
