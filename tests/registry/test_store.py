"""The registry: versions, aliases, the ledger; with kills at every step, many writers, full disks, tampering."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from mlkit.cli.registry import _event_text
from mlkit.errors import InputError, MlkitError, NotFoundError, RegistrationError, StorageError
from mlkit.registry import Registry
from mlkit.registry.audit_log import AuditLog, Event, encode_event
from mlkit.registry.state import check_alias, check_name, reduce_events
from mlkit.registry.store import folder_digests, hold_version
from mlkit.runs import Run
from mlkit.runs.store import RunStore
from tests.conftest import run_cli
from tests.runs.test_store_failures import fill_up

FILES = {
    "saved_model/1/variables/variables.index": "the weights",
    "saved_model/1/assets.extra/golden.json": "{}",
    "litert/float32/model.tflite": "for telephones",
    "model_card.md": "# What it is for",
    "evaluation.json": "{}",
}


def make_run(
    root: Path, model: str | bytes = "the graph", *, passed: bool | None = True, others: dict[str, str] = FILES
) -> Run:
    """A completed run as the registry wants it, but for a signature."""
    with RunStore(root / "runs").create("train", notebook="nbs/jobs/train.ipynb") as run:
        for name, text in (others | {"saved_model/1/saved_model.pb": model}).items():
            (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if passed is not None:
            verdict = {"passed": passed, "reason": "Refused: auc." if not passed else "All passed.", "run": run.id}
            (run.folder / "gate.json").write_text(json.dumps(verdict))
        run.log_data({"name": "retail", "source": "retail.parquet", "fingerprint": "5d41402a"})
        run.log_metrics({"test_accuracy": 0.9})
    return run


@pytest.fixture
def place(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which we stand."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody pulls the plug here, and disks are slow
    return project


@pytest.fixture
def registry(place: Path) -> Registry:
    """A registry with three versions of churn, of which the second is champion; nobody has signed."""
    kept = Registry(place / "models")
    for number in (1, 2, 3):
        kept.register(make_run(place, f"graph {number}"), "churn", force=True)
    kept.promote("churn", 1)
    kept.promote("churn", 2, reason="better")
    return kept


@pytest.fixture
def signing(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], Run]:
    """Sign a run with Alice's key, which is trusted here."""
    pytest.importorskip("model_signing")
    from mlkit.registry import sign_folder
    from mlkit.registry.signing import KeySigner, new_key

    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "alice.pem"))
    new_key(place / "alice.pem", place / "keys" / "alice.pub")

    def sign(run: Run) -> Run:
        sign_folder(run.folder, KeySigner(place / "alice.pem"))
        return run

    return sign


def hidden(registry: Registry) -> list[str]:
    """What lies hidden among the versions."""
    return [path.name for path in (registry.root / "churn").iterdir() if path.name.startswith(".")]


# The way it should go


def test_a_signed_and_gated_run_becomes_a_version_that_verifies(
    place: Path, signing: Callable, mlkit: Callable
) -> None:
    run = signing(make_run(place))
    code, printed, complaint = mlkit("register", run.id, "--name", "churn", "--reason", "nightly", "--json")
    assert code == 0, complaint
    output = json.loads(printed)
    assert (output["reference"], output["signer"], output["overrides"], output["run"]) == (
        "churn/1",
        "alice",
        [],
        run.id,
    )
    assert output["lineage"]["data"] == [{"name": "retail", "source": "retail.parquet", "fingerprint": "5d41402a"}]
    version = place / "models" / "churn" / "1"
    shutil.rmtree(place / "runs")  # it stands on its own
    assert (version / "saved_model.pb").read_text() == "the graph"
    assert (version / "variables" / "variables.index").is_file()
    assert (version / "assets.extra" / "golden.json").is_file()
    assert not (version / "saved_model").exists()
    for reference in (version, "churn/1", "churn@latest"):
        assert mlkit("verify", reference)[0] == 0, reference
    assert mlkit("promote", "churn", run.id)[0] == 0
    assert mlkit("verify", "churn@champion")[0] == 0
    assert Registry(place / "models").find("churn").gate["passed"] is True


def test_the_command_line_shows_and_moves_versions(registry: Registry, mlkit: Callable) -> None:
    assert mlkit("promote", "churn", 3, "--alias", "challenger", "--reason", "to see")[0] == 0
    assert mlkit("models", "traffic", "churn", "2=3", "3=1")[0] == 0
    output = {item["version"]: item for item in json.loads(mlkit("models", "list", "churn", "--json")[1])}
    assert [output[number]["aliases"] for number in (1, 2, 3)] == [[], ["champion"], ["challenger"]]
    assert [output[number]["traffic"] for number in (1, 2, 3)] == [None, 0.75, 0.25]
    assert output[1]["metrics"] == {"test_accuracy": 0.9}
    assert output[1]["lineage"]["notebook"] == "nbs/jobs/train.ipynb"
    assert "churn/3" in mlkit("models", "list")[1]
    assert mlkit("rollback", "churn", "--reason", "complaints")[0] == 0
    events = json.loads(mlkit("models", "log", "churn", "--json")[1])
    assert [event["kind"] for event in events[-3:]] == ["promoted", "traffic split", "rolled back"]
    assert (events[-1]["reason"], events[-1]["payload"]["before"], events[-1]["payload"]["version"]) == (
        "complaints",
        2,
        1,
    )
    assert mlkit("models", "remove-alias", "churn", "challenger")[0] == 0
    assert mlkit("models", "delete", "churn", 3)[0] == 0
    assert not (registry.root / "churn" / "3").exists()
    code, printed, _ = mlkit("models", "check", "--head", events[-1]["digest"][:16])
    assert (code, "versions are as they were written" in printed) == (0, True), printed
    assert 'base_path: "/models/churn"' in mlkit("models", "config", "--base", "/models/")[1]


