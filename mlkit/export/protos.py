"""Protocol Buffers messages of TensorFlow and TF Serving, and conversion of tensors, without TensorFlow.

Importing TensorFlow for its message classes takes seconds. Here the messages are defined by tables of names, numbers
and types, from which descriptors are built as `protoc` would build them from a file. A test compares every field with
the package `tensorflow-serving-api`.

Notation of the tables: `*` is a repeated field, `a->b` a map, `of x` a member of the oneof `x`, `?` an optional number
whose absence differs from zero. Fields that no server here uses (resources and variants in tensors, composite tensors,
streamed requests) are left out; parsers skip them.
"""

import functools
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
from google.protobuf.message import DecodeError, Message

from mlkit.errors import ServingError

# Messages of TensorFlow.
_TENSORFLOW = """
enum DataType: DT_INVALID=0 DT_FLOAT=1 DT_DOUBLE=2 DT_INT32=3 DT_UINT8=4 DT_INT16=5 DT_INT8=6 DT_STRING=7 \
DT_COMPLEX64=8 DT_INT64=9 DT_BOOL=10 DT_QINT8=11 DT_QUINT8=12 DT_QINT32=13 DT_BFLOAT16=14 DT_QINT16=15 DT_QUINT16=16 \
DT_UINT16=17 DT_COMPLEX128=18 DT_HALF=19 DT_RESOURCE=20 DT_VARIANT=21 DT_UINT32=22 DT_UINT64=23
TensorShapeProto: dim=2 *TensorShapeProto.Dim, unknown_rank=3 bool
TensorShapeProto.Dim: size=1 int64, name=2 string
TensorProto: dtype=1 DataType, tensor_shape=2 TensorShapeProto, version_number=3 int32, tensor_content=4 bytes, \
half_val=13 *int32, float_val=5 *float, double_val=6 *double, int_val=7 *int32, string_val=8 *bytes, \
scomplex_val=9 *float, int64_val=10 *int64, bool_val=11 *bool, dcomplex_val=12 *double, uint32_val=16 *uint32, \
uint64_val=17 *uint64
TensorInfo: name=1 string of encoding, coo_sparse=4 TensorInfo.CooSparse of encoding, dtype=2 DataType, \
tensor_shape=3 TensorShapeProto
TensorInfo.CooSparse: values_tensor_name=1 string, indices_tensor_name=2 string, dense_shape_tensor_name=3 string
SignatureDef: inputs=1 string->TensorInfo, outputs=2 string->TensorInfo, method_name=3 string, \
defaults=4 string->TensorProto
BytesList: value=1 *bytes
FloatList: value=1 *float
Int64List: value=1 *int64
Feature: bytes_list=1 BytesList of kind, float_list=2 FloatList of kind, int64_list=3 Int64List of kind
Features: feature=1 string->Feature
Example: features=1 Features
"""
# Error codes of TensorFlow.
_ERROR = """
enum Code: OK=0 CANCELLED=1 UNKNOWN=2 INVALID_ARGUMENT=3 DEADLINE_EXCEEDED=4 NOT_FOUND=5 ALREADY_EXISTS=6 \
PERMISSION_DENIED=7 UNAUTHENTICATED=16 RESOURCE_EXHAUSTED=8 FAILED_PRECONDITION=9 ABORTED=10 OUT_OF_RANGE=11 \
UNIMPLEMENTED=12 INTERNAL=13 UNAVAILABLE=14 DATA_LOSS=15
"""
# Messages and services of TF Serving, with the log format of warm-up files.
_SERVING = """
ModelSpec: name=1 string, version=2 google.protobuf.Int64Value of version_choice, \
version_label=4 string of version_choice, signature_name=3 string
ExampleList: examples=1 *Example
ExampleListWithContext: examples=1 *Example, context=2 Example
Input: example_list=1 ExampleList of kind, example_list_with_context=2 ExampleListWithContext of kind
Class: label=1 string, score=2 float
Classifications: classes=1 *Class
ClassificationResult: classifications=1 *Classifications
ClassificationRequest: model_spec=1 ModelSpec, input=2 Input
ClassificationResponse: model_spec=2 ModelSpec, result=1 ClassificationResult
Regression: value=1 float
RegressionResult: regressions=1 *Regression
RegressionRequest: model_spec=1 ModelSpec, input=2 Input
RegressionResponse: model_spec=2 ModelSpec, result=1 RegressionResult
InferenceTask: model_spec=1 ModelSpec, method_name=2 string
InferenceResult: model_spec=1 ModelSpec, classification_result=2 ClassificationResult of result, \
regression_result=3 RegressionResult of result
MultiInferenceRequest: tasks=1 *InferenceTask, input=2 Input
MultiInferenceResponse: results=1 *InferenceResult
PredictRequest: model_spec=1 ModelSpec, inputs=2 string->TensorProto, output_filter=3 *string
PredictResponse: model_spec=2 ModelSpec, outputs=1 string->TensorProto
SignatureDefMap: signature_def=1 string->SignatureDef
GetModelMetadataRequest: model_spec=1 ModelSpec, metadata_field=2 *string
GetModelMetadataResponse: model_spec=1 ModelSpec, metadata=2 string->google.protobuf.Any
StatusProto: error_code=1 Code, error_message=2 string
GetModelStatusRequest: model_spec=1 ModelSpec
enum ModelVersionStatus.State: UNKNOWN=0 START=10 LOADING=20 AVAILABLE=30 UNLOADING=40 END=50
ModelVersionStatus: version=1 int64, state=2 ModelVersionStatus.State, status=3 StatusProto
GetModelStatusResponse: model_version_status=1 *ModelVersionStatus
service PredictionService: Classify=ClassificationRequest->ClassificationResponse \
Regress=RegressionRequest->RegressionResponse Predict=PredictRequest->PredictResponse \
MultiInference=MultiInferenceRequest->MultiInferenceResponse \
GetModelMetadata=GetModelMetadataRequest->GetModelMetadataResponse
"""
_SERVING += """
FileSystemStoragePathSourceConfig:
FileSystemStoragePathSourceConfig.ServableVersionPolicy: \
latest=100 FileSystemStoragePathSourceConfig.ServableVersionPolicy.Latest of policy_choice, \
all=101 FileSystemStoragePathSourceConfig.ServableVersionPolicy.All of policy_choice, \
specific=102 FileSystemStoragePathSourceConfig.ServableVersionPolicy.Specific of policy_choice
FileSystemStoragePathSourceConfig.ServableVersionPolicy.Latest: num_versions=1 uint32
FileSystemStoragePathSourceConfig.ServableVersionPolicy.All:
FileSystemStoragePathSourceConfig.ServableVersionPolicy.Specific: versions=1 *int64
LogCollectorConfig: type=1 string, filename_prefix=2 string
SamplingConfig: sampling_rate=1 double
LoggingConfig: log_collector_config=1 LogCollectorConfig, sampling_config=2 SamplingConfig
enum ModelType: MODEL_TYPE_UNSPECIFIED=0 TENSORFLOW=1 OTHER=2
ModelConfig: name=1 string, base_path=2 string, model_type=3 ModelType, model_platform=4 string, \
model_version_policy=7 FileSystemStoragePathSourceConfig.ServableVersionPolicy, version_labels=8 string->int64, \
logging_config=6 LoggingConfig
ModelConfigList: config=1 *ModelConfig
ModelServerConfig: model_config_list=1 ModelConfigList of config, custom_model_config=2 google.protobuf.Any of config
Metric: name=1 string, int64_value_increase=2 int64 of value_increase
ReloadConfigRequest: config=1 ModelServerConfig, metric_names=2 *string
ReloadConfigResponse: status=1 StatusProto, metric=2 *Metric
service ModelService: GetModelStatus=GetModelStatusRequest->GetModelStatusResponse \
HandleReloadConfigRequest=ReloadConfigRequest->ReloadConfigResponse
LogMetadata: model_spec=1 ModelSpec, sampling_config=2 SamplingConfig, saved_model_tags=3 *string, \
timestamp_secs=4 int64
ClassifyLog: request=1 ClassificationRequest, response=2 ClassificationResponse
RegressLog: request=1 RegressionRequest, response=2 RegressionResponse
PredictLog: request=1 PredictRequest, response=2 PredictResponse
MultiInferenceLog: request=1 MultiInferenceRequest, response=2 MultiInferenceResponse
PredictionLog: log_metadata=1 LogMetadata, classify_log=2 ClassifyLog of log_type, \
regress_log=3 RegressLog of log_type, predict_log=6 PredictLog of log_type, \
multi_inference_log=4 MultiInferenceLog of log_type
"""
# Other views of the same bytes. A graph takes serialized examples, so `SerializedInput` does not unpack them. Of
# `saved_model.pb` the signatures are read, and of the graph which operations it has.
_MLKIT = """
SerializedExamples: examples=1 *bytes, context=2 bytes
SerializedInput: example_list=1 SerializedExamples of kind, example_list_with_context=2 SerializedExamples of kind
ExamplesRequest: model_spec=1 ModelSpec, input=2 SerializedInput
SeveralRequest: tasks=1 *InferenceTask, input=2 SerializedInput
BatchingParameters: max_batch_size=1 google.protobuf.Int64Value, max_enqueued_batches=3 google.protobuf.Int64Value
SavedModel: saved_model_schema_version=1 int64, meta_graphs=2 *SavedModel.MetaGraph
SavedModel.MetaGraph: meta_info_def=1 SavedModel.MetaInfo, graph_def=2 SavedModel.Graph, \
saver_def=3 SavedModel.Saver, collection_def=4 string->SavedModel.Collection, signature_def=5 string->SignatureDef
SavedModel.Saver: restore_op_name=3 string
SavedModel.Collection: node_list=1 SavedModel.NodeNames
SavedModel.NodeNames: value=1 *string
SavedModel.Graph: node=1 *SavedModel.Node, library=2 SavedModel.Library
SavedModel.Library: function=1 *SavedModel.Function
SavedModel.Function: signature=1 SavedModel.Operation, node_def=3 *SavedModel.Node
SavedModel.Operation: name=1 string
SavedModel.Node: name=1 string, op=2 string, input=3 *string, attr=5 string->SavedModel.Attribute
SavedModel.Attribute: list=1 SavedModel.Attributes, func=10 SavedModel.Operation
SavedModel.Attributes: func=9 *SavedModel.Operation
SavedModel.MetaInfo: tags=4 *string, tensorflow_version=5 string
"""
_TABLES = {
    "tensorflow.error": _ERROR,
    "tensorflow": _TENSORFLOW,
    "tensorflow.serving": _SERVING,
    "mlkit.serving": _MLKIT,
}
_FIELD = re.compile(r"(\w+)=(\d+) ([*?]?)([\w.]+)(?:->([\w.]+))?(?: of (\w+))?")


