"""Schemas as files: schemas from TFX, mistakes in edited files, and a history that two processes write at once."""

import datetime
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import polars as pl
import pytest
from google.protobuf import struct_pb2, text_format
from tensorflow_metadata.proto.v0 import schema_pb2

from mlkit.data import Schema, describe, infer_schema, load_schema, measure_drift
from mlkit.data.drift import DISTANCES
from mlkit.data.schema import ColumnSchema, SchemaHistory, parse_schema, schema_from_proto, schema_text, schema_to_proto
from mlkit.data.synthetic import retail
from mlkit.errors import DatasetError, StorageError
from tests.conftest import wait_until

# A schema as TFX pipelines have it: mlkit does not interpret much of it.
TFX_SCHEMA = """
feature { name: "age" type: INT presence { min_fraction: 1.0 min_count: 1 } shape { dim { size: 1 name: "one" } }
  int_domain { name: "age" min: 0 max: 120 is_categorical: false } lifecycle_stage: PRODUCTION
  skew_comparator { infinity_norm { threshold: 0.01 } normalized_abs_difference { threshold: 0.2 } }
  drift_comparator { jensen_shannon_divergence { threshold: 0.05 source { type: QUANTILES } } } }
feature { name: "work" type: BYTES domain: "work" value_count { min: 1 max: 1 }
  distribution_constraints { min_domain_mass: 0.9 }
  annotation { tag: "team=growth" tag: "pii" comment: "As told" comment: "at registration"
    extra_metadata { [type.googleapis.com/google.protobuf.Struct] {
      fields { key: "owner" value { string_value: "ann" } } } } } }
feature { name: "job" type: BYTES domain: "work" unique_constraints { min: 1 max: 9 } }
feature { name: "text" type: BYTES natural_language_domain { vocabulary: "v" coverage { min_coverage: 0.5 } } }
feature { name: "rate" type: FLOAT float_domain { min: 0.1 max: 0.3 disallow_nan: true is_embedding: false } }
feature { name: "tags" type: BYTES value_count { min: 0 max: 8 } sequence_metadata { joint_group: "g" } }
feature { name: "ragged" type: INT value_counts { value_count { min: 1 } value_count { max: 3 } } }
feature { name: "when" type: INT time_domain { integer_format: UNIX_SECONDS } }
feature { name: "day" type: BYTES time_domain { string_format: "%Y-%m-%d" } }
feature { name: "odd day" type: BYTES time_domain { string_format: "%d.%m.%y" } }
feature { name: "flag" type: BYTES bool_domain { true_value: "yes" false_value: "no" } }
feature { name: "photo" type: BYTES image_domain { max_image_byte_size: 99 } }
feature { name: "old" deprecated: true type: INT group_presence { required: true } }
feature { name: "nested" type: STRUCT struct_domain { feature { name: "inner" type: INT } } }
feature { name: "income" type: BYTES not_in_environment: "SERVING" in_environment: "NIGHT" }
feature { name: "untyped" }
sparse_feature { name: "s" index_feature { name: "when" } value_feature { name: "rate" } is_sorted: true }
weighted_feature { name: "w" feature { step: "age" } weight_feature { step: "rate" } }
string_domain { name: "work" value: "private" value: "state" is_categorical: CATEGORICAL_YES }
int_domain { name: "nobody's" min: 3 }
default_environment: "TRAINING" default_environment: "SERVING"
represent_variable_length_as_ragged: true
annotation { tag: "version=7" }
dataset_constraints { num_examples_drift_comparator { min_fraction_threshold: 0.5 } min_examples_count: 10 }
tensor_representation_group { key: "" value { tensor_representation { key: "s"
  value { varlen_sparse_tensor { column_name: "tags" } } } } }
"""


def proto(text: str) -> schema_pb2.Schema:
    assert struct_pb2  # known to the parser by being imported
    return text_format.Parse(text, schema_pb2.Schema())


