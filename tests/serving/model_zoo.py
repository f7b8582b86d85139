"""SavedModels as other teams write them, with requests for each: the models against which the server is tested.

`python -m tests.serving.model_zoo make FOLDER [NAME ...]` writes them; `... predict FOLDER` prints what
`tf.saved_model.load` computes for the requests, and is the reference for all tests.
"""

import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

Inputs = dict[str, Any]  # values of a request by input, as in JSON


class ZooModel(NamedTuple):
    """A model of the zoo."""

    write: Callable[[Path], None]  # writes the version folder
    requests: dict[str, list[Inputs]]  # by signature


ZOO: dict[str, ZooModel] = {}
DEFAULTS = {"optional_inputs": {"scale": 10.0}}  # `tf.saved_model.load` does not fill them in; TF Serving does


def zoo_model(**requests: list[Inputs]) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register the function that writes a model."""

    def register(write: Callable[[Path], None]) -> Callable[[Path], None]:
        ZOO[write.__name__] = ZooModel(write, requests)
        return write

    return register


def _save(folder: Path, signatures: Any, **tracked: Any) -> None:
    import tensorflow as tf

    module = tf.Module()
    for name, value in tracked.items():
        setattr(module, name, value)
    functions = signatures if isinstance(signatures, dict) else {"function": signatures}
    for name, function in functions.items():
        setattr(module, f"_{name}", function)
    tf.saved_model.save(module, str(folder), signatures=signatures)


def _function(*specs: Any, **options: Any) -> Callable:
    import tensorflow as tf

    return tf.function(
        input_signature=[tf.TensorSpec(*spec) if isinstance(spec, tuple) else spec for spec in specs], **options
    )


# -- types, names, shapes


@zoo_model(
    serving_default=[
        {
            "user_id": [2**53 + 1, -7],
            "country": ["Perú", ""],
            "price": [1e300, 0.5],
            "flags": [[True, False, False], [False, False, False]],
            "img": [[[0, 255], [1, 2]], [[7, 9], [3, 4]]],
        }
    ],
)
def mixed_types(folder: Path) -> None:
    import tensorflow as tf

    @_function(
        ([None], tf.int64, "user_id"),
        ([None], tf.string, "country"),
        ([None], tf.float64, "price"),
        ([None, 3], tf.bool, "flags"),
        ([None, 2, 2], tf.uint8, "img"),
    )
    def predict(user_id, country, price, flags, img):
        return {
            "id": user_id + 1,
            "greeting": tf.strings.join(["hello ", country]),
            "encoded": tf.io.encode_base64(country),
            "price": price / 2,
            "half": tf.cast(price, tf.float16),
            "bfloat": tf.cast(price, tf.bfloat16),
            "any": tf.reduce_any(flags, 1),
            "unsigned": tf.cast(img[:, 0, 0], tf.uint64) + tf.constant(2**63, tf.uint64),
            "small": tf.cast(img[:, 0, 0], tf.uint16),
            "signed": tf.cast(img[:, 0, 0] % 100, tf.int8),
        }

    _save(folder, predict)


@zoo_model(serving_default=[{"x": [0.5, -3.25, 1e-3]}])
def odd_names(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.float32, "x"))
    def predict(x):
        return {"score/prob": x, "user id": x + 1, "Überraschung": x + 2, "a.b:0": x + 3, "class": x + 5}

    _save(folder, predict)


@zoo_model(
    serving_default=[{"a": 1.5, "mode": "quiet", "training": True}, {"a": -2.0, "mode": "", "training": False}],
    single=[{"a": 41.0}],
    mixed=[{"x": [[1, 2, 3, 4], [5, 6, 7, 8]], "dropout": 0.25, "phase": True}],
)
def scalars(folder: Path) -> None:
    import tensorflow as tf

    @_function(([], tf.float32, "a"), ([], tf.string, "mode"), ([], tf.bool, "training"))
    def default(a, mode, training):
        return {"y": tf.where(training, a * 2, a * 3), "mode": tf.strings.upper(mode)}

    @_function(([], tf.float32, "a"))
    def single(a):
        return {"y": a + 1}

    @_function(([None, 4], tf.float32, "x"), ([], tf.float32, "dropout"), ([], tf.bool, "phase"))
    def mixed(x, dropout, phase):
        return {"y": tf.reduce_sum(x, 1) * (1 - dropout)}

    _save(folder, {"serving_default": default, "single": single, "mixed": mixed})


@zoo_model(plain=[{"text": ["a bc", ""]}])
def ragged_output(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.string, "text"))
    def words(text):
        return {"words": tf.strings.split(text), "length": tf.strings.length(text)}

    @_function(([None], tf.string, "text"))
    def plain(text):
        return {"length": tf.strings.length(text)}

    _save(folder, {"serving_default": words, "plain": plain})


@zoo_model(
    floats=[{"half": [0.5, -1.0], "bfloat": [2.0, 3.0]}],
    integers=[{"u": [2**64 - 1, 0], "i": [-(2**63), 5], "w": [2**32 - 1, 1], "t": [-128, 127]}],
    text=[{"s": ["Straße", "b"]}, {"s": [["x"], ["y"]]}, {"s": "z"}],
    special=[{"x": [0.0, -1.0, 4.0]}],
)
def number_types(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.float16, "half"), ([None], tf.bfloat16, "bfloat"))
    def floats(half, bfloat):
        return {"half": half * 2, "bfloat": bfloat * 2}

    @_function(([None], tf.uint64, "u"), ([None], tf.int64, "i"), ([None], tf.uint32, "w"), ([None], tf.int8, "t"))
    def integers(u, i, w, t):
        return {"u": u, "i": i, "w": w, "t": t}

    @_function((None, tf.string, "s"))
    def text(s):
        return {"upper": tf.strings.upper(s), "first_byte": tf.strings.substr(s, 0, 1)}

    @_function(([None], tf.float32, "x"))
    def special(x):
        return {"log": tf.math.log(x), "inverse": 1.0 / x}

    @_function(([None], tf.float32, "x"))
    def complex_output(x):
        return {"c": tf.complex(x, x)}

    signatures = {"serving_default": floats, "floats": floats, "integers": integers, "text": text}
    _save(folder, {**signatures, "special": special, "complex_output": complex_output})


@zoo_model(serving_default=[{"x": [1.0, 2.0, 3.0]}])
def repeated_outputs(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.float32, "x"))
    def predict(x):
        y = x * 2
        return {"a": y, "b": y, "x": x, "constant": tf.constant([1.0, 2.0])}

    _save(folder, predict)


@zoo_model(serving_default=[{}])
def no_inputs(folder: Path) -> None:
    import tensorflow as tf

    weights = tf.Variable([1.0, 2.0, 3.0])

    @_function()
    def predict():
        return {"weights": weights.read_value()}

    _save(folder, predict, weights=weights)


@zoo_model(embed=[{"x": [1.0]}], rank=[{"x": [2.0, 4.0]}])
def no_default_signature(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.float32, "x"))
    def double(x):
        return {"y": x * 2}

    _save(folder, {"embed": double, "rank": double})


# -- rows of a request that depend on each other


@zoo_model(
    serving_default=[{"candidates": [[1, 2], [0.5, 0.25], [-1, 3]]}, {"candidates": [[4, 4]]}],
    running=[{"series": [1, 2, 3]}, {"series": [10, 20]}],
    position=[{"tokens": [7, 7, 7]}, {"tokens": [1]}],
    unique=[{"items": ["a", "b", "a"]}, {"items": ["c", "c"]}],
)
def listwise(folder: Path) -> None:
    """A ranking model: scores are a softmax over the candidates of one request."""
    import tensorflow as tf

    @_function(([None, 2], tf.float32, "candidates"))
    def softmax(candidates):
        return {"share": tf.nn.softmax(tf.reduce_sum(candidates, 1))}

    @_function(([None], tf.float32, "series"))
    def running(series):
        return {"running": tf.cumsum(series)}

    @_function(([None], tf.int32, "tokens"))
    def position(tokens):
        return {"position": tf.range(tf.size(tokens))}

    @_function(([None], tf.string, "items"))
    def unique(items):
        return {"index": tf.unique(items)[1]}

    _save(folder, {"serving_default": softmax, "running": running, "position": position, "unique": unique})


@zoo_model(
    serving_default=[
        {"q": [[1, 2]], "d": [[3, 4], [5, 6], [7, 8]]},
        {"q": [[1, 0], [0, 1]], "d": [[9, 8], [7, 6]]},
    ]
)
def two_axes(folder: Path) -> None:
    """Queries and documents: each input has a first dimension of its own."""
    import tensorflow as tf

    @_function(([None, 2], tf.float32, "q"), ([None, 2], tf.float32, "d"))
    def similarity(q, d):
        return {"similarity": tf.matmul(q, d, transpose_b=True)}

    _save(folder, similarity)


@zoo_model(serving_default=[{"x": [[1.0], [2.0], [6.0]]}, {"x": [[5.0], [5.5]]}])
def z_scores(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None, 1], tf.float32, "x"))
    def standardize(x):
        mean, variance = tf.nn.moments(x, [0])
        return {"z": (x - mean) / tf.sqrt(variance + 1e-6)}

    _save(folder, standardize)


@zoo_model(
    serving_default=[
        {"boxes": [[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3]], "scores": [0.5, 0.9, 0.3]},
        {"boxes": [[0, 0, 1, 1]], "scores": [0.8]},
    ]
)
def non_maximum_suppression(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None, 4], tf.float32, "boxes"), ([None], tf.float32, "scores"))
    def suppress(boxes, scores):
        chosen = tf.image.non_max_suppression(boxes, scores, tf.shape(boxes)[0], 0.5)
        return {"keep": tf.scatter_nd(chosen[:, None], tf.ones_like(chosen), tf.shape(scores))}

    _save(folder, suppress)


@zoo_model(serving_default=[{"text": ["a b", "c"]}, {"text": ["d e f g"]}])
def padded_tokens(folder: Path) -> None:
    """Pads to the longest text of the request."""
    import tensorflow as tf

    @_function(([None], tf.string, "text"))
    def split(text):
        return {"words": tf.strings.split(text).to_tensor("<pad>")}

    _save(folder, split)


@zoo_model(serving_default=[{"candidates": [[1, 0, 0, 2], [0, 1, 3, 0]]}, {"candidates": [[2, 2, 2, 2]]}])
def set_attention(folder: Path) -> None:
    """Attention over the candidates of one request."""
    import keras
    import tensorflow as tf

    inputs = keras.Input((None, 4))
    attention = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(attention))
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = [tf.TensorSpec([None, 4], tf.float32, "candidates")]
    archive.add_endpoint("serve", lambda rows: {"score": model(rows[None])[0, :, 0]}, input_signature=spec)
    archive.write_out(str(folder), verbose=False)


# -- graphs with tables, loops, compiled functions, and errors


@zoo_model(serving_default=[{"word": ["apple", "chérie", "kiwi"], "key": [10, 2**53 + 1, 3]}])
def lookup_tables(folder: Path) -> None:
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as place:
        vocabulary = Path(place) / "vocabulary.txt"
        vocabulary.write_text("apple\nbanana\nchérie\n", encoding="utf-8")
        index = tf.lookup.TextFileIndex
        file = tf.lookup.TextFileInitializer(str(vocabulary), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER)
        words = tf.lookup.StaticVocabularyTable(file, num_oov_buckets=2)
        keys = tf.lookup.KeyValueTensorInitializer([10, 2**53 + 1], ["ten", "big"], key_dtype=tf.int64)
        names = tf.lookup.StaticHashTable(keys, default_value="?")

        @_function(([None], tf.string, "word"), ([None], tf.int64, "key"))
        def look_up(word, key):
            return {"id": words.lookup(word), "name": names.lookup(key)}

        _save(folder, look_up, words=words, names=names)


@zoo_model(serving_default=[{"n": [6, 7]}, {"n": [27]}], mapped=[{"n": [2, 5, 3]}])
def control_flow(folder: Path) -> None:
    import tensorflow as tf

    @_function(([None], tf.int64, "n"))
    def collatz(n):
        steps = tf.zeros_like(n)
        while tf.reduce_any(n > 1):
            steps += tf.cast(n > 1, tf.int64)
            n = tf.where(n <= 1, n, tf.where(n % 2 == 0, n // 2, 3 * n + 1))
        return {"steps": steps}

    @_function(([None], tf.int64, "n"))
    def mapped(n):
        return {"y": tf.map_fn(lambda v: tf.cond(v > 3, lambda: v * 10, lambda: tf.reduce_prod(tf.range(1, v + 1))), n)}

    _save(folder, {"serving_default": collatz, "mapped": mapped})


@zoo_model(serving_default=[{"x": [[1, 2, 3]]}])
def compiled_by_xla(folder: Path) -> None:
    import tensorflow as tf

    weights = tf.Variable(tf.ones([3, 2]))

    @_function(([None, 3], tf.float32, "x"), jit_compile=True)
    def predict(x):
        return {"y": x @ weights}

    _save(folder, predict, weights=weights)


@zoo_model(serving_default=[{"x": [1.0, 9.5]}], gather=[{"i": [0, 2]}])
def failing(folder: Path) -> None:
    """Rejects some inputs."""
    import tensorflow as tf

    @_function(([None], tf.float32, "x"))
    def checked(x):
        tf.debugging.assert_less(x, 10.0, message="x must stay below ten")
        return {"y": x}

    @_function(([None], tf.int32, "i"))
    def gather(i):
        return {"y": tf.gather(tf.constant([1.0, 2.0, 3.0]), i)}

    _save(folder, {"serving_default": checked, "gather": gather})


# -- Keras, and models of TensorFlow 1


@zoo_model(
    serving_default=[{"num": [[1, 2, 3, 4], [0, 0, 0, 0]], "city": [["oslo"], ["x"]], "shop_id": [5, 99]}],
)
def keras_functional(folder: Path) -> None:
    import keras

    keras.utils.set_random_seed(1)
    numbers = keras.Input((4,), name="num")
    city = keras.Input((1,), dtype="string", name="city")
    shop = keras.Input((), dtype="int64", name="shop_id")
    cities = keras.layers.StringLookup(vocabulary=["oslo", "rome"], output_mode="one_hot")(city)
    joined = keras.layers.Concatenate()([numbers, cities, keras.layers.Embedding(100, 3)(shop)])
    outputs = {"rating": keras.layers.Dense(1)(joined), "kind": keras.layers.Dense(3, activation="softmax")(joined)}
    keras.Model({"num": numbers, "city": city, "shop_id": shop}, outputs).export(str(folder), verbose=False)


@zoo_model(serving_default=[{"text": ["the cat", "mat mat on"]}, {"text": [""]}])
def keras_text(folder: Path) -> None:
    """Text vectorization, masking, GRU, batch normalization and dropout."""
    import keras

    keras.utils.set_random_seed(1)
    vectorize = keras.layers.TextVectorization(max_tokens=50, output_sequence_length=6)
    vectorize.adapt(["the cat sat", "on the mat"])
    text = keras.Input((), dtype="string", name="text")
    hidden = keras.layers.GRU(8)(keras.layers.Embedding(50, 8, mask_zero=True)(vectorize(text)))
    hidden = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(hidden))
    toxic = keras.layers.Dense(1, activation="sigmoid", name="toxic")(hidden)
    keras.Model(text, toxic).export(str(folder), verbose=False)


_EXAMPLE = {
    "features": {
        "feature": {
            "age": {"floatList": {"value": [41.0]}},
            "n": {"int64List": {"value": ["-3"]}},
        }
    }
}


def _serialized_example() -> dict[str, str]:
    from google.protobuf import json_format

    from mlkit.export.protos import message_class

    example = json_format.ParseDict(_EXAMPLE, message_class("Example")())
    return {"b64": base64.b64encode(example.SerializeToString()).decode()}


@zoo_model(
    predict=[{"examples": [_serialized_example()]}],
)
def estimator(folder: Path) -> None:
    """Classify and regress signatures over tf.Example, as an Estimator of TensorFlow 1 left them."""
    import tensorflow as tf

    v1 = tf.compat.v1
    saved_model = v1.saved_model
    with tf.Graph().as_default(), v1.Session() as session:
        examples = v1.placeholder(tf.string, [None], "input_example_tensor")
        features = {
            "age": v1.FixedLenFeature([1], tf.float32),
            "n": v1.FixedLenFeature([1], tf.int64, 0),
        }
        parsed = v1.io.parse_example(examples, features)
        weight = v1.get_variable("w", initializer=0.1)
        score = tf.sigmoid(parsed["age"] * weight + tf.cast(parsed["n"], tf.float32))
        scores = tf.concat([1 - score, score], 1)
        classes = tf.tile(tf.constant([["no", "yes"]]), [tf.shape(score)[0], 1])
        session.run(v1.global_variables_initializer())
        classification = saved_model.classification_signature_def(examples, classes, scores)
        signatures = {
            "serving_default": classification,
            "regression": saved_model.regression_signature_def(examples, score),
            "predict": saved_model.predict_signature_def({"examples": examples}, {"p": scores, "logistic": score}),
        }
        builder = saved_model.Builder(str(folder))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


@zoo_model(
    serving_default=[{"x": [[1, 2], [3, 4]], "keep": 0.5}],
    twice=[{"x": [[1, 2]]}],
    through=[{"x": [[1, 2], [5, 6]]}],
    no_method=[{"x": [[1, 1]]}],
)
def tensorflow_1(folder: Path) -> None:
    import tensorflow as tf

    v1 = tf.compat.v1
    saved_model = v1.saved_model
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 2], "x")
        keep = v1.placeholder_with_default(tf.constant(1.0), [], "keep")
        y = tf.matmul(x, v1.get_variable("w", initializer=[[1.0], [2.0]])) * keep
        session.run(v1.global_variables_initializer())
        info = saved_model.build_tensor_info
        signatures = {
            "serving_default": saved_model.predict_signature_def({"x": x, "keep": keep}, {"y": y}),
            "twice": saved_model.predict_signature_def({"x": x}, {"first": y, "second": y}),
            "through": saved_model.predict_signature_def({"x": x}, {"x": x, "y": y}),
            "no_method": saved_model.build_signature_def({"x": info(x)}, {"y": info(y)}, ""),
        }
        builder = saved_model.Builder(str(folder))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


@zoo_model(
    serving_default=[{"x": [1.0, -2.0]}, {"x": [0.5], "scale": 4.0}],
)
def optional_inputs(folder: Path) -> None:
    """An input with a default, which the signature records."""
    import tensorflow as tf

    ten = tf.constant(10.0)

    @_function(([None], tf.float32, "x"), ([], tf.float32, "scale"))
    def predict(x, scale=ten):
        return {"y": x * scale}

    _save(folder, predict)


@zoo_model(parse=[{"inputs": [_serialized_example()]}])
def classify_and_regress(folder: Path) -> None:
    """Classification and regression as TensorFlow 2 writes them, with the method of predict."""
    import tensorflow as tf

    features = {"age": tf.io.FixedLenFeature([], tf.float32)}

    @_function(([None], tf.string, "inputs"))
    def classify(inputs):
        score = tf.sigmoid(tf.io.parse_example(inputs, features)["age"] / 100)
        classes = tf.tile(tf.constant([["no", "yes"]]), [tf.shape(score)[0], 1])
        return {"classes": classes, "scores": tf.stack([1 - score, score], 1)}

    @_function(([None], tf.string, "inputs"))
    def regress(inputs):
        return {"outputs": tf.io.parse_example(inputs, features)["age"] * 2}

    _save(folder, {"serving_default": classify, "regression": regress, "parse": regress})


@zoo_model(serving_default=[{"inputs": [[1.0, 2.0, 3.0, 4.0]]}])
def keras_saved_by_tensorflow(folder: Path) -> None:
    """A Keras 3 model written by `tf.saved_model.save` instead of `model.export`."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="x")
    tf.saved_model.save(keras.Model(inputs, keras.layers.Dense(2, name="y")(inputs)), str(folder))


