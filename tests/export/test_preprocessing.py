"""Client-side preprocessing in Python and in JavaScript gives the results of TensorFlow, for one table of inputs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlkit.models.families  # noqa: F401  before TensorFlow, which it imports quietly

# isort: split
import keras
import tensorflow as tf

from mlkit.export.numpy_preprocessing import cross_rows, fingerprint64, moment_fields, siphash, split_words
from mlkit.models.preprocessing import DatetimeParser, WordSplitter
from tests.conftest import REPOSITORY

SIZES = (*range(70), 127, 128, 129, 200, 1000)  # all code paths of the hashes
HASHED = ["".join(chr(97 + (7 * n + size) % 26) for n in range(size)) for size in SIZES] + ["Größe 🙂", "ΑΣ"]
SALTS = (0, 7, 2**40 + 1)
BUCKETS = 2**31 - 1
CROSSES = [(0, 0), (3, 4999), (17, 1), (2**30, 12)]
TEXTS = ["Good, good!", "It's\tGOOD — isn't it?", "ΑΣ Größe", "", "«quoted» 1.5%", "🙂 ok", "a  b\n c\u2003d"]
MOMENTS = ["2026-01-31T10:15:36.5", "2026-02-30", "2025-12-31T23:30-01:00", "1999-02-29", "soon", "", "2024-02-29",
           "0000-01-01", "0001-01-01T00:00+01:00", "9999-12-31T23:30-01:00", "1969-12-31"]  # fmt: skip
LENGTH = 4  # words of a text
FIELDS = ("known", "days", "time", "month", "day", "weekday", "hour", "minute")


def buckets(texts: list[str], salt: int | None = None) -> list[int]:
    """TensorFlow's hash buckets of texts."""
    if salt is None:
        return tf.strings.to_hash_bucket_fast(texts, BUCKETS).numpy().tolist()
    return tf.strings.to_hash_bucket_strong(texts, BUCKETS, [salt, salt]).numpy().tolist()


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """TensorFlow's results for all inputs."""
    pairs = np.array(CROSSES)
    crossed = keras.layers.HashedCrossing(1000)((pairs[:, :1], pairs[:, 1:])).numpy()[:, 0]
    return {
        "fast": buckets(HASHED),
        "strong": {str(salt): buckets(HASHED, salt) for salt in SALTS},
        "crosses": crossed.tolist(),
        "words": [[word.decode() for word in row] for row in word_table().tolist()],
        "moments": moment_table(),
    }


def word_table() -> np.ndarray:
    return WordSplitter(LENGTH)(tf.constant(TEXTS)).numpy()


def moment_table() -> list[list[float]]:
    return DatetimeParser()([tf.constant(MOMENTS)]).numpy()[:, 0].tolist()


def assert_equal_to(table: dict[str, Any], results: dict[str, Any]) -> None:
    for name in ("fast", "strong", "crosses", "words"):
        assert results[name] == table[name], name
    np.testing.assert_array_equal(np.float32(results["moments"]), np.float32(table["moments"]))


def test_python_gives_the_results_of_tensorflow(table: dict[str, Any]) -> None:
    results = {
        "fast": [fingerprint64(text.encode()) % BUCKETS for text in HASHED],
        "strong": {str(salt): [siphash(text.encode(), salt) % BUCKETS for text in HASHED] for salt in SALTS},
        "crosses": [cross_rows(pair, 1000) for pair in CROSSES],
        "words": [split_words(text, LENGTH) for text in TEXTS],
        "moments": [moment_fields(text) for text in MOMENTS],
    }
    assert_equal_to(table, results)


SCRIPT = """
import { readFileSync } from "node:fs";
import { crossRows, fingerprint64, momentFields, siphash, splitWords } from "./preprocessing.mjs";
const { hashed, salts, buckets, crosses, texts, length, moments, fields } = JSON.parse(readFileSync(0));
const bytes = (text) => new TextEncoder().encode(text);
const remainder = (hash) => Number(hash % BigInt(buckets));
console.log(JSON.stringify({
  fast: hashed.map((text) => remainder(fingerprint64(bytes(text)))),
  strong: Object.fromEntries(salts.map((salt) => [salt, hashed.map((text) => remainder(siphash(bytes(text), salt)))])),
  crosses: crosses.map((pair) => crossRows(pair, 1000)),
  words: texts.map((text) => splitWords(text, length)),
  moments: moments.map((text) => { const values = momentFields(text); return fields.map((name) => values[name]); }),
}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_javascript_gives_the_results_of_tensorflow(table: dict[str, Any], tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "mlkit" / "web" / "preprocessing.js", tmp_path / "preprocessing.mjs")
    (tmp_path / "script.mjs").write_text(SCRIPT, encoding="utf-8")
    inputs = {"hashed": HASHED, "salts": SALTS, "buckets": BUCKETS, "crosses": CROSSES, "texts": TEXTS,
              "length": LENGTH, "moments": MOMENTS, "fields": FIELDS}  # fmt: skip
    command = ["node", "script.mjs"]
    done = subprocess.run(
        command, cwd=tmp_path, input=json.dumps(inputs), capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert_equal_to(table, json.loads(done.stdout))