def test_uninterpreted_fields_are_preserved(tmp_path: Path) -> None:
    path = tmp_path / "schema.pbtxt"
    path.write_text(TFX_SCHEMA)
    schema = load_schema(path)
    assert schema_to_proto(schema) == proto(TFX_SCHEMA)
    assert proto(schema.save(path).read_text()) == proto(TFX_SCHEMA)
    assert load_schema(path) == schema


def test_interpreted_fields() -> None:
    schema = parse_schema(TFX_SCHEMA)
    types = {column.name: column.type for column in schema}
    assert types["age"] == types["when"] == types["ragged"] == "integer"
    assert (types["day"], types["odd day"], types["flag"]) == ("date", "text", "boolean")
    assert types["photo"] == types["nested"] == types["untyped"] == "other"
    assert schema["job"].domain == ("private", "state")
    assert schema["rate"].maximum == 0.3
    assert (schema["work"].domain_share, schema["work"].shape, schema["tags"].values) == (0.9, (), (0, 8))
    assert schema.thresholds() == {"age": {"jensen_shannon": 0.05}}
    assert schema.thresholds("skew") == {"age": {"l_infinity": 0.01}}
    assert schema.min_rows == 10
    assert "old" not in [column.name for column in schema.expected()]
    for name, expected in {"TRAINING": True, "SERVING": False, "NIGHT": True}.items():
        assert (schema["income"] in schema.expected(name)) == expected, name