# -- models with state, or slow ones: what they compute is asserted by tests of their own


@zoo_model()
def counter(folder: Path) -> None:
    """Counts its calls."""
    import tensorflow as tf

    calls = tf.Variable(0, dtype=tf.int64)

    @_function(([None], tf.string, "who"))
    def count(who):
        return {"calls": tf.fill(tf.shape(who), calls.assign_add(1))}

    _save(folder, count, calls=calls)


@zoo_model()
def busy(folder: Path) -> None:
    """Computes for the given number of seconds."""
    import tensorflow as tf

    @_function(([None], tf.float32, "seconds"))
    def compute(seconds):
        started, rounds = tf.timestamp(), tf.constant(0)
        while tf.timestamp() - started < tf.cast(tf.reduce_max(seconds), tf.float64):
            rounds += 1
        return {"rounds": tf.fill(tf.shape(seconds), rounds)}

    _save(folder, compute)


@zoo_model()
def warmed_up(folder: Path) -> None:
    """Brings requests for TF Serving's warm-up, and rejects zeros."""
    import tensorflow as tf

    from mlkit.export.golden_sampling import predict_log
    from mlkit.export.protos import as_records

    calls = tf.Variable(0)

    @_function(([None], tf.float32, "x"))
    def predict(x):
        with tf.control_dependencies([tf.debugging.assert_positive(x, message="x must be positive")]):
            return {"calls": tf.fill(tf.shape(x), calls.assign_add(1))}

    _save(folder, predict, calls=calls)
    (folder / "assets.extra").mkdir()
    request = predict_log("serving_default", {"x": np.array([1.0], "float32")})
    (folder / "assets.extra" / "tf_serving_warmup_requests").write_bytes(as_records([request] * 3))


