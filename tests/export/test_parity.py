"""Every format gives the predictions of the original, and an error in one format is detected."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("ai_edge_litert")

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras
import tensorflow as tf

from mlkit.data import Dataset, load_dataset
from mlkit.errors import InputError, ModelError, NotFoundError, ParameterError
from mlkit.export import check_parity, convert_model, export_saved_model, load_saved_model, parity, tfjs
from mlkit.export import saved_model as export
from mlkit.export.golden import load_golden
from mlkit.export.golden_sampling import as_csv_row, as_json_row
from mlkit.export.litert import KINDS
from mlkit.export.litert_runtime import load_litert
from mlkit.export.parity import Parity
from mlkit.export.saved_model import SavedModel, as_requests
from mlkit.export.web_page import write_page
from mlkit.models import build_model
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from mlkit.training import fit
from mlkit.training import transfer as restoration
from tests.conftest import REPOSITORY, run_cli
from tests.export.test_web_page import needs_browser


@pytest.fixture(scope="module")
def model(digits: Dataset) -> keras.Model:
    network = build_model("cnn", digits)
    fit(network, digits, epochs=3)
    return network


@pytest.fixture(scope="module")
def all_formats(digits: Dataset, model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose model has every format that can be made on this machine."""
    run = RunStore(tmp_path_factory.mktemp("runs")).create("train", parameters={"model": "cnn"})
    run.log_data(digits.record())
    export_saved_model(model, digits, run)
    convert_model(model, digits, run, KINDS)
    with contextlib.suppress(InputError):  # without LiteRT.js there is no page
        write_page(run.folder, run.folder / "page.html", installed=REPOSITORY)
    return run


@pytest.fixture
def copied(all_formats: Run, tmp_path: Path) -> Run:
    """A copy of the run, to be damaged."""
    return Run(shutil.copytree(all_formats.folder, tmp_path / "runs" / all_formats.id))


@pytest.fixture(scope="module")
def planted(digits: Dataset, model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path]:
    """The model with an error of 1e-2 in its outputs, and its formats."""

    def shifted(scores: tf.Tensor) -> tf.Tensor:
        return 0.99 * scores + 0.01 * tf.concat([scores[:, 1:], scores[:, :1]], axis=1)

    wrong = keras.Model(model.input, keras.layers.Lambda(shifted, output_shape=(10,))(model.output))
    folder = tmp_path_factory.mktemp("planted")
    export_saved_model(wrong, digits, folder / "saved_model")
    convert_model(wrong, digits, folder / "litert", KINDS)
    return wrong, folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Run]:
    """A table with two labels and texts that are difficult in CSV, and a run with its model."""
    folder, generator = tmp_path_factory.mktemp("both"), np.random.default_rng(4)
    towns = ['Rome, "centre"', "{Oslo}", " Paris", "a\nb", "ÄÖ", None]
    table = {
        "town": [towns[n % len(towns)] for n in range(240)],
        "age": [None if n % 9 == 0 else float(n % 70) for n in range(240)],
        "a/b": generator.normal(size=240).astype("float32"),
        "sent": [f"2026-{1 + n % 12:02d}-{1 + n % 28:02d}" for n in range(240)],
        "kept": generator.choice(["yes", "no", "perhaps"], 240),
        "weight": generator.normal(50, 9, 240),
    }
    pl.DataFrame(table).write_csv(folder / "both.csv")
    dataset = load_dataset(str(folder / "both.csv"), label=["kept", "weight"])
    run = RunStore(folder / "runs").create("train", parameters={"model": "mlp"})
    run.log_data(dataset.record())
    network = build_model("mlp", dataset)
    fit(network, dataset, epochs=2)
    export_saved_model(network, dataset, run)
    convert_model(network, dataset, run, ["float32"])
    return dataset, run


