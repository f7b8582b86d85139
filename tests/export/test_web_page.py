"""The browser demo of a converted model gives the predictions of Python, without a server and a network."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest

pytest.importorskip("ai_edge_litert")

from mlkit.data import Dataset, load_dataset
from mlkit.errors import MissingDependencyError, ModelError, NotFoundError
from mlkit.export import convert_model
from mlkit.export.litert_runtime import load_litert
from mlkit.export.web_page import find_engine, write_page
from mlkit.models import build_model
from mlkit.training import fit
from tests.chromium import CHROMIUM, Page, as_address
from tests.conftest import REPOSITORY, wait_until


def has_engine() -> bool:
    try:
        return bool(find_engine(REPOSITORY))
    except MissingDependencyError:
        return False


needs_browser = pytest.mark.skipif(not (CHROMIUM and has_engine()), reason="needs chromium, and LiteRT.js from npm")
SIZES = (
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    200,
)  # where the hash changes its code path
TEXTS = ("Good, good!", "It's\tGOOD — isn't it?", "ΑΣ Größe", "", "İstanbul", "«quoted» 1.5%", "🙂 ok", None)
MOMENTS = ("2026-01-31T10:15:36.5", "2026-02-30", "2025-12-31T23:30-01:00", "1999-02-29", "soon", None, "2024-02-29")


def predict_in_page(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions of a page in Chromium, without a network."""
    with Page(as_address(file)) as page:
        return page.ask(f"Promise.all({json.dumps(rows)}.map(mlkit.predict))")


def make_orders(count: int = 200) -> pl.DataFrame:
    """A table with every feature type, two labels, and names that are no identifiers."""
    generator = np.random.default_rng(5)
    return pl.DataFrame(
        {
            "price in €": generator.lognormal(3, 1, count),
            "weight": [None if n % 7 == 0 else n % 50 for n in range(count)],
            "age": generator.integers(15, 90, count),
            "sent/at": [f"2026-{1 + n % 12:02d}-{1 + n % 28:02d}T{n % 24:02d}:15:00" for n in range(count)],
            "postcode": generator.choice([1067, 80331, 20095], count),
            "user": [f"u{n % 90}" for n in range(count)],
            "shop": generator.choice(["north", "south"], count),
            "comment": [TEXTS[n % len(TEXTS)] for n in range(count)],
            "kept": generator.choice(["yes", "no", "perhaps"], count),
            "days": generator.normal(20, 5, count),
        }
    )


FEATURES = {
    "price in €": {"normalise": "log"},
    "age": {"type": "bucket", "boundaries": [18, 30, 65]},
    "sent/at": {"type": "datetime", "parts": ["days", "month", "weekday", "hour", "minute", "day"]},
    "postcode": {"type": "category", "unknown": 3},
    "user": {"type": "hash", "buckets": 500, "salt": 7},
    "shop": {"type": "hash", "buckets": 100},
    "comment": {"type": "text", "length": 5, "buckets": 40},
    "age x postcode": {"type": "cross", "buckets": 50},
    "age x postcode x shop": {"type": "cross", "buckets": 90},
}


@needs_browser
def test_a_page_gives_the_predictions_of_python(tmp_path: Path) -> None:
    make_orders().write_csv(tmp_path / "orders.csv")
    table = load_dataset(str(tmp_path / "orders.csv"), label=["kept", "days"], features=FEATURES)
    convert_model(build_model("mlp", table), table, tmp_path / "orders", ["float32"])
    model = load_litert(tmp_path / "orders")
    generator = np.random.default_rng(2)
    rows = [
        {
            "price in €": [None, -3.0, 0.0, 1e6, 20.5][n % 5],
            "weight": [None, 3, 49.5][n % 3],
            "age": [None, 17.9, 18, 64, 65][n % 5],
            "sent/at": MOMENTS[n % len(MOMENTS)],
            "postcode": [None, "1067", "never seen", "99999"][n % 4],
            "user": "".join(generator.choice([*"abcüß€"], size)),
            "shop": "x" * size,
            "comment": TEXTS[n % len(TEXTS)],
        }
        for n, size in enumerate(SIZES)
    ]
    page = write_page(tmp_path / "orders", tmp_path / "orders.html", installed=REPOSITORY)
    predictions = predict_in_page(page, rows)
    expected = model({name: [row[name] for row in rows] for name in model.features})
    assert predictions[0].keys() == expected.keys()
    for name, values in expected.items():
        actual = [row[name] for row in predictions]
        if values.dtype == object:
            assert actual == values.tolist()
        else:
            np.testing.assert_allclose(actual, values, rtol=2e-6, atol=1e-6, err_msg=name)
    distinct = {tuple(np.round(values, 7)) for values in expected["kept_probabilities"]}
    assert len(distinct) == len(rows)  # no two rows could be confused


DRAW = """mlkit.predict({ image: Array(64).fill(0) }).then(async () => {
  const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
  canvas.setPointerCapture = () => {};
  const move = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, {
    clientX: box.left + x * box.width, clientY: box.top + y * box.height, buttons: 1, pointerId: 1 }));
  move("pointerdown", 0.5, 0.1);
  move("pointermove", 0.5, 0.9);
  const answer = () => document.querySelector("#predictions .prediction").textContent;
  for (let wait = 0; wait < 400 && answer() !== EXPECTED; wait++) await new Promise((done) => setTimeout(done, 25));
  return answer();
})"""


