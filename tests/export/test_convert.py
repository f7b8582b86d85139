"""A run's model in every form, and its card: what the command leaves, and each way in which an export can go wrong."""

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
from mlkit.runs.run import RunStore
from tests.conftest import REPOSITORY, run_cli

LITERT = ("litert", "litert-float16", "litert-int8", "litert-full-int8", "litert-int4")
UV = """#!/bin/sh
# Stands for uv and the converter: keeps what it was given, writes a model.
echo "$@" > "$KEPT/arguments"; echo "$PYTHONPATH" > "$KEPT/path"
for last; do input=$output; output=$last; done
cp -r "$input" "$KEPT/network"
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
found = export_run(Run(sys.argv[1]), sys.argv[2])"""
KILLED_PAGE = "import os\nos.replace = lambda *paths: os.kill(os.getpid(), 9)" + EXPORT


def has_engine() -> bool:
    try:
        return bool(find_engine(REPOSITORY))
    except MissingDependencyError:
        return False


needs_engine = pytest.mark.skipif(not has_engine(), reason="needs LiteRT.js from npm")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, dict]:
    """A project with a run that was trained, evaluated and exported by commands; what the last one has said."""
    folder = tmp_path_factory.mktemp("exported")
    options = ("-p", 'dataset_options={"rows": 3000, "fractions": [0.6, 0.1, 0.3]}', "-p", "epochs=2")
    evaluation = ("-p", "slices=[device,segment]", "-p", "groups=device")
    for line in (("run", "train", "-p", "dataset=retail", *options), ("run", "evaluate", *evaluation)):
        done = run_cli(*line, folder=folder)
        assert done.returncode == 0, done.stderr
    done = run_cli("export", "latest", "--to", ",".join(LITERT), "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return folder, Run(folder / "runs" / told["run"]), told


@pytest.fixture
def run(exported: tuple[Path, Run, dict], tmp_path: Path) -> Run:
    """A copy of that run in an archive of its own."""
    archive = tmp_path / "runs"
    archive.mkdir()
    return Run(shutil.copytree(exported[1].folder, archive / exported[1].id))


def handmade(root: Path, **options: bool) -> Run:
    """A completed run whose model comes from a module of ours, as a job would leave it."""
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
    """A folder with a module that builds models."""
    (tmp_path / "handmade_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for uv; the folder in which it keeps what it was given."""
    return stand_in(tmp_path, monkeypatch)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> Path:
    for name in ("bin", "kept"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "bin" / "uv").write_text(UV.format(then=then))
    (folder / "bin" / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("KEPT", str(folder / "kept"))
    return folder / "kept"


# -- the command ---------------------------------------------------------------------------------------------------


def test_every_form_is_there_listed_and_told(exported: tuple[Path, Run, dict]) -> None:
    _, run, told = exported
    assert [(each["target"], each["state"]) for each in told["targets"]] == [(name, "made") for name in LITERT]
    forms, listed = find_formats(run.folder), {each.path: each for each in run.record.artifacts}
    assert set(forms) == {"savedmodel", *LITERT}
    for each in told["targets"]:
        assert each["bytes"] == (Path(each["path"]) / "model.tflite").stat().st_size < 10_000_000
    for file in [file for form in forms.values() for file in form.files]:
        path = file.relative_to(run.folder).as_posix()
        assert listed[path].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["card"] == str(run.folder / "model_card.md")
    assert listed["model_card.md"].size == (run.folder / "model_card.md").stat().st_size


def test_the_forms_answer_as_the_saved_model(exported: tuple[Path, Run, dict]) -> None:
    from mlkit.data import reload_dataset
    from mlkit.export import load_saved_model

    _, run, _ = exported
    rows, _ = reload_dataset(run.record.data[0]).take("test")
    rows = {name: values[:50] for name, values in rows.items()}
    expected = load_saved_model(run.folder)(rows)
    answers = {kind: load_litert(run.folder, kind)(rows) for kind in ("float32", "float16", "int8")}
    np.testing.assert_allclose(answers["float32"]["probabilities"], expected["probabilities"], atol=1e-5)
    np.testing.assert_allclose(answers["float16"]["probabilities"], expected["probabilities"], atol=1e-2)
    assert (answers["int8"]["class"] == expected["class"]).mean() > 0.9


def test_a_second_time_nothing_is_made_and_nothing_imported(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    before = (run.folder / "litert" / "int8" / "model.tflite").stat().st_mtime_ns
    script = f"{EXPORT}; print([each.state for each in found], 'tensorflow' in sys.modules)"
    command = [sys.executable, "-c", script, run.folder, "litert,litert-int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['kept', 'kept'] False\n"
    assert (run.folder / "litert" / "int8" / "model.tflite").stat().st_mtime_ns == before
    shown = run_cli("export", run.id, "--to", "litert,litert-int8", folder=folder, COLUMNS="120")
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:3]] == [
        ["litert", "kept"],
        ["litert-int8", "kept"],
    ]
    assert f"mlkit parity {run.id}" in shown.stdout


def test_wrong_questions_are_refused(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    done = run_cli("export", run.id, "--to", "litert,tfsj", folder=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no form 'tfsj' to export to. Did you mean 'tfjs'?" in " ".join(done.stderr.split())
    with pytest.raises(ParameterError, match="Say what to export to"):
        export_run(run, "")


def test_a_failed_form_is_told_and_the_exit_code_is_1(exported: tuple[Path, Run, dict], tmp_path: Path) -> None:
    folder, run, _ = exported
    done = run_cli("export", run.id, "--to", "litert,litertjs", "--json", folder=folder)  # no node_modules there
    assert done.returncode == 1
    kept, failed = json.loads(done.stdout)["targets"]
    assert (kept["state"], failed["state"]) == ("kept", "failed")
    assert "npm install @litertjs/core" in failed["reason"]


def test_a_signed_run_is_left_alone(run: Run) -> None:
    (run.folder / "model.sig").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(InputError, match="is signed"):
        export_run(run, "litert-int8", replace=True)
    with pytest.raises(InputError, match="is signed"):
        write_card(run)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.name != ".lock"} == before


# -- the card ------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_evaluation_has_found(exported: tuple[Path, Run, dict]) -> None:
    _, run, _ = exported
    card, told = (run.folder / "model_card.md").read_text(encoding="utf-8"), find_evaluation(run)["labels"]["purchased"]
    for section in ("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data",
                    "Quantitative analyses", "Ethical considerations", "Caveats and recommendations"):  # fmt: skip
        assert f"\n## {section}\n" in card
    auc = told["measures"]["auc"]
    assert f"AUC {auc['value']:.4g} ({auc['low']:.4g} to {auc['high']:.4g}) on {told['rows']:,} rows" in card
    worst = min((each for each in told["slices"] if not each["uncertain"]), key=lambda e: e["measures"]["auc"]["value"])
    table = card.partition("Slices that were asked for")[2].splitlines()
    assert table[4].startswith(f"| {worst['slice']} | {worst['rows']:,} |")
    assert run.record.data[0]["fingerprint"][:16] in card
    for form in find_formats(run.folder).values():
        assert f"| {form.bytes:,} |" in card
    assert "It has not stood at the gate: `mlkit gate`." in card


def test_the_card_says_how_the_model_is_used(exported: tuple[Path, Run, dict]) -> None:
    folder, run, _ = exported
    code = (run.folder / "model_card.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(code.replace("runs/", f"{folder}/runs/").replace("\nmodel({", "\nanswer = model({"), names)
    assert names["answer"]["class"][0] in ("false", "true")


def test_gate_and_parity_are_on_the_card_and_handwriting_stays(run: Run) -> None:
    card = run.folder / "model_card.md"
    text = card.read_text(encoding="utf-8")
    head, _, rest = text.partition("## Intended use\n")
    card.write_text(
        f"{head}## Intended use\n\nTo sort the front page.\n\n## {rest.partition('## ')[2]}", encoding="utf-8"
    )
    check = {"rule": "auc at least 0.99", "passed": False, "found": "0.8"}
    gate = {"passed": False, "reason": "Refused: 0.99 was asked.", "against": "train-x", "checks": [check]}
    (run.folder / "gate.json").write_text(json.dumps(gate))
    targets = [
        {"target": "litert-int8", "signature": "", "largest": 0.0123456, "passed": False, "reason": "beyond 0.01"},
        {"target": "tfjs", "signature": "", "largest": None, "passed": None, "reason": "not exported"},
    ]
    (run.folder / "parity.json").write_text(json.dumps({"passed": False, "targets": targets}))
    again = write_card(run).read_text(encoding="utf-8")
    assert "\nTo sort the front page.\n" in again
    assert "**Gate, against `train-x`: failed.** Refused: 0.99 was asked." in again
    assert "| litert-int8 | **no** | 0.01235 | beyond 0.01 |" in again
    assert "| tfjs | not run |  | not exported |" in again
    assert "differently from the trained model by more than is allowed: litert-int8.\n" in again
    assert "mlkit gate`" not in again.partition("## Caveats")[2]
    assert write_card(run).read_text(encoding="utf-8") == again


# -- models that do not convert ------------------------------------------------------------------------------------


def test_what_litert_lacks_is_named_and_other_forms_are_made(own_model: Path, converter: Path) -> None:
    run = handmade(own_model / "runs", odd=True)
    found = {each.name: each for each in export_run(run, "savedmodel,litert,litert-int8,litertjs,tfjs")}
    assert {name: each.state for name, each in found.items()} == {
        "savedmodel": "kept", "litert": "failed", "litert-int8": "failed", "litertjs": "failed", "tfjs": "made",
    }  # fmt: skip
    assert found["litert-int8"].reason.startswith("LiteRT has no Svd. Replace the layer that needs it")
    assert found["litertjs"].reason.startswith("It carries the form litert, which failed: LiteRT has no Svd")
    assert not list((run.folder / "litert").glob("*"))
    assert not (run.folder / "page.html").exists()


def test_a_layer_of_ones_own_needs_no_registration(own_model: Path) -> None:
    from mlkit.export import load_saved_model

    run = handmade(own_model / "runs")
    assert [each.state for each in export_run(run, "litert")] == ["made"]
    image = np.random.default_rng(0).uniform(0, 16, (3, 8, 8, 1))
    answers = [
        model({"image": image})["probabilities"] for model in (load_litert(run.folder), load_saved_model(run.folder))
    ]
    np.testing.assert_allclose(*answers, atol=1e-6)


def test_a_shape_that_is_not_settled_is_told(own_model: Path) -> None:
    (found,) = export_run(handmade(own_model / "runs", any_size=True), "litert")
    assert (found.state, "Give its keras.Input a shape" in found.reason) == ("failed", True)


# -- the disk, and kills -------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_forms_that_are_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.export import litert as conversion

    def full(path: Path, content: bytes) -> None:
        raise StorageError("No space left on device")

    before = (run.folder / "litert" / "int8" / "model.tflite").read_bytes()
    shutil.rmtree(run.folder / "litert" / "float16")
    monkeypatch.setattr(conversion, "write_atomic", full)
    found = export_run(run, "litert-float16,litert-int8", replace=True)
    assert [(each.state, each.reason) for each in found] == [("failed", "No space left on device")] * 2
    assert sorted(path.name for path in (run.folder / "litert").iterdir()) == ["float32", "full_int8", "int4", "int8"]
    assert (run.folder / "litert" / "int8" / "model.tflite").read_bytes() == before


def test_forms_made_anew_leave_no_others_in_the_list(run: Run) -> None:
    (run.folder / "litert" / "int8" / "old.bin").write_text("of an earlier version")
    run.log_artifact(run.folder / "litert" / "int8" / "old.bin")
    export_run(run, "litert-int8", replace=True)
    assert {path.name for path in (run.folder / "litert" / "int8").iterdir()} == {"model.tflite", "host.json"}
    assert "litert/int8/old.bin" not in {each.path for each in run.record.artifacts}


@needs_engine
def test_a_page_is_written_whole_or_not_at_all(run: Run) -> None:
    command = [sys.executable, "-c", KILLED_PAGE, run.folder, "litertjs"]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == -signal.SIGKILL
    assert "litertjs" not in find_formats(run.folder)
    assert [each.state for each in export_run(run, "litertjs", installed=REPOSITORY)] == ["kept", "made"]
    assert find_formats(run.folder)["litertjs"].bytes > 3_000_000


def test_a_killed_conversion_to_tfjs_leaves_nothing_that_is_taken_for_a_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = 'mkdir -p "$output"; echo "{}" > "$output/model.json"; kill -9 $PPID; exit 1'
    kept = stand_in(tmp_path, monkeypatch, half)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", EXPORT, run.folder, "tfjs"], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (kept / "network" / "saved_model.pb").exists()
    assert "tfjs" not in find_formats(run.folder)
    assert len(list(run.folder.glob(".writing-*"))) == 1
    shutil.rmtree(kept / "network")
    stand_in(tmp_path, monkeypatch)
    assert [each.state for each in export_run(run, "tfjs")] == ["made"]
    assert not list(run.folder.glob(".writing-*"))


# -- TF.js ---------------------------------------------------------------------------------------------------------


def test_the_converter_is_handed_numbers_in_an_environment_of_its_own(run: Run, converter: Path) -> None:
    import tensorflow as tf

    (found,) = export_run(run, "tfjs")
    arguments = (converter / "arguments").read_text().split()
    assert arguments[:2] == ["tool", "run"]
    assert {"tensorflowjs==4.22.0", "ydf<0.14", "setuptools<81", "--signature_name=serving_default"} <= set(arguments)
    assert (converter / "path").read_text() == "\n"  # whose packages are another TensorFlow's
    network = tf.saved_model.load(str(converter / "network")).signatures["serving_default"]
    record = json.loads((found.form.path / "host.json").read_text(encoding="utf-8"))
    _, takes = network.structured_input_signature
    assert {(name, spec.dtype.name, *spec.shape) for name, spec in takes.items()} == {
        (each["name"], each["dtype"], None, *each["shape"]) for each in record["inputs"]
    }
    assert sorted(record["model"]["files"]) == ["group1-shard1of1.bin", "model.json"]
    assert {"tfjs/model.json", "tfjs/host.json"} <= {each.path for each in run.record.artifacts}


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (
            "echo 'error: Failed to fetch: no route' >&2; exit 2",
            r"cannot be set up \(error: Failed to fetch: no route\)",
        ),
        ("printf 'Traceback\\nValueError: Unsupported Ops in the model\\nSvd\\n' >&2; exit 1", r"TF\.js has no Svd\."),
        ("kill -9 $$", r"was killed \(signal 9\)"),
    ],
)
def test_what_the_converter_complains_of_is_told(
    then: str, said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.export import tfjs

    stand_in(tmp_path, monkeypatch, then)
    network = tmp_path / "network"
    network.mkdir()
    with pytest.raises((ModelError, MissingDependencyError), match=said):
        tfjs._run_converter(network, tmp_path / "out")


def test_without_uv_it_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.export import tfjs

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tfjs.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match="pip install uv"):
        tfjs.converter_command()


@pytest.mark.skipif("WITH_TFJS" not in os.environ, reason="needs a folder with TF.js from npm, named by WITH_TFJS")
def test_tfjs_answers_as_the_saved_model(run: Run) -> None:
    from mlkit.data import reload_dataset
    from mlkit.export import load_saved_model
    from mlkit.export.tfjs import ask_tfjs

    (found,) = export_run(run, "tfjs")
    assert found.state == "made", found.reason
    rows, _ = reload_dataset(run.record.data[0]).take("test")
    rows = {name: values[:40] for name, values in rows.items()}
    asked = [{name: values[row] for name, values in rows.items()} for row in range(40)]
    answers = ask_tfjs(found.form.path, asked, Path(os.environ["WITH_TFJS"]))
    expected = load_saved_model(run.folder)(rows)
    np.testing.assert_allclose([each["probabilities"] for each in answers], expected["probabilities"], atol=1e-5)
    assert [each["class"] for each in answers] == expected["class"].tolist()