@zoo_model()
def python_function(folder: Path) -> None:
    """Calls a function in Python, which the SavedModel does not contain."""
    import tensorflow as tf

    @_function(([None], tf.float32, "x"))
    def predict(x):
        return {"y": tf.numpy_function(lambda values: values * 2, [x], tf.float32)}

    _save(folder, predict)


def make(root: Path, names: list[str] | None = None) -> None:
    """Write version 1 of models into `root/NAME`."""
    for name in names or ZOO:
        shutil.rmtree(root / name, ignore_errors=True)
        ZOO[name].write(root / name / "1")


def decode(value: Any) -> Any:
    """JSON values with bytes instead of {"b64": ...} and texts."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode() if isinstance(value, str) else value


def encode(values: Any) -> Any:
    """Values as JSON has them: numbers in full precision, bytes as base64."""
    array = np.asarray(values, object if isinstance(values, bytes) else None)
    if array.dtype == object:
        return json.loads(json.dumps(array.tolist(), default=lambda data: {"b64": base64.b64encode(data).decode()}))
    return array.astype("float64").tolist() if array.dtype.kind in "fV" else array.tolist()


def predict(root: Path) -> dict[str, dict[str, list[Any]]]:
    """What TensorFlow computes for the requests: outputs by model, signature and request."""
    import tensorflow as tf

    predictions: dict[str, dict[str, list[Any]]] = {}
    for name, model in ZOO.items():
        loaded = tf.saved_model.load(str(root / name / "1"))
        for signature, requests in model.requests.items():
            function = loaded.signatures[signature]
            specs = function.structured_input_signature[1]
            for request in requests:
                request = DEFAULTS.get(name, {}) | request
                inputs = {key: tf.constant(decode(value), specs[key].dtype) for key, value in request.items()}
                outputs = {key: encode(value.numpy()) for key, value in function(**inputs).items()}
                predictions.setdefault(name, {}).setdefault(signature, []).append(outputs)
    return predictions


if __name__ == "__main__":
    command, folder, *chosen = sys.argv[1:]
    if command == "make":
        make(Path(folder), chosen)
    else:
        print(json.dumps(predict(Path(folder))))