def write_notebook(run: Run, *sources: str) -> None:
    """An executed notebook under one heading, whose cells were at work for a minute each, the last until now."""
    cells = [{"cell_type": "markdown", "source": "## Training", "metadata": {}}]
    for minutes, source in zip(range(len(sources), 0, -1), sources, strict=True):
        begun = datetime.now(UTC) - timedelta(minutes=minutes) + timedelta(seconds=5)
        ended = begun + timedelta(seconds=59)
        timing = {"start_time": begun.isoformat(), "end_time": ended.isoformat(), "status": "completed"}
        cells += [{"cell_type": "code", "source": source, "outputs": [], "metadata": {"papermill": timing}}]
    (run.folder / "notebook.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))


def test_a_version_leads_back_to_run_data_and_notebook_cell(place: Path, signing: Callable, mlkit: Callable) -> None:
    run = make_run(place)
    write_notebook(run, "prepare()", "# long\nhistory = network.fit(rows)", "export_saved_model(network, data, run)")
    curves = run.tensorboard / "train"
    curves.mkdir()
    (curves / "events.out.tfevents.1").write_text("curves")
    a_minute_ago = datetime.now(UTC).timestamp() - 60
    os.utime(curves / "events.out.tfevents.1", (a_minute_ago, a_minute_ago))
    assert mlkit("register", signing(run).id, "--name", "churn")[0] == 0
    Registry().register(make_run(place, "another"), "churn", force=True)  # whose notebook is not there
    Registry().promote("churn", 1)
    shutil.rmtree(place / "runs")
    for reference in ("churn/1", "churn@champion"):
        code, printed, complaint = mlkit("models", "list", reference)
        assert code == 0, complaint
        for output in (run.id, "nbs/jobs/train.ipynb", "retail.parquet  5d41402a", "churn/1 comes from the run"):
            assert output in printed, printed
        assert "by cell 2, Training:  # long" in printed, printed
        assert "by cell 3, Training:  export_saved_model(network, data, run)" in printed, printed
    (output,) = json.loads(mlkit("models", "list", "churn/1", "--json")[1])
    assert output["lineage"]["cells"]["trained"] == {"index": 2, "heading": "Training", "line": "# long"}
    assert output["lineage"]["cells"]["saved"]["index"] == 3
    code, printed, _ = mlkit("models", "list", "churn/2")
    assert (code, "by cell" in printed) == (0, False)
    assert mlkit("verify", "churn/1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("models list churn/9", 2, "There is no version 9 of churn"),
        ("models list churn@chalenger", 2, "has no alias 'chalenger'"),
        ("register latest", 2, "--name NAME"),
        ("register nothing --name churn", 2, "There is no run"),
        ("register latest --name a/b", 2, "A model's name has letters"),
        ("register latest --name churn", 1, "it is not signed"),
        ("promote churn 9", 2, "There is no version 9 of churn. Versions: 1, 2, 3"),
        ("promote churm 1", 2, "Did you mean 'churn'?"),
        ("promote churn 1 --alias v3", 2, "An alias has letters"),
        ("rollback churn --to 1 --at 2026-01-01", 2, "not both"),
        ("rollback churn --at soon", 2, "--at takes a time as"),
        ("rollback churn --at 2020-01-01", 2, "had no champion at 2020-01-01"),
        ("rollback churn --alias champin", 2, "Did you mean 'champion'?"),
        ("models remove-alias churn challenger", 2, "has no alias 'challenger'"),
        ("models delete churn 2", 2, "it is champion"),
        ("models traffic churn 1=x", 2, "3=90 4=10"),
        ("models traffic churn 1=-1", 2, "greater than 0"),
        ("models traffic churn 9=1", 2, "There is no version 9"),
        ("models list churm", 2, "Did you mean 'churn'?"),
        ("models log churm", 2, "Did you mean 'churn'?"),
        ("models check --head ffffffffffff", 1, ""),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    registry: Registry, mlkit: Callable, arguments: str, code: int, message: str
) -> None:
    before = registry.log.path.read_bytes(), folder_digests(registry.root)
    results, _, complaint = mlkit(*arguments.split())
    assert (results, message in complaint) == (code, True), complaint
    assert (registry.log.path.read_bytes(), folder_digests(registry.root)) == before


def test_where_nothing_is_registered_nothing_is_made(place: Path, mlkit: Callable) -> None:
    assert "Register one: mlkit register" in mlkit("models", "list")[1]
    assert (mlkit("models", "check")[0], mlkit("models", "log")[0]) == (0, 0)
    for command in ("promote churn 1", "rollback churn", "models delete churn 1", "models list churn", "models config"):
        code, _, complaint = mlkit(*command.split())
        assert (code, "mlkit register RUN --name NAME" in complaint) == (2, True), complaint
    assert not (place / "models").exists()


def test_references_mean_what_they_say(registry: Registry) -> None:
    registry.promote("churn", 3, alias="challenger")
    meant = {"churn": 2, "churn/1": 1, "churn@champion": 2, "churn@challenger": 3, "churn@latest": 3}
    assert {reference: registry.find(reference).version for reference in meant} == meant
    for reference in (
        "churn@",
        "churn/",
        "churn/nothing",
        "churn/0",
        "/1",
        "",
        "churn/1/2",
        "churn@champion/1",
        "a\nb",
    ):
        with pytest.raises(NotFoundError):
            registry.find(reference)
    registry.remove_alias("churn", "champion")
    assert registry.find("churn").version == 3


def test_names_and_aliases_are_those_of_mlflow_and_tensorflow_serving() -> None:
    pytest.importorskip("mlflow")
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name

    names = ["churn", "a-b", "3d", "A_1", "a/b", "a:b", "", "a b", "..", "log", "é", "x" * 256, "a.b"]
    aliases = ["champion", "eu_west", "a-b", "latest", "LATEST", "v3", "V12", "3", "", "a b", "a/b", "é", "x" * 256]
    for ours, theirs, given in (
        (check_name, _validate_model_name, names),
        (check_alias, _validate_model_alias_name, aliases),
    ):
        accepted = []
        for name in given:
            try:
                ours(name)
                accepted.append(name)
            except InputError:
                continue
        for name in accepted:
            try:
                theirs(name)
            except MlflowException as error:
                raise AssertionError(name) from error
        assert len(accepted) >= 2


# The door


def test_the_door_is_closed_to_runs_that_nobody_answers_for(place: Path, signing: Callable) -> None:
    registry = Registry(place / "models")
    refused = {
        "it has no gate result": signing(make_run(place, passed=None)),
        "has not passed the gate. Refused: auc": signing(make_run(place, passed=False)),
        "it is not signed": make_run(place),
    }
    tampered = refused["model_card.md has changed"] = signing(make_run(place))
    (tampered.folder / "model_card.md").write_text("# For everything")
    other = refused["its gate.json belongs to another run"] = make_run(place)
    (other.folder / "gate.json").write_text(json.dumps({"passed": True, "run": "somebody"}))
    for reason, run in refused.items():
        with pytest.raises(RegistrationError, match=reason):
            registry.register(run, "churn")
    assert not registry.log.path.exists()
    assert not list(registry.root.glob("churn/*"))
    for number, (reason, run) in enumerate(refused.items(), 1):
        version = registry.register(run, "churn", force=True, reason="it must be")
        assert version.version == number
        assert any(reason in item for item in version.overrides)
    assert registry.events()[0].payload["overrides"][0].startswith("it has no gate result")
    assert ", override: it has no gate result" in _event_text(registry.events()[0])
    (place / "keys" / "alice.pub").unlink()
    with pytest.raises(RegistrationError, match="no key is trusted yet"):
        registry.register(signing_of_another(place, make_run(place)), "churn")


def signing_of_another(place: Path, run: Run) -> Run:
    """A run signed with the key that is no longer trusted."""
    from mlkit.registry import sign_folder
    from mlkit.registry.signing import KeySigner

    sign_folder(run.folder, KeySigner(place / "alice.pem"))
    return run


def test_without_the_packages_for_signatures_one_is_told_what_to_install(
    place: Path, signing: Callable, mlkit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = signing(make_run(place))
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    code, _, complaint = mlkit("register", run.id, "--name", "churn")
    assert (code, "pip install 'mlkit[signing]'" in complaint) == (1, True), complaint
    assert mlkit("register", run.id, "--name", "churn", "--force")[0] == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: shutil.rmtree(run.folder / "saved_model"), "no model to register"),
        (lambda run: (run.folder / "plots").symlink_to("/etc"), "plots is a symbolic link"),
        (lambda run: os.mkfifo(run.folder / "pipe"), "pipe is neither a file nor a folder"),
        (lambda run: (run.folder / "saved_model.pb").write_text("?"), "a file of the same name"),
        (lambda run: (run.folder / "gate.json").write_text("{"), "gate.json is damaged"),
    ],
)
def test_what_cannot_become_a_version_cannot_be_forced(place: Path, spoil: Callable, reason: str) -> None:
    run = make_run(place)
    spoil(run)
    with pytest.raises(MlkitError, match=reason):
        Registry(place / "models").register(run, "churn", force=True)
    assert not list((place / "models").rglob("*.pb"))


