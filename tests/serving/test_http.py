"""The HTTP server: its fast path, and its fallback where uvicorn's internals are not as expected."""

import asyncio
import json
import logging
from pathlib import Path

import httpx
import numpy as np
import pytest

import mlkit._compat.uvicorn as compat
from mlkit.export.signatures import PREDICT, SignatureInfo, TensorInfo
from mlkit.serving import ServerOptions
from mlkit.serving.http import _find_inference_target, make_web_server
from mlkit.serving.model_manager import ModelManager
from mlkit.serving.rest import RestApplication
from mlkit.serving.server import open_port
from mlkit.serving.sources import FolderSource


class Doubling:
    """Model that doubles its input."""

    def __init__(self, folder: Path):
        inputs, outputs = (TensorInfo(name, np.dtype("float32"), (None,), name) for name in ("x", "y"))
        self.signatures = {"serving_default": SignatureInfo("serving_default", {"x": inputs}, {"y": outputs}, PREDICT)}

    def run(self, signature: str, inputs: dict) -> dict:
        return {"y": inputs["x"] * 2}

    def close(self) -> None:
        pass


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder that looks like version 1 of a model."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()
    return tmp_path


async def predict_over_http(folder: Path) -> tuple[str, httpx.Response, httpx.Response]:
    """Protocol class of a server, and its responses to a prediction and a status request."""
    manager = ModelManager({"times": FolderSource(folder)}, Doubling)
    await manager.update()
    web_server = make_web_server(RestApplication(manager), ServerOptions(()))
    listening = open_port("127.0.0.1", 0)
    serving = asyncio.ensure_future(web_server.serve(sockets=[listening]))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
        predicted = await client.post("/v1/models/times:predict", content=json.dumps({"instances": [1.5]}))
        status = await client.get("/v1/models/times")
    web_server.should_exit = True
    await serving
    await manager.close()
    return web_server.config.http_protocol_class.__name__, predicted, status


def test_predictions_take_the_direct_path(model_folder: Path) -> None:
    protocol, predicted, status = asyncio.run(predict_over_http(model_folder))
    assert protocol == "DirectProtocol"
    assert predicted.json() == {"predictions": [3.0]}
    assert status.status_code == 200


def test_another_uvicorn_serves_through_its_standard_path(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "has_protocol_internals", lambda: False)
    with caplog.at_level(logging.WARNING, "mlkit.serving"):
        protocol, predicted, status = asyncio.run(predict_over_http(model_folder))
    assert protocol == "HttpToolsProtocol"
    assert predicted.json() == {"predictions": [3.0]}
    assert predicted.headers["model-version"] == "1"
    assert status.status_code == 200
    assert "standard path" in caplog.text


@pytest.mark.parametrize(
    ("url", "verb"),
    [
        (b"/v1/models/times:predict", "predict"),
        (b"/v1/models/times/versions/3:Classify", "classify"),
        (b"/v1/models/times", None),
        (b"/v1/models/times:predict?a=b", None),
        (b"/v1/models/t%69mes:predict", None),
        (b"/livez", None),
    ],
)
def test_only_plain_urls_of_predictions_take_the_direct_path(url: bytes, verb: str | None) -> None:
    target = _find_inference_target(url)
    assert (target and target.verb) == verb