def passed_by_target(parity: Parity) -> dict[str, bool | None]:
    """The result of each target; with several signatures all of them have to pass."""
    passed: dict[str, bool | None] = {}
    for result in parity.results:
        passed[result.target] = result.passed if passed.get(result.target, True) else passed[result.target]
    return passed


# -- all formats --


def test_every_format_gives_the_predictions_of_keras(all_formats: Run) -> None:
    matches = check_parity(all_formats, tolerances={"litert-int4": 0.3})
    present = {"keras", "savedmodel", *(f"litert-{kind}" for kind in KINDS)} | (
        {"browser"} if needs_browser.args[0] is False else set()
    )
    assert {name for name, passed in passed_by_target(matches).items() if passed} == present
    assert matches.passed
    record = json.loads((all_formats.folder / "parity.json").read_text())
    assert record["passed"] is True
    assert record["requests"] == 32
    assert "parity.json" in [artifact.path for artifact in all_formats.record.artifacts]
    server = next(target for target in record["targets"] if target["target"] == "server")
    assert (server["passed"], server["max_difference"]) == (None, None)
    assert "--server URL" in server["reason"]


def test_a_table_with_two_labels(both: tuple[Dataset, Run]) -> None:
    matches = check_parity(both[1])
    assert matches.passed, matches.reason
    signatures = [result.signature for result in matches.results if result.target == "savedmodel"]
    assert signatures[3:] == ["kept_classify", "weight_regress"]
    assert {result.agreement_rate for result in matches.results if result.signature == "weight_regress"} == {None}


# -- an error of 1e-2 in one format --


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_a_converted_model(kind: str, copied: Run, planted: tuple[keras.Model, Path]) -> None:
    shutil.rmtree(copied.folder / "litert" / kind)
    shutil.copytree(planted[1] / "litert" / kind, copied.folder / "litert" / kind)
    matches = check_parity(copied, [f"litert-{kind}"])
    assert not matches.passed
    assert matches.reason.startswith(f"litert-{kind} serving_default: differs by")


def test_an_error_in_weights_of_four_bits(tmp_path: Path) -> None:
    """The digits' network moves by more than 1e-2 when its weights are rounded so; a table's does not."""
    shop, store = load_dataset("retail", rows=600), RunStore(tmp_path)
    network = build_model("mlp", shop)
    fit(network, shop, epochs=2)
    higher = keras.layers.Lambda(lambda scores: tf.minimum(scores + 0.01, 1.0), output_shape=(1,))
    run = store.create("train")
    export_saved_model(network, shop, run)
    for model, passed in ((network, True), (keras.Model(network.input, higher(network.output)), False)):
        convert_model(model, shop, run, ["int4"])
        matches = check_parity(run, ["litert-int4"])
        assert matches.passed == passed, matches.reason
        shutil.rmtree(run.folder / "litert")
    assert matches.reason.startswith("litert-int4 serving_default: differs by")


def test_an_error_in_the_saved_model(copied: Run, planted: tuple[keras.Model, Path]) -> None:
    folder = copied.folder / "saved_model" / "1"
    golden = load_golden(folder)
    shutil.rmtree(folder)
    shutil.copytree(planted[1] / "saved_model" / "1", folder)
    (folder / "assets.extra" / "golden.json").write_text(golden.to_json())
    matches = check_parity(copied, ["savedmodel"])
    for signature in ("serving_default", "serving_examples", "serving_bytes", "classify"):
        assert f"savedmodel {signature}: differs by" in matches.reason


