"""What runs a model: the session gives what TensorFlow's own functions give, to the last bit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlkit.data import load_dataset
from mlkit.export import export_saved_model
from mlkit.messages import ServingError
from mlkit.model import build_model
from mlkit.requests import read_predict
from mlkit.servables import Servable, golden_rows, load_servable, sessions_work, warm_up


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the shop: texts, moments, numbers; what it answers does not matter here."""
    data = load_dataset("retail", rows=600)
    return export_saved_model(build_model("wide_deep", data), data, tmp_path_factory.mktemp("models") / "shop")


@pytest.fixture(scope="module")
def both(shop: Path) -> Iterator[tuple[Servable, Servable]]:
    """By session, and the official way."""
    servables = load_servable(shop), load_servable(shop, "eager")
    yield servables
    for servable in servables:
        servable.close()


def bits(values: np.ndarray) -> object:
    return values.tolist() if values.dtype == object else (values.dtype, values.shape, values.tobytes())


def test_the_installed_tensorflow_is_one_whose_sessions_were_tried(both: tuple[Servable, Servable]) -> None:
    assert sessions_work()
    assert [type(servable).__name__ for servable in both] == ["SessionServable", "EagerServable"]


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_a_session_answers_as_the_official_way_bit_for_bit(
    rows: int, shop: Path, both: tuple[Servable, Servable]
) -> None:
    asked = json.dumps({"instances": golden_rows(shop)[:rows]}).encode()
    inputs = read_predict(asked, both[0].signatures).inputs
    exact, official = (servable.run("serving_default", inputs) for servable in both)
    assert {name: bits(values) for name, values in exact.items()} == {n: bits(v) for n, v in official.items()}


def test_every_signature_answers_the_same(shop: Path, both: tuple[Servable, Servable]) -> None:
    from mlkit.export import as_examples

    columns = {name: [row[name] for row in golden_rows(shop)] for name in golden_rows(shop)[0]}
    examples = np.array(as_examples(columns), object)
    for name in set(both[0].signatures) - {"serving_default", "serving_bytes"}:
        (key,) = both[0].signatures[name].inputs
        exact, official = (servable.run(name, {key: examples}) for servable in both)
        assert {key: bits(values) for key, values in exact.items()} == {k: bits(v) for k, v in official.items()}


def test_bad_examples_are_refused_with_a_reason(both: tuple[Servable, Servable]) -> None:
    for servable in both:
        for example in (b"no example", b"\xff\xfe\xfd"):
            with pytest.raises(ServingError) as raised:
                servable.run("serving_examples", {"examples": np.array([example], object)})
            assert raised.value.code == "INVALID_ARGUMENT"
            assert "node" not in str(raised.value)


def test_threads_share_a_session(shop: Path, both: tuple[Servable, Servable]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rows = golden_rows(shop)
    calls = [read_predict(json.dumps({"instances": [row]}).encode(), both[0].signatures).inputs for row in rows]
    alone = [bits(both[0].run("serving_default", inputs)["probabilities"]) for inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda inputs: bits(both[0].run("serving_default", inputs)["probabilities"]), calls * 5)
    assert list(together) == alone * 5


def test_a_process_with_sessions_only_answers_the_same_and_imports_no_keras(
    shop: Path, both: tuple[Servable, Servable]
) -> None:
    code = (
        "import sys, json\n"
        "from mlkit.requests import read_predict\n"
        "from mlkit.servables import golden_rows, load_servable, use_session_only\n"
        "use_session_only()\n"
        "model = load_servable(sys.argv[1])\n"
        "body = json.dumps({'instances': golden_rows(model.folder)}).encode()\n"
        "answers = model.run('serving_default', read_predict(body, model.signatures).inputs)\n"
        "model.close()\n"
        "heavy = [name for name in ('keras', 'sklearn', 'scipy', 'polars') if name in sys.modules]\n"
        "print(json.dumps([answers['probabilities'].tobytes().hex(), heavy]))\n"
    )
    told = subprocess.run([sys.executable, "-c", code, shop], capture_output=True, text=True, check=True, timeout=120)
    answered, heavy = json.loads(told.stdout)
    inputs = read_predict(json.dumps({"instances": golden_rows(shop)}).encode(), both[0].signatures).inputs
    assert bytes.fromhex(answered) == both[0].run("serving_default", inputs)["probabilities"].tobytes()
    assert heavy == []


def test_loading_again_and_again_takes_no_more_memory(shop: Path) -> None:
    code = (
        "import gc, sys, psutil\n"
        "from mlkit.servables import golden_rows, load_servable, prepare_signatures, use_session_only, warm_up\n"
        "use_session_only()\n"
        "rows, memory = golden_rows(__import__('pathlib').Path(sys.argv[1])), []\n"
        "for _ in range(10):\n"
        "    model = load_servable(sys.argv[1])\n"
        "    warm_up(model, rows)\n"
        "    prepare_signatures(model)\n"
        "    model.close()\n"
        "    del model\n"
        "    gc.collect()\n"
        "    memory.append(psutil.Process().memory_info().rss)\n"
        "print(memory[3], memory[-1])\n"
    )
    told = subprocess.run([sys.executable, "-c", code, shop], capture_output=True, text=True, check=True, timeout=300)
    early, late = map(int, told.stdout.split())
    assert late < 1.1 * early


def test_a_model_without_golden_requests_is_asked_a_blank_row(both: tuple[Servable, Servable]) -> None:
    assert warm_up(both[0], []) > 0
