"""Any body and any tensor either fits a signature or is rejected with a message, by TF Serving's rules."""

import base64
import copy
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mlkit.errors import ServingError
from mlkit.export.protos import (
    _FIELDS,
    STRING,
    fill_tensor,
    message_class,
    parse_message,
    serialized_examples,
    tensor_to_array,
)
from mlkit.export.signatures import CLASSIFY, PREDICT, SignatureInfo, TensorInfo
from mlkit.serving.protocol import (
    PredictCall,
    classifications,
    read_examples,
    read_predict,
    regressions,
    to_array,
    write_classify,
    write_error,
    write_predict,
    write_regress,
)

FLOAT, INT, BOOL = np.dtype("float32"), np.dtype("int32"), np.dtype("bool")


def array_to_tensor(array: np.ndarray) -> Message:
    """A TensorProto with the values of an array."""
    tensor = message_class("TensorProto")()
    fill_tensor(tensor, array)
    return tensor


def signature(name: str, method: str = PREDICT, **inputs: tuple) -> SignatureInfo:
    infos = {key: TensorInfo(key, dtype, shape, f"{key}:0") for key, (dtype, shape) in inputs.items()}
    return SignatureInfo(name, infos, {}, method)


SIGNATURES = {
    entry.name: entry
    for entry in (
        signature("serving_default", age=(FLOAT, (None,)), city=(STRING, (None,))),
        signature("image", image=(FLOAT, (None, 2, 2))),
        signature("several", image=(FLOAT, (None, 2)), count=(INT, (None,)), kept=(BOOL, (None,))),
        signature("free", anything=(np.dtype("int64"), None)),
        signature("classify", CLASSIFY, inputs=(STRING, (None,))),
    )
}
VALID = {
    "serving_default": {"age": [31, 4.5], "city": ["Porto", {"b64": "UG9ydG8="}]},
    "image": {"image": [[[0.5, 1], [2, 3]], [[1e-3, -4], [1e30, 0]]]},
    "several": {"image": [[1, 2.5], [3, 4]], "count": [1, -2], "kept": [True, False]},
    "free": {"anything": [[1], [2]]},
    "classify": {"inputs": ["AAAA", {"b64": "AAAA"}]},
}
fast = settings(deadline=None, derandomize=True, database=None)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just({"b64": "AAAA"})
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def nearly_valid(draw: Any) -> bytes:
    """A request that is valid except for one value, key or byte."""
    name = draw(st.sampled_from(sorted(VALID)))
    columns = json.loads(json.dumps(VALID[name]))
    if draw(st.booleans()):
        place = draw(st.sampled_from(sorted(columns)))
        columns[place] = draw(st.one_of(JSON, st.lists(SCALARS, min_size=2, max_size=2)))
    rows = draw(st.booleans()) and all(isinstance(values, list) for values in columns.values())
    document: dict[str, Any] = {"signature_name": name}
    if rows:
        document["instances"] = [
            dict(zip(columns, values, strict=False)) for values in zip(*columns.values(), strict=False)
        ]
    else:
        document["inputs"] = columns
    if draw(st.integers(0, 9)) == 0:
        document[draw(st.sampled_from(["instances", "inputs", "signature_name", "x"]))] = draw(JSON)
    body = bytearray(json.dumps(document).encode())
    if draw(st.integers(0, 4)) == 0:
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


def fits(call: PredictCall) -> None:
    """Everything that the graph relies on."""
    assert call.inputs.keys() == call.signature.inputs.keys()
    for name, info in call.signature.inputs.items():
        array = call.inputs[name]
        assert array.dtype == (object if info.dtype == STRING else info.dtype)
        assert info.shape is None or array.ndim == len(info.shape)
        assert info.dtype != STRING or all(type(value) is bytes for value in array.ravel())
    if call.rows is not None:
        assert {len(array) for array in call.inputs.values()} == {call.rows}


def refusal(error: ServingError) -> None:
    """Check the error that a client receives."""
    assert 400 <= error.http_status < 500 or error.code == "UNIMPLEMENTED"
    assert json.loads(write_error(error))["error"]


@settings(fast, max_examples=300)
@given(nearly_valid())
def test_an_almost_valid_request_is_parsed_or_rejected(body: bytes) -> None:
    try:
        call = read_predict(body, SIGNATURES)
    except ServingError as error:
        refusal(error)
    else:
        fits(call)