def test_a_run_that_is_not_over_is_refused(place: Path) -> None:
    run = RunStore(place / "runs").create("train")
    run.start()
    with pytest.raises(InputError, match="is running; only a completed run"):
        Registry(place / "models").register(run, "churn", force=True)


def test_a_run_is_registered_once_and_a_better_one_gets_the_next_number(place: Path) -> None:
    registry, run = Registry(place / "models"), make_run(place)
    registry.register(run, "churn", force=True)
    run.log_metrics({"later": 1.0})
    with pytest.raises(InputError, match="is churn/1 already"):
        registry.register(run, "churn", force=True)
    assert registry.register(run, "other", force=True).reference == "other/1"
    assert registry.register(make_run(place, "another graph"), "churn", force=True).version == 2


# Aliases


def test_going_back_goes_back_further_each_time(registry: Registry) -> None:
    registry.promote("churn", 3)
    assert [registry.rollback("churn").version, registry.rollback("churn").version] == [2, 1]
    with pytest.raises(NotFoundError, match="has no former version"):
        registry.rollback("churn")
    registry.promote("churn", 3)
    assert registry.rollback("churn").version == 1


def test_going_back_passes_over_what_was_retired(registry: Registry) -> None:
    registry.promote("churn", 3)
    registry.delete("churn", 2)
    with pytest.raises(NotFoundError, match="churn/2 was deleted"):
        registry.rollback("churn", to=2)
    assert registry.rollback("churn").version == 1


def test_an_alias_is_put_back_to_where_it_was_at_a_time(registry: Registry) -> None:
    moments = {event.payload["version"]: event.time for event in registry.events() if event.kind == "promoted"}
    registry.promote("churn", 3)
    assert registry.rollback("churn", at=moments[2]).version == 2
    assert registry.rollback("churn", at=moments[1]).version == 1
    just_before = (moments[2] - timedelta(microseconds=1)).replace(tzinfo=None)  # UTC where nothing is said
    assert registry.rollback("churn", at=just_before).version == 1


