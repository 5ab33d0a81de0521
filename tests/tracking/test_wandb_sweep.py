"""W&B sweeps: the agent of wandb runs trials of conf/wandb_sweep.yaml against a local server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from support.wandb_files import tracked_config
from support.wandb_server import serving

from promcse_pl.config import Config
from promcse_pl.config.fields import settings
from promcse_pl.run_folder import write_config
from promcse_pl.tracking.wandb import new_run_id

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "conf" / "wandb_sweep.yaml").read_text())


def test_every_parameter_of_the_file_is_a_setting_in_its_range():
    known = settings(Config)
    for key, parameter in SWEEP["parameters"].items():
        values = parameter.get("values") or [parameter["min"], parameter["max"]]
        assert all(known[key].range.allows(value) for value in values), key
    assert SWEEP["metric"] == {"name": "dev/spearman", "goal": "maximize"}


def test_the_documentation_shows_the_commands_with_the_name_of_the_file():
    page = (ROOT / "docs" / "wandb.md").read_text()
    assert "wandb sweep conf/wandb_sweep.yaml" in page
    assert "wandb agent" in page


def test_the_id_of_a_run_is_that_of_the_agent_only_inside_a_sweep_of_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert new_run_id() != "chosen"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert new_run_id() == "chosen"


def test_an_agent_runs_trials_as_normal_runs_with_its_ids_and_continues_after_one_that_fails(tmp_path):
    config = tracked_config(tmp_path, "online")
    write_config(config, tmp_path / "base.yaml")
    (run_dir,) = (argument for argument in SWEEP["command"] if argument.startswith("hydra.run.dir="))
    train = ["promcse", "train", f"--config={tmp_path / 'base.yaml'}", run_dir, "${args_no_hyphens}"]
    assert SWEEP["command"][1:3] == train[:2]
    with serving() as server:
        server.sweep = yaml.safe_dump({**SWEEP, "command": ["${env}", *train]})
        server.trials = [
            ("refused", {"loss.margin": 5.0, "prompt.length": 2}),
            ("trained", {"loss.margin": 0.3, "prompt.length": 4}),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", "someone/promcse/s"],
            cwd=tmp_path,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "WANDB_API_KEY": "0123456789" * 4,
                "WANDB_BASE_URL": server.url,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "loss.margin must be in [0, 2]" in output
    assert list(server.runs) == ["trained"], output
    run = server.runs["trained"]
    assert (run["project"], run["sweep"], run["complete"]) == ("promcse", "s", 0)
    sent = json.loads(run["config"])
    assert (sent["loss"]["value"]["margin"], sent["prompt"]["value"]["length"]) == (0.3, 4)
    (status,) = tmp_path.glob("outputs/*/*/status.json")
    assert json.loads(status.read_text())["wandb_id"] == "trained"
    # two agents in one folder can start trials in the same second
    assert status.parent.name.endswith("-trained")