@needs_browser
def test_a_drawing_is_classified(tmp_path: Path, digits: Dataset) -> None:
    upright = np.zeros((8, 8, 1), "float32")
    model = build_model("linear", digits)
    upright[1:7, 3:5] = 1  # a vertical stroke: the kernel responds to it
    kernel = np.zeros((64, 10), "float32")
    kernel[:, 1] = upright.ravel() * 10
    model.get_layer("logits").set_weights([kernel, np.zeros(10, "float32")])
    convert_model(model, digits, tmp_path / "digits", ["float32"])
    page = write_page(tmp_path / "digits", tmp_path / "digits.html", installed=REPOSITORY)
    with Page(as_address(page)) as shown:
        assert shown.ask(DRAW.replace("EXPECTED", json.dumps(digits.classes[1]))) == digits.classes[1]
        assert shown.ask("document.querySelectorAll('.bar').length") == 10


READ_RESULT = """(async () => {
  const predicted = () => document.querySelector("#predictions .prediction")?.textContent;
  for (let wait = 0; wait < 400 && predicted() !== EXPECTED; wait++) await new Promise((done) => setTimeout(done, 25));
  return [predicted(), ...Array.from(document.querySelectorAll("#predictions .bars .muted"), (bar) => bar.textContent)];
})()"""


@needs_browser
def test_an_image_file_is_classified_as_in_python(tmp_path: Path, digits: Dataset) -> None:
    model = build_model("cnn", digits)
    fit(model, digits, epochs=4)
    convert_model(model, digits, tmp_path / "digits", ["float32"])
    image = digits.arrays["image"][digits.splits["test"][0]]  # 8 x 8, from 0 to 16
    pixels = np.round(image * 255 / 16)
    plt.imsave(tmp_path / "digit.png", np.kron(pixels[..., 0], np.ones((35, 35))), cmap="gray", vmin=0, vmax=255)
    (tmp_path / "notes.png").write_text("no picture")
    expected = load_litert(tmp_path / "digits")({"image": pixels[None] * 16 / 255})
    page = write_page(tmp_path / "digits", tmp_path / "digits.html", installed=REPOSITORY)
    with Page(as_address(page)) as shown:
        shown.ask("mlkit.predict({ image: Array(64).fill(0) })")
        button = shown.tell("Runtime.evaluate", expression="document.getElementById('picture')")["result"]["objectId"]
        shown.tell("DOM.setFileInputFiles", files=[str(tmp_path / "notes.png")], objectId=button)
        label = "document.querySelector('label[for=picture]').textContent"
        wait_until(lambda: shown.ask(label) == "notes.png is no picture that this browser can read.", 30)
        shown.tell("DOM.setFileInputFiles", files=[str(tmp_path / "digit.png")], objectId=button)
        predicted, *bars = shown.ask(READ_RESULT.replace("EXPECTED", json.dumps(expected["class"][0])))
        assert shown.ask(label) == "Draw above, or take a picture:"
    assert predicted == expected["class"][0]
    np.testing.assert_allclose([float(bar.split()[0]) for bar in bars], 100 * expected["probabilities"][0], atol=0.2)


@needs_browser
def test_a_page_reads_images_and_integers(tmp_path: Path, digits: Dataset) -> None:
    convert_model(build_model("cnn", digits), digits, tmp_path / "digits", ["full_int8"])
    images, _ = digits.take("test")
    page = write_page(tmp_path / "digits", tmp_path / "digits.html", "full_int8", installed=REPOSITORY)
    predictions = predict_in_page(page, [{"image": image.tolist()} for image in images["image"][:10]])
    expected = load_litert(tmp_path / "digits", "full_int8")({"image": images["image"][:10]})
    np.testing.assert_allclose([row["probabilities"] for row in predictions], expected["probabilities"], atol=2e-2)


def test_without_litert_js_the_error_names_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"npm install @litertjs/core@[0-9.]+$"):
        find_engine(tmp_path)


def test_no_page_is_written_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no converted model"):
        write_page(tmp_path, tmp_path / "page.html")
    (tmp_path / "preprocessing.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is damaged"):
        write_page(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_javascript_rejects_invalid_rows(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "mlkit" / "web" / "preprocessing.js", tmp_path / "preprocessing.mjs")
    features = [
        {"name": "age", "type": "number", "dtype": "float32", "shape": []},
        {"name": "city", "type": "category", "dtype": "string", "shape": []},
    ]
    record = {
        "features": features,
        "rows": {},
        "inputs": [{"name": "input_00", "dtype": "float32", "shape": [], "feature": "age"}],
    }
    rows = [{"age": 1}, {"age": 1, "ciyt": "x"}, {"age": "old", "city": "x"}, {"age": 1, "city": 3}]
    script = (
        "import { Preprocessor } from './preprocessing.mjs';\n"
        f"const preprocessor = new Preprocessor({json.dumps(record)});\n"
        f"for (const row of {json.dumps(rows)})\n"
        "  try { preprocessor.encode(row); } catch (error) { console.log(error.message); }"
    )
    (tmp_path / "encode.mjs").write_text(script)
    done = subprocess.run(["node", "encode.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    messages = done.stdout.splitlines()
    assert messages[0].startswith("Feature 'city' is missing.")
    assert messages[1].startswith("Unknown feature 'ciyt'.")
    assert messages[2].startswith("Feature 'age' takes values of type float32")
    assert messages[3].startswith("Feature 'city' takes values of type string")
