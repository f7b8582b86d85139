"""The gate: real models, measured on the same rows, let in or refused by the command."""

import json
import shutil
from pathlib import Path

import pytest

from mlkit.data.synthetic import retail
from tests.conftest import run_cli

pytestmark = pytest.mark.slow
RULES = """
metrics: {auc: 0.6}
champion: {improve: {auc: 0.01}, significant: false}
slices: {by: [device], metric: log_loss, change: -0.5}
limits: {megabytes: 10}
"""


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A project with rules, a model that has learned hardly anything, and one that has."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gate.yaml").write_text(RULES)
    runs = []
    for rate in ("1e-6", "0.01"):
        rows = "dataset_options={rows: 6000}"
        given = ["dataset=retail", rows, "model=linear", "epochs=2", f"learning_rate={rate}"]
        result = run_cli("run", "train", *(part for item in given for part in ("-p", item)), "--json", folder=folder)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout)["id"])
    return folder, *runs


def test_a_better_model_passes_and_the_verdict_is_kept(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    result = run_cli("gate", challenger, "--against", champion, "--json", folder=folder)
    output = json.loads(result.stdout)
    assert (result.returncode, output["passed"]) == (0, True), result.stderr + output["reason"]
    assert (output["run"], output["against"]) == (challenger, champion)
    rules = [check["rule"] for check in output["checks"]]
    assert rules[:2] == ["auc at least 0.6", "auc better than the champion's by 0.01"]
    assert json.loads((folder / "runs" / challenger / "gate.json").read_text()) == output
    evaluations = [path.name for path in (folder / "runs").glob("*-evaluate-*")]
    again = run_cli("gate", challenger, "--against", champion, folder=folder)
    assert again.returncode == 0, again.stderr
    assert "All 4 checks passed" in again.stdout
    assert [path.name for path in (folder / "runs").glob("*-evaluate-*")] == evaluations, "nothing is measured twice"


def test_a_worse_model_is_refused_with_exit_code_1(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    result = run_cli("gate", champion, "--against", challenger, "--json", folder=folder)
    output = json.loads(result.stdout)
    assert (result.returncode, output["passed"]) == (1, False)
    assert output["reason"].startswith("Gate failed: ")


@pytest.mark.parametrize(
    ("arguments", "rules", "message"),
    [
        ((), "metrics: {auk: 0.5}", "Did you mean 'auc'?"),
        ((), "slices: {by: [texture], metric: auc, limit: 0}", "texture"),
        ((), "{}", "without rules"),
        (("--rules", "nowhere.yaml"), None, "nowhere.yaml"),
        (("--against", "zzzz"), None, "zzzz"),
    ],
)
def test_rules_that_do_not_fit_are_refused(
    gated: tuple[Path, str, str], arguments: tuple[str, ...], rules: str | None, message: str
) -> None:
    folder, _, challenger = gated
    if rules is not None:
        (folder / "other.yaml").write_text(rules)
        arguments = ("--rules", "other.yaml")
    before = (folder / "runs" / challenger / "gate.json").read_bytes()
    result = run_cli("gate", challenger, *arguments, folder=folder)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr.replace("\n", " ")
    assert (folder / "runs" / challenger / "gate.json").read_bytes() == before


def test_a_signed_run_can_be_gated(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    signature = folder / "runs" / challenger / "model.sig"
    (folder / "runs" / challenger / "gate.json").unlink()
    signature.write_text("{}")
    try:
        result = run_cli("gate", challenger, "--against", champion, folder=folder)
    finally:
        signature.unlink()
    assert (folder / "runs" / challenger / "gate.json").exists(), result.stderr
    assert f"mlkit sign {challenger} signs them" in result.stdout.replace("\n", " ")


def test_a_champion_of_other_labels_is_no_champion(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    other = shutil.copytree(folder / "runs" / champion / "saved_model" / "1", folder / "clicks")
    about = json.loads((other / "assets.extra" / "mlkit.json").read_text())
    (other / "assets.extra" / "mlkit.json").write_text(json.dumps(about | {"label": "clicked"}))
    result = run_cli("gate", challenger, "--against", "./clicks", folder=folder)
    assert result.returncode == 2, result.stdout
    assert "predicts clicked (false, true): there is nothing to compare" in result.stderr.replace("\n", " ")


def test_an_evaluation_tells_measures_slices_and_groups_and_keeps_them(gated: tuple[Path, str, str]) -> None:
    folder, _, challenger = gated
    arguments = ("--slice", "device", "--slice", "device,referrer", "--group", "device", "--list", "user_id")
    result = run_cli("evaluate", challenger, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    for words in ("purchased (binary), 600 rows", "pr auc", "ndcg at 10", "worst slices by log loss", "between groups"):
        assert words in result.stdout
    output = json.loads((folder / "runs" / challenger / "evaluation.json").read_text())
    matches = output["labels"]["purchased"]
    assert output["run"] == challenger
    assert {item["slice"] for item in matches["slices"]} > {"device=desktop", "device=desktop and referrer=email"}
    assert matches["fairness_gaps"][0]["metric"] == "selection_rate"
    assert [round(item["threshold"], 1) for item in matches["thresholds"]].count(0.5) == 1
    assert all(item["low"] <= item["value"] <= item["high"] for item in matches["ranking"].values())


def test_a_nightly_batch_ends_with_a_verdict_against_a_champion_whose_run_is_gone(
    gated: tuple[Path, str, str],
) -> None:
    folder, champion, challenger = gated
    assert run_cli("register", champion, "--name", "shop", "--force", "--reason", "test", folder=folder).returncode == 0
    assert run_cli("promote", "shop", "1", folder=folder).returncode == 0
    hidden = (folder / "runs" / champion).rename(folder / "gone")
    try:
        given = ("-p", f"run={challenger}", "-p", "gate=gate.yaml", "-p", "against=shop@champion")
        result = run_cli("run", "evaluate", *given, "--json", folder=folder)
    finally:
        hidden.rename(folder / "runs" / champion)
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout)
    assert (run["metrics"]["gate_passed"], run["metrics"]["drifted_columns"]) == (1, 0)
    verdict = json.loads((Path(run["folder"]) / "gate.json").read_text())
    assert (verdict["passed"], verdict["against"], verdict["evaluation"]) == (True, champion, run["id"])
    assert json.loads((folder / "runs" / challenger / "gate.json").read_text()) == verdict


def test_a_copy_of_a_model_is_measured_on_rows_that_stay_in_their_files(gated: tuple[Path, str, str]) -> None:
    folder, _, challenger = gated
    copy = shutil.copytree(folder / "runs" / challenger / "saved_model" / "1", folder / "copy" / "7")
    retail(rows=70_000, seed=5).write_parquet(folder / "visits.parquet")
    (folder / "strict.yaml").write_text("metrics: {auc: 0.99}")
    given = ("--data", "visits.parquet", "--streamed", "--slice", "device", "--gate", "strict.yaml", "--json")
    result = run_cli("evaluate", "./copy", *given, folder=folder)
    assert result.returncode == 1, result.stderr
    output = json.loads(result.stdout)
    assert (output["run"], output["labels"]["purchased"]["rows"], output["gate"]["passed"]) == (
        str(copy),
        70_000,
        False,
    )
    assert output["gate"]["reason"].startswith("Gate failed: required auc at least 0.99")
    assert not (copy / "gate.json").exists(), "what is not in an open run is left as it is"
