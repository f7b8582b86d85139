"""A run's model is exported to every format, with its card, and every failure of an export is reported."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert")

from mlkit.errors import InputError, MissingDependencyError, ModelError, ParameterError, StorageError
from mlkit.export import export_run, write_card
from mlkit.export.formats import find_formats
from mlkit.export.litert_runtime import load_litert
from mlkit.export.model_card import find_evaluation
from mlkit.export.web_page import find_engine
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import REPOSITORY, run_cli

LITERT = ("litert", "litert-float16", "litert-int8", "litert-full-int8", "litert-int4")
UV = """#!/bin/sh
# A fake of uv and the converter: records its arguments and writes a model.
echo "$@" > "$RECORDED/arguments"; echo "$PYTHONPATH" > "$RECORDED/path"
for last; do input=$output; output=$last; done
cp -r "$input" "$RECORDED/network"
{then}
mkdir -p "$output"; echo '{{}}' > "$output/model.json"; echo weights > "$output/group1-shard1of1.bin"
"""
OWN_MODEL = """
import keras
import tensorflow as tf

class Halved(keras.layers.Layer):
    def call(self, inputs):
        return inputs * 0.5

def build(dataset, *, seed=42, odd=False, any_size=False):
    image = keras.Input((None, None, 1) if any_size else (8, 8, 1), name="image")
    if any_size:
        flat = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(image))
    else:
        flat = keras.layers.Flatten()(Halved()(image))
    if odd:
        flat = keras.layers.Lambda(lambda x: tf.linalg.svd(x[..., 0], compute_uv=False), output_shape=(8,))(image)
    return keras.Model({"image": image}, keras.layers.Dense(10, "softmax")(flat))
