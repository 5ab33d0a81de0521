"""The saved W&B view as data: its metrics are those that runs log; and its errors."""

import json
import re
import socket
from types import SimpleNamespace

import pytest
from support.wandb_files import items, records

from promcse_pl.cli.main import main
from promcse_pl.run_folder import DEV_METRICS
from promcse_pl.tracking import dashboard
from promcse_pl.tracking.dashboard import build_workspace, sent_json

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces.*")


@pytest.fixture(scope="module")
def view() -> dict:
    """The panels of each section, as sent."""
    spec = json.loads(sent_json(build_workspace("someone", "promcse")))["spec"]
    return {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}


def keys_of(panels: object) -> set[str]:
    """All metrics in panels."""
    return set(re.findall(r"\b(?:train|dev|speed|test)/\w+", json.dumps(panels)))


def test_the_view_has_its_sections_and_panels(view):
    kinds = {name: [panel["viewType"] for panel in panels] for name, panels in view.items() if panels}
    assert list(kinds) == ["Training", "Development", "Sweep", "Scores", "Speed"]
    of_a_metric = ["Scatter Plot", "Scatter Plot", "Parallel Coordinates Plot", "Parameter Importance"]
    assert kinds["Sweep"] == [*of_a_metric * len(DEV_METRICS), "Weave"]
    assert kinds["Training"] == ["Run History Line Plot"] * 7
    heat, length = (panel["config"] for panel in view["Sweep"][:2])
    assert [heat[axis] for axis in ("xAxis", "yAxis", "zAxis")] == [
        "config:loss.value.temperature",
        "config:loss.value.margin",
        "summary:dev/spearman",
    ]
    assert (length["xAxis"], length["yAxis"]) == ("config:prompt.value.length", "summary:dev/spearman")
    assert all(panel["config"]["xAxis"] == "step" for name in ("Training", "Speed") for panel in view[name])


def test_every_key_of_the_view_is_one_that_a_run_logs(view, trained_run):
    stored = records(trained_run.folder)
    logged = {key for r in stored if r.HasField("history") for key in items(r.history.item)}
    logged |= {key for r in stored if r.HasField("summary") for key in items(r.summary.update)}
    shown = keys_of(view)
    assert len(shown) >= 12
    # the demo run has triplets, no MLM loss and no test sets, and its dev set consists of pairs
    assert shown - {"train/cosent", "train/mlm", "test/avg", "dev/ndcg_at_10", "dev/best_ndcg_at_10"} <= logged
    settings = set(re.findall(r"config:(\w+)\.value\.(\w+)", json.dumps(view)))
    assert len(settings) >= 5
    sent = next(r.run for r in stored if r.HasField("run"))
    assert all(name in items(sent.config.update)[section] for section, name in settings)


def test_every_metric_of_dev_sets_has_its_panels(view):
    for metric in DEV_METRICS:
        panels = {name: json.dumps(view[name]) for name in ("Development", "Sweep", "Scores")}
        assert re.search(rf"dev/{metric}\b", panels["Development"])
        assert re.search(rf"dev/best_{metric}\b", panels["Development"])
        assert len(re.findall(rf"dev/{metric}\b", panels["Sweep"])) == 4
        assert re.search(rf"dev/{metric}\b", panels["Scores"])


def test_a_missing_extra_key_or_server_is_an_error_that_names_the_fix(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["dashboard"]) == 2
    assert capsys.readouterr().err == "error: promcse dashboard needs a W&B key. Try: wandb login\n"

    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr(dashboard, "SAVE_SECONDS", 4)
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert main(["dashboard", "--entity", "someone"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the W&B server did not answer in 4 s. Try: ")
    assert error.count("\n") == 1

    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(dashboard, "importlib", nothing)
    assert main(["dashboard"]) == 2
    assert "pip install 'promcse_pl[dashboard]'" in capsys.readouterr().err