CHANGES = {
    "required": 0.25,
    "required_rows": 7,
    "domain_share": 0.5,
    "unique": True,
    "distinct": (2, 40),
    "shape": (3, 2),
    "values": (1, None),
    "in_environment": ("NIGHT", "DAY"),
    "not_in_environment": ("TRAINING",),
    "drift": dict.fromkeys(DISTANCES, 0.3),
    "skew": {"population_stability": 0.2},
    "severity": {"presence": "warning", "type": "off"},
    "checked": False,
    "unit": "euros = €",
    "description": 'said "so"\nonce',
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_is_written_and_touches_nothing_else(field: str) -> None:
    before = parse_schema(TFX_SCHEMA)
    for name in ("age", "work", "untyped"):
        extra = {"shape": None} if field == "values" else {"values": None} if field == "shape" else {}
        after = before.change(name, **{field: CHANGES[field]}, **extra)
        again = parse_schema(schema_text(after))
        assert again[name] == after[name]
        assert {change.column for change in before.diff(again)} <= {name}
        changed = schema_to_proto(after)
        position = [feature.name for feature in changed.feature].index(name)
        original = proto(TFX_SCHEMA)
        del changed.feature[position], original.feature[position]
        assert changed == original


def test_every_field_has_a_change_that_is_tested() -> None:
    elsewhere = {"name", "type", "domain", "minimum", "maximum", "finite"}
    assert {field.name for field in fields(ColumnSchema)} == elsewhere | CHANGES.keys()


def test_a_shared_domain_is_changed_for_one_feature_and_removed_with_the_last() -> None:
    schema = parse_schema(TFX_SCHEMA).change("work", domain=("private", "state", "none"))
    message = schema_to_proto(schema)
    assert [domain.name for domain in message.string_domain] == ["work"]
    assert list(message.feature[1].string_domain.value) == ["private", "state", "none"]
    assert message.feature[1].annotation.extra_metadata
    dropped = schema_to_proto(schema.drop("job"))
    assert not dropped.string_domain
    assert [domain.name for domain in dropped.int_domain] == ["nobody's"]


@pytest.mark.parametrize("maximum", [0.3, 1e-300, 1 / 3, 16777217.0, 1e300, -0.1, 5.0])
def test_a_number_bound_survives_the_32_bits_of_the_file(maximum: float) -> None:
    schema = Schema({"x": ColumnSchema("x", "number", minimum=-1.0, maximum=maximum)})
    assert parse_schema(schema_text(schema))["x"].maximum == maximum


def test_a_bound_edited_in_the_file_wins_over_the_exact_one_beside_it() -> None:
    text = schema_text(Schema({"x": ColumnSchema("x", "number", maximum=1 / 3)}))
    assert "mlkit.maximum=0.3333333333333333" in text
    edited = text.replace("max: 0.333333343", "max: 0.5").replace("max: 0.33333334", "max: 0.5")
    assert parse_schema(edited)["x"].maximum == 0.5


ODD_NAMES = ["", "^a.*$", "*", 'qu"ote', "new\nline", "naïve Größe", "a.b", "a=b", "'", "名前", "<script>", "x" * 500]


def test_odd_column_names_survive(tmp_path: Path) -> None:
    schema = Schema({name: ColumnSchema(name, "integer", maximum=9) for name in ODD_NAMES})
    assert list(load_schema(schema.save(tmp_path / "schema.pbtxt")).columns) == ODD_NAMES
    assert load_schema(tmp_path / "schema.pbtxt") == schema
    assert "<script>" not in schema._repr_html_()


def test_five_thousand_columns(tmp_path: Path) -> None:
    table = pl.DataFrame({f"c{n}": [n, n + 1] for n in range(5_000)})
    schema = infer_schema(describe(table))
    assert load_schema(schema.save(tmp_path / "schema.pbtxt")) == schema


def test_thresholds_of_a_schema_are_used_for_drift() -> None:
    statistics = describe(retail(rows=2_000))
    schema = infer_schema(statistics).change("price", drift={"wasserstein": 1e9, "jensen_shannon": 0.9})
    assert measure_drift(statistics, statistics, thresholds=schema.thresholds()).passed


def test_importing_schemas_does_not_import_tensorflow_metadata() -> None:
    code = "import mlkit.data.schema, mlkit.data.validation, sys; print('tensorflow_metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('feature {\n  name: "age"\n  typ: INT\n}', ["line 3", "a Feature has no field 'typ'", "Did you mean 'type'?"]),
        ('feature {\n  name: "a"\n  int_domain { mim: 1 }\n}', ["line 3", "an IntDomain"[3:], "Did you mean 'min'?"]),
        ("future_field: 1", ["line 1", "a Schema has no field 'future_field'"]),
        ('feature { name: "age" }\nfeature { name: "age" }', ["line 2", "twice"]),
        ('feature {\n  name: "age"\n  type: INT\n  int_domain { min: 9 max: 0 }\n}', ["line 2", "'age'", "minimum 9"]),
        ('feature {\n  name: "age"\n  annotation { tag: "mlkit.unti=years" }\n}', ["'age'", "Did you mean 'unit'?"]),
        ('feature {\n  name: "d"\n  type: BYTES time_domain { string_format: "%Y-%m-%d" }\n'
         '  annotation { tag: "mlkit.minimum=1.2.26" }\n}', ["'d'", "1.2.26"]),
        ('annotation { tag: "mlkit.severity.rnage=off" }', ["Did you mean 'range'?"]),
        ('annotation { tag: "mlkit.version=new" }', ["new"]),
        ('feature { name: "age" type: INT', ['Expected "}"']),
        ("\x00\x01", ["is not tensorflow-metadata's schema text"]),
    ],
)  # fmt: skip
def test_an_invalid_file_is_an_error_and_is_not_overwritten(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "schema.pbtxt"
    path.write_text(text)
    with pytest.raises(DatasetError) as error:
        load_schema(path)
    assert all(part in str(error.value) for part in [*parts, "schema.pbtxt"]), error.value
    with pytest.raises(DatasetError, match="Nothing was overwritten"):
        Schema({}).save(path)
    with pytest.raises(DatasetError):
        SchemaHistory(tmp_path).save(Schema({}))
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        SchemaHistory(tmp_path / "file").save(Schema({}))


def test_a_full_disk_leaves_the_old_schema(small_disk: Path) -> None:
    history = SchemaHistory(small_disk)
    history.save(Schema({"a": ColumnSchema("a", "integer")}))
    (small_disk / "filler").write_bytes(b"x" * 230_000)
    large = Schema({f"c{n}": ColumnSchema(f"c{n}", "text", domain=("x" * 40,)) for n in range(1_000)})
    with pytest.raises(StorageError, match="disk is full"):
        history.save(large)
    assert list(history.current.columns) == ["a"]
    assert [snapshot.number for snapshot in history.snapshots] == [1]


WRITER = """
import sys
from mlkit.data import Schema; from mlkit.data.schema import ColumnSchema, SchemaHistory
history = SchemaHistory(sys.argv[1])
for n in range(int(sys.argv[3])):
    history.save(Schema({"x": ColumnSchema("x", "integer", maximum=n, unit=sys.argv[2])}), f"{sys.argv[2]} {n}")
"""


def start_writer(folder: Path, name: str, times: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, folder, name, str(times)])


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, name, 15) for name in ("first", "second")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    history = SchemaHistory(tmp_path)
    assert [snapshot.number for snapshot in history.snapshots] == list(range(1, 31))
    reasons = {f"{writer} {n}" for writer in ("first", "second") for n in range(15)}
    assert {snapshot.reason for snapshot in history.snapshots} == reasons
    assert history.current == history.at(30).schema