def test_time_does_not_go_back_with_the_clock(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlkit.registry import audit_log as log_module

    class Earlier(datetime):
        @classmethod
        def now(cls, zone: object = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(log_module, "datetime", Earlier)
    last = registry.events()[-1].time
    registry.promote("churn", 3)
    assert registry.events()[-1].time == last


def test_moving_the_champion_ends_a_divided_traffic(registry: Registry) -> None:
    for move in (lambda: registry.promote("churn", 3), lambda: registry.rollback("churn")):
        registry.split_traffic("churn", {1: 1, 2: 3})
        assert registry.state("churn").traffic == {1: 0.25, 2: 0.75}
        registry.promote("churn", 1, alias="challenger")
        registry.remove_alias("churn", "challenger")
        assert registry.state("churn").traffic
        move()
        assert registry.state("churn").traffic == {}


def test_what_is_needed_is_not_retired(registry: Registry) -> None:
    code = f"""
import sys
from mlkit.registry import Registry; from mlkit.registry.store import hold_version
registry = Registry({str(registry.root)!r})
with hold_version(registry.find("churn/1")):
    print("held", flush=True)
    sys.stdin.read()
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout.readline() == b"held\n"
        with hold_version(registry.find("churn/1")):  # two may
            pass
        with pytest.raises(InputError, match="a process is serving it"):
            registry.delete("churn", 1)
        assert registry.apply_retention("churn", 1) == []
    finally:
        server.kill()
        server.communicate()
    assert registry.apply_retention("churn", 1) == [1]
    with (
        pytest.raises(NotFoundError, match="was deleted"),
        hold_version(
            registry.versions("churn")[0].__class__(
                "churn", 1, registry.root / "churn" / "1", "", datetime.now(UTC), ""
            )
        ),
    ):
        pass
    assert sorted(path.name for path in (registry.root / "churn").iterdir()) == ["2", "3"]


def test_the_oldest_go_when_there_are_too_many(
    registry: Registry, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLKIT_REGISTRY_MAX_VERSIONS", "3")
    registry.register(make_run(place, "graph 4"), "churn", force=True)
    assert registry.state("churn").versions == [2, 3, 4]
    registry.register(make_run(place, "graph 5"), "churn", force=True)
    assert registry.state("churn").versions == [2, 4, 5]  # 2 is the champion
    assert registry.check() == []
    registry.delete("churn", 5)
    assert registry.register(make_run(place, "graph 6"), "churn", force=True).version == 6  # never the same number


# TensorFlow Serving


def server_config() -> type:
    """TF Serving's ModelServerConfig as far as we write it, with its own field numbers."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    kinds = {"string": 9, "int64": 3, "message": 11, "uint32": 13}

    def message(called: str, **fields: tuple) -> None:
        added = file.message_type.add(name=called)
        for field, (number, kind, many, *of) in fields.items():
            kind_of = {"type_name": f".t.{of[0]}"} if of else {}
            added.field.add(name=field, number=number, type=kinds[kind], label=3 if many else 1, **kind_of)

    message("Specific", versions=(1, "int64", True))
    message("Latest", num_versions=(1, "uint32", False))
    message("Policy", latest=(100, "message", False, "Latest"), specific=(102, "message", False, "Specific"))
    message("Label", key=(1, "string", False), value=(2, "int64", False))
    message(
        "ModelConfig",
        name=(1, "string", False),
        base_path=(2, "string", False),
        model_platform=(4, "string", False),
        model_version_policy=(7, "message", False, "Policy"),
        version_labels=(8, "message", True, "Label"),
    )
    message("List", config=(1, "message", True, "ModelConfig"))
    message("ModelServerConfig", model_config_list=(1, "message", False, "List"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelServerConfig"))


def test_the_files_for_tensorflow_serving_are_read_by_its_own_rules(registry: Registry) -> None:
    def read() -> dict:
        text = (registry.root / "models.config").read_text()
        parsed = text_format.Parse(text, server_config()())
        return {
            item.name: (
                item.base_path,
                list(item.model_version_policy.specific.versions),
                {label.key: label.value for label in item.version_labels},
            )
            for item in parsed.model_config_list.config
        }

    base = str(registry.root / "churn")
    assert read() == {"churn": (base, [2], {"champion": 2})}
    registry.promote("churn", 3, alias="challenger")
    assert read() == {"churn": (base, [2, 3], {"champion": 2, "challenger": 3})}
    registry.remove_alias("churn", "challenger")
    registry.remove_alias("churn", "champion")
    assert read() == {"churn": (base, [3], {})}
    for folder in (registry.root / "churn").iterdir():
        assert folder.name.isdigit()
        assert (folder / "saved_model.pb").is_file()
    batching = registry.root / "batching.config"
    batching.write_text("max_batch_size { value: 7 }\n")  # it is for people to change
    registry.promote("churn", 1)
    assert batching.read_text() == "max_batch_size { value: 7 }\n"


# Hands that tamper


def test_every_byte_of_the_ledger_counts(registry: Registry) -> None:
    for path, stride in ((registry.log.path, 7), (registry.log.head_path, 1)):
        whole = path.read_bytes()
        for place in range(len(whole) - 1, -1, -stride):
            if path == registry.log.head_path and place == len(whole) - 1:
                continue  # the end of its line
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(StorageError, match="tampered with"):
                AuditLog(registry.log.path).events()
        path.write_bytes(whole)
    assert len(Registry(registry.root).events()) == 5


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[:-2],
        lambda lines: lines[1:],
        lambda lines: [],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines[:2], lines[1], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:3], b"junk\r", *lines[3:]],
        lambda lines: [*lines[:-1], lines[-1][:-1]],  # the last line has lost its end
        lambda lines: [*lines, encode_event(Event(6, datetime.now(UTC), "me", "promoted"))[0]],
    ],
)
def test_lines_taken_out_moved_or_put_in_are_noticed_and_nothing_is_written(
    registry: Registry, mlkit: Callable, change: Callable
) -> None:
    path = registry.log.path
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    spoiled = path.read_bytes()
    assert mlkit("models", "check")[0] == 1
    for arguments in ("promote churn 3", "models list churn", "models log"):
        code, _, complaint = mlkit(*arguments.split())
        assert (code, "tampered with" in complaint) == (1, True), complaint
    assert path.read_bytes() == spoiled


def test_a_chain_written_anew_is_noticed_by_a_head_that_was_noted(registry: Registry, mlkit: Callable) -> None:
    noted = registry.events()[-1].digest
    lines, previous, events = b"", "", registry.events()
    for event in events:
        output = vars(event) | {"reason": "it was like this", "previous": previous, "digest": ""}
        line, previous = encode_event(Event(**output))
        lines += line
    registry.log.path.write_bytes(lines)
    registry.log.head_path.write_text(json.dumps({"number": len(events), "digest": previous}))
    assert mlkit("models", "check")[0] == 0  # nobody can see it here
    code, printed, _ = mlkit("models", "check", "--head", noted)
    assert (code, "rewritten since that was noted" in " ".join(printed.split())) == (1, True)


def test_without_its_head_a_ledger_is_not_written(registry: Registry) -> None:
    registry.log.head_path.unlink()
    with pytest.raises(StorageError, match="does not contain its last events"):
        registry.promote("churn", 3)


def replace_by_link(path: Path) -> None:
    """The same content, through a link."""
    target = path.parents[3] / "outside"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("spoil", "finding"),
    [
        (lambda v: (v / "saved_model.pb").write_text("?"), "saved_model.pb has changed"),
        (lambda v: (v / "variables" / "variables.index").write_text("?"), "variables/variables.index has changed"),
        (lambda v: (v / "gate.json").write_text("{}"), "gate.json has changed"),
        (lambda v: (v / "signed.json").write_text("{}"), "signed.json has changed"),
        (lambda v: (v / "model_card.md").unlink(), "model_card.md is missing"),
        (lambda v: (v / "variables" / "x.so").write_text("?"), "variables/x.so was added"),
        (lambda v: (v / ".hidden").write_text("?"), ".hidden was added"),
        (lambda v: (v / "model_card.md").rename(v / "card.md"), "model_card.md was renamed to card.md"),
        (lambda v: replace_by_link(v / "gate.json"), "gate.json is a symbolic link"),
        (lambda v: replace_by_link(v / "variables"), "variables is a symbolic link"),
        (
            lambda v: shutil.copytree(v / "variables", v / "saved_model" / "1" / "variables"),
            "saved_model/1/variables/variables.index was added",
        ),
        (lambda v: (v / "saved_model.pb").rename(v / "old.pb"), "saved_model.pb"),
    ],
)
def test_a_version_that_was_changed_is_noticed_by_signature_and_by_ledger(
    place: Path, signing: Callable, mlkit: Callable, spoil: Callable, finding: str
) -> None:
    registry = Registry(place / "models")
    version = registry.register(signing(make_run(place)), "churn")
    for path in version.path.rglob("*"):
        path.chmod(0o755)
    spoil(version.path)
    code, printed, _ = mlkit("verify", "churn/1", "--json")
    assert (code, any(finding in item for item in json.loads(printed)["findings"])) == (1, True), printed
    code, printed, _ = mlkit("models", "check", "--json")
    assert (code, any(finding in item for item in json.loads(printed)["findings"])) == (1, True), printed
    with pytest.raises(StorageError, match="It is not deployed"):
        registry.promote("churn", 1)
    assert registry.state("churn").aliases == {}