def _set_type(field: descriptor_pb2.FieldDescriptorProto, name: str, known: dict[str, tuple[str, str]]) -> None:
    """Set the type of a field: a scalar, or a message or enumeration of the tables."""
    kind, full = known.get(name, (name, ""))
    if name.startswith("google."):
        kind, full = "message", f".{name}"
    field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    if full:
        field.type_name = full


def _add_map(message: descriptor_pb2.DescriptorProto, name: str, kinds: tuple[str, str], known: dict) -> str:
    """Add the entry message of a map field; returns its name."""
    entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    for number, kind in enumerate(kinds, 1):
        _set_type(entry.field.add(name=("key", "value")[number - 1], number=number, label=1), kind, known)
    return entry.name


def _add_fields(message: descriptor_pb2.DescriptorProto, path: str, text: str, known: dict) -> None:
    """Add the fields of a message from a line of a table."""
    choices = {}
    for name, number, mark, kind, value, choice in _FIELD.findall(text):
        field = message.field.add(name=name, number=int(number), label=3 if mark == "*" or value else 1)
        if value:
            field.type, field.type_name = 11, f"{path}.{_add_map(message, name, (kind, value), known)}"
        else:
            _set_type(field, kind, known)
        if choice:
            if choice not in choices:
                choices[choice] = len(message.oneof_decl)
                message.oneof_decl.add(name=choice)
            field.oneof_index = choices[choice]


