"""Options of the model server."""

from pathlib import Path

import pytest

from mlkit.config import load_settings
from mlkit.errors import NotFoundError
from mlkit.serving import ServerOptions
from mlkit.serving.auth import AuthOptions
from mlkit.serving.batcher import BatchingConfig
from mlkit.serving.options import LogOptions, ServedPath
from mlkit.serving.tls import TlsOptions


def test_options_reach_another_process_unchanged() -> None:
    options = ServerOptions(
        (ServedPath("churn", reference="churn@champion"),),
        processes=2,
        batching=BatchingConfig(max_queued=64),
        auth=AuthOptions("/etc/churn/api.keys"),
        logs=LogOptions(request_sampling_rate=0.01, masked_features=("income",)),
    )
    assert ServerOptions.from_json(options.to_json()) == options
    every = ServerOptions(
        (ServedPath("m", "/m"),), tls=TlsOptions("a.pem", "b.pem"), cors_origins=("https://shop.example",)
    )
    assert ServerOptions.from_json(every.to_json()) == every


def test_log_options_come_from_the_settings() -> None:
    changed = {"request_sampling_rate": "0.25", "masked_features": "income, name,", "log_format": "json"}
    settings = load_settings({f"serving.{name}": value for name, value in changed.items()})
    options = LogOptions.from_settings(settings)
    assert (options.request_sampling_rate, options.masked_features, options.log_format) == (
        0.25,
        ("income", "name"),
        "json",
    )


def test_a_path_without_a_model_has_no_source(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no SavedModel"):
        ServedPath("m", str(tmp_path)).source(ServerOptions(()))


@pytest.mark.parametrize(
    ("host", "public"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True)]
)
def test_addresses_of_this_machine_are_not_public(host: str, public: bool) -> None:
    assert ServerOptions((), host=host).public == public