def test_folders_that_nobody_registered_are_named_and_not_lost(
    registry: Registry, place: Path, mlkit: Callable
) -> None:
    stray = registry.root / "churn" / "4"
    stray.mkdir()
    (stray / "saved_model.pb").write_text("by hand")
    shutil.rmtree(registry.root / "churn" / "1")
    assert sorted(finding.partition(":")[0] for finding in registry.check()) == ["churn/1", "churn/4"]
    assert [item["metrics"] for item in json.loads(mlkit("models", "list", "--json")[1])][:2] == [
        {},
        {"test_accuracy": 0.9},
    ]
    assert mlkit("models", "list", "churn")[0] == 0
    with pytest.raises(StorageError, match=r"churn/1: its folder .* is missing"):
        registry.promote("churn", 1, alias="other")
    assert registry.register(make_run(place, "graph 4"), "churn", force=True).version == 4
    kept = next((registry.root / "churn").glob(".unregistered-4-*"))
    assert (kept / "saved_model.pb").read_text() == "by hand"
    assert any("is not registered" in finding for finding in registry.check())


def test_a_version_that_was_copied_by_half_does_not_go_into_service(
    registry: Registry, place: Path, mlkit: Callable
) -> None:
    shutil.copytree(registry.root, place / "backup")
    copied = sorted(path for path in (registry.root / "churn" / "3").rglob("*") if path.is_file())
    for path in copied[len(copied) // 2 :]:  # a copy of the folder that was interrupted
        path.unlink()
    half = copied[len(copied) // 2 - 1]
    half.chmod(0o644)
    half.write_bytes(half.read_bytes()[:3])
    code, printed, _ = mlkit("models", "check", "--json")
    findings = json.loads(printed)["findings"]
    assert code == 1
    assert len([item for item in findings if item.startswith("churn/3: ")]) == len(findings) >= 4, findings
    for write in (
        lambda: registry.promote("churn", 3),
        lambda: registry.promote("churn", 3, alias="challenger"),
        lambda: registry.split_traffic("churn", {2: 1, 3: 1}),
    ):
        with pytest.raises(StorageError, match="It is not deployed"):
            write()
    assert registry.state("churn").aliases == {"champion": 2}  # the others are not concerned
    assert registry.rollback("churn").version == 1
    shutil.copytree(place / "backup" / "churn", registry.root / "churn", dirs_exist_ok=True)
    assert registry.check() == []
    assert registry.promote("churn", 3).version == 3


def test_half_a_copy_without_its_lines_in_the_ledger_is_no_version(registry: Registry, place: Path) -> None:
    half = registry.root / "churn" / "4"
    (half / "variables").mkdir(parents=True)
    (half / "saved_model.pb").write_text("graph")
    assert [finding.partition(":")[0] for finding in registry.check()] == ["churn/4"]
    with pytest.raises(NotFoundError, match="There is no version 4"):
        registry.promote("churn", 4)
    assert "versions: 4" not in (registry.root / "models.config").read_text()
    assert registry.find("churn@latest").version == 3


# Bad days

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from mlkit.registry import Registry; from mlkit.registry.store import version_findings
from mlkit.runs import Run

root, first, second, third = map(Path, sys.argv[1:])
pristine, base = root.with_name("pristine"), Registry(root)
for number, run in enumerate((first, second), 1):
    base.register(Run(run), "churn", force=True)
    base.promote("churn", number)
base.register(Run(third), "churn", force=True)
root.rename(pristine)
real_fsync, os.fsync = os.fsync, lambda descriptor: None  # a kill loses nothing that the system has been told

def dying(real, name, when):
    def call(*arguments, **options):
        when[0] -= 1
        if when[0] == 0:
            if name == "pwrite":  # half a line
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

NAMES = ("open", "mkdir", "chmod", "fchmod", "fsync", "pwrite", "rename", "replace", "unlink", "rmdir", "truncate")
ACTIONS = {  # what is done, and what is then so
    "register": (lambda kept: kept.register(Run(first), "other", force=True), lambda kept: kept.find("other/1")),
    "promote": (lambda kept: kept.promote("churn", 3), lambda kept: kept.find("churn").version == 3),
    "rollback": (lambda kept: kept.rollback("churn"), lambda kept: kept.find("churn").version == 1),
    "demote": (lambda kept: kept.remove_alias("churn", "champion"), lambda kept: not kept.state("churn").aliases),
    "retire": (lambda kept: kept.delete("churn", 1), lambda kept: 1 not in kept.state("churn").versions),
    "divide": (lambda kept: kept.split_traffic("churn", {2: 1, 3: 1}), lambda kept: kept.state("churn").traffic),
}
counts = {}
for name, (action, is_so) in ACTIONS.items():
    before = after = 0
    for step in range(1, 500):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root)
        child = os.fork()
        if not child:
            when = [step]
            for call in NAMES:
                setattr(os, call, dying(getattr(os, call), call, when))
            action(Registry(root))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        kept = Registry(root)
        for model, state in kept.states().items():
            found = [kept.find(f"{model}@{alias}") for alias in state.aliases] + kept.versions(model)
            assert [version_findings(version) for version in found] == [[]] * len(found), (name, step)
        try:
            counted = bool(is_so(kept))
        except Exception:
            counted = False
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and counted, (name, step)
            break
        before, after = before + (not counted), after + counted
        assert counted or not after, f"{name} counted at an earlier step, and not at {step}"
        action(kept) if not counted else kept.promote("churn", 2, alias="another")  # life goes on
        findings = [finding for finding in kept.check() if ".unregistered-" not in finding]
        left = [str(path) for path in root.rglob(".*") if path.name != ".lock" and ".unregistered" not in str(path)]
        assert (findings, left) == ([], []), (name, step)
    counts[name] = [before, after]
print(json.dumps(counts))
"""


def test_a_kill_at_any_step_leaves_every_alias_at_one_complete_version(place: Path) -> None:
    runs = [make_run(place, f"graph {number}", others={}) for number in (1, 2, 3)]
    command = [sys.executable, "-c", KILLED, place / "models", *(run.folder for run in runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout)
    assert set(output) == {"register", "promote", "rollback", "demote", "retire", "divide"}
    assert all(before >= 5 and after >= 2 for before, after in output.values()), (
        output
    )  # kills before it counted, and after
    assert sum(output["register"]) > 30, output


KILLED_AGAIN = (
    KILLED.partition("counts = {}")[0]
    + """
import random
random.seed(7)
shutil.copytree(pristine, root)
killed = done = 0
for round in range(90):  # nothing is repaired in between but by the next one, which is killed, too
    name = random.choice([name for name in ACTIONS if name != "register"] + ["promote"] * 3 + ["new"] * 2)
    child = os.fork()
    if not child:
        when = [random.randint(1, 60 if name == "new" else 18)]
        for call in NAMES:
            setattr(os, call, dying(getattr(os, call), call, when))
        kept = Registry(root)
        try:
            if name == "new":
                kept.register(Run(third), f"model{round}", force=True)
            elif name in ("promote", "rollback"):
                kept.promote("churn", random.choice(kept.state("churn").versions))
            else:
                ACTIONS[name][0](kept)
        except Exception as error:  # what can no longer be done: retired already, no champion
            os._exit(0 if type(error).__name__ in ("NotFoundError", "InputError") else 3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (round, name, status)
    killed, done = killed + os.WIFSIGNALED(status), done + os.WIFEXITED(status)
    kept = Registry(root)
    for model, state in kept.states().items():
        found = [kept.find(f"{model}@{alias}") for alias in state.aliases] + kept.versions(model)
        assert [version_findings(version) for version in found] == [[]] * len(found), (round, name)
kept.promote("churn", 3)
for model in kept.states():
    kept.promote(model, kept.state(model).versions[-1], alias="last")
findings = [finding for finding in kept.check() if "is not registered" not in finding]
left = [str(path) for path in root.rglob(".*") if path.name != ".lock" and ".unregistered" not in str(path)]
known = kept.states()
left = [path for path in left if Path(path).parent.name in known or Path(path).parent == root]
assert (findings, left) == ([], []), (findings, left)
print(json.dumps([killed, done]))
"""
)


def test_kill_after_kill_leaves_every_alias_at_one_complete_version(place: Path) -> None:
    runs = [make_run(place, f"graph {number}", others={}) for number in (1, 2, 3)]
    command = [sys.executable, "-c", KILLED_AGAIN, place / "models", *(run.folder for run in runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    killed, done = json.loads(result.stdout)
    assert killed >= 40, (killed, done)
    assert done >= 10, (killed, done)


def test_a_writer_that_dies_among_others_holds_nobody_up(registry: Registry) -> None:
    code = f"""
import sys
from mlkit.registry import Registry
registry = Registry({str(registry.root)!r})
for turn in range(20):
    registry.promote("churn", 1 + turn % 3, alias=sys.argv[1])
    print(turn, flush=True)
"""
    names = ("first", "second", "dying")
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in names]
    try:
        assert writers[2].stdout.readline() == "0\n"
        writers[2].kill()
        assert [writer.wait(120) for writer in writers[:2]] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    promoted = [event.payload["alias"] for event in registry.events() if event.kind == "promoted"]
    assert [promoted.count(name) for name in names[:2]] == [20, 20]
    assert promoted.count("dying") >= 1
    assert registry.check() == []


def test_eight_writers_at_once_lose_nothing(place: Path) -> None:
    runs = [make_run(place, f"graph {number}") for number in range(8)]
    code = """
import sys
from mlkit.registry import Registry
from mlkit.runs import Run
registry = Registry(sys.argv[1])
for folder in sys.argv[2:]:
    version = registry.register(Run(folder), "churn", force=True)
    registry.promote("churn", version.version)
    registry.promote("churn", version.version, alias=f"by_{version.version}")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, place / "models", run.folder]) for run in runs]
    try:
        assert [writer.wait(300) for writer in writers] == [0] * 8
    finally:
        for writer in writers:
            writer.kill()
    registry = Registry(place / "models")
    state = registry.state("churn")
    assert state.versions == list(range(1, 9))
    assert {version.run for version in registry.versions("churn")} == {run.id for run in runs}
    assert {f"by_{number}": number for number in range(1, 9)} == {
        alias: number for alias, number in state.aliases.items() if alias != "champion"
    }
    promoted = [event.payload["version"] for event in registry.events() if event.payload.get("alias") == "champion"]
    assert state.aliases["champion"] == promoted[-1]
    assert len(registry.events()) == 24
    assert registry.check() == []
    assert hidden(registry) == []