def test_a_writer_that_is_killed_leaves_a_readable_history(tmp_path: Path) -> None:
    history = SchemaHistory(tmp_path)
    for seen in (3, 9, 14):
        writer = start_writer(tmp_path, "w", 10_000)
        wait_until(lambda seen=seen: len(history.snapshots) >= seen)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        numbers = [snapshot.number for snapshot in history.snapshots]
        assert numbers == list(range(1, len(numbers) + 1))
        assert all(len(snapshot.schema) == 1 for snapshot in history.snapshots)
        assert history.current["x"].unit == "w"
    last = history.save(Schema({"y": ColumnSchema("y")}), "after all")
    assert history.current == last.schema


def test_a_kill_between_the_two_writes_keeps_the_new_schema(tmp_path: Path) -> None:
    history = SchemaHistory(tmp_path)
    history.save(Schema({"a": ColumnSchema("a")}), "first")
    second = history.save(Schema({"b": ColumnSchema("b")}), "second")
    second.path.unlink()  # as if it had not come to that
    third = history.save(Schema({"c": ColumnSchema("c")}), "third")
    assert [list(snapshot.schema.columns) for snapshot in history.snapshots] == [["a"], ["b"], ["c"]]
    assert third.number == 3


def test_versions_are_deleted_a_month_after_they_were_replaced(tmp_path: Path) -> None:
    history = SchemaHistory(tmp_path, days=30)
    for name in "abcd":
        history.save(Schema({name: ColumnSchema(name)}), name)
    now = datetime.datetime.now(datetime.UTC)
    for snapshot, days in zip(history.snapshots, (90, 40, 20, 10), strict=True):
        body = snapshot.path.read_text().partition("\n")[2]
        snapshot.path.write_text(f"# {(now - datetime.timedelta(days=days)).isoformat()} {snapshot.reason}\n{body}")
    history.save(Schema({"e": ColumnSchema("e")}), "e")
    assert [snapshot.reason for snapshot in history.snapshots] == ["b", "c", "d", "e"]  # b was in force 20 days ago
    assert list(history.at(now - datetime.timedelta(days=25)).schema.columns) == ["b"]
    assert [s.number for s in SchemaHistory(tmp_path, days=0).snapshots] == [2, 3, 4, 5]
    SchemaHistory(tmp_path, days=0).restore(2)
    assert list(history.current.columns) == ["b"]
    assert [snapshot.number for snapshot in history.snapshots] == [6]


def test_an_existing_file_becomes_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "schema.pbtxt").write_text(TFX_SCHEMA)
    history = SchemaHistory(tmp_path)
    history.save(history.current.change("age", maximum=110), "nobody is older")
    assert [(version.number, version.reason) for version in history.snapshots] == [
        (1, "existing file"),
        (2, "nobody is older"),
    ]
    restored = replace(history.at(1).schema, version=0)
    assert restored.columns == parse_schema(TFX_SCHEMA).columns
    message = schema_to_proto(restored)
    assert message.tensor_representation_group == proto(TFX_SCHEMA).tensor_representation_group
    assert schema_from_proto(message).diff(parse_schema(TFX_SCHEMA)) == ()
