"""What runs a model: the session gives what TensorFlow's own functions give, to the last bit."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlkit._compat.tensorflow import has_tested_sessions
from mlkit.data import load_dataset
from mlkit.errors import ModelError, ServingError
from mlkit.export import convert_model, export_saved_model
from mlkit.export.signatures import PREDICT
from mlkit.models import build_model
from mlkit.serving.model_manager import load_and_warm_up
from mlkit.serving.protocol import read_predict
from mlkit.serving.runtimes import (
    Predictor,
    allowed_difference,
    find_golden,
    golden_rows,
    load_predictor,
    warm_up,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the shop: texts, dates and numbers; its predictions do not matter here."""
    data = load_dataset("retail", rows=600)
    model = build_model("wide_deep", data)
    version = export_saved_model(model, data, tmp_path_factory.mktemp("models") / "shop")
    convert_model(model, data, version / "litert", ["float32", "int8"])
    return version


@pytest.fixture(scope="module")
def both(shop: Path) -> Iterator[tuple[Predictor, Predictor]]:
    """By session, and the official way."""
    predictors = load_predictor(shop), load_predictor(shop, "eager")
    yield predictors
    for predictor in predictors:
        predictor.close()


def bits(values: np.ndarray) -> object:
    return values.tolist() if values.dtype == object else (values.dtype, values.shape, values.tobytes())


def test_the_sessions_of_the_installed_tensorflow_were_tested(both: tuple[Predictor, Predictor]) -> None:
    assert has_tested_sessions()
    assert [type(predictor).__name__ for predictor in both] == ["SessionPredictor", "EagerPredictor"]


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_a_session_equals_eager_functions_bit_for_bit(rows: int, shop: Path, both: tuple[Predictor, Predictor]) -> None:
    body = json.dumps({"instances": golden_rows(shop)[:rows]}).encode()
    inputs = read_predict(body, both[0].signatures).inputs
    exact, official = (predictor.run("serving_default", inputs) for predictor in both)
    assert {name: bits(values) for name, values in exact.items()} == {n: bits(v) for n, v in official.items()}


def test_every_signature_returns_the_same(shop: Path, both: tuple[Predictor, Predictor]) -> None:
    from mlkit.export.saved_model import as_examples

    columns = {name: [row[name] for row in golden_rows(shop)] for name in golden_rows(shop)[0]}
    examples = np.array(as_examples(columns), object)
    for name in set(both[0].signatures) - {"serving_default", "serving_bytes"}:
        (key,) = both[0].signatures[name].inputs
        exact, official = (predictor.run(name, {key: examples}) for predictor in both)
        assert {key: bits(values) for key, values in exact.items()} == {k: bits(v) for k, v in official.items()}


def test_invalid_examples_are_rejected_with_a_reason(both: tuple[Predictor, Predictor]) -> None:
    for predictor in both:
        for example in (b"no example", b"\xff\xfe\xfd"):
            with pytest.raises(ServingError) as raised:
                predictor.run("serving_examples", {"examples": np.array([example], object)})
            assert raised.value.code == "INVALID_ARGUMENT"
            assert "node" not in str(raised.value)