NASTY = [
    None,
    True,
    "",
    "x",
    "\ud800",
    {"b64": "*"},
    {},
    [],
    [[]],
    -0.0,
    1e39,
    2**64,
    10**400,
    math.nan,
    [1, [2]],
    "é" * 99,
]


def spoil(chance: random.Random, document: dict[str, Any]) -> bytes:
    """A request with some value, key or byte that should not be there."""
    document = json.loads(json.dumps(document))
    for _ in range(chance.randint(0, 2)):
        place: Any = document
        while chance.random() < 0.8 and (
            inner := [inner_value for inner_value in values_of(place) if isinstance(inner_value, dict | list)]
        ):
            place = chance.choice(inner)
        if isinstance(place, dict):
            place[chance.choice([*place, "x"])] = copy.deepcopy(chance.choice(NASTY))
        elif place:
            place[chance.randrange(len(place))] = copy.deepcopy(chance.choice(NASTY))
    body = bytearray(json.dumps(document).encode())
    for _ in range(chance.choice([0, 0, 0, 1, 3])):
        body[chance.randrange(len(body))] = chance.choice(b'\x00"[]{},:1eN\xff-.')
    return bytes(body[: len(body) if chance.random() < 0.95 else chance.randrange(len(body))])


def values_of(place: Any) -> list:
    return list(place.values()) if isinstance(place, dict) else place


def test_ten_thousand_corrupted_requests_are_parsed_or_rejected() -> None:
    chance, answered = random.Random(0), 0
    documents = [{"signature_name": name, "inputs": columns} for name, columns in VALID.items()]
    documents += [
        {
            "signature_name": name,
            "instances": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        }
        for name, columns in VALID.items()
    ]
    documents += [{"signature_name": "classify", "context": {"a": 1}, "examples": [{"b": [1.5, 2.5], "c": "x"}, {}]}]
    for number in range(10_000):
        body = spoil(chance, documents[number % len(documents)])
        try:
            if number % len(documents) == len(documents) - 1:
                read_examples(body, SIGNATURES, CLASSIFY)
            else:
                fits(read_predict(body, SIGNATURES))
            answered += 1
        except ServingError as error:
            refusal(error)
    assert 1000 < answered < 9000  # both ways were gone


@settings(fast, max_examples=200)
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_body_is_parsed_or_rejected(body: bytes) -> None:
    for read in (lambda: read_predict(body, SIGNATURES), lambda: read_examples(body, SIGNATURES, CLASSIFY)):
        try:
            read()
        except ServingError as error:
            refusal(error)


@settings(fast, max_examples=300)
@given(st.dictionaries(st.text(max_size=4), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=3))
def test_an_example_keeps_its_values_or_is_rejected(features: dict[str, Any]) -> None:
    body = json.dumps({"signature_name": "classify", "examples": [features]}).encode()
    try:
        [example] = read_examples(body, SIGNATURES, CLASSIFY).examples
    except ServingError as error:
        refusal(error)
        return
    parsed = message_class("Example").FromString(example).features.feature
    assert set(parsed) == set(features)
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        kind = parsed[name].WhichOneof("kind")
        stored = list(getattr(parsed[name], kind).value) if kind else []
        convert = {"float_list": np.float32, "int64_list": int, None: int}.get(kind, as_bytes)
        assert np.array_equal(stored, [convert(item) for item in values], equal_nan=kind == "float_list")


def as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else base64.b64decode(value["b64"])


def by_the_rules(value: Any, dtype: np.dtype, shape: tuple) -> np.ndarray | None:
    """TF Serving's rules for numbers, one element at a time: an array, or None for what is refused."""

    def measure(value: Any) -> tuple:
        return (len(value), *(measure(value[0]) if value else ())) if isinstance(value, list) else ()

    extents, flat = measure(value), []

    def walk(value: Any, level: int) -> bool:
        if isinstance(value, list):
            return (
                level < len(extents) and len(value) == extents[level] and all(walk(item, level + 1) for item in value)
            )
        flat.append(value)
        return level == len(extents) and holds(value)

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            return isinstance(value, int) and limits.min <= value <= limits.max
        if isinstance(value, int) and -(2**63) <= value < 2**64:
            return abs(value) <= (2**24 - 1 if dtype.itemsize == 4 else 2**53 - 1)
        return not math.isfinite(value) or abs(float(value)) <= float(np.finfo(dtype).max)

    if not walk(value, 0) or len(extents) != len(shape):
        return None
    return np.array(flat, dtype).reshape(extents)


