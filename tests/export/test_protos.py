"""Messages of TF Serving equal TensorFlow's own, and tensors are converted or rejected with a reason."""

import functools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

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

TensorProto = message_class("TensorProto")
COMPARE_WITH_TENSORFLOW = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from tensorflow_serving.apis import model_service_pb2, prediction_log_pb2, prediction_service_pb2
from google.protobuf import descriptor_pool
from mlkit.export.protos import _TABLES, _lines, message_class, message_pool

ours, theirs = message_pool(), descriptor_pool.Default()
def description(field):
    kind = field.message_type or field.enum_type
    return (field.name, field.type, field.is_repeated, kind and kind.full_name,
            field.containing_oneof and field.containing_oneof.name)
fields = left_out = 0
for package, table in _TABLES.items():
    for kind, name, _ in _lines(table) if package.startswith("tensorflow") else ():
        path = f"{package}.{name}"
        if kind == "service":
            own, real = ours.FindServiceByName(path), theirs.FindServiceByName(path)
            methods = [{m.name: (m.input_type.full_name, m.output_type.full_name) for m in s.methods}
                       for s in (own, real)]
            assert methods[0] == methods[1], path
        elif kind == "enum":
            own, real = ours.FindEnumTypeByName(path), theirs.FindEnumTypeByName(path)
            numbers = {value.name: value.number for value in real.values}
            assert all(numbers[value.name] == value.number for value in own.values), path
        else:
            own, real = ours.FindMessageTypeByName(path), theirs.FindMessageTypeByName(path)
            known = {number: description(field) for number, field in real.fields_by_number.items()}
            for number, field in own.fields_by_number.items():
                assert description(field) == known[number], (path, description(field), known[number])
            fields, left_out = fields + len(own.fields), left_out + len(known) - len(own.fields)