def _lines(table: str) -> list[tuple[str, str, str]]:  # kind ("", "enum" or "service"), name, fields
    """The definitions of a table."""
    heads = (line.partition(":") for line in table.splitlines() if line)
    return [(*head.rpartition(" ")[::2], body.strip()) for head, _, body in heads]


def _find_or_add(messages: Any, name: str) -> descriptor_pb2.DescriptorProto:
    return next((message for message in messages if message.name == name), None) or messages.add(name=name)


def _parent(file: descriptor_pb2.FileDescriptorProto, name: str) -> tuple[Any, str]:
    """The file or message that contains a definition, and the definition's own name."""
    *outer, own = name.split(".")
    parent = file
    for part in outer:
        parent = _find_or_add(parent.message_type if parent is file else parent.nested_type, part)
    return parent, own


def _describe(package: str, known: dict[str, tuple[str, str]]) -> descriptor_pb2.FileDescriptorProto:
    """The file descriptor of a table."""
    file = descriptor_pb2.FileDescriptorProto(name=f"mlkit/{package}.proto", package=package, syntax="proto3")
    for kind, name, body in _lines(_TABLES[package]):
        parent, own = _parent(file, name)
        if kind == "enum":
            enumeration = parent.enum_type.add(name=own)
            for label, number in re.findall(r"(\w+)=(\d+)", body):
                enumeration.value.add(name=label, number=int(number))
        elif kind == "service":
            service = parent.service.add(name=own)
            for method, request, response in re.findall(r"(\w+)=(\w+)->(\w+)", body):
                service.method.add(name=method, input_type=known[request][1], output_type=known[response][1])
        else:
            message = _find_or_add(parent.message_type if parent is file else parent.nested_type, own)
            _add_fields(message, f".{package}.{name}", body, known)
    return file