def test_readers_see_whole_states_while_others_write(registry: Registry) -> None:
    code = f"""
from mlkit.registry import Registry
registry = Registry({str(registry.root)!r})
for _ in range(20):
    registry.promote("churn", 3)
    registry.rollback("churn", to=1)
"""
    writer = subprocess.Popen([sys.executable, "-c", code])
    seen, tokens, watching = set(), set(), Registry(registry.root)
    try:
        while writer.poll() is None:
            tokens.add(watching.revision())
            seen.add(watching.find("churn").version)
    finally:
        writer.kill()
    assert writer.wait() == 0
    assert seen <= {1, 2, 3}
    assert len(tokens) > 3
    assert registry.check() == []


def test_a_full_disk_registers_nothing(small_disk: Path, tmp_path: Path) -> None:
    first, second, large = (make_run(tmp_path, text) for text in ("graph 1", "graph 2", "x" * 300_000))
    registry = Registry(small_disk / "models")
    registry.register(first, "churn", force=True)
    registry.promote("churn", 1)
    before = folder_digests(registry.root)
    with pytest.raises(StorageError, match=r"disk is full.*nothing has been changed"):
        registry.register(large, "churn", force=True)
    assert folder_digests(registry.root) == before
    fill_up(small_disk)
    for write in (
        lambda: registry.register(second, "churn", force=True),
        lambda: registry.register(second, "other", force=True),
        lambda: registry.promote("churn", 1, alias="challenger"),
        lambda: registry.remove_alias("churn", "champion"),
    ):
        with pytest.raises(StorageError, match=r"disk is full.*nothing has been changed"):
            write()
        assert Registry(registry.root).find("churn@champion").version == 1
        assert registry.check() == []
    assert folder_digests(registry.root) == before
    assert sorted(path.name for path in registry.root.iterdir() if path.is_dir()) == ["churn"]
    assert hidden(registry) == []
    (small_disk / "filler").unlink()
    assert registry.register(second, "churn", force=True).version == 2


