"""TF Serving's REST API in one process, called through ASGI without a socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from mlkit.errors import InputError
from mlkit.export.signatures import PREDICT, SignatureInfo, TensorInfo
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.rest import ResponseCache, RestApplication, allow_origins, read_origins, read_path
from mlkit.serving.sources import FolderSource


class Doubling:
    """Model that doubles its input."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, 0
        inputs, outputs = (TensorInfo(name, np.dtype("float32"), (None,), name) for name in ("price", "double"))
        signature = SignatureInfo("serving_default", {"price": inputs}, {"double": outputs}, PREDICT)
        self.signatures = {"serving_default": signature}

    def run(self, signature: str, inputs: dict) -> dict:
        self.calls += 1
        return {"double": inputs["price"] * 2}

    def close(self) -> None:
        pass


@dataclass
class Served:
    """A served model with a client."""

    manager: ModelManager
    application: RestApplication
    client: httpx.AsyncClient


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    """Version 3 of the model shop."""
    (folder / "3").mkdir()
    (folder / "3" / "saved_model.pb").touch()
    manager = ModelManager({"shop": FolderSource(folder)}, Doubling)
    await manager.update()
    application = RestApplication(manager, body_bytes=2000, cache_bytes=10_000)
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield Served(manager, application, client)
    await manager.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Served], Awaitable[None]]], None]:
    """Run a test on an event loop, with the served model."""

    def run_test(test: Callable[[Served], Awaitable[None]]) -> None:
        async def with_model() -> None:
            async with served(tmp_path) as model:
                await test(model)

        asyncio.run(with_model())

    return run_test


def test_paths_name_models_versions_labels_and_verbs() -> None:
    assert read_path("/v1/models/churn/versions/3:Predict") == ("churn", 3, None, "predict")
    assert read_path("/v1/models/churn/labels/champion/metadata") == ("churn", None, "champion", "metadata")
    assert read_path("/v1/models/churn") == ("churn", None, None, "status")
    for path in ("/v1/models/churn:explain", "/v1/models/churn/versions/latest", "/v1/models", "/"):
        assert read_path(path) is None


def test_the_cache_drops_the_least_recently_used_and_takes_nothing_large() -> None:
    cache = ResponseCache(3000)
    for number in range(20):
        cache.put(("churn", 3, b"%d" % number), b"answer")
    assert (cache.get(("churn", 3, b"19")), cache.get(("churn", 3, b"0"))) == (b"answer", None)
    cache.put(("churn", 3, b"large"), bytes(1000))
    assert cache.get(("churn", 3, b"large")) is None
    assert cache.size <= 3000


def test_rows_get_rows_and_columns_get_columns(run: Callable) -> None:
    async def test(model: Served) -> None:
        body = {"instances": [{"price": 1.5}, {"price": 2}]}
        rows = await model.client.post("/v1/models/shop:predict", json=body)
        assert (rows.status_code, rows.json()) == (200, {"predictions": [3.0, 4.0]})
        assert (rows.headers["model-name"], rows.headers["model-version"]) == ("shop", "3")
        body = b'{"inputs": {"price": [1, 2.5]}}'
        columns = await model.client.post("/v1/models/shop/versions/3:predict", content=body)
        assert columns.json() == {"outputs": [2.0, 5.0]}

    run(test)