assert fields > 100, fields
request = message_class("PredictRequest")(output_filter=["score"])
request.model_spec.version.value = 3
request.inputs["age"].float_val.extend([31.0, 47.0])
theirs = type(prediction_log_pb2.PredictLog().request).FromString(request.SerializeToString())
assert (theirs.model_spec.version.value, list(theirs.inputs["age"].float_val)) == (3, [31.0, 47.0])
assert message_class("PredictRequest").FromString(theirs.SerializeToString()) == request
"""


def array_to_tensor(array: np.ndarray) -> Message:
    """A TensorProto with the values of an array."""
    tensor = message_class("TensorProto")()
    fill_tensor(tensor, array)
    return tensor


def make_tensor(number: int, shape: list[int], **values: Any) -> Message:
    """A tensor message with a type number, a shape and values."""
    tensor = TensorProto(dtype=number, **values)
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


# -- messages --


def test_a_message_is_written_and_read() -> None:
    predict_request = message_class("PredictRequest")
    request = predict_request(output_filter=["score"])
    request.model_spec.name = "shop"
    request.model_spec.version.value = 3
    request.inputs["age"].dtype = 1
    request.inputs["age"].float_val.extend([31.0, 47.0])
    assert predict_request.FromString(request.SerializeToString()) == request
    request.model_spec.version_label = "stable"
    assert request.model_spec.WhichOneof("version_choice") == "version_label"
    assert message_class("ModelVersionStatus").State.Name(30) == "AVAILABLE"


def test_an_unknown_message_is_an_error() -> None:
    with pytest.raises(KeyError, match="There is no message 'PredictRequests'"):
        message_class("PredictRequests")


def test_all_fields_equal_those_of_tensorflow_serving() -> None:
    pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    done = subprocess.run([sys.executable, "-c", COMPARE_WITH_TENSORFLOW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_messages_need_no_tensorflow() -> None:
    code = "import sys; import mlkit.export.protos; mlkit.export.protos.message_pool(); "
    code += "print(sorted({'tensorflow', 'keras', 'polars'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- tensors --


def test_missing_values_repeat_the_last_one() -> None:
    tensor = TensorProto(dtype=1, float_val=[1.0, 2.0, 3.0])
    tensor.tensor_shape.dim.add(size=2)
    tensor.tensor_shape.dim.add(size=3)
    assert tensor_to_array(tensor).tolist() == [[1, 2, 3], [3, 3, 3]]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (make_tensor(9, [2], tensor_content=np.array([5, -1]).tobytes()), [5, -1]),
        (make_tensor(19, [2], half_val=[0x3C00, 0xC000]), [1, -2]),
        (make_tensor(8, [2], scomplex_val=[1, 2, 3, 4]), [1 + 2j, 3 + 4j]),
        (make_tensor(7, [], string_val=[b"a"]), b"a"),
        (make_tensor(10, [2], tensor_content=b"\x00\x02"), [False, True]),
    ],
)
def test_values_of_each_encoding_are_read(tensor: Message, expected: Any) -> None:
    assert tensor_to_array(tensor).tolist() == expected


def test_an_empty_tensor_keeps_its_shape() -> None:
    assert tensor_to_array(make_tensor(3, [0, 5])).shape == (0, 5)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (make_tensor(20, []), "Input 'age' has type DT_RESOURCE"),
        (make_tensor(77, []), "Input 'age' has type type 77"),
        (
            make_tensor(1, [1_000_000_000_000], float_val=[0]),
            "takes 4,000,000,000,000 bytes; 268,435,456 are accepted",
        ),
        (make_tensor(1, [0, 1_000_000_000_000]), "[0, 1000000000000]"),
        (make_tensor(1, [2_000_000], float_val=[0]), "has 1 values for 2,000,000 elements"),
        (make_tensor(1, [-1], float_val=[0]), "not known in full"),
        (make_tensor(1, [1] * 33, float_val=[0]), "has 33 dimensions"),
        (make_tensor(1, [2], tensor_content=b"abc"), "has 3 bytes in tensor_content; its shape takes 8"),
        (make_tensor(1, [2], float_val=[1, 2, 3]), "holds 3 values in float_val; its shape takes 2"),
        (make_tensor(3, [2], float_val=[1, 2]), "belong in int_val, not in float_val"),
        (make_tensor(7, [1], tensor_content=b"abc"), "read from string_val"),
        (make_tensor(4, [1], int_val=[300]), "holds 300, which uint8 cannot"),
        (make_tensor(19, [1], half_val=[70000]), "no 16 bits"),
    ],
)
def test_an_inconsistent_tensor_is_an_error(tensor: Message, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        tensor_to_array(tensor, "age")
    assert message in str(caught.value)


@pytest.mark.parametrize("number", _FIELDS)
def test_arrays_of_each_type_are_written_and_read(number: int) -> None:
    dtype, _ = _FIELDS[number]
    array = np.array([[0, 1, 2], [1, 0, 1]], object if dtype == STRING else dtype)
    if dtype == STRING:
        array = np.vectorize(lambda value: str(value).encode(), otypes=[object])(array)
    tensor = array_to_tensor(array)
    read = tensor_to_array(tensor)
    assert (tensor.dtype, read.dtype) == (number, array.dtype)
    assert read.tolist() == array.tolist()


def test_texts_scalars_and_long_arrays_are_written() -> None:
    assert tensor_to_array(array_to_tensor(np.array([["no", "yes"]], object))).tolist() == [[b"no", b"yes"]]
    assert tensor_to_array(array_to_tensor(np.array(2.5))) == 2.5
    assert array_to_tensor(np.arange(600, dtype="float32")).float_val[599] == 599


def test_an_unsupported_dtype_is_an_error() -> None:
    with pytest.raises(ServingError, match=r"datetime64\[D\]"):
        array_to_tensor(np.array(["2026-01-01"], "datetime64[D]"))


@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("field", ["float_val", "tensor_content"])
def test_a_request_of_images_is_read_in_both_encodings(batch: int, field: str) -> None:
    images = np.random.default_rng(0).random((batch, 8, 8, 1), "float32")
    request = message_class("PredictRequest")()
    fill_tensor(request.inputs["image"], images)
    if field == "tensor_content":
        request.inputs["image"].ClearField("float_val")
        request.inputs["image"].tensor_content = images.tobytes()
    received = message_class("PredictRequest").FromString(request.SerializeToString())
    np.testing.assert_array_equal(tensor_to_array(received.inputs["image"]), images)


# -- examples --


def test_the_context_is_merged_into_each_example() -> None:
    request, example = message_class("ClassificationRequest")(), message_class("Example")
    request.model_spec.name = "shop"
    examples = request.input.example_list_with_context
    examples.context.features.feature["country"].bytes_list.value.append(b"PT")
    examples.examples.add().features.feature["age"].float_list.value.append(31)
    [merged] = serialized_examples(parse_message("ExamplesRequest", request.SerializeToString()).input)
    assert sorted(example.FromString(merged).features.feature) == ["age", "country"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(parse_message, "PredictRequest", b"\xff"), "The request is no PredictRequest"),
        (lambda: serialized_examples(parse_message("ExamplesRequest", b"").input), "Input is empty"),
    ],
)
def test_invalid_requests_are_errors(call: Any, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        call()