"""
EXPORT = """
import sys
from mlkit.export import export_run
from mlkit.runs import Run
results = export_run(Run(sys.argv[1]), sys.argv[2])"""
KILLED_PAGE = "import os\nos.replace = lambda *paths: os.kill(os.getpid(), 9)" + EXPORT


def has_engine() -> bool:
    try:
        return bool(find_engine(REPOSITORY))
    except MissingDependencyError:
        return False


needs_engine = pytest.mark.skipif(not has_engine(), reason="needs LiteRT.js from npm")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict]:
    """A project with a run that was trained, evaluated and exported by commands, and the output of the last one."""
    folder = tmp_path_factory.mktemp("exported")
    options = ("-p", 'dataset_options={"rows": 3000, "fractions": [0.6, 0.1, 0.3]}', "-p", "epochs=2")
    evaluation = ("-p", "slices=[device,segment]", "-p", "groups=device")
    for line in (("run", "train", "-p", "dataset=retail", *options), ("run", "evaluate", *evaluation)):
        done = run_cli(*line, folder=folder)
        assert done.returncode == 0, done.stderr
    done = run_cli("export", "latest", "--to", ",".join(LITERT), "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    return folder, Run(folder / "runs" / output["run"]), output


@pytest.fixture
def run(exported: tuple[Path, Run, dict], tmp_path: Path) -> Run:
    """A copy of that run in its own run store."""
    store = tmp_path / "runs"
    store.mkdir()
    return Run(shutil.copytree(exported[1].folder, store / exported[1].id))


def handmade(root: Path, **options: bool) -> Run:
    """A completed run with a model from a custom module, as a job would leave it."""
    from mlkit.data import load_dataset
    from mlkit.export import export_saved_model
    from mlkit.models import build_model

    digits = load_dataset("digits")
    with RunStore(root).create("train", parameters={"model": "handmade_model:build", "model_options": options}) as run:
        run.log_data(digits.record())
        export_saved_model(build_model("handmade_model:build", digits, **options), digits, run)
    return run


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of model functions."""
    (tmp_path / "handmade_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake of uv; the folder with its recorded arguments."""
    return fake_uv(tmp_path, monkeypatch)


def fake_uv(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> Path:
    for name in ("bin", "recorded"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "bin" / "uv").write_text(UV.format(then=then))
    (folder / "bin" / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("RECORDED", str(folder / "recorded"))
    return folder / "recorded"


# -- the command ---------------------------------------------------------------------------------------------------


def test_every_format_is_written_listed_and_reported(exported: tuple[Path, Run, dict]) -> None:
    _, run, output = exported
    assert [(result["target"], result["state"]) for result in output["targets"]] == [
        (name, "exported") for name in LITERT
    ]
    formats, listed = find_formats(run.folder), {artifact.path: artifact for artifact in run.record.artifacts}
    assert set(formats) == {"savedmodel", *LITERT}
    for result in output["targets"]:
        assert result["bytes"] == (Path(result["path"]) / "model.tflite").stat().st_size < 10_000_000
    for file in [file for model in formats.values() for file in model.files]:
        path = file.relative_to(run.folder).as_posix()
        assert listed[path].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert output["card"] == str(run.folder / "model_card.md")
    assert listed["model_card.md"].size == (run.folder / "model_card.md").stat().st_size


def test_all_formats_give_the_predictions_of_the_saved_model(exported: tuple[Path, Run, dict]) -> None:
    from mlkit.data import reload_dataset
    from mlkit.export import load_saved_model

    _, run, _ = exported
    rows, _ = reload_dataset(run.record.data[0]).take("test")
    rows = {name: values[:50] for name, values in rows.items()}
    expected = load_saved_model(run.folder)(rows)
    outputs = {kind: load_litert(run.folder, kind)(rows) for kind in ("float32", "float16", "int8")}
    np.testing.assert_allclose(outputs["float32"]["probabilities"], expected["probabilities"], atol=1e-5)
    np.testing.assert_allclose(outputs["float16"]["probabilities"], expected["probabilities"], atol=1e-2)
    assert (outputs["int8"]["class"] == expected["class"]).mean() > 0.9


def test_a_second_export_makes_and_imports_nothing(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    before = (run.folder / "litert" / "int8" / "model.tflite").stat().st_mtime_ns
    script = f"{EXPORT}; print([result.state for result in results], 'tensorflow' in sys.modules)"
    command = [sys.executable, "-c", script, run.folder, "litert,litert-int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['existing', 'existing'] False\n"
    assert (run.folder / "litert" / "int8" / "model.tflite").stat().st_mtime_ns == before
    shown = run_cli("export", run.id, "--to", "litert,litert-int8", folder=folder, COLUMNS="120")
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:3]] == [
        ["litert", "existing"],
        ["litert-int8", "existing"],
    ]
    assert f"mlkit parity {run.id}" in shown.stdout


def test_invalid_formats_are_rejected(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    done = run_cli("export", run.id, "--to", "litert,tfsj", folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no format 'tfsj' to export to. Did you mean 'tfjs'?" in " ".join(done.stderr.split())
    with pytest.raises(ParameterError, match="Say what to export to"):
        export_run(run, "")


def test_a_failed_format_is_reported_and_the_exit_code_is_1(exported: tuple[Path, Run, dict], tmp_path: Path) -> None:
    folder, run, _ = exported
    done = run_cli("export", run.id, "--to", "litert,litertjs", "--json", folder=folder)  # no node_modules there
    assert done.returncode == 1
    existing, failed = json.loads(done.stdout)["targets"]
    assert (existing["state"], failed["state"]) == ("existing", "failed")
    assert "npm install @litertjs/core" in failed["reason"]


def test_a_signed_run_is_not_changed(run: Run) -> None:
    (run.folder / "model.sig").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(InputError, match="is signed"):
        export_run(run, "litert-int8", replace=True)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"} == before


# -- the card ------------------------------------------------------------------------------------------------------


def test_the_card_has_the_results_of_the_evaluation(exported: tuple[Path, Run, dict]) -> None:
    _, run, _ = exported
    card, report = (
        (run.folder / "model_card.md").read_text(encoding="utf-8"),
        find_evaluation(run)["labels"]["purchased"],
    )
    for section in ("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
                    "Quantitative analyses", "Ethical considerations", "Caveats and recommendations"):  # fmt: skip
        assert f"\n## {section}\n" in card
    auc = report["metrics"]["auc"]
    assert f"AUC {auc['value']:.4g} ({auc['low']:.4g} to {auc['high']:.4g}) on {report['rows']:,} unseen rows" in card
    worst = min(
        (part for part in report["slices"] if not part["uncertain"]), key=lambda part: part["metrics"]["auc"]["value"]
    )
    table = card.partition("Requested slices")[2].splitlines()
    assert table[4].startswith(f"| {worst['slice']} | {worst['rows']:,} |")
    assert run.record.data[0]["fingerprint"][:16] in card
    for model in find_formats(run.folder).values():
        assert f"| {model.bytes:,} |" in card
    assert "The quality gate was not run: `mlkit gate`." in card


def test_the_usage_example_of_the_card_runs(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    code = (run.folder / "model_card.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace("runs/", f"{folder}/runs/").replace("\nmodel({", "\noutputs = model({"), names)
    assert names["outputs"]["class"][0] in ("false", "true")


def test_the_card_has_gate_and_parity_and_keeps_handwritten_sections(run: Run) -> None:
    card = run.folder / "model_card.md"
    text = card.read_text(encoding="utf-8")
    head, _, rest = text.partition("## Intended use\n")
    card.write_text(
        f"{head}## Intended use\n\nTo sort the front page.\n\n## {rest.partition('## ')[2]}", encoding="utf-8"
    )
    check = {"rule": "auc at least 0.99", "passed": False, "actual": "0.8"}
    gate = {"passed": False, "reason": "0.99 is required.", "against": "train-x", "checks": [check]}
    (run.folder / "gate.json").write_text(json.dumps(gate))
    targets = [
        {
            "target": "litert-int8",
            "signature": "",
            "max_difference": 0.0123456,
            "passed": False,
            "reason": "beyond 0.01",
        },
        {"target": "tfjs", "signature": "", "max_difference": None, "passed": None, "reason": "not exported"},
    ]
    (run.folder / "parity.json").write_text(json.dumps({"passed": False, "targets": targets}))
    again = write_card(run).read_text(encoding="utf-8")
    assert "\nTo sort the front page.\n" in again
    assert "**Quality gate, against `train-x`: failed.** 0.99 is required." in again
    assert "| litert-int8 | **no** | 0.01235 | beyond 0.01 |" in again
    assert "| tfjs | not run |  | not exported |" in again
    assert "differ from the trained model by more than the tolerance: litert-int8.\n" in again
    assert "mlkit gate`" not in again.partition("## Caveats")[2]
    assert write_card(run).read_text(encoding="utf-8") == again


# -- models that do not convert ------------------------------------------------------------------------------------


def test_an_unsupported_operation_is_named_and_other_formats_are_made(own_model: Path, converter: Path) -> None:
    run = handmade(own_model / "runs", odd=True)
    results = {result.name: result for result in export_run(run, "savedmodel,litert,litert-int8,litertjs,tfjs")}
    assert {name: result.state for name, result in results.items()} == {
        "savedmodel": "existing", "litert": "failed", "litert-int8": "failed", "litertjs": "failed", "tfjs": "exported",
    }  # fmt: skip
    assert results["litert-int8"].reason.startswith("LiteRT has no Svd. Replace the layer that needs it")
    assert results["litertjs"].reason.startswith("It contains the format litert, which failed: LiteRT has no Svd")
    assert not list((run.folder / "litert").glob("*"))
    assert not (run.folder / "page.html").exists()


def test_a_custom_layer_needs_no_registration(own_model: Path) -> None:
    from mlkit.export import load_saved_model

    run = handmade(own_model / "runs")
    assert [result.state for result in export_run(run, "litert")] == ["exported"]
    image = np.random.default_rng(0).uniform(0, 16, (3, 8, 8, 1))
    outputs = [
        model({"image": image})["probabilities"] for model in (load_litert(run.folder), load_saved_model(run.folder))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_a_variable_shape_is_reported(own_model: Path) -> None:
    (result,) = export_run(handmade(own_model / "runs", any_size=True), "litert")
    assert (result.state, "Give its keras.Input a shape" in result.reason) == ("failed", True)


# -- full disks and kills -------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_existing_formats_unchanged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.export import litert as conversion

    def raise_disk_full(path: Path, content: bytes) -> None:
        raise StorageError("No space left on device")

    before = (run.folder / "litert" / "int8" / "model.tflite").read_bytes()
    shutil.rmtree(run.folder / "litert" / "float16")
    monkeypatch.setattr(conversion, "write_atomic", raise_disk_full)
    results = export_run(run, "litert-float16,litert-int8", replace=True)
    assert [(result.state, result.reason) for result in results] == [("failed", "No space left on device")] * 2
    assert sorted(path.name for path in (run.folder / "litert").iterdir()) == ["float32", "full_int8", "int4", "int8"]
    assert (run.folder / "litert" / "int8" / "model.tflite").read_bytes() == before


def test_replaced_formats_leave_no_old_files_in_the_list(run: Run) -> None:
    (run.folder / "litert" / "int8" / "old.bin").write_text("of an earlier version")
    run.log_artifact(run.folder / "litert" / "int8" / "old.bin")
    export_run(run, "litert-int8", replace=True)
    assert {path.name for path in (run.folder / "litert" / "int8").iterdir()} == {"model.tflite", "preprocessing.json"}
    assert "litert/int8/old.bin" not in {artifact.path for artifact in run.record.artifacts}


@needs_engine
def test_a_page_is_written_atomically(run: Run) -> None:
    command = [sys.executable, "-c", KILLED_PAGE, run.folder, "litertjs"]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == -signal.SIGKILL
    assert "litertjs" not in find_formats(run.folder)
    assert [result.state for result in export_run(run, "litertjs", installed=REPOSITORY)] == ["existing", "exported"]
    assert find_formats(run.folder)["litertjs"].bytes > 3_000_000


def test_a_killed_conversion_to_tfjs_leaves_no_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = 'mkdir -p "$output"; echo "{}" > "$output/model.json"; kill -9 $PPID; exit 1'
    recorded = fake_uv(tmp_path, monkeypatch, half)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", EXPORT, run.folder, "tfjs"], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (recorded / "network" / "saved_model.pb").exists()
    assert "tfjs" not in find_formats(run.folder)
    assert len(list(run.folder.glob(".writing-*"))) == 1
    shutil.rmtree(recorded / "network")
    fake_uv(tmp_path, monkeypatch)
    assert [result.state for result in export_run(run, "tfjs")] == ["exported"]
    assert not list(run.folder.glob(".writing-*"))


# -- TF.js ---------------------------------------------------------------------------------------------------------


def test_the_converter_gets_a_numeric_network_in_its_own_environment(run: Run, converter: Path) -> None:
    import tensorflow as tf

    (result,) = export_run(run, "tfjs")
    arguments = (converter / "arguments").read_text().split()
    assert arguments[:2] == ["tool", "run"]
    assert {"tensorflowjs==4.22.0", "ydf<0.14", "setuptools<81", "--signature_name=serving_default"} <= set(arguments)
    assert (converter / "path").read_text() == "\n"  # its packages belong to another TensorFlow
    network = tf.saved_model.load(str(converter / "network")).signatures["serving_default"]
    record = json.loads((result.model_format.path / "preprocessing.json").read_text(encoding="utf-8"))
    _, inputs = network.structured_input_signature
    assert {(name, spec.dtype.name, *spec.shape) for name, spec in inputs.items()} == {
        (spec["name"], spec["dtype"], None, *spec["shape"]) for spec in record["inputs"]
    }
    assert sorted(record["model"]["files"]) == ["group1-shard1of1.bin", "model.json"]
    assert {"tfjs/model.json", "tfjs/preprocessing.json"} <= {artifact.path for artifact in run.record.artifacts}


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (
            "echo 'error: Failed to fetch: no route' >&2; exit 2",
            r"cannot be set up \(error: Failed to fetch: no route\)",
        ),
        ("printf 'Traceback\\nValueError: Unsupported Ops in the model\\nSvd\\n' >&2; exit 1", r"TF\.js has no Svd\."),
        ("kill -9 $$", r"was killed \(signal 9\)"),
    ],
)
def test_errors_of_the_converter_are_reported(
    then: str, message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.export import tfjs

    fake_uv(tmp_path, monkeypatch, then)
    network = tmp_path / "network"
    network.mkdir()
    with pytest.raises((ModelError, MissingDependencyError), match=message):
        tfjs._run_converter(network, tmp_path / "out")


def test_without_uv_the_error_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.export import tfjs

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tfjs.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match="pip install uv"):
        tfjs.converter_command()


@pytest.mark.skipif("WITH_TFJS" not in os.environ, reason="needs a folder with TF.js from npm, named by WITH_TFJS")
def test_tfjs_gives_the_predictions_of_the_saved_model(run: Run) -> None:
    from mlkit.data import reload_dataset
    from mlkit.export import load_saved_model
    from mlkit.export.tfjs import predict_tfjs

    (result,) = export_run(run, "tfjs")
    assert result.state == "exported", result.reason
    rows, _ = reload_dataset(run.record.data[0]).take("test")
    rows = {name: values[:40] for name, values in rows.items()}
    requests = [{name: values[row] for name, values in rows.items()} for row in range(40)]
    outputs = predict_tfjs(result.model_format.path, requests, Path(os.environ["WITH_TFJS"]))
    expected = load_saved_model(run.folder)(rows)
    np.testing.assert_allclose([row["probabilities"] for row in outputs], expected["probabilities"], atol=1e-5)
    assert [row["class"] for row in outputs] == expected["class"].tolist()