NUMBERS = st.one_of(
    st.integers(-40, 40),
    st.sampled_from([2**24 - 1, 2**24, -(2**24), 2**31, 2**53, 2**63, 2**64 - 1, 2**70, 127, 128, -129, 255, 256]),
    st.floats(width=32),
    st.sampled_from([3.4e38, 3.5e38, -1e39, 1e300]),
    st.sampled_from([True, None, "5", [], [1], {"b64": "AAAA"}]),
)


LISTS = st.one_of(
    st.lists(NUMBERS, max_size=3),
    st.integers(0, 2).flatmap(lambda size: st.lists(st.lists(NUMBERS, min_size=size, max_size=size), max_size=3)),
    st.lists(st.lists(NUMBERS, max_size=2), max_size=3),
)


@settings(fast, max_examples=600)
@given(st.sampled_from(["float32", "float64", "int8", "uint8", "int32", "int64", "uint64"]), LISTS, st.integers(1, 2))
def test_numbers_are_accepted_by_tf_servings_rules(name: str, value: list, rank: int) -> None:
    dtype, shape = np.dtype(name), (None,) * rank
    body = json.dumps({"signature_name": "x", "inputs": {"x": value}}).encode()
    expected = by_the_rules(value, dtype, shape)
    try:
        parsed = read_predict(body, {"x": signature("x", x=(dtype, shape))}).inputs["x"]
    except ServingError as error:
        refusal(error)
        parsed = None
    assert (parsed is None) == (expected is None), (value, parsed, expected)
    if expected is not None:
        np.testing.assert_array_equal(parsed, expected)


def test_bodies_that_would_exhaust_memory_or_stack_are_rejected() -> None:
    """A text among a million numbers is none of NumPy's business, and lists in lists end."""
    many = b'{"signature_name":"free","inputs":[' + b"1," * 200_000 + b'"' + b"x" * 1_000_000 + b'"]}'
    with pytest.raises(ServingError, match="takes int64, not") as caught:
        read_predict(many, SIGNATURES)
    assert len(caught.value.message) < 200
    for deep in (b"[" * 900 + b"1" + b"]" * 900, b"[" * 100_000, b"[NaN," * 100_000):
        with pytest.raises(ServingError):
            read_predict(b'{"signature_name":"free","inputs":' + deep + b"}", SIGNATURES)


@settings(fast, max_examples=100)
@given(arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32)))
def test_numbers_survive_a_round_trip(array: np.ndarray) -> None:
    """Of 32 bits in, through JSON, and out."""
    info = TensorInfo("x", FLOAT, None, "")
    np.testing.assert_array_equal(to_array(info, json.loads(json.dumps(array.tolist()))), array)
    written = json.loads(write_predict({"x": array}, row_format=True))["predictions"]
    np.testing.assert_array_equal(np.array(written, np.float32), array)
    named = json.loads(write_predict({"x": array, "y": array}, row_format=True))["predictions"]
    np.testing.assert_array_equal(np.array([row["y"] for row in named], np.float32), array)


@settings(fast, max_examples=400)
@given(
    dtype=st.integers(0, 30),
    shape=st.lists(st.one_of(st.integers(0, 4), st.integers(-(2**62), 2**62)), max_size=4),
    unknown=st.booleans(),
    content=st.binary(max_size=20),
    values=st.dictionaries(
        st.sampled_from(["float_val", "double_val", "int_val", "int64_val", "bool_val", "half_val", "scomplex_val"]),
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
        max_size=2,
    ),
    texts=st.lists(st.binary(max_size=3), max_size=3),
)
def test_any_tensor_is_parsed_or_rejected(**fields: Any) -> None:
    tensor = message_class("TensorProto")(
        dtype=fields["dtype"], tensor_content=fields["content"], string_val=fields["texts"]
    )
    tensor.tensor_shape.unknown_rank = fields["unknown"]
    for extent in fields["shape"]:
        tensor.tensor_shape.dim.add(size=extent)
    for field, values in fields["values"].items():
        getattr(tensor, field).extend(bool(value) for value in values) if field == "bool_val" else getattr(
            tensor, field
        ).extend(values)
    try:
        array = tensor_to_array(tensor, "x", largest=100_000)
    except ServingError as error:
        refusal(error)
    else:
        assert list(array.shape) == fields["shape"]
        assert array.nbytes <= 100_000