def test_threads_share_a_session(shop: Path, both: tuple[Predictor, Predictor]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    rows = golden_rows(shop)
    calls = [read_predict(json.dumps({"instances": [row]}).encode(), both[0].signatures).inputs for row in rows]
    alone = [bits(both[0].run("serving_default", inputs)["probabilities"]) for inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda inputs: bits(both[0].run("serving_default", inputs)["probabilities"]), calls * 5)
    assert list(together) == alone * 5


def test_a_process_with_sessions_only_predicts_the_same_and_imports_no_keras(
    shop: Path, both: tuple[Predictor, Predictor]
) -> None:
    code = (
        "import sys, json\n"
        "from mlkit.serving.protocol import read_predict\n"
        "from mlkit.serving.runtimes import golden_rows, load_predictor, prepare_runtime\n"
        "prepare_runtime('tensorflow')\n"
        "model = load_predictor(sys.argv[1])\n"
        "body = json.dumps({'instances': golden_rows(model.folder)}).encode()\n"
        "answers = model.run('serving_default', read_predict(body, model.signatures).inputs)\n"
        "model.close()\n"
        "heavy = [name for name in ('keras', 'sklearn', 'scipy', 'polars') if name in sys.modules]\n"
        "print(json.dumps([answers['probabilities'].tobytes().hex(), heavy]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, shop], capture_output=True, text=True, check=True, timeout=120)
    answered, heavy = json.loads(result.stdout)
    inputs = read_predict(json.dumps({"instances": golden_rows(shop)}).encode(), both[0].signatures).inputs
    assert bytes.fromhex(answered) == both[0].run("serving_default", inputs)["probabilities"].tobytes()
    assert heavy == []


def test_loading_again_and_again_takes_no_more_memory(shop: Path) -> None:
    code = (
        "import gc, sys, psutil\n"
        "from mlkit.serving.runtimes import find_golden, load_predictor, prepare_signatures\n"
        "from mlkit.serving.runtimes import prepare_runtime, warm_up\n"
        "prepare_runtime('tensorflow')\n"
        "golden, memory = find_golden(__import__('pathlib').Path(sys.argv[1])), []\n"
        "for _ in range(10):\n"
        "    model = load_predictor(sys.argv[1])\n"
        "    warm_up(model, golden)\n"
        "    prepare_signatures(model)\n"
        "    model.close()\n"
        "    del model\n"
        "    gc.collect()\n"
        "    memory.append(psutil.Process().memory_info().rss)\n"
        "print(memory[3], memory[-1])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, shop], capture_output=True, text=True, check=True, timeout=300)
    early, late = map(int, result.stdout.split())
    assert late < 1.1 * early


def test_a_model_without_golden_requests_is_warmed_up_with_a_blank_row(both: tuple[Predictor, Predictor]) -> None:
    assert warm_up(both[0], None) > 0


# Consistency with the exported predictions


def spoil_golden(version: Path, change: Callable[[dict], object]) -> None:
    """Change what is kept with a version, as its files would be changed by other hands."""
    file = version / "assets.extra" / "golden.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def shift(record: dict, row: int, by: float) -> None:
    scores = record["predictions"][row]["probabilities"]
    scores[0] += by


@pytest.mark.parametrize("runtime", ["tensorflow", "litert"])
def test_a_version_with_other_predictions_is_rejected(runtime: str, shop: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    shutil.copytree(shop, version)
    load_and_warm_up(version, runtime).close()
    form = {"tensorflow": "savedmodel", "litert": "litert-float32"}[runtime]
    for row, by in ((3, 0.05), (0, float("nan"))):
        spoil_golden(version, lambda record, row=row, by=by: shift(record, row, by))
        with pytest.raises(ModelError, match=f"{form} does not predict as the model did .* 'probabilities' differs by"):
            load_and_warm_up(version, runtime)


def test_a_small_error_in_all_predictions_is_detected(shop: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    shutil.copytree(shop, version)
    spoil_golden(version, lambda record: [shift(record, row, 0.002) for row in range(len(record["predictions"]))])
    with pytest.raises(ModelError, match=r"by 0\.002 on average, where 0\.01 and 0\.001"):
        load_and_warm_up(version)


def test_a_tampered_converted_model_is_rejected(shop: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    shutil.copytree(shop, version)
    record = version / "litert" / "float32" / "preprocessing.json"
    features = json.loads(record.read_text())
    column = next(first for item in features["inputs"] for first in item.get("columns", ()) if "scale" in first)
    column["scale"] = 40 * column["scale"]
    record.write_text(json.dumps(features))
    with pytest.raises(ModelError, match="litert-float32 does not predict as the model did"):
        load_and_warm_up(version, "litert")
    load_and_warm_up(version, "litert", "int8").close()
    load_and_warm_up(version).close()


def test_what_parity_accepted_is_accepted(shop: Path, tmp_path: Path) -> None:
    version = tmp_path / "1"
    shutil.copytree(shop, version)
    spoil_golden(version, lambda record: shift(record, 0, 0.3))
    with pytest.raises(ModelError, match="mlkit parity RUN --tolerance litert-int8="):
        load_and_warm_up(version, "litert", "int8")
    accepted = [
        {"target": "litert-int8", "tolerance": 0.5, "passed": True},
        {"target": "savedmodel", "tolerance": None},
    ]
    (version / "parity.json").write_text(json.dumps({"targets": accepted}))
    load_and_warm_up(version, "litert", "int8").close()
    with pytest.raises(ModelError):
        load_and_warm_up(version)
    assert allowed_difference(version, "litert-float16") == 0.01


# Examples without TensorFlow


def test_a_converted_model_classifies_examples_as_the_saved_model(
    shop: Path, both: tuple[Predictor, Predictor]
) -> None:
    from mlkit.export.saved_model import as_examples

    golden = find_golden(shop)
    examples = np.array([*as_examples(golden.features), b""], object)  # the last one: all missing
    portable = load_predictor(shop, "litert")
    assert set(both[0].signatures) - set(portable.signatures) == {"serving_bytes"}
    for name in ("serving_examples", "classify"):
        own, other = portable.signatures[name], both[0].signatures[name]
        assert (own.method, own.inputs.keys()) == (other.method, other.inputs.keys())
        assert {example.name: (example.dtype, example.shape) for example in own.outputs.values()} == {
            example.name: (example.dtype, example.shape and (None, *example.shape[1:]))
            for example in other.outputs.values()
        }
        (key,) = own.inputs
        converted, exact = (predictor.run(name, {key: examples}) for predictor in (portable, both[0]))
        assert converted.keys() == exact.keys()
        for output, values in exact.items():
            if values.dtype == object:
                assert converted[output].tolist() == values.tolist()
            else:
                np.testing.assert_allclose(converted[output], values, atol=1e-5)
    for bad in (b"no example", b"\xff\xfe\xfd"):
        with pytest.raises(ServingError) as raised:
            portable.run("classify", {"inputs": np.array([bad], object)})
        assert raised.value.code == "INVALID_ARGUMENT"
    portable.close()


def test_several_labels_have_a_signature_each_without_tensorflow(tmp_path: Path) -> None:
    rows = [f"{number % 7},{'ab'[number % 2]},{'yes' if number % 3 else 'no'},{number / 10}" for number in range(60)]
    (tmp_path / "both.csv").write_text("\n".join(["size,shape,kept,weight", *rows]))
    data = load_dataset(str(tmp_path / "both.csv"), label=["kept", "weight"])
    model = build_model("mlp", data)
    version = export_saved_model(model, data, tmp_path / "several")
    convert_model(model, data, version / "litert", ["float32"])
    portable, exact = load_predictor(version, "litert"), load_predictor(version)
    examples = np.array([b"", b""], object)
    methods = {name: info.method for name, info in portable.signatures.items() if info.method != PREDICT}
    assert methods == {name: info.method for name, info in exact.signatures.items() if info.method != PREDICT}
    for name in methods:
        converted, expected = (predictor.run(name, {"inputs": examples}) for predictor in (portable, exact))
        for output, values in expected.items():
            if values.dtype == object:
                assert converted[output].tolist() == values.tolist()
            else:
                np.testing.assert_allclose(converted[output].reshape(values.shape), values, rtol=1e-4, atol=1e-5)
    for predictor in (portable, exact):
        predictor.close()


def test_a_model_takes_rows_as_it_was_trained_on_them(tmp_path: Path) -> None:
    """null is a missing value, and whole numbers beyond 2^24 are rounded to float32, in golden requests as well."""
    from mlkit._tensorflow import tf

    rng, rows = np.random.default_rng(3), 300
    table = pl.DataFrame({
        "account": rng.integers(2**24, 2**31, rows),
        "amount": np.where(rng.random(rows) < 0.2, np.nan, rng.normal(size=rows)),
        "city": rng.choice(["Porto", "Lille", ""], rows),
        "churned": rng.integers(0, 2, rows),
    })  # fmt: skip
    table.with_columns(pl.col("city").replace("", None), pl.col("amount").fill_nan(None)).write_csv(tmp_path / "a.csv")
    data = load_dataset(str(tmp_path / "a.csv"), "churned")
    version = export_saved_model(build_model("mlp", data), data, tmp_path / "model")
    predictor = load_predictor(version)
    assert warm_up(predictor, find_golden(version)) > 0
    body = json.dumps({"instances": [{"account": 2**30 + 1, "amount": None, "city": None}]}).encode()
    sent = predictor.run("serving_default", read_predict(body, predictor.signatures).inputs)
    raw = {"account": np.float32([2**30 + 1]), "amount": np.float32([np.nan]), "city": np.array([b""], object)}
    function = tf.saved_model.load(str(version)).signatures["serving_default"]
    loaded = function(**{name: tf.constant(values) for name, values in raw.items()})
    for name, values in loaded.items():
        np.testing.assert_array_equal(sent[name], values.numpy())
    foreign = {name: replace(info, takes_missing_values=False) for name, info in predictor.signatures.items()}
    with pytest.raises(ServingError, match="takes float32, which cannot hold 1073741825 exactly"):
        read_predict(body, foreign)
    predictor.close()