def test_a_line_for_which_there_was_no_room_is_taken_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = folder_digests(registry.root), os.pwrite

    def half(descriptor: int, data: bytes, position: int) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2], position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(StorageError, match="disk is full"):
            registry.promote("churn", 3)
    assert folder_digests(registry.root) == before
    assert registry.promote("churn", 3).version == 3


def test_files_that_follow_from_the_ledger_can_be_made_again(registry: Registry, mlkit: Callable) -> None:
    behind = {name: (registry.root / name).read_bytes() for name in ("models.config", "audit_log.head")}
    registry.promote("churn", 3, alias="challenger")
    after = {name: (registry.root / name).read_bytes() for name in behind}
    for name, data in behind.items():  # as a kill after the line leaves them
        (registry.root / name).write_bytes(data)
    assert registry.find("churn@challenger").version == 3
    assert ["models.config" in finding for finding in registry.check()] == [True]
    assert mlkit("models", "config")[0] == 0
    assert {name: (registry.root / name).read_bytes() for name in behind} == after
    assert registry.check() == []


def test_a_registry_that_cannot_be_written_can_be_read(small_disk: Path, tmp_path: Path) -> None:
    registry = Registry(small_disk / "models")
    registry.register(make_run(tmp_path), "churn", force=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert registry.find("churn").version == 1
    assert registry.check() == []
    with pytest.raises(StorageError, match="read-only"):
        registry.promote("churn", 1)


def test_a_ledger_of_a_later_mlkit_is_not_guessed_at() -> None:
    with pytest.raises(StorageError, match="'sold', which this version of mlkit does not know"):
        reduce_events([Event(1, datetime.now(UTC), "me", "sold", payload={"model": "churn"})])


def test_the_command_line_answers_without_slow_imports() -> None:
    code = "import sys, mlkit.cli.registry, mlkit.registry.store\n"
    code += "print([m for m in ('tensorflow', 'keras', 'model_signing', 'cryptography', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# MLflow


@pytest.fixture
def mlflow(place: Path) -> str:
    """The tracking URI of an empty MLflow."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return f"sqlite:///{place}/mlflow.db"


def test_a_model_is_mirrored_into_mlflow_and_comes_back_with_its_signature(
    place: Path, signing: Callable, mlkit: Callable, mlflow: str
) -> None:
    from mlflow import MlflowClient

    run = signing(make_run(place))
    for step, loss in enumerate((0.7, 0.4), 1):
        run.log_metrics({"loss": loss}, step=step)
    Registry().register(run, "churn")
    Registry().promote("churn", 1)
    code, printed, complaint = mlkit("models", "push", "--uri", mlflow, "--json")
    assert code == 0, complaint
    assert json.loads(printed) == [{"reference": "churn/1", "number": 1, "aliases": ["champion"], "new": True}]
    client = MlflowClient(tracking_uri=mlflow, registry_uri=mlflow)
    version = client.get_model_version_by_alias("churn", "champion")
    assert (version.tags["mlkit.version"], version.tags["mlkit.signer"]) == ("churn/1", "alice")
    points = client.get_metric_history(version.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.7), (2, 0.4)]
    assert mlkit("models", "push", run.id, "--uri", mlflow)[0] == 0
    assert "gate.json" in [file.path for file in client.list_artifacts(version.run_id)]
    assert mlkit("models", "pull", "churn@champion", "--uri", mlflow)[0] == 2  # it is here
    shutil.rmtree(run.folder)
    code, printed, complaint = mlkit("models", "pull", "churn@champion", "--uri", mlflow, "--json")
    assert (code, json.loads(printed)["run"]) == (0, run.id), complaint
    assert mlkit("verify", run.id)[0] == 0
    assert (run.folder / "saved_model" / "1" / "saved_model.pb").read_text() == "the graph"
    Registry().register(make_run(place, "another"), "churn", force=True)
    Registry().promote("churn", 2)
    assert [item["new"] for item in json.loads(mlkit("models", "push", "--uri", mlflow, "--json")[1])] == [False, True]
    assert int(client.get_model_version_by_alias("churn", "champion").version) == 2


def askable() -> bytes:
    """A saved_model.pb with a signature and no graph."""
    from mlkit.export.protos import message_class

    saved = message_class("SavedModel")()
    graph = saved.meta_graphs.add()
    graph.meta_info_def.tags.append("serve")
    output = graph.signature_def["serving_default"]
    output.method_name = "tensorflow/serving/predict"
    for tensors, name in ((output.inputs, "amount"), (output.outputs, "score")):
        tensors[name].dtype = 1
        tensors[name].tensor_shape.dim.add(size=-1)
    return saved.SerializeToString()


def test_a_mirrored_version_is_a_model_that_mlflow_knows(
    place: Path, signing: Callable, mlkit: Callable, mlflow: str
) -> None:
    import yaml
    from mlflow import MlflowClient

    run = make_run(place, askable())
    Registry().register(signing(run), "churn")
    assert mlkit("models", "push", "--uri", mlflow)[0] == 0
    client = MlflowClient(tracking_uri=mlflow, registry_uri=mlflow)
    version = client.get_model_version("churn", "1")
    described = yaml.safe_load(Path(client.download_artifacts(version.run_id, "versions/churn/1/MLmodel")).read_text())
    assert described["run_id"] == version.run_id
    assert described["flavors"]["tensorflow"]["signature_def_key"] == "serving_default"
    assert described["flavors"]["python_function"]["loader_module"] == "mlflow.tensorflow"
    spec = {"name": "amount", "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1]}}
    assert json.loads(described["signature"]["inputs"]) == [spec]
    shutil.rmtree(run.folder)
    assert mlkit("models", "pull", "churn/1", "--uri", mlflow)[0] == 0
    assert not list(run.folder.rglob("MLmodel"))
    assert mlkit("verify", run.id)[0] == 0


def test_mlflow_itself_reads_what_a_mirrored_version_takes(
    place: Path, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")  # without it, MLflow cannot read its own file
    import mlflow as package

    from mlkit.registry import ModelMirror

    registry = Registry()
    registry.register(make_run(place, askable()), "churn", force=True)
    ModelMirror(mlflow).push_model(registry, "churn")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    output = package.models.get_model_info("models:/churn/1")
    assert output.signature.inputs.input_names() == ["amount"]
    assert set(output.flavors) == {"tensorflow", "python_function"}


def test_mirroring_that_was_killed_is_done_again_once(
    registry: Registry, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlkit.registry.mlflow import ModelMirror

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    mirror = ModelMirror(mlflow)
    for method in ("set_terminated", "log_batch", "create_model_version", "log_artifact"):
        with monkeypatch.context() as patch:
            patch.setattr(mirror.client, method, stop)
            with pytest.raises(KeyboardInterrupt):
                mirror.push_model(registry, "churn")
    assert [item.number for item in mirror.push_model(registry, "churn")] == [1, 2, 3]
    assert [item.new for item in mirror.push_model(registry, "churn")] == [False] * 3
    assert len(mirror.client.search_runs(["1"])) == 3


def test_mlflow_that_is_not_there_is_said(
    place: Path, mlflow: str, mlkit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, complaint = mlkit("models", "push")
    assert (code, "--uri sqlite:///mlflow.db" in complaint) == (2, True), complaint
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make_run(place)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        code, _, complaint = mlkit("models", "push", "latest", "--uri", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (code, "it does not respond" in complaint) == (1, True), complaint
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, complaint = mlkit("models", "push", "--uri", "sqlite:///mlflow.db")
    assert (code, "pip install 'mlkit[mlflow]'" in complaint) == (2, True), complaint


FOREIGN = """
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from mlkit.serving.runtimes import load_predictor

class Doubling(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 1), tf.float32, name="x")])
    def __call__(self, x):
        return {"y": 2 * x}