@settings(fast, max_examples=200)
@given(st.binary(max_size=40), st.sampled_from(["PredictRequest", "ExamplesRequest", "SeveralRequest"]))
def test_any_bytes_are_parsed_or_rejected(body: bytes, name: str) -> None:
    try:
        message = parse_message(name, body)
        if name != "PredictRequest":
            serialized_examples(message.input)
        else:
            for tensor in message.inputs.values():
                tensor_to_array(tensor)
    except ServingError as error:
        refusal(error)


@settings(fast, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["classes", "scores", "outputs"]),
        st.one_of(
            arrays(np.float32, array_shapes(min_dims=0, max_dims=3, max_side=3)),
            arrays(np.int64, array_shapes(max_dims=2, max_side=3)),
            st.lists(st.binary(max_size=2), min_size=1, max_size=3).map(lambda texts: np.array([texts], object)),
        ),
        max_size=3,
    ),
    st.integers(0, 3),
)
def test_any_outputs_of_a_model_are_serialized_or_rejected(outputs: dict[str, np.ndarray], rows: int) -> None:
    writers = (
        lambda: write_predict(outputs, True),
        lambda: write_predict(outputs, False),
        lambda: write_classify(outputs, rows),
        lambda: write_regress(outputs, rows),
    )
    for write in writers:
        try:
            json.loads(write())
        except ServingError as error:
            refusal(error)
    for read in (classifications, regressions):
        try:
            assert len(read(outputs, rows)) == rows
        except ServingError as error:
            refusal(error)


def test_tensors_are_those_of_tensorflow() -> None:
    """Either side reads what the other has written, with both in one process."""
    tensorflow = pytest.importorskip("tensorflow")
    generator = np.random.default_rng(0)
    for dtype, _ in _FIELDS.values():
        for shape in ((), (3,), (2, 0), (2, 3, 1)):
            if dtype == STRING:
                texts = [str(number).encode() * number for number in range(math.prod(shape))]
                array = np.empty(len(texts), object)
                array[:] = texts
                array = array.reshape(shape)
            else:
                numbers = generator.integers(0, 2 if dtype.kind == "b" else 100, shape)
                array = np.asarray(numbers).astype(dtype)
            theirs = tensorflow.make_tensor_proto(array, dtype="string" if dtype == STRING else None, shape=shape)
            read = tensor_to_array(message_class("TensorProto").FromString(theirs.SerializeToString()))
            assert (read.shape, read.dtype, read.tolist()) == (array.shape, array.dtype, array.tolist())
            ours = type(theirs).FromString(array_to_tensor(array).SerializeToString())
            assert ours.dtype == theirs.dtype
            back = tensorflow.make_ndarray(ours)
            assert (back.shape, back.tolist()) == (array.shape, array.tolist())
            in_graph = tensorflow.io.parse_tensor(array_to_tensor(array).SerializeToString(), ours.dtype).numpy()
            assert (in_graph if isinstance(in_graph, bytes) else in_graph.tolist()) == array.tolist()


def test_examples_are_those_of_tensorflow() -> None:
    """A context is added to each example, as the graph's parser sees it."""
    tensorflow = pytest.importorskip("tensorflow")
    request = {"signature_name": "classify", "context": {"country": "PT"}, "examples": [{"age": 31.5}, {"age": [2.0]}]}
    serialized = read_examples(json.dumps(request).encode(), SIGNATURES, CLASSIFY).examples
    features = {
        "country": tensorflow.io.FixedLenFeature([], "string"),
        "age": tensorflow.io.FixedLenFeature([], "float32"),
    }
    parsed = tensorflow.io.parse_example(serialized, features)
    assert parsed["country"].numpy().tolist() == [b"PT", b"PT"]
    assert parsed["age"].numpy().tolist() == [31.5, 2.0]