@functools.cache
def message_pool() -> descriptor_pool.DescriptorPool:
    """The descriptors of all messages and services.

    A pool of its own: a pool has one message of a name, and a process may also import TensorFlow's.
    """
    known, pool = {}, descriptor_pool.DescriptorPool()
    for package, table in _TABLES.items():
        for kind, name, _ in _lines(table):
            known[name] = (kind or "message", f".{package}.{name}")
    dependencies = [module.DESCRIPTOR for module in (any_pb2, wrappers_pb2)]
    for file in dependencies:
        pool.AddSerializedFile(file.serialized_pb)
    names = [file.name for file in dependencies]
    for package in _TABLES:
        file = _describe(package, known)
        file.dependency.extend(names)
        names.append(file.name)
        pool.Add(file)
    return pool


@functools.cache
def message_class(
    name: str,  # "PredictRequest", "TensorProto" ...
) -> type[Message]:
    """The class of a message; raises KeyError for an unknown name."""
    for package in _TABLES:
        try:
            return message_factory.GetMessageClass(message_pool().FindMessageTypeByName(f"{package}.{name}"))
        except KeyError:
            continue
    raise KeyError(f"There is no message '{name}'.")


STRING = "string"  # dtype of texts and bytes, for which NumPy has no fixed size
_FIELDS = {  # number in DataType -> NumPy dtype, field of the values
    1: (np.dtype("float32"), "float_val"),
    2: (np.dtype("float64"), "double_val"),
    3: (np.dtype("int32"), "int_val"),
    4: (np.dtype("uint8"), "int_val"),
    5: (np.dtype("int16"), "int_val"),
    6: (np.dtype("int8"), "int_val"),
    7: (STRING, "string_val"),
    8: (np.dtype("complex64"), "scomplex_val"),
    9: (np.dtype("int64"), "int64_val"),
    10: (np.dtype("bool"), "bool_val"),
    14: (np.dtype(ml_dtypes.bfloat16), "half_val"),
    17: (np.dtype("uint16"), "int_val"),
    18: (np.dtype("complex128"), "dcomplex_val"),
    19: (np.dtype("float16"), "half_val"),
    22: (np.dtype("uint32"), "uint32_val"),
    23: (np.dtype("uint64"), "uint64_val"),
}
_NUMBERS = {dtype: number for number, (dtype, _) in _FIELDS.items()}
MAX_TENSOR_BYTES = 1 << 28
MAX_FILLED_BYTES = 1 << 22  # of a tensor whose last value is repeated: it costs the sender nothing


