"""The gate: real models, measured on the same rows, let in or refused by the command."""

import json
from pathlib import Path

import pytest

from .conftest import run_cli

pytestmark = pytest.mark.slow
RULES = """
measures: {auc: 0.6}
champion: {improve: {auc: 0.01}, significant: false}
slices: {by: [device], measure: log_loss, change: -0.5}
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
        result = run_cli("run", "train", *(part for each in given for part in ("-p", each)), "--json", folder=folder)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads(result.stdout)["id"])
    return folder, *runs


def test_a_better_model_passes_and_the_verdict_is_kept(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    result = run_cli("gate", challenger, "--against", champion, "--json", folder=folder)
    told = json.loads(result.stdout)
    assert (result.returncode, told["passed"]) == (0, True), result.stderr + told["reason"]
    assert (told["run"], told["against"]) == (challenger, champion)
    rules = [check["rule"] for check in told["checks"]]
    assert rules[:2] == ["auc at least 0.6", "auc better than the champion's by 0.01"]
    assert json.loads((folder / "runs" / challenger / "gate.json").read_text()) == told
    evaluations = [path.name for path in (folder / "runs").glob("*-evaluate-*")]
    again = run_cli("gate", challenger, "--against", champion, folder=folder)
    assert again.returncode == 0, again.stderr
    assert "All 4 checks passed" in again.stdout
    assert [path.name for path in (folder / "runs").glob("*-evaluate-*")] == evaluations, "nothing is measured twice"


def test_a_worse_model_is_refused_with_exit_code_1(gated: tuple[Path, str, str]) -> None:
    folder, champion, challenger = gated
    result = run_cli("gate", champion, "--against", challenger, "--json", folder=folder)
    told = json.loads(result.stdout)
    assert (result.returncode, told["passed"]) == (1, False)
    assert told["reason"].startswith("Refused: ")


@pytest.mark.parametrize(
    ("arguments", "rules", "message"),
    [
        ((), "measures: {auk: 0.5}", "Did you mean 'auc'?"),
        ((), "slices: {by: [texture], measure: auc, limit: 0}", "texture"),
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