def test_errors_have_tf_servings_codes(run: Callable) -> None:
    requests = [
        ("POST", "/v1/models/shop:predict", {"instances": [{"prise": 1}]}, 400, "Did you mean 'price'?"),
        ("POST", "/v1/models/shop:predict", {"instances": [{"price": "cheap"}]}, 400, "takes float32"),
        ("POST", "/v1/models/shop:predict", {"instances": [{"price": 1}] * 500}, 413, "2,000 bytes"),
        ("POST", "/v1/models/shop:classify", {"examples": [{"price": 1.0}]}, 400, ""),
        ("POST", "/v1/models/shop:explain", {}, 400, "Malformed request: POST /v1/models/shop:explain"),
        ("POST", "/v1/models/shop/versions/7:predict", {"instances": [1]}, 404, "Specific(shop, 7)"),
        ("POST", "/v1/models/shop/labels/best:predict", {"instances": [1]}, 404, "best"),
        ("GET", "/v1/models/shoe", None, 404, "Did you mean 'shop'?"),
        ("GET", "/v1/models", None, 400, "Missing model name in request."),
    ]

    async def test(model: Served) -> None:
        responses = await asyncio.gather(
            *(model.client.request(method, path, json=body) for method, path, body, _, _ in requests)
        )
        assert [response.status_code for response in responses] == [status for *_, status, _ in requests]
        for response, (*_, message) in zip(responses, requests, strict=True):
            assert message in response.json()["error"]
        headers = {"request-timeout": "soon"}
        late = await model.client.post("/v1/models/shop:predict", json={"instances": [1]}, headers=headers)
        assert (late.status_code, late.json()["error"][:15]) == (400, "request-timeout")

    run(test)


def test_a_repeated_request_does_not_reach_the_model(run: Callable) -> None:
    async def test(model: Served) -> None:
        predictor = model.manager.acquire("shop").predictor
        before = predictor.calls
        for _ in range(3):
            await model.client.post("/v1/models/shop:predict", json={"instances": [7]})
        assert predictor.calls - before == 1

    run(test)


def test_status_metadata_probes_and_documentation(run: Callable) -> None:
    async def test(model: Served) -> None:
        status = await model.client.get("/v1/models/shop")
        assert status.json()["model_version_status"][0]["version"] == "3"
        metadata = (await model.client.get("/v1/models/shop/metadata")).json()
        assert metadata["model_spec"] == {"name": "shop", "signature_name": "", "version": "3"}
        ready = await model.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": True})
        documented = (await model.client.get("/openapi.json")).json()["paths"]
        assert list(documented["/v1/models/{model}/labels/{label}:predict"]) == ["post"]
        assert list(documented["/readyz"]["get"]["responses"]) == ["200", "503"]
        assert (await model.client.delete("/livez")).status_code == 405
        assert (await model.client.get("/nothing")).json() == {"error": "Not Found"}
        (overview,) = (await model.client.get("/models")).json()
        assert (overview["name"], overview["default"], overview["problem"]) == ("shop", 3, "")

    run(test)


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://localhost:8501", "localhost:8501", 200),
        ("https://page.example", "localhost:8501", 403),
        ("http://page.example:8501", "page.example:8501", 403),
        ("null", "localhost:8501", 403),
    ],
)
def test_foreign_pages_in_a_local_browser_may_not_reload(run: Callable, origin: str, host: str, status: int) -> None:
    async def test(model: Served) -> None:
        reloaded = await model.client.post("/reload", headers={"origin": origin, "host": host})
        assert reloaded.status_code == status
        assert ("error" in reloaded.json()) == (status == 403)
        assert (await model.client.post("/reload")).status_code == 200

    run(test)


@pytest.mark.parametrize(("origin", "status"), [("https://shop.example", 200), ("https://shop.example.org", 400)])
def test_only_pages_of_allowed_origins_may_read_responses(run: Callable, origin: str, status: int) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-api-key"}

    async def test(model: Served) -> None:
        application = allow_origins(model.application, read_origins("https://shop.example"))
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as browser:
            path, body = "/v1/models/shop:predict", {"instances": ["cheap"]}
            allowed = await browser.options(path, headers=preflight | {"origin": origin})
            response = await browser.post(path, json=body, headers={"origin": origin})
        origins = [answer.headers.get("access-control-allow-origin") for answer in (allowed, response)]
        assert (allowed.status_code, response.status_code) == (status, 400)
        assert origins == ([origin] * 2 if status == 200 else [None] * 2)

    run(test)


def test_origins_are_scheme_host_and_port() -> None:
    origins = read_origins("https://shop.example, http://localhost:3000,")
    assert origins == ("https://shop.example", "http://localhost:3000")
    assert read_origins("") == ()
    for wrong in ("*", "shop.example", "https://shop.example/page", "https://*.example"):
        with pytest.raises(InputError, match="A page's origin is like"):
            read_origins(wrong)