@pytest.mark.parametrize("signature", ["serving_examples", "serving_bytes", "classify"])
def test_an_error_in_one_signature(
    signature: str, copied: Run, digits: Dataset, model: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planted(export.ServingModule):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            functions = self.task_functions if signature == "classify" else vars(self)
            name = {"serving_examples": "predict_examples", "serving_bytes": "predict_bytes"}.get(signature, signature)
            right = functions[name]
            wrong = tf.function(
                lambda texts: shifted(right(texts)), input_signature=right.input_signature, autograph=False
            )
            if signature == "classify":
                self.task_functions = {**self.task_functions, name: wrong}
            else:
                setattr(self, name, wrong)

    def shifted(outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {k: values + 0.01 if k in ("probabilities", "scores") else values for k, values in outputs.items()}

    monkeypatch.setattr(export, "ServingModule", Planted)
    shutil.rmtree(copied.folder / "saved_model" / "1")
    export_saved_model(model, digits, copied)
    matches = check_parity(copied, ["savedmodel"])
    wrong = {result.signature for result in matches.results if result.passed is False}
    assert wrong == ({"serving_examples", "classify"} if signature == "serving_examples" else {signature})
    assert f"savedmodel {signature}: differs by 0.01" in matches.reason


def test_an_error_in_keras(
    all_formats: Run, digits: Dataset, planted: tuple[keras.Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoration, "restore_model", lambda run: (planted[0], digits))
    assert check_parity(all_formats, ["keras"]).reason.startswith("keras model: differs by 0.0")


@needs_browser
def test_an_error_in_the_page(copied: Run, planted: tuple[keras.Model, Path]) -> None:
    write_page(planted[1], copied.folder / "page.html", installed=REPOSITORY)
    assert check_parity(copied, ["browser"]).reason.startswith("browser serving_default: differs by")
    text = (copied.folder / "page.html").read_text(encoding="utf-8")
    (copied.folder / "page.html").write_text(text.replace("self.mlkit", "self.other"), encoding="utf-8")
    assert "browser serving_default: the page reports: mlkit is not defined" in check_parity(copied, ["browser"]).reason


def test_an_error_in_tfjs(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied.folder / "tfjs").mkdir()
    (copied.folder / "tfjs" / "model.json").write_text("{}")
    network, error = load_litert(copied.folder), 0.0

    def predict(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = network({name: [row[name] for row in rows] for name in rows[0]})
        columns = {name: (values + error if name == "probabilities" else values) for name, values in outputs.items()}
        return [{name: values[row].tolist() if values.ndim > 1 else values[row] for name, values in columns.items()}
                for row in range(len(rows))]  # fmt: skip

    monkeypatch.setattr(tfjs, "predict_tfjs", predict)
    assert check_parity(copied, ["tfjs"]).passed
    error = 0.01
    assert check_parity(copied, ["tfjs"]).reason.startswith("tfjs serving_default: differs by 0.01 at most")


# -- a server --


@contextlib.contextmanager
def serving(respond: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """Context manager with a server that responds by a function; yields the URL of its model."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/models/digits:predict"
            code, body = respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1/models/digits"
        finally:
            server.shutdown()


def as_tf_serving(served: SavedModel, error: float = 0.0) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """A SavedModel behind TF Serving's REST interface; the error is in serving_bytes alone."""
    import base64

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        rows = body["instances"]
        if body["signature_name"] == "serving_bytes":
            outputs = served.predict_bytes([base64.b64decode(row["b64"]) for row in rows])
            if "probabilities" in outputs:
                outputs["probabilities"] = outputs["probabilities"] + np.float32(error)
        else:
            outputs = served({name: [row[name] for row in rows] for name in rows[0]})
        columns = {name: values.tolist() for name, values in outputs.items()}
        if len(columns) == 1:
            return 200, {"predictions": next(iter(columns.values()))}
        return 200, {
            "predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        }

    return respond


def test_a_server(all_formats: Run) -> None:
    served = load_saved_model(all_formats.folder)
    with serving(as_tf_serving(served)) as url:
        matches = check_parity(all_formats, ["server"], server=f"{url}:predict")
        assert [(result.signature, result.passed) for result in matches.results if result.target == "server"] == [
            ("serving_default", True),
            ("serving_bytes", True),
        ]
    with serving(as_tf_serving(served, error=0.01)) as url:
        reason = check_parity(all_formats, ["server"], server=url).reason
    assert reason.startswith("server serving_bytes: differs by 0.01 at most")
    assert "serving_default" not in reason


def test_a_server_with_a_single_output(tmp_path: Path) -> None:
    """TF Serving leaves out the name of a single output."""
    diabetes, run = load_dataset("diabetes"), RunStore(tmp_path).create("train")
    export_saved_model(build_model("linear", diabetes), diabetes, run)
    with serving(as_tf_serving(load_saved_model(run.folder))) as url:
        assert check_parity(run, ["server", "savedmodel"], server=url).passed


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (404, {"error": "Servable not found"}, "responds 404: {\"error\": \"Servable not found\"}"),
        (200, b"<html>", "does not respond as TF Serving does"),
        (200, {"outputs": []}, "does not respond as TF Serving does"),
        (200, {"predictions": [{"class": "3"}]}, "it gives 1 predictions for 32 requests"),
        (200, {"predictions": [{"class": "3"}] * 32}, "it gives no 'probabilities', only class"),
        (200, {"predictions": [{"probabilities": [None] * 10, "class": "3", "score": 1.0}] * 32}, "differs by inf"),
        (200, {"predictions": [{"probabilities": [0.1], "class": "3", "score": 1.0}] * 32}, "(32, 1), not (32, 10)"),
    ],
)  # fmt: skip
def test_a_server_with_an_unexpected_response(code: int, body: Any, expected: str, all_formats: Run) -> None:
    with serving(lambda _: (code, body)) as url:
        matches = check_parity(all_formats, ["server"], server=url)
    assert not matches.passed
    assert expected in matches.reason
    json.loads((all_formats.folder / "parity.json").read_text(), parse_constant=pytest.fail)  # strict JSON, too


def test_an_unreachable_server(all_formats: Run) -> None:
    matches = check_parity(all_formats, ["server"], server="http://127.0.0.1:9/v1/models/digits")
    assert "server serving_default: http://127.0.0.1:9/v1/models/digits:predict does not respond" in matches.reason


# -- damaged and missing formats, invalid input --


def test_damaged_formats_are_named(copied: Run) -> None:
    (copied.folder / "litert" / "float32" / "model.tflite").write_bytes(b"TFL3" * 100)
    (copied.folder / "litert" / "int8" / "preprocessing.json").write_text("{")
    (copied.folder / "page.html").write_text("<html>")
    (copied.folder / "saved_model" / "1" / "variables" / "variables.index").unlink()
    matches = check_parity(copied)
    failed = {result.target: result.reason for result in matches.results if result.passed is False}
    assert "is not the file that was converted" in failed["litert-float32"]
    assert "is damaged" in failed["litert-int8"]
    assert "page.html holds no record" in failed["browser"]
    assert "holds no model that can be loaded" in failed["savedmodel"]
    assert {result.target for result in matches.results if result.passed} == {"litert-float16", "litert-full_int8"} | (
        {"litert-int4"} if "litert-int4" not in failed else set()
    )


def test_a_format_that_cannot_be_run_has_not_passed(copied: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_BROWSERS", ("no-such-browser",))
    (copied.folder / "page.html").write_text('<script id="record">{"model": {"kind": "float32"}}</script>')
    with copied.edit() as record:
        record.data = []
    matches = check_parity(copied, tolerances={"litert-int4": 0.3})
    results = {result.target: (result.passed, result.reason) for result in matches.results}
    assert results["browser"] == (None, "The browser demo runs in Chromium or Chrome, and none of them is installed.")
    assert results["keras"][0] is None
    assert "The model cannot be built again" in results["keras"][1]
    assert matches.passed
    assert not check_parity(copied, ["browser"]).passed  # requested by name


def test_invalid_input_is_rejected_before_any_work(copied: Run, tmp_path: Path) -> None:
    golden = copied.folder / "saved_model" / "1" / "assets.extra" / "golden.json"
    (copied.folder / "parity.json").unlink(missing_ok=True)
    with pytest.raises(NotFoundError, match=r"tfjs: It is not there\. To make it: mlkit export \S+ --to tfjs"):
        check_parity(copied, ["tfjs"])
    with pytest.raises(ParameterError, match="Did you mean 'savedmodel'"):
        check_parity(copied, ["saved_model"])
    with pytest.raises(ParameterError, match="a number above 0"):
        check_parity(copied, tolerances={"keras": float("nan")})
    text = golden.read_text()
    for broken in (
        text[:-50],
        text.replace('"class"', '"clas"', 1),
        "[]",
        "\0",
        text.replace('"format": 1', '"format": 2'),
    ):
        golden.write_text(broken)
        with pytest.raises(ModelError, match=r"golden\.json is damaged.*Export the model again"):
            check_parity(copied)
    golden.unlink()
    with pytest.raises(ModelError, match=r"exported by an earlier mlkit\. Export the model again"):
        check_parity(copied)
    assert load_saved_model(copied.folder).classes  # an earlier model can still be loaded
    golden.write_text(text)


# -- signatures --


def test_no_row_and_one_row_for_each_signature(all_formats: Run, both: tuple[Dataset, Run]) -> None:
    for run in (all_formats, both[1]):
        folder = run.folder / "saved_model" / "1"
        golden, served = load_golden(folder), load_saved_model(folder)
        with parity._open_session(folder) as (session, signatures):
            for name, reference in parity._expected_outputs(served, golden).items():
                sent = parity._signature_inputs(name, as_requests(golden, served.features))
                for rows in (0, 1):
                    feeds = {signatures[name].inputs[key].name: values[:rows] for key, values in sent.items()}
                    outputs = {key: tensor.name for key, tensor in signatures[name].outputs.items()}
                    for key, values in session.run(outputs, feeds).items():
                        assert values.shape == (rows, *reference[key].shape[1:]), (name, key)


def test_rows_as_text(both: tuple[Dataset, Run]) -> None:
    served = load_saved_model(both[1].folder)
    rows = [
        {"town": town, "age": age, "a/b": 0.1, "sent": "2026-03-01"}
        for town in ('Rome, "centre"', "{Oslo}", " Paris", "a\nb", "", "never seen")
        for age in (3, float("nan"))
    ]
    expected = served({name: [row[name] for row in rows] for name in served.features})
    for lines in (
        [as_csv_row(row) for row in rows],
        [as_json_row(row) for row in rows],
        [(as_csv_row, as_json_row)[n % 2](row) for n, row in enumerate(rows)],
        [f"  \n{as_json_row(row)}\r\n" for row in rows],
        [f"{as_csv_row(row)}\r\n" for row in rows],
    ):
        matches = served.predict_bytes(lines)
        for name, values in expected.items():
            np.testing.assert_array_equal(matches[name], values, err_msg=name)
    some = served.predict_bytes(['{"features": {"feature": {"age": {"floatList": {"value": []}}}}}'])
    nothing = served({"town": [""], "age": [None], "a/b": [None], "sent": [""]})
    np.testing.assert_array_equal(some["kept_probabilities"], nothing["kept_probabilities"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1,2", "Expect 4 fields but have 2 in record 0"),
        ("", "Expect 4 fields but have 0 in record 0"),
        ("Rome,old,0.1,2026-03-01", "Field 1 in record 0 is not a valid float: old"),
        ('Rome,"3', "Quoted field has to end with quote"),
        ("{Oslo,3,0.1,2026-03-01", "The model takes: town, age, a/b, sent"),
        ('{"age": 3}', "The model takes: town, age, a/b, sent"),
        ('{"features": {"feature": {"age": {"bytesList": {"value": ["b2xk"]}}}}}', "Data types don't match"),
        ('{"features": {"feature": {"age": {"floatList": {"value": [1, 2]}}}}}', "takes one value in each example"),
    ],
)
def test_invalid_rows_are_rejected(row: str, expected: str, both: tuple[Dataset, Run]) -> None:
    with pytest.raises(ModelError, match="The rows are not what the model takes") as caught:
        load_saved_model(both[1].folder).predict_bytes([row])
    assert expected in str(caught.value)


def test_images_as_bytes(all_formats: Run, digits: Dataset) -> None:
    served, images = load_saved_model(all_formats.folder), digits.arrays["image"][:3]
    for encode, error in ((tf.io.encode_png, 0), (lambda image: tf.io.encode_jpeg(image, quality=100), 0.3)):
        matches = served.predict_bytes([encode(image.astype("uint8")).numpy() for image in images])
        np.testing.assert_allclose(matches["probabilities"], served({"image": images})["probabilities"], atol=error)
    for invalid in (b"", b"no image", tf.io.encode_png(images[0].astype("uint8")).numpy()[:40]):
        with pytest.raises(ModelError, match="The rows are not what the model takes"):
            served.predict_bytes([invalid])


def test_a_single_column(tmp_path: Path) -> None:
    """An empty line is a row whose only value is missing."""
    table = pl.DataFrame({"age": [None if n % 5 == 0 else float(n % 50) for n in range(100)], "y": ["a", "b"] * 50})
    table.write_csv(tmp_path / "ages.csv")
    ages = load_dataset(str(tmp_path / "ages.csv"), "y")
    served = load_saved_model(export_saved_model(build_model("linear", ages), ages, tmp_path / "model"))
    lines = ["3.5", "", as_json_row({"age": 3.5}), as_json_row({"age": float("nan")})]
    expected = served({"age": [3.5, None, 3.5, None]})["probabilities"]
    np.testing.assert_array_equal(served.predict_bytes(lines)["probabilities"], expected)


def test_pixels_that_no_png_holds(tmp_path: Path, digits: Dataset) -> None:
    from dataclasses import replace

    spec = replace(digits.features["image"], minimum=0.0, maximum=1.0)
    small = replace(digits, inputs=digits.inputs / 16, features={"image": spec})
    run = RunStore(tmp_path).create("train")
    export_saved_model(build_model("linear", small), small, run)
    matches = check_parity(run)
    results = {result.signature: result for result in matches.results if result.target == "savedmodel"}
    assert [result.passed for result in results.values()] == [True, None, None, None]
    assert "which PNG files hold" in results["serving_bytes"].reason


# -- files exported with the model --


def warm_up_request(log: Any) -> tuple[str, dict[str, np.ndarray]]:
    """Signature and tensors of a PredictionLog."""
    kind = log.WhichOneof("log_type")
    request = getattr(log, kind).request
    name = request.model_spec.signature_name
    if kind == "predict_log":
        return name, {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
    assert kind == ("regress_log" if name.endswith("regress") else "classify_log")
    return name, {
        "inputs": np.array([example.SerializeToString() for example in request.input.example_list.examples], object)
    }


def test_the_warm_up_file_is_what_tf_serving_reads(both: tuple[Dataset, Run], all_formats: Run) -> None:
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    for run in (all_formats, both[1]):
        folder = run.folder / "saved_model" / "1"
        golden, served = load_golden(folder), load_saved_model(folder)
        expected = parity._expected_outputs(served, golden)
        file = str(folder / "assets.extra" / "tf_serving_warmup_requests")
        records = [record.numpy() for record in tf.data.TFRecordDataset(file)]
        assert len(records) == 2 * len(expected) <= 1000
        matches: dict[str, list[int]] = {}
        with parity._open_session(folder) as (session, signatures):
            for record in records:
                log = logs.PredictionLog.FromString(record)
                assert len(log.SerializeToString()) == len(record)
                name, sent = warm_up_request(log)
                matches.setdefault(name, []).append(len(next(iter(sent.values()))))
                feeds = {signatures[name].inputs[key].name: values for key, values in sent.items()}
                key = next(key for key, values in expected[name].items() if values.dtype != object)
                answers = session.run(signatures[name].outputs[key].name, feeds)
                np.testing.assert_allclose(answers, expected[name][key][: len(answers)], rtol=1e-5, atol=1e-5)
        assert matches == {name: [1, 8] for name in expected}


def test_vocabularies_are_assets(both: tuple[Dataset, Run], tmp_path: Path) -> None:
    """A vocabulary without line breaks is a file, others are in the graph; a copy does not need the original."""
    shop = load_dataset("retail", rows=400)
    network = build_model("linear", shop)
    lookups = [layer for layer in network._flatten_layers() if isinstance(layer, keras.layers.StringLookup)]
    tables = [layer.lookup_table for layer in lookups]
    place = export_saved_model(network, shop, tmp_path / "shop")
    assert [layer.lookup_table for layer in lookups] == tables  # the model is unchanged
    names = [path.name for path in sorted((place / "assets").iterdir())]
    assert names[0] == "00_string_lookup_user_id.tsv"
    lines = (place / "assets" / names[5]).read_text().splitlines()
    assert sorted(line.partition("\t")[0] for line in lines) == sorted(shop.features["device"].vocabulary)
    rows = next(shop.batches("test", 20))
    answers = load_saved_model(place)(rows)["probabilities"]
    moved = shutil.move(place, tmp_path / "elsewhere")
    np.testing.assert_array_equal(load_saved_model(moved)(rows)["probabilities"], answers)
    assert not list((both[1].folder / "saved_model" / "1").glob("assets/*"))  # its towns contain a line break


def test_choice_of_requests(digits: Dataset, both: tuple[Dataset, Run]) -> None:
    golden = load_golden(both[1].folder / "saved_model" / "1")
    texts = json.dumps(golden.instances)
    for what in ("all missing", "all unknown", "all smallest", "town unknown", "age missing", "age largest"):
        assert what in golden.cases, what
    assert "never seen before" in texts
    assert set(golden.scales) == {"weight_prediction"}
    assert golden.to_json() == load_golden(both[1].folder / "saved_model" / "1").to_json()


def test_large_rows_are_fewer(monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> None:
    from mlkit.export import golden_sampling as golden

    monkeypatch.setattr(golden, "MAX_BYTES", 4000)
    cases, instances = golden.choose_requests(digits)
    assert 3 <= len(instances) < 20
    assert cases[:3] == ["usual", "all dark", "all bright"]
    monkeypatch.setattr(golden, "MAX_BYTES", 10)
    assert golden.choose_requests(digits)[0] == ["usual", "all dark"]


# -- the command --


def test_the_command(copied: Run, planted: tuple[keras.Model, Path]) -> None:
    place = copied.folder.parent.parent
    shutil.rmtree(copied.folder / "litert" / "int8")
    shutil.copytree(planted[1] / "litert" / "int8", copied.folder / "litert" / "int8")
    wanted = ("--target", "litert-int8", "--target", "litert-float32")
    failed = run_cli("parity", copied.id, *wanted, "--json", folder=place)
    record = json.loads(failed.stdout)
    assert (failed.returncode, record["passed"]) == (1, False), failed.stderr
    assert record["reason"].startswith("litert-int8 serving_default: differs by")
    shown = run_cli("parity", copied.id[-4:], *wanted, "--tolerance", "litert-int8=0.3", folder=place)
    assert shown.returncode == 0, shown.stderr
    assert "litert-float32, litert-int8 give the predictions of the exported model for 32 requests" in shown.stdout
    for wrong in (("--target", "litert"), ("--tolerance", "0.1")):
        refused = run_cli("parity", copied.id, *wrong, folder=place)
        assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