def type_name(
    number: int,  # number in DataType
) -> str:
    """TensorFlow's name of a dtype."""
    names = message_pool().FindEnumTypeByName("tensorflow.DataType").values_by_number
    return names[number].name if number in names else f"type {number}"


def array_type(
    number: int,  # number in DataType
) -> np.dtype | str:  # "string" for texts and bytes; TensorFlow's name for a dtype without arrays
    """The NumPy dtype of a tensor."""
    return _FIELDS[number][0] if number in _FIELDS else type_name(number)


def _invalid(name: str, text: str) -> ServingError:
    return ServingError("INVALID_ARGUMENT", f"Input '{name}' {text}" if name else f"The tensor {text}")


def _checked_shape(tensor: Message, name: str, size: int, largest: int) -> tuple[tuple[int, ...], int]:
    """A tensor's shape and number of elements; raises ServingError for an invalid or too large one.

    A message of thirty bytes may declare a terabyte, so the shape is checked before anything is allocated.
    """
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if tensor.tensor_shape.unknown_rank or min(shape, default=0) < 0:
        raise _invalid(name, "has a shape that is not known in full, so its values cannot be laid out.")
    if len(shape) > 32:  # NumPy ends at 64
        raise _invalid(name, f"has {len(shape)} dimensions; 32 are possible.")
    needed = size * math.prod(extent for extent in shape if extent)
    if needed > largest:
        raise _invalid(name, f"has shape {list(shape)}, which takes {needed:,} bytes; {largest:,} are accepted.")
    return shape, math.prod(shape)


def _from_content(tensor: Message, name: str, dtype: np.dtype | str, count: int) -> np.ndarray:
    """The values of a tensor in raw bytes."""
    content = tensor.tensor_content
    if dtype == STRING:
        raise _invalid(name, "holds texts in tensor_content; they are read from string_val.")
    if len(content) != count * dtype.itemsize:
        raise _invalid(
            name, f"has {len(content):,} bytes in tensor_content; its shape takes {count * dtype.itemsize:,}."
        )
    array = np.frombuffer(content, dtype)
    return array.view(np.uint8) != 0 if dtype.kind == "b" else array