place = Path("foreign")
network = keras.Sequential([keras.layers.Input((1,), name="x"), keras.layers.Dense(1, kernel_initializer="ones")])
lambdas = keras.Sequential([keras.layers.Input((1,)), keras.layers.Lambda(lambda x: x)])
for name, model in {"network": network, "lambdas": lambdas}.items():  # as mlflow.tensorflow lays them out
    (place / name / "data").mkdir(parents=True)
    model.save(place / name / "data" / "model.keras")
tf.saved_model.save(Doubling(), place / "module" / "tf2model")
tf.saved_model.save(tf.Module(), place / "nothing" / "tf2model")
print("made", flush=True)
for line in sys.stdin:
    servable = load_predictor(Path(line.strip()))
    answers = servable.run("serving_default", {"x": np.array([[3.0]], "float32")})
    print(*(np.asarray(answer).tolist() for answer in answers.values()), flush=True)
"""


@pytest.mark.slow
def test_models_that_others_have_registered_in_mlflow_are_served(place: Path, mlkit: Callable, mlflow: str) -> None:
    from mlkit.registry.mlflow import connect

    client, log = connect(mlflow), (place / "log").open("w")
    command = [sys.executable, "-c", FOREIGN]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=place, stdin=pipe, stdout=pipe, stderr=log, text=True) as reader:
        assert reader.stdout.readline() == "made\n", (place / "log").read_text()
        made = client.create_run("0").info
        for folder in sorted((place / "foreign").iterdir()):
            client.log_artifacts(made.run_id, str(folder), folder.name)
            client.create_registered_model(folder.name)
            client.create_model_version(folder.name, f"{made.artifact_uri}/{folder.name}", made.run_id)
        answers = {}
        for name in ("network", "module"):
            code, printed, complaint = mlkit("models", "pull", f"{name}/1", "--uri", mlflow, "--json")
            assert code == 0, complaint
            reader.stdin.write(f"{json.loads(printed)['path']}/saved_model/1\n")
            reader.stdin.flush()
            answers[name] = reader.stdout.readline()
    assert answers == {"network": "[[3.0]]\n", "module": "[[6.0]]\n"}
    before = len(RunStore().list())
    for name, reason in {"lambdas": "Lambda", "nothing": "has no signatures"}.items():
        code, _, complaint = mlkit("models", "pull", f"{name}/1", "--uri", mlflow)
        assert (code, reason in complaint) == (2, True), complaint
    assert len(RunStore().list()) == before


# A real one


LOADED = """
import sys
import tensorflow as tf
print(*tf.saved_model.load(sys.argv[1]).signatures)
"""


@pytest.mark.slow
def test_a_trained_model_goes_all_the_way(place: Path, mlkit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("model_signing")
    monkeypatch.setenv("MLKIT_SIGNING_KEY", str(place / "alice.pem"))
    (place / "gate.yaml").write_text("metrics: {auc: 0.4}\n")
    given = ["dataset=retail", "dataset_options={rows: 2000}", "model=linear", "epochs=1"]
    for command in (["run", "train", *(part for item in given for part in ("-p", item))], ["gate", "latest"]):
        result = run_cli(*command, folder=place)
        assert result.returncode == 0, result.stderr
    run = RunStore(place / "runs").get("latest", having="gate.json")
    assert mlkit("keys", "generate", "alice")[0] == 0
    assert mlkit("sign", run.id)[0] == 0
    code, _, complaint = mlkit("register", run.id, "--name", "retail")
    assert code == 0, complaint
    assert mlkit("promote", "retail", run.id)[0] == 0
    assert mlkit("verify", "models/retail/1")[0] == 0
    version = Registry().find("retail@champion")
    assert (version.run, version.signer, version.overrides, version.gate["passed"]) == (run.id, "alice", (), True)
    assert version.metrics == run.record.metrics
    assert version.lineage()["data"][0]["fingerprint"]
    cells = version.lineage()["cells"]
    assert {what: cell["heading"] for what, cell in cells.items()} == {"trained": "Training", "saved": "Export"}
    assert (cells["trained"]["line"], cells["saved"]["line"][:19]) == ("history = fit(", "export_saved_model(")
    assert cells["trained"]["line"] in mlkit("models", "list", "retail@champion")[1]
    result = subprocess.run([sys.executable, "-c", LOADED, version.path], capture_output=True, text=True)
    assert "serving_default" in result.stdout, result.stderr
