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
        limits=BatchingConfig(waiting=64),
        access=AuthOptions("/etc/churn/api.keys"),
        logs=LogOptions(share=0.01, sensitive=("income",)),
    )
    assert ServerOptions.from_json(options.to_json()) == options
    every = ServerOptions((ServedPath("m", "/m"),), tls=TlsOptions("a.pem", "b.pem"), origins=("https://shop.example",))
    assert ServerOptions.from_json(every.to_json()) == every


def test_log_options_come_from_the_settings() -> None:
    settings = load_settings({"serving.share": "0.25", "serving.sensitive": "income, name,", "serving.lines": "json"})
    options = LogOptions.from_settings(settings)
    assert (options.share, options.sensitive, options.lines) == (0.25, ("income", "name"), "json")


def test_a_path_without_a_model_has_no_source(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no SavedModel"):
        ServedPath("m", str(tmp_path)).source(ServerOptions(()))


@pytest.mark.parametrize(
    ("host", "public"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True)]
)
def test_addresses_of_this_machine_are_not_public(host: str, public: bool) -> None:
    assert ServerOptions((), host=host).public == public