def _as_array(name: str, values: Sequence, dtype: np.dtype | str, field: str) -> np.ndarray:
    """The values of a field as an array of the tensor's dtype."""
    if dtype == STRING:
        array = np.empty(len(values), object)
        array[:] = values
        return array
    if field == "half_val":  # bits of 16-bit numbers
        bits = np.array(values, np.int64)
        if ((bits < 0) | (bits > 0xFFFF)).any():
            raise _invalid(name, "holds numbers in half_val that are no 16 bits.")
        return bits.astype(np.uint16).view(dtype)
    if dtype.kind == "c":  # real and imaginary parts in turn
        return np.array(values[: len(values) // 2 * 2], dtype.char.lower()).view(dtype)
    if field == "int_val" and dtype.itemsize < 4:
        array = np.array(values, np.int32)
        overflows = (array < np.iinfo(dtype).min) | (array > np.iinfo(dtype).max)
        if overflows.any():
            raise _invalid(name, f"holds {array[overflows][0]}, which {dtype} cannot.")
        return array.astype(dtype)
    return np.fromiter(values, dtype, len(values))


def _from_values(tensor: Message, name: str, count: int) -> np.ndarray:
    """The values of a tensor in the field of its dtype.

    As in TensorFlow, missing values repeat the last one, and are zeros without any. Values in the field of another
    dtype are an error: TensorFlow would read zeros.
    """
    dtype, field = _FIELDS[tensor.dtype]
    array = _as_array(name, list(getattr(tensor, field)), dtype, field)
    if len(array) > count:
        raise _invalid(name, f"holds {len(array):,} values in {field}; its shape takes {count:,}.")
    if len(array) == count:
        return array
    other_fields = [descriptor.name for descriptor, _ in tensor.ListFields() if descriptor.name.endswith("_val")]
    if not len(array) and other_fields:
        raise _invalid(
            name, f"has type {type_name(tensor.dtype)}, whose values belong in {field}, not in {other_fields[0]}."
        )
    if count * array.itemsize > MAX_FILLED_BYTES:
        raise _invalid(name, f"has {len(array):,} values for {count:,} elements; that many have to be sent one by one.")
    last = array[-1] if len(array) else (b"" if dtype == STRING else 0)
    filled = np.full(count, last, object if dtype == STRING else dtype)
    filled[: len(array)] = array
    return filled


def tensor_to_array(
    tensor: Message,  # TensorProto, ours or TensorFlow's
    name: str = "",  # name of the input, for error messages
    largest: int = MAX_TENSOR_BYTES,  # maximum size in bytes
) -> np.ndarray:  # object array of bytes for texts
    """The values of a tensor; raises ServingError for inconsistent dtype, shape and values."""
    if tensor.dtype not in _FIELDS:
        raise _invalid(name, f"has type {type_name(tensor.dtype)}, which no request can hold.")
    dtype, _ = _FIELDS[tensor.dtype]
    shape, count = _checked_shape(tensor, name, 8 if dtype == STRING else dtype.itemsize, largest)
    array = _from_content(tensor, name, dtype, count) if tensor.tensor_content else _from_values(tensor, name, count)
    return array.reshape(shape)


def _encode_field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a serialized message."""
    length, size = bytearray(), len(data)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((number << 3 | 2,)) + bytes(length) + bytes((size,)) + data


def fill_tensor(
    tensor: Message,  # an empty TensorProto
    array: np.ndarray,  # numbers, or an object array of texts or bytes
) -> None:
    """Write an array into a tensor, in the field of its dtype; raises ServingError for an unsupported dtype.

    Many clients read `float_val` only, so `tensor_content` is not used. Floats have the same bytes in the message as
    in memory, so they are copied as one field.
    """
    dtype = STRING if array.dtype.kind in "OSU" else array.dtype.newbyteorder("=")
    number = _NUMBERS.get(dtype)
    if number is None:
        raise ServingError("UNIMPLEMENTED", f"Values of type {array.dtype} cannot be sent as a tensor.")
    tensor.dtype = number
    for extent in array.shape:
        tensor.tensor_shape.dim.add(size=extent)
    field = _FIELDS[number][1]
    if dtype == STRING:
        texts = array.ravel().tolist()
        tensor.string_val.extend(text if isinstance(text, bytes) else str(text).encode() for text in texts)
    elif dtype.kind in "fc" and dtype.itemsize > 2:
        field_number = tensor.DESCRIPTOR.fields_by_name[field].number
        tensor.MergeFromString(_encode_field(field_number, array.astype(dtype).tobytes()))
    else:
        flat = np.ascontiguousarray(array, dtype).ravel()
        getattr(tensor, field).extend((flat.view(np.uint16) if field == "half_val" else flat).tolist())


def parse_message(
    name: str,  # name of the message class
    body: bytes,  # serialized message
) -> Message:
    """Parse a message; raises ServingError for invalid bytes."""
    try:
        return message_class(name).FromString(body)
    except DecodeError as error:
        raise ServingError("INVALID_ARGUMENT", f"The request is no {name}: {error}.") from None


def as_records(
    messages: Iterable[bytes],
) -> bytes:  # content of a TFRecord file
    """Messages as TFRecords: each with its length and two checksums."""
    heads = ((struct.pack("<Q", len(message)), message) for message in messages)
    return b"".join(head + _masked_crc(head) + message + _masked_crc(message) for head, message in heads)


def _masked_crc(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C."""
    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def serialized_examples(
    given: Message,  # SerializedInput
) -> list[bytes]:  # one serialized tf.train.Example per row
    """The examples of a request, each merged with its context; raises ServingError without examples."""
    kind = given.WhichOneof("kind")
    examples = list(getattr(given, kind).examples) if kind else []
    if not examples:
        raise ServingError("INVALID_ARGUMENT", "Input is empty: it takes at least one example.")
    context = getattr(given, kind).context
    # concatenated messages are parsed as one merged message
    return [context + example for example in examples] if context else examples


def read_records(
    data: bytes,  # content of a TFRecord file
) -> Iterator[bytes]:
    """Records of a TFRecord file; raises ValueError for a file that ends within a record."""
    offset = 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 8], "little")
        end = offset + 12 + size  # the length and its checksum, the record and its checksum
        if end + 4 > len(data):
            raise ValueError("the file ends within a record")
        yield data[offset + 12 : end]
        offset = end + 4
